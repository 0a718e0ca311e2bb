"""The plans that `mige-rt build` adds to a bundle, what they were built for, and why they do not fit a machine.

A bundle's engines/<fingerprint>/ holds a plan a graph and plans.json. Nothing here imports a runtime or PyTorch.
"""

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

from annotated_types import Ge, Le, MaxLen

from mige_rt.bundle import ALWAYS_HASHED, FileEntry, Manifest, Text, all_printable, load_json, sha256
from mige_rt.config import Precision
from mige_rt.errors import InputError, NotAvailableError
from mige_rt.graphs import GRAPHS, AxisRange, GraphName
from mige_rt.known_files import is_known
from mige_rt.validation import validate

PlanEngine = Literal["tensorrt", "tensorrt-rtx"]
PLAN_ENGINES: tuple[PlanEngine, ...] = get_args(PlanEngine)
PRODUCTS: dict[PlanEngine, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT for RTX"}
SCHEMA = 2  # of the sidecar
SIDECAR = "plans.json"
LARGEST_SIDECAR = 1 << 20  # bytes; those of `mige-rt build` have a few thousand


class NoPlanError(NotAvailableError):
    """A bundle has no plan that fits the machine; the message says why, and the command that builds one."""

    def __init__(self, message: str, bundle: Path, machine: "Machine") -> None:
        """Give the message, the bundle, and the machine that its plans must fit."""
        super().__init__(message)
        self.bundle, self.machine = bundle, machine


class UntrustedError(NotAvailableError):
    """Plans are there, and were built elsewhere."""


@dataclass(frozen=True)
class Target:
    """What plans are for: a runtime's exact version, and the GPUs.

    TensorRT's plans are for GPUs of one name; those of TensorRT for RTX for any of their compute capabilities ("8.9"),
    and gpu is None.
    """

    engine: PlanEngine
    version: Text
    gpu: Text | None
    capabilities: Annotated[tuple[Text, ...], MaxLen(64)]


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
    onnx: Text
    weights: Text
    seconds: Annotated[float, Ge(0), Le(1e9)]
    peak_bytes: (
        Annotated[int, Ge(0), Le(2**62)] | None
    )  # of the building process's memory, not the GPU's; None where the system does not tell


@dataclass(frozen=True)
class Plans:
    """A folder of plans. options: the builder's, by name; ranges and precision: the bundle's as they were built."""

    folder: Path
    target: Target
    precision: str
    ranges: Mapping[str, AxisRange]
    options: Mapping[str, Any]
    graphs: Mapping[GraphName, PlanEntry]

    @property
    def fingerprint(self) -> str:
        """The name that the folder must have."""
        return fingerprint(self.target, self.precision, self.ranges, self.options)

    def to_json(self) -> dict[str, Any]:
        """What the sidecar holds: everything but where the folder is."""
        content = dataclasses.asdict(self)
        del content["folder"]
        return {"schema": SCHEMA, **content}


def fingerprint(target: Target, precision: str, ranges: Mapping[str, AxisRange], options: Mapping[str, Any]) -> str:
    """The name of the folder that holds plans for this target, of this precision, ranges and options."""
    content = [
        dataclasses.asdict(target),
        precision,
        {axis: vars(span) for axis, span in ranges.items()},
        dict(options),
    ]
    return f"{target.engine}-{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]}"


def read_plans(bundle: Path) -> list[Plans]:
    """All finished plans in a bundle, by folder name.

    Raises:
        InputError: A sidecar is damaged or was moved.
    """
    return [_read(path.parent) for path in sorted((bundle / "engines").glob(f"*/{SIDECAR}")) if _finished(path.parent)]


def misfit(plans: Plans, manifest: Manifest, machine: Machine) -> str | None:
    """Why these plans must not be used for this bundle on this machine; None if they may."""
    target, product = plans.target, PRODUCTS[plans.target.engine]
    if target.engine != machine.engine:
        return f"they are {product}'s"
    if target.version != machine.version:
        return f"they were built with {product} {target.version}, and {machine.version} is installed"
    if machine.capability not in target.capabilities:
        built_for = " ".join(target.capabilities)
        return f"they were built for compute capability {built_for}, and this GPU has {machine.capability}"
    if target.gpu is not None and target.gpu != machine.gpu:
        return f"they were built for {target.gpu}, and this GPU is {machine.gpu}"
    return stale(plans, manifest)


def stale(plans: Plans, manifest: Manifest) -> str | None:
    """Why these plans are not of the bundle's graphs as they are now; None if they are."""
    for graph, entry in manifest.graphs.items():
        built = plans.graphs.get(graph)
        if built is None or (built.onnx, built.weights) != (entry.onnx.sha256, entry.weights.sha256):
            return f"they were built from another {graph} than the bundle has now"
    if plans.precision != manifest.precision or dict(plans.ranges) != dict(manifest.ranges):
        return "they were built for another precision, or other ranges, than the bundle has now"
    return None


def build_command(bundle: Path, engine: PlanEngine) -> str:
    """The command that builds a bundle's plans, as one types it."""
    return shlex.join(["mige-rt", "build", "--bundle", str(bundle), "--engine", engine])


def find_plans(bundle: Path, manifest: Manifest, machine: Machine) -> Plans:
    """The plans that fit this machine, the most narrowly built first, their files checked.

    Raises:
        NoPlanError: None fits.
        InputError: The fitting plans' files are not those that were built.
    """
    reasons = [(plans, misfit(plans, manifest, machine)) for plans in read_plans(bundle)]
    fitting = sorted((plans for plans, reason in reasons if reason is None), key=_breadth)
    if not fitting:
        why = "".join(f"; {plans.folder.name}: {reason}" for plans, reason in reasons)
        raise NoPlanError(
            f"{bundle} has no plan for this machine ({machine}){why}. Build it with: "
            f"{build_command(bundle, machine.engine)}, or let run do it: --build",
            bundle,
            machine,
        )
    check_plans(bundle, fitting[0])
    return fitting[0]


def require_built_here(bundle: Path, plans: Plans, *, trust: bool) -> None:
    """Plans are programs for the GPU that nothing can check, and run with all rights.

    Raises:
        UntrustedError: They were not built here, and trust was not given.
    """
    if not trust and not is_known(plans.folder / SIDECAR):
        raise UntrustedError(
            f"the plans in {plans.folder} were not built on this machine, and could do anything to it: build them here "
            f"with: {build_command(bundle, plans.target.engine)}, or use them with --trust if you know who built them"
        )


def check_plans(bundle: Path, plans: Plans, *, everything: bool = False) -> None:
    """Compare plans with their sidecar, as `bundle.check_files` does.

    Raises:
        InputError: Names a plan that is missing, truncated or changed.
    """
    again = f"build it again with: {build_command(bundle, plans.target.engine)}"
    files = [entry.plan for entry in plans.graphs.values()]
    hashed = everything or sum(file.bytes for file in files) <= ALWAYS_HASHED
    for file in files:
        path = plans.folder / file.path
        if not path.is_file():
            raise InputError(f"the plan {path} is missing; {again}")
        if (size := path.stat().st_size) != file.bytes:
            raise InputError(f"the plan {path} has {size} bytes instead of {file.bytes}; {again}")
        if hashed and (digest := sha256(path)) != file.sha256:
            raise InputError(f"the plan {path} was changed: its SHA-256 is {digest} instead of {file.sha256}; {again}")


def _breadth(plans: Plans) -> int:
    return len(plans.target.capabilities)


def _finished(folder: Path) -> bool:
    """A folder that is being written, or that a killed build left, has a suffix to its name."""
    return "." not in folder.name


@dataclass(frozen=True)
class _Sidecar:
    """What plans.json holds."""

    schema: int
    target: Target
    precision: Precision
    ranges: Annotated[dict[Text, AxisRange], MaxLen(32)]
    options: Annotated[dict[Text, bool | int | Text], MaxLen(32)]
    graphs: dict[GraphName, PlanEntry]


def _read(folder: Path) -> Plans:
    path = folder / SIDECAR
    remedy = f"remove {folder}, and build again"
    try:
        content: Any = load_json(path, LARGEST_SIDECAR)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is damaged ({error}): {remedy}") from error
    schema = cast("dict[str, object]", content).get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema != SCHEMA:
        raise InputError(f"{path} has schema {schema}, this version of mige-rt reads {SCHEMA}: {remedy}")
    try:
        sidecar = validate(_Sidecar, cast("object", content), f"{path} is damaged")
    except InputError as error:
        raise InputError(f"{error}: {remedy}") from error
    plans = Plans(folder, sidecar.target, sidecar.precision, sidecar.ranges, sidecar.options, sidecar.graphs)
    if problem := _problem(plans):
        raise InputError(f"{path} is damaged: {problem}: {remedy}")
    return plans


def _problem(plans: Plans) -> str | None:
    """What does not hold of plans that were read, if anything."""
    if missing := set(GRAPHS) - set(plans.graphs):
        return f"the graphs {', '.join(sorted(missing))} are missing"
    for graph, entry in plans.graphs.items():
        if entry.plan.path != f"{graph}.plan":
            return f"the plan of {graph} is said to be {entry.plan.path!r}"
    target = plans.target
    if not all_printable((target.version, target.gpu or "", *target.capabilities, *plans.ranges, *plans.options)):
        return "it has texts that are not printable"
    if plans.fingerprint != plans.folder.name:
        return f"it tells of plans that belong into a folder {plans.fingerprint}"
    return None
