"""Whether each family of models learns its phantom: drawn, read, split, trained and asked as any other set.

The recipes were chosen on val; test patients are asked once here. The peer is what an accuracy must reach, or the
time that a training may take: ten minutes of two cores, counted in the processor's own time, so that what else runs
on the machine does not matter.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from benchmarks._claim import claim
from cadx import metrics
from cadx.datasets import DatasetFolder, write_splits
from cadx.detection import calculate_map
from cadx.loading import TilePreprocessing
from cadx.loading.slides import tissue_fractions
from cadx.predicting import Predictor
from cadx.predicting.bags import pool_tiles
from cadx.predicting.boxes import detection_table
from cadx.splitting import assign_splits
from components.ingest import IngestParams, ingest
from components.train import TrainParams, train

CATALOG = Path(__file__).parents[1] / "data" / "catalog.yaml"
CORE_MINUTES = 20.0
TUMOUR_TILE = 0.5
"""Share of a tile from which on it is one of tumour."""
SEED = 0

Score = Callable[[Predictor, DatasetFolder, list[str]], float]


class Specimen(NamedTuple):
    """A phantom, how a family is trained on it, and what must come of it.

    Attributes:
        source: the catalogue's entry.
        fractions: split -> share of the samples.
        recipe: `TrainParams`; loss and sampler are the plain ones where it names none.
        goals: claim -> (how test samples are scored, its unit, what the score must reach).
    """

    source: str
    fractions: Mapping[str, float]
    recipe: Mapping[str, Any]
    goals: Mapping[str, tuple[Score, str, float]]


def claims() -> Iterator[dict[str, Any]]:
    for name, specimen in SPECIMENS.items():
        with TemporaryDirectory(prefix="cadx-families-") as temporary:
            root = Path(temporary)
            folder, splits = _ingest(specimen, root)
            minutes = _train(specimen, root)
            predictor = Predictor(root / "bundle", uncalibrated_ok=True)
            test = splits.loc[splits["split"] == "test", "sample_id"].tolist()
            for what, (score, unit, goal) in specimen.goals.items():
                ours = score(predictor, folder, test)
                yield claim(f"families.{what}", ours, goal, unit)
            yield claim(
                f"families.{name}_training", minutes, CORE_MINUTES, "core-min", ratio=CORE_MINUTES / minutes
            )


def _ingest(specimen: Specimen, root: Path) -> tuple[DatasetFolder, pd.DataFrame]:
    """The phantom as a dataset in `root`, and its splits, which stand there too."""
    params = IngestParams(source=specimen.source)
    ingest(catalog=CATALOG, cache=root / "sources", dataset=root / "dataset", params=params)
    folder = DatasetFolder(root / "dataset")
    samples, labels = folder.samples, list(folder.info.label_columns)
    placed = assign_splits(samples, fractions=specimen.fractions, seed=SEED, labels=labels)
    splits = pd.DataFrame({"sample_id": samples["sample_id"], "split": placed, "reason": ""})
    write_splits(root / "splits.parquet", splits)
    return folder, splits


def _train(specimen: Specimen, root: Path) -> float:
    """Train and write `root`/bundle; minutes of one core that the training took."""
    imbalance = root / "imbalance.json"
    imbalance.touch()  # the recipe leaves nothing to it
    started = time.process_time()
    train(
        dataset=root / "dataset",
        splits=root / "splits.parquet",
        imbalance=imbalance,
        checkpoints=root / "checkpoints",
        trained=root / "bundle",
        log=root / "training.jsonl",
        experiment="families",
        seed=SEED,
        params=TrainParams.model_validate({"loss": {}, "sampler": "natural", **specimen.recipe}),
    )
    return (time.process_time() - started) / 60


def auc_of_samples(predictor: Predictor, folder: DatasetFolder, ids: list[str]) -> float:
    """The AUC of a binary task's log-odds."""
    positive = folder.info.classes.index(str(folder.info.positive))
    logits, _ = predictor.logits(predictor.stored(folder, ids))
    return _auc(folder.labels(ids)[:, positive], logits[:, positive] - logits[:, 1 - positive])


def auc_of_attention(predictor: Predictor, folder: DatasetFolder, ids: list[str]) -> float:
    """How well attention tells the tiles of tumour from the others: the mean of the AUCs within each slide."""
    made = predictor.bundle.manifest.preprocessing
    assert isinstance(made, TilePreprocessing)
    tile_um = made.tile_px * made.mpp
    (network,) = predictor.bundle.networks()
    aucs = []
    for name, tiles in zip(ids, predictor.stored(folder, ids), strict=True):
        mask = folder.mask(name)
        if mask is None:
            continue
        with torch.inference_mode():
            encode: Any = network.encode
            output, positions_um = pool_tiles(encode, network, tiles.stream, torch.device("cpu"))
        row = folder.samples.iloc[int(folder.rows([name])[0])]
        spacing_um = (1000 * float(row["spacing_row_mm"]), 1000 * float(row["spacing_column_mm"]))
        columns, rows = (positions_um.numpy() / tile_um).round().astype(int).T
        is_tumour = tissue_fractions(mask > 0, spacing_um, tile_um)[rows, columns] > TUMOUR_TILE
        # A nest that fills no tile, or all of them, has nothing to rank.
        if is_tumour.any() and not is_tumour.all():
            aucs.append(_auc(is_tumour, output.attention[0].numpy()))
    return float(np.mean(aucs))


def ap50_of_boxes(predictor: Predictor, folder: DatasetFolder, ids: list[str]) -> float:
    """The average precision at an IoU of .5, mean over classes."""
    answers = predictor.detect(folder.pixels(name) for name in ids)
    found = detection_table(dict(zip(ids, answers, strict=True)), folder.info.classes)
    boxes = folder.boxes[folder.boxes["sample_id"].isin(ids)]
    value = calculate_map(found, boxes, ids, classes=folder.info.classes)[""]["ap50"]
    assert value is not None, "a lesion is needed"
    return value


def _auc(labels: np.ndarray, scores: Sequence[float] | np.ndarray) -> float:
    value = metrics.auc(labels.astype(np.float64), scores).value
    assert value is not None, "both outcomes are needed"
    return value


SPECIMENS = {
    "volume": Specimen(
        source="phantom-volume",
        fractions={"train": 0.58, "val": 0.12, "test": 0.3},
        recipe={
            "model": {"family": "resnet3d", "depth": 10, "width": 0.25, "stem": "small"},
            "preprocessing": {"patch_px": (16, 16, 16), "spacing_mm": (2, 2, 2), "window_hu": (-1000, 200)},
            "patches_per_sample": 24,
            "epochs": 6,
            "batch_size": 32,
            "learning_rate": 2e-3,
            "ema_decay": 0.98,
        },
        goals={"volume": (auc_of_samples, "AUC", 0.95)},
    ),
    "slide": Specimen(
        source="phantom-slide",
        fractions={"train": 0.5, "val": 0.2, "test": 0.3},
        recipe={
            "model": {
                "family": "mil",
                "hidden_dim": 64,
                "attention_dim": 32,
                "encoder": {"depth": 18, "width": 0.25, "frozen": False},
            },
            "preprocessing": {"channels": 3, "height_px": 64, "width_px": 64, "tile_px": 64, "mpp": 1.0},
            "max_instances": 48,
            "epochs": 30,
            "batch_size": 4,
            "ema_decay": 0.98,
            "monitor": "loss",
        },
        goals={
            "slide": (auc_of_samples, "AUC", 0.95),
            "slide_attention": (auc_of_attention, "AUC of tiles within a slide", 0.9),
        },
    ),
    "yolo": Specimen(
        source="phantom-lesion",
        fractions={"train": 0.7, "val": 0.2, "calibration": 0.05, "test": 0.05},
        recipe={
            # Specks of a pixel or two need channels where the map is fine, not a coarser scale.
            "model": {"family": "yolo", "width": 0.5, "depth": 1.0, "strides": (4,), "focal_gamma": 1.0},
            "preprocessing": {"height_px": 128, "width_px": 128, "fit": "tile", "mean": 0.3, "std": 0.25},
            "augmentation": {
                "horizontal_flip": True,
                "scale_fraction": 0.15,
                "contrast": 0.15,
                "brightness": 0.1,
            },
            "sampler": "balanced",
            "patches_per_sample": 16,
            "positive_fraction": 0.8,
            "epochs": 9,
            "batch_size": 16,
            "learning_rate": 3e-3,
            "warmup_epochs": 0.1,
            "ema_decay": 0.995,
            "grad_clip": 10,
        },
        goals={"lesion": (ap50_of_boxes, "AP50", 0.8)},
    ),
}
"""By family. An accuracy is measured on test."""
