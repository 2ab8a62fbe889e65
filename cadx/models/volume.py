"""Classifiers of 3D volumes and patches: MONAI's ResNet and DenseNet under an attention-pooling head.

As for radiographs, the attention map that is shown is the very set of weights by which the prediction pools
its features, and starts uniform.
"""

from typing import Literal

from torch import nn

from cadx.models.checkpointing import enable_checkpointing
from cadx.models.head import AttentionPoolingClassifier
from cadx.models.volume_config import STEM_PX, DenseNet3DConfig, ResNet3DConfig, Stem, VolumeConfig

__all__ = [
    "STEM_PX",
    "DenseNet3DConfig",
    "Medical3DDenseNet",
    "Medical3DResNet",
    "MedicalVolumeModel",
    "MemoryEfficient3DNet",
    "ResNet3DConfig",
    "Stem",
    "VolumeConfig",
    "create_medical_3d_resnet",
]


class MedicalVolumeModel(AttentionPoolingClassifier):
    """`AttentionPoolingClassifier` of volumes, N C D H W."""

    convolution = nn.Conv3d


class Medical3DResNet(MedicalVolumeModel):
    """A ResNet classifier of volumes; by default ResNet-18 on one channel.

    Source: He et al. 2016, "Deep Residual Learning for Image Recognition", with 3D kernels as Hara et al. 2018,
    "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and ImageNet?", in MONAI's form; the stem has
    stride 2 along every axis (theirs keeps the first) unless `stem` says otherwise, and every shortcut that
    changes the shape is a convolution (theirs pads with zeros in ResNet-18 and 34).
    """

    def __init__(self, num_classes: int = 2, channels: int = 1, config: ResNet3DConfig | None = None) -> None:
        from cadx.models.volume_networks import ResNet3DBackbone

        config = config or ResNet3DConfig()
        super().__init__(
            ResNet3DBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )


class Medical3DDenseNet(MedicalVolumeModel):
    """A DenseNet classifier of volumes; by default DenseNet-121 on one channel.

    Source: Huang et al. 2017, "Densely Connected Convolutional Networks" (DenseNet-BC), with 3D kernels.
    """

    def __init__(
        self, num_classes: int = 2, channels: int = 1, config: DenseNet3DConfig | None = None
    ) -> None:
        from cadx.models.volume_networks import DenseNet3DBackbone

        config = config or DenseNet3DConfig()
        super().__init__(
            DenseNet3DBackbone(channels, config), num_classes, dropout=config.dropout, pooling=config.pooling
        )


class MemoryEfficient3DNet(Medical3DResNet):
    """A `Medical3DResNet` that is trained with gradient checkpointing: the same numbers in less memory.

    The chapter's name for one network; `enable_checkpointing` does the same to any.
    """

    def __init__(self, num_classes: int = 2, channels: int = 1, config: ResNet3DConfig | None = None) -> None:
        super().__init__(num_classes, channels, config)
        enable_checkpointing(self)


def create_medical_3d_resnet(
    model_depth: Literal[10, 18, 34, 50] = 18, num_classes: int = 2, channels: int = 1
) -> Medical3DResNet:
    """A 3D ResNet of so many layers with random weights: the source text's name for `ResNet3DConfig.build`."""
    return ResNet3DConfig(depth=model_depth).build(num_classes, channels)
