"""A request's body: JSON or multipart, within the limits, as plain fields and the contents of image files."""

import base64
import binascii
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, cast

from fastapi import Request
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import Field, File, FormParser, parse_options_header

from mige_rt.serve.errors import ApiError
from mige_rt.serve.options import ServerOptions

MAX_FIELDS = 64  # of a form; the API has fewer
_IMAGE_FIELDS = ("image", "image[]")
_FILE_FIELDS = (*_IMAGE_FIELDS, "mask")


@dataclass
class Body:
    """What a request holds.

    Attributes:
        fields: By name; those of a form are text.
        images: Contents of image files, in their order.
        is_form: Whether numbers are written as text.
    """

    fields: dict[str, Any] = field(default_factory=dict[str, Any])
    images: list[bytes] = field(default_factory=list[bytes])
    is_form: bool = False


async def read_body(request: Request, options: ServerOptions) -> Body:
    """Read and take apart a request's body.

    Raises:
        ApiError: It is too large, no JSON and no form, incomplete, or holds too much.
    """
    content_type, parameters = parse_options_header(request.headers.get("content-type"))
    if content_type == b"multipart/form-data":
        form = _Form(parameters.get(b"boundary"), options)
        await _read(request, options, form.write)
        return form.close()
    if content_type == b"application/json":
        content = bytearray()
        await _read(request, options, content.extend)
        return _json_body(bytes(content), options)
    raise ApiError(
        415,
        f"Content-Type is {content_type.decode('latin-1')!r}; send application/json or multipart/form-data",
    )


async def _read(request: Request, options: ServerOptions, write: Callable[[bytes], object]) -> None:
    """Hand on a body in pieces; one that is declared too large is not read at all."""
    too_large = ApiError(
        413, f"the body is larger than the {options.max_body:,} bytes that are taken", code="too_large"
    )
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > options.max_body:
        raise too_large
    size = 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > options.max_body:
            raise too_large
        write(chunk)


def _json_body(content: bytes, options: ServerOptions) -> Body:
    try:
        data: object = json.loads(content.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 ({error}); send JSON in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise ApiError(
            400, f"the body is a JSON {type(data).__name__}; send an object, such as " + '{"prompt": "a cat"}'
        )
    fields = {name: value for name, value in cast("dict[str, Any]", data).items() if value is not None}
    if "image" in fields:
        raise ApiError(400, "image is for forms; in JSON send images, a list of objects", param="image")
    references: object = fields.pop("images", [])
    if not isinstance(references, list):
        raise ApiError(400, f"images is a {type(references).__name__}; send a list of objects", param="images")
    entries = cast("list[object]", references)
    if len(entries) > options.max_images:
        raise _too_many_images(options)
    return Body(fields, [image_of_reference(i, entry) for i, entry in enumerate(entries)])


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which JSON does not have")


def image_of_reference(i: int, reference: object) -> bytes:
    """The content of {"image_url": "data:..."}; i: its place among the images. Raises ApiError when it is no such."""
    param = f"images[{i}]"
    url = cast("dict[str, object]", reference).get("image_url") if isinstance(reference, dict) else None
    if not isinstance(url, str) or len(cast("dict[str, object]", reference)) != 1:
        expected = '{"image_url": "data:image/png;base64,..."}'
        raise ApiError(400, f"{param} is not of the form {expected}; send it so, or as a file in a form", param=param)
    header, _, content = url.partition(",")
    if not header.startswith("data:"):
        raise ApiError(400, f"{param} is a link, and links are not followed; send a data URL or a file", param=param)
    try:
        if not header.endswith(";base64"):
            raise ValueError("it is not marked as base64")
        return base64.b64decode(content, validate=True)
    except (ValueError, binascii.Error) as error:
        raise ApiError(400, f"{param} holds no base64 ({error}); encode the file's content", param=param) from error


def _too_many_images(options: ServerOptions) -> ApiError:
    return ApiError(400, f"the request holds more than {options.max_images} images; send fewer", param="image")


class _Form:
    """A multipart form that is being read."""

    def __init__(self, boundary: bytes | None, options: ServerOptions) -> None:
        if not boundary:
            raise ApiError(400, "Content-Type is multipart/form-data without a boundary; use a library for forms")
        self._options, self._body, self._complete = options, Body(is_form=True), False
        self._parser = FormParser(
            "multipart/form-data",
            self._on_field,
            self._on_file,
            self._on_end,
            boundary=boundary,
            config={"MAX_MEMORY_FILE_SIZE": options.max_body},  # nothing is written to disk
        )

    def write(self, chunk: bytes) -> None:
        """Take the next piece."""
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise ApiError(400, f"the form cannot be read ({error}); use a library for forms") from error

    def close(self) -> Body:
        """The form; raises ApiError when its end has not come."""
        if not self._complete:
            raise ApiError(400, "the form ends before its last boundary: the request was cut off; send it again")
        return self._body

    def _on_field(self, part: Field) -> None:
        fields, name = self._body.fields, _text(part.field_name or b"", "a field's name")
        if name in _FILE_FIELDS:
            raise ApiError(400, f"{name} is text; send it as a file, with a filename", param=name)
        if name in fields:
            raise ApiError(400, f"{name} was sent twice; send it once", param=name)
        if len(fields) == MAX_FIELDS:
            raise ApiError(400, f"the form has more than {MAX_FIELDS} fields; send fewer")
        fields[name] = _text(part.value or b"", name)

    def _on_file(self, file: File) -> None:
        name = _text(file.field_name or b"", "a field's name")
        if name == "mask":
            raise ApiError(400, "mask is not supported; say in the prompt what to change", param="mask")
        if name not in _IMAGE_FIELDS:
            raise ApiError(400, f"{name!r} is a file; files are taken as image or image[]", param=name)
        if len(self._body.images) == self._options.max_images:
            raise _too_many_images(self._options)
        file.file_object.seek(0)
        self._body.images.append(file.file_object.read())
        file.close()

    def _on_end(self) -> None:
        self._complete = True


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ApiError(400, f"{name} is not UTF-8 ({error}); send text in UTF-8", param=name) from error
