"""Volumes as a 3D network sees them: patches at a common spacing, drawn at random or laid over all of a volume.

Invariants: a patch costs the memory of the voxels under it, never that of its volume; a voxel's value depends on
its volume alone and not on the patch that it was read with; a random patch is a pure function of (seed,
epoch, index), whatever the batch and the number of loader workers; nothing is dropped for being negative.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch.utils.data import Dataset

from cadx.datasets import DatasetFolder
from cadx.loading.epochs import EpochDataset
from cadx.types import Config

Triple = tuple[int, int, int]
"""Voxels along D, H, W."""
Block = tuple[slice, slice, slice]

# Spacings this close are one: over 500 voxels the difference is half of one.
_SAME_SPACING = 1e-3
_SLAB_BYTES = 1 << 22
# Foreground voxels kept of each mask, evenly spread over it: 24 kB a volume.
_MAX_CENTRES = 4096


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
        """Depth, height, width of the volume at the network's spacing.

        >>> volume = VolumeSource.of_array(np.zeros((30, 200, 200), np.int16), (3.0, 0.8, 0.8))
        >>> VolumePreprocessing(patch_px=(32, 32, 32), spacing_mm=(1.5, 1.6, 1.6)).grid_px(volume)
        (60, 100, 100)
        """
        depth_px, height_px, width_px = (
            max(1, round(side_px / ratio))
            for side_px, ratio in zip(volume.shape_px, self._ratios(volume), strict=True)
        )
        return depth_px, height_px, width_px

    def centre(self, volume: VolumeSource, voxel: Sequence[int]) -> Triple:
        """The grid's voxel that holds the middle of the volume's voxel (d, h, w)."""
        depth, height, width = (
            min(last - 1, int((index + 0.5) / ratio))
            for index, ratio, last in zip(voxel, self._ratios(volume), self.grid_px(volume), strict=True)
        )
        return depth, height, width

    def apply(self, volume: VolumeSource, start_px: Triple, moments: Moments | None = None) -> torch.Tensor:
        """The network's input, 1 D H W float32: the patch at `start_px` of the volume's grid.

        Only the voxels under the patch are read. Values are interpolated linearly, over a wider stretch where
        the grid is coarser than the volume, and then normalised. What lies outside of the volume is 0.

        Args:
            volume: the voxels.
            start_px: first voxel of the patch along each axis; below 0 it starts outside.
            moments: of the whole volume; needed without `window_hu`, and read from the volume if not given.
        """
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

    def apply_to_mask(self, mask: VolumeSource, start_px: Triple) -> torch.Tensor:
        """The mask of the patch at `start_px`, D H W uint8: the nearest voxel's class, 0 outside."""
        patch = np.zeros(self.patch_px, np.uint8)
        taps, inside = self._taps(mask, start_px, "nearest")
        if taps is not None:
            depth, height, width = (tap.voxels[:, 0] for tap in taps)
            patch[inside] = mask.crop(_block(taps))[np.ix_(depth, height, width)]
        return torch.from_numpy(patch)

    def _ratios(self, volume: VolumeSource) -> tuple[float, ...]:
        """Voxels of the volume per voxel of the grid."""
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
        for start, patch_px, grid_px, side_px, ratio in zip(
            start_px, self.patch_px, self.grid_px(volume), volume.shape_px, self._ratios(volume), strict=True
        ):
            first, last = max(start, 0), min(start + patch_px, grid_px)
            if first >= last:
                return None, (slice(0, 0), slice(0, 0), slice(0, 0))
            taps.append(_axis_taps(first, last, side_px, ratio, order))
            inside.append(slice(first - start, last - start))
        return taps, (inside[0], inside[1], inside[2])


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


class Patch(NamedTuple):
    """One random patch.

    Attributes:
        image: 1 D H W float32, preprocessed.
        mask: D H W uint8, all 0 where the volume has no mask.
        is_positive: 1 or 0, whether the mask marks anything in it; NaN where the volume has no mask.
        labels: K float32, those of the volume, NaN = unlabelled.
        item: its index in the dataset.
    """

    image: torch.Tensor
    mask: torch.Tensor
    is_positive: torch.Tensor
    labels: torch.Tensor
    item: int


class Patch3DDataset(EpochDataset[Patch]):
    """Random patches of volumes, a fixed number of each an epoch; item i is of volume i // patches_per_volume.

    The share `positive_fraction` is centred on a voxel of the mask, where there is one; the rest lies anywhere
    in the volume, so that patches without a finding are as frequent as they are asked to be.
    """

    def __init__(
        self,
        folder: DatasetFolder,
        sample_ids: Sequence[str],
        preprocessing: VolumePreprocessing,
        *,
        patches_per_volume: int,
        positive_fraction: float,
        seed: int,
    ) -> None:
        """Choose the volumes.

        Args:
            folder: a dataset of volumes.
            sample_ids: which volumes, in which order.
            preprocessing: size, spacing and intensities of the patches.
            patches_per_volume: how many patches of each volume an epoch holds.
            positive_fraction: 0..1, expected share of patches centred in the mask.
            seed: of the run, 0 or more.

        Raises:
            ValueError: if a number is out of range, the dataset lacks one of the samples or holds no volumes.
        """
        if patches_per_volume < 1 or not 0 <= positive_fraction <= 1:
            raise ValueError("patches_per_volume must be at least 1, and positive_fraction within 0 to 1")
        super().__init__()
        self.sample_ids = tuple(sample_ids)
        self.preprocessing = preprocessing
        self.patches_per_volume = patches_per_volume
        self.positive_fraction = positive_fraction
        self.seed = seed
        self.labels = folder.labels(self.sample_ids)
        self._volumes = [VolumeSource.of_folder(folder, name) for name in self.sample_ids]
        has_mask = (folder.samples["mask_path"].iloc[folder.rows(self.sample_ids)] != "").tolist()
        self._masks = [
            VolumeSource.of_folder(folder, name, "mask") if has else None
            for name, has in zip(self.sample_ids, has_mask, strict=True)
        ]
        self._centres: dict[int, np.ndarray] = {}
        self._moments: dict[int, Moments] = {}

    def warm(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read once what is needed of whole volumes: before loader workers fork, so that they share it.

        Args:
            progress: called with (volumes done, volumes in all) after each volume.
        """
        for number in range(len(self.sample_ids)):
            self._volume_moments(number)
            if self.positive_fraction > 0:
                self._mask_centres(number)
            if progress is not None:
                progress(number + 1, len(self.sample_ids))

    def __len__(self) -> int:
        """The number of patches in an epoch."""
        return len(self.sample_ids) * self.patches_per_volume

    def __getitem__(self, index: int) -> Patch:
        """The patch of this index in the current epoch."""
        number = self._number(index)
        volume, mask = self._volumes[number], self._masks[number]
        start_px = self.start_px(index)
        image = self.preprocessing.apply(volume, start_px, self._volume_moments(number))
        if mask is None:
            marked = torch.zeros(self.preprocessing.patch_px, dtype=torch.uint8)
            is_positive = torch.tensor(math.nan)
        else:
            marked = self.preprocessing.apply_to_mask(mask, start_px)
            is_positive = marked.any().float()
        return Patch(image, marked, is_positive, torch.from_numpy(self.labels[number]), index)

    def start_px(self, index: int) -> Triple:
        """Where the patch of this index starts on its volume's grid, in the current epoch; below 0: outside."""
        number = self._number(index)
        rng = np.random.default_rng((self.seed, self.epoch, index))
        grid_px, patch_px = self.preprocessing.grid_px(self._volumes[number]), self.preprocessing.patch_px
        wants_positive = rng.random() < self.positive_fraction
        centres = self._mask_centres(number) if wants_positive else ()
        if len(centres):
            voxel = centres[int(rng.integers(len(centres)))]
            centre = self.preprocessing.centre(self._volumes[number], voxel)
            starts = [middle - side // 2 for middle, side in zip(centre, patch_px, strict=True)]
        else:
            starts = [
                int(rng.integers(max(0, grid - side) + 1))
                for grid, side in zip(grid_px, patch_px, strict=True)
            ]
        depth, height, width = (
            min(max(start, 0), grid - side) if grid >= side else (grid - side) // 2
            for start, grid, side in zip(starts, grid_px, patch_px, strict=True)
        )
        return depth, height, width

    def _number(self, index: int) -> int:
        """The volume of an item."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        return index // self.patches_per_volume

    def _volume_moments(self, number: int) -> Moments | None:
        if self.preprocessing.window_hu is not None:
            return None
        if number not in self._moments:
            self._moments[number] = self._volumes[number].moments()
        return self._moments[number]

    def _mask_centres(self, number: int) -> np.ndarray:
        """Up to `_MAX_CENTRES` voxels (d, h, w) of the mask, evenly spread over all that it marks."""
        mask = self._masks[number]
        if number not in self._centres:
            self._centres[number] = np.empty((0, 3), np.int32) if mask is None else _marked_voxels(mask)
        return self._centres[number]


def _marked_voxels(mask: VolumeSource) -> np.ndarray:
    num_marked = sum(int(np.count_nonzero(slab)) for slab in mask.slabs())
    ranks = np.unique(np.linspace(0, num_marked - 1, min(num_marked, _MAX_CENTRES)).astype(np.int64))
    voxels, first, seen = [], 0, 0
    for slab in mask.slabs():
        flat = np.flatnonzero(slab)
        wanted = ranks[(ranks >= seen) & (ranks < seen + len(flat))] - seen
        voxels.append(np.stack(np.unravel_index(flat[wanted], slab.shape), axis=1) + np.array([first, 0, 0]))
        first, seen = first + len(slab), seen + len(flat)
    return np.concatenate(voxels).astype(np.int32)


class GridPatches(Dataset[torch.Tensor]):
    """Patches that cover a whole volume with overlap, 1 D H W float32 each, and the way back from them.

    A volume smaller than a patch lies in the middle of one, surrounded by 0.
    """

    def __init__(
        self, volume: VolumeSource, preprocessing: VolumePreprocessing, overlap: float = 0.5
    ) -> None:
        """Lay the patches.

        Args:
            volume: the voxels.
            preprocessing: size, spacing and intensities of the patches.
            overlap: 0..1, least share of a patch's side that its neighbour covers too.

        Raises:
            ValueError: if the overlap is out of range.
        """
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap {overlap} must be at least 0 and below 1")
        self.volume = volume
        self.preprocessing = preprocessing
        self.grid_px = preprocessing.grid_px(volume)
        sides = zip(self.grid_px, preprocessing.patch_px, strict=True)
        self._axes = [_axis_starts(grid, side, overlap) for grid, side in sides]
        self.starts_px: tuple[Triple, ...] = tuple(
            (depth, height, width)
            for depth in self._axes[0]
            for height in self._axes[1]
            for width in self._axes[2]
        )
        """Where each patch starts on the volume's grid; below 0 it starts outside."""
        self._moments = volume.moments() if preprocessing.window_hu is None else None

    def __len__(self) -> int:
        """The number of patches."""
        return len(self.starts_px)

    def __getitem__(self, index: int) -> torch.Tensor:
        """The preprocessed patch, 1 D H W float32."""
        return self.preprocessing.apply(self.volume, self.starts_px[index], self._moments)

    def assemble(self, patches: Iterable[np.ndarray]) -> np.ndarray:
        """The map over the volume's grid, C D H W float32, from one C d h w per patch, in the patches' order.

        Where patches overlap, each counts by the product of its distances from its own faces: a network knows
        least at the border of what it sees.

        Raises:
            ValueError: if there are more or fewer maps than patches, or one has another size than a patch.
        """
        patch_px = self.preprocessing.patch_px
        tents = [_tent(side) for side in patch_px]
        weight = tents[0][:, None, None] * tents[1][:, None] * tents[2]
        total: np.ndarray | None = None
        num_patches = 0
        for patch in patches:
            if num_patches >= len(self) or patch.shape[1:] != patch_px or patch.ndim != 4:
                raise ValueError(
                    f"map {num_patches} of {len(self)}: its shape is {patch.shape}; give C {patch_px}"
                )
            if total is None:
                total = np.zeros((len(patch), *self.grid_px), np.float32)
            target, source = [slice(None)], [slice(None)]
            for start, side, grid in zip(self.starts_px[num_patches], patch_px, self.grid_px, strict=True):
                first, last = max(start, 0), min(start + side, grid)
                target.append(slice(first, last))
                source.append(slice(first - start, last - start))
            total[tuple(target)] += (patch * weight)[tuple(source)]
            num_patches += 1
        if total is None or num_patches < len(self):
            raise ValueError(f"{num_patches} maps for {len(self)} patches; give one for each, in their order")
        # The sum of all weights is a product too, so that three vectors suffice.
        for axis, (starts, tent, grid) in enumerate(zip(self._axes, tents, self.grid_px, strict=True)):
            covered = np.zeros(grid, np.float32)
            for start in starts:
                first, last = max(start, 0), min(start + len(tent), grid)
                covered[first:last] += tent[first - start : last - start]
            total /= covered.reshape([1, *(grid if axis == other else 1 for other in range(3))])
        return total


def _axis_starts(grid_px: int, patch_px: int, overlap: float) -> list[int]:
    """Evenly spread starts, the first patch at one end and the last at the other."""
    if grid_px <= patch_px:
        return [(grid_px - patch_px) // 2]
    num_steps = math.ceil((grid_px - patch_px) / max(1, math.floor(patch_px * (1 - overlap))))
    return [round(step * (grid_px - patch_px) / num_steps) for step in range(num_steps + 1)]


def _tent(side_px: int) -> np.ndarray:
    distance = np.minimum(np.arange(side_px) + 1, side_px - np.arange(side_px))
    return (distance / distance.max()).astype(np.float32)
