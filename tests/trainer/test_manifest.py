"""A manifest of synthetic samples: what its lines and files hold, and that the engine runs it."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from mige_rt.cli import main as mige_rt
from mige_rt.errors import InputError
from mige_rt.requests import RequestRecord, parse_request
from trainer.synthetic import manifest
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS, Mark, make_sample

ASSETS = Path(__file__).parents[1] / "data" / "synthetic"
NUMBER = 40


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the command makes."""
    out = tmp_path_factory.mktemp("written") / "samples"
    arguments = ["--assets", str(ASSETS), "--out", str(out), "--samples", str(NUMBER), "--seed", "4"]
    result = CliRunner().invoke(manifest.main, arguments)
    assert result.exit_code == 0, result.output
    assert result.output.strip() == str(out / "manifest.jsonl")
    return out


def _lines(folder: Path) -> list[RequestRecord]:
    return [parse_request(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _check_subjects(folder: Path, subjects: list[dict], marks: tuple[Mark, ...]) -> None:
    for subject, mark in zip(subjects, marks, strict=True):
        assert (subject["code"], subject["name"]) == (mark.concept.code, mark.concept.name)
        assert (subject["style"], subject["reference"]) == (mark.style, mark.reference)
        assert subject["held_out"] == mark.concept.held_out
        assert tuple(subject["box"]) == mark.box
        mask = _pixels(folder / subject["mask"])
        assert mask.dtype == bool and np.array_equal(mask, mark.mask)


def test_a_line_and_its_files_hold_the_whole_sample(written: Path, concepts: list[Concept]) -> None:
    lines = _lines(written)
    assert len(lines) == NUMBER and len({line.id for line in lines}) == NUMBER
    for index, line in enumerate(lines):
        sample = make_sample(4, index, [concept for concept in concepts if not concept.held_out], 64)
        assert (line.prompt, line.task, line.seed) == (sample.prompt, sample.task, index)
        assert line.target is not None and np.array_equal(_pixels(written / line.target), sample.target)
        assert (line.source is None) == (sample.source is None)
        for path, image in zip(line.images, sample.images, strict=True):
            assert np.array_equal(_pixels(written / path), image)
            assert (path == line.source) == (image is sample.source)
        truth = line.truth
        assert truth is not None and truth["kind"] == sample.kind in KINDS
        assert tuple(truth["asked"]) == sample.asked
        assert np.array_equal(_pixels(written / truth["changed"]), sample.changed)
        _check_subjects(written, truth["before"], sample.before)
        _check_subjects(written, truth["after"], sample.after)


def test_the_engine_runs_a_manifest(written: Path, tmp_path: Path) -> None:
    few = written / "few.jsonl"
    lines = (written / "manifest.jsonl").read_text().splitlines(keepends=True)
    few.write_text("".join(lines[:3]))
    arguments = ["run", "--batch", str(few), "--out", str(tmp_path / "made.png"), "--steps", "2"]
    result = CliRunner().invoke(mige_rt, arguments)
    assert result.exit_code == 0, result.output
    assert len(list(tmp_path.glob("made-*.png"))) == 3


def test_held_out_things_come_when_asked_for(tmp_path: Path) -> None:
    out = tmp_path / "held-out"
    arguments = ["--assets", str(ASSETS), "--out", str(out), "--samples", "5", "--held-out", "--side", "32"]
    assert CliRunner().invoke(manifest.main, arguments).exit_code == 0
    for line in _lines(out):
        assert line.truth is not None and line.target is not None
        assert all(subject["held_out"] for subject in line.truth["after"] + line.truth["before"])
        assert _pixels(out / line.target).shape == (32, 32, 3)


def test_a_manifest_is_written_whole_or_not_at_all(
    tmp_path: Path, concepts: list[Concept], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(seed: int, index: int, *arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "make_sample", fails)
    with pytest.raises(KeyboardInterrupt):
        manifest.write_manifest(tmp_path / "out", concepts, 3, 0, 64)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{there}"], "exists already"),
        (["--out", "{new}", "--photos"], r"no photos"),
        (["--assets", "{there}", "--out", "{new}"], "emoji.json"),
    ],
)
def test_a_wrong_folder_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    there = tmp_path / "there"
    there.mkdir()
    given = [a.format(there=there, new=tmp_path / "new") for a in arguments]
    result = CliRunner().invoke(manifest.main, ["--samples", "1", "--assets", str(ASSETS), *given])
    assert result.exit_code == 2 and message in result.output
    assert list(tmp_path.rglob("*")) == [there]


def test_truth_is_an_object(concepts: list[Concept]) -> None:
    with pytest.raises(InputError, match="truth is 'blue', expected an object"):
        parse_request('{"prompt": "a", "truth": "blue"}')
    with pytest.raises(InputError, match="unknown kind, known are prompt"):
        parse_request('{"prompt": "a", "kind": "add"}')
