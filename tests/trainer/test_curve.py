"""The plot of a training's log."""

import json
from pathlib import Path

import pytest
from PIL import Image

from mige_rt.errors import InputError
from trainer.curve import plot_curve


def test_a_log_becomes_an_image(tmp_path: Path) -> None:
    lines = [{"samples": 100 * (i + 1), "loss": 1 / (i + 1), "add": 2 / (i + 1)} for i in range(20)]
    (tmp_path / "log.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    with Image.open(plot_curve(tmp_path / "log.jsonl", tmp_path / "curve.png")) as image:
        assert image.size == (800, 450)
        assert len(image.getcolors(10**6) or []) > 2


def test_without_a_log_the_error_says_which_stage_to_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"log\.jsonl cannot be read .*run the stage mige"):
        plot_curve(tmp_path / "log.jsonl", tmp_path / "curve.png")
    assert not list(tmp_path.iterdir())
