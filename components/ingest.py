"""The step from a source, as it lies there, to a dataset folder."""

import math
import os
import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeVar

import numpy as np
from PIL import Image
from pydantic import Field, ValidationError
from rich.console import Console
from rich.progress import track

from cadx.catalog import (
    ENTRY,
    SPLIT_WORDS,
    BagsEntry,
    Entry,
    FilesEntry,
    NpzEntry,
    PairsEntry,
    Patches,
    PhantomEntry,
    StoredEntry,
    TableEntry,
    digest_as,
    digest_source,
    fetch,
    load_catalog,
    pseudonym,
    site_key,
)
from cadx.datasets import VOXEL_TYPES, DatasetWriter, Sample, SourceInfo, preview
from cadx.drift import image_statistics
from cadx.files import digest_bytes, digest_path
from cadx.layouts import FileEntry, Item, Orphan, list_items, read_bags
from cadx.quality import image_checks, perceptual_hash
from cadx.reading.folders import is_hidden
from cadx.reading.vocabulary import BURNED_IN, LABEL_IMAGES
from cadx.settings import did_you_mean, explain
from cadx.splitting import count_spelt_alike
from cadx.types import Digest, Kind
from components.contract import In, Keep, Out, Params, step

_LISTED = 5
_CLEAN_LABELS = ("the label and macro images of the slides were looked over and name nobody",)
_OLDEST_YEARS = 90
"""Ages above 89 identify a person by the HIPAA safe harbor rule (45 CFR 164.514(b)(2)): they become 90."""


class IngestParams(Params):
    """Which set of the catalogue to read."""

    source: str = Field(min_length=1)  # its name in the catalogue
    unreadable: Literal["stop", "leave_out"] = Field(
        default="stop",
        description="what a file that cannot be taken does: it stops the step, or is left out and listed with its "
        "reason in dataset.json and in the report of `validate`",
    )
    orphans: Literal["stop", "leave_out"] = Field(
        default="stop",
        description="what an image without its label (mask, row, annotation) and a label without its image do: as "
        "above, under the rules image_without_label and label_without_image of `validate`",
    )


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
    layout = _phantom_layout(name, entry) if isinstance(entry, PhantomEntry) else entry
    key = site_key(cache) if entry.patient == "hmac" or entry.deidentify else b""
    with _at_hand(name, entry, cache) as root:
        if digest and (found := digest_as(root, digest)) != digest:
            raise ValueError(f"{name}: the source has digest {found}, --digest asks for {digest}")
        source = SourceInfo(
            title=entry.title,
            address=None if isinstance(entry, PhantomEntry) else entry.address,
            digest=_digest(name, root),
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
            kind=layout.kind,
            modality=entry.modality,
            clustered=entry.patient != "per-image" or _patches(entry) is not None or _has_frames(entry),
            source=source,
        ) as writer:
            if isinstance(layout, NpzEntry):
                _add_arrays(writer, name, layout, root)
            elif isinstance(layout, BagsEntry):
                _add_bags(writer, name, layout, root, key)
            else:
                _add_files(writer, name, layout, root, key, params)


def _digest(name: str, root: Path) -> Digest:
    try:
        return digest_source(root)
    except OSError as error:  # its text repeats a file's name
        what = type(error).__name__
        raise ValueError(f"{name}: a file of the source cannot be read ({what}); check its rights") from None


def _find(entries: dict[str, Entry], name: str, catalog: Path) -> Entry:
    if name not in entries:
        hint = did_you_mean(name, entries) or f"; it holds: {', '.join(entries)}"
        raise ValueError(f"{catalog}: no data set {name!r}{hint}")
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

    if "modality" not in entry.parameters:
        raise ValueError(f"{name}.parameters: no modality; give xray, volume, slide or lesion")
    try:
        return PHANTOM.validate_python(entry.parameters)
    except ValidationError as error:
        raise ValueError(explain(error, f"{name}.parameters", entry.parameters)) from None


def _phantom_layout(name: str, entry: PhantomEntry) -> StoredEntry:
    """The entry by which a phantom's own files are read."""
    layout = _phantom(name, entry).layout(entry.classes)
    described = entry.model_dump(exclude={"format", "parameters"})
    found = ENTRY.validate_python({**described, "file": "cohort", **layout})
    assert not isinstance(found, PhantomEntry)
    return found


def _add_arrays(writer: DatasetWriter, name: str, entry: NpzEntry, path: Path) -> None:
    from cadx.reading.images import read_arrays

    arrays = read_arrays(path, r".*_(images|labels)")
    splits = [key.removesuffix("_images") for key in arrays if key.endswith("_images")]
    if not splits:
        raise ValueError(f"{name}: no array is called train_images, val_images or test_images")
    for split in (key.removesuffix("_labels") for key in arrays if key.endswith("_labels")):
        if split not in splits:
            raise ValueError(
                f"{name}: {split}_labels without {split}_images; add these, or take the labels out"
            )
    assumed = (
        (f"spacing of the arrays: {entry.spacing_mm} mm", "axes of the arrays: superior, anterior, right")
        if entry.kind == "volume"
        else ()
    )
    for split in splits:
        images, labels = arrays[f"{split}_images"], arrays.get(f"{split}_labels")
        if split not in SPLIT_WORDS:
            raise ValueError(f"{name}: {split}_images belongs to none of train, val, calibration, test")
        volumes = entry.kind == "volume"
        colour = images.ndim == 4 and images.shape[3] == 3 and not volumes
        types = VOXEL_TYPES if volumes else ("uint8", "uint16")
        if str(images.dtype) not in types or not (images.ndim == 3 + volumes or colour):
            form = "N D H W" if volumes else "N H W or N H W 3"
            raise ValueError(
                f"{name}: {split}_images must be {form} of {', '.join(types)}, not {images.dtype} {images.shape}"
            )
        if images.dtype.kind == "f" and not np.isfinite(images).all():
            raise ValueError(f"{name}: {split}_images holds values that are not finite")
        if not images.size:
            raise ValueError(f"{name}: {split}_images is empty: {images.shape}")
        if labels is None or labels.ndim == 0 or len(labels) != len(images):
            raise ValueError(f"{name}: {split}_images and {split}_labels do not have equal lengths")
        if labels.dtype.kind not in "buif" or not np.equal(np.mod(labels, 1), 0).all():
            raise ValueError(f"{name}: {split}_labels must be whole numbers")
        if volumes and entry.spacing_mm is None:
            raise ValueError(
                f"{name}: arrays do not say how far voxels are apart; give spacing_mm in its entry"
            )
        labels = labels.reshape(len(images), -1)
        for index in _progress(range(len(images)), f"Reading {name}, {split}"):
            sample_id, pixels = f"{split}-{index:05d}", images[index]
            writer.add(
                Sample(
                    sample_id=sample_id,
                    pixels=pixels,
                    labels=_array_labels(entry, labels[index], f"{name}: {split}_labels row {index}"),
                    patient=sample_id,
                    sha256=digest_bytes(np.ascontiguousarray(pixels).tobytes()),
                    given_split=SPLIT_WORDS[split],
                    spacing_mm=entry.spacing_mm if volumes else None,
                    assumptions=(*entry.assumptions, *assumed),
                    **_looked_at(preview(entry.kind, pixels)),
                )
            )


def _array_labels(entry: NpzEntry, values: np.ndarray, where: str) -> dict[str, float]:
    if entry.task == "multilabel" and len(values) == len(entry.classes):
        return dict(zip(entry.classes, values.astype(float).tolist(), strict=True))
    if entry.task == "multilabel" or len(values) != 1 or int(values[0]) not in range(len(entry.classes)):
        known = ", ".join(f"{index} {label}" for index, label in enumerate(entry.classes))
        raise ValueError(f"{where}: {values.tolist()} is none of the entry's classes ({known})")
    return {entry.classes[int(values[0])]: 1.0}


def _add_bags(writer: DatasetWriter, name: str, entry: BagsEntry, root: Path, key: bytes) -> None:
    oldest_years = float(_OLDEST_YEARS) if entry.deidentify else math.inf
    bags = read_bags(entry, root, oldest_years=oldest_years)
    named: set[str] = set()
    for number, bag in enumerate(_progress(bags, f"Reading {name}")):
        sample_id = f"{bag.site}-{number:05d}" if len(entry.tables) > 1 else f"{number:05d}"
        picture = preview("features", bag.features)
        # Each table counts its own patients: 1 of one hospital is not 1 of another.
        named_as = bag.patient and (f"{bag.site}/{bag.patient}" if len(entry.tables) > 1 else bag.patient)
        named.add(named_as)
        writer.add(
            Sample(
                sample_id=sample_id,
                pixels=bag.features,
                labels=bag.labels,
                patient=_patient(entry, key, sample_id, named_as, bag.place),
                sha256=digest_bytes(bag.features.tobytes()),
                site=bag.site,
                age=bag.age,
                statistics=image_statistics(picture),
                assumptions=entry.assumptions,
            )
        )
    _check_spelling(name, entry, named, set(entry.tables))


# --- Files --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Loaded:
    """A sample's array and what goes with it: the fields of a `Sample` that its file decides."""

    array: np.ndarray
    sha256: Digest
    spacing_mm: tuple[float, ...] | None
    attributes: dict[str, Any]
    patient: str | None
    assumptions: tuple[str, ...]
    findings: tuple[str, ...] = ()
    mask: np.ndarray | None = None
    labels: dict[str, float] = field(default_factory=dict)
    tissue: np.ndarray | None = None
    slide: Path | None = None
    slide_mpp: float = math.nan
    statistics: dict[str, float] = field(default_factory=dict)
    phash: str = ""
    checks: dict[str, float] = field(default_factory=dict)
    piece: str = ""  # which part of the file it is, empty for the whole


@dataclass(frozen=True)
class _Read:
    """What came of an item: samples of one patient, or why there are none."""

    identifiers: tuple[str, ...] = ()
    problem: str = ""
    samples: tuple[_Loaded, ...] = ()


def _add_files(
    writer: DatasetWriter, name: str, entry: FileEntry, root: Path, key: bytes, params: IngestParams
) -> None:
    orphans: list[Orphan] | None = [] if params.orphans == "leave_out" else None
    try:
        items = list_items(entry, root, orphans)
    except OSError as error:  # its text repeats a file's name
        raise ValueError(
            f"{name}: the source cannot be listed ({type(error).__name__}); check its rights"
        ) from None
    beneath = [path.relative_to(root) for item in items for path in (item.path, item.mask) if path]
    if unseen := sum(any(map(is_hidden, path.parts)) for path in beneath):
        raise ValueError(
            f"{name}: {unseen} files lie under hidden names, which are no part of the source's digest; rename them"
        )
    for orphan in orphans or ():
        writer.leave_out(orphan.place, f"{orphan.rule}: {orphan.reason}")
    named = sorted(
        zip(_file_ids(items, key), items, strict=True), key=lambda pair: (pair[0], pair[1].frame or 0)
    )
    # The source may number its patients otherwise than the headers do: one of both names all, or one person is two.
    has_patients = any(item.patient for item in items)
    patients = {item.patient for item in items}
    sites = {item.attributes.get("site", "") for item in items}
    _check_spelling(name, entry, patients, sites)  # before files are read, which takes long
    problems: list[str] = []
    identified: Counter[str] = Counter()
    num_identified = 0
    reads = _in_order(lambda pair: _read(pair[1], entry), named, waiting=4 if entry.kind == "image" else 0)
    for (file_id, item), read in zip(named, _progress(reads, f"Reading {name}", len(named)), strict=True):
        problem, patient = read.problem, ""
        if read.identifiers:
            num_identified += 1
            identified.update(read.identifiers)
        if read.samples:
            try:
                named_as = item.patient if has_patients else read.samples[0].patient or ""
                patient = _patient(entry, key, file_id, named_as, "")
                patients.add(named_as)
            except ValueError as error:
                problem = str(error)
        if problem and params.unreadable == "leave_out":
            writer.leave_out(item.place, problem)
        elif problem:
            problems.append(f"{item.place}: {problem}")
        if problem or problems or identified:
            continue
        for loaded in read.samples:
            attributes, aged = _attributes(loaded.attributes | item.attributes, entry.deidentify)
            writer.add(
                Sample(
                    sample_id=f"{file_id}{loaded.piece}",
                    pixels=loaded.array,
                    labels=item.labels | loaded.labels,
                    patient=patient,
                    sha256=loaded.sha256,
                    given_split=item.given_split,
                    frame=item.frame or 0,
                    spacing_mm=loaded.spacing_mm,
                    statistics=loaded.statistics,
                    boxes=item.boxes,
                    mask=loaded.mask,
                    tissue=loaded.tissue,
                    slide=loaded.slide,
                    slide_mpp=loaded.slide_mpp,
                    findings=loaded.findings,
                    phash=loaded.phash,
                    checks=loaded.checks,
                    clinical=item.clinical,
                    assumptions=(*entry.assumptions, *loaded.assumptions, *aged),
                    **attributes,
                )
            )
    if identified:
        raise ValueError(_identifiers_found(name, identified, num_identified, len(items), entry.kind))
    if problems:
        raise ValueError(
            f"{name}: {len(problems)} of {len(items)} {entry.kind}s cannot be taken: {_listed(problems)}; "
            "repair them, take them out of the source, or set ingest.unreadable to leave_out"
        )
    _check_spelling(name, entry, patients, set())


def _read(item: Item, entry: FileEntry) -> _Read:
    from cadx.reading.identifiers import file_identifiers

    try:
        if entry.kind == "slide":
            from cadx.reading.slides import check_is_one_file

            check_is_one_file(item.path)
        found = file_identifiers(item.path, is_slide=entry.kind == "slide")
        # A header is left behind when its pixels are taken; a slide stays as it is, and so do burned-in letters.
        dropped = entry.deidentify and entry.kind != "slide"
        looked_over = LABEL_IMAGES if entry.label_images_are_clean else ()
        found = tuple(
            name for name in found if name not in looked_over and (not dropped or name == BURNED_IN)
        )
        if found:
            return _Read(identifiers=found)
        loaded = _LOADERS[entry.kind](item, entry)
        labels = _labels_in(item.mask_values, loaded.mask)
        patches = _patches(entry)
        if patches is None:
            return _Read(samples=(replace(loaded, labels=labels),))
        return _Read(samples=tuple(_pieces(loaded, item.mask_values, patches, entry.patient)))
    except ValueError as error:
        return _Read(problem=str(error))
    except OSError as error:
        return _Read(problem=f"cannot be opened ({type(error).__name__})")


def _load_image(item: Item, entry: FileEntry) -> _Loaded:
    from cadx.reading.images import read_image

    data = item.path.read_bytes()
    image = read_image(data, item.frame, photometric=entry.photometric_interpretation)
    height_px, width_px = image.pixels.shape[:2]
    if item.size_px not in (None, (height_px, width_px)):
        raise ValueError(
            f"its boxes were drawn in an image of another size ({item.size_px} px, this one has "
            f"{(height_px, width_px)}); pair each annotation with its own image, or correct the size in it"
        )
    one_patient = item.frame is not None and entry.patient == "per-image"
    return _Loaded(
        array=image.pixels,
        sha256=digest_bytes(data),
        spacing_mm=image.spacing_mm,
        attributes=image.attributes,
        patient=image.patient,
        assumptions=(
            *image.assumptions,
            *(("every file of frames is of another patient",) if one_patient else ()),
        ),
        piece="" if item.frame is None else f"-frame{item.frame:04d}",
        mask=None if item.mask is None else _picture_mask(item.mask, image.pixels.shape[:2], resize=False),
        **_looked_at(image.pixels),
    )


def _load_volume(item: Item, entry: FileEntry) -> _Loaded:
    from cadx.reading.volumes import read_mask, read_volume

    volume = read_volume(
        item.path,
        spacing_mm=entry.spacing_mm,
        orientation=entry.orientation,
        photometric=entry.photometric_interpretation,
    )
    return _Loaded(
        array=volume.voxels,
        sha256=digest_source(item.path),
        spacing_mm=volume.spacing_mm,
        attributes=volume.attributes,
        patient=volume.patient,
        assumptions=volume.assumptions,
        findings=volume.findings,
        mask=None if item.mask is None else read_mask(item.mask, like=volume),
        **_looked_at(preview("volume", volume.voxels)),
    )


def _load_slide(item: Item, entry: FileEntry) -> _Loaded:
    from cadx.reading.slides import summarise_slide

    slide = summarise_slide(item.path, slide_mpp=entry.slide_mpp)
    shape = slide.thumbnail.shape[:2]
    return _Loaded(
        array=slide.thumbnail,
        sha256=digest_path(item.path),
        spacing_mm=slide.spacing_mm,
        attributes=slide.attributes,
        patient=None,
        assumptions=(*slide.assumptions, *(_CLEAN_LABELS if entry.label_images_are_clean else ())),
        mask=None if item.mask is None else _picture_mask(item.mask, shape, resize=True),
        findings=slide.findings,
        tissue=slide.tissue,
        slide=item.path,
        slide_mpp=slide.slide_mpp,
        **_looked_at(slide.thumbnail),
    )


_LOADERS: dict[Kind, Callable[[Item, FileEntry], _Loaded]] = {
    "image": _load_image,
    "volume": _load_volume,
    "slide": _load_slide,
}


def _looked_at(picture: np.ndarray) -> dict[str, Any]:
    return {
        "statistics": image_statistics(picture),
        "phash": perceptual_hash(picture),
        "checks": image_checks(picture),
    }


def _picture_mask(path: Path, shape: tuple[int, ...], *, resize: bool) -> np.ndarray:
    """A mask drawn as a PNG, uint8; with `resize`, brought to `shape` without new values."""
    from cadx.reading.images import read_png_indices

    mask = read_png_indices(path)
    if resize and abs(mask.shape[0] * shape[1] - mask.shape[1] * shape[0]) <= max(*mask.shape, *shape):
        return np.asarray(Image.fromarray(mask).resize((shape[1], shape[0]), Image.Resampling.NEAREST))
    if mask.shape != shape:
        raise ValueError(
            f"its mask is {mask.shape[0]} x {mask.shape[1]} pixels, the image {shape[0]} x {shape[1]}"
        )
    return mask


def _labels_in(mask_values: Mapping[str, int], mask: np.ndarray | None) -> dict[str, float]:
    """Whether each class stands in the mask.

    Raises:
        ValueError: if a value stands there that is no class.
    """
    if mask_values and mask is not None and (foreign := set(np.unique(mask)) - {0, *mask_values.values()}):
        known = ", ".join(f"{value} {name}" for name, value in mask_values.items())
        raise ValueError(
            f"its mask holds {min(foreign)}, and the entry's mask_values are 0 background, {known}"
        )
    return {name: float(np.any(mask == value)) for name, value in mask_values.items()}


def _patches(entry: Entry) -> Patches | None:
    return entry.patches if isinstance(entry, PairsEntry) else None


def _has_frames(entry: Entry) -> bool:
    """Whether several samples may come of one file, and so of one patient."""
    if isinstance(entry, FilesEntry):
        return any(sample.frame for sample in entry.samples)
    return isinstance(entry, TableEntry) and entry.columns.frame is not None


def _pieces(
    volume: _Loaded, mask_values: Mapping[str, int], patches: Patches, policy: str
) -> Iterator[_Loaded]:
    """The pieces that `Patches` describes, called by their middle voxel (slice, row, column).

    Raises:
        ValueError: if the volume has no place for one.
    """
    from scipy.ndimage import distance_transform_edt

    spacing_mm, mask = volume.spacing_mm, volume.mask
    assert spacing_mm is not None
    assert mask is not None
    size_px = [max(1, round(mm / step)) for mm, step in zip(patches.size_mm, spacing_mm, strict=True)]
    if any(side < size for side, size in zip(mask.shape, size_px, strict=True)):
        sides, sizes = (" x ".join(map(str, px)) for px in (mask.shape, size_px))
        raise ValueError(f"its {sides} voxels do not hold a patch of {sizes}; make patches.size_mm smaller")
    assumed = [f"patches have the class at their middle, {patches.margin_mm:g} mm or more from any other"]
    if policy == "per-image":
        assumed.append("every volume is of another patient")
    middles = tuple(
        slice(size // 2, side - size + size // 2 + 1) for side, size in zip(mask.shape, size_px, strict=True)
    )
    rng = np.random.default_rng(list(bytes.fromhex(volume.sha256.removeprefix("sha256:"))))
    num_pieces = 0
    for name, value in (*mask_values.items(), (patches.other, 0)):
        is_class = mask == value
        if not is_class.all():  # or else there is nothing to be far from
            is_class &= distance_transform_edt(is_class, sampling=spacing_mm) >= patches.margin_mm
        starts = np.argwhere(is_class[middles])
        chosen = rng.choice(len(starts), min(patches.per_class, len(starts)), replace=False, shuffle=False)
        for start in starts[np.sort(chosen)]:
            block = tuple(slice(first, first + size) for first, size in zip(start, size_px, strict=True))
            voxels = np.ascontiguousarray(volume.array[block])
            middle = (f"{first + size // 2:03d}" for first, size in zip(start, size_px, strict=True))
            num_pieces += 1
            yield replace(
                volume,
                array=voxels,
                mask=None,
                labels={name: 1.0},
                piece="-" + "-".join(middle),
                assumptions=(*volume.assumptions, *assumed),
                **_looked_at(preview("volume", voxels)),
            )
    if not num_pieces:
        raise ValueError("no place for a patch; make patches.size_mm or patches.margin_mm smaller")


def _patient(entry: StoredEntry, key: bytes, file_id: str, patient: str, place: str) -> str:
    """The pseudonym that the entry's policy gives to a patient of the source."""
    if entry.patient == "per-image":
        return file_id
    if not patient:
        where = f"{place}: " if place else ""
        raise ValueError(
            f"{where}no patient; the entry's policy is {entry.patient}: fill in the patient column of every row, or of"
            " none and PatientID of every file"
        )
    return patient if entry.patient == "public" else pseudonym(key, "patient", patient)


def _check_spelling(name: str, entry: StoredEntry, patients: set[str], sites: set[str]) -> None:
    """Refuse names that are one but for capitals or the Unicode form of a letter: splits would part what is one."""
    told = {"sites": sites} if entry.patient == "per-image" else {"patients": patients, "sites": sites}
    for noun, names in told.items():
        if count := count_spelt_alike(names):
            raise ValueError(
                f"{name}: {count} names of {noun} differ from another in capitals or the Unicode form of a letter"
                " alone; write each in one way, in the table or in the headers"
            )


def _attributes(attributes: dict[str, Any], deidentify: bool) -> tuple[dict[str, Any], tuple[str, ...]]:
    age = attributes.get("age", math.nan)
    if deidentify and age >= _OLDEST_YEARS:
        return attributes | {"age": float(_OLDEST_YEARS)}, (f"ages above 89 were set to {_OLDEST_YEARS}",)
    return attributes, ()


def _identifiers_found(name: str, identified: Counter[str], num_files: int, num_all: int, kind: Kind) -> str:
    keywords = ", ".join(sorted(identified))
    if BURNED_IN in identified:
        advice = (
            "images whose BurnedInAnnotation is not NO show identifiers in their pixels: "
            "mask them at the source and set the element to NO"
        )
    elif kind == "slide":
        advice = "slides are kept as they are: clean the files at their source"
        if identified.keys() <= set(LABEL_IMAGES):
            advice += ", or look at those pictures and declare label_images_are_clean in the entry"
    else:
        advice = "set `deidentify: true` in its entry to drop them, or clean the files"
    return f"{name}: patient identifiers in {num_files} of {num_all} {kind}s ({keywords}); {advice}"


def _file_ids(items: list[Item], key: bytes) -> list[str]:
    """Names without extension below the folder that all files share, or pseudonyms of the whole names.

    What is made of one file, pieces or frames, shares its name, and its patient where the source names none.
    """
    if key:
        file_ids = [pseudonym(key, "sample", item.relative.as_posix()) for item in items]
    else:
        shared = os.path.commonpath([item.relative.parent.as_posix() or "." for item in items])
        stems = [_stem(item.relative.relative_to(shared)) for item in items]
        file_ids = ["-".join(stem.parts) for stem in stems]
    seen: dict[tuple[str, int | None], str] = {}
    for file_id, item in zip(file_ids, items, strict=True):
        if (file_id, item.frame) in seen:
            raise ValueError(
                f"{seen[file_id, item.frame]} and {item.place}: one file, or names that differ only in the extension"
            )
        seen[file_id, item.frame] = item.place
    return file_ids


def _stem(path: PurePosixPath) -> PurePosixPath:
    return path.with_name(re.sub(r"\.(nii\.gz|[^.]*)$", "", path.name) or path.name)


# --- Work in order ------------------------------------------------------------------------------------

T = TypeVar("T")
R = TypeVar("R")


def _in_order(function: Callable[[T], R], items: Iterable[T], *, waiting: int) -> Iterator[R]:
    """`function` of each item, in order, on several threads: decoding leaves the interpreter's lock.

    Only `waiting` results per thread lie ready at a time, however slow the reader of this iterator is.
    """
    workers = min(8, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        pending: deque[Future[R]] = deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > waiting * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _progress(items: Iterable[T], what: str, total: int | None = None) -> Iterable[T]:
    return track(items, what, total=total, console=Console(stderr=True), transient=True)


def _listed(problems: list[str]) -> str:
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more
