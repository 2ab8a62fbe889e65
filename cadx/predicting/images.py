"""2D images before a bundle's networks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from cadx.datasets import DatasetFolder
from cadx.models.radiograph import RadiographConfig
from cadx.predicting.subject import Said, Sample, Subject
from cadx.transforms import Preprocessing
from cadx.types import RawImage


class ImageSubject(Subject):
    """An item is the raw pixels, H W or H W 3."""

    kind = "image"
    batch_size = 64

    def read(self, sample: Sample) -> RawImage:
        """The image."""
        if not isinstance(sample, RawImage):
            raise ValueError("image: give what `cadx.reading.images.read_image` reads of its file")
        return sample

    def item(self, raw: RawImage) -> np.ndarray:
        """Its pixels."""
        return raw.pixels

    def stored(self, folder: DatasetFolder, sample_id: str) -> np.ndarray:
        """The sample's pixels."""
        return folder.pixels(sample_id)

    def outputs(
        self,
        networks: Sequence[nn.Module],
        items: Sequence[np.ndarray],
        device: torch.device,
        *,
        attention: bool,
    ) -> list[Said]:
        """What each network says of the images, as one batch."""
        inputs = torch.stack([self._preprocessing.apply(pixels) for pixels in items]).to(device)
        answers = (network(inputs) for network in networks)
        return [Said(answer.logits, [*answer.attention], answer.features) for answer in answers]

    def picture(self, raw: RawImage) -> np.ndarray:
        """Its pixels."""
        return raw.pixels

    def attention(self, raw: RawImage, item: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """The map over the raw image, H W."""
        height_px, width_px = raw.pixels.shape[:2]
        assert isinstance(self.manifest.model, RadiographConfig)
        attention = self._preprocessing.to_raw(grid, height_px, width_px, self.manifest.model.cells)
        return attention / attention.max()

    @property
    def _preprocessing(self) -> Preprocessing:
        assert isinstance(self.manifest.preprocessing, Preprocessing)
        return self.manifest.preprocessing
