"""Editing pairs to annotate: the samples of a manifest that have a source, and what is known of them beforehand.

A manifest's `truth` may be that of the synthetic world (`trainer.synthetic.manifest`), or hold `object` (what the
subject is called), `caption` (of the target), `category` and `mask` (the subject's in the target, a path). Entries of
the published JSON may have `object`, `target_caption`, `category` and `mask_path`, as MIGEBench's do.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from benchmarks.annotation.decisions import Annotation, Row
from benchmarks.annotation.masks import encode_mask, mask_box
from benchmarks.evaluation.sample import MaskFile
from mige_rt.errors import InputError
from mige_rt.images import open_image
from mige_rt.requests import complete_instruction, parse_request, read_lines
from trainer.data.manifest import ManifestSample, open_manifest
from trainer.data.published import is_published

CATEGORIES = (  # that the page offers; others may be typed
    "animal",
    "person",
    "plant",
    "food",
    "clothing",
    "vehicle",
    "furniture",
    "building",
    "device",
    "other",
)
_REPLACING = ("replace", "swap", "change", "turn", "substitute", "exchange")


@dataclass(frozen=True, kw_only=True)
class EditingPair:
    """A source, a target, and the instruction between them.

    Attributes:
        sample: Of the manifest.
        number: Its place among the manifest's samples, from 1.
        entity: The index in the sample's images of the one that shows the subject; None for an edit without one.
        row: As proposed.
        category: As proposed.
        name: Of the subject, as proposed.
        caption: Of the target, as proposed.
        mask: Of the subject in the target, where there is one.
        changed: Of all pixels in which the target differs from the source, where that is known.
    """

    sample: ManifestSample
    number: int
    entity: int | None
    row: Row
    category: str = "other"
    name: str = ""
    caption: str = ""
    mask: MaskFile | None = None
    changed: MaskFile | None = None

    @property
    def id(self) -> str:
        """Unique in its manifest."""
        return self.sample.id

    @property
    def source(self) -> str:
        """The source's path."""
        assert self.sample.source is not None
        return self.sample.source

    @cached_property
    def proposal(self) -> Annotation:
        """The annotation to begin with.

        Raises:
            InputError: The target or the mask cannot be read, or they differ in size.
        """
        if self.mask is None:
            return self.without_mask()
        mask = self.mask.open(open_image(self.sample.target).size)
        return replace(self.without_mask(), box=mask_box(mask), mask=encode_mask(mask))

    def without_mask(self) -> Annotation:
        """The annotation to begin with where the mask cannot be used."""
        return Annotation(
            row=self.row,
            category=self.category,
            name=self.name,
            prompt=self.sample.prompt,
            caption=self.caption,
            box=None,
            mask=None,
        )

    def target_sha256(self) -> str | None:
        """Of the target's file; None where it cannot be read."""
        try:
            return sha256(Path(self.sample.target).read_bytes()).hexdigest()
        except OSError:
            return None

    def check(self, annotation: Annotation) -> None:
        """Find out whether a pair can be kept so.

        Raises:
            InputError: The instruction does not fit its images, or a subject lacks its name or its mask.
        """
        prompt, _ = complete_instruction(annotation.prompt, self.sample.images, self.sample.source)
        if prompt != annotation.prompt:
            raise InputError(f"the instruction has no <imagehere>; {self.sample.prompt!r} has")
        if not annotation.category:
            raise InputError("the category is empty; choose one, or type one")
        if annotation.row == "edit":
            return
        if self.entity is None:
            raise InputError(f"this pair has no image of a subject: it is no {annotation.row}; choose the row edit")
        if not annotation.name:
            raise InputError("the subject has no name; write what it is called")
        if annotation.mask is None or annotation.box is None:
            raise InputError("the subject has no mask; draw one, and use it")


def open_pairs(manifest: Path, root: Path | None = None) -> list[EditingPair]:
    """The editing pairs of a manifest, or of the published JSON, in their order.

    Args:
        manifest: The file.
        root: See `trainer.data.manifest.open_manifest`.

    Raises:
        InputError: The manifest cannot be used, or has no sample with a source.
    """
    samples = open_manifest(manifest, root)
    known = list(_published_truth(manifest) if is_published(manifest) else _truth(manifest))
    pairs = [
        _pair(sample, number, truth, Path(sample.target.removesuffix(target)))
        for number, (sample, (target, truth)) in enumerate(zip(samples, known, strict=True), 1)
        if sample.source is not None
    ]
    if not pairs:
        raise InputError(f"{manifest} has {len(samples)} samples, none of them with a source; editing pairs have one")
    return pairs


def proposed_categories(pairs: Iterable[EditingPair]) -> dict[str, tuple[Row, str]]:
    """The row and the category of each pair by its id, as `decisions.progress_rows` takes them."""
    return {pair.id: (pair.row, pair.category) for pair in pairs}


def _truth(manifest: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Of each line the target's path, as it stands there, and what else is known."""
    for _, line in read_lines(manifest, limited=False):
        record = parse_request(line)
        yield str(record.target), record.truth or {}


def _published_truth(manifest: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry in cast("list[dict[str, Any]]", json.loads(manifest.read_text(encoding="utf-8-sig"))):
        masks = entry.get("mask_path") or [None]
        truth = {"object": entry.get("object"), "caption": entry.get("target_caption"), "mask": masks[0]}
        yield entry["image"], {**truth, "category": entry.get("category"), "kind": entry.get("row")}


def _pair(sample: ManifestSample, number: int, truth: Mapping[str, Any], folder: Path) -> EditingPair:
    entities = [k for k, image in enumerate(sample.images) if image != sample.source]
    about: dict[str, Any] = {name: truth.get(name) for name in ("object", "caption", "category", "mask")}
    if "after" in truth:  # of the synthetic world
        shown = [mark for mark in truth["after"] if mark["reference"] is not None and mark["box"] is not None]
        if shown:
            about |= {"object": shown[0]["name"], "mask": shown[0]["mask"]}
            entities = [shown[0]["reference"]]
    row = _row(sample, bool(entities), str(truth.get("kind")))
    return EditingPair(
        sample=sample,
        number=number,
        entity=entities[0] if entities else None,
        row=row,
        category=about["category"] or "other",
        name=about["object"] or "",
        caption=about["caption"] or "",
        mask=MaskFile(folder / about["mask"]) if about["mask"] else None,
        changed=MaskFile(folder / truth["changed"]) if truth.get("changed") else None,
    )


def _row(sample: ManifestSample, subject: bool, kind: str) -> Row:
    if not subject:
        return "edit"
    replaces = kind.startswith("replace") or sample.prompt.lower().lstrip().startswith(_REPLACING)
    return "replacement" if replaces and kind not in ("add", "addition") else "addition"
