"""Figures in words, as the report says them."""

from typing import Any

from benchmarks.findings import Fidelity, Findings
from benchmarks.measure import CONFIDENCE, Latency, Ratio


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{1000 * value:.3g} ms" if value < 0.1 else f"{value:.2f} s" if value < 100 else f"{value:.0f} s"


def latency(found: Latency | None) -> str:
    return "" if found is None else f"{seconds(found.median)} ({seconds(found.p10)} to {seconds(found.p90)})"


def amount(value: float | None, unit: str = "B") -> str:
    """A large number with a decimal prefix: 568 MB, 1.3 TFLOP."""
    if value is None:
        return ""
    for prefix in ("", "k", "M", "G", "T", "P"):
        if abs(value) < 999.5 or prefix == "P":
            return f"{value:.3g} {prefix}{unit}"
        value /= 1000
    raise AssertionError


def times(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def gain(found: Ratio) -> str:
    """What a ratio of seconds says."""
    said = f"{found.value:.2f} times as fast ({CONFIDENCE:.0%} interval {found.low:.2f} to {found.high:.2f})"
    return said if found.verdict == "faster" else f"{said}: {found.verdict}"


def decibels(found: Fidelity) -> str:
    return "identical" if found.max == 0 else f"{found.psnr:.1f} dB"


def judged(found: Fidelity) -> str:
    return {True: "ok", False: "FAILED", None: "meant to differ"}[found.ok]


def where(found: Findings) -> str:
    """When and on what it was measured."""
    env = found.environment
    gpus = ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in env["gpus"]) or "no GPU"
    cores = _cores(env)
    commit = f", commit {env['commit'][:10]}{'+' * env['commit'].endswith('+')}" if env["commit"] else ""
    return (
        f"Measured on {found.date} on {cores} of {env['cpu']}, {amount(env['memory_bytes'])} of memory, {gpus}{commit}."
    )


def _cores(env: dict[str, Any]) -> str:
    return f"{env['cores']} core{'s' * (env['cores'] != 1)}"


def environment(found: Findings) -> list[tuple[str, str]]:
    env = found.environment
    threads = {name: value for name, value in env["threads"].items() if value}
    own = sorted({row.opened.threads for row in found.rows if row.opened.threads is not None})
    facts = [
        ("Model", f"{found.model['name']}, trained for {found.model['side']} pixels"),
        ("Processor", f"{env['cpu']}, {_cores(env)}"),
        ("GPU", ", ".join(f"{gpu['name']}, {gpu['memory']}, driver {gpu['driver']}" for gpu in env["gpus"]) or "none"),
        ("Memory", amount(env["memory_bytes"])),
        ("System", env["system"]),
        ("Threads", ", ".join([*(f"{k}={v}" for k, v in threads.items()), *(f"PyTorch {n}" for n in own)])),
        ("Versions", ", ".join(f"{name} {number}" for name, number in env["versions"].items())),
        ("Commit", (env["commit"] or "not in a git checkout").replace("+", ", with changes")),
    ]
    if found.peaks is not None:
        flops = ", ".join(f"{amount(rate, 'FLOP/s')} in {p}" for p, rate in found.peaks.flops.items())
        facts.append((f"Peaks ({found.peaks.device})", f"{flops}; {amount(found.peaks.bytes, 'B/s')} of a large copy"))
    return facts


def headline(found: Findings) -> list[str]:
    """What matters most, of the first case."""
    rows = [row for row in found.of(0) if row.counts and row.candidate.plain and row.latency]
    if not rows:
        return ["No candidate was measured whose pictures are right."]
    best = min(rows, key=lambda row: row.latency.median if row.latency else 0)
    assert best.latency is not None
    said = [
        f"{found.cases[0]}: {best.name} takes {seconds(best.latency.median)} a "
        f"{'picture' if best.batch == 1 else f'batch of {best.batch}'}, everything from words and pictures to the "
        "picture included"
        + (f", {times(best.times_floor)} times what its arithmetic must take." if best.times_floor else ".")
    ]
    mine = [c for c in found.comparisons if c.case == 0 and c.after == best.name]
    for comparison in mine:
        if comparison.what == "all together":
            said.append(f"Beside {comparison.before}, in the same run, it is {gain(comparison.ratio)}.")
    return said


def summary(found: Findings) -> list[str]:
    """What the command says at its end."""
    said = headline(found) if found.rows else []
    said += [f"skipped: {skipped['what']}: {skipped['why']}" for skipped in found.skipped if not skipped["wrong"]]
    said += [f"parity fails, so it does not count: {failure}" for failure in found.failed]
    return said if found.complete else [*said, "interrupted: the report has what was measured until then"]
