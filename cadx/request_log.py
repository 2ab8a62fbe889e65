"""The answered requests of a served model: JSON lines as workers write them, and Parquet by bundle and day.

The lines are the raw form: a worker appends one per answer, and nothing changes it. From them `compact` keeps a
table that grows; it can be thrown away and made anew while the lines are there.

    <tables>/<first 12 digits of the bundle's digest>/<day, UTC>.parquet
    <tables>/state.json     how far each file of lines has been read, and the digest of its first line; lines cut short;
                            lines that came twice
"""

import json
import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError

from cadx.drift import STATISTICS
from cadx.files import digest_bytes, replacing, write_json
from cadx.types import Config, Digest, Task

STATE = "state.json"
UNWATCHED = "unwatched"
"""Folder of the answers to golden samples, which deployments send."""


class Logged(NamedTuple):
    """One answer in the request log.

    Attributes:
        file: of lines.
        number: of its line, from 1.
        record: what stands there.
    """

    file: Path
    number: int
    record: dict[str, Any]


class _ReadSoFar(Config):
    """How far a file of lines has been read; the digest of its first line, which older states have not."""

    bytes: int = Field(default=0, ge=0)
    lines: int = Field(default=0, ge=0)
    first: Digest | None = None


class _State(Config):
    version: Literal[1] = Field(default=1, alias="schema")
    files: dict[str, _ReadSoFar]
    torn: int = Field(ge=0)
    duplicates: int = Field(ge=0)


class Compacted(NamedTuple):
    """What there is in a folder of tables, and what was left out.

    Attributes:
        torn: lines cut short, as a worker leaves one that is killed while it writes.
        duplicates: lines with a prediction_id that came before.
        requests: rows by the first 12 digits of their bundle's digest.
    """

    torn: int
    duplicates: int
    requests: dict[str, int]


def compact(log: Path, tables: Path) -> Compacted:
    """Bring the tables up to date with the lines in *.jsonl under `log`; only what was added since is read.

    Servers may have a folder each there. What a deployment sent lies in folders named `unwatched` and is left out. A
    file that has become shorter, or begins otherwise (another has taken its name), is read anew, and one that was
    renamed goes on where it stood: its first line tells. Rows that are there already are not added again.

    Raises:
        ValueError: if a line is whole but not of this form, and the tables stay as they are; or if a table or the state
            is damaged, and the next run reads the same lines again.
    """
    state = _read_state(tables)
    rows: dict[tuple[str, str], list[dict[str, Any]]] = {}
    files, torn, unfinished = dict(state.files), 0, 0
    for file in sorted(log.rglob("*.jsonl")):
        name = file.relative_to(log).as_posix()
        if UNWATCHED in name.split("/")[:-1]:
            continue
        start = state.files.get(name, _ReadSoFar())
        with file.open("rb") as stream:
            first = digest_bytes(stream.readline())
            # States of before first lines were kept have none.
            if file.stat().st_size < start.bytes or start.first not in (None, first):
                start = _ReadSoFar()
            if not start.bytes:  # it may have been moved here: its first line, which has its own id, tells
                size = file.stat().st_size
                moved = [one for one in state.files.values() if one.first == first and one.bytes <= size]
                start = max(moved, key=lambda one: one.bytes, default=start)
            stream.seek(start.bytes)
            *whole, rest = stream.read().split(b"\n")
        # Without its end a line may still be on its way: it is read next time.
        unfinished += bool(rest.strip())
        for number, text in enumerate(whole, start=start.lines + 1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError:  # no JSON, or no UTF-8
                torn += 1
                continue
            except RecursionError:  # nested deeper than any line of a worker
                line = None
            row = check_line(line, f"{file}: line {number}")
            rows.setdefault((short(line["bundle"]), f"{row['time']:%Y-%m-%d}"), []).append(row)
        consumed = start.bytes + sum(len(text) + 1 for text in whole)
        files[name] = _ReadSoFar(bytes=consumed, lines=start.lines + len(whole), first=first)
    duplicates = state.duplicates
    for (bundle, day), added in sorted(rows.items()):
        duplicates += _add(tables / bundle / f"{day}.parquet", added)
    state = _State(files=files, torn=state.torn + torn, duplicates=duplicates)
    write_json(tables / STATE, state.model_dump(by_alias=True))
    counts = {
        folder.name: sum(_num_rows(file) for file in folder.glob("*.parquet"))
        for folder in sorted(tables.iterdir())
        if folder.is_dir()
    }
    return Compacted(state.torn + unfinished, state.duplicates, counts)


def read_requests(
    tables: Path, bundle: Digest, *, last: int | None = None, embeddings: bool = True
) -> pd.DataFrame:
    """The requests that `bundle` answered, a row each, by time; the `last` ones, where a number is given.

    Embeddings are most of a table: without them years of requests fit into memory.

    Columns: `prediction_id`, `time` (UTC), `site`, `scanner` ("" = unknown), `stat_<name>`, `prob_<class>` (of a
    detector: the best score), `decision` (a class) or, where several can be called, `decision_<class>` (bool),
    `num_boxes` (detectors alone: boxes called), `embedding` (F float32; F = 0 where the model gives none),
    `num_warnings`, `prediction_set` (class names; None where the bundle has no conformal sets) and `refer`.
    """
    files = sorted((tables / short(bundle)).glob("*.parquet"), reverse=True)
    parts: list[pd.DataFrame] = []
    for file in files:
        with _kept(file):
            names = [name for name in pq.read_schema(file).names if embeddings or name != "embedding"]
            parts.append(pd.read_parquet(file, columns=names))
        if last is not None and sum(map(len, parts)) >= last:
            break
    if not parts:
        return pd.DataFrame()
    requests = pd.concat(parts).sort_values(["time", "prediction_id"], ignore_index=True)
    return requests if last is None else requests.tail(last).reset_index(drop=True)


def unmatched(tables: Path, prediction_ids: Iterable[str]) -> int:
    """How many of these are of no request in the tables, whichever bundle answered."""
    left = set(prediction_ids)
    for file in sorted(tables.glob("*/*.parquet")):
        with _kept(file):
            left.difference_update(pd.read_parquet(file, columns=["prediction_id"])["prediction_id"])
    return len(left)


def find_answer(log: Path, prediction_id: str) -> Logged | None:
    """The line of one answer in *.jsonl under `log`, those to golden samples included; None if there is none.

    Raises:
        ValueError: if this is no prediction_id, or `log` no folder.
        OSError: if a file cannot be read.
    """
    if not re.fullmatch("[0-9a-f]{32}", prediction_id):
        raise ValueError(
            "prediction: no prediction_id; give the 32 hexadecimal digits that came with the answer"
        )
    if not log.is_dir():
        raise ValueError(f"{log}: no such folder; give the server's request log")
    asked = prediction_id.encode()
    for file in sorted(file for file in log.rglob("*.jsonl") if file.is_file()):
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if asked not in line:
                    continue
                with suppress(ValueError, RecursionError):  # cut short, or no line of ours
                    record = json.loads(line)
                    if isinstance(record, dict) and record.get("prediction_id") == prediction_id:
                        return Logged(file, number, record)
    return None


def read_labels(path: Path, classes: Iterable[str], task: Task) -> pd.DataFrame:
    """Labels that came after the answers: `prediction_id` and `label_<class>` (0, 1 or NaN = unknown), a row a request.

    What one file or row leaves empty, another may tell.

    Args:
        path: a CSV or Parquet file, or a folder of such files.
        classes: the model's.
        task: the model's. A binary one's other class may be left out: its label is the complement.

    Raises:
        ValueError: if a column is missing, a label is neither 0 nor 1, or one request has two different labels, or,
            where a task wants one class, several or none.
    """
    files = sorted(f for f in path.iterdir() if f.suffix in (".csv", ".parquet")) if path.is_dir() else [path]
    names = [f"label_{name}" for name in classes]
    parts = []
    for file in files:
        with _refused_as(f"{file}: neither CSV nor Parquet; give a table of prediction_id and {names[0]}"):
            table = (
                pd.read_parquet(file)
                if file.suffix == ".parquet"
                else pd.read_csv(file, dtype={"prediction_id": str})
            )
        if task == "binary" and len(there := [name for name in names if name in table]) == 1:
            other = names[1 - names.index(there[0])]
            table[other] = 1 - pd.to_numeric(table[there[0]], errors="coerce").astype(float)
        if missing := [name for name in ["prediction_id", *names] if name not in table]:
            raise ValueError(
                f"{file}: no column {', '.join(missing)}; it needs prediction_id and {', '.join(names)}"
            )
        if nameless := int(table["prediction_id"].isna().sum()):
            raise ValueError(f"{file}: {nameless} rows without prediction_id; take them from the answers")
        given = table[names]
        numbers = given.apply(pd.to_numeric, errors="coerce").astype(float)
        if (given.notna() & ~numbers.isin([0, 1])).any(axis=None):
            raise ValueError(f"{file}: a label that is neither 0 nor 1; leave unknown ones empty")
        ids = table["prediction_id"].astype(str)
        if task in ("binary", "multiclass"):
            _require_one_class(numbers, ids, file)
        parts.append(numbers.assign(prediction_id=ids))
    if not parts:
        raise ValueError(f"{path}: no .csv or .parquet file of labels in this folder")
    requests = pd.concat(parts).groupby("prediction_id", sort=False)[names]
    labels = requests.max()  # leaves NaN out
    if twice := int((requests.min() < labels).any(axis=1).sum()):
        raise ValueError(f"{path}: {twice} requests have two different labels; keep the one that holds")
    labels = labels.reset_index()
    if task in ("binary", "multiclass"):  # what each of two files leaves empty, the other may contradict
        _require_one_class(labels[names], labels["prediction_id"], path)
        # A class that holds rules the others out; of two, one that does not hold leaves the other.
        holds = (labels[names] == 1).any(axis=1)
        labels.loc[holds, names] = labels.loc[holds, names].fillna(0)
    if task == "binary":
        labels[names] = labels[names].fillna(1 - labels[names[::-1]].set_axis(names, axis=1))
    return labels


def _require_one_class(labels: pd.DataFrame, prediction_ids: pd.Series, where: Path) -> None:
    ones = (labels == 1).sum(axis=1)
    wrong = prediction_ids[(ones > 1) | ((ones == 0) & labels.notna().all(axis=1))]
    if len(wrong):
        # What stands there may be something else, such as a name: only an id of ours is repeated.
        first = (
            f"prediction_id {wrong.iloc[0]}" if re.fullmatch(r"[0-9a-f]{32}", wrong.iloc[0]) else "a request"
        )
        raise ValueError(
            f"{where}: {first} is of several classes or of none ({len(wrong)} such rows); put 1 under the one that"
            " holds"
        )


def short(bundle: Digest) -> str:
    """The first 12 digits of a digest, which name a version.

    >>> short(Digest("sha256:0123456789abcdef"))
    '0123456789ab'
    """
    return bundle.removeprefix("sha256:")[:12]


def _read_state(tables: Path) -> _State:
    try:
        return _State.model_validate_json((tables / STATE).read_bytes())
    except FileNotFoundError:
        return _State(files={}, torn=0, duplicates=0)
    except ValidationError:
        raise ValueError(
            f"{tables / STATE}: not of this form; remove the folder, it is made anew from the lines"
        ) from None


@contextmanager
def _refused_as(said: str) -> Iterator[None]:
    """Say of a table that cannot be read what is wrong with it."""
    try:
        yield
    except (ValueError, OSError, pa.ArrowException) as error:  # pandas' own errors of reading are ValueErrors
        # Pyarrow's own errors, of what it found in the file, have no number.
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(said) from None


def _kept(file: Path) -> AbstractContextManager[None]:
    """While a day's table is read. Were it removed alone its rows would be lost: their lines count as read."""
    return _refused_as(
        f"{file}: damaged; remove the folder {file.parent.parent}, it is made anew from the lines"
    )


def _num_rows(file: Path) -> int:
    with _kept(file):
        return int(pq.read_metadata(file).num_rows)


def _add(file: Path, rows: list[dict[str, Any]]) -> int:
    """Add rows to one day's table; how many were there already."""
    table = pd.DataFrame(rows)
    if file.exists():
        with _kept(file):
            table = pd.concat([pd.read_parquet(file), table], ignore_index=True)
    kept = table.drop_duplicates("prediction_id").sort_values(["time", "prediction_id"], ignore_index=True)
    with replacing(file) as partial:
        kept.to_parquet(partial, index=False)
    return len(table) - len(kept)


def check_line(line: Any, where: str) -> dict[str, Any]:
    """A whole line as a row.

    Raises:
        ValueError: if it is not of this form; without the line's words.
    """
    if not isinstance(line, dict) or line.get("schema_version") != 1:
        raise ValueError(f"{where} is no request of schema_version 1; move the file away")
    try:
        # It names a folder.
        if not re.fullmatch("sha256:[0-9a-f]{64}", line["bundle"]):
            raise ValueError("not a digest")
        return _row(line)
    except KeyError as error:
        raise ValueError(f"{where} has no {error}; move the file away") from None
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise ValueError(
            f"{where} is not of the log's form ({type(error).__name__}); move the file away"
        ) from None


def _row(line: dict[str, Any]) -> dict[str, Any]:
    """One line as a row; floats are checked to be finite, since no test would survive a NaN."""
    decision, called_set = line["decision"], line.get("prediction_set")
    embedding = np.asarray(line["embedding"], np.float32)
    row = {
        "prediction_id": str(line["prediction_id"]),
        "time": pd.Timestamp(line["time"]).tz_convert("UTC"),
        "site": str(line["site"]),
        "scanner": str(line["scanner"]),
        **{f"stat_{name}": float(line["statistics"][name]) for name in STATISTICS},
        **{f"prob_{name}": float(value) for name, value in line["probabilities"].items()},
        **(
            {"decision": decision}
            if isinstance(decision, str)
            else {f"decision_{name}": name in decision for name in line["probabilities"]}
        ),
        **({"num_boxes": sum(bool(box["called"]) for box in line["boxes"])} if "boxes" in line else {}),
        "embedding": embedding,
        "num_warnings": len(line["warnings"]),
        "prediction_set": None if called_set is None else [str(name) for name in called_set],
        "refer": bool(line.get("refer", False)),
    }
    numbers = [value for value in row.values() if isinstance(value, float)]
    if not (np.isfinite(numbers).all() and np.isfinite(embedding).all()):
        raise ValueError("a number is not finite")
    if embedding.ndim != 1:
        raise ValueError("an embedding that is no vector")
    words = [*row, *(value for value in row.values() if isinstance(value, str)), *map(str, called_set or ())]
    "".join(words).encode()  # half of a surrogate pair has no UTF-8
    return row
