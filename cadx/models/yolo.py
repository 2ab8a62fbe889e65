"""A one-stage detector of small lesions: anchor-free, over several scales, its lesions assigned by task alignment.

From the papers alone: a backbone of cross-stage partial blocks, a pyramid that runs down and up again, and a
head per scale that says of each location whether a lesion is there, of which class, and how far its four
sides lie. The finest scale has a location every 4 pixels, so that a lesion of 4 pixels has one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cadx.losses import AssignedTargets, FocalLossForDetection
from cadx.mining import HardNegativeMiner
from cadx.models.interface import Detections, Norm
from cadx.models.yolo_config import YOLOConfig

__all__ = ["MedicalYOLO", "Predicted", "TaskAlignedAssigner", "YOLOConfig"]

_MAX_CANDIDATES = 1000  # per image, before non-maximum suppression
_LESION_PRIOR_PROB = 0.01
_LEAST_QUALITY = 0.1
_LEAST_SIDE_PX = 0.01


class Predicted(NamedTuple):
    """What the network says of A locations, those of all scales, finest first.

    Attributes:
        objectness_logits: N A float32.
        class_logits: N A K float32, classes given that a lesion is there.
        boxes_xyxy: N A 4 float32, in pixels, not clipped; each holds its location.
        points_xy: A 2 float32, the locations: centres of stride x stride pixels, all inside of the image.
    """

    objectness_logits: Tensor
    class_logits: Tensor
    boxes_xyxy: Tensor
    points_xy: Tensor

    def scores(self) -> Tensor:
        """N A K, the probability of a lesion of each class: objectness times class."""
        return self.objectness_logits.sigmoid()[..., None] * self.class_logits.softmax(-1)


class MedicalYOLO(nn.Module):
    """An anchor-free one-stage detector; any size of image, any number of channels, images without a lesion.

    Called with images (and, in training, with targets) it answers as `cadx.models.interface` says. An image is
    padded below and on the right to a multiple of the largest stride; boxes are clipped to the image as it was.

    Source: the one-stage, multi-scale plan is Redmon and Farhadi 2018, "YOLOv3"; anchor-free sides from a
    location, Tian et al. 2019, "FCOS", eq. 1, with softplus in place of exp; the decoupled head, Ge et al. 2021,
    "YOLOX"; blocks, Wang et al. 2020, "CSPNet"; the pyramid, Liu et al. 2018, "Path Aggregation Network", added
    up; the assignment, Feng et al. 2021, "TOOD" (`TaskAlignedAssigner`); the loss, `FocalLossForDetection`.
    The bias of the objectness starts at a probability of .01 (Lin et al. 2017, sec. 3.3).

    Args:
        num_classes: K, without the background.
        channels: of the images.
        config: see `YOLOConfig`.

    Attributes:
        divisor: the sum of all qualities, by which the last losses were divided, or by 1 if it is less.
    """

    def __init__(self, num_classes: int = 1, channels: int = 1, config: YOLOConfig | None = None) -> None:
        super().__init__()
        self.divisor: Tensor | None = None
        self.config = config = config or YOLOConfig()
        self.num_classes = num_classes
        self.backbone = _Backbone(channels, config)
        self.neck = _Pyramid(self.backbone.channels, config)
        self.heads = nn.ModuleList(
            _Head(self.neck.channels, num_classes, config.norm) for _ in config.strides
        )
        self.assigner = TaskAlignedAssigner(config.assign_top_k, config.assign_alpha, config.assign_beta)
        self.loss = FocalLossForDetection(
            config.focal_alpha,
            config.focal_gamma,
            box_loss=config.box_loss,
            objectness_weight=config.objectness_weight,
            class_weight=config.class_weight,
            box_weight=config.box_weight,
        )
        self.miner = (
            None if config.hard_negative_ratio is None else HardNegativeMiner(config.hard_negative_ratio)
        )

    def stages(self) -> list[nn.Module]:
        """The blocks in order: stem and scales of the backbone, blocks of the pyramid, the heads' branches."""
        branches = [branch for head in self.heads for branch in (head.box, head.lesion)]
        return [*self.backbone.blocks, *self.neck.down, *self.neck.up, *branches]

    @overload
    def forward(
        self, images: Tensor, targets: Sequence[Detections]
    ) -> dict[str, Tensor] | list[Detections]: ...
    @overload
    def forward(self, images: Tensor, targets: None = None) -> list[Detections]: ...
    def forward(
        self, images: Tensor, targets: Sequence[Detections] | None = None
    ) -> dict[str, Tensor] | list[Detections]:
        """In training and given targets the losses by name, else the boxes of each image.

        Args:
            images: N C H W.
            targets: N, one of each image; boxes with an area, in pixels of `images`; maybe none.
        """
        predicted = self.predict(images)
        if self.training and targets is not None:
            assigned = self.assigner(predicted, targets)
            return self._losses(predicted, assigned)
        return self._detections(predicted, height_px=images.shape[2], width_px=images.shape[3])

    def predict(self, images: Tensor) -> Predicted:
        """What the network says of every location of `images`, N C H W."""
        height_px, width_px = images.shape[2:]
        largest = self.config.strides[-1]
        # The border's own values, not zeros: no edge appears where there is none.
        padded = F.pad(images, (0, -width_px % largest, 0, -height_px % largest), mode="replicate")
        answers, boxes, points = [], [], []
        scales = self.neck(self.backbone(padded))
        for stride, head, features in zip(self.config.strides, self.heads, scales, strict=True):
            # Locations outside of the image as it was say nothing.
            rows, columns = ((side + stride // 2 - 1) // stride for side in (height_px, width_px))
            answer = head(features)[:, :, :rows, :columns].flatten(2).mT.float()
            y, x = ((torch.arange(n, device=images.device) + 0.5) * stride for n in (rows, columns))
            centres = torch.stack([x.repeat(rows), y.repeat_interleave(columns)], 1)
            # Off zero: the slope of a box's aspect ratio is not finite without a height.
            sides = F.softplus(answer[..., :4]) * stride + _LEAST_SIDE_PX
            boxes.append(torch.cat([centres - sides[..., :2], centres + sides[..., 2:]], -1))
            answers.append(answer[..., 4:])
            points.append(centres)
        answer = torch.cat(answers, 1)
        return Predicted(answer[..., 0], answer[..., 1:], torch.cat(boxes, 1), torch.cat(points))

    def _losses(self, predicted: Predicted, assigned: AssignedTargets) -> dict[str, Tensor]:
        self.divisor = assigned.qualities.sum()
        counted = None
        if self.miner is not None:
            losses = self.loss.objectness_losses(predicted.objectness_logits, assigned.qualities)
            counted = self.miner.mine_hard_negatives(losses, assigned.qualities > 0)
        return self.loss(
            predicted.objectness_logits, predicted.class_logits, predicted.boxes_xyxy, assigned, counted
        )

    def _detections(self, predicted: Predicted, *, height_px: int, width_px: int) -> list[Detections]:
        from torchvision.ops import batched_nms, clip_boxes_to_image

        clipped = clip_boxes_to_image(predicted.boxes_xyxy, (height_px, width_px))
        answers = []
        for boxes, scores in zip(clipped, predicted.scores(), strict=True):
            locations, labels = (scores > self.config.score_threshold).nonzero(as_tuple=True)
            found = scores[locations, labels]
            best = found.argsort(descending=True, stable=True)[:_MAX_CANDIDATES]
            boxes, labels, found = boxes[locations[best]], labels[best], found[best]
            kept = batched_nms(boxes, found, labels, self.config.nms_iou)[: self.config.max_detections]
            answers.append(Detections(boxes[kept], labels[kept], found[kept]))
        return answers


@dataclass(frozen=True)
class TaskAlignedAssigner:
    """Gives each lesion the locations inside it that already say it best, and each a quality to learn.

    The alignment of a location with a lesion is t = s^alpha u^beta, with s its score for the lesion's class and u
    the overlap (IoU) of its box. The `top_k` locations inside the lesion with the largest t learn it; one that
    several lesions claim goes to that which it overlaps most. Qualities are t, scaled so that a lesion's largest
    is its largest u. No gradient flows.

    Source: Feng et al. 2021, "TOOD: Task-aligned One-stage Object Detection", eqs. 4 to 6. Ours: a lesion that
    holds no location gets the nearest, and its largest quality is at least .1, so that every lesion is learnt
    from the first step.

    Attributes:
        top_k: locations per lesion, at most.
        alpha: weight of the score.
        beta: weight of the overlap.
    """

    top_k: int = 9
    alpha: float = 1.0
    beta: float = 6.0

    @torch.no_grad()
    def __call__(self, predicted: Predicted, targets: Sequence[Detections]) -> AssignedTargets:
        """What each location of each image is to say; lesions must have an area."""
        qualities = torch.zeros_like(predicted.objectness_logits)
        labels = torch.zeros_like(qualities, dtype=torch.int64)
        boxes_xyxy = torch.zeros_like(predicted.boxes_xyxy)
        scores = predicted.scores()
        for number, target in enumerate(targets):
            if len(target.labels):
                owner, quality = self._assign(
                    scores[number], predicted.boxes_xyxy[number], predicted.points_xy, target
                )
                qualities[number] = quality
                labels[number] = target.labels[owner]
                boxes_xyxy[number] = target.boxes_xyxy[owner]
        return AssignedTargets(qualities, labels, boxes_xyxy)

    def _assign(
        self, scores: Tensor, boxes_xyxy: Tensor, points_xy: Tensor, target: Detections
    ) -> tuple[Tensor, Tensor]:
        """The lesion that each location would learn, and with which quality: A int64, A float32."""
        from torchvision.ops import box_iou

        starts, ends = target.boxes_xyxy[:, None, :2], target.boxes_xyxy[:, None, 2:]
        assert bool((starts < ends).all()), "a lesion without an area"
        inside = ((points_xy >= starts) & (points_xy < ends)).all(-1)  # B A
        nearest = (points_xy - (starts + ends) / 2).square().sum(-1).argmin(1, keepdim=True)
        inside.scatter_(1, nearest, inside.any(1, keepdim=True).logical_not() | inside.gather(1, nearest))
        overlaps = box_iou(target.boxes_xyxy, boxes_xyxy)
        # Logarithms: u^6 of a first box underflows. Off zero: -inf would mark the outside.
        tiny = torch.finfo(overlaps.dtype).tiny
        alignment = self.alpha * scores[:, target.labels].mT.clamp_min(tiny).log()
        alignment = alignment + self.beta * overlaps.clamp_min(tiny).log()
        alignment = alignment.masked_fill(~inside, -torch.inf)
        best = alignment.topk(min(self.top_k, alignment.shape[1]), 1).indices
        chosen = torch.zeros_like(inside).scatter_(1, best, True) & inside
        owner = overlaps.masked_fill(~chosen, -1.0).argmax(0)  # A
        chosen = chosen & (owner == torch.arange(len(chosen), device=owner.device)[:, None])
        alignment = alignment.masked_fill(~chosen, -torch.inf)
        strongest = alignment.amax(1, keepdim=True).clamp_min(torch.finfo(alignment.dtype).min)
        largest = overlaps.masked_fill(~chosen, 0.0).amax(1, keepdim=True).clamp_min(_LEAST_QUALITY)
        quality = (alignment - strongest).exp() * largest
        return owner, quality.amax(0)


# --- Blocks -------------------------------------------------------------------------------------------


def _convolution(inputs: int, outputs: int, kernel: int, norm: Norm, *, stride: int = 1) -> nn.Sequential:
    """A convolution, its normalisation and SiLU."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")
    normalised = nn.BatchNorm2d(outputs) if norm == "batch" else nn.GroupNorm(8, outputs)
    return nn.Sequential(convolution, normalised, nn.SiLU(inplace=True))


class _Residual(nn.Module):
    """Two 3x3 convolutions beside an identity."""

    def __init__(self, channels: int, norm: Norm) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolution(channels, channels, 3, norm), _convolution(channels, channels, 3, norm)
        )

    def forward(self, features: Tensor) -> Tensor:
        added: Tensor = features + self.body(features)
        return added


class _CrossStagePartial(nn.Module):
    """Half of the channels pass residual units, half pass by, and a 1x1 convolution joins them.

    Source: Wang et al. 2020, "CSPNet", fig. 3b.
    """

    def __init__(self, channels: int, num_units: int, norm: Norm) -> None:
        super().__init__()
        half = _scaled(channels, 0.5)
        self.passing = _convolution(channels, half, 1, norm)
        self.units = nn.Sequential(
            _convolution(channels, half, 1, norm), *(_Residual(half, norm) for _ in range(num_units))
        )
        self.join = _convolution(2 * half, channels, 1, norm)

    def forward(self, features: Tensor) -> Tensor:
        joined: Tensor = self.join(torch.cat([self.passing(features), self.units(features)], 1))
        return joined


class _Backbone(nn.Module):
    """A stem of stride 2, and a block for each further halving; the features at the configured strides."""

    def __init__(self, channels: int, config: YOLOConfig) -> None:
        super().__init__()
        self.num_scales = len(config.strides)
        num_units = max(1, round(3 * config.depth))
        widths = [_scaled(16 * 2**i, config.width) for i in range(1, config.strides[-1].bit_length())]
        self.channels = widths[-self.num_scales :]
        blocks: list[nn.Module] = [_convolution(channels, widths[0], 3, config.norm, stride=2)]
        for inputs, outputs in pairwise(widths):
            blocks.append(
                nn.Sequential(
                    _convolution(inputs, outputs, 3, config.norm, stride=2),
                    _CrossStagePartial(outputs, num_units, config.norm),
                )
            )
        self.blocks = nn.ModuleList(blocks)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Finest first."""
        features = [images]
        for block in self.blocks:
            features.append(block(features[-1]))
        return features[-self.num_scales :]


class _Pyramid(nn.Module):
    """Every scale learns from the coarser ones, then from the finer ones; all get as many channels as the second.

    Source: Liu et al. 2018, "Path Aggregation Network for Instance Segmentation", sec. 3.1, after Lin et al. 2017,
    "Feature Pyramid Networks".
    """

    def __init__(self, inputs: Sequence[int], config: YOLOConfig) -> None:
        super().__init__()
        self.channels = inputs[min(1, len(inputs) - 1)]
        num_units, between = max(1, round(3 * config.depth)), len(inputs) - 1
        self.lateral = nn.ModuleList(_convolution(wide, self.channels, 1, config.norm) for wide in inputs)
        self.down, self.up = (
            nn.ModuleList(_CrossStagePartial(self.channels, num_units, config.norm) for _ in range(between))
            for _ in range(2)
        )
        self.coarser = nn.ModuleList(
            _convolution(self.channels, self.channels, 3, config.norm, stride=2) for _ in range(between)
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """As many scales as went in, finest first."""
        scales = [lateral(scale) for lateral, scale in zip(self.lateral, features, strict=True)]
        for i in reversed(range(len(self.down))):
            scales[i] = self.down[i](scales[i] + F.interpolate(scales[i + 1], scale_factor=2.0))
        for i in range(len(self.up)):
            scales[i + 1] = self.up[i](scales[i + 1] + self.coarser[i](scales[i]))
        return scales


class _Head(nn.Module):
    """Of one scale: the sides of boxes from one branch, objectness and classes from another.

    No scale shares it: batch normalisation would answer with the mean of statistics that differ between scales.

    Source: Ge et al. 2021, "YOLOX", sec. 2.1, fig. 2.
    """

    def __init__(self, channels: int, num_classes: int, norm: Norm) -> None:
        super().__init__()
        self.box, self.lesion = (
            nn.Sequential(*(_convolution(channels, channels, 3, norm) for _ in range(2))) for _ in range(2)
        )
        self.sides = nn.Conv2d(channels, 4, 1)
        self.logits = nn.Conv2d(channels, 1 + num_classes, 1)
        for last in (self.sides, self.logits):
            nn.init.normal_(last.weight, std=0.01)
            assert last.bias is not None
            nn.init.zeros_(last.bias)
        with torch.no_grad():
            self.logits.bias[0] = torch.tensor(_LESION_PRIOR_PROB).logit()  # type: ignore[index]

    def forward(self, features: Tensor) -> Tensor:
        """N 4+1+K h w: left, top, right and bottom before softplus, objectness, classes."""
        return torch.cat([self.sides(self.box(features)), self.logits(self.lesion(features))], 1)


def _scaled(channels: int, share: float) -> int:
    """A share of the channels: a multiple of 8, at least 8, for groups of equal size."""
    return max(8, round(channels * share / 8) * 8)
