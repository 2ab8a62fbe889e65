"""`cadx doctor` tells what is, and what to do."""

import socket
from pathlib import Path

import pytest

from cadx.doctor import checks, examine, port_is_free


def test_a_port_in_use_is_seen() -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        assert not port_is_free(port)
    assert port_is_free(port)


def test_every_complaint_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CADX_DATA_MIRROR", str(tmp_path / "nowhere"))
    monkeypatch.delenv("DO_NOT_TRACK", raising=False)
    found = {check.subject: check for check in checks()}
    assert found["CADX_DATA_MIRROR"].state == "missing"
    assert found["DO_NOT_TRACK"].state == "note"
    assert all(check.remedy for check in found.values() if check.state != "ok")
    assert found["torch"].state == "ok"


def test_a_healthy_machine_passes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CADX_DATA_MIRROR", raising=False)
    assert examine()
    assert "accelerator" in capsys.readouterr().out
