"""Where a step runs on a cluster: resources.yaml, read and applied to Kubeflow's tasks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, ValidationError

from cadx.types import Config
from components import STEPS
from components.contract import Step, explain
from pipelines import Deploy

EVERY = "every"
"""The section that holds for every step; a step's own completes it."""

VOLUME_PATH = PurePosixPath("/data")
"""Where the nodes of a training mount what they share."""

SHARED_MEMORY_PATH = "/dev/shm"  # noqa: S108 - where the operating system looks for it

IMAGE_PATTERN = r"^[a-z0-9][\w./:@-]*$"
"""NAME:TAG or NAME@sha256:DIGEST."""

_CPU_IMAGE = re.compile(r"(^|[/-])steps(:[\w.-]+)?(@.*)?$")
"""The names of the image that `make images` calls cadx/steps: it holds no CUDA."""

Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|[kMGTP]i?)?$", coerce_numbers_to_str=True)]
"""As Kubernetes writes it: 500m, 4, 8Gi."""


class Accelerator(Config):
    """Devices of one kind."""

    kind: str = Field(default="nvidia.com/gpu", description="the resource's name on the nodes")
    count: int = Field(default=1, ge=1)


class Toleration(Config):
    """A taint that the step's pod puts up with."""

    key: str
    operator: Literal["Equal", "Exists"] = "Exists"
    value: str | None = None
    effect: Literal["NoExecute", "NoSchedule", "PreferNoSchedule"] | None = None


class Volume(Config):
    """A claim and where the step sees it."""

    claim: str
    path: str = Field(pattern="^/")


class Nodes(Config):
    """Machines that share one training out: `pipelines.nodes`."""

    count: int = Field(ge=2, description="machines; `accelerator` is what each of them has")
    claim: str = Field(description="a volume that they and the task mount at once, such as ReadWriteMany")
    runtime: str = Field(default="torch-distributed", description="the cluster's training runtime")


class Placement(Config):
    """What a step asks of the cluster."""

    cpu: Quantity | None = Field(default=None, description="cores, asked for and not exceeded")
    memory: Quantity | None = Field(default=None, description="asked for and not exceeded")
    accelerator: Accelerator | None = None
    image: str | None = Field(
        default=None,
        pattern=IMAGE_PATTERN,
        description="of this step, where it is another than that of `cadx compile --image`",
    )
    shared_memory: Quantity | None = Field(
        default=None, description="size of /dev/shm, which data loaders' processes fill; 64 MB otherwise"
    )
    retries: int = Field(default=0, ge=0, description="after a lost node; never of a step with side effects")
    timeout_s: int | None = Field(default=None, ge=1)
    node_selector: dict[str, str] = Field(default={})
    tolerations: tuple[Toleration, ...] = ()
    secrets: dict[str, dict[str, str]] = Field(
        default={}, description="secret -> its key -> the environment variable that holds it"
    )
    config_maps: dict[str, dict[str, str]] = Field(
        default={}, description="config map -> its key -> the environment variable that holds it"
    )
    volumes: tuple[Volume, ...] = Field(
        default=(), description="only for uncached steps: Kubeflow's cache does not see what lies on them"
    )

    nodes: Nodes | None = Field(
        default=None,
        description="only of train: it runs on several machines, all else of this section on each",
    )

    def apply(self, task: Any, *, retry: bool) -> None:
        """Ask all of it for a task; with `nodes`, what the task needs that starts them and waits."""
        if self.nodes is not None:
            kept = self.model_dump(include={"retries", "timeout_s", "secrets", "config_maps"})
            waiting = Placement(**kept, volumes=(Volume(claim=self.nodes.claim, path=str(VOLUME_PATH)),))
            waiting.apply(task, retry=retry)
            return
        from kfp import (
            kubernetes,  # not in the images of the steps, where `pipelines.nodes` reads a placement
        )

        for limit, request, amount in (
            (task.set_cpu_limit, task.set_cpu_request, self.cpu),
            (task.set_memory_limit, task.set_memory_request, self.memory),
        ):
            if amount is not None:
                request(amount)
                limit(amount)
        if self.accelerator is not None:
            task.set_accelerator_type(self.accelerator.kind).set_accelerator_limit(self.accelerator.count)
        if retry and self.retries:
            task.set_retry(self.retries, backoff_duration="30s", backoff_factor=2)
        if self.timeout_s is not None:
            kubernetes.set_timeout(task, self.timeout_s)
        if self.shared_memory is not None:
            kubernetes.empty_dir_mount(
                task, "shm", SHARED_MEMORY_PATH, medium="Memory", size_limit=self.shared_memory
            )
        for key, value in self.node_selector.items():
            kubernetes.add_node_selector(task, key, value)
        for toleration in self.tolerations:
            kubernetes.add_toleration(task, **toleration.model_dump(exclude_none=True))
        for secret, keys in self.secrets.items():
            kubernetes.use_secret_as_env(task, secret, keys)
        for config_map, keys in self.config_maps.items():
            kubernetes.use_config_map_as_env(task, config_map, keys)
        for volume in self.volumes:
            kubernetes.mount_pvc(task, volume.claim, volume.path)


@dataclass(frozen=True)
class Setting:
    """What pipelines are compiled with, whichever they are.

    Attributes:
        params: the parameter file.
        image: the container's, of each step that its placement gives no other.
        placements: step -> where it runs.
        remote: the DVC remote that the dataset is fetched from; "" where it is ingested.
        notifies: whether the end of a run is told to a webhook.
        deploy: where a promoted model goes.
    """

    params: Path
    image: str
    placements: Mapping[str, Placement]
    remote: str = ""
    notifies: bool = False
    deploy: Deploy = "volume"

    def image_of(self, step: Step) -> str:
        """The image that runs a step.

        Raises:
            ValueError: if the step asks for an accelerator, and the image's name says that it holds no CUDA.
        """
        placement = self.placements[step.name]
        image = placement.image or self.image
        if placement.accelerator is not None and _CPU_IMAGE.search(image):
            asked = placement.accelerator.kind
            raise ValueError(
                f"image {image}: the steps' image holds no CUDA, and {step.name} asks for {asked}; name the training "
                f"image, as --image or as {step.name}.image in the file of resources, or give "
                "--resources pipelines/resources-cpu.yaml"
            )
        return image


def is_cached(step: Step) -> bool:
    """Whether an earlier answer to equal parameters and inputs serves: a stage's does, and a fetch by digest."""
    return step.reproducible or step.name == "fetch"


def read_placements(path: Path) -> dict[str, Placement]:
    """Step -> where it runs, from a file of sections by step; what a step leaves out is taken from `every`.

    Raises:
        ValueError: one line: if the file cannot be read, or names a step or a field that there is not.
    """
    try:
        sections = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file of resources; give one with --resources") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    names = [step.name for step in STEPS]
    if not isinstance(sections, Mapping) or (unknown := [*sections.keys() - {EVERY, *names}]):
        what = f"unknown section {unknown[0]!r}" if isinstance(sections, Mapping) else "no sections"
        raise ValueError(f"{path}: {what}; give {EVERY} or a step: {', '.join(names)}")
    for name, section in sections.items():
        _placement(section, f"{path}: {name}")
    placements = {}
    for step in STEPS:
        merged = {**(sections.get(EVERY) or {}), **(sections.get(step.name) or {})}
        placements[step.name] = _placement(merged, f"{path}: {step.name}")
        if step.name != "train" and placements[step.name].nodes:
            raise ValueError(f"{path}: {step.name}.nodes: only train runs on several machines; take it out")
        if is_cached(step) and placements[step.name].volumes:
            raise ValueError(
                f"{path}: {step.name}.volumes: Kubeflow's cache does not see what lies on a volume, and {step.name} "
                "is cached; only uncached steps may have one"
            )
    return placements


def _placement(section: Any, where: str) -> Placement:
    try:
        return Placement.model_validate(section or {})
    except ValidationError as error:
        raise ValueError(explain(error, where)) from None
