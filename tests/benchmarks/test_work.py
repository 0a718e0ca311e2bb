"""Work counts and engine calls are those that are committed; and what counts them counts right."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from numpy.typing import NDArray
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.baseline import AsPublished
from benchmarks.case import Variant
from benchmarks.meter import flops, least_bytes, step_launches
from benchmarks.schedule import WorkOptions
from benchmarks.work import (
    REFERENCES,
    RESULTS,
    TASKS,
    VARIANTS,
    WRITE,
    count,
    full_size,
    main,
    regressions,
    roofline_seconds,
)
from engines.interface import Array, to_numpy
from engines.pytorch import PyTorchEngine
from engines.wrapper import CountingEngine
from export.inputs import sample_requests
from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName
from mige_rt.instruction import Task, compose_prompt
from mige_rt.pipeline import MigePipeline
from mige_rt.prompt_tokens import collate, tokenize_prompt
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams

ENCODERS = ("vae_encoder", "image_encoder", "text_encoder", "conditioner")
TINY, XL = PRESETS["tiny"], PRESETS["xl"]


class Tap(CountingEngine):
    """Keeps the final latents."""

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if graph == "vae_decoder":
            self.latents: NDArray[Any] = to_numpy(inputs["latents"])
        return super().run(graph, inputs)


@pytest.fixture(scope="module")
def pipe() -> MigePipeline:
    """The shipped model on PyTorch. Its weights take no gradients, which the flop counter would trip over."""
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu")
    assert isinstance(pipe.engine, PyTorchEngine)
    pipe.engine.model.requires_grad_(False)
    return pipe


def requests(task: Task) -> list[ResolvedRequest]:
    """The project's two samples of a task, whose prompts differ in length and in images."""
    return [request for request in sample_requests() if request.task == task]


def tapped(pipe: MigePipeline) -> tuple[MigePipeline, Tap]:
    tap = Tap(pipe.engine)
    return MigePipeline(pipe.config, pipe.condition_encoder.tokenize, tap), tap


def engine_calls(pipe: MigePipeline, task: Task, steps: int) -> dict[str, int]:
    """How often the engine runs each graph for the first sample of a task."""
    counted, tap = tapped(pipe)
    counted.generate(requests(task)[:1], SamplingParams(num_inference_steps=steps))
    return {graph: tap.calls[graph] for graph in GRAPHS}


def changes(expected: Any, counted: Any, where: str = "") -> list[str]:
    """Where two such contents differ, one line a number."""
    if isinstance(expected, dict) and isinstance(counted, dict):
        keys = dict.fromkeys([*expected, *counted])
        deeper = (changes(expected.get(key), counted.get(key), f"{where} / {key}" if where else key) for key in keys)
        return [line for lines in deeper for line in lines]
    return [] if expected == counted else [f"{where}: {counted} instead of {expected}"]


def maker(pipe: MigePipeline, variant: Variant) -> MigePipeline | AsPublished:
    return pipe if variant == "ours" else AsPublished(pipe, encode_once=variant == "encode_once")


# The committed counts


def test_counts_are_the_committed_ones() -> None:
    committed = json.loads((RESULTS / "work.json").read_text(encoding="utf-8"))
    lines = changes(committed, regressions())
    assert not lines, f"the work has changed; if that is meant, write it anew with: {WRITE}\n" + "\n".join(lines)


def test_the_committed_table_is_of_these_counts() -> None:
    assert (RESULTS / "work.md").read_text(encoding="utf-8") == full_size(), f"write it anew with: {WRITE}"


def test_a_changed_number_is_named() -> None:
    found = {"counts": {"tiny": {"flops": 7, "bytes": 1}}, "new": 2}
    lines = changes({"counts": {"tiny": {"flops": 8, "bytes": 1}, "xl": 3}}, found)
    assert lines == [
        "counts / tiny / flops: 7 instead of 8",
        "counts / xl: None instead of 3",
        "new: 2 instead of None",
    ]


def test_full_size_editing_is_as_the_paper_s_sizes_say() -> None:
    published, ours = count(XL, "published"), count(XL, "ours")
    assert published.flops == pytest.approx(490e12, rel=0.02)
    assert ours.flops == pytest.approx(150e12, rel=0.02)


# What is constant over the steps is not in one


@pytest.mark.parametrize("task", TASKS)
def test_encoders_run_once_whatever_the_steps(pipe: MigePipeline, task: Task) -> None:
    few, many = engine_calls(pipe, task, 2), engine_calls(pipe, task, 5)
    assert many == {**few, "denoiser": 5} and few["denoiser"] == 2
    assert few["image_encoder"] == few["text_encoder"] == few["conditioner"] == few["vae_decoder"] == 1


@pytest.mark.parametrize("config", [TINY, XL], ids=["tiny", "xl"])
@pytest.mark.parametrize(("rows", "length"), [(2, 47), (1, 256)])
def test_a_step_computes_the_transformer_and_nothing_else(config: ModelConfig, rows: int, length: int) -> None:
    dit, grid = config.dit, config.dit.trained_grid
    patches, width, out = grid * grid, dit.width, config.vae.channels * (2 if config.learned_variance else 1)
    area = dit.patch**2
    once = patches * 2 * config.vae.channels * area * width  # latents and source to patches
    once += 256 * width + width * width + width * 6 * width  # the timestep: its MLP, and the modulation of all blocks
    once += patches * width * area * out  # the final layer
    self_attention = patches * (3 * width + width) * width + 2 * patches * patches * width
    cross_attention = patches * 2 * width * width + 2 * patches * length * width  # no keys, no values: those are given
    block = self_attention + cross_attention + 2 * patches * width * dit.mlp
    side = grid * dit.patch
    sizes = (("R", rows), ("L", length), ("h", side), ("w", side))
    assert flops(config, "denoiser", sizes) == 2 * rows * (once + dit.depth * block)


def test_a_step_launches_few_operations() -> None:
    committed = json.loads((RESULTS / "work.json").read_text(encoding="utf-8"))["launches_per_step"]
    assert committed["xl"] < 450


# The counters count right


def test_launches_are_what_the_blocks_compute() -> None:
    """Norm, product, attention, product and sum, three times or so: 14 a block, and what is around the blocks."""
    shallow, deep = (step_launches(replace(TINY, dit=replace(TINY.dit, depth=depth))) for depth in (2, 5))
    assert deep - shallow == 3 * 14
    assert shallow < 2 * 14 + 50


def test_the_flop_counter_counts_attention() -> None:
    q = torch.empty(2, 3, 10, 8, device="meta")
    k = torch.empty(2, 3, 50, 8, device="meta")
    mask = torch.empty(2, 1, 1, 50, dtype=torch.bool, device="meta")
    for given in (None, mask):
        counter = FlopCounterMode(display=False)
        with counter:
            F.scaled_dot_product_attention(q, k, k, attn_mask=given)
        # Queries by keys, and weights by values: 2 heads' products of 10 x 50 x 8 each, a multiply-add as two.
        assert counter.get_total_flops() == 2 * (2 * 3 * 10 * 50 * 8) * 2


@contextmanager
def counted_flops() -> Iterator[FlopCounterMode]:
    """The flop counter, with attention written out: it does not know the CPU's fused one."""
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        yield counter


def tokens_of(pipe: MigePipeline, request: ResolvedRequest) -> int:
    text, slots = compose_prompt(request.task, request.prompt), range(len(request.images))
    return collate([tokenize_prompt(text, slots, pipe.condition_encoder.tokenize, pipe.config.qformer.queries)])[
        0
    ].shape[1]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("task", TASKS)
def test_the_count_is_what_the_running_variant_computes(pipe: MigePipeline, task: Task, variant: Variant) -> None:
    request = requests(task)[1]
    counted, tap = tapped(pipe)
    with counted_flops() as counter:
        maker(counted, variant).generate([request], SamplingParams(num_inference_steps=3))
    options = WorkOptions(
        task=task, references=len(request.images), tokens=tokens_of(pipe, request), num_inference_steps=3
    )
    expected = count(pipe.config, variant, options)
    assert counter.get_total_flops() == expected.flops
    assert {graph: tap.calls[graph] for graph in GRAPHS} == {
        graph: work.calls for graph, work in expected.graphs.items()
    }


def test_batches_sizes_and_scales_are_counted(pipe: MigePipeline) -> None:
    batch = [replace(request, prompt=requests("edit")[0].prompt) for request in requests("edit")]
    by_graphs, _ = tapped(pipe)  # on which the denoiser embeds its timesteps itself, as in the table of graphs
    with counted_flops() as counter:
        by_graphs.generate(
            batch,
            SamplingParams(num_inference_steps=2, width=96, height=32, guidance_scale=3.0, image_guidance_scale=2.0),
        )
    options = WorkOptions(
        tokens=tokens_of(pipe, batch[0]),
        num_inference_steps=2,
        batch=2,
        size=(96, 32),
        guidance_scale=3.0,
        image_guidance_scale=2.0,
    )
    expected = count(pipe.config, "ours", options)
    assert counter.get_total_flops() == expected.flops


@pytest.mark.parametrize(("precision", "size"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_bytes_are_weights_inputs_and_outputs(precision: Any, size: int) -> None:
    width, text, depth, length, rows = TINY.dit.width, TINY.text.width, TINY.dit.depth, 20, 2
    projection = text * width + width + width * width + width
    weights = (
        length * text + projection + depth * (width * 2 * width + 2 * width)
    )  # null text, projection, keys, values
    states, made = rows * length * text, 2 * depth * rows * length * width
    expected = size * (weights + states + made) + rows  # has_text: a byte each
    assert least_bytes(TINY, "conditioner", (("R", rows), ("L", length)), precision) == expected


def test_int8_weighs_a_quarter_but_for_the_vae() -> None:
    full, quantised = (count(TINY, "ours", WorkOptions(precision=p)) for p in ("fp32", "int8"))
    assert quantised.flops == full.flops
    for graph in GRAPHS:
        ratio = full.graphs[graph].bytes / quantised.graphs[graph].bytes
        assert ratio == 1 if graph.startswith("vae_") else 1 < ratio < 4


def test_word_embeddings_count_by_the_rows_that_are_read() -> None:
    short, long = (least_bytes(XL, "text_encoder", (("B", 1), ("N", 1), ("L", n)), "fp16") for n in (50, 51))
    # One more token: an embedding and a state out in fp16, an id and an index, a mask.
    assert long - short == 2 * XL.text.width + 2 * XL.text.width + 2 * 8 + 1


def test_the_floor_is_the_larger_of_computing_and_moving() -> None:
    work = count(XL, "ours")
    compute, memory = roofline_seconds(work, 1e12, 1e30), roofline_seconds(work, 1e30, 1e9)
    both = roofline_seconds(work, 1e12, 1e9)
    assert list(both) == list(GRAPHS)
    assert sum(compute.values()) == pytest.approx(work.flops / 1e12)
    assert sum(memory.values()) == pytest.approx(work.bytes / 1e9)
    assert both == {graph: max(compute[graph], memory[graph]) for graph in GRAPHS}


# The baselines


@pytest.mark.parametrize("encode_once", [False, True], ids=["published", "encode_once"])
@pytest.mark.parametrize("task", TASKS)
def test_a_baseline_makes_the_pipeline_s_images(pipe: MigePipeline, task: Task, encode_once: bool) -> None:
    batch, settings, steps = requests(task), SamplingParams(num_inference_steps=4), 4
    ours, kept = tapped(pipe)
    images = ours.generate(batch, settings)
    theirs, tap = tapped(pipe)
    made = AsPublished(theirs, encode_once).generate(batch, settings)
    assert np.linalg.norm(tap.latents - kept.latents) < 1e-4 * np.linalg.norm(kept.latents)
    for image, expected in zip(made, images, strict=True):
        error = np.mean((np.asarray(image, np.float64) - np.asarray(expected, np.float64)) ** 2)
        assert error < 255**2 / 10**6  # 60 dB
    times = 1 if encode_once else steps
    encoded = dict.fromkeys(("image_encoder", "text_encoder", "conditioner"), times)
    vae_encoder = {"subject": 1, "edit": 1 if encode_once else 2, "compose": 2}[task]
    vae = {"vae_encoder": vae_encoder, "vae_decoder": 1}
    assert dict(tap.calls) == {**encoded, **vae, "denoiser": steps}


def test_a_baseline_computes_branches_whatever_their_weights(pipe: MigePipeline) -> None:
    """Every pair of scales that leaves branches out: the source's alone, the null text's alone, the text's alone."""
    for guidance_scale, image_guidance_scale in ((1.0, 1.0), (0.0, 1.0), (0.0, 0.0), (3.0, 2.0)):
        settings = SamplingParams(
            num_inference_steps=2, guidance_scale=guidance_scale, image_guidance_scale=image_guidance_scale
        )
        ours, kept = tapped(pipe)
        ours.generate(requests("edit")[:1], settings)
        theirs, tap = tapped(pipe)
        AsPublished(theirs).generate(requests("edit")[:1], settings)
        assert np.linalg.norm(tap.latents - kept.latents) < 1e-4 * np.linalg.norm(kept.latents)


def test_the_published_variant_needs_no_image(pipe: MigePipeline) -> None:
    request = ResolvedRequest("a plain green background", (), None, 0, "subject")
    theirs, tap = tapped(pipe)
    [image] = AsPublished(theirs).generate([request], SamplingParams(num_inference_steps=2))
    [expected] = pipe.generate([request], SamplingParams(num_inference_steps=2))
    assert np.abs(np.asarray(image, int) - np.asarray(expected, int)).max() <= 1
    assert tap.calls["image_encoder"] == 0 and tap.calls["text_encoder"] == 2


def test_the_published_variant_takes_four_images_a_prompt(pipe: MigePipeline) -> None:
    request = requests("subject")[0]
    five = replace(request, prompt=" and ".join(["a <imagehere>"] * 5), images=request.images * 5)
    with pytest.raises(InputError, match="5 images, and the published code takes at most 4"):
        AsPublished(pipe).generate([five], SamplingParams(num_inference_steps=2))
    with pytest.raises(InputError, match="at most 4"):
        count(TINY, "published", WorkOptions(task="subject", references=5))
    assert count(TINY, "ours", WorkOptions(task="subject", references=5)).graphs["vae_encoder"].calls == 1


# The command


def test_the_command_gives_json() -> None:
    result = CliRunner().invoke(main, ["--model", "tiny", "--task", "compose", "--steps", "7", "--json"])
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    options = WorkOptions(task="compose", references=REFERENCES["compose"], num_inference_steps=7)
    expected = {variant: count(TINY, variant, options).to_json() for variant in VARIANTS}
    assert content == expected
    assert content["published"]["graphs"]["denoiser"]["calls"] == 7


def test_the_command_prints_a_table() -> None:
    result = CliRunner().invoke(main, ["--model", "tiny"], env={"COLUMNS": "140"})
    assert result.exit_code == 0, result.output
    assert all(graph in result.stdout for graph in (*GRAPHS, "total"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "nowhere is no model folder"),
        (["--references", "0"], "the number of references is 0"),
        (["--steps", "1"], "the number of steps is 1"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert said in result.stderr
