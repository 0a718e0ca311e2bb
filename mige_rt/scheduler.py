"""The noise schedule, the solver as a table of coefficients, and the noise that an image starts from.

Times run from 0 (data) to 1 (noise). At a time the noisy latents are x = alpha * data + sigma * noise, where
alpha^2 + sigma^2 = 1 and lambda = log(alpha / sigma). All of it is float64, made once per run, and knows no torch.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from mige_rt.config import Prediction, SchedulerName
from mige_rt.errors import InputError

TRAIN_STEPS = 1000  # discrete times the model is trained at; timestep i is the time (i + 1) / TRAIN_STEPS
BETAS: NDArray[np.float64] = np.linspace(1e-4, 2e-2, TRAIN_STEPS)  # variance added at each of them
LOG_ALPHAS: NDArray[np.float64] = 0.5 * np.cumsum(np.log1p(-BETAS))
ALPHAS: NDArray[np.float64] = np.exp(LOG_ALPHAS)  # what is left of the data, as a factor
SIGMAS: NDArray[np.float64] = np.sqrt(-np.expm1(2 * LOG_ALPHAS))  # the noise's factor

FEW_STEPS = 10  # below this number the last step is first order, for stability


class SchedulerStep(NamedTuple):
    """The coefficients of one step of the solver, from latents x and the model's prediction at `timestep`.

    data = data_from_latents * x + data_from_prediction * prediction
    next x = keep * x + current * data + previous * (data of the step before)

    Floats in a schedule; in the loop, scalars on the engine's device, by the same names.
    """

    timestep: Any  # what the model receives, TRAIN_STEPS - 1 down to 0, a fraction in between
    data_from_latents: Any
    data_from_prediction: Any
    keep: Any
    current: Any
    previous: Any  # 0 on a first-order step


def make_schedule(scheduler: SchedulerName, num_inference_steps: int, prediction: Prediction) -> list[SchedulerStep]:
    """A solver as a table of model evaluations at times uniform from 1 to 1/1000.

    Args:
        scheduler: dpm_solver_pp_2m: DPM-Solver++(2M) (Lu et al., 2022, algorithm 2), the published one. ddim: DDIM
            without noise (Song et al., 2021, equation 12), which is its first order.
        num_inference_steps: 2 to 1000; one evaluation each.
        prediction: What the model gives: the noise (epsilon), or v = alpha * noise - sigma * data (Salimans & Ho,
            2022).

    Raises:
        InputError: The number of steps is out of range, or there is no such scheduler.
    """
    if scheduler not in get_args(SchedulerName):
        raise InputError(f"there is no scheduler {scheduler!r}; expected one of {', '.join(get_args(SchedulerName))}")
    steps = num_inference_steps
    if not 2 <= steps <= TRAIN_STEPS:
        raise InputError(
            f"the number of steps is {steps}; at least 2 and at most {TRAIN_STEPS} are possible, "
            "20 to 60 make a good image"
        )
    times = np.linspace(1, 1 / TRAIN_STEPS, steps + 1)
    log_alpha = np.interp(times, np.arange(1, TRAIN_STEPS + 1) / TRAIN_STEPS, LOG_ALPHAS)
    alpha, sigma = np.exp(log_alpha), np.sqrt(-np.expm1(2 * log_alpha))
    lambda_ = log_alpha - np.log(sigma)
    h = np.diff(lambda_)

    schedule: list[SchedulerStep] = []
    for i in range(steps):
        if prediction == "epsilon":
            data_from_latents, data_from_prediction = 1 / alpha[i], -sigma[i] / alpha[i]
        else:
            data_from_latents, data_from_prediction = alpha[i], -sigma[i]
        first_order = scheduler == "ddim" or i == 0 or (i == steps - 1 and steps < FEW_STEPS)
        # D = data + (data - data before) / (2 r), r = h[i - 1] / h[i]
        extrapolation = 0.0 if first_order else h[i] / (2 * h[i - 1])
        gain = -alpha[i + 1] * np.expm1(-h[i])
        schedule.append(
            SchedulerStep(
                timestep=float((times[i] - 1 / TRAIN_STEPS) * TRAIN_STEPS),
                data_from_latents=float(data_from_latents),
                data_from_prediction=float(data_from_prediction),
                keep=float(sigma[i + 1] / sigma[i]),
                current=float(gain * (1 + extrapolation)),
                previous=float(-gain * extrapolation),
            )
        )
    return schedule


def draw_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Standard normal noise for a batch of images.

    Each image has a generator of its own (NumPy's Philox), so its noise depends on its seed and shape alone.

    Args:
        seeds: One for each of the B images.
        shape: (c, h, w), an image's latent shape.

    Returns:
        float32 [B,c,h,w]

    Raises:
        InputError: A seed is negative.
    """
    for seed in seeds:
        if seed < 0:
            raise InputError(f"the seed is {seed}; a whole number of 0 or more is expected")
    noise = [np.random.Generator(np.random.Philox(seed)).standard_normal(shape, dtype=np.float32) for seed in seeds]
    return np.stack(noise)
