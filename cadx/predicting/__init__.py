"""Answers: from a bundle and raw samples to probabilities, decisions and tables of them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from cadx.predicting.prevalence import prevalence_of
from cadx.predicting.table import (
    UNCLUSTERED,
    Arrays,
    PredictionsInfo,
    age_band,
    answer_table,
    arrays,
    box_lists,
    box_table,
    decide,
    read_predictions,
    subgroups,
    write_predictions,
)

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.predicting.boxes import detection_table, image_answers
    from cadx.predicting.folds import out_of_fold
    from cadx.predicting.predictor import RANGE_MARGIN, Predictor, pool_logits, subject_of

__all__ = [
    "RANGE_MARGIN",
    "UNCLUSTERED",
    "Arrays",
    "PredictionsInfo",
    "Predictor",
    "age_band",
    "answer_table",
    "arrays",
    "box_lists",
    "box_table",
    "decide",
    "detection_table",
    "image_answers",
    "out_of_fold",
    "pool_logits",
    "prevalence_of",
    "read_predictions",
    "subgroups",
    "subject_of",
    "write_predictions",
]

_WITH_TORCH = {
    "RANGE_MARGIN": "predictor",
    "Predictor": "predictor",
    "detection_table": "boxes",
    "image_answers": "boxes",
    "out_of_fold": "folds",
    "pool_logits": "predictor",
    "subject_of": "predictor",
}


def __getattr__(name: str) -> Any:
    """What asks a network, imported when it is asked for: a step that reads tables of answers needs no torch."""
    if name in _WITH_TORCH:
        return getattr(import_module(f"{__name__}.{_WITH_TORCH[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
