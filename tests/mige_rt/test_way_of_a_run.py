"""The way of a prompt from the command to the PNG: one direction, each file entered from one other file alone."""

import inspect
import sys
from collections import defaultdict
from pathlib import Path
from types import FrameType
from typing import Any

from click.testing import CliRunner
from PIL import Image

from mige_rt.cli import main

ROOT = Path(__file__).parents[2]
PACKAGES = {"mige_rt", "engines", "trainer", "export", "benchmarks"}  # a virtual environment may lie in ROOT too
# The runner of graphs and the tokenizer are what stages call; sizes and options are data that all may read.
RUNNER = {
    "mige_rt/tokenizer.py",
    "mige_rt/graph_runner.py",
    "engines/onnx_runtime.py",
    "engines/batch_parallel.py",
    "engines/interface.py",
}
DATA = {"mige_rt/config.py", "mige_rt/graphs.py", "mige_rt/errors.py", "mige_rt/__init__.py"}
DATA |= {"mige_rt/validation.py", "mige_rt/sampling_params.py"}
CALLBACKS = {"advance", "on_step_end", "warn"}  # progress and warnings, which come back to whoever asked for them
WAY = [
    "mige_rt/cli",
    "mige_rt/terminal.py",
    "mige_rt/image_output.py",
    "mige_rt/images.py",
    "mige_rt/requests.py",
    "mige_rt/instruction.py",
    "mige_rt/pipeline.py",
    "mige_rt/hub.py",
    "mige_rt/bundle.py",
    "mige_rt/known_files.py",
    "mige_rt/memory.py",
    "engines/factory.py",
    "engines/device.py",
    "engines/trial.py",
    "mige_rt/sampling_plan.py",
    "mige_rt/guidance.py",
    "mige_rt/scheduler.py",
    "mige_rt/image_size.py",
    "mige_rt/conditioning.py",
    "mige_rt/prompt_tokens.py",
    "mige_rt/preprocessing.py",
    "engines/outputs.py",
    "mige_rt/denoise.py",
    "mige_rt/postprocessing.py",
    "mige_rt/atomic.py",
]


def _own_file(frame: FrameType | None) -> str | None:
    """The file of this project that a frame, or the nearest one that called it, is in."""
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in PACKAGES:
            name = path.relative_to(ROOT).as_posix()
            of_command = name.startswith(("mige_rt/cli/", "mige_rt/batch/"))  # batch makes what the command asks for
            return "mige_rt/cli" if of_command else name
        frame = frame.f_back
    return None


def test_each_file_is_entered_from_one_other_file(scene: Image.Image, tmp_path: Path) -> None:
    scene.save(tmp_path / "scene.png")
    entered_from: dict[str, set[str]] = defaultdict(set)
    order: list[str] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(str(ROOT)):
            return
        if not frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a module or the body of a class: an import
            return
        if frame.f_code.co_name in CALLBACKS:
            return
        callee, caller = _own_file(frame), _own_file(frame.f_back)
        if callee is None or callee in RUNNER | DATA:
            return
        if callee not in order:
            order.append(callee)
        if caller is not None and caller != callee:
            entered_from[callee].add(caller)

    arguments = ["run", "--prompt", "make the background blue", "--source", str(tmp_path / "scene.png"), "--steps", "2"]
    sys.setprofile(profile)
    try:
        result = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--out", str(tmp_path / "out.png")])
    finally:
        sys.setprofile(None)
    assert result.exit_code == 0, result.output
    assert {callee: callers for callee, callers in entered_from.items() if len(callers) > 1} == {}
    assert sorted(order) == sorted(WAY), set(order) ^ set(WAY)
