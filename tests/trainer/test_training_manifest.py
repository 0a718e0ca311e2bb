"""Manifests: what a line means to training, and what is said of a bad one. The published JSON, read as it is."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.requests import parse_request
from trainer.data.filters import rejection
from trainer.data.manifest import manifest_line, open_manifest

GOOD: dict[str, Any] = {
    "id": "a",
    "task": "compose",
    "prompt": "replace the cat in <imagehere> with <imagehere>",
    "images": ["scene.png", "dog.png"],
    "source": "scene.png",
    "target": "made.png",
    "size": [8, 6],
    "scores": {"aesthetic": 6},
}
# The authors' example_data.json, in its layout.
PUBLISHED: list[dict[str, Any]] = [
    {
        "image": "examples/made.png",
        "width": 8,
        "height": 6,
        "entity_path": ["examples/dog.png", "examples/scene.png"],
        "multi_prompt": "a poached<imagehere>beside several<imagehere>spears",
        "source_path": [],
    },
    {
        "image": "examples/made.png",
        "width": 8,
        "height": 6,
        "entity_path": ["examples/scene.png"],
        "multi_prompt": "Delete the person from<imagehere>and then repair the stage",
        "source_path": ["examples/scene.png"],
    },
    {
        "image": "examples/made.png",
        "width": 8,
        "height": 6,
        "entity_path": ["examples/scene.png", "examples/dog.png"],
        "multi_prompt": "replace the skirt in<imagehere>with<imagehere>",
        "source_path": ["examples/scene.png"],
        "bbox": [1, 2, 3, 4],
    },
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three images."""
    folder = tmp_path / "examples"
    folder.mkdir()
    for name in ("scene", "dog", "made"):
        Image.new("RGB", (8, 6)).save(folder / f"{name}.png")
    return folder


def _write(folder: Path, *lines: dict[str, Any] | str) -> Path:
    path = folder / "manifest.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def _without(*names: str, **changes: Any) -> dict[str, Any]:
    return {name: value for name, value in {**GOOD, **changes}.items() if name not in names}


def test_a_line_has_all_that_training_reads(folder: Path) -> None:
    (sample,) = open_manifest(_write(folder, GOOD))
    assert (sample.id, sample.task, sample.prompt) == ("a", "compose", GOOD["prompt"])
    assert sample.images == (str(folder / "scene.png"), str(folder / "dog.png"))
    assert (sample.source, sample.target) == (str(folder / "scene.png"), str(folder / "made.png"))
    assert (sample.size, sample.scores) == ((8, 6), {"aesthetic": 6})
    assert sample.paths() == (sample.target, sample.source, sample.images[1])


def test_what_a_line_leaves_out_is_what_running_it_would_take(folder: Path) -> None:
    edit = {"prompt": "make the background blue", "source": "scene.png", "target": "made.png"}
    subject = {"prompt": "a <ImageHere> in the rain", "images": ["dog.png"], "target": "made.png"}
    samples = open_manifest(_write(folder, edit, "", subject))
    assert [sample.task for sample in samples] == ["edit", "subject"]
    assert [sample.id for sample in samples] == ["1", "3"]  # the lines' numbers
    assert samples[0].prompt == "make the background blue in<imagehere>"  # the paper's rule
    assert samples[0].images == (samples[0].source,)
    assert samples[0].size is None and samples[0].scores == {}


def test_an_image_of_the_sources_path_is_the_source(folder: Path) -> None:
    name = "scene" * 20 + ".png"  # so long that equal strings are not one object
    (folder / "scene.png").rename(folder / name)
    line = {"prompt": "make <imagehere> blue", "images": [name], "source": name, "target": "made.png"}
    assert open_manifest(_write(folder, line))[0].task == "edit"


def test_a_written_line_is_read_again() -> None:
    record = parse_request(json.dumps(GOOD))
    assert parse_request(manifest_line(record)) == record


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"line 2: it is no JSON"),
        ("[1]", r"line 2: it is a list; write an object"),
        (_without("prompt"), r"line 2: it cannot be used: missing prompt"),
        (_without("target"), r"line 2: missing target"),
        (_without(target="gone.png"), r"line 2: target is 'gone.png', but there is no such file in"),
        (_without(source="gone.png"), r"line 2: source is 'gone.png', but there is no such file"),
        (_without(images=["scene.png", "gone.png"]), r"line 2: images\[1\] is 'gone.png', but there is no such file"),
        (_without(images=["scene.png"]), r"line 2: prompt cannot be used: .* 2 <imagehere> and 1 images"),
        (_without(prompt="."), r"line 2: prompt cannot be used: the prompt is empty"),
        (_without(task="swap"), r"line 2: it cannot be used: task is 'swap', expected 'subject', 'edit' or 'compose'"),
        (_without(task="subject"), r"line 2: task cannot be used: the task 'subject' takes no source image"),
        (_without("source", task="edit"), r"line 2: task cannot be used: the task 'edit' needs a source image"),
        (_without(id="first"), r"line 2: id is 'first', which line 1 has, too"),
        (_without(id="a/b"), r"line 2: id is 'a/b'; it becomes part of a file name"),
        (_without(size=[8]), r"line 2: it cannot be used: .*size"),
        (_without(size=[8, 0]), r"line 2: it cannot be used: size\[1\] is 0, expected a number greater than 0"),
        (_without(scores={"clip_t": "high"}), r"line 2: it cannot be used: scores.clip_t is 'high', expected a number"),
        (_without(imagse=["x"]), r"line 2: it cannot be used: unknown imagse, did you mean images\?"),
    ],
)
def test_a_bad_line_is_named_with_its_field(folder: Path, line: dict[str, Any] | str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_manifest(_write(folder, {**GOOD, "id": "first"}, line))


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfe\x00"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "manifest.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"manifest\.jsonl"):
        open_manifest(path)


@pytest.mark.parametrize("place", ["in the folder above", "given"])
def test_the_published_json_is_read_as_it_is(folder: Path, tmp_path: Path, place: str) -> None:
    path = (folder if place == "in the folder above" else tmp_path / "..").resolve() / "example_data.json"
    path.write_text(json.dumps(PUBLISHED, indent=4))
    samples = open_manifest(path, None if place == "in the folder above" else tmp_path)
    assert [sample.task for sample in samples] == ["subject", "edit", "compose"]
    assert samples[0].prompt == PUBLISHED[0]["multi_prompt"]
    assert samples[0].images == (str(folder / "dog.png"), str(folder / "scene.png"))
    assert samples[2].source == samples[2].images[0] == str(folder / "scene.png")
    assert samples[1].size == (8, 6)
    path.unlink()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": "examples/gone.png"}, r"entry 2: image is 'examples/gone.png', but there is no such file"),
        ({"entity_path": ["examples/gone.png"]}, r"entry 2: entity_path\[0\] is 'examples/gone.png'"),
        ({"entity_path": []}, None),  # an edit's one placeholder can only be the source
        ({"multi_prompt": "<imagehere><imagehere>"}, r"entry 2: multi_prompt cannot be used: .* 2 <imagehere>"),
        ({"width": "8"}, r"entry 2: width is '8', expected an integer"),
        ({"source_path": ["examples/scene.png"] * 2}, r"entry 2: source_path has 2 paths"),
        ({"source_path": None}, r"entry 2: source_path is None, expected a list"),
    ],
)
def test_a_bad_entry_of_the_published_json_is_named_with_its_field(
    folder: Path, changes: dict[str, Any], message: str | None
) -> None:
    path = folder / "example_data.json"
    path.write_text(json.dumps([PUBLISHED[0], {**PUBLISHED[1], **changes}]))
    if message is None:
        assert len(open_manifest(path)) == 2
        return
    with pytest.raises(InputError, match=message):
        open_manifest(path)


@pytest.mark.parametrize(
    ("size", "scores", "kept"),
    [
        ((400, 100), {}, True),
        ((401, 100), {}, False),
        ((100, 900), {}, True),  # as published: the height may be anything
        (None, {"aesthetic": 5.51}, True),  # above is kept
        (None, {"aesthetic": 5.5}, False),
        (None, {"clip_t": 0.255}, True),
        (None, {"clip_t": 0.254}, False),
        (None, {"annotation_match": 0.31}, True),
        (None, {"annotation_match": 0.3}, False),
        (None, {"aesthetic": float("nan")}, False),
        (None, {"anything": 0.0}, True),
    ],
)
def test_the_papers_filters(size: tuple[int, int] | None, scores: dict[str, float], kept: bool) -> None:
    assert (rejection(size, scores) is None) == kept
