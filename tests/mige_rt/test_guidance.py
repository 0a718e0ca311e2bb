import math

import numpy as np
import pytest

from mige_rt.errors import InputError
from mige_rt.guidance import Branch, branches


@pytest.mark.parametrize(
    ("guidance_scale", "image_guidance_scale"), [(5.0, 1.6), (5.0, 1.0), (0.0, 1.6), (2.0, 2.0), (1.0, 0.0)]
)
def test_the_weighted_sum_is_nested_guidance(guidance_scale: float, image_guidance_scale: float) -> None:
    predictions = {(False, False): 0.7, (False, True): -1.3, (True, True): 2.1}
    nothing, source, both = predictions.values()
    expected = nothing + image_guidance_scale * (source - nothing) + guidance_scale * (both - source)
    guided = sum(
        branch.weight * predictions[branch.text, branch.source]
        for branch in branches(guidance_scale, image_guidance_scale)
    )
    assert guided == pytest.approx(expected)


@pytest.mark.parametrize("guidance_scale", [7.0, 0.5, 0.0])
def test_without_a_source_no_branch_sees_one(guidance_scale: float) -> None:
    candidates = branches(guidance_scale, None)
    assert not any(branch.source for branch in candidates)
    predictions = {False: 0.7, True: -1.3}
    guided = sum(branch.weight * predictions[branch.text] for branch in candidates)
    assert guided == pytest.approx(0.7 + guidance_scale * (-1.3 - 0.7))


def test_the_published_editing_defaults_need_two_branches() -> None:
    assert branches(5.0, 1.0) == [Branch(False, True, -4.0), Branch(True, True, 5.0)]


@pytest.mark.parametrize("image_guidance_scale", [None, 1.0])
def test_without_guidance_one_branch_is_left(image_guidance_scale: float | None) -> None:
    assert branches(1.0, image_guidance_scale) == [Branch(True, image_guidance_scale is not None, 1.0)]


def test_weights_do_not_widen_float32_predictions() -> None:
    for branch in branches(np.float64(5.0), np.float64(1.6)):
        assert (branch.weight * np.ones(1, dtype=np.float32)).dtype == np.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scales_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="the guidance scale"):
        branches(bad, None)
    with pytest.raises(InputError, match="image guidance scale"):
        branches(5.0, bad)
