"""The stages of training, on the real world and model, for a few steps."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner

from mige_rt.bundle import TOKENIZER_FILE
from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from trainer.__main__ import main
from trainer.model.vae import VAEDecoder, VAEEncoder, make_vae
from trainer.settings import FeatureSettings, StageSettings, load_settings
from trainer.stages.compute_features import FeatureStore, compute_features
from trainer.stages.save_model import save
from trainer.stages.train_mige import COPY_LATENTS, COPY_SOURCE, TrainedPart, assemble, starting_model, train_mige
from trainer.stages.train_qformer import PatchReader, train_qformer
from trainer.stages.train_vae import normalise_latents, train_vae
from trainer.stages.train_vit import train_vit
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample

TINY = PRESETS["tiny"]
QUICK = StageSettings(
    steps=2, batch=8, rate=1e-3, warmup=1, decay=1, weight_decay=0.0, epsilon=1e-8, clip=1.0, ema=0.5, seed=1
)


@pytest.fixture(scope="module")
def state(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder after the stages vae, vit, features and qformer."""
    folder = tmp_path_factory.mktemp("state")
    train_vae(TINY, QUICK, concepts, folder)
    train_vit(TINY, QUICK, concepts, folder)
    compute_features(TINY, FeatureSettings(shards=2, shard_samples=12, seed=3), concepts, folder)
    train_qformer(TINY, QUICK, folder)
    return folder


def _weights(state: Path) -> dict[str, torch.Tensor]:
    return torch.load(state / "mige" / "state.pt", weights_only=True)["average"]


def _copy(state: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("vae", "vit", "features", "qformer"):
        (to / name).symlink_to(state / name)
    return to


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    # The rate must not depend on the number of steps, which stands for the moment of the stop.
    whole, parts = _copy(state, tmp_path / "whole"), _copy(state, tmp_path / "parts")
    settings = replace(QUICK, steps=4, decay=0)
    train_mige(TINY, settings, concepts, whole)
    train_mige(TINY, replace(settings, steps=2), concepts, parts)
    train_mige(TINY, settings, concepts, parts)
    expected, actual = _weights(whole), _weights(parts)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-7)


def test_everything_is_trained_but_the_two_image_encoders(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    folder = _copy(state, tmp_path / "state")
    torch.manual_seed(QUICK.seed)  # as training does, so that both start from the same weights
    start = TrainedPart(assemble(TINY, folder)).state_dict()
    train_mige(TINY, replace(QUICK, steps=6, batch=12, rate=1e-2), concepts, folder)
    trained = torch.load(folder / "mige" / "state.pt", weights_only=True)["module"]
    for name, weight in trained.items():
        vit = name.startswith(("image_encoder.vision.embeddings", "image_encoder.vision.encoder"))
        if vit or name == "conditioner.y_embedding":
            assert torch.equal(weight, start[name]), name
    for name in (
        "denoiser.x_embedder.proj.weight",
        "denoiser.blocks.5.mlp.fc1.weight",
        "conditioner.y_proj.fc1.weight",
        "text_encoder.t5.encoder.block.0.layer.0.SelfAttention.q.weight",
        "image_encoder.qformer.encoder.layer.0.attention.attention.query.weight",
        "image_encoder.fusion.mlp.weight",
        "image_encoder.projection.weight",
        "image_encoder.vision.post_layernorm.weight",
        "image_encoder.query_tokens",
    ):
        assert not torch.equal(trained[name], start[name]), name


def test_the_trained_model_is_a_model_folder_that_runs(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    folder = _copy(state, tmp_path / "state")
    train_mige(TINY, QUICK, concepts, folder)
    pipe = MigePipeline.from_pretrained(save(TINY, folder))
    assert pipe("a red apple", steps=2)[0].size == (64, 64)
    average = {k.removeprefix("module."): v for k, v in _weights(folder).items()}
    model = pipe.engine.model  # type: ignore[attr-defined]
    kept = model.denoiser.final_layer.linear.weight
    torch.testing.assert_close(kept, average["denoiser.final_layer.linear.weight"].half().float())
    with pytest.raises(InputError, match="exists already"):
        save(TINY, folder)


def test_training_starts_with_a_copy_of_the_source_and_the_fusion_unseen(state: Path) -> None:
    model = starting_model(TINY, state)
    assert model.image_encoder.fusion.mlp.weight.abs().max() == 0
    torch.manual_seed(0)
    side = TINY.dit.trained_grid * TINY.dit.patch
    latents, source = torch.randn(2, 8, TINY.vae.channels, side, side)
    kv = torch.zeros(2, TINY.dit.depth, 8, TINY.dit.heads, 3, TINY.dit.width // TINY.dit.heads)
    with torch.no_grad():
        got = model.denoiser(latents, source, torch.full((8,), 400.0), kv, torch.ones(8, 3, dtype=torch.bool))
    wanted = COPY_LATENTS * latents + COPY_SOURCE * source
    both = torch.stack([(values - values.mean(0)).flatten() for values in (got, wanted)])  # a place's offset is learnt
    assert torch.corrcoef(both)[0, 1] > 0.95


def test_the_text_encoder_starts_by_passing_on_what_it_is_given(state: Path) -> None:
    encoder = starting_model(TINY, state).text_encoder
    token_ids, mask = torch.tensor([[5, 0, 7]]), torch.ones(1, 3, dtype=torch.bool)
    tokens, slots = torch.randn(1, 16, TINY.text.width), torch.tensor([[-1, 3, -1]])
    with torch.no_grad():
        states = encoder(token_ids, tokens, slots, mask)
    torch.testing.assert_close(states[0, 1], F.rms_norm(tokens[0, 3], (TINY.text.width,)), rtol=1e-4, atol=1e-4)


def test_the_qformer_stage_trains_the_image_encoder_that_mige_starts_from(state: Path) -> None:
    start, trained = (make(TINY, state).image_encoder.state_dict() for make in (starting_model, assemble))
    for name, weight in trained.items():
        if name.startswith(("vision.embeddings", "vision.encoder")):
            assert torch.equal(weight, start[name]), name
    for name in ("projection.weight", "fusion.mlp.weight", "qformer.encoder.layer.0.attention.attention.query.weight"):
        assert not torch.equal(trained[name], start[name]), name


def test_a_reader_is_asked_for_each_patch_at_its_own_position(state: Path) -> None:
    reader = PatchReader(starting_model(TINY, state).image_encoder, TINY)
    side, patch = TINY.size // TINY.vae.factor, TINY.dit.patch
    x = torch.arange(side).expand(1, TINY.vae.channels, side, side).float()
    patches = reader.patches(x)  # what stands there is its column
    columns = patches.mean(dim=2)[0].reshape(side // patch, side // patch) / TINY.vae.scale
    torch.testing.assert_close(columns, (torch.arange(side // patch) * patch + (patch - 1) / 2).expand_as(columns))
    same_column = reader.positions.reshape(side // patch, side // patch, -1)[:, 3, : TINY.dit.width // 2]
    torch.testing.assert_close(same_column, same_column[:1].expand_as(same_column))  # x is the positions' first half


def test_features_hold_what_the_samples_say(state: Path, concepts: list[Concept]) -> None:
    store = FeatureStore(state / "features", TINY)
    assert len(store) == 24
    encoder = assemble(TINY, state).vae_encoder
    batch = store.batch(np.array([3, 14, 20]))
    pictures = 0
    for b, index in enumerate((3, 14, 20)):
        sample = make_sample(3, index, concepts, TINY.size)
        pixels = torch.from_numpy(sample.target).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(batch.target[b], encoder(pixels)[0][0], rtol=1e-2, atol=1e-2)
        assert (sample.source is None) == bool((batch.source[b] == 0).all())
        slots = batch.slot_index[b][batch.slot_index[b] >= 0]
        queries = TINY.qformer.queries
        assert slots.tolist() == list(range(pictures * queries, (pictures + len(sample.images)) * queries))
        pictures += len(sample.images)
    assert len(batch.vit) == len(batch.ref_latents) == pictures


def test_normalising_latents_changes_no_reconstruction(concepts: list[Concept]) -> None:
    torch.manual_seed(0)
    vae = make_vae(TINY.vae)
    encode, decode = VAEEncoder(vae), VAEDecoder(vae)
    pictures = np.stack([make_sample(0, i, concepts, TINY.size).target for i in range(16)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        mean, logvar = encode(pixels)
        before = decode(mean)
        normalise_latents(vae, pixels)
        scaled, scaled_logvar = encode(pixels)
        torch.testing.assert_close(decode(scaled), before, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(scaled.mean(dim=(0, 2, 3)), torch.zeros(TINY.vae.channels), rtol=0, atol=1e-3)
        torch.testing.assert_close(scaled.std(dim=(0, 2, 3)), torch.ones(TINY.vae.channels), rtol=1e-2, atol=0)
        ratio = (scaled_logvar - logvar) / 2
        torch.testing.assert_close(ratio, -mean.std(dim=(0, 2, 3))[None, :, None, None].log().expand_as(ratio))


def test_stages_say_which_stage_they_miss(concepts: list[Concept], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vae and vit first"):
        compute_features(TINY, FeatureSettings(1, 4, 0), concepts, tmp_path)
    for train in (partial(train_qformer, TINY, QUICK), partial(train_mige, TINY, QUICK, concepts)):
        with pytest.raises(InputError, match="features"):
            train(tmp_path)
    with pytest.raises(InputError, match="mige first"):
        save(TINY, tmp_path)


def test_the_log_tells_steps_samples_hours_and_loss_by_task(
    state: Path, concepts: list[Concept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.LOG_EVERY", 2)
    folder = _copy(state, tmp_path / "state")
    train_mige(TINY, replace(QUICK, steps=4, batch=16), concepts, folder)
    lines = [json.loads(line) for line in (folder / "mige" / "log.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [32, 64]
    assert {"step", "hours", "loss", "norm"} <= set(lines[0])
    assert set(lines[0]) & {"recolour", "remove", "add", "replace", "generate"}


def test_the_shipped_config_is_read_and_a_wrong_one_refused(tmp_path: Path) -> None:
    import trainer

    shipped = Path(trainer.__file__).parent / "configs" / "tiny.toml"
    assert load_settings(shipped).model == "tiny"
    wrong = tmp_path / "wrong.toml"
    text = shipped.read_text()
    for change, said in {
        ("steps =", "stepz ="): r"unknown stepz.*missing steps",
        ("clip = 1.0", 'clip = "much"'): "clip is 'much'",
        ("[mige]", "[mage]"): "unknown mage",
        ('model = "tiny"', ""): "model is None",
    }.items():
        wrong.write_text(text.replace(*change))
        with pytest.raises(InputError, match=said):
            load_settings(wrong)


def test_a_run_that_goes_on_from_a_model_needs_no_tables_of_other_stages() -> None:
    import trainer

    settings = load_settings(Path(trainer.__file__).parent / "configs" / "tiny-2.toml")
    assert settings.stage("mige").steps > 0 and settings.features().shards > 0
    with pytest.raises(InputError, match=r"no table \[vae\]"):
        settings.stage("vae")


def test_training_goes_on_from_a_model_folder(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    first, second = _copy(state, tmp_path / "first"), tmp_path / "second"
    train_mige(TINY, QUICK, concepts, first)
    model = save(TINY, first)
    compute_features(TINY, FeatureSettings(shards=1, shard_samples=12, seed=3), concepts, second, model)
    assert (second / "features" / "tokenizer.json").read_bytes() == (model / TOKENIZER_FILE).read_bytes()
    shard, same = (FeatureStore(folder / "features", TINY).batch(np.arange(4)) for folder in (first, second))
    torch.testing.assert_close(same.target, shard.target, rtol=0, atol=0.02)  # the folder's are in half precision
    started = assemble(TINY, second, model)
    average = {k.removeprefix("module."): v for k, v in _weights(first).items()}
    kept = started.denoiser.final_layer.linear.weight
    torch.testing.assert_close(kept, average["denoiser.final_layer.linear.weight"].half().float())
    train_mige(TINY, QUICK, concepts, second, model)
    assert MigePipeline.from_pretrained(save(TINY, second, model))("a red apple", steps=2)[0].size == (64, 64)
    with pytest.raises(InputError, match="other sizes than the config's"):
        assemble(replace(TINY, dit=replace(TINY.dit, depth=3)), second, model)


def test_only_the_stages_that_go_on_from_a_model_take_one(tmp_path: Path) -> None:
    arguments = ["vae", "--start", str(tmp_path), "--world", str(tmp_path), "--state", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "--start means nothing to the stage vae" in result.output
