"""One experiment on one page (`cadx show`), and every experiment in one table (`cadx results`).

Reads only what the steps left: the dataset, splits and bundles, and the reports' JSON and Parquet files.
"""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from rich.console import Console
from rich.table import Table

from cadx.bundle import Bundle
from cadx.catalog import load_catalog
from cadx.datasets import DatasetFolder, read_splits
from cadx.explaining import overlay, title
from cadx.files import digest_path
from cadx.gating import Decision, read_decisions
from cadx.metrics import METRICS, roc
from cadx.predicting import Predictor, read_predictions
from cadx.reporting import INK, PALETTE, Page, estimate_text, figure, panels
from cadx.types import Estimate, RawImage

_HEADLINES = ("auc", "sensitivity", "specificity", "ppv", "npv", "accuracy", "balanced_accuracy", "brier")
_NUM_PICTURES = 6
_LINE_PX = 2


def write_overview(experiment: str, work: Path, reports: Path) -> Path:
    """Write `index.html` into `reports`, print the results, and return the page's path.

    Args:
        experiment: its name.
        work: the experiment's folder of data sets and bundles.
        reports: the experiment's folder of reports.

    Raises:
        ValueError: if the experiment has not been run to its summary.
    """
    summary_file = reports / "metrics.json"
    if not summary_file.is_file() or not (work / "dataset").is_dir():
        raise ValueError(f"{summary_file}: not there; run `make reproduce EXPERIMENT={experiment}` first")
    summary = json.loads(summary_file.read_text(encoding="utf-8"))
    folder = DatasetFolder(work / "dataset")
    splits = read_splits(work / "splits.parquet")
    seeds: list[int] = summary["seeds"]

    page = Page(experiment, folder.info.source.title)
    page.links([
        ("validation", "validation.html"),
        ("imbalance", "imbalance.html"),
        *((f"seed {seed}", f"{seed}/report.html") for seed in seeds),
        ("all seeds", "report.html"),
    ])  # fmt: skip
    _answer(page, summary)
    _data(page, folder, splits, json.loads((reports / "validation.json").read_text(encoding="utf-8")))
    _imbalance(page, json.loads((reports / "imbalance.json").read_text(encoding="utf-8")))
    _training(page, work, seeds)
    _results(page, summary, reports, seeds)
    _cases(page, folder, work / str(seeds[0]) / "bundle", reports / str(seeds[0]) / "predictions.parquet")
    decisions = read_decisions(reports.name, reports.parent)
    _gate(page, decisions)
    _service(page, reports / "serving")
    _chain(page, folder, work, reports, seeds)
    target = reports / "index.html"
    page.write(target)

    _print(summary, decisions)
    print(f"open   {target}")
    print("next   cadx new FOLDER   for your own images, then make reproduce EXPERIMENT=...")
    return target


def results_markdown(catalog: Path, params: Path, reports: Path) -> str:
    """Every summarised experiment as Markdown: its metrics with intervals, and what others report beside it.

    Args:
        catalog: data/catalog.yaml.
        params: params.yaml, which names each experiment's source.
        reports: data/reports.
    """
    entries = load_catalog(catalog)
    experiments = yaml.safe_load(params.read_text(encoding="utf-8"))
    parts = [
        "# Results",
        "Written by `cadx results > docs/results.md` from `data/reports/*/metrics.json`. Intervals are 95 % ones over "
        "patients, of the mean over seeds.",
    ]
    for name, sections in experiments.items():
        file = reports / name / "metrics.json"
        if not file.is_file():
            continue
        summary = json.loads(file.read_text(encoding="utf-8"))
        entry = entries[sections["ingest"]["source"]]
        metrics = _estimates(summary)
        seeds = ", ".join(map(str, summary["seeds"]))
        parts.append(
            f"## {name}\n\n{entry.title}, {summary['split']} split: {summary['n']} images, seeds {seeds}. "
            f"Command: `make reproduce EXPERIMENT={name}`{_commit(file)}. {entry.note}".rstrip()
        )
        parts.extend(f"> {warning}" for warning in summary["warnings"])
        by_seed = summary["by_seed"]
        rows = [
            f"| {title(metric)} | {estimate_text(estimate)} | {_each(by_seed.get(metric, []))} | {estimate.method} |"
            for metric, estimate in metrics.items()
        ]
        parts.append(
            "\n".join(["| metric | value (95 % interval) | each seed | method |", "|---|---|---|---|", *rows])
        )
        if entry.published:
            compared = list(entry.published[0].metrics)
            ours = " | ".join(estimate_text(metrics[metric]) for metric in compared)
            others = [
                f"| {item.what} | {' | '.join(f'{item.metrics[m]:.3f}' for m in compared)} | {item.source} |"
                for item in entry.published
            ]
            header = f"| model | {' | '.join(map(title, compared))} | source |"
            rule = "|---" * (len(compared) + 2) + "|"
            parts.append("\n".join([header, rule, f"| **cadx** | {ours} | this repository |", *others]))
    return "\n\n".join(parts) + "\n"


def _commit(file: Path) -> str:
    """Where in history these numbers entered; nothing outside of a git checkout."""
    found = subprocess.run(
        ["git", "log", "-1", "--format=%h", "--", str(file)], capture_output=True, text=True, check=False
    )
    commit = found.stdout.strip()
    return f", numbers of commit {commit}" if found.returncode == 0 and commit else ""


def _each(values: Sequence[float | None]) -> str:
    return ", ".join("-" if value is None else f"{value:.3f}" for value in values)


def _answer(page: Page, summary: dict[str, Any]) -> None:
    metrics = _estimates(summary)
    page.facts([(title(name), metrics[name]) for name in _HEADLINES[:3] if name in metrics])
    page.text(
        f"Scored on the {summary['split']} split: {summary['n']} images of {summary['n_patients']} patients, "
        f"{len(summary['seeds'])} training seeds. Each number stands with its 95 % interval."
    )
    for warning in summary["warnings"]:
        page.callout("warn", warning)


def _data(page: Page, folder: DatasetFolder, splits: pd.DataFrame, validation: dict[str, Any]) -> None:
    info = folder.info
    page.section("Data")
    page.text(f"{info.source.title}. Licence: {info.source.licence}. {info.source.note}")
    page.images(
        list(_examples(folder, splits)), caption="Images of the training split, as stored; boxes where known."
    )
    merged = folder.samples.merge(splits, on="sample_id")
    counts = merged.groupby("split")[list(info.label_columns)].sum().astype(int)
    counts.insert(0, "images", merged.groupby("split").size())
    counts.insert(1, "patients", merged.groupby("split")["patient"].nunique())
    order = [name for name in ("train", "val", "calibration", "test", "excluded") if name in counts.index]
    page.table(
        counts.loc[order].rename(columns=lambda c: c.removeprefix("label_")).reset_index(),
        "What each split holds.",
    )
    failed = [rule for rule in validation["rules"] if not rule["passed"]]
    for rule in failed:
        page.callout("warn", f"{rule['message']} ({rule['severity']})")
    if not failed:
        page.callout("ok", f"All {len(validation['rules'])} rules of validation passed.")


def _imbalance(page: Page, imbalance: dict[str, Any]) -> None:
    page.section("Imbalance")
    page.text(imbalance["recommendation"]["reason"])


def _training(page: Page, work: Path, seeds: Sequence[int]) -> None:
    page.section("Training")
    drawing, (loss, monitor) = panels(7.2, 2.8, columns=2)
    for seed in seeds:
        history = pd.DataFrame(Bundle(work / str(seed) / "bundle").history())
        for member, epochs in history.groupby("member"):
            label = None if member else f"seed {seed}"
            (line,) = loss.plot(
                epochs["epoch"], epochs["train_loss"], label=label, color=PALETTE[seed % len(PALETTE)]
            )
            loss.plot(epochs["epoch"], epochs["val_loss"], color=line.get_color(), linestyle="--")
            if "val_auc" in epochs:
                monitor.plot(epochs["epoch"], epochs["val_auc"].astype(float), color=line.get_color())
    loss.set(xlabel="epoch", ylabel="loss (dashed: val)")
    monitor.set(xlabel="epoch", ylabel="AUC on val")
    loss.legend(frameon=False)
    page.figure(drawing, "Loss and validation AUC, epoch by epoch.")


def _results(page: Page, summary: dict[str, Any], reports: Path, seeds: Sequence[int]) -> None:
    page.section("Results")
    metrics = _estimates(summary)
    page.table(
        [
            {
                "metric": title(name),
                "value (95 % interval)": estimate,
                "n": estimate.n,
                "what it says": METRICS[name].meaning,
            }
            for name, estimate in metrics.items()
        ],
        "Mean over seeds; the interval is over patients.",
    )
    drawing, axes = figure(4.4, 3.8)
    for seed in seeds:
        frame, info = read_predictions(reports / str(seed) / "predictions.parquet")
        name = info.positive or info.classes[-1]
        curve = roc(frame[f"label_{name}"], frame[f"prob_{name}"])
        axes.plot(curve.false_positive_rate, curve.sensitivity, label=f"seed {seed}")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.set(xlabel="1 - specificity", ylabel="sensitivity")
    axes.legend(frameon=False, loc="lower right")
    page.figure(drawing, f"ROC curves for {name}.")


def _cases(page: Page, folder: DatasetFolder, bundle: Path, predictions: Path) -> None:
    frame, info = read_predictions(predictions)
    if info.task != "binary":
        return
    page.section("What it looks at")
    score, truth = frame[f"prob_{info.positive}"], frame[f"label_{info.positive}"] == 1
    called = frame["decision"] == info.positive
    groups = {
        # First the column, then the rows: pandas fills an empty frame with the rows of what it is assigned.
        "found": frame.assign(order=-score)[truth & called],
        "missed": frame.assign(order=score)[truth & ~called],
        "false alarm": frame.assign(order=-score)[~truth & called],
    }
    predictor = Predictor(bundle)
    for kind, group in groups.items():
        rows = group.sort_values(["order", "sample_id"]).head(_NUM_PICTURES)
        if rows.empty:
            continue
        images = [folder.pixels(sample_id) for sample_id in rows["sample_id"]]
        answers = predictor.predict_many([RawImage(pixels) for pixels in images], attention=True)
        pictures = [
            (
                overlay(pixels, answer.attention),
                f"{sample_id}: {answer.probabilities[str(info.positive)]:.2f}",
            )
            for sample_id, pixels, answer in zip(rows["sample_id"], images, answers, strict=True)
            if answer.attention is not None
        ]
        page.images(
            pictures,
            caption=f"{kind.capitalize()} by seed {info.seed}, with the attention that pools its features.",
        )


def _gate(page: Page, decisions: Sequence[Decision]) -> None:
    page.section("The gate")
    page.text(
        "Bounds are declared in params.yaml and held against the worse end of each interval: a model is let "
        "through by what it has shown, not by what it happened to score."
    )
    page.table(
        [
            {
                "experiment": decision.experiment,
                "seed": str(decision.seed),
                "decision": "promote" if decision.promote else "refuse",
                "why": "; ".join(decision.reasons) or f"all {len(decision.checks)} checks hold",
            }
            for decision in decisions
        ],
        empty="The gate has not been asked: run `cadx gate`.",
    )


def _service(page: Page, serving: Path) -> None:
    """What `cadx rehearse` left, where it has run."""
    record_file = serving / "rehearsal.json"
    if not record_file.is_file():
        return
    record = json.loads(record_file.read_text(encoding="utf-8"))
    page.section("In service")
    page.facts([
        ("requests answered", record["answered"]),
        ("median latency, ms", round(record["latency_ms"]["p50"])),
        ("largest difference from evaluation", f"{record['largest_difference']:.1e}"),
    ])  # fmt: skip
    page.text(
        f"Model {record['model']}, version {record['version']}, served by TorchServe on loopback. It became the "
        f"default version once {record['golden_samples']} golden samples had come back through the endpoint as "
        "they stand in the predictions file."
    )
    for refusal in record["refused"]:
        page.callout("stop", f"Not served: {refusal}")
    for watch in record["watches"]:
        page.callout("ok" if watch["drifted"] is False else "warn", f"{watch['what']}: {watch['said']}")
        page.links([(f"drift: {watch['what']}", f"serving/{watch['report']}")])


def _chain(page: Page, folder: DatasetFolder, work: Path, reports: Path, seeds: Sequence[int]) -> None:
    page.section("Chain of evidence")
    rows = [
        {"what": "source", "digest": folder.info.source.digest or "made here"},
        {"what": "dataset", "digest": digest_path(work / "dataset" / "dataset.json")},
        {"what": "splits", "digest": digest_path(work / "splits.parquet")},
    ]
    for seed in seeds:
        bundle = Bundle(work / str(seed) / "bundle")
        rows.append({"what": f"bundle, seed {seed}", "digest": bundle.digest})
        for what, file in (
            ("predictions", reports / str(seed) / "predictions.parquet"),
            ("decision", reports / str(seed) / "decision.json"),
            ("archive", work / str(seed) / "model.mar"),
        ):
            if file.is_file():
                rows.append({"what": f"{what}, seed {seed}", "digest": digest_path(file)})
    page.table(
        rows,
        "Each bundle's own file names the digests of dataset, splits, parameters and code that it was made from.",
    )
    uses = reports / "test_uses.jsonl"
    if uses.is_file():
        lines = [json.loads(line) for line in uses.read_text(encoding="utf-8").splitlines()]
        page.text(
            f"The test split has been scored {len(lines)} times, for {len({u['bundle'] for u in lines})} bundles."
        )


def _examples(folder: DatasetFolder, splits: pd.DataFrame) -> "Sequence[tuple[np.ndarray, str]]":
    train = folder.samples.merge(splits[splits["split"] == "train"], on="sample_id")
    pictures = []
    for name in folder.info.classes:
        rows = train[train[f"label_{name}"] == 1]
        # One site after the other, so that every scanner is seen.
        rows = rows.assign(turn=rows.groupby("site").cumcount()).sort_values(["turn", "site"], kind="stable")
        for sample_id, site in rows[["sample_id", "site"]].head(_NUM_PICTURES).to_numpy():
            pictures.append((_with_boxes(folder, sample_id), f"{name}, {site}" if site else name))
    return pictures


def _with_boxes(folder: DatasetFolder, sample_id: str) -> np.ndarray:
    pixels = folder.pixels(sample_id)
    boxes = folder.boxes[folder.boxes["sample_id"] == sample_id]
    if boxes.empty:
        return pixels
    gray = (pixels.astype(np.float64) / np.iinfo(pixels.dtype).max * 255).astype(np.uint8)
    shown = gray if gray.ndim == 3 else np.repeat(gray[..., None], 3, axis=2)
    for x0, y0, x1, y1 in boxes[["x0", "y0", "x1", "y1"]].to_numpy().astype(int):
        frame = np.zeros(shown.shape[:2], bool)
        frame[y0:y1, x0:x1] = True
        frame[y0 + _LINE_PX : y1 - _LINE_PX, x0 + _LINE_PX : x1 - _LINE_PX] = False
        shown[frame] = (255, 176, 0)
    return shown


def _estimates(summary: dict[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.model_validate(value) for name, value in summary["metrics"].items()}


def _print(summary: dict[str, Any], decisions: Sequence[Decision]) -> None:
    table = Table(
        "metric", "value (95 % interval)", "n",
        title=f"{summary['experiment']}, {summary['split']} split, {len(summary['seeds'])} seeds",
    )  # fmt: skip
    metrics = _estimates(summary)
    for name in _HEADLINES:
        if name in metrics:
            table.add_row(title(name), estimate_text(metrics[name]), str(metrics[name].n))
    Console().print(table)
    for decision in decisions:
        verdict = "promoted" if decision.promote else f"refused: {'; '.join(decision.reasons)}"
        print(f"gate   {decision.experiment}, seed {decision.seed}: {verdict}")
