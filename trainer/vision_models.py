"""Frozen networks by transformers that look at images: CLIP, Grounding DINO and SAM, from folders on this machine.

Nothing is downloaded. Image processors are those that need Pillow alone, so that results do not depend on whether
torchvision is installed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.hub import local_folder
from trainer.masks import Box

CLIP = "openai/clip-vit-base-patch32"
DETECTOR, SEGMENTER = "IDEA-Research/grounding-dino-base", "facebook/sam-vit-huge"
_WEIGHTS = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)")


@dataclass(frozen=True)
class EncoderName:
    """What a number in a table depends on.

    Attributes:
        name: A repository on the hub, a folder, or a package.
        sha256: Of the file with its weights; of several files, of their digests in the order of their names.
    """

    name: str
    sha256: str


class Clip:
    """CLIP (Radford et al., 2021) by transformers: images and texts to vectors that can be compared."""

    def __init__(self, folder: Path, name: str, device: str) -> None:
        from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

        self.id = EncoderName(name, weights_digest(folder))
        self._device = device
        self._model = load_model(CLIPModel, folder, device)
        self._processor: Any = CLIPImageProcessorPil.from_pretrained(folder)
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> NDArray[np.float32]:
        """Vectors float32 [N,D] of length one, of RGB images of any size."""
        inputs = self._processor(list(images), return_tensors="pt").to(self._device)
        return unit_vectors(self._model.get_image_features(**inputs))

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """float32 [N,D]; a text is cut after the 77 tokens that CLIP was trained with."""
        inputs = self._tokenizer(
            list(texts), padding=True, truncation=True, max_length=self._positions, return_tensors="pt"
        ).to(self._device)
        return unit_vectors(self._model.get_text_features(**inputs))

    @property
    def dimensions(self) -> int:
        """D, the length of its vectors in numbers."""
        return self._model.config.projection_dim

    @property
    def _positions(self) -> int:
        return self._model.config.text_config.max_position_embeddings


@dataclass(frozen=True)
class Detection:
    """A match of some words in an image.

    Attributes:
        box: Where it is.
        score: How sure the detector is, from 0 to 1.
        mask: bool [height,width], from a detector that segments as well.
    """

    box: Box
    score: float
    mask: NDArray[np.bool_] | None = None


class GroundingDino:
    """Grounding DINO (Liu et al., 2023) by transformers: words to boxes; the published script's thresholds."""

    BOX_THRESHOLD, TEXT_THRESHOLD = 0.3, 0.25

    def __init__(
        self, folder: Path, device: str, *, box_threshold: float | None = None, text_threshold: float | None = None
    ) -> None:
        from transformers import (
            AutoTokenizer,
            GroundingDinoForObjectDetection,
            GroundingDinoImageProcessorPil,
            GroundingDinoProcessor,
        )

        self._device = device
        self._thresholds = box_threshold, text_threshold
        self._model = load_model(GroundingDinoForObjectDetection, folder, device)
        processor, tokenizer = (c.from_pretrained(folder) for c in (GroundingDinoImageProcessorPil, AutoTokenizer))
        self._processor: Any = GroundingDinoProcessor(processor, tokenizer)

    @torch.inference_mode()
    def detect(self, image: Image.Image, words: str) -> list[Detection]:
        """The matches of some words, the best one first; boxes are not cut to the image."""
        text = words.strip().lower().rstrip(".") + "."  # as the detector was trained
        box_threshold, text_threshold = self._thresholds
        inputs = self._processor(images=image, text=text, return_tensors="pt").to(self._device)
        (detected,) = self._processor.post_process_grounded_object_detection(
            self._model(**inputs),
            inputs["input_ids"],
            threshold=self.BOX_THRESHOLD if box_threshold is None else box_threshold,
            text_threshold=self.TEXT_THRESHOLD if text_threshold is None else text_threshold,
            target_sizes=[image.size[::-1]],
        )
        pairs = zip(detected["boxes"].tolist(), detected["scores"].tolist(), strict=True)
        return sorted((Detection(tuple(box), score) for box, score in pairs), key=lambda match: -match.score)


class Sam:
    """SAM (Kirillov et al., 2023) by transformers: a box to the mask of what is in it."""

    def __init__(self, folder: Path, device: str) -> None:
        from transformers import SamImageProcessorPil, SamModel, SamProcessor

        self._device = device
        self._model = load_model(SamModel, folder, device)
        self._processor: Any = SamProcessor(SamImageProcessorPil.from_pretrained(folder))

    @torch.inference_mode()
    def segment(self, image: Image.Image, box: Box) -> NDArray[np.bool_]:
        """The mask, bool [height,width]."""
        inputs = self._processor(image, input_boxes=[[list(box)]], return_tensors="pt").to(self._device)
        sizes = inputs["original_sizes"], inputs["reshaped_input_sizes"]
        predicted = self._model(
            pixel_values=inputs["pixel_values"],
            input_boxes=inputs["input_boxes"].to(torch.float32),
            multimask_output=False,
        ).pred_masks
        (masks,) = self._processor.image_processor.post_process_masks(predicted.cpu(), *(s.cpu() for s in sizes))
        return masks[0, 0].numpy().astype(bool)


class Sam3:
    """SAM 3 (Meta, 2025) by transformers: words to boxes and masks at once. Its classes need torchvision."""

    def __init__(self, folder: Path, device: str, threshold: float) -> None:
        """Raises InputError where torchvision is not installed."""
        try:
            import torchvision  # noqa: F401  # pyright: ignore[reportMissingImports]  # optional
            from transformers import Sam3Model, Sam3Processor
        except ImportError as error:
            raise InputError(f"SAM 3 needs torchvision ({error}); install it with: pip install torchvision") from error
        self._device, self._threshold = device, threshold
        self._model = load_model(Sam3Model, folder, device)
        self._processor: Any = Sam3Processor.from_pretrained(folder, local_files_only=True)

    @torch.inference_mode()
    def detect(self, image: Image.Image, words: str) -> list[Detection]:
        """The matches of some words, with their masks, the best one first."""
        inputs = self._processor(images=image, text=words, return_tensors="pt").to(self._device)
        (matches,) = self._processor.post_process_instance_segmentation(
            self._model(**inputs), threshold=self._threshold, target_sizes=[image.size[::-1]]
        )
        columns = (matches[name].cpu() for name in ("boxes", "scores", "masks"))
        rows = zip(*columns, strict=True)
        detections = [Detection(tuple(b.tolist()), float(score), mask.numpy().astype(bool)) for b, score, mask in rows]
        return sorted(detections, key=lambda match: -match.score)


def download_command(name: str, default: str) -> str:
    """What downloads an encoder to the hub's cache, or, where a folder was named, the default one to that folder."""
    repository = re.fullmatch(r"[\w.-]+/[\w.-]+", name) and not Path(name).exists()
    where = name if repository else f"{default} --local-dir {name}"
    return f'hf download {where} --exclude "*.msgpack" "*.h5" "onnx/*"'


def weights_digest(folder: Path) -> str:
    """SHA-256 of a model folder's weights; of several files, of their digests in the order of their names.

    Raises:
        InputError: There are none.
    """
    files = sorted(path for path in folder.iterdir() if _WEIGHTS.fullmatch(path.name))
    files = [path for path in files if path.suffix == ".safetensors"] or files  # which transformers prefers
    if not files:
        raise InputError(f"{folder} has no model.safetensors or pytorch_model.bin")
    digests = []
    for path in files:
        with path.open("rb") as file:
            digests.append(file_digest(file, "sha256").hexdigest())
    return digests[0] if len(digests) == 1 else sha256("".join(digests).encode()).hexdigest()


def locate_model(name: str) -> Path:
    """The folder of a model that is on this machine: a folder, or a repository that the hub's cache holds.

    Raises:
        InputError: There is none.
    """
    folder = local_folder(name, local_files_only=True)
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} is no model folder here: it has no config.json")
    return folder


def load_model(kind: Any, folder: Path, device: str) -> Any:
    """A network of a class of transformers, in float32, frozen."""
    model = kind.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def unit_vectors(output: Any) -> NDArray[np.float32]:
    """float32 [N,D], each of length one, of what a network of transformers gives."""
    features = output if isinstance(output, torch.Tensor) else output.pooler_output
    return F.normalize(features.float(), dim=-1).cpu().numpy()
