"""An existing bundle scored on another site's data on Kubeflow: does the network travel?"""

from collections.abc import Mapping
from typing import Any

from pipelines.placement import Setting
from pipelines.tasks import add_jobs, imported, one_seed, parameter, parameters, pipeline, sourced

SCORED = 0.97
"""Share of the site's patients that are scored: nothing is trained, so the other parts are as small as may be."""


def evaluation(experiment: str, setting: Setting) -> Any:
    """A pipeline that ingests a site's data and holds a bundle against them: report, metrics, decision.

    Args:
        experiment: the site's: its catalogue entry and sections.
        setting: what it is compiled with.

    Raises:
        ValueError: as `training`.
    """
    stages = one_seed(experiment, "ingest", "validate", "split", "evaluate", "gate")
    jobs = [*sourced(stages, experiment, setting.remote)]
    [bundle] = {job.arguments["bundle"] for job in jobs if "bundle" in job.arguments}
    rest = (1 - SCORED) / 3
    asked = {
        "bundle_uri": parameter("bundle_uri", str),
        **parameters(
            jobs,
            experiment,
            setting.params,
            split={"fractions": {"train": rest, "val": rest, "calibration": rest, "test": SCORED}},
            evaluate={"split": "test"},
            gate={"other_dataset": True},
        ),
    }

    def tasks(given: Mapping[str, Any]) -> None:
        there = {bundle[0]: (imported(given["bundle_uri"], "bundle", "bundle"), "artifact")}
        add_jobs(jobs, there, given, setting)

    summary = f"A bundle from elsewhere, scored on the data of {experiment}."
    return pipeline(f"{experiment}-evaluation", summary, asked, tasks, experiment, setting)
