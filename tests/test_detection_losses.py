"""The detector's loss against formulas in NumPy and torchvision's own, and the faults of the chapter's sketch of it."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from cadx.losses import AssignedTargets, FocalLossForDetection

TARGET = torch.tensor([10.0, 20, 30, 50])
BOX = torch.tensor([14.0, 16, 38, 48])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _targets(qualities: list[float], labels: list[int], boxes: Tensor | None = None) -> AssignedTargets:
    """One image with a location per quality; every lesion is `TARGET` unless told."""
    boxes = TARGET.expand(len(qualities), 4) if boxes is None else boxes
    return AssignedTargets(torch.tensor([qualities]), torch.tensor([labels]), boxes[None])


def _focal(p: float, q: float, alpha: float | None, gamma: float) -> float:
    entropy = -q * math.log(p) - (1 - q) * math.log(1 - p)
    weight = 1.0 if alpha is None else (alpha if q > 0 else 1 - alpha)
    return weight * abs(q - p) ** gamma * entropy


def _giou_and_ciou_losses(box: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    width, height = (min(box[i + 2], target[i + 2]) - max(box[i], target[i]) for i in range(2))
    shared = max(width, 0) * max(height, 0)
    sides, target_sides = box[2:] - box[:2], target[2:] - target[:2]
    union = sides.prod() + target_sides.prod() - shared
    hull = np.maximum(box[2:], target[2:]) - np.minimum(box[:2], target[:2])
    giou = shared / union - (hull.prod() - union) / hull.prod()
    between = ((box[:2] + box[2:] - target[:2] - target[2:]) / 2) @ (
        (box[:2] + box[2:] - target[:2] - target[2:]) / 2
    )
    v = 4 / math.pi**2 * (math.atan(target_sides[0] / target_sides[1]) - math.atan(sides[0] / sides[1])) ** 2
    ciou = shared / union - between / (hull @ hull) - v * v / (1 - shared / union + v)
    return 1 - giou, 1 - ciou


# Faults of the chapter's sketch


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_an_easy_negative_vanishes_and_a_hard_one_stays(gamma: float) -> None:
    """The sketch weighs negatives by (1 - p)^gamma too: the easy keep their full weight and the hard vanish."""
    p = torch.tensor([0.001, 0.5, 0.999])
    losses = FocalLossForDetection(None, gamma).objectness_losses(p.logit(), torch.zeros(3))
    weights = losses / -torch.log1p(-p)
    torch.testing.assert_close(weights, p**gamma, rtol=1e-4, atol=0.0)


def test_the_box_loss_does_not_depend_on_the_lesion_s_size() -> None:
    """The sketch takes the squared error of coordinates: a lesion twice as large weighs four times as much."""
    for kind in ("giou", "ciou"):
        loss = FocalLossForDetection(box_loss=kind)
        small, large = (
            loss(
                torch.zeros(1, 1),
                torch.zeros(1, 1, 1),
                scale * BOX[None, None],
                _targets([1.0], [0], scale * TARGET[None]),
            )
            for scale in (0.25, 16.0)
        )
        torch.testing.assert_close(small["box"], large["box"])
        assert small["box"] > 0


# The formulas


@pytest.mark.parametrize("alpha", [None, 0.25])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_objectness_follows_its_formula(alpha: float | None, gamma: float) -> None:
    p, q = [0.02, 0.9, 0.3, 0.8, 0.6], [0.0, 0.0, 0.7, 0.75, 1.0]
    losses = FocalLossForDetection(alpha, gamma).objectness_losses(torch.tensor(p).logit(), torch.tensor(q))
    expected = torch.tensor([_focal(*pair, alpha, gamma) for pair in zip(p, q, strict=True)])
    torch.testing.assert_close(losses, expected)


def test_hard_targets_give_torchvisions_focal_loss() -> None:
    logits, targets = 3 * torch.randn(50), (torch.rand(50) < 0.3).float()
    ours = FocalLossForDetection(0.25, 2.0).objectness_losses(logits, targets)
    torch.testing.assert_close(ours, sigmoid_focal_loss(logits, targets, alpha=0.25, gamma=2.0))


def test_the_best_answer_to_a_quality_is_the_quality() -> None:
    p = torch.linspace(0.01, 0.99, 99)
    losses = FocalLossForDetection().objectness_losses(p.logit(), torch.full_like(p, 0.4))
    assert p[losses.argmin()].item() == pytest.approx(0.4)


def test_the_three_parts_are_weighted_by_quality_and_divided_by_its_sum() -> None:
    qualities, labels = [0.0, 0.9, 0.6, 0.0], [0, 2, 1, 0]
    objectness, classes = torch.randn(1, 4), torch.randn(1, 4, 3)
    boxes = torch.stack([BOX, BOX, TARGET + 3, BOX])[None]
    targets = _targets(qualities, labels)
    log_probs = classes[0].double().log_softmax(-1).tolist()
    overlap = [_giou_and_ciou_losses(box, TARGET.double().numpy()) for box in boxes[0].double().numpy()]
    for kind, column in (("giou", 0), ("ciou", 1)):
        loss = FocalLossForDetection(
            0.25, 2.0, box_loss=kind, objectness_weight=3.0, class_weight=0.5, box_weight=7.0
        )
        answer = loss(objectness, classes, boxes, targets)
        focal = sum(
            _focal(p, q, 0.25, 2.0)
            for p, q in zip(objectness[0].double().sigmoid().tolist(), qualities, strict=True)
        )
        assert answer["objectness"].item() == pytest.approx(3.0 * focal / 1.5, rel=1e-5)
        by_class = -0.9 * log_probs[1][2] - 0.6 * log_probs[2][1]
        assert answer["class"].item() == pytest.approx(0.5 * by_class / 1.5, rel=1e-5)
        by_box = 0.9 * overlap[1][column] + 0.6 * overlap[2][column]
        assert answer["box"].item() == pytest.approx(7.0 * by_box / 1.5, rel=1e-5)


def test_only_what_is_counted_adds_to_the_objectness() -> None:
    loss, logits = FocalLossForDetection(), torch.randn(1, 3)
    counted = torch.tensor([[True, False, True]])
    targets = _targets([1.0, 0.0, 0.0], [0, 0, 0])
    boxes = BOX.expand(1, 3, 4)
    answer = loss(logits, torch.zeros(1, 3, 1), boxes, targets, counted)
    each = loss.objectness_losses(logits, targets.qualities)[0]
    torch.testing.assert_close(answer["objectness"], each[0] + each[2])


# Edges


def test_a_batch_without_a_lesion_has_a_finite_loss_and_teaches_the_background() -> None:
    objectness = torch.randn(2, 5, requires_grad=True)
    classes = torch.randn(2, 5, 3, requires_grad=True)
    boxes = BOX.repeat(2, 5, 1).requires_grad_()
    nothing = AssignedTargets(torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.int64), torch.zeros(2, 5, 4))
    answer = FocalLossForDetection()(objectness, classes, boxes, nothing)
    sum(answer.values(), torch.zeros(())).backward()  # type: ignore[no-untyped-call]
    assert answer["class"] == answer["box"] == 0
    assert objectness.grad is not None
    assert (objectness.grad > 0).all()
    for untaught in (classes, boxes):
        assert untaught.grad is not None  # several processes wait for every gradient
        assert untaught.grad.eq(0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_extreme_logits_stay_finite(gamma: float) -> None:
    logits = torch.tensor([1e4, -1e4, 1e4, -1e4, 0.0], requires_grad=True)
    losses = FocalLossForDetection(gamma=gamma).objectness_losses(
        logits, torch.tensor([0.0, 0.0, 1.0, 0.7, 0.5])
    )
    losses.sum().backward()  # type: ignore[no-untyped-call]
    assert losses.isfinite().all()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("kind", ["giou", "ciou"])
def test_a_box_beside_its_lesion_is_drawn_to_it(kind: str) -> None:
    box = (TARGET + 100).requires_grad_()
    answer = FocalLossForDetection(box_loss=kind)(
        torch.zeros(1, 1), torch.zeros(1, 1, 1), box[None, None], _targets([1.0], [0])
    )
    answer["box"].backward()  # type: ignore[no-untyped-call]
    assert box.grad is not None
    assert (box.grad[:2] > 0).all()  # descent moves its upper left corner up and left
