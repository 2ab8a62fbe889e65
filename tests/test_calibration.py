"""Temperature and operating point, against scipy's minimiser and the definition tried on every threshold."""

import math

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import optimize, special, stats
from sklearn.metrics import log_loss

from cadx import calibration
from cadx.calibration import (
    MAX_TEMPERATURE,
    MIN_TEMPERATURE,
    apply,
    fit_temperature,
    fit_temperature_and_bias,
    operating_threshold,
)


def draw(seed: int, task: str) -> tuple[np.ndarray, np.ndarray]:
    """Logits N K that are overconfident by a known factor, and labels drawn from the true probabilities."""
    rng = np.random.default_rng(seed)
    k = 2 if task == "binary" else 4
    logits = rng.normal(0, 2, (300, k))
    p = apply(logits, 1.0, task)
    if task == "multilabel":
        labels = (rng.random(p.shape) < p).astype(float)
    else:
        labels = np.eye(k)[(p.cumsum(axis=1) < rng.random((300, 1))).sum(axis=1)]
    return logits * rng.uniform(0.5, 4), labels


def likelihood_loss(temperature: float, logits: np.ndarray, labels: np.ndarray, task: str) -> float:
    """The mean negative log-likelihood, written out."""
    z = logits / temperature
    if task == "multilabel":
        return float(np.nanmean(np.logaddexp(0, np.where(labels == 1, -z, z)) + 0 * labels))
    known = ~np.isnan(labels).any(axis=1)
    return float((special.logsumexp(z, axis=1) - (z * np.nan_to_num(labels)).sum(axis=1))[known].mean())


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_temperature_minimises_the_negative_log_likelihood(task: str) -> None:
    for seed in range(70):
        logits, labels = draw(seed, task)
        found = fit_temperature(logits, labels, task)
        best = optimize.minimize_scalar(
            likelihood_loss,
            bounds=(MIN_TEMPERATURE, MAX_TEMPERATURE),
            args=(logits, labels, task),
            method="bounded",
            options={"xatol": 1e-10},
        )
        assert found == pytest.approx(best.x, rel=1e-4)
        assert likelihood_loss(found, logits, labels, task) <= best.fun + 1e-15
        assert found == fit_temperature(logits, labels, task)


@pytest.mark.parametrize("seed", range(20))
def test_two_classes_are_platt_scaling(seed: int) -> None:
    logits, labels = draw(seed, "binary")
    temperature, bias = fit_temperature_and_bias(logits, labels, "binary")
    difference = logits[:, 1] - logits[:, 0]
    reference = sm.Logit(labels[:, 1], sm.add_constant(difference)).fit(disp=0).params
    if not 1 / MAX_TEMPERATURE < reference[1] < 1 / MIN_TEMPERATURE:
        return  # the bounds speak
    assert [bias[1] - bias[0], 1 / temperature] == pytest.approx(reference, abs=1e-4)
    assert bias.sum() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_bias_undoes_the_shift_of_a_balanced_sampler(task: str) -> None:
    """Each class's mean probability becomes its share, which no temperature achieves."""
    logits, labels = draw(1, task)
    shifted = logits + np.linspace(0, 3, logits.shape[1]) * (1 if task != "multilabel" else -1)
    temperature, bias = fit_temperature_and_bias(shifted, labels, task)
    probabilities = apply(shifted, temperature, task, bias)
    assert probabilities.mean(axis=0) == pytest.approx(labels.mean(axis=0), abs=1e-5)
    without = apply(shifted, fit_temperature(shifted, labels, task), task)
    assert np.abs(without.mean(axis=0) - labels.mean(axis=0)).max() > 0.02


def test_bias_leaves_unlabelled_cells_out() -> None:
    logits, labels = draw(2, "multilabel")
    masked = labels.copy()
    masked[::3, 0] = np.nan
    twice = np.concatenate([logits, logits]), np.concatenate([masked, np.full_like(masked, np.nan)])
    once = fit_temperature_and_bias(logits, masked, "multilabel")
    again = fit_temperature_and_bias(*twice, "multilabel")
    assert again[0] == pytest.approx(once[0], rel=1e-4)
    assert again[1] == pytest.approx(once[1], abs=1e-4)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_temperature_undoes_overconfidence(task: str) -> None:
    logits, labels = draw(0, task)
    once = fit_temperature(logits, labels, task)
    assert fit_temperature(logits * 3, labels, task) == pytest.approx(3 * once)
    if task == "multiclass":
        truth = labels.argmax(axis=1)
        assert log_loss(truth, apply(logits, once, task)) < log_loss(truth, apply(logits, 1.0, task))


def test_temperature_leaves_unlabelled_cases_and_cells_out() -> None:
    logits, labels = draw(1, "multilabel")
    labels[np.random.default_rng(0).random(labels.shape) < 0.3] = np.nan
    known = ~np.isnan(labels)
    expected = fit_temperature(logits[known][:, None], labels[known][:, None], "multilabel")
    assert fit_temperature(logits, labels, "multilabel") == pytest.approx(expected)
    logits, labels = draw(2, "multiclass")
    labels[200:] = np.nan
    assert fit_temperature(logits, labels, "multiclass") == fit_temperature(
        logits[:200], labels[:200], "multiclass"
    )


@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_temperature_stays_within_its_bounds_when_logits_say_all_or_nothing(task: str) -> None:
    labels = np.eye(2)[[0, 1, 0, 1]]
    separated = (labels - 0.5) * 100
    assert fit_temperature(separated, labels, task) == MIN_TEMPERATURE
    assert fit_temperature(-separated, labels, task) == MAX_TEMPERATURE
    assert MIN_TEMPERATURE <= fit_temperature(np.zeros((4, 2)), labels, task) <= MAX_TEMPERATURE
    assert np.isfinite(apply(separated * 1e3, MIN_TEMPERATURE, task)).all()


def test_probabilities_are_float64_and_keep_the_ranking() -> None:
    logits, _ = draw(3, "multiclass")
    p = apply(logits.astype(np.float32), 2.5, "multiclass")
    assert p.dtype == np.float64
    np.testing.assert_allclose(p.sum(axis=1), 1)
    assert (p.argmax(axis=1) == logits.astype(np.float32).argmax(axis=1)).all()
    with pytest.raises(ValueError, match="temperature 0: must be above 0"):
        apply(logits, 0, "binary")


def test_threshold_is_the_largest_that_reaches_the_sensitivity() -> None:
    for seed in range(400):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 60))
        y = rng.integers(0, 2, n)
        y[0] = 1
        p = rng.random(n).round(1 if seed % 2 else 8)
        target = float(rng.choice([0.5, 0.7, 0.8, 0.9, 0.95, 1.0]))
        threshold = operating_threshold(p, y, sensitivity=target)

        def sensitivity(at: float, p: np.ndarray = p, y: np.ndarray = y) -> float:
            return float((p[y == 1] >= at).mean())

        reaching = max(at for at in p if sensitivity(at) >= target - 1e-12)
        assert sensitivity(threshold) == sensitivity(reaching) >= target - 1e-12
        # Midway between two scores that occur: the same calls, and none at the edge.
        assert ((p >= threshold) == (p >= reaching)).all()
        below = p[p < reaching]
        assert threshold == pytest.approx((reaching + (below.max() if below.size else 0)) / 2)


def test_decisions_at_the_threshold_survive_the_last_digits() -> None:
    rng = np.random.default_rng(0)
    p, y = rng.random(200), rng.integers(0, 2, 200)
    threshold = operating_threshold(p, y, sensitivity=0.95)
    as_served = p.astype(np.float32).astype(np.float64)
    assert ((as_served >= threshold) == (p >= threshold)).all()
    assert (p != threshold).all()


def test_threshold_counts_a_target_that_float_overshoots() -> None:
    # 0.07 * 100 is 7.000000000000001: seven positives of a hundred are .07 all the same.
    p = np.arange(1, 101) / 101
    assert math.ceil(0.07 * 100) == 8
    assert (p >= operating_threshold(p, np.ones(100), sensitivity=0.07)).sum() == 7


def test_threshold_between_neighbouring_floats_keeps_the_lower_one_out() -> None:
    low = 0.5
    high = np.nextafter(low, 1)
    threshold = operating_threshold([low, high], [0, 1], sensitivity=1.0)
    assert low < threshold <= high


def test_threshold_of_rare_constant_and_unlabelled_scores() -> None:
    p = np.r_[np.linspace(0, 0.2, 1000), 0.9]
    y = np.r_[np.zeros(1000), 1]
    assert operating_threshold(p, y) == pytest.approx(0.55)
    assert operating_threshold(np.full(4, 0.5), [0, 1, 0, 1]) == 0.25
    assert operating_threshold(np.zeros(4), [0, 1, 0, 1]) == 0
    assert operating_threshold([0.1, 0.8, 0.3], [0, 1, np.nan]) == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("scores", "labels", "sensitivity", "message"),
    [
        ([0.1, 0.2], [0, 0], 0.95, "no positive"),
        ([], [], 0.95, "no positive"),
        ([0.1, 0.2], [0, 1], 0.0, "sensitivity 0.0"),
        ([0.1, 0.2], [0, 1], 1.5, "sensitivity 1.5"),
        ([0.1, 3.0], [0, 1], 0.95, "not within 0..1"),
        ([0.1, np.nan], [0, 1], 0.95, "not within 0..1"),
        ([0.1, 0.2], [0, 2], 0.95, "neither 0 nor 1"),
        ([0.1], [0, 1], 0.95, "scores: shape"),
    ],
)
def test_threshold_refuses_what_it_cannot_use(
    scores: list[float], labels: list[float], sensitivity: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        operating_threshold(scores, labels, sensitivity=sensitivity)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros((3, 2)), np.zeros((4, 2)), "logits: shape"),
        (np.full((2, 2), np.inf), np.eye(2), "row 0 is not finite"),
        (np.zeros((2, 2)), np.full((2, 2), np.nan), "no labelled case"),
        (np.zeros((0, 2)), np.zeros((0, 2)), "no labelled case"),
    ],
)
def test_temperature_refuses_what_it_cannot_use(logits: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_temperature(logits, labels, "binary")


# --- Isotonic curves, other prevalences, the threshold's spread ------------------------------------------


def test_isotonic_is_the_pooled_adjacent_violators_of_a_slow_textbook() -> None:
    for seed in range(200):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(3, 40))
        p, y = np.sort(rng.random(n)), (rng.random(n) < 0.5).astype(float)
        blocks = [[value, 1] for value in y]
        for end in (0, -1):
            blocks[end] = [(y[end] + 1) / 3, 3]  # with the two cases that are added there
        i = 0
        while i < len(blocks) - 1:
            if blocks[i][0] > blocks[i + 1][0] + 1e-12:
                (a, m), (b, k) = blocks[i], blocks[i + 1]
                blocks[i : i + 2] = [[(a * m + b * k) / (m + k), m + k]]
                i = max(i - 1, 0)
            else:
                i += 1
        expected = np.repeat([b[0] for b in blocks], [b[1] for b in blocks])[2:-2]
        labels, both = np.stack([1 - y, y], axis=1), np.stack([1 - p, p], axis=1)
        knots = calibration.fit_isotonic(both, labels, "binary", ("well", "ill"), "ill")
        found = calibration.apply_isotonic(both, knots, "binary", ("well", "ill"))
        np.testing.assert_allclose(found[:, 1], expected, atol=1e-9)
        np.testing.assert_allclose(found.sum(axis=1), 1)


def test_an_end_of_an_isotonic_curve_is_as_sure_as_its_own_cases_allow() -> None:
    classes = ("well", "ill")

    def fitted(y: np.ndarray) -> tuple[float, ...]:
        p = np.linspace(0, 1, y.size)
        pair = np.stack([1 - p, p], axis=1), np.stack([1 - y, y], axis=1)
        return calibration.fit_isotonic(*pair, "binary", classes, "ill")["ill"].calibrated

    two_ill = fitted(np.r_[np.zeros(498), np.ones(2)])
    assert two_ill[0] == pytest.approx(1 / 500)
    assert two_ill[-1] == pytest.approx(3 / 4), "2 of 2, not 500 of 500"
    # One well case below 400 of which few are ill does not bend what these show.
    rising = fitted(np.r_[0, np.tile([1, *np.zeros(99)], 4), np.ones(9)])
    assert rising[0] == pytest.approx((4 + 1) / (401 + 2))
    assert list(rising) == sorted(rising)


def test_an_isotonic_curve_is_seldom_sure_of_what_is_false() -> None:
    rng, said, came_true = np.random.default_rng(3), [], []
    for _ in range(40):
        p = special.expit(rng.normal(-1.5, 1.3, 5500))
        both, ill = np.stack([1 - p, p], axis=1), rng.random(p.size) < p
        labels = np.stack([~ill, ill], axis=1).astype(float)
        knots = calibration.fit_isotonic(both[:500], labels[:500], "binary", ("well", "ill"), "ill")
        after = calibration.apply_isotonic(both[500:], knots, "binary", ("well", "ill"))[:, 1]
        low = after <= after.min() + 1e-12
        said.append(after[low].sum())
        came_true.append(ill[500:][low].sum())
    assert sum(came_true) < 2 * sum(said)


@pytest.mark.parametrize("task", ["binary", "multiclass", "multilabel"])
def test_isotonic_mends_what_a_temperature_cannot(task: str) -> None:
    rng = np.random.default_rng(3)
    classes = ("a", "b") if task == "binary" else ("a", "b", "c")
    true = rng.dirichlet(np.ones(len(classes)), 4000)
    if task == "multilabel":
        y = (rng.random(true.shape) < true).astype(float)
    else:
        y = np.eye(len(classes))[[rng.choice(len(classes), p=row) for row in true]]
    bent = true**3 if task == "multilabel" else true**3 / (true**3).sum(axis=1, keepdims=True)
    knots = calibration.fit_isotonic(bent[:2000], y[:2000], task, classes, "b" if task == "binary" else None)
    after = calibration.apply_isotonic(bent[2000:], knots, task, classes)
    assert np.square(after - true[2000:]).mean() < 0.3 * np.square(bent[2000:] - true[2000:]).mean()
    if task != "multilabel":
        np.testing.assert_allclose(after.sum(axis=1), 1)


def test_another_prevalence_gives_the_probabilities_of_a_population_drawn_with_it() -> None:
    rng = np.random.default_rng(4)
    before, after = {"a": 0.6, "b": 0.3, "c": 0.1}, {"a": 0.2, "b": 0.2, "c": 0.6}
    x, centres = rng.normal(0, 2, 50), np.array([-1.0, 0.0, 1.5])
    density = stats.norm.pdf(x[:, None] - centres)
    old, new = (density * np.array(list(shares.values())) for shares in (before, after))
    old, new = (p / p.sum(axis=1, keepdims=True) for p in (old, new))
    np.testing.assert_allclose(calibration.at_prevalence(old, before, after, "multiclass", "abc"), new)
    alone = calibration.at_prevalence(old, before, {"b": 0.2}, "multilabel", "abc")
    np.testing.assert_array_equal(alone[:, [0, 2]], old[:, [0, 2]])
    odds = old[:, 1] / (1 - old[:, 1]) * (0.2 / 0.8) / (0.3 / 0.7)
    np.testing.assert_allclose(alone[:, 1], odds / (1 + odds))
    for shares, message in (({"d": 0.1}, "no class 'd'"), ({"a": 1.0}, "must lie between 0 and 1")):
        with pytest.raises(ValueError, match=message):
            calibration.at_prevalence(old, before, shares, "multilabel", "abc")


def test_resampled_thresholds_spread_as_those_of_new_samples() -> None:
    rng = np.random.default_rng(5)

    def sample() -> tuple[np.ndarray, np.ndarray]:
        y = (rng.random(300) < 0.4).astype(float)
        return 1 / (1 + np.exp(-(rng.normal(size=300) + 2 * y))), y

    new = [calibration.operating_threshold(*sample(), sensitivity=0.9) for _ in range(300)]
    again = [
        calibration.resampled_thresholds(*sample(), sensitivity=0.9, resamples=60).std() for _ in range(20)
    ]
    assert np.mean(again) == pytest.approx(np.std(new), rel=0.3)
    p, y = sample()
    whole = calibration.resampled_thresholds(p, y, np.zeros(300), resamples=5)
    np.testing.assert_allclose(whole, calibration.operating_threshold(p, y))
