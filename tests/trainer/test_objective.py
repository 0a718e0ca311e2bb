"""The training objective: the published one's recorded losses, and what its terms mean."""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mige_rt.config import PRESETS, ModelConfig
from mige_rt.scheduler import ALPHAS, SIGMAS
from trainer.objective import add_noise, data_prediction, objective, prediction_error, variance_bound

sys.path.insert(0, str(Path(__file__).parents[1] / "reference"))
from made_up import normal

TESTS = Path(__file__).parents[1]
RECORDED = json.loads((TESTS / "data" / "reference" / "loss.json").read_text(encoding="utf-8"))
PUBLISHED, TINY = PRESETS["reduced"], PRESETS["tiny"]
ALL_TIMESTEPS = torch.tensor([entry["t"] for entry in RECORDED])


def drawn(timestep: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Output, latents, noise and timestep of the recorded losses."""
    shapes = {"out": (2, 8, 8, 8), "x": (2, 4, 8, 8), "noise": (2, 4, 8, 8)}
    output, latents, noise = (torch.from_numpy(normal(f"loss.{k}.{timestep}", shape)) for k, shape in shapes.items())
    return output, latents, noise, torch.tensor([timestep, timestep])


@pytest.mark.parametrize("entry", RECORDED, ids=lambda entry: f"t={entry['t']}")
def test_the_published_objective_is_matched(entry: dict) -> None:
    given = drawn(entry["t"])
    for part, name in ((prediction_error, "mse"), (variance_bound, "vb"), (objective, "loss")):
        np.testing.assert_allclose(part(PUBLISHED, *given), entry[name], rtol=1e-5)


def test_a_batch_of_mixed_timesteps_gives_each_sample_its_own_loss() -> None:
    output, latents, noise = (torch.cat([drawn(e["t"])[i][:1] for e in RECORDED]) for i in range(3))
    losses = objective(PUBLISHED, output, latents, noise, ALL_TIMESTEPS)
    assert losses.shape == (6,)
    np.testing.assert_allclose(losses, [entry["loss"][0] for entry in RECORDED], rtol=1e-5)


@pytest.mark.parametrize("timestep", [0, 1, 500])
def test_the_bound_trains_the_variance_and_nothing_else(timestep: int) -> None:
    output, *others = drawn(timestep)
    output.requires_grad_()
    (bound_gradient,) = torch.autograd.grad(variance_bound(PUBLISHED, output, *others).sum(), output)
    assert (bound_gradient[:, :4] == 0).all()
    assert (bound_gradient[:, 4:] != 0).any()
    (gradient,) = torch.autograd.grad(objective(PUBLISHED, output, *others).sum(), output)
    assert (gradient[:, :4] != 0).any()
    torch.testing.assert_close(gradient[:, 4:], bound_gradient[:, 4:])


def test_the_bound_is_zero_for_the_true_noise_and_variance() -> None:
    latents, noise = drawn(500)[1:3]
    timestep = torch.tensor([500, 900])
    exact = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # -1: the lower end of the variance's range
    np.testing.assert_allclose(variance_bound(PUBLISHED, exact, latents, noise, timestep), 0, atol=1e-6)
    other = torch.cat([noise, torch.ones_like(noise)], dim=1)
    assert (variance_bound(PUBLISHED, other, latents, noise, timestep) > 0).all()


def test_both_predictions_of_the_same_data_have_the_same_bound() -> None:
    output, latents, noise, timestep = drawn(250)
    alpha, sigma = ALPHAS[250], SIGMAS[250]
    noisy = add_noise(latents, noise, timestep)
    data = (noisy - sigma * output[:, :4]) / alpha
    velocity = torch.cat([alpha * output[:, :4] - sigma * data, output[:, 4:]], dim=1)
    as_velocity = dataclasses.replace(PUBLISHED, prediction="v_prediction")
    torch.testing.assert_close(
        variance_bound(as_velocity, velocity, latents, noise, timestep),
        variance_bound(PUBLISHED, output, latents, noise, timestep),
        rtol=1e-4,
        atol=0,
    )


@pytest.mark.parametrize("timestep", [0, 17, 999])
def test_velocity_is_what_the_scheduler_turns_into_data(timestep: int) -> None:
    _, latents, noise, timesteps = drawn(timestep)
    noisy = add_noise(latents, noise, timesteps)
    velocity = (ALPHAS[timestep] * noisy - latents) / SIGMAS[timestep]  # solves data = alpha noisy - sigma v
    losses = objective(TINY, velocity.float(), latents, noise, timesteps)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_allclose(objective(TINY, velocity.float() + 2, latents, noise, timesteps), 4, rtol=1e-3)


def test_noise_is_added_by_the_schedule() -> None:
    one = torch.ones(6, 4, 2, 2)
    np.testing.assert_allclose(add_noise(one, 0 * one, ALL_TIMESTEPS)[:, 0, 0, 0], ALPHAS[ALL_TIMESTEPS], rtol=1e-6)
    np.testing.assert_allclose(add_noise(0 * one, one, ALL_TIMESTEPS)[:, 0, 0, 0], SIGMAS[ALL_TIMESTEPS], rtol=1e-6)


@pytest.mark.parametrize("config", [PUBLISHED, TINY], ids=lambda config: config.prediction)
def test_losses_in_half_precision_are_summed_in_float32(config) -> None:
    output, latents, noise, timestep = drawn(250)
    output = output[:, : 8 if config.learned_variance else 4]
    expected = objective(config, output, latents, noise, timestep)
    losses = objective(config, output.bfloat16(), latents.bfloat16(), noise.bfloat16(), timestep)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, expected, rtol=5e-3, atol=0)


def test_a_weight_says_where_the_prediction_counts() -> None:
    output, latents, noise, timestep = drawn(500)
    weight = torch.zeros(2, 1, 8, 8)
    weight[0, :, :4] = 2
    losses = prediction_error(PUBLISHED, output, latents, noise, timestep, weight)
    assert losses[1] == 0
    output[:, :, 4:] += 1
    torch.testing.assert_close(prediction_error(PUBLISHED, output, latents, noise, timestep, weight), losses)
    output[:, :, :4] += 1
    assert prediction_error(PUBLISHED, output, latents, noise, timestep, weight)[0] != losses[0]


@pytest.mark.parametrize("config", [PUBLISHED, TINY], ids=lambda config: config.prediction)
def test_the_true_output_speaks_of_the_data(config: ModelConfig) -> None:
    _, latents, noise, timestep = drawn(700)
    alpha, sigma = float(ALPHAS[700]), float(SIGMAS[700])
    output = noise if config.prediction == "epsilon" else alpha * noise - sigma * latents
    some = dataclasses.replace(config, vae=dataclasses.replace(config.vae, channels=4))
    data = data_prediction(some, output, add_noise(latents, noise, timestep), timestep)
    torch.testing.assert_close(data, latents, rtol=1e-3, atol=1e-3)
