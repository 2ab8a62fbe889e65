"""Answers: from a bundle and raw samples to probabilities, decisions and tables of them."""

from cadx.predicting.boxes import detection_table, image_answers
from cadx.predicting.folds import out_of_fold
from cadx.predicting.predictor import RANGE_MARGIN, Predictor, pool_logits, prevalence_of, subject_of
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
