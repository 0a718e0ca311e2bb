"""The HTTP application: routes, who may ask, errors, and the OpenAPI page."""

import hmac
import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from mige_rt.serve.errors import ApiError
from mige_rt.serve.image_service import ImageService
from mige_rt.serve.options import LOOPBACK_HOSTS, ServerOptions
from mige_rt.serve.schemas import (
    IMAGE_REFERENCES,
    EditRequest,
    ErrorResponse,
    GenerationRequest,
    ImageRequest,
    ImagesResponse,
    ModelEntry,
    ModelList,
    check_model,
)

_PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
)


def create_app(service: ImageService) -> FastAPI:
    """The application, with which the service's backends begin and end."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None]:
        service.attach()
        yield
        await service.close()

    app = FastAPI(
        title="mige-rt",
        version=version("mige-rt"),
        description="Subject-driven image generation and image editing, in the shapes of OpenAI's images API.",
        lifespan=lifespan,
    )
    _add_error_handlers(app)
    app.include_router(_operation_routes(service))
    app.include_router(_api_routes(service))
    return app


def _api_routes(service: ImageService) -> APIRouter:
    options, created = service.options, int(time.time())

    async def check_caller(request: Request) -> None:
        check_origin(request, options)
        _check_key(request, options)

    router = APIRouter(
        prefix="/v1",
        dependencies=[Depends(check_caller)],
        responses={code: {"model": ErrorResponse} for code in (400, 401, 413, 429, 504)},
    )

    @router.post("/images/generations", response_model=ImagesResponse, openapi_extra=_request_body(GenerationRequest))
    async def generate(request: Request) -> Response:
        """Make new images, of the things in the images sent if there are any."""
        return await service.answer(request, GenerationRequest, "image_generation")

    @router.post("/images/edits", response_model=ImagesResponse, openapi_extra=_request_body(EditRequest))
    async def edit(request: Request) -> Response:
        """Edit an image, with things from other images if there are any."""
        return await service.answer(request, EditRequest, "image_edit")

    @router.get("/models")
    async def models() -> ModelList:
        """The models that this server has."""
        return ModelList(data=[ModelEntry(id=name, created=created) for name in options.model_names])

    @router.get("/models/{name:path}")
    async def model(name: str) -> ModelEntry:
        """A model by its name."""
        check_model(name, options)
        return ModelEntry(id=name, created=created)

    del generate, edit, models, model  # the router has them
    return router


def _operation_routes(service: ImageService) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server answers."""
        return {"status": "ok"}

    @router.get("/ready", responses={503: {"description": "The engine worker is being started."}})
    async def ready() -> JSONResponse:
        """Whether it makes images now."""
        is_ready = all(backend.is_ready for backend in service.backends.values())
        return JSONResponse({"status": "ready"}) if is_ready else JSONResponse({"status": "starting"}, 503)

    @router.get("/metrics")
    async def metrics_text() -> Response:
        """What the server counts, for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    del health, ready, metrics_text  # the router has them
    return router


def check_origin(request: Request, options: ServerOptions) -> None:
    """Web pages of others may not ask. Raises ApiError."""
    host, origin = request.headers.get("host", ""), request.headers.get("origin")
    if origin is not None and ((page := _split(origin)) is None or page.netloc != host):
        raise ApiError(403, f"a page of {origin} asks, and only this server's own pages may")
    if not options.any_host and ((own := _split(f"//{host}")) is None or own.hostname not in LOOPBACK_HOSTS):
        raise ApiError(403, f"the request is for the host {host!r}; this server is {' or '.join(LOOPBACK_HOSTS)} alone")


def _split(url: str) -> SplitResult | None:
    """A URL's parts; None where it is malformed."""
    try:
        return urlsplit(url)
    except ValueError:
        return None


def _check_key(request: Request, options: ServerOptions) -> None:
    """Raises ApiError when the key is missing or another one; takes as long whichever character differs."""
    if options.api_key is None:
        return
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), options.api_key.encode()):
        message = "the API key is missing or not this server's; send it as Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _add_error_handlers(app: FastAPI) -> None:
    async def on_api_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        return error.response()

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        message = {404: f"there is nothing at {request.url.path}", 405: f"{request.method} is not for this path"}
        sentence = message.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, f"{sentence}; see /docs", headers=error.headers).response()

    async def on_mistake(request: Request, error: Exception) -> Response:
        return ApiError(500, "the server has made a mistake; its log says more").response()

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_mistake)


def _request_body(model: type[ImageRequest]) -> dict[str, Any]:
    """What OpenAPI says of a body that is read by hand, since it may be JSON or a form."""
    schema = model.model_json_schema()
    fields: dict[str, Any] = schema["properties"]
    files = {"type": "array", "items": {"type": "string", "format": "binary"}, "maxItems": 16}
    example: dict[str, Any] = {"prompt": "a <imagehere> on a plain green background", "seed": 0}
    if model is EditRequest:
        example = {"prompt": "make the background blue", "seed": 0}
    as_json = {**schema, "properties": {**fields, "images": IMAGE_REFERENCES}}
    as_form = {**schema, "properties": {**fields, "image[]": files}}
    content = {
        "application/json": {"schema": as_json, "example": {**example, "images": [{"image_url": _PIXEL}]}},
        "multipart/form-data": {"schema": as_form, "example": example},
    }
    return {"requestBody": {"required": True, "content": content}}
