"""Answers: from a bundle and raw samples to probabilities, decisions and tables of them."""

from cadx.predicting.predictor import RANGE_MARGIN, Predictor, pool_logits
from cadx.predicting.table import (
    UNCLUSTERED,
    Arrays,
    PredictionsInfo,
    age_band,
    answer_table,
    arrays,
    decide,
    read_predictions,
    subgroups,
    write_predictions,
)

__all__ = [
    "RANGE_MARGIN",
    "UNCLUSTERED",
    "Arrays",
    "PredictionsInfo",
    "Predictor",
    "age_band",
    "answer_table",
    "arrays",
    "decide",
    "pool_logits",
    "read_predictions",
    "subgroups",
    "write_predictions",
]
