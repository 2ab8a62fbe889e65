"""Several experiments on the same data side by side, their comparison, and the best promoted one in service."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from components.contract import read_experiment
from pipelines.placement import Setting
from pipelines.tasks import ALL, Made, add_jobs, alone, parameters, pipeline, step_named
from pipelines.training import DEPLOYING, Trained, training

COMPARABLE = ("split", "evaluate")
"""Sections that must be equal for numbers to be comparable; `choose` checks the samples themselves."""


def families(experiments: Sequence[str], setting: Setting) -> Any:
    """A pipeline of several experiments' trainings, each a pipeline within it.

    Each training hands on its first promoted seed; of these the best by `choose.metric` is put into service.

    Args:
        experiments: the first one's sections give the defaults of comparison and deployment.
        setting: what it is compiled with.

    Raises:
        ValueError: if fewer than two are named, one twice, or two divide or score their data differently.
    """
    if len(experiments) < 2 or len(set(experiments)) < len(experiments):
        raise ValueError(f"families: {', '.join(experiments)}: name at least two experiments, each once")
    first = experiments[0]
    sections = {experiment: read_experiment(setting.params, experiment) for experiment in experiments}
    for section in COMPARABLE:
        for experiment in experiments[1:]:
            if sections[experiment].get(section) != sections[first].get(section):
                raise ValueError(
                    f"{setting.params}: {experiment}.{section} differs from {first}.{section}: their numbers would "
                    "not be comparable; make them equal"
                )
    inputs = {
        f"{ALL}{name}": tuple(f"{experiment}/{name}" for experiment in experiments)
        for name in ("metrics", "decision", "archive", "predictions")
    }
    choice = alone(step_named("choose"), **inputs)
    last = [choice]
    if setting.deploy != "none":
        chosen = {name: (f"choose/{name}",) for name in ("archive", "decision", "predictions")}
        last.append(alone(step_named(DEPLOYING[setting.deploy]), dataset=(f"{first}/dataset",), **chosen))
    asked = parameters(last, first, setting.params, choose={"metric": "auc"})
    trainings = {
        experiment: training(experiment, replace(setting, notifies=False), hands_on=True)
        for experiment in experiments
    }

    def tasks(given: Mapping[str, Any]) -> None:
        made: Made = {}
        for experiment, inner in trainings.items():
            trained = inner().set_display_name(experiment)
            made |= {f"{experiment}/{name}": (trained, name) for name in Trained._fields}
        add_jobs(last, made, given, setting)

    summary = f"Trained side by side, compared, the best put into service: {', '.join(experiments)}."
    return pipeline(f"{first}-families", summary, asked, tasks, first, setting)
