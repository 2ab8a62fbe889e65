"""What it costs to train on bags that lie on disk: memory, and time over bags that are all in memory.

100 bags of 10,000 embeddings of 512 numbers, 1 GB in float16 and 2 GB as a network takes them. Memory is what a
process has for itself alone (anonymous pages, not the system's cache of files), over what it had when its imports
were done. Then both arms train the same network on the same bags in the same process, in turns, and each one's best
turn counts: what else runs on the machine only ever slows one down.
"""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from benchmarks._claim import claim
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_bytes
from cadx.loading.embeddings import EmbeddingBagDataset, EmbeddingCache, write_embeddings
from cadx.loading.slides import MILDataset, collate_bags
from cadx.models.slide import MILConfig
from cadx.transforms import Preprocessing

NUM_BAGS = 100
TILES_A_SIDE = 100
EMBEDDING_DIM = 512
BATCH_SIZE = 4
TILE_PX, MPP = 16, 0.5
MODEL = MILConfig()
_TIMED_BAGS = 20
_TURNS = 3
_LIMIT_MB = 1000.0
_ENCODER = digest_bytes(b"random numbers")
_CHILD = """
import json, sys
from pathlib import Path
from benchmarks.bags import measure
print(json.dumps(measure(Path(sys.argv[1]))))
"""


def claims() -> Iterator[dict[str, Any]]:
    with TemporaryDirectory(prefix="cadx-bags-") as folder:
        _write(Path(folder))
        # In a process of its own: memory that this one has freed could be given out again unseen.
        answer = subprocess.run(
            [sys.executable, "-c", _CHILD, folder], check=True, stdout=subprocess.PIPE, text=True
        )
    measured = json.loads(answer.stdout)
    # The peer is the limit: what training may take.
    ours, peer = measured["peak_mb"], _LIMIT_MB
    yield claim("bags.memory", ours, peer, "MB", ratio=peer / ours)
    ours, peer = measured["ours"], measured["peer"]
    yield claim("bags.vs_all_in_memory", ours, peer, "bags/s", goal=0.9)


def _write(folder: Path) -> None:
    """Slides that are tissue all over and are never opened, and random embeddings of their tiles."""
    (folder / "slide.tiff").touch()
    side_mm = TILE_PX * MPP / 1000
    with DatasetWriter(
        folder / "dataset",
        name="noise",
        kind="slide",
        task="binary",
        classes=("even", "odd"),
        positive="odd",
        modality="noise",
        clustered=False,
        source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number in range(NUM_BAGS):
            writer.add(
                Sample(
                    sample_id=f"s{number:03}",
                    pixels=np.zeros((TILES_A_SIDE, TILES_A_SIDE, 3), np.uint8),
                    tissue=np.ones((TILES_A_SIDE, TILES_A_SIDE), np.uint8),
                    slide=folder / "slide.tiff",
                    slide_mpp=MPP,
                    spacing_mm=(side_mm, side_mm),
                    labels={("even", "odd")[number % 2]: 1},
                    patient=f"p{number}",
                    sha256=digest_bytes(str(number).encode()),
                    statistics={},
                )
            )
    tiles, cache = _tiles(folder), EmbeddingCache(folder / "cache")
    rng = np.random.default_rng(0)
    for index in range(NUM_BAGS):
        positions_um = tiles.positions_um(index)
        embeddings = rng.standard_normal((len(positions_um), EMBEDDING_DIM), np.float32)
        write_embeddings(cache.path(tiles, index, _ENCODER), embeddings.astype(np.float16), positions_um)


def _tiles(folder: Path) -> MILDataset:
    dataset = DatasetFolder(folder / "dataset")
    preprocessing = Preprocessing(channels=3, height_px=TILE_PX, width_px=TILE_PX)
    ids = dataset.samples["sample_id"].tolist()
    return MILDataset(dataset, ids, preprocessing, tile_px=TILE_PX, mpp=MPP)


def measure(folder: Path) -> dict[str, float]:
    """Peak memory of an epoch, in MB, and bags a second of both arms; to be called in a fresh process."""
    with _peak_mb() as peak_mb:
        bags = EmbeddingBagDataset(_tiles(folder), EmbeddingCache(folder / "cache"), _ENCODER)
        assert all(len(bags[index].instances) == TILES_A_SIDE**2 for index in (0, NUM_BAGS - 1))
        _train(_streamed(bags))
    timed = Subset(bags, range(_TIMED_BAGS))
    kept = [timed[index] for index in range(_TIMED_BAGS)]
    instances = torch.stack([bag.instances for bag in kept])
    targets = torch.stack([bag.target for bag in kept])
    mask = torch.ones(BATCH_SIZE, TILES_A_SIDE**2, dtype=torch.bool)
    del kept
    seconds: dict[str, list[float]] = {"ours": [], "peer": []}
    for _ in range(_TURNS):
        started = time.perf_counter()
        _train(_streamed(timed))
        seconds["ours"].append(time.perf_counter() - started)
        started = time.perf_counter()
        order = torch.randperm(_TIMED_BAGS).view(-1, BATCH_SIZE)
        _train((instances[batch], mask, targets[batch]) for batch in order)
        seconds["peer"].append(time.perf_counter() - started)
    return {"peak_mb": peak_mb[0], **{arm: _TIMED_BAGS / min(turns) for arm, turns in seconds.items()}}


def _streamed(bags: Any) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    for batch in DataLoader(bags, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate_bags):
        yield batch.instances, batch.mask, batch.targets


def _train(batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    network = MODEL.build(2, EMBEDDING_DIM).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3, fused=True)
    for instances, mask, targets in batches:
        loss = F.cross_entropy(network(instances, mask).logits, targets)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


@contextmanager
def _peak_mb() -> Iterator[list[float]]:
    """The most anonymous memory in the block over that before it, in the list's one place when the block is over."""
    before, peaks, over = _anonymous_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not over.wait(0.002):
            peaks[0] = max(peaks[0], _anonymous_mb() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield peaks
    finally:
        over.set()
        watcher.join()


def _anonymous_mb() -> float:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None, "no RssAnon in /proc/self/status"
    return int(found[1]) / 1024
