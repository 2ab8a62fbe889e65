"""Writes that appear whole or not at all, also beside each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cadx.files import read_json, read_json_lines, replacing


def test_two_processes_that_write_one_path_leave_the_later_one_whole(tmp_path: Path) -> None:
    target = tmp_path / "made.json"
    other = (
        "import sys; from pathlib import Path; from cadx.files import read_json, read_json_lines, replacing\n"
        "with replacing(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('theirs'); print('writing', flush=True); sys.stdin.readline()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", other, str(target)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    with replacing(target) as partial:
        partial.write_text("ours")
    assert target.read_text() == "ours"
    process.communicate("\n")
    assert process.returncode == 0
    assert target.read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["made.json"]


def test_what_a_killed_process_left_is_cleared_also_where_it_was_put_into_place_twice(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".a.json.{dead.pid}.partial", f"..a.json.{dead.pid}.partial.{dead.pid}.partial"):
        (tmp_path / name).write_text("half")
    with replacing(tmp_path / "a.json") as partial:
        partial.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    said = "pipe: neither a file nor a folder stands there"
    with pytest.raises(ValueError, match=said), replacing(tmp_path / "pipe") as partial:
        partial.write_text("numbers")
    assert (tmp_path / "pipe").is_fifo()


def test_a_file_takes_no_folders_place(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/1.png").write_bytes(b"kept")
    said = "images: a folder stands there; name a file"
    with pytest.raises(ValueError, match=said), replacing(tmp_path / "images") as partial:
        partial.write_text("numbers")
    assert (tmp_path / "images/1.png").read_bytes() == b"kept"
    assert [path.name for path in tmp_path.iterdir()] == ["images"]


def test_a_report_that_was_cut_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"n": 3')
    with pytest.raises(ValueError, match=r"metrics\.json: not JSON .*; run the step that makes it again"):
        read_json(tmp_path / "metrics.json")
    (tmp_path / "uses.jsonl").write_text('{"seed": 0}\n{"seed": 1}\n')
    assert read_json_lines(tmp_path / "uses.jsonl") == [{"seed": 0}, {"seed": 1}]
