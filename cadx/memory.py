"""The memory of this process."""

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT_BYTES = 1 << 30


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once so far (VmHWM of Linux)."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def keep_freed_memory() -> None:
    """Let this process keep what it frees, up to 1 GiB at a time, for what it allocates next.

    A network asks for the same tensors in each step. glibc gives those of many megabytes back to the kernel, which
    has to clear their pages again for the next step: a tenth of the time of a batch of eight images, and a
    twentieth of a training step. The peak stays as it is. Without glibc, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option in (_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD):
            mallopt(option, _KEPT_BYTES)
