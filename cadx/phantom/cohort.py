"""A cohort on paper: patients, visits and who is ill, drawn the same way for every modality; and what goes wrong.

Everything is a function of the configuration: the same one gives the same cohort.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt
from pydantic import Field
from pydicom.uid import UID
from rich.console import Console
from rich.progress import track

from cadx.types import Config

T = TypeVar("T")
Array = npt.NDArray[Any]
Range = tuple[float, float]
_SLOW = 200  # items: fewer are drawn before a bar would be seen


class Faults(Config):
    """What a careless export does to a cohort; each is a number of files."""

    duplicates: Annotated[int, Field(ge=0)] = 0  # images filed again under another patient: a leak
    identifiers: Annotated[int, Field(ge=0)] = 0  # files that still carry a (fictional) name
    corrupt_files: Annotated[int, Field(ge=0)] = 0  # in turn truncated, empty, and text


class Shift(Config):
    """What changes at the machines after a model was trained; patients and labels stay as they are."""

    gamma: Annotated[float, Field(gt=0)] = 1.0  # of the displayed intensity; above 1 is darker
    blur_sigma_px: Annotated[float, Field(ge=0)] = 0.0
    new_scanner: bool = False  # every site has replaced its machine by one that was never seen


@dataclass(frozen=True)
class Patient:
    """One person of a cohort. `number` counts from 1; `site` indexes the modality's table of sites."""

    number: int
    sex: Literal["F", "M"]
    age_years: int
    site: int


@dataclass(frozen=True)
class Visit:
    """One examination of a patient: `index` 0 is the first, later ones are follow-ups."""

    patient: Patient
    index: int
    positive: bool


def draw_visits(
    *,
    num_patients: int,
    visits_per_patient: float,
    site_weights: Sequence[float],
    prevalence: float,
    seed: int,
) -> list[Visit]:
    """All visits of a cohort, patient by patient; round(prevalence * visits) of them are positive.

    Illness depends on nothing that the cohort table shows: not on site, sex or age. A patient who is ill
    is so on most visits, at least on one. With a higher prevalence, the same patients are ill and
    more besides.

    >>> visits = draw_visits(num_patients=50, visits_per_patient=1, site_weights=[1], prevalence=0.1, seed=0)
    >>> len(visits), sum(visit.positive for visit in visits)
    (50, 5)
    """
    rng = stream(seed, "cohort")
    weights = np.asarray(site_weights, dtype=float)
    patients = [
        Patient(
            number=number,
            sex="F" if rng.random() < 0.5 else "M",
            age_years=int(18 + 74 * rng.beta(2.6, 1.9)),
            site=int(rng.choice(len(weights), p=weights / weights.sum())),
        )
        for number in range(1, num_patients + 1)
    ]
    num_visits = 1 + np.minimum(rng.poisson(visits_per_patient - 1, num_patients), 5)
    ill_on = [(rng.random(count) < 0.75) | (np.arange(count) == rng.integers(count)) for count in num_visits]

    wanted = round(prevalence * int(num_visits.sum()))
    positive = [np.zeros(count, dtype=bool) for count in num_visits]
    for position in rng.permutation(num_patients):
        for index in np.flatnonzero(ill_on[position])[:wanted]:
            positive[position][index] = True
            wanted -= 1
    # A prevalence above the share of ill visits can only be reached by making every visit an ill one.
    for position in range(num_patients):
        for index in np.flatnonzero(~positive[position])[:wanted]:
            positive[position][index] = True
            wanted -= 1
    return [
        Visit(patient, index, bool(ill))
        for patient, course in zip(patients, positive, strict=True)
        for index, ill in enumerate(course)
    ]


def stream(seed: int, *names: str | int) -> np.random.Generator:
    """A random stream of its own for each name: adding a structure does not reshuffle the others."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def uid(*names: str | int) -> UID:
    """A UID made from names. Source: DICOM PS3.5 B.2, "2.25." and a 128-bit integer."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return UID(f"2.25.{int.from_bytes(digest[:16], 'big')}")


def drawing(items: Sequence[T], what: str) -> Iterable[T]:
    """`items`, with a progress bar where there are many."""
    return track(
        items, f"Drawing {what}", console=Console(stderr=True), transient=True, disable=len(items) < _SLOW
    )


def spoil(path: Path, kind: int) -> None:
    """Spoil a file: 0 truncates it, 1 empties it, 2 makes it a text; and so on in turn."""
    whole = path.read_bytes()
    path.write_bytes(
        [whole[: len(whole) // 2], b"", b"This is a text file, whatever its name says.\n"][kind % 3]
    )
