"""LaMa (Suvorov et al., 2022) from its published TorchScript file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from mige_rt.errors import InputError
from trainer.pipelines.config import LamaRole

MULTIPLE = 8  # of pixels, that the network's sides have to be


def check_trusted(role: LamaRole) -> None:
    """Raises InputError where the config does not say that the file may be run."""
    if not role.trust_torchscript:
        raise InputError(
            f"{role.file} is TorchScript, a program that would run with your rights; if you trust where it comes from, "
            "say trust_torchscript: true in the config's role"
        )


class Lama:
    """See `roles.Inpainter`.

    A TorchScript file is a program, unlike the weights that everything else here reads as data: it runs only where the
    config says `trust_torchscript: true`.
    """

    def __init__(self, role: LamaRole) -> None:
        """Raises InputError where the file is not trusted, or cannot be loaded."""
        check_trusted(role)
        if not Path(role.file).is_file():
            raise InputError(f"there is no file {role.file}; download LaMa's TorchScript file, big-lama.pt")
        try:
            self._network: Any = torch.jit.load(role.file, map_location=role.device).eval()
        except RuntimeError as error:
            raise InputError(f"{role.file} is no TorchScript file: {str(error).splitlines()[0]}") from error
        self._device = role.device

    @torch.inference_mode()
    def inpaint(self, image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
        """See `roles.Inpainter`."""
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        holes = torch.from_numpy(mask)[None, None].float()
        padding = (0, -image.width % MULTIPLE, 0, -image.height % MULTIPLE)
        inputs = (F.pad(tensor, padding, mode="replicate").to(self._device) for tensor in (pixels, holes))
        filled = self._network(*inputs)[0, :, : image.height, : image.width]
        values = (filled * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        return Image.fromarray(np.where(mask[..., None], values, np.asarray(image)))
