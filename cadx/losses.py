"""Losses for imbalanced classes: weighted cross-entropy, focal loss, and the focal loss of detectors.

Those of classifiers take logits N K and targets N K (0..1, NaN = unlabelled) and return a scalar. Softmax losses take a
row with any NaN as unlabelled; multilabel (sigmoid) losses mask label by label. A batch without a label
gives 0, still attached to the graph.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadx.weighting import BoxLoss


class FocalLoss(nn.Module):
    """Focal loss, -alpha (1 - p)^gamma log p, as the mean over what is labelled.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5; the softmax form puts the
    probability of the target class for p. With label smoothing, each class's term is weighted by its share
    of the smoothed target. Alpha is not divided out: gamma = 0 with weights is the weighted sum over N.

    Args:
        alpha: a factor. Softmax: a scalar for all classes, or one per class. Multilabel: the weight of the
            present, 1 - alpha that of the absent, as a scalar or per class; or K 2 weights (absent, present).
        gamma: how strongly the easy are turned down.
        multilabel: independent sigmoids instead of one softmax.
        label_smoothing: share of the target that is spread evenly.
    """

    def __init__(
        self,
        alpha: float | Sequence[float] | Tensor | None = None,
        gamma: float = 2.0,
        *,
        multilabel: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.alpha: Tensor | None
        weights = None if alpha is None else torch.as_tensor(alpha, dtype=torch.get_default_dtype())
        if weights is not None and multilabel and weights.ndim < 2:
            weights = torch.stack([1 - weights, weights], -1)
        self.register_buffer("alpha", weights)
        self.gamma, self.multilabel, self.label_smoothing = gamma, multilabel, label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of `logits`, N K, against `targets`, N K, or, with softmax, N class numbers."""
        losses, _, labelled = _terms(
            logits, targets, self.alpha, self.gamma, self.label_smoothing, multilabel=self.multilabel
        )
        return _ratio(losses, labelled)

    def weight(self, targets: Tensor) -> Tensor:
        """What the sum over a batch is divided by: means of parts, weighted by it, give the mean of the whole."""
        return _labelled(targets, multilabel=self.multilabel).sum()


class BalancedCrossEntropyLoss(nn.Module):
    """Weighted cross-entropy: the weighted sum over the sum of the weights, as in torch's `cross_entropy`.

    Args:
        class_weights: softmax: one per class; multilabel: K 2 (absent, present); None: all 1.
        multilabel: independent sigmoids instead of one softmax.
        label_smoothing: share of the target that is spread evenly.
    """

    def __init__(
        self,
        class_weights: Sequence[float] | Tensor | None = None,
        *,
        multilabel: bool = False,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__()
        self.class_weights: Tensor | None
        weights = None
        if class_weights is not None:
            weights = torch.as_tensor(class_weights, dtype=torch.get_default_dtype())
        self.register_buffer("class_weights", weights)
        self.multilabel, self.label_smoothing = multilabel, label_smoothing

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of `logits`, N K, against `targets`, N K, or, with softmax, N class numbers."""
        losses, weights, _ = _terms(
            logits, targets, self.class_weights, 0.0, self.label_smoothing, multilabel=self.multilabel
        )
        return _ratio(losses, weights)

    def weight(self, targets: Tensor) -> Tensor:
        """What the sum over a batch is divided by: means of parts, weighted by it, give the mean of the whole."""
        weights = torch.ones((), device=targets.device) if self.class_weights is None else self.class_weights
        outcomes = torch.stack([1 - targets, targets], -1) if self.multilabel else targets
        weights = (outcomes.nan_to_num(0.0) * weights).sum(-1)
        return torch.where(_labelled(targets, multilabel=self.multilabel), weights, 0.0).sum()


def _terms(
    logits: Tensor,
    targets: Tensor,
    weights: Tensor | None,
    gamma: float,
    smoothing: float,
    *,
    multilabel: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted loss, weight and 0/1 mask of the labelled: per sample, or per label for multilabel."""
    if targets.ndim == 1:
        targets = F.one_hot(targets, logits.shape[1])
    targets = targets.to(logits.dtype)
    # Both forms are one: outcomes along the last axis, N K for softmax, N K 2 (absent, present) else.
    if multilabel:
        log_probs = torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], -1)
        targets = torch.stack([1 - targets, targets], -1)
    else:
        log_probs = logits.log_softmax(-1)
    labelled = targets.isfinite().all(-1)
    targets = targets.nan_to_num(0.0)
    smoothed = targets * (1 - smoothing) + smoothing / targets.shape[-1]
    each = -log_probs
    if gamma > 0:
        # 1 - p without cancellation; off zero, where a power below 1 has no finite slope.
        each = each * (-torch.expm1(log_probs)).clamp_min(torch.finfo(logits.dtype).tiny) ** gamma
    if weights is None:
        weights = torch.ones((), dtype=logits.dtype, device=logits.device)
    losses = torch.where(labelled, (each * smoothed * weights).sum(-1), 0.0)
    return losses, torch.where(labelled, (targets * weights).sum(-1), 0.0), labelled.to(logits.dtype)


def _labelled(targets: Tensor, *, multilabel: bool) -> Tensor:
    finite = targets.isfinite()
    return finite if multilabel else finite.all(-1)


def _ratio(losses: Tensor, weights: Tensor) -> Tensor:
    total = weights.sum()
    return losses.sum() / total.where(total > 0, torch.ones_like(total))


class AssignedTargets(NamedTuple):
    """What the A locations of each of N images are to say, as a detector's assigner decided.

    Attributes:
        qualities: N A float32, 0..1: the objectness to learn; 0 is the background, 1 a perfect box.
        labels: N A int64, 0-based classes; without meaning in the background.
        boxes_xyxy: N A 4 float32, in pixels; without meaning in the background.
    """

    qualities: Tensor
    labels: Tensor
    boxes_xyxy: Tensor


class FocalLossForDetection(nn.Module):
    """Focal objectness, class and box loss of a one-stage detector, each a scalar, given what was assigned.

    Objectness, over all locations: alpha_t |q - p|^gamma BCE(p, q) for the probability p and the quality q. In
    the background that is p^gamma: the easy vanish and the hard stay; where q is 1 it is (1 - p)^gamma.
    Class, over the locations of lesions and weighted by q: the cross-entropy of a softmax over classes. Box, over
    the same with the same weight: 1 - GIoU or 1 - CIoU, which do not depend on a lesion's size. Each sum is
    divided by the sum of all q, or by 1 if that is less: a batch without a lesion is ordinary.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", eq. 5, in the form for soft targets of Li et
    al. 2020, "Generalized Focal Loss", eq. 5; weights and divisor as in Feng et al. 2021, "TOOD", eqs. 6 to 8.
    Rezatofighi et al. 2019, "Generalized Intersection over Union"; Zheng et al. 2020, "Distance-IoU Loss", eqs. 8
    to 11 (CIoU). Ours is the class as a softmax beside the objectness: a location shows one lesion or none.

    Args:
        alpha: weight of the locations of lesions, 1 - alpha that of the background; None: 1 each.
        gamma: how strongly the easy are turned down, 0 or more.
        box_loss: "giou", or "ciou", which asks for the centre and the aspect ratio too.
        objectness_weight: factor of the objectness loss.
        class_weight: factor of the class loss.
        box_weight: factor of the box loss.
    """

    def __init__(
        self,
        alpha: float | None = 0.25,
        gamma: float = 2.0,
        *,
        box_loss: BoxLoss = "ciou",
        objectness_weight: float = 1.0,
        class_weight: float = 1.0,
        box_weight: float = 2.0,
    ) -> None:
        super().__init__()
        self.alpha, self.gamma, self.box_loss = alpha, gamma, box_loss
        self.objectness_weight, self.class_weight = objectness_weight, class_weight
        self.box_weight = box_weight

    def objectness_losses(self, logits: Tensor, qualities: Tensor) -> Tensor:
        """The focal loss of each location, shaped as `logits` and `qualities` (0..1): what mining ranks."""
        losses = F.binary_cross_entropy_with_logits(logits, qualities, reduction="none")
        if self.gamma > 0:
            # Off zero, where a power below 1 has no finite slope.
            distance = (qualities - logits.sigmoid()).abs().clamp_min(torch.finfo(logits.dtype).tiny)
            losses = losses * distance**self.gamma
        if self.alpha is not None:
            losses = losses * torch.where(qualities > 0, self.alpha, 1 - self.alpha)
        return losses

    def forward(
        self,
        objectness_logits: Tensor,
        class_logits: Tensor,
        boxes_xyxy: Tensor,
        targets: AssignedTargets,
        counted: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The weighted losses "objectness", "class" and "box"; their sum is what to minimise.

        Args:
            objectness_logits: N A.
            class_logits: N A K.
            boxes_xyxy: N A 4, in pixels, x0 < x1 and y0 < y1.
            targets: what was assigned to these locations.
            counted: N A bool, the locations whose objectness counts (`HardNegativeMiner`); None: all.
        """
        from torchvision.ops import complete_box_iou_loss, generalized_box_iou_loss

        objectness = self.objectness_losses(objectness_logits, targets.qualities)
        if counted is not None:
            objectness = torch.where(counted, objectness, 0.0)
        lesion = targets.qualities > 0
        weights = targets.qualities[lesion]
        class_losses = F.cross_entropy(class_logits[lesion], targets.labels[lesion], reduction="none")
        overlap_loss = complete_box_iou_loss if self.box_loss == "ciou" else generalized_box_iou_loss
        box_losses = overlap_loss(boxes_xyxy[lesion], targets.boxes_xyxy[lesion])
        total = targets.qualities.sum().clamp_min(1.0)
        return {
            "objectness": self.objectness_weight * objectness.sum() / total,
            "class": self.class_weight * (weights * class_losses).sum() / total,
            "box": self.box_weight * (weights * box_losses).sum() / total,
        }
