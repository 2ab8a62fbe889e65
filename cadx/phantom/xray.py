"""Chest X-rays as DICOM files, with rare opacities, their boxes and masks.

How one comes about. Structures add or take away attenuation, in units of log exposure, on a grid
of millimetres in the patient; the beam turns attenuation into exposure, with scatter and quantum noise; the
site's detector and processing turn exposure into stored numbers. An opacity is more attenuation inside a
lung, so it lies under ribs and vessels as a real one does. The label touches nothing else.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pydicom
from PIL import Image, ImageDraw, ImageFont
from pydantic import Field
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    ComputedRadiographyImageStorage,
    DigitalXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
)
from scipy.ndimage import gaussian_filter

from cadx.files import replacing
from cadx.phantom.cohort import (
    Array,
    Cohort,
    Count,
    FilesPerPatient,
    Patient,
    PositiveRange,
    Seed,
    Share,
    Site,
    Visit,
    drawing,
    spoil,
    stream,
    uid,
    write_boxes,
)
from cadx.phantom.shapes import bell, bounding_box, cloud, ellipse, rim, step

UNIT_MM = 200.0
"""Anatomy is written in this unit: x from the patient's right to left (image left to right), y downward."""
_SPACING_AT_PX = 192


class XrayPhantom(Cohort):
    """A chest X-ray cohort: one DICOM file per image, rare opacities with boxes and masks."""

    modality: Literal["xray"] = "xray"
    num_patients: Count = 1000
    images_per_patient: FilesPerPatient = 1.5  # mean; the later ones are follow-ups
    prevalence: Share = 0.12  # share of images with an opacity
    size_px: Annotated[int, Field(ge=48)] = 192  # height; one site's cassettes are narrower
    seed: Seed = 20
    opacity_radius_mm: PositiveRange = (13.0, 34.0)
    # Attenuation at the centre, log exposure; a rib is about 0.2.
    opacity_contrast: PositiveRange = (0.36, 0.8)

    def write(self, folder: Path) -> None:
        """Write the cohort: `write_xray_cohort`."""
        write_xray_cohort(folder, self)

    def layout(self, classes: Sequence[str]) -> dict[str, Any]:
        """The catalogue's fields for what `write` leaves; patients and sites come from the DICOM files."""
        negative, positive = classes
        return {
            "format": "table",
            "table": "labels.csv",
            "label_column": "label_opacity",
            "values": {"0": negative, "1": positive},
            "boxes": {"table": "boxes.csv", "x1": "x1", "y1": "y1"},
            **self.clinical_layout(),
        }


# --- Chest X-ray: sites and machines -----------------------------------------------------------------


@dataclass(frozen=True)
class Scanner:
    """A radiography machine and what its site does with it."""

    manufacturer: str
    model: str
    modality: Literal["DX", "CR"]
    spacing_mm: float  # at _SPACING_AT_PX rows; other heights keep the field of view
    aspect: float  # width / height
    bits: int
    photometric: Literal["MONOCHROME1", "MONOCHROME2"]
    gain: float  # stored range per unit of attenuation
    counts: float  # quanta per pixel without an object
    blur_px: float
    scatter: float
    flattening: float  # dynamic range compression of the processing, 0 = none
    window: float  # displayed width / width of the stored histogram
    marker: str


SITES = (
    Site(
        "Alder Valley University Hospital",
        0.40,
        Scanner("Kestrel Imaging", "Lumen 7", "DX", 2.06, 1.0, 12, "MONOCHROME2",
                0.25, 9000.0, 0.45, 0.05, 0.45, 1.05, "L"),
    ),
    Site(
        "Harbour Street Clinic",
        0.25,
        Scanner("Orrery Medical", "PlateReader 2", "CR", 2.14, 0.86, 10, "MONOCHROME1",
                0.22, 3500.0, 0.80, 0.09, 0.25, 1.20, "R"),
    ),
    Site(
        "Northmoor General Hospital",
        0.20,
        Scanner("Kestrel Imaging", "Lumen 5", "DX", 1.99, 1.0, 12, "MONOCHROME2",
                0.20, 6000.0, 0.60, 0.07, 0.55, 0.95, "L PA"),
    ),
    Site(
        "St. Edda Community Hospital",
        0.15,
        Scanner("Tern Radiology", "Fjord X", "DX", 2.10, 0.92, 12, "MONOCHROME2",
                0.28, 4500.0, 0.55, 0.06, 0.35, 1.10, "R"),
    ),
)  # fmt: skip
NEW_SCANNER = Scanner("Petrel Systems", "Arc One", "DX", 1.95, 1.0, 14, "MONOCHROME2",
                      0.18, 2500.0, 0.95, 0.12, 0.70, 1.35, "L")  # fmt: skip


# --- Chest X-ray: anatomy ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Chest:
    """What stays the same between a patient's images. Lengths in UNIT_MM."""

    half_width: float
    apex_y: float
    base_y: float
    heart: float
    heart_tilt: float
    knob: float
    spine_bow: float
    bone: float
    rib_first_y: float
    rib_spacing: float
    rib_tilt: float
    rib_jitter: Array  # 16 x 2: offset, width
    thickness: float
    breast: float
    breast_y: float
    nipples: bool
    gas: float
    pacemaker: bool
    granulomas: Array  # N 3: side, lateral fraction, height fraction
    warp: Array  # 2 x 3: amplitude, frequency, phase
    opacities: tuple["_OpacitySeed", ...]
    vessels: int


@dataclass(frozen=True)
class _OpacitySeed:
    """Where a patient's opacity sits and how it looks; its extent follows each visit."""

    side: int
    lateral: float  # 0 at the mediastinum, 1 at the chest wall
    height: float  # 0 at the apex, 1 at the diaphragm
    radius_mm: float
    contrast: float
    cloudy: bool  # consolidation; otherwise a nodule
    shape: int


@dataclass(frozen=True)
class _Pose:
    """Pixel grid to patient coordinates for one exposure."""

    height_px: int
    width_px: int
    spacing_mm: float
    rotation: float
    shift: tuple[float, float]
    scale: float

    def grid(self, warp: Array) -> tuple[Array, Array]:
        """Where each pixel lies: x and y, H W each."""
        step = np.float32(self.spacing_mm / UNIT_MM / self.scale)
        rows = (np.arange(self.height_px, dtype=np.float32) - (self.height_px - 1) / 2) * step
        columns = (np.arange(self.width_px, dtype=np.float32) - (self.width_px - 1) / 2) * step
        cos, sin = np.float32(np.cos(self.rotation)), np.float32(np.sin(self.rotation))
        x = cos * columns[None, :] + sin * rows[:, None] - np.float32(self.shift[0])
        y = cos * rows[:, None] - sin * columns[None, :] - np.float32(self.shift[1])
        (ax, fx, px), (ay, fy, py) = warp.astype(np.float32)
        # The bend is a function of the row or column alone, so it costs nothing and never folds.
        return x + ax * np.sin(fx * rows + px)[:, None], y + ay * np.sin(fy * columns + py)[None, :]

    def pixels(self, points: Array) -> Array:
        """N 2 (x, y) in the patient to N 2 (column, row), without the slight bend of `grid`."""
        cos, sin = np.cos(self.rotation), np.sin(self.rotation)
        moved = points + np.asarray(self.shift)
        turned: Array = moved @ np.array([[cos, sin], [-sin, cos]])
        size = np.array([self.width_px, self.height_px])
        return np.asarray(turned * self.scale * UNIT_MM / self.spacing_mm + (size - 1) / 2)


def _draw_chest(patient: Patient, config: XrayPhantom) -> _Chest:
    rng = stream(config.seed, "chest", patient.number)
    male = patient.sex == "M"
    ageing = (patient.age_years - 50) / 40
    size = (1.0 if male else 0.93) * rng.normal(1, 0.03)
    sides = rng.choice([-1, 1], size=8)
    num_granulomas = int(rng.integers(1, 4)) if rng.random() < 0.25 + 0.1 * ageing else 0
    return _Chest(
        half_width=0.69 * size * rng.normal(1, 0.025),
        apex_y=-0.74 * size + rng.normal(0, 0.02),
        base_y=0.42 * size + rng.normal(0, 0.035),
        heart=size * rng.normal(1 + 0.05 * ageing, 0.07),
        heart_tilt=rng.normal(0.65, 0.12),
        knob=0.075 * rng.normal(1 + 0.2 * ageing, 0.1),
        spine_bow=rng.normal(0, 0.018 + 0.008 * abs(ageing)),
        bone=rng.normal(1 - 0.15 * max(ageing, 0), 0.1),
        rib_first_y=-0.75 * size + rng.normal(0, 0.02),
        rib_spacing=0.118 * size * rng.normal(1, 0.04),
        rib_tilt=rng.normal(0.26, 0.03),
        rib_jitter=rng.normal(0, 1, (16, 2)),
        thickness=float(np.clip(rng.normal(1, 0.12), 0.75, 1.35)),
        breast=0.0 if male else float(np.clip(rng.normal(0.24, 0.05), 0.1, 0.34)),
        breast_y=rng.normal(0.16, 0.05),
        nipples=bool(rng.random() < (0.15 if male else 0.3)),
        gas=float(rng.choice([0.0, 1.0]) * rng.uniform(0.06, 0.14)),
        pacemaker=bool(rng.random() < 0.03 + 0.05 * max(ageing, 0)),
        granulomas=np.column_stack(
            [
                sides[:num_granulomas],
                rng.uniform(0.2, 0.9, num_granulomas),
                rng.uniform(0.15, 0.9, num_granulomas),
            ]
        ),
        warp=np.column_stack([rng.normal(0, 0.012, 2), rng.uniform(2, 4, 2), rng.uniform(0, 2 * np.pi, 2)]),
        opacities=tuple(
            _draw_opacity(rng, config) for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.28, 0.12]))
        ),
        vessels=int(rng.integers(2**31)),
    )


def _draw_opacity(rng: np.random.Generator, config: XrayPhantom) -> _OpacitySeed:
    side = int(rng.choice([-1, 1]))
    cloudy = bool(rng.random() < 0.55)
    low, high = config.opacity_radius_mm
    middle = (low + high) / 2
    height = float(rng.uniform(0.22, 0.86))
    # The left lower zone is the heart's from the hilum on: stay lateral of it.
    inner = 0.30 + (0.28 if side > 0 and height > 0.5 else 0.0)
    return _OpacitySeed(
        side=side,
        lateral=float(rng.uniform(inner, 0.80)),
        height=height,
        radius_mm=float(rng.uniform(middle, high) if cloudy else rng.uniform(low, middle)),
        contrast=float(rng.uniform(*config.opacity_contrast)),
        cloudy=cloudy,
        shape=int(rng.integers(2**31)),
    )


@dataclass(frozen=True)
class _Lungs:
    """Borders of both lungs: functions of the distance from the midline `u` and of `y`."""

    half_width: float
    apex_y: float
    right_base_y: float
    left_base_y: float

    def lateral(self, y: Array) -> Array:
        """`u` of the chest wall."""
        t = np.clip((0.34 - y) / (0.34 - self.apex_y), 0, 1)
        return self.half_width * np.sqrt(1 - t * t * np.sqrt(t)) * (1 + 0.05 * np.clip(y - 0.34, -0.3, 1))

    def medial(self, y: Array) -> Array:
        """`u` of the mediastinum, without heart and aorta."""
        return 0.085 + 0.045 * step(y + 0.55, 0.6)

    def dome(self, x: Array) -> Array:
        """`y` of the diaphragm."""
        away = np.abs(x) - 0.50 * self.half_width
        base = np.where(x < 0, self.right_base_y, self.left_base_y).astype(np.float32)
        return base + np.where(away > 0, np.float32(2.3), np.float32(0.55)) * away * away

    def point(self, side: int, lateral: float, height: float) -> tuple[float, float]:
        """x, y of a point a fraction of the way out to the wall and down to the dome."""
        u: Array = np.array(0.4, dtype=np.float32)
        for _ in range(3):  # each border depends on the other's coordinate: settle
            y = self.apex_y + height * (self.dome(side * u) - self.apex_y)
            u = self.medial(y) + lateral * (self.lateral(y) - self.medial(y))
        return float(side * u), float(y)


@dataclass(frozen=True)
class _Finding:
    """One opacity in an image: its mask, H W bool, and its box (x0, y0, x1, y1)."""

    mask: Array
    box: tuple[int, int, int, int]


def _attenuation(
    chest: _Chest, visit: Visit, pose: _Pose, view: str, rng: np.random.Generator
) -> tuple[Array, Array, list[_Finding]]:
    """Attenuation in log exposure, metal 0..1 (both H W float32), and the opacities."""
    x, y = pose.grid(chest.warp)
    u = np.abs(x)
    breath = rng.normal(0, 0.03) - (0.06 if view == "AP" else 0)
    heart = chest.heart * (1.12 if view == "AP" else 1.0)
    base_y = chest.base_y + breath
    lungs = _Lungs(chest.half_width, chest.apex_y, base_y - 0.02, base_y + 0.025)
    wall, domes = lungs.lateral(y), lungs.dome(x)
    below = step(y - domes + 0.03, 0.35)

    # Heart and great vessels take the place of air; the aorta stands out a little.
    ventricle = ellipse(x, y, (0.15 * heart, base_y - 0.20), (0.31 * heart, 0.20 * heart), chest.heart_tilt)
    atrium = ellipse(x, y, (-0.06, base_y - 0.25), (0.16 * heart, 0.22 * heart))
    trunk = ellipse(x, y, (0.05, -0.16), (0.14, 0.30))
    knob = ellipse(x, y, (0.10, -0.33), (chest.knob, chest.knob * 1.1))
    heart_shadow = np.maximum(ventricle, atrium)
    solid = np.maximum(np.maximum(heart_shadow * 0.85, trunk * 0.7), knob * 0.8)
    air = rim(wall - u, 0.26) * rim(u - lungs.medial(y), 0.07) * rim(domes - y, 0.05)
    lung = air * (1 - solid)

    attenuation = _body(chest, u, y, wall) * (1 + np.float32(0.22) * below)
    attenuation -= lung * np.float32(1.15 * chest.thickness)
    attenuation += (0.16 * heart_shadow + 0.12 * knob) * (1 - below)
    attenuation -= 0.17 * bell(x - 0.012, 0.042) * step(-0.20 - y, 0.06)  # trachea

    # Spine: bodies and discs, faint behind the heart.
    bow = x - np.float32(chest.spine_bow) * np.sin(3 * y)
    bodies = 0.8 + 0.2 * step(np.sin(2 * np.pi * y / 0.125) + 0.6, 0.8)
    attenuation += np.float32(0.20 * chest.bone) * bell(bow, 0.085) * bodies
    attenuation += _ribs(chest, u, y, wall)
    attenuation += _shoulder_girdle(chest, u, y)

    tree = _vessel_tree(chest, pose)
    attenuation += tree * (0.34 * lung + 0.05)
    texture = cloud(rng, x.shape, 6, 5, 0.75)
    attenuation += texture * (0.022 * lung + 0.008)

    if chest.breast:
        mound = ellipse(u, y, (0.40, chest.breast_y), (0.29, chest.breast * 1.15))
        attenuation += np.float32(1.1 * chest.breast) * mound * step(y - chest.breast_y + 0.25, 0.3)
    if chest.nipples:
        attenuation += 0.10 * ellipse(u, y, (0.41, chest.breast_y + 0.12), (0.024, 0.024))
    if chest.gas:
        bubble = ellipse(x, y, (0.30, base_y + 0.07), (0.15, chest.gas))
        attenuation -= 0.40 * bubble * step(y - domes - 0.01, 0.02)
    for _ in range(rng.poisson(0.5)):  # plate atelectasis and skin folds: thin lines, no opacity
        attenuation += _line_shadow(rng, lungs, x, y)

    findings = []
    if visit.positive:
        progress = stream(chest.vessels, "course", visit.index)
        for seed in chest.opacities:
            density = _opacity(seed, lungs, pose, x, y, lung, progress.normal(1, 0.12))
            attenuation += density
            mask = density > 0.35 * seed.contrast
            if mask.any():
                findings.append(_Finding(mask, bounding_box(mask)))
    return attenuation, _metal(chest, pose, lungs, view, rng), findings


def _body(chest: _Chest, u: Array, y: Array, wall: Array) -> Array:
    """Soft tissue of trunk, neck, shoulders and arms as if the lungs were solid."""
    outline = np.maximum(wall, np.float32(0.9 * chest.half_width)) + np.float32(0.06 + 0.07 * chest.thickness)
    shoulder_y = -0.62 - 0.36 * np.clip((0.98 - u) / 0.78, 0, 1) ** 1.6
    axilla_y = -0.10 - 1.1 * np.clip(u - 0.78, 0, 1)
    trunk = rim(outline - u, 0.45)
    arm = 0.8 * rim(u - 0.5, 0.3) * rim(axilla_y - y, 0.3)
    top = np.maximum(rim(y - shoulder_y, 0.40), 0.72 * bell(u, 0.25))
    return np.float32(1.8 * chest.thickness) * np.maximum(trunk, arm) * top


def _ribs(chest: _Chest, u: Array, y: Array, wall: Array) -> Array:
    """Eleven posterior ribs, arched upward, and the front ends of eight, arched downward."""
    wall = np.maximum(wall + 0.035, 0.2)
    arch = np.float32(chest.rib_tilt) * np.sqrt(np.clip(1 - (u / wall) ** 2, 0, 1)) * wall / chest.half_width
    inside = step(wall - u, 0.02)
    total = np.zeros_like(u)
    for level, num, opacity, thick, fade in (
        (y + arch * 0.75 - 0.16 * wall, 11, 0.20, 0.030, step(u - 0.05, 0.05)),
        (y - arch * 1.15 - 0.10, 8, 0.13, 0.036, step(u - 0.27, 0.12)),
    ):
        place = (level - np.float32(chest.rib_first_y)) / np.float32(chest.rib_spacing)
        index = np.clip(np.rint(place), 0, num - 1).astype(np.intp)
        offset = 0.06 * chest.rib_jitter[:, 0].astype(np.float32)
        width = (thick * (1 + 0.08 * chest.rib_jitter[:, 1])).astype(np.float32) / np.float32(
            chest.rib_spacing
        )
        across = (place - index - offset[index]) / width[index]
        rod = np.clip(1 - across * across, 0, 1)
        cortex = np.sqrt(rod) - 0.45 * rod  # brighter at the edges: bone is a tube
        total += np.float32(opacity * chest.bone / 0.6) * cortex * fade * inside
    return total


def _shoulder_girdle(chest: _Chest, u: Array, y: Array) -> Array:
    """Clavicles, scapulae, humeral heads and upper arms."""
    along = np.clip((u - 0.06) / 0.72, 0, 1)
    line = chest.apex_y + 0.185 - 0.10 * along + 0.03 * np.sin(2 * np.pi * along)
    rod = np.clip(1 - ((y - line) / (0.028 + 0.012 * (1 - along))) ** 2, 0, 1)
    clavicle = (np.sqrt(rod) - 0.35 * rod) * step(u - 0.05, 0.03) * step(0.84 - u, 0.05)
    edge = 0.60 + 0.16 * (y - chest.apex_y - 0.15)
    scapula = (
        step(u - edge, 0.035)
        * step(y - chest.apex_y - 0.05, 0.12)
        * step(-0.04 - y, 0.25)
        * step(0.98 - u, 0.2)
    )
    humerus = ellipse(u, y, (0.97, chest.apex_y + 0.12), (0.13, 0.12)) + 0.8 * bell(u - 1.0, 0.07) * step(
        y + 0.6, 0.1
    )
    return np.float32(chest.bone) * (0.30 * clavicle + 0.10 * scapula + 0.32 * humerus)


def _vessel_tree(chest: _Chest, pose: _Pose) -> Array:
    """Pulmonary vessels from both hila, branching and tapering, H W, 0..1."""
    rng = stream(chest.vessels, "tree")
    over = 2
    canvas = Image.new("L", (pose.width_px * over, pose.height_px * over))
    draw = ImageDraw.Draw(canvas)
    px_per_unit = over * pose.scale * UNIT_MM / pose.spacing_mm
    segments = []
    for side in (-1, 1):
        roots = 8
        at = np.column_stack([side * rng.uniform(0.12, 0.17, roots), rng.uniform(-0.13, 0.05, roots)])
        angle = np.linspace(-1.35, 1.25, roots) + rng.normal(0, 0.1, roots)
        width = np.full(roots, 0.034) * rng.uniform(0.7, 1.1, roots)
        for generation in range(5):
            length = 0.15 * 0.86**generation * rng.uniform(0.7, 1.3, len(at))
            end = at + length[:, None] * np.column_stack([side * np.cos(angle), np.sin(angle)])
            segments.append(np.column_stack([at, end, width]))
            at, angle, width = np.repeat(end, 2, 0), np.repeat(angle, 2), np.repeat(width, 2)
            fork = np.tile([-1.0, 1.0], len(end)) * rng.uniform(0.08, 0.55, len(at))
            angle = angle + fork
            width = width * rng.uniform(0.55, 0.85, len(at))
    table = np.concatenate(segments)
    table = table[np.argsort(table[:, 4], kind="stable")]
    start, end = over * pose.pixels(table[:, :2]), over * pose.pixels(table[:, 2:4])
    for (x0, y0), (x1, y1), width in zip(start.tolist(), end.tolist(), table[:, 4].tolist(), strict=True):
        shade = int(min(255, 40 + 215 * width / 0.034))
        draw.line((x0, y0, x1, y1), fill=shade, width=max(1, round(width * px_per_unit)))
    return np.asarray(canvas.reduce(over), dtype=np.float32) / 255


def _opacity(
    seed: _OpacitySeed, lungs: _Lungs, pose: _Pose, x: Array, y: Array, room: Array, growth: float
) -> Array:
    """Attenuation of one opacity, H W, 0 outside the lung: `room` says where there is any, 0..1."""
    rng = stream(seed.shape, "shape")
    centre = lungs.point(seed.side, seed.lateral, seed.height)
    radius = seed.radius_mm * float(np.clip(growth, 0.75, 1.3)) / UNIT_MM
    stretch = rng.uniform(0.75, 1.3) if seed.cloudy else rng.uniform(0.9, 1.1)
    dx, dy = (
        (x - np.float32(centre[0])) / np.float32(radius * stretch),
        (y - np.float32(centre[1])) / np.float32(radius / stretch),
    )
    angle = np.arctan2(dy, dx)
    lobes: Array = sum(
        a * np.cos(k * angle + p)
        for k, a, p in zip((2, 3, 5), rng.normal(0, [0.10, 0.09, 0.07]), rng.uniform(0, 6.3, 3), strict=True)
    )
    inside = 1 - np.sqrt(dx * dx + dy * dy) / (1 + (1.0 if seed.cloudy else 0.6) * lobes)
    cells = max(4, round(0.9 * pose.height_px * pose.spacing_mm / seed.radius_mm))
    grain = cloud(rng, x.shape, cells, 3)
    soft = 0.75 if seed.cloudy else 0.45
    profile = step(inside + (0.22 if seed.cloudy else 0.10) * grain * (inside > -0.6) + 0.12, soft)
    body = profile * (1 + (0.22 if seed.cloudy else 0.10) * grain)
    density: Array = np.float32(seed.contrast) * np.clip(body, 0, 1.5) * np.clip(room / 0.45, 0, 1)
    return np.where(inside > -0.8, density, np.float32(0))


def _line_shadow(rng: np.random.Generator, lungs: _Lungs, x: Array, y: Array) -> Array:
    cx, cy = lungs.point(int(rng.choice([-1, 1])), rng.uniform(0.3, 0.8), rng.uniform(0.8, 0.97))
    angle = rng.normal(0, 0.35)
    along = np.float32(np.cos(angle)) * (x - np.float32(cx)) + np.float32(np.sin(angle)) * (
        y - np.float32(cy)
    )
    across = np.float32(np.cos(angle)) * (y - np.float32(cy)) - np.float32(np.sin(angle)) * (
        x - np.float32(cx)
    )
    return (
        np.float32(rng.uniform(0.08, 0.2))
        * bell(across, 0.011)
        * step(rng.uniform(0.08, 0.2) - np.abs(along), 0.05)
    )


def _metal(chest: _Chest, pose: _Pose, lungs: _Lungs, view: str, rng: np.random.Generator) -> Array:
    """Calcified granulomas, electrodes, wires and a pacemaker, H W, 0..1."""
    over = 2
    canvas = Image.new("L", (pose.width_px * over, pose.height_px * over))
    draw = ImageDraw.Draw(canvas)
    px_per_unit = over * pose.scale * UNIT_MM / pose.spacing_mm

    def place(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
        return [(float(a), float(b)) for a, b in over * pose.pixels(np.asarray(points, dtype=float))]

    def disc(point: tuple[float, float], radius: float, fill: int) -> None:
        (a, b), r = place([point])[0], max(1.0, radius * px_per_unit)
        draw.ellipse((a - r, b - r, a + r, b + r), fill=fill)

    for side, lateral, height in chest.granulomas:
        disc(lungs.point(int(side), lateral, height), 0.011, 120)
    if chest.pacemaker:
        wire = [(0.52, -0.40), (0.30, -0.55), (0.05, -0.38), (0.0, 0.0), (0.10, chest.base_y - 0.10)]
        draw.line(place(wire), fill=150, width=max(1, round(0.012 * px_per_unit)), joint="curve")
        disc((0.55, -0.36), 0.085, 255)
    if rng.random() < (0.35 if view == "AP" else 0.06):
        for px, py in ((-0.45, -0.45), (0.48, -0.42), (0.52, 0.30)):
            point = (px + rng.normal(0, 0.05), py + rng.normal(0, 0.05))
            disc(point, 0.026, 150)
            tail = [point, (point[0] * 0.8 + rng.normal(0, 0.05), point[1] + 0.35), (rng.normal(0, 0.2), 1.1)]
            draw.line(place(tail), fill=90, width=max(1, round(0.008 * px_per_unit)), joint="curve")
    return np.asarray(canvas.reduce(over), dtype=np.float32) / 255


# --- Chest X-ray: from attenuation to a file ---------------------------------------------------------


@dataclass(frozen=True)
class _Radiograph:
    """Stored pixels (H W uint16, in the file's own polarity) with what the file says of them."""

    pixels: Array
    window_centre: float
    window_width: float
    spacing_mm: float
    view: str
    findings: list[_Finding]


def _radiograph(visit: Visit, scanner: Scanner, config: XrayPhantom) -> _Radiograph:
    chest = _draw_chest(visit.patient, config)
    rng = stream(config.seed, "exposure", visit.patient.number, visit.index)
    view = "AP" if rng.random() < 0.25 else "PA"
    spacing_mm = scanner.spacing_mm * _SPACING_AT_PX / config.size_px
    pose = _Pose(
        height_px=config.size_px,
        width_px=round(config.size_px * scanner.aspect),
        spacing_mm=spacing_mm,
        rotation=float(rng.normal(0, 0.025 if view == "PA" else 0.05)),
        shift=(float(rng.normal(0, 0.025)), float(rng.normal(0.06, 0.03))),
        scale=float(rng.normal(1.0 if view == "PA" else 1.05, 0.025)),
    )
    attenuation, metal, findings = _attenuation(chest, visit, pose, view, rng)
    shown = _detect(attenuation, metal, scanner, view, rng)

    # The machine's own window: where the histogram of the middle of the field lies.
    middle = shown[
        config.size_px // 8 : -config.size_px // 8 : 3, pose.width_px // 8 : -pose.width_px // 8 : 3
    ]
    low, high = np.percentile(middle, [1, 99.5])
    width = (high - low) * scanner.window * rng.normal(1, 0.06)
    centre = (low + high) / 2 + (high - low) * rng.normal(0, 0.05)
    if config.shift.gamma != 1:
        unit = np.clip((shown - centre) / width + 0.5, 0, 1)
        shown = (unit**config.shift.gamma - 0.5) * width + centre
    if config.shift.blur_sigma_px:
        shown = gaussian_filter(shown, config.shift.blur_sigma_px)
    largest = 2**scanner.bits - 1
    slope, offset = scanner.gain * largest, 0.20 * largest * rng.normal(1, 0.15)

    stored = shown * slope + offset
    border = _collimate(stored, rng)
    _lead_marker(stored, scanner, rng, bright=(centre + width / 2) * slope + offset)
    stored = np.rint(np.clip(stored, 0, largest)).astype(np.uint16)
    stored_centre, stored_width = float(centre * slope + offset), float(width * slope)
    if scanner.photometric == "MONOCHROME1":
        # PS3.3 C.11.2.1.2: the linear window is centred on c - 0.5, so its mirror image is on max + 1 - c.
        stored, stored_centre = np.uint16(largest) - stored, largest + 1 - stored_centre
    visible = [_Finding(mask, bounding_box(mask)) for f in findings if (mask := f.mask & ~border).any()]
    return _Radiograph(stored, round(stored_centre, 1), round(stored_width, 1), spacing_mm, view, visible)


def _detect(attenuation: Array, metal: Array, scanner: Scanner, view: str, rng: np.random.Generator) -> Array:
    """What the machine shows, in log exposure, dense = high, H W."""
    height, width = attenuation.shape
    heel = np.float32(rng.normal(0, 0.05)) * np.linspace(-1, 1, height, dtype=np.float32)[:, None]
    side = np.float32(rng.normal(0, 0.05)) * np.linspace(-1, 1, width, dtype=np.float32)[None, :]
    primary = np.exp(-np.maximum(attenuation + 0.6 * metal, 0) + heel + side)
    veil = _wide_blur(primary)
    exposure = primary + np.float32(scanner.scatter * (1.6 if view == "AP" else 1.0)) * (veil + 0.5)
    exposure = np.asarray(gaussian_filter(exposure, scanner.blur_px))
    counts = np.float32(scanner.counts * np.exp(rng.normal(0, 0.25)))
    noisy = exposure + np.sqrt(exposure / counts) * rng.standard_normal(exposure.shape, dtype=np.float32)
    dense: Array = -np.log(np.maximum(noisy, np.float32(1e-3)))
    dense -= np.float32(scanner.flattening) * (_wide_blur(dense) - np.float32(dense.mean()))
    return dense


def _wide_blur(image: Array) -> Array:
    """A blur over about a tenth of the field, worked out on an eighth of the pixels per side."""
    small = np.asarray(Image.fromarray(image).reduce(8))
    return np.asarray(
        Image.fromarray(gaussian_filter(small, max(small.shape) / 10)).resize(
            image.shape[::-1], Image.Resampling.BICUBIC
        )
    )


def _collimate(stored: Array, rng: np.random.Generator) -> Array:
    """Blacken what the shutters hide, in place; return where, H W bool."""
    height, width = stored.shape
    top, bottom, left, right = np.maximum(rng.normal(-0.01, 0.02, 4), 0)
    border = np.ones(stored.shape, dtype=bool)
    border[
        round(top * height) : height - round(bottom * height),
        round(left * width) : width - round(right * width),
    ] = False
    stored[border] = 0
    return border


def _lead_marker(stored: Array, scanner: Scanner, rng: np.random.Generator, bright: float) -> None:
    """Burn the side letter in, in place: on the patient's side that it names."""
    glyph = _glyph(scanner.marker, max(9, round(stored.shape[0] / 15)))
    height, width = glyph.shape
    row = round(stored.shape[0] * rng.uniform(0.05, 0.10))
    margin = round(stored.shape[1] * rng.uniform(0.04, 0.09))
    column = margin if scanner.marker == "R" else stored.shape[1] - margin - width
    patch = stored[row : row + height, column : column + width]
    patch += (np.maximum(bright, patch) - patch) * glyph


@lru_cache
def _glyph(text: str, size_px: int) -> Array:
    """Letters as H W float32, 0..1."""
    font = ImageFont.load_default(size_px)
    left, top, right, bottom = (round(v) for v in font.getbbox(text))
    canvas = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(canvas).text((-left, -top), text, fill=255, font=font)
    return np.asarray(canvas, dtype=np.float32) / 255


def _dicom(
    image: _Radiograph, visit: Visit, site: Site[Scanner], scanner: Scanner, patient_number: int, seed: int
) -> Dataset:
    study = (seed, "xray", patient_number, visit.index)
    ds = Dataset()
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.ImageType = ["ORIGINAL", "PRIMARY", ""]
    ds.SOPClassUID = (
        DigitalXRayImageStorageForPresentation
        if scanner.modality == "DX"
        else ComputedRadiographyImageStorage
    )
    ds.SOPInstanceUID = uid(*study, "instance")
    ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ds.ReferringPhysicianName = ds.StudyID = ""
    ds.StudyInstanceUID = uid(*study, "study")
    ds.SeriesInstanceUID = uid(*study, "series")
    ds.SeriesNumber, ds.InstanceNumber = 1, 1
    ds.Modality = scanner.modality
    ds.Manufacturer, ds.ManufacturerModelName = scanner.manufacturer, scanner.model
    ds.InstitutionName = site.name
    ds.BodyPartExamined = "CHEST"
    ds.ViewPosition = image.view
    ds.PatientOrientation = ["L", "F"]
    ds.PatientID = f"P{patient_number:05d}"
    ds.PatientName = ds.PatientBirthDate = ""
    ds.PatientSex, ds.PatientAge = visit.patient.sex, f"{visit.patient.age_years:03d}Y"
    ds.PatientIdentityRemoved = "YES"
    ds.DeidentificationMethod = "Synthetic: there is no patient"
    ds.LongitudinalTemporalOffsetFromEvent = float(30 * visit.index)
    ds.LongitudinalTemporalEventType = "ENROLLMENT"
    if scanner.modality == "DX":
        ds.PresentationIntentType = "FOR PRESENTATION"
        ds.PixelIntensityRelationship = "LOG"
        ds.PixelIntensityRelationshipSign = 1 if scanner.photometric == "MONOCHROME1" else -1
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = 0, 1, "US"
        ds.PresentationLUTShape = "INVERSE" if scanner.photometric == "MONOCHROME1" else "IDENTITY"
        ds.ImagerPixelSpacing = [round(image.spacing_mm, 4)] * 2
    ds.BurnedInAnnotation = "NO"
    ds.LossyImageCompression = "00"
    ds.PixelSpacing = [round(image.spacing_mm, 4)] * 2
    ds.WindowCenter, ds.WindowWidth = image.window_centre, image.window_width
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = scanner.photometric
    ds.Rows, ds.Columns = image.pixels.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = (
        16,
        scanner.bits,
        scanner.bits - 1,
        0,
    )
    ds.PixelData = image.pixels.astype("<u2").tobytes()
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    # pydicom would name its own version here, and an upgrade would change every byte's digest.
    meta.ImplementationClassUID, meta.ImplementationVersionName = uid("cadx"), "CADX_PHANTOM"
    ds.file_meta = meta
    return ds


def write_xray_cohort(folder: Path, config: XrayPhantom) -> None:
    """Write the cohort that `config` describes; it appears whole or not at all.

    - `images/<id>.dcm`: DICOM, DX or CR, uncompressed; numbered in an order unrelated to the patients
    - `labels.csv`: file (relative to `folder`), label_opacity (0 or 1), with `clinical` its columns; by file
    - `boxes.csv`: file, class ("opacity"), x0, y0, x1, y1: 0-based, half-open, in stored pixels
    - `masks/<id>.png`: 255 where an opacity is; a file only for images that have one
    """
    planned_files = config.plan(config.images_per_patient, SITES, NEW_SCANNER)
    labels: list[dict[str, Any]] = []
    boxes: list[tuple[str, str, int, int, int, int]] = []
    with replacing(folder) as partial:
        (partial / "images").mkdir(parents=True)
        (partial / "masks").mkdir()
        for planned in drawing(planned_files, "chest X-rays"):
            visit, scanner = planned.visit, planned.scanner
            image = _radiograph(visit, scanner, config)
            ds = _dicom(image, visit, planned.site, scanner, planned.patient_number, config.seed)
            if planned.identified:
                _plant_identifiers(ds, planned.patient_number)
            stem = f"cxr-{planned.number:05d}"
            file = f"images/{stem}.dcm"
            pydicom.dcmwrite(partial / file, ds, enforce_file_format=True)
            if planned.spoiled is not None:
                spoil(partial / file, planned.spoiled)
            labels.append({"file": file, "label_opacity": int(bool(image.findings)), **planned.clinical})
            boxes.extend((file, "opacity", *finding.box) for finding in image.findings)
            if image.findings:
                mask = np.any([finding.mask for finding in image.findings], axis=0)
                Image.fromarray(mask).convert("L").save(partial / "masks" / f"{stem}.png")
        pd.DataFrame(labels).sort_values("file").to_csv(partial / "labels.csv", index=False)
        write_boxes(partial / "boxes.csv", boxes)


def _plant_identifiers(ds: Dataset, patient_number: int) -> None:
    ds.PatientName = f"Phantom^Person {patient_number}"
    ds.PatientBirthDate = "19500101"
    ds.ReferringPhysicianName = "Phantom^Physician"
    del ds.PatientIdentityRemoved, ds.DeidentificationMethod
