"""Who stands in which split: by patient, stratified; no patient crosses two."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

SPLITS = ("train", "val", "calibration", "test")
"""In the order of the work; `excluded` is none of them."""


def assign_splits(
    samples: pd.DataFrame, *, fractions: Mapping[str, float], seed: int, labels: Sequence[str]
) -> pd.Series:
    """The split of each sample, indexed like `samples`: by patient, stratified by label, then by site.

    A patient's stratum is the rarest of the labels that any of its samples carries. First every split is
    given one patient of each class; then each stratum is dealt out, site after site and large patients
    first, always to the split that is furthest behind its share of images: a stratum's shares are off by
    about one patient's images, and a site's within it by about one patient per octave of sizes.
    (scikit-learn's StratifiedGroupKFold makes equal parts only, and knows no second label.)

    Args:
        samples: columns patient, site and the label columns.
        fractions: split -> share of the images; they sum to 1.
        seed: 0 or more.
        labels: the label columns (`DatasetInfo.label_columns`); 1 = positive.

    Raises:
        ValueError: if a class has too few patients for one in every split, or the fractions are unusable.

    Source: the order of dealing, rarest first, is that of Sechidis, Tsoumakas and Vlahavas 2011, "On the
    stratification of multi-label data", ECML PKDD, algorithm 1; by patient instead of by sample.
    """
    names = list(fractions)
    if unknown := [name for name in names if name not in SPLITS]:
        raise ValueError(f"fractions: unknown split {unknown[0]!r}; use {', '.join(SPLITS)}")
    shares = np.array([fractions[name] for name in names], float)
    if (shares <= 0).any() or not math.isclose(shares.sum(), 1, abs_tol=1e-6):
        raise ValueError(f"fractions: {dict(fractions)} must be positive and sum to 1; omit unwanted splits")
    grouped = samples.groupby("patient", sort=True)
    sizes = grouped.size().to_numpy()
    sites = grouped["site"].first().to_numpy()
    positive = grouped[list(labels)].max().to_numpy(float) == 1
    num_patients = positive.sum(axis=0)
    for label, count in zip(labels, num_patients, strict=True):
        if count < len(names):
            raise _too_few_patients(label, int(count), names)

    rarest_first = np.argsort(num_patients, kind="stable")
    stratum = np.full(len(sizes), len(labels))
    for column in rarest_first[::-1]:
        stratum[positive[:, column]] = column
    shuffle = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(sizes))

    placed = np.full(len(sizes), -1)
    dealt = np.zeros((len(labels) + 1, len(names)))  # images by stratum and split

    def place(patient: int, split: int) -> None:
        placed[patient] = split
        dealt[stratum[patient], split] += sizes[patient]

    for column in rarest_first:
        members = shuffle[positive[shuffle, column]]
        for split in np.argsort(shares, kind="stable"):
            if (placed[members] == split).any():
                continue
            free = members[placed[members] < 0]
            if not len(free):
                raise _too_few_patients(labels[column], len(members), names)
            fitting = free[sizes[free] <= max(shares[split] * sizes[members].sum(), sizes[free].min())]
            place(int(fitting[0]), int(split))
    for column in [*rarest_first, len(labels)]:
        members = shuffle[(stratum[shuffle] == column) & (placed[shuffle] < 0)]
        octave = np.floor(np.log2(sizes[members])) if len(members) else members
        for patient in members[np.lexsort((sites[members].astype(str), -octave))]:
            behind = shares * (dealt[column].sum() + sizes[patient]) - dealt[column]
            place(int(patient), int(np.argmax(behind)))
    by_patient = dict(zip(grouped.size().index, placed, strict=True))
    return samples["patient"].map(by_patient).map(dict(enumerate(names))).rename("split")


def cut(
    samples: pd.DataFrame,
    splits: pd.Series,
    *,
    within: str,
    into: str,
    fraction: float,
    seed: int,
    labels: Sequence[str],
) -> pd.Series:
    """`splits` with a share of one split moved into another, by patient and stratified.

    For sets whose official splits have no calibration part.

    Args:
        samples: as for `assign_splits`.
        splits: the split of each sample, indexed like `samples`.
        within: the split to cut from, such as train.
        into: the split to make, such as calibration.
        fraction: share of the images of `within`, between 0 and 1.
        seed: 0 or more.
        labels: the label columns.

    Raises:
        ValueError: if a class has fewer than two patients in `within`, or the fraction is unusable.
    """
    inside = splits == within
    parts = assign_splits(
        samples[inside], fractions={within: 1 - fraction, into: fraction}, seed=seed, labels=labels
    )
    return splits.where(~inside, parts.reindex(splits.index))


def _too_few_patients(label: str, count: int, splits: Sequence[str]) -> ValueError:
    name = label.removeprefix("label_")
    patients = "1 patient" if count == 1 else f"{count} patients"
    return ValueError(
        f"class {name!r}: {patients}, too few for one in each of {', '.join(splits)};"
        " add patients of this class, drop it, or use fewer splits"
    )
