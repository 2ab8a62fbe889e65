"""Words that headers, tables and the catalogue share. It needs no pydicom, which takes a fifth of a second."""

import re
from typing import Literal

BURNED_IN = "BurnedInAnnotation"
"""The one identifier that cannot be dropped with the header: it stands in the pixels."""

LABEL_IMAGES = ("label image", "macro image")
"""Pictures inside a slide's file that show its paper label, on which a name or a number may be read."""

Photometric = Literal["MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"]
"""The photometric interpretations that are read."""

_YEARS_PER = {"Y": 1.0, "M": 1 / 12, "W": 7 / 365.25, "D": 1 / 365.25, "": 1.0}


def parse_age(text: str) -> float:
    """Age in years of a DICOM age string or a plain number; NaN where there is none.

    A number without a unit is taken for years, which many exports write against PS3.5.

    >>> parse_age("045Y"), parse_age("006M"), parse_age("62"), parse_age("unknown")
    (45.0, 0.5, 62.0, nan)
    """
    match = re.fullmatch(r"(\d{1,3}(?:\.\d+)?)\s*([YMWD]?)", text.strip().upper())
    return float(match[1]) * _YEARS_PER[match[2]] if match else float("nan")


def parse_sex(text: str) -> str:
    """F, M or O, from their letters or words in any case; empty where it is none of them.

    >>> parse_sex("Female"), parse_sex("m"), parse_sex("unknown")
    ('F', 'M', '')
    """
    words = {"F": "F", "FEMALE": "F", "M": "M", "MALE": "M", "O": "O", "OTHER": "O"}
    return words.get(text.strip().upper(), "")
