"""A benchmark from decisions: the layout of MIGEBench, which `mige-rt eval` and training both read, with a datasheet.

The folder has `add_bench.json` and `replace_bench.json`, and `edit_bench.json` with the edits that bring no subject
in, which MIGEBench has not. Paths are relative to the folder. Images are PNG, so that masks stay as they were drawn.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from benchmarks.annotation.decisions import (
    ROWS,
    Annotation,
    Decision,
    Row,
    Standing,
    agreements,
)
from benchmarks.annotation.masks import Mask, cut_out, decode_mask
from benchmarks.annotation.pairs import EditingPair
from benchmarks.evaluation.layouts.migebench import FILES
from export.formatting import json_text, markdown_table
from mige_rt.atomic import atomic_folder
from mige_rt.errors import InputError
from mige_rt.images import open_image

DATASHEET = "DATASHEET.md"
BENCH_FILES: Mapping[Row, str] = {
    "addition": FILES["addition"],
    "replacement": FILES["replacement"],
    "edit": "edit_bench.json",
}
FOLDERS: Mapping[Row, str] = {"addition": "add", "replacement": "replace", "edit": "edit"}


@dataclass(frozen=True)
class Selection:
    """What the annotators' decisions come to.

    Attributes:
        kept: Pairs that more annotators keep than drop, with the annotation of the latest decision to keep.
        disputed: How many pairs as many keep as drop; they are left out.
        dropped: How many pairs more drop than keep.
        undecided: How many pairs nobody has decided on.
    """

    kept: tuple[tuple[EditingPair, Annotation], ...]
    disputed: int
    dropped: int
    undecided: int


def select(pairs: Sequence[EditingPair], standing: Standing) -> Selection:
    """What of the pairs belongs into the benchmark.

    Raises:
        InputError: A decision is on a pair that the manifest has not, or on another target than the pair's.
    """
    standing.check_pairs({pair.id for pair in pairs})
    by_annotator = {name: standing.by_pair(name) for name in standing.annotators()}
    kept: list[tuple[EditingPair, Annotation]] = []
    counts: Counter[str] = Counter()
    for pair in pairs:
        decisions = [decisions[pair.id] for decisions in by_annotator.values() if pair.id in decisions]
        keeps = sorted((d for d in decisions if d.action == "keep"), key=lambda decision: decision.time)
        margin = 2 * len(keeps) - len(decisions)
        if margin > 0:
            kept.append((pair, _annotation(pair, keeps[-1])))
        else:
            counts["undecided" if not decisions else "disputed" if margin == 0 else "dropped"] += 1
    return Selection(tuple(kept), counts["disputed"], counts["dropped"], counts["undecided"])


def _annotation(pair: EditingPair, decision: Decision) -> Annotation:
    if decision.target_sha256 != pair.target_sha256():
        raise InputError(f"{pair.id!r} was kept with another target than {pair.sample.target}; give its manifest")
    if decision.annotation is None:
        raise InputError(f"the decision to keep {pair.id!r} has no annotation; its file was changed by hand")
    pair.check(decision.annotation)
    return decision.annotation


def export_benchmark(pairs: Sequence[EditingPair], standing: Standing, out: Path, title: str) -> Selection:
    """Write the folder of a benchmark.

    Args:
        pairs: Of the manifest.
        standing: The annotators' decisions.
        out: The folder to make.
        title: Of the datasheet.

    Returns:
        What was written, and how many pairs were left out.

    Raises:
        InputError: Nothing was kept, an image cannot be read, a mask has another size than its target, or `out` exists.
            Nothing is left behind.
    """
    selection = select(pairs, standing)
    if not selection.kept:
        raise InputError(f"none of the {len(pairs)} pairs is kept by more annotators than drop it; annotate some first")
    with atomic_folder(out) as folder:
        entries: dict[Row, list[dict[str, Any]]] = {row: [] for row in ROWS}
        for pair, annotation in selection.kept:
            entries[annotation.row].append(_write_pair(folder, pair, annotation))
        for row, name in BENCH_FILES.items():
            if entries[row]:
                (folder / name).write_text(json_text(entries[row]), encoding="utf-8")
        (folder / DATASHEET).write_text(_datasheet(selection, pairs, standing, title), encoding="utf-8")
    return selection


def _write_pair(folder: Path, pair: EditingPair, annotation: Annotation) -> dict[str, Any]:
    """Write a pair's images; returns its entry in the vocabulary of the published JSON."""
    part = FOLDERS[annotation.row]

    def save(image: Image.Image, kind: str, name: str = "") -> str:
        path = f"{part}/{part}_{kind}/{pair.number}_{name or kind}.png"
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / path)
        return path

    source, target = open_image(pair.source), open_image(pair.sample.target)
    source_path = save(source, "source")
    entry: dict[str, Any] = {
        "image": save(target, "target"),
        "source_path": [source_path],
        "width": target.width,
        "height": target.height,
        "object": annotation.name,
        "multi_prompt": annotation.prompt,
        "target_caption": annotation.caption or None,
        "idx": pair.number,
        "id": pair.id,
        "row": annotation.row,
        "category": annotation.category,
        "box": annotation.box,
        **pair.sample.scores,
    }
    mask = None if annotation.mask is None else _mask(pair, annotation.mask, target.size)
    paths = {pair.source: source_path}
    for k, image in enumerate(pair.sample.images):
        if image in paths:
            continue
        if k == pair.entity and annotation.row != "edit":
            assert mask is not None and annotation.box is not None  # `EditingPair.check` has seen to it
            cuts = {ground: cut_out(target, mask, annotation.box, ground) for ground in ("black", "white")}
            names = {ground: save(cut, "entity", f"entity_{ground}") for ground, cut in cuts.items()}
            paths[image] = names["black"]
            entry |= {"entity_dino": annotation.name, "entity_path_white": [names["white"]]}
        else:
            paths[image] = save(open_image(image), "reference", f"reference_{k}")
    edited = _edited(pair, mask, target.size)
    if edited is not None and source.size == target.size:
        entry["mask_path"] = [save(Image.fromarray(edited), "mask")]
    return {**entry, "entity_path": [paths[image] for image in pair.sample.images]}


def _mask(pair: EditingPair, text: str, size: tuple[int, int]) -> Mask:
    mask = decode_mask(text, f"the mask of {pair.id!r}")
    if mask.shape != size[::-1]:
        height, width = mask.shape
        raise InputError(f"the mask of {pair.id!r} is {width}x{height}, its target {size[0]}x{size[1]}; draw it again")
    return mask


def _edited(pair: EditingPair, mask: Mask | None, size: tuple[int, int]) -> Mask | None:
    """Where the source is edited: the subject, and whatever else is known to differ."""
    changed = None if pair.changed is None else pair.changed.open(size)
    if mask is None or changed is None:
        return changed if mask is None else mask
    return np.logical_or(mask, changed)


def _datasheet(selection: Selection, pairs: Sequence[EditingPair], standing: Standing, title: str) -> str:
    """After "Datasheets for Datasets" (Gebru et al., 2021). Annotators are numbered: their names stay here."""
    names = standing.annotators()
    numbers = {name: f"annotator {number}" for number, name in enumerate(names, 1)}
    decisions = [d for name in names for d in standing.by_pair(name).values()]
    counts = Counter((annotation.row, annotation.category) for _, annotation in selection.kept)
    corrected = sum(_differs(pair, annotation) for pair, annotation in selection.kept)
    templates = jinja2.Environment(loader=jinja2.PackageLoader("benchmarks"), trim_blocks=True, autoescape=False)
    return templates.get_template("datasheet.md.j2").render(
        title=title,
        selection=selection,
        pairs=len(pairs),
        rows=Counter(annotation.row for _, annotation in selection.kept),
        files=BENCH_FILES,
        categories=markdown_table(
            [
                {"row": row, "category": category, "samples": str(samples)}
                for (row, category), samples in sorted(counts.items(), key=lambda c: (ROWS.index(c[0][0]), c[0]))
            ],
            ("category",),
        ),
        annotators=len(names),
        decisions=len(decisions),
        times=(min(d.time for d in decisions)[:10], max(d.time for d in decisions)[:10]),
        corrected=corrected,
        agreements=agreement_table(standing, numbers),
    )


def _differs(pair: EditingPair, annotation: Annotation) -> bool:
    try:
        return annotation != pair.proposal
    except InputError:  # its mask could not be used
        return True


def agreement_table(standing: Standing, names: Mapping[str, str]) -> str:
    """Agreement of each two annotators as a Markdown table. names: what the table calls each."""
    return markdown_table(
        [
            {
                "annotators": " and ".join(names[name] for name in agreement.annotators),
                "pairs": str(agreement.pairs),
                "agree": f"{agreement.observed:.0%}",
                "Cohen's kappa": "undefined" if agreement.kappa is None else f"{agreement.kappa:.2f}",
            }
            for agreement in agreements(standing)
        ]
    )
