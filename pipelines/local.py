"""The training pipeline in containers on one machine, by kfp's DockerRunner, held against `dvc repro`'s bytes.

The run ends where a server would be needed: at the choice of the seed that would be served.
"""

import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import docker
from kfp import local

from cadx.files import digest_path
from components import STEPS
from pipelines.placement import Placement, Setting
from pipelines.tasks import Job, stages
from pipelines.training import training, training_jobs

PASSED_ON = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OPENBLAS_CORETYPE", "CADX_DEBUG")
"""Variables that a step sees in its container as here: the number of threads decides the last bits of a sum."""
MIRROR = "CADX_DATA_MIRROR"
SHARED_MEMORY = "2g"
"""Of a container: its loaders' processes hand batches over in /dev/shm, which is 64 MB by default."""
VARYING = frozenset({"report", "card", "log"})
"""Outputs that are not compared: pages, and the log of a training, which holds clock times."""
_ENDED = "executor_output.json"  # a step's last act: see `contract.report_outputs`


class Compared(NamedTuple):
    """An output of the containers beside DVC's.

    Attributes:
        path: DVC's, relative to `home`.
        equal: None where DVC has not made it.
    """

    path: str
    equal: bool | None


def run_in_containers(experiment: str, *, image: str, params: Path, folder: Path) -> Path:
    """Run an experiment's pipeline on the local engine; the folder with an entry per task.

    Args:
        experiment: a section of `params` that dvc.yaml names too.
        image: on the engine, with `cadx` in it.
        params: the parameter file.
        folder: of such runs, which every container sees and none sees more of this machine than that.

    Raises:
        ValueError: if no engine or no such image is there, or a step fails: with that step's own last word.
    """
    user = _user_of(image)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if os.getuid() == 0:
        os.chown(folder, *user)
    earlier = set(folder.iterdir())
    local.init(local.DockerRunner(**_container(user)), pipeline_root=str(folder))
    # Here a failed step is not tried again, and no resource is asked for.
    setting = Setting(params, image, {step.name: Placement() for step in STEPS}, deploy="none")
    pipeline = training(experiment, setting)
    heard = _Heard(sys.stdout)
    failure: Exception | None = None
    with redirect_stdout(heard):
        try:
            pipeline()
        except (
            Exception
        ) as error:  # kfp has several kinds for a failed task, and says which it was but not why
            failure = error
    made = set(folder.iterdir()) - earlier
    run = max(made) if made else folder / experiment
    for job in training_jobs(experiment, setting):
        # The runner has been seen to take a failed container for a success: what counts is what it left.
        if not _ended(run / job.name, job):
            said = heard.of(job.step.name) or f"its container ended without a word; {failure or 'no error'}"
            raise ValueError(f"task {job.name}: {said}")
    if failure is not None:
        raise ValueError(" ".join(str(failure).split()))
    return run


def compare(run: Path, experiment: str, *, home: Path = Path()) -> Iterator[Compared]:
    """Each output of a run in containers beside the file or folder that its stage makes under DVC.

    Args:
        run: what `run_in_containers` gave.
        experiment: the same.
        home: where dvc.yaml's paths begin.
    """
    for job in stages(experiment):
        for path, name in job.outputs.items():
            if name not in VARYING:
                theirs = home / path
                equal = digest_path(run / job.name / name) == digest_path(theirs) if theirs.exists() else None
                yield Compared(path, equal)


def report_comparison(run: Path, experiment: str) -> bool:
    """Print a line per output of a run in containers; True unless one differs from DVC's."""
    found = [*compare(run, experiment)]
    words = {True: "equal", False: "DIFFERS", None: "not made by dvc repro"}
    for output in found:
        print(f"{words[output.equal]:<22} {output.path}")
    counts = {word: sum(output.equal is equal for output in found) for equal, word in words.items()}
    print(f"{experiment}: " + ", ".join(f"{count} {word}" for word, count in counts.items() if count))
    differs = [output.path for output in found if output.equal is False]
    if any(path.endswith("trained") for path in differs):
        print("a bundle names the Python that made it: see `versions` in both bundle.json")
    return not differs


class _Heard(io.TextIOBase):
    """Standard output, and what steps said there of their failures."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lines = [""]

    def write(self, text: str) -> int:
        first, *rest = text.split("\n")
        self._lines[-1] += first
        self._lines += rest
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def of(self, step: str) -> str:
        """The first line in which a step told what stopped it; empty if none did."""
        return next((text for line in self._lines if (text := line.strip()).startswith(f"cadx {step}: ")), "")


def _ended(folder: Path, job: Job) -> bool:
    return all((folder / name).exists() for name in (_ENDED, *job.outputs.values()))


def _user_of(image: str) -> tuple[int, int]:
    """The user and the group that a container runs under: ours, or the image's own where we are root."""
    try:
        client = docker.from_env()
        try:
            name = image if "@" in image or ":" in image.rpartition("/")[2] else f"{image}:latest"
            configured = client.images.get(name).attrs["Config"]["User"]
        finally:
            client.close()
    except docker.errors.ImageNotFound:
        raise ValueError(f"image {image}: not on this Docker engine; run `make images`") from None
    except docker.errors.DockerException:
        where = os.environ.get("DOCKER_HOST", "its usual socket")
        raise ValueError(
            f"no Docker engine answers at {where}: start one, or name its socket in DOCKER_HOST"
        ) from None
    if os.getuid() != 0:
        return os.getuid(), os.getgid()
    user, _, group = configured.partition(":")
    if not (user.isdigit() and group.isdigit()):
        raise ValueError(f"image {image}: its user is {configured!r}; give it a numeric UID:GID")
    return int(user), int(group)


def _container(user: tuple[int, int]) -> Mapping[str, Any]:
    """What the runner passes on to the engine for each container."""
    environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    mounts = []
    if mirror := os.environ.get(MIRROR):
        environment[MIRROR] = "/mirror"
        mounts.append(docker.types.Mount("/mirror", str(Path(mirror).resolve()), "bind", read_only=True))
    return {
        "user": "{}:{}".format(*user),
        "environment": environment,
        "mounts": mounts,
        "shm_size": SHARED_MEMORY,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
    }
