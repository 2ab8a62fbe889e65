"""The chain of digests that leads from the data to what answers in a clinic, followed link by link.

Each file's digest stands in a file further down the chain, its witness:

    the dataset's files         in dataset.json
    dataset.json, splits        in the bundle, as are code, parameters, weights and the other files in it
    predictions.parquet         in metrics.json
    metrics, validation         in decision.json
    decision.json, metrics      in the archive
    bundle.json                 in predictions, metrics, decision, archive, deployment and its signature, and in each
                                answer and its line in the request log
    the archive                 in the deployment
    what each stage read, wrote and was told    in dvc.lock

A changed byte is named at the file that it stands in: of several witnesses of one file the majority is believed.
Nothing is opened before its digest holds, so that a damaged file is named and does not end the walk.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow.parquet as pq
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cadx.bundle import MANIFEST, Manifest
from cadx.datasets import DatasetFolder, read_splits
from cadx.files import digest_path
from cadx.gating import Decision, read_decision
from cadx.signing import check_signature
from cadx.splitting import patients_in_several_splits
from cadx.types import Digest

_SHOWN_DIGITS = 12


class Link(NamedTuple):
    """One link of the chain.

    Attributes:
        of: the part of the chain.
        state: "not at hand" where a file, a key or a server is missing that it takes to tell.
        file: what it is about.
        said: in words, what was looked at, or what is wrong.
        expected: the digest that the witness holds.
        found: the digest that was computed.
    """

    of: str
    state: Literal["ok", "broken", "not at hand"]
    file: str = ""
    said: str = ""
    expected: str = ""
    found: str = ""


def compare(of: str, file: Path | None, expected: Digest | None, witness: str) -> Link:
    """Hold a file, or a folder, against the digest that `witness` holds of it."""
    if file is None or expected is None:
        missing = "no file given" if file is None else f"{witness} holds no digest of it"
        return Link(of, "not at hand", "" if file is None else str(file), missing)
    if not file.exists():
        return Link(of, "broken", str(file), f"missing, but {witness} names it", expected)
    found = digest_path(file)
    if found == expected:
        return Link(of, "ok", str(file), f"as {witness} says", expected, found)
    return Link(of, "broken", str(file), f"changed since {witness} was written", expected, found)


def compare_listing(
    of: str,
    folder: Path,
    expected: Mapping[str, Digest],
    witness: str,
    *,
    beside: Sequence[str] | None = None,
) -> Iterator[Link]:
    """Hold the files of a folder against a listing: a line where all is well, or one for each that is not.

    Args:
        of: the part of the chain.
        folder: where the files stand.
        expected: relative path -> digest.
        witness: what holds the listing.
        beside: files that may stand there too; None where any may.
    """
    broken = [
        link
        for name, digest in expected.items()
        if (link := compare(of, folder / name, digest, witness)).state == "broken"
    ]
    if beside is not None:
        present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        foreign = sorted(present - set(expected) - set(beside))
        broken += [Link(of, "broken", str(folder / name), f"{witness} does not name it") for name in foreign]
    yield from broken
    if not broken:
        yield Link(of, "ok", str(folder), f"{len(expected)} files as {witness} says")


def data_links(dataset: Path | None, manifest: Manifest) -> Iterator[Link]:
    """Whether a dataset is the one that a bundle was trained on, file by file."""
    if dataset is None:
        yield Link("data", "not at hand", said="no dataset given")
        return
    description = dataset / "dataset.json"
    yield compare("data", description, manifest.provenance.dataset, MANIFEST)
    if files := fields(description).get("files"):
        yield from compare_listing("data", dataset, files, description.name, beside=[description.name])


def split_links(
    splits: Path | None,
    dataset: Path | None,
    validation: Path | None,
    manifest: Manifest,
    decided: Decision | None,
) -> Iterator[Link]:
    """Whether the splits are those of training, share no patient, and leave out what validation left out."""
    link = compare("split", splits, manifest.provenance.splits, MANIFEST)
    yield link
    if splits is None or dataset is None or not splits.exists():
        yield Link("split", "not at hand", said="patients: splits and dataset are needed")
        return
    try:
        assigned, folder = read_splits(splits), DatasetFolder(dataset)
        shared = patients_in_several_splits(folder.samples, assigned)
    except (ValueError, OSError) as error:
        yield Link("split", "broken", str(splits), f"patients cannot be told apart: {error}")
        return
    said = f"{shared} patients in more than one split" if shared else "no patient in more than one split"
    yield Link("split", "broken" if shared else "ok", str(splits), said)
    if validation is None or not validation.exists():
        yield Link("split", "not at hand", said="no validation given")
        return
    yield compare("split", validation, decided.validation if decided else None, "decision.json")
    found = fields(validation)
    said = f"of another dataset than {MANIFEST} names" if found else "no validation of this form"
    if found.get("dataset") != manifest.provenance.dataset:
        yield Link("split", "broken", str(validation), said)
        return
    left_out = {entry["sample_id"] for entry in found.get("quarantined", ())}
    used = assigned.loc[assigned["sample_id"].isin(left_out) & (assigned["split"] != "excluded")]
    said = f"{len(used)} quarantined images in a split" if len(used) else "what it quarantined is in no split"
    yield Link("split", "broken" if len(used) else "ok", str(validation), said)


def code_links(root: Path, sources: Mapping[str, Digest], manifest: Manifest) -> Iterator[Link]:
    """Whether this checkout holds the code that trained a bundle, file by file.

    Args:
        root: the checkout.
        sources: path -> digest of what the training step is made of here.
        manifest: the bundle's.
    """
    recorded = manifest.provenance.sources
    if not recorded:
        yield Link("code", "not at hand", said=f"{MANIFEST} lists no sources; it is of an earlier version")
        return
    yield from compare_listing("code", root, recorded, MANIFEST)
    for name in sorted(set(sources) - set(recorded)):
        yield Link("code", "broken", str(root / name), "training needs it here, and did not then")


def weights_links(bundle: Path, manifest: Manifest) -> Iterator[Link]:
    """Whether the files of a bundle are those that its bundle.json names."""
    yield from compare_listing("weights", bundle, manifest.files, MANIFEST, beside=[MANIFEST])


def bundle_links(bundle: Path, digest: Digest, witnesses: Mapping[Path, Digest]) -> Iterator[Link]:
    """Whether all who name the bundle name this one.

    Args:
        bundle: the folder.
        digest: of its bundle.json.
        witnesses: file that names a bundle -> the digest it gives.
    """
    manifest = str(bundle / MANIFEST)
    if not witnesses:
        yield Link("bundle", "not at hand", manifest, "nobody names it here", found=digest)
        return
    votes = Counter(witnesses.values())
    # Of as many on either side, those that name what lies here; one witness against another accuses neither.
    believed = max(votes, key=lambda named: (votes[named], named == digest))
    agreed = ", ".join(file.name for file, named in witnesses.items() if named == believed)
    if digest == believed or votes[believed] == 1 < len(witnesses):
        believed = digest
        yield Link("bundle", "ok", manifest, f"named by {agreed}", digest, digest)
    else:
        yield Link("bundle", "broken", manifest, f"changed since {agreed} named it", believed, digest)
    for witness, named in witnesses.items():
        if named != believed:
            yield Link("bundle", "broken", str(witness), "is about another bundle", believed, named)


def decision_links(decision: Path | None, expected: Digest | None, witness: str) -> Iterator[Link]:
    """Whether a decision is the one in the archive, and says what its own checks say."""
    yield compare("decision", decision, expected, witness)
    if decision is None or not decision.exists():
        return
    try:
        decided = read_decision(decision)
    except ValueError as error:
        yield Link("decision", "broken", str(decision), str(error))
        return
    if decided.promote != all(check.passed for check in decided.checks):
        yield Link("decision", "broken", str(decision), "says otherwise than its own checks")


def signature_link(target: Path, signature: Path | None, public_key: Path | None) -> Link:
    """Whether the signature of a bundle, or of an archive, holds."""
    if signature is None or not signature.exists():
        return Link("signature", "not at hand", said="not signed; `cadx sign` does that")
    if public_key is None:
        return Link("signature", "not at hand", str(signature), "give --public-key, the signer's")
    wrong = check_signature(target, signature, public_key)
    return Link("signature", "broken" if wrong else "ok", str(signature), wrong or f"by the key {public_key}")


def fields(file: Path | None) -> dict[str, Any]:
    """The fields of a JSON file; none where it holds no object, or is not there."""
    try:
        content = json.loads(file.read_text(encoding="utf-8")) if file else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def predicted_by(predictions: Path) -> Digest | None:
    """The bundle that a predictions file names; None where it cannot be read."""
    try:
        said = json.loads((pq.read_schema(predictions).metadata or {})[b"cadx"])
        return Digest(said["bundle"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _shown(file: str) -> str:
    """A path from here where it lies below, else as it is."""
    path, here = Path(file), Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else file


def show(title: str, links: Iterable[Link]) -> bool:
    """Print the chain as a table; True if no link is broken."""
    table = Table("", "link", "file", "what was found", "expected", "found", title=title)
    marks = {"ok": "[green]ok[/]", "broken": "[red]broken[/]", "not at hand": "[yellow]not at hand[/]"}
    counts: Counter[str] = Counter()
    for link in links:
        counts[link.state] += 1
        digests = (link.expected if link.state == "broken" else "", link.found)
        short = [digest.removeprefix("sha256:")[:_SHOWN_DIGITS] for digest in digests]
        # Escaped: what a header or a log says may hold brackets, which rich would take for its own.
        table.add_row(marks[link.state], link.of, escape(_shown(link.file)), escape(link.said), *short)
    console = Console()
    console.print(table)
    console.print(
        f"{title}: {counts['ok']} links hold, {counts['broken']} broken, {counts['not at hand']} not at hand",
        highlight=False,
    )
    return not counts["broken"]
