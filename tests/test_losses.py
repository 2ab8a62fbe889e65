"""Losses against torch's and torchvision's own, and the faults of the chapter's sketches of them."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from cadx.losses import BalancedCrossEntropyLoss, FocalLoss
from cadx.weighting import LossConfig, class_weights, count_labels

CLASSES = torch.tensor([0, 0, 2, 1, 0, 2])
WEIGHTS = torch.tensor([0.5, 3.0, 1.2])
LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def logits() -> Tensor:
    return torch.randn(6, 3) * 2


@pytest.fixture
def label_logits() -> Tensor:
    return torch.randn(4, 3) * 2


def test_class_numbers_and_one_hot_rows_agree(logits: Tensor) -> None:
    for loss in (FocalLoss(), BalancedCrossEntropyLoss(WEIGHTS)):
        torch.testing.assert_close(loss(logits, CLASSES), loss(logits, F.one_hot(CLASSES, 3).float()))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_balanced_cross_entropy_is_torchs(logits: Tensor, smoothing: float) -> None:
    ours = BalancedCrossEntropyLoss(WEIGHTS, label_smoothing=smoothing)(logits, CLASSES)
    theirs = F.cross_entropy(logits, CLASSES, weight=WEIGHTS, label_smoothing=smoothing)
    torch.testing.assert_close(ours, theirs)


def test_focal_loss_without_gamma_is_cross_entropy(logits: Tensor, label_logits: Tensor) -> None:
    torch.testing.assert_close(FocalLoss(gamma=0)(logits, CLASSES), F.cross_entropy(logits, CLASSES))
    torch.testing.assert_close(
        FocalLoss(gamma=0, multilabel=True)(label_logits, LABELS),
        F.binary_cross_entropy_with_logits(label_logits, LABELS),
    )


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_softmax_focal_loss_follows_its_formula(logits: Tensor, gamma: float) -> None:
    total = 0.0
    for row, target in zip(logits.double().numpy(), CLASSES.tolist(), strict=True):
        p = float(np.exp(row[target]) / np.exp(row).sum())
        total += WEIGHTS[target].item() * (1 - p) ** gamma * -math.log(p)
    assert FocalLoss(WEIGHTS, gamma)(logits, CLASSES).item() == pytest.approx(total / 6, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_sigmoid_focal_loss_is_torchvisions(label_logits: Tensor, gamma: float) -> None:
    ours = FocalLoss(0.25, gamma, multilabel=True)(label_logits, LABELS)
    theirs = sigmoid_focal_loss(label_logits, LABELS, alpha=0.25, gamma=gamma, reduction="mean")
    torch.testing.assert_close(ours, theirs)


def test_weighted_multilabel_loss_follows_its_formula(label_logits: Tensor) -> None:
    weights = torch.tensor([[1.0, 4.0], [0.5, 2.0], [1.0, 1.0]])
    each = torch.where(LABELS == 1, weights[:, 1], weights[:, 0])
    expected = F.binary_cross_entropy_with_logits(label_logits, LABELS, each, reduction="sum") / each.sum()
    torch.testing.assert_close(
        BalancedCrossEntropyLoss(weights, multilabel=True)(label_logits, LABELS), expected
    )


# Faults of the chapter's sketches


def test_alpha_is_one_per_class_not_one_scalar(logits: Tensor) -> None:
    per_class = [FocalLoss(F.one_hot(torch.tensor(k), 3).float())(logits, CLASSES) for k in range(3)]
    assert len({round(value.item(), 6) for value in per_class}) == 3
    torch.testing.assert_close(sum(per_class), FocalLoss()(logits, CLASSES))


def test_multilabel_targets_do_not_compete(label_logits: Tensor) -> None:
    raised = label_logits.clone()
    raised[0, 0] += 3  # its label is 1: under a softmax the other classes would suffer
    loss = FocalLoss(multilabel=True)
    difference = loss(raised, LABELS) - loss(label_logits, LABELS)
    alone = FocalLoss(multilabel=True)
    expected = (alone(raised[:1, :1], LABELS[:1, :1]) - alone(label_logits[:1, :1], LABELS[:1, :1])) / 12
    torch.testing.assert_close(difference, expected, rtol=1e-4, atol=1e-7)


def test_weighted_loss_divides_by_the_summed_weights(logits: Tensor) -> None:
    plain = BalancedCrossEntropyLoss()(logits, CLASSES)
    # Scaling every weight must not scale the loss, as dividing by N would.
    torch.testing.assert_close(BalancedCrossEntropyLoss(torch.full((3,), 7.0))(logits, CLASSES), plain)


# NaN = unlabelled


@pytest.mark.parametrize("kind", ["cross_entropy", "focal"])
@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
def test_the_unlabelled_neither_count_nor_learn(kind: str, task: str, logits: Tensor) -> None:
    labels = F.one_hot(CLASSES, 3).float().numpy()
    loss = LossConfig(kind=kind, weights="balanced").build(task, count_labels(labels))
    targets = torch.from_numpy(labels)
    targets[1] = math.nan
    logits.requires_grad_()
    value = loss(logits, targets)
    kept = [0, 2, 3, 4, 5]
    torch.testing.assert_close(value, loss(logits[kept], targets[kept]))
    value.backward()
    assert logits.grad is not None
    assert logits.grad[1].eq(0).all()
    assert logits.grad.isfinite().all()


def test_one_unlabelled_label_leaves_the_others(label_logits: Tensor) -> None:
    targets = LABELS.clone()
    targets[0, 1] = math.nan
    known = targets.isfinite()
    expected = F.binary_cross_entropy_with_logits(label_logits[known], targets[known])
    torch.testing.assert_close(BalancedCrossEntropyLoss(multilabel=True)(label_logits, targets), expected)


@pytest.mark.parametrize("loss", [FocalLoss(), BalancedCrossEntropyLoss(WEIGHTS), FocalLoss(multilabel=True)])
def test_a_batch_without_labels_gives_zero_with_a_gradient(loss: torch.nn.Module, logits: Tensor) -> None:
    logits.requires_grad_()
    value = loss(logits, torch.full((6, 3), math.nan))
    value.backward()
    assert value.item() == 0
    assert logits.grad is not None
    assert logits.grad.eq(0).all()


# Numbers


@pytest.mark.parametrize("multilabel", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.7, 2.0])
def test_gradients_are_those_of_the_value(multilabel: bool, gamma: float) -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    targets = LABELS.double() if multilabel else F.one_hot(CLASSES[:4], 3).double()
    loss = FocalLoss(0.3, gamma, multilabel=multilabel, label_smoothing=0.1)
    assert torch.autograd.gradcheck(lambda x: loss(x, targets), (logits,))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("multilabel", [False, True])
def test_extreme_logits_stay_finite(multilabel: bool, gamma: float) -> None:
    logits = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [0.0, 0.0]], requires_grad=True)
    targets = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    value = FocalLoss(gamma=gamma, multilabel=multilabel)(logits, targets)
    value.backward()
    assert value.isfinite()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


# Class weights


@given(
    st.lists(st.integers(0, 10_000), min_size=2, max_size=8).filter(any),
    st.sampled_from(["none", "balanced", "effective_number"]),
    st.floats(0, 0.99999),
)
def test_mean_weight_over_samples_is_one(counts: list[int], weighting: str, beta: float) -> None:
    weights = class_weights(np.array(counts), weighting, beta)
    assert np.isfinite(weights).all()
    assert (weights[np.array(counts) == 0] == 0).all()
    assert np.dot(weights, counts) / sum(counts) == pytest.approx(1)


def test_weights_follow_their_formulas() -> None:
    counts = np.array([900, 90, 10])
    np.testing.assert_allclose(class_weights(counts, "balanced"), 1000 / (3 * counts))
    effective = class_weights(counts, "effective_number", 0.99)
    inverse = (1 - 0.99) / (1 - 0.99**counts)
    np.testing.assert_allclose(effective / effective[0], inverse / inverse[0])


def test_one_in_a_thousand_and_an_empty_class_are_ordinary() -> None:
    labels = np.zeros((1001, 3), np.float32)
    labels[:1000, 0] = 1
    labels[1000, 1] = 1
    logits = torch.randn(1001, 3)
    for task in ("multiclass", "multilabel"):
        for weights in ("balanced", "effective_number"):
            for kind in ("cross_entropy", "focal"):
                loss = LossConfig(kind=kind, weights=weights).build(task, count_labels(labels))
                assert loss(logits, torch.from_numpy(labels)).isfinite()
    balanced = LossConfig(weights="balanced").build("multiclass", count_labels(labels))
    rare = F.cross_entropy(logits[1000:], torch.tensor([1]))
    common = F.cross_entropy(logits[:1000], torch.zeros(1000, dtype=torch.long))
    torch.testing.assert_close(balanced(logits, torch.from_numpy(labels)), (rare + common) / 2)
