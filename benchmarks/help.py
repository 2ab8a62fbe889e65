"""How long `cadx --help` takes, by the clock: the first thing that a newcomer waits for."""

import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks._claim import claim

LIMIT_S = 1.0
ROUNDS = 5


def claims() -> Iterator[dict[str, Any]]:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "cadx", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(time.perf_counter() - started)
    ours = statistics.median(seconds)
    yield claim("help.seconds", ours, LIMIT_S, "s", ratio=LIMIT_S / ours)
