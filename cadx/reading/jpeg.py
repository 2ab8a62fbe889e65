"""Whether the JPEG of a file is whole: its decoders fill what it lacks with gray, and say nothing."""

import re

import imagecodecs
from pydicom.encaps import generate_frames
from pydicom.uid import UID, JPEGBaseline8Bit, JPEGExtended12Bit

from cadx.reading.dicom import discreet, parse_header
from cadx.reading.source import HEAD_BYTES, sniff

MAX_CHECKED_PIXELS = 24_000_000
"""Largest JPEG that is checked; the check takes 17 bytes of memory and 25 ns a pixel."""

_SYNTAXES = (JPEGBaseline8Bit, JPEGExtended12Bit)
_END_OF_IMAGE = b"\xff\xd9"
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # those that end a scan, or stand before it


def require_whole_jpeg(data: bytes, num_pixels: int) -> None:
    """Refuse a file with a JPEG of 8 bits whose scans are damaged, or do not end where the image does.

    libjpeg, under Pillow and GDCM alike, decodes such scans to the end: gray where they stop short, noise behind a
    flipped bit. libjxl packs a JPEG anew without loss, so it must understand each bit, and refuses what it cannot.
    It passes over bytes behind the last scan; of a whole stream the last byte is needed, so without that one it
    must refuse. A flip that leaves a readable stream of the same length makes another valid image.

    Args:
        data: a file that `read_image` reads. PNG, and DICOM of other transfer syntaxes or more bits, pass unseen.
        num_pixels: of the image that it was decoded to.

    Raises:
        ValueError: one line, without a value of the file.
    """
    stream = _jpeg_stream(data)
    if stream is None:
        return
    if num_pixels > MAX_CHECKED_PIXELS:
        raise ValueError(
            f"JPEG: more than {MAX_CHECKED_PIXELS // 10**6} megapixels; export as PNG, or as DICOM without JPEG"
        )
    end = _end_of_image(stream)
    # Fill bytes may stand before the marker (ITU-T T.81 B.1.1.2), and zeros often do.
    needed = stream[: end or 0].rstrip(b"\xff\x00")
    if end is None or not _is_understood(stream[:end]) or _is_understood(needed[:-1]):
        raise ValueError(
            "JPEG: damaged, truncated or of a rare kind: its data are not those of a whole image; export it again"
        )


def _jpeg_stream(data: bytes) -> bytes | None:
    """The JPEG in a file: the file itself, or the one frame of a DICOM file; None if it holds none of 8 bits."""
    kind = sniff(data[:HEAD_BYTES])
    if kind == "JPEG":
        return data
    if kind != "DICOM" or not any(syntax.encode() in data for syntax in _SYNTAXES):
        return None
    with discreet():
        header = parse_header(data)
        if UID(str(header.file_meta.TransferSyntaxUID)) not in _SYNTAXES or header.BitsStored != 8:
            return None
        stream: bytes = next(generate_frames(header.PixelData, number_of_frames=1))
    return stream


def _end_of_image(stream: bytes) -> int | None:
    """Where the marker stands that ends the image; None if there is none."""
    start = 2
    while found := _MARKER.search(stream, start):
        if found[0] == _END_OF_IMAGE:
            return found.start()
        length = int.from_bytes(stream[found.end() : found.end() + 2], "big")
        start = found.end() + length
    return None


def _is_understood(scans: bytes) -> bool:
    try:
        imagecodecs.jpegxl_encode_jpeg(scans + _END_OF_IMAGE)
    except imagecodecs.JpegxlError:
        return False
    return True
