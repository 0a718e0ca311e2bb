"""What the server allows; every limit has a safe default."""

from dataclasses import dataclass
from typing import Literal

# When a waiting image starts. continuous: at the next step; static: when the batch before has ended; none: alone.
Batching = Literal["continuous", "static", "none"]

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a request may ask for, and who may ask.

    Attributes:
        model_names: What the models are called; the first one is that of requests that name none.
        api_key: That requests must carry; None: none.
        any_host: Answer requests whatever their Host header says. Off where the server listens on loopback: a web page
            whose own name was pointed there could then read what it answers.
        max_body: Bytes of a request.
        body_timeout: Seconds in which a request's body must have come.
        max_input_pixels: Of all of a request's images together.
        max_images: Images that a request may hold.
        max_n: Images that it may ask for.
        max_steps: Denoising steps of an image.
        max_side: Longest side of an image in pixels.
    """

    model_names: tuple[str, ...]
    api_key: str | None = None
    any_host: bool = False
    max_body: int = 64 * 1024 * 1024
    body_timeout: float = 60.0
    max_input_pixels: int = 32_000_000
    max_images: int = 16
    max_n: int = 10
    max_steps: int = 100
    max_side: int = 1024
