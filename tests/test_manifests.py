"""The manifests as Kubernetes would get them: strictly by its schemas, offline, and by what a security review asks."""

import copy
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cadx.__main__ import command_line
from components.deliver import ARCHIVE, DATASET, DECISION, PREDICTIONS
from pipelines.placement import read_placements
from serving.archive import BUNDLE
from serving.server import Ports

MANIFESTS = Path(__file__).resolve().parent.parent / "manifests"
BUILT = ["serving/overlays/cpu", "serving/overlays/cuda", "serving/overlays/slides", "monitoring"]
VERSIONS = ["1.29", "1.33", kubernetes_validate.latest_version()]

Document = dict[str, Any]


# --- What kustomize makes of them, in so far as they use it -------------------------------------------


def build(folder: Path) -> list[Document]:
    """The documents of a kustomization; `test_built_as_kustomize_builds` holds it against the program."""
    made = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "labels", "resources", "images", "patches"}
    assert set(made) <= known, f"{folder}: this test knows no {set(made) - known}"
    documents: list[Document] = []
    for resource in made["resources"]:
        path = folder / resource
        if path.is_dir():
            documents += build(path)
        else:
            documents += [one for one in yaml.safe_load_all(path.read_text()) if one]
    for document in documents:
        if namespace := made.get("namespace"):
            document["metadata"]["namespace"] = namespace
        for labels in made.get("labels", []):
            label(document, labels["pairs"])
        for image in made.get("images", []):
            for container in containers(document):
                if container["image"] == image["name"]:
                    container["image"] = f"{image['newName']}@{image['digest']}"
    for patch in made.get("patches", []):
        wanted = patch["target"]
        [document] = [
            one
            for one in documents
            if (one["kind"], one["metadata"]["name"]) == (wanted["kind"], wanted["name"])
        ]
        for operation in yaml.safe_load((folder / patch["path"]).read_text()):
            change(document, operation)
    return documents


def label(document: Document, pairs: dict[str, str]) -> None:
    """Labels, also of pods, and in what selects pods."""
    spec = document.get("spec", {})
    places = [document["metadata"].setdefault("labels", {})]
    match document["kind"]:
        case "Deployment":
            places.append(spec["template"].setdefault("metadata", {}).setdefault("labels", {}))
            places.append(spec.setdefault("selector", {}).setdefault("matchLabels", {}))
            spread = spec["template"]["spec"].get("topologySpreadConstraints", [])
            places += [one["labelSelector"]["matchLabels"] for one in spread]
        case "CronJob":
            job = spec["jobTemplate"]
            places.append(job.setdefault("metadata", {}).setdefault("labels", {}))
            places.append(job["spec"]["template"].setdefault("metadata", {}).setdefault("labels", {}))
        case "Service":
            places.append(spec.setdefault("selector", {}))
        # kustomize completes these selectors, and makes none.
        case "NetworkPolicy" if "matchLabels" in spec["podSelector"]:
            places.append(spec["podSelector"]["matchLabels"])
        case "PodDisruptionBudget" if "matchLabels" in spec["selector"]:
            places.append(spec["selector"]["matchLabels"])
    for place in places:
        place.update(pairs)


def change(document: Document, operation: Document) -> None:
    """One operation of a JSON patch (RFC 6902): add and replace, on objects, by position and at a list's end."""
    assert operation["op"] in {"add", "replace"}
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    place: Any = document
    for part in parents:
        place = place[int(part)] if isinstance(place, list) else place[part]
    if not isinstance(place, list):
        assert operation["op"] == "add" or last in place, f"nothing to be replaced at {operation['path']}"
        place[last] = copy.deepcopy(operation["value"])
    elif last == "-":
        place.append(copy.deepcopy(operation["value"]))
    else:
        assert operation["op"] == "replace"
        place[int(last)] = copy.deepcopy(operation["value"])


def pods(document: Document) -> list[Document]:
    """The pod specifications in a document."""
    match document["kind"]:
        case "Deployment":
            return [document["spec"]["template"]["spec"]]
        case "CronJob":
            return [document["spec"]["jobTemplate"]["spec"]["template"]["spec"]]
    return []


def containers(document: Document) -> list[Document]:
    return [container for pod in pods(document) for container in pod["containers"]]


# --- Tests --------------------------------------------------------------------------------------------


@pytest.fixture(params=BUILT)
def documents(request: pytest.FixtureRequest) -> list[Document]:
    return build(MANIFESTS / request.param)


def test_every_folder_is_tested() -> None:
    folders = {path.parent for path in MANIFESTS.rglob("kustomization.yaml")}
    assert folders == {MANIFESTS / name for name in [*BUILT, "serving/base"]}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field(documents: list[Document], version: str) -> None:
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validation_is_strict(documents: list[Document]) -> None:
    document = copy.deepcopy(documents[0])
    document["spec"]["replicaz"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(document, VERSIONS[-1], strict=True)


@pytest.mark.parametrize("name", BUILT)
def test_built_as_kustomize_builds(name: str) -> None:
    program = next(
        (one for one in (["kustomize", "build"], ["kubectl", "kustomize"]) if shutil.which(one[0])), None
    )
    if program is None:
        pytest.skip("neither kustomize nor kubectl here: overlays are built by this file alone")
    text = subprocess.run([*program, MANIFESTS / name], capture_output=True, text=True, check=True).stdout
    theirs = {(one["kind"], one["metadata"]["name"]): one for one in yaml.safe_load_all(text)}
    ours = {(one["kind"], one["metadata"]["name"]): one for one in build(MANIFESTS / name)}
    assert ours == theirs


def test_pods_hold_no_right_that_they_do_not_need(documents: list[Document]) -> None:
    for document in documents:
        for pod in pods(document):
            assert pod["automountServiceAccountToken"] is False
            security = pod["securityContext"]
            assert security["runAsNonRoot"] is True
            assert security["runAsUser"] >= 10000, "a number: a name cannot be checked"
            assert security["seccompProfile"] == {"type": "RuntimeDefault"}
            assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in containers(document):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert {"cpu", "memory"} <= set(container["resources"]["limits"])
            assert {"cpu", "memory"} <= set(container["resources"]["requests"])
            assert re.search(r"@sha256:[0-9a-f]{64}$", container["image"])


def test_selectors_find_the_pods(documents: list[Document]) -> None:
    by_kind = {document["kind"]: document for document in documents}
    if "Deployment" not in by_kind:
        return
    pod_labels = by_kind["Deployment"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        by_kind["Deployment"]["spec"]["selector"]["matchLabels"],
        by_kind["Service"]["spec"]["selector"],
        by_kind["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        by_kind["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
    ]
    assert all(selector.items() <= pod_labels.items() and selector for selector in selectors)
    scaled = by_kind["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"]
    assert scaled == by_kind["Deployment"]["metadata"]["name"]
    assert "replicas" not in by_kind["Deployment"]["spec"], "it would fight the autoscaler at each apply"


def test_management_is_reachable_from_nowhere(documents: list[Document]) -> None:
    for document in documents:
        for container in containers(document):
            opened = {port["containerPort"] for port in container.get("ports", [])}
            assert not opened & set(Ports()), "TorchServe is reached through the gateway alone"
        if document["kind"] == "Service":
            assert [port["targetPort"] for port in document["spec"]["ports"]] == ["inference"]
        if document["kind"] == "NetworkPolicy":
            assert document["spec"]["egress"] == []
            for rule in document["spec"]["ingress"]:
                assert rule["from"]
                assert {port["port"] for port in rule["ports"]} <= {"inference", "metrics"}


def serving(documents: list[Document]) -> tuple[Document, Document, Document]:
    """The pod that serves, its container with TorchServe, and the gateway's."""
    [pod] = [pod for document in documents if document["kind"] == "Deployment" for pod in pods(document)]
    server, gateway = pod["containers"]
    return pod, server, gateway


def environment(container: Document) -> dict[str, str]:
    return {one["name"]: one["value"] for one in container["env"] if "value" in one}


@pytest.mark.parametrize("name", [name for name in BUILT if "serving" in name])
def test_the_gateway_sees_no_token_that_changes_models(name: str) -> None:
    _, server, gateway = serving(build(MANIFESTS / name))
    mounted = {one["mountPath"]: one["name"] for one in server["volumeMounts"]}
    seen = {one["name"] for one in gateway["volumeMounts"]}
    assert mounted["/var/lib/cadx"] not in seen, "the server's key file lies there"
    assert mounted["/token"] in seen
    assert environment(server)["OMP_NUM_THREADS"] == server["resources"]["limits"]["cpu"]


def test_slides_are_read_where_they_lie_and_have_time() -> None:
    pod, server, _ = serving(build(MANIFESTS / "serving/overlays/slides"))
    volumes = {one["name"]: one for one in pod["volumes"]}
    [mount] = [
        one for one in server["volumeMounts"] if one["mountPath"] == environment(server)["CADX_SLIDE_ROOT"]
    ]
    assert mount["readOnly"]
    assert volumes[mount["name"]]["persistentVolumeClaim"]["readOnly"]
    assert volumes["server"]["emptyDir"]["sizeLimit"] == "24Gi"
    probe = server["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 3600
    assert pod["terminationGracePeriodSeconds"] > int(server["lifecycle"]["preStop"]["exec"]["command"][1])


def commands(documents: list[Document]) -> Iterator[list[str]]:
    """The cadx commands in containers' scripts."""
    for document in documents:
        for container in containers(document):
            script = container["command"][-1].replace("\\\n", " ")
            for line in re.findall(r"\bcadx [^\n&]*", script):
                yield shlex.split(line)[1:]


def test_containers_run_commands_that_exist(documents: list[Document]) -> None:
    found = list(commands(documents))
    assert found
    for words in found:
        app = command_line(words)
        app.parse_args(words, print_error=False, exit_on_error=False)


def claims_made() -> set[str]:
    """The names of the claims that the manifests make."""
    documents = [one for name in BUILT for one in build(MANIFESTS / name)]
    return {one["metadata"]["name"] for one in documents if one["kind"] == "PersistentVolumeClaim"}


@pytest.mark.parametrize("name", ["resources.yaml", "resources-cpu.yaml"])
def test_what_pipelines_mount_is_made_by_a_manifest(name: str) -> None:
    placements = read_placements(MANIFESTS.parent / "pipelines" / name)
    asked = {step: {volume.claim for volume in one.volumes} for step, one in placements.items()}
    assert {step: claims for step, claims in asked.items() if claims} == {
        "deliver": {"cadx-models"},
        "monitor": {"cadx-requests"},
    }
    assert set().union(*asked.values()) <= claims_made()


def test_what_is_delivered_lies_where_pods_and_watch_look_for_it() -> None:
    """By the paths under /models in their commands; test_deliver.py runs the pod's."""
    found = {
        word.removeprefix("/models/")
        for name in BUILT
        for words in commands(build(MANIFESTS / name))
        for word in words
        if word.startswith("/models/")
    }
    assert found == {ARCHIVE, DECISION, PREDICTIONS, DATASET, BUNDLE}


def test_every_image_runs_under_the_number_that_the_pods_have() -> None:
    stages: dict[str, tuple[str, list[str]]] = {}
    recipe = (MANIFESTS.parent / "Dockerfile").read_text()
    for text in re.split(r"^FROM ", recipe, flags=re.MULTILINE)[1:]:
        base, name = re.match(r"(\S+) AS (\S+)", text).groups()  # type: ignore[union-attr]
        stages[name] = base, re.findall(r"^USER (.+)$", text, flags=re.MULTILINE)
    numbers = {
        f"{pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}"
        for name in BUILT
        for document in build(MANIFESTS / name)
        for pod in pods(document)
    }
    for image in ("steps", "training", "serving", "serving-cuda"):
        base, users = stages[image]
        while not users:
            base, users = stages[base]
        assert {users[-1]} == numbers, image


def test_what_is_mounted_is_a_volume_and_written_where_it_may(documents: list[Document]) -> None:
    claims = claims_made()
    for document in documents:
        for pod in pods(document):
            names = {volume["name"] for volume in pod["volumes"]}
            assert names == {
                mount["name"] for container in pod["containers"] for mount in container["volumeMounts"]
            }
            for container in pod["containers"]:
                assert any(mount["mountPath"] == "/tmp" for mount in container["volumeMounts"])
            asked = {
                one["persistentVolumeClaim"]["claimName"]
                for one in pod["volumes"]
                if "persistentVolumeClaim" in one
            }
            assert asked <= claims
