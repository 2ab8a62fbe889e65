"""What clients see while a server is ill-treated: sixteen ask without pause, and one fault follows the other.

Each request ends in the right answer, or in an error that says what happened. What does neither is lost.
"""

import json
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._claim import claim
from cadx.predicting import Predictor
from cadx.reading.images import encode_png
from serving.archive import write_archive
from serving.client import Client, Endpoint, Refused
from serving.demo import demo_release, write_demo_bundle
from serving.management import Management
from serving.server import TorchServe, free_ports

DURATION_S = 600.0
NUM_CLIENTS = 16
BURST = 150
"""Requests at once: more than a queue holds."""
PAUSE_S = 10.0
RESPONSE_TIMEOUT_S = 5
FROZEN_S = 8.0
TOLERANCE = 1e-5


def claims() -> Iterator[dict[str, Any]]:
    """Requests that were lost, of all that were sent."""
    rng = np.random.default_rng(0)
    pngs = [encode_png(rng.integers(0, 255, (64, 64), np.uint8)) for _ in range(8)]
    with tempfile.TemporaryDirectory(prefix="cadx") as folder:
        bundle = write_demo_bundle(Path(folder) / "bundle", "radiograph")
        predictor = Predictor(bundle, "cpu")
        expected = [predictor.predict(png).probabilities["finding"] for png in pngs]
        server = TorchServe(Path(folder) / "served", free_ports())
        server.model_store.mkdir(parents=True)
        write_archive(server.model_store / "demo.mar", bundle, demo_release(bundle, "demo"))
        counted: Counter[str] = Counter()
        try:
            _start(server)
            _run(server, pngs, expected, counted)
        finally:
            server.stop()
    for name in ("answered", "refused", "unreachable", "wrong"):
        yield claim(f"faults.{name}", counted[name], counted["sent"], "requests", goal=0)
    lost = counted["sent"] - counted["answered"] - counted["refused"] - counted["unreachable"]
    yield claim("faults.lost", lost, counted["sent"], "requests", ratio=float(lost == 0))


def _run(server: TorchServe, pngs: list[bytes], expected: list[float], counted: Counter[str]) -> None:
    done, lock = threading.Event(), threading.Lock()

    def ask(client: Client, number: int) -> None:
        outcome = "lost"
        try:
            answer = client.predict(pngs[number % len(pngs)])
            gap = abs(answer.probabilities["finding"] - expected[number % len(pngs)])
            outcome = "answered" if gap <= TOLERANCE else "wrong"
        except Refused:
            outcome = "refused"
        except (ConnectionError, ValueError):  # no server, or no key file while it starts: one line each
            outcome = "unreachable"
        finally:
            with lock:
                counted.update(["sent", outcome])

    def keep_asking(number: int) -> None:
        client = Client(server.inference, "demo", key_file=server.key_file)
        while not done.is_set():
            ask(client, number)

    def burst() -> None:
        client = Client(server.inference, "demo", key_file=server.key_file)
        with ThreadPoolExecutor(BURST) as crowd:
            list(crowd.map(lambda number: ask(client, number), range(BURST)))

    faults: list[Callable[[], None]] = [
        lambda: _signal_worker(server, signal.SIGKILL),
        lambda: _freeze(server),
        burst,
        lambda: _without_log(server),
        server.renew_tokens,
        lambda: _kill_front_end(server),
    ]
    end = time.monotonic() + DURATION_S
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(NUM_CLIENTS)]
        try:
            number = 0
            while time.monotonic() < end:
                time.sleep(min(PAUSE_S, DURATION_S / (2 * len(faults))))
                # A fault may find what the last one left not up again yet.
                with suppress(ValueError, ConnectionError):
                    faults[number % len(faults)]()
                number += 1
        finally:
            done.set()
        for task in asking:
            task.result()


def _start(server: TorchServe) -> None:
    server.start()
    Management(server.management, key_file=server.key_file).register(
        "demo.mar", batch_size=8, response_timeout_s=RESPONSE_TIMEOUT_S
    )


def _signal_worker(server: TorchServe, number: signal.Signals) -> None:
    endpoint = Endpoint(server.management, "management", key_file=server.key_file)
    for worker in json.loads(endpoint.request("GET", "/models/demo"))[0]["workers"]:
        if worker["pid"] > 0:
            with suppress(ProcessLookupError):
                os.kill(worker["pid"], number)


def _freeze(server: TorchServe) -> None:
    """A handler that takes longer than it may."""
    _signal_worker(server, signal.SIGSTOP)
    time.sleep(FROZEN_S)
    _signal_worker(server, signal.SIGCONT)


def _without_log(server: TorchServe) -> None:
    away = server.request_log.with_name("away")
    server.request_log.rename(away)
    time.sleep(2)
    away.rename(server.request_log)


def _kill_front_end(server: TorchServe) -> None:
    """As the machine's memory does; whoever watches over the server starts it again."""
    os.killpg(server.process_group, signal.SIGKILL)
    server.stop()
    _start(server)
