"""The study of tasks that are trained together, on the default model's image encoder and a few steps."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.errors import InputError
from mige_rt.instruction import PLACEHOLDER, count_placeholders
from trainer.checkpoints.model_folder import load_model
from trainer.loop import save_trained
from trainer.study.__main__ import CONFIG, main
from trainer.study.config import load_study
from trainer.study.training import as_text_only
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS, make_sample

ASSETS = Path(__file__).parents[1] / "data" / "synthetic"
QUICK = {"steps = 800": "steps = 2", "steps = 280": "steps = 2", "shard_samples = 512": "shard_samples = 8"}
QUICK |= {"evaluated = 16": "evaluated = 1", "seeds = [1, 2]": "seeds = [1]", "batch = 32": "batch = 4"}
FEW_KINDS = {"subject": ("another_ground",), "edit": ("remove",), "compose": ("add", "replace")}
ARMS = ("6-without-vae-features", "7-text-only")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped study with fewer steps and two of its arms."""
    folder = tmp_path_factory.mktemp("config")
    text = (CONFIG / "study.toml").read_text()
    for old, new in QUICK.items():
        assert old in text
        text = text.replace(old, new)
    (folder / "study.toml").write_text(text)
    for arm in ARMS:
        shutil.copy(CONFIG / f"{arm}.toml", folder)
    return folder


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder as the stage `qformer` leaves it, with the default model's image encoder."""
    folder = tmp_path_factory.mktemp("state")
    (folder / "qformer").mkdir()
    save_trained(load_model(DEFAULT_MODEL).image_encoder.float(), folder / "qformer")
    return folder


@pytest.fixture(autouse=True)
def few_samples() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.study.measure.LOSS_SAMPLES", 2)
        patch.setattr("trainer.study.measure.LOSS_TIMESTEPS", [500])
        patch.setattr("trainer.study.training.START_SAMPLES", 8)
        patch.setattr("trainer.study.report.KINDS_OF_TASK", FEW_KINDS)
        for module in ("trainer.study.measure", "trainer.evaluate.run"):
            patch.setattr(f"{module}.EVALUATED_KINDS", sum(FEW_KINDS.values(), ()))
        yield


def run(config: Path, state: Path, out: Path) -> Result:
    arguments = ["--config", config, "--assets", ASSETS, "--state", state, "--start", DEFAULT_MODEL, "--out", out]
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_arms_are_trained_measured_and_reported(config: Path, state: Path, tmp_path: Path) -> None:
    result = run(config, state, tmp_path)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "study.json").read_text())
    assert list(report["arms"]) == list(ARMS)
    values = [arm["tables"]["edit"]["held-out loss"] for arm in report["arms"].values()]
    assert all(np.isfinite(values)) and values[0] != values[1]
    text = (tmp_path / "study.md").read_text()
    assert "joint, without VAE features" in text and "8 in all" in text and "†" not in text
    assert Image.open(tmp_path / "study.png").width > 500
    # Stopped before the last arm was measured, and started again.
    (tmp_path / f"{ARMS[1]}-1" / "result.json").unlink()
    (tmp_path / "study.md").unlink()
    first = (tmp_path / f"{ARMS[0]}-1" / "result.json").stat().st_mtime_ns
    again = run(config, state, tmp_path)
    assert again.exit_code == 0, again.output
    assert (tmp_path / "study.md").read_text() == text
    assert (tmp_path / f"{ARMS[0]}-1" / "result.json").stat().st_mtime_ns == first
    # Neither another study nor another arm has these results.
    other = shutil.copytree(config, tmp_path / "other")
    for file, old, new, what in (
        (f"{ARMS[1]}.toml", "edit = 1,", "edit = 3,", f"{ARMS[1]}-1 was begun with another tasks"),
        ("study.toml", "evaluated = 1", "evaluated = 2", "was begun with another evaluated"),
    ):
        text = (other / file).read_text()
        assert old in text
        (other / file).write_text(text.replace(old, new))
        refused = run(other, state, tmp_path)
        assert refused.exit_code == 2 and what in " ".join(refused.output.replace("│", "").split()), refused.output


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused = run(CONFIG, tmp_path, tmp_path / "file" / "out")
    assert refused.exit_code == 2 and "cannot be made" in refused.output, refused.output


def test_text_only_instructions_keep_what_is_put_in(concepts: list[Concept]) -> None:
    for number, kind in enumerate(KINDS):
        sample = make_sample(3, number, concepts, 64, {kind: 1})
        changed = as_text_only(sample)
        assert not any(image is sample.source for image in changed.images)
        assert count_placeholders(changed.prompt) == len(changed.images)
        for mark in changed.after:
            if mark.reference is not None:
                before = next(other for other in sample.after if other.mask is mark.mask)
                assert before.reference is not None
                assert changed.images[mark.reference] is sample.images[before.reference]
            if mark.origin is not None:  # none of what only the source shows is left
                assert mark.origin.image == mark.reference
        if sample.source is not None:
            assert "the image" in changed.prompt and PLACEHOLDER + PLACEHOLDER not in changed.prompt


def test_the_shipped_study_has_the_papers_comparisons() -> None:
    study = load_study(CONFIG)
    arms = study.arms.values()
    assert sum(set(arm.tasks) == {"subject", "edit", "compose"} and arm.fusion and arm.multimodal for arm in arms) == 1
    assert [sorted(arm.tasks) for arm in arms if len(arm.tasks) == 1] == [["subject"], ["edit"], ["compose"]]
    assert any(set(arm.tasks) == {"subject", "edit"} for arm in arms)
    assert sum(not arm.fusion for arm in arms) == sum(not arm.multimodal for arm in arms) == 1
    assert len(study.seeds) >= 2 and not {"add", "replace"} & set(study.common_kinds)


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("study.toml", "remove = 0.2", "removee = 0.2", "there is no kind 'removee'"),
        ("study.toml", "seeds = [", "seeds = [9999999999, ", "expected a number less than or equal to 4294967295"),
        ("study.toml", "[kinds.compose]", "[kinds.subject2]", "kinds"),
        ("study.toml", "evaluated", "evaluatd", "unknown evaluatd, did you mean evaluated?"),
        ("7-text-only.toml", "subject = 1", "subjekt = 1", "tasks"),
        ("7-text-only.toml", "multimodal", "multi", "unknown multi"),
    ],
)
def test_a_mistake_in_a_study_is_refused(
    config: Path, tmp_path: Path, file: str, old: str, new: str, message: str
) -> None:
    folder = shutil.copytree(config, tmp_path / "config")
    content = (folder / file).read_text()
    assert old in content
    (folder / file).write_text(content.replace(old, new))
    with pytest.raises(InputError, match=message):
        load_study(folder)
