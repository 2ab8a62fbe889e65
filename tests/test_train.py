"""The step `train`: its bundle, its log, "auto", and a run that is killed."""

import json
import os
import shutil
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
from scipy.special import softmax

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo, read_splits, write_splits
from cadx.files import digest_bytes, digest_path
from cadx.models import ResNetConfig
from cadx.predicting.folds import out_of_fold
from cadx.predicting.predictor import Predictor
from cadx.weighting import LossConfig
from components.contract import ROOT, read_params
from components.train import TrainParams, train

NUM_SAMPLES = 480
BATCH_SIZE = 8
STEPS_PER_EPOCH = NUM_SAMPLES * 3 // 4 // BATCH_SIZE
PARAMS: dict[str, Any] = {
    "model": {"family": "resnet", "width": 0.125, "dropout": 0.3},
    "preprocessing": {"height_px": 32, "width_px": 32},
    "augmentation": {"rotation_degrees": 5, "noise_std": 0.1},
    "epochs": 3,
    "batch_size": BATCH_SIZE,
    "ema_decay": 0.9,
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Tiny batches gain nothing from threads, and lose much where tests run side by side.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """dataset, splits.parquet and imbalance.json: images of noise, the sick ones with a bright patch."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    source = SourceInfo(title="noise", licence="CC0-1.0", citation="none")
    with DatasetWriter(
        folder / "dataset",
        name="noise",
        task="binary",
        classes=("normal", "sick"),
        positive="sick",
        modality="noise",
        clustered=False,
        source=source,
    ) as writer:
        for number in range(NUM_SAMPLES):
            sick = rng.random() < 0.3
            pixels = rng.integers(0, 100, (32, 32)).astype(np.uint8)
            pixels[4:16, 4:16] += 60 * np.uint8(sick)
            writer.add(
                Sample(
                    sample_id=f"s{number:03}",
                    pixels=pixels,
                    labels={"sick" if sick else "normal": 1},
                    patient=f"p{number}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics={"mean": float(pixels.mean() / 255)},
                    assumptions=("black is 0",),
                )
            )
    ids = [f"s{number:03}" for number in range(NUM_SAMPLES)]
    split = ["val" if number % 4 == 0 else "train" for number in range(NUM_SAMPLES)]
    write_splits(folder / "splits.parquet", pd.DataFrame({"sample_id": ids, "split": split, "reason": ""}))
    recommendation = {
        "loss": {"kind": "focal", "gamma": 1.5},
        "sampler": "balanced",
        "reason": "few are sick",
    }
    (folder / "imbalance.json").write_text(json.dumps({"recommendation": recommendation}))
    return folder


def _arguments(inputs: Path, work: Path, **changes: Any) -> dict[str, Any]:
    return {
        "dataset": inputs / "dataset",
        "splits": inputs / "splits.parquet",
        "imbalance": inputs / "imbalance.json",
        "checkpoints": work / "checkpoints",
        "trained": work / "trained",
        "log": work / "training.jsonl",
        "experiment": "noise",
        "seed": 3,
        "params": json.dumps(PARAMS | changes),
    }


@pytest.fixture(scope="module")
def uninterrupted(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("uninterrupted")
    train(**_arguments(inputs, work))
    return work


def test_the_bundle_says_what_it_is(inputs: Path, uninterrupted: Path) -> None:
    bundle = Bundle(uninterrupted / "trained")
    manifest = bundle.manifest
    assert (manifest.experiment, manifest.seed, manifest.task) == ("noise", 3, "binary")
    assert manifest.weights[0].averaged
    assert not bundle.is_complete
    assert manifest.assumptions == ("black is 0",)
    assert manifest.provenance.dataset == digest_path(inputs / "dataset" / "dataset.json")
    assert manifest.provenance.splits == digest_path(inputs / "splits.parquet")
    assert len(bundle.reference()) == NUM_SAMPLES * 3 // 4
    (network,) = bundle.networks()
    assert network(torch.zeros(1, 1, 32, 32)).logits.shape == (1, 2)
    assert [record["epoch"] for record in bundle.history()] == [1, 2, 3]


def test_the_log_has_a_header_the_epochs_and_the_best(uninterrupted: Path) -> None:
    header, *epochs, last = map(json.loads, (uninterrupted / "training.jsonl").read_text().splitlines())
    assert header["loss"]["kind"] == "focal"
    assert header["sampler"] == "balanced"
    assert header["threads"] == torch.get_num_threads()
    assert header["num_parameters"] > 0
    assert sum(header["train_counts"].values()) == NUM_SAMPLES * 3 // 4
    assert [record["step"] for record in epochs] == [STEPS_PER_EPOCH * n for n in (1, 2, 3)]
    assert all(record["seconds"] > 0 and record["peak_memory_mb"] > 0 for record in epochs)
    assert epochs[last["best_epoch"] - 1]["val_auc"] == max(record["val_auc"] for record in epochs) > 0.9


@pytest.mark.slow
def test_an_ensembles_first_member_is_what_it_would_be_alone(
    inputs: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    train(**_arguments(inputs, tmp_path, ensemble=2))
    bundle, alone = Bundle(tmp_path / "trained"), Bundle(uninterrupted / "trained")
    first, second = bundle.manifest.weights
    assert first.digest == alone.manifest.weights[0].digest != second.digest
    assert [(record["member"], record["epoch"]) for record in bundle.history()] == [
        (member, epoch) for member in (0, 1) for epoch in (1, 2, 3)
    ]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_cross_validation_trains_a_network_for_each_fold_and_sums_up(inputs: Path, tmp_path: Path) -> None:
    train(**_arguments(inputs, tmp_path, folds=3, epochs=1))
    bundle = Bundle(tmp_path / "trained")
    assert len({weights.digest for weights in bundle.manifest.weights}) == 3
    header, *epochs, _, _, _, last = map(json.loads, (tmp_path / "training.jsonl").read_text().splitlines())
    # Of the patients of train and val together, each fold validates a third.
    assert sum(header["train_counts"].values()) == NUM_SAMPLES * 2 // 3
    summary = last["cross_validation"]["val_auc"]
    values = [record["val_auc"] for record in epochs]
    assert summary["folds"] == values
    assert summary["mean"] == pytest.approx(np.mean(values))
    assert summary["sd"] == pytest.approx(np.std(values, ddof=1))


def test_folds_have_an_ensemble_each(inputs: Path, tmp_path: Path) -> None:
    for name, ensemble in (("one", 1), ("two", 2)):
        train(**_arguments(inputs, tmp_path / name, folds=2, ensemble=ensemble, epochs=1))
    one, two = (Predictor(tmp_path / name / "trained", uncalibrated_ok=True) for name in ("one", "two"))
    assert two.bundle.manifest.weights[:2] == one.bundle.manifest.weights
    folder = DatasetFolder(inputs / "dataset")
    parts = list(out_of_fold(two, folder, inputs / "splits.parquet"))
    assert [ids for _, ids in parts] == [
        ids for _, ids in out_of_fold(one, folder, inputs / "splits.parquet")
    ]
    for number, (answering, ids) in enumerate(parts):
        alone = [two.members(slice(k, k + 1)) for k in (number, number + 2)]
        each = [softmax(one.logits(one.stored(folder, ids))[0], axis=1) for one in alone]
        found = softmax(answering.logits(answering.stored(folder, ids))[0], axis=1)
        np.testing.assert_allclose(found, np.mean(each, axis=0), atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep": "last", "patience": 2}, "patience: stops by what val says"),
        ({"augmentation": {"depth_flip": True}}, "augmentation.depth_flip: is for volumes"),
        (
            {"patches_per_sample": 8},
            "patches_per_sample: is for volumes and for boxes in tiles; leave it out",
        ),
        (
            {"positive_fraction": 0.9},
            "positive_fraction: is for volumes and for boxes in tiles; leave it out",
        ),
        (
            {"model": {"family": "mil"}, "preprocessing": {"channels": 6}, "patches_per_sample": 8},
            "patches_per_sample: is for volumes",
        ),
        ({"model": {"family": "yolo"}, "positive_fraction": 0.9}, "positive_fraction: is for volumes"),
        (
            {"model": {"family": "yolo"}, "loss": {"kind": "focal"}},
            "loss: a detector's losses are its model's",
        ),
        ({"model": {"family": "yolo"}, "loss": {"gamma": 5}}, "loss: a detector's losses are its model's"),
    ],
)
def test_what_a_recipe_has_no_use_for_is_refused(
    inputs: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(**_arguments(inputs, tmp_path, **changes))


def test_folds_that_do_not_fit_are_refused_before_torch_is_loaded(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cadx.training.loop", None)
    splits = read_splits(inputs / "splits.parquet")
    write_splits(
        tmp_path / "splits.parquet", splits.assign(split=["train"] * 8 + ["test"] * (len(splits) - 8))
    )
    with pytest.raises(ValueError, match="folds 9: train and val have 8 samples; lower it"):
        train(**_arguments(inputs, tmp_path, folds=9) | {"splits": tmp_path / "splits.parquet"})


def test_auto_leaves_a_detectors_losses_to_its_model(inputs: Path) -> None:
    tiles = {"height_px": 32, "width_px": 32, "fit": "tile"}
    detector = {"model": {"family": "yolo"}, "preprocessing": tiles, "patches_per_sample": 8}
    resolved = TrainParams.model_validate(detector).resolve(inputs / "imbalance.json")
    assert (resolved.loss, resolved.sampler) == (LossConfig(), "balanced")


@pytest.mark.slow
def test_two_processes_write_one_bundle(inputs: Path, tmp_path: Path) -> None:
    names = (
        "dataset",
        "splits",
        "imbalance",
        "checkpoints",
        "trained",
        "log",
        "experiment",
        "seed",
        "params",
    )
    values = _arguments(inputs, tmp_path, epochs=1)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "--", "cadx", "train"]  # without "--", torchrun takes --log for one of its own options
    command += [part for name in names for part in (f"--{name}", str(values[name]))]
    subprocess.run(
        command,
        check=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=200,
    )
    assert [record["epoch"] for record in Bundle(tmp_path / "trained").history()] == [1]
    assert len((tmp_path / "training.jsonl").read_text().splitlines()) == 3
    assert sorted(file.name for file in tmp_path.iterdir()) == ["checkpoints", "trained", "training.jsonl"]
    assert not list((tmp_path / "checkpoints").iterdir())


def test_same_inputs_give_the_same_bundle_bytes(inputs: Path, uninterrupted: Path, tmp_path: Path) -> None:
    train(**_arguments(inputs, tmp_path))
    assert digest_path(tmp_path / "trained") == digest_path(uninterrupted / "trained")
    assert not list((tmp_path / "checkpoints").iterdir()), "a complete run leaves no checkpoint"


def test_a_run_killed_in_mid_epoch_gives_the_same_bytes(
    inputs: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    """SIGKILL, with two loader workers; resumed with none."""
    arguments = _arguments(inputs, tmp_path, num_workers=2, cache_mb=0)
    fields = {
        name: f"Path({str(value)!r})" if isinstance(value, Path) else repr(value)
        for name, value in arguments.items()
    }
    call = ", ".join(f"{name}={value}" for name, value in fields.items())
    program = f"from pathlib import Path\nfrom components.train import train\ntrain({call})"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment)
    checkpoint = tmp_path / "checkpoints/member-0/checkpoint.pt"
    deadline = time.monotonic() + 120
    try:
        while _position(checkpoint) < (1, 3):
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    epoch, step = _position(checkpoint)
    assert epoch < PARAMS["epochs"]
    assert 0 < step < STEPS_PER_EPOCH, "killed in mid-epoch, or this test shows nothing"
    assert not (tmp_path / "trained").exists()
    train(**_arguments(inputs, tmp_path))
    assert digest_path(tmp_path / "trained") == digest_path(uninterrupted / "trained")


def _position(checkpoint: Path) -> tuple[int, int]:
    if not checkpoint.exists():
        return (-1, 0)
    progress = torch.load(checkpoint, weights_only=True)["progress"]
    return progress["epoch"], progress["step"]


def test_auto_takes_the_recommendation_and_nothing_else_does(inputs: Path) -> None:
    def resolved(**fields: Any) -> Any:
        params = read_params(json.dumps(PARAMS | fields), "train", TrainParams)
        assert isinstance(params, TrainParams)
        return params.resolve(inputs / "imbalance.json")

    assert (resolved().loss, resolved().sampler) == (LossConfig(kind="focal", gamma=1.5), "balanced")
    chosen = resolved(loss={"kind": "cross_entropy", "weights": "balanced"}, sampler="natural")
    assert (chosen.loss, chosen.sampler) == (LossConfig(weights="balanced"), "natural")
    assert resolved(sampler="natural").loss.kind == "focal"


def test_a_missing_recommendation_is_named(inputs: Path, tmp_path: Path) -> None:
    (inputs / "empty.json").write_text("{}")
    arguments = _arguments(inputs, tmp_path) | {"imbalance": inputs / "empty.json"}
    with pytest.raises(ValueError, match=r"empty.json: no recommendation there; run `cadx imbalance`"):
        train(**arguments)
    assert not (tmp_path / "trained").exists()


def test_an_unknown_parameter_is_named(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"epoch: unknown parameter; did you mean 'epochs'"):
        train(**_arguments(inputs, tmp_path, epoch=3))


def test_a_changed_dataset_is_refused(inputs: Path, tmp_path: Path) -> None:
    shutil.copytree(inputs / "dataset", tmp_path / "dataset")
    shard = next((tmp_path / "dataset" / "shards").iterdir())
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=shard.name):
        train(**(_arguments(inputs, tmp_path) | {"dataset": tmp_path / "dataset"}))


def test_pretrained_weights_are_recorded_and_not_needed_afterwards(inputs: Path, tmp_path: Path) -> None:
    weights = tmp_path / "start.pth"
    weights.with_name("start.pth.licence").write_text("CC0-1.0\n")
    torch.save(ResNetConfig(width=0.125).build(2, 3).backbone.state_dict(), weights)
    model = {"family": "resnet", "width": 0.125, "pretrained": str(weights)}
    train(**_arguments(inputs, tmp_path, model=model, epochs=1))
    digest = digest_path(weights)
    weights.unlink()
    bundle = Bundle(tmp_path / "trained")
    origin = bundle.manifest.provenance.pretrained
    assert origin is not None
    assert (origin.name, origin.digest, origin.licence) == ("start.pth", digest, "CC0-1.0")
    assert bundle.networks()
