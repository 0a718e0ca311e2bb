"""A pipeline is a list of stages, each of which at most one role works in; and what several pipelines do alike."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mige_rt.errors import InputError
from trainer.data.tar_images import read_image_file
from trainer.masks import Mask, box_share, clip_box, mask_box
from trainer.pipelines.config import Shares
from trainer.pipelines.loaders import Roles
from trainer.pipelines.records import Candidate, Drop, DroppedError, Record, pack_mask
from trainer.vision_models import Detection


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline.

    Attributes:
        name: As reports call it.
        role: The field of `RoleConfigs` that it needs; None: none.
        apply: Changes a record. Raises DroppedError where it is left out, and InputError where none can go on.
    """

    name: str
    role: str | None
    apply: Callable[[Record, Roles], None]


def run_stages(stages: Sequence[Stage], record: Record, roles: Roles) -> None:
    """Take a record through stages as far as it comes, which the record then says."""
    for stage in stages:
        if record.drop is not None or record.stop:
            return
        try:
            stage.apply(record, roles)
        except DroppedError as error:
            record.drop = _drop(stage.name, error)
        except InputError as error:
            record.stop = f"{stage.name}: {error}"


def add_candidates(stage: str, record: Record, candidates: Sequence[Candidate]) -> None:
    """Note the entities that a stage has brought up. Raises DroppedError where there is none."""
    if not candidates:
        raise DroppedError("no entity in it")
    for candidate in candidates:
        candidate.stage = stage
    record.candidates = list(candidates)


def for_each_entity(stage: str, record: Record, action: Callable[[Candidate], None]) -> None:
    """Do something with each entity that remains. An action's DroppedError leaves out the one entity.

    Raises:
        DroppedError: No entity remains; bad, where every entity that this stage left out is.
    """
    drops: list[Drop] = []
    for candidate in record.remaining:
        try:
            action(candidate)
        except DroppedError as error:
            candidate.drop = _drop(stage, error)
            drops.append(candidate.drop)
    if not record.remaining:
        raise DroppedError("no entity is left", bad=all(drop.bad for drop in drops))


def locate(detections: Sequence[Detection], candidate: Candidate, size: tuple[int, int]) -> None:
    """Give an entity the best of its matches, with the mask where the detector has it.

    Raises:
        DroppedError: There is none.
    """
    box = clip_box(detections[0].box, size) if detections else None
    if box is None:
        raise DroppedError("not in the image", candidate.words)
    candidate.box, mask = box, detections[0].mask
    if mask is not None:
        set_mask(candidate, mask, size)


def set_mask(candidate: Candidate, mask: Mask, size: tuple[int, int]) -> None:
    """Give an entity its mask.

    Args:
        candidate: The entity.
        mask: Its pixels.
        size: Of the image, (width, height).

    Raises:
        DroppedError: The mask is empty, or of another size than the image.
    """
    check_mask_size(mask.shape, size)
    if mask_box(mask) is None:
        raise DroppedError("an empty mask", candidate.words)
    candidate.mask = pack_mask(mask)


def check_mask_size(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """Raises DroppedError where a mask of (height, width) is not of the size of an image of (width, height)."""
    if shape != size[::-1]:
        detail = f"{shape[1]}x{shape[0]} for an image of {size[0]}x{size[1]}"
        raise DroppedError("a mask of another size than the image", detail, bad=True)


def segment(stage: str, record: Record, roles: Roles) -> None:
    """Give each entity that has a box the mask of what is in it, unless the detector gave one."""
    image = record.open()

    def cut(candidate: Candidate) -> None:
        if candidate.mask is None and candidate.box is not None:
            set_mask(candidate, roles.segmenter.segment(image, candidate.box), image.size)

    for_each_entity(stage, record, cut)


def check_share(what: str, share: float, limits: Shares) -> None:
    """Raises DroppedError where something covers too little or too much of the image."""
    low, high = limits
    if not low <= share <= high:
        raise DroppedError(f"{what} not of {low:g} to {high:g} of the image", f"{share:.3f}")


def check_box(candidate: Candidate, size: tuple[int, int], limits: Shares) -> None:
    """Raises DroppedError where an entity's box covers too little or too much of an image of (width, height)."""
    box = None if candidate.box is None else clip_box(candidate.box, size)
    if box is None:
        raise DroppedError("a box outside of the image", str(candidate.box), bad=True)
    candidate.box = box
    check_share("box", box_share(box, size), limits)


def check_score(name: str, score: float, limit: float) -> None:
    """Raises DroppedError where a score is not above its limit."""
    if not score > limit:
        raise DroppedError(f"{name} not above {limit:g}", f"{score:.3f}")


def original_file(path: str, name: str) -> tuple[str, bytes]:
    """An image file as it is: what a sample calls it, and its content. `open_or_drop` has read it before."""
    return f"{name}{Path(path).suffix.lower() or '.image'}", read_image_file(path)


def _drop(stage: str, error: DroppedError) -> Drop:
    return Drop(stage, error.reason, error.detail, error.bad)
