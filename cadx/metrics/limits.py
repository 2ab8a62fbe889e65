"""Limits of resampled metrics, on the scale on which they are nearly normal."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy import special

from cadx.metrics.estimates import Part, average, critical_value, estimate_of

_SCALES = {
    "average_precision": ("logit", special.logit, special.expit),
    "f1": ("logit", special.logit, special.expit),
    "brier": ("logit", special.logit, special.expit),
    "log_loss": ("log", np.log, np.exp),
    "detections": ("logit", special.logit, special.expit),
    "false_positives_per_image": ("log", np.log, np.exp),
}
"""Metric -> the scale's name, the way to it and the way back; "detections" stands for AP, AR and FROC of boxes."""


_DOUBTS = ("too few", "the spread of")
"""How the words begin by which a part's method says that its interval may not hold the truth."""


def mean_of_parts(name: str, parts: Sequence[Part], what: str | None = None) -> Part:
    """`estimates.average`; where a part doubts its own interval, the mean's method says so too."""
    mean = average(name, parts, what)
    methods = [part.estimate.method for part in parts if part.estimate.value is not None]
    doubts = [word for method in methods for word in method.split("; ")[1:] if word.startswith(_DOUBTS)]
    if not doubts or mean.estimate.low is None:
        return mean
    method = f"{mean.estimate.method}; {min(doubts)}"
    return replace(mean, estimate=mean.estimate.model_copy(update={"method": method}))


def on_scale(name: str, part: Part) -> Part:
    """A resampled part with Student's limits around its value: symmetric on the logit, or the log, scale.

    With fifty to a hundred positives the percentiles of the replicates hold the truth in 90 to 94 of 100 sets: they
    are pulled to one side, and know nothing of Student's t. The standard deviation of the replicates on the scale
    does better (`docs/coverage.md`). AP, AR and FROC of boxes lie above the truth in a finite set, and their
    replicates above them by about as much again: their limits are moved down by that. A part comes back as it is
    where it has no interval, where its value or a replicate lies at an end of the scale, and where the metric is
    not one of these.

    Args:
        name: of the metric.
        part: as `estimates.replicated` gives it.

    Source: the logit interval of Boyd, Eng and Page 2013, ECML PKDD, LNAI 8190:451, section 3, with the bootstrap's
    standard error; the bootstrap's estimate of bias, Efron and Tibshirani 1993, section 10.2.
    """
    value, replicates = part.estimate.value, part.replicates
    if name not in _SCALES or value is None or part.estimate.low is None or replicates is None:
        return part
    scale, there, back = _SCALES[name]
    with np.errstate(divide="ignore", invalid="ignore"):
        centre, scaled = there(value), there(replicates[~np.isnan(replicates)])
    if scaled.size < 2 or not (np.isfinite(centre) and np.isfinite(scaled).all()):
        return part
    half = critical_value(part.patients) * scaled.std(ddof=1)
    kind = f"{scale} scale"
    if name == "detections":
        centre, kind = 2 * centre - scaled.mean(), f"{kind}, bias corrected"
    method = part.estimate.method.replace("percentile", kind)
    low, high = back(centre - half), back(centre + half)
    return replace(part, estimate=estimate_of(value, low, high, part.estimate.n, method))
