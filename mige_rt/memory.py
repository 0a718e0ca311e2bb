"""How much memory a run takes, from the model's sizes, before anything is allocated."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import VAE_QUERY_SLICES

FLOAT = 4  # bytes; the CPU computes in float32
GIB = 2**30


@dataclass(frozen=True)
class MemoryBudget:
    """What a model may take.

    Attributes:
        config: The model's sizes.
        weights: Bytes of the files with weights that are loaded at a time.
        limit: Bytes that all of it may take; None: what is free when it is asked for.
        enforced: Whether what is free counts, as it does on the CPU.
        low_memory: One part of the model is loaded at a time.
    """

    config: ModelConfig
    weights: int
    limit: int | None = None
    enforced: bool = True
    low_memory: bool = False

    def check_model(self) -> None:
        """Check that the model and its smallest usual run fit: one image of the trained size.

        Raises:
            InputError: They do not.
        """
        side = self.config.dit.trained_grid * self.config.dit.patch
        sizes = {"B": 1, "R": 2, "N": 1, "h": side, "w": side}
        # A parameter has a byte or more, whatever the files say.
        weights = self.weights if self.low_memory else max(self.weights, parameters(self.config))
        self._check(weights + run_bytes(self.config, sizes), "this model")

    def check_run(self, sizes: Mapping[str, int]) -> None:
        """Check that a run fits, whose model is loaded.

        Args:
            sizes: Of the axes B, R, N, h and w; see `mige_rt.graphs`.

        Raises:
            InputError: It does not.
        """
        self._check(run_bytes(self.config, sizes) + (self.weights if self.limit is not None else 0), "this run")

    def _check(self, needed: int, what: str) -> None:
        limit = self.limit if self.limit is not None or not self.enforced else free_memory()
        if limit is not None and needed > limit:
            allowed = f"{limit / GIB:.1f} GiB are " + ("free" if self.limit is None else "allowed")
            raise InputError(
                f"{what} needs about {needed / GIB:.1f} GiB of memory, and {allowed}: make fewer or smaller images at "
                "once, use --low-vram or a smaller model, or set another --memory-limit"
            )


def parameters(config: ModelConfig) -> int:
    """About how many numbers a model's weights hold; products and convolutions alone are counted."""
    vision, qformer, text, dit, vae = config.vision, config.qformer, config.text, config.dit, config.vae
    counts = [
        vision.depth * (4 * vision.width**2 + 2 * vision.width * vision.mlp),
        qformer.depth * (4 * qformer.width**2 + qformer.width * (vision.width + qformer.width + 2 * qformer.mlp)),
        text.vocabulary * text.width,
        text.depth * text.width * (4 * text.heads * text.head_width + 3 * text.mlp),
        dit.depth * (8 * dit.width**2 + 2 * dit.width * dit.mlp) + text.width * dit.width,
        config.max_tokens * text.width,
        sum(9 * width**2 * 4 * (vae.layers + 1) for width in vae.widths),
    ]
    return sum(counts)


def run_bytes(config: ModelConfig, sizes: Mapping[str, int]) -> int:
    """About how much memory a run takes beside the weights: of each graph the largest tensors of one layer.

    Args:
        config: The model's sizes.
        sizes: Of the axes B, R, N, h and w.
    """
    vision, text, dit, vae = config.vision, config.text, config.dit, config.vae
    images, batch, references = sizes["B"], sizes["R"], sizes["N"]
    patches = (vision.side // vision.patch) ** 2 + 1
    tokens = sizes["h"] * sizes["w"] // dit.patch**2
    length = config.max_tokens
    pixels = sizes["h"] * sizes["w"] * vae.factor**2
    cross_kv = 2 * dit.depth * batch * dit.width * length
    # Scores and their softmax, then queries, keys, values and the residual, and what is inside of the feed-forward.
    graphs = [
        references * (2 * vision.heads * patches**2 + patches * (6 * vision.width + 2 * vision.mlp)),
        images * (3 * text.heads * length**2 + length * (6 * text.width + 3 * text.mlp)),
        batch * (2 * dit.heads * tokens * (tokens + length) + tokens * (8 * dit.width + 2 * dit.mlp)),
        # A level's input, its norm, its convolution and the residual; attention has one head.
        images * (4 * pixels * vae.widths[0] + vae.attention * 2 * (sizes["h"] * sizes["w"]) ** 2 // VAE_QUERY_SLICES),
    ]
    return FLOAT * (max(graphs) + cross_kv)


def free_memory() -> int | None:
    """Bytes that the machine and this process's control group have left; None where the system does not say."""
    limits: list[int] = []
    try:
        machine = _table(Path("/proc/meminfo"))
        limits.append(machine["MemAvailable:"] * 1024)
        group = Path("/sys/fs/cgroup")
        # Not memory.current, which counts the cached files that would make room.
        limits.append(int((group / "memory.max").read_text()) - _table(group / "memory.stat")["anon"])
    except (OSError, ValueError, KeyError):  # not Linux, or no group, or one without a limit ("max")
        pass
    if not limits and "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return min(limits, default=None)


def _table(path: Path) -> dict[str, int]:
    """A file of lines with a name and a number."""
    return {fields[0]: int(fields[1]) for line in path.read_text().splitlines() if (fields := line.split())}
