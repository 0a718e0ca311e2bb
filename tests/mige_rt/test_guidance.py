import math

import numpy as np
import pytest

from mige_rt.errors import InputError
from mige_rt.guidance import Branch, branches


@pytest.mark.parametrize("text_scale, source_scale", [(5.0, 1.6), (5.0, 1.0), (0.0, 1.6), (2.0, 2.0), (1.0, 0.0)])
def test_the_weighted_sum_is_nested_guidance(text_scale: float, source_scale: float) -> None:
    predictions = {(False, False): 0.7, (False, True): -1.3, (True, True): 2.1}
    nothing, source, both = predictions.values()
    expected = nothing + source_scale * (source - nothing) + text_scale * (both - source)
    guided = sum(row.weight * predictions[row.text, row.source] for row in branches(text_scale, source_scale))
    assert guided == pytest.approx(expected)


@pytest.mark.parametrize("text_scale", [7.0, 0.5, 0.0])
def test_without_a_source_no_branch_sees_one(text_scale: float) -> None:
    rows = branches(text_scale, None)
    assert not any(row.source for row in rows)
    predictions = {False: 0.7, True: -1.3}
    guided = sum(row.weight * predictions[row.text] for row in rows)
    assert guided == pytest.approx(0.7 + text_scale * (-1.3 - 0.7))


def test_the_published_editing_defaults_need_two_branches() -> None:
    assert branches(5.0, 1.0) == [Branch(False, True, -4.0), Branch(True, True, 5.0)]


@pytest.mark.parametrize("source_scale", [None, 1.0])
def test_without_guidance_one_branch_is_left(source_scale: float | None) -> None:
    assert branches(1.0, source_scale) == [Branch(True, source_scale is not None, 1.0)]


def test_weights_do_not_widen_float32_predictions() -> None:
    for row in branches(np.float64(5.0), np.float64(1.6)):
        assert (row.weight * np.ones(1, dtype=np.float32)).dtype == np.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scales_that_are_no_numbers_are_refused(bad: float) -> None:
    with pytest.raises(InputError, match="text scale"):
        branches(bad, None)
    with pytest.raises(InputError, match="source scale"):
        branches(5.0, bad)
