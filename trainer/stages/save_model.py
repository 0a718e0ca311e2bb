"""Stage 6: the trained model as a model folder, which `mige-rt run --model` opens."""

from pathlib import Path

import torch
from tokenizers import Tokenizer

from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from trainer.checkpoints.model_folder import save_model
from trainer.stages.starting_model import starting_model
from trainer.stages.trained_part import TrainedPart


def save(config: ModelConfig, state: Path, start: Path | None = None) -> Path:
    """Write the moving average of the weights, in half precision, to state/model; returns it.

    start: as for `starting_model`.

    Raises InputError when the stage mige has not run yet, or state/model is there already.
    """
    path = state / "mige" / "state.pt"
    if not path.is_file():
        raise InputError(f"{path} is not there; run the stage mige first")
    model = starting_model(config, state, start)
    kept = torch.load(path, map_location="cpu", weights_only=True)
    average = {k.removeprefix("module."): v for k, v in kept["average"].items() if k.startswith("module.")}
    TrainedPart(model).load_state_dict(average)
    tokenizer = Tokenizer.from_file(str(state / "tokenizer.json"))
    source = f"trained on synthetic data: {kept['step']} steps, {kept['hours']:.2f} hours"
    save_model(model, tokenizer, state / "model", torch.float16, source)
    return state / "model"
