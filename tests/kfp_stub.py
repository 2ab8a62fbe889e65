"""A STUB of Kubeflow Pipelines' API server: it checks what is asked, and runs nothing.

Every request is held against KFP's published v2beta1 API as `kfp_server_api` was generated from it (paths, query
parameters, fields and their types, enumerations), pipelines against the schema of the pipeline spec. What does not
conform gets 400, as from the real server, and stands in `faults`. Answers are made of the same models.

What the schema leaves open is done as the source of KFP 2's API server and of its compiler for Argo does it: a run's
tasks are the nodes of Argo's workflow, without the names of their pods; a log that is not there is error 500.
"""

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import kfp_server_api as api
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2 as ir

USER, PASSWORD, TOKEN = "user@example.com", "12341234", "a-token"
LOGIN_PAGE = (
    b'<form method="post" action="/dex/auth/local/login?state=1&amp;back="><input name="password"></form>'
)
START = datetime(2026, 11, 28, 6, tzinfo=UTC)
WORKFLOW = "run-x7k2p"
INTEGERS = {"max_concurrency", "interval_second"}
_CLIENT = api.ApiClient()
_SCALARS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "bool": (bool,),
    "float": (int, float),
    "datetime": (str,),
    "object": (dict,),
}


CRON_FIELDS = ((0, 59), (0, 59), (0, 23), (1, 31), (1, 12), (0, 6))
"""Second to weekday, by github.com/robfig/cron, which the API server parses with."""


class Refusal(Exception):
    """What is asked does not conform."""


class NoLog(Exception):
    """Neither a pod of that name nor an archive of its log."""


def conform_cron(line: str) -> None:
    """Hold a cron line of numbers against its fields."""
    fields = line.split()
    if len(fields) != len(CRON_FIELDS):
        raise Refusal(f"cron {line!r}: {len(CRON_FIELDS)} fields asked for")
    for field, (least, most) in zip(fields, CRON_FIELDS, strict=True):
        for number in re.findall(r"\d+", re.sub(r"/\d+", "", field)):
            if not least <= int(number) <= most:
                raise Refusal(f"cron {line!r}: {number} is not within {least} to {most}")
        if not re.fullmatch(r"[\d*?,/-]+", field):
            raise Refusal(f"cron {line!r}: {field!r}")


def node_hash(name: str) -> int:
    """FNV-1a of a node's name, which numbers it and its pod in Argo."""
    number = 0x811C9DC5
    for byte in name.encode():
        number = ((number ^ byte) * 16777619) & 0xFFFFFFFF
    return number


def conform(value: Any, kind: str, where: str = "body") -> None:
    """Hold a JSON value against a type of the API, down to the last field."""
    if value is None:
        return
    if inner := re.fullmatch(r"list\[(.*)\]", kind):
        if not isinstance(value, list):
            raise Refusal(f"{where}: {kind} asked for")
        for number, item in enumerate(value):
            conform(item, inner[1], f"{where}[{number}]")
    elif inner := re.fullmatch(r"dict\(str, (.*)\)", kind):
        if not isinstance(value, dict):
            raise Refusal(f"{where}: {kind} asked for")
        for name, item in value.items():
            if inner[1] != "object":  # google.protobuf.Value: anything
                conform(item, inner[1], f"{where}.{name}")
    elif kind in _SCALARS:
        if not isinstance(value, _SCALARS[kind]) or (kind == "int" and isinstance(value, bool)):
            raise Refusal(f"{where}: {kind} asked for, {value!r} given")
    else:
        model = getattr(api, kind)
        if not model.openapi_types:
            # Protocol buffers' JSON takes an enumeration by name or by number.
            if value not in (*model.allowable_values, *range(len(model.allowable_values))):
                raise Refusal(f"{where}: {value!r} is none of {model.allowable_values}")
            return
        fields = {name: model.openapi_types[attribute] for attribute, name in model.attribute_map.items()}
        if not isinstance(value, dict):
            raise Refusal(f"{where}: {kind} asked for, {value!r} given")
        for name, item in value.items():
            if name not in fields:
                raise Refusal(f"{where}: {kind} has no field {name!r}")
            # The schema says string of 64-bit integers, whose JSON may be a number too.
            conform(
                item, "int" if name in INTEGERS and isinstance(item, int) else fields[name], f"{where}.{name}"
            )


def conform_query(query: Mapping[str, str], method: Callable[..., Any]) -> None:
    """Hold a query against the parameters that a method of the API documents."""
    known = set(re.findall(r":param (?:\w+ )?(\w+):", method.__doc__ or "")) - {"async_req"}
    if unknown := query.keys() - known:
        raise Refusal(f"query: unknown {sorted(unknown)}")
    if query.get("filter"):
        snake = re.sub(r'"(\w+?)([A-Z])(\w+)":', lambda m: f'"{m[1]}_{m[2].lower()}{m[3]}":', query["filter"])
        conform(json.loads(snake), "V2beta1Filter", "filter")


def conform_pipeline(body: Mapping[str, Any]) -> None:
    """Hold the pipeline of a run against the pipeline spec, and the run's arguments against the pipeline's inputs."""
    spec = body["pipeline_spec"]
    platform = spec.get("platform_spec") if "pipeline_spec" in spec else None
    try:
        pipeline = json_format.ParseDict(spec.get("pipeline_spec", spec), ir.PipelineSpec())
        if platform:
            json_format.ParseDict(platform, ir.PlatformSpec())
    except json_format.ParseError as error:
        raise Refusal(f"pipeline_spec: {error}") from None
    asked = pipeline.root.input_definitions.parameters
    given = (body.get("runtime_config") or {}).get("parameters") or {}
    if unknown := given.keys() - asked.keys():
        raise Refusal(f"parameters: unknown {sorted(unknown)}")
    missing = [
        name
        for name, one in asked.items()
        if name not in given and not one.HasField("default_value") and not one.is_optional
    ]
    if missing:
        raise Refusal(f"parameters: missing {sorted(missing)}")


class Stub:
    """The state of the stub.

    Attributes:
        url: where it listens.
        multi_user: whether it asks for a namespace.
        wants: "", "bearer" or "dex".
        faults: what did not conform.
        runs: bodies of the runs that were started, by id.
        schedules: bodies of the recurring runs, by id.
        courses: for the next looks at a run, the state of each of its tasks, by name; what follows a # tells two
            of one name apart.
        log: task -> what its pod has printed; `train(0)`, `train(1)` for attempts; none of a cached task.
        instead: end of a path -> status, content, its type, and where it redirects to, in the place of an answer.
        stalls: whether nothing but healthz is answered, ever.
        ended: when the stub has ended.
    """

    def __init__(self, multi_user: bool = False, wants: str = "") -> None:
        self.url, self.multi_user, self.wants = "", multi_user, wants
        self.faults: list[str] = []
        self.experiments: dict[str, Any] = {}
        self.runs: dict[str, Any] = {}
        self.schedules: dict[str, Any] = {}
        self.courses: list[dict[str, str]] = []
        self.log: dict[str, str] = {}
        self.instead: dict[str, tuple[int, bytes, str, str]] = {}
        self.stalls, self.ended = False, threading.Event()

    def answer(self, method: str, path: str, query: dict[str, str], body: Any) -> Any:
        """The answer to one request."""
        match method, path.removeprefix("/apis/v2beta1").strip("/").split("/"):
            case "GET", ["healthz"]:
                return api.V2beta1GetHealthzResponse(multi_user=self.multi_user)
            case "GET", ["experiments"]:
                conform_query(query, api.ExperimentServiceApi.experiment_service_list_experiments)
                found = [
                    one for one in self.experiments.values() if one.display_name in query.get("filter", "")
                ]
                return api.V2beta1ListExperimentsResponse(experiments=found, total_size=len(found))
            case "POST", ["experiments"]:
                conform(body, "V2beta1Experiment")
                if self.multi_user and not body.get("namespace"):
                    raise Refusal("namespace: empty, and several users are served")
                one = api.V2beta1Experiment(experiment_id=str(uuid.uuid4()), **body)
                self.experiments[one.experiment_id] = one
                return one
            case "POST", ["runs"]:
                conform(body, "V2beta1Run")
                return self._started(body, self.runs, "run_id", api.V2beta1Run)
            case "POST", ["recurringruns"]:
                conform(body, "V2beta1RecurringRun")
                if cron := (body["trigger"].get("cron_schedule") or {}).get("cron"):
                    conform_cron(cron)
                return self._started(body, self.schedules, "recurring_run_id", api.V2beta1RecurringRun)
            case "GET", ["runs", run_id] if run_id in self.runs:
                return self._look(run_id)
            case "GET", ["apis", "v1alpha1", "runs", run_id, "nodes", pod, "log"] if run_id in self.runs:
                if pod in (pods := self._pods()):
                    return pods[pod]
                raise NoLog(f"failed to get the log of {pod}")
        raise LookupError(f"{method} {path}: not found")

    def _started(self, body: Any, kept: dict[str, Any], key: str, model: Any) -> Any:
        conform_pipeline(body)
        if body["experiment_id"] not in self.experiments:
            raise Refusal("experiment_id: unknown")
        kept[identity := str(uuid.uuid4())] = body
        return model(
            **{key: identity, "experiment_id": body["experiment_id"], "display_name": body["display_name"]}
        )

    def _look(self, run_id: str) -> Any:
        course = self.courses.pop(0) if len(self.courses) > 1 else (self.courses or [{}])[0]
        states = set(course.values())
        state = "FAILED" if "FAILED" in states else "SUCCEEDED" if states == {"SUCCEEDED"} else "RUNNING"
        tasks = [
            api.V2beta1PipelineTaskDetail(
                run_id=run_id,
                task_id=str(uuid.uuid5(uuid.NAMESPACE_OID, run_id + name)),
                display_name=re.sub(r"#\d+", "", name.rpartition(".")[2]) or WORKFLOW,
                state=task,
                start_time=START + timedelta(minutes=number),
                child_tasks=[
                    api.PipelineTaskDetailChildTask(pod_name=f"{WORKFLOW}-{node_hash(WORKFLOW + child)}")
                    for child in children
                ],
            )
            for number, (name, task, children) in enumerate(self._nodes(course))
        ]
        return api.V2beta1Run(
            run_id=run_id, state=state, run_details=api.V2beta1RunDetails(task_details=tasks)
        )

    def _nodes(self, course: dict[str, str]) -> Iterator[tuple[str, str, list[str]]]:
        """Names of Argo's nodes below the workflow's, their states, and the names below them."""
        yield "", "RUNNING", [".root-driver"]
        yield ".root-driver", "SUCCEEDED", [".root"]
        yield ".root", "RUNNING", [f".root.{task}-driver" for task in course]
        for task, state in course.items():
            own = f".root.{task}"
            yield f"{own}-driver", "SUCCEEDED", [own]
            yield own, state, [f"{own}.executor"]
            attempts = [
                f"{own}.executor{log.removeprefix(task)}" for log in self.log if log.startswith(f"{task}(")
            ]
            yield f"{own}.executor", state, attempts
            for attempt in attempts:
                yield attempt, "FAILED", []

    def _pods(self) -> dict[str, str]:
        found = {}
        for log, text in self.log.items():
            task, bracket, attempt = log.partition("(")
            number = node_hash(f"{WORKFLOW}.root.{task}.executor{bracket}{attempt}")
            template = "retry-system-container-impl" if bracket else "system-container-impl"
            found[f"{WORKFLOW}-{template}-{number}"] = text
        return found


@contextmanager
def kfp_stub(*, multi_user: bool = False, wants: str = "") -> Iterator[Stub]:
    """A stub on a free port of the loopback interface."""
    stub = Stub(multi_user, wants)

    class Handler(BaseHTTPRequestHandler):
        def _allowed(self) -> bool:
            if stub.wants == "bearer":
                return self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if stub.wants == "dex":
                return "authservice_session=open" in self.headers.get("Cookie", "")
            return True

        def _send(self, code: int, content: bytes, kind: str = "application/json", **headers: str) -> None:
            self.send_response(code)
            for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(content)

        def _handle(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            raw = self.rfile.read(length)
            address = urlsplit(self.path)
            if stub.wants == "dex" and address.path == "/dex/auth/local/login":
                self._log_in(dict(parse_qsl(raw.decode())))
            elif stub.wants == "dex" and address.path.startswith("/dex/auth"):
                self._send(200, LOGIN_PAGE, "text/html")
            elif not self._allowed():
                if stub.wants == "dex":
                    self._send(302, b"", Location="/dex/auth?client_id=kubeflow&state=1")
                else:
                    self._send(401, b'{"message": "no"}')
            else:
                self._reply(address.path, dict(parse_qsl(address.query)), raw)

        def _log_in(self, form: dict[str, str]) -> None:
            if form == {"login": USER, "password": PASSWORD}:
                self._send(303, b"", Location="/", Set_Cookie="authservice_session=open; Path=/")
            else:
                self._send(200, b'<form><input name="password"></form>', "text/html")

        def _reply(self, path: str, query: dict[str, str], raw: bytes) -> None:
            if path == "/":
                self._send(200, b"<html>dashboard</html>", "text/html")
                return
            if stub.stalls and not path.endswith("/healthz"):
                stub.ended.wait()
                self.close_connection = True
                return
            for end, (code, content, kind, place) in stub.instead.items():
                if path.endswith(end):
                    self._send(code, content, kind, **({"Location": place} if place else {}))
                    return
            try:
                answer = stub.answer(self.command, path, query, json.loads(raw) if raw else None)
            except Refusal as refusal:
                stub.faults.append(str(refusal))
                self._send(
                    400, json.dumps({"code": 3, "message": f"Invalid input error: {refusal}"}).encode()
                )
            except NoLog as error:
                self._send(500, json.dumps({"error_message": str(error)}).encode())
            except LookupError as error:
                self._send(404, json.dumps({"code": 5, "message": str(error)}).encode())
            else:
                if isinstance(answer, str):
                    self._send(200, answer.encode(), "text/plain")
                else:
                    self._send(200, json.dumps(_CLIENT.sanitize_for_serialization(answer)).encode())

        do_GET = do_POST = _handle

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    stub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        stub.ended.set()
        server.shutdown()
        server.server_close()
        thread.join()
