"""Who teaches, who tunes, who judges: every image gets one split, and no patient crosses two.

Five strategies, which all keep a patient together and stratify by class:

    patient         our own splits, stratified by site too
    given           the set's official ones, so that scores compare with published ones; a set without a
                    calibration part gets one cut from its train part, which the reason column records
    kfold           fold `fold` of `num_folds` is test; over all folds, each image is in test once
    folds           all are train: for a set so small that the folds of `train.folds` judge, and no test part
    leave_site_out  the site `site`, or the site of number `fold`, is test: does the network travel?

kfold and leave_site_out cut train, val and calibration from the rest, in the proportions of `fractions`.

What `validate` quarantined stays in the table as "excluded", with its reason: no row is ever lost.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Literal, Self

import pandas as pd
from pydantic import Field, model_validator

from cadx.datasets import DatasetFolder, write_splits
from cadx.files import digest_path
from cadx.splitting import SPLITS, assign_splits, cut, kfold, leave_site_out
from cadx.types import Config, Task
from components.contract import In, Out, Params, step

Share = Annotated[float, Field(gt=0, lt=1)]


class Fractions(Config):
    """Shares of the images, which sum to 1."""

    train: Share = 0.6
    val: Share = 0.1
    calibration: Share = 0.1
    test: Share = 0.2

    @model_validator(mode="after")
    def _sum_to_one(self) -> Self:
        total = self.train + self.val + self.calibration + self.test
        if not math.isclose(total, 1, abs_tol=1e-6):
            raise ValueError(f"train, val, calibration and test sum to {total:g}, not to 1")
        return self


class SplitParams(Params):
    """How images are divided."""

    strategy: Literal["patient", "given", "kfold", "folds", "leave_site_out"] = "patient"
    fractions: Fractions = Field(
        default=Fractions(), description='for every strategy but "given" and "folds"'
    )
    calibration_fraction: Share = Field(
        default=0.1, description="of the official train part, where there is no calibration part"
    )
    num_folds: int = Field(default=5, ge=2, description='for "kfold"')
    fold: int = Field(
        default=0, ge=0, description="the fold that is test, or the site's number in the alphabet"
    )
    site: str | None = Field(default=None, description="the site that is test, instead of its number")
    seed: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _one_test_part(self) -> Self:
        if self.strategy == "kfold" and self.fold >= self.num_folds:
            raise ValueError(f"fold {self.fold}: num_folds = {self.num_folds}; use 0 to {self.num_folds - 1}")
        if self.site is not None and self.strategy != "leave_site_out":
            raise ValueError(f"site is for strategy leave_site_out, not for {self.strategy}; leave it out")
        if self.site is not None and self.fold:
            raise ValueError("fold and site both choose the test part; give one of them")
        return self


@step
def split(*, dataset: In, validation: In, splits: Out, params: SplitParams) -> None:
    """Divide the images into train, val, calibration and test by patient, or as the set's authors did.

    Raises:
        ValueError: if `validation` is of another dataset, a class has too few patients, the official splits
            are incomplete, lack a class in a part or share a patient, or the site to leave out is unknown.
    """
    folder = DatasetFolder(dataset)
    reasons = _read_quarantine(validation, dataset)
    samples = folder.samples.reset_index(drop=True)
    kept = samples[~samples["sample_id"].isin(list(reasons))]
    # A class that is empty is validate's matter; it cannot be stratified.
    labels = [column for column in folder.info.label_columns if (kept[column] == 1).any()]
    try:
        placed = _place(kept, labels, folder.info.task, params)
    except ValueError as error:
        raise ValueError(f"dataset {folder.info.name}: {error}") from None
    excluded = samples["sample_id"].map(reasons)
    write_splits(
        splits,
        pd.DataFrame(
            {
                "sample_id": samples["sample_id"],
                "split": placed["split"].reindex(samples.index).fillna("excluded"),
                "reason": placed["reason"].reindex(samples.index).fillna(excluded),
            }
        ),
    )


def _read_quarantine(validation: Path, dataset: Path) -> dict[str, str]:
    """sample_id -> reason, of what must stay out of every split."""
    try:
        content = json.loads(validation.read_text(encoding="utf-8"))
        judged, quarantined = content["dataset"], content["quarantined"]
        reasons = {entry["sample_id"]: entry["reason"] for entry in quarantined}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{validation}: not a validation; run `cadx validate` again") from None
    if judged != digest_path(dataset / "dataset.json"):
        raise ValueError(f"{validation}: judges another dataset than {dataset}; run `cadx validate` on it")
    return reasons


def _place(kept: pd.DataFrame, labels: list[str], task: Task, params: SplitParams) -> pd.DataFrame:
    """The splits, indexed like `kept`: columns split, reason."""
    if params.strategy == "given":
        return _given(kept, labels, task, params)
    if params.strategy == "folds":
        return pd.DataFrame({"split": "train", "reason": "for cross-validation"}, index=kept.index)
    fractions, seed = params.fractions.model_dump(), params.seed
    if params.strategy == "patient":
        parts = assign_splits(kept, fractions=fractions, seed=seed, labels=labels)
        return pd.DataFrame({"split": parts, "reason": "by patient"})
    if params.strategy == "kfold":
        fold, num_folds = params.fold, params.num_folds
        parts = kfold(kept, fold=fold, num_folds=num_folds, fractions=fractions, seed=seed, labels=labels)
        return pd.DataFrame({"split": parts, "reason": f"fold {fold} of {num_folds}, by patient"})
    parts = leave_site_out(
        kept, site=params.site, fold=params.fold, fractions=fractions, seed=seed, labels=labels
    )
    reasons = {"test": "the site left out", "excluded": "of a patient of the site left out, at another site"}
    return pd.DataFrame({"split": parts, "reason": parts.map(reasons).fillna("by patient")})


def _given(kept: pd.DataFrame, labels: list[str], task: Task, params: SplitParams) -> pd.DataFrame:
    """The official splits, indexed like `kept`, completed by a calibration part: columns split, reason."""
    remedy = "use split.strategy = patient"
    parts = kept["given_split"]
    if (parts == "").any():
        raise ValueError(f"{(parts == '').sum()} of {len(parts)} images have no official split; {remedy}")
    if missing := [part for part in ("train", "val", "test") if not (parts == part).any()]:
        raise ValueError(f"the official splits have no {' and no '.join(missing)} part; {remedy}")
    stays = kept.drop_duplicates(["patient", "given_split"])["patient"]
    crossing = stays[stays.duplicated()].nunique()
    if crossing:
        patients = "1 patient has" if crossing == 1 else f"{crossing} patients have"
        raise ValueError(
            f"{patients} images in several official splits; {remedy},"
            " or set validate.patient_across_splits = quarantine"
        )
    shown = (kept[labels] == 1).groupby(parts).any()
    # Of several findings a rare one may be nowhere, and is then not judged; and a test part whose labels its authors
    # keep to themselves hinders no training.
    told = kept[labels].notna().any(axis=1).groupby(parts).any()
    judging = [part for part in SPLITS if part in told.index and (told[part] or part != "test")]
    for label in labels if task in ("binary", "multiclass") else ():
        if lacking := [part for part in judging if not shown.loc[part, label]]:
            name = label.removeprefix("label_")
            raise ValueError(
                f"class {name!r}: no image of the official {' and '.join(lacking)} part shows it; {remedy}, or drop it"
            )
    placed = pd.DataFrame({"split": parts, "reason": "official"})
    if (parts == "calibration").any():
        return placed
    completed = cut(
        kept,
        parts,
        within="train",
        into="calibration",
        fraction=params.calibration_fraction,
        seed=params.seed,
        labels=labels,
    )
    moved = completed == "calibration"
    return placed.assign(
        split=completed,
        reason=placed["reason"].mask(moved, "cut from the official train part, by patient"),
    )
