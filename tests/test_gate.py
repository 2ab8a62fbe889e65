"""The gate: what it lets through, what it refuses, and that a refusal is a result with every reason."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy import special
from test_evaluate import Run, prepare
from test_verifying import make_key

from cadx.bundle import Bundle
from cadx.datasets import read_splits, write_splits
from cadx.evaluating import Classification, Settings
from cadx.files import digest_path, write_json
from cadx.gating import Decision, ceiling, floor, not_inferior, read_decision
from cadx.metrics import Difference
from cadx.predicting.table import answer_table, decide, read_predictions, write_predictions
from cadx.signing import Review, write_review
from cadx.types import Estimate
from components.gate import GateParams, gate

EASY = {"auc": 0.01, "sensitivity": 0.01}


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Any]]:
    """A bundle, and its metrics on the test split."""
    folder = tmp_path_factory.mktemp("run")
    run = prepare(folder)
    return run, run.evaluate(folder / "scored", split="test", minimum_n=5)


@pytest.fixture
def judge(ready: tuple[Run, dict[str, Any]], tmp_path: Path) -> Callable[..., Decision]:
    """Judge the bundle by its metrics, changed as asked."""
    run, record = ready

    def run_gate(
        changes: dict[str, Any] | None = None, given: dict[str, Path] | None = None, **params: Any
    ) -> Decision:
        write_json(tmp_path / "metrics.json", record | (changes or {}))
        gate(
            metrics=tmp_path / "metrics.json",
            bundle=run.bundle,
            decision=tmp_path / "decision.json",
            **(given or {}),
            params=GateParams(**params),
        )
        return read_decision(tmp_path / "decision.json")

    return run_gate


def with_metric(record: dict[str, Any], name: str, **values: Any) -> dict[str, Any]:
    return {"metrics": record["metrics"] | {name: record["metrics"][name] | values}}


def test_a_model_within_its_bounds_is_promoted_and_named_by_digest(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    decision = judge(at_least=EASY)
    assert decision.promote
    assert decision.reasons == ()
    assert decision.bundle == Bundle(ready[0].bundle).digest
    assert decision.metrics == digest_path(tmp_path / "metrics.json")


def test_the_lower_end_counts_and_not_the_value(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    lucky = with_metric(ready[1], "auc", value=0.97, low=0.71, high=0.999, method="DeLong (logit)")
    decision = judge(lucky, at_least={"auc": 0.9})
    assert not decision.promote
    assert decision.reasons == (
        "AUC is 0.970, its 95 % interval reaches down to 0.710: beyond the floor of 0.9",
    )
    assert judge(lucky, at_least={"auc": 0.7}).promote


def test_the_upper_end_counts_where_less_is_better(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    wide = with_metric(ready[1], "brier", value=0.02, low=0.01, high=0.12, method="bootstrap")
    assert (
        "up to 0.120: beyond the ceiling of 0.1"
        in judge(wide, at_most={"brier": 0.1}, at_least={}).reasons[0]
    )
    assert judge(wide, at_most={"brier": 0.12}, at_least={}).promote


def test_an_interval_that_does_not_hold_meets_no_bound_and_other_doubts_are_told() -> None:
    told = "too few (5 in the rarer class): holds the truth less often than 95 %"
    perfect = Estimate(value=0.0, low=0.0, high=0.0, n=58, method=f"patient bootstrap; {told}")
    found = ceiling("Brier score", perfect, 0.08)
    assert not found.passed
    assert found.reason.endswith(f"reaches up to 0.000: within the ceiling of 0.08, but {told}")
    gap = Difference(value=0.0, low=-0.01, high=0.01, p=1.0, n=58, method=f"DeLong, paired; {told}")
    assert not not_inferior("AUC", gap, 0.02).passed
    rough = "too few (5 in the rarer class): holds the truth only roughly"
    found = floor("AUC", Estimate(value=1.0, low=0.9, high=1.0, n=58, method=f"Newcombe score; {rough}"), 0.8)
    assert found.passed
    assert found.reason.endswith(f"within the floor of 0.8; {rough}")
    gap = gap.model_copy(update={"method": "DeLong, paired"})
    assert not_inferior("AUC", gap, 0.02).reason.endswith("within the margin of 0.02")


def test_every_reason_is_given_not_the_first_alone(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    poor = {
        "metrics": {n: e | {"low": 0.1, "high": 0.5, "value": 0.3} for n, e in ready[1]["metrics"].items()}
    }
    reasons = judge(poor, at_least={"auc": 0.8, "sensitivity": 0.8}, at_most={"brier": 0.2}).reasons
    assert [reason.split(" is ")[0] for reason in reasons] == ["AUC", "sensitivity", "Brier score"]


def test_the_order_of_bounds_decides_nothing(judge: Callable[..., Decision]) -> None:
    bounds = {"sensitivity": 0.1, "auc": 0.5, "specificity": 0.1}
    decision = judge(at_least=bounds)
    assert decision == judge(at_least=dict(sorted(bounds.items())))


def test_a_metric_without_an_interval_is_no_evidence(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    bare = with_metric(ready[1], "auc", value=0.99, low=None, high=None, method="one class only")
    assert judge(bare, at_least={"auc": 0.5}).reasons == (
        "AUC has no interval (one class only), but the floor of 0.5 is asked",
    )


def test_a_weak_subgroup_stops_a_model_that_is_good_on_average(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    good = {"value": 0.95, "low": 0.9, "high": 0.99, "n": 90, "method": "DeLong"}
    none = {"value": None, "low": None, "high": None, "n": 2, "method": "too few"}
    groups = {
        "north": {"n": 90, "n_positive": 20, "sensitivity": good, "specificity": good, "auc": good},
        "south": {
            "n": 90,
            "n_positive": 20,
            "sensitivity": good,
            "specificity": good,
            "auc": good | {"low": 0.6},
        },
        "east": {"n": 9, "n_positive": 1, "sensitivity": none, "specificity": none, "auc": none},
    }
    decision = judge({"by_subgroup": {"site": groups}}, at_least=EASY, subgroup_at_least={"auc": 0.7})
    assert decision.reasons == (
        "AUC in site south is 0.950, its 95 % interval reaches down to 0.600: beyond the floor of 0.7",
    )
    (small,) = (check for check in decision.checks if "east" in check.what)
    assert small.reason == "AUC in site east was not judged: too few"


def test_numbers_of_a_split_that_choices_were_made_on_do_not_count(judge: Callable[..., Decision]) -> None:
    assert "scored on the val split" in judge({"split": "val"}, at_least=EASY).reasons[0]


def test_other_splits_or_another_version_of_the_data_are_a_leak_unless_declared_otherwise(
    judge: Callable[..., Decision],
) -> None:
    other = "sha256:" + "0" * 64
    assert "patients may be in both" in judge({"splits": other}, at_least=EASY).reasons[0]
    elsewhere = {"splits": other, "dataset": other}
    assert "patients may be in both" in judge(elsewhere, at_least=EASY).reasons[0]
    assert judge(elsewhere, at_least=EASY, other_dataset=True).promote
    assert not judge({"splits": other}, at_least=EASY, other_dataset=True).promote


def test_a_floor_for_subgroups_is_not_met_by_having_none(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    decision = judge({"by_subgroup": {}}, at_least=EASY, subgroup_at_least={"auc": 0.5})
    assert decision.reasons == ("AUC in subgroups was asked for, but none is large enough to judge",)


def test_a_miscalibrated_model_is_refused_though_it_ranks_well(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    bounds = {
        "at_least": EASY | {"calibration_slope": 0.7},
        "at_most": {"calibration_slope": 1.4, "calibration_intercept": 0.5},
    }
    fair = ready[1]["metrics"] | {
        "calibration_slope": {"value": 1.0, "low": 0.8, "high": 1.2, "n": 90, "method": "Wald"},
        "calibration_intercept": {"value": 0.0, "low": -0.2, "high": 0.2, "n": 90, "method": "Wald"},
    }
    assert judge({"metrics": fair}, **bounds).promote
    overconfident = fair["calibration_slope"] | {"value": 0.6, "low": 0.45, "high": 0.8}
    reasons = judge({"metrics": fair | {"calibration_slope": overconfident}}, **bounds).reasons
    assert [reason.split(" is ")[0] for reason in reasons] == ["calibration slope"]


def evaluated(run: Run, *, change: str = "") -> dict[str, Any]:
    """What an evaluation says of calibrated answers about 500 patients of three sites, changed as named.

    `collapsed`: at site south five in six positives are missed. `sharpened`: logits are three times the true ones.
    `no positives`: site east holds none.
    """
    _, info = read_predictions(run.bundle.parent / "scored" / "predictions.parquet")
    rng = np.random.default_rng(0)
    n, logits = 500, rng.normal(0, 3, 500)
    ill = rng.random(n) < special.expit(logits)
    site = np.array(["north"] * 260 + ["south"] * 120 + ["east"] * 120)
    if change == "collapsed":
        logits = np.where(ill & (site == "south") & (rng.random(n) < 5 / 6), -2.0, logits)
    elif change == "sharpened":
        logits = 3 * logits
    elif change == "no positives":
        ill &= site != "east"
    p = special.expit(logits)
    p = np.stack([1 - p, p], axis=1)
    info = info.model_copy(update={"thresholds": {"opacity": 0.5}, "resampled_thresholds": {}})
    assert info.classes == ("normal", "opacity")
    calls = decide(p, info.thresholds, info.task, info.classes, info.positive)
    known = {
        "sample_id": [f"n{row}" for row in range(n)], "patient": [f"p{row}" for row in range(n)], "site": site,
        "scanner": "", "age": float("nan"), "sex": "", "label_normal": 1.0 - ill, "label_opacity": 1.0 * ill,
    }  # fmt: skip
    answers = answer_table(p, calls, info.task, info.classes)
    frame = pd.concat([pd.DataFrame(known), answers], axis=1)
    settings = Settings(resamples=100, subgroups=("site",), minimum_n=20)
    return Classification(frame, info, settings).record()


REAL: dict[str, Any] = {
    "at_least": {"auc": 0.8, "sensitivity": 0.6, "calibration_slope": 0.7},
    "at_most": {"calibration_slope": 1.4},
    "subgroup_at_least": {"sensitivity": 0.6},
}


def test_a_site_where_lesions_are_missed_is_refused_by_its_name(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    sound = judge(evaluated(ready[0]), **REAL)
    assert sound.promote
    assert sound.not_judged == ()
    # What is asked of all together still holds.
    bounds = REAL | {"at_least": {"auc": 0.7, "sensitivity": 0.6}, "at_most": {}}
    (reason,) = judge(evaluated(ready[0], change="collapsed"), **bounds).reasons
    assert reason.startswith("sensitivity in site south is 0.1")
    assert reason.endswith("beyond the floor of 0.6")


def test_answers_that_are_too_sure_are_refused_though_they_rank_as_well(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    record = evaluated(ready[0], change="sharpened")
    fair = evaluated(ready[0])["metrics"]
    assert record["metrics"]["auc"] == fair["auc"]
    assert record["metrics"]["sensitivity"] == fair["sensitivity"]
    (reason,) = judge(record, **REAL).reasons
    assert reason.startswith("calibration slope is 0.3")


def test_a_subgroup_of_one_class_is_named_and_not_judged(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]]
) -> None:
    record = evaluated(ready[0], change="no positives")
    bounds = {"at_least": EASY, "subgroup_at_least": {"sensitivity": 0.6, "auc": 0.7, "npv": 0.5}}
    decision = judge(record, **bounds)
    assert decision.promote
    why = "was not judged: too few: 0 patients with positives, 20 needed"
    assert decision.not_judged == tuple(
        f"{name} in site east {why}" for name in ("AUC", "sensitivity", "NPV")
    )
    assert decision.why.endswith("; 3 floors of subgroups could not be judged")
    assert "not_judged" not in decision.model_dump(), "the checks say it already"
    # Where it is the only one, nothing was shown.
    alone = {"by_subgroup": {"site": {"east": record["by_subgroup"]["site"]["east"]}}}
    assert not judge(record | alone, **bounds).promote


def judged_data(run: Run, folder: Path, *, leak: bool = False, **validation: Any) -> dict[str, Path]:
    """Dataset, splits and validation as the gate takes them; with a patient of train in test, if asked."""
    frame = read_splits(run.splits)
    if leak:
        frame.loc[frame["sample_id"] == "s0000", "split"] = "test"
    write_splits(folder / "splits.parquet", frame)
    content = {
        "schema": 1, "dataset": digest_path(run.dataset / "dataset.json"), "rules": [], "quarantined": [],
    } | validation  # fmt: skip
    write_json(folder / "validation.json", content)
    return {
        "dataset": run.dataset, "splits": folder / "splits.parquet", "validation": folder / "validation.json",
    }  # fmt: skip


def test_a_leaking_split_is_refused_and_told_by_patients(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    given = judged_data(ready[0], tmp_path)
    assert judge(given=given, at_least=EASY, clean_data=True).promote
    given = judged_data(ready[0], tmp_path, leak=True)
    assert "are not those that were scored" in judge(given=given, at_least=EASY).reasons[0]
    leaky = {"splits": digest_path(given["splits"])}
    reason = "1 patients stand in more than one split: training has seen them; split again, by patient"
    assert reason in judge(leaky, given=given, at_least=EASY).reasons


def test_clean_data_must_be_shown_where_it_is_asked(judge: Callable[..., Decision]) -> None:
    reasons = judge(at_least=EASY, clean_data=True).reasons
    assert ["dataset and splits were not given" in reasons[0], "no validation was given" in reasons[1]] == [
        True
    ] * 2


def test_leaks_that_validation_found_and_left_in_are_refused(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    rule = {
        "name": "duplicate_across_splits",
        "severity": "warn",
        "passed": False,
        "message": "8 copies: a leak",
    }
    given = judged_data(ready[0], tmp_path, rules=[rule])
    assert judge(given=given, at_least=EASY).reasons == (
        "validation found leaks that were left in: 8 copies: a leak",
    )
    kept_out = rule | {"severity": "quarantine"}
    quarantined = [{"sample_id": "s0003", "reason": "a copy"}]
    given = judged_data(ready[0], tmp_path, rules=[kept_out], quarantined=quarantined)
    assert "1 images stand in a split" in judge(given=given, at_least=EASY).reasons[0]
    given = judged_data(ready[0], tmp_path, dataset="sha256:" + "0" * 64)
    assert "another dataset" in judge(given=given, at_least=EASY).reasons[0]


def changed_predictions(source: Path, target: Path, **change: Any) -> Path:
    """The predictions of another bundle, or split, whose probabilities are `blend` parts the labels."""
    frame, info = read_predictions(source)
    blend = change.get("blend", 0.0)
    for name in info.classes:
        frame[f"prob_{name}"] = (1 - blend) * frame[f"prob_{name}"] + blend * frame[f"label_{name}"]
    called = frame["prob_opacity"] >= info.thresholds["opacity"]
    frame["decision"] = called.map({True: "opacity", False: "normal"})
    other = info.model_copy(
        update={
            "bundle": change.get("bundle", "sha256:" + "1" * 64),
            "split": change.get("split", info.split),
        }
    )
    write_predictions(target, frame.iloc[change.get("skip", 0) :], other)
    return target


def test_a_model_must_not_be_worse_than_the_champion_by_more_than_the_margin(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    own = ready[0].bundle.parent / "scored" / "predictions.parquet"
    equal = changed_predictions(own, tmp_path / "equal.parquet")
    better = changed_predictions(own, tmp_path / "better.parquet", blend=0.9)
    margins = {"auc": 0.02, "sensitivity": 0.1}
    decision = judge(given={"predictions": own, "champion": equal}, at_least=EASY, margins={"auc": 0.02})
    assert decision.promote
    assert decision.champion == "sha256:" + "1" * 64
    reasons = judge(given={"predictions": own, "champion": better}, at_least=EASY, margins=margins).reasons
    assert "AUC less the champion's is -0" in reasons[0]
    assert "beyond the margin of 0.02; too few (19 in the rarer class)" in reasons[0]
    # The champion itself, and a first model.
    assert judge(given={"predictions": own, "champion": own}, at_least=EASY, margins=margins).promote
    assert judge(at_least=EASY, margins=margins).promote


def test_a_champion_is_not_replaced_where_no_margin_says_how_much_worse_a_model_may_be(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    own = ready[0].bundle.parent / "scored" / "predictions.parquet"
    better = changed_predictions(own, tmp_path / "better.parquet", blend=0.9)
    decision = judge(given={"predictions": own, "champion": better}, at_least=EASY)
    (reason,) = decision.reasons
    assert "gate.margins is empty; declare there how much worse it may be" in reason
    assert judge(given={"predictions": own, "champion": own}, at_least=EASY).promote, "the champion itself"


def test_the_champion_is_met_on_patients_where_both_declare_them_and_not_at_all_where_one_does(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    """On images the challenger is no worse; on patients, by their highest probability, it is."""
    source = ready[0].bundle.parent / "scored" / "predictions.parquet"
    frame, info = read_predictions(source)
    frame = pd.concat([frame.assign(patient=frame["sample_id"] + f"-{k}") for k in range(8)])
    frame = pd.concat([frame.assign(sample_id=frame["patient"] + f"-{k}") for k in range(5)])
    ill, last = frame["label_opacity"] == 1, frame["sample_id"].str.endswith("-4")
    files, rng = {}, np.random.default_rng(0)
    for name, misled in (("champion", False), ("own", last)):
        sure = np.where(ill, 0.7, 0.3) + 0.6 * (~ill & misled) + rng.normal(0, 0.12, len(frame))
        sure = np.clip(sure, 0, 1)
        answers = frame.assign(prob_opacity=sure, prob_normal=1 - sure)
        answers["decision"] = np.where(sure >= info.thresholds["opacity"], "opacity", "normal")
        bundle = info.bundle if name == "own" else "sha256:" + "1" * 64
        for how in ("none", "max"):
            files[name, how] = tmp_path / f"{name}-{how}.parquet"
            changed = info.model_copy(update={"bundle": bundle, "aggregate": how, "clustered": True})
            write_predictions(files[name, how], answers, changed)

    def meet(own: str, champion: str, metrics: str) -> Decision:
        given = {"predictions": files["own", own], "champion": files["champion", champion]}
        scored = {"aggregate": metrics, "predictions": digest_path(files["own", own])}
        return judge(scored, given=given, at_least=EASY, margins={"auc": 0.6})

    assert meet("none", "none", "none").reasons == ()
    (reason,) = meet("max", "max", "max").reasons
    assert reason.startswith("AUC less the champion's is -0.")
    (reason,) = meet("max", "none", "max").reasons
    assert "the first declares evaluate.aggregate max, the second none" in reason
    (reason,) = meet("none", "none", "max").reasons
    assert "declares evaluate.aggregate none, but the metrics are of max" in reason


def test_the_champion_is_met_by_the_very_answers_that_were_scored(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    own = ready[0].bundle.parent / "scored" / "predictions.parquet"
    bundle = Bundle(ready[0].bundle).digest
    better = changed_predictions(own, tmp_path / "better.parquet", blend=0.9)
    edited = changed_predictions(own, tmp_path / "edited.parquet", blend=0.9, bundle=bundle)
    on_val = {
        name: changed_predictions(own, tmp_path / f"{name}-val.parquet", bundle=named, split="val")
        for name, named in (("predictions", bundle), ("champion", "sha256:" + "1" * 64))
    }
    for given, named, why in (
        ({"predictions": edited}, edited, "is not the file that the metrics were made from"),
        (on_val, on_val["predictions"], "is of val, but the metrics are of test"),
        ({"champion": on_val["champion"]}, on_val["champion"], "is of val, but the metrics are of test"),
    ):
        given = {"predictions": own, "champion": better} | given
        (reason,) = judge(given=given, at_least=EASY, margins={"auc": 0.02}).reasons
        assert reason == f"cannot be compared with the champion: {named} {why}; evaluate again"


def test_a_champion_of_other_patients_is_no_yardstick(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    own = ready[0].bundle.parent / "scored" / "predictions.parquet"
    fewer = changed_predictions(own, tmp_path / "fewer.parquet", skip=5)
    (reason,) = judge(
        given={"predictions": own, "champion": fewer}, at_least=EASY, margins={"auc": 0.1}
    ).reasons
    assert reason.startswith("cannot be compared with the champion: the two were scored on other images")
    with pytest.raises(ValueError, match="answers of another bundle"):
        judge(given={"predictions": fewer, "champion": fewer}, at_least=EASY, margins={"auc": 0.1})
    with pytest.raises(ValueError, match="--champion without --predictions"):
        judge(given={"champion": fewer}, at_least=EASY, margins={"auc": 0.1})


def test_a_reviewer_must_have_signed_for_these_numbers_where_one_is_asked(
    judge: Callable[..., Decision], ready: tuple[Run, dict[str, Any]], tmp_path: Path
) -> None:
    private, public = make_key(tmp_path)
    asked = {"at_least": EASY, "reviewers": {"Dr. Rey": public.read_text()}}
    assert judge(**asked).reasons == ("no reviewer has signed off; asked for is one of Dr. Rey",)
    numbers = digest_path(tmp_path / "metrics.json")
    review = Review(
        bundle=Bundle(ready[0].bundle).digest, metrics=numbers, reviewer="Dr. Rey", statement="Read."
    )
    write_review(tmp_path / "review", review, private)
    decision = judge(given={"review": tmp_path / "review"}, **asked)
    assert decision.promote
    assert decision.reviewer == "Dr. Rey"
    changed = judge({"n_patients": 9}, given={"review": tmp_path / "review"}, **asked)
    assert changed.reasons == ("the sign-off does not count: signed for other numbers than these",)
    other = asked | {"reviewers": {"Dr. Rey": make_key(tmp_path, "other")[1].read_text()}}
    forged = judge(given={"review": tmp_path / "review"}, **other)
    assert "signed with another key" in forged.reasons[0]
    assert forged.reviewer is None, "a name that anybody can write is no signature"


def test_metrics_of_boxes_can_be_bounded() -> None:
    GateParams(at_least={"ap50": 0.5, "froc": 0.6}, at_most={"false_positives_per_image": 1.0})
    with pytest.raises(ValidationError, match="lower is better there"):
        GateParams(at_least={"false_positives_per_image": 1.0})


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"at_least": {"brier": 0.08}}, "brier: lower is better there"),
        ({"at_most": {"auc": 0.9}}, "auc: higher is better there"),
        ({"at_most": {"brier": float("inf")}}, "finite number"),
        ({"at_most": {"brier": 8}}, "brier: 8 asks nothing"),
        ({"at_most": {"log_loss": -0.1}}, "log_loss: -0.1 is below 0"),
        ({"at_least": {}}, "a gate that asks nothing"),
        ({"margins": {"auc": -0.02}}, "is no margin"),
        ({"at_least": {"auc": 95}}, "auc: 95 is no share of 1"),
        ({"subgroup_at_least": {"sensitivity": -1}}, "sensitivity: -1 is no share of 1"),
    ],
)
def test_bounds_that_could_not_stop_anything_are_refused(bounds: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GateParams(**bounds)


@pytest.mark.parametrize("text", ["[1]", "<html>", '{"schema": 99}', ""])
def test_a_file_that_is_no_metrics_gets_one_line_with_its_name(
    ready: tuple[Run, dict[str, Any]], tmp_path: Path, text: str
) -> None:
    (tmp_path / "m.json").write_text(text)
    with pytest.raises(ValueError, match=r"m\.json: no metrics of one scoring") as caught:
        gate(
            metrics=tmp_path / "m.json",
            bundle=ready[0].bundle,
            decision=tmp_path / "d.json",
            params=GateParams(),
        )
    assert "\n" not in str(caught.value)


def test_numbers_of_another_bundle_are_a_mistake_and_leave_nothing(
    judge: Callable[..., Decision], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="numbers of another bundle"):
        judge({"bundle": "sha256:" + "0" * 64})
    assert not (tmp_path / "decision.json").exists()


def test_an_unknown_metric_is_named_with_the_known_ones() -> None:
    with pytest.raises(ValidationError, match=r"unknown metric acc; known: auc, "):
        GateParams(at_least={"acc": 0.9})


@pytest.mark.parametrize("end", [0.8, 0.8000001])
def test_a_bound_itself_is_within(end: float) -> None:
    estimate = Estimate(value=0.9, low=end, high=0.95, n=9, method="Wilson")
    assert floor("x", estimate, 0.8).passed
    assert not floor("x", estimate, 0.81).passed
    assert ceiling("x", estimate, 0.95).passed
    assert not ceiling("x", None, 0.95).passed


def test_a_file_that_is_no_decision_gets_one_line(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps({"promote": True}))
    with pytest.raises(ValueError, match="no decision of this version; run `cadx gate`"):
        read_decision(tmp_path / "d.json")
