"""What clients see while a server is ill-treated: sixteen ask without pause, and one fault follows the other.

Each request ends in the right answer, or in an error that says what happened. What does neither is lost. An answer
that does not say that the request log lacks it must stand there. A fault counts only where it is seen to have hit
something, and each must have struck.
"""

import itertools
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
from cadx.predicting.predictor import Predictor
from cadx.reading.images import encode_png, read_image
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
DISTURBED_S = 3.0
TOKEN_MINUTES = 2
TOLERANCE = 1e-5
WORKER_WAIT_S = 60.0


def claims() -> Iterator[dict[str, Any]]:
    """What became of all requests: none is lost, none answered wrongly, each answer is kept or says that it is not."""
    rng = np.random.default_rng(0)
    pngs = [encode_png(rng.integers(0, 255, (64, 64), np.uint8)) for _ in range(8)]
    with tempfile.TemporaryDirectory(prefix="cadx") as folder:
        bundle = write_demo_bundle(Path(folder) / "bundle", "radiograph")
        predictor = Predictor(bundle, "cpu")
        expected = [predictor.predict(read_image(png)).probabilities["finding"] for png in pngs]
        server = TorchServe(Path(folder) / "served", free_ports(), token_minutes=TOKEN_MINUTES)
        server.model_store.mkdir(parents=True)
        write_archive(server.model_store / "demo.mar", bundle, demo_release(bundle, "demo"))
        counted: Counter[str] = Counter()
        kept: list[str] = []
        try:
            _start(server)
            _run(server, pngs, expected, counted, kept)
        finally:
            server.stop()
        logged = {
            json.loads(line)["prediction_id"]
            for file in server.request_log.glob("*.jsonl")
            for line in file.read_text().splitlines()
        }
    for name in ("answered", "answered_unlogged", "refused", "unreachable"):
        yield claim(f"faults.{name}", counted[name], counted["sent"], "requests", goal=0)
    for name in sorted(counted):
        if name.startswith("fault "):
            yield claim(f"faults.{name[6:]}", counted[name], 1, "times")
    clear = ("answered", "answered_unlogged", "refused", "unreachable", "wrong")
    lost = counted["sent"] - sum(counted[name] for name in clear)
    for name, number in (
        ("wrong", counted["wrong"]),
        ("lost", lost),
        ("missing_in_the_log", len(set(kept) - logged)),
    ):
        yield claim(f"faults.{name}", number, counted["sent"], "requests", ratio=float(number == 0))


def _run(
    server: TorchServe, pngs: list[bytes], expected: list[float], counted: Counter[str], kept: list[str]
) -> None:
    done, lock = threading.Event(), threading.Lock()

    def ask(client: Client, number: int) -> None:
        outcome = "lost"
        try:
            answer = client.predict(pngs[number % len(pngs)])
            gap = abs(answer.probabilities["finding"] - expected[number % len(pngs)])
            if not gap <= TOLERANCE:
                outcome = "wrong"
            elif any("not in the request log" in warning for warning in answer.warnings):
                outcome = "answered_unlogged"
            else:
                outcome = "answered"
                kept.append(answer.prediction_id)
        except Refused as refusal:
            outcome = "wrong" if refusal.status == 200 else "refused"  # 200: an answer of another form
        except ConnectionError:
            outcome = "unreachable"
        except ValueError as error:
            if not str(error).startswith(f"{server.key_file}: "):  # which is gone while the server starts
                raise
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

    def queue_was_full() -> int:
        return (server.logs / "access_log.log").read_text(encoding="utf-8").count('" 503 ')

    def seen(fault: Callable[[], None], count: Callable[[], int]) -> int:
        """Let a fault strike; how much that made the count rise."""
        before = count()
        fault()
        return count() - before

    # Each says what it hit: workers, servers, or requests that met it.
    faults: dict[str, Callable[[], int]] = {
        "worker killed": lambda: _signal(_workers(server), signal.SIGKILL),
        "slow handler": lambda: _freeze(server),
        "full queue": lambda: seen(burst, queue_was_full),
        "full disk": lambda: seen(lambda: _full_disk(server), lambda: counted["answered_unlogged"]),
        "log folder gone": lambda: seen(lambda: _without_log(server), lambda: counted["answered_unlogged"]),
        "front end killed": lambda: seen(lambda: _kill_front_end(server), lambda: counted["unreachable"]),
        "expired token": lambda: seen(lambda: _expire(server), lambda: counted["refused"]),
    }
    counted.update({f"fault {name}": 0 for name in faults})
    end = time.monotonic() + DURATION_S
    with ThreadPoolExecutor(NUM_CLIENTS) as pool:
        asking = [pool.submit(keep_asking, number) for number in range(NUM_CLIENTS)]
        try:
            for name in itertools.cycle(faults):
                time.sleep(PAUSE_S)
                if time.monotonic() >= end:
                    break
                # A fault may find what the last one left not up again yet.
                with suppress(ValueError, ConnectionError):
                    server.renew_tokens()
                    hit = faults[name]()
                    assert hit > 0, f"{name}: it hit nothing"
                    counted[f"fault {name}"] += 1
        finally:
            done.set()
        for task in asking:
            task.result()


def _start(server: TorchServe) -> None:
    server.start()
    Management(server.management, key_file=server.key_file).register(
        "demo.mar", batch_size=8, response_timeout_s=RESPONSE_TIMEOUT_S
    )


def _workers(server: TorchServe) -> list[int]:
    """The process numbers of the workers that take requests; the fault before may have ended them: they are awaited."""
    endpoint = Endpoint(server.management, "management", key_file=server.key_file)
    deadline = time.monotonic() + WORKER_WAIT_S
    while time.monotonic() < deadline:
        workers = json.loads(endpoint.request("GET", "/models/demo"))[0]["workers"]
        ready = [worker["pid"] for worker in workers if worker["status"] == "READY"]
        # Of a worker that was just killed, the server says for a while that it is ready.
        if pids := [pid for pid in ready if Path(f"/proc/{pid}/exe").exists()]:
            return pids
        time.sleep(0.5)
    return []


def _signal(pids: list[int], number: signal.Signals) -> int:
    """How many of the processes were there to take a signal."""
    taken = 0
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            taken += 1
    return taken


def _freeze(server: TorchServe) -> int:
    """A handler that takes longer than it may."""
    pids = _workers(server)
    stopped = _signal(pids, signal.SIGSTOP)
    time.sleep(FROZEN_S)
    _signal(pids, signal.SIGCONT)
    return stopped


def _full_disk(server: TorchServe) -> None:
    """The workers' files lie on a device that is always full."""
    aside = server.request_log.with_name("aside")
    aside.mkdir(exist_ok=True)
    files = [*server.request_log.glob("*.jsonl")]
    for file in files:
        file.rename(aside / file.name)
        file.symlink_to("/dev/full")
    time.sleep(DISTURBED_S)
    for file in files:
        (aside / file.name).replace(file)


def _without_log(server: TorchServe) -> None:
    away = server.request_log.with_name("away")
    server.request_log.rename(away)
    time.sleep(DISTURBED_S)
    away.rename(server.request_log)


def _expire(server: TorchServe) -> None:
    """Nobody renews the tokens in time."""
    time.sleep(60 * TOKEN_MINUTES + DISTURBED_S)
    server.renew_tokens()


def _kill_front_end(server: TorchServe) -> None:
    """As the machine's memory does; whoever watches over the server starts it again."""
    os.killpg(server.process_group, signal.SIGKILL)
    server.stop()
    _start(server)
