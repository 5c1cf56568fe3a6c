"""glibc's allocator: by default it returns every large tensor's memory to the system, and faults it in again."""

import ctypes
import os
import sys

_MMAP, _TRIM = -3, -1  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD of malloc.h
_MMAP_BYTES, _TRIM_BYTES = 1 << 30, (2 << 30) - 1
_VARIABLE = "GLIBC_TUNABLES"
TUNABLES = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in (("mmap_threshold", _MMAP_BYTES), ("trim_threshold", _TRIM_BYTES), ("hugetlb", 1))
)


def keep_freed_memory() -> bool:
    """Lets this process keep freed memory for the next tensors; whether it could, which takes glibc.

    On a processor a gradient takes up to a fifth less time. The process holds as much memory as it ever needed, and
    glibc no longer adapts its thresholds, which nothing can undo: therefore nothing in innermax calls this but its
    command line. At the end of a training, memory is returned once.
    """
    if not _is_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP, _MMAP_BYTES)) and bool(mallopt(_TRIM, _TRIM_BYTES))


def return_freed_memory() -> None:
    """Returns to the system what is free now."""
    if _is_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def restart_keeping_memory() -> None:
    """Starts the program anew, with freed memory kept and in huge pages, which only the environment can ask for.

    Where the environment says something of glibc's allocator already, that is left.
    """
    if _is_glibc() and _VARIABLE not in os.environ and "torch" not in sys.modules:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {_VARIABLE: TUNABLES})


def _is_glibc() -> bool:
    if sys.platform != "linux":
        return False
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except ValueError:  # another libc does not know the name
        return False
