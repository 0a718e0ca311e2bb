"""The denoising loop, for NumPy and torch arrays alike.

B samples, R rows = B x guidance branches, branch-major (row = branch * B + sample); c, h, w the latents' shape.
"""

from collections.abc import Callable
from typing import Protocol

from array_api_compat import array_namespace, device

from engines.interface import Array
from mige_rt.guidance import Branch
from mige_rt.sampler import SolverStep


class Denoiser(Protocol):
    """The graph `denoiser`, whichever engine runs it."""

    def __call__(
        self,
        *,
        latents: Array,  # float32 [R,c,h,w]
        source: Array,  # float32 [R,c,h,w], scaled; zeros where there is no source
        timestep: Array,  # float32 [R]
        cross_kv: Array,  # [2,depth,R,heads,L,head_dim]
        text_mask: Array,  # bool [R,L]
    ) -> Array:  # float32 [R,c,h,w]
        ...


def denoise(
    denoiser: Denoiser,
    noise: Array,
    source: Array | None,
    cross_kv: Array,
    text_mask: Array,
    rows: list[Branch],
    table: list[SolverStep],
    on_step: Callable[[int, int], None] | None = None,
) -> Array:
    """noise float32 [B,c,h,w], source float32 [B,c,h,w] (scaled latents) or None -> latents float32 [B,c,h,w], scaled.

    cross_kv [2,depth,R,heads,L,head_dim] and text_mask [R,L] are those of the R rows. on_step(done, total) is called
    after each step. Raises ValueError when a branch sees a source and there is none.
    """
    if source is None and any(row.source for row in rows):
        raise ValueError("a guidance branch sees a source picture, but source is None")
    xp = array_namespace(noise)
    batch = noise.shape[0]
    blank = xp.zeros_like(noise)
    sources = xp.concat([source if row.source else blank for row in rows])  # [R,c,h,w]
    timesteps = xp.asarray(
        [[step.timestep] * (batch * len(rows)) for step in table], dtype=xp.float32, device=device(noise)
    )  # [steps,R]

    latents, data_before = noise, blank
    for i, step in enumerate(table):
        prediction = denoiser(
            latents=xp.concat([latents] * len(rows)),
            source=sources,
            timestep=timesteps[i],
            cross_kv=cross_kv,
            text_mask=text_mask,
        )  # [R,c,h,w]
        guided = sum(row.weight * prediction[b * batch : (b + 1) * batch] for b, row in enumerate(rows))  # [B,c,h,w]
        data = step.data_from_latents * latents + step.data_from_prediction * guided
        latents = step.keep * latents + step.current * data + step.previous * data_before
        data_before = data
        if on_step is not None:
            on_step(i + 1, len(table))
    return latents
