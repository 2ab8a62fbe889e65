"""What an image looks like in nine numbers, and how far the answered images have moved from a reference.

Drift is asked of each quantity by itself, by a two-sample test, over all requests and at each site and scanner.
What so many tests find by chance is kept down together, by Holm's correction.

Source: Rabanser, Günnemann and Lipton 2019, NeurIPS, "Failing Loudly", sections 3.1 and 3.2: univariate
Kolmogorov-Smirnov tests of a classifier's scores, and the maximum mean discrepancy of its embeddings, find most
shifts that larger machinery finds. We add the image statistics, which say what has changed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
from numpy.typing import NDArray

from cadx.metrics.multiplicity import holm

STATISTICS = (
    "mean",
    "std",
    "p01",
    "p50",
    "p99",
    "entropy_bits",
    "sharpness",
    "dark_fraction",
    "bright_fraction",
)
"""Names of the statistics, in the order in which tables hold them."""

REFERENCE_ROWS = 1000
"""Reference embeddings that are used at most: memory and time grow with their square."""

_DARK, _BRIGHT = 0.02, 0.98
_MIN_PERMUTATIONS = 999
_ENOUGH_EXCEEDING = 20
_AT_ONCE = 100

FloatArray = NDArray[np.float64]


def image_statistics(pixels: np.ndarray) -> dict[str, float]:
    """The numbers named in `STATISTICS` for H W or H W 3 pixels, uint8 or uint16; never NaN.

    Intensities are in 0..1 of the dtype's range, colour channels pooled. `p01`, `p50`, `p99` are quantiles;
    `entropy_bits` is that of the intensities in 256 bins; `sharpness` the mean absolute difference of
    neighbouring pixels over the standard deviation (0 for a constant image); `dark_fraction` and
    `bright_fraction` count pixels within 2 % of black and white.

    >>> flat = image_statistics(np.full((4, 4), 255, np.uint8))
    >>> flat["mean"], flat["entropy_bits"], flat["bright_fraction"]
    (1.0, 0.0, 1.0)
    """
    assert pixels.dtype in (np.uint8, np.uint16), f"not raw pixels: {pixels.dtype}"
    assert pixels.size, "an image without pixels"
    top = int(np.iinfo(pixels.dtype).max)
    counts = _histogram(pixels)
    share = counts / pixels.size
    levels = np.arange(top + 1) / top
    mean = _weighted_sum(share, levels)
    std = float(np.sqrt(_weighted_sum(share, (levels - mean) ** 2)))
    ranks = np.searchsorted(np.cumsum(counts), np.multiply((0.01, 0.5, 0.99), pixels.size))
    bins = share.reshape(256, -1).sum(axis=1)
    occupied = bins[bins > 0]
    numbers = (
        mean,
        std,
        *levels[ranks],
        # + 0.0: the entropy of one level is 0, not -0.
        -(occupied @ np.log2(occupied)) + 0.0,
        _neighbour_difference(pixels) / top / std if std > 0 else 0.0,
        share[levels <= _DARK].sum(),
        share[levels >= _BRIGHT].sum(),
    )
    return {name: float(number) for name, number in zip(STATISTICS, numbers, strict=True)}


def _weighted_sum(weights: np.ndarray, numbers: np.ndarray) -> float:
    """Inner product in parts of 256: of longer ones the number of BLAS's threads decides the last bit."""
    return float(sum(a @ b for a, b in zip(weights.reshape(-1, 256), numbers.reshape(-1, 256), strict=True)))


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Pixels per level; of 8-bit pixels two are counted at a time, which halves the work."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    if pixels.dtype == np.uint16:
        return np.bincount(flat, minlength=1 << 16)
    even = flat.size - flat.size % 2
    pairs = np.bincount(flat[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: np.ndarray = pairs.sum(axis=0) + pairs.sum(axis=1)
    counts[flat[even:]] += 1
    return counts


def _neighbour_difference(pixels: np.ndarray) -> float:
    """Mean absolute difference of pixels that touch, along rows and columns, in levels."""
    total, number = 0, 0
    for one, other in ((pixels[1:], pixels[:-1]), (pixels[:, 1:], pixels[:, :-1])):
        # Maximum minus minimum stays in the unsigned dtype, where a plain difference wraps round.
        total += int((np.maximum(one, other) - np.minimum(one, other)).sum(dtype=np.uint64))
        number += one.size
    return total / number if number else 0.0


class Difference(NamedTuple):
    """How one quantity differs between a reference and what came later.

    `p_value` tests that both come from one distribution, their rows being independent. `effect` is the
    distance between the two samples, from 0 (alike) to 1 (nothing in common), whatever their sizes.
    """

    p_value: float
    effect: float


def compare_numbers(reference: np.ndarray, current: np.ndarray) -> Difference:
    """Two-sample Kolmogorov-Smirnov test of N and M finite numbers.

    The effect is its statistic, the largest difference between the two cumulative distributions: 0.1 is a
    normal distribution moved by a quarter of its standard deviation. Equal values only make p larger.

    >>> compare_numbers(np.zeros(20), np.zeros(30))
    Difference(p_value=1.0, effect=0.0)
    >>> compare_numbers(np.arange(100), np.arange(100) + 50).effect
    0.5
    """
    result = scipy.stats.ks_2samp(reference, current)
    return Difference(float(result.pvalue), float(result.statistic))


def compare_shares(reference: np.ndarray, current: np.ndarray) -> Difference:
    """Fisher's exact test of N and M yes-or-no answers (bool); the effect is the difference of the shares.

    >>> compare_shares(np.array([True] * 5 + [False] * 5), np.array([True] * 10)).effect
    0.5
    """
    yes, later_yes = int(np.count_nonzero(reference)), int(np.count_nonzero(current))
    table = [[yes, len(reference) - yes], [later_yes, len(current) - later_yes]]
    return Difference(
        float(scipy.stats.fisher_exact(table).pvalue), abs(yes / len(reference) - later_yes / len(current))
    )


def compare_means(reference: np.ndarray, current: np.ndarray, *, level: float = 0.01) -> Difference:
    """Permutation test of the means of N and M numbers in 0..1; the effect is their difference.

    Of calibrated probabilities this is the test for a changed prevalence: where only the share of the ill
    changes, the likelihood's slope in that share is a linear function of the mean probability.

    Args:
        reference: N.
        current: M.
        level: the smallest level at which p will be judged: it decides how many permutations are drawn.

    Source: the likelihood of Saerens, Latinne and Decaestecker 2002, Neural Computation 14:21, and its slope at
    the reference's prevalence.

    >>> compare_means(np.zeros(40), np.ones(40)).effect
    1.0
    """
    values = np.concatenate([reference, current])
    p_value = _permutation_test(
        lambda weights: np.abs(weights @ (values - values.mean())), len(reference), len(current), level
    )
    return Difference(p_value, abs(float(current.mean() - reference.mean())))


def median_bandwidth(reference: np.ndarray) -> float:
    """The median distance between two of N reference embeddings, N F; 1 where most are equal.

    >>> median_bandwidth(np.array([[0.0], [1.0], [4.0]]))
    3.0
    """
    distances = np.sqrt(_squared_distances(_at_most(reference, REFERENCE_ROWS)))
    median = float(np.median(distances[np.triu_indices(len(distances), k=1)])) if len(distances) > 1 else 0.0
    return median if median > 1e-6 else 1.0


def compare_embeddings(
    reference: np.ndarray, current: np.ndarray, bandwidth: float, *, level: float = 0.01
) -> Difference:
    """Permutation test of the maximum mean discrepancy (MMD) between N F and M F embeddings.

    It asks whether any smooth function has another mean here than there, so it sees a change of shape as
    well as a shift, in all directions at once. The kernel is Gaussian. The effect is sqrt(MMD^2 / 2) by the
    unbiased estimate, 0 where that is negative: 1 where the two share nothing.

    Args:
        reference: N F, of which `REFERENCE_ROWS` at most are used.
        current: M F.
        bandwidth: of the kernel, from the reference alone (`median_bandwidth`), so that it does not follow
            what it should notice.
        level: as in `compare_means`.

    Source: Gretton et al. 2012, JMLR 13, "A Kernel Two-Sample Test", eq. 3 (unbiased), eq. 5 (biased, which is
    what is permuted), section 8 (median heuristic).
    """
    known = _at_most(reference, REFERENCE_ROWS)
    n, m = len(known), len(current)
    kernel = np.exp(_squared_distances(np.concatenate([known, current])) / (-2 * bandwidth**2))
    p_value = _permutation_test(lambda weights: np.einsum("bi,bi->b", weights @ kernel, weights), n, m, level)
    within = [
        (block.sum() - len(block)) / (len(block) * (len(block) - 1))
        for block in (kernel[:n, :n], kernel[n:, n:])
    ]
    discrepancy = float(sum(within) - 2 * kernel[:n, n:].mean())
    return Difference(p_value, float(np.sqrt(max(discrepancy, 0.0) / 2)))


def _at_most(rows: np.ndarray, number: int) -> np.ndarray:
    """`number` of the rows, always the same ones, where there are more."""
    if len(rows) <= number:
        return rows
    return rows[np.random.default_rng(0).permutation(len(rows))[:number]]


def _squared_distances(rows: np.ndarray) -> np.ndarray:
    """N N float32 squared distances between N F rows."""
    # Centred, since what the rows share would cost digits.
    centred = (rows - rows.mean(axis=0)).astype(np.float32)
    squares = (centred**2).sum(axis=1)
    return np.maximum(squares[:, None] + squares[None, :] - 2 * centred @ centred.T, 0)


def _permutation_test(statistic: Callable[[np.ndarray], np.ndarray], n: int, m: int, level: float) -> float:
    """The p-value of a statistic of n + m rows under exchange of rows, the first n being the reference.

    Args:
        statistic: takes B N+M float32 weights, 1/n for the rows taken as reference and -1/m for the others, and
            gives B values; the larger the further apart.
        n: rows of the reference.
        m: later rows.
        level: as many permutations are drawn as bring p down to half of it; fewer where p is plainly large.

    Source: Phipson and Smyth 2010, Stat Appl Genet Mol Biol 9:39, for counting the sample itself; Besag and
    Clifford 1991, Biometrika 78:301, for stopping once enough permutations have exceeded it.
    """
    own = np.concatenate([np.full(n, 1 / n), np.full(m, -1 / m)]).astype(np.float32)
    # What only rounding tells from the sample's own value counts as equal.
    least = float(statistic(own[None])[0]) * (1 - 1e-5) - 1e-12
    rng = np.random.default_rng(0)
    wanted, drawn, exceeding = max(_MIN_PERMUTATIONS, int(np.ceil(2 / level))), 0, 0
    while drawn < wanted:
        exceeds = statistic(rng.permuted(np.tile(own, (_AT_ONCE, 1)), axis=1)) >= least
        if exceeding + exceeds.sum() >= _ENOUGH_EXCEEDING:
            last = int(np.flatnonzero(exceeds)[_ENOUGH_EXCEEDING - exceeding - 1])
            return _ENOUGH_EXCEEDING / (drawn + last + 1)
        exceeding += int(exceeds.sum())
        drawn += _AT_ONCE
    return (exceeding + 1) / (drawn + 1)


# --- Many questions -----------------------------------------------------------------------------------


class Finding(NamedTuple):
    """The verdict on one quantity in one slice of the requests.

    Attributes:
        slice: "all", or "site ..." or "scanner ...".
        group: statistics, embedding, scores, prevalence or decisions.
        name: of the quantity: `stat_<name>`, `embedding`, `prob_<class>`, `prevalence_<class>` (mean
            probability), `decision_<class>` (share called) or `num_boxes`.
        p_value: of its test.
        adjusted_p: the same after Holm's correction over all tests of the watch.
        effect: distance between the distributions, 0 to 1.
        drifted: adjusted_p below alpha and the effect at least the smallest that matters.
        reference_mean: None for embeddings, which have no scale.
        current_mean: likewise.
        n_reference: rows compared with.
        n: requests.
    """

    slice: str
    group: str
    name: str
    p_value: float
    adjusted_p: float
    effect: float
    drifted: bool
    reference_mean: float | None
    current_mean: float | None
    n_reference: int
    n: int


class _Question(NamedTuple):
    slice: str
    group: str
    name: str
    reference: np.ndarray
    current: np.ndarray


def compare_requests(
    reference: pd.DataFrame,
    heldout: pd.DataFrame,
    requests: pd.DataFrame,
    classes: Sequence[str],
    *,
    alpha: float,
    minimum_effect: float,
    minimum_n: int,
) -> list[Finding]:
    """Every quantity of the requests against the reference, over all of them and by site and scanner.

    Half of alpha goes to the tests over all requests, the other half in equal parts to the sites and scanners that
    have `minimum_n` requests and reference rows. Each group has an equal part of a slice, each test of its group:
    nine statistics do not outvote the one question whether more patients are ill. A scanner that is all of its
    site is not asked again.

    Args:
        reference: `stat_*` of the training split; with `site` and `scanner` they are compared by these too.
        heldout: the bundle's answers on the calibration split, with `site`, `scanner` and `embedding`.
        requests: as `request_log.read_requests` gives them; numbers rounded as the references are.
        classes: whose scores and calls are watched.
        alpha: share of windows that may hold a false finding.
        minimum_effect: the smallest distance that matters.
        minimum_n: rows that a slice needs.
    """
    bandwidth = median_bandwidth(np.stack(heldout["embedding"].to_list())) if "embedding" in heldout else 1.0
    questions = [
        question
        for place, parts in _slices(reference, heldout, requests, minimum_n)
        for question in _questions(place, *parts, classes)
    ]
    weights = _weights(questions)
    differences = [
        _answer(question, bandwidth, alpha * weight)
        for question, weight in zip(questions, weights, strict=True)
    ]
    # Not the false discovery rate: the statistics of one image depend on each other, and an image counts at its site
    # as well as over all.
    adjusted = holm([difference.p_value for difference in differences], weights)
    return [
        Finding(
            slice=question.slice,
            group=question.group,
            name=question.name,
            p_value=difference.p_value,
            adjusted_p=adjusted_p,
            effect=difference.effect,
            drifted=adjusted_p < alpha and difference.effect >= minimum_effect,
            reference_mean=None if question.group == "embedding" else float(question.reference.mean()),
            current_mean=None if question.group == "embedding" else float(question.current.mean()),
            n_reference=len(question.reference),
            n=len(question.current),
        )
        for question, difference, adjusted_p in zip(questions, differences, adjusted, strict=True)
    ]


def unknown_places(heldout: pd.DataFrame, requests: pd.DataFrame) -> dict[str, dict[str, int]]:
    """Requests from sites and scanners of which the reference holds nothing: "site" and "scanner" -> name -> number.

    None are unknown where the reference names no site or scanner at all.
    """
    unknown = {}
    for kind in ("site", "scanner"):
        known = set(heldout[kind]) - {""}
        named = requests.loc[requests[kind] != "", kind] if known else requests[kind].iloc[:0]
        unknown[kind] = {str(name): int(n) for name, n in named[~named.isin(known)].value_counts().items()}
    return unknown


Parts = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]


def _slices(
    reference: pd.DataFrame, heldout: pd.DataFrame, requests: pd.DataFrame, minimum_n: int
) -> Iterator[tuple[str, Parts]]:
    """All requests, then those of each site and scanner with enough of them and of the reference."""
    yield "all", (reference, heldout, requests)
    seen = [np.ones(len(requests), bool)]
    for kind in ("site", "scanner"):
        for name in sorted(set(requests[kind]) - {""}):
            here = (requests[kind] == name).to_numpy()
            before = heldout[heldout[kind] == name]
            if min(here.sum(), len(before)) < minimum_n or any((here == other).all() for other in seen):
                continue
            seen.append(here)
            trained_on = reference[reference[kind] == name] if kind in reference else reference.iloc[:0]
            yield f"{kind} {name}", (trained_on, before, requests[here])


def _questions(
    place: str, reference: pd.DataFrame, heldout: pd.DataFrame, requests: pd.DataFrame, classes: Sequence[str]
) -> Iterator[_Question]:
    def question(group: str, name: str, before: pd.Series, later: pd.Series) -> _Question:
        return _Question(place, group, name, before.to_numpy(), later.to_numpy())

    for name in reference.filter(like="stat_") if len(reference) else ():
        if reference[name].notna().all() and requests[name].notna().all():
            yield question("statistics", str(name), reference[name], requests[name])
    if "embedding" in heldout and requests["embedding"].map(len).all():
        yield _Question(
            place,
            "embedding",
            "embedding",
            *(np.stack(side["embedding"].to_list()) for side in (heldout, requests)),
        )
    for name in classes:
        column = f"prob_{name}"
        if column in heldout:
            yield question("scores", column, heldout[column], requests[column])
            if "num_boxes" not in requests:  # a box's score is no probability
                yield question("prevalence", f"prevalence_{name}", heldout[column], requests[column])
            yield question(
                "decisions", f"decision_{name}", *(called(side, name) for side in (heldout, requests))
            )
    if "num_boxes" in heldout:
        yield question("decisions", "num_boxes", heldout["num_boxes"], requests["num_boxes"])


def called(answers: pd.DataFrame, name: str) -> pd.Series:
    """Whether the class was called, of each row."""
    return answers["decision"] == name if "decision" in answers else answers[f"decision_{name}"]


def _weights(questions: Sequence[_Question]) -> list[float]:
    """Shares of alpha: by slice, in it by group, in that by test."""
    places = {question.slice for question in questions}
    groups = {(question.slice, question.group) for question in questions}
    shares = []
    for question in questions:
        of_slice = 1.0 if len(places) == 1 else 0.5 if question.slice == "all" else 0.5 / (len(places) - 1)
        of_group = sum(place == question.slice for place, _ in groups)
        of_test = sum((one.slice, one.group) == (question.slice, question.group) for one in questions)
        shares.append(of_slice / of_group / of_test)
    return shares


def _answer(question: _Question, bandwidth: float, level: float) -> Difference:
    if question.group == "embedding":
        return compare_embeddings(question.reference, question.current, bandwidth, level=level)
    if question.group == "prevalence":
        return compare_means(question.reference, question.current, level=level)
    if question.current.dtype == bool:
        return compare_shares(question.reference, question.current)
    return compare_numbers(question.reference, question.current)
