"""The options of `python -m trainer.evaluate`, apart from what they run, so that --help is quick."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mige_rt.config import Precision

EVALUATION_SEED, GUIDANCE_SEED = 10**6 + 1, 10**6 + 2  # of series of samples that training never sees
EVALUATION_SAMPLES, GUIDANCE_SAMPLES = 64, 8  # of each kind


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What is evaluated, on what, and where the report goes.

    Attributes:
        assets: Folder of emoji images made by `python -m trainer.synthetic.fetch`.
        out: Folder to make; it must not exist.
        model: A bundle or a model folder; None is the model shipped with mige-rt.
        engine: As in MigePipeline.from_pretrained, like device and precision.
        device: cpu, cuda, cuda:1 or auto.
        precision: Of the engine's computations.
        samples: Of each kind; None is EVALUATION_SAMPLES, or GUIDANCE_SAMPLES for the sweep.
        seed: Of the series of samples and of the images' noise; None is EVALUATION_SEED or GUIDANCE_SEED.
        guidance: Sweep the guidance scales instead of evaluating the defaults.
        paste_back: Put the sources' own pixels where nothing has changed (`mige_rt.paste_back`).
    """

    assets: Path
    out: Path
    model: Path | None = None
    engine: str = "auto"
    device: str = "auto"
    precision: Precision | Literal["auto"] = "auto"
    samples: int | None = None
    seed: int | None = None
    guidance: bool = False
    paste_back: bool = False
