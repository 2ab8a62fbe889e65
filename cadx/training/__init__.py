"""Training: one loop for every kind of sample and every family of models.

A recipe is here, without torch; `cadx.training.loop.fit` trains by it.
"""

from cadx.training.recipe import Recipe, SamplerName, TrainingConfig, monitored

__all__ = ["Recipe", "SamplerName", "TrainingConfig", "monitored"]
