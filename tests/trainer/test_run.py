"""`mige-rt train`: runs of two processes that are killed and go on, steps that are skipped, checkpoints, bad input."""

import json
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from webdataset.writer import TarWriter

from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.config import PRESETS, ModelConfig
from trainer.data.mixing import Source
from trainer.data.prepared import INDEX_FILE
from trainer.run.checkpoints import saved_runs
from trainer.run.config import CheckpointSettings, LogSettings, RunConfig, Start
from trainer.run.train import RunOptions

sys.path.insert(0, str(Path(__file__).parent))
from two_processes import launch, run, run_killed_while_saving

TINY = PRESETS["tiny"]
TASKS: dict[str, dict[str, Any]] = {
    "subject": {"prompt": "a <imagehere> in the rain", "source": None, "images": [1]},
    "edit": {"prompt": "make the <imagehere> blue", "source": 1, "images": [1]},
}


def make_prepared(folder: Path, task: str, sizes: ModelConfig, samples: int = 6) -> Source:
    """A prepared set of random features."""
    folder.mkdir()
    random = np.random.default_rng(len(task))
    side = sizes.dit.trained_grid * sizes.dit.patch
    patches = 1 + (sizes.vision.side // sizes.vision.patch) ** 2
    with (folder / "shard-000000.tar").open("wb") as file, TarWriter(file) as tar:
        for i in range(samples):
            latents = random.standard_normal((2, 2 * sizes.vae.channels, side, side)) * 0.5
            vit = random.standard_normal((1, patches, sizes.vision.width))
            values = {"id": f"{task}-{i}", "task": task, "target": 0, "images_vit": [0], **TASKS[task]}
            arrays = {"latents.npy": latents.astype(np.float16), "vit.npy": vit.astype(np.float16)}
            tar.write({"__key__": f"{i}", "json": values, **arrays})
    index = {
        "schema": 1,
        "config": sizes.to_json(),
        "encoders": "made up",
        "samples": samples,
        "tasks": {task: samples},
        "shards": [{"name": "shard-000000.tar", "samples": samples}],
    }
    (folder / INDEX_FILE).write_text(json.dumps(index))
    return Source(str(folder))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps of the default model, with a checkpoint after two, and a line of the log for each."""
    folder = tmp_path_factory.mktemp("sources")
    return RunConfig(
        model="tiny",
        start=Start(model=str(DEFAULT_MODEL)),
        sources=tuple(make_prepared(folder / task, task, TINY) for task in TASKS),
        trained=("image_encoder", "text_encoder", "conditioner", "denoiser"),
        steps=4,
        batch=8,
        micro_batch=2,
        base_rate=1e-3,
        warmup=2,
        weight_decay=0.03,
        epsilon=1e-10,
        clip=0.01,
        seed=5,
        precision="fp32",
        distributed="ddp",
        reshard=True,
        activation_checkpointing=False,
        checkpoints=CheckpointSettings(every=2),
        log=LogSettings(every=1, tensorboard=False),
        ema=0.9,
        spike=10.0,
    )


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def without_time(out: Path) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name != "hours"} for line in lines(out)]


def tensor_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.distcp")}


@pytest.fixture(scope="module")
def free_port() -> Callable[[], int]:
    def find() -> int:
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            return server.getsockname()[1]

    return find


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def shared_run(
    request: pytest.FixtureRequest, config: RunConfig, free_port: Callable[[], int], tmp_path_factory: pytest.TempPathFactory
) -> tuple[RunConfig, Path]:
    """An unbroken run of two processes."""
    shared = replace(config, distributed=request.param, activation_checkpointing=request.param == "fsdp2")
    out = tmp_path_factory.mktemp(request.param) / "whole"
    assert launch(run, free_port(), shared, RunOptions(out)) == [0, 0]
    return shared, out


def test_a_killed_run_goes_on_to_the_last_bit(
    shared_run: tuple[RunConfig, Path], free_port: Callable[[], int], tmp_path: Path
) -> None:
    shared, whole = shared_run
    out = tmp_path / "killed"
    codes = launch(run_killed_while_saving, free_port(), shared, RunOptions(out), 4)
    assert codes[0] == -9 and codes[1] != 0
    assert [saved.step for saved in saved_runs(out)] == [2]
    assert launch(run, free_port(), shared, RunOptions(out, "latest")) == [0, 0]
    assert [line["step"] for line in lines(out)] == [1, 2, 3, 4]
    assert without_time(out) == without_time(whole)
    files = tensor_files(whole / "checkpoint-4")
    assert len(files) == 2  # each process writes its part
    assert tensor_files(out / "checkpoint-4") == files
    assert not list(out.glob("*.partial*"))
