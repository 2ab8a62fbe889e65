"""Bags of tiles from slides, and bags of feature vectors, with labels; and batches of bags of unequal size."""

import hashlib
import logging
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from cadx.datasets import DatasetFolder
from cadx.loading.epochs import EpochDataset
from cadx.loading.tiles import TilePreprocessing
from cadx.reading.slides import CACHE_BYTES, MAX_UPSAMPLING, Slide, SlidePool
from cadx.transforms import Preprocessing
from cadx.types import Kind

_LOG = logging.getLogger(__name__)


class Bag(NamedTuple):
    """One sample as a bag of T instances.

    `instances` are T C H W (tiles) or T E (features), float32; `positions_um` T 2 float64 are x and y of each tile's
    top left corner on the slide, NaN for features; `target` K float32, NaN = unlabelled; `sample` its number.
    """

    instances: torch.Tensor
    positions_um: torch.Tensor
    target: torch.Tensor
    sample: int


class BagBatch(NamedTuple):
    """N bags padded to the largest: `mask` N T is True where there is an instance; the rest as in `Bag`.

    Padding is 0 in `instances` and NaN in `positions_um`.
    """

    instances: torch.Tensor
    mask: torch.Tensor
    positions_um: torch.Tensor
    targets: torch.Tensor
    samples: torch.Tensor


def collate_bags(bags: Sequence[Bag]) -> BagBatch:
    """A batch of bags of unequal size: what a `DataLoader` takes as `collate_fn`.

    >>> bags = [Bag(torch.ones(n, 5), torch.zeros(n, 2), torch.zeros(1), n) for n in (1, 3)]
    >>> collate_bags(bags).mask.tolist()
    [[True, False, False], [True, True, True]]
    """
    longest = max(len(bag.instances) for bag in bags)
    instances = torch.empty(len(bags), longest, *bags[0].instances.shape[1:])
    positions_um = torch.full((len(bags), longest, 2), math.nan, dtype=torch.float64)
    mask = torch.zeros(len(bags), longest, dtype=torch.bool)
    for row, bag in enumerate(bags):
        number = len(bag.instances)
        instances[row, :number] = bag.instances
        instances[row, number:] = 0
        positions_um[row, :number] = bag.positions_um
        mask[row, :number] = True
    targets = torch.stack([bag.target for bag in bags])
    return BagBatch(instances, mask, positions_um, targets, torch.tensor([bag.sample for bag in bags]))


class BagDataset(EpochDataset[Bag]):
    """The samples of a dataset as bags, of which an epoch sees at most so many instances each."""

    def __init__(
        self,
        folder: DatasetFolder,
        sample_ids: Sequence[str],
        *,
        kind: Kind,
        max_instances: int | None,
        seed: int,
    ) -> None:
        if folder.info.kind != kind:
            raise ValueError(f"{folder.path}: samples of kind {folder.info.kind}; {kind} is needed here")
        if max_instances is not None and max_instances < 1:
            raise ValueError(f"at most {max_instances} instances in a bag; give 1 or more, or none for all")
        super().__init__()
        self.folder = folder
        self.sample_ids = tuple(sample_ids)
        self.labels = folder.labels(self.sample_ids)
        self.max_instances = max_instances
        self.seed = seed

    def __len__(self) -> int:
        """The number of bags."""
        return len(self.sample_ids)

    def _chosen(self, index: int, num_instances: int) -> np.ndarray:
        """Which of the bag's instances this epoch sees, ascending."""
        if self.max_instances is None or num_instances <= self.max_instances:
            return np.arange(num_instances)
        # By name: the draw does not depend on which other samples there are.
        word = int.from_bytes(hashlib.sha256(self.sample_ids[index].encode()).digest()[:8], "little")
        state = np.random.SeedSequence((self.seed, self.epoch, word))
        generator = np.random.Generator(np.random.Philox(state))
        return np.sort(generator.permutation(num_instances)[: self.max_instances])

    def _target(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.labels[index])


class FeatureBagDataset(BagDataset):
    """Bags of feature vectors: a dataset of kind features, (T E float32, positions NaN, K, number)."""

    def __init__(
        self,
        folder: DatasetFolder,
        sample_ids: Sequence[str],
        *,
        max_instances: int | None = None,
        seed: int = 0,
    ) -> None:
        """Choose the samples; bag i is `sample_ids[i]`.

        Args:
            folder: the dataset.
            sample_ids: which samples, in which order.
            max_instances: most instances of a bag in one epoch; all of them if None.
            seed: of that draw.

        Raises:
            ValueError: if the dataset is of another kind or lacks one of the samples.
        """
        super().__init__(folder, sample_ids, kind="features", max_instances=max_instances, seed=seed)

    def __getitem__(self, index: int) -> Bag:
        """One bag."""
        features = self.folder.pixels(self.sample_ids[index])
        instances = torch.from_numpy(features[self._chosen(index, len(features))])
        positions_um = torch.full((len(instances), 2), math.nan, dtype=torch.float64)
        return Bag(instances, positions_um, self._target(index), index)


class MILDataset(BagDataset):
    """Bags of tiles from slides: (T C H W float32, positions T 2 in um, K, number).

    A tile is `tile_px` pixels of `mpp` um on a side, whatever the slide's own resolution and levels. Tiles lie on a
    grid from the slide's top left corner, without overlap; those with enough tissue are in the bag. They are read
    when they are asked for: no slide is ever in memory, and a bounded number of slides is open.
    """

    def __init__(
        self,
        folder: DatasetFolder,
        sample_ids: Sequence[str],
        preprocessing: Preprocessing,
        *,
        tile_px: int = 256,
        mpp: float = 0.5,
        minimum_tissue: float = 0.5,
        max_tiles: int | None = 64,
        seed: int = 0,
        max_open: int = 16,
        cache_bytes: int = CACHE_BYTES,
        threads: int = 1,
    ) -> None:
        """Choose the samples and find their tiles, from the tissue masks alone; bag i is `sample_ids[i]`.

        Args:
            folder: the dataset, of kind slide.
            sample_ids: which samples, in which order.
            preprocessing: how a tile becomes a tensor.
            tile_px: side of a tile.
            mpp: um per pixel of a tile.
            minimum_tissue: least part of a tile, 0..1, that is tissue.
            max_tiles: most tiles of a bag in one epoch, drawn from (seed, epoch, sample); all of them if None.
            seed: of that draw.
            max_open: most slides open at a time, in each loader worker.
            cache_bytes: memory for decoded tiles, in each loader worker.
            threads: how many decode at once, in each loader worker.

        Raises:
            ValueError: one line: the dataset is of another kind or lacks one of the samples; a slide has no tile
                with so much tissue, or was not scanned so finely; it names the sample and what to change.
        """
        super().__init__(folder, sample_ids, kind="slide", max_instances=max_tiles, seed=seed)
        if not 0 < minimum_tissue <= 1:
            raise ValueError(f"minimum_tissue is {minimum_tissue:g}; give a part of a tile, over 0 to 1")
        self.preprocessing = preprocessing
        self.tile_px = tile_px
        self.mpp = mpp
        self.minimum_tissue = minimum_tissue
        self.threads = threads
        self._pool = SlidePool(max_open, cache_bytes)
        rows = folder.samples.iloc[folder.rows(self.sample_ids)]
        self._slide_mpp: list[float] = rows["slide_mpp"].tolist()
        spacings_um = rows[["spacing_row_mm", "spacing_column_mm"]].to_numpy() * 1000
        self._cells = [self._find(index, spacing) for index, spacing in enumerate(spacings_um)]

    def _find(self, index: int, spacing_um: np.ndarray) -> np.ndarray:
        """(row, column) in the grid of the slide's tiles with enough tissue, N 2 int32."""
        where = f"sample {self.sample_ids[index]!r}"
        if self._slide_mpp[index] > self.mpp * MAX_UPSAMPLING:
            raise ValueError(
                f"{where}: scanned at {self._slide_mpp[index]:g} um per pixel, too coarse for tiles of"
                f" {self.mpp:g}; raise mpp or leave the sample out"
            )
        return tissue_cells(
            self.folder.tissue(self.sample_ids[index]),
            (spacing_um[0], spacing_um[1]),
            self.tile_px * self.mpp,
            self.minimum_tissue,
            where,
        )

    def positions_um(self, index: int) -> np.ndarray:
        """Top left corners (x, y) of all the slide's tiles with enough tissue, N 2 float64, row by row."""
        return self._cells[index][:, ::-1] * (self.tile_px * self.mpp)

    def __getitem__(self, index: int) -> Bag:
        """One bag, of the chosen epoch.

        Raises:
            ValueError: if none of its tiles can be read. Where some cannot, a warning is logged.
        """
        positions_um = self.positions_um(index)
        positions_um = positions_um[self._chosen(index, len(positions_um))]
        made = self.preprocessing
        instances = torch.empty(len(positions_um), made.channels, made.height_px, made.width_px)
        places: list[int] = []
        for place, tile in self._read(index, positions_um):
            instances[len(places)] = made.apply(tile)
            places.append(place)
        return Bag(
            instances[: len(places)], torch.from_numpy(positions_um[places]), self._target(index), index
        )

    def stream(self, index: int, batch_size: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """All the slide's tiles with enough tissue, batch by batch: (B C H W float32, positions B 2 in um).

        Raises:
            ValueError: as in `__getitem__`.
        """
        tiles = self._read(index, self.positions_um(index))
        return _batches(tiles, self.positions_um(index), self.preprocessing, batch_size)

    def _read(self, index: int, positions_um: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(place in `positions_um`, tile)."""
        slide, where = self._open(index), f"sample {self.sample_ids[index]!r}"
        return _readable(slide, positions_um, self.tile_px, self.mpp, where, threads=self.threads)

    def _open(self, index: int) -> Slide:
        sample_id = self.sample_ids[index]
        try:
            return self._pool.open(self.folder.slide_path(sample_id), self._slide_mpp[index])
        except ValueError as error:
            raise ValueError(f"sample {sample_id!r}: {error}") from None


def stream_tiles(
    slide: Slide, positions_um: np.ndarray, preprocessing: TilePreprocessing, batch_size: int, where: str
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An open slide's tiles at `positions_um`, batch by batch: (B C H W float32, positions B 2 in um).

    Args:
        slide: open.
        positions_um: N 2, (x, y) of the tiles' top left corners.
        preprocessing: of the tiles.
        batch_size: B, at most.
        where: names the slide in messages.

    Raises:
        ValueError: if none of the tiles can be read. Where some cannot, they are left out and a warning is logged.
    """
    tiles = _readable(slide, positions_um, preprocessing.tile_px, preprocessing.mpp, where)
    return _batches(tiles, positions_um, preprocessing, batch_size)


def _readable(
    slide: Slide, positions_um: np.ndarray, tile_px: int, mpp: float, where: str, *, threads: int = 1
) -> Iterator[tuple[int, np.ndarray]]:
    """(place in `positions_um`, tile); damaged tiles are left out, but not all of them."""
    damaged: list[str] = []
    try:
        yield from slide.tiles(
            positions_um, tile_px, mpp, threads=threads, on_damage=lambda _, reason: damaged.append(reason)
        )
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if len(damaged) == len(positions_um):
        raise ValueError(f"{where}: none of its tiles can be read: {damaged[0]}")
    if damaged:
        number = f"{len(damaged)} of {len(positions_um)}"
        _LOG.warning("%s: %s tiles left out: %s", where, number, damaged[0])


def _batches(
    tiles: Iterator[tuple[int, np.ndarray]],
    positions_um: np.ndarray,
    preprocessing: Preprocessing,
    batch_size: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    group: list[torch.Tensor] = []
    places: list[int] = []
    for place, tile in tiles:
        group.append(preprocessing.apply(tile))
        places.append(place)
        if len(group) == batch_size:
            yield torch.stack(group), torch.from_numpy(positions_um[places])
            group, places = [], []
    if group:
        yield torch.stack(group), torch.from_numpy(positions_um[places])


def tissue_cells(
    tissue: np.ndarray, spacing_um: tuple[float, float], tile_um: float, minimum_tissue: float, where: str
) -> np.ndarray:
    """(row, column) in the grid of the tiles with enough tissue, N 2 int32, row by row.

    Args:
        tissue: H W, 0 or 1.
        spacing_um: (row, column) distance between its pixels.
        tile_um: side of a tile.
        minimum_tissue: least part of a tile, 0..1, that is tissue.
        where: names the slide in messages.

    Raises:
        ValueError: if there is none.
    """
    fractions = tissue_fractions(tissue, spacing_um, tile_um)
    cells = np.argwhere(fractions >= minimum_tissue).astype(np.int32)
    if not len(cells):
        raise ValueError(
            f"{where}: none of its {fractions.size} tiles of {tile_um:g} um has {minimum_tissue:g} of tissue"
            f" (the most is {fractions.max():.3f}; the whole slide has {tissue.mean():.3f}); lower minimum_tissue"
            " or tile_px, or leave the sample out"
        )
    return cells


def tissue_fractions(tissue: np.ndarray, spacing_um: tuple[float, float], tile_um: float) -> np.ndarray:
    """The part of each tile that is tissue, rows x columns float64, 0..1, exact to parts of a mask's pixel.

    The grid starts in the top left corner and covers the slide; what of a tile lies beyond it is no tissue.

    Args:
        tissue: H W, 0 or 1.
        spacing_um: (row, column) distance between its pixels.
        tile_um: side of a tile.

    >>> tissue_fractions(np.array([[1, 1, 0, 0]]), (10.0, 10.0), 15.0).round(3).tolist()
    [[0.667, 0.222, 0.0]]
    """
    # The integral over a picture of square pixels is bilinear between their corners.
    integral = np.pad(tissue.astype(np.float64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for axis, spacing in enumerate(spacing_um):
        step = tile_um / spacing
        # A millionth of a tile is rounding, no tile.
        num_tiles = max(1, math.ceil(tissue.shape[axis] / step - 1e-6))
        edges = np.minimum(np.arange(num_tiles + 1) * step, tissue.shape[axis])
        below = np.minimum(edges.astype(np.intp), tissue.shape[axis] - 1)
        part = (edges - below).reshape((-1, 1) if axis == 0 else (1, -1))
        first, second = integral.take(below, axis), integral.take(below + 1, axis)
        integral = first + part * (second - first)
    sums = np.diff(np.diff(integral, axis=0), axis=1)
    fractions: np.ndarray = sums * (spacing_um[0] * spacing_um[1] / tile_um**2)
    return fractions
