"""Bundles made hostile: copies of the default model with one thing changed, and what every answer must be."""

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper

from mige_rt.bundle import DEFAULT_MODEL, MANIFEST, file_entry
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName

LONGEST_ANSWER = 1500  # characters
# What libraries say to programmers: a user must never have to read it.
LIBRARY_TEXT = re.compile(
    r"Traceback|site-packages|ONNXRuntimeError|onnxruntime/|panicked|RUST_BACKTRACE|numpy\.|pydantic|<class |at 0x"
)
REMEDY = re.compile(r"do not use|export|download|convert|build|--memory-limit|--trust|upgrade|give a|expected|smaller")

Change = Callable[[Path], object]  # makes the bundle in a folder hostile


@dataclass(frozen=True)
class Case:
    """One hostile thing.

    Attributes:
        name: What is hostile; the test's id.
        change: Does it to the bundle, or to the file, of a test.
        says: A regular expression that the refusal must match.
    """

    name: str
    change: Change
    says: str


def table(cases: Sequence[Case]) -> pytest.MarkDecorator:
    """Runs a test once for each case, as its argument `case`."""
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def copy_bundle(folder: Path) -> Path:
    """A copy of the default model, whose large files are the same ones until they are replaced."""

    def copy(source: str, target: str) -> None:
        if source.endswith((".safetensors", ".onnx")):
            os.link(source, target)
        else:
            shutil.copyfile(source, target)

    try:
        return Path(shutil.copytree(DEFAULT_MODEL, folder, copy_function=copy))
    except OSError:  # another disk, or no links
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(DEFAULT_MODEL, folder))


def check_refusal(case: Case, open_it: Callable[[], object]) -> None:
    """Assert that what a case made is refused: by InputError, in one sentence that says what to do."""
    with pytest.raises(InputError) as refused:
        open_it()
    answer = str(refused.value)
    check_answer(answer)
    assert re.search(case.says, answer), answer[:LONGEST_ANSWER]
    assert REMEDY.search(answer), answer
    assert "\x1b" not in answer and "\n" not in answer, answer


def check_answer(answer: str) -> None:
    """Assert that an answer is short, and without libraries' texts."""
    assert len(answer) <= LONGEST_ANSWER, f"{len(answer)} characters: {answer[:LONGEST_ANSWER]}"
    assert not LIBRARY_TEXT.search(answer), answer


def edited(name: str, **changes: Any) -> Change:
    """Changes to a JSON file, by the path to a value with `__` between the parts; DROP removes it."""

    def change(folder: Path) -> None:
        path = folder / name
        content = json.loads(path.read_text(encoding="utf-8"))
        for place, value in changes.items():
            *parents, last = place.split("__")
            inner: Any = content
            for part in parents:
                inner = inner[int(part) if isinstance(inner, list) else part]
            key: Any = int(last) if isinstance(inner, list) else last
            if value is DROP:
                del inner[key]
            else:
                inner[key] = value
        path.write_text(json.dumps(content), encoding="utf-8")

    return change


DROP = object()


def written(name: str, content: str | bytes) -> Change:
    """Another content for a file."""

    def change(folder: Path) -> None:
        replace_file(folder / name, content.encode() if isinstance(content, str) else content)

    return change


def replace_file(path: Path, content: bytes) -> None:
    """Write a file anew, so that a link's other end stays as it is."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def rewritten(graph: GraphName, edit: Callable[[ModelProto], object]) -> Change:
    """Another ONNX file for a graph, with a manifest that agrees: what a hostile author would publish."""

    def change(folder: Path) -> None:
        path = folder / f"onnx/{graph}.onnx"
        model = onnx.load(str(path), load_external_data=False)
        edit(model)
        replace_file(path, model.SerializeToString())
        sign_off(folder, graph)

    return change


def raw_graph(graph: GraphName, edit: Callable[[bytes], bytes]) -> Change:
    """The same by bytes."""

    def change(folder: Path) -> None:
        path = folder / f"onnx/{graph}.onnx"
        replace_file(path, edit(path.read_bytes()))
        sign_off(folder, graph)

    return change


def sign_off(folder: Path, graph: GraphName) -> None:
    """Put a graph's files as they are now into the manifest."""
    for part, suffix in (("onnx", "onnx"), ("weights", "safetensors")):
        entry = file_entry(folder, f"onnx/{graph}.{suffix}")
        edited(MANIFEST, **{f"graphs__{graph}__{part}": vars(entry)})(folder)


def append(*nodes: NodeProto) -> Callable[[ModelProto], None]:
    """Nodes besides a graph's own."""
    return lambda model: model.graph.node.extend(nodes)


def subgraph(name: str = "inner") -> onnx.GraphProto:
    """A graph for an attribute: one constant."""
    value = helper.make_tensor("v", TensorProto.FLOAT, [1], [1.0])
    output = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1])
    return helper.make_graph([helper.make_node("Constant", [], ["out"], value=value)], name, [], [output])
