"""Volumes and bags of features through the steps that images take: train, calibrate, evaluate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import roc_auc_score

from cadx.bundle import Bundle
from cadx.datasets import DatasetWriter, SourceInfo, preview, write_splits
from cadx.drift import image_statistics
from cadx.files import digest_bytes
from cadx.predicting import read_predictions
from components.calibrate import calibrate
from components.evaluate import evaluate
from components.train import train

NUM_SAMPLES = 100
RECIPES: dict[str, dict[str, Any]] = {
    "volume": {
        "model": {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
        "preprocessing": {"patch_px": [16, 16, 16], "window_hu": [0, 120]},
        "patches_per_sample": 1,
        "epochs": 6,
    },
    "features": {
        "model": {"family": "mil", "pooling": "max", "negative_class": 0, "hidden_dim": 32, "dropout": 0.0},
        "preprocessing": {"channels": 12},
        "epochs": 40,
    },
}


def _sample(kind: str, rng: np.random.Generator, sick: bool) -> tuple[np.ndarray, dict[str, Any]]:
    if kind == "features":
        bag = rng.normal(size=(rng.integers(5, 12), 12)).astype(np.float32)
        bag[0, 3] += 8 * sick
        return bag, {}
    voxels = rng.integers(0, 60, (16, 18, 20)).astype(np.int16)
    voxels[4:12, 4:12, 4:12] += 60 * np.int16(sick)
    return voxels, {"spacing_mm": (1.0, 1.0, 1.0)}


@pytest.mark.parametrize("kind", RECIPES)
def test_a_kind_goes_from_training_to_a_report(kind: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = [f"s{number:03}" for number in range(NUM_SAMPLES)]
    with DatasetWriter(
        tmp_path / "dataset",
        name=kind,
        kind=kind,  # type: ignore[arg-type]
        task="binary",
        classes=("none", "nodule"),
        positive="nodule",
        modality="noise",
        clustered=False,
        source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number, sample_id in enumerate(ids):
            sick = number % 3 == 0
            array, extra = _sample(kind, rng, sick)
            writer.add(
                sample_id=sample_id,
                pixels=array,
                labels={("none", "nodule")[sick]: 1},
                patient=f"p{number}",
                sha256=digest_bytes(array.tobytes()),
                statistics=image_statistics(preview(kind, array)),  # type: ignore[arg-type]
                **extra,
            )
    split = np.repeat(["train", "val", "calibration", "test"], NUM_SAMPLES // 4)
    splits = tmp_path / "splits.parquet"
    write_splits(splits, pd.DataFrame({"sample_id": ids, "split": split, "reason": ""}))
    recommended = {"recommendation": {"loss": {"kind": "cross_entropy"}, "sampler": "natural"}}
    (tmp_path / "imbalance.json").write_text(json.dumps(recommended))
    shared = {"dataset": tmp_path / "dataset", "splits": splits}
    train(
        **shared,
        imbalance=tmp_path / "imbalance.json",
        checkpoints=tmp_path / "checkpoints",
        trained=tmp_path / "trained",
        log=tmp_path / "training.jsonl",
        experiment=kind,
        seed=0,
        params=json.dumps({"batch_size": 8, "learning_rate": 3e-3} | RECIPES[kind]),
    )
    calibrate(**shared, trained=tmp_path / "trained", bundle=tmp_path / "bundle", params="{}")
    evaluate(
        **shared,
        bundle=tmp_path / "bundle",
        test_uses=tmp_path / "test_uses.jsonl",
        predictions=tmp_path / "predictions.parquet",
        metrics=tmp_path / "metrics.json",
        report=tmp_path / "report.html",
        params='{"split": "test"}',
    )
    frame, info = read_predictions(tmp_path / "predictions.parquet")
    assert frame["sample_id"].tolist() == ids[-NUM_SAMPLES // 4 :]
    assert info.bundle == Bundle(tmp_path / "bundle").digest
    sick = frame["label_nodule"] == 1
    record = json.loads((tmp_path / "metrics.json").read_text())
    assert record["metrics"]["auc"]["value"] >= 0.9
    assert record["metrics"]["auc"]["value"] == pytest.approx(roc_auc_score(sick, frame["prob_nodule"]))
    page = (tmp_path / "report.html").read_text()
    assert ("voxels" if kind == "volume" else "12 numbers for each instance") in page
