"""The catalogue: which data sets there are, where they come from, and how they are read.

`data/catalog.yaml` maps names to entries. A set is looked for in the local cache, then in a mirror folder
(`CADX_DATA_MIRROR`, for closed networks; used in place), then at its official address. Invariants: bytes
whose digest differs from the entry's are refused wherever they come from; no message repeats a file name or
a cell of a hospital's own folder, since either may carry a patient's name.
"""

import csv
import hashlib
import hmac
import io
import os
import re
import secrets
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.progress import Progress

from cadx.files import digest_path, replacing
from cadx.reading.dicom import Photometric, dicom_identifiers
from cadx.reading.folders import is_hidden
from cadx.reading.images import read_image
from cadx.types import Config, Kind, Task

GivenSplit = Literal["train", "val", "calibration", "test"]
Positive = Annotated[float, Field(gt=0)]

SPLIT_WORDS: dict[str, GivenSplit] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "calibration": "calibration",
    "test": "test",
    "testing": "test",
}
"""What people call the splits, in lower case."""

_TIMEOUT_S = 30
_CHUNK_BYTES = 1 << 20


class Published(Config):
    """What others report on the set's test split, by metric name, for the page that sets ours beside it."""

    what: str
    metrics: dict[str, float]
    source: str


class _Described(Config):
    """What every entry says.

    `patient` is the policy: `per-image` where the set has no patients (metrics then count every image as
    one), `public` where its identifiers are public pseudonyms and kept, `hmac` where they are replaced by
    an HMAC under the site key. With `deidentify`, identifying elements of the files are dropped instead of
    stopping the ingest, sample ids are pseudonyms too, and ages above 89 become 90.
    """

    title: str
    task: Task
    classes: tuple[str, ...]
    positive: str | None = None
    modality: str
    licence: str
    citation: str
    note: str = ""
    patient: Literal["per-image", "public", "hmac"]
    deidentify: bool = False
    assumptions: tuple[str, ...] = ()
    published: tuple[Published, ...] = ()


class _Stored(_Described):
    """An entry whose bytes lie somewhere: `file` within cache and mirror, or an absolute path.

    What its files do not say can be given here: `spacing_mm` between a volume's voxels (slice, row, column), a
    slide's `slide_mpp` and, of DICOM images and series, the `photometric_interpretation`. It is then recorded as an
    assumption. A file that says otherwise is refused.
    `label_images_are_clean` says that somebody has looked at the label and macro images inside the slides.
    """

    file: str
    kind: Kind = "image"
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    slide_mpp: Positive | None = None
    photometric_interpretation: Photometric | None = None
    label_images_are_clean: bool = False
    digest: Annotated[str, Field(pattern=r"^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})$")] | None = None
    address: Annotated[str, Field(pattern=r"^https?://")] | None = None

    @model_validator(mode="after")
    def _kind_fits_format(self) -> Self:
        form = getattr(self, "format", "")
        if (self.kind == "features") != (form == "bags"):
            raise ValueError("kind features is what format bags holds, and nothing else")
        if self.kind == "slide" and form not in ("folder", "table", "files"):
            raise ValueError("slides come as folder, table or files")
        if self.task == "detection" and form not in ("table", "voc", "coco"):
            raise ValueError("boxes come as table, voc or coco: no other format holds them")
        if self.photometric_interpretation and (self.kind not in ("image", "volume") or form == "npz"):
            raise ValueError("photometric_interpretation is of DICOM: kind image or volume, in files")
        if form == "npz" and self.patient != "per-image":
            raise ValueError("arrays name no patients: patient must be per-image")
        return self

    @field_validator("file")
    @classmethod
    def _stays_inside(cls, file: str) -> str:
        if ".." in PurePosixPath(file).parts:
            raise ValueError("must not climb out of its folder by '..'")
        return file

    @model_validator(mode="after")
    def _download_is_checked(self) -> Self:
        if self.address and not self.digest:
            raise ValueError("an address needs a digest, by which the download is checked")
        return self


class NpzEntry(_Stored):
    """Arrays {train,val,test}_{images,labels}, as MedMNIST lays them out; a class by its integer value.

    Images are N H W or N H W 3; of kind volume N D H W, whose `spacing_mm` has to be given.
    """

    format: Literal["npz"]


class FolderEntry(_Stored):
    """A folder of images per class; with `split_folders`, such folders within a folder per split."""

    format: Literal["folder"]
    split_folders: dict[str, GivenSplit] = Field(default_factory=dict)


class Columns(Config):
    """Optional columns of a table, by what they hold; where a DICOM file says otherwise, the table wins.

    `frame` is the number of an image within a file of several, from 1; an empty cell means that the file holds one.
    """

    frame: str | None = None
    patient: str | None = None
    site: str | None = None
    scanner: str | None = None
    age: str | None = None
    sex: str | None = None
    view: str | None = None
    split: str | None = None


class BoxTable(Config):
    """A CSV with a row per box. Its columns give either x1 and y1, or width and height; 0-based pixels."""

    table: str
    file: str = "file"
    class_name: str = "class"
    x0: str = "x0"
    y0: str = "y0"
    x1: str | None = None
    y1: str | None = None
    width: str | None = None
    height: str | None = None
    where: dict[str, str] = Field(default_factory=dict)  # only rows with these values
    values: dict[str, str] = Field(
        default_factory=dict
    )  # value of the class column -> class, where they differ

    @model_validator(mode="after")
    def _has_extent(self) -> Self:
        given = {name for name in ("x1", "y1", "width", "height") if getattr(self, name)}
        if given not in ({"x1", "y1"}, {"width", "height"}):
            raise ValueError("give the columns x1 and y1, or width and height, and none of the other two")
        return self


class TableEntry(_Stored):
    """A CSV with a row per sample: an image (DICOM, PNG, JPEG), a volume (NIfTI, a folder of DICOM slices) or a slide.

    Single-label tasks name one `label_column` (with `values` from cell to class where they differ);
    multilabel tasks name `label_columns`, class -> column of 0 and 1. An empty cell means unlabelled. For
    detection a class is present if `boxes` have it. `mask_column` names masks, `clinical` numbers by name.
    """

    format: Literal["table"]
    table: str
    images: str = ""  # the folder to which the file column is relative
    file_column: str = "file"
    label_column: str | None = None
    values: dict[str, str] = Field(default_factory=dict)
    label_columns: dict[str, str] = Field(default_factory=dict)
    columns: Columns = Columns()
    boxes: BoxTable | None = None
    mask_column: str | None = None
    clinical: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _frames_are_images(self) -> Self:
        if self.columns.frame and (self.kind != "image" or self.boxes):
            raise ValueError(
                "columns.frame is for samples of kind image, without boxes: boxes name files, not frames"
            )
        return self

    @model_validator(mode="after")
    def _labels_fit_task(self) -> Self:
        if self.task == "detection":
            if self.boxes is None or self.label_column or self.label_columns:
                raise ValueError(
                    "a detection entry names boxes, and no label columns: boxes say what is present"
                )
            return self
        if bool(self.label_column) == bool(self.label_columns):
            raise ValueError("give either label_column or label_columns")
        if (self.task == "multilabel") != bool(self.label_columns):
            raise ValueError("label_columns are for task multilabel, label_column for the other tasks")
        named = {*self.values.values(), *self.label_columns}
        if unknown := sorted(named - set(self.classes)):
            raise ValueError(f"labels are mapped to {', '.join(unknown)}, which is not among the classes")
        return self


class NamedFile(Config):
    """One sample of a `FilesEntry`: its file, or folder of slices, within the source; no label means unlabelled.

    Of a file of several images `frame` says which, from 1.
    """

    file: str
    frame: Annotated[int, Field(ge=1)] | None = None
    label: str | None = None
    mask: str | None = None
    patient: str = ""


class FilesEntry(_Stored):
    """A few files, named one by one."""

    format: Literal["files"]
    samples: tuple[NamedFile, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _frames_are_images(self) -> Self:
        if self.kind != "image" and any(sample.frame for sample in self.samples):
            raise ValueError(
                "a frame is asked for where samples are images; a volume takes all of its frames"
            )
        return self


class Patches(Config):
    """Pieces of a volume that are samples by themselves, each of the class at its middle.

    A volume gives `per_class` pieces of each class in its mask, and as many of the class `other` where nothing is
    marked. A middle lies `margin_mm` or more from every voxel of another class: where exactly a reader drew the
    border decides about no label. Every piece lies whole inside its volume, none is padded or shifted, so that no
    edge tells the class; a volume with fewer such middles gives fewer pieces. Values stay the volume's own.
    `size_mm` (slice, row, column) is rounded to voxels; the middle of n voxels is number n // 2, from 0. Which
    pieces are taken follows from the bytes of the volume's file alone.
    """

    size_mm: tuple[Positive, Positive, Positive]
    per_class: Annotated[int, Field(ge=1)]
    other: str
    margin_mm: Annotated[float, Field(ge=0)]


class PairsEntry(_Stored):
    """A folder of volumes or images and one of their masks, under equal names.

    A class is present where its value in `mask_values` stands in the mask. Every image needs a mask, and every
    mask an image. With `patches`, pieces of the volumes are the samples, and all pieces of a volume are of one
    patient.
    """

    format: Literal["pairs"]
    images: str
    masks: str
    mask_values: dict[str, Annotated[int, Field(ge=1, le=255)]]
    patches: Patches | None = None

    @model_validator(mode="after")
    def _classes_are_known(self) -> Self:
        other = () if self.patches is None else (self.patches.other,)
        if sorted((*self.mask_values, *other)) != sorted(self.classes):
            beyond = f" but {self.patches.other}, which patches.other names" if self.patches else ""
            raise ValueError(f"mask_values must give a value for each of the classes{beyond}")
        if self.patches is None and self.task != "multilabel":
            raise ValueError("several classes may stand in one mask: the task must be multilabel")
        if self.patches is not None and (self.kind != "volume" or self.task not in ("binary", "multiclass")):
            raise ValueError("patches are of kind volume and of one class each: task binary or multiclass")
        return self


class _Detection(_Stored):
    @model_validator(mode="after")
    def _is_detection(self) -> Self:
        if self.task != "detection" or self.kind != "image":
            raise ValueError("boxes in images: the task must be detection, and the kind image")
        return self


class VocEntry(_Detection):
    """Images with an XML file of boxes each, as Pascal VOC lays them out; `splits` maps a split to its list."""

    format: Literal["voc"]
    images: str = "JPEGImages"
    annotations: str = "Annotations"
    splits: dict[GivenSplit, str] = Field(default_factory=dict)


class CocoEntry(_Detection):
    """Images with boxes in COCO's JSON: one file, or one per split; `images` is the folder of their file names."""

    format: Literal["coco"]
    images: str = ""
    annotations: dict[GivenSplit, str] | str


class BagsEntry(_Stored):
    """CSV files of numbers, a row per instance: rows that share `bag_column` are one sample, or else each row is.

    `tables` maps a site to its file. Without `header`, columns are numbered from 0. All columns are features
    but those named here and in `ignored`; `missing` stands for an unknown number. The label is a bag's, so all
    of its rows must agree; `values` maps a cell to a class.
    """

    format: Literal["bags"]
    tables: dict[str, str]
    header: bool = True
    bag_column: str | None = None
    label_column: str
    values: dict[str, str]
    patient_column: str | None = None
    age_column: str | None = None
    ignored: tuple[str, ...] = ()
    missing: str = "?"


class PhantomEntry(_Described):
    """A synthetic cohort, made and not fetched: the parameters of `cadx.phantom`."""

    format: Literal["phantom"]
    parameters: dict[str, Any] = Field(default_factory=dict)


StoredEntry = NpzEntry | FolderEntry | TableEntry | FilesEntry | PairsEntry | VocEntry | CocoEntry | BagsEntry
Entry = Annotated[StoredEntry | PhantomEntry, Field(discriminator="format")]
ENTRY: TypeAdapter[Entry] = TypeAdapter(Entry)
_CATALOG: TypeAdapter[dict[str, Entry]] = TypeAdapter(dict[str, Entry])


def load_catalog(path: Path) -> dict[str, Entry]:
    """The entries of a catalogue file by name.

    Raises:
        ValueError: one line that names file, entry and field.
    """
    try:
        return _CATALOG.validate_python(yaml.load(path.read_bytes(), yaml.CSafeLoader) or {})
    except FileNotFoundError:
        raise ValueError(f"{path}: no such catalogue") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    except ValidationError as error:
        problems = (
            f"{'.'.join(str(part) for part in item['loc'])}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise ValueError(f"{path}: {'; '.join(problems)}") from None


# --- Finding the bytes --------------------------------------------------------------------------------


def fetch(name: str, entry: StoredEntry, cache: Path) -> Path:
    """Where the set's file or folder lies: in `cache`, in the mirror, or in `cache` after a download.

    Raises:
        ValueError: one line: nowhere to be found, or the digest differs.
    """
    if Path(entry.file).is_absolute():
        if not Path(entry.file).exists():
            raise ValueError(f"{name}: the folder that its entry names is not there; correct `file`")
        return _verified(Path(entry.file), entry, f"{name}: the folder that its entry names")
    cached = cache / name / Path(entry.file).name
    if cached.exists():
        return _verified(cached, entry, f"{name}: the cached {cached}")
    mirror = os.environ.get("CADX_DATA_MIRROR")
    if mirror and (mirrored := Path(mirror) / entry.file).exists():
        return _verified(mirrored, entry, f"{name}: {entry.file} of the mirror")
    advice = f"set CADX_DATA_MIRROR to a folder that holds {entry.file}"
    if mirror:
        advice = f"CADX_DATA_MIRROR={mirror} does not hold {entry.file} either: put it there"
    if not entry.address:
        raise ValueError(f"{name}: not in the cache, and it has no address to fetch it from; {advice}")
    try:
        with replacing(cached) as partial:
            _download(entry.address, partial)
            _verified(partial, entry, f"{name}: what {entry.address} sent")
    except (urllib.error.URLError, OSError) as error:
        reason = getattr(error, "reason", None) or error
        raise ValueError(
            f"{name}: {entry.address} cannot be fetched ({reason}); on a closed network {advice}"
        ) from None
    return cached


def _download(address: str, path: Path) -> None:
    request = urllib.request.Request(address, headers={"User-Agent": "cadx"})  # noqa: S310  the entry's pattern
    with (
        urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response,  # noqa: S310  allows http(s) only
        path.open("wb") as stream,
        Progress(console=Console(stderr=True), transient=True) as progress,
    ):
        length = response.headers.get("Content-Length")
        bar = progress.add_task(f"Fetching {address}", total=int(length) if length else None)
        while chunk := response.read(_CHUNK_BYTES):
            stream.write(chunk)
            progress.advance(bar, len(chunk))


def _verified(path: Path, entry: StoredEntry, what: str) -> Path:
    if entry.digest is not None:
        found = digest_as(path, entry.digest)
        if found != entry.digest:
            raise ValueError(
                f"{what} has digest {found}, its entry says {entry.digest}; "
                "remove it or fetch it again, or correct the entry if the data were meant to change"
            )
    return path


def digest_as(path: Path, declared: str) -> str:
    """The digest of `path` by the algorithm of the `declared` one: sha256, or md5 as MedMNIST publishes.

    Raises:
        ValueError: for an md5 of a folder.
    """
    if not declared.startswith("md5:"):
        return digest_path(path)
    if path.is_dir():
        raise ValueError("an md5 digest is of one file; give the sha256 of the folder")
    with path.open("rb") as stream:
        return "md5:" + hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


# --- Pseudonyms ---------------------------------------------------------------------------------------


def site_key(cache: Path) -> bytes:
    """The secret of this site, from `CADX_SITE_KEY` (hex), else from `site.key` beside the cache.

    The file is made on first use, readable by its owner only. Whoever holds the key can link pseudonyms to
    identifiers: it must never enter version control.

    Raises:
        ValueError: one line: no hex, or under 16 bytes.
    """
    path = cache.with_name("site.key")
    text = os.environ.get("CADX_SITE_KEY")
    where = "CADX_SITE_KEY" if text is not None else str(path)
    if text is None:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            text = path.read_text(encoding="ascii")
        else:
            text = secrets.token_hex(32)
            with os.fdopen(handle, "w", encoding="ascii") as stream:
                stream.write(text + "\n")
    try:
        key = bytes.fromhex(text)
    except ValueError:
        raise ValueError(f"{where}: not hexadecimal; `openssl rand -hex 32` makes a key") from None
    if len(key) < 16:
        raise ValueError(f"{where}: a key of {len(key)} bytes is too short; `openssl rand -hex 32` makes one")
    return key


def pseudonym(key: bytes, kind: Literal["patient", "sample"], text: str) -> str:
    """The name that stands for `text`: a letter and the head of HMAC-SHA-256 under `key`.

    >>> pseudonym(bytes(16), "patient", "Doe^Jane") == pseudonym(bytes(16), "patient", "Doe^Jane")
    True
    >>> pseudonym(bytes(16), "sample", "a.dcm")
    'xeab23c957b62'
    """
    digest = hmac.new(key, f"{kind}:{text}".encode(), hashlib.sha256).hexdigest()
    return "p" + digest[:16] if kind == "patient" else "x" + digest[:12]


# --- Folders and tables of images ---------------------------------------------------------------------


def read_rows(path: Path, *, header: bool = True, may_be_empty: bool = False) -> list[dict[str, str]]:
    """A CSV's rows as texts by column, stripped; comma, semicolon or tabulator, as its first line shows.

    Without a header, columns are called by their number, from 0. Excel's line `sep=;` above the header is no row,
    and columns at the end that are empty from the header down are none.

    Raises:
        ValueError: one line: missing, not UTF-8, no rows (where it `may_be_empty`, not even a header), a column name
            twice, or a row of another length.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ValueError(f"{path.name}: no such table; the entry's `table` names it") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path.name}: not UTF-8; save it as CSV UTF-8") from None
    if declared := re.match(r"sep=([,;\t])\r?\n", text):
        text, delimiter = text[declared.end() :], declared[1]
    else:
        delimiter = max(",;\t", key=text.partition("\n")[0].count)
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        lines = [[cell.strip() for cell in line] for line in reader if any(line)]
    except csv.Error:
        raise ValueError(f"{path.name}: no CSV: a quote is not closed, or a cell is too long") from None
    if len(lines) < header + (not may_be_empty):
        raise ValueError(f"{path.name}: no rows")
    width = len(lines[0])
    while header and not any("".join(line[width - 1 :]) for line in lines):
        width -= 1
    for number, line in enumerate(lines[header:], start=1 + header):
        if len(line) < width or any(line[width:]):
            raise ValueError(f"{path.name} row {number}: {len(line)} cells, but {width} columns")
    names = lines[0][:width] if header else [str(number) for number in range(width)]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name}: a column name stands twice")
    return [dict(zip(names, line[:width], strict=True)) for line in lines[header:]]


def candidate_files(folder: Path, *, recursive: bool = True) -> list[Path]:
    """The files in `folder` that are meant to be images, sorted: all but hidden ones and system litter.

    Raises:
        ValueError: if it holds a link to a folder, which is not followed, or to nothing.
    """
    found = list(folder.rglob("*") if recursive else folder.iterdir())
    if links := sum(path.is_symlink() and not path.is_file() for path in found):
        raise ValueError(f"{links} links in the source lead to folders or to nothing; put the files there")
    return sorted(
        path for path in found if path.is_file() and not any(map(is_hidden, path.relative_to(folder).parts))
    )


# --- Describing a hospital's own folder ---------------------------------------------------------------

_USUAL_NAMES = {
    "file": ("file", "filename", "file_name", "path", "image", "image_path", "image_index", "dicom"),
    "label": ("label", "class", "target", "diagnosis", "finding", "category", "truth"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "case_id"),
    "site": ("site", "hospital", "centre", "center", "institution"),
    "scanner": ("scanner", "device", "machine", "manufacturer"),
    "age": ("age", "patient_age", "age_years"),
    "sex": ("sex", "gender", "patient_sex", "patient_gender"),
    "view": ("view", "view_position", "projection"),
    "split": ("split", "set", "subset", "partition"),
}
_SAMPLED_FILES = 24
_MOST_CLASSES = 50


def describe_folder(folder: Path, *, positive: str = "") -> tuple[FolderEntry | TableEntry, tuple[str, ...]]:
    """An entry for a folder of one's own images, and notes on what was assumed and should be looked over.

    Recognised are a CSV with a row per image, else a folder per class (also within train, val, test). The
    positive class is `positive`, or the rarest.

    Raises:
        ValueError: one line, if neither is there, or `positive` is no class.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    notes = [
        "modality, licence and title are yours to fill in",
        "deidentify is on: nothing in the data set repeats a file name or an identifier; "
        "turn it off if sample ids should be the file names and the files hold no identifiers",
    ]
    tables = [path for path in sorted(folder.glob("*.csv")) if path.name != "boxes.csv"]
    found = next(filter(None, (_describe_table(folder, table) for table in tables)), None)
    if found is None and tables and not any(path.is_dir() for path in folder.iterdir()):
        wanted = f"{', '.join(_USUAL_NAMES['file'])} and {', '.join(_USUAL_NAMES['label'])} or label_<class>"
        raise ValueError(f"{tables[0].name}: no columns for file and label; name them {wanted}")
    layout, counts, files = found or _describe_class_folders(folder)
    common = _describe_files(folder, files, layout, notes)
    classes, task = tuple(counts), "multilabel" if "label_columns" in layout else "multiclass"
    if task == "multiclass" and len(classes) == 2:
        task = "binary"
    if positive and positive not in classes:
        raise ValueError(f"positive {positive!r} is not among the classes {', '.join(classes)}")
    if positive and task != "binary":
        raise ValueError(f"positive is for two classes, and {folder.name} is {task} ({', '.join(classes)})")
    rarest = min(classes, key=lambda name: counts[name])
    if task == "binary":
        common["positive"] = positive or rarest
        if not positive:
            notes.append(f"positive is {rarest!r}, the rarest class: correct it if another one is looked for")
    if counts[rarest] < 50:
        notes.append(f"class {rarest!r} has {counts[rarest]} images: intervals will be wide")
    content = {
        "title": folder.name,
        "task": task,
        "classes": classes,
        "modality": "medical image",
        "licence": "private: not for distribution",
        "citation": "none",
        "file": str(folder),
        "digest": digest_path(folder),
        "deidentify": True,
        **layout,
        **common,
    }
    cls = TableEntry if layout["format"] == "table" else FolderEntry
    try:
        return cls.model_validate(content), tuple(notes)
    except ValidationError as error:
        raise ValueError(f"{folder.name}: {error.errors(include_input=False)[0]['msg']}") from None


_Layout = tuple[dict[str, Any], dict[str, int], list[Path]]
"""Fields of the entry, images per class in the order of the classes, and the image files."""


def _describe_class_folders(folder: Path) -> _Layout:
    inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    splits = {path.name: SPLIT_WORDS[path.name.lower()] for path in inner if path.name.lower() in SPLIT_WORDS}
    by_split = bool(splits) and len(splits) == len(inner)
    counts: Counter[str] = Counter()
    files: list[Path] = []
    for parent in inner if by_split else [folder]:
        for path in sorted(p for p in parent.iterdir() if p.is_dir() and not p.name.startswith(".")):
            images = candidate_files(path)
            counts[path.name] += len(images)
            files.extend(images)
    classes = {name: counts[name] for name in sorted(counts) if counts[name]}
    if not 2 <= len(classes) <= _MOST_CLASSES:
        raise ValueError(
            f"{folder.name}: {len(classes)} folders with files where a folder per class was expected; "
            "make one for each class, or add a CSV with the columns file and label"
        )
    return {"format": "folder"} | ({"split_folders": splits} if by_split else {}), classes, files


def _describe_table(folder: Path, table: Path) -> _Layout | None:
    rows = read_rows(table)
    columns = {re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_"): name for name in rows[0]}
    known = {
        meaning: next((columns[name] for name in names if name in columns), None)
        for meaning, names in _USUAL_NAMES.items()
    }
    file_column, label_column = known.pop("file"), known.pop("label")
    flags = {name[len("label_") :]: name for name in rows[0] if name.startswith("label_")}
    if file_column is None or not (label_column or flags):
        return None
    roots = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    root = next((path for path in roots if (path / rows[0][file_column]).is_file()), None)
    if root is None:
        raise ValueError(f"{table.name} row 2: its file is neither in {folder.name} nor one folder below")
    layout: dict[str, Any] = {"format": "table", "table": table.name, "file_column": file_column}
    if root != folder:
        layout["images"] = root.name
    if known["split"] and any(row[known["split"]].lower() not in SPLIT_WORDS for row in rows):
        known["split"] = None
    if optional := {meaning: name for meaning, name in known.items() if name}:
        layout["columns"] = optional
    if label_column is None and len(flags) == 1:
        (name, label_column), *_ = flags.items()
        layout["values"] = {"0": f"no_{name}", "1": name}
    if label_column is not None:
        values = layout.get("values", {})
        layout["label_column"] = label_column
        cells = Counter(values.get(row[label_column], row[label_column]) for row in rows if row[label_column])
        counts = {name: cells[name] for name in (values.values() or sorted(cells))}
    else:
        layout["label_columns"] = flags
        counts = {name: sum(row[flag] == "1" for row in rows) for name, flag in flags.items()}
    if len(counts) > _MOST_CLASSES or ("label_columns" not in layout and len(counts) < 2):
        raise ValueError(f"{table.name}: column {label_column} holds {len(counts)} classes; is it the label?")
    box_table = folder / "boxes.csv"
    boxes = read_rows(box_table, may_be_empty=True) if box_table.is_file() else []
    if boxes and {"file", "class", "x0", "y0", "x1", "y1"} <= set(boxes[0]):
        layout["boxes"] = {"table": box_table.name, "x1": "x1", "y1": "y1"}
    return layout, counts, [root / row[file_column] for row in rows]


def _describe_files(
    folder: Path, files: Sequence[Path], layout: dict[str, Any], notes: list[str]
) -> dict[str, Any]:
    """Patient policy, from a sample of the files and the table's columns."""
    sample = files[:: max(1, len(files) // _SAMPLED_FILES)]
    identifiers: set[str] = set()
    with_patient = unreadable = 0
    for path in sample:
        try:
            identifiers.update(dicom_identifiers(path))
            with_patient += read_image(path).patient is not None
        except ValueError:
            unreadable += 1
    if unreadable:
        notes.append(f"{unreadable} of {len(sample)} sampled files cannot be read: ingest will list them")
    if identifiers:
        notes.append(f"the files carry identifiers ({', '.join(sorted(identifiers))}): they will be dropped")
    if "patient" in layout.get("columns", {}) or with_patient == len(sample) - unreadable > 0:
        return {"patient": "hmac"}
    notes.append(
        "no patients were found, so every image counts as one: if patients have several images, add a CSV "
        "with a patient column, or images of one patient will stand in train and test"
    )
    return {"patient": "per-image"}
