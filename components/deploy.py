"""Put an archive into service, if its answers through the endpoint are those of the evaluation."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.files import digest_path, replacing, write_json
from cadx.gating import read_decision
from cadx.predicting import PredictionsInfo, read_predictions
from cadx.reading import encode_png
from components.contract import In, Keep, Out, Params, step
from serving.archive import Release, read_release
from serving.client import Answer, Client
from serving.management import Management


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

    The version that was the default stays loaded: deploying its archive again is the way back. If the
    endpoint's answers differ, the new version is taken away and the old one goes on answering.

    Raises:
        ValueError: if the gate did not promote this bundle, the server refuses, or the answers differ.
        ConnectionError: if the server cannot be reached.
    """
    release = read_release(archive)
    _require_promotion(release, archive, decision)
    frame, info = read_predictions(predictions)
    if info.bundle != release.bundle:
        raise ValueError(f"{predictions}: answers of another bundle than the archive's; evaluate that one")
    server = Management(management, key_file=key_file)
    previous = server.default_version(release.name)
    is_loaded = release.version in {one.version for one in server.versions(release.name)}
    if not is_loaded:
        stored = model_store / f"{release.name}-{release.version}.mar"
        with replacing(stored) as partial:
            shutil.copyfile(archive, partial)
        server.register(
            stored.name,
            workers=params.workers,
            batch_size=params.batch_size,
            max_batch_delay_ms=params.max_batch_delay_ms,
        )
    client = Client(inference, release.name, key_file=key_file)
    golden = frame.iloc[golden_rows(frame, info, params.golden_samples)]
    folder = DatasetFolder(dataset)
    try:
        answers = [
            client.predict(encode_png(folder.pixels(sample_id)), version=release.version)
            for sample_id in golden["sample_id"]
        ]
        difference = _compare(golden, info, answers, params.tolerance)
    except (ValueError, ConnectionError):
        if not is_loaded:
            server.unregister(release.name, release.version)
        raise
    server.set_default(release.name, release.version)
    write_json(
        deployment,
        {
            "schema": 1,
            "model": release.name,
            "version": release.version,
            "previous": previous,
            "bundle": release.bundle,
            "archive": digest_path(archive),
            "inference": inference,
            "golden_samples": len(golden),
            "largest_difference": difference,
            "tolerance": params.tolerance,
        },
    )


def _require_promotion(release: Release, archive: Path, decision: Path) -> None:
    decided = read_decision(decision)
    if decided.bundle != release.bundle:
        raise ValueError(
            f"{decision}: about another bundle than {archive}; run `cadx gate` and `cadx package`"
        )
    if not decided.promote:
        raise ValueError(f"{archive}: refused by the gate: {'; '.join(decided.reasons)}")


def golden_rows(frame: pd.DataFrame, info: PredictionsInfo, number: int) -> list[int]:
    """Rows whose probabilities are spread evenly over their ranks, both ends included; all if there are fewer."""
    name = info.positive or info.classes[0]
    order = np.argsort(frame[f"prob_{name}"].to_numpy(), kind="stable")
    chosen = np.unique(np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int))
    return sorted(order[chosen].tolist())


def _compare(
    golden: pd.DataFrame, info: PredictionsInfo, answers: Sequence[Answer], tolerance: float
) -> float:
    """The largest difference of a probability.

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
        gap = max(abs(answer.probabilities[name] - row[f"prob_{name}"]) for name in info.classes)
        if gap > tolerance or not _decides_alike(row, info, answer):
            raise ValueError(
                f"sample {row['sample_id']}: the endpoint answers {answer.probabilities} ({answer.decision}), the "
                f"evaluation says otherwise by {gap:.2g} (tolerance {tolerance:g}); not put into service. "
                "Does the server run the code and versions that the model was evaluated with?"
            )
        largest = max(largest, gap)
    return largest


def _decides_alike(row: Mapping[Any, Any], info: PredictionsInfo, answer: Answer) -> bool:
    if info.task == "multilabel":
        return tuple(answer.decision) == tuple(name for name in info.classes if row[f"decision_{name}"])
    return bool(answer.decision == row["decision"])
