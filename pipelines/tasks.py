"""Steps as Kubeflow's tasks: one container component each, whose command is the step's own line.

Nothing is said twice. A component's command is the stage's line in dvc.yaml with Kubeflow's placeholders in the
place of paths and of the value of --params; two tasks are joined where one line writes the path that another
reads; types come from the steps' signatures; where a step runs comes from resources.yaml. A task that takes a
decision runs only if it says promote; one without an own stage in dvc.yaml runs uncached.
"""

import functools
import inspect
import json
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml
from kfp import dsl

from components import STEPS
from components.contract import ROOT, Step, read_params
from pipelines.placement import Setting, is_cached

ARTIFACTS: dict[str, Any] = {
    "dataset": dsl.Dataset,
    "splits": dsl.Dataset,
    "predictions": dsl.Dataset,
    "images": dsl.Dataset,
    "trained": dsl.Model,
    "bundle": dsl.Model,
    "archive": dsl.Model,
    "metrics": dsl.Metrics,
    "report": dsl.HTML,
    "card": dsl.HTML,
    "evidently": dsl.HTML,
}
"""What an output is to Kubeflow, by its name; any other is a plain artifact."""

FIELDS: dict[str, dict[str, Any]] = {
    "metrics": {
        "confusion": dsl.Output[dsl.ClassificationMetrics],
        "roc": dsl.Output[dsl.ClassificationMetrics],
    },
    "decision": {"promote": dsl.OutputPath(bool)},
    "drift": {"retrain": dsl.OutputPath(bool)},
}
"""Output -> the fields of its JSON that Kubeflow draws or branches on (`contract.report_outputs`)."""

SCRATCH = Path("/tmp/cadx")  # noqa: S108 - in a container, which is its own
"""Where a stage's `Keep` paths lie in its container: caches and checkpoints, which end with it."""

FINAL_STATUS = dsl.PipelineTaskFinalStatus
"""The type of a parameter that Kubeflow fills in: how the tasks before have ended."""

ALL = "all_"
"""Begins the name of an input that takes an output of every seed."""

DEFAULTS: dict[str, Any] = {
    "models": "/models",
    "request_log": "/requests",
    "requests": "/requests/found/requests",
    "inference": inspect.Parameter.empty,
    "management": inspect.Parameter.empty,
}
"""What has another default on a cluster: where pipelines/resources.yaml mounts the volumes of manifests/serving, and
addresses that must be given, since a task's own loopback serves nothing."""

_INPUT = "{{$.inputs.artifacts['%s'].path}}"
_OUTPUT = "{{$.outputs.artifacts['%s'].path}}"
_PARAMETER = "{{$.inputs.parameters['%s']}}"

Made = dict[str, tuple[Any, str]]
"""Path -> the task that makes it, and the output's name there."""


@dataclass(frozen=True)
class Job:
    """A step in one pipeline: its stage in dvc.yaml for one seed, or one that has no stage.

    Attributes:
        step: the step.
        seed: None where it is not repeated per seed.
        arguments: option -> its values in the command; empty where a parameter of the run holds it.
        changed: what has another default in its section than the parameter file says.
    """

    step: Step
    seed: int | None
    arguments: Mapping[str, tuple[str, ...]]
    changed: Mapping[str, Any] = field(default_factory=dict)

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


def stages(experiment: str) -> Iterator[Job]:
    """The stages of dvc.yaml, its matrix unrolled for one experiment.

    Raises:
        ValueError: if dvc.yaml does not hold the experiment.
    """
    content = yaml.load((ROOT / "dvc.yaml").read_text(encoding="utf-8"), Loader=yaml.CSafeLoader)
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


def sourced(jobs: Iterable[Job], experiment: str, remote: str) -> Iterator[Job]:
    """`jobs`; where there is a remote, with the dataset fetched from it in place of ingested.

    Raises:
        ValueError: if there is a remote, and dvc.lock or the validation that goes with it do not know the dataset.
    """
    for job in jobs:
        if remote and job.step.name == "ingest":
            changed = {"remote": remote, **_revision(experiment)}
            options = {"dataset": job.arguments["dataset"], "params": job.arguments["params"]}
            yield Job(step_named("fetch"), None, options, changed)
        else:
            yield job


def _revision(experiment: str) -> dict[str, str]:
    """An experiment's dataset in the checked-out revision: DVC's name of the folder, and its digest."""
    made = {job.step.name: list(job.outputs) for job in stages(experiment)}
    [dataset], validation = made["ingest"], ROOT / made["validate"][0]
    try:
        # The C loader: the pure one takes seconds for a lock of this size.
        text = (ROOT / "dvc.lock").read_text(encoding="utf-8")
        locked = yaml.load(text, Loader=yaml.CSafeLoader)["stages"][f"ingest@{experiment}"]["outs"]
        [md5] = [out["md5"] for out in locked if out["path"] == dataset]
        digest = json.loads(validation.read_text(encoding="utf-8"))["dataset"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"dvc.lock and {made['validate'][0]}: the dataset of {experiment} is not in both; run "
            f"`dvc repro validate@{experiment}` and `dvc push`"
        ) from None
    return {"md5": str(md5), "digest": str(digest)}


def one_seed(experiment: str, *names: str) -> Iterator[Job]:
    """The named stages for the first seed alone, and without its number in their names."""
    seen: set[str] = set()
    for job in stages(experiment):
        if job.step.name in names and job.step.name not in seen:
            seen.add(job.step.name)
            yield replace(job, seed=None)


def _options(command: str) -> dict[str, tuple[str, ...]]:
    options: dict[str, tuple[str, ...]] = {}
    for word in shlex.split(command)[2:]:
        if word.startswith("--"):
            options[name := word[2:].replace("-", "_")] = ()
        else:
            options[name] += (word,)
    return options


def followers(jobs: Sequence[Job]) -> Iterator[Job]:
    """The steps without a stage, all of whose inputs `jobs` make, or such steps before them."""
    made: dict[str, list[str]] = {}
    of_seeds: dict[str, list[str]] = {}
    for job in jobs:
        for path, name in job.outputs.items():
            made.setdefault(name, []).append(path)
            if job.seed is not None:
                of_seeds.setdefault(f"{ALL}{name}", []).append(path)
    for step in STEPS:
        inputs = [name for name in step.declaration().inputs if not _may_be_left_out(step, name)]
        # Without a choice among seeds, the first is meant.
        sources = {name: of_seeds.get(name) or made.get(name, [])[:1] for name in inputs}
        if not step.reproducible and inputs and all(sources.values()):
            job = alone(step, **{name: tuple(paths) for name, paths in sources.items()})
            made |= {name: [path] for path, name in job.outputs.items()}
            yield job


def alone(step: Step, **inputs: tuple[str, ...]) -> Job:
    """A step without a stage: the paths of its inputs are given, all else becomes a parameter of the run."""
    paths = inputs | {name: (f"{step.name}/{name}",) for name in step.declaration().outputs}
    return Job(
        step,
        None,
        {
            name: paths.get(name, ())
            for name in signature(step).parameters
            if name in paths or not _may_be_left_out(step, name)
        },
    )


def _may_be_left_out(step: Step, name: str) -> bool:
    return name in step.declaration().inputs and signature(step).parameters[name].default is None


def step_named(name: str) -> Step:
    """The step of that name."""
    return next(step for step in STEPS if step.name == name)


@functools.cache
def summary_of(step: Step) -> str:
    """The first line of a step's docstring; its file is parsed once."""
    return step.summary


def signature(step: Step) -> inspect.Signature:
    """The signature of the step's own function."""
    return inspect.signature(inspect.unwrap(step.load()))


def parameters(
    jobs: Sequence[Job], experiment: str, params: Path, **changed: Mapping[str, Any]
) -> dict[str, inspect.Parameter]:
    """The parameters that jobs take, by name, with their defaults: each step's section first.

    Args:
        jobs: the jobs of a pipeline.
        experiment: a section of `params`, whose values are the defaults.
        params: the parameter file.
        changed: step -> what has another default in this pipeline.

    Raises:
        ValueError: if `params` does not hold the experiment, or a section does not validate.
    """
    found: dict[str, inspect.Parameter] = {}
    for step, job in {job.step: job for job in jobs}.items():
        cls = step.declaration().params
        assert cls is not None
        section = read_params(f"{params}:{experiment}", step.name, cls)
        # Kubeflow's parameters know no null: what is left out takes its default.
        plain = section.model_dump(mode="json", exclude_none=True)
        assert cls.model_validate(plain) == section, (
            f"{step.name}: a default that is not None, where None may be"
        )
        default = plain | dict(job.changed) | dict(changed.get(step.name, {}))
        read_params(json.dumps(default), step.name, cls)
        found[step.name] = parameter(step.name, dict, default)
    for job in jobs:
        for name, declared in signature(job.step).parameters.items():
            kind = _kind(job.step, name)
            if name != "params" and not job.arguments.get(name, True) and kind is not FINAL_STATUS:
                found[name] = parameter(name, kind, DEFAULTS.get(name, declared.default))
    return found


def add_jobs(jobs: Iterable[Job], made: Made, given: Mapping[str, Any], setting: Setting) -> Made:
    """Add tasks to the pipeline that is being built; `made` with what they make.

    Args:
        jobs: what is to be run, in an order in which each comes after those that it needs.
        made: what there is already.
        given: the pipeline's parameters.
        setting: what it is compiled with.
    """
    for job in jobs:
        with _promoted_only(job, made):
            task = add_job(job, made, given, setting)
        made = made | {path: (task, name) for path, name in job.outputs.items()}
    return made


def _promoted_only(job: Job, made: Made) -> AbstractContextManager[Any]:
    """Where a job without a stage is bound to a decision: the branch that is taken if it says promote."""
    if job.step.reproducible or "decision" not in job.step.declaration().inputs:
        return nullcontext()
    decided, _ = made[job.arguments["decision"][0]]
    branch: AbstractContextManager[Any] = dsl.If(decided.outputs["promote"] == True, "promoted")  # noqa: E712
    return branch


def add_job(
    job: Job,
    made: Made,
    given: Mapping[str, Any],
    setting: Setting,
    *,
    alarms: bool = False,
) -> Any:
    """Add a job to the pipeline: a component whose command is the job's, and a task that runs it.

    Args:
        job: what is to be run.
        made: what there is already.
        given: the pipeline's parameters.
        setting: what it is compiled with.
        alarms: the step's alarm (exit status 3) is an answer that the pipeline branches on, and no failure.
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
        elif name in declared.inputs and values:
            for number, path in enumerate(values):
                if path not in made:  # a file of the checkout, and so of the image
                    words.append(path)
                    continue
                entry = name if len(values) == 1 else f"{name}_{number}"
                task, output = made[path]
                interface[entry] = dsl.Input[ARTIFACTS.get(job_output(name, output), dsl.Artifact)]
                arguments[entry] = task.outputs[output]
                words.append(_INPUT % entry)
        elif name in declared.keeps and values:
            words.append(str(SCRATCH / values[0]))
        else:
            interface[name] = _kind(job.step, name)
            held = job.step.name if name == "params" else name
            if interface[name] is not FINAL_STATUS:  # which Kubeflow itself fills in
                arguments[name] = given[held] if held in given else interface[name](*values)
            words.append(_PARAMETER % name)
    command = ["cadx", job.step.name]
    if alarms:
        command = ["sh", "-c", f'cadx {job.step.name} "$@" || test $? = 3', job.step.name]
    placement, image = setting.placements[job.step.name], setting.image_of(job.step)
    if placement.nodes is not None:
        asked = placement.model_dump_json(exclude_defaults=True)
        command = ["python", "-m", "pipelines.nodes", image, asked, *command]
    container = dsl.ContainerSpec(image=image, command=command, args=[*words, "--executor-input", "{{$}}"])
    component = dsl.container_component(
        function(
            job.name,
            summary_of(job.step),
            [parameter(name, annotation) for name, annotation in interface.items()],
            lambda *_: container,
        )
    )
    task = component(**arguments)
    task.set_display_name(job.title).set_caching_options(is_cached(job.step))
    placement.apply(task, retry=is_cached(job.step))
    return task


def job_output(name: str, output: str) -> str:
    """The name that tells an input's type: its maker's, or its own where the maker is an importer or a pipeline."""
    return output if output in ARTIFACTS else name.removeprefix(ALL)


def imported(uri: Any, name: str, title: str) -> Any:
    """A task whose output `artifact` is what lies at an address, registered as what `name` is to Kubeflow."""
    task = dsl.importer(artifact_uri=uri, artifact_class=ARTIFACTS[name], reimport=False)
    return task.set_display_name(title)


def _kind(step: Step, name: str) -> Any:
    """What an argument other than an artifact is to Kubeflow: a Python type."""
    declared = step.declaration()
    if name == "params":
        return dict
    if (step.name, name) == ("notify", "status"):
        return FINAL_STATUS
    return str if name in (*declared.keeps, *declared.inputs) else signature(step).parameters[name].annotation


def parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    """A keyword argument."""
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def pipeline(
    name: str,
    summary: str,
    asked: Mapping[str, inspect.Parameter],
    body: Callable[[dict[str, Any]], Any],
    experiment: str,
    setting: Setting,
    *,
    returns: Any = inspect.Signature.empty,
) -> Any:
    """A pipeline, as kfp compiles and runs it.

    Args:
        name: on Kubeflow's pages.
        summary: what it does, in one line.
        asked: its parameters, by name.
        body: adds the tasks; takes the parameters' channels by name, gives what the pipeline hands on.
        experiment: the one that a notice of the run's end names.
        setting: what it is compiled with.
        returns: the type of what it hands on; nothing for a pipeline that hands on nothing.
    """
    options = dict.fromkeys(signature(step_named("notify")).parameters, ())
    notice = Job(
        step_named("notify"),
        None,
        {**options, "notification": ("notify/notification",), "experiment": (experiment,)},
    )
    ends = [notice] if setting.notifies else []
    asked = {**asked, **parameters(ends, experiment, setting.params)}
    # kfp turns the docstring into the pipeline's description and into its parameters' help.
    steps = {step.name: f"Section of the step: {summary_of(step)}" for step in STEPS}
    lines = [f"    {one}: {steps.get(one) or HELP[one]}" for one in asked]
    doc = "\n".join([summary, "", "Args:", *lines]) + "\n"

    def tasks(*channels: Any) -> Any:
        given = dict(zip(asked, channels, strict=True))
        with ExitStack() as stack:
            for job in ends:
                told = add_job(job, {}, given, setting)
                stack.enter_context(dsl.ExitHandler(told, name=name))
            return body(given)

    return dsl.pipeline(name=name)(function(name, doc, asked.values(), tasks, returns))


HELP = {
    "experiment": "Name of the experiment, which the bundle and every report carry.",
    "model_store": "Folder of TorchServe's archives, on a volume that the server reads too.",
    "key_file": "TorchServe's tokens, key_file.json, from a secret or a volume.",
    "models": "Folder from which serving pods take the model, on a volume.",
    "inference": "Address of TorchServe's inference API.",
    "management": "Address of TorchServe's management API, which only the cluster's inside reaches.",
    "ca_file": "Certificates trusted at an https address, PEM, from a secret or a volume; empty: the image's.",
    "request_log": "Folder of what the served model has answered, on a volume; each pod may have its own in it.",
    "requests": "Folder of the watch's own tables of these, on a volume.",
    "webhook": "Address that an alarm is sent to; empty: none.",
    "bundle_uri": "Where the trained bundle lies, such as s3://models/phantom-xray/bundle; one address, one content.",
    "images_uri": "The folder of files to be answered, such as s3://inbox/2026-11-28.",
}
"""What parameters other than a step's section mean."""


def function(
    name: str,
    doc: str,
    arguments: Iterable[inspect.Parameter],
    body: Callable[..., Any],
    returns: Any = inspect.Signature.empty,
) -> Callable[..., Any]:
    """`body` under a signature of its own: kfp reads all that it needs to know off a function."""

    def run(*values: Any) -> Any:
        return body(*values)

    run.__name__, run.__doc__ = name, doc
    run.__signature__ = inspect.Signature(list(arguments), return_annotation=returns)  # type: ignore[attr-defined]
    return run
