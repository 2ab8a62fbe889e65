"""One 2D image, DICOM, PNG or JPEG, -> pixels, geometry and what the file says; and arrays of images."""

import io
import math
import re
import struct
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from cadx.reading.dicom import discreet, read_dicom
from cadx.reading.jpeg import require_whole_jpeg
from cadx.reading.source import (
    HEAD_BYTES,
    MAX_PIXELS,
    Format,
    Refusal,
    check_frame,
    check_size,
    gray_if_equal,
    read_bytes,
    sniff,
)
from cadx.reading.vocabulary import Photometric
from cadx.types import RawImage

MAX_ARRAYS_BYTES = 1 << 32
"""Largest archive of arrays, unpacked: what its headers claim is checked before anything is."""

_ARRAY_HEAD_BYTES = 1 << 14  # NumPy itself refuses a header of more than 10,000
_TRUSTED_BYTES, _TRUSTED_DEFLATE = 1 << 27, 100  # an array larger and packed more tightly is counted first

_ORIENTATION, _UPRIGHT = 0x0112, 1  # of EXIF
_PNG_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# First row, first column, distance of rows, distance of columns. Source: PNG, third edition, 8.1.
_PNG_PASSES = (
    (0, 0, 8, 8),
    (0, 4, 8, 8),
    (4, 0, 8, 4),
    (0, 2, 4, 4),
    (2, 0, 4, 2),
    (0, 1, 2, 2),
    (1, 0, 2, 1),
)
_INFLATED_BYTES = 1 << 20


def read_image(
    source: Path | bytes, frame: int | None = None, *, photometric: Photometric | None = None
) -> RawImage:
    """The image in `source`, a DICOM, PNG or JPEG file by its first bytes; of several frames, the one asked for.

    DICOM goes through modality and VOI transformation (PS3.3 C.11.1, C.11.2) and has MONOCHROME1 turned, so
    that black = 0. Images of at most 8 bits come back as uint8, others as uint16 stretched over the display
    window or, without one, over the stored bits. Colour whose three channels agree comes back as gray.

    Args:
        source: a file or its bytes.
        frame: number of the frame, from 1 as DICOM counts; None where the file holds one image.
        photometric: of DICOM, used only where the file has no photometric interpretation, or one of no known
            meaning; recorded as an assumption.

    Raises:
        ValueError: one line, without file name or value: not an image, damaged, several frames and none asked for,
            no such frame, too many pixels (`MAX_PIXELS`, of JPEG `MAX_CHECKED_PIXELS`), of a kind whose meaning is
            not known, to be turned before it is shown (EXIF), or of another photometric interpretation than the one
            given.
    """
    data = read_bytes(source)
    kind = sniff(data[:HEAD_BYTES])
    if kind is None:
        raise ValueError("neither DICOM, PNG nor JPEG by its first bytes; export the image in one of them")
    try:
        if kind == "DICOM":
            return read_dicom(data, frame, photometric)
        return _read_picture(data, kind, frame)
    except Refusal as refusal:
        raise ValueError(f"{kind}: {refusal}") from None
    except Exception as error:  # the libraries raise every type there is, and their texts repeat values
        what = type(error).__name__
        raise ValueError(f"{kind}: damaged or truncated ({what}); export or copy the file again") from None


def read_png_indices(path: Path) -> np.ndarray:
    """The values that a PNG of one channel stores, H W uint8: of a palette its indices, of one bit 0 and 1.

    What a mask means by a pixel, where `read_image` gives what one sees.

    Raises:
        ValueError: one line: no PNG, several channels, more than 8 bits, or damaged.
    """
    data = read_bytes(path)
    if sniff(data[:HEAD_BYTES]) != "PNG":
        raise ValueError("a mask must be a PNG: other formats change values, or are not read as masks")
    try:
        picture = _opened(data, "PNG")
        _check_png(data)
        if picture.mode not in ("1", "L", "P"):
            raise Refusal("a mask must have one channel of at most 8 bits")
        return np.asarray(picture).astype(np.uint8)
    except Refusal as refusal:
        raise ValueError(f"PNG: {refusal}") from None
    except Exception as error:  # as in read_image
        raise ValueError(f"PNG: damaged or truncated ({type(error).__name__}); export it again") from None


def read_arrays(path: Path, wanted: str = ".*") -> dict[str, np.ndarray]:
    """The arrays of an .npz archive whose names match `wanted`. Pickled objects are refused, never loaded.

    No array is unpacked before each of them has the bytes that its header claims.

    Raises:
        ValueError: one line: missing, no archive, truncated, with objects, with an array of another size than its
            header claims, or larger than `MAX_ARRAYS_BYTES`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = {member.filename: member.filename.removesuffix(".npy") for member in archive.infolist()}
            members = [item for item in archive.infolist() if re.fullmatch(wanted, names[item.filename])]
            claimed_bytes = sum(member.file_size for member in members)
            if claimed_bytes > MAX_ARRAYS_BYTES:
                raise Refusal(f"claims {claimed_bytes} bytes unpacked, over the limit of {MAX_ARRAYS_BYTES}")
            for member in members:
                _check_array(archive, member)
            return {names[member.filename]: _read_array(archive, member) for member in members}
    except FileNotFoundError:
        raise ValueError(f"{path.name}: no such file") from None
    except Refusal as refusal:
        raise ValueError(f"{path.name}: {refusal}") from None
    except Exception as error:  # zipfile, zlib and NumPy each have their own types for a damaged archive
        what = type(error).__name__
        raise ValueError(f"{path.name}: no readable .npz of plain arrays ({what}); fetch it again") from None


def _check_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Refuse an array of another size than its header claims; no more than its header and 1 MiB is held.

    What the archive says of the size is believed, and NumPy's reading finds out a lie, unless that could flood
    the memory first: then the array is unpacked twice, the first time only to be counted.
    """
    with archive.open(member) as stream:
        head = io.BytesIO(stream.read(_ARRAY_HEAD_BYTES))
        # Versions 2 and 3 differ in the letters of field names alone.
        is_first = np.lib.format.read_magic(head) == (1, 0)
        read_header = np.lib.format.read_array_header_1_0 if is_first else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(head)
        if dtype.hasobject:
            raise Refusal("an array of pickled objects, which are never loaded; save plain numbers")
        claimed_bytes = head.tell() + math.prod(shape) * dtype.itemsize
        held_bytes = member.file_size
        is_doubtful = held_bytes > max(_TRUSTED_BYTES, member.compress_size * _TRUSTED_DEFLATE)
        if is_doubtful and claimed_bytes == held_bytes:
            chunks = iter(partial(stream.read, _INFLATED_BYTES), b"")
            held_bytes = len(head.getbuffer()) + sum(map(len, chunks))
    if claimed_bytes != held_bytes:
        raise Refusal(
            f"{member.filename!r} takes {held_bytes} bytes where its header claims {claimed_bytes}; fetch it again"
        )


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray:
    with archive.open(member) as stream:
        array: np.ndarray = np.lib.format.read_array(stream, allow_pickle=False)
        # At a member's end the archive compares its checksum; NumPy stops where the header says.
        if stream.read(1):
            raise Refusal("an array with more numbers than its header claims; fetch it again")
    return array


# --- PNG and JPEG -----------------------------------------------------------------------------------


def _read_picture(data: bytes, kind: Format, frame: int | None) -> RawImage:
    picture = _opened(data, kind)
    check_frame(getattr(picture, "n_frames", 1), frame)
    if kind == "PNG":
        _check_png(data)
    if frame is not None and frame > 1:
        picture.seek(frame - 1)
    if _orientation(picture) != _UPRIGHT:
        raise Refusal("its EXIF orientation turns or mirrors it; save it upright, without that tag")
    assumptions = []
    # Pillow gives 16-bit colour with 8 bits and does not say so; byte 24 is the depth in the PNG header.
    if kind == "PNG" and data[24] == 16 and not picture.mode.startswith("I"):
        assumptions.append("16-bit colour was read with 8 bits")
    # A value of 16-bit gray may be marked too, but RGBA would cost eight bits of all others.
    marks_transparent = "transparency" in picture.info and picture.mode in ("P", "L", "RGB")
    if marks_transparent or picture.mode in ("LA", "RGBA", "PA"):
        picture = _over_black(picture.convert("RGBA"), assumptions)
    elif picture.mode == "P":
        picture = picture.convert("RGB")
    elif picture.mode == "1":
        picture = picture.convert("L")
    if picture.mode.startswith("I"):
        pixels = np.asarray(picture).astype(np.uint16)
    elif picture.mode in ("L", "RGB"):
        pixels = np.array(picture)
    else:
        raise Refusal(f"colour mode {picture.mode} has no one meaning; export as gray or RGB")
    if kind == "JPEG":
        require_whole_jpeg(data, picture.height * picture.width)
    return RawImage(pixels=gray_if_equal(pixels), assumptions=tuple(assumptions))


def _over_black(picture: Image.Image, assumptions: list[str]) -> Image.Image:
    """RGBA as RGB; what shines through is an assumption."""
    opacity = picture.getchannel("A")
    picture = picture.convert("RGB")
    if opacity.getextrema() == (255, 255):
        return picture
    assumptions.append("transparent pixels were laid over black")
    canvas = Image.new("RGB", picture.size)
    canvas.paste(picture, mask=opacity)
    return canvas


def _opened(data: bytes, kind: Format) -> Image.Image:
    """The picture before its pixels are decoded, refused where they are too many."""
    try:
        with discreet():  # Pillow's alarm at large sizes, which are refused below
            picture: Image.Image = Image.open(io.BytesIO(data), formats=(kind,))
    except Image.DecompressionBombError:
        raise Refusal(f"claims more than twice the limit of {MAX_PIXELS} pixels") from None
    check_size(picture.height, picture.width)
    return picture


def _orientation(picture: Image.Image) -> int:
    """Of EXIF, 1 to 8; 1 where there is none, or none that can be read, as every viewer takes it."""
    try:
        return int(picture.getexif().get(_ORIENTATION, _UPRIGHT))
    except Exception:  # Pillow lets pass what a damaged EXIF makes of it
        return _UPRIGHT


def _check_png(data: bytes) -> None:
    """Refuse a PNG that fails one of its checksums, or that holds fewer pixels than it claims.

    Pillow passes over both: it takes changed pixels as they are, and those that are missing for black.

    Source: PNG, third edition, 5.3 (chunks), 7.2 and 8.1 (rows and passes).
    """
    at, claimed_bytes, held_bytes = 8, 0, 0
    inflate = zlib.decompressobj()
    kind = b""
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", data, at)
        body = data[at + 8 : at + 8 + length]
        (checksum,) = struct.unpack_from(">I", data, at + 8 + length)
        if zlib.crc32(body, zlib.crc32(kind)) != checksum:
            raise Refusal("a part of it fails its checksum; export or copy it again")
        if kind == b"IHDR":
            claimed_bytes = _png_bytes(body)
        while kind == b"IDAT" and body and held_bytes < claimed_bytes:
            held_bytes += len(inflate.decompress(body, _INFLATED_BYTES))
            body = inflate.unconsumed_tail
        at += 12 + length
    if held_bytes < claimed_bytes:
        raise Refusal("fewer pixels than its header claims; export or copy it again")


def _png_bytes(header: bytes) -> int:
    """How many bytes the pixels of a PNG take unpacked, by its IHDR: a row is its filter's number and its pixels."""
    width_px, height_px, depth, colour, _, _, interlaced = struct.unpack(">IIBBBBB", header)
    num_bytes = 0
    for row, column, row_step, column_step in _PNG_PASSES if interlaced else ((0, 0, 1, 1),):
        rows, columns = -(-(height_px - row) // row_step), -(-(width_px - column) // column_step)
        if rows > 0 and columns > 0:
            num_bytes += rows * (1 + -(-columns * depth * _PNG_CHANNELS[colour] // 8))
    return num_bytes


def encode_png(pixels: np.ndarray) -> bytes:
    """A PNG file that `read_image` reads as these very pixels, H W (8 or 16 bits) or H W 3 (8 bits).

    Raises:
        ValueError: for colour with 16 bits.

    >>> pixels = np.arange(6, dtype=np.uint16).reshape(2, 3) * 9000
    >>> bool((read_image(encode_png(pixels)).pixels == pixels).all())
    True
    """
    if pixels.ndim == 3 and pixels.dtype != np.uint8:
        raise ValueError("colour with 16 bits does not fit into a PNG here; send the original file")
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format="PNG")
    return out.getvalue()
