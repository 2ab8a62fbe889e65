"""Logs as workers leave them, the tables made of them day by day, and labels as clinics send them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cadx.drift import STATISTICS
from cadx.request_log import compact, read_labels, read_requests, unmatched
from cadx.types import Digest, Task

BUNDLE, OTHER = (Digest("sha256:" + digit * 64) for digit in "12")


def request_line(number: int, **changes: Any) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "prediction_id": f"{number:032x}",
        "time": f"2026-03-04T05:06:{number:02d}.500Z",
        "model": "m",
        "version": "1" * 12,
        "bundle": BUNDLE,
        "site": "north",
        "scanner": "",
        "statistics": dict.fromkeys(STATISTICS, number / 100),
        "embedding": [0.5, number],
        "probabilities": {"well": 0.75, "sick": 0.25},
        "decision": "well",
        "warnings": ["unusual image"] * (number % 2),
        "timing_ms": {"total": 1.0},
    } | changes


def write_log(folder: Path, name: str, *lines: dict[str, Any], end: str = "") -> None:
    (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines) + end, encoding="utf-8")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    (tmp_path / "log").mkdir()
    return tmp_path / "log"


@pytest.fixture
def tables(tmp_path: Path) -> Path:
    return tmp_path / "tables"


def test_a_log_comes_back_by_time_with_the_columns_of_a_bundles_answers(log: Path, tables: Path) -> None:
    write_log(log, "b.jsonl", request_line(3), request_line(1))
    write_log(log, "a.jsonl", request_line(2, decision="sick", prediction_set=["well", "sick"], refer=True))
    (log / "notes.txt").write_text("no log")
    assert compact(log, tables)[:2] == (0, 0)
    frame = read_requests(tables, BUNDLE)
    assert list(frame) == [
        "prediction_id", "time", "site", "scanner", *(f"stat_{name}" for name in STATISTICS),
        "prob_well", "prob_sick", "decision", "embedding", "num_warnings", "prediction_set", "refer",
    ]  # fmt: skip
    assert frame["prediction_id"].tolist() == [f"{number:032x}" for number in (1, 2, 3)]
    assert frame["time"].iloc[0] == pd.Timestamp("2026-03-04T05:06:01.5", tz="UTC")
    assert frame["stat_p50"].tolist() == [0.01, 0.02, 0.03]
    assert frame["decision"].tolist() == ["well", "sick", "well"]
    assert frame["num_warnings"].tolist() == [1, 0, 1]
    assert frame["prediction_set"].notna().tolist() == [False, True, False]
    assert list(frame["prediction_set"][1]) == ["well", "sick"]
    assert frame["refer"].tolist() == [False, True, False]
    np.testing.assert_array_equal(np.stack(frame["embedding"].to_list())[:, 1], [1, 2, 3])


def test_decisions_of_many_labels_are_a_column_each(log: Path, tables: Path) -> None:
    write_log(log, "a.jsonl", request_line(1, decision=["sick"]), request_line(2, decision=[]))
    compact(log, tables)
    frame = read_requests(tables, BUNDLE)
    assert "decision" not in frame
    assert frame["decision_sick"].tolist() == [True, False]
    assert frame["decision_well"].tolist() == [False, False]


def test_of_boxes_the_called_ones_are_counted(log: Path, tables: Path) -> None:
    boxes = [
        {"class": "sick", "score": s, "box_xyxy": [0, 0, 1, 1], "called": s > 0.3} for s in (0.9, 0.4, 0.1)
    ]
    write_log(log, "a.jsonl", request_line(1, decision=["sick"], boxes=boxes, embedding=[]))
    compact(log, tables)
    frame = read_requests(tables, BUNDLE)
    assert frame["num_boxes"].tolist() == [2]
    assert frame["embedding"].map(len).tolist() == [0]


def test_each_day_of_each_bundle_is_a_table_and_only_new_lines_are_read(log: Path, tables: Path) -> None:
    later = {"time": "2026-03-05T00:00:00.000Z"}
    write_log(log, "a.jsonl", request_line(1), request_line(2, **later), request_line(3, bundle=OTHER))
    assert compact(log, tables).requests == {"1" * 12: 2, "2" * 12: 1}
    assert sorted(f.relative_to(tables).as_posix() for f in tables.rglob("*.parquet")) == [
        "111111111111/2026-03-04.parquet", "111111111111/2026-03-05.parquet", "222222222222/2026-03-04.parquet",
    ]  # fmt: skip
    untouched = tables / ("1" * 12) / "2026-03-04.parquet"
    before = untouched.stat().st_mtime_ns
    with (log / "a.jsonl").open("a") as stream:
        stream.write(json.dumps(request_line(4, **later)) + "\n")
    assert compact(log, tables).requests["1" * 12] == 3
    assert untouched.stat().st_mtime_ns == before
    assert read_requests(tables, BUNDLE, last=2)["prediction_id"].tolist() == [f"{n:032x}" for n in (2, 4)]


def test_a_line_on_its_way_is_read_once_it_is_whole(log: Path, tables: Path) -> None:
    text = json.dumps(request_line(2)) + "\n"
    write_log(log, "a.jsonl", request_line(1), end=text[:50])
    assert compact(log, tables)[:2] == (1, 0)
    with (log / "a.jsonl").open("a") as stream:
        stream.write(text[50:])
    assert compact(log, tables) == (0, 0, {"1" * 12: 2})


def test_a_log_read_anew_adds_nothing_twice(log: Path, tables: Path) -> None:
    write_log(log, "a.jsonl", *(request_line(n) for n in range(5)))
    compact(log, tables)
    write_log(log, "a.jsonl", request_line(0), request_line(9))  # moved away, and begun anew
    assert compact(log, tables).requests == {"1" * 12: 6}
    (tables / "state.json").unlink()
    assert compact(log, tables).requests == {"1" * 12: 6}


def test_a_file_that_took_anothers_name_is_read_from_its_start(log: Path, tables: Path) -> None:
    write_log(log, "a.jsonl", *(request_line(n) for n in range(3)))
    compact(log, tables)
    (log / "a.jsonl").rename(log / "a.1")
    write_log(
        log, "a.jsonl", *(request_line(n) for n in range(10, 20))
    )  # grows past where the first one ended
    assert compact(log, tables).requests == {"1" * 12: 13}
    state = json.loads((tables / "state.json").read_text())
    del state["files"]["a.jsonl"]["first"]  # as it was kept before
    (tables / "state.json").write_text(json.dumps(state))
    with (log / "a.jsonl").open("a") as stream:
        stream.write(json.dumps(request_line(20)) + "\n")
    assert compact(log, tables) == (0, 0, {"1" * 12: 14})
    write_log(log, "a.jsonl", *(request_line(n) for n in range(30, 59)))
    assert compact(log, tables).requests == {"1" * 12: 43}, "known again from the look before on"


def test_a_file_that_was_renamed_goes_on_where_it_stood(log: Path, tables: Path) -> None:
    write_log(log, "w.jsonl", *(request_line(n) for n in range(20)))
    compact(log, tables)
    with (log / "w.jsonl").open("a") as stream:  # after the last look
        stream.write(json.dumps(request_line(20)) + "\n")
    (log / "w.jsonl").rename(log / "w.1.jsonl")
    write_log(log, "w.jsonl", *(request_line(n) for n in range(30, 33)))
    assert compact(log, tables) == (0, 0, {"1" * 12: 24})


@pytest.mark.parametrize("cut", [1, 40, -1, "half a letter"])
def test_a_line_cut_short_is_skipped_and_counted(log: Path, tables: Path, cut: int | str) -> None:
    line = json.dumps(request_line(2, site="Zürich"), ensure_ascii=False).encode()
    torn = line[: line.index(b"\xc3") + 1] if isinstance(cut, str) else line[:cut]
    write_log(log, "a.jsonl", request_line(1))
    with (log / "a.jsonl").open("ab") as stream:
        stream.write(torn)
    write_log(log, "b.jsonl", request_line(3))
    assert compact(log, tables) == (1, 0, {"1" * 12: 2})


def test_lines_of_other_bundles_and_repeated_ones_are_counted(log: Path, tables: Path) -> None:
    write_log(log, "a.jsonl", request_line(1), request_line(1), request_line(2, bundle=OTHER))
    write_log(log, "b.jsonl", request_line(1), request_line(3), request_line(4, bundle=OTHER))
    assert compact(log, tables) == (0, 2, {"1" * 12: 2, "2" * 12: 2})
    assert read_requests(tables, BUNDLE)["prediction_id"].tolist() == [f"{n:032x}" for n in (1, 3)]
    assert read_requests(tables, Digest("sha256:" + "3" * 64)).empty


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "line 2 is no request of schema_version 1"),
        ({"statistics": {"mean": 0.5}}, "line 2 has no 'std'"),
        ({"probabilities": {"well": "Smith, John", "sick": 0.5}}, r"line 2 is not of the log's form"),
        ({"embedding": [float("nan"), 1]}, r"line 2 is not of the log's form"),
        ({"time": "yesterday"}, r"line 2 is not of the log's form"),
        ({"time": "2026-03-04T05:06:07"}, r"line 2 is not of the log's form"),
        ({"bundle": "sha256:../../etc"}, r"line 2 is not of the log's form"),
        ({"site": "Smith\ud800"}, r"line 2 is not of the log's form"),
        ({"prediction_set": ["Smith\ud800"]}, r"line 2 is not of the log's form"),
        ({"probabilities": {"well": 10**400, "sick": 0.5}}, r"line 2 is not of the log's form"),
        ({"embedding": [10**400]}, r"line 2 is not of the log's form"),
        ({"embedding": [[0.5, 1]]}, r"line 2 is not of the log's form"),
    ],
)
def test_a_whole_line_of_another_form_is_refused_where_it_stands(
    log: Path, tables: Path, changes: dict[str, Any], message: str
) -> None:
    write_log(log, "a.jsonl", request_line(1), request_line(2, **changes))
    with pytest.raises(ValueError, match=rf"a\.jsonl: {message}") as caught:
        compact(log, tables)
    assert "\n" not in str(caught.value)
    assert "Smith" not in str(caught.value)
    assert not tables.exists()


def test_a_line_nested_too_deeply_is_refused_where_it_stands(log: Path, tables: Path) -> None:
    (log / "a.jsonl").write_text(json.dumps(request_line(1)) + "\n" + "[" * 100_000 + "\n")
    with pytest.raises(
        ValueError, match=r"a\.jsonl: line 2 is no request of schema_version 1; move the file away"
    ):
        compact(log, tables)


@pytest.mark.parametrize(
    "state",
    [
        *("", "{", "{}", "[]", "7", '{"schema": 1, "files": {}, "torn": 0}', "[" * 100_000),
        '{"schema": 2, "files": {}, "torn": 0, "duplicates": 0}',
        '{"schema": 1, "files": {"a.jsonl": {"lines": "x"}}, "torn": 0, "duplicates": 0}',
        '{"schema": 1, "files": {"a.jsonl": {"bytes": -5, "lines": 0}}, "torn": 0, "duplicates": 0}',
        "\ud800",
    ],
)
def test_a_damaged_state_is_named_with_what_to_do(log: Path, tables: Path, state: str) -> None:
    write_log(log, "a.jsonl", request_line(1))
    compact(log, tables)
    (tables / "state.json").write_text(state, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(
        ValueError, match=r"state\.json: not of this form; remove the folder, it is made anew"
    ) as caught:
        compact(log, tables)
    assert "\n" not in str(caught.value)


def test_a_damaged_table_is_named_with_what_to_do(log: Path, tables: Path) -> None:
    write_log(log, "a.jsonl", request_line(1))
    compact(log, tables)
    write_log(log, "b.jsonl", request_line(2))
    (table,) = tables.glob("*/*.parquet")
    whole = table.read_bytes()
    page = whole[:40] + bytes(100) + whole[140:]  # its end, which says what is where, is as it was
    for damaged in (b"", whole[: len(whole) // 2], whole[:-1], page, b"no table"):
        table.write_bytes(damaged)
        for call in (
            lambda: compact(log, tables),
            lambda: read_requests(tables, BUNDLE),
            lambda: unmatched(tables, ["a"]),
        ):
            with pytest.raises(
                ValueError, match=r"-04\.parquet: damaged; remove the folder .*tables, it"
            ) as caught:
                call()
            assert "\n" not in str(caught.value)
    shutil.rmtree(tables)
    assert compact(log, tables).requests == {"1" * 12: 2}


# --- Labels -------------------------------------------------------------------------------------------


def test_labels_come_from_tables_of_either_form_and_a_folder_of_them(tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    first = pd.DataFrame({"prediction_id": ["0012", "b"], "label_well": [0, 1], "label_sick": [1, None]})
    first.to_csv(tmp_path / "labels" / "march.csv", index=False)
    pd.DataFrame({"prediction_id": ["c"], "label_sick": [0]}).to_parquet(
        tmp_path / "labels" / "april.parquet"
    )
    found = read_labels(tmp_path / "labels", ["well", "sick"], "binary").set_index("prediction_id")
    assert set(found.index) == {"0012", "b", "c"}, "a number-like id keeps its zeros"
    assert found.loc["0012"].tolist() == [0, 1]
    assert found.loc["b"].tolist() == [1, 0], "a class that holds rules the other out"
    assert found.loc["c"].tolist() == [1, 0], "of two classes one says both"


def test_damaged_labels_are_named(tmp_path: Path) -> None:
    file = tmp_path / "labels.parquet"
    pd.DataFrame({"prediction_id": [f"{n:032x}" for n in range(50)], "label_sick": 1}).to_parquet(file)
    whole = file.read_bytes()
    for damaged in (whole[:-9], whole[:40] + bytes(100) + whole[140:]):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"labels\.parquet: neither CSV nor Parquet"):
            read_labels(file, ["well", "sick"], "binary")


def test_what_one_file_of_labels_leaves_empty_another_tells(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("prediction_id,label_stripe,label_dot\na,,\nb,1,\nc,,0\n")
    (tmp_path / "2.csv").write_text("prediction_id,label_stripe,label_dot\na,0,1\nb,,0\nc,,\nd,,\n")
    found = read_labels(tmp_path, ["stripe", "dot"], "multilabel").set_index("prediction_id")
    assert found.fillna(-1).T.to_dict("list") == {"a": [0, 1], "b": [1, 0], "c": [-1, 0], "d": [-1, -1]}


@pytest.mark.parametrize("task", ["multilabel", "detection"])
def test_of_two_findings_one_says_nothing_of_the_other(tmp_path: Path, task: Task) -> None:
    (tmp_path / "labels.csv").write_text("prediction_id,label_stripe\na,1\n")
    with pytest.raises(ValueError, match="no column label_dot"):
        read_labels(tmp_path / "labels.csv", ["stripe", "dot"], task)


def test_of_classes_that_exclude_each_other_a_request_has_one(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text(
        "prediction_id,label_well,label_sick,label_dead\na,0,1,0\nb,1,,\nc,0,0,\n"
    )
    classes = ["well", "sick", "dead"]
    found = read_labels(tmp_path, classes, "multiclass").set_index("prediction_id").fillna(-1)
    assert found.T.to_dict("list") == {"a": [0, 1, 0], "b": [1, 0, 0], "c": [0, 0, -1]}
    for row in ("b,,1,", "d,1,1,", "d,0,0,0", "c,,,0"):
        (tmp_path / "2.csv").write_text(f"prediction_id,label_well,label_sick,label_dead\n{row}\n")
        where = "2.csv" if row[0] == "d" else tmp_path.name
        with pytest.raises(ValueError, match=rf"{where}: a request is of several classes or of none"):
            read_labels(tmp_path, classes, "multiclass")
        assert len(read_labels(tmp_path, classes, "multilabel")) in (3, 4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "prediction_id,label_sick\na,1\n,0\n",
            r"labels\.csv: 1 rows without prediction_id",
        ),
        (
            "prediction_id,label_well,label_sick\na,0,1\nDoe,1,1\n",
            r"labels\.csv: a request is of several",
        ),
        (
            "prediction_id,label_well,label_sick\na,0,1\n" + 32 * "b" + ",0,0\n",
            r"labels\.csv: prediction_id b{32} is of several",
        ),
        ("prediction_id,label_sick\na,2\n", "neither 0 nor 1"),
        ("prediction_id,label_sick\na,Smith\n", "neither 0 nor 1"),
        ("id,label_sick\na,1\n", "no column prediction_id"),
        ("prediction_id,sick\na,1\n", "no column label_well, label_sick"),
        ("prediction_id,label_sick\na,1\na,0\n", "1 requests have two different labels"),
        ("", "neither CSV nor Parquet"),
    ],
)
def test_labels_that_cannot_be_right_are_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "labels.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        read_labels(tmp_path / "labels.csv", ["well", "sick"], "binary")
    assert "\n" not in str(caught.value)
    assert "Smith" not in str(caught.value)
