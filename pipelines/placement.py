"""Where a step runs on a cluster: resources.yaml, read and applied to Kubeflow's tasks."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, ValidationError, model_validator

from cadx.settings import explain, read_yaml
from cadx.types import Config
from components import STEPS
from components.contract import Step
from pipelines import Deploy

EVERY = "every"
"""The section that holds for every step; a step's own completes it."""

VOLUME_PATH = PurePosixPath("/data")
"""Where the nodes of a training mount what they share."""

WAITING: Mapping[str, Any] = {"cpu": "500m", "memory": "1Gi"}
"""What the task asks for that copies a training's inputs to its nodes, and waits for them."""

SHARED_MEMORY_PATH = "/dev/shm"  # noqa: S108 - where the operating system looks for it

_NAME = r"[a-z0-9]+(?:[._-]+[a-z0-9]+)*"
IMAGE_PATTERN = rf"^(?:{_NAME}(?::\d+)?/)?{_NAME}(?:/{_NAME})*(?::\w[\w.-]*)?(?:@sha256:[0-9a-f]{{64}})?$"
"""NAME:TAG or NAME@sha256:DIGEST; the name may begin with a registry's address."""
IMAGE_FORM = "no image's name; give NAME:TAG or NAME@sha256: and 64 hex digits, the name in lower case"

_CPU_IMAGE = re.compile(r"(^|[/-])steps(:[\w.-]+)?(@.*)?$")
"""The names of the image that `make images` calls cadx/steps: it holds no CUDA."""

THREADS = "OMP_NUM_THREADS"
"""The variable that tells torch and OpenBLAS how many threads to start: they do not see a container's limit."""

MOST_LETTERS = 253
"""Of any name in Kubernetes."""


def is_image(name: str) -> bool:
    """Whether a container engine takes it for the name of an image."""
    return re.fullmatch(IMAGE_PATTERN, name) is not None


def _checked_image(name: str) -> str:
    if not is_image(name):
        raise ValueError(f"{name!r}: {IMAGE_FORM}")
    return name


def _like(pattern: str, form: str) -> AfterValidator:
    """Texts of a form that Kubernetes takes; any other is refused with what the form is."""

    def checked(text: str) -> str:
        if not re.fullmatch(pattern, text) or len(text) > MOST_LETTERS:
            raise ValueError(f"{text!r}: give {form}")
        return text

    return AfterValidator(checked)


def _checked_path(text: str) -> str:
    path = PurePosixPath(text)
    if not path.is_absolute() or path == PurePosixPath("/") or ".." in path.parts or ":" in text:
        raise ValueError(f"{text!r}: give an absolute path below /, without '..' and ':'")
    return str(path)


_WORD = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_DOMAIN = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?(?:\.[a-z0-9](?:[a-z0-9-]*[a-z0-9])?)*"
Cores = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    _like(r"(?!0+(\.0+)?$)\d+(\.\d+)?|0*[1-9]\d*m", "cores above 0, as in 2, 0.5 or 500m"),
]
Bytes = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    _like(r"0*[1-9]\d*(?:[KMGTPE]i|[MGTPE])", "a whole number and its unit, as in 4Gi or 512Mi"),
]
ObjectName = Annotated[str, _like(_DOMAIN, "a name of a-z, 0-9, '-' and '.', a letter or digit at both ends")]
DataKey = Annotated[str, _like(r"[A-Za-z0-9._-]+", "a key of letters, digits, '-', '_' and '.'")]
Variable = Annotated[
    str, _like(r"[A-Za-z_]\w*", "a variable's name of letters, digits and '_', no digit first")
]
LabelKey = Annotated[
    str,
    _like(
        rf"(?:{_DOMAIN}/)?{_WORD}", "a key such as pool or example.com/pool, a letter or digit at both ends"
    ),
]
LabelValue = Annotated[
    str,
    Field(coerce_numbers_to_str=True),
    _like(rf"(?:{_WORD})?", "up to 63 letters, digits, '-', '_' and '.', a letter or digit at both ends"),
]
ResourceName = Annotated[str, _like(rf"{_DOMAIN}/{_WORD}", "the nodes' name of it, such as nvidia.com/gpu")]
MountPath = Annotated[str, AfterValidator(_checked_path)]


class Accelerator(Config):
    """Devices of one kind."""

    kind: ResourceName = Field(default="nvidia.com/gpu", description="the resource's name on the nodes")
    count: int = Field(default=1, ge=1)


class Toleration(Config):
    """A taint that the step's pod puts up with: of any value, unless one is given."""

    key: LabelKey
    operator: Literal["Equal", "Exists"] = "Exists"
    value: LabelValue | None = None
    effect: Literal["NoExecute", "NoSchedule", "PreferNoSchedule"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _equal_to_a_value(cls, given: Any) -> Any:
        """As in Kubernetes: a value is to be equalled."""
        if isinstance(given, Mapping) and given.get("value") is not None:
            return {"operator": "Equal", **given}
        return given

    @model_validator(mode="after")
    def _value_where_one_is_compared(self) -> Self:
        if (self.operator == "Exists") == (self.value is not None):
            raise ValueError(f"operator {self.operator}: give a value with Equal, and none with Exists")
        return self


class Volume(Config):
    """A claim and where the step sees it."""

    claim: ObjectName
    path: MountPath


class Nodes(Config):
    """Machines that share one training out: `pipelines.nodes`."""

    count: int = Field(ge=2, description="machines; `accelerator` is what each of them has")
    claim: ObjectName = Field(
        description="a volume that they and the task mount at once, such as ReadWriteMany"
    )
    runtime: ObjectName = Field(default="torch-distributed", description="the cluster's training runtime")


class Placement(Config):
    """What a step asks of the cluster."""

    cpu: Cores | None = Field(
        default=None, description="cores, asked for and not exceeded; as many threads are started"
    )
    memory: Bytes | None = Field(default=None, description="asked for and not exceeded")
    accelerator: Accelerator | None = None
    image: Annotated[str, AfterValidator(_checked_image)] | None = Field(
        default=None, description="of this step, where it is another than that of `cadx compile --image`"
    )
    shared_memory: Bytes | None = Field(
        default=None, description="size of /dev/shm, which data loaders' processes fill; 64 MB otherwise"
    )
    retries: int = Field(
        default=0,
        ge=0,
        description="after any failure, such as a lost node; never of a step with side effects",
    )
    timeout_s: int | None = Field(default=None, ge=1)
    node_selector: dict[LabelKey, LabelValue] = Field(default={})
    tolerations: tuple[Toleration, ...] = ()
    secrets: dict[ObjectName, dict[DataKey, Variable]] = Field(
        default={}, description="secret -> its key -> the environment variable that holds it"
    )
    config_maps: dict[ObjectName, dict[DataKey, Variable]] = Field(
        default={}, description="config map -> its key -> the environment variable that holds it"
    )
    volumes: tuple[Volume, ...] = Field(
        default=(), description="only for uncached steps: Kubeflow's cache does not see what lies on them"
    )

    nodes: Nodes | None = Field(
        default=None,
        description="only of train: it runs on several machines, all else of this section on each",
    )

    @model_validator(mode="after")
    def _one_volume_a_path(self) -> Self:
        paths = [volume.path for volume in self.volumes] + [SHARED_MEMORY_PATH] * bool(self.shared_memory)
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ValueError(f"volumes: two of them are mounted on {twice[0]}; give each a path of its own")
        return self

    @property
    def variables(self) -> dict[str, tuple[str, str, str]]:
        """Environment variable -> secret or configMap, its name, and the key in it."""
        kinds = (("secret", self.secrets), ("configMap", self.config_maps))
        return {
            variable: (kind, name, key)
            for kind, objects in kinds
            for name, keys in objects.items()
            for key, variable in keys.items()
        }

    def threads(self, processes: int = 1) -> int | None:
        """How many each process may start; None where there is no limit, or a variable of the section says it."""
        if self.cpu is None or THREADS in self.variables:
            return None
        cores = float(self.cpu.removesuffix("m")) / (1000 if self.cpu.endswith("m") else 1)
        return max(1, int(cores / processes))

    def apply(self, task: Any, *, retry: bool) -> None:
        """Ask all of it for a task; with `nodes`, what the task needs that starts them and waits."""
        if self.nodes is not None:
            kept = self.model_dump(include={"retries", "timeout_s"})
            volume = Volume(claim=self.nodes.claim, path=str(VOLUME_PATH))
            Placement(**kept, **WAITING, volumes=(volume,)).apply(task, retry=retry)
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
        if (threads := self.threads()) is not None:
            task.set_env_variable(THREADS, str(threads))
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
        sections = read_yaml(path) or {}
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such file of resources; give one with --resources") from None
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
        raise ValueError(explain(error, where, section)) from None
