"""A Kubeflow Pipelines endpoint: compiled pipelines submitted and scheduled, their runs followed and read.

Who asks is told by the surroundings, never by an argument, which other users of a machine could read:

    CADX_KFP_TOKEN                        a bearer token, such as `kubectl create token` gives
    CADX_KFP_COOKIE                       a session's cookie, from a browser
    CADX_DEX_USER, CADX_DEX_PASSWORD      a log-in at Kubeflow's own Dex
    in a pod of the cluster               the service account's projected token
    none of them                          nobody: `kubectl port-forward` to the API server

No real cluster has seen this module yet: tests hold it against a stub that checks every request by KFP's v2beta1 API.
"""

import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import kfp
import kfp_server_api
import requests
import urllib3
import yaml

from components import STEPS
from components.contract import read_params
from pipelines.compiled import read_pipeline

ENDPOINT = "KF_PIPELINES_ENDPOINT"
IN_CLUSTER = "http://ml-pipeline.kubeflow.svc.cluster.local:8888"
TOKEN_FILE = Path("/var/run/secrets/kubeflow/pipelines/token")
"""Where Kubernetes projects a service account's token for the audience of Kubeflow Pipelines."""

POLL_S = 10.0
TIMEOUT_S = 60.0
ENDED = frozenset({"SUCCEEDED", "FAILED", "CANCELED", "SKIPPED"})
_MINIMUM_INTERVAL_S = 60


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
        """KFP's own client."""
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", FutureWarning
            )  # it needs version 2 of the server, and always says so
            return kfp.Client(
                host=self.host,
                namespace=self.namespace or "kubeflow",
                existing_token=self.token or None,
                cookies=self.cookie or None,
            )

    def get(self, path: str) -> requests.Response:
        """A GET outside of what KFP's client knows, refused as that refuses."""
        with _one_line(self.host):
            answer = requests.get(
                f"{self.host}{path}", headers=self.headers, timeout=TIMEOUT_S, allow_redirects=False
            )
        if answer.is_redirect:
            raise ValueError(
                f"{self.host}: asks for a log-in; set CADX_KFP_TOKEN, CADX_KFP_COOKIE, or CADX_DEX_USER and "
                "CADX_DEX_PASSWORD"
            )
        if answer.status_code >= 400:
            raise ValueError(_refusal(self.host, answer.status_code, answer.text))
        return answer


def connect(endpoint: str = "", namespace: str = "") -> Connection:
    """A connection that has been tried.

    Args:
        endpoint: the API's address; else that in KF_PIPELINES_ENDPOINT; else, in a pod, the cluster's own.
        namespace: as `Connection.namespace`.

    Raises:
        ValueError: if no endpoint is known, or it lets nobody in like this.
        ConnectionError: if it cannot be reached.
    """
    token, cookie = os.environ.get("CADX_KFP_TOKEN", ""), os.environ.get("CADX_KFP_COOKIE", "")
    host = endpoint or os.environ.get(ENDPOINT, "")
    if not host and TOKEN_FILE.is_file():
        host, token = IN_CLUSTER, token or TOKEN_FILE.read_text(encoding="utf-8").strip()
    if urlsplit(host).scheme not in {"http", "https"}:
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
        raise ValueError(
            f"{host}: something answers there that is not Kubeflow Pipelines' API; with the central dashboard the "
            "address ends in /pipeline"
        ) from None
    if multi_user and not namespace:
        raise ValueError(f"{host}: serves several users; name your profile's with --namespace")
    return connection


def dex_cookie(host: str, user: str, password: str) -> str:
    """The cookie of a session at Kubeflow's gateway, by its log-in form.

    Raises:
        ValueError: if the gateway shows no form, or does not accept user and password.
        ConnectionError: if it cannot be reached.
    """
    with _one_line(host), requests.Session() as session:
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
            near = get_close_matches(name, asked, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(asked)}"
            raise ValueError(f"--set {setting}: {pipeline} has no parameter {name!r}; {hint}")
        if fields and asked[name]["parameterType"] != "STRUCT":
            raise ValueError(f"--set {setting}: {name} holds a single value, it has no field {fields[0]!r}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ValueError(f"--set {setting}: the value is not YAML; put quotes around it") from None
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
    step = next((step for step in STEPS if step.name == name), None)
    if step is not None and kind == "STRUCT":
        cls = step.declaration().params
        assert cls is not None
        read_params(json.dumps(value, default=str), name, cls)


def submit(
    connection: Connection, pipeline: Path, *, name: str, experiment: str, arguments: Mapping[str, Any]
) -> str:
    """Start a run of a compiled pipeline; its id."""
    with _one_line(connection.host):
        client = connection.client()
        home = client.create_experiment(experiment, namespace=connection.namespace or None)
        run = client.run_pipeline(
            home.experiment_id, name, pipeline_package_path=str(pipeline), params=dict(arguments)
        )
        return str(run.run_id)


def schedule(
    connection: Connection,
    pipeline: Path,
    *,
    name: str,
    experiment: str,
    arguments: Mapping[str, Any],
    cron: str = "",
    interval_s: int = 0,
) -> str:
    """Start a run again and again, by a cron line or every so many seconds; the schedule's id.

    A run that is late is not caught up with, and none starts while the one before it is running.

    Raises:
        ValueError: if not exactly one of both is given, or it is none.
    """
    if bool(cron) == bool(interval_s):
        raise ValueError("give either --cron, such as '0 6 * * *', or --interval-s")
    if interval_s and interval_s < _MINIMUM_INTERVAL_S:
        raise ValueError(f"--interval-s {interval_s}: at least {_MINIMUM_INTERVAL_S}")
    fields = cron.split()
    if cron and (
        len(fields) not in {5, 6} or not all(re.fullmatch(r"[\w*/,?#-]+", field) for field in fields)
    ):
        raise ValueError(f"--cron {cron!r}: give minute, hour, day, month and weekday, such as '0 6 * * *'")
    with _one_line(connection.host):
        client = connection.client()
        home = client.create_experiment(experiment, namespace=connection.namespace or None)
        recurring = client.create_recurring_run(
            home.experiment_id,
            name,
            # Kubeflow's cron lines begin with the second.
            cron_expression=" ".join(["0", *fields] if len(fields) == 5 else fields) or None,
            interval_second=interval_s or None,
            max_concurrency=1,
            no_catchup=True,
            pipeline_package_path=str(pipeline),
            params=dict(arguments),
        )
        return str(recurring.recurring_run_id)


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
        with _one_line(connection.host):
            run = connection.client().get_run(run_id)
        for task in _tasks(run):
            state = str(task.state or "PENDING")
            if known.get(task.task_id) != state:
                known[task.task_id] = state
                say(f"{task.display_name}: {state.lower()}")
        state = str(run.state or "PENDING")
        if state in ENDED or not follow:
            say(f"run {run_id}: {state.lower()}")
            if state in {"FAILED", "CANCELED"}:
                why = getattr(run.error, "message", "") or f"`cadx logs {run_id}` shows what its tasks said"
                raise ValueError(f"run {run_id} {state.lower()}: {' '.join(str(why).split())}")
            return state
        time.sleep(POLL_S)


def _tasks(run: Any) -> list[Any]:
    """The tasks that run a step, in the order in which they started."""
    details = (run.run_details.task_details if run.run_details else None) or []
    tasks = [task for task in details if task.display_name and not task.display_name.endswith("-driver")]
    return sorted(tasks, key=lambda task: str(task.start_time or datetime.max))


def logs(connection: Connection, run_id: str, *, task: str = "") -> Iterator[str]:
    """What the tasks of a run have printed, line by line, each after its task's name.

    Args:
        connection: where.
        run_id: the run's.
        task: one task's display name; all of them otherwise.

    Raises:
        ValueError: if there is no such run or task, or its pod is gone and was not archived.
    """
    with _one_line(connection.host):
        tasks = _tasks(connection.client().get_run(run_id))
    named = [one for one in tasks if task in ("", one.display_name)]
    if not named:
        known = ", ".join(str(one.display_name) for one in tasks) or "none yet"
        raise ValueError(f"run {run_id} has no task {task!r}; it has: {known}")
    for one in named:
        pods = [child.pod_name for child in one.child_tasks or () if child.pod_name] or [one.pod_name]
        for pod in filter(None, pods):
            # The one address of the API server that its published schema leaves out.
            answer = connection.get(f"/apis/v1alpha1/runs/{run_id}/nodes/{pod}/log")
            for line in answer.text.splitlines():
                yield f"{one.display_name} | {line}"


@contextmanager
def _one_line(host: str) -> Iterator[None]:
    """Turn what KFP's client raises into one line; what it prints is left out.

    Raises:
        ValueError: if the endpoint refuses.
        ConnectionError: if it cannot be reached.
    """
    try:
        with redirect_stdout(StringIO()):
            yield
    except kfp_server_api.ApiException as error:
        raise ValueError(_refusal(host, error.status, error.body or error.reason)) from None
    except (urllib3.exceptions.HTTPError, requests.RequestException) as error:
        raise ConnectionError(f"{host}: no answer ({type(error).__name__}); is the port forwarded?") from None


def _refusal(host: str, code: int, body: Any) -> str:
    if code in {401, 403}:
        return f"{host}: {code}: the token or cookie is not accepted; get a new one"
    text = body.decode(errors="replace") if isinstance(body, bytes) else str(body)
    try:
        told = json.loads(text)
        text = told.get("message") or told.get("error") or text
    except (ValueError, AttributeError):
        pass
    return f"{host}: {code}: {' '.join(text.split())[:300]}"
