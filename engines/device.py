"""The names of devices: auto, cpu, cuda and cuda:N."""

import re
from dataclasses import dataclass
from typing import Literal

from mige_rt.errors import InputError


@dataclass(frozen=True)
class DeviceName:
    """A device as the user names it; which ones are there is each engine's to find out.

    Attributes:
        kind: auto leaves the choice to the engine.
        index: Of the GPU; None: the current one.
    """

    kind: Literal["auto", "cpu", "cuda"]
    index: int | None = None


def parse_device(name: str) -> DeviceName:
    """Read a device's name.

    Raises:
        InputError: It is none.
    """
    match name:
        case "auto" | "cpu" | "cuda":
            return DeviceName(name)
        case _ if re.fullmatch(r"cuda:\d{1,4}", name, re.ASCII):
            return DeviceName("cuda", int(name.partition(":")[2]))
        case _:
            raise InputError(f"{name!r} is no device; expected auto, cpu, cuda or cuda:N")
