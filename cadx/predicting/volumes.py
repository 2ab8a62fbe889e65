"""3D volumes before a bundle's networks: a sliding window over all of a volume.

A volume that fits into one patch is answered as that patch is. Of a larger one, a class that is a finding (binary
and multilabel tasks) is as likely as in the window where it is likeliest: one nodule suffices. Classes that
exclude each other without one being a finding are averaged over all windows.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cadx.datasets import DatasetFolder, preview
from cadx.loading.patches import VolumePreprocessing, VolumeSource
from cadx.loading.volumes import GridPatches
from cadx.models import Output
from cadx.models.volume import VolumeConfig
from cadx.predicting.subject import Said, Sample, Subject
from cadx.transforms import Cells
from cadx.types import RawVolume, Task

_WINDOWS_AT_ONCE = 8
_MIRRORS = [axes for number in range(4) for axes in combinations((-3, -2, -1), number)]
"""Sets of axes, D H W, along which a patch can be turned about; first the patch as it is."""


def slide_over(
    network: Callable[[Tensor], Output],
    volume: VolumeSource,
    preprocessing: VolumePreprocessing,
    task: Task,
    positive: int | None,
    cells: tuple[Cells, Cells, Cells],
    device: torch.device,
    *,
    with_attention: bool = True,
) -> Output:
    """What a network says of a whole volume, from windows that overlap by half.

    Args:
        network: answers patches, N 1 D H W.
        volume: the voxels.
        preprocessing: size, spacing and intensities of the patches.
        task: of the network.
        positive: index of the class that a binary task looks for.
        cells: where the network's attention lies in a patch.
        device: where the network is.
        with_attention: False leaves the attention empty, which saves time and memory.

    Returns:
        logits 1 K; attention 1 D H W over the volume's grid, summing to 1: where the windows look, each counting
        by how likely it finds its finding; features 1 F, those of the window that decides, or the mean of all where
        all of them do.
    """
    windows = GridPatches(volume, preprocessing)
    mirrors = _MIRRORS if preprocessing.mirrors else _MIRRORS[:1]
    answers: list[Output] = []
    for start in range(0, len(windows), _WINDOWS_AT_ONCE):
        stop = min(start + _WINDOWS_AT_ONCE, len(windows))
        patches = torch.stack([windows[index] for index in range(start, stop)]).to(device)
        by_view = [network(patches.flip(axes) if axes else patches) for axes in mirrors]
        views = Output(*(torch.stack(parts).float() for parts in zip(*by_view, strict=True)))
        answers.append(Output(views.logits.mean(0), views.attention.transpose(0, 1), views.features.mean(0)))
    logits, attention, features = (torch.cat(parts) for parts in zip(*answers, strict=True))
    if len(windows) == 1:
        weights, pooled, seen = torch.ones(1), logits, features
    elif task == "multilabel":
        pooled = logits.max(0, keepdim=True).values
        weights, seen = logits.max(1).values.sigmoid(), features[logits.max(1).values.argmax()][None]
    elif positive is not None:
        first = int((logits[:, positive] - logits[:, 1 - positive]).argmax())
        pooled, seen = logits[first][None], features[first][None]
        weights = logits.softmax(1)[:, positive]
    else:
        pooled = logits.log_softmax(1).logsumexp(0, keepdim=True)
        weights, seen = torch.ones(len(windows)), features.mean(0, keepdim=True)
    if not with_attention:
        return Output(pooled, attention[:0], seen)
    # One window at a time: all of them at full size would be many times the volume.
    maps = (
        weight * _turned_back(_spread(window, preprocessing.patch_px, cells), mirrors).numpy()
        for window, weight in zip(attention.cpu(), weights.tolist(), strict=True)
    )
    whole = torch.from_numpy(windows.assemble(maps)).clamp_min(0)
    return Output(pooled, whole / whole.sum().clamp_min(torch.finfo(torch.float32).tiny), seen)


def _turned_back(maps: Tensor, mirrors: Sequence[tuple[int, ...]]) -> Tensor:
    """The mean of the maps of a patch's mirror images, V D H W, each turned back onto the patch: 1 D H W."""
    turned = [view.flip(axes) for view, axes in zip(maps, mirrors, strict=True)]
    return torch.stack(turned).mean(0, keepdim=True)


def _spread(maps: Tensor, size_px: Sequence[int], cells: Sequence[Cells]) -> Tensor:
    """Maps, N d h w, over patches, N D H W: linear between the cells' centres, held beyond the outermost."""
    for axis, (side_px, cell) in enumerate(zip(size_px, cells, strict=True), start=1):
        last = maps.shape[axis] - 1
        places = (torch.arange(side_px, device=maps.device) + 0.5 - cell.first_centre_px) / cell.stride_px
        places = places.clamp(0, last)
        below = places.long()
        share = (places - below).view([-1 if axis == other else 1 for other in range(4)])
        above = maps.index_select(axis, (below + 1).clamp(max=last))
        # In place: of a whole volume each of these is as large as it.
        maps = maps.index_select(axis, below).mul_(1 - share).add_(above.mul_(share))
    return maps


class VolumeSubject(Subject):
    """An item is a `VolumeSource`."""

    kind = "volume"

    def read(self, sample: Sample) -> RawVolume:
        """The volume."""
        if not isinstance(sample, RawVolume):
            raise ValueError(
                "volume: give what `cadx.reading.volumes.read_volume` reads of its file or folder"
            )
        return sample

    def item(self, raw: RawVolume) -> VolumeSource:
        """Its voxels as a source of blocks."""
        depth_mm, height_mm, width_mm = map(float, raw.spacing_mm)
        return VolumeSource.of_array(raw.voxels, (depth_mm, height_mm, width_mm))

    def stored(self, folder: DatasetFolder, sample_id: str) -> VolumeSource:
        """The sample's voxels, read block by block."""
        return VolumeSource.of_folder(folder, sample_id)

    def outputs(
        self, networks: Sequence[nn.Module], items: Sequence[Any], device: torch.device, *, attention: bool
    ) -> list[Said]:
        """What each network says of the volumes, one by one."""
        return [
            Said.of([self._output(network, item, device, attention=attention) for item in items])
            for network in networks
        ]

    def picture(self, raw: RawVolume) -> np.ndarray:
        """Its middle slice, as `ingest` takes it."""
        return preview("volume", raw.voxels)

    def attention(self, raw: RawVolume, item: VolumeSource, grid: np.ndarray) -> np.ndarray:
        """The map over the raw volume, D H W."""
        made = self.manifest.preprocessing
        assert isinstance(made, VolumePreprocessing)
        # Not stretched onto the volume: the grid may reach beyond its end.
        cells = [Cells(ratio, ratio / 2) for ratio in made.ratios(item)]
        whole = _spread(torch.from_numpy(grid)[None], raw.voxels.shape, cells)
        attention: np.ndarray = whole[0].numpy()
        return attention / max(float(attention.max()), np.finfo(np.float32).tiny)

    def _output(
        self, network: nn.Module, volume: VolumeSource, device: torch.device, *, attention: bool
    ) -> Output:
        manifest = self.manifest
        assert isinstance(manifest.preprocessing, VolumePreprocessing)
        positive = manifest.classes.index(manifest.positive) if manifest.positive else None
        assert isinstance(manifest.model, VolumeConfig)
        made, cells = manifest.preprocessing, manifest.model.cells
        return slide_over(
            network, volume, made, manifest.task, positive, cells, device, with_attention=attention
        )
