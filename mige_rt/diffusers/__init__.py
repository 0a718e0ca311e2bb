"""MIGE as a pipeline of the library diffusers, with its schedulers, and as blocks of its modular pipelines.

Needs the extra `torch`, which brings diffusers. What runs the model's graphs is any engine of mige-rt.
"""

from mige_rt.diffusers.model import MigeModel, default_scheduler
from mige_rt.diffusers.modular import MigeBlocks, MigeDecodeBlock, MigeDenoiseBlock, MigeEncodeBlock
from mige_rt.diffusers.pipeline import MigePipeline

__all__ = [
    "MigeBlocks",
    "MigeDecodeBlock",
    "MigeDenoiseBlock",
    "MigeEncodeBlock",
    "MigeModel",
    "MigePipeline",
    "default_scheduler",
]
