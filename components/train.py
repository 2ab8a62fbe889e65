"""Training: from a dataset and its splits to a bundle of the weights that did best on val.

training.jsonl has a header line (what was trained, on what, with which loss and sampler), a line per epoch of
each member of the ensemble (usually one), a line per member that names its best epoch and, after cross-validation,
one that sums up what the members reached on the folds they did not see. Clock times and memory stand there and not
in the bundle, whose bytes are a function of data, parameters, seed and code.

Several processes train one network when `torchrun` starts the command: see `train` for how.
"""

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import ValidationError

from cadx.bundle import Manifest, Provenance, parameters_digest, versions, write_bundle
from cadx.datasets import DatasetFolder, read_splits
from cadx.files import digest_path, plain
from cadx.models import pretrained_origin
from cadx.settings import explain
from cadx.splitting import cross_validation
from cadx.training import Recipe, SamplerName, TrainingConfig
from cadx.types import Config
from cadx.weighting import LossConfig
from components.contract import (
    In,
    Keep,
    Out,
    Params,
    code_digest,
    is_first_process,
    source_digests,
    step,
)

if TYPE_CHECKING:
    from cadx.training.loop import Fitted

_MEASURED = {"seconds", "peak_memory_mb"}
_BETWEEN_MEMBERS = 1_000_003  # far more than anybody's seeds: no two members of two runs share one


class TrainParams(Recipe, Params):
    """The recipe of `cadx.training.Recipe`, with the loss and the sampler.

    Attributes:
        loss: a LossConfig, or "auto" for what `imbalance` recommends; a detector's losses are its model's own, and
            "auto" leaves them so.
        sampler: "natural" draws each sample once, "balanced" each class equally often, "auto" is what
            `imbalance` recommends.
    """

    loss: LossConfig | Literal["auto"] = "auto"
    sampler: SamplerName | Literal["auto"] = "auto"

    def resolve(self, imbalance: Path) -> TrainingConfig:
        """The recipe with every "auto" replaced by the recommendation in the `imbalance` file.

        Raises:
            ValueError: if an "auto" stands and the file holds no recommendation.
        """
        loss, sampler = self.loss, self.sampler
        if loss == "auto" and self.model.takes == "boxes":
            loss = LossConfig()
        if loss == "auto" or sampler == "auto":
            recommended = _Recommended.read(imbalance)
            loss = recommended.loss if loss == "auto" else loss
            sampler = recommended.sampler if sampler == "auto" else sampler
        shared = {name: getattr(self, name) for name in Recipe.model_fields}
        return TrainingConfig(**shared, loss=loss, sampler=sampler)


class _Recommended(Config):
    """What `train` takes from imbalance.json."""

    loss: LossConfig
    sampler: SamplerName

    @classmethod
    def read(cls, imbalance: Path) -> "_Recommended":
        try:
            recommendation = json.loads(imbalance.read_text(encoding="utf-8"))["recommendation"]
            given = {name: recommendation.get(name) for name in cls.model_fields}
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"{imbalance}: no recommendation there; run `cadx imbalance`, or set loss and sampler"
            ) from None
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            raise ValueError(explain(error, f"{imbalance}: recommendation", given)) from None


@step
def train(
    *,
    dataset: In,
    splits: In,
    imbalance: In,
    checkpoints: Keep,
    trained: Out,
    log: Out,
    experiment: str,
    seed: int,
    params: TrainParams,
) -> None:
    """Train a network, keep the epoch that did best on val, and write it as a bundle.

    A run that was killed goes on at its last checkpoint when it is started again with the same data,
    parameters, seed and code. `torchrun --nproc-per-node N -m -- cadx train ...` shares each batch among N processes,
    of which the first writes; on several machines `checkpoints` lies on a disk that all of them see.

    Raises:
        ValueError: if a split cannot serve, the loss is not finite, or the memory does not suffice.
    """
    if seed < 0:
        raise ValueError(f"--seed {seed}: give 0 or more")
    folder = DatasetFolder(dataset)
    folder.verify()
    frame = read_splits(splits)
    config = params.resolve(imbalance)
    folds = _folds(config, folder, frame, seed)
    from cadx.training.loop import discard_checkpoint, fit  # torch takes seconds: bad input is refused before

    sources = source_digests("train")  # before the first epoch: what is edited meanwhile has not run
    code = code_digest(sources)
    places = [checkpoints / f"member-{number}" for number in range(len(folds))]
    try:
        members = [
            fit(config, folder, fold, seed=seed + _BETWEEN_MEMBERS * number, checkpoints=place, code=code)
            for number, (fold, place) in enumerate(zip(folds, places, strict=True))
        ]
    finally:
        _remove_empty(places)
    history = [
        {"member": number} | record for number, fitted in enumerate(members) for record in fitted.history
    ]
    info = folder.info
    learned = ("train", "val") if config.folds else ("train",)
    manifest = Manifest(
        experiment=experiment,
        seed=seed,
        task=info.task,
        classes=info.classes,
        positive=info.positive,
        modality=info.modality,
        model=config.model,
        preprocessing=config.preprocessing,
        requires_spacing=info.kind in ("volume", "slide"),
        clustered=info.clustered,
        source=info.source,
        assumptions=info.assumptions,
        provenance=Provenance(
            dataset=digest_path(dataset / "dataset.json"),
            splits=digest_path(splits),
            parameters=parameters_digest(config),
            code=code,
            sources=sources,
            seed=seed,
            versions=versions(),
            device=members[0].device,
            threads=members[0].threads,
            folds=config.folds,
            pretrained=pretrained_origin(config.model),
        ),
    )
    write_bundle(
        trained,
        manifest,
        [fitted.state_dict for fitted in members],
        folder.samples.iloc[folder.rows(frame.loc[frame["split"].isin(learned), "sample_id"].tolist())],
        history=[{k: v for k, v in record.items() if k not in _MEASURED} for record in history],
        averaged=config.ema_decay is not None,
    )
    best: list[dict[str, Any]] = [
        {"member": number, "best_epoch": fitted.best_epoch} for number, fitted in enumerate(members)
    ]
    if config.folds:
        best.append({"cross_validation": _summary(members)})
    records = [_header(experiment, seed, config, members[0]), *history, *best]
    lines = (json.dumps(plain(record), allow_nan=False) + "\n" for record in records)
    log.write_text("".join(lines), encoding="utf-8")
    if is_first_process():
        for place in places:
            discard_checkpoint(place)
        _remove_empty(places)


def _folds(
    config: TrainingConfig, folder: DatasetFolder, splits: pd.DataFrame, seed: int
) -> list[pd.DataFrame]:
    """The splits that each network is trained on; every fold has had its turn before the first comes again."""
    folds = [splits]
    if config.folds is not None:
        labels = list(folder.info.label_columns)
        folds = cross_validation(folder.samples, splits, num_folds=config.folds, seed=seed, labels=labels)
    return folds * config.ensemble


def _remove_empty(folders: Sequence[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # it holds a checkpoint, or is not there
            folder.rmdir()


def _summary(members: "Sequence[Fitted]") -> dict[str, Any]:
    """What the networks' best epochs reached on the fold that each did not see: mean, spread, and each."""
    summary: dict[str, Any] = {}
    for name in [key for key in members[0].history[0] if key.startswith("val_")]:
        values = [fitted.history[fitted.best_epoch - 1][name] for fitted in members]
        known = np.array([value for value in values if value is not None], float)
        summary[name] = {
            "mean": float(known.mean()) if len(known) else None,
            "sd": float(known.std(ddof=1)) if len(known) > 1 else None,
            "folds": values,
        }
    return summary


def _header(experiment: str, seed: int, config: TrainingConfig, fitted: "Fitted") -> dict[str, Any]:
    return {
        "experiment": experiment,
        "seed": seed,
        "device": fitted.device,
        "precision": fitted.precision,
        "threads": fitted.threads,
        "cores": os.cpu_count(),
        "versions": versions(),
        "num_parameters": fitted.num_parameters,
        "train_counts": fitted.train_counts,
        "loss": config.loss.model_dump(),
        "sampler": config.sampler,
    }
