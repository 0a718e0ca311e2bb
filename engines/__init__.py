"""The runtimes that MIGE's graphs run on, behind one small interface."""

from pathlib import Path
from typing import Literal

from engines.interface import Engine, Precision
from mige_rt.bundle import is_bundle
from mige_rt.errors import InputError

ENGINES = ("onnxruntime", "pytorch")
_INSTALL = {"onnxruntime": "pip install mige-rt", "pytorch": "pip install 'mige-rt[torch]'"}


def open_engine(folder: Path, engine: str, device: str, precision: Precision | Literal["auto"]) -> Engine:
    """Open a bundle or a model folder with the named engine.

    auto: ONNX Runtime for a bundle, PyTorch for a model folder, which holds no graphs.
    Raises InputError when the engine, the device or the precision is not to be had here.
    """
    if engine not in (*ENGINES, "auto"):
        raise InputError(f"there is no engine {engine!r}; expected auto or one of {', '.join(ENGINES)}")
    if engine == "auto":
        engine = "onnxruntime" if is_bundle(folder) else "pytorch"
    try:
        if engine == "onnxruntime":
            if not is_bundle(folder):
                raise InputError(
                    f"{folder} is a model folder, which only the engine pytorch runs; make a bundle of it with: "
                    f"mige-rt export --ckpt {folder} --out BUNDLE"
                )
            from engines.onnx_runtime import OnnxRuntimeEngine

            return OnnxRuntimeEngine.open(folder, device, precision)
        from engines.pytorch import PyTorchEngine

        return PyTorchEngine.open(folder, device, precision)
    except ImportError as error:
        raise InputError(
            f"the engine {engine} needs a package that is not here ({error}); install it with: {_INSTALL[engine]}"
        ) from error
