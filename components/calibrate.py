"""Make probabilities honest, choose the operating point and fit prediction sets, on the calibration split alone."""

from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from cadx import calibration, conformal, detection
from cadx.bundle import REFERENCE_DECIMALS, Bundle, OperatingPoint
from cadx.datasets import DatasetFolder, read_splits
from cadx.metrics import Scores, score
from cadx.predicting import Predictor, answer_table, decide, detection_table, image_answers
from cadx.types import Estimate, Task
from components.contract import In, Out, Params, step


class CalibrateParams(Params):
    """The clinical target, and how probabilities are made honest."""

    sensitivity: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="share of positives (of boxes: of lesions) that must be found, for each class that is called",
    )
    false_positives_per_image: float | None = Field(
        default=None,
        gt=0,
        description="of boxes: false alarms of a class that are allowed, instead of a sensitivity",
    )
    method: Literal["temperature", "isotonic"] = Field(
        default="temperature",
        description="isotonic puts a rising curve behind temperature and bias: for some hundred cases a class or more",
    )
    coverage: float | None = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="share of cases whose prediction set holds the truth; null for no sets",
    )


@step
def calibrate(*, dataset: In, splits: In, trained: In, bundle: Out, params: CalibrateParams) -> None:
    """Fit temperature and bias, and choose the operating point; write the final bundle.

    The threshold is the largest that reaches the declared sensitivity on the calibration split (of every
    class for multilabel). Multiclass calls the most probable class: there is no threshold to choose.

    Prediction sets are fitted on the same split: temperature, bias and isotonic curve keep the order of a binary task's
    answers, so that its sets are as if they had been fitted elsewhere; with more classes they nearly are.

    Of boxes, each class's score threshold is chosen for the sensitivity per lesion, or for the false positives per
    image that were declared; there is no temperature, and there are no prediction sets.

    The final bundle's answers on this split go into it, as the reference that `monitor` compares with.

    Raises:
        ValueError: if the calibration split lacks rows or a class, or the dataset has other classes.
    """
    folder = DatasetFolder(dataset)
    opened = Bundle(trained)
    manifest = opened.manifest
    task, classes, positive = manifest.task, manifest.classes, manifest.positive
    if folder.info.classes != classes:
        raise ValueError(
            f"{dataset}: classes {folder.info.classes}, but {trained} was trained on {classes}; train again"
        )
    assigned = read_splits(splits)
    sample_ids = assigned.loc[assigned["split"] == "calibration", "sample_id"].tolist()
    if task == "detection":
        _complete_boxes(opened, bundle, folder, sample_ids, splits, params)
        return
    labels = folder.labels(sample_ids).astype(np.float64)
    _require_every_class(labels, classes, task, splits)

    predictor = Predictor(opened, uncalibrated_ok=True)
    logits, features = predictor.logits(predictor.stored(folder, sample_ids))
    temperature, bias = calibration.fit_temperature_and_bias(logits, labels, task)
    probabilities = calibration.apply(logits, temperature, task, bias)
    isotonic = {}
    if params.method == "isotonic":
        isotonic = calibration.fit_isotonic(probabilities, labels, task, classes, positive)
        probabilities = calibration.apply_isotonic(probabilities, isotonic, task, classes)

    called = (
        [] if task == "multiclass" else [name for name in classes if task == "multilabel" or name == positive]
    )
    thresholds = {
        name: calibration.operating_threshold(
            probabilities[:, classes.index(name)],
            labels[:, classes.index(name)],
            sensitivity=params.sensitivity,
        )
        for name in called
    }
    calls = decide(probabilities, thresholds, task, classes, positive)
    samples = folder.samples.iloc[folder.rows(sample_ids)]
    patients = samples["patient"].to_numpy(object) if manifest.clustered else None
    scores = score(
        labels,
        probabilities,
        calls,
        task=task,
        classes=classes,
        positive=positive,
        patients=patients,
        resamples=0,
    )
    opened.complete(
        bundle,
        temperature=temperature,
        bias=bias.tolist(),
        isotonic=isotonic,
        prevalence={name: float(np.nanmean(labels[:, column])) for column, name in enumerate(classes)},
        operating_point=OperatingPoint(
            target_metric="sensitivity" if called else None,
            target_value=params.sensitivity if called else None,
            thresholds=thresholds,
            split="calibration",
            n=scores.n,
            achieved=_achieved(scores, called or list(classes)),
            resampled={
                name: tuple(
                    calibration.resampled_thresholds(
                        probabilities[:, classes.index(name)],
                        labels[:, classes.index(name)],
                        patients,
                        sensitivity=params.sensitivity,
                    )
                    .round(REFERENCE_DECIMALS)
                    .tolist()
                )
                for name in called
            },
        ),
        conformal=None
        if params.coverage is None
        else conformal.fit(probabilities, labels, task, classes, coverage=params.coverage, patients=patients),
        heldout=answer_table(probabilities, calls, task, classes).assign(
            site=samples["site"].to_numpy(object),
            scanner=samples["scanner"].to_numpy(object),
            embedding=list(features),
        ),
    )


def _complete_boxes(
    opened: Bundle,
    bundle: Path,
    folder: DatasetFolder,
    sample_ids: list[str],
    splits: Path,
    params: CalibrateParams,
) -> None:
    """Choose each class's score threshold; the scores themselves stay as they are."""
    manifest = opened.manifest
    lesions = folder.boxes[folder.boxes["sample_id"].isin(sample_ids)]
    if missing := [name for name in manifest.classes if name not in set(lesions["class"])]:
        raise ValueError(
            f"{splits}: no lesion of class {missing[0]!r} in the calibration split; "
            "give it a larger share in split.fractions, split again"
        )
    predictor = Predictor(opened, uncalibrated_ok=True)
    answers = predictor.detect(predictor.stored(folder, sample_ids))
    found = detection_table(dict(zip(sample_ids, answers, strict=True)), manifest.classes)
    thresholds = {
        name: detection.operating_point(
            found[found["class"] == name],
            lesions[lesions["class"] == name],
            sample_ids,
            classes=[name],
            sensitivity=params.sensitivity,
            false_positives_per_image=params.false_positives_per_image,
        ).threshold
        for name in manifest.classes
    }
    samples = folder.samples.iloc[folder.rows(sample_ids)]
    scores = detection.calculate_detection_metrics(
        found,
        lesions,
        sample_ids,
        classes=manifest.classes,
        patients=samples["patient"].to_numpy(object) if manifest.clustered else None,
        score_threshold=thresholds,
        seed=manifest.seed,
    )
    by_rate = params.false_positives_per_image is not None
    said = ("sensitivity", "precision", "false_positives_per_image")
    opened.complete(
        bundle,
        temperature=None,
        operating_point=OperatingPoint(
            target_metric="false_positives_per_image" if by_rate else "sensitivity",
            target_value=params.false_positives_per_image if by_rate else params.sensitivity,
            thresholds=thresholds,
            split="calibration",
            n=scores.n,
            achieved={
                name: {metric: estimates[metric] for metric in said}
                for name, estimates in scores.by_class.items()
            },
        ),
        heldout=image_answers(found, sample_ids, manifest.classes, thresholds).assign(
            site=samples["site"].to_numpy(object), scanner=samples["scanner"].to_numpy(object)
        ),
    )


def _require_every_class(labels: np.ndarray, classes: tuple[str, ...], task: Task, splits: Path) -> None:
    """Refuse a calibration split on which a temperature or a threshold would mean nothing."""
    if np.isnan(labels).all():
        raise ValueError(
            f"{splits}: no labelled sample in the calibration split; "
            "give it a share in split.fractions, split again"
        )
    for column, name in enumerate(classes):
        for value, word in ((1, "positive"), (0, "negative")) if task == "multilabel" else ((1, "sample"),):
            if not (labels[:, column] == value).any():
                raise ValueError(
                    f"{splits}: no {word} of class {name!r} in the calibration split; "
                    "give it a larger share in split.fractions, split again"
                )


def _achieved(scores: Scores, names: list[str]) -> dict[str, dict[str, Estimate]]:
    return {
        name: {metric: scores.by_class[name][metric] for metric in ("sensitivity", "specificity")}
        for name in names
    }
