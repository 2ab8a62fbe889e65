"""What many tests at once find by chance, kept down."""

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float], weights: Sequence[float] | None = None) -> list[float]:
    """Adjusted p-values: rejecting those below alpha makes a false rejection in at most a share alpha of trials.

    That holds under any dependence between the tests. A correction of the false discovery rate (Benjamini and
    Hochberg) bounds the share of false ones among those found; but one false finding is a false alarm already.

    Args:
        p_values: of the tests.
        weights: what a test should be able to afford of alpha, positive, in shares of their sum; None = all the same.

    Source: Holm 1979, Scand J Stat 6:65, which has the weights too.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    p = np.asarray(p_values, np.float64)
    share = np.ones(p.size) if weights is None else np.asarray(weights, np.float64)
    order = np.argsort(p / share, kind="stable")
    # The share of those not yet rejected, from the largest backwards.
    remaining = np.cumsum(share[order][::-1])[::-1]
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] / share[order] * remaining), 1)
    return [float(value) for value in adjusted]
