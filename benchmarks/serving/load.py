"""Load as an API's clients make it: calls of several kinds, sent when they are due, whatever became of those before."""

import asyncio
import base64
import io
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import aiohttp
from PIL import Image

from benchmarks.case import SCENES, SUBJECTS, sample_image
from mige_rt.instruction import PLACEHOLDER

Kind = Literal["generate", "edit", "compose"]

KINDS: tuple[Kind, ...] = ("generate", "edit", "compose")
MIXES: dict[str, tuple[Kind, ...]] = {"edits": ("edit",), "mixed": KINDS}
_PROMPTS: dict[Kind, str] = {
    "generate": f"a {PLACEHOLDER} on a plain green background",
    "edit": "make the background blue",
    "compose": f"replace the thing on the left in {PLACEHOLDER} with {PLACEHOLDER}",
}
_NO_LIMIT = aiohttp.ClientTimeout(total=None)


@dataclass(frozen=True)
class Call:
    """One call of the API, for one image.

    Attributes:
        path: Of the URL.
        body: Its bytes, as a rule JSON.
        content_type: Of the body.
    """

    path: str
    body: bytes
    content_type: str = "application/json"


@dataclass(frozen=True)
class Answer:
    """What a call was answered.

    Attributes:
        status: Of HTTP; 0 when there was no answer.
        body: JSON, or what went wrong.
    """

    status: int
    body: bytes

    @property
    def image(self) -> str:
        """The image's file in base64."""
        image: str = json.loads(self.body)["data"][0]["b64_json"]
        return image


@dataclass(frozen=True)
class Outcome:
    """What became of a call.

    Attributes:
        status: Of HTTP; 0 when there was no answer.
        due: Seconds from the beginning of the load to when the call was to be sent.
        ended: Seconds from the beginning to the answer's end.
    """

    status: int
    due: float
    ended: float

    @property
    def latency(self) -> float:
        """In seconds; a client that was late with sending does not make it shorter."""
        return self.ended - self.due


def image_call(kind: Kind, number: int, settings: Mapping[str, Any]) -> Call:
    """A call for an image.

    Args:
        kind: What is asked for.
        number: Calls of other numbers have other images and seeds, so that none is spared its encoding.
        settings: Further fields, such as num_inference_steps.
    """
    scene, subject = sample_image(SCENES, number), sample_image(SUBJECTS, number)
    images = {"generate": [subject], "edit": [scene], "compose": [scene, subject]}[kind]
    fields = {"prompt": _PROMPTS[kind], "seed": number, "images": [_reference(image) for image in images], **settings}
    path = "/v1/images/generations" if kind == "generate" else "/v1/images/edits"
    return Call(path, json.dumps(fields).encode())


def poisson_arrivals(rate: float, seconds: float, rng: random.Random) -> list[float]:
    """When calls come, in seconds from the beginning: independent of each other, so many a second on the average."""
    times: list[float] = []
    now = rng.expovariate(rate)
    while now < seconds:
        times.append(now)
        now += rng.expovariate(rate)
    return times


def client_session() -> aiohttp.ClientSession:
    """A client without limits of its own, within a running event loop."""
    return aiohttp.ClientSession(timeout=_NO_LIMIT, connector=aiohttp.TCPConnector(limit=0))


async def send(session: aiohttp.ClientSession, url: str, call: Call) -> Answer:
    """Send a call, and wait for its answer's end."""
    try:
        headers = {"Content-Type": call.content_type}
        async with session.post(url + call.path, data=call.body, headers=headers) as response:
            return Answer(response.status, await response.read())
    except aiohttp.ClientError as error:
        return Answer(0, str(error).encode())


async def send_when_due(url: str, calls: Sequence[Call], due: Sequence[float]) -> list[Outcome]:
    """Send each call at its time, in seconds from now, and wait for all answers."""
    begin = time.monotonic()
    async with client_session() as session:

        async def outcome(call: Call, when: float) -> Outcome:
            await asyncio.sleep(begin + when - time.monotonic())
            answer = await send(session, url, call)
            return Outcome(answer.status, when, time.monotonic() - begin)

        return await asyncio.gather(*map(outcome, calls, due))


async def send_in_turn(url: str, calls: Sequence[Call]) -> list[tuple[Answer, float]]:
    """Send each call when the one before has its answer; answers, and their seconds."""
    answers: list[tuple[Answer, float]] = []
    async with client_session() as session:
        for call in calls:
            begin = time.monotonic()
            answer = await send(session, url, call)
            answers.append((answer, time.monotonic() - begin))
    return answers


def _reference(image: Image.Image) -> dict[str, str]:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"image_url": "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()}
