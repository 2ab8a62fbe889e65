"""Seeds joined: means over seeds, intervals over patients, and no mixing of what does not belong together."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score
from test_bundle import write_dataset

from cadx.datasets import DatasetFolder, read_splits
from cadx.evaluating import Classification, Settings
from cadx.metrics import score
from cadx.predicting.table import PredictionsInfo, arrays, read_predictions, write_predictions
from cadx.types import Conformal
from components.summarise import SummariseParams, summarise


def write_seed(folder: Path, cohort: tuple[Path, Path], seed: int, changes: dict | None = None) -> Path:
    """The predictions that a model of this seed might give on test."""
    dataset = DatasetFolder(cohort[0])
    assigned = read_splits(cohort[1])
    ids = assigned.loc[assigned["split"] == "test", "sample_id"].tolist()
    frame = dataset.samples.iloc[dataset.rows(ids)].reset_index(drop=True)
    rng = np.random.default_rng(seed)
    frame["prob_opacity"] = 1 / (1 + np.exp(-rng.normal(2 * frame["label_opacity"] - 1, 1.0)))
    frame["prob_normal"] = 1 - frame["prob_opacity"]
    frame["decision"] = np.where(frame["prob_opacity"] >= 0.4, "opacity", "normal")
    info = PredictionsInfo(
        experiment="squares",
        seed=seed,
        split="test",
        bundle=f"sha256:{seed:064d}",
        task="binary",
        classes=("normal", "opacity"),
        positive="opacity",
        clustered=True,
        thresholds={"opacity": 0.4},
        assumptions=("pixel values were taken as linear",),
    ).model_copy(update=changes)
    path = folder / f"{seed}.parquet"
    write_predictions(path, frame, info)
    return path


def run(paths: list[Path], out: Path) -> dict:
    summarise(
        predictions=tuple(paths),
        metrics=out / "metrics.json",
        report=out / "report.html",
        params=SummariseParams(resamples=100, minimum_n=5),
    )
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_dataset(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def seeds(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("seeds")
    return [write_seed(folder, cohort, seed) for seed in (0, 1, 2)]


def test_the_value_is_the_mean_over_seeds(seeds: list[Path], tmp_path: Path) -> None:
    found = run(seeds, tmp_path)
    frames = [read_predictions(path)[0] for path in seeds]
    each = [roc_auc_score(f["label_opacity"], f["prob_opacity"]) for f in frames]
    assert found["seeds"] == [0, 1, 2]
    assert found["by_seed"]["auc"] == pytest.approx(each)
    assert found["metrics"]["auc"]["value"] == pytest.approx(np.mean(each))
    assert found["between_seed_sd"]["auc"] == pytest.approx(np.std(each, ddof=1))
    assert found["metrics"]["auc"]["low"] < np.mean(each) < found["metrics"]["auc"]["high"]
    assert found["n"] == len(frames[0])


def test_more_seeds_are_not_more_patients(
    cohort: tuple[Path, Path], seeds: list[Path], tmp_path: Path
) -> None:
    """The same predictions three times over must have the interval of one."""
    copies = []
    for seed in (5, 6, 7):
        frame, info = read_predictions(seeds[0])
        copies.append(tmp_path / f"{seed}.parquet")
        write_predictions(copies[-1], frame, info.model_copy(update={"seed": seed}))
    one, three = run(seeds[:1], tmp_path / "one"), run(copies, tmp_path / "three")
    for name in ("auc", "sensitivity", "brier"):
        for end in ("low", "value", "high"):
            assert three["metrics"][name][end] == pytest.approx(one["metrics"][name][end], abs=1e-6), name


def test_one_seed_gives_what_its_own_scoring_gives(seeds: list[Path], tmp_path: Path) -> None:
    frame, info = read_predictions(seeds[0])
    rows = arrays(frame, info)
    alone = score(
        *rows[:3],
        task="binary",
        classes=info.classes,
        positive="opacity",
        patients=rows.patients,
        resamples=100,
    )
    found = run(seeds[:1], tmp_path)
    assert found["metrics"]["auc"] == alone.metrics["auc"].model_dump(mode="json")


def test_every_number_that_one_seed_is_given_is_joined(
    cohort: tuple[Path, Path], seeds: list[Path], tmp_path: Path
) -> None:
    """Decisions, prediction sets and gaps, too: the mean over seeds of what each seed's scoring says."""
    conformal = Conformal(coverage=0.9, quantiles={"normal": 0.6, "opacity": 0.7}, absent={}, patients={})
    paths, alone = [], []
    for seed in (0, 1, 2):
        choices = tuple(0.4 + 0.01 * np.random.default_rng(seed).standard_normal(30))
        changes = {"resampled_thresholds": {"opacity": choices}, "conformal": conformal}
        paths.append(write_seed(tmp_path, cohort, seed, changes))
        frame, info = read_predictions(paths[-1])
        settings = Settings(resamples=0, subgroups=("site", "sex"), minimum_n=5)
        alone.append(Classification(frame, info, settings).record())
    found = run(paths, tmp_path / "out")
    assert set(alone[0]) <= set(found)

    def joined(*path: str) -> None:
        for end in ("value", "n"):
            values, mine = alone, found
            for step in (*path, end):
                values, mine = [one[step] for one in values], mine[step]
            assert mine == pytest.approx(np.mean(values)), path

    for metric in ("sensitivity", "specificity"):
        joined("metrics", metric)
        joined("operating_point", "opacity", metric)
        joined("gaps", "site", "north", metric)
        joined("by_subgroup", "site", "north", metric)
    for name in ("normal", "opacity"):
        joined("conformal", "by_class", name)
    joined("conformal", "referred")
    at_risk = found["decision_curve"]["opacity"]["model"]
    assert at_risk == pytest.approx(
        np.mean([one["decision_curve"]["opacity"]["model"] for one in alone], axis=0), abs=1e-6
    )
    mean, *each = (one["operating_point"]["opacity"]["sensitivity"] for one in (found, *alone))
    assert mean["low"] < mean["value"] < mean["high"]
    assert mean["high"] - mean["low"] < max(one["high"] - one["low"] for one in each)


def test_patients_are_joined_as_one_seed_scores_them(seeds: list[Path], tmp_path: Path) -> None:
    declared = []
    for path in seeds:
        frame, info = read_predictions(path)
        declared.append(tmp_path / f"{info.seed}.parquet")
        write_predictions(declared[-1], frame, info.model_copy(update={"aggregate": "max"}))
    outputs = {"metrics": tmp_path / "metrics.json", "report": tmp_path / "report.html"}
    params = SummariseParams(resamples=50, minimum_n=5, aggregate="max")
    with pytest.raises(
        ValueError, match=r"summarise\.aggregate is max, but .* evaluate\.aggregate none; set both"
    ):
        summarise(predictions=tuple(seeds), **outputs, params=params)
    summarise(predictions=tuple(declared), **outputs, params=params)
    found = json.loads((tmp_path / "metrics.json").read_text())
    each = []
    for path in seeds:
        frame, _ = read_predictions(path)
        best = frame.groupby("patient")[["label_opacity", "prob_opacity"]].max()
        each.append(roc_auc_score(best["label_opacity"], best["prob_opacity"]))
    assert found["aggregate"] == "max"
    assert found["n"] == len(best)
    assert found["by_seed"]["auc"] == pytest.approx(each)


def test_neither_the_order_of_the_files_nor_that_of_the_rows_matters(
    seeds: list[Path], tmp_path: Path
) -> None:
    run(seeds, tmp_path / "a")
    frame, info = read_predictions(seeds[1])
    write_predictions(tmp_path / "1.parquet", frame.iloc[::-1].reset_index(drop=True), info)
    run([seeds[2], seeds[0], tmp_path / "1.parquet"], tmp_path / "b")
    for file in ("metrics.json", "report.html"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"split": "val"}, "split is 'val'"),
        ({"experiment": "circles"}, "experiment is 'circles'"),
        ({"clustered": False}, "clustered is False"),
        ({"seed": 1}, "seed 1 again"),
    ],
)
def test_what_is_not_of_one_kind_is_refused(
    seeds: list[Path], cohort: tuple[Path, Path], tmp_path: Path, changes: dict, message: str
) -> None:
    other = write_seed(tmp_path, cohort, 9, changes)
    with pytest.raises(ValueError, match=message) as caught:
        run([*seeds, other], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_other_samples_labels_or_patients_are_refused(seeds: list[Path], tmp_path: Path) -> None:
    frame, info = read_predictions(seeds[0])
    info = info.model_copy(update={"seed": 9})

    def refused(changed: pd.DataFrame, message: str) -> None:
        write_predictions(tmp_path / "9.parquet", changed, info)
        with pytest.raises(ValueError, match=message):
            run([*seeds, tmp_path / "9.parquet"], tmp_path / "out")

    refused(frame.iloc[:-1], "other images")
    flipped = frame.copy()
    flipped.loc[0, ["label_normal", "label_opacity"]] = 1 - flipped.loc[0, ["label_normal", "label_opacity"]]
    refused(flipped, "other labels, lesions or patients")
    refused(frame.assign(patient="pseudonym-x"), "other labels, lesions or patients")


def test_unlabelled_rows_are_equal_in_all_seeds(seeds: list[Path], tmp_path: Path) -> None:
    """NaN is not equal to itself, yet an unlabelled row is the same row in every file."""
    paths = []
    for number, path in enumerate(seeds):
        frame, info = read_predictions(path)
        frame.loc[0, ["label_normal", "label_opacity"]] = np.nan
        paths.append(tmp_path / f"{number}.parquet")
        write_predictions(paths[-1], frame, info)
    assert run(paths, tmp_path / "out")["n"] == len(frame) - 1


def test_the_report_stands_alone_and_names_no_patient(seeds: list[Path], tmp_path: Path) -> None:
    run(seeds, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "http" not in html
    assert "pseudonym-" not in html
    for text in (
        "seed 0",
        "seed 1",
        "seed 2",
        "SD of seeds",
        "site: north",
        "Lines: means over seeds. Bands",
        "Calibration in ten bins with Wilson limits, on the effective number of cases over patients.",
        "pixel values were taken as linear",
    ):
        assert text in html, text
