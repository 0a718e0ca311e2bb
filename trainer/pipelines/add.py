"""Subject addition from segmented images (MIGE, appendix C.3, figure 5a): what is taken out is added."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from PIL import Image

from mige_rt.errors import InputError
from mige_rt.validation import validate
from trainer.data.published import known_fields
from trainer.masks import cut_out, decode_rle, long_side_size, mask_box, on_square, resize_mask
from trainer.pipelines.config import AddSettings, PipelineConfig
from trainer.pipelines.loaders import Roles
from trainer.pipelines.records import Candidate, DroppedError, Record, Sample, pack_mask, png, unpack_mask
from trainer.pipelines.stages import (
    Stage,
    add_candidates,
    check_mask_size,
    check_score,
    check_share,
    for_each_entity,
    set_mask,
)


@dataclass(frozen=True)
class RunLengths:
    """A mask as COCO has it, see `masks.decode_rle`."""

    size: tuple[int, int]
    counts: str | tuple[int, ...]


def add_stages(config: PipelineConfig) -> list[Stage]:
    """The stages, in their order."""
    settings = config.pipeline
    assert isinstance(settings, AddSettings)
    beauty = Stage("aesthetic", "aesthetic", partial(_check_image, settings))
    return [
        Stage("read", None, _read),
        *([beauty] if config.roles.aesthetic else []),
        Stage("masks", None, partial(_take_masks, settings)),
        Stage("complete", "describer", partial(_check_complete, settings)),
        Stage("name", "describer", partial(_name, settings)),
        Stage("inpaint", "inpainter", partial(_inpaint, settings)),
        Stage("instruct", "describer", partial(_instruct, settings)),
        Stage("write", None, partial(_write, settings)),
    ]


def _read(record: Record, roles: Roles) -> None:
    record.open()
    read_masks(record.annotation)


def read_masks(path: str | None) -> list[RunLengths]:
    """The masks of an annotation in SA-1B's layout: a JSON object whose annotations have a segmentation each.

    Raises:
        DroppedError: There is no such file, or it is something else.
    """
    try:
        if path is None:
            raise InputError("no annotation stands beside the image")
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        annotations = content.get("annotations") if isinstance(content, dict) else None
        if not isinstance(annotations, list):
            raise InputError(f"{path} has no list of annotations")
        entries = [entry.get("segmentation") if isinstance(entry, dict) else None for entry in annotations]
        return [validate(RunLengths, known_fields(RunLengths, entry), path) for entry in entries]
    except (OSError, ValueError, RecursionError, InputError) as error:
        raise DroppedError("masks that cannot be read", str(error), bad=True) from error


def _check_image(settings: AddSettings, record: Record, roles: Roles) -> None:
    # Another name than that of the target's score, by which training filters at another limit.
    record.scores["image_aesthetic"] = score = roles.aesthetic.score(record.open())
    check_score("aesthetic", score, settings.aesthetic)


def _take_masks(settings: AddSettings, record: Record, roles: Roles) -> None:
    size = record.open().size
    encoded = read_masks(record.annotation)
    add_candidates("masks", record, [Candidate() for _ in encoded])
    masks = iter(encoded)

    def take(candidate: Candidate) -> None:
        lengths = next(masks)
        check_mask_size(lengths.size, size)
        try:
            mask = decode_rle(lengths.counts, lengths.size)
        except ValueError as error:
            raise DroppedError("masks that cannot be read", str(error), bad=True) from error
        check_share("mask", float(mask.mean()), settings.mask_share)
        set_mask(candidate, mask, size)
        candidate.box = mask_box(mask)

    for_each_entity("masks", record, take)


def _subject(settings: AddSettings, image: Image.Image, candidate: Candidate) -> Image.Image:
    return on_square(cut_out(image, unpack_mask(candidate.mask)), settings.side)


def _check_complete(settings: AddSettings, record: Record, roles: Roles) -> None:
    image = record.open()

    def check(candidate: Candidate) -> None:
        if not roles.describer.is_complete(_subject(settings, image, candidate)):
            raise DroppedError("not a complete entity")

    for_each_entity("complete", record, check)


def _name(settings: AddSettings, record: Record, roles: Roles) -> None:
    image = record.open()

    def name(candidate: Candidate) -> None:
        candidate.words = roles.describer.name(_subject(settings, image, candidate))

    for_each_entity("name", record, name)


def _inpaint(settings: AddSettings, record: Record, roles: Roles) -> None:
    from trainer.pipelines.opencv import dilate

    image = record.open()
    small = _at_output_size(settings, image)

    def fill(candidate: Candidate) -> None:
        hole = resize_mask(dilate(unpack_mask(candidate.mask), settings.dilation), small.size)
        candidate.background = png(roles.inpainter.inpaint(small, hole))

    for_each_entity("inpaint", record, fill)


def _at_output_size(settings: AddSettings, image: Image.Image) -> Image.Image:
    return image.resize(long_side_size(image.size, settings.long_side), Image.Resampling.BICUBIC)


def _scaled_box(candidate: Candidate, size: Sequence[int], new_size: Sequence[int]) -> tuple[float, ...]:
    assert candidate.box is not None
    return tuple(x * new_size[k % 2] / size[k % 2] for k, x in enumerate(candidate.box))


def _instruct(settings: AddSettings, record: Record, roles: Roles) -> None:
    image = record.open()
    small = _at_output_size(settings, image)

    def instruct(candidate: Candidate) -> None:
        left, top, right, bottom = _scaled_box(candidate, image.size, small.size)
        candidate.prompt = roles.describer.instruction(small, candidate.words, (left, top, right, bottom))

    for_each_entity("instruct", record, instruct)


def _write(settings: AddSettings, record: Record, roles: Roles) -> None:
    image = record.open()
    small = _at_output_size(settings, image)
    target = png(small)
    record.samples = [
        Sample(
            prompt=entity.prompt,
            files={
                "target.png": target,
                "source.png": entity.background or b"",
                "image-0.png": png(_subject(settings, image, entity)),
                "mask-0.png": pack_mask(resize_mask(unpack_mask(entity.mask), small.size)),
            },
            images=("image-0.png", "source.png"),
            source="source.png",
            target="target.png",
            size=small.size,
            scores=record.scores,
            subjects=({"name": entity.words, "box": _scaled_box(entity, image.size, small.size)},),
        )
        for entity in record.remaining
    ]
