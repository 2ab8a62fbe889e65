"""Volumes as a 3D network sees them: patches at a common spacing, drawn at random or laid over all of a volume.

Invariants: a patch costs the memory of the voxels under it, never that of its volume; a voxel's value depends on
its volume alone and not on the patch that it was read with; a random patch is a pure function of (seed,
epoch, index), whatever the batch and the number of loader workers; nothing is dropped for being negative.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from cadx.datasets import DatasetFolder
from cadx.loading.epochs import EpochDataset
from cadx.loading.patches import Moments, Triple, VolumePreprocessing, VolumeSource

# Foreground voxels kept of each mask, evenly spread over it: 24 kB a volume.
_MAX_CENTRES = 4096


class Patch(NamedTuple):
    """One random patch.

    Attributes:
        image: 1 D H W float32, preprocessed.
        mask: D H W uint8, all 0 where the volume has no mask.
        is_positive: 1 or 0, whether the mask marks any stored voxel in it, also one that `mask` is too coarse to
            show; NaN where the volume has no mask.
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
            is_positive = torch.tensor(float(self.preprocessing.marks(mask, start_px)))
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
