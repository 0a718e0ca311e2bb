"""Subject-driven generation from captions (MIGE, appendix C.1): what a caption names becomes its images."""

import re
from collections.abc import Sequence
from functools import partial

from mige_rt.instruction import PLACEHOLDER
from trainer.masks import cut_out, on_square
from trainer.pipelines.config import PipelineConfig, SubjectSettings
from trainer.pipelines.loaders import Roles
from trainer.pipelines.records import Candidate, Drop, DroppedError, Record, Sample, png, unpack_mask
from trainer.pipelines.stages import (
    Stage,
    add_candidates,
    check_box,
    for_each_entity,
    locate,
    original_file,
    segment,
)


def subject_stages(config: PipelineConfig) -> list[Stage]:
    """The stages, in their order."""
    settings, roles = config.pipeline, config.roles
    assert isinstance(settings, SubjectSettings)
    return [
        Stage("read", None, _read),
        *([Stage("caption", "clip", partial(_check_caption, settings))] if roles.clip else []),
        Stage("tag", "tagger" if roles.tagger else None, _tag),
        Stage("detect", "detector" if roles.detector else None, partial(_detect, settings)),
        Stage("segment", "segmenter" if roles.segmenter else None, partial(segment, "segment")),
        *([Stage("match", "clip", partial(_check_entities, settings))] if roles.clip else []),
        Stage("write", None, partial(_write, settings)),
    ]


def place_subjects(caption: str, names: Sequence[str]) -> tuple[str, list[int]]:
    """Put placeholders where a caption names entities, with the article before the name.

    Args:
        caption: The text.
        names: Of the entities, in the caption's words.

    Returns:
        The multimodal text, and the numbers of the entities in the order of its placeholders. An entity that is not
        named, or only within a longer name, is not among them.
    """
    spans: list[tuple[int, int, int]] = []
    # Longer names first: "hot dog" before "dog".
    for number, name in sorted(enumerate(names), key=lambda pair: -len(pair[1])):
        for match in _mentions(caption, name):
            start, end = match.span()
            if all(end <= first or start >= last for first, last, _ in spans):
                spans.append((start, end, number))
                break
    spans.sort()
    text, position = "", 0
    for start, end, _ in spans:
        text += caption[position:start] + PLACEHOLDER
        position = end
    return text + caption[position:], [number for _, _, number in spans]


def _mentions(caption: str, name: str) -> list[re.Match[str]]:
    words = r"\s+".join(re.escape(word) for word in name.split())
    pattern = rf"(?<!\w)(?:(?:an?|the|this)\s+)?{words}(?!\w)"
    return list(re.finditer(pattern, caption, re.IGNORECASE)) if words else []


def _read(record: Record, roles: Roles) -> None:
    record.open()
    if PLACEHOLDER in record.text.lower():
        raise DroppedError("a caption with a placeholder", record.text[:200], bad=True)


def _check_caption(settings: SubjectSettings, record: Record, roles: Roles) -> None:
    record.scores["clip_t"] = score = roles.clip.similarity(record.open(), record.text)
    if not score >= settings.clip_t:
        raise DroppedError(f"clip_t below {settings.clip_t:g}", f"{score:.3f}")


def _tag(record: Record, roles: Roles) -> None:
    if not record.is_grounded:
        record.candidates = [Candidate(name) for name in dict.fromkeys(roles.tagger.entities(record.text))]
    add_candidates("tag", record, record.candidates)

    def check(candidate: Candidate) -> None:
        if not _mentions(record.text, candidate.words):
            raise DroppedError("a name that the caption does not have", candidate.words)

    for_each_entity("tag", record, check)


def _detect(settings: SubjectSettings, record: Record, roles: Roles) -> None:
    image = record.open()

    def find(candidate: Candidate) -> None:
        if not record.is_grounded:
            locate(roles.detector.detect(image, candidate.words), candidate, image.size)
        limits = settings.grounded_box_share if record.is_grounded else settings.box_share
        check_box(candidate, image.size, limits)

    for_each_entity("detect", record, find)


def _check_entities(settings: SubjectSettings, record: Record, roles: Roles) -> None:
    image = record.open()

    def check(candidate: Candidate) -> None:
        subject = cut_out(image, unpack_mask(candidate.mask))
        candidate.scores["clip_t"] = score = roles.clip.similarity(subject, f"a photo of {candidate.words}")
        if not score >= settings.entity_clip_t:
            raise DroppedError(f"clip_t of the cut-out below {settings.entity_clip_t:g}", f"{score:.3f}")

    for_each_entity("match", record, check)


def _write(settings: SubjectSettings, record: Record, roles: Roles) -> None:
    image, entities = record.open(), record.remaining
    _, order = place_subjects(record.text, [entity.words for entity in entities])
    chosen = [entities[number] for number in order][: settings.most_subjects]
    prompt, _ = place_subjects(record.text, [entity.words for entity in chosen])
    for entity in entities:
        if all(entity is not other for other in chosen):
            entity.drop = Drop("write", "a name within another's, or one too many", entity.words, False)
    target, content = original_file(record.image, "target")
    files = {target: content}
    for k, entity in enumerate(chosen):
        files[f"image-{k}.png"] = png(on_square(cut_out(image, unpack_mask(entity.mask)), settings.side))
        files[f"mask-{k}.png"] = entity.mask or b""
    record.samples = [
        Sample(
            prompt=prompt,
            files=files,
            images=tuple(f"image-{k}.png" for k in range(len(chosen))),
            source=None,
            target=target,
            size=image.size,
            scores=record.scores,
            subjects=tuple({"name": entity.words, "box": entity.box} for entity in chosen),
        )
    ]
