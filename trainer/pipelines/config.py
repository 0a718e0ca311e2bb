"""A pipeline's config file: YAML, checked against these types. trainer/configs/pipelines has one for each pipeline."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from mige_rt.config import PositiveInt
from mige_rt.errors import InputError
from mige_rt.validation import validation_message
from trainer.data.filters import ABOVE, AT_LEAST
from trainer.vision_models import CLIP, DETECTOR, SEGMENTER


def _absolute(path: str) -> str:
    return os.path.abspath(path)


def _absolute_if_here(model: str) -> str:
    return os.path.abspath(model) if os.path.isdir(model) else model


# Work may be done in another folder, by Ray's actors.
LocalPath = Annotated[str, AfterValidator(_absolute)]
ModelName = Annotated[str, AfterValidator(_absolute_if_here)]  # a folder, or a repository in the hub's cache
Device = Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")]
Share = Annotated[float, Ge(0), Le(1)]
Shares = tuple[Share, Share]  # smallest and largest


class _Checked(BaseModel):
    """Nothing unknown is taken, nothing coerced."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Role(_Checked):
    """Where a role's work is done.

    Attributes:
        device: cpu, cuda, cuda:1.
        num_gpus: That Ray reserves for each actor; 0.5 lets two share a GPU.
        concurrency: Actors of this role.
    """

    device: Device = "cpu"
    num_gpus: Annotated[float, Ge(0)] = 0.0
    concurrency: PositiveInt = 1


class OpenAIRole(_Role):
    """A language model behind a server with OpenAI's chat API: vLLM, llama.cpp, Ollama, or OpenAI itself.

    Attributes:
        url: Of the API, such as http://localhost:8000/v1; None: the environment's OPENAI_BASE_URL.
        model: Its name there; None: the environment's OPENAI_MODEL.
        key_variable: The environment variable that holds the key; local servers need none.
        timeout: Seconds that an answer may take.
        retries: How often a request is sent again where no answer comes or the server is overloaded.
        attempts: How often a question is put until the answer is as asked.
        response_format: Ask the server to keep to the JSON schema, which older servers cannot.
    """

    loader: Literal["openai"]
    url: str | None = None
    model: str | None = None
    key_variable: str = "OPENAI_API_KEY"
    timeout: Annotated[float, Gt(0)] = 60.0
    retries: Annotated[int, Ge(0)] = 5
    attempts: PositiveInt = 2
    response_format: bool = True


class TransformersRole(_Role):
    """A language model by transformers: Qwen2.5 for texts, Qwen2-VL or Qwen2.5-VL for images.

    Attributes:
        model: A folder, or a repository in the hub's cache.
        attempts: How often a question is put until the answer is as asked.
        precision: Of the weights.
    """

    loader: Literal["transformers"]
    model: ModelName
    attempts: PositiveInt = 2
    precision: Literal["fp32", "bf16"] = "bf16"


class GroundingDinoRole(_Role):
    """Grounding DINO by transformers, see `trainer.vision_models.GroundingDino`."""

    loader: Literal["grounding-dino"]
    model: ModelName = DETECTOR
    box_threshold: Share = 0.3
    text_threshold: Share = 0.25


class Sam3Role(_Role):
    """SAM 3 by transformers, which finds and segments at once; it needs torchvision."""

    loader: Literal["sam3"]
    model: ModelName = "facebook/sam3"
    threshold: Share = 0.5


class SamRole(_Role):
    """SAM by transformers."""

    loader: Literal["sam"]
    model: ModelName = SEGMENTER


class GrabCutRole(_Role):
    """OpenCV's GrabCut, which needs no weights."""

    loader: Literal["grabcut"]
    iterations: PositiveInt = 5


class LamaRole(_Role):
    """LaMa from its published TorchScript file, which is a program.

    Attributes:
        file: The file, such as big-lama.pt.
        trust_torchscript: Say true to run it.
    """

    loader: Literal["lama"]
    file: LocalPath
    trust_torchscript: bool = False


class TeleaRole(_Role):
    """OpenCV's inpainting after Telea (2004), which needs no weights.

    Attributes:
        radius: Of the neighbourhood of a pixel, in pixels.
    """

    loader: Literal["telea"]
    radius: Annotated[float, Gt(0)] = 5.0


class ClipRole(_Role):
    """CLIP by transformers: how well an image and a text agree."""

    loader: Literal["clip"]
    model: ModelName = CLIP


class LaionRole(_Role):
    """LAION's aesthetic predictor: a small head on CLIP's image vectors.

    Attributes:
        head: Its file: .pth (read as data alone) or .safetensors.
        model: The CLIP that it was trained on.
    """

    loader: Literal["laion"]
    head: LocalPath
    model: ModelName = "openai/clip-vit-large-patch14"


ChatRole = Annotated[OpenAIRole | TransformersRole, Field(discriminator="loader")]


class RoleConfigs(_Checked):
    """Who fills each role; None: nobody does.

    Attributes:
        tagger: Finds entities in captions and subjects in instructions: a language model.
        detector: Words to boxes; openai: a vision-language model that answers with boxes.
        segmenter: A box to a mask.
        inpainter: Fills a hole in an image.
        describer: Names and places entities in images: a vision-language model.
        clip: Scores how well an image and a text agree.
        aesthetic: Scores how beautiful an image is.
    """

    tagger: ChatRole | None = None
    detector: Annotated[GroundingDinoRole | Sam3Role | OpenAIRole, Field(discriminator="loader")] | None = None
    segmenter: Annotated[SamRole | GrabCutRole, Field(discriminator="loader")] | None = None
    inpainter: Annotated[LamaRole | TeleaRole, Field(discriminator="loader")] | None = None
    describer: ChatRole | None = None
    clip: ClipRole | None = None
    aesthetic: LaionRole | None = None


class SubjectSettings(_Checked):
    """Subject-driven generation from captions (C.1).

    Attributes:
        clip_t: The least similarity of caption and image.
        entity_clip_t: The least similarity of "a photo of [entity]" and the cut-out; the number is ours.
        box_share: The least and the largest part of the image that a detected box may cover.
        grounded_box_share: The same for boxes that came with the caption.
        most_subjects: The first so many entities of a caption become images.
        side: Width and height of a cut-out in pixels.
    """

    name: Literal["subject"]
    clip_t: float = AT_LEAST["clip_t"]
    entity_clip_t: float = AT_LEAST["clip_t"]
    box_share: Shares = (0.1, 0.85)
    grounded_box_share: Shares = (0.05, 0.8)
    most_subjects: PositiveInt = 4
    side: PositiveInt = 224


class EditSettings(_Checked):
    """Editing by text alone (C.2).

    Attributes:
        aesthetic: The target's score is above this.
    """

    name: Literal["edit"]
    aesthetic: float = ABOVE["aesthetic"]


class AddSettings(_Checked):
    """Subject addition from segmented images (C.3, figure 5a).

    Attributes:
        aesthetic: The image's score is above this.
        mask_share: The least and the largest part of the image that a mask may cover.
        dilation: Pixels by which a mask is widened before what is under it is filled.
        long_side: Of source and target, in pixels.
        side: Width and height of a cut-out in pixels.
    """

    name: Literal["add"]
    aesthetic: float = 5.0
    mask_share: Shares = (0.1, 0.5)
    dilation: Annotated[int, Ge(0), Le(200)] = 20
    long_side: PositiveInt = 720
    side: PositiveInt = 224


class ReplaceSettings(_Checked):
    """Subject replacement from edited images (C.3, figure 5b).

    Attributes:
        annotation_match: The sample's own score is above this, where it has one.
        aesthetic: The target's score is above this.
        box_share: The least and the largest part of the image that the new subject's box may cover.
        side: Width and height of a cut-out in pixels.
    """

    name: Literal["replace"]
    annotation_match: float = ABOVE["annotation_match"]
    aesthetic: float = ABOVE["aesthetic"]
    box_share: Shares = (0.0, 1.0)
    side: PositiveInt = 224


Settings = SubjectSettings | EditSettings | AddSettings | ReplaceSettings


class PipelineConfig(_Checked):
    """A config file's content.

    Attributes:
        pipeline: Which one, and its thresholds.
        roles: Who does the work.
        shard_records: Records whose samples share a shard.
        max_bad: A shard of whose records a larger part is bad (unreadable, a nonsense answer) stops the run.
        prompts: Folder with texts that replace those of the same names in trainer/pipelines/prompts.
    """

    pipeline: Annotated[Settings, Field(discriminator="name")]
    roles: RoleConfigs = RoleConfigs()
    shard_records: PositiveInt = 64
    max_bad: Share = 0.5
    prompts: LocalPath | None = None


# The roles without which a pipeline cannot run. Scorers are left out where nobody fills them.
NEEDED: dict[str, tuple[str, ...]] = {
    "subject": (),  # captions may bring their entities and boxes with them
    "edit": (),
    "add": ("inpainter", "describer"),
    "replace": ("tagger", "detector"),
}

Model = TypeVar("Model", bound=BaseModel)


def load_pipeline_config(path: Path) -> PipelineConfig:
    """Read a config file.

    Args:
        path: A YAML file as in trainer/configs/pipelines.

    Raises:
        InputError: The file cannot be read, the message names what is unknown, missing or wrong in it, or a role that
            the pipeline needs has nobody.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as a YAML file: {' '.join(str(error).split())}") from error
    config = check_json(PipelineConfig, content, str(path))
    lacking = [role for role in NEEDED[config.pipeline.name] if getattr(config.roles, role) is None]
    roles = config.roles
    if config.pipeline.name in ("subject", "replace"):
        if (roles.tagger is None) != (roles.detector is None):
            lacking.append("tagger" if roles.tagger is None else "detector")
        if roles.segmenter is None and not isinstance(roles.detector, Sam3Role):
            lacking.append("segmenter")
    if lacking:
        raise InputError(
            f"{path}: the pipeline {config.pipeline.name} needs {', '.join(dict.fromkeys(lacking))}; say in roles who "
            "fills it"
        )
    return config


def check_json(model: type[Model], content: Any, where: str) -> Model:
    """Check plain data against one of these types, as JSON: lists may become tuples, nothing else is coerced.

    Raises:
        InputError: Names every field that is unknown, missing, or of a wrong type or value.
    """
    try:
        return model.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        raise InputError(validation_message(error, where, model)) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"{where}: {error}") from error
