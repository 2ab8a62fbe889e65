"""What the Predictor asks of each kind of sample."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from cadx.bundle import Manifest
from cadx.datasets import DatasetFolder
from cadx.models import Output
from cadx.types import RawImage, RawVolume

Sample = RawImage | RawVolume | Path | np.ndarray
"""What a reader gives of an image or a volume; of a slide the path of its file, of a bag of features T E numbers."""


class Said(NamedTuple):
    """What one network says of N samples, on its device.

    Attributes:
        logits: N K.
        attention: N maps, over the network's own grid; none where they were not asked for.
        features: N F.
    """

    logits: Tensor
    attention: Sequence[Tensor]
    features: Tensor

    @classmethod
    def of(cls, outputs: Sequence[Output]) -> Self:
        """What one network says of samples that it was asked about one by one."""
        return cls(
            torch.cat([output.logits for output in outputs]),
            [one for output in outputs for one in output.attention],
            torch.cat([output.features for output in outputs]),
        )


class Subject(ABC):
    """One kind of sample: how networks are asked about it.

    Attributes:
        kind: of the samples of a dataset.
        batch_size: samples that are asked about at once.
    """

    kind: ClassVar[str]
    batch_size: ClassVar[int] = 1

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest

    def check(self, folder: DatasetFolder) -> None:
        """Refuse a dataset of another kind.

        Raises:
            ValueError: if its samples are of another kind.
        """
        if folder.info.kind != self.kind:
            raise ValueError(
                f"{folder.path}: its samples are of kind {folder.info.kind}, this model's {self.kind};"
                " give the dataset or the bundle that fits"
            )

    def require_spacing(self, raw: Any) -> None:
        """Refuse a sample without a spacing, if the bundle requires one.

        Raises:
            ValueError: if it has none.
        """
        if self.manifest.requires_spacing and getattr(raw, "spacing_mm", None) is None:
            raise ValueError(
                f"{self.kind}: no pixel spacing, which this model needs; send a DICOM file with PixelSpacing"
            )

    @abstractmethod
    def read(self, sample: Sample) -> Any:
        """The raw sample.

        Raises:
            ValueError: if it is none of this kind, or cannot be read.
        """

    @abstractmethod
    def item(self, raw: Any) -> Any:
        """What `outputs` takes, of a raw sample."""

    @abstractmethod
    def stored(self, folder: DatasetFolder, sample_id: str) -> Any:
        """What `outputs` takes, of a dataset's sample."""

    @abstractmethod
    def outputs(
        self, networks: Sequence[nn.Module], items: Sequence[Any], device: torch.device, *, attention: bool
    ) -> list[Said]:
        """What each network says of the items; without `attention` its maps may be left out."""

    @abstractmethod
    def picture(self, raw: Any) -> np.ndarray:
        """The raw sample as one picture, H W or H W 3: what image statistics are taken of."""

    @abstractmethod
    def attention(self, raw: Any, item: Any, grid: np.ndarray) -> np.ndarray:
        """A network's attention in the raw sample's coordinates, float32, its maximum 1; `item` has been answered."""
