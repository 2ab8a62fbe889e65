"""Evidence: from answers to numbers with intervals, and to the sections of a report."""

from cadx import detection, metrics
from cadx.evaluating.boxes import Detection
from cadx.evaluating.classification import Classification
from cadx.evaluating.evaluation import (
    Aggregation,
    Attribute,
    Evaluation,
    Mistake,
    Settings,
    described,
    judged_on,
    show_assumptions,
)
from cadx.types import Task

METRICS = {**metrics.METRICS, **detection.METRICS}
"""Every metric that an evaluation may hold: what can be bounded, or ranked by."""


def evaluation_of(task: Task) -> type[Evaluation]:
    """How answers to a task are scored and shown: the registry of their kinds."""
    return Detection if task == "detection" else Classification


__all__ = [
    "METRICS",
    "Aggregation",
    "Attribute",
    "Classification",
    "Detection",
    "Evaluation",
    "Mistake",
    "Settings",
    "described",
    "evaluation_of",
    "judged_on",
    "show_assumptions",
]
