"""Decisions of annotators: JSON lines that are only added to; what was undone is still there, as is the undo."""

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal, get_args

from benchmarks.annotation.masks import Box
from benchmarks.appended_lines import AppendedLines, read_appended
from mige_rt.errors import InputError
from mige_rt.requests import MAX_LINE

Row = Literal["addition", "replacement", "edit"]
Verdict = Literal["keep", "drop"]

_WHAT = "decisions of mige-rt annotate"

ROWS: tuple[Row, ...] = get_args(Row)


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What a benchmark says of a pair.

    Attributes:
        row: `addition` and `replacement` bring a subject in, as the two halves of MIGEBench; `edit` does not.
        category: Of the subject, as progress is counted by.
        name: What the subject is called; empty for an edit.
        prompt: The instruction, with its placeholders.
        caption: Of the target; empty where there is none.
        box: Of the subject in the target: left, top, right, bottom in pixels, the last two exclusive.
        mask: Of the subject in the target, see `masks.encode_mask`.
    """

    row: Row
    category: str
    name: str
    prompt: str
    caption: str
    box: Box | None
    mask: str | None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """A line of the file.

    Attributes:
        time: ISO 8601, UTC.
        annotator: Who.
        pair: The id of the pair in its manifest.
        action: `undo` takes back the annotator's last decision that still stands; `pair` is that of the decision.
        target_sha256: Of the target's file when it was judged; None for an undo, or where the file could not be read.
        annotation: As it was when the pair was kept; None otherwise.
    """

    time: str
    annotator: str
    pair: str
    action: Literal["keep", "drop", "undo"]
    target_sha256: str | None = None
    annotation: Annotation | None = None


class Standing:
    """The decisions that stand, when all undos are done."""

    def __init__(self, decisions: Iterable[Decision] = ()) -> None:
        """Raises InputError where there is nothing to undo."""
        self._stacks: dict[str, list[Decision]] = {}
        for decision in decisions:
            self.take(decision)

    def take(self, decision: Decision) -> None:
        """Count one more decision. Raises InputError where it undoes another one than the annotator's last."""
        stack = self._stacks.setdefault(decision.annotator, [])
        if decision.action != "undo":
            stack.append(decision)
        elif stack and stack[-1].pair == decision.pair:
            stack.pop()
        else:
            raise InputError(
                f"{decision.annotator!r} undoes a decision on {decision.pair!r}, which is not the last one"
            )

    def last(self, annotator: str) -> Decision | None:
        """The decision that an undo would take back."""
        stack = self._stacks.get(annotator)
        return stack[-1] if stack else None

    def by_pair(self, annotator: str) -> dict[str, Decision]:
        """An annotator's decision on each pair: the last one of several."""
        return {decision.pair: decision for decision in self._stacks.get(annotator, [])}

    def check_pairs(self, known: Collection[str]) -> None:
        """Raises InputError where a decision is on a pair that is not among those of the manifest."""
        unknown = {decision.pair for stack in self._stacks.values() for decision in stack} - set(known)
        if unknown:
            raise InputError(
                f"{len(unknown)} decisions are on pairs that the manifest has not, such as {min(unknown)!r}; give the "
                "manifest that they were made with"
            )

    def annotators(self) -> list[str]:
        """Everyone with a decision that stands, by name."""
        return sorted(name for name, stack in self._stacks.items() if stack)


def read_decisions(files: Sequence[Path]) -> list[Decision]:
    """The decisions of one or more files, in their order.

    Raises:
        InputError: Names the first line that is none. The last line of a file may be cut, as a killed page leaves it.
    """
    return [decision for path in files for decision in read_appended(path, Decision, _WHAT)]


class DecisionLog:
    """A file of decisions that a page adds to, and what stands."""

    def __init__(self, path: Path) -> None:
        """Go on with a file, or begin one. Raises InputError when it holds something else."""
        self._lines = AppendedLines(path, Decision, _WHAT)
        self.standing = Standing(self._lines.before)

    def decide(
        self, annotator: str, pair: str, verdict: Verdict, annotation: Annotation | None, target_sha256: str | None
    ) -> None:
        """Write a decision down, to the disk.

        Raises:
            InputError: Its line would be too long to be read again.
        """
        self._add(
            Decision(
                time=_now(),
                annotator=annotator,
                pair=pair,
                action=verdict,
                target_sha256=target_sha256,
                annotation=annotation,
            )
        )

    def undo(self, annotator: str) -> Decision | None:
        """Take back the annotator's last decision that stands; returns it, or None where there is none."""
        last = self.standing.last(annotator)
        if last is not None:
            self._add(Decision(time=_now(), annotator=annotator, pair=last.pair, action="undo"))
        return last

    def _add(self, decision: Decision) -> None:
        record = asdict(decision)
        if len(json.dumps(record)) >= MAX_LINE:
            raise InputError(f"the mask of {decision.pair!r} is too ragged to be written down; draw it more simply")
        self._lines.add(record)
        self.standing.take(decision)


@dataclass(frozen=True)
class Agreement:
    """How far two annotators agree on what to keep.

    Attributes:
        annotators: Who.
        pairs: That both have decided on.
        observed: The share of those on which they agree.
        kappa: See `cohen_kappa`.
    """

    annotators: tuple[str, str]
    pairs: int
    observed: float
    kappa: float | None


def agreements(standing: Standing) -> list[Agreement]:
    """Of each two annotators who have decided on a pair in common."""
    names = standing.annotators()
    verdicts = {name: standing.by_pair(name) for name in names}
    results: list[Agreement] = []
    for k, first in enumerate(names):
        for second in names[k + 1 :]:
            common = [pair for pair in verdicts[first] if pair in verdicts[second]]
            if common:
                labels = [[verdicts[name][pair].action for pair in common] for name in (first, second)]
                same = sum(a == b for a, b in zip(*labels, strict=True)) / len(common)
                results.append(Agreement((first, second), len(common), same, cohen_kappa(*labels)))
    return results


def cohen_kappa(first: Sequence[str], second: Sequence[str]) -> float | None:
    """Cohen's kappa (1960) of two annotators' labels: how far they agree beyond what chance would do.

    Args:
        first: Labels of the first annotator.
        second: Of the second, of the same things in the same order; as many.

    Returns:
        (observed - expected) / (1 - expected), at most 1, where `expected` is the agreement of independent annotators
        who use the labels as often as these; None where there is no label, or that is 1: both use one label alone.
    """
    if not first:
        return None
    total = len(first)
    observed = sum(a == b for a, b in zip(first, second, strict=True)) / total
    expected = sum(first.count(label) * second.count(label) for label in {*first, *second}) / total**2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def progress_rows(categories: Mapping[str, tuple[Row, str]], decisions: Mapping[str, Decision]) -> list[dict[str, str]]:
    """How far an annotator is, by row and category, as the rows of a table.

    Args:
        categories: The row and the category of each pair, as the manifest has them.
        decisions: The annotator's, by pair; what a kept pair was corrected to counts.
    """
    counts: dict[tuple[str, str], list[int]] = {}
    for pair, proposed in categories.items():
        decision = decisions.get(pair)
        annotation = None if decision is None else decision.annotation
        place_of_pair = proposed if annotation is None else (annotation.row, annotation.category)
        action = None if decision is None else decision.action
        for place in (place_of_pair, ("all", "")):
            of_place = counts.setdefault(place, [0, 0, 0])
            of_place[0] += 1
            of_place[1] += action == "keep"
            of_place[2] += action == "drop"
    order = [*ROWS, "all"]
    return [
        {
            "row": row,
            "category": category,
            "pairs": str(pairs),
            "kept": str(keeps),
            "dropped": str(drops),
            "left": str(pairs - keeps - drops),
        }
        for (row, category), (pairs, keeps, drops) in sorted(counts.items(), key=lambda c: (order.index(c[0][0]), c[0]))
    ]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
