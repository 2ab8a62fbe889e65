"""Musk1 as the literature reports it: the accuracy of ten folds, repeated ten times with other folds and weights.

The recipe is that of experiment `musk1`, where neither an epoch nor a threshold is chosen, so that no nested loop is
needed: a bag is called musk where its probability is .5 or more. The peer is gated attention, of Ilse et al. 2018,
"Attention-based Deep Multiple Instance Learning", table 1: .900, with a standard error of .050 over folds.
"""

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from benchmarks._claim import claim
from cadx.datasets import DatasetFolder, write_splits
from cadx.predicting.folds import out_of_fold
from cadx.predicting.predictor import Predictor
from components.contract import ROOT, read_params
from components.ingest import IngestParams, ingest
from components.train import TrainParams, train

EXPERIMENT = f"{ROOT / 'params.yaml'}:musk1"
REPEATS = 10
GATED_ATTENTION = 0.9


def claims() -> Iterator[dict[str, Any]]:
    """The mean accuracy, with that of each repetition and their standard deviation."""
    with TemporaryDirectory(prefix="cadx-folds-") as temporary:
        root = Path(temporary)
        ingest(
            catalog=ROOT / "data" / "catalog.yaml",
            cache=root / "sources",
            dataset=root / "dataset",
            params=read_params(EXPERIMENT, "ingest", IngestParams),
        )
        folder = DatasetFolder(root / "dataset")
        ids = folder.samples["sample_id"]
        write_splits(
            root / "splits.parquet", pd.DataFrame({"sample_id": ids, "split": "train", "reason": ""})
        )
        (root / "imbalance.json").touch()  # the recipe leaves nothing to it
        each = [_accuracy(folder, root, seed) for seed in range(REPEATS)]
    found = claim("folds.musk1_accuracy", float(np.mean(each)), GATED_ATTENTION, "accuracy")
    yield found | {"each": each, "sd": float(np.std(each, ddof=1))}


def _accuracy(folder: DatasetFolder, root: Path, seed: int) -> float:
    """The share of bags that are told right by the network that did not see them."""
    bundle = root / str(seed)
    train(
        dataset=folder.path,
        splits=root / "splits.parquet",
        imbalance=root / "imbalance.json",
        checkpoints=root / "checkpoints",
        trained=bundle,
        log=root / f"{seed}.jsonl",
        experiment="folds",
        seed=seed,
        params=read_params(EXPERIMENT, "train", TrainParams),
    )
    predictor = Predictor(bundle, uncalibrated_ok=True)
    right = []
    for network, ids in out_of_fold(predictor, folder, root / "splits.parquet"):
        logits, _ = network.logits(network.stored(folder, ids))
        right += (logits.argmax(1) == folder.labels(ids).argmax(1)).tolist()
    return float(np.mean(right))
