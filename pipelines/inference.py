"""Batch inference on Kubeflow: a bundle's answers for a folder of files."""

from collections.abc import Mapping
from typing import Any

from pipelines.placement import Setting
from pipelines.tasks import add_jobs, alone, imported, parameter, parameters, pipeline, step_named


def inference(experiment: str, setting: Setting) -> Any:
    """A pipeline that answers every file at an address.

    Raises:
        ValueError: as `training`.
    """
    job = alone(step_named("predict"), bundle=("bundle",), images=("images",))
    asked = {
        "bundle_uri": parameter("bundle_uri", str),
        "images_uri": parameter("images_uri", str),
        **parameters([job], experiment, setting.params),
    }

    def tasks(given: Mapping[str, Any]) -> None:
        there = {
            name: (imported(given[f"{name}_uri"], name, name), "artifact") for name in ("bundle", "images")
        }
        add_jobs([job], there, given, setting)

    summary = f"The answers of {experiment} for a folder of files."
    return pipeline(f"{experiment}-inference", summary, asked, tasks, experiment, setting)
