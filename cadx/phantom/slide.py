"""Whole slides as pyramidal TIFF files: tissue as haematoxylin and eosin show it, with rare nests of tumour.

How one comes about. Two maps are drawn, how much haematoxylin and how much eosin is where: stroma with fibres,
glands and fat in eosin; nuclei, stamped from a small library of each kind, in haematoxylin. A stain
table of the site's laboratory turns each pair of amounts into a colour (Beer and Lambert's law), and
the scanner writes its pyramid. Tumour is a nest of large, dark, disordered nuclei; slides without any have
clusters of lymphocytes instead, which hold as much haematoxylin, so that colour alone does not tell.

Source: Macenko et al. 2009, ISBI, "A method for normalizing histology slides for quantitative analysis", for the
optical densities of the two dyes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import tifffile
from PIL import Image, ImageDraw, ImageFilter
from pydantic import Field, field_validator

from cadx.files import replacing
from cadx.phantom.cohort import (
    Array,
    Cohort,
    Count,
    FilesPerPatient,
    PlannedFile,
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
from cadx.phantom.shapes import cloud, step

MASK_UM_PX = 4
"""um per pixel of the masks, which cover the same field as their slides; their own resolution says so too."""
TILE_PX = 256
_QUALITY = 80
_DYES = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
"""Optical density of haematoxylin and of eosin in red, green and blue."""
_VARIANTS = 48  # stamps of each kind of nucleus


class SlidePhantom(Cohort):
    """A cohort of whole slides: one pyramidal TIFF per slide, rare tumour nests with masks."""

    modality: Literal["slide"] = "slide"
    num_patients: Count = 64
    slides_per_patient: FilesPerPatient = 1.25  # mean
    prevalence: Share = 0.4  # share of slides with tumour
    size_um: Annotated[int, Field(ge=256, multiple_of=64)] = 1024  # of a side: 4096 px at 0.25 um/px
    seed: Seed = 40
    tumour_share: Range = (0.02, 0.15)  # of the tissue

    def write(self, folder: Path) -> None:
        """Write the cohort: `write_slide_cohort`."""
        write_slide_cohort(folder, self)

    def layout(self, classes: Sequence[str]) -> dict[str, Any]:
        """The catalogue's fields for what `write` leaves."""
        negative, positive = classes
        return {
            "format": "table",
            "kind": "slide",
            "table": "labels.csv",
            "label_column": "label_tumour",
            "values": {"0": negative, "1": positive},
            "columns": {name: name for name in ("patient", "site", "scanner", "age", "sex")},
            "mask_column": "mask",
            **self.clinical_layout(),
        }

    @field_validator("tumour_share")
    @classmethod
    def _is_range(cls, value: Range) -> Range:
        if not 0 < value[0] <= value[1] <= 0.5:
            raise ValueError("give two shares of the tissue up to 0.5, the smaller one first")
        return value


# --- Sites and machines -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scanner:
    """A slide scanner and the laboratory before it."""

    model: str
    slide_mpp: float  # um per pixel
    aperio: bool  # says its um/px in an Aperio description; otherwise in the TIFF's resolution
    haematoxylin: float  # strength of the stain
    eosin: float
    hue: float  # how far the dyes lean towards blue (above 0) or red
    white: tuple[int, int, int]


SITES = (
    Site(
        "Alder Valley University Hospital",
        0.3,
        Scanner("Kestrel ScanDeck 40", 0.25, True, 1.0, 1.0, 0.0, (243, 242, 244)),
    ),
    Site(
        "Harbour Street Clinic",
        0.3,
        Scanner("Orrery Flatbed 20", 0.5, False, 0.8, 1.25, -0.06, (240, 236, 240)),
    ),
    Site(
        "Northmoor General Hospital",
        0.25,
        Scanner("Kestrel ScanDeck 20", 0.5, True, 1.2, 0.8, 0.05, (246, 246, 244)),
    ),
    Site(
        "St. Edda Community Hospital",
        0.15,
        Scanner("Tern Fjord WSI", 0.25, False, 0.9, 0.9, 0.02, (238, 240, 243)),
    ),
)
NEW_SCANNER = Scanner("Petrel Panorama", 0.4, False, 1.35, 0.7, 0.10, (232, 236, 246))


# --- Tissue -------------------------------------------------------------------------------------------


@dataclass
class _Tissue:
    """A block of tissue on a grid of 1 um, H W float32 each, and its nuclei."""

    present: Array  # 0..1
    eosin: Array  # 0..1
    haematoxylin: Array  # 0..1, outside nuclei
    nest: Array  # bool
    nuclei: list[tuple["_Kind", Array]]  # kind, and N 2 of (y, x) in um


@dataclass(frozen=True)
class _Kind:
    """A kind of nucleus. Half-axes in um; `dark` is its haematoxylin, 0..1."""

    name: str
    long_um: Range
    short: Range  # share of the long half-axis
    dark: Range
    grain: float
    lobes: float  # how irregular its outline is
    nucleolus: bool = False


SPINDLE = _Kind("spindle", (4.5, 7.5), (0.22, 0.36), (0.55, 0.75), 0.10, 0.05)
EPITHELIAL = _Kind("epithelial", (3.6, 4.8), (0.65, 0.85), (0.50, 0.68), 0.14, 0.04)
LYMPHOCYTE = _Kind("lymphocyte", (2.5, 3.2), (0.88, 1.0), (0.80, 0.98), 0.12, 0.03)
TUMOUR = _Kind("tumour", (4.3, 7.6), (0.6, 0.95), (0.50, 0.92), 0.24, 0.07, nucleolus=True)


def _draw_tissue(visit: Visit, config: SlidePhantom) -> _Tissue:
    name = ("slide", visit.patient.number, visit.index)
    size = config.size_um
    rng = stream(config.seed, *name, "shape")
    person = stream(config.seed, "patient", visit.patient.number)
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1
    y, x = axis[:, None], axis[None, :]
    lean, stretch = rng.uniform(0, np.pi), rng.uniform(0.75, 1.3)
    u = np.float32(np.cos(lean)) * x + np.float32(np.sin(lean)) * y
    v = np.float32(np.cos(lean)) * y - np.float32(np.sin(lean)) * x
    radius = np.sqrt((u / np.float32(0.82 * stretch)) ** 2 + (v / np.float32(0.82 / stretch)) ** 2)
    coarse = cloud(rng, (size // 4, size // 4), 3, 5)
    outline = 1 - radius + 0.17 * _enlarge(coarse, size)
    present = step(outline, 0.02)

    # Stroma: wavy bundles of collagen, seen as bands of a stretched noise.
    weave = stream(config.seed, *name, "stroma")
    bundle = _enlarge(cloud(weave, (size // 4, size // 4), 5, 3), size)
    fibre = np.sin(bundle * np.float32(9) + (u * 30 + v * 4) * np.float32(weave.uniform(0.6, 1.2)))
    grain = cloud(weave, (size, size), size // 12, 2)
    fine = np.sin(bundle * np.float32(50) + (u * 120 + v * 10) + 1.2 * grain)
    # Sections differ in thickness and focus, so that how coarse a slide looks does not tell what its cells are.
    contrast = np.float32(np.exp(weave.normal(0, 0.4)))
    eosin = 0.50 + contrast * (0.09 * fibre + 0.06 * grain + 0.07 * fine) + 0.06 * bundle
    # Clefts between bundles, where nothing stains.
    eosin *= 1 - 0.85 * step(fibre + 0.35 * grain - 1.12, 0.25)
    haematoxylin = 0.05 + 0.012 * grain

    tissue = _Tissue(present, eosin, haematoxylin, np.zeros((size, size), dtype=bool), [])
    taken = present < 0.5
    fat_share = float(np.clip(person.normal(0.08, 0.08), 0, 0.25))
    _draw_fat(tissue, taken, fat_share, stream(config.seed, *name, "fat"))
    _draw_glands(
        tissue, taken, int(person.poisson(size * size / 2.2e5)), stream(config.seed, *name, "glands")
    )
    _draw_cells(tissue, taken, visit.positive, config, name)
    tissue.eosin *= present
    tissue.haematoxylin *= present
    return tissue


def _enlarge(image: Array, size: int) -> Array:
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BICUBIC))


def _patch(size: int, y: float, x: float, reach: float) -> tuple[tuple[slice, slice], Array, Array]:
    """Where a box around (y, x) lies in a grid of 1 um, and its offsets from there."""
    rows = slice(max(0, int(y - reach)), max(0, min(size, int(y + reach) + 1)))
    columns = slice(max(0, int(x - reach)), max(0, min(size, int(x + reach) + 1)))
    dy = np.arange(rows.start, rows.stop, dtype=np.float32)[:, None] - np.float32(y)
    dx = np.arange(columns.start, columns.stop, dtype=np.float32)[None, :] - np.float32(x)
    return (rows, columns), dy, dx


def _scatter(rng: np.random.Generator, size: int, pitch_um: float, density: Array) -> Array:
    """Points N 2 (y, x) in um on a jittered grid, kept where `density`, 0..1 per um, lets them."""
    n = int(size / pitch_um)
    rows, columns = np.mgrid[:n, :n].reshape(2, -1) + 0.5
    jitter = rng.uniform(-0.45, 0.45, (2, n * n))
    points = np.column_stack([rows + jitter[0], columns + jitter[1] + 0.5 * (rows % 2 > 1)]) * pitch_um
    at = np.clip(points.astype(int), 0, size - 1)
    kept: Array = points[density[at[:, 0], at[:, 1]] > rng.random(len(points))]
    return kept


def _draw_fat(tissue: _Tissue, taken: Array, share: float, rng: np.random.Generator) -> None:
    """Fat cells: holes with thin walls, side by side; `taken` is filled in."""
    size = len(taken)
    field = _enlarge(cloud(rng, (size // 4, size // 4), 3, 2), size)
    free = field[~taken]
    if not share or not len(free):
        return
    region = (field > np.quantile(free, 1 - share)) & ~taken
    for y, x in _scatter(rng, size, 52.0, region.astype(np.float32)):
        where, dy, dx = _patch(size, y, x, 34)
        squash = np.float32(rng.uniform(0.85, 1.15))
        inside = np.float32(rng.uniform(22, 28)) - np.hypot(dy * squash, dx / squash)
        tissue.eosin[where] *= 1 - np.clip(inside / 1.5, 0, 1)
        tissue.haematoxylin[where] *= 1 - np.clip(inside / 1.5, 0, 1)
        taken[where] |= inside > -2


def _draw_glands(tissue: _Tissue, taken: Array, number: int, rng: np.random.Generator) -> None:
    """Glands: a row of epithelium, its nuclei at the base, around a lumen; `taken` is filled in."""
    size = len(taken)
    rows = []
    for _ in range(number):
        y, x = rng.uniform(0.1 * size, 0.9 * size, 2)
        radius, stretch, turn = rng.uniform(32, 62), rng.uniform(0.75, 1.3), rng.uniform(0, np.pi)
        waves, phases = rng.normal(0, [0.07, 0.05, 0.03]), rng.uniform(0, 6.3, 3)
        where, dy, dx = _patch(size, y, x, 1.7 * radius)
        if taken[where].mean() > 0.15:
            continue
        cos, sin = np.float32(np.cos(turn)), np.float32(np.sin(turn))
        a, b = (cos * dx + sin * dy) / np.float32(stretch), (cos * dy - sin * dx) * np.float32(stretch)
        angle = np.arctan2(b, a)
        rim: Array = np.full_like(angle, radius)
        for k, wave, phase in zip((2, 3, 5), waves, phases, strict=True):
            rim += np.float32(radius * wave) * np.cos(k * angle + np.float32(phase))
        below = rim - np.hypot(a, b)
        thick = np.float32(rng.uniform(14, 19))
        cell = np.clip(below / 1.5, 0, 1)
        tissue.eosin[where] += cell * (0.42 - tissue.eosin[where])
        tissue.haematoxylin[where] += cell * (np.float32(0.12) - tissue.haematoxylin[where])
        lumen = np.clip((below - thick) / 2, 0, 1)
        tissue.eosin[where] *= 1 - np.float32(rng.uniform(0.8, 1)) * lumen
        tissue.haematoxylin[where] *= 1 - lumen
        taken[where] |= below > -6
        theta = np.arange(0, 2 * np.pi, 5.6 / radius)
        theta += rng.normal(0, 0.02, len(theta))
        at = radius * (
            1 + sum(w * np.cos(k * theta + p) for k, w, p in zip((2, 3, 5), waves, phases, strict=True))
        )
        at = at - rng.normal(5.5, 1.1, len(theta))
        along, aside = at * np.cos(theta) * stretch, at * np.sin(theta) / stretch
        rows.append(np.column_stack([y + sin * along + cos * aside, x + cos * along - sin * aside]))
    if rows:
        tissue.nuclei.append((EPITHELIAL, np.concatenate(rows)))


def _draw_cells(
    tissue: _Tissue, taken: Array, positive: bool, config: SlidePhantom, name: tuple[str | int, ...]
) -> None:
    """Stroma's own nuclei, clusters of lymphocytes, and nests of tumour, in what is not `taken`."""
    size = len(taken)
    rng, tumour = stream(config.seed, *name, "clusters"), stream(config.seed, *name, "tumour")
    num_tissue = float((tissue.present > 0.5).sum())
    # A slide without tumour has as much in lymphocytes as it would have in both, in a matrix of the same
    # colour: neither the amount of a dye nor the mixture of both tells in the mean.
    tumour_share = tumour.uniform(*config.tumour_share)
    share = rng.uniform(0, 0.4) * config.tumour_share[1] + (0 if positive else tumour_share)
    cluster = _spots(rng, taken, share * num_tissue, 7)
    if positive:
        tissue.nest = _spots(tumour, taken | cluster, tumour_share * num_tissue, 5)
    tissue.nuclei.append((TUMOUR, _scatter(tumour, size, 11.0, 0.97 * tissue.nest)))
    tissue.nuclei.append((LYMPHOCYTE, _scatter(rng, size, 6.5, 0.97 * cluster)))
    for where in (cluster, tissue.nest):
        matrix = np.float32(rng.uniform(0.32, 0.46)) + np.float32(0.4) * (tissue.eosin - np.float32(0.5))
        tissue.eosin += where * (matrix - tissue.eosin)
        tissue.haematoxylin += where * (np.float32(rng.uniform(0.06, 0.13)) - tissue.haematoxylin)

    loose = stream(config.seed, *name, "loose")
    stroma = (~taken & ~cluster & ~tissue.nest).astype(np.float32)
    tissue.nuclei.append((SPINDLE, _scatter(loose, size, 15.0, stroma * np.float32(loose.uniform(0.3, 0.9)))))
    tissue.nuclei.append(
        (LYMPHOCYTE, _scatter(loose, size, 15.0, stroma * np.float32(loose.uniform(0.02, 0.12))))
    )


def _spots(rng: np.random.Generator, taken: Array, area_um2: float, cells: int) -> Array:
    """Irregular spots of the wanted area in what is free, around one or two middles, H W bool."""
    size = len(taken)
    free = np.flatnonzero(~taken)
    if not len(free) or area_um2 < 1:
        return np.zeros_like(taken)
    field = _enlarge(cloud(rng, (size // 4, size // 4), cells, 3, 0.5), size)
    away = np.full((size, size), np.inf, dtype=np.float32)
    axis = np.arange(size, dtype=np.float32)
    for middle in rng.choice(free, rng.integers(1, 3)):
        y, x = divmod(int(middle), size)
        away = np.minimum(away, np.hypot(axis[:, None] - np.float32(y), axis[None, :] - np.float32(x)))
    field = field - 3.2 * away / size
    level = np.quantile(field.ravel()[free], max(0.0, 1 - area_um2 / len(free)))
    return np.asarray((field > level) & ~taken)


# --- From tissue to a picture -------------------------------------------------------------------------


@lru_cache
def _stamps(kind: _Kind, slide_mpp: float, seed: int) -> list[Array]:
    """Nuclei of a kind at random turns, H W uint8 each: haematoxylin."""
    rng = stream(seed, "stamps", kind.name, str(slide_mpp))
    found = []
    for _ in range(_VARIANTS):
        long_um = rng.uniform(*kind.long_um)
        short_um = long_um * rng.uniform(*kind.short)
        half = int(np.ceil(1.35 * long_um / slide_mpp)) + 1
        axis = np.arange(-half, half + 1, dtype=np.float32) * np.float32(slide_mpp)
        turn = rng.uniform(0, np.pi)
        u = np.cos(turn) * axis[None, :] + np.sin(turn) * axis[:, None]
        v = np.cos(turn) * axis[:, None] - np.sin(turn) * axis[None, :]
        angle = np.arctan2(v / short_um, u / long_um)
        rim = 1 + sum(
            wave * np.cos(k * angle + phase)
            for k, wave, phase in zip(
                (2, 3, 4), rng.normal(0, kind.lobes, 3), rng.uniform(0, 6.3, 3), strict=True
            )
        )
        inside = (rim - np.hypot(u / long_um, v / short_um)) * short_um  # um below the membrane, about
        body = np.clip(inside / 0.5 + 0.5, 0, 1)
        cells = max(2, round(2 * half * slide_mpp / 1.6))
        chromatin = cloud(rng, u.shape, cells, 2)
        membrane = np.exp(-(((inside - 0.4) / 0.5) ** 2))
        dark = rng.uniform(*kind.dark) * (1 + kind.grain * chromatin) + 0.14 * membrane
        if kind.nucleolus and rng.random() < 0.7:
            at = rng.normal(0, 0.25 * short_um, 2)
            dark = dark * 0.88 + 0.4 * (np.hypot(u - at[0], v - at[1]) < rng.uniform(0.8, 1.4))
        found.append(np.rint(255 * np.clip(body * dark, 0, 1)).astype(np.uint8))
    return found


def _stamp(into: Array, stamps: list[Array], points_px: Array, rng: np.random.Generator) -> None:
    """Put a stamp at each (row, column), the darker of both where two overlap."""
    size = len(into)
    chosen = rng.integers(len(stamps), size=len(points_px)).tolist()
    for (row, column), which in zip(np.rint(points_px).astype(int).tolist(), chosen, strict=True):
        stamp = stamps[which]
        half = len(stamp) // 2
        top, left = max(0, half - row), max(0, half - column)
        bottom, right = min(2 * half + 1, size - row + half), min(2 * half + 1, size - column + half)
        if bottom > top and right > left:
            part = into[row - half + top : row - half + bottom, column - half + left : column - half + right]
            np.maximum(part, stamp[top:bottom, left:right], out=part)


def _picture(
    tissue: _Tissue, scanner: Scanner, config: SlidePhantom, rng: np.random.Generator
) -> Image.Image:
    """The scanned field at its full resolution, RGB."""
    size_px = round(config.size_um / scanner.slide_mpp)
    maps = []
    for amount in (tissue.haematoxylin, tissue.eosin):
        levels = Image.fromarray(np.rint(255 * np.clip(amount, 0, 1)).astype(np.uint8))
        maps.append(np.array(levels.resize((size_px, size_px), Image.Resampling.BILINEAR)))
    haematoxylin, eosin = maps
    for kind, points_um in tissue.nuclei:
        stamps = _stamps(kind, scanner.slide_mpp, config.seed)
        _stamp(haematoxylin, stamps, points_um / scanner.slide_mpp, rng)
    # One patch of grain, repeated, is too fine to be seen as a pattern; where nothing stains it stays.
    patch = rng.integers(232, 256, (509, 509), dtype=np.uint16)
    repeats = -(-size_px // 509)
    grain = np.tile(patch, (repeats, repeats))[:size_px, :size_px]
    eosin = ((eosin * grain) >> 8).astype(np.uint16)
    colours = _stain_table(scanner, config.shift.gamma, rng)
    pixels = np.take(colours, (haematoxylin.astype(np.uint16) << 8) | eosin, axis=0)
    image = Image.fromarray(pixels)
    if rng.random() < 0.12:
        image = _pen(image, rng)
    for _ in range(rng.poisson(1.0)):
        _dust(image, scanner.slide_mpp, rng)
    if config.shift.blur_sigma_px:
        image = image.filter(ImageFilter.GaussianBlur(config.shift.blur_sigma_px))
    return image


def _stain_table(scanner: Scanner, gamma: float, rng: np.random.Generator) -> Array:
    """Colour (uint8, 65536 3) of each pair of amounts: haematoxylin * 256 + eosin."""
    strength = np.array([scanner.haematoxylin, scanner.eosin]) * np.exp(rng.normal(0, 0.12, 2)) * [1.7, 0.95]
    lean = np.array([1 + scanner.hue, 1.0, 1 - scanner.hue])
    dyes = _DYES * lean * (1 + rng.normal(0, 0.025, (2, 3)))
    amount = np.arange(256)[:, None] / 255
    through = np.exp(-amount * strength[0] * dyes[0])[:, None] * np.exp(-amount * strength[1] * dyes[1])[None]
    colours = (through * np.array(scanner.white) / 255) ** gamma
    return np.rint(255 * colours).astype(np.uint8).reshape(-1, 3)


def _pen(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """`image` with a stroke of ink along a side, as pathologists mark a slide."""
    ink = ((40, 60, 170), (30, 120, 70), (35, 35, 40))[rng.integers(3)]
    small = Image.new("L", (256, 256))
    offset, phase = rng.uniform(8, 20), rng.uniform(0, 6.3)
    points = [(offset + 6 * np.sin(t / 40 + phase), float(t)) for t in range(30, 200, 4)]
    ImageDraw.Draw(small).line(points, fill=210, width=9, joint="curve")
    small = small.rotate(90 * int(rng.integers(4)))
    mask = small.filter(ImageFilter.GaussianBlur(1)).resize(image.size, Image.Resampling.BILINEAR)
    return Image.composite(Image.new("RGB", image.size, ink), image, mask)


def _dust(image: Image.Image, slide_mpp: float, rng: np.random.Generator) -> None:
    """A grey speck out of focus, in place."""
    half = round(rng.uniform(6, 25) / slide_mpp)
    x, y = rng.uniform(0, image.width, 2).astype(int).tolist()
    box = (x - 2 * half, y - 2 * half, x + 2 * half, y + 2 * half)
    axis = np.linspace(-2, 2, 4 * half, dtype=np.float32)
    shade = np.exp(-(axis[:, None] ** 2 + (axis[None, :] * rng.uniform(0.6, 1.6)) ** 2) * 2)
    mask = Image.fromarray(np.rint(120 * shade).astype(np.uint8))
    image.paste((70, 66, 60), box, mask)


# --- Files --------------------------------------------------------------------------------------------


def _write_pyramid(path: Path, image: Image.Image, scanner: Scanner, magnified: float, person: str) -> None:
    """Write a tiled JPEG TIFF: full size, a quarter and a sixteenth of the side."""
    width, height = image.size
    description = None
    if scanner.aperio:
        description = (
            f"Aperio Image Library v12.0.15\r\n{width}x{height} [0,0 {width}x{height}] ({TILE_PX}x{TILE_PX}) "
            f"JPEG/RGB Q={_QUALITY}|AppMag = {magnified:.0f}|MPP = {scanner.slide_mpp}|ScanScope ID = {scanner.model}"
        )
    if person:
        description = f"{description or 'Slide scan'}|Patient = {person}|Title = Label: {person}"
    with tifffile.TiffWriter(path) as writer:
        for level in range(3):
            scale = 4**level
            part = image if level == 0 else image.reduce(scale)
            per_cm = 1e4 / (scanner.slide_mpp * scale)
            writer.write(
                np.asarray(part),
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": _QUALITY},
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
                description=description if level == 0 else None,
                metadata=None,
                software="CADX_PHANTOM",
                maxworkers=1,
            )


def _write_slide(path: Path, planned: PlannedFile[Scanner], config: SlidePhantom) -> Array:
    """Write one slide; what comes back is its mask, bool, at MASK_UM_PX."""
    visit, scanner = planned.visit, planned.scanner
    tissue = _draw_tissue(visit, config)
    rng = stream(config.seed, "picture", visit.patient.number, visit.index)
    image = _picture(tissue, scanner, config, rng)
    person = f"Phantom^Person {planned.patient_number}" if planned.identified else ""
    _write_pyramid(path, image, scanner, 10 / scanner.slide_mpp, person)
    share = Image.fromarray(255 * tissue.nest.astype(np.uint8)).reduce(MASK_UM_PX)
    return np.asarray(share) >= 128


def write_slide_cohort(folder: Path, config: SlidePhantom) -> None:
    """Write the cohort that `config` describes; it appears whole or not at all.

    - `images/<id>.tif`: tiled JPEG pyramids that OpenSlide opens, with their um/px; numbered in an order
      unrelated to the patients
    - `masks/<id>.png`: 255 in a tumour nest, at MASK_UM_PX; a file only for slides that have one
    - `labels.csv`: file, patient, site, scanner, age, sex, label_tumour (0 or 1), mask (its file, or empty),
      with `clinical` its columns; sorted by file
    """
    planned_files = config.plan(config.slides_per_patient, SITES, NEW_SCANNER)
    rows = []
    with replacing(folder) as partial:
        (partial / "images").mkdir(parents=True)
        (partial / "masks").mkdir()
        for planned in drawing(planned_files, "slides"):
            stem = f"wsi-{planned.number:05d}"
            path = partial / "images" / f"{stem}.tif"
            mask = _write_slide(path, planned, config)
            if planned.spoiled is not None:
                spoil(path, planned.spoiled)
            if mask.any():
                picture = Image.fromarray(mask).convert("L")
                picture.save(partial / "masks" / f"{stem}.png", dpi=(25400 / MASK_UM_PX,) * 2)
            rows.append(
                {
                    "file": f"images/{stem}.tif",
                    **describe(planned),
                    "label_tumour": int(mask.any()),
                    "mask": f"masks/{stem}.png" if mask.any() else "",
                    **planned.clinical,
                }
            )
        pd.DataFrame(rows).sort_values("file").to_csv(partial / "labels.csv", index=False)
