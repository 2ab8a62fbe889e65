"""Do the images and the answers of a served model still look as they did? Evidently's drift tests.

What is compared, a column each:

    statistics   `stat_*`           image statistics, with the training split (reference.parquet)
    embedding    `embedding_*`      `drift.embedding_summary`, with the calibration split (heldout.parquet)
                                    of which one half, drawn at random, chooses the axes
    scores       `prob_<class>`     of the positive class, or of each class, with the calibration split
    decisions    `decision_<class>` whether it was called, likewise

A column has drifted where p < alpha / columns (Bonferroni: over all columns together, at most a share alpha
of runs alarms without a cause) and the distance is at least `minimum_effect`. Numbers are compared by the
Kolmogorov-Smirnov test, decisions by Fisher's. Evidently takes both as tests of its own making, because its
chi-square test takes the reference's shares for the truth, its Fisher test wants samples of equal size,
and none of its tests asks for a minimum effect.

What it cannot tell: whether answers are right, which needs labels; a shift in one site among many; and
drift in fewer requests than `minimum_n`. The tests take images as independent: where patients have several,
or the requests of one day share a fault, p-values are too small, and alarms come more often than alpha.
Each run is a test of its own: a hundred runs over other requests, without any drift, alarm about once at
alpha 0.01.

drift.json:

    schema              1
    experiment, seed    of the bundle
    bundle              digest of the bundle
    n                   requests compared
    n_reference         group -> rows compared with
    window              start, end: times of the first and the last request, UTC
    skipped             lines left out: torn, other_bundles, duplicates; older: requests before the window
    alpha, minimum_effect, minimum_n
    columns             name, group, p_value, threshold, effect, drifted, reference_mean, current_mean
    drifted             whether a column has; null: too few requests, neither alarm nor all-clear
    message             that in words
    share_with_warnings of the requests
    assumptions         in words
"""

import html
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.bundle import EMBEDDING_DECIMALS, REFERENCE_DECIMALS, Bundle, Manifest
from cadx.drift import (
    Difference,
    RequestLog,
    compare_numbers,
    compare_shares,
    embedding_summary,
    read_request_log,
)
from cadx.files import write_json
from cadx.reporting import Page
from components.contract import Alarm, In, Out, Params, step

NUM_NAMED = 4  # columns in the alarm's one line
CALLED, NOT_CALLED = "called", "not called"

# A browser then refuses every request that Evidently's page might make; of its own accord it makes none.
CONTENT_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; font-src data:; img-src data: blob:\">"
)


class MonitorParams(Params):
    """When to alarm: at what is no chance, and large enough to matter."""

    alpha: float = Field(
        default=0.01, gt=0, lt=1, description="share of runs that may alarm without a cause, over all columns"
    )
    minimum_effect: float = Field(
        default=0.1,
        ge=0,
        le=1,
        description="distance between the distributions from which on it matters; "
        "0.1 is a quarter of a standard deviation, or 10 percentage points of the decisions",
    )
    minimum_n: int = Field(default=50, ge=2, description="requests that a verdict needs")
    window: int | None = Field(
        default=1000,
        ge=2,
        description="compare the latest requests, so many; null: all, in which a new fault drowns",
    )


class Column(NamedTuple):
    """The verdict on one column; the means of a decision are shares of the images."""

    name: str
    group: str
    p_value: float
    threshold: float
    effect: float
    drifted: bool
    reference_mean: float
    current_mean: float


class Compared(NamedTuple):
    """Columns that share a reference: numbers rounded alike on both sides, decisions as bool."""

    reference: pd.DataFrame
    current: pd.DataFrame


@step
def monitor(*, request_log: In, bundle: In, drift: Out, report: Out, params: MonitorParams) -> None:
    """Compare the requests that a bundle has answered with what it was made from.

    Raises:
        Alarm: if anything has drifted; both outputs are written.
        ValueError: if the log holds no request of this bundle, or the bundle no held-out answers.
    """
    opened = Bundle(bundle)
    heldout = opened.heldout()
    log = read_request_log(request_log, opened.digest)
    requests = log.requests if params.window is None else log.requests.tail(params.window)
    groups = _compared(opened.manifest, opened.reference(), heldout, requests)
    record = _record(opened, log, requests, groups, params)
    title = f"{opened.manifest.experiment}, seed {opened.manifest.seed}: drift"

    if len(requests) < params.minimum_n:
        message = (
            f"too few requests for a verdict, {len(requests)} of {params.minimum_n}: "
            "neither alarm nor all-clear"
        )
        write_json(drift, record | {"drifted": None, "message": message, "columns": []})
        print(message)
        page = Page(title, f"Bundle {opened.digest}")
        page.callout("warn", message)
        page.write(report)
        return
    columns, evidently_page = _evidently(groups, params)
    moved = sorted((column for column in columns if column.drifted), key=lambda column: -column.effect)
    message = _message(moved, len(columns))
    listed = [column._asdict() for column in columns]
    write_json(drift, record | {"drifted": bool(moved), "message": message, "columns": listed})
    report.write_text(_headed(evidently_page, title, record | {"message": message}), encoding="utf-8")
    if moved:
        raise Alarm(f"{message}; look at the report")
    print(message)


def _compared(
    manifest: Manifest, reference: pd.DataFrame, heldout: pd.DataFrame, requests: pd.DataFrame
) -> dict[str, Compared]:
    """What is compared, by group."""
    statistics = [name for name in reference if reference[name].notna().all()]
    scored = [manifest.positive] if manifest.task == "binary" else list(manifest.classes)
    probabilities = [f"prob_{name}" for name in scored]
    # One half of the reference chooses the axes, the other is compared: see `embedding_summary`.
    embeddings = np.stack(heldout["embedding"].to_list())
    later = np.stack(requests["embedding"].to_list()).round(EMBEDDING_DECIMALS)
    shuffled = np.random.default_rng(0).permutation(len(embeddings))
    axes, others = embeddings[shuffled[::2]], embeddings[shuffled[1::2]]
    return {
        "statistics": Compared(reference[statistics], requests[statistics].round(REFERENCE_DECIMALS)),
        "embedding": Compared(
            pd.DataFrame(embedding_summary(axes, others)), pd.DataFrame(embedding_summary(axes, later))
        ),
        "scores": Compared(heldout[probabilities], requests[probabilities].round(REFERENCE_DECIMALS)),
        "decisions": Compared(_called(heldout, scored), _called(requests, scored)),
    }


def _called(answers: pd.DataFrame, classes: Sequence[str | None]) -> pd.DataFrame:
    if "decision" not in answers:
        return answers[[f"decision_{name}" for name in classes]]
    return pd.DataFrame({f"decision_{name}": answers["decision"] == name for name in classes})


def _record(
    bundle: Bundle,
    log: RequestLog,
    requests: pd.DataFrame,
    groups: Mapping[str, Compared],
    params: MonitorParams,
) -> dict[str, Any]:
    """Everything of drift.json but the verdict."""
    manifest = bundle.manifest
    assumptions = ["images were taken as independent of each other"]
    if manifest.clustered:
        assumptions.append("patients may have several images, which makes p-values somewhat too small")
    return {
        "schema": 1,
        "experiment": manifest.experiment,
        "seed": manifest.seed,
        "bundle": bundle.digest,
        "n": len(requests),
        "n_reference": {group: len(compared.reference) for group, compared in groups.items()},
        "window": {
            end: time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            for end, time in (("start", requests["time"].iloc[0]), ("end", requests["time"].iloc[-1]))
        },
        "skipped": {
            "torn": log.torn,
            "other_bundles": log.other_bundles,
            "duplicates": log.duplicates,
            "older": len(log.requests) - len(requests),
        },
        "alpha": params.alpha,
        "minimum_effect": params.minimum_effect,
        "minimum_n": params.minimum_n,
        "share_with_warnings": float((requests["num_warnings"] > 0).mean()),
        "assumptions": assumptions,
    }


def _evidently(groups: Mapping[str, Compared], params: MonitorParams) -> tuple[list[Column], str]:
    """Let Evidently test every column: the verdicts in order, and its page."""
    # 6 s.
    from evidently import DataDefinition, Dataset, Report
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType
    from evidently.presets import DataDriftPreset

    found: dict[str, Difference] = {}

    def deciding_by(compare: Callable[[np.ndarray, np.ndarray], Difference]) -> Callable[..., Any]:
        def test(reference: pd.Series, current: pd.Series, _: Any, threshold: float) -> tuple[float, bool]:
            difference = compare(reference.to_numpy(), current.to_numpy())
            found[str(reference.name)] = difference
            # The distance is the score, since Evidently lists the highest scores first.
            return difference.effect, difference.is_drift(threshold, params.minimum_effect)

        return test

    def shares(reference: np.ndarray, current: np.ndarray) -> Difference:
        return compare_shares(reference == CALLED, current == CALLED)

    names = [(group, str(name)) for group, compared in groups.items() for name in compared.reference]
    threshold = params.alpha / len(names)
    rule = f"p < {threshold:.2g} and distance of at least {params.minimum_effect:g}"
    numbers_test = StatTest("cadx_numbers", f"Kolmogorov-Smirnov: {rule}", [ColumnType.Numerical])
    shares_test = StatTest("cadx_shares", f"Fisher: {rule}", [ColumnType.Categorical])
    register_stattest(numbers_test, deciding_by(compare_numbers))
    register_stattest(shares_test, deciding_by(shares))

    # Side by side in one table: the shorter references end in NaN, which Evidently drops column by column.
    reference, current = (
        pd.concat([_in_words(compared[side]).reset_index(drop=True) for compared in groups.values()], axis=1)
        for side in (0, 1)
    )
    definition = DataDefinition(
        numerical_columns=[name for group, name in names if group != "decisions"],
        categorical_columns=[name for group, name in names if group == "decisions"],
    )
    preset = DataDriftPreset(
        columns=[name for _, name in names],
        num_method=numbers_test.name,
        cat_method=shares_test.name,
        threshold=threshold,
        drift_share=1 / len(names),  # one column is enough
    )
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # It correlates columns on the way, also constant ones.
        warnings.simplefilter("ignore", RuntimeWarning)
        snapshot = Report([preset]).run(
            Dataset.from_pandas(current, definition), Dataset.from_pandas(reference, definition)
        )
    columns = [
        Column(
            name=name,
            group=group,
            p_value=found[name].p_value,
            threshold=threshold,
            effect=found[name].effect,
            drifted=found[name].is_drift(threshold, params.minimum_effect),
            reference_mean=float(groups[group].reference[name].mean()),
            current_mean=float(groups[group].current[name].mean()),
        )
        for group, name in names
    ]
    counted = snapshot.dict()["metrics"][0]["value"]["count"]
    assert counted == sum(column.drifted for column in columns), "the report would say something else"
    return columns, snapshot.get_html_str(as_iframe=False)


def _in_words(frame: pd.DataFrame) -> pd.DataFrame:
    """Decisions as text, which is what Evidently takes for a category."""
    flags = frame.select_dtypes(bool)
    return frame.assign(**{str(name): np.where(flags[name], CALLED, NOT_CALLED) for name in flags})


def _message(moved: Sequence[Column], number: int) -> str:
    if not moved:
        return f"no drift in {number} columns"
    named = [
        f"{column.name} {column.reference_mean:.3g} -> {column.current_mean:.3g}"
        f" (distance {column.effect:.2f})"
        for column in moved[:NUM_NAMED]
    ]
    more = f" and {len(moved) - NUM_NAMED} more" if len(moved) > NUM_NAMED else ""
    return f"{len(moved)} of {number} columns drifted: {', '.join(named)}{more}"


def _headed(page: str, title: str, record: Mapping[str, Any]) -> str:
    """Evidently's page under a head that says of which model and requests it speaks, with its doors shut."""
    window, skipped = record["window"], record["skipped"]
    left_out = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in skipped.items())
    lines = [
        record["message"],
        f"{record['n']} requests from {window['start']} to {window['end']}; left out: {left_out}. "
        f"{record['share_with_warnings']:.1%} were answered with a warning.",
        "Image statistics are compared with the training split, answers with the calibration split. "
        "The drift score is the distance between the two distributions, 0 to 1; drift needs a small "
        "p-value as well (drift.json holds them).",
        f"Assumptions: {'; '.join(record['assumptions'])}.",
        f"Bundle {record['bundle']}",
    ]
    head = f"<h1>{html.escape(title)}</h1>" + "".join(f"<p>{html.escape(line)}</p>" for line in lines)
    for mark, addition in (
        ('<meta charset="UTF-8">', f"{CONTENT_POLICY}<title>{html.escape(title)}</title>"),
        ("<body>", f'<header style="font: 16px sans-serif; max-width: 60em; margin: 2em">{head}</header>'),
    ):
        assert mark in page, f"Evidently's page has no {mark}"
        page = page.replace(mark, mark + addition, 1)
    return page
