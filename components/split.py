"""Who teaches, who tunes, who judges: every image gets one split, and no patient crosses two.

Two strategies. "patient" makes the splits itself: by patient, stratified by class and by site. "given"
takes the set's official ones, so that scores compare with published ones; a set without a calibration part
gets one cut from its train part, by patient, which the reason column records.

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
from cadx.splitting import assign_splits, cut
from cadx.types import Config
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

    strategy: Literal["patient", "given"] = "patient"  # our own splits, or the set's official ones
    fractions: Fractions = Fractions()  # for strategy "patient"
    calibration_fraction: Share = 0.1  # of the official train part, where there is no calibration part
    seed: Annotated[int, Field(ge=0)] = 0


@step
def split(*, dataset: In, validation: In, splits: Out, params: SplitParams) -> None:
    """Divide the images into train, val, calibration and test by patient, or as the set's authors did.

    Raises:
        ValueError: if `validation` is of another dataset, a class has too few patients, or the official
            splits are incomplete or share a patient.
    """
    folder = DatasetFolder(dataset)
    reasons = _read_quarantine(validation, dataset)
    samples = folder.samples.reset_index(drop=True)
    kept = samples[~samples["sample_id"].isin(list(reasons))]
    # A class that is empty is validate's matter; it cannot be stratified.
    labels = [column for column in folder.info.label_columns if (kept[column] == 1).any()]
    if params.strategy == "given":
        placed = _given(kept, labels, params, folder.info.name)
    else:
        parts = assign_splits(kept, fractions=params.fractions.model_dump(), seed=params.seed, labels=labels)
        placed = pd.DataFrame({"split": parts, "reason": "by patient"})
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


def _given(kept: pd.DataFrame, labels: list[str], params: SplitParams, name: str) -> pd.DataFrame:
    """The official splits, indexed like `kept`, completed by a calibration part: columns split, reason."""
    remedy = "use split.strategy = patient"
    parts = kept["given_split"]
    if (parts == "").any():
        raise ValueError(
            f"dataset {name}: {(parts == '').sum()} of {len(parts)} images have no official split; {remedy}"
        )
    if missing := [part for part in ("train", "val", "test") if not (parts == part).any()]:
        raise ValueError(
            f"dataset {name}: the official splits have no {' and no '.join(missing)} part; {remedy}"
        )
    stays = kept.drop_duplicates(["patient", "given_split"])["patient"]
    crossing = stays[stays.duplicated()].nunique()
    if crossing:
        patients = "1 patient has" if crossing == 1 else f"{crossing} patients have"
        raise ValueError(
            f"dataset {name}: {patients} images in several official splits; {remedy},"
            " or set validate.patient_across_splits = quarantine"
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
