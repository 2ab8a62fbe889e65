"""What reading a slide costs: tiles a second against a plain OpenSlide loop, and the memory of its ingest.

The slide is a pyramid of 16384 x 16384 px in JPEG tiles, the commonest form there is. Both arms read the same tiles,
row by row as a loader does, each from a slide that it has just opened. They take turns, and each arm's best turn
counts: what else runs on the machine only ever slows one down.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openslide
import tifffile
import yaml
from PIL import Image

from benchmarks._claim import claim
from cadx.reading.slides import open_slide

SIDE_PX = 16384
TILE_PX = 256
SLIDE_MPP = 0.5
THREADS = 2
_BLOCK_PX = 2048
"""Side of the texture that is repeated over the slide: 64 different tiles."""
_TURNS = 7
_ROWS, _COLUMNS = 16, 48
"""Tiles that are read in a turn."""
_GOALS = {"aligned": (0, 5.0), "unaligned": (100, 1.8)}
"""Distance of the tiles from the file's own, in pixels, and least ratio."""
_LIMIT_MB = 600.0
_INGEST = """
import json, sys
from pathlib import Path
from cadx.datasets import DatasetFolder
from cadx.memory import peak_memory_bytes
from components.ingest import ingest
root, params = Path(sys.argv[1]), json.dumps({"source": sys.argv[2]})
ingest(catalog=root / "catalog.yaml", cache=root / "cache", dataset=root / sys.argv[2], params=params)
peak_bytes = peak_memory_bytes()
folder = DatasetFolder(root / sys.argv[2])
(sample_id,) = folder.samples["sample_id"]
assert max(folder.tissue(sample_id).shape) >= 512
print(peak_bytes)
"""


def claims() -> Iterator[dict[str, Any]]:
    with TemporaryDirectory(prefix="cadx-tiles-") as folder:
        path, flat = Path(folder) / "slide.tiff", Path(folder) / "flat.tiff"
        write_slide(path, num_levels=5)
        write_slide(flat, num_levels=1)
        for name, (offset_px, goal) in _GOALS.items():
            ours, peer = measure(path, offset_px)
            yield claim(f"tiles.{name}", ours, peer, "tiles/s", goal=goal)
        # The peer is the limit: what the step may take.
        for name, slide in (("memory", path), ("memory_flat", flat)):
            peak_mb = _ingest_peak_mb(slide)
            yield claim(f"tiles.{name}", peak_mb, _LIMIT_MB, "MB", ratio=_LIMIT_MB / peak_mb)


def write_slide(path: Path, num_levels: int) -> None:
    """Write a textured slide of so many levels, tile by tile."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(120, 255, (256, 256, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((_BLOCK_PX, _BLOCK_PX), Image.Resampling.BICUBIC), np.float32)
    block = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for level in range(num_levels):
            factor = 2**level
            texture = np.asarray(Image.fromarray(block).reduce(factor))
            side_px = SIDE_PX // factor
            per_cm = 10_000 / SLIDE_MPP / factor
            writer.write(
                _tiles(texture, side_px),
                shape=(side_px, side_px, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="rgb",  # of what is given: it is stored as YCbCr, as scanners do
                subsampling=(2, 2),
                compression="jpeg",
                compressionargs={"level": 80},
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=int(level > 0),
                metadata=None,
            )


def _tiles(texture: np.ndarray, side_px: int) -> Iterator[np.ndarray]:
    starts = range(0, side_px, TILE_PX)
    within = [np.arange(start, start + TILE_PX) % len(texture) for start in starts]
    for rows in within:
        for columns in within:
            yield texture[np.ix_(rows, columns)]


def measure(path: Path, offset_px: int) -> tuple[float, float]:
    """Tiles a second, ours and the plain loop's, of tiles that lie so far from the file's own."""
    places = [
        (offset_px + column * TILE_PX, offset_px + row * TILE_PX)
        for row in range(_ROWS)
        for column in range(_COLUMNS)
    ]
    _check(path, places[:: len(places) // 8])
    arms: dict[str, Callable[[], int]] = {
        "ours": lambda: sum(1 for _ in _ours(path, places)),
        "peer": lambda: sum(1 for _ in _peer(path, places)),
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(_TURNS):
        for name, read in arms.items():
            start = time.perf_counter()
            num_tiles = read()
            rates[name].append(num_tiles / (time.perf_counter() - start))
            assert num_tiles == len(places), name
    return max(rates["ours"]), max(rates["peer"])


def _ours(path: Path, places: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    with open_slide(path) as slide:
        grid = np.array(places) * SLIDE_MPP
        for _, tile in slide.tiles(grid, TILE_PX, SLIDE_MPP, threads=THREADS):
            yield tile


def _peer(path: Path, places: list[tuple[int, int]]) -> Iterator[np.ndarray]:
    with openslide.OpenSlide(path) as slide:
        for place in places:
            yield np.asarray(slide.read_region(place, 0, (TILE_PX, TILE_PX)).convert("RGB"))


def _check(path: Path, places: list[tuple[int, int]]) -> None:
    for ours, peer in zip(_ours(path, places), _peer(path, places), strict=True):
        assert np.abs(ours.astype(int) - peer).max() <= 2, "the arms read different pixels"


def _ingest_peak_mb(path: Path) -> float:
    """Peak memory, in MB of 10^6 bytes, of a process that ingests the slide with its tissue mask."""
    entry = dict.fromkeys(("title", "modality", "licence", "citation"), "made") | {
        "task": "binary", "classes": ["normal", "tumour"], "positive": "tumour", "patient": "per-image",
        "format": "files", "kind": "slide", "file": str(path.parent), "samples": [{"file": path.name}],
    }  # fmt: skip
    (path.parent / "catalog.yaml").write_text(yaml.safe_dump({path.stem: entry}), encoding="utf-8")
    answer = subprocess.run(
        [sys.executable, "-c", _INGEST, str(path.parent), path.stem],
        check=True,
        capture_output=True,
        text=True,
    )
    return int(answer.stdout) / 1e6
