"""DICOM files -> pixels, spacing, what they say of patient group and machine, and who is named in them."""

import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pydicom
import pydicom.config
from pydicom.datadict import keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.multival import MultiValue
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import UID

from cadx.reading.codecs import check_length, decode_frame
from cadx.reading.source import HEAD_BYTES, Refusal, check_frame, check_size, gray_if_equal, read_bytes, sniff
from cadx.reading.vocabulary import BURNED_IN, Photometric, parse_age, parse_sex
from cadx.types import Millimetres, RawImage

IDENTIFYING_KEYWORDS = frozenset({
    # numbers of the patient, the visit, the order and the insurance
    "AccessionNumber", "AdmissionID", "FillerOrderNumberImagingServiceRequest",
    "GroupOfPatientsIdentificationSequence", "InsurancePlanIdentification", "IssuerOfAccessionNumberSequence",
    "IssuerOfAdmissionID", "IssuerOfAdmissionIDSequence", "IssuerOfPatientID",
    "IssuerOfPatientIDQualifiersSequence", "IssuerOfServiceEpisodeID", "IssuerOfServiceEpisodeIDSequence",
    "MedicalRecordLocator", "OtherPatientIDs", "OtherPatientIDsSequence", "PatientInsurancePlanCodeSequence",
    "PersonIdentificationCodeSequence", "PlacerOrderNumberImagingServiceRequest",
    "ReferringPhysicianIdentificationSequence", "ServiceEpisodeID", "SourcePatientGroupIdentificationSequence",
    "SpecimenAccessionNumber",
    # dates of life
    "PatientBirthDate", "PatientBirthDateInAlternativeCalendar", "PatientBirthTime",
    "PatientDeathDateInAlternativeCalendar",
    # where to find the patient or those around
    "AddressTrial", "BranchOfService", "CountryOfResidence", "CurrentPatientLocation", "DistributionAddress",
    "MilitaryRank", "OrderCallbackPhoneNumber", "OrderCallbackTelecomInformation", "OrderEntererLocation",
    "PatientAddress", "PatientInstitutionResidence",
    "PatientTelecomInformation", "PatientTelephoneNumbers", "PersonAddress", "PersonTelecomInformation",
    "PersonTelephoneNumbers", "ReferringPhysicianAddress", "ReferringPhysicianTelephoneNumbers",
    "RegionOfResidence", "ResponsibleOrganization", "ScheduledPatientInstitutionResidence", "TelephoneNumberTrial",
    # free text in which people write names
    "AcquisitionComments", "AdditionalPatientHistory", "AdmittingDiagnosesDescription", "Allergies", "Arbitrary",
    "BarcodeValue", "CameraOwnerName", "CommentsOnRadiationDose", "CommentsOnThePerformedProcedureStep",
    "ConfidentialityConstraintOnPatientDataDescription", "ContributionDescription", "CurrentObserverTrial",
    "DischargeDiagnosisDescription", "FrameComments", "IdentifyingComments", "ImageComments",
    "ImagePresentationComments", "ImagingServiceRequestComments", "Impressions",
    "InterpretationDiagnosisDescription", "InterpretationText", "LabelText", "MedicalAlerts", "Occupation",
    "OverlayComments", "PatientComments", "PatientReligiousPreference", "PatientState",
    "PatientTransportArrangements", "PreMedication", "ReasonForStudy", "ReasonForTheImagingServiceRequest",
    "ReasonForTheRequestedProcedure", "ReasonForVisit", "RequestedProcedureComments", "ResultsComments",
    "ServiceEpisodeDescription", "SpecialNeeds", "StudyComments", "TextComments", "TextString", "TopicAuthor",
    "TopicKeywords", "TopicSubject", "TopicTitle", "VisitComments",
    # a drawing over the image, in which names may stand
    "OverlayData",
})  # fmt: skip
"""Direct identifiers of the Basic Application Level Confidentiality Profile, beside all person names.

Not among them is what the profile removes because it helps to find a person in other records: dates, UIDs,
institution, device and descriptions of study, series, procedure and specimen. A dataset stores none of these but the
institution, as `site`: without it no split and no metric can be told by site. Private elements and curves (50xx) are
left behind as well; only their person names are reported.

Source: DICOM PS3.15 Annex E, table E.1-1.
"""
_STORED = ("InstitutionName", "Manufacturer", "ManufacturerModelName", "ViewPosition")
_LONGEST_TEXT = 64  # of a Long String (LO), PS3.5 6.2
_NAMING = (
    "OtherPatientNames",
    "PatientBirthName",
    "PatientMotherBirthName",
    "PatientName",
    "ResponsiblePerson",
)
_FREE_TEXT = frozenset({"LO", "LT", "SH", "ST", "UC", "UT"})
_NAMING_LETTERS = 4  # shorter words of a name stand in ordinary texts too
_PERSON_NAME = re.compile(
    r"[^\W\d_]\^[^\W\d_]"
)  # family^given, PS3.5 6.2.1; studies are called Head^Routine as well
_KNOWN_PHOTOMETRICS = (
    *get_args(Photometric), "PALETTE COLOR", "YBR_PARTIAL_420", "YBR_PARTIAL_422", "XYB", "HSV", "ARGB", "CMYK",
)  # fmt: skip
"""All whose meaning is defined, today or once. Source: DICOM PS3.3 C.7.6.3.1.2."""
_COLOUR_SPACES = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")
_DEFLATED = b"1.2.840.10008.1.2.1.99"
_PARSING = threading.Lock()


def dicom_identifiers(source: Path | bytes) -> tuple[str, ...]:
    """Keywords, sorted, of the elements that identify a patient and carry a value; never the values.

    All person names at any depth, `IDENTIFYING_KEYWORDS`, `PatientID` unless the file says
    PatientIdentityRemoved = YES, texts that repeat a word of four letters and more of the
    patient's names or of that ID, what would be
    stored but looks like a name (see `header_attributes`), and `BurnedInAnnotation` unless it is NO or empty.
    Empty for PNG and JPEG.

    Raises:
        ValueError: one line, if the header cannot be read.
    """
    data = read_bytes(source)
    if sniff(data[:HEAD_BYTES]) != "DICOM":
        return ()
    found: set[str] = set()
    try:
        with discreet():
            header = parse_header(data)
            removed = _identity_removed(header)
            words = _naming_words(header)
            for element in header.iterall():
                # By the tag, since an element itself knows no keyword of repeating groups (overlays).
                keyword = (
                    keyword_for_tag(element.tag) or f"({element.tag.group:04X},{element.tag.element:04X})"
                )
                named = element.VR == "PN" or keyword in IDENTIFYING_KEYWORDS
                if keyword == "PatientID":
                    named = not removed
                elif element.VR in _FREE_TEXT:
                    named = named or _repeats(str(element.value), words)
                # An empty sequence and an empty value both have no truth.
                if named and not element.is_empty and str(element.value).strip():
                    found.add(keyword)
            found.update(
                keyword for keyword in _STORED if _names_someone(header_text(header, keyword), words)
            )
            # YES, NO or nothing by the standard (PS3.3 C.7.6.1); what else is written there is no clear NO.
            if header_text(header, BURNED_IN).upper() not in ("", "NO"):
                found.add(BURNED_IN)
    except Refusal as refusal:
        raise ValueError(f"DICOM: {refusal}") from None
    except Exception as error:  # see read_image
        raise ValueError(f"DICOM: the header cannot be read ({type(error).__name__})") from None
    return tuple(sorted(found))


def patient_names(source: Path | bytes) -> tuple[str, ...]:
    """What a DICOM file calls its patient, family^given; to compare with, never to be shown or stored.

    Empty for PNG and JPEG, and where the file says PatientIdentityRemoved = YES.

    Raises:
        ValueError: one line, if the header cannot be read.
    """
    data = read_bytes(source)
    if sniff(data[:HEAD_BYTES]) != "DICOM":
        return ()
    try:
        with discreet():
            header = parse_header(data)
            keywords = () if _identity_removed(header) else _NAMING
            return tuple(filter(None, (header_text(header, keyword) for keyword in keywords)))
    except Refusal as refusal:
        raise ValueError(f"DICOM: {refusal}") from None
    except Exception as error:  # see read_image
        raise ValueError(f"DICOM: the header cannot be read ({type(error).__name__})") from None


def _identity_removed(header: Dataset) -> bool:
    return header_text(header, "PatientIdentityRemoved").upper() == "YES"


def _words(text: str) -> set[str]:
    return {word for word in re.split(r"[\W_]+", text.casefold()) if word}


def _naming_words(header: Dataset) -> set[str]:
    """By which words the header itself names its patient; none where names and ID are pseudonyms."""
    keywords = () if _identity_removed(header) else (*_NAMING, "PatientID")
    return set().union(*(_words(header_text(header, keyword)) for keyword in keywords))


def _repeats(text: str, words: set[str]) -> bool:
    return any(len(word) >= _NAMING_LETTERS for word in words & _words(text))


def _names_someone(text: str, words: set[str]) -> bool:
    """Whether what would be stored is a name: a clinic or a maker may well share one word with a patient."""
    return _PERSON_NAME.search(text) is not None or len(words & _words(text)) > 1


@contextmanager
def discreet() -> Iterator[None]:
    """No warning and no log line of a library inside the block: both repeat what the file says.

    The state it changes belongs to the process, hence the lock; decoding runs outside it, in parallel.
    """
    logger, settings = logging.getLogger("pydicom"), pydicom.config.settings
    with _PARSING, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logger.disabled, settings.reading_validation_mode
        logger.disabled, settings.reading_validation_mode = True, pydicom.config.IGNORE
        try:
            yield
        finally:
            logger.disabled, settings.reading_validation_mode = before


def parse_header(data: bytes) -> Dataset:
    """The elements of a DICOM file; call it inside `discreet`."""
    # pydicom inflates without a limit: a few kilobytes could fill the memory.
    if _DEFLATED in data[:1024]:
        raise Refusal("the deflated transfer syntax is not read; export uncompressed or as JPEG 2000")
    return pydicom.dcmread(io.BytesIO(data))


def read_dicom(data: bytes, frame: int | None = None, photometric: Photometric | None = None) -> RawImage:
    """The image in a DICOM file: see `cadx.reading.images.read_image`. Raises what the libraries raise, and Refusal."""
    assumptions: list[str] = []
    with discreet():
        header = parse_header(data)
        settle_photometric(header, photometric, assumptions)
        syntax = UID(str(header.file_meta.get("TransferSyntaxUID", "")))
        colour = check_pixels(header, syntax, frame)
        _lay_out_frame(header, frame or 1)
        spacing_mm = _spacing_mm(header, assumptions)
        attributes = header_attributes(header, assumptions)
        patient = header_text(header, "PatientID") or None
        table = None if colour else _display_table(header, assumptions)
    stored = decode_frame(header, (frame or 1) - 1)
    if (stored.shape[0], stored.shape[1]) != (header.Rows, header.Columns):
        raise Refusal("the pixel data have another size than the header says")
    pixels = gray_if_equal(stored) if table is None else _look_up(table, stored)
    return RawImage(pixels, spacing_mm, attributes, patient, tuple(assumptions))


def settle_photometric(header: Dataset, given: Photometric | None, assumptions: list[str]) -> None:
    """Write the photometric interpretation that was given where the header's is missing or of no known meaning.

    Raises:
        Refusal: if it is unknown and none was given, or the header says otherwise.
    """
    stated = header_text(header, "PhotometricInterpretation")
    if "PixelData" not in header or stated == given:
        return
    if stated not in _KNOWN_PHOTOMETRICS:
        if given is None:
            raise Refusal(
                "its PhotometricInterpretation is missing or unknown; export it again, or give "
                "photometric_interpretation in the catalogue's entry"
            )
        header.PhotometricInterpretation = given
        assumptions.append(f"no known PhotometricInterpretation in the file: {given} was taken as given")
    elif given is not None:
        raise Refusal(
            f"photometric_interpretation {given} was given, but the file says {stated}; "
            "remove it from the catalogue's entry"
        )


def _lay_out_frame(header: Dataset, frame: int) -> None:
    """Write what an enhanced header says of one frame, or of all, where a plain header says it.

    Source: DICOM PS3.3 C.7.6.16.1: shared and per-frame functional groups.
    """
    groups = [
        *(header.get("SharedFunctionalGroupsSequence") or ())[:1],
        *(header.get("PerFrameFunctionalGroupsSequence") or ())[frame - 1 : frame],
    ]
    for group in groups:
        for keyword in ("PixelMeasuresSequence", "PixelValueTransformationSequence", "FrameVOILUTSequence"):
            for item in (group.get(keyword) or ())[:1]:
                header.update(item)


def check_pixels(header: Dataset, syntax: UID, frame: int | None = None) -> bool:
    """Whether the image is in colour, once everything that decoding relies on is known to hold.

    Raises:
        Refusal: if something of it does not hold, or the pixels are of a kind that is not read.
    """
    if "PixelData" not in header:
        raise Refusal("no pixel data: truncated, or no image at all; export or copy the file again")
    try:
        get_decoder(syntax)
    except NotImplementedError:
        raise Refusal("its transfer syntax is not read; export uncompressed or as JPEG 2000") from None
    check_frame(int(header.get("NumberOfFrames") or 1), frame)
    check_size(int(header.get("Rows") or 0), int(header.get("Columns") or 0))
    photometric = header_text(header, "PhotometricInterpretation")
    bits, samples = int(header.BitsStored), int(header.SamplesPerPixel)
    is_colour = photometric in _COLOUR_SPACES and samples == 3
    if is_colour and (header.BitsAllocated != 8 or bits != 8):
        raise Refusal(f"colour with {bits} bits per channel is not read; export with 8")
    if not is_colour and (photometric not in ("MONOCHROME1", "MONOCHROME2") or samples != 1):
        raise Refusal("its PhotometricInterpretation is not read; export as MONOCHROME2 or RGB")
    if header.BitsAllocated not in (8, 16) or not 1 <= bits <= header.BitsAllocated:
        raise Refusal(f"{bits} of {header.BitsAllocated} bits stored; only 8 and 16 allocated bits are read")
    if not is_colour and int(header.get("HighBit", bits - 1)) != bits - 1:
        raise Refusal("HighBit is not BitsStored - 1, against PS3.5; export the file again")
    check_length(header, syntax)
    return is_colour


def _display_table(header: Dataset, assumptions: list[str]) -> np.ndarray:
    """2**BitsStored display values, uint8 or uint16, in the order of the stored bit patterns.

    A table, since there are at most 65536 stored values and often millions of pixels.
    """
    bits, signed = int(header.BitsStored), int(header.PixelRepresentation) == 1
    lowest = -(1 << (bits - 1)) if signed else 0
    values = np.arange(lowest, lowest + (1 << bits), dtype=np.float64)
    if header.get("ModalityLUTSequence"):
        modality, _ = _apply_lut(header.ModalityLUTSequence[0], values)
    else:
        slope, intercept = header.get("RescaleSlope"), header.get("RescaleIntercept")
        modality = values * float(1 if slope is None else slope) + float(intercept or 0)
    if not np.isfinite(modality).all() or modality.min() == modality.max():
        raise Refusal("RescaleSlope and RescaleIntercept leave no range of values")
    unit = _display_values(header, modality, assumptions, bits)
    if header_text(header, "PhotometricInterpretation") == "MONOCHROME1":
        unit = 1.0 - unit
    if isinstance(padding := header.get("PixelPaddingValue"), int):
        # Written unsigned over signed pixels, or the other way round, its bits are those of a pixel.
        span = 1 << int(header.BitsAllocated)
        least = -span // 2 if signed else 0
        limit = header.get("PixelPaddingRangeLimit", padding)
        first, last = sorted((end - least) % span + least for end in (padding, limit))
        unit[(values >= first) & (values <= last)] = 0.0
    eight_bits = bits <= 8 and modality.max() - modality.min() <= 255
    dtype = np.uint8 if eight_bits else np.uint16
    table: np.ndarray = np.rint(unit * np.iinfo(dtype).max).astype(dtype)
    # From the order of values into that of bit patterns, where negative values come last.
    return np.roll(table, lowest)


def _display_values(header: Dataset, modality: np.ndarray, assumptions: list[str], bits: int) -> np.ndarray:
    """Display values in 0..1 for modality values.

    Source: DICOM PS3.3 C.11.2.1.2 (windows, equations C.11-2a and C.11-3) and C.11.2.1.1 (VOI LUT).
    """
    if header.get("VOILUTSequence"):
        displayed, top = _apply_lut(header.VOILUTSequence[0], modality)
        return np.clip(displayed / top, 0.0, 1.0)
    centres, widths = header_numbers(header, "WindowCenter"), header_numbers(header, "WindowWidth")
    if not centres or not widths:
        if bits > 8:
            assumptions.append("no display window in the file: the whole range of the stored bits was taken")
        whole: np.ndarray = (modality - modality.min()) / (modality.max() - modality.min())
        return whole
    if len(centres) > 1:
        assumptions.append(f"the first of {len(centres)} display windows was taken")
    centre, width = centres[0], widths[0]
    function = header_text(header, "VOILUTFunction") or "LINEAR"
    if not np.isfinite([centre, width]).all() or width < (1 if function == "LINEAR" else 1e-9):
        raise Refusal("WindowWidth is too small or no number")
    if function == "SIGMOID":
        # 1 / (1 + exp(-4 z)), in the form that does not overflow.
        sigmoid: np.ndarray = (1.0 + np.tanh(2.0 * (modality - centre) / width)) / 2.0
        return sigmoid
    if function == "LINEAR":
        centre, width = centre - 0.5, width - 1.0
    elif function != "LINEAR_EXACT":
        raise Refusal("unknown VOILUTFunction")
    if width == 0:
        return (modality > centre).astype(np.float64)
    return np.clip((modality - centre) / width + 0.5, 0.0, 1.0)


def _apply_lut(item: Dataset, values: np.ndarray) -> tuple[np.ndarray, float]:
    """`values` through a Modality or VOI LUT item, and the largest value that its bits can hold.

    pydicom's own function wraps round at 256 where a table of 8 bits meets longer input.

    Source: DICOM PS3.3 C.11.1.1 and C.11.2.1.1: the first value mapped is one of the input, signed where that is.
    """
    length, first, bits = (int(number) for number in item.LUTDescriptor)
    # Implicit VR gives it the sign of the stored pixels, which rescaling may have made negative.
    if first > np.iinfo(np.int16).max and values.min() < 0:
        first -= 1 << 16
    length = length or 1 << 16
    data = item.LUTData
    if isinstance(data, bytes):
        entries = np.frombuffer(data, np.uint8 if len(data) < 2 * length else "<u2")
    else:
        entries = np.atleast_1d(np.asarray(data))
    if not 1 <= bits <= 16 or len(entries) < length:
        raise Refusal("a lookup table holds fewer entries than its descriptor says")
    index = np.clip(np.rint(values) - first, 0, length - 1).astype(np.int64)
    return entries[index].astype(np.float64), float((1 << bits) - 1)


def _look_up(table: np.ndarray, stored: np.ndarray) -> np.ndarray:
    # Bits above BitsStored may hold overlays or sign extension. `take` is several times as fast as [].
    unsigned = stored.astype(stored.dtype.newbyteorder("="), copy=False).view(f"u{stored.dtype.itemsize}")
    displayed: np.ndarray = table.take(unsigned & (len(table) - 1))
    return displayed


def _spacing_mm(header: Dataset, assumptions: list[str]) -> tuple[Millimetres, Millimetres] | None:
    for keyword in ("PixelSpacing", "ImagerPixelSpacing"):
        spacing = header_numbers(header, keyword)
        if len(spacing) == 2 and np.isfinite(spacing).all() and min(spacing) > 0:
            if keyword == "ImagerPixelSpacing":
                assumptions.append("spacing at the detector (ImagerPixelSpacing), without magnification")
            return Millimetres(spacing[0]), Millimetres(spacing[1])
    return None


def header_attributes(header: Dataset, assumptions: list[str]) -> dict[str, Any]:
    """What a header says of group and machine, as `RawImage.attributes`; appends to `assumptions`.

    A text that names someone, in the form of a DICOM name (Doe^Jane) or by two words of the patient's names and ID
    in the same header, is left out and said to be; `dicom_identifiers` reports it.
    """
    words = _naming_words(header)
    stored = {keyword: header_text(header, keyword) for keyword in _STORED}
    for keyword, text in stored.items():
        if _names_someone(text, words):
            stored[keyword] = ""
            assumptions.append(f"{keyword} was left out: it names somebody")
        elif len(text) > _LONGEST_TEXT:
            stored[keyword] = text[:_LONGEST_TEXT]
            assumptions.append(f"{keyword} was cut to {_LONGEST_TEXT} characters, all that DICOM allows")
    attributes: dict[str, Any] = {
        "site": stored["InstitutionName"],
        "scanner": " ".join(filter(None, (stored["Manufacturer"], stored["ManufacturerModelName"]))),
        "sex": parse_sex(header_text(header, "PatientSex")),
        "view": stored["ViewPosition"],
    }
    age_text = header_text(header, "PatientAge")
    if not np.isnan(age := parse_age(age_text)):
        attributes["age"] = age
        if age_text[-1:].isdigit():
            assumptions.append("PatientAge without a unit was taken for years")
    return {name: value for name, value in attributes.items() if value != ""}


def header_text(header: Dataset, keyword: str) -> str:
    """The value of an element, runs of white space as one blank; empty where the header has none."""
    value = header.get(keyword)
    return "" if value is None else " ".join(str(value).split())


def header_numbers(header: Dataset, keyword: str) -> list[float]:
    """The numbers of an element of one or more values; empty where the header has none."""
    value = header.get(keyword)
    if value is None or value == "":
        return []
    return [float(number) for number in (value if isinstance(value, (list, MultiValue)) else [value])]
