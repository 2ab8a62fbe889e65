"""The commands around the steps, and what every command does with a user's mistake, each in a real process."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image

from cadx.datasets import DatasetFolder, write_splits
from components import STEPS
from components.contract import read_params

CADX = [sys.executable, "-m", "cadx"]


@pytest.fixture(scope="module")
def checkout(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project that a command may write to."""
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("cadx", "components", "serving", "pipelines"):
        shutil.copytree(root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "data").mkdir()
    for name in ("params.yaml", "dvc.yaml", "data/catalog.yaml"):
        shutil.copy(root / name, copy / name)
    return copy


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class."""
    folder = tmp_path_factory.mktemp("My Hospital")
    rng = np.random.default_rng(0)
    for name, count in (("healthy", 24), ("sick", 12)):
        (folder / name).mkdir()
        for number in range(count):
            Image.fromarray(rng.integers(0, 255, (40, 32), dtype=np.uint8)).save(
                folder / name / f"{number}.png"
            )
    return folder


def run(checkout: Path, *words: str, wrapper: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*wrapper, *CADX, *words], cwd=checkout, capture_output=True, text=True, check=False, timeout=240
    )


@pytest.fixture(scope="module")
def added(checkout: Path, images: Path) -> subprocess.CompletedProcess[str]:
    return run(checkout, "new", str(images), "--name", "mine")


def test_new_makes_an_experiment_that_the_next_commands_take(
    checkout: Path, added: subprocess.CompletedProcess[str], root: Path
) -> None:
    assert added.returncode == 0, added.stderr
    assert added.stdout.splitlines()[-1].strip() == "make reproduce EXPERIMENT=mine"
    assert "positive is" in added.stdout
    catalog = yaml.safe_load((checkout / "data/catalog.yaml").read_text())
    assert catalog["mine"]["positive"] == "sick"
    assert "mine" in yaml.safe_load((checkout / "dvc.yaml").read_text())["vars"][0]["experiments"]
    for step in STEPS:
        cls = step.declaration().params
        assert cls is not None
        read_params(f"{checkout / 'params.yaml'}:mine", step.name, cls)
    for file in ("data/catalog.yaml", "params.yaml"):
        before, after = (root / file).read_text(), (checkout / file).read_text()
        assert after.startswith(before), f"{file}: what stood there is as it was"
    lines = (checkout / "dvc.yaml").read_text().splitlines()
    lines.remove("      - mine")
    assert lines == (root / "dvc.yaml").read_text().splitlines(), "one line was added"
    done = run(
        checkout, "ingest", "--catalog", "data/catalog.yaml", "--cache", "data/sources",
        "--dataset", "data/work/mine/dataset", "--params", "params.yaml:mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        checkout, "validate", "--dataset", "data/work/mine/dataset", "--validation", "v.json", "--report", "v.html",
        "--params", "params.yaml:mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    done = run(
        checkout, "split", "--dataset", "data/work/mine/dataset", "--validation", "v.json", "--splits", "s.parquet",
        "--params", "params.yaml:mine",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_name_has_no_dot_at_which_dvc_would_part_it(checkout: Path, images: Path, tmp_path: Path) -> None:
    files = [checkout / name for name in ("data/catalog.yaml", "params.yaml", "dvc.yaml")]
    before = [path.read_text() for path in files]
    dotted = run(checkout, "new", str(images), "--name", "chest.v1")
    assert [path.read_text() for path in files] == before
    assert dotted.stderr.startswith("cadx new: name 'chest.v1': give one of a-z, 0-9, '_' and '-' (no dot)")
    shutil.copytree(images, tmp_path / "Chest_X.v1.")
    try:
        done = run(checkout, "new", str(tmp_path / "Chest_X.v1."))
        assert done.stdout.splitlines()[-1].strip() == "make reproduce EXPERIMENT=chest-x-v1"
    finally:
        for path, former in zip(files, before, strict=True):
            path.write_text(former)


def test_a_name_that_is_taken_is_refused(
    checkout: Path, images: Path, added: subprocess.CompletedProcess[str]
) -> None:
    again = run(checkout, "new", str(images), "--name", "mine")
    assert again.returncode == 1
    assert again.stderr == "cadx new: catalog.yaml already holds 'mine'; choose another name with --name\n"


def test_colour_stays_colour_in_a_new_experiment(
    checkout: Path, added: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    for number, name in enumerate(("naevus", "melanoma")):
        (tmp_path / "skin" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), (200, 90 + number, 60)).save(tmp_path / "skin" / name / "1.png")
    files = [checkout / name for name in ("data/catalog.yaml", "params.yaml", "dvc.yaml")]
    before = [path.read_text() for path in files]
    try:
        done = run(checkout, "new", str(tmp_path / "skin"))
        recipes = yaml.safe_load(files[1].read_text())
    finally:
        for path, former in zip(files, before, strict=True):
            path.write_text(former)
    assert "2 of 2 sampled files are in colour" in done.stdout, done.stderr
    assert recipes["skin"]["train"]["preprocessing"]["channels"] == 3
    assert recipes["mine"]["train"]["preprocessing"]["channels"] == 1


@pytest.mark.parametrize("file", ["data/catalog.yaml", "params.yaml", "dvc.yaml"])
@pytest.mark.parametrize("text", ["a:\n  : [\n", ""])
def test_a_broken_file_of_the_project_is_named_in_one_line(
    checkout: Path, images: Path, file: str, text: str
) -> None:
    files = [checkout / name for name in ("data/catalog.yaml", "params.yaml", "dvc.yaml")]
    before = [path.read_text() for path in files]
    (checkout / file).write_text(text)
    broken = [path.read_text() for path in files]
    try:
        done = run(checkout, "new", str(images), "--name", "another")
        assert [path.read_text() for path in files] == broken, "nothing was added anywhere"
    finally:
        for path, former in zip(files, before, strict=True):
            path.write_text(former)
    assert done.returncode == 1
    assert done.stderr.startswith(f"cadx new: {checkout / file}: ")
    assert done.stderr.count("\n") == 1


def test_show_before_anything_ran_says_what_to_run(checkout: Path) -> None:
    shown = run(checkout, "show", "phantom-xray")
    assert shown.returncode == 1
    assert shown.stderr.startswith(
        "cadx show: data/reports/phantom-xray/metrics.json: not there; run `make reproduce"
    )
    assert shown.stderr.count("\n") == 1


def test_an_unknown_option_is_a_usage_error_without_a_traceback(checkout: Path) -> None:
    done = run(checkout, "split", "--datset", "x")
    assert done.returncode != 0
    assert "Traceback" not in done.stdout + done.stderr
    assert "--datset" in done.stdout + done.stderr


def test_a_full_disk_is_one_line_and_leaves_nothing(checkout: Path, tmp_path: Path) -> None:
    """On a real file system of 300 kB, in a mount namespace of its own."""
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    small = tmp_path / "small"
    small.mkdir()
    listing = tmp_path / "listing"
    script = f'mount -t tmpfs -o size=300k tmpfs {small} && "$@"; status=$?; ls -A {small} > {listing}; exit $status'
    done = run(
        checkout, "ingest", "--catalog", "data/catalog.yaml", "--cache", str(tmp_path / "cache"),
        "--dataset", str(small / "dataset"), "--params", '{"source": "full"}',
        wrapper=("unshare", "--mount", "sh", "-c", script, "sh"),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "No space left" in done.stderr.splitlines()[-1]
    assert listing.read_text() == ""


@pytest.fixture(scope="module", autouse=True)
def _large_source(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A catalogue entry of a megabyte of noise."""
    folder = tmp_path_factory.mktemp("full")
    rng = np.random.default_rng(1)
    for name in ("healthy", "sick"):
        (folder / name).mkdir()
        for number in range(4):
            Image.fromarray(rng.integers(0, 255, (400, 400), dtype=np.uint8)).save(
                folder / name / f"{number}.png"
            )
    catalog = checkout / "data/catalog.yaml"
    entry = {
        "full": {
            "title": "Noise", "format": "folder", "task": "binary", "classes": ["healthy", "sick"], "positive": "sick",
            "modality": "noise", "file": str(folder), "licence": "CC0-1.0", "citation": "none", "patient": "per-image",
        }
    }  # fmt: skip
    catalog.write_text(catalog.read_text() + "\n" + yaml.safe_dump(entry))


TINY = {
    "model": {"family": "resnet", "width": 0.125},
    "preprocessing": {"height_px": 32, "width_px": 32},
    "epochs": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("full", ["dataset", "trained", "checkpoints"])
def test_a_full_disk_ends_in_one_line_and_leaves_nothing_half_written(
    full: str, root: Path, tmp_path: Path
) -> None:
    """On a real file system of 64 KB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = f"mount -t tmpfs -o size=64k tmpfs {disk}"
    if subprocess.run([*mounted, mount], capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here: nobody has seen a full disk")
    source = {"format": "phantom", "parameters": {"modality": "xray", "num_patients": 60, "size_px": 64}}
    entry = yaml.safe_load((root / "data/catalog.yaml").read_text())["phantom-xray"] | source
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump({"tiny": entry}))
    places = {name: tmp_path / name for name in ("dataset", "trained", "checkpoints")} | {full: disk / full}
    ingest = ["ingest", "--catalog", str(tmp_path / "catalog.yaml"), "--cache", str(tmp_path / "cache")]
    ingest += ["--dataset", str(places["dataset"]), "--params", json.dumps({"source": "tiny"})]
    train = ["train", "--dataset", str(places["dataset"]), "--splits", str(tmp_path / "splits.parquet")]
    train += ["--imbalance", str(tmp_path / "imbalance.json"), "--experiment", "tiny", "--seed", "0"]
    train += ["--checkpoints", str(places["checkpoints"]), "--trained", str(places["trained"])]
    train += [
        "--log",
        str(tmp_path / "log"),
        "--params",
        json.dumps(TINY | {"loss": {}, "sampler": "natural"}),
    ]
    if full != "dataset":
        subprocess.run([*CADX, *ingest], cwd=root, check=True)
        (tmp_path / "imbalance.json").write_text("{}")
        folder = DatasetFolder(places["dataset"])
        ids = folder.samples["sample_id"]
        split = np.where(np.arange(len(ids)) % 2, "train", "val")
        write_splits(
            tmp_path / "splits.parquet", pd.DataFrame({"sample_id": ids, "split": split, "reason": ""})
        )
    command = ingest if full == "dataset" else train
    script = f'{mount} && "$@"; status=$?; find {disk} -mindepth 1 -not -name checkpoints; exit $status'
    result = subprocess.run(
        [*mounted, script, "sh", *CADX, *command],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    *_, last = result.stderr.splitlines()
    assert "No space left on device" in last
    assert "Traceback" not in result.stderr
    assert result.stdout == "", "something is left on the disk"


@pytest.mark.parametrize("own", [None, "7"])
def test_threads_that_wait_sleep_soon_unless_told_otherwise(
    own: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside any other busy process, threads that spin take nine times as long: `python -m benchmarks threads`."""
    from cadx.__main__ import main

    monkeypatch.setenv("GOMP_SPINCOUNT", "set, so that it is put back")
    if own is None:
        del os.environ["GOMP_SPINCOUNT"]
    else:
        os.environ["GOMP_SPINCOUNT"] = own
    with pytest.raises(SystemExit, match="0"):
        main(["show", "--help"])
    assert os.environ["GOMP_SPINCOUNT"] == (own or "10000")
