"""What a scoring writes: numbers that anyone can recompute, and a report that stands alone."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn import metrics as reference
from test_bundle import CLASSES, NUM, train_bundle, write_dataset
from test_comparing import boxes_of

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, read_splits, write_splits
from cadx.evaluating import Detection, Settings, by_patient, show_glossary
from cadx.evaluating.glossary import WORDS
from cadx.metrics import METRICS
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import PredictionsInfo, answer_table, read_predictions
from cadx.reporting import LEGEND, MARK, Page
from cadx.types import Estimate, RawImage
from components.calibrate import CalibrateParams, calibrate
from components.evaluate import EvaluateParams, evaluate


@dataclass
class Run:
    """An experiment whose bundle is ready to be scored."""

    dataset: Path
    splits: Path
    bundle: Path

    def evaluate(self, out: Path, **params: object) -> dict:
        evaluate(
            dataset=self.dataset,
            splits=self.splits,
            bundle=self.bundle,
            test_uses=out / "test_uses.jsonl",
            predictions=out / "predictions.parquet",
            metrics=out / "metrics.json",
            report=out / "report.html",
            params=EvaluateParams(resamples=100, **params),
        )
        return json.loads((out / "metrics.json").read_text())


def prepare(folder: Path, task: str = "binary", *, clustered: bool = True, steps: int = 16) -> Run:
    dataset, splits = write_dataset(folder, task, clustered=clustered)
    trained = train_bundle(folder / "trained", dataset, splits, steps=steps)
    params = CalibrateParams(sensitivity=0.9)
    calibrate(dataset=dataset, splits=splits, trained=trained, bundle=folder / "bundle", params=params)
    return Run(dataset, splits, folder / "bundle")


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def scored(ready: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a scoring of test."""
    out = tmp_path_factory.mktemp("scored")
    ready.evaluate(out, split="test", minimum_n=5)
    return out


def test_metrics_are_what_scikit_learn_makes_of_the_predictions_file(scored: Path) -> None:
    frame, info = read_predictions(scored / "predictions.parquet")
    found = json.loads((scored / "metrics.json").read_text())
    y, p = frame["label_opacity"], frame["prob_opacity"]
    called = frame["decision"] == "opacity"
    assert (called == (p >= info.thresholds["opacity"])).all()
    expected = {
        "auc": reference.roc_auc_score(y, p),
        "average_precision": reference.average_precision_score(y, p),
        "sensitivity": reference.recall_score(y, called),
        "specificity": reference.recall_score(1 - y, ~called),
        "ppv": reference.precision_score(y, called),
        "npv": reference.precision_score(1 - y, ~called),
        "f1": reference.f1_score(y, called),
        "accuracy": reference.accuracy_score(y, p > 0.5),
        "accuracy_at_operating_point": reference.accuracy_score(y, called),
        "balanced_accuracy": reference.balanced_accuracy_score(y, called),
        "brier": reference.brier_score_loss(y, p),
    }
    for name, value in expected.items():
        estimate = found["metrics"][name]
        assert estimate["value"] == pytest.approx(value, abs=1e-9), name
        assert estimate["low"] <= value <= estimate["high"], name
        assert estimate["method"]
    truth = np.where(y == 1, "opacity", "normal")
    confusion = reference.confusion_matrix(truth, frame["decision"], labels=info.classes)
    np.testing.assert_array_equal(found["confusion"]["at_operating_point"], confusion)


def test_the_record_has_its_form(scored: Path, ready: Run) -> None:
    found = json.loads((scored / "metrics.json").read_text())
    assert list(found) == [
        "schema", "experiment", "seed", "split", "bundle", "dataset", "splits", "predictions", "n", "n_patients",
        "clustered", "warnings", "aggregate", "metrics", "by_class", "by_subgroup", "gaps", "confusion",
        "operating_point", "predictive_values", "decision_curve", "conformal", "uncertainty", "roc",
    ]  # fmt: skip
    assert (found["schema"], found["experiment"], found["split"]) == (1, "squares", "test")
    assert found["bundle"] == Bundle(ready.bundle).digest
    assert (found["n"], found["n_patients"]) == (NUM["test"], NUM["test"] // 2)
    assert set(found["metrics"]) <= set(METRICS)
    assert set(found["by_subgroup"]) == {"site", "sex", "age"}
    assert set(found["by_subgroup"]["site"]) == {"north", "south"}
    assert sum(group["n"] for group in found["by_subgroup"]["age"].values()) == NUM["test"]


def test_predictions_are_those_of_the_predictor_alone(scored: Path, ready: Run) -> None:
    frame, info = read_predictions(scored / "predictions.parquet")
    folder, predictor = DatasetFolder(ready.dataset), Predictor(ready.bundle, device="cpu")
    assert info.bundle == predictor.bundle.digest
    for row in frame.head(12).itertuples():
        answer = predictor.predict(RawImage(folder.pixels(row.sample_id)))
        assert answer.probabilities["opacity"] == pytest.approx(row.prob_opacity, abs=1e-6)
        assert answer.decision == row.decision


def test_each_scoring_of_test_is_one_line_and_of_val_none(ready: Run, tmp_path: Path) -> None:
    ready.evaluate(tmp_path, split="val")
    assert not (tmp_path / "test_uses.jsonl").exists()
    ready.evaluate(tmp_path, split="test")
    ready.evaluate(tmp_path, split="test")
    ready.evaluate(tmp_path)
    lines = (tmp_path / "test_uses.jsonl").read_text().splitlines()
    assert len(lines) == 2
    use = json.loads(lines[0])
    assert set(use) == {"time", "experiment", "seed", "split", "bundle", "dataset"}
    assert (use["split"], use["bundle"]) == ("test", Bundle(ready.bundle).digest)
    assert use["time"].endswith("+00:00")
    assert (tmp_path / "report.html").read_text().count(use["bundle"][7:19]) >= 2, (
        "the report shows both uses"
    )


@pytest.mark.parametrize(
    "held", ['{\n  "schema": 1\n}\n', "[]\n", '{"time": "2026-01-01"}\n', b"PAR1\xff\n", None]
)
def test_no_line_is_added_to_a_file_that_holds_something_else(
    ready: Run, tmp_path: Path, held: str | bytes | None
) -> None:
    file = tmp_path / "test_uses.jsonl"
    before = held.encode() if isinstance(held, str) else held
    file.mkdir() if before is None else file.write_bytes(before)
    with pytest.raises(ValueError, match=r"test_uses.jsonl: holds other things than uses of the test split"):
        ready.evaluate(tmp_path, split="test")
    assert [path.name for path in tmp_path.iterdir()] == ["test_uses.jsonl"]
    assert before is None or file.read_bytes() == before


def test_a_scoring_of_test_that_fails_afterwards_is_still_written_down(
    ready: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("components.evaluate.write_predictions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ready.evaluate(tmp_path, split="test")
    assert [p.name for p in tmp_path.iterdir()] == ["test_uses.jsonl"]


def test_val_is_scored_the_same_to_the_byte(ready: Run, tmp_path: Path) -> None:
    for name in ("a", "b"):
        ready.evaluate(tmp_path / name)
    for file in ("predictions.parquet", "metrics.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_the_report_fetches_nothing_and_names_no_patient(scored: Path) -> None:
    html = (scored / "report.html").read_text()
    assert "http" not in html
    assert not re.findall(r"<(script|link|iframe)", html)
    assert "pseudonym-" not in html
    for text in (
        "0.9",
        "ROC",
        "operating point",
        "Worst mistakes",
        "pixel values were taken as linear",
        "Wilson",
    ):
        assert text in html, text


def test_the_report_says_what_is_chance_and_what_holds_elsewhere(scored: Path) -> None:
    """The calibration error beside its value under perfect calibration; predictive values at other prevalences."""
    html = (scored / "report.html").read_text()
    found = json.loads((scored / "metrics.json").read_text())
    error, chance = (found["metrics"][name] for name in ("expected_calibration_error", "ece_if_calibrated"))
    assert f"probabilities miss the observed shares by {error['value']:.3f} on average" in html
    assert f"would make it {chance['value']:.3f} ({chance['low']:.3f} to {chance['high']:.3f})" in html
    hit, spared = (found["metrics"][name]["value"] for name in ("sensitivity", "specificity"))
    told = found["predictive_values"]["opacity"]
    assert {"0.01", "0.05", "0.5"} <= set(told)
    for prevalence, values in told.items():
        share = float(prevalence)
        ppv = share * hit / (share * hit + (1 - share) * (1 - spared))
        npv = (1 - share) * spared / ((1 - share) * spared + share * (1 - hit))
        assert (values["ppv"]["value"], values["npv"]["value"]) == pytest.approx((ppv, npv))
        shown = values["ppv"]
        assert f"{shown['value']:.3f} ({shown['low']:.3f} to {shown['high']:.3f})" in html


def test_the_mean_size_of_prediction_sets_has_an_interval(scored: Path) -> None:
    html = (scored / "report.html").read_text()
    found = json.loads((scored / "metrics.json").read_text())["conformal"]
    for told in (found["mean_size"], found["referred"]):
        assert told["low"] < told["value"] < told["high"]
        assert f"{told['value']:.3f} ({told['low']:.3f} to {told['high']:.3f})" in html
    assert found["mean_size"]["n"] == NUM["test"]


def test_the_operating_point_carries_its_own_uncertainty(scored: Path, ready: Run) -> None:
    _, info = read_predictions(scored / "predictions.parquet")
    found = json.loads((scored / "metrics.json").read_text())
    resampled = Bundle(ready.bundle).manifest.operating_point.resampled["opacity"]
    assert len(set(resampled)) > 1
    told = found["operating_point"]["opacity"]
    assert [told["threshold"][end] for end in ("low", "value", "high")] == pytest.approx(
        [np.quantile(resampled, 0.025), info.thresholds["opacity"], np.quantile(resampled, 0.975)]
    )
    for metric in ("sensitivity", "specificity"):
        fixed, counted = found["metrics"][metric], told[metric]
        assert counted["value"] == pytest.approx(fixed["value"])
        assert counted["high"] - counted["low"] > fixed["high"] - fixed["low"]
        assert "the threshold's choice counted" in counted["method"]


JARGON = ("bootstrap", "bias corrected", "centred", "conservative", "effective n", "logit", "log scale", "percentile",
          "sandwich", "too few")  # fmt: skip


def check_words(html: str, metrics: Iterable[Estimate]) -> None:
    """Every name in the methods, and every word of the glossary on the page, is listed with its meaning."""
    page, _, words = html.partition(">Words</h2>")
    listed = re.findall(r'<th scope="row">(.*?)</th>', words)
    assert set(listed) <= set(WORDS)
    text = re.sub(r"<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    for word in WORDS:
        alone = rf"\b{word}\b(?! corrected)" if word == "bias" else rf"\b{word}\b"
        assert (word in listed) == bool(re.search(alone, text)), word
    methods = " ".join(one.method for one in metrics)
    named = set(re.findall(r"\b[A-Z]\w+", methods)) | {word for word in JARGON if word in methods}
    assert named <= set(listed), "methods that no reader was told of"


def test_no_word_of_the_report_goes_without_its_meaning(scored: Path) -> None:
    found = json.loads((scored / "metrics.json").read_text())
    metrics = [Estimate.model_validate(one) for one in found["metrics"].values()]
    told = " ".join(one.method for one in metrics)
    assert all(word in told for word in ("bootstrap", "logit", "effective n", "too few", "centred")), told
    html = (scored / "report.html").read_text()
    check_words(html, metrics)
    assert LEGEND in html
    assert f"{MARK}</dd>" in html, "headlines of so few patients are rough"


@pytest.mark.parametrize("n", [40, 240])
def test_no_word_of_a_report_on_boxes_goes_without_its_meaning(tmp_path: Path, n: int) -> None:
    frame, info = read_predictions(boxes_of(tmp_path / "a.parquet", skill=0.9, seed=1, n=n))
    detection = Detection(frame, info, Settings(resamples=50, subgroups=(), minimum_n=5))
    page = Page("Lesions")
    detection.show_answer(page)
    detection.show_numbers(page)
    show_glossary(page)
    check_words(page.html(), detection.scores.metrics.values())
    assert {"COCO", "bias corrected", "IoU", "AP"} <= set(
        re.findall(r'<th scope="row">(.*?)</th>', page.html().partition(">Words</h2>")[2])
    )


def test_the_report_shows_the_worst_mistakes_by_sample_id(scored: Path) -> None:
    frame, _ = read_predictions(scored / "predictions.parquet")
    missed = frame[(frame["label_opacity"] == 1) & (frame["decision"] == "normal")]
    alarms = frame[(frame["label_opacity"] == 0) & (frame["decision"] == "opacity")]
    assert len(missed), "no mistake: the test shows nothing"
    assert len(alarms), "no mistake: the test shows nothing"
    html = (scored / "report.html").read_text().split("Worst mistakes")[-1].split("Explanations")[0]
    assert missed.loc[missed["prob_opacity"].idxmin(), "sample_id"] in html
    assert alarms.loc[alarms["prob_opacity"].idxmax(), "sample_id"] in html
    right = frame[(frame["label_opacity"] == 1) & (frame["decision"] == "opacity")]
    assert not [name for name in right["sample_id"] if name in html]


def test_a_source_without_patients_says_what_its_intervals_mean(tmp_path: Path) -> None:
    run = prepare(tmp_path / "run", clustered=False, steps=4)
    found = run.evaluate(tmp_path / "out")
    assert found["clustered"] is False
    assert any("intervals treat each image as a patient" in text for text in found["warnings"])
    assert "intervals treat each image as a patient" in (tmp_path / "out" / "report.html").read_text()


def test_other_splits_than_those_of_the_training_are_warned_of(ready: Run, tmp_path: Path) -> None:
    splits = read_splits(ready.splits)
    splits["reason"] = "moved"
    write_splits(tmp_path / "splits.parquet", splits)
    other = Run(ready.dataset, tmp_path / "splits.parquet", ready.bundle)
    assert any("other splits" in text for text in other.evaluate(tmp_path / "out")["warnings"])
    assert not any("other splits" in text for text in ready.evaluate(tmp_path / "same")["warnings"])


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_other_tasks_are_scored_and_shown(tmp_path: Path, task: str) -> None:
    run = prepare(tmp_path / "run", task, steps=6)
    found = run.evaluate(tmp_path / "out")
    frame, info = read_predictions(tmp_path / "out" / "predictions.parquet")
    for name in CLASSES[task]:
        auc = reference.roc_auc_score(frame[f"label_{name}"], frame[f"prob_{name}"])
        assert found["by_class"][name]["auc"]["value"] == pytest.approx(auc, abs=1e-9)
    if task == "multiclass":
        truth = frame[[f"label_{name}" for name in info.classes]].to_numpy().argmax(1)
        called = [info.classes.index(name) for name in frame["decision"]]
        assert found["metrics"]["accuracy"]["value"] == pytest.approx(reference.accuracy_score(truth, called))
    else:
        for name, threshold in info.thresholds.items():
            assert (frame[f"decision_{name}"] == (frame[f"prob_{name}"] >= threshold)).all()


def test_an_empty_split_is_refused_before_test_is_used(ready: Run, tmp_path: Path) -> None:
    splits = read_splits(ready.splits)
    splits.loc[splits["split"] == "test", "split"] = "excluded"
    write_splits(tmp_path / "splits.parquet", splits)
    run = Run(ready.dataset, tmp_path / "splits.parquet", ready.bundle)
    with pytest.raises(ValueError, match="no labelled sample in the test split") as caught:
        run.evaluate(tmp_path / "out", split="test")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "test_uses.jsonl").exists()


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("binary", {"seen": 1, "open": np.nan, "well": 0, "untold": np.nan}),
        ("multilabel", {"seen": 1, "open": np.nan, "well": 0, "untold": np.nan}),
        ("multiclass", {"seen": 1, "open": 0, "well": 0, "untold": np.nan}),
    ],
)
def test_a_patient_is_well_only_if_every_image_is_known_to_be(task: str, expected: dict[str, float]) -> None:
    of_images = {"seen": (1.0, np.nan), "open": (0.0, np.nan), "well": (0.0, 0.0), "untold": (np.nan, np.nan)}
    label = np.array(list(of_images.values())).ravel()
    p = np.stack([1 - np.tile([0.1, 0.9], 4), np.tile([0.1, 0.9], 4)], axis=1)
    info = PredictionsInfo(
        experiment="squares", seed=0, split="test", bundle="sha256:" + "0" * 64, task=task, classes=("a", "b"),
        positive="b" if task == "binary" else None, clustered=True, thresholds={"a": 0.5, "b": 0.5}, assumptions=(),
    )  # fmt: skip
    known = pd.DataFrame(
        {
            "sample_id": [f"s{row}" for row in range(8)], "patient": np.repeat(list(of_images), 2),
            "site": "", "scanner": "", "age": np.nan, "sex": "", "label_a": 1 - label, "label_b": label,
        }
    )  # fmt: skip
    frame = pd.concat([known, answer_table(p, p >= 0.5, task, info.classes)], axis=1)
    found = by_patient(frame, info, "max").set_index("patient")["label_b"]
    assert found.to_dict() == pytest.approx(expected, nan_ok=True)


def test_images_that_cannot_be_aggregated_are_refused_before_test_is_used(tmp_path: Path) -> None:
    for task, clustered, message in (
        ("multiclass", True, "images of a patient differ in class; set aggregate to none"),
        ("binary", False, "names no patients to aggregate images by; set aggregate to none"),
    ):
        run = prepare(tmp_path / task, task, clustered=clustered, steps=2)
        with pytest.raises(ValueError, match=message) as caught:
            run.evaluate(tmp_path / "out", split="test", aggregate="max")
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out" / "test_uses.jsonl").exists()
