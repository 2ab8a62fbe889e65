"""A bundle: everything that decides an answer, in one folder whose digest names it.

    bundle.json               the Manifest, canonical JSON; its SHA-256 is the bundle's digest
    weights/<n>.safetensors   one file per ensemble member
    reference.parquet         image statistics (`stat_*`) of the training split, one row a sample
    heldout.parquet           what the final bundle answers on the calibration split, one row a sample
    history.json              one record per training epoch

`train` writes it, `calibrate` completes it under another path, nothing changes it afterwards: bundle.json
holds the digest of every other file, and opening a bundle checks them all.

A served model is watched against two references. Image statistics are compared with the training split:
it is the largest sample of what the network knows. Scores and embeddings are compared with the calibration
split, because on its own training images a network is surer, and sees them more alike, than it ever will be
again: against those, every healthy stream of requests would look moved. heldout.parquet names nobody, but
it holds an embedding, a site and a scanner for each image: hand a bundle only to those who may have these.
"""

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import Field, ValidationError, model_validator
from safetensors.torch import load_file
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from cadx.datasets import SourceInfo
from cadx.files import canonical_json, digest_bytes, digest_path, replacing, write_json
from cadx.loading import Input
from cadx.models import ModelConfig, PretrainedOrigin
from cadx.types import Config, Digest, Estimate, Split, Task

MANIFEST = "bundle.json"
REFERENCE = "reference.parquet"
HELDOUT = "heldout.parquet"
HISTORY = "history.json"
REFERENCE_DECIMALS = 6
"""Of image statistics and probabilities in the references. Round what is compared with them: where a
network answers 1e-9 on every image, all requests would lie above a reference of zeros."""
EMBEDDING_DECIMALS = 4


class WeightFile(Config):
    """One ensemble member's weights; `averaged` says that they are an exponential moving average (EMA)."""

    file: str = Field(pattern=r"^weights/[0-9]+\.safetensors$")
    digest: Digest
    averaged: bool = False


class OperatingPoint(Config):
    """How probabilities become a decision, chosen once on `split` and frozen.

    Binary and multilabel: a class is called when its probability >= its threshold. Multiclass: the most
    probable class, `thresholds` is empty and there is no target.

    Attributes:
        target_metric: what the thresholds were chosen to reach; None for multiclass.
        target_value: the declared clinical target of it, in 0..1.
        thresholds: class -> probability; for binary the positive class alone.
        split: where they were chosen.
        n: labelled samples there.
        achieved: class -> metric -> value with its interval, on the same samples the thresholds were
            chosen on, hence optimistic: what holds elsewhere is what `evaluate` reports.
    """

    target_metric: Literal["sensitivity"] | None = None
    target_value: float | None = Field(default=None, gt=0, le=1)
    thresholds: dict[str, float] = Field(default_factory=dict)
    split: Split
    n: int
    achieved: dict[str, dict[str, Estimate]] = Field(default_factory=dict)


class Provenance(Config):
    """What a bundle was made from.

    Attributes:
        dataset: digest of the dataset's dataset.json, which holds the digests of its other files.
        splits: digest of the splits file.
        parameters: digest of the training parameters (`parameters_digest`).
        code: digest of the sources that the training step is made of.
        seed: of the training.
        versions: of what computes (`versions`).
        folds: of a cross-validation, each of which all networks but one were trained on; None without one.
        pretrained: where the weights come from that training started from; None: from random ones.
    """

    dataset: Digest
    splits: Digest
    parameters: Digest
    code: Digest
    seed: int
    versions: dict[str, str]
    folds: int | None = None
    pretrained: PretrainedOrigin | None = None


class Manifest(Config):
    """What bundle.json says.

    `weights`, `reference` and `history` are filled in by `write_bundle`; `temperature`,
    `bias`, `operating_point` and `heldout` by `Bundle.complete`.

    Attributes:
        schema_version: of this form. 1 had no `heldout`; such bundles answer as ever, but cannot be watched.
        positive: the class that binary metrics speak of; None for other tasks.
        requires_spacing: an image without a known pixel spacing is refused.
        assumptions: what was taken as given of the data, in words.
        clustered: patients may have several images; False means that each image counts as a patient.
    """

    schema_version: Literal[1, 2] = 2
    experiment: str
    seed: int
    task: Task
    classes: tuple[str, ...]
    positive: str | None
    modality: str
    model: ModelConfig
    preprocessing: Input
    weights: tuple[WeightFile, ...] = ()
    temperature: float | None = Field(default=None, gt=0)
    bias: tuple[float, ...] = ()
    operating_point: OperatingPoint | None = None
    requires_spacing: bool = False
    clustered: bool
    source: SourceInfo
    assumptions: tuple[str, ...] = ()
    provenance: Provenance
    reference: Digest | None = None
    heldout: Digest | None = None
    history: Digest | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task == "binary" and (len(self.classes) != 2 or self.positive not in self.classes):
            raise ValueError("a binary task has two classes, one of them named by `positive`")
        if self.bias and len(self.bias) != len(self.classes):
            raise ValueError(f"bias has {len(self.bias)} values for {len(self.classes)} classes")
        if self.operating_point and (unknown := set(self.operating_point.thresholds) - set(self.classes)):
            raise ValueError(f"operating_point.thresholds names unknown classes {sorted(unknown)}")
        return self

    @property
    def files(self) -> dict[str, Digest]:
        """Every file beside bundle.json, by relative path."""
        assert self.weights, "write_bundle fills this in"
        assert self.reference is not None, "write_bundle fills this in"
        assert self.history is not None, "write_bundle fills this in"
        files = {w.file: w.digest for w in self.weights} | {REFERENCE: self.reference, HISTORY: self.history}
        return files | ({HELDOUT: self.heldout} if self.heldout else {})

    @property
    def heldout_columns(self) -> list[str]:
        """The columns of heldout.parquet, in order: those of predictions.parquet that name nobody."""
        return [*answer_columns(self.task, self.classes), "site", "scanner", "embedding"]


def answer_columns(task: Task, classes: Sequence[str]) -> list[str]:
    """The columns that hold a model's answers, in any table: probabilities, then what it calls.

    >>> answer_columns("binary", ["normal", "opacity"])
    ['prob_normal', 'prob_opacity', 'decision']
    """
    decisions = [f"decision_{name}" for name in classes] if task == "multilabel" else ["decision"]
    return [*(f"prob_{name}" for name in classes), *decisions]


def write_bundle(
    path: Path,
    manifest: Manifest,
    state_dicts: Sequence[Mapping[str, Tensor]],
    reference: pd.DataFrame,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    averaged: bool = False,
) -> None:
    """Write a bundle folder at `path`, whole or not at all; the same inputs give the same bytes.

    Args:
        path: the folder to make.
        manifest: the description; its `weights`, `reference` and `history` are replaced.
        state_dicts: one per ensemble member.
        reference: the training split's rows of samples.parquet; its `stat_*` columns are kept.
        history: one record per epoch. Without clock times or memory, which differ from run to run.
        averaged: the weights are an exponential moving average.
    """
    assert state_dicts, "a bundle needs weights"
    with replacing(path) as folder:
        (folder / "weights").mkdir(parents=True)
        weights = []
        for number, state in enumerate(state_dicts):
            file = f"weights/{number}.safetensors"
            # Clones: safetensors refuses tensors that share storage. Bytes: its own writer hides a full disk.
            tensors = {k: v.detach().cpu().clone().contiguous() for k, v in sorted(state.items())}
            (folder / file).write_bytes(safetensors_bytes(tensors))
            weights.append(WeightFile(file=file, digest=digest_path(folder / file), averaged=averaged))
        statistics = reference.filter(like="stat_").astype(np.float64).round(REFERENCE_DECIMALS)
        pq.write_table(pa.Table.from_pandas(statistics, preserve_index=False), folder / REFERENCE)
        write_json(folder / HISTORY, list(history))
        complete = manifest.model_copy(
            update={
                # The weights stand here: opening must not ask for what training started from.
                "model": _self_contained(manifest.model),
                "weights": tuple(weights),
                "reference": digest_path(folder / REFERENCE),
                "history": digest_path(folder / HISTORY),
            }
        )
        write_json(folder / MANIFEST, complete.model_dump(mode="json"))


def _self_contained(model: ModelConfig) -> ModelConfig:
    """The configuration without the weights that training started from."""
    changes: dict[str, Any] = {"pretrained": None} if getattr(model, "pretrained", None) else {}
    if (encoder := getattr(model, "encoder", None)) is not None:
        changes["encoder"] = encoder.model_copy(update={"pretrained": None})
    return model.model_copy(update=changes)


class Bundle:
    """A bundle folder, opened: every file has been checked against its digest.

    Attributes:
        path: the folder.
        manifest: what bundle.json says.
        digest: SHA-256 of bundle.json, the bundle's name.

    Raises:
        ValueError: if a file is missing, changed or foreign, or bundle.json does not hold a manifest.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            text = (self.path / MANIFEST).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(
                f"{self.path}: no {MANIFEST} there; give a folder that `train` or `calibrate` wrote"
            ) from None
        self.digest = digest_bytes(text)
        try:
            self.manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            field = ".".join(str(part) for part in first["loc"])
            raise ValueError(
                f"{self.path / MANIFEST}: no manifest of this version: {field}: {first['msg']}; train again"
            ) from None
        self._verify()

    @property
    def is_complete(self) -> bool:
        """Whether `calibrate` has set the temperature and the operating point; a detector needs neither."""
        if self.manifest.task == "detection":
            return True
        return self.manifest.temperature is not None and self.manifest.operating_point is not None

    def networks(self) -> list[nn.Module]:
        """The ensemble's members in eval mode, on the CPU."""
        members: list[nn.Module] = []
        for weights in self.manifest.weights:
            # Building draws random weights, which are thrown away: the caller's generator must not notice.
            with torch.random.fork_rng(devices=[]):
                network = self.manifest.model.build(
                    len(self.manifest.classes), self.manifest.preprocessing.channels
                )
            network.load_state_dict(load_file(self.path / weights.file))
            members.append(network.eval())
        return members

    def reference(self) -> pd.DataFrame:
        """Image statistics of the training split: columns `stat_*`, one row a sample."""
        return pd.read_parquet(self.path / REFERENCE)

    def heldout(self) -> pd.DataFrame:
        """What this bundle answers on the calibration split, one row a sample; no column names a sample.

        Columns: `prob_<class>`, `decision` (a class name) or for multilabel `decision_<class>` (bool), `site`
        and `scanner` ("" = unknown), `embedding` (F float32 each).

        Raises:
            ValueError: if the bundle holds none.
        """
        if self.manifest.heldout is None:
            raise ValueError(
                f"{self.path}: no {HELDOUT}, the answers that later ones are compared with; "
                "run `cadx calibrate` of this version"
            )
        return pd.read_parquet(self.path / HELDOUT)

    def history(self) -> list[dict[str, Any]]:
        """One record per training epoch."""
        records: list[dict[str, Any]] = json.loads((self.path / HISTORY).read_text(encoding="utf-8"))
        return records

    def complete(
        self,
        path: Path,
        *,
        temperature: float,
        bias: Sequence[float] = (),
        operating_point: OperatingPoint,
        heldout: pd.DataFrame | None = None,
    ) -> None:
        """Write the final bundle at `path`: this one with its temperature and operating point set.

        Args:
            path: the folder to make.
            temperature: by which logits are divided.
            bias: of each class, or none.
            operating_point: how probabilities become a decision.
            heldout: what the final bundle answers on the calibration split: the columns that `heldout()`
                gives back, others are left out. Without it the bundle answers, but cannot be watched.

        Raises:
            ValueError: if this bundle is complete already.
        """
        if self.is_complete:
            raise ValueError(
                f"{self.path}: this bundle is complete and never changes; calibrate what `train` wrote"
            )
        fields = self.manifest.model_dump() | {
            "temperature": temperature,
            "bias": tuple(bias),
            "operating_point": operating_point.model_dump(),
            "schema_version": 2,
        }
        with replacing(path) as folder:
            for name in self.manifest.files:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_bytes((self.path / name).read_bytes())
            if heldout is not None:
                _write_heldout(folder / HELDOUT, heldout[self.manifest.heldout_columns])
                fields["heldout"] = digest_path(folder / HELDOUT)
            write_json(folder / MANIFEST, Manifest.model_validate(fields).model_dump(mode="json"))

    def _verify(self) -> None:
        expected = self.manifest.files
        present = {p.relative_to(self.path).as_posix() for p in self.path.rglob("*") if not p.is_dir()}
        if missing := sorted(set(expected) - present):
            raise ValueError(f"{self.path}: missing {', '.join(missing)}; copy the whole bundle folder again")
        if foreign := sorted(present - set(expected) - {MANIFEST}):
            raise ValueError(
                f"{self.path}: foreign {', '.join(foreign)}; a bundle holds only what {MANIFEST} names"
            )
        if changed := [name for name, digest in expected.items() if digest_path(self.path / name) != digest]:
            raise ValueError(
                f"{self.path}: changed since it was written: {', '.join(changed)}; get the bundle again"
            )


def _write_heldout(path: Path, frame: pd.DataFrame) -> None:
    """The same rows give the same bytes; without pandas' own metadata, which changes with its version."""
    columns: dict[str, pa.Array] = {}
    for name, values in frame.items():
        if name == "embedding":
            # + 0.0: rounding may leave a -0.
            rounded = np.stack(values.to_list()).astype(np.float32).round(EMBEDDING_DECIMALS) + np.float32(0)
            columns[name] = pa.array(list(rounded), pa.list_(pa.float32()))
        elif str(name).startswith("prob_"):
            columns[str(name)] = pa.array(values.to_numpy(np.float64).round(REFERENCE_DECIMALS))
        else:
            is_flag = str(name).startswith("decision_")
            columns[str(name)] = pa.array(values.to_list(), pa.bool_() if is_flag else pa.string())
    pq.write_table(pa.table(columns), path)


def versions() -> dict[str, str]:
    """The versions of what computes an answer: Python, torch, torchvision and NumPy."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
    }


def parameters_digest(params: Config) -> Digest:
    """The SHA-256 of a parameter record's canonical JSON."""
    return digest_bytes(canonical_json(params.model_dump(mode="json")).encode())
