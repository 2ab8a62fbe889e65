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
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator
from rich.console import Console
from rich.progress import Progress

from cadx.files import digest_path, replacing
from cadx.reading.folders import is_hidden
from cadx.reading.vocabulary import Photometric
from cadx.settings import explain, read_yaml
from cadx.types import Config, Digest, Kind, Task

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

    What its files do not say can be given here: `spacing_mm` between a volume's voxels (slice, row, column), the
    `orientation` of a NIfTI file's own axes (fastest first; RAS: to the right, anterior, superior), a slide's
    `slide_mpp` and, of DICOM images and series, the `photometric_interpretation`. It is then recorded as an
    assumption. A file that says otherwise is refused, but for its orientation: of that each file's own word counts.
    `label_images_are_clean` says that somebody has looked at the label and macro images inside the slides.
    """

    file: str
    kind: Kind = "image"
    spacing_mm: tuple[Positive, Positive, Positive] | None = None
    slide_mpp: Positive | None = None
    orientation: str | None = None
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
        if self.orientation and (self.kind != "volume" or form == "npz"):
            raise ValueError("orientation is of NIfTI: kind volume, in files")
        if form == "npz" and self.patient != "per-image":
            raise ValueError("arrays name no patients: patient must be per-image")
        return self

    @field_validator("orientation")
    @classmethod
    def _names_three_axes(cls, orientation: str | None) -> str | None:
        if orientation is not None:
            axes = [axis for letter in orientation for axis in ("LR", "PA", "IS") if letter in axis]
            if len(orientation) != 3 or sorted(axes) != ["IS", "LR", "PA"]:
                raise ValueError("must be three letters, one each of R or L, A or P, S or I, such as RAS")
        return orientation

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
    `patient` is filled in every row, or in none and PatientID counts.
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
_BY_FORMAT: dict[str, type[StoredEntry | PhantomEntry]] = {
    get_args(cls.model_fields["format"].annotation)[0]: cls for cls in (*get_args(StoredEntry), PhantomEntry)
}


def load_catalog(path: Path) -> dict[str, Entry]:
    """The entries of a catalogue file by name.

    Raises:
        ValueError: one line that names file, entry and field.
    """
    try:
        held = read_yaml(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such catalogue") from None
    if not isinstance(held, dict | None):
        raise ValueError(
            f"{path}: no catalogue: give entries by name, as in `chest: {{format: folder, ...}}`"
        )
    return {name: _entry(path, name, given) for name, given in (held or {}).items()}


def _entry(path: Path, name: Any, given: Any) -> Entry:
    if not isinstance(name, str):
        raise ValueError(f"{path}: {name}: a name must be text; put it in quotes")
    form = given.get("format") if isinstance(given, dict) else None
    try:
        # By its own class where it is known: a union's error names the format among the fields.
        cls = _BY_FORMAT.get(form) if isinstance(form, str) else None
        return cls.model_validate(given) if cls else ENTRY.validate_python(given)
    except ValidationError as error:
        raise ValueError(explain(error, f"{path}: {name}", given)) from None


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
                f"{what} has digest {found}, its entry says {entry.digest}; fetch it again, "
                "or write the digest found into the entry if the data were meant to change"
            )
    return path


def digest_as(path: Path, declared: str) -> str:
    """The digest of `path` by the algorithm of the `declared` one: sha256, or md5 as MedMNIST publishes.

    Raises:
        ValueError: for an md5 of a folder.
    """
    if not declared.startswith("md5:"):
        return digest_source(path)
    if path.is_dir():
        raise ValueError("an md5 digest is of one file; give the sha256 of the folder")
    with path.open("rb") as stream:
        return "md5:" + hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def digest_source(path: Path) -> Digest:
    """The SHA-256 of a source's bytes, as `digest_path`, but without what nobody put there (`is_hidden`).

    A folder that a file manager has looked into, and left its `Thumbs.db` in, is the same source.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    return digest_path(path, without=is_hidden)


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


class Row(dict[str, str]):
    """A table's row: a text by column, and its number in a spreadsheet, from 1."""

    def __init__(self, cells: Iterable[tuple[str, str]], number: int) -> None:
        super().__init__(cells)
        self.number = number


def read_rows(path: Path, *, header: bool = True, may_be_empty: bool = False) -> list[Row]:
    """A CSV's rows, stripped; comma, semicolon or tabulator, as its first line shows. Empty ones are left out.

    Without a header, columns are called by their number, from 0. Excel's line `sep=;` above the header is no row,
    and columns at the end that are empty from the header down are none.

    Raises:
        ValueError: one line: missing, not UTF-8, a quote that is not closed or does not end its cell, no rows (where
            it `may_be_empty`, not even a header), a column name twice, or a row of another length.
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
    # A lenient reader takes all that stands behind a quote that is not closed for one cell.
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    numbered: list[tuple[int, list[str]]] = []
    number = 0
    try:
        for number, line in enumerate(reader, start=1):
            if any(line):
                numbered.append((number, [cell.strip() for cell in line]))
    except csv.Error:
        raise ValueError(
            f"{path.name} row {number + 1}: no CSV: a quote is not closed or does not end its cell, or a cell is too"
            " long; close the quote, and write those within a quoted cell twice"
        ) from None
    if len(numbered) < header + (not may_be_empty):
        raise ValueError(f"{path.name}: no rows")
    _, first = numbered[0]
    width = len(first)
    while header and not any("".join(line[width - 1 :]) for _, line in numbered):
        width -= 1
    for number, line in numbered[header:]:
        if len(line) < width or any(line[width:]):
            raise ValueError(f"{path.name} row {number}: {len(line)} cells, but {width} columns")
    names = first[:width] if header else [str(number) for number in range(width)]
    if len(set(names)) != len(names):
        raise ValueError(f"{path.name}: a column name stands twice")
    return [Row(zip(names, line[:width], strict=True), number) for number, line in numbered[header:]]


def candidate_files(folder: Path, *, recursive: bool = True) -> list[Path]:
    """The files in `folder` that are meant to be images, sorted: all but hidden ones and system litter.

    Raises:
        ValueError: if it holds a link to a folder, which is not followed, or to nothing; a folder that may not be
            opened; or a name that is no text.
    """
    found: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_refuse_closed):
        found += (Path(place, name) for name in (*folders, *files))
        if not recursive:
            break
    if links := sum(path.is_symlink() and not path.is_file() for path in found):
        raise ValueError(f"{links} links in the source lead to folders or to nothing; put the files there")
    files_found = [path for path in found if path.is_file()]
    candidates = [p for p in files_found if not any(map(is_hidden, p.relative_to(folder).parts))]
    if torn := sum(not _is_text(path.name) for path in candidates):
        raise ValueError(f"{torn} files in the source have names that are not UTF-8; rename them")
    return sorted(candidates)


def _refuse_closed(error: OSError) -> None:
    """A folder that is not read would be a lost part of the data; its name may tell of a patient."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return  # nothing is there, which callers judge
    raise ValueError(
        f"a folder in the source cannot be opened ({error.strerror}); give the right to read it"
    ) from None


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
