"""One volume, NIfTI or a series of DICOM slices, -> voxels on RAS+ axes, spacing and doubts; and its mask.

Invariants: the array is filled slice by slice in its final place, so that no second copy of a volume ever
stands in memory; what a header claims is checked before anything is allocated or unpacked; axes go by the
file's affine, never by the order in which a library hands them over.
"""

import gzip
import os
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import nibabel
import numpy as np
from nibabel.orientations import axcodes2ornt, io_orientation, ornt2axcodes
from pydicom.dataset import Dataset
from pydicom.uid import UID, MediaStorageDirectoryStorage

from cadx.reading.codecs import decode_frame
from cadx.reading.dicom import (
    check_pixels,
    discreet,
    header_attributes,
    header_numbers,
    header_text,
    parse_header,
    settle_photometric,
)
from cadx.reading.folders import is_hidden
from cadx.reading.source import HEAD_BYTES, MAX_FILE_BYTES, Refusal, read_bytes, sniff
from cadx.reading.vocabulary import Photometric
from cadx.types import Millimetres, RawVolume

MAX_VOXELS = 1 << 29
"""Largest volume that is read: 512 x 512 x 2048, 2 GiB as float32."""
MAX_SIDE_PX = 1 << 14
MAX_SLICES = 1 << 13
"""Most files, frames or members of an archive that one series may have."""
MAX_UNPACKED_BYTES = 1 << 31
"""Most bytes that the members of a zip may claim to unpack to."""
MAX_EXTENSION_BYTES = 1 << 24
"""Most bytes between a NIfTI header and its voxels."""
SPACING_RANGE_MM = (1e-3, 100.0)
"""Distances between voxels that can be meant: from cell microscopy to a scout of the whole body."""

_SPACING_TOLERANCE = 5e-3  # relative; writers round pixdim to three digits
_GIVEN_TOLERANCE = 0.01  # relative; what is given may be rounded
_GAP_TOLERANCE = 0.01  # relative to the base gap between slices
_MOST_DIGITS = 6  # of a count of slices
_MOST_MULTIPLE = 8  # of the distance that a header gives, in the usual gap
_MISSING_TOLERANCE = 0.1  # a gap this close to a whole multiple of the base gap has lost slices
_OBLIQUE_DEGREES = 1.0
_TILT_DEGREES = 0.5
_MAX_DEFLATE = 1032  # zlib cannot pack better than 1032:1
_TRUSTED_BYTES, _TRUSTED_DEFLATE = 1 << 27, 100  # a gzip larger and packed more tightly is counted first
_COUNTED_BYTES = 1 << 20  # at a time
_LARGEST = 1e6  # of any length in a header, in its own unit: what lies beyond is damage and would overflow
_WHOLE_LIMIT = 1 << 20  # largest whole slope or intercept; products stay inside int64
_UNITS_MM = {1: 1000.0, 2: 1.0, 3: 1e-3}  # the low three bits of xyzt_units
_NIFTI_DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f4", "f8")
_KEPT_DTYPES = ("u1", "u2", "i2")

Spacing = tuple[Millimetres, Millimetres, Millimetres]
_Format = Literal["NIfTI", "gzip", "zip", "DICOM"]
_FORMAT_NAMES: dict[_Format | None, str] = {
    "NIfTI": "NIfTI",
    "gzip": "NIfTI",
    "zip": "zip of DICOM slices",
    "DICOM": "DICOM series",
    None: "DICOM series",
}


def read_volume(
    source: Path,
    *,
    spacing_mm: tuple[float, float, float] | None = None,
    orientation: str | None = None,
    photometric: Photometric | None = None,
) -> RawVolume:
    """The volume in `source`: a NIfTI file, a folder or a zip of one DICOM series, or one DICOM file.

    Voxels come as D H W = S, A, R in the file's own scale: rescale slope and intercept are applied slice by
    slice, which gives HU for CT. Whole numbers that fit stay uint8, uint16 or int16; all others are float32.
    An oblique volume keeps its grid, named by the closest axes, and says so in `findings`.
    Missing slices are found by the gaps that they leave and by a count in the headers. Without a count, slices lost
    at the ends of a series, or every second one of an MR series without SpacingBetweenSlices, cannot be known.

    Args:
        source: known by its first bytes; a folder holds the slices themselves.
        spacing_mm: (D, H, W), used only where the file gives no spacing or two that disagree; recorded as an
            assumption then.
        orientation: which way the axes of a NIfTI file's own array run, as `RawVolume.stored_axes`; used only where
            the file has neither qform nor sform; recorded as an assumption then.
        photometric: of DICOM slices, used only where they have no photometric interpretation, or one of no known
            meaning; recorded as an assumption then. It turns nothing: voxels keep the file's scale.

    Raises:
        ValueError: one line, without file name or value: not a volume, truncated, larger than the limits
            above, of several series, phases or orientations, of unknown or contradictory geometry, with
            another spacing than `spacing_mm` by more than 1 %, or of another photometric interpretation than the
            one given.
    """
    with _refusing(source) as kind:
        volume = _read(source, kind, spacing_mm, photometric, uncoded_axes=orientation)
        if spacing_mm is not None and not np.allclose(
            spacing_mm, volume.spacing_mm, rtol=_GIVEN_TOLERANCE, atol=0
        ):
            given, stated = (" x ".join(f"{step:g}" for step in mm) for mm in (spacing_mm, volume.spacing_mm))
            raise Refusal(
                f"spacing_mm {given} was given, but the file says {stated}; remove it from the catalogue entry"
            )
        return volume


def read_mask(source: Path, like: RawVolume | None = None) -> np.ndarray:
    """The mask in `source`, a file as `read_volume` reads it: D H W uint8, 0 = background.

    Args:
        source: the mask's file.
        like: the image that it belongs to. The mask must have its shape, its spacing and, as far as both
            files say it, its place to half a voxel. A NIfTI mask without qform and sform is taken to be
            stored as its NIfTI image is, along the same axes, and to have its spacing where it has none.

    Raises:
        ValueError: as `read_volume`; or one line: values that are not whole or outside of 0..255, another
            grid than the image's, or axes that neither the mask nor its image tells.
    """
    with _refusing(source) as kind:
        if like is None:
            mask = _read(source, kind, uncoded_axes="RAS")  # refused below
        else:
            mask = _read(source, kind, like.spacing_mm, uncoded_axes=like.stored_axes or "RAS")
    values = mask.voxels
    if like is not None:
        _check_grid(mask, like)
    elif mask.affine is None:
        raise ValueError("mask: neither qform nor sform; give the image whose axes it shares")
    whole = np.empty(values.shape, np.uint8)
    for target, plane in zip(whole, values, strict=True):
        if plane.min() < 0 or plane.max() > 255 or (plane != np.rint(plane)).any():
            raise ValueError("mask: values that are not whole or not in 0..255; export labels, not scores")
        target[...] = plane
    return whole


def _check_grid(mask: RawVolume, image: RawVolume) -> None:
    """Refuse a mask whose voxels are not the image's."""
    if mask.voxels.shape != image.voxels.shape:
        raise ValueError(
            f"mask: its shape {mask.voxels.shape} is not the image's {image.voxels.shape};"
            " export it on the image's grid"
        )
    if not np.allclose(mask.spacing_mm, image.spacing_mm, rtol=_SPACING_TOLERANCE, atol=0):
        raise ValueError("mask: its spacing is not the image's; export it on the image's grid")
    if mask.affine is not None and image.affine is not None:
        corners = np.array([*product(*((0, side - 1) for side in mask.voxels.shape), (1,))])
        shifts_mm = np.linalg.norm(corners @ (mask.affine - image.affine).T, axis=1)
        if shifts_mm.max() > min(image.spacing_mm) / 2:
            raise ValueError(
                f"mask: it lies up to {shifts_mm.max():.3g} mm off the image; export it on the image's grid"
            )
    # With one affine alone, only arrays that are stored alike can be laid on each other.
    elif mask.stored_axes is None or mask.stored_axes != image.stored_axes:
        raise ValueError(
            "mask: only one of it and its image says which way its axes run; export both with qform or sform"
        )


def _read(
    source: Path,
    kind: _Format | None,
    given_mm: tuple[float, float, float] | None = None,
    photometric: Photometric | None = None,
    *,
    uncoded_axes: str | None,
) -> RawVolume:
    """As `read_volume`, within `_refusing`; `uncoded_axes` are those of a NIfTI file that does not say, or None."""
    if kind == "NIfTI":
        size_bytes = source.stat().st_size
        with source.open("rb") as plain:
            return _read_nifti(plain, lambda claimed: claimed == size_bytes, given_mm, uncoded_axes)
    if kind == "gzip":
        with gzip.open(source) as unpacked:
            return _read_nifti(cast(BinaryIO, unpacked), partial(_unpacks_to, source), given_mm, uncoded_axes)
    if kind == "zip":
        with zipfile.ZipFile(source) as archive:
            return _read_series(_members(archive), given_mm, photometric)
    files = [source] if kind == "DICOM" else _files_in(source)
    if len(files) > MAX_SLICES:
        raise Refusal(f"{len(files)} files, over the limit of {MAX_SLICES} for one series")
    return _read_series([partial(read_bytes, path) for path in files], given_mm, photometric)


@contextmanager
def _refusing(source: Path) -> Iterator[_Format | None]:
    """The format of `source`, None for a folder; every error in the block becomes one discreet line."""
    name = "volume"
    try:
        kind = None if source.is_dir() else _sniff(source)
        name = _FORMAT_NAMES[kind]
        yield kind
    except FileNotFoundError:
        raise ValueError("no such volume; check the path") from None
    except Refusal as refusal:
        raise ValueError(f"{name}: {refusal}") from None
    except Exception as error:  # the libraries raise every type there is, and their texts repeat values
        what = type(error).__name__
        raise ValueError(f"{name}: damaged or truncated ({what}); export or copy it again") from None


def _sniff(path: Path) -> _Format:
    with path.open("rb") as stream:
        head = stream.read(348)
    if not head:
        raise Refusal("an empty file; export or copy it again")
    if sniff(head[:HEAD_BYTES]) == "DICOM":
        return "DICOM"
    if head[:2] == b"\x1f\x8b":
        return "gzip"
    if head[:4] == b"PK\x03\x04":
        return "zip"
    if _nifti_version(head):
        return "NIfTI"
    raise Refusal("neither NIfTI, DICOM nor a zip by its first bytes; export it in one of them")


# --- The array, filled in its place -------------------------------------------------------------------


class _Canvas:
    """A D H W array that takes slices in a file's own order and orientation.

    It starts with a dtype that may turn out too small; the first value that does not fit makes it float32,
    which with int16 in hand takes one and a half times the final memory, never more.
    """

    def __init__(self, shape_kji: tuple[int, int, int], axes: np.ndarray, dtype: Any) -> None:
        """Allocate; `axes` is nibabel's orientation of (i, j, k): (RAS axis, direction) each."""
        self._axes = axes[::-1].astype(int)  # of (k, j, i)
        shape = [0, 0, 0]
        for length, (axis, _) in zip(shape_kji, self._axes, strict=True):
            shape[2 - axis] = length
        self.voxels = np.empty(shape, dtype)
        self._view = self._as_file(self.voxels)

    def _as_file(self, voxels: np.ndarray) -> np.ndarray:
        view = voxels.transpose([2 - axis for axis, _ in self._axes])
        return view[tuple(slice(None, None, direction) for _, direction in self._axes)]

    def put(self, index: int, values: np.ndarray) -> None:
        """Write slice `index` in the file's order."""
        if self.voxels.dtype != np.float32 and not _fits(values, self.voxels.dtype):
            self.voxels = self.voxels.astype(np.float32)
            self._view = self._as_file(self.voxels)
        with np.errstate(over="ignore", invalid="ignore"):
            self._view[index] = values
        if values.dtype.kind == "f" and not np.isfinite(self._view[index]).all():
            raise Refusal("voxels that are no number or infinite; give them a value before export")

    def holds(self, index: int, values: np.ndarray) -> bool:
        """Whether slice `index` was written with these very values."""
        return np.array_equal(self._view[index], values)


def _fits(values: np.ndarray, dtype: np.dtype[Any]) -> bool:
    if np.can_cast(values.dtype, dtype):
        return True
    limits = np.iinfo(dtype)
    if not (values.min() >= limits.min and values.max() <= limits.max):  # false for NaN too
        return False
    return values.dtype.kind in "iu" or bool((values == np.rint(values)).all())


def _rescaled(stored: np.ndarray, slope: float, intercept: float) -> np.ndarray:
    """Slope and intercept applied to one slice: whole numbers stay whole, all else is float32."""
    if (slope, intercept) == (1, 0):
        return stored
    if _is_whole(slope, intercept) and stored.dtype.kind in "iu" and stored.itemsize <= 4:
        return stored.astype(np.int64) * int(slope) + int(intercept)
    with np.errstate(over="ignore", invalid="ignore"):
        return (stored.astype(np.float64) * slope + intercept).astype(np.float32)


def _is_whole(*numbers: float) -> bool:
    return all(float(number).is_integer() and abs(number) <= _WHOLE_LIMIT for number in numbers)


def _check_shape(shape: Sequence[int]) -> None:
    if min(shape) < 1:
        raise Refusal("an empty volume: one of its axes has no voxels")
    num_voxels = 1
    for side_px in shape:  # in Python's integers, which do not wrap round
        num_voxels *= side_px
    if num_voxels > MAX_VOXELS or max(shape) > MAX_SIDE_PX:
        sizes = " x ".join(map(str, shape))
        raise Refusal(f"claims {sizes} voxels, over the limits of {MAX_VOXELS} or {MAX_SIDE_PX} along a side")


# --- Geometry -----------------------------------------------------------------------------------------


def _orientation(steps: np.ndarray) -> np.ndarray:
    """For each of i, j, k the closest RAS axis and its direction; `steps` has their vectors as columns."""
    affine = np.vstack([np.column_stack([steps, np.zeros(3)]), [0, 0, 0, 1]])
    axes: np.ndarray = io_orientation(affine)  # type: ignore[no-untyped-call]
    if not np.isfinite(axes).all():
        raise Refusal("its affine gives two voxel axes one direction; export it again")
    return axes


def _spacing(steps: np.ndarray, axes: np.ndarray) -> Spacing:
    """(D, H, W) lengths of the steps of i, j, k."""
    ordered = [0.0, 0.0, 0.0]
    for length_mm, (axis, _) in zip(np.linalg.norm(steps, axis=0), axes, strict=True):
        ordered[2 - int(axis)] = round(float(length_mm), 6)  # a nanometre: what lies below is rounding noise
    return _checked_spacing(ordered)


def _affine(
    steps: np.ndarray, origin_mm: np.ndarray, axes: np.ndarray, shape_dhw: Sequence[int], spacing_mm: Spacing
) -> np.ndarray:
    """`RawVolume.affine`, of steps and origin in the file's own order; the lengths are those of `spacing_mm`."""
    affine = np.eye(4)
    affine[:3, 3] = origin_mm
    directions = (steps / np.linalg.norm(steps, axis=0)).T
    for direction, (axis, sign) in zip(directions, axes, strict=True):
        number = 2 - int(axis)
        step_mm = direction * spacing_mm[number]
        affine[:3, number] = sign * step_mm
        if sign < 0:
            affine[:3, 3] += (shape_dhw[number] - 1) * step_mm
    return affine


def _take_given(given_mm: Sequence[float] | None, reason: str, assumptions: list[str]) -> Spacing:
    """The spacing that was given, recorded as an assumption; refused for `reason` where none was."""
    if given_mm is None:
        raise Refusal(f"{reason}; export it again, or give spacing_mm")
    depth_mm, height_mm, width_mm = spacing = _checked_spacing(given_mm)
    assumptions.append(
        f"{reason}: {depth_mm:g} x {height_mm:g} x {width_mm:g} mm (D, H, W) was taken as given"
    )
    return spacing


def _checked_spacing(spacing_mm: Sequence[float]) -> Spacing:
    low, high = SPACING_RANGE_MM
    if len(spacing_mm) != 3 or not all(low <= step_mm <= high for step_mm in spacing_mm):
        raise Refusal(f"its spacing is not three lengths within {low:g} to {high:g} mm; export it again")
    depth_mm, height_mm, width_mm = spacing_mm
    return Millimetres(depth_mm), Millimetres(height_mm), Millimetres(width_mm)


def _geometry_findings(steps: np.ndarray, axes: np.ndarray) -> list[str]:
    """What is doubtful about the directions of i, j, k: a sheared grid, or one between the axes."""
    directions = steps / np.linalg.norm(steps, axis=0)
    cosines = np.abs(directions.T @ directions)[np.triu_indices(3, 1)]
    tilt_degrees = float(np.degrees(np.arcsin(min(1.0, cosines.max()))))
    if tilt_degrees > _TILT_DEGREES:
        return [f"gantry_tilt: slices are {tilt_degrees:.1f} degrees off the perpendicular"]
    closest = np.abs(directions[axes[:, 0].astype(int), range(3)])
    turn_degrees = float(np.degrees(np.arccos(min(1.0, closest.min()))))
    if turn_degrees > _OBLIQUE_DEGREES:
        return [f"oblique: axes are turned by {turn_degrees:.1f} degrees from the body's"]
    return []


# --- NIfTI --------------------------------------------------------------------------------------------


def _read_nifti(
    stream: BinaryIO,
    may_hold: Callable[[int], bool],
    given_mm: tuple[float, float, float] | None,
    uncoded_axes: str | None,
) -> RawVolume:
    """The volume in a stream that `may_hold` so many bytes, judged before memory is taken for them."""
    header = _nifti_header(stream)
    shape_ijk = _nifti_shape(header)
    dtype = header.get_data_dtype()
    if dtype.str[1:] not in _NIFTI_DTYPES:
        raise Refusal("voxels that are no single number (colour, complex); export one number per voxel")
    offset_bytes = float(header["vox_offset"])
    # The four bytes after the header say whether extensions follow.
    start_bytes = int(header["sizeof_hdr"]) + 4
    if not (offset_bytes.is_integer() and 0 <= offset_bytes - start_bytes <= MAX_EXTENSION_BYTES):
        raise Refusal("its header does not say where the voxels start; export it again")
    claimed_bytes = int(offset_bytes) + int(np.prod(shape_ijk, dtype=np.int64)) * dtype.itemsize
    if not may_hold(claimed_bytes):
        raise Refusal("its header claims another number of voxels than the file holds; copy it again")

    assumptions: list[str] = []
    steps, origin_mm, spacing = _nifti_geometry(header, given_mm, uncoded_axes, assumptions)
    axes = _orientation(steps)
    spacing = spacing or _spacing(steps, axes)
    slope, intercept = header.get_slope_inter()
    slope, intercept = (1.0, 0.0) if slope is None else (float(slope), float(intercept))
    canvas = _Canvas((shape_ijk[2], shape_ijk[1], shape_ijk[0]), axes, _nifti_dtype(dtype, slope, intercept))
    _skip(stream, int(offset_bytes) - int(header["sizeof_hdr"]))
    plane = np.empty((shape_ijk[1], shape_ijk[0]), dtype)
    for index in range(shape_ijk[2]):
        _fill(stream, plane)
        canvas.put(index, _rescaled(plane, slope, intercept))
    if stream.read(1):  # at its end gzip compares its checksum, too
        raise Refusal("more voxels than its header claims; copy it again")
    return RawVolume(
        voxels=canvas.voxels,
        spacing_mm=spacing,
        affine=None if origin_mm is None else _affine(steps, origin_mm, axes, canvas.voxels.shape, spacing),
        stored_axes="".join(ornt2axcodes(axes)),  # type: ignore[no-untyped-call]
        assumptions=tuple(assumptions),
        findings=tuple(_geometry_findings(steps, axes)),
    )


def _unpacks_to(source: Path, num_bytes: int) -> bool:
    """Whether the gzip at `source` may unpack to `num_bytes`, without holding more than 1 MiB of it.

    A claim that costs little memory is left to the reading itself. A large one must agree with the size at the
    file's end and be packed no more tightly than images are. Otherwise, as with a file of several members or a
    mask of hundreds of megabytes, the bytes are unpacked once only to be counted.

    Source: RFC 1952, 2.3.1: ISIZE, the last four bytes of a member, is its size modulo 2^32.
    """
    packed_bytes = source.stat().st_size
    if num_bytes > packed_bytes * _MAX_DEFLATE:
        return False
    if num_bytes <= _TRUSTED_BYTES:
        return True
    with source.open("rb") as packed:
        packed.seek(-4, os.SEEK_END)
        size_at_end = int.from_bytes(packed.read(4), "little")
    if size_at_end == num_bytes % (1 << 32) and num_bytes <= packed_bytes * _TRUSTED_DEFLATE:
        return True
    held_bytes = 0
    with gzip.open(source) as unpacked:
        while held_bytes <= num_bytes and (chunk := unpacked.read(_COUNTED_BYTES)):
            held_bytes += len(chunk)
    return held_bytes == num_bytes


def _nifti_version(head: bytes) -> int | None:
    """1 or 2, by the first 348 bytes of a file; None for anything else.

    Source: NIfTI-1.1 and NIfTI-2 standards: sizeof_hdr, in either byte order, and the magic string.
    """
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if 348 in sizes and head[344:348] in (b"n+1\0", b"ni1\0"):
        return 1
    return 2 if 540 in sizes and head[4:12] in (b"n+2\0\r\n\x1a\n", b"ni2\0\r\n\x1a\n") else None


def _nifti_header(stream: BinaryIO) -> Any:
    """The header as nibabel has it; the stream then stands right behind it."""
    block = stream.read(348)
    version = _nifti_version(block)
    if version is None:
        raise Refusal("no NIfTI file in the gzip; export the volume as .nii.gz")
    if (block[344:346] if version == 1 else block[4:6]) == b"ni":
        raise Refusal("a header without its voxels; export as one .nii or .nii.gz file")
    if version == 1:
        return nibabel.Nifti1Header(block, check=False)  # type: ignore[no-untyped-call]
    return nibabel.Nifti2Header(block + stream.read(540 - 348), check=False)  # type: ignore[no-untyped-call]


def _nifti_shape(header: Any) -> tuple[int, int, int]:
    num_axes, *sizes = (int(size) for size in header["dim"])
    if not 1 <= num_axes <= 7:
        raise Refusal("its header claims an impossible number of axes; copy it again")
    sizes = sizes[:num_axes]
    if len(sizes) < 3:
        raise Refusal("fewer than three axes; give images as PNG or DICOM")
    if any(size != 1 for size in sizes[3:]):
        raise Refusal(
            "several volumes in one (time points, directions, channels); export one volume per file"
        )
    _check_shape(sizes[:3])
    return sizes[0], sizes[1], sizes[2]


def _nifti_dtype(stored: np.dtype[Any], slope: float, intercept: float) -> Any:
    """What to read into; `_Canvas` widens it if a value asks for more."""
    if (slope, intercept) == (1, 0) and stored.str[1:] in _KEPT_DTYPES:
        return stored.newbyteorder("=")
    if stored.str[1:] == "f4" or not _is_whole(slope, intercept):
        return np.float32
    return np.int16


def _nifti_geometry(
    header: Any, given_mm: tuple[float, float, float] | None, uncoded_axes: str | None, assumptions: list[str]
) -> tuple[np.ndarray, np.ndarray | None, Spacing | None]:
    """Steps from voxel to voxel in mm RAS, as columns i, j, k; the first voxel's place; what spacing was given.

    The place is None where none is coded, the spacing where it is the length of the steps.

    Source: NIfTI-1.1 standard, methods 1 to 3. The sform counts where it is coded, else the qform.
    """
    pixdim = np.asarray(header["pixdim"][1:4], np.float64)
    has_pixdim = bool(((pixdim > 0) & (pixdim < _LARGEST)).all())
    form, doubt = _coded_form(header, pixdim if has_pixdim else None)
    units = int(header["xyzt_units"]) & 7
    unit_mm = _UNITS_MM.get(units, 1.0)
    origin_mm = None
    if form is not None:
        steps, origin_mm = form[:, :3], form[:, 3] * unit_mm
        if not (np.abs(origin_mm) < _LARGEST).all():
            raise Refusal("its affine puts it at no place in space; export it again")
    elif uncoded_axes is None:
        raise Refusal(
            "neither qform nor sform says which way its axes run, and sides may be swapped; export it with one, or"
            " give orientation in the catalogue's entry"
        )
    else:
        assumptions.append(f"neither qform nor sform: axes {uncoded_axes} were taken as given")
        axes = axcodes2ornt(uncoded_axes)  # type: ignore[no-untyped-call]
        steps = np.zeros((3, 3))
        steps[axes[:, 0].astype(int), range(3)] = axes[:, 1] * (pixdim if has_pixdim else 1.0)
        doubt = "" if has_pixdim else "no spacing in qform, sform or pixdim"
    if doubt:
        return steps, origin_mm, _take_given(given_mm, doubt, assumptions)
    if units and units not in _UNITS_MM:
        raise Refusal("an unknown unit of length in its header; export it in mm")
    if not units:
        assumptions.append("the header names no unit of length: mm was taken")
    return steps * unit_mm, origin_mm, None


def _coded_form(header: Any, pixdim: np.ndarray | None) -> tuple[np.ndarray | None, str]:
    """The sform, else the qform, 3 x 4 in the header's own unit, None where none is coded; and a doubt of its spacing.

    Refused where the two tell different sides or axes; `pixdim` are the header's lengths, None where it has none.
    """
    has_qform, has_sform = int(header["qform_code"]) > 0, int(header["sform_code"]) > 0
    if has_qform and pixdim is None:
        raise Refusal("a qform without lengths in pixdim; export it again")
    if header["pixdim"][0] == 0:
        header["pixdim"][0] = 1  # the standard's rule for qfac, of which nibabel alone knows 1 and -1
    qform = np.asarray(header.get_qform()[:3], np.float64) if has_qform else None
    if not has_sform:
        return qform, ""
    sform = np.asarray(header.get_sform()[:3], np.float64)
    steps = sform[:, :3]
    if not (np.abs(steps) < _LARGEST).all() or not abs(np.linalg.det(steps)) > 0:
        raise Refusal("its sform is no affine; export it again")
    if qform is not None:
        if np.linalg.det(qform[:, :3]) * np.linalg.det(steps) < 0:
            raise Refusal("qform and sform disagree on handedness, left or right; export it again")
        if not np.array_equal(_orientation(qform[:, :3]), _orientation(steps)):
            raise Refusal("qform and sform disagree on which way the axes run; export it again")
    lengths = np.linalg.norm(steps, axis=0)
    if pixdim is not None and not np.allclose(lengths, pixdim, rtol=_SPACING_TOLERANCE, atol=0):
        return sform, f"{'pixdim' if qform is None else 'qform'} and sform disagree on the spacing"
    return sform, ""


def _skip(stream: BinaryIO, num_bytes: int) -> None:
    if len(stream.read(num_bytes)) != num_bytes:
        raise Refusal("it ends before its voxels start; copy it again")


def _fill(stream: BinaryIO, plane: np.ndarray) -> None:
    """Fill `plane` from the stream; gzip hands over less than is asked for."""
    target = plane.reshape(-1).view(np.uint8).data  # a memoryview casts no foreign byte order
    while target:
        taken = stream.readinto(target)  # type: ignore[attr-defined]
        if not taken:
            raise Refusal("it ends before its last voxel; copy it again")
        target = target[taken:]


# --- DICOM --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Frame:
    """One slice of a series, its pixels still in the file.

    Attributes:
        read: gives the bytes of its file.
        index: number of the frame within that file.
        shape: (rows, columns).
        position_mm: centre of the first pixel in LPS, 3.
        cosines: directions of increasing column and row numbers in LPS, 2 x 3.
        pixel_mm: (row, column) spacing, or None where the file does not say.
        between_mm: distance to the next slice as the header has it, or None.
        thickness_mm: of the slice, or None.
        number: InstanceNumber, or None where it counts no slices: absent, or of MR, whose echoes and phases
            share one count.
        claim: the element that says how many slices the whole stack has, and how many; or None.
        scale: (slope, intercept).
        has_scale: whether the file gives each of them.
        photometric: its photometric interpretation.
        stored: dtype of the stored values.
        series: UID of the series, which no message repeats.
        patient: identifier, which no message repeats.
    """

    read: Callable[[], bytes]
    index: int
    shape: tuple[int, int]
    position_mm: np.ndarray
    cosines: np.ndarray
    pixel_mm: tuple[float, float] | None
    between_mm: float | None
    thickness_mm: float | None
    number: int | None
    claim: tuple[str, int] | None
    scale: tuple[float, float]
    has_scale: tuple[bool, bool]
    photometric: str
    stored: np.dtype[Any]
    series: str
    patient: str


def _members(archive: zipfile.ZipFile) -> list[Callable[[], bytes]]:
    """How to read each member by itself, once what they claim is within the limits."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) > MAX_SLICES:
        raise Refusal(f"{len(members)} members, over the limit of {MAX_SLICES} for one series")
    # Python reads no more of a member than it claims, so that a false claim is an error, no flood.
    if (claimed_bytes := sum(member.file_size for member in members)) > MAX_UNPACKED_BYTES:
        raise Refusal(f"claims {claimed_bytes} bytes unpacked, over the limit of {MAX_UNPACKED_BYTES}")
    if (largest_bytes := max((member.file_size for member in members), default=0)) > MAX_FILE_BYTES:
        raise Refusal(
            f"a member claims {largest_bytes} bytes, over the limit of {MAX_FILE_BYTES} for one file"
        )
    if any(member.flag_bits & 1 for member in members):
        raise Refusal("encrypted members; pack it without a password")
    return [
        partial(_member_bytes, archive, member)
        for member in members
        if not is_hidden(Path(member.filename).name)
    ]


def _member_bytes(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    """The bytes of one member; of what is no DICOM its first only, which say so."""
    with archive.open(member) as stream:
        head = stream.read(HEAD_BYTES)
    return archive.read(member) if sniff(head) == "DICOM" else head


def _files_in(folder: Path) -> list[Path]:
    """The files of a series, sorted; refused where a folder beside them holds files, which may be slices of it."""
    visible = sorted(path for path in folder.iterdir() if not is_hidden(path.name))
    beneath = (file for path in visible if path.is_dir() for file in path.rglob("*"))
    if any(file.is_file() and not is_hidden(file.name) for file in beneath):
        raise Refusal("files in a folder within it; give one folder per series, the slices directly in it")
    return [path for path in visible if path.is_file()]


def _read_series(
    sources: Sequence[Callable[[], bytes]],
    given_mm: tuple[float, float, float] | None,
    photometric: Photometric | None,
) -> RawVolume:
    """The volume of one series: headers first, then the pixels slice by slice in the order of their places."""
    assumptions: list[str] = []
    frames, attributes = _series_frames(sources, photometric, assumptions)
    _check_alike(frames)
    normal = np.cross(*frames[0].cosines)
    heights_mm = np.array([frame.position_mm @ normal for frame in frames])
    order = np.argsort(heights_mm, kind="stable")
    frames, heights_mm = [frames[number] for number in order], heights_mm[order]
    is_new, findings = _judge_gaps(frames, heights_mm)
    kept = [frame for frame, new in zip(frames, is_new, strict=True) if new]
    line, beside = _line_of_places(kept, heights_mm[is_new], normal)
    steps, origin_mm, spacing = _series_geometry(kept, heights_mm[is_new], line, given_mm, assumptions)
    axes = _orientation(steps)
    spacing = spacing or _spacing(steps, axes)
    shape = (len(kept), *frames[0].shape)
    _check_shape(shape)
    canvas = _Canvas(shape, axes, _series_dtype(frames))
    index = -1
    for new, values in zip(is_new, _decoded(frames, photometric), strict=True):
        index += bool(new)
        if new:
            canvas.put(index, values)
        elif not canvas.holds(index, values):
            raise Refusal(
                "different images at one position (phases, echoes, contrasts?); export each as its own series"
            )
    return RawVolume(
        voxels=canvas.voxels,
        spacing_mm=spacing,
        affine=_affine(steps, origin_mm, axes, canvas.voxels.shape, spacing),
        attributes=attributes,
        patient=frames[0].patient or None,
        assumptions=tuple(dict.fromkeys(assumptions)),
        findings=(*findings, *beside, *_geometry_findings(steps, axes)),
    )


def _series_frames(
    sources: Sequence[Callable[[], bytes]], photometric: Photometric | None, assumptions: list[str]
) -> tuple[list[_Frame], dict[str, Any]]:
    """All slices without their pixels, at least one, and what the first file says of group and machine."""
    frames: list[_Frame] = []
    attributes: dict[str, Any] | None = None
    num_others = 0
    for read in sources:
        data = read()
        if sniff(data[:HEAD_BYTES]) != "DICOM":
            num_others += 1
            continue
        with discreet():
            header = parse_header(data)
            if header.file_meta.get("MediaStorageSOPClassUID") == MediaStorageDirectoryStorage:
                continue  # a DICOMDIR: a table of contents
            settle_photometric(header, photometric, assumptions)
            if attributes is None:
                attributes = header_attributes(header, assumptions)
            frames.extend(_file_frames(header, read))
        if len(frames) > MAX_SLICES:
            raise Refusal(f"over {MAX_SLICES} slices, the limit for one series")
    if not frames:
        raise Refusal("no DICOM image in it; give one folder or zip per series, the slices directly in it")
    if num_others:
        # One of them may be a slice that was cut off: leaving it out could shorten the body unseen.
        raise Refusal(f"{num_others} files in it are no DICOM; leave only the slices of one series there")
    return frames, attributes or {}


def _file_frames(header: Dataset, read: Callable[[], bytes]) -> Iterator[_Frame]:
    """The slices of one file: one, or in an enhanced object several with a position each."""
    num_frames = int(header.get("NumberOfFrames") or 1)
    if num_frames > 1 and len(header.get("PerFrameFunctionalGroupsSequence") or ()) != num_frames:
        raise Refusal("several frames without a position each; export as a series of single slices")
    if num_frames > MAX_SLICES:
        raise Refusal(f"{num_frames} frames, over the limit of {MAX_SLICES} for one series")
    # The other frames have the form of the first.
    if check_pixels(header, UID(str(header.file_meta.get("TransferSyntaxUID", ""))), frame=1):
        raise Refusal("colour slices; a volume has one number per voxel")
    if header.get("ModalityLUTSequence"):
        raise Refusal("a modality lookup table, which is not read for volumes; export with rescale slope")
    claim = _claimed_slices(header)
    stored = np.dtype(f"{'i' if int(header.PixelRepresentation) else 'u'}{int(header.BitsAllocated) // 8}")
    for index in range(num_frames):
        position = _frame_numbers(header, index, "PlanePositionSequence", "ImagePositionPatient", 3)
        cosines = _frame_numbers(header, index, "PlaneOrientationSequence", "ImageOrientationPatient", 6)
        if position is None or cosines is None:
            raise Refusal(
                "slices without ImagePositionPatient or ImageOrientationPatient have no order in space"
            )
        directions = np.reshape(cosines, (2, 3))
        if not np.allclose(directions @ directions.T, np.eye(2), atol=0.01):
            raise Refusal("ImageOrientationPatient is no pair of perpendicular directions; export it again")
        pixel = _frame_numbers(header, index, "PixelMeasuresSequence", "PixelSpacing", 2)
        between = _frame_numbers(header, index, "PixelMeasuresSequence", "SpacingBetweenSlices", 1)
        thickness = _frame_numbers(header, index, "PixelMeasuresSequence", "SliceThickness", 1)
        slope = _frame_numbers(header, index, "PixelValueTransformationSequence", "RescaleSlope", 1)
        intercept = _frame_numbers(header, index, "PixelValueTransformationSequence", "RescaleIntercept", 1)
        number = header_text(header, "InstanceNumber")
        counts = number.isdecimal() and header_text(header, "Modality") != "MR"
        if slope and slope[0] == 0:
            raise Refusal("RescaleSlope is 0, which leaves no range of values; export it again")
        yield _Frame(
            read=read,
            index=index,
            shape=(int(header.Rows), int(header.Columns)),
            position_mm=np.array(position),
            cosines=directions,
            pixel_mm=(pixel[0], pixel[1]) if pixel and min(pixel) > 0 else None,
            between_mm=between[0] if between and between[0] > 0 else None,
            thickness_mm=thickness[0] if thickness and thickness[0] > 0 else None,
            number=int(number) if counts else None,
            claim=claim,
            scale=(slope[0] if slope else 1.0, intercept[0] if intercept else 0.0),
            has_scale=(slope is not None, intercept is not None),
            photometric=header_text(header, "PhotometricInterpretation"),
            stored=stored,
            series=header_text(header, "SeriesInstanceUID"),
            patient=header_text(header, "PatientID"),
        )


def _claimed_slices(header: Dataset) -> tuple[str, int] | None:
    """The element that says how many slices the whole stack has, and how many; None where no element does.

    Source: DICOM PS3.3 C.8.9.1 (NumberOfSlices of PET), C.7.6.1 (ImagesInAcquisition), C.8.3.1
    (NumberOfTemporalPositions of MR: how often each slice was taken).
    """
    slices, images, times = (
        int(text) if (text := header_text(header, keyword)).isdecimal() and len(text) <= _MOST_DIGITS else 0
        for keyword in ("NumberOfSlices", "ImagesInAcquisition", "NumberOfTemporalPositions")
    )
    if slices:
        return "NumberOfSlices", slices
    per_time, rest = divmod(images, times or 1)
    return ("ImagesInAcquisition", per_time) if per_time and not rest else None


def _frame_numbers(header: Dataset, index: int, group: str, keyword: str, count: int) -> list[float] | None:
    """The numbers of an element of frame `index`: its own, those shared by all frames, or the header's.

    Source: DICOM PS3.3 C.7.6.16, multi-frame functional groups.

    Raises:
        Refusal: if there is another count of them than `count`, or one is no number of a sensible size.
    """
    places: list[Dataset] = [header]
    for sequence, item in (
        ("SharedFunctionalGroupsSequence", 0),
        ("PerFrameFunctionalGroupsSequence", index),
    ):
        groups = header.get(sequence) or ()
        if item < len(groups) and groups[item].get(group):
            places.insert(0, groups[item].get(group)[0])
    for place in places:
        if numbers := header_numbers(place, keyword):
            if len(numbers) != count or not (np.abs(numbers) < _LARGEST).all():
                raise Refusal(f"{keyword} is not {count} numbers below {_LARGEST:g}; export it again")
            return numbers
    return None


def _check_alike(frames: Sequence[_Frame]) -> None:
    """Refuse what is more than one stack of equal slices."""
    first = frames[0]
    if (num_series := len({frame.series for frame in frames})) > 1:
        raise Refusal(f"{num_series} series in one; give one folder or zip per series")
    if len({frame.patient for frame in frames}) > 1:
        raise Refusal("slices of more than one patient; give one folder or zip per series")
    if any(frame.shape != first.shape for frame in frames):
        raise Refusal(
            "slices of different Rows or Columns (a scout among them?); export one stack per series"
        )
    if not all(np.allclose(frame.cosines, first.cosines, atol=1e-3) for frame in frames):
        raise Refusal("slices of different ImageOrientationPatient (a scout?); export one stack per series")
    spacings = [frame.pixel_mm or (0.0, 0.0) for frame in frames]
    if not np.allclose(spacings, spacings[0], rtol=1e-3, atol=0):
        raise Refusal("slices of different PixelSpacing; export one stack per series")
    if any(frame.has_scale != first.has_scale for frame in frames):
        raise Refusal("RescaleSlope or RescaleIntercept in some slices only; export them all in one scale")
    if any(frame.photometric != first.photometric for frame in frames):
        raise Refusal("slices of different PhotometricInterpretation; export one stack per series")


def _judge_gaps(frames: Sequence[_Frame], heights_mm: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Which slices, sorted by height, lie at a place of their own, and what is doubtful about gaps and number.

    Slices lost at the ends leave no gap. Only a count in the headers tells of them, so that without one, or with
    one that a writer got wrong in the same way, nobody can know.
    """
    findings, missing, uneven = [], [], []
    num_lost = 0
    is_new = np.concatenate([[True], np.diff(heights_mm) > SPACING_RANGE_MM[0]])
    if num_twice := int((~is_new).sum()):
        findings.append(f"duplicate_slices: {num_twice} equal copies were left out")
    gaps_mm = np.diff(heights_mm[is_new])
    kept = [frame for frame, new in zip(frames, is_new, strict=True) if new]
    if len(gaps_mm):
        base_mm, source = _base_gap_mm(gaps_mm, _header_gaps_mm(kept, gaps_mm))
        multiples = gaps_mm / base_mm
        whole = np.rint(multiples)
        is_hole = (whole > 1) & (np.abs(multiples - whole) <= _MISSING_TOLERANCE)
        if is_hole.any():
            num_lost = int((whole - 1)[is_hole].sum())
            # Where all gaps are holes, none of the base length is left to compare with.
            by = f", by {source}" if is_hole.all() else ""
            missing.append(f"{num_lost} slices are missing in {is_hole.sum()} places{by}")
        if (~is_hole & (np.abs(multiples - 1) > _GAP_TOLERANCE)).any():
            low_mm, high_mm = gaps_mm[~is_hole].min(), gaps_mm[~is_hole].max()
            uneven.append(f"uneven_spacing: gaps between slices of {low_mm:.4g} to {high_mm:.4g} mm")
    if claim := _larger_claim(kept, len(kept) + num_lost):
        keyword, number = claim
        missing.append(f"{len(kept)} of {number} slices are there, by {keyword}")
    if missing:
        findings.append(f"missing_slices: {', and '.join(missing)}")
    return is_new, findings + uneven


def _larger_claim(frames: Sequence[_Frame], num_slices: int) -> tuple[str, int] | None:
    """The count that all headers give, if it is of more than `num_slices`, and the element that gives it.

    One acquisition may give several stacks of one length (echoes, phases, kernels): a whole multiple says nothing.
    """
    claim = frames[0].claim
    if claim is None or any(frame.claim != claim for frame in frames):
        return None
    keyword, number = claim
    is_of_several = keyword == "ImagesInAcquisition" and number % num_slices == 0
    return claim if number > num_slices and not is_of_several else None


def _base_gap_mm(gaps_mm: np.ndarray, claims_mm: Mapping[str, float]) -> tuple[float, str]:
    """The distance between slices before any was lost, and which element of the header says so ("" for none).

    Most gaps are whole multiples of it, and none rounds to 0 of it. It is the first such among `claims_mm`, unless the
    usual gap would be more than `_MOST_MULTIPLE` of it, as of a length in another unit; else the smallest gap that is a
    fifth of all and no single one; else the median gap. As gaps measure it better than headers write it, it is then
    taken from those of that length, where there are any.
    """
    candidates = [*claims_mm.items(), *(("", gap_mm) for gap_mm in np.sort(gaps_mm))]
    for source, base_mm in candidates:
        multiples = gaps_mm / base_mm
        whole = np.rint(multiples)
        fits = np.abs(multiples - whole) <= _MISSING_TOLERANCE
        if source:
            is_known = np.median(multiples) <= _MOST_MULTIPLE
        else:
            is_known = (fits & (whole == 1)).sum() >= max(2, len(gaps_mm) / 5)
        if is_known and whole.min() >= 1 and fits.mean() > 0.5:
            single_mm = gaps_mm[whole == 1]
            return float(np.median(single_mm)) if len(single_mm) else float(base_mm), source
    return float(np.median(gaps_mm)), ""


def _header_gaps_mm(frames: Sequence[_Frame], gaps_mm: np.ndarray) -> dict[str, float]:
    """What the headers of slices, sorted and each at its own place, say of the distance between slices, by element.

    SliceThickness says nothing of it: slices may overlap or leave room between them. InstanceNumber does where it
    runs along the stack in step with the gaps, such as 1, 3, 5 at equal distance or 1, 2, 4 with a second gap of
    double length. Numbers in any other order, such as 1, 4, 2, 5 of interleaved slices, say nothing.
    """
    claims_mm: dict[str, float] = {}
    between_mm = [frame.between_mm or 0.0 for frame in frames]
    thickness_mm = frames[0].thickness_mm or 0.0
    # Some writers give the room between slices instead of the distance of their centres.
    is_room = between_mm[0] <= thickness_mm / 2 and bool(
        np.isclose(between_mm[0] + thickness_mm, np.median(gaps_mm), rtol=_GIVEN_TOLERANCE)
    )
    if (
        between_mm[0]
        and not is_room
        and np.allclose(between_mm, between_mm[0], rtol=_GIVEN_TOLERANCE, atol=0)
    ):
        claims_mm["SpacingBetweenSlices"] = between_mm[0]
    numbers = [frame.number for frame in frames if frame.number is not None]
    steps = np.diff(numbers)
    if len(numbers) == len(frames) and ((steps > 0).all() or (steps < 0).all()):
        numbered_mm = float(np.median(gaps_mm / np.abs(steps)))
        if (np.abs(gaps_mm / numbered_mm - np.abs(steps)) <= _MISSING_TOLERANCE).all():
            claims_mm["InstanceNumber"] = numbered_mm
    return claims_mm


def _line_of_places(
    frames: Sequence[_Frame], heights_mm: np.ndarray, normal: np.ndarray
) -> tuple[tuple[np.ndarray, np.ndarray], list[str]]:
    """The line on which the slices' first pixels lie, of slices sorted by height; and who lies beside it.

    It is the first one's place and the way for each mm of height, in LPS. Where not all lie within half a pixel of
    the line through the first and the last, it is that of most: one slice that was moved must not tilt the others.
    """
    places_mm = np.array([frame.position_mm for frame in frames])
    if len(frames) == 1:
        return (places_mm[0], normal), []
    way = (places_mm[-1] - places_mm[0]) / (heights_mm[-1] - heights_mm[0])
    rest_mm = places_mm - np.outer(heights_mm - heights_mm[0], way)
    tolerance_mm = min(frames[0].pixel_mm or (1.0, 1.0)) / 2
    if np.linalg.norm(rest_mm - places_mm[0], axis=1).max() <= tolerance_mm:
        return (places_mm[0], way), []
    way = np.median(np.diff(places_mm, axis=0) / np.diff(heights_mm)[:, None], axis=0)
    way += normal * (1 - way @ normal)
    rest_mm = places_mm - np.outer(heights_mm - heights_mm[0], way)
    origin_mm = np.sort(rest_mm, axis=0)[len(rest_mm) // 2]  # no mean of two halves
    beside_mm = np.linalg.norm(rest_mm - origin_mm, axis=1)
    num_beside = int((beside_mm > tolerance_mm).sum())
    return (origin_mm, way), [
        f"uneven_spacing: {num_beside} slices lie up to {beside_mm.max():.3g} mm beside the others"
    ]


def _series_geometry(
    frames: Sequence[_Frame],
    heights_mm: np.ndarray,
    line: tuple[np.ndarray, np.ndarray],
    given_mm: tuple[float, float, float] | None,
    assumptions: list[str],
) -> tuple[np.ndarray, np.ndarray, Spacing | None]:
    """As `_nifti_geometry`, of sorted slices on the `line` that `_line_of_places` gives.

    Source: DICOM PS3.3 C.7.6.2.1.1, equation C.7.6.2.1-1. DICOM's patient axes point left, posterior and
    superior (C.7.6.2.1.1), so that x and y change their signs.
    """
    pixel_mm, step_mm = frames[0].pixel_mm, frames[0].between_mm or frames[0].thickness_mm
    first_mm, way = line
    step = way * (float(np.median(np.diff(heights_mm))) if len(frames) > 1 else step_mm or 1.0)
    row_mm, column_mm = pixel_mm or (1.0, 1.0)
    # The first cosines point along a row, where the column number grows.
    along_row, along_column = frames[0].cosines
    steps = np.column_stack([along_row * column_mm, along_column * row_mm, step])
    to_ras = np.array([-1.0, -1.0, 1.0])
    steps *= to_ras[:, None]
    origin_mm = first_mm * to_ras
    if pixel_mm is None or (len(frames) == 1 and step_mm is None):
        missing = "PixelSpacing" if pixel_mm is None else "distance between slices, being one alone,"
        return steps, origin_mm, _take_given(given_mm, f"no {missing}", assumptions)
    if len(frames) == 1:
        assumptions.append("one slice: its own thickness or SpacingBetweenSlices was taken as its spacing")
    return steps, origin_mm, None


def _series_dtype(frames: Sequence[_Frame]) -> Any:
    """What to read into; `_Canvas` widens it if a value asks for more."""
    stored = {frame.stored for frame in frames}
    if len(stored) == 1 and all(frame.scale == (1, 0) for frame in frames):
        (only,) = stored
        return only if only.str[1:] in _KEPT_DTYPES else np.int16
    return np.int16 if all(_is_whole(*frame.scale) for frame in frames) else np.float32


def _decoded(frames: Sequence[_Frame], photometric: Photometric | None) -> Iterator[np.ndarray]:
    """The values of each slice, rows x columns, in the file's scale."""
    opened: Callable[[], bytes] | None = None
    header = Dataset()
    for frame in frames:
        if frame.read is not opened:
            with discreet():
                header = parse_header(frame.read())
                settle_photometric(header, photometric, [])
            opened = frame.read
        stored = decode_frame(header, frame.index)
        if stored.shape != frame.shape:
            raise Refusal("the pixel data have another size than the header says")
        # Bits above BitsStored, which may hold overlays, pydicom has already cleared or filled with the sign.
        yield _rescaled(stored, *frame.scale)
