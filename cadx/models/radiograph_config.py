"""The configurations of `cadx.models.radiograph`, without torch."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cadx.models.interface import ImageNorm, Pooling, Pretrained
from cadx.transforms import Cells
from cadx.types import Config

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.models.radiograph import ConvNeXtMedical, DenseNetMedical, MedicalResNet

Stem = Literal["standard", "small"]
_Depth = Annotated[int, Field(ge=1)]


class RadiographConfig(Config):
    """What the families share.

    Attributes:
        stem: "standard", the published one: the map is 1/32 of the image; "small", 3x3 stride 1 and no
            pooling, for images of about 32 px: the map is 1/8.
        dropout: share of pooled features that are dropped in training.
        pooling: how the prediction pools the feature map.
        pretrained: a local state dict under torchvision's names, `.safetensors` or torch's own format; or
            torchvision's published one by name, as "torchvision:IMAGENET1K_V1". Kernels of an RGB stem are
            folded to the channels at hand, all of equal weight: an image that is equal in all of its
            channels has the features of its RGB copy, be they 1 (gray), 4 or 7 (stains, energies, phases).
    """

    takes: ClassVar = "images"

    stem: Stem = "standard"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pooling: Pooling = "attention"
    pretrained: Pretrained | None = None

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie in the input."""
        raise NotImplementedError


class ResNetConfig(RadiographConfig):
    """A ResNet.

    Attributes:
        depth: layers.
        width: as a share of the usual channels (0.5 = half).
        norm: "group" does not depend on the batch: for batches of a few images. Nor does "frozen_batch",
            which keeps the statistics and scales of `pretrained`, and without it normalises nothing.
    """

    family: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50] = 18
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    norm: ImageNorm = "batch"

    @property
    def architecture(self) -> str:
        """The name that torchvision gives it."""
        return f"resnet{self.depth}"

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie: every stride of a ResNet starts at the first pixel."""
        return Cells(stride_px=32 if self.stem == "standard" else 8, first_centre_px=0.5)

    def build(self, num_classes: int, channels: int) -> "MedicalResNet":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        from cadx.models.radiograph import MedicalResNet

        return MedicalResNet(num_classes, channels, self)


class DenseNetConfig(RadiographConfig):
    """A DenseNet.

    Attributes:
        growth_rate: channels that each layer adds.
        block_config: layers per dense block.
        norm: as of `ResNetConfig`.
    """

    family: Literal["densenet"] = "densenet"
    growth_rate: Annotated[int, Field(ge=1)] = 32
    block_config: tuple[int, int, int, int] = (6, 12, 24, 16)
    norm: ImageNorm = "batch"

    @property
    def architecture(self) -> str | None:
        """The name that torchvision gives it, if it has one."""
        published = {
            (32, (6, 12, 24, 16)): "densenet121",
            (48, (6, 12, 36, 24)): "densenet161",
            (32, (6, 12, 32, 32)): "densenet169",
            (32, (6, 12, 48, 32)): "densenet201",
        }
        return published.get((self.growth_rate, self.block_config))

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
        from cadx.models.radiograph import DenseNetMedical

        return DenseNetMedical(num_classes, channels, self)


class ConvNeXtConfig(RadiographConfig):
    """A ConvNeXt, by default ConvNeXt-Tiny; it normalises over channels, whatever the batch.

    Attributes:
        width: as a share of the usual 96, 192, 384 and 768 channels.
        depths: blocks per stage.
        stochastic_depth: chance that the last block is skipped for an image in training; the first never is,
            and those between in proportion.
    """

    family: Literal["convnext"] = "convnext"
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    depths: tuple[_Depth, _Depth, _Depth, _Depth] = (3, 3, 9, 3)
    stochastic_depth: Annotated[float, Field(ge=0, lt=1)] = 0.1

    @property
    def architecture(self) -> str | None:
        """The name that torchvision gives it, if it has one."""
        return {(3, 3, 9, 3): "convnext_tiny", (3, 3, 27, 3): "convnext_small"}.get(self.depths)

    @property
    def cells(self) -> Cells:
        """Where the attention map's cells lie: whole patches, merged two by two, are tiles of the image."""
        stride_px = 32 if self.stem == "standard" else 8
        return Cells(stride_px=stride_px, first_centre_px=stride_px / 2)

    def build(self, num_classes: int, channels: int) -> "ConvNeXtMedical":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        from cadx.models.radiograph import ConvNeXtMedical

        return ConvNeXtMedical(num_classes, channels, self)
