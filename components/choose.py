"""Of several trained models the one to be served: the first, or the best, of those that the gate let through."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field, field_validator

from cadx.comparing import Scored, all_paired, read_scored
from cadx.evaluating import METRICS
from cadx.explaining import title
from cadx.files import write_json
from cadx.gating import Decision, MetricsFile, read_decision, read_metrics
from cadx.reporting import Page
from cadx.types import Estimate
from components.contract import Ins, Out, Params, step


class ChooseParams(Params):
    """How the candidates are ranked."""

    metric: str | None = Field(
        default=None,
        description="the best by the worse end of this metric's interval; left out: the first that may be served, "
        "so that nothing is chosen on test",
    )

    @field_validator("metric")
    @classmethod
    def _known(cls, metric: str | None) -> str | None:
        if metric is not None and metric not in METRICS:
            raise ValueError(f"unknown metric {metric}; known: {', '.join(METRICS)}")
        if metric is not None and METRICS[metric].better not in ("higher", "lower"):
            raise ValueError(f"{metric}: neither more nor less of it is better; rank by another metric")
        return metric


class Candidate(NamedTuple):
    """One trained model and what is known of it."""

    metrics: MetricsFile
    decision: Decision
    name: str
    scored: Scored


@step
def choose(
    *,
    all_metrics: Ins,
    all_decision: Ins,
    all_archive: Ins,
    all_predictions: Ins,
    choice: Out,
    report: Out,
    metrics: Out,
    decision: Out,
    archive: Out,
    predictions: Out,
    params: ChooseParams,
) -> None:
    """Choose among candidates the model to be served; write the comparison and copies of the chosen one's files.

    Where none may be served, the first is handed on with its refusal. The interval of a model that was chosen
    for its metric is too good by the choice itself: the comparison says among how many.

    Raises:
        ValueError: if the lists do not belong together, or were scored on different samples.
    """
    counts = {len(all_metrics), len(all_decision), len(all_archive), len(all_predictions)}
    if len(counts) > 1:
        raise ValueError(
            "--all-metrics, --all-decision, --all-archive, --all-predictions: give one per model"
        )
    candidates = [
        _candidate(*paths) for paths in zip(all_metrics, all_decision, all_predictions, strict=True)
    ]
    if params.metric is not None:
        all_paired([candidate.scored for candidate in candidates])  # else numbers cannot be ranked
    ranked = _ranked(candidates, params.metric)
    promoted = [number for number in ranked if candidates[number].decision.promote]
    chosen = (promoted or ranked)[0]
    for source, target in (
        (all_metrics, metrics),
        (all_decision, decision),
        (all_archive, archive),
        (all_predictions, predictions),
    ):
        shutil.copyfile(source[chosen], target)
    write_json(
        choice,
        {
            "schema": 1,
            "metric": params.metric,
            "chosen": candidates[chosen].name if promoted else None,
            "candidates": [_summary(candidates[number], params.metric) for number in ranked],
        },
    )
    _page(candidates, ranked, chosen if promoted else None, params.metric).write(report)


def _candidate(metrics: Path, decision: Path, predictions: Path) -> Candidate:
    record, decided = read_metrics(metrics), read_decision(decision)
    scored = read_scored(predictions)
    if not record.bundle == decided.bundle == scored.info.bundle:
        raise ValueError(
            f"{metrics}, {decision}, {predictions}: of different bundles; give the lists in one order"
        )
    return Candidate(record, decided, f"{record.experiment}, seed {record.seed}", scored)


def _ranked(candidates: Sequence[Candidate], metric: str | None) -> list[int]:
    """Positions, best first; without a metric as they were given."""
    positions = [*range(len(candidates))]
    return positions if metric is None else sorted(positions, key=lambda i: _loss(candidates[i], metric))


def _loss(candidate: Candidate, metric: str) -> float:
    """The worse end of the metric's interval, turned so that less is better; last where there is none."""
    estimate = candidate.metrics.metrics.get(metric)
    if estimate is None or estimate.low is None or estimate.high is None:
        return float("inf")
    return estimate.high if METRICS[metric].better == "lower" else -estimate.low


def _estimate(candidate: Candidate, metric: str | None) -> Estimate | None:
    return candidate.metrics.metrics.get(metric) if metric is not None else None


def _summary(candidate: Candidate, metric: str | None) -> dict[str, Any]:
    estimate = _estimate(candidate, metric)
    return {
        "experiment": candidate.metrics.experiment,
        "seed": candidate.metrics.seed,
        "bundle": candidate.decision.bundle,
        "may_be_served": candidate.decision.promote,
        "reasons": list(candidate.decision.reasons),
        "estimate": estimate.model_dump(mode="json") if estimate else None,
    }


def _page(
    candidates: Sequence[Candidate], ranked: Sequence[int], chosen: int | None, metric: str | None
) -> Page:
    named = f"{len(candidates)} candidates" if len(candidates) > 1 else "1 candidate"
    page = Page("The model to be served", f"Chosen among {named}")
    if chosen is None:
        page.callout("stop", "The gate let none of them through: nothing is to be served.")
    else:
        rule = "the first that the gate let through"
        if metric is not None:
            rule = (
                f"the best by the worse end of {title(metric)}'s interval, of those that the gate let through"
            )
        page.callout("ok", f"{candidates[chosen].name}: {rule}.")
    if metric is not None and len(candidates) > 1:
        page.text(
            "The chosen model's own interval does not account for having been chosen: expect a little less."
        )
    rows = [
        {
            "Model": candidates[number].name,
            **({title(metric): _estimate(candidates[number], metric)} if metric is not None else {}),
            "May be served": "yes" if candidates[number].decision.promote else "no",
            "Why not": "; ".join(candidates[number].decision.reasons),
        }
        for number in ranked
    ]
    page.table(rows, "What stood to choose from, in order")
    return page
