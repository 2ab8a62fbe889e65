"""Two models on the same patients: what the comparison says, and what it refuses to compare."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import recall_score, roc_auc_score
from statsmodels.stats.contingency_tables import mcnemar

from cadx.comparing import agreement, compare_files, compare_metrics, difference_text, paired, read_scored
from cadx.evaluating.glossary import WORDS
from cadx.files import digest_bytes
from cadx.predicting.table import PredictionsInfo, answer_table, decide, read_predictions, write_predictions
from cadx.reporting import LEGEND, MARK


def scored(
    path: Path,
    *,
    skill: float,
    seed: int,
    n: int = 300,
    task: str = "binary",
    per_patient: int = 1,
    start: int = 0,
    aggregate: str = "none",
) -> Path:
    """Predictions of a model of some skill on cases that depend on nothing but their number."""
    classes = {"binary": ("normal", "opacity"), "multilabel": ("opacity", "stripe")}[task]
    truth = np.random.default_rng(0).random((n, len(classes))) < 0.4
    if task == "binary":
        truth[:, 0] = ~truth[:, 1]
    noise = np.random.default_rng(seed).normal(size=truth.shape)
    probabilities = 1 / (1 + np.exp(-(skill * (truth - 0.5) + noise)))
    if task == "binary":
        probabilities[:, 0] = 1 - probabilities[:, 1]
    positive = "opacity" if task == "binary" else None
    thresholds = dict.fromkeys(["opacity"] if task == "binary" else classes, 0.5)
    info = PredictionsInfo(
        experiment="squares", seed=seed, split="test", bundle=digest_bytes(str(seed).encode()), task=task,
        classes=classes, positive=positive, clustered=per_patient > 1, thresholds=thresholds, assumptions=(),
        aggregate=aggregate,
    )  # fmt: skip
    frame = pd.DataFrame(
        {
            "sample_id": [f"s{start + i:04d}" for i in range(n)],
            "patient": [f"p{(start + i) // per_patient}" for i in range(n)],
            "site": "", "scanner": "", "age": float("nan"), "sex": "",
        }
        | {f"label_{name}": truth[:, column].astype(float) for column, name in enumerate(classes)}
    )  # fmt: skip
    calls = decide(probabilities, thresholds, task, classes, positive)
    # In another order: cases are told by their id.
    order = np.random.default_rng(seed).permutation(n)
    answers = answer_table(probabilities, calls, task, classes)
    write_predictions(path, pd.concat([frame, answers], axis=1).iloc[order].reset_index(drop=True), info)
    return path


def test_differences_are_those_of_independent_references(tmp_path: Path) -> None:
    a = read_scored(scored(tmp_path / "a.parquet", skill=2.5, seed=1))
    b = read_scored(scored(tmp_path / "b.parquet", skill=1.5, seed=2))
    found = {one.metric: one for one in compare_metrics(a, b)}
    one, other = a.frame, paired(a, b).frame
    y = one["label_opacity"]
    expected = roc_auc_score(y, one["prob_opacity"]) - roc_auc_score(y, other["prob_opacity"])
    assert found["auc"].difference.value == pytest.approx(expected)
    right = [frame["decision"] == "opacity" for frame in (one, other)]
    expected = recall_score(y, right[0]) - recall_score(y, right[1])
    assert found["sensitivity"].difference.value == pytest.approx(expected)
    assert found["sensitivity"].a.value == pytest.approx(recall_score(y, right[0]))
    table = pd.crosstab(right[0][y == 1], right[1][y == 1])
    p = mcnemar(table, exact=False, correction=False).pvalue
    assert found["sensitivity"].difference.p == pytest.approx(p)
    counts = agreement(a, b)
    assert sum(counts) == len(one)
    assert counts.both + counts.only_a == ((right[0] == (y == 1)).sum())


def test_a_model_is_its_own_equal_and_the_better_one_is_named(tmp_path: Path) -> None:
    a = read_scored(scored(tmp_path / "a.parquet", skill=4, seed=1))
    b = read_scored(scored(tmp_path / "b.parquet", skill=0.5, seed=2))
    assert all(one.difference.value == 0 and one.difference.p == 1 for one in compare_metrics(a, a))
    assert all(one.difference.low > 0 for one in compare_metrics(a, b))
    assert all(one.difference.high < 0 for one in compare_metrics(b, a))


def test_images_of_one_patient_widen_the_interval(tmp_path: Path) -> None:
    """The same numbers, of patients with four images each whose answers agree."""
    alone = [read_scored(scored(tmp_path / f"{seed}.parquet", skill=1, seed=seed)) for seed in (1, 2)]
    together = []
    for one in alone:
        frame = pd.concat([one.frame.assign(sample_id=one.frame["sample_id"] + f"-{k}") for k in range(4)])
        together.append(one._replace(frame=frame, info=one.info.model_copy(update={"clustered": True})))
    for metric in ("auc", "sensitivity"):
        (few,), (many,) = (compare_metrics(*pair, [metric]) for pair in (alone, together))
        assert many.difference.value == pytest.approx(few.difference.value)
        width = many.difference.high - many.difference.low
        assert width == pytest.approx(few.difference.high - few.difference.low, rel=0.05), "as if seen once"


@pytest.mark.parametrize("how", ["max", "mean"])
def test_where_both_declare_patients_the_cases_are_patients(tmp_path: Path, how: str) -> None:
    a, b = (
        read_scored(
            scored(tmp_path / f"{seed}.parquet", skill=skill, seed=seed, per_patient=3, aggregate=how)
        )
        for seed, skill in ((1, 2.0), (2, 1.0))
    )
    found = {one.metric: one for one in compare_metrics(a, b)}
    right, areas = [], []
    for one in (a, b):
        patients = one.frame.groupby("patient")
        truth, highest = patients["label_opacity"].max(), patients["prob_opacity"].agg(how)
        areas.append(roc_auc_score(truth, highest))
        right.append((highest >= 0.5) == (truth == 1))
    assert found["auc"].difference.value == pytest.approx(areas[0] - areas[1])
    assert found["auc"].difference.n == 100, "patients, not 300 images"
    positive = truth == 1
    difference = right[0][positive].mean() - right[1][positive].mean()
    assert found["sensitivity"].difference.value == pytest.approx(difference)
    assert found["sensitivity"].difference.method.startswith("Tango, McNemar"), "a patient is one case"
    assert "effective n" not in found["sensitivity"].difference.method
    counts = agreement(a, b)
    assert counts.only_a == (right[0] & ~right[1]).sum()
    assert sum(counts) == 100
    compare_files(tmp_path / "1.parquet", tmp_path / "2.parquet", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"with the {'highest' if how == 'max' else 'mean'} probability of its images" in page


def test_each_class_of_a_multilabel_task_is_compared(tmp_path: Path) -> None:
    a = read_scored(scored(tmp_path / "a.parquet", skill=3, seed=1, task="multilabel"))
    b = read_scored(scored(tmp_path / "b.parquet", skill=1, seed=2, task="multilabel"))
    assert {(one.metric, one.of) for one in compare_metrics(a, b, ["auc"])} == {
        ("auc", "opacity"),
        ("auc", "stripe"),
    }


def boxes_of(path: Path, *, skill: float, seed: int, n: int = 80) -> Path:
    """Predictions of a detector that finds a share `skill` of the lesions, which every other image has one of."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(n):
        lesion = [{"class": "nodule", "x0": 10.0, "y0": 10.0, "x1": 40.0, "y1": 40.0}] * (number % 2)
        found = []
        if lesion and rng.random() < skill:
            found.append({**lesion[0], "x0": 10 + rng.normal(0, 2), "score": rng.uniform(0.3, 1)})
        if rng.random() < 0.4:
            found.append(
                {"class": "nodule", "x0": 60.0, "y0": 60.0, "x1": 80.0, "y1": 80.0, "score": rng.random()}
            )
        highest = max((box["score"] for box in found), default=0.0)
        rows.append(
            {
                "sample_id": f"s{number:04d}", "patient": f"p{number // 2}", "site": "", "scanner": "",
                "age": float("nan"), "sex": "", "label_nodule": float(number % 2), "prob_nodule": highest,
                "decision_nodule": highest >= 0.5, "boxes": found, "lesions": lesion,
            }
        )  # fmt: skip
    info = PredictionsInfo(
        experiment="lesions", seed=seed, split="test", bundle=digest_bytes(str(seed).encode()), task="detection",
        classes=("nodule",), positive=None, clustered=True, thresholds={"nodule": 0.5}, assumptions=(),
    )  # fmt: skip
    write_predictions(path, pd.DataFrame(rows), info)
    return path


def test_detectors_are_compared_by_resamples_of_patients(tmp_path: Path) -> None:
    a = read_scored(boxes_of(tmp_path / "a.parquet", skill=0.95, seed=1))
    b = read_scored(boxes_of(tmp_path / "b.parquet", skill=0.4, seed=2))
    found = {one.metric: one for one in compare_metrics(a, b)}
    assert set(found) == {"ap", "ap50", "froc"}
    for one in found.values():
        assert one.difference.value == pytest.approx(one.a.value - one.b.value)
        assert 0 < one.difference.low < one.difference.value < one.difference.high
    reverse = {one.metric: one.difference for one in compare_metrics(b, a)}
    assert reverse["ap50"].high == pytest.approx(-found["ap50"].difference.low)
    assert all(one.difference.value == 0 and one.difference.p == 1 for one in compare_metrics(a, a))
    with pytest.raises(
        ValueError, match="no paired interval of auc in detection tasks; known: ap, ap50, froc"
    ):
        compare_metrics(a, b, ["auc"])
    compare_files(tmp_path / "a.parquet", tmp_path / "b.parquet", tmp_path / "page.html")
    assert "<svg" in (tmp_path / "page.html").read_text()


def test_detectors_of_other_lesions_are_not_compared(tmp_path: Path) -> None:
    a = read_scored(boxes_of(tmp_path / "a.parquet", skill=0.9, seed=1))
    frame = a.frame.copy()
    frame.at[1, "lesions"] = [{**frame.at[1, "lesions"][0], "x1": 39.0}]  # noqa: PD008 - a list into a cell
    with pytest.raises(ValueError, match="other labels, lesions or patients"):
        paired(a, a._replace(frame=frame))


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path: Path) -> None:
    a = scored(tmp_path / "a.parquet", skill=2, seed=1)
    frame, info = read_predictions(a)
    write_predictions(tmp_path / "empty.parquet", frame.head(0), info)
    for other, message in (
        (scored(tmp_path / "b.parquet", skill=2, seed=1, start=10), "of which they share 290"),
        (scored(tmp_path / "c.parquet", skill=2, seed=1, task="multilabel"), "other classes"),
        (scored(tmp_path / "d.parquet", skill=2, seed=1, per_patient=2), "other labels, lesions or patients"),
        (
            scored(tmp_path / "e.parquet", skill=2, seed=1, aggregate="max"),
            "evaluate.aggregate none, the second max",
        ),
        (tmp_path / "none.parquet", "no predictions there"),
        (tmp_path / "empty.parquet", "holds no row"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            compare_files(a, other, tmp_path / "page.html")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_the_page_stands_alone_and_names_both(
    tmp_path: Path, task: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "0").mkdir()
    scored(tmp_path / "0" / "predictions.parquet", skill=2, seed=1, task=task, per_patient=2)
    b = scored(tmp_path / "b.parquet", skill=1, seed=2, task=task, per_patient=2)
    compare_files(tmp_path / "0", b, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", page)
    assert page.count("<svg") == 1
    for scored_file in (tmp_path / "0", b):
        assert read_scored(scored_file).info.bundle[7:23] in page
    (auc, *_) = compare_metrics(read_scored(tmp_path / "0"), read_scored(b), ["auc"])
    assert f"{auc.difference.value:+.3f} ({auc.difference.low:+.3f} to" in page.replace("\u00a0", " ")
    assert f"{auc.difference.value:+.3f} ({auc.difference.low:+.3f} to" in capsys.readouterr().out


def test_a_difference_says_where_it_rests_on_too_few(tmp_path: Path) -> None:
    for n, doubted in ((100, True), (400, False)):
        a, b = (
            read_scored(scored(tmp_path / f"{n}{seed}.parquet", skill=2, seed=seed, n=n)) for seed in (1, 2)
        )
        (area,) = compare_metrics(a, b, ["auc"])
        assert ("in the rarer class" in area.difference.method) == doubted
    perfect = read_scored(scored(tmp_path / "perfect.parquet", skill=50, seed=3, n=400))
    found = {one.metric: one.difference.method for one in compare_metrics(perfect, b)}
    assert found["sensitivity"] == "Tango, McNemar; too few errors (0): may be conservative"


def test_console_and_page_say_by_which_method_and_which_interval_is_rough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "300")
    for n, rough in ((100, True), (4000, False)):
        a, b = (scored(tmp_path / f"{n}-{seed}.parquet", skill=2, seed=seed, n=n) for seed in (1, 2))
        compare_files(a, b, tmp_path / "page.html")
        console, page = capsys.readouterr().out, (tmp_path / "page.html").read_text()
        found = compare_metrics(read_scored(a), read_scored(b))
        for one in found:
            assert one.difference.method in console
            assert f"<td>{one.difference.method}</td>" in page
            assert (MARK in difference_text(one.difference)) == (rough and "too few" in one.difference.method)
        for said in (console, page):
            assert (LEGEND in said) == (MARK in said) == rough
        assert ("Hollow squares" in page) == rough
        listed = re.findall(r'<th scope="row">(.*?)</th>', page.partition(">Words</h2>")[2])
        assert {"Tango", "McNemar", "DeLong"} <= set(listed) <= set(WORDS)
