"""What decisions are worth: the operating point's own doubt, other prevalences, net benefit, prediction sets, gaps.

Each part is one function that gives what metrics.json holds, and one that shows it on a page, in words that need no
statistician.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cadx import conformal
from cadx.evaluating.evaluation import dump
from cadx.explaining import title
from cadx.metrics import (
    Estimate,
    Gap,
    Scores,
    decision_curve,
    predictive_values,
    with_chosen_threshold,
)
from cadx.metrics.decisions import mean_share_of, mean_size_of
from cadx.predicting.table import Arrays, PredictionsInfo
from cadx.reporting import INK, MUTED, Page, panels

PREVALENCES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""At which predictive values are told: from a screening programme to a referral clinic."""
MINIMUM_COVERED = 20
"""Cases of a class, or at a site, below which no coverage of prediction sets is told."""


def called_classes(info: PredictionsInfo) -> list[str]:
    """The classes that have a threshold."""
    return [name for name in info.classes if name in info.thresholds]


def operating_point(infos: Sequence[PredictionsInfo], rows: Arrays) -> dict[str, dict[str, Estimate]]:
    """Class -> the threshold's spread, and sensitivity and specificity that count how it was chosen.

    Of several seeds all three are means. Empty for classes without a threshold, and of bundles that do not know the
    spread.

    Args:
        infos: of each seed.
        rows: of all seeds, S N K.
    """
    found = {}
    for name in called_classes(infos[0]):
        choices = [info.resampled_thresholds.get(name, ()) for info in infos]
        # Each resample of the calibration patients chooses for every seed.
        if not choices[0] or len({len(one) for one in choices}) > 1:
            continue
        column = infos[0].classes.index(name)
        thresholds = [info.thresholds[name] for info in infos]
        threshold, resampled = float(np.mean(thresholds)), np.mean(choices, axis=0)
        low, high = np.quantile(resampled, [0.025, 0.975])
        spread = Estimate(
            value=threshold,
            low=min(float(low), threshold),
            high=max(float(high), threshold),
            n=len(resampled),
            method=f"spread over {len(resampled)} resamples of the calibration patients, no confidence interval",
        )
        reached = with_chosen_threshold(
            rows.labels[:, column], rows.probabilities[..., column], thresholds, choices, rows.patients
        )
        found[name] = {"threshold": spread, **reached}
    return found


def show_operating_point(
    page: Page, found: Mapping[str, Mapping[str, Estimate]], by_class: Mapping[str, Mapping[str, Estimate]]
) -> None:
    """Add how sure the operating point is."""
    if not found:
        return
    page.table(
        [
            {
                "class": name,
                "threshold (its spread)": parts["threshold"],
                "metric": metric,
                "threshold fixed": by_class[name][metric],
                "its choice counted": parts[metric],
            }
            for name, parts in found.items()
            for metric in ("sensitivity", "specificity")
        ],
        "The threshold was chosen on the patients of the calibration split; other patients would have led to another "
        "one. Fixed: how far this model may be off. Its choice counted: how far the recipe may be off, "
        "calibrated anew.",
    )


def at_other_prevalences(by_class: Mapping[str, Estimate]) -> dict[str, dict[str, Estimate]]:
    """Prevalence, as text -> PPV and NPV there, from one class's sensitivity and specificity."""
    return {
        f"{prevalence:g}": predictive_values(by_class["sensitivity"], by_class["specificity"], prevalence)
        for prevalence in PREVALENCES
    }


def show_prevalences(page: Page, name: str, found: Mapping[str, Mapping[str, Estimate]]) -> None:
    """Add a table of predictive values."""
    page.table(
        [
            {
                "share of patients who are ill": f"{float(prevalence):.0%}",
                "PPV": values["ppv"],
                "NPV": values["npv"],
            }
            for prevalence, values in found.items()
        ],
        f"Where {name!r} is rarer or more frequent than here. PPV: the share of calls that are right; NPV: "
        "the share of "
        "all-clears that are right. Sensitivity and specificity are taken to be the same there.",
    )


def net_benefit(info: PredictionsInfo, rows: Arrays, classes: Sequence[str]) -> dict[str, Any]:
    """Class -> its decision curve, as lists; of rows S N K the mean over seeds."""
    curves = {}
    for name in classes:
        column = info.classes.index(name)
        labels = rows.labels[:, column]
        if not (labels == 1).any():
            continue
        curve = decision_curve(
            labels, rows.probabilities[..., column], patients=rows.patients, seed=info.seed
        )
        curves[name] = {field: values.round(6).tolist() for field, values in curve._asdict().items()}
    return curves


def show_net_benefit(page: Page, infos: Sequence[PredictionsInfo], curves: Mapping[str, Any]) -> None:
    """Add the decision curves; `infos` are those of each seed."""
    info = infos[0]
    if not curves:
        return
    page.section("Net benefit")
    page.text(
        "Whether calls made by the model do more good than calling everybody or nobody. A reader who acts "
        "when the risk is "
        "at least 10 % accepts nine false alarms for one patient found; each false alarm then costs a ninth "
        "of a patient "
        "found. The model is worth using at the risks where its curve lies above both others."
    )
    columns = min(len(curves), 3)
    drawing, axes = panels(
        2.9 * columns + 1.2 * (columns == 1),
        2.7 * -(-len(curves) // columns),
        columns=columns,
        rows=-(-len(curves) // columns),
    )
    for one, (name, curve) in zip(axes, curves.items(), strict=False):
        at = curve["threshold"]
        one.plot(at, curve["model"], label="model")
        one.fill_between(at, curve["low"], curve["high"], alpha=0.16, linewidth=0)
        one.plot(
            at, curve["everyone"], color=MUTED, linewidth=1, linestyle=(0, (4, 3)), label="call everybody"
        )
        one.axhline(0, color=INK, linewidth=1, label="call nobody")
        top = max([*curve["high"], *curve["model"], 0.02])
        one.set(
            title=name,
            xlim=(0, 1),
            ylim=(-0.25 * top, 1.1 * top),
            xlabel="risk at which one acts",
            ylabel="net benefit",
        )
        for seed in infos:
            if name in seed.thresholds:
                one.axvline(seed.thresholds[name], color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    for one in axes[len(curves) :]:
        one.set_axis_off()
    lines, names = axes[0].get_legend_handles_labels()
    drawing.legend(lines, names, loc="outside lower center", ncols=len(names), fontsize=8, frameon=False)
    points = "the operating point" if len(infos) == 1 else "each seed's operating point"
    dotted = f" Dotted: {points}." if info.thresholds else ""
    page.figure(
        drawing,
        "Net benefit: true positives a case, less false positives weighed as above. Band: pointwise 95 % "
        "limits, bootstrap "
        f"of {'patients' if info.clustered else 'images'}; too narrow where few cases are called.{dotted}",
        alt=f"Decision curves of {', '.join(curves)}",
    )


def coverage(infos: Sequence[PredictionsInfo], rows: Arrays, sites: Sequence[str]) -> dict[str, Any]:
    """How often prediction sets hold the truth, by class and by site, and how much they leave to a person.

    Of several seeds all of it is the mean.

    Args:
        infos: whose `conformal` is told, of each seed.
        rows: cases as they were answered, never aggregated, S N K.
        sites: of each case, "" = unknown.

    Returns:
        nominal, by_class and by_site (name -> Estimate, each patient weighing one as in `conformal.fit`), expected
        (class -> (low, high) that the size of the calibration split explains), mean_size and referred (Estimates, of
        images); empty where the bundle has no sets.
    """
    classes, sets = infos[0].classes, [info.conformal for info in infos if info.conformal is not None]
    if len(sets) < len(infos):
        return {}
    there = np.stack(
        [conformal.possible(p, one, classes) for p, one in zip(rows.probabilities, sets, strict=True)]
    )
    refer = np.stack(
        [
            conformal.refers(p, calls, one, classes)
            for p, calls, one in zip(rows.probabilities, rows.decisions, sets, strict=True)
        ]
    )
    truth, everyone = rows.labels == 1, np.ones(len(rows.labels), dtype=bool)

    def estimate(right: np.ndarray, which: np.ndarray, *, each_patient: bool = True) -> Estimate:
        if which.sum() < MINIMUM_COVERED:
            n = int(which.sum())
            return Estimate(
                value=None, low=None, high=None, n=n, method=f"too few: {n} cases, {MINIMUM_COVERED} needed"
            )
        patients = None if rows.patients is None else rows.patients[which]
        return mean_share_of(right[:, which], patients, each_patient=each_patient)

    # A case is covered if every class that it has is possible.
    covered, labelled = (there | ~truth).all(axis=2), truth.any(axis=1)
    places = np.asarray(sites, dtype=object)
    return {
        "nominal": sets[0].coverage,
        "by_class": {
            name: estimate(there[..., column], truth[:, column]) for column, name in enumerate(classes)
        },
        "by_site": {
            str(site) or "unknown": estimate(covered, labelled & (places == site))
            for site in sorted(set(places))
        },
        "expected": {
            name: conformal.expected_range(sets[0].patients.get(name, 0), sets[0].coverage)
            for name in classes
        },
        "mean_size": mean_size_of(there.sum(axis=2), len(classes), rows.patients),
        "referred": estimate(refer, everyone, each_patient=False),
    }


def coverage_record(found: Mapping[str, Any]) -> dict[str, Any]:
    """`coverage` as JSON holds it."""
    if not found:
        return {}
    by_name = {field: dump(found[field]) for field in ("by_class", "by_site")}
    return {
        **found,
        **by_name,
        "expected": {name: list(limits) for name, limits in found["expected"].items()},
        **{field: found[field].model_dump(mode="json") for field in ("mean_size", "referred")},
    }


def show_coverage(page: Page, found: Mapping[str, Any]) -> None:
    """Add the section on prediction sets."""
    if not found:
        return
    page.section("Prediction sets")
    nominal = found["nominal"]
    page.text(
        "Beside its decision the model gives the set of all classes that it cannot rule out. It is made to "
        "hold the truth in "
        f"{nominal:.0%} of cases of each class, where each patient weighs one, shared out among the images, for "
        "new patients like those of the calibration split. Where "
        "the set does not say "
        "exactly what was decided, the answer is marked for a person to look at (refer)."
    )
    page.table(
        [
            {
                "truth": name,
                "sets that hold it": estimate,
                "n": estimate.n,
                "to be expected": "anything: calibration split too small"
                if found["expected"][name][0] == 1
                else "{:.3f} to {:.3f}".format(*found["expected"][name]),
                "as promised": _verdict(estimate, found["expected"][name]),
            }
            for name, estimate in found["by_class"].items()
        ],
        "To be expected: where this share lies in 95 of 100 calibrations on as many patients, if the "
        "patients are alike.",
    )
    page.table(
        [
            {"site": name, "sets that hold the truth": estimate, "n": estimate.n}
            for name, estimate in found["by_site"].items()
        ],
        f"Sites apart, with no promise: a site whose interval lies below {nominal:.0%} is unlike the "
        "calibration split.",
    )
    page.table(
        [
            {"of all cases": "classes in a set, on average", "value": found["mean_size"]},
            {"of all cases": "share of the answers that are left to a person", "value": found["referred"]},
        ],
        "Smaller sets tell more, down to one class. A person is asked where the set does not say exactly what was "
        "decided.",
    )


def _verdict(estimate: Estimate, expected: tuple[float, float]) -> str:
    if estimate.value is None or estimate.low is None or estimate.high is None:
        return estimate.method
    if estimate.high < expected[0]:
        return "no: less than promised, these patients are unlike the calibration split's"
    if estimate.low > expected[1]:
        return "more than promised"
    return "yes"


def gaps_record(found: Mapping[str, Mapping[str, Mapping[str, Gap]]]) -> dict[str, Any]:
    """`subgroup_gaps` as JSON holds them."""
    return {
        attribute: {value: dump(gaps) for value, gaps in groups.items()}
        for attribute, groups in found.items()
    }


def show_gaps(page: Page, found: Mapping[str, Mapping[str, Mapping[str, Gap]]]) -> None:
    """Add a table of how far each subgroup is from the others, the surest differences first."""
    rows = [
        (gap.p, gap.p_adjusted, gap, attribute, value, metric)
        for attribute, groups in found.items()
        for value, gaps in groups.items()
        for metric, gap in gaps.items()
        if gap.p_adjusted is not None and gap.p is not None
    ]
    if not rows:
        return
    rows.sort(key=lambda row: (row[0], *row[3:]))
    page.table(
        [
            {
                "subgroup": f"{attribute}: {value}",
                "metric": title(metric),
                "difference from all others": Estimate(**gap.model_dump(exclude={"p", "p_adjusted"})),
                "p": p,
                "p, corrected": adjusted,
                "more than chance": "yes" if adjusted < 0.05 else "not shown",
            }
            for p, adjusted, gap, attribute, value, metric in rows
        ],
        f"The {len(rows)} comparisons for which there are enough patients. p: how often chance alone makes "
        "such a difference. "
        "Corrected by Holm's rule: with many comparisons some look striking by chance. Not shown does not "
        "mean equal.",
    )


def show_calibration(page: Page, scores: Scores) -> None:
    """Add what the calibration metrics mean together."""
    error, chance = (scores.metrics[name] for name in ("expected_calibration_error", "ece_if_calibrated"))
    if error.value is None or chance.value is None or chance.high is None or chance.low is None:
        return
    judged = "within what" if error.value <= chance.high else "more than"
    page.text(
        f"Calibration error (ECE): probabilities miss the observed shares by {error.value:.3f} on average. "
        "Were every probability "
        f"true, chance alone would make it {chance.value:.3f} ({chance.low:.3f} to {chance.high:.3f}) in a "
        "set of this size: the "
        f"error is {judged} chance makes. A calibration slope of 1 and an intercept of 0 mean that risks are "
        "neither too extreme "
        "nor too high or low on the whole."
    )
