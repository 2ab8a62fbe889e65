"""`cadx verify`: the chain of `cadx.verifying`, with what the steps and the endpoint know of it."""

import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, Literal

from cadx.bundle import Manifest, parameters_digest, read_manifest
from cadx.catalog import digest_as
from cadx.datasets import DatasetFolder
from cadx.files import digest_bytes, digest_path
from cadx.gating import Decision, read_decision
from cadx.request_log import Logged, check_line, find_answer
from cadx.settings import read_yaml
from cadx.signing import REVIEW, objection, read_review, signature_of
from cadx.types import Digest
from cadx.verifying import (
    Link,
    bundle_links,
    code_links,
    compare,
    data_links,
    decision_links,
    fields,
    predicted_by,
    show,
    signature_link,
    split_links,
    weights_links,
)
from components import CODE, code_digests
from components.contract import ROOT, read_params, source_digests
from components.deploy import asking
from components.gate import GateParams
from components.package import PackageParams, verdict_of
from components.train import TrainParams
from serving.archive import BUNDLE, RELEASE, Release, read_release, release_of, write_archive
from serving.client import Client

DEPLOYMENT = Path("data/serving/deployment.json")
"""Where the example of `cadx deploy` has its record; a rehearsal's, of the same name, lies among the reports."""
REQUEST_LOG = DEPLOYMENT.with_name("request_log")
"""Where the example of `cadx serve` has its own."""


@dataclass(frozen=True)
class Evidence:
    """Where the links of one model's chain lie; None where one is not at hand."""

    bundle: Path
    dataset: Path | None = None
    splits: Path | None = None
    validation: Path | None = None
    imbalance: Path | None = None
    predictions: Path | None = None
    metrics: Path | None = None
    review: Path | None = None
    decision: Path | None = None
    archive: Path | None = None
    deployment: Path | None = None
    signature: Path | None = None
    public_key: Path | None = None
    params: Path | None = None
    lock: Path | None = None
    endpoint: str = ""
    key_file: Path | None = None
    ca_file: Path | None = None
    prediction: str = ""
    request_log: Path = REQUEST_LOG
    logged: Logged | None = None


def verify(target: str, *, work: Path, reports: Path, **given: Any) -> bool:
    """Follow the chain of a bundle, an archive, or every seed of an experiment; True if no link is broken.

    Args:
        target: a bundle folder, an archive, or an experiment's name.
        work: the folder of data sets and bundles.
        reports: the folder of reports.
        given: fields of `Evidence` that lie elsewhere than the layout of the stages has them.

    Raises:
        ValueError: if there is no such bundle, archive or experiment, or a key, a log or a prediction_id is none.
    """
    given = {name: path for name, path in given.items() if path}
    if asked := given.get("prediction"):
        given["logged"] = find_answer(given.get("request_log", REQUEST_LOG), asked)
    elif "request_log" in given:
        raise ValueError("request_log: give --prediction too, the answer that is looked for there")
    path = Path(target)
    if path.is_file():
        with TemporaryDirectory() as folder:
            inside = _unpacked(path, Path(folder))
            beside = path.parent / BUNDLE
            evidence = _beside(beside, reports) if beside.is_dir() else Evidence(inside)
            evidence = replace(evidence, **({"bundle": inside, "archive": path} | given))
            # The folder is gone when the chain is read.
            links = (
                link._replace(
                    **{
                        name: getattr(link, name).replace(f"{folder}/", f"{path}:")
                        for name in ("file", "said")
                    }
                )
                for link in _links(evidence)
            )
            return show(target, links)
    if path.is_dir():
        return show(target, _links(replace(_beside(path, reports), **given)))
    bundles = sorted((work / target).glob(f"*/{BUNDLE}"))
    if not bundles:
        raise ValueError(
            f"{target}: no bundle, no archive, and no experiment with bundles in {work}; give one of these"
        )
    siblings = _digests(bundles)
    hold = [
        show(str(bundle), _links(replace(_beside(bundle, reports), **given), siblings)) for bundle in bundles
    ]
    return all(hold)  # each is shown, broken or not


def _digests(bundles: Sequence[Path]) -> dict[Digest, Path]:
    """The bundles by their digests; those that cannot be read are told of by their own chains."""
    found = {}
    for bundle in bundles:
        with suppress(ValueError):
            found[read_manifest(bundle)[1]] = bundle
    return found


def _beside(bundle: Path, reports: Path) -> Evidence:
    """What the stages have laid around a bundle: `<work>/<experiment>/<seed>/bundle`, and its reports."""
    seed = bundle.resolve().parent
    told = reports / seed.parent.name
    places: dict[str, Any] = {
        "dataset": seed.parent / "dataset",
        "splits": seed.parent / "splits.parquet",
        "validation": told / "validation.json",
        "imbalance": told / "imbalance.json",
        "predictions": told / seed.name / "predictions.parquet",
        "metrics": told / seed.name / "metrics.json",
        "review": told / seed.name / "review",
        "decision": told / seed.name / "decision.json",
        "archive": seed / "model.mar",
        "signature": signature_of(bundle),
        "params": Path("params.yaml"),
        "lock": Path("dvc.lock"),
    }
    deployments = [path for path in (told / "serving" / DEPLOYMENT.name, DEPLOYMENT) if path.exists()]
    latest = max(deployments, key=lambda path: path.stat().st_mtime, default=None)
    there = {name: path for name, path in places.items() if path.exists()}
    return replace(Evidence(bundle), deployment=latest, **there)


def _links(at: Evidence, siblings: Mapping[Digest, Path] = MappingProxyType({})) -> Iterator[Link]:
    """The links from the data to the endpoint, at which a bundle of `siblings` may answer in this one's place."""
    try:
        manifest, digest = read_manifest(at.bundle)
    except ValueError as error:
        yield Link("bundle", "broken", str(at.bundle), str(error))
        return
    metrics, decided = fields(at.metrics), _decided(at.decision)
    release = _release(at.archive)
    deployment = fields(at.deployment)
    if deployment.get("bundle") != digest:  # another seed, or another version, is in service
        deployment = {}
    yield from data_links(at.dataset, manifest)
    yield from split_links(at.splits, at.dataset, at.validation, manifest, decided)
    yield from code_links(ROOT, source_digests("train"), manifest)
    yield _parameters(at, manifest)
    yield from _stages(at, manifest)
    yield from weights_links(at.bundle, manifest)
    names: dict[Path | None, Any] = {
        at.predictions: at.predictions and predicted_by(at.predictions),
        at.metrics: metrics.get("bundle"),
        at.decision: decided and decided.bundle,
        at.archive: release and release.bundle,
        at.deployment: deployment.get("bundle"),
    }
    yield from bundle_links(
        at.bundle, digest, {path: named for path, named in names.items() if path and named}
    )
    yield signature_link(at.bundle, at.signature, at.public_key)
    yield compare("metrics", at.predictions, metrics.get("predictions"), "metrics.json")
    yield compare("metrics", at.metrics, decided.metrics if decided else None, "decision.json")
    if at.review is not None:
        yield _review(at, manifest, digest)
    elif decided and decided.reviewer:
        said = f"no review given, but decision.json names {decided.reviewer} as reviewer"
        yield Link("review", "not at hand", str(at.decision), said)
    yield from decision_links(at.decision, release.decision.digest if release else None, RELEASE)
    if at.archive is None:
        yield Link("archive", "not at hand", said="no archive given")
    elif release is None:
        yield Link("archive", "broken", f"{at.archive}: {RELEASE}", "cannot be read")
    else:
        yield from _archive(at, at.archive, release, decided, manifest, digest)
        if deployment:
            yield compare("archive", at.archive, deployment.get("archive"), DEPLOYMENT.name)
        elif at.deployment is not None:
            yield Link("archive", "not at hand", str(at.deployment), "tells of another bundle's deployment")
    if at.archive is not None and (signed := signature_of(at.archive)).exists():
        yield signature_link(at.archive, signed, at.public_key)
    yield _endpoint(at, release, digest, siblings)
    if at.prediction:
        yield _prediction(at, digest, siblings)


def _decided(decision: Path | None) -> Decision | None:
    try:
        return read_decision(decision) if decision and decision.exists() else None
    except ValueError:
        return None


def _release(archive: Path | None) -> Release | None:
    try:
        return read_release(archive) if archive else None
    except ValueError:
        return None


def _parameters(at: Evidence, manifest: Manifest) -> Link:
    """Whether the parameters of today give the record that the bundle was trained with."""
    if at.params is None or at.imbalance is None:
        return Link("parameters", "not at hand", said="params.yaml and imbalance.json are needed")
    where = f"{at.params}:{manifest.experiment}"
    try:
        found = parameters_digest(read_params(where, "train", TrainParams).resolve(at.imbalance))
    except ValueError as error:
        return Link("parameters", "not at hand", where, str(error))
    if found == manifest.provenance.parameters:
        return Link("parameters", "ok", where, "as bundle.json says", found, found)
    said = (
        f"trained with others: {manifest.experiment}.train there, or {at.imbalance}, has changed, or cadx has"
        " parameters that it had not then"
    )
    return Link("parameters", "broken", where, said, manifest.provenance.parameters, found)


def _stages(at: Evidence, manifest: Manifest) -> Iterator[Link]:
    """Whether code, parameters and files are those of the last run of each stage, as `dvc repro` wrote it down.

    The code is that of the cadx that verifies, as for the bundle's own digests.

    Folders are left to the digests that cadx keeps of them.
    """
    name = manifest.experiment
    if at.lock is None:
        yield Link("stages", "not at hand", said="no dvc.lock given")
        return
    recorded = _yaml(at.lock)
    if not isinstance(recorded, dict) or not isinstance(recorded.get("stages"), dict):
        said = "no lock of DVC's; take it from version control again, or let `dvc repro` write it"
        yield Link("stages", "broken", str(at.lock), said)
        return
    ran = {
        stage: record
        for stage, record in recorded["stages"].items()
        if stage.partition("@")[2] in (name, f"{name}-{manifest.provenance.seed}")
    }
    # Stages share files, and may have seen different ones; each file is read once.
    files = {
        (one["path"], f"md5:{one['md5']}"): stage
        for stage, record in reversed(ran.items())
        for one in (*record.get("deps", ()), *record["outs"])
        if not one["md5"].endswith(".dir")
    }
    parameters = {
        (path, key): (stage, value)
        for stage, record in ran.items()
        for path, values in record.get("params", {}).items()
        for key, value in values.items()
    }
    root, says = at.lock.parent, f"ran, says {at.lock.name}"
    found = {path: _md5(root / path) for path, _ in files}
    today = {path: _yaml(root / path) for path in {path for path, _ in parameters} - {str(CODE)}}
    today[str(CODE)] = code_digests()  # of the code as it is, whoever wrote the file
    changed: dict[str, Link] = {}
    for (path, md5), stage in files.items():
        if found[path] != md5:
            said = f"{'changed' if found[path] else 'missing'} since {stage} {says}"
            changed[path] = Link("stages", "broken", path, said, md5.removeprefix("md5:"))
    for (path, key), (stage, value) in parameters.items():
        if _at(today[path], key) != value:
            what = f"code of {key}" if path == str(CODE) else f"{path}:{key}"
            changed[what] = Link("stages", "broken", what, f"changed since {stage} {says}")
    yield from changed.values()
    untold = [stage for stage, record in ran.items() if str(CODE) not in record.get("params", {})]
    if not ran:
        yield Link("stages", "not at hand", str(at.lock), f"holds no stage of {name}")
    elif untold:
        yield Link(
            "stages", "not at hand", str(at.lock), f"does not say by what code {', '.join(untold)} ran"
        )
    elif not changed:
        said = f"{len(ran)} stages: code, parameters and {len(found)} files as they ran"
        yield Link("stages", "ok", str(at.lock), said)


def _md5(path: Path) -> str | None:
    return digest_as(path, "md5:") if path.is_file() else None


def _yaml(path: Path) -> Any:
    """What a YAML file holds; nothing where there is none, or it can no longer be read as one."""
    try:
        return read_yaml(path) if path.is_file() else None
    except ValueError:
        return None


def _at(content: Any, key: str) -> Any:
    """What stands in nested mappings under keys joined by dots; None if nothing does."""
    for part in key.split("."):
        content = content.get(part) if isinstance(content, Mapping) else None
    return content


def _review(at: Evidence, manifest: Manifest, digest: Digest) -> Link:
    assert at.review is not None, "the caller looks"
    file = str(at.review / REVIEW)
    if at.params is None:
        return Link("review", "not at hand", file, "params.yaml holds the reviewers' keys")
    metrics = digest_path(at.metrics) if at.metrics and at.metrics.exists() else None
    try:
        review = read_review(at.review)
        reviewers = read_params(f"{at.params}:{manifest.experiment}", "gate", GateParams).reviewers
        wrong = objection(at.review, reviewers, bundle=digest, metrics=metrics)
    except ValueError as error:
        return Link("review", "broken", file, str(error))
    return Link("review", "broken" if wrong else "ok", file, wrong or f"signed by {review.reviewer}")


def _archive(
    at: Evidence,
    archive: Path,
    release: Release,
    decided: Decision | None,
    manifest: Manifest,
    digest: Digest,
) -> Iterator[Link]:
    """Whether an archive is what `package` would make again of the bundle, byte for byte."""
    if decided is None or at.decision is None:
        yield Link("archive", "not at hand", str(archive), "its decision is needed")
    else:
        try:
            params = read_params(f"{at.params}:{manifest.experiment}", "package", PackageParams)
            name, prevalence = params.name, params.prevalence
        except ValueError:
            name, prevalence = release.name, release.prevalence  # params.yaml is not at hand
        verdict = verdict_of(decided, at.decision)
        expected = release_of(
            name or manifest.experiment, manifest, digest, verdict, decided.metrics, prevalence
        )
        for field, value in expected:
            if getattr(release, field) != value:
                said = f"its {field} is not that of bundle and decision"
                yield Link("archive", "broken", f"{archive}: {RELEASE}", said)
    with TemporaryDirectory() as folder:
        again = Path(folder) / "again.mar"
        try:
            write_archive(again, at.bundle, release)
        except ValueError as error:
            yield Link("archive", "not at hand", str(archive), f"the bundle cannot be packed again: {error}")
            return
        if (found := digest_path(archive)) == (expected_digest := digest_path(again)):
            yield Link("archive", "ok", str(archive), "what packing makes of the bundle", found, found)
            return
        differing = _differing(again, archive) or [""]
    for member in differing:
        said = "not what packing makes of the bundle" if member else "its directory of files is damaged"
        yield Link(
            "archive",
            "broken",
            f"{archive}: {member}" if member else str(archive),
            said,
            expected_digest,
            found,
        )


def _differing(expected: Path, found: Path) -> list[str]:
    """The members of two archives that are not the same in both."""
    members = [_members(archive) for archive in (expected, found)]
    return sorted(
        name for name in members[0].keys() | members[1].keys() if members[0].get(name) != members[1].get(name)
    )


def _members(archive: Path) -> dict[str, Digest | None]:
    found: dict[str, Digest | None] = {}
    with zipfile.ZipFile(archive) as opened:
        for name in opened.namelist():
            try:
                found[name] = digest_bytes(opened.read(name))
            except zipfile.BadZipFile:
                found[name] = None
    return found


def _unpacked(archive: Path, folder: Path) -> Path:
    """The bundle of an archive, as it is, in `folder`."""
    try:
        opened = zipfile.ZipFile(archive)
    except zipfile.BadZipFile:
        raise ValueError(f"{archive}: no archive, or its directory of files is damaged") from None
    with opened:
        for name in opened.namelist():
            if not name.startswith(f"{BUNDLE}/") or ".." in Path(name).parts:
                continue
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                with opened.open(name) as member, (folder / name).open("wb") as target:
                    shutil.copyfileobj(member, target)
            except zipfile.BadZipFile:  # its checksum does not hold: what was read is compared all the same
                continue
    return folder / BUNDLE


def _endpoint(at: Evidence, release: Release | None, digest: Digest, siblings: Mapping[Digest, Path]) -> Link:
    """Which bundle a running server answers from, by a golden question about one sample, whatever its kind."""
    if not at.endpoint:
        return Link("endpoint", "not at hand", said="no --endpoint given")
    if release is None or at.dataset is None:
        return Link("endpoint", "not at hand", at.endpoint, "archive and dataset are needed to ask it")
    try:
        folder = DatasetFolder(at.dataset)
    except (ValueError, OSError) as error:
        return Link("endpoint", "not at hand", at.endpoint, str(error))
    if folder.info.kind == "features":
        return Link("endpoint", "not at hand", at.endpoint, "bags of features have no endpoint")
    # Where `serving.server` has it.
    store = (at.key_file.parent if at.key_file else Path()) / "model_store"
    if folder.info.kind == "slide" and not store.is_dir():
        said = f"{store}: no such folder; a server reads slides from there, give the --key-file beside it"
        return Link("endpoint", "not at hand", at.endpoint, said)
    client = Client(at.endpoint, release.name, key_file=at.key_file, ca_file=at.ca_file)
    try:
        with asking(client, folder, store) as ask:
            answer = ask(folder.samples["sample_id"].iloc[0])
    except (ValueError, ConnectionError) as error:  # refused; no key file, since the server is not there
        return Link("endpoint", "broken", at.endpoint, str(error))
    except OSError as error:
        return Link("endpoint", "not at hand", at.endpoint, f"the sample cannot be sent: {error}")
    said = f"{release.name} {answer.model.version} answers"
    return _answered("endpoint", at.endpoint, said, Digest(answer.model.bundle), digest, siblings)


def _prediction(at: Evidence, digest: Digest, siblings: Mapping[Digest, Path]) -> Link:
    """Which bundle gave an answer of the past, by the request log; and what is kept of it there."""
    if at.logged is None:
        said = (
            "no line of its *.jsonl has this prediction_id; an answer that could not be logged has a warning that"
            " says so"
        )
        return Link("prediction", "not at hand", str(at.request_log), said)
    place, record = f"{at.logged.file}: line {at.logged.number}", at.logged.record
    try:
        check_line(record, place)
    except ValueError as error:
        return Link("prediction", "broken", place, str(error))
    called, named = record["decision"], Digest(record["bundle"])
    told = [
        f"{record['time']}, {record['model']} {record['version']}",
        f"called {called if isinstance(called, str) else ', '.join(called) or 'nothing'}",
        *(f"{name} {record[name]}" for name in ("site", "scanner") if record[name]),
        *record["warnings"],
    ]
    said = "; ".join(map(str, told))
    # An answer of before a training gave other bytes than these: that breaks nothing here.
    return _answered("prediction", place, said, named, digest, siblings, else_state="not at hand")


def _answered(
    of: str,
    where: str,
    said: str,
    named: Digest,
    digest: Digest,
    siblings: Mapping[Digest, Path],
    *,
    else_state: Literal["broken", "not at hand"] = "broken",
) -> Link:
    """An answer that names a bundle, held against this one; `else_state` where no bundle here gave it."""
    if named == digest:
        return Link(of, "ok", where, said, digest, digest)
    if other := siblings.get(named):
        return Link(of, "not at hand", where, f"{said}, from {other}", found=named)
    return Link(of, else_state, where, f"{said}, from another bundle", digest, named)
