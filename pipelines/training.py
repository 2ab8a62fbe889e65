"""The training pipeline for Kubeflow: the stages of dvc.yaml as container components, then deployment.

Nothing is said twice. A component's command is the stage's line with Kubeflow's placeholders in the place of
paths and of the value of --params; two tasks are joined where one line writes the path that another reads;
types come from the steps' signatures. Steps with side effects stand after the stages, if stages make all of
their inputs; one that takes a decision runs only if it says promote.

Invariants: one task per stage and seed, as in DVC's matrix; equal inputs give equal bytes.
"""

import inspect
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import dropwhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from kfp import compiler, dsl

from cadx.files import replacing
from components import STEPS
from components.contract import ROOT, Step, read_params

ARTIFACTS: dict[str, Any] = {
    "dataset": dsl.Dataset,
    "splits": dsl.Dataset,
    "predictions": dsl.Dataset,
    "trained": dsl.Model,
    "bundle": dsl.Model,
    "archive": dsl.Model,
    "metrics": dsl.Metrics,
    "report": dsl.HTML,
    "card": dsl.HTML,
}
"""What an output is to Kubeflow, by its name; any other is a plain artifact."""

FIELDS: dict[str, dict[str, Any]] = {
    "metrics": {"confusion": dsl.Output[dsl.ClassificationMetrics]},
    "decision": {"promote": dsl.OutputPath(bool)},
}
"""Output -> the fields of its JSON that Kubeflow draws or branches on (`contract.report_outputs`)."""

SCRATCH = Path("/tmp/cadx")  # noqa: S108 - in a container, which is its own
"""Where a stage's `Keep` paths lie in its container: caches and checkpoints, which end with it."""

_INPUT = "{{$.inputs.artifacts['%s'].path}}"
_OUTPUT = "{{$.outputs.artifacts['%s'].path}}"
_PARAMETER = "{{$.inputs.parameters['%s']}}"


@dataclass(frozen=True)
class Job:
    """A step in one pipeline: its stage in dvc.yaml for one seed, or one that comes after the stages.

    Attributes:
        step: the step.
        seed: None where the stage is not repeated per seed.
        arguments: option -> its values in the command; empty where a parameter of the run holds it.
    """

    step: Step
    seed: int | None
    arguments: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """The task's and the component's name, such as train-0: DVC's, less the experiment."""
        # No component serves two tasks: kfp's local runner names a task's folder by its component.
        return self.step.name if self.seed is None else f"{self.step.name}-{self.seed}"

    @property
    def title(self) -> str:
        """The name on Kubeflow's pages."""
        return self.step.name if self.seed is None else f"{self.step.name} (seed {self.seed})"

    @property
    def outputs(self) -> dict[str, str]:
        """Path -> the name of the output that is written there."""
        return {self.arguments[name][0]: name for name in self.step.declaration().outputs}


def compile_experiment(experiment: str, output: Path, *, params: Path, image: str) -> None:
    """Write an experiment's pipeline, whole or not at all: see `pipelines.compile_experiment`."""
    if output.suffix not in {".yaml", ".yml"}:
        raise ValueError(f"{output}: Kubeflow takes pipelines as .yaml files; name the output so")
    if not re.fullmatch(r"[a-z0-9][\w./:@-]*", image):
        raise ValueError(f"image {image!r}: not the name of an image; give NAME:TAG or NAME@sha256:DIGEST")
    pipeline = training(experiment, params, image)
    with TemporaryDirectory() as folder:
        compiled = Path(folder) / "pipeline.yaml"
        compiler.Compiler().compile(pipeline, str(compiled))
        lines = compiled.read_text(encoding="utf-8").splitlines(keepends=True)
    # kfp's comments list the defaults in an order that changes from run to run.
    content = dropwhile(lambda line: line.startswith("#"), lines)
    note = (
        f"# Made by `cadx compile {experiment}` from dvc.yaml, {params.name} and the steps: change those.\n"
    )
    with replacing(output) as partial:
        partial.write_text(note + "".join(content), encoding="utf-8")


def training(experiment: str, params: Path, image: str) -> Any:
    """An experiment's pipeline, as kfp compiles it and runs it.

    Its parameters are `experiment`, one per step with that step's section, and what deployment has to know
    of the place it deploys to.

    Raises:
        ValueError: if `params` or dvc.yaml does not hold the experiment, or a section does not validate.
    """
    jobs = [*_stages(experiment)]
    jobs += _after(jobs)
    parameters = _parameters(jobs, experiment, params)

    def tasks(*channels: Any) -> None:
        given = dict(zip(parameters, channels, strict=True))
        made: dict[str, tuple[Any, str]] = {}
        for job in jobs:
            with _promoted_only(job, made):
                task = _task(job, made, given, image)
            made |= {path: (task, name) for path, name in job.outputs.items()}

    doc = f"From the source to a packaged model, step by step as under DVC: {experiment}.\n\nArgs:\n"
    doc += "".join(f"    {step.name}: {step.summary}\n" for step in STEPS if step.name in parameters)
    return dsl.pipeline(name=experiment)(_function(experiment, doc, parameters.values(), tasks))


def _stages(experiment: str) -> Iterator[Job]:
    """The stages of dvc.yaml, its matrix unrolled for one experiment."""
    content = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))
    matrix = content["vars"][0]
    if experiment not in matrix["experiments"]:
        known = ", ".join(matrix["experiments"])
        raise ValueError(f"dvc.yaml: no experiment {experiment!r} under vars; it holds: {known}")
    for step in STEPS:
        if step.reproducible:
            stage = content["stages"][step.name]
            for seed in matrix["seeds"] if "seed" in stage["matrix"] else [None]:
                line = stage["cmd"].replace("${item.experiment}", experiment)
                yield Job(step, seed, _options(line.replace("${item.seed}", str(seed))))


def _options(command: str) -> dict[str, tuple[str, ...]]:
    options: dict[str, tuple[str, ...]] = {}
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            options[name := word[2:].replace("-", "_")] = ()
        else:
            options[name] += (word,)
    return options


def _after(stages: Sequence[Job]) -> Iterator[Job]:
    """The steps with side effects whose inputs are all made by `stages`, those of the first seed."""
    made = {name: path for job in reversed(stages) for path, name in job.outputs.items()}
    for step in STEPS:
        declared = step.declaration()
        if not step.reproducible and made.keys() >= set(declared.inputs):
            paths = {name: (made[name],) for name in declared.inputs}
            paths |= {name: (f"{step.name}/{name}",) for name in declared.outputs}
            yield Job(step, None, {name: paths.get(name, ()) for name in _signature(step).parameters})


def _signature(step: Step) -> inspect.Signature:
    return inspect.signature(inspect.unwrap(step.load()))


def _parameters(jobs: Sequence[Job], experiment: str, params: Path) -> dict[str, inspect.Parameter]:
    """The pipeline's parameters by name, with their defaults."""
    found = {"experiment": _parameter("experiment", str, experiment)}
    for step in dict.fromkeys(job.step for job in jobs):
        cls = step.declaration().params
        assert cls is not None
        section = read_params(f"{params}:{experiment}", step.name, cls)
        # Kubeflow's parameters know no null: what is left out takes its default.
        plain = section.model_dump(mode="json", exclude_none=True)
        assert cls.model_validate(plain) == section, (
            f"{step.name}: a default that is not None, where None may be"
        )
        found[step.name] = _parameter(step.name, dict, plain)
    for job in jobs:
        for name, declared in _signature(job.step).parameters.items():
            if name != "params" and not job.arguments.get(name, True):
                found[name] = _parameter(name, _kind(job.step, name), declared.default)
    return found


def _promoted_only(job: Job, made: Mapping[str, tuple[Any, str]]) -> AbstractContextManager[Any]:
    """Where a job with side effects is bound to a decision: the branch that is taken if it says promote."""
    if job.step.reproducible or "decision" not in job.step.declaration().inputs:
        return nullcontext()
    decided, _ = made[job.arguments["decision"][0]]
    branch: AbstractContextManager[Any] = dsl.If(decided.outputs["promote"] == True, "promoted")  # noqa: E712
    return branch


def _task(job: Job, made: Mapping[str, tuple[Any, str]], given: Mapping[str, Any], image: str) -> Any:
    """Add a job to the pipeline: a component whose command is the job's, and a task that runs it.

    Args:
        job: what is to be run.
        made: path -> the task that makes it, and the output's name there.
        given: the pipeline's parameters.
        image: the container's.
    """
    declared = job.step.declaration()
    interface: dict[str, Any] = {}
    arguments: dict[str, Any] = {}
    words: list[str] = []
    for name, values in job.arguments.items():
        words.append(f"--{name.replace('_', '-')}")
        if name in declared.outputs:
            interface |= {name: dsl.Output[ARTIFACTS.get(name, dsl.Artifact)], **FIELDS.get(name, {})}
            words.append(_OUTPUT % name)
        elif name in declared.inputs:
            for number, path in enumerate(values):
                if path not in made:  # a file of the checkout, and so of the image
                    words.append(path)
                    continue
                entry = name if len(values) == 1 else f"{name}_{number}"
                task, output = made[path]
                interface[entry] = dsl.Input[ARTIFACTS.get(output, dsl.Artifact)]
                arguments[entry] = task.outputs[output]
                words.append(_INPUT % entry)
        elif name in declared.keeps and values:
            words.append(str(SCRATCH / values[0]))
        else:
            interface[name] = _kind(job.step, name)
            held = job.step.name if name == "params" else name
            arguments[name] = given[held] if held in given else interface[name](*values)
            words.append(_PARAMETER % name)
    container = dsl.ContainerSpec(
        image=image, command=["cadx", job.step.name], args=[*words, "--executor-input", "{{$}}"]
    )
    component = dsl.container_component(
        _function(
            job.name,
            job.step.summary,
            [_parameter(name, annotation) for name, annotation in interface.items()],
            lambda *_: container,
        )
    )
    task = component(**arguments)
    return task.set_display_name(job.title).set_caching_options(job.step.reproducible)


def _kind(step: Step, name: str) -> Any:
    """What an argument other than an artifact is to Kubeflow: a Python type."""
    if name == "params":
        return dict
    return str if name in step.declaration().keeps else _signature(step).parameters[name].annotation


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _function(
    name: str, doc: str, parameters: Iterable[inspect.Parameter], body: Callable[..., Any]
) -> Callable[..., Any]:
    """`body` under a signature of its own: kfp reads all that it needs to know off a function."""

    def function(*values: Any) -> Any:
        return body(*values)

    function.__name__, function.__doc__ = name, doc
    function.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    return function
