"""Intervals: how fast a clustered bootstrap of all metrics is, and how often the limits over seeds hold."""

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks._claim import claim
from cadx.metrics import score

RESAMPLES = 1000
_CASES, _PATIENTS = 100_000, 40_000
_PEER_RESAMPLES = 5
_SECONDS = 5.0
_SETS, _POSITIVES, _SEEDS, _SENSITIVITY = 1000, 60, 3, 0.95


def claims() -> Iterator[dict[str, Any]]:
    """Speed against a loop over scikit-learn's metrics; coverage against percentiles."""
    yield from _speed()
    yield _coverage()


def _speed() -> Iterator[dict[str, Any]]:
    """All classification metrics of 100,000 cases of 40,000 patients with 1,000 resamples, in processor time.

    The peer draws the same number of patients and calls scikit-learn once per metric and resample. It is
    timed over 5 resamples and its time multiplied by 200; every resample costs it the same. It leaves out
    what scikit-learn does not have (calibration slope, intercept and error) and the second class.
    """
    rng = np.random.default_rng(0)
    y = (rng.random(_CASES) < 0.2).astype(np.int64)
    p = 1 / (1 + np.exp(-(rng.normal(0, 1.2, _CASES) + 2 * y - 2)))
    patients = rng.integers(0, _PATIENTS, _CASES)
    calls = p >= 0.3

    start = time.process_time()
    score(
        np.stack([1 - y, y], axis=1),
        np.stack([1 - p, p], axis=1),
        np.stack([~calls, calls], axis=1),
        task="binary",
        classes=["normal", "pneumonia"],
        positive="pneumonia",
        patients=patients,
        resamples=RESAMPLES,
    )
    ours = time.process_time() - start

    order = np.argsort(patients, kind="stable")
    bounds = np.searchsorted(patients[order], np.arange(_PATIENTS + 1))
    rows = [order[bounds[i] : bounds[i + 1]] for i in range(_PATIENTS)]
    _scikit_learn(y[:100], p[:100], calls[:100])  # its import is not its speed
    start = time.process_time()
    for _ in range(_PEER_RESAMPLES):
        drawn = np.concatenate([rows[i] for i in rng.integers(0, _PATIENTS, _PATIENTS)])
        _scikit_learn(y[drawn], p[drawn], calls[drawn])
    peer = (time.process_time() - start) * RESAMPLES / _PEER_RESAMPLES
    unit = (
        f"processor s (peer: scikit-learn in a loop, {_PEER_RESAMPLES} of {RESAMPLES} resamples extrapolated)"
    )
    yield claim("statistics.clustered_bootstrap", ours, peer, unit, ratio=peer / ours, goal=20.0)
    unit = f"processor s for {_CASES:,} cases (peer: the limit)"
    yield claim("statistics.clustered_bootstrap_limit", ours, _SECONDS, unit, ratio=_SECONDS / ours)


def _scikit_learn(y: NDArray[Any], p: NDArray[Any], calls: NDArray[Any]) -> None:
    from sklearn import metrics

    metrics.roc_auc_score(y, p)
    metrics.average_precision_score(y, p)
    metrics.brier_score_loss(y, p)
    metrics.log_loss(y, p)
    metrics.accuracy_score(y, p >= 0.5)
    metrics.accuracy_score(y, calls)
    metrics.balanced_accuracy_score(y, calls)
    metrics.f1_score(y, calls)
    for positive in (0, 1):
        metrics.recall_score(y, calls, pos_label=positive)
        metrics.precision_score(y, calls, pos_label=positive)


def _coverage() -> dict[str, Any]:
    """How far the coverage of a mean sensitivity over 3 seeds is from .95, in 1,000 simulated test sets.

    60 positives, sensitivity .95, correlation .6 between the seeds on the same image. The peer is the
    percentile interval of 1,000 resamples of the cases, applied to all seeds.
    """
    rng = np.random.default_rng(0)
    cut = 1.6448536269514722  # the normal quantile of .95
    y = np.concatenate([np.ones(_POSITIVES), np.zeros(2)])
    labels = np.stack([1 - y, y], axis=1)
    held = {"ours": 0, "peer": 0}
    for _ in range(_SETS):
        shared = rng.normal(size=y.size)
        latent = np.sqrt(0.6) * shared + np.sqrt(0.4) * rng.normal(size=(_SEEDS, y.size))
        calls = latent < cut
        found = score(
            labels,
            np.stack([~calls, calls], axis=2).astype(np.float64),
            np.stack([~calls, calls], axis=2),
            task="binary",
            classes=["negative", "positive"],
            positive="positive",
            resamples=0,
        ).metrics["sensitivity"]
        assert found.low is not None
        assert found.high is not None
        held["ours"] += found.low <= _SENSITIVITY <= found.high
        drawn = rng.multinomial(_POSITIVES, np.full(_POSITIVES, 1 / _POSITIVES), size=RESAMPLES)
        low, high = np.percentile(drawn @ calls[:, :_POSITIVES].mean(axis=0) / _POSITIVES, [2.5, 97.5])
        held["peer"] += bool(low <= _SENSITIVITY <= high)
    ours, peer = (abs(held[arm] / _SETS - 0.95) for arm in ("ours", "peer"))
    ratio = peer / max(ours, 1 / _SETS)
    unit = "distance of the coverage from .95 (peer: percentile bootstrap)"
    return claim("statistics.coverage_over_seeds", ours, peer, unit, ratio=ratio, goal=1.5)
