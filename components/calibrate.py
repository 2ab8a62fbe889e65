"""Make probabilities honest and choose the operating point, on the calibration split alone."""

from pathlib import Path

import numpy as np
from pydantic import Field

from cadx import calibration
from cadx.bundle import Bundle, OperatingPoint
from cadx.datasets import DatasetFolder, read_splits
from cadx.metrics import Scores, score
from cadx.predicting import Predictor, answer_table, decide
from cadx.types import Estimate, Task
from components.contract import In, Out, Params, step


class CalibrateParams(Params):
    """The clinical target."""

    sensitivity: float = Field(
        default=0.95,
        gt=0,
        le=1,
        description="share of positives that must be found, for each class that is called",
    )


@step
def calibrate(*, dataset: In, splits: In, trained: In, bundle: Out, params: CalibrateParams) -> None:
    """Fit temperature and bias, and choose the operating point; write the final bundle.

    The threshold is the largest that reaches the declared sensitivity on the calibration split (of every
    class for multilabel). Multiclass calls the most probable class: there is no threshold to choose.

    The final bundle's answers on this split go into it, as the reference that `monitor` compares with.

    Raises:
        ValueError: if the calibration split lacks rows or a class, or the dataset has other classes.
    """
    folder = DatasetFolder(dataset)
    opened = Bundle(trained)
    manifest = opened.manifest
    task, classes, positive = manifest.task, manifest.classes, manifest.positive
    if task == "detection":
        raise ValueError(f"{trained}: answers with boxes; there is nothing to calibrate, use it as it is")
    if folder.info.classes != classes:
        raise ValueError(
            f"{dataset}: classes {folder.info.classes}, but {trained} was trained on {classes}; train again"
        )
    assigned = read_splits(splits)
    sample_ids = assigned.loc[assigned["split"] == "calibration", "sample_id"].tolist()
    labels = folder.labels(sample_ids).astype(np.float64)
    _require_every_class(labels, classes, task, splits)

    predictor = Predictor(opened, uncalibrated_ok=True)
    logits, features = predictor.logits(predictor.stored(folder, sample_ids))
    temperature, bias = calibration.fit_temperature_and_bias(logits, labels, task)
    probabilities = calibration.apply(logits, temperature, task, bias)

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
    scores = score(
        labels,
        probabilities,
        calls,
        task=task,
        classes=classes,
        positive=positive,
        patients=samples["patient"].to_numpy(object) if manifest.clustered else None,
        resamples=0,
    )
    opened.complete(
        bundle,
        temperature=temperature,
        bias=bias.tolist(),
        operating_point=OperatingPoint(
            target_metric="sensitivity" if called else None,
            target_value=params.sensitivity if called else None,
            thresholds=thresholds,
            split="calibration",
            n=scores.n,
            achieved=_achieved(scores, called or list(classes)),
        ),
        heldout=answer_table(probabilities, calls, task, classes).assign(
            site=samples["site"].to_numpy(object),
            scanner=samples["scanner"].to_numpy(object),
            embedding=list(features),
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
