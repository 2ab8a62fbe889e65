"""The way of a promoted model to the pods of manifests/serving: over a volume, and no other."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from test_deploy import Packaged, first  # noqa: F401 - a fixture
from test_serving import five_free_ports

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder
from cadx.files import digest_path, locked, write_json
from cadx.reading.images import encode_png
from components.contract import ROOT
from components.deliver import DeliverParams, deliver
from serving.client import Client
from serving.management import Management
from serving.server import Ports

PARTS = {"model.mar", "decision.json", "predictions.parquet", "dataset", "bundle"}


def bring(packaged: Packaged, models: Path, **changes: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "archive": packaged.folder / "model.mar",
        "decision": packaged.folder / "decision.json",
        "dataset": packaged.dataset,
        "predictions": packaged.folder / "predictions.parquet",
        "models": models,
        "delivery": models.parent / "delivery.json",
        "params": DeliverParams(),
    }
    deliver(**(arguments | changes))
    record: dict[str, Any] = json.loads((models.parent / "delivery.json").read_text())
    return record


def serving_script() -> str:
    """What the container `serving` of manifests/serving runs."""
    text = (ROOT / "manifests/serving/base/deployment.yaml").read_text()
    [container] = [
        one
        for one in yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
        if one["name"] == "serving"
    ]
    script: str = container["command"][-1]
    return script


@contextmanager
def pod(models: Path, home: Path) -> Iterator[tuple[Path, str]]:
    """The container's script here, with folders and ports of this test's; its folder and address, once it is ready."""
    ports = Ports.starting_at(five_free_ports())
    served, ready = home / "served", home / "ready"
    addresses = (
        f"--inference http://127.0.0.1:{ports.inference} --management http://127.0.0.1:{ports.management}"
    )
    script = serving_script()
    for here, there in (
        ("cadx deploy ", f"cadx deploy {addresses} "),
        ("/var/lib/cadx", str(served)),
        ("--token-minutes", f"--port {ports.inference} --token-minutes"),
        ("/models", str(models)),
        ("/token/", f"{home}/token/"),
        ("/tmp/ready", str(ready)),
    ):
        assert here in script
        script = script.replace(here, there)
    (home / "token").mkdir(parents=True)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    with (home / "said").open("w") as said:
        process = subprocess.Popen(
            ["sh", "-c", script], cwd=ROOT, env=environment, stdout=said, stderr=said, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 900
        while not ready.exists():
            assert process.poll() is None, (home / "said").read_text()[-3000:]
            assert time.monotonic() < deadline, (home / "said").read_text()[-3000:]
            time.sleep(0.2)
        yield served, f"http://127.0.0.1:{ports.inference}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_all_that_a_pod_needs_arrives_and_nothing_else(
    first: Packaged,  # noqa: F811
    tmp_path: Path,
) -> None:
    record = bring(first, tmp_path / "models")
    models = tmp_path / "models"
    assert {path.name for path in models.iterdir() if path.name != ".lock"} == PARTS
    assert record["bundle"] == Bundle(models / "bundle").digest == Bundle(first.bundle).digest
    assert digest_path(models / "dataset") == digest_path(first.dataset)
    assert record["archive"] == digest_path(models / "model.mar")
    closed = [path for path in models.rglob("*") if path.is_file() and path.stat().st_mode & 0o044 != 0o044]
    assert closed in ([], [models / ".lock"]), "a pod runs as another user than whoever delivers"


def test_a_dataset_that_is_there_is_not_copied_again(first: Packaged, tmp_path: Path) -> None:  # noqa: F811
    models = tmp_path / "models"
    bring(first, models)
    before = (models / "dataset").stat().st_ino
    (models / "model.mar").write_bytes(b"an older one")
    bring(first, models)
    assert (models / "dataset").stat().st_ino == before
    assert digest_path(models / "model.mar") == digest_path(first.folder / "model.mar")


def test_what_is_not_promoted_or_does_not_belong_together_never_arrives(
    first: Packaged,  # noqa: F811
    tmp_path: Path,
) -> None:
    models = tmp_path / "models"
    decided = json.loads((first.folder / "decision.json").read_text())
    for change, message in (
        ({"promote": False, "reasons": ["auc is 0.4"]}, "refused by the gate: auc is 0.4"),
        ({"bundle": "sha256:" + "0" * 64}, "about another bundle than"),
        ({"metrics": "sha256:" + "0" * 64}, "rests on other numbers than"),
    ):
        write_json(tmp_path / "decision.json", decided | change)
        with pytest.raises(ValueError, match=message) as caught:
            bring(first, models, decision=tmp_path / "decision.json")
        assert "\n" not in str(caught.value)
    assert not models.exists()
    with locked(models / ".lock", ""), pytest.raises(ValueError, match="another model is being delivered"):
        bring(first, models)


@pytest.mark.parametrize("body", [b"[1]", b"null", b"{}", b"<html>Log in</html>", b'[{"modelVersion": "1"}]'])
def test_who_is_not_the_management_is_told_in_a_line(body: bytes, tmp_path: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        management = Management(f"http://127.0.0.1:{listening.server_port}")
        with pytest.raises(ValueError, match="not TorchServe's management; see to the management") as caught:
            management.roll_back("chest", tmp_path)
        assert "\n" not in str(caught.value)
        listening.shutdown()


@pytest.mark.slow
def test_a_pods_own_commands_serve_what_was_delivered(
    first: Packaged,  # noqa: F811
    tmp_path: Path,
) -> None:
    """The script of deployment.yaml on a real TorchServe; first it meets a volume that is being written."""
    models = tmp_path / "models"
    bring(first, models)
    (models / "decision.json").write_text("{}")
    # The folder's path is part of its sockets', which may not be long.
    home = Path("/tmp") / f"cadx-pod-{os.getpid()}"
    refused = f'until grep -q decision.json "{home}/said" 2>/dev/null; do sleep 0.2; done'
    late = subprocess.Popen(["sh", "-c", f'{refused}; cp "{first.folder}/decision.json" "{models}/"'])
    try:
        with pod(models, home) as (served, address):
            folder = DatasetFolder(first.dataset)
            png = encode_png(folder.pixels(folder.samples["sample_id"].iloc[0]))
            answer = Client(address, "chest", key_file=served / "key_file.json").predict(png)
            assert answer.model.bundle == Bundle(first.bundle).digest
            assert late.wait(60) == 0, "it was refused until all was there"
            keys = json.loads((served / "key_file.json").read_text())
            handed_on = json.loads((home / "token" / "key_file.json").read_text())
            assert handed_on == {"inference": {"key": keys["inference"]["key"]}}, "the gateway sees no other"
    finally:
        late.kill()
        late.wait()
        shutil.rmtree(home, ignore_errors=True)
