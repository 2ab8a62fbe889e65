"""The configurations of `cadx.models.volume`, without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from cadx.models.interface import Norm, Pooling
from cadx.transforms import Cells
from cadx.types import Config

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.models.volume import Medical3DDenseNet, Medical3DResNet

Stem = Literal["standard", "thick_slices", "medium", "small"]

STEM_PX: dict[Stem, tuple[int, int, int]] = {
    "standard": (4, 4, 4),
    "thick_slices": (1, 4, 4),
    "medium": (2, 2, 2),
    "small": (1, 1, 1),
}
"""By how many voxels of the input, along D, H, W, a stem moves from one place of its output to the next."""


class VolumeConfig(Config):
    """What both families share.

    Attributes:
        stem: "standard", 7x7x7 stride 2 and max pooling: the map is 1/32 of the volume, for patches of 32 voxels
            and more; "thick_slices", the same but without a stride along D, which becomes 1/8, for patches of few
            slices; "medium", 3x3x3 stride 2 and no pooling, for patches of about 24 to 64 voxels: the map is 1/16;
            "small", 3x3x3 stride 1 and no pooling, for patches of about 16 to 32: 1/8.
        dropout: share of pooled features that are dropped in training.
        pooling: how the prediction pools the feature map.
        norm: "group" does not depend on the batch: for batches of one or two volumes.
        pretrained: a local state dict under MONAI's names (MedicalNet's files are), `.safetensors` or torch's own
            format.
    """

    takes: ClassVar = "volumes"

    stem: Stem = "standard"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    pooling: Pooling = "attention"
    norm: Norm = "batch"
    pretrained: Path | None = None

    @property
    def cells(self) -> tuple[Cells, Cells, Cells]:
        """Where the attention map's cells lie along D, H, W."""
        raise NotImplementedError


class ResNet3DConfig(VolumeConfig):
    """A 3D ResNet: `depth` layers, `width` as a share of the usual channels (0.5 = half)."""

    family: Literal["resnet3d"] = "resnet3d"
    depth: Literal[10, 18, 34, 50] = 18
    width: Annotated[float, Field(gt=0, le=4)] = 1.0

    @property
    def cells(self) -> tuple[Cells, Cells, Cells]:
        """Where the attention map's cells lie along D, H, W: every stride starts at the first voxel."""
        depth, height, width = (Cells(stride_px=8 * px, first_centre_px=0.5) for px in STEM_PX[self.stem])
        return depth, height, width

    def build(self, num_classes: int, channels: int) -> "Medical3DResNet":
        """The network for volumes of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        from cadx.models.volume import Medical3DResNet

        return Medical3DResNet(num_classes, channels, self)


class DenseNet3DConfig(VolumeConfig):
    """A 3D DenseNet: layers per dense block (by default DenseNet-121's), each adding `growth_rate` channels."""

    family: Literal["densenet3d"] = "densenet3d"
    growth_rate: Annotated[int, Field(ge=1)] = 32
    block_config: tuple[int, int, int, int] = (6, 12, 24, 16)

    @property
    def cells(self) -> tuple[Cells, Cells, Cells]:
        """Where the map's cells lie along D, H, W: each transition averages two, and moves the first by half a one."""
        depth, height, width = (
            Cells(stride_px=8 * px, first_centre_px=0.5 + px * (1 + 2 + 4) / 2) for px in STEM_PX[self.stem]
        )
        return depth, height, width

    def build(self, num_classes: int, channels: int) -> "Medical3DDenseNet":
        """The network for volumes of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        from cadx.models.volume import Medical3DDenseNet

        return Medical3DDenseNet(num_classes, channels, self)
