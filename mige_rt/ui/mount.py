"""The page as a part of the server: where it is, and who may see it."""

import base64
import binascii
import hmac
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.routes import App
from gradio.themes import Base, Soft
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mige_rt.serve.api import check_origin
from mige_rt.serve.errors import ApiError
from mige_rt.serve.image_service import ImageService
from mige_rt.serve.options import ServerOptions
from mige_rt.serve.supervisor import Supervisor
from mige_rt.ui.page import create_page
from mige_rt.ui.tabs import EXAMPLES

PATH = "/ui"

# Gradio's scripts are in the page, and make others. Nothing comes from another host, and nothing goes there.
_CONTENT_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_FORM_OVERHEAD = 2**20  # bytes of an upload that are not the file's


def mount_page(app: FastAPI, service: ImageService, supervisor: Supervisor) -> Callable[[], Coroutine[Any, Any, None]]:
    """Put the page at /ui of the server, and the way to it at /.

    Returns:
        What ends the connections that open windows hold, when their images are made: else a server could not end.
    """
    options = service.options
    blocks, runs = create_page(service, supervisor)
    gr.mount_gradio_app(  # pyright: ignore[reportUnknownMemberType]
        app,
        blocks,
        PATH,
        allowed_paths=[str(EXAMPLES)],
        css=_static("page.css"),
        footer_links=["api", "settings"],
        head=f"<script>{_static('prompt.js')}</script>",
        max_file_size=options.max_body,
        mcp_server=True,
        run_history=False,  # would keep prompts in the browser
        show_error=False,  # what is a user's to mend is said in words; the rest is for the log
        ssr_mode=False,
        theme=_theme(),
    )
    page = next(route.app for route in app.routes if isinstance(route, Mount) and route.path == PATH)
    assert isinstance(page, App)
    app.add_middleware(PageGuard, options=options)

    # Browsers ask for the last two at the root, whatever the page's address is.
    for path, target in (("/", "/"), ("/manifest.json", "/manifest.json"), ("/favicon.ico", "/favicon.ico")):
        app.add_route(path, _redirection(PATH + target), include_in_schema=False)

    async def end() -> None:
        await runs.wait()
        page.stop_event.set()

    return end


class PageGuard:
    """Asks of the page's callers what the API asks of its own. A browser asks its user for the API key."""

    def __init__(self, app: ASGIApp, options: ServerOptions) -> None:
        self._app, self._options = app, options

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not (path == PATH or path.startswith(f"{PATH}/")):
            await self._app(scope, receive, send)
            return
        try:
            self._check(Request(scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["Content-Security-Policy"] = _CONTENT_POLICY
                headers["Referrer-Policy"] = "no-referrer"
            await send(message)

        await self._app(scope, receive, send_with_policy)

    def _check(self, request: Request) -> None:
        """Raises ApiError."""
        check_origin(request, self._options)
        _check_password(request, self._options.api_key)
        declared, most = request.headers.get("content-length", ""), self._options.max_body + _FORM_OVERHEAD
        if declared.isdigit() and int(declared) > most:
            raise ApiError(413, f"the body has {int(declared):,} bytes; at most {most:,} are taken", code="too_large")


def _check_password(request: Request, api_key: str | None) -> None:
    """Raises ApiError unless the key, if there is one, is the password of HTTP's basic authentication, or its token."""
    if api_key is None:
        return
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    password = credentials.strip().encode("latin-1")
    if scheme.lower() == "basic":
        try:
            password = base64.b64decode(password).partition(b":")[2]
        except binascii.Error:
            password = b""
    if not hmac.compare_digest(password, api_key.encode()):
        message = "the page asks for the server's API key as the password; the name does not matter"
        challenge = {"WWW-Authenticate": 'Basic realm="mige-rt", charset="UTF-8"'}
        raise ApiError(401, message, code="invalid_api_key", headers=challenge)


def _redirection(target: str) -> Callable[[Request], Response]:
    return lambda request: RedirectResponse(target)


def _static(name: str) -> str:
    return (Path(__file__).parent / "static" / name).read_text(encoding="utf-8")


def _theme() -> Base:
    """The system's fonts: none are fetched."""
    theme = Soft(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="md",
        font=["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"],
        font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
    )
    colors = {
        "body_background_fill": "*background_fill_secondary",
        "block_label_background_fill": "*block_background_fill",
        "block_label_text_color": "*body_text_color_subdued",
        "block_title_background_fill": "none",
        "block_title_text_color": "*body_text_color_subdued",
    }
    of_dark = {f"{name}_dark": value for name, value in colors.items() if name != "body_background_fill"}
    return theme.set(  # pyright: ignore[reportUnknownMemberType]
        **colors, **of_dark, block_border_width="1px", block_title_padding="0"
    )
