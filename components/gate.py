"""The gate: whether a model may be served, by bounds that were declared before anybody saw its numbers.

A bound is held against the end of the 95 % interval that argues against the model, never against the value
itself: what was seen in a few patients is no promise for the next ones.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cadx.bundle import Bundle
from cadx.explaining import title
from cadx.files import digest_path, write_json
from cadx.gating import Check, Decision, MetricsFile, ceiling, floor, read_metrics
from cadx.metrics import METRICS, Subgroup
from cadx.types import Estimate
from components.contract import In, Out, Params, step


class GateParams(Params):
    """What a model must show. A metric or subgroup without a bound is not asked for."""

    at_least: dict[str, float] = Field(
        default={"auc": 0.8, "sensitivity": 0.8}, description="metric -> what its lower end must reach"
    )
    at_most: dict[str, float] = Field(
        default={}, description="metric -> what its upper end must not exceed, such as brier"
    )
    subgroup_at_least: dict[Literal["auc", "sensitivity", "specificity"], float] = Field(
        default={},
        description="metric -> what its lower end must reach in each subgroup that is large enough to judge",
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
            if not math.isfinite(bound):
                raise ValueError(f"{name}: {bound} is no bound")
        return bounds

    @model_validator(mode="after")
    def _asks(self) -> Self:
        if not (self.at_least or self.at_most):
            raise ValueError("at_least and at_most are empty: a gate that asks nothing is none")
        return self


@step
def gate(*, metrics: In, bundle: In, decision: Out, params: GateParams) -> None:
    """Decide whether a model may be served, by declared bounds on the worse ends of its intervals.

    A refusal is a result, not an error: the decision is written either way, with every reason.

    Raises:
        ValueError: if the metrics are not those of this bundle.
    """
    opened = Bundle(bundle)
    record = read_metrics(metrics)
    if record.bundle != opened.digest:
        raise ValueError(
            f"{metrics}: numbers of another bundle than {bundle}; run `cadx evaluate` on this one first"
        )
    checks = tuple(_checks(record, opened, params))
    write_json(
        decision,
        Decision(
            experiment=record.experiment,
            seed=record.seed,
            split=record.split,
            promote=all(check.passed for check in checks),
            reasons=tuple(check.reason for check in checks if not check.passed),
            checks=checks,
            bundle=opened.digest,
            metrics=digest_path(metrics),
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
    fix = f"scored on the {split} split, on which choices were made; freeze the recipe and score test"
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


def _subgroup_floors(
    name: str, bound: float, by_subgroup: Mapping[str, Mapping[str, Subgroup]]
) -> Iterator[Check]:
    """A check for each subgroup; those that are too small are listed, and stop nothing unless all are."""
    judged = 0
    for attribute, groups in by_subgroup.items():
        for value, group in groups.items():
            estimate: Estimate = getattr(group, name)
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
