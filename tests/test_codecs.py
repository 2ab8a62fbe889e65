"""Lossless JPEG and JPEG-LS inside DICOM: right values by another coder's streams, and damage ends no process."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import imagecodecs
import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.uid import (
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)
from test_reading import OF_GDCM, coded_by_gdcm, dicom_dataset, encode, picture_bytes

from cadx.reading.codecs import decode_frame
from cadx.reading.images import read_image

SYNTAXES = (JPEGLossless, JPEGLosslessSV1, JPEGLSLossless, JPEGLSNearLossless)
COLOUR = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}


def packed(ds: Dataset, syntax: str, stream: bytes) -> Dataset:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = encapsulate([stream])
    ds["PixelData"].VR = "OB"
    return ds


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("syntax", OF_GDCM)
def test_streams_of_another_coder_give_the_values_that_went_in(tmp_path, syntax, signed):
    rng = np.random.default_rng(0)
    for bits in range(9, 17):
        low = -(1 << bits - 1) if signed else 0
        stored = rng.integers(low, low + (1 << bits), (33, 47)).astype("i2" if signed else "u2")
        plain = dicom_dataset(stored, bits=bits)
        coded = coded_by_gdcm(plain, syntax, tmp_path)
        np.testing.assert_array_equal(decode_frame(coded, 0), stored)
        np.testing.assert_array_equal(read_image(encode(coded)).pixels, read_image(encode(plain)).pixels)


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("predictor", range(1, 8))
def test_every_predictor_of_lossless_jpeg_is_undone(predictor, bits):
    stored = np.random.default_rng(bits).integers(0, 1 << bits, (33, 47)).astype("u1" if bits == 8 else "u2")
    stream = imagecodecs.jpeg8_encode(stored, lossless=True, predictor=predictor, bitspersample=bits)
    ds = packed(dicom_dataset(stored, bits=bits), JPEGLossless, stream)
    np.testing.assert_array_equal(decode_frame(ds, 0), stored)


@pytest.mark.parametrize("planar", [0, 1])
def test_colour_comes_back_whether_its_planes_are_interleaved_or_not(tmp_path, planar):
    rgb = np.random.default_rng(1).integers(0, 256, (34, 47, 3), dtype=np.uint8)
    ds = dicom_dataset(rgb, **COLOUR | {"PlanarConfiguration": planar})
    ds.PixelData = (rgb.transpose(2, 0, 1) if planar else rgb).tobytes()
    np.testing.assert_array_equal(decode_frame(coded_by_gdcm(ds, JPEGLSLossless, tmp_path), 0), rgb)


def test_near_lossless_values_are_off_by_what_was_allowed_and_no_more():
    stored = np.random.default_rng(2).integers(0, 4096, (33, 47)).astype(np.uint16)
    ds = packed(
        dicom_dataset(stored, bits=12), JPEGLSNearLossless, imagecodecs.jpegls_encode(stored, level=3)
    )
    assert 0 < np.abs(decode_frame(ds, 0).astype(int) - stored).max() <= 3


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_a_truncated_stream_or_one_of_another_size_is_refused(syntax):
    stored = np.random.default_rng(3).integers(0, 4096, (33, 47)).astype(np.uint16)

    def coded(values: np.ndarray) -> bytes:
        if syntax in (JPEGLSLossless, JPEGLSNearLossless):
            return imagecodecs.jpegls_encode(values)
        return imagecodecs.jpeg8_encode(values, lossless=True)

    stream = coded(stored)
    assert read_image(encode(packed(dicom_dataset(stored, bits=12), syntax, stream))).pixels.shape == (33, 47)
    others = [stream[:cut] for cut in range(4, len(stream) - 2, 97)]
    for other in [*others, coded(stored[:32].copy()), coded(stored.T.copy()), coded(np.tile(stored, (9, 9)))]:
        with pytest.raises(ValueError, match=r"^DICOM: damaged or truncated"):
            read_image(encode(packed(dicom_dataset(stored, bits=12), syntax, other)))


@pytest.mark.parametrize("has_offsets", [False, True])
@pytest.mark.parametrize("syntax", [*SYNTAXES, JPEGBaseline8Bit, JPEG2000Lossless, RLELossless])
def test_more_frames_than_the_header_claims_are_refused_and_one_in_several_fragments_is_read(
    syntax, has_offsets
):
    frames = [np.add.outer(np.arange(32), np.arange(48)).astype(np.uint8) + number for number in range(3)]

    def coded(values: np.ndarray) -> bytes:
        if syntax in (JPEGLSLossless, JPEGLSNearLossless):
            return imagecodecs.jpegls_encode(values)
        if syntax == JPEG2000Lossless:
            return imagecodecs.jpeg2k_encode(values, codecformat="J2K", level=0)
        if syntax == JPEGBaseline8Bit:
            return picture_bytes(values, "JPEG")
        if syntax == RLELossless:
            ds = dicom_dataset(values)
            ds.compress(RLELossless)
            return next(generate_frames(ds.PixelData, number_of_frames=1))
        return imagecodecs.jpeg8_encode(values, lossless=True)

    streams = [coded(values) for values in frames]
    ds = packed(dicom_dataset(frames[0]), syntax, streams[0])
    whole = read_image(encode(ds)).pixels
    if syntax != RLELossless:  # of which a frame is one fragment
        ds.PixelData = encapsulate([streams[0]], fragments_per_frame=3, has_bot=has_offsets)
        np.testing.assert_array_equal(read_image(encode(ds)).pixels, whole)
    ds.PixelData = encapsulate(streams, has_bot=has_offsets)
    for claimed in (None, 1, 2):
        ds.NumberOfFrames = claimed
        with pytest.raises(ValueError, match=f"its header claims {claimed or 1} frames, but 3 are there"):
            read_image(encode(ds), frame=1)
    ds.NumberOfFrames = 3
    np.testing.assert_array_equal(read_image(encode(ds), frame=1).pixels, whole)


def refusals(files: list[bytes]) -> int:
    """How many of the files are refused."""
    number = 0
    for data in files:
        try:
            read_image(data)
        except ValueError:
            number += 1
    return number


def test_damaged_streams_of_any_kind_are_refused_or_read_and_end_no_process():
    """GDCM throws through C++ into nothing, or writes where it must not: the process is gone, and a worker with it."""
    rng = np.random.default_rng(0)
    gray = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    streams = (
        picture_bytes(gray, "JPEG"),
        picture_bytes(gray, "JPEG", progressive=True),
        imagecodecs.jpeg8_encode(gray, lossless=True),
        imagecodecs.jpegls_encode(gray),
    )
    files = []
    for syntax in SYNTAXES:
        for stream in streams:
            for _ in range(60):
                damaged = bytearray(stream)
                for at in rng.integers(2, min(len(stream), 700), rng.integers(1, 6)):
                    damaged[at] = rng.integers(256)
                files.append(encode(packed(dicom_dataset(gray), syntax, bytes(damaged))))
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
        refused = alone.submit(refusals, files).result()
    assert len(files) / 2 < refused < len(files)
