from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cadx.datasets import DatasetWriter, Sample, SourceInfo, read_splits
from cadx.drift import image_statistics
from cadx.files import digest_bytes, digest_path, write_json
from components.split import SplitParams, split

SECRET = "Doe^Jane-4711"


def cohort(
    path: Path, num_patients: int = 60, changes: dict[int, dict[str, Any]] | None = None, **described: Any
) -> Path:
    """Two images a patient, a quarter sick, two sites."""
    generator = np.random.default_rng(0)
    described = {"task": "binary", "positive": "sick"} | described
    with DatasetWriter(
        path,
        name="cohort",
        classes=("normal", "sick"),
        modality="chest X-ray",
        clustered=True,
        source=SourceInfo(title="t", licence="MIT", citation="c"),
        **described,
    ) as writer:
        for row in range(2 * num_patients):
            pixels = generator.integers(0, 255, (8, 8), dtype=np.uint8)
            sample: dict[str, Any] = {
                "labels": {"normal" if row // 2 % 4 else "sick": 1.0},
                "patient": f"{SECRET}-{row // 2}",
                "site": "north" if row // 2 % 3 else "south",
                **(changes or {}).get(row, {}),
            }
            writer.add(
                Sample(
                    sample_id=f"s{row:03d}",
                    pixels=pixels,
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics=image_statistics(pixels),
                    **sample,
                )
            )
    return path


def official(num_patients: int = 60) -> dict[int, dict[str, Any]]:
    """Official splits by patient: 4 of 6 train, 1 val, 1 test, in turn over the classes."""
    parts = ["train"] * 4 + ["val", "test"]
    return {row: {"given_split": parts[row // 8 % 6]} for row in range(2 * num_patients)}


def divide(
    tmp_path: Path, dataset: Path, quarantined: dict[str, str] | None = None, **params: Any
) -> pd.DataFrame:
    write_json(
        tmp_path / "validation.json",
        {
            "schema": 1,
            "dataset": digest_path(dataset / "dataset.json"),
            "quarantined": [{"sample_id": key, "reason": text} for key, text in (quarantined or {}).items()],
        },
    )
    split(
        dataset=dataset,
        validation=tmp_path / "validation.json",
        splits=tmp_path / "splits.parquet",
        params=SplitParams.model_validate(params),
    )
    return read_splits(tmp_path / "splits.parquet")


def test_no_row_is_lost_and_no_patient_crosses(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    samples = pd.read_parquet(dataset / "samples.parquet")
    placed = divide(tmp_path, dataset, {"s003": "blank_image", "s100": "tiny_image; invalid_box"})
    assert placed["sample_id"].tolist() == samples["sample_id"].tolist()
    excluded = placed[placed["split"] == "excluded"].set_index("sample_id")["reason"]
    assert excluded.to_dict() == {"s003": "blank_image", "s100": "tiny_image; invalid_box"}
    used = placed[placed["split"] != "excluded"].merge(samples, on="sample_id")
    assert used.groupby("patient")["split"].nunique().max() == 1
    shares = used["split"].value_counts(normalize=True)
    assert shares["train"] == pytest.approx(0.6, abs=0.05)
    assert shares["test"] == pytest.approx(0.2, abs=0.05)
    assert (used.groupby("split")["label_sick"].max() == 1).all()


def test_for_cross_validation_all_that_is_kept_is_train(tmp_path: Path):
    placed = divide(tmp_path, cohort(tmp_path / "d"), {"s003": "blank_image"}, strategy="folds")
    assert placed["split"].value_counts().to_dict() == {"train": 119, "excluded": 1}


def test_equal_seeds_give_equal_bytes_and_other_seeds_other_splits(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    first = divide(tmp_path, dataset, seed=1)
    data = (tmp_path / "splits.parquet").read_bytes()
    divide(tmp_path, dataset, seed=1)
    assert (tmp_path / "splits.parquet").read_bytes() == data
    assert not divide(tmp_path, dataset, seed=2).equals(first)


def test_official_splits_stay_and_calibration_is_cut_from_train_by_patient(tmp_path: Path):
    dataset = cohort(tmp_path / "d", changes=official())
    samples = pd.read_parquet(dataset / "samples.parquet")
    placed = divide(tmp_path, dataset, strategy="given", calibration_fraction=0.2).merge(
        samples, on="sample_id"
    )
    calibration = placed["split"] == "calibration"
    assert (placed.loc[~calibration, "split"] == placed.loc[~calibration, "given_split"]).all()
    assert (placed.loc[calibration, "given_split"] == "train").all()
    assert calibration.sum() / (placed["given_split"] == "train").sum() == pytest.approx(0.2, abs=0.05)
    assert placed.groupby("patient")["split"].nunique().max() == 1
    assert set(placed.loc[calibration, "reason"]) == {"cut from the official train part, by patient"}
    assert set(placed.loc[~calibration, "reason"]) == {"official"}
    assert placed.loc[calibration, "label_sick"].max() == 1


def test_an_official_calibration_part_is_left_alone(tmp_path: Path):
    parts = official()
    for row in (0, 1, 2, 3):
        parts[row] = {"given_split": "calibration"}
    placed = divide(tmp_path, cohort(tmp_path / "d", changes=parts), strategy="given")
    assert placed.loc[placed["split"] == "calibration", "sample_id"].tolist() == [
        "s000",
        "s001",
        "s002",
        "s003",
    ]


def test_patients_across_official_splits_are_refused_by_number_not_by_name(tmp_path: Path):
    parts = official()
    parts[1] = {"given_split": "test"}
    parts[3] = {"given_split": "val"}
    dataset = cohort(tmp_path / "d", changes=parts)
    with pytest.raises(ValueError, match="2 patients have images in several official splits") as error:
        divide(tmp_path, dataset, strategy="given")
    assert SECRET not in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "splits.parquet").exists()
    placed = divide(tmp_path, dataset, {"s001": "x", "s003": "x"}, strategy="given")
    assert (placed["split"] == "excluded").sum() == 2


@pytest.mark.parametrize(
    ("part", "message"),
    [("", "16 of 120 images have no official split"), ("train", "the official splits have no test part")],
)
def test_incomplete_official_splits_are_refused(tmp_path: Path, part: str, message: str):
    parts = {row: {"given_split": part} if p["given_split"] == "test" else p for row, p in official().items()}
    with pytest.raises(ValueError, match=message):
        divide(tmp_path, cohort(tmp_path / "d", changes=parts), strategy="given")


@pytest.mark.parametrize(
    ("sick", "lacking"),
    [
        ((0, 32), "test"),
        ((0, 40), "val"),
        ((32, 40), "train"),
        ((0,), "val and test"),
    ],
)
def test_a_class_that_an_official_part_lacks_is_named(tmp_path: Path, sick: tuple[int, ...], lacking: str):
    """Rows 0, 32 and 40 are the first of the official train, val and test part."""
    changes = {row: {"labels": {"normal": 1.0}} | given for row, given in official().items()}
    for row in sick:
        for image in (row, row + 1, row + 2, row + 3):
            changes[image]["labels"] = {"sick": 1.0}
    dataset = cohort(tmp_path / "d", changes=changes)
    with pytest.raises(
        ValueError, match=f"class 'sick': no image of the official {lacking} part shows it"
    ) as error:
        divide(tmp_path, dataset, strategy="given")
    assert SECRET not in str(error.value)
    divide(tmp_path, dataset, {f"s{row:03d}": "x" for row in range(120) if changes[row]["labels"] != {"normal": 1}},
           strategy="given")  # fmt: skip


def test_official_parts_may_lack_a_rare_finding_and_a_test_part_its_labels(tmp_path: Path):
    both, neither = {"normal": 1.0, "sick": 1.0}, {"normal": 0.0, "sick": 0.0}
    changes = {row: {"labels": both if row % 8 < 4 else {}} | given for row, given in official().items()}
    for row in (32, 33, 34, 35):
        changes[row]["labels"] = {"normal": 1.0}
    for row in range(80, 84):  # the other val part
        changes[row]["labels"] = neither
    dataset = cohort(tmp_path / "d", changes=changes, task="multilabel", positive=None)
    divide(tmp_path, dataset, strategy="given")  # val shows no sick one
    withheld = {
        row: ({"labels": {}} if row // 8 % 6 == 5 else {}) | given for row, given in official().items()
    }
    parts = set(divide(tmp_path, cohort(tmp_path / "e", changes=withheld), strategy="given")["split"])
    assert parts == {"train", "val", "calibration", "test"}


@pytest.mark.parametrize(("strategy", "sick"), [("patient", (0,)), ("given", (0, 32, 40))])
def test_a_class_with_a_single_patient_is_one_clear_line(
    tmp_path: Path, strategy: str, sick: tuple[int, ...]
):
    labels = {row: {"labels": {"sick" if row // 2 * 2 in sick else "normal": 1.0}} for row in range(120)}
    changes = {row: labels[row] | given for row, given in official().items()}
    with pytest.raises(ValueError, match="class 'sick': 1 patient, too few") as error:
        divide(tmp_path, cohort(tmp_path / "d", changes=changes), strategy=strategy)
    assert "\n" not in str(error.value)
    assert SECRET not in str(error.value)


def test_a_class_without_images_does_not_hinder(tmp_path: Path):
    normal = {row: {"labels": {"normal": 1.0}} for row in range(120)}
    placed = divide(tmp_path, cohort(tmp_path / "d", changes=normal))
    assert set(placed["split"]) == {"train", "val", "calibration", "test"}


def test_a_validation_of_another_dataset_is_refused(tmp_path: Path):
    dataset, other = cohort(tmp_path / "d"), cohort(tmp_path / "e", num_patients=30)
    divide(tmp_path, other)
    with pytest.raises(ValueError, match="judges another dataset"):
        split(
            dataset=dataset,
            validation=tmp_path / "validation.json",
            splits=tmp_path / "s.parquet",
            params=SplitParams(),
        )
    (tmp_path / "validation.json").write_text("[]")
    with pytest.raises(ValueError, match="not a validation"):
        split(
            dataset=dataset,
            validation=tmp_path / "validation.json",
            splits=tmp_path / "s.parquet",
            params=SplitParams(),
        )


def test_each_image_is_in_test_in_one_fold(tmp_path: Path):
    dataset = cohort(tmp_path / "d", num_patients=80)
    folds = [
        divide(tmp_path, dataset, {"s003": "blank"}, strategy="kfold", num_folds=4, fold=n) for n in range(4)
    ]
    tested = sum((placed["split"] == "test").astype(int) for placed in folds)
    assert tested.tolist() == [int(sample_id != "s003") for sample_id in folds[0]["sample_id"]]
    assert set(folds[2]["reason"]) == {"fold 2 of 4, by patient", "blank"}


def test_a_site_is_left_out_by_name_or_by_number(tmp_path: Path):
    dataset = cohort(tmp_path / "d", changes={0: {"site": "north"}})  # its patient's other image: south
    samples = pd.read_parquet(dataset / "samples.parquet")
    placed = divide(tmp_path, dataset, strategy="leave_site_out", site="north")
    assert ((placed["split"] == "test") == (samples["site"] == "north")).all()
    assert placed.loc[1, ["split", "reason"]].tolist() == [
        "excluded",
        "of a patient of the site left out, at another site",
    ]
    assert set(placed["reason"]) == {"the site left out", "by patient", placed.loc[1, "reason"]}
    assert divide(tmp_path, dataset, strategy="leave_site_out", fold=0).equals(placed)
    with pytest.raises(ValueError, match="dataset cohort: site 'east': no sample is from it"):
        divide(tmp_path, dataset, strategy="leave_site_out", site="east")


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"strategy": "kfold", "fold": 5}, "fold 5: num_folds = 5; use 0 to 4"),
        ({"strategy": "kfold", "site": "north"}, "site is for strategy leave_site_out"),
        ({"strategy": "leave_site_out", "site": "north", "fold": 1}, "fold and site both choose"),
    ],
)
def test_a_test_part_chosen_twice_or_not_at_all_is_refused(params: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        SplitParams.model_validate(params)


def test_fractions_that_do_not_sum_to_one_are_refused_before_any_work():
    with pytest.raises(ValueError, match=r"sum to 0\.9, not to 1"):
        SplitParams.model_validate({"fractions": {"train": 0.5}})
