"""From a bundle and a raw image to an answer: the one path of calibration, evaluation and serving.

    RawImage -> Preprocessing -> network -> temperature, bias -> probabilities -> operating point -> decision

Invariants: an image's answer does not depend on the batch it is in, nor on the format that carried its
pixels; full float32 precision on every device; nothing is kept of an image.
"""

import json
import threading
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from cadx import calibration
from cadx.bundle import Bundle, answer_columns
from cadx.drift import image_statistics
from cadx.files import replacing
from cadx.reading.images import read_image
from cadx.types import Config, Digest, Prediction, RawImage, Split, Task

BATCH_SIZE = 64
RANGE_MARGIN = 0.1
"""How far beyond its range in training an image statistic may lie unremarked, as a share of that range."""

T = TypeVar("T")

# The precision switches of cuDNN are global to the process.
_network_lock = threading.Lock()


class _Batch(NamedTuple):
    logits: np.ndarray  # N K float64, pooled over the members
    attention: np.ndarray  # N h w float32, mean of the members
    features: np.ndarray  # N F float32, the members' side by side


class Predictor:
    """Answers for raw images, from one bundle.

    An ensemble's members are pooled by the mean of their probabilities, and the temperature acts on the
    logarithm (for multilabel the log-odds) of that mean: one temperature, fitted to what is served.

    Source: Rahaman and Thiery 2021, "Uncertainty Quantification and Deep Ensembles" ("pool-then-calibrate").

    Args:
        bundle: a bundle, or the path of one.
        device: a torch device, or "auto": the GPU where there is one.
        uncalibrated_ok: accept a bundle without temperature and operating point, for its `logits`.

    Raises:
        ValueError: if the bundle is damaged, or incomplete.
    """

    def __init__(self, bundle: Bundle | Path, device: str = "auto", *, uncalibrated_ok: bool = False) -> None:
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        if not (self.bundle.is_complete or uncalibrated_ok):
            raise ValueError(
                f"{self.bundle.path}: no temperature and operating point yet; run `cadx calibrate` first"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._networks = [network.to(self._device) for network in self.bundle.networks()]
        self._ranges = _ranges(self.bundle.reference())

    def predict(self, source: Path | bytes | RawImage, *, attention: bool = False) -> Prediction:
        """The answer for one image: a file, its bytes, or what was read of them.

        Raises:
            ValueError: if the image cannot be read, or lacks a pixel spacing that the bundle requires.
        """
        return self.predict_many([source], attention=attention)[0]

    def predict_many(
        self, sources: Sequence[Path | bytes | RawImage], *, attention: bool = False
    ) -> list[Prediction]:
        """The answers for several images, each as `predict` gives it.

        Raises:
            ValueError: as `predict`, for the first image at fault.
        """
        answers: list[Prediction] = []
        for group in _groups(sources, BATCH_SIZE):
            images = [source if isinstance(source, RawImage) else read_image(source) for source in group]
            for image in images:
                self._require_spacing(image)
            batch = self._forward([image.pixels for image in images])
            probabilities = self._calibrated(batch.logits)
            called = self.decide(probabilities)
            for i, image in enumerate(images):
                statistics = image_statistics(image.pixels)
                answers.append(
                    Prediction(
                        probabilities=dict(zip(self._classes, probabilities[i].tolist(), strict=True)),
                        decision=self.decision(called[i]),
                        attention=_raw_attention(self.bundle, batch.attention[i], image)
                        if attention
                        else None,
                        embedding=batch.features[i],
                        statistics=statistics,
                        warnings=(*image.assumptions, *self._unusual(statistics)),
                    )
                )
        return answers

    def logits(
        self, pixels: Iterable[np.ndarray], batch_size: int = BATCH_SIZE
    ) -> tuple[np.ndarray, np.ndarray]:
        """Uncalibrated logits, N K float64, and features, N F float32, of raw pixels; they are streamed."""
        batches = [self._forward(group) for group in _groups(pixels, batch_size)]
        if not batches:
            return np.empty((0, len(self._classes))), np.empty((0, 0), np.float32)
        return np.concatenate([b.logits for b in batches]), np.concatenate([b.features for b in batches])

    def probabilities(self, pixels: Iterable[np.ndarray], batch_size: int = BATCH_SIZE) -> np.ndarray:
        """Calibrated probabilities, N K float64, of raw pixels; they are streamed."""
        return self._calibrated(self.logits(pixels, batch_size)[0])

    @property
    def thresholds(self) -> dict[str, float]:
        """Class -> threshold of the bundle's operating point."""
        operating_point = self.bundle.manifest.operating_point
        assert operating_point is not None, "decisions need a complete bundle"
        return operating_point.thresholds

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Which classes are called, N K bool, from N K probabilities, at the bundle's operating point.

        One class per row for binary (the positive one where its probability >= threshold) and multiclass
        (the most probable); any number for multilabel.
        """
        manifest = self.bundle.manifest
        return decide(probabilities, self.thresholds, manifest.task, manifest.classes, manifest.positive)

    def decision(self, called: np.ndarray) -> str | tuple[str, ...]:
        """The name, or for multilabel the names, of the classes called in one row of `decide`."""
        names = tuple(name for name, is_called in zip(self._classes, called, strict=True) if is_called)
        return names if self.bundle.manifest.task == "multilabel" else names[0]

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.bundle.manifest.classes

    def _forward(self, pixels: Sequence[np.ndarray]) -> _Batch:
        inputs = torch.stack([self.bundle.manifest.preprocessing.apply(image) for image in pixels])
        # TF32, cuDNN's default, is good to three digits only.
        with (
            _network_lock,
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            outputs = [network(inputs.to(self._device)) for network in self._networks]
            logits = torch.stack([output.logits for output in outputs]).double().cpu()
            attention = torch.stack([output.attention for output in outputs]).mean(0).cpu()
            features = torch.cat([output.features for output in outputs], dim=1).float().cpu()
        assert torch.isfinite(logits).all(), "a network gave a logit that is no number"
        return _Batch(
            pool_logits(logits, self.bundle.manifest.task).numpy(), attention.numpy(), features.numpy()
        )

    def _calibrated(self, logits: np.ndarray) -> np.ndarray:
        manifest = self.bundle.manifest
        assert manifest.temperature is not None, "probabilities need a complete bundle"
        return calibration.apply(logits, manifest.temperature, manifest.task, manifest.bias)

    def _require_spacing(self, image: RawImage) -> None:
        if self.bundle.manifest.requires_spacing and image.spacing_mm is None:
            raise ValueError(
                "image: no pixel spacing, which this model needs; send a DICOM file with PixelSpacing"
            )

    def _unusual(self, statistics: dict[str, float]) -> Iterator[str]:
        for name, (low, high) in self._ranges.items():
            if not low <= statistics[name] <= high:
                yield (
                    f"unusual image: {name} is {statistics[name]:.3g}, "
                    f"the model was trained on {low:.3g} to {high:.3g}"
                )


def pool_logits(logits: Tensor, task: Task) -> Tensor:
    """Logits whose probabilities are the mean of the members' probabilities: S N K -> N K.

    One member's logits are returned as they are.
    """
    if len(logits) == 1:
        return logits[0]
    count = torch.log(torch.tensor(float(len(logits)), dtype=logits.dtype))
    if task == "multilabel":
        log_positive = nn.functional.logsigmoid(logits).logsumexp(0) - count
        log_negative = nn.functional.logsigmoid(-logits).logsumexp(0) - count
        return log_positive - log_negative
    return logits.log_softmax(-1).logsumexp(0) - count


def decide(
    probabilities: np.ndarray,
    thresholds: dict[str, float],
    task: Task,
    classes: Sequence[str],
    positive: str | None,
) -> np.ndarray:
    """Which classes are called, N K bool, from N K probabilities (see `OperatingPoint`).

    >>> decide(np.array([[0.7, 0.3], [0.8, 0.2]]), {"sick": 0.3}, "binary", ("well", "sick"), "sick").tolist()
    [[False, True], [True, False]]
    """
    if task == "multilabel":
        return probabilities >= np.array([thresholds[name] for name in classes])
    if task == "binary":
        assert positive is not None
        column = list(classes).index(positive)
        called = probabilities[:, column] >= thresholds[positive]
        return np.stack([called if k == column else ~called for k in range(2)], axis=1)
    return np.eye(len(classes), dtype=bool)[probabilities.argmax(1)]


UNCLUSTERED = (
    "The source names no patients: intervals treat each image as a patient, and are too narrow if some "
    "patients have several images."
)


class PredictionsInfo(Config):
    """What the rows of a predictions file are: kept in the file's own metadata.

    `bundle` is the digest of the bundle that gave them; the other fields are as in its manifest.
    """

    experiment: str
    seed: int
    split: Split
    bundle: Digest
    task: Task
    classes: tuple[str, ...]
    positive: str | None
    clustered: bool
    thresholds: dict[str, float]
    assumptions: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of any number made from these rows must know."""
        return () if self.clustered else (UNCLUSTERED,)

    @property
    def columns(self) -> list[str]:
        """The columns of the file, in order."""
        labels = [f"label_{name}" for name in self.classes]
        answers = answer_columns(self.task, self.classes)
        return ["sample_id", "patient", "site", "scanner", "age", "sex", *labels, *answers]


def answer_table(
    probabilities: np.ndarray, calls: np.ndarray, task: Task, classes: Sequence[str]
) -> pd.DataFrame:
    """`answer_columns` of N samples, from N K probabilities and N K calls (`decide`).

    `decision` is a class name; for multilabel there is `decision_<class>`, bool, for each.
    """
    called = [*calls.T] if task == "multilabel" else [np.array(classes, dtype=object)[calls.argmax(1)]]
    return pd.DataFrame(dict(zip(answer_columns(task, classes), [*probabilities.T, *called], strict=True)))


def write_predictions(path: Path, frame: pd.DataFrame, info: PredictionsInfo) -> None:
    """Write predictions.parquet, whole or not at all; the same rows give the same bytes.

    Columns: sample_id, patient, site, scanner, age, sex, `label_<class>` (NaN = unlabelled),
    `prob_<class>`, and `decision` (a class name) or for multilabel `decision_<class>` (bool).
    """
    table = pa.Table.from_pandas(frame[info.columns], preserve_index=False)
    # Instead of pandas' own metadata, which changes with its version.
    table = table.replace_schema_metadata({"cadx": info.model_dump_json()})
    with replacing(path) as partial:
        pq.write_table(table, partial)


def read_predictions(path: Path) -> tuple[pd.DataFrame, PredictionsInfo]:
    """The rows of a predictions file, and what they are.

    Raises:
        ValueError: if it is not a predictions file.
    """
    try:
        table = pq.read_table(path)
        info = PredictionsInfo.model_validate(json.loads((table.schema.metadata or {})[b"cadx"]))
    except (pa.ArrowInvalid, KeyError, ValueError):
        raise ValueError(
            f"{path}: no predictions file of this version; write it with `cadx evaluate`"
        ) from None
    if missing := [name for name in info.columns if name not in table.column_names]:
        raise ValueError(f"{path}: no columns {', '.join(missing)}; write it again with `cadx evaluate`")
    return table.to_pandas(), info


class Arrays(NamedTuple):
    """The rows of a predictions file as `metrics.score` takes them."""

    labels: np.ndarray  # N K, NaN = unlabelled
    probabilities: np.ndarray  # N K
    decisions: np.ndarray  # N K bool
    patients: np.ndarray | None  # N, None where each image stands for a patient


def arrays(frame: pd.DataFrame, info: PredictionsInfo) -> Arrays:
    """The columns of a predictions file by what they mean."""
    if info.task == "multilabel":
        decisions = frame[[f"decision_{name}" for name in info.classes]].to_numpy(bool)
    else:
        decisions = frame["decision"].to_numpy(object)[:, None] == np.array(info.classes, dtype=object)
    return Arrays(
        frame[[f"label_{name}" for name in info.classes]].to_numpy(np.float64),
        frame[[f"prob_{name}" for name in info.classes]].to_numpy(np.float64),
        decisions,
        frame["patient"].to_numpy(object) if info.clustered else None,
    )


def subgroups(frame: pd.DataFrame, attributes: Sequence[str]) -> dict[str, list[str]]:
    """The value of each attribute for each row, "" = unknown, age in bands; without what is never known."""
    groups = {
        name: [age_band(age) for age in frame[name]] if name == "age" else frame[name].astype(str).tolist()
        for name in attributes
    }
    return {name: values for name, values in groups.items() if any(values)}


def age_band(years: float) -> str:
    """The band of an age in reports, "" where it is unknown.

    >>> age_band(39.9), age_band(40.0), age_band(80.0), age_band(float("nan"))
    ('0-39', '40-59', '80+', '')
    """
    for limit, band in ((40, "0-39"), (60, "40-59"), (80, "60-79"), (np.inf, "80+")):
        if years < limit:
            return band
    return ""


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _ranges(reference: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Statistic -> (lowest, highest) unremarkable value; none where the training split has no value."""
    ranges = {}
    for column in reference.columns:
        low, high = reference[column].min(), reference[column].max()
        if np.isfinite(low) and np.isfinite(high):
            margin = RANGE_MARGIN * (high - low) + 1e-5  # the reference is rounded
            ranges[column.removeprefix("stat_")] = (low - margin, high + margin)
    return ranges


def _raw_attention(bundle: Bundle, grid: np.ndarray, image: RawImage) -> np.ndarray:
    """A network's attention, h w, in the raw image's coordinates: H W float32, its maximum 1."""
    manifest = bundle.manifest
    height_px, width_px = image.pixels.shape[:2]
    attention = manifest.preprocessing.to_raw(grid, height_px, width_px, manifest.model.cells)
    return attention / attention.max()
