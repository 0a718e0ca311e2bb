"""`mige-rt serve` and `mige-rt ui`."""

import logging
import math
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar, get_args

import click

from mige_rt.cli.limits import given_limits
from mige_rt.cli.shared import model_options
from mige_rt.errors import InputError, requires
from mige_rt.serve.options import Batching
from mige_rt.terminal import message

_log = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., Any])


def _server_options(port: int) -> Callable[[F], F]:
    """The options of a server's command; port: its default."""
    options = (
        click.option(
            "--host", default="127.0.0.1", show_default=True, help="address to listen on; 0.0.0.0: all of them"
        ),
        click.option("--port", type=click.IntRange(0, 65535), default=port, show_default=True, help="0: a free one"),
        click.option("--api-key", envvar="MIGE_RT_API_KEY", help="that requests must carry; better in MIGE_RT_API_KEY"),
        model_options,
        click.option("--served-model-name", help="what the API calls the model  [default: its own name]"),
        click.option(
            "--max-batch",
            type=click.IntRange(1),
            default=8,
            show_default=True,
            help="images that advance together at most",
        ),
        click.option(
            "--batching",
            type=click.Choice(get_args(Batching)),
            default="continuous",
            show_default=True,
            help="when a waiting image starts: at the next step, when the batch before has ended, or alone",
        ),
        click.option(
            "--max-queue", type=click.IntRange(1), default=64, show_default=True, help="images that wait at most"
        ),
        click.option(
            "--max-wait-ms",
            type=click.IntRange(1),
            default=60_000,
            show_default=True,
            help="how long an image waits for its first step at most",
        ),
        click.option(
            "--request-timeout",
            type=click.FloatRange(1),
            default=300,
            show_default=True,
            help="seconds to a request's end",
        ),
        click.option(
            "--body-timeout",
            type=click.FloatRange(0.1),
            default=60,
            show_default=True,
            help="seconds for a request to arrive",
        ),
        click.option("--max-body-mb", type=click.IntRange(1), default=64, show_default=True, help="size of a request"),
        click.option(
            "--max-input-pixels",
            type=click.IntRange(1),
            default=32_000_000,
            show_default=True,
            help="of a request's images",
        ),
        click.option("--max-n", type=click.IntRange(1), default=10, show_default=True, help="images of a request"),
        click.option("--max-steps", type=click.IntRange(2, 1000), default=100, show_default=True, help="of an image"),
        click.option(
            "--max-side", type=click.IntRange(1), help="of an image in pixels  [default: twice the trained size]"
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="of the lines on stderr; no prompt is in them",
        ),
        click.option(
            "--otlp-traces-endpoint",
            metavar="URL",
            help="send OpenTelemetry spans there, as http://localhost:4318/v1/traces (extra otel)",
        ),
    )

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


@click.command()
@_server_options(port=8000)
@click.option(
    "--page/--no-page", default=True, help="the page at /ui, where the extra ui is installed  [default: page]"
)
def serve(**values: Any) -> None:
    """Make images over HTTP, in the shapes of OpenAI's images API.

    \b
      mige-rt serve
      curl http://127.0.0.1:8000/v1/images/edits -F image=@scene.png -F prompt="make the background blue"

    Requests advance together, a step at a time; an image is the same whatever is made beside it. /docs describes the
    API, /metrics is for Prometheus. SIGTERM ends the server after the requests that it has accepted.
    """
    _serve(values, page=values["page"] and find_spec("gradio") is not None)


@click.command()
@_server_options(port=7860)
def ui(**values: Any) -> None:
    """Make and edit images on a page in the browser.

    \b
      mige-rt ui
      mige-rt ui --model my-bundle --port 8080

    It is the page of `mige-rt serve`, at /ui of the same server. Programs reach the model over MCP, too, at
    /ui/gradio_api/mcp. Nothing of it is reachable from elsewhere unless --host says so.
    """
    _serve(values, page=True)


def _serve(values: dict[str, Any], *, page: bool) -> None:
    """Run a server until it is told to end. page: with the page, which needs the extra ui."""
    with requires("ui", "the page") if page else requires("serve", "serving"):
        import uvicorn

        from mige_rt.serve.api import create_app
        from mige_rt.serve.image_service import ImageService
        from mige_rt.serve.logs import configure_logging
        from mige_rt.serve.metrics import Metrics
        from mige_rt.serve.options import LOOPBACK_HOSTS, ServerOptions
        from mige_rt.serve.server import Server, address_of, bind_sockets, listen
        from mige_rt.serve.supervisor import QueueLimits, Supervisor
        from mige_rt.serve.tracing import otlp_provider, trace_requests
        from mige_rt.serve.worker import WorkerOptions

        if page:
            import_module("mige_rt.ui.mount")  # now, since opening the model takes longer
    from mige_rt.bundle import DEFAULT_MODEL

    if values["api_key"] == "":
        raise InputError("--api-key is empty; leave it out for none")
    host: str = values["host"]
    sockets = bind_sockets(host, values["port"])  # now, since opening the model takes longer
    for sock in sockets:
        click.get_current_context().call_on_close(sock.close)
    configure_logging(values["log_format"])
    if host not in LOOPBACK_HOSTS and values["api_key"] is None:
        _log.warning("whoever reaches %s can use the server; --api-key keeps others out", message(host))
    endpoint: str | None = values["otlp_traces_endpoint"]
    provider = None if endpoint is None else otlp_provider(endpoint)
    worker = WorkerOptions(
        model=values["model"] or str(DEFAULT_MODEL),
        engine=values["engine"],
        device=values["device"],
        precision=values["precision"],
        max_batch=values["max_batch"],
        batching=values["batching"],
        limits=given_limits(),
    )
    timeout: float = values["request_timeout"]
    limits = QueueLimits(max_queue=values["max_queue"], max_wait=values["max_wait_ms"] / 1000, timeout=timeout)
    metrics = Metrics()
    supervisor = Supervisor(worker, limits, metrics)
    model = supervisor.model
    name: str = values["served_model_name"] or _shown_name(model.name)
    options = ServerOptions(
        model_names=(name,),
        api_key=values["api_key"],
        any_host=host not in LOOPBACK_HOSTS,
        max_body=values["max_body_mb"] * 1024 * 1024,
        body_timeout=values["body_timeout"],
        max_input_pixels=values["max_input_pixels"],
        max_n=min(values["max_n"], values["max_queue"]),
        max_steps=values["max_steps"],
        max_side=values["max_side"] or 2 * model.config.size,
    )
    _log.info("model %s, engine %s", message(name), model.runs_on)
    service = ImageService(options, {name: supervisor}, metrics)
    app = create_app(service)
    if provider is not None:
        trace_requests(app, provider)
    end_page = None
    if page:
        from mige_rt.ui.mount import mount_page

        end_page = mount_page(app, service, supervisor)
    config = uvicorn.Config(
        app,
        log_config=None,  # as the root logger was configured above
        access_log=False,  # requests for images are logged when they end
        server_header=False,
        timeout_graceful_shutdown=math.ceil(timeout),  # by then, what was accepted has ended
    )
    signal.signal(signal.SIGTERM, _exit)  # uvicorn sends the signal again when all is done
    server = uvicorn.Server(config) if end_page is None else Server(config, end_page)
    listen(sockets, host)
    _log.info("running on %s (Ctrl+C ends it)", message(address_of(sockets, host)))
    server.run(sockets)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit(0)


def _shown_name(model: str) -> str:
    """A model's name without the path to it, which is nobody else's business."""
    return Path(model).name if Path(model).is_dir() else model
