"""Annotating without a browser: the file of decisions, masks drawn and undrawn, agreement, and exported benchmarks."""

import json
import resource
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from benchmarks.annotation.annotating import Annotating, Shown
from benchmarks.annotation.decisions import (
    Annotation,
    Decision,
    DecisionLog,
    Standing,
    agreements,
    cohen_kappa,
    progress_rows,
    read_decisions,
)
from benchmarks.annotation.editor import BLUE, RED, make_drawing, read_drawing
from benchmarks.annotation.export import DATASHEET, export_benchmark, select
from benchmarks.annotation.masks import decode_mask, encode_mask, mask_box
from benchmarks.annotation.pairs import EditingPair, open_pairs
from benchmarks.evaluation.layouts import open_benchmark
from mige_rt.cli import main
from mige_rt.errors import InputError
from trainer.data.manifest import MANIFEST, open_manifest
from trainer.synthetic.concepts import Concept
from trainer.synthetic.manifest import write_manifest

SIDE = 64


def _run(*args: str | Path) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


@pytest.fixture(scope="module")
def world(concepts: list[Concept], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("annotation") / "world"
    write_manifest(folder, concepts, 24, 5, SIDE)
    return folder


@pytest.fixture(scope="module")
def pairs(world: Path) -> list[EditingPair]:
    return open_pairs(world / MANIFEST)


@pytest.fixture
def annotating(pairs: list[EditingPair], tmp_path: Path) -> Annotating:
    return Annotating(pairs, DecisionLog(tmp_path / "decisions.jsonl"))


def _shown(annotating: Annotating, annotator: str) -> Shown:
    shown = annotating.begin(annotator).shown
    assert shown is not None
    return shown


def _keep(annotating: Annotating, annotator: str = "Ann", **texts: str) -> Shown:
    """Keep the pair that comes next, as it is proposed but for some texts."""
    shown = _shown(annotating, annotator)
    assert shown.drawing is not None
    annotating.keep(shown, replace(shown.annotation, **texts), shown.drawing.value())
    return shown


def test_pairs_are_the_samples_with_a_source_and_what_their_truth_says(world: Path, pairs: list[EditingPair]) -> None:
    records = [json.loads(line) for line in (world / MANIFEST).read_text().splitlines()]
    assert [pair.id for pair in pairs] == [record["id"] for record in records if record.get("source")]
    kinds = {record["id"]: record["truth"]["kind"] for record in records}
    assert {(kinds[pair.id], pair.row) for pair in pairs} >= {("add", "addition"), ("replace", "replacement")}
    for pair in pairs:
        assert (pair.entity is None) == (pair.row == "edit")
        if pair.row != "edit":
            about = pair.proposal
            assert about.mask is not None and about.name and pair.mask is not None
            mask = decode_mask(about.mask, "mask")
            np.testing.assert_array_equal(mask, pair.mask.open((SIDE, SIDE)))
            assert about.box == mask_box(mask)


def test_a_decision_is_on_the_disk_at_once_and_an_undo_adds_to_the_file(annotating: Annotating, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    first = _keep(annotating)
    second = _shown(annotating, "Ann")
    annotating.drop(second)
    before = path.read_bytes()
    undone = annotating.undo("Ann")
    assert undone is not None and undone.pair.id == second.pair.id
    assert path.read_bytes().startswith(before) and path.read_bytes() != before
    decisions = read_decisions([path])
    assert [(d.pair, d.action) for d in decisions] == [
        (first.pair.id, "keep"),
        (second.pair.id, "drop"),
        (second.pair.id, "undo"),
    ]
    assert decisions[0].annotation == first.annotation
    assert decisions[0].target_sha256 == first.pair.target_sha256()
    assert list(annotating.log.standing.by_pair("Ann")) == [first.pair.id]
    assert _shown(annotating, "Ann").pair.id == second.pair.id  # it comes again
    assert annotating.undo("Eve") is None  # nobody undoes what another has decided
    kept = annotating.undo("Ann")
    assert kept is not None and kept.annotation == first.annotation
    assert annotating.undo("Ann") is None


def test_a_killed_page_goes_on_where_it_was_and_half_a_line_does_not_count(
    annotating: Annotating, pairs: list[EditingPair], tmp_path: Path
) -> None:
    path = tmp_path / "decisions.jsonl"
    shown = [_keep(annotating, caption=f"caption {k}").pair.id for k in range(3)]
    whole = path.read_text()
    with path.open("a") as file:
        file.write(whole.splitlines()[0][:-30])
    assert [decision.pair for decision in read_decisions([path])] == shown
    again = Annotating(pairs, DecisionLog(path))
    assert path.read_text() == whole
    assert again.progress("Ann") == f"3 of {len(pairs)} decided: 3 kept, 0 dropped"
    shown.append(_keep(again).pair.id)
    assert len(set(shown)) == 4 and [decision.pair for decision in read_decisions([path])] == shown
    path.write_text(whole.replace("keep", "maybe", 1))
    with pytest.raises(InputError, match="line 1: action is 'maybe'"):
        DecisionLog(path)
    path.write_text("nothing\n" + whole)
    with pytest.raises(InputError, match="line 1 is no JSON"):
        DecisionLog(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": 1}]', "line 1: expected an object"),
        (b'{"a": 1', "line 1 is no JSON"),
        (b'[\n {"a": 1}\n]', "line 1 is no JSON"),
        (b"\x89PNG\r\n\x1a\n\0", "cannot be read as a text file"),
    ],
)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        DecisionLog(path)
    assert path.read_bytes() == content


def test_a_folder_is_no_file_of_decisions(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no regular file"):
        DecisionLog(tmp_path)


def test_a_first_line_that_was_cut_is_begun_again_and_a_whole_one_gets_its_end(
    annotating: Annotating, pairs: list[EditingPair], tmp_path: Path
) -> None:
    path = tmp_path / "decisions.jsonl"
    first = _keep(annotating).pair.id
    line = path.read_bytes()
    path.write_bytes(line[:-1])  # its end alone is not on the disk
    again = Annotating(pairs, DecisionLog(path))
    assert path.read_bytes() == line and again.progress("Ann").startswith("1 of")
    for length in (5, 40):
        path.write_bytes(line[:length])
        assert read_decisions([path]) == []
        again = Annotating(pairs, DecisionLog(path))
        assert path.read_bytes() == b""
    assert _keep(again).pair.id == first


def test_decisions_on_another_manifest_are_refused_before_the_page_opens(
    annotating: Annotating, pairs: list[EditingPair], tmp_path: Path
) -> None:
    path = tmp_path / "decisions.jsonl"
    first = _keep(annotating).pair.id
    before = path.read_bytes()
    with pytest.raises(InputError, match=f"1 decisions are on pairs that the manifest has not, such as '{first}'"):
        Annotating(pairs[1:], DecisionLog(path))
    assert path.read_bytes() == before


def test_a_full_disk_leaves_no_half_line(annotating: Annotating, tmp_path: Path) -> None:
    path = tmp_path / "decisions.jsonl"
    _keep(annotating)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, limits[1]))
        with pytest.raises(OSError, match=r"No space|File too large"):
            annotating.drop(_shown(annotating, "Ann"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and annotating.progress("Ann").startswith("1 of")
    annotating.drop(_shown(annotating, "Ann"))
    assert [decision.action for decision in read_decisions([path])] == ["keep", "drop"]


def test_every_annotator_walks_all_pairs_and_may_skip_some(annotating: Annotating, pairs: list[EditingPair]) -> None:
    first = _shown(annotating, "Ann")
    second = annotating.go_on(first).shown
    assert second is not None and second.pair.id == pairs[1].id
    for _ in pairs:
        annotating.drop(_shown(annotating, "Ann"))
    assert annotating.begin("Ann").shown is None
    assert annotating.go_on(first).shown is None
    assert _shown(annotating, "Eve").pair.id == pairs[0].id


def test_what_cannot_be_kept_is_refused_and_not_written(annotating: Annotating, tmp_path: Path) -> None:
    while _shown(annotating, "Ann").pair.row == "edit":
        annotating.drop(_shown(annotating, "Ann"))
    before = (tmp_path / "decisions.jsonl").read_bytes()
    for texts, message in (
        ({"prompt": "add a <imagehere>"}, "the prompt has 1 <imagehere> and 2 images"),
        ({"prompt": "add it"}, "has no <imagehere>|has 0 <imagehere>"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"name": ""}, "the subject has no name"),
        ({"category": ""}, "the category is empty"),
    ):
        with pytest.raises(InputError, match=message):
            _keep(annotating, **texts)
    shown = _shown(annotating, "Ann")
    assert shown.drawing is not None
    other = {**shown.drawing.value(), "background": Image.new("RGB", shown.drawing.background.size, "white")}
    for value in (None, other):
        with pytest.raises(InputError, match="does not show this target yet"):
            annotating.keep(shown, shown.annotation, value)
    assert (tmp_path / "decisions.jsonl").read_bytes() == before


@pytest.mark.parametrize("size", [(64, 48), (1024, 700)])
def test_what_is_drawn_changes_the_mask_there_and_nowhere_else(size: tuple[int, int]) -> None:
    target = Image.fromarray(np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8))
    mask = np.zeros((size[1], size[0]), bool)
    mask[size[1] // 4 : size[1] // 2, size[0] // 4 : size[0] // 2] = True
    mask[::7] = False  # finer than the canvas shows it
    box = mask_box(mask)
    drawing = make_drawing(target, mask, box)
    assert max(drawing.layer.size) == 512
    drawn, drawn_box = read_drawing(drawing.value(), drawing)
    assert drawn is not None
    np.testing.assert_array_equal(drawn, mask)
    assert drawn_box == box

    def edit(left: int, top: int, right: int, bottom: int, color: tuple[int, ...]) -> dict[str, Any]:
        layer = drawing.layer.copy()
        layer.paste(color, (left, top, right, bottom))
        return {**drawing.value(), "layers": [layer]}

    scale = size[0] / 512
    added, added_box = read_drawing(edit(400, 200, 480, 296, (*RED, 140)), drawing)
    assert added is not None
    new = added & ~mask
    left, top, right, bottom = mask_box(new) or (0, 0, 0, 0)
    assert abs(left - 400 * scale) <= 1 and abs(right - 480 * scale) <= 1 and abs(bottom - 296 * scale) <= 1
    assert new[top:bottom, left:right].all() and not (mask & ~added).any()
    assert added_box == mask_box(added)
    erased, _ = read_drawing(edit(150, 100, 200, 140, (0, 0, 0, 0)), drawing)
    assert erased is not None and (mask & ~erased).any() and not (erased & ~mask).any()
    unchanged, new_box = read_drawing(edit(300, 40, 420, 240, (*BLUE, 140)), drawing)
    assert unchanged is not None and new_box is not None
    np.testing.assert_array_equal(unchanged, mask)
    np.testing.assert_allclose(new_box, np.array((300, 40, 420, 240)) * scale, atol=1)
    with pytest.raises(InputError, match="the mask is cleared"):
        read_drawing(edit(0, 0, 512, 512, (0, 0, 0, 0)), drawing)


def test_masks_go_through_json_and_damaged_ones_are_named() -> None:
    mask = np.random.default_rng(1).random((31, 17)) > 0.5
    np.testing.assert_array_equal(decode_mask(json.loads(json.dumps(encode_mask(mask))), "it"), mask)
    assert mask_box(np.zeros((4, 4), bool)) is None
    for text in ("%", encode_mask(mask)[:40]):
        with pytest.raises(InputError, match="the mask of 'a'"):
            decode_mask(text, "the mask of 'a'")


def test_cohens_kappa_is_that_of_a_worked_example() -> None:
    # 50 applications: both say yes to 20, both no to 15; 5 and 10 differ. By hand: p_o = 0.7,
    # p_e = 0.5 * 0.6 + 0.5 * 0.4 = 0.5, kappa = 0.2 / 0.5.
    counts = {("keep", "keep"): 20, ("keep", "drop"): 5, ("drop", "keep"): 10, ("drop", "drop"): 15}
    labels = [pair for pair, times in counts.items() for _ in range(times)]
    first, second = zip(*labels, strict=True)
    assert cohen_kappa(first, second) == pytest.approx(0.4)
    assert cohen_kappa(first, first) == 1
    assert cohen_kappa(["keep", "drop"], ["drop", "keep"]) == -1
    assert cohen_kappa(["keep"] * 3, ["keep"] * 3) is None and cohen_kappa([], []) is None


def _decision(annotator: str, pair: str, action: Any, annotation: Annotation | None = None) -> Decision:
    return Decision(time="2026-01-01", annotator=annotator, pair=pair, action=action, annotation=annotation)


def test_agreement_is_over_what_both_have_decided_on_and_still_stands() -> None:
    standing = Standing(
        [
            *(_decision("Ann", name, "keep") for name in "abcd"),
            *(_decision("Bob", name, "keep") for name in "abx"),
            _decision("Bob", "c", "drop"),
            _decision("Bob", "d", "drop"),
            _decision("Bob", "d", "undo"),
            _decision("Ann", "d", "undo"),
            _decision("Ann", "c", "drop"),
            _decision("Eve", "z", "keep"),
        ]
    )
    (agreement,) = agreements(standing)
    assert (agreement.annotators, agreement.pairs, agreement.observed) == (("Ann", "Bob"), 3, 1)
    assert agreement.kappa == 1
    with pytest.raises(InputError, match="'Ann' undoes a decision on 'b'"):
        standing.take(_decision("Ann", "b", "undo"))


def test_progress_counts_a_kept_pair_where_it_was_corrected_to() -> None:
    corrected = Annotation(
        row="replacement", category="animal", name="cat", prompt="p", caption="", box=None, mask=None
    )
    rows = progress_rows(
        {"a": ("addition", "other"), "b": ("addition", "other"), "c": ("edit", "other")},
        {"a": _decision("Ann", "a", "keep", corrected), "c": _decision("Ann", "c", "drop")},
    )
    assert [tuple(row.values()) for row in rows] == [
        ("addition", "other", "1", "0", "0", "1"),
        ("replacement", "animal", "1", "1", "0", "0"),
        ("edit", "other", "1", "0", "1", "0"),
        ("all", "", "3", "1", "1", "1"),
    ]


def test_a_benchmark_is_what_more_keep_than_drop_in_migebenchs_layout(
    annotating: Annotating, pairs: list[EditingPair], world: Path, tmp_path: Path
) -> None:
    by_id = {pair.id: pair for pair in pairs}
    while _shown(annotating, "Ann Onymous").pair.id != pairs[-1].id:
        _keep(annotating, "Ann Onymous", caption="a scene", category="toy")
    _keep(annotating, "Ann Onymous")
    disputed, outvoted, *_ = [pair.id for pair in pairs if pair.row != "edit"]
    for name, pair in (("Bob", disputed), ("Bob", outvoted), ("Eve", outvoted)):
        annotating.drop(annotating.show(name, by_id[pair]))
    again = annotating.show("Bob", pairs[-1])  # the latest decision to keep counts
    assert again.drawing is not None
    annotating.keep(again, replace(again.annotation, caption="Bob's words"), again.drawing.value())

    out = tmp_path / "benchmark"
    result = _run("annotate", "export", world / MANIFEST, tmp_path / "decisions.jsonl", "--out", out, "--title", "Toys")
    assert result.exit_code == 0, result.output
    assert "left out: 1 dropped, 1 disputed, 0 not decided on" in result.stderr
    benchmark = open_benchmark(f"migebench:{out}")
    kept = [pair for pair in pairs if pair.id not in (disputed, outvoted)]
    assert {sample.id for sample in benchmark.samples} == {
        f"{pair.row}-{pair.number}" for pair in kept if pair.row != "edit"
    }
    for sample in benchmark.samples:
        pair = next(pair for pair in pairs if sample.id == f"{pair.row}-{pair.number}")
        assert sample.prompt == pair.sample.prompt and sample.subject is not None and sample.truth is not None
        assert sample.caption == ("Bob's words" if pair is pairs[-1] else "a scene")
        assert sample.subject.words == pair.name and pair.mask is not None and pair.changed is not None
        target, mask = np.asarray(sample.truth.open()), pair.mask.open((SIDE, SIDE))
        left, top, right, bottom = mask_box(mask) or (0, 0, 0, 0)
        expected = np.where(mask[..., None], target, 0)[top:bottom, left:right]
        np.testing.assert_array_equal(np.asarray(sample.subject.reference.open()), expected)
        assert sample.mask is not None
        np.testing.assert_array_equal(sample.mask.open((SIDE, SIDE)), mask | pair.changed.open((SIDE, SIDE)))
    files = ("add_bench.json", "replace_bench.json", "edit_bench.json")
    samples = [sample for name in files for sample in open_manifest(out / name)]  # as training reads it
    assert sorted(sample.prompt for sample in samples) == sorted(pair.sample.prompt for pair in kept)
    assert {sample.task for sample in samples} == {"edit", "compose"}
    entry = json.loads((out / "add_bench.json").read_text())[0]
    white = Image.open(out / entry["entity_path_white"][0])
    black = Image.open(out / next(path for path in entry["entity_path"] if path.endswith("black.png")))
    assert white.size == black.size and np.asarray(white).mean() > np.asarray(black).mean()
    assert entry["category"] == "toy"
    text = (out / DATASHEET).read_text()
    assert text.startswith("# Toys: datasheet") and f"{len(kept)} samples" in text and "annotator 1 and" in text
    assert all("Onymous" not in path.read_text() for path in (out / DATASHEET, *(out / name for name in files)))


def test_the_benchmark_is_evaluated(annotating: Annotating, pairs: list[EditingPair], tmp_path: Path) -> None:
    for pair in [pair for pair in pairs if pair.row != "edit"][:2]:
        shown = annotating.show("Ann", pair)
        assert shown.drawing is not None
        annotating.keep(shown, shown.annotation, shown.drawing.value())
    export_benchmark(pairs, annotating.log.standing, tmp_path / "benchmark", "Two")
    out = tmp_path / "evaluation"
    benchmark = f"migebench:{tmp_path / 'benchmark'}"
    result = _run("eval", "run", "--benchmark", benchmark, "--stand-in", "--steps", "2", "--out", out)
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report" / "report.json").read_text())
    assert report["images"] == {"expected": 2, "judged": 2, "unreadable": {}}
    assert list(report["encoders"]) == ["EfficientNet-Lite0"] and report["missing"] == []
    for row in report["rows"]:
        assert {"EfficientNet-Lite0", "L1", "background shift"} <= set(row["metrics"]) or not row["metrics"]


def test_decisions_of_another_manifest_are_refused(
    annotating: Annotating, pairs: list[EditingPair], world: Path, tmp_path: Path
) -> None:
    kept = _keep(annotating)
    standing = annotating.log.standing
    with pytest.raises(
        InputError, match=f"1 decisions are on pairs that the manifest has not, such as '{kept.pair.id}'"
    ):
        select(pairs[1:], standing)
    changed = replace(kept.pair, sample=replace(kept.pair.sample, target=pairs[1].sample.target))
    with pytest.raises(InputError, match="was kept with another target"):
        select([changed, *pairs[1:]], standing)
    annotating.undo("Ann")
    annotating.drop(_shown(annotating, "Ann"))
    out = tmp_path / "benchmark"
    result = _run("annotate", "export", world / MANIFEST, tmp_path / "decisions.jsonl", "--out", out)
    assert result.exit_code == 2 and "none of the" in result.stderr and not out.exists()
    result = _run("annotate", "status", world / MANIFEST, tmp_path / "decisions.jsonl")
    assert result.exit_code == 0 and "Ann:" in result.stdout and "No two annotators" in result.stdout
    others = [line for line in (world / MANIFEST).read_text().splitlines() if json.loads(line)["id"] != kept.pair.id]
    (tmp_path / "others.jsonl").write_text("\n".join(others))
    result = _run("annotate", "status", tmp_path / "others.jsonl", tmp_path / "decisions.jsonl", "--root", world)
    assert result.exit_code == 2 and "pairs that the manifest has not" in " ".join(result.stderr.split())


def test_the_published_json_is_annotated_and_what_is_broken_can_only_be_dropped(tmp_path: Path) -> None:
    def save(name: str, size: tuple[int, int], color: str) -> str:
        (tmp_path / "MIGEBench").mkdir(exist_ok=True)
        Image.new("RGB", size, color).save(tmp_path / "MIGEBench" / name)
        return f"MIGEBench/{name}"

    entry = {
        "image": save("target.png", (40, 30), "teal"),
        "width": 40,
        "height": 30,
        "entity_path": [save("entity.png", (9, 9), "red"), save("source.png", (40, 30), "navy")],
        "multi_prompt": "Add<imagehere>to the bottom of<imagehere>.",
        "source_path": ["MIGEBench/source.png"],
        "object": "a signboard",
        "target_caption": "an alley",
        "mask_path": [save("mask.png", (20, 30), "white")],
    }
    broken = {**entry, "image": "MIGEBench/broken.png"}
    (tmp_path / "MIGEBench" / "broken.png").write_bytes(b"no image")
    path = tmp_path / "MIGEBench" / "pairs.json"
    path.write_text(json.dumps([entry, broken]))
    annotating = Annotating(open_pairs(path), DecisionLog(tmp_path / "decisions.jsonl"))
    shown = _shown(annotating, "Ann")
    assert (shown.annotation.row, shown.annotation.name, shown.annotation.caption) == (
        "addition",
        "a signboard",
        "an alley",
    )
    assert "mask.png is 20x30, its image 40x30" in shown.problem and shown.annotation.mask is None
    assert shown.drawing is not None
    with pytest.raises(InputError, match="the subject has no mask"):
        annotating.keep(shown, shown.annotation, shown.drawing.value())
    layer = shown.drawing.layer.copy()
    layer.paste((*RED, 140), (100, 100, 200, 200))
    annotating.keep(shown, shown.annotation, {**shown.drawing.value(), "layers": [layer]})
    shown = _shown(annotating, "Ann")
    assert "The target is not shown" in shown.problem
    with pytest.raises(InputError, match="can only be dropped"):
        annotating.keep(shown, shown.annotation, None)
    annotating.drop(shown)
    selection = export_benchmark([*annotating.pairs.values()], annotating.log.standing, tmp_path / "out", "One")
    assert len(selection.kept) == 1 and len(open_benchmark(f"migebench:{tmp_path / 'out'}").samples) == 1


def test_a_manifest_without_sources_is_refused(world: Path, tmp_path: Path) -> None:
    lines = (world / MANIFEST).read_text().splitlines()
    record = next(json.loads(line) for line in lines if '"source"' not in line.split('"truth"')[0])
    path = world / "without.jsonl"
    path.write_text(json.dumps(record) + "\n")
    result = _run("annotate", "export", path, tmp_path / "decisions.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 2 and "none of them with a source" in result.stderr.replace("\n", " ")


def test_a_decision_is_as_it_was_written(tmp_path: Path) -> None:
    annotation = Annotation(
        row="addition", category="animal", name="a cat", prompt="<imagehere>", caption="", box=(1, 2, 3, 4), mask="x"
    )
    path = tmp_path / "decisions.jsonl"
    DecisionLog(path).decide("Zoë", "7", "keep", annotation, "0" * 64)
    (decision,) = read_decisions([path])
    assert (decision.annotator, decision.annotation) == ("Zoë", annotation) and decision.time.endswith("+00:00")
    assert json.loads(path.read_text()) == {
        **asdict(decision),
        "annotation": {**asdict(annotation), "box": [1, 2, 3, 4]},
    }
