"""Made-up requests and damaged images: each is used, or refused in one sentence. What is found becomes a case.

The examples are the same in each run. `-m long` tries very many more, at random.
"""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from hostile_cases import CONTROL, LIBRARY_TEXT, LONGEST_ANSWER

from mige_rt.errors import InputError
from mige_rt.image_size import parse_size
from mige_rt.images import open_image
from mige_rt.instruction import clean_caption
from mige_rt.requests import RequestRecord, parse_request, read_lines, resolve
from mige_rt.terminal import message

SHORT = settings(max_examples=300, deadline=None, derandomize=True, database=None)
LONG = settings(
    max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
FORMATS = ("png", "jpg", "webp", "gif", "bmp", "tif", "avif", "ppm")
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8))

any_text = st.text(st.characters(), max_size=60)  # surrogates, too
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | any_text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(any_text, inner, max_size=4),
    max_leaves=12,
)
fields = ("prompt", "images", "source", "target", "task", "seed", "id", "truth")
likely = {
    "images": st.lists(any_text, max_size=3),
    "task": st.sampled_from(["subject", "edit", "compose"]),
    "seed": st.integers(),
    "id": st.from_regex(r"[\w.-]{0,9}"),
}
objects = st.dictionaries(st.sampled_from(fields), json_values, max_size=8).flatmap(
    lambda values: st.fixed_dictionaries({"prompt": any_text | st.just("a <imagehere>")}, optional=likely).map(
        lambda more: {**values, **more}
    )
)
lines = objects.map(json.dumps) | json_values.map(json.dumps) | any_text


def answered(error: InputError) -> None:
    """Assert that a refusal is one that a user can be shown."""
    text = message(error)
    assert text and len(text) <= LONGEST_ANSWER
    assert not CONTROL.search(text) and not LIBRARY_TEXT.search(text)


def check_line(line: str) -> None:
    try:
        record = parse_request(line)
    except InputError as error:
        answered(error)
        return
    assert isinstance(record, RequestRecord) and isinstance(record.prompt, str)
    assert record.seed is None or record.seed >= 0
    assert record.id is None or Path(f"out-{record.id}.png").name == f"out-{record.id}.png"
    if record.images or record.source:
        return
    try:
        resolved = resolve(record.open(Path(), 0))
    except InputError as error:
        answered(error)
    else:
        assert clean_caption(record.prompt) in resolved.text


@SHORT
@given(lines)
@example("[" * 10**5)
def test_any_line_of_requests(line: str) -> None:
    check_line(line)


@pytest.mark.long
@LONG
@given(lines)
def test_very_many_lines_of_requests(line: str) -> None:
    check_line(line)


def check_file(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    try:
        numbered = read_lines(path)
    except InputError as error:
        answered(error)
        return
    numbers = [number for number, _ in numbered]
    assert numbers == sorted(set(numbers)) and numbers[0] >= 1
    assert all(line.strip() and "\r" not in line and line.count("\n") <= 1 for _, line in numbered)


@SHORT
@given(st.binary(max_size=200) | lines.map(lambda line: f"{line}\r\n{line}\r".encode("utf-8", "surrogatepass")))
def test_any_bytes_as_a_request_file(fuzzed_file: Callable[[], Path], content: bytes) -> None:
    check_file(content, fuzzed_file())


@SHORT
@given(any_text)
def test_any_text_as_a_size(text: str) -> None:
    try:
        width, height = parse_size(text)
    except InputError as error:
        answered(error)
    else:
        assert 0 <= width < 10**6 and 0 <= height < 10**6


@pytest.fixture(scope="module")
def fuzzed_file(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    path = tmp_path_factory.mktemp("fuzzed") / "file"
    return lambda: path


def encoded(extension: str) -> bytes:
    file = io.BytesIO()
    NOISE.save(file, format=Image.registered_extensions()[f".{extension}"])
    return file.getvalue()


ENCODED = {extension: encoded(extension) for extension in FORMATS}


@st.composite
def damaged(draw: Callable[[st.SearchStrategy[Any]], Any]) -> bytes:
    """An image file with bytes changed, taken out, doubled or put in, and perhaps cut."""
    content = bytearray(ENCODED[draw(st.sampled_from(FORMATS))])
    for _ in range(draw(st.integers(1, 6))):
        place, length = draw(st.integers(0, len(content))), draw(st.integers(0, 8))
        match draw(st.sampled_from(["change", "take", "double", "put", "cut"])):
            case "change":
                content[place : place + length] = draw(st.binary(min_size=length, max_size=length))
            case "take":
                del content[place : place + length]
            case "double":
                content[place:place] = content[place : place + 50 * length]
            case "put":
                content[place:place] = draw(st.sampled_from([b"\0", b"\xff", b"\x7f\xff\xff\xff"])) * length
            case _:
                del content[max(place, 8) :]
    return bytes(content)


def check_image(content: bytes, path: Path) -> None:
    path.write_bytes(content)
    try:
        image = open_image(path, max_pixels=10**6)
    except InputError as error:
        answered(error)
    else:
        assert image.mode == "RGB" and 1 <= image.width * image.height <= 10**6
        image.tobytes()


@pytest.mark.filterwarnings("error")
@SHORT
@given(damaged() | st.binary(max_size=300))
def test_any_damage_to_an_image(fuzzed_file: Callable[[], Path], content: bytes) -> None:
    check_image(content, fuzzed_file())


@pytest.mark.long
@LONG
@given(damaged())
def test_very_much_damage_to_images(fuzzed_file: Callable[[], Path], content: bytes) -> None:
    check_image(content, fuzzed_file())
