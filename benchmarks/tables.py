"""What a large sample table costs: `validate` and `imbalance` on 100,000 tiny images, each in a process of its own.

The peer of each claim is its limit, seconds or MiB: the ratio is how many times over it is kept.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks._claim import claim
from cadx.datasets import DatasetWriter, Sample, SourceInfo, write_splits
from cadx.drift import image_statistics
from cadx.files import digest_bytes
from cadx.quality import image_checks, perceptual_hash

NUM_IMAGES = 100_000
SIDE_PX = 16
NUM_TEMPLATES = 64
ALIKE_FRACTION = (
    0.1  # of the images: of one template and one perceptual hash, as blank-like ones of a device are
)
LIMIT_SECONDS = 30.0
LIMIT_MIB = 1024.0

_STEPS = {
    "validate": "validate(dataset=root / 'd', validation=root / 'v.json', report=root / 'v.html', params=params)",
    "imbalance": (
        "imbalance(dataset=root / 'd', splits=root / 's.parquet', imbalance=root / 'i.json',"
        " report=root / 'i.html', params=params)"
    ),
}
_SCRIPT = """
import json, sys, time
from pathlib import Path
started = time.perf_counter()
from cadx.memory import peak_memory_bytes
from components.{step} import {step}
root = Path(sys.argv[1])
params = "{{}}"
{call}
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": seconds, "mib": peak_memory_bytes() / 2**20}}))
"""


def claims() -> Iterator[dict[str, Any]]:
    """Seconds of both steps together, and the memory of the larger one, against their limits."""
    with tempfile.TemporaryDirectory(prefix="cadx-tables-") as folder:
        root = Path(folder)
        write_cohort(root, NUM_IMAGES)
        measured = [run(step, root) for step in _STEPS]
    for name, ours, limit, unit in (
        ("seconds", sum(one["seconds"] for one in measured), LIMIT_SECONDS, "s"),
        ("memory", max(one["mib"] for one in measured), LIMIT_MIB, "MiB"),
    ):
        yield claim(f"tables.{name}", ours, limit, unit, ratio=limit / ours)


def write_cohort(root: Path, num_images: int) -> None:
    """A binary dataset in `root / "d"` with its splits: two images a patient, five sites, a box in every fourth.

    The first tenth is nearly equal. The hashes of the others are as different as those of real images of different
    patients are on average.
    """
    rng = np.random.default_rng(0)
    templates = rng.integers(0, 256, (NUM_TEMPLATES, SIDE_PX, SIDE_PX), dtype=np.uint8)
    statistics = [image_statistics(pixels) for pixels in templates]
    checks = [image_checks(pixels) for pixels in templates]
    hash_of_alike = perceptual_hash(templates[0])
    source = SourceInfo(title="noise", licence="CC0-1.0", citation="none")
    splits = rng.choice(
        ["train", "val", "calibration", "test"], (num_images + 1) // 2, p=[0.7, 0.1, 0.1, 0.1]
    )
    with DatasetWriter(
        root / "d",
        name="noise",
        task="binary",
        classes=("normal", "sick"),
        positive="sick",
        modality="noise",
        clustered=True,
        source=source,
    ) as writer:
        for number in range(num_images):
            is_alike = number < ALIKE_FRACTION * num_images
            template = 0 if is_alike else number % NUM_TEMPLATES
            pixels = templates[template].copy()
            pixels.reshape(-1)[:4] = np.frombuffer(np.uint32(number).tobytes(), np.uint8)
            writer.add(
                Sample(
                    sample_id=f"s{number:06d}",
                    pixels=pixels,
                    labels={"sick" if rng.random() < 0.2 else "normal": 1.0},
                    patient=f"p{number // 2:05d}",
                    sha256=digest_bytes(pixels.tobytes()),
                    site=f"site {number // 2 % 5}",
                    age=float(20 + number % 70),
                    sex="FM"[number % 2],
                    spacing_mm=(0.5, 0.5),
                    statistics=statistics[template],
                    checks=checks[template],
                    phash=hash_of_alike if is_alike else f"{rng.integers(1 << 63):016x}",
                    boxes=[("sick", 2.0, 3.0, 9.0, 11.0)] if number % 4 == 0 else [],
                )
            )
    placed = np.repeat(splits, 2)[:num_images]
    table = {"sample_id": [f"s{number:06d}" for number in range(num_images)], "split": placed, "reason": ""}
    write_splits(root / "s.parquet", pd.DataFrame(table))


def run(step: str, root: Path) -> dict[str, float]:
    """Seconds, imports among them, and peak memory in MiB of one step in a fresh interpreter."""
    script = _SCRIPT.format(step=step, call=_STEPS[step])
    done = subprocess.run(
        [sys.executable, "-c", script, str(root)], check=True, capture_output=True, text=True
    )
    measured: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return measured
