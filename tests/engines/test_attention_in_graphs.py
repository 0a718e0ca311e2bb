"""How attention is computed in the graphs as ONNX Runtime runs them, after its own optimisations."""

from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest

from mige_rt.bundle import DEFAULT_MODEL, read_manifest
from mige_rt.graphs import GraphName

MODEL = read_manifest(DEFAULT_MODEL).model
FUSED = {"Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "GroupQueryAttention"}
# Attentions of each graph: the ViT's, the Q-Former's own, to the image in every second layer, and the fusion's; T5's;
# the denoiser's own and to the text.
ATTENTIONS: dict[GraphName, int] = {
    "image_encoder": MODEL.vision.depth + MODEL.qformer.depth + -(-MODEL.qformer.depth // 2) + 1,
    "text_encoder": MODEL.text.depth,
    "denoiser": 2 * MODEL.dit.depth,
}


@pytest.mark.parametrize("graph", ATTENTIONS)
def test_attention_is_written_out(graph: GraphName, tmp_path: Path) -> None:
    """None is fused. Where that changes, `engines.factory.FASTEST_ON_CUDA` is to be judged anew."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # it warns that the file which it writes is for this machine
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    path = DEFAULT_MODEL / "onnx" / f"{graph}.onnx"
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    nodes = Counter(
        node.op_type for node in onnx.load(tmp_path / "optimised.onnx", load_external_data=False).graph.node
    )
    assert nodes["Softmax"] == ATTENTIONS[graph]
    assert not FUSED & nodes.keys()
