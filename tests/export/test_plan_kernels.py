"""What TensorRT for RTX makes of the `reduced` model's graphs, whose heads and tokens are the published ones.

Attention that is not fused writes and reads its scores, of which there are a million a head at 512 pixels.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from plans import export_made_up, kernels_of

from mige_rt.config import PRESETS
from mige_rt.graphs import GraphName

# Of each graph: fused attentions; how many of them a block has; kernels of a block, from its first attention to the
# next block's; kernels of a run. Every model here has two blocks.
EXPECTED: dict[GraphName, tuple[int, int, int, int]] = {
    "denoiser": (4, 2, 18, 44),
    "text_encoder": (2, 1, 10, 22),
    "image_encoder": (6, 1, 10, 77),  # two of the ViT, whose block is counted, three of the Q-Former, one of the fusion
}


@pytest.mark.parametrize("graph", EXPECTED)
def test_attention_is_fused_in_every_block(graph: GraphName, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    kernels = kernels_of(export_made_up(PRESETS["reduced"], graph, tmp_path), graph, "8.9")
    attentions = [number for number, kernel in enumerate(kernels) if kernel.is_attention]
    a_block = EXPECTED[graph][1]
    counted = (len(attentions), a_block, attentions[a_block] - attentions[0], len(kernels))
    assert counted == EXPECTED[graph], "\n".join(kernel.name for kernel in kernels)
