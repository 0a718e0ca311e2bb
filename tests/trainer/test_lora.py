"""LoRA, from training on a few images to the engine pytorch and an exported bundle."""

import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import save_file

import export.exporter
from export.context import ExportJob
from export.exporter import ExportLimits, ExportOptions, export_bundle
from export.processes import WorkerHooks, to_json
from export.worker import work
from mige_rt.bundle import DEFAULT_MODEL, open_model, read_manifest
from mige_rt.cli import main
from mige_rt.config import PRESETS
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.known_files import sha256
from mige_rt.lora import LORA_FILE, Lora
from mige_rt.pipeline import MigePipeline
from trainer.checkpoints.lora_file import METADATA_KEY, open_lora, save_lora
from trainer.checkpoints.merged import MergedCheckpoint
from trainer.checkpoints.model_folder import SafetensorsCheckpoint, load_model
from trainer.checkpoints.open_checkpoint import CheckpointLocation
from trainer.data.instance_images import instance_samples
from trainer.lora import LoraOptions, adapted_layers, add_lora, lora_parameters, save_adapted
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample
from trainer.train_lora import FineTuningOptions, train_lora

TINY = CheckpointLocation(DEFAULT_MODEL)
PROMPT = "make the background blue"
STEPS = 4  # of the scheduler


@pytest.fixture(scope="module")
def images(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images of a thing that the model has not seen; the second has a prompt of its own."""
    folder = tmp_path_factory.mktemp("images")
    thing = next(concept for concept in concepts if concept.held_out)
    for number in range(3):
        sample = make_sample(0, number, [thing, thing], 64, {"generate_one": 1})
        Image.fromarray(sample.target).save(folder / f"{number}.png")
    (folder / "1.txt").write_text("a <imagehere> beside a <imagehere>\n")
    return folder


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that the command has trained for a few steps, at a rate that is far too high."""
    out = tmp_path_factory.mktemp("trained") / "lora"
    arguments = ["train-lora", "--instance-images", str(images), "--instance-prompt", "a <imagehere>"]
    arguments += ["--out", str(out), "--max-train-steps", "3", "--train-batch-size", "2", "--learning-rate", "0.01"]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--rank", "4", "--lora-alpha", "8"])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"{out / LORA_FILE}\n"
    assert "6 samples, 30 layers" in result.stderr
    return out


@pytest.fixture(scope="module")
def torch_pipe() -> MigePipeline:
    """The default model on the engine pytorch; tests leave it without LoRAs."""
    return MigePipeline.from_pretrained(engine="pytorch", device="cpu")


def made(pipe: MigePipeline, scene: Image.Image) -> np.ndarray:
    return np.asarray(pipe(PROMPT, source=scene, seed=0, num_inference_steps=STEPS).images[0], np.int16)


def rewritten(
    lora: Path, out: Path, tensors: Mapping[str, torch.Tensor] | None = None, metadata: str | None = None
) -> Lora:
    """A copy of a LoRA's file with other tensors or another description."""
    with safe_open(lora / LORA_FILE, framework="pt") as file:
        content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        described = file.metadata()[METADATA_KEY] if metadata is None else metadata
    save_file(content | dict(tensors or {}), out, metadata={METADATA_KEY: described} if described else None)
    return Lora(out)


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(InputError) as error:
        call()
    return str(error.value)


def test_a_folder_of_images_becomes_samples(images: Path, tmp_path: Path) -> None:
    samples = instance_samples(images, "a <imagehere> in the rain")
    names = [(Path(s.target).name, *(Path(image).name for image in s.images)) for s in samples]
    # Each image from each other one, in the order of their names; two placeholders take two of them.
    assert names == [
        ("0.png", "1.png"),
        ("0.png", "2.png"),
        ("1.png", "2.png", "0.png"),
        ("1.png", "0.png", "2.png"),
        ("2.png", "0.png"),
        ("2.png", "1.png"),
    ]
    assert [s.prompt for s in samples[1:3]] == ["a <imagehere> in the rain", "a <imagehere> beside a <imagehere>"]
    assert {(s.task, s.source) for s in samples} == {("subject", None)}
    Image.new("RGB", (8, 8)).save(tmp_path / "alone.png")
    (alone,) = instance_samples(tmp_path, "a <imagehere>")
    assert alone.images == (alone.target,)
    (in_words,) = instance_samples(tmp_path, "a zork")
    assert in_words.images == ()


def test_a_folder_that_cannot_be_used_is_said(images: Path, tmp_path: Path) -> None:
    assert "holds no image" in refusal(lambda: instance_samples(tmp_path, "a thing"))
    assert "there is no folder" in refusal(lambda: instance_samples(tmp_path / "none", "a thing"))
    assert "0.png has no prompt: give --instance-prompt, or write" in refusal(lambda: instance_samples(images, None))
    assert "the prompt is empty" in refusal(lambda: instance_samples(images, " "))


def test_the_file_says_what_it_is_of(trained: Path) -> None:
    lora = open_lora(Lora(trained))
    assert lora.description.model == read_manifest(DEFAULT_MODEL).model
    assert (lora.description.rank, lora.description.alpha) == (4, 8)
    assert lora.description.targets == ("attn", "cross_attn", "kv_linears")
    assert lora.description.prompt is None  # one of the images has its own
    a, b = lora.factors["denoiser.blocks.0.attn.qkv"]
    assert (a.shape, b.shape, a.dtype) == ((4, 192), (576, 4), torch.float32)
    assert all(b.abs().max() > 0 for _, b in lora.factors.values())  # it starts at zero
    assert {layer.partition(".")[0] for layer in lora.factors} == {"denoiser", "conditioner"}


def test_training_lowers_the_error_and_repeats_itself(images: Path, tmp_path: Path) -> None:
    samples = instance_samples(images, "a <imagehere>")
    options = FineTuningOptions(max_train_steps=10, train_batch_size=4, learning_rate=3e-3, device="cpu")
    tuned = train_lora(TINY, samples, tmp_path / "tuned", options=options)
    # The same batches, timesteps and noise, and next to no learning.
    idle = train_lora(TINY, samples, tmp_path / "idle", options=replace(options, learning_rate=1e-12))
    assert tuned.losses[0] == idle.losses[0]
    assert np.mean(tuned.losses[5:]) < np.mean(idle.losses[5:])
    short = replace(options, max_train_steps=1, train_batch_size=1)
    files = [train_lora(TINY, samples, tmp_path / name, options=short).path for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_everything_that_is_trained_can_be_adapted(images: Path, tmp_path: Path) -> None:
    """Also with bfloat16 weights; the LoRA's stay float32."""
    lora = LoraOptions(2, targets=("denoiser", "conditioner", "image_encoder", "text_encoder"))
    options = FineTuningOptions(max_train_steps=2, train_batch_size=1, mixed_precision="bf16", device="cpu")
    tuned = train_lora(TINY, instance_samples(images, "a <imagehere>"), tmp_path / "lora", lora, options)
    opened = open_lora(Lora(tuned.path))
    for layer in ("image_encoder.fusion.mlp", "text_encoder.t5.encoder.block.0.layer.1.DenseReluDense.wo"):
        assert opened.factors[layer][1].dtype == torch.float32 and opened.factors[layer][1].abs().max() > 0
    MergedCheckpoint(SafetensorsCheckpoint(open_model(DEFAULT_MODEL)), [Lora(tuned.path)])  # norms of bfloat16 weights
    names = adapted_layers(load_model(DEFAULT_MODEL), ["image_encoder"])
    assert not any("vision" in name or "clip_attn" in name for name in names)


def test_merged_weights_compute_what_pefts_layers_do(tmp_path: Path) -> None:
    model = load_model(DEFAULT_MODEL)
    description = add_lora(model, model.config, LoraOptions(4, 6), "a thing")
    generator = torch.Generator().manual_seed(0)
    for parameter in lora_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    save_adapted(tmp_path / LORA_FILE, model, description)
    states, mask = torch.randn(2, 7, 192, generator=generator), torch.ones(2, 7, dtype=torch.bool)
    latents, timestep = torch.randn(2, 2, 8, 16, 16, generator=generator), torch.tensor([500.0, 10.0])
    base = SafetensorsCheckpoint(open_model(DEFAULT_MODEL))

    def predict(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            cross_kv = model.get_submodule("conditioner")(states, mask[:, 0])
            return model.get_submodule("denoiser")(*latents, timestep, cross_kv, mask)

    expected, plain = predict(model), predict(base.load(dtype=torch.float32))
    merged = MergedCheckpoint(base, [Lora(tmp_path)]).load(dtype=torch.float32)
    torch.testing.assert_close(predict(merged), expected, rtol=1e-4, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1
    halves = MergedCheckpoint(base, [Lora(tmp_path, 0.25), Lora(tmp_path, 0.75)]).load(dtype=torch.float32)
    torch.testing.assert_close(predict(halves), expected, rtol=1e-4, atol=1e-4)


def test_a_loaded_lora_changes_the_image_until_it_is_unloaded(
    torch_pipe: MigePipeline, trained: Path, scene: Image.Image
) -> None:
    before = made(torch_pipe, scene)
    torch_pipe.load_lora_weights(trained, scale=0)
    assert np.array_equal(made(torch_pipe, scene), before)
    torch_pipe.load_lora_weights(trained / LORA_FILE)
    changed = made(torch_pipe, scene)
    assert np.abs(changed - before).max() > 10  # rounding changes 1
    assert "there is no LoRA at" in refusal(lambda: torch_pipe.load_lora_weights("nowhere"))
    assert np.array_equal(made(torch_pipe, scene), changed)
    torch_pipe.unload_lora_weights()
    assert np.array_equal(made(torch_pipe, scene), before)


def test_low_memory_loads_merged_weights_again(trained: Path, scene: Image.Image, torch_pipe: MigePipeline) -> None:
    torch_pipe.load_lora_weights(trained)
    expected = made(torch_pipe, scene)
    torch_pipe.unload_lora_weights()
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu", low_memory=True)
    pipe.load_lora_weights(trained)
    assert np.array_equal(made(pipe, scene), expected)
    assert np.array_equal(made(pipe, scene), expected)


def test_a_lora_is_merged_into_weights_of_float8(trained: Path, scene: Image.Image) -> None:
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu", precision="fp8")
    before = made(pipe, scene)
    pipe.load_lora_weights(trained)
    changed = made(pipe, scene)
    assert np.abs(changed - before).max() > 10
    pipe.unload_lora_weights()
    assert np.array_equal(made(pipe, scene), before)


def test_a_lora_that_cannot_be_merged_leaves_the_model_as_it_was(
    trained: Path, scene: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = MigePipeline.from_pretrained(engine="pytorch", device="cpu")
    before = made(pipe, scene)

    def fail(*_: Any, **__: Any) -> None:
        raise InputError("the file ends early")

    with monkeypatch.context() as patch:
        patch.setattr(MergedCheckpoint, "load", fail)
        assert "ends early" in refusal(lambda: pipe.load_lora_weights(trained))
    assert np.array_equal(made(pipe, scene), before)


def test_run_takes_loras(trained: Path, tmp_path: Path) -> None:
    out, source = tmp_path / "out.png", Path(__file__).parents[2] / "docs" / "scene.png"
    arguments = ["run", "--prompt", PROMPT, "--source", str(source), "--steps", "2", "--seed", "0", "--out", str(out)]
    arguments += ["--device", "cpu", "--lora"]
    result = CliRunner().invoke(main, [*arguments, f"{trained}:0.5"])
    assert result.exit_code == 0 and "engine pytorch on cpu" in result.stderr, result.output
    with Image.open(out) as image:
        assert json.loads(json.dumps(image.info))["lora"] == f"{trained}:0.5"
    result = CliRunner().invoke(main, [*arguments, str(trained), "--overwrite", "--engine", "onnxruntime"])
    assert result.exit_code == 2 and "mige-rt export --lora FILE --out BUNDLE" in " ".join(result.output.split())
    result = CliRunner().invoke(main, [*arguments, f"{trained}:inf"])
    assert result.exit_code == 2 and "give a number such as 0.8" in " ".join(result.output.split())


def test_other_engines_say_how(pipe: MigePipeline, trained: Path) -> None:
    with pytest.raises(NotAvailableError, match=r"onnxruntime runs exported graphs.*mige-rt export --lora"):
        pipe.load_lora_weights(trained)


def test_an_exported_bundle_has_the_lora_merged(
    trained: Path, scene: Image.Image, torch_pipe: MigePipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = threading.Lock()

    def run_here(command: object, job: ExportJob, result_type: object, hooks: WorkerHooks) -> object:
        with lock:
            return work(TypeAdapter(ExportJob).validate_python(to_json(job)), hooks.on_phase)

    monkeypatch.setattr(export.exporter, "run_worker", run_here)  # the same work, without six processes' imports
    lora, out = Lora(trained, 0.7), tmp_path / "bundle"
    export_bundle("tiny", out, limits=ExportLimits(1, 1), options=ExportOptions(validate=False, loras=(lora,)))
    manifest = read_manifest(out)
    assert manifest.loras is not None
    (merged,) = manifest.loras
    assert (merged.name, merged.scale, merged.sha256) == ("lora", 0.7, sha256(trained / LORA_FILE))
    shown = CliRunner().invoke(main, ["info", str(out)])
    assert "the LoRA lora merged at scale 0.7" in " ".join(shown.output.split())
    torch_pipe.load_lora_weights(trained, scale=0.7)
    expected = made(torch_pipe, scene)
    torch_pipe.unload_lora_weights()
    exported = MigePipeline.from_pretrained(out, engine="onnxruntime", device="cpu")
    assert np.abs(made(exported, scene) - expected).max() <= 1


def test_a_lora_of_another_model_is_refused(
    trained: Path, tmp_path: Path, torch_pipe: MigePipeline, other_model: Callable[..., Path]
) -> None:
    opened = open_lora(Lora(trained))
    save_lora(tmp_path / "xl", replace(opened.description, model=PRESETS["xl"]), opened.factors)
    sentence = refusal(lambda: torch_pipe.load_lora_weights(tmp_path / "xl"))
    assert "is a LoRA of the model xl, not of tiny" in sentence and "dit.width is 1152, not 192" in sentence
    other = MigePipeline.from_pretrained(
        other_model("denoiser", "blocks.2.attn.qkv.weight", 1.01), engine="pytorch", device="cpu", trust=True
    )
    sentence = refusal(lambda: other.load_lora_weights(trained))
    assert "1 of 30 layers differ, such as denoiser.blocks.2.attn.qkv" in sentence
    result = CliRunner().invoke(main, ["export", "--lora", str(tmp_path / "xl"), "--out", str(tmp_path / "bundle")])
    assert result.exit_code == 2 and "not of tiny" in result.output and not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda lora, out: out.write_bytes((lora / LORA_FILE).read_bytes()[:-100]) and Lora(out), "is damaged"),
        (lambda lora, out: out.write_bytes(b"no file of this kind") and Lora(out), "is damaged"),
        (lambda lora, out: rewritten(lora, out, metadata=""), "does not say which model it is of"),
        (lambda lora, out: rewritten(lora, out, metadata="{"), "is damaged"),
        (lambda lora, out: rewritten(lora, out, metadata='{"schema": 9}'), "has schema 9"),
        (lambda lora, out: rewritten(lora, out, metadata='{"schema": 1}'), "missing model; missing rank"),
        (lambda lora, out: rewritten(lora, out, {"more": torch.zeros(1)}), "missing or unexpected, such as more"),
        (
            lambda lora, out: rewritten(lora, out, {"denoiser.blocks.0.attn.qkv.lora_A.weight": torch.zeros(5, 192)}),
            "its rank is 4",
        ),
        (
            lambda lora, out: rewritten(
                lora, out, {"denoiser.blocks.0.attn.qkv.lora_A.weight": torch.full((4, 192), torch.nan)}
            ),
            "values that are not finite",
        ),
    ],
)
def test_a_damaged_file_is_refused(
    trained: Path, tmp_path: Path, damage: Callable[[Path, Path], Lora], sentence: str
) -> None:
    lora = damage(trained, tmp_path / LORA_FILE)
    assert sentence in refusal(lambda: open_lora(lora))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--rank", "0"], "rank is 0; 1 to 1024 are expected"),
        (["--lora-alpha", "-1"], "alpha is -1.0"),
        (["--lora-targets", "crossattn"], "'crossattn' names no linear layer.*did you mean cross_attn"),
        (["--lora-targets", "attn,vae_decoder"], "'vae_decoder' names no linear layer that is trained"),
        (["--lora-targets", ","], "no target was given"),
        (["--max-train-steps", "0"], "max_train_steps is 0"),
        (["--lr-scheduler", "never"], "'never'; one of linear, cosine"),
        (
            ["--lr-warmup-steps", "5", "--max-train-steps", "1"],
            "lr_warmup_steps is 5.*give the lr_scheduler constant_with_warmup",
        ),
        (["--seed", "4294967296", "--max-train-steps", "1"], "seed is 4294967296; 0 to 4294967295 is expected"),
        (["--data", "manifest.jsonl"], "either --instance-images or --data"),
    ],
)
def test_bad_options_are_one_sentence(images: Path, tmp_path: Path, arguments: list[str], sentence: str) -> None:
    given = ["train-lora", "--instance-images", str(images), "--instance-prompt", "a <imagehere>"]
    result = CliRunner().invoke(main, [*given, "--out", str(tmp_path / "out"), *arguments])
    assert result.exit_code == 2
    assert re.search(sentence, " ".join(result.output.split()))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_said_before_training(images: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    samples, progress = instance_samples(images, "a <imagehere>"), []
    options = FineTuningOptions(max_train_steps=10, train_batch_size=1, device="cpu")  # ten: a call of on_progress
    sentence = refusal(
        lambda: train_lora(
            TINY, samples, tmp_path / "file" / "out", options=options, on_progress=lambda *step: progress.append(step)
        )
    )
    assert not progress
    assert "file/out cannot be written (not a directory); give a folder of your own" in sentence


def test_a_manifest_is_trained_on_too(images: Path, tmp_path: Path) -> None:
    lines = [
        {"prompt": "a <imagehere>", "images": ["0.png"], "target": "2.png"},
        {"prompt": "make it red", "source": "0.png", "target": "2.png"},
    ]
    manifest = images / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["train-lora", "--data", str(manifest), "--out", str(tmp_path), "--max-train-steps", "1"]
    result = CliRunner().invoke(main, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0 and "2 samples" in result.stderr, result.output
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "exists already" in result.output
    (images / "0.png").rename(images / "gone.png")
    try:
        result = CliRunner().invoke(main, [*arguments[:-2], "--out", str(tmp_path / "other")])
    finally:
        (images / "gone.png").rename(images / "0.png")
    assert result.exit_code == 2 and "line 1: images[0] is '0.png'" in " ".join(result.output.split())


def test_what_the_command_line_takes(tmp_path: Path) -> None:
    assert Lora.parse("my/lora") == Lora(Path("my/lora"))
    assert Lora.parse("my/lora:0.5") == Lora(Path("my/lora"), 0.5)
    assert Lora.parse("C:/lora") == Lora(Path("C:/lora"))
    (tmp_path / "x:2").mkdir()
    assert Lora.parse(str(tmp_path / "x:2")) == Lora(tmp_path / "x:2")
    assert "give a number" in refusal(lambda: Lora.parse("x:nan"))
