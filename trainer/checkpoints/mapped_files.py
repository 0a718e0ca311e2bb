"""The memory of mapped files."""

import ctypes
import sys
from collections.abc import Collection
from pathlib import Path

_MADV_DONTNEED = 4  # of Linux's madvise


def release_pages(files: Collection[Path]) -> None:
    """Take the pages of mapped files out of this process's memory; they are read again when they are touched.

    They stay in the system's cache. Nothing may have been written to them: private changes are lost. Does nothing on
    systems other than Linux, which reclaim such pages by themselves when memory is short.
    """
    if sys.platform != "linux":
        return
    names = {str(path.resolve()) for path in files}
    libc = ctypes.CDLL(None)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        addresses, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0] in names:
            start, end = (int(address, 16) for address in addresses.split("-"))
            libc.madvise(start, end - start, _MADV_DONTNEED)
