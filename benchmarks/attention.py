"""Whether attention on slides finds the tumour: how it ranks the tiles of each test slide of the phantom.

It asks what `dvc repro calibrate@phantom-slide-0` leaves behind. What else a family must reach on its phantom, its
experiment measures, with intervals: docs/results.md.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from benchmarks._claim import claim
from cadx import metrics
from cadx.datasets import DatasetFolder, read_splits
from cadx.loading import TilePreprocessing
from cadx.loading.slides import tissue_fractions
from cadx.predicting.bags import pool_tiles
from cadx.predicting.predictor import Predictor
from components.contract import ROOT

WORK = ROOT / "data" / "work" / "phantom-slide"
TUMOUR_TILE = 0.5
"""Share of a tile from which on it is one of tumour."""
GOAL = 0.9


def claims() -> Iterator[dict[str, Any]]:
    """The mean over test slides of the AUC by which attention tells the tiles of tumour from the others."""
    bundle = WORK / "0" / "bundle"
    if not bundle.is_dir():
        print(f"attention: {bundle}: none; `dvc repro calibrate@phantom-slide-0` makes it", file=sys.stderr)
        return
    splits, predictor = read_splits(WORK / "splits.parquet"), Predictor(bundle)
    test = splits.loc[splits["split"] == "test", "sample_id"].tolist()
    aucs = tile_aucs(predictor, DatasetFolder(WORK / "dataset"), test)
    yield claim(
        "attention.tiles", float(np.mean(aucs)), GOAL, f"AUC within a slide, mean of {len(aucs)} slides"
    )


def tile_aucs(predictor: Predictor, folder: DatasetFolder, ids: list[str]) -> list[float]:
    """The AUC of attention within each slide that has tiles of tumour and others."""
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
        value = metrics.auc(is_tumour.astype(np.float64), output.attention[0].numpy()).value
        # A nest that fills no tile, or all of them, has nothing to rank.
        if value is not None:
            aucs.append(value)
    return aucs
