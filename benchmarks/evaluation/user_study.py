"""A blind pairwise study: which of two images of one request is better? A page, and votes as JSON lines.

Which system's image is on the left depends on the voter and the request alone, so no page and no address tells it.
Images are sent without their metadata, which name the model.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlencode

import jinja2
from fastapi import FastAPI, Form, HTTPException
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from benchmarks.appended_lines import AppendedLines
from benchmarks.evaluation.preference import WHAT, Choice, Vote
from benchmarks.evaluation.results import Results, check_benchmark
from benchmarks.evaluation.sample import AnyImageFile, Benchmark, BenchmarkSample, ImageFile, image_labels
from mige_rt.errors import InputError

Side = Literal["left", "right"]
Voter = Annotated[str, Form(min_length=1, max_length=100)]


@dataclass(frozen=True)
class Pair:
    """One request that both systems have an image of."""

    name: str
    sample: BenchmarkSample
    images: tuple[Path, Path]


def open_pairs(benchmark: Benchmark, systems: Sequence[Results]) -> list[Pair]:
    """The requests of which both folders have an image.

    Raises:
        InputError: A folder is of another benchmark, or there is no such request.
    """
    for results in systems:
        check_benchmark(results, benchmark)
    first, second = systems
    pairs = [
        Pair(name, sample, (first.image(name), second.image(name)))
        for sample, _, name in benchmark.image_names()
        if sample.rows and first.image(name).is_file() and second.image(name).is_file()
    ]
    if not pairs:
        raise InputError(f"{first.folder} and {second.folder} have no image of one request in common")
    return pairs


class Study:
    """The pairs, and the votes of so far."""

    def __init__(self, pairs: Sequence[Pair], systems: tuple[str, str], votes: Path) -> None:
        """Go on with a file of votes, or begin one.

        Args:
            pairs: From `open_pairs`.
            systems: What the votes call the two systems.
            votes: The file, JSON lines.

        Raises:
            InputError: The file holds something else, or cannot be read.
        """
        self.pairs = {pair.name: pair for pair in pairs}
        self.systems = systems
        self._votes = AppendedLines(votes, Vote, WHAT)
        wanted = {Path(system).resolve() for system in systems}  # however they are typed this time
        of_these = [
            vote for vote in self._votes.before if {Path(vote.left).resolve(), Path(vote.right).resolve()} == wanted
        ]
        self._done = {(vote.voter, vote.pair) for vote in of_these}

    def next_pair(self, voter: str) -> Pair | None:
        """The first pair, in an order of the voter's own, that the voter has not judged."""
        order = sorted(self.pairs, key=lambda name: _digest(voter, name))
        return next((self.pairs[name] for name in order if (voter, name) not in self._done), None)

    def progress(self, voter: str) -> tuple[int, int]:
        """How many pairs the voter has judged, and of how many."""
        return sum((voter, name) in self._done for name in self.pairs), len(self.pairs)

    def system(self, voter: str, pair: str, side: Side) -> int:
        """Which system's image, 0 or 1, is on a side."""
        return (_digest("side", voter, pair)[0] + (side == "right")) % 2

    def vote(self, voter: str, pair: str, choice: Choice) -> None:
        """Write a vote down, to the disk, before anything else is answered."""
        left, right = (self.systems[self.system(voter, pair, side)] for side in ("left", "right"))
        time = datetime.now(UTC).isoformat(timespec="seconds")
        self._votes.add(asdict(Vote(pair, voter, left, right, choice, time)))
        self._done.add((voter, pair))


def create_app(study: Study) -> FastAPI:
    """The page as an application."""
    app = FastAPI(title="mige-rt user study", docs_url=None, redoc_url=None, openapi_url=None)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True, autoescape=True)

    @app.get("/")
    def page(voter: str = "") -> HTMLResponse:
        pair = study.next_pair(voter) if voter else None
        inputs = image_labels(pair.sample.images, pair.sample.source).values() if pair else ()
        done, total = study.progress(voter)
        text = templates.get_template("user-study.html.j2").render(
            voter=voter, pair=pair, inputs=inputs, done=done, total=total
        )
        return HTMLResponse(text, headers={"Cache-Control": "no-store"})

    @app.get("/image/{pair}/{side}")
    def image(pair: str, side: Side, voter: str) -> Response:
        known = _known(study, pair)
        return _png(ImageFile(known.images[study.system(voter, pair, side)]))

    @app.get("/input/{pair}/{number}")
    def input_image(pair: str, number: int) -> Response:
        sample = _known(study, pair).sample
        inputs = list(image_labels(sample.images, sample.source))
        if not 0 <= number < len(inputs):
            raise HTTPException(404, "there is no such image")
        return _png(inputs[number])

    @app.post("/vote")
    def vote(voter: Voter, pair: Annotated[str, Form()], choice: Annotated[Choice, Form()]) -> RedirectResponse:
        study.vote(voter, _known(study, pair).name, choice)
        return RedirectResponse(app.url_path_for("page") + "?" + urlencode({"voter": voter}), status_code=303)

    return app


def _known(study: Study, pair: str) -> Pair:
    if pair not in study.pairs:
        raise HTTPException(404, "there is no such pair")
    return study.pairs[pair]


def _png(image: AnyImageFile) -> Response:
    file = BytesIO()
    image.open().save(file, "PNG")  # the pixels alone
    return Response(file.getvalue(), media_type="image/png", headers={"Cache-Control": "no-store"})


def _digest(*parts: str) -> bytes:
    return sha256("\0".join(parts).encode()).digest()
