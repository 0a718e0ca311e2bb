import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from mige_rt.bundle import read_config
from mige_rt.config import (
    PRESETS,
    DiTConfig,
    ModelConfig,
    QFormerConfig,
    TextConfig,
    VAEConfig,
    VisionConfig,
)
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints import model_folder as checkpoint
from trainer.checkpoints.convert_published import (
    convert,
    read_checkpoint,
    read_tokenizer,
    read_vae_config,
    read_vae_weights,
)
from trainer.checkpoints.model_folder import load_model, save_model
from trainer.checkpoints.published_names import (
    T5_EMBEDDINGS,
    check_published,
    optional_shapes,
    our_tensor,
    published_name,
    published_shapes,
)
from trainer.checkpoints.weights import distinct_tensors
from trainer.model.mige import Mige
from trainer.model.vae import make_vae
from trainer.tokenizer import from_spiece

REFERENCE = Path(__file__).parents[1] / "data" / "reference"
# The published layout at a size for tests.
SMALL = ModelConfig(
    name="small",
    vision=VisionConfig(side=28, patch=14, width=32, depth=2, heads=4, mlp=48),
    qformer=QFormerConfig(width=24, depth=3, heads=4, mlp=40, queries=4, fusion_heads=4),
    text=TextConfig(vocabulary=1300, width=32, head_width=8, mlp=48, depth=2, heads=4),
    dit=DiTConfig(width=32, depth=2, heads=4, mlp=64, trained_grid=4),
    vae=VAEConfig(widths=(8, 16), layers=1, groups=4),
)

Edit = Callable[[dict[str, Any]], object]


def random_state(config: ModelConfig = SMALL, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    shapes = {**published_shapes(config), **optional_shapes(config)}
    state = {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes.items()}
    state[T5_EMBEDDINGS[1]] = state[T5_EMBEDDINGS[0]]
    state["Qformer.bert.embeddings.position_ids"] = torch.arange(512)[None]
    return state


def hollow_state(shapes: dict[str, Any]) -> dict[str, Any]:
    """Weights of any size, each one number in memory and in a file."""
    return {key: torch.full((1,), 0.5).expand(*shape) for key, shape in shapes.items()}


def keys(name: str) -> dict[str, list[int]]:
    return json.loads((REFERENCE / f"keys_{name}.json").read_text())


def save_vae(folder: Path, config: VAEConfig = SMALL.vae) -> AutoencoderKL:
    torch.manual_seed(1)
    vae = make_vae(config)
    vae.save_pretrained(folder)
    return vae


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    torch.save({"state_dict": random_state()}, folder / "model.pth")
    save_vae(folder / "sd-vae-ft-ema")
    (folder / "t5-v1_1-xxl").mkdir()
    shutil.copy(REFERENCE / "spiece.model", folder / "t5-v1_1-xxl")
    return folder


@pytest.fixture
def snapshot(original: Path, tmp_path: Path) -> Path:
    """A folder in the published layout that a test may change."""
    return Path(shutil.copytree(original, tmp_path / "snapshot"))


@pytest.fixture(scope="module")
def converted(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "model"
    convert(original, out, config=SMALL)
    return out


@pytest.fixture
def model_folder(converted: Path, tmp_path: Path) -> Path:
    """A model folder that a test may change."""
    return Path(shutil.copytree(converted, tmp_path / "model"))


def refusal(action: Callable[[], object]) -> str:
    with pytest.raises(InputError) as caught:
        action()
    return str(caught.value)


def refused_state(edit: Edit) -> str:
    state = random_state()
    edit(state)
    return refusal(lambda: check_published(state, "model.pth", SMALL))


# --- the published names ---


@pytest.mark.parametrize(("preset", "file", "count"), [("xl", "published", 1451), ("reduced", "reduced", 172)])
def test_the_published_keys_are_exactly_those_our_modules_need(preset: str, file: str, count: int) -> None:
    expected = {**published_shapes(PRESETS[preset]), **optional_shapes(PRESETS[preset])}
    assert expected == {key: tuple(shape) for key, shape in keys(file).items()}
    assert len(expected) == count


@pytest.mark.parametrize(("preset", "file"), [("xl", "published"), ("reduced", "reduced")])
def test_published_keys_fill_all_of_our_weights_but_the_vaes(preset: str, file: str) -> None:
    state = {key: torch.empty(shape, device="meta") for key, shape in keys(file).items()}
    with torch.device("meta"):
        model = Mige(PRESETS[preset])
    own = model.state_dict()
    names = [name for name in distinct_tensors(model) if not name.startswith("vae_")]
    assert all(our_tensor(state, name).shape == own[name].shape for name in names)
    assert len({published_name(name) for name in names}) == len(names)
    graphs = {alias.split(".")[0] for names in distinct_tensors(model).values() for alias in names}
    assert graphs == set(GRAPHS)


@pytest.mark.parametrize(
    ("ours", "published"),
    [
        ("image_encoder.vision.encoder.layers.7.self_attn.projection.bias", "visual_encoder.blocks.7.attn.proj.bias"),
        ("image_encoder.vision.encoder.layers.7.layer_norm2.weight", "visual_encoder.blocks.7.norm2.weight"),
        ("image_encoder.vision.post_layernorm.weight", "ln_vision.weight"),
        ("image_encoder.qformer.layernorm.bias", "Qformer.bert.embeddings.LayerNorm.bias"),
        (
            "image_encoder.qformer.encoder.layer.4.crossattention.attention.value.bias",
            "Qformer.bert.encoder.layer.4.crossattention.self.value.bias",
        ),
        (
            "image_encoder.qformer.encoder.layer.4.attention.output.dense.bias",
            "Qformer.bert.encoder.layer.4.attention.output.dense.bias",
        ),
        ("image_encoder.fusion.k_proj_1.2.bias", "FFM.k_proj_1.2.bias"),
        ("image_encoder.projection.weight", "t5_proj.weight"),
        ("conditioner.kv_linears.27.weight", "blocks.27.cross_attn.kv_linear.weight"),
        ("denoiser.blocks.27.cross_attn.q_linear.weight", "blocks.27.cross_attn.q_linear.weight"),
    ],
)
def test_published_name(ours: str, published: str) -> None:
    assert published_name(ours) == published


def test_the_vits_attention_bias_is_that_of_q_nothing_for_k_and_that_of_v() -> None:
    state = random_state()
    bias = our_tensor(state, "image_encoder.vision.encoder.layers.1.self_attn.qkv.bias")
    q, k, v = bias.chunk(3)
    assert torch.equal(q, state["visual_encoder.blocks.1.attn.q_bias"])
    assert torch.equal(k, torch.zeros_like(k))
    assert torch.equal(v, state["visual_encoder.blocks.1.attn.v_bias"])


@pytest.mark.parametrize(("preset", "file"), [("xl", "published"), ("reduced", "reduced")])
def test_the_size_is_told_from_the_keys(preset: str, file: str) -> None:
    assert check_published(hollow_state(keys(file)), "model.pth") == PRESETS[preset]


# --- strictness ---


def test_one_error_names_missing_unexpected_and_wrongly_shaped_keys() -> None:
    def edit(state: dict[str, Any]) -> None:
        del state["t5_proj.bias"]
        state["t5_proj.extra"] = torch.zeros(2)
        state["blocks.1.attn.qkv.weight"] = torch.zeros(96, 31)

    message = refused_state(edit)
    assert "1 missing: t5_proj.bias\n" in message
    assert "1 unexpected: t5_proj.extra\n" in message
    assert "1 wrongly shaped: blocks.1.attn.qkv.weight [96, 31] instead of [96, 32]\n" in message


def test_a_missing_last_block_is_missing_and_not_a_shallower_model() -> None:
    state = hollow_state({key: shape for key, shape in keys("published").items() if not key.startswith("blocks.27.")})
    message = refusal(lambda: check_published(state, "model.pth"))
    assert "15 missing" in message and "blocks.27.attn.qkv.weight" in message and "'xl'" in message


def test_a_long_list_is_cut_and_counted() -> None:
    state = hollow_state({key: shape for key, shape in keys("published").items() if not key.startswith("visual_")})
    message = refusal(lambda: check_published(state, "model.pth"))
    assert "511 missing: visual_encoder.cls_token, " in message and "more)" not in message


@pytest.mark.parametrize(
    "absent", [["pos_embed"], ["Qformer.bert.embeddings.position_ids"], *([n] for n in T5_EMBEDDINGS)]
)
def test_tables_that_we_compute_and_one_name_of_the_embedding_may_be_absent(absent: list[str]) -> None:
    state = random_state()
    whole = our_tensor(state, "text_encoder.t5.shared.weight")
    for key in absent:
        del state[key]
    assert check_published(state, "model.pth", SMALL) == SMALL
    assert torch.equal(our_tensor(state, "text_encoder.t5.shared.weight"), whole)


def test_both_names_of_the_embedding_may_not_be_absent() -> None:
    message = refused_state(lambda state: [state.pop(key) for key in T5_EMBEDDINGS])
    assert f"1 missing: {T5_EMBEDDINGS[0]}" in message


def test_the_two_embeddings_must_agree() -> None:
    message = refused_state(lambda state: state.update({T5_EMBEDDINGS[1]: torch.zeros(1200, 32)}))
    assert f"1 wrongly shaped: {T5_EMBEDDINGS[1]} [1200, 32] instead of [1300, 32]" in message
    other = torch.ones(1300, 32)
    message = refused_state(lambda state: state.update({T5_EMBEDDINGS[1]: state[T5_EMBEDDINGS[0]].cpu() + other}))
    assert "two tables of T5's embedding that differ" in message


@pytest.mark.parametrize(("value", "kind"), [(3, "int"), (torch.zeros(32, dtype=torch.int8), "torch.int8")])
def test_entries_that_are_no_weights_are_named(value: Any, kind: str) -> None:
    assert f"t5_proj.bias ({kind})" in refused_state(lambda state: state.update({"t5_proj.bias": value}))


# --- bad files ---


def test_a_truncated_checkpoint(snapshot: Path) -> None:
    path = snapshot / "model.pth"
    path.write_bytes(path.read_bytes()[:-1000])
    message = refusal(lambda: convert(path, snapshot / "out", config=SMALL))
    assert "only the beginning of one" in message and f"{path.stat().st_size:,} bytes" in message
    assert not list(snapshot.glob("out*"))


class Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(snapshot: Path, zipped: bool) -> None:
    ran = snapshot / "ran"
    content = {"state_dict": random_state(), "more": Touch(ran)}
    torch.save(content, snapshot / "model.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(lambda: convert(snapshot, snapshot / "out", config=SMALL))
    assert not ran.exists() and not list(snapshot.glob("out*"))
    if zipped:
        assert "holds Python objects (posix.mkdir) beside tensors" in message


@pytest.mark.parametrize("content", [{"model": {"t5_proj.bias": torch.zeros(2)}}, [1, 2], {"state_dict": [1]}])
def test_another_models_checkpoint(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "model.pth")
    assert "is a checkpoint of another model" in refusal(lambda: read_checkpoint(tmp_path / "model.pth"))


def test_other_weights_in_the_same_wrapping(tmp_path: Path) -> None:
    torch.save({"state_dict": {"conv.weight": torch.zeros(2)}}, tmp_path / "model.pth")
    state = read_checkpoint(tmp_path / "model.pth")
    message = refusal(lambda: check_published(state, "model.pth"))
    assert "1 unexpected: conv.weight" in message and "missing: " in message


def test_a_text_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert "is no torch checkpoint" in refusal(lambda: read_checkpoint(tmp_path / "model.pth"))


def test_a_missing_checkpoint(tmp_path: Path) -> None:
    assert "no checkpoint at" in refusal(lambda: convert(tmp_path / "model.pth", tmp_path / "out"))
    assert f"no checkpoint in {tmp_path}" in refusal(lambda: convert(tmp_path, tmp_path / "out"))


def test_several_checkpoints(snapshot: Path) -> None:
    os.rename(snapshot / "model.pth", snapshot / "a.pth")
    shutil.copy(snapshot / "a.pth", snapshot / "b.pth")
    assert "(a.pth, b.pth)" in refusal(lambda: convert(snapshot, snapshot / "out", config=SMALL))


@pytest.mark.parametrize(("name", "option"), [("sd-vae-ft-ema", "--vae"), ("t5-v1_1-xxl", "--tokenizer")])
def test_a_folder_missing_beside_the_checkpoint(snapshot: Path, name: str, option: str) -> None:
    shutil.rmtree(snapshot / name)
    message = refusal(lambda: convert(snapshot / "model.pth", snapshot / "out", config=SMALL))
    assert f"no folder {name}" in message and option in message


# --- conversion ---


def test_conversion_keeps_every_weight_and_its_dtype(original: Path, converted: Path) -> None:
    state, model = random_state(), load_model(converted, torch.bfloat16)
    own = model.state_dict()
    for name, aliases in distinct_tensors(model).items():
        if not name.startswith("vae_"):
            expected = our_tensor(state, name)
            assert all(torch.equal(own[alias], expected) for alias in aliases), name
    vae = AutoencoderKL.from_pretrained(original / "sd-vae-ft-ema").state_dict()
    loaded = load_model(converted, only={"vae_encoder", "vae_decoder"}).state_dict()
    halves = {name.partition(".")[2]: loaded[name] for name in loaded if name.startswith("vae_")}
    assert halves.keys() == vae.keys() and all(torch.equal(vae[key], halves[key]) for key in vae)
    assert read_config(converted) == SMALL


def test_the_files_of_a_model_folder(converted: Path) -> None:
    files = sorted(str(path.relative_to(converted)) for path in converted.rglob("*") if path.is_file())
    assert files == [
        "conditioner-00001-of-00001.safetensors",
        "config.json",
        "denoiser-00001-of-00001.safetensors",
        "image_encoder-00001-of-00001.safetensors",
        "text_encoder-00001-of-00001.safetensors",
        "tokenizer/tokenizer.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    assert len({(converted / file).stat().st_mode for file in files}) == 1  # readable by whom the umask says
    assert str(converted.parent) not in (converted / "vae" / "config.json").read_text()
    tokenize = load_tokenizer(converted / "tokenizer" / "tokenizer.json")
    assert tokenize("a photo of a cat ") == from_spiece(REFERENCE / "spiece.model").encode("a photo of a cat ").ids


def test_large_components_are_split(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    calls: list[tuple[str, int, int]] = []
    convert(original, tmp_path / "model", config=SMALL, on_progress=lambda *call: calls.append(call))
    text = sorted(tmp_path.glob("model/text_encoder-*"))
    assert len(text) > 2 and text[-1].name == f"text_encoder-{len(text):05d}-of-{len(text):05d}.safetensors"
    model = load_model(tmp_path / "model", torch.bfloat16)
    assert torch.equal(model.text_encoder.t5.shared.weight, random_state()[T5_EMBEDDINGS[0]])
    done = [call[1] for call in calls]
    assert done == sorted(done) and done[0] == 0 and done[-1] == calls[0][2] and len({call[2] for call in calls}) == 1
    assert list(dict.fromkeys(call[0] for call in calls)) == [*checkpoint.COMPONENTS, "vae"]
    text[1].unlink()
    assert f"lacks {text[1].name}" in refusal(lambda: load_model(tmp_path / "model"))


def test_equal_inputs_give_equal_files(original: Path, converted: Path, tmp_path: Path) -> None:
    convert(original, tmp_path / "again", config=SMALL)
    for path in converted.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "again" / path.relative_to(converted)).read_bytes(), path


def test_the_reduced_model_converts_by_itself(original: Path, tmp_path: Path) -> None:
    state = {key: value.to(torch.bfloat16) for key, value in hollow_state(keys("reduced")).items()}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    save_vae(tmp_path / "sd-vae-ft-ema", VAEConfig(widths=(8, 8, 8, 8), layers=1, groups=4))
    with pytest.warns(UserWarning, match="1300 pieces and the model's table has 384 rows"):
        convert(tmp_path / "model.pth", tmp_path / "out", tokenizer=original / "t5-v1_1-xxl")
    config = read_config(tmp_path / "out")
    assert config == replace(PRESETS["reduced"], vae=config.vae)
    model = load_model(tmp_path / "out", torch.bfloat16, only={"image_encoder", "denoiser"})
    assert all(torch.all(value == 0.5) for value in model.denoiser.parameters())


def test_a_nested_snapshot_and_a_checkpoint_of_another_name(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "weights").mkdir()
    os.rename(snapshot / "model.pth", snapshot / "weights" / "mige.pth")
    for name in ("sd-vae-ft-ema", "t5-v1_1-xxl"):
        (snapshot / "pretrained").mkdir(exist_ok=True)
        os.rename(snapshot / name, snapshot / "pretrained" / name)
    convert(snapshot, tmp_path / "out", config=SMALL)
    assert "mige.pth" in json.loads((tmp_path / "out" / "config.json").read_text())["source"]


def test_explicit_folders_and_a_tokenizer_json(snapshot: Path, tmp_path: Path) -> None:
    (snapshot / "words").mkdir()
    from_spiece(REFERENCE / "spiece.model").save(str(snapshot / "words" / "tokenizer.json"))
    os.rename(snapshot / "sd-vae-ft-ema", snapshot / "vae")
    shutil.rmtree(snapshot / "t5-v1_1-xxl")
    convert(snapshot, tmp_path / "out", vae=snapshot / "vae", tokenizer=snapshot / "words", config=SMALL)
    assert load_model(tmp_path / "out").config == SMALL


def test_an_existing_out_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "exists already" in refusal(lambda: convert(tmp_path / "nothing.pth", tmp_path / "out"))


def test_an_out_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "missing" / "out"
    assert f"{out} cannot be written" in refusal(lambda: convert(tmp_path / "nothing.pth", out))


def test_a_full_disk_is_found_before_anything_is_written(
    original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    assert "GB free" in refusal(lambda: convert(original, tmp_path / "out", config=SMALL))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError("disk on fire"), InputError), (KeyboardInterrupt(), KeyboardInterrupt)]
)
def test_a_failure_midway_leaves_nothing(original: Path, tmp_path: Path, error: Any, raised: type[Exception]) -> None:
    def fail(component: str, done: int, total: int) -> None:
        if component == "denoiser":
            assert len(list(tmp_path.glob("out.partial-*/*.safetensors"))) == 3
            raise error

    with pytest.raises(raised):
        convert(original, tmp_path / "out", config=SMALL, on_progress=fail)
    assert not list(tmp_path.iterdir())


STALLED = """
import json, sys, time
from pathlib import Path
from trainer.checkpoints.convert_published import convert
from mige_rt.config import ModelConfig
def stall(component, done, total):
    if component == "vae":
        print("writing", flush=True)
        time.sleep(100)
config = ModelConfig.from_json(json.loads(sys.argv[3]))
convert(Path(sys.argv[1]), Path(sys.argv[2]), config=config, on_progress=stall)
"""


def test_a_killed_run_leaves_nothing_that_looks_finished(original: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", STALLED, str(original), str(tmp_path / "out"), json.dumps(SMALL.to_json())]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) as process:
        assert process.stdout is not None and process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    (left,) = tmp_path.iterdir()
    assert "is no model folder" in refusal(lambda: load_model(left))
    convert(original, tmp_path / "out", config=SMALL)


# --- the VAE and the tokenizer ---


def as_before_attention_was_renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for new, name in old.items():
        state = {key.replace(new, name): value for key, value in state.items()}
    return state


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_an_old_vae(tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    vae = save_vae(tmp_path)
    state = as_before_attention_was_renamed({key: value.half() for key, value in vae.state_dict().items()})
    assert any(".proj_attn." in key for key in state)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    path = tmp_path / f"diffusion_pytorch_model.{suffix}"
    save_file(state, path, {"format": "pt"}) if suffix == "safetensors" else torch.save(state, path)
    weights = read_vae_weights(tmp_path)
    assert read_vae_config(tmp_path) == SMALL.vae
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert all(torch.equal(weights[key].half(), value.half()) for key, value in vae.state_dict().items())


def test_pickled_code_in_a_vae_is_refused_and_not_run(tmp_path: Path) -> None:
    vae = save_vae(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    torch.save({**vae.state_dict(), "more": Touch(tmp_path / "ran")}, tmp_path / "diffusion_pytorch_model.bin")
    assert "cannot be read" in refusal(lambda: read_vae_weights(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_truncated_vae(tmp_path: Path) -> None:
    save_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "cannot be read" in refusal(lambda: read_vae_weights(tmp_path))


def test_a_vae_without_some_of_its_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_vae(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    del weights["quant_conv.bias"]
    save_file(weights, path, {"format": "pt"})
    assert "quant_conv.bias" in refusal(lambda: read_vae_weights(tmp_path))


def test_a_vae_of_another_kind(tmp_path: Path) -> None:
    save_vae(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"silu"', '"gelu"'))
    assert "act_fn is 'gelu'" in refusal(lambda: read_vae_config(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "VQModel"}')
    assert "describes VQModel" in refusal(lambda: read_vae_config(tmp_path))
    (tmp_path / "config.json").unlink()
    assert f"no VAE in {tmp_path}" in refusal(lambda: read_vae_config(tmp_path))


@pytest.mark.parametrize("change", [{"channels": 8}, {"scale": 0.13}, {"widths": (8, 8, 16)}])
def test_a_vae_whose_latents_the_model_does_not_know(snapshot: Path, change: dict[str, Any]) -> None:
    save_vae(snapshot / "other", replace(SMALL.vae, **change))
    message = refusal(lambda: convert(snapshot, snapshot / "out", vae=snapshot / "other", config=SMALL))
    assert "trained on 4 channels, a factor of 2, a scale of 0.18215" in message


def test_no_tokenizer(tmp_path: Path) -> None:
    assert "spiece.model or tokenizer.json" in refusal(lambda: read_tokenizer(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "not a readable tokenizer.json" in refusal(lambda: read_tokenizer(tmp_path))


# --- model folders ---


def test_sharing_survives_loading(converted: Path) -> None:
    model = load_model(converted)
    assert model.image_encoder.patch_embedder is model.denoiser.x_embedder
    assert model.text_encoder.t5.shared.weight is model.text_encoder.t5.encoder.embed_tokens.weight
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_only_some_graphs(converted: Path) -> None:
    model = load_model(converted, only={"image_encoder"})
    assert not any(tensor.is_meta for tensor in model.image_encoder.parameters())
    assert model.denoiser.final_layer.linear.weight.is_meta and model.text_encoder.t5.shared.weight.is_meta
    (without := converted.parent / "without").mkdir()
    for name in ("config.json", "conditioner-00001-of-00001.safetensors"):
        shutil.copy(converted / name, without)
    load_model(without, only=["conditioner"])
    assert "lacks vae" in refusal(lambda: load_model(without, only=["vae_decoder"]))
    with pytest.raises(ValueError, match="no such graph: unet"):
        load_model(converted, only={"unet"})  # type: ignore[arg-type]


@torch.no_grad()
def test_a_loaded_model_computes_what_the_saved_one_did(tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = replace(PRESETS["tiny"], dit=replace(PRESETS["tiny"].dit, depth=1))
    model = Mige(config).eval()
    tokenizer = from_spiece(REFERENCE / "spiece.model")
    save_model(model, tokenizer, tmp_path / "full", torch.float32, "made for a test")
    save_model(model, tokenizer, tmp_path / "half", torch.float16, "made for a test")
    loaded, half = load_model(tmp_path / "full"), load_model(tmp_path / "half")
    size = config.vision.side
    pixels, latents = torch.randn(1, 3, size, size), torch.randn(1, config.vae.channels, 8, 8)
    assert torch.equal(loaded.image_encoder(pixels, latents), model.image_encoder(pixels, latents))
    assert torch.equal(loaded.vae_decoder(latents), model.vae_decoder(latents))
    ids, slots, mask = torch.arange(3, 8)[None], torch.full((1, 5), -1), torch.ones(1, 5, dtype=torch.bool)
    tokens = torch.zeros(1, config.qformer.queries, config.text.width)
    assert torch.equal(loaded.text_encoder(ids, tokens, slots, mask), model.text_encoder(ids, tokens, slots, mask))
    assert loaded.config == half.config == config
    own = model.state_dict()
    assert all(torch.equal(value, own[name].half().float()) for name, value in half.state_dict().items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["source"] == "made for a test"
    AutoencoderKL.from_pretrained(tmp_path / "half" / "vae")


def test_a_model_folder_with_other_weights_than_it_says(model_folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = model_folder / "conditioner-00001-of-00001.safetensors"
    weights = load_file(path)
    del weights["conditioner.y_embedding"]
    weights["conditioner.extra"] = torch.zeros(1)
    weights["conditioner.y_proj.fc1.bias"] = torch.zeros(5)
    save_file(weights, path)
    message = refusal(lambda: load_model(model_folder))
    assert "1 missing: conditioner.y_embedding\n" in message
    assert "1 unexpected: conditioner.extra\n" in message
    assert "1 wrongly shaped: conditioner.y_proj.fc1.bias [5] instead of [32]\n" in message


@pytest.mark.parametrize("file", ["denoiser-00001-of-00001.safetensors", "vae/diffusion_pytorch_model.safetensors"])
def test_a_truncated_or_missing_shard(model_folder: Path, file: str) -> None:
    path = model_folder / file
    path.write_bytes(path.read_bytes()[:-10])
    assert f"{path} cannot be read" in refusal(lambda: load_model(model_folder))
    path.unlink()
    assert f"lacks {file}" in refusal(lambda: load_model(model_folder))


def test_shards_of_two_models(model_folder: Path) -> None:
    shutil.copy(
        model_folder / "denoiser-00001-of-00001.safetensors", model_folder / "denoiser-00001-of-00002.safetensors"
    )
    assert "shards of several models" in refusal(lambda: load_model(model_folder))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"schema": 99, "model": {}}, "has schema 99"),
        ({"schema": 2, "model": {"name": "x"}}, "missing config.vision"),
        ({"architectures": ["T5"]}, "is not of a model"),
        ([], "is not of a model"),
    ],
)
def test_a_config_that_is_not_ours(model_folder: Path, content: Any, said: str) -> None:
    (model_folder / "config.json").write_text(json.dumps(content))
    assert said in refusal(lambda: load_model(model_folder))


def test_no_model_folder(tmp_path: Path) -> None:
    assert "is no model folder" in refusal(lambda: read_config(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text("{")
    assert "is no model folder" in refusal(lambda: read_config(tmp_path))
