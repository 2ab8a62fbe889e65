"""What containers cost: how soon a step is at work in one, how large the images are, a pipeline beside its commands.

Needs a Docker engine with the images of `make images` (at least `steps`); there are no claims where none answers.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import docker
import yaml

from benchmarks._claim import claim
from components.contract import ROOT, Step, read_experiment
from pipelines.tasks import stages

EXPERIMENT = "phantom-xray-pilot"
QUICK = {"train": {"epochs": 2}, "evaluate": {"resamples": 200}, "summarise": {"resamples": 200}}
IMAGE = "cadx/steps:latest"
GPU_IMAGE = "cadx/training:latest"
START_GOAL_S = 2.0
PIPELINE_GOAL = 1 / 1.2
ROUNDS = 3
NOTHING = "/nowhere"
"""A path that no step finds: it ends where its own work would begin."""


def claims() -> Iterator[dict[str, Any]]:
    try:
        client = docker.from_env()
        sizes = {
            name: client.images.get(name).attrs["Size"] / 1e9
            for name in (IMAGE, GPU_IMAGE)
            if client.images.list(name)
        }
    except docker.errors.DockerException:
        print("containers: no Docker engine answers, nothing is measured", file=sys.stderr)
        return
    if IMAGE not in sizes:
        print(f"containers: no {IMAGE}; run `make images` first", file=sys.stderr)
        return
    for step in dict.fromkeys(job.step for job in stages(EXPERIMENT)):
        inside = _until_at_work(["docker", "run", "--rm", IMAGE, *_command(step)])
        yield claim(f"containers.start_{step.name}", inside, START_GOAL_S, "s", ratio=START_GOAL_S / inside)
    # What it takes before any of ours: the container, and in it the one import that no training goes without.
    for name, code in (("python", "pass"), ("torch", "import torch")):
        alone = min(_seconds(["docker", "run", "--rm", IMAGE, "python", "-c", code]) for _ in range(ROUNDS))
        yield claim(
            f"containers.start_{name}_alone", alone, START_GOAL_S, "s", ratio=START_GOAL_S / alone, goal=0
        )
    if GPU_IMAGE in sizes:
        yield claim(
            "containers.size", sizes[IMAGE], sizes[GPU_IMAGE], "GB", ratio=sizes[GPU_IMAGE] / sizes[IMAGE]
        )
    ours, peer = _pipelines()
    yield claim("containers.pipeline", ours, peer, "s", ratio=peer / ours, goal=PIPELINE_GOAL)


def _command(step: Step) -> list[str]:
    """A step's command line, with inputs that are not there."""
    declared, section = step.declaration(), read_experiment(ROOT / "params.yaml", EXPERIMENT)
    given = dict.fromkeys((*declared.inputs, *declared.outputs, *declared.keeps), NOTHING)
    given |= {name: "0" for name in declared.options if name in ("experiment", "seed")}
    words = [word for name, value in given.items() for word in (f"--{name.replace('_', '-')}", value)]
    return ["cadx", step.name, *words, "--params", json.dumps(section.get(step.name) or {})]


def _until_at_work(command: list[str]) -> float:
    """Seconds until a step has all but begun: its inputs are missing, and it says so. The best of some rounds."""
    return min(_seconds(command, said=NOTHING) for _ in range(ROUNDS))


def _seconds(command: list[str], said: str = "") -> float:
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - started
    assert said in done.stderr, done.stderr[-1000:]
    return seconds


def _pipelines() -> tuple[float, float]:
    """Seconds of the pipeline under kfp's DockerRunner, and of its commands here plus the containers' own starts."""
    from pipelines.local import run_in_containers

    content = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    sections = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))[EXPERIMENT]
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        quick = {step: {**section, **QUICK.get(step, {})} for step, section in sections.items()}
        params = folder / "params.yaml"
        params.write_text(yaml.safe_dump({EXPERIMENT: quick}), encoding="utf-8")
        started = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            run_in_containers(EXPERIMENT, image=IMAGE, params=params, folder=folder / "runs")
        ours = time.perf_counter() - started
        (folder / "data").mkdir()
        shutil.copy(ROOT / "data/catalog.yaml", folder / "data")
        jobs, environment = list(stages(EXPERIMENT)), {**os.environ, "PYTHONPATH": str(ROOT)}
        # The image holds its modules compiled: here they must be, too.
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        for name in {job.step.name for job in jobs}:
            command = [sys.executable, "-m", "cadx", name, "--help"]
            subprocess.run(command, env=environment, capture_output=True, check=True)
        started = time.perf_counter()
        for job in jobs:
            line = content[job.step.name]["cmd"].replace("${item.experiment}", EXPERIMENT)
            command = [sys.executable, "-m", *line.replace("${item.seed}", str(job.seed)).split()]
            subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=True)
        peer = time.perf_counter() - started
        empty = min(_seconds(["docker", "run", "--rm", IMAGE, "true"]) for _ in range(ROUNDS))
    return ours, peer + (len(jobs) + 1) * empty  # one more: the choice of a seed
