"""A shard: some samples of a manifest through the encoders, as one of webdataset's tar files, and what came of them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL.Image import Image
from webdataset.writer import TarWriter

from mige_rt.atomic import atomic_file
from mige_rt.errors import InputError
from trainer.data.encode import Encoders, encode_samples
from trainer.data.filters import rejection
from trainer.data.manifest import ManifestSample
from trainer.data.tar_images import open_sample_image

TAR_HEADER = {"user": "", "group": "", "mtime": 0}  # of each file in a shard, the same whenever it is written


@dataclass(frozen=True)
class Shard:
    """A shard to make.

    Attributes:
        path: Of the .tar; its report is a .json beside it, which is written when the .tar is whole.
        samples: With their numbers in the manifest.
    """

    path: Path
    samples: Sequence[tuple[int, ManifestSample]]

    @property
    def report_path(self) -> Path:
        """Of the report."""
        return self.path.with_suffix(".json")


@dataclass(frozen=True)
class CorruptImage:
    """An image that could not be read: the id of the sample that has it, its path, and what is wrong."""

    id: str
    image: str
    error: str


@dataclass
class ShardReport:
    """What came of a shard's samples.

    Attributes:
        samples: How many are in the shard.
        images: How many images were opened, those that could not be read among them.
        tasks: Samples of each task.
        filtered: Samples that were left out by a filter, by reason.
        corrupt: The images because of which samples were left out.
    """

    samples: int = 0
    images: int = 0
    tasks: Counter[str] = field(default_factory=Counter[str])
    filtered: Counter[str] = field(default_factory=Counter[str])
    corrupt: list[CorruptImage] = field(default_factory=list[CorruptImage])

    def add(self, other: "ShardReport") -> None:
        """Count another report's samples as well."""
        self.samples += other.samples
        self.images += other.images
        self.tasks.update(other.tasks)
        self.filtered.update(other.filtered)
        self.corrupt += other.corrupt

    def write(self, path: Path) -> None:
        """Write it as JSON, whole or not at all."""
        content = {**vars(self), "corrupt": [asdict(image) for image in self.corrupt]}
        with atomic_file(path) as temporary:
            temporary.write_text(json.dumps(content, sort_keys=True) + "\n", encoding="utf-8")

    @staticmethod
    def read(path: Path) -> "ShardReport":
        """The inverse of `write`."""
        content = json.loads(path.read_text(encoding="utf-8"))
        return ShardReport(
            samples=content["samples"],
            images=content["images"],
            tasks=Counter(content["tasks"]),
            filtered=Counter(content["filtered"]),
            corrupt=[CorruptImage(**image) for image in content["corrupt"]],
        )


def make_shard(encoders: Encoders, shard: Shard, *, batch: int, filtered: bool) -> ShardReport:
    """Write a shard and its report, each whole or not at all.

    Args:
        encoders: What the images go through.
        shard: What to make.
        batch: Samples whose images are in memory at once, and images encoded at once.
        filtered: Apply the paper's filters.

    Raises:
        InputError: The disk is full or cannot be written.
    """
    report = ShardReport()
    try:
        with (
            atomic_file(shard.path) as temporary,
            temporary.open("wb") as file,
            TarWriter(file, **TAR_HEADER) as tar,
        ):
            for start in range(0, len(shard.samples), batch):
                group = shard.samples[start : start + batch]
                opened = [(number, sample, _open_images(sample, filtered, report)) for number, sample in group]
                usable = [(number, sample, images) for number, sample, images in opened if images is not None]
                files = encode_samples(encoders, [(sample, images) for _, sample, images in usable], batch)
                for (number, sample, _), content in zip(usable, files, strict=True):
                    tar.write({"__key__": f"{number:09d}", **content})
                    report.samples += 1
                    report.tasks[sample.task] += 1
        report.write(shard.report_path)
    except OSError as error:
        raise InputError(
            f"{shard.path} cannot be written ({error}); make room, and give the same command again"
        ) from error
    return report


def _open_images(sample: ManifestSample, filtered: bool, report: ShardReport) -> dict[str, Image] | None:
    """A sample's images by their paths; None where it is left out, which the report then says."""
    if filtered and sample.size and (reason := rejection(sample.size, sample.scores)):
        report.filtered[reason] += 1
        return None
    images: dict[str, Image] = {}
    corrupt: list[CorruptImage] = []
    for path in sample.paths():
        report.images += 1
        try:
            images[path] = open_sample_image(path)
        except InputError as error:
            corrupt.append(CorruptImage(sample.id, path, str(error)))
    if corrupt:
        report.corrupt += corrupt
        return None
    if filtered and (reason := rejection(images[sample.target].size, sample.scores)):
        report.filtered[reason] += 1
        return None
    return images
