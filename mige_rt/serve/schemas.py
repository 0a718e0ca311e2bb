"""The API's requests and answers, in the shapes of OpenAI's images API."""

from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mige_rt.errors import InputError
from mige_rt.image_size import parse_size
from mige_rt.instruction import MAX_CHARACTERS
from mige_rt.sampling_params import SamplingParams
from mige_rt.serve.body import Body
from mige_rt.serve.errors import ApiError
from mige_rt.serve.image_data import OutputFormat
from mige_rt.serve.options import ServerOptions
from mige_rt.validation import validation_message

R = TypeVar("R", bound="ImageRequest")


class ImageRequest(BaseModel):
    """The fields that generations and edits have in common; the last four are not in OpenAI's API."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(max_length=MAX_CHARACTERS, description="`<imagehere>` stands for an image, in their order.")
    model: str | None = Field(None, description="One of `/v1/models`.")
    n: int = Field(1, ge=1, description="Images to make; one if `stream` is true.")
    size: str | None = Field(None, description="`WIDTHxHEIGHT` in pixels, or `auto`: the size that the model is for.")
    quality: Literal["auto"] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = Field(None, description="Nothing is moderated here.")
    output_format: OutputFormat = "png"
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp.")
    response_format: Literal["b64_json"] | None = Field(None, description="No files are kept to be linked to.")
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=3, description="Sent before the last one if `stream` is true.")
    user: str | None = Field(None, description="Taken and ignored.")
    safety_identifier: str | None = Field(None, description="Taken and ignored.")
    seed: int | None = Field(
        None, ge=0, lt=2**63, description="Of the first image; the next ones follow. Drawn if left out."
    )
    num_inference_steps: int | None = Field(None, ge=2, description="Default: the model's for the task.")
    guidance_scale: float | None = Field(None, allow_inf_nan=False, description="How strongly the prompt counts.")
    image_guidance_scale: float | None = Field(None, allow_inf_nan=False, description="How strongly the source counts.")

    def check(self, options: ServerOptions) -> None:
        """Raises ApiError when a limit of the server is passed, or two fields exclude each other."""
        steps = self.num_inference_steps
        if self.model is not None:
            check_model(self.model, options)
        if self.n > options.max_n:
            raise ApiError(400, f"n is {self.n}; at most {options.max_n} images a request are made", param="n")
        if steps is not None and steps > options.max_steps:
            message = f"num_inference_steps is {steps}; at most {options.max_steps} are done here"
            raise ApiError(400, message, param="num_inference_steps")
        if self.stream and self.n > 1:
            raise ApiError(400, f"n is {self.n} and stream is true; one image at a time is streamed", param="n")
        if self.partial_images and not self.stream:
            message = f"partial_images is {self.partial_images} and stream is not true; set both"
            raise ApiError(400, message, param="partial_images")
        if self.output_compression is not None and self.output_format == "png":
            message = "output_compression is for jpeg and webp, and output_format is png; leave it out"
            raise ApiError(400, message, param="output_compression")
        width, height = self._size() or (0, 0)
        if max(width, height) > options.max_side:
            message = f"size is {self.size}; images of at most {options.max_side} pixels a side are made"
            raise ApiError(400, message, param="size")

    def sampling_params(self) -> SamplingParams:
        """How to sample."""
        width, height = self._size() or (None, None)
        return SamplingParams(
            num_inference_steps=self.num_inference_steps,
            guidance_scale=self.guidance_scale,
            image_guidance_scale=self.image_guidance_scale,
            width=width,
            height=height,
        )

    def _size(self) -> tuple[int, int] | None:
        if self.size in (None, "auto"):
            return None
        try:
            return parse_size(self.size)
        except InputError as error:
            raise ApiError(400, f"size: {error}", param="size") from error


class GenerationRequest(ImageRequest):
    """A new image, of the things in the images if there are any."""


class EditRequest(ImageRequest):
    """A changed image."""

    source: int = Field(0, ge=0, description="Which of the images is edited, from 0.")


def parse_request(model: type[R], body: Body, options: ServerOptions) -> R:
    """A request's fields, checked.

    Raises:
        ApiError: One is unknown, missing, of a wrong type or value, or beyond a limit.
    """
    try:
        request = model.model_validate(body.fields, strict=not body.is_form)
    except ValidationError as error:
        location = error.errors(include_url=False, include_context=False, include_input=False)[0]["loc"]
        param = str(location[0]) if location else None
        raise ApiError(400, validation_message(error, "the request", model), param=param) from error
    request.check(options)
    return request


def check_model(name: str, options: ServerOptions) -> None:
    """Raises ApiError unless the server has a model of this name."""
    if name not in options.model_names:
        names = ", ".join(map(repr, options.model_names))
        raise ApiError(
            404, f"there is no model {name!r}; this server has {names}", param="model", code="model_not_found"
        )


class ImageData(BaseModel):
    """One image of an answer."""

    b64_json: str
    seed: int = Field(description="With it, n = 1 and the same fields, the image is made again.")


class TokenDetails(BaseModel):
    """Tokens by what they stand for."""

    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """What a request took; output tokens are the patches that the denoiser attends to."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class ImagesResponse(BaseModel):
    """The answer to a request for images that does not stream."""

    created: int
    background: Literal["opaque"] = "opaque"
    data: list[ImageData]
    output_format: OutputFormat
    size: str
    usage: Usage


class ModelEntry(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["mige-rt"] = "mige-rt"


class ModelList(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]


class ErrorBody(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The answer to a request that cannot be answered otherwise."""

    error: ErrorBody


IMAGE_REFERENCES: dict[str, Any] = {
    "type": "array",
    "maxItems": 16,
    "items": {
        "type": "object",
        "required": ["image_url"],
        "properties": {"image_url": {"type": "string", "description": "A data URL; links are not followed."}},
        "additionalProperties": False,
    },
}
