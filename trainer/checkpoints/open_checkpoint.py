"""Any checkpoint, opened: the published layout, a model folder, or a bundle."""

import json
from dataclasses import dataclass
from pathlib import Path

from mige_rt.bundle import is_bundle, open_model
from mige_rt.config import ModelConfig
from mige_rt.lora import Lora
from trainer.checkpoints.convert_published import PublishedCheckpoint
from trainer.checkpoints.merged import MergedCheckpoint
from trainer.checkpoints.model_folder import SafetensorsCheckpoint
from trainer.checkpoints.weights import Checkpoint


@dataclass(frozen=True)
class CheckpointLocation:
    """Where a checkpoint is.

    Attributes:
        path: a model folder, a bundle, the published model.pth, or a folder that holds it.
        vae: the folder of the published checkpoint's VAE, by default `sd-vae-ft-ema` beside it.
        tokenizer: the folder of T5's tokenizer, by default `t5-v1_1-xxl` beside the published checkpoint.
        config: the sizes of a checkpoint in the published layout that has none of the published ones.
        loras: what is merged into its weights.
    """

    path: Path
    vae: Path | None = None
    tokenizer: Path | None = None
    config: ModelConfig | None = None
    loras: tuple[Lora, ...] = ()


def open_checkpoint(location: CheckpointLocation) -> Checkpoint:
    """Open a checkpoint of any kind, with its LoRAs merged.

    Raises:
        InputError: there is none, or it cannot be used, or a LoRA is of another model.
    """
    checkpoint = _open_alone(location)
    return MergedCheckpoint(checkpoint, location.loras) if location.loras else checkpoint


def _open_alone(location: CheckpointLocation) -> Checkpoint:
    if is_bundle(location.path) or _is_model_folder(location.path):
        return SafetensorsCheckpoint(open_model(location.path))
    return PublishedCheckpoint(location.path, vae=location.vae, tokenizer=location.tokenizer, config=location.config)


def _is_model_folder(path: Path) -> bool:
    try:
        return "schema" in json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
