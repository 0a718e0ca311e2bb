"""The data pipelines: correct on scenes of known truth, whole after a kill, and plain about bad input."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from chat_server import Asked, ChatServer, chat_server
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.cli import main
from mige_rt.errors import InputError
from trainer.data.manifest import open_manifest
from trainer.data.prepared import open_prepared
from trainer.data.tar_images import image_exists, open_sample_image
from trainer.masks import Mask, cut_out, decode_rle, iou, mask_box, on_square
from trainer.pipelines.build import BuildOptions, build, dry_run
from trainer.pipelines.built import BuiltShard
from trainer.pipelines.config import PipelineConfig, load_pipeline_config
from trainer.pipelines.funnel import funnel_table
from trainer.pipelines.subject import place_subjects
from trainer.synthetic.backgrounds import Background
from trainer.synthetic.concepts import Concept
from trainer.synthetic.scene import PLACES, Drawing, Scene, Subject, draw_scene

SIDE = 128
SCENES = 6
CONFIGS = Path(__file__).parents[2] / "trainer/configs"
LARGE, SMALL = 0.55, 0.2  # parts of the side: a mask of 0.1 to 0.5 of the image, and one of less
HERE = BuildOptions()  # in this process


@dataclass(frozen=True)
class Truth:
    """A scene with two entities, the first one large and the second one small."""

    image: Image.Image
    without: Image.Image
    names: tuple[str, str]
    masks: tuple[Mask, Mask]
    place: str

    def subject(self, number: int) -> Image.Image:
        return on_square(cut_out(self.image, self.masks[number]), 224)


@pytest.fixture(scope="module")
def scenes(concepts: list[Concept]) -> list[Truth]:
    return [_scene(concepts, number) for number in range(SCENES)]


def _scene(concepts: list[Concept], number: int) -> Truth:
    first, second = concepts[number], concepts[(number + 3) % len(concepts)]
    place, other = (("on the left", "on the right"), ("on the right", "on the left"))[number % 2]
    x, y = PLACES[other]
    large = Subject(first, place, PLACES[place], LARGE, flip=False)
    small = Subject(second, other, (x + (0.08 if x > 0.5 else -0.08), y), SMALL, flip=True)
    background = Background("plain", ("blue", "green", "white")[number % 3], number)
    drawing: Drawing = draw_scene(Scene(background, (large, small)), SIDE)
    without = draw_scene(Scene(background, (small,)), SIDE).image
    masks = (drawing.masks[0], drawing.masks[1])
    return Truth(Image.fromarray(drawing.image), Image.fromarray(without), (first.name, second.name), masks, place)


# --- a stand-in for language models that knows the scenes ---


class Knowing:
    """Answers as a perfect language model would, which it looks up in the scenes' truth."""

    def __init__(self, scenes: Sequence[Truth]) -> None:
        self._scenes = scenes

    def __call__(self, asked: Asked) -> str:
        first_words = asked.text.split(":")[0]
        for words, answer in (
            ("Look at what this image shows", self._complete),
            ("What is the thing", self._name),
            ("The thing is", self._place),
            ("Find this", self._boxes),
            ("List the physical things", self._entities),
            ("Here is an instruction for editing", self._new_subject),
            ("Here is an instruction that replaces", self._rewrite),
        ):
            if first_words.startswith(words):
                return answer(asked)
        raise AssertionError(asked.text)

    def _complete(self, asked: Asked) -> str:
        return "True."

    def _name(self, asked: Asked) -> str:
        subjects = [(truth.names[k], truth.subject(k)) for truth in self._scenes for k in range(2)]
        return f"The {min(subjects, key=lambda pair: _difference(pair[1], asked.image))[0]}."

    def _place(self, asked: Asked) -> str:
        (left, width) = (int(re.findall(rf"{word} (\d+)", asked.text)[0]) for word in ("with left", "width"))
        assert asked.image is not None and f"{asked.image.width}x{asked.image.height}" in asked.text
        side = "left" if left + width / 2 < asked.image.width / 2 else "right"
        return f"Add <imagehere> to the {side} of <imagehere>. It is large."

    def _boxes(self, asked: Asked) -> str:
        words = asked.text.partition("image: ")[2].partition(".")[0]
        truth = min(self._scenes, key=lambda truth: _difference(truth.image, asked.image))
        boxes = [mask_box(mask) for name, mask in zip(truth.names, truth.masks, strict=True) if name == words]
        return f"Here you are:\n```json\n{json.dumps({'boxes': boxes})}\n```"

    def _entities(self, asked: Asked) -> str:
        caption = asked.text.partition("Caption: ")[2].partition("\n")[0]
        names = {name for truth in self._scenes for name in truth.names if name in caption}
        return json.dumps({"entities": sorted(names, key=caption.index)})

    def _new_subject(self, asked: Asked) -> str:
        match = re.search(r"Instruction: replace the .* with a (.*?)( in the image)?$", asked.text, re.MULTILINE)
        return json.dumps({"subject": match and match[1]})

    def _rewrite(self, asked: Asked) -> str:
        match = re.search(r"Instruction: (replace the .*) with a ", asked.text)
        assert match is not None
        return json.dumps({"instruction": f"{match[1]} in <imagehere> with <imagehere>"})


def _difference(first: Image.Image, second: Image.Image | None) -> float:
    assert second is not None
    same_size = second.resize(first.size)
    return float(np.abs(np.asarray(first, np.int16) - np.asarray(same_size, np.int16)).mean())


@pytest.fixture
def server(scenes: list[Truth]) -> Iterator[ChatServer]:
    with chat_server(Knowing(scenes)) as running:
        yield running


# --- input ---


def encode_rle(mask: Mask) -> str:
    """COCO's run lengths as text, written from the format's description."""
    flat = mask.T.reshape(-1).astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    ends = [0, *([0] if flat[0] else []), *changes.tolist(), flat.size]
    lengths = np.diff(ends).tolist()
    text = ""
    for number, length in enumerate(lengths):
        value = length - (lengths[number - 2] if number > 2 else 0)
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + bits + (32 if more else 0))
            if not more:
                break
    return text


@pytest.fixture
def sa_1b(scenes: list[Truth], tmp_path: Path) -> Path:
    folder = tmp_path / "sa-1b"
    folder.mkdir()
    for number, truth in enumerate(scenes):
        _write_segmented(folder / f"sa_{number}", truth.image, truth.masks)
    return folder


def _write_segmented(stem: Path, image: Image.Image, masks: Sequence[Mask]) -> None:
    image.save(stem.with_suffix(".png"))
    annotations = [
        {"id": k, "segmentation": {"size": list(mask.shape), "counts": encode_rle(mask)}}
        for k, mask in enumerate(masks)
    ]
    stem.with_suffix(".json").write_text(json.dumps({"image": {"image_id": 1}, "annotations": annotations}))


@pytest.fixture
def replacements(scenes: list[Truth], tmp_path: Path) -> Path:
    folder = tmp_path / "edits"
    folder.mkdir()
    lines: list[dict[str, Any]] = []
    for number, truth in enumerate(scenes):
        truth.image.save(folder / f"{number}-target.png")
        truth.without.save(folder / f"{number}-source.png")
        prompt = f"replace the {truth.names[1]} with a {truth.names[0]}"
        lines.append({"prompt": prompt, "source": f"{number}-source.png", "target": f"{number}-target.png"})
    lines[1]["prompt"] = "make the image brighter"
    lines[2]["scores"] = {"annotation_match": 0.25}
    lines[3]["scores"] = {"annotation_match": 0.35, "aesthetic": 5.4}
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _config(pipeline: str, roles: dict[str, Any], settings: dict[str, Any] | None = None, **others: Any) -> str:
    return json.dumps({"pipeline": {"name": pipeline, **(settings or {})}, "roles": roles, **others})  # JSON is YAML


def _load(text: str, folder: Path) -> PipelineConfig:
    path = folder / "config.yaml"
    path.write_text(text)
    return load_pipeline_config(path)


def _chat(server: ChatServer, **options: Any) -> dict[str, Any]:
    return {"loader": "openai", "url": server.url, "model": "stand-in", "retries": 0, **options}


def _add_config(server: ChatServer, **options: Any) -> str:
    roles = {"describer": _chat(server, **options), "inpainter": {"loader": "telea"}}
    return _config("add", roles, {"long_side": SIDE, "dilation": 4}, shard_records=2)


def _cli(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)])


def _drops(out: Path) -> list[tuple[str, int | None, str, str]]:
    lines = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    return [(line["id"], line["entity"], line["stage"], line["reason"]) for line in lines]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# --- the pipelines on known truth ---


def test_subject_addition_takes_things_out_and_says_where_they_were(
    scenes: list[Truth], sa_1b: Path, server: ChatServer, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(_add_config(server))
    out = tmp_path / "out"
    result = _cli("build", "--config", tmp_path / "config.yaml", "--data", sa_1b, "--out", out, "--ray", "none")
    assert result.exit_code == 0, result.output
    assert f"{SCENES} samples of {SCENES} records; 0 records are bad" in result.stderr
    samples = open_manifest(out / "manifest.jsonl")
    assert len(samples) == SCENES and {sample.task for sample in samples} == {"compose"}
    for sample, truth in zip(samples, scenes, strict=True):
        target, source = open_sample_image(sample.target), open_sample_image(sample.images[1])
        assert sample.images[1] == sample.source and target.tobytes() == truth.image.tobytes()
        side = "left" if truth.place == "on the left" else "right"
        assert sample.prompt == f"Add <imagehere> to the {side} of <imagehere>. It is large."
        # Nothing changes outside of the widened mask, and what was inside is gone.
        changed = (np.asarray(target) != np.asarray(source)).any(axis=-1)
        reach = cv2.dilate(truth.masks[0].astype(np.uint8), np.ones((9, 9), np.uint8)).astype(bool)
        assert not (changed & ~reach).any() and changed[truth.masks[0]].mean() > 0.8
        background = _difference(truth.without, source)
        assert background < 0.5 * _difference(truth.without, target)
        subject = open_sample_image(sample.images[0])
        assert subject.size == (224, 224) and subject.tobytes() == truth.subject(0).tobytes()
    # The small ones are left out, each for what it is.
    assert _drops(out) == [(f"sa_{k}", 1, "masks", "mask not of 0.1 to 0.5 of the image") for k in range(SCENES)]
    with tarfile.open(out / "shard-000001.tar") as tar:
        description = json.load(tar.extractfile("000000002-0.json") or io.BytesIO())
        mask = Image.open(tar.extractfile("000000002-0.mask-0.png") or io.BytesIO())
        assert iou(np.asarray(mask).astype(bool), scenes[2].masks[0]) == 1
    assert description["subjects"] == [{"name": scenes[2].names[0], "box": list(mask_box(scenes[2].masks[0]) or ())}]
    assert {asked.body["temperature"] for asked in server.requests} == {0}
    assert {asked.body["max_tokens"] for asked in server.requests} == {100}
    result = _cli("prepare", "--manifest", out / "manifest.jsonl", "--out", tmp_path / "prepared")
    assert result.exit_code == 0, result.output
    assert open_prepared(tmp_path / "prepared").index.tasks == {"compose": SCENES}
    # The shipped config trains on it.
    config = (CONFIGS / "tiny.yaml").read_text()
    small = {"prepared/mine": str(tmp_path / "prepared"), "batch: 16": "batch: 2", "micro_batch: 8": "micro_batch: 2"}
    small |= {"every: 100": "every: 1", "every: 10\n": "every: 1\n", "tensorboard: true": "tensorboard: false"}
    for old, new in small.items():
        assert old in config
        config = config.replace(old, new)
    (tmp_path / "tiny.yaml").write_text(config)
    arguments = ["train", "--config", tmp_path / "tiny.yaml", "--out", tmp_path / "run", "--max-steps", "1"]
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    (line,) = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(line)["loss/compose"])


def test_subjects_of_captions_are_cut_out_and_stand_where_they_are_named(
    scenes: list[Truth], server: ChatServer, tmp_path: Path
) -> None:
    roles = {"tagger": _chat(server), "detector": _chat(server), "segmenter": {"loader": "grabcut"}}
    captions = [f"On the table there is a {truth.names[0]} beside The {truth.names[1]}." for truth in scenes]
    for number, truth in enumerate(scenes):
        truth.image.save(tmp_path / f"{number}.png")
    lines = [{"image": f"{number}.png", "caption": caption} for number, caption in enumerate(captions)]
    data = tmp_path / "captions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = tmp_path / "out"
    total = build(_load(_config("subject", roles), tmp_path), data, out, HERE)
    assert total.records == len(total.lines) == SCENES and total.bad == 0
    overlaps: list[float] = []
    for sample, truth in zip(open_manifest(out / "manifest.jsonl"), scenes, strict=True):
        # The small entity's box covers less than a tenth of the image, so its name stays a word.
        assert sample.prompt == f"On the table there is <imagehere> beside The {truth.names[1]}."
        assert sample.task == "subject" and sample.source is None and len(sample.images) == 1
        mask = open_sample_image(sample.images[0].replace("image-0", "mask-0"))
        overlaps.append(iou(np.asarray(mask.convert("L")) > 128, truth.masks[0]))
    assert float(np.mean(overlaps)) > 0.85, overlaps
    assert {drop[2:] for drop in _drops(out)} == {("detect", "box not of 0.1 to 0.85 of the image")}


def test_grounded_captions_need_nobody_to_find_things(scenes: list[Truth], tmp_path: Path) -> None:
    truth = scenes[0]
    truth.image.save(tmp_path / "0.png")
    boxes = [mask_box(mask) for mask in truth.masks]
    entities = [{"words": name, "box": box} for name, box in zip(truth.names, boxes, strict=True)]
    entities += [{"words": "unnamed", "box": boxes[0]}]
    line = {"id": "a", "image": "0.png", "caption": f"{truth.names[1]} and the {truth.names[0]}", "entities": entities}
    data = tmp_path / "captions.jsonl"
    data.write_text(json.dumps(line) + "\n")
    config = _load(
        _config("subject", {"segmenter": {"loader": "grabcut"}}, {"grounded_box_share": [0.01, 0.8]}), tmp_path
    )
    build(config, data, tmp_path / "out", HERE)
    (sample,) = open_manifest(tmp_path / "out/manifest.jsonl")
    assert sample.prompt == "<imagehere> and <imagehere>"
    shown = [open_sample_image(path) for path in sample.images]
    assert [_difference(truth.subject(k), image) < 20 for k, image in zip((1, 0), shown, strict=True)] == [True, True]
    assert _drops(tmp_path / "out") == [("a", 2, "tag", "a name that the caption does not have")]
    data.write_text(json.dumps({"image": "0.png", "caption": "a cat"}) + "\n")
    with pytest.raises(InputError, match=r"captions.jsonl line 1 has no entities"):
        build(config, data, tmp_path / "other", HERE)


def test_replacements_are_recognised_cut_out_and_rewritten(
    scenes: list[Truth], replacements: Path, server: ChatServer, tmp_path: Path
) -> None:
    roles = {"tagger": _chat(server), "detector": _chat(server), "segmenter": {"loader": "grabcut"}}
    out = tmp_path / "out"
    total = build(_load(_config("replace", roles), tmp_path), replacements, out, HERE)
    assert _drops(out) == [
        ("2", None, "subject", "no replacement"),
        ("3", None, "match", "annotation_match not above 0.3"),
        ("4", None, "aesthetic", "aesthetic not above 5.5"),
    ]
    samples = open_manifest(out / "manifest.jsonl")
    for sample, number in zip(samples, (0, 4, 5), strict=True):
        truth = scenes[number]
        assert sample.prompt == f"replace the {truth.names[1]} in <imagehere> with <imagehere>"
        assert sample.task == "compose" and sample.images[0] == sample.source
        assert open_sample_image(sample.target).tobytes() == truth.image.tobytes()
        assert _difference(truth.subject(0), open_sample_image(sample.images[1])) < 20
    assert [(count.records, count.entities) for count in total.funnel.values()] == [
        *[(6, 0), (5, 0), (4, 0)],  # read, match, aesthetic
        *[(3, 3)] * 5,  # subject, detect, segment, rewrite, write
    ]
    assert json.loads((out / "funnel.json").read_text())["match"] == {"records": 5, "entities": 0, "new_entities": 0}
    assert [row["left"] for row in funnel_table(total)][:4] == ["100%", "83%", "80%", "75%"]
    assert "the image" in server.requests[1].text  # what a model reads has no placeholder


def test_edits_are_filtered_and_what_training_reads(replacements: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "config.yaml").write_text(_config("edit", {}))
    result = _cli("build", "--config", tmp_path / "config.yaml", "--data", replacements, "--out", out, "--ray", "none")
    assert result.exit_code == 0, result.output
    assert _drops(out) == [("4", None, "aesthetic", "aesthetic not above 5.5")]
    result = _cli("prepare", "--manifest", out / "manifest.jsonl", "--out", tmp_path / "prepared")
    assert result.exit_code == 0, result.output
    assert "4 samples; left out: 1 (annotation_match not above 0.3)" in result.stderr
    index = open_prepared(tmp_path / "prepared").index
    assert index.samples == 4 and index.tasks == {"edit": 4}
    # What a pipeline made can go into another one.
    again = build(_load(_config("edit", {}), tmp_path), out / "manifest.jsonl", tmp_path / "again", HERE)
    assert len(again.lines) == 5
    for first, second in zip(
        *(open_manifest(folder / "manifest.jsonl") for folder in (out, tmp_path / "again")), strict=True
    ):
        assert open_sample_image(first.target).tobytes() == open_sample_image(second.target).tobytes()


def test_what_idm_vton_made_becomes_replacements(scenes: list[Truth], tmp_path: Path) -> None:
    for name in ("image", "cloth", "result"):
        (tmp_path / "viton/test" / name).mkdir(parents=True)
    for folder, name, image in (
        ("image", "p1.jpg", scenes[0].without),
        ("image", "p2.jpg", scenes[1].without),
        ("cloth", "c1.jpg", scenes[0].subject(0)),
        ("result", "p1.jpg", scenes[0].image),
    ):
        image.save(tmp_path / "viton/test" / folder / name)
    (tmp_path / "viton/test_pairs.txt").write_text("p1.jpg c1.jpg\np2.jpg c1.jpg\n")
    out = tmp_path / "out"
    result = _cli("convert", "--layout", "idm-vton", "--data", tmp_path / "viton", "--out", out)
    assert result.exit_code == 0, result.output
    assert "1 samples; left out: 1 (no image that IDM-VTON made)" in result.stderr
    (sample,) = open_manifest(out / "manifest.jsonl")
    assert sample.prompt == "replace the upper garment of the person in <imagehere> with <imagehere>"
    names = [Path(path).resolve().relative_to(tmp_path / "viton/test").as_posix() for path in sample.images]
    assert names == ["image/p1.jpg", "cloth/c1.jpg"] and sample.task == "compose"
    assert Path(sample.target).resolve() == tmp_path / "viton/test/result/p1.jpg"
    result = _cli("convert", "--layout", "idm-vton", "--data", tmp_path, "--out", tmp_path / "none")
    assert result.exit_code == 2 and "has no train_pairs.txt or test_pairs.txt beside" in result.stderr


# --- stopped, killed, resumed ---


def _command(config: Path, data: Path, out: Path, ray: str) -> list[str]:
    return [
        *(sys.executable, "-m", "mige_rt.cli", "data", "build", "--config", str(config)),
        *("--data", str(data), "--out", str(out), "--ray", ray),
    ]


def _kill_at(server: ChatServer, number: int, command: Sequence[str]) -> None:
    """Start a command and kill it with all that it started when the server was asked `number` times."""
    reached, answer, release = threading.Event(), server.answer, threading.Event()

    def hold(asked: Asked) -> str | tuple[int, str]:
        if len(server.requests) >= number:
            reached.set()
            release.wait(60)
        return answer(asked)

    server.answer = hold
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        while not reached.wait(0.1):
            assert process.poll() is None, process.stderr and process.stderr.read().decode()
        os.killpg(process.pid, signal.SIGKILL)
        release.set()
        process.wait()
    server.answer = answer


@pytest.mark.parametrize("ray", ["none", pytest.param("local", marks=pytest.mark.long)])
def test_a_killed_run_ends_on_the_same_bytes(ray: str, sa_1b: Path, server: ChatServer, tmp_path: Path) -> None:
    config = _load(_add_config(server), tmp_path)
    build(config, sa_1b, tmp_path / "whole", HERE)
    asked = len(server.requests)
    killed = tmp_path / "killed"
    _kill_at(server, asked + 8, _command(tmp_path / "config.yaml", sa_1b, killed, ray))
    assert not (killed / "manifest.jsonl").exists() and (ray == "local" or (killed / "shard-000000.json").exists())
    (killed / ".mige-rt-0123456789ab.part").write_bytes(b"what a killed process leaves")
    build(config, sa_1b, killed, replace(HERE, ray=None if ray == "none" else ray))
    assert _bytes(killed) == _bytes(tmp_path / "whole")


def test_ray_makes_the_same_bytes(sa_1b: Path, server: ChatServer, tmp_path: Path) -> None:
    config = _load(_add_config(server), tmp_path)
    build(config, sa_1b, tmp_path / "here", HERE)
    build(config, sa_1b, tmp_path / "ray", BuildOptions(ray="local"))
    assert _bytes(tmp_path / "ray") == _bytes(tmp_path / "here")


def test_a_folder_of_another_run_is_refused(sa_1b: Path, server: ChatServer, tmp_path: Path) -> None:
    build(_load(_add_config(server), tmp_path), sa_1b, tmp_path / "out", BuildOptions(limit=1))
    with pytest.raises(InputError, match="begun with another records; give the same as before"):
        build(_load(_add_config(server), tmp_path), sa_1b, tmp_path / "out", HERE)
    other = _add_config(server).replace('"dilation": 4', '"dilation": 5')
    with pytest.raises(InputError, match="begun with another pipeline; give the same as before"):
        build(_load(other, tmp_path), sa_1b, tmp_path / "out", BuildOptions(limit=1))


def test_a_model_that_the_environment_names_is_in_the_plan(
    sa_1b: Path, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = _load(_add_config(server, model=None), tmp_path), tmp_path / "out"
    monkeypatch.delenv("OPENAI_MODEL", raising=False)
    with pytest.raises(InputError, match="a role of loader openai has no model"):
        build(config, sa_1b, out, BuildOptions(limit=1))
    assert not out.exists()  # so that it can be begun once the model is named
    monkeypatch.setenv("OPENAI_MODEL", "one")
    build(config, sa_1b, out, BuildOptions(limit=1))
    monkeypatch.setenv("OPENAI_MODEL", "another")
    with pytest.raises(InputError, match="begun with another served_models; give the same as before"):
        build(config, sa_1b, out, BuildOptions(limit=1))
    plan = json.loads((out / "plan.json").read_text())
    del plan["served_models"]  # as an earlier version wrote it
    (out / "plan.json").write_text(json.dumps(plan))
    build(config, sa_1b, out, BuildOptions(limit=1))


# --- bad input ---


def test_bad_records_are_left_out_with_their_reasons(
    scenes: list[Truth], sa_1b: Path, server: ChatServer, tmp_path: Path
) -> None:
    (sa_1b / "sa_0.png").write_bytes(b"no image")
    (sa_1b / "sa_1.json").write_text('{"annotations": [{"segmentation": {"size": [128, 128], "counts": "\x7f"}}]}')
    (sa_1b / "sa_2.json").unlink()
    _write_segmented(sa_1b / "sa_3", scenes[3].image, [scenes[3].masks[0][:100]])
    truth = scenes[4].subject(0)

    def answer(asked: Asked) -> str | tuple[int, str]:
        if asked.image is not None and asked.image.size == truth.size and _difference(truth, asked.image) < 5:
            return "I am a language model."
        return Knowing(scenes)(asked)

    server.answer = answer
    config = _load(_add_config(server).replace('"shard_records": 2', '"max_bad": 0.9'), tmp_path)
    total = build(config, sa_1b, tmp_path / "out", HERE)
    assert len(total.lines) == 1 and total.bad == 5
    drops = {id: (entity, stage, reason) for id, entity, stage, reason in _drops(tmp_path / "out") if entity != 1}
    assert drops["sa_0"] == (None, "read", "an image that cannot be read")
    assert drops["sa_2"] == (None, "read", "masks that cannot be read")
    assert {id: drop for id, drop in drops.items() if id in ("sa_1", "sa_3", "sa_4")} == {
        "sa_1": (None, "masks", "no entity is left"),
        "sa_3": (None, "masks", "no entity is left"),
        "sa_4": (None, "complete", "no entity is left"),
    }
    details = (tmp_path / "out/dropped.jsonl").read_text()
    for words in (
        "the run lengths hold '\\\\x7f'",
        "no annotation stands beside the image",
        "128x100 for an image of 128x128",
        "True or False was asked, not 'I am a language model.'",
    ):
        assert words in details


def test_too_many_bad_records_stop_the_run(sa_1b: Path, server: ChatServer, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(_add_config(server))
    server.answer = lambda asked: (200, "<html>please sign in</html>")
    arguments = ("--config", tmp_path / "config.yaml", "--data", sa_1b, "--out", tmp_path / "out", "--ray", "none")
    result = _cli("build", *arguments)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert "2 of 2 records of shard-000000.tar are bad, such as sa_0 at the stage complete" in message
    assert not list((tmp_path / "out").glob("shard-*"))


@pytest.mark.parametrize(
    ("answer", "options", "message"),
    [
        (lambda asked: (500, "{}"), {}, r"cannot be used \(Error code: 500"),
        (lambda asked: (401, "{}"), {}, r"cannot be used \(Error code: 401.*check its address, model and key"),
        (lambda asked: time.sleep(1) or "True", {"timeout": 0.2}, "gave no answer in time, after 0 retries"),
        (None, {"url": "http://127.0.0.1:9/v1"}, r"http://127.0.0.1:9/v1/ cannot be used \(Connection error"),
    ],
    ids=["overloaded", "wrong key", "slow", "absent"],
)
def test_a_server_that_does_not_answer_stops_the_run(
    answer: Callable[[Asked], str] | None,
    options: dict[str, Any],
    message: str,
    sa_1b: Path,
    server: ChatServer,
    tmp_path: Path,
) -> None:
    server.answer = answer or server.answer
    config = _load(_add_config(server, **options), tmp_path)
    with pytest.raises(InputError, match=message):
        build(config, sa_1b, tmp_path / "out", HERE)
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_busy_server_is_asked_again(
    scenes: list[Truth], sa_1b: Path, server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    knowing, busy = Knowing(scenes), iter([True, False])
    server.answer = lambda asked: (503, "{}") if next(busy, False) else knowing(asked)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("OPENAI_MODEL", "from-environment")
    monkeypatch.setenv("OUR_KEY", "secret")
    config = _add_config(server, url=None, model=None, key_variable="OUR_KEY", retries=1)
    total = build(_load(config, tmp_path), sa_1b, tmp_path / "out", BuildOptions(limit=1))
    assert len(total.lines) == 1 and total.bad == 0
    assert {asked.body["model"] for asked in server.requests} == {"from-environment"}
    assert {headers["authorization"] for headers in server.headers} == {"Bearer secret"}
    assert "secret" not in "".join(path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())


def test_an_answer_that_breaks_its_schema_is_asked_for_again(
    scenes: list[Truth], replacements: Path, server: ChatServer, tmp_path: Path
) -> None:
    knowing = Knowing(scenes)

    def answer(asked: Asked) -> str:
        schema = asked.body.get("response_format", {}).get("json_schema", {}).get("schema", {})
        if "subject" in schema.get("properties", {}) and "could not be used" not in asked.text:
            return '{"subjekt": 7}'
        return knowing(replace(asked, text=asked.text.partition("\n\nYour last")[0]))

    server.answer = answer
    roles = {"tagger": _chat(server), "detector": _chat(server), "segmenter": {"loader": "grabcut"}}
    total = build(_load(_config("replace", roles), tmp_path), replacements, tmp_path / "out", BuildOptions(limit=1))
    assert len(total.lines) == 1
    assert "unknown subjekt, did you mean subject?" in server.requests[1].text
    roles["tagger"]["attempts"] = 1
    config = _load(_config("replace", roles, max_bad=1), tmp_path)
    total = build(config, replacements, tmp_path / "once", BuildOptions(limit=1))
    assert total.bad == 1 and _drops(tmp_path / "once")[0][2:] == ("subject", "an answer that is not as asked")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"pipeline": {"name": "add"}}, "the pipeline add needs inpainter, describer; say in roles who fills it"),
        (
            {"pipeline": {"name": "subject"}, "roles": {"detector": {"loader": "grounding-dino"}}},
            "needs tagger, segmenter",
        ),
        ({"pipeline": {"name": "add", "dilatation": 3}}, "unknown pipeline.add.dilatation"),
        ({"pipeline": {"name": "edit"}, "roles": {"clip": {"loader": "clap"}}}, "roles.clip.loader is 'clap'"),
        ({"pipeline": {"name": "subtract"}}, "subtract"),
        ({"pipeline": {"name": "edit", "aesthetic": "much"}}, "aesthetic is 'much', expected a number"),
        ({"pipeline": {"name": "edit"}, "max_bad": 2}, "max_bad is 2"),
        (
            {"pipeline": {"name": "edit"}, "roles": {"clip": {"loader": "clip", "device": "gpu"}}},
            "roles.clip.device is 'gpu', String should match pattern '^(cpu|cuda(:\\d+)?)$'",
        ),
    ],
)
def test_configs_that_cannot_be_used_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        _load(json.dumps(config), tmp_path)


@pytest.mark.parametrize("options", [["--ray", "none"], ["--dry-run", "1"]])
def test_a_device_that_is_not_here_is_said_before_anything_is_made(
    options: list[str], sa_1b: Path, server: ChatServer, tmp_path: Path
) -> None:
    (tmp_path / "config.yaml").write_text(_add_config(server, device="cuda:99"))
    result = _cli("build", "--config", tmp_path / "config.yaml", "--data", sa_1b, "--out", tmp_path / "out", *options)
    assert result.exit_code == 2
    assert "roles.describer.device: there is no device 'cuda:99' here" in " ".join(result.stderr.split())
    assert not (tmp_path / "out").exists() and not server.requests


def test_the_shipped_configs_can_be_read() -> None:
    folder = CONFIGS / "pipelines"
    names = [load_pipeline_config(path).pipeline.name for path in sorted(folder.glob("*.yaml"))]
    assert sorted(names) == ["add", "add", "edit", "replace", "subject"]


# --- parts ---


def test_run_lengths_are_cocos() -> None:
    assert decode_rle([2, 3, 1], (2, 3)).tolist() == [[False, True, True], [False, True, False]]
    random = np.random.default_rng(0)
    for size in ((1, 1), (3, 200), (97, 61), (300, 400)):
        mask = random.random(size) < random.random()
        mask[: size[0] // 2] = random.integers(2)  # long runs, too
        assert (decode_rle(encode_rle(mask), size) == mask).all()
    for counts, size in (([2, 3], (2, 3)), ([7, -1], (2, 3)), ("", (1, 1)), ("P", (1, 1)), ("\x7f", (1, 1))):
        with pytest.raises(ValueError, match="run lengths"):
            decode_rle(counts, size)


@pytest.mark.parametrize(
    ("caption", "names", "prompt", "order"),
    [
        ("A cat and the dog", ["dog", "cat"], "<imagehere> and <imagehere>", [1, 0]),
        ("a hot dog beside a dog", ["dog", "hot dog"], "<imagehere> beside <imagehere>", [1, 0]),
        ("a hot dog", ["dog", "hot dog"], "<imagehere>", [1]),
        ("a hot dog beside a dog", ["hot dog", "dog"], "<imagehere> beside <imagehere>", [0, 1]),
        ("cats, catalogues", ["cat"], "cats, catalogues", []),
        ("the C++ book (old)", ["C++ book (old)", ""], "<imagehere>", [0]),
    ],
)
def test_placeholders_stand_where_things_are_named(
    caption: str, names: list[str], prompt: str, order: list[int]
) -> None:
    assert place_subjects(caption, names) == (prompt, order)


def test_images_in_shards_are_read_as_they_are(tmp_path: Path) -> None:
    image = Image.effect_noise((40, 30), 90).convert("RGB")
    image.save(tmp_path / "a.png")
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        tar.add(tmp_path / "a.png", "000-0.image-0.png")
    path = str(tmp_path / "s.tar/000-0.image-0.png")
    assert image_exists(path) and open_sample_image(path).tobytes() == image.tobytes()
    assert not image_exists(str(tmp_path / "s.tar/other.png")) and not image_exists(str(tmp_path / "t.tar/other.png"))
    with pytest.raises(InputError, match=r"no image other.png in .*s.tar"):
        open_sample_image(str(tmp_path / "s.tar/other.png"))
    (tmp_path / "s.tar").write_bytes(b"no tar file" * 100)
    with pytest.raises(InputError, match="cannot be read as a shard"):
        open_sample_image(path)


def test_a_dry_run_shows_records_and_makes_no_shard(sa_1b: Path, server: ChatServer, tmp_path: Path) -> None:
    (sa_1b / "sa_1.png").write_bytes(b"no image")
    config, out = _load(_add_config(server), tmp_path), tmp_path / "out"
    records = dry_run(config, sa_1b, out, 3)
    assert [len(record.samples) for record in records] == [1, 0, 1]
    assert [path.name for path in out.iterdir()] == ["dry-run.png"]
    sheet = Image.open(out / "dry-run.png")
    assert len(sheet.getcolors(1_000_000) or range(10_000)) > 1000
    build(config, sa_1b, out, BuildOptions(limit=1))  # the same folder, afterwards
    assert isinstance(BuiltShard.read(out / "shard-000000.json"), BuiltShard)
