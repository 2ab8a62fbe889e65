"""Faster R-CNN and RetinaNet for small lesions, and the faults of the chapter's sketch of the former."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn
from torchvision.models.detection import retinanet
from torchvision.ops import box_iou, roi_align

from cadx.mining import HardNegativeMiner
from cadx.models.checkpointing import enable_checkpointing
from cadx.models.detector import (
    DetectorConfig,
    FasterRCNNConfig,
    MedicalDetector,
    MedicalFasterRCNN,
    RetinaNetConfig,
)
from cadx.models.detector_networks import hard_negatives
from cadx.models.interface import Detections

TINY: dict[str, Any] = {
    "width": 0.125,
    "fpn_channels": 32,
    "anchor_sizes_px": ((8,), (16,), (32,)),
}
FASTER = FasterRCNNConfig(**TINY, head_dim=64, norm="batch", box_loss="giou")
RETINA = RetinaNetConfig(**TINY, num_head_convs=1)
KINDS = {"faster_rcnn": FASTER, "retinanet": RETINA}


def changed(config: DetectorConfig, **changes: Any) -> DetectorConfig:
    return type(config).model_validate(config.model_dump() | changes)


def target(boxes: list[list[float]], labels: list[int]) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
        torch.tensor(labels, dtype=torch.int64),
        torch.ones(len(labels)),
    )


TRUTH = [
    target([[20, 24, 32, 34]], [0]),
    target([[60, 10, 76, 30], [12, 70, 30, 84]], [1, 0]),
    target([], []),
    target([[44, 48, 54, 60], [70, 66, 90, 90], [8, 8, 18, 18]], [1, 0, 1]),
]


def draw(targets: list[Detections], size_px: int = 96) -> Tensor:
    """Noise with a rectangle for each box: bright for class 0, dark for class 1; x1 and y1 stay outside."""
    noise = torch.Generator().manual_seed(7)
    images = 0.2 * torch.randn(len(targets), 1, size_px, size_px, generator=noise)
    for image, (boxes, labels, _) in zip(images, targets, strict=True):
        for (x0, y0, x1, y1), label in zip(boxes.int().tolist(), labels.tolist(), strict=True):
            image[0, y0:y1, x0:x1] += 2.0 if label == 0 else -2.0
    return images


def train(network: MedicalDetector, images: Tensor, targets: list[Detections], steps: int) -> MedicalDetector:
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    network.train()
    for _ in range(steps):
        optimizer.zero_grad()
        total_loss(network, images, targets).backward()
        nn.utils.clip_grad_norm_(network.parameters(), 5.0)
        optimizer.step()
        schedule.step()
    return network.eval()


def total_loss(network: MedicalDetector, images: Tensor, targets: list[Detections]) -> Tensor:
    losses = network(images, targets)
    assert isinstance(losses, dict)
    assert all(loss.ndim == 0 for loss in losses.values())
    return torch.stack(list(losses.values())).sum()


def answers(network: MedicalDetector, images: Tensor) -> list[Detections]:
    with torch.inference_mode():
        found = network.eval()(images)
    assert isinstance(found, list)
    return found


@pytest.fixture(scope="module", params=KINDS)
def trained(request: pytest.FixtureRequest) -> MedicalDetector:
    """A network that knows four images by heart."""
    torch.manual_seed(0)
    return train(KINDS[request.param].build(2, 1), draw(TRUTH), TRUTH, steps=240)


@pytest.fixture(params=KINDS)
def network(request: pytest.FixtureRequest) -> MedicalDetector:
    """An untrained network."""
    torch.manual_seed(0)
    return KINDS[request.param].build(2, 1)


# What it learns


def test_a_batch_is_learnt_by_heart(trained: MedicalDetector) -> None:
    for found, truth in zip(answers(trained, draw(TRUTH)), TRUTH, strict=True):
        same_class = found.labels[:, None] == truth.labels
        hits = ((box_iou(found.boxes_xyxy, truth.boxes_xyxy) >= 0.5) & same_class).any(1)
        best = found.scores[: len(truth.boxes_xyxy)]
        assert len(best) == len(truth.boxes_xyxy)
        assert ((box_iou(truth.boxes_xyxy, found.boxes_xyxy[: len(best)]) >= 0.5).any(1)).all()
        assert hits[: len(best)].all()
        assert (best > 0.5).all()
        # What else it answers it believes less, and not at all where there is nothing.
        assert (found.scores[len(best) :] <= 0.5).all()


def test_boxes_are_half_open(trained: MedicalDetector) -> None:
    for found, truth in zip(answers(trained, draw(TRUTH)), TRUTH, strict=True):
        for box in truth.boxes_xyxy:
            distance = (found.boxes_xyxy[found.scores > 0.5] - box).abs().max(1).values
            assert distance.min() < 1.0  # an inclusive x1 or a shifted grid costs as much


def test_an_answer_does_not_depend_on_the_batch(trained: MedicalDetector) -> None:
    images = draw(TRUTH)
    together = answers(trained, images)
    for i, expected in enumerate(together):
        (alone,) = answers(trained, images[i : i + 1])
        assert alone.labels.tolist() == expected.labels.tolist()
        torch.testing.assert_close(alone.boxes_xyxy, expected.boxes_xyxy, rtol=0, atol=1e-2)
        torch.testing.assert_close(alone.scores, expected.scores, rtol=0, atol=1e-4)


def test_weights_survive_their_state_dict(trained: MedicalDetector, tmp_path: Path) -> None:
    torch.save(trained.state_dict(), tmp_path / "weights.pt")
    config = FASTER if isinstance(trained, MedicalFasterRCNN) else RETINA
    again = config.build(2, 1)
    again.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    for one, other in zip(answers(trained, draw(TRUTH)), answers(again, draw(TRUTH)), strict=True):
        for mine, theirs in zip(one, other, strict=True):
            assert torch.equal(mine, theirs)


def test_answers_are_sorted_and_clipped(network: MedicalDetector) -> None:
    config = FASTER if isinstance(network, MedicalFasterRCNN) else RETINA
    anything = changed(config, score_threshold=0, max_detections=1000).build(2, 1)
    (found,) = answers(anything, torch.randn(1, 1, 96, 96))
    assert found.boxes_xyxy.dtype == found.scores.dtype == torch.float32
    assert found.labels.dtype == torch.int64
    assert (found.scores.diff() <= 0).all()
    assert set(found.labels.tolist()) <= {0, 1}
    assert (found.boxes_xyxy == 0).any()  # some were clipped
    assert ((found.boxes_xyxy >= 0) & (found.boxes_xyxy <= 96)).all()
    assert (found.boxes_xyxy[:, 2:] > found.boxes_xyxy[:, :2]).all()


def test_no_more_and_no_weaker_boxes_than_asked_for(trained: MedicalDetector) -> None:
    config = FASTER if isinstance(trained, MedicalFasterRCNN) else RETINA
    few = changed(config, max_detections=2, score_threshold=0.5).build(2, 1)
    few.load_state_dict(trained.state_dict())
    kept = answers(few, draw(TRUTH))
    for short, long in zip(kept, answers(trained, draw(TRUTH)), strict=True):
        torch.testing.assert_close(short.scores, long.scores[long.scores > 0.5][:2])
    assert [len(each.scores) for each in kept] == [1, 2, 0, 2]


# The faults of the chapter's sketch


@pytest.mark.parametrize("height_px", [96, 75])
def test_the_anchors_of_every_level_are_the_small_ones(network: MedicalDetector, height_px: int) -> None:
    """The sketch sets `sizes` on a finished generator, which keeps its old cells: a silent no-op."""
    seen: list[Tensor] = []
    dense = network.network.rpn if isinstance(network, MedicalFasterRCNN) else network.network
    dense.anchor_generator.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    answers(network, torch.randn(1, 1, height_px, 96))
    levels = network.anchors_xyxy(height_px, 96)
    torch.testing.assert_close(torch.cat(levels), seen[0])  # these are what a forward uses
    for anchors, side, stride in zip(levels, (8, 16, 32), (4, 8, 16), strict=True):
        rows = -(-height_px // 16) * 16 // stride
        assert len(anchors) == rows * (96 // stride) * 3
        sizes = anchors[:, 2:] - anchors[:, :2]
        torch.testing.assert_close(sizes.prod(1), torch.full((len(anchors),), float(side) ** 2))
        ratios = (sizes[:, 1] / sizes[:, 0])[:3]
        torch.testing.assert_close(ratios, torch.tensor([0.5, 1.0, 2.0]))
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        assert sorted(set(centres[:, 0].round().tolist())) == list(range(0, 96, stride))


def test_anchors_keep_the_sides_that_were_asked_for() -> None:
    config = changed(FASTER, anchor_sizes_px=((3, 4),), aspect_ratios=(0.5,))
    (level,) = config.build(1, 1).anchors_xyxy(32, 32)
    sizes = level[:2, 2:] - level[:2, :2]
    torch.testing.assert_close(sizes, torch.tensor([[3 * 2**0.5, 3 / 2**0.5], [4 * 2**0.5, 4 / 2**0.5]]))


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_keep_their_channels_size_and_values(network: MedicalDetector, channels: int) -> None:
    """The sketch's one-channel stem meets a transform of three channels, which raises, and resizes to 800 px."""
    config = FASTER if isinstance(network, MedicalFasterRCNN) else RETINA
    network = config.build(2, channels)
    seen: list[Tensor] = []
    network.network.backbone.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    images = torch.randn(2, channels, 50, 70)
    assert len(answers(network, images)) == 2
    assert seen[0].shape == (2, channels, 64, 80)
    assert torch.equal(seen[0][..., :50, :70], images)
    network.train()
    total_loss(network, images, TRUTH[:1] + TRUTH[2:3])
    assert seen[1].shape == (2, channels, 64, 80)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "group", "box_loss": "smooth_l1"},
        {"box_loss": "giou"},
        {"box_loss": "ciou"},
        {"hard_negatives": 3.0},
        {"focal_objectness": True, "hard_negatives": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("chosen", [[2, 2], [1, 2], [3, 1]], ids=["none", "some", "all"])
def test_images_without_boxes_train(
    network: MedicalDetector, chosen: list[int], changes: dict[str, Any]
) -> None:
    if not isinstance(network, MedicalFasterRCNN):
        changes = {name: each for name, each in changes.items() if name == "box_loss"}
    config = FASTER if isinstance(network, MedicalFasterRCNN) else RETINA
    network = changed(config, **changes).build(2, 1).train()
    loss = total_loss(network, draw([TRUTH[i] for i in chosen]), [TRUTH[i] for i in chosen])
    loss.backward()
    assert loss.isfinite()
    gradients = {name: p.grad for name, p in network.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() for grad in gradients.values())
    assert gradients["network.backbone.stem.0.weight"].abs().max() > 0


# The parts


def test_hard_negatives_are_each_images_hardest_and_every_positive() -> None:
    labels = [torch.zeros(100), torch.zeros(50)]
    labels[0][:10] = 1
    labels[0][10:20] = -1
    losses = torch.cat([torch.arange(100.0), torch.arange(50.0) + 1000])
    losses[10:20] = 1e6  # neither positive nor negative: never learnt from
    labels.append(torch.tensor([-1.0, 0, 1]))  # fewer negatives than wanted
    losses = torch.cat([losses, torch.ones(3)])
    mask = hard_negatives(losses, labels, HardNegativeMiner(2.0, min_negatives=16))
    expected = [*range(10), *range(80, 100), *range(134, 150), 151, 152]
    assert mask.nonzero().flatten().tolist() == expected


def test_mining_learns_from_chosen_places_alone() -> None:
    torch.manual_seed(0)
    network = changed(FASTER, hard_negatives=1.0).build(2, 1).train()
    logits: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: tuple[Tensor, Tensor]) -> None:
        output[0].retain_grad()
        logits.append(output[0])

    network.network.roi_heads.box_predictor.register_forward_hook(keep)
    losses = network(draw(TRUTH[2:3]), TRUTH[2:3])
    losses["loss_classifier"].backward()
    rows = logits[0].grad.abs().sum(1) > 0
    assert len(rows) > 16
    assert rows.sum() == 16
    hardness = torch.nn.functional.cross_entropy(
        logits[0].detach(), torch.zeros(len(rows), dtype=torch.int64), reduction="none"
    )
    assert hardness[rows].min() >= hardness[~rows].max()


def test_focal_objectness_starts_rare_and_forgives_the_easy() -> None:
    torch.manual_seed(0)
    focal = changed(FASTER, focal_objectness=True).build(2, 1).network.rpn
    assert focal.head.cls_logits.bias.sigmoid().tolist() == pytest.approx([0.01] * 3)
    labels, none = [torch.tensor([1.0, 0, 0, -1])], torch.zeros(4, 4)

    def objectness(logits: list[float]) -> float:
        return focal.compute_loss(torch.tensor(logits), none, labels, [none])[0].item()

    p = torch.tensor([0.3, 0.6, 0.1]).double()  # alpha .25, gamma 2; over the one positive
    expected = 0.25 * (1 - p[0]) ** 2 * -p[0].log() + (0.75 * p[1:] ** 2 * -(1 - p[1:]).log()).sum()
    assert objectness([*p.logit().tolist(), 5.0]) == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("box_loss", ["smooth_l1", "giou", "ciou"])
def test_box_losses_are_nil_at_the_truth_and_grow_from_it(network: MedicalDetector, box_loss: str) -> None:
    config = FASTER if isinstance(network, MedicalFasterRCNN) else RETINA
    inner = changed(config, box_loss=box_loss).build(2, 1).network
    proposal, truth = torch.tensor([[10.0, 10, 20, 20]]), torch.tensor([[11.0, 9, 23, 21]])

    def loss(moved: float) -> float:
        if isinstance(network, MedicalFasterRCNN):
            heads = inner.roi_heads
            deltas = heads.box_coder.encode_single(truth + moved, proposal)
            both = torch.cat([torch.full_like(deltas, 9.0)] * 2 + [deltas], 1)  # background, 0, 1
            targets = [heads.box_coder.encode_single(truth, proposal)]
            losses = heads._losses(torch.zeros(1, 3), both, [proposal], [torch.tensor([2])], targets)
            return losses["loss_box_reg"].item()
        coder = inner.head.regression_head.box_coder
        outputs = {
            "cls_logits": torch.zeros(1, 1, 2),
            "bbox_regression": coder.encode_single(truth + moved, proposal)[None],
        }
        matched = [torch.tensor([0])]
        labelled = [{"boxes": truth, "labels": torch.tensor([1])}]
        return inner.head.compute_loss(labelled, outputs, [proposal], matched)["bbox_regression"].item()

    assert loss(0.0) == pytest.approx(0, abs=1e-5)
    assert 0.05 < loss(1.0) < loss(3.0)
    if box_loss == "giou":  # moved by 3 of 12 in both axes: overlap 81, union 207, hull 225
        assert loss(3.0) == pytest.approx(1 - 81 / 207 + 18 / 225, rel=1e-4)


def test_retinanets_losses_are_torchvisions_but_for_the_divisor() -> None:
    torch.manual_seed(0)
    head = RETINA.build(2, 1).network.head
    theirs = retinanet.RetinaNetHead(32, 3, 2)
    anchors = [torch.tensor([[0.0, 0, 8, 8], [8, 8, 16, 16], [0, 8, 8, 16], [8, 0, 16, 8]])]
    outputs = {"cls_logits": torch.randn(1, 4, 2), "bbox_regression": torch.randn(1, 4, 4)}
    labelled = [{"boxes": torch.tensor([[1.0, 1, 9, 9]]), "labels": torch.tensor([1])}]
    matched = [torch.tensor([0, -1, -2, 0])]
    ours = head.compute_loss(labelled, outputs, anchors, matched)
    expected = theirs.classification_head.compute_loss(labelled, outputs, matched)
    torch.testing.assert_close(ours["classification"], expected)
    # A second image without a lesion adds its background, divided by the lesions of the batch: twice of it.
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    pair = {name: torch.cat([each, each]) for name, each in outputs.items()}
    nowhere = torch.full((4,), -1)
    both = head.compute_loss([*labelled, empty], pair, anchors * 2, [*matched, nowhere])
    background = theirs.classification_head.compute_loss([empty], outputs, [nowhere]) / 2
    torch.testing.assert_close(both["classification"], expected + background)


def test_a_lesion_is_rare_before_training() -> None:
    torch.manual_seed(0)
    network = RETINA.build(2, 1).eval()
    outputs: list[dict[str, Tensor]] = []
    network.network.head.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    answers(network, torch.randn(1, 1, 64, 64))
    assert outputs[0]["cls_logits"].sigmoid().mean().item() == pytest.approx(0.01, abs=0.005)


@pytest.mark.parametrize(("resolution", "sampling_ratio"), [(7, 2), (5, 1)])
def test_proposals_are_pooled_where_they_are(resolution: int, sampling_ratio: int) -> None:
    torch.manual_seed(0)
    config = FASTER.model_copy(update={"roi_resolution": resolution, "roi_sampling_ratio": sampling_ratio})
    pool = config.build(1, 1).network.roi_heads.box_roi_pool
    maps = {str(i): torch.randn(1, 2, 64 // 2**i, 64 // 2**i) for i in range(3)}
    # Sides of 8, 40 and 70 px: below 28, from 28 and from 56 px, a quarter of the usual 112 and 224.
    boxes = torch.tensor([[100.0, 60, 108, 68], [30, 40, 70, 80], [10, 20, 80, 90]])
    pooled = pool(maps, [boxes], [(256, 256)])
    for i, box in enumerate(boxes):
        expected = roi_align(
            maps[str(i)],
            [box[None]],
            resolution,
            spatial_scale=1 / (4 * 2**i),
            sampling_ratio=sampling_ratio,
        )
        torch.testing.assert_close(pooled[i : i + 1], expected)


def test_a_tiny_image_does_not_set_the_scale_of_those_after_it() -> None:
    """torchvision guesses its strides from the first image: of 9 px it takes 32 for 8."""
    torch.manual_seed(0)
    network, fresh = FASTER.build(1, 1), FASTER.build(1, 1)
    fresh.load_state_dict(network.state_dict())
    answers(network, torch.randn(1, 1, 9, 9))
    image = torch.randn(1, 1, 64, 64)
    assert torch.equal(answers(network, image)[0].boxes_xyxy, answers(fresh, image)[0].boxes_xyxy)


def test_roi_align_is_the_compiled_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU torchvision's uncompiled fallback follows from deterministic algorithms, and takes 24 GB."""
    assert torchvision.extension._has_ops()
    asked: list[bool] = []

    def spy(*arguments: Any, **options: Any) -> Tensor:
        asked.append(torch.are_deterministic_algorithms_enabled())
        return roi_align(*arguments, **options)

    monkeypatch.setattr("torchvision.ops.poolers.roi_align", spy)
    torch.manual_seed(0)
    network = FASTER.build(1, 1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        answers(network, torch.randn(1, 1, 64, 64))
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked
    assert not any(asked)


def test_mixed_precision_leaves_boxes_whole(network: MedicalDetector) -> None:
    """bfloat16 counts in steps of 2 px beyond 256, and torchvision makes anchors in the type of the maps."""
    images = torch.randn(1, 1, 32, 640)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = answers(network, images)
        losses = network.train()(images, [target([[601, 11, 612, 19]], [0])])
    assert found[0].boxes_xyxy.dtype == found[0].scores.dtype == torch.float32
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    dense = network.network.rpn if isinstance(network, MedicalFasterRCNN) else network.network
    assert {each.dtype for each in dense.anchor_generator.cell_anchors} == {torch.float32}


# Configurations


def test_stages_are_the_blocks_in_order(network: MedicalDetector) -> None:
    called: list[nn.Module] = []
    stages = network.stages()
    for stage in stages:
        stage.register_forward_hook(lambda module, inputs, output: called.append(module))
    answers(network, torch.randn(1, 1, 64, 64))
    assert called == stages
    assert len(stages) == 6  # two blocks of a ResNet-18 for each of three levels


def test_each_level_costs_only_its_own_layers() -> None:
    one = changed(FASTER, anchor_sizes_px=((8,),)).build(1, 1).train()
    total_loss(one, draw(TRUTH[:1]), TRUTH[:1]).backward()
    assert all(p.grad is not None for p in one.parameters())
    assert len(one.stages()) == 2


def test_the_same_seed_gives_the_same_weights(network: MedicalDetector) -> None:
    torch.manual_seed(0)
    config = FASTER if isinstance(network, MedicalFasterRCNN) else RETINA
    again = config.build(2, 1).state_dict()
    assert all(torch.equal(each, again[name]) for name, each in network.state_dict().items())


def test_pretrained_weights_of_a_colour_network_are_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = torchvision.models.resnet18(weights=None)
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    torch.save(reference.state_dict(), tmp_path / "resnet18.pt")
    config = FasterRCNNConfig(norm="frozen_batch", pretrained=tmp_path / "resnet18.pt")
    backbone = config.build(1, 1).network.backbone
    gray = torch.randn(2, 1, 64, 64)
    with torch.inference_mode():
        expected = gray.expand(-1, 3, -1, -1)
        reference.eval()
        expected = reference.maxpool(reference.relu(reference.bn1(reference.conv1(expected))))
        expected = reference.layer2(reference.layer1(expected))
        got = backbone.train().layers[1](backbone.layers[0](backbone.stem(gray)))  # frozen in training too
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_a_configuration_survives_json() -> None:
    for config in KINDS.values():
        adapter = TypeAdapter(type(config))
        assert adapter.validate_json(adapter.dump_json(config)) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: FasterRCNNConfig(anchor_sizes_px=((8,), (16, 32))), "give as many"),
        (lambda: RetinaNetConfig(anchor_sizes_px=((), ())), "give as many"),
        (lambda: FasterRCNNConfig(norm="frozen_batch"), "set pretrained"),
        (lambda: FasterRCNNConfig(anchor_sizes_px=((0,),)), "greater than 0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(make: Callable[[], DetectorConfig], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make()


def test_the_chapters_class_builds_by_itself() -> None:
    network = MedicalFasterRCNN(width := 3, 1, changed(FASTER, depth=50))  # type: ignore[arg-type]
    assert len(network.stages()) == 3 + 4 + 6
    assert network.network.roi_heads.box_predictor.cls_score.out_features == width + 1


def test_configurations_come_without_torchvision() -> None:
    code = "import sys, cadx.models.detector; assert 'torchvision' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recomputed_stages_give_the_same_gradients(network: MedicalDetector) -> None:
    def gradients() -> list[Tensor]:
        torch.manual_seed(1)  # proposals are sampled
        network.zero_grad()
        total_loss(network.train(), draw(TRUTH), TRUTH).backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    kept = gradients()
    enable_checkpointing(network)
    for one, other in zip(kept, gradients(), strict=True):
        torch.testing.assert_close(one, other)
