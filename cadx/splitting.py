"""Who stands in which split: by patient, stratified; no patient crosses two.

`assign_splits` deals out any shares of any labels. `kfold` and `leave_site_out` choose who judges, fold by fold
or site by site, and leave the division of the rest to it. `cut` completes official splits.
"""

import math
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

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
    about one patient's images, and a site's within it by about one patient per octave of sizes. Where
    samples carry several labels, the share that counts is of the images with the stratum's label, wherever
    they were dealt before. (scikit-learn's StratifiedGroupKFold makes equal parts only, and knows no second
    label.)

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
    return _deal(samples, dict(zip(names, shares, strict=True)), seed=seed, labels=labels).rename("split")


def kfold(
    samples: pd.DataFrame,
    *,
    fold: int,
    num_folds: int,
    fractions: Mapping[str, float],
    seed: int,
    labels: Sequence[str],
) -> pd.Series:
    """The split of each sample where fold number `fold` of `num_folds` is test: by patient, stratified.

    The folds of one seed part the patients: over all of them, each sample is in test once. The other splits
    are cut from the rest by `assign_splits`. Folds are scikit-learn's StratifiedGroupKFold where samples carry
    one label; it knows no second one and may leave a fold without a rare class, and then the folds are those
    of `assign_splits` with equal shares, which gives every fold a patient of each class.

    Args:
        samples: as for `assign_splits`.
        fold: 0-based.
        num_folds: 2 or more.
        fractions: as for `assign_splits`; test is 1 / num_folds, and the others keep their proportions.
        seed: 0 or more.
        labels: the label columns.

    Raises:
        ValueError: if a class has too few patients for one in every fold and split.
    """
    assert 0 <= fold < num_folds, f"fold {fold} of {num_folds}"
    num_patients = (samples[list(labels)] == 1).groupby(samples["patient"]).any().sum()
    for label, count in num_patients.items():
        if count < num_folds:
            raise _too_few_patients(str(label), int(count), f"each of {num_folds} folds")
    if (patients := samples["patient"].nunique()) < num_folds:
        raise ValueError(f"{num_folds} folds: there are {patients} patients; use fewer folds")
    folds = _equal_folds(samples, num_folds, seed=seed, labels=labels)
    splits = pd.Series("test", samples.index, name="split")
    rest = samples[folds != fold]
    splits[rest.index] = _divide_rest(rest, fractions, seed=seed, labels=labels)
    return splits


def _equal_folds(samples: pd.DataFrame, num_folds: int, *, seed: int, labels: Sequence[str]) -> pd.Series:
    """The fold of each sample; each fold has a patient of every class."""
    from sklearn.model_selection import StratifiedGroupKFold

    positive = samples[list(labels)] == 1
    if positive.sum(axis=1).max() <= 1:
        kind = positive.to_numpy() @ np.arange(1, positive.shape[1] + 1)  # 0 = unlabelled
        found = pd.Series(-1, samples.index)
        state = int(np.random.SeedSequence(seed).generate_state(1)[0])
        divider = StratifiedGroupKFold(num_folds, shuffle=True, random_state=state)
        with warnings.catch_warnings():  # that the unlabelled, or images of a class, are fewer than the folds
            warnings.simplefilter("ignore", UserWarning)
            for number, (_, inside) in enumerate(divider.split(kind, kind, samples["patient"])):
                found.iloc[inside] = number
        if positive.groupby(found).any().all(axis=None) and found.nunique() == num_folds:
            return found
    return _deal(samples, dict.fromkeys(range(num_folds), 1 / num_folds), seed=seed, labels=labels)


def cross_validation(
    samples: pd.DataFrame, splits: pd.DataFrame, *, num_folds: int, seed: int, labels: Sequence[str]
) -> list[pd.DataFrame]:
    """The splits of each fold: train and val joined and parted anew by patient, one fold being val in turn.

    Args:
        samples: columns sample_id, patient, site and the label columns.
        splits: columns sample_id and split; what is neither train nor val stays what it is.
        num_folds: 2 or more.
        seed: 0 or more.
        labels: the label columns.

    Raises:
        ValueError: if a class has too few patients for one in every fold.
    """
    joined = splits["split"].isin(("train", "val"))
    if joined.sum() < num_folds:
        raise ValueError(f"folds {num_folds}: train and val have {joined.sum()} samples; lower it")
    learned = samples.set_index("sample_id", drop=False).loc[splits.loc[joined, "sample_id"]]
    number = _equal_folds(learned.reset_index(drop=True), num_folds, seed=seed, labels=labels).to_numpy()
    folds = []
    for fold in range(num_folds):
        frame = splits.copy()
        frame.loc[joined, "split"] = np.where(number == fold, "val", "train")
        folds.append(frame)
    return folds


def count_spelt_alike(names: Iterable[str]) -> int:
    """How many of different names are another's but for capitals or the Unicode form of a letter.

    >>> count_spelt_alike(["North", "NORTH", "South"])
    2
    """
    spelt = Counter(unicodedata.normalize("NFC", name.casefold()) for name in names)
    return sum(number for number in spelt.values() if number > 1)


def leave_site_out(
    samples: pd.DataFrame,
    *,
    site: str | None,
    fold: int,
    fractions: Mapping[str, float],
    seed: int,
    labels: Sequence[str],
) -> pd.Series:
    """The split of each sample where the samples of one site are test: does the network travel?

    The other splits are cut from the other sites by `assign_splits`. What other sites hold of a patient who
    was also seen at the site left out is "excluded": it may neither teach nor, being of another site, judge.

    Args:
        samples: as for `assign_splits`.
        site: the site to leave out; None = the one of number `fold`, in alphabetical order.
        fold: 0-based; without effect where the site is named.
        fractions: as for `assign_splits`; test is what the site holds, and the others keep their proportions.
        seed: 0 or more.
        labels: the label columns.

    Raises:
        ValueError: if a sample has no site, no sample has this one, or a class has too few patients for one
            in every split.
    """
    sites = sorted(samples["site"].unique())
    if unknown := int((samples["site"] == "").sum()):
        raise ValueError(
            f"site: {unknown} of {len(samples)} samples have none, and could be of the site left out;"
            " give their site in the catalogue, or use split.strategy = patient"
        )
    if alike := count_spelt_alike(sites):
        raise ValueError(
            f"site: {alike} names differ from another in capitals or the Unicode form of a letter alone; write each in"
            " one way, in the headers or in a column site"
        )
    if len(sites) < 2:
        raise ValueError("site: all samples are of one, and none would be left; use split.strategy = patient")
    if site is None and fold >= len(sites):
        raise ValueError(f"fold {fold}: there are {len(sites)} sites; use 0 to {len(sites) - 1}")
    if site is not None and site not in sites:
        raise ValueError(
            f"site {site!r}: no sample is from it; use one of the {len(sites)} sites of column `site` of"
            " samples.parquet, or choose by split.fold"
        )
    inside = samples["site"] == (sites[fold] if site is None else site)
    for label, present in (samples.loc[inside, list(labels)] == 1).any().items():
        if not present:
            name = str(label).removeprefix("label_")
            raise ValueError(
                f"class {name!r}: no sample of the site left out shows it; leave another site out, or drop it"
            )
    shared = ~inside & samples["patient"].isin(samples.loc[inside, "patient"])
    splits = pd.Series("test", samples.index, name="split").mask(shared, "excluded")
    rest = samples[~inside & ~shared]
    splits[rest.index] = _divide_rest(rest, fractions, seed=seed, labels=labels)
    return splits


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


def patients_in_several_splits(samples: pd.DataFrame, splits: pd.DataFrame) -> int:
    """How many patients have samples in more than one split: patients that leak.

    Args:
        samples: columns sample_id and patient.
        splits: columns sample_id and split; `excluded` is no split.

    >>> samples = pd.DataFrame({"sample_id": ["a", "b", "c"], "patient": ["p", "p", "q"]})
    >>> patients_in_several_splits(samples, samples.assign(split=["train", "test", "test"]))
    1
    """
    assigned = splits.loc[splits["split"] != "excluded", ["sample_id", "split"]]
    joined = samples[["sample_id", "patient"]].merge(assigned, on="sample_id")
    return int((joined[["patient", "split"]].drop_duplicates()["patient"].value_counts() > 1).sum())


def _divide_rest(
    rest: pd.DataFrame, fractions: Mapping[str, float], *, seed: int, labels: Sequence[str]
) -> pd.Series:
    """The splits other than test, in their proportions, for what is left when test is taken."""
    others = {name: fraction for name, fraction in fractions.items() if name != "test"}
    total = sum(others.values())
    shares = {name: fraction / total for name, fraction in others.items()}
    return assign_splits(rest, fractions=shares, seed=seed, labels=labels)


def _deal(
    samples: pd.DataFrame, shares_of: Mapping[Any, float], *, seed: int, labels: Sequence[str]
) -> pd.Series:
    """The part of each sample, dealt out as `assign_splits` says; the parts may have any names."""
    names, shares = list(shares_of), np.array(list(shares_of.values()))
    every = f"each of {', '.join(map(str, names))}"
    grouped = samples.groupby("patient", sort=True)
    sizes = grouped.size().to_numpy()
    sites = grouped["site"].first().to_numpy()
    positive = grouped[list(labels)].max().to_numpy(float) == 1
    num_patients = positive.sum(axis=0)
    for label, count in zip(labels, num_patients, strict=True):
        if count < len(names):
            raise _too_few_patients(label, int(count), every)

    rarest_first = np.argsort(num_patients, kind="stable")
    stratum = np.full(len(sizes), len(labels))
    for column in rarest_first[::-1]:
        stratum[positive[:, column]] = column
    shuffle = np.random.default_rng(np.random.SeedSequence(seed)).permutation(len(sizes))

    if (samples[list(labels)] == 1).sum(axis=1).max() > 1:
        of_label = (samples[list(labels)] == 1).groupby(samples["patient"], sort=True).sum().to_numpy(float)
        images = np.column_stack([of_label, sizes])  # by patient and label, and last all of them
    else:
        images = np.eye(len(labels) + 1)[stratum] * sizes[:, None]  # by patient and stratum

    placed = np.full(len(sizes), -1)
    dealt = np.zeros((len(labels) + 1, len(names)))  # images by stratum and split

    def place(patient: int, split: int) -> None:
        placed[patient] = split
        dealt[:, split] += images[patient]

    for column in rarest_first:
        members = shuffle[positive[shuffle, column]]
        for split in np.argsort(shares, kind="stable"):
            if (placed[members] == split).any():
                continue
            free = members[placed[members] < 0]
            if not len(free):
                raise _too_few_patients(labels[column], len(members), every)
            fitting = free[sizes[free] <= max(shares[split] * sizes[members].sum(), sizes[free].min())]
            place(int(fitting[0]), int(split))
    for column in [*rarest_first, len(labels)]:
        members = shuffle[(stratum[shuffle] == column) & (placed[shuffle] < 0)]
        octave = np.floor(np.log2(sizes[members])) if len(members) else members
        for patient in members[np.lexsort((sites[members].astype(str), -octave))]:
            behind = shares * (dealt[column].sum() + images[patient, column]) - dealt[column]
            place(int(patient), int(np.argmax(behind)))
    by_patient = dict(zip(grouped.size().index, placed, strict=True))
    return samples["patient"].map(by_patient).map(dict(enumerate(names)))


def _too_few_patients(label: str, count: int, parts: str) -> ValueError:
    name = label.removeprefix("label_")
    patients = "1 patient" if count == 1 else f"{count} patients"
    return ValueError(
        f"class {name!r}: {patients}, too few for one in {parts};"
        " add patients of this class, drop it, or use fewer splits"
    )
