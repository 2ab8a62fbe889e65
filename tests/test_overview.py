"""`cadx show`: one page of whatever an experiment was of."""

import json
from pathlib import Path

import pytest
from test_evaluate import prepare

from cadx.files import write_json
from cadx.overview import write_overview
from cadx.reporting import LEGEND, MARK
from components.summarise import SummariseParams, summarise


def test_a_task_without_a_positive_class_has_its_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    work, reports = tmp_path / "work", tmp_path / "reports" / "squares"
    run = prepare(work, "multilabel", steps=2)
    run.evaluate(reports / "0", split="val", subgroups=())
    (work / "0").mkdir()
    run.bundle.rename(work / "0" / "bundle")
    summarise(
        predictions=(reports / "0" / "predictions.parquet",),
        metrics=reports / "metrics.json",
        report=reports / "report.html",
        params=SummariseParams(resamples=20, subgroups=()),
    )
    write_json(reports / "validation.json", {"rules": []})
    write_json(reports / "imbalance.json", {"recommendation": {"reason": "draw classes equally often"}})
    page = write_overview("squares", work, reports).read_text()
    auc = json.loads((reports / "metrics.json").read_text())["metrics"]["auc"]["value"]
    for text in (f"{auc:.3f} (", "draw classes equally often", "exact match", "the val split", "ROC"):
        assert text in page, text
    assert "pseudonym-" not in page
    console = capsys.readouterr().out
    assert f"{auc:.3f} (" in console
    assert MARK in console, "so few images are too few"
    assert "†" in page
    assert LEGEND in page
    assert " ".join(console.split()).count(LEGEND) == 1


def test_what_has_not_run_is_named_with_the_command_that_runs_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run `make reproduce EXPERIMENT=squares` first"):
        write_overview("squares", tmp_path, tmp_path)
    assert not list(tmp_path.iterdir())
