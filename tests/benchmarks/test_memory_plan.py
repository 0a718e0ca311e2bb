"""What a bench opens at a time."""

from pathlib import Path

from benchmarks.case import Candidate, WorkerConfig, main_candidates, optional_candidates
from benchmarks.memory_plan import plan_groups, process_bytes, total_bytes
from mige_rt.bundle import DEFAULT_MODEL
from mige_rt.config import PRESETS

FULL = PRESETS["xl"]
PLENTY = 10**15


def candidates(*precisions: str) -> list[Candidate]:
    """All of a bench in these precisions; the bundles are not opened."""
    bundles = {precision: Path(precision) for precision in precisions}
    return main_candidates(DEFAULT_MODEL, bundles, ("pytorch", "onnxruntime", "tensorrt"), "cuda", True)  # type: ignore[arg-type]


def test_the_variants_of_an_engine_and_a_precision_share_a_process() -> None:
    wanted = candidates("fp16")
    assert len(wanted) == 6  # two baselines, PyTorch, compiled, ONNX Runtime and TensorRT
    assert len({candidate.worker.process for candidate in wanted}) == 4
    assert total_bytes(wanted[:3], FULL, "cuda:0") == process_bytes(FULL, wanted[0].worker, "cuda:0")


def test_where_all_fits_all_take_turns() -> None:
    wanted = candidates("fp16", "bf16")
    assert plan_groups(wanted, FULL, "cuda:0", PLENTY) == ([wanted], [])


def test_what_does_not_fit_is_measured_in_groups_that_do() -> None:
    wanted, free = candidates("fp16", "bf16"), 80 * 10**9
    assert total_bytes(wanted, FULL, "cuda:0") > free
    groups, too_large = plan_groups(wanted, FULL, "cuda:0", free)
    assert [candidate for group in groups for candidate in group] == wanted and not too_large
    assert len(groups) > 1 and all(total_bytes(group, FULL, "cuda:0") < free for group in groups)
    baselines = groups[0][:3]
    assert [candidate.worker.variant for candidate in baselines] == ["published", "encode_once", "ours"]


def test_what_fits_nowhere_is_named() -> None:
    wanted = candidates("fp32", "fp16")
    groups, too_large = plan_groups(wanted, FULL, "cuda:0", 24 * 10**9)
    assert {candidate.worker.precision for candidate in too_large} == {"fp32"}
    assert {candidate.worker.precision for group in groups for candidate in group} == {"fp16"}


def test_an_estimate_is_that_of_the_weights() -> None:
    def needed(precision: str, device: str = "cuda:0", low_vram: bool = False) -> int:
        worker = WorkerConfig(DEFAULT_MODEL, "pytorch", "auto", precision, low_vram=low_vram)  # type: ignore[arg-type]
        return process_bytes(FULL, worker, device)

    assert 26e9 < needed("fp32") < 36e9  # 6.6 billion numbers of four bytes
    assert 13e9 < needed("fp16") < 19e9
    assert needed("auto") == needed("fp16") and needed("auto", "cpu") == needed("fp32", "cpu")
    assert needed("fp16", "cpu") == needed("fp32", "cpu")  # where it is widened
    assert needed("fp16", low_vram=True) < needed("fp16")


def test_options_of_one_engine_need_a_process_for_low_memory_alone() -> None:
    fastest = WorkerConfig(DEFAULT_MODEL, "pytorch", "cuda", "fp16")
    assert {candidate.worker.process for candidate in optional_candidates(fastest)} == {
        fastest,
        optional_candidates(fastest)[-1].worker,
    }
