"""A hospital's own folder of images, volumes or slides -> an entry of the catalogue, and what to look over in it.

Recognised are boxes in COCO's or Pascal VOC's form, else a table with a row per sample, else a folder per class (also
within train, val, test). Nothing is guessed in silence: what was assumed is a note, and what would be taken amiss later
is refused here.
"""

import json
import re
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from pydantic import ValidationError

from cadx.catalog import (
    SPLIT_WORDS,
    CocoEntry,
    FolderEntry,
    Row,
    TableEntry,
    VocEntry,
    candidate_files,
    digest_source,
    read_rows,
)
from cadx.layouts import UNKNOWN, FileEntry, Item, Orphan, as_posix, list_items
from cadx.reading.dicom import dicom_identifiers, discreet, header_text, parse_header, patient_names
from cadx.reading.folders import is_hidden
from cadx.reading.identifiers import file_identifiers
from cadx.reading.images import read_image
from cadx.reading.slides import open_slide
from cadx.reading.source import HEAD_BYTES, MAX_FILE_BYTES, read_bytes, sniff, sniff_file
from cadx.reading.vocabulary import BURNED_IN, LABEL_IMAGES
from cadx.reading.volumes import read_volume
from cadx.recipes import detector_recipe, image_recipe, lesion_sizes_px, schedule, slide_recipe, volume_recipe
from cadx.settings import did_you_mean
from cadx.types import Kind, Task

_USUAL_NAMES = {
    "file": ("file", "filename", "file_name", "path", "image", "image_path", "image_index", "dicom", "datei"),
    "label": ("label", "class", "target", "diagnosis", "finding", "category", "truth", "befund", "diagnose"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "case_id", "patienten_id"),
    "site": ("site", "hospital", "centre", "center", "institution", "klinik", "standort"),
    "scanner": ("scanner", "device", "machine", "manufacturer", "hersteller"),
    "age": ("age", "patient_age", "age_years", "alter"),
    "sex": ("sex", "gender", "patient_sex", "patient_gender", "geschlecht"),
    "view": ("view", "view_position", "projection"),
    "mask": ("mask", "mask_path", "mask_file", "segmentation", "seg", "maske", "segmentierung"),
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
_BOX_NAMES = {
    "file": (*_USUAL_NAMES["file"], "image_id"),
    "class_name": ("class", "class_name", *_USUAL_NAMES["label"][2:], "label"),
    "x0": ("x0", "x_min", "xmin", "x"),
    "y0": ("y0", "y_min", "ymin", "y"),
    "x1": ("x1", "x_max", "xmax"),
    "y1": ("y1", "y_max", "ymax"),
    "width": ("width", "w"),
    "height": ("height", "h"),
}
"""The same of a table of boxes."""
_NIFTI_SUFFIXES = (".nii", ".nii.gz")
_FIRST_BYTES: dict[bytes, Kind] = {
    b"PK\x03\x04": "volume",
    **dict.fromkeys((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "slide"),
}
"""First bytes of a zip, as of slices, and of TIFF, as whole slides are -> the kind of samples; no image has them."""
_FORMS = {
    "image": "DICOM, PNG or JPEG",
    "volume": "NIfTI files, zips or folders of DICOM slices",
    "slide": "whole slides (TIFF)",
}
_MASK_WORD = re.compile(r"(^|[^a-z])(mask|maske|seg|segmentation|labels?|roi)([^a-z]|$)", re.IGNORECASE)
_ENTRIES: dict[str, type[FileEntry]] = {
    "coco": CocoEntry,
    "voc": VocEntry,
    "table": TableEntry,
    "folder": FolderEntry,
}
_NO_CLASS = re.compile(
    r"(images?|jpegimages|bilder|masks?|masken|seg(mentation)?s?|labels?|annotations?|imagesets|rois?|box(es)?)"
    r"([_-]?(tr|ts|train|val|test))?",
    re.IGNORECASE,
)
"""Folders of what belongs to samples of all classes."""
_SAMPLED_FILES = 24
_SAMPLED_VOLUMES = 6  # which are read whole
_MOST_CLASSES = 50
_FEW_SAMPLES = 50


class _Layout(NamedTuple):
    """What a folder holds.

    Attributes:
        kind: of the samples.
        fields: of the entry.
        counts: samples per class, in the order of the classes; of a detection, such as have a box of it.
        samples: their files, or folders of slices.
        given: the official splits that occur.
        flag: the class of a table's only flag, which is the one that is looked for.
    """

    kind: Kind
    fields: dict[str, Any]
    counts: dict[str, int]
    samples: list[Path]
    given: set[str]
    flag: str = ""

    @property
    def task(self) -> Task:
        """What its labels ask for."""
        if self.fields["format"] in ("coco", "voc") or (
            "boxes" in self.fields and self.fields.keys().isdisjoint(("label_column", "label_columns"))
        ):
            return "detection"
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


class _Boxes(NamedTuple):
    """What a table says of its boxes.

    Attributes:
        fields: of the entry's `boxes`.
        counts: images per class.
    """

    fields: dict[str, str]
    counts: dict[str, int]


@dataclass
class _Seen:
    """What some of the samples hold.

    Attributes:
        number: how many were looked into.
        read: how many of them were read whole.
        reasons: of those that cannot be read, why.
        patients: whom they name, once for each that names somebody.
        nameless: how many of those that can be read name nobody.
        names: the words of each name in their headers.
        identifiers: what in their files may name a patient.
        modalities: what their headers say.
        coloured: how many images are in colour.
        longest_px: longer side of each image.
        volumes: of those that were read, voxels and mm along depth, height and width, and whether values are signed.
    """

    number: int
    read: int = 0
    reasons: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    nameless: int = 0
    names: list[set[str]] = field(default_factory=list)
    identifiers: set[str] = field(default_factory=set)
    modalities: set[str] = field(default_factory=set)
    coloured: int = 0
    longest_px: list[int] = field(default_factory=list)
    volumes: list[tuple[tuple[int, ...], tuple[float, ...], bool]] = field(default_factory=list)


class Described(NamedTuple):
    """An entry for a folder of one's own images.

    Attributes:
        entry: for the catalogue.
        has_splits: whether it brings its own train, val and test.
        notes: what was assumed and should be looked over.
        train: section of params.yaml that suits such samples.
    """

    entry: FileEntry
    has_splits: bool
    notes: tuple[str, ...]
    train: dict[str, Any]


def describe_folder(folder: Path, *, positive: str = "") -> Described:
    """An entry for a folder of one's own images, volumes or slides, with what was assumed of it.

    The positive class is `positive`, or the one that does not say that nothing was found, or the rarest.

    Raises:
        ValueError: one line, if there are neither boxes nor a table nor a folder per class, samples are of several
            kinds, `positive` is no class, something would be lost or mistaken, or `ingest` could not list the samples.
            It repeats no file name and no cell but the classes.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    try:
        return _describe(folder, positive)
    except OSError as error:  # its text repeats a file's name
        what = type(error).__name__
        raise ValueError(f"{folder.name}: a file in it cannot be read ({what}); check its rights") from None


def _describe(folder: Path, positive: str) -> Described:
    there = candidate_files(folder)  # which itself refuses links, closed folders, and names that are no text
    notes = ["modality, licence and title are yours to fill in"]
    layout = (
        _describe_coco(folder, notes)
        or _describe_voc(folder)
        or _describe_tables(folder, notes)
        or _describe_class_folders(folder, notes)
    )
    if layout.kind != "volume" and (nifti := sum(map(_is_nifti, there))):
        raise ValueError(
            f"{folder.name}: {nifti} of {len(there)} files are volumes (NIfTI), the samples are {layout.kind}s; move"
            " the volumes away, into a folder of their own for an entry of their own"
        )
    if (folder / _BOX_TABLE).is_file() and not any(_BOX_TABLE in note for note in notes):
        notes.append(
            f"{_BOX_TABLE} is passed over: beside a table with a row per sample it is read by its columns file, class,"
            " x0, y0, x1, y1 (pixels from 0, x1 and y1 one beyond) or other usual names of these"
        )
    if layout.fields["format"] in ("coco", "voc") and any(folder.glob("*.[ct]sv")):
        notes.append(
            "tables are passed over beside COCO's and Pascal VOC's files, as are other folders of images: to name"
            f" patients, give a CSV with a row for every image, and {_BOX_TABLE} in their place"
        )
    if not layout.counts:
        raise ValueError(f"{folder.name}: its annotations hold no box; there is nothing to learn to find")
    seen = _look_at(layout)
    if seen.reasons and not seen.read:
        raise ValueError(
            f"{folder.name}: none of the sampled {layout.kind}s can be read; the first: {seen.reasons[0]}"
        )
    _check_classes(folder.name, layout, seen)
    found = _positive(folder.name, layout, positive, notes)
    policy = _patient_policy(layout, seen, notes)
    notes += [*_about_sizes(layout), *_about_kind(layout, seen), *_about_splits(layout)]
    modality = next(iter(seen.modalities)) if len(seen.modalities) == 1 else f"medical {layout.kind}"
    content = {
        "title": folder.name,
        "kind": layout.kind,
        "task": layout.task,
        "classes": tuple(layout.counts),
        "positive": found,
        "modality": modality,
        "licence": "private: not for distribution",
        "citation": "none",
        "file": str(folder),
        "deidentify": True,
        "patient": policy,
        **layout.fields,
    }
    try:
        entry = _ENTRIES[layout.fields["format"]].model_validate(content)
    except ValidationError as error:
        raise ValueError(f"{folder.name}: {error.errors(include_input=False)[0]['msg']}") from None
    items = _list(folder, entry, notes)
    digest = digest_source(folder)
    if layout.task == "detection" and (without := sum(not item.boxes for item in items)):
        notes.append(
            f"{without} of {len(items)} images have no box: they count as images in which there is nothing to find"
        )
    # A patch is labelled by its mask where the task is binary; a small one without may show nothing of its label.
    ill = [item for item in items if found and item.labels.get(found) == 1]
    has_masks = bool(ill) and all(item.mask for item in ill)
    if layout.kind == "volume":
        notes += _about_masks(found, items, has_masks=has_masks)
    train = _recipe(layout, seen, items, has_masks=has_masks)
    return Described(entry.model_copy(update={"digest": digest}), layout.has_splits, tuple(notes), train)


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(_NIFTI_SUFFIXES)


def _kind_of(name: str, samples: Sequence[Path]) -> Kind:
    """The kind of which all samples are; image where a few others are among images."""
    kinds = Counter(map(_kind_of_one, samples))
    if len(kinds) == 1:
        return next(iter(kinds))
    if any(_is_nifti(path) or path.is_dir() for path in samples):
        counted = ", ".join(f"{count} {_FORMS[kind]}" for kind, count in kinds.most_common())
        raise ValueError(
            f"{name}: samples of several kinds ({counted}); make an entry for each, or move away what is none"
        )
    return "image"  # ingest lists the others, one by one


def _kind_of_one(path: Path) -> Kind:
    if path.is_dir() or _is_nifti(path):
        return "volume"
    try:
        with path.open("rb") as stream:
            head = stream.read(HEAD_BYTES)
    except OSError:
        return "image"
    # DICOM may begin like a TIFF, so that viewers of TIFF can open it too.
    return "image" if sniff(head) else _FIRST_BYTES.get(head[:4], "image")


def _list(folder: Path, entry: FileEntry, notes: list[str]) -> list[Item]:
    """The samples, as `ingest` will list them; refused is what it would refuse before it opens one.

    With other advice where its own is to correct the entry, which is not written yet. What it leaves to a parameter is
    a note.
    """
    for split in entry.split_folders if isinstance(entry, FolderEntry) else ():
        if lacking := [name for name in entry.classes if not candidate_files(folder / split / name)]:
            raise ValueError(
                f"{folder.name}: {split} holds no {entry.kind} of class {', '.join(lacking)}; put some there, or all"
                f" {entry.kind}s into one folder per class, without splits"
            )
    alone: list[Orphan] = []
    try:
        items = list_items(entry, folder, alone)
    except ValueError as error:
        raise ValueError(f"{folder.name}: {error}") from None
    if alone and isinstance(entry, FolderEntry):
        raise ValueError(
            f"{folder.name}: {len(alone)} files are left over ({alone[0].place}: {alone[0].reason}); move each into the"
            " folder of a class, or move them away"
        )
    if alone and isinstance(entry, TableEntry):
        notes.append(
            f"{len(alone)} files have no row ({alone[0].place}): ingest refuses them; give each a row, with an empty"
            " label where nobody knows it, or set ingest.orphans to leave_out"
        )
    elif alone:
        notes.append(
            f"{len(alone)} files are alone ({alone[0].place}: {alone[0].reason}): ingest refuses them; complete each,"
            " or set ingest.orphans to leave_out"
        )
    named = sum(bool(item.patient) for item in items)
    if 0 < named < len(items):
        raise ValueError(
            f"{folder.name}: {len(items) - named} of {len(items)} rows name no patient; fill in all of them, or none"
        )
    return items


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
            f"{name}: {sum(layout.counts[one] for one in unknown)} {layout.kind}s are labelled {', '.join(unknown)};"
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


def _about_sizes(layout: _Layout) -> Iterator[str]:
    rarest = min(layout.counts, key=lambda name: layout.counts[name])
    if layout.counts[rarest] < _FEW_SAMPLES:
        number = f"{layout.counts[rarest]} {layout.kind}" + ("" if layout.counts[rarest] == 1 else "s")
        yield f"class {rarest!r} has {number}: intervals will be wide, and a split needs one in each part"


def _about_kind(layout: _Layout, seen: _Seen) -> Iterator[str]:
    if layout.kind == "slide":
        yield "kind is slide: files stay as they are, with every tag; a file whose tags name somebody is refused"
    else:
        yield (
            "deidentify is on: nothing in the data set repeats a file name or an identifier; "
            "turn it off if sample ids should be the file names and the files hold no identifiers"
        )
    if layout.kind == "volume" and not _in_hu(seen):
        yield (
            "values are not known to be in HU: of CT, write so under modality and give preprocessing.window_hu,"
            " such as [-1000, 1000]"
        )
    if seen.coloured:
        yield (
            f"{seen.coloured} of {seen.number} sampled files are in colour, so preprocessing.channels is 3: set it to"
            " 1 if their colour means nothing"
        )


def _in_hu(seen: _Seen) -> bool:
    return seen.modalities == {"CT"} and all(is_signed for _, _, is_signed in seen.volumes)


def _about_masks(positive: str | None, items: Sequence[Item], *, has_masks: bool) -> Iterator[str]:
    masked = [item for item in items if item.mask]
    if has_masks:
        yield "a patch shows what masks mark"
    elif masked:
        yield (
            f"{len(masked)} of {len(items)} volumes have a mask, so a patch holds a whole volume: small lesions need"
            " two classes, and a mask of every volume that has what is looked for"
        )
    else:
        yield (
            "no masks are named, so a patch holds a whole volume: small lesions need a CSV with the columns file,"
            " label and mask"
        )
    if positive and (others := sum(item.labels.get(positive) != 1 for item in masked)):
        yield (
            f"{others} volumes of the other class have a mask: what it marks is learnt as {positive!r}, so it has to be"
            " empty; leave out masks of organs"
        )


def _recipe(layout: _Layout, seen: _Seen, items: Sequence[Item], *, has_masks: bool) -> dict[str, Any]:
    """The `train` section that suits what was seen, all boxes, and masks if every positive sample has one."""
    channels = 3 if seen.coloured else 1
    if layout.task == "detection":
        lesion_px = lesion_sizes_px(np.array([corners for item in items for _, *corners in item.boxes]))
        return detector_recipe("yolo", int(np.median(seen.longest_px or [512])), lesion_px, channels)
    if layout.kind == "slide":
        return slide_recipe()
    if layout.kind == "image":
        train = image_recipe(224, channels, {"family": "resnet", "depth": 18})
        return train | schedule(len(layout.samples), 32)
    spacing_mm = size_px = None
    if seen.volumes:
        shapes, steps = (np.array([volume[at] for volume in seen.volumes]) for at in (0, 1))
        spacing_mm = np.median(steps, 0)
        # Without masks of the largest, so that few are larger.
        size_px = np.median(shapes, 0) if has_masks else (shapes * steps).max(0) / spacing_mm
    is_small = has_masks or size_px is None or max(size_px) <= 32
    light = {"family": "resnet3d", "depth": 10, "width": 0.5, "stem": "small"}
    train = volume_recipe(
        light if is_small else {"family": "resnet3d", "depth": 18, "width": 0.5},
        (32, 32, 32) if size_px is None else size_px.tolist(),
        None if spacing_mm is None else spacing_mm.tolist(),
        most_px=32 if is_small else 64,
        step_px=8 if is_small else 16,
        has_masks=has_masks,
        in_hu=_in_hu(seen),
    )
    return train | schedule(len(layout.samples), 16 if is_small else 8)


def _about_splits(layout: _Layout) -> Iterator[str]:
    if layout.has_splits:
        yield "split.strategy is given: train, val and test stay as they are"
    elif layout.given:
        yield (
            f"official splits are kept, but only {' and '.join(sorted(layout.given))} are there, so split.strategy is"
            " patient"
        )


# --- Boxes --------------------------------------------------------------------------------------------


def _describe_coco(folder: Path, notes: list[str]) -> _Layout | None:
    """Boxes in COCO's JSON, of one file or of one for each split; None where there is none."""
    inner = _folders(folder)
    found = {
        path: content
        for place in (folder, *inner)
        for path in sorted(place.glob("*.json"))
        if not is_hidden(path.name) and (content := _coco_content(path))
    }
    if not found:
        return None
    by_split = {
        SPLIT_WORDS[word]: path
        for path in found
        for word in re.split(r"[^a-z]+", path.stem.lower())
        if word in SPLIT_WORDS
    }
    if len(found) == 1:
        by_split = {}
    elif sorted(by_split.values()) != sorted(found):
        raise ValueError(
            f"{folder.name}: {len(found)} files are in COCO's form; name each after its split (train, val, test),"
            " with file names from one folder of images, or join them into one"
        )
    try:
        names = [as_posix(image["file_name"]) for content in found.values() for image in content["images"]]
        categories = {
            (path, category["id"]): category["name"]
            for path, content in found.items()
            for category in content["categories"]
        }
        if not all(isinstance(name, str) for name in categories.values()):
            raise TypeError
        counts = _images_per_class(
            (categories[path, box["category_id"]], (path, box["image_id"]))
            for path, content in found.items()
            for box in content["annotations"]
        )
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{folder.name}: a file in COCO's form has an image without file_name, a category without id or name, or an"
            " annotation of neither; write it anew"
        ) from None
    if away := sum(name.is_absolute() or ".." in name.parts for name in names):
        raise ValueError(
            f"{folder.name}: {away} of {len(names)} file names in COCO's form lead out of it; write them from there, or"
            " from a folder in it"
        )
    if unused := sorted(set(categories.values()) - counts.keys()):
        notes.append(f"categories without a box are passed over: {', '.join(unused)}")
    roots = [folder, *inner, *(path for place in inner for path in _folders(place))]
    root = max(roots, key=lambda one: sum((one / name).is_file() for name in names))
    for path, content in found.items():
        if (
            not any((root / as_posix(image["file_name"])).is_file() for image in content["images"])
            and len(found) > 1
        ):
            raise ValueError(
                f"{folder.name}: images of {path.stem} are in another folder than those of the other splits; put all"
                f" into one, or let file names start from {folder.name}"
            )
    files = {path: path.relative_to(folder).as_posix() for path in found}
    fields: dict[str, Any] = {
        "format": "coco",
        "annotations": {split: files[path] for split, path in by_split.items()} or files[next(iter(found))],
    }
    if root != folder:
        fields["images"] = root.relative_to(folder).as_posix()
    samples = [path for name in names if (path := root / name).is_file()]
    return _Layout("image", fields, counts, samples, set(by_split))


def _coco_content(path: Path) -> dict[str, Any] | None:
    """What a JSON file holds that has COCO's three parts; None for any other."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return None
    is_coco = isinstance(content, dict) and {"images", "categories", "annotations"} <= content.keys()
    return content if is_coco else None


def _describe_voc(folder: Path) -> _Layout | None:
    """Boxes in Pascal VOC's XML, a folder of them beside one of images; None where there is none."""
    inner = _folders(folder)
    annotations = [path for path in inner if _are_voc(path)]
    if len(annotations) != 1 or len(inner) == 1:
        return None
    notes = candidate_files(annotations[0])
    stems = {path.stem for path in notes}
    held = {path: candidate_files(path) for path in inner if path != annotations[0]}
    # Masks of a VOC data set have the names of its images, too.
    images = max(
        held, key=lambda one: (one.name == "JPEGImages", len(stems & {path.stem for path in held[one]}))
    )
    lists = {
        SPLIT_WORDS[path.stem.lower()]: path.relative_to(folder).as_posix()
        for path in sorted(folder.glob("ImageSets/Main/*.txt"))
        if path.stem.lower() in SPLIT_WORDS
    }
    fields: dict[str, Any] = {"format": "voc", "images": images.name, "annotations": annotations[0].name}
    if lists:
        fields["splits"] = lists
    counts = _images_per_class((name, path) for path in notes for name in _voc_names(path) or ())
    return _Layout("image", fields, counts, held[images], set(lists))


def _are_voc(folder: Path) -> bool:
    """Whether a folder holds XML alone, and one of its files is an annotation."""
    files = candidate_files(folder) if any(folder.glob("*.xml")) else []
    return all(file.suffix.lower() == ".xml" for file in files) and any(
        _voc_names(file) is not None for file in files
    )


def _voc_names(path: Path) -> set[str] | None:
    """The classes of which an annotation has boxes; None where it is none: `ingest` says what is wrong with it."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, parse

    try:
        annotation = parse(path).getroot()
    except (ParseError, DefusedXmlException, LookupError, ValueError, RecursionError):
        return None
    if annotation is None or annotation.tag != "annotation":
        return None
    return {(element.findtext("name") or "").strip() for element in annotation.iter("object")}


# --- A folder per class -------------------------------------------------------------------------------


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not is_hidden(path.name))


def _how_a_table(folder: Path) -> str:
    if _read_boxes(folder):
        return f"add a CSV with the column file and a row for every image, beside {_BOX_TABLE}"
    return "add a CSV with the columns file and label, and mask where there are masks"


def _describe_class_folders(folder: Path, notes: list[str]) -> _Layout:
    inner = _folders(folder)
    splits = {path.name: SPLIT_WORDS[path.name.lower()] for path in inner if path.name.lower() in SPLIT_WORDS}
    if splits and len(splits) < len(inner) and len(splits) > 1:
        raise ValueError(
            f"{folder.name}: {', '.join(splits)} are named like splits, the other {len(inner) - len(splits)} folders"
            " are not; put class folders into each split, and the rest elsewhere"
        )
    by_split = bool(splits) and len(splits) == len(inner)
    held = {
        path: candidate_files(path)
        for parent in (inner if by_split else [folder])
        for path in _folders(parent)
    }
    classes = sorted({path.name for path in held})
    if not 2 <= len(classes) <= _MOST_CLASSES:
        raise ValueError(
            f"{folder.name}: {len(classes)} folders with files where 2 to {_MOST_CLASSES}, one for each class, were"
            f" expected; make one for each class, or {_how_a_table(folder)}"
        )
    if others := [name for name in classes if _NO_CLASS.fullmatch(name)]:
        raise ValueError(
            f"{folder.name}: folder {', '.join(others)} is no class; make one for each class, or {_how_a_table(folder)}"
        )
    files = [path for found in held.values() for path in found]
    kind = _kind_of(folder.name, files)
    if kind == "volume":
        _check_class_volumes(folder.name, held)
    elif kind == "image" and (slices := _number_of_slices(files)):
        series = {path: sorted({file.parent for file in found}) for path, found in held.items()}
        folders = [one for found in series.values() for one in found]
        if all(one.parent == path for path, found in series.items() for one in found) and all(
            _number_of_slices(candidate_files(one)) for one in _spread(folders, _SAMPLED_FILES)
        ):
            kind = "volume"
            held = series
            notes.append(
                "kind is volume, as each folder in that of a class holds slices of a series; where slices have labels"
                " of their own, give a CSV with a row per slice"
            )
        else:
            notes.append(_slices_are_images(slices, files))
    counts: Counter[str] = Counter()
    for path, found in held.items():
        counts[path.name] += len(found)
    return _Layout(
        kind,
        {"format": "folder"} | ({"split_folders": splits} if by_split else {}),
        {name: counts[name] for name in classes},
        [path for found in held.values() for path in found],
        set(splits.values()) if by_split else set(),
    )


def _check_class_volumes(name: str, held: Mapping[Path, list[Path]]) -> None:
    """Refuse files of volumes in the folders of classes that are no samples, or would not be found."""
    files = [path for found in held.values() for path in found]
    for count, what in (
        (sum(_MASK_WORD.search(path.name) is not None for path in files), "are named like masks"),
        (
            sum(file.parent != path for path, found in held.items() for file in found),
            "lie deeper than in the folder of their class",
        ),
    ):
        if count:
            raise ValueError(
                f"{name}: {count} of {len(files)} volumes {what}; give a CSV with the columns file and label, and mask"
                " where there are masks"
            )


# --- A table ------------------------------------------------------------------------------------------


def _describe_tables(folder: Path, notes: list[str]) -> _Layout | None:
    """The first table with a row per sample; None where there is no table at all."""
    tables = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in (".csv", ".tsv") and path.name != _BOX_TABLE and not is_hidden(path.name)
    )
    boxes = _read_boxes(folder)
    found: list[tuple[Path, _Layout]] = []
    for detects in (
        (False, True) if boxes else (False,)
    ):  # where no table has labels, boxes say what is present
        for table in () if found else tables:
            layout = _describe_table(folder, table, boxes, notes, detects=detects)
            found += [(table, layout)] if layout else []
    if len(found) > 1:
        raise ValueError(
            f"{', '.join(table.name for table, _ in found)}: each has a row per sample; keep one of them there"
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


def _describe_table(
    folder: Path, table: Path, boxes: _Boxes | None, notes: list[str], *, detects: bool
) -> _Layout | None:
    """A table with a row per sample, with labels or, for what `detects`, without; None for any other."""
    rows = read_rows(table)
    known = _usual_columns(rows[0])
    file_column, label_column = known.pop("file"), known.pop("label")
    flags = {name[len("label_") :]: name for name in rows[0] if name.startswith("label_")}
    if file_column is None or bool(label_column or flags) == detects:
        return None
    root, samples = _files_of(folder, table.name, rows, file_column)
    kind = _kind_of(folder.name, samples)
    if kind != "image" and detects:
        raise ValueError(
            f"{folder.name}: boxes are of images, the samples are {kind}s; give them a column label"
        )
    if kind == "image" and not detects and (slices := _number_of_slices(samples)):
        notes.append(_slices_are_images(slices, samples))
    mask_column = _mask_column(folder, rows, known["mask"], notes)
    given = _official_splits(rows, known, notes)
    if label_column is not None and flags:
        notes.append(
            f"columns passed over: {', '.join(flags.values())}, as column {label_column} is the label; take it out of"
            " the table where they are meant"
        )
    taken = {file_column, label_column, *flags.values(), *known.values()}
    if others := [name for name in rows[0] if name not in taken]:
        notes.append(f"columns passed over: {', '.join(others)}; name them {', '.join(known)} to be read")
    labels = (
        _Labels({}, boxes.counts)
        if boxes and detects
        else _describe_labels(table.name, rows, label_column, flags, notes)
    )
    fields = {"format": "table", "table": table.name, "file_column": file_column, **labels.fields}
    if root != folder:
        fields["images"] = root.name
    if mask_column:
        fields["mask_column"] = mask_column
    if optional := {meaning: name for meaning, name in known.items() if name and meaning != "mask"}:
        fields["columns"] = optional
    if boxes and kind != "image":
        notes.append(f"{_BOX_TABLE} is passed over: the samples are {kind}s")
    elif boxes and (others := sorted(boxes.counts.keys() - labels.counts.keys())):
        notes.append(f"{_BOX_TABLE} is passed over: {', '.join(others)} are no labels")
    elif boxes:
        fields["boxes"] = boxes.fields
        said = ", ".join(column for name, column in boxes.fields.items() if name != "table")
        notes.append(f"{_BOX_TABLE} is read by its columns {said}: pixels from 0, an end lies one beyond")
        if not detects:
            notes.append(
                "labels are learnt, boxes are kept beside them: to learn to find boxes, take the columns of labels out"
                " of the table"
            )
    return _Layout(kind, fields, labels.counts, samples, given, labels.flag)


def _read_boxes(folder: Path) -> _Boxes | None:
    """The table of boxes; None where there is none, or no columns are named for files, classes and corners."""
    path = folder / _BOX_TABLE
    rows = read_rows(path, may_be_empty=True) if path.is_file() else []
    known = _usual_columns(rows[0] if rows else (), _BOX_NAMES)
    ends = ("x1", "y1") if known["x1"] and known["y1"] else ("width", "height")
    columns = {name: column for name in ("file", "class_name", "x0", "y0", *ends) if (column := known[name])}
    if len(columns) < 6:
        return None
    corners = [columns[name] for name in ("x0", "y0", *ends)]
    found = [
        (row[columns["class_name"]], as_posix(row[columns["file"]]))
        for row in rows
        if any(row[corner] for corner in corners)
    ]
    return _Boxes({"table": _BOX_TABLE, **columns}, _images_per_class(found)) if found else None


def _images_per_class(boxes: Iterable[tuple[str, Any]]) -> dict[str, int]:
    """Class -> in how many images it has a box, by pairs of both."""
    counts = Counter(name for name, _ in set(boxes))
    return {name: counts[name] for name in sorted(counts)}


def _usual_columns(
    names: Iterable[str], usual_names: Mapping[str, Sequence[str]] = _USUAL_NAMES
) -> dict[str, str | None]:
    """What a column is for -> its name, however it is written; None where no column is for that."""
    columns = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in names}
    return {
        meaning: next((columns[usual] for usual in usuals if usual in columns), None)
        for meaning, usuals in usual_names.items()
    }


def _mask_column(folder: Path, rows: Sequence[Row], column: str | None, notes: list[str]) -> str | None:
    """The column that names masks; None where its cells are no files, such as 0 and 1."""
    cells = {row[column] for row in rows if row[column].lower() not in UNKNOWN} if column else set()
    if cells and all(_is_file_in(folder, cell) for cell in cells):
        return column
    if cells:
        notes.append(
            f"column {column} is passed over: some of its cells are no paths of files, from {folder.name} on"
        )
    return None


def _is_file_in(folder: Path, cell: str) -> bool:
    path = as_posix(cell)
    try:
        return not path.is_absolute() and (folder / path).is_file()
    except OSError:  # a text too long for a path
        return False


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
    """The folder that a table's paths start from, and the files, or folders of slices, that they lead to."""
    paths = [as_posix(row[column]) for row in rows]
    for row, path in zip(rows, paths, strict=True):
        if path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"{table} row {row.number}: its path leads out of {folder.name}; write it from there, or from a folder"
                " in it"
            )
    roots = [folder, *_folders(folder)]
    root = max(roots, key=lambda one: sum((one / path).exists() for path in paths))
    files = [root / path for path in paths]
    missing = [row.number for row, path in zip(rows, files, strict=True) if not path.exists()]
    if missing:
        raise ValueError(
            f"{table} row {missing[0]}: its file is neither in {folder.name} nor one folder below; so it is in"
            f" {len(missing)} of {len(rows)} rows: add the files, or remove the rows"
        )
    return root, files


# --- What the files hold ------------------------------------------------------------------------------


def _spread(paths: Sequence[Path], number: int) -> list[Path]:
    """About so many of them, from all places."""
    return list(paths[:: max(1, len(paths) // number)])


def _look_at(layout: _Layout) -> _Seen:
    sampled = _spread(layout.samples, _SAMPLED_FILES)
    whole = set(_spread(sampled, _SAMPLED_VOLUMES)) if layout.kind == "volume" else set(sampled)
    seen = _Seen(len(sampled))
    for path in sampled:
        before = len(seen.patients)
        try:
            _look_at_header(path, layout.kind, seen)
            if path in whole:
                _look_at_sample(path, layout.kind, seen)
                seen.read += 1
            seen.nameless += len(seen.patients) == before
        except ValueError as error:
            seen.reasons.append(str(error))
        except OSError as error:
            seen.reasons.append(f"cannot be opened ({type(error).__name__})")
    return seen


def _look_at_header(path: Path, kind: Kind, seen: _Seen) -> None:
    """What a sample's file says of its patient, of a series its first slice.

    Raises:
        ValueError, OSError: if it cannot be read.
    """
    if kind == "volume" and not _is_nifti(path):
        data = _first_slice(path)
        seen.identifiers.update(dicom_identifiers(data))
    else:
        seen.identifiers.update(file_identifiers(path, is_slide=kind == "slide"))
        # Slides and NIfTI may be larger than memory.
        if kind == "slide" or sniff_file(path) != "DICOM":
            return
        data = read_bytes(path)
    seen.names += _names_in(data)
    with discreet():
        elements = parse_header(data)
        patient, modality = header_text(elements, "PatientID"), header_text(elements, "Modality")
    seen.patients += [patient] * bool(patient)
    seen.modalities |= {modality} - {""} if kind == "volume" else set()


def _first_slice(path: Path) -> bytes:
    """The first file of a series, in a folder or a zip, that is DICOM and no table of contents (DICOMDIR).

    Raises:
        ValueError: one line, if there is none.
    """
    for data in _files_in(path):
        if sniff(data[:HEAD_BYTES]) == "DICOM":
            with discreet():
                if "DirectoryRecordSequence" not in parse_header(data):
                    return data
    raise ValueError("DICOM series: no DICOM image in it; give one folder or zip per series")


def _files_in(path: Path) -> Iterator[bytes]:
    """The files of a folder, or of a zip but for what is too large; those of an operating system are left out.

    Raises:
        ValueError: one line, if the zip cannot be read.
    """
    if path.is_dir():
        yield from map(read_bytes, candidate_files(path))
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                is_own = not any(map(is_hidden, PurePosixPath(member.filename).parts))
                if is_own and not member.is_dir() and member.file_size <= MAX_FILE_BYTES:
                    yield archive.read(member)
    except Exception as error:  # damaged, encrypted, packed in a way that nobody knows
        raise ValueError(f"its zip cannot be read ({type(error).__name__})") from None


def _look_at_sample(path: Path, kind: Kind, seen: _Seen) -> None:
    """What a sample holds.

    Raises:
        ValueError, OSError: if it cannot be read.
    """
    if kind == "slide":
        open_slide(path).close()
    elif kind == "volume":
        volume = read_volume(path)
        is_signed = volume.voxels.dtype.kind in "if"
        seen.volumes.append((volume.voxels.shape, volume.spacing_mm, is_signed))
    else:
        image = read_image(path)
        seen.coloured += image.pixels.ndim == 3
        seen.longest_px.append(max(image.pixels.shape[:2]))


def _number_of_slices(files: Sequence[Path]) -> int:
    """How many of a sample of files lie beside another slice of their series."""
    ordered = sorted(set(files))  # a table may name the slices of a series far from each other
    following = dict(zip(ordered, (*ordered[1:], *ordered[:1]), strict=True))
    return sum(
        path != following[path] and _are_slices(path, following[path])
        for path in _spread(files, _SAMPLED_FILES)
    )


def _slices_are_images(slices: int, files: Sequence[Path]) -> str:
    return (
        f"{slices} of {len(_spread(files, _SAMPLED_FILES))} sampled files lie beside other slices of their series, and"
        " every slice counts as an image: where a label is of the whole series, give a CSV whose column file names the"
        " folder of each series"
    )


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


def _names_in(data: bytes) -> list[set[str]]:
    """The words of each name in a DICOM header, without title and degree; of none with a digit, a pseudonym's sign."""
    called = (
        name for names in patient_names(data) for name in names.split("=") if not re.search(r"\d", name)
    )
    # Family, given and middle name are the first three parts, PS3.5 6.2.1.2.
    return [_name_words(" ".join(name.split("^")[:3])) for name in called]


def _patient_policy(layout: _Layout, seen: _Seen, notes: list[str]) -> str:
    """Whether patients are known, from a sample of the files and the table's columns."""
    columns = (
        f"file and patient beside {_BOX_TABLE}" if layout.task == "detection" else "file, label and patient"
    )
    if seen.reasons:
        notes.append(
            f"{len(seen.reasons)} of {seen.number} sampled files cannot be read: ingest will list them; the first:"
            f" {seen.reasons[0]}"
        )
    if BURNED_IN in seen.identifiers:
        notes.append(
            f"{BURNED_IN} is not NO: ingest refuses such files; mask the pixels at the source and set it to NO"
        )
    if dropped := seen.identifiers - {BURNED_IN}:
        named = ", ".join(sorted(dropped))
        if layout.kind != "slide":
            notes.append(f"the files carry identifiers ({named}): they will be dropped")
        else:
            notes.append(
                f"the files carry what may name a patient ({named}): ingest refuses such slides; clean them at their"
                " source"
                + (
                    ", or look at those pictures and declare label_images_are_clean"
                    if dropped <= set(LABEL_IMAGES)
                    else ""
                )
            )
    if "patient" in layout.fields.get("columns", {}):
        return "hmac"
    if seen.patients:
        if seen.nameless:
            notes.append(
                f"{seen.nameless} of {seen.number} sampled files name no patient: ingest refuses those; a CSV with the"
                f" columns {columns} can name them"
            )
        return "hmac"
    notes.append(
        f"no patients were found, so every {layout.kind} counts as one: if patients have several {layout.kind}s, give a"
        f" CSV with the columns {columns}, or {layout.kind}s of one patient will stand in train and test"
    )
    return "per-image"
