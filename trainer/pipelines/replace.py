"""Subject replacement from edited images (MIGE, appendix C.3, figure 5b): what was put in becomes an image."""

from functools import partial

from mige_rt.instruction import PLACEHOLDER_PATTERN
from trainer.masks import cut_out, on_square
from trainer.pipelines.config import PipelineConfig, ReplaceSettings
from trainer.pipelines.edit import check_target, read_pair
from trainer.pipelines.loaders import Roles
from trainer.pipelines.records import Candidate, DroppedError, Record, Sample, png, unpack_mask
from trainer.pipelines.stages import (
    Stage,
    add_candidates,
    check_box,
    check_score,
    for_each_entity,
    locate,
    original_file,
    segment,
)


def replace_stages(config: PipelineConfig) -> list[Stage]:
    """The stages, in their order."""
    settings, roles = config.pipeline, config.roles
    assert isinstance(settings, ReplaceSettings)
    return [
        Stage("read", None, read_pair),
        Stage("match", None, partial(_check_match, settings)),
        Stage("aesthetic", "aesthetic" if roles.aesthetic else None, partial(check_target, settings)),
        Stage("subject", "tagger", _name_subject),
        Stage("detect", "detector", partial(_detect, settings)),
        Stage("segment", "segmenter" if roles.segmenter else None, partial(segment, "segment")),
        Stage("rewrite", "tagger", _rewrite),
        Stage("write", None, partial(_write, settings)),
    ]


def plain_instruction(text: str) -> str:
    """An instruction in words alone, as a language model reads it."""
    return " ".join(PLACEHOLDER_PATTERN.sub(" the image ", text).split())


def _check_match(settings: ReplaceSettings, record: Record, roles: Roles) -> None:
    if "annotation_match" in record.scores:
        check_score("annotation_match", record.scores["annotation_match"], settings.annotation_match)


def _name_subject(record: Record, roles: Roles) -> None:
    subject = roles.tagger.new_subject(plain_instruction(record.text))
    if subject is None:
        raise DroppedError("no replacement", record.text[:200])
    add_candidates("subject", record, [Candidate(subject)])


def _detect(settings: ReplaceSettings, record: Record, roles: Roles) -> None:
    image = record.open()

    def find(candidate: Candidate) -> None:
        locate(roles.detector.detect(image, candidate.words), candidate, image.size)
        check_box(candidate, image.size, settings.box_share)

    for_each_entity("detect", record, find)


def _rewrite(record: Record, roles: Roles) -> None:
    def rewrite(candidate: Candidate) -> None:
        candidate.prompt = roles.tagger.rewrite(plain_instruction(record.text), candidate.words)

    for_each_entity("rewrite", record, rewrite)


def _write(settings: ReplaceSettings, record: Record, roles: Roles) -> None:
    assert record.source is not None
    image, (entity,) = record.open(), record.remaining
    target, content = original_file(record.image, "target")
    source, source_content = original_file(record.source, "source")
    record.samples = [
        Sample(
            prompt=entity.prompt,
            files={
                target: content,
                source: source_content,
                "image-0.png": png(on_square(cut_out(image, unpack_mask(entity.mask)), settings.side)),
                "mask-0.png": entity.mask or b"",
            },
            images=(source, "image-0.png"),
            source=source,
            target=target,
            size=image.size,
            scores=record.scores,
            subjects=({"name": entity.words, "box": entity.box},),
        )
    ]
