"""The checkpoint that a run starts from."""

from pathlib import Path

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.open_checkpoint import CheckpointLocation, open_checkpoint
from trainer.checkpoints.pretrained import PretrainedCheckpoint, PretrainedFiles
from trainer.checkpoints.weights import Checkpoint
from trainer.run.config import Start


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
