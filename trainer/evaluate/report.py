"""The evaluation as files: evaluation.json, evaluation.md and grid.png."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate import efficientnet_lite
from trainer.evaluate.measure import EDITED_TOLERANCE, KEPT_TOLERANCE, Bar, Figures
from trainer.evaluate.metrics import CONFIDENCE, RESAMPLES, Estimate, rounded

_PACKAGES = ("mige-rt", "numpy", "pillow", "torch", efficientnet_lite.PACKAGE)


def circumstances(pipe: MigePipeline, seed: int, samples: int) -> dict[str, Any]:
    """What the figures depend on: the model, the engine, the settings, the tolerances, the versions."""
    return {
        "model": pipe.model_name,
        "engine": {"name": pipe.engine.name, "device": pipe.engine.device, "precision": pipe.engine.precision},
        "side": pipe.config.size,
        "seed": seed,
        "samples_per_kind": samples,
        "settings": {
            task: {n: v for n, v in asdict(pipe.complete(SamplingParams(), task)).items() if v is not None}
            for task in get_args(Task)
        },
        "tolerances": {"edited": EDITED_TOLERANCE, "kept": KEPT_TOLERANCE, "unit": "of 255, in every channel"},
        "intervals": {"confidence": CONFIDENCE, "method": "percentile bootstrap over samples", "resamples": RESAMPLES},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(rounded(data), indent=2) + "\n")


def as_data(
    about: Mapping[str, Any], kinds: Mapping[str, Figures], reached: Sequence[Bar], concepts: int
) -> dict[str, Any]:
    """The whole evaluation as JSON has it. concepts: how many are held out."""
    return {
        **about,
        "held_out_concepts": concepts,
        "chance": 1 / concepts,
        "kinds": {kind: asdict(of_kind) for kind, of_kind in kinds.items()},
        "bars": [{**asdict(bar), "met": bar.met} for bar in reached],
    }


def _share(found: Estimate | None) -> str:
    if found is None:
        return "-"
    return f"{found.value:.0%} ({found.low:.0%} to {found.high:.0%})"


def _plain(found: Estimate | None, form: str) -> str:
    return "-" if found is None else format(found.value, form)


def markdown(about: Mapping[str, Any], kinds: Mapping[str, Figures], reached: Sequence[Bar], concepts: int) -> str:
    """The evaluation as tables to read."""
    engine = about["engine"]
    lines = [
        f"# Evaluation of {about['model']}",
        "",
        f"On {concepts} concepts held out from training, {about['samples_per_kind']} samples a kind, seed "
        f"{about['seed']}; engine {engine['name']}, {engine['device']}, {engine['precision']}. In brackets: "
        f"{CONFIDENCE:.0%} intervals, percentile bootstrap over samples, {RESAMPLES} resamples.",
        "",
        "## Against the ground truth",
        "",
        "PSNR in dB (mean over samples) and mean squared error (squared levels of 255). Covered: the share of the "
        "distance in error from the source left as it is to the ground truth through the VAE.",
        "",
        *_table(
            ["kind", "PSNR", "source", "VAE", "error", "source", "VAE", "covered"],
            [
                [
                    kind,
                    f"{f.psnr['result'].value:.1f} ({f.psnr['result'].low:.1f} to {f.psnr['result'].high:.1f})",
                    *(_plain(f.psnr.get(name), ".1f") for name in ("source", "vae")),
                    *(_plain(f.error.get(name), ".0f") for name in ("result", "source", "vae")),
                    _share(f.covered),
                ]
                for kind, f in kinds.items()
            ],
        ),
        "",
        "## Pixels",
        "",
        f"Compared with the ground truth through the VAE: edited pixels are right within {EDITED_TOLERANCE}/255 in "
        f"every channel, untouched ones kept within {KEPT_TOLERANCE}/255. Beside it, the source through the VAE.",
        "",
        *_table(
            ["kind", "edited right", "source", "untouched kept", "source"],
            [
                [
                    kind,
                    *(
                        _share(f.right.get(name)) if name == "result" else _plain(f.right.get(name), ".0%")
                        for name in _TWO
                    ),
                    *(
                        _share(f.kept.get(name)) if name == "result" else _plain(f.kept.get(name), ".0%")
                        for name in _TWO
                    ),
                ]
                for kind, f in kinds.items()
            ],
        ),
        "",
        "## Subjects",
        "",
        f"How often a subject that the instruction brings in or changes is found first: of the clean pictures of all "
        f"{concepts} concepts, its own is the nearest by EfficientNet-Lite0's features (cosine). It is looked at "
        f"through the ground truth's mask. Chance is {1 / concepts:.1%}, but the mask tells the shape: see how often "
        "the ground truth is found with its subject in one colour, its mean (flat).",
        "",
        *_table(
            ["kind", "subjects", "found", "ground truth", "through the VAE", "flat", "source"],
            [
                [
                    kind,
                    str(f.asked),
                    _share(f.found["result"]),
                    *(_plain(f.found.get(name), ".0%") for name in ("truth", "vae", "flat", "source")),
                ]
                for kind, f in kinds.items()
                if f.found
            ],
        ),
        "",
        "## Bars",
        "",
        *_table(
            ["kind", "figure", "reached", "needed", "met"],
            [
                [
                    bar.kind,
                    bar.what,
                    "-" if bar.figure is None else f"{bar.figure:.0%}",
                    f"{bar.needed:.0%}",
                    _YES[bar.met],
                ]
                for bar in reached
            ],
        ),
        "",
    ]
    return "\n".join(lines)


_TWO = ("result", "source")
_YES = {True: "yes", False: "no"}


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
