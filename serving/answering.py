"""From a request's bytes to the answer that goes back, and the line that is kept of it.

Invariants: of an image and of a patient nothing is kept or repeated, in no answer, error or log; a request
that cannot be answered does not touch the others of its batch; what was answered is in the request log, or
the answer says that it is not.
"""

import base64
import json
import os
import sys
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
from torch import nn

from cadx.drift import STATISTICS
from cadx.predicting.predictor import Predictor
from cadx.reading.images import encode_png
from cadx.request_log import UNWATCHED
from serving.archive import BUNDLE, RELEASE, parse_release
from serving.client import SCHEMA_VERSION

REQUEST_LOG = "CADX_REQUEST_LOG"
"""Environment variable: the folder of the request log; without it none is kept."""
EMBEDDING_DECIMALS = 5


class Request(NamedTuple):
    """What was sent: the bytes of its body, None where they did not come as that; and twice "true" or "false".

    `golden` says that it comes from a deployment and not from a clinic.
    """

    body: bytes | None
    attention: str = "false"
    golden: str = "false"


class Reply(NamedTuple):
    """What goes back: an HTTP status, and the answer or {"error": one line}."""

    status: int
    content: dict[str, Any]


class Outcome(NamedTuple):
    """What the model says of one sample.

    Attributes:
        answer: fields of the answer, `decision` among them.
        kept: what the request log keeps beside those fields that every line has.
        statistics: image statistics, for the log.
        embedding: F float32, for the log; empty where the model gives none.
        warnings: why the answer deserves care.
    """

    answer: dict[str, Any]
    kept: dict[str, Any]
    statistics: dict[str, float]
    embedding: np.ndarray
    warnings: tuple[str, ...]


class RequestLog:
    """A file of JSON lines, this process's own, in the folder of the request log.

    Golden samples go to another file, in the folder `unwatched` there: a watch must not take them for patients.

    Raises:
        OSError: if the folder cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # With the time, since process numbers come again.
        self.path = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}.jsonl"

    @classmethod
    def from_environment(cls) -> Self | None:
        """A log in the folder that `CADX_REQUEST_LOG` names; None if it names none."""
        if folder := os.environ.get(REQUEST_LOG):
            return cls(Path(folder))
        print(f"{REQUEST_LOG} is not set: no request log is kept", file=sys.stderr)
        return None

    def append(self, record: Mapping[str, Any], *, golden: bool = False) -> None:
        """Append one record as one line, whole or not at all.

        Raises:
            OSError: if it could not be written.
        """
        line = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        path = self.path
        if golden:
            path = path.parent / UNWATCHED / path.name
            path.parent.mkdir(exist_ok=True)
        # Opened anew each time: the file may be moved away at any moment.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            written = os.write(file, line)
            if written < len(line):
                os.ftruncate(file, os.fstat(file).st_size - written)
                raise OSError("no space for a whole line")
        finally:
            os.close(file)


class Answerer(ABC):
    """Answers requests of one kind from an unpacked archive.

    Args:
        folder: where the archive was unpacked.
        device: a torch device.
        log: where answers are recorded; None keeps no record.

    Attributes:
        kind: of the requests, as answers name it.

    Raises:
        ValueError: if the bundle is damaged, incomplete, or another than release.json names.
    """

    kind: ClassVar[str]

    def __init__(self, folder: Path, *, device: str = "cpu", log: RequestLog | None = None) -> None:
        self.release = parse_release((folder / RELEASE).read_bytes(), RELEASE)
        self._predictor = Predictor(folder / BUNDLE, device)
        if (digest := self._predictor.bundle.digest) != self.release.bundle:
            raise ValueError(f"{BUNDLE}: its digest is {digest}, but {RELEASE} names {self.release.bundle}")
        operating_point = self._predictor.bundle.manifest.operating_point
        if operating_point is None:
            raise ValueError(f"{BUNDLE}: no operating point yet; run `cadx calibrate` first")
        self._shares_here = self._predictor.bundle.shares_at(self.release.prevalence)
        self._operating_point = operating_point
        decision = self.release.decision
        self._objections = () if decision.promote else (f"not released: {'; '.join(decision.reasons)}",)
        self._log = log
        self._networks_clock = _NetworksClock(self._predictor.networks)
        # Decoders let go of the interpreter: files of a batch are decoded side by side.
        self._threads = ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="decode")

    @abstractmethod
    def read(self, body: bytes, *, golden: bool) -> Any:
        """The raw sample that a request's body holds, or names.

        Raises:
            ValueError: in one line that repeats nothing of it.
        """

    @abstractmethod
    def predict(self, raws: Sequence[Any], *, attention: bool) -> list[Outcome]:
        """What the model says of raw samples.

        Raises:
            ValueError: for the first that it refuses.
        """

    def attributes(self, raw: Any) -> Mapping[str, Any]:
        """What the file says of site and scanner."""
        attributes: Mapping[str, Any] = raw.attributes
        return attributes

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """The reply to each request of a batch.

        Status 400 is for what was sent, 413 for what is too large for this machine, 500 for what went wrong here.
        """
        started = time.perf_counter()
        several: Callable[..., Iterable[tuple[Any, float]]] = self._threads.map if len(requests) > 1 else map
        decoded = list(several(self._decode, requests))
        raws = {i: raw for i, (raw, _) in enumerate(decoded) if not isinstance(raw, Exception)}
        replies = {i: _refusal(raw) for i, (raw, _) in enumerate(decoded) if i not in raws}
        # Apart, since laying attention over an image takes its time and few ask for it.
        for attention in (False, True):
            group = [i for i in raws if (requests[i].attention == "true") is attention]
            begun, infer_before_ms = time.perf_counter(), self._networks_clock.ms
            outcomes = self._predict([raws[i] for i in group], attention)
            infer_ms = self._networks_clock.ms - infer_before_ms
            preprocess_ms = _ms_since(begun) - infer_ms
            for i, outcome in zip(group, outcomes, strict=True):
                if isinstance(outcome, Exception):
                    replies[i] = _refusal(outcome)
                    continue
                timing_ms = {"decode": decoded[i][1], "preprocess": preprocess_ms, "infer": infer_ms}
                timing_ms["total"] = _ms_since(started)
                try:
                    replies[i] = self._reply(requests[i], raws[i], outcome, timing_ms)
                except Exception as error:
                    replies[i] = _fault(error)
        return [replies[i] for i in range(len(requests))]

    def _decode(self, request: Request) -> tuple[Any, float]:
        """The raw sample, or why there is none; and how long that took, in ms."""
        started = time.perf_counter()
        try:
            for name, value in (("attention", request.attention), ("golden", request.golden)):
                if value not in ("true", "false"):
                    raise ValueError(
                        f"{name} is neither true nor false; send the header as `{name.title()}: true`"
                    )
            if request.body is None:
                raise ValueError(
                    f"no {self.kind} in the body; send it with Content-Type: application/octet-stream"
                )
            raw: Any = self.read(request.body, golden=request.golden == "true")
        except Exception as error:
            raw = error
        return raw, _ms_since(started)

    def _predict(self, raws: list[Any], attention: bool) -> Sequence[Outcome | Exception]:
        """What the model says of each sample, or why it does not."""
        if not raws:
            return []
        try:
            return self.predict(raws, attention=attention)
        except Exception as error:
            if len(raws) == 1:
                return [error]
            # One of them spoilt it for all: each on its own.
            return [outcome for raw in raws for outcome in self._predict([raw], attention)]

    def _reply(self, request: Request, raw: Any, outcome: Outcome, timing_ms: dict[str, float]) -> Reply:
        release, point = self.release, self._operating_point
        answer: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "prediction_id": uuid.uuid4().hex,
            "model": {"name": release.name, "version": release.version, "bundle": release.bundle},
            **outcome.answer,
            "operating_point": {
                "thresholds": point.thresholds,
                "target_metric": point.target_metric,
                "target_value": point.target_value,
            },
            "warnings": [*self._objections, *outcome.warnings],
            "timing_ms": {name: round(value, 1) for name, value in timing_ms.items()},
        }
        if self._log:
            try:
                self._log.append(self._record(answer, raw, outcome), golden=request.golden == "true")
            except OSError as error:
                # An answer in the clinic's hand is worth more than its record; the gap is told on both sides.
                reason = error.strerror or str(error)
                answer["warnings"].append(
                    f"this answer is not in the request log ({reason}): tell the operator"
                )
                print(f"{self._log.path}: an answer is not in the request log ({reason})", file=sys.stderr)
        return Reply(200, answer)

    def _record(self, answer: Mapping[str, Any], raw: Any, outcome: Outcome) -> dict[str, Any]:
        attributes = self.attributes(raw)
        return {
            "schema_version": 1,
            "prediction_id": answer["prediction_id"],
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "model": self.release.name,
            "version": self.release.version,
            "bundle": self.release.bundle,
            "site": attributes.get("site", ""),
            "scanner": attributes.get("scanner", ""),
            "statistics": {name: outcome.statistics[name] for name in STATISTICS},
            "embedding": np.round(outcome.embedding.astype(np.float64), EMBEDDING_DECIMALS).tolist(),
            "decision": answer["decision"],
            **outcome.kept,
            "warnings": answer["warnings"],
            "timing_ms": answer["timing_ms"],
        }


class _NetworksClock:
    """How long the networks have been at work, in ms since the start.

    It counts a network, and the parts right below it: a bag's encoder is asked by itself.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        self.ms = 0.0
        self._depth = 0
        self._started = 0.0
        for network in networks:
            for part in (network, *network.children()):
                part.register_forward_pre_hook(self._enter)
                part.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        if self._depth == 0:
            self._started = time.perf_counter()
        self._depth += 1

    def _leave(self, *_: Any) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.ms += _ms_since(self._started)


def png_text(pixels: np.ndarray) -> str:
    """A picture, H W or H W 3 uint8, as base64 of a PNG file."""
    return base64.b64encode(encode_png(pixels)).decode()


def _refusal(error: Exception) -> Reply:
    """The reply where reading or predicting failed; both refuse what was sent by ValueError."""
    if _ran_out_of_memory(error):
        return Reply(413, {"error": "too large for the memory of this server; send a smaller one"})
    return Reply(400, {"error": str(error)}) if isinstance(error, ValueError) else _fault(error)


def _ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was lacking: readers turn every error into a refusal, and the error itself stands behind it."""
    while error is not None and not isinstance(error, MemoryError):
        error = error.__context__
    return error is not None


def _fault(error: Exception) -> Reply:
    """The reply for what went wrong here."""
    # By kind and place: the error's own text may repeat what the file says.
    what = type(error).__name__
    print(f"{what}\n{''.join(traceback.format_tb(error.__traceback__))}", file=sys.stderr, flush=True)
    return Reply(500, {"error": f"it could not be answered ({what}); the server's log says where"})


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
