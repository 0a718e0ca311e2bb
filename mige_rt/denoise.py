"""The denoising loop, for NumPy and torch arrays alike.

B samples, R rows = B x guidance branches, branch-major (row = branch * B + sample); c, h, w the latents' shape.
"""

from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Protocol

from array_api_compat import array_namespace, device

from engines.interface import Array
from mige_rt.guidance import Branch
from mige_rt.scheduler import SolverStep


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


@dataclass(frozen=True)
class Conditions:
    """What does not change between steps: each row's conditions, and what each branch counts for."""

    source: Array  # float32 [R,c,h,w]
    cross_kv: Array  # [2,depth,R,heads,L,head_dim]
    text_mask: Array  # bool [R,L]
    weights: Array  # float32 [branches,1,1,1,1]

    def most_conditioned(self) -> "Conditions":
        """Those of the last branch alone, which is the one that sees most, as the whole prediction."""
        xp, rows = array_namespace(self.source), self.source.shape[0] // self.weights.shape[0]
        return Conditions(
            self.source[-rows:],
            xp.concat([self.cross_kv[:, :, -rows:]]),  # a copy in one piece
            self.text_mask[-rows:],
            xp.ones_like(self.weights[-1:]),
        )


Step = Callable[[Conditions, Array, Array, Array], tuple[Array, Array]]  # see `plain_step`


def plain_step(denoiser: Denoiser) -> Step:
    """One step of the loop: (conditions, latents [B,c,h,w], the data of the step before [B,c,h,w], a row of the
    solver's table [6]) -> (latents, data). All that it reads lies on the engine's device."""

    def step(seen: Conditions, latents: Array, before: Array, row: Array) -> tuple[Array, Array]:
        xp, branches = array_namespace(latents), seen.weights.shape[0]
        prediction = denoiser(
            latents=xp.concat([latents] * branches),
            source=seen.source,
            timestep=row[0] * xp.ones_like(seen.source[:, 0, 0, 0]),
            cross_kv=seen.cross_kv,
            text_mask=seen.text_mask,
        )  # [R,c,h,w]
        guided = xp.sum(seen.weights * xp.reshape(prediction, (branches, *latents.shape)), axis=0)  # [B,c,h,w]
        data = row[1] * latents + row[2] * guided
        return advance(latents, data, before, row), data

    return step


def advance(latents: Array, data: Array, before: Array, row: Array) -> Array:
    """The solver's step to the next time, from the data that are predicted now and were predicted before."""
    return row[3] * latents + row[4] * data + row[5] * before


@dataclass(frozen=True)
class Savings:
    """Savings that change the picture a little; by default there are none.

    guided: guidance is computed in this part of the steps alone, from a first to a last share of them (Kynkaanniemi et
    al., 2024); in the others the most conditioned branch counts alone.
    reuse: the data predicted at the last step that ran the model serve on until the latents have changed by this
    share of their mean magnitude (TeaCache, Liu et al., 2024, on the denoiser as a whole).
    """

    guided: tuple[float, float] = (0.0, 1.0)
    reuse: float = 0.0


def denoise(
    step: Step,
    noise: Array,
    source: Array | None,
    cross_kv: Array,
    text_mask: Array,
    rows: list[Branch],
    table: list[SolverStep],
    on_step: Callable[[int, int], None] | None = None,
    savings: Savings | None = None,
) -> Array:
    """noise float32 [B,c,h,w], source float32 [B,c,h,w] (scaled latents) or None -> latents float32 [B,c,h,w], scaled.

    cross_kv [2,depth,R,heads,L,head_dim] and text_mask [R,L] are those of the R rows. step is `plain_step`'s, or one
    that was captured. on_step(done, total) is called after each step, which the device may still be at. Raises
    ValueError when a branch sees a source and there is none.
    """
    if source is None and any(row.source for row in rows):
        raise ValueError("a guidance branch sees a source picture, but source is None")
    xp, savings = array_namespace(noise), savings or Savings()

    def on_device(values: list) -> Array:
        return xp.asarray(values, dtype=xp.float32, device=device(noise))

    blank = xp.zeros_like(noise)
    every = Conditions(
        source=xp.concat([source if row.source else blank for row in rows]),
        cross_kv=cross_kv,
        text_mask=text_mask,
        weights=on_device([row.weight for row in rows])[:, None, None, None, None],
    )
    first, last = (share * len(table) for share in savings.guided)
    alone = every if len(rows) == 1 or (first <= 0 and last >= len(table)) else every.most_conditioned()
    coefficients = on_device([astuple(one) for one in table])  # [steps,6]

    latents, data, seen_last = noise, blank, None
    for i in range(len(table)):
        if seen_last is not None and i < len(table) - 1 and _change(latents, seen_last) < savings.reuse:
            latents = advance(latents, data, data, coefficients[i])
        else:
            if savings.reuse:
                seen_last = xp.asarray(latents, copy=True)
            latents, data = step(every if first <= i < last else alone, latents, data, coefficients[i])
        if on_step is not None:
            on_step(i + 1, len(table))
    return latents


def _change(latents: Array, before: Array) -> float:
    """How far the latents are from what they were, relative to their mean magnitude. Waits for the device."""
    xp = array_namespace(latents)
    return float(xp.mean(xp.abs(latents - before)) / xp.mean(xp.abs(before)))
