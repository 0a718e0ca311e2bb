"""What the workers of an export give back, and what the bundle's report.json holds."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One output compared with PyTorch's in float32, all numbers of the batch together.

    Attributes:
        graph: its name, or `pipeline`.
        shape: the sizes of the named axes.
        inputs: random or real; for the pipeline the task.
        output: its name; for the pipeline `latents` or `images`.
        run_by: onnxruntime, onnxruntime in float32, or pytorch.
        rms: the error's root mean square, relative to the output's. For images, whose values are 0 to 1, it is not
            relative, so that psnr = -20 log10(rms) dB. What is not finite, or of another shape, has infinite errors.
        worst: the largest absolute error.
        cosine: of the two outputs as vectors.
        limit: of rms.
        ok: whether rms is within the limit.
        psnr: of images, in dB.
    """

    graph: str
    shape: dict[str, int]
    inputs: str
    output: str
    run_by: str
    rms: float
    worst: float
    cosine: float
    limit: float
    ok: bool
    psnr: float | None = None


@dataclass(frozen=True)
class GraphResult:
    """What the export of one graph gave.

    Attributes:
        parameters: how many numbers its weights hold.
        seconds: what the export took.
        peak_bytes: the most memory that its process had resident, mapped files included; None where the system does
            not say.
        checks: its comparisons; None: not validated.
        validation_seconds: what these took.
    """

    parameters: int
    seconds: float
    peak_bytes: int | None
    checks: list[Check] | None = None
    validation_seconds: float | None = None


@dataclass(frozen=True)
class PipelineResult:
    """The comparison of the pipeline's images, and the seconds that it took."""

    checks: list[Check]
    seconds: float


def worst_check(checks: list[Check]) -> Check:
    """The one whose error is largest beside its limit."""
    return max(checks, key=lambda check: check.rms / check.limit)
