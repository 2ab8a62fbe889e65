"""Memory of this process."""

import platform
import subprocess
import sys

import pytest


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
@pytest.mark.parametrize("kept", [True, False])
def test_what_is_freed_and_asked_for_again_is_not_cleared_anew(kept: bool) -> None:
    # Of its own, since other tests' networks have asked for it already.
    probe = f"""
import resource
import numpy as np
from cadx.memory import keep_freed_memory
if {kept}:
    keep_freed_memory()
for number in range(12):
    if number == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.ones(48 << 17)  # 48 MiB, beyond what glibc may keep by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    said = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    pages = 10 * (48 << 20) / 4096
    assert (int(said.stdout) < 0.01 * pages) is kept
