"""The folders that `mige-rt run` opens: model folders and bundles.

A model folder has config.json, tokenizer/, vae/ and weights. A bundle, which `mige-rt export` writes, has
manifest.json, tokenizer/, onnx/ with six graphs and their weights, and engines/ with plans for a kind of machine each.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, cast

from mige_rt.config import ModelConfig, Precision
from mige_rt.errors import InputError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, resolved_axes
from mige_rt.validation import validate

DEFAULT_MODEL = Path(__file__).parent / "models" / "tiny"
SCHEMA = 2  # of config.json and manifest.json
TOKENIZER_FILE = "tokenizer/tokenizer.json"
CONFIG = "config.json"
MANIFEST = "manifest.json"
REPORT = "report.json"
ALWAYS_HASHED = 64 << 20  # bytes in a bundle up to which every opening checks the hashes: a fraction of a second


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle.

    Attributes:
        path: With forward slashes, relative to the bundle.
        bytes: Its size.
        sha256: Its SHA-256 in hex.
    """

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class GraphEntry:
    """One graph of a bundle.

    Attributes:
        onnx: The ONNX file.
        weights: The safetensors file that it points into.
        axes: By tensor the names or, where the model fixes them, the sizes of its axes, see `graphs.resolved_axes`.
        precision: By kind of layer the type that it computes in.
        parameters: How many numbers the weights hold.
    """

    onnx: FileEntry
    weights: FileEntry
    axes: dict[str, list[int | str]]
    precision: dict[str, str]
    parameters: int


@dataclass(frozen=True)
class Manifest:
    """What a bundle holds, as in its manifest.json.

    Attributes:
        schema: Of the file's form, SCHEMA.
        model: The model's sizes and defaults.
        source: Where the weights came from, in words.
        precision: What the graphs compute in.
        validated: Whether the graphs were compared with PyTorch (false: `--no-validate`).
        scheduler: The one that the model is sampled with by default.
        ranges: By axis (N, M, B, R, L, h, w, eh, ew) the sizes that the graphs were exported for.
        graphs: The six graphs.
        tokenizer: The tokenizer's file.
        versions: Of the tools that made the bundle, by name.
    """

    schema: int
    model: ModelConfig
    source: str
    precision: Precision
    validated: bool
    scheduler: str
    ranges: dict[str, AxisRange]
    graphs: dict[GraphName, GraphEntry]
    tokenizer: FileEntry
    versions: dict[str, str]

    @property
    def files(self) -> list[FileEntry]:
        """Every file of the bundle but the manifest, the report and the plans."""
        return [self.tokenizer, *(file for graph in self.graphs.values() for file in (graph.onnx, graph.weights))]

    def to_json(self) -> dict[str, Any]:
        """As plain data, for manifest.json."""
        return {**dataclasses.asdict(self), "model": self.model.to_json()}


@dataclass(frozen=True)
class OpenedModel:
    """A folder whose description was read, once for all that use it.

    Attributes:
        folder: The model folder or the bundle.
        config: The model's sizes and defaults.
        manifest: The bundle's; None for a model folder.
        source: Where the weights came from, in words.
    """

    folder: Path
    config: ModelConfig
    manifest: Manifest | None
    source: str


def open_model(folder: Path) -> OpenedModel:
    """Read what a folder says of its model, and check a bundle's files.

    Raises:
        InputError: It is neither a bundle nor a model folder, is damaged, or is of another schema.
    """
    if not is_bundle(folder):
        config, source = _read_model_folder(folder)
        return OpenedModel(folder, config, None, source)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return OpenedModel(folder, manifest.model, manifest, manifest.source)


def is_bundle(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def read_config(folder: Path) -> ModelConfig:
    """The sizes of a model folder or a bundle.

    Raises:
        InputError: It is neither, or of another schema than ours.
    """
    return read_manifest(folder).model if is_bundle(folder) else _read_model_folder(folder)[0]


def read_manifest(folder: Path) -> Manifest:
    """A bundle's manifest.

    Raises:
        InputError: It is not there, is damaged, is of another schema than ours, or names files outside the bundle.
    """
    path = folder / MANIFEST
    content = _read_json(path, f"{folder} is no bundle", "a folder that `mige-rt export` wrote is expected")
    _check_schema(path, content, "export the bundle again with: mige-rt export --ckpt CHECKPOINT --out BUNDLE")
    _read_model(path, content["model"])  # first, for the errors that speak of the model alone
    try:
        manifest = validate(Manifest, content, f"{path} is damaged")
        if missing := [graph for graph in GRAPHS if graph not in manifest.graphs]:
            raise InputError(f"{path} is damaged: the graphs {', '.join(missing)} are missing")
        if broken := [rule for rule, holds in _rules(manifest).items() if not holds]:
            raise InputError(f"{path} is damaged: what does not hold: {'; '.join(broken)}")
    except InputError as error:
        raise InputError(f"{error}; export or download the bundle again") from error
    for file in manifest.files:
        parts = PurePosixPath(file.path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file.path or ":" in file.path:
            raise InputError(f"{path} names {file.path!r}, which is outside the bundle: do not use this bundle")
    return manifest


def check_files(folder: Path, manifest: Manifest, *, everything: bool = False) -> None:
    """Compare a bundle's files with its manifest.

    Every file's size is compared, and the hash of all but the weights of a bundle of more than ALWAYS_HASHED bytes.

    Args:
        folder: The bundle.
        manifest: Its manifest.
        everything: Hash those weights, too.

    Raises:
        InputError: Names a file that is missing, truncated or changed, with both sizes and hashes.
    """
    hash_all = everything or sum(file.bytes for file in manifest.files) <= ALWAYS_HASHED
    weights = {graph.weights.path for graph in manifest.graphs.values()}
    for file in manifest.files:
        _check_file(folder, file, hashed=hash_all or file.path not in weights)


def describe(folder: Path, manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain data, and under `checks`, per graph, the validation's worst comparison from the report."""
    checks_of: dict[str, Any] = {}
    try:
        report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        for name, result in {**report["graphs"], "images": report.get("pipeline", {})}.items():
            if checks := result.get("checks"):
                worst = max(checks, key=lambda check: check["rms"] / check["limit"])
                checks_of[name] = {"number": len(checks), "rms": worst["rms"], "limit": worst["limit"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / REPORT} cannot be read ({error!r}): export or copy the bundle again") from error
    return manifest.to_json() | {"checks": checks_of}


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


def _check_file(folder: Path, file: FileEntry, *, hashed: bool) -> None:
    path = folder / file.path
    if not path.is_file():
        raise InputError(f"{path} is missing from the bundle: export or copy the bundle again")
    size = path.stat().st_size
    if (size != file.bytes or hashed) and (digest := sha256(path)) != file.sha256:
        raise InputError(
            f"{path} was changed: it has {size} bytes and the SHA-256 {digest}, the manifest says {file.bytes} bytes "
            f"and {file.sha256}; export or copy the bundle again"
        )


def _rules(manifest: Manifest) -> dict[str, bool]:
    """What must hold of a manifest beyond its fields' types, in words."""
    ranges = manifest.ranges.values()
    return {
        "every range has 1 <= min <= opt <= max": all(1 <= span.min <= span.opt <= span.max for span in ranges),
        "there is a range for each of N, M, B, R, L, h, w, eh, ew": set(manifest.ranges)
        == set("NMBRLhw") | {"eh", "ew"},
        "axes are the model's": {name: graph.axes for name, graph in manifest.graphs.items()}
        == resolved_axes(manifest.model),
    }


def _read_model_folder(folder: Path) -> tuple[ModelConfig, str]:
    """The sizes of a model folder, and where its weights came from."""
    path = folder / CONFIG
    expected = "a bundle, as `mige-rt export` writes, or a model folder, as `mige-rt convert` writes, is expected"
    content = _read_json(path, f"{folder} is no model folder", expected)
    _check_schema(path, content, "convert the checkpoint again with: mige-rt convert --ckpt CHECKPOINT --out FOLDER")
    return _read_model(path, content["model"]), str(content.get("source", ""))


def _read_json(path: Path, problem: str, expected: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{problem} ({error}): {expected}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not of a model: {expected}")
    fields = cast("dict[str, Any]", content)
    if type(fields.get("schema")) is not int or "model" not in fields:
        raise InputError(f"{path} is not of a model: {expected}")
    return fields


def _check_schema(path: Path, content: dict[str, Any], remedy: str) -> None:
    schema: int = content["schema"]
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema {schema}, this version of mige-rt reads {SCHEMA}: "
            + ("upgrade mige-rt" if schema > SCHEMA else remedy)
        )


def _read_model(path: Path, data: object) -> ModelConfig:
    try:
        return ModelConfig.from_json(data)
    except InputError as error:
        raise InputError(f"{path}: {error}; export, convert or download the model again") from error
