"""Embeddings of tiles on disk: made once, never stale, never half written, and read as bags."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_loading_slides import PREPROCESSING, bags, damage, section, slide_dataset, write_slide
from torch import Tensor
from torch.utils.data import DataLoader

from cadx.datasets import DatasetFolder
from cadx.files import digest_bytes
from cadx.loading.embeddings import (
    EmbeddingBagDataset,
    EmbeddingCache,
    encoder_digest,
    read_embeddings,
    write_embeddings,
)
from cadx.loading.slides import MILDataset, collate_bags
from cadx.models.slide import EncoderConfig, MILConfig

ENCODER = digest_bytes(b"an encoder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DatasetFolder:
    """Two slides: tissue of 6 x 4 tiles, and of 5 x 5 tiles."""
    path = tmp_path_factory.mktemp("slides")
    return slide_dataset(
        path / "dataset",
        {
            "large": write_slide(path / "a.tiff", section(640, 700, np.s_[128:384, 192:576])),
            "small": write_slide(path / "b.tiff", section(640, 700, np.s_[192:512, 64:384])),
        },
    )


@pytest.fixture
def cache(tmp_path: Path) -> EmbeddingCache:
    return EmbeddingCache(tmp_path / "cache")


def encode(tiles: Tensor) -> Tensor:
    """Four numbers of a tile that tell where it is."""
    return torch.stack([tiles.mean((1, 2, 3)), *tiles[:, :, 3, 3].unbind(1)], 1)


def never(tiles: Tensor) -> Tensor:
    raise AssertionError("a tile was encoded again")


class Counted:
    """`encode`, and how many tiles it was given."""

    num_tiles = 0

    def __call__(self, tiles: Tensor) -> Tensor:
        self.num_tiles += len(tiles)
        return encode(tiles)


def test_embeddings_are_those_of_the_tiles_at_their_positions(
    folder: DatasetFolder, cache: EmbeddingCache
) -> None:
    tiles = bags(folder, max_tiles=None)
    seen: list[tuple[int, int]] = []
    for index, number in enumerate((24, 25)):
        seen.clear()
        records = cache.embed(
            tiles, index, encode, ENCODER, batch_size=10, progress=lambda *n: seen.append(n)
        )
        bag = tiles[index]
        assert isinstance(records, np.memmap)
        assert records["embedding"].dtype == np.float16
        np.testing.assert_array_equal(records["position_um"], bag.positions_um)
        np.testing.assert_array_equal(records["embedding"], encode(bag.instances).numpy().astype(np.float16))
        assert seen[-1] == (number, number)
        assert [done for done, _ in seen] == [*range(10, number, 10), number]


def test_a_second_run_reads_nothing_of_the_slide(
    folder: DatasetFolder, cache: EmbeddingCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = cache.embed(bags(folder), 0, encode, ENCODER)
    again = bags(folder, ["large"], max_tiles=5)  # how many an epoch draws does not matter
    monkeypatch.setattr(MILDataset, "_open", never)
    np.testing.assert_array_equal(cache.embed(again, 0, never, ENCODER), first)


def test_whatever_decides_the_values_makes_another_file(folder: DatasetFolder, cache: EmbeddingCache) -> None:
    tiles = bags(folder)
    other: list[tuple[EmbeddingCache, MILDataset, int, Any]] = [
        (cache, tiles, 0, ENCODER),
        (cache, tiles, 1, ENCODER),
        (cache, tiles, 0, digest_bytes(b"another encoder")),
        (EmbeddingCache(cache.folder, dtype="float32"), tiles, 0, ENCODER),
        (cache, bags(folder, tile_px=32), 0, ENCODER),
        (cache, bags(folder, mpp=1.0), 0, ENCODER),
        (cache, bags(folder, tile_px=32, mpp=1.0), 0, ENCODER),
    ]
    for change in ({"mean": 0.5}, {"std": 0.5}, {"intensity": "image"}, {"height_px": 32}):
        made = PREPROCESSING.model_copy(update=change)
        other.append((cache, MILDataset(folder, ["large"], made, tile_px=64, mpp=0.5), 0, ENCODER))
    paths = {made.path(dataset, index, encoder) for made, dataset, index, encoder in other}
    assert len(paths) == len(other)
    assert cache.path(bags(folder, ["small"]), 0, ENCODER) == cache.path(tiles, 1, ENCODER)


def test_another_tissue_or_resolution_makes_another_file(tmp_path: Path, cache: EmbeddingCache) -> None:
    """The bytes of the slide are the same: what a dataset says of it is not."""
    path = write_slide(tmp_path / "a.tiff", section(1000, 1400, np.s_[128:640, 296:1024]), mpp=None)
    paths = set()
    for number, slide_mpp in enumerate((0.25, 0.5)):
        folder = slide_dataset(tmp_path / str(number), {"a": path}, slide_mpp=slide_mpp)
        for minimum_tissue in (0.3, 0.9):
            tiles = bags(folder, ["a"], minimum_tissue=minimum_tissue)
            paths.add(cache.path(tiles, 0, ENCODER))
    assert len(paths) == 4


@pytest.mark.parametrize(
    "break_it",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-5]),
        lambda path: path.write_bytes(path.read_bytes()[:20]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"rubbish" * 100),
        lambda path: np.save(path, np.zeros((24, 4), np.float16)),
        lambda path: np.save(path, np.array([{}], object), allow_pickle=True),
    ],
)
def test_a_broken_file_is_made_anew(
    break_it: Callable[[Path], object],
    folder: DatasetFolder,
    cache: EmbeddingCache,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiles = bags(folder, ["large"])
    first = np.array(cache.embed(tiles, 0, encode, ENCODER))
    break_it(cache.path(tiles, 0, ENCODER))
    with pytest.raises(ValueError, match=r"^sample 'large': [^\n]*embed the slide again$"):
        EmbeddingBagDataset(tiles, cache, ENCODER)
    counted = Counted()
    np.testing.assert_array_equal(cache.embed(tiles, 0, counted, ENCODER), first)
    assert counted.num_tiles == 24
    assert "sample 'large': embedded anew" in caplog.text


def test_a_run_that_dies_leaves_no_file(folder: DatasetFolder, cache: EmbeddingCache) -> None:
    calls: list[int] = []

    def dying(tiles: Tensor) -> Tensor:
        calls.append(len(tiles))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(tiles)

    tiles = bags(folder)
    with pytest.raises(KeyboardInterrupt):
        cache.embed(tiles, 0, dying, ENCODER, batch_size=10)
    assert not list(cache.folder.rglob("*.npy"))
    assert len(cache.embed(tiles, 0, encode, ENCODER)) == 24


def test_tiles_that_cannot_be_read_are_left_out(tmp_path: Path, cache: EmbeddingCache) -> None:
    path = write_slide(tmp_path / "a.tiff", section(640, 700, np.s_[128:384, 192:576]))
    folder = slide_dataset(tmp_path / "d", {"a": path})
    damage(folder, "a", lambda _: [6 + 2])  # second row, third column of 128 px: four of our tiles
    tiles = bags(folder, ["a"], max_tiles=None)
    records = cache.embed(tiles, 0, encode, ENCODER)
    assert len(records) == 20
    np.testing.assert_array_equal(records["position_um"], tiles[0].positions_um)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e5])
def test_what_the_format_cannot_hold_is_refused(
    value: float, folder: DatasetFolder, cache: EmbeddingCache
) -> None:
    with pytest.raises(ValueError, match=r"^sample 'small': an embedding is not finite in float16; [^\n]*$"):
        cache.embed(bags(folder), 1, lambda tiles: encode(tiles) * 0 + value, ENCODER)
    assert not list(cache.folder.rglob("*.npy"))
    if value == 1e5:
        whole = EmbeddingCache(cache.folder, dtype="float32")
        records = whole.embed(bags(folder), 1, lambda tiles: encode(tiles) * 0 + value, ENCODER)
        assert (records["embedding"] == np.float32(1e5)).all()


def test_bags_are_the_embeddings_drawn_anew_each_epoch(folder: DatasetFolder, cache: EmbeddingCache) -> None:
    tiles = bags(folder, ["small", "large"], max_tiles=None)
    for index in range(2):
        cache.embed(tiles, index, encode, ENCODER)
    whole = EmbeddingBagDataset(tiles, cache, ENCODER)
    for index in range(2):
        ours, theirs = whole[index], tiles[index]
        assert ours.instances.dtype == torch.float32
        assert torch.equal(ours.positions_um, theirs.positions_um)
        assert torch.equal(ours.instances, encode(theirs.instances).half().float())
        assert torch.equal(ours.target, theirs.target)
        assert ours.sample == index
    few = EmbeddingBagDataset(tiles, cache, ENCODER, max_instances=5, seed=1)
    draws = []
    for epoch in (0, 1, 0):
        few.set_epoch(epoch)
        bag = few[1]
        draws.append(bag.positions_um.tolist())
        rows = {tuple(row): number for number, row in enumerate(whole[1].positions_um.tolist())}
        chosen = [rows[tuple(row)] for row in draws[-1]]
        assert len(set(chosen)) == 5
        assert torch.equal(bag.instances, whole[1].instances[chosen])
    assert draws[0] == draws[2] != draws[1]
    # The same draw as of the tiles themselves.
    same = bags(folder, ["small", "large"], max_tiles=5, seed=1)
    assert same[1].positions_um.tolist() == draws[0]


def test_bags_reach_a_worker_without_their_contents(folder: DatasetFolder, cache: EmbeddingCache) -> None:
    tiles = bags(folder)
    for index in range(2):
        cache.embed(tiles, index, encode, ENCODER)
    dataset = EmbeddingBagDataset(tiles, cache, ENCODER)
    loader = DataLoader(
        dataset, batch_size=2, num_workers=1, collate_fn=collate_bags, multiprocessing_context="fork"
    )
    (batch,) = loader
    assert torch.equal(batch.instances, collate_bags([dataset[0], dataset[1]]).instances)
    assert torch.equal(pickle.loads(pickle.dumps(dataset))[0].instances, dataset[0].instances)


def test_a_slide_that_was_not_embedded_so_is_named(folder: DatasetFolder, cache: EmbeddingCache) -> None:
    tiles = bags(folder)
    cache.embed(tiles, 0, encode, ENCODER)
    with pytest.raises(ValueError, match=r"^sample 'small': [^\n]*no such file; embed the slide first$"):
        EmbeddingBagDataset(tiles, cache, ENCODER)


def test_a_file_is_little_more_than_its_numbers_and_is_mapped(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    write_embeddings(path, np.zeros((1000, 512), np.float16), np.zeros((1000, 2)))
    assert 1000 * (2 * 512 + 2 * 8) < path.stat().st_size < 1000 * (2 * 512 + 2 * 8) + 512
    records = read_embeddings(path)
    assert isinstance(records, np.memmap)
    assert not records.flags.writeable


def test_digest_of_an_encoder_is_of_its_weights_buffers_and_parts() -> None:
    def built(**fields: Any) -> torch.nn.Module:
        torch.manual_seed(0)
        encoder = MILConfig(encoder=EncoderConfig(width=0.125, **fields)).build(2, 3).encoder
        assert encoder is not None
        return encoder

    digest = encoder_digest(built())
    assert encoder_digest(built()) == digest
    assert encoder_digest(built(stem="small")) != digest
    for name in ("backbone.layer4.1.conv2.weight", "backbone.bn1.running_mean"):
        changed = built()
        changed.state_dict()[name].view(-1)[-1] += 1e-3
        assert encoder_digest(changed) != digest
    # A part without weights decides too.
    first, second = torch.nn.Sequential(torch.nn.ReLU()), torch.nn.Sequential(torch.nn.Tanh())
    assert encoder_digest(first) != encoder_digest(second)


def test_a_network_answers_from_the_cache_as_from_the_tiles(
    folder: DatasetFolder, cache: EmbeddingCache
) -> None:
    torch.manual_seed(0)
    network = MILConfig(
        hidden_dim=16, attention_dim=8, encoder=EncoderConfig(width=0.125, stem="small")
    ).build(2, 3)
    network.eval()
    assert network.encoder is not None
    encoder = encoder_digest(network.encoder)
    tiles = bags(folder, ["small"], max_tiles=None)
    cache.embed(tiles, 0, network.encode, encoder)
    embedded = collate_bags([EmbeddingBagDataset(tiles, cache, encoder)[0]])
    whole = collate_bags([tiles[0]])
    ours, theirs = (network(batch.instances, batch.mask) for batch in (embedded, whole))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=2e-3, atol=2e-3)
