"""An evaluation as files: evaluation.json and evaluation.md."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

from tabulate import tabulate

from mige_rt.instruction import Task
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer.evaluate import efficientnet_lite
from trainer.evaluate.intervals import CONFIDENCE, RESAMPLES, Estimate
from trainer.evaluate.measure import EDITED_TOLERANCE, KEPT_TOLERANCE, KindMetrics, Threshold
from trainer.evaluate.metrics import rounded

_PACKAGES = ("mige-rt", "numpy", "pillow", "scipy", "torch", efficientnet_lite.PACKAGE)


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What an evaluation measured.

    Attributes:
        run: What the metrics depend on, from `describe_run`.
        kinds: The metrics of each kind of samples.
        thresholds: Of all kinds.
        concepts: Number of held-out concepts.
    """

    run: Mapping[str, Any]
    kinds: Mapping[str, KindMetrics]
    thresholds: Sequence[Threshold]
    concepts: int


def describe_run(pipe: MigePipeline, seed: int, samples_per_kind: int) -> dict[str, Any]:
    """What metrics depend on, as JSON has it: the model, the engine, the settings, the tolerances, the versions.

    Args:
        pipe: The model.
        seed: Of the series of samples.
        samples_per_kind: The first so many of the series.
    """
    return {
        "model": pipe.model_name,
        "engine": {"name": pipe.engine.name, "device": pipe.engine.device, "precision": pipe.engine.precision},
        "side": pipe.config.size,
        "seed": seed,
        "samples_per_kind": samples_per_kind,
        "settings": {
            task: {n: v for n, v in asdict(SamplingParams().with_defaults(pipe.config, task)).items() if v is not None}
            for task in get_args(Task)
        },
        "tolerances": {"edited": EDITED_TOLERANCE, "kept": KEPT_TOLERANCE, "unit": "of 255, in every channel"},
        "intervals": {"confidence": CONFIDENCE, "method": "percentile bootstrap over samples", "resamples": RESAMPLES},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}},
    }


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write data with floats of six significant digits."""
    path.write_text(json.dumps(rounded(data), indent=2) + "\n", encoding="utf-8")


def to_json(evaluation: Evaluation) -> dict[str, Any]:
    """The content of evaluation.json."""
    return {
        **evaluation.run,
        "held_out_concepts": evaluation.concepts,
        "chance": 1 / evaluation.concepts,
        "kinds": {kind: asdict(metrics) for kind, metrics in evaluation.kinds.items()},
        "thresholds": [{**asdict(threshold), "met": threshold.met} for threshold in evaluation.thresholds],
    }


def markdown(evaluation: Evaluation) -> str:
    """The content of evaluation.md: an introduction, and a table for each group of metrics."""
    run, engine = evaluation.run, evaluation.run["engine"]
    introduction = (
        f"# Evaluation of {run['model']}\n\n"
        f"On {evaluation.concepts} concepts held out from training, {run['samples_per_kind']} samples of each kind, "
        f"seed {run['seed']}; engine {engine['name']}, {engine['device']}, {engine['precision']}. In brackets: "
        f"{CONFIDENCE:.0%} intervals, percentile bootstrap over samples, {RESAMPLES} resamples."
    )
    sections = (_ground_truth, _pixels, _subjects, _thresholds)
    return "\n\n".join([introduction, *(section(evaluation) for section in sections)]) + "\n"


def _ground_truth(evaluation: Evaluation) -> str:
    text = (
        "PSNR in dB (mean over samples) and mean squared error (squared levels of 255), of the result, of the "
        "unchanged source, and of the ground truth's reconstruction by the VAE. Covered: the share of the distance in "
        "error from the source to that reconstruction that the result covers."
    )
    rows = [
        [
            kind,
            _with_interval(metrics.psnr["result"], "{:.1f}"),
            *(_value(metrics.psnr.get(name), "{:.1f}") for name in ("source", "vae")),
            *(_value(metrics.error.get(name), "{:.0f}") for name in ("result", "source", "vae")),
            _with_interval(metrics.covered, "{:.0%}"),
        ]
        for kind, metrics in evaluation.kinds.items()
    ]
    headers = ["kind", "PSNR", "source", "VAE", "error", "source", "VAE", "covered"]
    return _section("Against the ground truth", text, headers, rows)


def _pixels(evaluation: Evaluation) -> str:
    text = (
        f"Compared with the ground truth's reconstruction by the VAE: edited pixels are right within "
        f"{EDITED_TOLERANCE}/255 in every channel, untouched ones kept within {KEPT_TOLERANCE}/255. Beside it, the "
        "source's reconstruction."
    )
    rows = [
        [
            kind,
            *(
                cell
                for shares in (metrics.right, metrics.kept)
                for cell in (_with_interval(shares.get("result"), "{:.0%}"), _value(shares.get("source"), "{:.0%}"))
            ),
        ]
        for kind, metrics in evaluation.kinds.items()
    ]
    return _section("Pixels", text, ["kind", "edited right", "source", "untouched kept", "source"], rows)


def _subjects(evaluation: Evaluation) -> str:
    number = evaluation.concepts
    text = (
        f"Found: how often a subject that the instruction brings in or changes is recognized, which means that its own "
        f"reference image is the nearest of those of all {number} concepts, by the cosine similarity of "
        "EfficientNet-Lite0's features. The subject is cut out by the ground truth's mask. Chance is "
        f"{1 / number:.1%}, but the mask alone tells the shape: compare with the ground truth whose subject has one "
        "colour, its mean (flat). Inside the masks: PSNR in dB, mean over samples, of the result, of the ground truth "
        "through the VAE, and of the ground truth whose subject has one colour; beyond: of the result less the last."
    )
    rows = [
        [
            kind,
            str(metrics.asked),
            _with_interval(metrics.found["result"], "{:.0%}"),
            *(_value(metrics.found.get(name), "{:.0%}") for name in ("truth", "vae", "flat", "source")),
            *(_value(metrics.subject_psnr.get(name), "{:.1f}") for name in ("result", "vae", "flat")),
            _with_interval(metrics.beyond_flat, "{:+.1f}"),
        ]
        for kind, metrics in evaluation.kinds.items()
        if metrics.found
    ]
    headers = ["kind", "subjects", "found", "ground truth", "through the VAE", "flat", "source"]
    headers += ["inside", "VAE", "flat", "beyond"]
    return _section("Subjects", text, headers, rows)


def _thresholds(evaluation: Evaluation) -> str:
    rows = [
        [
            threshold.kind,
            threshold.metric,
            "-" if threshold.value is None else _amount(threshold.value, threshold.unit),
            ("more than " if threshold.exclusive else "") + _amount(threshold.required, threshold.unit),
            "yes" if threshold.met else "no",
        ]
        for threshold in evaluation.thresholds
    ]
    text = "What each kind is asked to reach."
    return _section("Thresholds", text, ["kind", "metric", "value", "required", "met"], rows)


def _amount(value: float, unit: str) -> str:
    return f"{value:.0%}" if unit == "share" else f"{value:.1f} {unit}"


def _section(title: str, text: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    # Without an alignment, cells are not padded, and a change of one leaves the other lines of a diff alone.
    table = tabulate(rows, headers, tablefmt="github", stralign=None, disable_numparse=True)
    return f"## {title}\n\n{text}\n\n{table}"


def _with_interval(estimate: Estimate | None, form: str) -> str:
    return "-" if estimate is None else estimate.text(form)


def _value(estimate: Estimate | None, form: str) -> str:
    return "-" if estimate is None else form.format(estimate.value)
