"""Measuring a results folder: scores by image, which a stopped run goes on with, and the rows of the table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.evaluation.encoders import EncoderName, EncoderOptions, Encoders, MissingEncoder
from benchmarks.evaluation.metrics import METRICS
from benchmarks.evaluation.results import Results, check_benchmark
from benchmarks.evaluation.sample import Benchmark, BenchmarkSample
from benchmarks.evaluation.scores import Score, Scorer, ScoresFile
from mige_rt.errors import InputError, reason
from trainer.evaluate.intervals import Estimate, estimate

SCORES, AGAINST = "scores.jsonl", "against.jsonl"

OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class TableRow:
    """A row of the table.

    Attributes:
        name: What it is of.
        metrics: By name, over the images that have the metric.
        counts: Of those images, by metric.
        subjects: How many subjects were looked for, and how many were not found, where the whole image counts.
    """

    name: str
    metrics: Mapping[str, Estimate]
    counts: Mapping[str, int]
    subjects: tuple[int, int] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One results folder, measured.

    Attributes:
        results: The folder.
        scores: By image.
        rows: Of the table.
        expected: How many images the benchmark asks for.
        unreadable: Images that could not be measured, by name, and why.
    """

    results: Results
    scores: Mapping[str, Score]
    rows: Sequence[TableRow]
    expected: int
    unreadable: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What `mige-rt eval judge` reports.

    Attributes:
        benchmark: Of which.
        judged: The results.
        against: The results that they are compared with.
        parity: The mean difference of each metric from those, image by image.
        encoders: By what they are for.
        missing: Encoders that are not here.
    """

    benchmark: Benchmark
    judged: Judged
    against: Judged | None
    parity: Sequence[TableRow]
    encoders: Mapping[str, EncoderName]
    missing: Sequence[MissingEncoder]


def judge(
    benchmark: Benchmark,
    results: Results,
    out: Path,
    options: EncoderOptions,
    *,
    against: Results | None = None,
    on_progress: OnProgress = lambda what, done, total: None,
) -> Judgement:
    """Measure the images that are there, but for those that were measured before.

    Args:
        benchmark: That they are of.
        results: Their folder.
        out: The report's folder, made if need be, which keeps the scores.
        options: Which encoders.
        against: Another folder to be compared with, such as that of another engine.
        on_progress: Called after each image.

    Raises:
        InputError: The results are of another benchmark, there are none, or `out` holds scores of others.
    """
    for each in (results, *([] if against is None else [against])):
        check_benchmark(each, benchmark)
    encoders = Encoders(options)
    names = encoders.names(subjects=any(s.subject is not None and s.subject.mask is None for s in benchmark.samples))
    judged = _judge_folder(benchmark, results, out / SCORES, encoders, names, on_progress)
    other = None
    if against is not None:
        other = _judge_folder(benchmark, against, out / AGAINST, encoders, names, on_progress)
    return Judgement(
        benchmark=benchmark,
        judged=judged,
        against=other,
        parity=[] if other is None else parity_rows(benchmark, judged.scores, other.scores),
        encoders=names,
        missing=encoders.missing,
    )


def _judge_folder(
    benchmark: Benchmark,
    results: Results,
    path: Path,
    encoders: Encoders,
    names: Mapping[str, EncoderName],
    on_progress: OnProgress,
) -> Judged:
    images = [(name, sample) for sample, _, name in benchmark.image_names() if results.image(name).is_file()]
    if not images:
        raise InputError(f"{results.folder} holds no image; make them by: mige-rt eval generate")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path.parent} cannot be made ({reason(error)}); give a folder of your own") from error
    header: dict[str, Any] = {
        "benchmark": benchmark.fingerprint(),
        "results": asdict(results.id),
        "encoders": {role: asdict(name) for role, name in names.items()},
    }
    scorer, file, unreadable = Scorer(encoders), ScoresFile(path, header), dict[str, str]()
    for done, (name, sample) in enumerate(images):
        on_progress("images judged", done, len(images))
        if not file.is_current(name, results.image(name), sample):
            try:
                file.add(scorer.score(name, results.image(name), sample))
            except InputError as error:
                unreadable[name] = str(error)
    there = {name for name, _ in images} - unreadable.keys()
    scores = {name: score for name, score in file.scores.items() if name in there}
    expected = len(benchmark.samples) * len(benchmark.seeds)
    return Judged(
        results=results,
        scores=scores,
        rows=table_rows(benchmark, scores),
        expected=expected,
        unreadable=unreadable,
    )


def table_rows(benchmark: Benchmark, scores: Mapping[str, Score]) -> list[TableRow]:
    """The rows of a benchmark that have images; with several seeds, of the first one alone and of all.

    Behind each row of an edit with a ground truth: the input-output row, in which the source stands unchanged.
    """
    rows: list[TableRow] = []
    first = (benchmark.seeds[0],)
    several = benchmark.seeds if len(benchmark.seeds) > 1 else None
    for row in benchmark.rows:
        for seeds in (first, *([several] if several else [])):
            images = _of_row(benchmark, scores, row, seeds)
            name = row if several is None else f"{row}, {_named(seeds)}"
            rows += [_table_row(name, [(sample, score.metrics, score) for sample, score in images])] if images else []
        unchanged = [
            (s, score.baseline, score) for s, score in _of_row(benchmark, scores, row, first) if score.baseline
        ]
        rows += [_table_row(f"{row}: input-output", unchanged, subjects=False)] if unchanged else []
    return rows


def parity_rows(benchmark: Benchmark, scores: Mapping[str, Score], others: Mapping[str, Score]) -> list[TableRow]:
    """Rows of the differences between two folders' metrics, over the images that both have."""
    rows: list[TableRow] = []
    for row in benchmark.rows:
        pairs = [
            (sample, _differences(score.metrics, others[score.image].metrics), score)
            for sample, score in _of_row(benchmark, scores, row, benchmark.seeds)
            if score.image in others
        ]
        rows += [_table_row(row, pairs, subjects=False)] if pairs else []
    return rows


def _differences(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, float]:
    return {name: value - b[name] for name, value in a.items() if name in b}


def _named(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def _of_row(
    benchmark: Benchmark, scores: Mapping[str, Score], row: str, seeds: Sequence[int]
) -> list[tuple[BenchmarkSample, Score]]:
    return [
        (sample, scores[name])
        for sample, seed, name in benchmark.image_names()
        if row in sample.rows and seed in seeds and name in scores
    ]


def _table_row(
    name: str, images: Sequence[tuple[BenchmarkSample, Mapping[str, float], Score]], *, subjects: bool = True
) -> TableRow:
    """A row over images. Intervals resample groups, since images of one subject or session are alike."""
    estimates, counts = dict[str, Estimate](), dict[str, int]()
    for metric in METRICS:
        sums, numbers = dict[str, float](), dict[str, int]()
        for sample, values, _ in images:
            if metric in values:
                sums[sample.group] = sums.get(sample.group, 0.0) + values[metric]
                numbers[sample.group] = numbers.get(sample.group, 0) + 1
        mean = estimate(list(sums.values()), list(numbers.values())) if sums else None
        if mean is not None:
            estimates[metric], counts[metric] = mean, sum(numbers.values())
    looked_for = [score.subject for *_, score in images if subjects and score.subject is not None]
    return TableRow(name, estimates, counts, (len(looked_for), looked_for.count("not found")))
