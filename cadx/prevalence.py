"""How many of those whose images are sent are ill, told from the answers of a calibrated model, without labels.

It holds where the ill and the well still look as they did and only their share has changed, which is called label
shift: a new referral practice, another ward, an epidemic. Where the images themselves have changed, the share that
comes out means nothing.

Under label shift the mean probability is a linear function of that share, and the slope of the likelihood of the share,
at the reference's, is a linear function of the mean probability. So the test is that of the means, which is the locally
most powerful, and the estimate is the mean put right by what the model confuses.

The interval knows that the calibration was fitted on as many images as the reference has. What a fit of a slope and an
intercept on the logit adds is known from its probabilities alone, since the information of a logistic regression holds
no label. With calibrations fitted on 200 images of which 30 % were ill, and 2,000 requests, intervals without it held
the share in 80 to 92 of 100 simulated runs, with it in 93 to 96. Where only 10 of the 200 were ill, they still hold it
in 86 to 93, and say that these are too few.

Source: Saerens, Latinne and Decaestecker 2002, Neural Computation 14:21, for the likelihood; Bella et al. 2010, ICDM,
"Quantification via Probability Estimators", section III, for the estimate ("scaled probability average"); Lipton, Wang
and Smola 2018, ICML, for the assumption; McCullagh and Nelder 1989, "Generalized Linear Models", section 4.4, for the
information.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from cadx.doubts import HOLDS_LESS
from cadx.drift import compare_means
from cadx.metrics.areas import MIN_PER_CLASS
from cadx.metrics.estimates import FloatArray, Z, estimate_of
from cadx.metrics.multiplicity import holm
from cadx.types import Estimate

_LEAST_VARIANCE = 1e-9
_SHARES = 10_001  # tried for the interval: hundredths of a per cent
_NO_LOGIT = 1e-7  # how far from 0 and 1 a probability needs to be to have one: they are rounded to 6 digits


class Prevalence(NamedTuple):
    """The share of one class among the requests.

    Attributes:
        of: the class.
        reference: its share among the reference.
        estimate: its share among the requests, with its 95 % interval; `n` counts requests. None where the model gives
            every image of the reference the same probability.
        p_value: of both shares being one, after Holm's correction over the classes.
        moved: p_value below alpha, and the shares at least the smallest difference apart that matters.
    """

    of: str
    reference: float
    estimate: Estimate
    p_value: float
    moved: bool


def compare_prevalence(
    heldout: pd.DataFrame,
    requests: pd.DataFrame,
    classes: Sequence[str],
    *,
    alpha: float,
    minimum_effect: float,
) -> list[Prevalence]:
    """The share of each class among the requests, and whether it is another than among the reference.

    Args:
        heldout: `prob_<class>` of the reference, calibrated on these very images.
        requests: `prob_<class>`, rounded alike.
        classes: whose shares are asked for.
        alpha: share of windows that may hold a false finding.
        minimum_effect: the smallest difference of shares that matters.
    """
    pairs = [tuple(side[f"prob_{name}"].to_numpy() for side in (heldout, requests)) for name in classes]
    level = alpha / max(len(pairs), 1)
    adjusted = holm([compare_means(*pair, level=level).p_value for pair in pairs])
    found = []
    for name, (before, now), p_value in zip(classes, pairs, adjusted, strict=True):
        reference, estimate = float(before.mean()), estimate_prevalence(before, now)
        moved = (
            estimate.value is not None
            and p_value < alpha
            and abs(estimate.value - reference) >= minimum_effect
        )
        found.append(Prevalence(name, reference, estimate, p_value, moved))
    return found


def estimate_prevalence(reference: np.ndarray, current: np.ndarray) -> Estimate:
    """The share of the ill among those with the M probabilities `current`.

    The interval holds every share under which the mean of `current` would not surprise (a score interval, as Wilson's
    is). Its variance is of both samples, few requests and few images by which to know what the model confuses, and of
    the calibration, which few images fitted: a slope and an intercept on the logit, so that not all of an isotonic
    curve's is counted. The method says so where fewer than 50 images of the reference are ill, or well, by the sum of
    their probabilities.

    Args:
        reference: N probabilities, calibrated on the images that they are of.
        current: M probabilities, of the same calibration.

    >>> estimate_prevalence(np.array([0.0] * 9 + [1.0]), np.array([0.0] * 8 + [1.0] * 2)).value.__round__(6)
    0.2
    """
    mean, square, cube = (float((reference**power).mean()) for power in (1, 2, 3))
    if square - mean**2 < _LEAST_VARIANCE:
        why = "undefined: the model gives all images of the reference the same probability"
        return Estimate(value=None, low=None, high=None, n=len(current), method=why)
    # What an image weighs among the ill is its probability, since that is calibrated: so the moments of both groups.
    ill, well = square / mean, (mean - square) / (1 - mean)
    share = float(np.clip((current.mean() - well) / (ill - well), 0, 1))
    of_ill = (reference**2 - square) / mean - ill * (reference - mean) / mean
    of_well = (reference - reference**2 - mean + square) / (1 - mean) + well * (reference - mean) / (1 - mean)
    shares = np.linspace(0, 1, _SHARES)
    expected = shares * ill + (1 - shares) * well
    squares = shares * cube / mean + (1 - shares) * (square - cube) / (1 - mean)
    known = np.cov(of_ill, of_well, ddof=0) / len(reference)
    variance = (squares - expected**2) / len(current) + (
        shares**2 * known[0, 0] + 2 * shares * (1 - shares) * known[0, 1] + (1 - shares) ** 2 * known[1, 1]
    )
    variance += _variance_of_fit(reference, current, shares, ill=ill, well=well)
    possible = shares[(current.mean() - expected) ** 2 <= Z**2 * variance]
    low, high = (possible[0], possible[-1]) if len(possible) else (share, share)
    method = "scaled probability average; score interval, both samples and the calibration"
    if (fewest := len(reference) * min(mean, 1 - mean)) < MIN_PER_CLASS - 1e-9:
        method += f"; too few ({fewest:.3g} in the rarer class to calibrate on): {HOLDS_LESS}"
    return estimate_of(share, low, high, len(current), method)


def _variance_of_fit(
    reference: FloatArray, current: FloatArray, shares: FloatArray, *, ill: float, well: float
) -> FloatArray:
    """What the calibration's noise adds to the variance of the mean of `current` less what each share lets expect.

    By the delta method. It is independent of that of the reference's moments: given the images, labels have no say in
    these, and the fit's error is one of labels. `ill` and `well` are the mean probabilities of both groups.
    """
    logit_terms, steepness = _by_intercept_and_slope(reference)
    mean = float(reference.mean())
    of_ill = (steepness * (2 * reference - ill)).mean(axis=1) / mean
    of_well = (steepness * (1 + well - 2 * reference)).mean(axis=1) / (1 - mean)
    of_current = _by_intercept_and_slope(current)[1].mean(axis=1)
    gradient = of_current[:, None] - np.outer(of_ill, shares) - np.outer(of_well, 1 - shares)
    # A normal prior of standard deviation 1: where the reference's probabilities are all but 0 and 1, they say nothing
    # of intercept and slope, and a few requests in between would make the interval as wide as one likes.
    information = steepness @ logit_terms.T + np.eye(2)
    variance: FloatArray = (gradient * np.linalg.solve(information, gradient)).sum(axis=0)
    return variance


def _by_intercept_and_slope(probabilities: FloatArray) -> tuple[FloatArray, FloatArray]:
    """2 N: what an intercept and a slope multiply to make the logits; and how fast probabilities rise with either."""
    p = np.clip(probabilities, _NO_LOGIT, 1 - _NO_LOGIT)
    terms = np.stack([np.ones(len(p)), np.log(p / (1 - p))])
    return terms, p * (1 - p) * terms
