"""From a bundle and a raw sample to an answer: the one path of calibration, evaluation and serving.

    raw sample -> preprocessing -> network -> temperature, bias -> probabilities -> operating point -> decision

Invariants: a sample's answer does not depend on the batch it is in, nor on the format that carried its
pixels; full float32 precision on every device; nothing is kept of a sample.
"""

import copy
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from cadx import calibration, conformal
from cadx.bundle import Bundle, Manifest
from cadx.datasets import DatasetFolder
from cadx.drift import image_statistics
from cadx.loading import FeaturePreprocessing, TilePreprocessing, VolumePreprocessing
from cadx.memory import tune_allocator
from cadx.models import Detections, to_device
from cadx.predicting.bags import FeatureSubject, SlideSubject
from cadx.predicting.boxes import BoxModel, detectors_answer
from cadx.predicting.images import ImageSubject
from cadx.predicting.subject import Sample, Subject
from cadx.predicting.table import decide
from cadx.predicting.volumes import VolumeSubject
from cadx.transforms import Preprocessing
from cadx.types import Prediction, Task

RANGE_MARGIN = 0.1
"""How far beyond its range in training an image statistic may lie unremarked, as a share of that range."""

_IMAGES_WITH_BOXES = 8

T = TypeVar("T")

# The precision switches of cuDNN are global to the process.
_network_lock = threading.Lock()


class Answers(NamedTuple):
    """What a bundle's members say of N samples, uncalibrated.

    Attributes:
        logits: N K float64, pooled over the members.
        attention: N maps, each the mean of the members'; none where they were not asked for.
        features: N F float32, the members' side by side.
    """

    logits: np.ndarray
    attention: list[np.ndarray]
    features: np.ndarray


class Sets(NamedTuple):
    """Prediction sets of N samples.

    Attributes:
        possible: N K bool, the classes that cannot be ruled out.
        refer: N bool, whether a person should look.
    """

    possible: np.ndarray
    refer: np.ndarray


def subject_of(manifest: Manifest) -> Subject:
    """How samples of a bundle's kind are read and answered: the registry of kinds."""
    if isinstance(manifest.preprocessing, VolumePreprocessing):
        return VolumeSubject(manifest)
    if isinstance(manifest.preprocessing, TilePreprocessing):
        return SlideSubject(manifest)
    if isinstance(manifest.preprocessing, FeaturePreprocessing):
        return FeatureSubject(manifest)
    return ImageSubject(manifest)


class Predictor:
    """Answers for raw images, from one bundle.

    An ensemble's members are pooled by the mean of their probabilities, and the temperature acts on the
    logarithm (for multilabel the log-odds) of that mean: one temperature, fitted to what is served.

    Source: Rahaman and Thiery 2021, "Uncertainty Quantification and Deep Ensembles" ("pool-then-calibrate").

    Args:
        bundle: a bundle, or the path of one.
        device: a torch device, or "auto": the GPU where there is one.
        uncalibrated_ok: accept a bundle without temperature and operating point, for its `logits`.
        prevalence: class -> its share where the model is used, if that is not the calibration split's. For binary
            tasks the positive class's, for multiclass ones those of all, for multilabel ones of any.
            Probabilities and thresholds move along, so that binary and multilabel calls, chosen for a sensitivity,
            stay as they are. Prediction sets hold at any prevalence.

    Raises:
        ValueError: if the bundle is damaged, or incomplete, or the prevalence is not one.
    """

    def __init__(
        self,
        bundle: Bundle | Path,
        device: str = "auto",
        *,
        uncalibrated_ok: bool = False,
        prevalence: Mapping[str, float] | None = None,
    ) -> None:
        tune_allocator()
        self.bundle = bundle if isinstance(bundle, Bundle) else Bundle(bundle)
        if not (self.bundle.is_complete or uncalibrated_ok):
            raise ValueError(
                f"{self.bundle.path}: no temperature and operating point yet; run `cadx calibrate` first"
            )
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self._device = torch.device(device)
        self._networks = self.bundle.networks()
        for network in self._networks:
            # In full float32 precision it was measured on a CPU alone.
            to_device(network, self._device, channels_last=self._device.type == "cpu")
        self.subject = subject_of(self.bundle.manifest)
        self._ranges = _ranges(self.bundle.reference())
        self._prevalence = self.bundle.shares_at(prevalence or {})

    def members(self, numbers: slice) -> "Predictor":
        """This predictor with some of its networks alone, 0-based; the rest of the bundle stays."""
        some = copy.copy(self)
        some._networks = self._networks[numbers]
        return some

    def predict(self, sample: Sample, *, attention: bool = False) -> Prediction:
        """The answer for one sample.

        Raises:
            ValueError: if it cannot be read, or lacks a spacing that the bundle requires.
        """
        return self.predict_many([sample], attention=attention)[0]

    def predict_many(self, samples: Sequence[Sample], *, attention: bool = False) -> list[Prediction]:
        """The answers for several samples, each as `predict` gives it.

        Raises:
            ValueError: as `predict`, for the first at fault.
        """
        self._require_labels()
        answers: list[Prediction] = []
        for group in _groups(samples, self.subject.batch_size):
            raws = [self.subject.read(sample) for sample in group]
            for raw in raws:
                self.subject.require_spacing(raw)
            items = [self.subject.item(raw) for raw in raws]
            batch = self._forward(items, attention=attention)
            at_home = self._calibrated(batch.logits)
            probabilities = self._here(at_home)
            called = self.decide(probabilities)
            sets = self.sets(at_home, called)
            for i, raw in enumerate(raws):
                statistics = image_statistics(self.subject.picture(raw))
                answers.append(
                    Prediction(
                        probabilities=dict(zip(self._classes, probabilities[i].tolist(), strict=True)),
                        decision=self.decision(called[i]),
                        attention=self.subject.attention(raw, items[i], batch.attention[i])
                        if attention
                        else None,
                        embedding=batch.features[i],
                        statistics=statistics,
                        prediction_set=self._names(sets.possible[i]) if sets else None,
                        refer=bool(sets and sets.refer[i]),
                        warnings=(*getattr(raw, "assumptions", ()), *self.unusual(statistics)),
                    )
                )
        return answers

    def stored(self, folder: DatasetFolder, sample_ids: Sequence[str]) -> Iterator[Any]:
        """The samples of a dataset as `logits` and `probabilities` take them, read as they are asked for.

        Raises:
            ValueError: if the dataset's samples are of another kind than this model's.
        """
        self.subject.check(folder)
        return (self.subject.stored(folder, sample_id) for sample_id in sample_ids)

    def logits(self, items: Iterable[Any]) -> tuple[np.ndarray, np.ndarray]:
        """Uncalibrated logits, N K float64, and features, N F float32, of `stored` samples; they are streamed.

        Of images, an item is its raw pixels.
        """
        self._require_labels()
        batches = [self._forward(group, attention=False) for group in _groups(items, self.subject.batch_size)]
        if not batches:
            return np.empty((0, len(self._classes))), np.empty((0, 0), np.float32)
        return np.concatenate([b.logits for b in batches]), np.concatenate([b.features for b in batches])

    def detect(self, images: Iterable[np.ndarray]) -> Iterator[Detections]:
        """The boxes of each image, given as raw pixels, in stored pixels and by falling score; they are streamed.

        Raises:
            ValueError: if this is no model of boxes.
        """
        manifest = self.bundle.manifest
        if manifest.task != "detection" or not isinstance(manifest.preprocessing, Preprocessing):
            raise ValueError(f"{self.bundle.path}: answers with {manifest.task} labels and not with boxes")
        assert isinstance(manifest.model, BoxModel)
        for group in _groups(images, _IMAGES_WITH_BOXES):
            with self._exactly():
                found = detectors_answer(
                    self._networks, group, manifest.preprocessing, self._device, manifest.model
                )
            yield from found

    def probabilities(self, items: Iterable[Any]) -> np.ndarray:
        """Calibrated probabilities, N K float64, of `stored` samples; they are streamed."""
        return self.calibrated(self.logits(items)[0])

    def calibrated(self, logits: np.ndarray) -> np.ndarray:
        """The probabilities, N K, that `logits` stand for."""
        return self._here(self._calibrated(logits))

    @property
    def thresholds(self) -> dict[str, float]:
        """Class -> threshold of the bundle's operating point."""
        operating_point = self.bundle.manifest.operating_point
        assert operating_point is not None, "decisions need a complete bundle"
        before = self.bundle.manifest.prevalence
        moved = {
            name: float(calibration.shifted(threshold, before[name], self._prevalence[name]))
            for name, threshold in operating_point.thresholds.items()
            if name in self._prevalence
        }
        return operating_point.thresholds | moved

    def decide(self, probabilities: np.ndarray) -> np.ndarray:
        """Which classes are called, N K bool, from N K probabilities, at the bundle's operating point.

        One class per row for binary (the positive one where its probability >= threshold) and multiclass
        (the most probable); any number for multilabel.
        """
        manifest = self.bundle.manifest
        return decide(probabilities, self.thresholds, manifest.task, manifest.classes, manifest.positive)

    def decision(self, called: np.ndarray) -> str | tuple[str, ...]:
        """The name, or for multilabel the names, of the classes called in one row of `decide`."""
        names = self._names(called)
        return names if self.bundle.manifest.task == "multilabel" else names[0]

    def sets(self, probabilities: np.ndarray, called: np.ndarray) -> Sets | None:
        """Prediction sets from N K probabilities at the calibration split's prevalence, and N K calls.

        None where the bundle has none.
        """
        found = self.bundle.manifest.conformal
        if found is None:
            return None
        return Sets(
            conformal.possible(probabilities, found, self._classes),
            conformal.refers(probabilities, called, found, self._classes),
        )

    def _names(self, which: np.ndarray) -> tuple[str, ...]:
        return tuple(name for name, is_one in zip(self._classes, which, strict=True) if is_one)

    @property
    def _classes(self) -> tuple[str, ...]:
        return self.bundle.manifest.classes

    def _forward(self, items: Sequence[Any], *, attention: bool = True) -> Answers:
        with self._exactly():
            said = self.subject.outputs(self._networks, items, self._device, attention=attention)
            logits = torch.stack([one.logits for one in said]).double().cpu()
            maps = [
                torch.stack(members).mean(0).cpu().numpy()
                for members in zip(*(one.attention for one in said), strict=True)
            ]
            features = torch.cat([one.features for one in said], dim=1).float().cpu()
        assert torch.isfinite(logits).all(), "a network gave a logit that is no number"
        return Answers(pool_logits(logits, self.bundle.manifest.task).numpy(), maps, features.numpy())

    def _require_labels(self) -> None:
        if self.bundle.manifest.task == "detection":
            raise ValueError(
                f"{self.bundle.path}: answers with boxes, not with classes; use `Predictor.detect`"
            )

    @contextmanager
    def _exactly(self) -> Iterator[None]:
        # TF32, cuDNN's default, is good to three digits only.
        with (
            _network_lock,
            torch.inference_mode(),
            torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False),
        ):
            yield

    def _calibrated(self, logits: np.ndarray) -> np.ndarray:
        manifest = self.bundle.manifest
        assert manifest.temperature is not None, "probabilities need a complete bundle"
        p = calibration.apply(logits, manifest.temperature, manifest.task, manifest.bias)
        if manifest.isotonic:
            p = calibration.apply_isotonic(p, manifest.isotonic, manifest.task, manifest.classes)
        return p

    def _here(self, probabilities: np.ndarray) -> np.ndarray:
        if not self._prevalence:
            return probabilities
        manifest = self.bundle.manifest
        return calibration.at_prevalence(
            probabilities, manifest.prevalence, self._prevalence, manifest.task, manifest.classes
        )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """The bundle's members."""
        return tuple(self._networks)

    def unusual(self, statistics: dict[str, float]) -> Iterator[str]:
        """A warning for each image statistic beyond its range in training."""
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


def _groups(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group


def _ranges(reference: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Statistic -> (lowest, highest) unremarkable value; none where the training split has no value."""
    ranges = {}
    for column in reference.filter(like="stat_").columns:
        low, high = reference[column].min(), reference[column].max()
        if np.isfinite(low) and np.isfinite(high):
            margin = RANGE_MARGIN * (high - low) + 1e-5  # the reference is rounded
            ranges[column.removeprefix("stat_")] = (low - margin, high + margin)
    return ranges
