"""Submission: KFP's real client against a stub that holds every request against the published API."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_stub import PASSWORD, TOKEN, USER, Refusal, Stub, conform, conform_pipeline, kfp_stub

from cadx.__main__ import main
from pipelines import cluster, compile_experiment

ROOT = Path(__file__).resolve().parent.parent
IMAGE = "registry.example/cadx@sha256:" + "0" * 64
VARIABLES = (
    "KF_PIPELINES_ENDPOINT",
    "CADX_KFP_TOKEN",
    "CADX_KFP_COOKIE",
    "CADX_DEX_USER",
    "CADX_DEX_PASSWORD",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Batch inference, with two parameters that have no default."""
    path = tmp_path_factory.mktemp("compiled") / "inference.yaml"
    compile_experiment("phantom-xray", path, params=ROOT / "params.yaml", image=IMAGE, pipeline="inference")
    return path


@pytest.fixture(autouse=True)
def _nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def stub() -> Iterator[Stub]:
    with kfp_stub() as stub:
        yield stub
        assert not stub.faults


SET = ["--set", "bundle_uri=s3://models/b", "--set", "images_uri=s3://inbox"]


def cadx(*words: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0)


def test_a_run_is_started_with_what_is_set(
    stub: Stub, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ["--set", "predict.unreadable_at_most=0.1", *SET]
    assert cadx("submit", str(compiled), "--endpoint", stub.url, "--name", "night", *said) == 0
    [(run_id, body)] = stub.runs.items()
    assert run_id in capsys.readouterr().out
    assert body["display_name"] == "night"
    assert body["runtime_config"]["parameters"] == {
        "predict": {"unreadable_at_most": 0.1},
        "bundle_uri": "s3://models/b",
        "images_uri": "s3://inbox",
    }
    [experiment] = stub.experiments.values()
    assert experiment.display_name == "cadx"
    assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 0
    assert len(stub.experiments) == 1, "the experiment that is there is used again"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["predikt.unreadable_at_most=1", *SET[1::2]], "has no parameter 'predikt'; did you mean 'predict'?"),
        (["predict.unreadable=1", *SET[1::2]], "unreadable: unknown parameter; did you mean 'unreadable_at_most'?"),
        (["predict.unreadable_at_most=2", *SET[1::2]], "input should be less than or equal to 1"),
        (["images_uri=3", SET[1]], "this parameter is of type STRING"),
        (["bundle_uri.a=3"], "holds a single value, it has no field 'a'"),
        (["bundle_uri"], "give parameter=value"),
        (SET[1:2], "parameter 'images_uri' has no default; give --set images_uri=..."),
    ],
)  # fmt: skip
def test_a_wrong_parameter_is_refused_before_anything_is_sent(
    settings: list[str], message: str, stub: Stub, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word for setting in settings for word in ("--set", setting)]
    assert cadx("submit", str(compiled), "--endpoint", stub.url, *words) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not stub.runs


def test_a_schedule_is_made_by_a_cron_line_or_an_interval(stub: Stub, compiled: Path) -> None:
    assert cadx("schedule", str(compiled), "--endpoint", stub.url, "--cron", "0 6 * * *", *SET) == 0
    assert cadx("schedule", str(compiled), "--endpoint", stub.url, "--interval-s", "3600", *SET) == 0
    first, second = stub.schedules.values()
    assert first["trigger"]["cron_schedule"] == {"cron": "0 0 6 * * *"}
    assert second["trigger"]["periodic_schedule"] == {"interval_second": 3600}
    assert {one["mode"] for one in (first, second)} == {"ENABLE"}
    assert {one["no_catchup"] for one in (first, second)} == {True}
    assert {int(one["max_concurrency"]) for one in (first, second)} == {1}


@pytest.mark.parametrize(
    "words", [[], ["--cron", "0 6 * * *", "--interval-s", "60"], ["--cron", "daily"], ["--interval-s", "5"]]
)
def test_no_schedule_without_a_time(words: list[str], stub: Stub, compiled: Path) -> None:
    assert cadx("schedule", str(compiled), "--endpoint", stub.url, *words, *SET) == 1
    assert not stub.schedules


@pytest.fixture
def run_id(stub: Stub, compiled: Path) -> str:
    arguments = cluster.checked_arguments(compiled, SET[1::2])
    return cluster.submit(
        cluster.connect(stub.url), compiled, name="run", experiment="cadx", arguments=arguments
    )


def test_status_follows_a_run_to_its_end(
    stub: Stub, run_id: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "POLL_S", 0.01)
    stub.courses = [
        {"bundle": "SUCCEEDED", "predict": "RUNNING", "predict#2": "PENDING"},
        {"bundle": "SUCCEEDED", "predict": "RUNNING", "predict#2": "PENDING"},
        {"bundle": "SUCCEEDED", "predict": "SUCCEEDED", "predict#2": "SUCCEEDED"},
    ]
    assert cadx("status", run_id, "--follow", "--endpoint", stub.url) == 0
    assert capsys.readouterr().out.splitlines() == [
        "bundle: succeeded",
        *("predict: running", "predict: pending"),
        *("predict: succeeded", "predict: succeeded"),
        f"run {run_id}: succeeded",
    ]


def test_a_failed_run_ends_in_status_1_and_says_where_to_look(
    stub: Stub, run_id: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stub.courses = [{"predict": "FAILED"}]
    assert cadx("status", run_id, "--endpoint", stub.url) == 1
    shown = capsys.readouterr()
    assert "predict: failed" in shown.out
    assert f"cadx logs {run_id}" in shown.err
    assert cadx("status", "no-such-run", "--endpoint", stub.url) == 1
    assert "404: GET /apis/v2beta1/runs/no-such-run: not found" in capsys.readouterr().err


def test_logs_are_read_by_task(stub: Stub, run_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    stub.courses = [{"bundle": "SUCCEEDED", "predict": "FAILED"}]
    stub.log = {"pod-bundle": "ready\n", "pod-predict": "reading\ncadx predict: --images: no file in it\n"}
    assert cadx("logs", run_id, "--endpoint", stub.url) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "bundle | ready"
    assert lines[-1] == "predict | cadx predict: --images: no file in it"
    assert cadx("logs", run_id, "--task", "predict", "--endpoint", stub.url) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert cadx("logs", run_id, "--task", "train", "--endpoint", stub.url) == 1
    assert "has no task 'train'; it has: bundle, predict" in capsys.readouterr().err


def test_a_bearer_token_comes_from_the_environment(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with kfp_stub(wants="bearer") as stub:
        assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 1
        assert "401: the token or cookie is not accepted" in capsys.readouterr().err
        monkeypatch.setenv("CADX_KFP_TOKEN", TOKEN)
        assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 0
        assert len(stub.runs) == 1


def test_dex_is_logged_in_at_or_given_a_cookie(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with kfp_stub(wants="dex", multi_user=True) as stub:
        words = ["submit", str(compiled), "--endpoint", stub.url, *SET]
        assert cadx(*words) == 1
        assert "asks for a log-in; set CADX_KFP_TOKEN" in capsys.readouterr().err
        monkeypatch.setenv("CADX_DEX_USER", USER)
        monkeypatch.setenv("CADX_DEX_PASSWORD", "wrong-password")
        assert cadx(*words) == 1
        error = capsys.readouterr().err
        assert "user and password were not accepted" in error
        assert "wrong-password" not in error
        monkeypatch.setenv("CADX_DEX_PASSWORD", PASSWORD)
        assert cadx(*words) == 1
        assert "name your profile's with --namespace" in capsys.readouterr().err
        assert cadx(*words, "--namespace", "radiology") == 0
        [experiment] = stub.experiments.values()
        assert experiment.namespace == "radiology"
        monkeypatch.delenv("CADX_DEX_USER")
        monkeypatch.setenv("CADX_KFP_COOKIE", "authservice_session=open")
        assert cadx(*words, "--namespace", "radiology") == 0


def test_in_a_pod_the_service_accounts_token_is_read(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with kfp_stub(wants="bearer") as stub:
        (tmp_path / "token").write_text(TOKEN + "\n")
        monkeypatch.setattr(cluster, "TOKEN_FILE", tmp_path / "token")
        monkeypatch.setattr(cluster, "IN_CLUSTER", stub.url)
        assert cadx("submit", str(compiled), *SET) == 0


def test_who_does_not_answer_is_named(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cadx("submit", str(compiled), *SET) == 1
    assert "kubectl port-forward" in capsys.readouterr().err
    with kfp_stub() as stub:
        gone = stub.url
    assert cadx("submit", str(compiled), "--endpoint", gone, *SET) == 1
    assert "no answer (ConnectionError); is the port forwarded?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "body",
    [
        {"display_nam": "x"},
        {"display_name": 3},
        {"runtime_config": {"parameter": {}}},
        {"state": "GOOD"},
        {"runtime_config": []},
    ],
)
def test_the_stub_refuses_what_the_api_does_not_know(body: dict[str, Any]) -> None:
    with pytest.raises(Refusal):
        conform(body, "V2beta1Run")


def test_a_broken_pipeline_is_refused_here_and_by_the_stub(compiled: Path) -> None:
    broken = compiled.with_name("broken.yaml")
    broken.write_text(compiled.read_text().replace("dag:", "dagg:", 1))
    with pytest.raises(
        ValueError, match=r"broken\.yaml: no compiled pipeline; write one with `cadx compile`"
    ):
        cluster.checked_arguments(broken, SET[1::2])
    spec = next(yaml.safe_load_all(broken.read_text()))
    with pytest.raises(Refusal, match="pipeline_spec"):
        conform_pipeline({"pipeline_spec": spec})
    spec = next(yaml.safe_load_all(compiled.read_text()))
    with pytest.raises(Refusal, match=r"missing \['bundle_uri', 'images_uri'\]"):
        conform_pipeline({"pipeline_spec": spec})
