"""Published datasets in their own layouts, a few records each, become manifests."""

import io
import json
import re
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from datasets import Dataset
from PIL import Image

from mige_rt.cli import main
from mige_rt.cli.data import LAYOUTS
from trainer.data.convert import CONVERTERS
from trainer.data.converters.subjects200k import name_subject
from trainer.data.manifest import ManifestSample, open_manifest


def _image(color: str, size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, color)


def _content(color: str, format: str = "JPEG", size: tuple[int, int] = (40, 30)) -> dict[str, Any]:
    """An image as the hub's parquet files hold it."""
    buffer = io.BytesIO()
    _image(color, size).save(buffer, format)
    return {"bytes": buffer.getvalue(), "path": None}


def _parquet(path: Path, rows: list[dict[str, Any]], images: tuple[str, ...]) -> Path:
    """Rows as `datasets` writes them, with columns of images."""
    from datasets import Image as ImageFeature

    path.parent.mkdir(parents=True, exist_ok=True)
    dataset = Dataset.from_list(rows)
    for name in images:
        dataset = dataset.cast_column(name, ImageFeature())
    dataset.to_parquet(path)
    return path


def _convert(layout: str, data: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(
        main, ["convert-data", "--layout", layout, "--data", str(data), "--out", str(out), *options]
    )


def _converted(layout: str, data: Path, out: Path, *options: str) -> tuple[list[ManifestSample], Result]:
    result = _convert(layout, data, out, *options)
    assert result.exit_code == 0, result.output
    return open_manifest(out / "manifest.jsonl"), result


def _color(path: str | None) -> tuple[int, ...]:
    assert path is not None
    with Image.open(path) as image:
        return tuple(int(v) for v in np.asarray(image.convert("RGB")).mean(axis=(0, 1)).round(-1))


def _instructpix2pix(folder: Path) -> Path:
    rows = [
        {
            "original_prompt": "a photo",
            "original_image": _content("red"),
            "edit_prompt": instruction,
            "edited_prompt": "a painting",
            "edited_image": _content("blue"),
        }
        for instruction in ("make it a painting", "turn the photo green")
    ]
    _parquet(folder / "data/train-00000-of-00001.parquet", rows, ("original_image", "edited_image"))
    return folder


def _magicbrush(folder: Path) -> Path:
    def row(turn: int) -> dict[str, Any]:
        return {
            "img_id": "242679",
            "turn_index": turn,
            "source_img": _content("red", "PNG"),
            "mask_img": _content("white", "PNG"),
            "instruction": f"add {turn} birds",
            "target_img": _content("blue", "PNG"),
        }

    images = ("source_img", "mask_img", "target_img")
    _parquet(folder / "data/train-00000-of-00001.parquet", [row(1), row(2)], images)
    _parquet(folder / "data/dev-00000-of-00001.parquet", [row(3)], images)  # not to be trained on
    return folder


def _ultraedit(folder: Path) -> Path:
    rows = [
        {
            "clip_sim_source": 0.3,
            "clip_sim_target": similarity,
            "source_caption": "a street",
            "target_caption": "a snowy street",
            "idx": f"{number}",
            "edit_prompt": "add snow",
            "edit_object": "NONE",
            "source_image": _content("red"),
            "edited_image": _content("blue"),
        }
        for number, similarity in enumerate((0.254, 0.255, 0.3))
    ]
    _parquet(folder / "data/FreeForm_0.parquet", rows, ("source_image", "edited_image"))
    return folder


def _hq_edit(folder: Path) -> Path:
    row = {
        "input": "a red square",
        "input_image": _content("red"),
        "edit": "make it blue",
        "inverse_edit": "make it red",
        "output": "a blue square",
        "output_image": _content("blue"),
    }
    _parquet(folder / "data/train-00000-of-00001.parquet", [row], ("input_image", "output_image"))
    return folder


def _seed_data_edit(folder: Path) -> Path:
    for kind, lines in {
        "auto_editing/openimages": [
            {"source_image": "a.jpg", "target_image": "b.jpg", "instruction": "make it blue"},
            {"source_image": "a.jpg", "target_image": "gone.jpg", "instruction": "make it white"},
            {"source_image": "a.jpg", "target_image": "b.jpg", "instruction": " "},
            {"source_image": None, "target_image": "b.jpg", "instruction": "make it white"},
        ],
        "multi_turn_editing": [
            {
                "source_image": "a.jpg",
                "edit_image_1": "b.jpg",
                "instruction_1": "make it blue",
                "edit_image_2": "c.jpg",
                "instruction_2": "make it green",
            }
        ],
    }.items():
        (folder / kind / "annotations").mkdir(parents=True)
        (folder / kind / "annotations_GPT4V").mkdir()
        (folder / kind / "images").mkdir()
        for name, color in {"a": "red", "b": "blue", "c": "lime"}.items():
            _image(color).save(folder / kind / f"images/{name}.jpg")
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / kind / "annotations/split_0001.jsonl").write_text(text)
        (folder / kind / "annotations_GPT4V/split_0001.jsonl").write_text("no JSON\n")
    return folder


def _gier(folder: Path) -> Path:
    entry = {
        "input": "lHT34/lHT34.jpg",
        "output": "lHT34_jwtyK.jpg",
        "segment": "lHT34/lHT34.jpg",
        "request": "Two focus points",
        "operator": {"brightness": {"local": False, "ids": []}},
        "expert_summary": ["brighten it", "more light"],
        "amateur_summary": ["brighten it"],
    }
    local = {**entry, "operator": {"tint": {"local": True, "ids": [1]}}, "expert_summary": ["tint the hat"]}
    (folder / "images").mkdir(parents=True)
    _image("red").save(folder / "images/lHT34_lHT34.jpg")
    _image("blue").save(folder / "images/lHT34_jwtyK.jpg")
    (folder / "GIER.json").write_text(json.dumps([entry, {**local, "amateur_summary": []}]))
    return folder


def _subjects200k(folder: Path) -> Path:
    def row(quality: int, **description: str) -> dict[str, Any]:
        pair = Image.new("RGB", (1056, 528))
        pair.paste(_image("red", (512, 512)), (8, 8))
        pair.paste(_image("blue", (512, 512)), (528, 8))
        buffer = io.BytesIO()
        pair.save(buffer, "PNG")
        return {
            "image": {"bytes": buffer.getvalue(), "path": None},
            "collection": "collection_2",
            "quality_assessment": {"compositeStructure": quality, "objectConsistency": 5, "imageQuality": 5},
            "description": {"item": "Eames Lounge Chair", "category": "Furniture", **description},
        }

    texts = {
        "description_0": "The Eames Lounge Chair stands in a bright room.",
        "description_1": "In a cabin, a worn chair is by the fire.",
    }
    rows = [row(5, **texts), row(3, **texts), row(5, **{**texts, "description_0": "A bright room."})]
    _parquet(folder / "data/train-00000-of-00001.parquet", rows, ("image",))
    return folder


def _idm_vton(folder: Path) -> Path:
    for name, color in (("image", "red"), ("cloth", "green"), ("result", "blue")):
        (folder / "test" / name).mkdir(parents=True)
        _image(color).save(folder / f"test/{name}/{'c' if name == 'cloth' else 'p'}1.jpg")
    (folder / "test_pairs.txt").write_text("p1.jpg c1.jpg\np2.jpg c1.jpg\n")
    return folder


MAKERS: dict[str, Callable[[Path], Path]] = {
    "instructpix2pix": _instructpix2pix,
    "magicbrush": _magicbrush,
    "ultraedit": _ultraedit,
    "seed-data-edit": _seed_data_edit,
    "hq-edit": _hq_edit,
    "gier": _gier,
    "subjects200k": _subjects200k,
    "idm-vton": _idm_vton,
}
IN, OF = "<imagehere>", "<imagehere>"
RED_TO_BLUE, BLUE_TO_RED = ((250, 0, 0), (0, 0, 250)), ((0, 0, 250), (250, 0, 0))
# The instructions, and the colors of source (of a subject: reference) and target, that come of the records above.
EXPECTED: dict[str, list[tuple[str, tuple[tuple[int, ...], tuple[int, ...]]]]] = {
    "instructpix2pix": [
        (f"make it a painting in{IN}", RED_TO_BLUE),
        (f"turn {IN} green", RED_TO_BLUE),  # "the photo" is the image
    ],
    "magicbrush": [(f"add 1 birds in{IN}", RED_TO_BLUE), (f"add 2 birds in{IN}", RED_TO_BLUE)],
    "ultraedit": [(f"add snow in{IN}", RED_TO_BLUE)] * 2,
    "seed-data-edit": [
        (f"make it blue in{IN}", RED_TO_BLUE),
        (f"make it blue in{IN}", RED_TO_BLUE),
        (f"make it green in{IN}", ((0, 0, 250), (0, 250, 0))),
    ],
    "hq-edit": [(f"make it blue in{IN}", RED_TO_BLUE), (f"make it red in{IN}", BLUE_TO_RED)],
    "gier": [
        (f"brighten it of{OF}", RED_TO_BLUE),
        (f"more light of{OF}", RED_TO_BLUE),
        (f"tint the hat in{IN}", RED_TO_BLUE),
    ],
    "idm-vton": [("replace the upper garment of the person in <imagehere> with <imagehere>", RED_TO_BLUE)],
    "subjects200k": [
        ("<imagehere> stands in a bright room.", BLUE_TO_RED),
        ("In a cabin, a worn <imagehere> is by the fire.", RED_TO_BLUE),
        ("In a cabin, a worn <imagehere> is by the fire.", RED_TO_BLUE),
    ],
}
LEFT_OUT = {
    "idm-vton": ["1 (no image that IDM-VTON made)"],
    "ultraedit": ["1 (clip_t below 0.255)"],
    "seed-data-edit": ["1 (missing image file)", "1 (no instruction)", "1 (no image)"],
    "subjects200k": ["2 (quality_assessment below 5)", "1 (the description does not name its subject)"],
}


def test_every_layout_has_a_converter() -> None:
    assert tuple(sorted(CONVERTERS)) == tuple(sorted(LAYOUTS)) == tuple(sorted(EXPECTED))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_published_layout_becomes_a_manifest(layout: str, tmp_path: Path) -> None:
    samples, result = _converted(layout, MAKERS[layout](tmp_path / "downloaded"), tmp_path / "out")
    is_subject = layout == "subjects200k"
    found = [(s.prompt, (_color(s.images[0] if is_subject else s.source), _color(s.target))) for s in samples]
    assert [prompt for prompt, _ in found] == [prompt for prompt, _ in EXPECTED[layout]]
    for (_, colors), (_, expected) in zip(found, EXPECTED[layout], strict=True):
        assert np.abs(np.subtract(colors, expected)).max() <= 10
    for sample in samples:
        with Image.open(sample.target) as target:
            assert not is_subject or np.ptp(np.asarray(target), axis=(0, 1)).max() == 0  # nothing of the border
        assert sample.task == {"subjects200k": "subject", "idm-vton": "compose"}.get(layout, "edit")
        assert sample.task != "edit" or set(sample.images) == {sample.source}
        assert sample.size == ((512, 512) if is_subject else (40, 30))
    assert len({sample.id for sample in samples}) == len(samples)
    for text in LEFT_OUT.get(layout, []):
        assert text in result.stderr


def test_images_in_parquet_are_written_as_the_files_that_they_are(tmp_path: Path) -> None:
    data = _parquet(
        tmp_path / "pairs.parquet",
        [{"source_img": _content("red"), "instruction": "make it blue", "target_img": _content("blue", "PNG")}],
        ("source_img", "target_img"),
    )
    (sample,), _ = _converted("magicbrush", data, tmp_path / "out")
    assert Path(str(sample.source)).read_bytes() == _content("red")["bytes"]
    assert Path(sample.target).read_bytes() == _content("blue", "PNG")["bytes"]
    assert Path(sample.target).suffix == ".png"


def test_columns_can_be_named_and_scores_filter(tmp_path: Path) -> None:
    rows = [
        {"before": _content("red"), "text": "make it blue", "after": _content("blue"), "beauty": beauty, "clip_t": 0.3}
        for beauty in (5.4, 5.6)
    ]
    data = _parquet(tmp_path / "mine.parquet", rows, ("before", "after"))
    columns = ["--source-column", "before", "--caption-column", "text", "--image-column", "after"]
    scored = [*columns, "--score-column", "aesthetic=beauty"]
    samples, result = _converted("instructpix2pix", data, tmp_path / "out", *scored)
    assert [sample.scores for sample in samples] == [{"clip_t": 0.3, "aesthetic": 5.6}]
    assert "1 (aesthetic not above 5.5)" in result.stderr
    unfiltered, _ = _converted("instructpix2pix", data, tmp_path / "all", *scored, "--no-filter")
    assert len(unfiltered) == 2
    limited, _ = _converted("instructpix2pix", data, tmp_path / "some", *columns, "--limit", "1")
    assert len(limited) == 1
    globally, _ = _converted("instructpix2pix", data, tmp_path / "global", *columns, "--edit-scope", "global")
    assert globally[0].prompt == "make it blue of<imagehere>"


def test_an_image_that_cannot_be_read_is_left_out_and_counted(tmp_path: Path) -> None:
    damaged = {"bytes": b"no image", "path": None}
    rows = [
        {"source_img": source, "instruction": "make it blue", "target_img": _content("blue", size=size)}
        for source, size in ((_content("red"), (40, 30)), (damaged, (40, 30)), (_content("red"), (170, 40)))
    ]
    data = _parquet(tmp_path / "pairs.parquet", rows, ("source_img", "target_img"))
    samples, result = _converted("magicbrush", data, tmp_path / "out")
    assert len(samples) == 1
    assert "1 (unreadable image)" in result.stderr and "1 (width more than 4 times the height)" in result.stderr
    assert len(list((tmp_path / "out").rglob("*.*"))) == 3  # two images and the manifest


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    data = _instructpix2pix(tmp_path / "data")
    limit, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, most))
    try:
        result = _convert("instructpix2pix", data, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    assert result.exit_code == 2 and "out cannot be written ([Errno 27]" in " ".join(result.stderr.split())
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize(
    ("layout", "options", "message"),
    [
        ("magicbrush", [], r"has no column 'source_img', did you mean source_image\? It has"),
        ("ultraedit", ["--score-column", "clip_t=similarity"], r"has no column 'similarity'"),
        ("ultraedit", ["--score-column", "beauty=idx"], r"'beauty' is no score that is filtered by"),
        ("ultraedit", ["--score-column", "clip_t"], r"--score-column is 'clip_t'"),
        ("ultraedit", ["--score-column", "clip_t=idx"], r"the score idx is '0'; a number is expected"),
        ("ultraedit", ["--source-column", "edit_prompt"], r"the column 'edit_prompt' holds str, no images"),
        ("gier", ["--image-column", "a"], r"GIER's columns are fixed"),
        ("gier", [], r"has no GIER.json"),
        ("seed-data-edit", [], r"has no annotations/\*.jsonl"),
        ("subjects200k", ["--source-column", "a"], r"Subjects200K has neither sources nor scores"),
    ],
)
def test_another_layout_is_refused_and_nothing_is_written(
    layout: str, options: list[str], message: str, tmp_path: Path
) -> None:
    data = _ultraedit(tmp_path / "downloaded")
    result = _convert(layout, data, tmp_path / "out", *options)
    assert result.exit_code == 2 and re.search(message, " ".join(result.stderr.split())), result.stderr
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_what_is_no_parquet_file_is_refused(content: bytes | None, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    if content is not None:
        (data / "train.parquet").write_bytes(content)
    result = _convert("hq-edit", data, tmp_path / "out")
    assert result.exit_code == 2 and "parquet" in result.stderr
    assert list(tmp_path.iterdir()) == [data]


@pytest.mark.parametrize(
    ("description", "item", "expected"),
    [
        ("On a desk, the Vintage typewriter waits.", "vintage typewriter", "On a desk, <imagehere> waits."),
        ("A typewriter by a typewriter.", "Vintage Typewriter", "<imagehere> by a typewriter."),
        ("This item shines.", "Brass Lamp", "<imagehere> shines."),
        ("A lampshade.", "Lamp", None),  # another word
        ("A lamp.", "", None),
    ],
)
def test_a_subject_is_named_by_its_image(description: str, item: str, expected: str | None) -> None:
    assert name_subject(description, item) == expected
