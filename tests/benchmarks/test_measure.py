"""What comparisons rest on: quantiles, ratios with their intervals, and turns."""

import numpy as np
import pytest

from benchmarks.measure import InterleavedRuns, Latency, speedup


def test_latency_is_the_median_and_the_percentiles() -> None:
    found = Latency.of([float(n) for n in (11, 1, 6, 3, 2, 4, 5, 7, 8, 9, 10)])
    assert (found.median, found.p10, found.p90) == (6, 2, 10)
    with pytest.raises(ValueError, match="no iterations"):
        Latency.of([])


def test_a_ratio_is_taken_pair_by_pair() -> None:
    drift = np.linspace(1, 10, 12)  # a machine that gets ten times as slow
    found = speedup(list(2 * drift), list(drift))
    assert (found.value, found.low, found.high, found.pairs) == (
        pytest.approx(2),
        pytest.approx(2),
        pytest.approx(2),
        12,
    )
    assert found.verdict == "faster"
    slower = speedup(list(drift), list(2 * drift))
    assert slower.value == pytest.approx(0.5) and slower.verdict == "slower"


def test_the_interval_is_about_as_wide_as_theory_has_it() -> None:
    """The median of n normal logarithms has the standard error 1.2533 sigma / sqrt(n)."""
    draw = np.random.default_rng(1)
    found = speedup(list(np.exp(0.2 * draw.standard_normal(400)) * 1.5), [1.0] * 400)
    width = np.log(found.high) - np.log(found.low)
    assert found.low < 1.5 < found.high and found.verdict == "faster"
    assert width == pytest.approx(2 * 1.96 * 1.2533 * 0.2 / 20, rel=0.35)


def test_where_the_interval_spans_one_no_difference_is_claimed() -> None:
    found = speedup([1.0, 1.2, 0.9, 1.1, 0.8, 1.05], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    assert found.low < 1 < found.high
    assert found.verdict == "no difference shown"


def test_swapping_the_two_inverts_the_ratio_and_repeating_it_changes_nothing() -> None:
    a, b = [1.0, 1.3, 1.1, 1.6], [0.7, 1.2, 0.9, 0.8]
    found, swapped = speedup(a, b), speedup(b, a)
    assert found == speedup(a, b)
    assert swapped.value == pytest.approx(1 / found.value)


def test_runs_without_a_partner_are_left_out() -> None:
    assert speedup([2.0, 2.0, 2.0, 50.0], [1.0, 1.0, 1.0]).value == pytest.approx(2)
    with pytest.raises(ValueError, match="1 pairs"):
        speedup([1.0], [1.0, 2.0])


def test_candidates_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []

    def candidate(name: str) -> float:
        order.append(name)
        return float(len(order))

    runs = InterleavedRuns({"a": lambda: candidate("a"), "b": lambda: candidate("b")}, ())
    said: list[tuple[str, int, int]] = []
    runs.run(2, 1, lambda *where: said.append(where))
    assert order == ["a", "b"] * 3
    assert runs.seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert said[0] == ("a", 0, 6) and said[-1] == ("b", 5, 6)


def test_what_was_measured_before_an_interruption_is_kept() -> None:
    left = iter([1.0] * 5)

    def candidate() -> float:
        for seconds in left:
            return seconds
        raise KeyboardInterrupt

    runs = InterleavedRuns({"a": candidate, "b": candidate}, (RuntimeError,))
    with pytest.raises(KeyboardInterrupt):
        runs.run(10, 0)
    assert runs.seconds == {"a": [1.0] * 3, "b": [1.0] * 2}


def test_a_candidate_that_fails_is_left_out_and_the_others_go_on() -> None:
    def broken() -> float:
        raise RuntimeError("out of memory")

    runs = InterleavedRuns({"broken": broken, "whole": lambda: 1.0}, (RuntimeError,))
    runs.run(3, 1)
    assert runs.failed == {"broken": "out of memory"} and runs.seconds == {"whole": [1.0] * 3}
