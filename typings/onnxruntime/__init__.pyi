"""What this project uses of ONNX Runtime, which ships no types."""

from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

from numpy.typing import NDArray

__version__: str

class ExecutionMode(IntEnum):
    ORT_SEQUENTIAL = 0
    ORT_PARALLEL = 1

class GraphOptimizationLevel(IntEnum):
    ORT_DISABLE_ALL = 0
    ORT_ENABLE_BASIC = 1
    ORT_ENABLE_EXTENDED = 2
    ORT_ENABLE_LAYOUT = 3
    ORT_ENABLE_ALL = 99

class SessionOptions:
    enable_cpu_mem_arena: bool
    enable_mem_pattern: bool
    enable_profiling: bool
    execution_mode: ExecutionMode
    graph_optimization_level: GraphOptimizationLevel
    inter_op_num_threads: int
    intra_op_num_threads: int
    log_severity_level: int
    optimized_model_filepath: str
    profile_file_prefix: str
    def add_session_config_entry(self, key: str, value: str) -> None: ...
    def add_external_initializers(self, names: Sequence[str], values: Sequence[Any]) -> None: ...

class NodeArg:
    name: str
    shape: list[int | str | None]
    type: str

class IOBinding:
    def bind_input(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None: ...
    def bind_output(
        self, name: str, device_type: str, device_id: int, element_type: Any, shape: Sequence[int], buffer_ptr: int
    ) -> None: ...

class OrtValue:
    @staticmethod
    def ortvalue_from_numpy(values: NDArray[Any], device_type: str = ..., device_id: int = ...) -> OrtValue: ...
    def numpy(self) -> NDArray[Any]: ...

class InferenceSession:
    def __init__(
        self,
        path_or_bytes: str | bytes,
        sess_options: SessionOptions | None = None,
        providers: Sequence[str | tuple[str, Mapping[str, Any]]] | None = None,
    ) -> None: ...
    def run(self, output_names: Sequence[str] | None, input_feed: Mapping[str, Any]) -> list[NDArray[Any]]: ...
    def run_with_iobinding(self, iobinding: IOBinding) -> None: ...
    def io_binding(self) -> IOBinding: ...
    def get_inputs(self) -> list[NodeArg]: ...
    def get_outputs(self) -> list[NodeArg]: ...
    def get_providers(self) -> list[str]: ...
    def end_profiling(self) -> str: ...

def get_available_providers() -> list[str]: ...
def set_default_logger_severity(severity: int) -> None: ...
