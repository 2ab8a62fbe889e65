"""Slides and bags of features before a bundle's networks."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cadx.datasets import DatasetFolder, preview
from cadx.loading.slides import MILDataset, TilePreprocessing, stream_tiles, tissue_cells
from cadx.models import Output
from cadx.predicting.subject import Said, Source, Subject
from cadx.reading.slides import SlideSummary, open_slide, summarise_slide
from cadx.transforms import tile_map

_TILES_AT_ONCE = 64

TileStream = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From a batch size to a slide's tiles, batch by batch: (B C H W float32, positions B 2 in um)."""


class SlideTiles:
    """A slide's tiles, streamed, and where those lay that the last answer saw.

    Attributes:
        stream: the tiles; those that cannot be read are left out.
        seen_um: T 2, the (x, y) of the tiles that `pool_tiles` was given last.
    """

    def __init__(self, stream: TileStream) -> None:
        self.stream = stream
        self.seen_um = torch.empty(0, 2)


class RawSlide(NamedTuple):
    """A slide's file, and what was seen of it from afar."""

    path: Path
    summary: SlideSummary

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What was taken as given of it."""
        return self.summary.assumptions

    @property
    def spacing_mm(self) -> tuple[float, float]:
        """(row, column) distance between the thumbnail's pixels."""
        return self.summary.spacing_mm


def tile_dataset(
    folder: DatasetFolder,
    sample_ids: Sequence[str],
    preprocessing: TilePreprocessing,
    *,
    max_tiles: int | None = None,
    seed: int = 0,
) -> MILDataset:
    """The slides of a dataset as bags of tiles, as a bundle's preprocessing asks for them."""
    return MILDataset(
        folder,
        sample_ids,
        preprocessing,
        tile_px=preprocessing.tile_px,
        mpp=preprocessing.mpp,
        minimum_tissue=preprocessing.minimum_tissue,
        max_tiles=max_tiles,
        seed=seed,
    )


def pool_tiles(
    encode: Callable[[Tensor], Tensor], pool: Callable[..., Output], tiles: TileStream, device: torch.device
) -> tuple[Output, Tensor]:
    """What a network says of a slide, of which never more than a batch of tiles is in memory.

    Args:
        encode: B C H W -> B E.
        pool: (1 T E, mask 1 T) -> Output.
        tiles: of the slide.
        device: where the network is.

    Returns:
        The answer, N = 1, and the positions of its tiles, T 2 in um.
    """
    embeddings: list[Tensor] = []
    positions: list[Tensor] = []
    for batch, places in tiles(_TILES_AT_ONCE):
        embeddings.append(encode(batch.to(device)).float())
        positions.append(places)
    instances = torch.cat(embeddings)[None]
    mask = torch.ones(instances.shape[:2], dtype=torch.bool, device=device)
    return pool(instances, mask), torch.cat(positions)


class SlideSubject(Subject):
    """An item is `SlideTiles`; attention is a weight per tile, in the order of the stream."""

    kind = "slide"

    def read(self, source: Source) -> RawSlide:
        """The slide, looked at from afar.

        Raises:
            ValueError: if it cannot be read, or its um per pixel are unknown.
        """
        if not isinstance(source, Path):
            raise ValueError("slide: give the path of its file")
        return RawSlide(source, summarise_slide(source))

    def item(self, raw: RawSlide) -> SlideTiles:
        """The tiles with enough tissue."""
        made, summary = self._preprocessing, raw.summary
        spacing_um = (summary.spacing_mm[0] * 1000, summary.spacing_mm[1] * 1000)
        tile_um = made.tile_px * made.mpp
        cells = tissue_cells(summary.tissue, spacing_um, tile_um, made.minimum_tissue, "slide")
        positions_um = cells[:, ::-1] * tile_um

        def stream(batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            with open_slide(raw.path) as slide:
                yield from stream_tiles(slide, positions_um, made, batch_size, "slide")

        return SlideTiles(stream)

    def stored(self, folder: DatasetFolder, sample_id: str) -> SlideTiles:
        """The tiles of a dataset's slide."""
        dataset = tile_dataset(folder, [sample_id], self._preprocessing)
        return SlideTiles(partial(dataset.stream, 0))

    def outputs(
        self,
        networks: Sequence[nn.Module],
        items: Sequence[SlideTiles],
        device: torch.device,
        *,
        attention: bool,
    ) -> list[Said]:
        """What each network says of the slides, one by one."""
        return [Said.of([self._output(network, item, device) for item in items]) for network in networks]

    def picture(self, raw: RawSlide) -> np.ndarray:
        """Its thumbnail."""
        return raw.summary.thumbnail

    def attention(self, raw: RawSlide, item: SlideTiles, grid: np.ndarray) -> np.ndarray:
        """The tiles' weights over the thumbnail, H W; NaN where there is no tile."""
        made, summary = self._preprocessing, raw.summary
        spacing_um = (summary.spacing_mm[0] * 1000, summary.spacing_mm[1] * 1000)
        shape = (summary.thumbnail.shape[0], summary.thumbnail.shape[1])
        return tile_map(
            grid / grid.max(),
            item.seen_um.numpy(),
            tile_um=made.tile_px * made.mpp,
            spacing_um=spacing_um,
            shape=shape,
        )

    def _output(self, network: nn.Module, item: SlideTiles, device: torch.device) -> Output:
        output, item.seen_um = pool_tiles(network.encode, network, item.stream, device)  # type: ignore[arg-type]
        return output

    @property
    def _preprocessing(self) -> TilePreprocessing:
        assert isinstance(self.manifest.preprocessing, TilePreprocessing)
        return self.manifest.preprocessing


class FeatureSubject(Subject):
    """An item is a bag of features, T E; attention is a weight per instance."""

    kind = "features"

    def read(self, source: Source) -> np.ndarray:
        """The bag.

        Raises:
            ValueError: if it has another width than the model was trained on, or numbers that are none.
        """
        wanted = self.manifest.preprocessing.channels
        if not isinstance(source, np.ndarray):
            raise ValueError(f"bag: give an array of T x {wanted} numbers")
        bag = np.asarray(source, np.float32)
        if bag.ndim != 2 or not len(bag) or bag.shape[1] != wanted or not np.isfinite(bag).all():
            raise ValueError(f"bag: shape is {bag.shape}; give T x {wanted} finite numbers, T at least 1")
        return bag

    def item(self, raw: np.ndarray) -> np.ndarray:
        """The bag."""
        return raw

    def stored(self, folder: DatasetFolder, sample_id: str) -> np.ndarray:
        """A dataset's bag."""
        return self.read(folder.pixels(sample_id))

    def outputs(
        self,
        networks: Sequence[nn.Module],
        items: Sequence[np.ndarray],
        device: torch.device,
        *,
        attention: bool,
    ) -> list[Said]:
        """What each network says of the bags, one by one."""
        bags = [torch.from_numpy(item)[None].to(device) for item in items]
        return [
            Said.of(
                [network(bag, torch.ones(bag.shape[:2], dtype=torch.bool, device=device)) for bag in bags]
            )
            for network in networks
        ]

    def picture(self, raw: np.ndarray) -> np.ndarray:
        """The features as a picture, as `ingest` takes it."""
        return preview("features", raw)

    def attention(self, raw: np.ndarray, item: np.ndarray, grid: np.ndarray) -> np.ndarray:
        """The instances' weights, T."""
        return grid / grid.max()
