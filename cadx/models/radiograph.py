"""Classifiers of 2D radiographs: torchvision's ResNet and DenseNet under an attention-pooling head.

The attention map that is shown is the very set of weights by which the prediction pools its features; it
starts uniform, so that training starts from average pooling.
"""

from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from cadx.transforms import Cells
from cadx.types import Config

Stem = Literal["standard", "small"]
Pooling = Literal["attention", "average"]
Norm = Literal["batch", "group"]


class Output(NamedTuple):
    """What a classifier says of a batch.

    Attributes:
        logits: N K, raw scores of the K classes.
        attention: N h w, the share of each position in the prediction; each map sums to 1.
        features: N F, the pooled features that the classifier sees.
    """

    logits: Tensor
    attention: Tensor
    features: Tensor


class Backbone(Protocol):
    """What `MedicalClassificationModel` asks of a module that extracts features."""

    feature_dim: int

    def extract_features(self, images: Tensor) -> Tensor:
        """The feature map, N F h w, of `images`, N C H W."""
        ...


class RadiographConfig(Config):
    """What both families share.

    Attributes:
        stem: "standard", 7x7 stride 2 and max pooling: the map is 1/32 of the image; "small", 3x3 stride 1
            and no pooling, for images of about 32 px: the map is 1/8.
        dropout: share of pooled features that are dropped in training.
        pooling: how the prediction pools the feature map.
        norm: "group" does not depend on the batch: for batches of a few images.
        pretrained: a local state dict under torchvision's names, `.safetensors` or torch's own format.
    """

    stem: Stem = "standard"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pooling: Pooling = "attention"
    norm: Norm = "batch"
    pretrained: Path | None = None


class ResNetConfig(RadiographConfig):
    """A ResNet: `depth` layers, `width` as a share of the usual channels (0.5 = half)."""

    family: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50] = 18
    width: Annotated[float, Field(gt=0, le=4)] = 1.0

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie: every stride of a ResNet starts at the first pixel."""
        return Cells(stride_px=32 if self.stem == "standard" else 8, first_centre_px=0.5)

    def build(self, num_classes: int, channels: int) -> "MedicalResNet":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        return MedicalResNet(num_classes, channels, self)


class DenseNetConfig(RadiographConfig):
    """A DenseNet: layers per dense block, each of which adds `growth_rate` channels."""

    family: Literal["densenet"] = "densenet"
    growth_rate: Annotated[int, Field(ge=1)] = 32
    block_config: tuple[int, int, int, int] = (6, 12, 24, 16)

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie: each transition averages two, and moves the first by half a one."""
        stem_px = 4 if self.stem == "standard" else 1
        return Cells(stride_px=8 * stem_px, first_centre_px=0.5 + stem_px * (1 + 2 + 4) / 2)

    def build(self, num_classes: int, channels: int) -> "DenseNetMedical":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        return DenseNetMedical(num_classes, channels, self)


class MedicalClassificationModel(nn.Module):
    """A classifier over any backbone; its attention map is the weights by which the prediction pools.

    The pooled features are sum_p a_p f_p over positions p, with a = softmax of a 1x1 convolution of the
    feature map f. Of the chapter's result, `predictions` is the softmax (or, for multilabel, the sigmoid) of
    `Output.logits`, `attention_maps` is `Output.attention`, and `features` is `Output.features`.

    Source: Ilse et al. 2018, "Attention-based Deep Multiple Instance Learning", eq. 7, with positions as
    instances and a linear score in place of its two-layer one.

    Args:
        backbone: a module with `feature_dim` and `extract_features` (see `Backbone`).
        num_classes: K.
        dropout: share of pooled features that are dropped in training.
        pooling: "average" keeps every position's weight equal.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, *, dropout: float = 0.0, pooling: Pooling = "attention"
    ) -> None:
        super().__init__()
        feature_dim = backbone.feature_dim
        self.backbone: Backbone = backbone
        self.attention: nn.Conv2d | None = None
        if pooling == "attention":
            # Without a bias: softmax does not see one. Zero: training starts from average pooling.
            self.attention = nn.Conv2d(feature_dim, 1, 1, bias=False)
            nn.init.zeros_(self.attention.weight)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(feature_dim, num_classes)

    def forward(self, images: Tensor) -> Output:
        """Logits, attention and features (all float32) of `images`, N C H W."""
        feature_map = self.backbone.extract_features(images)
        if self.attention is None:
            scores = torch.zeros_like(feature_map[:, :1])
        else:
            scores = self.attention(feature_map)
        # Pooling stays in float32 under mixed precision: bfloat16 has 8 bits for a sum over all positions.
        attention = scores.float().flatten(1).softmax(1).view_as(scores)
        features = (feature_map * attention).sum((2, 3))
        return Output(self.classifier(self.dropout(features)).float(), attention.squeeze(1), features)


class MedicalResNet(MedicalClassificationModel):
    """A ResNet classifier of radiographs; by default ResNet-50 on one gray channel.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", in torchvision's form (stride in
    the 3x3 convolution of a bottleneck).
    """

    def __init__(self, num_classes: int = 2, channels: int = 1, config: ResNetConfig | None = None) -> None:
        from cadx.models.backbones import ResNetBackbone

        config = config or ResNetConfig(depth=50)
        super().__init__(
            ResNetBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )


class DenseNetMedical(MedicalClassificationModel):
    """A DenseNet classifier of radiographs; by default DenseNet-121 on one gray channel.

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks" (DenseNet-BC).
    """

    def __init__(self, num_classes: int = 2, channels: int = 1, config: DenseNetConfig | None = None) -> None:
        from cadx.models.backbones import DenseNetBackbone

        config = config or DenseNetConfig()
        super().__init__(
            DenseNetBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )
