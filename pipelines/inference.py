"""Batch inference on Kubeflow: a bundle's answers for a folder of files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.placement import Placement
from pipelines.tasks import add_jobs, alone, imported, parameter, parameters, pipeline, step_named


def inference(experiment: str, params: Path, image: str, placements: Mapping[str, Placement]) -> Any:
    """A pipeline that answers every file at an address.

    Raises:
        ValueError: as `training`.
    """
    job = alone(step_named("predict"), bundle=("bundle",), images=("images",))
    asked = {
        "bundle_uri": parameter("bundle_uri", str),
        "images_uri": parameter("images_uri", str),
        **parameters([job], experiment, params),
    }

    def tasks(given: Mapping[str, Any]) -> None:
        there = {
            name: (imported(given[f"{name}_uri"], name, name), "artifact") for name in ("bundle", "images")
        }
        add_jobs([job], there, given, image, placements)

    return pipeline(
        f"{experiment}-inference", f"The answers of {experiment} for a folder of files.", asked, tasks
    )
