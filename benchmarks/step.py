"""What the training loop costs: images a second beside a hand-written loop and beside MONAI's trainer.

Model, optimizer, data and kernels are the same. The peers know no augmentation, checkpoints or checks: images in
one tensor, forward, backward, step. Each arm is a process of its own, as a user would run it. They take turns, a step
of the optimizer each, so that the machine is the same for all. `fit` tunes glibc's allocator; the arms that are
to show the loop alone do so too. Seconds are the processor's own, without validation and checkpoints between epochs.
"""

import contextlib
import io
import multiprocessing
import signal
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks._claim import claim
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_bytes
from cadx.memory import tune_allocator
from cadx.models import Output, ResNetConfig
from cadx.training import TrainingConfig
from cadx.training.loop import fit
from cadx.transforms import Preprocessing

NUM_IMAGES = 1024
BATCH_SIZE = 64
SIZE_PX = 56
ROUNDS, EPOCHS = 6, 2
GOALS = {"step.vs_plain_loop": 0.97, "step.monai_tuned": 0.97, "step.monai": 1.0}
"""Least ratios: the loop within 3 % of others in the same memory, and not slower than MONAI's trainer as it comes."""
MODEL = ResNetConfig(width=0.5)
PREPROCESSING = Preprocessing(height_px=SIZE_PX, width_px=SIZE_PX, mean=0.5, std=0.25)


def claims() -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        write_noise(Path(folder) / "dataset", NUM_IMAGES, SIZE_PX)
        # Anew each round: where a network's numbers lie in memory makes it some hundredths faster or slower.
        rounds = [_in_turns(Path(folder) / "dataset") for _ in range(ROUNDS)]
    seconds = {name: np.concatenate([each[name] for each in rounds]) for name in ARMS}
    own = seconds.pop("ours")
    for name, peer in seconds.items():
        # Of steps that followed each other: how fast the machine is changes from minute to minute.
        ratio = float(np.median(peer / own))
        ours_rate, peer_rate = (BATCH_SIZE / float(np.median(each)) for each in (own, peer))
        yield claim(name, ours_rate, peer_rate, "images/s of processor time", ratio=ratio, goal=GOALS[name])


def _in_turns(folder: Path) -> dict[str, np.ndarray]:
    """Processor seconds of the steps of each arm, but for the first epoch, which warms up, and each epoch's first."""
    context = multiprocessing.get_context("spawn")
    turns: dict[str, Connection] = {}
    arms: dict[str, BaseProcess] = {}
    seconds = defaultdict[str, list[float]](list)
    try:
        for name in ARMS:
            turns[name], theirs = context.Pipe()
            arms[name] = context.Process(target=_run_arm, args=(name, folder, theirs))
            arms[name].start()
            theirs.close()  # so that an arm that fails is noticed: EOFError
        for turn in turns.values():
            turn.recv()  # it is ready
        for _ in range(EPOCHS * (NUM_IMAGES // BATCH_SIZE)):
            for name, turn in turns.items():
                turn.send(None)
                seconds[name].append(turn.recv())
        for name, turn in turns.items():
            turn.send(None)
            arms[name].join()  # before the next round starts
    except (EOFError, BrokenPipeError):
        pass  # an arm has ended: said below, by its name
    finally:
        for arm in arms.values():
            arm.terminate()
            arm.join()
    if failed := [name for name, arm in arms.items() if arm.exitcode not in (0, -signal.SIGTERM)]:
        raise RuntimeError(f"step: {', '.join(failed)} failed, as it says above")
    shape = (EPOCHS, NUM_IMAGES // BATCH_SIZE)
    return {name: np.reshape(seconds[name], shape)[1:, 1:].ravel() for name in ARMS}


def _run_arm(name: str, folder: Path, turn: Connection) -> None:
    """Train; wait for a turn before each step of the optimizer, and tell what the step took."""
    started = 0.0

    def await_turn() -> None:
        nonlocal started
        turn.recv()
        started = time.process_time()

    def hand_on(*_: Any) -> None:
        turn.send(time.process_time() - started)
        await_turn()

    def ready() -> None:
        turn.send(None)
        await_turn()

    register_optimizer_step_post_hook(hand_on)
    ARMS[name](DatasetFolder(folder), ready)


def write_noise(path: Path, num_images: int, size_px: int) -> DatasetFolder:
    """A dataset of square gray images of noise in two classes: two more, for val."""
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
                Sample(
                    sample_id=f"s{number:04}",
                    pixels=pixels,
                    labels={("even", "odd")[number % 2]: 1},
                    patient=f"p{number}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics={"mean": float(pixels.mean() / 255)},
                )
            )
    return DatasetFolder(path)


def noise_splits(dataset: DatasetFolder) -> pd.DataFrame:
    """The splits of a dataset of noise: its last two images are val."""
    split = ["train"] * (len(dataset.samples) - 2) + ["val"] * 2
    return pd.DataFrame({"sample_id": dataset.samples["sample_id"], "split": split, "reason": ""})


def epoch_seconds(
    config: TrainingConfig, dataset: DatasetFolder, splits: pd.DataFrame, checkpoints: Path
) -> float:
    """Seconds an epoch, without its validation; the first one, which fills the cache, does not count."""
    with contextlib.redirect_stderr(io.StringIO()):
        fitted = fit(config, dataset, splits, seed=0, checkpoints=checkpoints)
    return float(min(record["seconds"] for record in fitted.history[1:]))


class _Batches:
    """Shuffled batches from memory, on the device: anew in each iteration."""

    def __init__(self, dataset: DatasetFolder) -> None:
        ids = dataset.samples["sample_id"].tolist()[:-2]
        self._images = torch.stack([PREPROCESSING.apply(dataset.pixels(name)) for name in ids])
        self._classes = torch.from_numpy(dataset.labels(ids)).argmax(1)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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


def _ours(dataset: DatasetFolder, ready: Callable[[], None]) -> None:
    config = TrainingConfig(
        model=MODEL, preprocessing=PREPROCESSING, epochs=EPOCHS, batch_size=BATCH_SIZE, precision="fp32"
    )
    splits = noise_splits(dataset)
    with contextlib.redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as checkpoints:
        ready()
        fit(config, dataset, splits, seed=0, checkpoints=Path(checkpoints) / "run")


def _plain_loop(dataset: DatasetFolder, ready: Callable[[], None]) -> None:
    tune_allocator()
    batches = _Batches(dataset)
    network, optimizer = _network(batches.device)
    ready()
    for _ in range(EPOCHS):
        total = 0.0
        for images, classes in batches:
            loss = _loss(network(images), classes)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()


def _monai(dataset: DatasetFolder, ready: Callable[[], None], *, tuned: bool = False) -> None:
    from monai.engines.trainer import SupervisedTrainer

    if tuned:
        tune_allocator()
    batches = _Batches(dataset)
    network, optimizer = _network(batches.device)
    trainer = SupervisedTrainer(
        device=batches.device,
        max_epochs=EPOCHS,
        train_data_loader=batches,
        network=network,
        optimizer=optimizer,
        loss_function=_loss,
        prepare_batch=lambda batch, *_, **__: batch,
        decollate=False,
        optim_set_to_none=True,
    )
    ready()
    trainer.run()


ARMS: dict[str, Callable[[DatasetFolder, Callable[[], None]], None]] = {
    "ours": _ours,
    "step.vs_plain_loop": _plain_loop,
    "step.monai_tuned": partial(_monai, tuned=True),
    "step.monai": _monai,
}
