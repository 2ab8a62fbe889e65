"""The table of families: what it says of a run, of a step's memory, and where it stands."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from cadx.benchmarking import (
    MARKERS,
    TOLD,
    Benchmark,
    Inference,
    Machine,
    Missing,
    Run,
    Step,
    StepSpec,
    Training,
    draw,
    embed,
    markdown,
    measure,
    measure_run,
    measure_step,
    read_benchmark,
    show,
    write,
)
from cadx.catalog import load_catalog
from cadx.types import Estimate


def estimate(value: float, low: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high, n=627, method="Wilson")


def run(experiment: str = "phantom-xray", **changes: object) -> Run:
    return Run(
        date="2026-11-28",
        commit="1abf5cf",
        experiment=experiment,
        data="Synthetic chest X-rays",
        source="phantom-xray",
        synthetic=True,
        kind="image",
        task="binary",
        model={"family": "resnet", "depth": 18, "width": 0.5},
        input="1 x 96 x 96 px, pad",
        seeds=(0, 1, 2),
        split="test",
        n=627,
        n_patients=413,
        num_train=628,
        quality="accuracy",
        metrics={"accuracy": estimate(0.979, 0.964, 0.988), "auc": estimate(0.984, 0.960, 0.994)},
        train={},
        num_parameters=2_796_514,
        training=Training(seconds=186.0, peak_memory_mb=1300, device="CPU", threads=2),
        inference=Inference(
            latency_ms=7.3, latency_95_ms=9.0, samples=20, peak_memory_mb=950, libraries_mb=700
        ),
    ).model_copy(update=changes)


def step(*, checkpointing: bool, tensors_mb: float, **changes: object) -> Step:
    return Step(
        date="2026-11-27",
        commit="",
        name="ResNet50",
        kind="image",
        task="binary",
        model={"family": "resnet", "depth": 50},
        input="1 x 224 x 224 px, pad",
        shape=(224, 224),
        batch_size=16,
        num_parameters=23_507_906,
        checkpointing=checkpointing,
        tensors_mb=tensors_mb,
        process_mb=tensors_mb + 1440,
        libraries_mb=700,
        seconds=10,
    ).model_copy(update=changes)


def benchmark(*runs: Run) -> Benchmark:
    return Benchmark(
        machine=Machine(device="CPU", cores=2, threads=1, memory_gb=25.3, versions={"torch": "2.13.0"}),
        runs=runs or (run(),),
        steps=(
            step(checkpointing=False, tensors_mb=1761),
            step(checkpointing=True, tensors_mb=902),
        ),
        missing=(Missing(experiment="musk1", family="mil", reason="not run here"),),
    )


def test_the_page_holds_each_figure_beside_the_texts() -> None:
    text = markdown(benchmark(), "docs/benchmark.svg")
    (row,) = [line for line in text.splitlines() if line.startswith("| phantom-xray")]
    assert "accuracy 0.979 (0.964 to 0.988)" in row
    assert "AUC 0.984 (0.960 to 0.994)" in row
    assert "627 samples, drawn, 3 seeds" in row
    assert "2.80 M" in row
    assert "3.1 min<br>1.30 GB" in row
    assert "7 ms<br>0.95 GB" in row
    assert "ResNet50<br>0.85 to 0.92: above<br>2 GB" in row
    assert "patients of phantom-xray are drawn" in text
    assert "musk1 (mil): not run here" in text
    assert (
        "Measured by `cadx benchmark` on CPU, 2 cores, 1 thread, 25.3 GB, torch 2.13.0: on 2026-11-28, "
        in text
    )
    assert (
        "on 2026-11-28, commit 1abf5cf, phantom-xray; on 2026-11-27, commit unknown, training steps." in text
    )


def test_half_of_the_texts_memory_is_judged_by_tensors() -> None:
    text = markdown(benchmark(), "x.svg")
    assert "| 1.76 GB (3.20 GB) | 0.90 GB (2.34 GB) | 2 GB | computed twice: 0.45 |" in text
    held = benchmark().model_copy(
        update={
            "steps": (step(checkpointing=False, tensors_mb=990), step(checkpointing=True, tensors_mb=500)),
        }
    )
    assert "| 2 GB | yes: 0.49 of it |" in markdown(held, "x.svg").replace("0.50 of it", "0.49 of it")
    over = benchmark().model_copy(
        update={
            "steps": (step(checkpointing=False, tensors_mb=1900), step(checkpointing=True, tensors_mb=1200)),
        }
    )
    assert "| no: 0.60 |" in markdown(over, "x.svg")


def test_a_run_without_its_weights_shows_its_numbers_alone() -> None:
    bare = run(num_parameters=None, training=None, inference=None)
    (row,) = [
        line for line in markdown(benchmark(bare), "x").splitlines() if line.startswith("| phantom-xray")
    ]
    assert "0.979" in row
    assert row.count("–") == 3  # noqa: RUF001 - the dash of tables


def test_a_bag_of_numbers_is_no_slide() -> None:
    bags = run("musk1", kind="features", model={"family": "mil"}, synthetic=False)
    assert bags.told is None
    assert run(kind="slide", model={"family": "mil"}).told == TOLD[5]


def test_the_terminal_shows_whole_figures() -> None:
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(width=80, record=True, file=nowhere)
        show(benchmark(), console)
    text = console.export_text()
    assert "accuracy 0.979 (0.964 to 0.988)" in text
    assert "computed twice: 0.45" in text


def test_files_appear_together_and_are_read_again(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(f"before\n{MARKERS[0]}\nold\n{MARKERS[1]}\nafter\n", encoding="utf-8")
    write(benchmark(), tmp_path / "docs", page)
    assert read_benchmark(tmp_path / "docs" / "benchmark.json") == benchmark()
    text = page.read_text(encoding="utf-8")
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "\nold\n" not in text
    assert markdown(benchmark(), "docs/benchmark.svg") in text
    first = (tmp_path / "docs" / "benchmark.svg").read_bytes()
    draw(benchmark(), tmp_path / "again.svg")
    assert (tmp_path / "again.svg").read_bytes() == first


def test_bad_files_are_told_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no figures there; run `cadx benchmark`"):
        read_benchmark(tmp_path / "benchmark.json")
    (tmp_path / "benchmark.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="no figures of this version"):
        read_benchmark(tmp_path / "benchmark.json")
    page = tmp_path / "page.md"
    page.write_text("nothing", encoding="utf-8")
    with pytest.raises(ValueError, match="no place for the table"):
        embed(page, "table")
    assert page.read_text(encoding="utf-8") == "nothing"


def test_the_readme_holds_what_the_file_says(root: Path) -> None:
    figures = root / "docs" / "benchmark.json"
    if not figures.is_file():
        pytest.skip("nothing was measured yet")
    page = (root / "README.md").read_text(encoding="utf-8")
    assert markdown(read_benchmark(figures), "docs/benchmark.svg") in page


def test_an_experiment_that_was_not_run_says_how_to(root: Path, tmp_path: Path) -> None:
    entry = load_catalog(root / "data" / "catalog.yaml")["phantom-xray"]
    section = {"ingest": {"source": "phantom-xray"}, "train": {"model": {"family": "resnet"}}}
    found = measure_run("phantom-xray", section, entry, tmp_path, tmp_path)
    assert isinstance(found, Missing)
    assert found.reason == "not run here: make reproduce EXPERIMENT=phantom-xray"


def test_one_experiment_is_measured_and_the_rows_of_the_others_stay(root: Path, tmp_path: Path) -> None:
    files = (root / "params.yaml", root / "data/catalog.yaml", tmp_path, tmp_path)
    nothing_ran = measure(*files, steps=False)
    assert not nothing_ran.runs
    others = tuple(
        missing.model_copy(update={"reason": "too dear"})
        for missing in nothing_ran.missing
        if missing.experiment != "phantom-xray"
    )
    before = nothing_ran.model_copy(update={"runs": (run(),), "missing": others})
    found = measure(*files, before=before, steps=False, experiments=["phantom-volume"])
    assert found.runs == before.runs
    reasons = {missing.experiment: missing.reason for missing in found.missing}
    assert reasons.pop("phantom-volume") == "not run here: make reproduce EXPERIMENT=phantom-volume"
    assert set(reasons.values()) == {"too dear"}
    with pytest.raises(ValueError, match="no experiment 'phantom-volum'; did you mean 'phantom-volume'"):
        measure(*files, experiments=["phantom-volum"])


def test_numbers_without_weights_are_taken_as_they_are(root: Path, tmp_path: Path) -> None:
    entry = load_catalog(root / "data" / "catalog.yaml")["phantom-xray"]
    section = {
        "ingest": {"source": "phantom-xray"},
        "train": {"model": {"family": "resnet", "depth": 18}},
    }
    metrics = {name: value.model_dump() for name, value in run().metrics.items()}
    record = {
        "seeds": [0],
        "bundles": ["sha256:0"],
        "split": "test",
        "n": 627,
        "n_patients": 413,
        "metrics": metrics,
    }
    (tmp_path / "metrics.json").write_text(json.dumps(record), encoding="utf-8")
    (tmp_path / "0").mkdir()
    of_seed = record | {"seed": 0, "bundle": "sha256:0"}
    (tmp_path / "0" / "metrics.json").write_text(json.dumps(of_seed), encoding="utf-8")
    found = measure_run("phantom-xray", section, entry, tmp_path / "work", tmp_path)
    assert isinstance(found, Run)
    assert (found.metrics, found.inference, found.training) == (run().metrics, None, None)


@pytest.mark.slow
def test_a_step_is_measured_in_a_process_of_its_own() -> None:
    spec = StepSpec(
        "tiny",
        "image",
        "binary",
        (192, 192),  # so large that activations weigh more than weights
        8,
        {
            "model": {"family": "resnet", "depth": 18, "width": 0.25},
            "preprocessing": {"height_px": 192, "width_px": 192},
        },
    )
    kept, twice = measure_step(spec)
    assert (kept.checkpointing, twice.checkpointing) == (False, True)
    # The weights, gradients and moments alone take 16 bytes of a parameter.
    assert twice.tensors_mb < kept.tensors_mb
    assert 16 * kept.num_parameters / 1e6 < kept.tensors_mb < 200
    assert 16 * twice.num_parameters / 1e6 < twice.tensors_mb
    assert kept.libraries_mb < kept.process_mb
