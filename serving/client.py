"""Ask a running server about images, volumes and slides, from any program; needs neither torch nor the models.

For example

    client = Client("http://127.0.0.1:8080", "phantom-xray", key_file=Path("served/key_file.json"))
    answer = client.predict(Path("image.dcm"))
    print(answer.decision, answer.probabilities, answer.warnings)

The records below are the form of an answer: docs/answer.schema.json is made from them (`python -m serving.schema`).
"""

import io
import json
import re
import ssl
import time
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import quote

import urllib3
from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, ValidationError

SCHEMA_VERSION = 1
"""Of an answer's form. A new field leaves it; one that goes, or means something else, raises it."""
MAX_REQUEST_BYTES = 256 << 20
"""A CT series, zipped, or a packed NIfTI volume: the server takes no more."""
CONNECT_TIMEOUT_S = 5.0
RESPONSE_TIMEOUTS_S = {"image": 60, "volume": 300, "slide": 1800}
"""Kind of sample -> how long the server waits for an answer before it starts the worker anew."""
_LONGER_S = 30.0
"""Than the server, a client waits."""
READ_TIMEOUT_S = RESPONSE_TIMEOUTS_S["image"] + _LONGER_S
MAX_CONNECTIONS = 32


class _Retry(urllib3.Retry):
    """Tries again, but not what no answer came to in time: whether that helps is for `Client` to say."""

    def increment(self, *args: Any, **kwargs: Any) -> "_Retry":
        if isinstance(error := kwargs.get("error"), urllib3.exceptions.ReadTimeoutError):
            raise error
        return super().increment(*args, **kwargs)


_RETRIES = {
    # An image may be asked about twice without harm. 503 is a full queue, 507 a worker that is starting anew,
    # which takes it some seconds: we wait about 0, 1, 2 and 4. Proxies say 429 of too many requests, and 502 of a
    # server that is starting anew; not 504, since what has taken too long would take as long again.
    "inference": _Retry(
        total=5,
        connect=2,
        read=1,
        status=4,
        other=0,
        redirect=False,
        allowed_methods=None,
        status_forcelist=(429, 502, 503, 507),
        raise_on_status=False,
        respect_retry_after_header=False,  # it may name hours, of a 413 too, and a clinician waits for the answer
        backoff_factor=0.5,
        backoff_jitter=0.25,
    ),
    # A registration that is sent again would meet itself.
    "management": urllib3.Retry(
        total=2,
        connect=2,
        read=0,
        status=0,
        other=0,
        redirect=False,
        respect_retry_after_header=False,
        backoff_factor=0.5,
    ),
}
# TorchServe puts new tokens into use a moment before they stand in the key file, and writes it in its place.
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


class Unanswered(ConnectionError):
    """The server took the request and gave no answer in time."""


class _Record(BaseModel):
    # Unlike elsewhere, unknown fields are let pass: the server may be newer than its client.
    model_config = ConfigDict(frozen=True, extra="ignore")


class Model(_Record):
    """Which model answered; `bundle` is the digest of everything that decides its answers."""

    name: str
    version: str
    bundle: str


class OperatingPoint(_Record):
    """Where a probability, or a box's score, becomes a decision: class -> threshold; what it was chosen to reach."""

    thresholds: dict[str, float]
    target_metric: str | None
    target_value: float | None


class Timing(_Record):
    """Milliseconds in the worker.

    Attributes:
        decode: of this request: reading the file; of a slide, its thumbnail and tissue.
        preprocess: of the batch that it was answered in: preparing the networks' input, and image statistics.
        infer: of the batch: the networks.
        total: from the worker's receipt to the answer. Waiting in the queue comes before: see the server's /metrics.
    """

    decode: float
    preprocess: float
    infer: float
    total: float


class _Answer(_Record):
    schema_version: Literal[1] = Field(description="of this form")
    prediction_id: str = Field(description="the name of this answer in the server's request log")
    model: Model
    operating_point: OperatingPoint
    warnings: tuple[str, ...] = Field(description="why this answer deserves care, in words; empty is good")
    timing_ms: Timing


class AtPrevalence(_Record):
    """Probabilities for a place where the classes have other shares than in the calibration split."""

    prevalence: dict[str, float] = Field(description="class -> its share where the model is used")
    probabilities: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        description="class -> probability there"
    )


class _Labelled(_Answer):
    probabilities: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        description="class -> calibrated probability"
    )
    decision: str | tuple[str, ...] = Field(
        description="the class, or for a multilabel model the classes, at the operating point"
    )
    prediction_set: tuple[str, ...] | None = Field(
        description="the classes that cannot be excluded at the model's nominal coverage; null where it has none",
    )
    refer: bool = Field(description="the model abstains: let a person decide")
    at_prevalence: AtPrevalence | None = Field(
        default=None,
        description="the probabilities where the model is used, if its release declares the classes' shares there; "
        "decision and prediction set stay those that were evaluated",
    )


class Answer(_Labelled):
    """What the server says of one image."""

    kind: Literal["radiograph"]
    attention_png: Base64Bytes | None = Field(
        default=None,
        description="where the model looked: a gray PNG in the image's own size; only if asked for",
    )


class VolumeAttention(_Record):
    """Where the model looked in a volume."""

    slice: int = Field(description="the axial slice with most attention, counted from the most inferior, 0")
    slice_png: Base64Bytes = Field(
        description="that slice with the attention laid over it; anterior above, the patient's right on the left"
    )
    nifti: Base64Bytes | None = Field(
        description="the map as .nii.gz, 0..255, in the volume's own place: lay it over the original in any viewer; "
        "null where it is too large to be sent"
    )


class VolumeAnswer(_Labelled):
    """What the server says of one volume."""

    kind: Literal["volume"]
    attention: VolumeAttention | None = Field(default=None, description="only if asked for")


class Tile(_Record):
    """A tile of a slide: its top left corner and side in pixels of the scanned resolution, and its attention."""

    x_px: int
    y_px: int
    side_px: int
    weight: float = Field(description="share of the slide's attention, 0..1")


class SlideAttention(_Record):
    """Where the model looked on a slide."""

    thumbnail_png: Base64Bytes = Field(description="the slide's thumbnail with the attention laid over it")
    num_tiles: int = Field(description="tiles with tissue that the answer rests on")
    tiles: tuple[Tile, ...] = Field(description="those with most attention, by falling weight")


class SlideAnswer(_Labelled):
    """What the server says of one slide."""

    kind: Literal["slide"]
    attention: SlideAttention | None = Field(default=None, description="only if asked for")


class Box(_Record):
    """One finding."""

    class_: str = Field(alias="class")
    score: Annotated[float, Field(ge=0, le=1)]
    box_xyxy: tuple[float, float, float, float] = Field(
        description="x0, y0, x1, y1 in stored pixels, 0-based, half-open"
    )
    called: bool = Field(description="its score reaches the class's threshold")


class DetectionAnswer(_Answer):
    """What a detector says of one image."""

    kind: Literal["detection"]
    boxes: tuple[Box, ...] = Field(description="by falling score; those below the threshold too")
    decision: tuple[str, ...] = Field(description="the classes of which a box is called")
    prediction_set: tuple[str, ...] | None = Field(
        default=None, description="as of other kinds; null, as a box's score is no probability"
    )
    refer: bool = Field(default=False, description="as of other kinds; false, as no detector abstains")


AnyAnswer = Annotated[Answer | VolumeAnswer | SlideAnswer | DetectionAnswer, Field(discriminator="kind")]
Token = str | Callable[[], str]
_AnswerT = TypeVar("_AnswerT", bound=_Answer)


class Client:
    """Asks one model of one server. It may be shared among threads.

    Args:
        address: the server's inference address, such as http://127.0.0.1:8080.
        model: the model's name there.
        token: the inference token, or a function that fetches the present one; or else
        key_file: where the server keeps its tokens. It is read again whenever a token has ended.
        ca_file: certificates that are trusted at an https address; None for those of this machine.
        response_timeout_s: how long the server waits for an answer, if that was declared (`deploy.response_timeout_s`);
            None: RESPONSE_TIMEOUTS_S.
    """

    def __init__(
        self,
        address: str,
        model: str,
        *,
        token: Token | None = None,
        key_file: Path | None = None,
        ca_file: Path | None = None,
        response_timeout_s: float | None = None,
    ) -> None:
        self._endpoint = Endpoint(address, "inference", token=token, key_file=key_file, ca_file=ca_file)
        self._model = model
        self._response_timeout_s = response_timeout_s

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
            ConnectionError: if the server cannot be reached, or has not answered in time twice.
            OSError: if the file cannot be read.
        """
        return self._ask(Answer, _content(image), attention, version, golden, "image")

    def predict_volume(
        self,
        volume: bytes | Path,
        *,
        attention: bool = False,
        version: str | None = None,
        golden: bool = False,
    ) -> VolumeAnswer:
        """The answer for one volume: a NIfTI file, a zip of one DICOM series, or the folder of one.

        Raises:
            Refused, ConnectionError, OSError: as `predict`.
        """
        data = _zipped(volume) if isinstance(volume, Path) and volume.is_dir() else _content(volume)
        return self._ask(VolumeAnswer, data, attention, version, golden, "volume")

    def predict_slide(
        self, path: str, *, attention: bool = False, version: str | None = None, golden: bool = False
    ) -> SlideAnswer:
        """The answer for the slide at `path` on the server, relative to its slide root.

        Raises:
            Refused, ConnectionError: as `predict`.
        """
        asked = json.dumps({"path": path}).encode()
        return self._ask(SlideAnswer, asked, attention, version, golden, "slide")

    def detect(
        self, image: bytes | Path, *, version: str | None = None, golden: bool = False
    ) -> DetectionAnswer:
        """The boxes in one DICOM, PNG or JPEG file.

        Raises:
            Refused, ConnectionError, OSError: as `predict`.
        """
        return self._ask(DetectionAnswer, _content(image), False, version, golden, "image")

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

    def _ask(
        self,
        form: type[_AnswerT],
        body: bytes,
        attention: bool,
        version: str | None,
        golden: bool,
        kind: Literal["image", "volume", "slide"],
    ) -> _AnswerT:
        path = f"/predictions/{quote(self._model, safe='')}"
        if version is not None:
            path += f"/{quote(version, safe='')}"
        headers = {"Content-Type": "application/octet-stream"}
        if attention:
            headers["Attention"] = "true"
        if golden:
            headers["Golden"] = "true"
        patience_s = self._response_timeout_s or RESPONSE_TIMEOUTS_S[kind]
        ask = partial(
            self._endpoint.request,
            *("POST", path),
            body=body,
            headers=headers,
            read_timeout_s=patience_s + _LONGER_S,
        )
        try:
            content = ask()
        except Unanswered:
            # TorchServe forgets those that it is collecting into a batch in the moment when their worker dies, and
            # tells them nothing. Volumes and slides are no batches: what takes them too long would do so again.
            if kind != "image":
                raise
            content = ask()
        try:
            return form.model_validate_json(content)
        except ValidationError:
            raise Refused(
                self._endpoint.address,
                200,
                f"an answer of another form than {form.__name__}; is it this server, and a model of this kind?",
            ) from None


class Endpoint:
    """One address of the server: its connections, its token, its errors.

    Args:
        address: protocol, host and port.
        kind: whose token is needed.
        token: the token, or a function that fetches the present one; or else
        key_file: where it stands.
        ca_file: certificates that are trusted at an https address; None for those of this machine.

    Raises:
        ValueError: if `token` is text that is no token, without that text; or as `require_certificates`.
    """

    def __init__(
        self,
        address: str,
        kind: Literal["inference", "management"],
        *,
        token: Token | None = None,
        key_file: Path | None = None,
        ca_file: Path | None = None,
    ) -> None:
        self.address = address.rstrip("/")
        self._token = _sendable(token) if isinstance(token, str) else None
        self._fetch_token = token if callable(token) else None
        if key_file is not None and token is None:
            self._fetch_token = partial(_read_token, key_file, kind)
        if ca_file is not None:
            require_certificates(ca_file)
        self._pool = urllib3.PoolManager(
            maxsize=MAX_CONNECTIONS,
            retries=_RETRIES[kind],
            ca_certs=None if ca_file is None else str(ca_file),
        )

    def request(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> bytes:
        """The body of the answer to a request.

        Raises:
            Refused: if its status is no success.
            ConnectionError: one line, if there is no answer; Unanswered, if it did not come in time.
            ValueError: if the key file holds no token, or what was fetched is none; without that text.
        """
        # The server hangs up on more than it takes, and its answer may be lost on the way.
        if body is not None and len(body) > MAX_REQUEST_BYTES:
            raise Refused(
                self.address,
                413,
                f"more than {MAX_REQUEST_BYTES >> 20} MiB; send one image, packed without loss",
            )
        response = self._send(method, path, body, headers, read_timeout_s)
        for wait_s in _WAITS_S:
            if self._fetch_token and _is_token_refused(response):
                self._token = None
            elif not _is_worker_lost(response):
                break
            time.sleep(wait_s)
            response = self._send(method, path, body, headers, read_timeout_s)
        if not 200 <= response.status < 300:
            raise Refused(self.address, response.status, _reason(response))
        return response.data

    def _send(
        self,
        method: str,
        path: str,
        body: bytes | None,
        headers: Mapping[str, str] | None,
        read_timeout_s: float,
    ) -> urllib3.BaseHTTPResponse:
        token = self._token
        if token is None and self._fetch_token is not None:
            token = self._token = _sendable(self._fetch_token() or "")
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            return self._pool.request(
                method,
                self.address + path,
                body=body,
                headers={**(headers or {}), **authorization},
                timeout=urllib3.Timeout(connect=CONNECT_TIMEOUT_S, read=read_timeout_s),
            )
        except urllib3.exceptions.HTTPError as error:
            cause = error.reason if isinstance(error, urllib3.exceptions.MaxRetryError) else error
            if isinstance(cause, urllib3.exceptions.ReadTimeoutError):
                raise Unanswered(
                    f"{self.address}: no answer within {read_timeout_s:g} s; see the server's logs"
                ) from None
            if isinstance(cause, urllib3.exceptions.SSLError):
                raise ConnectionError(f"{self.address}: {_tls_fault(cause)}") from None
            what = type(cause or error).__name__
            raise ConnectionError(f"{self.address}: no answer ({what}); is the server running?") from None


def require_certificates(ca_file: Path) -> None:
    """Refuse what is no file of trusted certificates.

    Raises:
        ValueError: one line, if it is not there or is not PEM.
    """
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(ca_file)
    except OSError as error:  # of ssl too
        what = "no such file" if isinstance(error, FileNotFoundError) else "no certificates in PEM"
        raise ValueError(f"{ca_file}: {what}; give those that have signed the server's, as PEM") from None


def _tls_fault(error: urllib3.exceptions.SSLError) -> str:
    """Why there is no TLS connection, and what helps."""
    cause = error.args[0] if error.args else None
    if not isinstance(cause, ssl.SSLCertVerificationError):
        return f"no TLS connection ({getattr(cause, 'reason', None) or 'SSLError'}); does it speak https?"
    return (
        f"its certificate is not trusted ({cause.verify_message}); give those that have signed it as ca_file, and the "
        "host by a name that it holds"
    )


def _content(file: bytes | Path) -> bytes:
    return file.read_bytes() if isinstance(file, Path) else file


def _zipped(series: Path) -> bytes:
    """The files right in a folder; numbered, since their names may tell of a patient."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        files = sorted(file for file in series.iterdir() if file.is_file() and file.name[0] != ".")
        for number, file in enumerate(files):
            archive.writestr(f"{number}", file.read_bytes())
    return out.getvalue()


def _read_token(key_file: Path, kind: str) -> str:
    for wait_s in _WAITS_S:
        time.sleep(wait_s)
        try:
            return str(json.loads(key_file.read_text(encoding="utf-8"))[kind]["key"])
        except FileNotFoundError:
            raise ValueError(f"{key_file}: no key file; the server has it while it runs") from None
        except (ValueError, KeyError, TypeError):  # or the server is writing it
            continue
    raise ValueError(f"{key_file}: holds no {kind} token; name the server's key_file.json")


def _sendable(token: str) -> str:
    """The token without the line break that ends a mounted secret; a header that cannot be sent would be repeated."""
    token = token.strip()
    if not re.fullmatch(r"[!-~]*", token):
        raise ValueError("token: not of visible ASCII characters alone; give the token and nothing else")
    return token


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
