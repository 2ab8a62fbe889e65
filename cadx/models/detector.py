"""Detectors of lesions on torchvision's parts: Faster R-CNN in two stages, RetinaNet in one.

Both look for boxes on a feature pyramid over a ResNet. Its finest level has stride 4 and its anchors are small,
because a lesion is. Images come preprocessed and stay as they are: nothing inside resizes or normalises them.
Of torchvision's dense detectors this is RetinaNet and not FCOS, because it shares its anchors, its box coder
and its choice of box loss with Faster R-CNN, so that the two differ in their stages alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from torch import Tensor, nn

from cadx.models.detector_config import BoxLoss, DetectorConfig, FasterRCNNConfig, RetinaNetConfig, SizePx
from cadx.models.interface import Detections

if TYPE_CHECKING:  # importing torchvision takes five seconds
    from cadx.models.detector_networks import Network

__all__ = [
    "BoxLoss",
    "DetectorConfig",
    "FasterRCNNConfig",
    "MedicalDetector",
    "MedicalFasterRCNN",
    "MedicalRetinaNet",
    "RetinaNetConfig",
    "SizePx",
]


class MedicalDetector(nn.Module):
    """One of torchvision's detectors behind the interface of ours.

    Args:
        network: takes and gives torchvision's dictionaries.
        first_label: torchvision's number for our class 0.
    """

    def __init__(self, network: "Network", first_label: int) -> None:
        super().__init__()
        self.network = network
        self.first_label = first_label

    @overload
    def forward(self, images: Tensor, targets: Sequence[Detections]) -> dict[str, Tensor]: ...
    @overload
    def forward(self, images: Tensor, targets: None = None) -> list[Detections]: ...
    def forward(
        self, images: Tensor, targets: Sequence[Detections] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """Losses by name in training, to be added up, and else a `Detections` for each image.

        Args:
            images: N C H W, preprocessed, of any H and W.
            targets: N of them, in training; boxes have an area. An image without a box is a negative.
        """
        assert targets is not None or not self.training, "a detector in training needs targets"
        if self.training and targets is not None:
            losses: dict[str, Tensor] = self.network(
                images,
                [
                    {"boxes": target.boxes_xyxy.float(), "labels": target.labels + self.first_label}
                    for target in targets
                ],
            )
            return losses
        return [
            Detections(found["boxes"], found["labels"] - self.first_label, found["scores"])
            for found in self.network(images)
        ]

    @property
    def divisor(self) -> Tensor | None:
        """By what the last losses were divided, or by 1 if it is less; None where each has its own divisor."""
        return self.network.divisor

    def anchors_xyxy(self, height_px: int, width_px: int) -> list[Tensor]:
        """The anchors that the network in fact uses on an image: A 4 for each level, finest first."""
        return self.network.anchors_xyxy(height_px, width_px)

    def stages(self) -> list[nn.Module]:
        """The ResNet's blocks in order, whose activations may be recomputed."""
        return self.network.backbone.blocks()


class MedicalFasterRCNN(MedicalDetector):
    """A Faster R-CNN for small lesions; by default on a ResNet-50 and one gray channel.

    Source: Ren et al. 2015, "Faster R-CNN", with Lin et al. 2017, "Feature Pyramid Networks for Object
    Detection", and RoIAlign (He et al. 2017, "Mask R-CNN"), in torchvision's form. We deviate: anchors and the
    size at which a proposal changes its level are a quarter of the usual; an anchor is positive from an IoU of
    .5, not .7, which few anchors on a grid of 4 px have with a box of 8; the options of `FasterRCNNConfig`.
    """

    def __init__(
        self, num_classes: int = 1, channels: int = 1, config: FasterRCNNConfig | None = None
    ) -> None:
        from cadx.models.detector_networks import LesionFasterRCNN

        config = config or FasterRCNNConfig(depth=50)
        super().__init__(LesionFasterRCNN(num_classes, channels, config), first_label=1)


class MedicalRetinaNet(MedicalDetector):
    """A RetinaNet for small lesions; by default on a ResNet-50 and one gray channel.

    Source: Lin et al. 2017, "Focal Loss for Dense Object Detection", in torchvision's form. We deviate: levels
    of stride 4 to 32 in place of 8 to 128, anchors a quarter of the usual, layer norm in the heads, and losses
    that are divided by the anchors on the lesions of the whole batch, not of each image: an image without a
    lesion then weighs no more than its background.
    """

    def __init__(
        self, num_classes: int = 1, channels: int = 1, config: RetinaNetConfig | None = None
    ) -> None:
        from cadx.models.detector_networks import LesionRetinaNet

        config = config or RetinaNetConfig(depth=50)
        super().__init__(LesionRetinaNet(num_classes, channels, config), first_label=0)
