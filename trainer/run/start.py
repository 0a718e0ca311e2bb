"""The checkpoint that a run starts from."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from trainer.checkpoints.model_folder import COMPONENTS
from trainer.checkpoints.open_checkpoint import CheckpointLocation, open_checkpoint
from trainer.checkpoints.pretrained import PretrainedCheckpoint, PretrainedFiles
from trainer.checkpoints.weights import Checkpoint
from trainer.data.encode import encoders_of, fingerprint
from trainer.run.config import Component, Start


@dataclass(frozen=True)
class StartWeights:
    """What the weights are that a run takes from its start and does not change, wherever that is.

    Attributes:
        encoders: A digest of the VAE and the ViT, as prepared sets have it.
        encoders_float16: The same of these as float16 holds them.
        untrained: The same of the components that the run does not train.
    """

    encoders: str
    encoders_float16: str
    untrained: str

    @staticmethod
    def of(checkpoint: Checkpoint, trained: Collection[Component]) -> "StartWeights":
        """Read them.

        Raises:
            InputError: A file is missing or damaged.
        """
        untrained: list[GraphName] = [name for name in COMPONENTS if name not in trained]
        model = checkpoint.load(untrained)  # as they are stored, mapped from the file: T5 may be among them
        modules = [model.get_submodule(name) for name in untrained]
        encoders = encoders_of(checkpoint, "cpu")
        return StartWeights(
            encoders.fingerprint(), encoders.fingerprint(rounded=True), fingerprint(*modules, rounded=True)
        )


def open_start(start: Start, sizes: ModelConfig, seed: int) -> Checkpoint:
    """Open what a config names.

    Args:
        start: The config's.
        sizes: Of the model.
        seed: Of weights that no file has.

    Raises:
        InputError: A file is missing or cannot be used.
    """
    if start.model is not None:
        path = DEFAULT_MODEL if start.model == "tiny" else Path(start.model)
        if not path.exists():
            raise InputError(f"start.model is {start.model}, which is not there; give a MIGE checkpoint")
        return open_checkpoint(CheckpointLocation(path))
    files = {name: Path(value) for name, value in vars(start).items() if value is not None}
    return PretrainedCheckpoint(PretrainedFiles(**files), sizes, seed)
