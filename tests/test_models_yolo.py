"""The one-stage detector: its sizes, its assigner against loops, what it learns; and the faults of the sketch."""

import copy
import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torchvision.ops import box_iou

from cadx.models.checkpointing import enable_checkpointing
from cadx.models.interface import Detections
from cadx.models.yolo import MedicalYOLO, Predicted, TaskAlignedAssigner, YOLOConfig

SMALL = YOLOConfig(width=0.25, depth=0.1)
NOTHING = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))


def _lesions(*boxes: tuple[float, float, float, float], labels: list[int] | None = None) -> Detections:
    chosen = labels or [0] * len(boxes)
    return Detections(torch.tensor(boxes), torch.tensor(chosen), torch.ones(len(boxes)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _eager(network: MedicalYOLO) -> MedicalYOLO:
    """Answers with many boxes, as no untrained network would."""
    for head in network.heads:
        nn.init.normal_(head.logits.weight, std=1.0)
        nn.init.normal_(head.sides.weight, std=1.0)
        nn.init.zeros_(head.logits.bias)
    return network.eval()


# What goes in and comes out


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(("height", "width"), [(65, 97), (128, 128), (200, 120), (5, 7)])
def test_every_size_of_image_trains_and_is_answered(height: int, width: int, norm: str) -> None:
    """The sketch's linear layer expects a number of features that no input has: every image raises."""
    network = _eager(SMALL.model_copy(update={"norm": norm}).build(3, channels=2))
    images = torch.randn(2, 2, height, width)
    corner = _lesions((width - 4.0, height - 4.0, float(width), float(height)), labels=[2])
    losses = network.train()(images, [corner, NOTHING])
    assert set(losses) == {"objectness", "class", "box"}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())
    answers = network.eval()(images)
    assert len(answers) == 2
    for boxes, labels, scores in answers:
        assert 0 < len(boxes) == len(labels) == len(scores) <= SMALL.max_detections
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, :2] < boxes[:, 2:]).all()
        assert (boxes[:, 2:] <= torch.tensor([width, height])).all()
        assert labels.dtype == torch.int64
        assert ((labels >= 0) & (labels < 3)).all()
        assert ((scores > SMALL.score_threshold) & (scores <= 1)).all()
        assert scores.tolist() == sorted(scores.tolist(), reverse=True)


@pytest.mark.parametrize("strides", [(4,), (8, 16, 32), (2, 4)])
@pytest.mark.parametrize("ratio", [None, 3.0])
def test_strides_and_hard_negatives_are_a_choice(strides: tuple[int, ...], ratio: float | None) -> None:
    network = YOLOConfig(width=0.25, depth=0.7, strides=strides, hard_negative_ratio=ratio).build(1, 1)
    images = torch.randn(1, 1, 48, 80)
    predicted = network.predict(images)
    assert len(predicted.points_xy) == sum(math.ceil(48 / s) * (80 // s) for s in strides[:-1]) + len(
        [
            (y, x)
            for y in range(48)
            for x in range(80)
            if y % strides[-1] == x % strides[-1] == strides[-1] // 2
        ]
    )
    sum(network(images, [_lesions((10, 10, 20, 20))]).values()).backward()


@pytest.mark.parametrize("strides", [(), (4, 16), (8, 4), (3, 6), (4, 8, 8)])
def test_strides_that_make_no_pyramid_are_refused(strides: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="strides are"):
        YOLOConfig(strides=strides)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_an_answer_does_not_depend_on_the_batch(norm: str) -> None:
    network = _eager(SMALL.model_copy(update={"norm": norm}).build(2, channels=1))
    images = torch.randn(3, 1, 64, 64)
    together = network(images)
    for image, expected in zip(images, together, strict=True):
        (alone,) = network(image[None])
        for one, other in zip(alone, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)  # pixels, among others


def test_what_lies_beyond_the_image_changes_nothing_inside() -> None:
    network = _eager(SMALL.build(1, channels=1))
    image = torch.randn(1, 1, 50, 70)
    padded = nn.functional.pad(image, (0, 10, 0, 14), mode="replicate")
    points = network.predict(image).points_xy
    assert (points < torch.tensor([70, 50])).all()
    expected = network.predict(padded)
    row_of = {tuple(point): i for i, point in enumerate(expected.points_xy.tolist())}
    rows = [row_of[tuple(point)] for point in points.tolist()]
    torch.testing.assert_close(
        network.predict(image).objectness_logits, expected.objectness_logits[:, rows], rtol=1e-4, atol=1e-4
    )


def test_boxes_that_shrink_to_nothing_still_have_a_gradient() -> None:
    network = SMALL.build(1, channels=1)
    for head in network.heads:
        nn.init.constant_(head.sides.bias, -200.0)
    losses = network(torch.randn(1, 1, 32, 32), [_lesions((8, 8, 20, 20))])
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_training_without_targets_answers_with_boxes() -> None:
    answer = SMALL.build(1, channels=1).train()(torch.randn(1, 1, 32, 32))
    assert isinstance(answer[0], Detections)


def test_losses_stay_float32_under_mixed_precision() -> None:
    network = SMALL.build(1, channels=1)
    with torch.autocast("cpu", torch.bfloat16):
        losses = network(torch.randn(1, 1, 32, 32), [_lesions((8, 8, 20, 20))])
    assert {value.dtype for value in losses.values()} == {torch.float32}
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_weights_and_losses_are_a_function_of_the_seed() -> None:
    losses = []
    for _ in range(2):
        torch.manual_seed(3)
        network = SMALL.build(2, channels=1)
        images = torch.randn(2, 1, 64, 64)
        losses.append(network(images, [_lesions((8, 8, 20, 20), (30, 30, 36, 40), labels=[0, 1]), NOTHING]))
    assert losses[0] == losses[1]


def test_stages_hold_every_block_that_is_worth_recomputing() -> None:
    network = YOLOConfig(width=0.25).build(1, channels=1)
    seen: list[nn.Module] = []
    for stage in network.stages():
        stage.register_forward_hook(lambda module, *_: seen.append(module))
    network(torch.randn(1, 1, 64, 64), [NOTHING])
    assert list(dict.fromkeys(seen)) == [
        *network.backbone.blocks,
        network.neck.down[1],
        network.neck.down[0],
        *network.neck.up,
        *(branch for head in network.heads for branch in (head.box, head.lesion)),
    ]
    inside = sum(p.numel() for stage in network.stages() for p in stage.parameters())
    assert inside > 0.75 * sum(p.numel() for p in network.parameters())


def test_recomputed_activations_give_the_same_gradients_and_statistics() -> None:
    kept = YOLOConfig(width=0.25).build(1, channels=1)
    twice = copy.deepcopy(kept)
    enable_checkpointing(twice)
    images, targets = torch.randn(2, 1, 64, 64), [_lesions((8, 8, 20, 20)), NOTHING]
    for network in (kept, twice):
        sum(network(images, targets).values()).backward()
    for a, b in zip(kept.parameters(), twice.parameters(), strict=True):
        assert a.grad is not None
        assert torch.equal(a.grad, b.grad)
    assert all(torch.equal(a, b) for a, b in zip(kept.buffers(), twice.buffers(), strict=True))


# Who learns what


def _slow_assignment(
    predicted: Predicted, target: Detections, top_k: int, alpha: float, beta: float
) -> list[tuple[int, float]]:
    """(lesion or -1, quality) of each location, one at a time, in float64."""
    scores = predicted.scores()[0].detach().double().numpy()
    overlaps = box_iou(target.boxes_xyxy.double(), predicted.boxes_xyxy[0].detach().double()).numpy()
    points = predicted.points_xy.double().numpy()
    claims: list[list[int]] = [[] for _ in points]
    alignment = np.zeros_like(overlaps)
    for b, (x0, y0, x1, y1) in enumerate(target.boxes_xyxy.tolist()):
        inside = [a for a, (x, y) in enumerate(points) if x0 <= x < x1 and y0 <= y < y1]
        if not inside:
            centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
            inside = [min(range(len(points)), key=lambda a: float(np.linalg.norm(points[a] - centre)))]
        for a in inside:
            alignment[b, a] = scores[a, target.labels[b]] ** alpha * overlaps[b, a] ** beta
        for a in sorted(inside, key=lambda a: -alignment[b, a])[:top_k]:
            claims[a].append(b)
    owners = [max(claim, key=lambda b: overlaps[b, a]) if claim else -1 for a, claim in enumerate(claims)]
    answers = []
    for a, b in enumerate(owners):
        if b < 0:
            answers.append((-1, 0.0))
            continue
        own = [i for i, owner in enumerate(owners) if owner == b]
        largest = max(0.1, *(overlaps[b, i] for i in own), 0.0)
        answers.append((b, alignment[b, a] / max(alignment[b, i] for i in own) * largest))
    return answers


@pytest.mark.parametrize(("top_k", "alpha", "beta"), [(3, 1.0, 6.0), (9, 0.5, 2.0), (1000, 1.0, 1.0)])
def test_the_assigner_agrees_with_loops(top_k: int, alpha: float, beta: float) -> None:
    network = _eager(SMALL.build(3, channels=1))
    predicted = network.predict(torch.randn(1, 1, 48, 56))
    target = _lesions(
        (10, 10, 30, 26),
        (14, 12, 36, 30),
        (40, 4, 45, 9),
        (3.0, 30.0, 4.5, 31.5),
        (20, 33, 52, 47),
        labels=[0, 2, 1, 1, 2],
    )
    assigned = TaskAlignedAssigner(top_k, alpha, beta)(predicted, [target])
    expected = _slow_assignment(predicted, target, top_k, alpha, beta)
    owned = torch.tensor([b for b, _ in expected])
    qualities = torch.tensor([quality for _, quality in expected], dtype=torch.float32)
    assert set(owned.tolist()) == {-1, 0, 1, 2, 3, 4}
    torch.testing.assert_close(assigned.qualities[0], qualities, rtol=1e-3, atol=1e-6)
    lesion = owned >= 0
    torch.testing.assert_close(assigned.labels[0][lesion], target.labels[owned[lesion]])
    torch.testing.assert_close(assigned.boxes_xyxy[0][lesion], target.boxes_xyxy[owned[lesion]])


def test_a_lesion_between_locations_and_one_that_no_box_meets_are_learnt_all_the_same() -> None:
    points = torch.tensor([[2.0, 2.0], [6.0, 2.0]])
    boxes = torch.tensor([[1.9, 1.9, 2.1, 2.1], [5.9, 1.9, 6.1, 2.1]])  # neither meets the lesion
    predicted = Predicted(torch.zeros(1, 2), torch.zeros(1, 2, 1), boxes[None], points)
    assigned = TaskAlignedAssigner()(predicted, [_lesions((3.0, 1.0, 3.5, 1.5))])
    torch.testing.assert_close(assigned.qualities, torch.tensor([[0.1, 0.0]]))


def test_the_assignment_of_an_image_does_not_depend_on_its_neighbours() -> None:
    network = _eager(SMALL.build(1, channels=1))
    predicted = network.predict(torch.randn(2, 1, 48, 48))
    targets = [_lesions((8, 8, 24, 24)), _lesions((20, 20, 40, 40), (2, 2, 8, 8))]
    both = network.assigner(predicted, targets)
    second = Predicted(*(part[1:] for part in predicted[:3]), predicted.points_xy)
    for one, other in zip(network.assigner(second, targets[1:]), both, strict=True):
        torch.testing.assert_close(one, other[1:])


# What it learns


def _blobs(num_images: int, size_px: tuple[int, int]) -> tuple[Tensor, list[Detections]]:
    """Noise with up to three bright (class 0) or dark (class 1) rectangles; the first image has none."""
    rng = np.random.default_rng(0)
    images = 0.1 * torch.randn(num_images, 1, 64, 64)
    targets = [NOTHING]
    for image in images[1:]:
        boxes, labels = [], []
        for cell in rng.choice(4, size=int(rng.integers(1, 4)), replace=False):
            width, height = (int(side) for side in rng.integers(size_px[0], size_px[1] + 1, 2))
            x0, y0 = (
                32 * int(cell % 2) + int(rng.integers(1, 16)),
                32 * int(cell // 2) + int(rng.integers(1, 16)),
            )
            label = int(rng.integers(2))
            image[0, y0 : y0 + height, x0 : x0 + width] += (2.0, -2.0)[label]
            boxes.append((x0, y0, x0 + width, y0 + height))
            labels.append(label)
        targets.append(_lesions(*boxes, labels=labels))
    return images, targets


def _overfit(config: YOLOConfig, images: Tensor, targets: list[Detections], steps: int) -> MedicalYOLO:
    network = config.build(2, channels=1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=4e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = 4e-3 * min(1.0, (step + 1) / 10, 2 * (1 - step / steps))
        optimiser.zero_grad()
        sum(network(images, targets).values()).backward()
        optimiser.step()
    return network.eval()


@pytest.mark.parametrize(
    ("sizes", "update"),
    [
        ((4, 8), {}),
        ((10, 15), {"norm": "group", "hard_negative_ratio": 3.0, "box_loss": "giou"}),
    ],
    ids=["tiny", "small"],
)
def test_it_finds_all_lesions_of_a_batch_and_nothing_else(
    sizes: tuple[int, int], update: dict[str, object]
) -> None:
    images, targets = _blobs(5, sizes)
    network = _overfit(SMALL.model_copy(update=update), images, targets, steps=80)
    for answer, target in zip(network(images), targets, strict=True):
        right = torch.zeros(len(answer.scores), dtype=torch.bool)
        for box, label in zip(target.boxes_xyxy, target.labels, strict=True):
            hits = (box_iou(box[None], answer.boxes_xyxy)[0] >= 0.5) & (answer.labels == label)
            assert answer.scores[hits].max() > 0.5
            right |= hits
            best = answer.boxes_xyxy[hits][answer.scores[hits].argmax()]
            # Half-open: the centre of a box is the centre of its pixels.
            offset = (best[:2] + best[2:] - box[:2] - box[2:]) / 2
            assert offset.abs().max() < 1.0
        assert (answer.scores[~right] < 0.5).all()


def test_weights_survive_their_state() -> None:
    network = _eager(SMALL.build(2, channels=3))
    other = SMALL.build(2, channels=3).eval()
    other.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 40, 40)
    for one, expected in zip(other(images)[0], network(images)[0], strict=True):
        assert one.equal(expected)
