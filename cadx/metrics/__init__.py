"""Classification metrics, each with a 95 % interval that knows which images share a patient.

How an interval is made (`Estimate.method` says which one it was):

    proportions   Wilson's score interval (Wilson 1927, JASA 22:209). Patients with several images, or
                  several seeds, enter through the effective sample size: the variance of the ratio
                  estimator over patients (Rao and Scott 1992, Biometrics 48:577; Saha, Miller and Wang
                  2016, Int J Biostat 12), with Student's t on the number of patients less one.
    AUC           DeLong's variance (DeLong et al. 1988, Biometrics 44:837), for clusters Obuchowski's (1997,
                  Biometrics 53:567), on the logit scale (Pepe 2003, section 5.2) with Student's t, whose degrees of
                  freedom are few where a few patients make most of the variance (Pan and Wall 2002, Stat Med
                  21:1429): z held the truth in 91.5 % of sets of 60 positives with an AUC of .95. Where it
                  vanishes (an AUC of 0 or 1, constant scores, a single positive) Newcombe's score interval
                  (2006, Stat Med 25:559, method 5).
    means         of these (macro averages, balanced accuracy): MOVER, the limits of the parts joined by the
                  correlation of the parts over patients (Zou and Donner 2008, Stat Med 27:1693).
    calibration   slope and intercept: Wald with the sandwich variance over patients (Liang and Zeger 1986,
                  Biometrika 73:13).
    the rest      bootstrap of whole patients (Rutter 2000, Acad Radiol 7:413; Field and Welsh 2007, JRSS B
                  69:369): its standard deviation with t on the logit scale, of the log loss on the log scale
                  (Boyd et al. 2013, LNAI 8190:451), of the calibration error its percentiles. Not stratified
                  by outcome: in a cohort the number of positives is itself random, and a patient with images
                  of both outcomes belongs to no stratum.

Several seeds are several models scored on the same patients. The value is the mean over seeds; the
interval covers the sampling of patients, which is the same for all seeds; the spread between seeds is
reported beside it, never inside it. Closed forms serve seeds too, because percentiles fail near 1: with 3
seeds, 60 positives and a sensitivity of .95 they cover .89 to .91, Wilson on the effective n .93 to .95
(20,000 simulated sets, correlation between seeds .3 to .9).

Invariants: what is undefined has the value None and a method that says why, never NaN; equal inputs and
seed give equal output.
"""

from cadx.metrics.areas import auc, delong_difference
from cadx.metrics.decisions import decision_curve, with_chosen_threshold
from cadx.metrics.estimates import LEVEL, Difference, Meaning, resample, wilson
from cadx.metrics.limits import doubted
from cadx.metrics.proportions import at_threshold, predictive_values, share_of, tango_difference
from cadx.metrics.ranking import precision_recall, roc
from cadx.metrics.reliability import calibration_curve
from cadx.metrics.scoring import (
    METRICS,
    Confusion,
    Gap,
    Scores,
    Subgroup,
    calculate_medical_classification_metrics,
    corrected,
    gap_between,
    score,
    score_subgroups,
    subgroup_gaps,
)
from cadx.types import Estimate

__all__ = [
    "LEVEL",
    "METRICS",
    "Confusion",
    "Difference",
    "Estimate",
    "Gap",
    "Meaning",
    "Scores",
    "Subgroup",
    "at_threshold",
    "auc",
    "calculate_medical_classification_metrics",
    "calibration_curve",
    "corrected",
    "decision_curve",
    "delong_difference",
    "doubted",
    "gap_between",
    "precision_recall",
    "predictive_values",
    "resample",
    "roc",
    "score",
    "score_subgroups",
    "share_of",
    "subgroup_gaps",
    "tango_difference",
    "wilson",
    "with_chosen_threshold",
]
