"""Hostile bundles: each is refused with one sentence before anything in it is run, or before it does harm."""

import base64
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import ModelProto, TensorProto, helper, numpy_helper

sys.path.insert(0, str(Path(__file__).parent))
from hostile_bundles import (
    DROP,
    LIBRARY_TEXT,
    Case,
    append,
    check_answer,
    check_refusal,
    copy_bundle,
    edited,
    raw_graph,
    replace_file,
    rewritten,
    sign_off,
    subgraph,
    table,
    written,
)

from engines import trial
from engines.plans import (
    SIDECAR,
    PlanEntry,
    Plans,
    Target,
    UntrustedError,
    fingerprint,
    read_plans,
    require_built_here,
)
from mige_rt.bundle import (
    DEFAULT_MODEL,
    MANIFEST,
    TOKENIZER_FILE,
    check_files,
    file_entry,
    is_known_bundle,
    read_config,
    read_manifest,
)
from mige_rt.cli import main
from mige_rt.config import PRESETS, ModelConfig
from mige_rt.errors import InputError
from mige_rt.graph_checks import OPERATORS, check_graphs
from mige_rt.graphs import GRAPHS
from mige_rt.known_files import remember
from mige_rt.memory import GIB, MemoryBudget, parameters, run_bytes
from mige_rt.onnx_file import read_onnx
from mige_rt.pipeline import MigePipeline
from mige_rt.tokenizer import load_tokenizer
from trainer.settings import load_settings
from trainer.tokenizer import from_spiece

SPIECE = Path(__file__).parents[1] / "data/reference/spiece.model"
LONG, ESCAPES = "x" * 10_000, "\x1b[2J\x1b]0;title\x07"

# Sizes


def _size_cases() -> list[Case]:
    """Every number of the configuration: negative, of another type, and larger than any machine has memory for."""
    content = json.loads((DEFAULT_MODEL / MANIFEST).read_text())["model"]
    fields = [
        f"model__{part}__{name}" for part, sizes in content.items() if isinstance(sizes, dict) for name in sizes
    ] + ["model__max_tokens", *(f"model__defaults__{task}__num_inference_steps" for task in content["defaults"])]
    cases: list[Case] = []
    for field in fields:
        if field.rpartition("__")[2] in ("subject", "edit", "compose", "attention", "scale", "widths"):
            continue
        name = field.removeprefix("model__").replace("__", ".")
        for kind, value in {"zero": 0, "negative": -1, "huge": 10**30, "10^8": 10**8, "text": "1"}.items():
            cases.append(Case(f"{name} {kind}", edited(MANIFEST, **{field: value}), rf"manifest\.json.*{name} is "))
    return cases


def _rules(config: str) -> str:
    return rf"manifest\.json.*{config}"


MANIFESTS = [
    *_size_cases(),
    Case("no JSON", written(MANIFEST, "{"), "is no bundle"),
    Case("no text", written(MANIFEST, b"\xff\xfe\x00"), "is no bundle"),
    Case("empty", written(MANIFEST, ""), "is no bundle"),
    Case("a list", written(MANIFEST, "[]"), "is not of a model"),
    Case("nested", written(MANIFEST, "[" * 100_000), "is no bundle"),
    Case("nested in a field", written(MANIFEST, '{"schema": 2, "model": ' + '{"a":' * 900 + "1" + "}" * 901), "name"),
    Case("17 MiB of spaces", written(MANIFEST, " " * (17 << 20)), "17825792 bytes, at most 16777216"),
    Case("a number of 5,000 digits", written(MANIFEST, '{"schema": ' + "9" * 5000 + "}"), "is no bundle"),
    Case("schema true", edited(MANIFEST, schema=True), "is not of a model"),
    Case("schema 1e99", edited(MANIFEST, schema=10**99), "upgrade"),
    Case("schema text", edited(MANIFEST, schema="2"), "is not of a model"),
    Case("no model", edited(MANIFEST, model=DROP), "is not of a model"),
    Case("model null", edited(MANIFEST, model=None), "not a configuration"),
    Case("an unknown field", edited(MANIFEST, payload="x"), "unknown payload"),
    Case("a missing field", edited(MANIFEST, source=DROP), "missing source"),
    Case("a missing graph", edited(MANIFEST, graphs__denoiser=DROP), "the graphs denoiser are missing"),
    Case("a seventh graph", edited(MANIFEST, graphs__shell={}), "graphs"),
    Case("a long name", edited(MANIFEST, model__name=LONG), "at most 500 characters"),
    Case("a name with escapes", edited(MANIFEST, model__name=ESCAPES), "the name is printable"),
    Case("a long source", edited(MANIFEST, source=LONG), "at most 500 characters"),
    Case("a source with escapes", edited(MANIFEST, source=ESCAPES), "texts are printable"),
    Case("a source with line breaks", edited(MANIFEST, source="a\nError: b"), "texts are printable"),
    Case("a source that reads backwards", edited(MANIFEST, source="a\u202eb"), "texts are printable"),
    Case("a version with escapes", edited(MANIFEST, versions={"torch": ESCAPES}), "texts are printable"),
    Case("10,000 versions", edited(MANIFEST, versions={str(i): "1" for i in range(10_000)}), "at most 32 items"),
    Case("a precision with escapes", edited(MANIFEST, graphs__denoiser__precision={"a": ESCAPES}), "printable"),
    Case("an unknown precision", edited(MANIFEST, precision="fp4"), "precision is 'fp4'"),
    Case("an unknown scheduler", edited(MANIFEST, scheduler="os.system"), "scheduler is 'os.system'"),
    Case("an unknown prediction", edited(MANIFEST, model__prediction="x0"), "prediction is 'x0'"),
    Case("validated as text", edited(MANIFEST, validated="yes"), "validated is 'yes'"),
    Case("-1 bytes", edited(MANIFEST, graphs__denoiser__weights__bytes=-1), "bytes is -1"),
    Case("0 bytes", edited(MANIFEST, tokenizer__bytes=0), "bytes is 0"),
    Case("10^30 bytes", edited(MANIFEST, graphs__denoiser__weights__bytes=10**30), "bytes is 1000"),
    Case("bytes as a fraction", edited(MANIFEST, tokenizer__bytes=1.5), "bytes is 1.5"),
    Case("-1 parameters", edited(MANIFEST, graphs__denoiser__parameters=-1), "parameters is -1"),
    Case("10^30 parameters", edited(MANIFEST, graphs__denoiser__parameters=10**30), "parameters is 1000"),
    Case("no hash", edited(MANIFEST, tokenizer__sha256=""), "hashes are SHA-256"),
    Case("a hash in capitals", edited(MANIFEST, tokenizer__sha256="A" * 64), "hashes are SHA-256"),
    Case("a hash of 10,000 digits", edited(MANIFEST, tokenizer__sha256="0" * 10_000), "at most 500 characters"),
    Case("a path above", edited(MANIFEST, tokenizer__path="../tokenizer.json"), "outside the bundle"),
    Case("a path from the root", edited(MANIFEST, tokenizer__path="/etc/passwd"), "outside the bundle"),
    Case("a path of Windows", edited(MANIFEST, tokenizer__path="C:\\boot.ini"), "outside the bundle"),
    Case("a path in the middle", edited(MANIFEST, graphs__denoiser__onnx__path="onnx/../../x.onnx"), "outside"),
    Case("another file's path", edited(MANIFEST, graphs__denoiser__onnx__path="onnx/conditioner.onnx"), "is expected"),
    Case("a path with a zero byte", edited(MANIFEST, tokenizer__path="tokenizer/\0"), "is expected"),
    Case("an empty path", edited(MANIFEST, tokenizer__path=""), "is expected"),
    Case("a path of 10,000", edited(MANIFEST, tokenizer__path=LONG), "at most 500 characters"),
    Case("the manifest as a graph", edited(MANIFEST, graphs__denoiser__onnx__path=MANIFEST), "is expected"),
    Case("other axes", edited(MANIFEST, graphs__denoiser__axes__latents=["R", 4, "h", "w"]), "axes are the model's"),
    Case("axes of 10^30", edited(MANIFEST, graphs__denoiser__axes__latents=["R", 10**30, "h", "w"]), "axes"),
    Case("no axes", edited(MANIFEST, graphs__denoiser__axes={}), "axes are the model's"),
    Case("no ranges", edited(MANIFEST, ranges={}), "a range for each"),
    Case("an unknown range", edited(MANIFEST, ranges__Z={"min": 1, "opt": 1, "max": 1}), "a range for each"),
    Case("a range upside down", edited(MANIFEST, ranges__B={"min": 4, "opt": 2, "max": 1}), "min <= opt <= max"),
    Case("a range from 0", edited(MANIFEST, ranges__B__min=0), "min <= opt <= max"),
    Case("a negative range", edited(MANIFEST, ranges__h__min=-64), "min <= opt <= max"),
    Case("batches of 10^9", edited(MANIFEST, ranges__B__max=10**9), "no range goes beyond"),
    Case("10^30 references", edited(MANIFEST, ranges__N__max=10**30), "no range goes beyond"),
    Case("images of 10^6", edited(MANIFEST, ranges__w__max=10**6), "no range goes beyond"),
    Case("prompts of 10^6", edited(MANIFEST, ranges__L__max=10**6), "no range goes beyond"),
    Case("no trained size", edited(MANIFEST, ranges__eh={"min": 32, "opt": 32, "max": 64}), "the trained size"),
    Case("no VAE levels", edited(MANIFEST, model__vae__widths=[]), "vae.widths are multiples"),
    Case("9 VAE levels", edited(MANIFEST, model__vae__widths=[8] * 9), "at most 8 items"),
    Case("10^7 channels", edited(MANIFEST, model__vae__widths=[10**7]), r"widths\[0\] is 10000000"),
    Case("a scale of 0", edited(MANIFEST, model__vae__scale=0.0), "vae.scale is a finite number above 0"),
    Case("a scale of NaN", edited(MANIFEST, model__vae__scale=float("nan")), "vae.scale"),
    Case(
        "a guidance of infinity", edited(MANIFEST, model__defaults__edit__guidance_scale=float("inf")), "finite scales"
    ),
    Case("one step", edited(MANIFEST, model__defaults__edit__num_inference_steps=1), "defaults have 2 steps"),
    Case("heads that do not divide", edited(MANIFEST, model__dit__heads=7), "dit.width is a multiple of dit.heads"),
]


@table(MANIFESTS)
def test_a_hostile_manifest_is_refused(case: Case, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_bytes((DEFAULT_MODEL / MANIFEST).read_bytes())
    case.change(tmp_path)
    check_refusal(case, lambda: read_manifest(tmp_path))


CONFIGS = [
    Case("no JSON", written("config.json", "nonsense"), "is no model folder"),
    Case("17 MiB", written("config.json", " " * (17 << 20)), "at most"),
    Case("a list", written("config.json", "[1]"), "is not of a model"),
    Case("10^8 queries", edited("config.json", model__qformer__queries=10**8), "queries is 100000000"),
    Case("a ViT of 80,000 pixels", edited("config.json", model__vision__side=80_000), "side is 80000"),
    Case("a grid of 4,000", edited("config.json", model__dit__trained_grid=4000), "trained_grid is 4000"),
    Case("a depth of 10^6", edited("config.json", model__text__depth=10**6), "depth is 1000000"),
    Case("a name with escapes", edited("config.json", model__name=ESCAPES), "printable"),
    Case("an unknown field", edited("config.json", model__exec="x"), "unknown config.exec"),
]


@table(CONFIGS)
def test_a_hostile_model_folder_is_refused(case: Case, tmp_path: Path) -> None:
    content = {"schema": 2, "model": PRESETS["tiny"].to_json(), "source": "made up"}
    (tmp_path / "config.json").write_text(json.dumps(content))
    case.change(tmp_path)
    check_refusal(case, lambda: read_config(tmp_path))


def _absurd(**parts: dict[str, int]) -> ModelConfig:
    """A configuration within every bound, whose run no machine has memory for."""
    config = PRESETS["tiny"]
    return replace(config, **{part: replace(getattr(config, part), **sizes) for part, sizes in parts.items()})


@pytest.mark.parametrize(
    "config",
    [
        _absurd(dit={"trained_grid": 512}),
        _absurd(dit={"width": 16_384, "heads": 256, "depth": 256, "mlp": 65_536}),
        _absurd(vision={"side": 2048, "patch": 1}),
        _absurd(text={"width": 16_384, "depth": 256, "mlp": 65_536}),
        _absurd(text={"vocabulary": 1_048_576, "width": 16_384, "depth": 1, "mlp": 1}),
    ],
)
def test_absurd_but_coherent_sizes_are_over_the_budget(config: ModelConfig) -> None:
    with pytest.raises(
        InputError, match=r"this model needs about [0-9.]+ GiB of memory, and 8\.0 GiB are allowed"
    ) as e:
        MemoryBudget(config, weights=1000, limit=8 * GIB).check_model()
    check_answer(str(e.value))


def test_the_budget_knows_the_published_sizes() -> None:
    counted = sum(graph.parameters for graph in read_manifest(DEFAULT_MODEL).graphs.values())
    assert parameters(read_manifest(DEFAULT_MODEL).model) == pytest.approx(counted, rel=0.2)
    assert parameters(PRESETS["xl"]) == pytest.approx(6.6e9, rel=0.1)
    sizes = {"B": 1, "R": 2, "N": 1, "h": 64, "w": 64}
    assert 0.2 * GIB < run_bytes(PRESETS["xl"], sizes) < 4 * GIB
    MemoryBudget(PRESETS["tiny"], weights=10**8, limit=GIB).check_model()
    MemoryBudget(PRESETS["xl"], weights=2 * GIB, limit=4 * GIB, low_memory=True).check_model()


def test_the_memory_limit_counts_when_a_model_is_opened_and_at_each_run() -> None:
    with pytest.raises(InputError, match="this model needs about"):
        MigePipeline.from_pretrained(device="cpu", memory_limit=2**20)
    pipe = MigePipeline.from_pretrained(device="cpu", memory_limit=2**26)
    with pytest.raises(InputError, match=r"this run needs about [0-9.]+ GiB.*--memory-limit"):
        pipe(["a red apple"] * 4, num_inference_steps=2, width=256, height=256)
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (64, 64)


# Files


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: replace_file(folder / name, (folder / name).read_bytes()[:size])


FILES = [
    Case("a graph is missing", lambda folder: (folder / "onnx/denoiser.onnx").unlink(), "is missing from the bundle"),
    Case("a graph is cut", _cut("onnx/denoiser.onnx", 1000), "was changed: it has 1000 bytes"),
    Case("weights are empty", _cut("onnx/vae_decoder.safetensors", 0), "was changed: it has 0 bytes"),
    Case("another tokenizer", written(TOKENIZER_FILE, "{}"), "tokenizer.json was changed"),
    Case("a folder as a file", lambda folder: _as_folder(folder / TOKENIZER_FILE), "is missing from the bundle"),
    Case("a device as a file", lambda folder: _as_link(folder / TOKENIZER_FILE, "/dev/zero"), "is missing"),
    Case("a link to itself", lambda folder: _as_link(folder / TOKENIZER_FILE, "tokenizer.json"), "is missing"),
    Case("a size that is not the file's", edited(MANIFEST, graphs__denoiser__weights__bytes=5), "says 5 bytes"),
    Case("a hash that is not the file's", edited(MANIFEST, tokenizer__sha256="0" * 64), "was changed"),
]


def _as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_link(path: Path, target: str) -> None:
    path.unlink()
    path.symlink_to(target)


@table(FILES)
def test_files_that_are_not_the_manifests_are_refused(case: Case, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    case.change(bundle)
    check_refusal(case, lambda: check_files(bundle, read_manifest(bundle)))


# Graphs


def _weight(model: ModelProto) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.external_data)


def _moved(key: str, value: str) -> Callable[[ModelProto], None]:
    """Another place for the values of a weight."""

    def edit(model: ModelProto) -> None:
        for entry in _weight(model).external_data:
            if entry.key == key:
                entry.value = value

    return edit


def _entry(key: str, value: str) -> Callable[[ModelProto], object]:
    return lambda model: _weight(model).external_data.add(key=key, value=value)


def _twice(model: ModelProto) -> None:
    """The right place last, which a reader of the last alone would take for the only one."""
    _weight(model).external_data.insert(0, onnx.StringStringEntryProto(key="location", value="/etc/passwd"))


def _shape(*dims: int) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        del _weight(model).dims[:]
        _weight(model).dims.extend(dims)

    return edit


def _type(data_type: int) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        _weight(model).data_type = data_type

    return edit


def _input(index: int, **changes: Any) -> Callable[[ModelProto], None]:
    def edit(model: ModelProto) -> None:
        value = model.graph.input[index]
        if "name" in changes:
            value.name = changes["name"]
        if "data_type" in changes:
            value.type.tensor_type.elem_type = changes["data_type"]
        if "dim" in changes:
            value.type.tensor_type.shape.dim[-1].dim_value = changes["dim"]

    return edit


def _functions(model: ModelProto) -> None:
    """Functions that call each other twice, of which 60 come to 2^60 nodes."""
    for number in range(60):
        calls = [helper.make_node(f"f{number + 1}", [f"x{i}"], [f"x{i + 1}"], domain="d") for i in range(2)]
        model.functions.append(
            helper.make_function("d", f"f{number}", ["x0"], ["x2"], calls, [helper.make_opsetid("", 20)])
        )


def _attribute_graph(operator: str, *names: str) -> Callable[[ModelProto], None]:
    graphs: dict[str, Any] = {name: subgraph() for name in names}
    return append(helper.make_node(operator, ["has_text"], ["y"], **graphs))


def _nested(depth: int) -> Callable[[ModelProto], None]:
    inner = subgraph()
    for number in range(depth):
        node = helper.make_node("If", ["has_text"], ["out"], then_branch=inner, else_branch=subgraph())
        output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
        inner = helper.make_graph([node], f"level{number}", [], [output])
    return append(helper.make_node("If", ["has_text"], ["y"], then_branch=inner, else_branch=subgraph()))


def _sparse(model: ModelProto) -> None:
    values = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0])
    indices = helper.make_tensor("i", TensorProto.INT64, [1], [0])
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**9]))


def _constant(**changes: Any) -> Callable[[ModelProto], None]:
    """A constant in the file, changed."""

    def edit(model: ModelProto) -> None:
        tensor = numpy_helper.from_array(np.zeros(4, np.float32), "planted")
        for name, value in changes.items():
            if name == "dims":
                del tensor.dims[:]
                tensor.dims.extend(value)
            else:
                setattr(tensor, name, value)
        model.graph.initializer.append(tensor)

    return edit


def _planted_file(model: ModelProto) -> None:
    """A constant inside of a node that reads a file."""
    tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0])
    tensor.ClearField("float_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    model.graph.node.append(helper.make_node("Add", ["a"], ["y"], value=tensor))


def _varint(number: int) -> bytes:
    out = b""
    while number > 0x7F:
        out, number = out + bytes([number & 0x7F | 0x80]), number >> 7
    return out + bytes([number])


def _second_graph(data: bytes) -> bytes:
    """A second graph behind the first: a reader of one would look at it alone, protobuf puts them together."""
    graph = helper.make_graph([helper.make_node("Loop", [], ["y"], body=subgraph())], "second", [], [])
    content = graph.SerializeToString()
    return data + b"\x3a" + _varint(len(content)) + content


_NEVER = "has the operators {}, which the exporter never writes"
EDITED_GRAPHS: list[tuple[str, Callable[[ModelProto], object], str]] = [
    ("a loop of 2^62 trips", _attribute_graph("Loop", "body"), r"the field attribute\.6, "),
    ("a scan", _attribute_graph("Scan", "body"), r"the field attribute\.6, "),
    ("a condition", _attribute_graph("If", "then_branch", "else_branch"), r"the field attribute\.6, "),
    ("nested conditions", _nested(8), r"the field attribute\.6, "),
    ("a graph hidden in an allowed operator", _attribute_graph("Add", "body"), r"the field attribute\.6, "),
    ("functions that double", _functions, r"the field model\.25, "),
    ("sparse weights", _sparse, r"the field graph\.15, "),
    ("training information", lambda model: model.training_info.add(), r"the field model\.20, "),
    ("metadata", lambda model: model.metadata_props.add(key="a", value="b"), r"the field model\.14, "),
    ("a loop without a body", append(helper.make_node("Loop", ["has_text"], ["y"])), _NEVER.format("Loop")),
    ("a custom operator", append(helper.make_node("Shell", ["a"], ["y"], domain="evil")), _NEVER.format("evil::Shell")),
    ("Microsoft's operators", append(helper.make_node("Attention", ["a"], ["y"], domain="com.microsoft")), "com.micro"),
    (
        "an operator that grows",
        append(helper.make_node("ConstantOfShape", ["a"], ["y"])),
        _NEVER.format("ConstantOfShape"),
    ),
    ("an operator with escapes", append(helper.make_node("\x1b[2J", ["a"], ["y"])), r"operators \\x1b\[2J"),
    ("an operator of 10,000 letters", append(helper.make_node("A" * 10_000, ["a"], ["y"])), "AAAA"),
    ("1,000 operators", append(*(helper.make_node(f"Op{i}", ["a"], ["y"]) for i in range(1000))), r"Op0, .*\.\.\."),
    ("60,000 nodes", append(*(helper.make_node("Add", ["a", "a"], ["y"]) for _ in range(60_000))), "at most 50000"),
    (
        "random numbers",
        append(helper.make_node("RandomNormal", [], ["y"], shape=[10**6])),
        _NEVER.format("RandomNormal"),
    ),
    ("texts", append(helper.make_node("StringNormalizer", ["a"], ["y"])), _NEVER.format("StringNormalizer")),
    ("a custom domain", lambda model: model.opset_import.add(domain="evil", version=1), "operators are of"),
    ("no version", lambda model: model.ClearField("opset_import"), "operators are of"),
    ("version 1", lambda model: model.opset_import.__getitem__(0).__setattr__("version", 1), "ai.onnx 1, "),
    ("version 2^62", lambda model: model.opset_import.__getitem__(0).__setattr__("version", 2**62), "operators are of"),
    ("weights from /etc", _moved("location", "/etc/passwd"), "is read from '/etc/passwd'"),
    ("weights from above", _moved("location", "../../secret"), "is read from"),
    ("weights from another graph", _moved("location", "denoiser.safetensors"), "'conditioner.safetensors' is expected"),
    ("weights from nowhere", _moved("location", ""), "is read from"),
    ("weights behind the file", _moved("offset", str(2**40)), "is not within"),
    ("weights before the file", _moved("offset", "-8"), "is not within"),
    ("an offset of 5,000 digits", _moved("offset", "9" * 5000), "is not within"),
    ("an offset that is no number", _moved("offset", "zero"), "is not within"),
    ("a length of 0", _moved("length", "0"), "is not within"),
    ("another length", _moved("length", "123"), "is not within"),
    ("a checksum of its own", _entry("checksum", "0" * 40), "is not within"),
    ("a second location", _entry("location", "/etc/passwd"), "a weight has two places"),
    ("a location besides", _twice, "a weight has two places"),
    ("weights of 2^60", _shape(2**30, 2**30), "is not within"),
    ("weights of a negative size", _shape(-1), "is not within"),
    ("weights of no size", _shape(0), "is not within"),
    ("texts as weights", _type(TensorProto.STRING), "type 8, which the exporter never writes"),
    ("complex weights", _type(TensorProto.COMPLEX64), "type 14, which"),
    ("weights of an unknown type", _type(99), "type 99, which"),
    ("a constant of 2^60", _constant(dims=[2**60]), "another number of values"),
    ("a constant with fewer values", _constant(dims=[9]), "another number of values"),
    ("a constant of texts", _constant(data_type=TensorProto.STRING), "type 8"),
    ("a constant without a place", _constant(data_location=TensorProto.EXTERNAL), "is read from None"),
    ("a file in a constant", _planted_file, "is read from '/etc/passwd'"),
    ("a weight's name of 10,000 letters", _constant(name="w" * 10_000, dims=[9]), "www"),
    ("another input's name", _input(0, name="prompt"), "its inputs are prompt"),
    ("another input's type", _input(0, data_type=TensorProto.DOUBLE), "of another type"),
    ("another input's size", _input(0, dim=10**9), "1000000000"),
    ("an input more", lambda model: model.graph.input.append(model.graph.input[0]), "its inputs are"),
    ("no outputs", lambda model: model.graph.ClearField("output"), "its outputs are"),
    ("an output more", lambda model: model.graph.output.append(model.graph.input[0]), "its outputs are"),
]
GRAPH_FILES = [
    *(Case(name, rewritten("conditioner", edit), says) for name, edit, says in EDITED_GRAPHS),
    Case("no bytes", raw_graph("conditioner", lambda data: b"\n"), "it ends inside"),
    Case(
        "a picture", raw_graph("conditioner", lambda data: b"\x89PNG\r\n\x1a\n" + data), "no graph that mige-rt wrote"
    ),
    Case("half of it", raw_graph("conditioner", lambda data: data[: len(data) // 2]), "it ends inside"),
    Case("a byte less", raw_graph("conditioner", lambda data: data[:-1]), "it ends inside"),
    Case("a number without an end", raw_graph("conditioner", lambda data: data + b"\xff" * 20), "inside of a number"),
    Case("a length of 2^60", raw_graph("conditioner", lambda data: data + b"\x3a" + _varint(2**60)), "it ends inside"),
    Case("two graphs", raw_graph("conditioner", _second_graph), r"model\.graph occurs twice"),
    Case("no graph", raw_graph("conditioner", lambda data: b"\x08\x0a"), "it has no graph"),
    Case("a group", raw_graph("conditioner", lambda data: data + b"\x3b"), "is of the kind 3"),
    Case("a graph as a number", raw_graph("conditioner", lambda data: b"\x38\x01"), "is not of its type"),
    Case("an unknown field", raw_graph("conditioner", lambda data: data + b"\xfa\x01\x00"), r"the field model\.31, "),
    Case(
        "65 MiB",
        raw_graph("conditioner", lambda data: data + b"\x32" + _varint(65 << 20) + b" " * (65 << 20)),
        "at most",
    ),
    Case(
        "another model's depth",
        edited(MANIFEST, model__qformer__depth=200),
        "qformer.depth 200 and image_enc",
    ),
    Case("another vocabulary", edited(MANIFEST, model__text__vocabulary=10**6), "text.vocabulary 1000000 and"),
    Case("another feed-forward", edited(MANIFEST, model__dit__mlp=65_536), "dit.mlp 65536 and"),
    Case("another ViT", edited(MANIFEST, model__vision__width=16_380), "vision.width 16380 and"),
]


@table(GRAPH_FILES)
def test_a_hostile_graph_is_refused_before_a_runtime_sees_it(case: Case, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    case.change(bundle)
    manifest = read_manifest(bundle)
    check_refusal(case, lambda: check_graphs(bundle, manifest))


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_what_the_exporter_writes_is_allowed(bundles: Callable[[str], Path], precision: str) -> None:
    manifest = read_manifest(bundles(precision))
    check_graphs(bundles(precision), manifest)
    assert is_known_bundle(bundles(precision))


def test_the_reader_reads_what_the_library_reads() -> None:
    for graph in GRAPHS:
        path = DEFAULT_MODEL / f"onnx/{graph}.onnx"
        model, ours = onnx.load(str(path), load_external_data=False), read_onnx(path)
        assert sum(ours.operators.values()) == len(model.graph.node)
        assert ours.operators.keys() == {node.op_type for node in model.graph.node} <= OPERATORS
        weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
        assert {tensor.name: tensor.dims for tensor in ours.tensors if tensor.name in weights} == weights
        assert [value.name for value in ours.inputs] == [value.name for value in model.graph.input]


# Outputs


def _decoder(build: Callable[[], tuple[list[onnx.NodeProto], list[TensorProto]]]) -> Callable[[Path], None]:
    """A decoder of allowed operators that gives something else than images."""

    def change(folder: Path) -> None:
        nodes, constants = build()
        latents = helper.make_tensor_value_info("latents", TensorProto.FLOAT, ["B", 8, "h", "w"])
        pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["B", 3, "4*h", "4*w"])
        graph = helper.make_graph(nodes, "decoder", [latents], [pixels], constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        replace_file(folder / "onnx/vae_decoder.onnx", model.SerializeToString())
        sign_off(folder, "vae_decoder")

    return change


def _constants(**values: Any) -> list[TensorProto]:
    return [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]


def _three(*nodes: onnx.NodeProto, **values: Any) -> tuple[list[onnx.NodeProto], list[TensorProto]]:
    """Nodes behind the first three channels of the latents, as `x`."""
    first = helper.make_node("Slice", ["latents", "start", "end", "axis"], ["x"])
    return [first, *nodes], _constants(start=np.array([0]), end=np.array([3]), axis=np.array([1]), **values)


def _filled(value: float) -> Callable[[], tuple[list[onnx.NodeProto], list[TensorProto]]]:
    """Images of the right size, of one value."""

    def build() -> tuple[list[onnx.NodeProto], list[TensorProto]]:
        nodes = [
            helper.make_node("Resize", ["x", "", "scales"], ["large"], mode="nearest"),
            helper.make_node("Mul", ["large", "zero"], ["black"]),
            helper.make_node("Add", ["black", "value"], ["pixels"]),
        ]
        return _three(*nodes, scales=np.array([1, 1, 4, 4], np.float32), zero=np.float32(0), value=np.float32(value))

    return build


OUTPUTS = [
    Case(
        "images of another size",
        _decoder(lambda: _three(helper.make_node("Add", ["x", "x"], ["pixels"]))),
        r"3, 16, 16",
    ),
    Case(
        "no image at all",
        _decoder(
            lambda: _three(helper.make_node("Slice", ["x", "start", "start", "rows"], ["pixels"]), rows=np.array([0]))
        ),
        r"\[0, 3,",
    ),
    Case(
        "twice as many images",
        _decoder(lambda: _three(helper.make_node("Concat", ["x", "x"], ["pixels"], axis=0))),
        r"\[2, 3,",
    ),
    Case("NaN", _decoder(_filled(float("nan"))), "values that are NaN or infinite"),
    Case("infinite", _decoder(_filled(float("inf"))), "values that are NaN or infinite"),
]


@table(OUTPUTS)
def test_what_comes_out_of_a_graph_is_checked_at_its_first_run(case: Case, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    case.change(bundle)
    pipe = MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu", trust=True)
    check_refusal(case, lambda: pipe("a red apple", num_inference_steps=2, seed=0))


def test_parts_of_a_batch_that_do_not_fit_together_are_no_crash(tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")

    def flat(model: ModelProto) -> None:
        """The sum of all that the denoiser gives, over all of its axes."""
        for node in model.graph.node:
            for i, name in enumerate(node.output):
                if name == "prediction":
                    node.output[i] = "whole"
        axes = numpy_helper.from_array(np.array([0, 1, 2, 3]), "all_axes")
        model.graph.initializer.append(axes)
        model.graph.node.append(helper.make_node("ReduceMean", ["whole", "all_axes"], ["prediction"], keepdims=0))

    rewritten("denoiser", flat)(bundle)
    with pytest.raises(InputError) as refused:
        MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu", trust=True)(
            "a red apple", num_inference_steps=2, seed=0
        )
    check_answer(str(refused.value))


# Trials in a process of their own


def _doubling(model: ModelProto) -> None:
    """A value of 2^40 times the input's size, by allowed operators alone."""
    name = model.graph.input[0].name
    for number in range(40):
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"d{number}"], axis=0))
        name = f"d{number}"
    zero = numpy_helper.from_array(np.array(0, np.float32), "nothing")
    model.graph.initializer.append(zero)
    output = model.graph.node[-41].output[0]
    model.graph.node[-41].output[0] = "before"
    axes = numpy_helper.from_array(np.array([0, 1, 2]), "every_axis")
    model.graph.initializer.append(axes)
    model.graph.node.append(helper.make_node("ReduceMean", [name, "every_axis"], ["mean"], keepdims=0))
    model.graph.node.append(helper.make_node("Mul", ["mean", "nothing"], ["none"]))
    model.graph.node.append(helper.make_node("Add", ["before", "none"], [output]))


def test_a_graph_that_takes_all_memory_is_stopped_in_its_own_process(tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    rewritten("conditioner", _doubling)(bundle)
    check_refusal(
        Case("", lambda folder: None, r"was not exported on this machine, and trying its graphs, with at most \d+ GiB"),
        lambda: MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu"),
    )
    assert not is_known_bundle(bundle)


def test_a_bundle_from_elsewhere_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    edited(MANIFEST, source="from elsewhere")(bundle)
    monkeypatch.setattr(trial, "SECONDS", 0)
    check_refusal(
        Case("", lambda folder: None, "trying its graphs took more than 0 s.*--trust"),
        lambda: MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu"),
    )
    MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu", trust=True)
    assert not is_known_bundle(bundle)
    monkeypatch.undo()
    MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu")
    assert is_known_bundle(bundle)
    monkeypatch.setattr(trial, "run_trial", lambda *args: pytest.fail("it was tried again"))
    MigePipeline.from_pretrained(bundle, engine="onnxruntime", device="cpu")
    edited(MANIFEST, source="from elsewhere, and changed")(bundle)
    assert not is_known_bundle(bundle)
    assert is_known_bundle(DEFAULT_MODEL)


# Tokenizers

_PATH = "tokenizer.json"
_NORMALIZER = "normalizer__normalizers"
_CHARSMAP = f"{_NORMALIZER}__0__precompiled_charsmap"


def _charsmap(edit: Callable[[bytearray], bytes | bytearray]) -> Callable[[Path], None]:
    """Another table of normalized characters."""

    def change(folder: Path) -> None:
        content = json.loads((folder / _PATH).read_text(encoding="utf-8"))
        table = content["normalizer"]["normalizers"][0]
        table["precompiled_charsmap"] = base64.b64encode(
            edit(bytearray(base64.b64decode(table["precompiled_charsmap"])))
        ).decode()
        (folder / _PATH).write_text(json.dumps(content), encoding="utf-8")

    return change


def _units(edit: Callable[[np.ndarray], object]) -> Callable[[bytearray], bytes]:
    """The table's trie, changed."""

    def change(data: bytearray) -> bytes:
        size = int.from_bytes(data[:4], "little")
        units = np.frombuffer(bytes(data[4 : 4 + size]), "<u4").copy()
        edit(units)
        return bytes(data[:4]) + units.tobytes() + bytes(data[4 + size :])

    return change


def _leaf_values(value: int) -> Callable[[np.ndarray], object]:
    def edit(units: np.ndarray) -> None:
        units[units >> 31 == 1] = 2**31 + value

    return edit


def _offsets(units: np.ndarray) -> None:
    units[:] = (2**21 - 1) << 10


def _false_leaves(units: np.ndarray) -> None:
    """Units that say they have a leaf, which is none."""
    units[0] = 0x100 | 1 << 10
    units[1] = 2**31 - 1


def _middle(data: bytearray) -> bytes:
    """All leaves lead to the second byte of a character."""
    strings = bytes(data[4 + int.from_bytes(data[:4], "little") :])
    place = next(i for i, byte in enumerate(strings) if byte & 0xC0 == 0x80)
    return _units(_leaf_values(place))(data)


TOKENIZERS = [
    Case("no JSON", written(_PATH, "{"), "is not a readable tokenizer.json"),
    Case("empty", written(_PATH, ""), "is not a readable tokenizer.json"),
    Case("a list", written(_PATH, "[]"), "holds no object"),
    Case("nested", written(_PATH, "[" * 100_000), "is not a readable tokenizer.json"),
    Case("65 MiB", written(_PATH, " " * (65 << 20)), "at most 67108864"),
    Case("another version", edited(_PATH, version="2.0"), "version is '2.0'"),
    Case("an unknown field", edited(_PATH, plugin="x"), "unknown plugin"),
    Case("another model", edited(_PATH, model__type="BPE"), "model.type is 'BPE'"),
    Case("bytes for unknown characters", edited(_PATH, model__byte_fallback=True), "byte_fallback is True"),
    Case("an unknown id outside", edited(_PATH, model__unk_id=10**6), "unk_id is 1000000"),
    Case("no pieces", edited(_PATH, model__vocab=[]), "at least 3 items"),
    Case("an empty piece", edited(_PATH, model__vocab__5=["", -1.0]), "at least 1 character"),
    Case("a piece of 10,000", edited(_PATH, model__vocab__5=[LONG, -1.0]), "at most 128 characters"),
    Case("a score of NaN", edited(_PATH, model__vocab__5=["a", float("nan")]), "not finite"),
    Case("a score of infinity", edited(_PATH, model__vocab__5=["a", float("inf")]), "not finite"),
    Case("a score as text", edited(_PATH, model__vocab__5=["a", "1"]), "expected a number"),
    Case("pieces as numbers", edited(_PATH, model__vocab=[1, 2, 3]), "vocab"),
    Case("an added token outside", edited(_PATH, added_tokens__0__id=10**6), "not that of such a piece"),
    Case("a negative added token", edited(_PATH, added_tokens__0__id=-1), "id is -1"),
    Case("another piece's added token", edited(_PATH, added_tokens__0__id=7), "not that of such a piece"),
    Case("an added token of 10,000", edited(_PATH, added_tokens__0__content=LONG), "at most 128 characters"),
    Case("a pattern that backtracks", edited(_PATH, **{f"{_NORMALIZER}__1__pattern": {"Regex": "(a+)+$"}}), "Regex"),
    Case("a replacement of 10,000", edited(_PATH, **{f"{_NORMALIZER}__1__content": LONG}), "content is"),
    Case("a replaced text", edited(_PATH, **{f"{_NORMALIZER}__1__pattern": {"String": ""}}), "missing .*Regex"),
    Case("an unknown normalizer", edited(_PATH, normalizer={"type": "Lua", "code": "x"}), "normalizer"),
    Case("no normalizer", edited(_PATH, normalizer=None), "normalizer"),
    Case("a normalizer that prepends", edited(_PATH, normalizer={"type": "Prepend", "prepend": LONG}), "normalizer"),
    Case(
        "normalizers in normalizers",
        edited(_PATH, **{f"{_NORMALIZER}__0": {"type": "Sequence", "normalizers": []}}),
        "no",
    ),
    Case("100 normalizers", edited(_PATH, normalizer__normalizers=[{"type": "Replace"}] * 100), "normalizer"),
    Case("no table", edited(_PATH, **{f"{_NORMALIZER}__0": DROP}), "0 normalizers of the type Precompiled"),
    Case(
        "a pattern that splits", edited(_PATH, pre_tokenizer={"type": "Split", "pattern": {"Regex": "(a+)+"}}), "pre_"
    ),
    Case("bytes", edited(_PATH, pre_tokenizer={"type": "ByteLevel"}), "pre_tokenizer"),
    Case("no pre-tokenizer", edited(_PATH, pre_tokenizer=None), "pre_tokenizer"),
    Case("another space", edited(_PATH, pre_tokenizer__replacement="__"), "replacement is '__'"),
    Case("another scheme", edited(_PATH, pre_tokenizer__prepend_scheme="twice"), "prepend_scheme is 'twice'"),
    Case("a decoder that strips", edited(_PATH, decoder={"type": "Strip", "content": "a", "start": 10**18}), "decoder"),
    Case("no base64", edited(_PATH, **{_CHARSMAP: "!!!"}), "is no table of characters"),
    Case("an empty table", edited(_PATH, **{_CHARSMAP: ""}), "is no table of characters"),
    Case("a table of 3 bytes", _charsmap(lambda data: data[:3]), "is no table of characters"),
    Case("a table without strings", _charsmap(lambda data: data[:1000]), "is no table of characters"),
    Case("a trie of 4 GiB", _charsmap(lambda data: b"\xff\xff\xff\xff" + data[4:]), "is no table of characters"),
    Case("a trie of 1 byte", _charsmap(lambda data: b"\1\0\0\0" + data[4:]), "is no table of characters"),
    Case("strings without an end", _charsmap(lambda data: data[:-1]), "is no table of characters"),
    Case("strings that are no text", _charsmap(lambda data: data[:-2] + b"\xff\0"), "is no table of characters"),
    Case("values outside", _charsmap(_units(_leaf_values(2**30))), "leads outside of itself"),
    Case("offsets outside", _charsmap(_units(_offsets)), "leads outside of itself"),
    Case("false leaves", _charsmap(_units(_false_leaves)), "leads outside of itself"),
    Case("a character's middle", _charsmap(_middle), "leads into a character"),
    Case("a character of 10,000", _charsmap(lambda data: data + b"a" * 10_000 + b"\0"), "by more than 64 bytes"),
]


@table(TOKENIZERS)
def test_a_hostile_tokenizer_is_refused_before_the_library_reads_it(case: Case, tmp_path: Path) -> None:
    (tmp_path / _PATH).write_bytes((DEFAULT_MODEL / TOKENIZER_FILE).read_bytes())
    case.change(tmp_path)
    check_refusal(case, lambda: load_tokenizer(tmp_path / _PATH))


def test_t5s_tokenizers_are_allowed(tmp_path: Path) -> None:
    """Ours from spiece.model, and as transformers writes it, today and before `prepend_scheme`."""
    path = tmp_path / _PATH
    from_spiece(SPIECE).save(str(path))
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = load_tokenizer(path)("a red apple, with  two spaces")
    new = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    for space in (new, old):
        published = content | {
            "normalizer": content["normalizer"]["normalizers"][0],
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, space]},
            "decoder": space,
            "post_processor": {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}},
            "padding": {"strategy": {"Fixed": 10**12}},
            "truncation": {"max_length": 1, "stride": 10**18},
        }
        path.write_text(json.dumps(published), encoding="utf-8")
        assert load_tokenizer(path)("a red apple, with  two spaces") == ids


# Plans

_TARGET = Target("tensorrt-rtx", "1.7.1", None, ("8.6", "8.9"))
_ONE = {"min": 1, "opt": 1, "max": 1}
_OPTIONS = {"optimization_level": 3, "tf32": False}


def _write_plans(bundle: Path) -> Plans:
    """Plans of a few bytes, as `mige-rt build` would leave them."""
    manifest = read_manifest(DEFAULT_MODEL)
    folder = bundle / "engines" / fingerprint(_TARGET, manifest.precision, manifest.ranges, _OPTIONS)
    folder.mkdir(parents=True)
    entries = {}
    for graph, entry in manifest.graphs.items():
        (folder / f"{graph}.plan").write_bytes(b"plan")
        entries[graph] = PlanEntry(
            file_entry(folder, f"{graph}.plan"), entry.onnx.sha256, entry.weights.sha256, 1.0, None
        )
    plans = Plans(folder, _TARGET, manifest.precision, manifest.ranges, _OPTIONS, entries)
    (folder / SIDECAR).write_text(json.dumps(plans.to_json()))
    return plans


SIDECARS = [
    Case("no JSON", written(SIDECAR, "{"), "is damaged"),
    Case("no text", written(SIDECAR, b"\xff\xfe"), "is damaged"),
    Case("nested", written(SIDECAR, "[" * 100_000), "is damaged"),
    Case("2 MiB", written(SIDECAR, " " * (2 << 20)), "at most 1048576"),
    Case("a list", written(SIDECAR, "[]"), "is damaged"),
    Case("another schema", edited(SIDECAR, schema=3), "schema 3, this version of mige-rt reads 2"),
    Case("schema as text", edited(SIDECAR, schema="2"), "schema is '2'"),
    Case("an unknown field", edited(SIDECAR, library="evil.so"), "unknown library"),
    Case("a missing field", edited(SIDECAR, target=DROP), "missing target"),
    Case("another engine", edited(SIDECAR, target__engine="pytorch"), "engine is 'pytorch'"),
    Case("a long version", edited(SIDECAR, target__version=LONG), "at most 500 characters"),
    Case("a version with escapes", edited(SIDECAR, target__version=ESCAPES), "not printable"),
    Case("a GPU with escapes", edited(SIDECAR, target__gpu=ESCAPES), "not printable"),
    Case("10,000 capabilities", edited(SIDECAR, target__capabilities=["8.9"] * 10_000), "at most 64 items"),
    Case("another precision", edited(SIDECAR, precision="fp4"), "precision is 'fp4'"),
    Case("ranges as text", edited(SIDECAR, ranges="all"), "ranges is 'all'"),
    Case(
        "1,000 ranges",
        edited(SIDECAR, ranges={str(i): {"min": 1, "opt": 1, "max": 1} for i in range(1000)}),
        "32 items",
    ),
    Case("nested options", edited(SIDECAR, options={"a": {"b": [1]}}), r"options\.a"),
    Case("1,000 options", edited(SIDECAR, options={str(i): 1 for i in range(1000)}), "at most 32 items"),
    Case("another option", edited(SIDECAR, options__tf32=True), "belong into a folder"),
    Case("a missing graph", edited(SIDECAR, graphs__denoiser=DROP), "the graphs denoiser are missing"),
    Case("an unknown graph", edited(SIDECAR, graphs__shell={}), "graphs"),
    Case("a plan above", edited(SIDECAR, graphs__denoiser__plan__path="../../x"), "is said to be"),
    Case("another graph's plan", edited(SIDECAR, graphs__denoiser__plan__path="conditioner.plan"), "is said to be"),
    Case("-1 bytes", edited(SIDECAR, graphs__denoiser__plan__bytes=-1), "bytes is -1"),
    Case("10^30 bytes", edited(SIDECAR, graphs__denoiser__plan__bytes=10**30), "bytes is 1000"),
    Case("-1 seconds", edited(SIDECAR, graphs__denoiser__seconds=-1.0), "seconds is -1"),
    Case("10^300 seconds", edited(SIDECAR, graphs__denoiser__seconds=1e300), "seconds is 1e"),
    Case("NaN seconds", edited(SIDECAR, graphs__denoiser__seconds=float("nan")), "seconds is nan"),
    Case("a peak of 10^30 bytes", edited(SIDECAR, graphs__denoiser__peak_bytes=10**30), "peak_bytes"),
    Case("a long hash", edited(SIDECAR, graphs__denoiser__onnx=LONG), "at most 500 characters"),
]


@table(SIDECARS)
def test_a_hostile_sidecar_is_refused(case: Case, tmp_path: Path) -> None:
    case.change(_write_plans(tmp_path).folder)
    check_refusal(case, lambda: read_plans(tmp_path))


def test_plans_that_were_not_built_here_need_trust(tmp_path: Path) -> None:
    plans = _write_plans(tmp_path)
    with pytest.raises(UntrustedError, match=r"were not built on this machine.*mige-rt build.*--trust"):
        require_built_here(tmp_path, plans, trust=False)
    require_built_here(tmp_path, plans, trust=True)
    remember(plans.folder / SIDECAR)
    require_built_here(tmp_path, plans, trust=False)


# The command line


@pytest.mark.parametrize(
    ("change", "arguments", "says"),
    [
        (edited(MANIFEST, tokenizer__bytes=-1), (), "bytes is -1"),
        (
            rewritten("conditioner", _attribute_graph("Loop", "body")),
            (),
            "conditioner.onnx is no graph that mige-rt wrote",
        ),
        (raw_graph("conditioner", lambda data: data[:100]), ("--trust",), "conditioner.onnx is no graph"),
        (lambda folder: None, ("--memory-limit", "1K"), "0.0 GiB are allowed"),
        (lambda folder: None, ("--memory-limit", "a lot"), "'a lot' is no size"),
        (lambda folder: None, ("--memory-limit", "0"), "'0' is no size"),
    ],
)
def test_the_command_answers_in_one_sentence(
    change: Callable[[Path], object], arguments: tuple[str, ...], says: str, tmp_path: Path
) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    change(bundle)
    out = tmp_path / "out.png"
    command = ["run", "--model", str(bundle), "--engine", "onnxruntime", "--device", "cpu", "--prompt", "a red apple"]
    result = CliRunner().invoke(main, [*command, "--out", str(out), *arguments])
    answer = " ".join(result.output.split())
    assert result.exit_code == 2 and says in answer.replace("│", " "), answer
    assert not LIBRARY_TEXT.search(answer) and not out.exists()


@pytest.mark.parametrize(
    "report",
    [
        "[]",
        "{}",
        '{"graphs": []}',
        '{"graphs": {"denoiser": {"checks": [{"rms": 1, "limit": 0}]}}}',
        '{"graphs": {"denoiser": {"checks": [{"rms": "a", "limit": 1}]}}}',
        '{"graphs": {"denoiser": {"checks": 5}}}',
        '{"graphs": {"denoiser": {"checks": [{}]}}}',
        " " * (17 << 20),
    ],
)
def test_a_hostile_report_is_no_crash(report: str, tmp_path: Path) -> None:
    bundle = copy_bundle(tmp_path / "bundle")
    (bundle / "report.json").write_text(report)
    result = CliRunner().invoke(main, ["info", str(bundle)])
    assert result.exit_code == 2 and "report.json cannot be read" in " ".join(result.output.split())


# Fuzzing

_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)
_FIXED_BUDGET = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def _places(content: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path to every value in JSON."""
    items: list[tuple[Any, Any]] = []
    if isinstance(content, dict):
        items = list(content.items())
    elif isinstance(content, list):
        items = list(enumerate(content[:4]))
    return [prefix, *(place for key, value in items for place in _places(value, (*prefix, key)))]


def _mutated(content: Any, place: tuple[Any, ...], value: Any) -> Any:
    if not place:
        return value
    copy = list(content) if isinstance(content, list) else dict(content)
    copy[place[0]] = _mutated(copy[place[0]], place[1:], value)
    return copy


def _answers(read: Callable[[], object]) -> None:
    """What was made is read, or refused with a proper answer."""
    try:
        read()
    except InputError as error:
        check_answer(str(error))


def _json_file(path: Path) -> tuple[Any, st.SearchStrategy[tuple[Any, ...]]]:
    content = json.loads(path.read_text(encoding="utf-8"))
    return content, st.sampled_from(_places(content))


_MANIFEST_JSON, _MANIFEST_PLACES = _json_file(DEFAULT_MODEL / MANIFEST)
_TOKENIZER_JSON, _TOKENIZER_PLACES = _json_file(DEFAULT_MODEL / TOKENIZER_FILE)


@_FIXED_BUDGET
@given(place=_MANIFEST_PLACES, value=_JSON)
def test_a_mutated_manifest_is_read_or_refused(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps(_mutated(_MANIFEST_JSON, place, value)))
    _answers(lambda: read_manifest(tmp_path))


@_FIXED_BUDGET
@given(content=st.binary(max_size=200) | _JSON.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_as_a_manifest_are_refused(content: bytes, tmp_path: Path) -> None:
    for name, read in ((MANIFEST, read_manifest), ("config.json", read_config)):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
        _answers(lambda read=read, folder=folder: read(folder))


@_FIXED_BUDGET
@given(data=st.data())
def test_a_mutated_sidecar_is_read_or_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    bundle = tmp_path_factory.mktemp("bundle")
    sidecar = _write_plans(bundle).folder / SIDECAR
    content = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps(_mutated(content, data.draw(st.sampled_from(_places(content))), data.draw(_JSON))))
    _answers(lambda: read_plans(bundle))


@settings(_FIXED_BUDGET, max_examples=60)
@given(place=_TOKENIZER_PLACES, value=_JSON)
def test_a_mutated_tokenizer_is_read_or_refused(place: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    (tmp_path / _PATH).write_text(json.dumps(_mutated(_TOKENIZER_JSON, place, value)))
    _answers(lambda: load_tokenizer(tmp_path / _PATH)("a red apple"))


@_FIXED_BUDGET
@given(data=st.data())
def test_a_mutated_graph_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray((DEFAULT_MODEL / "onnx/conditioner.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    (tmp_path / "graph.onnx").write_bytes(content[: cut or None])
    _answers(lambda: read_onnx(tmp_path / "graph.onnx"))


@_FIXED_BUDGET
@given(data=st.data())
def test_a_mutated_charsmap_is_read_or_refused(data: st.DataObject, tmp_path: Path) -> None:
    """A table that passes is given to the library, which ends the process if it leads outside."""

    def edit(table: bytearray) -> bytes:
        for _ in range(data.draw(st.integers(1, 8))):
            table[data.draw(st.integers(0, len(table) - 1))] = data.draw(st.integers(0, 255))
        return bytes(table)

    (tmp_path / _PATH).write_bytes((DEFAULT_MODEL / TOKENIZER_FILE).read_bytes())
    _charsmap(edit)(tmp_path)
    _answers(lambda: load_tokenizer(tmp_path / _PATH)("".join(map(chr, range(32, 0x3000, 7)))))


_SETTINGS = (Path(__file__).parents[2] / "trainer/configs/tiny.toml").read_text(encoding="utf-8").splitlines()


@_FIXED_BUDGET
@given(
    line=st.integers(0, len(_SETTINGS) - 1),
    text=st.text(max_size=30) | st.sampled_from(["steps = -1", "rate = nan", "[vae]", "batch = 1e300", "seed = true"]),
)
def test_mutated_settings_are_read_or_refused(line: int, text: str, tmp_path: Path) -> None:
    content = [*_SETTINGS[:line], text, *_SETTINGS[line + 1 :]]
    path = tmp_path / "settings.toml"
    path.write_text("\n".join(content), encoding="utf-8", errors="surrogatepass")
    _answers(lambda: load_settings(path))
