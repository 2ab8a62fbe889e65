"""What a new experiment says in params.yaml beside the defaults, for `cadx new` and `cadx recommend`."""

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

FEW_SAMPLES = 1000
"""Under so many a network sees each more often, and a held-out val is small: cross-validation uses every case."""
_SMALLEST_LESION_PX = 8
_SLIVER = 1e-6  # of a step: less is rounding, and no reason for a larger patch


def image_recipe(side_px: int, channels: int, model: dict[str, Any]) -> dict[str, Any]:
    """The `train` section for classes of whole images: careful augmentation, each image's own brightness undone."""
    return {
        "model": model,
        "preprocessing": {
            "channels": channels,
            "height_px": side_px,
            "width_px": side_px,
            "intensity": "image",
        },
        "augmentation": {
            "rotation_degrees": 10,
            "translation_fraction": 0.05,
            "scale_fraction": 0.1,
            "brightness": 0.3,
            "contrast": 0.2,
        },
        "ema_decay": 0.99,
    }


def volume_recipe(
    model: dict[str, Any],
    size_px: Sequence[float],
    spacing_mm: Sequence[float] | None,
    *,
    most_px: int,
    step_px: int,
    has_masks: bool,
    in_hu: bool,
) -> dict[str, Any]:
    """The `train` section for volumes.

    With masks a patch shows what they mark at the volumes' own spacing. Without, a label is of a whole volume, of which
    a small patch may show nothing: one patch holds all of it, on a coarser grid where that takes one.

    Args:
        model: its section.
        size_px: depth, height, width of a usual volume; without masks of a large one, which has to go in.
        spacing_mm: between the voxels of a usual volume, in which sizes are given; None where unknown, and then nothing
            is resampled.
        most_px: longest side of a patch.
        step_px: sides are multiples of it.
        has_masks: some volumes have one.
        in_hu: voxels are in HU, and one window suits all.
    """
    patch_px = [min(most_px, step_px * math.ceil(side / step_px - _SLIVER)) for side in size_px]
    preprocessing: dict[str, Any] = {"patch_px": patch_px}
    train: dict[str, Any] = {"model": model, "preprocessing": preprocessing}
    if not has_masks:
        train |= {"patches_per_sample": 1, "positive_fraction": 0}
        reach = [max(1.0, side / patch) for side, patch in zip(size_px, patch_px, strict=True)]
        if spacing_mm is not None and max(reach) > 1:
            # Up, so that the last voxels do not make a second patch.
            preprocessing["spacing_mm"] = [
                math.ceil(1000 * mm * factor) / 1000 for mm, factor in zip(spacing_mm, reach, strict=True)
            ]
    if in_hu:
        preprocessing["window_hu"] = [-1000, 1000]
    return train | {"loss": {}, "augmentation": {"horizontal_flip": True}, "ema_decay": 0.98}


def schedule(num_samples: int, most: int) -> dict[str, Any]:
    """Batches of `most` or of fewer, so that few samples make several steps an epoch, and epochs: more where few are.

    >>> schedule(5000, 32), schedule(100, 32)
    ({'batch_size': 32, 'epochs': 16}, {'batch_size': 6, 'epochs': 40})
    """
    return {
        "batch_size": min(most, max(4, num_samples // 16)),
        "epochs": 16 if num_samples >= FEW_SAMPLES else 40,
    }


def detector_recipe(
    family: Literal["yolo", "faster_rcnn"],
    longest_px: int,
    lesion_px: tuple[float, float, float] | None,
    channels: int,
) -> dict[str, Any]:
    """The `train` section for boxes: images shrunk to 512 px, or tiles where small lesions would vanish by that.

    Args:
        family: of the detector.
        longest_px: longer side of a usual image.
        lesion_px: of `lesion_sizes_px`.
        channels: 3 if images are in colour, else 1.
    """
    low, middle, high = lesion_px or (16.0, 32.0, 64.0)
    scale = min(1.0, 512 / longest_px)
    made: dict[str, Any]
    tiles: dict[str, Any] = {}
    if low * scale < _SMALLEST_LESION_PX and scale < 1:
        made, scale = {"height_px": 256, "width_px": 256, "fit": "tile"}, 1.0
        tiles = {"patches_per_sample": 8, "positive_fraction": 0.8}
    else:
        side_px = min(512, 32 * math.ceil(longest_px / 32))
        made = {"height_px": side_px, "width_px": side_px}
    if family == "yolo":
        first = 8 if low * scale >= 32 else 4
        last = first
        while last < min(16, high * scale / 2):
            last *= 2
        strides = [stride for stride in (4, 8, 16) if first <= stride <= last]
        model: dict[str, Any] = {"family": family, "width": 0.5, "strides": strides}
    else:
        sizes = [max(4, round(middle * scale * factor / 2)) for factor in (1, 2, 4, 8)]
        model = {
            "family": family,
            "depth": 50,
            "fpn_channels": 256,
            "anchor_sizes_px": [[px] for px in sizes],
        }
    return {
        "model": model,
        "preprocessing": {"channels": channels} | made,
        "augmentation": {"horizontal_flip": True, "scale_fraction": 0.15},
        **tiles,
        "loss": {},
        "sampler": "natural",
        "epochs": 30,
        "ema_decay": 0.995,
        "grad_clip": 10,
        "batch_size": 8 if family == "yolo" else 4,
    }


def lesion_sizes_px(corners: np.ndarray) -> tuple[float, float, float] | None:
    """Square root of the boxes' areas: 5th, 50th and 95th percentile; None where no box has an area.

    Args:
        corners: N 4, x0 y0 x1 y1 in pixels, half-open.
    """
    corners = corners[np.all(corners[:, 2:] > corners[:, :2], axis=1)] if len(corners) else corners
    if not len(corners):
        return None
    x0, y0, x1, y1 = corners.T
    low, middle, high = np.quantile(np.sqrt((x1 - x0) * (y1 - y0)), [0.05, 0.5, 0.95]).tolist()
    return low, middle, high


def slide_recipe() -> dict[str, Any]:
    """The `train` section for whole slides: attention over tiles, whose encoder learns with it."""
    return {
        "model": {
            "family": "mil",
            "hidden_dim": 64,
            "attention_dim": 32,
            "encoder": {"depth": 18, "width": 0.25, "frozen": False},
        },
        "preprocessing": {"channels": 3, "height_px": 64, "width_px": 64, "tile_px": 64, "mpp": 1.0},
        "max_instances": 48,
        "ema_decay": 0.98,
        "monitor": "loss",
        "epochs": 30,
        "batch_size": 4,
    }


def experiment_sections(source: str, train: dict[str, Any], *, has_splits: bool) -> dict[str, Any]:
    """What a new experiment on a data set says beside the defaults: sections of params.yaml, by step."""
    return {
        "ingest": {"source": source},
        "split": {"strategy": "given" if has_splits else "patient"},
        "train": train,
        # Score the test split only once the recipe is frozen.
        "evaluate": {"split": "val"},
    }
