"""Submission: KFP's real client against a stub that holds every request against the published API."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_stub import (
    PASSWORD,
    TOKEN,
    USER,
    Refusal,
    Stub,
    conform,
    conform_cron,
    conform_pipeline,
    kfp_stub,
)

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
        (["predict.unreadable_at_most=2", *SET[1::2]], "--set predict.unreadable_at_most: input should be"),
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
    ("words", "message"),
    [
        ([], "give either --cron"),
        (["--cron", "0 6 * * *", "--interval-s", "60"], "give either --cron"),
        (["--interval-s", "5"], "at least 60"),
        (["--cron", "daily"], "give minute, hour, day, month and weekday"),
        (["--cron", "60 6 * * *"], "minute '60': give 0 to 59"),
        (["--cron", "0 24 * * *"], "hour '24': give 0 to 23"),
        (["--cron", "0 6 0 * *"], "day '0': give 1 to 31"),
        (["--cron", "0 6 * 13 *"], "month '13': give 1 to 12"),
        (["--cron", "0 6 * * 7"], "weekday '7': give 0 to 6"),
        (["--cron", "0 6 * * fri-mon"], "weekday 'fri-mon'"),
        (["--cron", "*/0 6 * * *"], "minute '*/0'"),
        (["--cron", "0 6 L * *"], "day 'l'"),
    ],
)
def test_no_schedule_without_a_time_and_nobody_is_asked(
    words: list[str], message: str, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cadx("schedule", str(compiled), "--endpoint", "http://127.0.0.1:1", *words, *SET) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "line", ["*/5 8-18 * jan,mar mon-fri", "30 0 6 1,15 * ?", "0 0 31 DEC *", "0-30/10 * * * 0"]
)
def test_the_cron_lines_of_kubeflow_are_taken(line: str) -> None:
    taken = cluster.checked_times(line, 0)["cron_expression"]
    assert taken == (line if line.count(" ") == 5 else f"0 {line}")


def test_the_stub_refuses_a_cron_line_as_kubeflow_does() -> None:
    conform_cron("0 0 6 * * *")
    for line in ("0 6 * * *", "0 60 6 * * *", "0 0 6 * * 7", "0 0 6 L * *"):
        with pytest.raises(Refusal, match="cron"):
            conform_cron(line)


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
    stub.courses = [{"ingest": "SUCCEEDED", "bundle": "SUCCEEDED", "predict": "FAILED", "gate": "PENDING"}]
    stub.log = {
        "bundle": "ready\n",
        "predict(0)": "lost\n",
        "predict(1)": "reading\ncadx predict: --images: no file in it\n",
    }
    assert cadx("logs", run_id, "--endpoint", stub.url) == 0
    assert capsys.readouterr().out.splitlines() == [
        "ingest | (no log: from the cache, or its pod is gone)",
        "bundle | ready",
        *("predict | lost", "predict | reading", "predict | cadx predict: --images: no file in it"),
        "gate | (no log: it has not begun)",
    ]
    assert cadx("logs", run_id, "--task", "predict", "--endpoint", stub.url) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert cadx("logs", run_id, "--task", "train", "--endpoint", stub.url) == 1
    assert "has no task 'train'; it has: ingest, bundle, predict" in capsys.readouterr().err
    stub.courses = [{}]
    assert cadx("logs", run_id, "--endpoint", stub.url) == 1
    assert f"has no task yet; `cadx status {run_id}` tells" in capsys.readouterr().err


LOG_IN = (302, b"", "text/html", "/dex/auth?client_id=kubeflow")
PAGES = [
    (200, b"<html>Log in</html>", "text/html", ""),
    *((200, text, "application/json", "") for text in (b"null", b"[1]")),
]


@pytest.mark.parametrize("said", [*PAGES, LOG_IN, (200, b"{}", "application/json", "")])
def test_what_is_no_answer_of_kubeflow_is_no_success(
    said: tuple[int, bytes, str, str],
    stub: Stub,
    compiled: Path,
    run_id: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stub.instead = dict.fromkeys(("/runs", "/recurringruns", f"/runs/{run_id}"), said)
    for words in (
        ["submit", str(compiled), *SET],
        ["schedule", str(compiled), "--interval-s", "60", *SET],
        ["status", run_id, "--follow"],
        ["logs", run_id],
    ):
        assert cadx(*words, "--endpoint", stub.url) == 1
        shown = capsys.readouterr()
        assert not shown.out
        assert shown.err.count("\n") == 1
        expected = (
            "asks for a log-in; set CADX_KFP_TOKEN" if said is LOG_IN else "is not Kubeflow Pipelines' API"
        )
        assert expected in shown.err
    stub.instead = {"/experiments": said}
    assert cadx("submit", str(compiled), *SET, "--endpoint", stub.url) == 1
    assert len(stub.runs) == 1, "that of the fixture"


def test_a_run_without_a_state_and_the_page_of_a_log_in_are_told_of(
    stub: Stub, run_id: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stub.instead = {f"/runs/{run_id}": (200, b'{"run_id": "x"}', "application/json", "")}
    assert cadx("status", run_id, "--follow", "--endpoint", stub.url) == 1
    assert "is not Kubeflow Pipelines' API" in capsys.readouterr().err
    stub.courses, stub.instead = [{"predict": "FAILED"}], {"/log": PAGES[0]}
    assert cadx("logs", run_id, "--endpoint", stub.url) == 1
    assert "if it is the page of a log-in, get a new token" in capsys.readouterr().err
    stub.instead = {"/log": LOG_IN}
    monkeypatch.setenv("CADX_KFP_COOKIE", "authservice_session=old")
    assert cadx("logs", run_id, "--endpoint", stub.url) == 1
    assert "asks for a log-in: the session has ended; get a new token or cookie" in capsys.readouterr().err


def test_an_endpoint_that_stalls_is_not_waited_for(
    stub: Stub, compiled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "TIMEOUT_S", 0.2)
    stub.stalls = True
    assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 1
    error = capsys.readouterr().err
    assert "no answer within 0.2 s" in error
    assert error.count("\n") == 1


def test_missing_rights_are_told_with_what_the_server_says(
    stub: Stub, compiled: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b'{"message": "User x is not authorized to create runs"}'
    stub.instead = {"/runs": (403, body, "application/json", "")}
    for token, message in (
        (
            "",
            "403: nobody has no right to this (User x is not authorized to create runs); set CADX_KFP_TOKEN",
        ),
        (
            "t",
            "403: the account has no right to this (User x is not authorized to create runs); see to its role",
        ),
    ):
        monkeypatch.setenv("CADX_KFP_TOKEN", token)
        assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("token", ["secret-1\n", "gr\u00fcn"])
def test_a_token_that_no_header_takes_is_refused_and_not_shown(
    token: str,
    stub: Stub,
    compiled: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CADX_KFP_TOKEN", token)
    assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 1
    error = capsys.readouterr().err
    assert "CADX_KFP_TOKEN: holds a line break or another character that no header takes" in error
    assert token.strip() not in error


@pytest.mark.parametrize("endpoint", ["http://", "localhost:8888", "http://localhost:abc", "ftp://localhost"])
def test_what_is_no_address_is_refused(
    endpoint: str, compiled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cadx("submit", str(compiled), "--endpoint", endpoint, *SET) == 1
    assert f"endpoint {endpoint!r}: give --endpoint" in capsys.readouterr().err


def test_a_file_that_is_no_pipeline_is_named(
    stub: Stub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photo.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    assert cadx("submit", str(tmp_path / "photo.yaml"), "--endpoint", stub.url) == 1
    assert "photo.yaml: no compiled pipeline; write one with `cadx compile`" in capsys.readouterr().err


def test_a_bearer_token_comes_from_the_environment(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with kfp_stub(wants="bearer") as stub:
        assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 1
        assert "401: asks who you are (no); set CADX_KFP_TOKEN" in capsys.readouterr().err
        monkeypatch.setenv("CADX_KFP_TOKEN", "another")
        assert cadx("submit", str(compiled), "--endpoint", stub.url, *SET) == 1
        assert (
            "401: the token or cookie is not accepted (no); get a new token or cookie"
            in capsys.readouterr().err
        )
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


@pytest.mark.parametrize("name", ["Phantom X-Ray", "../../etc", ""])
def test_a_name_that_no_model_can_bear_is_refused_before_anything_is_trained(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / "training.yaml"
    compile_experiment("phantom-xray", path, params=ROOT / "params.yaml", image=IMAGE)
    assert cluster.checked_arguments(path, ["experiment=other-1"]) == {"experiment": "other-1"}
    with pytest.raises(ValueError, match="experiment") as caught:
        cluster.checked_arguments(path, [f"experiment={name}"])
    assert "\n" not in str(caught.value)


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
