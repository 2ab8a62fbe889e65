"""The training loop: what it learns, what it refuses, and that it is a function of data, recipe and seed."""

import copy
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from sklearn.metrics import roc_auc_score

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_bytes
from cadx.models import DenseNetConfig, ResNetConfig
from cadx.sampling import BalancedSampler, EpochSampler
from cadx.training import TrainingConfig, loop
from cadx.training.images import ImageWorkload
from cadx.training.loop import Fitted, fit, learning_rate_factor
from cadx.training.workload import Setting, macro_auc
from cadx.transforms import Augmentation, Preprocessing
from cadx.weighting import LossConfig

ROOT = Path(__file__).parents[1]
CLASSES = ("normal", "bright", "striped")
Splits = pd.DataFrame


def _write(path: Path, task: str, labels: np.ndarray) -> DatasetFolder:
    """Noise images in which class k > 0 shows as its own pattern. `labels` N K."""
    rng = np.random.default_rng(0)
    classes = CLASSES[: labels.shape[1]]
    with DatasetWriter(
        path,
        name="patterns",
        task=task,
        classes=classes,
        positive=classes[1] if task == "binary" else None,
        modality="noise",
        clustered=False,
        source=SourceInfo(title="patterns", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number, row in enumerate(labels):
            pixels = rng.integers(0, 100, (32, 32)).astype(np.uint8)
            if row[1] == 1:
                pixels[4:16, 4:16] += 90
            if len(row) > 2 and row[2] == 1:
                pixels[20::4] += 90
            writer.add(
                Sample(
                    sample_id=f"s{number:03}",
                    pixels=pixels,
                    labels={
                        name: value for name, value in zip(classes, row, strict=True) if not math.isnan(value)
                    },
                    patient=f"p{number}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics={"mean": float(pixels.mean() / 255)},
                )
            )
    return DatasetFolder(path)


def _splits(folder: DatasetFolder, val_share: int = 4) -> Splits:
    ids = folder.samples["sample_id"]
    split = np.where(np.arange(len(ids)) % val_share == 0, "val", "train")
    return pd.DataFrame({"sample_id": ids, "split": split, "reason": ""})


def _one_hot(classes: np.ndarray, num_classes: int) -> np.ndarray:
    return np.eye(num_classes)[classes]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    # Tiny batches gain nothing from threads, and lose much where tests run side by side.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> DatasetFolder:
    classes = (np.random.default_rng(1).random(160) < 0.3).astype(int)
    return _write(tmp_path_factory.mktemp("binary") / "dataset", "binary", _one_hot(classes, 2))


def _config(**changes: Any) -> TrainingConfig:
    fields: dict[str, Any] = {
        "model": ResNetConfig(width=0.125),
        "preprocessing": Preprocessing(height_px=32, width_px=32, mean=0.25, std=0.25),
        "epochs": 2,
        "batch_size": 16,
        "learning_rate": 3e-3,
    }
    return TrainingConfig(**(fields | changes))


def _same(a: Fitted, b: Fitted) -> bool:
    return a.state_dict.keys() == b.state_dict.keys() and all(
        torch.equal(tensor, b.state_dict[name]) for name, tensor in a.state_dict.items()
    )


@pytest.mark.parametrize(
    "changes", [{}, {"sampler": "balanced", "ema_decay": 0.9}, {"monitor": "loss"}], ids=str
)
def test_it_learns(binary: DatasetFolder, tmp_path: Path, changes: dict[str, Any]) -> None:
    fitted = fit(_config(epochs=8, **changes), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    assert max(record["val_auc"] for record in fitted.history) > 0.97
    assert [record["epoch"] for record in fitted.history] == list(range(1, 9))
    monitored = [
        (record["val_auc"] if "monitor" not in changes else -record["val_loss"], -record["val_loss"])
        for record in fitted.history
    ]
    assert fitted.best_epoch == monitored.index(max(monitored)) + 1
    assert fitted.averaged == ("ema_decay" in changes)
    assert sum(fitted.train_counts.values()) == 120


def test_of_epochs_that_rank_every_case_right_the_surest_is_kept(tmp_path: Path) -> None:
    classes = np.arange(64) // 4 % 2
    folder = _write(tmp_path / "dataset", "binary", _one_hot(classes, 2))
    fitted = fit(_config(epochs=8), folder, _splits(folder), seed=0, checkpoints=tmp_path / "c")
    losses = {r["epoch"]: r["val_loss"] for r in fitted.history if r["val_auc"] == 1}
    assert len(losses) > 1, "several epochs must be equal here"
    assert fitted.best_epoch == min(losses, key=lambda epoch: losses[epoch])


@pytest.mark.parametrize("channels_last", [True, False])
def test_it_steps_as_a_loop_by_hand_does(
    binary: DatasetFolder, tmp_path: Path, *, channels_last: bool
) -> None:
    """Schedule, decay, clipping and average, against torch's own words for them; memory order changes nothing."""
    model = ResNetConfig(width=0.125, norm="group", dropout=0.0)
    settings = {
        "learning_rate": 1e-3,
        "weight_decay": 0.1,
        "grad_clip": 0.5,
        "ema_decay": 0.8,
        "keep": "last",
    }
    config = _config(model=model, warmup_epochs=0.5, channels_last=channels_last, **settings)
    fitted = fit(config, binary, _splits(binary), seed=3, checkpoints=tmp_path)

    ids = _splits(binary).query("split == 'train'")["sample_id"].tolist()
    images = torch.stack([config.preprocessing.apply(binary.pixels(name)) for name in ids])
    classes = torch.from_numpy(binary.labels(ids)).argmax(1)
    sampler = EpochSampler(binary.labels(ids), seed=3)
    steps = len(ids) // 16
    torch.manual_seed(3)
    network = model.build(2, 1).train()
    average = copy.deepcopy(network)
    decays = [p for p in network.parameters() if p.ndim > 1]
    others = [p for p in network.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decays, "weight_decay": 0.1}, {"params": others}], weight_decay=0.0
    )
    largest, losses = 0.0, []
    for step in range(2 * steps):
        epoch, place = divmod(step, steps)
        chosen = sampler.epoch_indices(epoch)[16 * place : 16 * (place + 1)]
        warmup = round(0.5 * steps)
        rate = (step + 1) / warmup
        if step >= warmup:
            rate = (1 + math.cos(math.pi * (step - warmup) / (2 * steps - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * rate
        optimizer.zero_grad()
        loss = F.cross_entropy(network(images[chosen]).logits, classes[chosen])
        loss.backward()
        losses.append(float(loss.detach()))
        largest = max(largest, float(torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)))
        optimizer.step()
        decay = min(0.8, (1 + step) / (10 + step))
        with torch.no_grad():
            for mean, now in zip(average.parameters(), network.parameters(), strict=True):
                mean.mul_(decay).add_(now, alpha=1 - decay)
    assert largest > 0.5, "something is clipped"
    for record, first in zip(fitted.history, (0, steps), strict=True):
        assert record["train_loss"] == pytest.approx(np.mean(losses[first : first + steps]), rel=1e-4)
    for name, parameter in average.named_parameters():
        assert torch.allclose(fitted.state_dict[name], parameter, atol=1e-4), name


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_network_learns_what_a_plain_one_does(binary: DatasetFolder, tmp_path: Path) -> None:
    small = DenseNetConfig(growth_rate=4, block_config=(1, 1, 1, 1), stem="small")
    plain, compiled = (
        fit(
            _config(model=small, compile=compiled),
            binary,
            _splits(binary),
            seed=0,
            checkpoints=tmp_path / str(compiled),
        )
        for compiled in (False, True)
    )
    assert plain.state_dict.keys() == compiled.state_dict.keys(), "no name of a wrapper in the weights"
    for one, other in zip(plain.history, compiled.history, strict=True):
        assert one["train_loss"] == pytest.approx(other["train_loss"], rel=0.02)


def test_the_kept_weights_are_the_best_epochs(binary: DatasetFolder, tmp_path: Path) -> None:
    config = _config(epochs=4, ema_decay=0.8)
    fitted = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path)
    network = config.model.build(2, 1).eval()
    network.load_state_dict(fitted.state_dict)
    val = _splits(binary).query("split == 'val'")["sample_id"].tolist()
    with torch.no_grad():
        images = torch.stack([config.preprocessing.apply(binary.pixels(name)) for name in val])
        scores = network(images).logits.softmax(1)[:, 1].numpy()
    expected = fitted.history[fitted.best_epoch - 1]["val_auc"]
    assert roc_auc_score(binary.labels(val)[:, 1], scores) == pytest.approx(expected)


def test_multilabel_with_unlabelled_labels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((120, 3)) < 0.4).astype(float)
    labels[rng.random((120, 3)) < 0.2] = np.nan
    labels[3] = np.nan
    folder = _write(tmp_path / "dataset", "multilabel", labels)
    config = _config(
        epochs=6,
        loss=LossConfig(kind="focal", weights="balanced"),
        model=DenseNetConfig(growth_rate=4, block_config=(2, 2, 2, 2), stem="small"),
    )
    fitted = fit(config, folder, _splits(folder), seed=0, checkpoints=tmp_path / "c")
    assert all(math.isfinite(record["train_loss"]) for record in fitted.history)
    assert fitted.history[-1]["train_loss"] < fitted.history[0]["train_loss"]


def test_one_positive_in_a_thousand_and_a_class_without_samples(tmp_path: Path) -> None:
    classes = np.zeros(1335, int)
    classes[[1, 4]] = 1  # one in train, one in val; "striped" never
    folder = _write(tmp_path / "dataset", "multiclass", _one_hot(classes, 3))
    for number, (loss, sampler) in enumerate(
        [(LossConfig(weights="balanced"), "natural"), (LossConfig(kind="focal"), "balanced")]
    ):
        config = _config(loss=loss, sampler=sampler, epochs=1)
        fitted = fit(config, folder, _splits(folder), seed=0, checkpoints=tmp_path / str(number))
        assert fitted.train_counts == {"normal": 1000, "bright": 1, "striped": 0}
        assert all(tensor.isfinite().all() for tensor in fitted.state_dict.values())


def test_weights_are_a_function_of_seed_and_recipe(binary: DatasetFolder, tmp_path: Path) -> None:
    config = _config(
        model=ResNetConfig(width=0.125, dropout=0.5),
        augmentation=Augmentation(horizontal_flip=True, rotation_degrees=10, noise_std=0.1),
        sampler="balanced",
    )
    torch.manual_seed(123)
    first = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "a")
    following = torch.rand(1)
    again = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "b")
    other = fit(config, binary, _splits(binary), seed=1, checkpoints=tmp_path / "c")
    uncached = config.model_copy(update={"num_workers": 2, "cache_mb": 0})
    parallel = fit(uncached, binary, _splits(binary), seed=0, checkpoints=tmp_path / "d")
    assert _same(first, again)
    assert _same(first, parallel)
    assert not _same(first, other)
    torch.manual_seed(123)
    assert torch.equal(following, torch.rand(1)), "training must leave the caller's random numbers alone"


def test_a_repeated_draw_is_augmented_anew() -> None:
    labels = np.eye(2)[[0] * 9 + [1]]
    batches = loop._Batches(BalancedSampler(labels, seed=0), batch_size=10)
    batches.start(epoch=0, step=0)
    (order,) = list(batches)
    draws = batches.draws(0)
    assert order.count(9) == 5
    assert len(set(draws)) == len(draws)
    assert [draw % 10 for draw in draws] == order


def test_early_stopping_waits_for_patience(binary: DatasetFolder, tmp_path: Path) -> None:
    config = _config(epochs=30, patience=2, learning_rate=0.01)
    fitted = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path)
    assert len(fitted.history) == min(30, fitted.best_epoch + 2)
    assert len(fitted.history) < 30


def test_the_last_epoch_is_kept_where_val_is_to_judge(binary: DatasetFolder, tmp_path: Path) -> None:
    config = _config(epochs=6, learning_rate=0.01)
    best = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "best")
    last = fit(
        config.model_copy(update={"keep": "last"}),
        binary,
        _splits(binary),
        seed=0,
        checkpoints=tmp_path / "last",
    )
    scored = [[record["val_loss"] for record in fitted.history] for fitted in (best, last)]
    assert scored[0] == scored[1]
    assert best.best_epoch < last.best_epoch == 6
    assert any(not torch.equal(last.state_dict[name], best.state_dict[name]) for name in best.state_dict)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_run_that_raised_in_mid_epoch_goes_on_where_it_stood(
    binary: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema_decay: float | None
) -> None:
    config = _config(
        epochs=3, checkpoint_steps=2, ema_decay=ema_decay, model=ResNetConfig(width=0.125, dropout=0.5)
    )
    whole = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "whole")
    steps: list[int] = []
    train_step = loop._Run._train_step

    def counted(run: Any, parts: list[Any]) -> torch.Tensor:
        steps.append(run.progress.epoch * run.batches.num_steps + run.progress.step)
        if len(steps) == 13:  # 7 steps an epoch: in the second, after the checkpoint of its fourth step
            raise _Killed
        return train_step(run, parts)

    monkeypatch.setattr(loop._Run, "_train_step", counted)
    with pytest.raises(_Killed):
        fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "killed")
    resumed = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "killed")
    assert steps[13] == 11, "resumes at the very step of its last checkpoint"
    assert _same(whole, resumed)
    for a, b in zip(whole.history, resumed.history, strict=True):
        assert {k: v for k, v in a.items() if k not in ("seconds", "peak_memory_mb")} == {
            k: v for k, v in b.items() if k not in ("seconds", "peak_memory_mb")
        }


def test_a_finished_run_is_not_trained_again(binary: DatasetFolder, tmp_path: Path) -> None:
    first = fit(_config(), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    again = fit(_config(), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    assert again.history == first.history  # clock times included
    loop.discard_checkpoint(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["seed", "config", "splits", "damaged"])
def test_a_checkpoint_of_another_run_is_ignored(binary: DatasetFolder, tmp_path: Path, what: str) -> None:
    fit(_config(), binary, _splits(binary), seed=0, checkpoints=tmp_path / "c")
    if what == "damaged":
        (tmp_path / "c" / "checkpoint.pt").write_bytes(b"PK\x03\x04 not quite")
    config = _config(learning_rate=1e-3) if what == "config" else _config()
    splits = _splits(binary, 5 if what == "splits" else 4)
    seed = 1 if what == "seed" else 0
    mixed = fit(config, binary, splits, seed=seed, checkpoints=tmp_path / "c")
    fresh = fit(config, binary, splits, seed=seed, checkpoints=tmp_path / "fresh")
    assert _same(mixed, fresh)


def test_what_does_not_decide_the_weights_does_not_void_a_checkpoint(binary: DatasetFolder) -> None:
    splits = _splits(binary)
    key = loop.run_key(_config(), binary, splits, seed=0)
    assert key == loop.run_key(
        _config(num_workers=2, cache_mb=0, checkpoint_steps=7, checkpointing=True), binary, splits, seed=0
    )
    assert key != loop.run_key(_config(weight_decay=0), binary, splits, seed=0)


def test_a_loss_that_is_not_finite_stops_and_names_its_batch(binary: DatasetFolder, tmp_path: Path) -> None:
    config = _config(learning_rate=1e30, warmup_epochs=0)
    with pytest.raises(ValueError, match=r"^loss is (nan|inf) at epoch 1, step \d+: [^\n]+$") as error:
        fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path)
    named = str(error.value).partition("samples of that batch: ")[2].split(", ")
    assert len(named) == 16
    assert set(named) <= set(_splits(binary).query("split == 'train'")["sample_id"])
    assert not list(tmp_path.iterdir()), "no checkpoint holds such weights"


def test_splits_that_cannot_serve_are_refused(binary: DatasetFolder, tmp_path: Path) -> None:
    healthy = binary.samples.set_index("sample_id")["label_normal"] == 1
    splits = _splits(binary)
    is_healthy = splits["sample_id"].map(healthy)
    one_sided = splits[is_healthy | (splits["split"] == "train")]
    with pytest.raises(ValueError, match=r"monitor auc needs both classes in val; use monitor: loss"):
        fit(_config(), binary, one_sided, seed=0, checkpoints=tmp_path)
    fitted = fit(_config(monitor="loss"), binary, one_sided, seed=0, checkpoints=tmp_path)
    assert fitted.history[0]["val_auc"] is None
    with pytest.raises(ValueError, match=r"train has samples of fewer than two outcomes"):
        fit(_config(), binary, splits[is_healthy | (splits["split"] == "val")], seed=0, checkpoints=tmp_path)
    with pytest.raises(ValueError, match=r"no sample in val"):
        fit(_config(), binary, splits[splits["split"] == "train"], seed=0, checkpoints=tmp_path)


@pytest.mark.parametrize("monitor", ["auc", "loss"])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_a_val_that_judges_nothing_is_refused(tmp_path: Path, task: str, monitor: str) -> None:
    labels = _one_hot(np.arange(24) % 2, 2)
    labels[::4] = np.nan
    folder = _write(tmp_path / "dataset", task, labels)
    with pytest.raises(ValueError, match=r"no sample in val is labelled .*; label some of val, or split"):
        fit(_config(monitor=monitor), folder, _splits(folder), seed=0, checkpoints=tmp_path / "c")


def test_a_val_of_a_class_that_train_lacks_is_refused_where_its_loss_is_none(tmp_path: Path) -> None:
    classes = np.where(np.arange(24) % 4 == 0, 2, np.arange(24) % 2)  # every fourth is in val
    folder = _write(tmp_path / "dataset", "multiclass", _one_hot(classes, 3))
    config = _config(monitor="loss", loss=LossConfig(weights="balanced"))
    with pytest.raises(ValueError, match=r"labelled with a class that train has;"):
        fit(config, folder, _splits(folder), seed=0, checkpoints=tmp_path / "c")


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [learning_rate_factor(step, steps=100, warmup_steps=10) for step in range(100)]
    assert rates[:10] == pytest.approx(np.arange(1, 11) / 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[10] == 1
    assert rates[-1] < 0.001
    assert learning_rate_factor(0, steps=1, warmup_steps=0) == 1


@pytest.mark.parametrize("multilabel", [False, True])
def test_macro_auc_is_sklearns(multilabel: bool) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(60, 3)).astype(np.float32)
    if multilabel:
        labels = (rng.random((60, 3)) < 0.4).astype(np.float32)
        expected = roc_auc_score(labels, logits, average="macro")
    else:
        classes = rng.integers(0, 3, 60)
        labels = np.eye(3, dtype=np.float32)[classes]
        shares = np.exp(logits.astype(float))
        expected = roc_auc_score(classes, shares / shares.sum(1, keepdims=True), multi_class="ovr")
    assert macro_auc(labels, logits, multilabel=multilabel) == pytest.approx(expected)
    partly = labels.copy()
    partly[:10] = np.nan
    assert macro_auc(partly, logits, multilabel=multilabel) == pytest.approx(
        macro_auc(labels[10:], logits[10:], multilabel=multilabel)
    )


def test_confident_logits_are_not_tied() -> None:
    logits = np.array(
        [[0, 40], [0, 50], [0, 60], [0, 70]], np.float32
    )  # float64 probabilities of 1, all four
    labels = np.eye(2, dtype=np.float32)[[0, 0, 1, 1]]
    assert macro_auc(labels, logits, multilabel=False) == 1


def test_history_is_plain(binary: DatasetFolder, tmp_path: Path) -> None:
    fitted = fit(_config(epochs=1), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    assert json.loads(json.dumps(fitted.history, allow_nan=False)) == fitted.history


@pytest.fixture
def _fresh_accelerate() -> Iterator[None]:
    # Accelerate keeps one precision per process.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_fresh_accelerate")
def test_bf16_gives_finite_float32_weights(binary: DatasetFolder, tmp_path: Path) -> None:
    fitted = fit(_config(epochs=4, precision="bf16"), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    assert fitted.precision == "bf16"
    assert max(record["val_auc"] for record in fitted.history) > 0.9
    floating = [tensor for tensor in fitted.state_dict.values() if tensor.is_floating_point()]
    assert all(tensor.dtype == torch.float32 and tensor.isfinite().all() for tensor in floating)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is in order on a GPU")
def test_fp16_without_a_gpu_is_refused(binary: DatasetFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"precision fp16 needs a GPU"):
        fit(_config(precision="fp16"), binary, _splits(binary), seed=0, checkpoints=tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["auto", "fp32", "fp16"])
@pytest.mark.usefixtures("_fresh_accelerate")
def test_a_gpu_learns_and_repeats_itself(binary: DatasetFolder, tmp_path: Path, precision: str) -> None:
    config = _config(epochs=4, precision=precision)
    first = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "first")
    again = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "again")
    assert first.device != "CPU"
    assert max(record["val_auc"] for record in first.history) > 0.9
    assert _same(first, again)


def _close(a: Fitted, b: Fitted) -> float:
    """The largest difference of any weight."""
    return max(float((a.state_dict[name] - b.state_dict[name]).abs().max()) for name in a.state_dict)


@pytest.mark.parametrize("loss", [LossConfig(weights="balanced"), LossConfig(kind="focal")], ids=str)
def test_a_batch_in_parts_is_the_whole_batch(binary: DatasetFolder, tmp_path: Path, loss: LossConfig) -> None:
    config = _config(model=ResNetConfig(width=0.125, norm="group"), loss=loss, batch_size=15, epochs=1)
    whole = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "whole")
    for parts in (3, 4):  # 15 samples in four parts: unequal ones
        accumulated = config.model_copy(update={"accumulation": parts})
        parted = fit(accumulated, binary, _splits(binary), seed=0, checkpoints=tmp_path / str(parts))
        assert _close(whole, parted) < 1e-4
        assert parted.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-4)
    with pytest.raises(ValueError, match=r"train.batch_size: 15 samples of a step are too few for 16 parts"):
        fit(
            config.model_copy(update={"accumulation": 16}),
            binary,
            _splits(binary),
            seed=0,
            checkpoints=tmp_path / "16",
        )


@pytest.mark.parametrize("loss", [LossConfig(weights="balanced"), LossConfig(kind="focal")], ids=str)
def test_a_batch_in_parts_is_the_whole_batch_where_labels_are_missing(
    tmp_path: Path, loss: LossConfig
) -> None:
    """Parts hold unequal numbers of labels, some none of a class: their plain mean is not the loss of the whole."""
    rng = np.random.default_rng(2)
    labels = (rng.random((80, 3)) < 0.4).astype(float)
    labels[rng.random((80, 3)) < rng.random((80, 1))] = np.nan
    folder = _write(tmp_path / "dataset", "multilabel", labels)
    config = _config(model=ResNetConfig(width=0.125, norm="group"), loss=loss, batch_size=12, epochs=1)
    whole = fit(config, folder, _splits(folder), seed=0, checkpoints=tmp_path / "whole")
    in_four = config.model_copy(update={"accumulation": 4})
    parted = fit(in_four, folder, _splits(folder), seed=0, checkpoints=tmp_path / "parted")
    assert parted.history[0]["train_loss"] == pytest.approx(whole.history[0]["train_loss"], rel=1e-4)
    assert_alike(whole.state_dict, parted.state_dict, relative=1e-3)


_PROCESS = """
import json, sys, torch
from pathlib import Path
import pandas as pd
from cadx.datasets import DatasetFolder
from cadx.training import TrainingConfig
from cadx.training.loop import fit
torch.set_num_threads(1)
out = Path(sys.argv[1])
for name, (folder, splits, config) in json.loads((out / "runs.json").read_text()).items():
    try:
        fitted = fit(
            TrainingConfig.model_validate(config), DatasetFolder(Path(folder)), pd.read_parquet(splits),
            seed=0, checkpoints=out / name / "member",
        )
        kept = {"weights": fitted.state_dict, "history": fitted.history}
    except ValueError as error:
        kept = {"error": str(error)}
    (out / name).mkdir(exist_ok=True)
    torch.save(kept, out / name / f"{torch.distributed.get_rank()}.pt")
"""


def fit_in_two_processes(
    runs: dict[str, tuple[DatasetFolder, Splits, TrainingConfig]], out: Path
) -> dict[str, list[dict[str, Any]]]:
    """What each of two gloo processes, started once by torchrun, has of each run: weights and history, or an error."""
    given = {}
    for name, (folder, splits, config) in runs.items():
        splits.to_parquet(out / f"{name}.parquet")
        given[name] = [str(folder.path), str(out / f"{name}.parquet"), config.model_dump(mode="json")]
    (out / "runs.json").write_text(json.dumps(given))
    (out / "process.py").write_text(_PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(out / "process.py"), str(out)],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {
        name: [torch.load(out / name / f"{rank}.pt", weights_only=True) for rank in (0, 1)] for name in runs
    }


def assert_alike(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], *, relative: float) -> None:
    """Each tensor as a whole: Adam turns the noise in a gradient that is almost zero into a step of full size."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert (other[key] - tensor.float()).norm() <= relative * tensor.float().norm(), key


@pytest.mark.slow
def test_two_processes_are_one_with_the_same_batch(binary: DatasetFolder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    pretrained = tmp_path / "weights.pt"
    torch.save(ResNetConfig(width=0.125).build(2, 1).backbone.state_dict(), pretrained)
    shared = {"loss": LossConfig(weights="balanced"), "augmentation": Augmentation(horizontal_flip=True)}
    group = _config(model=ResNetConfig(width=0.125, norm="group"), **shared)
    frozen = ResNetConfig(width=0.125, norm="frozen_batch", pretrained=pretrained)
    configs = {
        "group": group,
        "in_parts": group.model_copy(update={"accumulation": 2}),
        "frozen_batch": _config(model=frozen, **shared),
        "batch": _config(ema_decay=0.9, **shared),
        "not_finite": _config(learning_rate=1e30, warmup_epochs=0),
    }
    splits = _splits(binary)
    found = fit_in_two_processes({name: (binary, splits, each) for name, each in configs.items()}, tmp_path)
    errors = [each["error"] for each in found.pop("not_finite")]
    assert errors[0] == errors[1]
    named = errors[0].partition("samples of that batch: ")[2].split(", ")
    step = int(errors[0].partition("step ")[2].partition(":")[0]) - 1
    train = splits.query("split == 'train'")["sample_id"].to_numpy()
    order = EpochSampler(binary.labels(train.tolist()), seed=0).epoch_indices(0)
    assert named == train[order[16 * step : 16 * (step + 1)]].tolist(), (
        "the batch of both processes, in order"
    )
    for name, (first, second) in found.items():
        for key, tensor in first["weights"].items():
            assert torch.equal(tensor, second["weights"][key]), "the processes must not drift apart"
        if name == "batch":
            continue  # each process normalises by its own part
        alone = configs[name].model_copy(update={"accumulation": 1})
        one = fit(alone, binary, splits, seed=0, checkpoints=tmp_path / "one" / name)
        assert_alike(one.state_dict, first["weights"], relative=1e-4)
        for mine, theirs in zip(one.history, first["history"], strict=True):
            assert theirs["train_loss"] == pytest.approx(mine["train_loss"], rel=1e-4)
            assert theirs["val_loss"] == pytest.approx(mine["val_loss"], rel=1e-4)


def test_recomputed_activations_give_the_same_weights(binary: DatasetFolder, tmp_path: Path) -> None:
    config = _config(model=ResNetConfig(width=0.125, dropout=0.5), ema_decay=0.9)
    kept = fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path / "a")
    checkpointed = config.model_copy(update={"checkpointing": True})
    assert _same(kept, fit(checkpointed, binary, _splits(binary), seed=0, checkpoints=tmp_path / "b"))


def test_records_are_streamed(binary: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def streamed() -> list[dict[str, Any]]:
        lines = (tmp_path / "member" / "epochs.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    seen: list[dict[str, Any]] = []

    def killed_after_two(record: dict[str, Any]) -> None:
        seen.append(record)
        assert streamed() == seen
        if len(seen) == 2:
            raise _Killed

    config = _config(epochs=3, tracking="tensorboard")
    run = {"seed": 0, "checkpoints": tmp_path / "member"}
    with pytest.raises(_Killed):
        fit(config, binary, _splits(binary), **run, on_epoch=killed_after_two)
    resumed: list[dict[str, Any]] = []
    fitted = fit(config, binary, _splits(binary), **run, on_epoch=resumed.append)
    assert fitted.history == resumed == streamed()
    assert resumed[:2] == seen, "a caller sees again what was trained before"
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folders = {file.parent for file in (tmp_path / "member").rglob("events.out.tfevents*")}
    values = {}
    for folder in folders:
        events = EventAccumulator(str(folder)).Reload()
        if "val_auc" in events.Tags()["scalars"]:
            values |= {event.step: event.value for event in events.Scalars("val_auc")}
    assert values == pytest.approx({record["epoch"]: record["val_auc"] for record in resumed})

    store = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    logged = config.model_copy(update={"tracking": "mlflow"})
    fit(logged, binary, _splits(binary), seed=0, checkpoints=tmp_path / "logged")
    from mlflow.tracking import MlflowClient

    client = MlflowClient(store)
    (run_info,) = client.search_runs([client.get_experiment_by_name("patterns-0").experiment_id])
    history = client.get_metric_history(run_info.info.run_id, "val_auc")
    assert [metric.step for metric in history] == [1, 2, 3]
    assert run_info.data.params["epochs"] == "3"


@pytest.mark.parametrize("live", [False, True], ids=["in a file", "on a terminal"])
def test_each_epoch_is_told_in_a_line_and_on_a_terminal_as_it_goes(
    binary: DatasetFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    live: bool,
) -> None:
    monkeypatch.setenv("TTY_COMPATIBLE", "1" if live else "0")
    monkeypatch.setenv("COLUMNS", "200")
    first, second = fit(_config(), binary, _splits(binary), seed=0, checkpoints=tmp_path).history
    told = capsys.readouterr()
    assert told.out == "", "what a command prints is its own"
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", told.err)
    scores = [f"val AUC {one['val_auc']:.4f}  val loss {one['val_loss']:.4f}" for one in (first, second)]
    if live:
        assert f"epoch 2/2  loss {second['train_loss']:.4f}  {scores[0]}" in shown
        assert "14/14" in shown, "steps of the whole run"
    else:
        lines = shown.splitlines()
        assert lines[0].startswith(f"epoch 1/2  train loss {first['train_loss']:.4f}  {scores[0]}")
        assert lines[0].endswith("best")
        assert lines[1].startswith(f"epoch 2/2  train loss {second['train_loss']:.4f}  {scores[1]}")
        assert len(lines) == 2


@pytest.mark.parametrize("error", [None, MemoryError(), torch.cuda.OutOfMemoryError()], ids=repr)
def test_running_out_of_memory_says_of_which_and_what_to_change(
    binary: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    def full(*_: Any) -> None:
        if error is not None:
            raise error
        torch.empty(1 << 60)

    monkeypatch.setattr(loop._Run, "_train_step", full)
    with pytest.raises(
        ValueError,
        match=f"^out of {'GPU ' if isinstance(error, torch.cuda.OutOfMemoryError) else ''}memory: set"
        r" train.checkpointing: true, [^\n]*batch_size \(now 16",
    ):
        fit(_config(), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    # What is done already is not advised again.
    frugal = _config(checkpointing=True, accumulation=16, precision="bf16")
    with pytest.raises(ValueError, match=r"memory: make the input smaller"):
        fit(frugal, binary, _splits(binary), seed=0, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("norm", "batch_size", "accumulation", "advice"),
    [
        ("batch", 6, 2, r"raise train.accumulation \(now 2\), or lower train.batch_size \(now 6\), or make"),
        ("batch", 5, 2, r"memory: lower train.batch_size \(now 5\), or make"),
        ("batch", 4, 2, r"memory: make"),
        ("group", 3, 2, r"raise train.accumulation \(now 2\), or lower train.batch_size \(now 3\), or make"),
    ],
)
def test_out_of_memory_no_part_is_advised_that_is_too_small_to_normalise(
    norm: Any, batch_size: int, accumulation: int, advice: str
) -> None:
    config = _config(
        model=ResNetConfig(norm=norm), checkpointing=True, batch_size=batch_size, accumulation=accumulation
    )
    assert re.search(advice, loop._out_of_memory(config, of_gpu=False))


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch_size": 1}, r"raise train.batch_size \(now 1\), or set train.model.norm: group"),
        (
            {"batch_size": 4, "accumulation": 4},
            r"lower train.accumulation \(now 4\), or raise train.batch_size",
        ),
    ],
    ids=str,
)
def test_batch_norm_of_a_single_value_is_refused_with_what_to_change(
    binary: DatasetFolder, tmp_path: Path, changes: dict[str, Any], advice: str
) -> None:
    message = (
        rf"^batch normalisation: a single value per channel .*{advice}.*larger \(now 1 x 32 x 32 px, pad\)$"
    )
    with pytest.raises(ValueError, match=message):
        fit(_config(**changes), binary, _splits(binary), seed=0, checkpoints=tmp_path)
    model = ResNetConfig(width=0.125, norm="group")
    fit(_config(model=model, epochs=1, **changes), binary, _splits(binary), seed=0, checkpoints=tmp_path)


@pytest.mark.parametrize(
    ("family", "norm"), [("resnet", "norm: frozen_batch, or make"), ("resnet3d", r"\(now 16\), or make")]
)
def test_pretrained_batch_statistics_are_not_advised_away(family: str, norm: str) -> None:
    made = {"patch_px": (8, 8, 8)} if family == "resnet3d" else {"height_px": 32, "width_px": 32}
    model = {"family": family, "pretrained": "weights.safetensors"}
    config = TrainingConfig.model_validate({"model": model, "preprocessing": made, "batch_size": 16})
    assert re.search(norm, loop._single_value(config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preprocessing": {"patch_px": (8, 8, 8)}}, r"preprocessing: not for samples of kind image"),
        ({"model": {"family": "resnet3d"}}, r"family resnet3d: takes volumes, the data are images"),
        ({"monitor": "ap50"}, r"monitor ap50: not for a task of binary; use auc or loss"),
    ],
    ids=str,
)
def test_a_recipe_for_other_data_is_refused(
    binary: DatasetFolder, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    config = TrainingConfig.model_validate(_config().model_dump() | changes)
    with pytest.raises(ValueError, match=message):
        fit(config, binary, _splits(binary), seed=0, checkpoints=tmp_path)


def test_images_are_prepared_once_for_all_loader_workers(
    binary: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    pixels = DatasetFolder.pixels
    monkeypatch.setattr(
        DatasetFolder, "pixels", lambda folder, sample: (read.append(sample), pixels(folder, sample))[1]
    )
    ids = binary.samples["sample_id"].tolist()
    for num_workers, before in ((0, 0), (2, 10)):
        read.clear()
        config = _config(num_workers=num_workers)
        ImageWorkload(Setting(config, binary, ids[:6], ids[6:10], 0, torch.device("cpu"), tmp_path))
        assert len(read) == before
