"""Volumes: right voxels, axes and spacing from every NIfTI and series, one clear line for the rest, little memory."""

import gzip
import itertools
import json
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from nibabel.affines import from_matvec
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, RLELossless

from cadx.reading import volumes
from cadx.reading.volumes import read_mask, read_volume

NAME = "Ignatowska^Bronislawa"
RAS = np.diag([0.8, 0.9, 2.5, 1.0])


def phantom(shape: tuple[int, int, int] = (7, 6, 5)) -> np.ndarray:
    """W H D int16 in which no two voxels are equal."""
    return (np.arange(np.prod(shape)) - 50).reshape(shape).astype(np.int16)


def write_nifti(
    path: Path, voxels: np.ndarray, affine: np.ndarray = RAS, *, qform: np.ndarray | None = None,
    codes: tuple[int, int] = (1, 1), unit: str | None = "mm", slope: float | None = None, inter: float = 0.0,
    version: type = nibabel.Nifti1Image, pixdim: Sequence[float] | None = None,
) -> Path:  # fmt: skip
    image = version(voxels, affine, dtype=voxels.dtype)
    header = image.header
    header.set_qform(affine if qform is None else qform, codes[0])
    header.set_sform(affine, codes[1])
    if unit is not None:
        header.set_xyzt_units(unit)
    if pixdim is not None:
        header["pixdim"][1:4] = pixdim
    header["scl_slope"], header["scl_inter"] = (np.nan if slope is None else slope), inter
    # By hand: nibabel's own writer recomputes what the tests set.
    size = int(header["sizeof_hdr"])
    header["vox_offset"] = size + 4
    header["magic"] = b"n+1" if size == 348 else b"n+2"
    block = header.binaryblock + bytes(4) + voxels.tobytes(order="F")
    path.write_bytes(gzip.compress(block, 1) if path.suffix == ".gz" else block)
    return path


def write_series(
    folder: Path, voxels: np.ndarray, affine: np.ndarray = RAS, *, elements: Sequence[dict[str, object]] = (),
    **common: object,
) -> Path:  # fmt: skip
    """A series with `voxels` I J K, affine in RAS, a file a slice, named against their order."""
    folder.mkdir()
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    lengths = np.linalg.norm(lps[:3, :3], axis=0)
    cosines = lps[:3, :3] / lengths
    for k in range(voxels.shape[2]):
        geometry = {
            "ImagePositionPatient": [f"{x:.9g}" for x in (lps @ [0, 0, k, 1])[:3]],
            "ImageOrientationPatient": [f"{x:.9g}" for x in [*cosines[:, 0], *cosines[:, 1]]],
            "PixelSpacing": [f"{lengths[1]:.9g}", f"{lengths[0]:.9g}"],
        }
        own = elements[k] if k < len(elements) else {}
        header = slice_header(voxels[:, :, k].T, **{**geometry, **common, **own})
        save(header, folder / f"{(k * 7) % 101:03}-{k}.dcm")
    return folder


def slice_header(stored: np.ndarray, **elements: object) -> Dataset:
    header = Dataset()
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header.file_meta.MediaStorageSOPClassUID = CTImageStorage
    header.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    header.SOPClassUID, header.SOPInstanceUID, header.SeriesInstanceUID = CTImageStorage, "1.2.3.4", "1.2.3"
    header.Modality, header.PatientName, header.PatientID = "CT", NAME, NAME
    header.Rows, header.Columns = stored.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8 * stored.itemsize
    header.HighBit = header.BitsStored - 1
    header.PixelRepresentation = int(stored.dtype.kind == "i")
    header.PixelData = stored.tobytes()
    header["PixelData"].VR = "OW"
    for keyword, value in elements.items():
        if value is None:
            header.pop(keyword, None)
        else:
            setattr(header, keyword, value)
    return header


def save(header: Dataset, path: Path) -> None:
    pydicom.dcmwrite(path, header, enforce_file_format=True)


def write_enhanced(path: Path, voxels: np.ndarray) -> Path:
    """One multi-frame file on the axes of RAS, its five frames out of order; values are 10 lower than stored."""
    order = (3, 0, 4, 1, 2)
    header = slice_header(voxels.transpose(2, 1, 0)[list(order)], NumberOfFrames=5)
    header.SOPClassUID = header.file_meta.MediaStorageSOPClassUID = EnhancedCTImageStorage
    shared = Dataset()
    shared.PlaneOrientationSequence = [Dataset()]
    shared.PlaneOrientationSequence[0].ImageOrientationPatient = [-1, 0, 0, 0, -1, 0]
    shared.PixelMeasuresSequence = [Dataset()]
    shared.PixelMeasuresSequence[0].PixelSpacing = [0.9, 0.8]
    shared.PixelValueTransformationSequence = [Dataset()]
    shared.PixelValueTransformationSequence[0].RescaleSlope = 1
    shared.PixelValueTransformationSequence[0].RescaleIntercept = -10
    header.SharedFunctionalGroupsSequence = [shared]
    frames = []
    for k in order:
        frame = Dataset()
        frame.PlanePositionSequence = [Dataset()]
        frame.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.5 * k]
        frames.append(frame)
    header.PerFrameFunctionalGroupsSequence = frames
    save(header, path)
    return path


def canonical(path: Path) -> np.ndarray:
    """D H W by nibabel."""
    return np.asanyarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj).transpose(2, 1, 0)


def all_orientations() -> list[np.ndarray]:
    matrices = []
    for order, signs in itertools.product(
        itertools.permutations(range(3)), itertools.product((1, -1), repeat=3)
    ):
        matrix = np.zeros((3, 3))
        matrix[list(order), range(3)] = np.multiply(signs, (0.8, 0.9, 2.5))
        matrices.append(from_matvec(matrix, [-10, 20, 30]))
    return matrices


def rotation(degrees: float) -> np.ndarray:
    turn = np.radians(degrees)
    matrix = np.array([[1, 0, 0], [0, np.cos(turn), -np.sin(turn)], [0, np.sin(turn), np.cos(turn)]])
    return from_matvec(matrix @ RAS[:3, :3], [-10, 20, 30])


# --- NIfTI --------------------------------------------------------------------------------------------


def test_axes_are_slices_rows_columns_and_not_the_files_x_y_z(tmp_path):
    voxels = phantom((7, 6, 5))
    volume = read_volume(write_nifti(tmp_path / "v.nii", voxels))
    assert volume.voxels.shape == (5, 6, 7)
    assert volume.spacing_mm == (2.5, 0.9, 0.8)
    assert volume.voxels[4, 1, 6] == voxels[6, 1, 4]
    assert (volume.assumptions, volume.findings) == ((), ())


@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_every_orientation_is_brought_to_right_anterior_superior(tmp_path, version):
    for number, affine in enumerate(all_orientations()):
        path = write_nifti(tmp_path / f"{number}.nii", phantom(), affine, version=version)
        volume = read_volume(path)
        np.testing.assert_array_equal(volume.voxels, canonical(path))
        steps = nibabel.as_closest_canonical(nibabel.load(path)).affine
        np.testing.assert_allclose(volume.spacing_mm, np.diag(steps)[2::-1], rtol=1e-6)
        np.testing.assert_allclose(volume.affine, steps[:, [2, 1, 0, 3]], atol=1e-4)
        assert tuple(volume.stored_axes) == nibabel.aff2axcodes(affine)
        assert volume.voxels.flags.c_contiguous


def test_an_oblique_volume_keeps_its_grid_and_says_so(tmp_path):
    path = write_nifti(tmp_path / "v.nii", phantom(), rotation(20))
    volume = read_volume(path)
    np.testing.assert_array_equal(volume.voxels, canonical(path))
    assert volume.findings == ("oblique: axes are turned by 20.0 degrees from the body's",)
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.9, 0.8), rtol=1e-5)


@pytest.mark.parametrize(
    ("stored", "slope", "inter", "expected"),
    [
        (np.uint8, None, 0, np.uint8),
        (np.int8, None, 0, np.int16),
        (np.uint16, None, 0, np.uint16),
        (">i2", None, 0, np.int16),
        (np.int32, None, 0, np.int16),
        (np.uint64, None, 0, np.int16),
        (np.float64, None, 0, np.int16),
        (np.float32, None, 0, np.float32),
        (np.int16, 1, -1024, np.int16),
        (np.uint16, 2, -1024, np.int16),
        (np.int16, 0.5, 3, np.float32),
        (np.int16, 0, 7, np.int16),  # a slope of 0 means none
    ],
)
def test_dtype_is_the_smallest_that_holds_the_scaled_values(tmp_path, stored, slope, inter, expected):
    values = np.abs(phantom() % 120).astype(stored)
    if np.dtype(stored).byteorder == ">":
        image = nibabel.Nifti1Image(values, RAS, header=nibabel.Nifti1Header(endianness=">"))
        image.header.set_data_dtype(stored)
        path = tmp_path / "v.nii"
        nibabel.save(image, path)
        assert path.read_bytes()[:4] == struct.pack(">i", 348)
    else:
        path = write_nifti(tmp_path / "v.nii", values, slope=slope, inter=inter)
    volume = read_volume(path)
    assert volume.voxels.dtype == expected
    assert volume.voxels.dtype.isnative
    np.testing.assert_array_equal(volume.voxels, nibabel.load(path).get_fdata().transpose(2, 1, 0))


@pytest.mark.parametrize(
    ("stored", "value"), [(np.int32, 40_000), (np.float64, 0.25), (np.int64, -(1 << 40))]
)
def test_one_late_value_that_fits_no_int16_makes_all_float32(tmp_path, stored, value):
    values = phantom().astype(stored)
    values[-1, -1, -1] = value
    path = write_nifti(tmp_path / "v.nii.gz", values)
    volume = read_volume(path)
    assert volume.voxels.dtype == np.float32
    np.testing.assert_array_equal(volume.voxels, nibabel.load(path).get_fdata().transpose(2, 1, 0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("stored", [np.float32, np.float64])
def test_voxels_that_are_no_number_are_refused(tmp_path, stored, value):
    values = phantom().astype(stored)
    with np.errstate(over="ignore"):
        values[3, 2, 1] = value
    with pytest.raises(ValueError, match=r"^NIfTI: voxels that are no number or infinite"):
        read_volume(write_nifti(tmp_path / "v.nii", values))


def flipped(affine: np.ndarray) -> np.ndarray:
    return affine @ np.diag([-1.0, 1, 1, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"qform": RAS * np.array([1, 1, 2, 1])},
            "qform and sform disagree on the spacing; .*give spacing_mm",
        ),
        ({"qform": flipped(RAS)}, "qform and sform disagree on handedness"),
        ({"qform": RAS[[1, 2, 0, 3]]}, "qform and sform disagree on which way the axes run"),
        ({"codes": (0, 2), "pixdim": (1, 1, 1)}, "pixdim and sform disagree on the spacing"),
        ({"codes": (0, 0), "pixdim": (0, 0, 0)}, "no spacing in qform, sform or pixdim; .*give spacing_mm"),
        ({"codes": (0, 0), "pixdim": (1, np.nan, 1)}, "no spacing in qform, sform or pixdim"),
        ({"codes": (1, 0), "pixdim": (1, 1, 1e-9)}, "spacing is not three lengths within"),
    ],
)
def test_contradictory_or_missing_geometry_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^NIfTI: .*{message}"):
        read_volume(write_nifti(tmp_path / "v.nii", phantom(), **options), orientation="RAS")


def test_a_given_spacing_settles_what_the_file_leaves_open_and_is_recorded(tmp_path):
    unset = write_nifti(tmp_path / "a.nii", phantom(), codes=(0, 0), pixdim=(0, 0, 0))
    volume = read_volume(unset, spacing_mm=(3.0, 1.0, 1.0), orientation="RAS")
    assert volume.spacing_mm == (3, 1, 1)
    assert any("3 x 1 x 1 mm (D, H, W) was taken as given" in text for text in volume.assumptions)
    assert any("axes RAS were taken as given" in text for text in volume.assumptions)
    rival = write_nifti(tmp_path / "b.nii", phantom(), qform=RAS * np.array([1, 1, 2, 1]))
    assert read_volume(rival, spacing_mm=(3.0, 1.0, 1.0)).spacing_mm == (3, 1, 1)
    # The lengths are those given, the directions and the place the file's.
    np.testing.assert_allclose(
        read_volume(rival, spacing_mm=(3.0, 1.0, 1.0)).affine[:3],
        [[0, 0, 1, 0], [0, 1, 0, 0], [3, 0, 0, 0]],
        atol=1e-6,
    )


def test_a_given_spacing_that_the_file_contradicts_is_refused_and_not_passed_over(tmp_path):
    path = write_nifti(tmp_path / "v.nii", phantom())
    series = write_series(tmp_path / "s", phantom())
    for source, name in ((path, "NIfTI"), (series, "DICOM series")):
        for given in ((3.0, 0.9, 0.8), (2.5, 0.92, 0.8), (0.8, 0.9, 2.5)):
            message = f"^{name}: spacing_mm .* was given, but the file says 2.5 x 0.9 x 0.8; remove it"
            with pytest.raises(ValueError, match=message):
                read_volume(source, spacing_mm=given)
        volume = read_volume(source, spacing_mm=(2.51, 0.9, 0.8))
        assert (volume.spacing_mm, volume.assumptions) == ((2.5, 0.9, 0.8), ())


@pytest.mark.parametrize("codes", [(1, 0), (0, 1)])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_an_origin_at_no_place_in_space_is_refused(tmp_path, codes, value):
    affine = RAS.copy()
    affine[1, 3] = value
    with pytest.raises(ValueError, match=r"^NIfTI: its affine puts it at no place"):
        read_volume(write_nifti(tmp_path / "v.nii", phantom(), affine, codes=codes))


@pytest.mark.parametrize("name", ["v.nii", "v.nii.gz"])
def test_axes_that_no_code_tells_are_refused_and_not_guessed(tmp_path, name):
    with pytest.raises(ValueError, match=r"^NIfTI: neither qform nor sform .*; .* give orientation in the"):
        read_volume(write_nifti(tmp_path / name, phantom(), codes=(0, 0)))


@pytest.mark.parametrize("axes", ["RAS", "LPS", "SAL"])
def test_axes_that_no_code_tells_can_be_given_and_are_recorded(tmp_path, axes):
    path = write_nifti(tmp_path / "v.nii", phantom(), codes=(0, 0), pixdim=(0.8, 0.9, 2.5))
    volume = read_volume(path, orientation=axes)
    assert (volume.affine, volume.stored_axes) == (None, axes)
    assert volume.assumptions == (f"neither qform nor sform: axes {axes} were taken as given",)
    placed = nibabel.Nifti1Image(phantom(), np.diag([0.8, 0.9, 2.5, 1]))
    turned = nibabel.orientations.apply_orientation(
        np.asarray(placed.dataobj), nibabel.orientations.axcodes2ornt(axes)
    )
    np.testing.assert_array_equal(volume.voxels, turned.transpose(2, 1, 0))
    assert volume.spacing_mm == ((0.8, 0.9, 2.5) if axes == "SAL" else (2.5, 0.9, 0.8))


def test_a_file_that_says_its_axes_keeps_them_whatever_was_given_for_those_that_do_not(tmp_path):
    path = write_nifti(tmp_path / "v.nii", phantom())
    for orientation in ("RAS", "LPS"):
        given = read_volume(path, orientation=orientation)
        assert given.assumptions == ()
        np.testing.assert_array_equal(given.voxels, read_volume(path).voxels)
    series = write_series(tmp_path / "s", phantom())
    assert read_volume(series, orientation="LPS").assumptions == (), "slices say where they lie"


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1e3), ("meter", 1e-3), ("mm", 1), (None, 1)])
def test_lengths_come_in_millimetres_whatever_the_unit(tmp_path, unit, factor):
    affine = from_matvec(RAS[:3, :3] * factor, np.multiply([-10, 20, 30], factor))
    volume = read_volume(write_nifti(tmp_path / "v.nii", phantom(), affine, unit=unit))
    np.testing.assert_allclose(volume.spacing_mm, (2.5, 0.9, 0.8), rtol=1e-6)
    np.testing.assert_allclose(volume.affine[:3, 3], (-10, 20, 30), rtol=1e-6)
    assert volume.assumptions == (() if unit else ("the header names no unit of length: mm was taken",))


def test_a_qfac_of_0_means_1_and_an_unknown_unit_is_refused(tmp_path):
    path = write_nifti(tmp_path / "v.nii", phantom(), codes=(1, 0))
    data = path.read_bytes()
    path.write_bytes(data[:76] + bytes(4) + data[80:])
    np.testing.assert_array_equal(read_volume(path).voxels, phantom().transpose(2, 1, 0))
    path.write_bytes(data[:123] + bytes([5]) + data[124:])
    with pytest.raises(ValueError, match="an unknown unit of length"):
        read_volume(path)


def test_the_letters_of_another_header_field_do_not_make_it_a_pair(tmp_path):
    path = write_nifti(tmp_path / "v.nii", phantom())
    data = path.read_bytes()
    path.write_bytes(data[:4] + b"ni" + data[6:])
    assert read_volume(path).voxels.shape == (5, 6, 7)


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.zeros((4, 4, 4, 2), np.int16), "several volumes in one"),
        (np.zeros((4, 4), np.int16), "fewer than three axes"),
        (np.zeros((4, 4, 4), np.complex64), "no single number"),
        (np.zeros((4, 4, 4), [("R", "u1"), ("G", "u1"), ("B", "u1")]), "no single number"),
    ],
)
def test_what_is_no_volume_of_numbers_is_refused(tmp_path, voxels, message):
    with pytest.raises(ValueError, match=message):
        read_volume(write_nifti(tmp_path / "v.nii", voxels))


def test_a_trailing_axis_of_one_is_no_second_volume(tmp_path):
    path = write_nifti(tmp_path / "v.nii", phantom()[..., None])
    np.testing.assert_array_equal(read_volume(path).voxels, phantom().transpose(2, 1, 0))


def test_a_file_is_known_by_its_first_bytes_never_by_its_name(tmp_path):
    series = write_series(tmp_path / "series", phantom())
    packed = write_nifti(tmp_path / "v.nii.gz", phantom())
    expected = phantom().transpose(2, 1, 0)
    np.testing.assert_array_equal(read_volume(packed.rename(tmp_path / "v.dcm")).voxels, expected)
    (tmp_path / "v.nii").write_bytes(zip_of(series, tmp_path / "s.zip").read_bytes())
    np.testing.assert_array_equal(read_volume(tmp_path / "v.nii").voxels, expected)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an empty file"),
        (b"\x89PNG\r\n\x1a\n" + bytes(400), "neither NIfTI, DICOM nor a zip"),
        (gzip.compress(b"hello" * 100, mtime=0), "no NIfTI file in the gzip"),
        (gzip.compress(b"hello" * 100, mtime=0)[:20], "damaged or truncated"),
    ],
)
def test_other_files_are_refused(tmp_path, data, message):
    (tmp_path / "v.nii.gz").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_volume(tmp_path / "v.nii.gz")


def test_a_missing_file_and_a_header_without_voxels_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no such volume"):
        read_volume(tmp_path / "none.nii")
    nibabel.save(nibabel.Nifti1Pair(phantom(), RAS), tmp_path / "v.img")
    with pytest.raises(ValueError, match="a header without its voxels"):
        read_volume(tmp_path / "v.hdr")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_file_with_fewer_or_more_voxels_than_claimed_is_refused(tmp_path, suffix):
    path = write_nifti(tmp_path / f"v{suffix}", phantom())
    whole = path.read_bytes()
    block = gzip.decompress(whole) if suffix == ".nii.gz" else whole
    for changed in (block[:-1], block + b"\0", block[:360], block[:348], block[:100]):
        path.write_bytes(gzip.compress(changed) if suffix == ".nii.gz" else changed)
        with pytest.raises(ValueError, match=r"copy it again|neither NIfTI|no NIfTI"):
            read_volume(path)


def test_a_changed_voxel_in_a_gzip_is_found_by_its_checksum(tmp_path):
    path = write_nifti(tmp_path / "v.nii.gz", phantom())
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="damaged or truncated"):
        read_volume(path)


@pytest.mark.parametrize("planes", [(159,), (161,), (80, 79), (80, 81)])
def test_a_large_gzip_of_fewer_or_more_voxels_than_claimed_is_refused_in_little_memory(tmp_path, planes):
    head = gzip.decompress(write_nifti(tmp_path / "v.nii.gz", phantom().astype(np.float32)).read_bytes())[
        :352
    ]
    head = head[:40] + struct.pack("<4h", 3, 512, 512, 160) + head[48:]  # 160 MiB
    for number, count in enumerate(planes):  # a member each
        with gzip.open(tmp_path / "v.nii.gz", "ab" if number else "wb", compresslevel=1) as member:
            member.write(b"" if number else head)
            for _ in range(count):
                member.write(bytes(512 * 512 * 4))
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"^NIfTI: its header claims another number of voxels than the file"):
        read_volume(tmp_path / "v.nii.gz")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 20e6


def test_a_large_gzip_is_read_once_unless_it_has_several_members_or_is_packed_too_tightly(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(volumes, "_TRUSTED_BYTES", 0)
    opened = []
    monkeypatch.setattr(gzip, "open", lambda *a, real=gzip.open: opened.append(a) or real(*a))
    path = write_nifti(tmp_path / "v.nii.gz", phantom())
    expected = phantom().transpose(2, 1, 0)
    np.testing.assert_array_equal(read_volume(path).voxels, expected)
    assert len(opened) == 1
    block = gzip.decompress(path.read_bytes())
    path.write_bytes(
        gzip.compress(block[:400]) + gzip.compress(block[400:]) + bytes(16)
    )  # padded as tapes are
    np.testing.assert_array_equal(read_volume(path).voxels, expected)
    assert len(opened) == 3
    tight = np.zeros((64, 64, 64), np.uint8)
    assert not read_volume(write_nifti(tmp_path / "tight.nii.gz", tight)).voxels.any()
    assert len(opened) == 5


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_claims_terabytes_is_refused_at_once(tmp_path, suffix):
    path = write_nifti(tmp_path / f"v{suffix}", phantom(), version=nibabel.Nifti2Image)
    block = path.read_bytes() if suffix == ".nii" else gzip.decompress(path.read_bytes())
    for sides in ((1 << 40, 6, 5), (1 << 13, 1 << 13, 1 << 13), (1 << 62, 4, 4), (-7, 6, 5), (900, 900, 600)):
        changed = block[:24] + struct.pack("<3q", *sides) + block[48:]
        path.write_bytes(changed if suffix == ".nii" else gzip.compress(changed))
        tracemalloc.start()
        with pytest.raises(ValueError, match=r"claims|empty volume"):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 10e6
        tracemalloc.stop()


@pytest.mark.parametrize("stored", [np.int16, np.int32, np.float64])
def test_no_whole_float64_volume_stands_in_memory(tmp_path, stored):
    # In the worst order, sagittal, and with a last slice that turns int16 into float32.
    values = np.random.default_rng(0).integers(-1000, 1000, (96, 128, 128)).astype(stored)
    if stored is not np.int16:
        values[-1, -1, -1] = 100_000
    path = write_nifti(tmp_path / "v.nii.gz", values, all_orientations()[20])
    tracemalloc.start()
    volume = read_volume(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert volume.voxels.dtype == (np.int16 if stored is np.int16 else np.float32)
    assert peak_bytes < 1.6 * volume.voxels.nbytes
    np.testing.assert_array_equal(volume.voxels, canonical(path))


# --- masks --------------------------------------------------------------------------------------------


def test_a_mask_comes_as_classes_on_the_images_grid(tmp_path):
    affine = all_orientations()[37]
    image = read_volume(write_nifti(tmp_path / "v.nii", phantom(), affine))
    for stored in (np.uint8, np.float32, np.int64):
        mask = read_mask(write_nifti(tmp_path / "m.nii", (phantom() % 3).astype(stored), affine), image)
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, image.voxels % 3)


@pytest.mark.parametrize(
    ("values", "affine", "message"),
    [
        (phantom() / 10, RAS, "not whole"),
        (phantom(), RAS, "not in 0..255"),
        (phantom() + 1000, RAS, "not in 0..255"),
        (np.zeros((7, 6, 4), np.uint8), RAS, "shape .* is not the image's"),
        (np.zeros((7, 6, 5), np.uint8), RAS * 1.1, "spacing is not the image's"),
    ],
)
def test_a_mask_of_scores_or_on_another_grid_is_refused(tmp_path, values, affine, message):
    image = read_volume(write_nifti(tmp_path / "v.nii", phantom()))
    with pytest.raises(ValueError, match=f"^mask: .*{message}"):
        read_mask(write_nifti(tmp_path / "m.nii", values, affine), image)


def test_a_mask_without_a_form_is_not_mirrored_against_an_image_stored_to_the_left(tmp_path):
    # A reader that takes such a mask for RAS+ swaps sides, front and back, or top and bottom.
    for number, affine in enumerate(all_orientations()):
        image = read_volume(write_nifti(tmp_path / f"{number}.nii", phantom(), affine))
        labels = (phantom() % 3).astype(np.uint8)
        for pixdim in (None, (0, 0, 0)):
            path = write_nifti(tmp_path / f"m{number}.nii", labels, affine, codes=(0, 0), pixdim=pixdim)
            np.testing.assert_array_equal(read_mask(path, image), image.voxels % 3)


def test_a_mask_without_a_form_must_have_the_shape_that_the_image_is_stored_in(tmp_path):
    affine = np.eye(4)[[2, 1, 0, 3]]
    image = read_volume(write_nifti(tmp_path / "v.nii", phantom(), affine))
    assert (image.stored_axes, image.voxels.shape) == ("SAR", (7, 6, 5))
    turned = write_nifti(tmp_path / "m.nii", np.zeros((5, 6, 7), np.uint8), np.eye(4), codes=(0, 0))
    with pytest.raises(ValueError, match=r"^mask: its shape"):
        read_mask(turned, image)


def test_a_mask_is_refused_where_nothing_says_which_way_its_axes_run(tmp_path):
    labels = np.zeros(phantom().shape, np.uint8)
    bare = write_nifti(tmp_path / "bare.nii", labels, codes=(0, 0))
    series = read_volume(write_series(tmp_path / "s", phantom()))
    uncoded = read_volume(write_nifti(tmp_path / "v.nii", phantom(), codes=(0, 0)), orientation="RAS")
    with pytest.raises(ValueError, match=r"^mask: only one of it and its image says"):
        read_mask(bare, series)
    with pytest.raises(ValueError, match=r"^mask: only one of it and its image says"):
        read_mask(write_nifti(tmp_path / "las.nii", labels, flipped(RAS)), uncoded)
    with pytest.raises(ValueError, match=r"^mask: neither qform nor sform; give the image"):
        read_mask(bare)
    for alike in (bare, write_nifti(tmp_path / "ras.nii", labels)):
        assert read_mask(alike, uncoded).shape == (5, 6, 7)


@pytest.mark.parametrize(
    ("shift_mm", "degrees", "fits"),
    [
        ((0, 0, 0), 0, True),
        ((0.3, 0, 0), 0, True),
        ((0.5, 0, 0), 0, False),
        ((0, -500, 0), 0, False),
        ((0, 0, 2.5), 0, False),
        ((0, 0, 0), 1, True),  # 0.19 mm at the farthest corner
        ((0, 0, 0), 10, False),
    ],
)
def test_a_mask_in_another_place_or_turned_is_refused(tmp_path, shift_mm, degrees, fits):
    affine = rotation(0)
    image = read_volume(write_nifti(tmp_path / "v.nii", phantom(), affine))
    other = rotation(degrees)
    other[:3, 3] += shift_mm
    path = write_nifti(tmp_path / "m.nii", (phantom() % 3).astype(np.uint8), other)
    if fits:
        np.testing.assert_array_equal(read_mask(path, image), image.voxels % 3)
    else:
        with pytest.raises(ValueError, match=r"^mask: it lies up to \d.* mm off the image"):
            read_mask(path, image)


def test_a_mask_stored_along_other_axes_in_the_images_place_fits_it(tmp_path):
    image = read_volume(write_nifti(tmp_path / "v.nii", phantom(), rotation(20)))
    stored = nibabel.Nifti1Image((phantom() % 3).astype(np.uint8), rotation(20))
    for codes in (("L", "P", "I"), ("S", "L", "A"), ("P", "R", "S")):
        turned = stored.as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.io_orientation(stored.affine), nibabel.orientations.axcodes2ornt(codes)
            )
        )
        path = write_nifti(tmp_path / "m.nii", np.asarray(turned.dataobj), turned.affine)
        np.testing.assert_array_equal(read_mask(path, image), image.voxels % 3)


# --- DICOM --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 9, 20, 37, 46, -1])
def test_a_series_reads_as_the_same_volume_in_nifti(tmp_path, number):
    # DICOM's world runs left and posterior: a reader that forgets it mirrors the body.
    affine = rotation(15) if number < 0 else all_orientations()[number]
    voxels = phantom()
    voxels[1, 4, 3] = 9000
    path = write_nifti(tmp_path / "v.nii", voxels, affine)
    volume = read_volume(write_series(tmp_path / "series", voxels, affine))
    np.testing.assert_array_equal(volume.voxels, canonical(path))
    reference = read_volume(path)
    np.testing.assert_allclose(volume.spacing_mm, reference.spacing_mm, rtol=1e-6)
    assert volume.findings == reference.findings
    place = np.argwhere(volume.voxels == 9000)[0][::-1]
    world = nibabel.as_closest_canonical(nibabel.load(path)).affine @ [*place, 1]
    np.testing.assert_allclose(world, affine @ [1, 4, 3, 1], atol=1e-4)
    np.testing.assert_allclose(volume.affine, reference.affine, atol=1e-4)
    mask = read_mask(write_nifti(tmp_path / "m.nii", (voxels % 3).astype(np.uint8), affine), volume)
    np.testing.assert_array_equal(mask, volume.voxels % 3)
    affine[0, 3] += 500
    with pytest.raises(ValueError, match=r"^mask: it lies up to 500 mm off"):
        read_mask(write_nifti(tmp_path / "m.nii", (voxels % 3).astype(np.uint8), affine), volume)


def test_a_series_says_of_machine_and_group_what_images_say(tmp_path):
    volume = read_volume(
        write_series(
            tmp_path / "series", phantom(), PatientSex="F", PatientAge="061Y", Manufacturer="Maker",
            ManufacturerModelName="M1", InstitutionName="North",
        )
    )  # fmt: skip
    assert volume.attributes == {"site": "North", "scanner": "Maker M1", "sex": "F", "age": 61.0}
    assert volume.patient == NAME
    assert NAME not in repr(volume)


def test_rescale_gives_hounsfield_units_as_int16(tmp_path):
    stored = np.abs(phantom()).astype(np.uint16)
    volume = read_volume(
        write_series(
            tmp_path / "s", stored, RescaleSlope="1", RescaleIntercept="-1024", BitsStored=12, HighBit=11
        )
    )
    assert volume.voxels.dtype == np.int16
    np.testing.assert_array_equal(volume.voxels, stored.transpose(2, 1, 0).astype(int) - 1024)


def test_each_slice_has_its_own_slope_as_pet_needs(tmp_path):
    slopes = [0.25, 0.5, 1.5, 2.0, 4.0]
    volume = read_volume(
        write_series(tmp_path / "s", phantom(), elements=[{"RescaleSlope": str(slope)} for slope in slopes])
    )
    assert volume.voxels.dtype == np.float32
    expected = phantom().transpose(2, 1, 0) * np.array(slopes)[:, None, None]
    np.testing.assert_allclose(volume.voxels, expected, rtol=1e-6)


@pytest.mark.parametrize(("signed", "bits"), [(True, 12), (False, 12), (False, 16)])
def test_bits_above_those_stored_are_not_part_of_a_value(tmp_path, signed, bits):
    values = phantom() if signed else np.abs(phantom())
    stored = values.astype(np.int16 if signed else np.uint16)
    if bits == 12:
        stored = (stored.view(np.uint16) & 0x0FFF | 0xA000).view(stored.dtype)  # an overlay's bits
    volume = read_volume(write_series(tmp_path / "s", stored, BitsStored=bits, HighBit=bits - 1))
    assert volume.voxels.dtype == stored.dtype
    np.testing.assert_array_equal(volume.voxels, values.transpose(2, 1, 0))


def test_compressed_slices_read_as_the_plain_ones(tmp_path):
    folder = write_series(tmp_path / "s", phantom(), RescaleIntercept=-7)
    expected = read_volume(folder).voxels
    for path in folder.iterdir():
        header = pydicom.dcmread(path)
        header.compress(RLELossless, generate_instance_uid=False)
        save(header, path)
    np.testing.assert_array_equal(read_volume(folder).voxels, expected)


def test_missing_slices_are_found(tmp_path):
    folder = write_series(tmp_path / "s", phantom((7, 6, 12)))
    for k in (3, 4, 8):
        next(folder.glob(f"*-{k}.dcm")).unlink()
    volume = read_volume(folder)
    assert volume.findings == ("missing_slices: 3 slices are missing in 2 places",)
    assert volume.voxels.shape == (9, 6, 7)
    assert volume.spacing_mm == (2.5, 0.9, 0.8)


BY_DISTANCE, BY_NUMBER = ", by SpacingBetweenSlices", ", by InstanceNumber"
ALTERNATE = (0, 2, 4, 6, 8, 10)


@pytest.mark.parametrize(
    ("kept", "common", "numbers", "finding"),
    [
        ((0, 1, 2, 6, 7, 8), {}, None, "3 slices are missing in 1 places"),
        ((0, 1, 2, 4, 6, 8, 10), {}, None, "4 slices are missing in 4 places"),  # most are lost
        (ALTERNATE, {"SpacingBetweenSlices": 2.5}, None, f"5 slices are missing in 5 places{BY_DISTANCE}"),
        (ALTERNATE, {"SpacingBetweenSlices": 2.4}, None, f"5 slices are missing in 5 places{BY_DISTANCE}"),
        (ALTERNATE, {}, range(1, 13), f"5 slices are missing in 5 places{BY_NUMBER}"),
        (ALTERNATE, {}, range(12, 0, -1), f"5 slices are missing in 5 places{BY_NUMBER}"),
        ((0, 3, 6, 9), {}, range(1, 13), f"6 slices are missing in 3 places{BY_NUMBER}"),
        ((0, 5), {"SpacingBetweenSlices": 2.5}, None, f"4 slices are missing in 1 places{BY_DISTANCE}"),
        ((0, 1, 3), {}, range(1, 13), "1 slices are missing in 1 places"),
        # Nothing is lost:
        (range(12), {"SpacingBetweenSlices": 2.5}, range(1, 13), None),
        (range(3, 12), {}, range(1, 13), None),
        (ALTERNATE, {"SliceThickness": 2.5}, None, None),  # room between slices
        (ALTERNATE, {"SpacingBetweenSlices": 5}, range(1, 13), None),  # the header knows of it
        (ALTERNATE, {"SpacingBetweenSlices": 1, "SliceThickness": 4}, None, None),  # written from edge to edge
        (ALTERNATE, {"SpacingBetweenSlices": 7}, None, None),
        (range(12), {"SpacingBetweenSlices": 0.25}, None, None),  # centimetres
        (range(12), {"SpacingBetweenSlices": 1e-16}, None, None),
        ((0, 3, 6, 9), {"SpacingBetweenSlices": 2.5, "SliceThickness": 5}, None, None),  # room, or three-fold loss
        (ALTERNATE, {"SpacingBetweenSlices": 0}, [1] * 12, None),
        (ALTERNATE, {}, [1, 0, 4, 0, 2, 0, 5, 0, 3, 0, 6, 0], None),  # interleaved
        (ALTERNATE, {}, [1, 0, 3, 0, 5, 0, 9, 0, 11, 0, 13, 0], None),  # out of step with the places
        (ALTERNATE, {"Modality": "MR"}, range(1, 13), None),  # one of two echoes
        (ALTERNATE, {}, range(10**30, 10**30 + 12), None),  # longer than an IS may be
    ],
)  # fmt: skip
def test_slices_lost_in_a_pattern_are_found_and_none_where_none_is_lost(
    tmp_path, kept, common, numbers, finding
):
    elements = [{"InstanceNumber": number} for number in numbers or ()]
    folder = write_series(tmp_path / "s", phantom((7, 6, 12)), elements=elements, **common)
    for k in set(range(12)).difference(kept):
        next(folder.glob(f"*-{k}.dcm")).unlink()
    volume = read_volume(folder)
    assert volume.findings[:1] == (() if finding is None else (f"missing_slices: {finding}",))
    np.testing.assert_array_equal(volume.voxels, phantom((7, 6, 12)).transpose(2, 1, 0)[list(kept)])
    # The slices stay where they are: lost ones are reported, never made up.
    gaps_mm = 2.5 * np.diff(sorted(kept))
    assert volume.spacing_mm == (np.median(gaps_mm), 0.9, 0.8)


IN_STACK, IN_ALL = ", by NumberOfSlices", ", by ImagesInAcquisition"


@pytest.mark.parametrize(
    ("kept", "common", "finding"),
    [
        (range(2, 12), {"NumberOfSlices": 12}, f"10 of 12 slices are there{IN_STACK}"),
        (range(10), {"ImagesInAcquisition": 12, "Modality": "MR"}, f"10 of 12 slices are there{IN_ALL}"),
        (range(10), {"ImagesInAcquisition": 24, "NumberOfTemporalPositions": 2}, f"10 of 12 slices are there{IN_ALL}"),
        ((0, 1, 2, 6, 7, 8), {"NumberOfSlices": 12},
         f"3 slices are missing in 1 places, and 6 of 12 slices are there{IN_STACK}"),
        ((4,), {"NumberOfSlices": 12}, f"1 of 12 slices are there{IN_STACK}"),
        (range(6), {"NumberOfSlices": 12, "ImagesInAcquisition": 6}, f"6 of 12 slices are there{IN_STACK}"),
        # Nothing is known to be lost:
        (range(12), {"NumberOfSlices": 12}, None),
        (range(12), {"NumberOfSlices": 12, "ImagesInAcquisition": 13}, None),  # of this stack, and of more
        ((0, 1, 2, 6, 7, 8), {"NumberOfSlices": 9}, "3 slices are missing in 1 places"),
        (range(12), {"ImagesInAcquisition": 24}, None),  # one of two echoes
        (range(10), {"ImagesInAcquisition": 25, "NumberOfTemporalPositions": 2}, None),  # counted by other rules
        (range(12), {"ImagesInAcquisition": 5}, None),
        (range(12), {"ImagesInAcquisition": 10**9}, None),
        (range(2, 12), {}, None),  # no header says how many there were
    ],
)  # fmt: skip
def test_slices_lost_at_the_ends_are_found_where_the_headers_count_them(tmp_path, kept, common, finding):
    folder = write_series(tmp_path / "s", phantom((7, 6, 12)), SliceThickness=2.5, **common)
    for k in set(range(12)).difference(kept):
        next(folder.glob(f"*-{k}.dcm")).unlink()
    assert read_volume(folder).findings == (() if finding is None else (f"missing_slices: {finding}",))


def test_headers_that_count_differently_tell_nothing_of_lost_slices(tmp_path):
    elements = [{"NumberOfSlices": 12 + k} for k in range(5)]
    assert read_volume(write_series(tmp_path / "s", phantom(), elements=elements)).findings == ()


def test_a_few_slices_out_of_place_do_not_make_all_others_missing(tmp_path):
    heights = [float(k) for k in range(30)]
    heights[7], heights[15], heights[22] = 6.25, 14.25, 21.25
    places = [{"ImagePositionPatient": [0, 0, z]} for z in heights]
    volume = read_volume(write_series(tmp_path / "s", phantom((3, 4, 30)), elements=places))
    assert volume.findings == ("uneven_spacing: gaps between slices of 0.25 to 1.75 mm",)


def test_equal_copies_of_a_slice_are_dropped_and_found(tmp_path):
    folder = write_series(tmp_path / "s", phantom())
    (folder / "copy.dcm").write_bytes(next(folder.glob("*-2.dcm")).read_bytes())
    volume = read_volume(folder)
    assert volume.findings == ("duplicate_slices: 1 equal copies were left out",)
    np.testing.assert_array_equal(volume.voxels, phantom().transpose(2, 1, 0))


def test_two_different_images_at_one_place_are_refused(tmp_path):
    folder = write_series(tmp_path / "s", phantom())
    header = pydicom.dcmread(next(folder.glob("*-2.dcm")))
    header.PixelData = bytes(len(header.PixelData))
    save(header, folder / "phase.dcm")
    with pytest.raises(ValueError, match=r"^DICOM series: different images at one position"):
        read_volume(folder)


def test_uneven_spacing_is_found(tmp_path):
    places = [{"ImagePositionPatient": [0, 0, z]} for z in (0.0, 2.5, 5.0, 8.1, 10.6)]
    volume = read_volume(write_series(tmp_path / "s", phantom(), elements=places))
    assert volume.findings == ("uneven_spacing: gaps between slices of 2.5 to 3.1 mm",)
    assert volume.spacing_mm[0] == 2.5


@pytest.mark.parametrize("tilt", [0.0, 0.2])
@pytest.mark.parametrize(("moved", "num_beside"), [({4}, 1), ({11}, 1), ({0}, 1), (set(range(7)), 5)])
def test_slices_that_were_moved_aside_are_found_and_do_not_tilt_the_others(tmp_path, moved, num_beside, tilt):
    voxels = phantom((7, 6, 12))
    places = [[20.0 * (k in moved), tilt * 2.5 * k, 2.5 * k] for k in range(12)]
    elements = [{"ImagePositionPatient": place} for place in places]
    volume = read_volume(write_series(tmp_path / "s", voxels, elements=elements))
    beside = f"uneven_spacing: {num_beside} slices lie up to 20 mm beside the others"
    lean = ("gantry_tilt: slices are 11.3 degrees off the perpendicular",) if tilt else ()
    assert volume.findings == (beside, *lean)
    np.testing.assert_allclose(volume.spacing_mm, (2.5 * np.hypot(1, tilt), 0.9, 0.8), rtol=1e-6)
    unmoved = [{"ImagePositionPatient": [0, y, z]} for _, y, z in places]
    reference = read_volume(write_series(tmp_path / "unmoved", voxels, elements=unmoved))
    assert reference.findings == lean
    np.testing.assert_allclose(
        volume.affine[:3, :3],
        reference.affine[:3, :3],
        atol=1e-6,
        err_msg="most slices say where the stack goes",
    )


def test_a_slice_within_half_a_pixel_of_the_line_is_in_its_place(tmp_path):
    elements = [{"ImagePositionPatient": [0.3 * (k == 2), 0, 2.5 * k]} for k in range(5)]
    assert read_volume(write_series(tmp_path / "s", phantom(), elements=elements)).findings == ()


def test_gantry_tilt_is_found(tmp_path):
    tilted = RAS.copy()
    tilted[1, 2] = np.tan(np.radians(12)) * RAS[2, 2]
    volume = read_volume(write_series(tmp_path / "s", phantom(), tilted))
    assert volume.findings == ("gantry_tilt: slices are 12.0 degrees off the perpendicular",)


@pytest.mark.parametrize(
    ("element", "message"),
    [
        ({"SeriesInstanceUID": "1.2.9"}, "2 series in one"),
        ({"PatientID": "another"}, "more than one patient"),
        ({"PixelSpacing": [0.9, 0.85]}, "different PixelSpacing"),
        ({"PixelSpacing": None}, "different PixelSpacing"),
        ({"ImageOrientationPatient": [1, 0, 0, 0, 0, -1]}, "different ImageOrientationPatient"),
        ({"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]}, "no pair of perpendicular directions"),
        ({"ImagePositionPatient": None}, "no order in space"),
        ({"ImagePositionPatient": [1, 2]}, "not 3 numbers"),
        ({"ImagePositionPatient": [1, 2, "1e300"]}, "not 3 numbers below"),
        ({"Rows": 7, "Columns": 6}, "different Rows or Columns"),
        ({"RescaleSlope": 0}, "RescaleSlope is 0"),
        ({"RescaleIntercept": -1024}, "RescaleSlope or RescaleIntercept in some slices only"),
        ({"RescaleSlope": 2}, "RescaleSlope or RescaleIntercept in some slices only"),
        ({"PhotometricInterpretation": "MONOCHROME1"}, "different PhotometricInterpretation"),
        ({"PixelData": b"12"}, "damaged or truncated"),
        ({"PixelData": None}, "no pixel data"),
        ({"NumberOfFrames": 3}, "several frames without a position each"),
        ({"Rows": 60_000, "Columns": 60_000}, "over the limit"),
    ],
)
def test_what_is_no_single_stack_is_refused(tmp_path, element, message):
    folder = write_series(tmp_path / "s", phantom(), elements=[{}, {}, element])
    with pytest.raises(ValueError, match=f"^DICOM series: .*{message}") as refusal:
        read_volume(folder)
    assert "\n" not in str(refusal.value)
    assert NAME not in str(refusal.value)


def test_spacing_that_the_series_lacks_can_be_given(tmp_path):
    folder = write_series(tmp_path / "s", phantom(), PixelSpacing=None)
    with pytest.raises(ValueError, match=r"no PixelSpacing; .*give spacing_mm"):
        read_volume(folder)
    volume = read_volume(folder, spacing_mm=(2.5, 0.5, 0.5))
    assert volume.spacing_mm == (2.5, 0.5, 0.5)
    assert volume.assumptions == ("no PixelSpacing: 2.5 x 0.5 x 0.5 mm (D, H, W) was taken as given",)


def test_one_slice_takes_its_thickness_as_an_assumption_and_never_in_a_stack(tmp_path):
    one = write_series(tmp_path / "one", phantom((7, 6, 1)), SliceThickness=4, SpacingBetweenSlices=5)
    volume = read_volume(next(one.iterdir()))
    assert volume.spacing_mm == (5, 0.9, 0.8)
    assert len(volume.assumptions) == 1
    bare = write_series(tmp_path / "bare", phantom((7, 6, 1)))
    with pytest.raises(ValueError, match="no distance between slices"):
        read_volume(bare)
    stack = read_volume(write_series(tmp_path / "s", phantom(), SliceThickness=4, SpacingBetweenSlices=5))
    assert (stack.spacing_mm[0], stack.assumptions) == (2.5, ())


def test_an_enhanced_object_reads_as_the_series_it_replaces(tmp_path):
    volume = read_volume(write_enhanced(tmp_path / "enhanced.dcm", phantom()))
    np.testing.assert_array_equal(volume.voxels, phantom().transpose(2, 1, 0) - 10)
    assert volume.spacing_mm == (2.5, 0.9, 0.8)


def zip_of(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, f"deep/{file.name}")
    return path


def test_a_zip_reads_as_its_folder_and_junk_of_the_system_is_passed_over(tmp_path):
    folder = write_series(tmp_path / "s", phantom())
    plain = read_volume(folder)
    for name in (".DS_Store", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"junk")
    expected = read_volume(folder)
    volume = read_volume(zip_of(folder, tmp_path / "s.zip"))
    np.testing.assert_array_equal(expected.voxels, plain.voxels)
    np.testing.assert_array_equal(volume.voxels, expected.voxels)
    assert volume.spacing_mm == expected.spacing_mm


def test_slices_in_a_folder_beside_the_others_are_not_left_out_in_silence(tmp_path):
    folder = write_series(tmp_path / "s", phantom())
    expected = read_volume(folder).voxels
    for name in ("empty", ".hidden", "__MACOSX"):
        (folder / name).mkdir()
    (folder / ".hidden" / "1.dcm").write_bytes(b"junk")
    (folder / "__MACOSX" / "._1.dcm").write_bytes(b"junk")
    np.testing.assert_array_equal(read_volume(folder).voxels, expected)
    (folder / "part2" / "deep").mkdir(parents=True)
    moved = sorted(path for path in folder.iterdir() if path.is_file())[-1]
    moved.rename(folder / "part2" / "deep" / moved.name)
    with pytest.raises(
        ValueError, match=r"^DICOM series: files in a folder within it; give one folder per series"
    ):
        read_volume(folder)


def test_a_zip_is_read_slice_by_slice_into_little_more_than_its_volume(tmp_path):
    voxels = np.random.default_rng(0).integers(-1000, 1000, (128, 128, 96)).astype(np.int16)
    path = zip_of(write_series(tmp_path / "s", voxels), tmp_path / "s.zip")
    read_volume(path)  # the libraries' own tables
    tracemalloc.start()
    volume = read_volume(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    np.testing.assert_array_equal(volume.voxels, voxels.transpose(2, 1, 0))
    assert peak_bytes < 1.25 * volume.voxels.nbytes


def test_a_member_too_large_for_one_file_and_one_that_is_no_dicom_are_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "s.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.dcm", bytes(200 << 20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="no DICOM image in it"):
        read_volume(path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 10 << 20
    monkeypatch.setattr(volumes, "MAX_FILE_BYTES", 100 << 20)
    with pytest.raises(ValueError, match=f"a member claims {200 << 20} bytes, over the limit of {100 << 20}"):
        read_volume(path)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("stated", [None, "MONOCHROM"])
def test_an_unknown_photometric_interpretation_of_a_series_can_be_given(tmp_path, stated, packed):
    source = write_series(tmp_path / "s", phantom(), PhotometricInterpretation=stated)
    if packed:
        source = zip_of(source, tmp_path / "s.zip")
    with pytest.raises(
        ValueError, match=r"PhotometricInterpretation is missing or unknown; .* or give photometric"
    ):
        read_volume(source)
    for given in ("MONOCHROME1", "MONOCHROME2"):
        volume = read_volume(source, photometric=given)
        # Voxels keep the file's scale: nothing is turned.
        np.testing.assert_array_equal(volume.voxels, phantom().transpose(2, 1, 0))
        assert volume.assumptions == (
            f"no known PhotometricInterpretation in the file: {given} was taken as given",
        )
    with pytest.raises(ValueError, match="its PhotometricInterpretation is not read"):
        read_volume(source, photometric="RGB")
    stating = write_series(tmp_path / "stating", phantom())
    with pytest.raises(ValueError, match="MONOCHROME1 was given, but the file says MONOCHROME2; remove it"):
        read_volume(stating, photometric="MONOCHROME1")


def test_a_file_that_is_no_dicom_is_refused_since_it_may_be_a_slice_cut_off(tmp_path):
    folder = write_series(tmp_path / "s", phantom())
    last = sorted(folder.iterdir())[-1]
    last.write_bytes(last.read_bytes()[:100])
    with pytest.raises(ValueError, match="1 files in it are no DICOM"):
        read_volume(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no DICOM image in it"):
        read_volume(tmp_path / "empty")


def test_a_zip_bomb_is_refused_by_its_claims_before_anything_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(volumes, "MAX_UNPACKED_BYTES", 100_000)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.dcm", bytes(200_000))
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(ValueError, match=r"^zip of DICOM slices: claims 200000 bytes unpacked"):
        read_volume(path)


def test_too_many_members_and_a_false_claim_are_refused(tmp_path, monkeypatch):
    path = zip_of(write_series(tmp_path / "s", phantom()), tmp_path / "s.zip")
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        size_bytes = archive.infolist()[0].file_size
    # The first member claims 8 bytes in the archive's table of contents.
    place = data.index(b"PK\x01\x02") + 24
    assert struct.unpack("<I", data[place : place + 4]) == (size_bytes,)
    path.write_bytes(data[:place] + struct.pack("<I", 8) + data[place + 4 :])
    with pytest.raises(ValueError, match=r"^zip of DICOM slices: "):
        read_volume(path)
    path.write_bytes(data)
    monkeypatch.setattr(volumes, "MAX_SLICES", 4)
    with pytest.raises(ValueError, match="5 members, over the limit of 4"):
        read_volume(path)
    with pytest.raises(ValueError, match="5 files, over the limit of 4"):
        read_volume(tmp_path / "s")


def test_a_stack_of_too_many_voxels_is_refused_before_it_is_allocated(tmp_path, monkeypatch):
    folder = write_series(tmp_path / "s", phantom())
    monkeypatch.setattr(volumes, "MAX_VOXELS", 200)
    with pytest.raises(ValueError, match="claims 5 x 6 x 7 voxels, over the limits"):
        read_volume(folder)


# --- the mirror ---------------------------------------------------------------------------------------


def test_mirror_hippocampus_reads_as_nibabel_reads_it(mirror):
    paths = sorted((mirror / "hippocampus/images").glob("*.nii.gz"))
    assert len(paths) == 200
    for path in paths:
        volume = read_volume(path)
        reference = nibabel.load(path)
        stored = np.asanyarray(reference.dataobj)
        assert volume.voxels.dtype == stored.dtype
        np.testing.assert_array_equal(volume.voxels, stored.transpose(2, 1, 0))
        assert volume.spacing_mm == (1, 1, 1)
        assert (volume.assumptions, volume.findings) == ((), ())
        mask = read_mask(mirror / "hippocampus/labels" / path.name, volume)
        assert set(np.unique(mask)) == {0, 1, 2}


def test_mirror_mask_of_another_size_is_refused(mirror):
    image = read_volume(next((mirror / "hippocampus/images").glob("*.nii.gz")))
    for path in sorted((mirror / "hippocampus/orphans/labels").iterdir()):
        with pytest.raises(ValueError, match=r"^mask: its shape"):
            read_mask(path, image)


def test_mirror_ct_has_its_hounsfield_units_and_its_mask(mirror):
    volume = read_volume(mirror / "dicom_ct/example_ct_sm.nii.gz")
    assert volume.voxels.shape == (30, 101, 122)
    assert volume.voxels.dtype == np.int16
    assert (volume.voxels.min(), volume.voxels.max()) == (-1100, 1207)
    assert volume.spacing_mm == (3, 3, 3)
    assert volume.assumptions == ("the header names no unit of length: mm was taken",)
    mask = read_mask(mirror / "dicom_ct/example_ct_sm_T300_output.nii.gz", volume)
    # The mask marks what is dense: turned round on any axis it would mark more air.
    inside = [np.flip(volume.voxels, axes)[mask == 1].mean() for axes in ((), (0,), (1,), (2,))]
    assert np.argmax(inside) == 0


def test_mirror_mr_series_is_sorted_by_place(mirror):
    folder = mirror / "dicom_ct/tcia_PGBM-003/11-T1post-18670"
    volume = read_volume(folder)
    assert volume.voxels.shape == (22, 320, 280)
    assert volume.spacing_mm == (6.5, 0.6875, 0.6875)
    assert volume.findings == ("oblique: axes are turned by 10.8 degrees from the body's",)
    headers = sorted(map(pydicom.dcmread, folder.iterdir()), key=lambda h: float(h.ImagePositionPatient[2]))
    stack = np.stack([header.pixel_array for header in headers])
    # Rows run to the back and columns to the left in this axial series: both turn round.
    np.testing.assert_array_equal(volume.voxels, stack[:, ::-1, ::-1])
    assert volume.attributes == {"scanner": "SIEMENS Espree", "sex": "M", "age": 41.0}


def test_mirror_cropped_series(mirror):
    volume = read_volume(mirror / "dicom_ct/tcia_PGBM-003/11_HCropVolume")
    assert volume.voxels.shape == (40, 50, 34)
    assert volume.spacing_mm == (1, 1, 1)
    assert (volume.voxels.min(), volume.voxels.max()) == (2, 194)


# --- broken files -------------------------------------------------------------------------------------

FUZZ = """
import json, sys, time
from pathlib import Path
import numpy as np
from cadx.reading.volumes import read_volume

folder, seed, number = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
rng = np.random.default_rng(seed)
sources = [folder / name for name in ("v.nii", "v.nii.gz", "v2.nii", "series", "s.zip", "enhanced.dcm")]
shapes = {source: read_volume(source).voxels.shape for source in sources}
problems, refused, slowest = [], 0, 0.0
for case in range(number):
    source = sources[case % len(sources)]
    file = source if source.is_file() else sorted(source.iterdir())[case % len(list(source.iterdir()))]
    whole = file.read_bytes()
    data = bytearray(whole)
    if case % 3 == 0:
        data = data[: int(rng.integers(len(data)))]
    else:
        # Headers are where lies do harm: half of the cases change bytes there.
        reach = len(data) if case % 2 else min(len(data), 1400)
        for place in rng.integers(reach, size=int(rng.integers(1, 9))):
            data[place] = int(rng.integers(256))
    file.write_bytes(data)
    started = time.process_time()  # what others do on the machine does not count
    try:
        shape = read_volume(source).voxels.shape
        if shape != shapes[source]:
            problems.append(f"{case}: {source.name} has the shape {shape}")
    except ValueError as error:
        refused += 1
        if "\\n" in str(error) or "Ignatowska" in str(error) or file.name in str(error):
            problems.append(f"{case}: {error}")
    except BaseException as error:
        problems.append(f"{case}: {source.name}: {type(error).__name__}")
    slowest = max(slowest, time.process_time() - started)
    file.write_bytes(whole)
status = Path("/proc/self/status").read_text()
peak_kib = int(status.split("VmHWM:")[1].split()[0])
print(json.dumps({"problems": problems, "refused": refused, "slowest": slowest, "peak_kib": peak_kib}))
"""


@pytest.mark.parametrize(("seed", "number"), [(0, 300), pytest.param(1, 10_000, marks=pytest.mark.slow)])
def test_broken_files_are_refused_or_keep_their_shape_and_never_crash_hang_or_flood(tmp_path, seed, number):
    write_nifti(tmp_path / "v.nii", phantom((12, 11, 10)))
    write_nifti(tmp_path / "v.nii.gz", phantom((12, 11, 10)), rotation(15))
    write_nifti(tmp_path / "v2.nii", phantom((12, 11, 10)), version=nibabel.Nifti2Image)
    zip_of(write_series(tmp_path / "series", phantom()), tmp_path / "s.zip")
    write_enhanced(tmp_path / "enhanced.dcm", phantom())
    run = subprocess.run(
        [sys.executable, "-c", FUZZ, str(tmp_path), str(seed), str(number)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    assert found["problems"] == []
    assert found["refused"] > number / 3
    assert found["slowest"] < 2
    assert found["peak_kib"] < 1 << 20
