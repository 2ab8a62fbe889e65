"""The watch over a served model: silent on its own kind of images, and it names what has changed."""

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_browser import browser, open_page  # noqa: F401 - a fixture
from test_bundle import CLASSES, operating_point, train_bundle, write_dataset

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder, DatasetWriter, SourceInfo, read_splits, write_splits
from cadx.drift import STATISTICS, compare_numbers, image_statistics
from cadx.files import digest_path, write_json
from cadx.phantom.cohort import Faults, Shift
from cadx.phantom.xray import XrayPhantom, write_xray_cohort
from cadx.reading.images import encode_png, read_image
from components.calibrate import CalibrateParams, calibrate
from components.contract import Alarm
from components.monitor import MonitorParams, monitor
from serving.answering import Answerer, Request, RequestLog

SIZE_PX = 48
NUM = {"train": 120, "calibration": 70}
NUM_REQUESTS = 70
GROUPS = ["statistics"] * 9 + ["embedding"] * 5 + ["scores", "decisions"]

Lines = list[dict[str, Any]]


def draw_cohort(folder: Path, number: int, seed: int, **changes: Any) -> list[Path]:
    """DICOM files, one a patient."""
    config = XrayPhantom(
        num_patients=number, images_per_patient=1, prevalence=0.3, size_px=SIZE_PX, seed=seed, **changes
    )
    write_xray_cohort(folder, config)
    return sorted((folder / "images").glob("*.dcm"))


def write_phantom_dataset(folder: Path) -> tuple[Path, Path]:
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
                sample_id=file.stem,
                pixels=image.pixels,
                labels={"normal": 1.0 - label, "opacity": float(label)},
                patient=f"pseudonym-{number:04d}",
                sha256=digest_path(file),
                site="",
                scanner="",
                age=float("nan"),
                sex="",
                statistics=image_statistics(image.pixels),
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
    replies = Answerer(unpacked, log=RequestLog(log)).answer([Request(body) for body in bodies])
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
    report: str
    alarm: str

    @property
    def columns(self) -> dict[str, dict[str, Any]]:
        return {column["name"]: column for column in self.record["columns"]}

    @property
    def drifted(self) -> set[str]:
        return {name for name, column in self.columns.items() if column["drifted"]}


def watch(log: Path, bundle: Bundle, out: Path, **params: Any) -> Seen:
    alarm = ""
    try:
        monitor(
            request_log=log,
            bundle=bundle.path,
            drift=out / "drift.json",
            report=out / "drift.html",
            params=MonitorParams(**params),
        )
    except Alarm as error:
        alarm = str(error)
    return Seen(json.loads((out / "drift.json").read_text()), (out / "drift.html").read_text(), alarm)


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
def alarmed(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Seen, Path]]:
    """What the watch says of images after a change at the machines, and the folder where it says so."""
    seen: dict[str, tuple[Seen, Path]] = {}

    def watched(**shift: Any) -> tuple[Seen, Path]:
        name = "-".join(shift)
        if name not in seen:
            folder = tmp_path_factory.mktemp(name)
            log = write_lines(folder / "log", served.shifted(**shift))
            seen[name] = watch(log, served.bundle, folder), folder
        return seen[name]

    return watched


# --- What it says -------------------------------------------------------------------------------------


def test_other_patients_on_the_same_machines_are_no_drift(silent: Seen, served: Served) -> None:
    record = silent.record
    assert not silent.alarm
    assert record["drifted"] is False
    assert record["message"] == "no drift in 16 columns"
    assert [column["group"] for column in record["columns"]] == GROUPS
    assert not silent.drifted
    assert record["bundle"] == served.bundle.digest
    assert record["n"] == NUM_REQUESTS
    assert record["n_reference"] == {"statistics": 120, "embedding": 35, "scores": 70, "decisions": 70}
    assert all(column["threshold"] == pytest.approx(0.01 / 16) for column in record["columns"])


def test_lines_left_out_are_counted(silent: Seen, served: Served) -> None:
    assert silent.record["skipped"] == {"torn": 1, "other_bundles": 2, "duplicates": 1, "older": 0}
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
    alarmed: Callable[..., tuple[Seen, Path]], shift: dict[str, Any], moved: str
) -> None:
    seen, _ = alarmed(**shift)
    assert seen.record["drifted"] is True
    assert moved in seen.drifted
    assert re.match(r"\d+ of 16 columns drifted: .* look at the report$", seen.alarm)
    assert "\n" not in seen.alarm
    column = seen.columns[moved]
    assert (
        f"{moved} {column['reference_mean']:.3g} -> {column['current_mean']:.3g} "
        f"(distance {column['effect']:.2f})" in seen.alarm
    )
    assert f"{len(seen.drifted)} of 16 columns drifted" in seen.report
    assert f"({len(seen.drifted)} out of 16)" in seen.report, "Evidently counts otherwise"


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


def test_an_effect_that_is_too_small_to_matter_is_no_alarm(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.shifted(blur_sigma_px=1.0))
    seen = watch(log, served.bundle, tmp_path, minimum_effect=1.0, alpha=0.5)
    assert seen.columns["stat_sharpness"]["p_value"] < 1e-10
    assert seen.columns["stat_sharpness"]["effect"] < 1
    assert not seen.alarm
    assert seen.record["drifted"] is False
    assert "(0 out of 16)" in seen.report


def test_too_few_requests_are_neither_alarm_nor_all_clear(served: Served, tmp_path: Path) -> None:
    log = write_lines(tmp_path / "log", served.shifted(new_scanner=True)[:49])
    seen = watch(log, served.bundle, tmp_path)
    assert not seen.alarm
    assert seen.record["drifted"] is None
    assert seen.record["columns"] == []
    assert seen.record["n"] == 49
    said = "too few requests for a verdict, 49 of 50: neither alarm nor all-clear"
    assert seen.record["message"] == said
    assert said in seen.report


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


def test_false_alarms_are_as_rare_as_declared(served: Served) -> None:
    """On real image statistics, reference and requests drawn from one pool: at most alpha of the runs."""
    before = served.bundle.reference().to_numpy()
    after = np.array([[line["statistics"][name] for name in STATISTICS] for line in served.usual])
    pool, rng = np.concatenate([before, after]), np.random.default_rng(0)
    alpha, runs, alarms = 0.1, 300, 0
    for _ in range(runs):
        shuffled = pool[rng.permutation(len(pool))]
        differences = [compare_numbers(shuffled[:120, k], shuffled[120:, k]) for k in range(len(STATISTICS))]
        alarms += any(d.is_drift(alpha / len(STATISTICS), minimum_effect=0) for d in differences)
    assert alarms <= stats.binom.ppf(0.999, runs, alpha)
    assert alarms > 0, "a test that never alarms has no level"


# --- Data at the edges --------------------------------------------------------------------------------


def test_columns_that_never_vary_have_p_values(served: Served, tmp_path: Path) -> None:
    constant = [
        line
        | {"statistics": line["statistics"] | {"bright_fraction": 0.25}}
        | {"embedding": [0.5] * len(line["embedding"]), "decision": "normal"}
        for line in served.usual
    ]
    seen = watch(write_lines(tmp_path / "log", constant), served.bundle, tmp_path)
    assert {"stat_bright_fraction", "embedding_residual", "decision_opacity"} <= seen.drifted
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


# --- What its pages do and tell -----------------------------------------------------------------------


def test_the_report_fetches_nothing(silent: Seen) -> None:
    assert re.search(
        r"""<meta http-equiv="Content-Security-Policy" content="default-src 'none'; """, silent.report
    )
    markup = re.sub(r"<script>.*?</script>", "", silent.report, flags=re.DOTALL)
    assert "window.drawDashboard" not in markup, "scripts were not taken out"
    assert not re.findall(r"""(?:src|href|action)\s*=|@import|url\((?!data:)""", markup)
    assert not re.findall(r"<script[^>]+src", silent.report)


def test_nothing_of_a_patient_or_a_request_is_told(silent: Seen, served: Served) -> None:
    sent = "".join(json.dumps(line) for line in served.usual)
    assert len({line["prediction_id"] for line in served.usual}) == NUM_REQUESTS
    for text in (silent.report, json.dumps(silent.record), sent):
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
    alarmed: Callable[..., tuple[Seen, Path]],
    browser: list[str],  # noqa: F811
) -> None:
    seen, folder = alarmed(new_scanner=True)
    shown = open_page(browser, folder / "drift.html", "--virtual-time-budget=15000", "--dump-dom")
    table = re.sub(r"<script>.*?</script>", "", shown, flags=re.DOTALL)
    largest = max(seen.record["columns"], key=lambda column: column["effect"])
    assert re.search(rf"<td[^>]*>(?:<[^>]+>)*{largest['name']}<", table), (
        "the most moved column is not listed"
    )
    assert "Detected" in table
