"""MIGE's weights by name: which there are, how they get into a model, and what an open checkpoint is."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from mige_rt.config import ModelConfig
from mige_rt.graphs import GRAPHS, GraphName
from trainer.checkpoints.mapped_files import release_pages
from trainer.model.mige import Mige

Shapes = Mapping[str, tuple[int, ...]]

NAMES_SHOWN = 2000  # of each kind, in an error: all of a published checkpoint's


class Checkpoint(ABC):
    """A checkpoint that is open: the model's sizes, and its weights by name, mapped from their files.

    Attributes:
        config: the model's sizes.
        source: where the weights came from, in words.
    """

    config: ModelConfig
    source: str

    @property
    @abstractmethod
    def files(self) -> Sequence[Path]:
        """The files that the weights are mapped from."""

    @property
    @abstractmethod
    def stored_bytes(self) -> int:
        """The size of all weights as they are stored, in bytes."""

    @abstractmethod
    def save_tokenizer(self, path: Path) -> None:
        """Write T5's tokenizer as the file `path`.

        Raises:
            InputError: it is missing or is not T5's.
        """

    @abstractmethod
    def tensors(self, model: Mige, graphs: Collection[GraphName]) -> dict[str, Tensor]:
        """The weights of some graphs, as they are stored.

        Args:
            model: an empty model of this checkpoint's sizes.
            graphs: the graphs.

        Returns:
            Tensors by the names of `distinct_tensors(model)`.

        Raises:
            InputError: a file is missing or truncated, or holds other names and shapes than the model's.
        """

    def load(
        self,
        graphs: Collection[GraphName] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        model: Mige | None = None,
    ) -> Mige:
        """The model in evaluation mode, with the weights of some graphs.

        Args:
            graphs: the graphs to load, all by default; the others stay on the meta device, but for what a graph shares
                with them.
            dtype: of floating-point weights; None: as they are stored. Weights that are stored so stay mapped from
                the file when `device` is the CPU.
            device: where the weights are put.
            model: of this checkpoint's sizes, whose weights of these graphs are replaced; None: a new one is made.

        Raises:
            InputError: a file is missing or truncated, or does not hold exactly the model's names and shapes.
            ValueError: `graphs` names no graph.
        """
        chosen = set(GRAPHS if graphs is None else graphs)
        if unknown := chosen.difference(GRAPHS):
            raise ValueError(f"no such graph: {', '.join(sorted(unknown))}; there are {', '.join(GRAPHS)}")
        model = self.empty() if model is None else model
        tensors = self.tensors(model, chosen)
        fill(model, {name: _placed(tensor, dtype, device) for name, tensor in tensors.items()})
        for graph in sorted(chosen):
            _require_real(graph, model.graph(graph))
        return model.eval()

    def close(self) -> None:  # noqa: B027, for those that hold files
        """Let go of the files, of which weights that are mapped hold theirs; what is asked for later opens it again."""

    def empty(self) -> Mige:
        """The checkpoint's model without weights, on the meta device."""
        return empty_model(self.config)

    def release_pages(self) -> None:
        """Give back the memory of the weights that were read; they are read from the files again when they are used."""
        release_pages(self.files)


def empty_model(config: ModelConfig) -> Mige:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Mige(config)


def distinct_tensors(model: Mige) -> dict[str, list[str]]:
    """Every weight once, by its first name in the state dict -> all its names there, that one first.

    Two have several names: the patch embedder, which the fusion shares with the denoiser, and T5's embedding.
    """
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    return {aliases[0]: aliases for aliases in names.values()}


def names_in(model: Mige, graphs: Collection[GraphName]) -> list[str]:
    """The weights of some graphs, by the names of `distinct_tensors`."""
    return [
        name
        for name, aliases in distinct_tensors(model).items()
        if any(alias.partition(".")[0] in graphs for alias in aliases)
    ]


def our_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all our weights but the VAE's, each once."""
    model = empty_model(config)
    state = model.state_dict()
    return {name: tuple(state[name].shape) for name in distinct_tensors(model) if not name.startswith("vae_")}


def differences(given: Shapes, expected: Shapes, optional: Shapes | None = None) -> tuple[int, str]:
    """How many names are missing, unexpected or of another shape, and a text that lists them by kind."""
    allowed = {**expected, **(optional or {})}
    misshapen = [name for name in given if name in allowed and given[name] != allowed[name]]
    kinds = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in allowed],
        "wrongly shaped": [f"{name} {list(given[name])} instead of {list(allowed[name])}" for name in misshapen],
    }
    lines: list[str] = []
    for kind, names in kinds.items():
        more = f", ... ({len(names) - NAMES_SHOWN} more)" if len(names) > NAMES_SHOWN else ""
        if names:
            lines.append(f"{len(names)} {kind}: {', '.join(names[:NAMES_SHOWN])}{more}")
    return sum(map(len, kinds.values())), "\n".join(lines)


def fill(model: Mige, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors`, by the names of `distinct_tensors`, in the place of the model's own, uncopied; sharing stays."""
    state: dict[str, Tensor] = {}
    current = model.state_dict(keep_vars=True)
    for name, aliases in distinct_tensors(model).items():
        if name in tensors:
            value = tensors[name]
            # One Parameter for all names: assigned apart, they would be trained apart.
            shared = value
            if isinstance(current[name], nn.Parameter):
                shared = nn.Parameter(value, current[name].requires_grad)
            state |= dict.fromkeys(aliases, shared)
    model.load_state_dict(state, strict=False, assign=True)


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device, dtype) if dtype is not None and tensor.is_floating_point() else tensor.to(device)


def _require_real(graph: str, module: nn.Module) -> None:
    """A guard for whoever changes a module: a buffer outside the state dict would stay without memory."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if hollow := [name for name, tensor in tensors if tensor.is_meta]:
        raise RuntimeError(f"{graph} has tensors that no checkpoint fills: {', '.join(hollow)}")
