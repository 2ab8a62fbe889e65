"""Training on Kubeflow: the stages of dvc.yaml, then the choice of a seed and its way into service.

Invariant: one task per stage and seed, as in DVC's matrix.
"""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from kfp import dsl

from pipelines import Deploy
from pipelines.placement import Setting
from pipelines.tasks import Job, add_jobs, followers, parameter, parameters, pipeline, sourced, stages


class Trained(NamedTuple):
    """What a training hands to the pipeline around it: the data, and the chosen seed's files."""

    dataset: dsl.Dataset
    metrics: dsl.Metrics
    decision: dsl.Artifact
    archive: dsl.Model
    predictions: dsl.Dataset


DEPLOYING: dict[Deploy, str] = {"volume": "deliver", "torchserve": "deploy"}
"""Where a promoted model goes -> the step that brings it there."""


def training_jobs(experiment: str, setting: Setting) -> list[Job]:
    """The stages of an experiment, and what follows from them: the choice of a seed, its way into service.

    Args:
        experiment: its name.
        setting: what it is compiled with.

    Raises:
        ValueError: if dvc.yaml does not hold the experiment, or dvc.lock no dataset of it to be fetched.
    """
    jobs = [*sourced(stages(experiment), experiment, setting.remote)]
    left_out = {*DEPLOYING.values()} - {DEPLOYING.get(setting.deploy)}
    return [*jobs, *(job for job in followers(jobs) if job.step.name not in left_out)]


def training(
    experiment: str,
    setting: Setting,
    *,
    hands_on: bool = False,
) -> Any:
    """An experiment's pipeline, as kfp compiles it and runs it.

    Its parameters are `experiment`, one per step with that step's section, and what has to be known of the place
    that a promoted model goes to: it is the first seed that the gate has let through.

    Args:
        experiment: a section of `params` that dvc.yaml names too.
        setting: what it is compiled with.
        hands_on: hand on the chosen seed's files to a pipeline around this one, and put nothing into service.

    Raises:
        ValueError: if the parameter file or dvc.yaml does not hold the experiment, or a section does not validate.
    """
    if hands_on:
        setting = replace(setting, deploy="none")
    jobs = training_jobs(experiment, setting)
    asked = {
        "experiment": parameter("experiment", str, experiment),
        **parameters(jobs, experiment, setting.params),
    }

    def tasks(given: Mapping[str, Any]) -> Trained | None:
        made = add_jobs(jobs, {}, given, setting)
        if not hands_on:
            return None
        chosen, _ = made["choose/choice"]
        dataset = next(task for task, output in made.values() if output == "dataset")
        return Trained(dataset.outputs["dataset"], *(chosen.outputs[name] for name in Trained._fields[1:]))

    summary = f"From the source to a packaged model, step by step as under DVC: {experiment}."
    returns = Trained if hands_on else inspect.Signature.empty
    return pipeline(experiment, summary, asked, tasks, experiment, setting, returns=returns)
