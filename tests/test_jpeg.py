"""Whether a JPEG is whole: what its decoders let pass is refused, and what is valid is not."""

import io
from collections.abc import Callable
from typing import Any

import imagecodecs
import numpy as np
import pytest
from other_readers import decode_jpeg_12, image_elsewhere
from PIL import Image
from pydicom.encaps import encapsulate
from pydicom.uid import JPEGBaseline8Bit, JPEGLosslessSV1
from test_corpus import dicom_jpeg_12, sources
from test_reading import dicom_dataset, encode

from cadx.reading.images import read_image
from cadx.reading.jpeg import MAX_CHECKED_PIXELS, require_whole_jpeg

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 64), np.uint8)
COLOUR = RNG.integers(0, 256, (33, 50, 3), np.uint8)


def saved(pixels: np.ndarray, **options: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", **options)
    return out.getvalue()


def in_dicom(stream: bytes) -> bytes:
    ds = dicom_dataset(NOISE)
    ds.file_meta.TransferSyntaxUID = JPEGBaseline8Bit
    ds.PixelData = encapsulate([stream])
    return encode(ds)


def lossless(pixels: np.ndarray) -> bytes:
    ds = dicom_dataset(pixels)
    ds.file_meta.TransferSyntaxUID = JPEGLosslessSV1
    ds.PixelData = encapsulate([imagecodecs.ljpeg_encode(pixels, bitspersample=16)])
    return encode(ds)


def spoilt(data: bytes, first: int, end: int, seed: int) -> bytes:
    """With one byte of data[first:end] changed."""
    rng, damaged = np.random.default_rng(seed), bytearray(data)
    damaged[int(rng.integers(first, end))] ^= int(rng.integers(1, 255))
    return bytes(damaged)


WHOLE = {
    "gray": saved(NOISE),
    "progressive": saved(NOISE, progressive=True),
    "optimised": saved(NOISE, optimize=True),
    "one pixel": saved(NOISE[:1, :1]),
    "black": saved(NOISE * 0),
    "mid gray": saved(NOISE * 0 + 128),
    "colour": saved(COLOUR),
    "colour, whole chroma": saved(COLOUR, subsampling=0, quality=98),
    "colour, half chroma": imagecodecs.jpeg8_encode(COLOUR, subsampling="440"),
    "restarts": saved(COLOUR, restart_marker_blocks=2),
    "zeros before the end": saved(NOISE)[:-2] + b"\0\0\xff\xff\xd9",
    "more behind the end": saved(NOISE) + saved(COLOUR),
    "DICOM": in_dicom(saved(NOISE)),
    "DICOM of 12 bits": dicom_jpeg_12(NOISE.astype(np.uint16) * 16),
    "DICOM, lossless, colour": sources()["dicom-jpeg"][1],
    "DICOM, lossless": lossless(NOISE.astype(np.uint16) * 256 + 7),
    "DICOM, lossless, black": lossless(NOISE.astype(np.uint16) * 0),
    "DICOM of 12 bits, dark": dicom_jpeg_12(NOISE.astype(np.uint16) * 0),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_jpeg_passes(kind: str) -> None:
    assert read_image(WHOLE[kind]).pixels.size


@pytest.mark.parametrize("within", [bytes, in_dicom], ids=["alone", "in DICOM"])
@pytest.mark.parametrize("kind", ["gray", "progressive", "optimised", "colour", "restarts"])
def test_a_jpeg_that_stops_short_or_goes_on_is_refused_though_its_decoder_takes_it(
    kind: str, within: Callable[[bytes], bytes]
) -> None:
    whole = WHOLE[kind]
    if kind in ("colour", "restarts") and within is in_dicom:
        pytest.skip("the DICOM file around it is gray")
    start, end = whole.rindex(b"\xff\xda") + 20, whole.rindex(b"\xff\xd9")
    cuts = [whole[: start + (end - start) * part // 20] + whole[end:] for part in range(20)]
    more = [whole[:end] + bytes([number]) * number + whole[end:] for number in range(2, 12)]
    for damaged in cuts + more:
        assert Image.open(io.BytesIO(damaged)).convert("L").size
        with pytest.raises(ValueError, match=r"^(JPEG|DICOM): damaged, truncated or of a rare kind[^\n]*$"):
            read_image(within(damaged))


def test_the_codes_of_12_bits_are_followed_as_another_decoder_does() -> None:
    """Flipped bits often leave a readable stream: both must say of the same ones that they do."""
    whole, verdicts = dicom_jpeg_12(NOISE.astype(np.uint16) * 16), set()
    stream_at = whole.index(b"\xff\xd8\xff")
    for number in range(60):
        damaged = spoilt(whole, stream_at + 400, len(whole) - 4, number)
        try:
            decode_jpeg_12(damaged[stream_at:])
            is_valid = True
        except (ValueError, LookupError, StopIteration, RuntimeError):
            is_valid = False
        try:
            read_image(damaged)
            is_whole = True
        except ValueError:
            is_whole = False
        assert is_whole == is_valid, number
        verdicts.add(is_valid)
    assert verdicts == {True, False}


@pytest.mark.parametrize("kind", ["DICOM, lossless, colour", "DICOM, lossless"])
def test_a_damaged_lossless_jpeg_is_refused_where_its_codes_run_out_or_are_left(kind: str) -> None:
    """GDCM refuses the same: it counts samples too."""
    whole, verdicts = WHOLE[kind], set()
    start = whole.rindex(b"\xff\xda")
    for number in range(40):
        damaged = spoilt(whole, start + 40, len(whole) - 8, number)
        try:
            pixels = read_image(damaged).pixels
            is_whole = True
        except ValueError:
            is_whole = False
        verdicts.add(is_whole)
        if is_whole:
            np.testing.assert_array_equal(image_elsewhere(damaged), pixels)
    assert False in verdicts


def test_a_jpeg_too_large_to_be_checked_is_refused() -> None:
    with pytest.raises(ValueError, match="a JPEG of more than 24 megapixels; export as PNG"):
        require_whole_jpeg(WHOLE["gray"], MAX_CHECKED_PIXELS + 1)
