"""The step `search`: what it reads, what it writes, and a search that is killed."""

import html
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from cadx.datasets import DatasetWriter, Sample, SourceInfo, write_splits
from cadx.files import digest_bytes
from cadx.training.loop import fit
from components.contract import ROOT, read_params
from components.search import SearchParams, search
from components.train import TrainParams

NUM_SAMPLES = 160
RECIPE: dict[str, Any] = {
    "model": {"family": "resnet", "width": 0.125},
    "preprocessing": {"height_px": 32, "width_px": 32},
    "epochs": 3,
    "batch_size": 16,
    "learning_rate": 0.0001,
    "ensemble": 3,
}
SEARCH: dict[str, Any] = {
    "space": {
        "learning_rate": {"low": 1e-4, "high": 1e-1, "log": True},
        "loss.gamma": {"low": 0, "high": 4},
        "batch_size": {"choices": [8, 16]},
    },
    "num_trials": 7,
    "random_trials": 3,
    "prune_after_trials": 2,
    "prune_after_epochs": 1,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of noise, the sick with a faint patch; splits with a test part; imbalance.json; a parameter file."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    with DatasetWriter(
        folder / "dataset",
        name="noise",
        task="binary",
        classes=("normal", "sick"),
        positive="sick",
        modality="noise",
        clustered=False,
        source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number in range(NUM_SAMPLES):
            sick = number % 5 < 2
            pixels = rng.integers(0, 200, (32, 32)).astype(np.uint8)
            pixels[4:12, 4:12] += 20 * np.uint8(sick)
            writer.add(
                Sample(
                    sample_id=f"s{number:03}",
                    pixels=pixels,
                    labels={"sick" if sick else "normal": 1},
                    patient=f"p{number}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics={"mean": float(pixels.mean() / 255)},
                )
            )
    _write_splits(folder / "splits.parquet", last="test")
    recommendation = {"loss": {"kind": "focal", "gamma": 1.5}, "sampler": "balanced"}
    (folder / "imbalance.json").write_text(json.dumps({"recommendation": recommendation}))
    (folder / "params.yaml").write_text(yaml.safe_dump({"noise": {"train": RECIPE, "search": SEARCH}}))
    return folder


def _write_splits(path: Path, *, last: str) -> None:
    parts = ["train", "val", "train", "calibration", "train", "val", "train", last]
    rows = [(f"s{number:03}", parts[number % 8], "") for number in range(NUM_SAMPLES)]
    write_splits(path, pd.DataFrame(rows, columns=["sample_id", "split", "reason"]))


def _arguments(inputs: Path, work: Path, **changes: Any) -> dict[str, Any]:
    return {
        "recipe": inputs / "params.yaml",
        "dataset": inputs / "dataset",
        "splits": inputs / "splits.parquet",
        "imbalance": inputs / "imbalance.json",
        "study": work / "study",
        "best": work / "best.yaml",
        "report": work / "search.html",
        "experiment": "noise",
        "seed": 3,
        "params": f"{inputs / 'params.yaml'}:noise" if not changes else json.dumps(SEARCH | changes),
    }


@pytest.fixture(scope="module")
def searched(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("searched")
    search(**_arguments(inputs, work))
    return work


def _trials(study: Path) -> list[tuple[Any, ...]]:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    found = optuna.load_study(study_name="search", storage=f"sqlite:///{study / 'study.db'}")
    return [(t.state.name, t.value, t.params, t.intermediate_values) for t in found.get_trials()]


def test_the_best_recipe_is_a_parameter_file_that_gives_the_best_value(
    inputs: Path, searched: Path, tmp_path: Path
) -> None:
    best = searched / "best.yaml"
    params = read_params(f"{best}:noise", "train", TrainParams)
    assert params.ensemble == 3, "of the recipe, though a trial trains one network"
    assert yaml.safe_load(best.read_text())["noise"]["train"]["loss"].keys() == {"kind", "gamma"}, (
        "auto, spelled out"
    )
    values = [value for _, value, *_ in _trials(searched / "study") if value is not None]
    assert f"of 7: val AUC {max(values):.4f} on 40 samples" in best.read_text()

    from cadx.datasets import DatasetFolder, read_splits

    splits = read_splits(inputs / "splits.parquet")
    config = params.resolve(inputs / "imbalance.json")
    fitted = fit(config, DatasetFolder(inputs / "dataset"), splits, seed=3, checkpoints=tmp_path)
    assert fitted.history[fitted.best_epoch - 1]["val_auc"] == max(values)


def test_training_gets_the_train_and_val_splits_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[pd.DataFrame] = []

    def spy(config: Any, folder: Any, splits: pd.DataFrame, **others: Any) -> Any:
        seen.append(splits)
        return fit(config, folder, splits, **others)

    monkeypatch.setattr("cadx.training.loop.fit", spy)
    search(**_arguments(inputs, tmp_path, num_trials=1))
    (frame,) = seen
    assert frame["split"].value_counts().to_dict() == {"train": 80, "val": 40}


def test_other_test_samples_are_no_other_search_and_other_val_samples_are(
    inputs: Path, searched: Path, tmp_path: Path
) -> None:
    arguments = _arguments(inputs, tmp_path) | {
        "study": searched / "study",
        "splits": tmp_path / "splits.parquet",
    }
    _write_splits(arguments["splits"], last="excluded")
    search(**arguments)
    assert (tmp_path / "best.yaml").read_bytes() == (searched / "best.yaml").read_bytes()
    _write_splits(arguments["splits"], last="val")
    with pytest.raises(ValueError, match="holds a search with another splits; remove the folder"):
        search(**arguments)


def test_the_report_tells_the_search(searched: Path) -> None:
    page = (searched / "search.html").read_text()
    text = " ".join(html.unescape(re.sub(r"<style>.*?</style>|<[^>]+>", " ", page, flags=re.DOTALL)).split())
    assert "7 recipes, compared on val" in text
    assert "The test split was not read" in text
    assert page.count("<figure>") == 3
    for name in SEARCH["space"]:
        assert name in text
    (pasted,) = re.findall(r"<p>(train: .*?)</p>", page, flags=re.DOTALL)
    best = yaml.safe_load((searched / "best.yaml").read_text())["noise"]
    assert yaml.safe_load(html.unescape(pasted)) == best
    states = [state for state, *_ in _trials(searched / "study")]
    for state, words in (("COMPLETE", "complete, best at epoch"), ("PRUNED", "stopped after epoch")):
        assert text.count(words) == states.count(state)


def test_a_trial_that_diverges_is_told_and_the_search_goes_on(inputs: Path, tmp_path: Path) -> None:
    space = {"learning_rate": {"choices": [0.001, 1e30]}}
    search(**_arguments(inputs, tmp_path, space=space, num_trials=3, prune=False))
    states = [state for state, *_ in _trials(tmp_path / "study")]
    assert {"COMPLETE", "FAIL"} == set(states)
    page = html.unescape((tmp_path / "search.html").read_text())
    assert "Trials that failed" in page
    assert "not finite" in page or "loss is" in page


@pytest.mark.slow
def test_a_search_killed_in_mid_trial_gives_the_same_file(
    inputs: Path, searched: Path, tmp_path: Path
) -> None:
    arguments = _arguments(inputs, tmp_path)
    fields = {
        name: f"Path({str(value)!r})" if isinstance(value, Path) else repr(value)
        for name, value in arguments.items()
    }
    call = ", ".join(f"{name}={value}" for name, value in fields.items())
    program = f"from pathlib import Path\nfrom components.search import search\nsearch({call})"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    running = tmp_path / "study/running"
    deadline = time.monotonic() + 200
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=log)
    try:
        # The second trial has begun: some of it is in a checkpoint.
        while "trial 1/7" not in (tmp_path / "log").read_text() or not list(running.glob("*")):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "best.yaml").exists()
    assert 1 <= len(_trials(tmp_path / "study")) < 7
    search(**arguments)
    assert _trials(tmp_path / "study") == _trials(searched / "study")
    assert (tmp_path / "best.yaml").read_bytes() == (searched / "best.yaml").read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"space": {"model.dropuot": {"low": 0, "high": 1}}},
            r"space\.model\.dropuot: .*did you mean 'dropout'",
        ),
        ({"space": {"batch_size": {"low": 4}}}, r"space\.batch_size\.high: field required"),
        ({"trials": 3}, r"trials: unknown parameter"),
    ],
)
def test_a_mistake_gets_one_line_and_leaves_nothing(
    changes: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message) as info:
        search(**_arguments(inputs, tmp_path, **changes))
    assert "\n" not in str(info.value)
    assert not list(tmp_path.iterdir())


def test_an_empty_section_is_a_search_of_learning_rate_and_weight_decay() -> None:
    assert list(read_params("{}", "search", SearchParams).space) == ["learning_rate", "weight_decay"]


def test_integers_may_come_as_floats() -> None:
    space = {"batch_size": {"choices": [8, 16]}, "epochs": {"low": 2, "high": 4}}
    whole = read_params(json.dumps({"space": space}), "search", SearchParams)
    floats = read_params(
        json.dumps({"space": space}).replace(", 16", ".0, 16.0").replace("4}", "4.0}"), "search", SearchParams
    )
    assert floats == whole
