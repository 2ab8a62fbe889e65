"""Make probabilities honest, choose the operating point and fit prediction sets, on the calibration split alone."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field

from cadx import calibration, conformal, detection
from cadx.bundle import REFERENCE_DECIMALS, Bundle, OperatingPoint
from cadx.datasets import DatasetFolder, read_splits
from cadx.metrics import Scores, score
from cadx.predicting.table import answer_table, decide, detection_table, image_answers
from cadx.types import Estimate, Task
from components.contract import In, Out, Params, step

if TYPE_CHECKING:
    from cadx.predicting.predictor import Predictor


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
    from cadx.predicting.folds import out_of_fold  # torch takes seconds: bad input is refused before
    from cadx.predicting.predictor import Predictor

    predictor = Predictor(opened, uncalibrated_ok=True)
    if params.split == "folds":
        answering = list(out_of_fold(predictor, folder, splits))
    else:
        assigned = read_splits(splits)
        answering = [(predictor, assigned.loc[assigned["split"] == "calibration", "sample_id"].tolist())]
    sample_ids = [name for _, names in answering for name in names]
    if task == "detection":
        _complete_boxes(opened, bundle, folder, answering, splits, params)
        return
    labels = folder.labels(sample_ids).astype(np.float64)
    _require_every_class(labels, classes, task, splits)

    said = [one.logits(one.stored(folder, names)) for one, names in answering]
    logits = np.concatenate([part for part, _ in said])
    features = np.concatenate([part for _, part in said])
    if len(answering) > 1:  # what is served has the features of all networks side by side
        _, features = predictor.logits(predictor.stored(folder, sample_ids))
    temperature, bias = 1.0, np.zeros(len(classes))
    if params.method != "none":
        temperature, bias = calibration.fit_temperature_and_bias(logits, labels, task)
    probabilities = calibration.apply(logits, temperature, task, bias)
    isotonic = {}
    if params.method == "isotonic":
        isotonic = calibration.fit_isotonic(probabilities, labels, task, classes, positive)
        probabilities = calibration.apply_isotonic(probabilities, isotonic, task, classes)

    called = (
        [] if task == "multiclass" else [name for name in classes if task == "multilabel" or name == positive]
    )
    chosen = called if params.threshold is None else []
    thresholds = dict.fromkeys(called, params.threshold or 0.0) | {
        name: calibration.operating_threshold(
            probabilities[:, classes.index(name)],
            labels[:, classes.index(name)],
            sensitivity=params.sensitivity,
        )
        for name in chosen
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
            target_metric="sensitivity" if chosen else None,
            target_value=params.sensitivity if chosen else None,
            thresholds=thresholds,
            split=params.split,
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
                for name in chosen
            },
        ),
        conformal=None
        if not params.coverage
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
    answering: "list[tuple[Predictor, list[str]]]",
    splits: Path,
    params: CalibrateParams,
) -> None:
    """Choose each class's score threshold; the scores themselves stay as they are."""
    manifest = opened.manifest
    sample_ids = [name for _, names in answering for name in names]
    lesions = folder.boxes[folder.boxes["sample_id"].isin(sample_ids)]
    if missing := [name for name in manifest.classes if name not in set(lesions["class"])]:
        raise ValueError(
            f"{splits}: no lesion of class {missing[0]!r} in the calibration split; "
            "give it a larger share in split.fractions, split again"
        )
    answers = (answer for one, names in answering for answer in one.detect(one.stored(folder, names)))
    found = detection_table(dict(zip(sample_ids, answers, strict=True)), manifest.classes)
    declared = params.threshold
    thresholds = {
        name: declared
        if declared is not None
        else detection.operating_point(
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
    target: dict[str, Any] = {}
    if declared is None and params.false_positives_per_image is not None:
        target = {
            "target_metric": "false_positives_per_image",
            "target_value": params.false_positives_per_image,
        }
    elif declared is None:
        target = {"target_metric": "sensitivity", "target_value": params.sensitivity}
    said = ("sensitivity", "precision", "false_positives_per_image")
    opened.complete(
        bundle,
        temperature=None,
        operating_point=OperatingPoint(
            **target,
            thresholds=thresholds,
            split=params.split,
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
