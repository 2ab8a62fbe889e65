"""The images, and the Kubeflow pipeline in them: the same bytes as on this machine, without rights, without rests.

Those marked `container` use the Docker engine that answers, or with CADX_ENGINE=1 start one of their own (root and
dockerd), and build the image with it: minutes the first time, seconds after. Where no engine, base image, package index
or disk space is to be had they are skipped, and say so.
"""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import yaml
from test_deliver import bring, serving_script
from test_deploy import make as make_packaged
from test_dvc import Checkout, added, pushed, server  # noqa: F401 - fixtures
from test_fetch import asked, remote  # noqa: F401 - fixtures
from test_nodes import assert_same_weights, node_variables, train_here
from test_train import PARAMS, inputs  # noqa: F401

from cadx.bundle import Bundle
from cadx.files import digest_path
from cadx.reading.images import encode_png
from components.contract import ROOT
from components.deploy import TRIAL
from pipelines import tasks
from pipelines.local import VARYING
from pipelines.nodes import train_job
from pipelines.placement import VOLUME_PATH, Nodes, Placement
from serving.management import Management
from serving.server import TorchServe, free_ports

EXPERIMENT = "phantom-xray-pilot"
QUICK = {
    "train": {"epochs": 1, "preprocessing": {"height_px": 32, "width_px": 32}},
    "evaluate": {"split": "test", "resamples": 50, "minimum_n": 5},
    "summarise": {"resamples": 50, "minimum_n": 5},
    "gate": {"at_least": {"auc": 0.0}, "at_most": {}, "subgroup_at_least": {}, "clean_data": False},
}
ENGINE = Path("/var/tmp/cadx-engine")
"""Of an engine that is started here: it keeps the layers for the next time."""
DISK_BYTES = 20e9
"""What building the image takes on the engine's disk, with its layers and their cache: 12 GB were seen."""
OUT_OF_REACH = (
    r"no space left|failed to (fetch|download|resolve|authorize)|connection|timed out|name resolution|dns"
)
"""What a build says that fails for its network or its disk, and not for its recipe."""


def locked(name: str) -> set[str]:
    """Package, version and marker of each line of a lock."""
    lines = (ROOT / f"requirements/{name}.txt").read_text().splitlines()
    return {line.removesuffix(" \\") for line in lines if re.match(r"[\w.-]+==", line)}


def pins(name: str) -> set[str]:
    return {line.split(" ")[0] for line in locked(name)}


def test_images_hold_versions_of_the_one_lock_and_no_tool_of_developers() -> None:
    assert pins("steps") < pins("serving") < pins("all")
    named = {pin.partition("==")[0] for pin in pins("serving")}
    assert not named & {"kfp", "dvc", "pytest", "mypy", "ruff", "uv"}


def test_recipes_name_no_address_and_see_neither_data_nor_keys() -> None:
    recipe = (ROOT / "Dockerfile").read_text()
    assert not re.search(r"https?://|index-url", recipe)
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*"
    assert {rule for rule in rules if "data" in rule} == {"!data/catalog.yaml"}
    for stage in re.split(r"^FROM ", recipe, flags=re.MULTILINE)[1:]:
        if stage.startswith("runtime AS"):
            assert "RUN" not in stage


# --- On an engine -------------------------------------------------------------------------------------


def docker(*arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    # A newer client without BuildKit's plugin may stand before Debian's own.
    client = "/usr/bin/docker" if Path("/usr/bin/docker").exists() else "docker"
    return subprocess.run([client, *arguments], capture_output=True, text=True, check=check)


@pytest.fixture(scope="module")
def engine() -> Iterator[None]:
    if shutil.which("docker") and docker("info", check=False).returncode == 0:
        yield
        return
    if os.environ.get("CADX_ENGINE", "0") == "0":
        skip("NO DOCKER ENGINE", "start one, or set CADX_ENGINE=1 and have one started")
    if os.getuid() != 0 or not shutil.which("dockerd") or not shutil.which("docker"):
        skip("NO DOCKER ENGINE", "to start one takes root, dockerd and docker")
    started = subprocess.run(
        [ROOT / ".ci/engine", "start", ENGINE], capture_output=True, text=True, check=False
    )
    if started.returncode:
        skip("NO DOCKER ENGINE", started.stderr.strip())
    os.environ["DOCKER_HOST"] = f"unix://{ENGINE}/docker.sock"
    yield
    del os.environ["DOCKER_HOST"]
    subprocess.run([ROOT / ".ci/engine", "stop", ENGINE], check=True)


@pytest.fixture(scope="module")
def image(engine: None) -> str:
    """This checkout's image, on this machine's Python where no registry is reached."""
    return build_image("steps")


@pytest.fixture(scope="module")
def serving_image(engine: None) -> str:
    """The same with TorchServe in it."""
    return build_image("serving")


def build_image(target: str) -> str:
    """The image of a target of the Dockerfile, built on the engine; the test is skipped where it cannot be."""
    name = f"cadx/{target}"
    settings = {"DOCKER": "/usr/bin/docker"} if Path("/usr/bin/docker").exists() else {}
    settings |= {"IMAGES": target, "BUILD_FLAGS": "--network=host", "PYTHON": sys.executable}
    if docker("image", "inspect", name, check=False).returncode:
        storage = Path(docker("info", "--format", "{{.DockerRootDir}}").stdout.strip())
        if storage.exists() and (free := shutil.disk_usage(storage).free) < DISK_BYTES:
            skip(
                "NO IMAGE",
                f"{storage} has {free / 1e9:.0f} GB free of the {DISK_BYTES / 1e9:.0f} to build it in",
            )
    if not (base := os.environ.get("BASE_IMAGE")):
        base = "cadx-base"
        if docker("image", "inspect", base, check=False).returncode:
            if os.getuid() == 0 and shutil.which("mmdebstrap"):
                found = make("base-image", settings)
            else:
                base = "python:3.11-slim"
                found = docker("pull", base, check=False)
            if found.returncode:
                skip("NO BASE IMAGE", found.stderr.strip()[-500:])
    built = make("images", settings | {"BASE_IMAGE": base})
    if built.returncode and re.search(OUT_OF_REACH, built.stderr, re.IGNORECASE):
        skip("NO IMAGE", built.stderr.strip()[-500:])
    assert built.returncode == 0, built.stderr[-3000:]
    return name


def make(target: str, settings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = [f"{name}={value}" for name, value in settings.items()]
    return subprocess.run(["make", target, *words], cwd=ROOT, capture_output=True, text=True, check=False)


def skip(what: str, why: str) -> NoReturn:
    pytest.skip(f"{what}: NOTHING WAS RUN IN CONTAINERS; {why}")


@pytest.fixture(scope="module")
def params(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sections = yaml.safe_load((ROOT / "params.yaml").read_text())[EXPERIMENT]
    quick = {name: {**section, **QUICK.get(name, {})} for name, section in sections.items()}
    path = tmp_path_factory.mktemp("quick") / "params.yaml"
    path.write_text(yaml.safe_dump({EXPERIMENT: quick}))
    return path


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """dvc.yaml with one seed: the others are the same again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pipelines.tasks.ROOT", with_one_seed(tmp_path_factory.mktemp("one-seed")))
        yield


def with_one_seed(folder: Path) -> Path:
    """`folder`, made if need be, with a dvc.yaml of the first seed alone in it."""
    folder.mkdir(exist_ok=True)
    content = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    first, *others = content["vars"][0]["seeds"]
    content["vars"][0]["seeds"] = [first]
    for seed in others:  # `summarise` names them all
        line = content["stages"]["summarise"]["cmd"]
        content["stages"]["summarise"]["cmd"] = re.sub(rf"\S+/{seed}/\S+", "", line)
    (folder / "dvc.yaml").write_text(yaml.safe_dump(content))
    return folder


@pytest.fixture(scope="module")
def containers(image: str, params: Path, one_seed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the compiled pipeline, with a folder per task."""
    from pipelines.local import run_in_containers

    return run_in_containers(EXPERIMENT, image=image, params=params, folder=open_folder(tmp_path_factory))


def open_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where another user than ours may get to: pytest's own folders are closed to everybody else."""
    folder = tmp_path_factory.mktemp("kubeflow")
    for parent in (folder, *folder.parents[:2]):
        parent.chmod(0o755)
    return folder


def stage_home(home: Path, params: Path) -> Path:
    """A folder to run stages in, with what their commands name and nothing of this checkout's results."""
    (home / "data").mkdir(parents=True)
    shutil.copy(ROOT / "data/catalog.yaml", home / "data")
    shutil.copy(params, home / "params.yaml")
    return home


def run_stage(job: tasks.Job, home: Path, *, program: tuple[str, ...] = ("-m", "cadx")) -> tuple[int, str]:
    """A stage's command as DVC runs it; its exit status and what it said of its failure."""
    line: str = yaml.safe_load((tasks.ROOT / "dvc.yaml").read_text())["stages"][job.step.name]["cmd"]
    line = line.replace("${item.experiment}", EXPERIMENT).replace("${item.seed}", str(job.seed))
    return run_step(line.split()[1:], home, program=program)


def run_step(words: list[str], home: Path, *, program: tuple[str, ...] = ("-m", "cadx")) -> tuple[int, str]:
    """Likewise of a step by its name and arguments."""
    done = subprocess.run(
        [sys.executable, *program, *words],
        cwd=home,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stderr[-3000:]


KILLED = """
import os, signal, sys

def kill(event, arguments):
    if event == "os.rename" and str(arguments[0]).endswith(".partial"):
        os.kill(os.getpid(), signal.SIGKILL)

from cadx.__main__ import main
sys.addaudithook(kill)
main()
"""
"""`cadx`, lost as the first file that it has written is about to take its place."""


@pytest.fixture(scope="module")
def undisturbed(params: Path, one_seed: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage has run here, one after the other."""
    home = stage_home(tmp_path_factory.mktemp("here") / "undisturbed", params)
    for job in tasks.stages(EXPERIMENT):
        status, said = run_stage(job, home)
        assert status == 0, said
    return home


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_each_step_that_is_killed_half_way_leaves_nothing_and_runs_again(
    params: Path, undisturbed: Path, tmp_path: Path
) -> None:
    home, other = stage_home(tmp_path / "killed", params), undisturbed
    for job in tasks.stages(EXPERIMENT):
        status, said = run_stage(job, home, program=("-c", KILLED))
        assert status == -signal.SIGKILL, f"{job.name} was not killed: {said}"
        assert not [path for path in job.outputs if (home / path).exists()], job.name
        status, said = run_stage(job, home)
        assert status == 0, said
        assert not [*home.rglob(".*.partial")], job.name
        for path, name in job.outputs.items():
            if name not in VARYING:
                assert digest_path(home / path) == digest_path(other / path), path
    for words, outputs in after_the_stages([*tasks.stages(EXPERIMENT)]):
        for folder in (home, other):
            write_inbox(folder)
        status, said = run_step(words, home, program=("-c", KILLED))
        assert status == -signal.SIGKILL, f"{words[0]} was not killed: {said}"
        assert not [path for path in outputs if (home / path).exists()], words[0]
        for folder in (home, other):
            status, said = run_step(words, folder)
            assert status == 0, said
        assert not [*home.rglob(".*.partial")], words[0]
        for path in outputs:
            assert digest_path(home / path) == digest_path(other / path), path


def after_the_stages(jobs: list[tasks.Job]) -> Iterator[tuple[list[str], list[str]]]:
    """Steps without a stage that work on what the stages made: their words, and the outputs that are compared."""
    made = {name: path for job in jobs if job.step.name != "summarise" for path, name in job.outputs.items()}
    candidate = ("metrics", "decision", "archive", "predictions")
    chosen = {name: f"chosen/{name}" for name in candidate}
    words = [word for name in candidate for word in (f"--all-{name}", made[name])]
    words += [word for name in candidate for word in (f"--{name}", chosen[name])]
    yield (
        ["choose", *words, "--choice", "chosen/choice", "--report", "chosen/report", "--params", "{}"],
        ["chosen/choice", *chosen.values()],
    )
    words = ["--bundle", made["bundle"], "--images", INBOX, "--params", "{}"]
    outputs = ["answers/predictions", "answers/unreadable"]
    yield ["predict", *words, "--predictions", outputs[0], "--unreadable", outputs[1]], outputs
    words = [word for name in candidate[1:] for word in (f"--{name}", chosen[name])]
    words += ["--dataset", made["dataset"], "--models", "models", "--params", "{}"]
    yield ["deliver", *words, "--delivery", "delivery"], ["delivery"]


INBOX = "inbox"


def write_inbox(home: Path) -> None:
    """Two images to be answered, and a file that is none."""
    (home / INBOX).mkdir(exist_ok=True)
    for number in range(2):
        pixels = np.random.default_rng(number).integers(0, 255, (96, 96), np.uint8)
        (home / INBOX / f"{number}.png").write_bytes(encode_png(pixels))
    (home / INBOX / "letter.txt").write_text("a letter")


@pytest.mark.slow
def test_a_fetch_that_is_killed_half_way_leaves_nothing_and_runs_again(
    asked: dict[str, Any],  # noqa: F811
    pushed: Checkout,  # noqa: F811
    tmp_path: Path,
) -> None:
    words = ["fetch", "--dataset", "fetched/dataset", "--params", json.dumps(asked)]
    status, said = run_step(words, tmp_path, program=("-c", KILLED))
    assert status == -signal.SIGKILL, said
    assert not (tmp_path / "fetched/dataset").exists()
    status, said = run_step(words, tmp_path)
    assert status == 0, said
    assert digest_path(tmp_path / "fetched/dataset") == digest_path(pushed.dataset)
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["dataset"]


@pytest.mark.slow
def test_a_deployment_that_is_killed_before_the_switch_answers_nobody_and_runs_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Once before the first version is in service, and once beside it."""
    first, second = (
        make_packaged(tmp_path_factory.mktemp(f"steps-{steps}"), steps=steps) for steps in (16, 20)
    )
    with TorchServe(tmp_path_factory.mktemp("serve"), free_ports()) as torchserve:
        management = Management(torchserve.management, key_file=torchserve.key_file)
        for packaged, name, before in ((first, f"chest{TRIAL}", None), (second, "chest", first)):
            version = Bundle(packaged.bundle).digest.removeprefix("sha256:")[:12]
            options = {
                "archive": packaged.folder / "model.mar",
                "decision": packaged.folder / "decision.json",
                "dataset": packaged.dataset,
                "predictions": packaged.folder / "predictions.parquet",
                "model-store": torchserve.model_store,
                "key-file": torchserve.key_file,
                "deployment": tmp_path / version,
                "inference": torchserve.inference,
                "management": torchserve.management,
                "params": "{}",
            }
            words = ["deploy", *(word for key, value in options.items() for word in (f"--{key}", str(value)))]
            process = subprocess.Popen([sys.executable, "-m", "cadx", *words], cwd=ROOT)
            while version not in {one.version for one in management.versions(name)}:
                assert process.poll() is None, "it ended before it was killed"
                time.sleep(0.01)
            process.kill()
            process.wait()
            assert not (tmp_path / version).exists()
            served = management.default_version("chest")
            assert served == (before and Bundle(before.bundle).digest.removeprefix("sha256:")[:12])
            status, said = run_step(words, ROOT)
            assert status == 0, said
            assert management.default_version("chest") == version
            assert not management.versions(f"chest{TRIAL}")


@pytest.mark.container
@pytest.mark.timeout(7200)
def test_containers_make_the_bytes_that_the_stages_make_here(
    containers: Path, image: str, undisturbed: Path
) -> None:
    from pipelines.local import compare

    version = docker(
        "run", "--rm", image, "python", "-c", "import platform; print(platform.python_version())"
    )
    if version.stdout.strip() != platform.python_version():
        pytest.skip(f"Python {version.stdout.strip()} in the image, {platform.python_version()} here")
    found = [*compare(containers, EXPERIMENT, home=undisturbed)]
    assert {Path(output.path).name for output in found} == {
        "dataset", "validation.json", "splits.parquet", "imbalance.json", "trained", "bundle",
        "predictions.parquet", "metrics.json", "decision.json", "model.mar",
    }  # fmt: skip
    assert [output.path for output in found if not output.equal] == []


@pytest.mark.container
@pytest.mark.timeout(1800)
def test_a_steps_own_error_is_the_last_line(
    image: str, params: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sections = yaml.safe_load(params.read_text())
    sections[EXPERIMENT]["ingest"] = {"source": "phantom-xay"}
    wrong = params.parent / "wrong.yaml"
    wrong.write_text(yaml.safe_dump(sections))
    folder = open_folder(tmp_path_factory)
    words = [EXPERIMENT, "--image", image, "--params", str(wrong), "--folder", str(folder)]
    done = subprocess.run(
        [sys.executable, "-m", "cadx", "run-local", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("cadx run-local: task ingest: cadx ingest: ")
    assert "phantom-xay" in last
    [run] = folder.iterdir()
    assert not [path for path in run.rglob("*") if path.is_file()]


@pytest.mark.container
@pytest.mark.timeout(1800)
def test_a_step_that_is_killed_leaves_nothing_and_runs_again(
    image: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = open_folder(tmp_path_factory)
    folder.chmod(0o777)
    step = ["cadx", "ingest", "--catalog", "data/catalog.yaml", "--cache", "/tmp/cache"]
    step += ["--dataset", str(folder / "made/dataset"), "--params", f'{{"source": "{EXPERIMENT}"}}']
    mounted = ["--volume", f"{folder}:{folder}", "--network=none", image, *step]
    name = docker("run", "--detach", *mounted).stdout.strip()
    while not [*folder.glob("made/.dataset.*.partial/*")]:
        assert docker("inspect", "--format", "{{.State.Running}}", name).stdout.strip() == "true"
        time.sleep(0.05)
    docker("kill", "--signal", signal.SIGKILL.name, name)
    docker("wait", name)
    docker("rm", name)
    assert not (folder / "made/dataset").exists()
    docker("run", "--rm", *mounted)
    assert [path.name for path in (folder / "made").iterdir()] == ["dataset"]


@pytest.mark.container
@pytest.mark.timeout(1800)
def test_any_user_runs_it_on_a_root_that_is_read_only_without_a_network_and_without_a_compiler(
    image: str,
) -> None:
    closed = [
        "run",
        "--rm",
        "--read-only",
        "--tmpfs=/tmp",
        "--network=none",
        "--user=12345:0",
        "--cap-drop=ALL",
        image,
    ]
    made = "/tmp/made"
    done = docker(
        *closed, "cadx", "ingest", "--catalog", "data/catalog.yaml", "--cache", "/tmp/cache", "--dataset", made,
        "--params", f'{{"source": "{EXPERIMENT}"}}',
    )  # fmt: skip
    assert done.returncode == 0
    user = docker("image", "inspect", "--format", "{{.Config.User}}", image).stdout.strip()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    for tool in ("gcc", "cc", "make", "uv"):
        assert docker(*closed, "sh", "-c", f"command -v {tool}", check=False).returncode != 0


@pytest.mark.container
@pytest.mark.timeout(7200)
def test_the_serving_image_serves_what_was_delivered_as_the_manifest_runs_it(
    serving_image: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The script of deployment.yaml under its own user, on a root that is read-only, without a network or any right."""
    packaged = make_packaged(tmp_path_factory.mktemp("packaged"), steps=16)
    models = open_folder(tmp_path_factory) / "models"
    bring(packaged, models)
    user = docker("image", "inspect", "--format", "{{.Config.User}}", serving_image).stdout.strip()
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)
    closed = ["--read-only", "--network=none", "--cap-drop=ALL", "--security-opt=no-new-privileges"]
    # World-writable, as an emptyDir is for the pod's own group.
    written = [
        "--tmpfs=/tmp:mode=1777,exec",
        "--tmpfs=/var/lib/cadx:mode=1777,exec",
        "--tmpfs=/token:mode=1777",
    ]
    name = docker(
        "run", "--detach", *closed, *written, f"--volume={models}:/models:ro", serving_image,
        "sh", "-c", serving_script(),
    ).stdout.strip()  # fmt: skip
    try:
        deadline = time.monotonic() + 1800
        while docker("exec", name, "test", "-f", "/tmp/ready", check=False).returncode:
            running = docker("inspect", "--format", "{{.State.Running}}", name).stdout.strip() == "true"
            assert running, docker("logs", name).stdout[-3000:]
            assert time.monotonic() < deadline, docker("logs", name).stdout[-3000:]
            time.sleep(1)
        asked = docker("exec", name, "python", "-c", ASK).stdout
        digest, probabilities, number = json.loads(asked.strip().splitlines()[-1])
        assert digest == Bundle(packaged.bundle).digest
        assert sum(probabilities.values()) == pytest.approx(1)
        assert number == int(user.partition(":")[0])
        assert docker("exec", name, "touch", "/opt/cadx/x", check=False).returncode != 0
        shown = json.loads(docker("exec", name, "cat", "/token/key_file.json").stdout)
        assert shown.keys() == {"inference"}, "what the gateway is handed"
    finally:
        docker("rm", "--force", name)


ASK = """
import json, os
from pathlib import Path
from cadx.datasets import DatasetFolder
from cadx.reading.images import encode_png
from serving.client import Client
folder = DatasetFolder(Path("/models/dataset"))
png = encode_png(folder.pixels(folder.samples["sample_id"].iloc[0]))
client = Client("http://127.0.0.1:8080", "chest", key_file=Path("/var/lib/cadx/key_file.json"))
answer = client.predict(png)
print(json.dumps([answer.model.bundle, answer.probabilities, os.getuid()]))
"""
"""A client within the container, which has no network: it asks about a sample of the delivered dataset."""


@pytest.mark.container
@pytest.mark.timeout(1800)
def test_two_containers_train_what_one_process_trains(
    image: str,
    inputs: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    params = {
        **PARAMS,
        "model": {"family": "resnet", "width": 0.125, "norm": "group"},
        "augmentation": {},
        "epochs": 2,
    }
    volume = tmp_path / "volume"
    shutil.copytree(inputs, volume)
    words = {
        **{name: f"{VOLUME_PATH}/{name}" for name in ("dataset", "checkpoints", "trained")},
        "splits": f"{VOLUME_PATH}/splits.parquet", "imbalance": f"{VOLUME_PATH}/imbalance.json",
        "log": f"{VOLUME_PATH}/log", "experiment": "noise", "seed": "3", "params": json.dumps(params),
    }  # fmt: skip
    arguments = [word for name, value in words.items() for word in (f"--{name}", value)]
    placement = Placement(nodes=Nodes(count=2, claim="volume"))
    trainer = train_job("noise", arguments, image=image, placement=placement).to_dict()["spec"]["trainer"]
    network = f"cadx-{os.getpid()}"
    names = [f"{network}-{rank}" for rank in range(trainer["numNodes"])]
    docker("network", "create", "--internal", network)
    try:
        for rank, name in enumerate(names):
            given = node_variables(
                rank,
                nodes=len(names),
                processes=trainer["numProcPerNode"],
                port=29500,
                address=names[0],
            )
            variables = [f"--env={key}={value}" for key, value in {"OMP_NUM_THREADS": "1", **given}.items()]
            docker(
                "run", "--detach", f"--name={name}", f"--hostname={name}", f"--network={network}", *variables,
                f"--volume={volume}:{VOLUME_PATH}", f"--user={os.getuid()}:{os.getgid()}", "--cap-drop=ALL",
                image, *trainer["command"], *trainer["args"],
            )  # fmt: skip
        ended = docker("wait", *names).stdout.split()
        said = docker("logs", names[0])
        assert ended == ["0", "0"], (said.stdout + said.stderr)[:3000]
    finally:
        docker("rm", "--force", *names, check=False)
        docker("network", "rm", network)
    assert_same_weights(train_here(inputs, tmp_path, params), volume / "trained")
