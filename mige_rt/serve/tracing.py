"""OpenTelemetry spans: of each request, by FastAPI's instrumentation, and below it of the stages of each image.

Without a provider, which takes the extra `otel`, the API's spans are empty ones. Nothing in a span is of a request's
content, whose errors may quote it.
"""

from typing import TYPE_CHECKING

from fastapi import FastAPI
from opentelemetry import context, trace
from opentelemetry.trace import StatusCode

from mige_rt.errors import requires
from mige_rt.serve.protocol import FailureKind

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

tracer = trace.get_tracer("mige_rt.serve")


class ImageSpans:
    """The spans of one image, below the span that is current when it is accepted.

    `queue` is from its acceptance to its first step, `denoise` from there to its end.
    """

    def __init__(self) -> None:
        self._parent = context.get_current()
        self._span = tracer.start_span("queue", self._parent)

    def start(self) -> None:
        """It has left the queue."""
        self._span.end()
        self._span = tracer.start_span("denoise", self._parent)

    def restart(self) -> None:
        """It is begun again, since the worker has ended."""
        self._span.add_event("worker restart")

    def end(self, failure: FailureKind | None) -> None:
        """It is made, or there will be none."""
        if failure is not None:
            self._span.set_status(StatusCode.ERROR, failure)
        self._span.end()


def trace_id() -> str | None:
    """The current trace's, in hexadecimal digits as it is shown elsewhere; None without a provider."""
    span = trace.get_current_span().get_span_context()
    return trace.format_trace_id(span.trace_id) if span.is_valid else None


def otlp_provider(endpoint: str) -> "TracerProvider":
    """A provider that sends spans to a collector.

    Args:
        endpoint: The collector's URL for OTLP over HTTP, such as http://localhost:4318/v1/traces.

    Raises:
        InputError: A package of the extra `otel` is not here.
    """
    with requires("otel", "tracing"):
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    provider = TracerProvider(resource=Resource.create({"service.name": "mige-rt"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
    return provider


def trace_requests(app: FastAPI, provider: "TracerProvider") -> None:
    """Give spans to a provider, which the process keeps until its end.

    Raises:
        InputError: A package of the extra `otel` is not here.
    """
    with requires("otel", "tracing"):
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
    trace.set_tracer_provider(provider)
    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=provider,
        excluded_urls="/health,/ready,/metrics",
        exclude_spans=["receive", "send"],
    )
