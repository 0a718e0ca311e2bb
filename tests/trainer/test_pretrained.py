"""The models that the published run started from, in their layouts: every key is taken, or known to be left out."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mige_rt.config import PRESETS, DiTConfig, ModelConfig, QFormerConfig, TextConfig, VAEConfig, VisionConfig
from mige_rt.errors import InputError
from mige_rt.tokenizer import load_tokenizer
from trainer.run.config import Start
from trainer.run.start import open_start

sys.path.insert(0, str(Path(__file__).parent))
from pretrained_files import hollow, small_numbers, states, write_folders, write_pth

SMALL = ModelConfig(
    name="small",
    vision=VisionConfig(side=28, patch=14, width=32, depth=2, heads=4, mlp=48),
    qformer=QFormerConfig(width=24, depth=3, heads=4, mlp=40, queries=4, fusion_heads=4),
    text=TextConfig(vocabulary=1300, width=32, head_width=8, mlp=48, depth=2, heads=4),
    dit=DiTConfig(width=32, depth=2, heads=4, mlp=64, trained_grid=4),
    vae=VAEConfig(widths=(8, 16), layers=1, groups=4),
)

Edit = Callable[[dict[str, Any]], object]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    write_folders(tmp_path, SMALL)
    return write_pth(tmp_path, states(SMALL, small_numbers))


def test_a_model_is_put_together_from_the_four(start: Start, tmp_path: Path) -> None:
    contents = {
        name: torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("pixart", "blip2", "eva_clip")
    }
    pixart, blip2, vit = contents["pixart"]["state_dict"], contents["blip2"]["model"], contents["eva_clip"]
    checkpoint = open_start(start, SMALL, seed=3)
    model = checkpoint.load(dtype=torch.float32)
    patches = model.denoiser.x_embedder.proj.weight
    torch.testing.assert_close(patches[:, :4], pixart["x_embedder.proj.weight"])
    assert patches[:, 4:].abs().max() == 0  # the source's channels
    assert model.image_encoder.patch_embedder.proj.weight is patches
    weights = model.state_dict()
    torch.testing.assert_close(weights["denoiser.blocks.1.mlp.fc1.weight"], pixart["blocks.1.mlp.fc1.weight"])
    torch.testing.assert_close(model.conditioner.kv_linears[1].weight, pixart["blocks.1.cross_attn.kv_linear.weight"])
    torch.testing.assert_close(model.image_encoder.query_tokens, blip2["query_tokens"])
    torch.testing.assert_close(model.image_encoder.projection.weight, blip2["t5_proj.weight"])
    bias = weights["image_encoder.vision.encoder.layers.1.self_attn.qkv.bias"]
    torch.testing.assert_close(bias[:32], vit["blocks.1.attn.q_bias"])
    t5 = load_file(tmp_path / "t5" / "model.safetensors")
    name = "encoder.block.1.layer.0.SelfAttention.q.weight"
    torch.testing.assert_close(model.text_encoder.t5.state_dict()[name], t5[name])
    assert model.image_encoder.fusion.mlp.weight.abs().max() == 0  # training begins with the semantic features alone
    null_text = model.conditioner.y_embedding
    assert null_text.shape == (256, 32)  # drawn, not PixArt's
    assert null_text.std().item() == pytest.approx(32**-0.5, rel=0.05)
    again, other = (open_start(start, SMALL, seed).load({"conditioner"}).conditioner.y_embedding for seed in (3, 4))
    assert torch.equal(again, null_text) and not torch.equal(other, null_text)
    checkpoint.save_tokenizer(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path / "tokenizer.json")("a cat")


def test_the_published_sizes_are_known(tmp_path: Path) -> None:
    xl = PRESETS["xl"]
    write_folders(tmp_path, ModelConfig(name="other", text=SMALL.text))
    start = write_pth(tmp_path, states(xl, hollow))
    checkpoint = open_start(start, xl, seed=0)
    model = checkpoint.empty()
    tensors = checkpoint.tensors(model, {"image_encoder", "denoiser", "conditioner"})
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    assert len(tensors) > 1000 and all(tensor.shape == shapes[name] for name, tensor in tensors.items())
    with pytest.raises(InputError, match=r"t5 does not hold the weights of T5 v1.1 XXL(?s:.*)missing"):
        checkpoint.tensors(model, {"text_encoder"})


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("eva_clip", lambda s: s.pop("blocks.1.attn.q_bias"), "missing: blocks.1.attn.q_bias"),
        ("eva_clip", lambda s: s.update({"blocks.3.x": torch.zeros(1)}), "unexpected: blocks.3.x"),
        ("blip2", lambda s: s["model"].pop("t5_proj.bias"), "missing: t5_proj.bias"),
        ("blip2", lambda s: s["model"].update({"opt_proj.bias": torch.zeros(1)}), "unexpected: opt_proj.bias"),
        ("pixart", lambda s: s["state_dict"].pop("t_block.1.bias"), "missing: t_block.1.bias"),
        (
            "pixart",
            lambda s: s["state_dict"].update({"x_embedder.proj.weight": torch.zeros(32, 8, 2, 2)}),
            "wrongly shaped: x_embedder.proj.weight [32, 8, 2, 2] instead of [32, 4, 2, 2]",
        ),
        ("pixart", lambda s: s.update(state_dict=None), "is a checkpoint of another model"),
    ],
)
def test_a_file_that_is_not_as_published_is_refused(
    name: str, edit: Edit, message: str, start: Start, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.pth"
    content = torch.load(path, weights_only=True)
    edit(content)
    torch.save(content, path)
    with pytest.raises(InputError) as caught:
        open_start(start, SMALL, seed=0)
    assert str(path) in str(caught.value) and message in str(caught.value)


def test_a_t5_that_lacks_a_weight_is_refused(start: Start, tmp_path: Path) -> None:
    path = tmp_path / "t5" / "model.safetensors"
    weights = load_file(path)
    weights["decoder.final_layer_norm.weight"] = torch.zeros(32)  # of the whole T5, left out
    save_file(weights, path, metadata={"format": "pt"})
    open_start(start, SMALL, seed=0).load({"text_encoder"})
    del weights["encoder.final_layer_norm.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"missing: encoder.final_layer_norm.weight"):
        open_start(start, SMALL, seed=0).load({"text_encoder"})


def test_a_missing_file_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "blip2.pth").unlink()
    with pytest.raises(InputError, match=r"no file .*blip2.pth"):
        open_start(start, SMALL, seed=0)
    with pytest.raises(InputError, match=r"start.model is nowhere, which is not there"):
        open_start(Start(model="nowhere"), SMALL, seed=0)


def test_the_key_lists_are_the_published_ones() -> None:
    """What the made-up files are made from."""
    keys = json.loads((Path(__file__).parents[1] / "data/reference/keys_published.json").read_text())
    made_up = states(PRESETS["xl"], hollow)
    assert set(made_up["blip2"]["model"]) <= set(keys)
    assert set(made_up["pixart"]["state_dict"]) <= set(keys)
