"""Deployment on a real TorchServe: nothing goes live that does not answer as it was evaluated."""

import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_evaluate import prepare
from test_package import Packed
from test_serving import certified

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder
from cadx.files import write_json
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import read_predictions, write_predictions
from cadx.reading.images import encode_png, read_image
from components.calibrate import calibrate
from components.contract import read_experiment
from components.deploy import DeployParams, deploy, golden_rows
from components.evaluate import evaluate
from components.gate import GateParams, gate
from components.imbalance import imbalance
from components.ingest import ingest
from components.package import PackageParams, package
from components.split import split
from components.train import train
from components.validate import validate
from serving.client import Client
from serving.management import Management, changing
from serving.promotion import NotPromoted
from serving.server import TorchServe, free_ports


@dataclass
class Packaged:
    """A packaged model, and all that `deploy` takes."""

    folder: Path
    dataset: Path
    bundle: Path

    def deploy(self, server: TorchServe, out: Path, **changes: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "archive": self.folder / "model.mar",
            "decision": self.folder / "decision.json",
            "dataset": self.dataset,
            "predictions": self.folder / "predictions.parquet",
            "model_store": server.model_store,
            "key_file": server.key_file,
            "deployment": out / "deployment.json",
            "inference": server.inference,
            "management": server.management,
            "params": DeployParams(golden_samples=12),
        }
        deploy(**(arguments | changes))
        return json.loads((out / "deployment.json").read_text())


def make(folder: Path, *, steps: int) -> Packaged:
    run = prepare(folder, steps=steps)
    packed = Packed(run, folder)
    packed.judge(auc=0.01)
    packed.package(folder, name="chest")
    return Packaged(folder, run.dataset, run.bundle)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    return make(tmp_path_factory.mktemp("first"), steps=16)


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Packaged:
    """The same dataset, trained a little longer: a new version of the same model."""
    return make(tmp_path_factory.mktemp("second"), steps=20)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TorchServe]:
    with TorchServe(tmp_path / "served", free_ports()) as running:
        yield running


BROKEN = b"class H:\n    def initialize(self, context):\n        raise OSError\n"


def with_handler(packaged: Packaged, archive: Path, handler: bytes) -> Path:
    """The archive with another handler: other bytes, the same release."""
    with zipfile.ZipFile(packaged.folder / "model.mar") as whole, zipfile.ZipFile(archive, "w") as other:
        for name in whole.namelist():
            other.writestr(name, handler if name == "radiograph_handler.py" else whole.read(name))
    return archive


def served_bundle(server: TorchServe, packaged: Packaged) -> str:
    """The bundle that answers where a caller names no version."""
    folder = DatasetFolder(packaged.dataset)
    png = encode_png(folder.pixels(folder.samples["sample_id"].iloc[0]))
    return Client(server.inference, "chest", key_file=server.key_file).predict(png).model.bundle


def test_a_new_version_takes_over_and_the_old_one_is_one_command_away(
    server: TorchServe, first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    one = first.deploy(server, tmp_path)
    assert one["largest_difference"] <= 1e-5
    assert one["previous"] is None
    assert served_bundle(server, first) == Bundle(first.bundle).digest
    two = second.deploy(server, tmp_path)
    assert two["previous"] == one["version"]
    assert served_bundle(server, first) == Bundle(second.bundle).digest
    said = subprocess.run(
        [
            *(sys.executable, "-m", "cadx", "rollback", "chest"),
            *("--folder", server.folder, "--management", server.management),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == f"chest: version {one['version']} answers again, in the place of {two['version']}\n"
    assert served_bundle(server, first) == Bundle(first.bundle).digest
    management = Management(server.management, key_file=server.key_file)
    loaded = management.versions("chest")
    assert {entry.version for entry in loaded} == {one["version"], two["version"]}
    with pytest.raises(ValueError, match="no earlier version to go back to"):
        management.roll_back("chest", server.model_store)


@pytest.mark.slow
def test_no_request_is_lost_while_versions_change_under_load(
    server: TorchServe, first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    """Eight clients ask all the while; back also works where the server has the old version no longer."""
    one = first.deploy(server, tmp_path)
    folder = DatasetFolder(first.dataset)
    pngs = [encode_png(folder.pixels(sample_id)) for sample_id in folder.samples["sample_id"][:4]]
    raws = [read_image(png) for png in pngs]
    expected = {
        Bundle(packaged.bundle).digest: [
            prediction.probabilities for prediction in Predictor(packaged.bundle, "cpu").predict_many(raws)
        ]
        for packaged in (first, second)
    }
    client = Client(server.inference, "chest", key_file=server.key_file)
    management = Management(server.management, key_file=server.key_file)
    done = threading.Event()
    answered: list[list[str]] = [[] for _ in range(8)]

    def ask(versions: list[str], number: int) -> None:
        while not done.is_set():
            answer = client.predict(pngs[number % 4])
            wanted = expected[answer.model.bundle][number % 4]
            assert answer.probabilities == pytest.approx(wanted, abs=1e-5)
            versions.append(answer.model.version)

    def until_each_has_asked_anew() -> None:
        """Of two more answers to a client the second was asked for after now."""
        before = [len(versions) for versions in answered]
        while any(len(versions) < n + 2 for versions, n in zip(answered, before, strict=True)):
            assert not any(task.done() for task in asking), "a client ended"
            time.sleep(0.05)

    with ThreadPoolExecutor(8) as pool:
        asking = [pool.submit(ask, versions, number) for number, versions in enumerate(answered)]
        try:
            two = second.deploy(server, tmp_path)
            assert management.roll_back("chest", server.model_store) == (two["version"], one["version"])
            second.deploy(server, tmp_path)
            until_each_has_asked_anew()  # so that nobody waits for the first any more
            management.unregister("chest", one["version"])
            assert management.roll_back("chest", server.model_store) == (two["version"], one["version"])
            until_each_has_asked_anew()
        finally:
            done.set()
        for task in asking:
            task.result()
    for versions in answered:
        assert {one["version"], two["version"]} == set(versions)
        assert versions[-1] == one["version"]


@pytest.mark.slow
def test_answers_that_differ_from_the_evaluation_never_go_live(
    server: TorchServe, first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    first.deploy(server, tmp_path)
    frame, info = read_predictions(second.folder / "predictions.parquet")
    frame["prob_opacity"] *= 0.999  # their order stays, and with it which samples are golden
    write_predictions(tmp_path / "forged.parquet", frame, info)
    with pytest.raises(ValueError, match=r"not put into service") as caught:
        second.deploy(server, tmp_path / "new", predictions=tmp_path / "forged.parquet")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "new/deployment.json").exists()
    assert served_bundle(server, first) == Bundle(first.bundle).digest
    versions = Management(server.management, key_file=server.key_file).versions("chest")
    assert len(versions) == 1, "the version that failed is taken away"


@pytest.mark.slow
def test_a_server_with_a_certificate_of_ones_own_is_compared_over_tls(
    first: Packaged, tmp_path: Path
) -> None:
    tls = certified(tmp_path)
    with TorchServe(tmp_path / "served", free_ports(), tls=tls) as server:
        with pytest.raises(ConnectionError, match="its certificate is not trusted"):
            first.deploy(server, tmp_path)
        with pytest.raises(ValueError, match=r"^nowhere\.pem: no such file"):
            first.deploy(server, tmp_path, ca_file="nowhere.pem")
        assert first.deploy(server, tmp_path, ca_file=str(tls.certificate))["golden_samples"] == 12


@pytest.mark.slow
def test_of_two_deployments_at_once_one_is_told_to_wait(
    server: TorchServe, first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    """Else the second meets the registration of the first, and takes it away as its own."""
    first.deploy(server, tmp_path)
    begin = threading.Barrier(2)

    def deploy_at_once(number: int) -> dict[str, Any] | str:
        begin.wait()
        try:
            return second.deploy(server, tmp_path / str(number))
        except ValueError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        told, done = sorted(pool.map(deploy_at_once, range(2)), key=lambda outcome: isinstance(outcome, dict))
    assert isinstance(told, str)
    assert (
        told
        == f"{server.model_store}: another deployment or rollback of chest is on its way; wait for its end"
    )
    assert isinstance(done, dict)
    assert served_bundle(server, first) == done["bundle"] == Bundle(second.bundle).digest
    management = Management(server.management, key_file=server.key_file)
    with changing(server.model_store, "chest"), pytest.raises(ValueError, match="is on its way"):
        management.roll_back("chest", server.model_store)
    assert management.roll_back("chest", server.model_store) == (done["version"], done["previous"])


@pytest.mark.slow
def test_a_first_version_that_fails_leaves_nothing_behind(
    server: TorchServe, first: Packaged, tmp_path: Path
) -> None:
    frame, info = read_predictions(first.folder / "predictions.parquet")
    for name, value in (("wrong", 0.5), ("nan", np.nan)):
        write_predictions(tmp_path / name, frame.assign(prob_opacity=value), info)
        with pytest.raises(ValueError, match="not put into service"):
            first.deploy(server, tmp_path, predictions=tmp_path / name)
    management = Management(server.management, key_file=server.key_file)
    assert management.versions("chest") == ()
    assert management.versions("chest-trial") == ()
    assert first.deploy(server, tmp_path)["previous"] is None, "and does not stand in the way of the next"
    assert management.versions("chest-trial") == ()
    watched = list(server.request_log.glob("*.jsonl"))
    assert not watched, "golden samples are no patients"
    assert list((server.request_log / "unwatched").glob("*.jsonl"))


@pytest.mark.slow
def test_another_archive_of_the_bundle_that_is_live_takes_its_place_once_it_has_been_compared(
    server: TorchServe, first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    """Its version is the bundle's, so that it cannot stand beside the one that answers."""
    first.deploy(server, tmp_path)
    management = Management(server.management, key_file=server.key_file)
    [live] = management.versions("chest")
    with zipfile.ZipFile(first.folder / "model.mar") as archive:
        handler = archive.read("radiograph_handler.py")
    again = with_handler(first, tmp_path / "again.mar", handler + b"# a later release\n")
    frame, info = read_predictions(first.folder / "predictions.parquet")
    frame["prob_opacity"] *= 0.999
    write_predictions(tmp_path / "forged.parquet", frame, info)
    with pytest.raises(ValueError, match="not put into service"):
        first.deploy(server, tmp_path, archive=again, predictions=tmp_path / "forged.parquet")
    with pytest.raises(ValueError, match=r"model_log\.log"):
        first.deploy(server, tmp_path, archive=with_handler(first, tmp_path / "broken.mar", BROKEN))
    assert management.versions("chest") == (live,)
    assert management.versions("chest-trial") == ()

    first.deploy(server, tmp_path, archive=again)
    [taken_over] = management.versions("chest")
    assert taken_over.version == live.version
    assert taken_over.archive != live.archive
    assert served_bundle(server, first) == Bundle(first.bundle).digest

    second.deploy(server, tmp_path)
    first.deploy(server, tmp_path)  # not the default now: registered and compared beside it
    first.deploy(server, tmp_path, archive=again)  # the default: the other one stands in meanwhile
    assert management.default_version("chest") == live.version
    assert {one.archive for one in management.versions("chest")} >= {taken_over.archive}
    assert len(management.versions("chest")) == 2


@pytest.mark.slow
def test_an_archive_whose_worker_does_not_start_does_not_jam_its_version(
    server: TorchServe, first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    first.deploy(server, tmp_path)
    broken = with_handler(second, tmp_path / "broken.mar", BROKEN)
    with pytest.raises(ValueError, match=r"model_log\.log"):
        second.deploy(server, tmp_path, archive=broken)
    assert served_bundle(server, first) == Bundle(first.bundle).digest
    second.deploy(server, tmp_path)
    assert served_bundle(server, first) == Bundle(second.bundle).digest


def test_the_archives_own_verdict_counts_too(first: Packaged, tmp_path: Path) -> None:
    refused = tmp_path / "refused.json"
    shared = {"metrics": first.folder / "metrics.json", "bundle": first.bundle}
    gate(**shared, decision=refused, params=GateParams(at_least={"auc": 1.0}))
    package(
        **shared,
        decision=refused,
        archive=tmp_path / "model.mar",
        card=tmp_path / "card.html",
        params=PackageParams(name="chest"),
    )
    never = TorchServe(tmp_path / "never", free_ports())
    with pytest.raises(NotPromoted, match=r"beyond the floor of 1\b"):
        first.deploy(never, tmp_path, archive=tmp_path / "model.mar")


@pytest.mark.parametrize(("tolerance", "message"), [(float("inf"), "finite number"), (1.0, "less than 1")])
def test_a_tolerance_that_every_answer_keeps_is_refused(tolerance: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DeployParams(tolerance=tolerance)


def test_a_refused_model_is_not_even_shown_to_the_server(first: Packaged, tmp_path: Path) -> None:
    refused = json.loads((first.folder / "decision.json").read_text()) | {
        "promote": False,
        "reasons": ["sensitivity is 0.9, but its 95 % interval reaches down to 0.6"],
    }
    write_json(tmp_path / "decision.json", refused)
    never = TorchServe(tmp_path / "never", free_ports())
    with pytest.raises(ValueError, match=r"refused by the gate: sensitivity is 0\.9"):
        first.deploy(never, tmp_path, decision=tmp_path / "decision.json")
    assert not never.model_store.exists()


def test_a_decision_about_another_bundle_does_not_open_the_door(
    first: Packaged, second: Packaged, tmp_path: Path
) -> None:
    never = TorchServe(tmp_path / "never", free_ports())
    with pytest.raises(ValueError, match="about another bundle"):
        first.deploy(never, tmp_path, decision=second.folder / "decision.json")
    with pytest.raises(ValueError, match="answers of another bundle"):
        first.deploy(never, tmp_path, predictions=second.folder / "predictions.parquet")


def test_a_server_that_is_not_there_is_named_in_one_line(first: Packaged, tmp_path: Path) -> None:
    absent = TorchServe(tmp_path / "absent", free_ports())
    absent.key_file.parent.mkdir(parents=True)
    absent.key_file.write_text(
        json.dumps({kind: {"key": "x"} for kind in ("management", "inference", "API")})
    )
    with pytest.raises((ValueError, OSError), match=absent.management.removeprefix("http://")) as caught:
        first.deploy(absent, tmp_path)
    assert "\n" not in str(caught.value)


def test_golden_samples_span_the_scores_from_end_to_end(first: Packaged) -> None:
    frame, info = read_predictions(first.folder / "predictions.parquet")
    rows = golden_rows(frame, info, 5)
    scores = frame["prob_opacity"]
    assert len(rows) == 5
    assert {scores.min(), scores.max()} <= set(scores[rows])
    assert golden_rows(frame, info, 10_000) == list(range(len(frame)))


@pytest.mark.slow
def test_every_test_image_of_pneumoniamnist_comes_back_through_the_endpoint_as_it_was_evaluated(
    server: TorchServe, root: Path, mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All 624, as PNG. What the network has learnt does not matter here: it is trained for one epoch."""
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))
    sections = read_experiment(root / "params.yaml", "pneumoniamnist")
    sections["train"] |= {"epochs": 1}
    sections["gate"] = {"at_least": {"auc": 0.01}}
    section = {name: json.dumps(content) for name, content in sections.items()}
    at = {name: tmp_path / name for name in ("dataset", "trained", "bundle")}
    at |= {name: tmp_path / f"{name}.parquet" for name in ("splits", "predictions")}
    at |= {name: tmp_path / f"{name}.json" for name in ("validation", "imbalance", "metrics", "decision")}
    report, data = tmp_path / "report.html", {"dataset": at["dataset"]}
    ingest(catalog=root / "data/catalog.yaml", cache=tmp_path / "cache", **data, params=section["ingest"])
    validate(**data, validation=at["validation"], report=report, params=section["validate"])
    split(**data, validation=at["validation"], splits=at["splits"], params=section["split"])
    data |= {"splits": at["splits"]}
    imbalance(**data, imbalance=at["imbalance"], report=report, params=section["imbalance"])
    train(
        **data,
        imbalance=at["imbalance"],
        checkpoints=tmp_path / "checkpoints",
        trained=at["trained"],
        log=tmp_path / "log.jsonl",
        experiment="pneumoniamnist",
        seed=0,
        params=section["train"],
    )
    calibrate(**data, trained=at["trained"], bundle=at["bundle"], params=section["calibrate"])
    judged = {"bundle": at["bundle"], "metrics": at["metrics"]}
    evaluate(
        **data,
        bundle=at["bundle"],
        test_uses=tmp_path / "test_uses.jsonl",
        predictions=at["predictions"],
        metrics=at["metrics"],
        report=report,
        params=section["evaluate"],
    )
    gate(**judged, decision=at["decision"], params=section["gate"])
    package(
        **judged,
        decision=at["decision"],
        archive=tmp_path / "model.mar",
        card=tmp_path / "card.html",
        params=section["package"],
    )
    packaged = Packaged(tmp_path, at["dataset"], at["bundle"])
    deployment = packaged.deploy(server, tmp_path, params=DeployParams(golden_samples=10_000))
    assert deployment["golden_samples"] == 624
    assert deployment["largest_difference"] <= 1e-5
