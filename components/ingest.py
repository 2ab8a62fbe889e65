"""The step from a source, as it lies there, to a dataset folder."""

import math
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import track

from cadx.catalog import (
    ENTRY,
    SPLIT_WORDS,
    Entry,
    FolderEntry,
    NpzEntry,
    PhantomEntry,
    TableEntry,
    candidate_files,
    digest_as,
    fetch,
    load_catalog,
    pseudonym,
    read_rows,
    site_key,
)
from cadx.datasets import DatasetWriter, SourceInfo
from cadx.drift import image_statistics
from cadx.files import digest_bytes, digest_path
from cadx.reading.dicom import BURNED_IN, dicom_identifiers, parse_age, parse_sex
from cadx.reading.images import read_arrays, read_image
from cadx.reading.source import sniff_file
from cadx.types import Digest, RawImage
from components.contract import In, Keep, Out, Params, explain, step

_LISTED = 5
_OLDEST_YEARS = 90
"""Ages above 89 identify a person by the HIPAA safe harbor rule (45 CFR 164.514(b)(2)): they become 90."""


class IngestParams(Params):
    """Which set of the catalogue to read."""

    source: str = Field(min_length=1)  # its name in the catalogue


@step
def ingest(*, catalog: In, cache: Keep, dataset: Out, digest: str = "", params: IngestParams) -> None:
    """Read a set of the catalogue into a dataset folder.

    The source is looked for in `cache`, the mirror and its address, and its digest is checked. Every image
    is read, none is skipped: what cannot be read stops the step with a list, and so do identifiers of
    patients unless the entry says `deidentify: true`.

    Raises:
        ValueError: one line that names what is wrong by row number or by place in sorted order.
    """
    name = params.source
    entry = _find(load_catalog(catalog), name, catalog)
    with _at_hand(name, entry, cache) as root:
        if digest and (found := digest_as(root, digest)) != digest:
            raise ValueError(f"{name}: the source has digest {found}, --digest asks for {digest}")
        source = SourceInfo(
            title=entry.title,
            address=None if isinstance(entry, PhantomEntry) else entry.address,
            digest=digest_path(root),
            licence=entry.licence,
            citation=entry.citation,
            note=entry.note,
        )
        with DatasetWriter(
            dataset,
            name=name,
            task=entry.task,
            classes=entry.classes,
            positive=entry.positive,
            modality=entry.modality,
            clustered=entry.patient != "per-image",
            source=source,
        ) as writer:
            if isinstance(entry, NpzEntry):
                _add_arrays(writer, name, entry, root)
            else:
                layout = _phantom_layout(name, entry) if isinstance(entry, PhantomEntry) else entry
                _add_files(writer, name, layout, root, cache)


def _find(entries: dict[str, Entry], name: str, catalog: Path) -> Entry:
    if name not in entries:
        near = get_close_matches(name, entries, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it holds: {', '.join(entries)}"
        raise ValueError(f"{catalog}: no data set {name!r}; {hint}")
    return entries[name]


# --- Sources ------------------------------------------------------------------------------------------


@contextmanager
def _at_hand(name: str, entry: Entry, cache: Path) -> Iterator[Path]:
    """Where the source lies; a phantom is drawn anew, since its code may have changed."""
    if not isinstance(entry, PhantomEntry):
        yield fetch(name, entry, cache)
        return
    with TemporaryDirectory(prefix="cadx-phantom-") as folder:
        root = Path(folder) / "cohort"
        _phantom(name, entry).write(root)
        yield root


def _phantom(name: str, entry: PhantomEntry) -> Any:
    from cadx.phantom import PHANTOM

    try:
        return PHANTOM.validate_python(entry.parameters)
    except ValidationError as error:
        raise ValueError(explain(error, f"{name}.parameters")) from None


def _phantom_layout(name: str, entry: PhantomEntry) -> FolderEntry | TableEntry:
    """The entry by which a phantom's own files are read."""
    layout = _phantom(name, entry).layout(entry.classes)
    described = entry.model_dump(exclude={"format", "parameters"})
    found = ENTRY.validate_python({**described, "file": "cohort", **layout})
    assert isinstance(found, (FolderEntry, TableEntry))
    return found


def _add_arrays(writer: DatasetWriter, name: str, entry: NpzEntry, path: Path) -> None:
    arrays = read_arrays(path)
    splits = [key.removesuffix("_images") for key in arrays if key.endswith("_images")]
    if not splits:
        raise ValueError(f"{name}: no array is called train_images, val_images or test_images")
    for split in splits:
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
        if split not in SPLIT_WORDS:
            raise ValueError(f"{name}: {split}_images belongs to none of train, val, calibration, test")
        if labels is None or len(labels) != len(images):
            raise ValueError(f"{name}: {split}_images and {split}_labels do not have equal lengths")
        if images.dtype not in (np.uint8, np.uint16) or not (
            images.ndim == 3 or (images.ndim == 4 and images.shape[3] == 3)
        ):
            raise ValueError(f"{name}: {split}_images must be N H W or N H W 3, uint8 or uint16")
        labels = labels.reshape(len(images), -1)
        for index in _progress(range(len(images)), f"Reading {name}, {split}"):
            sample_id, pixels = f"{split}-{index:05d}", images[index]
            writer.add(
                sample_id=sample_id,
                pixels=pixels,
                labels=_array_labels(entry, labels[index], f"{name}: {split}_labels row {index}"),
                patient=sample_id,
                sha256=digest_bytes(np.ascontiguousarray(pixels).tobytes()),
                given_split=SPLIT_WORDS[split],
                statistics=image_statistics(pixels),
                assumptions=entry.assumptions,
            )


def _array_labels(entry: NpzEntry, values: np.ndarray, where: str) -> dict[str, float]:
    if entry.task == "multilabel" and len(values) == len(entry.classes):
        return dict(zip(entry.classes, values.astype(float).tolist(), strict=True))
    if entry.task == "multilabel" or len(values) != 1 or int(values[0]) not in range(len(entry.classes)):
        known = ", ".join(f"{index} {label}" for index, label in enumerate(entry.classes))
        raise ValueError(f"{where}: {values.tolist()} is none of the entry's classes ({known})")
    return {entry.classes[int(values[0])]: 1.0}


# --- Files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Item:
    """An image file and what the source says of it. `place` finds it without naming it."""

    place: str
    path: Path
    relative: PurePosixPath
    labels: dict[str, float]
    attributes: dict[str, Any] = field(default_factory=dict)
    patient: str = ""
    given_split: str = ""
    boxes: list[tuple[str, float, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True)
class _Read:
    """What came of an item: an image, or why there is none."""

    identifiers: tuple[str, ...] = ()
    problem: str = ""
    image: RawImage | None = None
    sha256: Digest | None = None
    statistics: dict[str, float] = field(default_factory=dict)


def _add_files(
    writer: DatasetWriter, name: str, entry: FolderEntry | TableEntry, root: Path, cache: Path
) -> None:
    items = _table_items(entry, root) if isinstance(entry, TableEntry) else _folder_items(entry, root)
    key = site_key(cache) if entry.patient == "hmac" or entry.deidentify else b""
    named = sorted(zip(_sample_ids(items, key), items, strict=True), key=lambda pair: pair[0])
    problems: list[str] = []
    identified: Counter[str] = Counter()
    num_identified = 0
    reads = _in_order(lambda pair: _read(pair[1].path, entry.deidentify), named)
    for (sample_id, item), read in zip(named, _progress(reads, f"Reading {name}", len(named)), strict=True):
        if read.identifiers:
            num_identified += 1
            identified.update(read.identifiers)
        patient = item.patient or (read.image.patient if read.image else "") or ""
        problem = read.problem
        if read.image is not None and not patient and entry.patient != "per-image":
            problem = f"no patient; the entry's policy is {entry.patient}: give a patient column or PatientID"
        if problem:
            problems.append(f"{item.place}: {problem}")
        if problems or identified:
            continue
        assert read.image is not None
        assert read.sha256 is not None
        policy = {"per-image": sample_id, "public": patient, "hmac": pseudonym(key, "patient", patient)}
        attributes, aged = _attributes(read.image.attributes | item.attributes, entry.deidentify)
        writer.add(
            sample_id=sample_id,
            pixels=read.image.pixels,
            labels=item.labels,
            patient=policy[entry.patient],
            sha256=read.sha256,
            given_split=item.given_split,
            spacing_mm=read.image.spacing_mm,
            statistics=read.statistics,
            boxes=item.boxes,
            assumptions=(*entry.assumptions, *read.image.assumptions, *aged),
            **attributes,
        )
    if identified:
        raise ValueError(_identifiers_found(name, identified, num_identified, len(items)))
    if problems:
        raise ValueError(
            f"{name}: {len(problems)} of {len(items)} images cannot be taken: {_listed(problems)}; "
            "repair them, or take them out of the source"
        )


def _read(path: Path, deidentify: bool) -> _Read:
    try:
        data = path.read_bytes()
    except OSError as error:
        return _Read(problem=f"cannot be opened ({type(error).__name__})")
    try:
        found = dicom_identifiers(data)
        identifiers = tuple(keyword for keyword in found if not deidentify or keyword == BURNED_IN)
        if identifiers:
            return _Read(identifiers)
        image = read_image(data)
    except ValueError as error:
        return _Read(problem=str(error))
    return _Read((), "", image, digest_bytes(data), image_statistics(image.pixels))


def _attributes(attributes: dict[str, Any], deidentify: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    age = attributes.get("age", math.nan)
    if deidentify and age >= _OLDEST_YEARS:
        return attributes | {"age": float(_OLDEST_YEARS)}, (f"ages above 89 were set to {_OLDEST_YEARS}",)
    return attributes, ()


def _identifiers_found(name: str, identified: Counter[str], num_files: int, num_all: int) -> str:
    keywords = ", ".join(sorted(identified))
    if BURNED_IN in identified:
        advice = (
            "images marked BurnedInAnnotation = YES show identifiers in their pixels: "
            "mask them at the source and set the element to NO"
        )
    else:
        advice = "set `deidentify: true` in its entry to drop them, or clean the files"
    return f"{name}: patient identifiers in {num_files} of {num_all} images ({keywords}); {advice}"


def _sample_ids(items: list[_Item], key: bytes) -> list[str]:
    """Names without extension below the folder that all files share, or pseudonyms of the whole names."""
    if key:
        sample_ids = [pseudonym(key, "sample", item.relative.as_posix()) for item in items]
    else:
        shared = os.path.commonpath([item.relative.parent.as_posix() or "." for item in items])
        stems = [item.relative.relative_to(shared).with_suffix("") for item in items]
        sample_ids = ["-".join(stem.parts) for stem in stems]
    seen: dict[str, str] = {}
    for sample_id, item in zip(sample_ids, items, strict=True):
        if sample_id in seen:
            raise ValueError(f"{seen[sample_id]} and {item.place}: their names differ only in the extension")
        seen[sample_id] = item.place
    return sample_ids


def _folder_items(entry: FolderEntry, root: Path) -> list[_Item]:
    if not root.is_dir():
        raise ValueError("the source is no folder; the entry's format says that it is one")
    items: list[_Item] = []
    for folder, given_split in entry.split_folders.items() or [("", "")]:
        inner = root / folder
        where = f"split folder {folder}, " if folder else ""
        folders = [path.name for path in inner.iterdir() if path.is_dir()] if inner.is_dir() else []
        known = [name for name in folders if not name.startswith(".")]
        if unknown := len(set(known) - set(entry.classes)):
            raise ValueError(
                f"{where}{unknown} of {len(known)} folders are none of the classes "
                f"{', '.join(entry.classes)}; add them to the entry, or move them away"
            )
        for label in entry.classes:
            if label not in known:
                raise ValueError(f"{where}class {label} has no folder; make it, or correct the entry")
            for number, path in enumerate(candidate_files(inner / label), start=1):
                relative = PurePosixPath(path.relative_to(root).as_posix())
                place = f"{where}class {label}, file {number} in sorted order"
                items.append(_Item(place, path, relative, {label: 1.0}, given_split=given_split))
    if not items:
        raise ValueError("the class folders are empty")
    return items


def _table_items(entry: TableEntry, root: Path) -> list[_Item]:
    rows = read_rows(root / entry.table)
    columns = entry.columns
    needed = [entry.file_column, entry.label_column, *entry.label_columns.values()]
    _require_columns(entry.table, rows, needed + list(columns.model_dump().values()))
    boxes = _boxes(entry, root) if entry.boxes else {}
    items: dict[str, _Item] = {}
    for number, row in enumerate(rows, start=2):
        place = f"{entry.table} row {number}"
        relative = PurePosixPath(row[entry.file_column])
        path = root / entry.images / relative
        if not relative.name or relative.is_absolute() or ".." in relative.parts:
            raise ValueError(f"{place}: column {entry.file_column} must be a path within the source")
        if not path.is_file():
            raise ValueError(f"{place}: its image file is not there; add it, or remove the row")
        if relative.as_posix() in items:
            raise ValueError(f"{place}: the same file as {items[relative.as_posix()].place}; keep one row")
        attributes: dict[str, Any] = {
            "site": row[columns.site] if columns.site else "",
            "scanner": row[columns.scanner] if columns.scanner else "",
            "age": parse_age(row[columns.age]) if columns.age else math.nan,
            "sex": parse_sex(row[columns.sex]) if columns.sex else "",
            "view": row[columns.view] if columns.view else "",
        }
        split = row[columns.split].lower() if columns.split else ""
        if split and split not in SPLIT_WORDS:
            raise ValueError(f"{place}, column {columns.split}: not train, val, calibration or test")
        items[relative.as_posix()] = _Item(
            place=place,
            path=path,
            relative=relative,
            labels=_row_labels(entry, row, place),
            attributes={key: value for key, value in attributes.items() if value == value and value != ""},
            patient=row[columns.patient] if columns.patient else "",
            given_split=SPLIT_WORDS[split] if split else "",
            boxes=boxes.pop(relative.as_posix(), []),
        )
    if boxes:
        raise ValueError(f"{entry.boxes and entry.boxes.table}: boxes of {len(boxes)} files that have no row")
    _refuse_files_without_row(entry.table, list(items.values()))
    return list(items.values())


def _refuse_files_without_row(table: str, items: list[_Item]) -> None:
    listed = {item.path for item in items}
    without = [
        path
        for folder in sorted({item.path.parent for item in items})
        for path in candidate_files(folder, recursive=False)
        if path not in listed and sniff_file(path) is not None
    ]
    if without:
        raise ValueError(
            f"{table}: {len(without)} images beside the listed have no row; add rows or move them"
        )


def _row_labels(entry: TableEntry, row: dict[str, str], place: str) -> dict[str, float]:
    if entry.label_column:
        cell = row[entry.label_column]
        label = entry.values.get(cell, cell)
        if cell and label not in entry.classes:
            known = ", ".join(entry.values or entry.classes)
            raise ValueError(f"{place}, column {entry.label_column}: a label that is none of {known}")
        return {label: 1.0} if cell else {}
    labels = {name: row[column] for name, column in entry.label_columns.items() if row[column]}
    for name, cell in labels.items():
        if cell not in ("0", "1", "0.0", "1.0"):
            raise ValueError(f"{place}, column {entry.label_columns[name]}: not 0, 1 or empty")
    return {name: float(cell) for name, cell in labels.items()}


def _boxes(entry: TableEntry, root: Path) -> dict[str, list[tuple[str, float, float, float, float]]]:
    """Boxes by file, as (class, x0, y0, x1, y1)."""
    table = entry.boxes
    assert table is not None
    rows = read_rows(root / table.table)
    corners = [table.x0, table.y0, table.x1 or table.width, table.y1 or table.height]
    _require_columns(table.table, rows, [table.file, table.class_name, *corners, *table.where])
    found: dict[str, list[tuple[str, float, float, float, float]]] = {}
    for number, row in enumerate(rows, start=2):
        if any(row[column] != value for column, value in table.where.items()):
            continue
        label = table.values.get(row[table.class_name], row[table.class_name])
        if label not in entry.classes:
            known = ", ".join(table.values or entry.classes)
            raise ValueError(f"{table.table} row {number}: a box of a class that is none of {known}")
        try:
            x0, y0, x1, y1 = (float(row[column]) for column in corners if column)
        except ValueError:
            raise ValueError(f"{table.table} row {number}: a corner is no number") from None
        if table.width:
            x1, y1 = x0 + x1, y0 + y1
        found.setdefault(PurePosixPath(row[table.file]).as_posix(), []).append((label, x0, y0, x1, y1))
    return found


def _require_columns(table: str, rows: list[dict[str, str]], names: Iterable[str | None]) -> None:
    if missing := [name for name in names if name and name not in rows[0]]:
        raise ValueError(f"{table}: no column {missing[0]!r}; it has {', '.join(rows[0])}")


# --- Work in order ------------------------------------------------------------------------------------

T = TypeVar("T")
R = TypeVar("R")


def _in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """`function` of each item, in order, on several threads: decoding leaves the interpreter's lock.

    Only a few results wait at a time, however slow the reader of this iterator is.
    """
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[R]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    return track(items, what, total=total, console=Console(stderr=True), transient=True)


def _listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more
