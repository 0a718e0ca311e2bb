"""A run's checkpoints: folders `checkpoint-STEP`, each whole or not at all, written by all processes together.

Tensors are PyTorch's distributed checkpoint, of which each process writes its part; `run.json` says the rest. It is
written last and removed first, so that a folder without it is no checkpoint. Processes share the folder.
"""

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from mige_rt.atomic import atomic_file, atomic_folder
from mige_rt.errors import InputError
from mige_rt.terminal import report
from trainer.run.module import on_main, unwrapped_name

RUN_FILE = "run.json"
METADATA_FILE = ".metadata"
LATEST = "latest"
# What PyTorch's description of a checkpoint is made of.
_PICKLED = {
    "pathlib": ("PosixPath", "WindowsPath"),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
}
_NAME = re.compile(r"checkpoint-(\d+)")

T = TypeVar("T")


@dataclass(frozen=True)
class SavedRun:
    """The content of run.json.

    Attributes:
        folder: The checkpoint.
        step: Steps that were done.
        hours: That they took.
        loss: What the best checkpoint is chosen by.
        guard: The `LossGuard`'s values.
        config: The config's values that a resumed run must have as well.
    """

    folder: Path
    step: int
    hours: float
    loss: float
    guard: Mapping[str, Any]
    config: Mapping[str, Any]

    def write(self, folder: Path) -> None:
        """Write it into a folder."""
        content = {name: value for name, value in vars(self).items() if name != "folder"}
        with atomic_file(folder / RUN_FILE) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps(content, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())

    @staticmethod
    def read(folder: Path) -> "SavedRun":
        """The inverse of `write`.

        Raises:
            InputError: The folder is no checkpoint.
        """
        try:
            return SavedRun(folder=folder, **json.loads((folder / RUN_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise InputError(
                f"{folder} is no checkpoint of a run ({error}); give a folder checkpoint-STEP, or {LATEST}"
            ) from error


def saved_runs(out: Path) -> list[SavedRun]:
    """The checkpoints of a run, by their steps. A damaged one is passed over with a warning, beside whole ones.

    Raises:
        InputError: All of them are damaged.
    """
    whole, damaged = list[SavedRun](), list[InputError]()
    for path in out.iterdir():
        if _NAME.fullmatch(path.name) and (path / RUN_FILE).is_file():
            try:
                whole.append(SavedRun.read(path))
            except InputError as error:
                damaged.append(error)
    if damaged and not whole:
        raise damaged[0]
    for error in damaged:
        warnings.warn(f"passed over: {error}", stacklevel=2)
    return sorted(whole, key=lambda saved: saved.step)


def load_tensors(saved: SavedRun, tensors: dict[str, Tensor]) -> None:
    """Read a checkpoint's tensors into these, of which each process may have a part; every process makes the call.

    Raises:
        InputError: The checkpoint is damaged, or has other tensors.
    """
    try:
        reader = DataReader(saved.folder)
        written = reader.read_metadata().state_dict_metadata
        # Earlier versions wrote the names of wrapped layers, see `trained_parameters`.
        by_name = {unwrapped_name(name): name for name in written}
        load({by_name.get(name, name): tensor for name, tensor in tensors.items()}, storage_reader=reader)
    except (CheckpointException, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
        raise InputError(
            f"{saved.folder} cannot be read ({_cause(error)}); give another checkpoint, such as the one before"
        ) from error


class Checkpoints:
    """The checkpoints in a run's folder. Every process makes every call."""

    def __init__(self, out: Path, accelerator: Accelerator, total_limit: int | None) -> None:
        """Use the folder, and remove checkpoints that were not removed to the end.

        Args:
            out: The run's folder.
            accelerator: Of the processes.
            total_limit: How many of the latest are kept, beside the best one; None: all.
        """
        self._out, self._accelerator, self._total_limit = out, accelerator, total_limit
        self._on_main(self._remove_halves)

    def find(self, given: str) -> SavedRun | None:
        """The checkpoint of a path, or the latest one; None where there is none yet.

        Raises:
            InputError: The path is no checkpoint.
        """
        if given != LATEST:
            return SavedRun.read(Path(given))
        return self._on_main(lambda: next(reversed(saved_runs(self._out)), None))

    def save(self, saved: SavedRun, tensors: dict[str, Tensor]) -> None:
        """Write a checkpoint, and remove those beyond the limit.

        Args:
            saved: What is written beside the tensors; its folder, in the run's, is replaced where it exists.
            tensors: Each process's, by names.

        Raises:
            InputError: The disk is full or cannot be written. Earlier checkpoints are left as they are.
        """
        with ExitStack() as stack:
            temporary = self._on_main(lambda: stack.enter_context(atomic_folder(saved.folder, replace=True)))
            try:
                save(tensors, storage_writer=FileSystemWriter(temporary, single_file_per_rank=True))
            except (CheckpointException, OSError) as error:
                raise self._unwritten(saved.folder, error) from error

            def complete() -> None:
                saved.write(temporary)
                stack.close()
                self._remove_old()

            self._on_main(complete)

    def set_aside_after(self, step: int) -> None:
        """Rename the checkpoints beyond a step from which the run goes on anew: each could be gone on from by its path.

        Under their own names they would be the latest ones, and what is written now would be removed as older.
        """

        def rename() -> None:
            for saved in saved_runs(self._out):
                if saved.step > step:
                    paths = (saved.folder.with_name(f"{saved.folder.name}.aside-{number}") for number in count(1))
                    aside = next(path for path in paths if not path.exists())
                    saved.folder.rename(aside)
                    report(f"{saved.folder} is beyond step {step}, from which the run goes on: it is now {aside.name}")

        self._on_main(rename)

    def _on_main(self, action: Callable[[], T]) -> T:
        """As `on_main`, where what the system refuses is an InputError too."""

        def writing() -> T:
            try:
                return action()
            except OSError as error:
                raise self._unwritten(self._out, error) from error

        return on_main(self._accelerator, writing)

    def _unwritten(self, folder: Path, error: BaseException) -> InputError:
        last = next(reversed(saved_runs(self._out)), None)
        kept = f"{last.folder} is whole" if last else "there is no checkpoint yet"
        return InputError(
            f"{folder} could not be written ({_cause(error)}); make room, and go on with --resume-from-checkpoint "
            f"{LATEST}: {kept}"
        )

    def _remove_halves(self) -> None:
        for path in self._out.iterdir():
            if _NAME.fullmatch(path.name) and not (path / RUN_FILE).is_file():
                shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> None:
        if self._total_limit is None:
            return
        saved = saved_runs(self._out)
        best = min(saved, key=lambda one: one.loss)
        for old in saved[: -self._total_limit]:
            if old is not best:
                (old.folder / RUN_FILE).unlink()
                shutil.rmtree(old.folder, ignore_errors=True)


def _cause(error: BaseException) -> str:
    """What the first process that failed says, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error, _ = next(iter(error.failures.values()))
    return " ".join(str(error).split())


class DataReader(FileSystemReader):
    """PyTorch's reader, but a checkpoint is data: nothing pickled in its description is run."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """See `FileSystemReader.read_metadata`. Raises UnpicklingError where it names anything else."""
        with (Path(self.path) / METADATA_FILE).open("rb") as file:
            metadata = _DataUnpickler(file).load()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _DataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in _PICKLED.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of a run does")
