from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from mige_rt.errors import InputError
from mige_rt.scheduler import ALPHAS, BETAS, SIGMAS, TRAIN_STEPS, draw_noise, make_schedule

NOISE_OF_SEED_0 = [-0.2482292, -0.02676702, -1.944416]
MEAN, DEVIATION = 0.3, 0.5  # of data for which the best prediction, and the exact path of every sample, are known


def schedule_at(timestep: float) -> tuple[float, float]:
    """Alpha and sigma at a timestep between the discrete ones."""
    alpha = float(np.exp(np.interp(timestep, np.arange(TRAIN_STEPS), np.log(ALPHAS))))
    return alpha, (1 - alpha**2) ** 0.5


def best_data(x: NDArray[np.float64], alpha: float, sigma: float) -> NDArray[np.float64]:
    """The expected data behind noisy x."""
    share = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + sigma**2)
    return MEAN + share * (x - alpha * MEAN)


def noise_of(x: NDArray[np.float64], timestep: float) -> NDArray[np.float64]:
    alpha, sigma = schedule_at(timestep)
    return (x - alpha * best_data(x, alpha, sigma)) / sigma


def velocity_of(x: NDArray[np.float64], timestep: float) -> NDArray[np.float64]:
    alpha, sigma = schedule_at(timestep)
    return alpha * noise_of(x, timestep) - sigma * best_data(x, alpha, sigma)


def solve(steps: int, kind, predict: Callable[[NDArray[np.float64], float], NDArray[np.float64]]):
    """The start and the end of a run with a model that gives the best prediction."""
    start = x = np.array([-1.3, 0.2, 1.7])
    before = np.zeros(3)
    for step in make_schedule("dpm_solver_pp_2m", steps, kind):
        data = step.data_from_latents * x + step.data_from_prediction * predict(x, step.timestep)
        x = step.keep * x + step.current * data + step.previous * before
        before = data
    return start, x


def error(steps: int) -> float:
    """How far a run ends from the exact solution, on which (x - alpha MEAN) / deviation(x) never changes."""
    start, end = solve(steps, "epsilon", noise_of)
    invariant = [
        (x - alpha * MEAN) / np.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
        for x, (alpha, sigma) in ((start, schedule_at(999)), (end, schedule_at(0)))
    ]
    return float(np.abs(invariant[1] - invariant[0]).max())


def test_the_solver_converges_to_the_exact_solution_at_second_order() -> None:
    errors = [error(steps) for steps in (100, 200, 400, 800)]
    assert errors[-1] < 1e-3
    for coarse, fine in pairwise(errors):
        assert 3.5 < coarse / fine < 4.7


@pytest.mark.parametrize("steps", [2, 9, 10, 25])
def test_noise_and_velocity_predictions_lead_to_the_same_picture(steps: int) -> None:
    _, from_noise = solve(steps, "epsilon", noise_of)
    _, from_velocity = solve(steps, "v_prediction", velocity_of)
    np.testing.assert_allclose(from_velocity, from_noise, rtol=1e-12)


def test_timesteps_are_uniform_fractions_and_the_end_is_the_first_discrete_time() -> None:
    timesteps = [step.timestep for step in make_schedule("dpm_solver_pp_2m", 8, "epsilon")]
    np.testing.assert_allclose(timesteps, 999 - 999 / 8 * np.arange(8))
    # A model sure of data d at every step ends at alpha d plus what is left of the start's noise.
    x = SIGMAS[-1]
    for step in make_schedule("dpm_solver_pp_2m", 8, "epsilon"):
        x = step.keep * x
    assert x == pytest.approx(SIGMAS[0])


@pytest.mark.parametrize("steps", [2, 5, 9, 10, 50])
def test_data_that_does_not_change_is_reached_exactly(steps: int) -> None:
    x, before = ALPHAS[-1] * 2.0 + SIGMAS[-1] * 0.4, 0.0
    for step in make_schedule("dpm_solver_pp_2m", steps, "epsilon"):
        x, before = step.keep * x + step.current * 2.0 + step.previous * before, 2.0
    assert x == pytest.approx(ALPHAS[0] * 2.0 + SIGMAS[0] * 0.4)


def test_only_runs_below_ten_steps_end_at_first_order() -> None:
    for steps, first_order in ((2, {0, 1}), (9, {0, 8}), (10, {0}), (20, {0})):
        table = make_schedule("dpm_solver_pp_2m", steps, "epsilon")
        assert len(table) == steps
        assert {i for i, step in enumerate(table) if step.previous == 0} == first_order


def test_the_schedule_is_the_published_one() -> None:
    assert (BETAS[0], BETAS[-1], len(BETAS)) == (1e-4, 2e-2, 1000)
    np.testing.assert_allclose(ALPHAS**2, np.cumprod(1 - BETAS), rtol=1e-10)
    np.testing.assert_allclose(ALPHAS**2 + SIGMAS**2, 1, rtol=1e-12)


def test_coefficients_do_not_widen_float32_latents() -> None:
    step = make_schedule("dpm_solver_pp_2m", 4, "v_prediction")[1]
    x = np.ones(1, dtype=np.float32)
    for coefficient in (step.data_from_latents, step.data_from_prediction, step.keep, step.current, step.previous):
        assert (coefficient * x).dtype == np.float32


@pytest.mark.parametrize("steps", [1, 0, -3])
def test_too_few_steps_are_refused(steps: int) -> None:
    with pytest.raises(InputError, match=str(steps)):
        make_schedule("dpm_solver_pp_2m", steps, "epsilon")


def test_noise_depends_on_its_seed_alone() -> None:
    together = draw_noise([7, 8, 9], (4, 8, 6))
    assert together.shape == (3, 4, 8, 6) and together.dtype == np.float32
    np.testing.assert_array_equal(together[1:2], draw_noise([8], (4, 8, 6)))
    assert not np.array_equal(together[0], together[1])


def test_noise_is_standard_normal_and_stays_what_it_was() -> None:
    noise = draw_noise([0], (4, 64, 64))
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    # Pictures made with a seed can be made again with a later version.
    np.testing.assert_allclose(noise[0, 0, 0, :3], NOISE_OF_SEED_0, rtol=1e-6)


def test_negative_seeds_are_refused() -> None:
    with pytest.raises(InputError, match="-1"):
        draw_noise([3, -1], (4, 8, 8))


def test_ddim_is_the_update_of_its_paper() -> None:
    """Song et al., 2021, equation 12, with the noise that the prediction implies, in float64."""
    rng = np.random.default_rng(0)
    x, prediction = rng.standard_normal(7), rng.standard_normal(7)
    steps = make_schedule("ddim", 9, "epsilon")
    times = np.linspace(1, 1 / TRAIN_STEPS, 10)
    alpha = np.exp(np.interp(times, np.arange(1, TRAIN_STEPS + 1) / TRAIN_STEPS, np.log(ALPHAS)))
    sigma = np.sqrt(1 - alpha**2)
    for i, step in enumerate(steps):
        data = step.data_from_latents * x + step.data_from_prediction * prediction
        expected = alpha[i + 1] * (x - sigma[i] * prediction) / alpha[i] + sigma[i + 1] * prediction
        np.testing.assert_allclose(step.keep * x + step.current * data, expected, rtol=1e-6)
        assert step.previous == 0


def test_a_solver_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match="no scheduler 'euler'"):
        make_schedule("euler", 9, "epsilon")  # type: ignore[arg-type]
