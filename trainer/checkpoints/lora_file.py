"""The file of a LoRA: `lora_weights.safetensors`, with its description as JSON in the metadata.

For each adapted layer LAYER, a linear layer of rank-r change alpha / r * B A:

  LAYER.lora_A.weight  [r,in]
  LAYER.lora_B.weight  [out,r]

The description has the sizes of the model that it was trained on, and the norms of the adapted layers' weights there,
by which a LoRA of another model is recognised, in whatever type the weights are stored.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from annotated_types import Ge, Gt, Le, MaxLen
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mige_rt.atomic import atomic_file
from mige_rt.config import LONGEST_TEXT, ModelConfig
from mige_rt.errors import InputError
from mige_rt.lora import Lora
from mige_rt.validation import validate

SCHEMA = 1
METADATA_KEY = "mige_lora"
NORM_TOLERANCE = 2e-3  # of the norm: what rounding to bfloat16 may change it by at most, 2**-9
MAX_RANK = 1024
LAYERS_SHOWN = 3  # in an error

Rank = Annotated[int, Gt(0), Le(MAX_RANK)]
Text = Annotated[str, MaxLen(LONGEST_TEXT)]
Factors = tuple[Tensor, Tensor]  # A [r,in] and B [out,r]


@dataclass(frozen=True)
class LoraDescription:
    """What a LoRA's file says of it.

    Attributes:
        schema: SCHEMA.
        model: The sizes and defaults of the model that it was trained on.
        rank: Of the change of each layer.
        alpha: The change is alpha / rank * B A.
        targets: The names that the layers were chosen by.
        norms: By adapted layer, the Frobenius norm of the model's weight.
        prompt: The prompt that it was trained with, where there was one for all images.
    """

    schema: int
    model: ModelConfig
    rank: Rank
    alpha: Annotated[float, Gt(0), Le(1e6)]
    targets: tuple[Text, ...]
    norms: dict[Text, Annotated[float, Ge(0)]]
    prompt: Text | None = None


@dataclass(frozen=True, eq=False)
class OpenedLora:
    """A LoRA that was read.

    Attributes:
        path: Its file.
        description: What the file says of it.
        factors: Of each adapted layer.
    """

    path: Path
    description: LoraDescription
    factors: Mapping[str, Factors]

    def change(self, layer: str) -> Tensor:
        """What a layer's weight changes by at scale 1, float32 [out,in]."""
        a, b = self.factors[layer]
        return self.description.alpha / self.description.rank * (b.float() @ a.float())

    def check_sizes(self, config: ModelConfig) -> None:
        """Check that it was trained on a model of these sizes.

        Raises:
            InputError: It was not; lists what differs.
        """
        trained, given = _sizes(self.description.model), _sizes(config)
        if differing := [name for name in given if trained.get(name) != given[name]]:
            listed = "; ".join(f"{name} is {trained.get(name)}, not {given[name]}" for name in differing)
            raise InputError(
                f"{self.path} is a LoRA of the model {self.description.model.name}, not of {config.name}: there "
                f"{listed}. Use it with the model that it was trained on"
            )

    def check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Check that it was trained on a model with these weights, as far as they are adapted.

        Args:
            weights: By name; those of all adapted layers are there.

        Raises:
            InputError: It was not.
        """
        norms = {layer: norm_of(weights[f"{layer}.weight"]) for layer in self.factors}
        differing = [
            layer
            for layer, norm in self.description.norms.items()
            if not abs(norms[layer] - norm) <= NORM_TOLERANCE * norm
        ]
        if differing:
            raise InputError(
                f"{self.path} was trained on a model with the same sizes and other weights: {len(differing)} of "
                f"{len(norms)} layers differ, such as {', '.join(differing[:LAYERS_SHOWN])}. Use it with the model "
                "that it was trained on, into which no LoRA was merged"
            )


def norm_of(weight: Tensor) -> float:
    """The Frobenius norm of a layer's weight, computed in float32."""
    return float(torch.linalg.vector_norm(weight.detach(), dtype=torch.float32))


def save_lora(path: Path, description: LoraDescription, factors: Mapping[str, Factors]) -> None:
    """Write a LoRA's file, whole or not at all.

    Raises:
        InputError: It cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    for layer, (a, b) in factors.items():
        tensors |= {f"{layer}.lora_A.weight": a.contiguous(), f"{layer}.lora_B.weight": b.contiguous()}
    metadata = {METADATA_KEY: json.dumps(asdict(description))}  # one key: safetensors writes several in any order
    try:
        with atomic_file(path) as temporary:
            mode = temporary.stat().st_mode
            save_file(tensors, temporary, metadata=metadata)
            temporary.chmod(mode)  # safetensors keeps it from other users, whatever the umask says
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} cannot be written ({error}): make room, or give another path") from error


def open_lora(lora: Lora) -> OpenedLora:
    """Read a LoRA's file, as data.

    Raises:
        InputError: It is missing or damaged, or holds something else.
    """
    path = lora.file
    if not path.is_file():
        raise InputError(f"there is no LoRA at {path}; give the file that mige-rt train-lora wrote, or its folder")
    try:
        with safe_open(path, framework="pt") as file:
            content = (file.metadata() or {}).get(METADATA_KEY)
            if content is None:
                raise InputError(
                    f"{path} does not say which model it is of: a LoRA that mige-rt train-lora wrote is expected"
                )
            tensors = {str(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118, no mapping
        description = _description(path, content)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{path} is damaged ({error}); copy or train the LoRA again") from error
    return OpenedLora(path, description, _factors(path, description, tensors))


def _description(path: Path, content: str) -> LoraDescription:
    """Raises ValueError when it is no JSON, InputError when it is not what it should be."""
    data: Any = json.loads(content)
    schema = data.get("schema") if isinstance(data, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version of mige-rt reads {SCHEMA}; train the LoRA again")
    return validate(LoraDescription, data, f"{path} is damaged")


def _factors(path: Path, description: LoraDescription, tensors: Mapping[str, Tensor]) -> dict[str, Factors]:
    layers = list(description.norms)
    expected = {f"{layer}.lora_{factor}.weight" for layer in layers for factor in "AB"}
    if differing := sorted(expected ^ tensors.keys()):
        raise InputError(
            f"{path} is damaged: {len(differing)} of its tensors are missing or unexpected, such as {differing[0]}; "
            "copy or train the LoRA again"
        )
    rank = description.rank
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or tensor.shape[0 if ".lora_A." in name else 1] != rank or not tensor.is_floating_point():
            raise InputError(f"{path} is damaged: {name} is {list(tensor.shape)}, and its rank is {rank}")
        if not tensor.isfinite().all():
            raise InputError(f"{path} has values that are not finite in {name}; train the LoRA again at a lower rate")
    return {layer: (tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"]) for layer in layers}


def _sizes(config: ModelConfig) -> dict[str, Any]:
    """All that a LoRA's use depends on, by dotted names."""
    content = config.to_json()
    sizes: dict[str, Any] = {}
    for name in content.keys() - {"name", "defaults"}:
        value = content[name]
        sizes |= {f"{name}.{key}": inner for key, inner in value.items()} if isinstance(value, dict) else {name: value}
    return dict(sorted(sizes.items()))
