"""An ONNX file run in ONNX Runtime a part at a time, for graphs whose weights do not fit into memory at once.

ONNX Runtime's CPU widens half-precision weights to float32 when it loads them: T5-XXL's take 19 GB.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from export.onnx_files import Session, load_proto, open_session
from export.reference import Feed, Outputs

CHUNK_BYTES = 1_500_000_000  # of a part's weights, as float32


@dataclass
class Chunk:
    """Consecutive nodes, with the weights they read and the nodes that depend on weights alone."""

    nodes: list[NodeProto] = field(default_factory=list[NodeProto])
    constants: dict[str, None] = field(default_factory=dict[str, None])  # depend on weights alone, in a run's order
    bytes: int = 0


def run_onnx(path: Path, feeds: Sequence[Feed], limit: int | None = None, *, widen: bool = False) -> list[Outputs]:
    """Run an ONNX file on the CPU.

    Args:
        path: the file; its weights are beside it.
        feeds: its inputs, once for each run.
        limit: how many bytes of weights, counted as float32, are loaded at a time; None: all at once.
        widen: bfloat16, for which ONNX Runtime's CPU has no kernels, is computed in float32.

    Returns:
        The outputs of each run.

    Raises:
        NotImplementedError: a graph with control flow is to be run in parts.
    """
    if limit is None and not widen:
        session = open_session(path)
        return [_run(session, feed) for feed in feeds]
    model = load_proto(path)
    if widen:
        _widen(model)
    graph = DividedGraph(model)
    chunks = graph.divide(limit)
    output_names = [output.name for output in model.graph.output]
    values: list[dict[str, NDArray[Any]]] = [dict(feed) for feed in feeds]
    for number, chunk in enumerate(chunks):
        read = {name for other in chunks[number + 1 :] for node in other.nodes for name in node.input}
        later = {name for name in read if not graph.is_constant(name)}.union(output_names)
        part = graph.model(chunk, values[0], later)
        session = open_session(part.SerializeToString(), path.parent)
        for held in values:
            held.update(_run(session, {spec.name: held[spec.name] for spec in session.get_inputs()}))
            for name in held.keys() - later:
                del held[name]
        del session
    return [{name: held[name] for name in output_names} for held in values]


def _run(session: Session, feed: Feed) -> Outputs:
    names = [spec.name for spec in session.get_outputs()]
    return {name: np.asarray(output) for name, output in zip(names, session.run(names, feed), strict=True)}


class DividedGraph:
    """A graph's nodes and weights, and how they depend on each other."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.source = model
        self.weights: dict[str, TensorProto] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.constant_nodes: dict[str, NodeProto] = {}  # by their outputs: constants that are no weights themselves
        self.live: list[NodeProto] = []
        for node in model.graph.node:  # in topological order, as ONNX wants it
            if all(self.is_constant(name) for name in node.input):
                self.constant_nodes |= dict.fromkeys(node.output, node)
            else:
                self.live.append(node)

    def is_constant(self, name: str) -> bool:
        """Whether a value is a weight or depends on weights alone; so does "", an input that is left out."""
        return not name or name in self.weights or name in self.constant_nodes

    def divide(self, limit: int | None) -> list[Chunk]:
        """Split the nodes into as few consecutive chunks as the limit allows.

        Nodes that depend on weights alone, such as those that widen one, are repeated wherever they are needed.

        Args:
            limit: bytes of weights a chunk, counted as float32, which only a single node's may pass; None: one chunk.

        Raises:
            NotImplementedError: there is a limit, and the graph has control flow.
        """
        if limit is not None and any(attribute.HasField("g") for node in self.live for attribute in node.attribute):
            raise NotImplementedError("a graph with control flow, whose inner graphs read values by name, in parts")
        chunks = [Chunk()]
        for node in self.live:
            needed = self.closure(node)
            more = sum(self.size(name) for name in needed if name not in chunks[-1].constants)
            if limit is not None and more and chunks[-1].nodes and chunks[-1].bytes + more > limit:
                chunks.append(Chunk())
                more = sum(map(self.size, needed))
            chunks[-1].nodes.append(node)
            chunks[-1].constants |= needed
            chunks[-1].bytes += more
        # An output that is a constant itself belongs to no node above.
        for output in self.source.graph.output:
            if self.is_constant(output.name):
                chunks[-1].constants |= self._with(output.name)
        return chunks

    def closure(self, node: NodeProto) -> dict[str, None]:
        """The constants that a node needs, each behind those it is made of."""
        constants: dict[str, None] = {}
        for name in node.input:
            if name and self.is_constant(name):
                constants |= self._with(name)
        return constants

    def _with(self, name: str) -> dict[str, None]:
        return {**(self.closure(self.constant_nodes[name]) if name in self.constant_nodes else {}), name: None}

    def size(self, name: str) -> int:
        """A weight's bytes, counted as float32; 0 for any other value."""
        return 4 * int(np.prod(self.weights[name].dims, dtype=np.int64)) if name in self.weights else 0

    def model(self, chunk: Chunk, values: Feed, wanted: set[str]) -> onnx.ModelProto:
        """A chunk as a model of its own.

        Args:
            chunk: the nodes, with the constants they need.
            values: arrays of the types that its inputs have; shapes are left open.
            wanted: names of values; those that the chunk computes are its outputs.
        """
        constant_nodes = {
            self.constant_nodes[name].output[0]: self.constant_nodes[name]
            for name in chunk.constants
            if name in self.constant_nodes
        }
        nodes = [*constant_nodes.values(), *chunk.nodes]
        computed = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in chunk.nodes for name in node.input)
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), None)
            for name in read
            if name and name not in computed and name not in chunk.constants
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in computed if name in wanted]
        weights = [self.weights[name] for name in chunk.constants if name in self.weights]
        graph = helper.make_graph(nodes, "part", inputs, outputs, weights)
        part = helper.make_model(graph, opset_imports=self.source.opset_import, functions=self.source.functions)
        part.ir_version = self.source.ir_version
        return part


def _widen(model: onnx.ModelProto) -> None:
    """Replace bfloat16 by float32 throughout: in weights, which are cast when they are loaded, constants and casts."""
    graph = model.graph
    del graph.value_info[:]
    casts: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.BFLOAT16:
            wide, tensor.name = tensor.name, f"{tensor.name}.bfloat16"
            casts.append(helper.make_node("Cast", [tensor.name], [wide], name=f"widen {wide}", to=TensorProto.FLOAT))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.BFLOAT16:
                wide = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(wide, attribute.t.name))
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
