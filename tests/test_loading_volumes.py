"""Patches of volumes: right voxels at the right spacing, negatives kept, nothing read that is not needed."""

import math
import pickle
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_bytes
from cadx.loading.patches import VolumePreprocessing, VolumeSource
from cadx.loading.volumes import GridPatches, Patch3DDataset
from cadx.reading.volumes import read_volume
from cadx.training import TrainingConfig
from cadx.training.volumes import VolumeWorkload
from cadx.training.workload import Draw, Setting

SPACING_MM = (2.5, 0.9, 0.8)
SHAPE_PX = (20, 26, 32)


def voxels_of(number: int, shape: tuple[int, int, int] = SHAPE_PX) -> np.ndarray:
    return np.random.default_rng(number).integers(-1000, 1000, shape).astype(np.int16)


def lesion(shape: tuple[int, int, int] = SHAPE_PX) -> np.ndarray:
    """A mask of 2 x 3 x 2 voxels in a corner that random patches seldom meet."""
    mask = np.zeros(shape, np.uint8)
    mask[1:3, 20:23, 2:4] = 2
    return mask


def write_dataset(
    path: Path, volumes: Sequence[np.ndarray], masks: Sequence[np.ndarray | None] = (), kind: str = "volume"
) -> DatasetFolder:
    with DatasetWriter(
        path, name="noise", task="binary", classes=("none", "nodule"), positive="nodule", modality="CT", kind=kind,
        clustered=False, source=SourceInfo(title="noise", licence="CC0-1.0", citation="none"),
    ) as writer:  # fmt: skip
        for number, voxels in enumerate(volumes):
            mask = masks[number] if number < len(masks) else None
            writer.add(Sample(
                sample_id=f"v{number}", pixels=voxels, labels={"nodule": 1} if mask is not None else {"none": 1},
                patient=f"p{number}", sha256=digest_bytes(voxels.tobytes()), statistics={},
                spacing_mm=SPACING_MM if kind == "volume" else None, mask=mask,
            ))  # fmt: skip
    return DatasetFolder(path)


def patches_of(folder: DatasetFolder, **options: object) -> Patch3DDataset:
    given = {"patches_per_volume": 50, "positive_fraction": 0.5, "seed": 0, **options}
    preprocessing = given.pop(
        "preprocessing", VolumePreprocessing(patch_px=(6, 8, 10), window_hu=(-1000, 1000))
    )
    names = given.pop("sample_ids", folder.samples["sample_id"].tolist())
    return Patch3DDataset(folder, names, preprocessing, **given)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> DatasetFolder:
    return write_dataset(
        tmp_path_factory.mktemp("patches") / "d",
        [voxels_of(0), voxels_of(1), voxels_of(2)],
        [lesion(), None, np.zeros(SHAPE_PX, np.uint8)],
    )


# --- random patches -----------------------------------------------------------------------------------


def test_a_patch_holds_the_voxels_at_its_place_windowed_and_their_mask(folder):
    dataset = patches_of(folder)
    for index in (0, 7, 60, 149):
        patch = dataset[index]
        number = index // 50
        block = tuple(
            slice(start, start + side)
            for start, side in zip(dataset.start_px(index), (6, 8, 10), strict=True)
        )
        assert patch.image.shape == (1, 6, 8, 10)
        assert patch.image.dtype == torch.float32
        np.testing.assert_allclose(patch.image[0], (voxels_of(number)[block] + 1000.0) / 2000, atol=1e-6)
        expected = lesion()[block] if number == 0 else np.zeros((6, 8, 10))
        np.testing.assert_array_equal(patch.mask, expected)
        np.testing.assert_array_equal(patch.labels, [1, 0] if number == 1 else [0, 1])
        assert patch.item == index


def test_axes_are_depth_height_width_from_a_file_whose_axes_are_x_y_z(tmp_path):
    # A loader that calls nibabel's X Y Z by the names D H W cuts 4 x 8 x 16 out of the wrong axes.
    stored = voxels_of(3, (32, 26, 20))
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([0.8, 0.9, 2.5, 1])), tmp_path / "v.nii.gz")
    volume = read_volume(tmp_path / "v.nii.gz")
    folder = write_dataset(tmp_path / "d", [volume.voxels])
    preprocessing = VolumePreprocessing(patch_px=(4, 8, 16), window_hu=(-1000, 1000))
    dataset = patches_of(folder, preprocessing=preprocessing)
    depth, height, width = dataset.start_px(5)
    expected = stored[width : width + 16, height : height + 8, depth : depth + 4].transpose(2, 1, 0)
    np.testing.assert_allclose(dataset[5].image[0] * 2000 - 1000, expected, atol=1e-3)
    assert preprocessing.grid_px(VolumeSource.of_folder(folder, "v0")) == (20, 26, 32)


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_negative_patches_are_kept_at_the_ratio_asked_for(folder, fraction):
    # The lesion fills 12 of 480 voxels: a filter "a tenth must be marked" would leave nothing at all.
    def share_of_positives(asked: float) -> float:
        dataset = patches_of(folder, sample_ids=["v0"], patches_per_volume=1000, positive_fraction=asked)
        return float(np.mean([dataset[index].is_positive.item() for index in range(1000)]))

    by_chance = share_of_positives(0.0)
    assert 0 < by_chance < 0.3
    expected = fraction + (1 - fraction) * by_chance
    assert abs(share_of_positives(fraction) - expected) < 4 * math.sqrt(0.25 / 1000)


def test_volumes_without_mask_or_finding_give_patches_all_the_same(folder):
    dataset = patches_of(folder, positive_fraction=1.0)
    assert all(torch.isnan(dataset[index].is_positive) for index in range(50, 100)), "no mask: unknown"
    assert all(dataset[index].is_positive == 0 for index in range(100, 150)), "an empty mask: negative"
    assert len({dataset.start_px(index) for index in range(100, 150)}) > 40


def test_positive_patches_have_the_lesion_in_their_middle_or_lie_at_the_border(folder):
    dataset = patches_of(folder, sample_ids=["v0"], positive_fraction=1.0, patches_per_volume=200)
    places = {dataset.start_px(index) for index in range(200)}
    # Marked are d 1..2, h 20..22, w 2..3; the patch of 6 x 8 x 10 is kept inside 20 x 26 x 32.
    assert {start[0] for start in places} == {0}
    assert {start[1] for start in places} == {16, 17, 18}
    assert {start[2] for start in places} == {0}


def test_the_middles_do_not_depend_on_how_the_mask_is_cut(tmp_path, monkeypatch):
    mask = np.zeros(SHAPE_PX, np.uint8)
    mask[[3, 11, 12, 19], [4, 5, 25, 0], [7, 31, 0, 9]] = 1
    folder = write_dataset(tmp_path / "d", [voxels_of(0)], [mask])
    preprocessing = VolumePreprocessing(patch_px=(1, 1, 1), window_hu=(-1000, 1000))
    for slab_bytes in (1 << 22, 1):
        monkeypatch.setattr("cadx.loading.patches._SLAB_BYTES", slab_bytes)
        dataset = patches_of(folder, preprocessing=preprocessing, positive_fraction=1.0)
        assert {dataset.start_px(index) for index in range(50)} == set(map(tuple, np.argwhere(mask).tolist()))


def test_every_part_of_the_volume_is_reached(folder):
    dataset = patches_of(folder, sample_ids=["v1"], patches_per_volume=3000, positive_fraction=0.0)
    starts = np.array([dataset.start_px(index) for index in range(3000)])
    assert starts.min(axis=0).tolist() == [0, 0, 0]
    assert starts.max(axis=0).tolist() == [14, 18, 22]


def test_patches_are_a_pure_function_of_seed_epoch_and_index(folder):
    dataset, twin = patches_of(folder), patches_of(folder)
    twin.warm()
    order = np.random.default_rng(0).permutation(len(dataset))
    starts = {int(index): dataset.start_px(int(index)) for index in order}
    assert all(twin.start_px(index) == starts[index] for index in range(len(twin)))
    dataset.set_epoch(1)
    other = [dataset.start_px(index) for index in range(len(dataset))]
    assert sum(start != starts[index] for index, start in enumerate(other)) > 100
    dataset.set_epoch(0)
    assert dataset.start_px(3) == starts[3]
    assert sum(patches_of(folder, seed=1).start_px(index) != starts[index] for index in range(150)) > 100


def test_loader_workers_that_live_on_see_the_next_epoch(folder):
    dataset = patches_of(folder)
    loader = DataLoader(dataset, batch_size=25, num_workers=2, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        for batch in loader:
            for position, item in enumerate(batch.item.tolist()):
                assert torch.equal(batch.image[position], dataset[item].image)
                assert torch.equal(batch.mask[position], dataset[item].mask)


def test_a_dataset_can_be_sent_to_another_process(folder):
    dataset = patches_of(folder)
    copy = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(copy[3].image, dataset[3].image)


def test_only_the_voxels_under_a_patch_are_read_and_never_as_float64(tmp_path):
    volume = voxels_of(0, (64, 200, 200))
    folder = write_dataset(tmp_path / "d", [volume], [np.ones(volume.shape, np.uint8)])
    dataset = patches_of(
        folder, preprocessing=VolumePreprocessing(patch_px=(32, 32, 32), window_hu=(-1000, 1000))
    )
    dataset.warm()
    dataset[0]
    tracemalloc.start()
    for index in range(10):
        dataset[index]
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    patch_bytes = 32**3 * 4
    assert peak_bytes < 5 * patch_bytes < volume.nbytes / 7


def test_the_crop_asked_for_is_the_block_under_the_patch():
    asked = []
    voxels = voxels_of(0)

    def crop(block):
        asked.append(block)
        return voxels[block]

    source = VolumeSource(crop, SHAPE_PX, SPACING_MM)
    VolumePreprocessing(patch_px=(6, 8, 10), window_hu=(0, 1)).apply(source, (3, 2, 1))
    assert asked == [(slice(3, 9), slice(2, 10), slice(1, 11))]
    coarse = VolumePreprocessing(patch_px=(3, 4, 5), spacing_mm=(5.0, 1.8, 1.6), window_hu=(0, 1))
    coarse.apply(source, (3, 2, 1))
    assert math.prod(part.stop - part.start for part in asked[1]) < math.prod((10, 12, 14))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches_per_volume": 0}, "patches_per_volume must be at least 1"),
        ({"positive_fraction": 1.5}, "positive_fraction within 0 to 1"),
        ({"sample_ids": ["v9"]}, "no sample 'v9'"),
    ],
)
def test_wrong_options_are_refused(folder, options, message):
    with pytest.raises(ValueError, match=message):
        patches_of(folder, **options)


def test_a_dataset_of_images_is_refused(tmp_path):
    images = write_dataset(tmp_path / "d", [np.zeros((8, 8), np.uint8)], kind="image")
    with pytest.raises(ValueError, match="of kind image; give a dataset of volumes"):
        patches_of(images)


# --- spacing and intensities --------------------------------------------------------------------------


def smooth(shape: tuple[int, int, int], spacing_mm: Sequence[float]) -> np.ndarray:
    """A function of the place in mm, sampled in the middle of each voxel."""
    depth, height, width = np.meshgrid(
        *((np.arange(side) + 0.5) * mm for side, mm in zip(shape, spacing_mm, strict=True)), indexing="ij"
    )
    return (np.sin(depth / 9) + 0.02 * height + np.cos(width / 7)).astype(np.float32)


@pytest.mark.parametrize("target_mm", [(2.0, 2.0, 2.0), (1.25, 0.9, 1.6), (5.0, 1.0, 0.5)])
def test_patches_come_at_the_spacing_asked_for(target_mm):
    shape, source_mm = (24, 60, 70), (2.5, 0.9, 0.8)
    source = VolumeSource.of_array(smooth(shape, source_mm), source_mm)
    preprocessing = VolumePreprocessing(patch_px=(8, 12, 10), spacing_mm=target_mm, window_hu=(-10, 10))
    grid = preprocessing.grid_px(source)
    for side, wanted, have, size in zip(grid, target_mm, source_mm, shape, strict=True):
        assert 0 <= side * wanted - size * have < wanted
    start = (2, 9, 11)
    patch = preprocessing.apply(source, start)[0].numpy() * 20 - 10
    truth = smooth(grid, target_mm)[tuple(slice(s, s + p) for s, p in zip(start, (8, 12, 10), strict=True))]
    np.testing.assert_allclose(patch, truth, atol=0.04)


def test_finer_grids_equal_scipys_linear_interpolation():
    voxels = voxels_of(4)
    source = VolumeSource.of_array(voxels, (3.0, 2.0, 2.0))
    preprocessing = VolumePreprocessing(
        patch_px=(30, 39, 64), spacing_mm=(2.0, 4 / 3, 1.0), window_hu=(-1000, 1000)
    )
    places = np.meshgrid(
        *(
            (np.arange(side) + 0.5) * ratio - 0.5
            for side, ratio in zip((30, 39, 64), (2 / 3, 2 / 3, 0.5), strict=True)
        ),
        indexing="ij",
    )
    expected = ndimage.map_coordinates(voxels.astype(np.float64), places, order=1, mode="nearest")
    np.testing.assert_allclose(preprocessing.apply(source, (0, 0, 0))[0] * 2000 - 1000, expected, atol=0.01)


def test_a_coarser_grid_averages_and_does_not_pick_single_noisy_voxels():
    noise = np.random.default_rng(0).normal(0, 100, (40, 40, 40)).astype(np.float32)
    source = VolumeSource.of_array(noise, (1.0, 1.0, 1.0))
    patch = VolumePreprocessing(patch_px=(10, 10, 10), spacing_mm=(4, 4, 4), window_hu=(-1000, 1000)).apply(
        source, (0, 0, 0)
    )
    assert float((patch * 2000 - 1000).std()) < 20


def test_a_voxels_value_does_not_depend_on_the_patch_it_was_read_with():
    source = VolumeSource.of_array(voxels_of(5), SPACING_MM)
    options = {"spacing_mm": (1.7, 1.1, 1.3), "window_hu": (-1000, 1000)}
    whole = VolumePreprocessing(patch_px=(30, 22, 20), **options)
    assert whole.grid_px(source) == (30, 22, 20)
    reference = whole.apply(source, (0, 0, 0))
    part = VolumePreprocessing(patch_px=(6, 5, 4), **options)
    for start in ((0, 0, 0), (24, 17, 16), (7, 3, 9)):
        block = tuple(slice(s, s + p) for s, p in zip(start, (6, 5, 4), strict=True))
        assert torch.equal(part.apply(source, start), reference[(slice(None), *block)])


@pytest.mark.parametrize(("num_slices", "slice_mm"), [(5, 2.0), (10, 4.0), (13, 5.0), (7, 0.3), (10, 10 / 3)])
def test_a_grid_ends_where_the_volume_does_or_beyond(num_slices, slice_mm):
    voxels = np.zeros((num_slices, 8, 8), np.float32)
    voxels[-1] = 1
    source = VolumeSource.of_array(voxels, (1.0, 1.0, 1.0))
    options = {"spacing_mm": (slice_mm, 1.0, 1.0), "window_hu": (0, 1)}
    depth_px = VolumePreprocessing(patch_px=(4, 8, 8), **options).grid_px(source)[0]
    assert depth_px == math.ceil(num_slices / slice_mm - 1e-9)
    patch = VolumePreprocessing(patch_px=(depth_px, 8, 8), **options).apply(source, (0, 0, 0))
    assert patch.max() > 0.9 / max(1.0, slice_mm), "the last slice is seen"


@pytest.mark.parametrize("slice_mm", [0.4, 1.0, 1.7, 2.0, 3.0, 5.0])
def test_a_patch_centred_on_a_lesion_of_one_slice_is_positive_at_any_spacing(tmp_path, slice_mm):
    masks = [np.zeros((24, 12, 12), np.uint8) for _ in range(24)]
    for number, mask in enumerate(masks):
        mask[number, 5, 6] = 1
    folder = write_dataset(tmp_path / "d", [voxels_of(0, (24, 12, 12))] * 24, masks)
    own_mm = VolumeSource.of_folder(folder, "v0").spacing_mm
    dataset = patches_of(
        folder,
        preprocessing=VolumePreprocessing(
            patch_px=(3, 3, 3),
            window_hu=(-1000, 1000),
            spacing_mm=(own_mm[0] * slice_mm, own_mm[1] * slice_mm, own_mm[2]),
        ),
        patches_per_volume=1,
        positive_fraction=1.0,
    )
    assert all(patch.is_positive == 1 for patch in (dataset[index] for index in range(24)))


def test_a_patch_beside_a_lesion_is_negative_at_any_spacing():
    mask = np.zeros((24, 12, 12), np.uint8)
    mask[12, 5, 6] = 1
    source = VolumeSource.of_array(mask, (1.0, 1.0, 1.0))
    for slice_mm in (0.5, 1.0, 2.0, 3.0, 4.0):
        made = VolumePreprocessing(patch_px=(1, 12, 12), spacing_mm=(slice_mm, 1, 1))
        starts = range(-2, made.grid_px(source)[0] + 2)
        marked = {start for start in starts if made.marks(source, (start, 0, 0))}
        # The slice lies from 12 to 13 mm.
        assert marked == {int((12 + part) / slice_mm) for part in (0.25, 0.75)}


def test_masks_keep_their_classes_at_any_spacing_and_stay_on_the_image():
    mask = np.zeros(SHAPE_PX, np.uint8)
    mask[4:12, 5:20, 8:25] = 7
    preprocessing = VolumePreprocessing(patch_px=(24, 24, 24), spacing_mm=(2.0, 1.0, 1.0), window_hu=(0, 1))
    marked = preprocessing.apply_to_mask(VolumeSource.of_array(mask, SPACING_MM), (0, 0, 0)).numpy()
    assert set(np.unique(marked)) == {0, 7}
    inside = [
        ((np.arange(24) + 0.5) * wanted_mm >= first * mm) & ((np.arange(24) + 0.5) * wanted_mm < last * mm)
        for first, last, mm, wanted_mm in zip(
            (4, 5, 8), (12, 20, 25), SPACING_MM, (2.0, 1.0, 1.0), strict=True
        )
    ]
    np.testing.assert_array_equal(marked == 7, inside[0][:, None, None] & inside[1][:, None] & inside[2])
    image = preprocessing.apply(VolumeSource.of_array(mask.astype(np.float32) / 7, SPACING_MM), (0, 0, 0))[0]
    # Linear interpolation of the same box: its half-way surface lies within half a voxel.
    assert ndimage.center_of_mass(image.numpy()) == pytest.approx(ndimage.center_of_mass(marked), abs=0.3)


def test_volumes_without_a_scale_get_their_own_mean_and_deviation(folder):
    voxels = (voxels_of(6).astype(np.float32) * 300 + 1.7e6).astype(np.float32)
    source = VolumeSource.of_array(voxels, SPACING_MM)
    moments = source.moments()
    np.testing.assert_allclose(
        moments, (voxels.mean(dtype=np.float64), voxels.std(dtype=np.float64)), rtol=1e-6
    )
    preprocessing = VolumePreprocessing(patch_px=SHAPE_PX)
    patch = preprocessing.apply(source, (0, 0, 0))
    assert abs(float(patch.mean())) < 1e-3
    assert abs(float(patch.std()) - 1) < 1e-3
    assert torch.equal(patch, preprocessing.apply(source, (0, 0, 0), moments))
    blank = VolumeSource.of_array(np.full(SHAPE_PX, 9, np.uint8), SPACING_MM)
    assert not preprocessing.apply(blank, (0, 0, 0)).any()


def test_moments_do_not_depend_on_how_the_volume_is_cut(monkeypatch):
    source = VolumeSource.of_array(voxels_of(7), SPACING_MM)
    whole = source.moments()
    monkeypatch.setattr("cadx.loading.patches._SLAB_BYTES", 1)
    np.testing.assert_allclose(source.moments(), whole, rtol=1e-9)


@pytest.mark.parametrize(
    "options",
    [
        {"patch_px": (0, 8, 8)},
        {"patch_px": (8, 8, 8), "spacing_mm": (1, 0, 1)},
        {"patch_px": (8, 8, 8), "window_hu": (400, -1000)},
        {"patch_px": (8, 8, 8), "window_hu": (0, math.nan)},
        {"patch_px": (8, 8, 8), "channels": 3},
    ],
)
def test_preprocessing_without_meaning_is_refused(options):
    with pytest.raises(ValueError, match=r"must be|channels|finite number"):
        VolumePreprocessing(**options)


@pytest.mark.parametrize(
    ("spacing_mm", "aspect"), [(None, 0.9 / 0.8), ((2.5, 2.0, 1.0), 2.0), ((2.5, 1, 1), 1.0)]
)
def test_training_turns_patches_in_mm(folder, tmp_path, spacing_mm, aspect):
    config = TrainingConfig.model_validate(
        {
            "model": {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
            "preprocessing": {"patch_px": (4, 12, 16), "window_hu": (-1000, 1000), "spacing_mm": spacing_mm},
            "augmentation": {"rotation_degrees": 90},
        }
    )
    ids = folder.samples["sample_id"].tolist()
    workload = VolumeWorkload(Setting(config, folder, ids, ids, 0, torch.device("cpu"), tmp_path))
    batch = workload.collate([workload.train[number] for number in range(len(workload.train))])
    seen = []
    workload.forward(seen.append, batch, Draw(0, 0, batch.items))
    draws = {"seed": 0, "epoch": 0, "samples": batch.items, "background": 0.0}
    expected = config.augmentation.apply(batch.images[:, 0], aspects=[aspect] * len(batch.items), **draws)
    assert torch.equal(seen[0][:, 0], expected)


# --- whole volumes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("patch_px", [(6, 8, 10), (20, 26, 32), (32, 7, 40), (1, 1, 32)])
def test_patches_of_the_identity_give_the_volume_back(patch_px, overlap):
    voxels = voxels_of(8)
    grid = GridPatches(
        VolumeSource.of_array(voxels, SPACING_MM),
        VolumePreprocessing(patch_px=patch_px, window_hu=(-1000, 1000)),
        overlap,
    )
    both = grid.assemble(np.concatenate([patch, 2 * patch]) for patch in map(torch.Tensor.numpy, grid))
    assert both.shape == (2, *SHAPE_PX)
    np.testing.assert_allclose(both[0] * 2000 - 1000, voxels, atol=0.01)
    np.testing.assert_allclose(both[1], 2 * both[0], rtol=1e-6)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.5])
def test_grid_patches_overlap_at_least_as_asked_and_reach_every_border(overlap):
    source = VolumeSource.of_array(np.zeros((50, 33, 64), np.int16), (1, 1, 1))
    grid = GridPatches(source, VolumePreprocessing(patch_px=(16, 16, 16), window_hu=(0, 1)), overlap)
    for axis, side in enumerate((50, 33, 64)):
        starts = sorted({start[axis] for start in grid.starts_px})
        assert (starts[0], starts[-1]) == (0, side - 16)
        assert np.diff(starts).max() <= max(1, 16 * (1 - overlap))


def test_a_volume_smaller_than_a_patch_lies_in_the_middle_of_one():
    source = VolumeSource.of_array(np.ones((4, 5, 6), np.uint8), (1, 1, 1))
    grid = GridPatches(source, VolumePreprocessing(patch_px=(8, 8, 8), window_hu=(0, 1)))
    assert len(grid) == 1
    patch = grid[0][0]
    assert patch.sum() == 4 * 5 * 6
    assert patch[2:6, 2:7, 1:7].all()


def test_a_patch_all_outside_is_empty():
    source = VolumeSource.of_array(np.ones((4, 5, 6), np.uint8), (1, 1, 1))
    preprocessing = VolumePreprocessing(patch_px=(8, 8, 8), window_hu=(0, 1))
    assert not preprocessing.apply(source, (0, 5, 0)).any()
    assert not preprocessing.apply_to_mask(source, (-8, 0, 0)).any()


def test_maps_that_do_not_fit_the_patches_are_refused():
    source = VolumeSource.of_array(voxels_of(0), SPACING_MM)
    grid = GridPatches(source, VolumePreprocessing(patch_px=(16, 16, 16), window_hu=(0, 1)))
    maps = [patch.numpy() for patch in grid]
    for wrong in (maps[:-1], [*maps, maps[0]], [maps[0][:, :-1], *maps[1:]], []):
        with pytest.raises(ValueError, match="give"):
            grid.assemble(wrong)
    with pytest.raises(ValueError, match="overlap 1"):
        GridPatches(source, grid.preprocessing, 1)
