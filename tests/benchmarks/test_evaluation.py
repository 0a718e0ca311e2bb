"""`mige-rt eval`: benchmarks in their own layouts, metrics against second implementations, resuming, and bad input."""

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from pyarrow import parquet
from skimage.metrics import mean_squared_error
from tiny_networks import save_clip, save_detector, save_segmenter

from benchmarks.evaluation import metrics
from benchmarks.evaluation.encoders import (
    Dino,
    EncoderOptions,
    Encoders,
    GroundedSam,
)
from benchmarks.evaluation.generate import GenerateOptions, generate, open_run
from benchmarks.evaluation.judge import judge
from benchmarks.evaluation.layouts import open_benchmark
from benchmarks.evaluation.layouts.emu_edit import check_captioned
from benchmarks.evaluation.paper import PAPER
from benchmarks.evaluation.report import to_json, write_report
from benchmarks.evaluation.results import RunId, open_results, start_results
from benchmarks.evaluation.sample import Benchmark, MaskFile
from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from trainer.synthetic.concepts import Concept
from trainer.synthetic.manifest import write_manifest
from trainer.vision_models import DETECTOR, Clip, GroundingDino, weights_digest

QUICK = SamplingParams(num_inference_steps=2)
NONE = EncoderOptions(clip=None, dino=None, detector=None, segmenter=None, lpips=False)
DREAMBENCH_FILE = """Classes

subject_name,class
bear_plushie,stuffed animal
dog2,dog

Prompts

Object Prompts

prompt_list = [
'a {0} {1} in the jungle'.format(unique_token, class_token),
'a cube shaped {0} {1}'.format(unique_token, class_token)
]

Live Subject Prompts

prompt_list = [
'a {0} {1} in a chef outfit'.format(unique_token, class_token)
]
"""


def _run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, ["eval", *map(str, args)])


def _image(color: str | tuple[int, int, int], size: tuple[int, int] = (48, 48)) -> Image.Image:
    return Image.new("RGB", size, color)


def _save(path: Path, image: Image.Image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def _noise(seed: int, size: tuple[int, int] = (48, 40)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


# --- benchmarks, as they are published ---


@pytest.fixture
def dreambench(tmp_path: Path) -> Path:
    folder = tmp_path / "dreambench"
    for subject, color in (("bear_plushie", "brown"), ("dog2", "gray")):
        for number in (0, 1, 4):
            _save(folder / subject / f"{number:02d}.jpg", _image(color))
    (folder / "prompts_and_classes.txt").write_text(DREAMBENCH_FILE)
    return folder


@pytest.fixture
def emu_edit(tmp_path: Path) -> Path:
    def row(idx: int, task: str, captions: tuple[str, str]) -> dict[str, Any]:
        buffer = io.BytesIO()
        _image((idx, 0, 0)).save(buffer, "PNG")
        about = {"instruction": "make the sky night", "task": task, "split": "test", "idx": idx, "hash": f"{idx}"}
        return {**about, "image": {"bytes": buffer.getvalue(), "path": None}} | dict(
            zip(("input_caption", "output_caption"), captions, strict=True)
        )

    rows = [
        row(0, "global", ("a car", "a car at night")),
        row(3, "add", ("a train station in city", "a train station in city")),
        row(1, "global", ("a dog", "a dog at night")),
    ]
    folder = tmp_path / "emu" / "data"
    folder.mkdir(parents=True)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "test-00000-of-00001-abc.parquet", row_group_size=2)
    parquet.write_table(pa.Table.from_pylist(rows), folder / "validation-00000-of-00001-abc.parquet")
    return folder.parent


@pytest.fixture
def magicbrush(tmp_path: Path) -> Path:
    folder = tmp_path / "magicbrush"
    sessions, captions = {}, {}
    for session, turns in (("242679", 2), ("139", 1)):
        names = [f"{session}-input.png", *(f"{session}-output{n}.png" for n in range(1, turns + 1))]
        for number, name in enumerate(names):
            _save(folder / "images" / session / name, _image((60 * number, 90, 40)))
        captions[session] = dict(zip(names, ("a car", "a dog in the jungle", "a signboard at night"), strict=False))
        for n in range(1, turns + 1):
            mask = _image("white").convert("RGBA")
            mask.paste((0, 0, 0, 0), (0, 0, 24, 48))
            mask.save(folder / "images" / session / f"{session}-mask{n}.png")
        sessions[session] = [
            {
                "input": names[n - 1],
                "mask": f"{session}-mask{n}.png",
                "output": names[n],
                "instruction": f"turn {n} please",
            }
            for n in range(1, turns + 1)
        ]
    (folder / "edit_sessions.json").write_text(json.dumps(sessions))
    (folder / "global_descriptions.json").write_text(json.dumps(captions))
    return folder


@pytest.fixture
def migebench(tmp_path: Path) -> Path:
    folder = tmp_path / "MIGEBench"
    for row, task in (("add", "add_bench"), ("replace", "replace_bench")):
        files = {kind: f"{row}/{row}_{kind}/7_{kind}.jpg" for kind in ("source", "target", "mask")}
        files["entity"] = f"{row}/{row}_entity/7_entity_black.jpg"
        for kind, path in files.items():
            _save(folder / path, _image({"mask": "white"}.get(kind, "teal")))
        paths = {kind: f"/path/to/MIGEBench/{path}" for kind, path in files.items()}
        entry = {
            "image": paths["target"],
            "source_path": [paths["source"]],
            "width": 1024,
            "height": 1024,
            "object": "a signboard",
            "multi_prompt": "Add<imagehere>to the bottom center of<imagehere>.",
            "target_caption": "an alley with a signboard",
            "mask_path": [paths["mask"]],
            "entity_path": [paths["entity"], paths["source"]],
            "idx": 7,
            "crop": "0",
        }
        (folder / f"{task}.json").write_text(json.dumps([entry]))
    return folder


@pytest.fixture(scope="module")
def world(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world") / "world"
    write_manifest(folder, concepts, 4, 3, 64)
    return folder


def test_dreambench_has_each_prompt_once_a_subject_and_four_seeds(dreambench: Path) -> None:
    benchmark = open_benchmark(f"dreambench:{dreambench}")
    assert [(s.id, s.prompt, s.caption) for s in benchmark.samples] == [
        ("bear_plushie-00", "a <imagehere> in the jungle", "a stuffed animal in the jungle"),
        ("bear_plushie-01", "a cube shaped <imagehere>", "a cube shaped stuffed animal"),
        ("dog2-00", "a <imagehere> in a chef outfit", "a dog in a chef outfit"),
    ]
    assert benchmark.seeds == (0, 1, 2, 3) and len(benchmark.image_names()) == 12
    dog = benchmark.samples[-1]
    assert [image.path.name for image in dog.similar_to] == ["00.jpg", "01.jpg", "04.jpg"]
    assert [image.path.name for image in dog.images] == ["00.jpg"] and dog.source is None


def test_emu_edit_leaves_out_equal_captions_for_clip_alone(emu_edit: Path) -> None:
    benchmark = open_benchmark(f"emu-edit:{emu_edit}")
    assert [sample.id for sample in benchmark.samples] == ["0", "1", "3"]  # of the split test alone
    assert benchmark.rows == ("all tasks", "add", "global")
    night, _, station = benchmark.samples
    assert (night.caption, night.source_caption) == ("a car at night", "a car")
    assert station.caption is None and station.source_caption is None
    for sample, red in zip(benchmark.samples, (0, 1, 3), strict=True):  # in two row groups
        assert sample.truth == sample.source and sample.similar_to == (sample.source,)
        assert sample.source is not None and sample.source.open().getpixel((0, 0)) == (red, 0, 0)


def test_the_whole_emu_edit_set_has_as_many_captions_as_published(tmp_path: Path) -> None:
    check_captioned(3589, 2899, tmp_path)
    check_captioned(100, 7, tmp_path)
    with pytest.raises(InputError, match=r"3,589 entries as published, but 2,900 instead of 2,899"):
        check_captioned(3589, 2900, tmp_path)


def test_emu_edit_files_of_two_versions_are_refused(emu_edit: Path) -> None:
    file = next((emu_edit / "data").glob("test-*"))
    (emu_edit / "data" / "test-00000-of-00001-older.parquet").write_bytes(file.read_bytes())
    with pytest.raises(InputError, match=r"3 entries .* occur twice, such as idx 0"):
        open_benchmark(f"emu-edit:{emu_edit}")


def test_magicbrush_edits_its_own_inputs_and_then_its_own_results(magicbrush: Path) -> None:
    benchmark = open_benchmark(f"magicbrush:{magicbrush}")
    samples = {sample.id: sample for sample in benchmark.samples}
    assert list(samples) == ["242679-single-1", "242679-single-2", "242679-multi-2", "139-single-1"]
    assert samples["139-single-1"].rows == ("single-turn", "multi-turn")  # its first turn is its last
    assert samples["242679-single-1"].rows == ("single-turn",)
    last = samples["242679-multi-2"]
    assert (last.rows, last.after) == (("multi-turn",), "242679-single-1")
    assert (last.source_caption, last.caption) == ("a car", "a signboard at night")
    mask = samples["242679-single-1"].mask
    assert mask is not None and mask.open((48, 48)).mean() == 0.5 and mask.open((48, 48))[0, 0]


def test_migebench_finds_its_files_behind_the_authors_paths(migebench: Path) -> None:
    benchmark = open_benchmark(f"migebench:{migebench}")
    addition, replacement = benchmark.samples
    assert (addition.id, replacement.rows) == ("addition-7", ("replacement",))
    assert [image.path.name for image in addition.images] == ["7_entity_black.jpg", "7_source.jpg"]
    assert addition.subject is not None and addition.subject.words == "a signboard"
    assert addition.subject.reference == addition.images[0] and addition.images[1] == addition.source
    (migebench / "add_bench.json").unlink()
    benchmark = open_benchmark(f"migebench:{migebench}")
    assert benchmark.empty_rows() == ["addition"] and benchmark.notes == ("add_bench.json is not there",)


def test_the_synthetic_world_has_its_truth(world: Path) -> None:
    benchmark = open_benchmark(f"synthetic:{world}")
    assert len(benchmark.samples) == 4
    for sample in benchmark.samples:
        assert (sample.source is None) == (sample.rows == ("subject",)) == (sample.mask is None)
        assert sample.caption is None or "<imagehere>" not in sample.caption


@pytest.mark.parametrize(
    ("fixture", "layout", "file", "message"),
    [
        ("dreambench", "dreambench", "dog2", "lacks the photos of dog2"),
        ("dreambench", "dreambench", "prompts_and_classes.txt", "has no prompts_and_classes.txt"),
        ("emu_edit", "emu-edit", "data", "has no test-*.parquet"),
        ("magicbrush", "magicbrush", "global_descriptions.json", "lacks global_descriptions.json"),
        (
            "magicbrush",
            "magicbrush",
            "images/139",
            "lacks 2 of 5 files: images/139/139-output1.png, images/139/139-input",
        ),
        ("migebench", "migebench", "add/add_entity", "lacks 1 of 6 files: add/add_entity/7_entity_black.jpg"),
    ],
)
def test_files_that_a_benchmark_lacks_are_listed(
    fixture: str, layout: str, file: str, message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    folder = request.getfixturevalue(fixture)
    (folder / file).rename(tmp_path / "elsewhere")
    result = _run("generate", "--benchmark", f"{layout}:{folder}", "--out", tmp_path / "out")
    assert result.exit_code == 2 and message in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("spec", ["dreambench", "drawbench:.", "synthetic:nowhere"])
def test_a_benchmark_that_is_none_is_refused(spec: str, tmp_path: Path) -> None:
    result = _run("generate", "--benchmark", spec, "--out", tmp_path / "out")
    assert result.exit_code == 2 and ("layouts are" in result.stderr or "no folder" in result.stderr)


def test_masks_are_of_the_size_of_their_image(tmp_path: Path) -> None:
    _image("white", (48, 40)).save(tmp_path / "mask.png")
    assert MaskFile(tmp_path / "mask.png").open((48, 40)).shape == (40, 48)
    with pytest.raises(InputError, match=r"mask.png is 48x40, its image 64x64"):
        MaskFile(tmp_path / "mask.png").open((64, 64))


# --- metrics ---


def test_pixel_metrics_are_those_of_scikit_image_and_of_hand() -> None:
    a, b = (metrics.as_pixels(_noise(seed), (48, 40)) for seed in (1, 2))
    assert metrics.l2(a, b) == pytest.approx(mean_squared_error(a, b), rel=1e-6)
    black, other = np.zeros((2, 2, 3), np.float32), np.zeros((2, 2, 3), np.float32)
    other[0, 0] = (0.3, 0, 0.6)
    assert metrics.l1(black, other) == pytest.approx(0.9 / 12)
    assert metrics.l2(black, other) == pytest.approx(0.45 / 12)
    edited = np.array([[False, True], [True, True]])
    assert metrics.background_shift(black, other, edited) == pytest.approx(0.3)
    assert metrics.background_shift(black, other, ~edited) == 0
    assert metrics.background_shift(black, other, np.ones((2, 2), bool)) is None
    assert metrics.as_pixels(_image("white", (10, 20)), (48, 40)).shape == (40, 48, 3)


def test_similarities_of_vectors_of_known_angles() -> None:
    x, y = np.eye(2, dtype=np.float32)
    assert metrics.mean_similarity(x, np.stack([x, y])) == 0.5
    diagonal = (x + y) / np.float32(np.sqrt(2))
    assert metrics.directional_similarity((x, y), (x, y)) == pytest.approx(1)
    assert metrics.directional_similarity((x, y), (y, x)) == pytest.approx(-1)
    assert metrics.directional_similarity((-x, x), (x, diagonal)) == pytest.approx(np.cos(np.radians(112.5)), abs=1e-6)
    assert metrics.directional_similarity((x, x), (x, y)) == 0
    assert metrics.directional_similarity((x, y), (x, x)) is None


def test_a_cut_out_stands_on_black() -> None:
    mask = np.zeros((4, 6), bool)
    mask[1:3, 2:4] = True
    cut = np.asarray(metrics.cut_out(_image("white", (6, 4)), mask, (1, 1, 4, 3)))
    assert cut.shape == (2, 3, 3)
    assert (cut[:, 0] == 0).all() and (cut[:, 1:] == 255).all()


# --- encoders: the real classes, small and random ---


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders") / "tiny-clip"
    save_clip(folder)
    return folder


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    folder = tmp_path_factory.mktemp("encoders") / "tiny-dino"
    torch.manual_seed(1)
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ViTModel(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(folder)
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=mean, image_std=std).save_pretrained(folder)
    return folder


def test_clip_is_what_transformers_compares_images_and_texts_by(clip_folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    clip = Clip(clip_folder, "tiny-clip", "cpu")
    images, texts = [_noise(1), _noise(2)], ["a dog in the jungle", "a car"]
    model = CLIPModel.from_pretrained(clip_folder)
    pixels = CLIPImageProcessorPil.from_pretrained(clip_folder)(images, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(clip_folder)(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        output = model(pixel_values=pixels["pixel_values"], **tokens)
        expected = output.logits_per_image / model.logit_scale.exp()
    similarities = clip.embed_images(images) @ clip.embed_texts(texts).T
    np.testing.assert_allclose(similarities, expected.numpy(), atol=1e-5)
    assert np.ptp(similarities) > 1e-3
    assert clip.embed_texts(["a dog " * 50]).shape == (1, 8)  # cut to the positions that there are


def test_dino_is_the_class_token_of_the_resized_image(dino_folder: Path) -> None:
    from transformers import ViTModel

    image = _noise(3)
    resized = np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR), np.float32) / 255
    mean, std = (np.array(x, np.float32) for x in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    pixels = (resized - mean) / std
    with torch.inference_mode():
        tokens = ViTModel.from_pretrained(dino_folder)(
            torch.from_numpy(pixels).permute(2, 0, 1)[None]
        ).last_hidden_state
    expected = tokens[0, 0] / tokens[0, 0].norm()
    dino = Dino(dino_folder, "tiny-dino", "cpu")
    np.testing.assert_allclose(dino.embed_images([image])[0], expected.numpy(), atol=2e-3)
    assert dino.id.sha256 == weights_digest(dino_folder) and len(dino.id.sha256) == 64


def test_a_detector_and_a_segmenter_find_the_best_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    detector, segmenter = tmp_path / "detector", tmp_path / "segmenter"
    save_detector(detector)
    save_segmenter(segmenter)
    finder = GroundedSam((detector, "detector"), (segmenter, "segmenter"), "cpu")
    monkeypatch.setattr(GroundingDino, "BOX_THRESHOLD", 0.0)
    match = finder.find(_noise(4, (96, 80)), "A signboard")
    assert match is not None
    mask, (left, top, right, bottom) = match
    assert mask.shape == (80, 96) and mask.dtype == bool
    assert 0 <= left < right <= 96 and 0 <= top < bottom <= 80
    monkeypatch.setattr(GroundingDino, "BOX_THRESHOLD", 1.0)
    assert finder.find(_noise(4, (96, 80)), "A signboard") is None


def test_what_is_missing_is_said_with_the_command_that_gets_it(
    tmp_path: Path, clip_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    encoders = Encoders(EncoderOptions(lpips=True))
    assert encoders.names(subjects=True).keys() <= {"LPIPS"} and encoders.similarities == {}
    commands = {missing.metrics[0]: missing.command for missing in encoders.missing}
    assert commands["DINO"].startswith("hf download facebook/dino-vits16 --exclude")
    assert commands["metrics of subjects"].count("hf download") == 2
    assert commands.get("LPIPS", "pip install lpips torchvision") == "pip install lpips torchvision"
    # One that was named has to be there.
    folder = tmp_path / "clip"
    named = Encoders(replace(NONE, clip=str(folder), dino="facebook/no-such-model-here", segmenter=str(folder)))
    with pytest.raises(InputError, match=f"hf download openai/clip-vit-base-patch32 --local-dir {folder}.*, or leave"):
        _ = named.clip
    with pytest.raises(InputError, match=r"no DINO: .*hf download facebook/no-such-model-here --exclude"):
        _ = named.dino
    folder.mkdir()
    (folder / "config.json").write_text((clip_folder / "config.json").read_text())
    with pytest.raises(InputError, match=r"no model\.safetensors"):
        _ = named.clip
    with pytest.raises(InputError, match="no metrics of subjects"):
        _ = Encoders(replace(NONE, detector=DETECTOR, segmenter=str(folder))).subjects


def test_what_cannot_judge_is_said_before_images_are_made(world: Path, tmp_path: Path) -> None:
    result = _run("run", "--benchmark", f"synthetic:{world}", "--judge-device", "cuda:99", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "there is no device 'cuda:99' here" in " ".join(result.stderr.split())
    named = _run("run", "--benchmark", f"synthetic:{world}", "--clip", tmp_path / "none", "--out", tmp_path / "out")
    assert named.exit_code == 2 and "none is no model folder" in " ".join(named.stderr.split())
    assert not (tmp_path / "out").exists()


# --- generating and judging ---


def _same_images(folder: Path, benchmark: Benchmark, change: Callable[[Image.Image], Image.Image]) -> None:
    """A results folder, of a model of its name, whose images are the ground truth (or the first photo), changed."""
    ids: dict[str, Any] = {"layout": benchmark.layout, "fingerprint": benchmark.fingerprint()}
    results = start_results(folder, RunId(**ids, model=folder.name, engine="e", device="cpu", precision="fp32"))
    for sample, _, name in benchmark.image_names():
        change((sample.truth or sample.images[0]).open()).save(results.image(name))


def test_the_world_goes_from_images_to_the_report_and_is_resumed(world: Path, tmp_path: Path) -> None:
    spec, out = f"synthetic:{world}", tmp_path / "out"
    out.mkdir()
    quick = ("--benchmark", spec, "--steps", "2", "--device", "cpu")
    first = _run("generate", *quick, "--limit", "2", "--out", out / "results")
    assert first.exit_code == 0 and "2 images made, 0 were there" in first.stderr, first.output
    dates = {path: path.stat().st_mtime_ns for path in (out / "results/images").iterdir()}
    result = _run("run", *quick, "--out", out)
    assert result.exit_code == 0, result.output
    assert "2 images made, 2 were there" in result.stderr
    assert all(path.stat().st_mtime_ns == date for path, date in dates.items())
    assert result.stdout.split() == [str(out / "results"), str(out / "report")]
    report = json.loads((out / "report/report.json").read_text())
    assert report["images"] == {"expected": 4, "judged": 4, "unreadable": {}}
    assert list(report["encoders"]) == ["EfficientNet-Lite0"] and report["missing"] == []
    assert report["command"].startswith("mige-rt eval run --benchmark synthetic:")
    rows = {row["name"]: row["metrics"] for row in report["rows"]}
    assert {"L1", "L2", "EfficientNet-Lite0"} <= rows["edit"].keys() and "background shift" in rows["edit"]
    assert rows["edit: input-output"]["background shift"]["value"] == 0
    text = (out / "report/report.md").read_text()
    assert (
        "EfficientNet-Lite0 ↑" in text
        and "DINO ↑" not in text
        and report["encoders"]["EfficientNet-Lite0"]["sha256"] in text
    )
    page = (out / "report/report.html").read_text()
    assert page.count("data:image/webp") >= 12 and "worst: " in page
    _check_resumed_scores(out, spec)
    other = _run("generate", *quick, "--image-guidance-scale", "1.25", "--out", out / "results")
    assert other.exit_code == 2 and "its params.subject.image_guidance_scale is " in other.stderr
    assert ", and not 1.25; give another folder" in other.stderr


def test_a_setting_that_makes_no_image_does_not_claim_the_folder(
    world: Path, pipe: MigePipeline, tmp_path: Path
) -> None:
    out, benchmark = tmp_path / "results", open_benchmark(f"synthetic:{world}")
    result = _run("generate", "--benchmark", f"synthetic:{world}", "--steps", "1", "--device", "cpu", "--out", out)
    assert result.exit_code == 2 and "the number of steps is 1" in result.stderr and not out.exists()
    assert open_run(out, pipe, benchmark, QUICK).id == open_results(out).id


def test_devices_of_a_kind_share_a_results_folder(
    world: Path, pipe: MigePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    benchmark = open_benchmark(f"synthetic:{world}")
    for device in ("cuda:0", "cuda:1"):
        monkeypatch.setattr(pipe.engine, "device", device)
        results = open_run(tmp_path / "results", pipe, benchmark, SamplingParams())
        assert results.id.device == "cuda"
    file = tmp_path / "results" / "results.json"
    file.write_text(file.read_text().replace('"cuda"', '"cuda:0"'))  # as an earlier version wrote it
    assert open_run(tmp_path / "results", pipe, benchmark, SamplingParams()).id.device == "cuda"


def _check_resumed_scores(out: Path, spec: str) -> None:
    """A judge that was killed in the middle of a line goes on behind the line before."""
    scores, whole = out / "report/scores.jsonl", (out / "report/report.json").read_text()
    lines = scores.read_text().splitlines(keepends=True)
    changed = json.loads(lines[1]) | {"notes": ["not measured again"]}
    scores.write_text("".join([lines[0], json.dumps(changed) + "\n", *lines[2:3], lines[3][:30]]))
    result = _run("judge", out / "results", "--benchmark", spec, "--out", out / "report")
    assert result.exit_code == 0, result.output
    again = json.loads((out / "report/report.json").read_text())
    assert again["rows"] == json.loads(whole)["rows"]
    assert list(again["notes"].values()) == [["not measured again"]]
    assert len(scores.read_text().splitlines()) == len(lines)


def test_a_later_turn_edits_the_image_that_was_made(magicbrush: Path, pipe: MigePipeline, tmp_path: Path) -> None:
    benchmark = open_benchmark(f"magicbrush:{magicbrush}")
    results = open_run(tmp_path / "results", pipe, benchmark, QUICK)
    done = generate(pipe, benchmark, results, GenerateOptions(params=QUICK, part=(2, 2)))
    assert done.images == 1 and results.image("139-single-1-0.png").is_file()  # the second session
    done = generate(pipe, benchmark, results, GenerateOptions(params=QUICK))
    assert (done.images, done.there, done.failures) == (3, 1, {})
    with Image.open(results.image("242679-single-1-0.png")) as first:
        (expected,) = pipe("turn 2 please", source=first, seed=0, num_inference_steps=2).images
    with Image.open(results.image("242679-multi-2-0.png")) as second:
        difference = np.abs(np.asarray(second, np.int16) - np.asarray(expected, np.int16))
    assert difference.max() <= 1


def test_a_source_that_cannot_be_read_stops_no_other(magicbrush: Path, pipe: MigePipeline, tmp_path: Path) -> None:
    (magicbrush / "images/242679/242679-input.png").write_bytes(b"no image")
    benchmark = open_benchmark(f"magicbrush:{magicbrush}")
    results = open_run(tmp_path / "results", pipe, benchmark, QUICK)
    done = generate(pipe, benchmark, results, GenerateOptions(params=QUICK))
    assert done.images == 2 and sorted(done.failures) == ["242679-multi-2-0.png", "242679-single-1-0.png"]
    assert "not an image that can be read" in done.failures["242679-single-1-0.png"]
    judged = judge(benchmark, results, tmp_path / "report", NONE).judged
    assert sorted(judged.scores) == ["139-single-1-0.png", "242679-single-2-0.png"] and judged.expected == 4


def test_the_truth_itself_is_perfect_by_every_metric(
    magicbrush: Path, clip_folder: Path, dino_folder: Path, tmp_path: Path
) -> None:
    (magicbrush / "images/139/139-mask1.png").unlink()
    _image("white", (20, 20)).save(magicbrush / "images/242679/242679-mask2.png")
    benchmark = open_benchmark(f"magicbrush:{magicbrush}")
    _same_images(tmp_path / "results", benchmark, lambda image: image.resize((24, 24)))
    options = replace(NONE, clip=str(clip_folder), dino=str(dino_folder))
    judgement = judge(benchmark, open_results(tmp_path / "results"), tmp_path, options)
    rows = {row.name: row for row in judgement.judged.rows}
    assert list(rows) == [
        "single-turn",
        "single-turn: input-output",
        "multi-turn",
        "multi-turn: input-output",
    ]
    single = rows["single-turn"].metrics
    assert single["DINO"].value == pytest.approx(1) and single["CLIP-I"].value == pytest.approx(1)
    assert single["L1"].value == single["L2"].value == 0
    assert rows["single-turn: input-output"].metrics["L1"].value == pytest.approx(60 / 255 / 3)
    assert {"CLIP-T", "CLIP-dir"} <= single.keys()
    assert rows["single-turn"].counts["background shift"] == 1 and rows["single-turn"].counts["L1"] == 3
    notes = {name: " ".join(score.notes) for name, score in judgement.judged.scores.items() if score.notes}
    assert "no background shift: the mask" in notes["242679-single-2-0.png"]
    assert "is 20x20, its image 48x48" in notes["242679-single-2-0.png"]
    assert "there is no image file at" in notes["139-single-1-0.png"]
    text = write_report(judgement, tmp_path, "the command")
    assert "MIGE, as in the paper: turns not stated" in text and "0.889" in text and "is 20x20" in text
    report = to_json(judgement)
    assert report["encoders"]["CLIP"] == {"name": str(clip_folder), "sha256": weights_digest(clip_folder)}


def test_a_mask_that_comes_later_is_measured_with(magicbrush: Path, tmp_path: Path) -> None:
    mask = magicbrush / "images/139/139-mask1.png"
    content = mask.read_bytes()
    mask.unlink()
    benchmark = open_benchmark(f"magicbrush:{magicbrush}")
    _same_images(tmp_path / "results", benchmark, lambda image: image)
    results = open_results(tmp_path / "results")

    def counts() -> tuple[int, int]:
        row = judge(benchmark, results, tmp_path / "report", NONE).judged.rows[0]
        return row.counts["background shift"], len((tmp_path / "report/scores.jsonl").read_text().splitlines())

    before, lines = counts()
    mask.write_bytes(content)
    assert counts() == (before + 1, lines + 1)  # that image alone is measured again
    assert counts() == (before + 1, lines)
    scores = tmp_path / "report/scores.jsonl"
    earlier = re.sub(r', "masks": [^}]*', "", scores.read_text())  # as an earlier version wrote it
    assert '"masks"' not in earlier
    scores.write_text(earlier)
    assert counts() == (before + 1, lines)


def test_a_file_that_holds_no_scores_is_refused(magicbrush: Path, tmp_path: Path) -> None:
    benchmark = open_benchmark(f"magicbrush:{magicbrush}")
    _same_images(tmp_path / "results", benchmark, lambda image: image)
    (tmp_path / "scores.jsonl").write_bytes(b"\xff\xfe no text")
    with pytest.raises(InputError, match=r"scores.jsonl holds no scores \(.*\); remove it, or give another --out"):
        judge(benchmark, open_results(tmp_path / "results"), tmp_path, NONE)
    assert (tmp_path / "scores.jsonl").read_bytes() == b"\xff\xfe no text"


def test_subjects_are_cut_out_and_the_whole_image_counts_where_there_is_none(
    migebench: Path, dino_folder: Path, tmp_path: Path
) -> None:
    class Finder:
        """Finds the left half of what is not white."""

        ids = ()

        def find(self, image: Image.Image, words: str) -> tuple[np.ndarray, tuple[int, int, int, int]] | None:
            assert words == "a signboard"
            mask = np.zeros((image.height, image.width), bool)
            mask[:, :24] = True
            return None if image.getpixel((0, 0)) == (255, 255, 255) else (mask, (0, 0, 24, 48))

    from benchmarks.evaluation.scores import Scorer

    encoders = Encoders(replace(NONE, dino=str(dino_folder)))
    encoders.__dict__["subjects"] = Finder()
    (sample, _) = open_benchmark(f"migebench:{migebench}").samples
    assert sample.subject is not None
    _noise(7, (24, 48)).save(sample.subject.reference.path.with_suffix(".png"))
    reference = replace(sample.subject.reference, path=sample.subject.reference.path.with_suffix(".png"))
    sample = replace(sample, subject=replace(sample.subject, reference=reference))
    image = _image("gray")
    image.paste(_noise(7, (24, 48)), (0, 0))
    image.save(tmp_path / "a.png")
    score = Scorer(encoders).score("a.png", tmp_path / "a.png", sample)
    assert score.subject == "found" and score.metrics["subject DINO"] == pytest.approx(1, abs=1e-5)
    assert score.baseline["subject DINO"] < 0.999
    _image("white").save(tmp_path / "b.png")
    score = Scorer(encoders).score("b.png", tmp_path / "b.png", sample)
    assert score.subject == "not found"
    vectors = Dino(dino_folder, "", "cpu").embed_images([_image("white"), _noise(7, (24, 48))])
    assert score.metrics["subject DINO"] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-5)


def test_one_image_a_prompt_and_all_four_are_both_reported(dreambench: Path, dino_folder: Path, tmp_path: Path) -> None:
    benchmark = open_benchmark(f"dreambench:{dreambench}")
    _same_images(tmp_path / "results", benchmark, lambda image: image)
    for seed in (1, 2, 3):
        _noise(5).save(tmp_path / f"results/images/dog2-00-{seed}.png")
    options = replace(NONE, dino=str(dino_folder))
    rows = judge(benchmark, open_results(tmp_path / "results"), tmp_path, options).judged.rows
    one, four = rows
    assert (one.name, four.name) == ("all prompts, seed 0", "all prompts, seeds 0 to 3")
    assert (one.counts["DINO"], four.counts["DINO"]) == (3, 12)
    assert one.metrics["DINO"].value == pytest.approx(1, abs=1e-4) and four.metrics["DINO"].value < 0.999
    low, high = four.metrics["DINO"].low, four.metrics["DINO"].high
    assert low is not None and high is not None and low < four.metrics["DINO"].value < high


def test_the_gallery_keeps_the_sign_of_a_value(dreambench: Path, dino_folder: Path, tmp_path: Path) -> None:
    benchmark = open_benchmark(f"dreambench:{dreambench}")
    _same_images(tmp_path / "results", benchmark, lambda image: image)
    judgement = judge(benchmark, open_results(tmp_path / "results"), tmp_path, replace(NONE, dino=str(dino_folder)))
    for score, value in zip(judgement.judged.scores.values(), (-0.25, 0.5, *[0.1] * 10), strict=True):
        score.metrics.update({"CLIP-T": value, "L1": abs(value)})
    write_report(judgement, tmp_path, "the command")
    page = (tmp_path / "report.html").read_text()
    for title in ("worst: -0.250", "best: 0.500", "worst: 0.500", "best: 0.100"):
        assert title in page


def test_parity_is_the_difference_image_by_image(emu_edit: Path, tmp_path: Path) -> None:
    benchmark = open_benchmark(f"emu-edit:{emu_edit}")
    _same_images(tmp_path / "a", benchmark, lambda image: Image.eval(image, lambda level: level + 51))
    _same_images(tmp_path / "b", benchmark, lambda image: image)
    a, b = (open_results(tmp_path / name) for name in ("a", "b"))
    judgement = judge(benchmark, a, tmp_path / "report", NONE, against=b)
    assert [row.name for row in judgement.parity] == ["all tasks", "add", "global"]
    difference = judgement.parity[0].metrics["L1"]
    assert difference.value == pytest.approx(0.2) and difference.low is not None and difference.low > 0
    text = write_report(judgement, tmp_path, "the command")
    assert "- all tasks: different in L1, L2" in text and "input-output:" not in text
    # One group says nothing of others.
    assert [row.name for row in judgement.parity if row.metrics["L1"].low is None] == ["add"]
    assert "- add: no difference shown" in text and re.search(r"\| add +\| +1 \|.*\| +0\.200 +\|", text)
    same = judge(benchmark, b, tmp_path / "same", NONE, against=b)
    assert "- all tasks: no difference shown" in write_report(same, tmp_path, "the command")
    with pytest.raises(InputError, match="holds scores of another results"):
        judge(benchmark, b, tmp_path / "report", NONE)


def test_results_of_another_benchmark_are_refused(emu_edit: Path, dreambench: Path, tmp_path: Path) -> None:
    _same_images(tmp_path / "a", open_benchmark(f"emu-edit:{emu_edit}"), lambda image: image)
    result = _run("judge", tmp_path / "a", "--benchmark", f"dreambench:{dreambench}", "--out", tmp_path / "report")
    assert result.exit_code == 2 and "holds images of emu-edit" in result.stderr
    assert not (tmp_path / "report").exists()


def test_prompts_from_files_are_text_in_the_page(dreambench: Path, dino_folder: Path, tmp_path: Path) -> None:
    file = dreambench / "prompts_and_classes.txt"
    file.write_text(file.read_text().replace("in the jungle", "in <script>alert(1)</script>"))
    benchmark = open_benchmark(f"dreambench:{dreambench}")
    _same_images(tmp_path / "results", benchmark, lambda image: image)
    options = replace(NONE, dino=str(dino_folder))
    write_report(judge(benchmark, open_results(tmp_path / "results"), tmp_path, options), tmp_path, "<b>command</b>")
    page = (tmp_path / "report.html").read_text()
    assert "&lt;script&gt;alert(1)" in page and "<script>" not in page and "<b>command" not in page


def test_the_papers_rows_name_metrics_that_we_have() -> None:
    for _, rows in PAPER.values():
        for values in rows.values():
            assert values.keys() <= set(metrics.METRICS)
