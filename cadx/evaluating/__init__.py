"""Evidence: from answers to numbers with intervals, and to the sections of a report."""

from cadx import detection, metrics
from cadx.evaluating import boxes, classification
from cadx.evaluating.boxes import Detection
from cadx.evaluating.classification import Classification, by_patient
from cadx.evaluating.evaluation import (
    Attribute,
    Evaluation,
    Mistake,
    Settings,
    described,
    judged_on,
    show_assumptions,
)
from cadx.evaluating.glossary import show_glossary
from cadx.metrics import Meaning
from cadx.types import Aggregation, Task

METRICS = {**metrics.METRICS, **detection.METRICS}
"""Every metric that an evaluation may hold: what can be bounded, or ranked by."""

HEADLINES: dict[Task, tuple[str, ...]] = {**classification.HEADLINES, "detection": boxes.HEADLINE}
"""The few metrics of each task that a reader looks for first."""


def evaluation_of(task: Task) -> type[Evaluation]:
    """How answers to a task are scored and shown: the registry of their kinds."""
    return Detection if task == "detection" else Classification


def meanings_of(task: Task) -> dict[str, Meaning]:
    """What each metric of a task is; some names stand for one thing of boxes and another of labels."""
    return detection.METRICS if task == "detection" else metrics.METRICS


__all__ = [
    "HEADLINES",
    "METRICS",
    "Aggregation",
    "Attribute",
    "Classification",
    "Detection",
    "Evaluation",
    "Mistake",
    "Settings",
    "by_patient",
    "described",
    "evaluation_of",
    "judged_on",
    "meanings_of",
    "show_assumptions",
    "show_glossary",
]
