# TensorRT's module has the interface of TensorRT for RTX, but for what is looked up by name where it is used.
from tensorrt_rtx import *  # noqa: F403
from tensorrt_rtx import __version__ as __version__
