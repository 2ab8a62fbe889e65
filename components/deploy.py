"""Put an archive into service, if its answers through the endpoint are those of the evaluation."""

import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.files import digest_bytes, digest_path, replacing, write_json
from cadx.loading.patches import VolumeSource
from cadx.predicting.table import PredictionsInfo
from cadx.reading.images import encode_png
from cadx.types import Digest
from components.contract import In, Keep, Out, Params, step
from serving.archive import Release
from serving.client import (
    RESPONSE_TIMEOUTS_S,
    AnyAnswer,
    Client,
    DetectionAnswer,
    SlideAnswer,
    require_certificates,
)
from serving.management import (
    Deployed,
    Management,
    Version,
    changing,
    read_deployed,
    write_deployed,
)
from serving.promotion import read_promoted

TRIAL = "-trial"
"""Ends the name under which an archive is compared while no other version can answer."""
STORE_DIGITS = 12
GOLDEN_FOLDER = "golden"
"""In the model store: where the server finds the slides of a comparison."""
MOST_GOLDEN = {"volume": 16, "slide": 4}


class DeployParams(Params):
    """How a model is served, and how closely the endpoint must agree with the evaluation."""

    golden_samples: int = Field(
        default=64,
        ge=1,
        description="evaluated samples sent through the endpoint before it goes live; at most 16 volumes, 4 slides",
    )
    tolerance: float = Field(
        default=1e-5, gt=0, lt=1, description="largest difference of a probability or a box's score"
    )
    workers: int = Field(default=1, ge=1, description="processes that answer")
    batch_size: int = Field(
        default=8, ge=1, description="images answered together; volumes and slides are answered one by one"
    )
    max_batch_delay_ms: int = Field(
        default=1,
        ge=0,
        description="how long an image waits for others: those that queue up meanwhile need no more",
    )
    response_timeout_s: int | None = Field(
        default=None,
        ge=1,
        description="after which a worker is started anew; null: 60, volumes 300, slides 1800",
    )


@step
def deploy(
    *,
    archive: In,
    decision: In,
    dataset: In,
    predictions: In,
    model_store: Keep,
    key_file: Keep,
    deployment: Out,
    inference: str = "http://127.0.0.1:8080",
    management: str = "http://127.0.0.1:8081",
    ca_file: str = "",
    params: DeployParams,
) -> None:
    """Register an archive at TorchServe, compare its answers with the evaluation, then make it the default.

    Where nothing else could answer meanwhile, it is compared under another name, so that nobody is answered by
    it before: a model's first version, or another archive of the bundle that is live. Such an archive then takes that
    one's place; for as long as a worker takes to start, the version before answers, or none if there is none. The
    version that was the default stays loaded, and `cadx rollback` goes back to it; older ones are taken out. If the
    answers differ, or anything else fails, what was registered is taken away and the old version goes on. `ca_file`
    holds the certificates, as PEM, that are trusted at an https address; empty: those of this machine.

    Raises:
        NotPromoted: if the gate refused this bundle.
        ValueError: if the files do not belong together, `ca_file` holds no certificates, another deployment of the
            model is on its way, the server refuses, or the answers differ.
        ConnectionError: if the server cannot be reached.
    """
    trusted = Path(ca_file) if ca_file else None
    if trusted:
        require_certificates(trusted)
    release, frame, info = read_promoted(archive, decision, predictions)
    folder = DatasetFolder(dataset)
    kind = folder.info.kind
    most = min(params.golden_samples, MOST_GOLDEN.get(kind, params.golden_samples))
    golden = frame.iloc[golden_rows(frame, info, most)]

    server = Management(management, key_file=key_file)
    with changing(model_store, release.name):
        archive_digest = digest_path(archive)
        entry = Deployed(
            version=release.version,
            archive=_store(archive, archive_digest, release, model_store),
            workers=params.workers,
            batch_size=params.batch_size if kind == "image" else 1,
            max_batch_delay_ms=params.max_batch_delay_ms,
            response_timeout_s=params.response_timeout_s or RESPONSE_TIMEOUTS_S[kind],
        )
        previous = server.default_version(release.name)
        versions = {one.version: one for one in server.versions(release.name)}
        loaded = versions.get(release.version)
        live = read_deployed(model_store, release.name)

        def register(name: str) -> None:
            server.register(name=name, **entry.model_dump(exclude={"version"}))

        def compare(name: str) -> float:
            client = Client(
                inference,
                name,
                key_file=key_file,
                ca_file=trusted,
                response_timeout_s=entry.response_timeout_s,
            )
            with asking(client, folder, model_store, release.version) as ask:
                answers = [ask(sample_id) for sample_id in golden["sample_id"]]
            return _largest_difference(golden, info, answers, params.tolerance)

        if loaded and loaded.archive == entry.archive and loaded.ready_workers:
            difference = compare(release.name)
        elif previous in (None, release.version):
            trial = f"{release.name}{TRIAL}"
            for left in server.versions(trial):  # by a deployment that was killed
                server.unregister(trial, left.version)
            with server.taken_away_on_failure(trial, release.version):
                register(trial)
                difference = compare(trial)
            server.unregister(trial, release.version)
            with (
                _in_place_of(loaded, server, release.name, versions.values(), live),
                server.taken_away_on_failure(release.name, release.version),
            ):
                register(release.name)
        else:
            if loaded:  # from other bytes, or without a worker that answers
                server.unregister(release.name, release.version)
            with server.taken_away_on_failure(release.name, release.version):
                register(release.name)
                difference = compare(release.name)
        server.set_default(release.name, release.version)
        earlier = [one for one in live if one.version != release.version]
        write_deployed(model_store, release.name, [*earlier, entry])
        kept = {release.version, previous, *(one.version for one in earlier[-1:])}
        for version in versions.keys() - kept:
            server.unregister(release.name, version)
        write_json(
            deployment,
            {
                "schema": 1,
                "model": release.name,
                "version": release.version,
                "previous": previous if previous != release.version else None,
                "bundle": release.bundle,
                "archive": archive_digest,
                "inference": inference,
                "golden_samples": len(golden),
                "largest_difference": difference,
                "tolerance": params.tolerance,
            },
        )


@contextmanager
def _in_place_of(
    loaded: Version | None,
    server: Management,
    name: str,
    versions: Iterable[Version],
    live: Sequence[Deployed],
) -> Iterator[None]:
    """Take the default version out, since TorchServe knows each version once; put it back if the block fails.

    Args:
        loaded: the default version; None if there is none.
        server: where.
        name: of the model.
        versions: all that are loaded.
        live: those that went live, the latest last.
    """
    if loaded is None:
        yield
        return
    latest = {one.version: number for number, one in enumerate(live)}
    others = [one for one in versions if one is not loaded]
    if others:  # the default goes only as the last
        stand_in = max(others, key=lambda one: (one.ready_workers > 0, latest.get(one.version, -1)))
        server.set_default(name, stand_in.version)
    server.unregister(name, loaded.version)
    try:
        yield
    except BaseException:
        former = next(
            (one for one in live if (one.version, one.archive) == (loaded.version, loaded.archive)), None
        )
        with suppress(ValueError, ConnectionError):  # the block's own error is what the user must see
            if former:
                server.register(name=name, **former.model_dump(exclude={"version"}))
                server.set_default(name, former.version)
        raise


@contextmanager
def asking(
    client: Client, folder: DatasetFolder, model_store: Path, version: str | None = None
) -> Iterator[Callable[[str], AnyAnswer]]:
    """How to ask an endpoint about a sample of the dataset, as a clinic would about its file, but marked as golden.

    Args:
        client: of the model.
        folder: the dataset.
        model_store: of the server: it reads slides there, which are laid there meanwhile.
        version: of the model; None for the default one.
    """
    if folder.info.kind == "volume":
        from serving.kinds import encode_nifti  # with torch, which takes seconds

        yield lambda sample_id: client.predict_volume(
            encode_nifti(
                folder.pixels(sample_id), None, VolumeSource.of_folder(folder, sample_id).spacing_mm
            ),
            version=version,
            golden=True,
        )
    elif folder.info.kind == "slide":
        # Where the server may read them; links cost nothing where the file system knows them.
        with TemporaryDirectory(dir=model_store, prefix=GOLDEN_FOLDER) as shown:

            def ask(sample_id: str) -> SlideAnswer:
                slide = folder.slide_path(sample_id)
                path = Path(shown) / f"{digest_bytes(sample_id.encode())[7:]}{slide.suffix}"
                try:
                    path.hardlink_to(slide.resolve())
                except OSError:
                    shutil.copyfile(slide, path)
                return client.predict_slide(f"{path.parent.name}/{path.name}", version=version, golden=True)

            yield ask
    elif folder.info.task == "detection":
        yield lambda sample_id: client.detect(
            encode_png(folder.pixels(sample_id)), version=version, golden=True
        )
    else:
        yield lambda sample_id: client.predict(
            encode_png(folder.pixels(sample_id)), version=version, golden=True
        )


def _store(archive: Path, digest: Digest, release: Release, model_store: Path) -> str:
    """The name under which the archive now stands in the model store; other bytes have another name."""
    stored = model_store / f"{release.name}-{digest.removeprefix('sha256:')[:STORE_DIGITS]}.mar"
    with replacing(stored) as partial:
        shutil.copyfile(archive, partial)
    return stored.name


def evenly_spread(count: int, number: int) -> np.ndarray:
    """At most `number` of `count` positions in a row, both ends included.

    >>> evenly_spread(9, 3).tolist(), evenly_spread(2, 5).tolist()
    ([0, 4, 8], [0, 1])
    """
    return np.linspace(0, count - 1, min(number, count)).round().astype(int)


def golden_rows(frame: pd.DataFrame, info: PredictionsInfo, number: int) -> list[int]:
    """Rows whose probabilities are spread evenly over their ranks, both ends included; all if there are fewer."""
    name = info.positive or info.classes[0]
    order = np.argsort(frame[f"prob_{name}"].to_numpy(), kind="stable")
    return sorted(order[evenly_spread(len(order), number)].tolist())


def _largest_difference(
    golden: pd.DataFrame,
    info: PredictionsInfo,
    answers: Sequence[AnyAnswer],
    tolerance: float,
) -> float:
    """The largest difference of a probability between evaluation and endpoint.

    Raises:
        ValueError: if an answer is another bundle's, differs by more than `tolerance`, or decides otherwise.
    """
    largest = 0.0
    for row, answer in zip(golden.to_dict("records"), answers, strict=True):
        if answer.model.bundle != info.bundle:
            raise ValueError(
                f"the endpoint answers from bundle {answer.model.bundle}, deployed was {info.bundle}; "
                "is another server listening there?"
            )
        said = _said(answer, info)
        gaps = [abs(said[name] - row[f"prob_{name}"]) for name in info.classes]
        if isinstance(answer, DetectionAnswer):
            gaps += _box_gaps(row["boxes"], answer, info)
        # Each for itself, and not `>`: a NaN is no agreement.
        if not (all(gap <= tolerance for gap in gaps) and _decides_alike(row, info, answer)):
            raise ValueError(
                f"sample {row['sample_id']}: the endpoint answers {said} ({answer.decision}), the "
                f"evaluation says otherwise by up to {max(gaps):.2g} (tolerance {tolerance:g}); not put into service. "
                "Does the server run the code and versions that the model was evaluated with?"
            )
        largest = max(largest, *gaps)
    return largest


def _said(answer: AnyAnswer, info: PredictionsInfo) -> dict[str, float]:
    """Class -> probability; of a detector the best score, as a predictions file has it."""
    if not isinstance(answer, DetectionAnswer):
        return answer.probabilities
    return {
        name: max((box.score for box in answer.boxes if box.class_ == name), default=0.0)
        for name in info.classes
    }


def _box_gaps(
    evaluated: Sequence[Mapping[str, Any]], answer: DetectionAnswer, info: PredictionsInfo
) -> list[float]:
    """How far the called boxes lie apart, as a share of their coordinates; NaN where there are more or fewer.

    Those that are not called may come and go with the last digit of a score.
    """
    ours = sorted((box.class_, box.box_xyxy) for box in answer.boxes if box.called)
    theirs = sorted(
        (box["class"], (box["x0"], box["y0"], box["x1"], box["y1"]))
        for box in evaluated
        if box["score"] >= info.thresholds[box["class"]]
    )
    if [name for name, _ in ours] != [name for name, _ in theirs]:
        return [math.nan]
    return [
        abs(a - b) / max(abs(b), 1.0)
        for (_, one), (_, other) in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=True)
    ]


def _decides_alike(row: Mapping[Any, Any], info: PredictionsInfo, answer: AnyAnswer) -> bool:
    if info.task in ("multilabel", "detection"):
        return tuple(answer.decision) == tuple(name for name in info.classes if row[f"decision_{name}"])
    return bool(answer.decision == row["decision"])
