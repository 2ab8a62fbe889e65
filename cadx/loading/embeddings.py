"""Embeddings of slides' tiles on disk: each slide is read and encoded once, and training reads what came of it.

A file holds one slide's embeddings, and is named by the digest of all that decides them: the slide's bytes, its
resolution, the places of its tiles, what preprocessing makes of a tile, the encoder, the number format. So another
encoder or tiling makes other files and an old one is never mistaken for them. It is NumPy's own format: one record
for each tile, `position_um` (x, y) and `embedding` (E), which is read through a memory map.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from cadx.files import canonical_json, digest_bytes, replacing
from cadx.loading.slides import Bag, BagDataset, MILDataset
from cadx.types import Digest

_LOG = logging.getLogger(__name__)

_FORM = 1
"""Of the files and their keys: to be raised when either changes, or when a tile's pixels do."""


def encoder_digest(encoder: nn.Module) -> Digest:
    """The digest of a module's parts, weights and buffers: what it makes of a tile is a function of these.

    >>> first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    >>> encoder_digest(first) == encoder_digest(second)
    False
    >>> _ = second.load_state_dict(first.state_dict())
    >>> encoder_digest(first) == encoder_digest(second)
    True
    """
    parts = [repr(encoder)]
    for name, tensor in encoder.state_dict().items():
        data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        parts.append(f"{name} {tensor.dtype} {tuple(tensor.shape)} {digest_bytes(data.data)}")
    return digest_bytes("\n".join(parts).encode())


class EmbeddingCache:
    """The embeddings of slides' tiles, in a folder: a file for each slide, encoder and way of tiling.

    In float16 by default: half of float32 on disk and in what an epoch reads. Its 11 bits round each number by a
    part of 2,048 at most, far less than another scan of the slide changes; what exceeds its 65,504 is refused.
    """

    def __init__(self, folder: Path, *, dtype: Literal["float16", "float32"] = "float16") -> None:
        """Use `folder`, which is made when the first file is written."""
        self.folder = folder
        self.dtype = dtype

    def path(self, dataset: MILDataset, index: int, encoder: Digest) -> Path:
        """Where the embeddings of a dataset's slide lie or will lie: in a folder of that encoder.

        Args:
            dataset: the slides and their tiling.
            index: of the slide in it.
            encoder: digest of what encodes, as `encoder_digest` gives.
        """
        sample = dataset.folder.samples.iloc[dataset.folder.rows([dataset.sample_ids[index]])[0]]
        key = {
            "form": _FORM,
            "slide": sample["sha256"],
            "slide_mpp": sample["slide_mpp"],
            "tile_px": dataset.tile_px,
            "mpp": dataset.mpp,
            # Of the tissue mask and how much of it a tile needs, too.
            "positions_um": digest_bytes(dataset.positions_um(index).tobytes()),
            "preprocessing": dataset.preprocessing.model_dump(mode="json"),
            "encoder": encoder,
            "dtype": self.dtype,
        }
        name = digest_bytes(canonical_json(key).encode()).removeprefix("sha256:")
        return self.folder / encoder.removeprefix("sha256:")[:16] / f"{name}.npy"

    def embed(
        self,
        dataset: MILDataset,
        index: int,
        encode: Callable[[Tensor], Tensor],
        encoder: Digest,
        *,
        batch_size: int = 64,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray:
        """The embeddings of all of a slide's tiles (see `read_embeddings`), made now if there are none yet.

        The slide is streamed: a batch of tiles is in memory at a time. Tiles that cannot be read are left out. The
        file appears whole or not at all; one that cannot be read is made anew.

        Args:
            dataset: the slides and their tiling.
            index: of the slide in it.
            encode: makes vectors, B E, of tiles, B C H W float32, each of its own tile alone: such as
                `DeepMIL.encode` in evaluation mode. It is called without gradients.
            encoder: digest of what `encode` is a function of.
            batch_size: B, at most.
            progress: called with the number of tiles that are done and of all, after each batch.

        Raises:
            ValueError: if none of the tiles can be read, or the embeddings are not finite in this cache's format.
        """
        path = self.path(dataset, index, encoder)
        where = f"sample {dataset.sample_ids[index]!r}"
        if path.exists():
            try:
                return read_embeddings(path)
            except ValueError as error:
                _LOG.warning("%s: embedded anew: %s", where, error)
        num_tiles, num_done = len(dataset.positions_um(index)), 0
        vectors, positions_um = [], []
        with torch.no_grad():
            for tiles, places in dataset.stream(index, batch_size):
                with np.errstate(over="ignore"):  # found below, and told in words
                    vectors.append(encode(tiles).float().cpu().numpy().astype(self.dtype))
                positions_um.append(places.numpy())
                if not np.isfinite(vectors[-1]).all():
                    raise ValueError(
                        f"{where}: an embedding is not finite in {self.dtype}; check the encoder's weights, or use"
                        " float32"
                    )
                num_done += len(places)
                if progress is not None:
                    progress(num_done, num_tiles)
        write_embeddings(path, np.concatenate(vectors), np.concatenate(positions_um))
        return read_embeddings(path)


def write_embeddings(path: Path, embeddings: np.ndarray, positions_um: np.ndarray) -> None:
    """Write embeddings, T E, and their tiles' top left corners (x, y), T 2, whole or not at all."""
    form = [("position_um", "<f8", (2,)), ("embedding", embeddings.dtype, embeddings.shape[1:])]
    records = np.empty(len(embeddings), form)
    records["position_um"] = positions_um
    records["embedding"] = embeddings
    with replacing(path) as partial, partial.open("wb") as stream:
        np.save(stream, records, allow_pickle=False)


def read_embeddings(path: Path) -> np.ndarray:
    """A memory map of T records: `position_um`, 2 float64, and `embedding`, E float16 or float32.

    Only the records that are used are read, and the system may drop them again.

    Raises:
        ValueError: if the file is missing, cut off, or of another form.
    """
    try:
        records = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; embed the slide first") from None
    except (ValueError, EOFError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not whole ({reason}); remove it and embed the slide again") from None
    if records.dtype.names != ("position_um", "embedding") or records.ndim != 1 or not len(records):
        raise ValueError(f"{path}: not embeddings; remove it and embed the slide again")
    return records


class EmbeddingBagDataset(BagDataset):
    """Bags of embedded tiles: (T E float32, positions T 2 in um, K, number), from the files of a cache.

    A file is mapped when its bag is asked for and let go with it: no bag stays in memory, none is kept open.
    """

    def __init__(
        self,
        tiles: MILDataset,
        cache: EmbeddingCache,
        encoder: Digest,
        *,
        max_instances: int | None = None,
        seed: int = 0,
    ) -> None:
        """Choose the samples, those of `tiles`; bag i is its slide i.

        Args:
            tiles: the slides and their tiling, as they were embedded.
            cache: where all of them have been.
            encoder: digest of what embedded them.
            max_instances: most instances of a bag in one epoch, drawn from (seed, epoch, sample); all if None.
            seed: of that draw.

        Raises:
            ValueError: if a slide was not embedded so, or its file is broken; it names the sample.
        """
        super().__init__(tiles.folder, tiles.sample_ids, kind="slide", max_instances=max_instances, seed=seed)
        self._paths: Sequence[Path] = [cache.path(tiles, index, encoder) for index in range(len(tiles))]
        for index in range(len(tiles)):
            self._open(index)

    def __getitem__(self, index: int) -> Bag:
        """One bag, of the chosen epoch.

        Raises:
            ValueError: if its file was broken or removed since.
        """
        records = self._open(index)
        chosen = self._chosen(index, len(records))
        if len(chosen) < len(records):
            records = records[chosen]
        # torch's conversion of float16 is ten times as fast as NumPy's.
        instances = torch.from_numpy(np.ascontiguousarray(records["embedding"])).float()
        positions_um = torch.from_numpy(records["position_um"].copy())
        return Bag(instances, positions_um, self._target(index), index)

    def _open(self, index: int) -> np.ndarray:
        try:
            return read_embeddings(self._paths[index])
        except ValueError as error:
            raise ValueError(f"sample {self.sample_ids[index]!r}: {error}") from None
