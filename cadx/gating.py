"""The decision whether a model may be served: bounds held against the worse ends of intervals.

What was seen in a few patients is no promise for the next ones: a bound is never held against the value itself. An
interval that says of itself that it holds the truth less often than 95 % meets no bound; every other doubt is told.
"""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cadx.doubts import HOLDS_LESS, doubts_of
from cadx.metrics import Difference, Subgroup
from cadx.types import Aggregation, Config, Digest, Estimate


class Check(Config):
    """One question of the gate and its answer; `reason` says why in words, whichever way it went."""

    what: str
    passed: bool
    reason: str
    bound: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None


class Decision(Config):
    """decision.json: whether a bundle may be served, and everything that was asked.

    Attributes:
        bundle: digest of the bundle that it is about.
        metrics: digest of the metrics file that it rests on.
        validation: digest of the validation that it looked at; None where none was given.
        champion: the bundle that it was compared with; None where there was none.
        reviewer: who signed for it; None where nobody was asked.
        reasons: why not; empty where `promote`.
    """

    schema_version: Literal[1] = 1
    experiment: str
    seed: int
    split: str
    promote: bool
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    bundle: Digest
    metrics: Digest
    validation: Digest | None = None
    champion: Digest | None = None
    reviewer: str | None = None

    @property
    def not_judged(self) -> tuple[str, ...]:
        """Floors of subgroups that hold too few, or one class only: they stopped nothing, and promise nothing."""
        return tuple(
            check.reason
            for check in self.checks
            if check.passed and check.bound is not None and check.value is None
        )

    @property
    def why(self) -> str:
        """The reasons, or how many checks hold and how many floors of subgroups could not be judged."""
        if self.reasons:
            return "; ".join(self.reasons)
        num_open = len(self.not_judged)
        held = f"all {len(self.checks) - num_open} checks hold"
        return f"{held}; {num_open} floors of subgroups could not be judged" if num_open else held


class MetricsFile(BaseModel):
    """What the gate and the model card take of an `evaluate`'s metrics.json; other fields are let pass."""

    model_config = ConfigDict(frozen=True)

    schema_version: Literal[1] = Field(alias="schema")
    experiment: str
    seed: int
    split: str
    bundle: Digest
    dataset: Digest
    splits: Digest
    predictions: Digest | None = None
    n: int
    n_patients: int
    clustered: bool
    aggregate: Aggregation = "none"
    warnings: tuple[str, ...]
    metrics: dict[str, Estimate]
    by_subgroup: dict[str, dict[str, Subgroup]]


def read_metrics(path: Path) -> MetricsFile:
    """The metrics of one scoring.

    Raises:
        ValueError: if there are none of this version.
    """
    try:
        return MetricsFile.model_validate_json(path.read_bytes())
    except (ValidationError, IsADirectoryError):
        raise ValueError(f"{path}: no metrics of one scoring, of this version; run `cadx evaluate`") from None


def read_decisions(experiment: str, reports: Path) -> list[Decision]:
    """What the gate decided of an experiment's seeds, and of those of its pilot study where there is one."""
    files = [
        file
        for name in (experiment, f"{experiment}-pilot")
        for file in sorted((reports / name).glob("*/decision.json"))
    ]
    return [read_decision(file) for file in files]


def read_decision(path: Path) -> Decision:
    """The decision in a file.

    Raises:
        ValueError: if there is none.
    """
    try:
        return Decision.model_validate_json(path.read_bytes())
    except (ValidationError, IsADirectoryError):
        raise ValueError(f"{path}: no decision of this version; run `cadx gate`") from None


def floor(what: str, estimate: Estimate | None, bound: float) -> Check:
    """Whether the interval's lower end reaches `bound`; without an interval it does not.

    >>> floor("AUC", Estimate(value=0.93, low=0.78, high=0.98, n=12, method="DeLong"), 0.85).reason
    'AUC is 0.930, its 95 % interval reaches down to 0.780: beyond the floor of 0.85'
    """
    end = estimate.low if estimate else None
    within = end is not None and end >= bound
    return _bounded(what, estimate, bound, within, f"down to {_text(end)}", f"the floor of {bound:g}")


def ceiling(what: str, estimate: Estimate | None, bound: float) -> Check:
    """Whether the interval's upper end stays at or below `bound`; without an interval it does not."""
    end = estimate.high if estimate else None
    within = end is not None and end <= bound
    return _bounded(what, estimate, bound, within, f"up to {_text(end)}", f"the ceiling of {bound:g}")


def not_inferior(what: str, difference: Difference, margin: float) -> Check:
    """Whether a paired difference, this model less the champion, stays above -`margin` at its lower end.

    >>> found = Difference(value=0.01, low=-0.03, high=0.05, p=0.6, n=99, method="DeLong, paired")
    >>> not_inferior("AUC", found, 0.02).reason
    "AUC less the champion's is +0.010, its 95 % interval reaches down to -0.030: beyond the margin of 0.02"
    """
    what = f"{what} less the champion's"
    if difference.value is None or difference.low is None or difference.high is None:
        reason = f"{what} has no interval ({difference.method}), but a margin of {margin:g} is asked"
        return Check(what=what, passed=False, bound=-margin, reason=reason)
    passed, said = _held(difference.low > -margin, f"the margin of {margin:g}", difference.method)
    return Check(
        what=what,
        passed=passed,
        bound=-margin,
        value=difference.value,
        low=difference.low,
        high=difference.high,
        reason=f"{what} is {difference.value:+.3f}, its 95 % interval reaches down to {difference.low:+.3f}: {said}",
    )


def _bounded(
    what: str, estimate: Estimate | None, bound: float, within: bool, reaches: str, limit: str
) -> Check:
    if estimate is None or estimate.value is None or estimate.low is None or estimate.high is None:
        why = estimate.method if estimate else "not among the metrics"
        return Check(
            what=what,
            passed=False,
            bound=bound,
            reason=f"{what} has no interval ({why}), but {limit} is asked",
        )
    passed, said = _held(within, limit, estimate.method)
    return Check(
        what=what,
        passed=passed,
        bound=bound,
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        reason=f"{what} is {_text(estimate.value)}, its 95 % interval reaches {reaches}: {said}",
    )


def _held(within: bool, limit: str, method: str) -> tuple[bool, str]:
    """Whether a bound is met, and how a reason ends that tells it, with what the interval doubts of itself."""
    doubt = "; ".join(doubts_of(method))
    refused = within and HOLDS_LESS in doubt
    words = f"{'within' if within else 'beyond'} {limit}"
    return within and not refused, words + (f"{', but' if refused else ';'} {doubt}" if doubt else "")


def _text(number: float | None) -> str:
    return "nothing" if number is None else f"{number:.3f}"
