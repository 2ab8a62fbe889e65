"""Who is named in a slide, which enters a dataset byte for byte. Other formats: tests/test_dicom.py."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from test_slides import texture, whole_slide_dicom, write_vms

from cadx.phantom.cohort import Faults
from cadx.phantom.slide import SlidePhantom
from cadx.reading.identifiers import file_identifiers
from cadx.reading.vocabulary import LABEL_IMAGES

NAME = "Doe Jane"
RNG = np.random.default_rng(0)
APERIO = (
    "Aperio Image Library v11.2.1\r\n300x400 [0,0 300x400] (128x128) JPEG/RGB Q=70|AppMag = 20|StripeWidth = 2040"
    "|ScanScope ID = SS1302|Date = 12/29/09|Time = 09:59:15|Time Zone = GMT-07:00|Parmset = USM Filter|MPP = 0.4990"
    "|User = b414003d-95c6-48b0-9369-8010ed517ba7|Left = 25.691574|LineCameraSkew = -0.000424|Rack = 4|Slide = 1"
    "|ImageID = 1004486|Filename = 1004486|OriginalWidth = 300|Originalheight = 400|ICC Profile = ScanScope v1"
)


def names(path: Path, *, is_slide: bool = False) -> tuple[str, ...]:
    found = file_identifiers(path, is_slide=is_slide)
    assert not any(part in repr(found) for part in ("Doe", "Jane", "4711"))
    return found


def write(
    path: Path,
    description: str | None = None,
    *,
    tags: tuple[tuple[int, int, str | bytes], ...] = (),
    tags_on: int = 0,
    beneath: bool = False,
    extra: tuple[int, int] | None = None,
    extra_tile: tuple[int, int] | None = None,
) -> Path:
    """Three levels of tiles from 400 x 300 pixels, and an `extra` page of another size; `tags` on one level."""
    with tifffile.TiffWriter(path) as writer:
        for level in range(3):
            writer.write(
                texture(400 >> level, 300 >> level),
                tile=(128, 128),
                photometric="rgb",
                compression="jpeg",
                description=description if level == 0 else None,
                subfiletype=int(level > 0),
                subifds=2 if beneath and level == 0 else None,
                metadata=None,
                software=False,
                extratags=[(code, kind, len(value), value, True) for code, kind, value in tags]
                if level == tags_on
                else (),
            )
        if extra:
            writer.write(
                texture(*extra),
                tile=extra_tile,
                photometric="rgb",
                subfiletype=1,
                metadata=None,
                software=False,
            )
    return path


# --- Fields of a description ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field", ["Patient ID", "MRN", "Barcode", "Slide ID", "Title", "Accession", "Filename"]
)
def test_a_record_number_of_digits_is_no_setting_of_a_scanner(tmp_path: Path, field: str) -> None:
    assert len(names(write(tmp_path / "s.svs", f"{APERIO}|{field} = 47110815"))) == 1


@pytest.mark.parametrize(
    "field",
    [
        "Filename",
        "User",
        "DOB",
        "Subject",
        "Person",
        "Surgical No",
        "Rack",
        "AppMag",
        "Date",
        "Something New",
    ],
)
def test_a_name_is_found_under_every_heading(tmp_path: Path, field: str) -> None:
    assert len(names(write(tmp_path / "s.svs", f"{APERIO}|{field} = {NAME}"))) == 1


def test_a_field_that_stands_twice_is_looked_at_twice(tmp_path: Path) -> None:
    """OpenSlide keeps the last one."""
    assert names(write(tmp_path / "s.svs", f"{APERIO}|MPP = {NAME}|MPP = 0.4990")) != ()


@pytest.mark.parametrize("line", [f"{NAME}\r\n", "47110815;"])
def test_free_text_between_the_scanners_lines_is_found(tmp_path: Path, line: str) -> None:
    head, _, rest = APERIO.partition("\r\n")
    assert names(write(tmp_path / "s.svs", f"{head}\r\n{line}{rest}")) == ("slide description",)


def test_what_the_scanner_says_of_itself_names_nobody(tmp_path: Path) -> None:
    gt450 = (
        "Aperio Leica Biosystems GT450 v1.0.1 \r\n300x400 [0,0,300x400] (128x128) JPEG/YCC Q=91|AppMag = 40"
        "|Date = 05/10/2022|Exposure Scale = 0.000001|Exposure Time = 8|Gamma = 2.2|Rack = 4|Slide = 1|MPP = 0.2639"
    )
    for number, text in enumerate((APERIO, gt450, '{"shape": [400, 300, 3]}', None)):
        assert names(write(tmp_path / f"{number}.svs", text)) == ()


@pytest.mark.parametrize("text", ["Scan of Doe Jane", NAME, "47110815", "Slide scan; Patient = Doe Jane"])
def test_a_plain_description_is_found(tmp_path: Path, text: str) -> None:
    assert "slide description" in names(write(tmp_path / "s.tiff", text))


def test_a_description_in_xml_is_taken_apart(tmp_path: Path) -> None:
    def philips(barcode: str) -> str:
        return (
            '<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">'
            '<Attribute Name="DICOM_PIXEL_SPACING" Group="0x0028" Element="0x0030" PMSVR="IDoubleArray">'
            '"0.000226891" "0.000226907"</Attribute><Attribute Name="PIM_DP_UFS_BARCODE" Group="0x301D"'
            f' Element="0x1002" PMSVR="IString">{barcode}</Attribute></DataObject>'
        )

    assert names(write(tmp_path / "a.tiff", philips(""))) == ()
    assert names(write(tmp_path / "b.tiff", philips("NDcxMTA4MTU="))) == ("slide property about 'barcode'",)
    assert names(write(tmp_path / "c.tiff", philips("4711"))) == ("slide property about 'barcode'",)
    assert names(write(tmp_path / "d.tiff", philips("") + "<")) == ("slide description",)


# --- Tags ----------------------------------------------------------------------------------------------

ASCII, BYTE, UNDEFINED = 2, 1, 7


@pytest.mark.parametrize("beneath", [False, True])
@pytest.mark.parametrize("tags_on", [0, 2])
@pytest.mark.parametrize(
    ("code", "kind", "tag"),
    [
        (269, ASCII, "DocumentName"),
        (315, ASCII, "Artist"),
        (316, ASCII, "HostComputer"),
        (285, ASCII, "PageName"),
        (33432, ASCII, "Copyright"),
        (700, BYTE, "XMP"),
        (65000, ASCII, "65000"),
        (65001, UNDEFINED, "65001"),
    ],
)
def test_a_text_is_found_in_every_tag_of_every_page(
    tmp_path: Path, code: int, kind: int, tag: str, tags_on: int, beneath: bool
) -> None:
    for text in (NAME, "47110815"):
        value = text if kind == ASCII else text.encode()
        path = write(tmp_path / "s.tiff", tags=((code, kind, value),), tags_on=tags_on, beneath=beneath)
        assert names(path) == (f"TIFF tag {tag}",)


def test_a_text_behind_another_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "s.tiff", "Aperio Image Library v1.2.345678901")
    data = path.read_bytes()
    assert data.count(b".345678901") == 1
    path.write_bytes(data.replace(b".345678901", b"\0" + NAME.encode() + b"\0"))
    assert names(path) == ("slide description",)


def test_devices_and_dates_in_tags_name_nobody(tmp_path: Path) -> None:
    tags = ((271, ASCII, "Orrery"), (272, ASCII, "Flatbed 20"), (306, ASCII, "2020:01:02 03:04:05"))
    assert (
        names(write(tmp_path / "s.tiff", tags=(*tags, (305, ASCII, "NDP.scan 2.5.86"), (315, ASCII, " "))))
        == ()
    )


# --- Pictures ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, (64, 64)])
@pytest.mark.parametrize("beneath", [False, True])
def test_a_page_that_is_no_level_and_no_thumbnail_may_be_the_label(
    tmp_path: Path, tile: tuple[int, int] | None, beneath: bool
) -> None:
    found = names(write(tmp_path / "s.tiff", extra=(90, 120), extra_tile=tile, beneath=beneath))
    assert found == LABEL_IMAGES[:1]


def test_the_first_picture_of_an_aperio_file_may_be_its_label(tmp_path: Path) -> None:
    """OpenSlide calls it the thumbnail, whatever it shows."""
    path = tmp_path / "s.svs"
    with tifffile.TiffWriter(path) as writer:
        common = {"photometric": "rgb", "metadata": None, "software": False}
        writer.write(texture(400, 300), tile=(128, 128), compression="jpeg", description=APERIO, **common)
        writer.write(texture(90, 120), **common)
    assert names(path) == LABEL_IMAGES[:1]


@pytest.mark.parametrize("thumbnail", [(100, 75), (67, 50), (133, 100)])
def test_levels_and_thumbnails_are_no_labels(tmp_path: Path, thumbnail: tuple[int, int]) -> None:
    for beneath in (False, True):
        assert names(write(tmp_path / "s.tiff", extra=thumbnail, beneath=beneath)) == ()


def test_pages_without_end_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "s.tiff"
    with tifffile.TiffWriter(path) as writer:
        for _ in range(1100):
            writer.write(np.zeros((16, 16, 3), np.uint8), tile=(16, 16), photometric="rgb", metadata=None)
    with pytest.raises(ValueError, match=r"^a TIFF of more than 1024 pages; export the slide alone$"):
        file_identifiers(path)


# --- Whole files ---------------------------------------------------------------------------------------


def test_the_mirrors_slides_name_nobody_but_on_their_label(mirror: Path) -> None:
    for is_slide in (False, True):
        assert names(mirror / "wsi/cmu-1-small-region.svs", is_slide=is_slide) == LABEL_IMAGES
        for name in ("boxes.tiff", "small.svs", "broken.svs"):
            assert names(mirror / "wsi" / name, is_slide=is_slide) == ()


def test_the_phantoms_slides_are_told_apart_in_both_formats(tmp_path: Path) -> None:
    config = SlidePhantom(num_patients=6, slides_per_patient=1, size_um=256, seed=3)
    config.write(tmp_path / "clean")
    config.model_copy(update={"faults": Faults(identifiers=6)}).write(tmp_path / "named")
    clean, named = (sorted((tmp_path / name / "images").iterdir()) for name in ("clean", "named"))
    assert [path.name for path in clean if file_identifiers(path, is_slide=True)] == []
    aperio = [b"Aperio" in path.read_bytes() for path in named]
    assert True in aperio
    assert False in aperio
    assert all(file_identifiers(path, is_slide=True) for path in named)


def test_a_slide_that_is_no_tiff_is_asked_too(tmp_path: Path) -> None:
    path = write_vms(tmp_path, Reference=47110815, Operator=NAME)
    assert names(path) == ()
    assert names(path, is_slide=True) == (
        "macro image",
        "slide description",
        "slide property about 'reference'",
    )


def test_a_dicom_slide_is_judged_by_its_header(tmp_path: Path) -> None:
    path = tmp_path / "s.dcm"
    path.write_bytes(whole_slide_dicom())
    assert names(path, is_slide=True) == ()
    ds = pydicom.dcmread(path)
    ds.PatientName = NAME
    ds.save_as(path)
    assert names(path, is_slide=True) == ("PatientName",)


def test_a_picture_in_a_slides_place_is_looked_at_as_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "s.mrxs"
    Image.fromarray(texture(16, 16)).save(path, "JPEG", comment=NAME)
    assert names(path, is_slide=True) == ("JPEG comment",)


def test_damaged_slides_give_one_line_or_nothing(tmp_path: Path) -> None:
    sound = write(tmp_path / "s.tiff", f"{APERIO}|Patient = {NAME}", tags=((315, ASCII, NAME),)).read_bytes()
    path = tmp_path / "damaged"
    for _ in range(200):
        damaged = bytearray(sound)
        for at in RNG.integers(4, len(damaged), RNG.integers(1, 40)):
            damaged[at] = RNG.integers(256)
        path.write_bytes(damaged)
        try:
            names(path)
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017  both outcomes are allowed
            assert "Doe" not in str(error)  # noqa: PT017
