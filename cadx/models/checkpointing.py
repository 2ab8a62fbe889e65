"""Gradient checkpointing by one switch: less memory for a second forward pass, and the same numbers.

A network's `stages()` forget their activations in the forward pass and compute them anew in the backward pass.
Loss, gradients and buffers are the same, bit for bit where the device's kernels are deterministic: dropout
draws the same masks, autocast is as it was, and batch norms normalise by the batch again but count it once.
"""

import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Staged(Protocol):
    """What `enable_checkpointing` asks of a network."""

    def stages(self) -> list[nn.Module]:
        """The network's blocks in order, each called with its inputs in the network's forward pass."""
        ...


def enable_checkpointing(network: Staged) -> None:
    """From now on every stage of `network` recomputes its activations in the backward pass.

    Between forward and backward only the inputs of the stages are kept; the backward pass holds the activations
    of one stage at a time. Nothing changes in evaluation mode, without gradients, or in the state dict. A deep
    copy of the network is checkpointed too; a second call does nothing. Under `torch.compile` a stage must be one
    graph: where it breaks inside a stage, as at a batch norm with momentum None, statistics are counted twice.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 4.1, in torch's form that
    records the graph in the forward pass (`use_reentrant=False`): a stage whose inputs ask for no gradient, as a
    network's first, still gives its parameters theirs.

    Args:
        network: a network with `stages()`; changed in place.
    """
    for stage in network.stages():
        if not isinstance(stage, _Recomputed):
            # The class and not `forward` of the instance: a deep copy would run the original's forward.
            stage.__class__ = _recomputed(type(stage))  # type: ignore[arg-type]


class _Recomputed:
    training: bool

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        forward = super().forward  # type: ignore[misc]
        if not (self.training and torch.is_grad_enabled()):
            return forward(*args, **kwargs)
        if (
            torch.compiler.is_compiling()
        ):  # takes no contexts, and keeps the writes to buffers apart by itself
            return checkpoint(forward, *args, use_reentrant=False, **kwargs)
        contexts = functools.partial(_contexts, cast(nn.Module, self))
        return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


@functools.cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Recomputed, kind), {"__doc__": kind.__doc__, "__module__": kind.__module__})


def _contexts(stage: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(stage)


@contextmanager
def _statistics_kept(stage: nn.Module) -> Iterator[None]:
    """In it, norms that are in training write to copies of their running statistics.

    Copies, and not none at all: the recomputation must save as many tensors as the forward pass did.
    """
    kept = [
        (norm, name, buffer)
        for norm in stage.modules()
        if norm.training and getattr(norm, "track_running_stats", False)
        for name, buffer in norm.named_buffers(recurse=False)
    ]
    for norm, name, buffer in kept:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in kept:
            setattr(norm, name, buffer)
