"""What gradient checkpointing saves and costs: one step of the 3D ResNet-18 on one patch of 96^3, with and without.

Memory is the peak of all that the step allocates, activations, gradients of activations and scratch space alike,
above the weights and their gradients, which both arms hold. Time is the processor's on a CPU, where whatever else
runs would count in the clock's, and the clock's on a GPU.
"""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks._claim import claim
from cadx.benchmarking import counting_tensors
from cadx.models.checkpointing import enable_checkpointing
from cadx.models.volume import ResNet3DConfig

SIZE_PX = 96
ROUNDS = 5
MODEL = ResNet3DConfig()
MAX_MEMORY = 0.6
MAX_TIME = 1.4
_DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def claims() -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    volumes = torch.randn(1, 1, SIZE_PX, SIZE_PX, SIZE_PX, device=_DEVICE)
    ours, peer = _network(checkpointed=True), _network(checkpointed=False)
    for network in (ours, peer):
        _step(network, volumes)  # the first step of a process makes what the later ones reuse
    tensors = [_tensors(network, volumes) for network in (ours, peer)]
    equal = sum(torch.equal(a, b) for a, b in zip(*tensors, strict=True))
    yield claim("checkpointing.same", equal, len(tensors[1]), "equal tensors")
    ours_mb, peer_mb = _peak_mb(ours, volumes), _peak_mb(peer, volumes)
    yield claim("checkpointing.memory", ours_mb, peer_mb, "MB", ratio=peer_mb / ours_mb, goal=1 / MAX_MEMORY)
    seconds = [(_seconds(ours, volumes), _seconds(peer, volumes)) for _ in range(ROUNDS)]
    ours_s, peer_s = (min(arm) for arm in zip(*seconds, strict=True))
    yield claim("checkpointing.time", ours_s, peer_s, "s/step", ratio=peer_s / ours_s, goal=1 / MAX_TIME)


def _network(*, checkpointed: bool) -> nn.Module:
    torch.manual_seed(0)
    network = MODEL.build(2, 1).train().to(_DEVICE)
    if checkpointed:
        enable_checkpointing(network)
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return network


def _step(network: nn.Module, volumes: Tensor) -> Tensor:
    network.zero_grad(set_to_none=False)
    classes = torch.zeros(len(volumes), dtype=torch.int64, device=volumes.device)
    loss = F.cross_entropy(network(volumes).logits, classes)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def _tensors(network: nn.Module, volumes: Tensor) -> list[Tensor]:
    """The loss, every gradient and every buffer after a step."""
    loss = _step(network, volumes)
    gradients = [p.grad.clone() for p in network.parameters() if p.grad is not None]
    return [loss, *gradients, *(buffer.clone() for buffer in network.buffers())]


def _peak_mb(network: nn.Module, volumes: Tensor) -> float:
    if _DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        _step(network, volumes)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with tempfile.TemporaryDirectory() as folder, counting_tensors(Path(folder)) as peak_mb:
        _step(network, volumes)
    return peak_mb[0]


def _seconds(network: nn.Module, volumes: Tensor) -> float:
    clock = time.perf_counter if _DEVICE == "cuda" else time.process_time
    if _DEVICE == "cuda":
        torch.cuda.synchronize()
    started = clock()
    _step(network, volumes)
    if _DEVICE == "cuda":
        torch.cuda.synchronize()
    return clock() - started
