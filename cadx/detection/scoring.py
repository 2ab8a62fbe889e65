"""Every metric of detections with its interval, overall and by class, and differences between models."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike

from cadx.detection.average_precision import IOU_THRESHOLDS, CocoTables, coco_parts, coco_tables, mean_of
from cadx.detection.froc import FROC_RATES, Pool, count_holders, pool_classes, sensitivities
from cadx.detection.matching import (
    AREAS_PX2,
    ImageSet,
    Matches,
    check_iou,
    match_classes,
    rank_in,
    read_boxes,
)
from cadx.doubts import HOLDS_LESS, ROUGHLY
from cadx.metrics import areas
from cadx.metrics.estimates import (
    LEVEL,
    TAILS,
    BoolArray,
    Cases,
    Difference,
    FloatArray,
    IntArray,
    Meaning,
    Part,
    Weights,
    effective_patients,
    replicated,
    resample,
    resampled_sums,
    undefined,
)
from cadx.metrics.limits import on_scale, part_of_boxes, with_doubt
from cadx.metrics.proportions import MIN_ERRORS, share
from cadx.types import Config, Estimate

MIN_WITH_FALSE_BOXES = 5
"""Patients with false boxes below which the interval of their number holds the truth less often than it says."""

MIN_WITHOUT_FALSE_BOXES = 200
"""Patients from which on it is relied on all the same: a detector that is hardly ever wrong is no worse for it."""

METRICS: dict[str, Meaning] = {
    "ap": Meaning("COCO's average precision: mean over IoU 0.50 to 0.95", "higher"),
    "ap50": Meaning("average precision where IoU 0.50 is a hit", "higher"),
    "ap75": Meaning("average precision where IoU 0.75 is a hit", "higher"),
    "ap_small": Meaning("average precision of lesions up to 32 x 32 pixels", "higher"),
    "ap_medium": Meaning("average precision of lesions between 32 x 32 and 96 x 96 pixels", "higher"),
    "ap_large": Meaning("average precision of lesions from 96 x 96 pixels", "higher"),
    "ar": Meaning(
        "COCO's average recall: share of lesions found at any score, mean over IoU 0.50 to 0.95", "higher"
    ),
    "froc": Meaning(
        "share of lesions found, mean over 1/8, 1/4, 1/2, 1, 2, 4, 8 false positives per image", "higher"
    ),
    **{
        f"sensitivity_at_{rate:g}_fp": Meaning(
            f"share of lesions found with at most {rate:g} false positives per image", "higher"
        )
        for rate in FROC_RATES
    },
    "sensitivity": Meaning("share of lesions found at the operating point", "higher"),
    "precision": Meaning("share of the boxes called at the operating point that are lesions", "higher"),
    "false_positives_per_image": Meaning(
        "boxes called at the operating point that are none, per image", "lower"
    ),
    **{
        f"sensitivity_{size}": Meaning(
            f"share of lesions found at the operating point, of the {size} ones", "higher"
        )
        for size in AREAS_PX2
        if size != "all"
    },
    "image_specificity": Meaning("share of images without lesions in which nothing is called", "higher"),
    "image_auc": Meaning("probability that an image with a lesion scores above one without", "higher"),
}
"""Every metric by its name in metrics.json, in the order of reports.

Overall, those of AP and AR are means over the classes that have lesions; the others pool the classes' detections
and lesions (each detection still matched within its class only).
"""


class DetectionScores(Config):
    """Everything that `calculate_detection_metrics` says of one set of images.

    Attributes:
        n: images.
        n_patients: patients among them.
        n_lesions: boxes of the ground truth.
        clustered: whether any patient has several images.
        iou_threshold: what a hit is, for all but AP and AR.
        metrics: metric -> estimate, over all classes, in the order of `METRICS`.
        by_class: class -> metric -> estimate.
        by_seed: metric -> its value for each seed, None where undefined.
        between_seed_sd: metric -> standard deviation over seeds (n - 1), None for a single seed.
    """

    n: int
    n_patients: int
    n_lesions: int
    clustered: bool
    iou_threshold: float
    metrics: dict[str, Estimate]
    by_class: dict[str, dict[str, Estimate]]
    by_seed: dict[str, tuple[float | None, ...]]
    between_seed_sd: dict[str, float | None]


def calculate_detection_metrics(
    detections: pd.DataFrame | Sequence[pd.DataFrame],
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    score_threshold: float | Mapping[str, float] | Sequence[Mapping[str, float]] = 0.5,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> DetectionScores:
    """Every metric of `METRICS` with its interval, overall and by class.

    Args:
        detections: columns sample_id, class, x0, y0, x1, y1 (half-open) and score, 0..1; or a table for each seed.
        ground_truths: the same columns without score.
        sample_ids: N images, those without any box too: they carry false positives, and count.
        classes: all classes.
        patients: N, anything that tells patients apart; None = all differ.
        score_threshold: the lowest score that is called, for the metrics at the operating point: one, or one by
            class, or for each seed one by class.
        iou_threshold: the least overlap of a hit, for all metrics but AP and AR.
        max_detections: how many of one class in one image count, those of the highest scores.
        resamples: of patients; 0 leaves what has no closed form without interval.
        seed: of the resampling. The same resamples serve all metrics, classes and seeds.

    Raises:
        ValueError: as `calculate_map`, or if a number is out of range or patients have another length.
    """
    check_iou(iou_threshold)
    frames = [detections] if isinstance(detections, pd.DataFrame) else list(detections)
    seeds = [read_boxes(one, ground_truths, sample_ids, classes, patients, max_detections) for one in frames]
    data = seeds[0]
    thresholds = _by_seed_and_class(score_threshold, data.classes, len(seeds))
    weights = _itself_and_resamples(data, resamples, seed)
    strict = [match_classes(one, IOU_THRESHOLDS, tuple(AREAS_PX2.values())) for one in seeds]
    tables = [
        [coco_tables(of_seed[column], one, weights) for one, of_seed in zip(seeds, strict, strict=True)]
        for column in range(len(data.classes))
    ]
    loose = [match_classes(one, (iou_threshold,), tuple(AREAS_PX2.values())) for one in seeds]

    def pooled(columns: Sequence[int]) -> dict[str, Part]:
        every, *sizes = (
            [
                pool_classes(
                    [of_seed[column] for column in columns], [of_class[column] for column in columns], area
                )
                for of_seed, of_class in zip(loose, thresholds, strict=True)
            ]
            for area in range(len(AREAS_PX2))
        )
        by_size = {
            f"sensitivity_{size}": _sensitivity(data, pools)
            for size, pools in zip(list(AREAS_PX2)[1:], sizes, strict=True)
        }
        return _froc(data, every, weights) | _called(data, every, weights) | by_size | _of_images(data, every)

    by_class = {
        name: _coco_estimates(data, [tables[column]], [strict[0][column]]) | pooled([column])
        for column, name in enumerate(data.classes)
    }
    overall = (
        by_class[data.classes[0]]
        if len(data.classes) == 1
        else _coco_estimates(data, tables, strict[0]) | pooled(range(len(data.classes)))
    )
    return DetectionScores(
        n=data.num_images,
        n_patients=data.num_patients,
        n_lesions=len(data.lesions.image),
        clustered=data.num_patients < data.num_images,
        iou_threshold=iou_threshold,
        metrics={name: overall[name].estimate for name in METRICS},
        by_class={of: {name: parts[name].estimate for name in METRICS} for of, parts in by_class.items()},
        by_seed={name: overall[name].seed_values for name in METRICS},
        between_seed_sd={name: overall[name].seed_sd for name in METRICS},
    )


def paired_differences(
    detections_a: pd.DataFrame,
    detections_b: pd.DataFrame,
    ground_truths: pd.DataFrame,
    sample_ids: Sequence[str],
    *,
    classes: Sequence[str],
    patients: ArrayLike | None = None,
    iou_threshold: float = 0.5,
    max_detections: int = 100,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Difference]:
    """AP, AP50 and FROC of A minus those of B on the same images, each resample of patients applied to both.

    The interval is the percentile one; p is twice the smaller share of resamples on either side of 0.

    Args:
        detections_a: as for `calculate_detection_metrics`.
        detections_b: of another model.
        ground_truths: likewise, as are all that follow.
        sample_ids: N images.
        classes: all classes.
        patients: N, or None where all differ.
        iou_threshold: the least overlap of a hit, for FROC.
        max_detections: how many of one class in one image count.
        resamples: of patients.
        seed: of the resampling.
    """
    models = [
        read_boxes(one, ground_truths, sample_ids, classes, patients, max_detections)
        for one in (detections_a, detections_b)
    ]
    data = models[0]
    image, column = data.lesions.image, data.lesions.column
    fewest = min((count_holders(data, image[column == one]) for one in np.unique(column)), default=0.0)
    weights = _itself_and_resamples(data, resamples, seed)
    values: dict[str, list[FloatArray]] = {"ap": [], "ap50": [], "froc": []}
    for model in models:
        strict = [
            part
            for part in match_classes(model, IOU_THRESHOLDS, (AREAS_PX2["all"],))
            if len(part.lesion_image)
        ]
        tables = [coco_tables(part, model, weights) for part in strict]
        for name in ("ap", "ap50"):
            what, thresholds, area = coco_parts(IOU_THRESHOLDS)[name]
            of_classes = [mean_of(table, what, thresholds, area) for table in tables]
            values[name].append(np.mean(of_classes, axis=0) if tables else np.full(len(weights), np.nan))
        pool = pool_classes(match_classes(model, (iou_threshold,), (AREAS_PX2["all"],)))
        values["froc"].append(sensitivities(data, pool, weights, FROC_RATES).mean(axis=1))
    rarest = {"ap": fewest, "ap50": fewest, "froc": count_holders(data, image)}
    crowd = _crowding(data)
    return {
        name: _paired(a - b, len(image), _rarity(rarest[name]) or crowd) for name, (a, b) in values.items()
    }


def _paired(gap: FloatArray, n: int, doubt: str) -> Difference:
    """The difference in the first of 1+R values, with what the others say of it; arguments as of `_resampled`."""
    drawn = gap[1:][~np.isnan(gap[1:])]
    if not n or not len(drawn):
        why = "undefined: no lesion" if not n else "too few: no resample"
        value = None if math.isnan(gap[0]) else float(gap[0])
        return Difference(value=value, low=None, high=None, p=None, n=n, method=why)
    low, high = (float(end) for end in np.percentile(drawn, TAILS))
    p = min(1.0, 2 * (min((drawn <= 0).sum(), (drawn >= 0).sum()) + 1) / (len(drawn) + 1))
    method = "; ".join(filter(None, (f"paired patient bootstrap, percentile, {len(drawn)} resamples", doubt)))
    return Difference(value=float(gap[0]), low=low, high=high, p=float(p), n=n, method=method)


def _itself_and_resamples(data: ImageSet, resamples: int, seed: int) -> Weights:
    """1+R P: the first row is the set itself."""
    itself = np.ones((1, data.num_patients), np.uint8)
    return np.vstack([itself, resample(data.num_patients, resamples, seed)])


def _by_seed_and_class(
    threshold: float | Mapping[str, float] | Sequence[Mapping[str, float]],
    classes: Sequence[str],
    num_seeds: int,
) -> list[list[float]]:
    """The score threshold of each class, for each seed."""
    if isinstance(threshold, float | int):
        threshold = dict.fromkeys(classes, float(threshold))
    each = [threshold] * num_seeds if isinstance(threshold, Mapping) else list(threshold)
    if len(each) != num_seeds or any(set(classes) - set(one) for one in each):
        raise ValueError("score_threshold: give one number, or one for every class (of every seed)")
    return [[float(one[name]) for name in classes] for one in each]


def _coco_estimates(
    data: ImageSet, tables: Sequence[Sequence[CocoTables]], matches: Sequence[Matches]
) -> dict[str, Part]:
    """The metrics of `coco_parts`: means over classes, from a table for each class and seed.

    Where a class has no lesion at all, the mean says so: it is not what was asked for.
    """
    estimates = {}
    for metric, (what, thresholds, area) in coco_parts(IOU_THRESHOLDS).items():
        images = [part.lesion_image[part.lesion_counts[area]] for part in matches]
        n = sum(map(len, images))
        if not n:
            where = "" if area == 0 else f" that is {metric.removeprefix('ap_')}"
            estimates[metric] = undefined(f"undefined: no lesion{where}", 0, np.full(len(tables[0]), np.nan))
            continue
        # S R: the mean over the classes that have lesions.
        values = np.mean(
            [
                [mean_of(table, what, thresholds, area) for table in of_class]
                for of_class, own in zip(tables, images, strict=True)
                if len(own)
            ],
            axis=0,
        ).round(12)
        fewest = min(count_holders(data, own) for own in images if len(own))
        holders = count_holders(data, np.concatenate(images))
        # Recall knows nothing of false boxes, and so nothing of images without lesions.
        doubt = _rarity(fewest) or (_crowding(data) if what == "precision" else "")
        part = _resampled(values, n, holders, doubt, interpolated=what == "precision")
        if len(matches) > 1:
            missing = sum(not len(own) for own in images)
            what_of = f"mean of {len(matches) - missing} classes" + (
                f" ({missing} undefined)" if missing else ""
            )
            method = f"{what_of}; {part.estimate.method}"
            part = replace(part, estimate=part.estimate.model_copy(update={"method": method}))
            if missing and area == 0:  # of any size
                told = f"too few (0 lesions of {missing} of {len(matches)} classes): {HOLDS_LESS}"
                part = with_doubt(part, told)
        estimates[metric] = part
    return estimates


def _resampled(
    values: FloatArray, n: int, patients: float, doubt: str, *, interpolated: bool = False
) -> Part:
    """The mean over seeds of S 1+R values, the first of the set itself.

    Args:
        values: S 1+R.
        n: lesions.
        patients: that have any.
        doubt: what speaks against the interval, "" for nothing.
        interpolated: whether it is an average of interpolated precision.
    """
    replicates = values[:, 1:].mean(axis=0)
    part = part_of_boxes(values[:, 0], replicates, n, patients, interpolated=interpolated)
    return with_doubt(part, doubt)


def _rarity(patients: float) -> str:
    """What is said of an interval that rests on few patients with lesions, "" if they are enough."""
    if patients >= areas.MIN_PER_CLASS:
        return ""
    return f"too few ({patients:.3g} patients with lesions): {ROUGHLY}"


def _crowding(data: ImageSet) -> str:
    """What is said of an interval of false boxes where few patients have most images, "" where they have not."""
    worth = areas.patients_worth(data.patient)
    if worth >= min(data.num_patients, areas.MIN_PER_CLASS):
        return ""
    return f"too few effective patients ({worth:.3g}): {ROUGHLY}"


def _of_images(data: ImageSet, pools: Sequence[Pool]) -> dict[str, Part]:
    """What an image's boxes say of the image."""
    highest, holds = np.zeros((len(pools), data.num_images)), np.zeros(data.num_images, bool)
    spared = np.ones(highest.shape, bool)
    for row, quiet, found in zip(highest, spared, pools, strict=True):
        np.maximum.at(row, found.image, found.score)
        quiet[found.image[found.called]] = False
    holds[pools[0].lesion_image] = True
    cases = _cases(data, np.arange(data.num_images), holds, highest)
    none = np.broadcast_to(~holds, spared.shape)
    return {
        "image_specificity": share(cases, spared, none, "no image without lesions"),
        "image_auc": areas.area(cases),
    }


def _cases(data: ImageSet, image: IntArray, y: BoolArray, p: FloatArray) -> Cases:
    """Things in images as cases of their patients; S N scores."""
    patient = data.patient[image]
    clustered = len(np.unique(patient)) < len(patient)
    return Cases(y, p, p > 0, p > 0, patient, data.num_patients, clustered)


def _froc(data: ImageSet, pools: Sequence[Pool], weights: Weights) -> dict[str, Part]:
    """Sensitivity at each of `FROC_RATES` and their mean.

    The sensitivity at a rate is that of the lowest threshold with no more false positives per image: a threshold
    that exists, where scores are tied, too.
    """
    names = [f"sensitivity_at_{rate:g}_fp" for rate in FROC_RATES]
    n = pools[0].num_lesions
    if not n:
        nowhere = np.full(len(pools), np.nan)
        return {name: undefined("undefined: no lesion", 0, nowhere) for name in ("froc", *names)}
    rates = np.stack([sensitivities(data, found, weights, FROC_RATES) for found in pools])  # S 1+R 7
    patients = count_holders(data, pools[0].lesion_image)
    values = {"froc": rates.mean(axis=2)} | dict(zip(names, np.moveaxis(rates, 2, 0), strict=True))
    doubt = _rarity(patients) or _crowding(data)
    parts = {name: _resampled(value, n, patients, doubt) for name, value in values.items()}
    for name in names:
        value, method = parts[name].by_seed.mean(), parts[name].estimate.method
        errors = min(value, 1 - value) * n
        if errors < MIN_ERRORS - 1e-9 and "too few" not in method:
            parts[name] = with_doubt(parts[name], f"too few errors ({errors:.3g}): {ROUGHLY}")
    return parts


def _sensitivity(data: ImageSet, pools: Sequence[Pool]) -> Part:
    """The share of lesions found by what is called."""
    hits = np.array([data.by_patient(found.image[found.called & found.hit]) for found in pools])  # S P
    lesion_image = np.sort(pools[0].lesion_image)
    # A case for each lesion; of a patient's, the first so many are found: which of them makes no difference.
    owner = data.patient[lesion_image]
    caught = rank_in(owner) < hits[:, owner]
    cases = _cases(data, lesion_image, np.ones(len(owner), bool), caught.astype(np.float64))
    return share(cases, caught, np.ones_like(caught), "no lesion")


def _called(data: ImageSet, pools: Sequence[Pool], weights: Weights) -> dict[str, Part]:
    """What is said of the boxes that are called."""
    # A case for each box that any seed calls.
    called = [np.flatnonzero(found.called) for found in pools]
    seed = np.repeat(np.arange(len(pools)), [len(rows) for rows in called])
    right = np.concatenate([found.hit[rows] for found, rows in zip(pools, called, strict=True)])
    where = np.concatenate([found.image[rows] for found, rows in zip(pools, called, strict=True)])
    own = seed == np.arange(len(pools))[:, None]
    cases = _cases(data, where, right, own.astype(np.float64))
    false = np.array([data.by_patient(where[~right & mine]) for mine in own])  # S P
    by_seed = false.sum(axis=1) / data.num_images
    if by_seed.any():
        images = np.bincount(data.patient, minlength=data.num_patients)
        sums = resampled_sums(weights, np.column_stack([false.mean(axis=0), images]).astype(np.float64))
        rates = sums[1:, 0] / sums[1:, 1]
        name = "false_positives_per_image"
        worth = effective_patients(data.patient)
        rate = on_scale(name, replicated(name, by_seed, rates, data.num_images, worth))
    else:
        # Every resample has none, which proves nothing: the Poisson limit of no event, patients being the trials.
        high = -math.log((1 - LEVEL) / 2) / data.num_patients
        method = "Poisson, n = patients (none)"
        rate = Part(Estimate(value=0.0, low=0.0, high=high, n=data.num_images, method=method), by_seed)
    # False boxes may come in crowds: neither resamples nor Poisson's limit know of one that was not drawn.
    if (holders := int(false.any(axis=0).sum())) < MIN_WITH_FALSE_BOXES:
        # So many patients leave no room for crowds that would matter: at most 5 in 100 have any (Clopper-Pearson).
        word = HOLDS_LESS if data.num_patients < MIN_WITHOUT_FALSE_BOXES else ROUGHLY
        rate = with_doubt(rate, f"too few ({holders} patients with false boxes): {word}")
    else:
        rate = with_doubt(rate, _crowding(data))
    return {
        "sensitivity": _sensitivity(data, pools),
        "precision": share(cases, right & own, own, "no box is called"),
        "false_positives_per_image": rate,
    }
