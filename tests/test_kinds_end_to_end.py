"""Volumes, bags of features and boxes through the steps that images take, from train to gate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo, preview, read_splits, write_splits
from cadx.detection import METRICS, calculate_map
from cadx.drift import image_statistics
from cadx.files import digest_bytes
from cadx.gating import read_decision
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import box_table, read_predictions
from cadx.splitting import cross_validation
from components.calibrate import calibrate
from components.evaluate import evaluate
from components.gate import gate
from components.package import package
from components.summarise import summarise
from components.train import train
from serving.archive import read_release, require_endpoint

NUM_SAMPLES = 100
RECIPES: dict[str, dict[str, Any]] = {
    "volume": {
        "model": {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
        "preprocessing": {"patch_px": [16, 16, 16], "window_hu": [0, 120]},
        "patches_per_sample": 1,
        "epochs": 6,
    },
    "features": {
        "model": {"family": "mil", "pooling": "max", "negative_class": 0, "hidden_dim": 32, "dropout": 0.0},
        "preprocessing": {"channels": 12},
        "epochs": 40,
    },
}


def _sample(kind: str, rng: np.random.Generator, sick: bool) -> tuple[np.ndarray, dict[str, Any]]:
    if kind == "features":
        bag = rng.normal(size=(rng.integers(5, 12), 12)).astype(np.float32)
        bag[0, 3] += 8 * sick
        return bag, {}
    voxels = rng.integers(0, 60, (16, 18, 20)).astype(np.int16)
    voxels[4:12, 4:12, 4:12] += 60 * np.int16(sick)
    return voxels, {"spacing_mm": (1.0, 1.0, 1.0)}


def _cohort(folder: Path, kind: str) -> list[str]:
    """A dataset of this kind with what `train` takes beside it; the ids of its samples."""
    rng = np.random.default_rng(0)
    ids = [f"s{number:03}" for number in range(NUM_SAMPLES)]
    with DatasetWriter(
        folder / "dataset",
        name=kind,
        kind=kind,  # type: ignore[arg-type]
        task="binary",
        classes=("none", "nodule"),
        positive="nodule",
        modality="noise",
        clustered=False,
        source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number, sample_id in enumerate(ids):
            sick = number % 3 == 0
            array, extra = _sample(kind, rng, sick)
            writer.add(
                Sample(
                    sample_id=sample_id,
                    pixels=array,
                    labels={("none", "nodule")[sick]: 1},
                    patient=f"p{number}",
                    sha256=digest_bytes(array.tobytes()),
                    statistics=image_statistics(preview(kind, array)),  # type: ignore[arg-type]
                    **extra,
                )
            )
    recommended = {"recommendation": {"loss": {"kind": "cross_entropy"}, "sampler": "natural"}}
    (folder / "imbalance.json").write_text(json.dumps(recommended))
    return ids


@pytest.mark.parametrize("kind", RECIPES)
def test_a_kind_goes_from_training_to_a_report(kind: str, tmp_path: Path) -> None:
    ids = _cohort(tmp_path, kind)
    split = np.repeat(["train", "val", "calibration", "test"], NUM_SAMPLES // 4)
    splits = tmp_path / "splits.parquet"
    write_splits(splits, pd.DataFrame({"sample_id": ids, "split": split, "reason": ""}))
    shared = {"dataset": tmp_path / "dataset", "splits": splits}
    train(
        **shared,
        imbalance=tmp_path / "imbalance.json",
        checkpoints=tmp_path / "checkpoints",
        trained=tmp_path / "trained",
        log=tmp_path / "training.jsonl",
        experiment=kind,
        seed=0,
        params=json.dumps({"batch_size": 8, "learning_rate": 3e-3} | RECIPES[kind]),
    )
    calibrate(**shared, trained=tmp_path / "trained", bundle=tmp_path / "bundle", params="{}")
    evaluate(
        **shared,
        bundle=tmp_path / "bundle",
        test_uses=tmp_path / "test_uses.jsonl",
        predictions=tmp_path / "predictions.parquet",
        metrics=tmp_path / "metrics.json",
        report=tmp_path / "report.html",
        params='{"split": "test"}',
    )
    frame, info = read_predictions(tmp_path / "predictions.parquet")
    assert frame["sample_id"].tolist() == ids[-NUM_SAMPLES // 4 :]
    assert info.bundle == Bundle(tmp_path / "bundle").digest
    sick = frame["label_nodule"] == 1
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"]["auc"]["value"] >= 0.9
    assert record["metrics"]["auc"]["value"] == pytest.approx(roc_auc_score(sick, frame["prob_nodule"]))
    page = (tmp_path / "report.html").read_text()
    assert ("voxels" if kind == "volume" else "12 numbers for each instance") in page
    # A bag of numbers has no picture to lay a map over.
    assert ("the same network gives with random weights" in page) == (kind == "volume")


def test_cross_validation_answers_each_sample_by_the_network_that_did_not_see_it(tmp_path: Path) -> None:
    ids = _cohort(tmp_path, "features")
    splits = tmp_path / "splits.parquet"
    write_splits(splits, pd.DataFrame({"sample_id": ids, "split": "train", "reason": ""}))
    shared = {"dataset": tmp_path / "dataset", "splits": splits}
    made = {
        "imbalance": tmp_path / "imbalance.json",
        "checkpoints": tmp_path / "checkpoints",
        "log": tmp_path / "training.jsonl",
        "experiment": "features",
        "seed": 3,
    }
    recipe = RECIPES["features"] | {"batch_size": 8, "learning_rate": 3e-3, "epochs": 10, "keep": "last"}
    train(**shared, **made, trained=tmp_path / "trained", params=json.dumps(recipe | {"folds": 4}))
    undecided = {"split": "folds", "method": "none", "threshold": 0.5, "coverage": 0}
    calibrate(
        **shared, trained=tmp_path / "trained", bundle=tmp_path / "bundle", params=json.dumps(undecided)
    )
    scoring = {
        "test_uses": tmp_path / "test_uses.jsonl",
        "predictions": tmp_path / "predictions.parquet",
        "metrics": tmp_path / "metrics.json",
        "report": tmp_path / "report.html",
        "params": '{"split": "folds"}',
    }
    evaluate(**shared, bundle=tmp_path / "bundle", **scoring)
    frame, info = read_predictions(tmp_path / "predictions.parquet")
    assert info.split == "folds"
    assert sorted(frame["sample_id"]) == ids
    assert not (tmp_path / "test_uses.jsonl").exists()

    bundle, folder = Bundle(tmp_path / "bundle"), DatasetFolder(tmp_path / "dataset")
    assert all(record["best_epoch"] == 10 for record in _best(tmp_path / "training.jsonl"))
    answers = []
    for network in bundle.networks():
        bags = [torch.from_numpy(folder.pixels(name))[None] for name in frame["sample_id"]]
        with torch.inference_mode():
            logits = [network.eval()(bag, torch.ones(bag.shape[:2], dtype=torch.bool)).logits for bag in bags]
        answers.append(torch.cat(logits).softmax(1)[:, 1].numpy())
    answered_by = np.array([np.isclose(one, frame["prob_nodule"], atol=1e-6) for one in answers])
    folds = _seen_by(folder, splits, num_folds=4, seed=3)
    for number, seen in enumerate(folds):
        unseen = ~frame["sample_id"].isin(seen)
        assert answered_by[number, unseen].all()
        assert not answered_by[number, ~unseen].all()

    gate(
        metrics=tmp_path / "metrics.json",
        bundle=tmp_path / "bundle",
        decision=tmp_path / "decision.json",
        params='{"at_least": {"auc": 0.1}}',
    )
    reasons = [check.reason for check in read_decision(tmp_path / "decision.json").checks if not check.passed]
    assert len(reasons) == 1
    assert "fold by fold" in reasons[0]

    package(
        bundle=tmp_path / "bundle",
        decision=tmp_path / "decision.json",
        metrics=tmp_path / "metrics.json",
        archive=tmp_path / "model.mar",
        card=tmp_path / "card.html",
        params="{}",
    )
    assert read_release(tmp_path / "model.mar").bundle == bundle.digest
    with pytest.raises(ValueError, match="no endpoint takes samples of its kind"):
        require_endpoint(tmp_path / "model.mar")

    write_splits(splits, pd.DataFrame({"sample_id": ids, "split": "train", "reason": "again"}))
    with pytest.raises(ValueError, match="other splits, so its folds are not these"):
        evaluate(**shared, bundle=tmp_path / "bundle", **scoring)


def _best(log: Path) -> list[dict[str, Any]]:
    return [record for record in map(json.loads, log.read_text().splitlines()) if "best_epoch" in record]


def _seen_by(folder: DatasetFolder, splits: Path, *, num_folds: int, seed: int) -> list[set[str]]:
    labels = list(folder.info.label_columns)
    folds = cross_validation(
        folder.samples, read_splits(splits), num_folds=num_folds, seed=seed, labels=labels
    )
    return [set(fold.loc[fold["split"] == "train", "sample_id"]) for fold in folds]


# --- Boxes --------------------------------------------------------------------------------------------

LESIONS = {"mass": (14, 12, 150), "cluster": (8, 8, 90)}  # height and width in pixels, brightness


@pytest.fixture(scope="module")
def lesions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of boxes, its splits, and two seeds of a bundle that `train` wrote.

    Two images a patient; every fourth image shows nothing, and every other one some noise that is no lesion.
    """
    folder = tmp_path_factory.mktemp("lesions")
    rng = np.random.default_rng(1)
    ids = [f"s{number:03}" for number in range(112)]
    with DatasetWriter(
        folder / "dataset",
        name="lesions",
        task="detection",
        classes=tuple(LESIONS),
        positive=None,
        modality="noise",
        clustered=True,
        source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number, sample_id in enumerate(ids):
            pixels = rng.integers(0, 60, (64, 64)).astype(np.uint8)
            pixels[2:7, 50:60] += 60 * (number % 2)
            boxes: list[tuple[str, float, float, float, float]] = []
            for column, name in enumerate(LESIONS):
                height, width, brightness = LESIONS[name]
                if number % 4 not in (0, 3 - 2 * column):
                    top, left = 10 + int(rng.integers(36)), 32 * column + int(rng.integers(18))
                    pixels[top : top + height, left : left + width] += brightness
                    boxes.append((name, left, top, left + width, top + height))
            writer.add(
                Sample(
                    sample_id=sample_id,
                    pixels=pixels,
                    labels={name: float(any(box[0] == name for box in boxes)) for name in LESIONS},
                    boxes=boxes,
                    patient=f"pseudonym-{number // 2}",
                    site="north" if number % 8 < 4 else "south",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics=image_statistics(pixels),
                )
            )
    split = np.repeat(["train", "val", "calibration", "test"], [40, 8, 32, 32])
    write_splits(folder / "splits.parquet", pd.DataFrame({"sample_id": ids, "split": split, "reason": ""}))
    recommended = {"recommendation": {"loss": {"kind": "focal"}, "sampler": "natural"}}
    (folder / "imbalance.json").write_text(json.dumps(recommended))
    for seed in (0, 1):
        train(
            dataset=folder / "dataset",
            splits=folder / "splits.parquet",
            imbalance=folder / "imbalance.json",
            checkpoints=folder / f"checkpoints{seed}",
            trained=folder / f"trained{seed}",
            log=folder / f"training{seed}.jsonl",
            experiment="lesions",
            seed=seed,
            params=json.dumps(
                {
                    "model": {"family": "yolo", "width": 0.25, "strides": [4, 8]},
                    "preprocessing": {"height_px": 64, "width_px": 64, "mean": 0.2},
                    "batch_size": 8,
                    "learning_rate": 3e-3,
                    "epochs": 10,
                }
            ),
        )
    return folder


def _score(folder: Path, out: Path, seed: int = 0, **calibration: Any) -> dict[str, Any]:
    """Calibrate and evaluate one seed on test; its metrics."""
    shared = {"dataset": folder / "dataset", "splits": folder / "splits.parquet"}
    calibrate(
        **shared, trained=folder / f"trained{seed}", bundle=out / "bundle", params=json.dumps(calibration)
    )
    evaluate(
        **shared,
        bundle=out / "bundle",
        test_uses=out / "test_uses.jsonl",
        predictions=out / "predictions.parquet",
        metrics=out / "metrics.json",
        report=out / "report.html",
        params='{"split": "test", "resamples": 200, "minimum_n": 5}',
    )
    found: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return found


@pytest.fixture(scope="module")
def scored(lesions: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The folder of each seed's scoring."""
    outs = [tmp_path_factory.mktemp(f"seed{seed}") for seed in (0, 1)]
    for seed, out in enumerate(outs):
        _score(lesions, out, seed, sensitivity=0.9)
    return outs


@pytest.mark.slow
def test_calibrate_completes_a_detector_s_bundle(lesions: Path, scored: list[Path]) -> None:
    bundle = Bundle(scored[0] / "bundle")
    point = bundle.manifest.operating_point
    assert point is not None
    assert (point.target_metric, point.target_value, point.n) == ("sensitivity", 0.9, 32)
    assert set(point.thresholds) == set(LESIONS)
    assert set(point.achieved) == set(LESIONS)
    for name, achieved in point.achieved.items():
        assert set(achieved) == {"sensitivity", "precision", "false_positives_per_image"}
        value = achieved["sensitivity"].value
        assert value is not None
        assert value >= 0.9, name
        assert achieved["sensitivity"].low is not None
    # Opened as complete, and what it calls on the calibration split is what the bundle keeps to be compared with.
    predictor, folder = Predictor(scored[0] / "bundle"), DatasetFolder(lesions / "dataset")
    heldout = bundle.heldout()
    assert list(heldout.columns) == bundle.manifest.heldout_columns
    ids = folder.samples["sample_id"].tolist()[48:80]
    for (_, row), answer in zip(heldout.iterrows(), predictor.detect(map(folder.pixels, ids)), strict=True):
        for column, name in enumerate(LESIONS):
            best = max(answer.scores[answer.labels == column].tolist(), default=0.0)
            assert row[f"prob_{name}"] == pytest.approx(best, abs=1e-5)
            assert row[f"decision_{name}"] == (best >= point.thresholds[name])


def test_an_operating_point_may_be_declared_by_false_alarms(lesions: Path, tmp_path: Path) -> None:
    found = _score(lesions, tmp_path, false_positives_per_image=0.125)
    point = Bundle(tmp_path / "bundle").manifest.operating_point
    assert point is not None
    assert (point.target_metric, point.target_value) == ("false_positives_per_image", 0.125)
    for achieved in point.achieved.values():
        value = achieved["false_positives_per_image"].value
        assert value is not None
        assert value <= 0.125
    assert "false_positives_per_image &lt;= 0.125" in (tmp_path / "report.html").read_text()
    assert found["metrics"]["sensitivity"]["value"] > 0


def test_evaluate_scores_boxes_from_its_own_predictions_file(lesions: Path, scored: list[Path]) -> None:
    frame, info = read_predictions(scored[0] / "predictions.parquet")
    assert frame["sample_id"].tolist() == [f"s{number:03}" for number in range(80, 112)]
    record = json.loads((scored[0] / "metrics.json").read_text())
    assert list(record["metrics"]) == list(METRICS)
    boxes, truth = box_table(frame, "boxes"), box_table(frame, "lesions")
    ids = frame["sample_id"].tolist()
    for of, values in calculate_map(boxes, truth, ids, classes=info.classes).items():
        estimates = record["by_class"][of] if of else record["metrics"]
        for name, value in values.items():
            assert estimates[name]["value"] == value
    ap50 = record["metrics"]["ap50"]
    assert ap50["value"] >= 0.8, "too poor a network for the rest to mean anything"
    assert ap50["low"] <= ap50["value"] <= ap50["high"]
    called = boxes[boxes["score"] >= boxes["class"].map(info.thresholds)]
    assert record["metrics"]["precision"]["n"] == len(called)
    for name in LESIONS:
        own = frame["sample_id"].map(called[called["class"] == name].groupby("sample_id").size())
        np.testing.assert_array_equal(frame[f"decision_{name}"], own > 0)
        assert (
            frame[f"label_{name}"] == frame["sample_id"].isin(truth[truth["class"] == name]["sample_id"])
        ).all()
    assert (record["n"], record["n_patients"], record["n_lesions"]) == (32, 16, len(truth))
    assert set(record["by_subgroup"]) == {"site", "lesion size"}
    assert set(record["by_subgroup"]["site"]) == {"north", "south"}
    north = record["by_subgroup"]["site"]["north"]
    assert north["metrics"]["image_auc"] == north["auc"], "a gate asks for it by its own name"
    small = record["by_subgroup"]["lesion size"]["small"]
    assert small["n_positive"] == len(truth)
    assert small["sensitivity"] == record["metrics"]["sensitivity_small"]


def test_the_report_of_boxes_shows_what_was_missed_and_stands_alone(
    lesions: Path, scored: list[Path]
) -> None:
    page = (scored[0] / "report.html").read_text()
    for text in (
        "FROC",
        "AP50",
        "false positives per image",
        "Green frames: lesions",
        "called at a score of",
    ):
        assert text in page
    assert "http" not in page
    assert "pseudonym-" not in page
    frame, info = read_predictions(scored[0] / "predictions.parquet")
    called = frame[[f"decision_{name}" for name in info.classes]].to_numpy(bool)
    alarms = frame.loc[
        (called & (frame[[f"label_{name}" for name in info.classes]] == 0)).any(axis=1), "sample_id"
    ]
    if len(alarms):
        assert any(sample_id in page for sample_id in alarms)
    assert len((scored[0] / "test_uses.jsonl").read_text().splitlines()) == 1


def test_seeds_of_boxes_are_joined_over_the_same_resamples(scored: list[Path], tmp_path: Path) -> None:
    paths = tuple(out / "predictions.parquet" for out in scored)
    summarise(
        predictions=paths,
        metrics=tmp_path / "metrics.json",
        report=tmp_path / "report.html",
        params='{"resamples": 200, "minimum_n": 5}',
    )
    joined = json.loads((tmp_path / "metrics.json").read_text())
    each = [json.loads((out / "metrics.json").read_text()) for out in scored]
    assert joined["seeds"] == [0, 1]
    for name in ("ap50", "froc", "sensitivity", "precision", "false_positives_per_image", "image_auc"):
        values = [one["metrics"][name]["value"] for one in each]
        estimate = joined["metrics"][name]
        assert joined["by_seed"][name] == pytest.approx(values)
        assert estimate["value"] == pytest.approx(np.mean(values))
        assert estimate["low"] <= estimate["value"] <= estimate["high"]
        assert joined["between_seed_sd"][name] == pytest.approx(np.std(values, ddof=1))
    assert "seed 1" in (tmp_path / "report.html").read_text()
    summarise(
        predictions=paths[:1],
        metrics=tmp_path / "one.json",
        report=tmp_path / "one.html",
        params='{"resamples": 200, "minimum_n": 5}',
    )
    alone = json.loads((tmp_path / "one.json").read_text())
    assert alone["metrics"] == each[0]["metrics"]


@pytest.mark.parametrize(("bound", "promote"), [(0.5, True), (0.9999, False)])
def test_the_gate_holds_the_lower_bound_of_ap50(
    scored: list[Path], tmp_path: Path, bound: float, promote: bool
) -> None:
    shared = {"metrics": scored[0] / "metrics.json", "bundle": scored[0] / "bundle"}
    params = {"at_least": {"ap50": bound}, "at_most": {"false_positives_per_image": 8.0}}
    gate(**shared, decision=tmp_path / "decision.json", params=json.dumps(params))
    decision = read_decision(tmp_path / "decision.json")
    assert decision.promote == promote, decision.reasons
    assert any("AP50" in reason for reason in decision.reasons) != promote
    package(
        **shared,
        decision=tmp_path / "decision.json",
        archive=tmp_path / "lesions.mar",
        card=tmp_path / "card.md",
        params="{}",
    )
    assert "AP50" in (tmp_path / "card.md").read_text()


def test_a_calibration_split_without_a_class_of_lesions_is_refused(lesions: Path, tmp_path: Path) -> None:
    ids = [f"s{number:03}" for number in range(112)]
    only_empty = np.where(np.arange(112) % 4 == 0, "calibration", "train")
    write_splits(
        tmp_path / "splits.parquet", pd.DataFrame({"sample_id": ids, "split": only_empty, "reason": ""})
    )
    with pytest.raises(ValueError, match="no lesion of class 'mass' in the calibration split") as caught:
        calibrate(
            dataset=lesions / "dataset",
            splits=tmp_path / "splits.parquet",
            trained=lesions / "trained0",
            bundle=tmp_path / "bundle",
            params="{}",
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "bundle").exists()
