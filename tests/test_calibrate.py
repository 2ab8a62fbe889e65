"""The operating point: chosen on the calibration split alone, for the declared target."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from test_bundle import NUM, train_bundle, write_dataset

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, read_splits, write_splits
from cadx.files import digest_path
from cadx.predicting.predictor import Predictor
from cadx.types import RawImage
from components.calibrate import CalibrateParams, calibrate


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_dataset(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def trained(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle(tmp_path_factory.mktemp("trained") / "trained", *cohort, steps=16)


def run(cohort: tuple[Path, Path], trained: Path, bundle: Path, **params: Any) -> Bundle:
    dataset, splits = cohort
    calibrate(
        dataset=dataset, splits=splits, trained=trained, bundle=bundle, params=CalibrateParams(**params)
    )
    return Bundle(bundle)


def split_scores(bundle: Bundle, cohort: tuple[Path, Path], split: str) -> tuple[np.ndarray, np.ndarray]:
    folder, assigned = DatasetFolder(cohort[0]), read_splits(cohort[1])
    ids = assigned.loc[assigned["split"] == split, "sample_id"].tolist()
    probabilities = Predictor(bundle, device="cpu").probabilities(folder.pixels(i) for i in ids)
    return folder.labels(ids), probabilities


@pytest.mark.parametrize("target", [0.8, 0.95, 1.0])
def test_the_threshold_is_the_largest_that_reaches_the_target(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path, target: float
) -> None:
    bundle = run(cohort, trained, tmp_path / "final", sensitivity=target)
    point = bundle.manifest.operating_point
    labels, probabilities = split_scores(bundle, cohort, "calibration")
    positive, scores = labels[:, 1] == 1, probabilities[:, 1]
    threshold = point.thresholds["opacity"]
    assert (scores[positive] >= threshold).mean() >= target
    higher = scores[positive][scores[positive] >= threshold].min() + 1e-9
    assert (scores[positive] >= higher).mean() < target, "a higher threshold would do as well"
    assert point.target_value == target
    assert point.split == "calibration"
    assert point.n == NUM["calibration"]


def test_what_was_reached_stands_beside_it_with_its_interval(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    bundle = run(cohort, trained, tmp_path / "final")
    point = bundle.manifest.operating_point
    labels, probabilities = split_scores(bundle, cohort, "calibration")
    called = probabilities[:, 1] >= point.thresholds["opacity"]
    reached = point.achieved["opacity"]
    assert reached["sensitivity"].value == pytest.approx(called[labels[:, 1] == 1].mean())
    assert reached["specificity"].value == pytest.approx((~called)[labels[:, 1] == 0].mean())
    assert reached["sensitivity"].low < reached["sensitivity"].value
    assert point.achieved.keys() == {"opacity"}


def test_the_temperature_lowers_the_likelihood_loss_of_the_calibration_split(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    from sklearn.metrics import log_loss

    bundle = run(cohort, trained, tmp_path / "final")
    labels, probabilities = split_scores(bundle, cohort, "calibration")
    folder, assigned = DatasetFolder(cohort[0]), read_splits(cohort[1])
    ids = assigned.loc[assigned["split"] == "calibration", "sample_id"].tolist()
    logits, _ = Predictor(trained, uncalibrated_ok=True).logits(folder.pixels(i) for i in ids)
    uncalibrated = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    assert bundle.manifest.temperature != 1
    assert log_loss(labels[:, 1], probabilities[:, 1]) < log_loss(labels[:, 1], uncalibrated[:, 1])


def test_an_isotonic_curve_goes_with_the_bundle_into_each_answer(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    """Over the calibration split it answers as scikit-learn's regression on the scaled ones, but for 0 and 1."""
    from sklearn.isotonic import IsotonicRegression

    straight = run(cohort, trained, tmp_path / "straight")
    curved = run(cohort, trained, tmp_path / "curved", method="isotonic")
    assert curved.manifest.isotonic
    assert not straight.manifest.isotonic
    labels, scaled = split_scores(straight, cohort, "calibration")
    _, found = split_scores(curved, cohort, "calibration")
    expected = IsotonicRegression(y_min=0, y_max=1).fit(scaled[:, 1], labels[:, 1]).predict(scaled[:, 1])
    unsure = (expected > 0) & (expected < 1)
    np.testing.assert_allclose(found[unsure, 1], expected[unsure], atol=0.02)
    assert 0 < found[:, 1].min() <= found[:, 1].max() < 1
    assert np.abs(found[:, 1] - scaled[:, 1]).max() > 0.02, "the curve would change nothing here"


def test_who_is_referred_follows_from_the_declared_coverage(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    folder, assigned = DatasetFolder(cohort[0]), read_splits(cohort[1])
    ids = assigned.loc[assigned["split"] == "test", "sample_id"].tolist()
    shares = []
    for coverage in (0.5, 0.9):
        bundle = run(cohort, trained, tmp_path / f"{coverage}", coverage=coverage)
        sets = bundle.manifest.conformal
        assert sets is not None
        answers = Predictor(bundle, device="cpu").predict_many([RawImage(folder.pixels(i)) for i in ids])
        for answer in answers:
            assert list(answer.prediction_set or ()) == [
                name for name, p in answer.probabilities.items() if 1 - p <= sets.quantiles[name]
            ]
            assert answer.refer == (answer.prediction_set != (answer.decision,))
        shares.append(np.mean([answer.refer for answer in answers]))
    assert len({0.0, 1.0, *shares}) > 2, "neither all nor none"


def test_no_other_split_is_looked_at(cohort: tuple[Path, Path], trained: Path, tmp_path: Path) -> None:
    """With the labels of val and test turned round, the bundle is the same to the byte."""
    dataset = shutil.copytree(cohort[0], tmp_path / "dataset")
    assigned = read_splits(cohort[1]).set_index("sample_id")["split"]
    samples = pd.read_parquet(dataset / "samples.parquet")
    other = samples["sample_id"].map(assigned).isin(["val", "test"])
    columns = ["label_normal", "label_opacity"]
    samples.loc[other, columns] = 1 - samples.loc[other, columns]
    samples.to_parquet(dataset / "samples.parquet")
    run(cohort, trained, tmp_path / "a")
    run((dataset, cohort[1]), trained, tmp_path / "b")
    assert digest_path(tmp_path / "a") == digest_path(tmp_path / "b")


@pytest.mark.parametrize("task", ["binary", "multilabel", "multiclass"])
def test_the_final_bundle_holds_its_own_answers_on_the_calibration_split(tmp_path: Path, task: str) -> None:
    cohort = write_dataset(tmp_path, task)
    bundle = run(cohort, train_bundle(tmp_path / "trained", *cohort, steps=4), tmp_path / "final")
    heldout = bundle.heldout()
    folder, assigned = DatasetFolder(cohort[0]), read_splits(cohort[1])
    ids = assigned.loc[assigned["split"] == "calibration", "sample_id"].tolist()
    answers = Predictor(bundle, device="cpu").predict_many([RawImage(folder.pixels(i)) for i in ids])
    for name in bundle.manifest.classes:
        expected = [answer.probabilities[name] for answer in answers]
        np.testing.assert_allclose(heldout[f"prob_{name}"], expected, rtol=0, atol=1e-6)
        if task == "multilabel":
            assert heldout[f"decision_{name}"].tolist() == [name in answer.decision for answer in answers]
    if task != "multilabel":
        assert heldout["decision"].tolist() == [answer.decision for answer in answers]
    embeddings = np.stack(heldout["embedding"].to_list())
    np.testing.assert_allclose(embeddings, [answer.embedding for answer in answers], rtol=0, atol=1e-4)
    assert heldout["site"].tolist() == folder.samples["site"].iloc[folder.rows(ids)].tolist()
    assert not {"sample_id", "patient"} & set(heldout)


@pytest.mark.parametrize(
    ("moved", "message"),
    [
        ("label_opacity >= 0", "no labelled sample in the calibration split"),
        ("label_opacity == 1", "no sample of class 'opacity' in the calibration split"),
        ("label_opacity == 0", "no sample of class 'normal' in the calibration split"),
    ],
)
def test_a_split_that_cannot_tell_is_refused_and_nothing_is_written(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path, moved: str, message: str
) -> None:
    splits = read_splits(cohort[1])
    chosen = DatasetFolder(cohort[0]).samples.query(moved)["sample_id"]
    splits.loc[(splits["split"] == "calibration") & splits["sample_id"].isin(chosen), "split"] = "train"
    write_splits(tmp_path / "splits.parquet", splits)
    with pytest.raises(ValueError, match=message) as caught:
        run((cohort[0], tmp_path / "splits.parquet"), trained, tmp_path / "final")
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["splits.parquet"]


def test_multilabel_has_a_threshold_per_class_and_multiclass_none(tmp_path: Path) -> None:
    for task, expected in (("multilabel", {"opacity", "stripe"}), ("multiclass", set())):
        cohort = write_dataset(tmp_path / task, task)
        trained = train_bundle(tmp_path / task / "trained", *cohort, steps=4)
        bundle = run(cohort, trained, tmp_path / task / "final", sensitivity=0.9)
        point = bundle.manifest.operating_point
        assert set(point.thresholds) == expected
        assert set(point.achieved) == set(bundle.manifest.classes)
        labels, probabilities = split_scores(bundle, cohort, "calibration")
        for name in expected:
            column = bundle.manifest.classes.index(name)
            positive = labels[:, column] == 1
            assert (probabilities[positive, column] >= point.thresholds[name]).mean() >= 0.9
        assert (point.target_value is None) == (task == "multiclass")


def test_a_declared_threshold_stands_and_nothing_is_fitted_where_nothing_may_be(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    manifest = run(cohort, trained, tmp_path / "final", threshold=0.25, method="none", coverage=0).manifest
    point = manifest.operating_point
    assert (manifest.temperature, manifest.bias, manifest.conformal) == (1, (0, 0), None)
    assert (point.thresholds, point.target_metric, point.resampled) == ({"opacity": 0.25}, None, {})
    several = write_dataset(tmp_path / "several", "multiclass")
    other = train_bundle(tmp_path / "several/trained", *several, steps=1)
    with pytest.raises(ValueError, match=r"threshold 0\.25: of several classes the most probable is called"):
        run(several, other, tmp_path / "refused", threshold=0.25)
    with pytest.raises(ValueError, match=r"was not cross-validated; set train\.folds"):
        run(cohort, trained, tmp_path / "refused", split="folds")


def test_a_finished_bundle_and_a_damaged_one_are_refused(
    cohort: tuple[Path, Path], trained: Path, tmp_path: Path
) -> None:
    run(cohort, trained, tmp_path / "final")
    with pytest.raises(ValueError, match="complete and never changes"):
        run(cohort, tmp_path / "final", tmp_path / "again")
    damaged = shutil.copytree(trained, tmp_path / "damaged")
    (damaged / "history.json").write_text(json.dumps([]))
    with pytest.raises(ValueError, match=r"changed since it was written: history\.json"):
        run(cohort, damaged, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_another_dataset_is_refused(trained: Path, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "other", "multilabel")
    with pytest.raises(ValueError, match="was trained on"):
        run(other, trained, tmp_path / "final")
