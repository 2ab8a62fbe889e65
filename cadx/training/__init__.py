"""Training: one loop for every kind of sample and every family of models."""

from cadx.training.loop import Fitted, discard_checkpoint, fit, learning_rate_factor, run_key
from cadx.training.recipe import Recipe, SamplerName, TrainingConfig, monitored
from cadx.training.workload import macro_auc

train_medical_detector = fit
"""The source text's name: a detector has the same trainer as every other family."""

__all__ = [
    "Fitted",
    "Recipe",
    "SamplerName",
    "TrainingConfig",
    "discard_checkpoint",
    "fit",
    "learning_rate_factor",
    "macro_auc",
    "monitored",
    "run_key",
    "train_medical_detector",
]
