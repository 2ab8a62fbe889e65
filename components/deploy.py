"""Put an archive into service, if its answers through the endpoint are those of the evaluation."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.files import digest_path, replacing, write_json
from cadx.gating import Decision, read_decision
from cadx.predicting import PredictionsInfo, read_predictions
from cadx.reading.images import encode_png
from cadx.types import Digest
from components.contract import In, Keep, Out, Params, step
from serving.archive import Release, read_release
from serving.client import Answer, Client
from serving.management import Management

TRIAL = "-trial"
"""Ends the name under which a model's first version is compared."""
STORE_DIGITS = 12


class NotPromoted(ValueError):
    """The gate refused what was to be deployed."""


class DeployParams(Params):
    """How a model is served, and how closely the endpoint must agree with the evaluation."""

    golden_samples: int = Field(
        default=64, ge=1, description="evaluated images sent through the endpoint before it goes live"
    )
    tolerance: float = Field(default=1e-5, gt=0, description="largest difference of a probability")
    workers: int = Field(default=1, ge=1, description="processes that answer")
    batch_size: int = Field(default=1, ge=1, description="requests answered together")
    max_batch_delay_ms: int = Field(default=10, ge=0, description="how long a batch waits to fill")


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
    params: DeployParams,
) -> None:
    """Register an archive at TorchServe, compare its answers with the evaluation, then make it the default.

    A model that has no version in service yet is compared under another name, so that nobody is answered by
    it before. The version that was the default stays loaded: deploying its archive again is the way back. If
    the answers differ, or anything else fails, what was registered is taken away and the old version goes on.

    Raises:
        NotPromoted: if the gate refused this bundle.
        ValueError: if the files do not belong together, the server refuses, or the answers differ.
        ConnectionError: if the server cannot be reached.
    """
    release, decided = read_release(archive), read_decision(decision)
    _require_promotion(release, decided, archive, decision)
    frame, info = read_predictions(predictions)
    if info.bundle != release.bundle:
        raise ValueError(f"{predictions}: answers of another bundle than the archive's; evaluate that one")
    golden = frame.iloc[golden_rows(frame, info, params.golden_samples)]
    folder = DatasetFolder(dataset)
    images = [encode_png(folder.pixels(sample_id)) for sample_id in golden["sample_id"]]

    server = Management(management, key_file=key_file)
    archive_digest = digest_path(archive)
    stored = _store(archive, archive_digest, release, model_store)
    previous = server.default_version(release.name)
    versions = {one.version: one for one in server.versions(release.name)}
    loaded = versions.get(release.version)

    def register(name: str) -> None:
        server.register(
            stored,
            name=name,
            workers=params.workers,
            batch_size=params.batch_size,
            max_batch_delay_ms=params.max_batch_delay_ms,
        )

    def compare(name: str) -> float:
        client = Client(inference, name, key_file=key_file)
        answers = [client.predict(image, version=release.version, golden=True) for image in images]
        return _largest_difference(golden, info, answers, params.tolerance)

    if previous is None:
        trial = f"{release.name}{TRIAL}"
        with _taken_away_on_failure(server, trial, release.version):
            register(trial)
            difference = compare(trial)
        server.unregister(trial, release.version)
        with _taken_away_on_failure(server, release.name, release.version):
            register(release.name)
    elif loaded and loaded.archive == stored and loaded.ready_workers:
        difference = compare(release.name)
    else:
        if loaded:  # from other bytes, or without a worker that answers
            others = [one.version for one in versions.values() if one is not loaded and one.ready_workers]
            if others and previous == release.version:  # TorchServe lets the default go only as the last
                server.set_default(release.name, others[-1])
            server.unregister(release.name, release.version)
        with _taken_away_on_failure(server, release.name, release.version):
            register(release.name)
            difference = compare(release.name)
    server.set_default(release.name, release.version)
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


def _require_promotion(release: Release, decided: Decision, archive: Path, decision: Path) -> None:
    if decided.bundle != release.bundle:
        raise ValueError(
            f"{decision}: about another bundle than {archive}; run `cadx gate` and `cadx package`"
        )
    for promote, reasons in (
        (release.decision.promote, release.decision.reasons),
        (decided.promote, decided.reasons),
    ):
        if not promote:
            raise NotPromoted(f"{archive}: refused by the gate: {'; '.join(reasons)}")
    if decided.metrics != release.metrics:
        raise ValueError(f"{decision}: rests on other numbers than {archive}; run `cadx package` again")


def _store(archive: Path, digest: Digest, release: Release, model_store: Path) -> str:
    """The name under which the archive now stands in the model store; other bytes have another name."""
    stored = model_store / f"{release.name}-{digest.removeprefix('sha256:')[:STORE_DIGITS]}.mar"
    with replacing(stored) as partial:
        shutil.copyfile(archive, partial)
    return stored.name


@contextmanager
def _taken_away_on_failure(server: Management, name: str, version: str) -> Iterator[None]:
    """Unregister a version when the block fails, in whatever way."""
    try:
        yield
    except BaseException:
        with suppress(ValueError, ConnectionError):  # the block's own error is what the user must see
            server.unregister(name, version)
        raise


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
    golden: pd.DataFrame, info: PredictionsInfo, answers: Sequence[Answer], tolerance: float
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
        gaps = [abs(answer.probabilities[name] - row[f"prob_{name}"]) for name in info.classes]
        # Each for itself, and not `>`: a NaN is no agreement.
        if not (all(gap <= tolerance for gap in gaps) and _decides_alike(row, info, answer)):
            raise ValueError(
                f"sample {row['sample_id']}: the endpoint answers {answer.probabilities} ({answer.decision}), the "
                f"evaluation says otherwise by up to {max(gaps):.2g} (tolerance {tolerance:g}); not put into service. "
                "Does the server run the code and versions that the model was evaluated with?"
            )
        largest = max(largest, *gaps)
    return largest


def _decides_alike(row: Mapping[Any, Any], info: PredictionsInfo, answer: Answer) -> bool:
    if info.task == "multilabel":
        return tuple(answer.decision) == tuple(name for name in info.classes if row[f"decision_{name}"])
    return bool(answer.decision == row["decision"])
