"""The messages between the server and its engine worker, pickled over a multiprocessing connection.

The server sends tasks and cancellations. The worker sends `Ready` or `NotOpened` once, then events about tasks and a
`StepReport` after each step.
"""

from dataclasses import dataclass
from typing import Literal

from PIL.Image import Image

from mige_rt.config import ModelConfig
from mige_rt.requests import ResolvedRequest
from mige_rt.sampling_params import SamplingParams

# invalid_request: the client's to mend. timeout, queue_full, cancelled: only the server says so.
FailureKind = Literal["invalid_request", "server_error", "timeout", "queue_full", "cancelled"]


@dataclass(frozen=True)
class ImageTask:
    """One image to make.

    Attributes:
        id: Different from that of every other task.
        request: What to make, with its seed.
        params: How to sample.
        partial_images: How many images are sent before the last one.
        report_steps: Whether an event is sent after each step.
    """

    id: str
    request: ResolvedRequest
    params: SamplingParams
    partial_images: int = 0
    report_steps: bool = False


@dataclass(frozen=True)
class Cancel:
    """Stop working on a task; nothing more is sent about it."""

    id: str


@dataclass(frozen=True)
class Ready:
    """The model is open.

    Attributes:
        name: The model's.
        config: The model's sizes and defaults.
        engine: What runs it.
        device: Where it runs.
        precision: Of its graphs.
        max_batch: How many images advance together at most.
    """

    name: str
    config: ModelConfig
    engine: str
    device: str
    precision: str
    max_batch: int

    @property
    def runs_on(self) -> str:
        """Engine, device and precision, as `onnxruntime on cpu in fp32`."""
        return f"{self.engine} on {self.device} in {self.precision}"


@dataclass(frozen=True)
class NotOpened:
    """The model could not be opened; the worker ends."""

    message: str


@dataclass(frozen=True)
class Started:
    """A task has left the queue."""

    id: str


@dataclass(frozen=True)
class Progress:
    """A task has made a step.

    Attributes:
        id: The task's.
        step: How many it has made.
        steps: How many it will make.
    """

    id: str
    step: int
    steps: int


@dataclass(frozen=True)
class PartialImage:
    """A task's image as the model predicts it midway.

    Attributes:
        id: The task's.
        index: 0 to `partial_images` - 1.
        image: RGB.
    """

    id: str
    index: int
    image: Image


@dataclass(frozen=True)
class TokenUsage:
    """What a task took, in tokens.

    Attributes:
        text: Of the prompt, without those of its images.
        image: Of the prompt's images.
        output: Patches of the image made, which is what the denoiser attends to.
    """

    text: int
    image: int
    output: int


@dataclass(frozen=True)
class Finished:
    """A task's image is made."""

    id: str
    image: Image
    usage: TokenUsage


@dataclass(frozen=True)
class Failed:
    """A task has ended without an image.

    Attributes:
        id: The task's.
        kind: Who can do what about it.
        message: One sentence.
        retry_after: Seconds after which there may be room; None where the queue was not full.
    """

    id: str
    kind: FailureKind
    message: str
    retry_after: int | None = None


TaskEvent = Started | Progress | PartialImage | Finished | Failed


@dataclass(frozen=True)
class StepReport:
    """One step of everything that was running.

    Attributes:
        batch_sizes: Images in each call of the denoiser.
    """

    batch_sizes: tuple[int, ...]
