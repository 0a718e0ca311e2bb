"""What a part of the stay is told, and its results, written as soon as they are there."""

import contextlib
import json
import traceback
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mige_rt.atomic import atomic_file
from mige_rt.config import PRESETS, ModelConfig

MESSAGE_LENGTH = 1000  # characters of an error that are kept


@dataclass(frozen=True)
class Stay:
    """Where a part measures: device is cuda, cuda:N, or cpu in a rehearsal, which takes the smallest of everything."""

    part: str
    out: Path
    device: str
    rehearsal: bool

    @property
    def cuda(self) -> bool:
        return self.device != "cpu"

    @property
    def config(self) -> ModelConfig:
        return PRESETS["tiny" if self.rehearsal else "xl"]

    @property
    def num_inference_steps(self) -> int:
        return 3 if self.rehearsal else self.config.defaults.edit.num_inference_steps


class Record:
    """A part's file of results: entries by name, each with what was measured or the error that it met."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results: list[dict[str, Any]] = []

    @contextlib.contextmanager
    def entry(self, name: str) -> Generator[dict[str, Any]]:
        """A dict to fill, which is written when the block ends. An error in the block becomes part of it.

        `ok`, where it is set, says whether what was measured is right.
        """
        values: dict[str, Any] = {"name": name}
        try:
            yield values
        except ImportError:
            raise  # the part is left out
        except Exception as error:
            values["error"] = f"{type(error).__name__}: {error}"[:MESSAGE_LENGTH]
            values["at"] = traceback.format_exc().splitlines()[-4:]
        self.results.append(values)
        self.write()

    @property
    def status(self) -> str:
        wrong = (values for values in self.results if "error" in values or values.get("ok") is False)
        return "failed" if any(wrong) else "ok"

    def write(self, **outcome: Any) -> None:
        """Write what there is; outcome: of the whole part, once it has ended."""
        with atomic_file(self.path) as temporary:
            temporary.write_text(json.dumps({**outcome, "results": self.results}, indent=1) + "\n", encoding="utf-8")
