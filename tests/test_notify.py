"""The end of a run told to a webhook: by the command that stands in the compiled pipeline, to a server on loopback."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from components.contract import ROOT
from components.notify import notify
from pipelines import compile_experiment

FAILED = {
    "state": "FAILED",
    "pipelineJobResourceName": "projects/1/locations/here/pipelineJobs/phantom-xray-x7k2p",
    "pipelineTaskName": "exit-handler-1",
    "error": {"code": 9, "message": "cadx ingest: Mueller_Anna_19510303.dcm: no pixels"},
}


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What a webhook on loopback has been told; its address stands where Kubernetes puts the secret."""
    told: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        monkeypatch.setenv("CADX_WEBHOOK", f"http://127.0.0.1:{listening.server_port}/hook/of-this-run-only")
        yield told
        listening.shutdown()


def test_the_compiled_command_tells_how_a_run_ended_and_nothing_of_what_was_in_it(
    receiver: list[dict[str, Any]], tmp_path: Path
) -> None:
    compile_experiment(
        "phantom-xray",
        tmp_path / "p.yaml",
        params=ROOT / "params.yaml",
        image="cadx",
        pipeline="inference",
        notify=True,
    )
    spec, platform = yaml.safe_load_all((tmp_path / "p.yaml").read_text())
    container = spec["deploymentSpec"]["executors"]["exec-notify"]["container"]
    values = {
        "{{$.outputs.artifacts['notification'].path}}": str(tmp_path / "notification"),
        "{{$.inputs.parameters['experiment']}}": "phantom-xray",
        "{{$.inputs.parameters['status']}}": json.dumps(FAILED),
        "{{$.inputs.parameters['params']}}": json.dumps(
            spec["root"]["inputDefinitions"]["parameters"]["notify"]["defaultValue"]
        ),
    }
    *words, option, _ = [values.get(word, word) for word in [*container["command"], *container["args"]]]
    assert option == "--executor-input"
    done = subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, check=True, capture_output=True, text=True
    )
    message = {"schema": 1, "experiment": "phantom-xray", "run": "phantom-xray-x7k2p", "state": "FAILED"}
    assert receiver == [message]
    assert json.loads((tmp_path / "notification").read_text()) == message | {"told": True}
    assert "of-this-run-only" not in done.stdout + done.stderr
    # It runs however the rest ends, and its address comes from a secret.
    tasks = spec["root"]["dag"]["tasks"]
    assert tasks["notify"]["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    status = tasks["notify"]["inputs"]["parameters"]["status"]
    assert status == {"taskFinalStatus": {"producerTask": "exit-handler-1"}}
    assert set(tasks) == {"exit-handler-1", "notify"}
    secrets = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]["exec-notify"]["secretAsEnv"]
    assert secrets[0]["keyToEnv"] == [{"envVar": "CADX_WEBHOOK", "secretKey": "url"}]


def tell(tmp_path: Path, state: str, **params: str) -> dict[str, Any]:
    path = tmp_path / "notification"
    notify(notification=path, experiment="e", status=json.dumps({"state": state}), params=json.dumps(params))
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def test_a_success_is_told_unless_only_failures_are(receiver: list[dict[str, Any]], tmp_path: Path) -> None:
    assert not tell(tmp_path, "SUCCEEDED", when="failure")["told"]
    assert receiver == []
    assert tell(tmp_path, "SUCCEEDED")["told"]
    assert tell(tmp_path, "CANCELLED", when="failure")["told"]
    assert [message["state"] for message in receiver] == ["SUCCEEDED", "CANCELLED"]


@pytest.mark.parametrize("address", ["", "chat.example/secret-hook", "http://127.0.0.1:9/secret-hook"])
def test_a_webhook_that_is_none_is_named_without_its_address(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(os.environ, "CADX_WEBHOOK", address)
    with pytest.raises(
        ValueError, match=r"CADX_WEBHOOK: not an http|webhook at 127\.0\.0\.1: .*not taken"
    ) as caught:
        tell(tmp_path, "FAILED")
    assert "secret-hook" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_status_that_is_not_kubeflows_is_refused(receiver: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--status: not what Kubeflow gives of a run"):
        notify(notification=tmp_path / "n", experiment="e", status="{{$}}", params="{}")
    assert receiver == []
