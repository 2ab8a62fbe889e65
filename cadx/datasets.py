"""The dataset folder: its schema, writing and reading it.

    dataset.json     DatasetInfo: what the set is, and the digest of every other file
    samples.parquet  a row per sample (SAMPLE_COLUMNS)
    boxes.parquet    a row per box (BOX_COLUMNS)
    shards/          arrays in safetensors files: key = sample_id, or <layer>/<sample_id> for its masks
    slides/          whole-slide files as they came, where the samples are slides

Invariants: the same samples in the same order give the same bytes; no patient crosses a split; a sampler's
order is a pure function of (seed, epoch).
"""

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cadx.files import digest_path, write_json
from cadx.types import Config, Digest, Kind, Split, Task, check_pixels

# A shard is what writing holds in memory, and what a changed sample makes DVC store again; far fewer
# files than images, because version control and object stores are slow on many small files.
SHARD_BYTES = 256 * 1024**2
# A shard's header is parsed whole when it is opened: 4096 entries take about 3 ms.
SHARD_SAMPLES = 4096
# Memory maps held open by one process: each costs address space and about 1 MB for its header.
_OPEN_SHARDS = 64

VOXEL_TYPES = ("uint8", "uint16", "int16", "float32")
_CLONE = (
    0x40049409  # FICLONE of Linux, by which Btrfs and XFS share blocks until one of the copies is written
)
_COPY_BYTES = 1 << 24
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_SEXES = ("", "F", "M", "O")
_GIVEN_SPLITS = ("", "train", "val", "calibration", "test")
_ARROW = {"string": pa.string(), "float64": pa.float64(), "int64": pa.int64()}
_REMAKE = "run `cadx ingest` again"
_RERUN = "run the step that makes it again"


class Column(NamedTuple):
    """One column of a table: its name (`<...>` stands for any), its type and what it means."""

    name: str
    dtype: Literal["string", "float64", "int64"]
    meaning: str
    required: bool = True


SAMPLE_COLUMNS = (
    Column("sample_id", "string", "unique name of the sample, no identifier of a patient"),
    Column("path", "string", "the shard that holds the array, relative to the folder"),
    Column("mask_path", "string", "the shard that holds its mask; empty where it has none"),
    Column("slide_path", "string", "the slide's own file, relative to the folder; empty for other kinds"),
    Column("sha256", "string", "digest of the source file"),
    Column(
        "frame",
        "int64",
        "its frame in the source file, from 1; 0 = the whole; only where frames are asked for",
        False,
    ),
    Column("pixels_sha256", "string", "digest of dtype, shape and pixels: equal for exact copies"),
    Column("patient", "string", "pseudonym of the patient; samples that share it never cross a split"),
    Column("site", "string", "hospital or centre; empty where unknown"),
    Column("scanner", "string", "make and model; empty where unknown"),
    Column("age", "float64", "years; NaN where unknown"),
    Column("sex", "string", "F, M, O, or empty where unknown"),
    Column("view", "string", "projection, such as PA or AP; empty where unknown"),
    Column("given_split", "string", "the set's official split: train, val, calibration, test, or empty"),
    Column("depth_px", "int64", "slices of a volume; 1 for other kinds"),
    Column("height_px", "int64", "rows of the stored image, of a slide's thumbnail; instances of a bag"),
    Column("width_px", "int64", "columns of the same; features of an instance"),
    Column("channels", "int64", "1 (gray) or 3 (colour)"),
    Column("bits", "int64", "8, 16 or 32 per value"),
    Column("dtype", "string", "uint8 or uint16; for volumes int16 and float32 too; float32 for features"),
    Column("spacing_slice_mm", "float64", "distance between centres of slices; NaN where there are none"),
    Column("spacing_row_mm", "float64", "distance between centres of rows; NaN where unknown"),
    Column("spacing_column_mm", "float64", "distance between centres of columns; NaN where unknown"),
    Column(
        "slide_mpp", "float64", "micrometres per pixel of a slide's own finest level; NaN for other kinds"
    ),
    Column("findings", "string", "what is doubtful about its geometry, as code: words; empty if nothing is"),
    Column(
        "phash", "string", "perceptual hash, 16 hex digits: close for images that look alike; may be empty"
    ),
    Column("check_<name>", "float64", "what a look at its quality measured"),
    Column("clinical_<name>", "float64", "a clinical value; NaN where missing"),
    Column("stat_<name>", "float64", "a statistic of the raw pixels"),
    Column("label_<class>", "float64", "1 or 0 per class; NaN = unlabelled; one-hot unless multilabel"),
)
BOX_COLUMNS = (
    Column("sample_id", "string", "the sample that the box lies in"),
    Column("class", "string", "what it encloses"),
    Column("x0", "float64", "left edge, stored pixels, 0-based"),
    Column("y0", "float64", "top edge"),
    Column("x1", "float64", "right edge, exclusive"),
    Column("y1", "float64", "bottom edge, exclusive"),
)
SPLIT_COLUMNS = (
    Column("sample_id", "string", "every sample of the dataset, once"),
    Column("split", "string", "train, val, calibration, test or excluded"),
    Column("reason", "string", "why it was excluded, or how it was placed; may be empty"),
)


def schema_markdown() -> str:
    """The dataset's schema as Markdown tables, from the data that the code checks by."""
    records = [(name, field) for name, field in DatasetInfo.model_fields.items() if field.description]
    parts = [
        "### dataset.json",
        "| field | meaning |\n|---|---|\n"
        + "\n".join(f"| `{name}` | {field.description} |" for name, field in records),
    ]
    for file, columns in (
        ("samples.parquet", SAMPLE_COLUMNS),
        ("boxes.parquet", BOX_COLUMNS),
        ("splits.parquet", SPLIT_COLUMNS),
    ):
        rows = "\n".join(f"| `{column.name}` | {column.dtype} | {column.meaning} |" for column in columns)
        parts += [f"### {file}", "| column | type | meaning |\n|---|---|---|\n" + rows]
    return "\n\n".join(parts) + "\n"


class SourceInfo(Config):
    """Where a dataset comes from."""

    title: str
    address: str | None = None
    digest: Digest | None = None
    licence: str
    citation: str
    note: str = ""


class LeftOut(Config):
    """A sample of the source that could not be taken.

    Attributes:
        place: where it stands in the source, without naming it.
        reason: why it could not be taken.
    """

    place: str
    reason: str


class DatasetInfo(Config):
    """What a dataset folder is: the content of dataset.json."""

    schema_version: Literal[2] = Field(default=2, description="of this form; other versions are refused")
    name: str = Field(min_length=1, description="the catalogue's name of the set")
    task: Task = Field(description="binary, multiclass, multilabel or detection")
    classes: tuple[str, ...] = Field(min_length=1, description="in the order of label columns and logits")
    positive: str | None = Field(default=None, description="the class that a binary task looks for")
    kind: Kind = Field(default="image", description="what one sample is: image, volume, slide or features")
    modality: str = Field(min_length=1, description="what the images are, such as chest X-ray")
    clustered: bool = Field(description="false where the source has no patients, one is made up per image")
    source: SourceInfo = Field(description="title, address, digest, licence, citation, note")
    assumptions: tuple[str, ...] = Field(default=(), description="what was taken as given")
    left_out: tuple[LeftOut, ...] = Field(
        default=(), description="what could not be read and was left out by declaration: place, reason"
    )
    num_samples: int = Field(default=0, ge=0, description="rows of samples.parquet")
    num_patients: int = Field(default=0, ge=0, description="different pseudonyms")
    files: dict[str, Digest] = Field(default_factory=dict, description="digest of every other file")

    @model_validator(mode="after")
    def _classes_fit_task(self) -> Self:
        if len(set(self.classes)) != len(self.classes) or not all(self.classes):
            raise ValueError("classes must be different and not empty")
        if self.task == "binary" and len(self.classes) != 2:
            raise ValueError(f"a binary task has two classes, not {len(self.classes)}; use multilabel")
        if self.task == "multiclass" and len(self.classes) < 2:
            raise ValueError("a multiclass task has at least two classes; use multilabel for one")
        if (self.task == "binary") != (self.positive is not None):
            raise ValueError("positive names one class of a binary task, and is null for every other task")
        if self.positive is not None and self.positive not in self.classes:
            raise ValueError(f"positive {self.positive!r} is not among the classes {', '.join(self.classes)}")
        return self

    @property
    def label_columns(self) -> tuple[str, ...]:
        """The label columns of samples.parquet, in the order of the classes."""
        return tuple(f"label_{name}" for name in self.classes)


@dataclass(frozen=True, kw_only=True, eq=False)
class Sample:
    """One sample, as `DatasetWriter.add` takes it.

    Attributes:
        sample_id: unique, and free of identifiers: it appears in logs and reports.
        pixels: of an image, H W or H W 3, uint8 or uint16, black = 0; of a volume, its voxels D H W; of a
            slide, its thumbnail; of a bag, its features T E.
        labels: class -> 1 or 0; a missing class is unlabelled. In a binary or multiclass task the
            one class that is 1 suffices; none at all means unlabelled.
        patient: pseudonym.
        sha256: digest of the source file.
        frame: of a source file with several frames, the number of this one, from 1; else 0.
        site: hospital or centre.
        scanner: make and model.
        age: years.
        sex: F, M, O or empty.
        view: projection.
        given_split: the set's official split, or empty.
        spacing_mm: (row, column), or of a volume (slice, row, column), which must be known.
        boxes: (class, x0, y0, x1, y1) in stored pixels, recorded as they are: `validate` judges them.
        mask: uint8 on the grid of `pixels`, 0 = background.
        tissue: of a slide, 0 or 1 on the grid of its thumbnail.
        slide: the slide's file, which becomes part of the folder: a copy that shares its blocks on disks that can.
        slide_mpp: of a slide, micrometres per pixel of its finest level.
        findings: doubts about the geometry (`RawVolume.findings`).
        phash: perceptual hash, or empty.
        statistics: name -> value; the same names for every sample.
        checks: name -> value, of `cadx.quality`; the same names for every sample.
        clinical: name -> value, NaN where missing; the same names for every sample.
        assumptions: what the source does not say and was taken as given.
    """

    sample_id: str
    pixels: np.ndarray
    labels: Mapping[str, float]
    patient: str
    sha256: Digest
    frame: int = 0
    site: str = ""
    scanner: str = ""
    age: float = math.nan
    sex: str = ""
    view: str = ""
    given_split: str = ""
    spacing_mm: Sequence[float] | None = None
    boxes: Sequence[tuple[str, float, float, float, float]] = ()
    mask: np.ndarray | None = None
    tissue: np.ndarray | None = None
    slide: Path | None = None
    slide_mpp: float = math.nan
    findings: Sequence[str] = ()
    phash: str = ""
    statistics: Mapping[str, float]
    checks: Mapping[str, float] = field(default_factory=dict)
    clinical: Mapping[str, float] = field(default_factory=dict)
    assumptions: Sequence[str] = ()

    @property
    def layers(self) -> dict[str, np.ndarray]:
        """The arrays on its grid that it has."""
        layers = {"mask": self.mask, "tissue": self.tissue}
        return {name: array for name, array in layers.items() if array is not None}

    @property
    def numbers(self) -> dict[str, Mapping[str, float]]:
        """Its numbers, by the prefix of their columns."""
        return {"stat": self.statistics, "check": self.checks, "clinical": self.clinical}

    def check(self, kind: Kind) -> None:
        """Refuse what is not as described above, in a set of this kind.

        Raises:
            ValueError: what is wrong, without naming the sample.
        """
        self._check_names()
        _check_array(kind, self.pixels)
        self._check_geometry(kind)
        is_slide = kind == "slide"
        if is_slide != (self.slide is not None) or is_slide != (self.slide_mpp > 0):
            raise ValueError("samples of kind slide, and no others, come with slide and slide_mpp")
        if is_slide != (self.tissue is not None):
            raise ValueError("samples of kind slide, and no others, come with their tissue")

    def _check_names(self) -> None:
        if not isinstance(self.sample_id, str) or not re.fullmatch(r"(?!__metadata__$)[^/]+", self.sample_id):
            raise ValueError("sample_id must be a text, not empty, without '/' and not '__metadata__'")
        if not self.patient:
            raise ValueError("patient is empty; give a pseudonym, or the sample_id where there is none")
        if not _DIGEST.fullmatch(self.sha256):
            raise ValueError("sha256 is not 'sha256:' and 64 hex digits; use files.digest_path")
        if self.sex not in _SEXES:
            raise ValueError(f"sex {self.sex!r} is not F, M, O or empty")
        if self.given_split not in _GIVEN_SPLITS:
            known = " ".join(_GIVEN_SPLITS[1:])
            raise ValueError(f"given_split {self.given_split!r} is not {known} or empty")

    def _check_geometry(self, kind: Kind) -> None:
        num_axes = 3 if kind == "volume" else 2
        grid = self.pixels.shape[:num_axes]
        for name, array in self.layers.items():
            if array.dtype != np.uint8 or array.shape != grid:
                raise ValueError(
                    f"its {name} is {array.dtype} of shape {array.shape}; give uint8 of shape {grid}"
                )
        if kind == "volume" and self.spacing_mm is None:
            raise ValueError("a volume needs spacing_mm; give it in the catalogue's entry")
        if self.spacing_mm is not None and not (
            len(self.spacing_mm) == num_axes and all(math.isfinite(mm) and mm > 0 for mm in self.spacing_mm)
        ):
            raise ValueError(f"spacing_mm {self.spacing_mm} must be {num_axes} positive numbers, or None")
        for name, *corners in self.boxes:
            if not name or len(corners) != 4 or not all(math.isfinite(corner) for corner in corners):
                raise ValueError("a box must be (class, x0, y0, x1, y1) with finite numbers")


class DatasetWriter:
    """Writes a dataset folder sample by sample, holding one shard in memory; complete when its block ends.

    The folder may hold anything if the block raises: write to a path that is discarded then.
    """

    def __init__(
        self,
        path: Path,
        *,
        name: str,
        task: Task,
        classes: Sequence[str],
        positive: str | None,
        modality: str,
        clustered: bool,
        source: SourceInfo,
        kind: Kind = "image",
    ) -> None:
        """Start a dataset at `path`, which must not exist yet.

        Raises:
            ValueError: if the description contradicts itself.
        """
        description = {
            "name": name,
            "task": task,
            "classes": tuple(classes),
            "positive": positive,
            "kind": kind,
            "modality": modality,
            "clustered": clustered,
            "source": source,
        }
        self.path = path
        self._info = _validated(description, "dataset")
        self._samples: dict[str, list[Any]] = {}
        self._sample_ids: set[str] = set()
        self._boxes: dict[str, list[Any]] = {column.name: [] for column in BOX_COLUMNS}
        self._assumptions: dict[str, None] = {}
        self._names: dict[str, tuple[str, ...]] = {}
        self._slides: dict[str, Digest] = {}
        self._left_out: list[LeftOut] = []
        self._shard: dict[str, np.ndarray] = {}
        self._shard_bytes = 0
        self._num_shards = 0

    def __enter__(self) -> Self:
        """Make the folder."""
        (self.path / "shards").mkdir(parents=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Write what is left, the tables and dataset.json, unless the block raised."""
        if kind is None:
            self._finish()

    def leave_out(self, place: str, reason: str) -> None:
        """Record a sample of the source that cannot be taken: it is named, not lost."""
        self._left_out.append(LeftOut(place=place, reason=reason))

    def add(self, sample: Sample) -> None:
        """Add one sample.

        Raises:
            ValueError: if a field is not as `Sample` describes it, or does not go with the samples before.
            OSError: if the disk is full.
        """
        try:
            sample.check(self._info.kind)
            self._check_beside_others(sample)
            row = self._row(sample)
        except ValueError as error:
            raise ValueError(f"sample {sample.sample_id!r}: {error}") from None
        for column, value in row.items():
            self._samples.setdefault(column, []).append(value)
        for name, *corners in sample.boxes:
            for column, value in zip(
                self._boxes, (sample.sample_id, name, *map(float, corners)), strict=True
            ):
                self._boxes[column].append(value)
        self._sample_ids.add(sample.sample_id)
        self._assumptions.update(dict.fromkeys(sample.assumptions))
        if sample.slide is not None:
            self._take_slide(sample.slide, self.path / row["slide_path"])
            self._slides[row["slide_path"]] = sample.sha256
        arrays = {f"{name}/{sample.sample_id}": array for name, array in sample.layers.items()}
        for key, array in {sample.sample_id: sample.pixels, **arrays}.items():
            # A copy: the caller may reuse its buffer, or hold a view of a far larger array.
            self._shard[key] = np.array(array, order="C")
            self._shard_bytes += array.nbytes
        if self._shard_bytes >= SHARD_BYTES or len(self._shard) >= SHARD_SAMPLES:
            self._flush()

    def _check_beside_others(self, sample: Sample) -> None:
        """Refuse what does not go with the samples added before."""
        if sample.sample_id in self._sample_ids:
            raise ValueError("this sample_id was added before; make sample_id unique")
        if self._info.kind == "features" and self._samples:
            number, first = sample.pixels.shape[1], self._samples["width_px"][0]
            if number != first:
                raise ValueError(f"{number} features, the first sample has {first}")
        for prefix, values in sample.numbers.items():
            names = self._names.setdefault(prefix, tuple(values))
            if set(names) != set(values):
                raise ValueError(f"{prefix} values must have the first sample's names: {', '.join(names)}")

    def _row(self, sample: Sample) -> dict[str, Any]:
        """The sample's row of samples.parquet."""
        pixels, kind = sample.pixels, self._info.kind
        shard = _shard_name(self._num_shards)
        spacing_mm = sample.spacing_mm or ()
        slice_mm, row_mm, column_mm = (math.nan,) * (3 - len(spacing_mm)) + tuple(spacing_mm)
        return {
            "sample_id": sample.sample_id,
            "path": shard,
            "mask_path": shard if sample.mask is not None else "",
            "slide_path": f"slides/{sample.sample_id}{sample.slide.suffix.lower()}" if sample.slide else "",
            "sha256": sample.sha256,
            "frame": sample.frame,
            "pixels_sha256": _pixels_digest(pixels),
            "patient": sample.patient,
            "site": sample.site,
            "scanner": sample.scanner,
            "age": float(sample.age),
            "sex": sample.sex,
            "view": sample.view,
            "given_split": sample.given_split,
            "depth_px": pixels.shape[0] if kind == "volume" else 1,
            "height_px": pixels.shape[1 if kind == "volume" else 0],
            "width_px": pixels.shape[2 if kind == "volume" else 1],
            "channels": 3 if pixels.ndim == 3 and kind != "volume" else 1,
            "bits": 8 * pixels.itemsize,
            "dtype": str(pixels.dtype),
            "spacing_slice_mm": float(slice_mm),
            "spacing_row_mm": float(row_mm),
            "spacing_column_mm": float(column_mm),
            "slide_mpp": float(sample.slide_mpp),
            "findings": "; ".join(sample.findings),
            "phash": sample.phash,
            **{
                f"{prefix}_{name}": float(values[name])
                for prefix, values in sample.numbers.items()
                for name in self._names[prefix]
            },
            **self._complete(sample.labels),
        }

    def _take_slide(self, source: Path, target: Path) -> None:
        """Copy `source`, by reference where the disk can; no hard link, through which an edit would reach both."""
        target.parent.mkdir(exist_ok=True)
        with source.open("rb") as read, target.open("wb") as write:
            try:
                fcntl.ioctl(write, _CLONE, read.fileno())
            except OSError:
                shutil.copyfileobj(read, write, _COPY_BYTES)

    def _complete(self, labels: Mapping[str, float]) -> dict[str, float]:
        """The row's label columns."""
        classes = self._info.classes
        if unknown := [name for name in labels if name not in classes]:
            raise ValueError(f"label {unknown[0]!r} is not among the classes {', '.join(classes)}")
        values = {name: float(labels.get(name, math.nan)) for name in classes}
        if not all(value in (0, 1) or math.isnan(value) for value in values.values()):
            raise ValueError("labels must be 1, 0, or NaN for unlabelled")
        if self._info.task in ("binary", "multiclass"):
            positives = [name for name, value in values.items() if value == 1]
            if len(positives) == 1:
                values = {name: float(name == positives[0]) for name in classes}
            elif positives or 0 in values.values():
                raise ValueError(
                    f"{len(positives)} classes are 1, a {self._info.task} task needs exactly one;"
                    " give no labels where it is unknown"
                )
        return {f"label_{name}": value for name, value in values.items()}

    def _flush(self) -> None:
        path = self.path / _shard_name(self._num_shards)
        try:
            save_file(self._shard, path)
        except SafetensorError as error:  # a full disk, which is an OSError everywhere else
            raise OSError(f"{path}: cannot be written: {error}") from None
        self._shard = {}
        self._shard_bytes = 0
        self._num_shards += 1

    def _finish(self) -> None:
        if not self._sample_ids:
            raise ValueError("dataset: no sample was added; check the source's folder and patterns")
        if self._shard:
            self._flush()
        if not any(self._samples["frame"]):
            del self._samples["frame"]
        _write_table(self.path / "samples.parquet", self._samples, SAMPLE_COLUMNS)
        _write_table(self.path / "boxes.parquet", self._boxes, BOX_COLUMNS)
        names = ["samples.parquet", "boxes.parquet", *map(_shard_name, range(self._num_shards))]
        info = self._info.model_copy(
            update={
                "assumptions": tuple(self._assumptions),
                "left_out": tuple(self._left_out),
                "num_samples": len(self._sample_ids),
                "num_patients": len(set(self._samples["patient"])),
                "files": {name: digest_path(self.path / name) for name in names} | self._slides,
            }
        )
        write_json(self.path / "dataset.json", info.model_dump())


class DatasetFolder:
    """A dataset folder for reading: tables on opening, pixels on demand through a memory map."""

    def __init__(self, path: Path) -> None:
        """Open `path` and check its form; digests are left to `verify`.

        Raises:
            ValueError: if a file, a column or a type is not of this schema.
        """
        self.path = path
        self.info = _read_info(path / "dataset.json")
        labels = tuple(Column(name, "float64", "") for name in self.info.label_columns)
        fixed = tuple(column for column in SAMPLE_COLUMNS if "<" not in column.name)
        self.samples = _read_table(path / "samples.parquet", fixed + labels)
        self.boxes = _read_table(path / "boxes.parquet", BOX_COLUMNS)
        if len(self.samples) != self.info.num_samples:
            raise ValueError(
                f"{path / 'samples.parquet'}: {len(self.samples)} rows, but dataset.json says"
                f" num_samples = {self.info.num_samples}; {_REMAKE}"
            )
        self._rows = pd.Index(self.samples["sample_id"])
        if not self._rows.is_unique:
            raise ValueError(f"{path / 'samples.parquet'}: column sample_id has duplicates; {_REMAKE}")
        self._paths: list[str] = self.samples["path"].tolist()
        self._mask_paths: list[str] = self.samples["mask_path"].tolist()
        self._slide_paths: list[str] = self.samples["slide_path"].tolist()
        self._shards: OrderedDict[str, Any] = OrderedDict()
        self._process_id = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the memory maps, which no other process can use."""
        return {**self.__dict__, "_shards": OrderedDict()}

    def pixels(self, sample_id: str) -> np.ndarray:
        """The sample's array, a copy of its own: see `Sample` for what that is of each kind.

        Raises:
            ValueError: if the dataset has no such sample, or its shard does not hold it.
        """
        pixels: np.ndarray = self._read(sample_id, lambda shard: shard.get_tensor(sample_id))
        return pixels

    def mask(self, sample_id: str) -> np.ndarray | None:
        """The sample's mask, uint8 on the grid of its array; None where it has none."""
        if not self._mask_paths[int(self.rows([sample_id])[0])]:
            return None
        mask: np.ndarray = self._read(sample_id, lambda shard: shard.get_tensor(f"mask/{sample_id}"))
        return mask

    def tissue(self, sample_id: str) -> np.ndarray:
        """Where a slide has tissue: 0 or 1, uint8, on the grid of its thumbnail."""
        tissue: np.ndarray = self._read(sample_id, lambda shard: shard.get_tensor(f"tissue/{sample_id}"))
        return tissue

    def crop(
        self, sample_id: str, block: tuple[slice, slice, slice], layer: Literal["pixels", "mask"] = "pixels"
    ) -> np.ndarray:
        """A block D H W of a volume or of its mask; the rest of it is not read."""
        key = sample_id if layer == "pixels" else f"mask/{sample_id}"
        read: np.ndarray = self._read(sample_id, lambda shard: shard.get_slice(key)[block])
        return read

    def slide_path(self, sample_id: str) -> Path:
        """The slide's own file."""
        return self.path / self._slide_paths[int(self.rows([sample_id])[0])]

    def preview(self, sample_id: str) -> np.ndarray:
        """The sample as one picture: see `preview`."""
        return preview(self.info.kind, self.pixels(sample_id))

    def _read(self, sample_id: str, read: Callable[[Any], Any]) -> Any:
        try:
            shard = self._paths[self._rows.get_loc(sample_id)]
        except KeyError:
            raise self._unknown(sample_id) from None
        try:
            return read(self._open(shard))
        except (SafetensorError, OSError):
            raise ValueError(
                f"{self.path / shard}: sample {sample_id!r} cannot be read, the file is damaged; {_REMAKE}"
            ) from None

    def labels(self, sample_ids: Sequence[str] | None = None) -> np.ndarray:
        """The labels, N K float32, NaN = unlabelled; of these samples in this order, or of all.

        Raises:
            ValueError: if the dataset lacks one of the samples.
        """
        values = self.samples[list(self.info.label_columns)].to_numpy(np.float32)
        return values if sample_ids is None else values[self.rows(sample_ids)]

    def rows(self, sample_ids: Sequence[str]) -> np.ndarray:
        """The row number of each sample in `samples`.

        Raises:
            ValueError: if the dataset lacks one of the samples.
        """
        rows: np.ndarray = self._rows.get_indexer(pd.Index(sample_ids, dtype=self._rows.dtype))
        if (rows < 0).any():
            raise self._unknown(list(sample_ids)[int(np.argmax(rows < 0))])
        return rows

    def verify(self) -> None:
        """Compare every file with its digest in dataset.json.

        Raises:
            ValueError: if a file was changed, is missing or is not listed; it names the file.
        """
        for name, digest in self.info.files.items():
            if not (self.path / name).is_file():
                raise ValueError(f"{self.path / name}: missing, but dataset.json lists it; {_REMAKE}")
            if digest_path(self.path / name) != digest:
                raise ValueError(f"{self.path / name}: changed since it was written; {_REMAKE}")
        present = {file.relative_to(self.path).as_posix() for file in self.path.rglob("*") if file.is_file()}
        if extra := sorted(present - self.info.files.keys() - {"dataset.json"}):
            raise ValueError(f"{self.path / extra[0]}: not listed in dataset.json; remove it")

    def _unknown(self, sample_id: str) -> ValueError:
        return ValueError(
            f"{self.path}: no sample {sample_id!r}; run `cadx split` again if the dataset was remade"
        )

    def _open(self, shard: str) -> Any:
        if self._process_id != os.getpid():  # a loader worker after a fork
            self._shards = OrderedDict()
            self._process_id = os.getpid()
        if shard not in self._shards:
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.popitem(last=False)
            if shard not in self.info.files:
                raise ValueError(f"{self.path}: shard {shard!r} is not listed in dataset.json; {_REMAKE}")
            self._shards[shard] = safe_open(self.path / shard, framework="numpy")
        self._shards.move_to_end(shard)
        return self._shards[shard]


def preview(kind: Kind, pixels: np.ndarray) -> np.ndarray:
    """A sample's array as one picture, H W or H W 3, uint8 or uint16.

    Images and slides' thumbnails stand for themselves. Of a volume it is the middle slice as radiologists look at
    it, anterior above and the patient's right to the left, stretched between the 0.5th and 99.5th percentile of
    the volume; of a bag its features, stretched likewise, a row per instance.

    >>> preview("volume", np.arange(24, dtype=np.int16).reshape(2, 3, 4)).shape
    (3, 4)
    """
    if kind in ("image", "slide"):
        return pixels
    low, high = np.nanpercentile(pixels.reshape(-1)[:: max(1, pixels.size // 200_000)], (0.5, 99.5))
    plane = pixels[len(pixels) // 2, ::-1, ::-1] if kind == "volume" else pixels
    scaled = (np.nan_to_num(plane, nan=low).astype(np.float32) - low) * (255 / max(high - low, 1e-12))
    picture: np.ndarray = np.clip(np.rint(scaled), 0, 255).astype(np.uint8)
    return picture


def _check_array(kind: Kind, array: np.ndarray) -> None:
    if kind in ("image", "slide"):
        check_pixels(array)
    elif kind == "volume" and (array.ndim != 3 or str(array.dtype) not in VOXEL_TYPES or not array.size):
        raise ValueError(
            f"voxels are {array.dtype} {array.shape}; give D H W of {', '.join(VOXEL_TYPES)}, not empty"
        )
    elif kind == "features" and (array.ndim != 2 or array.dtype != np.float32 or not array.size):
        raise ValueError(f"features are {array.dtype} {array.shape}; give T E of float32, not empty")


def write_splits(path: Path, frame: pd.DataFrame) -> None:
    """Write splits.parquet: columns sample_id, split, reason, a row per sample.

    Raises:
        ValueError: if a column is missing or more, a split is unknown, or a sample stands twice.
    """
    names = [column.name for column in SPLIT_COLUMNS]
    if sorted(frame.columns) != sorted(names):
        raise ValueError(f"splits: columns are {', '.join(map(str, frame.columns))}; give {', '.join(names)}")
    _check_splits(frame, "splits")
    _write_table(path, {name: frame[name].tolist() for name in names}, SPLIT_COLUMNS)


def read_splits(path: Path) -> pd.DataFrame:
    """splits.parquet: columns sample_id, split, reason.

    Raises:
        ValueError: if it is not of this form.
    """
    frame = _read_table(path, SPLIT_COLUMNS)
    _check_splits(frame, str(path))
    return frame


def _check_splits(frame: pd.DataFrame, where: str) -> None:
    known = get_args(Split)
    if len(unknown := frame.loc[~frame["split"].isin(known), "split"]):
        raise ValueError(
            f"{where}: split {unknown.iloc[0]!r} in row {unknown.index[0]}; use {', '.join(known)}"
        )
    if len(twice := frame.loc[frame["sample_id"].duplicated(), "sample_id"]):
        raise ValueError(f"{where}: sample {twice.iloc[0]!r} stands twice; give each sample one split")


def _shard_name(index: int) -> str:
    return f"shards/{index:05d}.safetensors"


def _pixels_digest(pixels: np.ndarray) -> Digest:
    hasher = hashlib.sha256(f"{pixels.dtype} {pixels.shape} ".encode())
    hasher.update(np.ascontiguousarray(pixels).data)
    return Digest("sha256:" + hasher.hexdigest())


def _write_table(path: Path, data: Mapping[str, list[Any]], columns: Sequence[Column]) -> None:
    # Built by Arrow, not by DataFrame.to_parquet, which adds the versions of pandas and pyarrow to the file.
    dtypes = {column.name: column.dtype for column in columns}  # what is not named there is stat_ or label_
    arrays = {name: pa.array(values, _ARROW[dtypes.get(name, "float64")]) for name, values in data.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd")


def _read_table(path: Path, columns: Sequence[Column]) -> pd.DataFrame:
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; run the step that makes it first") from None
    except (pa.ArrowInvalid, OSError):
        raise ValueError(f"{path}: not a Parquet file; {_RERUN}") from None
    for column in columns:
        if column.name not in table.column_names:
            if not column.required:
                continue
            raise ValueError(f"{path}: no column {column.name!r} ({column.dtype}); {_RERUN}")
        found = str(table.schema.field(column.name).type).removeprefix("large_")  # pandas writes large_string
        if found not in (column.dtype, {"float64": "double"}.get(column.dtype)):
            raise ValueError(f"{path}: column {column.name!r} is {found}, not {column.dtype}; {_RERUN}")
        if column.dtype != "float64" and table.column(column.name).null_count:
            raise ValueError(f"{path}: column {column.name!r} has empty cells; {_RERUN}")
    frame: pd.DataFrame = table.to_pandas()
    return frame


def _read_info(path: Path) -> DatasetInfo:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {path.parent} is no dataset: run `cadx ingest`") from None
    except ValueError:
        raise ValueError(f"{path}: not JSON; {_REMAKE}") from None
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != 2:
        raise ValueError(f"{path}: schema_version is {version}, but this version of cadx reads 2; {_REMAKE}")
    return _validated(content, str(path))


def _validated(content: Mapping[str, Any], where: str) -> DatasetInfo:
    try:
        return DatasetInfo.model_validate(content)
    except ValidationError as error:
        problems = (
            f"{'.'.join([where, *map(str, item['loc'])])}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_input=False)
        )
        raise ValueError("; ".join(problems)) from None
