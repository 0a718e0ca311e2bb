"""What is exported is what PyTorch computes, where a graph is not traced as PyTorch runs it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from onnx import helper

from export.context import ExportTarget
from export.exporter import ExportLimits, axis_ranges
from export.graphs import export_graph
from mige_rt.config import PRESETS
from mige_rt.graphs import VAE_QUERY_SLICES
from trainer.checkpoints.weights import empty_model
from trainer.model.vae import VAEDecoder, make_vae

TINY = PRESETS["tiny"]


def test_the_vaes_attention_is_computed_in_slices_of_its_queries(tmp_path: Path) -> None:
    """Whole, its scores would take 8.6 GB in float16 at 2,048 pixels."""
    config = replace(TINY, vae=replace(TINY.vae, attention=True))
    torch.manual_seed(0)
    vae = make_vae(config.vae)
    weights = VAEDecoder(vae).state_dict()
    target = ExportTarget(config, "fp32", axis_ranges(config, ExportLimits(sizes=(8, 256))), tmp_path)
    export_graph("vae_decoder", empty_model(config).vae_decoder, weights.__getitem__, target)

    path = tmp_path / "with_scores.onnx"
    model = onnx.load(target.onnx_path("vae_decoder"), load_external_data=False)
    softmaxes = [node.output[0] for node in model.graph.node if node.op_type == "Softmax"]
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in softmaxes)
    onnx.save(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    vae.set_attn_processor(AttnProcessor2_0())
    decoder = VAEDecoder(vae).eval()
    for h, w in ((2, 2), (6, 4), (10, 64)):
        latents = torch.randn(1, config.vae.channels, h, w)
        pixels, *scores = session.run(None, {"latents": latents.numpy()})
        with torch.inference_mode():
            expected = decoder(latents).numpy()
        np.testing.assert_allclose(pixels, expected, atol=1e-5)  # type: ignore[arg-type]
        assert [s.shape[-2:] for s in scores] == [(h * w // VAE_QUERY_SLICES, h * w)] * VAE_QUERY_SLICES  # type: ignore[union-attr]
