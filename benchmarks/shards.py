"""Why a dataset's pixels lie in safetensors shards: the time of one random read, format by format.

A training loader opens a dataset once and then reads single images in random order, from memory that the
first epoch has warmed. Each arm keeps open what its format lets it keep, and hands over an array that is the
caller's own, so that a mapped page counts only once it is read. The arms take turns; the median over turns
counts.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from benchmarks._claim import claim

Images = dict[str, npt.NDArray[np.uint8]]
Read = Callable[[str], npt.NDArray[np.uint8]]

_SETS = (("1024px", 1024, 48, 48), ("28px", 28, 4000, 1000))
"""Name, side of the images in pixels, how many there are, how many are read in a turn."""
_TURNS = 9
_GOALS = {"png": 2.0, "npz": 2.0, "npy": 1.0, "arrow": 0.6}
"""Least ratio. Arrow maps its file too and may win on tiny images; safetensors also carries the weights."""


def claims() -> Iterator[dict[str, Any]]:
    """How many times faster a random read from safetensors is than from each other format, by image size."""
    for name, side_px, num_images, num_reads in _SETS:
        times_us = measure(side_px, num_images, num_reads)
        for peer, goal in _GOALS.items():
            yield claim(
                f"shards.random_read_{name}_vs_{peer}",
                times_us["safetensors"],
                times_us[peer],
                "us/image",
                ratio=times_us[peer] / times_us["safetensors"],
                goal=goal,
            )


def measure(side_px: int, num_images: int, num_reads: int) -> dict[str, float]:
    """Microseconds per random read of one image, by format; every arm reads the same images in each turn."""
    images = _draw(side_px, num_images)
    keys = list(images)
    rng = np.random.default_rng(1)
    with TemporaryDirectory(prefix="cadx-shards-") as folder:
        arms: dict[str, Read] = {
            "safetensors": _safetensors(Path(folder), images),
            "npz": _npz(Path(folder), images),
            "png": _png(Path(folder), images),
            "npy": _npy(Path(folder), images),
            "arrow": _arrow(Path(folder), images),
        }
        for arm, read in arms.items():
            for key in keys:
                assert np.array_equal(read(key), images[key]), f"{arm} gives other pixels back"
        times_us: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(_TURNS):
            wanted = rng.choice(keys, num_reads).tolist()
            for arm in rng.permutation(list(arms)).tolist():
                start = time.perf_counter()
                for key in wanted:
                    arms[arm](key)
                times_us[arm].append((time.perf_counter() - start) / num_reads * 1e6)
    return {arm: statistics.median(times) for arm, times in times_us.items()}


def _draw(side_px: int, num_images: int) -> Images:
    """Smooth shapes under noise: compressible about as well as a radiograph is."""
    rng = np.random.default_rng(0)
    images = {}
    for index in range(num_images):
        coarse = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((side_px, side_px), Image.Resampling.BICUBIC), dtype=np.float32)
        noisy = smooth + rng.normal(0, 3, smooth.shape)
        images[f"sample-{index:05d}"] = np.clip(noisy, 0, 255).astype(np.uint8)
    return images


def _safetensors(folder: Path, images: Images) -> Read:
    save_file(images, folder / "shard.safetensors")
    shard = safe_open(folder / "shard.safetensors", framework="numpy")
    return shard.get_tensor  # a copy already


def _npz(folder: Path, images: Images) -> Read:
    np.savez(folder / "shard.npz", allow_pickle=False, **images)
    archive = np.load(folder / "shard.npz")
    return lambda key: np.asarray(archive[key])


def _png(folder: Path, images: Images) -> Read:
    for key, pixels in images.items():
        Image.fromarray(pixels).save(folder / f"{key}.png")
    return lambda key: np.array(Image.open(folder / f"{key}.png"))


def _npy(folder: Path, images: Images) -> Read:
    for key, pixels in images.items():
        np.save(folder / f"{key}.npy", pixels)
    return lambda key: np.array(np.load(folder / f"{key}.npy", mmap_mode="r"))


def _arrow(folder: Path, images: Images) -> Read:
    table = pa.table(
        {"pixels": pa.array([pixels.tobytes() for pixels in images.values()], pa.large_binary())}
    )
    with pa.OSFile(str(folder / "shard.arrow"), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    column = pa.ipc.open_file(pa.memory_map(str(folder / "shard.arrow"))).read_all()["pixels"]
    rows = {key: row for row, key in enumerate(images)}
    shape = next(iter(images.values())).shape
    return lambda key: np.frombuffer(column[rows[key]].as_buffer(), dtype=np.uint8).reshape(shape).copy()
