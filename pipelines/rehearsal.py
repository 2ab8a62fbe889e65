"""A rehearsal of clinical use on this very machine: served, asked, watched, and stopped again."""

import io
import time
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.ndimage import gaussian_filter

from cadx.datasets import DatasetFolder
from cadx.files import read_json, write_json
from cadx.gating import Decision, read_decisions
from cadx.predicting.table import read_predictions
from cadx.reading.images import encode_png
from components.contract import Alarm, read_params
from components.deploy import DeployParams, deploy, evenly_spread
from components.monitor import MonitorParams, monitor
from serving.client import Client
from serving.promotion import NotPromoted
from serving.server import TorchServe, free_ports, stops_on_signals

AGED_GAMMA = 1.6
AGED_BLUR_PX = 1.5


def rehearse(experiment: str, *, work: Path, reports: Path, params: Path, requests: int = 200) -> None:
    """Serve a packaged model, deploy it, send it images of the test split, watch for drift, stop the server.

    The images are sent twice: as they are, and as a detector would give them that has aged (darker and
    blurred), which the watch must notice. A packaged model that the gate refused is offered too, where there
    is one. What happened stands in `reports/<experiment>/serving/rehearsal.json`, for `cadx show`.

    Args:
        experiment: its name; of its seeds the first that the gate let through is served.
        work: the folder of data sets and bundles.
        reports: the folder of reports.
        params: the parameter file.
        requests: images to be sent, each time.

    Raises:
        ValueError: if nothing was packaged, or the endpoint answers otherwise than in evaluation.
    """
    if requests < 2:
        raise ValueError(f"--requests {requests}: send at least 2")
    console = Console(highlight=False)
    say = console.print
    home = reports / experiment / "serving"
    (home / "rehearsal.json").unlink(missing_ok=True)  # what `cadx show` would take for this one's
    decisions = [
        decision
        for decision in read_decisions(experiment, reports)
        if (work / decision.experiment / str(decision.seed) / "model.mar").is_file()
    ]
    if not decisions:
        raise ValueError(
            f"{experiment}: nothing packaged; run `make reproduce EXPERIMENT={experiment}` first"
        )
    promoted = [decision for decision in decisions if decision.promote and decision.experiment == experiment]
    refused = [decision for decision in decisions if not decision.promote]
    if not promoted:
        say(f"[bold]refused[/]  no seed of {experiment} was let through by the gate: nothing is served")
        return
    served = promoted[0]
    info = DatasetFolder(work / experiment / "dataset").info
    if info.kind != "image" or info.task == "detection":
        raise ValueError(
            f"{experiment}: a rehearsal asks about single images with labels, not about {info.kind}s of a {info.task}"
            " task; use `cadx serve` and `cadx deploy`"
        )
    with stops_on_signals(), TorchServe(work / experiment / "torchserve", free_ports()) as server:
        say(f"[bold]serve[/]    TorchServe at {server.inference}, tokens on")

        def put_into_service(decision: Decision) -> None:
            deploy(
                **_packaged(decision, work, reports),
                model_store=server.model_store,
                key_file=server.key_file,
                deployment=home / "deployment.json",
                inference=server.inference,
                management=server.management,
                params=read_params(f"{params}:{decision.experiment}", "deploy", DeployParams),
            )

        put_into_service(served)
        deployment = read_json(home / "deployment.json")
        say(
            f"[bold]deploy[/]   {experiment}, seed {served.seed}: {deployment['golden_samples']} golden samples agree "
            f"to {deployment['largest_difference']:.1e}; version {deployment['version']} is live"
        )
        refusals = []
        for decision in refused:
            try:
                put_into_service(decision)
            except NotPromoted as refusal:
                refusals.append(f"{decision.experiment}, seed {decision.seed}: {refusal}")
                say(f"[bold]refused[/]  {refusals[-1]}")

        client = Client(server.inference, deployment["model"], key_file=server.key_file)
        images = _test_images(served, work, reports, requests)
        watches, latencies_ms = [], []
        for name, what, sent in (
            ("drift_the_evaluation", "the images of the evaluation", images),
            ("drift_aged_detector", "the same from an aged detector", [_aged(pixels) for pixels in images]),
        ):
            for pixels in track(sent, description=f"ask       {what}", console=console, transient=True):
                png = encode_png(pixels)
                started = time.perf_counter()
                client.predict(png)
                latencies_ms.append(1000 * (time.perf_counter() - started))
            section = read_params(f"{params}:{experiment}", "monitor", MonitorParams)
            found = _watch(
                server.request_log,
                work / experiment / str(served.seed) / "bundle",
                home / name,
                section.model_copy(update={"window": len(sent)}),
            )
            watches.append({"what": what, **found, "report": f"{name}.html"})
            say(f"[bold]monitor[/]  {what}: {found['said']}")
    answered = len(latencies_ms)
    p50_ms, p95_ms = np.percentile(latencies_ms, [50, 95])
    say(
        f"[bold]stopped[/]  {answered} requests answered, median {p50_ms:.0f} ms, 95 % within {p95_ms:.0f} ms"
    )
    write_json(
        home / "rehearsal.json",
        {
            "schema": 1,
            **{
                name: deployment[name]
                for name in ("model", "version", "golden_samples", "largest_difference")
            },
            "seed": served.seed,
            "answered": answered,
            "latency_ms": {"p50": p50_ms, "p95": p95_ms},
            "refused": refusals,
            "watches": watches,
        },
    )


def _packaged(decision: Decision, work: Path, reports: Path) -> dict[str, Any]:
    """What `deploy` takes of a packaged model."""
    made, told = (folder / decision.experiment / str(decision.seed) for folder in (work, reports))
    return {
        "archive": made / "model.mar",
        "decision": told / "decision.json",
        "dataset": work / decision.experiment / "dataset",
        "predictions": told / "predictions.parquet",
    }


def _test_images(decision: Decision, work: Path, reports: Path, number: int) -> list[np.ndarray]:
    """Raw pixels of evaluated images, evenly spread over the file."""
    packaged = _packaged(decision, work, reports)
    frame, _ = read_predictions(packaged["predictions"])
    folder = DatasetFolder(packaged["dataset"])
    rows = evenly_spread(len(frame), number)
    return [folder.pixels(sample_id) for sample_id in frame["sample_id"].iloc[rows]]


def _aged(pixels: np.ndarray) -> np.ndarray:
    """What a detector that has lost light and sharpness makes of an image."""
    top = np.iinfo(pixels.dtype).max
    blurred = gaussian_filter(pixels.astype(np.float64), (AGED_BLUR_PX, AGED_BLUR_PX, 0)[: pixels.ndim])
    return (np.clip(blurred / top, 0, 1) ** AGED_GAMMA * top).round().astype(pixels.dtype)


def _watch(request_log: Path, bundle: Path, drift: Path, params: MonitorParams) -> dict[str, Any]:
    """Monitor the latest requests, into `drift`.json and .html; what was found."""
    record, report = drift.with_suffix(".json"), drift.with_suffix(".html")
    with suppress(Alarm), redirect_stdout(io.StringIO()):  # its message stands in the record
        monitor(
            request_log=request_log,
            bundle=bundle,
            requests=drift.parent / "requests",
            drift=record,
            report=report,
            evidently=drift.with_name(f"{drift.name}_evidently.html"),
            prometheus=drift.with_suffix(".prom"),
            params=params,
        )
    found = read_json(record)
    return {"drifted": found["drifted"], "said": found["message"]}
