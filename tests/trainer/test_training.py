"""The stages of training, on the real world and model, for a few steps."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import Tensor

from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.scheduler import ALPHAS, SIGMAS
from mige_rt.tokenizer import load_tokenizer
from trainer.__main__ import main
from trainer.loop import Float32Attention
from trainer.model.dit import Block
from trainer.model.encoders import ImageEncoder
from trainer.model.vae import VAEDecoder, VAEEncoder, make_vae
from trainer.settings import LadderSettings, StageSettings, load_settings
from trainer.stages.features import KIND_NAMES, Batch, FeatureMaker, RollingShards, collate
from trainer.stages.ladder import KEPT_EDITS, LADDER, NEWEST_SHARE, Climb, counts
from trainer.stages.make_samples import make_samples
from trainer.stages.measure_rungs import measure_rungs
from trainer.stages.one_shot import one_shot
from trainer.stages.practice import all_of, practice
from trainer.stages.reading import fourier_code, patch_centres, query_places, ridge
from trainer.stages.rolling import Images, ImageSeries, image_series
from trainer.stages.save_model import save
from trainer.stages.start_reading import attention_inputs, start_reading
from trainer.stages.starting_model import (
    COPY_LATENTS,
    COPY_SOURCE,
    starting_model,
    with_trained_encoder,
    with_trained_vit,
)
from trainer.stages.train_looks import PatchReaders, patches, reading_errors, train_looks
from trainer.stages.train_mige import train_mige
from trainer.stages.train_qformer import PatchReader, reading_error, start_qformer, train_qformer
from trainer.stages.train_vae import normalise_latents, train_vae
from trainer.stages.train_vit import train_vit
from trainer.stages.trained_part import TrainedPart
from trainer.synthetic.concepts import Concept
from trainer.synthetic.tasks import make_sample

TINY = PRESETS["tiny"]
QUICK = StageSettings(
    steps=2, batch=8, rate=1e-3, warmup=1, decay=1, weight_decay=0.0, epsilon=1e-8, clip=1.0, ema=0.5, seed=1
)


LEARNT_FROM = LadderSettings(
    shards=2, shard_samples=8, uses=2, varied=0.5, noisy=0.5, asked=2.0, looking=0.1, draws=2, seed=3
)


@pytest.fixture(scope="module", autouse=True)
def few_samples() -> Iterator[None]:
    """Of everything that a stage makes before its first step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.stages.rolling.WINDOW", 2)
        for stage in ("looks", "qformer"):
            patch.setattr(f"trainer.stages.train_{stage}.START_CHUNKS", 1)
            patch.setattr(f"trainer.stages.train_{stage}.HELD_OUT_CHUNKS", 1)
        patch.setattr("trainer.stages.train_mige.START_SAMPLES", 8)
        patch.setattr("trainer.stages.practice.HELD_OUT", 4)
        yield


@pytest.fixture(scope="module")
def state(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A state folder after the stages vae, vit, looks and qformer."""
    folder = tmp_path_factory.mktemp("state")
    known = [concept for concept in concepts if not concept.held_out]
    train_vae(TINY, QUICK, known, folder)
    train_vit(TINY, QUICK, known, folder)
    train_looks(TINY, QUICK, concepts, folder)
    train_qformer(TINY, QUICK, concepts, folder)
    return folder


def _weights(state: Path) -> dict[str, torch.Tensor]:
    return torch.load(state / "mige" / "state.pt", weights_only=True)["average"]


def _copy(state: Path, to: Path) -> Path:
    to.mkdir()
    for name in ("vae", "vit", "looks", "qformer"):
        (to / name).symlink_to(state / name)
    return to


def _maker(state: Path) -> FeatureMaker:
    model = with_trained_encoder(TINY, state)
    return FeatureMaker(TINY, model.vae_encoder, model.image_encoder, load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE))


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    # The rate must not depend on the number of steps, which stands for the moment of the stop.
    whole, parts = _copy(state, tmp_path / "whole"), _copy(state, tmp_path / "parts")
    settings = replace(QUICK, steps=4, decay=0)
    train_mige(TINY, settings, LEARNT_FROM, concepts, whole)
    train_mige(TINY, replace(settings, steps=2), LEARNT_FROM, concepts, parts)
    train_mige(TINY, settings, LEARNT_FROM, concepts, parts)
    expected, actual = _weights(whole), _weights(parts)
    for name, weight in expected.items():
        torch.testing.assert_close(actual[name], weight, rtol=1e-5, atol=1e-7)


def test_a_state_is_gone_on_from_by_the_same_training_alone(
    state: Path, concepts: list[Concept], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(state / "vae", tmp_path / "vae")
    train = partial(train_vae, TINY, concepts=concepts, state=tmp_path)
    with pytest.raises(InputError, match=r"vae was begun with another seed; give the same as before, or another"):
        train(replace(QUICK, rate=1e-2, seed=2))
    (tmp_path / "vae" / "plan.json").unlink()  # as an earlier version left it
    train(replace(QUICK, steps=1, decay=0))
    said = capsys.readouterr().err
    assert "vae was begun by an earlier version" in said and "has 2 steps, and the config's are 1: nothing is" in said
    with pytest.raises(InputError, match="with another seed;"):
        train(replace(QUICK, seed=2))


def test_everything_is_trained_but_the_two_image_encoders(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    folder = _copy(state, tmp_path / "state")
    torch.manual_seed(QUICK.seed)  # as training does, so that both start from the same weights
    start = TrainedPart(with_trained_encoder(TINY, folder)).state_dict()
    train_mige(TINY, replace(QUICK, steps=6, batch=12, rate=1e-2), LEARNT_FROM, concepts, folder)
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
    train_mige(TINY, QUICK, LEARNT_FROM, concepts, folder)
    pipe = MigePipeline.from_pretrained(save(TINY, folder))
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (64, 64)
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
    start, trained = (make(TINY, state).image_encoder.state_dict() for make in (with_trained_vit, with_trained_encoder))
    for name, weight in trained.items():
        if name.startswith(("vision.embeddings", "vision.encoder")):
            assert torch.equal(weight, start[name]), name
    for name in ("projection.weight", "fusion.mlp.weight", "qformer.encoder.layer.0.attention.attention.query.weight"):
        assert not torch.equal(trained[name], start[name]), name


def test_images_are_measured_where_the_module_is(state: Path, concepts: list[Concept]) -> None:
    """Training moves the module to its device, which the device without memory stands for; images are made before."""
    model = with_trained_encoder(TINY, state)
    series, unseen = image_series(model, concepts, 1)
    held_out = unseen.first(1)
    looks, qformer = PatchReaders(model.image_encoder, TINY).to("meta"), PatchReader(model.image_encoder, TINY)
    qformer.to("meta")
    assert all(error.is_meta for error in reading_errors(looks, looks, held_out).values())
    assert all(error.is_meta for error in reading_error(qformer, qformer, held_out))
    assert series.first(1).features.isfinite().all()


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
    maker = _maker(state)
    samples = [make_sample(3, index, concepts, TINY.size) for index in range(8)]
    shard = maker.shard(samples)
    batch = collate([(shard, index) for index in (3, 1, 6)], TINY)
    images = 0
    for b, index in enumerate((3, 1, 6)):
        sample = samples[index]
        pixels = torch.from_numpy(sample.target).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            torch.testing.assert_close(batch.target[b], maker.vae(pixels)[0][0], rtol=1e-2, atol=1e-2)
        assert KIND_NAMES[batch.kinds[b]] == sample.kind
        assert (sample.source is None) == bool((batch.source[b] == 0).all())
        slots = batch.slot_index[b][batch.slot_index[b] >= 0]
        queries = TINY.qformer.queries
        assert slots.tolist() == list(range(images * queries, (images + len(sample.images)) * queries))
        images += len(sample.images)
        share = batch.asked[b, 0].mean().item()
        asked = [sample.after[i].mask for i in sample.asked]
        assert share == pytest.approx((np.any(asked, axis=0) if asked else sample.changed).mean(), abs=0.01)
    assert len(batch.vit) == len(batch.ref_latents) == images


def test_shards_roll_on_and_are_the_same_when_made_again(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    shares = {"again": 1.0}
    shards = RollingShards(tmp_path, _maker(state), concepts, shares, seed=5, samples=4, kept=2, varied=0.0)
    first = [{name: np.array(array) for name, array in shard.items()} for shard in shards.read(1)]
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["shard-000000", "shard-000001"]
    later = shards.read(2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["shard-000001", "shard-000002"]
    assert np.array_equal(later[0]["latents"], first[1]["latents"])
    assert not np.array_equal(later[1]["latents"], first[1]["latents"])
    again = shards.read(1)
    assert all(np.array_equal(again[0][name], array) for name, array in first[0].items())


def test_a_batch_mixes_the_rungs_as_the_ladder_says(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    climb = Climb(tmp_path / "climb.json")
    source = practice(_maker(state), concepts, climb, LEARNT_FROM, tmp_path)
    settings = replace(QUICK, batch=20)
    stream = source.batches(settings, 0, 0, 1)
    kinds = [Counter(KIND_NAMES[kind] for kind in next(stream).kinds)]
    climb.begin_next(1)
    kinds.append(Counter(KIND_NAMES[kind] for kind in next(stream).kinds))
    for newest, of_step in enumerate(kinds):
        expected = counts(newest, 20)
        for rung in (*LADDER[:-1], KEPT_EDITS):
            assert sum(of_step[kind] for kind in rung.shares) == expected.get(rung.name, 0), (newest, rung.name)
    resumed = Climb.resumed(tmp_path / "climb.json", 1)
    same = next(practice(_maker(state), concepts, resumed, LEARNT_FROM, tmp_path).batches(settings, 1, 0, 1))
    assert Counter(KIND_NAMES[kind] for kind in same.kinds) == kinds[1]


def test_the_newest_rung_has_most_of_a_batch_and_older_ones_stay() -> None:
    for newest in range(len(LADDER)):
        of_batch = counts(newest, 40)
        assert sum(of_batch.values()) == 40
        assert all(of_batch[rung.name] > 0 for rung in LADDER[: newest + 1])
        assert not any(of_batch.get(rung.name) for rung in LADDER[newest + 1 :])
        if 0 < newest < len(LADDER) - 1:
            assert of_batch[LADDER[newest].name] == 40 * NEWEST_SHARE


def test_a_climb_that_is_resumed_forgets_what_came_later(tmp_path: Path) -> None:
    climb = Climb(tmp_path / "climb.json")
    climb.begin_next(10)
    climb.begin_next(30)
    assert [climb.newest(step) for step in (0, 9, 10, 29, 30, 99)] == [0, 0, 1, 1, 2, 2]
    first, second = (counts(newest, 20)[LADDER[0].name] for newest in (0, 1))
    assert climb.drawn(LADDER[0].name, 15, 20) == 10 * first + 5 * second
    resumed = Climb.resumed(tmp_path / "climb.json", 20)
    assert resumed.newest(99) == 1 and resumed.drawn(LADDER[0].name, 15, 20) == climb.drawn(LADDER[0].name, 15, 20)


def test_normalising_latents_changes_no_reconstruction(concepts: list[Concept]) -> None:
    torch.manual_seed(0)
    vae = make_vae(TINY.vae)
    encode, decode = VAEEncoder(vae), VAEDecoder(vae)
    images = np.stack([make_sample(0, i, concepts, TINY.size).target for i in range(16)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
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


def test_stages_say_which_stage_they_miss(state: Path, concepts: list[Concept], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="vae and vit first"):
        train_looks(TINY, QUICK, concepts, tmp_path)
    for name, stage in (
        ("looks", partial(train_qformer, TINY, QUICK, concepts)),
        ("qformer", partial(train_mige, TINY, QUICK, LEARNT_FROM, concepts)),
    ):
        folder = _copy(state, tmp_path / name)
        for later in ("looks", "qformer")[("looks", "qformer").index(name) :]:
            (folder / later).unlink()
        with pytest.raises(InputError, match=f"{name} first"):
            stage(folder)
    with pytest.raises(InputError, match="mige first"):
        save(TINY, tmp_path)


def test_samples_are_not_made_before_a_climb_that_decides_which(
    state: Path, concepts: list[Concept], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="before all have begun"):
        make_samples(TINY, QUICK, LEARNT_FROM, concepts, _copy(state, tmp_path / "state"), None, 1)


def test_the_log_tells_steps_samples_hours_and_loss_by_task(
    state: Path, concepts: list[Concept], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.loop.LOG_EVERY", 2)
    folder = _copy(state, tmp_path / "state")
    train_mige(TINY, replace(QUICK, steps=4, batch=16), LEARNT_FROM, concepts, folder)
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

    settings = load_settings(Path(trainer.__file__).parent / "configs" / "reading.toml")
    assert settings.stage("mige").steps > 0 and settings.ladder().shards > 0
    with pytest.raises(InputError, match=r"no table \[vae\]"):
        settings.stage("vae")


@pytest.mark.long
def test_training_goes_on_from_a_model_with_another_number_of_image_tokens(
    state: Path, concepts: list[Concept], tmp_path: Path
) -> None:
    first, second = _copy(state, tmp_path / "first"), tmp_path / "second"
    train_mige(TINY, QUICK, LEARNT_FROM, concepts, first)
    model = save(TINY, first)
    more = replace(TINY, qformer=replace(TINY.qformer, queries=2 * TINY.qformer.queries))
    train_looks(more, QUICK, concepts, second, model)
    train_qformer(more, QUICK, concepts, second, model)
    started, average = with_trained_encoder(more, second, model), _weights(first)
    given = average["module.denoiser.final_layer.linear.weight"].half().float()
    torch.testing.assert_close(started.denoiser.final_layer.linear.weight, given)
    train_mige(more, QUICK, LEARNT_FROM, concepts, second, model)
    assert (second / "tokenizer.json").read_bytes() == (model / TOKENIZER_FILE).read_bytes()
    pipe = MigePipeline.from_pretrained(save(more, second, model))
    assert pipe.config.qformer.queries == more.qformer.queries
    assert pipe("a red apple", num_inference_steps=2).images[0].size == (64, 64)
    with pytest.raises(InputError, match="other sizes than the config's"):
        starting_model(replace(TINY, dit=replace(TINY.dit, depth=3)), second, model)


def _own_patches_read(encoder: ImageEncoder, images: Images) -> float:
    """How much of the latents of its own patches a linear reader explains from each token."""
    with torch.no_grad():
        tokens = encoder.tokens(images.features, images.latents)
    grid, patch = TINY.dit.trained_grid, TINY.dit.patch
    own = patches(images.latents, patch).reshape(len(tokens), tokens.shape[1], -1)  # neighbours stand side by side
    assert grid**2 % tokens.shape[1] == 0
    return ridge(tokens.flatten(0, 1), own.flatten(0, 1))[2]


def test_a_start_that_looks_tells_more_than_a_random_one(state: Path, concepts: list[Concept]) -> None:
    model = with_trained_vit(TINY, state)
    encoder = model.image_encoder
    images = ImageSeries(model, concepts, seed=1, varied=0.0).first(1)
    random = _own_patches_read(encoder, images)
    assert start_qformer(encoder, images.features) > 0.3  # of an untrained ViT's places
    looking = _own_patches_read(encoder, images)
    assert looking > random + 0.1, (looking, random)


def test_half_of_the_heads_start_by_looking_at_their_own_place(state: Path, concepts: list[Concept]) -> None:
    maker = _maker(state)
    batch = all_of(maker, [make_sample(1, index, concepts, TINY.size, {"again": 1}) for index in range(24)])
    module = TrainedPart(with_trained_encoder(TINY, state))
    with torch.no_grad():
        PatchReader(module.image_encoder, TINY).start(Images(torch.zeros(0), batch.ref_latents, batch.vit))
    shares = start_reading(module, batch)
    assert len(shares) == TINY.dit.depth and all(share["queries"] > 0.5 and share["keys"] > 0.5 for share in shares)
    size, looking = TINY.dit.width // TINY.dit.heads, TINY.dit.heads // 2
    noise, timestep = torch.randn_like(batch.target), torch.full((24,), 900)
    asked, keys_from = attention_inputs(module, batch, noise, timestep)
    slots = batch.slot_index[0] >= 0
    grid = TINY.dit.trained_grid
    places = query_places(TINY.qformer.queries, grid)
    for block, linear, x in zip(module.denoiser.blocks, module.conditioner.kv_linears, asked, strict=True):
        assert isinstance(block, Block)
        assert block.cross_attn.proj.weight[:, : looking * size].abs().max() == 0
        query = block.cross_attn.q_linear(x)[..., :size]
        key = linear(keys_from)[..., :size]
        nearest = (query[0] @ key[0][slots].T).argmax(dim=1)
        distance = (places[nearest].mean(dim=1) - patch_centres(grid)).abs().max(dim=1).values
        assert distance.median() <= 2  # of 8 patches


def test_a_code_is_nearest_to_itself() -> None:
    points = patch_centres(8)
    code = fourier_code(points, 8, 32)
    products = code @ code.T
    assert torch.equal(products.argmax(dim=1), torch.arange(64))
    others = products - 2 * torch.diag(products.diagonal())
    assert others.max() < 0.6 * products.diagonal().min()


def test_only_the_stages_that_go_on_from_a_model_take_one(tmp_path: Path) -> None:
    arguments = ["vae", "--start", str(tmp_path), "--assets", str(tmp_path), "--state", str(tmp_path)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2 and "--start means nothing to the stage vae" in result.output


class KnowsTheData(TrainedPart):
    """Predicts what is true inside the left half, and nothing elsewhere."""

    def forward(self, batch: Batch, noisy: Tensor, source: Tensor, timestep: Tensor, has_text: Tensor) -> Tensor:
        alpha, sigma = float(ALPHAS[-1]), float(SIGMAS[-1])
        noise = (noisy - alpha * batch.target) / sigma
        output = super().forward(batch, noisy, source, timestep, has_text)
        output[:] = alpha * noise - sigma * batch.target
        output[..., output.shape[-1] // 2 :] = 0
        return output


def test_a_one_shot_error_is_measured_inside_things_alone(state: Path, concepts: list[Concept]) -> None:
    maker = _maker(state)
    batch = all_of(maker, [make_sample(1, index, concepts, TINY.size, {"again": 1}) for index in range(6)])
    module = KnowsTheData(with_trained_encoder(TINY, state))
    left = batch.asked.clone()
    left[..., left.shape[-1] // 2 :] = 0
    right = batch.asked - left
    assert one_shot(module, replace(batch, asked=left), 0).error == pytest.approx(0, abs=1e-4)
    elsewhere = one_shot(module, replace(batch, asked=right), 0)
    assert elsewhere.error > 0.1 and elsewhere.mean_color > 0 and elsewhere.share > 0.1


def test_a_model_is_measured_rung_by_rung(concepts: list[Concept]) -> None:
    table = measure_rungs(concepts, DEFAULT_MODEL)
    assert list(table.columns[0].cells) == [rung.name for rung in (*LADDER, KEPT_EDITS)]
    shares = [float(str(cell)) for cell in table.columns[3].cells]
    assert 0 < shares[-1] < 1  # recoloring, light and weather are known to the shipped model


def test_attention_is_the_same_in_float32() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 6, 8)
    mask = torch.rand(2, 1, 1, 6) > 0.3
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with Float32Attention(), torch.autocast("cpu", torch.bfloat16):
        result = F.scaled_dot_product_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), attn_mask=mask)
        assert result.dtype == torch.float32
        assert (q.bfloat16() @ k.bfloat16().mT).dtype == torch.bfloat16
    torch.testing.assert_close(result, expected, rtol=0.05, atol=0.05)
