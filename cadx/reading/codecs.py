"""JPEG 2000, JPEG-LS, lossless JPEG and JPEG of 12 bits inside DICOM, by imagecodecs: a plugin of pydicom's decoders.

Pillow refuses some colour streams of JPEG 2000 that hold to the standard, neither Pillow nor GDCM decodes JPEG of
12 bits, and damaged streams end GDCM with its process. imagecodecs (OpenJPEG, CharLS, libjpeg-turbo) reads them all.
"""

import io
import struct
from typing import Any

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset
from pydicom.encaps import generate_fragments, get_frame, parse_basic_offsets
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import (
    JPEG2000,
    UID,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cadx.reading.jpeg import require_whole_jpeg, segments
from cadx.reading.source import Refusal

_JPEG_2000 = (JPEG2000Lossless, JPEG2000)
_JPEG_LS = (JPEGLSLossless, JPEGLSNearLossless)
_JPEG_LOSSLESS = (JPEGLossless, JPEGLosslessSV1)
_JPEG = (JPEGBaseline8Bit, JPEGExtended12Bit, *_JPEG_LOSSLESS)

DECODER_DEPENDENCIES = dict.fromkeys(
    (JPEGExtended12Bit, *_JPEG_LOSSLESS, *_JPEG_LS, *_JPEG_2000), ("imagecodecs",)
)
"""What pydicom asks of a plugin: the syntaxes that it decodes, and by which packages."""

_NAME = "imagecodecs"
_START_OF_CODESTREAM = b"\xff\x4f\xff\x51"
_START_OF_BOXES = b"\0\0\0\x0cjP  "  # of JPEG 2000 as a file of its own
_STARTS_OF_STREAM = (b"\xff\xd8\xff", _START_OF_CODESTREAM, _START_OF_BOXES)
_END_OF_IMAGE = b"\xff\xd9"
_START_OF_SCAN = 0xDA
_LOSSLESS_FRAMES = (0xC3, 0xF7)  # SOF3 of lossless JPEG, SOF55 of JPEG-LS


def check_length(header: Dataset, syntax: UID) -> None:
    """Refuse pixel data of another length than the header claims: decoders take their beginning for the picture.

    Behind uncompressed pixels may stand zeros, fewer than a row and a column of one channel have values: a changed Rows
    or Columns leaves more. Compressed frames are as many as streams begin in the fragments.

    Source: DICOM PS3.5, 8.1.1 and A.4: padding to even length; fragments, of which RLE has one for each frame.
    """
    data = header.PixelData
    if syntax.is_encapsulated:
        num_frames = int(header.get("NumberOfFrames") or 1)
        stream = io.BytesIO(data)
        parse_basic_offsets(stream)
        num_streams = sum(
            syntax == RLELossless or fragment.startswith(_STARTS_OF_STREAM)
            for fragment in generate_fragments(stream)
        )
        if num_streams > num_frames:
            raise Refusal(
                f"its header claims {num_frames} frames, but {num_streams} are there; export the file again"
            )
        return
    claimed_bytes = get_expected_length(header)
    tail = data[claimed_bytes:]
    is_padding = len(tail) <= claimed_bytes % 2 or (
        len(tail) < min(header.Rows, header.Columns) * header.BitsAllocated // 8 and not any(tail)
    )
    if len(data) < claimed_bytes or not is_padding:
        raise Refusal(
            f"damaged or truncated: its header claims {claimed_bytes} bytes of pixels, but {len(data)} are there; "
            "export or copy the file again"
        )


def decode_frame(header: Dataset, index: int) -> np.ndarray:
    """The stored values of frame `index`, from 0: H W, or H W 3 as RGB.

    The decoders of JPEG and RLE let damaged streams pass, so that each stream is judged by itself, too. GDCM, which
    refuses lossless JPEG that is damaged, ends its process on other kinds of damage.

    Raises:
        NotImplementedError: if the transfer syntax has no decoder.
        Refusal: for JPEG or RLE that is not whole.
        Exception: whatever the decoders raise for damaged bytes.
    """
    syntax = UID(str(header.file_meta.TransferSyntaxUID))
    plugin = ""
    if syntax == JPEGBaseline8Bit or (syntax == JPEGExtended12Bit and header.BitsStored == 8):
        plugin = "pillow"
    elif syntax in DECODER_DEPENDENCIES:
        plugin = _NAME
    if syntax == RLELossless:
        _require_whole_rle(_frame(header, index), header.Rows * header.Columns)
    stored, _ = get_decoder(syntax).as_array(header, index=index, raw=False, decoding_plugin=plugin)
    if syntax in _JPEG:
        require_whole_jpeg(_frame(header, index), stored.shape[0] * stored.shape[1])
    return stored


def _frame(header: Dataset, index: int) -> bytes:
    """The stream of frame `index`, from 0."""
    offsets = None
    if "ExtendedOffsetTable" in header:
        offsets = (header.ExtendedOffsetTable, header.ExtendedOffsetTableLengths)
    num_frames = int(header.get("NumberOfFrames") or 1)
    return get_frame(header.PixelData, index, number_of_frames=num_frames, extended_offsets=offsets)


def _require_whole_rle(stream: bytes, num_pixels: int) -> None:
    """Refuse RLE of which a segment holds fewer bytes than pixels, or more.

    Source: DICOM PS3.5, annex G: the header's offsets, runs and literals, zeros behind a segment.
    """
    num_segments, *starts = struct.unpack_from("<16L", stream)
    starts = starts[:num_segments]
    for at, end in zip(starts, [*starts[1:], len(stream)], strict=True):
        missing = num_pixels
        while missing > 0 and at < end:
            control = stream[at]
            if control > 128:
                at, missing = at + 2, missing - (257 - control)
            elif control < 128:
                at, missing = at + 2 + control, missing - (1 + control)
            else:
                at += 1
        if missing or at > end or any(stream[at:end]):
            raise Refusal(
                "damaged or truncated: its RLE data are not those of a whole image; export it again"
            )


def is_available(syntax: str) -> bool:
    """Whether this plugin decodes a transfer syntax; pydicom asks."""
    return syntax in DECODER_DEPENDENCIES


def _decode_frame(stream: bytes, runner: DecodeRunner) -> bytes:
    """The values of one frame as pydicom wants them from a plugin: native bytes, pixel by pixel."""
    shape: tuple[int, ...] = (runner.rows, runner.columns)
    if runner.samples_per_pixel > 1:
        shape += (runner.samples_per_pixel,)
    syntax = runner.transfer_syntax
    # libjpeg fills what is missing with gray.
    if syntax not in _JPEG_2000 and not stream.rstrip(b"\x00\xff").endswith(_END_OF_IMAGE):
        raise ValueError("the JPEG stream has no end")
    if syntax == JPEGExtended12Bit:
        return _decoded(imagecodecs.jpeg8_decode, stream, shape, np.uint16)
    if syntax in (*_JPEG_LOSSLESS, *_JPEG_LS):
        bits = _lossless_bits(stream, shape)
        runner.set_option("bits_allocated", 8 if bits <= 8 else 16)
        runner.set_option("planar_configuration", 0)
        if syntax in _JPEG_LOSSLESS:
            return _decoded(imagecodecs.jpeg8_decode, stream, shape, f"u{runner.bits_allocated // 8}")
        pixels: np.ndarray = imagecodecs.jpegls_decode(stream)
        # A stream that is not interleaved holds one plane after the other.
        return (pixels if pixels.shape == shape else np.moveaxis(pixels, 0, -1)).tobytes()
    precision = int(runner.get_option("j2k_precision", runner.bits_stored))
    runner.set_option("bits_allocated", 8 if precision <= 8 else 16)
    runner.set_option("planar_configuration", 0)
    signed = runner.get_option("j2k_is_signed", runner.pixel_representation)
    dtype = np.dtype(f"{'i' if signed else 'u'}{runner.bits_allocated // 8}")
    # Boxes around the codestream are not part of DICOM (PS3.5 8.2.4), and their colour space does not count.
    decoded = _decoded(
        imagecodecs.jpeg2k_decode, stream[max(stream.find(_START_OF_CODESTREAM), 0) :], shape, dtype
    )
    if runner.photometric_interpretation in (
        PhotometricInterpretation.YBR_ICT,
        PhotometricInterpretation.YBR_RCT,
    ):
        # The transform is a part of the codestream and has been undone with it.
        runner.set_option("photometric_interpretation", PhotometricInterpretation.RGB)
    return decoded


def _lossless_bits(stream: bytes, shape: tuple[int, ...]) -> int:
    """Bits of a value in a lossless stream of this very shape; anything else never reaches its decoder.

    Source: ITU-T T.81, B.1.1 and B.2.2 (markers, frame header); T.87, C.2.2.
    """
    for marker, start, _ in segments(stream):
        if marker in _LOSSLESS_FRAMES:
            bits, rows, columns, samples = struct.unpack_from(">BHHB", stream, start)
            if (rows, columns, samples) == (*shape, 1)[:3]:
                return int(bits)
            break
        if marker == _START_OF_SCAN:
            break
    raise ValueError("no lossless stream of this size")


def _decoded(decode: Any, stream: bytes, shape: tuple[int, ...], dtype: Any) -> bytes:
    # Given the array to fill, imagecodecs refuses a stream of another size before it takes memory for it.
    pixels: np.ndarray = decode(stream, out=np.empty(shape, dtype))
    return pixels.tobytes()


for _syntax in DECODER_DEPENDENCIES:
    get_decoder(_syntax).add_plugin(_NAME, (__name__, "_decode_frame"))
