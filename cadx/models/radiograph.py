"""Classifiers of 2D radiographs: torchvision's ResNet, DenseNet and ConvNeXt under an attention-pooling head.

The attention map that is shown is the very set of weights by which the prediction pools its features; it
starts uniform, so that training starts from average pooling.
"""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from cadx.models.head import AttentionPoolingClassifier
from cadx.models.radiograph_config import (
    ConvNeXtConfig,
    DenseNetConfig,
    RadiographConfig,
    ResNetConfig,
    Stem,
)

if TYPE_CHECKING:
    from cadx.models.backbones import ConvNeXtBackbone

__all__ = [
    "ConvNeXtConfig",
    "ConvNeXtMedical",
    "DenseNetConfig",
    "DenseNetMedical",
    "MedicalClassificationModel",
    "MedicalResNet",
    "RadiographConfig",
    "ResNetConfig",
    "Stem",
]


class MedicalClassificationModel(AttentionPoolingClassifier):
    """`AttentionPoolingClassifier` of images, N C H W.

    Of the chapter's result, `predictions` is the softmax (or, for multilabel, the sigmoid) of
    `Output.logits`, `attention_maps` is `Output.attention`, and `features` is `Output.features`.
    """

    convolution = nn.Conv2d


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


class ConvNeXtMedical(MedicalClassificationModel):
    """A ConvNeXt classifier of radiographs; by default ConvNeXt-Tiny on one gray channel.

    The pooled features are normalised before the classifier sees them, as in the paper.

    Source: Liu et al. 2022, "A ConvNet for the 2020s", in torchvision's form.
    """

    backbone: "ConvNeXtBackbone"

    def __init__(self, num_classes: int = 2, channels: int = 1, config: ConvNeXtConfig | None = None) -> None:
        from cadx.models.backbones import ConvNeXtBackbone

        config = config or ConvNeXtConfig()
        super().__init__(
            ConvNeXtBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )

    def _finish(self, pooled: Tensor) -> Tensor:
        return self.backbone.normalise(pooled)
