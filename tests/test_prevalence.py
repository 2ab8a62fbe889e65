"""Shares of the ill without labels: equal to the likelihood's where it can be worked out, and intervals that hold."""

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import optimize, stats
from statsmodels.stats.proportion import proportion_confint

from cadx.doubts import doubts_of
from cadx.prevalence import compare_prevalence, estimate_prevalence

FEW = {"alpha": 0.01, "minimum_effect": 0.03}


def calibrated(
    rng: np.random.Generator, number: int, ill: float, *, known: float, apart: float
) -> np.ndarray:
    """Probabilities of a binormal model, exact where a share `known` is ill, of images of which a share `ill` is."""
    score = rng.normal(apart * (rng.random(number) < ill), 1)
    odds = known / (1 - known) * np.exp(apart * score - apart**2 / 2)
    return np.round(odds / (1 + odds), 6)


@pytest.mark.parametrize("ill", [0.02, 0.15, 0.5])
def test_the_share_is_that_of_the_likelihood(ill: float) -> None:
    """Of so many images that both, which weigh doubtful images otherwise, come to the truth."""
    rng = np.random.default_rng(1)
    before, now = (calibrated(rng, 60_000, share, known=0.05, apart=2) for share in (0.05, ill))

    def slope(share: float) -> float:
        relative = now / 0.05 - (1 - now) / 0.95
        return float((relative / (1 + (share - 0.05) * relative)).sum())

    likeliest = optimize.brentq(slope, 1e-6, 1 - 1e-6)
    found = estimate_prevalence(before, now)
    assert found.value == pytest.approx(likeliest, abs=0.01)
    assert found.value == pytest.approx(ill, abs=0.01)


def test_of_a_model_without_doubt_the_interval_is_wilsons() -> None:
    before, now = np.repeat([0.0, 1.0], [270, 30]), np.repeat([0.0, 1.0], [171, 29])
    found = estimate_prevalence(before, now)
    low, high = proportion_confint(29, 200, method="wilson")
    assert (found.value, found.low, found.high) == pytest.approx((29 / 200, low, high), abs=1e-4)


@pytest.mark.parametrize("apart", [0.7, 3.5])
@pytest.mark.parametrize(("number", "ill"), [(200, 0.15), (200, 0.0), (40, 0.1)])
def test_intervals_hold_the_share_of_weak_models_and_of_strong_ones(
    apart: float, number: int, ill: float
) -> None:
    rng = np.random.default_rng(2)
    runs, held = 400, 0
    for _ in range(runs):
        before, now = (
            calibrated(rng, n, share, known=0.05, apart=apart) for n, share in ((1000, 0.05), (number, ill))
        )
        found = estimate_prevalence(before, now)
        assert 0 <= found.low <= found.value <= found.high <= 1
        held += found.low - 1e-4 <= ill <= found.high + 1e-4
    assert held >= stats.binom.ppf(0.001, runs, 0.93)


@pytest.mark.parametrize("apart", [2, 3])
def test_intervals_know_that_few_images_fitted_the_calibration(apart: float) -> None:
    """A logistic regression on 200 images, of which 30 % are ill; without its noise 86 and 83 of 100 held the share."""
    rng = np.random.default_rng(3)
    runs, held = 400, 0
    for _ in range(runs):
        ill = rng.random(200) < 0.3
        scores = sm.add_constant(rng.normal(apart * ill, 1))
        now = sm.add_constant(rng.normal(apart * (rng.random(2000) < 0.5), 1))
        fit = sm.Logit(ill, scores).fit(disp=0)
        found = estimate_prevalence(np.round(fit.predict(scores), 6), np.round(fit.predict(now), 6))
        held += found.low <= 0.5 <= found.high
    assert stats.binom.ppf(0.001, runs, 0.93) <= held <= stats.binom.ppf(0.999, runs, 0.97)


@pytest.mark.parametrize(("few", "doubted"), [(49, True), (50, False)])
def test_an_interval_says_that_few_ill_or_few_well_fitted_the_calibration(few: int, doubted: bool) -> None:
    ill = np.tile([0.5, 1.5], 500) * few / 1000
    for before in (ill, 1 - ill):
        found = estimate_prevalence(before, before)
        assert bool(doubts_of(found.method)) == doubted, found.method


def test_a_model_that_tells_nothing_has_no_share_and_raises_no_alarm() -> None:
    constant = pd.DataFrame({"prob_sick": np.full(100, 0.3)})
    (found,) = compare_prevalence(constant, constant + 0.4, ["sick"], **FEW)
    assert found.estimate.value is None
    assert found.estimate.method.startswith("undefined")
    assert not found.moved


def answers(seed: int, number: int, ill: float) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    return pd.DataFrame(
        {
            f"prob_{name}": calibrated(rng, number, share, known=0.05, apart=3.5)
            for name, share in (("sick", ill), ("other", 0.05))
        }
    )


def test_more_and_fewer_of_the_ill_are_found_and_named() -> None:
    usual = answers(3, 1000, 0.05)
    sick, other = compare_prevalence(usual, answers(4, 200, 0.15), ["sick", "other"], **FEW)
    assert (sick.of, sick.moved) == ("sick", True)
    assert (other.of, other.moved) == ("other", False)
    assert sick.reference == pytest.approx(usual["prob_sick"].mean())
    assert sick.estimate.low < 0.15 < sick.estimate.high
    assert sick.estimate.n == 200
    (fewer,) = compare_prevalence(answers(5, 1000, 0.2), answers(6, 200, 0.02), ["sick"], **FEW)
    assert fewer.moved
    (small,) = compare_prevalence(usual, answers(4, 200, 0.15), ["sick"], alpha=0.01, minimum_effect=0.5)
    assert not small.moved


def test_where_nothing_has_changed_it_alarms_as_rarely_as_declared() -> None:
    runs, alpha = 150, 0.1
    alarms = sum(
        compare_prevalence(
            answers(1000 + 2 * run, 500, 0.05),
            answers(1001 + 2 * run, 150, 0.05),
            ["sick", "other"],
            alpha=alpha,
            minimum_effect=0.0,
        )[0].moved
        for run in range(runs)
    )
    assert 0 < alarms <= stats.binom.ppf(0.999, runs, alpha)


def test_a_few_uncertain_requests_do_not_widen_the_interval_of_a_model_that_separates():
    """Images of calibration that are all but 0 and 1 say nothing of a fit's noise, which then is not without bounds."""
    reference = np.repeat([0.0, 1.0], [140, 60])
    current = np.repeat([0.0, 1.0, 0.5], [1400, 595, 5])
    told = estimate_prevalence(reference, current)
    assert told.high - told.low < 0.05
