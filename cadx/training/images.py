"""Training classifiers of 2D images."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cadx.loading.images import ImageDataset
from cadx.models import Output
from cadx.training.workload import ClassifierWorkload, Draw, Forward, Setting
from cadx.transforms import Preprocessing


class ImageWorkload(ClassifierWorkload):
    """Whole images: a batch is (images N C H W, labels N K, items N)."""

    kinds = ("image",)
    takes = "images"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        preprocessing = self.config.preprocessing
        assert isinstance(preprocessing, Preprocessing)
        self.preprocessing = preprocessing
        self.train, self.val = (
            ImageDataset(setting.folder, sample_ids, preprocessing, setting.config.cache_mb)
            for sample_ids in (setting.train, setting.val)
        )
        if self.config.num_workers:  # else each of them would preprocess every image
            self.train.warm()
            self.val.warm()

    def items(self, batch: Any) -> list[int]:
        """The items of a batch."""
        return batch[2].tolist()

    def to_device(self, batch: Any) -> Any:
        """The batch, where the network is."""
        images, targets, items = batch
        return (
            images.to(self.device, non_blocking=True),
            targets.to(self.device, non_blocking=True),
            items,
        )

    def targets(self, batch: Any) -> Tensor:
        """The labels of a batch, N K."""
        return batch[1]

    def forward(self, network: Forward, batch: Any, draw: Draw) -> Output:
        """What the network says of the augmented images."""
        images = self.config.augmentation.apply(
            batch[0],
            seed=draw.seed,
            epoch=draw.epoch,
            samples=draw.samples,
            background=self.preprocessing.background,
        )
        return network(images)

    def answers(self, network: Forward, batches: Iterable[Any]) -> dict[int, np.ndarray]:
        """Each image's logits, K."""
        outputs: list[Tensor] = []
        numbers: list[int] = []
        for batch in batches:
            outputs.append(network(self.to_device(batch)[0]).logits)
            numbers += self.items(batch)
        return dict(zip(numbers, torch.cat(outputs).cpu().numpy(), strict=True)) if outputs else {}
