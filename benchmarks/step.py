"""What the training loop costs: images a second beside a hand-written loop and beside MONAI's trainer.

Model, optimizer, data and kernels are the same. The peers know no augmentation, checkpoints or checks: images in
one tensor, forward, backward, step. Seconds are the processor's own, from one step of the optimizer to the next, so
that what else runs on the machine is not counted, nor validation and checkpoints between epochs.
"""

import contextlib
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks._claim import claim
from cadx.datasets import DatasetFolder, DatasetWriter, SourceInfo
from cadx.files import digest_bytes
from cadx.models import Output, ResNetConfig
from cadx.training import TrainingConfig
from cadx.training.loop import fit
from cadx.transforms import Preprocessing

NUM_IMAGES = 1024
BATCH_SIZE = 64
SIZE_PX = 56
ROUNDS = 5
EPOCHS = 3
GOALS = {"step.vs_plain_loop": 0.97, "step.monai": 1.0}
"""Least ratios: within 3 % of a hand-written loop, and not slower than MONAI's trainer."""
MODEL = ResNetConfig(width=0.5)
PREPROCESSING = Preprocessing(height_px=SIZE_PX, width_px=SIZE_PX, mean=0.5, std=0.25)


def claims() -> Iterator[dict[str, Any]]:
    config = TrainingConfig(
        model=MODEL, preprocessing=PREPROCESSING, epochs=EPOCHS, batch_size=BATCH_SIZE, precision="fp32"
    )
    with tempfile.TemporaryDirectory() as folder:
        dataset, splits = write_noise(Path(folder) / "dataset", NUM_IMAGES, SIZE_PX)
        ids = dataset.samples["sample_id"].tolist()[:NUM_IMAGES]
        images = torch.stack([PREPROCESSING.apply(dataset.pixels(name)) for name in ids])
        classes = torch.from_numpy(dataset.labels(ids)).argmax(1)

        def ours() -> None:
            with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as checkpoints:
                fit(config, dataset, splits, seed=0, checkpoints=Path(checkpoints) / "run")

        arms: dict[str, Callable[[], None]] = {
            "ours": ours,
            "step.vs_plain_loop": lambda: _plain_loop(_Batches(images, classes)),
            "step.monai": lambda: _monai(_Batches(images, classes)),
        }
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(ROUNDS):
            # Each arm is the first as often as the others.
            for arm in np.roll(list(arms), number).tolist():
                seconds[arm].append(_step_seconds(arms[arm]))
    own = seconds.pop("ours")
    for name, times in seconds.items():
        ratio = float(np.median(np.divide(times, own)))
        ours_rate, peer_rate = (BATCH_SIZE / float(np.median(each)) for each in (own, times))
        yield claim(name, ours_rate, peer_rate, "images/s of processor time", ratio=ratio, goal=GOALS[name])


def _step_seconds(train: Callable[[], None]) -> float:
    """Processor seconds of a step of `train`: the median; the first epoch warms up."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.process_time()))
    try:
        train()
    finally:
        hook.remove()
    per_epoch = np.reshape(ends, (EPOCHS, NUM_IMAGES // BATCH_SIZE))
    return float(np.median(np.diff(per_epoch[1:], axis=1)))


def write_noise(path: Path, num_images: int, size_px: int) -> tuple[DatasetFolder, pd.DataFrame]:
    """A dataset of square gray images of noise in two classes, and its splits: two more for val."""
    rng = np.random.default_rng(0)
    with DatasetWriter(
        path,
        name="noise",
        task="binary",
        classes=("even", "odd"),
        positive="odd",
        modality="noise",
        clustered=False,
        source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number in range(num_images + 2):
            pixels = rng.integers(0, 256, (size_px, size_px), np.uint8)
            writer.add(
                sample_id=f"s{number:04}",
                pixels=pixels,
                labels={("even", "odd")[number % 2]: 1},
                patient=f"p{number}",
                sha256=digest_bytes(pixels.tobytes()),
                statistics={"mean": float(pixels.mean() / 255)},
            )
    dataset = DatasetFolder(path)
    split = ["train"] * num_images + ["val"] * 2
    return dataset, pd.DataFrame({"sample_id": dataset.samples["sample_id"], "split": split, "reason": ""})


def epoch_seconds(
    config: TrainingConfig, dataset: DatasetFolder, splits: pd.DataFrame, checkpoints: Path
) -> float:
    """Seconds an epoch, without its validation; the first one, which fills the cache, does not count."""
    with contextlib.redirect_stderr(io.StringIO()):
        fitted = fit(config, dataset, splits, seed=0, checkpoints=checkpoints)
    return float(min(record["seconds"] for record in fitted.history[1:]))


class _Batches:
    """Shuffled batches from memory, on the device: anew in each iteration."""

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._images, self._classes = images, classes

    def __len__(self) -> int:
        return len(self._images) // BATCH_SIZE

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self._images)).view(-1, BATCH_SIZE):
            images = self._images[batch].to(self.device, memory_format=torch.channels_last)
            yield images, self._classes[batch].to(self.device)


def _network(device: torch.device) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    network = MODEL.build(2, 1).train()
    network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network, torch.optim.AdamW(network.parameters(), 1e-3, fused=True)


def _loss(output: Output, classes: Tensor) -> Tensor:
    return F.cross_entropy(output.logits, classes)


def _plain_loop(batches: _Batches) -> None:
    network, optimizer = _network(batches.device)
    for _ in range(EPOCHS):
        total = 0.0
        for images, classes in batches:
            loss = _loss(network(images), classes)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()


def _monai(batches: _Batches) -> None:
    from monai.engines.trainer import SupervisedTrainer

    network, optimizer = _network(batches.device)
    SupervisedTrainer(
        device=batches.device,
        max_epochs=EPOCHS,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer,
        loss_function=_loss,
        prepare_batch=lambda batch, *_, **__: batch,
        decollate=False,
        optim_set_to_none=True,
    ).run()
