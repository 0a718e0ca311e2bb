"""mige-rt: the engine people run MIGE on. `from mige_rt import MigePipeline` is all that most programs need."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from mige_rt.errors import InputError, NotAvailableError, NotFiniteError
    from mige_rt.pipeline import MigePipeline, MigePipelineOutput
    from mige_rt.sampling_params import SamplingParams

__all__ = [
    "InputError",
    "MigePipeline",
    "MigePipelineOutput",
    "NotAvailableError",
    "NotFiniteError",
    "SamplingParams",
    "__version__",
]

# Libraries that tell their makers how they are used, unless they are told not to before they are imported. ONNX Runtime
# keeps an identifier of the machine in the user's cache as well. Who wants one of them sets its variable.
for _variable, _off in {
    "GRADIO_ANALYTICS_ENABLED": "False",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_DISABLE_TELEMETRY": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}.items():
    os.environ.setdefault(_variable, _off)

_MODULES = {
    "InputError": "mige_rt.errors",
    "MigePipeline": "mige_rt.pipeline",
    "MigePipelineOutput": "mige_rt.pipeline",
    "NotAvailableError": "mige_rt.errors",
    "NotFiniteError": "mige_rt.errors",
    "SamplingParams": "mige_rt.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command line imports this package and must start at once."""
    if name == "__version__":
        from importlib.metadata import version

        return version("mige-rt")
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return __all__
