"""torchvision's detectors without their transform, on our ResNet, and the losses that they lack.

Imported where a network is built and nowhere else: importing torchvision takes five seconds.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.detection import RetinaNet
from torchvision.models.detection._utils import _box_loss
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import RetinaNetHead
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign, sigmoid_focal_loss
from torchvision.ops.poolers import LevelMapper

from cadx.mining import HardNegativeMiner
from cadx.models.backbones import ResNetBackbone

if TYPE_CHECKING:  # detector.py imports this module when it builds
    from cadx.models.detector import DetectorConfig, FasterRCNNConfig, RetinaNetConfig

_PRIOR = 0.01
"""An anchor's probability of a lesion before training: Lin et al. 2017, section 3.3."""
_MIN_NEGATIVES = 16
"""Hard negatives of an image with few positives or none, of each stage."""


class Network(Protocol):
    """What `MedicalDetector` asks of a detector in torchvision's form."""

    backbone: "Pyramid"

    @property
    def divisor(self) -> Tensor | None:
        """What all of the last losses were divided by, or by 1 if it is less; None if there is no such number."""
        ...

    def __call__(self, images: Tensor, targets: list[dict[str, Tensor]] | None = None) -> Any:
        """A dict of losses in training, else a dict of boxes, labels and scores for each image."""
        ...

    def anchors_xyxy(self, height_px: int, width_px: int) -> list[Tensor]:
        """The anchors of an image, A 4 for each level."""
        ...


# --- Parts of both ------------------------------------------------------------------------------------


_PlaceNorm = partial(LayerNorm2d, eps=1e-6)
"""Over the channels of each place: of levels that share a head, neither the batch nor the rest of the image counts."""


class Pyramid(nn.Module):
    """A ResNet with a feature pyramid: maps of stride 4, 8, ... under the names "0", "1", ..., float32."""

    def __init__(self, channels: int, config: "DetectorConfig") -> None:
        super().__init__()
        body = ResNetBackbone(channels, config)
        self.num_levels = len(config.anchor_sizes_px)
        self.out_channels = config.fpn_channels  # torchvision asks for it
        self.stem = nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool)
        layers = [body.layer1, body.layer2, body.layer3, body.layer4][: self.num_levels]
        self.layers = nn.ModuleList(layers)
        planes = [getattr(layer[-1], "conv3", layer[-1].conv2).out_channels for layer in layers]
        self.fpn = FeaturePyramidNetwork(planes, config.fpn_channels, norm_layer=_PlaceNorm)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of `images`, N C H W, whose H and W the coarsest stride divides."""
        x, maps = self.stem(images), {}
        for number, layer in enumerate(self.layers):
            x = maps[str(number)] = layer(x)
        # torchvision makes anchors and proposals in the type of the maps, and bfloat16 cannot count beyond 256.
        return {name: each.float() for name, each in self.fpn(maps).items()}

    def blocks(self) -> list[nn.Module]:
        """The residual blocks in order."""
        return [block for layer in self.layers for block in layer]  # type: ignore[attr-defined]


class _AsTheyCome(nn.Module):
    """In place of torchvision's transform, which resizes to 800 px and normalises three channels.

    Pads at the bottom and the right to a multiple of the coarsest stride, since torchvision takes the stride of
    a level for the image's size over the map's.
    """

    def __init__(self, stride_px: int) -> None:
        super().__init__()
        self.stride_px = stride_px

    def forward(
        self, images: Tensor, targets: list[dict[str, Tensor]] | None = None
    ) -> tuple[ImageList, list[dict[str, Tensor]] | None]:
        height, width = images.shape[-2:]
        padded = F.pad(images, (0, -width % self.stride_px, 0, -height % self.stride_px))
        return ImageList(padded, [(height, width)] * len(images)), targets

    def postprocess(
        self, result: list[dict[str, Tensor]], image_shapes: object, original_image_sizes: object
    ) -> list[dict[str, Tensor]]:
        """Drop what clipping to the image left without an area."""
        kept = []
        for found in result:
            sides = found["boxes"][:, 2:] - found["boxes"][:, :2]
            inside = (sides > 0).all(1)
            kept.append({name: each[inside] for name, each in found.items()})
        return kept


class _Anchors(AnchorGenerator):
    """Anchors of the very sizes that are asked for.

    torchvision rounds half a side to whole pixels: of 4 px at 1:2 it makes 2 by 6.
    """

    def __init__(self, config: "DetectorConfig") -> None:
        super().__init__(config.anchor_sizes_px, (config.aspect_ratios,) * len(config.anchor_sizes_px))

    def generate_anchors(
        self,
        scales: Sequence[float],
        aspect_ratios: Sequence[float],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> Tensor:
        root = torch.tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        sides = torch.tensor(scales, dtype=dtype, device=device)
        heights, widths = (root[:, None] * sides).flatten(), (sides / root[:, None]).flatten()
        return torch.stack([-widths, -heights, widths, heights], 1) / 2


def _anchors_by_level(
    generator: AnchorGenerator, backbone: Pyramid, height_px: int, width_px: int
) -> list[Tensor]:
    parameter = next(backbone.parameters())
    images, _ = _AsTheyCome(2 ** (backbone.num_levels + 1))(parameter.new_zeros(1, 1, height_px, width_px))
    maps = [images.tensors[..., :: 4 * 2**i, :: 4 * 2**i] for i in range(backbone.num_levels)]
    per_level = [
        each.shape[-2] * each.shape[-1] * count
        for each, count in zip(maps, generator.num_anchors_per_location(), strict=True)
    ]
    (anchors,) = generator(images, maps)
    return list(anchors.split(per_level))


def hard_negatives(losses: Tensor, labels: list[Tensor], miner: HardNegativeMiner) -> Tensor:
    """Which places to learn from, as a mask over P: all positives, and the negatives that `miner` chooses.

    Args:
        losses: P, one for each place of all images, one image after the other.
        labels: for each image, above 0 for a positive place, 0 for a negative, below 0 for what is neither.
        miner: chooses image by image, since the number of places differs.

    >>> losses, labels = torch.tensor([0.1, 0.9, 0.5, 0.9]), [torch.tensor([1, 0, 0, -1])]
    >>> hard_negatives(losses, labels, HardNegativeMiner(1.0, min_negatives=1)).tolist()
    [True, True, False, False]
    """
    chosen = []
    for loss, label in zip(torch.split(losses, [len(each) for each in labels]), labels, strict=True):
        known = label >= 0
        ranked = loss.masked_fill(~known, -math.inf)
        chosen.append(miner.mine_hard_negatives(ranked[None], label[None] > 0)[0] & known)
    return torch.cat(chosen)


# --- Faster R-CNN -------------------------------------------------------------------------------------


class LesionFasterRCNN(GeneralizedRCNN):
    """torchvision's Faster R-CNN from our configuration; label 0 is the background."""

    def __init__(self, num_classes: int, channels: int, config: "FasterRCNNConfig") -> None:
        backbone = Pyramid(channels, config)
        super().__init__(
            backbone,
            _Proposals(_Anchors(config), config),
            _Heads(num_classes, backbone.num_levels, config),
            _AsTheyCome(2 ** (backbone.num_levels + 1)),
        )

    @property
    def divisor(self) -> None:
        """None: each stage divides by the places that it has chosen."""

    def anchors_xyxy(self, height_px: int, width_px: int) -> list[Tensor]:
        """The anchors of an image, A 4 for each level."""
        return _anchors_by_level(self.rpn.anchor_generator, self.backbone, height_px, width_px)


def _miner(config: "FasterRCNNConfig") -> HardNegativeMiner | None:
    if config.hard_negatives is None:
        return None
    return HardNegativeMiner(config.hard_negatives, min_negatives=_MIN_NEGATIVES)


class _ObjectnessHead(RPNHead):
    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        objectness, deltas = super().forward(x)
        return [each.float() for each in objectness], [each.float() for each in deltas]


class _Proposals(RegionProposalNetwork):
    """The first stage; its boxes are only proposals, and keep smooth L1 whatever the second stage has."""

    def __init__(self, anchors: AnchorGenerator, config: "FasterRCNNConfig") -> None:
        head = _ObjectnessHead(config.fpn_channels, anchors.num_anchors_per_location()[0])
        if config.focal_objectness:
            nn.init.constant_(head.cls_logits.bias, math.log(_PRIOR / (1 - _PRIOR)))
        kept = config.num_proposals
        super().__init__(
            anchors,
            head,
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n={"training": 2 * kept, "testing": 2 * kept},  # of each level
            post_nms_top_n={"training": kept, "testing": kept},
            nms_thresh=0.7,
        )
        self.focal, self.miner = config.focal_objectness, _miner(config)

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        logits, wanted = objectness.flatten(), torch.cat(labels)
        if self.focal:
            known = wanted >= 0
            losses = sigmoid_focal_loss(logits[known], wanted[known])
            divisor = max(1, int((wanted > 0).sum()))
        elif self.miner is not None:
            losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
            losses = losses[hard_negatives(losses, labels, self.miner)]
            divisor = max(1, len(losses))
        else:
            return super().compute_loss(objectness, pred_bbox_deltas, labels, regression_targets)
        positive = wanted > 0
        boxes = F.smooth_l1_loss(
            pred_bbox_deltas[positive],
            torch.cat(regression_targets)[positive],
            beta=1 / 9,
            reduction="sum",
        )
        return losses.sum() / divisor, boxes / divisor


class _Heads(RoIHeads):
    """The second stage."""

    def __init__(self, num_classes: int, num_levels: int, config: "FasterRCNNConfig") -> None:
        pool = _RoIAlign(num_levels, config)
        super().__init__(
            pool,
            TwoMLPHead(config.fpn_channels * pool.output_size[0] * pool.output_size[1], config.head_dim),
            FastRCNNPredictor(config.head_dim, num_classes + 1),
            fg_iou_thresh=0.5,
            bg_iou_thresh=0.5,
            # Mining chooses among all proposals.
            batch_size_per_image=2**31 if config.hard_negatives is not None else config.rois_per_image,
            positive_fraction=0.25,
            bbox_reg_weights=None,
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_iou,
            detections_per_img=config.max_detections,
        )
        self.box_loss, self.miner = config.box_loss, _miner(config)

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        if self.training:
            proposals, _, labels, regression_targets = self.select_training_samples(proposals, targets)
        pooled = self.box_roi_pool(features, proposals, image_shapes)
        logits, deltas = (each.float() for each in self.box_predictor(self.box_head(pooled)))
        if self.training:
            return [], self._losses(logits, deltas, proposals, labels, regression_targets)
        found = zip(*self.postprocess_detections(logits, deltas, proposals, image_shapes), strict=True)
        return [{"boxes": boxes, "scores": scores, "labels": labels} for boxes, scores, labels in found], {}

    def _losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        proposals: list[Tensor],
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> dict[str, Tensor]:
        wanted = torch.cat(labels)
        losses = F.cross_entropy(logits, wanted, reduction="none")
        if self.miner is not None:
            losses = losses[hard_negatives(losses, labels, self.miner)]
        positive = wanted.nonzero().squeeze(1)
        boxes, deltas = torch.cat(proposals)[positive], deltas.view(len(deltas), -1, 4)
        true_boxes = self.box_coder.decode_single(torch.cat(regression_targets)[positive], boxes)
        box_losses = _box_loss(
            self.box_loss,
            self.box_coder,
            boxes,
            true_boxes,
            deltas[positive, wanted[positive]],
            {"beta": 1 / 9},
        )
        # An IoU loss of at most 2 for a box would drown among the negatives; coded differences are times 5 to 10.
        divisor = len(losses) if self.box_loss == "smooth_l1" else len(positive)
        return {
            "loss_classifier": losses.sum() / max(1, len(losses)),
            "loss_box_reg": box_losses / max(1, divisor),
        }


class _RoIAlign(MultiScaleRoIAlign):
    """RoIAlign that knows its strides, and is always the compiled one.

    torchvision guesses the strides from the first batch that it meets, wrongly for an image of a few pixels;
    and where deterministic algorithms are asked for on a GPU it takes an uncompiled one, of many gigabytes.
    The compiled one adds up its gradients on a GPU in any order.
    """

    def __init__(self, num_levels: int, config: "FasterRCNNConfig") -> None:
        super().__init__(
            [str(i) for i in range(num_levels)], config.roi_resolution, config.roi_sampling_ratio
        )
        self.scales = [1 / (4 * 2**i) for i in range(num_levels)]
        # As many anchors' sides as torchvision's 224 px are of its 32.
        self.map_levels = LevelMapper(
            2, num_levels + 1, canonical_scale=7 * config.anchor_sizes_px[0][0], canonical_level=4
        )

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        mode = torch.get_deterministic_debug_mode()
        torch.set_deterministic_debug_mode("default")
        try:
            return super().forward(x, boxes, image_shapes)
        finally:
            torch.set_deterministic_debug_mode(mode)


# --- RetinaNet ----------------------------------------------------------------------------------------


class LesionRetinaNet(RetinaNet):
    """torchvision's RetinaNet from our configuration; label 0 is the first class."""

    def __init__(self, num_classes: int, channels: int, config: "RetinaNetConfig") -> None:
        backbone, anchors = Pyramid(channels, config), _Anchors(config)
        super().__init__(
            backbone,
            num_classes,
            anchor_generator=anchors,
            head=_DenseHead(num_classes, anchors.num_anchors_per_location()[0], config),
            score_thresh=config.score_threshold,
            nms_thresh=config.nms_iou,
            detections_per_img=config.max_detections,
        )
        self.transform = _AsTheyCome(2 ** (backbone.num_levels + 1))

    @property
    def divisor(self) -> Tensor | None:
        """The anchors on the lesions of the last batch in training."""
        return self.head.divisor

    def anchors_xyxy(self, height_px: int, width_px: int) -> list[Tensor]:
        """The anchors of an image, A 4 for each level."""
        return _anchors_by_level(self.anchor_generator, self.backbone, height_px, width_px)


class _DenseHead(RetinaNetHead):
    """The two heads, and their losses over the whole batch."""

    def __init__(self, num_classes: int, num_anchors: int, config: "RetinaNetConfig") -> None:
        super().__init__(config.fpn_channels, num_anchors, num_classes, norm_layer=_PlaceNorm)
        for head in (self.classification_head, self.regression_head):
            head.conv = head.conv[: config.num_head_convs]
        self.box_loss = config.box_loss
        self.divisor: Tensor | None = None

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        return {name: each.float() for name, each in super().forward(x).items()}

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        matched_idxs: list[Tensor],
    ) -> dict[str, Tensor]:
        coder = self.regression_head.box_coder
        class_losses, box_losses, num_positive = [], [], 0
        for i, (target, matched) in enumerate(zip(targets, matched_idxs, strict=True)):
            logits, positive = head_outputs["cls_logits"][i], matched >= 0
            true = matched[positive]
            classes = torch.zeros_like(logits)
            classes[positive, target["labels"][true]] = 1.0
            known = matched != self.classification_head.BETWEEN_THRESHOLDS
            class_losses.append(sigmoid_focal_loss(logits[known], classes[known], reduction="sum"))
            deltas = head_outputs["bbox_regression"][i][positive]
            boxes = _box_loss(
                self.box_loss, coder, anchors[i][positive], target["boxes"][true], deltas, {"beta": 1 / 9}
            )
            box_losses.append(boxes)
            num_positive += len(true)
        divisor = max(1, num_positive)
        self.divisor = class_losses[0].new_tensor(float(num_positive))
        return {
            "classification": torch.stack(class_losses).sum() / divisor,
            "bbox_regression": torch.stack(box_losses).sum() / divisor,
        }
