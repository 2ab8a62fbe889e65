"""What in a file of any format names a patient: the places where it stands, never what stands there.

A text that is free to hold anything is taken for an identifier, unless it is known to be the signature of
a program. Names of fields that are not known by themselves are not repeated: they are free text too.
"""

import gzip
import logging
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from cadx.reading.dicom import dicom_identifiers, discreet
from cadx.reading.source import HEAD_BYTES, MAX_FILE_BYTES, read_bytes, sniff
from cadx.reading.vocabulary import LABEL_IMAGES

if TYPE_CHECKING:
    import tifffile

_MAX_MEMBERS = 1 << 13
_MAX_UNPACKED_BYTES = 1 << 31  # of a zip: what its headers claim is checked before anything is unpacked
_MAX_HEADER_BYTES = 1 << 16  # of a NIfTI header with its extensions

# Signatures of programs, and settings of a scanner, as they stand in comments of JPEG, NIfTI and TIFF files.
_HARMLESS = re.compile(
    r"""[\s\d.,:;+_x()\[\]/-]*
    | none
    | (AppleMark|CREATOR:\ gd-jpeg|Lavc|LEAD\ Technologies|Intel\(R\)\ JPEG|File\ written\ by\ Adobe
      |Optimized\ by\ JPEGmini|FSL|FreeSurfer|SPM|ITK|ANTS|AFNI|dcm2nii|nibabel|MRtrix|SimpleITK|MITK|mri_
      |3D\ Slicer)[\x20-\x7e]{0,60}
    | (TE|TR|TI|Time|phase|mb|FA|dwell)=[-\d.]+([;\ ]+(TE|TR|TI|Time|phase|mb|FA|dwell)=[-\d.]+)*;?
    """,
    re.VERBOSE,
)
_PNG_HARMLESS = {
    "software",
    "creation time",
    "date:create",
    "date:modify",
    "date:timestamp",
    "gamma",
    "copyright",
}
_PNG_KNOWN = {
    "author",
    "comment",
    "description",
    "disclaimer",
    "source",
    "title",
    "warning",
    "xml:com.adobe.xmp",
}
_EXIF = {
    0x010D: "DocumentName", 0x010E: "ImageDescription", 0x013B: "Artist", 0x8298: "Copyright",
    0x9C9B: "XPTitle", 0x9C9C: "XPComment", 0x9C9D: "XPAuthor", 0x9C9E: "XPKeywords", 0x9C9F: "XPSubject",
    0x9286: "UserComment", 0xA430: "CameraOwnerName", 0x8825: "GPSInfo",
}  # fmt: skip
_EXIF_FOLDER, _GPS_FOLDER = 0x8769, 0x8825
_XMP_FIELDS = re.compile(
    rb"dc:(creator|title|description|subject)|patient|exif:GPS|OwnerName|PersonInImage|CaptionWriter",
    re.IGNORECASE,
)
_NIFTI_FIELDS = {
    1: {
        "data_type": (4, 10),
        "db_name": (14, 18),
        "descrip": (148, 80),
        "aux_file": (228, 24),
        "intent_name": (328, 16),
    },
    2: {"descrip": (240, 80), "aux_file": (320, 24), "intent_name": (508, 16)},
}
_NIFTI_SIZES = {348: 1, 540: 2}
_TIFF_MAGIC = (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+")
_MAX_TIFF_PAGES = 1024
_MAX_TAG_BYTES = 1 << 24
_DESCRIPTION, _HAMAMATSU_FIELDS, _XMP = 270, 65449, 700
_DEVICE_TAGS = (271, 272, 305, 306)  # Make, Model, Software, DateTime
_BINARY_TAGS = (347, 34675)  # JPEG tables, ICC profile
_EXIF_TECHNICAL = re.compile(r"^(Date|Time|OffsetTime|SubsecTime|ExifVersion|FlashpixVersion|Components)")

# A slide's fields are known to be harmless or are reported: by the field's own name, and by what it may hold
# there, so that no name hides in a number. Digits alone are no excuse elsewhere: record numbers are digits.
_NUMBER = r'(?=.*\d)[-+\d.,:/\sTZxe()\[\]%"]{1,200}|true|false'
_WORDS = r"[\x20-\x7e]{1,100}"
_HARMLESS_FIELDS = tuple(
    (re.compile(names, re.VERBOSE | re.IGNORECASE), re.compile(values, re.IGNORECASE))
    for names, values in (
        (  # Aperio
            r"""AppMag|MPP|StripeWidth|Date|Time|Left|Top|OriginalWidth|OriginalHeight|LineCameraSkew
            |LineArea[XY]Offset|Focus\ Offset|Filtered|DisplayColor|Exposure\ (Time|Scale)|Gamma
            |CalibrationAverage(Red|Green|Blue)|ImageID""",
            _NUMBER,
        ),
        (r"ScanScope\ ID|DSR\ ID|Parmset|ICC\ Profile|SessonMode|ScannerType|Time\ Zone", _WORDS),
        # A key of the scanner's own; a login is a name.
        (r"User|uuid", r"(urn:uuid:)?[\da-f]{8}(-[\da-f]{4}){3}-[\da-f]{12}"),
        (r"Rack|Slide", r"\d{1,2}"),  # where in the scanner it lay
        (  # Hamamatsu
            r"""Created|Updated|SourceLens|[XYZ]OffsetFromSlideCent(re|er)|Physical(Macro)?(Width|Height)
            |Objective\.Lens\.Magnificant|Jpeg(Quality|Rows|Columns)|No(JpegRows|JpegColumns|Layers)|LayerSpacing""",
            _NUMBER,
        ),
        (r"Product|(NDP|Macro)\.S/N|Hardware(Model|Serial)", _WORDS),
        (  # Leica
            r"""aperture|creation-?date|size[XYZCT]|view(Size|Offset)[XY]|offset[XY]|spacingZ|[rzc]|ifd
            |objective|numericalAperture|channel""",
            _NUMBER,
        ),
        (r"(device-)?(model|version)|illumination-?source|xmlns|schemaLocation", _WORDS),
        (  # Philips
            r"""DICOM_(PIXEL_SPACING|BITS_\w+|HIGH_BIT|ROWS|COLUMNS|SAMPLES_PER_PIXEL|PIXEL_REPRESENTATION
            |PLANAR_CONFIGURATION|ACQUISITION_DATETIME|LOSSY_IMAGE_COMPRESSION(_RATIO)?
            |(DATE|TIME)_OF_LAST_CALIBRATION)
            |PII?M_(DP_)?(IMAGE_(ROWS|COLUMNS)|PIXEL_DATA_REPRESENTATION_(NUMBER|ROWS|COLUMNS|POSITION))
            |PIM_DP_UFS_INTERFACE_VERSION|Group|Element""",
            rf"{_NUMBER}|0x[\da-f]{{1,4}}",
        ),
        (
            r"""DICOM_(MANUFACTURER|MANUFACTURERS_MODEL_NAME|SOFTWARE_VERSIONS|DEVICE_SERIAL_NUMBER
            |DERIVATION_DESCRIPTION|PHOTOMETRIC_INTERPRETATION|LOSSY_IMAGE_COMPRESSION_METHOD)
            |PIM_DP_IMAGE_TYPE|ObjectType|PMSVR""",
            _WORDS,
        ),
        (  # Ventana
            r"""Magnification|ScanRes|ScanWhitePoint|Z-(layers|spacing)|Build(Version|Date)|UnitNumber
            |Focus(Mode|Quality)|ScanMode|ShowLabel|LabelBoundary""",
            _NUMBER,
        ),
        (r"ScannerModel", _WORDS),
        (r"Background\ Color", r"[\da-f]{6}"),  # Trestle
        (r"Objective\ Power|JPEG\ Quality|OverlapsXY", _NUMBER),
        (r"NominalLensMagnification", _NUMBER),  # Sakura
        # Zeiss: what measures the image and the instrument.
        (r"zeiss\.(Scaling|DisplaySetting|Information\.(Image|Instrument))\..*", _NUMBER),
        # OME
        (
            r"SignificantBits|SamplesPerPixel|PlaneCount|First[ZCT]|PhysicalSize[XYZ]|NominalMagnification",
            _NUMBER,
        ),
        (r"BigEndian|Interleaved", r"true|false"),
        (r"DimensionOrder|PhysicalSize[XYZ]Unit", r"[XYZCT]{5}|.?m"),
    )
)
# Aperio names a file by its own counter (ImageID), or as the laboratory likes: by accession number, most often.
# The only other name that is known to be nobody's is that of the public test slides CMU-1 to CMU-3.
_PUBLIC_SLIDE = re.compile(r"CMU-[1-3]")
_APERIO_LINE = re.compile(
    r"""Aperio\ (Image\ Library|Leica\ Biosystems\ GT450(\ DX)?)\ v(FS\d\d\ \d\d|[\d.]+)
    |(label|macro)\ \d+x\d+
    |\d+x\d+\ ->\ \d+x\d+(\ -)?
    |\d+x\d+\ \[[\d,\ x]+\]\ \(\d+x\d+\)\ (->\ \d+x\d+\ )?(JPEG|J2K)/\w{3,5}\ Q=\d+
    |Mirax\ Digital\ Slide
    |\{"shape":\ \[[\d,\ ]+\]\}""",  # the last by tifffile
    re.VERBOSE,
)
_VENDOR = re.compile(r"(aperio|hamamatsu|leica|philips|sakura|trestle|ventana)\.")
_EMPTY = re.compile(r"[\W_]*|none", re.IGNORECASE)
# Words by which a field is named in a message, since its own name may be free text.
_SLIDE_WORDS = re.compile(
    r"patient|accession|barcode|birth|dob|mrn|subject|person|surgical|case|title|comment|label|slide.?id|reference"
    r"|file.?name|user|rack|name",
    re.IGNORECASE,
)


def file_identifiers(source: Path, *, is_slide: bool = False) -> tuple[str, ...]:
    """Names of the elements, fields and pictures of a file that may name a patient and hold something; sorted.

    DICOM: see `dicom_identifiers`. PNG: text chunks and EXIF. JPEG: comments, EXIF, XMP and IPTC. NIfTI: its
    free texts and extensions. Slides: every property and TIFF tag that is not known to be technical, and
    `LABEL_IMAGES`. A folder and a zip: those of all their files. Anything else holds nothing that is known to
    name anyone.

    Args:
        source: a file or a folder.
        is_slide: ask OpenSlide whatever the first bytes say: most slides that are no TIFF begin like something
            else (MIRAX like a JPEG). Otherwise only a TIFF is taken for a slide.

    Raises:
        ValueError: one line, if the header cannot be read.
    """
    if source.is_dir():
        parts = [file_identifiers(path) for path in sorted(source.rglob("*")) if path.is_file()]
        return tuple(sorted(set().union(*parts)))
    with source.open("rb") as stream:
        head = stream.read(HEAD_BYTES)
    found: set[str] = set()
    try:
        kind = sniff(head)
        if is_slide or head[:4] in _TIFF_MAGIC:
            found |= _of_slide(source, is_tiff=head[:4] in _TIFF_MAGIC)
        if kind == "DICOM":
            found.update(dicom_identifiers(source))
        elif kind == "PNG":
            found |= _of_png(read_bytes(source))
        elif kind == "JPEG":
            found |= _of_jpeg(read_bytes(source))
        elif head[:4] == b"PK\x03\x04":
            found |= _of_zip(source)
        elif head[:2] == b"\x1f\x8b":
            with gzip.open(source) as unpacked:
                found |= _of_nifti(unpacked.read(_MAX_HEADER_BYTES))
        elif _nifti_version(head) is not None:
            with source.open("rb") as stream:
                found |= _of_nifti(stream.read(_MAX_HEADER_BYTES))
    except ValueError:
        raise
    except Exception as error:  # the libraries raise every type there is, and their texts repeat values
        what = type(error).__name__
        raise ValueError(f"its header cannot be read ({what}); export or copy the file again") from None
    return tuple(sorted(found))


def _free(text: str | bytes) -> bool:
    """Whether a text says something that is no signature of a program."""
    if isinstance(text, bytes):
        text = text.decode("latin-1")
    stripped = text.replace("\x00", " ").strip()
    return bool(stripped) and _HARMLESS.fullmatch(stripped) is None


def _of_png(data: bytes) -> set[str]:
    found: set[str] = set()
    at = 8
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        at += 12 + length
        if kind in (b"tEXt", b"zTXt", b"iTXt"):
            key, _, value = body.partition(b"\x00")
            name = key.decode("latin-1").lower()
            if name not in _PNG_HARMLESS and value.strip(b"\x00 "):
                known = name in _PNG_KNOWN
                found.add(f"PNG text {name!r}" if known else "PNG text under a key of its own")
        elif kind == b"eXIf":
            found |= _of_exif(body)
        elif kind == b"IEND":
            break
    return found


def _of_jpeg(data: bytes) -> set[str]:
    found: set[str] = set()
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xDA:  # the pixels
            break
        if marker == 0xFF or 0xD0 <= marker <= 0xD8:  # padding, and markers without a length
            at += 1 if marker == 0xFF else 2
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : at + 2 + length]
        at += 2 + max(length, 2)
        if marker == 0xFE and _free(body):
            found.add("JPEG comment")
        elif marker == 0xE1 and body.startswith(b"Exif\x00"):
            found |= _of_exif(body)
        elif marker == 0xE1 and b"ns.adobe.com/xap" in body[:40] and _XMP_FIELDS.search(body):
            found.add("XMP")
        elif marker == 0xED and b"8BIM\x04\x04" in body:
            found.add("IPTC")
    return found


def _of_exif(body: bytes) -> set[str]:
    exif = Image.Exif()
    with discreet():
        exif.load(body)
        tags = {**exif, **exif.get_ifd(_EXIF_FOLDER)}
        if exif.get_ifd(_GPS_FOLDER):
            tags[_GPS_FOLDER] = "somewhere"
    return {f"EXIF {name}" for tag, name in _EXIF.items() if tag in tags and _free(_exif_text(tags[tag]))}


def _exif_text(value: object) -> str | bytes:
    # UserComment begins with eight bytes that name its character set; XP tags are UTF-16.
    if not isinstance(value, bytes):
        return str(value)
    return value.removeprefix(b"ASCII\x00\x00\x00").removeprefix(b"UNICODE\x00").replace(b"\x00", b"")


def _nifti_version(head: bytes) -> int | None:
    sizes = (int.from_bytes(head[:4], order) for order in ("little", "big"))
    return next((_NIFTI_SIZES[size] for size in sizes if size in _NIFTI_SIZES), None)


def _of_nifti(data: bytes) -> set[str]:
    version = _nifti_version(data)
    if version is None:
        return set()
    found = {
        f"NIfTI {name}"
        for name, (start, length) in _NIFTI_FIELDS[version].items()
        if _free(data[start : start + length].partition(b"\x00")[0])
    }
    size = 348 if version == 1 else 540
    # An extension holds whatever its writer liked, DICOM headers among it (NIfTI-1, section on extensions).
    if data[size : size + 1] not in (b"", b"\x00"):
        found.add("NIfTI extension")
    return found


def _of_zip(path: Path) -> set[str]:
    found: set[str] = set()
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if not member.is_dir()]
        claimed_bytes = sum(member.file_size for member in members)
        if len(members) > _MAX_MEMBERS or claimed_bytes > _MAX_UNPACKED_BYTES:
            raise ValueError(
                f"a zip of {len(members)} files, {claimed_bytes} bytes unpacked; pack each series alone"
            )
        for member in members:
            with archive.open(member) as stream:
                is_dicom = sniff(stream.read(HEAD_BYTES)) == "DICOM"
            if is_dicom and member.file_size > MAX_FILE_BYTES:
                raise ValueError(f"a zip with a DICOM file of {member.file_size} bytes; unpack it first")
            if is_dicom:
                found.update(dicom_identifiers(archive.read(member)))
    return found


def _of_slide(path: Path, *, is_tiff: bool) -> set[str]:
    import openslide

    try:
        with openslide.OpenSlide(path) as slide:
            properties, pictures = dict(slide.properties), set(slide.associated_images)
            height_px, width_px = slide.dimensions[::-1]
    except openslide.OpenSlideError:
        return set()  # no slide after all: whoever reads it says so
    named = {name: "macro image" if name == "macro" else "label image" for name in pictures - {"thumbnail"}}
    found = set(named.values())
    vendor = properties.get("openslide.vendor", "")
    if vendor != "dicom":  # whose properties are the header's elements: see `dicom_identifiers`
        ours = ("openslide.", "tiff.")  # OpenSlide's own, and what stands in the tags
        found |= _of_fields([item for item in properties.items() if not item[0].startswith(ours)])
    if is_tiff:
        sizes = {
            tuple(int(properties[f"openslide.associated.{name}.{side}"]) for side in ("height", "width"))
            for name in named
        }
        # Other vendors' readers know their pages by name, and their levels are padded.
        plain = vendor in ("aperio", "generic-tiff")
        found |= _of_tiff(path, (height_px, width_px) if plain else None, sizes)
    return found


def _of_tiff(path: Path, size_px: tuple[int, int] | None, named: set[tuple[int, ...]]) -> set[str]:
    """What stands in the tags of all pages; and, given the slide's `size_px`, pages that do not show all of it."""
    import tifffile

    found: set[str] = set()
    logging.getLogger("tifffile").disabled = True  # its lines repeat what tags hold
    with tifffile.TiffFile(path) as tiff:
        for number, page in enumerate(_pages(tiff)):
            if number == _MAX_TIFF_PAGES:
                raise ValueError(f"a TIFF of more than {_MAX_TIFF_PAGES} pages; export the slide alone")
            for tag in page.tags.values():
                found |= _of_tag(tiff, tag)
            page_px = (int(page.imagelength), int(page.imagewidth))
            if size_px and page_px not in named and not _shows_all(size_px, page_px):
                found.add(LABEL_IMAGES[0])
    return found


def _pages(tiff: "tifffile.TiffFile") -> Iterator["tifffile.TiffPage"]:
    """All pages, each followed by those in its sub-directories."""
    import tifffile

    waiting = iter(tiff.pages)
    stack = [waiting]
    while stack:
        page = next(stack[-1], None)
        if page is None:
            stack.pop()
            continue
        page = page if isinstance(page, tifffile.TiffPage) else page.aspage()
        yield page
        if page.subifds:
            stack.append(iter(page.pages or ()))


def _shows_all(size_px: tuple[int, int], page_px: tuple[int, int]) -> bool:
    """Whether a page has the slide's shape to within a pixel of rounding: a level or a thumbnail.

    >>> _shows_all((2967, 2220), (768, 574)), _shows_all((2967, 2220), (463, 387))
    (True, False)
    """
    if min(page_px) < 1:
        return False
    down, across = size_px[0] / page_px[0], size_px[1] / page_px[1]
    return min(down, across) >= 1 and abs(down - across) * max(page_px) < max(down, across) + 1e-9


def _of_tag(tiff: "tifffile.TiffFile", tag: "tifffile.TiffTag") -> set[str]:
    if tag.code == _GPS_FOLDER:
        return {"TIFF tag GPSTag"}
    if tag.code == _EXIF_FOLDER:
        inner = tag.value.items() if isinstance(tag.value, dict) else ()  # else it is damaged
        return {
            "TIFF tag ExifTag"
            for name, value in inner
            if isinstance(value, str | bytes) and _is_text(value) and not _EXIF_TECHNICAL.search(str(name))
        }
    if int(tag.dtype) not in (1, 2, 6, 7) or tag.code in _BINARY_TAGS:
        return set()
    if tag.valuebytecount > _MAX_TAG_BYTES:
        raise ValueError(f"a TIFF tag of {tag.valuebytecount} bytes; export the slide again")
    # Read here since tifffile stops at the first zero: TIFF 6.0 lets several texts follow each other.
    tiff.filehandle.seek(tag.valueoffset)
    data = tiff.filehandle.read(tag.valuebytecount)
    if int(tag.dtype) != 2 and not _is_text(data):
        return set()
    text = data.decode("latin-1").replace("\x00", " ").strip()
    if tag.code in (_DESCRIPTION, _HAMAMATSU_FIELDS):
        return _of_description(text)
    if tag.code == _XMP and text.startswith("<") and not _of_description(text):
        return set()  # Ventana's, who describe the scan there
    if _EMPTY.fullmatch(text) or (tag.code in _DEVICE_TAGS and re.fullmatch(_WORDS, text)):
        return set()
    return {f"TIFF tag {tag.name}"}


def _is_text(value: str | bytes) -> bool:
    data = value.encode() if isinstance(value, str) else value.replace(b"\x00", b"")  # UTF-16 too
    return re.search(rb"[A-Za-z0-9\x80-\xff]{3}", data) is not None


def _of_description(text: str) -> set[str]:
    """What names someone in `name = value|name = value` and the like, or in XML."""
    if text.startswith("<"):
        return _of_xml(text)
    fields = []
    for part in filter(None, map(str.strip, re.split(r"[|;\r\n]+", text))):
        name, equals, value = part.partition("=")
        if not _APERIO_LINE.fullmatch(part):
            fields.append((name.strip(), value.strip()) if equals else ("", part))
    return _of_fields(fields)


def _of_xml(text: str) -> set[str]:
    """As `_of_fields`: of every attribute and every text, by the name of its element (Philips': as it says)."""
    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import ParseError, fromstring

    try:
        # As bytes: a text must not say how it is encoded.
        root = fromstring(text.encode("latin-1"))
    except (ParseError, DefusedXmlException, ValueError, LookupError):
        return {"slide description"}
    fields = []
    for element in root.iter():
        attributes = {name.rpartition("}")[2]: value for name, value in element.attrib.items()}
        own_name = element.tag.rpartition("}")[2]
        if own_name == "Attribute":
            own_name = attributes.pop("Name", "")
        fields += [*attributes.items(), (own_name, element.text or ""), ("", element.tail or "")]
    return _of_fields(fields)


def _of_fields(fields: list[tuple[str, str]]) -> set[str]:
    """Fields whose value is not known to be harmless, each by a word of ours that its name holds.

    >>> sorted(_of_fields([("AppMag", "20"), ("Patient ID", "47110815"), ("Doe", "Jane")]))
    ['slide description', "slide property about 'patient'"]
    """
    counters = {value for name, value in fields if name.endswith("ImageID") and value.isdigit()}
    found = set()
    for name, value in fields:
        field = _VENDOR.sub("", name)
        if field.lower() == "filename" and (value in counters or _PUBLIC_SLIDE.fullmatch(value)):
            continue
        if _EMPTY.fullmatch(value) or _is_harmless(field, value):
            continue
        word = _SLIDE_WORDS.search(field)
        found.add(f"slide property about {word[0].lower()!r}" if word else "slide description")
    return found


def _is_harmless(name: str, value: str) -> bool:
    return any(
        names.fullmatch(name) and values.fullmatch(value.strip()) for names, values in _HARMLESS_FIELDS
    )
