"""The Emu Edit test set (Sheynin et al., 2024), in the parquet files of facebook/emu_edit_test_set on the hub.

Columns: instruction, image, task, split, idx, hash, input_caption, output_caption. There is no ground truth: the
published similarity and distance are those of the image that is made and the source. Many entries have the same
caption for both; those count for similarity and distance, and not for CLIP-T and CLIP-dir.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.evaluation.sample import Benchmark, BenchmarkSample, ParquetImage
from mige_rt.errors import InputError

SAMPLES, CAPTIONED = 3589, 2899  # of the whole test set; those whose two captions differ
COLUMNS = ("instruction", "image", "task", "idx", "input_caption", "output_caption")
ROW = "all tasks"


def open_emu_edit(folder: Path) -> Benchmark:
    """Read the test set. Raises InputError when files or columns are missing, or entries occur twice."""
    files = sorted(folder.rglob("test-*.parquet"))
    if not files:
        raise InputError(f"{folder} has no test-*.parquet; give the folder that facebook/emu_edit_test_set is in")
    samples = [sample for file in files for sample in _samples(file)]
    twice = [name for name, times in Counter(sample.id for sample in samples).items() if times > 1]
    if twice:
        names = ", ".join(str(file.relative_to(folder)) for file in files)
        raise InputError(
            f"{len(twice)} entries of {folder} occur twice, such as idx {twice[0]}: an older version's files are there "
            f"as well ({names}); keep those of one version"
        )
    check_captioned(len(samples), sum(sample.caption is not None for sample in samples), folder)
    tasks = sorted({sample.rows[1] for sample in samples})
    return Benchmark(
        layout="emu-edit",
        title="Emu Edit test set",
        compared="the source image",
        samples=tuple(sorted(samples, key=lambda sample: int(sample.id))),
        rows=(ROW, *tasks),
        notes=("CLIP-T and CLIP-dir leave out entries whose two captions are the same",),
    )


def check_captioned(samples: int, captioned: int, folder: Path) -> None:
    """Raises InputError when the whole set has another number of entries with two captions than the published one."""
    if samples == SAMPLES and captioned != CAPTIONED:
        raise InputError(
            f"{folder} has {SAMPLES:,} entries as published, but {captioned:,} instead of {CAPTIONED:,} have two "
            "captions that differ; download it again"
        )


def _samples(file: Path) -> list[BenchmarkSample]:
    from pyarrow import parquet

    columns = [name for name in COLUMNS if name != "image"]
    try:
        known = parquet.read_schema(file).names
        missing = [name for name in COLUMNS if name not in known]
        if missing:
            raise InputError(f"{file} lacks the columns {', '.join(missing)}; it has {', '.join(known)}")
        rows = parquet.read_table(file, columns=columns).to_pylist()
    except InputError:
        raise
    except Exception as error:  # those of pyarrow have no common class
        raise InputError(f"{file} cannot be read as parquet ({error}); download it again") from error
    return _of_rows(file, rows)


def _of_rows(file: Path, rows: Sequence[dict[str, Any]]) -> list[BenchmarkSample]:
    samples = []
    for number, row in enumerate(rows):
        if not isinstance(row["idx"], int) or not all(isinstance(row[name], str) for name in ("instruction", "task")):
            raise InputError(f"{file} row {number + 1} has no idx, instruction or task; download it again")
        image = ParquetImage(file, number, "image")
        captions = row["input_caption"], row["output_caption"]
        differ = all(captions) and captions[0] != captions[1]
        samples.append(
            BenchmarkSample(
                id=str(row["idx"]),
                rows=(ROW, row["task"]),
                group=str(row["idx"]),
                prompt=row["instruction"],
                source=image,
                truth=image,
                similar_to=(image,),
                caption=captions[1] if differ else None,
                source_caption=captions[0] if differ else None,
            )
        )
    return samples
