"""How well a model reads what it is shown, rung by rung of the ladder, on held-out concepts."""

from pathlib import Path

from rich.table import Table

from mige_rt.bundle import TOKENIZER_FILE
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import load_model
from trainer.stages.features import FeatureMaker
from trainer.stages.practice import HELD_OUT, HeldOutRungs
from trainer.stages.trained_part import TrainedPart
from trainer.synthetic.concepts import Concept


def measure_rungs(concepts: list[Concept], folder: Path) -> Table:
    """The one-shot errors of a model, and how much of its attention is where it should be.

    Args:
        concepts: All of them; those held out are measured on.
        folder: A model folder or a bundle.

    Raises:
        InputError: `folder` is neither.
    """
    model = load_model(folder)
    maker = FeatureMaker(model.config, model.vae_encoder, model.image_encoder, load_tokenizer(folder / TOKENIZER_FILE))
    table = Table(
        "rung",
        "error",
        "mean color",
        "error / mean color",
        "looked right",
        title=f"One shot, {HELD_OUT} samples a rung",
    )
    for name, one in HeldOutRungs(maker, concepts).errors(TrainedPart(model)).items():
        table.add_row(name, f"{one.error:.3f}", f"{one.mean_color:.3f}", f"{one.share:.2f}", f"{one.looked_right:.0%}")
    return table
