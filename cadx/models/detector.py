"""Detectors of lesions on torchvision's parts: Faster R-CNN in two stages, RetinaNet in one.

Both look for boxes on a feature pyramid over a ResNet. Its finest level has stride 4 and its anchors are small,
because a lesion is. Images come preprocessed and stay as they are: nothing inside resizes or normalises them.
Of torchvision's dense detectors this is RetinaNet and not FCOS, because it shares its anchors, its box coder
and its choice of box loss with Faster R-CNN, so that the two differ in their stages alone.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self, overload

from pydantic import Field, model_validator
from torch import Tensor, nn

from cadx.models.interface import Detections, ImageNorm, Pretrained
from cadx.types import Config

if TYPE_CHECKING:  # importing torchvision takes five seconds
    from cadx.models.detector_networks import Network

BoxLoss = Literal["smooth_l1", "giou", "ciou"]
SizePx = Annotated[float, Field(gt=0)]


class DetectorConfig(Config):
    """What both detectors share.

    Attributes:
        depth: layers of the ResNet.
        width: its channels, as a share of the usual ones (0.5 = half).
        norm: of the ResNet. "group" does not depend on the batch, but sees all of the image: train and answer
            on images of one kind, not on crops and then on the whole; "batch" answers alike for both;
            "frozen_batch" keeps the statistics of `pretrained`. The pyramid and RetinaNet's heads normalise
            the channels of each place by themselves (layer norm), for the sake of both.
        pretrained: a local state dict of a ResNet under torchvision's names, `.safetensors` or torch's own format;
            or torchvision's published one by name, as "torchvision:IMAGENET1K_V1". An RGB stem is folded.
        fpn_channels: channels of every level of the pyramid.
        anchor_sizes_px: for each level, finest first, sides of the square anchors in pixels of the network's
            input; the levels have strides 4, 8, 16 and 32, and as many are built as are given.
        aspect_ratios: height / width of the anchors at every place, of the same area each.
        box_loss: "smooth_l1" of the coded differences, or 1 - GIoU or 1 - CIoU of the boxes.
        score_threshold: boxes with a lower score are not answered; low, since the operating point is chosen
            later and a FROC curve needs the boxes below it.
        nms_iou: of two boxes of one class that overlap by more, the one with the lower score is dropped.
        max_detections: most boxes that are answered for an image.
    """

    takes: ClassVar = "boxes"

    depth: Literal[18, 34, 50] = 18
    width: Annotated[float, Field(gt=0, le=4)] = 1.0
    norm: ImageNorm = "group"
    pretrained: Pretrained | None = None
    fpn_channels: Annotated[int, Field(ge=8, multiple_of=8)] = 128
    anchor_sizes_px: Annotated[tuple[tuple[SizePx, ...], ...], Field(min_length=1, max_length=4)]
    aspect_ratios: Annotated[tuple[SizePx, ...], Field(min_length=1)] = (0.5, 1.0, 2.0)
    box_loss: BoxLoss = "giou"
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_detections: Annotated[int, Field(ge=1)] = 100

    @property
    def architecture(self) -> str:
        """The name that torchvision gives the ResNet."""
        return f"resnet{self.depth}"

    @property
    def stem(self) -> Literal["standard"]:
        """The ResNet's: its first block has stride 4."""
        return "standard"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if len({len(sizes) for sizes in self.anchor_sizes_px}) != 1 or not self.anchor_sizes_px[0]:
            counts = [len(sizes) for sizes in self.anchor_sizes_px]
            raise ValueError(
                f"anchor_sizes_px: levels have {counts} sizes; one head serves all: give as many"
            )
        if self.norm == "frozen_batch" and self.pretrained is None:
            raise ValueError(
                "norm: frozen_batch keeps statistics that nobody measured; set pretrained, or group"
            )
        return self


class FasterRCNNConfig(DetectorConfig):
    """A Faster R-CNN: proposals of an objectness, then a class and a better box for each.

    Attributes:
        focal_objectness: the objectness learns from every anchor by focal loss (Lin et al. 2017), from a
            rare start (p = .01), instead of from a sample of 256 anchors of each image.
        hard_negatives: null for negatives drawn at random, or how many of them there are for each positive:
            those with the largest loss (`HardNegativeMiner`), in both stages, but for a focal objectness.
        num_proposals: most boxes of an image that reach the second stage.
        rois_per_image: how many of them it learns from where negatives are drawn, at most a quarter positive.
        head_dim: width of the second stage's two layers.
    """

    family: Literal["faster_rcnn"] = "faster_rcnn"
    anchor_sizes_px: Annotated[tuple[tuple[SizePx, ...], ...], Field(min_length=1, max_length=4)] = (
        (8,),
        (16,),
        (32,),
        (64,),
    )
    focal_objectness: bool = False
    hard_negatives: Annotated[float, Field(gt=0)] | None = None
    num_proposals: Annotated[int, Field(ge=1)] = 300
    rois_per_image: Annotated[int, Field(ge=4)] = 64
    head_dim: Annotated[int, Field(ge=1)] = 256

    def build(self, num_classes: int, channels: int) -> "MedicalFasterRCNN":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        return MedicalFasterRCNN(num_classes, channels, self)


class RetinaNetConfig(DetectorConfig):
    """A RetinaNet: a class and a box at every anchor, with focal loss.

    Attributes:
        num_head_convs: convolutions of each head before its last; most of the network's time on fine levels.
    """

    family: Literal["retinanet"] = "retinanet"
    # Each level by thirds of an octave, as in the paper.
    anchor_sizes_px: Annotated[tuple[tuple[SizePx, ...], ...], Field(min_length=1, max_length=4)] = (
        (8, 10.1, 12.7),
        (16, 20.2, 25.4),
        (32, 40.3, 50.8),
        (64, 80.6, 101.6),
    )
    num_head_convs: Annotated[int, Field(ge=1, le=4)] = 4

    def build(self, num_classes: int, channels: int) -> "MedicalRetinaNet":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        return MedicalRetinaNet(num_classes, channels, self)


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
