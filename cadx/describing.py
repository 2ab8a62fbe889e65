"""A hospital's own folder of images -> an entry of the catalogue, what should be looked over in it, and an experiment.

Recognised are a table with a row per image, else a folder per class (also within train, val, test). Nothing is
guessed in silence: what was assumed is a note, and what would be taken amiss later is refused here.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from cadx.catalog import SPLIT_WORDS, FolderEntry, Row, TableEntry, candidate_files, digest_source, read_rows
from cadx.layouts import UNKNOWN, Orphan, as_posix, list_items
from cadx.reading.dicom import dicom_identifiers, discreet, header_text, parse_header, patient_names
from cadx.reading.folders import is_hidden
from cadx.reading.images import read_image
from cadx.reading.vocabulary import BURNED_IN
from cadx.settings import did_you_mean
from cadx.types import Task

_USUAL_NAMES = {
    "file": ("file", "filename", "file_name", "path", "image", "image_path", "image_index", "dicom", "datei"),
    "label": ("label", "class", "target", "diagnosis", "finding", "category", "truth", "befund", "diagnose"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "case_id", "patienten_id"),
    "site": ("site", "hospital", "centre", "center", "institution", "klinik", "standort"),
    "scanner": ("scanner", "device", "machine", "manufacturer", "hersteller"),
    "age": ("age", "patient_age", "age_years", "alter"),
    "sex": ("sex", "gender", "patient_sex", "patient_gender", "geschlecht"),
    "view": ("view", "view_position", "projection"),
    "split": ("split", "set", "subset", "partition"),
}
"""What a column is for -> how people head it, lower case, other characters than letters and digits as one _."""
_TRUTH = ({"0": 0, "1": 1}, {"0.0": 0, "1.0": 1}, {"False": 0, "True": 1}, {"false": 0, "true": 1})
"""How a flag's cells say no and yes."""
_SAYS_NO = re.compile(
    r"(no|not|non|kein|keine|ohne)[ _-].*|0|no|none|nein|false|neg|negative|normal|healthy|well|benign|control"
)
_PERSON_NAME = re.compile(r"\w\^\w")
_BOX_TABLE = "boxes.csv"
_BOX_COLUMNS = ("file", "class", "x0", "y0", "x1", "y1")
_VOLUME_SUFFIXES = (".nii", ".nii.gz")
_NO_IMAGES = {
    b"PK\x03\x04": ("zips, as volumes may be", "volume"),
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), ("TIFF, as whole slides are", "slide")),
}
"""First bytes of a file that no image has -> what such files are, and of which kind their entry may be."""
_BY_HAND = "into data/catalog.yaml by hand (docs/data.md, A folder of one's own)"
_SAMPLED_FILES = 24
_MOST_CLASSES = 50
_FEW_IMAGES = 50


class _Layout(NamedTuple):
    """What a folder holds.

    Attributes:
        fields: of the entry.
        counts: images per class, in the order of the classes.
        files: the images.
        given: the official splits that occur.
        flag: the class of a table's only flag, which is the one that is looked for.
    """

    fields: dict[str, Any]
    counts: dict[str, int]
    files: list[Path]
    given: set[str]
    flag: str = ""

    @property
    def task(self) -> Task:
        """What its labels ask for."""
        if "label_columns" in self.fields:
            return "multilabel"
        return "binary" if len(self.counts) == 2 else "multiclass"

    @property
    def has_splits(self) -> bool:
        """Whether it brings its own train, val and test."""
        return {"train", "val", "test"} <= self.given


class _Labels(NamedTuple):
    """What a table says of its classes.

    Attributes:
        fields: of the entry.
        counts, flag: as in `_Layout`.
    """

    fields: dict[str, Any]
    counts: dict[str, int]
    flag: str = ""


class _Seen(NamedTuple):
    """What a sample of the files holds.

    Attributes:
        files: how many were looked into.
        unreadable: how many of them cannot be read.
        others: what in `_NO_IMAGES` they are, once for each that is.
        slices: how many lie beside another slice of their series.
        coloured: how many of the others are in colour.
        patients: whom the others name, once for each file that names somebody.
        names: the words of each name in their headers.
        identifiers: the elements that name a patient.
    """

    files: int
    unreadable: int
    others: list[tuple[str, str]]
    slices: int
    coloured: int
    patients: list[str]
    names: list[set[str]]
    identifiers: set[str]


class Described(NamedTuple):
    """An entry for a folder of one's own images.

    Attributes:
        entry: for the catalogue.
        has_splits: whether it brings its own train, val and test.
        notes: what was assumed and should be looked over.
        channels: 3 if any sampled image is in colour, else 1.
    """

    entry: FolderEntry | TableEntry
    has_splits: bool
    notes: tuple[str, ...]
    channels: int


def describe_folder(folder: Path, *, positive: str = "") -> Described:
    """An entry for a folder of one's own images, with what was assumed of it.

    The positive class is `positive`, or the one that does not say that nothing was found, or the rarest.

    Raises:
        ValueError: one line, if volumes are there, or neither a table nor a folder per class, `positive` is no class,
            something would be lost or mistaken, or `ingest` could not list the images. It repeats no file name and no
            cell but the classes.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    _refuse_volumes(folder)
    notes = [
        "modality, licence and title are yours to fill in",
        "deidentify is on: nothing in the data set repeats a file name or an identifier; "
        "turn it off if sample ids should be the file names and the files hold no identifiers",
    ]
    layout = _describe_tables(folder, notes) or _describe_class_folders(folder)
    if (folder / _BOX_TABLE).is_file() and "boxes" not in layout.fields:
        notes.append(
            f"{_BOX_TABLE} is passed over: beside a table with a row per image it is read by its columns"
            f" {', '.join(_BOX_COLUMNS)} (pixels from 0, x1 and y1 one beyond)"
        )
    seen = _looked_into(layout.files)
    _refuse_other_kinds(folder.name, seen)
    _check_classes(folder.name, layout, seen)
    found = _positive(folder.name, layout, positive, notes)
    policy = _patient_policy(layout, seen, notes)
    notes += _about_slices(seen)
    notes += [*_about_sizes(layout.counts), *_about_colour(seen), *_about_splits(layout)]
    content = {
        "title": folder.name,
        "task": layout.task,
        "classes": tuple(layout.counts),
        "positive": found,
        "modality": "medical image",
        "licence": "private: not for distribution",
        "citation": "none",
        "file": str(folder),
        "deidentify": True,
        "patient": policy,
        **layout.fields,
    }
    cls = TableEntry if layout.fields["format"] == "table" else FolderEntry
    try:
        entry = cls.model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{folder.name}: {error.errors(include_input=False)[0]['msg']}") from None
    try:
        if note := _check_listing(folder, entry):
            notes.append(note)
        digest = digest_source(folder)
    except OSError as error:  # its text repeats a file's name
        what = type(error).__name__
        raise ValueError(f"{folder.name}: a file in it cannot be read ({what}); check its rights") from None
    channels = 3 if seen.coloured else 1
    return Described(entry.model_copy(update={"digest": digest}), layout.has_splits, tuple(notes), channels)


def image_recipe(side_px: int, channels: int, model: dict[str, Any]) -> dict[str, Any]:
    """The `train` section for classes of whole images: careful augmentation, each image's own brightness undone."""
    return {
        "model": model,
        "preprocessing": {
            "channels": channels,
            "height_px": side_px,
            "width_px": side_px,
            "intensity": "image",
        },
        "augmentation": {
            "rotation_degrees": 10,
            "translation_fraction": 0.05,
            "scale_fraction": 0.1,
            "brightness": 0.3,
            "contrast": 0.2,
        },
        "ema_decay": 0.99,
    }


def experiment_sections(source: str, train: dict[str, Any], *, has_splits: bool) -> dict[str, Any]:
    """What a new experiment on a data set says beside the defaults: sections of params.yaml, by step."""
    return {
        "ingest": {"source": source},
        "split": {"strategy": "given" if has_splits else "patient"},
        "train": train,
        # Score the test split only once the recipe is frozen.
        "evaluate": {"split": "val"},
    }


def _refuse_volumes(folder: Path) -> None:
    there = candidate_files(folder)  # which itself refuses links, closed folders, and names that are no text
    if volumes := sum(path.name.lower().endswith(_VOLUME_SUFFIXES) for path in there):
        raise ValueError(
            f"{folder.name}: {volumes} of {len(there)} files are volumes (NIfTI), and only images are described here;"
            f" write an entry of kind volume {_BY_HAND}, or move them away"
        )


def _refuse_other_kinds(name: str, seen: _Seen) -> None:
    if len(seen.others) == seen.files and len(set(seen.others)) == 1:
        what, kind = seen.others[0]
        raise ValueError(
            f"{name}: all of {seen.files} sampled files are {what}, and only images are described here; write an entry"
            f" of kind {kind} {_BY_HAND}, or export images as DICOM, PNG or JPEG"
        )


def _check_listing(folder: Path, entry: FolderEntry | TableEntry) -> str:
    """Refuse what `ingest` would refuse before it opens an image; say what it leaves to a parameter, "" for nothing.

    With other advice where its own is to correct the entry, which is not written yet.
    """
    for split in entry.split_folders if isinstance(entry, FolderEntry) else ():
        if lacking := [name for name in entry.classes if not candidate_files(folder / split / name)]:
            raise ValueError(
                f"{folder.name}: {split} holds no image of class {', '.join(lacking)}; put some there, or all images"
                " into one folder per class, without splits"
            )
    alone: list[Orphan] = []
    try:
        items = list_items(entry, folder, alone)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}") from None
    if alone and isinstance(entry, TableEntry):
        return (
            f"{len(alone)} files have no row ({alone[0].place}): ingest refuses them; give each a row, with an empty"
            " label where nobody knows it, or set ingest.orphans to leave_out"
        )
    if alone:
        raise ValueError(
            f"{folder.name}: {len(alone)} files are left over ({alone[0].place}: {alone[0].reason}); move each into the"
            " folder of a class, or move them away"
        )
    named = sum(bool(item.patient) for item in items)
    if 0 < named < len(items):
        raise ValueError(
            f"{folder.name}: {len(items) - named} of {len(items)} rows name no patient; fill in all of them, or none"
        )
    return ""


def _check_classes(name: str, layout: _Layout, seen: _Seen) -> None:
    """Refuse classes that are none, without repeating what may be a person's name."""
    classes = list(layout.counts)
    # `no` and `normal` are words before they are names.
    if persons := sum(
        one in seen.patients or (not _SAYS_NO.fullmatch(one.lower()) and _is_name(one, seen.names))
        for one in classes
    ):
        raise ValueError(
            f"{name}: {persons} of {len(classes)} classes are named like patients; make a folder for each class, or add"
            " a CSV with the columns file and label"
        )
    empty = [one for one in classes if not layout.counts[one]]
    if empty and layout.fields["format"] == "folder":  # a table may well ask for a finding that nobody has
        raise ValueError(f"{name}: the folder of class {empty[0]!r} is empty; remove it")
    if unknown := [one for one in classes if one.lower() in UNKNOWN]:
        raise ValueError(
            f"{name}: {sum(layout.counts[one] for one in unknown)} images are labelled {', '.join(unknown)};"
            " give them a class, or take them out"
        )
    alike = Counter(one.casefold() for one in classes)
    if twice := [one for one in classes if alike[one.casefold()] > 1]:
        raise ValueError(f"{name}: classes {', '.join(twice)} differ in capitals alone; write them alike")


def _is_name(text: str, names: Sequence[set[str]]) -> bool:
    """Whether a text has the form of a name, is made of a name's words, or holds two of them, as family and given."""
    words = _name_words(text)
    return _PERSON_NAME.search(text) is not None or any(
        (words and words <= name) or len(words & name) > 1 for name in names
    )


def _name_words(text: str) -> set[str]:
    """The words that may be a person's, in lower case: no numbers, and no letters alone, such as initials.

    >>> sorted(_name_words("Doe_Jane M, 47110"))
    ['doe', 'jane']
    """
    # Composed: macOS lists the folder of an umlaut as letter and dots.
    words = re.split(r"[\W_]+", unicodedata.normalize("NFC", text).casefold())
    return {word for word in words if word.isalpha() and len(word) > 1}


def _positive(name: str, layout: _Layout, wanted: str, notes: list[str]) -> str | None:
    """The class to be found: the one that is wanted, else the one that probably is; None where a task has none."""
    classes = ", ".join(layout.counts)
    if wanted and wanted not in layout.counts:
        hint = did_you_mean(wanted, tuple(layout.counts))
        raise ValueError(f"positive {wanted!r} is not among the classes {classes}{hint}")
    if layout.task == "binary":
        if wanted:
            return wanted
        likely, why = _likely_positive(layout)
        notes.append(f"positive is {likely!r}, {why}: correct it if another one is looked for")
        return likely
    if wanted:
        raise ValueError(
            f"positive is for two classes, and {name} is {layout.task} ({classes}); leave it out"
        )
    return None


def _likely_positive(layout: _Layout) -> tuple[str, str]:
    """The class of two that is probably looked for, and why."""
    if layout.flag:
        return layout.flag, "which its column names"
    one, other = layout.counts
    says_no = _SAYS_NO.fullmatch(one.lower()) is not None
    if says_no != (_SAYS_NO.fullmatch(other.lower()) is not None):
        return (other if says_no else one), "as the other says that nothing was found"
    if layout.counts[one] == layout.counts[other]:
        return other, "the second of two that are as frequent"
    return min(layout.counts, key=lambda name: layout.counts[name]), "the rarest class"


def _about_sizes(counts: Mapping[str, int]) -> Iterator[str]:
    rarest = min(counts, key=lambda name: counts[name])
    if counts[rarest] < _FEW_IMAGES:
        number = "1 image" if counts[rarest] == 1 else f"{counts[rarest]} images"
        yield f"class {rarest!r} has {number}: intervals will be wide, and a split needs one in each part"


def _about_slices(seen: _Seen) -> Iterator[str]:
    if seen.slices:
        yield (
            f"{seen.slices} of {seen.files} sampled files lie beside other slices of their series, and every slice"
            f" counts as an image: where a label is of the whole series, write an entry of kind volume {_BY_HAND}"
        )


def _about_colour(seen: _Seen) -> Iterator[str]:
    if seen.coloured:
        yield (
            f"{seen.coloured} of {seen.files} sampled files are in colour, so preprocessing.channels is 3: set it to 1"
            " if their colour means nothing"
        )


def _about_splits(layout: _Layout) -> Iterator[str]:
    if layout.has_splits:
        yield "split.strategy is given: train, val and test stay as they are"
    elif layout.given:
        yield (
            f"official splits are kept, but only {' and '.join(sorted(layout.given))} are there, so split.strategy is"
            " patient"
        )


# --- A folder per class -------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _describe_class_folders(folder: Path) -> _Layout:
    inner = _folders(folder)
    splits = {path.name: SPLIT_WORDS[path.name.lower()] for path in inner if path.name.lower() in SPLIT_WORDS}
    if splits and len(splits) < len(inner) and len(splits) > 1:
        raise ValueError(
            f"{folder.name}: {', '.join(splits)} are named like splits, the other {len(inner) - len(splits)} folders"
            " are not; put class folders into each split, and the rest elsewhere"
        )
    by_split = bool(splits) and len(splits) == len(inner)
    counts: Counter[str] = Counter()
    files: list[Path] = []
    for parent in inner if by_split else [folder]:
        for path in _folders(parent):
            images = candidate_files(path)
            counts[path.name] += len(images)
            files.extend(images)
    if not 2 <= len(counts) <= _MOST_CLASSES:
        raise ValueError(
            f"{folder.name}: {len(counts)} folders with files where 2 to {_MOST_CLASSES}, one for each class, were"
            " expected; make one for each class, or add a CSV with the columns file and label"
        )
    fields = {"format": "folder"} | ({"split_folders": splits} if by_split else {})
    return _Layout(
        fields,
        {name: counts[name] for name in sorted(counts)},
        files,
        set(splits.values()) if by_split else set(),
    )


# --- A table ------------------------------------------------------------------------------------------


def _describe_tables(folder: Path, notes: list[str]) -> _Layout | None:
    """The first table with a row per image; None where there is no table at all."""
    tables = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".csv", ".tsv") and path.name != _BOX_TABLE and not is_hidden(path.name)
    )
    found = [(table, layout) for table in tables if (layout := _describe_table(folder, table, notes))]
    if len(found) > 1:
        raise ValueError(
            f"{', '.join(table.name for table, _ in found)}: each has a row per image; keep one of them there"
        )
    if tables and not found:
        wanted = f"{', '.join(_USUAL_NAMES['file'])} and {', '.join(_USUAL_NAMES['label'])} or label_<class>"
        raise ValueError(
            f"{tables[0].name}: no columns for file and label; name them {wanted}, or move the table away where"
            " folders are the classes"
        )
    if others := len(tables) - len(found):
        notes.append(f"tables passed over: {others}, without columns for file and label")
    return found[0][1] if found else None


def _describe_table(folder: Path, table: Path, notes: list[str]) -> _Layout | None:
    """A table with a row per image; None where no columns are named for file and label."""
    rows = read_rows(table)
    known = _usual_columns(rows[0])
    file_column, label_column = known.pop("file"), known.pop("label")
    flags = {name[len("label_") :]: name for name in rows[0] if name.startswith("label_")}
    if file_column is None or not (label_column or flags):
        return None
    root, files = _files_of(folder, table.name, rows, file_column)
    given = _official_splits(rows, known, notes)
    if label_column is not None and flags:
        notes.append(
            f"columns passed over: {', '.join(flags.values())}, as column {label_column} is the label; take it out of"
            " the table where they are meant"
        )
    taken = {file_column, label_column, *flags.values(), *known.values()}
    if others := [name for name in rows[0] if name not in taken]:
        notes.append(f"columns passed over: {', '.join(others)}; name them {', '.join(known)} to be read")
    labels = _describe_labels(table.name, rows, label_column, flags, notes)
    fields = {"format": "table", "table": table.name, "file_column": file_column, **labels.fields}
    if root != folder:
        fields["images"] = root.name
    if optional := {meaning: name for meaning, name in known.items() if name}:
        fields["columns"] = optional
    box_table = folder / _BOX_TABLE
    boxes = read_rows(box_table, may_be_empty=True) if box_table.is_file() else []
    if boxes and set(_BOX_COLUMNS) <= set(boxes[0]):
        fields["boxes"] = {"table": _BOX_TABLE, "x1": "x1", "y1": "y1"}
    return _Layout(fields, labels.counts, files, given, labels.flag)


def _usual_columns(names: Iterable[str]) -> dict[str, str | None]:
    """What a column is for -> its name, however it is written; None where no column is for that."""
    columns = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in names}
    return {
        meaning: next((columns[usual] for usual in usuals if usual in columns), None)
        for meaning, usuals in _USUAL_NAMES.items()
    }


def _official_splits(rows: Sequence[Row], known: dict[str, str | None], notes: list[str]) -> set[str]:
    """The splits that a table names; a column of other words is taken out of `known`."""
    column = known["split"]
    if column is None:
        return set()
    words = {row[column].lower() for row in rows}
    if words <= SPLIT_WORDS.keys():
        return {SPLIT_WORDS[word] for word in words}
    known["split"] = None
    notes.append(f"column {column} is passed over: some of its cells are not train, val, calibration or test")
    return set()


def _describe_labels(
    table: str, rows: Sequence[Row], label_column: str | None, flags: dict[str, str], notes: list[str]
) -> _Labels:
    """The classes of a table: of its label column, else of its only flag, else one for each flag."""
    if label_column is None and len(flags) > 1:
        labels = _Labels(
            {"label_columns": flags},
            {name: sum(row[column] in ("1", "1.0") for row in rows) for name, column in flags.items()},
        )
    elif label_column is None:
        ((flag, label_column),) = flags.items()
        values = _values_of_flag(table, rows, flag, label_column)
        cells = Counter(values[row[label_column]] for row in rows if row[label_column])
        labels = _Labels(
            {"label_column": label_column, "values": values},
            {name: cells[name] for name in values.values()},
            flag,
        )
    else:
        cells = Counter(row[label_column] for row in rows if row[label_column])
        labels = _Labels({"label_column": label_column}, {name: cells[name] for name in sorted(cells)})
    if label_column and (unlabelled := sum(not row[label_column] for row in rows)):
        notes.append(f"{unlabelled} of {len(rows)} rows have no label: their images teach nothing")
    column = f"column {label_column}" if label_column else "the columns label_<class>"
    if not labels.flag and (joined := _joined(labels.counts)):
        raise ValueError(
            f"{table}: {joined} of {len(labels.counts)} labels in {column} are others joined by | or a"
            " semicolon; give each finding a column label_<class> of 0 and 1 in place of it, or write + where a"
            " combination is a class"
        )
    if len(labels.counts) > _MOST_CLASSES or (label_column and len(labels.counts) < 2):
        raise ValueError(
            f"{table}: {len(labels.counts)} classes in {column}, where 2 to {_MOST_CLASSES} were expected; is that the"
            " label?"
        )
    return labels


def _values_of_flag(table: str, rows: Sequence[Row], flag: str, column: str) -> dict[str, str]:
    """Cell -> class, of a column that says no and yes: `no_` and the flag's name, or the flag's name."""
    cells = {row[column] for row in rows} - {""}
    truth = next((words for words in _TRUTH if cells <= words.keys()), None)
    if truth is None:
        raise ValueError(f"{table}: column {column} holds something else than 0, 1 and empty cells")
    return {cell: flag if yes else f"no_{flag}" for cell, yes in truth.items()}


def _joined(labels: Iterable[str]) -> int:
    """How many labels hold others, such as `Effusion|Mass` beside `Mass`: several findings, not a class.

    >>> _joined(["Effusion|Mass", "Mass", "tumour; benign", "tumour; malignant"])
    1
    """
    known = set(labels)
    parts = {label: {part.strip() for part in re.split(r"[|;]", label)} for label in known}
    return sum(not known.isdisjoint(held - {label}) for label, held in parts.items())


def _files_of(folder: Path, table: str, rows: Sequence[Row], column: str) -> tuple[Path, list[Path]]:
    """The folder that a table's paths start from, and its files."""
    paths = [as_posix(row[column]) for row in rows]
    for row, path in zip(rows, paths, strict=True):
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{table} row {row.number}: its path leads out of {folder.name}; write it from there, or from a folder"
                " in it"
            )
    roots = [folder, *_folders(folder)]
    root = max(roots, key=lambda one: sum((one / path).is_file() for path in paths))
    files = [root / path for path in paths]
    missing = [row.number for row, path in zip(rows, files, strict=True) if not path.is_file()]
    if missing:
        raise ValueError(
            f"{table} row {missing[0]}: its file is neither in {folder.name} nor one folder below; so it is in"
            f" {len(missing)} of {len(rows)} rows: add the files, or remove the rows"
        )
    return root, files


# --- Patients -----------------------------------------------------------------------------------------


def _looked_into(files: Sequence[Path]) -> _Seen:
    """What a sample of the files holds, spread over all of them."""
    step = max(1, len(files) // _SAMPLED_FILES)
    patients: list[str] = []
    names: list[set[str]] = []
    identifiers: set[str] = set()
    others: list[tuple[str, str]] = []
    num_seen = unreadable = slices = coloured = 0
    ordered = sorted(set(files))  # a table may name the slices of a series far from each other
    following = dict(zip(ordered, (*ordered[1:], *ordered[:1]), strict=True))
    for path in files[::step]:
        beside = following[path]
        num_seen += 1
        try:
            identifiers.update(dicom_identifiers(path))
            names += _names_in(path)
            image = read_image(path)
            slices += path != beside and _are_slices(path, beside)
        except (ValueError, OSError):
            unreadable += 1
            others += _other_kind(path)
            continue
        coloured += image.pixels.ndim == 3
        if image.patient is not None:
            patients.append(image.patient)
    return _Seen(num_seen, unreadable, others, slices, coloured, patients, names, identifiers)


def _other_kind(path: Path) -> list[tuple[str, str]]:
    """What in `_NO_IMAGES` a file is that is no image, if it is any."""
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError:
        return []
    return [_NO_IMAGES[start]] if start in _NO_IMAGES else []


def _are_slices(*paths: Path) -> bool:
    """Whether files are slices of one series: a radiograph has no place in space."""
    try:
        with discreet():
            headers = [parse_header(path.read_bytes()) for path in paths]
    except Exception:  # no DICOM, or damaged: pydicom raises every type there is
        return False
    placed = all("ImagePositionPatient" in header for header in headers)
    series = {header_text(header, "SeriesInstanceUID") for header in headers}
    return placed and len(series) == 1 and "" not in series


def _names_in(path: Path) -> list[set[str]]:
    """The words of each name in a file's header, without title and degree; of none with a digit, a pseudonym's sign."""
    called = (
        name for names in patient_names(path) for name in names.split("=") if not re.search(r"\d", name)
    )
    # Family, given and middle name are the first three parts, PS3.5 6.2.1.2.
    return [_name_words(" ".join(name.split("^")[:3])) for name in called]


def _patient_policy(layout: _Layout, seen: _Seen, notes: list[str]) -> str:
    """Whether patients are known, from a sample of the files and the table's columns."""
    if seen.unreadable:
        notes.append(f"{seen.unreadable} of {seen.files} sampled files cannot be read: ingest will list them")
    if BURNED_IN in seen.identifiers:
        notes.append(
            f"{BURNED_IN} is not NO: ingest refuses such files; mask the pixels at the source and set it to NO"
        )
    if dropped := seen.identifiers - {BURNED_IN}:
        notes.append(f"the files carry identifiers ({', '.join(sorted(dropped))}): they will be dropped")
    if "patient" in layout.fields.get("columns", {}):
        return "hmac"
    if seen.patients:
        if lacking := seen.files - seen.unreadable - len(seen.patients):
            notes.append(
                f"{lacking} of {seen.files} sampled files name no patient: ingest refuses those; a CSV with the"
                " columns file, label and patient can name them"
            )
        return "hmac"
    notes.append(
        "no patients were found, so every image counts as one: if patients have several images, give a CSV with the"
        " columns file, label and patient, or images of one patient will stand in train and test"
    )
    return "per-image"
