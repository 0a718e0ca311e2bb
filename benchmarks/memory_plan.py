"""Which processes of a bench are open at a time: as many as the memory holds, in groups that are measured in turn."""

from collections.abc import Iterable, Sequence

from benchmarks.case import Candidate, WorkerConfig
from benchmarks.meter import graph_parameters
from mige_rt.bundle import is_bundle, read_manifest
from mige_rt.config import ModelConfig
from mige_rt.graph_runner import PHASES
from mige_rt.graphs import GRAPHS

USABLE = 0.9  # of the free memory
ACTIVATIONS = 1.25  # a process's memory beside its weights', for what a run computes
OVERHEAD = {"cpu": 0.5e9, "cuda": 1.5e9}  # bytes of a process without a model: libraries; the CUDA context as well
_NARROW = {"int8": 1.3, "fp8": 2.0, "int8-sq": 2.0}  # bytes a number on average, but for what is float32 on a CPU


def free_memory(device: str) -> tuple[str, int]:
    """The device that is measured on, cpu or cuda:N, and its free memory in bytes; to be asked in a process apart."""
    import torch

    if device == "cpu" or not torch.cuda.is_available():
        import psutil

        return "cpu", psutil.virtual_memory().available
    index = torch.device(device).index if device != "auto" else None
    return f"cuda:{index or 0}", torch.cuda.mem_get_info(index or 0)[0]


def process_bytes(config: ModelConfig, worker: WorkerConfig, device: str) -> int:
    """What a worker's process needs, estimated from its weights; with low memory from those of the largest phase.

    Args:
        config: the model's sizes.
        worker: its variant does not matter.
        device: cpu or cuda:N.
    """
    precision = worker.precision
    if precision == "auto":
        is_own = worker.engine != "pytorch" and is_bundle(worker.model)
        precision = read_manifest(worker.model).precision if is_own else "fp32" if device == "cpu" else "fp16"
    # On a CPU half precision is widened when it is loaded.
    number = _NARROW.get(precision, 4.0 if device == "cpu" or precision == "fp32" else 2.0)
    phases = PHASES if worker.low_vram else (tuple(GRAPHS),)
    weights = max(sum(graph_parameters(config, graph) for graph in phase) for phase in phases) * number
    return int(ACTIVATIONS * weights + OVERHEAD[device.partition(":")[0]])


def plan_groups(
    candidates: Iterable[Candidate], config: ModelConfig, device: str, free: int
) -> tuple[list[list[Candidate]], list[Candidate]]:
    """Candidates in their order, in as few consecutive groups as the memory allows; and those that fit nowhere.

    Those of one group are measured in turn; a process that several share counts once in each.
    """
    groups: list[list[Candidate]] = []
    too_large: list[Candidate] = []
    for candidate in candidates:
        if total_bytes([candidate], config, device) > USABLE * free:
            too_large.append(candidate)
        elif groups and total_bytes([*groups[-1], candidate], config, device) <= USABLE * free:
            groups[-1].append(candidate)
        else:
            groups.append([candidate])
    return groups, too_large


def total_bytes(candidates: Sequence[Candidate], config: ModelConfig, device: str) -> int:
    """What all their processes need together."""
    processes = {candidate.worker.process for candidate in candidates}
    return sum(process_bytes(config, process, device) for process in processes)
