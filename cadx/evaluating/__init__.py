"""Evidence: from answers to numbers with intervals, and to the sections of a report."""

from cadx.evaluating.boxes import Detection
from cadx.evaluating.classification import Classification
from cadx.evaluating.evaluation import Aggregation, Evaluation, Settings
from cadx.types import Task


def evaluation_of(task: Task) -> type[Evaluation]:
    """How answers to a task are scored and shown: the registry of their kinds."""
    return Detection if task == "detection" else Classification


__all__ = ["Aggregation", "Classification", "Detection", "Evaluation", "Settings", "evaluation_of"]
