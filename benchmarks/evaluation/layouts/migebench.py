"""MIGEBench, the benchmark of the paper (section 4, appendix F), in the layout of EurekaTian/MIGEBench on the hub.

`add_bench.json` and `replace_bench.json` are lists of objects in the vocabulary of `trainer.data.published`, with
`object` (what the subject is called), `target_caption`, `mask_path` and `idx` besides. Their paths begin with a folder
of the authors; only their ends count, such as `add/add_target/21_target.jpg` or `add_target/21_target.jpg`.
"""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from benchmarks.evaluation.layouts.json_files import read_json
from benchmarks.evaluation.sample import Benchmark, BenchmarkSample, ImageFile, MaskFile, Subject
from mige_rt.errors import InputError
from mige_rt.validation import validate
from trainer.data.published import known_fields

FILES = {"addition": "add_bench.json", "replacement": "replace_bench.json"}


@dataclass(frozen=True)
class _Entry:
    image: str
    entity_path: tuple[str, ...]
    multi_prompt: str
    source_path: tuple[str, ...]
    object: str
    idx: int
    target_caption: str | None = None
    mask_path: tuple[str, ...] = ()


def open_migebench(folder: Path) -> Benchmark:
    """Read MIGEBench; one of the two files may be missing. Raises InputError when the folder is not in its layout."""
    there = {row: name for row, name in FILES.items() if (folder / name).is_file()}
    if not there:
        raise InputError(f"{folder} lacks {' and '.join(FILES.values())}; give the folder of MIGEBench")
    samples = tuple(
        _sample(folder, row, validate(_Entry, known_fields(_Entry, data), f"{folder / name} entry {number}"))
        for row, name in there.items()
        for number, data in enumerate(read_json(folder, name, list), 1)
    )
    absent = [name for name in FILES.values() if name not in there.values()]
    return Benchmark(
        layout="migebench",
        title="MIGEBench",
        compared="the ground truth",
        samples=samples,
        rows=tuple(FILES),
        notes=tuple(f"{name} is not there" for name in absent),
    )


def _sample(folder: Path, row: str, entry: _Entry) -> BenchmarkSample:
    if len(entry.source_path) != 1:
        raise InputError(
            f"{folder / FILES[row]} idx {entry.idx}: source_path has {len(entry.source_path)} paths, not 1"
        )
    source, truth = _find(folder, entry.source_path[0]), _find(folder, entry.image)
    images = tuple(_find(folder, path) for path in entry.entity_path)
    entities = [image for image in images if image != source]
    return BenchmarkSample(
        id=f"{row}-{entry.idx}",
        rows=(row,),
        group=f"{row}-{entry.idx}",
        prompt=entry.multi_prompt,
        images=images,
        source=source,
        truth=truth,
        similar_to=(truth,),
        caption=entry.target_caption,
        mask=MaskFile(_find(folder, entry.mask_path[0]).path) if entry.mask_path else None,
        subject=Subject(entry.object, entities[0]) if entities else None,
    )


def _find(folder: Path, published: str) -> ImageFile:
    """The file that a published path means; where there is none, the likeliest name, for the list of missing files."""
    parts = PurePosixPath(published).parts
    candidates = [folder.joinpath(*parts[-number:]) for number in (3, 2)]
    return ImageFile(next((path for path in candidates if path.is_file()), candidates[0]))
