"""`mige-rt prepare`: features are the encoders', a stopped run ends on the same bytes, corrupt images are counted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.cli import main
from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.preprocessing import vae_pixels, vit_pixels
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import load_model
from trainer.data.batches import collate
from trainer.data.manifest import open_manifest
from trainer.data.prepared import PreparedSample, open_prepared
from trainer.stages.trained_part import TrainedPart

TINY = PRESETS["tiny"]
SAMPLES = 60
SIZES = ("96x64", "64x80", "400x100", "420x100")  # of the targets; the last one is filtered


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest of the three tasks."""
    folder = tmp_path_factory.mktemp("manifest")
    random = np.random.default_rng(0)

    def image(name: str, size: str) -> str:
        width, height = map(int, size.split("x"))
        Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)).save(folder / name)
        return name

    lines = []
    for i in range(SAMPLES):
        reference, source = image(f"{i}-reference.png", "50x50"), image(f"{i}-source.png", "70x64")
        target = image(f"{i}-target.png", SIZES[i % len(SIZES)] if i < 8 else SIZES[0])
        lines.append(
            {"id": f"n.{i}", "target": target}
            | [
                {"prompt": "a <imagehere> in the rain", "images": [reference]},
                {"prompt": "make it blue", "source": source},
                {"prompt": "put <imagehere> into <imagehere>", "images": [reference, source], "source": source},
            ][i % 3]
        )
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def _arguments(manifest: Path, out: Path, *options: str) -> list[str]:
    arguments = ["prepare", "--manifest", str(manifest), "--out", str(out), "--shard-samples", "4"]
    return [*arguments, *options]


def _prepare(manifest: Path, out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, _arguments(manifest, out, *options))


@pytest.fixture(scope="module")
def whole(manifest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an unbroken run of one process makes."""
    out = tmp_path_factory.mktemp("prepared") / "whole"
    result = _prepare(manifest, out)
    assert result.exit_code == 0, result.output
    assert f"{SAMPLES - 2} samples; left out: 2 (width more than 4 times the height)" in result.stderr
    return out


def _bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _samples(folder: Path) -> dict[str, PreparedSample]:
    prepared = open_prepared(folder)
    shards = [prepared.read_shard(number) for number in range(len(prepared.index.shards))]
    return {sample.id: sample for shard in shards for sample in shard}


def test_features_are_what_the_encoders_give(manifest: Path, whole: Path) -> None:
    model, samples = load_model(DEFAULT_MODEL), _samples(whole)
    lines = {line.id: line for line in open_manifest(manifest)}
    assert samples.keys() == lines.keys() - {"n.3", "n.7"}
    for name in ("n.0", "n.1", "n.2", "n.59"):
        line, sample = lines[name], samples[name]
        assert (sample.task, sample.prompt) == (line.task, line.prompt)
        assert len(sample.latents) == len(line.paths()) and len(sample.vit) == len(set(line.images))
        assert (sample.source is None) == (line.source is None)
        for path, row in zip((line.target, *line.images), (sample.target, *sample.images), strict=True):
            image = Image.open(path).convert("RGB")
            with torch.no_grad():
                mean, logvar = model.vae_encoder(torch.from_numpy(vae_pixels(image, 64, 64, "crop"))[None])
            expected = torch.cat([mean, (logvar / 2).exp()], dim=1)[0]
            torch.testing.assert_close(torch.from_numpy(sample.latents[row]).float(), expected, rtol=2e-3, atol=2e-3)
        for path, row in zip(line.images, sample.images_vit, strict=True):
            with torch.no_grad():
                features = model.image_encoder.vit(torch.from_numpy(vit_pixels(Image.open(path), 64))[None])[0]
            torch.testing.assert_close(torch.from_numpy(sample.vit[row]).float(), features, rtol=2e-3, atol=2e-3)


def test_latents_are_drawn_from_the_posterior_at_each_load(whole: Path) -> None:
    sample = _samples(whole)["n.2"]
    draws = np.stack([sample.draw(sample.target, np.random.default_rng(seed)) for seed in range(400)])
    mean, deviation = np.split(sample.latents[sample.target].astype(np.float32), 2)
    assert np.abs(draws.mean(axis=0) - mean).max() < 6 * deviation.max() / 20
    np.testing.assert_allclose(draws.std(axis=0).mean(), deviation.mean(), rtol=0.02)
    np.testing.assert_array_equal(draws[7], sample.draw(sample.target, np.random.default_rng(7)))


def test_a_batch_of_prepared_samples_is_what_the_model_takes(whole: Path) -> None:
    samples = _samples(whole)
    chosen = [samples[name] for name in ("n.0", "n.1", "n.2")]
    tokenize = load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE)
    batch = collate(chosen, TINY, tokenize, np.random.default_rng(0))
    assert batch.ids == ("n.0", "n.1", "n.2") and batch.tasks == ("subject", "edit", "compose")
    assert len(batch.vit) == len(batch.ref_latents) == 1 + 1 + 2
    assert batch.source[0].abs().max() == 0 and batch.source[1].abs().max() > 0
    queries = TINY.qformer.queries
    slots = [row[row >= 0].tolist() for row in batch.slot_index]
    assert slots == [[*range(queries)], [*range(queries, 2 * queries)], [*range(2 * queries, 4 * queries)]]
    source = torch.from_numpy(chosen[2].latents[chosen[2].source, : TINY.vae.channels]).float()
    distances = [(latents / TINY.vae.scale - source).abs().mean() for latents in (batch.source[2], batch.target[2])]
    assert distances[0] < distances[1]
    module = TrainedPart(load_model(DEFAULT_MODEL))
    with torch.no_grad():
        output = module(batch, batch.target, batch.source, torch.full((3,), 500), torch.ones(3, dtype=torch.bool))
    assert output.shape == batch.target.shape and bool(output.isfinite().all())


def test_a_killed_run_goes_on_and_ends_on_the_same_bytes(manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mige_rt.cli", *_arguments(manifest, out, "--processes", "2")]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not list(out.glob("shard-*.json")):
        assert process.poll() is None, "it ended by itself"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "index.json").exists()
    with pytest.raises(InputError, match="is no prepared set"):
        open_prepared(out)
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("shard-*.json")}
    (out / ".mige-rt-0123456789ab.part").write_bytes(b"what a killed process leaves")
    result = _prepare(manifest, out)
    assert result.exit_code == 0, result.output
    assert _bytes(out) == _bytes(whole)
    for name, modified in kept.items():  # what was done is not done again
        assert (out / name).stat().st_mtime_ns == modified


def test_parts_made_by_several_machines_are_the_whole(manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = _prepare(manifest, out, "--part", "2/2")
    assert first.exit_code == 0 and "8 of 15 shards are left to the other parts" in first.stderr
    assert not (out / "index.json").exists()
    assert _prepare(manifest, out, "--part", "1/2").exit_code == 0
    assert _bytes(out) == _bytes(whole)


def test_a_ray_cluster_makes_the_same_bytes(manifest: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "leave it out with --ray" in _prepare(manifest, out, "--ray", "local", "--part", "1/2").stderr
    command = [sys.executable, "-m", "mige_rt.cli", *_arguments(manifest, out, "--ray", "local", "--processes", "2")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert _bytes(out) == _bytes(whole)


@pytest.mark.parametrize(
    ("options", "named"),
    [(["--seed", "1"], "seed"), (["--no-filter", "--batch", "2"], "batch, filtered")],
)
def test_a_folder_begun_otherwise_is_not_gone_on_with(
    options: list[str], named: str, manifest: Path, whole: Path
) -> None:
    before = _bytes(whole)
    result = _prepare(manifest, whole, *options)
    assert result.exit_code == 2 and f"was begun with another {named}" in " ".join(result.stderr.split())
    assert _bytes(whole) == before


def test_a_damaged_plan_is_refused(manifest: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for content in ("{", "[1]"):
        (tmp_path / "out" / "plan.json").write_text(content)
        result = _prepare(manifest, tmp_path / "out")
        assert result.exit_code == 2 and "plan.json cannot be read" in " ".join(result.stderr.split())


def test_a_folder_begun_with_images_elsewhere_is_not_gone_on_with(manifest: Path, whole: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(manifest.parent)
    result = _prepare(manifest, whole, "--images-root", str(elsewhere))
    assert result.exit_code == 2 and "was begun with another images_root" in " ".join(result.stderr.split())
    out = tmp_path / "out"
    out.mkdir()
    plan = json.loads((whole / "plan.json").read_text())
    del plan["images_root"]  # as an earlier version wrote it
    (out / "plan.json").write_text(json.dumps(plan))
    assert _prepare(manifest, out, "--images-root", str(elsewhere), "--part", "15/15").exit_code == 0


def _damaged(manifest: Path, folder: Path, number: int) -> Path:
    """A copy of the manifest in which the sources of some edits are cut short."""
    shutil.copytree(manifest.parent, folder)
    for i in range(number):
        path = folder / f"{10 + 3 * i}-source.png"
        path.write_bytes(path.read_bytes()[:1000])
    return folder / manifest.name


def test_a_corrupt_image_is_told_left_out_and_counted(manifest: Path, tmp_path: Path) -> None:
    damaged = _damaged(manifest, tmp_path / "damaged", 1)  # of 140 images
    result = _prepare(damaged, tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "warning: n.10 is left out: " in result.stderr and "10-source.png" in result.stderr
    assert f"{SAMPLES - 3} samples; left out: 1 (an image that cannot be read), 2 (width" in result.stderr
    (line,) = (tmp_path / "out/corrupt.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "n.10"
    assert "n.10" not in _samples(tmp_path / "out")


def test_more_than_one_in_a_hundred_corrupt_images_stop_the_run(manifest: Path, tmp_path: Path) -> None:
    damaged = _damaged(manifest, tmp_path / "damaged", 2)
    result = _prepare(damaged, tmp_path / "out")
    assert result.exit_code == 2 and "2 images cannot be read, more than 1%" in " ".join(result.stderr.split())
    assert not (tmp_path / "out/index.json").exists()


def test_bad_input_is_refused_before_anything_is_written(manifest: Path, tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.mkdir()
    (there / "notes.txt").write_text("mine")
    for out, options, message in (
        (there, [], "holds something else"),
        (tmp_path / "no" / "out", [], "cannot be written"),
        (tmp_path / "out", ["--part", "3/2"], "is no part"),
        (tmp_path / "out", ["--model", str(there)], str(there)),
        (tmp_path / "out", ["--device", "cuda:9"], "there is no device 'cuda:9' here"),
        (tmp_path / "out", ["--images-root", str(there)], "line 1: images[0] is '0-reference.png', but"),
    ):
        result = _prepare(manifest, out, *options)
        assert result.exit_code == 2 and message in " ".join(result.stderr.split()), result.output
    assert {path.name for path in tmp_path.rglob("*")} == {"there", "notes.txt"}


def test_a_damaged_set_is_named(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    prepared = open_prepared(copy)
    shard = copy / "shard-000003.tar"
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(InputError, match=r"shard-000003\.tar"):
        prepared.read_shard(3)
    shard.unlink()
    with pytest.raises(InputError, match=r"lacks shard-000003\.tar"):
        open_prepared(copy)
