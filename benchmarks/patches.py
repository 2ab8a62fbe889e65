"""What a 3D patch costs: patches a second and peak memory, against `get_fdata()` of the whole volume per item.

Both arms cut the same patches at the same places out of the same CT-like volumes and bring them into the same window,
each in processes of its own. Memory is what a process holds for itself beyond what it held before its first
patch. Pages of files do not count in either arm, be they mapped or read: the system shares them between loader
workers and takes them back at need.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from benchmarks._claim import claim
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_path
from cadx.loading.patches import VolumePreprocessing
from cadx.loading.volumes import Patch3DDataset
from cadx.reading.volumes import read_volume

PATCH_PX = 64
SHAPE_PX = (200, 256, 256)
NUM_VOLUMES = 3
NUM_PATCHES = {"ours": 600, "peer": 12}
"""Timed patches by arm; every patch costs the peer the same."""
WINDOW_HU = (-1000.0, 400.0)


def claims() -> Iterator[dict[str, Any]]:
    """Patches a second, and memory at its peak."""
    with tempfile.TemporaryDirectory(prefix="cadx-patches-") as folder:
        _write(Path(folder))
        rates, means = zip(*(_time(arm, Path(folder)) for arm in NUM_PATCHES), strict=True)
        assert means[0] == means[1], "the arms give different patches"
        memory = [_peak_mib(arm, Path(folder)) for arm in NUM_PATCHES]
    for name, unit, (ours, peer), ratio, goal in (
        ("rate", "patches/s", rates, rates[0] / rates[1], 5.0),
        ("memory", "MiB at the peak", memory, memory[1] / memory[0], 4.0),
    ):
        yield claim(
            f"patches.{name}", ours, peer, f"{unit} (peer: get_fdata() per item)", ratio=ratio, goal=goal
        )


def _write(folder: Path) -> None:
    """The volumes as .nii.gz, and the dataset that is made of them once."""
    rng = np.random.default_rng(0)
    source = SourceInfo(title="noise", licence="CC0-1.0", citation="none")
    with DatasetWriter(
        folder / "dataset",
        name="noise",
        task="binary",
        classes=("even", "odd"),
        positive="odd",
        kind="volume",
        modality="noise",
        clustered=False,
        source=source,
    ) as writer:
        for number in range(NUM_VOLUMES):
            # Soft tissue under a scanner's noise, with air beside it: it packs as a CT does.
            voxels = rng.normal(40, 15, SHAPE_PX[::-1]).astype(np.int16)
            voxels[:40] = -1000
            path = folder / f"{number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(voxels, np.diag([0.8, 0.8, 1.5, 1.0])), path)  # type: ignore[no-untyped-call]
            volume = read_volume(path)
            writer.add(
                Sample(
                    sample_id=str(number),
                    pixels=volume.voxels,
                    labels={"even": 1},
                    patient=f"p{number}",
                    sha256=digest_path(path),
                    spacing_mm=volume.spacing_mm,
                    statistics={},
                )
            )


def _start(arm: str, folder: Path) -> "subprocess.Popen[str]":
    """A process of the arm that has all in hand and waits for a line to begin."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.patches", arm, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def _time(arm: str, folder: Path) -> tuple[float, float]:
    """Patches a second, and the mean of the patches that both arms read."""
    out, _ = _start(arm, folder).communicate("go\n")
    rate, mean = json.loads(out)
    return rate, mean


def _peak_mib(arm: str, folder: Path) -> float:
    """Most memory that the arm holds for itself, over what it held before; looked at from outside."""
    process = _start(arm, folder)
    before_kib = peak_kib = _own_kib(process.pid)
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    while process.poll() is None:
        peak_kib = max(peak_kib, _own_kib(process.pid))
        time.sleep(2e-4)
    assert process.returncode == 0
    return (peak_kib - before_kib) / 1024


def _own_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1])
    return 0  # a process that has ended holds nothing


def _arm(arm: str, folder: Path) -> None:
    """Read the arm's patches once a line comes; print patches a second and the mean of the first ones."""
    dataset = Patch3DDataset(
        DatasetFolder(folder / "dataset"),
        [str(number) for number in range(NUM_VOLUMES)],
        VolumePreprocessing(patch_px=(PATCH_PX, PATCH_PX, PATCH_PX), window_hu=WINDOW_HU),
        patches_per_volume=max(NUM_PATCHES.values()) // NUM_VOLUMES,
        positive_fraction=0.0,
        seed=0,
    )
    order = np.random.default_rng(0).permutation(len(dataset))[: NUM_PATCHES[arm]].tolist()
    print("ready", flush=True)
    sys.stdin.readline()
    started = time.perf_counter()
    means = []
    for index in order:
        if arm == "ours":
            patch = dataset[index].image.numpy()[0]
        else:
            patch = _whole_volume_patch(
                folder / f"{index // dataset.patches_per_volume}.nii.gz", *dataset.start_px(index)
            )
        means.append(float(patch.mean(dtype=np.float64)))
    rate = len(order) / (time.perf_counter() - started)
    print(json.dumps([rate, round(float(np.mean(means[: min(NUM_PATCHES.values())])), 5)]))


def _whole_volume_patch(path: Path, depth: int, height: int, width: int) -> np.ndarray:
    """The same patch as loaders commonly cut it: the whole volume as float64 first. NIfTI's axes are W, H, D."""
    volume = nibabel.load(path).get_fdata()  # type: ignore[attr-defined]
    columns, rows, slices = (slice(start, start + PATCH_PX) for start in (width, height, depth))
    low, high = WINDOW_HU
    patch = np.clip((volume[columns, rows, slices] - low) / (high - low), 0, 1)
    return np.ascontiguousarray(patch.T, np.float32)


if __name__ == "__main__":
    _arm(sys.argv[1], Path(sys.argv[2]))
