"""Join the seeds of an experiment: what the recipe reaches, not what one lucky run did."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pydantic import Field

from cadx.comparing import Scored, all_paired, read_scored
from cadx.evaluating import (
    Aggregation,
    Attribute,
    Settings,
    evaluation_of,
    judged_on,
    show_assumptions,
    show_glossary,
)
from cadx.files import write_json
from cadx.reporting import Page
from components.contract import Ins, Out, Params, step


class SummariseParams(Params):
    """How finely the seeds are joined."""

    resamples: int = Field(
        default=1000, ge=0, description="bootstrap resamples of patients, each applied to all seeds"
    )
    subgroups: tuple[Attribute, ...] = ("site", "sex", "age", "scanner")
    minimum_n: int = Field(default=20, ge=1, description="patients that an estimate in a subgroup needs")
    aggregate: Aggregation = Field(
        default="none", description="as in evaluate: what images of a patient become"
    )


@step
def summarise(*, predictions: Ins, metrics: Out, report: Out, params: SummariseParams) -> None:
    """Join the predictions of all seeds; write joint metrics with intervals, and a report.

    The value is the mean over seeds; its interval covers the sampling of patients, each resample of whom
    is applied to all seeds. How far the seeds differ stands beside it.

    Raises:
        ValueError: if the files are not of one experiment and split, or not of the same samples, or were scored with
            another aggregation.
    """
    read = _read(predictions)
    frame, info, _ = read[0]
    if params.aggregate != info.aggregate:
        raise ValueError(
            f"summarise.aggregate is {params.aggregate}, but the predictions were scored with evaluate.aggregate "
            f"{info.aggregate}; set both alike"
        )
    settings = Settings(
        resamples=params.resamples,
        subgroups=params.subgroups,
        minimum_n=params.minimum_n,
        aggregate=params.aggregate,
    )
    others = [(one.frame, one.info) for one in read[1:]]
    joined = evaluation_of(info.task)(frame, info, settings, others)
    write_json(
        metrics,
        {
            "schema": 1,
            "experiment": info.experiment,
            "seeds": [one.info.seed for one in read],
            "split": info.split,
            "bundles": [one.info.bundle for one in read],
            "n": joined.n,
            "n_patients": joined.n_patients,
            "clustered": info.clustered,
            "warnings": list(info.warnings),
            **joined.record(),
        },
    )
    plural = "seed" if len(read) == 1 else "seeds"
    page = Page(f"{info.experiment} on {judged_on(info.split)}", f"{len(read)} training {plural} joined")
    joined.show_answer(page)
    for warning in info.warnings:
        page.callout("warn", warning)
    joined.show_numbers(page)
    show_assumptions(page, info)
    show_glossary(page)
    page.write(report)


def _read(paths: Sequence[Path]) -> list[Scored]:
    """Each file's rows and what they are, by seed; of the same samples in the same order, with the same truth."""
    read = sorted(map(read_scored, paths), key=lambda one: one.info.seed)
    first = read[0]
    for before, other in pairwise(read):
        for field in ("experiment", "split", "task", "classes", "positive", "clustered"):
            mine, theirs = getattr(first.info, field), getattr(other.info, field)
            if mine != theirs:
                raise ValueError(
                    f"{other.path}: {field} is {theirs!r}, but {first.path} has {mine!r}; join seeds of one "
                    "experiment and split"
                )
        if other.info.seed == before.info.seed:
            raise ValueError(
                f"{other.path}: seed {other.info.seed} again, as in {before.path}; give each seed once"
            )
    return all_paired(read)
