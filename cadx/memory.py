"""The memory of this process."""

import ctypes
import functools
import mmap
import threading
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # of glibc's malloc.h
_BLOCK_BYTES = 1 << 25  # the largest that every glibc takes for a block of the heap
_KEPT_BYTES = (1 << 31) - (1 << 21)  # the most that glibc takes, in whole large pages
_LARGE_PAGE_BYTES = 1 << 21


def peak_memory_bytes() -> int:
    """The most memory that this process has held at once so far (VmHWM of Linux)."""
    # Not getrusage, whose peak a process inherits from the one that started it.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def tune_allocator() -> None:
    """Let this process keep what it frees, up to 2 GiB, and let its heap lie in large pages.

    A network asks for the same tensors in each step. glibc gives their memory back to the kernel, which has to clear
    its pages again for the next step; and tensors in pages of 4 KiB overflow the processor's table of pages. A
    training step takes up to a fifth less time (`python -m benchmarks step`).

    The next 2 GiB of addresses are reserved for the heap at once, which takes no memory, and large pages are asked for
    there, where Linux gives them on request. When the process forks, as for loader workers, those that either side
    writes to are split. Blocks of more than 32 MiB for which the heap has no room are mapped and given back one by one.

    A call in another thread than the main one, whose heap is another, reserves nothing. Without glibc, nothing is done.
    """
    libc = ctypes.CDLL(None)
    mallopt = getattr(libc, "mallopt", None)
    # In this order: a threshold for trimming alone would fix that for mapping at its start of 128 KiB.
    if mallopt is None or not mallopt(_M_MMAP_THRESHOLD, _BLOCK_BYTES):
        return
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _KEPT_BYTES)  # also what a trim leaves
    if threading.current_thread() is threading.main_thread():
        _reserve()


@functools.cache
def _reserve() -> None:
    """Let the heap grow by what it pads its top with, and ask for large pages there."""
    libc = ctypes.CDLL(None)
    libc.sbrk.restype, libc.sbrk.argtypes = ctypes.c_void_p, [ctypes.c_ssize_t]
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    first = libc.sbrk(0)
    blocks: list[int | None] = []
    # Blocks that were freed before come first; they are untouched here, so that none takes memory.
    while (last := libc.sbrk(0)) == first and len(blocks) < _KEPT_BYTES // _BLOCK_BYTES:
        blocks.append(libc.malloc(_BLOCK_BYTES - _LARGE_PAGE_BYTES))
    for block in blocks:
        libc.free(block)
    first += -first % _LARGE_PAGE_BYTES
    if last > first:
        libc.madvise(first, last - first, mmap.MADV_HUGEPAGE)  # which may refuse: pages are small then
