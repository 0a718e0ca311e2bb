from typing import Any

import numpy as np
import pytest
import torch

from mige_rt.denoise import Conditioning, denoise, denoising_step, schedule_rows
from mige_rt.guidance import branches
from mige_rt.scheduler import draw_noise, make_schedule

SHAPE = (4, 6, 5)


class Elementwise:
    """A denoiser whose every entry depends on all that it is given, and which keeps what it was called with."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def __call__(self, *, latents: Any, source: Any, timestep: Any, cross_kv: Any, text_mask: Any) -> Any:
        self.calls.append({"latents": latents, "source": source, "timestep": timestep})
        text = (cross_kv[0, 0, :, 0, :, 0] * text_mask).sum(1)  # [R]
        return (
            0.3 * latents
            + 0.2 * source
            + (text + timestep * 1e-3)[:, None, None, None] * latents / (1 + latents * latents)
        )


def conditions(batch: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    text_mask = rng.random((batch, 3)) < 0.7
    return rng.standard_normal((2, 1, batch, 1, 3, 2), dtype=np.float32), text_mask


def run(scales: tuple[float, float | None], seeds: list[int], steps: int = 6) -> tuple[np.ndarray, Elementwise]:
    guidance, denoiser = branches(*scales), Elementwise()
    noise, source = draw_noise(seeds, SHAPE), draw_noise([s + 100 for s in seeds], SHAPE)
    given = None if scales[1] is None else source
    schedule = make_schedule("dpm_solver_pp_2m", steps, "v_prediction")
    conditioning = Conditioning(given, *conditions(len(guidance) * len(seeds)))
    rows = schedule_rows(schedule, noise)
    return np.asarray(denoise(denoising_step(denoiser), noise, conditioning, guidance, rows)), denoiser


@pytest.mark.parametrize("scales", [(5.0, 1.6), (5.0, 1.0), (7.0, None)])
def test_numpy_and_torch_give_the_same_latents(scales: tuple[float, float | None]) -> None:
    guidance = branches(*scales)
    noise, source = draw_noise([1, 2], SHAPE), draw_noise([3, 4], SHAPE)
    given = None if scales[1] is None else source
    cross_kv, text_mask = conditions(2 * len(guidance))
    schedule = make_schedule("dpm_solver_pp_2m", 12, "epsilon")
    from_numpy = denoise(
        denoising_step(Elementwise()),
        noise,
        Conditioning(given, cross_kv, text_mask),
        guidance,
        schedule_rows(schedule, noise),
    )
    from_torch = denoise(
        denoising_step(Elementwise()),
        torch.from_numpy(noise),
        Conditioning(
            None if given is None else torch.from_numpy(given),
            torch.from_numpy(cross_kv),
            torch.from_numpy(text_mask),
        ),
        guidance,
        schedule_rows(schedule, torch.from_numpy(noise)),
    )
    assert isinstance(from_numpy, np.ndarray) and from_numpy.dtype == np.float32
    assert np.isfinite(from_numpy).all()
    assert isinstance(from_torch, torch.Tensor) and from_torch.dtype == torch.float32
    np.testing.assert_allclose(from_torch.numpy(), from_numpy, rtol=1e-4, atol=1e-5)


def test_the_loop_is_guidance_and_solver() -> None:
    """Against the same run written out branch by branch in float64."""
    guidance, schedule = branches(5.0, 1.6), make_schedule("dpm_solver_pp_2m", 5, "v_prediction")
    noise, source = draw_noise([1, 2], SHAPE), draw_noise([3, 4], SHAPE)
    cross_kv, text_mask = conditions(6)
    got = denoise(
        denoising_step(Elementwise()),
        noise,
        Conditioning(source, cross_kv, text_mask),
        guidance,
        schedule_rows(schedule, noise),
    )

    for sample in range(2):
        x, before = noise[sample : sample + 1].astype(np.float64), 0.0
        for step in schedule:
            guided = 0.0
            for branch, (sees_source, weight) in enumerate([(0, 1 - 1.6), (1, 1.6 - 5.0), (1, 5.0)]):
                row = slice(branch * 2 + sample, branch * 2 + sample + 1)
                guided = guided + weight * Elementwise()(
                    latents=x,
                    source=sees_source * source[sample : sample + 1],
                    timestep=np.array([step.timestep]),
                    cross_kv=cross_kv[:, :, row],
                    text_mask=text_mask[row],
                )
            data = step.data_from_latents * x + step.data_from_prediction * guided
            x = step.keep * x + step.current * data + step.previous * before
            before = data
        np.testing.assert_allclose(got[sample], x[0], rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scales", "sees_source"), [((5.0, 1.6), [0, 1, 1]), ((5.0, 1.0), [1, 1]), ((7.0, None), [0, 0])]
)
def test_the_batch_is_branch_major_and_see_the_source_they_should(scales, sees_source: list[int]) -> None:
    _, denoiser = run(scales, seeds=[1, 2])
    source = draw_noise([101, 102], SHAPE)
    for call in denoiser.calls:
        expected = np.concatenate([seen * source for seen in sees_source])
        np.testing.assert_array_equal(call["source"], expected)
        latents = call["latents"].reshape(len(sees_source), 2, *SHAPE)
        assert (latents == latents[0]).all()
    np.testing.assert_array_equal(denoiser.calls[0]["latents"][:2], draw_noise([1, 2], SHAPE))


def test_the_model_is_called_once_a_step_with_the_solvers_timesteps() -> None:
    _, denoiser = run((5.0, 1.0), seeds=[1, 2, 3], steps=7)
    timesteps = np.stack([call["timestep"] for call in denoiser.calls])
    assert timesteps.shape == (7, 6) and timesteps.dtype == np.float32
    np.testing.assert_allclose(timesteps[:, 0], 999 - 999 / 7 * np.arange(7), rtol=1e-6)
    assert (timesteps == timesteps[:, :1]).all()


def test_a_sample_does_not_depend_on_its_batch() -> None:
    guidance, schedule = branches(5.0, 1.6), make_schedule("dpm_solver_pp_2m", 6, "v_prediction")
    cross_kv, text_mask = conditions(12)
    noise, source = draw_noise([1, 2, 3, 4], SHAPE), draw_noise([5, 6, 7, 8], SHAPE)
    together = denoise(
        denoising_step(Elementwise()),
        noise,
        Conditioning(source, cross_kv, text_mask),
        guidance,
        schedule_rows(schedule, noise),
    )
    for i in range(4):
        mine = slice(i, None, 4)
        alone = denoise(
            denoising_step(Elementwise()),
            noise[i : i + 1],
            Conditioning(source[i : i + 1], cross_kv[:, :, mine], text_mask[mine]),
            guidance,
            schedule_rows(schedule, noise),
        )
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-5)


def test_progress_is_reported_after_each_step_and_inputs_are_left_as_they_were() -> None:
    noise = draw_noise([1], SHAPE)
    before, reported = noise.copy(), []
    guidance = branches(7.0, None)
    schedule = make_schedule("dpm_solver_pp_2m", 3, "epsilon")
    denoise(
        denoising_step(Elementwise()),
        noise,
        Conditioning(None, *conditions(2)),
        guidance,
        schedule_rows(schedule, noise),
        on_step_end=lambda step, latents: reported.append((step, latents.shape)),
    )
    assert reported == [(0, noise.shape), (1, noise.shape), (2, noise.shape)]
    np.testing.assert_array_equal(noise, before)


def test_a_source_that_is_missing_is_an_error() -> None:
    with pytest.raises(ValueError, match="source"):
        denoise(
            denoising_step(Elementwise()),
            draw_noise([1], SHAPE),
            Conditioning(None, *conditions(2)),
            branches(5.0, 1.0),
            schedule_rows(make_schedule("dpm_solver_pp_2m", 2, "epsilon"), draw_noise([1], SHAPE)),
        )


def test_latents_that_the_callback_returns_are_gone_on_with() -> None:
    noise, schedule = draw_noise([1], SHAPE), make_schedule("ddim", 3, "epsilon")
    other = draw_noise([2], SHAPE)
    guidance, conditioning = branches(7.0, None), Conditioning(None, *conditions(2))
    latents = denoise(
        denoising_step(Elementwise()),
        noise,
        conditioning,
        guidance,
        schedule_rows(schedule, noise),
        on_step_end=lambda step, latents: other if step == 1 else None,
    )
    last = denoise(denoising_step(Elementwise()), other, conditioning, guidance, schedule_rows(schedule[2:], noise))
    np.testing.assert_array_equal(latents, last)
