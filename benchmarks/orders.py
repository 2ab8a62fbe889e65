"""What channels last is worth: networks whose weights lie so, against the order in which torch makes them.

On a CPU, by all of this process's cores; the two take turns in each round.
"""

import os
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import TypeAdapter
from torch import nn

from benchmarks._claim import claim
from cadx.memory import tune_allocator
from cadx.models import ModelConfig, to_device

NUM_CLASSES = 2
BATCH = 8
ROUNDS = 12
"""Of which the first warms up."""
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "resnet18_224px": ({"family": "resnet", "depth": 18}, (224, 224)),
    "resnet3d_64px": ({"family": "resnet3d", "depth": 18, "width": 0.25, "stem": "small"}, (64, 64, 64)),
}
"""Name -> a family and the size of its images or volumes."""


def claims() -> Iterator[dict[str, Any]]:
    """Images or volumes per second, answered and trained on, beside torch's own order."""
    tune_allocator()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name, (settings, size) in NETWORKS.items():
        networks = []
        for channels_last in (True, False):
            torch.manual_seed(0)
            network = TypeAdapter[Any](ModelConfig).validate_python(settings).build(NUM_CLASSES, 1)
            to_device(network, torch.device("cpu"), channels_last=channels_last)
            networks.append(network)
        inputs = torch.rand(BATCH, 1, *size)
        for task, step in {"answers": _answer, "training": _train}.items():
            ours, theirs = _rates(step, networks, inputs)
            yield claim(f"orders.{name}_{task}", ours, theirs, "samples/s")


def _answer(network: nn.Module, inputs: torch.Tensor) -> None:
    network.eval()
    with torch.inference_mode():
        network(inputs)


def _train(network: nn.Module, inputs: torch.Tensor) -> None:
    network.train()
    network.zero_grad()
    loss = F.cross_entropy(network(inputs).logits, torch.arange(len(inputs)) % NUM_CLASSES)
    loss.backward()  # type: ignore[no-untyped-call]


def _rates(
    step: Callable[[nn.Module, torch.Tensor], None], networks: list[nn.Module], inputs: torch.Tensor
) -> list[float]:
    """Samples per second of each network, by the median round."""
    seconds: list[list[float]] = [[] for _ in networks]
    for _ in range(ROUNDS):
        for network, times in zip(networks, seconds, strict=True):
            started = time.perf_counter()
            step(network, inputs)
            times.append(time.perf_counter() - started)
    return [len(inputs) / float(np.median(times[1:])) for times in seconds]
