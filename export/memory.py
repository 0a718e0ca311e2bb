"""How much memory a process took."""

from pathlib import Path


def peak_bytes() -> int | None:
    """This process's peak resident memory in bytes; None where the system does not report it.

    getrusage cannot be used: its peak is at least that of the process which started this one.
    """
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), None)
