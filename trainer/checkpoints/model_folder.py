"""The model folder: `config.json`, safetensors shards a component, `vae/` in diffusers' layout, `tokenizer/`.

Written whole or not at all; read by memory-mapping; made by our own training or from the published layout.
"""

import json
import re
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from mige_rt.atomic import atomic_folder
from mige_rt.bundle import SCHEMA, TOKENIZER_FILE, check_files, is_bundle, read_config, read_manifest
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS
from trainer.checkpoints import convert_published as published
from trainer.checkpoints.convert_published import differences, distinct_tensors, our_tensor
from trainer.model.mige import Mige
from trainer.model.vae import make_vae

COMPONENTS = ("image_encoder", "text_encoder", "conditioner", "denoiser")  # with shards of their own
SHARD_BYTES = 2_000_000_000
VAE_FILE = "vae/diffusion_pytorch_model.safetensors"

Progress = Callable[[str, int, int], None]  # the component being written, bytes written so far, bytes in all


def convert(
    ckpt: Path,
    out: Path,
    vae: Path | None = None,
    tokenizer: Path | None = None,
    on_progress: Progress | None = None,
    config: ModelConfig | None = None,
) -> None:
    """Make the model folder `out` from the published layout; weights keep the dtype they are stored in (the VAE's are
    float32).

    `ckpt` is `model.pth`, or a folder that holds it; `vae` and `tokenizer` are folders, by default those beside it.
    `config` gives the sizes of a checkpoint that has none of the published ones. Memory stays near one shard's size:
    the file is memory-mapped and copied a shard at a time.

    Raises InputError, with nothing left behind, when `out` exists or cannot be written, when a part is missing or
    unreadable, or when the checkpoint's keys are not exactly the model's.
    """
    with atomic_folder(out) as folder:
        path = published.find_checkpoint(ckpt)
        places = [path.parent, ckpt] if ckpt.is_dir() else [path.parent]
        vae = vae or published.find_beside(places, published.VAE_FOLDER, ("config.json",), "--vae")
        tokenizer = tokenizer or published.find_beside(
            places, published.TOKENIZER_FOLDER, published.TOKENIZER_FILES, "--tokenizer"
        )
        words = published.read_tokenizer(tokenizer)
        state = published.read_checkpoint(path)
        config = published.check_published(state, str(path), config)
        vae_config, vae_weights = published.read_vae(vae)
        config = published.with_vae(config, vae_config, vae)
        if words.get_vocab_size() > config.text.vocabulary:
            warnings.warn(
                f"the tokenizer in {tokenizer} has {words.get_vocab_size()} pieces and the model's table has "
                f"{config.text.vocabulary} rows: prompts with the pieces behind them will fail",
                stacklevel=2,
            )
        sizes = {name: our_tensor(state, name).nbytes for name in published.our_shapes(config)}
        write_model_folder(
            folder,
            config,
            sizes,
            lambda name: our_tensor(state, name),
            vae_weights,
            words,
            f"converted from the published layout ({path.name})",
            on_progress,
        )


def save_model(model: Mige, tokenizer: Tokenizer, out: Path, dtype: torch.dtype, source: str) -> None:
    """Write a model with real weights, its VAE among them, as the model folder `out`, in `dtype`.

    `source` says where the weights came from, in words. Raises InputError when `out` exists or cannot be written.
    """
    state = model.state_dict()

    def stored(name: str) -> Tensor:
        tensor = state[name].detach()
        return tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)

    with atomic_folder(out) as folder:
        names = [name for name in distinct_tensors(model) if not name.startswith("vae_")]
        sizes = {name: state[name].numel() * dtype.itemsize for name in names}
        vae = {name.partition(".")[2]: stored(name) for name in state if name.startswith("vae_")}
        write_model_folder(folder, model.config, sizes, stored, vae, tokenizer, source, None)


def load_model(
    folder: Path,
    dtype: torch.dtype | None = torch.float32,
    device: torch.device | str = "cpu",
    only: Collection[str] | None = None,
) -> Mige:
    """The model of a model folder, or of a bundle with unquantised weights, in evaluation mode; floating-point weights
    in `dtype` (None: as they are stored) on `device`.

    Weights stored in `dtype` stay mapped from the file when `device` is the CPU. `only` names the graphs (of GRAPHS)
    to load; the others stay on the meta device, but for what a graph shares with them.

    Raises InputError when the folder is neither, a file is missing or truncated, or the names and shapes in the files
    are not exactly the model's; ValueError when `only` names no graph.
    """
    graphs = set(GRAPHS if only is None else only)
    if unknown := graphs.difference(GRAPHS):
        raise ValueError(f"no such graph: {', '.join(sorted(unknown))}; there are {', '.join(GRAPHS)}")
    model = empty_model(read_config(folder))
    state = model.state_dict()
    names = distinct_tensors(model)
    wanted = [name for name, aliases in names.items() if any(alias.partition(".")[0] in graphs for alias in aliases)]
    if is_bundle(folder):
        expected = set(wanted)
        files = _bundle_files(folder, graphs, {alias: name for name, aliases in names.items() for alias in aliases})
    else:
        components = {_component(name) for name in wanted}
        expected = {name for name in names if _component(name) in components}
        ours = {_stored_name(name): name for name in expected}
        files = [(path, ours) for component in sorted(components) for path in _files(folder, component)]
    with ExitStack() as opened:
        where: dict[str, tuple[Any, str]] = {}  # our name -> the open file with it, and its key there
        for path, ours in files:
            try:
                file = opened.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"{path} cannot be read ({error}): a whole safetensors file is expected; convert or download the "
                    "model again"
                ) from error
            for key in map(str, file.keys()):
                where[ours.get(key, key)] = file, key
        count, listed = differences(
            {name: tuple(file.get_slice(key).get_shape()) for name, (file, key) in where.items()},
            {name: tuple(state[name].shape) for name in expected},
        )
        if count:
            raise InputError(
                f"the weights in {folder} are not those of the model that it describes:\n{listed}\n"
                "Convert, export or download the model again."
            )
        fill(model, {name: _placed(where[name][0].get_tensor(where[name][1]), dtype, device) for name in wanted})
    for graph in sorted(graphs):
        _require_real(graph, getattr(model, graph))
    return model.eval()


def _bundle_files(
    folder: Path, graphs: Collection[str], canonical: Mapping[str, str]
) -> list[tuple[Path, dict[str, str]]]:
    """A bundle's files for some graphs, each with our names by its keys. Raises InputError when it is quantised."""
    manifest = read_manifest(folder)
    if manifest.precision == "int8":
        raise InputError(
            f"{folder} holds int8 weights, which only the engine onnxruntime runs: take the model that it was "
            "exported from, or a bundle of another precision"
        )
    check_files(folder, manifest)
    files = []
    for graph in sorted(graphs):
        prefix = f"{graph}."
        keys = {name.removeprefix(prefix): own for name, own in canonical.items() if name.startswith(prefix)}
        files.append((folder / manifest.graphs[graph].weights.path, keys))
    return files


def empty_model(config: ModelConfig) -> Mige:
    """The model on the meta device: names and shapes, no memory."""
    with torch.device("meta"):
        return Mige(config)


def fill(model: Mige, tensors: Mapping[str, Tensor]) -> None:
    """Put `tensors`, by the names of `distinct_tensors`, in the place of the model's own, uncopied; sharing stays."""
    state: dict[str, Tensor] = {}
    own = model.state_dict(keep_vars=True)
    for name, aliases in distinct_tensors(model).items():
        if name in tensors:
            value = tensors[name]
            # One Parameter for all names: assigned apart, they would be trained apart.
            shared = nn.Parameter(value, own[name].requires_grad) if isinstance(own[name], nn.Parameter) else value
            state |= dict.fromkeys(aliases, shared)
    model.load_state_dict(state, strict=False, assign=True)


def write_model_folder(
    folder: Path,
    config: ModelConfig,
    sizes: dict[str, int],
    tensor: Callable[[str], Tensor],
    vae: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    source: str,
    on_progress: Progress | None,
) -> None:
    """Fill an empty folder. `sizes` has the bytes of each of our weights but the VAE's; `tensor` gives one of them, so
    that few are held at once. Raises InputError when the disk is full."""
    total = sum(sizes.values()) + sum(value.nbytes for value in vae.values())
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
        tokenizer.save(str(folder / TOKENIZER_FILE))
        for component in COMPONENTS:
            shards = _shards({name: size for name, size in sizes.items() if _component(name) == component})
            for number, names in enumerate(shards, 1):
                report(component)
                path = folder / f"{component}-{number:05d}-of-{len(shards):05d}.safetensors"
                save_file({name: _alone(tensor(name)) for name in names}, path, metadata={"format": "pt"})
                report(component, sum(sizes[name] for name in names))
        report("vae")
        with torch.device("meta"):
            autoencoder = make_vae(config.vae)
        autoencoder.load_state_dict(dict(vae), assign=True)
        autoencoder.save_pretrained(folder / "vae")
        report("vae", sum(value.nbytes for value in vae.values()))
        content = {"schema": SCHEMA, "model": config.to_json(), "source": source}
        # Last, so that a folder without all its weights is no model folder under any name.
        (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
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
    """A component's files, all of them. Raises InputError that names what is missing."""
    if component == "vae":
        files = [folder / VAE_FILE]
    else:
        found = [path.name for path in sorted(folder.glob(f"{component}-*.safetensors"))]
        counts = {int(match[1]) for name in found if (match := re.search(r"-of-(\d{5})\.safetensors$", name))}
        if len(counts) > 1:
            raise InputError(
                f"{folder} holds shards of several models ({', '.join(found)}): convert or download the model again"
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


def _placed(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    return tensor.to(device, dtype) if dtype is not None and tensor.is_floating_point() else tensor.to(device)


def _require_real(graph: str, module: nn.Module) -> None:
    """A guard for whoever changes a module: a buffer outside the state dict would stay without memory."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if hollow := [name for name, tensor in tensors if tensor.is_meta]:
        raise RuntimeError(f"{graph} has tensors that no checkpoint fills: {', '.join(hollow)}")
