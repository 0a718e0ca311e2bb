"""Opens what the config names for each role."""

from collections.abc import Mapping
from functools import cached_property
from hashlib import file_digest
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image

from mige_rt.errors import InputError
from trainer.pipelines.chat import ChatModel, OpenAIChat, TransformersChat
from trainer.pipelines.config import (
    GrabCutRole,
    LaionRole,
    LamaRole,
    OpenAIRole,
    PipelineConfig,
    Sam3Role,
    SamRole,
    TeleaRole,
    TransformersRole,
)
from trainer.pipelines.lama import Lama, check_trusted
from trainer.pipelines.language import LanguageDescriber, LanguageDetector, LanguageTagger, Prompts
from trainer.pipelines.roles import (
    AestheticScorer,
    Describer,
    Detector,
    Inpainter,
    Segmenter,
    Tagger,
    TextScorer,
)
from trainer.vision_models import Clip, GroundingDino, Sam, Sam3, download_command, locate_model, weights_digest

PLACEMENT = ("device", "num_gpus", "concurrency")  # change nothing of what a role gives
SERVICE = ("url", "key_variable", "timeout", "retries")  # the same

T = TypeVar("T")


class ClipScorer:
    """See `roles.TextScorer`."""

    def __init__(self, clip: Clip) -> None:
        self._clip = clip

    def similarity(self, image: Image.Image, text: str) -> float:
        """See `roles.TextScorer`."""
        return float(self._clip.embed_images([image])[0] @ self._clip.embed_texts([text])[0])


class Roles:
    """The roles of a config, each opened when it is first asked for."""

    def __init__(self, config: PipelineConfig) -> None:
        self._config = config.roles
        self._prompts = Prompts(config.prompts)

    @cached_property
    def tagger(self) -> Tagger:
        """Understands texts."""
        return LanguageTagger(_chat(_given(self._config.tagger)), self._prompts)

    @cached_property
    def detector(self) -> Detector:
        """Finds entities by words."""
        role = _given(self._config.detector)
        if isinstance(role, OpenAIRole):
            return LanguageDetector(_chat(role), self._prompts)
        folder = _folder(role.model)
        if isinstance(role, Sam3Role):
            return Sam3(folder, role.device, role.threshold)
        return GroundingDino(folder, role.device, box_threshold=role.box_threshold, text_threshold=role.text_threshold)

    @cached_property
    def segmenter(self) -> Segmenter:
        """Cuts out what is in a box."""
        role = _given(self._config.segmenter)
        if isinstance(role, SamRole):
            return Sam(_folder(role.model), role.device)
        from trainer.pipelines.opencv import GrabCut

        return GrabCut(role.iterations)

    @cached_property
    def inpainter(self) -> Inpainter:
        """Fills holes."""
        role = _given(self._config.inpainter)
        if isinstance(role, LamaRole):
            return Lama(role)
        from trainer.pipelines.opencv import Telea

        return Telea(role.radius)

    @cached_property
    def describer(self) -> Describer:
        """Looks at images."""
        return LanguageDescriber(_chat(_given(self._config.describer)), self._prompts)

    @cached_property
    def clip(self) -> TextScorer:
        """Scores how well an image and a text agree."""
        role = _given(self._config.clip)
        return ClipScorer(Clip(_folder(role.model), role.model, role.device))

    @property
    def scores_beauty(self) -> bool:
        """Whether anybody does."""
        return self._config.aesthetic is not None

    @cached_property
    def aesthetic(self) -> AestheticScorer:
        """Scores how beautiful an image is."""
        from trainer.pipelines.aesthetic import LaionAesthetic

        role = _given(self._config.aesthetic)
        return LaionAesthetic(Clip(_folder(role.model), role.model, role.device), Path(role.head))


def identities(config: PipelineConfig) -> dict[str, Mapping[str, Any]]:
    """What each role's answers depend on: its settings, and digests of its weights.

    Raises:
        InputError: A file or a model is not here; with the command that gets it.
    """
    described: dict[str, Mapping[str, Any]] = {}
    for name in type(config.roles).model_fields:
        role = getattr(config.roles, name)
        if role is None:
            continue
        identity = role.model_dump(exclude=set(PLACEMENT + SERVICE))
        if not isinstance(role, OpenAIRole | GrabCutRole | TeleaRole | LamaRole):
            identity["weights"] = weights_digest(_folder(role.model))
        if isinstance(role, LamaRole):
            check_trusted(role)
            identity["file"] = _file_digest(role.file)
        if isinstance(role, LaionRole):
            identity["head"] = _file_digest(role.head)
        described[name] = identity
    return described


def _file_digest(path: str) -> str:
    try:
        with open(path, "rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); download it, or correct the path in the config") from error


def _folder(model: str) -> Path:
    try:
        return locate_model(model)
    except InputError as error:
        raise InputError(f"{error}; get it by: {download_command(model, model)}") from error


def _chat(role: OpenAIRole | TransformersRole) -> ChatModel:
    if isinstance(role, OpenAIRole):
        return OpenAIChat(role)
    _folder(role.model)
    return TransformersChat(role)


def _given(role: T | None) -> T:
    assert role is not None  # `load_pipeline_config` has seen to it
    return role
