"""Editing by text alone (MIGE, appendix C.2): pairs of images whose instruction is rewritten, by their beauty.

The rewriting rule is applied where the input is read (`trainer.data.manifest`).
"""

from functools import partial

from trainer.pipelines.config import EditSettings, PipelineConfig, ReplaceSettings
from trainer.pipelines.loaders import Roles
from trainer.pipelines.records import DroppedError, Record, Sample, open_or_drop
from trainer.pipelines.stages import Stage, check_score, original_file


def edit_stages(config: PipelineConfig) -> list[Stage]:
    """The stages, in their order."""
    settings = config.pipeline
    assert isinstance(settings, EditSettings)
    return [
        Stage("read", None, read_pair),
        Stage("aesthetic", "aesthetic" if config.roles.aesthetic else None, partial(check_target, settings)),
        Stage("write", None, _write),
    ]


def read_pair(record: Record, roles: Roles) -> None:
    """See that the images of an edit can be read."""
    if record.source is None:
        raise DroppedError("no edit: it has no source")
    for path in dict.fromkeys((record.image, record.source, *record.images)):
        open_or_drop(path)


def check_target(settings: EditSettings | ReplaceSettings, record: Record, roles: Roles) -> None:
    """See that the target is beautiful enough, by the role's score, or by the record's own where nobody scores."""
    if roles.scores_beauty:
        record.scores["aesthetic"] = roles.aesthetic.score(record.open())
    if "aesthetic" in record.scores:
        check_score("aesthetic", record.scores["aesthetic"], settings.aesthetic)


def _write(record: Record, roles: Roles) -> None:
    assert record.source is not None
    target, content = original_file(record.image, "target")
    source, source_content = original_file(record.source, "source")
    files = {target: content, source: source_content}
    images: list[str] = []
    for k, path in enumerate(record.images):
        name, image_content = (source, source_content) if path == record.source else original_file(path, f"image-{k}")
        files[name] = image_content
        images.append(name)
    record.samples = [
        Sample(
            prompt=record.text,
            files=files,
            images=tuple(images),
            source=source,
            target=target,
            size=record.open().size,
            scores=record.scores,
        )
    ]
