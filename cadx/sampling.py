"""How unequal classes are, and in which order samples are drawn: a pure function of (seed, epoch)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple, TypedDict, overload

import numpy as np
import pandas as pd


class ClassBalance(TypedDict):
    """The figures of one class."""

    count: int
    percentage: float
    imbalance_factor: float


@overload
def analyze_class_imbalance(
    labels: Sequence[Any] | pd.Series | pd.DataFrame,
    *,
    classes: Sequence[Hashable] | None = None,
    patients: Sequence[Any] | pd.Series | None = None,
    groups: None = None,
) -> dict[Any, ClassBalance]: ...
@overload
def analyze_class_imbalance(
    labels: Sequence[Any] | pd.Series | pd.DataFrame,
    *,
    classes: Sequence[Hashable] | None = None,
    patients: Sequence[Any] | pd.Series | None = None,
    groups: Sequence[Any] | pd.Series,
) -> dict[Any, dict[Any, ClassBalance]]: ...
def analyze_class_imbalance(
    labels: Sequence[Any] | pd.Series | pd.DataFrame,
    *,
    classes: Sequence[Hashable] | None = None,
    patients: Sequence[Any] | pd.Series | None = None,
    groups: Sequence[Any] | pd.Series | None = None,
) -> dict[Any, Any]:
    """Count, percentage and imbalance factor (largest count / count) of each class.

    `percentage` is of what is labelled for the class. A class without samples has count 0 and an infinite
    imbalance factor; a class without labels has percentage NaN.

    Args:
        labels: N labels (None or NaN = unlabelled), or a table with a column per class, of 1, 0 and NaN =
            unlabelled: one-hot or multilabel. Boxes are flat labels: one per box.
        classes: all classes, in the order of the answer; else the table's columns, or as they appear.
        patients: N patients: count patients, who have a class if any of their samples has it.
        groups: N groups, such as sites: answer for each, group -> class -> figures.

    >>> analyze_class_imbalance(["normal"] * 3 + ["cancer"])["cancer"]
    {'count': 1, 'percentage': 25.0, 'imbalance_factor': 3.0}
    """
    table = labels.reset_index(drop=True) if isinstance(labels, pd.DataFrame) else _one_hot(labels, classes)
    if classes is not None:
        table = table.reindex(columns=list(classes))
    if groups is not None:
        keys = pd.Series(list(groups))
        members = pd.Series(list(patients)) if patients is not None else None
        return {
            group: analyze_class_imbalance(
                table.iloc[rows], patients=None if members is None else members.iloc[rows]
            )
            for group, rows in keys.groupby(keys, sort=True).indices.items()
        }
    if patients is not None:
        # A series: pandas takes a list whose values name columns for those columns.
        table = table.groupby(pd.Series(list(patients), table.index)).max()
    counts = (table == 1).sum()
    labelled = table.notna().sum()
    largest = counts.max()
    return {
        name: ClassBalance(
            count=int(count),
            percentage=100 * float(count) / float(known) if known else math.nan,
            imbalance_factor=float(largest) / float(count) if count else math.inf,
        )
        for name, count, known in zip(table.columns, counts, labelled, strict=True)
    }


BOX_SIZES_PX = {"small": 32.0**2, "medium": 96.0**2, "large": math.inf}
"""Size -> the area in stored pixels that a box of it stays below.

Source: the COCO detection challenge, "Metrics", which scores these three apart.
"""


def count_box_sizes(boxes: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Class -> size (`BOX_SIZES_PX`) -> number of boxes, classes in alphabetical order.

    Args:
        boxes: columns class, x0, y0, x1, y1 in stored pixels. A box without an area is small.

    >>> corners = {"x0": [0, 0], "y0": [0, 0], "x1": [31, 32], "y1": [32, 32]}
    >>> count_box_sizes(pd.DataFrame({"class": ["cell", "cell"], **corners}))
    {'cell': {'small': 1, 'medium': 1, 'large': 0}}
    """
    sides = (boxes["x1"] - boxes["x0"]).clip(lower=0), (boxes["y1"] - boxes["y0"]).clip(lower=0)
    limits = list(BOX_SIZES_PX.values())
    size = np.searchsorted(limits, sides[0] * sides[1], side="right")
    table = pd.crosstab(boxes["class"], size).reindex(columns=range(len(limits)), fill_value=0)
    return {
        str(name): dict(zip(BOX_SIZES_PX, map(int, row), strict=True))
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    }


def _one_hot(
    labels: Sequence[Any] | pd.Series | np.ndarray, classes: Sequence[Hashable] | None
) -> pd.DataFrame:
    """A column of 1 and 0 per class; rows without a label are NaN."""
    flat = pd.Series(list(labels), dtype=object)
    known = flat.notna()
    found = list(dict.fromkeys(flat[known]))
    if classes is not None and (unknown := [label for label in found if label not in classes]):
        raise ValueError(
            f"labels: {unknown[0]!r} is not among the classes {', '.join(map(str, classes))}; add it there"
        )
    return pd.DataFrame({name: (flat == name).astype(float).where(known) for name in (classes or found)})


class _EpochOrder(ABC):
    """A sampler whose order is a pure function of (seed, epoch), divided among `world_size` processes.

    All processes see the same global order; rank r takes places r, r + world_size, ... of it. Where its
    length is no multiple of world_size, the order's first places are repeated at its end, so that all
    ranks yield equally many.
    """

    def __init__(self, num_samples: int, *, seed: int, rank: int, world_size: int) -> None:
        assert 0 <= rank < world_size, f"rank {rank} of {world_size}"
        self.num_samples = num_samples
        self.seed = seed
        self.epoch = 0
        self._rank = rank
        self._world_size = world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration yields."""
        self.epoch = epoch

    def epoch_indices(self, epoch: int) -> np.ndarray:
        """This rank's sample indices of an epoch, in order: a resumed run skips to its step in it."""
        padded = len(self) * self._world_size
        return np.resize(self._global_order(epoch), padded)[self._rank :: self._world_size]

    def __len__(self) -> int:
        """How many indices an iteration yields."""
        return math.ceil(self.num_samples / self._world_size)

    def __iter__(self) -> Iterator[int]:
        """The indices of the chosen epoch."""
        return iter(self.epoch_indices(self.epoch).tolist())

    @abstractmethod
    def _global_order(self, epoch: int) -> np.ndarray:
        """The indices of all ranks, `num_samples` of them."""

    def _shuffled(self, indices: np.ndarray, epoch: int) -> np.ndarray:
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((self.seed, epoch))))
        return generator.permutation(indices)


class EpochSampler(_EpochOrder):
    """Every labelled sample once per epoch, shuffled."""

    def __init__(
        self, labels: np.ndarray | Sequence[Any], *, seed: int, rank: int = 0, world_size: int = 1
    ) -> None:
        """Prepare the draws.

        Args:
            labels: N K, NaN = unlabelled, or N flat labels.
            seed: 0 or more.
            rank: this process, 0-based.
            world_size: number of processes.

        Raises:
            ValueError: if nothing is labelled.
        """
        self._labelled = np.flatnonzero(_pools(labels).labelled)
        super().__init__(len(self._labelled), seed=seed, rank=rank, world_size=world_size)

    def _global_order(self, epoch: int) -> np.ndarray:
        return self._shuffled(self._labelled, epoch)


class BalancedSampler(_EpochOrder):
    """Epochs in which every class is drawn equally often, within one, shuffled.

    A multilabel sample belongs to each class that it carries, and to a class of its own, "all negative",
    if it carries none. A class goes through all of its samples, in random order and across epochs, before
    one is repeated. Samples without any label are never drawn.
    """

    def __init__(
        self,
        labels: np.ndarray | Sequence[Any],
        *,
        seed: int,
        num_samples: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        """Prepare the draws.

        Args:
            labels: N K, NaN = unlabelled, or N flat labels.
            seed: 0 or more.
            num_samples: draws per epoch over all processes; N by default.
            rank: this process, 0-based.
            world_size: number of processes.

        Raises:
            ValueError: if nothing is labelled.
        """
        pools = _pools(labels)
        self._members = [members for members in pools.members if len(members)]
        super().__init__(
            len(pools.labelled) if num_samples is None else num_samples,
            seed=seed,
            rank=rank,
            world_size=world_size,
        )

    def _global_order(self, epoch: int) -> np.ndarray:
        # Draw number g of the whole run is the next sample of class g mod C: epochs cut this one sequence,
        # so that classes stay balanced, and no sample is repeated early, over epochs too.
        draws = np.arange(epoch * self.num_samples, (epoch + 1) * self.num_samples)
        order = np.empty(len(draws), np.intp)
        for number, members in enumerate(self._members):
            mine = draws % len(self._members) == number
            order[mine] = self._stream(number, members, draws[mine] // len(self._members))
        return self._shuffled(order, epoch)

    def _stream(self, number: int, members: np.ndarray, places: np.ndarray) -> np.ndarray:
        """The samples at consecutive places of a class's endless sequence of permutations."""
        if not len(places):
            return members[:0]
        first, last = places[0] // len(members), places[-1] // len(members)
        # Philox counts in blocks of four words: whole blocks per permutation let any one be computed alone.
        blocks = -(-len(members) // 4)
        bits = np.random.Philox(np.random.SeedSequence((self.seed, number), spawn_key=(0,)))
        keys = bits.advance(int(first) * blocks).random_raw(int(last - first + 1) * blocks * 4)
        ranks = np.argsort(keys.reshape(-1, blocks * 4)[:, : len(members)], axis=1, kind="stable")
        stream: np.ndarray = members[ranks.ravel()[places - first * len(members)]]
        return stream


class _Pools(NamedTuple):
    labelled: np.ndarray  # N bool
    members: list[np.ndarray]  # per class, and last "all negative": sample indices


def _pools(labels: np.ndarray | Sequence[Any]) -> _Pools:
    values = np.asarray(labels)
    if values.ndim == 1:
        values = _one_hot(labels, None).to_numpy(float)
    labelled = ~np.isnan(values).all(axis=1)
    if not labelled.any():
        raise ValueError("labels: no sample is labelled; label some before training")
    positive = values == 1
    members = [np.flatnonzero(column) for column in positive.T]
    return _Pools(labelled, [*members, np.flatnonzero(labelled & ~positive.any(axis=1))])
