"""The results page: what a reader is told of each experiment, and what is never shown."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image
from test_bundle import write_dataset
from test_summarise import write_seed

from cadx.evaluating import Classification, Settings
from cadx.files import digest_path, write_json
from cadx.predicting.table import read_predictions
from cadx.reporting import LEGEND, MARK
from cadx.results import write_results
from components.summarise import SummariseParams, summarise

SEEDS = (0, 1, 2)


def leave(root: Path, name: str, seeds: tuple[int, ...]) -> None:
    """What the steps leave of an experiment, its answers drawn by chance."""
    cohort = write_dataset(root / "work" / name)
    reports, digest = root / "reports" / name, digest_path(cohort[0] / "dataset.json")
    for seed in seeds:
        (reports / str(seed)).mkdir(parents=True)
        path = write_seed(reports / str(seed), cohort, seed)
        path = path.rename(reports / str(seed) / "predictions.parquet")
        frame, info = read_predictions(path)
        scored = Classification(frame, info, Settings(resamples=20, subgroups=(), minimum_n=5))
        record = {"schema": 1, "experiment": name, "seed": seed, "split": "test", "bundle": info.bundle}
        record |= {"dataset": digest, "n": scored.n, "n_patients": scored.n_patients, "clustered": True}
        write_json(reports / str(seed) / "metrics.json", record | {"warnings": [], **scored.record()})
        reasons = ["AUC is low | *very*"] if seed == 1 else []
        decided = {
            "schema_version": 1,
            "experiment": name,
            "seed": seed,
            "split": "test",
            "promote": seed != 1,
        }
        decided |= {"reasons": reasons, "checks": [], "bundle": info.bundle, "metrics": digest}
        write_json(reports / str(seed) / "decision.json", decided)
    if seeds == SEEDS:
        summarise(
            predictions=tuple(reports / str(seed) / "predictions.parquet" for seed in seeds),
            metrics=reports / "metrics.json",
            report=reports / "report.html",
            params=SummariseParams(resamples=20, minimum_n=5, subgroups=()),
        )
    uses = [json.dumps({"bundle": f"b{number % 2}"}) + "\n" for number in range(3)]
    (reports / "test_uses.jsonl").write_text("".join(uses))


def declare(root: Path, licences: dict[str, str]) -> None:
    """Catalogue and parameters of experiments by their data's licence."""
    others = [
        {"what": "worse", "metrics": {"auc": 0.7}, "source": "A paper"},
        {"what": "best", "metrics": {"auc": 0.91, "f1": 0.6}, "source": "Another <paper>"},
    ]
    entries = {
        name: {
            "title": f"The data of {name}",
            "format": "folder",
            "task": "binary",
            "classes": ["normal", "opacity"],
            "positive": "opacity",
            "modality": "squares",
            "licence": licence,
            "citation": "Someone 2020",
            "file": name,
            "patient": "public",
            "published": others,
        }
        for name, licence in licences.items()
    }
    (root / "catalog.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))
    sections = {
        name: {"ingest": {"source": name}, "train": {"model": {"family": "resnet"}}} for name in licences
    }
    (root / "params.yaml").write_text(yaml.safe_dump(sections, sort_keys=False))


def write(root: Path, output: Path) -> tuple[list[str], str]:
    missing = write_results(
        root / "catalog.yaml",
        root / "params.yaml",
        seeds=SEEDS,
        work=root / "work",
        reports=root / "reports",
        output=output,
    )
    return missing, (output / "results.md").read_text()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three seeds of one experiment, one seed of another whose pictures are not free, and none of a third."""
    folder = tmp_path_factory.mktemp("checkout")
    leave(folder, "whole", SEEDS)
    leave(folder, "begun", (0,))
    declare(folder, {"whole": "CC BY 4.0", "begun": "CC BY-NC 4.0", "planned": "MIT"})
    return folder


@pytest.fixture(scope="module")
def written(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    output = tmp_path_factory.mktemp("docs")
    return output, *write(root, output)


def test_a_reader_is_told_what_has_run_and_how_it_went(
    root: Path, written: tuple[Path, list[str], str]
) -> None:
    _, missing, page = written
    assert not missing
    auc = json.loads((root / "reports/whole/metrics.json").read_text())["metrics"]["auc"]
    assert "too few" in auc["method"]
    shown = f"{auc['value']:.3f}&nbsp;({auc['low']:.3f}&nbsp;to&nbsp;{auc['high']:.3f})&nbsp;{MARK}"
    assert page.count(LEGEND) == 1
    table, whole, begun = (part for part in page.split("\n## "))
    row = next(line for line in table.splitlines() if line.startswith("| [whole](#whole)"))
    assert "| 3 of 3 | promoted 2 of 3 |" in row
    assert "| 0.910, best |" in row
    assert shown.replace("&nbsp;(", "<br>(") in row
    assert "not run yet: planned" in table
    assert f"| AUC | {shown} |" in whole
    assert r"Gate, seed 1: refused, AUC is low \| \*very\*" in whole
    assert r"| Another \<paper\> |" in whole
    assert "scored 3 times, for 2 bundles" in whole
    assert "make reproduce EXPERIMENT=whole" in whole
    assert "Seeds: 0, of the planned 0, 1, 2; values are those of seed 0" in begun
    assert "| 1 of 3 | promoted |" in table


def test_failures_are_shown_where_the_licence_allows_it_and_named_with_their_source(
    written: tuple[Path, list[str], str],
) -> None:
    output, _, page = written
    names = sorted(path.name.rsplit("-", 1)[0] + path.suffix for path in (output / "results").iterdir())
    assert names == ["begun-curve.svg", "whole-cases.webp", "whole-curve.svg"]
    _, whole, begun = page.split("\n## ")
    assert "Pictures: Someone 2020; CC BY 4.0" in whole
    assert "CC BY-NC 4.0) does not say that pictures may be passed on" in begun
    for name in (path.name for path in (output / "results").iterdir()):
        assert f'src="results/{name}"' in page
    (strip,) = (output / "results").glob("*.webp")
    assert strip.stat().st_size < 100_000
    picture = np.asarray(Image.open(io.BytesIO(strip.read_bytes())).convert("L"))
    assert picture.std() > 20, "a strip of pictures, not an empty sheet"


def test_a_second_run_gives_the_same_bytes(
    root: Path, written: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    write(root, tmp_path)
    for path in (*written[0].glob("results/*"), written[0] / "results.md"):
        assert (tmp_path / path.relative_to(written[0])).read_bytes() == path.read_bytes(), path


def test_without_predictions_the_pictures_of_these_numbers_are_kept_and_others_named(
    root: Path, written: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    """A fresh clone has the numbers and the pictures, and nothing to draw new ones from."""
    clone, docs = tmp_path / "clone", tmp_path / "docs"
    shutil.copytree(root, clone)
    shutil.copytree(written[0], docs)
    for path in clone.glob("reports/*/*/predictions.parquet"):
        path.unlink()
    assert write(clone, docs) == ([], written[2])
    for path in written[0].glob("results/*"):
        assert (docs / "results" / path.name).read_bytes() == path.read_bytes()

    changed = clone / "reports/whole/metrics.json"
    changed.write_text(changed.read_text().replace('"n": ', '"n":  ', 1))
    missing, page = write(clone, docs)
    assert missing == [
        "whole: no predictions here that its numbers are of; `make reproduce EXPERIMENT=whole`"
    ]
    assert "Not shown: no predictions here" in page
    assert [path.name for path in (docs / "results").iterdir() if "whole" in path.name] == []


def test_predictions_of_another_bundle_and_another_dataset_draw_nothing(root: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    shutil.copytree(root, clone)
    record = clone / "work/whole/dataset/dataset.json"
    record.write_text(record.read_text() + "\n")
    reports = clone / "reports/begun/0"
    shutil.copy(clone / "reports/whole/1/predictions.parquet", reports / "predictions.parquet")
    missing, _ = write(clone, tmp_path / "docs")
    assert missing == [
        "whole: no dataset here that its numbers are of; `make reproduce EXPERIMENT=whole`",
        "begun: no predictions here that its numbers are of; `make reproduce EXPERIMENT=begun`",
    ]


def test_where_nothing_has_run_nothing_is_written(root: Path, tmp_path: Path) -> None:
    declare(tmp_path, {"planned": "MIT"})
    (tmp_path / "reports").mkdir()
    with pytest.raises(ValueError, match=r"no experiment has run; `make reproduce EXPERIMENT=planned`"):
        write(tmp_path, tmp_path / "docs")
    assert not (tmp_path / "docs").exists()
