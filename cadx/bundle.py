"""A bundle: everything that decides an answer, in one folder whose digest names it.

    bundle.json               the Manifest, canonical JSON; its SHA-256 is the bundle's digest
    weights/<n>.safetensors   one file per ensemble member
    reference.parquet         image statistics (`stat_*`), site and scanner of the training split, one row a sample
    heldout.parquet           what the final bundle answers on the calibration split, one row a sample
    history.json              one record per training epoch
    sbom.json                 the bill of materials, CycloneDX: the weights and the libraries that made them

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
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field, ValidationError, model_validator

from cadx import calibration
from cadx.datasets import SourceInfo
from cadx.files import canonical_json, digest_bytes, digest_path, replacing, write_json
from cadx.loading import Input
from cadx.materials import bill_of_materials
from cadx.models import ModelConfig, PretrainedOrigin
from cadx.types import Config, Conformal, Digest, Estimate, Judged, Knots, Task

if TYPE_CHECKING:  # importing torch takes two seconds, and most readers of a bundle build no network
    from torch import Tensor, nn

MANIFEST = "bundle.json"
REFERENCE = "reference.parquet"
HELDOUT = "heldout.parquet"
HISTORY = "history.json"
SBOM = "sbom.json"
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
    probable class, `thresholds` is empty and there is no target. Detection: a box is called when its score >= its
    class's threshold.

    Attributes:
        target_metric: what the thresholds were chosen to reach; None for multiclass, and where they were declared.
        target_value: the declared clinical target of it.
        thresholds: class -> probability; for binary the positive class alone.
        split: where they were chosen.
        n: labelled samples there.
        achieved: class -> metric -> value with its interval, on the same samples the thresholds were
            chosen on, hence optimistic: what holds elsewhere is what `evaluate` reports.
        resampled: class -> thresholds that resamples of the patients there would have led to: the operating point's
            own uncertainty. `evaluate` counts it.
    """

    target_metric: Literal["sensitivity", "false_positives_per_image"] | None = None
    target_value: float | None = Field(default=None, gt=0)
    thresholds: dict[str, float] = Field(default_factory=dict)
    split: Judged
    n: int
    achieved: dict[str, dict[str, Estimate]] = Field(default_factory=dict)
    resampled: dict[str, tuple[float, ...]] = Field(default_factory=dict)


class Provenance(Config):
    """What a bundle was made from.

    Attributes:
        dataset: digest of the dataset's dataset.json, which holds the digests of its other files.
        splits: digest of the splits file.
        parameters: digest of the training parameters (`parameters_digest`).
        code: digest of the sources that the training step is made of.
        sources: digest of each of them, by path in the checkout: so that a changed one can be named.
        seed: of the training.
        versions: of what computes (`versions`).
        device: that trained it, in words; None in bundles of earlier versions.
        threads: that computed on a CPU: their number decides the last bits of sums, and after epochs other weights.
        folds: of a cross-validation, each of which all networks but one were trained on; None without one.
        pretrained: where the weights come from that training started from; None: from random ones.
    """

    dataset: Digest
    splits: Digest
    parameters: Digest
    code: Digest
    sources: dict[str, Digest] = Field(default_factory=dict)
    seed: int
    versions: dict[str, str]
    device: str | None = None
    threads: int | None = None
    folds: int | None = None
    pretrained: PretrainedOrigin | None = None


class Manifest(Config):
    """What bundle.json says.

    `weights`, `reference`, `history` and `sbom` are filled in by `write_bundle`; `temperature`,
    `bias`, `isotonic`, `prevalence`, `operating_point`, `conformal` and `heldout` by `Bundle.complete`.

    Attributes:
        schema_version: of this form. 1 had no `heldout`; such bundles answer as ever, but cannot be watched. 2 had
            neither `isotonic`, `prevalence` nor `conformal`; such bundles answer without prediction sets.
        positive: the class that binary metrics speak of; None for other tasks.
        requires_spacing: an image without a known pixel spacing is refused.
        isotonic: class -> curve that follows temperature and bias; empty for none.
        prevalence: class -> share of the labelled samples of the calibration split.
        conformal: how prediction sets are made; None for none.
        assumptions: what was taken as given of the data, in words.
        sbom: digest of the bill of materials; None in bundles of earlier versions.
        clustered: patients may have several images; False means that each image counts as a patient.
    """

    schema_version: Literal[1, 2, 3] = 3
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
    isotonic: dict[str, Knots] = Field(default_factory=dict)
    prevalence: dict[str, float] = Field(default_factory=dict)
    operating_point: OperatingPoint | None = None
    conformal: Conformal | None = None
    requires_spacing: bool = False
    clustered: bool
    source: SourceInfo
    assumptions: tuple[str, ...] = ()
    provenance: Provenance
    reference: Digest | None = None
    heldout: Digest | None = None
    history: Digest | None = None
    sbom: Digest | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.task == "binary" and (len(self.classes) != 2 or self.positive not in self.classes):
            raise ValueError("a binary task has two classes, one of them named by `positive`")
        if self.bias and len(self.bias) != len(self.classes):
            raise ValueError(f"bias has {len(self.bias)} values for {len(self.classes)} classes")
        if self.operating_point and (unknown := set(self.operating_point.thresholds) - set(self.classes)):
            raise ValueError(f"operating_point.thresholds names unknown classes {sorted(unknown)}")
        curved = {self.positive} if self.task == "binary" else set(self.classes)
        if self.isotonic and set(self.isotonic) != curved:
            raise ValueError(
                f"isotonic has curves of {sorted(self.isotonic)}, and needs one of each class called"
            )
        if self.conformal and set(self.conformal.quantiles) != set(self.classes):
            raise ValueError(
                f"conformal has quantiles of {sorted(self.conformal.quantiles)}, and needs one a class"
            )
        return self

    @property
    def files(self) -> dict[str, Digest]:
        """Every file beside bundle.json, by relative path."""
        assert self.weights, "write_bundle fills this in"
        assert self.reference is not None, "write_bundle fills this in"
        assert self.history is not None, "write_bundle fills this in"
        files = {w.file: w.digest for w in self.weights} | {REFERENCE: self.reference, HISTORY: self.history}
        optional = {HELDOUT: self.heldout, SBOM: self.sbom}
        return files | {name: digest for name, digest in optional.items() if digest}

    @property
    def heldout_columns(self) -> list[str]:
        """The columns of heldout.parquet, in order: those of predictions.parquet that name nobody."""
        own = "num_boxes" if self.task == "detection" else "embedding"
        return [*answer_columns(self.task, self.classes), "site", "scanner", own]


def answer_columns(task: Task, classes: Sequence[str]) -> list[str]:
    """The columns that hold a model's answers, in any table: probabilities, then what it calls.

    Of boxes, an image's probability of a class is the highest score of its boxes of that class.

    >>> answer_columns("binary", ["normal", "opacity"])
    ['prob_normal', 'prob_opacity', 'decision']
    """
    several = task in ("multilabel", "detection")
    decisions = [f"decision_{name}" for name in classes] if several else ["decision"]
    return [*(f"prob_{name}" for name in classes), *decisions]


def write_bundle(
    path: Path,
    manifest: Manifest,
    state_dicts: "Sequence[Mapping[str, Tensor]]",
    reference: pd.DataFrame,
    *,
    history: Sequence[Mapping[str, Any]] = (),
    averaged: bool = False,
) -> None:
    """Write a bundle folder at `path`, whole or not at all; the same inputs give the same bytes.

    Args:
        path: the folder to make.
        manifest: the description; its `weights`, `reference`, `history` and `sbom` are replaced.
        state_dicts: one per ensemble member.
        reference: the training split's rows of samples.parquet; `stat_*`, `site` and `scanner` are kept.
        history: one record per epoch. Without clock times or memory, which differ from run to run.
        averaged: the weights are an exponential moving average.
    """
    from safetensors.torch import save as safetensors_bytes

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
        statistics = statistics.join(reference[[name for name in ("site", "scanner") if name in reference]])
        pq.write_table(pa.Table.from_pandas(statistics, preserve_index=False), folder / REFERENCE)
        write_json(folder / HISTORY, list(history))
        write_json(folder / SBOM, bill_of_materials(manifest.experiment, {w.file: w.digest for w in weights}))
        complete = manifest.model_copy(
            update={
                # The weights stand here: opening must not ask for what training started from.
                "model": _self_contained(manifest.model),
                "weights": tuple(weights),
                "reference": digest_path(folder / REFERENCE),
                "history": digest_path(folder / HISTORY),
                "sbom": digest_path(folder / SBOM),
            }
        )
        write_json(folder / MANIFEST, complete.model_dump(mode="json"))


def _self_contained(model: ModelConfig) -> ModelConfig:
    """The configuration without the weights that training started from."""
    changes: dict[str, Any] = {"pretrained": None} if getattr(model, "pretrained", None) else {}
    if (encoder := getattr(model, "encoder", None)) is not None:
        changes["encoder"] = encoder.model_copy(update={"pretrained": None})
    return model.model_copy(update=changes)


def read_manifest(path: Path) -> tuple[Manifest, Digest]:
    """What bundle.json in the folder `path` says, and the bundle's digest; no other file is looked at.

    Raises:
        ValueError: if it is not there, or does not hold a manifest.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(
            f"{path}: no {MANIFEST} there; give a folder that `train` or `calibrate` wrote"
        ) from None
    try:
        return Manifest.model_validate_json(text), digest_bytes(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(
            f"{path / MANIFEST}: no manifest of this version: {field}: {first['msg']}; train again"
        ) from None


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
        self.manifest, self.digest = read_manifest(self.path)
        self._verify()

    @property
    def is_complete(self) -> bool:
        """Whether `calibrate` has set the operating point, and the temperature, of which a detector has none."""
        has_temperature = self.manifest.temperature is not None or self.manifest.task == "detection"
        return has_temperature and self.manifest.operating_point is not None

    def networks(self) -> "list[nn.Module]":
        """The ensemble's members in eval mode, on the CPU."""
        import torch
        from safetensors.torch import load_file

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
        """Image statistics of the training split: `stat_*`, `site`, `scanner` ("" = unknown), one row a sample.

        Bundles of earlier versions have no `site` and `scanner` here.
        """
        return pd.read_parquet(self.path / REFERENCE)

    def heldout(self) -> pd.DataFrame:
        """What this bundle answers on the calibration split, one row a sample; no column names a sample.

        Columns: `prob_<class>`, `decision` (a class name) or for multilabel and boxes `decision_<class>` (bool), `site`
        and `scanner` ("" = unknown), `embedding` (F float32 each) or of boxes `num_boxes` (called).

        Raises:
            ValueError: if the bundle holds none.
        """
        if self.manifest.heldout is None:
            raise ValueError(
                f"{self.path}: no {HELDOUT}, the answers that later ones are compared with; "
                "run `cadx calibrate` of this version"
            )
        return pd.read_parquet(self.path / HELDOUT)

    def shares_at(self, prevalence: Mapping[str, float]) -> dict[str, float]:
        """The shares to answer for at a prevalence, of every class they concern; empty where none is given.

        Args:
            prevalence: class -> its share. For binary tasks the positive class's suffices; multilabel ones take any.

        Raises:
            ValueError: if they are not shares of the bundle's classes, or it does not know its own.
        """
        if not prevalence:
            return {}
        manifest, shares = self.manifest, dict(prevalence)
        if not manifest.prevalence:
            raise ValueError(
                f"{self.path}: does not know the prevalence it was calibrated at; run `cadx calibrate` of this version"
            )
        if manifest.task == "binary" and set(shares) == {manifest.positive}:
            (share,) = shares.values()
            shares |= {name: 1 - share for name in manifest.classes if name != manifest.positive}
        if manifest.task != "multilabel" and (
            set(shares) != set(manifest.classes) or not np.isclose(sum(shares.values()), 1)
        ):
            raise ValueError(
                f"prevalence {shares}: give the shares of {', '.join(manifest.classes)}, which sum to 1"
            )
        calibration.at_prevalence(  # refuses what is no share
            np.full(len(manifest.classes), 0.5), manifest.prevalence, shares, manifest.task, manifest.classes
        )
        return shares

    def history(self) -> list[dict[str, Any]]:
        """One record per training epoch."""
        records: list[dict[str, Any]] = json.loads((self.path / HISTORY).read_text(encoding="utf-8"))
        return records

    def complete(
        self,
        path: Path,
        *,
        temperature: float | None,
        bias: Sequence[float] = (),
        isotonic: Mapping[str, Knots] | None = None,
        prevalence: Mapping[str, float] | None = None,
        operating_point: OperatingPoint,
        conformal: Conformal | None = None,
        heldout: pd.DataFrame | None = None,
    ) -> None:
        """Write the final bundle at `path`: this one with its temperature and operating point set.

        Args:
            path: the folder to make.
            temperature: by which logits are divided; None for boxes, whose scores stay as they are.
            bias: of each class, or none.
            isotonic: the curve of each class that follows, or none.
            prevalence: share of each class on the calibration split.
            operating_point: how probabilities become a decision.
            conformal: how prediction sets are made, or none.
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
            "isotonic": {name: knots.model_dump() for name, knots in (isotonic or {}).items()},
            "prevalence": dict(prevalence or {}),
            "operating_point": operating_point.model_dump(),
            "conformal": conformal.model_dump() if conformal else None,
            "schema_version": 3,
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
        elif name == "num_boxes":
            columns[name] = pa.array(values.to_numpy(np.int64))
        else:
            is_flag = str(name).startswith("decision_")
            columns[str(name)] = pa.array(values.to_list(), pa.bool_() if is_flag else pa.string())
    pq.write_table(pa.table(columns), path)


def versions() -> dict[str, str]:
    """The versions of what computes an answer: Python, torch, torchvision and NumPy."""
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": metadata.version("torchvision"),
        "numpy": np.__version__,
    }


def parameters_digest(params: Config) -> Digest:
    """The SHA-256 of a parameter record's canonical JSON."""
    return digest_bytes(canonical_json(params.model_dump(mode="json")).encode())
