"""The weights of a run's checkpoint as a model folder, which `mige-rt run --model` opens."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from mige_rt.errors import InputError
from mige_rt.tokenizer_file import read_tokenizer_file
from trainer.checkpoints.model_folder import save_model
from trainer.run.checkpoints import LATEST, SavedRun, load_tensors, saved_runs
from trainer.run.config import RunConfig
from trainer.run.module import make_trained_module, trained_parameters
from trainer.run.start import StartWeights, open_start
from trainer.run.train import TOKENIZER_FILE, differing, fixed_values


def save_run(config: RunConfig, run: Path, checkpoint: str | None, out: Path) -> Path:
    """Write a model folder, in one process: the moving average of what was trained, if one was kept.

    Args:
        config: The run's.
        run: Its folder.
        checkpoint: One of its checkpoints; None or `latest`: the latest one.
        out: The folder to make.

    Returns:
        The folder.

    Raises:
        InputError: There is no such checkpoint, it is damaged or of another config or start, or `out` exists or cannot
            be written.
    """
    if checkpoint in (None, LATEST):
        saved = next(reversed(saved_runs(run)), None) if run.is_dir() else None
        if saved is None:
            raise InputError(f"{run} has no checkpoint; train first")
    else:
        saved = SavedRun.read(Path(checkpoint))
    start = open_start(config.start, config.sizes, config.seed)
    start_weights = StartWeights.of(start, config.trained)
    _check_config(saved, fixed_values(config, 1, start_weights))
    tokenizer = Tokenizer.from_str(read_tokenizer_file(run / TOKENIZER_FILE))
    model = start.load(dtype=torch.float32)
    vision = model.image_encoder.vision
    embeddings, encoder = vision.embeddings, vision.encoder
    part = make_trained_module(model, config)
    kind = "module" if config.ema is None else "average"
    tensors = {f"{kind}.{name}": parameter.detach() for name, parameter in trained_parameters(part).items()}
    tensors |= {f"module.{name}": buffer for name, buffer in part.named_buffers()}
    load_tensors(saved, tensors)
    vision.embeddings, vision.encoder = embeddings, encoder
    save_model(model, tokenizer, out, torch.float16, f"trained for {saved.step} steps from {start.source}")
    return out


def _check_config(saved: SavedRun, config: Mapping[str, Any]) -> None:
    """What the saved model depends on must be the checkpoint's: its sizes, what was trained, and what was not.

    Raises:
        InputError: It is not; with the fields that differ.
    """
    names = [name for name in ("model", "trained", "ema", "start_weights") if name in saved.config]
    before, now = ({name: values[name] for name in names} for values in (saved.config, config))
    for values in (before, now):  # how it is averaged is no matter here
        values["ema"] = values.get("ema") is not None
    if unlike := differing(before, now, "the checkpoint", "the config"):
        raise InputError(
            f"{saved.folder} is of another config: {'; '.join(unlike)}; give the config that it was trained with"
        )
