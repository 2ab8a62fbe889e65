"""Lay a promoted model on the volume from which the pods of manifests/serving take it.

    <models>/model.mar, decision.json, predictions.parquet, dataset/    what `cadx deploy` takes in each pod
    <models>/bundle/                                                    what the watch compares requests with

Nobody is answered by it before a pod's own `cadx deploy` has found its answers to be those of the evaluation. That
step refuses files that do not belong together: a pod that starts while they are being replaced tries until all are in
place.
"""

import shutil
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from cadx.files import digest_path, locked, replacing, write_json
from cadx.gating import read_decision
from cadx.predicting.table import read_predictions
from components.contract import In, Keep, Out, Params, step
from serving.archive import BUNDLE, read_release, require_endpoint

ARCHIVE, DECISION, PREDICTIONS, DATASET = "model.mar", "decision.json", "predictions.parquet", "dataset"


class DeliverParams(Params):
    """Nothing is to be chosen."""


@step
def deliver(
    *,
    archive: In,
    decision: In,
    dataset: In,
    predictions: In,
    models: Keep,
    delivery: Out,
    params: DeliverParams,
) -> None:
    """Lay a promoted model, and what proves it, on the volume from which serving pods take it.

    Each file takes its place whole. A dataset that lies there already is not copied again.

    Raises:
        ValueError: if the gate refused the model, the files do not belong together, no endpoint takes its samples, or
            another delivery is on its way.
    """
    release, decided = read_release(archive), read_decision(decision)
    require_endpoint(archive)
    _, info = read_predictions(predictions)
    for path, bundle in ((decision, decided.bundle), (predictions, info.bundle)):
        if bundle != release.bundle:
            raise ValueError(f"{path}: about another bundle than {archive}; evaluate, gate and package one")
    for promote, reasons in (
        (release.decision.promote, release.decision.reasons),
        (decided.promote, decided.reasons),
    ):
        if not promote:
            raise ValueError(f"{archive}: refused by the gate: {'; '.join(reasons)}")
    models.mkdir(parents=True, exist_ok=True)
    # Contents alone are copied: shards are their owner's to read, and a pod is another user.
    busy = f"{models}: another model is being delivered there; try again when it has arrived"
    with locked(models / ".lock", busy):
        if not _same_dataset(dataset, models / DATASET):
            with replacing(models / DATASET) as partial:
                shutil.copytree(dataset, partial, copy_function=shutil.copyfile)
        with TemporaryDirectory() as folder, replacing(models / BUNDLE) as partial:
            with zipfile.ZipFile(archive) as packed:
                packed.extractall(folder)
            shutil.copytree(Path(folder) / BUNDLE, partial, copy_function=shutil.copyfile)
        for source, name in ((predictions, PREDICTIONS), (decision, DECISION), (archive, ARCHIVE)):
            with replacing(models / name) as partial:
                shutil.copyfile(source, partial)
    record = {
        "schema": 1,
        "model": release.name,
        "version": release.version,
        "bundle": release.bundle,
        "archive": digest_path(archive),
    }
    write_json(delivery, record)
    print(f"{release.name} {release.version} lies in {models}: pods that start from now on serve it")


def _same_dataset(one: Path, other: Path) -> bool:
    """Whether both are the same dataset: its JSON holds the digests of all else."""
    name = "dataset.json"
    return (other / name).is_file() and digest_path(one / name) == digest_path(other / name)
