"""Hard negatives within a batch and between epochs, and the faults of the chapter's sketch of their miner."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from cadx.mining import HardNegativeMiner, MinedBox, MinedNegatives, mine_false_positives
from cadx.models.interface import Detections


def _box(score: float, x0: float = 0.0) -> MinedBox:
    return MinedBox(x0, 0.0, x0 + 10, 10.0, score)


def _answer(boxes: list[list[float]], scores: list[float]) -> Detections:
    return Detections(
        torch.tensor(boxes).reshape(-1, 4), torch.zeros(len(scores), dtype=torch.int64), torch.tensor(scores)
    )


# Within a batch


def test_an_image_without_a_lesion_is_mined_too() -> None:
    """The sketch takes a multiple of the lesions that were found: none, and nothing is mined."""
    losses = torch.tensor([[0.1, 0.9, 0.5, 0.2, 0.3]])
    mined = HardNegativeMiner(3.0, min_negatives=2).mine_hard_negatives(losses, torch.zeros(1, 5) > 0)
    assert mined.tolist() == [[False, True, True, False, False]]


@given(st.integers(0, 2**31), st.sampled_from([0.0, 0.5, 1.0, 3.0, 100.0]), st.integers(1, 12))
def test_each_image_counts_its_lesions_and_the_hardest_of_its_background(
    seed: int, ratio: float, least: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    losses = torch.rand(3, 20, generator=generator)
    is_lesion = torch.rand(3, 20, generator=generator) < torch.tensor([[0.0], [0.2], [0.9]])
    counted = HardNegativeMiner(ratio, min_negatives=least).mine_hard_negatives(losses, is_lesion)
    for row in range(3):
        background = [i for i in range(20) if not is_lesion[row, i]]
        wanted = max(least, round(ratio * int(is_lesion[row].sum())))
        hardest = sorted(background, key=lambda i: -losses[row, i].item())[:wanted]
        expected = set(hardest) | set(is_lesion[row].nonzero().flatten().tolist())
        assert set(counted[row].nonzero().flatten().tolist()) == expected


def test_equal_losses_are_counted_by_number_not_all() -> None:
    counted = HardNegativeMiner(1.0, min_negatives=4).mine_hard_negatives(
        torch.ones(2, 9), torch.zeros(2, 9) > 0
    )
    assert counted.sum(1).tolist() == [4, 4]


@pytest.mark.parametrize(("ratio", "least"), [(-1.0, 1), (1.0, 0)])
def test_a_miner_that_could_choose_nothing_is_refused(ratio: float, least: int) -> None:
    with pytest.raises(ValueError, match="min_negatives"):
        HardNegativeMiner(ratio, min_negatives=least)


# False positives of an image


def test_a_lesion_found_in_another_order_is_no_false_positive() -> None:
    """The sketch compares the i-th answer with the i-th lesion: answers in another order all seem false."""
    lesions = torch.tensor([[0.0, 0, 10, 10], [50, 50, 60, 60]])
    answer = _answer([[50, 50, 60, 60], [0, 0, 10, 10], [80, 80, 90, 90]], [0.9, 0.8, 0.7])
    found = mine_false_positives(answer, lesions)
    assert [box[:4] for box in found] == [(80, 80, 90, 90)]
    assert found[0].score == pytest.approx(0.7)


def test_only_the_confident_are_mined_and_the_hardest_come_first() -> None:
    answer = _answer([[0, 0, 9, 9], [20, 0, 29, 9], [40, 0, 49, 9]], [0.25, 0.75, 0.5])
    nowhere: Tensor = torch.zeros(0, 4)
    assert [box.x0 for box in mine_false_positives(answer, nowhere, score_threshold=0.5)] == [20, 40]
    assert mine_false_positives(_answer([], []), nowhere) == []


def test_the_overlap_must_stay_below_its_limit() -> None:
    answer = _answer([[0, 0, 10, 10]], [0.9])
    lesion = torch.tensor([[0.0, 5, 10, 15]])  # IoU 1/3
    assert mine_false_positives(answer, lesion, max_iou=0.33) == []
    assert len(mine_false_positives(answer, lesion, max_iou=0.34)) == 1


# Between epochs


def test_bounds_keep_the_hardest_of_each_sample_and_of_all() -> None:
    store = MinedNegatives(max_per_sample=2, max_boxes=3)
    store.add("a", [_box(0.5), _box(0.9, 20), _box(0.7, 40)])
    assert [box.score for box in store.of("a")] == [0.9, 0.7]
    store.add("b", [_box(0.6), _box(0.8, 20)])
    assert [box.score for box in store.of("a")] == [0.9, 0.7]
    assert [box.score for box in store.of("b")] == [0.8]
    assert len(store) == 3


def test_a_box_that_is_mined_again_is_kept_once_with_its_new_score() -> None:
    store = MinedNegatives()
    store.add("a", [_box(0.9)])
    store.add("a", [_box(0.4, 1), _box(0.3, 50)])
    assert [(box.x0, box.score) for box in store.of("a")] == [(1, 0.4), (50, 0.3)]


def test_what_is_no_longer_reported_gives_way() -> None:
    store, newer = MinedNegatives(max_per_sample=1), MinedNegatives()
    store.add("a", [_box(0.9)])
    store.add("b", [_box(0.8)])
    newer.add("a", [_box(0.5, 50)])
    store.merge(newer, decay=0.5)
    assert store.of("a") == (_box(0.5, 50),)
    assert store.of("b") == (_box(0.4),)
    store.merge(newer, decay=0.0)
    assert store.of("b") == ()


def test_processes_merge_in_any_order() -> None:
    rng = np.random.default_rng(0)
    parts = [MinedNegatives(max_boxes=25) for _ in range(3)]
    for number, score in enumerate(rng.random(60)):
        parts[number % 3].add(f"s{number % 12}", [_box(float(score), 20.0 * number)])
    states = []
    for order in ((0, 1, 2), (2, 0, 1)):
        merged = MinedNegatives(max_boxes=25)
        for number in order:
            merged.merge(parts[number])
        states.append(merged.state_dict())
    assert states[0] == states[1]
    assert sum(map(len, states[0]["boxes"].values())) == 25


def test_a_store_survives_a_checkpoint_as_plain_data() -> None:
    store = MinedNegatives(max_per_sample=7, max_boxes=50)
    store.add("b", [_box(0.123456789), _box(0.5, 33.3)])
    store.add("a", [_box(0.25)])
    restored = MinedNegatives()
    restored.load_state_dict(json.loads(json.dumps(store.state_dict())))
    assert restored.state_dict() == store.state_dict()
    assert [restored.draw(1, 2, i, "b") for i in range(20)] == [store.draw(1, 2, i, "b") for i in range(20)]


def test_draws_are_a_function_of_seed_epoch_and_index_and_follow_the_scores() -> None:
    store = MinedNegatives()
    store.add("a", [_box(0.9), _box(0.3, 50)])
    draws = [store.draw(0, 0, index, "a") for index in range(2000)]
    assert draws == [store.draw(0, 0, index, "a") for index in range(2000)]
    assert draws.count(_box(0.9)) / 2000 == pytest.approx(0.75, abs=0.05)
    assert draws[:50] != [store.draw(0, 1, index, "a") for index in range(50)]
    assert draws[:50] != [store.draw(1, 0, index, "a") for index in range(50)]
    assert store.draw(0, 0, 0, "nowhere") is None


def test_an_out_of_range_decay_and_empty_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="decay"):
        MinedNegatives().merge(MinedNegatives(), decay=1.5)
    with pytest.raises(ValueError, match="max_boxes"):
        MinedNegatives(max_boxes=0)
