"""Bags: the tiles with tissue and no others, where they lie, drawn anew each epoch and never silently none."""

import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from torch.utils.data import DataLoader

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_path
from cadx.loading.slides import Bag, FeatureBagDataset, MILDataset, collate_bags, tissue_fractions
from cadx.reading.slides import summarise_slide
from cadx.transforms import Preprocessing

GLASS, EOSIN = (243, 241, 244), (225, 150, 185)
PREPROCESSING = Preprocessing(channels=3, height_px=64, width_px=64, mean=0.0, std=1.0)
TILE_UM = 32.0  # 64 px of 0.5 um


def section(height_px: int, width_px: int, tissue: tuple[slice, slice]) -> np.ndarray:
    """A slide whose tissue tells where it is: red grows with x, green with y, two gray values a tile."""
    pixels = np.full((height_px, width_px, 3), GLASS, np.uint8)
    y, x = np.mgrid[:height_px, :width_px]
    stained = np.stack([150 + x // 32, 60 + y // 32, np.full_like(x, 150)], axis=2).astype(np.uint8)
    pixels[tissue] = stained[tissue]
    return pixels


def write_slide(path: Path, pixels: np.ndarray, mpp: float | None = 0.5) -> Path:
    per_cm = 1e4 / mpp if mpp else 0
    tifffile.imwrite(
        path,
        pixels,
        tile=(128, 128),
        photometric="rgb",
        compression="deflate",
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
        metadata=None,
    )
    return path


def dataset(folder: Path, kind: str, **more: Any) -> DatasetWriter:
    return DatasetWriter(
        folder,
        name="test",
        kind=kind,  # type: ignore[arg-type]
        task="binary",
        classes=("normal", "tumour"),
        positive="tumour",
        modality="histology",
        clustered=False,
        source=SourceInfo(title="t", licence="CC0", citation="c"),
        **more,
    )


def slide_dataset(folder: Path, slides: dict[str, Path], slide_mpp: float | None = None) -> DatasetFolder:
    with dataset(folder, "slide") as writer:
        for number, (sample_id, path) in enumerate(slides.items()):
            summary = summarise_slide(path, slide_mpp=slide_mpp)
            writer.add(
                Sample(
                    sample_id=sample_id,
                    pixels=summary.thumbnail,
                    tissue=summary.tissue,
                    slide=path,
                    slide_mpp=summary.slide_mpp,
                    spacing_mm=summary.spacing_mm,
                    labels={("normal", "tumour")[number % 2]: 1},
                    patient=f"p{number}",
                    sha256=digest_path(path),
                    statistics={},
                )
            )
    return DatasetFolder(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DatasetFolder:
    """Two slides: tissue of 12 x 8 tiles away from the corner, and of 5 x 5 tiles."""
    path = tmp_path_factory.mktemp("slides")
    return slide_dataset(
        path / "dataset",
        {
            "large": write_slide(path / "a.tiff", section(1000, 1400, np.s_[128:640, 256:1024])),
            "small": write_slide(path / "b.tiff", section(640, 700, np.s_[192:512, 64:384])),
        },
    )


@pytest.fixture
def spoilt(folder: DatasetFolder, tmp_path: Path) -> DatasetFolder:
    """The same, for a test that damages it."""
    shutil.copytree(folder.path, tmp_path / "spoilt")
    return DatasetFolder(tmp_path / "spoilt")


def bags(folder: DatasetFolder, sample_ids: Sequence[str] = ("large", "small"), **options: Any) -> MILDataset:
    return MILDataset(folder, sample_ids, PREPROCESSING, **{"tile_px": 64, "mpp": 0.5, **options})


def places(number: int, x0: int, columns: int, y0: int, rows: int) -> set[tuple[float, float]]:
    found = {(TILE_UM * (x0 + x), TILE_UM * (y0 + y)) for x in range(columns) for y in range(rows)}
    assert len(found) == number
    return found


def test_bag_is_the_tiles_with_tissue(folder: DatasetFolder) -> None:
    mil = bags(folder, max_tiles=None)
    for index, expected in enumerate((places(96, 4, 12, 2, 8), places(25, 1, 5, 3, 5))):
        bag = mil[index]
        assert {(float(x), float(y)) for x, y in bag.positions_um} == expected
        assert bag.instances.shape == (len(expected), 3, 64, 64)
        assert bag.instances.dtype == torch.float32
        assert bag.sample == index
    assert mil[0].target.tolist() == [1, 0]
    assert mil[1].target.tolist() == [0, 1]


def test_each_tile_is_what_lies_at_its_position(folder: DatasetFolder) -> None:
    """A level's coordinates or swapped axes would show tissue from elsewhere."""
    for bag in (bags(folder)[0], bags(folder)[1]):
        for tile, (x_um, y_um) in zip(bag.instances, bag.positions_um.tolist(), strict=True):
            red, green = (tile[:2, 3, 3] * 255).round().int().tolist()
            assert red == 150 + x_um / 0.5 // 32
            assert green == 60 + y_um / 0.5 // 32


def test_tiles_have_the_wanted_resolution_not_the_slides(folder: DatasetFolder) -> None:
    bag = bags(folder, mpp=1.0, max_tiles=None)[0]
    assert {(float(x), float(y)) for x, y in bag.positions_um} == {
        (2 * x, 2 * y) for x, y in places(24, 2, 6, 1, 4)
    }
    step = (bag.instances[:, 0, 5, 60] - bag.instances[:, 0, 5, 3]) * 255
    assert step.round().tolist() == [3] * 24  # four gray values over 128 px of the slide


def test_minimum_tissue_is_a_part_of_the_tile(tmp_path: Path) -> None:
    pixels = section(1024, 1024, np.s_[128:640, 256 + 40 : 1024])  # 24 of 64 px in the first column
    folder = slide_dataset(tmp_path / "d", {"a": write_slide(tmp_path / "a.tiff", pixels)})
    for minimum, columns in ((0.1, 12), (0.3, 12), (0.45, 11), (0.9, 11)):
        assert len(bags(folder, ["a"], minimum_tissue=minimum).positions_um(0)) == columns * 8


def test_draw_is_a_pure_function_of_seed_epoch_and_sample(folder: DatasetFolder) -> None:
    def drawn(mil: MILDataset, index: int, epoch: int) -> list[list[float]]:
        mil.set_epoch(epoch)
        return mil[index].positions_um.tolist()

    mil = bags(folder, max_tiles=10, seed=1)
    first = drawn(mil, 0, 0)
    assert len(first) == 10
    assert len({tuple(place) for place in first}) == 10
    assert drawn(mil, 0, 1) != first
    assert drawn(mil, 0, 0) == first
    assert drawn(bags(folder, ["small", "large"], max_tiles=10, seed=1), 1, 0) == first
    assert drawn(bags(folder, max_tiles=10, seed=2), 0, 0) != first
    seen = [tuple(place) for epoch in range(60) for place in drawn(mil, 0, epoch)]
    assert len(set(seen)) > 90, "all tiles have their turn"


def test_workers_that_live_on_see_the_next_epoch(folder: DatasetFolder) -> None:
    mil = bags(folder, max_tiles=5)
    loader = DataLoader(
        mil,
        batch_size=2,
        num_workers=1,
        persistent_workers=True,
        collate_fn=collate_bags,
        multiprocessing_context="fork",
    )
    expected = []
    for epoch in range(2):
        mil.set_epoch(epoch)
        expected.append(collate_bags([mil[0], mil[1]]))
    for epoch in range(2):
        mil.set_epoch(epoch)
        (batch,) = loader
        assert torch.equal(batch.positions_um, expected[epoch].positions_um)
        assert torch.equal(batch.instances, expected[epoch].instances)
    assert not torch.equal(expected[0].positions_um, expected[1].positions_um)


def test_stream_gives_all_tiles_in_batches(folder: DatasetFolder) -> None:
    mil = bags(folder, max_tiles=None)
    batches = list(mil.stream(0, 40))
    assert [len(tiles) for tiles, _ in batches] == [40, 40, 16]
    whole = mil[0]
    assert torch.equal(torch.cat([tiles for tiles, _ in batches]), whole.instances)
    assert torch.equal(torch.cat([positions for _, positions in batches]), whole.positions_um)


def test_slide_without_tiles_is_named_never_an_empty_bag(tmp_path: Path) -> None:
    slides = {
        "full": write_slide(tmp_path / "a.tiff", section(512, 512, np.s_[0:512, 0:512])),
        "glass": write_slide(tmp_path / "b.tiff", section(512, 512, np.s_[0:0, 0:0])),
        "sliver": write_slide(tmp_path / "c.tiff", section(1400, 512, np.s_[0:1400, 100:168])),
    }
    folder = slide_dataset(tmp_path / "d", slides)
    assert len(bags(folder, ["full"])) == 1
    with pytest.raises(
        ValueError, match=r"sample 'glass': none of its 64 tiles of 32 um has 0\.5 of tissue"
    ) as caught:
        bags(folder, ["full", "glass"])
    assert "\n" not in str(caught.value)
    assert "leave the sample out" in str(caught.value)
    with pytest.raises(ValueError, match=r"'sliver'.*lower minimum_tissue"):
        bags(folder, ["sliver"], minimum_tissue=0.9)
    assert len(bags(folder, ["sliver"], minimum_tissue=0.1)[0].instances) > 0


def test_slide_that_is_too_coarse_is_named(folder: DatasetFolder) -> None:
    with pytest.raises(ValueError, match=r"sample 'large': scanned at 0\.5 um per pixel, too coarse"):
        bags(folder, mpp=0.25)


def test_resolution_from_the_catalogue_holds_in_the_bags(tmp_path: Path) -> None:
    path = write_slide(tmp_path / "a.tiff", section(1000, 1400, np.s_[128:640, 256:1024]), mpp=None)
    folder = slide_dataset(tmp_path / "d", {"a": path}, slide_mpp=0.25)
    positions = bags(folder, ["a"], max_tiles=None, mpp=0.25)[0].positions_um
    assert {(float(x), float(y)) for x, y in positions} == {
        (x / 2, y / 2) for x, y in places(96, 4, 12, 2, 8)
    }


def damage(folder: DatasetFolder, sample_id: str, tiles: Callable[[int], Sequence[int]]) -> None:
    path = folder.slide_path(sample_id)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        spans = [(page.dataoffsets[i], page.databytecounts[i]) for i in tiles(len(page.dataoffsets))]
    with path.open("r+b") as stream:
        for offset, size in spans:
            stream.seek(offset)
            stream.write(b"\xff" * size)


def test_damaged_tiles_are_left_out_with_a_word(
    spoilt: DatasetFolder, caplog: pytest.LogCaptureFixture
) -> None:
    damage(spoilt, "large", lambda _: [11 + 3])  # second row, fourth column of 128 px: four of our tiles
    bag = bags(spoilt, ["large"], max_tiles=None)[0]
    lost = places(4, 6, 2, 2, 2)
    assert {(float(x), float(y)) for x, y in bag.positions_um} == places(96, 4, 12, 2, 8) - lost
    assert len(bag.instances) == 92
    assert "sample 'large': 4 of 96 tiles left out" in caplog.text
    damage(spoilt, "large", range)
    with pytest.raises(ValueError, match="sample 'large': none of its tiles can be read"):
        bags(spoilt, ["large"], max_tiles=None)[0]


def test_missing_slide_is_named(spoilt: DatasetFolder) -> None:
    mil = bags(spoilt)
    spoilt.slide_path("small").unlink()
    assert len(mil[0].instances) > 0
    with pytest.raises(ValueError, match="sample 'small': slide: no such file"):
        mil[1]


def test_open_slides_are_bounded(folder: DatasetFolder) -> None:
    mil = bags(folder, max_open=1, cache_bytes=200_000)
    first = mil[0]
    for _ in range(3):
        for index in (0, 1):
            mil[index]
            assert len(mil._pool._slides) == 1
            assert mil._pool.cache.num_bytes <= 200_000
    assert torch.equal(mil[0].instances, first.instances)


def test_dataset_can_be_sent_to_another_process(folder: DatasetFolder) -> None:
    mil = bags(folder)
    expected = mil[0]
    again = pickle.loads(pickle.dumps(mil))
    assert torch.equal(again[0].instances, expected.instances)


def test_real_slide_gives_tiles_of_tissue(mirror: Path, tmp_path: Path) -> None:
    folder = slide_dataset(tmp_path / "d", {"cmu": mirror / "wsi/cmu-1-small-region.svs"})
    mil = MILDataset(folder, ["cmu"], PREPROCESSING, tile_px=64, mpp=1.0, minimum_tissue=0.9, max_tiles=40)
    bag = mil[0]
    assert bag.instances.shape == (40, 3, 64, 64)
    red, green, blue = bag.instances.mean((0, 2, 3))
    assert green < min(red, blue), "stained with haematoxylin and eosin"


def test_tissue_fractions_are_exact() -> None:
    rng = np.random.default_rng(0)
    tissue = (rng.random((37, 53)) > 0.5).astype(np.uint8)
    tile_um, spacing = 12.0, (2.0, 3.0)  # 6 x 4 px of the mask
    found = tissue_fractions(tissue, spacing, tile_um)
    padded = np.pad(tissue, ((0, 42 - 37), (0, 56 - 53))).astype(float)
    assert np.allclose(found, padded.reshape(7, 6, 14, 4).mean((1, 3)))
    # Tiles that cut pixels, against the mask with each pixel divided into ten by fifteen of 0.2 um.
    fine = np.kron(tissue, np.ones((10, 15)))
    found = tissue_fractions(tissue, spacing, 7.4)
    padded = np.pad(fine, ((0, 0), (0, -fine.shape[1] % 37)))
    assert np.allclose(found, padded.reshape(10, 37, 22, 37).mean((1, 3)))


# --- Features and batches ---------------------------------------------------------------------------


@pytest.fixture
def features(tmp_path: Path) -> DatasetFolder:
    rng = np.random.default_rng(0)
    with dataset(tmp_path / "features", "features") as writer:
        for number, length in enumerate((3, 40)):
            writer.add(
                Sample(
                    sample_id=f"bag{number}",
                    pixels=rng.normal(size=(length, 5)).astype(np.float32),
                    labels={"tumour": 1},
                    patient=f"p{number}",
                    sha256="sha256:" + "0" * 64,  # type: ignore[arg-type]
                    statistics={},
                )
            )
    return DatasetFolder(tmp_path / "features")


def test_feature_bags_are_the_stored_features(features: DatasetFolder) -> None:
    bags = FeatureBagDataset(features, ["bag1", "bag0"])
    assert np.array_equal(bags[0].instances, features.pixels("bag1"))
    assert bags[1].instances.shape == (3, 5)
    assert bags[1].positions_um.isnan().all()
    few = FeatureBagDataset(features, ["bag1", "bag0"], max_instances=7, seed=3)
    rows = {tuple(row) for row in features.pixels("bag1").tolist()}
    drawn = few[0].instances.tolist()
    assert len(drawn) == 7
    assert {tuple(row) for row in drawn} <= rows
    few.set_epoch(1)
    assert few[0].instances.tolist() != drawn
    assert few[1].instances.shape == (3, 5)


def test_kinds_are_not_confused(folder: DatasetFolder, features: DatasetFolder) -> None:
    with pytest.raises(ValueError, match="samples of kind slide; features is needed"):
        FeatureBagDataset(folder, ["large"])
    with pytest.raises(ValueError, match="samples of kind features; slide is needed"):
        bags(features, ["bag0"])
    with pytest.raises(ValueError, match="at most 0 instances"):
        FeatureBagDataset(features, ["bag0"], max_instances=0)
    with pytest.raises(ValueError, match="minimum_tissue"):
        bags(folder, minimum_tissue=0.0)


def test_batches_of_unequal_bags_are_padded_and_masked() -> None:
    made = [
        Bag(
            torch.full((n, 3, 2, 2), float(n)),
            torch.full((n, 2), float(n), dtype=torch.float64),
            torch.tensor([n % 2]),
            n,
        )
        for n in (2, 5, 1)
    ]
    batch = collate_bags(made)
    assert batch.instances.shape == (3, 5, 3, 2, 2)
    assert batch.mask.sum(1).tolist() == [2, 5, 1]
    assert batch.samples.tolist() == [2, 5, 1]
    assert batch.targets.tolist() == [[0], [1], [1]]
    for row, bag in enumerate(made):
        assert torch.equal(batch.instances[row][batch.mask[row]], bag.instances)
        assert torch.equal(batch.positions_um[row][batch.mask[row]], bag.positions_um)
        assert (batch.instances[row][~batch.mask[row]] == 0).all()
        assert batch.positions_um[row][~batch.mask[row]].isnan().all()
