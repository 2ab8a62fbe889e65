"""The gate: whether a model may be served, by bounds that were declared before anybody saw its numbers.

A bound is held against the end of the 95 % interval that argues against the model, never against the value
itself: what was seen in a few patients is no promise for the next ones.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import Field, field_validator

from cadx.bundle import Bundle
from cadx.explaining import title
from cadx.files import digest_path, write_json
from cadx.gating import Check, Decision, ceiling, floor
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
        description="metric -> what its lower end must reach in each subgroup that has an interval",
    )

    @field_validator("at_least", "at_most")
    @classmethod
    def _known(cls, bounds: dict[str, float]) -> dict[str, float]:
        if unknown := sorted(set(bounds) - set(METRICS)):
            raise ValueError(f"unknown metric {', '.join(unknown)}; known: {', '.join(METRICS)}")
        return bounds


@step
def gate(*, metrics: In, bundle: In, decision: Out, params: GateParams) -> None:
    """Decide whether a model may be served, by declared bounds on the worse ends of its intervals.

    A refusal is a result, not an error: the decision is written either way, with every reason.

    Raises:
        ValueError: if the metrics are not those of this bundle.
    """
    opened = Bundle(bundle)
    record = json.loads(metrics.read_text(encoding="utf-8"))
    if record.get("bundle") != opened.digest:
        raise ValueError(
            f"{metrics}: numbers of another bundle than {bundle}; run `cadx evaluate` on this one first"
        )
    checks = tuple(_checks(record, opened, params))
    write_json(
        decision,
        Decision(
            experiment=record["experiment"],
            seed=record["seed"],
            split=record["split"],
            promote=all(check.passed for check in checks),
            reasons=tuple(check.reason for check in checks if not check.passed),
            checks=checks,
            bundle=opened.digest,
            metrics=digest_path(metrics),
        ).model_dump(mode="json"),
    )


def _checks(record: Mapping[str, Any], bundle: Bundle, params: GateParams) -> Iterator[Check]:
    yield _scored_on_test(record["split"])
    yield _kept_apart(record, bundle)
    estimates = {name: Estimate.model_validate(value) for name, value in record["metrics"].items()}
    for name, bound in params.at_least.items():
        yield floor(title(name), estimates.get(name), bound)
    for name, bound in params.at_most.items():
        yield ceiling(title(name), estimates.get(name), bound)
    for attribute, groups in record["by_subgroup"].items():
        for value, group in groups.items():
            subgroup = Subgroup.model_validate(group)
            for name, bound in params.subgroup_at_least.items():
                estimate: Estimate = getattr(subgroup, name)
                if estimate.low is not None:
                    yield floor(f"{title(name)} in {attribute} {value}", estimate, bound)


def _scored_on_test(split: str) -> Check:
    passed = split == "test"
    said = "scored on the test split"
    fix = f"scored on the {split} split, on which choices were made; freeze the recipe and score test"
    return Check(what="judged on unseen patients", passed=passed, reason=said if passed else fix)


def _kept_apart(record: Mapping[str, Any], bundle: Bundle) -> Check:
    """On the training dataset itself, other splits than those of training mean leaked patients."""
    trained = bundle.manifest.provenance
    passed = record["dataset"] != trained.dataset or record["splits"] == trained.splits
    said = "trained and scored on one version of the splits, or on different data sets"
    fix = (
        "trained on other splits of this dataset than it was scored on: patients may be in both; train again"
    )
    return Check(what="training and test kept apart", passed=passed, reason=said if passed else fix)
