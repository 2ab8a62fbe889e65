"""Whether each family of models learns its phantom: drawn, read, split, trained and asked as any other set.

The recipes were chosen on val; test patients are asked once here. The peer is what an accuracy must reach, or the
time that a training may take: ten minutes of two cores, counted in the processor's own time, so that what else runs
on the machine does not matter.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch

from benchmarks._claim import claim
from cadx import metrics
from cadx.datasets import DatasetFolder, write_splits
from cadx.detection import calculate_map
from cadx.loading import TilePreprocessing
from cadx.loading.slides import tissue_fractions
from cadx.predicting.bags import pool_tiles
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import detection_table
from cadx.splitting import assign_splits
from components.contract import ROOT, Params, read_params
from components.ingest import IngestParams, ingest
from components.split import SplitParams
from components.train import TrainParams, train

CATALOG = ROOT / "data" / "catalog.yaml"
PARAMS = ROOT / "params.yaml"
CORE_MINUTES = 20.0
TUMOUR_TILE = 0.5
"""Share of a tile from which on it is one of tumour."""
SEED = 0

P = TypeVar("P", bound=Params)
Score = Callable[[Predictor, DatasetFolder, list[str]], float]


class Specimen(NamedTuple):
    """A family, the experiment on its phantom, and what must come of it.

    Attributes:
        experiment: of params.yaml, whose data, splits and recipe it has.
        goals: claim -> (how test samples are scored, its unit, what the score must reach).
    """

    experiment: str
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
    params = _params(specimen, "ingest", IngestParams)
    ingest(catalog=CATALOG, cache=root / "sources", dataset=root / "dataset", params=params)
    folder = DatasetFolder(root / "dataset")
    samples, labels = folder.samples, list(folder.info.label_columns)
    fractions = _params(specimen, "split", SplitParams).fractions.model_dump()
    placed = assign_splits(samples, fractions=fractions, seed=SEED, labels=labels)
    splits = pd.DataFrame({"sample_id": samples["sample_id"], "split": placed, "reason": ""})
    write_splits(root / "splits.parquet", splits)
    return folder, splits


def _train(specimen: Specimen, root: Path) -> float:
    """Train and write `root`/bundle; minutes of one core that the training took."""
    imbalance = root / "imbalance.json"
    imbalance.touch()  # the recipes leave nothing to it
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
        params=_params(specimen, "train", TrainParams),
    )
    return (time.process_time() - started) / 60


def _params(specimen: Specimen, step: str, cls: type[P]) -> P:
    """A section of the experiment's."""
    return read_params(f"{PARAMS}:{specimen.experiment}", step, cls)


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
    "volume": Specimen("phantom-volume", {"volume": (auc_of_samples, "AUC", 0.95)}),
    "slide": Specimen(
        "phantom-slide",
        {
            "slide": (auc_of_samples, "AUC", 0.95),
            "slide_attention": (auc_of_attention, "AUC of tiles within a slide", 0.9),
        },
    ),
    "yolo": Specimen("phantom-lesion", {"yolo": (ap50_of_boxes, "AP50", 0.8)}),
    "faster_rcnn": Specimen("phantom-lesion-faster-rcnn", {"faster_rcnn": (ap50_of_boxes, "AP50", 0.8)}),
}
"""By family. Test patients are asked once, by recipes that were chosen on val of other cohorts."""
