"""Prediction sets hold the truth as often as they say; isotonic curves and other prevalences do what they should."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cadx import conformal
from cadx.conformal import Conformal, fit, possible, refers
from cadx.evaluating.decisions import MINIMUM_COVERED, coverage
from cadx.predicting.table import Arrays


@given(st.lists(st.floats(0, 1), min_size=1, max_size=60), st.floats(0.05, 0.95))
@settings(max_examples=200, deadline=None)
def test_the_quantile_is_the_order_statistic_of_the_textbook(scores: list[float], coverage: float) -> None:
    p = np.array(scores)
    found = fit(np.stack([p, 1 - p], 1), np.tile([1.0, 0.0], (len(p), 1)), "binary", "ab", coverage=coverage)
    rank = int(np.ceil((len(p) + 1) * coverage - 1e-9))
    expected = 1.0 if rank > len(p) else np.sort(1 - p)[rank - 1]
    assert found.quantiles == {"a": expected, "b": 1.0}
    assert found.patients == {"a": len(p), "b": 0}


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
    assert fit(p, labels, "binary", "ab", coverage=0.8, patients=patients).quantiles["a"] == pytest.approx(
        0.1
    )
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
