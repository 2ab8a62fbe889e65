"""How a patch of a volume is read at the network's spacing; `cadx.loading.volumes` says which patches.

Torch is imported where a tensor is made and nowhere else: steps that read a bundle's description make none.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, NamedTuple, Self

import numpy as np
from pydantic import Field, model_validator

from cadx.datasets import DatasetFolder
from cadx.types import Config

if TYPE_CHECKING:
    from torch import Tensor

Triple = tuple[int, int, int]
"""Voxels along D, H, W."""
Block = tuple[slice, slice, slice]
# Spacings this close are one: over 500 voxels the difference is half of one.
_SAME_SPACING = 1e-3
_SLIVER = 1e-3  # of a grid's voxel: less is rounding, not a part of the volume
_SLAB_BYTES = 1 << 22


class Moments(NamedTuple):
    """Mean and standard deviation of a volume's voxels, in its own scale."""

    mean: float
    std: float


@dataclass(frozen=True)
class VolumeSource:
    """A volume of which blocks can be had: from a dataset's memory map, or from an array.

    Attributes:
        crop: the voxels of a block that lies inside, D H W.
        shape_px: D, H, W.
        spacing_mm: D, H, W.
    """

    crop: Callable[[Block], np.ndarray]
    shape_px: Triple
    spacing_mm: tuple[float, float, float]

    @classmethod
    def of_array(cls, voxels: np.ndarray, spacing_mm: tuple[float, float, float]) -> Self:
        """A volume in memory, D H W."""
        depth_px, height_px, width_px = voxels.shape
        return cls(voxels.__getitem__, (depth_px, height_px, width_px), spacing_mm)

    @classmethod
    def of_folder(
        cls, folder: DatasetFolder, sample_id: str, layer: Literal["pixels", "mask"] = "pixels"
    ) -> Self:
        """A volume of a dataset, or its mask.

        Raises:
            ValueError: if the dataset has no such sample, or its samples are no volumes.
        """
        if folder.info.kind != "volume":
            raise ValueError(
                f"{folder.path}: its samples are of kind {folder.info.kind}; give a dataset of volumes"
            )
        row = folder.samples.iloc[int(folder.rows([sample_id])[0])]
        return cls(
            partial(_crop, folder, sample_id, layer),
            (int(row["depth_px"]), int(row["height_px"]), int(row["width_px"])),
            (float(row["spacing_slice_mm"]), float(row["spacing_row_mm"]), float(row["spacing_column_mm"])),
        )

    def slabs(self) -> Iterable[np.ndarray]:
        """All voxels from index 0 on, a few slices at a time."""
        depth_px, height_px, width_px = self.shape_px
        step_px = max(1, _SLAB_BYTES // (4 * height_px * width_px))
        for first in range(0, depth_px, step_px):
            last = min(first + step_px, depth_px)
            yield self.crop((slice(first, last), slice(0, height_px), slice(0, width_px)))

    def moments(self) -> Moments:
        """Mean and standard deviation of all voxels, read a few slices at a time.

        >>> VolumeSource.of_array(np.array([[[0, 2]], [[4, 6]]], np.int16), (1, 1, 1)).moments()
        Moments(mean=3.0, std=2.23606797749979)
        """
        count, mean, squares = 0, 0.0, 0.0
        for slab in self.slabs():
            # Slab after slab about their own means: one pass, without the cancellation of sums of squares.
            # Source: Chan, Golub and LeVeque 1983, Am Stat 37(3):242-247, equations 2.1.
            slab_mean = float(slab.mean(dtype=np.float64))
            slab_squares = float(
                np.square(slab - np.float32(slab_mean), dtype=np.float32).sum(dtype=np.float64)
            )
            slab_squares -= slab.size * (slab_mean - float(np.float32(slab_mean))) ** 2
            total = count + slab.size
            squares += slab_squares + (slab_mean - mean) ** 2 * count * slab.size / total
            mean += (slab_mean - mean) * slab.size / total
            count = total
        return Moments(mean, math.sqrt(max(0.0, squares) / count))


def _crop(
    folder: DatasetFolder, sample_id: str, layer: Literal["pixels", "mask"], block: Block
) -> np.ndarray:
    return folder.crop(sample_id, block, layer)


class VolumePreprocessing(Config):
    """How voxels become a 3D network's input: part of the bundle, the same in training and serving."""

    channels: int = Field(default=1, ge=1, le=1, description="1: a volume has one number per voxel")
    patch_px: Triple = Field(description="depth, height, width of the network's input")
    spacing_mm: tuple[float, float, float] | None = Field(
        default=None,
        description="of the network's input along depth, height, width; null keeps each volume's own",
    )
    window_hu: tuple[float, float] | None = Field(
        default=None,
        description="the values that become 0 and 1, all beyond them cut off: for CT, in HU; null takes each "
        "volume's own mean and standard deviation as 0 and 1: for MR, which has no common scale",
    )
    mirrors: bool = Field(
        default=False,
        description="answer with the mean over a patch and its mirror images along all axes, of all sets of axes: "
        "eight times the work; for networks that have learned from mirror images",
    )

    @model_validator(mode="after")
    def _meaningful(self) -> Self:
        if min(self.patch_px) < 1:
            raise ValueError(f"patch_px {self.patch_px} must be three numbers of at least 1")
        if self.spacing_mm is not None and not all(0 < mm < math.inf for mm in self.spacing_mm):
            raise ValueError(f"spacing_mm {self.spacing_mm} must be three positive numbers, or null")
        if self.window_hu is not None and not -math.inf < self.window_hu[0] < self.window_hu[1] < math.inf:
            raise ValueError(f"window_hu {self.window_hu} must be a lower and a higher number, or null")
        return self

    def grid_px(self, volume: VolumeSource) -> Triple:
        """Depth, height, width of the volume at the network's spacing; the last voxels may reach beyond its end.

        >>> volume = VolumeSource.of_array(np.zeros((30, 200, 200), np.int16), (3.0, 0.8, 0.8))
        >>> VolumePreprocessing(patch_px=(32, 32, 32), spacing_mm=(1.5, 1.6, 1.6)).grid_px(volume)
        (60, 100, 100)
        """
        depth_px, height_px, width_px = (
            max(1, math.ceil(side_px / ratio - _SLIVER))
            for side_px, ratio in zip(volume.shape_px, self.ratios(volume), strict=True)
        )
        return depth_px, height_px, width_px

    def centre(self, volume: VolumeSource, voxel: Sequence[int]) -> Triple:
        """The grid's voxel that holds the middle of the volume's voxel (d, h, w)."""
        depth, height, width = (
            int(_cells(np.array(index), ratio, last))
            for index, ratio, last in zip(voxel, self.ratios(volume), self.grid_px(volume), strict=True)
        )
        return depth, height, width

    def apply(self, volume: VolumeSource, start_px: Triple, moments: Moments | None = None) -> "Tensor":
        """The network's input, 1 D H W float32: the patch at `start_px` of the volume's grid.

        Only the voxels under the patch are read. Values are interpolated linearly, over a wider stretch where
        the grid is coarser than the volume, and then normalised. What lies outside of the volume is 0.

        Args:
            volume: the voxels.
            start_px: first voxel of the patch along each axis; below 0 it starts outside.
            moments: of the whole volume; needed without `window_hu`, and read from the volume if not given.
        """
        import torch

        patch = np.zeros(self.patch_px, np.float32)
        taps, inside = self._taps(volume, start_px, "linear")
        if taps is None:
            return torch.from_numpy(patch[None])
        values = _interpolate(volume.crop(_block(taps)).astype(np.float32), taps)
        if self.window_hu is not None:
            low, high = self.window_hu
            values -= np.float32(low)
            values *= np.float32(1 / (high - low))
            np.clip(values, 0, 1, out=values)
        else:
            mean, std = moments or volume.moments()
            values -= np.float32(mean)
            values *= np.float32(1 / std if std > 0 else 0)
        patch[inside] = values
        return torch.from_numpy(patch[None])

    def apply_to_mask(self, mask: VolumeSource, start_px: Triple) -> "Tensor":
        """The mask of the patch at `start_px`, D H W uint8: the nearest voxel's class, 0 outside."""
        import torch

        patch = np.zeros(self.patch_px, np.uint8)
        taps, inside = self._taps(mask, start_px, "nearest")
        if taps is not None:
            depth, height, width = (tap.voxels[:, 0] for tap in taps)
            patch[inside] = mask.crop(_block(taps))[np.ix_(depth, height, width)]
        return torch.from_numpy(patch)

    def marks(self, mask: VolumeSource, start_px: Triple) -> bool:
        """Whether the mask marks anything in the patch at `start_px`: any stored voxel under it, not the nearest alone.

        Only these voxels are read.
        """
        block = []
        for first, last, grid_px, side_px, ratio in self._axes(mask, start_px):
            if first >= last:
                return False
            block.append(_voxels_under(first, last, grid_px, side_px, ratio))
        return bool(mask.crop((block[0], block[1], block[2])).any())

    def ratios(self, volume: VolumeSource) -> tuple[float, ...]:
        """Voxels of the volume per voxel of the grid, along D, H, W."""
        ratios = (
            wanted_mm / have_mm
            for wanted_mm, have_mm in zip(
                self.spacing_mm or volume.spacing_mm, volume.spacing_mm, strict=True
            )
        )
        return tuple(1.0 if abs(ratio - 1) <= _SAME_SPACING else ratio for ratio in ratios)

    def _taps(
        self, volume: VolumeSource, start_px: Triple, order: Literal["linear", "nearest"]
    ) -> tuple[list["_Taps"] | None, Block]:
        """How each axis is read, None if all of the patch lies outside; and the part of the patch inside."""
        taps, inside = [], []
        for start, (first, last, _, side_px, ratio) in zip(
            start_px, self._axes(volume, start_px), strict=True
        ):
            if first >= last:
                return None, (slice(0, 0), slice(0, 0), slice(0, 0))
            taps.append(_axis_taps(first, last, side_px, ratio, order))
            inside.append(slice(first - start, last - start))
        return taps, (inside[0], inside[1], inside[2])

    def _axes(self, volume: VolumeSource, start_px: Triple) -> Iterable[tuple[int, int, int, int, float]]:
        """Of each axis: first and last grid voxel under a patch, the grid's and the volume's side, the ratio."""
        for start, patch_px, grid_px, side_px, ratio in zip(
            start_px, self.patch_px, self.grid_px(volume), volume.shape_px, self.ratios(volume), strict=True
        ):
            yield max(start, 0), min(start + patch_px, grid_px), grid_px, side_px, ratio


class _Taps(NamedTuple):
    """How one axis of a block is read: voxels first..last, and of these the weighted sum for each output.

    `voxels` (N taps, counted from `first`) and `weight` (N taps, rows sum to 1).
    """

    first: int
    last: int
    voxels: np.ndarray
    weight: np.ndarray


def _axis_taps(
    first: int, last: int, side_px: int, ratio: float, order: Literal["linear", "nearest"]
) -> _Taps:
    """Taps for grid voxels first..last, edges aligned: the first grid voxel starts where the volume does.

    Beyond its edges the volume is taken to go on as its outermost voxels.
    """
    middles = (np.arange(first, last) + 0.5) * ratio  # in voxels from the volume's edge
    if order == "nearest" or ratio == 1:
        voxels = np.minimum(middles.astype(np.intp), side_px - 1)[:, None]
        weight = np.ones(voxels.shape, np.float32)
    else:
        reach = max(1.0, ratio)
        offsets = np.arange(1 - math.ceil(reach), math.ceil(reach) + 1)
        voxels = np.floor(middles - 0.5).astype(np.intp)[:, None] + offsets
        weight = np.maximum(0.0, 1 - np.abs(voxels + 0.5 - middles[:, None]) / reach)
        weight = (weight / weight.sum(axis=1, keepdims=True)).astype(np.float32)
        voxels = np.clip(voxels, 0, side_px - 1)
    low, high = int(voxels.min()), int(voxels.max())
    return _Taps(low, high + 1, voxels - low, weight)


def _cells(voxels: np.ndarray, ratio: float, grid_px: int) -> np.ndarray:
    """The grid voxels that hold the middles of the volume's voxels, along one axis."""
    return np.minimum(((voxels + 0.5) / ratio).astype(np.intp), grid_px - 1)


def _voxels_under(first: int, last: int, grid_px: int, side_px: int, ratio: float) -> slice:
    """The volume's voxels under grid voxels first..last: those whose middle lies there.

    Of a finer grid, those that hold the middle of one of its voxels: what `nearest` takes.
    """
    if ratio <= 1:
        nearest = _axis_taps(first, last, side_px, ratio, "nearest")
        return slice(nearest.first, nearest.last)
    low, high = np.searchsorted(_cells(np.arange(side_px), ratio, grid_px), (first, last))
    return slice(int(low), int(high))


def _block(taps: Sequence[_Taps]) -> Block:
    depth, height, width = (slice(tap.first, tap.last) for tap in taps)
    return depth, height, width


def _interpolate(block: np.ndarray, taps: Sequence[_Taps]) -> np.ndarray:
    # Axis by axis, tap by tap: no BLAS, whose sums depend on the processor.
    for axis, tap in enumerate(taps):
        if tap.weight.shape[1] == 1:
            continue  # the block's own voxels
        shape = [1, 1, 1]
        shape[axis] = len(tap.voxels)
        total = np.zeros([*block.shape[:axis], len(tap.voxels), *block.shape[axis + 1 :]], np.float32)
        for voxels, weight in zip(tap.voxels.T, tap.weight.T, strict=True):
            total += block.take(voxels, axis) * weight.reshape(shape)
        block = total
    return block
