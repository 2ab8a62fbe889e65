"""Limits of resampled metrics, on the scale on which they are nearly normal."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import special

from cadx.metrics.estimates import Part, critical_value, estimate_of


def _logit(value: float, error: float, sign: int) -> float:
    return float(special.expit(special.logit(value) + sign * error / (value * (1 - value))))


def _log(value: float, error: float, sign: int) -> float:
    return value * math.exp(sign * error / value)


_SCALES: dict[str, tuple[str, Callable[[float, float, int], float]]] = {
    "average_precision": ("logit", _logit),
    "f1": ("logit", _logit),
    "brier": ("logit", _logit),
    "log_loss": ("log", _log),
}


def on_scale(name: str, part: Part) -> Part:
    """A resampled part with Student's limits around its value: symmetric on the logit, or the log, scale.

    With fifty to a hundred positives the percentiles of the replicates hold the truth in 90 to 94 of 100 sets: they are
    pulled to one side, and know nothing of Student's t. The standard deviation of the replicates, carried to the scale
    by the delta method, does better (`docs/coverage.md`). A part comes back as it is where it has no interval, where
    its value lies beyond the scale, and where the metric is not one of these.

    Args:
        name: of the metric.
        part: as `estimates.replicated` gives it.

    Source: the logit interval of Boyd, Eng and Page 2013, ECML PKDD, LNAI 8190:451, section 3, with the bootstrap's
    standard error.
    """
    value, replicates = part.estimate.value, part.replicates
    if name not in _SCALES or value is None or part.estimate.low is None or replicates is None:
        return part
    defined = replicates[~np.isnan(replicates)]
    scale, limit = _SCALES[name]
    if defined.size < 2 or value <= 0 or (scale == "logit" and value >= 1):
        return part
    error = critical_value(part.patients) * float(defined.std(ddof=1))
    method = part.estimate.method.replace("percentile", f"{scale} scale")
    low, high = limit(value, error, -1), limit(value, error, 1)
    return replace(part, estimate=estimate_of(value, low, high, part.estimate.n, method))
