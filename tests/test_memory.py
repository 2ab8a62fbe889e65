"""Memory of this process."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

FREED = """
import ctypes
import sys
import numpy as np
from cadx.memory import tune_allocator

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo
if sys.argv[1] == "True":
    tune_allocator()
arrays = [np.ones(24 << 17) for _ in range(4)]  # 24 MiB each: together more than glibc keeps by itself
taken = mallinfo2().fordblks
del arrays
print(mallinfo2().fordblks - taken)
"""

PAGES = """
import sys
import numpy as np
from cadx.memory import tune_allocator

freed = [np.ones(29 << 17) for _ in range(2)]  # which a reservation must not be content with
del freed
if sys.argv[1] == "True":
    tune_allocator()
    tune_allocator()
arrays = [np.ones(24 << 17) for _ in range(8)]  # 24 MiB each
heap = open("/proc/self/smaps").read().split("[heap]")[1:]
print(sum(int(part.split("AnonHugePages:")[1].split()[0]) for part in heap))
print(sum(int(part.split("Rss:")[1].split()[0]) for part in heap))
"""


def _said(probe: str, tuned: bool) -> list[int]:
    # In a process of its own: in this one other tests' networks have asked for it already.
    command = [sys.executable, "-c", probe, str(tuned)]
    environment = os.environ | {"NUMPY_MADVISE_HUGEPAGE": "0"}  # else numpy asks for large pages by itself
    said = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [int(line) for line in said.stdout.split()]


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or later tells what it keeps"
)
@pytest.mark.parametrize("tuned", [True, False])
def test_what_is_freed_stays_with_the_process_that_asks_for_it(tuned: bool) -> None:
    assert (_said(FREED, tuned)[0] >= 96 << 20) is tuned


def _large_pages_can_be_asked_for() -> bool:
    try:
        said = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return False
    return "[madvise]" in said


@pytest.mark.skipif(
    not _large_pages_can_be_asked_for(), reason="Linux is not set to give large pages on request"
)
def test_tensors_lie_in_large_pages_and_what_is_reserved_takes_no_memory() -> None:
    kib, resident_kib = _said(PAGES, tuned=True)
    assert kib >= 100 << 10
    assert resident_kib < 300 << 10  # of the two gigabytes that are reserved
    assert _said(PAGES, tuned=False)[0] == 0
