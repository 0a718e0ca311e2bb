"""ONNX files read, written and run: the libraries' functions with whole types, which they lack."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import onnx
import onnx_ir as ir
import onnxruntime  # pyright: ignore[reportMissingTypeStubs]
import torch
from numpy.typing import NDArray

_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # where a model of bytes finds its weights


class NamedValue(Protocol):
    """An input or output of a session."""

    @property
    def name(self) -> str:
        """Its name in the graph."""
        ...


class Session(Protocol):
    """An `onnxruntime.InferenceSession`."""

    def get_inputs(self) -> Sequence[NamedValue]:
        """The model's inputs, in its order."""
        ...

    def get_outputs(self) -> Sequence[NamedValue]:
        """The model's outputs, in its order."""
        ...

    def run(self, output_names: Sequence[str], input_feed: Mapping[str, NDArray[Any]]) -> Sequence[Any]:
        """Compute the outputs named, in that order, from arrays by the inputs' names."""
        ...


def open_session(model: Path | bytes, weights_folder: Path | None = None) -> Session:
    """Open a file, or a model of bytes whose weights are in files of `weights_folder`, on the CPU."""
    runtime: Any = onnxruntime
    options = runtime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    options.enable_cpu_mem_arena = False  # which keeps the most that any run took
    options.enable_mem_pattern = False  # which is made for runs of one shape
    if weights_folder is not None:
        options.add_session_config_entry(_WEIGHTS_FOLDER, str(weights_folder.absolute()))
    source = str(model) if isinstance(model, Path) else model
    return cast(Session, runtime.InferenceSession(source, options, providers=["CPUExecutionProvider"]))


def load_proto(path: Path) -> onnx.ModelProto:
    """A file's model as protobuf, which points to its weights without loading them."""
    return onnx.load(str(path), load_external_data=False)  # pyright: ignore[reportUnknownMemberType]


def load_ir(path: Path) -> ir.Model:
    """A file's model, whose weights are loaded when they are asked for."""
    return ir.load(path)  # pyright: ignore[reportUnknownMemberType]


def save_ir(model: ir.Model, path: Path, external_data: str | None = None) -> None:
    """Write a model; external_data: the name of a file beside it that its weights are written to."""
    ir.save(model, path, external_data=external_data)  # pyright: ignore[reportUnknownMemberType]


def check_file(path: Path) -> None:
    """Check that a file is a valid model.

    Raises:
        onnx.checker.ValidationError: it is not.
    """
    onnx.checker.check_model(str(path))  # pyright: ignore[reportUnknownMemberType]
