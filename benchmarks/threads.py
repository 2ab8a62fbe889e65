"""What OpenMP's waiting costs a training step that has all cores, alone and beside one other busy process.

Each arm is a process of its own, since OpenMP reads its settings once: `cadx.SPINS` against OpenMP's default.
The arms take turns, and each reports the median of its steps by the clock.
"""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks._claim import claim
from cadx import SPINS

ROUNDS = 3
STEPS = 12
BATCH, SIZE_PX = 16, 96
_BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def claims() -> Iterator[dict[str, Any]]:
    alone = _milliseconds()
    yield claim("threads.alone", *alone, "ms/step", ratio=alone[1] / alone[0], goal=0.9)
    with subprocess.Popen([sys.executable, "-c", _BUSY]) as busy:
        try:
            beside = _milliseconds()
        finally:
            busy.kill()
    yield claim("threads.beside", *beside, "ms/step", ratio=beside[1] / beside[0], goal=3)


def _milliseconds() -> tuple[float, float]:
    """The median over rounds with our setting, and with OpenMP's."""
    rounds = [(_arm(SPINS), _arm({})) for _ in range(ROUNDS)]
    ours, peer = (statistics.median(arm) for arm in zip(*rounds, strict=True))
    return ours, peer


def _arm(settings: dict[str, str]) -> float:
    environment = {name: value for name, value in os.environ.items() if name not in SPINS} | settings
    environment.pop("OMP_NUM_THREADS", None)
    command = [sys.executable, "-m", __name__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _median_step_ms() -> float:
    import torch
    import torch.nn.functional as F

    from cadx.models.radiograph_config import ResNetConfig

    torch.manual_seed(0)
    network = ResNetConfig(depth=18).build(2, 1).train()
    images, classes = torch.randn(BATCH, 1, SIZE_PX, SIZE_PX), torch.arange(BATCH) % 2
    times = []
    for _ in range(STEPS):
        started = time.perf_counter()
        network.zero_grad()
        F.cross_entropy(network(images).logits, classes).backward()  # type: ignore[no-untyped-call]
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[2:])  # the first make what the later ones reuse


if __name__ == "__main__":
    print(_median_step_ms())
