"""The plans that `mige-rt build` adds to a bundle, what each was built for, and why one does not fit a machine.

A bundle's engines/<fingerprint>/ holds a plan a graph and plans.json. Nothing here imports a runtime or PyTorch.
"""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from engines.interface import GRAPHS, Range
from mige_rt.bundle import ALWAYS_HASHED, FileEntry, Manifest, sha256
from mige_rt.errors import InputError, NotAvailableError

PlanEngine = Literal["tensorrt", "tensorrt-rtx"]
PLAN_ENGINES: tuple[PlanEngine, ...] = get_args(PlanEngine)
PRODUCTS: dict[PlanEngine, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
SCHEMA = 1
SIDECAR = "plans.json"


class NoPlanError(NotAvailableError):
    """A bundle has no plan that fits the machine; the message says why, and the command that builds one."""

    def __init__(self, message: str, machine: "Machine") -> None:
        super().__init__(message)
        self.machine = machine


@dataclass(frozen=True)
class Target:
    """What plans are for: a runtime's exact version, and the GPUs.

    TensorRT's plans are for GPUs of one name; those of TensorRT for RTX for any of their compute capabilities ("8.9"),
    and gpu is None.
    """

    engine: PlanEngine
    version: str
    gpu: str | None
    capabilities: tuple[str, ...]


@dataclass(frozen=True)
class Machine:
    """What plans are to run on: the GPU's name and compute capability, and the version of the runtime."""

    engine: PlanEngine
    version: str
    gpu: str
    capability: str

    def __str__(self) -> str:
        return f"{self.gpu}, compute capability {self.capability}, {PRODUCTS[self.engine]} {self.version}"


@dataclass(frozen=True)
class PlanEntry:
    """One graph's plan, the SHA-256 of the ONNX file and the weights it was built from, and what building it took."""

    plan: FileEntry
    onnx: str
    weights: str
    seconds: float
    peak_bytes: int | None  # of the building process's memory, not the GPU's; None where the system does not tell


@dataclass(frozen=True)
class Plans:
    """A folder of plans. options: the builder's, by name; ranges and precision: the bundle's as they were built."""

    folder: Path
    target: Target
    precision: str
    ranges: Mapping[str, Range]
    options: Mapping[str, Any]
    graphs: Mapping[str, PlanEntry]

    @property
    def fingerprint(self) -> str:
        return fingerprint(self.target, self.precision, self.ranges, self.options)

    def to_json(self) -> dict[str, Any]:
        """What the sidecar holds: everything but where the folder is."""
        content = dataclasses.asdict(self)
        del content["folder"]
        return {"schema": SCHEMA, **content}


def fingerprint(target: Target, precision: str, ranges: Mapping[str, Range], options: Mapping[str, Any]) -> str:
    """The name of the folder that holds plans for this target, of this precision, ranges and options."""
    told = [dataclasses.asdict(target), precision, {axis: vars(span) for axis, span in ranges.items()}, dict(options)]
    return f"{target.engine}-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]}"


def plans(bundle: Path) -> list[Plans]:
    """All finished plans in a bundle, by folder name. Raises InputError when a sidecar is damaged or was moved."""
    return [_read(path.parent) for path in sorted((bundle / "engines").glob(f"*/{SIDECAR}")) if _finished(path.parent)]


def misfit(found: Plans, manifest: Manifest, machine: Machine) -> str | None:
    """Why these plans must not be used for this bundle on this machine; None if they may."""
    target, product = found.target, PRODUCTS[found.target.engine]
    if target.engine != machine.engine:
        return f"they are {product}'s"
    if target.version != machine.version:
        return f"they were built with {product} {target.version}, and {machine.version} is installed"
    if machine.capability not in target.capabilities:
        built_for = " ".join(target.capabilities)
        return f"they were built for compute capability {built_for}, and this GPU has {machine.capability}"
    if target.gpu is not None and target.gpu != machine.gpu:
        return f"they were built for {target.gpu}, and this GPU is {machine.gpu}"
    return stale(found, manifest)


def stale(found: Plans, manifest: Manifest) -> str | None:
    """Why these plans are not of the bundle's graphs as they are now; None if they are."""
    for graph, entry in manifest.graphs.items():
        built = found.graphs.get(graph)
        if built is None or (built.onnx, built.weights) != (entry.onnx.sha256, entry.weights.sha256):
            return f"they were built from another {graph} than the bundle has now"
    if found.precision != manifest.precision or dict(found.ranges) != dict(manifest.ranges):
        return "they were built for another precision, or other ranges, than the bundle has now"
    return None


def describe(bundle: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """A bundle's plans as plain data, and under `misfit` why they are not to be used here (None: they fit).

    Raises InputError as `plans` does.
    """
    told = []
    for found in plans(bundle):
        reason = stale(found, manifest)
        if reason is None:
            from engines.trt_runtime import find_machine  # imports torch, which takes seconds

            try:
                reason = misfit(found, manifest, find_machine(found.target.engine, "auto"))
            except NotAvailableError as error:
                reason = str(error)
        size = sum(entry.plan.bytes for entry in found.graphs.values())
        told.append({"name": found.folder.name, **dataclasses.asdict(found.target), "bytes": size, "misfit": reason})
    return told


def build_command(bundle: Path, engine: PlanEngine) -> str:
    return shlex.join(["mige-rt", "build", "--bundle", str(bundle), "--engine", engine])


def find(bundle: Path, manifest: Manifest, machine: Machine) -> Plans:
    """The plans that fit this machine, the most narrowly built first, their files checked.

    Raises NoPlanError when none fits, InputError when the fitting plans' files are not those that were built.
    """
    tried = [(found, misfit(found, manifest, machine)) for found in plans(bundle)]
    fitting = sorted((found for found, reason in tried if reason is None), key=_breadth)
    if not fitting:
        why = "".join(f"; {found.folder.name}: {reason}" for found, reason in tried)
        raise NoPlanError(
            f"{bundle} has no plan for this machine ({machine}){why}. Build it with: "
            f"{build_command(bundle, machine.engine)}, or let run do it: --build",
            machine,
        )
    check_plans(bundle, fitting[0])
    return fitting[0]


def check_plans(bundle: Path, found: Plans, everything: bool = False) -> None:
    """Raises InputError that names a plan which is missing, truncated or changed; hashes are compared as by
    `bundle.check_files`."""
    again = f"build it again with: {build_command(bundle, found.target.engine)}"
    files = [entry.plan for entry in found.graphs.values()]
    hashed = everything or sum(file.bytes for file in files) <= ALWAYS_HASHED
    for file in files:
        path = found.folder / file.path
        if not path.is_file():
            raise InputError(f"the plan {path} is missing; {again}")
        if (size := path.stat().st_size) != file.bytes:
            raise InputError(f"the plan {path} has {size} bytes instead of {file.bytes}; {again}")
        if hashed and (digest := sha256(path)) != file.sha256:
            raise InputError(f"the plan {path} was changed: its SHA-256 is {digest} instead of {file.sha256}; {again}")


def _breadth(found: Plans) -> int:
    return len(found.target.capabilities)


def _finished(folder: Path) -> bool:
    """A folder that is being written, or that a killed build left, has a suffix to its name."""
    return "." not in folder.name


def _read(folder: Path) -> Plans:
    path = folder / SIDECAR
    mend = f"remove {folder}, and build again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        schema = content["schema"]
        if isinstance(schema, int) and schema > SCHEMA:
            raise InputError(f"{path} has schema {schema}, this version of mige-rt reads {SCHEMA}: {mend}")
        target = content["target"]
        found = Plans(
            folder,
            Target(target["engine"], target["version"], target["gpu"], tuple(target["capabilities"])),
            content["precision"],
            {axis: Range(**span) for axis, span in content["ranges"].items()},
            content["options"],
            {
                graph: PlanEntry(**{**entry, "plan": FileEntry(**entry["plan"])})
                for graph, entry in content["graphs"].items()
            },
        )
        if missing := set(GRAPHS) - set(found.graphs):
            raise ValueError(f"the graphs {', '.join(sorted(missing))} are missing")
        for graph, entry in found.graphs.items():
            if entry.plan.path != f"{graph}.plan":
                raise ValueError(f"the plan of {graph} is said to be {entry.plan.path!r}")
        if found.target.engine not in PLAN_ENGINES or found.fingerprint != folder.name:
            raise ValueError(f"it tells of plans that belong into a folder {found.fingerprint}")
    except InputError:
        raise
    except (OSError, KeyError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({error!r}): {mend}") from error
    return found
