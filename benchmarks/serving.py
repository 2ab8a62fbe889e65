"""What the door costs: a served ResNet-18 at 224 px against the same Predictor in process, on the same cores.

It is served by one worker, and by two that share the cores. All arms take turns, so that what else the machine does
falls on each. Clients are threads of this process: they share the cores with the server.
"""

import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import urllib3

from benchmarks._claim import claim
from cadx.predicting.predictor import Predictor
from cadx.reading.images import encode_png, read_image
from components.deploy import DeployParams
from serving.archive import write_archive
from serving.client import Answer, Client
from serving.demo import demo_release, write_demo_bundle
from serving.management import Management
from serving.server import TorchServe, free_ports

SIDE_PX = 224
NUM_CLIENTS = 16
NUM_IMAGES = 32
NUM_ROUNDS = 3
ROUND_S = 5.0
WARM_UP_S = 10.0  # Java compiles what it does often


def claims() -> Iterator[dict[str, Any]]:
    """Throughput at 16 clients and a lone client's median, by one worker and by two; where a request's time goes."""
    cores = len(os.sched_getaffinity(0))
    torch.set_num_threads(cores)
    os.environ["OMP_NUM_THREADS"] = str(cores)  # of the server's worker
    rng = np.random.default_rng(0)
    pngs = [
        encode_png(rng.integers(0, 64, (SIDE_PX, SIDE_PX), np.uint8) + np.uint8(i)) for i in range(NUM_IMAGES)
    ]
    with tempfile.TemporaryDirectory(prefix="cadx") as folder:
        bundle = write_demo_bundle(
            Path(folder) / "bundle",
            "radiograph",
            model={"family": "resnet", "depth": 18},
            preprocessing={"height_px": SIDE_PX, "width_px": SIDE_PX},
        )
        predictor = Predictor(bundle, "cpu")
        with TorchServe(Path(folder) / "served", free_ports()) as server:
            clients = [_register(server, bundle, workers) for workers in (1, 2)]
            yield from _measured(predictor, clients, server, pngs)


class _Arm:
    """One way to ask: what it has measured in all rounds.

    Args:
        crowd: asks for so many seconds from all sides; gives the images per second.
        lone: asks for one image, by its number.
    """

    def __init__(self, crowd: Callable[[float], float], lone: Callable[[int], None]) -> None:
        self.crowd, self.lone = crowd, lone
        self.rates: list[float] = []
        self.lone_ms: list[float] = []


def _measured(
    predictor: Predictor, clients: Sequence[Client], server: TorchServe, pngs: list[bytes]
) -> Iterator[dict[str, Any]]:
    batch = DeployParams().batch_size
    answers: list[Answer] = []

    def batch_in_process(number: int) -> None:
        predictor.predict_many([read_image(pngs[(number + k) % NUM_IMAGES]) for k in range(batch)])

    def crowd_in_process(seconds: float) -> float:
        times = _loop(batch_in_process, seconds)
        return batch * len(times) / sum(times)

    def lone_in_process(number: int) -> None:
        predictor.predict(read_image(pngs[number % NUM_IMAGES]))

    def served(client: Client, number: int) -> None:
        answers.append(client.predict(pngs[number % NUM_IMAGES]))

    def crowd(client: Client, seconds: float) -> float:
        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            started = time.perf_counter()
            loops = pool.map(lambda _: _loop(partial(served, client), seconds), range(NUM_CLIENTS))
            return sum(len(times) for times in loops) / (time.perf_counter() - started)

    peer = _Arm(crowd_in_process, lone_in_process)
    one, two = (_Arm(partial(crowd, client), partial(served, client)) for client in clients)
    arms = (peer, one, two)
    _loop(lone_in_process, WARM_UP_S)
    for arm in arms:
        arm.crowd(WARM_UP_S)
    crowded: list[Answer] = []
    queue_ms = num_queued = 0.0
    for _ in range(NUM_ROUNDS):
        for arm in arms:
            answers.clear()
            waited_before, number_before = _queued(server)
            arm.rates.append(arm.crowd(ROUND_S))
            if arm is one:
                waited, number = _queued(server)
                queue_ms, num_queued = queue_ms + waited - waited_before, num_queued + number - number_before
                crowded += answers
        for arm in arms:
            arm.lone_ms += [1000 * s for s in _loop(arm.lone, ROUND_S / 2)]
    for name, arm in (("one_worker", one), ("two_workers", two)):
        ours, theirs = float(np.mean(arm.rates)), float(np.mean(peer.rates))
        yield claim(f"serving.throughput_16_clients_{name}", ours, theirs, "images/s", goal=0.95)
        ours, theirs = float(np.median(arm.lone_ms)), float(np.median(peer.lone_ms))
        yield claim(f"serving.lone_client_p50_{name}", ours, theirs, "ms", ratio=theirs / ours, goal=1 / 1.15)
    # Where it goes with one worker: each part beside the whole. No goals, hence 0.
    parts: dict[str, float] = {
        "decode": float(np.mean([answer.timing_ms.decode for answer in crowded])),
        "queue": queue_ms / num_queued,
        "preprocess": float(np.mean([answer.timing_ms.preprocess for answer in crowded])),
        "infer": float(np.mean([answer.timing_ms.infer for answer in crowded])),
    }
    total = float(np.mean([answer.timing_ms.total for answer in crowded]) + parts["queue"])
    for name, part in parts.items():
        yield claim(f"serving.{name}_of_a_request", part, total, "ms", ratio=total / max(part, 1e-3), goal=0)


def _loop(call: Callable[[int], None], seconds: float) -> list[float]:
    """The durations in s of calls one after another, for so long."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while (started := time.perf_counter()) < end:
        call(len(times))
        times.append(time.perf_counter() - started)
    return times


def _queued(server: TorchServe) -> tuple[float, float]:
    """Milliseconds that requests have waited in the queue until now, and their number."""
    text = urllib3.request("GET", f"{server.metrics}/metrics").data.decode()
    names = ("ts_queue_latency_microseconds", "ts_inference_requests_total")
    waited_us, number = (
        sum(float(value) for value in re.findall(rf"^{name}\{{[^}}]*\}} (\S+)", text, re.MULTILINE))
        for name in names
    )
    return waited_us / 1000, number


def _register(server: TorchServe, bundle: Path, workers: int) -> Client:
    """A client of the model by so many workers."""
    name = f"resnet-{workers}"
    write_archive(server.model_store / f"{name}.mar", bundle, demo_release(bundle, name))
    params = DeployParams()
    Management(server.management, key_file=server.key_file).register(
        f"{name}.mar",
        workers=workers,
        batch_size=params.batch_size,
        max_batch_delay_ms=params.max_batch_delay_ms,
    )
    return Client(server.inference, name, key_file=server.key_file)
