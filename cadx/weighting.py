"""Which loss, and how its classes are weighted by their counts: what can be said of `cadx.losses` without torch."""

from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field

from cadx.types import Config, Task

if TYPE_CHECKING:  # importing torch takes two seconds
    from torch import nn

Weighting = Literal["none", "balanced", "effective_number"]
BoxLoss = Literal["giou", "ciou"]


class LossConfig(Config):
    """The choice of a loss.

    Attributes:
        kind: "focal" turns the loss down on what is already classified well.
        weights: how classes are weighted by their counts in the training split (`class_weights`).
        gamma: focal loss: how strongly the easy are turned down; 0 is cross-entropy.
        label_smoothing: share of the target that is spread evenly.
        beta: effective number: 1 - 1/beta counts saturate; near 1 it is "balanced".
    """

    kind: Literal["cross_entropy", "focal"] = "cross_entropy"
    weights: Weighting = "none"
    gamma: Annotated[float, Field(ge=0)] = 2.0
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    beta: Annotated[float, Field(ge=0, lt=1)] = 0.999

    def build(self, task: Task, class_counts: np.ndarray) -> "nn.Module":
        """The loss for a task, from `count_labels` of its training split."""
        import torch

        from cadx.losses import BalancedCrossEntropyLoss, FocalLoss

        multilabel = task == "multilabel"
        weights = None
        if self.weights != "none":
            rows = class_counts if multilabel else class_counts[:, 1]
            weights = torch.tensor(class_weights(rows, self.weights, self.beta), dtype=torch.float32)
        if self.kind == "focal":
            return FocalLoss(weights, self.gamma, multilabel=multilabel, label_smoothing=self.label_smoothing)
        return BalancedCrossEntropyLoss(weights, multilabel=multilabel, label_smoothing=self.label_smoothing)


def count_labels(labels: np.ndarray) -> np.ndarray:
    """K 2 counts of the absent (0) and the present (1) in `labels`, N K; NaN is neither.

    >>> count_labels(np.array([[1, 0], [0, 1], [0, 1], [np.nan, np.nan]])).tolist()
    [[2, 1], [1, 2]]
    """
    return np.stack([(labels == 0).sum(0), (labels == 1).sum(0)], axis=1)


def class_weights(counts: np.ndarray, weighting: Weighting, beta: float = 0.999) -> np.ndarray:
    """A weight per count, along the last axis; their mean over the counted samples is 1.

    A class without a sample has weight 0, so that no infinity arises.

    Source: "effective_number" is Cui et al. 2019, "Class-Balanced Loss Based on Effective Number of Samples",
    eq. 4, (1 - beta) / (1 - beta^n), normalised over samples rather than over classes.

    >>> class_weights(np.array([900, 100, 0]), "balanced").round(3).tolist()
    [0.556, 5.0, 0.0]
    >>> class_weights(np.array([900, 100]), "effective_number", beta=0.0).tolist()
    [1.0, 1.0]
    """
    counts = np.asarray(counts, dtype=np.float64)
    effective = {
        "none": np.ones_like(counts),
        "balanced": counts,
        "effective_number": -np.expm1(counts * np.log(beta)) if beta > 0 else np.ones_like(counts),
    }[weighting]
    raw = np.divide(1.0, effective, out=np.zeros_like(counts), where=counts > 0)
    total = (raw * counts).sum(-1, keepdims=True)
    return raw * np.divide(counts.sum(-1, keepdims=True), total, out=np.zeros_like(total), where=total > 0)
