"""Of several models one: never one that the gate refused, and never by numbers that do not compare."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_bundle import write_dataset
from test_summarise import write_seed

from cadx.files import digest_path, write_json
from components.choose import ChooseParams, choose

OUTPUTS = ("choice", "report", "metrics", "decision", "archive", "predictions")


@pytest.fixture(scope="module")
def predictions(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("seeds")
    cohort = write_dataset(folder)
    return [write_seed(folder, cohort, seed) for seed in (0, 1, 2)]


def candidates(
    folder: Path, predictions: list[Path], aucs: list[tuple[float, float]], promote: list[bool]
) -> dict[str, tuple[Path, ...]]:
    """The files of models with these AUCs (value and lower end)."""
    made: dict[str, list[Path]] = {"metrics": [], "decision": [], "archive": [], "predictions": predictions}
    for seed, ((value, low), promoted) in enumerate(zip(aucs, promote, strict=True)):
        bundle = f"sha256:{seed:064d}"
        metrics, decision, archive = (folder / f"{seed}.{end}" for end in ("metrics", "decision", "mar"))
        auc = {"value": value, "low": low, "high": min(1.0, 2 * value - low), "n": 90, "method": "DeLong"}
        record: dict[str, Any] = {"schema": 1, "experiment": "squares", "seed": seed, "split": "test"}
        record |= {"bundle": bundle, "dataset": bundle, "splits": bundle, "n": 90, "n_patients": 90}
        record |= {"predictions": digest_path(predictions[seed])}
        record |= {"clustered": True, "warnings": [], "metrics": {"auc": auc}, "by_subgroup": {}}
        write_json(metrics, record)
        reasons = [] if promoted else ["AUC is too low"]
        write_json(
            decision,
            {
                "schema_version": 1, "experiment": "squares", "seed": seed, "split": "test", "promote": promoted,
                "reasons": reasons, "checks": [], "bundle": bundle, "metrics": digest_path(metrics),
            },
        )  # fmt: skip
        archive.write_text(f"archive {seed}")
        made["metrics"].append(metrics)
        made["decision"].append(decision)
        made["archive"].append(archive)
    return {f"all_{name}": tuple(paths) for name, paths in made.items()}


def run(folder: Path, given: dict[str, tuple[Path, ...]], **params: Any) -> dict[str, Path]:
    made = {name: folder / "chosen" / name for name in OUTPUTS}
    (folder / "chosen").mkdir(exist_ok=True)
    choose(**given, **made, params=ChooseParams(**params))
    return made


def test_the_first_promoted_is_taken_whatever_the_others_scored(
    predictions: list[Path], tmp_path: Path
) -> None:
    given = candidates(tmp_path, predictions, [(0.7, 0.6), (0.8, 0.7), (0.99, 0.98)], [False, True, True])
    made = run(tmp_path, given)
    assert made["archive"].read_text() == "archive 1"
    assert json.loads(made["decision"].read_text())["promote"] is True
    assert made["predictions"].read_bytes() == predictions[1].read_bytes()
    assert made["metrics"].read_bytes() == given["all_metrics"][1].read_bytes()
    assert json.loads(made["choice"].read_text())["chosen"] == "squares, seed 1"


def test_the_best_is_that_of_the_best_worse_end(predictions: list[Path], tmp_path: Path) -> None:
    given = candidates(tmp_path, predictions, [(0.95, 0.70), (0.90, 0.85), (0.99, 0.98)], [True, True, False])
    made = run(tmp_path, given, metric="auc")
    assert made["archive"].read_text() == "archive 1", "seed 2 is better and refused, seed 0 less certain"
    listed = json.loads(made["choice"].read_text())["candidates"]
    assert [one["seed"] for one in listed] == [2, 1, 0]
    assert [one["may_be_served"] for one in listed] == [False, True, True]
    page = made["report"].read_text()
    assert "3 candidates" in page
    assert "AUC is too low" in page
    assert "0.900 (0.850 to 0.950)" in page
    assert "does not account for having been chosen" in page


def test_where_none_may_be_served_the_refusal_is_handed_on(predictions: list[Path], tmp_path: Path) -> None:
    made = run(tmp_path, candidates(tmp_path, predictions, [(0.7, 0.6)] * 3, [False] * 3))
    assert json.loads(made["decision"].read_text())["promote"] is False
    assert json.loads(made["choice"].read_text())["chosen"] is None


def test_numbers_of_other_samples_are_not_ranked(predictions: list[Path], tmp_path: Path) -> None:
    cohort = write_dataset(tmp_path / "other")
    splits = pd.read_parquet(cohort[1])
    splits["split"] = splits["split"].replace({"test": "val", "val": "test"})
    splits.to_parquet(cohort[1])
    other = write_seed(tmp_path, cohort, 1)
    paths = [predictions[0], other, predictions[2]]
    given = candidates(tmp_path, paths, [(0.9, 0.8)] * 3, [True] * 3)
    with pytest.raises(ValueError, match="scored on other images"):
        run(tmp_path, given, metric="auc")
    assert not any((tmp_path / "chosen").iterdir())


def test_lists_that_do_not_belong_together_are_refused(predictions: list[Path], tmp_path: Path) -> None:
    given = candidates(tmp_path, predictions, [(0.9, 0.8)] * 3, [True] * 3)
    with pytest.raises(ValueError, match="of different bundles; give the lists in one order"):
        run(tmp_path, given | {"all_decision": given["all_decision"][::-1]})
    with pytest.raises(ValueError, match="give one per model"):
        run(tmp_path, given | {"all_archive": given["all_archive"][:1]})


def test_an_unknown_metric_is_named() -> None:
    assert ChooseParams(metric="ap50").metric == "ap50"
    with pytest.raises(ValueError, match="calibration_slope: neither more nor less of it is better"):
        ChooseParams(metric="calibration_slope")
    with pytest.raises(ValueError, match="unknown metric auk; known: "):
        ChooseParams(metric="auk")
