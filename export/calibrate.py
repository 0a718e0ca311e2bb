"""What the linear layers of the denoiser's blocks are given, measured on real prompts through the pipeline."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from engines.interface import Array, to_numpy
from engines.pytorch import PyTorchEngine
from engines.wrapper import EngineWrapper
from export.inputs import sample_requests
from export.reference import run_module, run_reference, widen_by_block
from mige_rt.graphs import GraphName
from mige_rt.pipeline import MigePipeline
from mige_rt.sampling_params import SamplingParams
from mige_rt.tokenizer import Tokenize
from trainer.checkpoints.weights import Checkpoint, empty_model
from trainer.model.dit import block_layers

STEPS = 8  # of each sample request: 48 calls of the denoiser, with two or three guidance branches each

OnCall = Callable[[int], None]  # calls of the denoiser that are done


def input_ranges(checkpoint: Checkpoint, tokenize: Tokenize, on_call: OnCall = lambda done: None) -> dict[str, Tensor]:
    """The largest magnitude that each channel of a layer's input takes.

    The samples' images are made in float32 with the published guidance, in STEPS steps each.

    Args:
        checkpoint: the weights; one graph's are in memory at a time, beside the denoiser's.
        tokenize: the model's tokenizer.
        on_call: gets how many calls of the denoiser are done.

    Returns:
        Float32 [channels] of each layer of `block_layers`.
    """
    engine = _ReferenceEngine(checkpoint, on_call)
    ranges: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor]) -> None:
            largest = inputs[0].detach().abs().flatten(0, -2).amax(0)
            ranges[name] = torch.maximum(ranges[name], largest) if name in ranges else largest

        return hook

    for name, layer in block_layers(engine.denoiser).items():
        layer.register_forward_pre_hook(watch(name))
    pipe = MigePipeline(checkpoint.config, tokenize, engine)
    for request in sample_requests():
        pipe.generate([request], SamplingParams(num_inference_steps=STEPS))
    checkpoint.release_pages()
    return ranges


class _ReferenceEngine(EngineWrapper):
    """The model in float32. Every graph but the denoiser is loaded when it runs; images are not decoded."""

    def __init__(self, checkpoint: Checkpoint, on_call: OnCall) -> None:
        super().__init__(PyTorchEngine(empty_model(checkpoint.config)))
        self.checkpoint, self.on_call, self.calls = checkpoint, on_call, 0
        self.denoiser = checkpoint.load(["denoiser"]).graph("denoiser")
        widen_by_block(self.denoiser)

    def run(self, graph: GraphName, inputs: Mapping[str, Array]) -> dict[str, Array]:
        feed = {name: to_numpy(values) for name, values in inputs.items()}
        if graph == "vae_decoder":  # whose image nobody looks at
            images, _, h, w = feed["latents"].shape
            factor = self.checkpoint.config.vae.factor
            return {"pixels": np.zeros((images, 3, factor * h, factor * w), np.float32)}
        if graph != "denoiser":
            return {**run_reference(self.checkpoint, graph, [feed])[0]}
        self.calls += 1
        self.on_call(self.calls)
        return {**run_module(graph, self.denoiser, feed)}
