"""Annotating: which pair comes next, and what a decision writes down. The page shows it; nothing here needs Gradio."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.annotation.decisions import Annotation, DecisionLog, Verdict, progress_rows
from benchmarks.annotation.editor import Drawing, make_drawing, read_drawing
from benchmarks.annotation.export import agreement_table
from benchmarks.annotation.masks import decode_mask, encode_mask
from benchmarks.annotation.pairs import EditingPair, proposed_categories
from export.formatting import markdown_table
from mige_rt.errors import InputError
from mige_rt.images import open_image


@dataclass(frozen=True)
class Shown:
    """What a browser shows.

    Attributes:
        annotator: Who looks at it.
        pair: The pair.
        annotation: As it was shown, before it was corrected.
        drawing: In the editor; None where the target cannot be read.
        problem: Why something of the pair is not shown; empty where all is.
    """

    annotator: str
    pair: EditingPair
    annotation: Annotation
    drawing: Drawing | None
    problem: str


@dataclass(frozen=True)
class Session:
    """A browser's page.

    Attributes:
        annotator: Who; empty before the name is given.
        shown: The pair; None where all are decided on.
    """

    annotator: str
    shown: Shown | None


class Annotating:
    """The pairs, and the file that decisions on them go to."""

    def __init__(self, pairs: Sequence[EditingPair], log: DecisionLog) -> None:
        """Raises InputError where a decision is on a pair of another manifest, which an undo could not show."""
        self.pairs = {pair.id: pair for pair in pairs}
        self.log = log
        log.standing.check_pairs(self.pairs)

    def next_pair(self, annotator: str, after: str | None = None) -> EditingPair | None:
        """The first pair behind `after`, or else from the beginning, that the annotator has not decided on."""
        decided, ids = self.log.standing.by_pair(annotator), list(self.pairs)
        first = 0 if after is None else ids.index(after) + 1
        return next((self.pairs[name] for name in ids[first:] + ids[:first] if name not in decided), None)

    def begin(self, annotator: str) -> Session:
        """An annotator's page, where it was left."""
        pair = self.next_pair(annotator)
        return Session(annotator, None if pair is None else self.show(annotator, pair))

    def go_on(self, shown: Shown) -> Session:
        """The page behind a pair."""
        pair = self.next_pair(shown.annotator, shown.pair.id)
        return Session(shown.annotator, None if pair is None else self.show(shown.annotator, pair))

    def show(self, annotator: str, pair: EditingPair, annotation: Annotation | None = None) -> Shown:
        """A pair with its annotation. annotation: what to begin with, instead of what the manifest proposes."""
        problem, drawing = "", None
        try:
            annotation = annotation or pair.proposal
        except InputError as error:
            annotation, problem = pair.without_mask(), f"The mask is not shown: {error}."
        try:
            target = open_image(pair.sample.target)
            mask = None if annotation.mask is None else decode_mask(annotation.mask, f"the mask of {pair.id!r}")
            drawing = make_drawing(target, mask, annotation.box)
        except InputError as error:
            problem = f"The target is not shown: {error}."
        return Shown(annotator, pair, annotation, drawing, problem)

    def keep(self, shown: Shown, texts: Annotation, drawn: dict[str, Any] | None) -> None:
        """Write down that a pair is kept, as it has been corrected.

        Args:
            shown: What the browser shows.
            texts: The corrected words; box and mask do not count.
            drawn: Of the editor.

        Raises:
            InputError: It cannot be kept so; nothing is written.
        """
        if shown.drawing is None:
            raise InputError("a pair whose target cannot be read can only be dropped")
        mask, box = read_drawing(drawn, shown.drawing)
        unchanged = mask is not None and shown.annotation.mask is not None and (mask == shown.drawing.mask).all()
        encoded = shown.annotation.mask if unchanged else None if mask is None else encode_mask(mask)
        annotation = replace(texts, box=None if mask is None else box, mask=encoded)
        shown.pair.check(annotation)
        self._decide(shown, "keep", annotation)

    def drop(self, shown: Shown) -> None:
        """Write down that a pair is dropped."""
        self._decide(shown, "drop", None)

    def undo(self, annotator: str) -> Shown | None:
        """Take back the annotator's last decision; returns its pair as it was decided on, or None without one."""
        last = self.log.undo(annotator)
        return None if last is None else self.show(annotator, self.pairs[last.pair], last.annotation)

    def progress(self, annotator: str) -> str:
        """How far an annotator is, in a line."""
        decided = self.log.standing.by_pair(annotator)
        decisions = [decided[name].action for name in self.pairs if name in decided]
        keeps = decisions.count("keep")
        return f"{len(decisions)} of {len(self.pairs)} decided: {keeps} kept, {len(decisions) - keeps} dropped"

    def tables(self, annotator: str) -> str:
        """Progress by category, and the agreement with others, in Markdown."""
        categories = proposed_categories(self.pairs.values())
        standing = self.log.standing
        rows = markdown_table(progress_rows(categories, standing.by_pair(annotator)), ("category",))
        agreement = agreement_table(standing, {name: name for name in standing.annotators()})
        return f"{rows}\n\n{agreement or 'No two annotators have decided on the same pair yet.'}"

    def _decide(self, shown: Shown, verdict: Verdict, annotation: Annotation | None) -> None:
        self.log.decide(shown.annotator, shown.pair.id, verdict, annotation, shown.pair.target_sha256())
