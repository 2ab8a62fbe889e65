"""Bytes as they come: their limits, the format that they announce, and the reason for refusing them."""

from pathlib import Path
from typing import Literal

import numpy as np

MAX_PIXELS = 80_000_000
"""Largest image that is decoded: twice the largest radiograph, and under Pillow's own alarm."""
MAX_FILE_BYTES = 1 << 29

Format = Literal["DICOM", "PNG", "JPEG"]

_MAGIC: tuple[tuple[int, bytes, Format], ...] = (
    (128, b"DICM", "DICOM"),
    (0, b"\x89PNG\r\n\x1a\n", "PNG"),
    (0, b"\xff\xd8\xff", "JPEG"),
)
HEAD_BYTES = 132
"""What of a file `sniff` has to see."""


class Refusal(ValueError):
    """A reason in our own words, which holds no value of the file."""


def sniff(head: bytes) -> Format | None:
    r"""The format that the first 132 bytes of a file announce, or None.

    >>> sniff(b"\xff\xd8\xff\xe0")
    'JPEG'
    >>> sniff(b"PatientName: ...") is None
    True
    """
    for offset, magic, name in _MAGIC:
        if head[offset : offset + len(magic)] == magic:
            return name
    return None


def sniff_file(path: Path) -> Format | None:
    """The format that a file's first bytes announce, or None."""
    with path.open("rb") as stream:
        return sniff(stream.read(HEAD_BYTES))


def read_bytes(source: Path | bytes) -> bytes:
    """The bytes of a file, or `source` itself if it is bytes.

    Raises:
        ValueError: one line: missing, unreadable, empty, or over `MAX_FILE_BYTES`.
    """
    if isinstance(source, Path):
        try:
            size_bytes = source.stat().st_size
            data = source.read_bytes() if size_bytes <= MAX_FILE_BYTES else b""
        except FileNotFoundError:
            raise ValueError("no such image file; check the path") from None
        except OSError as error:
            raise ValueError(f"the image file cannot be read ({type(error).__name__})") from None
    else:
        data, size_bytes = source, len(source)
    if size_bytes > MAX_FILE_BYTES:
        raise ValueError(f"a file of {size_bytes} bytes is over the limit of {MAX_FILE_BYTES} for one image")
    if not data:
        raise ValueError("an empty file; export or copy it again")
    return data


def gray_if_equal(pixels: np.ndarray) -> np.ndarray:
    """H W where the three channels of H W 3 agree, else the pixels as they are."""
    if pixels.ndim == 3:
        red = pixels[..., 0]
        if np.array_equal(red, pixels[..., 1]) and np.array_equal(red, pixels[..., 2]):
            pixels = red
    return np.ascontiguousarray(pixels)


def check_size(height_px: int, width_px: int) -> None:
    """Refuse an empty image, and one of more than `MAX_PIXELS`, before anything is decoded."""
    if height_px < 1 or width_px < 1:
        raise Refusal("an empty image: no rows or no columns")
    if height_px * width_px > MAX_PIXELS:
        raise Refusal(f"claims {height_px} x {width_px} pixels, over the limit of {MAX_PIXELS}")


def check_frame(num_frames: int, frame: int | None) -> None:
    """Refuse a file of several frames of which none is asked for, and a frame that it does not have."""
    if frame is None and num_frames != 1:
        raise Refusal(
            "several frames; export each image on its own, or ask for one by its number "
            "(`frame` in the catalogue's entry)"
        )
    if frame is not None and not 1 <= frame <= num_frames:
        raise Refusal(f"no frame {frame}: it has {num_frames}, counted from 1")
