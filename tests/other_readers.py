"""What is in a file by readers that cadx does not use for it: whether what was answered was a valid image.

DICOM by GDCM's own parser and decoders, JPEG 2000 in it by Pillow, shown by pydicom's functions; PNG by libpng and JPEG
by libjpeg-turbo (both in imagecodecs); NIfTI by nibabel's own array; a slide by Pillow's libtiff. For JPEG of 12 bits
no second decoder is at hand: it is decoded here, block by block.
"""

import gzip
import io
import tempfile
import zipfile
from pathlib import Path

import gdcm
import imagecodecs
import nibabel
import numpy as np
import pydicom
from PIL import Image
from pydicom.encaps import generate_frames
from pydicom.pixels import apply_modality_lut, apply_windowing
from pydicom.uid import JPEG2000, JPEG2000Lossless, JPEGExtended12Bit
from scipy.fft import idctn


def image_elsewhere(data: bytes) -> np.ndarray:
    """The pixels of a DICOM, PNG or JPEG file, H W or H W 3 uint8 or uint16, black = 0."""
    if data.startswith(b"\x89PNG"):
        return imagecodecs.png_decode(data)
    if data.startswith(b"\xff\xd8"):
        return imagecodecs.jpeg8_decode(data)
    header = pydicom.dcmread(io.BytesIO(data))
    stored = _stored(data, header)
    return stored if stored.ndim == 3 else _shown(stored, header)


def volume_elsewhere(data: bytes) -> np.ndarray:
    """The voxels of a NIfTI file, or of a zip of DICOM slices that lie one over the other, D H W = S, A, R."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            files = [archive.read(name) for name in archive.namelist()]
        headers = [pydicom.dcmread(io.BytesIO(file)) for file in files]
        planes = {
            float(header.ImagePositionPatient[2]): apply_modality_lut(_stored(file, header), header)
            for file, header in zip(files, headers, strict=True)
        }
        # Rows run to the back and columns to the left where ImageOrientationPatient is 1 0 0 0 1 0.
        return np.stack([planes[place] for place in sorted(planes)])[:, ::-1, ::-1]
    if data.startswith(b"\x1f\x8b"):
        data = gzip.decompress(data)
    if data[344:348] == b"n+1\0":
        image = nibabel.as_closest_canonical(nibabel.Nifti1Image.from_bytes(data))
        return image.get_fdata().transpose(2, 1, 0)
    header = pydicom.dcmread(io.BytesIO(data))
    return apply_modality_lut(_stored(data, header), header)[None, ::-1, ::-1]


def slide_elsewhere(path: Path) -> np.ndarray:
    """The pixels of a slide's finest level, H W 3."""
    with Image.open(path) as slide:
        return np.asarray(slide.convert("RGB"))


def _stored(data: bytes, header: pydicom.Dataset) -> np.ndarray:
    """The stored values of a DICOM file of one frame."""
    syntax = header.file_meta.TransferSyntaxUID
    if syntax == JPEGExtended12Bit:
        return decode_jpeg_12(next(generate_frames(header.PixelData, number_of_frames=1)))
    if syntax in (JPEG2000, JPEG2000Lossless):
        picture = Image.open(io.BytesIO(next(generate_frames(header.PixelData, number_of_frames=1))))
        # Pillow moves signed values up until they are none.
        return np.asarray(picture) - (np.int32(1 << 15) if header.PixelRepresentation else np.uint8(0))
    with tempfile.NamedTemporaryFile(suffix=".dcm") as file:
        Path(file.name).write_bytes(data)
        reader = gdcm.ImageReader()
        reader.SetFileName(file.name)
        if not reader.Read():  # it passes over no element whose type is damaged, also one beside the image
            return header.pixel_array
        image = reader.GetImage()
        width, height = image.GetDimensions()[:2]
        kind = image.GetPixelFormat()
        dtype = np.dtype(kind.GetScalarTypeAsString().lower())
        values = np.frombuffer(image.GetBuffer().encode("utf-8", "surrogateescape"), dtype)
    if (samples := kind.GetSamplesPerPixel()) == 1:
        return values.reshape(height, width)
    if image.GetPlanarConfiguration():
        return np.moveaxis(values.reshape(samples, height, width), 0, -1)
    return values.reshape(height, width, samples)


def _shown(stored: np.ndarray, header: pydicom.Dataset) -> np.ndarray:
    """Stored values through the header's window, or over the range that its bits can hold."""
    bits, signed = header.BitsStored, header.PixelRepresentation
    ends = np.array([-(1 << bits - 1), (1 << bits - 1) - 1] if signed else [0, (1 << bits) - 1])
    low, high = sorted(apply_modality_lut(ends, header).tolist())
    values = apply_modality_lut(stored, header)
    if header.get("WindowWidth"):
        values = apply_windowing(values, header)
    unit = (np.asarray(values, np.float64) - low) / (high - low)
    if header.PhotometricInterpretation == "MONOCHROME1":
        unit = 1 - unit
    dtype = np.uint8 if bits <= 8 and high - low <= 255 else np.uint16
    return np.rint(np.clip(unit, 0, 1) * np.iinfo(dtype).max).astype(dtype)


def decode_jpeg_12(stream: bytes) -> np.ndarray:
    """The values of a sequential JPEG of 12 bits and one component, H W uint16; to 1, since rounding is free.

    Raises:
        ValueError, KeyError, IndexError, StopIteration: whatever it stumbles over.

    Source: ITU-T T.81, F.2 (decoding of DCT-based images with Huffman coding) and A.3.3 (inverse DCT).
    """
    tables: dict[int, dict[tuple[int, int], int]] = {}
    steps: dict[int, list[int]] = {}
    height = width = at = 0
    while True:
        marker, size = stream[at + 1], int.from_bytes(stream[at + 2 : at + 4], "big")
        if marker == 0xD8:
            at += 2
            continue
        part = stream[at + 4 : at + 2 + size]
        at += 2 + size
        if marker == 0xDB:
            while part:
                wide = 1 + (part[0] >> 4)
                steps[part[0] & 15] = [
                    int.from_bytes(part[1 + i * wide : 1 + (i + 1) * wide], "big") for i in range(64)
                ]
                part = part[1 + 64 * wide :]
        elif marker == 0xC4:
            while part:
                code, used, table = 0, 17, {}
                for length in range(1, 17):
                    for _ in range(part[length]):
                        table[length, code] = part[used]
                        code, used = code + 1, used + 1
                    code <<= 1
                tables[part[0]] = table
                part = part[used:]
        elif marker in (0xC0, 0xC1):
            assert (part[0], part[5]) == (12, 1), "12 bits and one component"
            height, width = int.from_bytes(part[1:3], "big"), int.from_bytes(part[3:5], "big")
            quantised = steps[part[8]]
        elif marker == 0xDA:
            dc, ac = tables[part[2] >> 4], tables[0x10 | part[2] & 15]
            break
    end = stream.index(b"\xff\xd9", at)
    bits = iter("".join(f"{byte:08b}" for byte in stream[at:end].replace(b"\xff\x00", b"\xff")))

    def symbol(table: dict[tuple[int, int], int]) -> int:
        code = 0
        for length in range(1, 17):
            code = 2 * code + (next(bits) == "1")
            if (length, code) in table:
                return table[length, code]
        raise ValueError("no such code")

    def number(size: int) -> int:
        value = int("".join(next(bits) for _ in range(size)) or "0", 2)
        return value if not size or value >> (size - 1) else value - (1 << size) + 1

    blocks = np.zeros((-(-height // 8), -(-width // 8), 8, 8))
    before = 0
    for block in blocks.reshape(-1, 8, 8):
        before += number(symbol(dc))
        block[0, 0], k = before * quantised[0], 1
        while k < 64:
            run, size = divmod(symbol(ac), 16)
            if size == 0 and run != 15:
                break
            k += run
            block[_ZIGZAG[k]] = number(size) * quantised[k]
            k += 1
    left = "".join(bits)
    if len(left) > 7 or "0" in left:
        raise ValueError("bits behind the last block")
    values = idctn(blocks, axes=(2, 3), norm="ortho").swapaxes(1, 2) + 2048
    whole = values.reshape(blocks.shape[0] * 8, blocks.shape[1] * 8)[:height, :width]
    return np.clip(np.rint(whole), 0, 4095).astype(np.uint16)


_ZIGZAG = sorted(
    ((row, column) for row in range(8) for column in range(8)),
    key=lambda at: (sum(at), at[0] if sum(at) % 2 else at[1]),
)
