"""Compares every stage of our model, and whole samplings, with the recorded outputs of the published implementation.

    python tests/reference/check.py DIR [--salt TEXT] [--backend pytorch|onnxruntime]

DIR holds `golden.npz` (outputs), `golden.json` (sizes and cases) and `keys_reduced.json` (the weights' keys and
shapes). Weights and inputs are made up by the rule in `made_up.py`. Prints a table; the exit code is 0 when all agree,
1 when a stage's relative RMS error is above 1e-5 or that of final latents above 1e-4, 2 when DIR cannot be used.

The backend onnxruntime exports the model's four graphs besides the VAE's in fp32 and runs those: it compares what
stands at their borders, of the prediction the noise channels alone, with the limit 1e-4 throughout.
"""

import argparse
import dataclasses
import json
import math
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from made_up import normal, weight

from export.context import ExportTarget
from export.exporter import ExportLimits, axis_ranges
from export.graphs import export_graph
from mige_rt.config import PRESETS, ModelConfig, TextConfig
from mige_rt.denoise import Conditioning, denoise, denoising_step, schedule_rows
from mige_rt.errors import InputError
from mige_rt.guidance import Branch, branches
from mige_rt.instruction import count_placeholders
from mige_rt.prompt_tokens import collate, tokenize_prompt
from mige_rt.scheduler import make_schedule
from trainer.checkpoints.published_names import check_published, our_tensor
from trainer.checkpoints.weights import empty_model, fill, our_shapes
from trainer.model.dit import sincos_positions
from trainer.model.mige import Mige

STAGE_LIMIT, LATENTS_LIMIT = 1e-5, 1e-4  # relative RMS errors in float32
GRAPH_LIMIT = 1e-4  # of what exported graphs give
TIMESTEP = 500.25  # at which the denoiser's stages were recorded
STAGES = re.compile(r"ln_vision|qformer|ffm|proj|length|mixed|t5|t_block|block\d+|dit|sample\d+")


@dataclass(frozen=True)
class Case:
    """One case of `golden.json`."""

    prompt: str
    references: int
    has_source: bool
    guidance_scale: float
    image_guidance_scale: float | None  # None: subject-driven, two guidance branches instead of three


@dataclass(frozen=True, eq=False)
class Recorded:
    """One output of the published implementation; of a large one only every `step`-th number was kept."""

    case: str  # empty for what belongs to no case
    stage: str
    values: NDArray[Any]
    step: int
    shape: tuple[int, ...] | None  # None where it was not recorded

    positions: NDArray[np.int64] | None = None  # of the numbers kept, where they are not every `step`-th

    def compare(self, ours: NDArray[Any], stage_limit: float = STAGE_LIMIT) -> "Comparison":
        """The relative RMS error; infinite when the shapes differ."""
        limit = LATENTS_LIMIT if self.stage.startswith("sample") else stage_limit
        error = math.inf
        if self.shape is None or self.shape == ours.shape:
            kept = ours.ravel()[:: self.step] if self.positions is None else ours.ravel()[self.positions]
            expected = self.values.ravel().astype(np.float64)
            if kept.size == expected.size:
                error = float(np.linalg.norm(kept - expected) / (np.linalg.norm(expected) or 1.0))
        return Comparison(self.case, self.stage, ours.shape, error, limit)

    def first_channels(self, count: int) -> "Recorded":
        """What was recorded of the first channels (the second axis). Raises InputError where the shape was not."""
        if self.shape is None or len(self.shape) < 2:
            raise InputError(f"{self.case}.{self.stage} has no channels: its .shape is expected in golden.npz")
        row, area = math.prod(self.shape[1:]), math.prod(self.shape[2:])
        positions = np.arange(self.values.size) * self.step
        kept = positions % row < count * area
        positions = positions // row * (count * area) + positions % row
        shape = (self.shape[0], count, *self.shape[2:])
        return dataclasses.replace(self, values=self.values.ravel()[kept], shape=shape, positions=positions[kept])


@dataclass(frozen=True)
class Comparison:
    """One line of the report."""

    case: str
    stage: str
    shape: tuple[int, ...]
    error: float | None  # None: not compared, since it stands inside a graph
    limit: float = STAGE_LIMIT

    @property
    def agrees(self) -> bool:
        if self.error is None or self.stage == "length":
            return not self.error
        return self.error <= self.limit  # false for NaN


@dataclass(frozen=True)
class Golden:
    """What a folder holds."""

    config: ModelConfig
    cases: dict[str, Case]
    recorded: list[Recorded]
    shapes: dict[str, list[int]]  # of the published weights, by their keys
    salt: str


def read_golden(folder: Path) -> Golden:
    """Raises InputError when a file is missing, damaged or of another form."""
    try:
        data = json.loads((folder / "golden.json").read_text(encoding="utf-8"))
        keys = json.loads((folder / "keys_reduced.json").read_text(encoding="utf-8"))
        shapes = {key: [int(length) for length in shape] for key, shape in keys.items()}
        cases = {name: _case(case) for name, case in data["cases"].items()}
        with np.load(folder / "golden.npz", allow_pickle=False) as arrays:
            recorded = _recorded(dict(arrays), cases)
        return Golden(read_config(data["config"]), cases, recorded, shapes, str(data.get("salt", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(
            f"{folder} holds no golden set that can be read ({type(error).__name__}: {error}); "
            "golden.npz, golden.json and keys_reduced.json are expected there"
        ) from error


def _case(case: dict[str, Any]) -> Case:
    return Case(
        prompt=str(case["prompt"]),
        references=int(case["n"]),
        has_source=bool(case["source"]),
        guidance_scale=float(case["y"]),
        image_guidance_scale=None if case["state"] == "subject" else float(case["s"]),
    )


def read_config(sizes: dict[str, Any]) -> ModelConfig:
    """The configuration of the sizes in `golden.json`; the others are those of the preset `reduced`."""
    reduced, t5 = PRESETS["reduced"], sizes["t5"]
    config = dataclasses.replace(
        reduced,
        vision=dataclasses.replace(reduced.vision, depth=sizes["vit_depth"]),
        qformer=dataclasses.replace(reduced.qformer, depth=sizes["qformer_layers"]),
        text=TextConfig(
            vocabulary=t5["vocab_size"],
            width=t5["d_model"],
            head_width=t5["d_kv"],
            mlp=t5["d_ff"],
            depth=t5["num_layers"],
            heads=t5["num_heads"],
        ),
        dit=dataclasses.replace(
            reduced.dit,
            width=sizes["hidden"],
            depth=sizes["dit_depth"],
            heads=sizes["heads"],
            mlp=4 * sizes["hidden"],
        ),
        max_tokens=sizes["max_len"],
    )
    return ModelConfig.from_json(config.to_json())  # for its checks


def _recorded(arrays: dict[str, NDArray[Any]], cases: dict[str, Case]) -> list[Recorded]:
    """Raises ValueError for a name that stands for no stage of a case, so that nothing is passed over in silence."""
    recorded = []
    for name, values in arrays.items():
        if name.endswith((".shape", ".stats", ".step")):
            continue
        whole = name.removesuffix(".strided")
        case, _, stage = whole.rpartition(".")
        if (case not in cases or not STAGES.fullmatch(stage)) and whole != "pos_embed":
            raise ValueError(f"{name} is no known stage of the cases {', '.join(cases)}")
        step = int(arrays[f"{whole}.step"]) if name != whole else 1
        if f"{whole}.shape" in arrays:
            shape = tuple(arrays[f"{whole}.shape"].tolist())
        else:
            shape = values.shape if name == whole else None
        recorded.append(Recorded(case, stage, values, step, shape))
    return recorded


def made_up_model(golden: Golden, salt: str) -> Mige:
    """The model with made-up weights, read as a published checkpoint is; its VAE is left without weights.

    Raises InputError when the keys and shapes are not those of the sizes in `golden.json`.
    """
    state = {key: torch.from_numpy(weight(key, shape, salt)) for key, shape in golden.shapes.items()}
    check_published(state, "keys_reduced.json", golden.config)
    model = empty_model(golden.config)
    fill(model, {name: our_tensor(state, name) for name in our_shapes(golden.config)})
    return model.eval()


@contextmanager
def outputs_of(modules: dict[str, nn.Module]) -> Iterator[dict[str, Tensor]]:
    """Collects the outputs of modules while the product's own code calls them."""
    outputs: dict[str, Tensor] = {}

    def keep(stage: str, output: Any) -> None:
        outputs[stage] = getattr(output, "last_hidden_state", output)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, stage=stage: keep(stage, output))
        for stage, module in modules.items()
    ]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class Stages:
    """One case of a model: its inputs, and its sampling. Prompts are tokenised byte by byte: id = byte + 3.

    A subclass computes: `run` gives the wanted stages and others that come with them.
    """

    def __init__(self, config: ModelConfig, name: str, case: Case) -> None:
        self.config, self.name, self.case = config, name, case
        side = config.dit.trained_grid * config.dit.patch
        self.latent_shape = (config.vae.channels, side, side)
        self.noise = self._normal("noise", self.latent_shape)[None]
        self.source = self._normal("source", self.latent_shape)[None] if case.has_source else None

    def run(self, wanted: list[str]) -> dict[str, NDArray[Any]]:
        """Raises InputError for a case that cannot be run."""
        raise NotImplementedError

    def _normal(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        return normal(f"{self.name}.{name}", shape)

    def _pictures(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """pixels_vit and ref_latents; without a picture, one dummy row."""
        pixel_shape, count = (3, self.config.vision.side, self.config.vision.side), self.case.references
        if not count:
            return np.zeros((1, *pixel_shape), np.float32), np.zeros((1, *self.latent_shape), np.float32)
        return (
            np.stack([self._normal(f"ref_clip.{i}", pixel_shape) for i in range(count)]),
            np.stack([self._normal(f"ref_vae.{i}", self.latent_shape) for i in range(count)]),
        )

    def _words(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.bool_]]:
        """token_ids, slot_index and text_mask."""
        count = self.case.references
        # Several placeholders and one picture: they all stand for it, as in editing.
        pictures = [0] * count_placeholders(self.case.prompt) if count == 1 else list(range(count))
        encoded = tokenize_prompt(
            self.case.prompt,
            pictures,
            lambda text: [byte + 3 for byte in text.encode()],
            self.config.qformer.queries,
            self.config.max_tokens,
        )
        return collate([encoded])

    def _all_rows(self) -> tuple[list[Branch], NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """The branches that the denoiser was recorded with, and its latents, source and timestep."""
        # Scales of which none cancels a branch: the recorded batch holds them all.
        rows = branches(3.0, None if self.case.image_guidance_scale is None else 2.0)
        blank = np.zeros_like(self.noise)
        source = [self.source if row.source and self.source is not None else blank for row in rows]
        timestep = np.full(len(rows), TIMESTEP, np.float32)
        return rows, np.repeat(self.noise, len(rows), axis=0), np.concatenate(source), timestep

    def _denoise(self, denoiser: Any, steps: int, conditions: Callable[[list[Branch]], tuple[Any, Any]]) -> Any:
        """The final latents; `conditions` gives the branches' cross_kv and text_mask as the denoiser's arrays."""
        rows = branches(self.case.guidance_scale, self.case.image_guidance_scale)
        cross_kv, text_mask = conditions(rows)
        noise, source = self.noise, np.zeros_like(self.noise) if self.source is None else self.source
        if isinstance(cross_kv, Tensor):
            noise, source = torch.from_numpy(noise), torch.from_numpy(source)
        table = make_schedule("dpm_solver_pp_2m", steps, self.config.prediction)
        schedule = schedule_rows(table, noise)
        return denoise(denoising_step(denoiser), noise, Conditioning(source, cross_kv, text_mask), rows, schedule)


class PyTorchStages(Stages):
    """By the PyTorch modules."""

    def __init__(self, model: Mige, name: str, case: Case) -> None:
        super().__init__(model.config, name, case)
        self.model = model

    def run(self, wanted: list[str]) -> dict[str, NDArray[Any]]:
        with torch.inference_mode():
            stages = self._encode()
            if any(stage in ("t_block", "dit") or stage.startswith("block") for stage in wanted):
                stages |= self._predict()
            for stage in wanted:
                if stage.startswith("sample"):
                    steps = int(stage.removeprefix("sample"))
                    stages[stage] = self._denoise(self.model.denoiser, steps, self._conditions)
        return {stage: output.numpy() for stage, output in stages.items()}

    def _encode(self) -> dict[str, Tensor]:
        encoder, text_encoder = self.model.image_encoder, self.model.text_encoder
        parts = {
            "ln_vision": encoder.vision.post_layernorm,
            "qformer": encoder.qformer,
            "ffm": encoder.fusion,
            "proj": encoder.projection,
        }
        with outputs_of(parts) as outputs:
            image_tokens = encoder(*map(torch.from_numpy, self._pictures()))
        token_ids, slot_index, text_mask = map(torch.from_numpy, self._words())
        self.text_mask = text_mask
        self.text_states = text_encoder(token_ids, image_tokens, slot_index, text_mask)
        return {stage: output[: self.case.references] for stage, output in outputs.items()} | {
            "length": text_mask.sum(),
            "mixed": text_encoder.mix(token_ids, image_tokens, slot_index),
            "t5": self.text_states,
        }

    def _conditions(self, rows: list[Branch]) -> tuple[Tensor, Tensor]:
        """cross_kv and text_mask of the branches, for one sample."""
        has_text = torch.tensor([row.text for row in rows])
        cross_kv = self.model.conditioner(self.text_states.expand(len(rows), -1, -1), has_text)
        return cross_kv, self.text_mask.expand(len(rows), -1)

    def _predict(self) -> dict[str, Tensor]:
        denoiser = self.model.denoiser
        rows, *inputs = self._all_rows()
        latents, source, timestep = map(torch.from_numpy, inputs)
        blocks = {f"block{i}": block for i, block in enumerate(denoiser.blocks)}
        with outputs_of({"t_block": denoiser.t_block, **blocks}) as outputs:
            prediction = denoiser.predict(latents, source, timestep, *self._conditions(rows))
        return {**outputs, "t_block": outputs["t_block"][:1], "dit": prediction}


class OnnxStages(Stages):
    """By the exported graphs; only what stands at their borders."""

    def __init__(self, graphs: "OnnxGraphs", name: str, case: Case) -> None:
        super().__init__(graphs.config, name, case)
        self.graphs = graphs

    def run(self, wanted: list[str]) -> dict[str, NDArray[Any]]:
        pixels, latents = self._pictures()
        image_tokens = self.graphs("image_encoder", pixels_vit=pixels, ref_latents=latents)
        token_ids, slot_index, self.text_mask = self._words()
        words = {"token_ids": token_ids, "slot_index": slot_index, "text_mask": self.text_mask}
        self.text_states = self.graphs("text_encoder", image_tokens=image_tokens, **words)
        stages: dict[str, NDArray[Any]] = {
            "proj": image_tokens[: self.case.references],
            "length": self.text_mask.sum(),
            "t5": self.text_states,
        }
        if "dit" in wanted:
            rows, latents, source, timestep = self._all_rows()
            cross_kv, text_mask = self._conditions(rows)
            inputs = {"latents": latents, "source": source, "timestep": timestep}
            stages["dit"] = self.graphs("denoiser", **inputs, cross_kv=cross_kv, text_mask=text_mask)
        for stage in wanted:
            if stage.startswith("sample"):
                denoiser = partial(self.graphs, "denoiser")
                stages[stage] = self._denoise(denoiser, int(stage.removeprefix("sample")), self._conditions)
        return stages

    def _conditions(self, rows: list[Branch]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        has_text = np.array([row.text for row in rows])
        text_states = np.repeat(self.text_states, len(rows), axis=0)
        cross_kv = self.graphs("conditioner", text_states=text_states, has_text=has_text)
        return cross_kv, np.repeat(self.text_mask, len(rows), axis=0)


class OnnxGraphs:
    """The model's graphs besides the VAE's, exported in fp32 to a folder, and run by ONNX Runtime's CPU."""

    def __init__(self, model: Mige, folder: Path) -> None:
        self.config = model.config
        self.sessions = {}
        for graph in ("image_encoder", "text_encoder", "conditioner", "denoiser"):
            path = folder / f"{graph}.onnx"
            stored = model.graph(graph).state_dict()
            target = ExportTarget(self.config, "fp32", axis_ranges(self.config, ExportLimits()), folder)
            export_graph(graph, empty_model(self.config).graph(graph), stored.__getitem__, target)
            options = onnxruntime.SessionOptions()
            options.log_severity_level = 3  # errors
            self.sessions[graph] = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def __call__(self, graph: str, **inputs: NDArray[Any]) -> NDArray[Any]:
        """The graph's only output."""
        (output,) = self.sessions[graph].run(None, inputs)
        return np.asarray(output)


@contextmanager
def pytorch_backend(model: Mige) -> Iterator[Callable[[str, Case], Stages]]:
    yield partial(PyTorchStages, model)


@contextmanager
def onnxruntime_backend(model: Mige) -> Iterator[Callable[[str, Case], Stages]]:
    with tempfile.TemporaryDirectory() as folder:
        yield partial(OnnxStages, OnnxGraphs(model, Path(folder)))


BACKENDS = {"pytorch": pytorch_backend, "onnxruntime": onnxruntime_backend}


def run_check(
    folder: Path, salt: str | None = None, backend: str = "pytorch", cases: Collection[str] | None = None
) -> Iterator[Comparison]:
    """Compares all that is recorded in a folder, or some of its cases. Raises InputError when it cannot be used.

    salt None: the golden set's own.
    """
    golden = read_golden(folder)
    model = made_up_model(golden, golden.salt if salt is None else salt)
    grid, width = golden.config.dit.trained_grid, golden.config.dit.width
    inner = backend != "pytorch"  # stages inside graphs are out of reach
    with BACKENDS[backend](model) as stages_of:
        for case in ["", *(name for name in golden.cases if cases is None or name in cases)]:
            recorded = [output for output in golden.recorded if output.case == case]
            if case:
                ours = stages_of(case, golden.cases[case]).run([output.stage for output in recorded])
            elif inner:
                ours = {}
            else:
                ours = {"pos_embed": sincos_positions(grid, grid, width, grid)[None].numpy()}
            for output in recorded:
                if output.stage in ours:
                    is_prediction = inner and output.stage == "dit"
                    stored = output.first_channels(golden.config.vae.channels) if is_prediction else output
                    yield stored.compare(ours[output.stage], GRAPH_LIMIT if inner else STAGE_LIMIT)
                elif inner and _is_inside(output.stage, golden.config):
                    yield Comparison(case, output.stage, output.shape or (), None)
                else:
                    raise InputError(f"{case} has the stage {output.stage}, which a model of these sizes does not")


def _is_inside(stage: str, config: ModelConfig) -> bool:
    """Whether a stage stands inside a graph."""
    blocks = [f"block{i}" for i in range(config.dit.depth)]
    return stage in ("pos_embed", "ln_vision", "qformer", "ffm", "mixed", "t_block", *blocks)


def report(comparisons: list[Comparison]) -> Table:
    table = Table("case", "stage", "shape", "relative RMS error", "verdict")
    for line in comparisons:
        shape = " x ".join(map(str, line.shape)) or "number"
        if line.error is None:
            error, verdict = "", "[dim]inside a graph"
        else:
            error, verdict = f"{line.error:.1e}", "[green]agrees" if line.agrees else "[red]DIFFERS"
        table.add_row(line.case or "-", line.stage, shape, error, verdict)
    return table


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", type=Path, help="golden.npz, golden.json and keys_reduced.json")
    parser.add_argument("--salt", help="stands before every weight's name when it is hashed; default: golden.json's")
    parser.add_argument("--backend", choices=BACKENDS, default="pytorch", help="what runs the stages")
    options = parser.parse_args(arguments)
    try:
        with Console(stderr=True).status("computing"):
            comparisons = list(run_check(options.folder, options.salt, options.backend))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console().print(report(comparisons))
    return 0 if all(line.agrees for line in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
