"""The registry of champions, on a real SQLite file and a real server: who may become one, and what the gate gets."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from test_comparing import scored

from cadx.comparing import read_scored
from cadx.files import digest_path, write_json
from cadx.gating import Check, Decision
from cadx.registry import Registry, show_history
from cadx.types import Digest

pytest.importorskip("mlflow", reason="of the extra 'registry'")


def judged(
    folder: Path, *, seed: int, promote: bool = True, champion: Digest | None = None
) -> dict[str, Path]:
    """What `evaluate` and `gate` leave of a model."""
    folder.mkdir()
    files = {name: folder / f"{name}.json" for name in ("metrics", "decision")}
    files["predictions"] = scored(folder / "predictions.parquet", skill=2, seed=seed)
    info = read_scored(files["predictions"]).info
    digest = digest_path(files["predictions"])
    auc = {"value": 0.9, "low": 0.8, "high": 0.95, "n": 300, "method": "DeLong"}
    record = {
        "schema": 1, "experiment": "squares", "seed": seed, "split": "test", "bundle": info.bundle, "dataset": digest,
        "splits": digest, "predictions": digest, "n": 300, "n_patients": 300, "clustered": False, "warnings": [],
        "metrics": {"auc": auc}, "by_subgroup": {},
    }  # fmt: skip
    write_json(files["metrics"], record)
    check = Check(what="AUC", passed=promote, reason="AUC is too low")
    decision = Decision(
        experiment="squares", seed=seed, split="test", promote=promote, reasons=() if promote else (check.reason,),
        checks=(check,), bundle=info.bundle, metrics=digest_path(files["metrics"]),
        champion=champion,
    )  # fmt: skip
    write_json(files["decision"], decision.model_dump(mode="json"))
    return files


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


def test_the_champion_changes_and_the_history_stays(
    address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(address)
    assert registry.champion("squares") is None
    with pytest.raises(ValueError, match="squares: no champion in sqlite"):
        registry.export("squares", tmp_path / "champion.parquet")
    assert not (tmp_path / "champion.parquet").exists()

    first = judged(tmp_path / "1", seed=1)
    made = registry.promote("squares", **first)
    second = judged(tmp_path / "2", seed=2, champion=made.bundle)
    assert (made.version, made.seed, made.is_current) == (1, 1, True)
    assert made.metrics == {"auc": 0.9, "auc_low": 0.8, "auc_high": 0.95}
    assert registry.promote("squares", **first).version == 1, "it is the champion already"
    registry.promote("squares", **second)

    again = Registry(address)  # another process's view
    assert [(one.version, one.is_current) for one in again.history("squares")] == [(1, False), (2, True)]
    exported = again.export("squares", tmp_path / "champion.parquet")
    assert exported.bundle == read_scored(second["predictions"]).info.bundle
    assert (tmp_path / "champion.parquet").read_bytes() == second["predictions"].read_bytes()

    monkeypatch.setenv("COLUMNS", "200")
    show_history(again)
    lines = [line for line in capsys.readouterr().out.splitlines() if "squares" in line]
    assert ["champion" in line for line in lines] == [True, False]


def test_only_what_the_gate_let_through_becomes_champion(address: str, tmp_path: Path) -> None:
    registry = Registry(address)
    before = registry.history("squares")
    refused = judged(tmp_path / "refused", seed=3, promote=False)
    with pytest.raises(ValueError, match="refused by the gate: AUC is too low"):
        registry.promote("squares", **refused)
    with pytest.raises(ValueError, match="is about squares, not circles"):
        registry.promote("circles", **refused)
    good, other = judged(tmp_path / "good", seed=4), judged(tmp_path / "other", seed=5)
    with pytest.raises(ValueError, match="rests on other numbers"):
        registry.promote("squares", **good | {"metrics": other["metrics"]})
    with pytest.raises(ValueError, match=r"not what .* was made from"):
        registry.promote("squares", **good | {"predictions": other["predictions"]})
    assert registry.history("squares") == before


def test_the_champion_is_not_replaced_by_what_the_gate_has_not_compared_with_it(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    first = registry.promote("squares", **judged(tmp_path / "1", seed=1))
    alone = judged(tmp_path / "2", seed=2)
    of_another = judged(tmp_path / "3", seed=3, champion=Digest("sha256:" + 64 * "0"))
    for files in (alone, of_another):
        with pytest.raises(ValueError, match=f"not compared it with the champion, {first.bundle}"):
            registry.promote("squares", **files)
    assert registry.champion("squares") == first
    assert registry.promote("squares", **alone, replace=True).version == 2


def test_predictions_that_were_changed_in_the_registry_are_not_handed_out(tmp_path: Path) -> None:
    registry = Registry(f"sqlite:///{tmp_path}/mlflow.db")
    registry.promote("squares", **judged(tmp_path / "1", seed=1))
    (kept,) = (tmp_path / "artifacts").rglob("predictions.parquet")
    kept.write_bytes(kept.read_bytes() + b"x")
    with pytest.raises(ValueError, match="not those that were registered"):
        registry.export("squares", tmp_path / "champion.parquet")


def test_a_registry_that_cannot_be_opened_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.db").write_text(json.dumps("no database") * 100)
    with pytest.raises(ValueError, match=r"registry sqlite:.*broken\.db: cannot be opened") as caught:
        Registry(f"sqlite:///{tmp_path}/broken.db")
    assert "\n" not in str(caught.value)


def test_to_read_makes_no_registry(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is none; `cadx champion promote` makes it"):
        Registry(f"sqlite:///{tmp_path}/mistyped/mlflow.db", create=False)
    assert not (tmp_path / "mistyped").exists()


# --- A server -----------------------------------------------------------------------------------------


def cadx(*words: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cadx", *map(str, words)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's tracking server on the loopback, its store a SQLite file, which also keeps the artifacts."""
    pytest.importorskip("flask_cors", reason="of the extra 'dev': under MLflow's server")
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    address, log = f"http://127.0.0.1:{port}", folder / "log.txt"
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
        "--backend-store-uri", f"sqlite:///{folder}/mlflow.db", "--artifacts-destination", str(folder / "artifacts"),
    ]  # fmt: skip
    settings = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with log.open("w") as stream:
        running = subprocess.Popen(
            command, cwd=folder, env=os.environ | settings, stdout=stream, stderr=subprocess.STDOUT
        )
    try:
        for _ in range(3000):
            assert running.poll() is None, log.read_text()
            try:
                with urlopen(f"{address}/health", timeout=5):
                    break
            except (URLError, ConnectionError, TimeoutError):
                time.sleep(0.1)
        else:
            pytest.fail(f"MLflow's server does not answer within five minutes:\n{log.read_text()}")
        yield address
    finally:
        running.terminate()
        running.wait(120)


@pytest.mark.slow
def test_a_server_keeps_champions_for_every_machine(server: str, tmp_path: Path) -> None:
    """The commands as on two machines: what one promotes, another shows and exports, knowing the address alone."""
    reports = tmp_path / "reports"
    (reports / "squares").mkdir(parents=True)
    first = judged(reports / "squares/1", seed=1)
    bundle = read_scored(first["predictions"]).info.bundle
    judged(reports / "squares/2", seed=2, champion=bundle)
    judged(reports / "squares/3", seed=3)

    nobody = cadx(
        "champion", "export", "squares", "--output", tmp_path / "none.parquet", "--registry", server
    )
    assert nobody.returncode == 1
    assert nobody.stderr.strip() == (
        f"cadx champion: squares: no champion in {server}; `cadx champion promote` makes one"
    )
    for seed, expected in ((1, 0), (2, 0), (3, 1)):
        done = cadx(
            "champion", "promote", "squares", "--seed", str(seed), "--reports", reports, "--registry", server
        )
        assert done.returncode == expected, done.stderr
    assert "the gate has not compared it with the champion" in done.stderr
    assert "Traceback" not in done.stderr

    shown = cadx("champion", "show", "squares", "--registry", server, COLUMNS="200")
    rows = [line for line in shown.stdout.splitlines() if "squares" in line]
    assert ["champion" in row for row in rows] == [True, False]
    assert "0.900 (0.800 to 0.950)" in rows[0]

    output = tmp_path / "elsewhere" / "champion.parquet"
    output.parent.mkdir()
    exported = cadx("champion", "export", "squares", "--output", output, "--registry", server)
    assert exported.returncode == 0, exported.stderr
    assert output.read_bytes() == (reports / "squares/2/predictions.parquet").read_bytes()
    assert [(one.version, one.seed, one.is_current) for one in Registry(server).history("squares")] == [
        (1, 1, False),
        (2, 2, True),
    ]


def test_a_server_that_does_not_answer_is_named_in_one_line() -> None:
    address = f"http://127.0.0.1:{free_port()}"
    asked = cadx("champion", "show", "--registry", address)
    assert asked.returncode == 1
    assert asked.stderr.strip() == f"cadx champion: registry {address}: cannot be opened: MlflowException"
