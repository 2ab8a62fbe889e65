"""Training classifiers of bags: of feature vectors, and of a slide's tiles, encoded once or with the rest."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor, nn

from cadx.loading import FeaturePreprocessing, TilePreprocessing
from cadx.loading.embeddings import EmbeddingBagDataset, EmbeddingCache, encoder_digest
from cadx.loading.slides import Bag, BagBatch, FeatureBagDataset, MILDataset, collate_bags
from cadx.models import MILConfig, Output, to_device
from cadx.predicting.bags import pool_tiles, tile_dataset
from cadx.training.workload import ClassifierWorkload, Draw, Forward, Setting
from cadx.types import Digest


class BagWorkload(ClassifierWorkload):
    """Bags of unequal size: a batch is a `BagBatch`."""

    takes = "bags"
    val_batch_size = 1
    train: FeatureBagDataset | MILDataset | EmbeddingBagDataset

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if not self.config.augmentation.is_identity:
            raise ValueError("train.augmentation: is for images in 2D; leave it out for bags")
        assert isinstance(self.config.model, MILConfig)
        self.model = self.config.model
        negative, info = self.model.negative_class, self.folder.info
        if negative is not None and (
            info.task == "multilabel"
            or negative >= len(info.classes)
            or info.classes[negative] == info.positive
        ):
            raise ValueError(
                f"train.model.negative_class {negative}: must be the number of the class that means nothing was found,"
                f" among {', '.join(info.classes)}, counted from 0; null for a multilabel task"
            )

    def build(self) -> nn.Module:
        """The network."""
        self._network = super().build()
        return self._network

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of bags; of slides in `val`, their numbers."""
        return collate_bags(items) if isinstance(items[0], Bag) else list(items)

    def items(self, batch: BagBatch) -> list[int]:
        """The items of a batch."""
        return batch.samples.tolist()

    def to_device(self, batch: BagBatch) -> BagBatch:
        """The batch, where the network is."""
        instances, mask, targets = (
            x.to(self.device, non_blocking=True) for x in (batch.instances, batch.mask, batch.targets)
        )
        return batch._replace(instances=instances, mask=mask, targets=targets)

    def targets(self, batch: BagBatch) -> Tensor:
        """The labels of a batch, N K."""
        return batch.targets

    def forward(self, network: Forward, batch: BagBatch, draw: Draw) -> Output:
        """What the network says of the bags."""
        return network(batch.instances, batch.mask)

    def weights(self, batch: BagBatch) -> dict[str, Tensor]:
        """The weight of the classification loss, and of the entropy: the number of bags."""
        entropy = torch.tensor(float(len(batch.targets)), device=self.device)
        return super().weights(batch) | ({"entropy": entropy} if self._entropy_weight else {})

    def losses(self, network: Forward, batch: BagBatch, draw: Draw) -> dict[str, Tensor]:
        """The classification loss, and the entropy's where it has a weight."""
        output = self.forward(network, batch, draw)
        losses = {"classification": self.criterion(output.logits, batch.targets)}
        if self._entropy_weight:
            spread = self._network.regularisation(output, batch.mask)  # type: ignore[operator]
            losses["entropy"] = self._entropy_weight * spread
        return losses

    def answers(self, network: Forward, batches: Iterable[BagBatch]) -> dict[int, np.ndarray]:
        """Each bag's logits, K."""
        answers: dict[int, np.ndarray] = {}
        for batch in batches:
            logits = network(batch.instances.to(self.device), batch.mask.to(self.device)).logits
            answers |= dict(zip(self.items(batch), logits.cpu().numpy(), strict=True))
        return answers

    @property
    def _entropy_weight(self) -> float:
        return self.model.entropy_weight


class FeatureWorkload(BagWorkload):
    """Bags that are given as feature vectors."""

    kinds = ("features",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        assert isinstance(self.config.preprocessing, FeaturePreprocessing)
        if self.model.encoder is not None:
            raise ValueError("train.model.encoder: features are encoded already; set it to null")
        self.train = FeatureBagDataset(
            self.folder, setting.train, max_instances=self.config.max_instances, seed=setting.seed
        )
        self.val = FeatureBagDataset(self.folder, setting.val)
        found = self.folder.pixels(setting.train[0]).shape[1]
        if found != self.config.preprocessing.channels:
            raise ValueError(
                f"train.preprocessing.channels {self.config.preprocessing.channels}: the bags of {self.folder.path}"
                f" have {found} numbers per instance; set it to that"
            )

    def build(self) -> nn.Module:
        """The network, which has seen the mean and the spread of the training features."""
        network = super().build()
        bags = (torch.from_numpy(self.folder.pixels(name)) for name in self.setting.train)
        network.fit_inputs(bags)  # type: ignore[operator]
        return network


class SlideWorkload(BagWorkload):
    """Slides as bags of tiles: a frozen encoder sees each tile once, a fine-tuned one learns with the rest."""

    kinds = ("slide",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        made = self.config.preprocessing
        assert isinstance(made, TilePreprocessing)
        if self.model.encoder is None:
            raise ValueError(
                "train.model.encoder: slides need one; give {frozen: false}, or {pretrained: ...} with weights"
            )
        self._frozen = self.model.encoder.frozen
        limit = None if self._frozen else self.config.max_instances
        self._train_tiles = tile_dataset(self.folder, setting.train, made, max_tiles=limit, seed=setting.seed)
        self._val_tiles = tile_dataset(self.folder, setting.val, made)
        self.train = self._train_tiles
        self.val: Any = range(len(setting.val))

    def build(self) -> nn.Module:
        """The network; with a frozen encoder, after all tiles of both splits have been encoded."""
        network = super().build()
        if not self._frozen:
            return network
        cache = EmbeddingCache(self.setting.scratch / "embeddings")
        to_device(network.eval(), self.device, channels_last=self.config.channels_last)
        encoder = encoder_digest(network.encoder)  # type: ignore[arg-type]
        for tiles in (self._train_tiles, self._val_tiles):
            self._embed(cache, tiles, network, encoder)
        seed, limit = self.setting.seed, self.config.max_instances
        self.train = EmbeddingBagDataset(self._train_tiles, cache, encoder, max_instances=limit, seed=seed)
        self.val = EmbeddingBagDataset(self._val_tiles, cache, encoder)
        whole = EmbeddingBagDataset(self._train_tiles, cache, encoder)
        network.fit_inputs(whole[index].instances for index in range(len(whole)))  # type: ignore[operator]
        return network

    def answers(self, network: Forward, batches: Iterable[Any]) -> dict[int, np.ndarray]:
        """Each slide's logits, K, from all of its tiles."""
        if self._frozen:
            return super().answers(network, batches)
        answers: dict[int, np.ndarray] = {}
        for number in (number for batch in batches for number in batch):
            stream = partial(self._val_tiles.stream, number)
            output, _ = pool_tiles(network.network.encode, network, stream, self.device)  # type: ignore[arg-type]
            answers[number] = output.logits[0].cpu().numpy()
        return answers

    def _embed(self, cache: EmbeddingCache, tiles: MILDataset, network: nn.Module, encoder: Digest) -> None:
        with Progress(console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task("encode slides", total=len(tiles))
            for index in range(len(tiles)):
                cache.embed(tiles, index, lambda batch: network.encode(batch.to(self.device)), encoder)  # type: ignore[operator]
                progress.advance(task)
