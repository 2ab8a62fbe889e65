"""Whole slides -> tiles and thumbnails at a wanted um/px, and where the tissue lies.

Invariants: a place on a slide is a distance from its top left corner in um, and a resolution is um per pixel:
which level the pixels come from is decided here and never asked for; um per pixel is refused where it is
unknown, never guessed; no whole level is ever in memory; handles and decoded tiles are bounded, and a process
that was forked opens its own.
"""

import io
import itertools
import logging
import math
import os
import threading
import zlib
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NamedTuple, Self

import imagecodecs
import numpy as np
import openslide
import scipy
import tifffile
from PIL import Image

from cadx.reading.source import MAX_PIXELS, Refusal
from cadx.types import Micrometres, MicrometresPerPixel, Millimetres

MAX_SLIDE_SIDE_PX = 1 << 20
"""Longest side of a slide: a quarter of a metre at the finest resolution in use."""
MAX_STORED_TILE_PX = 1 << 24
"""Largest tile, in pixels, that a file may be cut into: one is decoded whole."""
MAX_TILE_PX = 4096
"""Longest side of a tile that may be asked for."""
MAX_UPSAMPLING = 1.25
"""How much finer than the slide was scanned a tile may be: beyond, it would show what nobody has seen."""
MAX_REDUCTION = 512
"""How many pixels of a side, of the coarsest level that is fine enough, one wanted pixel may stand for."""
PLAUSIBLE_MPP = (0.05, 30.0)
"""um per pixel that a scanner may have; 72 dots per inch, which image editors write, are 353."""
MPP_TOLERANCE = 0.01
"""Largest relative difference between two figures for one um per pixel."""
CACHE_BYTES = 64 << 20
"""Memory of one slide, or of a pool of them, for decoded tiles: a row of tiles of a usual slide."""

_MAX_PAGES = 256
# Only what these two readers of OpenSlide accept is a grid of tiles without gaps and overlaps.
_PLAIN_VENDORS = ("aperio", "generic-tiff")
# Formats of several files, and what no scanner wrote. Hamamatsu's are .vms and .vmu; its .ndpi is a TIFF.
_SEVERAL_FILES = {
    "mirax": "MIRAX (.mrxs)",
    "hamamatsu": "Hamamatsu (.vms, .vmu)",
    "dicom": "a DICOM series",
    "synthetic": "OpenSlide's test pattern",
}
_CODECS: dict[int, Literal["none", "deflate", "jpeg"]] = {
    1: "none",
    7: "jpeg",
    8: "deflate",
    32946: "deflate",
}
_BLOCK_PX = 1024
"""Side of what is read at once, in pixels of the level, where pixels are resampled."""
_TILES_PER_TASK = 8
_SUMMARY_PX = (512, 2048)


# --- Opening ----------------------------------------------------------------------------------------


class TileCache:
    """Decoded tiles by key, the least recently used dropped beyond `max_bytes`; safe between threads."""

    def __init__(self, max_bytes: int = CACHE_BYTES) -> None:
        """Start empty."""
        self.max_bytes = max_bytes
        self._reset()

    def _reset(self) -> None:
        self._process_id = os.getpid()
        self._lock = threading.Lock()
        self._tiles: OrderedDict[tuple[int, ...], np.ndarray] = OrderedDict()
        self.num_bytes = 0

    def get(self, key: tuple[int, ...]) -> np.ndarray | None:
        """The tile, or None where it is not held."""
        if self._process_id != os.getpid():  # a fork may have copied the lock while it was held
            self._reset()
        with self._lock:
            if key in self._tiles:
                self._tiles.move_to_end(key)
            return self._tiles.get(key)

    def put(self, key: tuple[int, ...], tile: np.ndarray) -> None:
        """Hold `tile`, unless it is larger than the whole cache."""
        with self._lock:
            if key in self._tiles or tile.nbytes > self.max_bytes:
                return
            self._tiles[key] = tile
            self.num_bytes += tile.nbytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._tiles.popitem(last=False)[1].nbytes


@dataclass(frozen=True)
class _Tiling:
    """Where a level's tiles lie in a TIFF file and how they are packed."""

    tile_height_px: int
    tile_width_px: int
    num_columns: int
    offsets: np.ndarray
    sizes: np.ndarray
    codec: Literal["none", "deflate", "jpeg"]
    predictor: bool
    colour_space: str
    tables: bytes | None


@dataclass(frozen=True)
class _Level:
    """One resolution of a slide.

    `downsample` is level-0 pixels per pixel, for rows and columns; `number` is OpenSlide's, None where only
    `tiling` reaches the level.
    """

    height_px: int
    width_px: int
    downsample: tuple[float, float]
    number: int | None
    tiling: _Tiling | None


class Slide:
    """One slide, read on demand. A context manager: `close` frees its handles; the next read opens them again.

    Attributes:
        size_px: (height, width) at the scanned resolution.
        slide_mpp: um per pixel of it.
        vendor: whose format it is, in OpenSlide's word.
        objective_power: magnification as the file says it, NaN where it does not. For information only.
        attributes: `scanner`, where the file names it.
        assumptions: what the file does not say and was taken as given.
    """

    def __init__(self, path: Path, *, slide_mpp: float | None = None, cache: TileCache | None = None) -> None:
        """See `open_slide`."""
        self.path = path
        self._cache = cache if cache is not None else TileCache()
        self._key = next(_keys)
        self._process_id = os.getpid()
        self._lock = threading.RLock()
        self._openslide: openslide.OpenSlide | None = None
        self._stream: io.FileIO | None = None
        if not path.is_file():
            raise ValueError("slide: no such file; check the path")
        try:
            handle = self._handle()
            properties = handle.properties  # asked by name only: a damaged name cannot even be listed
            sizes = [(height, width) for width, height in handle.level_dimensions]
        except openslide.OpenSlideError as error:
            self.close()
            what = type(error).__name__
            raise ValueError(
                f"slide: OpenSlide cannot read it ({what}): no slide, cut off or damaged; copy it again, or"
                " convert it into a tiled TIFF pyramid"
            ) from None
        try:
            _check_claims(sizes, properties)
            self.size_px = sizes[0]
            self.vendor = str(properties.get("openslide.vendor", ""))
            self.objective_power = _number(properties.get("openslide.objective-power"))
            self.attributes = _attributes(properties, self.vendor)
            self.slide_mpp, self.assumptions = _slide_mpp(properties, slide_mpp)
            self._levels = _levels(path, sizes, self.vendor)
        except Refusal as refusal:
            self.close()
            raise ValueError(f"slide: {refusal}") from None

    def __enter__(self) -> Self:
        """The slide itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Free the handles."""
        self.close()

    def close(self) -> None:
        """Free the handles; what is decoded stays in the cache until other tiles need its room."""
        self._follow_fork()
        # References only: another thread may be reading, and the last reader's reference closes the file.
        with self._lock:
            self._openslide = None
            self._stream = None

    @property
    def size_um(self) -> tuple[Micrometres, Micrometres]:
        """(height, width) of the slide."""
        height_px, width_px = self.size_px
        return Micrometres(height_px * self.slide_mpp), Micrometres(width_px * self.slide_mpp)

    def tile(self, x_um: float, y_um: float, tile_px: int, mpp: float) -> np.ndarray:
        """The tile whose top left corner lies at (x_um, y_um): H W 3 uint8, `tile_px` on a side.

        Its pixels are `mpp` um apart whatever levels the file has: they come from the coarsest level that is
        fine enough, resampled with a triangle filter as wide as the step (antialiased). A tile of that very
        resolution is the file's own pixels, from the nearest whole pixel. What lies beyond the slide, or was
        not scanned, is white.

        Args:
            x_um: distance from the slide's left edge.
            y_um: distance from its top edge.
            tile_px: side of the tile.
            mpp: um per pixel of the tile.

        Raises:
            ValueError: one line: the tile lies beyond the slide or is finer than the slide by more than
                `MAX_UPSAMPLING`, or what the file holds there is damaged. Other tiles can still be read.
        """
        scale = self._scale(tile_px, mpp)
        top_px, left_px = y_um / self.slide_mpp, x_um / self.slide_mpp
        extent_px = tile_px * scale
        rows, columns = self.size_px
        if not (-extent_px < top_px < rows and -extent_px < left_px < columns):  # also where they are NaN
            raise ValueError(
                f"slide: a tile at x {x_um:g}, y {y_um:g} um lies beyond the slide of"
                f" {self.size_um[1]:g} x {self.size_um[0]:g} um; positions are um from its top left corner"
            )
        try:
            return self._region(top_px, left_px, (tile_px, tile_px), (scale, scale))
        except Refusal as refusal:
            raise ValueError(f"slide: the tile at x {x_um:g}, y {y_um:g} um: {refusal}") from None

    def tiles(
        self,
        grid: Sequence[tuple[float, float]] | np.ndarray,
        tile_px: int,
        mpp: float,
        *,
        threads: int = 1,
        on_damage: Callable[[int, str], None] | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(index in `grid`, tile) for each place of `grid`, in its order; a few tiles are in memory at a time.

        Args:
            grid: N places (x_um, y_um), as in `tile`.
            tile_px: side of a tile.
            mpp: um per pixel of a tile.
            threads: how many decode at once.
            on_damage: called with index and reason for a tile that cannot be read, which is then left out.

        Raises:
            ValueError: as in `tile`; for a damaged tile only without `on_damage`.
        """
        self._scale(tile_px, mpp)
        places = [(float(x_um), float(y_um)) for x_um, y_um in grid]

        def read(first: int) -> list[np.ndarray | ValueError]:
            read_tiles: list[np.ndarray | ValueError] = []
            for x_um, y_um in places[first : first + _TILES_PER_TASK]:
                try:
                    read_tiles.append(self.tile(x_um, y_um, tile_px, mpp))
                except ValueError as error:
                    read_tiles.append(error)
            return read_tiles

        starts = range(0, len(places), _TILES_PER_TASK)
        for first, batch in zip(starts, _ordered(read, starts, threads), strict=True):
            for index, tile in enumerate(batch, first):
                if not isinstance(tile, ValueError):
                    yield index, tile
                elif on_damage is None:
                    raise tile
                else:
                    on_damage(index, str(tile))

    def thumbnail(self, mpp: float) -> np.ndarray:
        """The whole slide, H W 3 uint8, at about `mpp` um per pixel.

        It covers the slide exactly: a pixel is `size_um` / shape wide, within half a pixel of `mpp` in all.

        Raises:
            ValueError: one line: finer than the slide, more than `MAX_PIXELS`, or damaged.
        """
        scale = self._scale(1, mpp)
        shape = (max(1, round(self.size_px[0] / scale)), max(1, round(self.size_px[1] / scale)))
        if shape[0] * shape[1] > MAX_PIXELS:
            raise ValueError(f"slide: a thumbnail of {shape[0]} x {shape[1]} pixels; give a larger mpp")
        try:
            return self._region(0, 0, shape, (self.size_px[0] / shape[0], self.size_px[1] / shape[1]))
        except Refusal as refusal:
            raise ValueError(f"slide: {refusal}") from None

    def _scale(self, tile_px: int, mpp: float) -> float:
        """Level-0 pixels per wanted pixel."""
        if not 1 <= tile_px <= MAX_TILE_PX:
            raise ValueError(f"slide: tile_px is {tile_px}; give 1 to {MAX_TILE_PX}")
        if not (math.isfinite(mpp) and mpp > 0):
            raise ValueError(f"slide: mpp is {mpp}; give um per pixel, more than 0")
        if self.slide_mpp > mpp * MAX_UPSAMPLING:
            raise ValueError(
                f"slide: mpp {mpp:g} is finer than the slide was scanned ({self.slide_mpp:g} um per pixel);"
                f" ask for {self.slide_mpp:g} or more"
            )
        return mpp / self.slide_mpp

    def _region(
        self, top_px: float, left_px: float, shape: tuple[int, int], scale: tuple[float, float]
    ) -> np.ndarray:
        """H W 3 of `shape` from (top, left) in level-0 pixels, `scale` level-0 pixels apart."""
        # Below a percent of upsampling, the coarser level shows the same.
        fine_enough = [
            index for index, level in enumerate(self._levels) if max(level.downsample) <= min(scale) * 1.01
        ]
        index = max(fine_enough, key=lambda index: self._levels[index].downsample, default=0)
        level = self._levels[index]
        row_step, column_step = scale[0] / level.downsample[0], scale[1] / level.downsample[1]
        if max(row_step, column_step) > MAX_REDUCTION:
            raise Refusal(
                f"a pixel would stand for more than {MAX_REDUCTION} of the file's; give a smaller mpp"
            )
        top, left = top_px / level.downsample[0], left_px / level.downsample[1]
        # A quarter of a pixel lost over the tile, and half in rounding its corner: under one in all.
        if abs(row_step - 1) * shape[0] < 0.25 and abs(column_step - 1) * shape[1] < 0.25:
            return self._stored(index, round(top), round(left), *shape)
        pixels = np.empty((*shape, 3), np.uint8)
        rows = _blocks(top, shape[0], row_step, level.height_px)
        columns = _blocks(left, shape[1], column_step, level.width_px)
        for (into_rows, y, y0, y1), (into_columns, x, x0, x1) in itertools.product(rows, columns):
            stored = self._stored(index, y.start, x.start, y.stop - y.start, x.stop - x.start)
            size = (into_columns.stop - into_columns.start, into_rows.stop - into_rows.start)
            box = (x0 - x.start, y0 - y.start, x1 - x.start, y1 - y.start)
            block = Image.fromarray(stored).resize(size, Image.Resampling.BILINEAR, box=box)
            pixels[into_rows, into_columns] = np.asarray(block)
        return pixels

    def _stored(self, index: int, top: int, left: int, height_px: int, width_px: int) -> np.ndarray:
        """H W 3 uint8, the level's own pixels from (top, left) of it; white beyond it."""
        level = self._levels[index]
        y0, y1 = max(top, 0), min(top + height_px, level.height_px)
        x0, x1 = max(left, 0), min(left + width_px, level.width_px)
        whole = (y1 - y0, x1 - x0) == (height_px, width_px)
        if whole and level.tiling is not None:
            row, column = y0 // level.tiling.tile_height_px, x0 // level.tiling.tile_width_px
            corner = (row * level.tiling.tile_height_px, column * level.tiling.tile_width_px)
            size = (level.tiling.tile_height_px, level.tiling.tile_width_px)
            if corner == (y0, x0) and size == (height_px, width_px):
                return self._stored_tile(index, level.tiling, row, column, alone=True)
        pixels = np.empty((height_px, width_px, 3), np.uint8)
        if not whole:
            pixels[:] = 255
        if y0 >= y1 or x0 >= x1:
            return pixels
        inside = pixels[y0 - top : y1 - top, x0 - left : x1 - left]
        if level.tiling is None:
            inside[:] = self._openslide_region(level, y0, x0, y1 - y0, x1 - x0)
        else:
            height, width = level.tiling.tile_height_px, level.tiling.tile_width_px
            for row in range(y0 // height, -(-y1 // height)):
                for column in range(x0 // width, -(-x1 // width)):
                    tile = self._stored_tile(index, level.tiling, row, column)
                    a0, a1 = max(y0, row * height), min(y1, (row + 1) * height)
                    b0, b1 = max(x0, column * width), min(x1, (column + 1) * width)
                    part = tile[
                        a0 - row * height : a1 - row * height, b0 - column * width : b1 - column * width
                    ]
                    inside[a0 - y0 : a1 - y0, b0 - x0 : b1 - x0] = part
        # A level that was rounded down lacks a part of its last pixel: the last one it has stands for it.
        if y1 < top + height_px and y1 * level.downsample[0] < self.size_px[0]:
            pixels[y1 - top] = pixels[y1 - top - 1]
        if x1 < left + width_px and x1 * level.downsample[1] < self.size_px[1]:
            pixels[:, x1 - left] = pixels[:, x1 - left - 1]
        return pixels

    def _stored_tile(
        self, index: int, tiling: _Tiling, row: int, column: int, *, alone: bool = False
    ) -> np.ndarray:
        """A tile of the file, from the cache or into it; `alone`, it is the caller's own and not kept."""
        key = (self._key, index, row, column)
        tile = self._cache.get(key)
        if tile is not None:
            return tile.copy() if alone else tile
        place = row * tiling.num_columns + column
        size = int(tiling.sizes[place])
        try:
            stream = self._file()  # held, so that nobody's `close` closes it meanwhile
            data = os.pread(stream.fileno(), size, int(tiling.offsets[place]))
        except OSError as error:
            raise Refusal(f"the file cannot be read ({type(error).__name__})") from None
        if len(data) != size:
            raise Refusal("the file was cut off; copy it again")
        tile = _unpack(data, tiling)
        if not alone:
            self._cache.put(key, tile)
        return tile

    def _openslide_region(
        self, level: _Level, top: int, left: int, height_px: int, width_px: int
    ) -> np.ndarray:
        number = level.number
        assert number is not None, "a level that nobody can read"

        def read(handle: openslide.OpenSlide) -> np.ndarray:
            # OpenSlide's own factor, which turns this place into the same pixel again.
            factor = handle.level_downsamples[number]
            place = (round(left * factor), round(top * factor))
            return np.asarray(handle.read_region(place, number, (width_px, height_px)))

        try:
            try:
                region = read(self._handle())
            except openslide.OpenSlideError:
                # A handle that met an error refuses everything from then on, and another thread may have met it.
                with self._lock:
                    self._openslide = None
                with openslide.OpenSlide(self.path) as handle:
                    region = read(handle)
        except (openslide.OpenSlideError, OSError) as error:
            raise Refusal(f"damaged in the file ({type(error).__name__}); copy or export it again") from None
        alpha = region[..., 3:].astype(np.uint16)
        if alpha.min() == 255:
            return region[..., :3]
        return ((region[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)

    def _handle(self) -> openslide.OpenSlide:
        self._follow_fork()
        with self._lock:
            if self._openslide is None:
                self._openslide = openslide.OpenSlide(self.path)
                self._openslide.set_cache(openslide.OpenSlideCache(self._cache.max_bytes))
            return self._openslide

    def _file(self) -> io.FileIO:
        self._follow_fork()
        with self._lock:
            if self._stream is None:
                self._stream = self.path.open("rb", buffering=0)
            return self._stream

    def _follow_fork(self) -> None:
        """In a loader worker after a fork: nothing of the parent's handles and locks is used."""
        if self._process_id != os.getpid():
            self._process_id = os.getpid()
            self._lock = threading.RLock()
            self._openslide = None
            self._stream = None


_keys = itertools.count()


def open_slide(path: Path, *, slide_mpp: float | None = None, cache: TileCache | None = None) -> Slide:
    """The slide at `path`, in any format of OpenSlide, opened but not read.

    Tiles of TIFF pyramids whose packing is plain (JPEG, deflate or none; Aperio's .svs among them) are decoded
    directly and kept in `cache`; everything else is left to OpenSlide.

    Args:
        path: the file.
        slide_mpp: um per pixel, where the file does not say it; recorded as an assumption.
        cache: decoded tiles shared with other slides; its own, of `CACHE_BYTES`, if None.

    Raises:
        ValueError: one line, without file name: no slide, cut off, of impossible size, without um per pixel or
            with another one than `slide_mpp`, or with pixels that are not square.
    """
    return Slide(path, slide_mpp=slide_mpp, cache=cache)


def check_is_one_file(path: Path) -> None:
    """Refuse a slide of which `path` is only a part: a dataset keeps that one file and could not read it.

    Raises:
        ValueError: one line: which format, and what to export instead.
    """
    with path.open("rb") as stream:
        is_tiff = stream.read(2) in (b"II", b"MM")
    vendor = openslide.OpenSlide.detect_format(path)
    if vendor in _SEVERAL_FILES and not is_tiff:
        raise ValueError(
            f"slide: {_SEVERAL_FILES[vendor]} keeps a slide in several files, of which a dataset would keep one;"
            " export it as one TIFF or SVS"
        )


class SlidePool:
    """Slides that stay open for the next read, at most `max_open` of them, with one cache for all."""

    def __init__(self, max_open: int = 16, cache_bytes: int = CACHE_BYTES) -> None:
        """Start with none open."""
        self.max_open = max_open
        self.cache = TileCache(cache_bytes)
        self._slides: OrderedDict[tuple[Path, float | None], Slide] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """The limits: handles and decoded tiles stay in this process."""
        return {"max_open": self.max_open, "cache_bytes": self.cache.max_bytes}

    def __setstate__(self, state: Mapping[str, int]) -> None:
        """An empty pool with the same limits."""
        self.__init__(**state)  # type: ignore[misc]

    def open(self, path: Path, slide_mpp: float | None = None) -> Slide:
        """The slide, as `open_slide` gives it; the one that was not asked for longest is closed.

        Raises:
            ValueError: as in `open_slide`.
        """
        key = (path, slide_mpp)
        if key not in self._slides:
            self._slides[key] = open_slide(path, slide_mpp=slide_mpp, cache=self.cache)
            if len(self._slides) > self.max_open:
                self._slides.popitem(last=False)[1].close()
        self._slides.move_to_end(key)
        return self._slides[key]

    def close(self) -> None:
        """Close them all."""
        while self._slides:
            self._slides.popitem()[1].close()


def _check_claims(sizes: list[tuple[int, int]], properties: Mapping[str, str]) -> None:
    for number, (height_px, width_px) in enumerate(sizes):
        if min(height_px, width_px) < 1 or max(height_px, width_px) > MAX_SLIDE_SIDE_PX:
            raise Refusal(
                f"claims {height_px} x {width_px} pixels; the limit is {MAX_SLIDE_SIDE_PX} on a side"
            )
        tile = [
            _number(properties.get(f"openslide.level[{number}].tile-{side}")) for side in ("height", "width")
        ]
        if math.prod(tile) > MAX_STORED_TILE_PX:  # never where it is NaN, that is, without tiles
            raise Refusal(
                f"claims tiles of {tile[0]:g} x {tile[1]:g} pixels; the limit is {MAX_STORED_TILE_PX}"
            )


def _slide_mpp(
    properties: Mapping[str, str], given: float | None
) -> tuple[MicrometresPerPixel, tuple[str, ...]]:
    """The slide's um per pixel, and what was assumed for it."""
    low, high = PLAUSIBLE_MPP
    if given is not None and not low <= given <= high:
        raise Refusal(f"slide_mpp is {given:g}; give um per pixel, {low:g} to {high:g}")
    across, down = (_number(properties.get(f"openslide.mpp-{axis}")) for axis in "xy")
    stated = (across + down) / 2
    if not low <= stated <= high:
        if given is None:
            raise Refusal(
                "the file does not say how many um a pixel is; give slide_mpp in the catalogue entry"
            )
        return MicrometresPerPixel(given), (
            f"um per pixel is not in the file; slide_mpp {given:g} was given",
        )
    if abs(across - down) > MPP_TOLERANCE * stated:
        raise Refusal("its pixels are not square by more than 1 %; export it again with one um per pixel")
    if given is not None and abs(given - stated) > MPP_TOLERANCE * stated:
        raise Refusal(
            f"slide_mpp {given:g} was given, but the file says {stated:g}; remove it from the catalogue entry"
        )
    return MicrometresPerPixel(stated), ()


def _number(text: str | None) -> float:
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _attributes(properties: Mapping[str, str], vendor: str) -> dict[str, Any]:
    names = ("tiff.Make", "tiff.Model", "aperio.ScanScope ID")
    machine = " ".join(" ".join(str(properties.get(name, "")).split()) for name in names).strip()
    if machine:
        return {"scanner": machine}
    return {"scanner": vendor} if vendor and vendor != "generic-tiff" else {}


# --- TIFF pyramids ----------------------------------------------------------------------------------


def _levels(path: Path, sizes: list[tuple[int, int]], vendor: str) -> list[_Level]:
    """OpenSlide's levels and, where a TIFF keeps its pyramid in sub-directories, those beside them."""
    pages = _tiled_pages(path) if vendor in _PLAIN_VENDORS else []
    levels = []
    for number, size in enumerate(sizes):
        tiling = next((page.tiling for page in pages if page.size_px == size), None)
        levels.append(_Level(*size, _downsample(sizes[0], size), number, tiling))
    for page in pages:
        if page.beneath and page.size_px not in sizes and page.tiling is not None:
            down, across = downsample = _downsample(sizes[0], page.size_px)
            # A sub-directory may hold something else; a pyramid's have the shape of the slide.
            if min(downsample) > 1 and abs(down - across) * max(page.size_px) < max(downsample):
                levels.append(_Level(*page.size_px, downsample, None, page.tiling))
    return levels


def _downsample(whole: tuple[int, int], size: tuple[int, int]) -> tuple[float, float]:
    """Level-0 pixels per pixel of a level of this size, for rows and columns.

    A whole number where the level's size is the slide's divided by it, rounded down or up: the quotient of the
    sizes would shift its far end by up to a pixel.

    >>> _downsample((250, 300), (62, 75)), _downsample((250, 300), (100, 120))
    ((4.0, 4.0), (2.5, 2.5))
    """
    factor = max(1, round(max(whole) / max(size)))
    if all(part in (side // factor, -(-side // factor)) for side, part in zip(whole, size, strict=True)):
        return float(factor), float(factor)
    return whole[0] / size[0], whole[1] / size[1]


class _Page(NamedTuple):
    """A page of tiles in a TIFF file; `beneath` if it lies in a sub-directory of the first."""

    size_px: tuple[int, int]
    beneath: bool
    tiling: _Tiling | None


def _tiled_pages(path: Path) -> list[_Page]:
    """The file's pages of tiles; none if it is no TIFF that can be understood."""
    found: list[_Page] = []
    logging.getLogger("tifffile").disabled = True  # its lines repeat file names and what tags hold
    try:
        with tifffile.TiffFile(path) as tiff:
            for number in range(_MAX_PAGES):
                try:
                    page = tiff.pages[number]
                except IndexError:
                    break
                below = list(itertools.islice(page.pages or (), _MAX_PAGES)) if number == 0 else []
                for candidate in (page, *below):
                    if isinstance(candidate, tifffile.TiffPage) and candidate.is_tiled:
                        size_px = (int(candidate.imagelength), int(candidate.imagewidth))
                        tiling = _tiling(candidate, path.stat().st_size)
                        found.append(_Page(size_px, candidate is not page, tiling))
    except Refusal:
        raise
    except Exception:  # whatever a damaged header makes of it; OpenSlide, which opened the file, reads it
        return []
    return found


def _tiling(page: tifffile.TiffPage, file_bytes: int) -> _Tiling | None:
    """How to decode the page's tiles directly, or None if OpenSlide had better do it."""
    codec = _CODECS.get(int(page.compression))
    colours = {2: "RGB"} if codec != "jpeg" else {2: "RGB", 6: "YCBCR"}
    plain = (
        codec is not None
        and int(page.photometric) in colours
        and page.dtype == np.uint8
        and page.samplesperpixel == 3
        and page.bitspersample == 8
        and len(page.shape) == 3
        and page.shape[2] == 3
        and int(page.planarconfig) == 1
        and int(page.predictor) in ((1, 2) if codec == "deflate" else (1,))
        and int(page.fillorder) == 1
    )
    num_columns = -(-page.imagewidth // page.tilewidth)
    num_tiles = num_columns * -(-page.imagelength // page.tilelength)
    offsets = np.array(page.dataoffsets, np.int64)
    sizes = np.array(page.databytecounts, np.int64)
    if not plain or codec is None:
        return None
    if not len(offsets) == len(sizes) == num_tiles:
        raise Refusal("the header lists another number of tiles than its size needs; copy or export it again")
    if (sizes <= 0).any():  # not scanned: OpenSlide knows what to show there
        return None
    if (offsets + sizes).max() > file_bytes:
        raise Refusal("the file ends before its last tile; copy it again")
    return _Tiling(
        tile_height_px=page.tilelength,
        tile_width_px=page.tilewidth,
        num_columns=num_columns,
        offsets=offsets,
        sizes=sizes,
        codec=codec,
        predictor=int(page.predictor) == 2,
        colour_space=colours[int(page.photometric)],
        tables=page.jpegtables,
    )


def _unpack(data: bytes, tiling: _Tiling) -> np.ndarray:
    """The tile's pixels, H W 3 uint8."""
    shape = (tiling.tile_height_px, tiling.tile_width_px, 3)
    if tiling.codec == "jpeg":
        # The decoder fills what is missing with gray and does not say so; a whole stream ends with EOI.
        if b"\xff\xd9" not in data[-16:]:
            raise Refusal("cut off in the file; copy or export it again")
        tile = np.empty(shape, np.uint8)
        try:
            imagecodecs.jpeg8_decode(
                data, tables=tiling.tables, colorspace=tiling.colour_space, outcolorspace="RGB", out=tile
            )
        except Exception as error:  # the decoder has its own types, and its texts may hold anything
            raise Refusal(f"damaged in the file ({type(error).__name__}); copy or export it again") from None
        return tile
    if tiling.codec == "deflate":
        try:
            data = zlib.decompressobj().decompress(data, math.prod(shape) + 1)
        except zlib.error:
            raise Refusal("damaged in the file (zlib); copy or export it again") from None
    if len(data) != math.prod(shape):
        raise Refusal("of another size than the file says; copy or export it again")
    tile = np.frombuffer(data, np.uint8).reshape(shape)
    # Horizontal differencing. Source: TIFF 6.0, section 14.
    return np.cumsum(tile, axis=1, dtype=np.uint8) if tiling.predictor else tile.copy()


def _blocks(
    start: float, num_out: int, step: float, num_stored: int
) -> list[tuple[slice, slice, float, float]]:
    """How to resample one axis block by block: (into, stored pixels to read, exact start, exact end).

    What is read reaches as far as the filter does, but beyond the level only where the block itself does: white
    from outside would bleed in.
    """
    margin = math.ceil(step) + 1
    size = max(4, int(_BLOCK_PX / step))
    blocks = []
    for first in range(0, num_out, size):
        last = min(first + size, num_out)
        low, high = start + first * step, start + last * step
        begin, end = math.floor(low), math.ceil(high)
        stored = slice(min(begin, max(begin - margin, 0)), max(end, min(end + margin, num_stored)))
        blocks.append((slice(first, last), stored, low, high))
    return blocks


def _ordered(
    read: Callable[[int], list[np.ndarray | ValueError]], starts: range, threads: int
) -> Iterator[list[np.ndarray | ValueError]]:
    """`read` of each start, in order, by so many threads, which run at most two tasks each ahead."""
    if threads == 1:
        yield from map(read, starts)
        return
    with ThreadPoolExecutor(threads) as executor:
        pending = deque(executor.submit(read, start) for start in starts[: 2 * threads])
        try:
            for start in starts[2 * threads :]:
                yield pending.popleft().result()
                pending.append(executor.submit(read, start))
            while pending:
                yield pending.popleft().result()
        finally:
            for task in pending:
                task.cancel()


# --- Tissue -----------------------------------------------------------------------------------------


def tissue_mask(
    rgb: np.ndarray,
    mpp: float,
    *,
    minimum_saturation: float = 0.05,
    maximum_saturation: float = 0.10,
    minimum_density: float = 0.03,
    minimum_area_um2: float = 20_000,
    maximum_hole_um2: float = 10_000,
) -> np.ndarray:
    """H W bool: where a stained section lies. All False if nothing on the slide looks like one.

    Colours are divided by the glass's (the bright, colourless part of the picture), so that a yellowish lamp or
    a gray background is white. Tissue is what is then coloured and absorbs: saturation above Otsu's threshold,
    held between two limits since Otsu's method splits an empty slide too, and mean optical density above its
    own. Ink is left out with its rim: black (dark and colourless), blue and green (haematoxylin and eosin both
    absorb green most, so that red >= green in tissue). Red ink passes for tissue.

    Args:
        rgb: H W 3 uint8, usually a thumbnail of 4 to 32 um per pixel.
        mpp: um per pixel of it.
        minimum_saturation: least saturation of tissue, of HSV, 0..1 (not 0..255).
        maximum_saturation: saturation that always suffices.
        minimum_density: least optical density of tissue, -log10(transmitted light), mean of the channels.
        minimum_area_um2: smaller specks are dropped.
        maximum_hole_um2: smaller holes are filled.

    Raises:
        ValueError: if the picture is not H W 3 uint8, or mpp is no positive number.

    Source: saturation, Smith 1978, SIGGRAPH 12(3) 12; threshold, Otsu 1979, IEEE Trans. SMC 9(1) 62, eq. 18;
    optical density, Ruifrok & Johnston 2001, Anal. Quant. Cytol. Histol. 23(4) 291, eq. 1.

    >>> glass = np.full((40, 40, 3), 240, np.uint8)
    >>> glass[10:30, 10:30] = (190, 110, 170)
    >>> int(tissue_mask(glass, 16.0).sum())
    400
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8:
        raise ValueError(f"tissue_mask: shape {rgb.shape}, dtype {rgb.dtype}; give H W 3 uint8")
    if not (math.isfinite(mpp) and mpp > 0):
        raise ValueError(f"tissue_mask: mpp is {mpp}; give um per pixel, more than 0")
    light = rgb.astype(np.float32) / 255
    saturation, value = _saturation(light), light.max(2)
    glass = (value > 0.6) & (saturation < 0.15)
    if glass.mean() > 0.02:
        # The bright end of it: pale tissue is bright and nearly colourless too.
        light = np.minimum(light / np.maximum(np.percentile(light[glass], 90, axis=0), 0.5), 1)
        saturation, value = _saturation(light), light.max(2)
    density = -np.log10(np.maximum(light, 1 / 255)).mean(2)
    threshold = float(np.clip(_otsu(saturation), minimum_saturation, maximum_saturation))
    black = (value < 0.35) & (saturation < 0.4)
    blue_or_green = (light[..., 0] < light[..., 1:].min(2)) & (saturation > 0.4)
    green = (light[..., 1] > np.maximum(light[..., 0], light[..., 2])) & (saturation > 0.25)
    ink = scipy.ndimage.binary_opening(black | blue_or_green | green, np.ones((2, 2), bool))
    if ink.any():
        ink = scipy.ndimage.binary_dilation(ink, np.ones((3, 3), bool), iterations=2)
    mask = (saturation >= threshold) & (density >= minimum_density) & ~ink
    # Ink that crosses tissue leaves a hole which is no hole.
    mask = _without_small(mask, minimum_area_um2 / mpp**2)
    return ~_without_small(~mask, maximum_hole_um2 / mpp**2) & ~ink


def _saturation(light: np.ndarray) -> np.ndarray:
    """Saturation of HSV, 0..1; 0 for black."""
    high = light.max(2)
    return (high - light.min(2)) / np.maximum(high, 1 / 255)


def _otsu(values: np.ndarray) -> float:
    """The threshold in 0..1 that divides the values into two classes as far apart as can be."""
    counts, edges = np.histogram(values, bins=256, range=(0, 1))
    centres = (edges[:-1] + edges[1:]) / 2
    below, above = np.cumsum(counts), counts.sum() - np.cumsum(counts)
    sums = np.cumsum(counts * centres)
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(edges[1:][np.argmax(np.nan_to_num(between))])


def _without_small(mask: np.ndarray, minimum_px: float) -> np.ndarray:
    """`mask` without its connected parts (by edges) of fewer pixels."""
    parts, _ = scipy.ndimage.label(mask)
    sizes = np.bincount(parts.ravel())
    keep = sizes >= minimum_px
    keep[0] = False
    return keep[parts]


# --- Summary ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SlideSummary:
    """What a dataset keeps of a slide beside the file itself.

    Attributes:
        thumbnail: H W 3 uint8, the whole slide.
        tissue: H W uint8 on the same grid, 1 where there is tissue.
        spacing_mm: (row, column) distance between the thumbnail's pixels.
        size_px: (height, width) at the scanned resolution.
        slide_mpp: um per pixel of it.
        vendor: as in `Slide`.
        objective_power: as in `Slide`.
        attributes: as in `Slide`.
        assumptions: as in `Slide`.
        findings: what is doubtful, as "code: words": no_tissue.
    """

    thumbnail: np.ndarray
    tissue: np.ndarray
    spacing_mm: tuple[Millimetres, Millimetres]
    size_px: tuple[int, int]
    slide_mpp: MicrometresPerPixel
    vendor: str
    objective_power: float
    attributes: dict[str, Any]
    assumptions: tuple[str, ...]
    findings: tuple[str, ...]


def summarise_slide(
    path: Path, slide_mpp: float | None = None, *, thumbnail_mpp: float = 16.0
) -> SlideSummary:
    """Thumbnail, tissue and geometry of a slide, read in blocks: memory does not grow with the slide.

    The thumbnail has `thumbnail_mpp` um per pixel, unless its longer side would be over 2048 pixels (then it is
    coarser) or under 512 (then it is finer, down to the slide's own).

    Raises:
        ValueError: one line: as in `open_slide` and `check_is_one_file`, or a tile is damaged.
    """
    if path.is_file():
        check_is_one_file(path)
    with open_slide(path, slide_mpp=slide_mpp) as slide:
        longer_um = max(slide.size_um)
        least_px, most_px = _SUMMARY_PX
        mpp = max(min(thumbnail_mpp, longer_um / least_px), longer_um / most_px, slide.slide_mpp)
        thumbnail = slide.thumbnail(mpp)
        spacing_um = [size_um / n for size_um, n in zip(slide.size_um, thumbnail.shape, strict=False)]
        tissue = tissue_mask(thumbnail, math.sqrt(math.prod(spacing_um)))
        findings: tuple[str, ...] = ()
        if not tissue.any():
            findings = (
                "no_tissue: nothing on the slide is coloured and dense enough to be a stained section",
            )
        return SlideSummary(
            thumbnail=thumbnail,
            tissue=tissue.astype(np.uint8),
            spacing_mm=(Millimetres(spacing_um[0] / 1000), Millimetres(spacing_um[1] / 1000)),
            size_px=slide.size_px,
            slide_mpp=slide.slide_mpp,
            vendor=slide.vendor,
            objective_power=slide.objective_power,
            attributes=slide.attributes,
            assumptions=slide.assumptions,
            findings=findings,
        )
