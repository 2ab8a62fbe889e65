"""Images with labels, one by one."""

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch.utils.data import Dataset

from cadx.datasets import DatasetFolder
from cadx.transforms import Preprocessing


class ImageDataset(Dataset[tuple[torch.Tensor, torch.Tensor, int]]):
    """Preprocessed images with labels: (C H W float32, K float32 with NaN = unlabelled, index).

    The images are kept in memory, each as it is first asked for, if all of them fit into `cache_mb`.
    """

    def __init__(
        self, folder: DatasetFolder, sample_ids: Sequence[str], preprocessing: Preprocessing, cache_mb: float
    ) -> None:
        """Choose the samples; index i is `sample_ids[i]`.

        Args:
            folder: the dataset.
            sample_ids: which samples, in which order.
            preprocessing: how their pixels become tensors.
            cache_mb: memory for preprocessed images, in MiB; 0 keeps none.

        Raises:
            ValueError: if the dataset lacks one of the samples.
        """
        self.folder = folder
        self.sample_ids = tuple(sample_ids)
        self.preprocessing = preprocessing
        self.labels = folder.labels(self.sample_ids)
        shape = (
            len(self.sample_ids),
            preprocessing.channels,
            preprocessing.height_px,
            preprocessing.width_px,
        )
        self._cache = torch.empty(shape) if math.prod(shape) * 4 <= cache_mb * 1024**2 else None
        self._cached = np.zeros(len(self.sample_ids), bool)

    def warm(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the cache, if there is one: before loader workers fork, so that they share it.

        Args:
            progress: called with (images done, images in all) after each image.
        """
        if self._cache is None:
            return
        for index in range(len(self)):
            self._image(index)
            if progress is not None:
                progress(index + 1, len(self))

    def __len__(self) -> int:
        """The number of samples."""
        return len(self.sample_ids)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Image, target and index of one sample."""
        return self._image(index), torch.from_numpy(self.labels[index]), index

    def _image(self, index: int) -> torch.Tensor:
        if self._cache is not None and self._cached[index]:
            return self._cache[index]
        image = self.preprocessing.apply(self.folder.pixels(self.sample_ids[index]))
        if self._cache is not None:
            self._cache[index] = image
            self._cached[index] = True
        return image
