"""The watch over a served model: silent on its own kind of images, and it names what has changed."""

import io
import json
import re
import shutil
import socket
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pydicom
import pytest
from prometheus_client.parser import text_string_to_metric_families
from scipy import stats
from scipy.ndimage import gaussian_filter
from test_browser import browser, chromium, open_page  # noqa: F401 - fixtures
from test_bundle import CLASSES, operating_point, train_bundle, write_dataset

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo, read_splits, write_splits
from cadx.drift import image_statistics
from cadx.files import digest_path, write_json
from cadx.phantom.cohort import Faults, Shift
from cadx.phantom.xray import XrayPhantom, write_xray_cohort
from cadx.reading.images import encode_png, read_image
from components.calibrate import CalibrateParams, calibrate
from components.contract import Alarm
from components.monitor import MonitorParams, _assumptions, _labelled, _outcomes, in_words, monitor
from serving.answering import Request, RequestLog
from serving.kinds import RadiographAnswerer

SIZE_PX = 48
NUM = {"train": 120, "calibration": 70}
NUM_REQUESTS = 70
GROUPS = ["statistics"] * 9 + ["embedding", "scores", "prevalence", "decisions"]

Lines = list[dict[str, Any]]


def draw_cohort(folder: Path, number: int, seed: int, **changes: Any) -> list[Path]:
    """DICOM files, one a patient."""
    config = XrayPhantom(
        num_patients=number, images_per_patient=1, prevalence=0.3, size_px=SIZE_PX, seed=seed, **changes
    )
    write_xray_cohort(folder, config)
    return sorted((folder / "images").glob("*.dcm"))


def write_phantom_dataset(folder: Path, *, with_places: bool = False) -> tuple[Path, Path]:
    files = draw_cohort(folder / "cohort", sum(NUM.values()), seed=1)
    labels = pd.read_csv(folder / "cohort" / "labels.csv")["label_opacity"]
    splits = [split for split, number in NUM.items() for _ in range(number)]
    with DatasetWriter(
        folder / "dataset",
        name="phantom",
        task="binary",
        classes=CLASSES["binary"],
        positive="opacity",
        modality="chest X-ray",
        clustered=False,
        source=SourceInfo(title="Phantom", licence="CC0", citation="none, made for tests"),
    ) as writer:
        for number, (file, label) in enumerate(zip(files, labels, strict=True)):
            image = read_image(file)
            writer.add(
                Sample(
                    sample_id=file.stem,
                    pixels=image.pixels,
                    labels={"normal": 1.0 - label, "opacity": float(label)},
                    patient=f"pseudonym-{number:04d}",
                    sha256=digest_path(file),
                    site=image.attributes["site"] if with_places else "",
                    scanner=image.attributes["scanner"] if with_places else "",
                    age=float("nan"),
                    sex="",
                    statistics=image_statistics(image.pixels),
                )
            )
    rows = [(file.stem, split, "") for file, split in zip(files, splits, strict=True)]
    write_splits(folder / "splits.parquet", pd.DataFrame(rows, columns=["sample_id", "split", "reason"]))
    return folder / "dataset", folder / "splits.parquet"


def serve(bundle: Bundle, bodies: Sequence[bytes], log: Path) -> None:
    """Let the served code answer, and write its request log."""
    manifest = bundle.manifest
    release = {
        "name": "phantom",
        "version": bundle.digest.removeprefix("sha256:")[:12],
        "bundle": bundle.digest,
        "decision": {"promote": True},
        "metrics": "sha256:" + "1" * 64,
        **{name: getattr(manifest, name) for name in ("classes", "positive", "task", "experiment", "seed")},
    }
    unpacked = log.parent / f"{log.name}-unpacked"
    shutil.copytree(bundle.path, unpacked / "bundle")
    write_json(unpacked / "release.json", release)
    replies = RadiographAnswerer(unpacked, log=RequestLog(log)).answer([Request(body) for body in bodies])
    assert {reply.status for reply in replies} == {200}


class Served(NamedTuple):
    bundle: Bundle
    usual: Lines  # of requests with images of the same machines, other patients
    shifted: Callable[..., Lines]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Served:
    folder = tmp_path_factory.mktemp("served")
    dataset, splits = write_phantom_dataset(folder)
    trained = train_bundle(folder / "trained", dataset, splits, steps=12)
    calibrate(
        dataset=dataset, splits=splits, trained=trained, bundle=folder / "final", params=CalibrateParams()
    )
    bundle = Bundle(folder / "final")

    def ask(name: str, **changes: Any) -> Lines:
        log = folder / f"log-{name}"
        if not log.exists():
            files = draw_cohort(folder / f"cohort-{name}", NUM_REQUESTS, seed=2, **changes)
            serve(bundle, [file.read_bytes() for file in files], log)
        return read_lines(log)

    def shifted(**shift: Any) -> Lines:
        return ask("-".join(shift), shift=Shift(**shift))

    return Served(bundle, ask("usual", faults=Faults(identifiers=NUM_REQUESTS)), shifted)


def read_lines(log: Path) -> Lines:
    return [json.loads(line) for file in sorted(log.iterdir()) for line in file.read_text().splitlines()]


def write_lines(log: Path, lines: Lines, name: str = "worker.jsonl") -> Path:
    log.mkdir(exist_ok=True)
    (log / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return log


class Seen(NamedTuple):
    record: dict[str, Any]
    folder: Path
    alarm: str

    @property
    def report(self) -> str:
        return (self.folder / "drift.html").read_text()

    @property
    def evidently(self) -> str:
        return (self.folder / "evidently.html").read_text()

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        return {column["name"]: column for column in self.record["columns"] if column["slice"] == "all"}

    @property
    def drifted(self) -> set[str]:
        return {name for name, column in self.columns.items() if column["drifted"]}


def watch(
    log: Path, bundle: Bundle, out: Path, *, labels: Path | None = None, webhook: str = "", **params: Any
) -> Seen:
    alarm = ""
    try:
        monitor(
            request_log=log,
            bundle=bundle.path,
            requests=out / "requests",
            drift=out / "drift.json",
            report=out / "drift.html",
            evidently=out / "evidently.html",
            prometheus=out / "cadx.prom",
            labels=labels,
            webhook=webhook,
            params=MonitorParams(**params),
        )
    except Alarm as error:
        alarm = str(error)
    return Seen(json.loads((out / "drift.json").read_text()), out, alarm)


@pytest.fixture(scope="module")
def silent(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What the watch says of the usual images, with a log as workers leave it."""
    folder = tmp_path_factory.mktemp("silent")
    foreign = {**served.usual[0], "bundle": "sha256:" + "0" * 64, "prediction_id": "f" * 32}
    log = write_lines(folder / "log", [foreign, *served.usual[:40]], "one.jsonl")
    write_lines(log, [*served.usual[39:], foreign], "two.jsonl")
    with (log / "one.jsonl").open("a") as stream:
        stream.write(json.dumps(served.usual[0])[:500])
    return watch(log, served.bundle, folder)


@pytest.fixture(scope="module")
def alarmed(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Seen]:
    """What the watch says of images after a change at the machines."""
    seen: dict[str, Seen] = {}

    def watched(**shift: Any) -> Seen:
        name = "-".join(shift)
        if name not in seen:
            folder = tmp_path_factory.mktemp(name)
            log = write_lines(folder / "log", served.shifted(**shift))
            seen[name] = watch(log, served.bundle, folder)
        return seen[name]

    return watched


# --- What it says -------------------------------------------------------------------------------------


def test_other_patients_on_the_same_machines_are_no_drift(silent: Seen, served: Served) -> None:
    record = silent.record
    assert not silent.alarm
    assert record["drifted"] is False
    assert record["message"] == "no drift in 13 comparisons"
    assert record["retrain"] is False
    assert record["trigger"] == {"moved": [], "prevalence": [], "broken": []}
    assert [column["group"] for column in record["columns"]] == GROUPS
    assert not silent.drifted
    assert record["bundle"] == served.bundle.digest
    assert record["n"] == NUM_REQUESTS
    assert record["n_reference"] == {"training": 120, "calibration": 70}


def test_lines_left_out_are_counted(silent: Seen, served: Served) -> None:
    assert silent.record["skipped"] == {"torn": 1, "other_bundles": 1, "duplicates": 2, "older": 0}
    times = sorted(line["time"] for line in served.usual)
    assert silent.record["window"] == {"start": times[0], "end": times[-1]}


@pytest.mark.parametrize(
    ("shift", "moved"),
    [
        ({"gamma": 1.6}, "stat_p50"),
        ({"blur_sigma_px": 1.0}, "stat_sharpness"),
        ({"new_scanner": True}, "stat_std"),
    ],
    ids=["gamma", "blur", "scanner"],
)
def test_a_change_at_the_machines_is_an_alarm_that_names_it(
    alarmed: Callable[..., Seen], shift: dict[str, Any], moved: str
) -> None:
    seen = alarmed(**shift)
    assert seen.record["drifted"] is True
    assert moved in seen.drifted
    assert re.match(r"\d+ of 13 comparisons drifted: .* look at the report$", seen.alarm)
    assert "\n" not in seen.alarm
    column = seen.columns[moved]
    assert (
        f"{in_words(moved)} {column['reference_mean']:.3g} -> {column['current_mean']:.3g} "
        f"(distance {column['effect']:.2f})" in seen.alarm
    )
    assert seen.record["retrain"] is True
    assert f"all: {moved}" in seen.record["trigger"]["moved"]
    assert f"{len(seen.drifted)} of 13 comparisons drifted" in seen.report
    shown = seen.drifted - {"embedding", "prevalence_opacity"}
    assert f"({len(shown)} out of 11)" in seen.evidently, "Evidently counts otherwise"
    verdicts = {
        test["metric_config"]["params"]["column"]: test["status"]
        for test in seen.record["evidently"]["tests"]
        if "column" in test["metric_config"]["params"]
    }
    assert {name for name, status in verdicts.items() if status == "FAIL"} == shown
    assert len(verdicts) == 11
    for metric in seen.record["evidently"]["metrics"][1:]:
        assert metric["value"] == pytest.approx(seen.columns[metric["config"]["column"]]["effect"])


def test_a_fault_at_one_site_is_told_there_and_a_new_scanner_is_named(tmp_path: Path) -> None:
    """From DICOM files to the alarm: what the files say of site and scanner goes the whole way."""
    dataset, splits = write_phantom_dataset(tmp_path, with_places=True)
    trained = train_bundle(tmp_path / "trained", dataset, splits, steps=2)
    calibrate(
        dataset=dataset, splits=splits, trained=trained, bundle=tmp_path / "final", params=CalibrateParams()
    )
    bundle = Bundle(tmp_path / "final")
    headers = [pydicom.dcmread(file) for file in draw_cohort(tmp_path / "later", NUM_REQUESTS, seed=2)]
    place, number = Counter(str(header.InstitutionName) for header in headers).most_common(1)[0]
    bodies = []
    for header in headers:
        if header.InstitutionName == place:
            blurred = gaussian_filter(header.pixel_array.astype(np.float64), 3)
            header.PixelData = blurred.astype(header.pixel_array.dtype).tobytes()
            header.ManufacturerModelName = "Repaired 2"
        out = io.BytesIO()
        header.save_as(out)
        bodies.append(out.getvalue())
    serve(bundle, bodies, tmp_path / "log")
    seen = watch(tmp_path / "log", bundle, tmp_path, minimum_n=10)
    of_sites = {moved for moved in seen.record["trigger"]["moved"] if moved.startswith("site ")}
    assert f"site {place}: stat_sharpness" in of_sites
    assert {moved.partition(":")[0] for moved in of_sites} == {f"site {place}"}
    asked = {column["slice"] for column in seen.record["columns"]}
    assert len([name for name in asked if name.startswith("site ")]) > 1, (
        "the others were asked, and are calm"
    )
    (named,) = seen.record["unknown"]["scanner"]
    assert named.endswith("Repaired 2")
    assert seen.record["unknown"] == {"site": {}, "scanner": {named: number}}
    assert f"not calibrated on: {named} ({number})" in seen.report
    assert f"site {place}: sharpness" in seen.alarm
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "cadx.prom").read_text())}
    (found,) = (
        sample.value
        for sample in families["cadx_drift_found"].samples
        if (sample.labels["slice"], sample.labels["quantity"]) == (f"site {place}", "stat_sharpness")
    )
    assert found == 1


def test_numbers_are_those_of_the_raw_columns(silent: Seen, served: Served) -> None:
    """Of each group, worked out anew from the files and the lines."""
    reference, heldout = (
        pd.read_parquet(served.bundle.path / f"{n}.parquet") for n in ("reference", "heldout")
    )
    sharpness = [line["statistics"]["sharpness"] for line in served.usual]
    scores = [line["probabilities"]["opacity"] for line in served.usual]
    for name, before, after in (
        ("stat_sharpness", reference["stat_sharpness"], sharpness),
        ("prob_opacity", heldout["prob_opacity"], scores),
    ):
        result = stats.ks_2samp(before, np.round(after, 6))
        column = silent.columns[name]
        assert (column["p_value"], column["effect"]) == pytest.approx((result.pvalue, result.statistic))
        assert column["reference_mean"] == pytest.approx(np.mean(before))
        assert column["current_mean"] == pytest.approx(np.mean(after), abs=1e-6)
    called = [[sum(d == c for d in ds) for c in CLASSES["binary"]] for ds in (
        heldout["decision"], [line["decision"] for line in served.usual])]  # fmt: skip
    column = silent.columns["decision_opacity"]
    assert column["p_value"] == pytest.approx(stats.fisher_exact(called)[1])
    assert column["current_mean"] == pytest.approx(called[1][1] / NUM_REQUESTS)
    assert column["effect"] == pytest.approx(abs(called[0][1] / NUM["calibration"] - column["current_mean"]))


def test_more_patients_that_are_ill_are_told_by_their_share(
    silent: Seen, served: Served, tmp_path: Path
) -> None:
    (usual,) = silent.record["prevalence"]
    assert (usual["of"], usual["moved"], usual["n"]) == ("opacity", False, NUM_REQUESTS)
    assert usual["low"] <= usual["value"] <= usual["high"]
    likeliest = sorted(served.usual, key=lambda line: line["probabilities"]["opacity"])[-35:]
    seen = watch(write_lines(tmp_path / "log", likeliest), served.bundle, tmp_path)
    (more,) = seen.record["prevalence"]
    assert more["moved"]
    assert usual["value"] < more["value"]
    assert more["reference"] == usual["reference"] < more["value"]
    # Of a network of twelve steps, calibrated on 70 images, one knows that more are ill, but not how many.
    assert more["low"] <= more["value"] <= more["high"]
    assert "too few" in more["method"]
    assert seen.record["trigger"]["prevalence"] == ["opacity"]
    assert re.search(
        r"prevalence of opacity is about \S+ % \(95 % interval \S+ to \S+ %\), reference \S+ %", seen.alarm
    )
    families = text_string_to_metric_families((tmp_path / "cadx.prom").read_text())
    told = {s.labels["bound"]: s.value for f in families if f.name == "cadx_prevalence" for s in f.samples}
    assert told == {bound: pytest.approx(more[bound]) for bound in ("value", "low", "high")}


def test_an_effect_that_is_too_small_to_matter_is_no_alarm(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.shifted(blur_sigma_px=1.0))
    seen = watch(log, served.bundle, tmp_path, minimum_effect=1.0, alpha=0.5)
    assert seen.columns["stat_sharpness"]["p_value"] < 1e-10
    assert seen.columns["stat_sharpness"]["effect"] < 1
    assert not seen.alarm
    assert seen.record["drifted"] is False
    assert "(0 out of 11)" in seen.evidently


def test_too_few_requests_are_neither_alarm_nor_all_clear(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.shifted(new_scanner=True)[:29])
    seen = watch(log, served.bundle, tmp_path)
    assert not seen.alarm
    assert seen.record["drifted"] is None
    assert seen.record["columns"] == []
    assert seen.record["evidently"] is None
    assert seen.record["n"] == 29
    said = "too few requests for a verdict, 29 of 30: neither alarm nor all-clear"
    assert seen.record["message"] == said
    assert said in seen.report
    assert said in seen.evidently


def test_the_window_takes_the_latest_by_time(served: Served, tmp_path: Path) -> None:
    early = [line | {"time": f"2020-01-01T00:00:{i % 60:02d}.000Z"}
             for i, line in enumerate(served.shifted(new_scanner=True))]  # fmt: skip
    log = write_lines(tmp_path / "log", [*served.usual, *early])
    recent = watch(log, served.bundle, tmp_path, window=NUM_REQUESTS, minimum_n=NUM_REQUESTS)
    assert recent.record["drifted"] is False
    assert not recent.alarm
    assert recent.record["skipped"]["older"] == NUM_REQUESTS
    assert recent.record["window"]["start"] == min(line["time"] for line in served.usual)
    whole = watch(log, served.bundle, tmp_path, window=None)
    assert whole.alarm
    assert whole.record["n"] == 2 * NUM_REQUESTS


# --- Data at the edges --------------------------------------------------------------------------------


def test_columns_that_never_vary_have_p_values(served: Served, tmp_path: Path) -> None:
    constant = [
        line
        | {"statistics": line["statistics"] | {"bright_fraction": 0.25}}
        | {"embedding": [0.5] * len(line["embedding"]), "decision": "normal"}
        for line in served.usual
    ]
    seen = watch(write_lines(tmp_path / "log", constant), served.bundle, tmp_path)
    assert {"stat_bright_fraction", "embedding", "decision_opacity"} <= seen.drifted
    for column in seen.record["columns"]:
        assert 0 <= column["p_value"] <= 1
        assert 0 <= column["effect"] <= 1


def test_saturated_scores_are_compared_as_rounded_as_the_reference(served: Served, tmp_path: Path) -> None:
    """A network that always answers some 1e-9: unrounded, each request would lie above every reference."""
    answers = served.bundle.heldout().assign(prob_opacity=1e-9, prob_normal=1 - 1e-9)
    Bundle(served.bundle.path.parent / "trained").complete(
        tmp_path / "sure", temperature=1.0, operating_point=operating_point(opacity=0.5), heldout=answers
    )
    sure = Bundle(tmp_path / "sure")
    lines = [
        line | {"bundle": sure.digest, "probabilities": {"normal": 1 - 2e-9, "opacity": 2e-9}}
        for line in served.usual
    ]
    seen = watch(write_lines(tmp_path / "log", lines), sure, tmp_path)
    assert seen.columns["prob_opacity"]["effect"] == 0
    assert not seen.alarm


@pytest.mark.parametrize("task", ["multilabel", "multiclass"])
def test_every_class_is_watched(task: str, tmp_path: Path) -> None:
    cohort = write_dataset(tmp_path, task)
    trained = train_bundle(tmp_path / "trained", *cohort, steps=4)
    calibrate(
        dataset=cohort[0],
        splits=cohort[1],
        trained=trained,
        bundle=tmp_path / "final",
        params=CalibrateParams(),
    )
    bundle = Bundle(tmp_path / "final")
    folder, assigned = DatasetFolder(cohort[0]), read_splits(cohort[1])
    ids = assigned.loc[assigned["split"] == "test", "sample_id"]
    serve(bundle, [encode_png(folder.pixels(i)) for i in ids], tmp_path / "log")
    lines = read_lines(tmp_path / "log")
    striped = "stripe" if task == "multiclass" else ["stripe"]
    shutil.rmtree(tmp_path / "log")
    log = write_lines(tmp_path / "log", [line | {"decision": striped} for line in lines])
    seen = watch(log, bundle, tmp_path)
    assert seen.drifted <= {f"decision_{name}" for name in CLASSES[task]}
    for name in CLASSES[task]:
        scores = [line["probabilities"][name] for line in lines]
        assert seen.columns[f"prob_{name}"]["current_mean"] == pytest.approx(np.mean(scores), abs=1e-6)
        assert seen.columns[f"prob_{name}"]["group"] == "scores"
        assert seen.columns[f"decision_{name}"]["current_mean"] == (name == "stripe")
    assert "decision_stripe" in seen.drifted


def test_what_cannot_be_watched_is_refused_in_one_line(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.usual)
    trained = served.bundle.path.parent / "trained"
    bare = tmp_path / "bare"
    Bundle(trained).complete(bare, temperature=1.0, operating_point=operating_point(opacity=0.3))
    (tmp_path / "empty").mkdir()
    for requests, bundle, message in (
        (log, trained, r"no heldout\.parquet.* run `cadx calibrate`"),
        (log, bare, r"no heldout\.parquet.* run `cadx calibrate`"),
        (tmp_path / "empty", served.bundle.path, "no request that sha256:"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            watch(requests, Bundle(bundle), tmp_path)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "drift.json").exists()
    assert not (tmp_path / "drift.html").exists()


# --- Labels that come later -----------------------------------------------------------------------------


def write_labels(path: Path, lines: Lines, ill: Callable[[dict[str, Any]], bool]) -> Path:
    rows = [{"prediction_id": line["prediction_id"], "label_opacity": int(ill(line))} for line in lines]
    pd.DataFrame(rows).to_csv(path, index=False)
    return path


def test_labels_that_agree_show_live_metrics_and_no_alarm(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.usual)
    labels = write_labels(tmp_path / "labels.csv", served.usual, lambda line: line["decision"] == "opacity")
    seen = watch(log, served.bundle, tmp_path, labels=labels)
    assert not seen.alarm
    assert seen.record["n_labelled"] == NUM_REQUESTS
    found = {outcome["name"]: outcome for outcome in seen.record["outcomes"]}
    assert found["sensitivity"]["value"] == found["specificity"]["value"] == 1
    assert found["sensitivity"]["at_least"] == 0.95, "the operating point's declared target"
    assert "at least 0.95" in seen.report


def test_labels_that_are_still_to_come_hide_none_that_have(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.usual)
    labels = write_labels(tmp_path / "labels.csv", served.usual, lambda line: line["decision"] == "normal")
    times = {line["prediction_id"]: line["time"] for line in served.usual}
    table = pd.read_csv(labels)
    latest = table["prediction_id"].map(times).rank() > NUM_REQUESTS - 30
    table["label_opacity"] = table["label_opacity"].mask(latest)
    table.to_csv(labels, index=False)
    seen = watch(log, served.bundle, tmp_path, labels=labels, labelled_window=30)
    assert seen.record["n_labelled"] == 30
    assert "sensitivity of opacity" in seen.record["trigger"]["broken"]
    table.assign(label_opacity=None).to_csv(labels, index=False)
    seen = watch(log, served.bundle, tmp_path, labels=labels)
    assert (seen.record["n_labelled"], seen.record["outcomes"]) == (0, [])


def test_labels_of_no_request_are_counted_wherever_the_watch_speaks(
    served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = write_lines(tmp_path / "log", served.usual)
    lost = [{"prediction_id": f"{number:032x}", "decision": "normal"} for number in range(4)]
    labels = write_labels(
        tmp_path / "labels.csv", [*served.usual, *lost], lambda line: line["decision"] == "opacity"
    )
    seen = watch(log, served.bundle, tmp_path, labels=labels)
    counted = tuple(seen.record[name] for name in ("n_labels", "n_unmatched", "n_labelled"))
    assert counted == (NUM_REQUESTS + 4, 4, NUM_REQUESTS)
    said = f"4 of the {NUM_REQUESTS + 4} prediction_ids with labels are of no request in the log"
    assert said in seen.report
    assert capsys.readouterr().err == f"{labels}: {said}; take them from the answers\n"
    assert re.search(
        r"^cadx_labels_unmatched\{.*\} 4\.0$", (tmp_path / "cadx.prom").read_text(), re.MULTILINE
    )


def test_missed_patients_are_an_alarm_though_nothing_has_drifted(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.usual)
    labels = write_labels(tmp_path / "labels.csv", served.usual, lambda line: line["decision"] == "normal")
    seen = watch(log, served.bundle, tmp_path, labels=labels, at_least={"auc": 0.8})
    assert seen.record["drifted"] is False
    assert seen.record["retrain"] is True
    assert seen.record["trigger"] == {
        "moved": [],
        "prevalence": [],
        "broken": [f"{name} of opacity" for name in ("sensitivity", "auc", "coverage")],
    }
    assert "sensitivity of opacity is 0.000, declared at least 0.95" in seen.alarm


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"at_least": {"sensitivity": 95}}, "less than or equal to 1"),
        ({"at_least": {"auc": float("nan")}}, "finite number"),
        ({"at_most": {"calibration_slope": float("nan")}}, "finite number"),
        ({"window": 20, "minimum_n": 30}, "window 20 never holds the minimum_n of 30 requests"),
    ],
)
def test_a_watch_that_could_never_alarm_is_refused(declared: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MonitorParams.model_validate(declared)


def test_the_coverage_of_prediction_sets_is_held_to_what_they_promise(served: Served, tmp_path: Path) -> None:
    lines = [line | {"prediction_set": ["normal"], "refer": True} for line in served.usual]
    log = write_lines(tmp_path / "log", lines)
    ids = {line["prediction_id"] for line in lines[:35]}
    labels = write_labels(tmp_path / "labels.csv", lines, lambda line: line["prediction_id"] in ids)
    seen = watch(log, served.bundle, tmp_path, labels=labels, at_least={"coverage": 0.9})
    covered = {
        o["of"]: (o["value"], o["n"], o["broken"]) for o in seen.record["outcomes"] if o["name"] == "coverage"
    }
    assert covered == {"normal": (1.0, NUM_REQUESTS - 35, False), "opacity": (0.0, 35, True)}
    assert "coverage of opacity" in seen.record["trigger"]["broken"]
    assert seen.record["share_referred"] == 1


def test_a_promise_of_patients_is_not_held_against_images_where_they_have_several(
    served: Served, tmp_path: Path
) -> None:
    lines = [line | {"prediction_set": ["normal"]} for line in served.usual]
    labels = write_labels(tmp_path / "labels.csv", lines, lambda _: True)
    seen = watch(write_lines(tmp_path / "log", lines), served.bundle, tmp_path, labels=labels)
    assert "coverage of opacity" in seen.record["trigger"]["broken"]
    labelled, *_ = _labelled(tmp_path / "requests", labels, served.bundle, None)
    manifest = served.bundle.manifest
    assert manifest.conformal is not None
    single = manifest.conformal.images
    for images, clustered, held in (
        (single, True, True),
        (single | {"opacity": single["opacity"] + 1}, True, False),
        ({}, False, True),
        ({}, True, False),
    ):
        sets = manifest.conformal.model_copy(update={"images": images})
        other = manifest.model_copy(update={"conformal": sets, "clustered": clustered})
        found = {(o.name, o.of): o for o in _outcomes(labelled, other, MonitorParams())}
        told = found["coverage", "opacity"]
        assert (told.estimate.value, told.at_least, told.broken) == (0, 0.9 if held else None, held)
        assert any("promise their coverage of patients" in words for words in _assumptions(other)) != held
        declared = {
            o.name: o.at_least for o in _outcomes(labelled, other, MonitorParams(at_least={"coverage": 0.7}))
        }
        assert declared["coverage"] == 0.7


def test_labels_of_other_requests_are_refused(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.usual)
    labels = write_labels(tmp_path / "labels.csv", [{"prediction_id": "f" * 32}], lambda _: True)
    with pytest.raises(ValueError, match="none of its 1 prediction_ids"):
        watch(log, served.bundle, tmp_path, labels=labels)
    assert not (tmp_path / "drift.json").exists()


def test_labels_of_the_version_before_leave_the_watch_on(served: Served, tmp_path: Path) -> None:
    before = [
        line | {"bundle": "sha256:" + "0" * 64, "prediction_id": f"{number:032x}"}
        for number, line in enumerate(served.usual[:5])
    ]
    log = write_lines(tmp_path / "log", [*served.usual, *before])
    seen = watch(
        log, served.bundle, tmp_path, labels=write_labels(tmp_path / "l.csv", before, lambda _: True)
    )
    assert (seen.record["n"], seen.record["n_labelled"]) == (NUM_REQUESTS, 0)


# --- What machines take from it -------------------------------------------------------------------------


def test_prometheus_reads_the_verdict(alarmed: Callable[..., Seen], silent: Seen, served: Served) -> None:
    seen = alarmed(new_scanner=True)
    for watched, raised in ((seen, 1.0), (silent, 0.0)):
        families = {
            f.name: f for f in text_string_to_metric_families((watched.folder / "cadx.prom").read_text())
        }
        (sample,) = families["cadx_alarm"].samples
        assert sample.value == raised
        bundle = served.bundle.digest.removeprefix("sha256:")[:12]
        assert sample.labels == {"experiment": "squares", "seed": "0", "bundle": bundle}
        distances = {s.labels["quantity"]: s.value for s in families["cadx_drift_distance"].samples}
        assert distances == {
            name: pytest.approx(column["effect"]) for name, column in watched.columns.items()
        }
        assert families["cadx_window_requests"].samples[0].value == NUM_REQUESTS


@pytest.fixture
def receiver() -> Iterator[tuple[str, list[int], list[dict[str, Any]]]]:
    """A server that answers with the statuses in a list, in turn, then 200; its address, and what it was sent.

    It asks to be left alone for an hour, which no alarm can wait.
    """
    statuses: list[int] = []
    taken: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = statuses.pop(0) if statuses else 200
            if status == 200:
                taken.append(json.loads(body))
            self.send_response(status)
            self.send_header("Retry-After", "3600")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hook?token=secret", statuses, taken
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_alarm_reaches_the_webhook_once_even_if_it_was_busy(
    served: Served, tmp_path: Path, receiver: tuple[str, list[int], list[dict[str, Any]]]
) -> None:
    url, statuses, taken = receiver
    statuses[:] = [503, 429]
    log = write_lines(tmp_path / "log", served.shifted(new_scanner=True))
    seen = watch(log, served.bundle, tmp_path, webhook=url)
    (alert,) = taken
    assert alert == {
        name: seen.record[name]
        for name in ("schema", "experiment", "seed", "bundle", "n", "window", "retrain", "trigger", "message")
    }
    assert "all: stat_std" in alert["trigger"]["moved"]


def test_without_an_alarm_nobody_is_called(
    served: Served, tmp_path: Path, receiver: tuple[str, list[int], list[dict[str, Any]]]
) -> None:
    watch(write_lines(tmp_path / "log", served.usual), served.bundle, tmp_path, webhook=receiver[0])
    assert receiver[2] == []


def test_a_webhook_that_does_not_answer_costs_a_line_and_not_the_alarm(
    served: Served,
    tmp_path: Path,
    receiver: tuple[str, list[int], list[dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    log = write_lines(tmp_path / "log", served.shifted(new_scanner=True))
    url, statuses, taken = receiver
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/hook?token=secret"
        for address, why in ((url, "status 500"), (nobody, "NewConnectionError")):
            statuses[:] = [500] * 9
            seen = watch(log, served.bundle, tmp_path, webhook=address)
            assert seen.alarm
            said = capsys.readouterr().err
            assert (
                said
                == f"webhook at 127.0.0.1: the message was not taken ({why}); the alarm stands in the report\n"
            )
    assert not taken
    with pytest.raises(ValueError, match="not an http or https address"):
        watch(log, served.bundle, tmp_path, webhook="file:///etc/passwd")


# --- What its pages do and tell -------------------------------------------------------------------------


def test_evidentlys_page_fetches_nothing(silent: Seen) -> None:
    page = silent.evidently
    assert re.search(r"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; """, page)
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert "window.drawDashboard" not in markup, "scripts were not taken out"
    assert not re.findall(r"""(?:src|href|action)\s*=|@import|url\((?!data:)""", markup)
    assert not re.findall(r"<script[^>]+src", page)


def test_nothing_of_a_patient_or_a_request_is_told(silent: Seen, served: Served) -> None:
    sent = "".join(json.dumps(line) for line in served.usual)
    assert len({line["prediction_id"] for line in served.usual}) == NUM_REQUESTS
    for text in (silent.report, silent.evidently, json.dumps(silent.record), sent):
        assert "Phantom^Person" not in text
        assert "19500101" not in text
        assert not re.search(r"P000\d\d\b", text)
    for line in served.usual:
        assert line["prediction_id"] not in silent.report
        assert line["prediction_id"] not in json.dumps(silent.record)


def test_evidently_has_no_telemetry_to_switch_off_here(silent: Seen) -> None:
    assert silent.record["drifted"] is False
    assert "evidently" in sys.modules
    assert not [
        name for name in sys.modules if name.startswith(("evidently.telemetry", "iterative_telemetry"))
    ]


@pytest.mark.browser
def test_the_report_draws_with_its_doors_shut(
    alarmed: Callable[..., Seen],
    browser: list[str],  # noqa: F811
) -> None:
    seen = alarmed(new_scanner=True)
    shown = open_page(browser, seen.folder / "evidently.html", "--virtual-time-budget=15000", "--dump-dom")
    table = re.sub(r"<script>.*?</script>", "", shown, flags=re.DOTALL)
    largest = max(
        (c for c in seen.record["columns"] if c["group"] == "statistics"), key=lambda column: column["effect"]
    )
    assert re.search(rf"<td[^>]*>(?:<[^>]+>)*{largest['name']}<", table), (
        "the most moved column is not listed"
    )
    assert "Detected" in table
    summary = open_page(browser, seen.folder / "drift.html", "--dump-dom")
    assert "contrast (standard deviation)" in summary
    assert "Attention" in summary
