"""Mammograms as PNG files: small masses and clusters of calcifications with their boxes, and images without any.

How one comes about. Fat, gland, ducts, ligaments, vessels and muscle add up along the beam within the outline
of a compressed breast; the site's machine blurs, adds noise and displays. A mass is a little more tissue with an
irregular border; a cluster is a handful of specks close together. What looks like them and is none stands in
every kind of image: lymph nodes with a fatty hilum, single coarse calcifications, calcified vessels, and
shadows that only add up. The label touches nothing but the lesions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw, PngImagePlugin
from scipy.ndimage import gaussian_filter

from cadx.files import replacing
from cadx.phantom.cohort import (
    Array,
    Cohort,
    Count,
    FilesPerPatient,
    Patient,
    PositiveRange,
    Range,
    Seed,
    Share,
    Site,
    Visit,
    describe,
    drawing,
    spoil,
    stream,
    write_boxes,
)
from cadx.phantom.shapes import bell, bounding_box, cloud, ellipse, rim, step

CLASSES = ("mass", "calcification_cluster")
"""The words of boxes.csv; a catalogue entry may call them otherwise, in this order."""
_SIZE_PX = (512, 384)


class LesionPhantom(Cohort):
    """A mammography cohort: one PNG file per image, small lesions of two classes with boxes."""

    modality: Literal["lesion"] = "lesion"
    num_patients: Count = 600
    images_per_patient: FilesPerPatient = 1.5  # mean; views and follow-ups of one breast
    prevalence: Share = 0.35  # share of images with a lesion
    seed: Seed = 50
    lesion_size_px: PositiveRange = (8.0, 32.0)  # about the longer side of its box
    mass_contrast: PositiveRange = (0.10, 0.24)  # of the displayed range, at the centre
    speck_contrast: PositiveRange = (0.18, 0.45)

    def write(self, folder: Path) -> None:
        """Write the cohort: `write_lesion_cohort`."""
        write_lesion_cohort(folder, self)

    def layout(self, classes: Sequence[str]) -> dict[str, Any]:
        """The catalogue's fields for what `write` leaves."""
        names = dict(zip(CLASSES, classes, strict=True))
        return {
            "format": "table",
            "kind": "image",
            "table": "labels.csv",
            "columns": {name: name for name in ("patient", "site", "scanner", "age", "sex", "view")},
            "boxes": {"table": "boxes.csv", "x1": "x1", "y1": "y1", "values": names},
            **self.clinical_layout(),
        }


# --- Sites and machines -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scanner:
    """A mammography machine and its display."""

    model: str
    bits: Literal[8, 16]
    noise: float  # of the displayed range
    blur_px: float
    gamma: float
    black: float  # what it shows outside the breast, of the displayed range


SITES = (
    Site("Alder Valley University Hospital", 0.40, Scanner("Kestrel Mammo 3", 16, 0.012, 0.45, 1.0, 0.0)),
    Site("Harbour Street Clinic", 0.25, Scanner("Orrery Mammo CR", 8, 0.020, 0.75, 0.85, 0.03)),
    Site("Northmoor General Hospital", 0.20, Scanner("Kestrel Mammo 2", 16, 0.016, 0.60, 1.15, 0.0)),
    Site("St. Edda Community Hospital", 0.15, Scanner("Tern Fjord M", 8, 0.014, 0.50, 1.05, 0.015)),
)
NEW_SCANNER = Scanner("Petrel Arc Mammo", 16, 0.030, 0.9, 1.4, 0.05)


# --- Anatomy ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Breast:
    """What stays the same between a patient's images. Fractions of the height, from the chest wall outwards."""

    left: bool
    depth: float
    half_height: float
    density: float  # share of gland
    gland: int
    num_vessels: int
    calcified_vessel: bool
    num_coarse: int
    num_nodes: int
    num_shadows: int
    lesions: tuple["_Lesion", ...]


@dataclass(frozen=True)
class _Lesion:
    """Where a patient's lesion sits (fractions of depth and half height) and how it looks."""

    kind: str
    outwards: float
    along: float
    size_px: float
    contrast: float
    shape: int


def _draw_breast(patient: Patient, config: LesionPhantom) -> _Breast:
    rng = stream(config.seed, "breast", patient.number)
    ageing = (patient.age_years - 50) / 40
    return _Breast(
        left=bool(rng.random() < 0.5),
        depth=float(np.clip(rng.normal(0.50, 0.07), 0.34, 0.66)),
        half_height=float(np.clip(rng.normal(0.38, 0.04), 0.28, 0.46)),
        density=float(np.clip(rng.normal(0.45 - 0.15 * ageing, 0.16), 0.08, 0.9)),
        gland=int(rng.integers(2**31)),
        num_vessels=int(rng.integers(2, 6)),
        calcified_vessel=bool(rng.random() < 0.15 + 0.15 * max(ageing, 0)),
        num_coarse=int(rng.poisson(0.7)),
        num_nodes=int(rng.poisson(0.5)),
        num_shadows=int(rng.poisson(2.0)),
        lesions=_draw_lesions(patient, config),
    )


def _draw_lesions(patient: Patient, config: LesionPhantom) -> tuple[_Lesion, ...]:
    rng = stream(config.seed, "lesions", patient.number)
    lesions = []
    for _ in range(rng.choice(6, p=[0.50, 0.22, 0.13, 0.08, 0.04, 0.03]) + 1):
        kind = CLASSES[int(rng.random() < 0.45)]
        contrast = config.mass_contrast if kind == "mass" else config.speck_contrast
        low, high = config.lesion_size_px
        lesions.append(
            _Lesion(
                kind=kind,
                outwards=float(rng.uniform(0.18, 0.80)),
                along=float(rng.uniform(-0.62, 0.62)),
                size_px=float(low * (high / low) ** rng.random()),
                contrast=float(rng.uniform(*contrast)),
                shape=int(rng.integers(2**31)),
            )
        )
    return tuple(lesions)


@dataclass(frozen=True)
class _Field:
    """The pixel grid with the chest wall on the left, and the breast's outline in it."""

    breast: _Breast
    slope: float  # how far the outline hangs down: MLO
    moved: Range  # down, outwards, in pixels

    def grid(self) -> tuple[Array, Array]:
        """Y and x in pixels from the middle of the chest wall's edge, that broadcast to H W."""
        height, width = _SIZE_PX
        y = np.arange(height, dtype=np.float32) - np.float32(height / 2 + self.moved[0])
        x = np.arange(width, dtype=np.float32) - np.float32(self.moved[1])
        return y[:, None], x[None, :]

    def inside(self, y: Array, x: Array) -> Array:
        """How far in from the skin, about, in pixels; negative outside."""
        depth, half = self.breast.depth * _SIZE_PX[0], self.breast.half_height * _SIZE_PX[0]
        v = (y - np.float32(self.slope) * np.maximum(x, 0)) / np.float32(half)
        u = np.maximum(x, 0) / np.float32(depth)
        return (1 - np.sqrt(np.abs(v) ** 2.3 + np.abs(u) ** 2.0)) * np.float32(min(depth, half))

    def place(self, outwards: float, along: float) -> tuple[float, float]:
        """y, x of a point a fraction of the way out and along: in the breast whenever both are below 0.8."""
        depth, half = self.breast.depth * _SIZE_PX[0], self.breast.half_height * _SIZE_PX[0]
        x = outwards * depth
        reach = half * np.sqrt(max(0.0, 1 - outwards**2))
        return float(along * reach + self.slope * x), float(x)


def _anatomy(field: _Field, view: str, rng: np.random.Generator) -> tuple[Array, Array]:
    """What the beam has passed, 0..1, and how far in from the skin each pixel lies, H W each."""
    breast = field.breast
    y, x = field.grid()
    below = field.inside(y, x)
    body = rim(below, 26)
    build = stream(breast.gland, "gland")
    nipple = field.place(1.0, 0.0)

    # Gland: a cone that opens from the nipple to the chest wall, cloudy and streaked.
    reach = breast.depth * _SIZE_PX[0]
    to_nipple = np.hypot(y - np.float32(nipple[0]), x - np.float32(nipple[1]))
    angle = np.arctan2(y - np.float32(nipple[0]), np.float32(nipple[1]) - x)
    lumps = cloud(build, _SIZE_PX, 7, 5, 0.62)
    cone = step(0.95 - np.abs(angle + 0.15 * lumps), 0.5) * step(below - 10, 35)
    cone *= step(1.05 * reach - to_nipple, 0.5 * reach)
    threshold = np.float32(1.3 - 2.6 * breast.density)
    gland = cone * step(lumps - threshold + 0.5, 1.6)
    streaks = np.sin(angle * np.float32(26) + 2.2 * lumps)
    ridges = 1 - np.abs(cloud(build, _SIZE_PX, 16, 4, 0.7))
    fine = cloud(build, _SIZE_PX, 40, 3, 0.8)
    shown = 0.26 + 0.30 * gland * (1 + 0.12 * streaks + 0.10 * fine)
    shown += (0.035 * np.clip(ridges, -1, 1) + 0.012 * fine) * (1 - 0.5 * gland)
    shown += 0.035 * lumps
    if view == "MLO":
        edge = np.float32(rng.uniform(0.26, 0.38)) - (y / _SIZE_PX[0] + 0.5) * np.float32(
            rng.uniform(0.4, 0.6)
        )
        shown += 0.26 * step(edge + 0.008 * lumps - x / _SIZE_PX[0], 0.05)
    for _ in range(breast.num_shadows):
        cy, cx = field.place(build.uniform(0.15, 0.75), build.uniform(-0.7, 0.7))
        axes = (build.uniform(16, 40), build.uniform(12, 30))
        shadow = ellipse(x, y, (cx, cy), axes, build.uniform(0, np.pi))
        shown += np.float32(build.uniform(0.03, 0.10)) * shadow * shadow
    shown *= body
    # The skin is seen edge on.
    shown += 0.10 * bell(below - 3, 3.0)
    shown += 0.18 * ellipse(x, y, (nipple[1] - 3, nipple[0]), (10, 9)) * (below > -8)
    return shown + _lines(field, build) * step(below, 12), below


def _lines(field: _Field, rng: np.random.Generator) -> Array:
    """Vessels, and the calcified walls of one of them, H W."""
    over, (height, width) = 2, _SIZE_PX
    soft, hard = (Image.new("L", (width * over, height * over)) for _ in range(2))
    for number in range(field.breast.num_vessels):
        start = field.place(0.0, rng.uniform(-0.8, 0.8))
        end = field.place(rng.uniform(0.5, 0.85), rng.uniform(-0.6, 0.6))
        t = np.linspace(0, 1, 24)
        bow = rng.normal(0, 14) * np.sin(np.pi * t) + rng.normal(0, 5) * np.sin(3 * np.pi * t)
        rows = start[0] + (end[0] - start[0]) * t + bow + height / 2 + field.moved[0]
        columns = start[1] + (end[1] - start[1]) * t + field.moved[1]
        points = [(float(c) * over, float(r) * over) for r, c in zip(rows, columns, strict=True)]
        thick = rng.uniform(2.0, 4.0)
        ImageDraw.Draw(soft).line(
            points, fill=int(rng.uniform(90, 160)), width=round(thick * over), joint="curve"
        )
        if number == 0 and field.breast.calcified_vessel:
            for aside in (-thick / 2, thick / 2):
                walls = [(c, r + aside * over) for c, r in points]
                for one, other in pairwise(walls[4:19]):
                    if rng.random() < 0.6:
                        ImageDraw.Draw(hard).line((one, other), fill=int(rng.uniform(120, 230)), width=over)
    lines = [np.asarray(canvas.reduce(over), dtype=np.float32) / 255 for canvas in (soft, hard)]
    return np.float32(0.16) * np.asarray(gaussian_filter(lines[0], 0.8)) + np.float32(0.35) * lines[1]


def _lookalikes(field: _Field, view: str, shown: Array, below: Array) -> None:
    """Lymph nodes with a fatty hilum, and single coarse calcifications, added in place."""
    breast = field.breast
    rng = stream(breast.gland, "lookalikes")
    y, x = field.grid()
    for _ in range(breast.num_nodes):
        # Most nodes lie high and near the muscle.
        along = rng.uniform(-0.85, -0.2) if view == "MLO" else rng.uniform(-0.6, 0.6)
        cy, cx = field.place(rng.uniform(0.10, 0.5), along)
        radius, turn = rng.uniform(6, 13), rng.uniform(0, np.pi)
        node = ellipse(x, y, (cx, cy), (radius, 0.65 * radius), turn)
        hilum = ellipse(x, y, (cx + 0.3 * radius, cy), (0.5 * radius, 0.32 * radius), turn)
        shown += (
            np.float32(rng.uniform(0.12, 0.24)) * (step(node, 0.5) - 1.1 * step(hilum, 0.6)) * (below > 6)
        )
    for _ in range(breast.num_coarse):
        cy, cx = field.place(rng.uniform(0.1, 0.85), rng.uniform(-0.75, 0.75))
        radius = rng.uniform(1.5, 3.2)
        speck = step(ellipse(x, y, (cx, cy), (radius, radius * rng.uniform(0.7, 1))), 0.6)
        hollow = rng.random() < 0.4
        if hollow:
            speck = speck - 0.6 * step(ellipse(x, y, (cx, cy), (0.6 * radius,) * 2), 0.6)
        shown += np.float32(rng.uniform(0.35, 0.6)) * speck * (below > 4)


def _draw_lesion(lesion: _Lesion, field: _Field, growth: float) -> tuple[Array, Array]:
    """What a lesion adds, and where it is (bool), H W each."""
    rng = stream(lesion.shape, "lesion")
    y, x = field.grid()
    cy, cx = field.place(lesion.outwards, lesion.along)
    dy, dx = y - np.float32(cy), x - np.float32(cx)
    radius = 0.5 * lesion.size_px * float(np.clip(growth, 0.85, 1.15))
    added: Array = np.zeros(_SIZE_PX, dtype=np.float32)
    if lesion.kind == "mass":
        stretch, turn = np.sqrt(rng.uniform(1.0, 1.5)), rng.uniform(0, np.pi)
        u = np.float32(np.cos(turn)) * dx + np.float32(np.sin(turn)) * dy
        v = np.float32(np.cos(turn)) * dy - np.float32(np.sin(turn)) * dx
        u, v = u * np.float32(stretch / radius), v * np.float32(1 / stretch / radius)
        angle = np.arctan2(v, u)
        spikes, spiky = rng.integers(7, 12), rng.uniform(0.04, 0.22)
        border = 0.82 + np.float32(rng.normal(0, 0.08)) * np.cos(2 * angle + np.float32(rng.uniform(0, 6.3)))
        border = border + np.float32(rng.normal(0, 0.07)) * np.cos(
            3 * angle + np.float32(rng.uniform(0, 6.3))
        )
        border = (
            border
            + np.float32(spiky) * np.abs(np.cos(spikes / 2 * angle + np.float32(rng.uniform(0, 6.3)))) ** 4
        )
        inside = border - np.hypot(u, v)
        added = np.float32(lesion.contrast) * step(inside, 0.55) * (0.85 + 0.15 * rim(inside, 0.8))
        return added, added > 0.15 * lesion.contrast
    number = int(np.clip(rng.normal(0.55 * lesion.size_px, 2), 5, 18))
    ring, around = np.sqrt(rng.uniform(0, 1, number)), rng.uniform(0, 2 * np.pi, number)
    ring[:2] = 1.0  # some reach the border, so that a cluster has the size that was asked for
    squash, lean = rng.uniform(0.55, 1.0), rng.uniform(0, np.pi)
    for out, at in zip(0.88 * radius * ring, around, strict=True):
        a, b = out * np.cos(at), squash * out * np.sin(at)
        offset = (a * np.sin(lean) + b * np.cos(lean), a * np.cos(lean) - b * np.sin(lean))
        sigma = np.float32(rng.uniform(0.55, 0.95))
        square = (dy - np.float32(offset[0])) ** 2 + (dx - np.float32(offset[1])) ** 2
        speck = np.exp(-square / (2 * sigma * sigma))
        added = np.maximum(added, np.float32(lesion.contrast * rng.uniform(0.6, 1.0)) * speck)
    return added, added > 0.2 * lesion.contrast


# --- From anatomy to a file ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Mammogram:
    """Pixels (H W, uint8 or uint16), the view, and the lesions as (class, x0, y0, x1, y1)."""

    pixels: Array
    view: str
    boxes: list[tuple[str, int, int, int, int]]


def _mammogram(visit: Visit, scanner: Scanner, config: LesionPhantom) -> _Mammogram:
    breast = _draw_breast(visit.patient, config)
    rng = stream(config.seed, "exposure", visit.patient.number, visit.index)
    view = "MLO" if rng.random() < 0.5 else "CC"
    field = _Field(
        breast,
        slope=float(rng.uniform(0.12, 0.3) if view == "MLO" else rng.normal(0, 0.02)),
        moved=(float(rng.normal(0, 8)), float(rng.uniform(-6, 2))),
    )
    shown, below = _anatomy(field, view, rng)
    _lookalikes(field, view, shown, below)
    boxes = []
    if visit.positive:
        course = stream(config.seed, "course", visit.patient.number, visit.index)
        for lesion in breast.lesions:
            added, where = _draw_lesion(lesion, field, course.normal(1, 0.07))
            where &= below > 4
            if where.any():
                shown += added * (below > 4)
                x0, y0, x1, y1 = bounding_box(where)
                if not breast.left:
                    x0, x1 = _SIZE_PX[1] - x1, _SIZE_PX[1] - x0
                boxes.append((lesion.kind, x0, y0, x1, y1))
    shown = gaussian_filter(shown, scanner.blur_px)
    dose = np.float32(scanner.noise * np.exp(rng.normal(0, 0.2)))
    noise = rng.standard_normal(_SIZE_PX, dtype=np.float32)
    shown = (
        shown * np.float32(rng.normal(1.0, 0.06)) + dose * noise * (below > -2) + np.float32(scanner.black)
    )
    shown = np.clip(shown, 0, 1) ** np.float32(scanner.gamma * config.shift.gamma)
    if config.shift.blur_sigma_px:
        shown = gaussian_filter(shown, config.shift.blur_sigma_px)
    if not breast.left:
        shown = shown[:, ::-1]
    top = 2**scanner.bits - 1
    pixels = np.rint(np.clip(shown, 0, 1) * top).astype(np.uint8 if scanner.bits == 8 else np.uint16)
    return _Mammogram(np.ascontiguousarray(pixels), view, boxes)


def write_lesion_cohort(folder: Path, config: LesionPhantom) -> None:
    """Write the cohort that `config` describes; it appears whole or not at all.

    - `images/<id>.png`: gray, 8 or 16 bits by site; numbered in an order unrelated to the patients
    - `labels.csv`: file, patient, site, scanner, age, sex, view, label_mass and label_calcification_cluster
      (0 or 1 each), with `clinical` its columns; sorted by file
    - `boxes.csv`: file, class (a word of CLASSES), x0, y0, x1, y1: 0-based, half-open, in stored pixels; most
      images have none
    """
    planned_files = config.plan(config.images_per_patient, SITES, NEW_SCANNER)
    rows: list[dict[str, Any]] = []
    boxes: list[tuple[str, str, int, int, int, int]] = []
    with replacing(folder) as partial:
        (partial / "images").mkdir(parents=True)
        for planned in drawing(planned_files, "mammograms"):
            image = _mammogram(planned.visit, planned.scanner, config)
            file = f"images/mg-{planned.number:05d}.png"
            notes = PngImagePlugin.PngInfo()
            if planned.identified:
                notes.add_text("Patient", f"Phantom^Person {planned.patient_number}")
            Image.fromarray(image.pixels).save(partial / file, pnginfo=notes, compress_level=1)
            if planned.spoiled is not None:
                spoil(partial / file, planned.spoiled)
            found = {kind for kind, *_ in image.boxes}
            rows.append(
                {
                    "file": file,
                    **describe(planned),
                    "sex": "F",
                    "view": image.view,
                    **{f"label_{kind}": int(kind in found) for kind in CLASSES},
                    **planned.clinical,
                }
            )
            boxes.extend((file, *box) for box in image.boxes)
        pd.DataFrame(rows).sort_values("file").to_csv(partial / "labels.csv", index=False)
        write_boxes(partial / "boxes.csv", boxes)
