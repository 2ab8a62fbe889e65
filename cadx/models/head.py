"""The head of classifiers of images and volumes: the attention that is shown is the one that pools."""

from typing import Protocol

import torch
from torch import Tensor, nn

from cadx.models.interface import Output, Pooling


class Backbone(Protocol):
    """What `AttentionPoolingClassifier` asks of a module that extracts features."""

    feature_dim: int

    def extract_features(self, inputs: Tensor) -> Tensor:
        """The feature map, N F ..., of images, N C H W, or volumes, N C D H W, with as many spatial axes."""
        ...

    def stages(self) -> list[nn.Module]:
        """Its blocks in order: the segments of gradient checkpointing."""
        ...


class AttentionPoolingClassifier(nn.Module):
    """A classifier over any backbone; its attention map is the weights by which the prediction pools.

    The pooled features are sum_p a_p f_p over positions p, with a = softmax of a 1x1 convolution of the
    feature map f.

    Source: Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning", eq. 7, with positions as
    instances and a linear score in place of its two-layer one.

    Args:
        backbone: a module with `feature_dim`, `extract_features` and `stages` (see `Backbone`).
        num_classes: K.
        dropout: share of pooled features that are dropped in training.
        pooling: "average" keeps every position's weight equal.
    """

    convolution: type[nn.Conv2d] | type[nn.Conv3d]
    """By which positions are scored: of as many spatial axes as the feature map has."""

    def __init__(
        self, backbone: Backbone, num_classes: int, *, dropout: float = 0.0, pooling: Pooling = "attention"
    ) -> None:
        super().__init__()
        feature_dim = backbone.feature_dim
        self.backbone: Backbone = backbone
        self.attention: nn.Conv2d | nn.Conv3d | None = None
        if pooling == "attention":
            # Without a bias: softmax does not see one. Zero: training starts from average pooling.
            self.attention = self.convolution(feature_dim, 1, 1, bias=False)
            nn.init.zeros_(self.attention.weight)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, inputs: Tensor) -> Output:
        """Logits, attention and features (all float32) of images, N C H W, or volumes, N C D H W.

        Raises:
            ValueError: if they are smaller than the backbone's strides need.
        """
        feature_map = self.backbone.extract_features(inputs)
        if self.attention is None:
            scores = torch.zeros_like(feature_map[:, :1])
        else:
            scores = self.attention(feature_map)
        # Pooling stays in float32 under mixed precision: bfloat16 has 8 bits for a sum over all positions.
        attention = scores.float().flatten(1).softmax(1).view_as(scores)
        features = self._finish((feature_map * attention).sum(tuple(range(2, feature_map.ndim))))
        return Output(self.classifier(self.dropout(features)).float(), attention.squeeze(1), features)

    def stages(self) -> list[nn.Module]:
        """The backbone's blocks in order: what gradient checkpointing may recompute one by one."""
        return self.backbone.stages()

    def _finish(self, pooled: Tensor) -> Tensor:
        """What the classifier sees of the pooled features, N F."""
        return pooled
