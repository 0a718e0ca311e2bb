"""The bench of the server and its soak: what they count is checked by itself, and a very short one of each is real."""

import json
import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner

from benchmarks.serving.load import MIXES, Outcome, image_call, poisson_arrivals
from benchmarks.serving.queueing import simulated_latencies
from benchmarks.serving.results import Comparison, Percentiles, summarise
from benchmarks.serving.soak import SoakOptions, SoakResults
from mige_rt.cli import main


def test_arrivals_are_those_of_a_poisson_process_and_come_again_from_their_seed() -> None:
    times = poisson_arrivals(50, 200, random.Random(3))
    assert times == poisson_arrivals(50, 200, random.Random(3)) != poisson_arrivals(50, 200, random.Random(4))
    assert times == sorted(times) and times[0] > 0 and times[-1] < 200
    gaps = [after - before for before, after in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert mean == pytest.approx(1 / 50, rel=0.05)
    assert deviation == pytest.approx(mean, rel=0.1)  # of exponential gaps they are the same


def test_the_simulated_queue_is_that_of_theory() -> None:
    alone = simulated_latencies([1.0], rate=0.5)
    assert sum(alone) / len(alone) == pytest.approx(1.5, rel=0.03)  # M/D/1: 1 + load / (2 * (1 - load))
    free = simulated_latencies(
        [1.0] * 64, rate=4.0
    )  # of batches that cost what one call costs: only a step is waited for
    assert min(free) == pytest.approx(1.0) and 1.04 < max(free) < 1.05 + 1e-6
    shared = simulated_latencies([1.0, 2.0, 3.0, 4.0], rate=0.5)  # nothing is gained, and each is slowed by the others
    assert Percentiles.of(shared).p99 > Percentiles.of(alone).p99


def test_calls_of_other_numbers_have_other_images() -> None:
    bodies = [json.loads(image_call("compose", number, {"num_inference_steps": 3}).body) for number in range(60)]
    assert {body["num_inference_steps"] for body in bodies} == {3}
    assert len({image["image_url"] for body in bodies for image in body["images"]}) == 120
    assert image_call("generate", 0, {}).path.endswith("generations")
    assert [len(json.loads(image_call(kind, 0, {}).body)["images"]) for kind in MIXES["mixed"]] == [1, 1, 2]


def test_what_a_server_did_is_counted_from_when_calls_were_due() -> None:
    rounds = [
        [Outcome(200, 0.0, 1.0), Outcome(200, 1.0, 4.0), Outcome(429, 1.5, 1.6), Outcome(504, 2.0, 9.0)],
        [Outcome(200, 0.5, 1.0), Outcome(0, 0.5, 0.6)],
    ]
    result = summarise(rounds, seconds=2.0, deadline=1.0, batch_size=1.5)
    assert (result.calls, result.images, result.refused, result.failed) == (6, 3, 1, 2)
    assert result.latency is not None and result.latency.p50 == 1.0
    assert result.latency.p99 == pytest.approx(3.0, rel=0.02)
    assert result.images_per_minute == pytest.approx(3 / 6 * 60)  # 4 seconds to the last image, and 2 of arrivals
    assert result.goodput_per_minute == pytest.approx(2 / 6 * 60)
    nothing = summarise([[Outcome(429, 0.0, 0.1)]], seconds=1.0, deadline=1.0, batch_size=0.0)
    assert nothing.latency is None and nothing.images_per_minute == 0


def test_ratios_divide_continuous_batching_by_the_others() -> None:
    slow = summarise([[Outcome(200, 0.0, 2.0)]], seconds=1.0, deadline=1.0, batch_size=1.0)
    fast = replace(
        slow, latency=Percentiles(1.0, 1.0, 1.0), images_per_minute=3 * slow.images_per_minute, goodput_per_minute=9.0
    )
    ratios = Comparison("edits", 0.5, 1.0, {"continuous": fast, "static": slow, "none": slow}).ratios()
    assert ratios.keys() == {"static", "none"}
    assert ratios["none"] == {"images_per_minute": pytest.approx(3), "goodput": None, "p99": 0.5}


def test_a_short_bench_compares_the_three_ways_of_batching(tmp_path: Path) -> None:
    out = tmp_path / "report"
    options = ["--mixes", "mixed", "--loads", "0.5,2", "--seconds", "0.5", "--rounds", "1", "--max-batch", "3"]
    result = CliRunner().invoke(main, ["bench-serve", *options, "--num-inference-steps", "2", "--out", str(out)])
    assert result.exit_code == 0, result.output
    data = json.loads((out / "serving.json").read_text())
    assert data["complete"] and data["command"].startswith("mige-rt bench-serve --max-batch 3")
    assert [(rate["mix"], rate["load"]) for rate in data["rates"]] == [("mixed", 0.5), ("mixed", 2)]
    for rate in data["rates"]:
        results = rate["results"]
        assert list(results) == ["continuous", "static", "none"]
        assert len({result["calls"] for result in results.values()}) == 1  # the same arrivals
        assert all(result["failed"] == 0 and result["images"] >= 1 for result in results.values())
        assert results["none"]["batch_size"] == 1
        for served in results.values():
            assert served["calls"] == served["images"] + served["refused"]
            assert served["latency"]["p50"] <= served["latency"]["p95"] <= served["latency"]["p99"]
            assert served["goodput_per_minute"] <= served["images_per_minute"]
    assert (
        len(data["lone"]["mixed"]["batch_seconds"]) == 3 and data["saturation"]["mixed"]["simulated_p99_over_lone"] > 1
    )
    assert data["saturation"]["mixed"]["times_none"] == pytest.approx(
        data["rates"][1]["ratios"]["none"]["images_per_minute"]
    )
    text = (out / "serving.md").read_text()
    assert "| static" in text and "![mixed" in text and "incomplete" not in text
    assert "continuous" in (out / "mixed.svg").read_text()
    assert "without batching" in result.stderr


def test_a_short_soak_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak"
    options = ["--soak", "0.05", "--kills", "1", "--num-inference-steps", "3", "--max-growth-mb", "1000"]
    result = CliRunner().invoke(main, ["bench-serve", *options, "--out", str(out)])
    data = json.loads((out / "soak.json").read_text())
    assert result.exit_code == 0, (result.output, data)
    assert data["complete"] and not data["failures"] and not data["lost"]
    assert data["images"] == data["calls"] >= 1
    assert data["kills"] == data["restarts"] == 1
    assert len(data["memory"]) > 5 and all(size > 50e6 for _, size in data["memory"])
    assert "All is as it should be." in (out / "soak.md").read_text()


def test_a_soak_says_what_went_wrong() -> None:
    memory = [(1.0, 300_000_000), (59.0, 349_000_000)]
    good = SoakResults(SoakOptions(minutes=1.0, max_growth_mb=50), memory=memory, complete=True)
    assert good.failures == []
    broken = {
        "504 it has waited": replace(good, lost=["504 it has waited"]),
        "2 images are not those": replace(good, wrong=2),
        "1 bad bodies were not refused": replace(good, bad_bodies_accepted=["500 oh"]),
        "killed 3 times and started again 0 times": replace(good, kills=3),
        "still counted": replace(good, left=1),
        "tracebacks": replace(good, tracebacks=1),
        "grown by 51 MB": replace(good, memory=[(1.0, 300_000_000), (59.0, 351_000_000)]),
    }
    for words, results in broken.items():
        assert len(results.failures) == 1 and words in results.failures[0]


def test_options_of_a_soak_are_refused_without_one(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["bench-serve", "--kills", "3", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2 and "--soak MINUTES" in result.output
    assert not (tmp_path / "out").exists()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    options = ["--model", str(tmp_path), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["bench-serve", *options])
    assert result.exit_code == 2 and "mige-rt serve does not start" in result.output
    assert "Traceback" not in result.output and not (tmp_path / "out").exists()
