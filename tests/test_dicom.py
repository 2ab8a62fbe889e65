"""Who is named in a file, whatever its format; and DICOM images of several frames."""

import gzip
import io
import struct
import zipfile
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image, PngImagePlugin
from pydicom.dataset import Dataset
from pydicom.pixels import apply_rescale
from pydicom.sequence import Sequence
from pydicom.uid import (
    MultiFrameGrayscaleByteSecondaryCaptureImageStorage,
    RLELossless,
)
from test_reading import NAME, dicom_dataset, encode

from cadx.reading.dicom import IDENTIFYING_KEYWORDS, dicom_identifiers
from cadx.reading.identifiers import file_identifiers
from cadx.reading.images import read_image
from cadx.reading.vocabulary import LABEL_IMAGES

GRAY = np.random.default_rng(0).integers(0, 256, (16, 24), dtype=np.uint8)


def dicom(stored: np.ndarray = GRAY, **elements: object) -> Dataset:
    """A minimal DICOM data set; `stored` is H W or frames H W."""
    frames: dict[str, object] = {"SOPClassUID": MultiFrameGrayscaleByteSecondaryCaptureImageStorage}
    if stored.ndim == 3:
        frames |= {"NumberOfFrames": len(stored), "Rows": stored.shape[1], "Columns": stored.shape[2]}
    return dicom_dataset(stored, **(frames | elements))


def picture(kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(GRAY).save(stream, kind, **options)
    return stream.getvalue()


def found(tmp_path: Path, data: bytes) -> tuple[str, ...]:
    path = tmp_path / "file"  # no name says what it is
    path.write_bytes(data)
    names = file_identifiers(path)
    for part in NAME.split("^"):
        assert part not in repr(names)
    return names


# --- DICOM --------------------------------------------------------------------------------------------


OVERLAYS = {"OverlayComments": (0x4000, "LT"), "OverlayData": (0x3000, "OW")}


@pytest.mark.parametrize("keyword", sorted(IDENTIFYING_KEYWORDS - OVERLAYS.keys()))
def test_every_direct_identifier_of_the_profile_is_found_at_any_depth(keyword):
    vr = pydicom.datadict.dictionary_VR(keyword)
    values: dict[str, object] = {"SQ": Sequence([dicom(CodeValue="7")]), "DA": "19500101", "TM": "1200"}
    value = values.get(vr, "4711")
    inner = Dataset()
    for holder in (plain := dicom()), inner:
        setattr(holder, keyword, value)
    nested = dicom(ReferencedStudySequence=Sequence([inner]))
    assert keyword in dicom_identifiers(encode(plain))
    assert keyword in dicom_identifiers(encode(nested))


@pytest.mark.parametrize("group", [0x6000, 0x601E])
@pytest.mark.parametrize("keyword", OVERLAYS)
def test_what_is_drawn_or_written_on_any_overlay_is_found(keyword, group):
    number, vr = OVERLAYS[keyword]
    ds = dicom()
    ds.add_new((group, number), vr, NAME if vr == "LT" else b"\1\0")
    assert dicom_identifiers(encode(ds)) == (keyword,)


@pytest.mark.parametrize(
    "keyword",
    [
        "AdmittingDiagnosesDescription", "Allergies", "MedicalAlerts", "Occupation", "ReasonForStudy",
        "ReasonForTheImagingServiceRequest", "ReasonForTheRequestedProcedure", "ReasonForVisit",
    ],
)  # fmt: skip
def test_what_was_written_of_the_patient_for_the_request_is_found(keyword):
    assert dicom_identifiers(encode(dicom(**{keyword: "fell from a ladder"}))) == (keyword,)


def test_a_name_in_a_private_element_is_found_and_its_tag_said():
    ds = dicom()
    block = ds.private_block(0x0029, "CADX TEST", create=True)
    block.add_new(0x10, "PN", NAME)
    assert dicom_identifiers(encode(ds)) == ("(0029,1010)",)


def test_what_no_dataset_stores_is_no_obstacle():
    """Dates, UIDs, descriptions and the institution would stop nearly every file."""
    common = {
        "StudyDate": "20200101", "StudyInstanceUID": "1.2.3.4", "StudyDescription": "CHEST PA",
        "InstitutionName": "Alder Valley", "PatientSex": "F", "PatientAge": "061Y",
    }  # fmt: skip
    assert dicom_identifiers(encode(dicom(**common))) == ()


def test_a_text_that_repeats_the_patients_name_or_number_is_found():
    """People type names into descriptions; one that the header itself gives away needs no list."""
    header = {"PatientName": "ANDERSSON^JO", "PatientID": "47110815", "PatientIdentityRemoved": "NO"}
    described = dicom(**header, StudyDescription="CT Andersson, control", ProtocolName="chest 47110815")
    described.private_block(0x0029, "CADX TEST", create=True).add_new(0x10, "LO", "seen with Mr. Andersson")
    quiet = dicom(
        **header, StudyDescription="CT control", ProtocolName="Jo"
    )  # too short to be told from a word
    expected = {"(0029,1010)", "PatientID", "PatientName", "ProtocolName", "StudyDescription"}
    assert set(dicom_identifiers(encode(described))) == expected
    assert dicom_identifiers(encode(quiet)) == ("PatientID", "PatientName")


@pytest.mark.parametrize(
    "keyword", ["InstitutionName", "Manufacturer", "ManufacturerModelName", "ViewPosition"]
)
@pytest.mark.parametrize("patient", ["", "DOE^JANE"])
def test_what_would_be_stored_is_reported_and_left_out_where_it_names_someone(keyword, patient):
    for text in ("DOE^JANE", "Jane Doe")[: 2 if patient else 1]:
        told = encode(dicom(PatientName=patient, **{keyword: text}))
        assert keyword in dicom_identifiers(told)
        image = read_image(told)
        assert not {"site", "scanner", "view"} & image.attributes.keys()
        assert f"{keyword} was left out: it names somebody" in image.assumptions


@pytest.mark.parametrize(
    ("patient", "removed"), [("HALL^MARY", "NO"), ("STMARY-0012", "YES"), ("ST^MARY^HOSPITAL", "YES")]
)
def test_a_clinic_that_shares_a_word_with_its_patient_stays(patient: str, removed: str):
    header = {"PatientName": patient, "PatientID": patient, "PatientIdentityRemoved": removed}
    image = read_image(encode(dicom(**header, InstitutionName="St. Mary Hospital", Manufacturer="HALL")))
    assert image.attributes["site"] == "St. Mary Hospital"
    assert image.attributes["scanner"] == "HALL"


def test_a_text_is_no_longer_than_dicom_allows():
    image = read_image(encode(dicom(InstitutionName="North " * 1000)))
    assert image.attributes["site"] == ("North " * 11)[:64]
    assert "InstitutionName was cut to 64 characters, all that DICOM allows" in image.assumptions


def test_a_study_that_is_called_head_routine_is_nobody():
    assert dicom_identifiers(encode(dicom(StudyDescription="Head^Routine"))) == ()


def test_the_mirrors_named_series_is_found_as_a_folder_and_as_a_zip(mirror, tmp_path):
    series = mirror / "dicom_ct" / "tcia_PGBM-003" / "11-T1post-18670"
    expected = ("AccessionNumber", "PatientName")
    assert file_identifiers(series) == expected
    with zipfile.ZipFile(tmp_path / "series.zip", "w") as archive:
        archive.writestr("readme.txt", "no image")
        for path in sorted(series.iterdir())[:3]:
            archive.write(path, path.name)
    assert file_identifiers(tmp_path / "series.zip") == expected


@pytest.mark.parametrize("compressed", [False, True])
def test_several_frames_are_refused_unless_one_is_asked_for(compressed):
    frames = np.random.default_rng(1).integers(0, 256, (3, 16, 24), dtype=np.uint8)
    ds = dicom(frames)
    if compressed:
        ds.compress(RLELossless)
    data = encode(ds)
    with pytest.raises(ValueError, match="several frames; export each image on its own, or ask for one"):
        read_image(data)
    for number in (1, 2, 3):
        np.testing.assert_array_equal(read_image(data, frame=number).pixels, frames[number - 1])
    for number in (0, 4, -1):
        with pytest.raises(ValueError, match=f"no frame {number}: it has 3, counted from 1"):
            read_image(data, frame=number)
    np.testing.assert_array_equal(read_image(encode(dicom()), frame=1).pixels, GRAY)


def group(spacing: str, slope: str, centre: str, width: str) -> Dataset:
    """What an enhanced header says of one frame."""
    measures, transformation, window, whole = Dataset(), Dataset(), Dataset(), Dataset()
    measures.PixelSpacing = [spacing, spacing]
    transformation.RescaleSlope, transformation.RescaleIntercept = slope, "-1000"
    window.WindowCenter, window.WindowWidth = centre, width
    whole.PixelMeasuresSequence = Sequence([measures])
    whole.PixelValueTransformationSequence = Sequence([transformation])
    whole.FrameVOILUTSequence = Sequence([window])
    return whole


def test_an_enhanced_frame_has_its_own_spacing_slope_and_window():
    frames = np.random.default_rng(2).integers(0, 4096, (2, 16, 24)).astype(np.uint16)
    settings = [("0.5", "1", "300", "900"), ("0.8", "2", "1500", "2000")]
    ds = dicom(frames, PerFrameFunctionalGroupsSequence=Sequence([group(*one) for one in settings]))
    ds.BitsStored, ds.HighBit = 12, 11
    data = encode(ds)
    for number, (spacing, slope, centre, width) in enumerate(settings, start=1):
        image = read_image(data, frame=number)
        flat = dicom(RescaleSlope=slope, RescaleIntercept="-1000", WindowCenter=centre, WindowWidth=width)
        modality = apply_rescale(frames[number - 1], flat)
        unit = np.clip((modality - float(centre) + 0.5) / (float(width) - 1) + 0.5, 0, 1)
        np.testing.assert_allclose(image.pixels / 65535, unit, atol=0.51 / 65535)
        assert image.spacing_mm == (float(spacing), float(spacing))


@pytest.mark.parametrize("keyword", ["SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"])
def test_an_enhanced_object_of_one_frame_is_shown_as_its_groups_say_without_being_asked_for_it(keyword):
    stored = np.random.default_rng(2).integers(0, 4096, (16, 24)).astype(np.uint16)
    enhanced = dicom(stored, NumberOfFrames=1, **{keyword: Sequence([group("0.5", "2", "1500", "2000")])})
    plain = dicom(
        stored,
        PixelSpacing=["0.5", "0.5"],
        RescaleSlope="2",
        RescaleIntercept="-1000",
        WindowCenter="1500",
        WindowWidth="2000",
    )
    found, expected = (read_image(encode(ds)) for ds in (enhanced, plain))
    np.testing.assert_array_equal(found.pixels, expected.pixels)
    assert (found.spacing_mm, found.assumptions) == ((0.5, 0.5), ())


def test_frames_of_a_png():
    frames = [Image.fromarray(np.roll(GRAY, shift)) for shift in range(3)]
    stream = io.BytesIO()
    frames[0].save(stream, "PNG", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="PNG: several frames"):
        read_image(stream.getvalue())
    np.testing.assert_array_equal(read_image(stream.getvalue(), frame=3).pixels, np.roll(GRAY, 2))


# --- Pictures -----------------------------------------------------------------------------------------


def test_text_in_a_png_is_found(tmp_path):
    for key, compressed, name in (
        ("Author", False, "PNG text 'author'"),
        ("Description", True, "PNG text 'description'"),
        ("PatientName", False, "PNG text under a key of its own"),
        (NAME, False, "PNG text under a key of its own"),  # a key can be a name too
    ):
        info = PngImagePlugin.PngInfo()
        info.add_text(key, NAME, zip=compressed)
        info.add_text("Software", "matplotlib 3.10")
        assert found(tmp_path, picture("PNG", pnginfo=info)) == (name,)
    international = PngImagePlugin.PngInfo()
    international.add_itxt("Comment", NAME)
    assert found(tmp_path, picture("PNG", pnginfo=international)) == ("PNG text 'comment'",)
    assert found(tmp_path, picture("PNG")) == ()
    empty = PngImagePlugin.PngInfo()
    empty.add_text("Author", "")
    assert found(tmp_path, picture("PNG", pnginfo=empty)) == ()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_is_found(tmp_path, kind):
    exif = Image.Exif()
    exif[0x010E] = NAME
    exif[0x0131] = "some program"
    exif.get_ifd(0x8769)[0x9286] = b"ASCII\x00\x00\x00" + NAME.encode()
    exif.get_ifd(0x8825)[1] = "N"
    names = found(tmp_path, picture(kind, exif=exif))
    assert names == ("EXIF GPSInfo", "EXIF ImageDescription", "EXIF UserComment")
    place = Image.Exif()
    place.get_ifd(0x8825)[2] = (52.0, 30.0, 0.0)
    assert found(tmp_path, picture(kind, exif=place.tobytes())) == ("EXIF GPSInfo",)
    harmless = Image.Exif()
    harmless[0x0112] = 1  # orientation
    assert found(tmp_path, picture(kind, exif=harmless)) == ()


def test_comments_xmp_and_iptc_of_a_jpeg_are_found(tmp_path):
    assert found(tmp_path, picture("JPEG")) == ()
    assert found(tmp_path, picture("JPEG", comment=NAME)) == ("JPEG comment",)
    assert found(tmp_path, picture("JPEG", comment="CREATOR: gd-jpeg v1.0 (using IJG JPEG v80)")) == ()
    xmp = f"<x:xmpmeta><dc:creator>{NAME}</dc:creator></x:xmpmeta>".encode()
    assert found(tmp_path, picture("JPEG", xmp=xmp)) == ("XMP",)
    place = b'<x:xmpmeta><rdf:Description exif:GPSLatitude="52,30.5N"/></x:xmpmeta>'
    assert found(tmp_path, picture("JPEG", xmp=place)) == ("XMP",)
    body = b"Photoshop 3.0\x008BIM\x04\x04\x00\x00" + struct.pack(">I", 30) + NAME.encode()
    segment = b"\xff\xed" + struct.pack(">H", len(body) + 2) + body
    plain = picture("JPEG")
    assert found(tmp_path, plain[:2] + segment + plain[2:]) == ("IPTC",)


# --- Volumes and slides -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("big_endian", [False, True])
def test_free_text_and_extensions_of_nifti_are_found(tmp_path, version, packed, big_endian):
    def names(fields: dict[str, str], extension: bool = False) -> tuple[str, ...]:
        header = version.header_class(endianness=">" if big_endian else "<")
        image = version(np.zeros((4, 4, 4), np.uint8), np.eye(4), header=header)
        for field, value in fields.items():
            image.header[field] = value.encode()
        if extension:
            image.header.extensions.append(nibabel.nifti1.Nifti1Extension("comment", NAME.encode()))
        data = image.to_bytes()
        return found(tmp_path, gzip.compress(data) if packed else data)

    assert names({}) == ()
    for text in ("5.0.10", "FSL5.0", "TE=2.3;Time=101512.000", "SPM12 - normalised", "none"):
        assert names({"descrip": text}) == ()
    assert names({"descrip": NAME, "intent_name": "4711 Doe"}) == ("NIfTI descrip", "NIfTI intent_name")
    assert names({"aux_file": NAME}) == ("NIfTI aux_file",)
    assert names({}, extension=True) == ("NIfTI extension",)


def test_the_sets_of_the_mirror_name_nobody_but_where_it_says_so(mirror):
    for path in [
        *sorted((mirror / "hippocampus").rglob("*.nii.gz"))[:40],
        *sorted((mirror / "bccd").rglob("*.jpg"))[:40],
        *sorted((mirror / "nih_rsna_cxr").rglob("*.png"))[:20],
        mirror / "wsi" / "boxes.tiff",
        mirror / "wsi" / "broken.svs",
    ]:
        assert file_identifiers(path) == ()
    assert file_identifiers(mirror / "wsi" / "cmu-1-small-region.svs") == LABEL_IMAGES


def test_the_description_of_a_slide_is_found(tmp_path):
    def names(description: str) -> tuple[str, ...]:
        path = tmp_path / "slide.tif"
        tifffile.imwrite(
            path,
            np.full((256, 256, 3), 200, np.uint8),
            tile=(128, 128),
            photometric="rgb",
            compression="jpeg",
            description=description,
            metadata=None,
        )
        return file_identifiers(path)

    aperio = (
        "Aperio Image Library v11.2.1\r\n256x256 [0,0 256x256] (128x128) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    )
    assert names(aperio) == ()
    assert names(f"{aperio}|Patient = {NAME}|Title = {NAME}") == (
        "slide property about 'patient'",
        "slide property about 'title'",
    )


def test_damaged_files_give_one_line_or_nothing(tmp_path):
    rng = np.random.default_rng(0)
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", NAME)
    exif = Image.Exif()
    exif[0x010E] = NAME
    nifti = gzip.compress(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4)).to_bytes())
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a", encode(dicom(PatientName=NAME)))
    sources = [
        picture("PNG", pnginfo=info),
        picture("JPEG", exif=exif, comment=NAME),
        nifti,
        (tmp_path / "z").read_bytes(),
        encode(dicom(PatientName=NAME)),
    ]
    path = tmp_path / "file"
    for data in sources:
        for _ in range(60):
            damaged = bytearray(data)
            for at in rng.integers(4, len(data), rng.integers(1, 12)):
                damaged[at] = rng.integers(256)
            path.write_bytes(damaged[: rng.integers(1, len(damaged) + 1)])
            try:
                file_identifiers(path)
            except ValueError as error:
                assert "\n" not in str(error)  # noqa: PT017  both outcomes are allowed
                assert not any(part in str(error) for part in NAME.split("^"))  # noqa: PT017
