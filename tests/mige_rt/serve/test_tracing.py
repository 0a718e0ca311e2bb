"""Spans and logs: where a request's time went, and nothing of what it holds."""

import io
import json
import logging
import sys
from collections.abc import Generator

import pytest
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.serve.api import create_app
from mige_rt.serve.image_service import ImageService
from mige_rt.serve.logs import configure_logging
from mige_rt.serve.metrics import Metrics
from mige_rt.serve.options import ServerOptions
from mige_rt.serve.supervisor import QueueLimits, Supervisor
from mige_rt.serve.tracing import trace_requests
from mige_rt.serve.worker import WorkerOptions

SECRET_WORD = "zanzibar"
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def client(exporter: InMemorySpanExporter) -> Generator[TestClient]:
    """Of an application in this process, with a worker of its own, whose spans are kept."""
    options = WorkerOptions(model=str(DEFAULT_MODEL), engine="auto", device="cpu", precision="auto", max_batch=4)
    metrics = Metrics()
    supervisor = Supervisor(options, QueueLimits(max_queue=4, max_wait=60, timeout=120), metrics)
    app = create_app(ImageService(ServerOptions(model_names=("tiny",), any_host=True), {"tiny": supervisor}, metrics))
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace_requests(app, provider)
    with TestClient(app) as client:
        yield client


def spans_of(exporter: InMemorySpanExporter) -> dict[str, list[ReadableSpan]]:
    spans: dict[str, list[ReadableSpan]] = {}
    for span in exporter.get_finished_spans():
        spans.setdefault(span.name, []).append(span)
    return spans


def test_spans_say_where_the_time_of_a_request_went(client: TestClient, exporter: InMemorySpanExporter) -> None:
    exporter.clear()
    body = {"prompt": f"a red apple {SECRET_WORD}", "n": 2, "num_inference_steps": 4}
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01"}
    assert client.post("/v1/images/generations", json=body, headers=headers).status_code == 200
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200
    spans = spans_of(exporter)
    assert {name: len(same) for name, same in spans.items()} == {
        "POST /v1/images/generations": 1,
        "read": 1,
        "queue": 2,
        "denoise": 2,
        "encode": 2,
    }
    request = spans["POST /v1/images/generations"][0]
    assert request.parent is not None and f"{request.parent.span_id:016x}" == PARENT  # the client's
    for span in exporter.get_finished_spans():
        context = span.get_span_context()
        assert context is not None and f"{context.trace_id:032x}" == TRACE
        assert SECRET_WORD not in span.to_json()
        if span is not request:
            assert span.parent is not None and request.context is not None
            assert span.parent.span_id == request.context.span_id
            assert span.start_time and span.end_time and request.start_time and request.end_time
            assert request.start_time <= span.start_time <= span.end_time <= request.end_time
    for queue, denoise in zip(spans["queue"], spans["denoise"], strict=True):
        assert queue.end_time and denoise.start_time and queue.end_time <= denoise.start_time


def test_a_span_of_an_image_that_failed_says_so(client: TestClient, exporter: InMemorySpanExporter) -> None:
    exporter.clear()
    body = {"prompt": f"a red apple {SECRET_WORD}", "num_inference_steps": 3, "guidance_scale": 1e38}
    assert client.post("/v1/images/generations", json=body).status_code == 400
    spans = spans_of(exporter)
    assert spans["denoise"][0].status.description == "invalid_request"
    exporter.clear()
    answer = client.post("/v1/images/generations", json={"prompt": "a cat", "n": SECRET_WORD})
    assert answer.status_code == 400 and SECRET_WORD in answer.text  # the client may be told what it sent
    assert spans_of(exporter).keys() == {"POST /v1/images/generations", "read"}
    assert all(SECRET_WORD not in span.to_json() for span in exporter.get_finished_spans())


def test_lines_of_the_log_are_json_without_the_prompt(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr, root = io.StringIO(), logging.getLogger()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(root, "handlers", [])
    level = root.level
    configure_logging("json")
    try:
        body = {"prompt": f"a red apple {SECRET_WORD}", "num_inference_steps": 2}
        answer = client.post("/v1/images/generations", json=body, headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
        logging.getLogger("elsewhere").error("it has %s", "failed", extra={"color_message": "in red"})
    finally:
        root.setLevel(level)
    lines = [json.loads(line) for line in stderr.getvalue().splitlines()]
    request = next(line for line in lines if line["logger"] == "mige_rt.serve.image_service")
    assert request["request"] == answer.headers["X-Request-Id"] and request["trace"] == TRACE
    assert (request["status"], request["images"], request["level"]) == (200, 1, "INFO")
    assert request["path"] == "/v1/images/generations" and request["seconds"] > 0
    assert request["timestamp"].startswith("20") and "T" in request["timestamp"]
    assert lines[-1]["message"] == "it has failed" and lines[-1]["level"] == "ERROR"
    assert lines[-1].keys() == {"message", "level", "logger", "timestamp"}
    assert SECRET_WORD not in stderr.getvalue()
