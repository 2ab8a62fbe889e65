"""Make probabilities honest, choose the operating point and fit prediction sets, on the calibration split alone."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from cadx import calibration, conformal, detection
from cadx.bundle import REFERENCE_DECIMALS, Bundle, Manifest, OperatingPoint
from cadx.datasets import DatasetFolder, read_splits
from cadx.metrics import score
from cadx.predicting.table import answer_table, decide, detection_table, image_answers
from cadx.types import Estimate, Task
from components.contract import In, Out, Params, step

if TYPE_CHECKING:
    from cadx.predicting.predictor import Predictor

    Answering = list[tuple[Predictor, list[str]]]


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
    threshold: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="declared probability, instead of one that reaches a sensitivity",
    )
    split: Literal["calibration", "folds"] = Field(
        default="calibration",
        description="folds: what each network of a cross-validation says of the fold that it did not see",
    )
    method: Literal["temperature", "isotonic", "none"] = Field(
        default="temperature",
        description="isotonic puts a rising curve behind temperature and bias: for some hundred cases a class or more;"
        " none leaves probabilities as the networks give them",
    )
    coverage: float = Field(
        default=0.9,
        ge=0,
        lt=1,
        description="share of cases whose prediction set holds the truth; 0 for no sets",
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

    On `folds`, the answers are those of one fold's networks, and the bundle serves the mean of all.

    Raises:
        ValueError: if the calibration split lacks rows or a class, the dataset has other classes, a threshold is
            declared that the task has no use for, or there are no folds.
    """
    folder = DatasetFolder(dataset)
    opened = Bundle(trained)
    manifest = opened.manifest
    task, classes, positive = manifest.task, manifest.classes, manifest.positive
    if folder.info.classes != classes:
        raise ValueError(
            f"{dataset}: classes {folder.info.classes}, but {trained} was trained on {classes}; train again"
        )
    if task == "multiclass" and params.threshold is not None:
        raise ValueError(
            f"calibrate.threshold {params.threshold:g}: of several classes the most probable is called; leave it out"
        )
    from cadx.predicting.predictor import Predictor  # torch takes seconds: bad input is refused before

    predictor = Predictor(opened, uncalibrated_ok=True)
    answering = _answering(predictor, folder, splits, params.split)
    sample_ids = [name for _, names in answering for name in names]
    samples = folder.samples.iloc[folder.rows(sample_ids)]
    patients = samples["patient"].to_numpy(object) if manifest.clustered else None
    origin = {name: samples[name].to_numpy(object) for name in ("site", "scanner")}
    if task == "detection":
        found, lesions = _found_boxes(answering, folder, classes, splits)
        point = _box_operating_point(found, lesions, sample_ids, patients, manifest, params)
        heldout = image_answers(found, sample_ids, classes, point.thresholds).assign(**origin)
        opened.complete(bundle, temperature=None, operating_point=point, heldout=heldout)
        return

    labels = folder.labels(sample_ids).astype(np.float64)
    _require_every_class(labels, classes, task, splits)
    logits, features = _answers(predictor, answering, folder)
    temperature, bias, isotonic = 1.0, np.zeros(len(classes)), {}
    if params.method != "none":
        temperature, bias = calibration.fit_temperature_and_bias(logits, labels, task)
    probabilities = calibration.apply(logits, temperature, task, bias)
    if params.method == "isotonic":
        isotonic = calibration.fit_isotonic(probabilities, labels, task, classes, positive)
        probabilities = calibration.apply_isotonic(probabilities, isotonic, task, classes)

    point = _operating_point(probabilities, labels, patients, manifest, params)
    calls = decide(probabilities, point.thresholds, task, classes, positive)
    opened.complete(
        bundle,
        temperature=temperature,
        bias=bias.tolist(),
        isotonic=isotonic,
        prevalence={name: float(np.nanmean(labels[:, column])) for column, name in enumerate(classes)},
        operating_point=point,
        conformal=None
        if not params.coverage
        else conformal.fit(probabilities, labels, task, classes, coverage=params.coverage, patients=patients),
        heldout=answer_table(probabilities, calls, task, classes).assign(**origin, embedding=list(features)),
    )


def _answering(
    predictor: "Predictor", folder: DatasetFolder, splits: Path, split: Literal["calibration", "folds"]
) -> "Answering":
    """Who answers for which samples: all networks for the calibration split, or each fold's for those unseen."""
    if split == "folds":
        from cadx.predicting.folds import out_of_fold

        return list(out_of_fold(predictor, folder, splits))
    assigned = read_splits(splits)
    return [(predictor, assigned.loc[assigned["split"] == "calibration", "sample_id"].tolist())]


def _answers(
    predictor: "Predictor", answering: "Answering", folder: DatasetFolder
) -> tuple[np.ndarray, np.ndarray]:
    """N K logits of those that answer, and N F features as the bundle will serve them."""
    said = [one.logits(one.stored(folder, names)) for one, names in answering]
    logits, features = (np.concatenate(parts) for parts in zip(*said, strict=True))
    if len(answering) > 1:  # what is served has the features of all networks side by side
        sample_ids = [name for _, names in answering for name in names]
        _, features = predictor.logits(predictor.stored(folder, sample_ids))
    return logits, features


def _operating_point(
    probabilities: np.ndarray,
    labels: np.ndarray,
    patients: np.ndarray | None,
    manifest: Manifest,
    params: CalibrateParams,
) -> OperatingPoint:
    """The probability from which each class is called, declared or chosen, and what it reached on these samples."""
    task, classes, positive = manifest.task, manifest.classes, manifest.positive
    called = [name for name in classes if task == "multilabel" or (task == "binary" and name == positive)]
    chosen = called if params.threshold is None else []
    of = {name: (probabilities[:, column], labels[:, column]) for column, name in enumerate(classes)}
    thresholds = {} if params.threshold is None else dict.fromkeys(called, params.threshold)
    resampled = {}
    for name in chosen:
        thresholds[name] = calibration.operating_threshold(*of[name], sensitivity=params.sensitivity)
        again = calibration.resampled_thresholds(*of[name], patients, sensitivity=params.sensitivity)
        resampled[name] = tuple(again.round(REFERENCE_DECIMALS).tolist())
    scores = score(
        labels,
        probabilities,
        decide(probabilities, thresholds, task, classes, positive),
        task=task,
        classes=classes,
        positive=positive,
        patients=patients,
        resamples=0,
    )
    return OperatingPoint(
        target_metric="sensitivity" if chosen else None,
        target_value=params.sensitivity if chosen else None,
        thresholds=thresholds,
        split=params.split,
        n=scores.n,
        achieved=_achieved(scores.by_class, called or list(classes), ("sensitivity", "specificity")),
        resampled=resampled,
    )


def _found_boxes(
    answering: "Answering", folder: DatasetFolder, classes: tuple[str, ...], splits: Path
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What is found in these samples, and their lesions: both tables of boxes."""
    sample_ids = [name for _, names in answering for name in names]
    lesions = folder.boxes[folder.boxes["sample_id"].isin(sample_ids)]
    if missing := [name for name in classes if name not in set(lesions["class"])]:
        raise ValueError(
            f"{splits}: no lesion of class {missing[0]!r} in the calibration split; "
            "give it a larger share in split.fractions, split again"
        )
    answers = (answer for one, names in answering for answer in one.detect(one.stored(folder, names)))
    return detection_table(dict(zip(sample_ids, answers, strict=True)), classes), lesions


def _box_operating_point(
    found: pd.DataFrame,
    lesions: pd.DataFrame,
    sample_ids: list[str],
    patients: np.ndarray | None,
    manifest: Manifest,
    params: CalibrateParams,
) -> OperatingPoint:
    """The score from which each class's boxes count, declared or chosen, and what it reached on these samples."""
    target: dict[str, Any] = {}
    if params.threshold is not None:
        thresholds = dict.fromkeys(manifest.classes, params.threshold)
    else:
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
        by = "sensitivity" if params.false_positives_per_image is None else "false_positives_per_image"
        target = {"target_metric": by, "target_value": getattr(params, by)}
    scores = detection.calculate_detection_metrics(
        found,
        lesions,
        sample_ids,
        classes=manifest.classes,
        patients=patients,
        score_threshold=thresholds,
        seed=manifest.seed,
    )
    return OperatingPoint(
        **target,
        thresholds=thresholds,
        split=params.split,
        n=scores.n,
        achieved=_achieved(
            scores.by_class, manifest.classes, ("sensitivity", "precision", "false_positives_per_image")
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


def _achieved(
    by_class: Mapping[str, Mapping[str, Estimate]], names: Sequence[str], metrics: Sequence[str]
) -> dict[str, dict[str, Estimate]]:
    return {name: {metric: by_class[name][metric] for metric in metrics} for name in names}
