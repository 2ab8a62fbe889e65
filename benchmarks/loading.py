"""What loading costs: training from a dataset folder beside the same training from memory, images a second.

Both arms are `fit` with the same recipe. One reads, resizes and normalises every image in every epoch, in loader
processes; the other does so in its first epoch, which does not count, and then has them all.
"""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._claim import claim
from benchmarks.step import epoch_seconds, noise_splits, write_noise
from cadx.models import ResNetConfig
from cadx.training import TrainingConfig
from cadx.transforms import Preprocessing

NUM_IMAGES = 96
RAW_PX = 1024
SIZE_PX = 224
ROUNDS = 3
GOAL = 0.9
"""Least share of the rate from memory."""
CONFIG = TrainingConfig(
    model=ResNetConfig(),
    preprocessing=Preprocessing(height_px=SIZE_PX, width_px=SIZE_PX, mean=0.5, std=0.25),
    epochs=3,
    batch_size=16,
)


def claims() -> Iterator[dict[str, Any]]:
    arms = {
        "ours": CONFIG.model_copy(
            update={"cache_mb": 0, "num_workers": min(8, len(os.sched_getaffinity(0)))}
        ),
        "peer": CONFIG,
    }
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_noise(Path(folder) / "dataset", NUM_IMAGES, RAW_PX)
        splits = noise_splits(dataset)
        for number in range(ROUNDS):
            for arm, config in arms.items():
                checkpoints = Path(folder) / f"checkpoints-{arm}-{number}"
                seconds[arm].append(epoch_seconds(config, dataset, splits, checkpoints))
    # The best of each arm: what else runs on the machine only ever slows one down.
    ours, peer = (NUM_IMAGES / min(seconds[arm]) for arm in ("ours", "peer"))
    yield claim("loading.images", ours, peer, "images/s", goal=GOAL)
