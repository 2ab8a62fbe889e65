"""Training on several machines: the TrainJob, and what launches it, against a stub of Kubernetes that runs it here.

The stub knows the few addresses that Kubeflow's SDK asks. It starts each node of a job as an agent of its own,
with the variables that Kubeflow's Trainer gives to one: two `torchrun` agents find each other on loopback.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api import models
from safetensors.torch import load_file
from test_dvc import free_ports
from test_train import PARAMS, inputs  # noqa: F401
from torch.distributed.run import parse_args

from cadx.__main__ import command_line
from cadx.bundle import Bundle
from components.contract import ROOT
from components.train import train
from pipelines import compile_experiment, nodes
from pipelines.nodes import train_job
from pipelines.placement import Accelerator, Nodes, Placement, Toleration, read_placements

IMAGE = "registry.example/cadx@sha256:" + "0" * 64
TRAIN = [
    "--dataset", "/data/dataset", "--splits", "/data/splits", "--imbalance", "/data/imbalance",
    "--checkpoints", "/data/checkpoints", "--trained", "/data/trained", "--log", "/data/log",
    "--experiment", "phantom-xray", "--seed", "0", "--params", "{}",
]  # fmt: skip
NODES = Nodes(count=2, claim="runs")
LABELS = {"trainer.kubeflow.org/trainjob-ancestor-step": "trainer"}


def job(**asked: Any) -> dict[str, Any]:
    made: dict[str, Any] = train_job(
        "phantom", TRAIN, image=IMAGE, placement=Placement(nodes=NODES, **asked)
    ).to_dict()
    return made


def test_a_train_job_says_what_the_sdks_models_know() -> None:
    made = job(
        cpu=16,
        memory="32Gi",
        secrets={"s3": {"key": "AWS_SECRET_ACCESS_KEY"}},
        config_maps={"proxy": {"address": "HTTPS_PROXY"}},
        accelerator=Accelerator(count=4),
        shared_memory="8Gi",
        node_selector={"pool": "gpu"},
        tolerations=(Toleration(key="gpu"),),
    )
    trainer = made["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (2, 4)
    assert trainer["resourcesPerNode"]["limits"] == {
        "cpu": "16",
        "memory": "32Gi",
        "nvidia.com/gpu": "4",
    }
    assert trainer["env"] == [
        {"name": "AWS_SECRET_ACCESS_KEY", "valueFrom": {"secretKeyRef": {"name": "s3", "key": "key"}}},
        {"name": "HTTPS_PROXY", "valueFrom": {"configMapKeyRef": {"name": "proxy", "key": "address"}}},
        {"name": "OMP_NUM_THREADS", "value": "4"},
    ]
    [patch] = made["spec"]["runtimePatches"]
    [node] = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert pod["tolerations"] == [{"key": "gpu", "operator": "Exists"}]
    assert {one["name"] for one in pod["volumes"]} == {"data", "shm"}
    assert [one["mountPath"] for one in pod["containers"][0]["volumeMounts"]] == ["/data", "/dev/shm"]


def test_its_command_is_torchruns_and_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = job(accelerator=Accelerator(count=4))["spec"]["trainer"]
    for name, value in node_variables(1, nodes=2, processes=4, port=1).items():
        monkeypatch.setenv(name, value)
    asked = parse_args([*trainer["command"][1:], *trainer["args"]])
    assert (asked.nnodes, asked.nproc_per_node, asked.node_rank) == ("2", "4", 1)
    assert (asked.module, asked.training_script) == (True, "cadx")
    words = asked.training_script_args
    command_line(words).parse_args(words, print_error=False, exit_on_error=False)


def test_what_not_all_nodes_see_is_refused() -> None:
    with pytest.raises(ValueError, match="give a path under /data"):
        train_job("x", ["--dataset", "/tmp/d"], image=IMAGE, placement=Placement(nodes=NODES))


def test_resources_turn_the_task_of_train_into_a_launcher(tmp_path: Path) -> None:
    resources = tmp_path / "resources.yaml"
    section = {"accelerator": {"count": 4}, "nodes": {"count": 2, "claim": "runs"}, "retries": 2}
    section |= {"cpu": 8, "secrets": {"s3": {"key": "AWS_SECRET_ACCESS_KEY"}}}
    resources.write_text(yaml.safe_dump({"train": section}))
    path = tmp_path / "p.yaml"
    compile_experiment("phantom-xray", path, params=ROOT / "params.yaml", image=IMAGE, resources=resources)
    spec, platform = yaml.load_all(path.read_text(), yaml.CSafeLoader)
    container = spec["deploymentSpec"]["executors"]["exec-train-0"]["container"]
    assert container["command"][:4] == ["python", "-m", "pipelines.nodes", IMAGE]
    assert Placement.model_validate_json(container["command"][4]) == read_placements(resources)["train"]
    assert container["command"][5:] == ["cadx", "train"]
    assert container["resources"] == {
        **{"cpuLimit": 0.5, "cpuRequest": 0.5, "memoryLimit": 1.073741824, "memoryRequest": 1.073741824},
        **{f"resourceCpu{kind}": "500m" for kind in ("Limit", "Request")},
        **{f"resourceMemory{kind}": "1Gi" for kind in ("Limit", "Request")},
    }, "the task waits, the nodes compute"
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    assert executors["exec-train-0"]["pvcMount"][0]["mountPath"] == "/data"
    assert "secretAsEnv" not in executors["exec-train-0"], "the nodes have it"
    resources.write_text(yaml.safe_dump({"evaluate": {"nodes": section["nodes"]}}))
    with pytest.raises(ValueError, match=r"evaluate\.nodes: only train runs on several machines"):
        read_placements(resources)


# --- Run ----------------------------------------------------------------------------------------------


def node_variables(
    rank: int, *, nodes: int, processes: int, port: int, address: str = "127.0.0.1"
) -> dict[str, str]:
    """What Kubeflow's Trainer gives to a node of a job by its runtime torch-distributed."""
    given = {"NNODES": nodes, "NPROC_PER_NODE": processes, "NODE_RANK": rank, "MASTER_PORT": port}
    return {"PET_MASTER_ADDR": address, **{f"PET_{name}": str(value) for name, value in given.items()}}


def lose_node(rank: int, port: int) -> None:
    """Kill all that runs on a node; `torchrun` gives its workers sessions of their own."""
    marks = {f"PET_NODE_RANK={rank}".encode(), f"PET_MASTER_PORT={port}".encode()}
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if marks <= set((place / "environ").read_bytes().split(b"\0")):
                os.kill(int(place.name), signal.SIGKILL)


class Cluster:
    """Jobs by name, and the processes of their nodes.

    Attributes:
        lose: kills the second node of the next job as soon as this file is there.
        runs: whether jobs are run at all.
        told: what is answered to who asks how a job stands: an HTTP status.
        takes_s: how long it takes to answer that a job is made.
    """

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.said: dict[str, str] = {}
        self.lose = ""
        self.runs, self.told, self.takes_s = True, 200, 0.0

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert models.TrainerV1alpha1TrainJob.from_dict(body) is not None
        body["metadata"] |= {"namespace": "default", "creationTimestamp": "2026-01-01T00:00:00Z"}
        self.jobs[body["metadata"]["name"]] = body
        if self.runs:
            Thread(target=self._run, args=(body,), daemon=True).start()
        time.sleep(self.takes_s)
        return body

    def _run(self, body: dict[str, Any]) -> None:
        trainer = body["spec"]["trainer"]
        [port] = free_ports(["master"]).values()
        nodes = []
        for rank in range(trainer["numNodes"]):
            given = node_variables(
                rank, nodes=trainer["numNodes"], processes=trainer["numProcPerNode"], port=port
            )
            nodes.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        "-m",
                        "torch.distributed.run",
                        *trainer["command"][1:],
                        *trainer["args"],
                    ],
                    cwd=ROOT,
                    env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **given},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        if self.lose:
            while not [*Path(trainer["args"][1]).parent.glob(self.lose)] and nodes[1].poll() is None:
                time.sleep(0.01)
            self.lose = ""
            lose_node(1, port)
            time.sleep(1)
            lose_node(0, port)  # as a job ends its other nodes when one is lost
        self.said[body["metadata"]["name"]] = nodes[0].communicate()[0]
        ended = "Complete" if all(node.wait() == 0 for node in nodes) else "Failed"
        condition = {"type": ended, "status": "True", "reason": "x", "message": "x"}
        body["status"] = {"conditions": [condition | {"lastTransitionTime": "2026-01-01T00:00:00Z"}]}

    def answer(self, method: str, parts: list[str], body: dict[str, Any]) -> dict[str, Any] | str | None:
        match method, parts:
            case "POST", [*_, "trainjobs"]:
                return self.create(body)
            case "GET", [*_, "trainjobs", name]:
                return self.jobs.get(name)
            case "DELETE", [*_, "trainjobs", name]:
                return self.jobs.pop(name, None)
            case "GET", [*_, "clustertrainingruntimes", name]:
                node = {"name": "node", "image": "torch"}
                pod = {"spec": {"template": {"spec": {"containers": [node]}}}, "metadata": {"labels": LABELS}}
                jobs = [{"name": "node", "template": pod}]
                return {
                    "kind": "ClusterTrainingRuntime",
                    "metadata": {"name": name, "labels": {"trainer.kubeflow.org/framework": "torch"}},
                    "spec": {"mlPolicy": {"torch": {}}, "template": {"spec": {"replicatedJobs": jobs}}},
                }
            case "GET", [*_, "pods"]:
                return {"items": [self._pod(name) for name in self.jobs]}
            case "GET", [*_, "pods", name, "log"]:
                return self.said[name.removesuffix("-node-0")]
        return None

    @staticmethod
    def _pod(name: str) -> dict[str, Any]:
        labels = {
            "jobset.sigs.k8s.io/replicatedjob-name": "node",
            "batch.kubernetes.io/job-completion-index": "0",
        }
        return {
            "metadata": {"name": f"{name}-node-0", "labels": labels},
            "spec": {"containers": [{"name": "node"}]},
            "status": {"phase": "Running"},
        }


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    """A running stub; `kubeconfig` in the test's folder leads to it."""
    stub = Cluster()

    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length) or b"{}")
            found = stub.answer(self.command, self.path.partition("?")[0].strip("/").split("/"), body)
            data = found.encode() if isinstance(found, str) else json.dumps(found or {"code": 404}).encode()
            status = stub.told if self.command == "GET" and "/trainjobs/" in self.path else 200
            self.send_response(status if found is not None else 404)
            self.send_header("Content-Type", "text/plain" if isinstance(found, str) else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _serve

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        Thread(target=listening.serve_forever, daemon=True).start()
        config = {
            "clusters": [{"name": "c", "cluster": {"server": f"http://127.0.0.1:{listening.server_port}"}}],
            "users": [{"name": "u", "user": {}}],
            "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u", "namespace": "default"}}],
            "current-context": "x",
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(config))
        yield stub
        listening.shutdown()


def test_a_job_that_nobody_waits_for_is_deleted(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.runs = False
    place = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"  # read when it is imported
    monkeypatch.setattr(place, str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(nodes, "POLL_S", 0.05)
    waited = train_job("phantom", TRAIN, image=IMAGE, placement=Placement(nodes=NODES))
    with pytest.raises(TimeoutError, match="phantom"):
        nodes.launch(waited, timeout_s=1)
    assert not cluster.jobs
    cluster.told = 500
    with pytest.raises(ValueError, match=r"TrainJob phantom: .*; it is deleted") as caught:
        nodes.launch(waited, timeout_s=60)
    assert "\n" not in str(caught.value)
    assert not cluster.jobs


@pytest.mark.parametrize("takes_s", [0.0, 2.0], ids=["waiting", "while it is made"])
def test_a_cancelled_task_takes_its_job_with_it(cluster: Cluster, tmp_path: Path, takes_s: float) -> None:
    cluster.runs, cluster.takes_s = False, takes_s
    (tmp_path / "dataset").mkdir()
    for name in ("dataset/dataset.json", "splits.parquet", "imbalance.json"):
        (tmp_path / name).write_text("{}")
    with launching(tmp_path, tmp_path, {}) as task:
        deadline = time.monotonic() + 300
        while not cluster.jobs:
            assert task.poll() is None, task.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        task.terminate()
        task.communicate()
    assert task.returncode == 128 + signal.SIGTERM
    assert not cluster.jobs


def launch(inputs: Path, work: Path, params: dict[str, Any]) -> subprocess.CompletedProcess[str]:  # noqa: F811
    """The launching task, to its end."""
    with launching(inputs, work, params) as task:
        said, errors = task.communicate()
    return subprocess.CompletedProcess(task.args, task.returncode, said, errors)


def launching(inputs: Path, work: Path, params: dict[str, Any]) -> subprocess.Popen[str]:  # noqa: F811
    """The launching task's command, with the test's folder in the place of the volume."""
    options = {
        "dataset": inputs / "dataset",
        "splits": inputs / "splits.parquet",
        "imbalance": inputs / "imbalance.json",
        "checkpoints": "/tmp/cadx/checkpoints",
        "trained": work / "trained",
        "log": work / "training.jsonl",
        "experiment": "noise",
        "seed": 3,
        "params": json.dumps(params),
    }
    words = [
        "cadx",
        "train",
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]
    (work / "volume").mkdir(exist_ok=True)
    program = (
        "import sys; from pathlib import Path; import pipelines.nodes as nodes; nodes.POLL_S = 1; "
        "nodes.VOLUME_PATH = sys.argv.pop(1); nodes.main(sys.argv[1:])"
    )
    placement = Placement(nodes=NODES).model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", program, str(work / "volume"), IMAGE, placement, *words],
        cwd=ROOT,
        env={**os.environ, "KUBECONFIG": str(work / "kubeconfig")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_here(inputs: Path, work: Path, params: dict[str, Any]) -> Path:  # noqa: F811
    """The bundle that one process of this machine trains."""
    train(
        dataset=inputs / "dataset", splits=inputs / "splits.parquet", imbalance=inputs / "imbalance.json",
        checkpoints=work / "checkpoints", trained=work / "trained", log=work / "log",
        experiment="noise", seed=3, params=json.dumps(params),
    )  # fmt: skip
    return work / "trained"


def assert_same_weights(one: Path, two: Path) -> None:
    """Within what the order of a sum in float32 changes."""
    mine, theirs = (load_file(bundle / "weights/0.safetensors") for bundle in (one, two))
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.float().allclose(theirs[name].float(), atol=1e-4), name


@pytest.mark.slow
def test_two_nodes_of_which_one_is_lost_train_what_one_process_trains(
    cluster: Cluster,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    model = {"family": "resnet", "width": 0.125, "norm": "group"}
    params = {**PARAMS, "model": model, "augmentation": {}, "epochs": 2, "checkpoint_steps": 2}
    cluster.lose = "**/checkpoint.pt"
    lost = launch(inputs, tmp_path, params)
    assert lost.returncode == 1
    assert not (tmp_path / "trained").exists()
    [kept] = (tmp_path / "volume").iterdir()
    assert [*kept.rglob("checkpoint.pt")], lost.stderr
    again = launch(inputs, tmp_path, params)
    assert again.returncode == 0, again.stderr
    assert not [*(tmp_path / "volume").iterdir()]
    assert not cluster.jobs
    one, two = train_here(inputs, tmp_path / "one", params), tmp_path / "trained"
    assert_same_weights(one, two)
    curves = ([record["val_loss"] for record in Bundle(bundle).history()] for bundle in (one, two))
    assert next(curves) == pytest.approx(next(curves), abs=1e-4)


@pytest.mark.slow
def test_the_nodes_own_error_is_the_last_line(
    cluster: Cluster,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    failed = launch(inputs, tmp_path, {**PARAMS, "keep": "last", "patience": 2})
    assert failed.returncode == 1
    assert "patience: stops by what val says" in failed.stderr.strip().splitlines()[-1]
    assert not (tmp_path / "trained").exists()
