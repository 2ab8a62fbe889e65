"""One experiment on one page (`cadx show`).

Reads only what the steps left: the dataset, splits and bundles, and the reports' JSON and Parquet files.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, read_splits
from cadx.evaluating import HEADLINES, Settings, evaluation_of, judged_on, meanings_of
from cadx.explaining import overlay, title
from cadx.files import digest_path, read_json, read_json_lines
from cadx.gating import Decision, read_decisions
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import read_predictions
from cadx.reporting import LEGEND, MARK, PALETTE, Page, draw_boxes, estimate_text, figure, panels
from cadx.types import Estimate, RawImage, Task

_NUM_PICTURES = 6


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
    summary = read_json(summary_file)
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
    _answer(page, summary, folder.info.task)
    _data(page, folder, splits, read_json(reports / "validation.json"))
    _imbalance(page, read_json(reports / "imbalance.json"))
    _training(page, work, seeds, folder.info.task)
    _results(page, summary, reports, seeds)
    _cases(page, folder, work / str(seeds[0]) / "bundle", reports / str(seeds[0]) / "predictions.parquet")
    decisions = read_decisions(reports.name, reports.parent)
    _gate(page, decisions)
    _service(page, reports / "serving")
    _chain(page, folder, work, reports, seeds)
    target = reports / "index.html"
    page.write(target)

    _print(summary, folder.info.task, decisions)
    print(f"open   {target}")
    print("next   cadx new FOLDER   for your own images, then make reproduce EXPERIMENT=...")
    return target


def _answer(page: Page, summary: dict[str, Any], task: Task) -> None:
    metrics = _estimates(summary)
    page.facts([(title(name), metrics[name]) for name in HEADLINES[task][:3] if name in metrics])
    patients = f" of {summary['n_patients']:,} patients" if summary["clustered"] else ""
    page.text(
        f"Scored on {judged_on(summary['split'])}: {summary['n']:,} samples{patients}, "
        f"{len(summary['seeds'])} training seeds. Each number stands with its 95 % interval."
    )
    for warning in summary["warnings"]:
        page.callout("warn", warning)


def _data(page: Page, folder: DatasetFolder, splits: pd.DataFrame, validation: dict[str, Any]) -> None:
    info = folder.info
    page.section("Data")
    page.text(f"{info.source.title}. Licence: {info.source.licence}. {info.source.note}")
    page.images(
        list(_examples(folder, splits)),
        caption="Samples of the training split, as stored; boxes where known.",
    )
    merged = folder.samples.merge(splits, on="sample_id")
    counts = merged.groupby("split")[list(info.label_columns)].sum().astype(int)
    counts.insert(0, "samples", merged.groupby("split").size())
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


def _training(page: Page, work: Path, seeds: Sequence[int], task: Task) -> None:
    page.section("Training")
    drawing, (loss, monitor) = panels(7.2, 2.8, columns=2)
    watched = "ap50" if task == "detection" else "auc"
    for seed in seeds:
        history = pd.DataFrame(Bundle(work / str(seed) / "bundle").history())
        for member, epochs in history.groupby("member"):
            label = None if member else f"seed {seed}"
            (line,) = loss.plot(
                epochs["epoch"], epochs["train_loss"], label=label, color=PALETTE[seed % len(PALETTE)]
            )
            if "val_loss" in epochs:
                loss.plot(epochs["epoch"], epochs["val_loss"], color=line.get_color(), linestyle="--")
            if f"val_{watched}" in epochs:
                monitor.plot(epochs["epoch"], epochs[f"val_{watched}"].astype(float), color=line.get_color())
    loss.set(xlabel="epoch", ylabel="loss (dashed: val)")
    monitor.set(xlabel="epoch", ylabel=f"{title(watched)} on val")
    loss.legend(frameon=False)
    page.figure(drawing, f"Loss, and {title(watched)} on the validation split, epoch by epoch.")


def _results(page: Page, summary: dict[str, Any], reports: Path, seeds: Sequence[int]) -> None:
    page.section("Results")
    read = [read_predictions(reports / str(seed) / "predictions.parquet") for seed in seeds]
    (frame, info), *others = read
    cases = "patients" if summary["clustered"] else "samples"
    meanings = meanings_of(info.task)
    page.table(
        [
            {
                "metric": title(name),
                "value (95 % interval)": estimate,
                "n": estimate.n,
                "what it says": meanings[name].meaning,
            }
            for name, estimate in _estimates(summary).items()
        ],
        f"Mean over seeds; the interval is over {cases}.",
    )
    drawing, axes = figure(4.4, 3.8)
    settings = Settings(resamples=0, subgroups=(), minimum_n=1)
    if evaluation_of(info.task)(frame, info, settings, others).draw_curve(axes):
        page.figure(drawing, f"The mean over seeds, with pointwise 95 % limits from a bootstrap of {cases}.")


def _cases(page: Page, folder: DatasetFolder, bundle: Path, predictions: Path) -> None:
    frame, info = read_predictions(predictions)
    if info.task != "binary" or folder.info.kind != "image":
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
                "why": decision.why,
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
    record = read_json(record_file)
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
        lines = read_json_lines(uses)
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
    pixels = folder.preview(sample_id)
    boxes = folder.boxes[folder.boxes["sample_id"] == sample_id]
    if folder.info.kind != "image" or boxes.empty:
        return pixels
    return draw_boxes(pixels, [(boxes[["x0", "y0", "x1", "y1"]].to_numpy(np.float64), PALETTE[4])])


def _estimates(summary: dict[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.model_validate(value) for name, value in summary["metrics"].items()}


def _print(summary: dict[str, Any], task: Task, decisions: Sequence[Decision]) -> None:
    scored = judged_on(summary["split"]).removeprefix("the ")
    table = Table(
        "metric", "value (95 % interval)", "n",
        title=f"{summary['experiment']}, {scored}, {len(summary['seeds'])} seeds",
    )  # fmt: skip
    metrics = _estimates(summary)
    shown = {name: estimate_text(metrics[name]) for name in HEADLINES[task] if name in metrics}
    for name, text in shown.items():
        table.add_row(title(name), text, str(metrics[name].n))
    console = Console()
    console.print(table)
    if any(MARK in text for text in shown.values()):
        console.print(LEGEND, highlight=False)
    for decision in decisions:
        verdict = "promoted" if decision.promote else f"refused: {'; '.join(decision.reasons)}"
        print(f"gate   {decision.experiment}, seed {decision.seed}: {verdict}")
