"""Lesions by size where whole samples are classified: are small ones found as often as large ones?

Only what has a lesion has a size, so that sensitivity, and differences of it, are all that there is to say.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from cadx.datasets import DatasetFolder
from cadx.metrics import Subgroup

ATTRIBUTE = "lesion size"
_COLUMN = "lesion_"
_NO_SIZE = "undefined: what has no lesion has no size"

Found = TypeVar("Found")


def largest_lesions(folder: DatasetFolder, sample_ids: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """One column, `lesion_<unit>`: of each sample the size of its largest lesion, NaN where none is known.

    Lesions are boxes, or connected parts of a mask. The unit is mm2, of volumes mm3; px2 where an image has no spacing.
    Empty where the dataset has neither boxes nor masks.
    """
    rows = folder.samples.iloc[folder.rows(sample_ids)]
    is_volume = folder.info.kind == "volume"
    spacings = rows[["spacing_slice_mm"] * is_volume + ["spacing_row_mm", "spacing_column_mm"]].prod(
        axis=1, skipna=False
    )
    scale = spacings.to_numpy(np.float64)
    unit = "mm3" if is_volume else "mm2"
    if np.isnan(scale).any():
        scale, unit = np.ones(len(rows)), "px2"
    boxes = folder.boxes
    sides = (boxes["x1"] - boxes["x0"]) * (boxes["y1"] - boxes["y0"])
    largest = sides.groupby(boxes["sample_id"]).max()
    sizes = largest.reindex(list(sample_ids)).to_numpy(np.float64, copy=True)
    for place, has_mask in enumerate((rows["mask_path"] != "").tolist()):
        if has_mask and math.isnan(sizes[place]):
            parts, _ = scipy.ndimage.label(folder.mask(sample_ids[place]))
            sizes[place] = np.bincount(parts.ravel())[1:].max(initial=0) or math.nan
    return {} if np.isnan(sizes).all() else {f"{_COLUMN}{unit}": sizes * scale}


def size_groups(frame: pd.DataFrame, positive: np.ndarray) -> dict[str, list[str]]:
    """The third, by size, that each positive's largest lesion is in; "" for others. Empty where sizes are unknown.

    Args:
        frame: rows with the column of `largest_lesions`, if there is one.
        positive: N bool.
    """
    columns = [name for name in frame.columns if name.startswith(_COLUMN)]
    if not columns:
        return {}
    unit, sizes = columns[0].removeprefix(_COLUMN), frame[columns[0]].to_numpy(np.float64)
    known = positive & ~np.isnan(sizes)
    if np.unique(sizes[known]).size < 3:
        return {}
    low, high = np.quantile(sizes[known], [1 / 3, 2 / 3])
    small, large = (f"{float(f'{limit:.3g}'):g} {unit}" for limit in (low, high))
    names = (f"1 up to {small}", f"2 up to {large}", f"3 above {large}")
    third = (sizes > low).astype(int) + (sizes > high)
    return {ATTRIBUTE: [names[place] if one else "" for place, one in zip(third, known, strict=True)]}


def only_sized(found: dict[str, dict[str, Found]]) -> dict[str, dict[str, Found]]:
    """Subgroups, or their gaps, without the one of all that have no lesion."""
    return {
        attribute: {word: one for word, one in groups.items() if attribute != ATTRIBUTE or word != "unknown"}
        for attribute, groups in found.items()
    }


def with_reasons(by_subgroup: Mapping[str, Mapping[str, Subgroup]]) -> dict[str, dict[str, Subgroup]]:
    """The subgroups, those of lesions with the reason why they have no specificity and no AUC."""

    def told(group: Subgroup) -> Subgroup:
        reasons = {
            name: getattr(group, name).model_copy(update={"method": _NO_SIZE})
            for name in ("specificity", "auc")
        }
        return group.model_copy(update=reasons)

    return {
        attribute: {word: told(group) if attribute == ATTRIBUTE else group for word, group in groups.items()}
        for attribute, groups in by_subgroup.items()
    }
