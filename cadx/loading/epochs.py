"""Datasets whose items are drawn anew in every epoch."""

from typing import TypeVar

import torch
from torch.utils.data import Dataset

Item = TypeVar("Item", covariant=True)


class EpochDataset(Dataset[Item]):
    """A dataset whose items are a pure function of (seed, epoch, index)."""

    def __init__(self) -> None:
        # In shared memory: loader workers that outlive an epoch see the next one.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # type: ignore[no-untyped-call]

    def set_epoch(self, epoch: int) -> None:
        """Draw the items of this epoch from now on, in loader workers too; call it between epochs."""
        self._epoch.fill_(epoch)

    @property
    def epoch(self) -> int:
        """Whose items are drawn."""
        return int(self._epoch)
