"""Ask a running server about images, from any program; needs neither torch nor the models.

For example

    client = Client("http://127.0.0.1:8080", "phantom-xray", key_file=Path("served/key_file.json"))
    answer = client.predict(Path("image.dcm"))
    print(answer.decision, answer.probabilities, answer.warnings)
"""

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import urllib3
from pydantic import Base64Bytes, BaseModel, ConfigDict, ValidationError

CONNECT_TIMEOUT_S = 5.0
READ_TIMEOUT_S = 90.0
MAX_CONNECTIONS = 32
_RETRIES = {
    # An image may be asked about twice without harm. 503 is a full queue, 507 a worker that is starting anew,
    # which takes it some seconds: we wait about 0, 1, 2 and 4.
    "inference": urllib3.Retry(
        total=5,
        connect=2,
        read=1,
        status=4,
        other=0,
        redirect=False,
        allowed_methods=None,
        status_forcelist=(503, 507),
        raise_on_status=False,
        backoff_factor=0.5,
        backoff_jitter=0.25,
    ),
    # A registration that is sent again would meet itself.
    "management": urllib3.Retry(
        total=2, connect=2, read=0, status=0, other=0, redirect=False, backoff_factor=0.5
    ),
}
# TorchServe puts new tokens into use a moment before they stand in the key file.
_WAITS_S = (0.0, 0.1, 0.5)


class Refused(ValueError):
    """The server answered, but not with what was asked for.

    Attributes:
        status: of HTTP.
        reason: the server's own words.
    """

    def __init__(self, address: str, status: int, reason: str) -> None:
        super().__init__(f"{address}: refused ({status}): {reason}")
        self.status = status
        self.reason = reason


class _Record(BaseModel):
    # Unlike elsewhere, unknown fields are let pass: the server may be newer than its client.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Model(_Record):
    """Which model answered; `bundle` is the digest of everything that decides its answers."""

    name: str
    version: str
    bundle: str


class OperatingPoint(_Record):
    """Where a probability becomes a decision: class -> threshold, and what it was chosen to reach."""

    thresholds: dict[str, float]
    target_metric: str | None
    target_value: float | None


class Answer(_Record):
    """What the server says of one image.

    Attributes:
        prediction_id: the name of this answer in the server's request log.
        probabilities: class -> calibrated probability in 0..1.
        decision: the class, or for a multilabel model the classes, at the operating point.
        warnings: why this answer deserves care, in words.
        timing_ms: decode, predict and total, in the server.
        attention_png: where the model looked, a gray PNG in the image's own size; None unless asked for.
    """

    prediction_id: str
    model: Model
    probabilities: dict[str, float]
    decision: str | tuple[str, ...]
    operating_point: OperatingPoint
    warnings: tuple[str, ...]
    timing_ms: dict[str, float]
    attention_png: Base64Bytes | None = None


class Client:
    """Asks one model of one server. It may be shared among threads.

    Args:
        address: the server's inference address, such as http://127.0.0.1:8080.
        model: the model's name there.
        token: the inference token; or else
        key_file: where the server keeps its tokens. It is read again whenever a token has ended.
    """

    def __init__(
        self, address: str, model: str, *, token: str | None = None, key_file: Path | None = None
    ) -> None:
        self._endpoint = Endpoint(address, "inference", token=token, key_file=key_file)
        self._model = model

    def predict(
        self,
        image: bytes | Path,
        *,
        attention: bool = False,
        version: str | None = None,
        golden: bool = False,
    ) -> Answer:
        """The answer for one DICOM, PNG or JPEG file, by the default version of the model or another.

        `golden` marks an image whose answer is known already: it stays out of the log that is watched.

        Raises:
            Refused: with the server's reason; status 400 is for what was sent.
            ConnectionError: if the server cannot be reached.
            OSError: if the file cannot be read.
        """
        data = image.read_bytes() if isinstance(image, Path) else image
        path = f"/predictions/{quote(self._model, safe='')}"
        if version is not None:
            path += f"/{quote(version, safe='')}"
        headers = {"Content-Type": "application/octet-stream"}
        if attention:
            headers["Attention"] = "true"
        if golden:
            headers["Golden"] = "true"
        content = self._endpoint.request("POST", path, body=data, headers=headers)
        try:
            return Answer.model_validate_json(content)
        except ValidationError:
            raise Refused(
                self._endpoint.address, 200, "an answer of another form; is it this server?"
            ) from None

    def predict_many(
        self,
        images: Iterable[bytes | Path],
        *,
        attention: bool = False,
        version: str | None = None,
        concurrency: int = 4,
    ) -> list[Answer | Refused]:
        """For each image, in order, its answer or the server's refusal of it.

        Raises:
            ConnectionError: if the server cannot be reached.
            OSError: if a file cannot be read.
        """

        def one(image: bytes | Path) -> Answer | Refused:
            try:
                return self.predict(image, attention=attention, version=version)
            except Refused as refusal:
                return refusal

        with ThreadPoolExecutor(concurrency) as pool:
            return list(pool.map(one, images))


class Endpoint:
    """One address of the server: its connections, its token, its errors.

    Args:
        address: protocol, host and port.
        kind: whose token is needed.
        token: the token; or else
        key_file: where it stands.
    """

    def __init__(
        self,
        address: str,
        kind: Literal["inference", "management"],
        *,
        token: str | None = None,
        key_file: Path | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self.address = address.rstrip("/")
        self._kind = kind
        self._token = token
        self._key_file = key_file
        self._pool = urllib3.PoolManager(
            maxsize=MAX_CONNECTIONS,
            retries=_RETRIES[kind],
            timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_timeout_s),
        )

    def request(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        """The body of the answer to a request.

        Raises:
            Refused: if its status is no success.
            ConnectionError: one line, if there is no answer.
            ValueError: if the key file holds no token.
        """
        response = self._send(method, path, body, headers)
        for wait_s in _WAITS_S:
            if self._key_file and _is_token_refused(response):
                self._token = None
            elif not _is_worker_lost(response):
                break
            time.sleep(wait_s)
            response = self._send(method, path, body, headers)
        if not 200 <= response.status < 300:
            raise Refused(self.address, response.status, _reason(response))
        return response.data

    def _send(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str] | None
    ) -> urllib3.BaseHTTPResponse:
        token = self._token
        if token is None and self._key_file is not None:
            token = self._token = _read_token(self._key_file, self._kind)
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            return self._pool.request(
                method, self.address + path, body=body, headers={**(headers or {}), **authorization}
            )
        except urllib3.exceptions.HTTPError as error:
            cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
            what = type(cause or error).__name__
            raise ConnectionError(f"{self.address}: no answer ({what}); is the server running?") from None


def _read_token(key_file: Path, kind: str) -> str:
    try:
        return str(json.loads(key_file.read_text(encoding="utf-8"))[kind]["key"])
    except FileNotFoundError:
        raise ValueError(f"{key_file}: no key file; the server has it while it runs") from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{key_file}: holds no {kind} token; name the server's key_file.json") from None


def _is_token_refused(response: urllib3.BaseHTTPResponse) -> bool:
    return response.status in (400, 401) and b'"InvalidKeyException"' in response.data


def _is_worker_lost(response: urllib3.BaseHTTPResponse) -> bool:
    """Whether the worker died over this request; the next one waits for the worker that takes its place."""
    return response.status == 500 and b'"Worker died."' in response.data


def _reason(response: urllib3.BaseHTTPResponse) -> str:
    """The server's words: the handler's `error`, or TorchServe's `message`, in one line."""
    try:
        content = json.loads(response.data)
        words = content.get("error") or content["message"]
    except (ValueError, KeyError, AttributeError):
        words = response.reason or "no reason given"
    return " ".join(str(words).split())
