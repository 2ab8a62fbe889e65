"""A Kubeflow Pipelines endpoint: compiled pipelines submitted and scheduled, their runs followed and read.

Who asks is told by the surroundings, never by an argument, which other users of a machine could read:

    CADX_KFP_TOKEN                        a bearer token, such as `kubectl create token` gives
    CADX_KFP_COOKIE                       a session's cookie, from a browser
    CADX_DEX_USER, CADX_DEX_PASSWORD      a log-in at Kubeflow's own Dex
    in a pod of the cluster               the service account's projected token
    none of them                          nobody: `kubectl port-forward` to the API server

No real cluster has seen this module yet: tests hold it against a stub that checks every request by KFP's v2beta1 API,
and answers as the source of KFP's API server says that it does.
"""

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import kfp
import kfp_server_api
import requests
import urllib3
from kfp_server_api import rest
from pydantic import ValidationError

from cadx.settings import did_you_mean, explain, parse_yaml
from components import STEPS
from pipelines.compiled import read_pipeline
from serving.archive import NAME_PATTERN

ENDPOINT = "KF_PIPELINES_ENDPOINT"
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
TOKEN_FILE = Path("/var/run/secrets/kubeflow/pipelines/token")
"""Where Kubernetes projects a service account's token for the audience of Kubeflow Pipelines."""

POLL_S = 10.0
TIMEOUT_S = 60.0
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
_MINIMUM_INTERVAL_S = 60
_CREDENTIALS = "set CADX_KFP_TOKEN, CADX_KFP_COOKIE, or CADX_DEX_USER and CADX_DEX_PASSWORD"
_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_WEEKDAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
_CRON: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, _MONTHS),
    ("weekday", 0, 6, _WEEKDAYS),
)
"""What the fields of Kubeflow's cron lines hold: name, least, most, and the words for them."""


class Refused(ValueError):
    """The endpoint says no; `code` is its status."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Connection:
    """An endpoint and who asks.

    Attributes:
        host: the API's address, with its scheme.
        namespace: the profile's, where several users share a cluster; "" elsewhere.
        token: a bearer token, or "".
        cookie: a session's cookie, or "".
    """

    host: str
    namespace: str = ""
    token: str = ""
    cookie: str = ""

    @property
    def headers(self) -> dict[str, str]:
        """What every request says of who asks."""
        return {
            **({"Authorization": f"Bearer {self.token}"} if self.token else {}),
            **({"Cookie": self.cookie} if self.cookie else {}),
        }

    def client(self) -> kfp.Client:
        """KFP's own client, which waits for no answer longer than TIMEOUT_S."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # it needs version 2 of the server, and always says so
            client = _Client(
                host=self.host,
                namespace=self.namespace or "kubeflow",
                existing_token=self.token or None,
                cookies=self.cookie or None,
            )
        sender = client._run_api.api_client  # one for all of its APIs
        # A redirect leads to a page for people; what was sent once is not sent again.
        sender.configuration.retries = urllib3.Retry(0, raise_on_redirect=False)
        sender.rest_client = _Sender(sender.configuration)
        return client

    def get(self, path: str) -> requests.Response:
        """A GET outside of what KFP's client knows, refused as that refuses."""
        with _one_line(self):
            answer = requests.get(
                f"{self.host}{path}", headers=self.headers, timeout=TIMEOUT_S, allow_redirects=False
            )
        if answer.status_code >= 300:
            raise self.refused(answer.status_code, answer.text)
        if "html" in answer.headers.get("Content-Type", ""):
            raise ValueError(_stranger(self.host))
        return answer

    def refused(self, code: int, body: Any) -> Refused:
        """What an answer that is no success means, in one line."""
        text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
        try:
            told = json.loads(text)
            text = told.get("message") or told.get("error") or text
        except (ValueError, AttributeError):
            pass
        text = "" if text.lstrip().startswith("<") else " ".join(str(text).split())[:300]
        said = f" ({text})" if text else ""
        known = bool(self.token or self.cookie)
        remedy = "get a new token or cookie" if known else _CREDENTIALS
        if 300 <= code < 400:
            ended = ": the session has ended" if known else ""
            return Refused(code, f"{self.host}: asks for a log-in{ended}; {remedy}")
        if code == 401:
            what = "the token or cookie is not accepted" if known else "asks who you are"
            return Refused(code, f"{self.host}: 401: {what}{said}; {remedy}")
        if code == 403:
            what = "the account has no right to this" if known else "nobody has no right to this"
            remedy = "see to its role in the namespace" if known else _CREDENTIALS
            return Refused(code, f"{self.host}: 403: {what}{said}; {remedy}")
        return Refused(code, f"{self.host}: {code}: {text}")


class _Client(kfp.Client):
    """KFP's client of a server that `connect` has tried."""

    def get_kfp_healthz(self, sleep_duration: int = 5) -> Any:
        """Nothing new: it would ask again whenever it is made, and wait as long as the server likes."""
        return kfp_server_api.V2beta1GetHealthzResponse()


class _Sender(rest.RESTClientObject):
    """Sends as KFP's client does; waits for TIMEOUT_S, and takes nothing but a JSON object for an answer."""

    def __init__(self, configuration: Any) -> None:
        super().__init__(configuration)
        self._host = configuration.host

    def request(self, method: str, url: str, **options: Any) -> Any:
        """The answer to one request.

        Raises:
            ValueError: if something else than KFP's API has answered.
        """
        answer = super().request(method, url, **options | {"_request_timeout": (TIMEOUT_S, TIMEOUT_S)})
        try:
            content = json.loads(answer.data)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise ValueError(_stranger(self._host))
        return answer


def _stranger(host: str) -> str:
    return (
        f"{host}: something answers there that is not Kubeflow Pipelines' API; if it is the page of a log-in, get a "
        "new token or cookie; with the central dashboard the address ends in /pipeline"
    )


def connect(endpoint: str = "", namespace: str = "") -> Connection:
    """A connection that has been tried.

    Args:
        endpoint: the API's address; else that in KF_PIPELINES_ENDPOINT; else, in a pod, the cluster's own.
        namespace: as `Connection.namespace`.

    Raises:
        ValueError: if no endpoint is known, or it lets nobody in like this.
        ConnectionError: if it cannot be reached.
    """
    token, cookie = _credential("CADX_KFP_TOKEN"), _credential("CADX_KFP_COOKIE")
    host = endpoint or os.environ.get(ENDPOINT, "")
    if not host and TOKEN_FILE.is_file():
        host, token = IN_CLUSTER, token or TOKEN_FILE.read_text(encoding="utf-8").strip()
    if not _is_address(host):
        raise ValueError(
            f"endpoint {host!r}: give --endpoint or {ENDPOINT}, such as http://localhost:8888 after "
            "`kubectl port-forward -n kubeflow svc/ml-pipeline 8888`"
        )
    host = host.rstrip("/")
    if user := os.environ.get("CADX_DEX_USER", ""):
        cookie = dex_cookie(host, user, os.environ.get("CADX_DEX_PASSWORD", ""))
    connection = Connection(host, namespace, token, cookie)
    answer = connection.get("/apis/v2beta1/healthz")
    try:
        multi_user = answer.json().get("multi_user", False)
    except (ValueError, AttributeError):
        raise ValueError(_stranger(host)) from None
    if multi_user and not namespace:
        raise ValueError(f"{host}: serves several users; name your profile's with --namespace")
    return connection


def _credential(name: str) -> str:
    """What a variable of the environment holds for a header.

    Raises:
        ValueError: if no header can hold it; what it is stays unsaid.
    """
    value = os.environ.get(name, "")
    if not re.fullmatch(r"[\x20-\x7e]*", value):
        raise ValueError(
            f"{name}: holds a line break or another character that no header takes; set it again"
        )
    return value


def _is_address(host: str) -> bool:
    try:
        parts = urlsplit(host)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or half an IPv6 address
        return False


def dex_cookie(host: str, user: str, password: str) -> str:
    """The cookie of a session at Kubeflow's gateway, by its log-in form.

    Raises:
        ValueError: if the gateway shows no form, or does not accept user and password.
        ConnectionError: if it cannot be reached.
    """
    with _one_line(Connection(host)), requests.Session() as session:
        root = f"{urlsplit(host).scheme}://{urlsplit(host).netloc}"
        form = session.get(host, timeout=TIMEOUT_S)
        if form.status_code in {401, 403}:  # oauth2-proxy, which shows its own page first
            form = session.get(f"{root}/oauth2/start?rd=/", timeout=TIMEOUT_S)
        if re.search(r"/auth$", urlsplit(form.url).path):  # a choice of connectors
            form = session.get(re.sub(r"/auth\?", "/auth/local?", form.url), timeout=TIMEOUT_S)
        action = re.search(r'<form[^>]+action="([^"]+)"', form.text)
        if not action:
            raise ValueError(f"{host}: shows no log-in form; unset CADX_DEX_USER")
        target = urljoin(form.url, action[1].replace("&amp;", "&"))
        done = session.post(target, data={"login": user, "password": password}, timeout=TIMEOUT_S)
        if done.status_code >= 400 or re.search(r'name="password"', done.text):
            raise ValueError(f"{host}: user and password were not accepted")
        return "; ".join(f"{cookie.name}={cookie.value}" for cookie in session.cookies)


def checked_arguments(pipeline: Path, settings: Sequence[str]) -> dict[str, Any]:
    """The arguments of a run, by parameter: what is set, in its type, and merged into the section that it changes.

    Args:
        pipeline: a compiled pipeline.
        settings: `parameter=value` or `step.field=value`, values in YAML.

    Raises:
        ValueError: one line, before anything is sent: an unknown parameter or field, a wrong value, or a
            parameter without a default that is not set.
    """
    asked = _parameters(pipeline)
    given: dict[str, Any] = {}
    for setting in settings:
        path, equals, text = setting.partition("=")
        name, *fields = path.strip().split(".")
        if not equals:
            raise ValueError(f"--set {setting}: give parameter=value, as in train.epochs=3")
        if name not in asked:
            hint = did_you_mean(name, asked) or f"; it has: {', '.join(asked)}"
            raise ValueError(f"--set {setting}: {pipeline} has no parameter {name!r}{hint}")
        if fields and asked[name]["parameterType"] != "STRUCT":
            raise ValueError(f"--set {setting}: {name} holds a single value, it has no field {fields[0]!r}")
        value = parse_yaml(text, f"--set {setting}, put quotes around the value")
        default = given.get(name, asked[name].get("defaultValue"))
        given[name] = _changed(default, fields, value)
    for name, declared in asked.items():
        if name in given:
            _check(name, declared["parameterType"], given[name])
        elif "defaultValue" not in declared and not declared.get("isOptional"):
            raise ValueError(f"{pipeline}: parameter {name!r} has no default; give --set {name}=...")
    return given


def _parameters(pipeline: Path) -> dict[str, Any]:
    found: dict[str, Any] = read_pipeline(pipeline)["root"].get("inputDefinitions", {}).get("parameters", {})
    return found


def _changed(default: Any, fields: Sequence[str], value: Any) -> Any:
    if not fields:
        return value
    section = dict(default) if isinstance(default, Mapping) else {}
    section[fields[0]] = _changed(section.get(fields[0]), fields[1:], value)
    return section


def _check(name: str, kind: str, value: Any) -> None:
    types: dict[str, type | tuple[type, ...]] = {
        "STRUCT": dict,
        "STRING": str,
        "BOOLEAN": bool,
        "NUMBER_INTEGER": int,
        "NUMBER_DOUBLE": (int, float),
        "LIST": list,
    }
    if not isinstance(value, types[kind]) or (kind.startswith("NUMBER") and isinstance(value, bool)):
        raise ValueError(f"--set {name}={value}: this parameter is of type {kind}")
    if name == "experiment" and not re.fullmatch(NAME_PATTERN, str(value)):
        raise ValueError(
            f"--set {name}={value}: the served model bears this name; give a-z, 0-9, '.', '_' and '-', a letter or "
            "digit first"
        )
    step = next((step for step in STEPS if step.name == name), None)
    if step is not None and kind == "STRUCT":
        cls = step.declaration().params
        assert cls is not None
        try:
            cls.model_validate(json.loads(json.dumps(value, default=str)))
        except ValidationError as error:
            raise ValueError(explain(error, f"--set {name}", value)) from None


def submit(
    connection: Connection, pipeline: Path, *, name: str, experiment: str, arguments: Mapping[str, Any]
) -> str:
    """Start a run of a compiled pipeline; its id.

    Raises:
        ValueError: if the endpoint refuses, or what answers is not KFP.
        ConnectionError: if there is no answer.
    """
    with _one_line(connection):
        client = connection.client()
        home = client.create_experiment(experiment, namespace=connection.namespace or None)
        run = client.run_pipeline(
            _known(connection, home.experiment_id),
            name,
            pipeline_package_path=str(pipeline),
            params=dict(arguments),
        )
    return _known(connection, run.run_id)


def _known(connection: Connection, said: str | None) -> str:
    """An id or a state, which every answer of KFP's API has."""
    if not said:
        raise ValueError(_stranger(connection.host))
    return str(said)


def checked_times(cron: str, interval_s: int) -> dict[str, Any]:
    """When a schedule starts runs, as KFP's client takes it.

    Raises:
        ValueError: if not exactly one of both is given, or it is none.
    """
    if bool(cron) == bool(interval_s):
        raise ValueError("give either --cron, such as '0 6 * * *', or --interval-s")
    if interval_s and interval_s < _MINIMUM_INTERVAL_S:
        raise ValueError(f"--interval-s {interval_s}: at least {_MINIMUM_INTERVAL_S}")
    return {"cron_expression": _checked_cron(cron)} if cron else {"interval_second": interval_s}


def _checked_cron(cron: str) -> str:
    """A cron line as Kubeflow takes it: beginning with the second."""
    fields = cron.split()
    fields = ["0", *fields] if len(fields) == 5 else fields
    if len(fields) != len(_CRON):
        raise ValueError(f"--cron {cron!r}: give minute, hour, day, month and weekday, such as '0 6 * * *'")
    for (name, least, most, words), field in zip(_CRON, fields, strict=True):
        for part in field.lower().split(","):
            if not _is_cron_part(part, least, most, words):
                raise ValueError(f"--cron {cron!r}: {name} {part!r}: give {least} to {most}, *, a-b or */n")
    return " ".join(fields)


def _is_cron_part(part: str, least: int, most: int, words: Sequence[str]) -> bool:
    match = re.fullmatch(r"(?:[*?]|([a-z]+|[0-9]+)(?:-([a-z]+|[0-9]+))?)(?:/([0-9]+))?", part)
    if match is None or (match[3] and not int(match[3])):
        return False
    ends = [least + words.index(end) if end in words else end for end in match.groups()[:2] if end]
    return all(str(end).isdigit() and least <= int(end) <= most for end in ends) and (
        len(ends) < 2 or int(ends[0]) <= int(ends[1])
    )


def schedule(
    connection: Connection,
    pipeline: Path,
    *,
    name: str,
    experiment: str,
    arguments: Mapping[str, Any],
    times: Mapping[str, Any],
) -> str:
    """Start a run again and again; the schedule's id.

    A run that is late is not caught up with, and none starts while the one before it is running.

    Args:
        connection: where.
        pipeline: a compiled one.
        name: the schedule's.
        experiment: under which Kubeflow lists its runs.
        arguments: of the runs.
        times: what `checked_times` gives.

    Raises:
        ValueError: if the endpoint refuses, or what answers is not KFP.
        ConnectionError: if there is no answer.
    """
    with _one_line(connection):
        client = connection.client()
        home = client.create_experiment(experiment, namespace=connection.namespace or None)
        recurring = client.create_recurring_run(
            _known(connection, home.experiment_id),
            name,
            max_concurrency=1,
            no_catchup=True,
            pipeline_package_path=str(pipeline),
            params=dict(arguments),
            **times,
        )
    return _known(connection, recurring.recurring_run_id)


def status(
    connection: Connection,
    run_id: str,
    say: Callable[[str], None],
    *,
    follow: bool = False,
) -> str:
    """Say how each task of a run stands; the run's own state.

    Args:
        connection: where.
        run_id: the run's.
        say: takes a line; with `follow` one for each change.
        follow: go on until the run has ended.

    Raises:
        ValueError: if there is no such run, or it has ended otherwise than well.
    """
    known: dict[str, str] = {}
    while True:
        run = _run(connection, run_id)
        for task in _tasks(run):
            state = _state(task)
            if known.get(task.task_id) != state:
                known[task.task_id] = state
                say(f"{task.display_name}: {state.lower()}")
        state = _known(connection, run.state)
        if state in ENDED or not follow:
            say(f"run {run_id}: {state.lower()}")
            if state in {"FAILED", "CANCELED"}:
                why = getattr(run.error, "message", "") or f"`cadx logs {run_id}` shows what its tasks said"
                raise ValueError(f"run {run_id} {state.lower()}: {' '.join(str(why).split())}")
            return state
        time.sleep(POLL_S)


def _run(connection: Connection, run_id: str) -> Any:
    with _one_line(connection):
        run = connection.client().get_run(run_id)
    _known(connection, run.run_id)
    return run


def _state(task: Any) -> str:
    """How a task stands; KFP knows no state of what has not begun."""
    state = str(task.state or "PENDING")
    return "PENDING" if state == "RUNTIME_STATE_UNSPECIFIED" else state


def _tasks(run: Any) -> list[Any]:
    """The tasks of the pipeline, in the order in which they started.

    KFP lists every node of Argo's workflow. A task's own bears its name; with it come that of its driver, which asks
    the cache, and `executor`, which is the pod; where it may be tried again, attempts are `executor(0)` and so on.
    """
    details = (run.run_details.task_details if run.run_details else None) or []
    workflows = {child.rpartition("-")[0] for task in details for child in _children(task)}
    tasks = [
        task
        for task in details
        if task.display_name
        and task.display_name not in workflows
        and not re.fullmatch(r"root|executor(\(\d+\))?|.*-driver", task.display_name)
    ]
    return sorted(tasks, key=lambda task: (_state(task) == "PENDING", str(task.start_time or "")))


def _children(task: Any) -> list[str]:
    return [str(child.pod_name) for child in task.child_tasks or () if child.pod_name]


def logs(connection: Connection, run_id: str, *, task: str = "") -> Iterator[str]:
    """What the tasks of a run have printed, line by line, each after its task's name.

    A task without a log, because it was answered from the cache or its pod is gone, is said to have none.

    Args:
        connection: where.
        run_id: the run's.
        task: one task's name, as `status` says it; all of them otherwise.

    Raises:
        ValueError: if there is no such run or task.
    """
    run = _run(connection, run_id)
    tasks = _tasks(run)
    if not tasks:
        raise ValueError(f"run {run_id} has no task yet; `cadx status {run_id}` tells how it stands")
    named = [one for one in tasks if task in ("", one.display_name)]
    if not named:
        known = ", ".join(dict.fromkeys(str(one.display_name) for one in tasks))
        raise ValueError(f"run {run_id} has no task {task!r}; it has: {known}")
    nodes = {str(one.display_name) for one in run.run_details.task_details}
    attempts = sum(re.fullmatch(r"executor\(\d+\)", node) is not None for node in nodes)
    for one in named:
        texts = [_log(connection, run_id, pod) for pod in _pods(one, attempts)]
        lines = [line for text in texts if text is not None for line in text.splitlines()]
        if all(text is None for text in texts):
            why = "it has not begun" if _state(one) == "PENDING" else "from the cache, or its pod is gone"
            lines = [f"(no log: {why})"]
        for line in lines:
            yield f"{one.display_name} | {line}"


def _pods(task: Any, attempts: int) -> Iterator[str]:
    """The names that a task's pods may have.

    KFP gives no pod's name but the id of the node `executor`: WORKFLOW-NUMBER, the number being the hash of the node's
    name. Argo calls the pod WORKFLOW-TEMPLATE-NUMBER; attempts are nodes of their own, of the name with (0), (1), ...
    """
    if task.pod_name:
        yield str(task.pod_name)
    for child in _children(task):
        workflow, _, number = child.rpartition("-")
        yield child
        if number.isdigit():
            yield f"{workflow}-system-container-impl-{number}"
            for attempt in range(attempts):
                longer = _hash_of_longer(int(number), f"({attempt})")
                yield f"{workflow}-retry-system-container-impl-{longer}"


def _hash_of_longer(number: int, more: str) -> int:
    """FNV-1a, 32 bits, of a name that goes on with `more`, from that of its beginning."""
    for byte in more.encode():
        number = (number ^ byte) * 0x01000193 % 2**32
    return number


def _log(connection: Connection, run_id: str, pod: str) -> str | None:
    """What a pod has printed; None if it is not there, which the server tells by an error of its own."""
    try:
        # The one address of the API server that its published schema leaves out.
        return connection.get(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log").text
    except Refused as refusal:
        if refusal.code in {400, 404, 500}:
            return None
        raise


@contextmanager
def _one_line(connection: Connection) -> Iterator[None]:
    """Turn what KFP's client raises into one line; what it prints is left out.

    Raises:
        ValueError: if the endpoint refuses.
        ConnectionError: if it cannot be reached.
    """
    try:
        with redirect_stdout(StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        raise connection.refused(error.status, error.body or error.reason) from None
    except (urllib3.exceptions.HTTPError, requests.RequestException) as error:
        cause = getattr(error, "reason", None)
        what = type(cause if isinstance(cause, Exception) else error).__name__
        waited = f" within {TIMEOUT_S:g} s" if "ReadTimeout" in what else ""
        raise ConnectionError(
            f"{connection.host}: no answer{waited} ({what}); is the port forwarded?"
        ) from None
