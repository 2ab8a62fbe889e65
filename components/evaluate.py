"""Score a bundle on one split: predictions, metrics with intervals, and a report to read."""

import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.bundle import Bundle, Manifest
from cadx.datasets import DatasetFolder, read_splits
from cadx.evaluating import (
    Aggregation,
    Attribute,
    Settings,
    described,
    evaluation_of,
    judged_on,
    show_assumptions,
    show_glossary,
)
from cadx.files import digest_path, write_json
from cadx.loading import input_text
from cadx.predicting.table import PredictionsInfo, write_predictions
from cadx.reporting import Page, estimate_text
from cadx.types import Digest, Judged
from components.contract import In, Keep, Out, Params, step


class EvaluateParams(Params):
    """What is scored, and how finely."""

    split: Judged = Field(
        default="val",
        description="test only once the recipe is frozen: each use of it is written down; folds: of a"
        " cross-validation, each sample by the network that did not see it",
    )
    resamples: int = Field(default=1000, ge=0, description="bootstrap resamples of patients")
    subgroups: tuple[Attribute, ...] = ("site", "sex", "age", "scanner")
    minimum_n: int = Field(default=20, ge=1, description="patients that an estimate in a subgroup needs")
    aggregate: Aggregation = Field(
        default="none",
        description="score images (none), or patients by the highest (max) or mean probability over their images",
    )


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
        ValueError: if the split has no labelled sample, the dataset has other classes than the bundle, images
            cannot be aggregated like this, or `test_uses` is another file.
    """
    _read_test_uses(test_uses)
    folder = DatasetFolder(dataset)
    opened = Bundle(bundle)
    manifest = opened.manifest
    if folder.info.classes != manifest.classes:
        raise ValueError(
            f"{dataset}: classes {folder.info.classes}, but {bundle} was trained on {manifest.classes}; "
            "train again"
        )
    from cadx.predicting.folds import out_of_fold  # torch takes seconds: bad input is refused before
    from cadx.predicting.predictor import Predictor

    predictor = Predictor(opened)
    if params.split == "folds":
        answering = list(out_of_fold(predictor, folder, splits))
    else:
        assigned = read_splits(splits)
        answering = [(predictor, assigned.loc[assigned["split"] == params.split, "sample_id"].tolist())]
    sample_ids = [name for _, names in answering for name in names]
    # Boxes are the labels of a detection task, and an image without any is one without lesions.
    is_labelled = manifest.task == "detection" or not np.isnan(folder.labels(sample_ids)).all()
    if not (sample_ids and is_labelled):
        raise ValueError(
            f"{splits}: no labelled sample in the {params.split} split; split again or choose another"
        )

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
        resampled_thresholds=manifest.operating_point.resampled if manifest.operating_point else {},
        conformal=manifest.conformal,
        assumptions=tuple(dict.fromkeys((*manifest.assumptions, *folder.info.assumptions))),
        aggregate=params.aggregate,
    )
    settings = Settings(
        resamples=params.resamples,
        subgroups=params.subgroups,
        minimum_n=params.minimum_n,
        aggregate=params.aggregate,
    )
    kind = evaluation_of(manifest.task)
    kind.check(described(folder, sample_ids), info, settings)
    dataset_digest, splits_digest = digest_path(dataset / "dataset.json"), digest_path(splits)
    if params.split == "test":
        _record_test_use(test_uses, predictor.bundle, dataset_digest)
    frame = pd.concat([kind.predict(one, folder, names) for one, names in answering], ignore_index=True)
    write_predictions(predictions, frame, info)

    scored = kind(frame, info, settings)
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
        "predictions": digest_path(predictions),
        "n": scored.n,
        "n_patients": scored.n_patients,
        "clustered": info.clustered,
        "warnings": warnings,
        **scored.record(),
    }
    write_json(metrics, record)
    page = Page(
        f"{info.experiment}, seed {info.seed}, on {judged_on(info.split)}",
        f"{folder.info.source.title}; evaluation",
    )
    scored.show_answer(page)
    for warning in warnings:
        page.callout("warn", warning)
    scored.show_numbers(page)
    scored.show_mistakes(page, folder)
    scored.show_explanations(page, folder, predictor)
    _model(page, predictor.bundle, dataset_digest, splits_digest, folder)
    show_assumptions(page, info)
    _test_uses(page, test_uses)
    show_glossary(page)
    page.write(report)


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


def _read_test_uses(path: Path) -> list[dict[str, str]]:
    """A row for each scoring of the test split so far; a line is appended, so any other file would be spoilt."""
    try:
        uses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return [
            {
                "time (UTC)": use["time"][:19].replace("T", " "),
                "seed": str(use["seed"]),
                "bundle": use["bundle"][7:19],
                "dataset": use["dataset"][7:19],
            }
            for use in uses
        ]
    except FileNotFoundError:
        return []
    except (IsADirectoryError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"--test-uses {path}: holds other things than uses of the test split; name another file"
        ) from None


def _provenance_warnings(manifest: Manifest, dataset: Digest, splits: Digest, split: str) -> Iterator[str]:
    if manifest.provenance.dataset != dataset:
        yield "The bundle was trained on another dataset, or another version of this one."
    elif manifest.provenance.splits != splits:
        yield "The bundle was trained with other splits: samples scored here may have been trained on."
    if split == "folds":
        yield (
            f"Each sample was answered by the one in {manifest.provenance.folds} networks that did not see it; the"
            " bundle answers with the mean of all, which nothing here judges. The folds' intervals treat their networks"
            " as one."
        )
    elif split == "calibration":
        yield "The operating point and the temperature were chosen on this very split: its numbers flatter."
    elif split == "val" and manifest.provenance.folds:
        yield (
            f"All networks but one in {manifest.provenance.folds} were trained on each sample of this split: its"
            " numbers say nothing. The folds' own scores stand in training.jsonl; the test split is the judge."
        )
    elif split == "val":
        yield "Training stopped by this split: its numbers flatter a little; the test split is the judge."


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
        f"{operating_point.target_metric} "
        f"{'<=' if operating_point.target_metric == 'false_positives_per_image' else '>='} "
        f"{operating_point.target_value:g}"
        if operating_point.target_value is not None
        else "none: the most probable class is called"
    )
    facts = {
        "model": ", ".join(f"{k} {v}" for k, v in settings.items()),
        "weights": f"{members}{averaged}, trained for {epochs} epochs, seed {manifest.seed}",
        "input": input_text(manifest.preprocessing),
        "temperature": "" if manifest.temperature is None else f"{manifest.temperature:.4f}",
        "bias": ", ".join(
            f"{name} {value:+.3f}" for name, value in zip(manifest.classes, manifest.bias, strict=False)
        ),
        "declared target": target,
        "thresholds": ", ".join(f"{k} {v:.6f}" for k, v in operating_point.thresholds.items()) or "none",
        f"reached on the calibration split (n = {operating_point.n:,})": achieved,
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


def _test_uses(page: Page, path: Path) -> None:
    page.section("Uses of the test split")
    page.text(
        "Each scoring of the test split is written down. The more often it has been looked at, the less its "
        "numbers say about new patients."
    )
    page.table(
        _read_test_uses(path),
        empty="The test split has never been scored.",
    )
