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
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from cadx.drift import STATISTICS
from cadx.predicting import Predictor
from cadx.reading.images import encode_png, read_image
from cadx.types import Prediction, RawImage
from serving.archive import BUNDLE, RELEASE, parse_release

REQUEST_LOG = "CADX_REQUEST_LOG"
"""Environment variable: the folder of the request log; without it none is kept."""
EMBEDDING_DECIMALS = 5


class Request(NamedTuple):
    """What was sent: a file's bytes, None where they did not come as the body; and twice "true" or "false".

    `golden` says that it comes from a deployment and not from a clinic.
    """

    body: bytes | None
    attention: str = "false"
    golden: str = "false"


class Reply(NamedTuple):
    """What goes back: an HTTP status, and the answer or {"error": one line}."""

    status: int
    content: dict[str, Any]


class RequestLog:
    """A file of JSON lines, this process's own, in the folder of the request log.

    Golden samples go to another file, in the folder `golden` there: a watch must not take them for patients.

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
            path = path.parent / "golden" / path.name
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


class Answerer:
    """Answers requests from an unpacked archive.

    Args:
        folder: where the archive was unpacked.
        device: a torch device.
        log: where answers are recorded; None keeps no record.

    Raises:
        ValueError: if the bundle is damaged, incomplete, or another than release.json names.
    """

    def __init__(self, folder: Path, *, device: str = "cpu", log: RequestLog | None = None) -> None:
        self.release = parse_release((folder / RELEASE).read_bytes(), RELEASE)
        self._predictor = Predictor(folder / BUNDLE, device)
        if (digest := self._predictor.bundle.digest) != self.release.bundle:
            raise ValueError(f"{BUNDLE}: its digest is {digest}, but {RELEASE} names {self.release.bundle}")
        self._log = log

    def answer(self, requests: Sequence[Request]) -> list[Reply]:
        """The reply to each request of a batch.

        Status 400 is for what was sent, 500 for what went wrong here.
        """
        replies: dict[int, Reply] = {}
        images: dict[int, RawImage] = {}
        decode_ms: dict[int, float] = {}
        for i, request in enumerate(requests):
            started = time.perf_counter()
            try:
                images[i] = _read(request)
            except Exception as error:
                replies[i] = _refusal(error)
            decode_ms[i] = _ms_since(started)
        # Apart, since laying attention over an image takes its time and few ask for it.
        for attention in (False, True):
            group = [i for i in images if (requests[i].attention == "true") is attention]
            started = time.perf_counter()
            predicted = self._predict([images[i] for i in group], attention)
            predict_ms = _ms_since(started)
            for i, prediction in zip(group, predicted, strict=True):
                if isinstance(prediction, Exception):
                    replies[i] = _refusal(prediction)
                    continue
                try:
                    replies[i] = self._reply(requests[i], images[i], prediction, decode_ms[i], predict_ms)
                except Exception as error:
                    replies[i] = _fault(error)
        return [replies[i] for i in range(len(requests))]

    def _predict(self, images: list[RawImage], attention: bool) -> list[Prediction | Exception]:
        """A prediction for each image, or why there is none."""
        try:
            return [*self._predictor.predict_many(images, attention=attention)]
        except Exception as error:
            if len(images) == 1:
                return [error]
            # One of them spoilt it for all: each on its own.
            return [outcome for image in images for outcome in self._predict([image], attention)]

    def _reply(
        self, request: Request, image: RawImage, prediction: Prediction, decode_ms: float, predict_ms: float
    ) -> Reply:
        started = time.perf_counter()
        operating_point = self._predictor.bundle.manifest.operating_point
        assert operating_point is not None, "Predictor takes complete bundles only"
        release = self.release
        answer: dict[str, Any] = {
            "prediction_id": uuid.uuid4().hex,
            "model": {"name": release.name, "version": release.version, "bundle": release.bundle},
            "probabilities": prediction.probabilities,
            "decision": prediction.decision,
            "operating_point": {
                "thresholds": operating_point.thresholds,
                "target_metric": operating_point.target_metric,
                "target_value": operating_point.target_value,
            },
            "warnings": [*prediction.warnings],
        }
        if prediction.attention is not None:
            levels = np.rint(prediction.attention * 255).astype(np.uint8)
            answer["attention_png"] = base64.b64encode(encode_png(levels)).decode()
        answer["timing_ms"] = {
            "decode": round(decode_ms, 1),
            "predict": round(predict_ms, 1),
            "total": round(decode_ms + predict_ms + _ms_since(started), 1),
        }
        if self._log:
            try:
                record = self._record(answer, image, prediction)
                self._log.append(record, golden=request.golden == "true")
            except OSError as error:
                # An answer in the clinic's hand is worth more than its record; the gap is told on both sides.
                reason = error.strerror or str(error)
                answer["warnings"].append(
                    f"this answer is not in the request log ({reason}): tell the operator"
                )
                print(f"{self._log.path}: an answer is not in the request log ({reason})", file=sys.stderr)
        return Reply(200, answer)

    def _record(self, answer: dict[str, Any], image: RawImage, prediction: Prediction) -> dict[str, Any]:
        return {
            "schema_version": 1,
            "prediction_id": answer["prediction_id"],
            "time": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "model": self.release.name,
            "version": self.release.version,
            "bundle": self.release.bundle,
            "site": image.attributes.get("site", ""),
            "scanner": image.attributes.get("scanner", ""),
            "statistics": {name: prediction.statistics[name] for name in STATISTICS},
            "embedding": [round(value, EMBEDDING_DECIMALS) for value in prediction.embedding.tolist()],
            "probabilities": prediction.probabilities,
            "decision": prediction.decision,
            "warnings": answer["warnings"],
            "timing_ms": answer["timing_ms"],
        }


def _read(request: Request) -> RawImage:
    if request.body is None:
        raise ValueError(
            "no image in the body; send the file's bytes with Content-Type: application/octet-stream"
        )
    for name, value in (("attention", request.attention), ("golden", request.golden)):
        if value not in ("true", "false"):
            raise ValueError(f"{name} is neither true nor false; send the header as `{name.title()}: true`")
    return read_image(request.body)


def _refusal(error: Exception) -> Reply:
    """The reply where reading or predicting failed; both refuse what was sent by ValueError."""
    return Reply(400, {"error": str(error)}) if isinstance(error, ValueError) else _fault(error)


def _fault(error: Exception) -> Reply:
    """The reply for what went wrong here."""
    # By kind and place: the error's own text may repeat what the file says.
    what = type(error).__name__
    print(f"{what}\n{''.join(traceback.format_tb(error.__traceback__))}", file=sys.stderr, flush=True)
    return Reply(500, {"error": f"the image could not be answered ({what}); the server's log says where"})


def _ms_since(started: float) -> float:
    return 1000 * (time.perf_counter() - started)
