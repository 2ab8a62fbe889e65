"""Training detectors on images with boxes, validated by the average precision on whole images."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cadx.detection.average_precision import calculate_map
from cadx.loading.boxes import BoxBatch, BoxDataset, BoxItem, augment_boxes, collate_boxes
from cadx.mining import MinedNegatives, mine_false_positives
from cadx.models.detector_config import FasterRCNNConfig
from cadx.models.interface import Detections
from cadx.predicting.boxes import BoxModel, detect
from cadx.predicting.table import detection_table
from cadx.training.workload import Draw, Forward, Setting, Workload
from cadx.transforms import Preprocessing

MINED_FRACTION = 0.25
"""Of the crops of an image with mined false positives, those that show one."""


class BoxWorkload(Workload):
    """Images or crops with their boxes: a batch is a `BoxBatch`."""

    kinds = ("image",)
    takes = "boxes"
    monitors = ("ap50",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        config, preprocessing = self.config, self.config.preprocessing
        assert isinstance(preprocessing, Preprocessing)
        assert isinstance(config.model, BoxModel)
        self.preprocessing, self._model = preprocessing, config.model
        if config.augmentation.rotation_degrees:
            raise ValueError(
                "train.augmentation.rotation_degrees: boxes stay tight without it only; set it to 0"
            )
        tiles = preprocessing.fit == "tile"
        if config.mining_epochs is not None and not tiles:
            raise ValueError(
                "train.mining_epochs: is for tiles; set preprocessing.fit: tile, or leave it out"
            )
        self.mined = MinedNegatives() if config.mining_epochs is not None else None
        self._crops_per_image = config.patches_per_sample if tiles else 1
        self.train: BoxDataset = BoxDataset(
            self.folder,
            setting.train,
            preprocessing,
            seed=setting.seed,
            crop_px=(preprocessing.height_px, preprocessing.width_px) if tiles else None,
            crops_per_image=self._crops_per_image,
            positive_fraction=min(config.positive_fraction, 1 - MINED_FRACTION if self.mined else 1.0),
            mined=self.mined,
            mined_fraction=MINED_FRACTION,
            cache_mb=config.cache_mb,
        )
        self.val = range(len(setting.val))
        boxes = self.folder.boxes
        most = int(boxes["sample_id"].value_counts().max()) if len(boxes) else 0
        if most > config.model.max_detections:
            raise ValueError(
                f"train.model.max_detections {config.model.max_detections}: an image has {most} boxes; raise it"
            )
        self._val_boxes = boxes[boxes["sample_id"].isin(setting.val)]
        counts = boxes.loc[boxes["sample_id"].isin(setting.train), "class"].value_counts()
        self.train_counts = {name: int(counts.get(name, 0)) for name in self.folder.info.classes}
        for name, number in {"train": sum(self.train_counts.values()), "val": len(self._val_boxes)}.items():
            if not number:
                raise ValueError(f"splits: no box in {name}; split again, or give {name} a larger share")
        # With a balanced sampler an image is drawn for each of the classes that it shows, else as background.
        shown = boxes.drop_duplicates(["sample_id", "class"]).groupby("sample_id")["class"].agg(set)
        classes = self.folder.info.classes
        rows = np.array([[name in shown.get(sample, ()) for name in classes] for sample in setting.train])
        self.item_labels = np.repeat(rows.astype(np.float64), self._crops_per_image, axis=0)
        if config.num_workers:  # else each of them would preprocess every image
            self.train.warm()

    def collate(self, items: Sequence[Any]) -> Any:
        """A batch of images with boxes; of `val`, the images' numbers."""
        return collate_boxes(items) if isinstance(items[0], BoxItem) else list(items)

    def name(self, item: int) -> str:
        """The image of an item."""
        return self.setting.train[item // self._crops_per_image]

    def items(self, batch: BoxBatch) -> list[int]:
        """The items of a batch."""
        return batch.items.tolist()

    def to_device(self, batch: BoxBatch) -> BoxBatch:
        """The batch, where the network is."""
        images = batch.images.to(self.device, non_blocking=True)
        targets = [Detections(*(x.to(self.device, non_blocking=True) for x in one)) for one in batch.targets]
        return BoxBatch(images, targets, batch.items)

    def weights(self, batch: BoxBatch) -> dict[str, Tensor]:
        """Those of Faster R-CNN's losses, about: images, or lesions, of which it learns from as many places each."""
        model = self.config.model
        if not isinstance(model, FasterRCNNConfig):
            return {}  # see `divisor`
        images = torch.tensor(float(len(batch.targets)), device=self.device)
        lesions = torch.tensor(float(sum(len(target.labels) for target in batch.targets)), device=self.device)
        # A focal loss counts the background too, in a part without a lesion as if there were one.
        objectness = lesions.clamp_min(1.0) if model.focal_objectness else images
        return {
            "loss_objectness": objectness,
            "loss_rpn_box_reg": objectness,
            "loss_classifier": images,
            "loss_box_reg": images if model.box_loss == "smooth_l1" else lesions,
        }

    def divisor(self, network: nn.Module) -> Tensor | None:
        """What a detector of one stage assigned to the lesions; None for Faster R-CNN."""
        divisor: Tensor | None = network.divisor  # type: ignore[assignment]
        return divisor

    def losses(self, network: Forward, batch: BoxBatch, draw: Draw) -> dict[str, Tensor]:
        """The detector's losses on the augmented images."""
        images, targets = batch.images, batch.targets
        if not self.config.augmentation.is_identity:
            images, targets = augment_boxes(
                images,
                targets,
                self.config.augmentation,
                seed=draw.seed,
                epoch=draw.epoch,
                samples=draw.samples,
                background=self.preprocessing.background,
            )
        losses: Mapping[str, Tensor] = network(images, targets)
        return {name: loss.float() for name, loss in losses.items()}

    def answers(self, network: Forward, batches: Iterable[list[int]]) -> dict[int, Detections]:
        """What each whole image shows, in stored pixels."""
        return {
            number: answer
            for batch in batches
            for number, answer in zip(batch, self._detect(network, self.setting.val, batch), strict=True)
        }

    def score(self, answers: Mapping[int, Detections]) -> dict[str, float | None]:
        """The average precision at an IoU of .5, mean over classes."""
        sample_ids, classes = self.setting.val, self.folder.info.classes
        found = detection_table({sample_ids[number]: answers[number] for number in sorted(answers)}, classes)
        scores = calculate_map(found, self._val_boxes, sample_ids, classes=classes)
        return {"ap50": scores[""]["ap50"], "ap": scores[""]["ap"]}

    def finish_epoch(self, network: Forward, epoch: int, rank: int, num_processes: int) -> Any:
        """Look for what the network takes for lesions in this process's share of the training images."""
        if self.mined is None or (epoch + 1) % (self.config.mining_epochs or 1):
            return None
        found = MinedNegatives()
        mine = range(rank, len(self.setting.train), num_processes)
        lesions = dict(tuple(self.folder.boxes.groupby("sample_id")))
        for number in mine:
            sample_id = self.setting.train[number]
            (answer,) = self._detect(network, self.setting.train, [number])
            rows = lesions.get(sample_id)
            corners = (
                np.empty((0, 4)) if rows is None else rows[["x0", "y0", "x1", "y1"]].to_numpy(np.float64)
            )
            found.add(sample_id, mine_false_positives(answer, torch.tensor(corners)))
        return found.state_dict()

    def take_up(self, found: Sequence[Any]) -> None:
        """Show what was mined, in the epochs that follow."""
        if self.mined is None or found[0] is None:
            return
        everywhere = MinedNegatives()
        for state in found:
            one = MinedNegatives()
            one.load_state_dict(state)
            everywhere.merge(one)
        self.mined.merge(everywhere, decay=0.5)

    def state_dict(self) -> dict[str, Any]:
        """What was mined."""
        return {} if self.mined is None else self.mined.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with what was mined."""
        if self.mined is not None:
            self.mined.load_state_dict(state)

    def _detect(
        self, network: Forward, sample_ids: Sequence[str], numbers: Sequence[int]
    ) -> list[Detections]:
        images = [self.folder.pixels(sample_ids[number]) for number in numbers]
        return detect(network, images, self.preprocessing, self.device, self._model)
