"""Score a bundle on one split: predictions, metrics with intervals, and a report to read."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.bundle import Bundle, Manifest
from cadx.datasets import DatasetFolder, read_splits
from cadx.explaining import (
    draw_band,
    next_at,
    overlay,
    patient_band,
    roc_heights,
    show_subgroups,
    square,
    title,
)
from cadx.files import digest_path, write_json
from cadx.loading import input_text
from cadx.metrics import (
    METRICS,
    Scores,
    calibration_curve,
    precision_recall,
    roc,
    score,
    score_subgroups,
)
from cadx.predicting import (
    Arrays,
    PredictionsInfo,
    Predictor,
    answer_table,
    arrays,
    subgroups,
    write_predictions,
)
from cadx.reporting import INK, MUTED, PALETTE, Page, estimate_text, panels
from cadx.types import Digest, RawImage
from components.contract import In, Keep, Out, Params, step

Attribute = Literal["site", "sex", "age", "scanner"]

NUM_MISTAKES = 6
HEADLINES = {
    "binary": ("auc", "sensitivity", "specificity", "ppv", "npv", "calibration_slope"),
    "multiclass": ("auc", "accuracy", "balanced_accuracy", "f1", "brier", "calibration_slope"),
    "multilabel": ("auc", "average_precision", "sensitivity", "specificity", "f1", "calibration_slope"),
}


class EvaluateParams(Params):
    """What is scored, and how finely."""

    split: Literal["val", "calibration", "test"] = Field(
        default="val", description="test only once the recipe is frozen: each use of it is written down"
    )
    resamples: int = Field(default=1000, ge=0, description="bootstrap resamples of patients")
    subgroups: tuple[Attribute, ...] = ("site", "sex", "age", "scanner")
    minimum_n: int = Field(default=20, ge=1, description="patients that an estimate in a subgroup needs")


class Mistake(NamedTuple):
    """A wrong answer about one class."""

    sample_id: str
    name: str
    probability: float


@step
def evaluate(
    *,
    dataset: In,
    splits: In,
    bundle: In,
    test_uses: Keep,
    predictions: Out,
    metrics: Out,
    report: Out,
    params: EvaluateParams,
) -> None:
    """Score a bundle on a split; write predictions, metrics with intervals, and a report.

    Scoring the test split appends a line to `test_uses`, before any number of it can be seen.

    Raises:
        ValueError: if the split has no labelled sample, or the dataset has other classes than the bundle.
    """
    folder = DatasetFolder(dataset)
    predictor = Predictor(bundle)
    manifest = predictor.bundle.manifest
    if manifest.task == "detection":
        raise ValueError(
            f"{bundle}: answers with boxes, which this step cannot score yet; cadx.detection can"
        )
    if folder.info.classes != manifest.classes:
        raise ValueError(
            f"{dataset}: classes {folder.info.classes}, but {bundle} was trained on {manifest.classes}; "
            "train again"
        )
    assigned = read_splits(splits)
    sample_ids = assigned.loc[assigned["split"] == params.split, "sample_id"].tolist()
    if np.isnan(folder.labels(sample_ids)).all():
        raise ValueError(
            f"{splits}: no labelled sample in the {params.split} split; split again or choose another"
        )

    dataset_digest, splits_digest = digest_path(dataset / "dataset.json"), digest_path(splits)
    if params.split == "test":
        _record_test_use(test_uses, predictor.bundle, dataset_digest)
    info = PredictionsInfo(
        experiment=manifest.experiment,
        seed=manifest.seed,
        split=params.split,
        bundle=predictor.bundle.digest,
        task=manifest.task,
        classes=manifest.classes,
        positive=manifest.positive,
        clustered=folder.info.clustered,
        thresholds=predictor.thresholds,
        assumptions=tuple(dict.fromkeys((*manifest.assumptions, *folder.info.assumptions))),
    )
    frame = _predict(predictor, folder, sample_ids)
    write_predictions(predictions, frame, info)

    rows = arrays(frame, info)
    what: dict[str, Any] = {"task": info.task, "classes": info.classes, "positive": info.positive}
    scores = score(*rows[:3], **what, patients=rows.patients, resamples=params.resamples, seed=manifest.seed)
    by_subgroup = score_subgroups(
        *rows[:3],
        subgroups(frame, params.subgroups),
        **what,
        patients=rows.patients,
        minimum_n=params.minimum_n,
    )
    warnings = [
        *info.warnings,
        *_provenance_warnings(manifest, dataset_digest, splits_digest, params.split),
    ]
    record = {
        "schema": 1,
        "experiment": info.experiment,
        "seed": info.seed,
        "split": info.split,
        "bundle": info.bundle,
        "dataset": dataset_digest,
        "splits": splits_digest,
        "n": scores.n,
        "n_patients": scores.n_patients,
        "clustered": info.clustered,
        "warnings": warnings,
        "metrics": _dump(scores.metrics),
        "by_class": {name: _dump(values) for name, values in scores.by_class.items()},
        "by_subgroup": {attribute: _dump(groups) for attribute, groups in by_subgroup.items()},
        "confusion": scores.confusion.model_dump(mode="json"),
    }
    write_json(metrics, record)
    page = Page(
        f"{info.experiment}, seed {info.seed}: {info.split} split", f"{folder.info.source.title}; evaluation"
    )
    _answer(page, info, scores, warnings)
    _metrics(page, info, scores)
    _curves(page, info, rows)
    _calls(page, info, rows, scores)
    show_subgroups(page, by_subgroup, scores.metrics)
    _mistakes(page, info, rows, frame["sample_id"].tolist(), folder, predictor)
    _model(page, predictor.bundle, dataset_digest, splits_digest, folder)
    _assumptions(page, info)
    _test_uses(page, test_uses)
    page.write(report)


def _predict(predictor: Predictor, folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
    """The rows of the predictions file."""
    manifest = predictor.bundle.manifest
    probabilities = predictor.probabilities(predictor.stored(folder, sample_ids))
    answers = answer_table(probabilities, predictor.decide(probabilities), manifest.task, manifest.classes)
    columns = ["sample_id", "patient", "site", "scanner", "age", "sex", *folder.info.label_columns]
    frame = folder.samples.iloc[folder.rows(sample_ids)][columns].reset_index(drop=True)
    return pd.concat([frame, answers], axis=1)


def _record_test_use(path: Path, bundle: Bundle, dataset: Digest) -> None:
    line = json.dumps(
        {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "experiment": bundle.manifest.experiment,
            "seed": bundle.manifest.seed,
            "split": "test",
            "bundle": bundle.digest,
            "dataset": dataset,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        # One write: lines of seeds that are scored at the same time never mix.
        os.write(descriptor, (line + "\n").encode())
    finally:
        os.close(descriptor)


def _provenance_warnings(manifest: Manifest, dataset: Digest, splits: Digest, split: str) -> Iterator[str]:
    if manifest.provenance.dataset != dataset:
        yield "The bundle was trained on another dataset, or another version of this one."
    elif manifest.provenance.splits != splits:
        yield "The bundle was trained with other splits: samples scored here may have been trained on."
    if split == "calibration":
        yield "The operating point and the temperature were chosen on this very split: its numbers flatter."
    elif split == "val" and manifest.provenance.folds:
        yield (
            f"All of the {manifest.provenance.folds} networks but one were trained on each sample of this split: its"
            " numbers say nothing. The folds' own scores stand in training.jsonl; the test split is the judge."
        )
    elif split == "val":
        yield "Training stopped by this split: its numbers flatter a little; the test split is the judge."


def _dump(records: Mapping[str, Any]) -> dict[str, Any]:
    return {name: record.model_dump(mode="json") for name, record in records.items()}


def _of_interest(info: PredictionsInfo) -> list[str]:
    """The classes that curves are drawn of: the positive one, or all."""
    return [info.positive] if info.positive else list(info.classes)


def _answer(page: Page, info: PredictionsInfo, scores: Scores, warnings: Sequence[str]) -> None:
    page.facts([(title(name), scores.metrics[name]) for name in HEADLINES[info.task]])
    about = f"the class {info.positive!r}" if info.positive else "the mean over classes"
    patients = f" of {scores.n_patients:,} patients" if info.clustered else ""
    page.text(
        f"{scores.n:,} labelled images{patients} of the {info.split} split; the numbers speak of {about}. "
        "In brackets: 95 % confidence intervals."
    )
    for warning in warnings:
        page.callout("warn", warning)


def _metrics(page: Page, info: PredictionsInfo, scores: Scores) -> None:
    page.section("Metrics")
    page.table(
        [
            {
                "metric": title(name),
                "value (95 % interval)": estimate,
                "n": estimate.n,
                "how the interval was made": estimate.method,
            }
            for name, estimate in scores.metrics.items()
        ],
        "n counts the cases in the value's denominator.",
    )
    with page.details("What each metric is"):
        page.table([{"metric": title(name), "what it is": METRICS[name].meaning} for name in scores.metrics])
    if len(info.classes) > 2 or info.task == "multilabel":
        shown = ("auc", "sensitivity", "specificity")
        page.table(
            [
                {"class": name, **{title(m): estimates[m] for m in shown if m in estimates}}
                for name, estimates in scores.by_class.items()
            ],
            "Each class against the rest.",
        )


def _precision_heights(labels: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Precision at the recalls of `grid`; None where there is no positive."""
    curve = precision_recall(labels, scores)
    return next_at(curve.recall, curve.precision, grid) if len(curve.recall) else None


def _curves(page: Page, info: PredictionsInfo, rows: Arrays) -> None:
    page.section("Curves")
    drawing, (roc_axes, precision_axes, calibration_axes) = panels(8.6, 2.9, columns=3)
    for name in _of_interest(info):
        column = info.classes.index(name)
        known = ~np.isnan(rows.labels[:, column])
        labels, scores = rows.labels[known, column], rows.probabilities[known, column]
        patients = None if rows.patients is None else rows.patients[known]
        curve, precision = roc(labels, scores), precision_recall(labels, scores)
        if band := patient_band(roc_heights, labels, scores[None], patients, seed=info.seed):
            draw_band(roc_axes, band, name, drawn_as=(curve.false_positive_rate, curve.sensitivity))
        if band := patient_band(_precision_heights, labels, scores[None], patients, seed=info.seed):
            draw_band(precision_axes, band, name, drawn_as=(precision.recall, precision.precision))
        bins = calibration_curve(labels, scores)
        calibration_axes.errorbar(
            bins.probability,
            bins.observed,
            yerr=np.abs(np.stack([bins.low, bins.high]) - bins.observed),
            marker="o",
            markersize=4,
            linewidth=1.2,
            elinewidth=1,
            label=name,
        )
        called = rows.decisions[known, column]
        if info.task != "multiclass" and called.any() and 0 < labels.sum() < len(labels):
            sensitivity, fall_out = called[labels == 1].mean(), called[labels == 0].mean()
            roc_axes.plot(fall_out, sensitivity, "o", color=INK, markersize=5)
            precision_axes.plot(sensitivity, labels[called].mean(), "o", color=INK, markersize=5)
    for axes in (roc_axes, calibration_axes):
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=0.8, linestyle=(0, (4, 3)))
    square(roc_axes, "1 - specificity", "sensitivity")
    square(precision_axes, "recall (sensitivity)", "precision (PPV)")
    square(calibration_axes, "predicted probability", "observed share")
    for axes, heading in (
        (roc_axes, "ROC"),
        (precision_axes, "Precision-recall"),
        (calibration_axes, "Calibration"),
    ):
        axes.set_title(heading)
    if len(_of_interest(info)) > 1:
        roc_axes.legend(loc="lower right", fontsize=8)
    dot = "" if info.task == "multiclass" else "the black dot is the operating point; "
    page.figure(
        drawing,
        f"Bands: pointwise 95 % limits, bootstrap of {'patients' if info.clustered else 'images'}; {dot}"
        "calibration in ten bins with Wilson limits.",
        alt=f"ROC, precision-recall and calibration curves of {', '.join(_of_interest(info))}",
    )


def _calls(page: Page, info: PredictionsInfo, rows: Arrays, scores: Scores) -> None:
    page.section("Decisions")
    page.text(_rule(info))
    if info.task == "multilabel":
        page.table(
            [
                {
                    "class": name,
                    "threshold": info.thresholds[name],
                    "found": tp,
                    "missed": fn,
                    "false alarms": fp,
                    "rest": tn,
                }
                for name, ((tn, fp), (fn, tp)) in zip(
                    info.classes, scores.confusion.at_operating_point, strict=True
                )
            ],
            "Calls at the operating point.",
        )
        return
    if info.task == "multiclass":
        size = min(8.6, 2.2 + 0.8 * len(info.classes))
        drawing, (confusion_axes,) = panels(size, size - 0.8, columns=1)
    else:
        drawing, (confusion_axes, score_axes) = panels(8.6, 3.2, columns=2)
        _draw_scores(score_axes, info, rows)
    _draw_confusion(confusion_axes, np.array(scores.confusion.at_operating_point), info.classes)
    page.figure(
        drawing,
        "Counts, and shares of the true class."
        + (" Histogram: the dashed line is the threshold, calls lie to its right." if info.positive else ""),
        alt="Confusion matrix at the operating point"
        + (" and histogram of probabilities" if info.positive else ""),
    )


def _rule(info: PredictionsInfo) -> str:
    if info.task == "multiclass":
        return "The most probable class is called."
    rules = ", ".join(
        f"{name!r} is called at a probability of {value:.4f} or more"
        for name, value in info.thresholds.items()
    )
    return f"{rules[:1].upper()}{rules[1:]}. Chosen on the calibration split, and frozen in the bundle."


def _draw_confusion(axes: Any, matrix: np.ndarray, classes: Sequence[str]) -> None:
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), share in np.ndenumerate(shares):
        axes.text(
            column,
            row,
            f"{matrix[row, column]:,.0f}\n{share:.1%}",
            ha="center",
            va="center",
            color="white" if share > 0.6 else INK,
        )
    axes.set_xticks(range(len(classes)), classes)
    axes.set_yticks(range(len(classes)), classes, rotation=90, va="center")
    axes.set(title="Confusion matrix", xlabel="called", ylabel="truth")
    axes.tick_params(length=0)
    axes.grid(visible=False)


def _draw_scores(axes: Any, info: PredictionsInfo, rows: Arrays) -> None:
    assert info.positive is not None
    column = info.classes.index(info.positive)
    bins = np.linspace(0, 1, 41)
    for value, colour in ((0, PALETTE[0]), (1, PALETTE[1])):
        name = info.positive if value else next(c for c in info.classes if c != info.positive)
        chosen = rows.probabilities[rows.labels[:, column] == value, column]
        axes.hist(chosen, bins, color=colour, alpha=0.25)
        axes.hist(
            chosen, bins, color=colour, histtype="step", linewidth=1.4, label=f"{name} (n = {len(chosen):,})"
        )
    axes.axvline(info.thresholds[info.positive], color=INK, linewidth=1.2, linestyle=(0, (4, 3)))
    axes.set_yscale("symlog", linthresh=1)
    axes.set_ylim(0, None)
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(
        title="Scores", xlabel=f"probability of {info.positive}", ylabel="images (log scale)", xlim=(0, 1)
    )
    axes.legend(loc="upper center", fontsize=8)


def _mistakes(
    page: Page,
    info: PredictionsInfo,
    rows: Arrays,
    sample_ids: Sequence[str],
    folder: DatasetFolder,
    predictor: Predictor,
) -> None:
    page.section("Worst mistakes")
    with_attention = folder.info.kind == "image"
    page.text(
        "Each picture shows the "
        + (
            "image, and the same with the attention that the prediction pools by"
            if with_attention
            else "sample"
        )
        + "; below it stands the calibrated probability of the class."
    )
    for heading, mistakes in _mistakes_by_kind(info, rows, sample_ids).items():
        if not mistakes:
            page.callout("ok", f"{heading}: none.")
            continue
        shown = mistakes[:NUM_MISTAKES]
        pictures = [folder.preview(mistake.sample_id) for mistake in shown]
        if with_attention:
            pictures = _beside_their_attention(pictures, predictor)
        pairs = [
            (picture, f"{mistake.sample_id}: {mistake.name} {mistake.probability:.3f}")
            for mistake, picture in zip(shown, pictures, strict=True)
        ]
        rest = "" if len(shown) == len(mistakes) else f" of {len(mistakes)}"
        page.text(f"{heading}: {len(shown)}{rest}, the most confident first.")
        page.images(pairs, max_px=360)


def _beside_their_attention(pictures: list[np.ndarray], predictor: Predictor) -> list[np.ndarray]:
    answers = predictor.predict_many([RawImage(pixels) for pixels in pictures], attention=True)
    pairs = []
    for pixels, answer in zip(pictures, answers, strict=True):
        assert answer.attention is not None
        plain = overlay(pixels, np.zeros(pixels.shape[:2]))
        pairs.append(np.concatenate([plain, overlay(pixels, answer.attention)], axis=1))
    return pairs


def _mistakes_by_kind(
    info: PredictionsInfo, rows: Arrays, sample_ids: Sequence[str]
) -> dict[str, list[Mistake]]:
    """Misses and false alarms, the most confident first."""
    found: dict[str, list[Mistake]] = {"Missed": [], "False alarms": []}
    for name in _of_interest(info):
        column = info.classes.index(name)
        for heading, label in (("Missed", 1), ("False alarms", 0)):
            wrong = (rows.labels[:, column] == label) & (rows.decisions[:, column] != label)
            found[heading].extend(
                Mistake(sample_ids[i], name, float(rows.probabilities[i, column]))
                for i in np.flatnonzero(wrong).tolist()
            )
    found["Missed"].sort(key=lambda mistake: (mistake.probability, mistake.sample_id))
    found["False alarms"].sort(key=lambda mistake: (-mistake.probability, mistake.sample_id))
    return found


def _model(page: Page, bundle: Bundle, dataset: Digest, splits: Digest, folder: DatasetFolder) -> None:
    manifest, source = bundle.manifest, folder.info.source
    operating_point = manifest.operating_point
    assert operating_point is not None
    page.section("Model, operating point and data")
    settings = {k: v for k, v in manifest.model.model_dump(mode="json").items() if v is not None}
    averaged = ", averaged over training (EMA)" if manifest.weights[0].averaged else ""
    members = f"{len(manifest.weights)} networks" if len(manifest.weights) > 1 else "1 network"
    epochs = max(record["epoch"] for record in bundle.history())
    achieved = "; ".join(
        f"{name}: " + ", ".join(f"{metric} {estimate_text(e)}" for metric, e in metrics.items())
        for name, metrics in operating_point.achieved.items()
    )
    target = (
        f"{operating_point.target_metric} >= {operating_point.target_value:g}"
        if operating_point.target_value is not None
        else "none: the most probable class is called"
    )
    facts = {
        "model": ", ".join(f"{k} {v}" for k, v in settings.items()),
        "weights": f"{members}{averaged}, trained for {epochs} epochs, seed {manifest.seed}",
        "input": input_text(manifest.preprocessing),
        "temperature": f"{manifest.temperature:.4f}",
        "bias": ", ".join(
            f"{name} {value:+.3f}" for name, value in zip(manifest.classes, manifest.bias, strict=False)
        ),
        "declared target": target,
        "thresholds": ", ".join(f"{k} {v:.6f}" for k, v in operating_point.thresholds.items()) or "none",
        f"reached there (n = {operating_point.n:,})": achieved,
        "data": f"{source.title}; {folder.info.modality}; {source.licence}",
        "citation": source.citation,
        "note": source.note,
    }
    page.table([{"what": k, "value": v} for k, v in facts.items() if v], "What was scored.")
    chain = {
        "bundle": bundle.digest,
        "dataset scored": dataset,
        "splits scored": splits,
        "dataset trained on": manifest.provenance.dataset,
        "splits trained on": manifest.provenance.splits,
        "parameters": manifest.provenance.parameters,
        "code": manifest.provenance.code,
    }
    with page.details("Digests and versions"):
        page.table(
            [{"of": k, "SHA-256": v.removeprefix("sha256:")[:16]} for k, v in chain.items()],
            "The first 16 digits; bundle.json and metrics.json hold them whole.",
        )
        page.table([{"library": k, "version": v} for k, v in manifest.provenance.versions.items()])


def _assumptions(page: Page, info: PredictionsInfo) -> None:
    page.section("Assumptions")
    for assumption in info.assumptions or (
        "The source says all that was needed: nothing was taken as given.",
    ):
        page.text(assumption)


def _test_uses(page: Page, path: Path) -> None:
    page.section("Uses of the test split")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    page.text(
        "Each scoring of the test split is written down. The more often it has been looked at, the less its "
        "numbers say about new patients."
    )
    uses = [json.loads(line) for line in lines]
    page.table(
        [
            {
                "time (UTC)": use["time"],
                "seed": str(use["seed"]),
                "bundle": use["bundle"][7:19],
                "dataset": use["dataset"][7:19],
            }
            for use in uses
        ],
        empty="The test split has never been scored.",
    )
