"""A checkpoint with LoRAs merged into its weights, for the engine pytorch and for export alike."""

from collections.abc import Collection, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, GraphName
from mige_rt.lora import Lora
from trainer.checkpoints.lora_file import OpenedLora, open_lora
from trainer.checkpoints.weights import Checkpoint, distinct_tensors
from trainer.model.mige import Mige


class MergedCheckpoint(Checkpoint):
    """Another checkpoint, whose adapted layers are W + scale * alpha / rank * B A, summed over the LoRAs.

    Those layers are float32, in memory; all other weights, and those that only LoRAs of scale 0 adapt, are the other
    checkpoint's own.

    Attributes:
        adapted: The graphs that have adapted layers.
    """

    def __init__(self, base: Checkpoint, loras: Sequence[Lora]) -> None:
        """Read the LoRAs, and check that they were trained on this checkpoint.

        Args:
            base: The checkpoint.
            loras: In any order.

        Raises:
            InputError: A LoRA's file cannot be used, or is of another model.
        """
        self._base = base
        self._loras = [(open_lora(lora), lora.scale) for lora in loras]
        self.config, self.source = base.config, base.source
        model = base.empty()
        for opened, _ in self._loras:
            opened.check_sizes(base.config)
            _check_shapes(opened, model)
        layers = {layer for opened, _ in self._loras for layer in opened.factors}
        self.adapted: frozenset[GraphName] = frozenset(name for name in GRAPHS if _has_layers(name, layers))
        weights = base.tensors(model, self.adapted)
        for opened, _ in self._loras:
            opened.check_weights(weights)

    @property
    def files(self) -> Sequence[Path]:
        """The other checkpoint's."""
        return self._base.files

    @property
    def stored_bytes(self) -> int:
        """The other checkpoint's."""
        return self._base.stored_bytes

    def save_tokenizer(self, path: Path) -> None:
        """See `Checkpoint.save_tokenizer`."""
        self._base.save_tokenizer(path)

    def tensors(self, model: Mige, graphs: Collection[GraphName]) -> dict[str, Tensor]:
        """The weights of some graphs, merged; see `Checkpoint.tensors`."""
        tensors = self._base.tensors(model, graphs)
        for opened, scale in self._loras:
            for layer in opened.factors:
                name = f"{layer}.weight"
                if scale and name in tensors:
                    tensors[name] = torch.add(tensors[name].float(), opened.change(layer), alpha=scale)
        return tensors

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._base.close()


def _has_layers(graph: GraphName, layers: Collection[str]) -> bool:
    return any(layer.startswith(f"{graph}.") for layer in layers)


def _check_shapes(lora: OpenedLora, model: Mige) -> None:
    """Raises InputError when a layer of a LoRA is none of the model's."""
    state = model.state_dict()
    weights = {name: state[name] for name in distinct_tensors(model)}
    for layer, (a, b) in lora.factors.items():
        weight = weights.get(f"{layer}.weight")
        if weight is None or tuple(weight.shape) != (b.shape[0], a.shape[1]):
            raise InputError(f"{lora.path} adapts {layer}, [{b.shape[0]}, {a.shape[1]}], which the model does not have")
