"""Images before a detector: whole or in tiles, and the boxes brought back to stored pixels."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from cadx.loading.boxes import View, crop_input, image_moments, merge_tiles, tile_grid, to_raw
from cadx.models.detector_config import DetectorConfig
from cadx.models.interface import Detections
from cadx.models.yolo_config import YOLOConfig
from cadx.transforms import Preprocessing

BoxModel = DetectorConfig | YOLOConfig
TILE_OVERLAP = 0.25
"""Of a tile's shorter side: a lesion that is smaller is whole in at least one tile."""
_TILES_AT_ONCE = 16


def detect(
    network: Callable[[Tensor], list[Detections]],
    images: Sequence[np.ndarray],
    preprocessing: Preprocessing,
    device: torch.device,
    model: BoxModel,
) -> list[Detections]:
    """What a detector sees in each image, its boxes (float64) in stored pixels, by falling score, on the CPU.

    Args:
        network: in eval mode.
        images: raw pixels, H W or H W 3.
        preprocessing: `fit: tile` looks at each image in overlapping tiles; else as a whole, all as one batch.
        device: where the network is.
        model: the network's; its `nms_iou` and `max_detections` hold for an image, of however many tiles.
    """
    if preprocessing.fit == "tile":
        return [_detect_in_tiles(network, pixels, preprocessing, device, model) for pixels in images]
    answers = network(torch.stack([preprocessing.apply(pixels) for pixels in images]).to(device))
    sizes = [(pixels.shape[0], pixels.shape[1]) for pixels in images]
    return [
        to_raw(answer, View.of_image(preprocessing, size))
        for answer, size in zip(answers, sizes, strict=True)
    ]


def _detect_in_tiles(
    network: Callable[[Tensor], list[Detections]],
    pixels: np.ndarray,
    preprocessing: Preprocessing,
    device: torch.device,
    model: BoxModel,
) -> Detections:
    tile_px, size = (preprocessing.height_px, preprocessing.width_px), (pixels.shape[0], pixels.shape[1])
    regions = tile_grid(*size, tile_px, int(TILE_OVERLAP * min(tile_px)))
    views = [View.of_region(region, tile_px, size) for region in regions]
    moments = image_moments(pixels, preprocessing) if preprocessing.intensity == "image" else None
    answers: list[Detections] = []
    for start in range(0, len(views), _TILES_AT_ONCE):
        group = views[start : start + _TILES_AT_ONCE]
        inputs = [crop_input(pixels.__getitem__, view, preprocessing, moments) for view in group]
        answers += network(torch.stack(inputs).to(device))
    found = merge_tiles(answers, views, nms_iou=model.nms_iou)
    return Detections(*(part[: model.max_detections] for part in found))


def pool_detections(members: Sequence[Detections], *, nms_iou: float, max_detections: int) -> Detections:
    """One answer of several networks to an image: each box once, its score the mean over all members.

    Boxes of a class that overlap by more than `nms_iou` are one; a member that does not see it counts as a score of
    0. The box kept is that of the surest member, and at most `max_detections` of the highest scores stay. One member's
    answer is returned as it is.
    """
    from torchvision.ops import box_iou

    if len(members) == 1:
        return members[0]
    every = Detections(*(torch.cat(parts) for parts in zip(*members, strict=True)))
    member = torch.cat([torch.full((len(one.labels),), number) for number, one in enumerate(members)])
    order = torch.argsort(every.scores, descending=True, stable=True)
    same = box_iou(every.boxes_xyxy, every.boxes_xyxy) > nms_iou
    same &= every.labels[:, None] == every.labels
    kept: list[int] = []
    scores: list[float] = []
    free = torch.ones(len(order), dtype=torch.bool)
    for first in order.tolist():
        if not free[first]:
            continue
        group = same[first] & free
        group[first] = True
        free &= ~group
        best = [
            every.scores[group & (member == number)].max().item() for number in set(member[group].tolist())
        ]
        kept.append(first)
        scores.append(sum(best) / len(members))
    ranked = sorted(zip(scores, kept, strict=True), key=lambda pair: -pair[0])[:max_detections]
    index = torch.tensor([place for _, place in ranked], dtype=torch.int64)
    return Detections(
        every.boxes_xyxy[index],
        every.labels[index],
        torch.tensor([score for score, _ in ranked], dtype=every.scores.dtype),
    )


def detectors_answer(
    networks: Sequence[nn.Module],
    images: Sequence[np.ndarray],
    preprocessing: Preprocessing,
    device: torch.device,
    model: BoxModel,
) -> list[Detections]:
    """What a bundle's members see in each image, pooled by their model's `nms_iou` and `max_detections`."""
    answers = [detect(network, images, preprocessing, device, model) for network in networks]
    return [
        pool_detections(members, nms_iou=model.nms_iou, max_detections=model.max_detections)
        for members in zip(*answers, strict=True)
    ]
