"""The server as its users meet it: in a process of its own, with OpenAI's client and with clients that misbehave."""

import base64
import http.client
import io
import json
import signal
import socket
import struct
import time
import zlib
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from click.testing import CliRunner
from PIL import Image

from benchmarks.serving.server_process import ServerProcess
from mige_rt.cli import main
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline
from mige_rt.serve.backend import MAX_ATTEMPTS
from mige_rt.serve.server import bind_sockets, listen

SECRET_WORD = "zanzibar"  # in every prompt; logs and metrics must not have it
BLUE = f"make the background blue {SECRET_WORD}"
COMPOSE = f"replace the cat in <imagehere> with <imagehere> {SECRET_WORD}"
LONG = {"prompt": BLUE, "num_inference_steps": "1000"}  # runs for at least ten seconds, unless it is stopped
BOUNDARY = "----a-boundary"
KEY = "the key"


class Server(ServerProcess):
    """With what its clients do."""

    def client(self, api_key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=api_key, max_retries=0, timeout=120)

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def post_form(self, path: str, form: bytes) -> tuple[int, http.client.HTTPMessage, bytes]:
        content_type = f"multipart/form-data; boundary={BOUNDARY}"
        return self.request("POST", path, form, {"Content-Type": content_type, "Authorization": f"Bearer {KEY}"})

    def start_long_request(self) -> socket.socket:
        """A streamed request that has left the queue; the caller closes the connection."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        body = form({**LONG, "stream": "true"}, {"image": png()})
        head = (
            f"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {KEY}\r\n"
            f"Content-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        return connection


@contextmanager
def running_server(*options: str) -> Iterator[Server]:
    with Server("--no-page", *options) as server:
        yield server
    assert SECRET_WORD not in "".join(server.log)


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def server() -> Generator[Server]:
    with running_server("--max-n", "3") as server:
        yield server


@pytest.fixture(scope="module")
def narrow_server() -> Generator[Server]:
    """One that makes one image at a time, and is short of patience."""
    limits = ["--max-batch", "1", "--max-queue", "1", "--max-wait-ms", "4000", "--max-steps", "1000"]
    limits += ["--max-body-mb", "1", "--max-input-pixels", "10000", "--body-timeout", "2"]
    with running_server(*limits, "--api-key", KEY) as server:
        yield server


def png(image: Image.Image | None = None) -> bytes:
    file = io.BytesIO()
    (image or Image.new("RGB", (64, 64), "red")).save(file, format="PNG")
    return file.getvalue()


def opened(content: str | None) -> Image.Image:
    assert content is not None
    return Image.open(io.BytesIO(base64.b64decode(content)))


def form(fields: Mapping[str, str | bytes], files: Mapping[str, bytes] | list[tuple[str, bytes]] = {}) -> bytes:  # noqa: B006
    parts = [(f'name="{name}"', value.encode() if isinstance(value, str) else value) for name, value in fields.items()]
    for name, content in files.items() if isinstance(files, Mapping) else files:
        parts.append((f'name="{name}"; filename="image.png"', content))
    text = b"".join(
        f"--{BOUNDARY}\r\nContent-Disposition: form-data; {disposition}\r\n\r\n".encode() + content + b"\r\n"
        for disposition, content in parts
    )
    return text + f"--{BOUNDARY}--\r\n".encode()


# ---- what OpenAI's client gets


def test_the_openai_client_edits_with_two_references_and_streams(
    server: Server, pipe: MigePipeline, scene: Image.Image, reference: Image.Image
) -> None:
    stream = server.client().images.edit(
        image=[png(scene), png(reference)],
        prompt=COMPOSE,
        stream=True,
        partial_images=2,
        extra_body={"seed": 5, "num_inference_steps": 6},
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_edit.partial_image"] * 2 + ["image_edit.completed"]
    assert [event.partial_image_index for event in events[:2]] == [0, 1]  # pyright: ignore[reportAttributeAccessIssue]
    expected = pipe(COMPOSE, [scene, reference], scene, seed=5, num_inference_steps=6).images[0]
    completed = events[2]
    assert completed.type == "image_edit.completed"
    assert opened(completed.b64_json).tobytes() == expected.tobytes()
    assert (completed.size, completed.output_format) == ("64x64", "png")
    queries = pipe.config.qformer.queries
    assert completed.usage.input_tokens_details.image_tokens == 2 * queries
    assert completed.usage.output_tokens == 64


def test_the_openai_client_generates(server: Server, pipe: MigePipeline, reference: Image.Image) -> None:
    prompt = f"a <imagehere> on a plain green background {SECRET_WORD}"
    url = "data:image/png;base64," + base64.b64encode(png(reference)).decode()
    response = server.client().images.generate(
        prompt=prompt,
        n=2,
        size="96x64",  # pyright: ignore[reportArgumentType]
        extra_body={
            "images": [{"image_url": url}],
            "seed": 7,
            "num_inference_steps": 4,
            "guidance_scale": 2,
        },
    )
    options: dict[str, Any] = {"width": 96, "height": 64, "num_inference_steps": 4, "guidance_scale": 2.0}
    expected = pipe(prompt, [reference], seed=7, num_images_per_prompt=2, **options)
    assert response.data is not None and response.size == "96x64" and response.usage is not None
    assert [opened(image.b64_json).tobytes() for image in response.data] == [i.tobytes() for i in expected.images]
    assert [image.seed for image in response.data] == [7, 8]  # pyright: ignore[reportAttributeAccessIssue]


def test_a_seed_that_was_drawn_makes_the_image_again(server: Server, scene: Image.Image) -> None:
    client, steps = server.client(), {"num_inference_steps": 2}
    first = client.images.edit(image=png(scene), prompt=BLUE, extra_body=steps).data
    assert first is not None
    seed = first[0].seed  # pyright: ignore[reportAttributeAccessIssue]
    again = client.images.edit(image=png(scene), prompt=BLUE, extra_body={**steps, "seed": seed}).data
    assert again is not None and again[0].b64_json == first[0].b64_json


@pytest.mark.parametrize("output_format", ["png", "jpeg", "webp"])
def test_the_output_format_is_the_one_asked_for(server: Server, scene: Image.Image, output_format: Any) -> None:
    compression: Any = openai.omit if output_format == "png" else 50
    response = server.client().images.edit(
        image=png(scene),
        prompt=BLUE,
        output_format=output_format,
        output_compression=compression,
        extra_body={"num_inference_steps": 2},
    )
    assert response.data is not None
    assert (opened(response.data[0].b64_json).format or "").lower() == response.output_format == output_format


def test_the_source_may_be_another_than_the_first_image(
    server: Server, pipe: MigePipeline, scene: Image.Image, reference: Image.Image
) -> None:
    prompt = f"put a <imagehere> on the left {SECRET_WORD}"
    response = server.client().images.edit(
        image=[png(reference), png(scene)],
        prompt=prompt,
        extra_body={"source": 1, "seed": 1, "num_inference_steps": 3},
    )
    expected = pipe(prompt, [reference], scene, seed=1, num_inference_steps=3).images[0]
    assert response.data is not None and opened(response.data[0].b64_json).tobytes() == expected.tobytes()


def test_images_of_many_clients_are_those_made_alone(
    server: Server, pipe: MigePipeline, scene: Image.Image, reference: Image.Image
) -> None:
    client = server.client()
    scene_file, reference_file = png(scene), png(reference)

    def edit(seed: int) -> bytes:
        time.sleep(0.15 * (seed % 4))  # they come while others are running
        image, prompt = ([scene_file, reference_file], COMPOSE) if seed % 2 else ([scene_file], BLUE)
        settings = {"seed": seed, "num_inference_steps": 3 + seed % 3}
        data = client.images.edit(image=image, prompt=prompt, extra_body=settings).data
        assert data is not None
        return opened(data[0].b64_json).tobytes()

    calls = server.metric("generation_batch_size_count"), server.metric("generation_batch_size_sum")
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(edit, range(8)))
    for seed, image in enumerate(images):
        prompt, references = (COMPOSE, [scene, reference]) if seed % 2 else (BLUE, None)
        expected = pipe(prompt, references, scene, seed=seed, num_inference_steps=3 + seed % 3).images[0]
        assert image == expected.tobytes(), seed
    denoiser_calls = server.metric("generation_batch_size_count") - calls[0]
    assert server.metric("generation_batch_size_sum") - calls[1] > denoiser_calls  # some were made together


def test_models_health_and_the_api_page(server: Server) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    assert server.client().models.retrieve("tiny").owned_by == "mige-rt"
    with pytest.raises(openai.NotFoundError, match="there is no model 'large'"):
        server.client().models.retrieve("large")
    assert server.request("GET", "/health")[0] == server.request("GET", "/ready")[0] == 200
    api = json.loads(server.request("GET", "/openapi.json")[2])
    content = api["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    example = content["application/json"]["example"]
    status, _, answer = server.request(  # the page's example works as it stands
        "POST", "/v1/images/edits", json.dumps(example), {"Content-Type": "application/json"}
    )
    assert status == 200, answer


# ---- what is refused


def huge_png() -> bytes:
    """A PNG whose header says 40000 x 40000 pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


EDIT = {"prompt": BLUE}
BAD_FORMS: dict[str, tuple[bytes, int, str]] = {
    "no image": (form(EDIT), 400, "there is no image"),
    "no prompt": (form({}, {"image": png()}), 400, "missing prompt"),
    "empty prompt": (form({"prompt": " "}, {"image": png()}), 400, "prompt is empty"),
    "unknown field": (form({**EDIT, "stepz": "4"}, {"image": png()}), 400, "unknown stepz"),
    "negative prompt": (form({**EDIT, "negative_prompt": "red"}, {"image": png()}), 400, "unknown negative_prompt"),
    "mask": (form(EDIT, {"image": png(), "mask": png()}), 400, "mask is not supported"),
    "unknown model": (form({**EDIT, "model": "gpt-image-1"}, {"image": png()}), 404, "no model 'gpt-image-1'"),
    "wrong type": (form({**EDIT, "n": "two"}, {"image": png()}), 400, "n is 'two'"),
    "not finite": (form({**EDIT, "guidance_scale": "nan"}, {"image": png()}), 400, "guidance_scale is"),
    "too many images asked for": (form({**EDIT, "n": "4"}, {"image": png()}), 400, "at most 3 images"),
    "too many steps": (form({**EDIT, "num_inference_steps": "101"}, {"image": png()}), 400, "at most 100"),
    "too large": (form({**EDIT, "size": "4096x4096"}, {"image": png()}), 400, "at most 128 pixels a side"),
    "no size": (form({**EDIT, "size": "large"}, {"image": png()}), 400, "is no size"),
    "size not possible": (form({**EDIT, "size": "65x65"}, {"image": png()}), 400, "must be multiples"),
    "link asked for": (form({**EDIT, "response_format": "url"}, {"image": png()}), 400, "response_format is 'url'"),
    "streamed batch": (form({**EDIT, "stream": "true", "n": "2"}, {"image": png()}), 400, "one image at a time"),
    "no such source": (form({**EDIT, "source": "1"}, {"image": png()}), 400, "source is 1"),
    "unmatched placeholders": (form({"prompt": "a <imagehere> a <imagehere>"}, {"image": png()}), 400, "has 2 <imag"),
    "200 images": (form(EDIT, [("image[]", png())] * 200), 400, "more than 16 images"),
    "gigapixel image": (form(EDIT, {"image": huge_png()}), 400, "too large"),
    "no image file": (form(EDIT, {"image": b"GIF89a, no more"}), 400, "not an image that can be read"),
    "JSON as a file": (form(EDIT, {"image": b'{"prompt": "a cat"}'}), 400, "not an image that can be read"),
    "damaged image": (form(EDIT, {"image": png()[:90]}), 400, "image[0]"),
    "image as text": (form({**EDIT, "image": "cat.png"}), 400, "send it as a file"),
    "field sent twice": (form(EDIT)[: -len(f"--{BOUNDARY}--\r\n")] + form(EDIT), 400, "sent twice"),
    "not UTF-8": (form({"prompt": b"caf\xe9"}, {"image": png()}), 400, "not UTF-8"),
    "cut off": (form(EDIT, {"image": png()})[:-40], 400, "cut off"),
    "no form": (b"not a form at all", 400, "cannot be read"),
    "empty body": (b"", 400, "cut off"),
    "10,000 fields": (form({f"field{i}": "x" for i in range(10_000)}), 400, "more than 64 fields"),
}
BAD_JSON: dict[str, tuple[bytes, int, str]] = {
    "no JSON": (b"{", 400, "no JSON"),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', 400, "not UTF-8"),
    "a list": (b"[]", 400, "JSON list"),
    "nested too deep": (b'{"prompt": ' + b"[" * 100_000, 400, "no JSON"),
    "NaN": (b'{"prompt": "a cat", "guidance_scale": NaN}', 400, "NaN"),
    "text for a number": (b'{"prompt": "a cat", "n": "2"}', 400, "n is '2'"),
    "null prompt": (b'{"prompt": null}', 400, "missing prompt"),
    "half a character": (b'{"prompt": "\\ud800"}', 400, "prompt"),
    "a link": (
        b'{"prompt": "a <imagehere>", "images": [{"image_url": "http://127.0.0.1/a.png"}]}',
        400,
        "not followed",
    ),
    "a file's name": (b'{"prompt": "a <imagehere>", "images": ["/etc/passwd"]}', 400, "images[0]"),
    "no base64": (b'{"prompt": "a <imagehere>", "images": [{"image_url": "data:;base64,?"}]}', 400, "no base64"),
    "huge number": (b'{"prompt": "a cat", "seed": 1' + b"0" * 400 + b"}", 400, "seed"),
    "one step": (b'{"prompt": "a cat", "num_inference_steps": 1}', 400, "num_inference_steps is 1"),
}


def check_refusal(answer: tuple[int, http.client.HTTPMessage, bytes], status: int, words: str) -> None:
    error = json.loads(answer[2])["error"]
    assert answer[0] == status, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert words in error["message"] and "\n" not in error["message"] and "Traceback" not in error["message"]


@pytest.mark.parametrize("name", BAD_FORMS)
def test_a_bad_form_is_refused_in_a_sentence(server: Server, name: str) -> None:
    body, status, words = BAD_FORMS[name]
    check_refusal(server.post_form("/v1/images/edits", body), status, words)


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_is_refused_in_a_sentence(server: Server, name: str) -> None:
    body, status, words = BAD_JSON[name]
    answer = server.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
    check_refusal(answer, status, words)


def test_other_bad_requests_are_refused_in_a_sentence(server: Server) -> None:
    edits = "/v1/images/edits"
    check_refusal(server.request("POST", edits, b"a=b", {"Content-Type": "text/plain"}), 415, "Content-Type")
    check_refusal(server.request("POST", edits, b"", {"Content-Type": "multipart/form-data"}), 400, "boundary")
    check_refusal(server.request("GET", edits), 405, "GET")
    check_refusal(server.request("GET", "/v1/audio"), 404, "/v1/audio")
    declared = {"Content-Type": "application/json", "Content-Length": str(10**12)}
    check_refusal(server.request("POST", edits, b"", declared), 413, "larger than")
    check_refusal(server.request("GET", "/v1/models", None, {"Origin": "http://example.com"}), 403, "example.com")
    check_refusal(server.request("GET", "/v1/models", None, {"Host": "example.com"}), 403, "example.com")
    assert server.request("GET", "/v1/models", None, {"Origin": f"http://127.0.0.1:{server.port}"})[0] == 200
    check_refusal(server.request("GET", "/v1/models", None, {"Origin": "http://["}), 403, "a page of http://[ asks")
    check_refusal(server.request("GET", "/v1/models", None, {"Host": "[x"}), 403, "for the host '[x'")


def test_images_that_are_too_large_are_refused_with_the_servers_own_limit(narrow_server: Server) -> None:
    def refusal(*sides: tuple[int, int]) -> tuple[int, http.client.HTTPMessage, bytes]:
        body = form(EDIT, [("image[]", png(Image.new("RGB", side, "red"))) for side in sides])
        return narrow_server.post_form("/v1/images/edits", body)

    option = "raise the server's --max-input-pixels"
    alone = refusal((64, 64), (101, 100))
    check_refusal(alone, 400, "image[1] (101x100) is too large: images of at most 10,000 pixels")
    check_refusal(alone, 400, option)
    together = refusal((64, 64), (96, 96))
    check_refusal(together, 400, "have 13,312 pixels, and the images of a request at most 10,000")
    check_refusal(together, 400, option)


def test_nothing_is_left_of_bad_requests(server: Server, scene: Image.Image) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as gone:  # goes in the middle of its body
        gone.sendall(
            b"POST /v1/images/edits HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000\r\n"
            b"Content-Type: application/json\r\n\r\n{"
        )
    server.client().images.edit(image=png(scene), prompt=BLUE, extra_body={"num_inference_steps": 2})
    assert server.metric("num_queue_reqs") == server.metric("num_running_reqs") == 0
    assert server.metric("worker_restarts_total") == 0
    assert SECRET_WORD not in server.request("GET", "/metrics")[2].decode()


# ---- a queue, a key, and clients that go away


def test_the_key_must_be_the_servers(narrow_server: Server) -> None:
    for key in ("", "the", "the key2", "schlüssel"):
        headers = {"Authorization": f"Bearer {key}".encode().decode("latin-1")}
        check_refusal(narrow_server.request("GET", "/v1/models", None, headers), 401, "API key")
    check_refusal(narrow_server.request("GET", "/v1/models"), 401, "API key")
    assert [model.id for model in narrow_server.client(KEY).models.list()] == ["tiny"]
    assert narrow_server.request("GET", "/health")[0] == 200


def test_a_full_queue_refuses_and_a_long_wait_ends(narrow_server: Server) -> None:
    short = form({**EDIT, "num_inference_steps": "2"}, {"image": png()})
    with narrow_server.start_long_request(), ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(narrow_server.post_form, "/v1/images/edits", short)
        narrow_server.wait_until(lambda: narrow_server.metric("num_queue_reqs") == 1)
        answer = narrow_server.post_form("/v1/images/edits", short)
        check_refusal(answer, 429, "queue is full")
        assert int(answer[1]["Retry-After"]) >= 1
        check_refusal(waiting.result(), 504, "waited in the queue for 4 seconds")
    narrow_server.wait_until(lambda: narrow_server.metric("num_running_reqs") == 0)
    assert narrow_server.post_form("/v1/images/edits", short)[0] == 200


@pytest.mark.parametrize("stream", ["true", "false"])
def test_the_work_stops_when_the_client_leaves(narrow_server: Server, stream: str) -> None:
    before = narrow_server.metric("steps_total")
    with socket.create_connection(("127.0.0.1", narrow_server.port)) as connection:
        body = form({**LONG, "stream": stream}, {"image": png()})
        head = (
            f"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            f"Authorization: Bearer {KEY}\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n\r\n"
        )
        connection.sendall(head.encode() + body)
        narrow_server.wait_until(lambda: narrow_server.metric("steps_total") > before + 2)
    narrow_server.wait_until(lambda: narrow_server.metric("num_running_reqs") == 0)
    settled: list[float] = [-1.0]

    def steps_have_stopped() -> bool:
        time.sleep(0.3)
        settled.append(narrow_server.metric("steps_total"))
        return settled[-1] == settled[-2]

    narrow_server.wait_until(steps_have_stopped)
    assert settled[-1] - before < int(LONG["num_inference_steps"])
    assert narrow_server.metric('requests_total{status="499"}') >= 1


def test_a_slow_or_endless_body_is_refused(narrow_server: Server) -> None:
    head = (
        f"POST /v1/images/edits HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {KEY}\r\n"
        "Content-Type: application/json\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", narrow_server.port), timeout=120) as slow:
        slow.sendall(head + b"Content-Length: 100\r\n\r\n{")
        assert slow.recv(12) == b"HTTP/1.1 408"
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    pieces = iter([b"x" * 65536] * 17)  # no Content-Length, and 64 KiB more than the limit
    check_refusal(narrow_server.request("POST", "/v1/images/edits", pieces, headers), 413, "larger than")


def test_a_worker_that_is_killed_is_replaced_and_no_request_is_lost(
    narrow_server: Server, pipe: MigePipeline, scene: Image.Image
) -> None:
    before, restarts = narrow_server.metric("steps_total"), narrow_server.metric("worker_restarts_total")
    body = form({**EDIT, "seed": "3", "num_inference_steps": "60"}, {"image": png(scene)})
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(narrow_server.post_form, "/v1/images/edits", body)
        narrow_server.wait_until(lambda: narrow_server.metric("steps_total") > before + 2)
        narrow_server.worker().kill()
        status, _, content = answer.result()
    assert status == 200, content
    expected = pipe(BLUE, source=scene, seed=3, num_inference_steps=60).images[0]
    assert opened(json.loads(content)["data"][0]["b64_json"]).tobytes() == expected.tobytes()
    assert narrow_server.metric("worker_restarts_total") == restarts + 1
    assert narrow_server.metric("num_running_reqs") == 0


def test_a_request_that_ends_every_worker_is_given_up(narrow_server: Server) -> None:
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(narrow_server.post_form, "/v1/images/edits", form(LONG, {"image": png()}))
        for _ in range(MAX_ATTEMPTS):
            before = narrow_server.metric("steps_total")
            narrow_server.wait_until(lambda before=before: narrow_server.metric("steps_total") > before)
            narrow_server.worker().kill()
        check_refusal(answer.result(), 500, f"ended {MAX_ATTEMPTS} times")
    assert any(f"has failed: the engine has ended {MAX_ATTEMPTS} times" in line for line in narrow_server.log)
    assert narrow_server.post_form("/v1/images/edits", form(EDIT, {"image": png()}))[0] == 200


def test_a_request_that_ends_every_worker_in_its_first_step_is_given_up() -> None:
    large = {**EDIT, "n": "4", "size": "256x256", "guidance_scale": "3", "image_guidance_scale": "2"}
    with running_server("--max-side", "256", "--max-wait-ms", "30000") as server, ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.post_form, "/v1/images/edits", form(large, {"image": png()}))
        for _ in range(MAX_ATTEMPTS):
            server.wait_until(lambda: answer.done() or server.request("GET", "/ready")[0] == 200)
            worker = server.worker()
            idle = worker.cpu_times().user
            while not answer.done() and worker.cpu_times().user < idle + 0.2:  # the step takes more than a second
                time.sleep(0.02)
            worker.kill()
            server.wait_until(lambda: answer.done() or server.request("GET", "/ready")[0] == 503)
        check_refusal(answer.result(), 500, f"ended {MAX_ATTEMPTS} times")
        assert server.metric("steps_total") == 0


def test_a_server_ends_while_its_worker_is_being_replaced() -> None:
    with running_server() as server:
        process = psutil.Process(server.process.pid)
        before = set(process.children())
        server.worker().kill()
        server.wait_until(lambda: not before.issuperset(process.children()))
        processes = process.children()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0
        assert not psutil.wait_procs(processes, 20)[1]


def test_requests_end_when_their_time_is_over_and_sigterm_waits_for_those_accepted(scene: Image.Image) -> None:
    limits = ["--max-steps", "1000", "--request-timeout", "6", "--max-batch", "3"]
    with running_server(*limits, "--log-format", "json") as server:
        stream = server.start_long_request()
        with ThreadPoolExecutor(2) as pool:
            late = pool.submit(server.post_form, "/v1/images/edits", form(LONG, {"image": png()}))
            server.wait_until(lambda: server.metric("num_running_reqs") == 2)
            body = form({**EDIT, "num_inference_steps": "3"}, {"image": png(scene)})
            accepted = pool.submit(server.post_form, "/v1/images/edits", body)
            server.wait_until(lambda: accepted.done() or server.metric("num_running_reqs") == 3)
            workers = psutil.Process(server.process.pid).children()
            server.process.send_signal(signal.SIGTERM)
            assert accepted.result()[0] == 200
            check_refusal(late.result(), 504, "not done after 6 seconds")
        with stream, stream.makefile("rb") as file:
            assert b"event: error" in file.read()  # of the deadline, in a stream that was not cut off
        assert server.process.wait(60) == 0
        assert not psutil.wait_procs(workers, 20)[1]
    lines = [json.loads(line) for line in server.log]
    assert any(line["message"].startswith("model tiny, engine onnxruntime") for line in lines)
    assert not any("Traceback" in str(line) for line in lines)


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["serve", "--port", "0", "--model", str(tmp_path)])
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert str(tmp_path) in result.output


def test_an_address_that_cannot_be_had_is_said_before_the_model_is_opened(tmp_path: Path) -> None:
    def refusal(host: str, port: int) -> str:
        arguments = ["serve", "--no-page", "--host", host, "--port", str(port), "--model", str(tmp_path)]
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 2 and "Traceback" not in result.output
        assert str(tmp_path) not in result.output  # where there is no model
        return " ".join(result.output.split())

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = refusal("127.0.0.1", port)
        assert f"'127.0.0.1' and the port {port} (address already in use); give a --host" in refused
    assert "'192.0.2.1' and the port 8000 (" in refusal("192.0.2.1", 8000)  # an address for examples, of no machine
    assert "'a..b' and the port 8000 (" in refusal("a..b", 8000)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "::", "0.0.0.0"])
def test_a_server_takes_connections_to_its_host_and_no_other_gets_its_port(host: str) -> None:
    if ":" in host and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    with ExitStack() as opened:
        sockets = [opened.enter_context(sock) for sock in bind_sockets(host, 0)]
        port = sockets[0].getsockname()[1]
        reached = {"::": "::1", "0.0.0.0": "127.0.0.1"}.get(host, host)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((reached, port))
        early = [opened.enter_context(sock) for sock in bind_sockets(host, port)]  # of a server that starts beside it
        listen(sockets, host)
        socket.create_connection((reached, port)).close()
        with pytest.raises(InputError, match=f"the port {port} "):
            bind_sockets(host, port)
        with pytest.raises(InputError, match=f"the port {port} "):
            listen(early, host)
