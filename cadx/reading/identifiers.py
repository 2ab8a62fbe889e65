"""What in a file of any format names a patient: the places where it stands, never what stands there.

A text that is free to hold anything is taken for an identifier, unless it is known to be the signature of
a program. Names of fields that are not known by themselves are not repeated: they are free text too.
"""

import gzip
import re
import struct
import zipfile
from pathlib import Path

from PIL import Image

from cadx.reading.dicom import dicom_identifiers, discreet
from cadx.reading.source import HEAD_BYTES, read_bytes, sniff

LABEL_IMAGES = ("label image", "macro image")
"""Pictures inside a slide's file that show its paper label, on which a name or a number may be read."""

_MAX_MEMBERS = 1 << 13
_MAX_UNPACKED_BYTES = 1 << 31  # of a zip: what its headers claim is checked before anything is unpacked
_MAX_SLICE_BYTES = 1 << 26
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
_XMP_FIELDS = re.compile(rb"dc:(creator|title|description|subject)|patient", re.IGNORECASE)
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
_SLIDE_PROPERTY = re.compile(
    r"patient|(?<!file)(?<!vendor)\bname\b|accession|barcode|birth|\bcase\b|\bmrn\b|title|comments?\b|label|slide.?id|reference",
    re.IGNORECASE,
)


def file_identifiers(source: Path) -> tuple[str, ...]:
    """Names of the elements, fields and pictures of a file that may name a patient and hold something; sorted.

    DICOM: see `dicom_identifiers`. PNG: text chunks and EXIF. JPEG: comments, EXIF, XMP and IPTC. NIfTI: its
    free texts and extensions. Slides: properties that describe the patient, and `LABEL_IMAGES`. A folder and
    a zip: those of all their files. Anything else holds nothing that is known to name anyone.

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
        if kind == "DICOM":
            return dicom_identifiers(source)
        if kind == "PNG":
            found = _of_png(read_bytes(source))
        elif kind == "JPEG":
            found = _of_jpeg(read_bytes(source))
        elif head[:4] == b"PK\x03\x04":
            found = _of_zip(source)
        elif head[:2] == b"\x1f\x8b":
            with gzip.open(source) as unpacked:
                found = _of_nifti(unpacked.read(_MAX_HEADER_BYTES))
        elif _nifti_version(head) is not None:
            with source.open("rb") as stream:
                found = _of_nifti(stream.read(_MAX_HEADER_BYTES))
        elif head[:4] in (b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"):
            found = _of_slide(source)
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
            if is_dicom and member.file_size > _MAX_SLICE_BYTES:
                raise ValueError(f"a zip with a DICOM file of {member.file_size} bytes; unpack it first")
            if is_dicom:
                found.update(dicom_identifiers(archive.read(member)))
    return found


def _of_slide(path: Path) -> set[str]:
    import openslide

    try:
        with openslide.OpenSlide(path) as slide:
            properties, pictures = dict(slide.properties), set(slide.associated_images)
    except openslide.OpenSlideError:
        return set()  # no slide after all: whoever reads it says so
    found = {name for name in LABEL_IMAGES if name.removesuffix(" image") in pictures}
    for name, value in properties.items():
        word = _SLIDE_PROPERTY.search(name.partition(".")[2])
        if word and not name.startswith("openslide.") and _free(value):
            found.add(f"slide property about {word[0].lower()!r}")
    # Aperio's description is taken apart into properties of its own; any other's stands in one text.
    description = "" if "aperio.AppMag" in properties else properties.get("tiff.ImageDescription", "")
    if word := _SLIDE_PROPERTY.search(description):
        found.add(f"slide description about {word[0].lower()!r}")
    return found
