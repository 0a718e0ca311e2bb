"""What a graph's export and its validation work with."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from mige_rt.config import ModelConfig, Precision
from mige_rt.graphs import AxisRange, GraphName
from mige_rt.tokenizer import Tokenize
from trainer.checkpoints.open_checkpoint import CheckpointLocation
from trainer.checkpoints.weights import Checkpoint


@dataclass(frozen=True)
class ExportTarget:
    """What graphs are exported to.

    Attributes:
        config: the model's sizes.
        precision: what they compute in.
        ranges: the named axes' ranges, those of the bundle.
        folder: gets the files GRAPH.onnx and GRAPH.safetensors of each graph.
    """

    config: ModelConfig
    precision: Precision
    ranges: Mapping[str, AxisRange]
    folder: Path

    def onnx_path(self, graph: GraphName) -> Path:
        """The file of a graph's nodes."""
        return self.folder / f"{graph}.onnx"

    def weights_path(self, graph: GraphName) -> Path:
        """The file of a graph's weights, which GRAPH.onnx refers to."""
        return self.folder / f"{graph}.safetensors"


@dataclass(frozen=True, eq=False)
class ExportContext:
    """The opened checkpoint that a worker takes everything from, and what it makes of it.

    Attributes:
        checkpoint: opened once; graphs are traced, copied and compared from it.
        tokenize: the model's tokenizer.
        target: what is made.
        small: whether every shape is validated, and the whole graph at once.
    """

    checkpoint: Checkpoint
    tokenize: Tokenize
    target: ExportTarget
    small: bool

    @property
    def config(self) -> ModelConfig:
        """The sizes of the checkpoint's model."""
        return self.checkpoint.config

    def module(self, graph: GraphName) -> nn.Module:
        """A graph's module with its weights as they are stored, mapped from the checkpoint."""
        return self.checkpoint.load([graph]).graph(graph)


@dataclass(frozen=True)
class ExportJob:
    """A worker's job: a graph to export, or the pipeline to validate.

    Attributes:
        graph: the graph; None: the pipeline.
        checkpoint: where the checkpoint is.
        bundle: the folder that becomes the bundle.
        precision: what the bundle computes in.
        ranges: the named axes' ranges.
        validate: whether the graph is compared with PyTorch.
        small: see ExportContext.
    """

    graph: GraphName | None
    checkpoint: CheckpointLocation
    bundle: Path
    precision: Precision
    ranges: dict[str, AxisRange]
    validate: bool
    small: bool
