"""Metrics of boxes at the size of COCO's validation set: speed against pycocotools, equality, and intervals."""

import contextlib
import io
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from benchmarks._claim import claim
from cadx.detection import AREAS_PX2, calculate_detection_metrics, calculate_map

RESAMPLES = 1000
_IMAGES, _DETECTIONS, _LESIONS, _CLASSES = 5_000, 100, 7, 5
_SECONDS_WITH_INTERVALS = 30.0


def claims() -> Iterator[dict[str, Any]]:
    """5,000 images with 100 detections each, of 5 classes, in one process; times are processor times.

    About every fourth detection overlaps a lesion; the others lie anywhere. Both arms start from what each takes:
    tables here, lists of records there.
    """
    found, truth = _cohort()
    images = [str(number) for number in range(_IMAGES)]
    classes = [f"c{number}" for number in range(_CLASSES)]
    start = time.process_time()
    values = calculate_map(found, truth, images, classes=classes)[""]
    ours = time.process_time() - start
    peer, expected = _pycocotools(found, truth)
    yield claim(
        "detection.average_precision",
        ours,
        peer,
        "processor s (peer: pycocotools)",
        ratio=peer / ours,
        goal=4.0,
    )
    gap = max(abs(value - expected[name]) for name, value in values.items() if value is not None)
    unit = "largest difference from pycocotools (peer: 6 digits)"
    yield claim("detection.equality", gap, 1e-6, unit, ratio=1e-6 / max(gap, 1e-12))
    start = time.process_time()
    calculate_detection_metrics(found, truth, images, classes=classes, resamples=RESAMPLES)
    seconds = time.process_time() - start
    yield claim(
        "detection.intervals",
        seconds,
        _SECONDS_WITH_INTERVALS,
        f"processor s for all metrics with {RESAMPLES:,} resamples (peer: the limit)",
        ratio=_SECONDS_WITH_INTERVALS / seconds,
    )


def _cohort() -> tuple[pd.DataFrame, pd.DataFrame]:
    rng = np.random.default_rng(0)
    image = np.repeat(np.arange(_IMAGES), _LESIONS)
    sides = np.exp(rng.uniform(np.log(8), np.log(200), (len(image), 2)))
    corner = rng.uniform(0, 400, sides.shape)
    truth = pd.DataFrame(np.hstack([corner, corner + sides]), columns=["x0", "y0", "x1", "y1"])
    truth.insert(0, "sample_id", image.astype(str))
    truth.insert(1, "class", [f"c{number}" for number in rng.integers(_CLASSES, size=len(image))])
    # Of each image's detections the first 25 are copies of its lesions, moved by up to a third of their sides.
    near = (np.arange(_IMAGES)[:, None] * _LESIONS + rng.integers(_LESIONS, size=(_IMAGES, 25))).ravel()
    moved = truth.iloc[near].reset_index(drop=True)
    spread = rng.uniform(0, 0.33, (len(near), 1)) * rng.normal(size=(len(near), 4))
    moved[["x0", "y0", "x1", "y1"]] += spread * np.tile(sides[near], 2)
    moved = moved[(moved["x1"] > moved["x0"] + 1) & (moved["y1"] > moved["y0"] + 1)]
    moved["score"] = rng.beta(3, 2, len(moved))
    image = np.repeat(np.arange(_IMAGES), _DETECTIONS - 25)
    sides = np.exp(rng.uniform(np.log(8), np.log(200), (len(image), 2)))
    corner = rng.uniform(0, 400, sides.shape)
    rest = pd.DataFrame(np.hstack([corner, corner + sides]), columns=["x0", "y0", "x1", "y1"])
    rest.insert(0, "sample_id", image.astype(str))
    rest.insert(1, "class", [f"c{number}" for number in rng.integers(_CLASSES, size=len(image))])
    rest["score"] = rng.beta(2, 4, len(rest))
    return pd.concat([moved, rest], ignore_index=True), truth


def _pycocotools(found: pd.DataFrame, truth: pd.DataFrame) -> tuple[float, dict[str, float]]:
    """Seconds, and the metrics of `calculate_map` over all classes."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
        sides = frame[["x1", "y1"]].to_numpy() - frame[["x0", "y0"]].to_numpy()
        boxes = np.hstack([frame[["x0", "y0"]].to_numpy(), sides]).tolist()
        scores = frame["score"].tolist() if "score" in frame else [1.0] * len(frame)
        return [
            {
                "id": number,
                "image_id": int(image),
                "category_id": int(name[1:]),
                "bbox": box,
                "area": box[2] * box[3],
                "iscrowd": 0,
                "score": score,
            }
            for number, (image, name, box, score) in enumerate(
                zip(frame["sample_id"].tolist(), frame["class"].tolist(), boxes, scores, strict=True), 1
            )
        ]

    dataset = {
        "info": {},
        "images": [{"id": number} for number in range(_IMAGES)],
        "categories": [{"id": number} for number in range(_CLASSES)],
        "annotations": records(truth),
    }
    answers = records(found)
    with contextlib.redirect_stdout(io.StringIO()):
        start = time.process_time()
        reference = COCO()
        reference.dataset = dataset
        reference.createIndex()
        evaluation = COCOeval(reference, reference.loadRes(answers), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        seconds = time.process_time() - start
    names = ("ap", "ap50", "ap75", *(f"ap_{name}" for name in AREAS_PX2 if name != "all"))
    values = dict(zip(names, evaluation.stats[:6].tolist(), strict=True)) | {"ar": float(evaluation.stats[8])}
    return seconds, values
