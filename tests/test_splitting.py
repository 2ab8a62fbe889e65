"""Splits by patient, by fold and by site: nobody crosses, nothing is lost, every class is everywhere."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import StratifiedGroupKFold

from cadx.splitting import assign_splits, cross_validation, cut, kfold, leave_site_out

FRACTIONS = {"train": 0.6, "val": 0.1, "calibration": 0.1, "test": 0.2}


def cohort(
    num_patients: int, prevalence: float, seed: int, *, sites: int = 3, most_images: int = 6
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_patients), rng.integers(1, most_images + 1, num_patients))
    ill = rng.random(num_patients) < prevalence
    positive = (ill[patient] & (rng.random(len(patient)) < 0.8)).astype(float)
    return pd.DataFrame(
        {
            "sample_id": [f"s{row}" for row in range(len(patient))],
            "patient": [f"p{number}" for number in patient],
            "site": [f"site{number % sites}" for number in patient],
            "label_normal": 1 - positive,
            "label_pneumonia": positive,
        }
    )


LABELS = ["label_normal", "label_pneumonia"]


def crossing(samples: pd.DataFrame, splits: pd.Series) -> list[str]:
    """The patients who stand in more than one split."""
    pairs = pd.DataFrame({"patient": samples["patient"], "split": splits}).drop_duplicates()
    return pairs.loc[pairs["patient"].duplicated(), "patient"].tolist()


@settings(max_examples=60, deadline=None)
@given(
    num_patients=st.integers(5, 80),
    prevalence=st.floats(0.05, 0.9),
    seed=st.integers(0, 1000),
    most_images=st.integers(1, 40),
)
def test_no_patient_crosses_and_every_split_has_every_class(
    num_patients: int, prevalence: float, seed: int, most_images: int
) -> None:
    samples = cohort(num_patients, prevalence, seed, most_images=most_images)
    refusal = ""
    try:
        splits = assign_splits(samples, fractions=FRACTIONS, seed=seed, labels=LABELS)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        # Four patients of a class may be spoken for by another class that has few of its own.
        assert "too few for one in each of train, val, calibration, test" in refusal
        assert samples[LABELS].groupby(samples["patient"]).max().sum().min() < 8
        return
    assert splits.index.equals(samples.index)
    assert not crossing(samples, splits)
    positives = samples[LABELS].groupby(splits).sum()
    assert sorted(positives.index) == sorted(FRACTIONS)
    assert (positives >= 1).all(axis=None)


@pytest.mark.parametrize("most_images", [1, 10])
def test_fractions_labels_and_sites_are_honoured(most_images: int) -> None:
    samples = cohort(600, 0.2, seed=1, most_images=most_images)
    splits = assign_splits(samples, fractions=FRACTIONS, seed=0, labels=LABELS)
    for part in [samples, samples[samples["label_pneumonia"] == 1], *(g for _, g in samples.groupby("site"))]:
        found = splits[part.index].value_counts(normalize=True)
        for name, fraction in FRACTIONS.items():
            assert found[name] == pytest.approx(fraction, abs=0.03), name


def test_one_patient_with_a_third_of_all_images_leaves_the_fractions_close() -> None:
    samples = cohort(200, 0.5, seed=2, most_images=3)
    giant = pd.DataFrame(
        {"patient": "giant", "site": "site0", "label_normal": 0.0, "label_pneumonia": [1.0] * 150}
    )
    samples = pd.concat([samples, giant], ignore_index=True)
    splits = assign_splits(samples, fractions=FRACTIONS, seed=0, labels=LABELS)
    found = splits.value_counts(normalize=True)
    assert all(found[name] == pytest.approx(fraction, abs=0.03) for name, fraction in FRACTIONS.items())


def test_splits_depend_on_the_seed_and_not_on_the_order_of_rows() -> None:
    samples = cohort(60, 0.4, seed=3)
    splits = assign_splits(samples, fractions=FRACTIONS, seed=0, labels=LABELS)
    shuffled = samples.sample(frac=1, random_state=5)
    again = assign_splits(shuffled, fractions=FRACTIONS, seed=0, labels=LABELS)
    pd.testing.assert_series_equal(again.sort_index(), splits)
    assert not assign_splits(samples, fractions=FRACTIONS, seed=1, labels=LABELS).equals(splits)


def test_a_class_with_a_single_patient_is_named() -> None:
    samples = cohort(50, 0.0, seed=0)
    samples.loc[samples["patient"] == "p7", ["label_normal", "label_pneumonia"]] = [0.0, 1.0]
    with pytest.raises(ValueError, match="class 'pneumonia': 1 patient, too few") as error:
        assign_splits(samples, fractions=FRACTIONS, seed=0, labels=LABELS)
    assert "\n" not in str(error.value)
    assert "p7" not in str(error.value)


def test_rare_labels_reach_every_split_in_a_multilabel_set() -> None:
    rng = np.random.default_rng(0)
    labels = [f"label_{name}" for name in ("effusion", "nodule", "hernia")]
    samples = pd.DataFrame((rng.random((3000, 3)) < [0.3, 0.1, 0.004]).astype(float), columns=labels)
    samples = samples.assign(patient=[f"p{row // 2}" for row in range(3000)], site="")
    samples.loc[:99, "label_nodule"] = np.nan
    splits = assign_splits(samples, fractions=FRACTIONS, seed=0, labels=labels)
    shares = samples[labels].groupby(splits).sum() / samples[labels].sum()
    assert (shares["label_hernia"] > 0).all()
    for label in ("label_effusion", "label_nodule"):
        for name, fraction in FRACTIONS.items():
            assert shares.loc[name, label] == pytest.approx(fraction, abs=0.04)
    assert not crossing(samples, splits)


def test_unlabelled_samples_are_split_too() -> None:
    samples = cohort(100, 0.3, seed=4)
    samples.loc[samples["patient"].isin([f"p{n}" for n in range(50)]), LABELS] = np.nan
    assert assign_splits(samples, fractions=FRACTIONS, seed=0, labels=LABELS).notna().all()


@pytest.mark.parametrize(
    "fractions", [{"train": 0.5, "test": 0.4}, {"train": 1.0, "test": 0.0}, {"train": 0.5, "dev": 0.5}]
)
def test_unusable_fractions_are_refused(fractions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="fractions"):
        assign_splits(cohort(50, 0.5, seed=0), fractions=fractions, seed=0, labels=LABELS)


def test_calibration_is_cut_from_train_alone() -> None:
    samples = cohort(300, 0.3, seed=5)
    official = samples["patient"].map(lambda name: "test" if int(name[1:]) % 5 == 0 else "train")
    splits = cut(samples, official, within="train", into="calibration", fraction=0.15, seed=0, labels=LABELS)
    assert (splits[official == "test"] == "test").all()
    moved = splits[official == "train"] == "calibration"
    assert moved.mean() == pytest.approx(0.15, abs=0.02)
    assert not crossing(samples, splits)
    prevalence = samples["label_pneumonia"].groupby(splits).mean()
    assert prevalence["calibration"] == pytest.approx(prevalence["train"], abs=0.03)


# --- several labels ----------------------------------------------------------------------------------


def findings(num_patients: int, seed: int, *, num_labels: int = 8, most_images: int = 1) -> pd.DataFrame:
    """Labels that come together, from common to rare, as findings in chest X-rays do."""
    rng = np.random.default_rng(seed)
    patient = np.repeat(np.arange(num_patients), rng.integers(1, most_images + 1, num_patients))
    disease = (rng.normal(size=(num_patients, 2)) @ rng.normal(size=(2, num_labels)))[patient]
    signs = disease + rng.normal(size=disease.shape)
    shares = 0.4 / 1.6 ** np.arange(num_labels)
    cuts = [np.quantile(column, 1 - share) for column, share in zip(signs.T, shares, strict=True)]
    names = [f"label_{number}" for number in range(num_labels)]
    frame = pd.DataFrame((signs > cuts).astype(float), columns=names)
    return frame.assign(patient=[f"p{number}" for number in patient], site="")


def label_distribution(labels: pd.DataFrame, splits: pd.Series) -> float:
    """Label distribution of a division, 0 where each split has each label's odds of the whole.

    Source: Sechidis, Tsoumakas and Vlahavas 2011, "On the stratification of multi-label data", section 5.1.
    """
    present = labels == 1
    whole = present.sum() / (~present).sum()
    parts = [present[splits == name] for name in splits.unique()]
    return float(np.mean([(part.sum() / (~part).sum() - whole).abs().mean() for part in parts]))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("most_images", [1, 3])
def test_several_labels_are_shared_out_far_better_than_by_chance(seed: int, most_images: int) -> None:
    samples = findings(900, seed, most_images=most_images)
    labels = [name for name in samples if name.startswith("label_")]
    splits = assign_splits(samples, fractions=FRACTIONS, seed=seed, labels=labels)
    assert not crossing(samples, splits)
    names = pd.Series(samples["patient"].unique())
    by_chance = []
    for draw in range(30):
        order = np.random.default_rng(draw).permutation(len(names))
        part = np.searchsorted(np.cumsum(list(FRACTIONS.values()))[:-1] * len(names), order, side="right")
        chance = samples["patient"].map(dict(zip(names, np.array(list(FRACTIONS))[part], strict=True)))
        by_chance.append(label_distribution(samples[labels], chance))
    assert label_distribution(samples[labels], splits) < 0.4 * np.mean(by_chance)
    assert label_distribution(samples[labels], splits) < min(by_chance)
    shares = (samples[labels] == 1).groupby(splits).sum() / samples[labels].sum()
    frequent = samples[labels].sum() > 100
    for name, fraction in FRACTIONS.items():
        assert (shares.loc[name, frequent] - fraction).abs().max() < 0.03, name


@settings(max_examples=40, deadline=None)
@given(
    num_patients=st.integers(8, 120),
    num_labels=st.integers(1, 6),
    most_images=st.integers(1, 8),
    unlabelled=st.floats(0, 0.5),
    strategy=st.sampled_from(["patient", "kfold", "leave_site_out"]),
    seed=st.integers(0, 999),
)
def test_whatever_the_labels_nobody_crosses_and_nothing_is_lost(
    num_patients: int, num_labels: int, most_images: int, unlabelled: float, strategy: str, seed: int
) -> None:
    samples = findings(num_patients, seed, num_labels=num_labels, most_images=most_images)
    labels = [name for name in samples if name.startswith("label_")]
    rng = np.random.default_rng(seed)
    samples.loc[rng.random(len(samples)) < unlabelled, labels] = np.nan
    samples["site"] = samples["patient"].str[1:].astype(int).mod(3).map("site{}".format)
    shared = {"fractions": FRACTIONS, "seed": seed, "labels": labels}
    refusal = ""
    try:
        if strategy == "patient":
            splits = assign_splits(samples, **shared)
        elif strategy == "kfold":
            splits = kfold(samples, fold=seed % 4, num_folds=4, **shared)
        else:
            splits = leave_site_out(samples, site=None, fold=seed % 3, **shared)
    except ValueError as error:
        refusal = str(error)
    if refusal:
        assert refusal.startswith("class '")
        assert "\n" not in refusal
        return
    assert splits.index.equals(samples.index)
    assert splits.isin(FRACTIONS).all()
    assert not crossing(samples, splits)
    assert (samples[labels] == 1).groupby(splits).any().reindex(FRACTIONS).all(axis=None)


# --- folds -------------------------------------------------------------------------------------------


def in_test(samples: pd.DataFrame, num_folds: int, labels: list[str], seed: int = 0) -> pd.DataFrame:
    """Which samples are in test, a column per fold."""
    shared = {"num_folds": num_folds, "fractions": FRACTIONS, "seed": seed, "labels": labels}
    folds = [kfold(samples, fold=fold, **shared) for fold in range(num_folds)]
    assert not any(crossing(samples, splits) for splits in folds)
    return pd.DataFrame({fold: splits == "test" for fold, splits in enumerate(folds)})


@pytest.mark.parametrize("several_labels", [False, True])
def test_over_all_folds_each_sample_is_in_test_once(several_labels: bool) -> None:
    samples = findings(400, 1, most_images=3) if several_labels else cohort(400, 0.25, seed=1)
    labels = [name for name in samples if name.startswith("label_")]
    tested = in_test(samples, 5, labels)
    assert (tested.sum(axis=1) == 1).all()
    for fold in tested:
        assert tested[fold].mean() == pytest.approx(0.2, abs=0.03)
        shares = samples.loc[tested[fold], labels].sum() / samples[labels].sum()
        assert (shares[samples[labels].sum() > 100] - 0.2).abs().max() < 0.03, fold
    rest = kfold(samples, fold=3, num_folds=5, fractions=FRACTIONS, seed=0, labels=labels)
    found = rest[rest != "test"].value_counts(normalize=True)
    assert found["train"] == pytest.approx(0.75, abs=0.03)  # .6, .1, .1 of what is not test
    assert found["val"] == pytest.approx(0.125, abs=0.03)


def test_folds_depend_on_the_seed_and_not_on_the_order_of_rows() -> None:
    samples = cohort(80, 0.4, seed=3)
    tested = in_test(samples, 4, LABELS)
    shuffled = in_test(samples.sample(frac=1, random_state=5), 4, LABELS)
    pd.testing.assert_frame_equal(shuffled.sort_index(), tested)
    assert not in_test(samples, 4, LABELS, seed=1).equals(tested)


def test_a_fold_that_stratification_leaves_without_a_rare_class_gets_a_patient_of_it() -> None:
    rng = np.random.default_rng(113)
    num_classes, num_patients = int(rng.integers(3, 7)), int(rng.integers(20, 50))
    patient = np.repeat(np.arange(num_patients), rng.integers(1, 12, num_patients))
    odds = 3.0 ** -np.arange(num_classes)
    kind = rng.choice(num_classes, len(patient), p=odds / odds.sum())
    labels = [f"label_{number}" for number in range(num_classes)]
    samples = pd.DataFrame(np.eye(num_classes)[kind], columns=labels)
    samples = samples.assign(patient=[f"p{number}" for number in patient], site="")
    state = int(np.random.SeedSequence(113).generate_state(1)[0])
    plain = StratifiedGroupKFold(5, shuffle=True, random_state=state).split(kind, kind, patient)
    assert not all(samples.iloc[inside][labels].any().all() for _, inside in plain)
    tested = in_test(samples, 5, labels, seed=113)
    assert all(samples.loc[tested[fold], labels].any().all() for fold in tested)


def test_cross_validation_parts_train_and_val_by_patient_and_leaves_the_rest() -> None:
    samples = cohort(200, 0.3, seed=2)
    placed = assign_splits(samples, fractions=FRACTIONS, seed=0, labels=LABELS)
    given = pd.DataFrame({"sample_id": samples["sample_id"], "split": placed, "reason": ""})
    folds = cross_validation(samples, given, num_folds=4, seed=0, labels=LABELS)
    joined = placed.isin(["train", "val"])
    validated = pd.DataFrame({number: fold["split"] == "val" for number, fold in enumerate(folds)})
    assert (validated[joined].sum(axis=1) == 1).all(), "each sample is val once"
    for fold in folds:
        assert not crossing(samples, fold["split"])
        assert fold.loc[joined, "split"].isin(["train", "val"]).all()
        pd.testing.assert_series_equal(fold.loc[~joined, "split"], given.loc[~joined, "split"])
        assert (fold["split"] == "val").sum() == pytest.approx(joined.sum() / 4, rel=0.15)


def test_too_few_patients_for_the_folds_are_told() -> None:
    samples = cohort(50, 0, seed=0)
    samples.loc[samples["patient"].isin(["p1", "p2", "p3"]), LABELS] = [0.0, 1.0]
    with pytest.raises(ValueError, match="class 'pneumonia': 3 patients, too few for one in each of 5 folds"):
        kfold(samples, fold=0, num_folds=5, fractions=FRACTIONS, seed=0, labels=LABELS)
    with pytest.raises(ValueError, match="60 folds: there are 50 patients"):
        kfold(samples, fold=0, num_folds=60, fractions=FRACTIONS, seed=0, labels=[])


# --- sites -------------------------------------------------------------------------------------------


def test_the_site_left_out_is_test_and_nothing_of_it_is_anywhere_else() -> None:
    samples = cohort(200, 0.3, seed=1)
    shared = {"fractions": FRACTIONS, "seed": 0, "labels": LABELS}
    for fold, site in enumerate(["site0", "site1", "site2"]):
        splits = leave_site_out(samples, site=site, fold=0, **shared)
        pd.testing.assert_series_equal(splits, leave_site_out(samples, site=None, fold=fold, **shared))
        assert ((splits == "test") == (samples["site"] == site)).all()
        found = splits[splits != "test"].value_counts(normalize=True)
        assert found["train"] == pytest.approx(0.75, abs=0.03)
        assert found["calibration"] == pytest.approx(0.125, abs=0.03)
        assert not crossing(samples, splits)


def test_a_patient_seen_at_both_sites_neither_teaches_nor_judges_from_the_other() -> None:
    """Site by site alone, the same patient stands in train and in test."""
    samples = cohort(100, 0.4, seed=2)
    samples["site"] = ["north" if row % 40 == 0 else "south" for row in range(len(samples))]
    samples["site"] = samples["site"].mask(samples["patient"].isin(["p3", "p30", "p60"]), "north")
    north = samples["site"] == "north"
    both = samples["patient"].isin(samples.loc[north, "patient"]) & ~north
    splits = leave_site_out(samples, site="north", fold=0, fractions=FRACTIONS, seed=0, labels=LABELS)
    assert both.any()
    assert (splits[both] == "excluded").all()
    assert (splits[north] == "test").all()
    assert set(samples.loc[splits == "test", "patient"]).isdisjoint(
        samples.loc[splits.isin(["train", "val", "calibration"]), "patient"]
    )


@pytest.mark.parametrize(
    ("changes", "site", "fold", "message"),
    [
        ({}, "site7", 0, "site 'site7': no sample is from it; use one of the 3 sites"),
        ({}, None, 3, "fold 3: there are 3 sites; use 0 to 2"),
        ({"site": "only"}, None, 0, "site: all samples are of one"),
        ({"site": ""}, None, 0, "samples have none, and could be of the site left out"),
        ({"label_pneumonia": 0.0}, None, 0, "class 'pneumonia': no sample of the site left out shows it"),
    ],
)
def test_a_site_that_cannot_be_left_out_is_refused_in_one_line(
    changes: dict[str, object], site: str | None, fold: int, message: str
) -> None:
    samples = cohort(60, 0.4, seed=0).assign(**changes)
    with pytest.raises(ValueError, match=message) as error:
        leave_site_out(samples, site=site, fold=fold, fractions=FRACTIONS, seed=0, labels=LABELS)
    assert "\n" not in str(error.value)
