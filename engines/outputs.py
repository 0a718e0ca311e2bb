"""What a graph gives, against the table of its outputs."""

from collections.abc import Mapping

from engines.interface import Array, array_namespace
from mige_rt.config import ModelConfig
from mige_rt.errors import InputError, NotFiniteError
from mige_rt.graphs import GRAPHS, INTERNAL_TENSORS, GraphName, axis_size, named_sizes, resolved_axes


class OutputCheck:
    """Checks the tensors that come out of one model's graphs: names, types and sizes of all, values of the first."""

    def __init__(self, config: ModelConfig, *, values: bool = True) -> None:
        """Prepare to check the graphs of a model of these sizes; values: look at those of the first outputs, too."""
        self._axes = resolved_axes(config)
        # Whose values need no look, which waits for the device.
        self._finite: set[GraphName] = set() if values else set(GRAPHS)

    def __call__(self, graph: GraphName, inputs: Mapping[str, Array], outputs: Mapping[str, Array]) -> None:
        """Check the outputs of a run.

        Args:
            graph: Which.
            inputs: That it was run with.
            outputs: That it gave.

        Raises:
            InputError: An output is missing, or of another type or size than the inputs' sizes imply.
            NotFiniteError: It is the graph's first run, and a value is NaN or infinite.
        """
        axes = self._axes[graph]
        sizes: dict[str, int] = {}
        for spec in GRAPHS[graph].inputs:
            # Timesteps that the engine has embedded ahead have an axis more.
            sizes |= named_sizes(axes[spec.name], inputs[spec.name].shape[: len(axes[spec.name])])
        for spec in GRAPHS[graph].outputs:
            expected = tuple(axis_size(axis, sizes) for axis in axes[spec.name])
            output = outputs.get(spec.name)
            if output is None:
                raise InputError(f"{graph} gives no {spec.name}: {_REMEDY}")
            if tuple(output.shape) != expected:
                raise InputError(
                    f"{graph} gives {spec.name} of the shape {list(output.shape)}, {list(expected)} is expected: "
                    f"{_REMEDY}"
                )
            wanted = ("float32", "float16", "bfloat16") if spec.name in INTERNAL_TENSORS else (spec.dtype,)
            if (dtype := str(output.dtype).removeprefix("torch.")) not in wanted:
                raise InputError(f"{graph} gives {spec.name} as {dtype}, {spec.dtype} is expected: {_REMEDY}")
            if graph not in self._finite:
                xp = array_namespace(output)
                if not bool(xp.all(xp.isfinite(output))):
                    raise NotFiniteError(
                        f"{graph} gives a {spec.name} with values that are NaN or infinite, finite ones are expected: "
                        "the model overflowed, or its weights are damaged; try smaller scales, the precision fp32, or "
                        "export the bundle again"
                    )
        self._finite.add(graph)


_REMEDY = "the bundle's graphs are not those of its model; do not use it, or export it again"
