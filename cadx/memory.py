"""The memory of this process."""

import ctypes
from pathlib import Path

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_HEAP_BLOCK_BYTES = 1 << 25  # the largest that every glibc takes
_KEPT_BYTES = 1 << 30


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once so far (VmHWM of Linux)."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def keep_freed_memory() -> None:
    """Let this process keep what it frees at the end of its heap, up to 1 GiB, for what it allocates next.

    A network asks for the same tensors in each step. glibc gives their memory back to the kernel, which has to clear
    its pages again for the next step: a tenth of the time of a batch of eight images, a twentieth of a training step.
    Blocks of more than 32 MiB are mapped and given back one by one, as before. Without glibc, nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # In this order: a threshold for trimming alone would fix that for mapping at its start of 128 KiB.
    if mallopt is not None and mallopt(_M_MMAP_THRESHOLD, _HEAP_BLOCK_BYTES):
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
