"""Where attention should look: the world's truth of it, and the loss that teaches it."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mige_rt.bundle import DEFAULT_MODEL, TOKENIZER_FILE
from mige_rt.config import PRESETS
from mige_rt.tokenizer import load_tokenizer
from trainer.checkpoints.model_folder import load_model
from trainer.model.dit import Block, CrossAttention
from trainer.objective import add_noise
from trainer.stages.features import Batch, FeatureMaker
from trainer.stages.looking import Look, Watch, looking_loss, places_to_look, share_looked_right
from trainer.stages.practice import all_of
from trainer.stages.reading import query_places
from trainer.stages.trained_part import TrainedPart
from trainer.synthetic.concepts import Concept
from trainer.synthetic.sample import Sample
from trainer.synthetic.tasks import make_sample

TINY = PRESETS["tiny"]
SHOWN = ("again", "generate", "add", "replace", "move", "resize", "remove", "recolour")


@pytest.fixture(scope="module")
def module() -> TrainedPart:
    return TrainedPart(load_model(DEFAULT_MODEL).float())


@pytest.fixture(scope="module")
def batch(module: TrainedPart, concepts: list[Concept]) -> Batch:
    vae = load_model(DEFAULT_MODEL).vae_encoder.float()
    tokenize = load_tokenizer(DEFAULT_MODEL / TOKENIZER_FILE)
    maker = FeatureMaker(module.config, vae, deepcopy(module.image_encoder), tokenize)
    samples = [make_sample(2, i, concepts, TINY.size, {kind: 1}) for i, kind in enumerate(SHOWN)]
    return all_of(maker, samples)


def _error_of_what_is_shown(sample: Sample, moved: int) -> float:
    """Of the pixels in subjects, read where their origins say, `moved` pixels to the right."""
    side, errors = TINY.size, []
    for mark in sample.after:
        if mark.origin is not None:
            y, x = np.nonzero(mark.mask)
            points = [
                np.clip((mark.origin.scale * (at + 0.5) / side + shift) * side + by, 0, side - 1).astype(int)
                for at, shift, by in ((x, mark.origin.shift[0], moved), (y, mark.origin.shift[1], 0))
            ]
            seen = sample.images[mark.origin.image][points[1], points[0]]
            errors.append(np.abs(seen.astype(float) - sample.target[y, x]).mean())
    return float(np.mean(errors))


@pytest.mark.parametrize("kind", [kind for kind in SHOWN if kind not in ("generate",)] + ["generate_several"])
def test_an_origin_says_where_an_image_shows_the_same(concepts: list[Concept], kind: str) -> None:
    samples = [make_sample(1, index, concepts, TINY.size, {kind: 1}) for index in range(40)]
    # But for light and weather, which change colours; some samples of "remove" have nothing left.
    shown = [sample for sample in samples if any(mark.origin is not None for mark in sample.after)]
    right, wrong = (np.median([_error_of_what_is_shown(sample, moved) for sample in shown]) for moved in (0, 6))
    assert len(shown) >= 10
    assert right < 0.5 * wrong, (right, wrong)


def test_heads_look_at_their_points(batch: Batch) -> None:
    heads = 3
    places = query_places(TINY.qformer.queries, 8).mean(dim=1)
    for column in (-1 / 3, 0.0, 1 / 3):
        shares, positions = places_to_look(batch, TINY, heads, column)
        assert positions.any(dim=1).sum() >= len(SHOWN) - 1  # of what was removed, nothing is to be seen
        assert torch.equal(positions, batch.origin_image.flatten(1) >= 0)
        for b, position in positions.nonzero().tolist():
            slots = batch.slot_index[b]
            x, y, high = batch.origin[b].reshape(-1, 3)[position].tolist()
            for head, share in enumerate(shares[b, :, position]):
                looked_at = slots[share > 0]
                assert (looked_at // TINY.qformer.queries == batch.origin_image[b].flatten()[position]).all()
                mean = (share[share > 0, None] * places[looked_at % TINY.qformer.queries]).sum(dim=0)
                point = (x + column * high, y + ((head + 0.5) / heads - 0.5) * high)
                expected = torch.tensor([min(max(point[0], 1), 7), min(max(point[1], 0.5), 7.5)])
                torch.testing.assert_close(mean, expected, atol=2e-3, rtol=0)


def _looks(module: TrainedPart, batch: Batch) -> list[Look]:
    """Of two draws of noise."""
    timestep = torch.full((2 * len(batch.target),), 900)
    target, source = batch.target.repeat(2, 1, 1, 1), batch.source.repeat(2, 1, 1, 1)
    torch.manual_seed(0)
    noisy = add_noise(target, torch.randn_like(target), timestep)
    with Watch().of(module.denoiser) as watch:
        module(batch, noisy, source, timestep, torch.ones(len(target), dtype=torch.bool))
    return watch.looks


def _loss(module: TrainedPart, batch: Batch, counted: torch.Tensor) -> torch.Tensor:
    return looking_loss(_looks(module, batch), batch, module.config, counted)


def test_only_attention_at_the_right_place_counts(module: TrainedPart, batch: Batch) -> None:
    """Keys that are their tokens' numbers, one hot, and queries that ask for some."""
    looks = [replace(look, x=look.x[: len(batch.target)].clone()) for look in _looks(module, batch)]
    places = [places_to_look(batch, TINY, 3, column)[0] for column in (-1 / 3, 0.0, 1 / 3)]
    tokens = places[0].shape[-1]
    for wrong, expected in ((0, 1.0), (1, 0.0)):
        asked = []
        for look, wanted in zip(looks, places, strict=True):
            attention = CrossAttention(6 * tokens, 6)
            torch.nn.init.eye_(attention.q_linear.weight)
            torch.nn.init.zeros_(attention.q_linear.bias)
            chosen = (wanted.argmax(dim=3) + wrong * 16) % tokens
            question = F.one_hot(chosen, tokens).float() * 1e4  # [B,3,T,L]
            x = torch.cat([question, question], dim=1).transpose(1, 2).flatten(2)
            k = torch.eye(tokens).expand(len(x), 6, -1, -1)
            asked.append(Look(attention, x, k, torch.ones_like(look.mask[: len(x)])))
        with torch.no_grad():
            share = float(share_looked_right(asked, batch, TINY))
        assert share == pytest.approx(expected, abs=1e-3)


def test_a_few_steps_teach_half_of_the_heads_where_to_look(module: TrainedPart, batch: Batch) -> None:
    learner = deepcopy(module)
    everyone = torch.ones(2 * len(batch.target), dtype=torch.bool)
    first = _loss(learner, batch, everyone)
    first.backward()
    width = TINY.dit.width
    for number, block in enumerate(learner.denoiser.blocks):
        assert isinstance(block, Block)
        gradient = block.cross_attn.q_linear.weight.grad
        if number < TINY.dit.depth // 2:  # reached through later blocks only
            continue
        assert gradient is not None and gradient[width // 2 :].abs().max() > 0
        if number == TINY.dit.depth - 1:
            assert gradient[: width // 2].abs().max() == 0  # these look at their own place
    optimiser = torch.optim.Adam(learner.denoiser.parameters(), lr=1e-3)
    for _ in range(6):
        optimiser.zero_grad()
        _loss(learner, batch, everyone).backward()
        optimiser.step()
    assert _loss(learner, batch, everyone) < 0.8 * first


def test_what_lacks_its_text_or_source_does_not_count(module: TrainedPart, batch: Batch) -> None:
    counted = torch.zeros(2 * len(batch.target), dtype=torch.bool)
    with torch.no_grad():
        assert float(_loss(module, batch, counted)) == 0
        counted[3] = True
        one = float(_loss(module, batch, counted))
        counted[3 + len(batch.target)] = True  # the other draw of the same sample, at other noise
        two = float(_loss(module, batch, counted))
    assert one > 0 and two != one
