"""Mixing of prepared sets: the ratios hold in each batch, and a resumed run reads what would have come."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from webdataset.writer import TarWriter

from mige_rt.config import PRESETS
from mige_rt.errors import InputError
from mige_rt.validation import validate
from trainer.data.mixing import MixedBatches, MixedSamples, Source
from trainer.data.prepared import INDEX_FILE, open_prepared

TINY = PRESETS["tiny"]
MakeSet = Callable[..., str]


@pytest.fixture
def make_set(tmp_path: Path) -> MakeSet:
    """Makes a prepared set of samples with little in them, whose ids begin with its name."""

    def make(name: str, sizes: tuple[int, ...], encoders: str = "one") -> str:
        folder = tmp_path / name
        folder.mkdir()
        latents = np.zeros((1, 2, 1, 1), np.float16)
        values = {"task": "subject", "prompt": "a", "target": 0, "source": None, "images": [], "images_vit": []}
        shards = []
        for s, size in enumerate(sizes):
            shards.append({"name": f"shard-{s:06d}.tar", "samples": size})
            with (folder / shards[-1]["name"]).open("wb") as file, TarWriter(file) as tar:
                for i in range(size):
                    tar.write({"__key__": f"{i}", "json": {"id": f"{name}-{s}-{i}", **values}, "latents.npy": latents})
        index = {"schema": 1, "config": TINY.to_json(), "encoders": encoders, "shards": shards}
        index |= {"samples": sum(sizes), "tasks": {"subject": sum(sizes)}}
        (folder / INDEX_FILE).write_text(json.dumps(index))
        return str(folder)

    return make


def _ids(batches: Iterator[MixedSamples], number: int) -> list[list[str]]:
    return [[sample.id for sample in batch.samples] for batch in islice(batches, number)]


def test_a_resumed_run_reads_what_would_have_come(make_set: MakeSet) -> None:
    sources = [Source(make_set("a", (5, 3, 7, 2))), Source(make_set("b", (4, 1)), 2.5), Source(make_set("c", (6,)))]
    for rank in range(2):
        unbroken = _ids(MixedBatches(sources, 5, seed=3).batches(0, rank, 2), 40)
        noise = [batch.generator.random() for batch in islice(MixedBatches(sources, 5, 3).batches(0, rank, 2), 40)]
        for step in (1, 7, 23, 39):
            resumed = MixedBatches(sources, 5, seed=3)
            assert _ids(resumed.batches(step, rank, 2), 40 - step) == unbroken[step:]
            assert next(resumed.batches(step, rank, 2)).generator.random() == noise[step]
        assert _ids(MixedBatches(sources, 5, seed=4).batches(0, rank, 2), 40) != unbroken


def test_ratios_hold_in_every_batch_on_every_process(make_set: MakeSet) -> None:
    ratios = (1.0, 1.0, 2.0, 0.3)
    sources = [Source(make_set(name, (150, 100)), ratio) for name, ratio in zip("abcd", ratios, strict=True)]
    batch, steps = 7, 300
    expected = np.array(ratios) / sum(ratios) * batch
    for rank in range(2):
        batches = islice(MixedBatches(sources, batch, seed=0).batches(0, rank, 2), steps)
        counts = np.array([np.bincount(mixed.sources, minlength=4) for mixed in batches])
        assert (counts.sum(axis=1) == batch).all()
        assert (counts >= np.floor(expected)).all() and (counts <= np.ceil(expected)).all()
        np.testing.assert_allclose(counts.mean(axis=0), expected, atol=0.02)


def test_places_in_a_batch_do_not_tell_the_source(make_set: MakeSet) -> None:
    sources = [Source(make_set(name, (50,))) for name in "ab"]
    batches = islice(MixedBatches(sources, 4, seed=0).batches(0, 0, 1), 500)
    share = np.mean([batch.sources for batch in batches], axis=0)
    assert np.abs(share - 0.5).max() < 0.1


def test_four_sources_without_ratios_stand_as_in_the_paper(make_set: MakeSet) -> None:
    sources = [Source(make_set(name, (9,))) for name in ("subject", "edit", "addition", "replacement")]
    batches = islice(MixedBatches(sources, 8, seed=0).batches(0, 0, 1), 10)
    for batch in batches:
        assert np.bincount(batch.sources).tolist() == [2, 2, 2, 2]


@pytest.mark.parametrize("ranks", [1, 3])
def test_every_sample_comes_once_before_any_comes_again(ranks: int, make_set: MakeSet) -> None:
    mixed = MixedBatches([Source(make_set("a", (3,) * 6))], 1, seed=1)
    streams = [mixed.batches(0, rank, ranks) for rank in range(ranks)]
    rounds = [[name for stream in streams for (name,) in _ids(stream, 18 // ranks)] for _ in range(3)]
    for names in rounds:
        assert len(set(names)) == 18
    assert rounds[0] != rounds[1] != rounds[2]


def test_folders_of_one_source_are_read_as_one(make_set: MakeSet) -> None:
    paths = (make_set("small", (3,)), make_set("large", (3, 3, 3)))
    mixed = MixedBatches([Source(paths), Source(make_set("other", (2,)))], 2, seed=0)
    names = Counter(name.split("-")[0] for batch in _ids(mixed.batches(0, 0, 1), 24) for name in batch)
    assert names == {"small": 6, "large": 18, "other": 24}


def test_bad_sources_are_named(make_set: MakeSet, tmp_path: Path) -> None:
    good = Source(make_set("good", (2,)))
    other = Source(make_set("other", (2,), "two"))
    empty = Source(make_set("empty", ()))
    for sources, message in (
        ([], "sources is empty"),
        ([good, replace(good, ratio=0.0)], r"sources\[1\].ratio is 0.0; expected a number greater than 0"),
        ([replace(good, ratio=float("nan"))], r"sources\[0\].ratio is nan"),
        ([good, other], r"other was prepared with other encoders than .*good"),
        ([empty], r"empty has no samples"),
        ([Source(str(tmp_path / "gone"))], r"gone is no prepared set"),
    ):
        with pytest.raises(InputError, match=message):
            MixedBatches(sources, 2, seed=0)


def test_a_source_is_read_from_a_config() -> None:
    assert validate(Source, {"path": "a"}, "config") == Source("a")
    assert validate(Source, {"path": ["a", "b"], "ratio": 2}, "config") == Source(("a", "b"), 2.0)
    with pytest.raises(InputError, match="config: unknown ration, did you mean ratio"):
        validate(Source, {"path": "a", "ration": 1}, "config")


def test_an_index_of_another_kind_is_named(make_set: MakeSet) -> None:
    folder = Path(make_set("a", (2,)))
    index = json.loads((folder / INDEX_FILE).read_text())
    for change, message in (
        ({"schema": 2}, r"index.json has schema 2, and 1 is read here"),
        ({"samples": "2"}, r"samples is '2', expected an integer"),
    ):
        (folder / INDEX_FILE).write_text(json.dumps({**index, **change}))
        with pytest.raises(InputError, match=message):
            open_prepared(folder)
