"""Hard negatives: the background that a detector takes for a lesion, chosen within a batch and kept between epochs.

Within a batch `HardNegativeMiner` chooses which locations of the background count. Between epochs
`mine_false_positives` finds the boxes that were reported and are none, and `MinedNegatives` keeps them, so that
later epochs see crops around them. Nothing here compares the i-th answer with the i-th lesion: who belongs to
whom is the assigner's or the overlap's to say.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

_SAME_BOX_IOU = 0.5
_STREAM = 0x6E6567  # not 0: a seed that ends in zeros is the seed without them


class ScoredBoxes(Protocol):
    """What is mined of the boxes of one image: `cadx.models.Detections` has it."""

    @property
    def boxes_xyxy(self) -> Tensor:
        """B 4 float32, half-open."""
        ...

    @property
    def scores(self) -> Tensor:
        """B float32, 0..1."""
        ...


class MinedBox(NamedTuple):
    """A false positive: its corners, half-open, and the score with which it was reported."""

    x0: float
    y0: float
    x1: float
    y1: float
    score: float


class HardNegativeMiner:
    """Chooses the locations whose loss counts: all of lesions, and of the background the hardest of each image.

    Source: Shrivastava et al. 2016, "Training Region-based Object Detectors with Online Hard Example Mining"; the
    ratio is that of Liu et al. 2016, "SSD", sec. 2.2. Ours is the minimum, which lets an image without a lesion
    teach too.

    Args:
        negative_ratio: background locations per location of a lesion, in the same image.
        min_negatives: background locations of an image at least, also where it has no lesion.

    Raises:
        ValueError: if the ratio is below 0, or the minimum below 1.
    """

    def __init__(self, negative_ratio: float = 3.0, *, min_negatives: int = 64) -> None:
        if negative_ratio < 0 or min_negatives < 1:
            raise ValueError("negative_ratio must be at least 0, and min_negatives at least 1")
        self.negative_ratio, self.min_negatives = negative_ratio, min_negatives

    def mine_hard_negatives(self, losses: Tensor, is_lesion: Tensor) -> Tensor:
        """The locations that count, N A bool: all where `is_lesion`, and the hardest of the others.

        Args:
            losses: N A, the loss of each location; no gradient flows.
            is_lesion: N A bool, the locations to which a lesion was assigned.

        >>> losses = torch.tensor([[0.1, 0.9, 0.5, 0.2]])
        >>> miner = HardNegativeMiner(2.0, min_negatives=1)
        >>> miner.mine_hard_negatives(losses, torch.tensor([[True, False, False, False]])).tolist()
        [[True, True, True, False]]
        """
        wanted = (is_lesion.sum(1) * self.negative_ratio).round().clamp_min(self.min_negatives)
        ranked = losses.detach().masked_fill(is_lesion, -torch.inf)
        order = ranked.argsort(dim=1, descending=True, stable=True)
        within = torch.arange(losses.shape[1], device=losses.device) < wanted[:, None]
        return torch.zeros_like(is_lesion).scatter_(1, order, within) | is_lesion


def mine_false_positives(
    detections: ScoredBoxes, lesions_xyxy: Tensor, *, score_threshold: float = 0.3, max_iou: float = 0.1
) -> list[MinedBox]:
    """The boxes of one image that were reported with confidence and overlap no lesion, highest score first.

    A box on a lesion of another class is a confused class, not background, and is not mined.

    Args:
        detections: what a detector answered.
        lesions_xyxy: L 4, all lesions of the image, whatever their class, in the same pixels; L may be 0.
        score_threshold: 0..1, the least score.
        max_iou: 0..1, the intersection over union with any lesion must stay below it.

    >>> Answer = NamedTuple("Answer", [("boxes_xyxy", Tensor), ("scores", Tensor)])
    >>> boxes = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    >>> mine_false_positives(Answer(boxes, torch.tensor([0.9, 0.75])), boxes[:1])
    [MinedBox(x0=50.0, y0=50.0, x1=60.0, y1=60.0, score=0.75)]
    """
    boxes = detections.boxes_xyxy.detach().double().cpu().numpy()
    scores = detections.scores.detach().double().cpu().numpy()
    lesions = lesions_xyxy.detach().double().cpu().numpy()
    false = (scores >= score_threshold) & (_iou(boxes, lesions).max(1, initial=0.0) < max_iou)
    found = [MinedBox(*box) for box in np.column_stack((boxes, scores))[false].tolist()]
    return sorted(found, key=_hardest_first)


class MinedNegatives:
    """False positives by sample, from which later epochs draw the places of crops.

    Bounded in each sample and in all, the highest scores staying. Boxes are in stored pixels, since crops differ
    from epoch to epoch: the caller brings them there. Processes may each mine their share of the samples and
    merge, in any order.

    Args:
        max_per_sample: boxes that are kept of one sample.
        max_boxes: boxes that are kept in all.

    Raises:
        ValueError: if a bound is below 1.
    """

    def __init__(self, *, max_per_sample: int = 16, max_boxes: int = 20_000) -> None:
        if max_per_sample < 1 or max_boxes < 1:
            raise ValueError("max_per_sample and max_boxes must be at least 1")
        self.max_per_sample, self.max_boxes = max_per_sample, max_boxes
        self._boxes: dict[str, tuple[MinedBox, ...]] = {}

    def __len__(self) -> int:
        """The number of boxes in all."""
        return sum(map(len, self._boxes.values()))

    def of(self, sample_id: str) -> tuple[MinedBox, ...]:
        """The boxes of a sample, highest score first."""
        return self._boxes.get(sample_id, ())

    def add(self, sample_id: str, boxes: Iterable[MinedBox]) -> None:
        """Add what was mined of a sample; a box that is there already (IoU of .5 or more) takes the new score."""
        self._add(sample_id, boxes)
        self._bound()

    def merge(self, newer: Self, *, decay: float = 1.0) -> None:
        """Add all that `newer` holds; the scores of what is here are first multiplied by `decay`.

        With a decay below 1 a false positive that is no longer reported gives way to those that are.

        Raises:
            ValueError: if `decay` is not within 0 to 1.
        """
        if not 0 <= decay <= 1:
            raise ValueError(f"decay is {decay}; give 0 (forget what was) to 1 (keep it)")
        self._boxes = {
            name: tuple(box._replace(score=box.score * decay) for box in boxes)
            for name, boxes in self._boxes.items()
            if decay > 0
        }
        for name, boxes in newer._boxes.items():
            self._add(name, boxes)
        self._bound()

    def draw(self, seed: int, epoch: int, index: int, sample_id: str) -> MinedBox | None:
        """A box of the sample, drawn by score: the same for the same arguments; None if there is none.

        Args:
            seed: of the run, 0 or more.
            epoch: 0 or more.
            index: which item of the epoch asks, 0 or more.
            sample_id: of which sample.
        """
        boxes = self.of(sample_id)
        if not boxes:
            return None
        rng = np.random.default_rng((seed, epoch, index, _STREAM))
        reached = np.cumsum([box.score for box in boxes])
        return boxes[min(int(np.searchsorted(reached, rng.random() * reached[-1], "right")), len(boxes) - 1)]

    def state_dict(self) -> dict[str, Any]:
        """All of it as plain data, for a checkpoint: the bounds, and sample -> [[x0, y0, x1, y1, score], ...]."""
        return {
            "max_per_sample": self.max_per_sample,
            "max_boxes": self.max_boxes,
            "boxes": {name: [list(box) for box in self._boxes[name]] for name in sorted(self._boxes)},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` was taken of."""
        self.max_per_sample, self.max_boxes = state["max_per_sample"], state["max_boxes"]
        self._boxes = {name: tuple(MinedBox(*box) for box in boxes) for name, boxes in state["boxes"].items()}

    def _add(self, sample_id: str, boxes: Iterable[MinedBox]) -> None:
        new = list(boxes)
        old = [box for box in self.of(sample_id) if not _overlaps(box, new)]
        kept = sorted([*old, *new], key=_hardest_first)[: self.max_per_sample]
        if kept:
            self._boxes[sample_id] = tuple(kept)

    def _bound(self) -> None:
        """Drop the lowest scores of all until `max_boxes` are left."""
        excess = len(self) - self.max_boxes
        if excess <= 0:
            return
        everything = ((box, name) for name, boxes in self._boxes.items() for box in boxes)
        ranked = sorted(everything, key=lambda item: (_hardest_first(item[0]), item[1]))
        dropped = set(ranked[self.max_boxes :])
        left = {
            name: tuple(box for box in boxes if (box, name) not in dropped)
            for name, boxes in self._boxes.items()
        }
        self._boxes = {name: boxes for name, boxes in left.items() if boxes}


def _hardest_first(box: MinedBox) -> tuple[float, ...]:
    return (-box.score, *box)


def _overlaps(box: MinedBox, others: list[MinedBox]) -> bool:
    if not others:
        return False
    return bool(_iou(np.array([box[:4]]), np.array([other[:4] for other in others])).max() >= _SAME_BOX_IOU)


def _iou(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """B O intersections over unions; 0 where neither has an area."""
    first, second = boxes[:, None, :], others[None, :, :]
    sides = np.minimum(first[..., 2:], second[..., 2:]) - np.maximum(first[..., :2], second[..., :2])
    shared = sides.clip(min=0).prod(-1)
    areas = (first[..., 2:] - first[..., :2]).prod(-1) + (second[..., 2:] - second[..., :2]).prod(-1)
    return np.divide(shared, areas - shared, out=np.zeros_like(shared), where=areas > shared)
