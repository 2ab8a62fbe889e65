"""The gate: whether a model may be served, by bounds that were declared before anybody saw its numbers.

A bound is held against the end of the 95 % interval that argues against the model, never against the value
itself: what was seen in a few patients is no promise for the next ones.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cadx.bundle import Bundle
from cadx.comparing import ComparedMetric, Scored, compare_metrics, read_scored
from cadx.datasets import DatasetFolder, read_splits
from cadx.evaluating import METRICS
from cadx.explaining import title
from cadx.files import digest_path, write_json
from cadx.gating import Check, Decision, MetricsFile, ceiling, floor, not_inferior, read_metrics
from cadx.metrics import Subgroup
from cadx.signing import objection, read_review
from cadx.splitting import patients_in_several_splits
from cadx.types import Digest, Estimate
from components.contract import In, MaybeIn, Out, Params, step

_UNKNOWN = Estimate(value=None, low=None, high=None, n=0, method="not among the subgroup's metrics")
_CEILINGS_BELOW_1 = ("brier", "expected_calibration_error")
"""Errors of probabilities: whoever knows nothing, and says so, stays below 1."""
_LEAKS = ("duplicate_across_splits", "near_duplicate_across_splits")


class GateParams(Params):
    """What a model must show. A metric or subgroup without a bound is not asked for."""

    at_least: dict[str, float] = Field(
        default={"auc": 0.8, "sensitivity": 0.8}, description="metric -> what its lower end must reach"
    )
    at_most: dict[str, float] = Field(
        default={}, description="metric -> what its upper end must not exceed, such as brier"
    )
    subgroup_at_least: dict[str, float] = Field(
        default={},
        description="metric -> what its lower end must reach in each subgroup that is large enough to judge",
    )
    margins: dict[ComparedMetric, float] = Field(
        default={},
        description="metric -> how much worse than the champion it may be on the same patients, at the lower end of "
        "the paired difference; needed where a champion is given",
    )
    clean_data: bool = Field(
        default=False,
        description="dataset, splits and validation must be given, without a leak between splits",
    )
    reviewers: dict[str, str] = Field(
        default={},
        description="name -> public key (PEM) of who may sign off; where any stands, one of them must have",
    )
    other_dataset: bool = Field(
        default=False, description="it is scored on another dataset than its own, with none of its patients"
    )

    @field_validator("at_least", "at_most", "subgroup_at_least")
    @classmethod
    def _meant(cls, bounds: dict[str, float], info: ValidationInfo) -> dict[str, float]:
        worse = "higher" if info.field_name == "at_most" else "lower"
        for name, bound in bounds.items():
            if name not in METRICS:
                raise ValueError(f"unknown metric {name}; known: {', '.join(METRICS)}")
            if METRICS[name].better == worse:
                raise ValueError(f"{name}: {worse} is better there; set the bound in the other direction")
            if METRICS[name].better == "higher" and not 0 <= bound <= 1:
                raise ValueError(f"{name}: {bound:g} is no share of 1; give a bound such as 0.9")
            if METRICS[name].better == "lower" and bound < 0:
                raise ValueError(f"{name}: {bound:g} is below 0, which nothing reaches; give a bound above 0")
            if name in _CEILINGS_BELOW_1 and bound >= 1:
                raise ValueError(f"{name}: {bound:g} asks nothing; give a bound such as 0.1")
        # In one order: Kubeflow hands mappings on sorted, and equal inputs give equal bytes.
        return {name: bounds[name] for name in METRICS if name in bounds}

    @field_validator("margins")
    @classmethod
    def _allows(cls, margins: dict[str, float]) -> dict[str, float]:
        for name, margin in margins.items():
            if not 0 <= margin < 1:
                raise ValueError(f"{name}: {margin} is no margin; give a share of 1, such as 0.02")
        return margins

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not (self.at_least or self.at_most):
            raise ValueError("at_least and at_most are empty: a gate that asks nothing is none")
        return self


@step
def gate(
    *,
    metrics: In,
    bundle: In,
    decision: Out,
    predictions: MaybeIn = None,
    champion: MaybeIn = None,
    dataset: MaybeIn = None,
    splits: MaybeIn = None,
    validation: MaybeIn = None,
    review: MaybeIn = None,
    params: GateParams,
) -> None:
    """Decide whether a model may be served, by declared bounds on the worse ends of its intervals.

    A refusal is a result, not an error: the decision is written either way, with every reason. What else is given is
    judged too: `champion`, the predictions of the model in service (`cadx champion export`), against `predictions`,
    by `margins`; `dataset`, `splits` and `validation` for leaks; `review`, what a reviewer signed (`cadx sign
    --reviewer`).

    Raises:
        ValueError: if the metrics or the predictions are of another bundle, or a file is of another form.
    """
    opened = Bundle(bundle)
    record = read_metrics(metrics)
    if record.bundle != opened.digest:
        raise ValueError(
            f"{metrics}: numbers of another bundle than {bundle}; run `cadx evaluate` on this one first"
        )
    checks = [*_checks(record, opened, params)]
    if params.clean_data or (dataset and splits):
        checks.append(_no_leak(dataset, splits, record))
    if params.clean_data or validation:
        checks.append(_validated(validation, splits, record))
    rival = read_scored(champion) if champion else None
    if rival:
        if predictions is None:
            raise ValueError("--champion without --predictions: give this model's, on the same patients")
        checks += _against(rival, predictions, record, params.margins)
    numbers, reviewer = digest_path(metrics), None
    if params.reviewers:
        signed_off = _signed_off(review, record, numbers, params.reviewers)
        checks.append(signed_off)
        reviewer = read_review(review).reviewer if review and signed_off.passed else None
    write_json(
        decision,
        Decision(
            experiment=record.experiment,
            seed=record.seed,
            split=record.split,
            promote=all(check.passed for check in checks),
            reasons=tuple(check.reason for check in checks if not check.passed),
            checks=tuple(checks),
            bundle=opened.digest,
            metrics=numbers,
            validation=digest_path(validation) if validation else None,
            champion=rival.info.bundle if rival else None,
            reviewer=reviewer,
        ).model_dump(mode="json"),
    )


def _checks(record: MetricsFile, bundle: Bundle, params: GateParams) -> Iterator[Check]:
    yield _scored_on_test(record.split)
    yield _kept_apart(record, bundle, params.other_dataset)
    for name, bound in params.at_least.items():
        yield floor(title(name), record.metrics.get(name), bound)
    for name, bound in params.at_most.items():
        yield ceiling(title(name), record.metrics.get(name), bound)
    for name, bound in params.subgroup_at_least.items():
        yield from _subgroup_floors(name, bound, record.by_subgroup)


def _scored_on_test(split: str) -> Check:
    passed = split == "test"
    said = "scored on the test split"
    fix = (
        "scored fold by fold, by networks of which the bundle holds the mean; score a test split of that"
        if split == "folds"
        else f"scored on the {split} split, on which choices were made; freeze the recipe and score test"
    )
    return Check(what="judged on unseen patients", passed=passed, reason=said if passed else fix)


def _kept_apart(record: MetricsFile, bundle: Bundle, other_dataset: bool) -> Check:
    """Other splits than those of training mean leaked patients, and so may another version of the dataset."""
    trained, what = bundle.manifest.provenance, "training and test kept apart"
    if record.dataset != trained.dataset:
        said = "scored on another dataset than it was trained on, declared to hold none of its patients"
        fix = (
            "scored on another dataset, or another version of it, than it was trained on: patients may be in both; "
            "train again, or declare gate.other_dataset"
        )
        return Check(what=what, passed=other_dataset, reason=said if other_dataset else fix)
    passed = record.splits == trained.splits
    said = "trained and scored on the same version of the splits"
    fix = (
        "trained on other splits of this dataset than it was scored on: patients may be in both; train again"
    )
    return Check(what=what, passed=passed, reason=said if passed else fix)


def _no_leak(dataset: Path | None, splits: Path | None, record: MetricsFile) -> Check:
    """Whether each patient stands in one split; a dataset that is not the scored one says nothing of it."""
    what = "no patient in two splits"
    if dataset is None or splits is None:
        reason = "clean_data is asked, but dataset and splits were not given to look for leaks"
        return Check(what=what, passed=False, reason=reason)
    if (digest_path(dataset / "dataset.json"), digest_path(splits)) != (record.dataset, record.splits):
        reason = f"{dataset} and {splits} are not those that were scored: evaluate again"
        return Check(what=what, passed=False, reason=reason)
    shared = patients_in_several_splits(DatasetFolder(dataset).samples, read_splits(splits))
    reason = (
        f"{shared} patients stand in more than one split: training has seen them; split again, by patient"
    )
    return Check(what=what, passed=not shared, reason=reason if shared else what)


def _validated(validation: Path | None, splits: Path | None, record: MetricsFile) -> Check:
    """Whether validation judged this dataset, and left no copy of a training image in another split."""
    what = "validated without a leak"
    if validation is None:
        reason = "clean_data is asked, but no validation was given"
        return Check(what=what, passed=False, reason=reason)
    try:
        content = json.loads(validation.read_text(encoding="utf-8"))
        judged, rules = content["dataset"], content["rules"]
        quarantined = {entry["sample_id"] for entry in content["quarantined"]}
        leaks = [rule["message"] for rule in rules if rule["name"] in _LEAKS and _is_open(rule)]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{validation}: not a validation; run `cadx validate` again") from None
    reason = ""
    if judged != record.dataset:
        reason = f"{validation} judged another dataset than was scored; run `cadx validate` on this one"
    elif leaks:
        reason = f"validation found leaks that were left in: {'; '.join(leaks)}"
    elif splits is not None:
        assigned = read_splits(splits)
        used = assigned["sample_id"].isin(list(quarantined)) & (assigned["split"] != "excluded")
        if used.any():
            reason = (
                f"{used.sum()} images stand in a split that validation has put in quarantine; split again"
            )
    return Check(what=what, passed=not reason, reason=reason or what)


def _is_open(rule: Mapping[str, object]) -> bool:
    """Whether a rule failed and its images were not kept out."""
    return not rule["passed"] and rule["severity"] != "quarantine"


def _against(
    champion: Scored, predictions: Path, record: MetricsFile, margins: Mapping[ComparedMetric, float]
) -> list[Check]:
    """A check for each margin, on the patients that both models were asked about."""
    challenger = read_scored(predictions)
    if challenger.info.bundle != record.bundle:
        raise ValueError(f"{predictions}: answers of another bundle than the one that is judged; evaluate it")
    what = "not inferior to the champion"
    if champion.info.bundle == record.bundle:
        return [Check(what=what, passed=True, reason="it is the champion itself")]
    if not margins:
        reason = (
            "cannot be compared with the champion: gate.margins is empty; declare there how much worse it may be, "
            "such as auc: 0.02"
        )
        return [Check(what=what, passed=False, reason=reason)]
    if wrong := _not_scored(challenger, champion, record):
        return [Check(what=what, passed=False, reason=f"cannot be compared with the champion: {wrong}")]
    try:
        found = compare_metrics(challenger, champion, list(margins))
    except ValueError as error:
        return [Check(what=what, passed=False, reason=f"cannot be compared with the champion: {error}")]
    return [
        not_inferior(
            " of ".join(filter(None, (title(one.metric), one.of))), one.difference, margins[one.metric]
        )
        for one in found
    ]


def _not_scored(challenger: Scored, champion: Scored, record: MetricsFile) -> str:
    """Why the predictions are not those that the metrics are of, or the champion's of another split; "" if they are."""
    if challenger.info.aggregate != record.aggregate:
        return (
            f"{challenger.path} declares evaluate.aggregate {challenger.info.aggregate}, but the metrics are of "
            f"{record.aggregate}; evaluate again"
        )
    for scored in (challenger, champion):
        if scored.info.split != record.split:
            return f"{scored.path} is of {scored.info.split}, but the metrics are of {record.split}; evaluate again"
    if digest_path(challenger.path) != record.predictions:
        return f"{challenger.path} is not the file that the metrics were made from; evaluate again"
    return ""


def _signed_off(
    review: Path | None, record: MetricsFile, metrics: Digest, reviewers: Mapping[str, str]
) -> Check:
    """Whether a known reviewer has signed for this bundle and these numbers."""
    what = "signed off by a reviewer"
    if review is None:
        reason = f"no reviewer has signed off; asked for is one of {', '.join(reviewers)}"
        return Check(what=what, passed=False, reason=reason)
    signed = read_review(review)
    wrong = objection(review, reviewers, bundle=record.bundle, metrics=metrics)
    reason = f"the sign-off does not count: {wrong}" if wrong else f"signed off by {signed.reviewer}"
    return Check(what=what, passed=not wrong, reason=reason)


def _subgroup_floors(
    name: str, bound: float, by_subgroup: Mapping[str, Mapping[str, Subgroup]]
) -> Iterator[Check]:
    """A check for each subgroup; those that are too small are listed, and stop nothing unless all are.

    So are those of one class only, however many patients they have, where the metric needs both.
    """
    judged = 0
    for attribute, groups in by_subgroup.items():
        for value, group in groups.items():
            # What else needs both classes is left out where AUC is undefined: that says why.
            missing = group.auc if group.auc.low is None else _UNKNOWN
            estimate = group.metrics.get(name) or getattr(group, name, None) or missing
            what = f"{title(name)} in {attribute} {value}"
            if estimate.low is None:
                reason = f"{what} was not judged: {estimate.method}"
                yield Check(what=what, passed=True, reason=reason, bound=bound)
            else:
                judged += 1
                yield floor(what, estimate, bound)
    if not judged:
        reason = f"{title(name)} in subgroups was asked for, but none is large enough to judge"
        yield Check(what=f"{title(name)} in subgroups", passed=False, reason=reason, bound=bound)
