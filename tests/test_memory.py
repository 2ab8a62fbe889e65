"""Memory of this process."""

import ctypes
import subprocess
import sys

import pytest

PROBE = """
import ctypes
import sys
import numpy as np
from cadx.memory import keep_freed_memory

class Mallinfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # of malloc.h
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

mallinfo2 = ctypes.CDLL(None).mallinfo2
mallinfo2.restype = Mallinfo
if sys.argv[1] == "True":
    keep_freed_memory()
arrays = [np.ones(24 << 17) for _ in range(4)]  # 24 MiB each: together more than glibc keeps by itself
del arrays
print(mallinfo2().fordblks)
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc 2.33 or later tells what it keeps"
)
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_freed_stays_with_the_process_that_asks_for_it(kept: bool) -> None:
    # In a process of its own: in this one other tests' networks have asked for it already.
    command = [sys.executable, "-c", PROBE, str(kept)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (int(said.stdout) >= 96 << 20) is kept
