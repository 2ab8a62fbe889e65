"""Reading: right pixels and geometry from every format, one clear line for the rest, never an identifier."""

import io
import logging
import struct
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from pathlib import Path

import gdcm
import imagecodecs
import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.datadict import tag_for_keyword
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.pixels.decoders.base import get_decoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    JPEG2000,
    ComputedRadiographyImageStorage,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)
from scipy.fft import idctn

from cadx.reading import images
from cadx.reading.codecs import decode_frame
from cadx.reading.dicom import dicom_identifiers
from cadx.reading.images import read_arrays, read_image, read_png_indices
from cadx.reading.source import MAX_PIXELS, sniff

NAME = "Ignatowska^Bronislawa"
OF_GDCM = {
    JPEGLossless: gdcm.TransferSyntax.JPEGLosslessProcess14,
    JPEGLosslessSV1: gdcm.TransferSyntax.JPEGLosslessProcess14_1,
    JPEGLSLossless: gdcm.TransferSyntax.JPEGLSLossless,
}


def dicom_dataset(stored: np.ndarray, *, bits: int | None = None, **elements: object) -> Dataset:
    """A minimal gray DICOM dataset with `stored` as its stored values."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = ComputedRadiographyImageStorage
    meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds = Dataset()
    ds.file_meta = meta
    ds.SOPClassUID, ds.SOPInstanceUID = ComputedRadiographyImageStorage, "1.2.3.4"
    ds.Rows, ds.Columns = stored.shape[:2]
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = 8 * stored.itemsize
    ds.BitsStored = bits or ds.BitsAllocated
    ds.HighBit = ds.BitsStored - 1
    ds.PixelRepresentation = int(stored.dtype.kind == "i")
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OB" if stored.itemsize == 1 else "OW"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
    return ds


def encode(ds: Dataset) -> bytes:
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def coded_by_gdcm(ds: Dataset, syntax: str, folder: Path) -> Dataset:
    """The same dataset, its pixels packed by GDCM."""
    plain, coded = folder / "plain.dcm", folder / "coded.dcm"
    plain.write_bytes(encode(ds))
    reader, change, writer = gdcm.ImageReader(), gdcm.ImageChangeTransferSyntax(), gdcm.ImageWriter()
    reader.SetFileName(str(plain))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(OF_GDCM[syntax]))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(coded))
    assert writer.Write()
    found = pydicom.dcmread(coded)
    assert found.file_meta.TransferSyntaxUID == syntax
    return found


def dicom_bytes(stored: np.ndarray, **elements: object) -> bytes:
    return encode(dicom_dataset(stored, **elements))


def picture_bytes(pixels: np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def ramp12() -> np.ndarray:
    """Every 12-bit value once, 64 x 64."""
    return np.arange(4096, dtype=np.uint16).reshape(64, 64)


# --- DICOM: pixels ------------------------------------------------------------------------------------


def test_monochrome1_twin_reads_equal_to_its_monochrome2_original(ramp12):
    original = read_image(dicom_bytes(ramp12, bits=12, WindowCenter=1800, WindowWidth=1500))
    twin = read_image(
        dicom_bytes(
            4095 - ramp12, bits=12, PhotometricInterpretation="MONOCHROME1",
            WindowCenter=4095 - 1800 + 1, WindowWidth=1500,  # a window is centred at c - 0.5
        )
    )  # fmt: skip
    np.testing.assert_array_equal(twin.pixels, original.pixels)
    gray = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    inverse = dicom_bytes(255 - gray, PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(read_image(inverse).pixels, gray)


def test_mirror_pair_that_differs_in_its_photometric_interpretation_only(mirror):
    # The two files hold the same JPEG stream under MONOCHROME2 and MONOCHROME1, so the standard makes one
    # the negative of the other; a reader that finds them equal ignores the tag.
    one = mirror / "dicom_ct/1.2.276.0.7230010.3.1.4.8323329.6904.1517875201.850819.dcm"
    other = mirror / "dicom_ct/Fake_MONOHR1.dcm"
    assert pydicom.dcmread(one).PixelData == pydicom.dcmread(other).PixelData
    image, negative = read_image(one), read_image(other)
    np.testing.assert_array_equal(image.pixels, 255 - negative.pixels)
    lungs, spine = image.pixels[400:500, 250:350].mean(), image.pixels[400:500, 490:530].mean()
    assert lungs < spine, "air must be darker than bone"
    assert image.spacing_mm == (0.168, 0.168)
    assert image.attributes == {"sex": "M", "age": 62.0, "view": "PA"}
    assert "PatientAge without a unit was taken for years" in image.assumptions


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("signed", [False, True])
def test_window_equals_pydicom(ramp12, function, signed):
    stored = (ramp12.astype(np.int16) - 2048) if signed else ramp12
    ds = dicom_dataset(
        stored, bits=12, WindowCenter=["900", "0"], WindowWidth=["777", "1"], VOILUTFunction=function,
        RescaleSlope=2, RescaleIntercept=-1000,
    )  # fmt: skip
    image = read_image(encode(ds))
    reference = apply_windowing(apply_modality_lut(stored, ds), ds)
    low, high = (-2048, 2047) if signed else (0, 4095)
    unit = (reference - (2 * low - 1000)) / (2 * (high - low))
    assert image.pixels.dtype == np.uint16
    np.testing.assert_allclose(image.pixels / 65535, unit, atol=0.51 / 65535)
    assert "the first of 2 display windows was taken" in image.assumptions


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bits", range(8, 17))
def test_every_depth_of_8_to_16_bits_equals_pydicom(bits, signed):
    lowest = -(1 << bits - 1) if signed else 0
    values = np.linspace(lowest, lowest + (1 << bits) - 1, 4096).round().reshape(64, 64)
    stored = values.astype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    ds = dicom_dataset(
        stored, bits=bits, WindowCenter=str(lowest + (1 << bits - 1)), WindowWidth=str(1 << bits - 1)
    )
    image = read_image(encode(ds))
    reference = apply_windowing(stored, ds)
    unit = (reference - reference.min()) / (reference.max() - reference.min())
    top = np.iinfo(image.pixels.dtype).max
    assert image.pixels.dtype == (np.uint8 if bits == 8 else np.uint16)
    np.testing.assert_allclose(image.pixels / top, unit, atol=0.51 / top)


def test_a_modality_lookup_table_comes_before_the_window_as_in_pydicom(ramp12):
    entries = np.rint(np.sqrt(np.linspace(0, 1, 3000)) * 4000).astype(np.uint16)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [3000, 200, 16], entries.tolist()
    item.ModalityLUTType = "US"
    for keyword in ("LUTDescriptor", "LUTData"):
        item[keyword].VR = "US"
    window = {"WindowCenter": "2500", "WindowWidth": "1000", "VOILUTFunction": "LINEAR_EXACT"}
    ds = dicom_dataset(ramp12, bits=12, ModalityLUTSequence=Sequence([item]), **window)
    expected = np.clip((apply_modality_lut(ramp12, ds) - 2500.0) / 1000 + 0.5, 0, 1)
    np.testing.assert_allclose(read_image(encode(ds)).pixels / 65535, expected, atol=0.51 / 65535)


def test_twelve_bits_without_window_fill_the_range_and_say_so(ramp12):
    image = read_image(dicom_bytes(ramp12, bits=12))
    np.testing.assert_array_equal(image.pixels, np.rint(ramp12 / 4095 * 65535))
    assert any("no display window" in text for text in image.assumptions)


def test_window_of_width_one_is_a_threshold(ramp12):
    pixels = read_image(dicom_bytes(ramp12, bits=12, WindowCenter=100, WindowWidth=1)).pixels
    np.testing.assert_array_equal(pixels > 0, ramp12 > 99.5)


def test_bits_above_bits_stored_are_ignored(ramp12):
    with_overlay = ramp12 | np.uint16(0x8000)
    np.testing.assert_array_equal(
        read_image(dicom_bytes(with_overlay, bits=12)).pixels, read_image(dicom_bytes(ramp12, bits=12)).pixels
    )


@pytest.mark.parametrize("entry_bits", [8, 12])
def test_voi_lookup_table(ramp12, entry_bits):
    top = 2**entry_bits - 1
    entries = np.rint(np.linspace(0, 1, 1000) ** 2 * top).astype(np.uint16)
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [1000, 500, entry_bits], entries.tolist()
    for element in item:
        element.VR = "US"
    image = read_image(dicom_bytes(ramp12, bits=12, VOILUTSequence=Sequence([item])))
    expected = np.rint(entries[np.clip(ramp12.astype(int) - 500, 0, 999)] / top * 65535)
    np.testing.assert_array_equal(image.pixels, expected)


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize(
    ("syntax", "vr"),
    [(ImplicitVRLittleEndian, "SS"), (ExplicitVRLittleEndian, "SS"), (ExplicitVRLittleEndian, "US")],
)
def test_a_voi_lookup_table_starts_below_zero_where_rescaled_values_do(ramp12, syntax, vr, signed):
    """Implicit VR writes no sign: readers give the table that of the stored pixels, which are not what it looks up."""
    entries = np.rint(np.linspace(0, 1, 2000) ** 2 * 4095).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", vr, [2000, -1024 if vr == "SS" else 64512, 12])
    item.add_new("LUTData", "OW", entries.tobytes())
    stored = ramp12.astype(np.int16) - 2048 if signed else ramp12
    ds = dicom_dataset(
        stored, bits=12, RescaleSlope=1, RescaleIntercept=1024 if signed else -1024, VOILUTSequence=[item]
    )
    ds.file_meta.TransferSyntaxUID = syntax
    expected = np.rint(entries[np.clip(ramp12.astype(int), 0, 1999)] / 4095 * 65535)
    np.testing.assert_array_equal(read_image(encode(ds)).pixels, expected)


def test_a_lookup_table_may_start_high_where_no_value_is_negative():
    stored = np.arange(39_000, 41_000, dtype=np.uint16).reshape(40, 50)
    entries = np.linspace(0, 4095, 1000).astype(np.uint16)
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [1000, 40_000, 12])
    item.add_new("LUTData", "OW", entries.tobytes())
    expected = np.rint(entries[np.clip(stored.astype(int) - 40_000, 0, 999)] / 4095 * 65535)
    pixels = read_image(dicom_bytes(stored, VOILUTSequence=[item])).pixels
    np.testing.assert_array_equal(pixels, expected)


def test_padding_outside_the_collimator_is_black_even_in_monochrome1():
    stored = np.array([[0, 10, 255]], dtype=np.uint8)
    data = dicom_bytes(stored, PhotometricInterpretation="MONOCHROME1", PixelPaddingValue=0)
    assert read_image(data).pixels.tolist() == [[0, 245, 0]]


@pytest.mark.parametrize(("padding", "limit"), [(63536, 63537), (-2000, -1999), (-32768, -1999)])
def test_padding_of_signed_pixels_is_black_however_its_number_is_typed(padding, limit):
    stored = np.array([[-2000, -1999, -500, 1500]], dtype=np.int16)
    ds = dicom_dataset(stored, bits=16, PhotometricInterpretation="MONOCHROME1")
    for keyword, value in (("PixelPaddingValue", padding), ("PixelPaddingRangeLimit", limit)):
        ds.add(DataElement(tag_for_keyword(keyword), "US" if value > 0 else "SS", value))
    pixels = read_image(encode(ds)).pixels
    assert pixels[0, :2].tolist() == [0, 0]
    assert pixels[0, 2] > pixels[0, 3] > 0


@pytest.mark.parametrize(
    "file",
    [
        "MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_jpeg_ls_lossless.dcm",
        "MR_small_bigendian.dcm", "MR_small_implicit.dcm",
    ],
)  # fmt: skip
def test_transfer_syntaxes_give_the_uncompressed_pixels(file):
    plain = read_image(Path(get_testdata_file("MR_small.dcm", download=False)))
    coded = read_image(Path(get_testdata_file(file, download=False)))
    np.testing.assert_array_equal(coded.pixels, plain.pixels)


def test_rle_of_our_own(ramp12):
    ds = dicom_dataset(ramp12, bits=12)
    plain = read_image(encode(ds)).pixels
    ds.compress(RLELossless)
    np.testing.assert_array_equal(read_image(encode(ds)).pixels, plain)


def test_rle_that_is_not_whole_is_refused_though_its_decoder_takes_it():
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), np.uint8) // 64 * 64
    ds = dicom_dataset(pixels)
    ds.compress(RLELossless)
    whole = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
    controls, at = [], 64
    while at < len(whole) - 1:
        controls.append(at)
        at += 2 if whole[at] > 128 else 2 + whole[at]
    longer = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in controls[:40]]
    reasons = []
    for damaged in (*longer, whole[:-8], whole + b"\x03abcd", whole[:64] + whole[66:]):
        ds.PixelData = pydicom.encaps.encapsulate([damaged])
        try:
            read_image(encode(ds))
        except ValueError as error:
            reasons.append(str(error))
    # One flipped bit leaves a stream that happens to fit: another valid image.
    assert len(reasons) == len(longer) + 2
    assert {reason.partition(":")[2].partition(";")[0] for reason in reasons} == {
        " damaged or truncated: its RLE data are not those of a whole image"
    }
    ds.PixelData = pydicom.encaps.encapsulate([whole + b"\0\0\0\0"])
    np.testing.assert_array_equal(read_image(encode(ds)).pixels, pixels)


def test_jpeg_baseline_in_dicom_reads_as_the_jpeg_itself():
    gray = np.add.outer(np.arange(64), np.arange(64)).astype(np.uint8)
    jpeg = picture_bytes(gray, "JPEG", quality=90)
    ds = dicom_dataset(gray)
    ds.file_meta.TransferSyntaxUID = pydicom.uid.JPEGBaseline8Bit
    ds.PixelData = pydicom.encaps.encapsulate([jpeg])
    np.testing.assert_array_equal(read_image(encode(ds)).pixels, read_image(jpeg).pixels)


def test_lossless_jpeg_the_archives_commonest_form_gives_the_uncompressed_pixels(ramp12, tmp_path):
    ds = dicom_dataset(ramp12, bits=12, WindowCenter="1800", WindowWidth="1500")
    packed = coded_by_gdcm(ds, JPEGLosslessSV1, tmp_path)
    np.testing.assert_array_equal(read_image(encode(packed)).pixels, read_image(encode(ds)).pixels)


@pytest.mark.parametrize("file", ["693_J2KI.dcm", "JPEG2000.dcm"])
def test_lossy_jpeg_2000_reads_as_another_decoder_reads_it(file):
    path = Path(get_testdata_file(file, download=False))
    ds = pydicom.dcmread(path)
    stored, _ = get_decoder(ds.file_meta.TransferSyntaxUID).as_array(ds, raw=True, decoding_plugin="gdcm")
    ds.decompress(decoding_plugin="gdcm", generate_instance_uid=False)
    assert stored.min() < stored.max()
    np.testing.assert_array_equal(read_image(path).pixels, read_image(encode(ds)).pixels)


def test_colour_jpeg_2000_that_pillow_refuses_reads_as_another_decoder_reads_it():
    path = Path(get_testdata_file("GDCMJ2K_TextGBR.dcm", download=False))
    ds = pydicom.dcmread(path)
    by_gdcm, _ = get_decoder(ds.file_meta.TransferSyntaxUID).as_array(ds, decoding_plugin="gdcm")
    assert by_gdcm.shape == (400, 400, 3)
    np.testing.assert_array_equal(read_image(path).pixels, by_gdcm)


def test_jpeg_of_12_bits_reads_as_what_was_encoded_and_never_when_truncated():
    rows, columns = np.mgrid[:64, :80]
    stored = (2000 + 1500 * np.sin(rows / 9) * np.cos(columns / 11)).astype(np.uint16)
    stream = imagecodecs.jpeg8_encode(stored, level=100, bitspersample=12)
    ds = dicom_dataset(stored, bits=12, RescaleSlope=1, RescaleIntercept=0)
    plain = read_image(encode(ds)).pixels
    ds.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    ds.PixelData = pydicom.encaps.encapsulate([stream])
    coded = read_image(encode(ds)).pixels
    step = 65535 / 4095  # of the stored values, in those of the image
    assert np.abs(coded.astype(float) - plain).max() < 3 * step, (
        "quantisation by 1 is off by at most 3 of 4096"
    )
    ds.PixelData = pydicom.encaps.encapsulate([stream[: len(stream) // 2]])
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_image(encode(ds))


def decode_gray_jpeg(stream: bytes) -> np.ndarray:
    """A sequential JPEG of one component by the letter of ITU-T T.81, without restarts: F.2.2 and A.3.3."""
    zigzag = sorted(np.ndindex(8, 8), key=lambda at: (sum(at), at[sum(at) % 2 == 0]))
    tables: dict[int, np.ndarray] = {}
    codes: dict[int, dict[tuple[int, int], int]] = {}
    at = 2
    while True:
        marker, length = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4])
        body, at = stream[at + 4 : at + 2 + length], at + 2 + length
        if marker == 0xDB:
            assert (len(body), body[0] >> 4) == (65, 0)
            tables[body[0]] = np.frombuffer(body[1:], np.uint8).astype(float)
        elif marker == 0xC4:
            while body:
                counts, values = body[1:17], iter(body[17:])
                code, table = 0, codes.setdefault(body[0], {})
                for bits, count in enumerate(counts, start=1):
                    for _ in range(count):
                        table[bits, code] = next(values)
                        code += 1
                    code <<= 1
                body = body[17 + sum(counts) :]
        elif marker == 0xC1:
            precision, height, width = body[0], int.from_bytes(body[1:3]), int.from_bytes(body[3:5])
            quantisation = body[8]
        elif marker == 0xDA:
            break
    bits = iter("".join(f"{byte:08b}" for byte in stream[at:].replace(b"\xff\x00", b"\xff")))
    dc_codes, ac_codes = codes[body[2] >> 4], codes[0x10 | (body[2] & 15)]

    def symbol(table: dict[tuple[int, int], int]) -> int:
        code, length = int(next(bits)), 1
        while (length, code) not in table:
            code, length = code << 1 | int(next(bits)), length + 1
        return table[length, code]

    def number(size: int) -> int:
        value = int("0" + "".join(next(bits) for _ in range(size)), 2)
        return value if not size or value >> (size - 1) else value - (1 << size) + 1

    pixels, dc = np.zeros((height, width)), 0
    for row, column in np.ndindex(height // 8, width // 8):
        block = np.zeros((8, 8))
        dc += number(symbol(dc_codes))
        block[0, 0] = dc * tables[quantisation][0]
        place = 1
        while place < 64 and (run_size := symbol(ac_codes)):
            place += run_size >> 4
            block[zigzag[place]] = number(run_size & 15) * tables[quantisation][place]
            place += 1
        pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = idctn(block, norm="ortho")
    return np.clip(np.rint(pixels + (1 << (precision - 1))), 0, (1 << precision) - 1)


def test_jpeg_of_12_bits_made_elsewhere_reads_as_the_standard_decodes_it():
    ds = pydicom.dcmread(Path(get_testdata_file("JPGExtended.dcm", download=False)))
    expected = decode_gray_jpeg(pydicom.encaps.get_frame(ds.PixelData, 0, number_of_frames=1))
    assert expected.shape == (1024, 256)
    assert expected.max() > 255, "more than 8 bits are in use"
    found = decode_frame(ds, 0).astype(int)
    assert np.abs(found - expected).max() <= 1, "decoders may round the cosine transform differently"


@pytest.mark.parametrize("syntax", [JPEG2000, JPEGExtended12Bit])
def test_a_stream_of_another_size_than_its_header_says_is_refused(syntax):
    stored = np.full((600, 900), 77, np.uint16)
    stream = (
        imagecodecs.jpeg2k_encode(stored, codecformat="J2K", bitspersample=12)
        if syntax == JPEG2000
        else imagecodecs.jpeg8_encode(stored, bitspersample=12)
    )
    ds = dicom_dataset(stored[:32, :32].copy(), bits=12)
    ds.file_meta.TransferSyntaxUID = syntax
    ds.PixelData = pydicom.encaps.encapsulate([stream])
    with pytest.raises(ValueError, match=r"^DICOM: "):
        read_image(encode(ds))


@pytest.mark.parametrize("shape", [(31, 33), (32, 33), (33, 20)])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_zeros_behind_the_pixels_are_padding_if_fewer_than_a_row_and_a_column_have(shape, dtype):
    stored = np.random.default_rng(0).integers(1, 256, shape).astype(dtype)
    whole = read_image(dicom_bytes(stored)).pixels
    most = min(shape) * stored.itemsize
    ds = dicom_dataset(stored)
    ds.PixelData = stored.tobytes() + bytes(most - 2)
    np.testing.assert_array_equal(read_image(encode(ds)).pixels, whole)
    for tail in (bytes(most), bytes(most - 4) + b"\1\0"):
        ds.PixelData = stored.tobytes() + tail
        with pytest.raises(ValueError, match=f"its header claims {stored.nbytes} bytes of pixels, but "):
            read_image(encode(ds))


def test_colour_dicom_is_rgb_and_collapses_where_it_is_gray():
    rgb = read_image(Path(get_testdata_file("SC_ybr_full_422_uncompressed.dcm", download=False)))
    assert rgb.pixels.shape == (100, 100, 3)
    assert rgb.pixels[5, 5].tolist() == [254, 0, 0], "the picture begins with red"
    gray = np.arange(48, dtype=np.uint8).reshape(6, 8)
    colour = {"SamplesPerPixel": 3, "PhotometricInterpretation": "RGB", "PlanarConfiguration": 0}
    data = dicom_bytes(np.repeat(gray[..., None], 3, axis=2), **colour)
    np.testing.assert_array_equal(read_image(data).pixels, gray)


# --- DICOM: what it says ------------------------------------------------------------------------------


def test_attributes_and_geometry():
    image = read_image(
        dicom_bytes(
            np.zeros((4, 4), np.uint8), InstitutionName="Alder Valley", Manufacturer="Kestrel",
            ManufacturerModelName="Lumen 7", PatientAge="006M", PatientSex="F", ViewPosition="AP",
            PatientID="4711", PatientBirthDate="19500101", ImagerPixelSpacing=["0.2", "0.3"],
        )
    )  # fmt: skip
    expected = {"site": "Alder Valley", "scanner": "Kestrel Lumen 7", "age": 0.5, "sex": "F", "view": "AP"}
    assert image.attributes == expected
    assert image.patient == "4711"
    assert "4711" not in repr(image)
    assert image.spacing_mm == (0.2, 0.3)
    assert any("ImagerPixelSpacing" in text for text in image.assumptions)


def test_age_is_never_computed_from_the_birth_date():
    image = read_image(
        dicom_bytes(np.zeros((4, 4), np.uint8), PatientBirthDate="19500101", StudyDate="20200101")
    )
    assert "age" not in image.attributes


@pytest.mark.parametrize("spacing", [["0", "0.1"], ["-1", "1"]])
def test_impossible_spacing_is_unknown(spacing):
    assert read_image(dicom_bytes(np.zeros((4, 4), np.uint8), PixelSpacing=spacing)).spacing_mm is None


def test_identifiers_of_the_mirror_series_are_found(mirror):
    for file in (mirror / "dicom_ct/tcia_PGBM-003").rglob("*.dcm"):
        found = dicom_identifiers(file)
        # The first series says PatientIdentityRemoved = YES, and still carries a name.
        assert {"PatientName", "AccessionNumber"} <= set(found)
        assert not any("Dumbledore" in keyword for keyword in found)


def test_identifiers_need_a_value_and_are_found_at_any_depth():
    pixels = np.zeros((4, 4), np.uint8)
    clean = {"PatientName": "", "PatientID": "P7", "PatientIdentityRemoved": "YES", "AccessionNumber": " "}
    assert dicom_identifiers(dicom_bytes(pixels, **clean)) == ()
    assert dicom_identifiers(dicom_bytes(pixels, PatientID="P7")) == ("PatientID",)
    assert dicom_identifiers(dicom_bytes(pixels, BurnedInAnnotation="YES")) == ("BurnedInAnnotation",)
    inner = Dataset()
    inner.ScheduledPerformingPhysicianName = NAME
    nested = dicom_bytes(pixels, ScheduledProcedureStepSequence=Sequence([inner]))
    assert dicom_identifiers(nested) == ("ScheduledPerformingPhysicianName",)
    assert dicom_identifiers(picture_bytes(pixels)) == ()


@pytest.mark.parametrize(
    ("value", "is_found"),
    [
        ("YES", True), ("yes", True), (" Yes ", True), ("Y", True), ("TRUE", True), ("YES\0", True),
        (["NO", "YES"], True), ("NO", False), ("no", False), ("No ", False), ("NO\0\0", False), ("", False),
        (None, False),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_only_a_clear_no_says_that_nothing_is_burned_in(value, is_found):
    found = dicom_identifiers(dicom_bytes(np.zeros((4, 4), np.uint8), BurnedInAnnotation=value))
    assert found == (("BurnedInAnnotation",) if is_found else ())


@pytest.mark.parametrize(
    ("value", "is_removed"), [("YES", True), ("Yes ", True), ("Y", False), ("NO", False)]
)
@pytest.mark.filterwarnings("ignore:Invalid value for VR CS")
def test_only_a_clear_yes_makes_an_id_a_pseudonym(value, is_removed):
    data = dicom_bytes(np.zeros((4, 4), np.uint8), PatientID="P7", PatientIdentityRemoved=value)
    assert dicom_identifiers(data) == (() if is_removed else ("PatientID",))


def test_no_message_warning_or_log_line_repeats_a_name(caplog, capfd):
    """Each fault makes pydicom say something, and some of it quotes values."""
    caplog.set_level(logging.DEBUG)
    pixels = np.zeros((16, 16), np.uint8)
    said: list[str] = []
    name = NAME.encode()
    whole = dicom_bytes(pixels, PatientName=NAME, PatientID=NAME, WindowCenter="1", WindowWidth="2")
    broken = [whole[:cut] for cut in range(140, len(whole), 37)]
    broken.append(whole.replace(name, b"\xff\xfe" + name[2:]))
    broken.append(whole.replace(b"MONOCHROME2 ", name[:12]))
    for keyword in (
        "InstanceNumber",
        "WindowCenter",
        "PatientAge",
        "NumberOfFrames",
        "StudyInstanceUID",
        "StudyDate",
    ):
        # Written as text, then given the representation that the standard demands and the value breaks.
        ds = dicom_dataset(pixels, WindowWidth="5")
        ds[keyword] = pydicom.DataElement(keyword, "LO", NAME)
        data, vr = encode(ds), pydicom.datadict.dictionary_VR(ds[keyword].tag).encode()
        at = data.index(name)
        broken.append(data[: at - 4] + vr + data[at - 2 :])
    caplog.clear()
    capfd.readouterr()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for data in broken:
            for function in (read_image, dicom_identifiers):
                try:
                    function(data)
                except ValueError as error:
                    said.append(f"{error!s} {error!r} {error.__cause__} {error.__suppress_context__}")
    out, err = capfd.readouterr()
    said += [str(warning.message) for warning in caught] + [caplog.text, out, err]
    assert said
    for part in ("Ignatowska", "Bronislawa"):
        assert not any(part in text for text in said)


def test_threads_leave_the_warning_filters_as_they_were():
    before = list(warnings.filters)
    data = dicom_bytes(np.zeros((8, 8), np.uint8))
    threads = [threading.Thread(target=lambda: [read_image(data) for _ in range(30)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before


# --- PNG and JPEG -------------------------------------------------------------------------------------


def test_png_round_trips():
    rng = np.random.default_rng(1)
    for pixels in (
        rng.integers(0, 256, (7, 5), dtype=np.uint8),
        rng.integers(0, 65536, (7, 5), dtype=np.uint16),
        rng.integers(0, 256, (7, 5, 3), dtype=np.uint8),
    ):
        np.testing.assert_array_equal(read_image(picture_bytes(pixels)).pixels, pixels)


def test_gray_in_disguise_is_gray():
    gray = np.arange(40, dtype=np.uint8).reshape(5, 8)
    opaque = np.dstack([gray, gray, gray, np.full_like(gray, 255)])
    palette = io.BytesIO()
    Image.fromarray(gray).convert("P").save(palette, "PNG")
    for data in (picture_bytes(np.dstack([gray] * 3)), picture_bytes(opaque), palette.getvalue()):
        image = read_image(data)
        np.testing.assert_array_equal(image.pixels, gray)
        assert image.assumptions == ()


def test_transparency_lies_over_black_and_is_recorded():
    pixels = np.full((2, 2, 4), 200, np.uint8)
    pixels[0, 0, 3] = 0
    pixels[1:, :, 3] = 255
    image = read_image(picture_bytes(pixels))
    assert image.pixels[0, 0] == 0
    assert image.pixels[1, 1] == 200
    assert image.assumptions == ("transparent pixels were laid over black",)


def test_sixteen_bit_gray_keeps_its_bits_where_one_value_is_marked_transparent():
    pixels = np.array([[0, 300], [4096, 65535]], np.uint16)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG", transparency=300)
    image = read_image(stream.getvalue())
    np.testing.assert_array_equal(image.pixels, pixels)
    assert image.assumptions == ()


def test_one_bit_png_is_black_and_white():
    stream = io.BytesIO()
    Image.fromarray(np.eye(4, dtype=bool)).save(stream, "PNG")
    np.testing.assert_array_equal(read_image(stream.getvalue()).pixels, np.eye(4) * 255)


def png_of(header: bytes, rows: bytes) -> bytes:
    """A PNG whose checksums all fit, whatever it claims."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body


@pytest.mark.parametrize("interlaced", [0, 1])
@pytest.mark.parametrize(("colour", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_a_png_with_fewer_pixels_than_it_claims_is_refused_and_not_filled_with_black(
    tmp_path, colour, channels, interlaced
):
    width_px, height_px = 21, 19
    header = struct.pack(">IIBBBBB", width_px, height_px, 8, colour, 0, 0, interlaced)
    passes = [(19, 21)]
    if interlaced:  # counted by hand
        passes = [(3, 3), (3, 3), (2, 6), (5, 5), (5, 11), (10, 10), (9, 21)]
    rows = b"".join((b"\0" + b"\x80" * (columns * channels)) * count for count, columns in passes)
    assert read_image(png_of(header, rows)).pixels.shape[:2] == (height_px, width_px)
    file = tmp_path / "mask.png"
    for missing in (1, passes[-1][1] * channels + 1, len(rows) // 2):
        file.write_bytes(png_of(header, rows[:-missing]))
        for read in (read_image, read_png_indices):
            with pytest.raises(ValueError, match="PNG: fewer pixels than its header claims"):
                read(file)


def test_no_bit_of_a_png_can_change_a_pixel_unseen():
    rng = np.random.default_rng(0)
    ramp = np.add.outer(np.arange(256), np.arange(256)).astype(np.uint8) // 2
    noisy = ramp + rng.integers(0, 3, ramp.shape, dtype=np.uint8)
    data = picture_bytes(noisy)
    for _ in range(1500):
        damaged = bytearray(data)
        damaged[int(rng.integers(8, len(data)))] ^= 1 << int(rng.integers(8))
        with pytest.raises(ValueError, match=r"^PNG: [^\n]*$"):
            read_image(bytes(damaged))


def test_a_picture_that_is_to_be_turned_is_refused_since_boxes_and_viewers_may_disagree_with_its_pixels():
    gray = np.arange(40, dtype=np.uint8).reshape(5, 8)
    for kind in ("PNG", "JPEG"):
        for orientation in range(1, 9):
            exif = Image.Exif()
            exif[0x0112] = orientation
            data = picture_bytes(gray, kind, exif=exif)
            if orientation == 1:
                assert read_image(data).pixels.shape == gray.shape
                continue
            with pytest.raises(ValueError, match=f"{kind}: its EXIF orientation .*; save it upright"):
                read_image(data)
    damaged = picture_bytes(gray, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert read_image(damaged).pixels.shape == gray.shape, "what nobody can read turns nothing"


def test_cmyk_is_refused():
    stream = io.BytesIO()
    Image.new("CMYK", (4, 4)).save(stream, "JPEG")
    with pytest.raises(ValueError, match="JPEG: colour mode CMYK"):
        read_image(stream.getvalue())


# --- Bad input ----------------------------------------------------------------------------------------


def png_of_size(side_px: int) -> bytes:
    """A PNG whose header claims this size, with its right checksum."""
    data = picture_bytes(np.zeros((4, 4), np.uint8))
    header = data[12:16] + struct.pack(">II", side_px, side_px) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


GRAY = np.random.default_rng(2).integers(0, 256, (40, 40), dtype=np.uint8)
BAD = {
    "empty file": (b"", "an empty file"),
    "text named .dcm": (b"PatientName: Somebody\n" * 20, "neither DICOM, PNG nor JPEG"),
    "truncated DICOM": (dicom_bytes(GRAY)[:-700], "DICOM: damaged or truncated"),
    "DICOM cut in its header": (dicom_bytes(GRAY)[:400], "DICOM: "),
    "truncated PNG": (picture_bytes(GRAY)[:-900], "PNG: damaged or truncated"),
    "truncated JPEG": (picture_bytes(GRAY, "JPEG")[:-300], "JPEG: damaged or truncated"),
    "no rows": (dicom_bytes(GRAY, Rows=0), "an empty image"),
    "huge PNG": (png_of_size(20_000), "PNG: claims more than twice the limit"),
    "huge DICOM": (dicom_bytes(GRAY, Rows=60000, Columns=60000), f"over the limit of {MAX_PIXELS}"),
    "several frames": (dicom_bytes(GRAY, NumberOfFrames="2", PixelData=GRAY.tobytes() * 2), "several frames"),
    "palette": (dicom_bytes(GRAY, PhotometricInterpretation="PALETTE COLOR"), "PhotometricInterpretation"),
    "wrong high bit": (dicom_bytes(GRAY.astype(np.uint16), bits=12, HighBit=15), "HighBit"),
    "no window width": (dicom_bytes(GRAY, WindowCenter="1", WindowWidth="0"), "WindowWidth"),
    "flat rescale": (dicom_bytes(GRAY, RescaleSlope="0", RescaleIntercept="1"), "RescaleSlope"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_that_says_why(case, tmp_path):
    data, reason = BAD[case]
    file = tmp_path / "Ignatowska_Bronislawa.dcm"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=reason) as caught:
        read_image(file)
    assert "\n" not in str(caught.value)
    assert "Ignatowska" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ValueError, match="no such image file"):
        read_image(tmp_path / "absent.dcm")
    with pytest.raises(ValueError, match="cannot be read"):
        read_image(tmp_path)


@pytest.mark.parametrize(
    "file",
    ["image_dfl.dcm", "rtdose_1frame.dcm", "test-SR.dcm", "MR_truncated.dcm", "badVR.dcm"],
)
def test_dicom_that_is_no_plain_image_is_refused(file):
    with pytest.raises(ValueError, match=r"^DICOM: "):
        read_image(Path(get_testdata_file(file, download=False)))


def test_corrupted_files_give_an_image_or_a_value_error():
    rng = np.random.default_rng(3)
    sources = [dicom_bytes(GRAY, PatientName=NAME), picture_bytes(GRAY), picture_bytes(GRAY, "JPEG")]
    names = (
        "MR_small_RLE.dcm",
        "MR_small_jp2klossless.dcm",
        "MR_small_jpeg_ls_lossless.dcm",
        "SC_rgb_jpeg_gdcm.dcm",
    )
    sources += [Path(get_testdata_file(name, download=False)).read_bytes() for name in names]
    refused = 0
    for data in sources:
        for _ in range(25):
            damaged = bytearray(data)
            for at in rng.integers(8, len(data), rng.integers(1, 20)):
                damaged[at] = rng.integers(256)
            if rng.random() < 0.3:
                del damaged[rng.integers(1, len(damaged)) :]
            try:
                image = read_image(bytes(damaged))
                assert image.pixels.dtype in (np.uint8, np.uint16)
                dicom_identifiers(bytes(damaged))
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017  both outcomes are allowed
                refused += 1
    assert refused > 20


# --- Sniffing and arrays ------------------------------------------------------------------------------


def test_the_first_bytes_decide_not_the_name(tmp_path):
    file = tmp_path / "x.dcm"
    file.write_bytes(picture_bytes(GRAY))
    np.testing.assert_array_equal(read_image(file).pixels, GRAY)
    assert sniff(dicom_bytes(GRAY)[:132]) == "DICOM"


def test_arrays(tmp_path):
    np.savez_compressed(tmp_path / "a.npz", train_images=GRAY[None])
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["train_images"], GRAY[None])
    np.savez(tmp_path / "objects.npz", train_images=np.array([{"a": 1}], dtype=object))
    (tmp_path / "text.npz").write_text("no archive")
    whole = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "bytes.npz", "w") as archive:
        archive.writestr("train_images.npy", b"no array")
    for name in ("objects.npz", "text.npz", "cut.npz", "absent.npz", "bytes.npz"):
        with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
            read_arrays(tmp_path / name)


def write_planes(path: Path, claimed: int, held: int) -> bytes:
    """An archive of one array of `claimed` zero planes of 1 MB, by its header, which holds `held`; its bytes."""
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
        archive.open("train_images.npy", "w") as stream,
    ):
        form = {"descr": "|u1", "fortran_order": False, "shape": (claimed, 1000, 1000)}
        np.lib.format.write_array_header_1_0(stream, form)
        for _ in range(held):
            stream.write(bytes(1_000_000))
    return path.read_bytes()


@pytest.mark.parametrize("is_forged", [False, True])
def test_a_large_array_of_another_size_than_it_claims_is_refused_in_little_memory(tmp_path, is_forged):
    path = tmp_path / "bomb.npz"
    data = write_planes(path, 160, 159)
    if is_forged:  # the archive's table of contents claims what the array's header claims
        place = data.rindex(b"PK\x01\x02") + 24
        assert struct.unpack_from("<I", data, place) == (159_000_128,)
        path.write_bytes(data[:place] + struct.pack("<I", 160_000_128) + data[place + 4 :])
    tracemalloc.start()
    with pytest.raises(
        ValueError, match=r"^bomb.npz: 'train_images.npy' takes 159000128 bytes where its head"
    ):
        read_arrays(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20e6
    for claimed in (158, 1 << 40):
        write_planes(path, claimed, 1)
        with pytest.raises(ValueError, match=r"^bomb.npz: 'train_images.npy' takes 1000128 bytes where"):
            read_arrays(path)


def test_whole_arrays_read_alike_whether_they_are_counted_first_or_not(tmp_path, monkeypatch):
    zeros, noise = np.zeros((64, 64, 64), "<i2"), np.random.default_rng(0).random((9, 20, 30)).T
    fields = np.array([(1, 2.5)], [("größe", "i4"), ("b", "f8")])  # version 3 of the form
    arrays = {"zeros": zeros, "noise": noise, "fields": fields, "empty": np.zeros((0, 3)), "one": np.array(7)}
    np.savez_compressed(tmp_path / "a.npz", **arrays)
    for trusted_bytes in (1 << 27, 0):
        monkeypatch.setattr(images, "_TRUSTED_BYTES", trusted_bytes)
        found = read_arrays(tmp_path / "a.npz")
        assert found.keys() == arrays.keys()
        for name, array in arrays.items():
            assert found[name].dtype == array.dtype
            np.testing.assert_array_equal(found[name], array)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_array_that_claims_less_than_it_holds_is_refused_and_its_checksum_is_not_passed_over(
    tmp_path, save
):
    whole = np.random.default_rng(0).integers(0, 256, (512, 2048), dtype=np.uint8)
    save(tmp_path / "a.npz", train_images=whole)
    np.testing.assert_array_equal(read_arrays(tmp_path / "a.npz")["train_images"], whole)
    stream = io.BytesIO()
    np.lib.format.write_array(stream, whole)
    content = stream.getvalue()
    packing = zipfile.ZIP_STORED if save is np.savez else zipfile.ZIP_DEFLATED
    for claim in (b"(112, 2048)", b"(512, 0048)", b"(512, 2008)"):
        with zipfile.ZipFile(tmp_path / "less.npz", "w", packing) as archive:
            archive.writestr("train_images.npy", content.replace(b"(512, 2048)", claim))
        with pytest.raises(ValueError, match=r"^less.npz: [^\n]*$"):
            read_arrays(tmp_path / "less.npz")
    if save is np.savez:  # the header stands in the file as it is: one flipped bit of it
        data = (tmp_path / "a.npz").read_bytes()
        (tmp_path / "flipped.npz").write_bytes(data.replace(b"(512, 2048)", b"(412, 2048)"))
        with pytest.raises(ValueError, match=r"^flipped.npz: [^\n]*$"):
            read_arrays(tmp_path / "flipped.npz")
