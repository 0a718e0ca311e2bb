"""Guidance branches in two processes, on the CPU: the image of one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline

ROOT = Path(__file__).parents[2]
PROMPT, SCENE = "make the background blue", ROOT / "docs" / "scene.png"
# The tiny model's own scales have three branches, which two processes do not divide; without it, there are two.
CASES = [("onnxruntime", 1.0), ("pytorch", 1.0), ("onnxruntime", 1.5)]
SCRIPT = f"""
import json, sys
import torch.distributed as dist
from PIL import Image
from engines.wrapper import HookedEngine
from mige_rt.errors import InputError
from mige_rt.pipeline import MigePipeline

scene, sizes, pipes = Image.open({str(SCENE)!r}), [], {{}}

def note(graph, inputs, run):
    if graph == "denoiser":
        sizes.append(inputs["latents"].shape[0])
    return run()

for number, (name, scale) in enumerate({CASES}):
    if name not in pipes:
        pipes[name] = MigePipeline.from_pretrained(engine=name, device="cpu", cfg_parallel=True)
        pipes[name].runner.engine = HookedEngine(pipes[name].engine, note)
    image = pipes[name]({PROMPT!r}, source=scene, seed=1, num_inference_steps=4, image_guidance_scale=scale).images[0]
    image.save(f"{{sys.argv[1]}}/{{number}}-{{dist.get_rank()}}.png")
try:
    pipes[name]({PROMPT!r}, source=scene)
except InputError as error:
    sizes.append(str(error))
with open(f"{{sys.argv[1]}}/{{dist.get_rank()}}.json", "w") as file:
    json.dump(sizes, file)
dist.destroy_process_group()
"""


def test_two_processes_make_the_image_of_one(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*torchrun, str(script), str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for number, (name, scale) in enumerate(CASES):
        alone = MigePipeline.from_pretrained(engine=name, device="cpu")(
            PROMPT, source=Image.open(SCENE), seed=1, num_inference_steps=4, image_guidance_scale=scale
        ).images[0]
        first, second = (np.asarray(Image.open(tmp_path / f"{number}-{rank}.png"), int) for rank in (0, 1))
        assert np.array_equal(first, second)
        assert np.abs(first - np.asarray(alone, int)).max() <= 1
    for rank in (0, 1):
        *sizes, refusal = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sizes == [1] * 8 + [3] * 4  # of two branches one each; three are not divided
        assert "no seed was given" in refusal


def test_a_process_that_was_started_alone_says_how_to_start_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(InputError, match="torchrun --nproc-per-node 2"):
        MigePipeline.from_pretrained(device="cpu", cfg_parallel=True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(InputError, match="cuda:0 was given; give cuda"):
        MigePipeline.from_pretrained(device="cuda:0", cfg_parallel=True)
