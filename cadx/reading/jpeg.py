"""Whether a JPEG is whole: its decoders fill what it lacks with gray, and say nothing."""

import re
from collections.abc import Iterator

import imagecodecs
import numpy as np

from cadx.reading.source import Refusal

MAX_CHECKED_PIXELS = 24_000_000
"""Largest JPEG that is taken: the check needs up to 40 bytes of memory and 100 ns a pixel."""

_EXTENDED, _LOSSLESS = 0xC1, 0xC3  # the markers of these processes' frames
_BYTES_AT_ONCE = 1 << 20
_END_OF_IMAGE = b"\xff\xd9"
_ENDED = 128
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # those that end a scan, or stand before it


def require_whole_jpeg(stream: bytes, num_pixels: int) -> None:
    """Refuse a JPEG whose scans are damaged, or do not end where the image does.

    Decoders take such scans to the end: gray where they stop short, noise behind a flipped bit. libjxl packs a JPEG
    anew without loss, so it must understand each bit, and refuses what it cannot. It passes over bytes behind the
    last scan; of a whole stream the last byte is needed, so without that one it must refuse. It knows no 12 bits and
    no lossless JPEG: there the codes are followed here. A flip that leaves a readable stream of the same length makes
    another valid image.

    Args:
        stream: a JPEG file, or a frame of one inside DICOM, that a decoder has taken.
        num_pixels: of the image that it was decoded to.

    Raises:
        Refusal: one line, without a value of the file.
    """
    if num_pixels > MAX_CHECKED_PIXELS:
        raise Refusal(
            f"a JPEG of more than {MAX_CHECKED_PIXELS // 10**6} megapixels; export as PNG, or as DICOM without JPEG"
        )
    try:
        is_whole = _is_whole_by_codes(stream) if _is_followed(stream) else _is_whole(stream)
    except (LookupError, ValueError, StopIteration):  # a segment that is not what its marker says
        is_whole = False
    if not is_whole:
        raise Refusal(
            "damaged, truncated or of a rare kind: its JPEG data are not those of a whole image; export it again"
        )


def segments(stream: bytes) -> Iterator[tuple[int, int, int]]:
    """Each marker segment of a JPEG: its marker, and where its contents start and end; the end of the image last."""
    start = 2
    while found := _MARKER.search(stream, start):
        if found[0] == _END_OF_IMAGE:
            yield 0xD9, found.start(), found.start()
            return
        start = found.end() + int.from_bytes(stream[found.end() : found.end() + 2], "big")
        yield found[1][0], found.end() + 2, start


def _is_whole(stream: bytes) -> bool:
    """Whether libjxl understands a JPEG of 8 bits, and needs its last byte."""
    ends = [start for marker, start, _ in segments(stream) if marker == 0xD9]
    if not ends:
        return False
    # Fill bytes may stand before the marker (ITU-T T.81 B.1.1.2), and zeros often do.
    needed = stream[: ends[0]].rstrip(b"\xff\x00")
    return _is_understood(stream[: ends[0]]) and not _is_understood(needed[:-1])


def _is_understood(scans: bytes) -> bool:
    try:
        imagecodecs.jpegxl_encode_jpeg(scans + _END_OF_IMAGE)
    except imagecodecs.JpegxlError:
        return False
    return True


# --- What libjxl does not know: sequential JPEG of 12 bits, and lossless JPEG ---------------------------


def _is_followed(stream: bytes) -> bool:
    return any(
        marker == _LOSSLESS or (marker == _EXTENDED and stream[start] == 12)
        for marker, start, _ in segments(stream)
    )


def _is_whole_by_codes(stream: bytes) -> bool:
    """Whether the codes of the one scan give each block, or each sample of a lossless JPEG, and nothing more.

    Source: ITU-T T.81, F.2.2 and H.2 (Huffman decoding, of blocks and of samples) and B.2 (segments).
    """
    tables: dict[int, bytes] = {}
    process = num_components = num_units = restart = scan = start = 0
    chosen: list[int] = []
    for marker, start, end in segments(stream):
        if marker == 0xC4:
            while start < end:
                kind, lengths = stream[start], stream[start + 1 : start + 17]
                tables[kind] = stream[start + 1 : start + 17 + sum(lengths)]
                start += 17 + sum(lengths)
        elif marker in (_EXTENDED, _LOSSLESS):
            process, num_components = marker, stream[start + 5]
            height, width = (int.from_bytes(stream[at : at + 2], "big") for at in (start + 1, start + 3))
            num_units = height * width if marker == _LOSSLESS else -(-height // 8) * -(-width // 8)
        elif marker == 0xDD:
            restart = int.from_bytes(stream[start:end], "big")
        elif marker == 0xDA:
            chosen += [stream[start + 2 + 2 * i] for i in range(stream[start])]
            scan = end
    if len(chosen) != num_components:
        return False
    parts = _RESTART.split(stream[scan:start])
    wanted = [restart] * (len(parts) - 1) + [num_units - restart * (len(parts) - 1)]
    dc = [_steps(tables[one >> 4]) for one in chosen]
    if process == _LOSSLESS:
        return all(_holds_samples(part, number, dc) for part, number in zip(parts, wanted, strict=True))
    ac = _steps(tables[0x10 | chosen[0] & 15])
    return num_components == 1 and all(
        _holds_blocks(part, number, dc[0], ac) for part, number in zip(parts, wanted, strict=True)
    )


def _steps(table: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Of each 16 bits that may come: how many belong to the next code and its number, 0 for no code; its symbol."""
    bits, symbols = np.zeros(1 << 16, np.uint8), np.zeros(1 << 16, np.uint8)
    first, values = 0, iter(table[16:])
    for length, number in enumerate(table[:16], start=1):
        for _ in range(number):
            next_first = first + (1 << 16 - length)
            symbols[first:next_first] = value = next(values)
            bits[first:next_first] = length + (value & 15)
            first = next_first
    return bits, symbols


def _holds_samples(part: bytes, number: int, tables: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    """Whether entropy-coded data hold so many samples of each component."""
    bits, end = _at_each_bit(part, *(table[0] for table in tables))
    at = 0
    try:
        if all(one == bits[0] for one in bits):
            of_any, step = bits[0], 1
            for _ in range(number * len(bits)):
                step = of_any[at]
                at += step
            if not step:  # a code that is none leads nowhere, so the last step tells of all
                return False
        else:
            for _ in range(number):
                for one in bits:
                    if not (step := one[at]):
                        return False
                    at += step
    except IndexError:
        return False
    return end - 8 < at <= end


def _holds_blocks(
    part: bytes, number: int, dc: tuple[np.ndarray, np.ndarray], ac: tuple[np.ndarray, np.ndarray]
) -> bool:
    """Whether entropy-coded data hold so many blocks."""
    # A run moves on by its zeros and the number behind them; the end of a block moves past any block's end.
    run = np.where(ac[1] == 0, _ENDED, (ac[1] >> 4) + 1).astype(np.uint8)
    (dc_bits, ac_bits, ac_run), end = _at_each_bit(part, dc[0], ac[0], run)
    at = 0
    try:
        for _ in range(number):
            if not (step := dc_bits[at]):
                return False
            at, k = at + step, 1
            while k < 64:
                if not (step := ac_bits[at]):
                    return False
                k += ac_run[at]
                at += step
            if 64 < k < _ENDED:
                return False
    except IndexError:
        return False
    return end - 8 < at <= end


def _at_each_bit(part: bytes, *tables: np.ndarray) -> tuple[list[bytes], int]:
    """What each table says of the 16 bits from each bit of entropy-coded data on; and how many bits these are.

    Fill bytes at the end are left out: in data a zero would stand behind each 255.
    """
    data = part.rstrip(b"\xff").replace(b"\xff\x00", b"\xff")
    end, padded = 8 * len(data), np.frombuffer(data + b"\xff\xff", np.uint8)
    found: list[list[bytes]] = [[] for _ in tables]
    for first in range(0, len(padded) - 2, _BYTES_AT_ONCE):
        some = padded[first : first + _BYTES_AT_ONCE + 2].astype(np.uint32)
        three = some[:-2] << 16 | some[1:-1] << 8 | some[2:]
        ahead = (three[:, None] >> np.arange(8, 0, -1, dtype=np.uint32) & 0xFFFF).ravel()
        for of_table, table in zip(found, tables, strict=True):
            of_table.append(table[ahead].tobytes())
    return [b"".join(of_table) for of_table in found], end
