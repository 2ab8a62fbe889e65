"""Do the images and the answers of a served model still look as they did, and are the answers still right?

What is compared, over all requests of the window and at each site and scanner with enough of them:

    statistics   `stat_*`               image statistics, with the training split (reference.parquet)
    embedding    `embedding`            what the network makes of the image, with the calibration split
                                        (heldout.parquet), in all directions at once
    scores       `prob_<class>`         of the positive class, or of each class, with the calibration split
    prevalence   `prevalence_<class>`   the mean of that probability: the share of the ill that the model expects
    decisions    `decision_<class>`     whether it was called; of a detector also `num_boxes`

Something has drifted where p after Holm's correction over all of these is below a quarter of alpha and the distance is
at least `minimum_effect`. Another quarter is for the first question of a clinic, over all requests: is another share of
those who come ill? It is answered with a share and its interval. The other half of alpha is for what labels say: where
some have come, the live sensitivity, specificity, AUC, calibration and coverage of the conformal sets are worked out,
and an interval that excludes what was declared is an alarm too. `cadx/drift.py`, `cadx/prevalence.py` and
`cadx/outcomes.py` hold the tests and their sources.

The tests are our own and not Evidently's, because its chi-square test takes the reference's shares for the truth, its
Fisher test wants samples of equal size, and none of its tests asks for a minimum effect. Its page shows their verdicts.

What it cannot tell: drift in fewer requests than `minimum_n`. The tests take images as independent: where patients have
several, or the requests of one day share a fault, p-values are too small, and alarms come more often than alpha. Each
window is a test of its own: windows that overlap share their false alarms, a hundred that do not hold about alpha.

drift.json:

    schema              2
    experiment, seed    of the bundle
    bundle              digest of the bundle
    n                   requests compared
    n_reference         rows compared with: training, calibration
    window              start, end: times of the first and the last request, UTC
    skipped             lines left out: torn, other_bundles, duplicates; older: requests before the window
    alpha, minimum_effect, minimum_n
    columns             the findings: slice, group, name, p_value, adjusted_p, effect, drifted, reference_mean,
                        current_mean, n_reference, n
    prevalence          of each watched class: of, reference, value, low, high, n, method, p_value, moved
    unknown             requests of sites and scanners that the reference does not hold: by kind and name
    n_labels            prediction_ids that labels were given for
    n_unmatched         of these, those of no request in the log, whichever bundle answered
    n_labelled          requests with labels, of the labelled window
    outcomes            name, of, value, low, high, n, method, at_least, at_most, broken
    drifted             whether anything has; null: too few requests, neither alarm nor all-clear
    retrain             whether a pipeline should act: anything has drifted, or is no longer as declared
    trigger             why: moved, what has drifted, as "slice: name"; prevalence, of which classes; broken, what is
                        no longer as declared
    message             that in words
    share_with_warnings of the requests
    share_referred      of the requests: those that the model leaves to a person
    assumptions         in words
    evidently           Evidently's own JSON of its page: `metrics`, the distance of each quantity, and `tests`, FAIL
                        where it has drifted; null: too few requests

Beside it: the report, for whoever decides what to do; Evidently's page, quantity by quantity; and the figures in
Prometheus' text form, a textfile for its node exporter.
"""

import html
import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
import pandas as pd
from pydantic import Field, model_validator

from cadx.bundle import EMBEDDING_DECIMALS, REFERENCE_DECIMALS, Bundle, Manifest
from cadx.drift import Finding, called, compare_requests, unknown_places
from cadx.files import write_json
from cadx.outcomes import COVERAGE, Outcome, live_outcomes
from cadx.prevalence import Prevalence, compare_prevalence
from cadx.reporting import PALETTE, Page, panels
from cadx.request_log import compact, read_labels, read_requests, short, unmatched
from cadx.webhook import check_webhook, post
from components.contract import Alarm, In, Keep, MaybeIn, Out, Params, step

FOR_DRIFT, FOR_PREVALENCE, FOR_LABELS = 0.25, 0.25, 0.5
"""Shares of alpha. A change of the images is plain; that of a rare class's share is at the edge of what can be seen."""

NUM_NAMED = 4  # findings in the alarm's one line, and drawn
_TITLE_LETTERS = 34  # in a line over a drawing
_FORMATS = {"distance": ".2f", "chance": ".2g", "before": ".3g", "now": ".3g"}
CALLED, NOT_CALLED = "called", "not called"

# A browser then refuses every request that Evidently's page might make; of its own accord it makes none.
CONTENT_POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; font-src data:; img-src data: blob:\">"
)
STATISTICS_IN_WORDS = {
    "mean": "mean brightness",
    "std": "contrast (standard deviation)",
    "p01": "brightness of the darkest hundredth",
    "p50": "median brightness",
    "p99": "brightness of the brightest hundredth",
    "entropy_bits": "variety of grey levels (entropy, bits)",
    "sharpness": "sharpness (neighbouring pixels' difference)",
    "dark_fraction": "share of black pixels",
    "bright_fraction": "share of white pixels",
}


Share = Annotated[float, Field(ge=0, le=1)]


class MonitorParams(Params):
    """When to alarm: at what is no chance, and large enough to matter."""

    alpha: float = Field(
        default=0.04,
        gt=0,
        lt=1,
        description="share of windows that may alarm without a cause, over all tests, sites and scanners; "
        "a quarter is for drift, a quarter for the prevalence, half for what labels say",
    )
    minimum_effect: float = Field(
        default=0.03,
        ge=0,
        le=1,
        description="distance between the distributions from which on it matters; of shares and probabilities "
        "it is a difference, 0.03 being 3 percentage points",
    )
    minimum_n: int = Field(
        default=30, ge=2, description="requests that a verdict needs, over all and at a site"
    )
    window: int | None = Field(
        default=200,
        ge=2,
        description="compare the latest requests, so many; null: all, in which a new fault drowns",
    )
    labelled_window: int | None = Field(
        default=1000, ge=2, description="of the requests with labels, the latest so many; null: all"
    )
    at_least: dict[Literal["sensitivity", "specificity", "ppv", "npv", "auc", "coverage"], Share] = Field(
        default_factory=dict,
        description="declared values that labels are held against, beside the operating point's target and, where "
        "the calibration patients had one image each, the conformal sets' nominal coverage",
    )
    at_most: dict[Literal["calibration_intercept", "calibration_slope"], float] = Field(
        default_factory=dict, description="likewise, from above"
    )

    @model_validator(mode="after")
    def _can_judge(self) -> Self:
        if self.window is not None and self.window < self.minimum_n:
            raise ValueError(
                f"window {self.window} never holds the minimum_n of {self.minimum_n} requests that a verdict needs; "
                "widen the window, or lower minimum_n"
            )
        return self


@step
def monitor(
    *,
    request_log: In,
    bundle: In,
    requests: Keep,
    drift: Out,
    report: Out,
    evidently: Out,
    prometheus: Out,
    labels: MaybeIn = None,
    webhook: str = "",
    params: MonitorParams,
) -> None:
    """Compare the requests that a bundle has answered with what it was made from, and with labels that have come.

    Raises:
        Alarm: if anything has drifted or is no longer as declared; all outputs are written.
        ValueError: if the log holds no request of this bundle, or the bundle no held-out answers.
    """
    if webhook:
        check_webhook(webhook, "--webhook")
    opened = Bundle(bundle)
    manifest, heldout, reference = opened.manifest, opened.heldout(), opened.reference()
    compacted = compact(request_log, requests)
    ours = compacted.requests.get(short(opened.digest), 0)
    others = sum(compacted.requests.values()) - ours
    if not ours:
        raise ValueError(
            f"{request_log}: no request that {opened.digest} answered ({others} lines of other bundles, "
            f"{compacted.torn} cut short); give the folder that CADX_REQUEST_LOG names, and the bundle that is served"
        )
    current = _rounded(read_requests(requests, opened.digest, last=params.window))
    labelled, num_labels, num_unmatched = _labelled(requests, labels, opened, params.labelled_window)
    seen = _watch(reference, heldout, current, labelled, manifest, params)
    skipped = {
        "torn": compacted.torn,
        "other_bundles": others,
        "duplicates": compacted.duplicates,
        "older": ours - len(current),
    }
    record: dict[str, Any] = {
        "schema": 2,
        "experiment": manifest.experiment,
        "seed": manifest.seed,
        "bundle": opened.digest,
        "n": len(current),
        "n_reference": {"training": len(reference), "calibration": len(heldout)},
        "window": {
            end: time.isoformat(timespec="milliseconds").replace("+00:00", "Z")
            for end, time in (("start", current["time"].iloc[0]), ("end", current["time"].iloc[-1]))
        },
        "skipped": skipped,
        "alpha": params.alpha,
        "minimum_effect": params.minimum_effect,
        "minimum_n": params.minimum_n,
        "columns": [finding._asdict() for finding in seen.findings],
        "prevalence": [_flat(one) for one in seen.prevalence],
        "unknown": unknown_places(heldout, current),
        "n_labels": num_labels,
        "n_unmatched": num_unmatched,
        "n_labelled": len(labelled),
        "outcomes": [_flat(outcome) for outcome in seen.outcomes],
        "drifted": bool(seen.moved or seen.shifted) if seen.findings else None,
        "retrain": bool(seen.moved or seen.shifted or seen.broken),
        "trigger": {
            "moved": [f"{finding.slice}: {finding.name}" for finding in seen.moved],
            "prevalence": [one.of for one in seen.shifted],
            "broken": [_named(outcome) for outcome in seen.broken],
        },
        "message": _message(seen, len(current), params.minimum_n),
        "share_with_warnings": float((current["num_warnings"] > 0).mean()),
        "share_referred": float(current["refer"].mean()),
        "assumptions": _assumptions(manifest),
        "evidently": None,
    }
    _page(record, seen, reference, heldout, current).write(report)
    title = f"{manifest.experiment}, seed {manifest.seed}: drift"
    if seen.findings:
        page, record["evidently"] = _evidently(seen.findings, reference, heldout, current, params)
        evidently.write_text(_headed(page, f"{title}, quantity by quantity", record), encoding="utf-8")
    else:
        empty = Page(title, f"Bundle {opened.digest}")
        empty.callout("warn", record["message"])
        empty.write(evidently)
    write_json(drift, record)
    _write_prometheus(prometheus, record, seen)
    if num_unmatched:
        print(f"{labels}: {_unmatched(record)}; take them from the answers", file=sys.stderr)
    if record["retrain"]:
        if webhook:
            told = ("schema", "experiment", "seed", "bundle", "n", "window", "retrain", "trigger", "message")
            refusal = post(webhook, {name: record[name] for name in told})
            if refusal:
                print(f"{refusal}; the alarm stands in the report", file=sys.stderr)
        raise Alarm(f"{record['message']}; look at the report")
    print(record["message"])


class _Seen(NamedTuple):
    """What the watch has found: comparisons (none: too few requests), prevalences, and what labels say."""

    findings: list[Finding]
    prevalence: list[Prevalence]
    outcomes: list[Outcome]

    @property
    def moved(self) -> list[Finding]:
        """What has drifted, the furthest first."""
        drifted = (finding for finding in self.findings if finding.drifted)
        return sorted(drifted, key=lambda finding: -finding.effect)

    @property
    def shifted(self) -> list[Prevalence]:
        """Classes of which another share comes."""
        return [one for one in self.prevalence if one.moved]

    @property
    def broken(self) -> list[Outcome]:
        """What is no longer as declared."""
        return [outcome for outcome in self.outcomes if outcome.broken]


def _watch(
    reference: pd.DataFrame,
    heldout: pd.DataFrame,
    current: pd.DataFrame,
    labelled: pd.DataFrame,
    manifest: Manifest,
    params: MonitorParams,
) -> _Seen:
    """Each question of the watch with its share of alpha, as far as requests and labels suffice for it."""
    watched = [manifest.positive] if manifest.positive else list(manifest.classes)
    findings: list[Finding] = []
    prevalence: list[Prevalence] = []
    if len(current) >= params.minimum_n:
        findings = compare_requests(
            reference,
            heldout,
            current,
            watched,
            alpha=params.alpha * FOR_DRIFT,
            minimum_effect=params.minimum_effect,
            minimum_n=params.minimum_n,
        )
        if manifest.task != "detection":  # a box's score is no probability
            prevalence = compare_prevalence(
                heldout,
                current,
                watched,
                alpha=params.alpha * FOR_PREVALENCE,
                minimum_effect=params.minimum_effect,
            )
    return _Seen(findings, prevalence, [] if labelled.empty else _outcomes(labelled, manifest, params))


def _rounded(requests: pd.DataFrame) -> pd.DataFrame:
    """Numbers as rounded as those of the references."""
    numbers = [name for name in map(str, requests) if name.startswith(("stat_", "prob_"))]
    return requests.assign(
        embedding=[np.round(embedding, EMBEDDING_DECIMALS) for embedding in requests["embedding"]],
        **{name: requests[name].round(REFERENCE_DECIMALS) for name in numbers},
    )


def _labelled(
    tables: Path, labels: Path | None, bundle: Bundle, last: int | None
) -> tuple[pd.DataFrame, int, int]:
    """The latest requests whose labels have come, with these beside them; labels given; those of no request."""
    if labels is None:
        return pd.DataFrame(), 0, 0
    known = read_labels(labels, bundle.manifest.classes, bundle.manifest.task)
    num_unmatched = unmatched(tables, known["prediction_id"])
    requests = read_requests(tables, bundle.digest, embeddings=False)
    if requests.empty:
        return requests, len(known), num_unmatched
    joined = requests.merge(known, on="prediction_id")
    # Labels come late: after a new version has gone live the first are all of the one before.
    if joined.empty and num_unmatched == len(known):
        raise ValueError(
            f"{labels}: none of its {len(known)} prediction_ids is of a request in the log; "
            "take them from the answers"
        )
    told = joined[[f"label_{name}" for name in bundle.manifest.classes]].notna()
    one_class = bundle.manifest.task in ("binary", "multiclass")  # half a label is none
    # Rows whose labels are still to come take no place among the latest.
    joined = joined[told.all(axis=1) if one_class else told.any(axis=1)]
    return joined if last is None else joined.tail(last), len(known), num_unmatched


def _outcomes(labelled: pd.DataFrame, manifest: Manifest, params: MonitorParams) -> list[Outcome]:
    """The live metrics, held against what the bundle and the parameters declare."""
    point, conformal = manifest.operating_point, manifest.conformal
    declared: dict[str, float] = {}
    # Of boxes the target is a sensitivity per lesion; labels that come later are of whole images.
    if point is not None and point.target_metric and point.target_value and manifest.task != "detection":
        declared[point.target_metric] = point.target_value
    if conformal is not None and _holds_of_images(manifest):
        declared[COVERAGE] = conformal.coverage
    return live_outcomes(
        labelled,
        task=manifest.task,
        classes=manifest.classes,
        positive=manifest.positive,
        at_least=declared | {str(name): value for name, value in params.at_least.items()},
        at_most={str(name): value for name, value in params.at_most.items()},
        alpha=params.alpha * FOR_LABELS,
    )


def _holds_of_images(manifest: Manifest) -> bool:
    """Whether what prediction sets promise of patients holds of images: no calibration patient had several."""
    conformal = manifest.conformal
    if conformal is None or not conformal.images:  # bundles of before images were counted
        return not manifest.clustered
    return conformal.images == conformal.patients


def _unmatched(record: Mapping[str, Any]) -> str:
    """That labels belong to nothing, in words."""
    counted = f"{record['n_unmatched']} of the {record['n_labels']} prediction_ids with labels"
    return f"{counted} are of no request in the log"


def _assumptions(manifest: Manifest) -> list[str]:
    assumptions = ["images were taken as independent of each other"]
    if manifest.clustered:
        assumptions.append("patients may have several images, which makes p-values somewhat too small")
    if manifest.conformal is not None and not _holds_of_images(manifest):
        assumptions.append(
            "prediction sets promise their coverage of patients, and requests do not say whose they are: it is told "
            "of images, and held only against a value under monitor.at_least"
        )
    return assumptions


def _flat(one: Outcome | Prevalence) -> dict[str, Any]:
    """The record of one, the fields of its estimate among its own."""
    fields = one._asdict()
    return fields | fields.pop("estimate").model_dump()


def _named(outcome: Outcome) -> str:
    return f"{outcome.name} of {outcome.of}"


def _message(seen: _Seen, n: int, minimum_n: int) -> str:
    findings, moved = seen.findings, seen.moved
    if not findings:
        said = f"too few requests for a verdict, {n} of {minimum_n}: neither alarm nor all-clear"
    elif not moved:
        said = f"no drift in {len(findings)} comparisons"
    else:
        named = [
            f"{'' if f.slice == 'all' else f'{f.slice}: '}{in_words(f.name)}"
            + ("" if f.current_mean is None else f" {f.reference_mean:.3g} -> {f.current_mean:.3g}")
            + f" (distance {f.effect:.2f})"
            for f in moved[:NUM_NAMED]
        ]
        more = f" and {len(moved) - NUM_NAMED} more" if len(moved) > NUM_NAMED else ""
        said = f"{len(moved)} of {len(findings)} comparisons drifted: {', '.join(named)}{more}"
    altered = any(finding.group == "statistics" for finding in moved)
    for one in seen.shifted:
        share, low, high = (
            100 * (number or 0) for number in (one.estimate.value, one.estimate.low, one.estimate.high)
        )
        said += f"; prevalence of {one.of} is about {share:.3g} % (95 % interval {low:.3g} to {high:.3g} %)"
        said += f", reference {100 * one.reference:.3g} %"
        said += ", if that is not for the images, which have changed too" if altered else ""
    for outcome in seen.broken:
        said += f"; {_named(outcome)} is {outcome.estimate.value:.3f}, declared {_declared(outcome)}"
    return said


# --- For people -----------------------------------------------------------------------------------------


def _page(
    record: Mapping[str, Any],
    seen: _Seen,
    reference: pd.DataFrame,
    heldout: pd.DataFrame,
    current: pd.DataFrame,
) -> Page:
    """The summary, for somebody who has to decide what to do next."""
    findings, moved, outcomes = seen.findings, seen.moved, seen.outcomes
    window = record["window"]
    page = Page(f"{record['experiment']}, seed {record['seed']}: watch", f"Bundle {record['bundle']}")
    calm = not record["retrain"] and record["drifted"] is not None
    page.callout("ok" if calm else "warn", record["message"])
    page.facts(
        [
            ("requests compared", record["n"]),
            ("first request, UTC", window["start"][:16].replace("T", " ")),
            ("last request, UTC", window["end"][:16].replace("T", " ")),
            ("answered with a warning", f"{record['share_with_warnings']:.1%}"),
            ("left to a person", f"{record['share_referred']:.1%}"),
            ("labels so far", record["n_labelled"]),
        ]
    )
    for kind, names in record["unknown"].items():
        if names:
            listed = ", ".join(f"{name} ({n})" for name, n in names.items())
            page.callout("warn", f"Requests of a {kind} that the model was not calibrated on: {listed}.")

    page.section("What has moved")
    page.table(
        [_row(finding) for finding in moved],
        "The furthest first. Distance: 0 is alike, 1 is nothing in common. Chance: the probability of such a "
        "difference without any change, allowing for the number of comparisons (p-value after Holm's correction).",
        formats=_FORMATS,
        empty="Nothing." if findings else "Not asked: too few requests.",
    )
    if drawn := [finding for finding in moved if finding.current_mean is not None][:NUM_NAMED]:
        figure, axes = panels(7.2, 2.7 * ((len(drawn) + 1) // 2), columns=2, rows=(len(drawn) + 1) // 2)
        for finding, axis in zip(drawn, axes, strict=False):
            _draw(axis, finding, *_sides(finding, reference, heldout, current))
        for axis in axes[len(drawn) :]:
            axis.set_axis_off()
        page.figure(figure, "Blue: the reference. Orange: these requests. Heights are shares of the images.")

    page.section("How many are ill?")
    page.table(
        [
            {
                "class": one.of,
                "reference": one.reference,
                "now (95 % interval)": one.estimate,
                "chance": one.p_value,
                "moved": "YES" if one.moved else "no",
            }
            for one in seen.prevalence
        ],
        "The share of each class among these requests, told from calibrated probabilities without labels. It holds "
        "where the ill and the well look as they did and only their share has changed; where images have changed, it "
        "means nothing.",
        formats={"reference": ".3f", "chance": ".2g"},
        empty="Not asked: a detector's scores are no probabilities."
        if findings
        else "Not asked: too few requests.",
    )

    page.section("Are the answers right?")
    if record["n_unmatched"]:
        page.callout("warn", f"{_unmatched(record)}: what was found of these patients is not counted here.")
    if outcomes:
        page.table(
            [
                {
                    "metric": _named(outcome).replace("_", " "),
                    "value (95 % interval)": outcome.estimate,
                    "cases": outcome.estimate.n,
                    "declared": _declared(outcome),
                    "holds": "" if not _declared(outcome) else "NO" if outcome.broken else "yes",
                }
                for outcome in outcomes
            ],
            f"Of the {record['n_labelled']} latest requests whose labels have come. A declared value counts as broken "
            "where what was seen excludes it, allowing for the number of declared values.",
        )
    else:
        page.text(
            "Unknown: no labels have come. Drift says that something has changed, not that answers are wrong. "
            "Collect what was found later, by prediction_id, and give it with --labels."
        )

    page.section("What was compared")
    page.table(
        [_row(finding) for finding in findings if finding.slice == "all"],
        "All requests of the window. Before and now are means; what the network sees is compared as a whole: the "
        "numbers in its last layer, which have no scale of their own.",
        formats=_FORMATS,
        empty="Nothing: too few requests.",
    )
    if local := [finding for finding in findings if finding.slice != "all"]:
        with page.details(f"By site and scanner: {len(local)} comparisons"):
            page.table(
                [_row(finding) for finding in local],
                f"Sites and scanners with at least {record['minimum_n']} requests.",
                formats=_FORMATS,
            )
    skipped = ", ".join(f"{number} {what.replace('_', ' ')}" for what, number in record["skipped"].items())
    page.text(
        f"Image statistics are compared with the {record['n_reference']['training']} images that the model was trained "
        f"on; answers with those on the {record['n_reference']['calibration']} calibration images. Of windows without "
        f"any change, at most {record['alpha'] * FOR_DRIFT:.1%} raise an alarm here, and as many one for the "
        f"prevalence. Evidently's page shows the distribution of each quantity. Lines left out: {skipped}.\n\n"
        f"Assumptions: {'; '.join(record['assumptions'])}."
    )
    return page


def _row(finding: Finding) -> dict[str, Any]:
    return {
        "quantity": in_words(finding.name),
        "where": finding.slice,
        "before": finding.reference_mean,
        "now": finding.current_mean,
        "distance": finding.effect,
        "chance": finding.adjusted_p,
        "requests": finding.n,
    }


def in_words(name: str) -> str:
    """A quantity's name for readers.

    >>> in_words("stat_mean"), in_words("prevalence_opacity")
    ('mean brightness', 'expected share of opacity (mean probability)')
    """
    kind, _, of = name.partition("_")
    return {
        "stat": STATISTICS_IN_WORDS.get(of, of),
        "embedding": "what the network sees (embedding)",
        "prob": f"distribution of the probability of {of}",
        "prevalence": f"expected share of {of} (mean probability)",
        "decision": f"share called {of}",
        "num": "boxes called in an image",
    }[kind]


def _declared(outcome: Outcome) -> str:
    bounds = (("at least", outcome.at_least), ("at most", outcome.at_most))
    return ", ".join(f"{word} {bound:g}" for word, bound in bounds if bound is not None)


def _sides(
    finding: Finding, reference: pd.DataFrame, heldout: pd.DataFrame, current: pd.DataFrame
) -> tuple[pd.Series, pd.Series]:
    """The two samples behind a finding."""
    before = reference if finding.group == "statistics" else heldout
    if finding.slice != "all":
        kind, _, name = finding.slice.partition(" ")
        before, current = before[before[kind] == name], current[current[kind] == name]
    if finding.group == "decisions" and finding.name.startswith("decision_"):
        of = finding.name.removeprefix("decision_")
        return called(before, of), called(current, of)
    column = finding.name.replace("prevalence_", "prob_", 1)
    return before[column], current[column]


def _draw(axis: Any, finding: Finding, before: pd.Series, now: pd.Series) -> None:
    values = [side.to_numpy(np.float64) for side in (before, now)]
    edges = np.histogram_bin_edges(np.concatenate(values), bins=24)
    for side, colour in zip(values, PALETTE, strict=False):
        axis.hist(side, edges, weights=np.full(len(side), 1 / len(side)), color=colour, alpha=0.55)
    # What stands in brackets is in the table; two panels share a line.
    quantity = fill(in_words(finding.name).partition(" (")[0], _TITLE_LETTERS)
    axis.set_title(quantity if finding.slice == "all" else f"{quantity}\n{finding.slice}", fontsize=9)


def _evidently(
    findings: Sequence[Finding],
    reference: pd.DataFrame,
    heldout: pd.DataFrame,
    current: pd.DataFrame,
    params: MonitorParams,
) -> tuple[str, dict[str, Any]]:
    """Evidently's page, and its JSON, with the verdicts on every quantity of all requests that is a column."""
    # 6 s.
    from evidently import DataDefinition, Dataset, Report
    from evidently.legacy.calculations.stattests import StatTest, register_stattest
    from evidently.legacy.core import ColumnType
    from evidently.presets import DataDriftPreset

    shown = {
        finding.name: finding
        for finding in findings
        if finding.slice == "all" and finding.group in ("statistics", "scores", "decisions")
    }

    def verdict(reference: pd.Series, _: pd.Series, __: Any, ___: float) -> tuple[float, bool]:
        # The distance is the score, since Evidently lists the highest scores first.
        finding = shown[str(reference.name)]
        return finding.effect, finding.drifted

    rule = f"p after Holm < {params.alpha * FOR_DRIFT:g} and distance of at least {params.minimum_effect:g}"
    tests = [
        StatTest("cadx_numbers", f"Kolmogorov-Smirnov: {rule}", [ColumnType.Numerical]),
        StatTest("cadx_shares", f"Fisher: {rule}", [ColumnType.Categorical]),
    ]
    for test in tests:
        register_stattest(test, verdict)
    # Side by side in one table: the shorter references end in NaN, which Evidently drops column by column.
    pairs = {name: _sides(finding, reference, heldout, current) for name, finding in shown.items()}
    before, now = (
        pd.concat(
            {name: _in_words(pair[side]).reset_index(drop=True) for name, pair in pairs.items()}, axis=1
        )
        for side in (0, 1)
    )
    definition = DataDefinition(
        numerical_columns=[name for name, pair in pairs.items() if pair[0].dtype != bool],
        categorical_columns=[name for name, pair in pairs.items() if pair[0].dtype == bool],
    )
    preset = DataDriftPreset(
        columns=list(shown),
        num_method=tests[0].name,
        cat_method=tests[1].name,
        threshold=params.minimum_effect,
        drift_share=1 / len(shown),  # one column is enough
    )
    with warnings.catch_warnings(), np.errstate(invalid="ignore"):
        # It correlates columns on the way, also constant ones.
        warnings.simplefilter("ignore", RuntimeWarning)
        snapshot = Report([preset], include_tests=True).run(
            Dataset.from_pandas(now, definition), Dataset.from_pandas(before, definition)
        )
    told: dict[str, Any] = json.loads(snapshot.json())
    counted = told["metrics"][0]["value"]["count"]
    assert counted == sum(finding.drifted for finding in shown.values()), "the page would say something else"
    return snapshot.get_html_str(as_iframe=False), told


def _in_words(values: pd.Series) -> pd.Series:
    """Decisions as text, which is what Evidently takes for a category."""
    return values.map({True: CALLED, False: NOT_CALLED}) if values.dtype == bool else values


def _headed(page: str, title: str, record: Mapping[str, Any]) -> str:
    """Evidently's page under a head that says of which model and requests it speaks, with its doors shut."""
    window = record["window"]
    lines = [
        record["message"],
        f"{record['n']} requests from {window['start']} to {window['end']}, all sites together. Reference: the images "
        "that the model was trained on (stat_: image statistics), its answers on the calibration images (prob_: "
        "probabilities, decision_: what was called).",
        "The drift score is the distance between the two distributions, 0 to 1; drift needs a small p-value as well. "
        "Sites, scanners, embeddings and labels stand in the report.",
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


# --- For machines ---------------------------------------------------------------------------------------


def _write_prometheus(path: Path, record: Mapping[str, Any], seen: _Seen) -> None:
    """The watch's figures in Prometheus' text form, as its node exporter reads them from a folder."""
    from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

    registry = CollectorRegistry()
    model = {name: str(record[name]) for name in ("experiment", "seed")} | {"bundle": short(record["bundle"])}

    def gauge(name: str, meaning: str, values: Sequence[tuple[Mapping[str, str], float]]) -> None:
        labels = [*model, *(values[0][0] if values else ())]
        made = Gauge(f"cadx_{name}", meaning, labels, registry=registry)
        for own, value in values:
            made.labels(**model, **own).set(value)

    drifted = record["drifted"]
    gauge("alarm", "1 if the watch has raised an alarm", [({}, float(record["retrain"]))])
    gauge(
        "drifted",
        "1 drift, 0 none, NaN too few requests",
        [({}, np.nan if drifted is None else float(drifted))],
    )
    gauge("window_requests", "Requests compared", [({}, record["n"])])
    end = pd.Timestamp(record["window"]["end"]).timestamp()
    gauge("window_end_timestamp_seconds", "Time of the last request compared", [({}, end)])
    for name in ("share_with_warnings", "share_referred"):
        gauge(name, f"{name.replace('_', ' ').capitalize()}, of the requests compared", [({}, record[name])])
    gauge(
        "lines_left_out",
        "Lines of the request log that were not compared",
        [({"reason": reason}, number) for reason, number in record["skipped"].items()],
    )
    places = [({"slice": finding.slice, "quantity": finding.name}, finding) for finding in seen.findings]
    gauge("drift_distance", "Distance from the reference, 0 to 1", [(of, f.effect) for of, f in places])
    gauge("drift_p", "P-value after Holm's correction", [(of, f.adjusted_p) for of, f in places])
    gauge("drift_found", "1 where the quantity has drifted", [(of, float(f.drifted)) for of, f in places])
    gauge(
        "prevalence",
        "Share of the class among the requests, without labels, with the ends of its 95 % interval",
        [
            ({"class": one.of, "bound": bound}, number)
            for one in seen.prevalence
            for bound in ("value", "low", "high")
            if (number := getattr(one.estimate, bound)) is not None
        ],
    )
    gauge(
        "prevalence_moved",
        "1 where it is another than among the reference",
        [({"class": one.of}, float(one.moved)) for one in seen.prevalence],
    )
    gauge("labelled_requests", "Requests with labels", [({}, record["n_labelled"])])
    gauge("labels_unmatched", "Labels of no request in the log", [({}, record["n_unmatched"])])
    gauge(
        "outcome",
        "Live metric with the ends of its 95 % interval",
        [
            ({"metric": outcome.name, "class": outcome.of, "bound": bound}, number)
            for outcome in seen.outcomes
            for bound in ("value", "low", "high")
            if (number := getattr(outcome.estimate, bound)) is not None
        ],
    )
    gauge(
        "outcome_broken",
        "1 where the live interval excludes the declared value",
        [({"metric": outcome.name, "class": outcome.of}, float(outcome.broken)) for outcome in seen.outcomes],
    )
    write_to_textfile(str(path), registry)
