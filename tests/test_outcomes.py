"""Live metrics equal to counts, and an alarm where a declared value no longer holds, rarely where it does."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from cadx.outcomes import Outcome, live_outcomes


def answered(
    seed: int, number: int, *, sensitivity: float, covered: float = 0.9, ill: float = 0.3
) -> pd.DataFrame:
    """Answers of a binary model with its labels, of a given sensitivity; specificity is 0.9."""
    rng = np.random.default_rng(seed)
    sick = rng.random(number) < ill
    called = np.where(sick, rng.random(number) < sensitivity, rng.random(number) < 0.1)
    p = np.where(called, rng.uniform(0.5, 1, number), rng.uniform(0, 0.5, number))
    right = rng.random(number) < covered
    return pd.DataFrame(
        {
            "prob_well": 1 - p,
            "prob_sick": p,
            "decision": np.where(called, "sick", "well"),
            "label_well": 1.0 - sick,
            "label_sick": sick.astype(float),
            "prediction_set": [["sick" if a == b else "well"] for a, b in zip(sick, right, strict=True)],
        }
    )


def outcomes(answers: pd.DataFrame, *, alpha: float = 0.025, **declared: float) -> list[Outcome]:
    return live_outcomes(
        answers,
        task="binary",
        classes=["well", "sick"],
        positive="sick",
        at_least=declared,
        at_most={},
        alpha=alpha,
    )


def test_live_metrics_are_the_counts_with_their_intervals() -> None:
    answers = answered(1, 300, sensitivity=0.8)
    answers.loc[:9, ["label_well", "label_sick"]] = np.nan
    known = answers.iloc[10:]
    found = outcomes(answers)
    ill = known["label_sick"] == 1
    hits = int((known["decision"][ill] == "sick").sum())
    low, high = proportion_confint(hits, int(ill.sum()), method="wilson")
    by_name = {outcome.name: outcome.estimate for outcome in found}
    estimate = by_name["sensitivity"]
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((hits / ill.sum(), low, high))
    assert by_name["auc"].value == pytest.approx(roc_auc_score(ill, known["prob_sick"]))
    for name, estimate in ((o.of, o.estimate) for o in found if o.name == "coverage"):
        sets = known.loc[known[f"label_{name}"] == 1, "prediction_set"]
        assert estimate.value == pytest.approx(np.mean([name in said for said in sets]))
        assert estimate.n == len(sets)


def test_sets_that_the_model_does_not_give_are_not_watched() -> None:
    answers = answered(2, 50, sensitivity=0.9).assign(prediction_set=None)
    assert not [o for o in outcomes(answers, coverage=0.9) if o.name == "coverage"]


def test_a_declared_value_that_no_longer_holds_is_broken_and_others_are_not() -> None:
    found = outcomes(
        answered(3, 600, sensitivity=0.8, covered=0.75), sensitivity=0.95, specificity=0.85, coverage=0.9
    )
    assert {(o.name, o.of) for o in found if o.broken} == {
        ("sensitivity", "sick"),
        ("coverage", "well"),
        ("coverage", "sick"),
    }
    better = outcomes(answered(4, 600, sensitivity=0.99, covered=0.99), sensitivity=0.9, coverage=0.9)
    assert not any(outcome.broken for outcome in better), "better than declared is no alarm"


def test_what_was_seen_in_a_few_patients_breaks_nothing() -> None:
    assert not any(o.broken for o in outcomes(answered(5, 12, sensitivity=0.7), sensitivity=0.95))


def test_declared_values_that_hold_exactly_are_broken_in_few_looks() -> None:
    runs, alpha = 80, 0.1
    alarms = sum(
        any(
            outcome.broken
            for outcome in outcomes(
                answered(run, 400, sensitivity=0.9),
                alpha=alpha,
                sensitivity=0.9,
                specificity=0.9,
                coverage=0.9,
            )
        )
        for run in range(runs)
    )
    assert 0 < alarms <= stats.binom.ppf(0.999, runs, alpha)


def test_of_several_labels_each_class_is_held_to_what_was_declared() -> None:
    rng = np.random.default_rng(6)
    truth = rng.random((400, 2)) < 0.4
    called = truth & (rng.random((400, 2)) < [0.97, 0.6])
    answers = pd.DataFrame({"prediction_set": [None] * 400})
    for k, name in enumerate(("stripe", "dot")):
        answers[f"label_{name}"] = truth[:, k].astype(float)
        answers[f"decision_{name}"] = called[:, k]
        answers[f"prob_{name}"] = np.where(called[:, k], 0.8, 0.2)
    for task in ("multilabel", "detection"):
        found = live_outcomes(
            answers,
            task=task,
            classes=["stripe", "dot"],
            positive=None,
            at_least={"sensitivity": 0.9},
            at_most={},
            alpha=0.025,
        )
        assert [(o.name, o.of) for o in found if o.broken] == [("sensitivity", "dot")]
        assert any(o.name.startswith("calibration") for o in found) == (task == "multilabel")


def test_of_ten_patients_eight_found_do_not_break_a_target_of_95_percent() -> None:
    """Wilson's interval would: its upper end is .943, and chance gives eight or fewer once in twelve."""
    answers = answered(7, 10, sensitivity=1.0, ill=1.0)
    answers["decision"] = ["well"] * 2 + ["sick"] * 8
    assert not any(outcome.broken for outcome in outcomes(answers, sensitivity=0.95))
    answers["decision"] = ["well"] * 5 + ["sick"] * 5
    assert [outcome.name for outcome in outcomes(answers, sensitivity=0.95) if outcome.broken] == [
        "sensitivity"
    ]
