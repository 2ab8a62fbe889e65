"""The configuration of `cadx.models.yolo`, without torch."""

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from cadx.models.interface import Norm
from cadx.types import Config
from cadx.weighting import BoxLoss

if TYPE_CHECKING:  # importing torch takes two seconds
    from cadx.models.yolo import MedicalYOLO


class YOLOConfig(Config):
    """A detector for images of any size.

    Attributes:
        width: share of the usual channels (16 per pixel of stride): 0.5 = half.
        depth: share of the usual three residual units per block, at least one.
        strides: pixels between a scale's locations, finest first, each twice the one before. A lesion is best
            found at a stride of about half its size.
        norm: "batch" answers alike for a crop and for the whole image; "group" does not depend on the batch in
            training either, but sees all of the image, also what is black.
        assign_top_k: locations that learn a lesion, at most.
        assign_alpha: weight of the score in the choice of these locations.
        assign_beta: weight of the overlap in it.
        focal_alpha: weight of lesions in the objectness loss, 1 - focal_alpha that of the background; null: 1 each.
        focal_gamma: how strongly the easy are turned down.
        box_loss: "giou", or "ciou", which asks for the centre and the aspect ratio too.
        objectness_weight: factor of the objectness loss.
        class_weight: factor of the class loss.
        box_weight: factor of the box loss.
        hard_negative_ratio: count only that many of the hardest background locations per location of a lesion, in
            each image; null: count all, turned down by the focal loss.
        score_threshold: boxes with a lower score are not reported.
        nms_iou: of two boxes of a class that overlap by more, the one with the lower score is not reported: within
            the network's input, across tiles, and between the members of an ensemble.
        max_detections: boxes per image, at most, however many tiles and members it has.
    """

    takes: ClassVar = "boxes"

    family: Literal["yolo"] = "yolo"
    width: Annotated[float, Field(gt=0, le=4)] = 0.5
    depth: Annotated[float, Field(gt=0, le=4)] = 0.33
    strides: tuple[int, ...] = (4, 8, 16)
    norm: Norm = "batch"
    assign_top_k: Annotated[int, Field(ge=1)] = 9
    assign_alpha: Annotated[float, Field(ge=0)] = 1.0
    assign_beta: Annotated[float, Field(ge=0)] = 6.0
    focal_alpha: Annotated[float, Field(gt=0, lt=1)] | None = None
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    box_loss: BoxLoss = "ciou"
    objectness_weight: Annotated[float, Field(gt=0)] = 1.0
    class_weight: Annotated[float, Field(ge=0)] = 1.0
    box_weight: Annotated[float, Field(gt=0)] = 2.0
    hard_negative_ratio: Annotated[float, Field(ge=0)] | None = None
    score_threshold: Annotated[float, Field(ge=0, lt=1)] = 0.01
    nms_iou: Annotated[float, Field(gt=0, le=1)] = 0.5
    max_detections: Annotated[int, Field(ge=1)] = 100

    @model_validator(mode="after")
    def _doubling(self) -> Self:
        first = self.strides[0] if self.strides else 0
        if first not in (2, 4, 8, 16, 32) or self.strides != tuple(
            first << i for i in range(len(self.strides))
        ):
            raise ValueError(
                f"strides are {self.strides}; give 2, 4, 8, 16 or 32 and its doubles, as in (4, 8, 16)"
            )
        return self

    def build(self, num_classes: int, channels: int) -> "MedicalYOLO":
        """The detector for images of `channels` channels; random weights come from torch's global generator."""
        from cadx.models.yolo import MedicalYOLO

        return MedicalYOLO(num_classes, channels, self)
