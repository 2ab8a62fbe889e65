"""Training on Kubeflow: the stages of dvc.yaml, then the choice of a seed and its deployment.

Invariant: one task per stage and seed, as in DVC's matrix.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from kfp import dsl

from pipelines.placement import Placement
from pipelines.tasks import Job, add_jobs, followers, parameter, parameters, pipeline, stages


class Trained(NamedTuple):
    """What a training hands to the pipeline around it: the data, and the chosen seed's files."""

    dataset: dsl.Dataset
    metrics: dsl.Metrics
    decision: dsl.Artifact
    archive: dsl.Model
    predictions: dsl.Dataset


def training_jobs(experiment: str) -> list[Job]:
    """The stages of an experiment, and what follows from them: the choice of a seed, its deployment.

    Raises:
        ValueError: if dvc.yaml does not hold the experiment.
    """
    jobs = [*stages(experiment)]
    return [*jobs, *followers(jobs)]


def training(
    experiment: str,
    params: Path,
    image: str,
    placements: Mapping[str, Placement],
    *,
    deploys: bool = True,
) -> Any:
    """An experiment's pipeline, as kfp compiles it and runs it.

    Its parameters are `experiment`, one per step with that step's section, and what deployment has to know
    of the place it deploys to. What is deployed is the first seed that the gate has let through.

    Args:
        experiment: a section of `params` that dvc.yaml names too.
        params: the parameter file.
        image: the container's.
        placements: step -> where it runs.
        deploys: end in deployment; else hand on the chosen seed's files, for a pipeline around this one.

    Raises:
        ValueError: if `params` or dvc.yaml does not hold the experiment, or a section does not validate.
    """
    jobs = [job for job in training_jobs(experiment) if deploys or job.step.name != "deploy"]
    asked = {
        "experiment": parameter("experiment", str, experiment),
        **parameters(jobs, experiment, params),
    }

    def tasks(given: Mapping[str, Any]) -> Trained | None:
        made = add_jobs(jobs, {}, given, image, placements)
        if deploys:
            return None
        chosen, _ = made["choose/choice"]
        dataset = next(task for task, output in made.values() if output == "dataset")
        return Trained(dataset.outputs["dataset"], *(chosen.outputs[name] for name in Trained._fields[1:]))

    summary = f"From the source to a packaged model, step by step as under DVC: {experiment}."
    return pipeline(experiment, summary, asked, tasks, inspect.Signature.empty if deploys else Trained)
