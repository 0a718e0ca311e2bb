"""A prepared set: a folder of shards that `mige-rt data prepare` made, as training reads it."""

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from webdataset.tariterators import group_by_keys, tar_file_expander

from mige_rt.config import ModelConfig, PositiveInt
from mige_rt.errors import InputError
from mige_rt.instruction import Task
from mige_rt.validation import validate

INDEX_FILE = "index.json"
SCHEMA = 1


@dataclass(frozen=True)
class ShardEntry:
    """A shard of an index: the name of its file, and how many samples it has."""

    name: str
    samples: PositiveInt


@dataclass(frozen=True)
class Index:
    """The content of index.json.

    Attributes:
        schema: SCHEMA.
        config: The sizes of the model whose encoders were used.
        encoders: A digest of their weights.
        encoders_float16: The same of these as float16 holds them; None: an earlier version wrote this.
        samples: How many there are.
        tasks: Samples of each task.
        shards: The files, in their order.
    """

    schema: int
    config: dict[str, Any]
    encoders: str
    samples: int
    tasks: dict[str, int]
    shards: tuple[ShardEntry, ...]
    encoders_float16: str | None = None


@dataclass(frozen=True, eq=False)
class PreparedSample:
    """A training sample's features (`trainer.data.encode` has their shapes).

    Attributes:
        id: The manifest's.
        task: Which of the three uses it is.
        prompt: Multimodal: with one placeholder for each image.
        latents: float16 [P,2c,h,w], means and deviations of its P images.
        vit: float16 [V,1+patches,width], of the V that the prompt refers to.
        target: A row of `latents`.
        source: A row of `latents`; None for the task subject.
        images: Rows of `latents`, in the order of the placeholders.
        images_vit: Rows of `vit`, likewise.
    """

    id: str
    task: Task
    prompt: str
    latents: NDArray[np.float16]
    vit: NDArray[np.float16]
    target: int
    source: int | None
    images: tuple[int, ...]
    images_vit: tuple[int, ...]

    @staticmethod
    def of(
        values: Mapping[str, Any], latents: NDArray[np.float16], vit: NDArray[np.float16] | None
    ) -> "PreparedSample":
        """The sample of the decoded files of a shard; vit is None where the prompt refers to no image."""
        return PreparedSample(
            id=values["id"],
            task=values["task"],
            prompt=values["prompt"],
            latents=latents,
            vit=np.empty(0, np.float16) if vit is None else vit,
            target=values["target"],
            source=values["source"],
            images=tuple(values["images"]),
            images_vit=tuple(values["images_vit"]),
        )

    def draw(self, row: int, generator: np.random.Generator) -> NDArray[np.float32]:
        """Unscaled latents, [c,h,w], drawn from an image's posterior, as published: mean + deviation * noise."""
        mean, deviation = np.split(self.latents[row].astype(np.float32), 2)
        return mean + deviation * generator.standard_normal(mean.shape, dtype=np.float32)


@dataclass(frozen=True)
class PreparedSet:
    """A folder of shards that is whole."""

    folder: Path
    index: Index
    config: ModelConfig

    def read_shard(self, number: int) -> list[PreparedSample]:
        """All samples of a shard, in the file's order.

        Raises:
            InputError: The file is missing or damaged, or has another number of samples.
        """
        entry = self.index.shards[number]
        path = self.folder / entry.name
        try:
            with path.open("rb") as file:
                members = tar_file_expander([{"url": str(path), "stream": file}])
                samples = [_sample(files) for files in group_by_keys(members)]
        except Exception as error:  # webdataset lets through what tarfile, json and numpy raise, with more arguments
            reason = error.args[0] if error.args else error
            raise InputError(f"{path} cannot be read ({reason}); prepare the manifest again") from error
        if len(samples) != entry.samples:
            raise InputError(
                f"{path} has {len(samples)} samples and the index says {entry.samples}; prepare the manifest again"
            )
        return samples


def open_prepared(folder: Path) -> PreparedSet:
    """Open a folder that `mige-rt data prepare` made.

    Raises:
        InputError: It is none, or not whole.
    """
    path = folder / INDEX_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} is no prepared set ({error}); make it with mige-rt data prepare, or let that finish"
        ) from error
    index = validate(Index, content, str(path))
    if index.schema != SCHEMA:
        raise InputError(f"{path} has schema {index.schema}, and {SCHEMA} is read here; prepare the manifest again")
    if missing := [entry.name for entry in index.shards if not (folder / entry.name).is_file()]:
        raise InputError(f"{folder} lacks {', '.join(missing[:3])}; prepare the manifest again")
    return PreparedSet(folder, index, ModelConfig.from_json(index.config))


def _sample(files: Mapping[str, Any]) -> PreparedSample:
    # Decoded here: webdataset's own decoders unpickle whatever file has a name for that.
    latents = np.load(io.BytesIO(files["latents.npy"]), allow_pickle=False)
    vit = np.load(io.BytesIO(files["vit.npy"]), allow_pickle=False) if "vit.npy" in files else None
    return PreparedSample.of(json.loads(files["json"]), latents, vit)
