"""Training on Kubeflow: the stages of dvc.yaml, then the choice of a seed and its deployment.

Invariant: one task per stage and seed, as in DVC's matrix.
"""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from kfp import dsl

from pipelines.placement import Setting
from pipelines.tasks import Job, add_jobs, followers, parameter, parameters, pipeline, sourced, stages


class Trained(NamedTuple):
    """What a training hands to the pipeline around it: the data, and the chosen seed's files."""

    dataset: dsl.Dataset
    metrics: dsl.Metrics
    decision: dsl.Artifact
    archive: dsl.Model
    predictions: dsl.Dataset


def training_jobs(experiment: str, remote: str = "") -> list[Job]:
    """The stages of an experiment, and what follows from them: the choice of a seed, its deployment.

    Args:
        experiment: its name.
        remote: a DVC remote that the dataset is fetched from, in place of ingested.

    Raises:
        ValueError: if dvc.yaml does not hold the experiment, or dvc.lock no dataset of it to be fetched.
    """
    jobs = [*sourced(stages(experiment), experiment, remote)]
    return [*jobs, *followers(jobs)]


def training(
    experiment: str,
    setting: Setting,
    *,
    deploys: bool = True,
) -> Any:
    """An experiment's pipeline, as kfp compiles it and runs it.

    Its parameters are `experiment`, one per step with that step's section, and what deployment has to know
    of the place it deploys to. What is deployed is the first seed that the gate has let through.

    Args:
        experiment: a section of `params` that dvc.yaml names too.
        setting: what it is compiled with.
        deploys: end in deployment; else hand on the chosen seed's files, for a pipeline around this one.

    Raises:
        ValueError: if the parameter file or dvc.yaml does not hold the experiment, or a section does not validate.
    """
    jobs = [job for job in training_jobs(experiment, setting.remote) if deploys or job.step.name != "deploy"]
    asked = {
        "experiment": parameter("experiment", str, experiment),
        **parameters(jobs, experiment, setting.params),
    }

    def tasks(given: Mapping[str, Any]) -> Trained | None:
        made = add_jobs(jobs, {}, given, setting)
        if deploys:
            return None
        chosen, _ = made["choose/choice"]
        dataset = next(task for task, output in made.values() if output == "dataset")
        return Trained(dataset.outputs["dataset"], *(chosen.outputs[name] for name in Trained._fields[1:]))

    summary = f"From the source to a packaged model, step by step as under DVC: {experiment}."
    returns = inspect.Signature.empty if deploys else Trained
    return pipeline(experiment, summary, asked, tasks, experiment, setting, returns=returns)
