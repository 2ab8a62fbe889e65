"""How a source lies on disk -> what it says of each sample, before any of them is opened.

One function per format of the catalogue. Invariants: nothing is left out in silence (a box of an unknown class
stops; so does an orphan, an image without its label or a label without its image, unless the caller takes the
list of them); places name samples by row or by position in sorted order, never by file name or cell.
"""

import codecs
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, FiniteFloat, ValidationError

from cadx.catalog import (
    SPLIT_WORDS,
    BagsEntry,
    CocoEntry,
    Columns,
    FilesEntry,
    FolderEntry,
    PairsEntry,
    Row,
    TableEntry,
    VocEntry,
    candidate_files,
    read_rows,
)
from cadx.reading.folders import is_hidden
from cadx.reading.source import Format, sniff_file
from cadx.reading.vocabulary import parse_age, parse_sex

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    height: FiniteFloat | None = None
    width: FiniteFloat | None = None


class _CocoCategory(BaseModel):
    id: int | str
    name: str


class _CocoAnnotation(BaseModel):
    image_id: int | str
    category_id: int | str
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]
    iscrowd: bool = False


class _CocoFile(BaseModel):
    """What is taken of COCO's JSON; other fields are let pass."""

    images: list[_CocoImage]
    categories: list[_CocoCategory]
    annotations: list[_CocoAnnotation]


OrphanRule = Literal["image_without_label", "label_without_image"]
TAKE_ORPHANS = "set ingest.orphans to leave_out"
FileEntry = FolderEntry | TableEntry | FilesEntry | PairsEntry | VocEntry | CocoEntry
_LARGEST = float(np.finfo(np.float32).max)
UNKNOWN = {"", "unknown", "unk", "u", "na", "n/a", "nan", "none", "null", "?", "-"}
"""Cells, in lower case, by which people say that they do not know."""
_AGE = re.compile(
    r"(\d{1,3}(?:[.,]\d+)?)\s*(?:(y|yrs?|years?|j|jahre?)|(m|months?)|(w|weeks?)|(d|days?))?", re.IGNORECASE
)
_PICTURES: set[Format | None] = {"PNG", "JPEG"}
_GERMAN_SEX = {"w": "F", "weiblich": "F", "männlich": "M"}
Box = tuple[str, float, float, float, float]


@dataclass(frozen=True)
class Item:
    """A sample's file, or folder of slices, and what the source says of it.

    Attributes:
        place: finds it in the source without naming it.
        path: the file or folder.
        relative: where it lies in the source.
        frame: which image of a file of several, from 1; None where the file holds one.
        labels: class -> 1 or 0.
        attributes: any of site, scanner, age, sex, view.
        patient: as the source has it, empty where unknown; it becomes a pseudonym.
        given_split: the official split, or empty.
        boxes: (class, x0, y0, x1, y1), half-open, in stored pixels.
        mask: file of the mask.
        mask_values: class -> its value in the mask, where the mask decides about the labels.
        clinical: name -> number, NaN where missing.
        size_px: height and width of the image that the boxes were drawn in; None where nobody wrote them down.
    """

    place: str
    path: Path
    relative: PurePosixPath
    labels: dict[str, float]
    attributes: dict[str, Any] = field(default_factory=dict)
    patient: str = ""
    given_split: str = ""
    boxes: list[Box] = field(default_factory=list)
    mask: Path | None = None
    mask_values: dict[str, int] = field(default_factory=dict)
    clinical: dict[str, float] = field(default_factory=dict)
    frame: int | None = None
    size_px: tuple[int, int] | None = None


@dataclass(frozen=True)
class Bag:
    """Rows of numbers that are one sample: `features` T E float32, NaN where unknown."""

    place: str
    features: np.ndarray
    labels: dict[str, float]
    site: str
    patient: str
    age: float


@dataclass(frozen=True)
class Orphan:
    """An image without its label, or a label (row, mask, annotation, boxes) without its image.

    Attributes:
        place: finds it in the source without naming it.
        rule: the rule of `validate` that it fails.
        reason: what it lacks.
    """

    place: str
    rule: OrphanRule
    reason: str


def list_items(entry: FileEntry, root: Path, orphans: list[Orphan] | None = None) -> list[Item]:
    """The samples of a source of files.

    Args:
        entry: says how the source lies.
        root: the source.
        orphans: takes what has no partner, which is then no sample; None refuses it.

    Raises:
        ValueError: one line that names what does not fit, by row number or by place in sorted order; or says that
            nothing has its partner.
    """
    match entry:
        case FolderEntry():
            return _folder_items(entry, root, orphans)
        case TableEntry():
            return _table_items(entry, root, orphans)
        case FilesEntry():
            return _named_items(entry, root)
        case PairsEntry():
            return _pair_items(entry, root, orphans)
        case VocEntry():
            return _voc_items(entry, root, orphans)
        case CocoEntry():
            return _coco_items(entry, root, orphans)


def _unless_taken(orphans: list[Orphan] | None, found: list[Orphan], refusal: str) -> None:
    """Hand over what has no partner, or refuse it where nobody takes it."""
    if found and orphans is None:
        raise ValueError(f"{refusal}, or {TAKE_ORPHANS}")
    if orphans is not None:
        orphans.extend(found)


def _require_pairs(items: Sequence[Item], orphans: Sequence[Orphan] | None) -> None:
    if not items and orphans:
        raise ValueError(f"none of the source's images has its label: {len(orphans)} of both are alone")


def _folder_items(entry: FolderEntry, root: Path, orphans: list[Orphan] | None) -> list[Item]:
    if not root.is_dir():
        raise ValueError("the source is no folder; the entry's format says that it is one")
    items: list[Item] = []
    for folder, given_split in entry.split_folders.items() or [("", "")]:
        inner = root / folder
        where = f"split folder {folder}, " if folder else ""
        folders = [path.name for path in inner.iterdir() if path.is_dir()] if inner.is_dir() else []
        known = [name for name in folders if not is_hidden(name)]
        if unknown := len(set(known) - set(entry.classes)):
            raise ValueError(
                f"{where}{unknown} of {len(known)} folders are none of the classes "
                f"{', '.join(entry.classes)}; add them to the entry, or move them away"
            )
        for label in entry.classes:
            if label not in known:
                raise ValueError(f"{where}class {label} has no folder; make it, or correct the entry")
            for number, path in enumerate(_class_members(entry, inner / label), start=1):
                relative = PurePosixPath(path.relative_to(root).as_posix())
                place = f"{where}class {label}, file {number} in sorted order"
                items.append(Item(place, path, relative, {label: 1.0}, given_split=given_split))
    if not items:
        raise ValueError("the class folders are empty")
    alone = [
        Orphan(f"file {number} in sorted order", "image_without_label", "it lies in no folder of a class")
        for number in _unlisted(items, [root]).values()
    ]
    _unless_taken(
        orphans,
        alone,
        f"{len(alone)} {entry.kind}s lie in no folder of a class that the entry names; move them into one or away, "
        "name their folder in split_folders",
    )
    return items


def _class_members(entry: FolderEntry, folder: Path) -> list[Path]:
    """The files of a class; of volumes also the folders, each of which is a series."""
    if entry.kind != "volume":
        return candidate_files(folder)
    series = [path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name)]
    return sorted([*candidate_files(folder, recursive=False), *series])


def _table_items(entry: TableEntry, root: Path, orphans: list[Orphan] | None) -> list[Item]:
    rows = read_rows(root / entry.table)
    columns = entry.columns
    needed = [entry.file_column, entry.label_column, *entry.label_columns.values(), entry.mask_column]
    _require_columns(entry.table, rows, [*needed, *columns.model_dump().values(), *entry.clinical.values()])
    boxes = _boxes(entry, root) if entry.boxes else {}
    listed: set[str] = set()
    masks_alone: set[Path] = set()  # their rows are orphans already
    items: dict[str, Item] = {}
    for row in rows:
        place = f"{entry.table} row {row.number}"
        relative = _within(row[entry.file_column], f"{place}: column {entry.file_column}")
        listed.add(relative.as_posix())
        path = root / entry.images / relative
        if not (path.is_file() or (entry.kind == "volume" and path.is_dir())):
            orphan = Orphan(place, "label_without_image", f"its {entry.kind} file is not there")
            _unless_taken(orphans, [orphan], f"{place}: {orphan.reason}; add it, remove the row")
            if entry.mask_column:
                masks_alone.add(root / row[entry.mask_column])
            continue
        mask = _row_mask(entry, root, row, place)
        frame = _frame(_cell(row, columns.frame), f"{place}, column {columns.frame}")
        known_as = relative.as_posix() if frame is None else f"{relative.as_posix()}/{frame}"
        if known_as in items:
            what = "file" if frame is None else "frame"
            raise ValueError(f"{place}: the same {what} as {items[known_as].place}; keep one row")
        attributes = _row_attributes(columns, row, place)
        split = _cell(row, columns.split).lower()
        if split and split not in SPLIT_WORDS:
            raise ValueError(f"{place}, column {columns.split}: not train, val, calibration or test")
        item_boxes = boxes.get(relative.as_posix(), [])
        items[known_as] = Item(
            place=place,
            path=path,
            relative=relative,
            frame=frame,
            labels=_present(entry.classes, item_boxes)
            if entry.task == "detection"
            else _row_labels(entry, row, place),
            attributes=attributes,
            patient=_known(_cell(row, columns.patient)),
            given_split=SPLIT_WORDS[split] if split else "",
            boxes=item_boxes,
            mask=mask,
            clinical={
                name: _number(row[column], f"{place}, column {column}")
                for name, column in entry.clinical.items()
                # It stands in the samples' own column, where the rule for old ages is kept.
                if column != columns.age
            },
        )
    if entry.boxes:
        _find_boxes_without_row(entry.boxes.table, boxes, listed, orphans)
    _find_files_without_row(entry.table, root / entry.images, list(items.values()), orphans, masks_alone)
    _require_pairs(list(items.values()), orphans)
    return list(items.values())


def _row_mask(entry: TableEntry, root: Path, row: Row, place: str) -> Path | None:
    cell = _cell(row, entry.mask_column)
    if not cell:
        return None
    mask = root / _within(cell, f"{place}: column {entry.mask_column}")
    if not mask.is_file():
        raise ValueError(f"{place}: its mask file is not there; add it, or empty the cell")
    return mask


def _row_attributes(columns: Columns, row: Row, place: str) -> dict[str, Any]:
    """What a row says of group and machine, without what it leaves open."""
    attributes: dict[str, Any] = {
        "site": _cell(row, columns.site),
        "scanner": _cell(row, columns.scanner),
        "age": _age(_cell(row, columns.age), f"{place}, column {columns.age}"),
        "sex": _sex(_cell(row, columns.sex), f"{place}, column {columns.sex}"),
        "view": _cell(row, columns.view),
    }
    return {key: value for key, value in attributes.items() if value == value and value != ""}


def _find_boxes_without_row(
    table: str, boxed: Iterable[str], listed: set[str], orphans: list[Orphan] | None
) -> None:
    """Find files, by the names that a table of boxes has for them, that no row names."""
    alone = [
        Orphan(f"{table}, file {number} in sorted order", "label_without_image", "its boxes have no row")
        for number, name in enumerate(sorted(boxed), start=1)
        if name not in listed
    ]
    refusal = f"{table}: boxes of {len(alone)} files that have no row; add rows, take the boxes out"
    _unless_taken(orphans, alone, refusal)


def _find_files_without_row(
    table: str,
    images: Path,
    items: list[Item],
    orphans: list[Orphan] | None,
    masks_alone: Iterable[Path] = (),
) -> None:
    """Find images below their folder, and masks below the one that all listed masks share, that no row names."""
    parents = [item.mask.parent for item in items if item.mask]
    masks = Path(os.path.commonpath(parents)) if parents else None
    found = _unlisted(items, [images] if masks is None else [images, masks])
    for mask in masks_alone:
        found.pop(mask, None)
    if masks is None or any(item.path.is_relative_to(masks) for item in items):
        are_masks = set()
    else:
        are_masks = {path for path in found if path.is_relative_to(masks)}
    sides: tuple[tuple[str, OrphanRule, set[Path]], ...] = (
        ("samples", "image_without_label", found.keys() - are_masks),
        ("masks", "label_without_image", are_masks),
    )
    for noun, rule, paths in sides:
        alone = [
            Orphan(f"{table}: file {number} in sorted order of its folders", rule, "it has no row")
            for path, number in found.items()
            if path in paths
        ]
        refusal = f"{table}: {len(alone)} {noun} beside the listed have no row; add rows, move them"
        _unless_taken(orphans, alone, refusal)


def _unlisted(items: list[Item], folders: Iterable[Path]) -> dict[Path, int]:
    """Files below `folders` that may be samples and belong to no item, with their places in sorted order.

    Those are files with an item's extension or format (a PNG may stand for a JPEG), and any other image, unless it
    lies in a folder that leads to no item and bears an item's name, as a mask or preview of it does. Where items are
    folders of slices, a folder of such files stands for them.
    """
    listed = {path for item in items for path in (item.path, item.mask) if path}
    above = {parent for path in listed for parent in path.parents}
    there = sorted({path for folder in folders for path in candidate_files(folder)})
    taken = {path for path in there if path in listed or not listed.isdisjoint(path.parents)}
    by_suffix = {path.suffix: path for path in taken}
    formats = {sniff_file(path) for path in by_suffix.values()} - {None}
    if not formats.isdisjoint(_PICTURES):
        formats |= _PICTURES
    are_folders = any(item.path.is_dir() for item in items)
    names = {_bare(item.path.name) for item in items}
    found: dict[Path, int] = {}
    for number, path in enumerate(there, start=1):
        if path in taken:
            continue
        form = None if path.suffix in by_suffix else sniff_file(path)
        is_other = form is not None and (path.parent in above or names.isdisjoint(_names_in(path.name)))
        if path.suffix in by_suffix or form in formats or is_other:
            found.setdefault(path.parent if are_folders and path.parent not in above else path, number)
    return found


def _bare(name: str) -> str:
    """A file's name without its extension."""
    return re.sub(r"(\.nii)?\.[^.]*$", "", name) or name


def _names_in(name: str) -> set[str]:
    """What a file's name may be called after: all of it, and what stands before or behind a sign in it.

    >>> sorted(_names_in("p1-3_mask.png"))
    ['3_mask', 'mask', 'p1', 'p1-3', 'p1-3_mask']
    """
    bare = _bare(name)
    signs = [at for at, letter in enumerate(bare) if not letter.isalnum()]
    return {bare, *(bare[:at] for at in signs), *(bare[at + 1 :] for at in signs)}


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


def _boxes(entry: TableEntry, root: Path) -> dict[str, list[Box]]:
    """Boxes by file, as (class, x0, y0, x1, y1).

    A row without corners, whose class is none of the entry's, says that its image has no box: "No finding" or nothing.
    """
    table = entry.boxes
    assert table is not None
    rows = read_rows(root / table.table, may_be_empty=True)  # as of a set in which nobody is ill
    corners = [table.x0, table.y0, table.x1 or table.width, table.y1 or table.height]
    if rows:
        _require_columns(table.table, rows, [table.file, table.class_name, *corners, *table.where])
    found: dict[str, list[Box]] = {}
    for row in rows:
        place = f"{table.table} row {row.number}"
        if any(row[column] != value for column, value in table.where.items()):
            continue
        label = table.values.get(row[table.class_name], row[table.class_name])
        file = as_posix(row[table.file]).as_posix()
        if label not in entry.classes and not any(row[column] for column in corners if column):
            found.setdefault(file, [])
            continue
        if label not in entry.classes:
            known = ", ".join(table.values or entry.classes)
            raise ValueError(f"{place}: a box of a class that is none of {known}")
        x0, y0, x1, y1 = _corners((row[column] for column in corners if column), place)
        if table.width:
            x1, y1 = x0 + x1, y0 + y1
        found.setdefault(file, []).append((label, x0, y0, x1, y1))
    return found


def _named_items(entry: FilesEntry, root: Path) -> list[Item]:
    items = []
    for number, sample in enumerate(entry.samples, start=1):
        place = f"sample {number} of the entry"
        relative = _within(sample.file, f"{place}: file")
        if sample.label is not None and sample.label not in entry.classes:
            raise ValueError(f"{place}: its label is none of {', '.join(entry.classes)}")
        mask = root / _within(sample.mask, f"{place}: mask") if sample.mask else None
        for path in filter(None, (root / relative, mask)):
            if not path.exists():
                raise ValueError(f"{place}: its file is not in the source; correct the entry")
        labels = {sample.label: 1.0} if sample.label else {}
        items.append(
            Item(
                place,
                root / relative,
                relative,
                labels,
                patient=sample.patient,
                mask=mask,
                frame=sample.frame,
            )
        )
    return items


def _pair_items(entry: PairsEntry, root: Path, orphans: list[Orphan] | None) -> list[Item]:
    images, masks = (
        {path.relative_to(root / folder).as_posix(): path for path in candidate_files(root / folder)}
        for folder in (entry.images, entry.masks)
    )
    _find_alone(images, masks, ("image", "mask"), orphans)
    if not images and not masks:
        raise ValueError("the folders of images and masks are empty")
    items = [
        Item(
            place=f"image {number} in sorted order",
            path=images[name],
            relative=PurePosixPath(name),
            labels={},
            mask=masks[name],
            mask_values=entry.mask_values,
        )
        for number, name in enumerate(sorted(images), start=1)
        if name in masks
    ]
    _require_pairs(items, orphans)
    return items


def _find_alone(
    images: Iterable[str], labels: Iterable[str], nouns: tuple[str, str], orphans: list[Orphan] | None
) -> None:
    """Find names that stand on one side only; `nouns` are what one calls an image and a label."""
    image, label = nouns
    rules: tuple[OrphanRule, OrphanRule] = ("image_without_label", "label_without_image")
    for these, those, what, other, rule in (
        (images, set(labels), image, label, rules[0]),
        (labels, set(images), label, image, rules[1]),
    ):
        names = sorted(these)
        if alone := [number for number, name in enumerate(names, start=1) if name not in those]:
            lacks = f"no {other} of the same name"
            _unless_taken(
                orphans,
                [Orphan(f"{what} {number} in sorted order", rule, f"it has {lacks}") for number in alone],
                f"{len(alone)} of {len(names)} {what}s have {lacks}"
                f" ({what} {', '.join(map(str, alone[:5]))} in sorted order); add it, take the {what} out",
            )


def _voc_items(entry: VocEntry, root: Path, orphans: list[Orphan] | None) -> list[Item]:
    """Pascal VOC: corners are 1-based and inclusive, so minima become one less, and maxima stay."""
    paths, notes = (
        _by_stem(candidate_files(root / folder), what)
        for folder, what in ((entry.images, "images"), (entry.annotations, "annotations"))
    )
    _find_alone(paths, notes, ("image", "annotation"), orphans)
    given = _voc_splits(entry, root, {*paths, *notes})  # what is alone was found above
    items = []
    for number, stem in enumerate(sorted(paths), start=1):
        if stem not in notes:
            continue
        place = f"image {number} in sorted order"
        annotation = _voc_annotation(notes[stem], place)
        boxes = list(_voc_boxes(entry, annotation, place))
        items.append(
            Item(
                place=place,
                path=paths[stem],
                relative=PurePosixPath(paths[stem].name),
                labels=_present(entry.classes, boxes),
                given_split=given.get(stem, ""),
                boxes=boxes,
                size_px=_size_px(annotation.findtext("size/height"), annotation.findtext("size/width")),
            )
        )
    _require_pairs(items, orphans)
    if not items:
        raise ValueError("the folder of images is empty")
    return items


def _voc_splits(entry: VocEntry, root: Path, known: set[str]) -> dict[str, str]:
    """The split of each image that a list names, by its stem, which has to be `known`."""
    given: dict[str, str] = {}
    for split, listing in entry.splits.items():
        try:
            text = (root / listing).read_text(encoding="utf-8-sig") if (root / listing).is_file() else ""
        except UnicodeDecodeError:
            raise ValueError(f"splits.{split}: its list is not UTF-8; save it so") from None
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"splits.{split}: its list is missing or empty")
        for number, stem in enumerate(lines, start=1):
            if stem not in known:
                raise ValueError(f"splits.{split}: line {number} names an image that is not there")
            if stem in given:
                raise ValueError(f"splits.{split}: line {number} names an image of split {given[stem]}")
            given[stem] = split
    return given


def _by_stem(paths: Iterable[Path], what: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    twice = 0
    for path in paths:
        twice += path.stem in found
        found[path.stem] = path
    if twice:
        raise ValueError(f"{twice} {what} bear the name of another but for folder or extension; rename them")
    return found


def _voc_annotation(path: Path, place: str) -> "Element":
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, parse

    try:
        root = parse(path).getroot()
        assert root is not None
    except (ParseError, DefusedXmlException, LookupError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{place}: its annotation is no XML ({type(error).__name__}); fetch it again"
        ) from None
    if root.tag != "annotation":  # what is no VOC must not read as an image without boxes
        raise ValueError(f"{place}: its annotation is XML, but not Pascal VOC's <annotation>; fetch it again")
    return root


def _voc_boxes(entry: VocEntry, annotation: "Element", place: str) -> Iterator[Box]:
    for number, element in enumerate(annotation.iter("object"), start=1):
        name = (element.findtext("name") or "").strip()
        if name not in entry.classes:
            raise ValueError(
                f"{place}: box {number} is of a class that is none of {', '.join(entry.classes)}"
            )
        corners = (element.findtext(f"bndbox/{key}") or "" for key in ("xmin", "ymin", "xmax", "ymax"))
        x0, y0, x1, y1 = _corners(corners, f"{place}: box {number}")
        # Equal corners are a click, not a box of one pixel: without area, so that `validate` finds it.
        yield name, x0 - 1, y0 - 1, x1 - (x1 <= x0), y1 - (y1 <= y0)


def _size_px(height: str | float | None, width: str | float | None) -> tuple[int, int] | None:
    """Height and width as an annotation tells them; tools that do not know them write 0, or nothing."""
    try:
        size = int(height or 0), int(width or 0)
    except ValueError:
        return None
    return size if min(size) > 0 else None


def _coco_items(entry: CocoEntry, root: Path, orphans: list[Orphan] | None) -> list[Item]:
    """COCO: boxes are x, y, width, height, 0-based; images without annotations are in use too."""
    files = entry.annotations if isinstance(entry.annotations, dict) else {"": entry.annotations}
    items: dict[str, Item] = {}
    for split, name in files.items():
        where = f"annotations of {split}" if split else "annotations"
        content = _coco_content(root / name, where)
        boxes = _coco_boxes(entry, content, where)
        for number, image in enumerate(content.images, start=1):
            place = f"{where}, image {number}"
            relative = _within(image.file_name, f"{place}: file_name")
            if not (root / entry.images / relative).is_file():
                orphan = Orphan(place, "label_without_image", "its file is not there")
                _unless_taken(orphans, [orphan], f"{place}: {orphan.reason}; add it, remove the image")
                continue
            if relative.as_posix() in items:
                raise ValueError(f"{place}: the same file as {items[relative.as_posix()].place}; keep one")
            items[relative.as_posix()] = Item(
                place=place,
                path=root / entry.images / relative,
                relative=relative,
                labels=_present(entry.classes, boxes[image.id]),
                given_split=split,
                boxes=boxes[image.id],
                size_px=_size_px(image.height, image.width),
            )
    _require_pairs(list(items.values()), orphans)
    if not items:
        raise ValueError("annotations: no image is listed")
    _find_files_without_row("annotations", root / entry.images, list(items.values()), orphans)
    return list(items.values())


def _coco_content(path: Path, where: str) -> _CocoFile:
    """A file of annotations, refused where one id would stand for two things."""
    try:
        content = _CocoFile.model_validate_json(path.read_bytes().removeprefix(codecs.BOM_UTF8))
    except FileNotFoundError:
        raise ValueError(f"{where}: the file is not in the source; correct the entry") from None
    except ValidationError as error:
        steps = error.errors(include_url=False, include_input=False)[0]["loc"]
        at = ".".join(map(str, steps)) or "its start"
        raise ValueError(
            f"{where}: not in COCO's form of images, annotations, categories (at {at})"
        ) from None
    if len({category.id for category in content.categories}) != len(content.categories):
        raise ValueError(f"{where}: a category id stands twice")
    if len({image.id for image in content.images}) != len(content.images):
        raise ValueError(f"{where}: an image id stands twice")
    return content


def _coco_boxes(entry: CocoEntry, content: _CocoFile, where: str) -> dict[int | str, list[Box]]:
    """The boxes of each image, by its id."""
    classes = {category.id: category.name for category in content.categories}
    boxes: dict[int | str, list[Box]] = {image.id: [] for image in content.images}
    for number, found in enumerate(content.annotations, start=1):
        if found.image_id not in boxes:
            raise ValueError(f"{where}: annotation {number} is of an image that is not listed")
        if classes.get(found.category_id) not in entry.classes:
            raise ValueError(f"{where}: annotation {number} is of none of {', '.join(entry.classes)}")
        if found.iscrowd:
            raise ValueError(
                f"{where}: annotation {number} is of a crowd (iscrowd), which is no box of one object;"
                " give each object its box, or take it out"
            )
        x, y, width, height = found.bbox
        boxes[found.image_id].append((classes[found.category_id], x, y, x + width, y + height))
    return boxes


def read_bags(entry: BagsEntry, root: Path, *, oldest_years: float = math.inf) -> Iterator[Bag]:
    """The bags of a source of number tables, in the order of their first rows.

    Features are the first table's columns, in its order, of all tables. Ages above `oldest_years` become it.

    Raises:
        ValueError: one line that names table and row: not a number, rows of a bag that disagree, an unknown label,
            other columns than the first table's.
    """
    features: list[str] = []
    for site, table in entry.tables.items():
        path = root / table if root.is_dir() else root
        rows = read_rows(path, header=entry.header)
        named = [entry.bag_column, entry.label_column, entry.patient_column, entry.age_column]
        _require_columns(table, rows, [*named, *entry.ignored])
        taken = {entry.bag_column, entry.label_column, entry.patient_column, *entry.ignored}
        columns = [column for column in rows[0] if column not in taken]
        features = features or columns
        if set(columns) != set(features):
            raise ValueError(
                f"{table}: other columns than the first table has; name them alike, or ignore them"
            )
        bags: dict[str, list[tuple[str, dict[str, str]]]] = {}
        for row in rows:
            place = f"{table} row {row.number}"
            key = row[entry.bag_column] if entry.bag_column else str(row.number)
            if not key:
                raise ValueError(f"{place}: column {entry.bag_column} is empty, so it has no bag")
            bags.setdefault(key, []).append((place, row))
        yield from (_bag(entry, site, features, members, oldest_years) for members in bags.values())


def _bag(
    entry: BagsEntry,
    site: str,
    features: Sequence[str],
    members: Sequence[tuple[str, dict[str, str]]],
    oldest_years: float,
) -> Bag:
    """One bag out of its rows, each with its place."""
    place, first = members[0]
    for name in filter(None, (entry.label_column, entry.patient_column)):
        if any(row[name] != first[name] for _, row in members):
            raise ValueError(f"{place}: rows of its bag have different values in column {name}")
    cell = first[entry.label_column]
    if cell and cell != entry.missing and cell not in entry.values:
        raise ValueError(f"{place}, column {entry.label_column}: a label that is none of the entry's values")
    values = [
        [
            math.nan if row[column] == entry.missing else _number(row[column], f"{where}, column {column}")
            for column in features
        ]
        for where, row in members
    ]
    age = math.nan
    if entry.age_column:
        at = features.index(entry.age_column)
        for instance in values:  # not min(), which drops a NaN
            instance[at] = oldest_years if instance[at] > oldest_years else instance[at]
        age = values[0][at]
    patient = first[entry.patient_column] if entry.patient_column else ""
    return Bag(
        place=place,
        features=np.array(values, np.float32),
        labels={entry.values[cell]: 1.0} if cell in entry.values else {},
        site=site,
        patient="" if patient == entry.missing else _known(patient),
        age=age,
    )


def _present(classes: Iterable[str], boxes: Iterable[Box]) -> dict[str, float]:
    """A label per class: whether a box has it."""
    found = {name for name, *_ in boxes}
    return {name: float(name in found) for name in classes}


def as_posix(text: str) -> PurePosixPath:
    r"""A path as a table has it, which Windows may have written.

    >>> as_posix("ill\\1.png")
    PurePosixPath('ill/1.png')
    """
    return PurePosixPath(text.replace("\\", "/"))


def _within(text: str, what: str) -> PurePosixPath:
    relative = as_posix(text)
    if not relative.name or relative.is_absolute() or ".." in relative.parts:
        raise ValueError(f"{what} must be a path within the source")
    return relative


def _frame(cell: str, where: str) -> int | None:
    """The number of a frame in a cell, None where it is empty."""
    if cell and not (cell.isascii() and cell.isdigit() and int(cell) >= 1):
        raise ValueError(f"{where}: not the number of a frame, counted from 1, or empty")
    return int(cell) if cell else None


def _cell(row: Row, column: str | None) -> str:
    """What a row says in a column that a table may lack, "" without it."""
    return row[column] if column else ""


def _known(cell: str) -> str:
    """A cell, or nothing where it says that nobody knows."""
    return "" if cell.lower() in UNKNOWN else cell


def _age(cell: str, where: str) -> float:
    """The age in a cell, in years, of a form that people write; NaN where it is unknown."""
    if cell.lower() in UNKNOWN:
        return math.nan
    match = _AGE.fullmatch(cell)
    if match is None:
        raise ValueError(
            f"{where}: not an age; write years (62, 62.5 or 62Y), or 6M, 3W, 10D for months, weeks, days, "
            "or empty the cell"
        )
    number, *units = match.groups()
    unit = "".join(letter for letter, found in zip("YMWD", units, strict=True) if found)
    return parse_age(number.replace(",", ".") + unit)


def _sex(cell: str, where: str) -> str:
    """F, M or O, empty where it is unknown."""
    if cell.lower() in UNKNOWN:
        return ""
    sex = _GERMAN_SEX.get(cell.lower()) or parse_sex(cell)
    if not sex:
        raise ValueError(f"{where}: not a sex; write F, M or O, or empty the cell")
    return sex


def _number(cell: str, where: str) -> float:
    """The number in a cell, NaN where it is empty."""
    try:
        number = float(cell) if cell.strip() else math.nan
    except ValueError:
        raise ValueError(f"{where}: not a number") from None
    if cell.strip() and not abs(number) < _LARGEST:
        raise ValueError(f"{where}: not a finite number of single precision")
    return number


def _corners(cells: Iterable[str], where: str) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = (_number(cell, where) for cell in cells)
    if math.isnan(x0 + y0 + x1 + y1):
        raise ValueError(f"{where}: a corner is missing")
    return x0, y0, x1, y1


def _require_columns(table: str, rows: Sequence[Row], names: Iterable[str | None]) -> None:
    if missing := [name for name in names if name and name not in rows[0]]:
        # Not the columns that there are: without a header, the first row's cells stand there.
        raise ValueError(f"{table}: its first line names no column {missing[0]!r}; correct it, or the entry")
