"""The memory of this process."""

import ctypes
import functools
import mmap
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_TOP_PAD_BYTES = 1 << 17  # glibc's own
_BLOCK_BYTES = 1 << 25  # the largest that every glibc takes for a block of the heap
_RESERVED_BYTES = 1 << 30
_KEPT_BYTES = (1 << 31) - 1


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once so far (VmHWM of Linux)."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@functools.cache
def tune_allocator() -> None:
    """Let this process keep what it frees, and its heap lie in large pages: once for all who ask.

    A network asks for the same tensors in each step. glibc gives their memory back to the kernel, which has to clear
    its pages again for the next step; and tensors in pages of 4 KiB overflow the processor's table of pages. So up to
    2 GiB stay with the process, and addresses (no memory) for 1 GiB are taken at once, which Linux may back by pages
    of 2 MiB. A training step takes up to a fifth less time, in no more memory (`python -m benchmarks step`).
    Larger blocks than the heap has room for are mapped, and given back one by one, as before. Where there is no glibc,
    or no such page, nothing is done.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    # In this order: a threshold for trimming alone would fix that for mapping at its start of 128 KiB.
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES):
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _RESERVED_BYTES)
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.free(libc.malloc(_BLOCK_BYTES - (1 << 16)))
    mallopt(_M_TOP_PAD, _TOP_PAD_BYTES)
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if line.endswith("[heap]"):
            first, last = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
            libc.madvise(first, last - first, mmap.MADV_HUGEPAGE)
