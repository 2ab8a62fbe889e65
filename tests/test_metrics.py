"""Every number against an independent reference: scikit-learn, statsmodels, or the formula written out."""

import gc
import itertools
import json
import math
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import statsmodels.api as sm
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats
from sklearn import metrics as reference
from sklearn.calibration import calibration_curve as reference_calibration_curve
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from cadx import metrics
from cadx.doubts import doubts_of
from cadx.evaluating.decisions import operating_point
from cadx.gating import floor
from cadx.metrics import (
    METRICS,
    Estimate,
    Scores,
    at_threshold,
    auc,
    calculate_medical_classification_metrics,
    delong_difference,
    reliability,
    score,
    score_subgroups,
    tango_difference,
    wilson,
)
from cadx.metrics.areas import area
from cadx.metrics.estimates import LEVEL, Cases, Z, difference_of, one_score, replicated
from cadx.metrics.limits import mean_of_parts, on_scale
from cadx.metrics.multiplicity import holm
from cadx.metrics.proportions import balanced, f1, sensitivity, specificity
from cadx.metrics.ranking import average_precision
from cadx.metrics.reliability import probability_scores
from cadx.predicting.table import Arrays

BINARY = {"task": "binary", "classes": ["normal", "pneumonia"], "positive": "pneumonia"}


def draw(
    seed: int, *, n: int | None = None, clusters: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, probabilities and patients: ties in half of the sets, prevalence and separation at random."""
    rng = np.random.default_rng(seed)
    n = n or int(rng.integers(8, 80))
    y = np.zeros(n, dtype=int)
    y[rng.permutation(n)[: rng.integers(2, n - 2)]] = 1
    p = 1 / (1 + np.exp(-(rng.normal(size=n) + rng.uniform(0, 2) * (y - 0.5))))
    if seed % 2:
        p = p.round(1)
    patients = rng.integers(0, max(4, n // 3), size=n) if clusters else np.arange(n)
    return y, p, patients


def score_binary(
    y: np.ndarray, p: np.ndarray, patients: np.ndarray | None = None, **options: object
) -> Scores:
    """Score with the operating point at 0.4."""
    p = np.asarray(p)
    calls = p >= 0.4
    return score(
        np.stack([1 - y, y], axis=-1),
        np.stack([1 - p, p], axis=-1),
        np.stack([~calls, calls], axis=-1),
        patients=patients,
        **BINARY,
        **({"resamples": 0} | options),
    )


def placements(y: np.ndarray, p: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """AUC and the placement values of positives and negatives, pair by pair."""
    positive, negative = p[y == 1], p[y == 0]
    wins = np.array([[1.0 if a > b else 0.5 if a == b else 0.0 for b in negative] for a in positive])
    return wins.mean(), wins.mean(axis=1), wins.mean(axis=0)


def logit_variance(estimate: Estimate, critical: float = stats.norm.ppf(0.975)) -> float:
    """The variance of the AUC behind an interval that is symmetric on the logit scale."""
    assert "logit" in estimate.method
    low, high = (math.log(limit / (1 - limit)) for limit in (estimate.low, estimate.high))
    return ((high - low) / 2 / critical * estimate.value * (1 - estimate.value)) ** 2


def worth(patients: np.ndarray) -> float:
    """Kish's effective number of patients."""
    sizes = np.unique(patients, return_counts=True)[1]
    return float(sizes.sum() ** 2 / np.square(sizes).sum())


def student(by_patient: np.ndarray, patients: float | None = None) -> float:
    """The 97.5th percentile of t by Satterthwaite, where patients add these shares to the error of an AUC."""
    squares = np.square(by_patient)
    of_sum = np.square(squares - squares.mean()).sum()
    most = (patients or squares.size) - 1
    freedom = min(max(2 * squares.sum() ** 2 / of_sum, 1), most) if of_sum else most
    return float(stats.t.ppf(0.975, freedom))


def assert_sound(scores: Scores) -> None:
    """No NaN anywhere, limits around every value, a reason for everything that is missing."""
    json.dumps(scores.model_dump(), allow_nan=False)
    for found in (scores.metrics, *scores.by_class.values()):
        for name, estimate in found.items():
            assert name in METRICS
            assert estimate.method
            if estimate.value is None:
                assert estimate.low is None
                assert estimate.high is None
                assert estimate.method.startswith(("undefined", "too few")), (name, estimate)
            elif estimate.low is not None:
                assert estimate.low <= estimate.value <= estimate.high, (name, estimate)
            else:
                assert "no interval" in estimate.method or "too few" in estimate.method, (name, estimate)


# --- Values -------------------------------------------------------------------------------------------


def test_the_normal_quantile_belongs_to_the_level() -> None:
    assert special.ndtri(0.5 + LEVEL / 2) == Z


@pytest.mark.parametrize("clusters", [False, True])
def test_binary_values_equal_scikit_learn(clusters: bool) -> None:
    for seed in range(60):
        y, p, patients = draw(seed, clusters=clusters)
        scores = score_binary(y, p, patients)
        calls = p >= 0.4
        value = {name: estimate.value for name, estimate in scores.metrics.items()}
        assert value["auc"] == pytest.approx(reference.roc_auc_score(y, p))
        assert value["average_precision"] == pytest.approx(reference.average_precision_score(y, p))
        assert value["brier"] == pytest.approx(reference.brier_score_loss(y, p))
        assert value["log_loss"] == pytest.approx(reference.log_loss(y, p))
        assert value["sensitivity"] == pytest.approx(reference.recall_score(y, calls))
        assert value["specificity"] == pytest.approx(reference.recall_score(y, calls, pos_label=0))
        assert value["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(y, calls))
        assert value["accuracy"] == pytest.approx(reference.accuracy_score(y, p > 0.5))
        assert value["accuracy_at_operating_point"] == pytest.approx(reference.accuracy_score(y, calls))
        assert value["f1"] == pytest.approx(reference.f1_score(y, calls))
        if calls.any() and not calls.all():
            assert value["ppv"] == pytest.approx(reference.precision_score(y, calls))
            assert value["npv"] == pytest.approx(reference.precision_score(y, calls, pos_label=0))
        assert list(scores.confusion.at_operating_point) == reference.confusion_matrix(y, calls).tolist()
        assert list(scores.confusion.at_argmax) == reference.confusion_matrix(y, p > 0.5).tolist()
        assert_sound(scores)


def test_multiclass_values_equal_scikit_learn() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(12, 80)), int(rng.integers(3, 6))
        y = (
            np.concatenate([np.arange(k), np.arange(k), rng.integers(0, k, n - 2 * k)])
            if n > 2 * k
            else np.arange(k)
        )
        p = rng.dirichlet(np.ones(k), size=len(y))
        calls = rng.integers(0, k - seed % 2, len(y))  # in every other set the last class is never called
        scores = score(
            np.eye(k)[y],
            p,
            np.eye(k, dtype=bool)[calls],
            task="multiclass",
            classes=list("abcdef"[:k]),
            resamples=0,
        )
        value = {name: estimate.value for name, estimate in scores.metrics.items()}
        assert value["auc"] == pytest.approx(reference.roc_auc_score(y, p, multi_class="ovr"))
        assert value["average_precision"] == pytest.approx(reference.average_precision_score(np.eye(k)[y], p))
        assert value["accuracy"] == pytest.approx(reference.accuracy_score(y, p.argmax(1)))
        assert value["accuracy_at_operating_point"] == pytest.approx(reference.accuracy_score(y, calls))
        assert value["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(y, calls))
        assert value["f1"] == pytest.approx(reference.f1_score(y, calls, average="macro"))
        for name, measure, of_class in (
            ("sensitivity", reference.recall_score, 1),
            ("specificity", reference.recall_score, 0),
            ("ppv", reference.precision_score, 1),
            ("npv", reference.precision_score, 0),
        ):
            truth, called = (np.eye(k, dtype=int)[each] == of_class for each in (y, calls))
            of_each = measure(truth, called, average=None, zero_division=np.nan)
            # A class that is never called has no predictive value, and is left out of the mean.
            assert value[name] == pytest.approx(np.nanmean(of_each))
        assert value["log_loss"] == pytest.approx(reference.log_loss(y, p))
        assert value["brier"] == pytest.approx(((p - np.eye(k)[y]) ** 2).sum(1).mean())
        assert list(scores.confusion.at_operating_point) == reference.confusion_matrix(y, calls).tolist()
        assert_sound(scores)


def test_multilabel_values_equal_scikit_learn_on_the_labelled_cases_of_each_class() -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        n, k = int(rng.integers(30, 80)), 3
        y = (rng.random((n, k)) < 0.4).astype(float)
        y[:2], y[2:4] = 0, 1
        y[4:][rng.random((n - 4, k)) < 0.2] = np.nan
        p = rng.random((n, k)).round(1 if seed % 2 else 6)
        scores = score(y, p, p >= 0.3, task="multilabel", classes=["a", "b", "c"], resamples=0)
        by_class: dict[str, list[float]] = {
            "auc": [],
            "average_precision": [],
            "f1": [],
            "accuracy": [],
            "brier": [],
        }
        for column, name in enumerate("abc"):
            known = ~np.isnan(y[:, column])
            truth, scored = y[known, column], p[known, column]
            by_class["auc"].append(reference.roc_auc_score(truth, scored))
            by_class["average_precision"].append(reference.average_precision_score(truth, scored))
            by_class["f1"].append(reference.f1_score(truth, scored >= 0.3))
            by_class["accuracy"].append(reference.accuracy_score(truth, scored >= 0.5))
            by_class["brier"].append(reference.brier_score_loss(truth, scored))
            table = reference.confusion_matrix(truth, scored >= 0.3).tolist()
            assert scores.confusion.at_operating_point[column] == table
            for metric, values in by_class.items():
                assert scores.by_class[name][metric].value == pytest.approx(values[-1])
        for metric, values in by_class.items():
            assert scores.metrics[metric].value == pytest.approx(np.mean(values))
        labelled = ~np.isnan(y).all(axis=1)
        right = (((p >= 0.5) == (y == 1)) | np.isnan(y)).all(axis=1)[labelled]
        assert scores.metrics["exact_match"].value == pytest.approx(right.mean())
        assert_sound(scores)


def test_calibration_error_is_the_weighted_gap_over_ten_bins_of_scipy() -> None:
    for seed in range(250):
        y, p, _ = draw(seed)
        gaps = stats.binned_statistic(10 * p, p - y, "sum", bins=np.arange(11)).statistic
        found = score_binary(y, p).metrics["expected_calibration_error"]
        assert found.value == pytest.approx(np.abs(gaps).sum() / y.size, abs=1e-12)


def test_calibration_error_of_true_probabilities_is_what_chance_gives() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(200)
    errors, chances = [], []
    for _ in range(300):
        scores = score_binary((rng.random(200) < p).astype(int), p)
        errors.append(scores.metrics["expected_calibration_error"].value)
        chances.append(scores.metrics["ece_if_calibrated"])
    assert np.mean(errors) == pytest.approx(chances[0].value, rel=0.05)
    inside = [c.low <= e <= c.high for e, c in zip(errors, chances, strict=True)]
    assert 0.9 < np.mean(inside) < 0.99


def calibrated(kind: str, rng: np.random.Generator, sharpness: float = 1.0) -> tuple[np.ndarray, ...]:
    """Labels, probabilities and patients of 60 patients with 10 images each; their logits `sharpness` times true."""
    patients = np.repeat(np.arange(60), 10)
    if kind == "independent":
        truth, random = rng.random(600), rng.random(600)
    elif kind == "one outcome":  # of a patient, but not one risk
        truth, random = rng.random(600), np.repeat(rng.random(60), 10)
    else:
        copies = {"identical": 10, "two pictures": 5}[kind]
        truth, random = (np.repeat(rng.random(600 // copies), copies) for _ in range(2))
    return (random < truth).astype(int), special.expit(sharpness * special.logit(truth)), patients


def found_miscalibrated(y: np.ndarray, p: np.ndarray, patients: np.ndarray | None) -> bool:
    cases = one_score(y, p, patients)
    error = probability_scores(cases, np.empty((0, cases.num_patients), np.uint8))
    return (
        error["expected_calibration_error"].estimate.value
        > reliability.ece_if_calibrated(cases).estimate.high
    )


@pytest.mark.parametrize(
    ("kind", "power"), [("independent", 195), ("identical", 75), ("two pictures", 120), ("one outcome", 180)]
)
def test_calibration_is_doubted_of_true_probabilities_seldom_whatever_patients_share(
    kind: str, power: int
) -> None:
    """Of 200 sets: twelve false alarms at most, where images taken as independent raise up to 199."""
    sets = [calibrated(kind, np.random.default_rng(seed)) for seed in range(200)]
    assert sum(found_miscalibrated(*one) for one in sets) <= 12
    if kind != "independent":
        assert sum(found_miscalibrated(y, p, None) for y, p, _ in sets) >= 40, "the fault this is about"
    # Twice too sharp, it is found.
    sharp = [calibrated(kind, np.random.default_rng(seed), 2.0) for seed in range(200)]
    assert sum(found_miscalibrated(*one) for one in sharp) >= power


def test_the_dependence_of_a_patients_outcomes_is_that_of_all_pairs() -> None:
    for seed in range(50):
        y, p, patients = draw(seed, n=60, clusters=True)
        cases = one_score(y, p, patients)
        seen = largest = 0.0
        for i, j in itertools.combinations(range(60), 2):
            if patients[i] == patients[j] and int(p[i] * 10) == int(p[j] * 10):
                seen += (y[i] - p[i]) * (y[j] - p[j])
                largest += min(p[i], p[j]) - p[i] * p[j]
        expected = min(max(seen / largest, 0.0), 1.0)
        assert reliability._shared(cases, cases.p[0]) == pytest.approx(expected)


def test_copies_of_an_image_are_drawn_as_one_in_the_calibration_of_chance() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(200)
    y = (rng.random(200) < p).astype(int)
    once = score_binary(y, p).metrics["ece_if_calibrated"]
    copies = score_binary(np.tile(y, 10), np.tile(p, 10), np.tile(np.arange(200), 10))
    thrice = copies.metrics["ece_if_calibrated"]
    assert "dependent within patients" in thrice.method
    assert "dependent" not in once.method
    assert thrice.value == pytest.approx(once.value, rel=0.1)
    assert thrice.high == pytest.approx(once.high, rel=0.1)


def test_limits_of_the_calibration_curve_count_copies_once() -> None:
    y, p, _ = draw(6, n=400)
    once = metrics.calibration_curve(y, p)
    copies = metrics.calibration_curve(np.tile(y, 5), np.tile(p, 5), np.tile(np.arange(400), 5))
    np.testing.assert_allclose(copies.observed, once.observed)
    large = once.n >= 30  # below, Student's t takes its toll
    assert large.sum() >= 4
    ratio = (copies.high - copies.low) / (once.high - once.low)
    assert ((ratio[large] > 0.97) & (ratio[large] < 1.1)).all()
    alone = metrics.calibration_curve(y, p, np.arange(400))
    np.testing.assert_array_equal(alone.low, once.low)
    low, _ = wilson(once.observed * once.n, once.n)
    np.testing.assert_allclose(once.low, low)


def test_the_calibration_curve_of_several_models_is_their_mean() -> None:
    y, p, _ = draw(6, n=400)
    q = np.clip(p**1.3, 0.15, 1)  # without the lowest bin
    one, other = metrics.calibration_curve(y, p), metrics.calibration_curve(y, q)
    both = metrics.calibration_curve(y, [p, q])
    assert len(both.n) == len(one.n) == len(other.n) + 1
    for curve in ("probability", "observed"):
        first, second, mean = getattr(one, curve), getattr(other, curve), getattr(both, curve)
        np.testing.assert_allclose(mean[0], first[0], err_msg="only one model has a case there")
        np.testing.assert_allclose(mean[1:], (first[1:] + second) / 2)
    with pytest.raises(ValueError, match="row 3"):
        metrics.calibration_curve(y, [p, np.where(np.arange(400) == 3, 1.5, p)])


def test_limits_of_the_calibration_curve_do_not_shrink_with_the_number_of_models() -> None:
    """Three networks that agree tell no more of the patients than one; three that do not, a little more."""
    rng = np.random.default_rng(3)
    truth = rng.normal(-0.5, 1.5, 40_000)
    said = special.expit(truth + rng.normal(0, 0.5, (3, truth.size)))
    ill = (rng.random(truth.size) < special.expit(truth)).astype(int)
    # What the interval is of: in each bin the share of the ill, the mean over the models, in the population.
    expected = metrics.calibration_curve(ill, said).observed
    hits, total = np.zeros(10), 500
    for _ in range(total):
        drawn = rng.integers(truth.size, size=800)
        found = metrics.calibration_curve(ill[drawn], said[:, drawn])
        assert len(found.n) == 10
        hits += (found.low <= expected) & (expected <= found.high)
    assert ((hits / total > 0.92) & (hits / total < 0.99)).all(), hits / total
    same = metrics.calibration_curve(ill[:800], np.tile(said[:1, :800], (3, 1)))
    alone = metrics.calibration_curve(ill[:800], said[0, :800])
    ratio = (same.high - same.low) / (alone.high - alone.low)
    assert ((ratio > 0.99) & (ratio < 1.1)).all(), ratio


@pytest.mark.parametrize("clusters", [False, True])
def test_calibration_slope_and_intercept_equal_statsmodels(clusters: bool) -> None:
    tested = 0
    for seed in range(0, 400, 2):
        y, p, patients = draw(seed, clusters=clusters)
        found = score_binary(y, p, patients).metrics
        logit = np.log(p / (1 - p))
        groups = len(set(patients))
        intercept = sm.GLM(y, np.ones_like(logit), family=sm.families.Binomial(), offset=logit).fit(
            tol=1e-12, cov_type="cluster", cov_kwds={"groups": patients, "use_correction": False}
        )
        estimate = found["calibration_intercept"]
        assert estimate.value == pytest.approx(intercept.params[0], abs=1e-6)
        half = stats.norm.ppf(0.975) * intercept.bse[0] * math.sqrt(groups / (groups - 1))
        assert estimate.high - estimate.value == pytest.approx(half, rel=1e-4)
        if found["calibration_slope"].value is None:
            assert max(p[y == 0]) <= min(p[y == 1]) or max(p[y == 1]) <= min(p[y == 0])
            continue
        tested += 1
        slope = sm.Logit(y, sm.add_constant(logit)).fit(
            disp=0, cov_type="cluster", cov_kwds={"groups": patients, "use_correction": False}
        )
        estimate = found["calibration_slope"]
        assert estimate.value == pytest.approx(slope.params[1], rel=1e-4, abs=1e-4)
        half = stats.norm.ppf(0.975) * slope.bse[1] * math.sqrt(groups / (groups - 1))
        assert estimate.high - estimate.value == pytest.approx(half, rel=1e-3)
    assert tested > 180


# --- Intervals ----------------------------------------------------------------------------------------


def test_wilson_limits_equal_statsmodels() -> None:
    for n in (1, 2, 5, 20, 234, 390, 5000):
        hits = np.unique(np.linspace(0, n, 41).astype(int))
        low, high = wilson(hits, n)
        expected = np.array([proportion_confint(k, n, method="wilson") for k in hits])
        np.testing.assert_allclose(np.stack([low, high], axis=1), expected, atol=1e-12)
    rng = np.random.default_rng(0)
    n = rng.integers(1, 2000, 200)
    hits = rng.integers(0, n + 1)
    expected = [proportion_confint(k, size, method="wilson") for k, size in zip(hits, n, strict=True)]
    np.testing.assert_allclose(np.stack(wilson(hits, n), axis=1), expected, atol=1e-12)


def test_independent_proportions_have_plain_wilson_limits() -> None:
    for seed in range(100):
        y, p, _ = draw(seed)
        estimate = score_binary(y, p).metrics["sensitivity"]
        hits, n = int((p[y == 1] >= 0.4).sum()), int(y.sum())
        assert (estimate.low, estimate.high) == pytest.approx(
            proportion_confint(hits, n, method="wilson"), abs=1e-9
        )
        assert (estimate.n, estimate.method.split(";")[0]) == (n, "Wilson")


def test_clustered_proportions_have_the_variance_of_a_cluster_robust_mean_over_effective_patients() -> None:
    compared = 0
    for seed in range(400):
        y, p, patients = draw(seed, n=120, clusters=True)
        estimate = at_threshold(y, p, 0.5, patients)["sensitivity"]
        hits, groups = (p[y == 1] >= 0.5).astype(float), patients[y == 1]
        if len(set(groups)) == len(groups) or hits.std() == 0:
            continue
        variance = (
            sm.OLS(hits, np.ones_like(hits)).fit(cov_type="cluster", cov_kwds={"groups": groups}).bse[0] ** 2
        )
        value = hits.mean()
        heads, effective_heads = len(set(groups)), worth(groups)
        # The reference's small-sample factor G / (G - 1) and degrees of freedom are of heads.
        variance *= (effective_heads / max(effective_heads - 1, 1)) / (heads / (heads - 1))
        effective = value * (1 - value) / max(variance, value * (1 - value) / len(hits))
        t = stats.t.ppf(0.975, max(effective_heads - 1, 1))
        # Wilson's limits are where |value - limit| = t sqrt(limit (1 - limit) / n).
        for limit in (estimate.low, estimate.high):
            assert abs(value - limit) == pytest.approx(
                t * math.sqrt(limit * (1 - limit) / effective), rel=1e-6
            )
        compared += 1
    assert compared > 200


def test_delong_variance_equals_the_pairwise_placements() -> None:
    for seed in range(300):
        y, p, _ = draw(seed)
        estimate = auc(y, p)
        value, of_positives, of_negatives = placements(y, p)
        assert estimate.value == pytest.approx(value)
        variance = of_positives.var(ddof=1) / y.sum() + of_negatives.var(ddof=1) / (1 - y).sum()
        if variance > 1e-12 and 0 < value < 1:
            assert estimate.method.startswith("DeLong (logit)")
            shares = np.r_[(of_positives - value) / y.sum(), (of_negatives - value) / (1 - y).sum()]
            found = logit_variance(estimate, student(shares))
            assert found == pytest.approx(variance, rel=1e-6)


def test_delong_agrees_with_the_bootstrap() -> None:
    y, p, _ = draw(4, n=300)
    rng = np.random.default_rng(0)
    values = []
    for _ in range(2000):
        rows = rng.integers(0, 300, 300)
        values.append(reference.roc_auc_score(y[rows], p[rows]))
    value, of_positives, of_negatives = placements(y, p)
    shares = np.r_[(of_positives - value) / y.sum(), (of_negatives - value) / (1 - y).sum()]
    assert logit_variance(auc(y, p), student(shares)) == pytest.approx(np.var(values), rel=0.12)


def test_clustered_auc_variance_equals_obuchowskis_sums() -> None:
    compared = 0
    for seed in range(300):
        y, p, patients = draw(seed, clusters=True)
        value, of_positives, of_negatives = placements(y, p)
        m, n = y.sum(), (1 - y).sum()
        ids = sorted(set(patients))
        positive, negative = [], []
        for patient in ids:
            mine = patients == patient
            positive.append(of_positives[mine[y == 1]].sum() - mine[y == 1].sum() * value)
            negative.append(of_negatives[mine[y == 0]].sum() - mine[y == 0].sum() * value)
        i = len(ids)
        i10, i01 = len(set(patients[y == 1])), len(set(patients[y == 0]))
        if min(i10, i01) < 2 or i == len(y):
            continue
        s10 = i10 / ((i10 - 1) * m) * np.square(positive).sum()
        s01 = i01 / ((i01 - 1) * n) * np.square(negative).sum()
        s11 = i / (i - 1) * np.dot(positive, negative)
        variance = s10 / m + s01 / n + 2 * s11 / (m * n)
        estimate = auc(y, p, patients)
        if variance > 1e-9 and estimate.method.startswith("Obuchowski (logit)"):
            shares = np.array(positive) / m + np.array(negative) / n
            rarer = max(min(worth(patients[y == 1]), worth(patients[y == 0])), 2)
            found = logit_variance(estimate, student(shares, rarer))
            assert found == pytest.approx(variance, rel=1e-6)
            compared += 1
    assert compared > 250


def test_an_auc_holds_the_truth_where_one_patient_has_most_positives() -> None:
    rng, held, sets = np.random.default_rng(3), 0, 200
    patients = np.r_[np.repeat([0, 1, 2], [90, 5, 5]), np.arange(3, 303)]
    y = (patients < 3).astype(int)
    for _ in range(sets):
        own, shared = rng.normal(size=y.size), rng.normal(size=303)[patients]
        found = auc(y, np.sqrt(0.5) * (own + shared) + np.sqrt(2) * stats.norm.ppf(0.8) * y, patients)
        held += found.low <= 0.8 <= found.high
    # By the degrees of freedom of all patients it was .36.
    assert held / sets > 0.93


def test_obuchowski_with_one_image_a_patient_is_delong() -> None:
    for seed in range(50):
        y, p, _ = draw(seed)
        names = np.random.default_rng(seed).permutation(len(y)).astype(str)
        named, plain = auc(y, p, names), auc(y, p)
        assert named.method == plain.method
        assert (named.value, named.low, named.high) == pytest.approx((plain.value, plain.low, plain.high))


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_limits_of_a_perfect_auc_solve_newcombes_equation(value: float) -> None:
    m, n = 12, 30
    y = np.r_[np.ones(m), np.zeros(n)]
    estimate = auc(y, y if value else 1 - y)
    assert estimate.value == value
    assert "Newcombe" in estimate.method
    limit = estimate.low if value else estimate.high
    q1, q2, balanced = limit / (2 - limit), 2 * limit**2 / (1 + limit), (m + n) / 2 - 1
    variance = (limit * (1 - limit) + balanced * (q1 - limit**2) + balanced * (q2 - limit**2)) / (m * n)
    assert abs(value - limit) == pytest.approx(stats.norm.ppf(0.975) * math.sqrt(variance), rel=1e-6)


def test_perfect_sets_do_not_get_intervals_without_width() -> None:
    y = np.r_[np.ones(20), np.zeros(80)].astype(int)
    for seeds in (1, 3):
        p = np.broadcast_to(np.where(y == 1, 0.9, 0.1), (seeds, 100))
        y_seeds = score(
            np.stack([1 - y, y], axis=-1),
            np.stack([1 - p, p], axis=-1),
            np.stack([p < 0.5, p >= 0.5], axis=-1),
            **BINARY,
        )
        for name in ("auc", "average_precision", "sensitivity", "ppv", "balanced_accuracy", "f1", "accuracy"):
            estimate = y_seeds.metrics[name]
            assert estimate.value == 1
            assert estimate.low < 0.97, (name, estimate)


def test_balanced_accuracy_has_mover_limits_of_two_independent_proportions() -> None:
    y, p, _ = draw(2, n=80)
    found = score_binary(y, p).metrics
    parts = [found["sensitivity"], found["specificity"]]
    estimate = found["balanced_accuracy"]
    low = math.sqrt(sum((part.value - part.low) ** 2 for part in parts)) / 2
    high = math.sqrt(sum((part.high - part.value) ** 2 for part in parts)) / 2
    assert (estimate.value - estimate.low, estimate.high - estimate.value) == pytest.approx((low, high))


def test_copies_of_a_class_do_not_narrow_the_mean_over_classes() -> None:
    y, p, patients = draw(16, n=150, clusters=True)
    one, two = (
        score(
            np.tile(y[:, None], columns),
            np.tile(p[:, None], columns),
            np.tile(p[:, None] >= 0.4, columns),
            task="multilabel",
            classes=["a", "b"][:columns],
            patients=patients,
            resamples=200,
        ).metrics
        for columns in (1, 2)
    )
    for name in one:
        limits = [(found[name].low, found[name].high) for found in (one, two)]
        assert limits[0] == pytest.approx(limits[1], abs=1e-9), name


def test_limits_of_the_calibration_error_lie_on_both_sides_of_it() -> None:
    # Percentiles of a calibrated set's resamples lie above the value: resampling adds noise to every bin.
    rng = np.random.default_rng(0)
    for _ in range(20):
        p = rng.random(300)
        estimate = score_binary((rng.random(300) < p).astype(int), p, resamples=200).metrics[
            "expected_calibration_error"
        ]
        assert estimate.value - estimate.low > 0.2 * (estimate.high - estimate.low)
        assert estimate.high - estimate.value > 0.2 * (estimate.high - estimate.low)


def test_copies_of_an_image_do_not_narrow_any_interval() -> None:
    y, p, patients = draw(6, n=200)
    once = score_binary(y, p, patients, resamples=400)
    thrice = score_binary(np.tile(y, 3), np.tile(p, 3), np.tile(patients, 3), resamples=400)
    assert not once.clustered
    assert thrice.clustered
    assert (thrice.n, thrice.n_patients) == (600, 200)
    for name, estimate in once.metrics.items():
        if name == "ece_if_calibrated":  # drawn, not resampled: its own test is above
            continue
        other = thrice.metrics[name]
        assert other.value == pytest.approx(estimate.value)
        # Student's t, over the patients that have the class, takes the place of the normal quantile.
        assert 0.97 < (other.high - other.low) / (estimate.high - estimate.low) < 1.15, name


# --- Resampling ---------------------------------------------------------------------------------------


def test_weighted_resamples_equal_scikit_learn_on_the_rows_drawn() -> None:
    for seed in range(200):
        y, p, patients = draw(seed, clusters=True)
        weights = metrics.resample(patients.max() + 1, 3, seed)
        assert (weights.sum(axis=1) == patients.max() + 1).all()
        calls = (p >= 0.4)[None]
        cases = Cases(y == 1, p[None], calls, calls, patients, patients.max() + 1, True)
        parts = (
            probability_scores(cases, weights)
            | {"f1": f1(cases, weights)}
            | {"average_precision": average_precision(cases, weights)}
        )
        for row in range(3):
            drawn = np.repeat(np.arange(len(y)), weights[row][patients])
            if len(set(y[drawn])) < 2:
                continue
            expected = {
                "average_precision": reference.average_precision_score(y[drawn], p[drawn]),
                "f1": reference.f1_score(y[drawn], p[drawn] >= 0.4),
                "brier": reference.brier_score_loss(y[drawn], p[drawn]),
                "log_loss": reference.log_loss(y[drawn], p[drawn]),
            }
            for name, value in expected.items():
                assert parts[name].replicates[row] == pytest.approx(value), name


def test_limits_are_those_of_a_loop_over_whole_patients() -> None:
    y, p, patients = draw(8, n=150, clusters=True)
    found = score_binary(y, p, patients, resamples=2000).metrics
    rng = np.random.default_rng(1)
    ids = np.unique(patients)
    rows = {patient: np.flatnonzero(patients == patient) for patient in ids}
    values: dict[str, list[float]] = {"brier": [], "log_loss": [], "average_precision": [], "f1": []}
    for _ in range(600):
        drawn = np.concatenate([rows[patient] for patient in rng.choice(ids, len(ids))])
        values["brier"].append(reference.brier_score_loss(y[drawn], p[drawn]))
        values["log_loss"].append(reference.log_loss(y[drawn], p[drawn]))
        values["average_precision"].append(reference.average_precision_score(y[drawn], p[drawn]))
        values["f1"].append(reference.f1_score(y[drawn], p[drawn] >= 0.4))
    for name, replicates in values.items():
        counted = patients if name in ("brier", "log_loss") else patients[y == 1]
        error = stats.t.ppf(0.975, worth(counted) - 1) * np.std(replicates, ddof=1)
        estimate = found[name]
        v = estimate.value
        if name == "log_loss":
            expected = v * math.exp(-error / v), v * math.exp(error / v)
        else:
            logit = math.log(v / (1 - v))
            expected = tuple(1 / (1 + math.exp(-logit - sign * error / (v * (1 - v)))) for sign in (-1, 1))
        assert (estimate.low, estimate.high) == pytest.approx(
            expected, abs=0.05 * (expected[1] - expected[0])
        ), name
        scale = "log" if name == "log_loss" else "logit"
        said, _, doubt = estimate.method.partition("; ")
        assert said == f"patient bootstrap, {scale} scale, 2000 resamples"
        assert doubt.startswith("too few (")
    said, _, doubt = found["expected_calibration_error"].method.partition("; ")
    assert said == "patient bootstrap, percentile, 2000 resamples, centred"
    assert "above the true error" in doubt


def test_the_same_call_gives_the_same_numbers_whatever_patients_are_called() -> None:
    y, p, patients = draw(3, n=90, clusters=True)
    first = score_binary(y, p, patients, resamples=100)
    assert first == score_binary(y, p, patients, resamples=100)
    assert first == score_binary(
        y, p, np.char.add("p", np.char.zfill(patients.astype(str), 4)), resamples=100
    )
    assert first != score_binary(y, p, patients, resamples=100, seed=1)


def test_seeds_are_averaged_and_share_their_resamples() -> None:
    y, p, patients = draw(10, n=120, clusters=True)
    other = np.clip(p + np.random.default_rng(0).normal(0, 0.1, 120), 0.01, 0.99)
    one, two = (score_binary(y, scores, patients, resamples=200) for scores in (p, other))
    both = score_binary_seeds(y, np.stack([p, other]), patients)
    same = score_binary_seeds(y, np.stack([p, p]), patients)
    for name in one.metrics:
        values = one.metrics[name].value, two.metrics[name].value
        assert both.by_seed[name] == pytest.approx(values)
        assert both.metrics[name].value == pytest.approx(np.mean(values))
        assert both.between_seed_sd[name] == pytest.approx(np.std(values, ddof=1))
        # A model scored twice is no more evidence than once.
        pair = [(found.metrics[name].low, found.metrics[name].high) for found in (one, same)]
        assert pair[0] == pytest.approx(pair[1], abs=1e-9), name
    assert one.between_seed_sd["auc"] is None
    assert_sound(both)


def score_binary_seeds(y: np.ndarray, p: np.ndarray, patients: np.ndarray) -> Scores:
    """As score_binary, for S N probabilities."""
    return score(
        np.stack([1 - y, y], axis=-1),
        np.stack([1 - p, p], axis=-1),
        np.stack([p < 0.4, p >= 0.4], axis=-1),
        patients=patients,
        resamples=200,
        **BINARY,
    )


# --- The edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("clusters", [False, True])
@pytest.mark.parametrize(
    ("y", "p"),
    [
        ([], []),
        ([1], [0.7]),
        ([0], [0.7]),
        ([0, 1], [0.2, 0.7]),
        ([0, 0, 0, 0], [0.1, 0.5, 0.5, 0.9]),
        ([1, 1, 1, 1], [0.1, 0.5, 0.5, 0.9]),
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5]),
        ([0, 1, 0, 1], [0.0, 1.0, 0.0, 1.0]),
        ([0, 1, 0, 1], [1.0, 0.0, 1.0, 0.0]),
        ([0, 1, 0, 1], [0.0, 0.0, 0.0, 0.0]),
        ([0] * 1000 + [1], list(np.linspace(0, 1, 1001))),
        ([0] * 3000 + [1] * 3, [*np.linspace(0, 0.3, 2999), 0.1, 0.3, 0.2, 0.9]),
        ([0] * 1000 + [1], [0.0] * 1001),
        ([1] * 1000 + [0], [1.0] * 1001),
    ],
)
def test_nothing_is_nan_and_nothing_crashes(y: list[int], p: list[float], clusters: bool) -> None:
    patients = np.arange(len(y)) // 2 if clusters else None
    scores = score_binary(np.array(y, dtype=float), np.array(p), patients, resamples=50)
    assert_sound(scores)
    assert scores.n == len(y)
    assert set(scores.metrics) == set(METRICS) - {"exact_match"}


@pytest.mark.parametrize("task", ["multiclass", "multilabel"])
@pytest.mark.parametrize("n", [0, 1, 30])
def test_a_class_without_cases_is_left_out_of_the_mean_and_says_so(task: str, n: int) -> None:
    rng = np.random.default_rng(0)
    y = np.eye(3)[np.arange(n) % 2]
    p = rng.dirichlet(np.ones(3), size=n)
    scores = score(
        y, p, p == p.max(axis=1, keepdims=True), task=task, classes=["a", "b", "never"], resamples=50
    )
    assert_sound(scores)
    assert scores.by_class["never"]["auc"].value is None
    assert scores.by_class["never"]["auc"].method.startswith("too few")
    if n == 30:
        parts = [scores.by_class[name]["auc"].value for name in "ab"]
        assert scores.metrics["auc"].value == pytest.approx(np.mean(parts))
        assert "1 undefined" in scores.metrics["auc"].method
        told = "too few (0 positives or negatives of 1 of 3 classes): holds the truth less often than 95 %"
        for name in ("auc", "sensitivity", "balanced_accuracy", "average_precision", "calibration_slope"):
            assert told in doubts_of(scores.metrics[name].method), name
            assert not floor(name, scores.metrics[name], 0.0).passed, name
        assert told not in scores.metrics["specificity"].method, "it is known of cases of other classes"


def test_a_calibration_line_through_separated_classes_is_undefined() -> None:
    found = score_binary(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.7, 0.8])).metrics
    assert found["calibration_slope"].value is None
    assert "separated" in found["calibration_slope"].method
    assert found["calibration_intercept"].value is not None


def test_unlabelled_cases_play_no_part() -> None:
    y, p, patients = draw(12, n=60, clusters=True)
    labels = np.stack([1 - y, y], axis=-1).astype(float)
    labels[40:] = np.nan
    calls = np.stack([p < 0.4, p >= 0.4], axis=-1)
    found = score(labels, np.stack([1 - p, p], axis=-1), calls, patients=patients, **BINARY, resamples=50)
    assert found == score_binary(y[:40], p[:40], patients[:40], resamples=50)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "detection"}, "task detection"),
        ({"positive": "tumour"}, "positive 'tumour'"),
        ({"labels": np.full((4, 2), 0.5)}, "neither 0 nor 1"),
        ({"labels": np.ones((4, 2))}, "row 0 does not have exactly one class"),
        ({"labels": np.ones((4, 3))}, "labels: shape"),
        ({"probabilities": np.full((4, 2), np.nan)}, "row 0 is not within 0..1"),
        ({"probabilities": np.full((4, 2), -3.0)}, "row 0 is not within 0..1"),
        ({"probabilities": np.ones((3, 2))}, "probabilities: shape"),
        ({"decisions": np.ones((4, 2))}, "decisions: float64"),
        ({"patients": ["a"]}, "patients: 1 values"),
    ],
)
def test_contradicting_input_is_refused_in_one_line(change: dict[str, object], message: str) -> None:
    good = {
        "labels": np.eye(2)[[0, 1, 0, 1]],
        "probabilities": np.full((4, 2), 0.5),
        "decisions": np.eye(2, dtype=bool)[[0, 1, 0, 1]],
    }
    arguments = good | BINARY | change
    with pytest.raises(ValueError, match=message) as caught:
        score(
            arguments.pop("labels"), arguments.pop("probabilities"), arguments.pop("decisions"), **arguments
        )
    assert "\n" not in str(caught.value)


def test_a_multiclass_decision_for_two_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="row 1 does not name exactly one class"):
        score(
            np.eye(3),
            np.eye(3),
            np.eye(3, dtype=bool) | (np.arange(3) == 1)[:, None],
            task="multiclass",
            classes=list("abc"),
        )


# --- Paired comparison, subgroups, curves -------------------------------------------------------------


def test_paired_difference_equals_delongs_covariance() -> None:
    for seed in range(200):
        y, a, _ = draw(seed, n=50)
        b = np.clip(a + np.random.default_rng(seed + 1).normal(0, 0.2, 50), 0, 1)
        (auc_a, v10_a, v01_a), (auc_b, v10_b, v01_b) = placements(y, a), placements(y, b)
        contrast = np.array([1, -1])
        covariance = np.cov(v10_a, v10_b) / y.sum() + np.cov(v01_a, v01_b) / (1 - y).sum()
        error = math.sqrt(contrast @ covariance @ contrast)
        found = delong_difference(y, a, b)
        assert found.value == pytest.approx(auc_a - auc_b)
        assert found.p == pytest.approx(2 * stats.norm.sf(abs(auc_a - auc_b) / error), rel=1e-6)
        assert found.high == pytest.approx(min(1, auc_a - auc_b + stats.norm.ppf(0.975) * error))


def test_paired_difference_at_the_edges() -> None:
    y, p, _ = draw(1, n=40)
    same = delong_difference(y, p, p**3)
    assert (same.value, same.low, same.high, same.p) == (0, 0, 0, 1)
    assert delong_difference(y, y, np.zeros(40)).p is None
    assert delong_difference(np.ones(5), np.ones(5), np.ones(5)).method == "too few: 1 class"
    single = delong_difference(y, p, np.sqrt(p) * y + p * (1 - y))
    copies = delong_difference(*(np.tile(x, 4) for x in (y, p, np.sqrt(p) * y + p * (1 - y), np.arange(40))))
    assert copies.p == pytest.approx(single.p, rel=0.2)


def test_subgroups_score_their_own_cases_and_refuse_small_ones() -> None:
    y, p, _ = draw(14, n=400)
    site = np.array(["A", "B", "C", ""], dtype=object)[np.r_[np.repeat([0, 1], 180), np.repeat([2, 3], 20)]]
    labels, probabilities = np.stack([1 - y, y], axis=-1), np.stack([1 - p, p], axis=-1)
    calls = np.stack([p < 0.4, p >= 0.4], axis=-1)
    found = score_subgroups(
        labels, probabilities, calls, {"site": site, "sex": ["F"] * 399 + [None]}, **BINARY
    )
    assert list(found) == ["site", "sex"]
    assert list(found["site"]) == ["A", "B", "C", "unknown"]
    here = site == "A"
    assert found["site"]["A"].auc == auc(y[here], p[here])
    assert found["site"]["A"].sensitivity == at_threshold(y[here], p[here], 0.4)["sensitivity"]
    assert (found["site"]["A"].n, found["site"]["A"].n_positive) == (180, y[here].sum())
    small = found["site"]["C"]
    assert small.n == 20
    assert (small.auc.value, small.sensitivity.value) == (None, None)
    assert "too few" in small.sensitivity.method
    with pytest.raises(ValueError, match="subgroup site: 3 values for 400"):
        score_subgroups(labels, probabilities, calls, {"site": [1, 2, 3]}, **BINARY)


def test_curves_equal_scikit_learn() -> None:
    for seed in range(200):
        y, p, _ = draw(seed)
        found = metrics.roc(y, p)
        false_positive_rate, sensitivity, threshold = reference.roc_curve(y, p, drop_intermediate=False)
        np.testing.assert_allclose(found.false_positive_rate, false_positive_rate)
        np.testing.assert_allclose(found.sensitivity, sensitivity)
        np.testing.assert_allclose(found.threshold, threshold)
        precision, recall, threshold = reference.precision_recall_curve(y, p)
        curve = metrics.precision_recall(y, p)
        np.testing.assert_allclose(curve.precision[::-1], precision[:-1])
        np.testing.assert_allclose(curve.recall[::-1], recall[:-1])
        np.testing.assert_allclose(curve.threshold[::-1], threshold)
        if seed % 2 == 0:  # scikit-learn closes bins on the right; without ties it is the same
            observed, mean = reference_calibration_curve(y, p, n_bins=10)
            bins = metrics.calibration_curve(y, p)
            np.testing.assert_allclose(bins.observed, observed)
            np.testing.assert_allclose(bins.probability, mean)
            assert ((bins.low <= bins.observed) & (bins.observed <= bins.high)).all()
            assert bins.n.sum() == len(y)
    assert metrics.roc([1, 1], [0.1, 0.2]).threshold.size == 0
    assert metrics.precision_recall([0, 0], [0.1, 0.2]).threshold.size == 0
    assert metrics.calibration_curve([], []).n.size == 0


# --- Faults of the printed sketch ---------------------------------------------------------------------


def test_chapter_metrics_work_for_multiclass() -> None:
    """The sketch asks for pos_label=1 of a multiclass target, which raises."""
    y, calls = np.array([0, 1, 2, 2, 1, 0]), np.array([0, 1, 2, 1, 1, 0])
    p = np.eye(3)[calls] * 0.8 + 0.2 / 3
    found = calculate_medical_classification_metrics(y, calls, p)
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert (
        found["sensitivity"]
        == found["recall"]
        == pytest.approx(reference.recall_score(y, calls, average="macro"))
    )
    assert found["auc"] == pytest.approx(reference.roc_auc_score(y, p, multi_class="ovr"))
    assert found["confusion_matrix"].tolist() == reference.confusion_matrix(y, calls).tolist()


def test_chapter_metrics_work_for_multilabel() -> None:
    """The sketch passes an indicator matrix to confusion_matrix, which raises."""
    rng = np.random.default_rng(0)
    y, p = rng.integers(0, 2, (40, 3)), rng.random((40, 3))
    found = calculate_medical_classification_metrics(y, p > 0.5, p)
    assert found["auc"] == pytest.approx(reference.roc_auc_score(y, p))
    assert found["precision"] == pytest.approx(reference.precision_score(y, p > 0.5, average="macro"))
    assert found["confusion_matrix"].tolist() == reference.multilabel_confusion_matrix(y, p > 0.5).tolist()


def test_chapter_metrics_do_not_take_the_second_column_for_every_task() -> None:
    """The sketch scores y_prob[:, 1] whatever the task: here class 1 is perfect and the others are noise."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 300)
    p = rng.dirichlet(np.ones(3), 300)
    p[:, 1] = y == 1
    p /= p.sum(axis=1, keepdims=True)
    found = calculate_medical_classification_metrics(y, p.argmax(1), p)
    assert reference.roc_auc_score(y == 1, p[:, 1]) == 1
    assert found["auc"] == pytest.approx(reference.roc_auc_score(y, p, multi_class="ovr"))
    assert found["auc"] < 0.9


def test_chapter_metrics_take_binary_probabilities_in_either_shape_or_none() -> None:
    y, p, _ = draw(5, n=60)
    wide = calculate_medical_classification_metrics(y, p >= 0.5, np.stack([1 - p, p], axis=1))
    narrow = calculate_medical_classification_metrics(y, p >= 0.5, p)
    assert wide["auc"] == narrow["auc"] == pytest.approx(reference.roc_auc_score(y, p))
    assert wide["precision"] == wide["ppv"] == pytest.approx(reference.precision_score(y, p >= 0.5))
    without = calculate_medical_classification_metrics(y, p >= 0.5)
    assert (without["auc"], without["average_precision"]) == (None, None)
    assert without["f1"] == wide["f1"]
    with pytest.raises(ValueError, match=r"integers 0\.\.K-1"):
        calculate_medical_classification_metrics([0, -1], [0, 1])
    with pytest.raises(ValueError, match="y_pred: shape"):
        calculate_medical_classification_metrics([0, 1], [0, 1, 1])


# --- Coverage -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    repeats = 2000
    covered = dict.fromkeys(("wilson", "delong", "clustered proportion", "clustered auc", "balanced"), 0)
    separation = 1.8
    true_auc = stats.norm.cdf(separation / math.sqrt(2))
    true_sensitivity = stats.norm.sf(0.5 - separation)
    true_specificity = stats.norm.cdf(0.5)
    y = np.repeat([1, 0], [80, 160])
    for _ in range(repeats):
        x = rng.normal(size=240) + separation * y
        found = score_parts(y, x)
        covered["wilson"] += holds(found["sensitivity"], true_sensitivity)
        covered["delong"] += holds(auc(y, x), true_auc)
        covered["balanced"] += holds(found["balanced"], (true_sensitivity + true_specificity) / 2)
    for _ in range(repeats):
        size = rng.integers(1, 6, 80)
        patients = np.repeat(np.arange(80), size)
        # Positives cluster within patients, and scores do too (intraclass correlation 0.5).
        y = (rng.random(patients.size) < rng.beta(1, 1, 80)[patients]).astype(int)
        x = (
            rng.normal(0, math.sqrt(0.5), 80)[patients]
            + rng.normal(0, math.sqrt(0.5), patients.size)
            + separation * y
        )
        covered["clustered proportion"] += holds(
            at_threshold(y, x, 0.5, patients)["sensitivity"], true_sensitivity
        )
        covered["clustered auc"] += holds(auc(y, x, patients), true_auc)
    shares = {name: float(count / repeats) for name, count in covered.items()}
    assert all(0.93 <= share <= 0.97 for share in shares.values()), shares


def score_parts(y: np.ndarray, x: np.ndarray) -> dict[str, Estimate]:
    """Sensitivity, and balanced accuracy without the cost of everything else."""
    calls = (x >= 0.5)[None]
    cases = Cases(y == 1, x[None], calls, calls, np.arange(y.size), y.size, False)
    found, spared = sensitivity(cases), specificity(cases)
    return {
        "sensitivity": found.estimate,
        "balanced": balanced(found, spared).estimate,
    }


def holds(estimate: Estimate, truth: float) -> bool:
    """Whether the interval holds the truth."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low <= truth <= estimate.high


# --- Two models, other prevalences, decisions, gaps ------------------------------------------------------


@given(counts=st.lists(st.integers(0, 40), min_size=4, max_size=4).filter(lambda c: sum(c) > 0))
@settings(max_examples=200, deadline=None)
def test_tango_limits_solve_the_score_equation_with_the_likelihood_maximised_by_search(
    counts: list[int],
) -> None:
    both, only_a, only_b, neither = counts
    n = sum(counts)
    right_a = [True] * (both + only_a) + [False] * (only_b + neither)
    right_b = [True] * both + [False] * only_a + [True] * only_b + [False] * neither
    found = tango_difference(right_a, right_b)
    assert found.value == pytest.approx((only_a - only_b) / n)
    assert -1 <= found.low <= found.value <= found.high <= 1
    for limit in (found.low, found.high):
        if abs(limit) > 0.999 or abs(limit - found.value) < 1e-9:
            continue

        def loss(q: float, delta: float = limit) -> float:
            parts = ((only_a, q + delta), (only_b, q), (n - only_a - only_b, 1 - 2 * q - delta))
            return -sum(count * math.log(max(share, 1e-300)) for count, share in parts)

        q = optimize.minimize_scalar(
            loss, bounds=(max(0.0, -limit), (1 - limit) / 2), method="bounded", options={"xatol": 1e-12}
        ).x
        statistic = (only_a - only_b - n * limit) / math.sqrt(n * (2 * q + limit * (1 - limit)))
        assert abs(statistic) == pytest.approx(stats.norm.ppf(0.975), rel=2e-3)


@given(only_a=st.integers(0, 60), only_b=st.integers(0, 60), agree=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_mcnemar_equals_statsmodels_and_agrees_with_the_interval(
    only_a: int, only_b: int, agree: int
) -> None:
    if only_a + only_b + agree == 0:
        return
    right_a = [True] * only_a + [False] * only_b + [True] * agree
    right_b = [False] * only_a + [True] * only_b + [True] * agree
    found = tango_difference(right_a, right_b)
    if only_a + only_b:
        table = [[agree, only_a], [only_b, 0]]
        expected = mcnemar(table, exact=False, correction=False).pvalue
        assert found.p == pytest.approx(expected)
    if abs(found.p - 0.05) > 1e-6:
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_copies_of_a_pair_are_no_evidence() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.random(80) < 0.9, rng.random(80) < 0.75
    once = tango_difference(a, b)
    copied = tango_difference(np.tile(a, 5), np.tile(b, 5), np.tile(np.arange(80), 5))
    assert (copied.low, copied.high) == pytest.approx((once.low, once.high), abs=0.01)
    naive = tango_difference(np.tile(a, 5), np.tile(b, 5))
    assert naive.high - naive.low < 0.6 * (copied.high - copied.low)
    assert tango_difference([], []).method == "too few: no cases"
    with pytest.raises(ValueError, match="right_b: shape"):
        tango_difference([True], [True, False])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=200, deadline=None)
def test_holm_equals_statsmodels(p_values: list[float]) -> None:
    gc.freeze()  # it collects garbage in each call, of all that the tests hold
    expected = multipletests(p_values, method="holm")[1]
    gc.unfreeze()
    assert holm(p_values) == pytest.approx(expected)
    assert holm(p_values, [1 / len(p_values)] * len(p_values)) == pytest.approx(expected)


def test_a_test_with_half_of_alpha_is_judged_at_half_of_it() -> None:
    adjusted = holm([0.024, 0.3, 0.3, 0.3], [0.5, *[0.5 / 3] * 3])
    assert adjusted[0] == pytest.approx(0.048)
    assert adjusted == sorted(adjusted)


@given(
    tp=st.integers(0, 99),
    fn=st.integers(1, 50),
    fp=st.integers(0, 99),
    tn=st.integers(1, 99),
    share=st.floats(0.01, 0.99),
)
@settings(max_examples=200, deadline=None)
def test_predictive_values_are_bayes_rule_and_their_limits_lie_around(
    tp: int, fn: int, fp: int, tn: int, share: float
) -> None:
    y = [1] * (tp + fn) + [0] * (fp + tn)
    scores = [1] * tp + [0] * fn + [1] * fp + [0] * tn
    found = at_threshold(y, scores, 0.5)
    here = metrics.predictive_values(found["sensitivity"], found["specificity"], (tp + fn) / len(y))
    for name in ("ppv", "npv"):  # at the prevalence of the set itself it is the plain share
        if found[name].value is not None:
            assert here[name].value == pytest.approx(found[name].value)
    there = metrics.predictive_values(found["sensitivity"], found["specificity"], share)
    for estimate in there.values():
        if estimate.value is not None:
            assert 0 <= estimate.low <= estimate.value <= estimate.high <= 1


def test_limits_of_predictive_values_are_those_of_mercaldo_where_cases_are_many() -> None:
    y, scores = [1] * 800 + [0] * 4000, [1] * 720 + [0] * 80 + [1] * 400 + [0] * 3600
    found = at_threshold(y, scores, 0.5)
    ppv = metrics.predictive_values(found["sensitivity"], found["specificity"], 0.02)["ppv"]
    middle = math.log(0.02 * 0.9 / (0.98 * 0.1))
    half = stats.norm.ppf(0.975) * math.sqrt(0.1 / 0.9 / 800 + 0.9 / 0.1 / 4000)
    expected = [1 / (1 + math.exp(-(middle + sign * half))) for sign in (-1, 1)]
    assert [ppv.low, ppv.high] == pytest.approx(expected, rel=0.01)
    with pytest.raises(ValueError, match="between 0 and 1"):
        metrics.predictive_values(found["sensitivity"], found["specificity"], 1.0)


def test_net_benefit_is_the_count_of_hits_less_weighed_alarms() -> None:
    for seed in range(200):
        y, p, patients = draw(seed, clusters=True)
        found = metrics.decision_curve(y, p, thresholds=[0.1, 0.3, 0.5], patients=patients, resamples=20)
        for i, threshold in enumerate(found.threshold):
            table = reference.confusion_matrix(y, p >= threshold, labels=[0, 1])
            odds = threshold / (1 - threshold)
            assert found.model[i] == pytest.approx((table[1, 1] - odds * table[0, 1]) / len(y))
            assert found.everyone[i] == pytest.approx(y.mean() - odds * (1 - y.mean()))
            assert found.low[i] <= found.high[i]
    with pytest.raises(ValueError, match="above 0 and below 1"):
        metrics.decision_curve([0, 1], [0.1, 0.9], thresholds=[1.0])


@pytest.mark.slow
def test_the_limits_of_a_decision_curve_hold_the_true_net_benefit_as_often_as_they_say() -> None:
    """Over 1,500 sets of 300 patients, whose three images are alike: limits over single images would not."""
    share_ill, apart, at = 0.4, 1.5, np.array([0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    odds = at / (1 - at)
    cut = (np.log(odds) - special.logit(share_ill)) / apart + apart / 2  # the score whose probability it is
    truth = share_ill * stats.norm.sf(cut - apart) - odds * (1 - share_ill) * stats.norm.sf(cut)
    held = np.zeros(len(at))
    for seed in range(1500):
        rng = np.random.default_rng(seed)
        ill, patients = rng.random(300) < share_ill, np.repeat(np.arange(300), 3)
        scores = apart * ill[patients] + 0.8 * rng.normal(size=300)[patients] + 0.6 * rng.normal(size=900)
        p = special.expit(apart * (scores - apart / 2) + special.logit(share_ill))
        found = metrics.decision_curve(ill[patients], p, thresholds=at, patients=patients, seed=seed)
        held += (found.low <= truth) & (truth <= found.high)
    assert held.min() / 1500 >= 0.92, held
    assert held.max() / 1500 <= 0.99, held


def test_the_choice_of_a_threshold_widens_what_it_reaches() -> None:
    y, p, _ = draw(20, n=400)
    fixed = at_threshold(y, p, 0.4)
    same = metrics.with_chosen_threshold(y, p, 0.4, [0.4] * 10)
    spread = metrics.with_chosen_threshold(y, p, 0.4, np.linspace(0.3, 0.5, 50))
    for name in ("sensitivity", "specificity"):
        assert (same[name].low, same[name].high) == pytest.approx((fixed[name].low, fixed[name].high))
        assert spread[name].value == fixed[name].value
        assert spread[name].low < fixed[name].low < fixed[name].high < spread[name].high
    perfect = metrics.with_chosen_threshold([1] * 60, [0.9] * 30 + [0.6] * 30, 0.5, [0.5, 0.7])
    assert perfect["sensitivity"].low < at_threshold([1] * 60, [0.9] * 60, 0.5)["sensitivity"].low


def test_shares_hold_the_truth_where_few_patients_have_most_images() -> None:
    rng, held, one_has_half, sets = np.random.default_rng(0), 0, 0, 500
    for _ in range(sets):
        for sizes in (np.minimum(1 + rng.pareto(1.1, 60), 200).astype(int), np.r_[60, np.ones(60, int)]):
            patients = np.repeat(np.arange(sizes.size), sizes)
            right = rng.random(patients.size) < rng.beta(1.6, 0.4, sizes.size)[patients]
            found = metrics.share_of(right, patients)
            holds = found.low <= 0.8 <= found.high
            if sizes[0] == 60:
                one_has_half += holds
                assert "too few" in found.method
            else:
                held += holds
    # By the number of heads it was .85 and .74.
    assert held / sets > 0.92
    assert one_has_half / sets > 0.95


def test_few_errors_and_few_patients_are_told() -> None:
    assert "too few errors (1)" in metrics.share_of([True] * 99 + [False]).method
    assert "too few" not in metrics.share_of([True] * 90 + [False] * 10).method
    y, p, _ = draw(4, n=70)
    assert "too few" in auc(y, p).method
    # Patients count, not their images; and what is derived from a doubted share is doubted.
    labels, scores = np.repeat([0, 1], 60), np.tile(np.repeat([0.2, 0.8], 30), 2)
    for num_patients, word in ((20, "too few effective patients ("), (30, "")):
        found = metrics.at_threshold(labels, scores, 0.5, np.arange(120) % num_patients)
        elsewhere = metrics.predictive_values(found["sensitivity"], found["specificity"], 0.05)
        for estimate in (found["ppv"], elsewhere["ppv"], elsewhere["npv"]):
            assert ("too few" in estimate.method) == bool(word), estimate.method
            assert word in estimate.method
    # Nor do heads count where few patients have most of the images.
    sizes = np.r_[[100, 80, 60], np.ones(300, int)]
    patients = np.repeat(np.arange(sizes.size), sizes)
    y, p = patients % 2, np.random.default_rng(0).random(patients.size)
    assert "in the rarer class" in auc(y, p, patients).method
    assert "too few" not in auc(y[240:], p[240:], patients[240:]).method
    # Whatever rests on both classes says so where one of them is small, alone and as a mean over classes.
    rng = np.random.default_rng(0)
    for positives, doubted in ((49, True), (50, False)):
        y = np.r_[np.ones(positives), np.zeros(400)].astype(int)
        p = 1 / (1 + np.exp(-(rng.normal(size=y.size) + 2 * (y - 0.5))))
        labels, shown = np.stack([1 - y, y], axis=1), np.stack([1 - p, p], axis=1)
        several = score(labels, shown, shown > 0.5, task="multilabel", classes=["a", "b"], resamples=20)
        for found in (score_binary(y, p, resamples=20).metrics, several.metrics):
            for name in (
                "average_precision",
                "f1",
                "brier",
                "log_loss",
                "calibration_slope",
                "calibration_intercept",
            ):
                assert ("too few (49 in the rarer class)" in found[name].method) == doubted, name


def test_few_errors_are_told_as_they_are_and_the_smallest_number_of_all_stands_for_a_mean() -> None:
    seeds = np.r_[np.zeros(4, bool), np.ones(96, bool)], np.r_[np.zeros(5, bool), np.ones(95, bool)]
    assert "too few errors (4.5)" in metrics.share_of(np.stack(seeds)).method
    parts = []
    for positives in (30, 4):
        y, rng = np.r_[np.ones(positives), np.zeros(400 - positives)], np.random.default_rng(positives)
        parts.append(area(one_score(y, rng.normal(size=y.size) + y, None)))
    for given_parts in (parts, parts[::-1]):
        method = mean_of_parts("auc", given_parts).estimate.method
        assert method.endswith("; too few (4 in the rarer class): holds the truth only roughly")


def test_a_difference_of_aucs_says_where_it_holds_the_truth_less_often() -> None:
    rng = np.random.default_rng(0)
    for n, skill, word in (
        (30, 1.5, "too few (30 in the rarer class)"),
        (60, 4.0, "too few errors (0."),
        (60, 1.5, ""),
    ):
        y = np.r_[np.ones(n), np.zeros(200)]
        found = metrics.delong_difference(
            y, rng.normal(size=y.size) + skill * y, rng.normal(size=y.size) + skill * y
        )
        assert word in found.method
        assert ("holds the truth less often than 95 %" in found.method) == bool(word), found.method


def test_a_threshold_s_spread_is_no_confidence_interval() -> None:
    rng = np.random.default_rng(0)
    y, p = np.tile([0, 1], 30), rng.random(60)
    rows = Arrays(
        np.stack([1 - y, y], axis=1), np.stack([1 - p, p], axis=1)[None], np.zeros((1, 60, 2), bool), None
    )
    info = SimpleNamespace(
        classes=("normal", "ill"), thresholds={"ill": 0.4}, resampled_thresholds={"ill": [0.3, 0.4, 0.5]}
    )
    told = operating_point([info], rows)["ill"]["threshold"].method
    assert told == "spread over 3 resamples of the calibration patients, no confidence interval"


def test_a_gap_between_groups_says_where_a_side_rests_on_too_few() -> None:
    for n, doubted in ((30, True), (400, False)):
        rng = np.random.default_rng(1)
        y, sex = np.tile([0, 1], n), np.repeat(["F", "M"], n)
        p = special.expit(rng.normal(size=y.size) + 3 * (y - 0.5))
        found = metrics.subgroup_gaps(
            np.stack([1 - y, y], axis=1), np.stack([1 - p, p], axis=1), np.stack([p < 0.5, p >= 0.5], axis=1),
            {"sex": sex}, **BINARY, minimum_n=10,
        )["sex"]["F"]  # fmt: skip
        assert ("MOVER; too few (15 in the rarer class)" in found["auc"].method) == doubted
        assert ("MOVER; too few errors (" in found["sensitivity"].method) == doubted


def test_resamples_without_errors_make_no_interval_too_narrow_and_no_perfect_set_is_sure() -> None:
    y = np.r_[np.ones(60), np.zeros(140)].astype(int)
    p = np.r_[np.full(58, 0.99), 0.3, 0.2, np.full(3, 0.4), np.full(137, 0.01)]
    found = score_binary(y, p, resamples=500).metrics
    for name in ("average_precision", "f1"):
        assert found[name].method.startswith("patient bootstrap, logit scale by the delta method, 500"), name
        # Symmetric on the logit scale, where the percentiles end at 1.
        low, value, high = special.logit([found[name].low, found[name].value, found[name].high])
        assert high - value == pytest.approx(value - low)
    for name in ("f1", "brier", "log_loss"):
        said = "too few errors (2): holds the truth less often than 95 %"
        assert found[name].method.endswith(said) == (name != "f1"), found[name].method
    perfect = score_binary(y, y.astype(float), resamples=50).metrics
    for name in ("f1", "brier", "log_loss"):
        assert "too few errors (0): holds the truth less often than 95 %" in perfect[name].method, name


def test_the_brier_score_of_several_classes_may_be_2() -> None:
    drawn = np.random.default_rng(0).normal(1.2, 0.1, 200)
    part = replicated("brier", np.array([1.2]), drawn, 80, 80)
    found = on_scale("brier", part, 2.0).estimate
    assert found.low < 1.2 < found.high
    half = replicated("brier", np.array([0.6]), drawn / 2, 80, 80)
    alone = on_scale("brier", half).estimate
    assert (found.low, found.high) == pytest.approx((2 * alone.low, 2 * alone.high))
    # Two errors of 40, both certain: some resamples hold none, and would make it reach from 0 to the end.
    truth = np.eye(3)[np.arange(40) % 3]
    p = np.abs(truth - 1e-6)
    p[:2] = np.roll(p[:2], 1, axis=1)
    p /= p.sum(axis=1, keepdims=True)
    brier = score(truth, p, p > 0.5, task="multiclass", classes=["a", "b", "c"], resamples=500).metrics[
        "brier"
    ]
    assert brier.value == pytest.approx(0.1, abs=1e-4)
    assert 0.005 < brier.low < brier.high < 0.9


def test_gaps_find_the_group_that_is_worse_and_correct_for_the_number_of_comparisons() -> None:
    rng = np.random.default_rng(0)
    n = 1200
    y, site = (rng.random(n) < 0.5).astype(int), rng.choice(["A", "B", "C"], n)
    p = 1 / (1 + np.exp(-(rng.normal(size=n) + np.where(site == "C", 0.2, 3.0) * (y - 0.5))))
    calls = p >= 0.5
    what = {"positive": "pneumonia", "task": "binary", "classes": ["normal", "pneumonia"]}
    found = metrics.subgroup_gaps(
        np.stack([1 - y, y], axis=1), np.stack([1 - p, p], axis=1), np.stack([~calls, calls], axis=1),
        {"site": site, "sex": rng.choice(["F", "M", ""], n), "scanner": ["one"] * n}, **what,
    )  # fmt: skip
    assert set(found) == {"site", "sex"}
    assert list(found["sex"]) == ["F"], "of two groups one comparison says it all; the unknown is no group"
    worse, chance = found["site"]["C"]["auc"], found["sex"]["F"]["auc"]
    here = site == "C"
    assert worse.value == pytest.approx(auc(y[here], p[here]).value - auc(y[~here], p[~here]).value)
    assert worse.high < 0
    assert worse.p_adjusted < 1e-6
    gaps = [gap for groups in found.values() for named in groups.values() for gap in named.values()]
    assert [gap.p_adjusted for gap in gaps] == pytest.approx(
        multipletests([gap.p for gap in gaps], method="holm")[1]
    )
    assert chance.p_adjusted >= chance.p


def test_a_difference_of_proportions_is_newcombes() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n, m = rng.integers(5, 200, 2)
        k, j = rng.integers(0, n + 1), rng.integers(0, m + 1)
        found = difference_of(
            metrics.share_of([True] * k + [False] * (n - k)), metrics.share_of([True] * j + [False] * (m - j))
        )
        low, high = confint_proportions_2indep(k, n, j, m, compare="diff", method="newcomb")
        assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_what_only_reads_numbers_starts_without_scipys_slow_parts() -> None:
    """They are half of the start of steps that take a second."""
    probe = "import sys, components.gate, components.summarise, components.package; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True).stdout
    assert not {"scipy.special", "scipy.sparse", "scipy.stats", "scipy.optimize"} & set(loaded.split())


@given(st.floats(1, 1e6) | st.just(math.inf), st.floats(-40, 40))
def test_tails_and_critical_values_are_those_of_scipys_distributions(
    freedom: float, statistic: float
) -> None:
    assert special.stdtr(freedom, -statistic) == stats.t.sf(statistic, freedom)
    assert special.stdtrit(freedom, 0.975) == stats.t.ppf(0.975, freedom)
    assert special.ndtr(-statistic) == stats.norm.sf(statistic)
