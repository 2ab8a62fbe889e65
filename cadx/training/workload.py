"""What the loop asks of each kind of sample: data, a network, a loss and a score; and what classifiers share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from cadx.datasets import DatasetFolder
from cadx.loading.epochs import EpochDataset
from cadx.metrics.ranking import auc_value
from cadx.models import Output
from cadx.sampling import BalancedSampler, EpochSampler
from cadx.training.recipe import TrainingConfig, monitored
from cadx.weighting import count_labels


class Forward:
    """A network under the run's precision, called as the network is."""

    def __init__(self, network: nn.Module, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        self.network, self._autocast = network, autocast

    def __call__(self, *inputs: Any) -> Any:
        """What the network gives."""
        with self._autocast():
            return self.network(*inputs)


class Setting(NamedTuple):
    """What every workload is made from.

    Attributes:
        config: the recipe.
        folder: the dataset.
        train: sample_ids of the train split.
        val: sample_ids of the val split.
        seed: of the run.
        device: where the network is.
        scratch: a folder that outlives the run, for what is dear to compute again.
    """

    config: TrainingConfig
    folder: DatasetFolder
    train: list[str]
    val: list[str]
    seed: int
    device: torch.device
    scratch: Path

    @classmethod
    def of(
        cls,
        config: TrainingConfig,
        folder: DatasetFolder,
        splits: pd.DataFrame,
        seed: int,
        device: torch.device,
        scratch: Path,
    ) -> "Setting":
        """The setting for the train and val splits of `splits`.

        Raises:
            ValueError: if one of them is empty.
        """
        train, val = (splits.loc[splits["split"] == name, "sample_id"].tolist() for name in ("train", "val"))
        for name, sample_ids in {"train": train, "val": val}.items():
            if not sample_ids:
                raise ValueError(f"splits: no sample in {name}; give {name} a share in split.fractions")
        return cls(config, folder, train, val, seed, device, scratch)


class Draw(NamedTuple):
    """What decides a batch's augmentation: with seed and epoch, the number that tells each draw apart."""

    seed: int
    epoch: int
    samples: Sequence[int]


class Workload(ABC):
    """One kind of sample, as the loop sees it.

    A batch is whatever `train` and `val` give, after `collate`. Items are the indices of `train`: where a sample
    gives several patches, each is an item.

    Attributes:
        kinds: of which samples (`cadx.types.Kind`).
        takes: which families of models suit it (`takes` of their configurations).
        monitors: what the best epoch may be chosen by.
        train: items with their targets.
        val: samples, in order.
        item_labels: N K of the items, for the sampler.
        train_counts: class -> how often it is labelled present in train.
        val_batch_size: samples of val at once; None for as many as in training.
    """

    kinds: ClassVar[tuple[str, ...]]
    takes: ClassVar[str]
    monitors: ClassVar[tuple[str, ...]] = ("auc", "loss")
    train: Any
    val: Any
    item_labels: np.ndarray
    train_counts: dict[str, int]
    val_batch_size: int | None = None

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.config, self.folder, self.device = setting.config, setting.folder, setting.device
        for name, takes in {"max_instances": "bags", "mining_epochs": "boxes"}.items():
            if getattr(self.config, name) is not None and self.takes != takes:
                raise ValueError(f"train.{name}: is for {takes} alone; leave it out")
        if getattr(self.config.preprocessing, "fit", None) == "tile" and self.takes != "boxes":
            raise ValueError("train.preprocessing.fit tile: is for boxes; use pad or stretch")

    def sampler(self) -> EpochSampler | BalancedSampler:
        """The order in which items are seen."""
        sampler_class = BalancedSampler if self.config.sampler == "balanced" else EpochSampler
        return sampler_class(self.item_labels, seed=self.setting.seed)

    def build(self) -> nn.Module:
        """The network, on the CPU; random weights come from torch's global generator."""
        return self.config.model.build(len(self.folder.info.classes), self.config.preprocessing.channels)

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of what `train` or `val` gives one by one."""
        return default_collate([*items])

    def set_epoch(self, epoch: int) -> None:
        """Draw this epoch's items from now on, where they are not the same in every epoch."""
        if isinstance(self.train, EpochDataset):
            self.train.set_epoch(epoch)

    def finish_epoch(self, network: Forward, epoch: int, rank: int, num_processes: int) -> Any:
        """What this process learns from the epoch for those that follow: plain values, None for nothing."""
        return None

    def take_up(self, found: Sequence[Any]) -> None:  # noqa: B027
        """Use in later epochs what `finish_epoch` found, in each process."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold of it: plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Become what `state_dict` was taken of."""

    @abstractmethod
    def name(self, item: int) -> str:
        """The sample_id of an item."""

    @abstractmethod
    def items(self, batch: Any) -> list[int]:
        """The items of a batch of `train`."""

    @abstractmethod
    def to_device(self, batch: Any) -> Any:
        """The batch, where the network is."""

    @abstractmethod
    def weights(self, batch: Any) -> dict[str, Tensor]:
        """How much the batch's part of each loss weighs: parts of a batch add up to the loss of the whole."""

    def divisor(self, network: nn.Module) -> Tensor | None:
        """In place of `weights`, for losses whose divisor only the network finds: that of those it gave last.

        It is as counted: the losses were divided by it, or by 1 if it is less. None: `weights` says all.
        """
        return None

    @abstractmethod
    def losses(self, network: Forward, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """The losses of a batch of `train` by name, float32; their sum is what is learned by."""

    @abstractmethod
    def answers(self, network: Forward, batches: Iterable[Any]) -> dict[int, Any]:
        """What the network says of each sample of these batches of `val`, by its number: plain arrays."""

    @abstractmethod
    def score(self, answers: Mapping[int, Any]) -> dict[str, float | None]:
        """The monitors over all of `val`, from every sample's answer; None where undefined."""


class ClassifierWorkload(Workload):
    """What classifiers of any kind share: the loss, its weight and the AUC."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.train_labels, self.val_labels = (
            self.folder.labels(setting.train),
            self.folder.labels(setting.val),
        )
        counts = count_labels(self.train_labels)
        info = self.folder.info
        if not _has_both(counts).any():
            classes = ", ".join(info.classes)
            raise ValueError(f"splits: train has samples of fewer than two outcomes ({classes}); split again")
        self.criterion = self.config.loss.build(info.task, counts).to(self.device)
        # Of a network that knows nothing the loss is above 0, unless no label counts.
        if self._val_loss(np.zeros_like(self.val_labels)) == 0:
            raise ValueError(
                "splits: no sample in val is labelled with a class that train has; label some of val, or split again"
            )
        if monitored(self.config, info.task) == "auc" and not _has_both(count_labels(self.val_labels)).any():
            raise ValueError(
                "splits: monitor auc needs both classes in val; use monitor: loss, or a larger val"
            )
        self.train_counts = dict(zip(info.classes, counts[:, 1].tolist(), strict=True))
        self.item_labels = self.train_labels

    @abstractmethod
    def targets(self, batch: Any) -> Tensor:
        """The labels in a batch of `train`, N K, NaN = unlabelled."""

    @abstractmethod
    def forward(self, network: Forward, batch: Any, draw: Draw) -> Output:
        """What the network says of a batch of `train`."""

    def name(self, item: int) -> str:
        """The sample_id of an item."""
        return self.setting.train[item]

    def weights(self, batch: Any) -> dict[str, Tensor]:
        """The weight of the classification loss."""
        return {"classification": self.criterion.weight(self.targets(batch))}  # type: ignore[operator]

    def losses(self, network: Forward, batch: Any, draw: Draw) -> dict[str, Tensor]:
        """The classification loss."""
        return {
            "classification": self.criterion(self.forward(network, batch, draw).logits, self.targets(batch))
        }

    def score(self, answers: Mapping[int, np.ndarray]) -> dict[str, float | None]:
        """AUC and loss, from each sample's logits, K."""
        logits = np.stack([answers[number] for number in range(len(self.val_labels))])
        finite = bool(np.isfinite(logits).all())
        multilabel = self.folder.info.task == "multilabel"
        auc = macro_auc(self.val_labels, logits, multilabel=multilabel) if finite else None
        return {"loss": self._val_loss(logits), "auc": auc}

    def _val_loss(self, logits: np.ndarray) -> float:
        """The loss of these logits, N K, on val; 0 where no label counts."""
        tensors = (torch.from_numpy(x).to(self.device) for x in (logits, self.val_labels))
        return self.criterion(*tensors).item()


def macro_auc(labels: np.ndarray, logits: np.ndarray, *, multilabel: bool) -> float | None:
    """The mean over classes of the AUC of one against the rest; None if no class has both outcomes.

    Args:
        labels: N K, NaN = unlabelled.
        logits: N K.
        multilabel: scores are the logits as they are; otherwise the log-odds of their softmax.
    """
    scores = logits.astype(np.float64)
    if not multilabel:
        # Log-odds of a class against the rest: no ties where a probability would round to 1.
        others = np.stack([np.delete(scores, k, 1) for k in range(scores.shape[1])], 1)
        scores = scores - np.logaddexp.reduce(others, axis=2)
    values = [auc_value(labels[:, k], scores[:, k]) for k in np.flatnonzero(_has_both(count_labels(labels)))]
    return float(np.mean([value for value in values if value is not None])) if values else None


def _has_both(counts: np.ndarray) -> np.ndarray:
    """Which classes have samples with and without them, by `count_labels`."""
    return np.asarray((counts > 0).all(1))
