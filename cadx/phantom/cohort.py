"""A cohort on paper: patients, visits and who is ill, drawn the same way for every modality; and what goes wrong.

Everything is a function of the configuration: the same one gives the same cohort.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
from pydantic import AfterValidator, Field
from pydicom.uid import UID
from rich.console import Console
from rich.progress import track

from cadx.types import Config

T = TypeVar("T")
Scanner = TypeVar("Scanner")
Array = npt.NDArray[Any]
Range = tuple[float, float]
Count = Annotated[int, Field(ge=2)]
FilesPerPatient = Annotated[float, Field(ge=1, le=4)]
Share = Annotated[float, Field(ge=0, le=1)]
Seed = Annotated[int, Field(ge=0)]
_SLOW = 200  # items: fewer are drawn before a bar would be seen


def _in_order(value: Range) -> Range:
    if not 0 < value[0] <= value[1]:
        raise ValueError("give two positive numbers, the smaller one first")
    return value


PositiveRange = Annotated[Range, AfterValidator(_in_order)]


class Faults(Config):
    """What a careless export does to a cohort: numbers of files, and a share."""

    duplicates: Annotated[int, Field(ge=0)] = 0  # images filed again under another patient: a leak
    identifiers: Annotated[int, Field(ge=0)] = 0  # files that still carry a (fictional) name
    corrupt_files: Annotated[int, Field(ge=0)] = 0  # in turn truncated, empty, and text
    site_shift: Annotated[float, Field(ge=0, le=1)] = (
        0.0  # share of the ill whose files all come from one site
    )


class Shift(Config):
    """What changes at the machines after a model was trained; patients and labels stay as they are."""

    gamma: Annotated[float, Field(gt=0)] = 1.0  # of the displayed intensity; above 1 is darker
    blur_sigma_px: Annotated[float, Field(ge=0)] = 0.0
    new_scanner: bool = False  # every site has replaced its machine by one that was never seen


@dataclass(frozen=True)
class Site(Generic[Scanner]):
    """A (fictional) hospital, its share of the patients, and its machine."""

    name: str
    share: float
    scanner: Scanner


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
    site_shift: float = 0.0,
) -> list[Visit]:
    """All visits of a cohort, patient by patient; round(prevalence * visits) of them are positive.

    Illness depends on nothing that the cohort table shows: not on site, sex or age. A patient who is ill
    is so on most visits, at least on one. With a higher prevalence, the same patients are ill and
    more besides.

    With a `site_shift`, that share of the patients who are ill is seen at the first site, wherever they
    came from: the site, and whatever its machine leaves in the image, then tells of the illness.

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
    referred = stream(seed, "site shift").random(num_patients) < site_shift
    seen_at_first = [
        replace(patient, site=0) if sent and course.any() else patient
        for patient, course, sent in zip(patients, positive, referred, strict=True)
    ]
    return [
        Visit(patient, index, bool(ill))
        for patient, course in zip(seen_at_first, positive, strict=True)
        for index, ill in enumerate(course)
    ]


CLINICAL = ("smoking_pack_years", "crp_mg_l", "family_history")
"""Names of the columns that `draw_clinical` gives."""


def draw_clinical(visits: Sequence[Visit], seed: int) -> dict[Visit, dict[str, float]]:
    """What the record says at each visit, by the names in `CLINICAL`; NaN where nothing was entered.

    Pack-years and family history (1 yes, 0 no) belong to the patient, C-reactive protein to the visit. The
    ill have more of each, so that a logistic regression on the three alone reaches an AUC between 0.60 and
    0.75: part of the signal, to be joined with the image. A tenth of the cells is missing, at random.

    >>> visits = draw_visits(num_patients=9, visits_per_patient=1, site_weights=[1], prevalence=0.5, seed=0)
    >>> list(draw_clinical(visits, seed=0)[visits[0]])
    ['smoking_pack_years', 'crp_mg_l', 'family_history']
    """
    ill = {visit.patient.number for visit in visits if visit.positive}
    found = {}
    for visit in visits:
        number = visit.patient.number
        person, blood = stream(seed, "record", number), stream(seed, "blood", number, visit.index)
        smokes = person.random() < (0.62 if number in ill else 0.45)
        values = (
            round(float(smokes * person.gamma(2.2, 12.0)), 1),
            round(float(np.exp(blood.normal(1.45 if visit.positive else 1.0, 0.9))), 1),
            float(person.random() < (0.28 if number in ill else 0.17)),
        )
        entered = np.r_[person.random(), blood.random(), person.random()] >= 0.1
        found[visit] = {
            name: value if there else math.nan
            for name, value, there in zip(CLINICAL, values, entered, strict=True)
        }
    return found


@dataclass(frozen=True)
class PlannedFile(Generic[Scanner]):
    """A file to write: whose it is said to be, where it is made, and what is wrong with it."""

    visit: Visit
    patient_number: int  # another than the visit's patient's where the image is filed twice
    number: int  # from 1, in an order unrelated to the patients
    site: Site[Scanner]
    scanner: Scanner
    identified: bool
    spoiled: int | None  # the kind for `spoil`
    clinical: dict[str, float]  # by the names in CLINICAL; empty where none were asked for


class Cohort(Config):
    """What the configurations of all modalities say of their patients, and of what goes wrong."""

    num_patients: Count
    num_sites: Annotated[int, Field(ge=1, le=4)] = 4
    prevalence: Share  # of files with a finding
    seed: Seed
    clinical: bool = False  # columns that carry part of the signal: `draw_clinical`
    faults: Faults = Faults()
    shift: Shift = Shift()

    def plan(
        self, files_per_patient: float, sites: Sequence[Site[Scanner]], new_scanner: Scanner
    ) -> list[PlannedFile[Scanner]]:
        """The files of the cohort: one per visit, and what a careless export adds and breaks.

        Args:
            files_per_patient: mean number of visits.
            sites: of the modality; the first `num_sites` of them take part.
            new_scanner: what every site has after a shift that replaces its machine.

        >>> faults = Faults(duplicates=1, corrupt_files=2)
        >>> cohort = Cohort(num_patients=5, prevalence=0, seed=0, num_sites=1, faults=faults)
        >>> files = cohort.plan(1, [Site("A", 1.0, "old")], "new")
        >>> [file.patient_number for file in files], sorted(file.number for file in files)
        ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
        >>> sorted(file.spoiled for file in files if file.spoiled is not None)
        [0, 1]
        """
        sites = sites[: self.num_sites]
        visits = draw_visits(
            num_patients=self.num_patients,
            visits_per_patient=files_per_patient,
            site_weights=[site.share for site in sites],
            prevalence=self.prevalence,
            seed=self.seed,
            site_shift=self.faults.site_shift,
        )
        order = stream(self.seed, "order")
        copies = order.choice(len(visits), min(self.faults.duplicates, len(visits)), replace=False).tolist()
        jobs = [(visit, visit.patient.number) for visit in visits]
        jobs += [(visits[of], self.num_patients + 1 + nth) for nth, of in enumerate(copies)]
        numbers = order.permutation(len(jobs)) + 1
        faulty = order.permutation(len(jobs)).tolist()
        named = set(faulty[: self.faults.identifiers])
        corrupt = faulty[self.faults.identifiers :][: self.faults.corrupt_files]
        clinical = draw_clinical(visits, self.seed) if self.clinical else {}
        return [
            PlannedFile(
                visit=visit,
                patient_number=number,
                number=int(numbers[job]),
                site=(site := sites[visit.patient.site]),
                scanner=new_scanner if self.shift.new_scanner else site.scanner,
                identified=job in named,
                spoiled=corrupt.index(job) if job in corrupt else None,
                clinical=clinical.get(visit, {}),
            )
            for job, (visit, number) in enumerate(jobs)
        ]

    def clinical_layout(self) -> dict[str, dict[str, str]]:
        """The catalogue's field for the clinical columns, where the cohort has them."""
        return {"clinical": {name: name for name in CLINICAL}} if self.clinical else {}


def describe(planned: PlannedFile[Any]) -> dict[str, Any]:
    """The columns of a cohort's table that say whose a file is and where it was made."""
    return {
        "patient": f"P{planned.patient_number:05d}",
        "site": planned.site.name,
        "scanner": planned.scanner.model,
        "age": planned.visit.patient.age_years,
        "sex": planned.visit.patient.sex,
    }


def write_boxes(path: Path, boxes: Iterable[tuple[str, str, int, int, int, int]]) -> None:
    """Write a cohort's boxes.csv, sorted: file, class, x0, y0, x1, y1."""
    columns = ["file", "class", "x0", "y0", "x1", "y1"]
    pd.DataFrame(sorted(boxes), columns=columns).to_csv(path, index=False)


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
