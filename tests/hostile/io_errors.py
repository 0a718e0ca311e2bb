"""EIO, what the system answers where a disk fails: a filter of system calls (seccomp, Linux) gives it to a process.

As a program: `python io_errors.py CALLS AT_LEAST ARGUMENTS...` is `python ARGUMENTS...`, where the system calls CALLS
(fsync, or write) fail so; those of write to files alone, and of AT_LEAST bytes or more. Child processes' do, too.
"""

import ctypes
import errno
import os
import platform
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from hostile_cases import LIBRARY_TEXT, contents

_CALLS = {  # the numbers of system calls
    "x86_64": {"write": (1, 18), "fsync": (74, 75)},  # write and pwrite64, fsync and fdatasync
    "aarch64": {"write": (64, 68), "fsync": (82, 83)},
}
AVAILABLE = sys.platform == "linux" and platform.machine() in _CALLS

# <linux/filter.h>, <linux/seccomp.h> and <linux/prctl.h>
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_NUMBER, _FIRST_ARGUMENT, _THIRD_ARGUMENT = 0, 16, 32  # bytes in struct seccomp_data
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


class _Instruction(ctypes.Structure):
    _fields_ = (
        ("code", ctypes.c_uint16),
        ("then", ctypes.c_uint8),
        ("otherwise", ctypes.c_uint8),
        ("k", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("instructions", ctypes.POINTER(_Instruction)))


def fail(calls: str, at_least: int) -> None:
    """From now on these calls fail in this process and its children; see the module.

    Raises:
        OSError: The system has no such filters.
    """
    numbers = _CALLS[platform.machine()][calls]
    # To files alone: stdin, stdout and stderr are below 3.
    conditions = [(_FIRST_ARGUMENT, 3), (_THIRD_ARGUMENT, at_least)] if calls == "write" else []
    check = 1 + len(numbers)
    give_error = check + 2 * len(conditions)
    allow = give_error + 1
    lines: list[tuple[int, int, int, int]] = [(_LOAD, 0, 0, _NUMBER)]

    def jump(kind: int, value: int, then: int, otherwise: int) -> None:
        """Go on at one of two lines; jumps are counted from the line behind."""
        behind = len(lines) + 1
        lines.append((kind, then - behind, otherwise - behind, value))

    for number in numbers:
        behind = len(lines) + 1
        jump(_IF_EQUAL, number, check, allow if behind == check else behind)
    for offset, least in conditions:
        lines.append((_LOAD, 0, 0, offset))
        jump(_IF_AT_LEAST, least, len(lines) + 1, allow)
    lines += [(_RETURN, 0, 0, _ERROR | errno.EIO), (_RETURN, 0, 0, _ALLOW)]
    instructions = (_Instruction * len(lines))(*(_Instruction(*line) for line in lines))
    program = _Program(len(lines), instructions)
    system = ctypes.CDLL(None, use_errno=True)
    if system.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or system.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0):
        raise OSError(ctypes.get_errno(), "no filter of system calls")


def check_failing(
    folder: Path, calls: str, at_least: int, arguments: Sequence[str], grows: Collection[str] = ()
) -> str:
    """Run `python ARGUMENTS...` in a folder, where these calls fail: it is refused, and every file is what it was.

    Args:
        folder: The folder.
        calls: System calls that fail.
        at_least: Bytes, of those that do.
        arguments: Of Python.
        grows: Logs in the folder, to which lines may be added.

    Returns:
        What it says, on one line.
    """
    before = contents(folder)
    run = subprocess.run(
        [sys.executable, __file__, calls, str(at_least), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    answer = " ".join(run.stderr.split())
    assert run.returncode == 2, answer
    assert not LIBRARY_TEXT.search(answer.replace(f"[Errno {errno.EIO}]", "")), answer
    after = contents(folder)
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert changed <= set(grows)
    return answer


if __name__ == "__main__":
    fail(sys.argv[1], int(sys.argv[2]))
    os.execv(sys.executable, [sys.executable, *sys.argv[3:]])  # a filter outlasts that
