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
from components.contract import In, Keep, Out, Params, step
from serving.archive import BUNDLE
from serving.promotion import read_promoted

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
        NotPromoted: if the gate refused the model.
        ValueError: if the files do not belong together, no endpoint takes its samples, or another delivery is on its
            way.
    """
    release, _, _ = read_promoted(archive, decision, predictions)
    models.mkdir(parents=True, exist_ok=True)
    busy = f"{models}: another model is being delivered there; try again when it has arrived"
    with locked(models / ".lock", busy):
        # Contents alone are copied: shards are their owner's to read, and a pod is another user.
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
