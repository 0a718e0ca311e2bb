"""ONNX files read as data: what a file holds of inputs, outputs, weights and operators, without a runtime.

This is a reader of protobuf's wire format (protobuf.dev, "Encoding") for the fields of onnx.proto that the exporter
writes; a file with any other field is refused, so that nothing reaches a runtime that was not looked at. The library
`protobuf` would do the same, but its import alone takes 0.05 to 0.09 s, more than reading all graphs of the default
model, and `onnx` is not part of the base install.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mige_rt.errors import InputError

LARGEST = 64 << 20  # bytes of a file; weights are beside it

_Kind = Literal["skip", "int", "ints", "text", "size", "message"]
_Span = tuple[int, int]
_Fields = dict[str, list[int | str | _Span]]

# Of each message of onnx.proto the fields that may occur, by number: a name, and what is read of it. `skip` and `size`
# (in bytes) go for values of any kind, `int` and `ints` for numbers, `message` for what is read in its turn.
_MODEL: dict[int, tuple[str, _Kind]] = {
    1: ("ir_version", "int"),
    2: ("producer_name", "skip"),
    3: ("producer_version", "skip"),
    4: ("domain", "skip"),
    5: ("model_version", "skip"),
    6: ("doc_string", "skip"),
    7: ("graph", "message"),
    8: ("opset_import", "message"),
}
_OPSET: dict[int, tuple[str, _Kind]] = {1: ("domain", "text"), 2: ("version", "int")}
_GRAPH: dict[int, tuple[str, _Kind]] = {
    1: ("node", "message"),
    2: ("name", "skip"),
    5: ("initializer", "message"),
    10: ("doc_string", "skip"),
    11: ("input", "message"),
    12: ("output", "message"),
    13: ("value_info", "skip"),
}
_NODE: dict[int, tuple[str, _Kind]] = {
    1: ("input", "skip"),
    2: ("output", "skip"),
    3: ("name", "skip"),
    4: ("op_type", "text"),
    5: ("attribute", "message"),
    6: ("doc_string", "skip"),
    7: ("domain", "text"),
}
_ATTRIBUTE: dict[int, tuple[str, _Kind]] = {  # without those that hold a graph or a type
    1: ("name", "skip"),
    2: ("f", "skip"),
    3: ("i", "skip"),
    4: ("s", "skip"),
    5: ("t", "message"),
    7: ("floats", "skip"),
    8: ("ints", "skip"),
    9: ("strings", "skip"),
    13: ("doc_string", "skip"),
    20: ("type", "skip"),
}
_TENSOR: dict[int, tuple[str, _Kind]] = {
    1: ("dims", "ints"),
    2: ("data_type", "int"),
    4: ("float_data", "skip"),
    5: ("int32_data", "skip"),
    7: ("int64_data", "skip"),
    8: ("name", "text"),
    9: ("raw_data", "size"),
    12: ("doc_string", "skip"),
    13: ("external_data", "message"),
    14: ("data_location", "int"),
}
_ENTRY: dict[int, tuple[str, _Kind]] = {1: ("key", "text"), 2: ("value", "text")}
_VALUE: dict[int, tuple[str, _Kind]] = {1: ("name", "text"), 2: ("type", "message"), 3: ("doc_string", "skip")}
_TYPE: dict[int, tuple[str, _Kind]] = {1: ("tensor_type", "message")}  # without sequences, maps and optional values
_TENSOR_TYPE: dict[int, tuple[str, _Kind]] = {1: ("elem_type", "int"), 2: ("shape", "message")}
_SHAPE: dict[int, tuple[str, _Kind]] = {1: ("dim", "message")}
_DIM: dict[int, tuple[str, _Kind]] = {1: ("dim_value", "int"), 2: ("dim_param", "text")}

# These may occur more than once; what else does would be merged by one reader, and overwritten by another.
_REPEATED = frozenset(
    [
        "opset_import",
        "node",
        "initializer",
        "input",
        "output",
        "value_info",
        "attribute",
        "floats",
        "ints",
        "strings",
        "dims",
        "float_data",
        "int32_data",
        "int64_data",
        "external_data",
        "dim",
    ]
)


@dataclass(frozen=True)
class OnnxTensor:
    """A weight, or a constant in an attribute.

    Attributes:
        name: Its name; "" in an attribute.
        data_type: The number of its type in onnx.proto.
        dims: Its shape.
        bytes: That it takes in the file.
        raw_bytes: Of its values in the file, where they are raw.
        external: Where its values are, if not in the file: `location`, `offset`, `length`.
    """

    name: str
    data_type: int
    dims: tuple[int, ...]
    bytes: int
    raw_bytes: int | None
    external: Mapping[str, str] | None


@dataclass(frozen=True)
class OnnxValue:
    """An input or output: its name, the number of its type in onnx.proto, its axes as numbers or names."""

    name: str
    data_type: int
    dims: tuple[int | str, ...]


@dataclass(frozen=True)
class OnnxModel:
    """A file's content.

    Attributes:
        opsets: Versions of the operators by domain; "" is ONNX's own.
        operators: How many nodes are of each operator; those of another domain than ONNX's as domain::name.
        inputs: The graph's.
        outputs: The graph's.
        tensors: Its weights and constants.
    """

    opsets: Mapping[str, int]
    operators: Mapping[str, int]
    inputs: tuple[OnnxValue, ...]
    outputs: tuple[OnnxValue, ...]
    tensors: tuple[OnnxTensor, ...]


def read_onnx(path: Path) -> OnnxModel:
    """Read an ONNX file.

    Raises:
        InputError: It cannot be read, is no ONNX file, is truncated, or holds what the exporter never writes.
    """
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"it has {path.stat().st_size} bytes, at most {LARGEST} are expected")
        return _Reader(path.read_bytes()).model()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is no graph that mige-rt wrote ({error}): do not use this bundle") from error


class _Reader:
    """Raises ValueError, which says what is wrong, where the bytes are not those of such a file."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def model(self) -> OnnxModel:
        model = self.fields("model", _MODEL, (0, len(self.data)))
        opsets = {_text(opset, "domain"): _int(opset, "version") for opset in self.each(model, "opset_import", _OPSET)}
        graphs = list(self.each(model, "graph", _GRAPH))
        if len(graphs) != 1:
            raise ValueError("it has no graph")
        graph, operators, constants = graphs[0], Counter[str](), list[OnnxTensor]()
        for node in self.each(graph, "node", _NODE):
            name, domain = _text(node, "op_type"), _text(node, "domain")
            operators[name if domain in ("", "ai.onnx") else f"{domain}::{name}"] += 1
            for attribute in self.each(node, "attribute", _ATTRIBUTE):
                constants += self.tensors(attribute, "t")
        return OnnxModel(
            opsets,
            operators,
            tuple(map(self.value, self.each(graph, "input", _VALUE))),
            tuple(map(self.value, self.each(graph, "output", _VALUE))),
            (*self.tensors(graph, "initializer"), *constants),
        )

    def value(self, value: _Fields) -> OnnxValue:
        dims: list[int | str] = []
        data_type = 0
        for value_type in self.each(value, "type", _TYPE):
            for tensor in self.each(value_type, "tensor_type", _TENSOR_TYPE):
                data_type = _int(tensor, "elem_type")
                for shape in self.each(tensor, "shape", _SHAPE):
                    for dim in self.each(shape, "dim", _DIM):
                        dims.append(_text(dim, "dim_param") or _int(dim, "dim_value"))
        return OnnxValue(_text(value, "name"), data_type, tuple(dims))

    def tensors(self, fields: _Fields, name: str) -> Iterator[OnnxTensor]:
        for span, tensor in zip(fields.get(name, ()), self.each(fields, name, _TENSOR), strict=True):
            assert isinstance(span, tuple)
            entries = list(self.each(tensor, "external_data", _ENTRY))
            yield OnnxTensor(
                _text(tensor, "name"),
                _int(tensor, "data_type"),
                tuple(size for size in tensor.get("dims", ()) if isinstance(size, int)),
                span[1] - span[0],
                _int(tensor, "raw_data") if "raw_data" in tensor else None,
                {_text(entry, "key"): _text(entry, "value") for entry in entries}
                if entries or _int(tensor, "data_location")
                else None,
            )

    def each(self, fields: _Fields, name: str, known: Mapping[int, tuple[str, _Kind]]) -> Iterator[_Fields]:
        """The messages in a field, read."""
        for span in fields.get(name, ()):
            assert isinstance(span, tuple)
            yield self.fields(name, known, span)

    def fields(self, message: str, known: Mapping[int, tuple[str, _Kind]], span: _Span) -> _Fields:
        """A message's fields by name."""
        data, (at, end) = self.data, span
        fields: _Fields = {}
        while at < end:
            tag = data[at]
            if tag < 0x80:
                at += 1
            else:
                tag, at = self.varint(at, end)
            field = known.get(tag >> 3)
            if field is None:
                raise ValueError(f"field {tag >> 3} of a {message} is none that it writes")
            name, kind = field
            wire = tag & 7
            if wire == 2:  # a length, and so many bytes
                size, at = self.varint(at, end)
                value: int | str | _Span = (at, at + size)
                at += size
            elif wire == 0:
                value, at = self.varint(at, end)
            elif wire in (1, 5):
                value = 0
                at += 8 if wire == 1 else 4
            else:
                raise ValueError(f"the {name} of a {message} is of the kind {wire}, which is not used")
            if at > end:
                raise ValueError(f"it ends inside of a {message}")
            if kind == "skip" and name in _REPEATED:
                continue
            if name in fields and name not in _REPEATED:
                raise ValueError(f"a {message} has its {name} twice")
            self.add(fields.setdefault(name, []), kind, value, f"the {name} of a {message}")
        return fields

    def add(self, values: list[int | str | _Span], kind: _Kind, value: int | str | _Span, what: str) -> None:
        """Append what is read of a field's value."""
        if kind == "ints" and isinstance(value, tuple):  # packed
            at, end = value
            while at < end:
                number, at = self.varint(at, end)
                values.append(number)
        elif kind == "skip" or (kind in ("int", "ints")) == isinstance(value, int):
            if kind == "text" and isinstance(value, tuple):
                value = self.data[value[0] : value[1]].decode()
            elif kind == "size" and isinstance(value, tuple):
                value = value[1] - value[0]
            values.append(value)
        else:
            raise ValueError(f"{what} is not of its type")

    def varint(self, at: int, end: int) -> tuple[int, int]:
        """A number, seven bits a byte, the lowest first, and where it ends. Negative ones are huge."""
        number = shift = 0
        while at < end and shift < 70:
            byte = self.data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            if byte < 0x80:
                return number, at
            shift += 7
        raise ValueError("it ends inside of a number")


def _int(fields: _Fields, name: str) -> int:
    value = fields[name][0] if name in fields else 0
    return value if isinstance(value, int) else 0


def _text(fields: _Fields, name: str) -> str:
    value = fields[name][0] if name in fields else ""
    return value if isinstance(value, str) else ""
