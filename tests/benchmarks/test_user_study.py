"""The blind pairwise study: its page, its votes, and the scores that follow from them."""

import io
import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
import pytest
from click.testing import CliRunner
from fastapi.testclient import TestClient
from PIL import Image

from benchmarks.evaluation.layouts import open_benchmark
from benchmarks.evaluation.preference import Choice, Vote, fit, preferences, read_votes
from benchmarks.evaluation.results import Results, RunId, start_results
from benchmarks.evaluation.sample import Benchmark
from benchmarks.evaluation.user_study import Study, create_app, open_pairs
from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.image_output import save_image
from trainer.synthetic.concepts import Concept
from trainer.synthetic.manifest import write_manifest

SYSTEMS = ("ours", "theirs")
COLORS = ((200, 0, 0), (0, 0, 200))  # of the systems' images


@pytest.fixture(scope="module")
def world(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study") / "world"
    write_manifest(folder, concepts, 8, 1, 32)
    return folder


@pytest.fixture(scope="module")
def benchmark(world: Path) -> Benchmark:
    return open_benchmark(f"synthetic:{world}")


@pytest.fixture
def systems(benchmark: Benchmark, tmp_path: Path) -> list[Results]:
    opened = []
    for system, color in zip(SYSTEMS, COLORS, strict=True):
        ids: dict[str, Any] = {"layout": benchmark.layout, "fingerprint": benchmark.fingerprint()}
        run = RunId(**ids, model=system, engine="e", device="cpu", precision="fp32")
        opened.append(start_results(tmp_path / system, run))
        for _, _, name in benchmark.image_names():
            save_image(Image.new("RGB", (8, 8), color), opened[-1].image(name), {"model": system})
    return opened


def test_every_pair_is_voted_on_once_and_blindly(benchmark: Benchmark, systems: list[Results], tmp_path: Path) -> None:
    pairs, votes = open_pairs(benchmark, systems), tmp_path / "votes.jsonl"
    client = TestClient(create_app(Study(pairs, SYSTEMS, votes)))
    sides = set()
    for number in range(len(pairs)):
        if number == 3:  # the server was killed while it wrote, and is started again
            with votes.open("a") as file:
                file.write('{"pair": "0000')
            client = TestClient(create_app(Study(pairs, SYSTEMS, votes)))
        page = client.get("/", params={"voter": "Ann & Bob"}).text
        assert f"{number + 1} of {len(pairs)}" in page
        assert not any(system in page for system in SYSTEMS)
        pair = page.split('name="pair" value="')[1].split('"')[0]
        pixels = {}
        for side in ("left", "right"):
            content = client.get(f"/image/{pair}/{side}", params={"voter": "Ann & Bob"}).content
            assert not any(system.encode() in content for system in SYSTEMS)
            with Image.open(io.BytesIO(content)) as image:
                pixels[side] = image.getpixel((0, 0))
        assert set(pixels.values()) == set(COLORS)
        better = "left" if pixels["left"] == COLORS[0] else "right"
        sides.add(better)
        answer = client.post(
            "/vote", data={"voter": "Ann & Bob", "pair": pair, "choice": better}, follow_redirects=False
        )
        assert (answer.status_code, answer.headers["location"]) == (303, "/?voter=Ann+%26+Bob")
        assert len(votes.read_text().splitlines()) == number + 1
    assert sides == {"left", "right"}
    assert "That was all" in client.get("/", params={"voter": "Ann & Bob"}).text
    assert f"1 of {len(pairs)}" in client.get("/", params={"voter": "Eve"}).text
    best = preferences(read_votes([votes]))[0]
    assert (best.system, best.wins, best.votes) == ("ours", len(pairs), len(pairs))


def test_votes_on_other_systems_do_not_count(benchmark: Benchmark, systems: list[Results], tmp_path: Path) -> None:
    pairs, votes = open_pairs(benchmark, systems), tmp_path / "votes.jsonl"
    Study(pairs, ("ours", "third"), votes).vote("Ann", pairs[0].name, "tie")
    assert Study(pairs, SYSTEMS, votes).progress("Ann") == (0, len(pairs))
    assert Study(pairs, ("third", "ours"), votes).progress("Ann") == (1, len(pairs))


def test_the_page_shows_the_request_and_refuses_what_it_does_not_know(
    benchmark: Benchmark, systems: list[Results], tmp_path: Path
) -> None:
    client = TestClient(create_app(Study(open_pairs(benchmark, systems), SYSTEMS, tmp_path / "votes.jsonl")))
    assert "Your name" in client.get("/").text
    edit = next(name for sample, _, name in benchmark.image_names() if sample.source is not None)
    assert client.get(f"/input/{edit}/0").headers["content-type"] == "image/png"
    assert client.get(f"/input/{edit}/../../etc").status_code == 404
    assert client.get("/image/nothing/left", params={"voter": "a"}).status_code == 404
    data = {"voter": "a", "pair": edit, "choice": "both"}
    assert client.post("/vote", data=data).status_code == 422
    assert not (tmp_path / "votes.jsonl").exists()


def test_a_system_is_one_however_its_path_is_typed(
    benchmark: Benchmark, systems: list[Results], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs, votes = open_pairs(benchmark, systems), tmp_path / "votes.jsonl"
    monkeypatch.chdir(tmp_path)
    Study(pairs, ("ours", "theirs"), votes).vote("Ann", pairs[0].name, "left")
    study = Study(pairs, (str(tmp_path / "ours"), "../" + tmp_path.name + "/theirs"), votes)
    assert study.progress("Ann") == (1, len(pairs))
    study.vote("Ann", pairs[1].name, "left")
    assert {name for vote in read_votes([votes]) for name in (vote.left, vote.right)} == {"ours", "theirs"}


def test_the_command_says_where_its_page_is(
    benchmark: Benchmark, world: Path, systems: list[Results], tmp_path: Path
) -> None:
    command = ["eval", "user-study", *SYSTEMS, "--benchmark", f"synthetic:{world}", "--votes", "votes.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mige_rt.cli", *command, "--port", "0"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = process.stderr.readline().rstrip("\n")
        address = said.partition("; the page is at ")[2]
        pair = benchmark.image_names()[0][2]
        data = urlencode({"voter": "Ann", "pair": pair, "choice": "tie"}).encode()
        assert address.startswith("http://127.0.0.1:") and urlopen(f"{address}/vote", data).status == 200
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            refused = CliRunner().invoke(main, [*command, "--port", address.rpartition(":")[2]])
        assert refused.exit_code == 2 and "(address already in use); give a --host" in refused.stderr
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    (vote,) = read_votes([tmp_path / "votes.jsonl"])
    assert {vote.left, vote.right} == set(SYSTEMS)


def test_folders_without_a_common_image_are_refused(benchmark: Benchmark, systems: list[Results]) -> None:
    for _, _, name in benchmark.image_names():
        systems[1].image(name).unlink()
    with pytest.raises(InputError, match="no image of one request in common"):
        open_pairs(benchmark, systems)


def _votes(results: Sequence[tuple[str, str, Choice]]) -> list[Vote]:
    return [Vote(f"{k}.png", "a", left, right, choice, "") for k, (left, right, choice) in enumerate(results)]


def test_two_systems_differ_by_the_log_odds_of_a_win() -> None:
    counts: dict[tuple[str, str, Choice], int] = {
        ("a", "b", "left"): 20,
        ("b", "a", "right"): 9,
        ("a", "b", "tie"): 2,
        ("a", "b", "right"): 10,
    }
    votes = _votes([result for result, times in counts.items() for _ in range(times)])
    first, second = preferences(votes)
    assert (first.system, first.wins, first.votes) == ("a", 30, 41)
    assert first.score.value - second.score.value == pytest.approx(np.log(30.5 / 11.5), abs=1e-3)
    assert second.score.value == pytest.approx(-first.score.value)
    assert first.score.low is not None and first.score.high is not None
    assert 0 < first.score.low < first.score.value < first.score.high
    assert all(place.score.low is None for place in preferences(votes[:1]))  # one pair says nothing of others


def test_scores_are_those_of_hunters_algorithm() -> None:
    wins = np.array([[0, 7, 9, 4], [3, 0, 6, 8], [1, 4, 0, 5], [2, 2, 5, 0]], float)
    smoothed = wins + 0.5 * (wins + wins.T > 0)
    strengths = np.ones(4)
    for _ in range(2000):  # minorize and maximize (Hunter, 2004)
        games = (smoothed + smoothed.T) / (strengths[:, None] + strengths[None, :])
        strengths = smoothed.sum(axis=1) / games.sum(axis=1)
        strengths /= np.exp(np.log(strengths).mean())
    np.testing.assert_allclose(fit(wins), np.log(strengths), atol=1e-4)


def test_the_last_vote_of_a_voter_counts_and_a_cut_line_does_not(tmp_path: Path) -> None:
    def line(choice: str) -> str:
        return json.dumps(Vote("1.png", "a", "x", "y", "left", "").__dict__ | {"choice": choice}) + "\n"

    path = tmp_path / "votes.jsonl"
    path.write_text(line("left") + line("right") + line("tie")[:20])
    assert [vote.choice for vote in read_votes([path])] == ["right"]
    path.write_text(line("left")[:20] + "\n" + line("right"))
    with pytest.raises(InputError, match="line 1 is no JSON"):
        read_votes([path])
    path.write_text(line("best"))
    result = CliRunner().invoke(main, ["eval", "preference", str(path)])
    assert result.exit_code == 2 and "choice" in result.stderr
    path.write_text(line("left"))
    result = CliRunner().invoke(main, ["eval", "preference", str(path)])
    assert result.exit_code == 0 and "1 of 1" in result.stdout
