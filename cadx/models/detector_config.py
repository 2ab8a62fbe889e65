"""The configurations of `cadx.models.detector`, without torch."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cadx.models.interface import ImageNorm, Pretrained
from cadx.types import Config

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.models.detector import MedicalFasterRCNN, MedicalRetinaNet

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
        nms_iou: of two boxes of one class that overlap by more, the one with the lower score is dropped: within the
            network's input, across tiles, and between the members of an ensemble.
        max_detections: most boxes that are answered for an image, however many tiles and members it has.
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
        roi_resolution: bins a side in which a proposal's features are pooled.
        roi_sampling_ratio: samples a side of each bin. Of lesions whose bins are smaller than a place of the
            level, one says what four do, and what is learned from them costs a quarter.
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
    roi_resolution: Annotated[int, Field(ge=1)] = 7
    roi_sampling_ratio: Annotated[int, Field(ge=1)] = 2
    head_dim: Annotated[int, Field(ge=1)] = 256

    def build(self, num_classes: int, channels: int) -> "MedicalFasterRCNN":
        """The network for images of `channels` channels; random weights come from torch's global generator.

        Raises:
            ValueError: if `pretrained` cannot be read or does not fit.
        """
        from cadx.models.detector import MedicalFasterRCNN

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
        from cadx.models.detector import MedicalRetinaNet

        return MedicalRetinaNet(num_classes, channels, self)
