"""The model folder: `config.json`, safetensors shards a component, `vae/` in diffusers' layout, `tokenizer/`.

Written whole or not at all; read by memory-mapping; made by our own training or from the published layout. A bundle's
weights are read in the same way.
"""

import json
import re
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from mige_rt.atomic import atomic_folder
from mige_rt.bundle import (
    SCHEMA,
    TOKENIZER_FILE,
    Manifest,
    OpenedModel,
    open_model,
)
from mige_rt.config import QUANTISED, ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GraphName
from mige_rt.tokenizer import save_tokenizer
from trainer.checkpoints.weights import Checkpoint, differences, distinct_tensors, names_in
from trainer.model.mige import Mige
from trainer.model.vae import make_vae

COMPONENTS = ("image_encoder", "text_encoder", "conditioner", "denoiser")  # with shards of their own
SHARD_BYTES = 2_000_000_000
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"

OnProgress = Callable[[str, int, int], None]  # the component being written, bytes written so far, bytes in all


class SafetensorsCheckpoint(Checkpoint):
    """A model folder or a bundle, opened.

    A file is opened when the first of its weights is asked for, and stays open until `close`.
    """

    def __init__(self, model: OpenedModel) -> None:
        """Read the weights of a folder that was opened.

        Raises:
            InputError: its weights are quantised.
        """
        self._folder, self._manifest = model.folder, model.manifest
        self._open_files: dict[Path, safe_open] = {}
        if self._manifest is not None and (precision := self._manifest.precision) in QUANTISED:
            raise InputError(
                f"{self._folder} holds {precision} weights, which PyTorch does not read: take the model that it was "
                "exported from, or a bundle of another precision"
            )
        self.config, self.source = model.config, model.source

    @property
    def files(self) -> Sequence[Path]:
        """The safetensors files; InputError names those that are missing."""
        if self._manifest is not None:
            return [self._folder / graph.weights.path for graph in self._manifest.graphs.values()]
        return [path for component in (*COMPONENTS, "vae") for path in _files(self._folder, component)]

    @property
    def stored_bytes(self) -> int:
        """The size of the safetensors files, in bytes."""
        return sum(path.stat().st_size for path in self.files)

    def save_tokenizer(self, path: Path) -> None:
        """Copy T5's tokenizer to the file `path`."""
        shutil.copyfile(self._folder / TOKENIZER_FILE, path)

    def tensors(self, model: Mige, graphs: Collection[GraphName]) -> dict[str, Tensor]:
        """The weights of some graphs, mapped from their files; see `Checkpoint.tensors`.

        A model folder's components and a bundle's graphs are checked whole: each name and shape must be the model's.

        Raises:
            InputError: a file is missing or truncated, or holds other names and shapes than the model's.
        """
        state = model.state_dict()
        names = distinct_tensors(model)
        wanted = names_in(model, graphs)
        if self._manifest is not None:
            expected = set(wanted)
            first_names = {alias: name for name, aliases in names.items() for alias in aliases}
            files = _bundle_files(self._folder, self._manifest, graphs, first_names)
        else:
            components = {_component(name) for name in wanted}
            expected = {name for name in names if _component(name) in components}
            by_key = {_stored_name(name): name for name in expected}
            files = [(path, by_key) for component in sorted(components) for path in _files(self._folder, component)]
        places: dict[str, tuple[safe_open, str]] = {}  # our name -> the open file with it, and its key there
        for path, by_key in files:
            file = self._open(path)
            for key in map(str, file.keys()):
                places[by_key.get(key, key)] = file, key
        count, listed = differences(
            {name: tuple(file.get_slice(key).get_shape()) for name, (file, key) in places.items()},
            {name: tuple(state[name].shape) for name in expected},
        )
        if count:
            raise InputError(
                f"the weights in {self._folder} are not those of the model that it describes:\n{listed}\n"
                "Convert, export or download the model again."
            )
        return {name: file.get_tensor(key) for name, (file, key) in places.items() if name in wanted}

    def close(self) -> None:
        """See `Checkpoint.close`."""
        self._open_files.clear()

    def _open(self, path: Path) -> safe_open:
        if path not in self._open_files:
            try:
                self._open_files[path] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path} cannot be read: a whole safetensors file is expected; convert or download the model again"
                ) from error
        return self._open_files[path]


def load_model(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    only: Collection[GraphName] | None = None,
) -> Mige:
    """The model of a model folder, or of a bundle with unquantised weights, in evaluation mode.

    Args:
        folder: the model folder or the bundle.
        dtype: of floating-point weights; None: as they are stored. Weights that are stored so stay mapped from the
            file when `device` is the CPU.
        device: where the weights are put.
        only: the graphs to load; the others stay on the meta device, but for what a graph shares with them.

    Raises:
        InputError: the folder is neither, a file is missing or truncated, or the names and shapes in the files are not
            exactly the model's.
        ValueError: `only` names no graph.
    """
    return SafetensorsCheckpoint(open_model(folder)).load(only, dtype=dtype, device=device)


def save_model(model: Mige, tokenizer: Tokenizer, out: Path, dtype: torch.dtype, source: str) -> None:
    """Write a model as a model folder.

    Args:
        model: has real weights, the VAE's among them.
        tokenizer: T5's.
        out: the folder to make.
        dtype: of floating-point weights in the files.
        source: where the weights came from, in words.

    Raises:
        InputError: `out` exists or cannot be written.
    """
    state = model.state_dict()

    def stored(name: str) -> Tensor:
        tensor = state[name].detach()
        return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)

    with atomic_folder(out) as folder:
        names = [name for name in distinct_tensors(model) if not name.startswith("vae_")]
        content = ModelContent(
            config=model.config,
            source=source,
            tokenizer=tokenizer,
            sizes={name: state[name].numel() * dtype.itemsize for name in names},
            tensor=stored,
            vae={name.partition(".")[2]: stored(name) for name in state if name.startswith("vae_")},
        )
        write_model_folder(folder, content)


def _bundle_files(
    folder: Path, manifest: Manifest, graphs: Collection[GraphName], first_names: Mapping[str, str]
) -> list[tuple[Path, dict[str, str]]]:
    """A bundle's files for some graphs, each with our names by its keys."""
    files: list[tuple[Path, dict[str, str]]] = []
    for graph in sorted(graphs):
        prefix = f"{graph}."
        keys = {name.removeprefix(prefix): first for name, first in first_names.items() if name.startswith(prefix)}
        files.append((folder / manifest.graphs[graph].weights.path, keys))
    return files


@dataclass(frozen=True, eq=False)
class ModelContent:
    """What a model folder is made of.

    Attributes:
        config: the model's sizes.
        source: where the weights came from, in words.
        tokenizer: T5's.
        sizes: the bytes of each of our weights but the VAE's.
        tensor: gives one of them, so that few are held at once.
        vae: the VAE's weights by diffusers' names.
    """

    config: ModelConfig
    source: str
    tokenizer: Tokenizer
    sizes: Mapping[str, int]
    tensor: Callable[[str], Tensor]
    vae: Mapping[str, Tensor]


def write_model_folder(folder: Path, content: ModelContent, on_progress: OnProgress | None = None) -> None:
    """Fill an empty folder.

    Args:
        folder: the folder.
        content: what is written.
        on_progress: gets the component that is being written, the bytes written so far, and the bytes in all.

    Raises:
        InputError: the disk is full.
    """
    sizes, vae_bytes = content.sizes, sum(value.nbytes for value in content.vae.values())
    total = sum(sizes.values()) + vae_bytes
    done = 0

    def report(component: str, written: int = 0) -> None:
        nonlocal done
        done += written
        if on_progress:
            on_progress(component, done, total)

    free = shutil.disk_usage(folder).free
    if free < total:
        raise InputError(
            f"{folder.parent} has {free / 1e9:.1f} GB free and the model needs {total / 1e9:.1f} GB: make room, or "
            "give a path on another disk"
        )
    try:
        (folder / TOKENIZER_FILE).parent.mkdir()
        save_tokenizer(content.tokenizer, folder / TOKENIZER_FILE)
        for component in COMPONENTS:
            shards = _shards({name: size for name, size in sizes.items() if _component(name) == component})
            for number, names in enumerate(shards, 1):
                report(component)
                path = folder / f"{component}-{number:05d}-of-{len(shards):05d}.safetensors"
                save_file({name: _alone(content.tensor(name)) for name in names}, path, metadata={"format": "pt"})
                report(component, sum(sizes[name] for name in names))
        report("vae")
        with torch.device("meta"):
            autoencoder = make_vae(content.config.vae)
        autoencoder.load_state_dict(dict(content.vae), assign=True)
        autoencoder.save_pretrained(folder / "vae")
        report("vae", vae_bytes)
        description = {"schema": SCHEMA, "model": content.config.to_json(), "source": content.source}
        # Last, so that a folder without all its weights is no model folder under any name.
        (folder / "config.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
        for path in folder.rglob("*.safetensors"):  # safetensors keeps them from other users, whatever the umask says
            path.chmod((folder / "config.json").stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise InputError(f"the model could not be written to {folder.parent} ({error})") from error


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in their order, in groups of at most SHARD_BYTES (more only if a single weight is larger)."""
    shards: list[list[str]] = [[]]
    room = SHARD_BYTES
    for name, size in sizes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def _files(folder: Path, component: str) -> list[Path]:
    """A component's files, all of them. Raises InputError that names those that are missing."""
    if component == "vae":
        files = [folder / VAE_FILE]
    else:
        names = [path.name for path in sorted(folder.glob(f"{component}-*.safetensors"))]
        counts = {int(match[1]) for name in names if (match := re.search(r"-of-(\d{5})\.safetensors$", name))}
        if len(counts) > 1:
            raise InputError(
                f"{folder} holds shards of several models ({', '.join(names)}): convert or download the model again"
            )
        count = next(iter(counts), 1)
        files = [folder / f"{component}-{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)]
    if missing := [str(path.relative_to(folder)) for path in files if not path.is_file()]:
        raise InputError(f"{folder} lacks {', '.join(missing)}: convert or download the model again")
    return files


def _component(name: str) -> str:
    graph = name.partition(".")[0]
    return "vae" if graph.startswith("vae_") else graph


def _stored_name(name: str) -> str:
    """The key in the component's files: our own name, but diffusers' in the VAE's."""
    return name.partition(".")[2] if name.startswith("vae_") else name


def _alone(tensor: Tensor) -> Tensor:
    """Contiguous, and not a part of a larger storage, as safetensors wants it."""
    tensor = tensor.contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
