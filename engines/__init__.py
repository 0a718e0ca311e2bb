"""The runtimes that MIGE's graphs run on, behind one small interface."""

from pathlib import Path
from typing import Literal

from engines.interface import Engine, Precision
from mige_rt.errors import InputError

ENGINES = ("pytorch",)


def open_engine(folder: Path, engine: str, device: str, precision: Precision | Literal["auto"]) -> Engine:
    """Open a model folder with the named engine; `auto` is the fastest that works here.

    Raises InputError when the engine, the device or the precision is not to be had here.
    """
    if engine not in (*ENGINES, "auto"):
        raise InputError(f"there is no engine {engine!r}; expected auto or one of {', '.join(ENGINES)}")
    try:
        from engines.pytorch import PyTorchEngine
    except ImportError as error:
        raise InputError(
            f"the pytorch engine needs a package that is not here ({error}); "
            "install it with: pip install 'mige-rt[torch]'"
        ) from error
    return PyTorchEngine.open(folder, device, precision)
