"""The folders that `run` opens.

A model folder has config.json, tokenizer/, vae/ and weights. A bundle, which `mige-rt export` writes, has
manifest.json, tokenizer/, onnx/ with six graphs and their weights, and engines/ with plans for a kind of machine each.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from engines.interface import GRAPHS, Precision, Range
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError

DEFAULT_MODEL = Path(__file__).parent / "models" / "tiny"
SCHEMA = 1  # of config.json and manifest.json; a reader refuses newer ones
TOKENIZER_FILE = "tokenizer/tokenizer.json"
MANIFEST = "manifest.json"
REPORT = "report.json"
ALWAYS_HASHED = 64 << 20  # bytes in a bundle up to which every opening checks the hashes: a fraction of a second


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle: its path with forward slashes, its size in bytes, its SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """One graph: the ONNX file, the weights it points into (safetensors), and what computes in what.

    axes has the sizes or the names of every input's and output's axes, as in engines.interface.GRAPHS, but those that
    the model fixes as numbers. precision: kind of layer -> type. parameters: how many numbers the weights hold.
    """

    onnx: FileEntry
    weights: FileEntry
    axes: dict[str, list[int | str]]
    precision: dict[str, str]
    parameters: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds. ranges: by axis name (N, M, eh, ...), what the graphs were exported for."""

    schema: int
    model: ModelConfig
    source: str  # where the weights came from, in words
    precision: str
    validated: bool  # false: --no-validate
    solver: str
    ranges: dict[str, Range]
    graphs: dict[str, GraphEntry]
    tokenizer: FileEntry
    versions: dict[str, str]  # of the tools that made it

    @property
    def files(self) -> list[FileEntry]:
        return [self.tokenizer, *(file for graph in self.graphs.values() for file in (graph.onnx, graph.weights))]

    def to_json(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "model": self.model.to_json()}


def is_bundle(folder: Path) -> bool:
    return (folder / MANIFEST).is_file()


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a model folder or a bundle. Raises InputError when it is neither, or of a newer schema than ours."""
    if is_bundle(folder):
        return read_manifest(folder).model
    path = folder / "config.json"
    expected = "a bundle, as `mige-rt export` writes, or a model folder, as `mige-rt convert` writes, is expected"
    content = _read_json(path, f"{folder} is no model folder", expected)
    _check_schema(path, content)
    return _model(path, content["model"])


def read_source(folder: Path) -> str:
    """Where the weights of a model folder or a bundle came from, in words. Raises InputError as `read_config` does."""
    if is_bundle(folder):
        return read_manifest(folder).source
    read_config(folder)
    return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("source", ""))


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest. Raises InputError when it is none, damaged, of a newer schema than ours, or names files
    outside the bundle."""
    path = folder / MANIFEST
    content = _read_json(path, f"{folder} is no bundle", "a folder that `mige-rt export` wrote is expected")
    _check_schema(path, content)
    model = _model(path, content["model"])
    try:
        graphs = {
            name: GraphEntry(
                FileEntry(**graph["onnx"]),
                FileEntry(**graph["weights"]),
                graph["axes"],
                graph["precision"],
                graph["parameters"],
            )
            for name, graph in content["graphs"].items()
        }
        ranges = {axis: Range(**sizes) for axis, sizes in content["ranges"].items()}
        tokenizer = FileEntry(**content["tokenizer"])
        rest = {key: content[key] for key in ("schema", "source", "precision", "validated", "solver", "versions")}
        manifest = Manifest(model=model, ranges=ranges, graphs=graphs, tokenizer=tokenizer, **rest)
        if missing := [graph for graph in GRAPHS if graph not in graphs]:
            raise ValueError(f"the graphs {', '.join(missing)} are missing")
        if wrong := [what for what, holds in _rules(manifest).items() if not holds]:
            raise ValueError(f"what does not hold: {'; '.join(wrong)}")
        for file in manifest.files:
            parts = PurePosixPath(file.path)
            if parts.is_absolute() or ".." in parts.parts or "\\" in file.path or ":" in file.path:
                raise InputError(f"{path} names {file.path!r}, which is outside the bundle: do not use this bundle")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error!r}): export the bundle again") from error
    return manifest


def check_files(folder: Path, manifest: Manifest, everything: bool = False) -> None:
    """Raises InputError that names a file which is missing, truncated or changed, with both sizes and hashes.

    Every file's size is compared, and the hash of all but the weights of a bundle of more than ALWAYS_HASHED bytes,
    which are hashed if `everything` is asked for.
    """
    hashed = everything or sum(file.bytes for file in manifest.files) <= ALWAYS_HASHED
    weights = {graph.weights.path for graph in manifest.graphs.values()}
    for file in manifest.files:
        check_file(folder, file, hashed or file.path not in weights)


def check_file(folder: Path, file: FileEntry, hashed: bool = True) -> None:
    """Raises InputError when a bundle's file is not what its manifest says."""
    path = folder / file.path
    if not path.is_file():
        raise InputError(f"{path} is missing from the bundle: export or copy the bundle again")
    size = path.stat().st_size
    if (size != file.bytes or hashed) and (found := sha256(path)) != file.sha256:
        raise InputError(
            f"{path} was changed: it has {size} bytes and the SHA-256 {found}, the manifest says {file.bytes} bytes "
            f"and {file.sha256}; export or copy the bundle again"
        )


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, and under `checks`, per graph, the validation's worst comparison from the report."""
    content = manifest.to_json() | {"checks": {}}
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        for name, result in {**report["graphs"], "pictures": report.get("pipeline", {})}.items():
            if checks := result.get("checks"):
                worst = max(checks, key=lambda check: check["rms"] / check["limit"])
                content["checks"][name] = {"number": len(checks), "rms": worst["rms"], "limit": worst["limit"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / REPORT} cannot be read ({error!r}): export or copy the bundle again") from error
    return content


def file_entry(folder: Path, path: str) -> FileEntry:
    """The entry of the file folder/path as it is now."""
    return FileEntry(path, (folder / path).stat().st_size, sha256(folder / path))


def sha256(path: Path) -> str:
    """A file's SHA-256 in hex. Raises InputError when it cannot be read."""
    try:
        with path.open("rb", buffering=0) as file:
            digest = hashlib.file_digest(file, "sha256")  # pyright: ignore[reportArgumentType]
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    return digest.hexdigest()


def resolved_axes(config: ModelConfig) -> dict[str, dict[str, list[int | str]]]:
    """Per graph and port the axes of GRAPHS, with numbers where this model fixes them."""
    grid = config.dit.trained_grid * config.dit.patch
    fixed: Mapping[str, int] = {
        "2": 2,
        "3": 3,
        "c": config.vae.channels,
        "depth": config.dit.depth,
        "heads": config.dit.heads,
        "head_dim": config.dit.width // config.dit.heads,
        "p": config.vision.side,
        "Q": config.qformer.queries,
        "D": config.text.width,
        "rh": grid,
        "rw": grid,
    }
    factor = config.vae.factor
    return {
        name: {
            port.name: [fixed.get(axis, axis.replace("f*", f"{factor}*")) for axis in port.axes]
            for port in (*graph.inputs, *graph.outputs)
        }
        for name, graph in GRAPHS.items()
    }


def _rules(manifest: Manifest) -> dict[str, bool]:
    """What must hold of a manifest, in words."""
    strings = {"precision": str, "solver": str, "source": str}
    return {
        **{f"{name} is a text": isinstance(getattr(manifest, name), kind) for name, kind in strings.items()},
        "validated is true or false": isinstance(manifest.validated, bool),
        "precision is known": manifest.precision in get_args(Precision),
        "every range has 1 <= smallest <= usual <= largest": all(
            all(type(size) is int for size in vars(span).values()) and 1 <= span.smallest <= span.usual <= span.largest
            for span in manifest.ranges.values()
        ),
        "there is a range for each of N, M, B, R, L, h, w, eh, ew": set(manifest.ranges)
        == set("NMBRLhw") | {"eh", "ew"},
        "files have a path, bytes and a SHA-256": all(
            type(file.path) is str and type(file.bytes) is int and type(file.sha256) is str for file in manifest.files
        ),
        "axes are the model's": {name: graph.axes for name, graph in manifest.graphs.items()}
        == resolved_axes(manifest.model),
        "parameters are counted": all(type(graph.parameters) is int for graph in manifest.graphs.values()),
        "precision tables and versions are texts by name": all(
            isinstance(table, dict) and all(isinstance(value, str) for value in table.values())
            for table in (manifest.versions, *(graph.precision for graph in manifest.graphs.values()))
        ),
    }


def _read_json(path: Path, what: str, expected: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{what} ({error}): {expected}") from error
    if not isinstance(content, dict) or type(content.get("schema")) is not int or "model" not in content:
        raise InputError(f"{path} is not of a model: {expected}")
    return content


def _check_schema(path: Path, content: dict[str, Any]) -> None:
    if content["schema"] > SCHEMA:
        raise InputError(
            f"{path} has schema {content['schema']}, this version of mige-rt reads {SCHEMA}: upgrade mige-rt"
        )


def _model(path: Path, data: Any) -> ModelConfig:
    try:
        return ModelConfig.from_json(data)
    except InputError as error:
        raise InputError(f"{path}: {error}; export, convert or download the model again") from error
