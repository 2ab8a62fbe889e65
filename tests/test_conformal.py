"""Prediction sets hold the truth as often as they say; isotonic curves and other prevalences do what they should."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from cadx import conformal
from cadx.conformal import Conformal, fit, possible, refers
from cadx.evaluating.decisions import MINIMUM_COVERED, coverage
from cadx.metrics import wilson
from cadx.metrics.decisions import mean_size_of
from cadx.predicting.table import Arrays


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.05, 0.95))
@settings(max_examples=200, deadline=None)
def test_the_quantile_is_the_order_statistic_of_the_textbook(scores: list[float], coverage: float) -> None:
    p = np.array(scores)
    found = fit(np.stack([p, 1 - p], 1), np.tile([1.0, 0.0], (len(p), 1)), "binary", "ab", coverage=coverage)
    rank = int(np.ceil((len(p) + 1) * coverage - 1e-9))
    expected = 1.0 if rank > len(p) else np.sort(1 - p)[rank - 1]
    assert found.quantiles == {"a": expected, "b": 1.0}
    assert found.patients == found.images == {"a": len(p), "b": 0}


@pytest.mark.parametrize("images", [1, 4])
def test_each_class_is_covered_as_declared_over_new_patients(images: int) -> None:
    """Four images a patient, alike: counted as if they were independent, the sets would hold too seldom or "
    "vary too much."""
    rng = np.random.default_rng(0)
    held, patients = [], 60
    for _ in range(400):
        y = np.repeat(rng.random(2 * patients) < 0.3, images)
        code = np.repeat(np.arange(2 * patients), images)
        score = rng.normal(size=2 * patients)[code] + 0.3 * rng.normal(size=y.size) + 1.5 * y
        p = np.stack([1 - 1 / (1 + np.exp(-score)), 1 / (1 + np.exp(-score))], axis=1)
        labels, first = np.stack([1 - y, y], axis=1), code < patients
        sets = fit(p[first], labels[first], "binary", ("well", "ill"), coverage=0.8, patients=code[first])
        inside = possible(p[~first], sets, ("well", "ill"))
        held.append([inside[labels[~first, k] == 1, k].mean() for k in range(2)])
    mean = np.mean(held, axis=0)
    assert (mean >= 0.79).all(), mean
    assert (mean <= 0.88).all(), mean


def test_a_patient_with_many_images_weighs_no_more_than_one() -> None:
    p = np.array([[0.9, 0.1]] * 9 + [[0.2, 0.8]] * 90)
    labels, patients = np.tile([1.0, 0.0], (99, 1)), [*range(9), *[9] * 90]
    found = fit(p, labels, "binary", "ab", coverage=0.8, patients=patients)
    assert found.quantiles["a"] == pytest.approx(0.1)
    assert (found.patients["a"], found.images["a"]) == (10, 99)
    assert fit(p, labels, "binary", "ab", coverage=0.8).quantiles["a"] == pytest.approx(0.8)


def test_a_person_is_asked_unless_the_set_says_exactly_what_was_decided() -> None:
    sets = Conformal(coverage=0.9, quantiles={"well": 0.5, "ill": 0.8})
    p = np.array([[0.9, 0.1], [0.7, 0.3], [0.1, 0.9], [0.9, 0.1]])
    decided = np.array([[True, False], [True, False], [False, True], [False, True]])
    assert possible(p, sets, ("well", "ill")).tolist() == [
        [True, False],
        [True, True],
        [False, True],
        [True, False],
    ]
    assert refers(p, decided, sets, ("well", "ill")).tolist() == [False, True, False, True]


def test_multilabel_asks_where_presence_and_absence_are_both_or_neither_possible() -> None:
    sets = Conformal(coverage=0.9, quantiles={"a": 0.6, "b": 0.6}, absent={"a": 0.5, "b": 0.2})
    p = np.array([[0.9, 0.1], [0.45, 0.1], [0.9, 0.3]])
    decided = np.array([[True, False], [True, False], [True, False]])
    assert refers(p, decided, sets, ("a", "b")).tolist() == [False, True, True]


def test_multilabel_covers_presence_and_absence_of_the_labelled_alone() -> None:
    rng = np.random.default_rng(1)
    y = (rng.random((4000, 2)) < 0.3).astype(float)
    p = 1 / (1 + np.exp(-(rng.normal(size=y.shape) + 2 * y - 1)))
    y[rng.random(y.shape) < 0.2] = np.nan
    found = fit(p[:2000], y[:2000], "multilabel", ("a", "b"), coverage=0.9)
    later, truth = p[2000:], y[2000:]
    for column, name in enumerate("ab"):
        assert (1 - later[truth[:, column] == 1, column] <= found.quantiles[name]).mean() == pytest.approx(
            0.9, abs=0.04
        )
        assert (later[truth[:, column] == 0, column] <= found.absent[name]).mean() == pytest.approx(
            0.9, abs=0.04
        )


def test_coverage_of_one_calibration_varies_as_a_beta_variable() -> None:
    rng = np.random.default_rng(2)
    # Uniform scores: the share covered later is the quantile itself.
    found = [
        fit(np.stack([p, 1 - p], 1), np.tile([1.0, 0.0], (80, 1)), "binary", "ab", coverage=0.9).quantiles[
            "a"
        ]
        for p in rng.random((2000, 80))
    ]
    low, high = conformal.expected_range(80, 0.9)
    assert np.mean([low <= share <= high for share in found]) == pytest.approx(0.95, abs=0.015)
    assert np.mean(found) == pytest.approx(stats.beta.mean(73, 8), abs=0.003)
    assert conformal.expected_range(5, 0.9) == (1.0, 1.0)


def test_shapes_that_do_not_fit_are_refused_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"probabilities: shape .* give N 2 of both"):
        fit([[0.1, 0.9]], [[1, 0], [0, 1]], "binary", ("a", "b"))


def test_a_site_that_is_unlike_the_calibration_split_is_seen_by_its_own_coverage() -> None:
    rng = np.random.default_rng(5)
    sites = np.repeat(["hill", "dale", "few"], [300, 300, MINIMUM_COVERED - 1])
    ill = rng.random(len(sites)) < 0.5
    # At `dale` the ill look well: their sets do not hold the truth.
    p = np.where(ill & (sites != "dale"), 0.95, 0.05)
    labels = np.stack([~ill, ill], axis=1).astype(float)
    shown = np.stack([1 - p, p], axis=1)[None]
    sets = Conformal(coverage=0.9, quantiles={"well": 0.1, "ill": 0.1})
    told: Any = SimpleNamespace(classes=("well", "ill"), conformal=sets)
    rows = Arrays(labels=labels, probabilities=shown, decisions=shown > 0.5, patients=None)
    found = coverage([told], rows, sites.tolist())
    assert found["by_site"]["hill"].value == 1
    assert found["by_site"]["dale"].value == pytest.approx(1 - ill[sites == "dale"].mean())
    assert found["by_site"]["dale"].high < 0.9
    assert found["by_site"]["few"].value is None
    assert "too few: 19 cases, 20 needed" in found["by_site"]["few"].method
    assert found["by_class"]["well"].value == 1
    assert found["by_class"]["ill"].value < 0.9
    # No set holds both classes, and none is empty.
    assert found["mean_size"].value == 1
    assert 0.98 < found["mean_size"].low < 1 < found["mean_size"].high < 1.02


def _of_hard_patients(rng: np.random.Generator) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Probabilities of the ill, N 2, and whose they are: a quarter are hard, with 8 images each, the rest have 1."""
    hard = rng.random(300) < 0.25
    patients = np.repeat(np.arange(300), np.where(hard, 8, 1))
    p = 1 / (1 + np.exp(-rng.normal(np.where(hard, 0.3, 2.5)[patients])))
    return np.stack([1 - p, p], axis=1), patients


def test_a_promise_that_holds_of_patients_is_not_called_broken_for_those_with_many_images() -> None:
    rng, judged, of_images = np.random.default_rng(9), [], []
    for _ in range(60):
        (first, owners), (later, patients) = _of_hard_patients(rng), _of_hard_patients(rng)
        sets = fit(first, np.tile([0.0, 1.0], (len(first), 1)), "binary", ("well", "ill"), patients=owners)
        told: Any = SimpleNamespace(classes=("well", "ill"), conformal=sets)
        labels = np.tile([0.0, 1.0], (len(later), 1))
        rows = Arrays(
            labels=labels, probabilities=later[None], decisions=later[None] > 0.5, patients=patients
        )
        found = coverage([told], rows, [""] * len(later))
        judged.append((found["by_class"]["ill"], found["expected"]["ill"], found["by_site"]["unknown"]))
        of_images.append(possible(later, sets, ("well", "ill"))[:, 1].mean())
    assert np.mean([one.value for one, *_ in judged]) == pytest.approx(0.9, abs=0.01)
    assert np.mean(of_images) < 0.75
    assert np.mean([one.high < expected[0] for one, expected, _ in judged]) <= 0.05
    assert all(site == one for one, _, site in judged)


def _sets_of_patients(rng: np.random.Generator, patients: int, images: int) -> NDArray[np.intp]:
    """Sizes, patients x images, of 0, 1 or 2 in 15, 75 and 10 of 100: a patient's images are half alike."""
    own, shared = rng.random((patients, images)), rng.random((patients, 1))
    alike = rng.random((patients, images)) < 0.5
    return np.searchsorted([0.15, 0.9], np.where(alike, shared, own))


@pytest.mark.parametrize("images", [1, 3])
def test_the_interval_of_the_mean_size_of_sets_holds_it_as_often_as_it_says(images: int) -> None:
    rng, held = np.random.default_rng(6), []
    patients = np.repeat(np.arange(100), images)
    for _ in range(400):
        found = mean_size_of(_sets_of_patients(rng, 100, images).reshape(1, -1), 2, patients)
        assert found.low is not None
        assert found.high is not None
        held.append(found.low <= 0.95 <= found.high)
    assert 0.93 <= np.mean(held) <= 0.975


def test_sets_that_are_all_of_one_size_leave_their_mean_size_uncertain() -> None:
    found = mean_size_of([[1] * 50], 2)
    missed = 1 - float(wilson(50, 50)[0])
    assert found.value == 1
    # As many may hold no class, or both, as an event may happen that did not in 50 cases.
    assert found.low == pytest.approx(1 - missed)
    assert found.high == pytest.approx(1 + missed)
    assert "too few errors (0)" in found.method
    # The sets of one patient say no more than one set.
    alone = mean_size_of([[1] * 50], 2, ["same"] * 50)
    assert alone.low is not None
    assert alone.low < 0.1
    assert mean_size_of([[]], 2).value is None


def test_of_several_seeds_the_mean_size_is_the_mean() -> None:
    assert mean_size_of([[1, 1, 2, 1], [1, 0, 1, 1]], 2).value == pytest.approx(1.0)
