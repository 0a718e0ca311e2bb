"""MagicBrush's test set (Zhang et al., 2023), in the layout of its release.

`edit_sessions.json` is {image id: [turn, ...]}; a turn has `input`, `output` and `mask`, names of files in
`images/ID/`, and `instruction`. `global_descriptions.json` is {image id: {file name: caption}}.

Single-turn: each turn edits its own published input. Multi-turn: the first turn edits the published input, each later
one the image that was just made, and the session's last image is compared with the last ground truth.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from benchmarks.evaluation.layouts.json_files import read_json
from benchmarks.evaluation.sample import Benchmark, BenchmarkSample, ImageFile, MaskFile
from mige_rt.validation import validate
from trainer.data.published import known_fields

SESSIONS, CAPTIONS = "edit_sessions.json", "global_descriptions.json"
SINGLE, MULTI = "single-turn", "multi-turn"


@dataclass(frozen=True)
class _Turn:
    input: str
    output: str
    instruction: str
    mask: str | None = None


def open_magicbrush(folder: Path) -> Benchmark:
    """Read the test set. Raises InputError when the folder is not in its layout."""
    sessions = cast("dict[str, object]", read_json(folder, SESSIONS, dict))
    captions = cast("dict[str, object]", read_json(folder, CAPTIONS, dict))
    samples: list[BenchmarkSample] = []
    for session, turns in sessions.items():
        where = f"{folder / SESSIONS} session {session}"
        of_session = captions.get(session)
        named = cast("dict[str, str]", of_session) if isinstance(of_session, dict) else {}
        opened = [
            validate(_Turn, known_fields(_Turn, turn), f"{where} turn {number}")
            for number, turn in enumerate(turns if isinstance(turns, list) else [], 1)
        ]
        samples += _of_session(folder / "images" / session, session, opened, named)
    return Benchmark(
        layout="magicbrush",
        title="MagicBrush test set",
        compared="the ground truth",
        samples=tuple(samples),
        rows=(SINGLE, MULTI),
    )


def _of_session(
    folder: Path, session: str, turns: list[_Turn], captions: Mapping[str, str]
) -> Iterator[BenchmarkSample]:
    last = len(turns)
    for number, turn in enumerate(turns, 1):
        truth = ImageFile(folder / turn.output)
        single = BenchmarkSample(
            id=f"{session}-single-{number}",
            rows=(SINGLE, MULTI) if last == 1 else (SINGLE,),
            group=session,
            prompt=turn.instruction,
            source=ImageFile(folder / turn.input),
            truth=truth,
            similar_to=(truth,),
            caption=captions.get(turn.output),
            source_caption=captions.get(turn.input),
            mask=None if turn.mask is None else MaskFile(folder / turn.mask, "erased"),
        )
        yield single
        if number > 1:
            # The published input stays the source of CLIP-dir: it is the first turn's, from which the session starts.
            yield BenchmarkSample(
                id=f"{session}-multi-{number}",
                rows=(MULTI,) if number == last else (),
                group=session,
                prompt=turn.instruction,
                source=ImageFile(folder / turns[0].input),
                after=f"{session}-single-1" if number == 2 else f"{session}-multi-{number - 1}",
                truth=truth,
                similar_to=(truth,),
                caption=captions.get(turn.output),
                source_caption=captions.get(turns[0].input),
            )
