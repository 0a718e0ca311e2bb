"""The folders that `mige-rt run` opens: model folders and bundles.

A model folder has config.json, tokenizer/, vae/ and weights. A bundle, which `mige-rt export` writes, has
manifest.json, tokenizer/, onnx/ with six graphs and their weights, and engines/ with plans for a kind of machine each.
"""

import dataclasses
import errno
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, cast

from annotated_types import Ge, Gt, Le, MaxLen

from mige_rt.config import LONGEST_TEXT, ModelConfig, Precision, SchedulerName
from mige_rt.errors import InputError, reason
from mige_rt.graphs import GRAPHS, AxisRange, GraphName, resolved_axes
from mige_rt.known_files import is_known, sha256
from mige_rt.validation import validate

DEFAULT_MODEL = Path(__file__).parent / "models" / "tiny"
SCHEMA = 2  # of config.json and manifest.json
TOKENIZER_FILE = "tokenizer/tokenizer.json"
CONFIG = "config.json"
MANIFEST = "manifest.json"
REPORT = "report.json"
SIGNATURE = "manifest.sig"  # the manifest's signature in base64, see `mige_rt.signing`
ALWAYS_HASHED = 64 << 20  # bytes in a bundle up to which every opening checks the hashes: a fraction of a second
MOST_IMAGES = 63  # at once, and that prompts refer to: diffusers' VAE branches at 64
LARGEST_LATENT = 4096  # side of an image's latents
LARGEST_JSON = 16 << 20  # bytes of a description; the default model's have a few thousand

Text = Annotated[str, MaxLen(LONGEST_TEXT)]
Bytes = Annotated[int, Gt(0), Le(2**42)]  # of a file; 4 TiB


@dataclass(frozen=True)
class FileEntry:
    """A file of a bundle.

    Attributes:
        path: With forward slashes, relative to the bundle.
        bytes: Its size.
        sha256: Its SHA-256 in hex.
    """

    path: Text
    bytes: Bytes
    sha256: Text


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
    precision: Annotated[dict[Text, Text], MaxLen(32)]
    parameters: Annotated[int, Ge(0), Le(2**42)]


@dataclass(frozen=True)
class MergedLora:
    """A LoRA that was merged into a bundle's weights.

    Attributes:
        name: Of its file, or of the folder that held it.
        sha256: The file's SHA-256 in hex.
        scale: What its change of the weights was multiplied by.
    """

    name: Text
    sha256: Text
    scale: float


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
        loras: What was merged into the weights before they were exported, if anything.
    """

    schema: int
    model: ModelConfig
    source: Text
    precision: Precision
    validated: bool
    scheduler: SchedulerName
    ranges: dict[str, AxisRange]
    graphs: dict[GraphName, GraphEntry]
    tokenizer: FileEntry
    versions: Annotated[dict[Text, Text], MaxLen(32)]
    loras: Annotated[tuple[MergedLora, ...], MaxLen(32)] | None = None

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
        known: It is a bundle that came with mige-rt, or was exported or tried on this machine.
    """

    folder: Path
    config: ModelConfig
    manifest: Manifest | None
    source: str
    known: bool

    def weights_bytes(self, *, largest: bool = False) -> int:
        """The size of the files with weights; largest: of the largest one alone."""
        if self.manifest is not None:
            sizes = [graph.weights.bytes for graph in self.manifest.graphs.values()]
        else:
            sizes = [path.stat().st_size for path in self.folder.rglob("*.safetensors")]
        return max(sizes, default=0) if largest else sum(sizes)


def open_model(folder: Path) -> OpenedModel:
    """Read what a folder says of its model, and check a bundle's files.

    Raises:
        InputError: It is neither a bundle nor a model folder, is damaged, or is of another schema.
    """
    if not is_bundle(folder):
        config, source = _read_model_folder(folder)
        return OpenedModel(folder, config, None, source, known=False)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    return OpenedModel(folder, manifest.model, manifest, manifest.source, known=is_known_bundle(folder))


def is_bundle(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def is_known_bundle(folder: Path) -> bool:
    """Whether a bundle came with mige-rt, or was exported or tried here, and has the same manifest still."""
    return folder == DEFAULT_MODEL or (is_bundle(folder) and is_known(folder / MANIFEST))


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
        _check_paths(path, manifest)
        if broken := [rule for rule, holds in _rules(manifest).items() if not holds]:
            raise InputError(f"{path} is damaged: what does not hold: {'; '.join(broken)}")
    except InputError as error:
        raise InputError(f"{error}; export or download the bundle again") from error
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
        report = load_json(folder / REPORT)
        for name, result in {**report["graphs"], "images": report.get("pipeline", {})}.items():
            if checks := result.get("checks"):
                worst = max(checks, key=lambda check: check["rms"] / check["limit"])
                checks_of[name] = {"number": len(checks), "rms": worst["rms"], "limit": worst["limit"]}
    except (OSError, ValueError, ArithmeticError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{folder / REPORT} cannot be read ({error!r}): export or copy the bundle again") from error
    return manifest.to_json() | {"checks": checks_of}


def onnx_path(graph: GraphName) -> str:
    """Where a bundle has a graph's ONNX file."""
    return f"onnx/{graph}.onnx"


def weights_path(graph: GraphName) -> str:
    """Where a bundle has a graph's weights."""
    return f"onnx/{graph}.safetensors"


def file_entry(folder: Path, path: str) -> FileEntry:
    """The entry of the file folder/path as it is now."""
    return FileEntry(path, (folder / path).stat().st_size, sha256(folder / path))


def _check_file(folder: Path, file: FileEntry, *, hashed: bool) -> None:
    path = folder / file.path
    if not path.is_file():
        raise InputError(f"{path} is missing from the bundle: export or copy the bundle again")
    size = path.stat().st_size
    if size == file.bytes and not hashed:
        return
    if size != file.bytes or sha256(path) != file.sha256:
        raise InputError(
            f"{path} was changed: it has {size} bytes and the SHA-256 {sha256(path)}, the manifest says {file.bytes} "
            f"bytes and {file.sha256}; export or copy the bundle again"
        )


def all_printable(texts: Iterable[str]) -> bool:
    """Whether texts hold nothing that moves a terminal's cursor, ends a line or cannot be written."""
    return all(text.isprintable() for text in texts)


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 as `sha256` writes it."""
    return re.fullmatch("[0-9a-f]{64}", text) is not None


def _check_paths(path: Path, manifest: Manifest) -> None:
    """Raises InputError when a file is not where the exporter writes it, which could be outside of the bundle."""
    expected = [
        TOKENIZER_FILE,
        *(name for graph in manifest.graphs for name in (onnx_path(graph), weights_path(graph))),
    ]
    for file, name in zip(manifest.files, expected, strict=True):
        parts = PurePosixPath(file.path)
        if parts.is_absolute() or ".." in parts.parts or "\\" in file.path or ":" in file.path:
            raise InputError(f"{path} names {file.path!r}, which is outside the bundle: do not use this bundle")
        if file.path != name:
            raise InputError(f"{path} names {file.path!r} where {name} is expected")


def _rules(manifest: Manifest) -> dict[str, bool]:
    """What must hold of a manifest beyond its fields' types, in words."""
    loras = manifest.loras or ()
    ranges = manifest.ranges.values()
    precisions = [graph.precision for graph in manifest.graphs.values()]
    largest = {"N": MOST_IMAGES, "M": MOST_IMAGES, "B": MOST_IMAGES, "R": 3 * MOST_IMAGES}
    largest |= {"L": manifest.model.max_tokens} | dict.fromkeys(("h", "w", "eh", "ew"), LARGEST_LATENT)
    return {
        "every range has 1 <= min <= opt <= max": all(1 <= span.min <= span.opt <= span.max for span in ranges),
        "there is a range for each of N, M, B, R, L, h, w, eh, ew": set(manifest.ranges)
        == set("NMBRLhw") | {"eh", "ew"},
        "no range goes beyond " + ", ".join(f"{axis} {most}" for axis, most in largest.items()): all(
            span.max <= largest.get(axis, span.max) for axis, span in manifest.ranges.items()
        ),
        "eh and ew hold the trained size": all(
            manifest.ranges[axis].min <= manifest.model.size // manifest.model.vae.factor <= manifest.ranges[axis].max
            for axis in ("eh", "ew")
            if axis in manifest.ranges
        ),
        "hashes are SHA-256 in hex": all(is_sha256(file.sha256) for file in (*manifest.files, *loras)),
        "texts are printable": all_printable(
            (
                manifest.source,
                *(lora.name for lora in loras),
                *(text for part in (manifest.versions, *precisions) for pair in part.items() for text in pair),
            )
        ),
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


def load_json(path: Path, largest: int = LARGEST_JSON) -> Any:
    """A file's JSON.

    Raises:
        OSError: It cannot be read.
        ValueError: It has more bytes than `largest`, or is no JSON.
    """
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"it has {size} bytes, at most {largest} are expected")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _read_json(path: Path, problem: str, expected: str) -> dict[str, Any]:
    try:
        content = load_json(path)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.EIO:
            raise InputError(
                f"{path} cannot be read ({reason(error)}); check the disk, or copy it elsewhere"
            ) from error
        raise InputError(f"{problem} ({error}): {expected}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not of a model: {expected}")
    fields = cast("dict[str, Any]", content)
    if type(fields.get("schema")) is not int or "model" not in fields:
        raise InputError(f"{path} is not of a model: {expected}")
    return fields


def _check_schema(path: Path, content: dict[str, Any], remedy: str) -> None:
    schema: int = content["schema"]  # which `_read_json` has looked at
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
