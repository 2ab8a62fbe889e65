"""How unequal classes are, and the order in which samples are drawn."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cadx.sampling import BalancedSampler, EpochSampler, analyze_class_imbalance, count_box_sizes

# --- class balance -----------------------------------------------------------------------------------


def test_imbalance_of_the_chapters_example() -> None:
    labels = ["normal"] * 9500 + ["pneumonia"] * 300 + ["tuberculosis"] * 150 + ["cancer"] * 50
    found = analyze_class_imbalance(labels)
    assert list(found) == ["normal", "pneumonia", "tuberculosis", "cancer"]
    assert [item["count"] for item in found.values()] == [9500, 300, 150, 50]
    assert [item["percentage"] for item in found.values()] == [95.0, 3.0, 1.5, 0.5]
    assert [round(item["imbalance_factor"], 1) for item in found.values()] == [1.0, 31.7, 63.3, 190.0]


def test_imbalance_counts_more_than_flat_single_labels() -> None:
    table = pd.DataFrame({"effusion": [1, 1, 1, 0, np.nan], "hernia": [1, 0, 0, 0, 0]})
    found = analyze_class_imbalance(table)
    assert found == {
        "effusion": {"count": 3, "percentage": 75.0, "imbalance_factor": 1.0},
        "hernia": {"count": 1, "percentage": 20.0, "imbalance_factor": 3.0},
    }


def test_imbalance_of_a_class_without_samples_is_infinite() -> None:
    found = analyze_class_imbalance(["a", "a", None], classes=["a", "b"])
    assert found["a"] == {"count": 2, "percentage": 100.0, "imbalance_factor": 1.0}
    assert found["b"] == {"count": 0, "percentage": 0.0, "imbalance_factor": math.inf}
    assert analyze_class_imbalance([], classes=["a"])["a"]["count"] == 0
    with pytest.raises(ValueError, match="'c' is not among the classes"):
        analyze_class_imbalance(["c"], classes=["a", "b"])


def test_imbalance_per_site_and_per_patient() -> None:
    labels = ["ill", "ill", "well", "well", "well", "ill"]
    patients = ["p1", "p1", "p1", "p2", "p3", "p4"]
    sites = ["north", "north", "north", "north", "south", "south"]
    by_site = analyze_class_imbalance(labels, groups=sites)
    assert by_site["north"]["ill"] == {"count": 2, "percentage": 50.0, "imbalance_factor": 1.0}
    assert by_site["south"]["well"]["count"] == 1
    by_patient = analyze_class_imbalance(labels, patients=patients)
    assert (by_patient["ill"]["count"], by_patient["well"]["count"]) == (2, 3)  # p1 has both
    named_alike = analyze_class_imbalance([0, 1, 1], patients=[0, 1, 1])
    assert [named_alike[name]["count"] for name in (0, 1)] == [1, 1]
    both = analyze_class_imbalance(labels, patients=patients, groups=sites)
    assert (both["north"]["ill"]["count"], both["south"]["ill"]["count"]) == (1, 1)


def test_box_sizes_are_those_that_coco_scores_apart() -> None:
    sides = {"a": [(31.9, 32), (32, 32), (96, 95.9), (96, 96), (0, 500), (5, -5)], "b": [(1000, 1000)]}
    rows = [(name, 3.0, 4.0, 3 + width, 4 + height) for name in sides for width, height in sides[name]]
    found = count_box_sizes(pd.DataFrame(rows, columns=["class", "x0", "y0", "x1", "y1"]))
    assert found == {
        "a": {"small": 3, "medium": 2, "large": 1},
        "b": {"small": 0, "medium": 0, "large": 1},
    }


# --- samplers ----------------------------------------------------------------------------------------

ONE_IN_A_THOUSAND = np.array(["normal"] * 1000 + ["cancer"])


def one_hot(columns: list[int], num_classes: int) -> np.ndarray:
    return np.eye(num_classes, dtype=np.float32)[columns]


@pytest.mark.parametrize("num_samples", [None, 1, 7, 64, 5000])
@pytest.mark.parametrize("world_size", [1, 3])
def test_sampler_length_is_what_it_yields(num_samples: int | None, world_size: int) -> None:
    sampler = BalancedSampler(ONE_IN_A_THOUSAND, seed=0, num_samples=num_samples, world_size=world_size)
    assert len(list(sampler)) == len(sampler) == math.ceil((num_samples or 1001) / world_size)


def test_sampler_ignores_and_leaves_the_global_random_state() -> None:
    orders = []
    for global_seed in (1, 2):
        np.random.seed(global_seed)  # noqa: NPY002 - the global state is the subject
        torch.manual_seed(global_seed)
        before = np.random.get_state()[1].copy()  # noqa: NPY002
        orders.append(list(BalancedSampler(ONE_IN_A_THOUSAND, seed=5)))
        np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002
    assert orders[0] == orders[1]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(0, 50), min_size=1, max_size=5).filter(any),
    num_samples=st.integers(1, 300),
    epoch=st.integers(0, 9),
)
def test_every_class_is_drawn_equally_often(counts: list[int], num_samples: int, epoch: int) -> None:
    classes = np.repeat(np.arange(len(counts)), counts)
    order = BalancedSampler(one_hot(classes, len(counts)), seed=1, num_samples=num_samples).epoch_indices(
        epoch
    )
    drawn = Counter(classes[order].tolist())
    numbers = [drawn[name] for name, count in enumerate(counts) if count]
    assert sum(numbers) == num_samples
    assert max(numbers) - min(numbers) <= 1


def test_a_class_is_exhausted_before_a_sample_is_repeated_even_over_epochs() -> None:
    classes = np.repeat([0, 1], [40, 7])
    sampler = BalancedSampler(one_hot(classes, 2), seed=0, num_samples=25)
    drawn: Counter[int] = Counter()
    for epoch in range(12):
        drawn.update(sampler.epoch_indices(epoch).tolist())
        for members in (np.arange(40), np.arange(40, 47)):
            times = [drawn[index] for index in members.tolist()]
            assert max(times) - min(times) <= 1, epoch


def test_one_in_a_thousand_is_half_of_the_epoch() -> None:
    order = BalancedSampler(ONE_IN_A_THOUSAND, seed=0).epoch_indices(0)
    assert abs((order == 1000).mean() - 0.5) < 0.001
    normal = order[order != 1000]
    assert len(set(normal.tolist())) == len(normal)


def test_draws_are_shuffled_within_the_epoch() -> None:
    order = BalancedSampler(ONE_IN_A_THOUSAND, seed=0).epoch_indices(0)
    rare = (order == 1000).astype(int)
    assert 400 < np.abs(np.diff(rare)).sum() < 600  # neither in blocks nor strictly in turn


def test_unlabelled_samples_are_never_drawn() -> None:
    labels = one_hot([0, 1, 0, 1], 2)
    labels[2] = np.nan
    for sampler in (BalancedSampler(labels, seed=0, num_samples=100), EpochSampler(labels, seed=0)):
        assert 2 not in list(sampler)
    with pytest.raises(ValueError, match="no sample is labelled"):
        BalancedSampler(np.full((3, 2), np.nan), seed=0)


def test_multilabel_draws_balance_positives_and_all_negatives() -> None:
    labels = np.zeros((1000, 2), np.float32)
    labels[:10, 0] = 1
    labels[10:60, 1] = 1
    labels[60:70, 1] = np.nan
    order = BalancedSampler(labels, seed=0, num_samples=300).epoch_indices(0)
    assert [((order >= a) & (order < b)).sum() for a, b in ((0, 10), (10, 60), (60, 1000))] == [100, 100, 100]


def test_order_is_a_function_of_seed_and_epoch() -> None:
    labels = one_hot([0] * 90 + [1] * 10, 2)
    for make in (BalancedSampler, EpochSampler):
        sampler = make(labels, seed=3)
        first = list(sampler)
        sampler.set_epoch(4)
        later = list(sampler)
        assert later != first
        fresh = make(labels, seed=3)
        assert fresh.epoch_indices(4).tolist() == later  # a resumed run, without the epochs before
        assert list(fresh) == first
        assert list(make(labels, seed=4)) != first


@pytest.mark.parametrize("make", [BalancedSampler, EpochSampler])
def test_ranks_divide_one_global_order(make: Any) -> None:
    labels = one_hot([0] * 90 + [1] * 13, 2)
    whole = make(labels, seed=0).epoch_indices(2)
    parts = [make(labels, seed=0, rank=rank, world_size=4).epoch_indices(2) for rank in range(4)]
    joined = np.stack(parts, axis=1).ravel()
    assert len(joined) == 104
    np.testing.assert_array_equal(joined, [*whole, whole[0]])


def test_plain_shuffle_yields_every_sample_once() -> None:
    sampler = EpochSampler(one_hot([0] * 50 + [1] * 5, 2), seed=0)
    assert len(sampler) == 55
    assert sorted(sampler) == list(range(55))
