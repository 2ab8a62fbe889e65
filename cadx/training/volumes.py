"""Training classifiers of volumes on random patches, validated on whole volumes."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cadx.loading.patches import VolumePreprocessing, VolumeSource
from cadx.loading.volumes import Patch, Patch3DDataset
from cadx.models import Output
from cadx.models.volume import VolumeConfig
from cadx.predicting.volumes import slide_over
from cadx.training.workload import ClassifierWorkload, Draw, Forward, Setting


class _PatchBatch(NamedTuple):
    images: Tensor  # N 1 D H W
    targets: Tensor  # N K
    items: list[int]


class VolumeWorkload(ClassifierWorkload):
    """Random patches: a batch is (images N 1 D H W, labels N K, items).

    In a binary task a patch of a volume with a mask is labelled by what the mask marks in it. Else it has its
    volume's labels. The weights of the loss and the balanced sampler count volumes: `positive_fraction` is what
    balances patches.
    """

    kinds = ("volume",)
    takes = "volumes"

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config = self.config
        assert isinstance(config.preprocessing, VolumePreprocessing)
        assert isinstance(config.model, VolumeConfig)
        self._cells = config.model.cells
        if config.precision == "bf16" and setting.device.type == "cpu":
            # torch 2.13: of maps of two slices, the weight gradient of a 3 x 3 x 3 convolution is noise of any size.
            raise ValueError(
                "train.precision bf16: gradients of 3D convolutions are wrong in it on a CPU; use auto or fp32"
            )
        self.preprocessing = config.preprocessing
        self.train: Patch3DDataset = Patch3DDataset(
            self.folder,
            setting.train,
            config.preprocessing,
            patches_per_volume=config.patches_per_sample,
            positive_fraction=config.positive_fraction,
            seed=setting.seed,
        )
        self.train.warm()
        spacings = (
            config.preprocessing.spacing_mm or VolumeSource.of_folder(self.folder, name).spacing_mm
            for name in setting.train
        )
        self._aspects = [row_mm / column_mm for _, row_mm, column_mm in spacings]
        self.val = range(len(setting.val))
        self.item_labels = np.repeat(self.train_labels, config.patches_per_sample, axis=0)
        classes, positive = self.folder.info.classes, self.folder.info.positive
        self._positive = None if positive is None else classes.index(positive)

    def collate(self, patches: Sequence[Any]) -> Any:
        """A batch of patches with the labels of each; of `val`, the volumes' numbers."""
        if not isinstance(patches[0], Patch):
            return list(patches)
        return _PatchBatch(
            torch.stack([patch.image for patch in patches]),
            torch.stack([self._labels(patch) for patch in patches]),
            [patch.item for patch in patches],
        )

    def _labels(self, patch: Patch) -> Tensor:
        if self._positive is None or patch.is_positive.isnan():
            return patch.labels
        labels = torch.empty(2)
        labels[self._positive] = patch.is_positive
        labels[1 - self._positive] = 1 - patch.is_positive
        return labels

    def name(self, item: int) -> str:
        """The volume of a patch."""
        return self.setting.train[item // self.config.patches_per_sample]

    def items(self, batch: _PatchBatch) -> list[int]:
        """The items of a batch."""
        return batch.items

    def to_device(self, batch: _PatchBatch) -> _PatchBatch:
        """The batch, where the network is."""
        images, targets = (x.to(self.device, non_blocking=True) for x in (batch.images, batch.targets))
        return _PatchBatch(images, targets, batch.items)

    def targets(self, batch: _PatchBatch) -> Tensor:
        """The labels of a batch, N K."""
        return batch.targets

    def forward(self, network: Forward, batch: _PatchBatch, draw: Draw) -> Output:
        """What the network says of the augmented patches: all slices of one are moved alike, turned in mm."""
        slices = self.config.augmentation.apply(
            batch.images.flatten(1, 2),
            seed=draw.seed,
            epoch=draw.epoch,
            samples=draw.samples,
            background=0.0,  # `VolumePreprocessing.apply` has it outside of a volume
            aspects=[self._aspects[item // self.config.patches_per_sample] for item in batch.items],
        )
        return network(slices.view_as(batch.images))

    def answers(self, network: Forward, batches: Iterable[list[int]]) -> dict[int, np.ndarray]:
        """Each whole volume's logits, K."""
        answers = {}
        for number in (number for batch in batches for number in batch):
            source = VolumeSource.of_folder(self.folder, self.setting.val[number])
            made, task = self.preprocessing, self.folder.info.task
            answer = slide_over(
                network,
                source,
                made,
                task,
                self._positive,
                self._cells,
                self.device,
                with_attention=False,
            )
            answers[number] = answer.logits[0].cpu().numpy()
        return answers
