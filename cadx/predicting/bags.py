"""Slides and bags of features before a bundle's networks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cadx.bundle import Manifest
from cadx.datasets import DatasetFolder, preview
from cadx.files import canonical_json, digest_bytes, digest_path
from cadx.loading.embeddings import encoder_digest, read_embeddings, write_embeddings
from cadx.loading.slides import MILDataset, stream_tiles, tissue_cells
from cadx.loading.tiles import TilePreprocessing
from cadx.models import Output
from cadx.predicting.subject import Said, Sample, Subject
from cadx.reading.slides import SlideSummary, open_slide, summarise_slide
from cadx.transforms import tile_map
from cadx.types import Digest

_TILES_AT_ONCE = 64

TileStream = Callable[[int], Iterator[tuple[Tensor, Tensor]]]
"""From a batch size to a slide's tiles, batch by batch: (B C H W float32, positions B 2 in um)."""


class SlideTiles:
    """A slide's tiles, streamed, and what the last answer saw of them.

    Attributes:
        stream: the tiles; those that cannot be read are left out.
        identity: what the tiles are a function of, None where nobody asks.
        seen_um: T 2, the (x, y) of the tiles that `pool_tiles` was given last.
        weights: T, the attention that each of them got, summing to 1; empty until `SlideSubject.attention`.
    """

    def __init__(self, stream: TileStream, identity: Mapping[str, Any] | None = None) -> None:
        self.stream = stream
        self.identity = identity
        self.seen_um = torch.empty(0, 2)
        self.weights = np.empty(0)


class RawSlide(NamedTuple):
    """A slide's file, what was seen of it from afar, and its tiles with enough tissue."""

    path: Path
    summary: SlideSummary
    tiles: SlideTiles

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


class EmbeddedSlides:
    """Embeddings of slides that were answered, in a folder: asked again, a slide is not encoded again.

    A file is named by the digest of all that decides it, the slide's bytes among them, and in float32: an answer does
    not depend on whether it was found here. Beyond `max_bytes` those go first that were not used for longest.
    """

    def __init__(self, folder: Path, max_bytes: int = 2 << 30) -> None:
        self.folder = folder
        self.max_bytes = max_bytes

    def get(
        self, identity: Mapping[str, Any], make: Callable[[], tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Embeddings T E and positions T 2, made now if there are none of this identity or they are damaged."""
        name = digest_bytes(canonical_json(identity).encode()).removeprefix("sha256:")
        path = self.folder / f"{name}.npy"
        try:
            records = read_embeddings(path)
        except ValueError:
            embeddings, positions_um = make()
            # What cannot be kept is still an answer.
            with suppress(OSError):
                write_embeddings(path, embeddings.cpu().numpy(), positions_um.numpy())
                self._make_room()
            return embeddings, positions_um
        with suppress(OSError):
            path.touch()
        return torch.from_numpy(records["embedding"].copy()), torch.from_numpy(records["position_um"].copy())

    def _make_room(self) -> None:
        sizes = {path: path.stat() for path in self.folder.glob("*.npy")}
        excess = sum(size.st_size for size in sizes.values()) - self.max_bytes
        for path in sorted(sizes, key=lambda path: sizes[path].st_mtime_ns):
            if excess <= 0:
                break
            excess -= sizes[path].st_size
            path.unlink(missing_ok=True)


def embed_tiles(
    encode: Callable[[Tensor], Tensor], tiles: TileStream, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The embeddings of a slide's tiles, T E on the device, and their positions, T 2 in um."""
    embeddings: list[Tensor] = []
    positions: list[Tensor] = []
    for batch, places in tiles(_TILES_AT_ONCE):
        embeddings.append(encode(batch.to(device)).float())
        positions.append(places)
    return torch.cat(embeddings), torch.cat(positions)


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
    embeddings, positions_um = embed_tiles(encode, tiles, device)
    return _pooled(pool, embeddings), positions_um


def _pooled(pool: Callable[..., Output], embeddings: Tensor) -> Output:
    mask = torch.ones((1, len(embeddings)), dtype=torch.bool, device=embeddings.device)
    return pool(embeddings[None], mask)


class SlideSubject(Subject):
    """An item is `SlideTiles`; attention is a weight per tile, in the order of the stream.

    Attributes:
        cache: where the embeddings of slides are kept that are read from files; None keeps none.
    """

    kind = "slide"
    cache: EmbeddedSlides | None = None

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(manifest)
        self._digests: dict[nn.Module, Digest] = {}

    def read(self, sample: Sample | RawSlide) -> RawSlide:
        """The slide, looked at from afar.

        Raises:
            ValueError: if it cannot be read, its um per pixel are unknown, or no tile has enough tissue.
        """
        if isinstance(sample, RawSlide):
            return sample
        if not isinstance(sample, Path):
            raise ValueError("slide: give the path of its file")
        made, summary = self._preprocessing, summarise_slide(sample)
        spacing_um = (summary.spacing_mm[0] * 1000, summary.spacing_mm[1] * 1000)
        tile_um = made.tile_px * made.mpp
        cells = tissue_cells(summary.tissue, spacing_um, tile_um, made.minimum_tissue, "slide")
        positions_um = cells[:, ::-1] * tile_um

        def stream(batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
            with open_slide(sample) as slide:
                yield from stream_tiles(slide, positions_um, made, batch_size, "slide")

        identity = None
        if self.cache is not None:
            identity = {
                "slide": digest_path(sample),
                "positions_um": digest_bytes(positions_um.tobytes()),
                "preprocessing": made.model_dump(mode="json"),
            }
        return RawSlide(sample, summary, SlideTiles(stream, identity))

    def item(self, raw: RawSlide) -> SlideTiles:
        """The tiles with enough tissue."""
        return raw.tiles

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
        item.weights = grid / grid.sum()
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
        def make() -> tuple[Tensor, Tensor]:
            return embed_tiles(network.encode, item.stream, device)  # type: ignore[arg-type]

        if self.cache is None or item.identity is None:
            embeddings, item.seen_um = make()
        else:
            identity = {**item.identity, "encoder": self._encoder_digest(network)}
            embeddings, item.seen_um = self.cache.get(identity, make)
        return _pooled(network, embeddings.to(device))

    def _encoder_digest(self, network: nn.Module) -> Digest:
        """Of a network's encoder, made once."""
        if network not in self._digests:
            assert isinstance(network.encoder, nn.Module)
            self._digests[network] = encoder_digest(network.encoder)
        return self._digests[network]

    @property
    def _preprocessing(self) -> TilePreprocessing:
        assert isinstance(self.manifest.preprocessing, TilePreprocessing)
        return self.manifest.preprocessing


class FeatureSubject(Subject):
    """An item is a bag of features, T E; attention is a weight per instance."""

    kind = "features"

    def read(self, sample: Sample) -> np.ndarray:
        """The bag.

        Raises:
            ValueError: if it has another width than the model was trained on, or numbers that are none.
        """
        wanted = self.manifest.preprocessing.channels
        if not isinstance(sample, np.ndarray):
            raise ValueError(f"bag: give an array of T x {wanted} numbers")
        bag = np.asarray(sample, np.float32)
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
