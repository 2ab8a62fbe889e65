"""Thoracic CT as NIfTI files: one lung with its wall, and rare nodules with their masks.

How one comes about. Anatomy is written in millimetres in a block of the chest: the lung between ribs,
mediastinum and diaphragm; a tree of vessels, which look like nodules where a slice cuts them across, and one of
bronchi; fissures, bands, bullae and calcified granulomas. A nodule is more tissue inside the lung. The
site's machine samples it all on its own grid, blurs it by its kernel, adds noise, and writes it in its own
orientation. The label touches nothing but the nodules.
"""

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import nibabel
import numpy as np
import pandas as pd
from pydantic import field_validator, model_validator
from scipy.ndimage import gaussian_filter

from cadx.files import replacing
from cadx.phantom.cohort import (
    Array,
    Cohort,
    Count,
    FilesPerPatient,
    Patient,
    Range,
    Seed,
    Share,
    Site,
    Visit,
    describe,
    drawing,
    spoil,
    stream,
)
from cadx.phantom.shapes import step

EXTENT_MM = (100.0, 112.0, 104.0)
"""Size of the block that every file shows, D H W: along the body, from back to front, from left to right."""

_AIR_HU, _BLOOD_HU = -990.0, 45.0
_LOWEST_HU, _HIGHEST_HU = -1024, 3071


class VolumePhantom(Cohort):
    """A chest CT cohort: one NIfTI file per scan, rare nodules with masks."""

    modality: Literal["volume"] = "volume"
    num_patients: Count = 240
    scans_per_patient: FilesPerPatient = 1.25  # mean; the later ones are follow-ups
    prevalence: Share = 0.4  # share of scans with a nodule
    seed: Seed = 30
    nodule_radius_mm: Range = (4.0, 12.0)

    def write(self, folder: Path) -> None:
        """Write the cohort: `write_volume_cohort`."""
        write_volume_cohort(folder, self)

    def layout(self, classes: Sequence[str]) -> dict[str, Any]:
        """The catalogue's fields for what `write` leaves."""
        negative, positive = classes
        return {
            "format": "table",
            "kind": "volume",
            "table": "labels.csv",
            "label_column": "label_nodule",
            "values": {"0": negative, "1": positive},
            "columns": {name: name for name in ("patient", "site", "scanner", "age", "sex")},
            "mask_column": "mask",
            **self.clinical_layout(),
        }

    @field_validator("nodule_radius_mm")
    @classmethod
    def _fits(cls, value: Range) -> Range:
        if not 2 <= value[0] <= value[1] <= 20:
            raise ValueError("give two radii from 2 to 20 mm, the smaller one first")
        return value

    @model_validator(mode="after")
    def _can_shift(self) -> Self:
        if self.shift.gamma != 1:
            raise ValueError(
                "shift.gamma: CT numbers are absolute and are not displayed darker; "
                "leave it at 1, and use blur_sigma_px or new_scanner"
            )
        return self


# --- Sites and machines -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scanner:
    """A CT machine with its protocol, and how its site exports."""

    model: str
    spacing_mm: tuple[float, float, float]  # D H W
    axes: str  # NIfTI orientation of the file's axes
    kernel_mm: float  # standard deviation of the blur within a slice; negative: one that sharpens
    noise_hu: float
    offset_hu: float  # calibration


SITES = (
    Site(
        "Alder Valley University Hospital",
        0.35,
        Scanner("Kestrel Spiral 64", (1.2,) * 3, "RAS", 0.5, 24.0, 0.0),
    ),
    Site("Harbour Street Clinic", 0.25, Scanner("Orrery Helix 16", (2.5, 1.17, 1.17), "LPS", 0.8, 14.0, 6.0)),
    Site(
        "Northmoor General Hospital",
        0.25,
        Scanner("Kestrel Spiral 128", (1.25, 1.3, 1.3), "LAS", -0.6, 38.0, -4.0),
    ),
    Site(
        "St. Edda Community Hospital", 0.15, Scanner("Tern Fjord CT", (2.0, 1.4, 1.4), "PIR", 0.6, 20.0, 3.0)
    ),
)
NEW_SCANNER = Scanner("Petrel Photon One", (1.0, 1.25, 1.25), "LPS", -0.9, 60.0, -12.0)


# --- Anatomy ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Nodule:
    """One nodule of a patient. The centre is (up, front, out) in mm, see `_Thorax`."""

    centre: tuple[float, float, float]
    radius_mm: float
    kind: Literal["solid", "part solid", "ground glass"]
    shape: int


@dataclass(frozen=True)
class _Thorax:
    """What stays the same between a patient's scans: one half of the chest.

    Coordinates in mm: `up` from the middle of the block towards the head, `front` from its middle
    towards the breastbone, `out` from the midline towards the side wall.
    """

    side: Literal[-1, 1]  # 1: the patient's right half
    wall: tuple[float, float]  # half-axes of the rib cage, out and front
    muscle_mm: float  # of the wall, beyond which lies fat
    mediastinum_mm: float
    heart: tuple[float, float, float, float]  # up, front, out of its centre; radius
    dome_up: float
    bone_hu: float
    rib_phase: float
    lung_hu: float
    gravity_hu: float
    vessel_radius_mm: float
    num_bullae: int
    num_granulomas: int
    num_bands: int
    shape: int

    def ellipse(self, up: Array, front: Array, out: Array) -> Array:
        """Depth below the inner face of the rib cage in mm, about: negative in the wall."""
        wide, deep = self.wall
        radius = np.sqrt((out / np.float32(wide)) ** 2 + (front / np.float32(deep)) ** 2)
        taper = 1 - 0.30 * step(up - 5, 75)
        return (taper - radius) * np.float32(deep)

    def depth(self, up: Array, front: Array, out: Array) -> Array:
        """Depth below the lung's surface in mm, about: negative outside the lung."""
        heart_up, heart_front, heart_out, heart_radius = self.heart
        medial = self.mediastinum_mm + 7 * np.exp(-(((up - 2) / 16) ** 2)) * np.exp(
            -(((front + 6) / 18) ** 2)
        )
        spine = np.sqrt(out * out + (front + np.float32(self.wall[1] * 0.82)) ** 2) - 24
        heart = (
            np.sqrt(
                ((up - heart_up) / 1.2) ** 2 + (front - heart_front) ** 2 + ((out - heart_out) / 1.1) ** 2
            )
            - heart_radius
        )
        dome = up - (self.dome_up - ((out - 48) / 15) ** 2 - ((front - 8) / 13) ** 2)
        found = self.ellipse(up, front, out)
        for surface in (out - medial, spine, heart, dome):
            found = np.minimum(found, surface)
        return found


def _draw_thorax(patient: Patient, config: VolumePhantom) -> _Thorax:
    rng = stream(config.seed, "thorax", patient.number)
    side: Literal[-1, 1] = 1 if rng.random() < 0.5 else -1
    size = (1.0 if patient.sex == "M" else 0.94) * rng.normal(1, 0.03)
    ageing = (patient.age_years - 50) / 40
    heart_radius = size * rng.normal(34 if side < 0 else 26, 3)
    return _Thorax(
        side=side,
        wall=(92 * size * rng.normal(1, 0.02), 53 * size * rng.normal(1, 0.03)),
        muscle_mm=float(np.clip(rng.normal(15, 2.5), 13, 22)),
        mediastinum_mm=float(rng.normal(17, 2.5)),
        heart=(float(rng.normal(-30, 6)), float(rng.normal(16, 4)), 8.0, float(heart_radius)),
        dome_up=float(rng.normal(-40, 7)),
        bone_hu=float(rng.normal(480 - 90 * ageing, 70)),
        rib_phase=float(rng.random()),
        lung_hu=float(rng.normal(-855 - 12 * ageing, 22)),
        gravity_hu=float(abs(rng.normal(45, 25))),
        vessel_radius_mm=float(rng.normal(3.6, 0.4)),
        num_bullae=int(rng.poisson(6)) if rng.random() < 0.15 + 0.15 * max(ageing, 0) else 0,
        num_granulomas=int(rng.integers(1, 4)) if rng.random() < 0.4 else 0,
        num_bands=int(rng.poisson(0.5)),
        shape=int(rng.integers(2**31)),
    )


def _inside(thorax: _Thorax, rng: np.random.Generator, margin_mm: float) -> tuple[float, float, float]:
    """A point (up, front, out) of the lung at least `margin_mm` below its surface, or the best of many."""
    d, h, w = EXTENT_MM
    up = rng.uniform(-d / 2, d / 2, 400)
    front, out = rng.uniform(-h / 2, h / 2, 400), rng.uniform(0, w, 400)
    # The block's faces count as surface, so that what is placed is seen whole.
    depth = np.minimum(thorax.depth(up, front, out), d / 2 - np.abs(up))
    fits = np.flatnonzero((depth >= margin_mm) & (out > 30))
    chosen = fits[0] if len(fits) else depth.argmax()
    return float(up[chosen]), float(front[chosen]), float(out[chosen])


def _draw_nodules(patient: Patient, thorax: _Thorax, config: VolumePhantom) -> list[_Nodule]:
    """The nodules that the patient has when ill: one to three."""
    rng = stream(config.seed, "nodules", patient.number)
    nodules = []
    for _ in range(rng.choice([1, 2, 3], p=[0.6, 0.27, 0.13])):
        low, high = config.nodule_radius_mm
        radius = low + (high - low) * rng.beta(1.2, 1.8)
        kind: Any = rng.choice(["solid", "part solid", "ground glass"], p=[0.55, 0.25, 0.20])
        # Some touch the pleura: up to three tenths of the radius would stick out, and are cut off there.
        centre = _inside(thorax, rng, 0.7 * radius)
        nodules.append(_Nodule(centre, float(radius), kind, int(rng.integers(2**31))))
    return nodules


# --- A scan -------------------------------------------------------------------------------------------


class _Canvas:
    """A block of voxels, D H W, with each one's place in the patient; bodies are drawn where they lie."""

    def __init__(self, spacing_mm: tuple[float, float, float], side: int, moved: tuple[float, float, float]):
        self.spacing_mm = spacing_mm
        self.shape = tuple(round(size / step_mm) for size, step_mm in zip(EXTENT_MM, spacing_mm, strict=True))
        up, front, across = (
            ((np.arange(count) - (count - 1) / 2) * step_mm + by).astype(np.float32)
            for count, step_mm, by in zip(self.shape, spacing_mm, moved, strict=True)
        )
        # W runs towards the patient's right: away from the midline on the right, towards it on the left.
        self.axes = (up, front, side * across + np.float32(EXTENT_MM[2] / 2))

    def grid(self) -> tuple[Array, Array, Array]:
        """up, front and out as arrays that broadcast to D H W."""
        up, front, out = self.axes
        return up[:, None, None], front[None, :, None], out[None, None, :]

    def box(
        self, low: Array, high: Array
    ) -> tuple[tuple[slice, slice, slice], tuple[Array, Array, Array]] | None:
        """The part of the block between two corners, and its coordinates; None where it has none."""
        slices, places = [], []
        for axis, (values, least, most) in enumerate(zip(self.axes, low, high, strict=True)):
            inside = np.flatnonzero((values >= least) & (values <= most))
            if not len(inside):
                return None
            slices.append(slice(int(inside[0]), int(inside[-1]) + 1))
            shape = [1, 1, 1]
            shape[axis] = -1
            places.append(values[slices[-1]].reshape(shape))
        return (slices[0], slices[1], slices[2]), (places[0], places[1], places[2])

    def tube(self, into: Array, start: Array, end: Array, radius_mm: float) -> None:
        """Draw a rod with round ends into `into`, 0..1, by the share of a voxel that it fills."""
        soft = max(self.spacing_mm) / 2
        reach = radius_mm + soft
        found = self.box(np.minimum(start, end) - reach, np.maximum(start, end) + reach)
        if found is None:
            return
        where, places = found
        along = end - start
        offsets = [place - np.float32(origin) for place, origin in zip(places, start, strict=True)]
        length = float(along @ along)
        (du, df, do), (au, af, ao) = offsets, along.astype(np.float32)
        t = np.clip((du * au + df * af + do * ao) / np.float32(max(length, 1e-6)), 0, 1)
        squared = (du - t * au) ** 2 + (df - t * af) ** 2 + (do - t * ao) ** 2
        share = np.clip((np.float32(radius_mm) - np.sqrt(squared)) / np.float32(2 * soft) + 0.5, 0, 1)
        # What is thinner than a voxel can never fill one.
        share *= np.float32(min(1.0, (radius_mm / soft) ** 2))
        np.maximum(into[where], share, out=into[where])


def _draw_tree(
    thorax: _Thorax, name: str, num_roots: int, generations: int, radius_mm: float
) -> list[tuple[Array, Array, float]]:
    """Rods (start, end, radius in mm) of a tree that fills the lung from its hilum."""
    rng = stream(thorax.shape, name)
    at = np.column_stack(
        [
            rng.normal(2, 7, num_roots),
            rng.normal(-5, 6, num_roots),
            np.full(num_roots, thorax.mediastinum_mm + 3),
        ]
    )
    heading = np.column_stack(
        [rng.normal(0, 0.9, num_roots), rng.normal(-0.1, 0.7, num_roots), rng.uniform(0.35, 1.0, num_roots)]
    )
    heading /= np.linalg.norm(heading, axis=1, keepdims=True)
    radius = radius_mm * rng.uniform(0.7, 1.15, num_roots)
    rods = []
    for generation in range(generations):
        length = 17.0 * 0.87**generation * rng.uniform(0.6, 1.3, len(at))
        bend = heading + rng.normal(0, 0.15, heading.shape)
        end = at + length[:, None] * bend
        kept = (thorax.depth(end[:, 0], end[:, 1], end[:, 2]) > -4) | (generation == 0)
        at, end, heading, radius = at[kept], end[kept], heading[kept], radius[kept]
        rods += [(a, b, float(r)) for a, b, r in zip(at, end, radius, strict=True)]
        across = np.cross(heading, rng.normal(0, 1, heading.shape))
        across /= np.linalg.norm(across, axis=1, keepdims=True) + 1e-9
        spread = np.tan(rng.uniform(0.25, 0.75, len(at)))[:, None] * across
        heading = np.concatenate([heading + spread, heading - spread * rng.uniform(0.5, 1.2)])
        heading /= np.linalg.norm(heading, axis=1, keepdims=True)
        at = np.concatenate([end, end])
        # Murray's law: the cubes of the daughters' radii sum to that of the mother's.
        share = rng.uniform(0.35, 0.65, len(end))
        radius = np.concatenate([radius * np.cbrt(share), radius * np.cbrt(1 - share)])
        fine = radius > 0.35
        at, heading, radius = at[fine], heading[fine], radius[fine]
    return rods


def _nodule(
    canvas: _Canvas, nodule: _Nodule, growth: float
) -> tuple[tuple[slice, slice, slice], Array, Array] | None:
    """Where in the block a nodule lies, its tissue 0..1 there, and its mask there; None where not in it."""
    rng = stream(nodule.shape, "nodule")
    radius = nodule.radius_mm * float(np.clip(growth, 0.8, 1.25))
    centre = np.array(nodule.centre)
    reach = 1.5 * radius + max(canvas.spacing_mm)
    found = canvas.box(centre - reach, centre + reach)
    if found is None:
        return None
    where, places = found
    up, front, out = np.broadcast_arrays(
        *(place - np.float32(middle) for place, middle in zip(places, centre, strict=True))
    )
    distance = np.sqrt(up * up + front * front + out * out) + np.float32(1e-3)
    bumps = np.zeros_like(distance)
    for _ in range(6):
        axis = rng.normal(0, 1, 3)
        axis /= np.linalg.norm(axis)
        cosine = (
            up * np.float32(axis[0]) + front * np.float32(axis[1]) + out * np.float32(axis[2])
        ) / distance
        bumps += np.float32(rng.normal(0, 0.08)) * np.cos(
            np.float32(rng.uniform(2, 6)) * cosine + np.float32(rng.uniform(0, 6.3))
        )
    below = np.float32(radius) * (1 + bumps) - distance
    edge = max(canvas.spacing_mm) / 2
    if nodule.kind == "solid":
        tissue = np.clip(below / np.float32(2 * edge) + 0.5, 0, 1) * np.float32(rng.uniform(0.92, 1.0))
    else:
        haze = gaussian_filter(rng.standard_normal(distance.shape, dtype=np.float32), 1.0)
        tissue = step(below + 1.5, 3.0) * np.clip(
            np.float32(rng.uniform(0.30, 0.45)) + np.float32(0.12) * haze / haze.std(), 0.1, 0.6
        )
    if nodule.kind == "part solid":
        core = below - np.float32(radius * rng.uniform(0.45, 0.6))
        tissue = np.maximum(tissue, np.clip(core / np.float32(2 * edge) + 0.5, 0, 1))
    return where, tissue, below > 0


def _scan(visit: Visit, scanner: Scanner, config: VolumePhantom) -> tuple[Array, Array]:
    """Voxels (int16 HU) and nodules (uint8, 1 where one is), D H W."""
    thorax = _draw_thorax(visit.patient, config)
    rng = stream(config.seed, "scan", visit.patient.number, visit.index)
    canvas = _Canvas(scanner.spacing_mm, thorax.side, tuple(rng.normal(0, 2.5, 3)))
    up, front, out = canvas.grid()
    depth = thorax.depth(up, front, out)
    lung = np.clip(depth / np.float32(1.6) + 0.5, 0, 1)

    tissue = np.zeros(canvas.shape, dtype=np.float32)  # blood and the like within the lung
    for start, end, radius in _draw_tree(thorax, "vessels", 12, 8, thorax.vessel_radius_mm):
        canvas.tube(tissue, start, end, radius)
    lumen = np.zeros(canvas.shape, dtype=np.float32)
    for start, end, radius in _draw_tree(thorax, "bronchi", 3, 4, 0.95 * thorax.vessel_radius_mm):
        canvas.tube(tissue, start, end, radius + 0.6)
        canvas.tube(lumen, start, end, radius)
    _draw_sheets(canvas, thorax, tissue)

    mask = np.zeros(canvas.shape, dtype=np.uint8)
    if visit.positive:
        course = stream(thorax.shape, "course", visit.index)
        for nodule in _draw_nodules(visit.patient, thorax, config):
            drawn = _nodule(canvas, nodule, course.normal(1, 0.1))
            if drawn is not None:
                where, part, inside = drawn
                np.maximum(tissue[where], part, out=tissue[where])
                mask[where] |= inside & (depth[where] > 0)

    air = np.float32(thorax.lung_hu) - np.float32(thorax.gravity_hu / 50) * front
    air = air + 18 * _haze(stream(thorax.shape, "parenchyma"), canvas.shape)
    _draw_bullae(canvas, thorax, air)
    hu = air + tissue * (np.float32(_BLOOD_HU) - air)
    hu += lumen * (np.float32(_AIR_HU) - hu)
    hu = lung * hu + (1 - lung) * _wall(canvas, thorax)
    _draw_granulomas(canvas, thorax, hu)
    return _reconstruct(hu, scanner, config.shift.blur_sigma_px, rng), mask


def _haze(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Smooth noise of about unit variance, D H W, made on a third of the voxels per side."""
    coarse = rng.standard_normal([n // 3 + 2 for n in shape], dtype=np.float32)
    for axis, n in enumerate(shape):
        coarse = np.repeat(coarse, 3, axis=axis)
        coarse = np.take(coarse, np.arange(n), axis=axis)
    return np.asarray(gaussian_filter(coarse, 1.2)) * np.float32(1.6)


def _wall(canvas: _Canvas, thorax: _Thorax) -> Array:
    """HU of what lies around the lung, D H W: muscle, fat, ribs, spine, aorta, blood and liver."""
    up, front, out = canvas.grid()
    inner = thorax.ellipse(up, front, out)
    hu = 52 + 12 * _haze(stream(thorax.shape, "muscle"), canvas.shape)
    # Ribs slope downwards to the front, in a shell of muscle; beyond it lies fat.
    level = (up + 0.45 * front + 0.18 * out) / np.float32(23) + np.float32(thorax.rib_phase)
    across = np.abs(level - np.rint(level)) * np.float32(23)
    rod = np.hypot(across, 0.85 * (inner + 6.5))
    rib = np.clip((6.5 - rod) / 1.5 + 0.5, 0, 1) * (front < 40)
    marrow = np.clip((4.0 - rod) / 2 + 0.5, 0, 1)
    hu += np.clip((-inner - np.float32(thorax.muscle_mm)) / 3, 0, 1) * np.float32(-150)
    hu += rib * (np.float32(thorax.bone_hu) * (1 - 0.65 * marrow) - hu)
    back = np.float32(thorax.wall[1] * 0.82)
    vertebra = np.hypot(out, front + back)
    disc = np.abs(np.sin(up * np.float32(np.pi / 24))) < 0.2
    body = np.clip((17 - vertebra) / 1.5 + 0.5, 0, 1)
    cortex = np.clip((vertebra - 15.2) / 1.5, 0, 1)
    bone = np.where(disc, np.float32(90), np.float32(0.42 * thorax.bone_hu) * (1 + 0.7 * cortex))
    hu += body * (bone - hu)
    hu += (
        np.clip((9.5 - np.hypot(out - 9, front + back - 25)) + 0.5, 0, 1)
        * (110 - hu)
        * np.float32(thorax.side < 0)
    )
    # Fat between heart and wall, in front.
    pad = np.clip((inner - 1) / 4, 0, 1) * np.clip((front - 30) / 6, 0, 1) * np.clip((30 - out) / 10, 0, 1)
    hu += pad * (np.float32(-85) - hu)
    return hu


def _draw_sheets(canvas: _Canvas, thorax: _Thorax, tissue: Array) -> None:
    """The oblique fissure, which is thinner than a voxel, and bands of collapsed lung above the diaphragm."""
    rng = stream(thorax.shape, "sheets")
    up, front, out = canvas.grid()
    lean = rng.uniform(0.7, 1.1)
    plane = (up + np.float32(lean) * front - np.float32(rng.normal(-8, 6))) + 5 * np.sin(out / np.float32(17))
    thickness = 0.45 / max(canvas.spacing_mm)
    np.maximum(tissue, np.clip(1 - np.abs(plane) / 1.6, 0, 1) * np.float32(thickness), out=tissue)
    for _ in range(thorax.num_bands):
        centre = np.array(_inside(thorax, rng, 6))
        run = np.array([rng.normal(0, 0.2), rng.normal(0, 1), rng.normal(0, 1)])
        run *= rng.uniform(8, 20) / np.linalg.norm(run)
        aside = np.cross(run, [1.0, 0.0, 0.0]) / np.linalg.norm(run)
        for offset in np.linspace(-5, 5, 11):
            shifted = centre + aside * offset
            canvas.tube(tissue, shifted - run, shifted + run, 1.0)


def _draw_bullae(canvas: _Canvas, thorax: _Thorax, air: Array) -> None:
    rng = stream(thorax.shape, "bullae")
    hole = np.zeros(canvas.shape, dtype=np.float32)
    for _ in range(thorax.num_bullae):
        centre = np.array(_inside(thorax, rng, 1.0))
        canvas.tube(hole, centre, centre, rng.uniform(2, 8))
    air += hole * (np.float32(-975) - air)


def _draw_granulomas(canvas: _Canvas, thorax: _Thorax, hu: Array) -> None:
    """Calcified scars, too small and too dense to be a nodule: above 300 HU."""
    rng = stream(thorax.shape, "granulomas")
    for _ in range(thorax.num_granulomas):
        centre = np.array(_inside(thorax, rng, 3))
        reach = max(canvas.spacing_mm) + 2
        found = canvas.box(centre - reach, centre + reach)
        if found is None:
            continue
        where, places = found
        reaches = rng.uniform(0.9, 1.5) + np.array(canvas.spacing_mm, dtype=np.float32) / 4
        du, df, do = (
            (place - np.float32(middle)) / reach_mm
            for place, middle, reach_mm in zip(places, centre, reaches, strict=True)
        )
        squared = du * du + df * df + do * do
        density = np.exp(-0.5 * squared)
        hu[where] += density / density.max() * (np.float32(rng.uniform(500, 1100)) - hu[where])


def _reconstruct(hu: Array, scanner: Scanner, blur_sigma_px: float, rng: np.random.Generator) -> Array:
    """What the machine makes of the body: its kernel within a slice, its noise, whole numbers."""
    sigma = [0.0, *(abs(scanner.kernel_mm) / step_mm for step_mm in scanner.spacing_mm[1:])]
    smooth = gaussian_filter(hu, sigma)
    image = smooth if scanner.kernel_mm > 0 else hu + np.float32(0.6) * (hu - smooth)
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    if scanner.kernel_mm > 0:
        # The kernel shapes the noise as it shapes the image, and takes most of its power.
        noise = gaussian_filter(noise, sigma)
        noise /= noise.std()
    dose = np.float32(scanner.noise_hu * np.exp(rng.normal(0, 0.2)))
    image = image + noise * dose + np.float32(scanner.offset_hu)
    if blur_sigma_px:
        image = gaussian_filter(image, blur_sigma_px)
    return np.rint(np.clip(image, _LOWEST_HU, _HIGHEST_HU)).astype(np.int16)


# --- Files --------------------------------------------------------------------------------------------


def _write_nifti(path: Path, array: Array, scanner: Scanner, description: str = "") -> None:
    """Write D H W as gzipped NIfTI-1 in the scanner's orientation; the same bytes whenever it is written."""
    along = [next(k for k, ends in enumerate(("LR", "PA", "IS")) if end in ends) for end in scanner.axes]
    signs = [1 if end in "RAS" else -1 for end in scanner.axes]
    stored = array.transpose(2, 1, 0).transpose(along)[tuple(slice(None, None, sign) for sign in signs)]
    affine = np.eye(4)
    affine[:3, :3] = 0
    for axis, (world, sign) in enumerate(zip(along, signs, strict=True)):
        affine[world, axis] = sign * scanner.spacing_mm[2 - world]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(stored.shape) - 1) / 2)
    image: Any = nibabel.Nifti1Image(np.ascontiguousarray(stored), affine)  # type: ignore[no-untyped-call]
    image.set_qform(image.affine, code="scanner")
    image.set_sform(image.affine, code="scanner")
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = description.encode()
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def write_volume_cohort(folder: Path, config: VolumePhantom) -> None:
    """Write the cohort that `config` describes; it appears whole or not at all.

    - `images/<id>.nii.gz`: int16 HU, each in its site's orientation and spacing; numbered in an order
      unrelated to the patients
    - `masks/<id>.nii.gz`: uint8, 1 in a nodule, on the same grid; a file only for scans that have one
    - `labels.csv`: file, patient, site, scanner, age, sex, label_nodule (0 or 1), mask (its file, or
      empty), with `clinical` its columns; sorted by file
    """
    planned_files = config.plan(config.scans_per_patient, SITES, NEW_SCANNER)
    rows = []
    with replacing(folder) as partial:
        (partial / "images").mkdir(parents=True)
        (partial / "masks").mkdir()
        for planned in drawing(planned_files, "chest CTs"):
            visit, scanner = planned.visit, planned.scanner
            voxels, mask = _scan(visit, scanner, config)
            name = f"ct-{planned.number:05d}.nii.gz"
            person = f"Patient: Phantom^Person {planned.patient_number}, born 19500101"
            _write_nifti(partial / "images" / name, voxels, scanner, person if planned.identified else "")
            if planned.spoiled is not None:
                spoil(partial / "images" / name, planned.spoiled)
            if mask.any():
                _write_nifti(partial / "masks" / name, mask, scanner)
            rows.append(
                {
                    "file": f"images/{name}",
                    **describe(planned),
                    "label_nodule": int(mask.any()),
                    "mask": f"masks/{name}" if mask.any() else "",
                    **planned.clinical,
                }
            )
        pd.DataFrame(rows).sort_values("file").to_csv(partial / "labels.csv", index=False)
