"""JPEG 2000 and JPEG of 12 bits inside DICOM, decoded by imagecodecs: a plugin of pydicom's decoders.

Pillow refuses some colour streams of JPEG 2000 that hold to the standard, and neither Pillow nor GDCM decodes JPEG of
12 bits. imagecodecs (OpenJPEG, libjpeg-turbo) reads both.
"""

from typing import Any

import imagecodecs
import numpy as np
from pydicom.dataset import Dataset
from pydicom.pixels.common import PhotometricInterpretation
from pydicom.pixels.decoders.base import DecodeRunner, get_decoder
from pydicom.uid import JPEG2000, UID, JPEG2000Lossless, JPEGBaseline8Bit, JPEGExtended12Bit

DECODER_DEPENDENCIES = {
    JPEGExtended12Bit: ("imagecodecs",),
    JPEG2000Lossless: ("imagecodecs",),
    JPEG2000: ("imagecodecs",),
}
"""What pydicom asks of a plugin: the syntaxes that it decodes, and by which packages."""

_NAME = "imagecodecs"
_START_OF_CODESTREAM = b"\xff\x4f\xff\x51"
_END_OF_IMAGE = b"\xff\xd9"


def decode_frame(header: Dataset, index: int) -> np.ndarray:
    """The stored values of frame `index`, from 0: H W, or H W 3 as RGB.

    No decoder is taken that fills what a truncated stream lacks where another one refuses it.

    Raises:
        NotImplementedError: if the transfer syntax has no decoder.
        Exception: whatever the decoders raise for damaged bytes.
    """
    syntax = UID(str(header.file_meta.TransferSyntaxUID))
    plugin = ""
    if syntax in (JPEG2000Lossless, JPEG2000):
        plugin = _NAME
    elif syntax == JPEGExtended12Bit:
        plugin = "pillow" if header.BitsStored == 8 else _NAME
    elif syntax == JPEGBaseline8Bit:
        plugin = "pillow"
    stored, _ = get_decoder(syntax).as_array(header, index=index, raw=False, decoding_plugin=plugin)
    return stored


def is_available(syntax: str) -> bool:
    """Whether this plugin decodes a transfer syntax; pydicom asks."""
    return syntax in DECODER_DEPENDENCIES


def _decode_frame(stream: bytes, runner: DecodeRunner) -> bytes:
    """The values of one frame as pydicom wants them from a plugin: native bytes, pixel by pixel."""
    shape: tuple[int, ...] = (runner.rows, runner.columns)
    if runner.samples_per_pixel > 1:
        shape += (runner.samples_per_pixel,)
    if runner.transfer_syntax == JPEGExtended12Bit:
        # libjpeg fills what is missing with gray.
        if not stream.rstrip(b"\x00\xff").endswith(_END_OF_IMAGE):
            raise ValueError("the JPEG stream has no end")
        return _decoded(imagecodecs.jpeg8_decode, stream, shape, np.uint16)
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


def _decoded(decode: Any, stream: bytes, shape: tuple[int, ...], dtype: Any) -> bytes:
    # Given the array to fill, imagecodecs refuses a stream of another size before it takes memory for it.
    pixels: np.ndarray = decode(stream, out=np.empty(shape, dtype))
    return pixels.tobytes()


for _syntax in DECODER_DEPENDENCIES:
    get_decoder(_syntax).add_plugin(_NAME, (__name__, "_decode_frame"))
