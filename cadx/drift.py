"""What an image looks like in nine numbers, and how far the answered images have moved from a reference.

Drift is asked of each quantity by itself, by a two-sample test; the correction for asking many times is the
caller's threshold.

Source: Rabanser, Günnemann and Lipton 2019, NeurIPS, "Failing Loudly", sections 3.1 and 3.2: univariate
Kolmogorov-Smirnov tests with Bonferroni's correction, on principal components and on a classifier's scores,
find most shifts that larger machinery finds. We add the image statistics, which say what has changed.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from cadx.types import Digest

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

_DARK, _BRIGHT = 0.02, 0.98


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
    mean = float(share @ levels)
    std = float(np.sqrt(share @ (levels - mean) ** 2))
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

    def is_drift(self, threshold: float, minimum_effect: float) -> bool:
        """Whether it is both: no chance (p < threshold), and large enough to matter.

        The p-value alone would alarm over nothing once there are thousands of requests.
        """
        return self.p_value < threshold and self.effect >= minimum_effect


def compare_numbers(reference: np.ndarray, current: np.ndarray) -> Difference:
    """Two-sample Kolmogorov-Smirnov test of N and M finite numbers.

    The effect is its statistic, the largest difference between the two cumulative distributions: 0.1 is a
    normal distribution moved by a quarter of its standard deviation. Equal values only make p larger.

    >>> compare_numbers(np.zeros(20), np.zeros(30))
    Difference(p_value=1.0, effect=0.0)
    >>> compare_numbers(np.arange(100), np.arange(100) + 50).effect
    0.5
    """
    result = stats.ks_2samp(reference, current)
    return Difference(float(result.pvalue), float(result.statistic))


def compare_shares(reference: np.ndarray, current: np.ndarray) -> Difference:
    """Fisher's exact test of N and M yes-or-no answers (bool); the effect is the difference of the shares.

    >>> compare_shares(np.array([True] * 5 + [False] * 5), np.array([True] * 10)).effect
    0.5
    """
    yes, later_yes = int(np.count_nonzero(reference)), int(np.count_nonzero(current))
    table = [[yes, len(reference) - yes], [later_yes, len(current) - later_yes]]
    return Difference(
        float(stats.fisher_exact(table).pvalue), abs(yes / len(reference) - later_yes / len(current))
    )


def embedding_summary(
    reference: np.ndarray, embeddings: np.ndarray, components: int = 4
) -> dict[str, np.ndarray]:
    """Where embeddings lie among reference embeddings: a few numbers for each of M rows of F.

    `embedding_1` and so on are projections on the first principal axes of the reference, the longest first,
    fewer where it varies in fewer directions; `embedding_residual` is the distance from the subspace that
    these axes span, where what the reference never showed ends up. All are centred on the reference's mean
    and in its standard deviations. An axis points to where its largest entry is positive.

    Compare embeddings with others that the axes were not fitted to: axes turn towards the rows that they are
    fitted to, which therefore lie nearer to the subspace than any later row.

    Source: Jackson and Mudholkar 1979, Technometrics 21, "Control Procedures for Residuals Associated With
    Principal Component Analysis", for watching the residual beside the projections.

    Args:
        reference: N F, at least one row.
        embeddings: M F.
        components: axes at most.

    >>> reference = np.array([[-1.0, 0, 0], [1, 0, 0], [-3, 0, 0], [3, 0, 0]])
    >>> summary = embedding_summary(reference, np.array([[5.0, 0, 0], [0, 7, 0]]))
    >>> {name: values.round(3).tolist() for name, values in summary.items()}
    {'embedding_1': [2.236, 0.0], 'embedding_residual': [0.0, 7.0]}
    """
    fitted = np.asarray(reference, np.float64)
    centre = fitted.mean(axis=0)
    _, lengths, axes = np.linalg.svd(fitted - centre, full_matrices=False)
    # What is left of float32 rounding is no direction.
    count = min(components, int((lengths > 1e-5 * max(lengths[0], 1e-12)).sum()))
    axes = axes[:count]
    largest = np.abs(axes).argmax(axis=1)
    axes = axes * np.sign(axes[np.arange(count), largest])[:, None]

    def coordinates(rows: np.ndarray) -> np.ndarray:
        centred = np.asarray(rows, np.float64) - centre
        projected = centred @ axes.T
        residual = np.linalg.norm(centred - projected @ axes, axis=1)
        return np.column_stack([projected, residual])

    own = coordinates(fitted)
    spread = own.std(axis=0)
    # A quantity that never varied stays in its own units.
    values = (coordinates(embeddings) - own.mean(axis=0)) / np.where(spread > 1e-9, spread, 1.0)
    names = [*(f"embedding_{k}" for k in range(1, count + 1)), "embedding_residual"]
    return dict(zip(names, values.T, strict=True))


class RequestLog(NamedTuple):
    """The answered requests of one bundle, and what was left out.

    Attributes:
        requests: one row a request, by time: `prediction_id`, `time` (UTC), `site`, `scanner`,
            `stat_<name>`, `prob_<class>`, `decision` (a class name) or for multilabel `decision_<class>`
            (bool), `embedding` (F float32 each), `num_warnings`.
        torn: lines cut short, as a worker leaves one that is killed while it writes.
        other_bundles: lines of other bundles.
        duplicates: lines with a prediction_id that came before.
    """

    requests: pd.DataFrame
    torn: int
    other_bundles: int
    duplicates: int


def read_request_log(folder: Path, bundle: Digest) -> RequestLog:
    """The requests that `bundle` answered, from the JSON lines in `folder`/*.jsonl, one file a worker.

    Raises:
        ValueError: if there is no such request, or a line is whole but not of this form.
    """
    rows: dict[str, dict[str, Any]] = {}
    torn, other_bundles, duplicates = 0, 0, 0
    for file in sorted(folder.glob("*.jsonl")):
        for number, text in enumerate(file.read_bytes().split(b"\n"), start=1):
            if not text.strip():
                continue
            try:
                line = json.loads(text)
            except ValueError:  # no JSON, or no UTF-8
                torn += 1
                continue
            if not isinstance(line, dict) or line.get("schema_version") != 1:
                raise ValueError(
                    f"{file}: line {number} is no request of schema_version 1; move the file away"
                )
            if line.get("bundle") != bundle:
                other_bundles += 1
            elif line.get("prediction_id") in rows:
                duplicates += 1
            else:
                try:
                    rows[line["prediction_id"]] = _request(line)
                except KeyError as error:
                    raise ValueError(f"{file}: line {number} has no {error}; move the file away") from None
                except (TypeError, ValueError, AttributeError) as error:
                    raise ValueError(
                        f"{file}: line {number} is not of the log's form ({type(error).__name__}); "
                        "move the file away"
                    ) from None
    if not rows:
        raise ValueError(
            f"{folder}: no request that {bundle} answered ({other_bundles} lines of other bundles, "
            f"{torn} cut short); give the folder that CADX_REQUEST_LOG names, and the bundle that is served"
        )
    requests = pd.DataFrame(list(rows.values())).sort_values(["time", "prediction_id"], ignore_index=True)
    return RequestLog(requests, torn, other_bundles, duplicates)


def _request(line: dict[str, Any]) -> dict[str, Any]:
    """One line as a row; floats are checked to be finite, since no test would survive a NaN."""
    decision = line["decision"]
    row = {
        "prediction_id": str(line["prediction_id"]),
        "time": pd.Timestamp(line["time"]).tz_convert("UTC"),
        "site": line["site"],
        "scanner": line["scanner"],
        **{f"stat_{name}": float(line["statistics"][name]) for name in STATISTICS},
        **{f"prob_{name}": float(value) for name, value in line["probabilities"].items()},
        **(
            {"decision": decision}
            if isinstance(decision, str)
            else {f"decision_{name}": name in decision for name in line["probabilities"]}
        ),
        "embedding": np.asarray(line["embedding"], np.float32),
        "num_warnings": len(line["warnings"]),
    }
    numbers = [value for value in row.values() if isinstance(value, float)]
    if not (np.isfinite(numbers).all() and np.isfinite(row["embedding"]).all()):
        raise ValueError("a number is not finite")
    return row
