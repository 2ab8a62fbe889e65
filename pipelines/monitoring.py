"""The watch over a served model on Kubeflow: what it was asked is compared, and drift starts a training."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from kfp import dsl

from pipelines.placement import Setting
from pipelines.tasks import add_job, alone, imported, parameter, parameters, pipeline, step_named
from pipelines.training import training, training_jobs


def monitoring(experiment: str, setting: Setting) -> Any:
    """A pipeline that watches, and trains anew where the watch alarms; what is promoted goes where `setting` says.

    Its parameters are those of the watch and those of the training. Kubeflow's cache answers a training whose
    parameters and data are the former ones: new data come by a new `ingest.source`, or by `fetch.md5` and its digest.

    Raises:
        ValueError: as `training`.
    """
    watch = alone(step_named("monitor"), bundle=("bundle",))
    retraining = training(experiment, replace(setting, notifies=False))
    asked = {
        "bundle_uri": parameter("bundle_uri", str),
        "experiment": parameter("experiment", str, experiment),
        **parameters([watch, *training_jobs(experiment, setting)], experiment, setting.params),
    }

    def tasks(given: Mapping[str, Any]) -> None:
        bundle = imported(given["bundle_uri"], "bundle", "served bundle")
        watched = add_job(watch, {"bundle": (bundle, "artifact")}, given, setting, alarms=True)
        with dsl.If(watched.outputs["retrain"] == True, "drifted"):  # noqa: E712
            passed = {name: given[name] for name in retraining.component_spec.inputs}
            retraining(**passed).set_display_name("train again")

    summary = f"Has what {experiment} is asked drifted? If so, it is trained again."
    return pipeline(f"{experiment}-monitoring", summary, asked, tasks, experiment, setting)
