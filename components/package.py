"""What goes into service: the archive that TorchServe loads, and the model card that people read."""

import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from cadx import detection
from cadx import metrics as classification
from cadx.bundle import Bundle, Manifest
from cadx.checklists import CLAIM, TRIPOD_AI, fill, missing
from cadx.explaining import title
from cadx.files import digest_path
from cadx.gating import Decision, MetricsFile, read_decision, read_metrics
from cadx.loading import input_text
from cadx.metrics import Subgroup
from cadx.reporting import Page, estimate_text
from components.contract import In, Out, Params, step
from serving.archive import NAME_PATTERN, Release, Verdict, release_of, write_archive

_HEADLINE = ("ap50", "froc", "auc", "sensitivity", "specificity")


class PackageParams(Params):
    """What the card says that no file knows."""

    name: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="the model's name in the server's addresses; null for the experiment's",
    )
    intended_use: str = "Research. Not for diagnosis, and no replacement for a reader."
    prevalence: dict[str, float] = Field(
        default={},
        description="class -> its share where the model will be used, for a binary model of the positive class; "
        "answers then say the probabilities there too. Empty: that of the calibration split",
    )
    limits: tuple[str, ...] = Field(default=(), description="what users must know before they trust it")
    contact: str = Field(default="", description="whom to ask")


@step
def package(*, bundle: In, decision: In, metrics: In, archive: Out, card: Out, params: PackageParams) -> None:
    """Pack a bundle with its handler and its decision for TorchServe; write its model card.

    A refused model is packed too, and carries its refusal: `deploy` will not serve it. Equal inputs give
    equal bytes.

    Raises:
        ValueError: if the decision is about another bundle, or rests on other metrics, or the prevalence is not one.
    """
    opened, decided = Bundle(bundle), read_decision(decision)
    if decided.bundle != opened.digest:
        raise ValueError(f"{decision}: about another bundle than {bundle}; run `cadx gate` on this one")
    if decided.metrics != digest_path(metrics):
        raise ValueError(f"{decision}: rests on other numbers than {metrics}; run `cadx gate` again")
    name = params.name or opened.manifest.experiment
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"experiment {name!r}: no name for an address; set package.name to one of a-z, 0-9, '-'"
        )
    verdict = verdict_of(decided, decision)
    try:
        opened.shares_at(params.prevalence)
    except ValueError as error:
        raise ValueError(f"package.prevalence: {error}") from None
    release = release_of(name, opened.manifest, opened.digest, verdict, decided.metrics, params.prevalence)
    write_archive(archive, bundle, release)
    _card(release, opened, decided, read_metrics(metrics), params, archive).write(card)


def verdict_of(decided: Decision, decision: Path) -> Verdict:
    """What a release repeats of the decision that stands in a file."""
    return Verdict(promote=decided.promote, reasons=decided.reasons, digest=digest_path(decision))


def _card(
    release: Release,
    bundle: Bundle,
    decided: Decision,
    record: MetricsFile,
    params: PackageParams,
    archive: Path,
) -> Page:
    manifest = bundle.manifest
    metrics = record.metrics
    meanings = detection.METRICS if manifest.task == "detection" else classification.METRICS
    page = Page(f"{release.name} {release.version}", "Model card")
    page.facts([(title(name), metrics[name]) for name in _HEADLINE if name in metrics])
    _verdict(page, decided)
    page.section("What it is for")
    page.text(params.intended_use)
    page.table(_facts(manifest, params.prevalence), "What it takes and what it says.")
    if params.contact:
        page.text(f"Contact: {params.contact}")
    page.section("What it is known to do")
    patients = f" of {record.n_patients:,} patients" if record.clustered else ""
    page.text(
        f"Scored on {record.n:,} images{patients} of the {_part(record.split)}. "
        "In brackets: 95 % confidence intervals."
    )
    page.table(
        [
            {"metric": title(name), "value (95 % interval)": estimate, "what it says": meanings[name].meaning}
            for name, estimate in metrics.items()
        ]
    )
    with page.details("How each interval was made"):
        page.table([{"metric": title(name), "method": estimate.method} for name, estimate in metrics.items()])
    _subgroups(page, record.by_subgroup)
    page.section("What it is not known to do")
    for limit in (*params.limits, *record.warnings, *manifest.assumptions):
        page.callout("warn", limit)
    page.text(
        "Its numbers hold for patients and machines like those it was scored on. Each answer warns where an "
        "image lies outside of the training range; `cadx monitor` watches for slower changes."
    )
    page.section("Where it comes from")
    source = manifest.source
    page.text(
        f"{source.title}. Licence: {source.licence}. Citation: {source.citation}. {source.note}".strip()
    )
    page.table(
        [
            {"what": what, "digest": digest}
            for what, digest in {
                "archive": digest_path(archive),
                "bundle": bundle.digest,
                "metrics": decided.metrics,
                "dataset": manifest.provenance.dataset,
                "splits": manifest.provenance.splits,
                "parameters": manifest.provenance.parameters,
                "code of training": manifest.provenance.code,
                "bill of materials": manifest.sbom or "none in this bundle",
            }.items()
        ],
        "One chain, from the data to this file: `cadx verify` follows it.",
    )
    if (origin := manifest.provenance.pretrained) is not None:
        page.text(f"Training started from {origin.name}, {origin.digest}. Licence: {origin.licence}.")
    if manifest.provenance.device:
        page.text(f"Trained on: {manifest.provenance.device}, threads: {manifest.provenance.threads}.")
    page.table([{"library": k, "version": v} for k, v in manifest.provenance.versions.items()])
    page.section("What a paper on it must report")
    page.text(
        "Filled in from what the run knows by itself. What is missing has to be written by people; that it is filled "
        "in here does not say that it suffices."
    )
    facts = _known(bundle, decided, record, params)
    for name, checklist in (("CLAIM, 2024 update", CLAIM), ("TRIPOD+AI", TRIPOD_AI)):
        answers = fill(checklist, facts)
        open_items = missing(answers)
        page.text(
            f"{name}: {len(answers) - len(open_items)} of {len(answers)} items; missing: {', '.join(open_items)}."
        )
        with page.details(f"{name}, item by item"):
            page.table(
                [{"item": a.item.number, "asks": a.item.asks, "known": a.known or "missing"} for a in answers]
            )
    return page


def _known(bundle: Bundle, decided: Decision, record: MetricsFile, params: PackageParams) -> dict[str, str]:
    """What the run knows, by the names that `cadx.checklists` asks for; nothing that it would have to guess."""
    manifest, source, point = bundle.manifest, bundle.manifest.source, bundle.manifest.operating_point
    classes, trained = ", ".join(manifest.classes), manifest.provenance
    apart = trained.splits == record.splits and trained.dataset == record.dataset
    epochs = max((entry.get("epoch", 0) for entry in bundle.history()), default=0)
    patients = f" of {record.n_patients:,} patients" if record.clustered else ""
    groups = [f"{attribute} ({len(values)})" for attribute, values in record.by_subgroup.items()]
    members = len(manifest.weights)
    origin = trained.pretrained
    shown = [name for name in _HEADLINE if name in record.metrics]
    methods = dict.fromkeys(
        estimate.method for estimate in record.metrics.values() if estimate.low is not None
    )
    facts = {
        "subject": f"{manifest.task} model of {manifest.modality}: {classes}.",
        "intended_use": params.intended_use,
        "source": f"{source.title}; {source.licence}; {source.citation}.",
        "modality": f"{manifest.modality}.",
        "classes": f"Labels of the source: {classes}.",
        "preprocessing": f"{input_text(manifest.preprocessing)}.",
        "deidentification": "Ingest stops on identifiers; patients are known by pseudonyms alone.",
        "missing": "Unlabelled images take no part in scoring; unknown site, age or sex is a subgroup of none.",
        "splits": f"train, val, calibration and test; digest {trained.splits}.",
        "sample": f"{record.n:,} images{patients} were scored, of the {_part(record.split)}.",
        "model": f"{manifest.model.family}.",
        "software": ", ".join(f"{name} {version}" for name, version in trained.versions.items())
        + "; sbom.json.",
        "initialisation": f"Pretrained weights, {origin.name}." if origin else "Random weights.",
        "training": f"{epochs} epochs, seed {manifest.seed}; parameters {trained.parameters}.",
        "selection": "The epoch that did best on val.",
        "ensemble": f"{members} networks, averaged." if members > 1 else "None: one network.",
        "metrics": ", ".join(title(name) for name in record.metrics) + ".",
        "intervals": f"95 % intervals: {'; '.join(methods)}.",
        "evaluation": f"On the {_part(record.split)} of the same source." if apart else "",
        "external": "" if apart else "Scored on another dataset, or version of it, than it was trained on.",
        "disjoint": "By patient." if manifest.clustered and apart else "",
        "performance": "; ".join(f"{title(name)} {estimate_text(record.metrics[name])}" for name in shown)
        + ".",
        "subgroups": f"Scored apart: {', '.join(groups)}." if groups else "",
        "characteristics": f"Known of each image: {', '.join(groups)}." if groups else "",
        "failures": "The worst misses and false alarms stand in report.html.",
        "explanation": ""
        if manifest.task == "detection"
        else "Each answer comes with attention, if asked for.",
        "limitations": " ".join((*params.limits, *record.warnings, *manifest.assumptions)),
        "poor_input": "Unreadable input is refused; an image outside of the training range gets a warning.",
        "availability": f"Bundle {bundle.digest}, code of training {trained.code}.",
        "gate": f"{'Passed' if decided.promote else 'Refused'}: {decided.why}.",
    }
    if manifest.temperature is not None:
        facts["calibration"] = f"Temperature {manifest.temperature:.3f} and a bias per class, on calibration."
    if point is not None:
        chosen = f", chosen for {point.target_metric} {point.target_value:g}" if point.target_value else ""
        facts["operating_point"] = f"Frozen on the {_part(point.split)}{chosen}."
        limits = ", ".join(f"{name} {value:.4f}" for name, value in point.thresholds.items())
        what = "Boxes with a score" if manifest.task == "detection" else "A probability"
        facts["outputs"] = f"{what} for each of {classes}; called from {limits or 'the largest on'}."
    return facts


def _verdict(page: Page, decided: Decision) -> None:
    if decided.promote:
        page.callout("ok", f"Passed the gate: {decided.why}.")
    if decided.not_judged:
        page.callout("warn", "Not judged, and so promised to nobody: " + "; ".join(decided.not_judged) + ".")
    for reason in decided.reasons:
        page.callout("stop", f"Refused by the gate: {reason}.")
    with page.details("What the gate asked"):
        page.table(
            [
                {
                    "check": check.what,
                    "passed": check.passed,
                    "value": check.value,
                    "low": check.low,
                    "high": check.high,
                    "bound": check.bound,
                }
                for check in decided.checks
            ]
        )


def _facts(manifest: Manifest, prevalence: Mapping[str, float]) -> list[dict[str, str]]:
    point = manifest.operating_point
    assert point is not None, "write_archive refuses an incomplete bundle"
    calls = ", ".join(
        f"{name} at a probability of {value:.4f} or more" for name, value in point.thresholds.items()
    )
    target = f", chosen for {point.target_metric} {point.target_value:g}" if point.target_value else ""
    achieved = "; ".join(
        f"{name}: " + ", ".join(f"{metric} {estimate_text(e)}" for metric, e in estimates.items())
        for name, estimates in point.achieved.items()
    )
    settings = {k: v for k, v in manifest.model.model_dump(mode="json").items() if v is not None}
    return [
        {"what": "samples", "value": manifest.modality},
        {"what": "pixel spacing", "value": "required" if manifest.requires_spacing else "not needed"},
        {"what": "classes", "value": ", ".join(manifest.classes)},
        {"what": "calls", "value": f"{calls or 'the most probable class'}{target}"},
        {"what": f"on the {_part(point.split)} (n = {point.n:,})", "value": achieved},
        *_elsewhere(manifest, prevalence),
        {"what": "network", "value": ", ".join(f"{k} {v}" for k, v in settings.items())},
        {"what": "input", "value": input_text(manifest.preprocessing)},
    ]


def _elsewhere(manifest: Manifest, prevalence: Mapping[str, float]) -> list[dict[str, str]]:
    """A row on the place of use, if other shares were declared there."""
    if not prevalence:
        return []
    shares = "; ".join(
        f"{name} {share:.2%} (calibrated at {manifest.prevalence[name]:.2%})"
        for name, share in prevalence.items()
    )
    said = f"{shares}. Answers say the probabilities for this too; calls stay those that were evaluated."
    return [{"what": "prevalence where it is used", "value": said}]


def _subgroups(page: Page, by_subgroup: Mapping[str, Mapping[str, Subgroup]]) -> None:
    rows = [
        {
            "subgroup": f"{attribute}: {value}",
            "images (positive)": f"{group.n:,} ({group.n_positive:,})",
            "AUC": group.auc,
            "sensitivity": group.sensitivity,
            "specificity": group.specificity,
        }
        for attribute, groups in by_subgroup.items()
        for value, group in groups.items()
    ]
    page.table(
        rows,
        "In subgroups; a dash where there are too few patients to say.",
        empty="Nothing is known of sites, scanners, age and sex: no subgroup can be judged.",
    )


def _part(split: str) -> str:
    """What was scored, in words that follow "the"."""
    return "folds of a cross-validation" if split == "folds" else f"{split} split"
