"""What the training loop costs: images a second beside a hand-written loop and beside MONAI's trainer.

Model, optimizer, data and kernels are the same. The peers know no augmentation, checkpoints or checks: images in
one tensor, forward, backward, step. The three take turns, a step of the optimizer each, so that the machine is the same
for all. Seconds are the processor's own, without validation and checkpoints between epochs.
"""

import contextlib
import io
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
ROUNDS, EPOCHS = 10, 2
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
        # Anew each round: where a network's numbers lie in memory makes it some hundredths faster or slower.
        rounds = [_in_turns(arms) for _ in range(ROUNDS)]
    seconds = {name: np.concatenate([each[name] for each in rounds]) for name in arms}
    own = seconds.pop("ours")
    for name, peer in seconds.items():
        # Of steps that followed each other: how fast the machine is changes from minute to minute.
        ratio = float(np.median(peer / own))
        ours_rate, peer_rate = (BATCH_SIZE / float(np.median(each)) for each in (own, peer))
        yield claim(name, ours_rate, peer_rate, "images/s of processor time", ratio=ratio, goal=GOALS[name])


def _in_turns(arms: Mapping[str, Callable[[], None]]) -> dict[str, np.ndarray]:
    """Processor seconds of the steps of each arm, but for the first epoch, which warms up, and each epoch's first.

    Args:
        arms: trainings of as many steps of an optimizer each. They run in threads, of which one at a time is awake.
    """
    turns = {name: threading.Semaphore(0) for name in arms}
    following = dict(zip(arms, np.roll([*arms], -1).tolist(), strict=True))
    mine, started, seconds = threading.local(), 0.0, defaultdict[str, list[float]](list)

    def hand_on(*_: Any) -> None:
        nonlocal started
        seconds[mine.name].append(time.process_time() - started)
        turns[following[mine.name]].release()
        turns[mine.name].acquire()
        started = time.process_time()

    def run(name: str) -> None:
        nonlocal started
        mine.name = name
        turns[name].acquire()
        started = time.process_time()
        try:
            arms[name]()
        finally:
            for each, after in following.items():  # out of the ring: who has ended, or failed, takes no turn
                if after == name:
                    following[each] = following[name]
            turns[following[name]].release()

    hook = register_optimizer_step_post_hook(hand_on)
    try:
        with ThreadPoolExecutor(len(arms)) as pool:
            running = [pool.submit(run, name) for name in arms]
            turns[next(iter(arms))].release()
            for each in running:
                each.result()
    finally:
        hook.remove()
    shape = (EPOCHS, NUM_IMAGES // BATCH_SIZE)
    return {name: np.reshape(seconds[name], shape)[1:, 1:].ravel() for name in arms}


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
