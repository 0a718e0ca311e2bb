"""Functions that test_run.py runs in two processes at once, which exchange gradients by gloo on the CPU."""

import os
import signal
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

import trainer.run.train as run_module
from mige_rt.errors import InputError
from trainer.run.checkpoints import SavedRun
from trainer.run.config import RunConfig
from trainer.run.train import RunOptions, train_run
from trainer.settings import load_settings
from trainer.stages.train_mige import train_mige
from trainer.study.__main__ import run_study

PROCESSES = 2


def launch(function: Callable[..., None], port: int, *arguments: Any) -> list[int | None]:
    """Run a function in two processes; returns their exit codes."""
    context = get_context("forkserver")  # its processes are forked from one that has done the imports
    context.set_forkserver_preload(["trainer.run.train"])
    processes = [context.Process(target=_as_rank, args=(rank, port, function, arguments)) for rank in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=500)
    for process in processes:
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def _as_rank(rank: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """As `accelerate launch` does it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(PROCESSES), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    function(*arguments)


def run(config: RunConfig, options: RunOptions) -> None:
    train_run(config, options)


def run_killed_while_saving(config: RunConfig, options: RunOptions, step: int) -> None:
    """The first process is killed when the checkpoint of a step is written, but not in its place yet."""

    class Killing(SavedRun):
        def write(self, folder: Path) -> None:
            if self.step == step:
                os.kill(os.getpid(), signal.SIGKILL)
            super().write(folder)

    run_module.SavedRun = Killing  # type: ignore[misc]
    train_run(config, options)


def run_refused(config: RunConfig, options: RunOptions, message: Path) -> None:
    """Every process writes its InputError to `message`, with its rank for a suffix."""
    try:
        train_run(config, options)
    except InputError as error:
        message.with_suffix(f".{os.environ['RANK']}").write_text(str(error))


def alone_refused(config: Path, study: Path, message: Path) -> None:
    """Every process writes the InputErrors of the stage mige and of a study to `message`, as above."""
    settings, nowhere, said = load_settings(config), message.parent / "nowhere", list[str]()
    for start in (
        lambda: train_mige(settings.config(), settings.stage("mige"), settings.ladder(), [], nowhere),
        lambda: run_study(study, nowhere, nowhere, None, nowhere),
    ):
        try:
            start()
        except InputError as error:
            said.append(str(error))
    message.with_suffix(f".{os.environ['RANK']}").write_text("\n".join(said))
