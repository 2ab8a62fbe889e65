"""Pictures of why, and of how well: attention over images, curves with bands, intervals side by side.

The drawing functions draw on axes that the caller made, in the style these axes have.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from cadx.doubts import doubts_of
from cadx.metrics import Subgroup, roc
from cadx.reporting import MARK, Page, panels
from cadx.transforms import tile_map
from cadx.types import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLORMAP = "inferno"
MAX_OPACITY = 0.55
BAND_RESAMPLES = 500
FOREST_METRICS = ("sensitivity", "specificity", "auc")
_MUTED = "#5b6675"
_INK_BLUE = "#0072B2"


class Curve(Protocol):
    """What gives a curve's heights at `grid` from N labels and N scores; None where it is undefined."""

    def __call__(self, labels: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
        """The heights, one for each place of the grid."""
        ...


class Band(NamedTuple):
    """A curve at the places of a grid: the mean over models and its pointwise 95 % limits."""

    grid: np.ndarray
    value: np.ndarray
    low: np.ndarray
    high: np.ndarray


def overlay(pixels: np.ndarray, attention: np.ndarray) -> np.ndarray:
    """The image with its attention map laid over it: H W 3 uint8.

    The more attention, the less transparent the colour: where the map is 0 the image shows unchanged.

    Args:
        pixels: H W or H W 3, uint8 or uint16.
        attention: H W, >= 0, in the image's own coordinates; scaled so that its maximum is fully coloured.

    >>> overlay(np.full((2, 2), 255, np.uint8), np.array([[0.0, 0.0], [0.0, 1.0]]))[0, 0].tolist()
    [255, 255, 255]
    """
    import matplotlib

    assert attention.shape == pixels.shape[:2], "attention must be in the image's coordinates"
    scaled = pixels.astype(np.float64) / np.iinfo(pixels.dtype).max
    image = scaled if scaled.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)
    strength = attention / max(float(attention.max()), np.finfo(np.float64).tiny)
    colour = matplotlib.colormaps[COLORMAP](strength)[..., :3]
    opacity = MAX_OPACITY * strength[..., None]
    return np.round(255 * ((1 - opacity) * image + opacity * colour)).astype(np.uint8)


def visualize_attention_map(
    thumbnail: np.ndarray,
    weights: np.ndarray,
    positions_um: np.ndarray,
    *,
    tile_um: float,
    spacing_um: tuple[float, float],
) -> np.ndarray:
    """A slide's thumbnail, H W 3 uint8, with the attention of its tiles laid over it; arguments as for `tile_map`."""
    shape = (thumbnail.shape[0], thumbnail.shape[1])
    attention = tile_map(weights, positions_um, tile_um=tile_um, spacing_um=spacing_um, shape=shape)
    return overlay(thumbnail, np.nan_to_num(attention))


def patient_band(
    curve: Curve,
    labels: np.ndarray,
    scores: np.ndarray,
    patients: np.ndarray | None,
    *,
    resamples: int = BAND_RESAMPLES,
    seed: int = 0,
) -> Band | None:
    """The mean of the models' curves over 0..1, with limits from a bootstrap of whole patients.

    Each resample of patients is applied to all models. None where the curve is undefined.

    Args:
        curve: see `Curve`.
        labels: N of 0 and 1.
        scores: S N for S models.
        patients: N, or None where each case is a patient.
        resamples: of patients; those that lack a class are left out.
        seed: of the resampling.
    """
    grid = np.linspace(0, 1, 101)

    def mean_curve(rows: np.ndarray) -> np.ndarray | None:
        lines = [line for one in scores if (line := curve(labels[rows], one[rows], grid)) is not None]
        return np.mean(lines, axis=0) if len(lines) == len(scores) else None

    value = mean_curve(np.arange(len(labels)))
    if value is None:
        return None
    code = np.arange(len(labels)) if patients is None else np.unique(patients, return_inverse=True)[1]
    rows_of = np.split(np.argsort(code, kind="stable"), np.cumsum(np.bincount(code))[:-1])
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        rows = np.concatenate([rows_of[i] for i in rng.integers(len(rows_of), size=len(rows_of))])
        if (line := mean_curve(rows)) is not None:
            drawn.append(line)
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0) if drawn else (np.full(101, np.nan),) * 2
    return Band(grid, value, low, high)


def draw_band(
    axes: "Axes", band: Band, label: str, *, drawn_as: tuple[np.ndarray, np.ndarray] | None = None
) -> None:
    """Draw a band with its line: the mean, or the exact curve (x, y) where `drawn_as` gives it."""
    x, y = drawn_as if drawn_as is not None else (band.grid, band.value)
    (line,) = axes.plot(x, y, label=label)
    axes.fill_between(band.grid, band.low, band.high, color=line.get_color(), alpha=0.16, linewidth=0)


def square(axes: "Axes", x_label: str, y_label: str) -> None:
    """Make axes a unit square, as curves of shares need."""
    axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=x_label, ylabel=y_label, aspect="equal")


def show_subgroups(
    page: Page,
    by_subgroup: Mapping[str, Mapping[str, Subgroup]],
    overall: Mapping[str, Estimate],
    note: str = "",
) -> None:
    """Add the section that sets every subgroup's metrics beside those of all; `note` opens its caption."""
    page.section("Subgroups")
    if not by_subgroup:
        page.text(
            "The dataset says neither site, scanner, age nor sex of any image: no subgroup can be judged."
        )
        return
    count = sum(len(groups) for groups in by_subgroup.values())
    reasons = sorted(
        {
            why.removeprefix("undefined: ")
            for groups in by_subgroup.values()
            for group in groups.values()
            for why in (getattr(group, metric).method for metric in FOREST_METRICS)
            if why.startswith("undefined")
        }
    )
    undefined = f" Undefined: {'; '.join(reasons)}." if reasons else ""
    doubted = any(
        doubts_of(getattr(group, metric).method)
        for groups in by_subgroup.values()
        for group in groups.values()
        for metric in FOREST_METRICS
    )
    hollow = f" Hollow squares: {MARK}." if doubted else ""
    drawing, axes = panels(8.6, 1.0 + 0.27 * count, columns=len(FOREST_METRICS))
    draw_subgroups(axes, by_subgroup, overall)
    page.figure(
        drawing,
        f"{note} In brackets the images, and how many of them are positive (+). The dashed lines are the values "
        "of all. Intervals of small groups are wide, and among many groups some differ by chance."
        f"{hollow}{undefined}".strip(),
        alt="Forest plot of sensitivity, specificity and AUC by subgroup; metrics.json holds the numbers",
    )


def draw_subgroups(
    columns: "Sequence[Axes]",
    by_subgroup: Mapping[str, Mapping[str, Subgroup]],
    overall: Mapping[str, Estimate],
) -> None:
    """Draw a forest plot: a row for each subgroup, a panel for each of `FOREST_METRICS`; hollow where in doubt.

    Args:
        columns: one for each metric; the first carries the names.
        by_subgroup: attribute -> value -> its estimates.
        overall: metric -> the value of all, drawn as a reference line.
    """
    rows = [
        (attribute, value, group)
        for attribute, groups in by_subgroup.items()
        for value, group in groups.items()
    ]
    names = [
        f"{attribute}: {value}  ({group.n:,}, {group.n_positive:,} +)" for attribute, value, group in rows
    ]
    heights = -np.arange(len(rows))
    for axes, metric in zip(columns, FOREST_METRICS, strict=True):
        estimates: list[Estimate] = [getattr(group, metric) for *_, group in rows]
        reference = overall[metric].value
        if reference is not None:
            axes.axvline(reference, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)))
        for height, estimate in zip(heights, estimates, strict=True):
            if estimate.value is None:
                axes.annotate(
                    "undefined" if estimate.method.startswith("undefined") else "too few",
                    (0.03, height),
                    xycoords=("axes fraction", "data"),
                    va="center",
                    color=_MUTED,
                    fontsize=8,
                )
                continue
            low = estimate.value if estimate.low is None else estimate.low
            high = estimate.value if estimate.high is None else estimate.high
            (line,) = axes.plot(
                [low, high], [height, height], color=_INK_BLUE, linewidth=1.6, solid_capstyle="butt"
            )
            axes.plot(
                [estimate.value],
                [height],
                marker="s",
                markersize=4.5,
                color=line.get_color(),
                markerfacecolor="white" if doubts_of(estimate.method) else line.get_color(),
            )
        shown = [v for e in (*estimates, overall[metric]) for v in (e.value, e.low) if v is not None]
        lowest = np.floor(10 * min([*shown, 0.9])) / 10
        axes.set(title=title(metric), ylim=(heights[-1] - 0.6, 0.6), xlim=(lowest - 0.02, 1.02))
        axes.set_yticks(heights, names if axes is columns[0] else [""] * len(names))
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        # Attributes apart by a line.
        for above, below, height in zip(rows, rows[1:], heights, strict=False):
            if above[0] != below[0]:
                axes.axhline(height - 0.5, color="#e3e7ec", linewidth=0.8)


def roc_heights(labels: np.ndarray, scores: np.ndarray, grid: np.ndarray) -> np.ndarray | None:
    """Sensitivity at the false positive rates of `grid`: a `Curve`; None where a class is missing."""
    curve = roc(labels, scores)
    return steps_at(curve.false_positive_rate, curve.sensitivity, grid) if len(curve.sensitivity) else None


def steps_at(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The heights at `grid` of a curve that rises in steps: the last y whose x does not exceed the place.

    >>> steps_at(np.array([0.0, 0.5, 0.5]), np.array([0.1, 0.2, 0.3]), np.array([0.0, 0.4, 0.5])).tolist()
    [0.1, 0.1, 0.3]
    """
    return y[np.searchsorted(x, grid, side="right") - 1]


def next_at(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """The heights at `grid` of a curve whose points must be reached: the first y whose x is not below it.

    >>> next_at(np.array([0.5, 1.0]), np.array([0.9, 0.4]), np.array([0.0, 0.5, 0.6])).tolist()
    [0.9, 0.9, 0.4]
    """
    return y[np.minimum(np.searchsorted(x, grid - 1e-12), len(y) - 1)]


def title(metric: str) -> str:
    """A metric's name as a reader sees it.

    >>> title("auc"), title("balanced_accuracy"), title("ece_if_calibrated")
    ('AUC', 'balanced accuracy', 'ECE if calibrated')
    """
    names = {
        "ap": "AP",
        "ap50": "AP50",
        "ap75": "AP75",
        "ar": "AR",
        "froc": "FROC",
        "fp": "FP",
        "auc": "AUC",
        "ppv": "PPV",
        "npv": "NPV",
        "f1": "F1",
        "ece": "ECE",
        "brier": "Brier score",
    }
    return " ".join(names.get(word, word) for word in metric.split("_"))
