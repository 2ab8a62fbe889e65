"""Images with boxes: pixels and boxes stay together through fitting, cropping, augmentation, tiles and back."""

import pickle
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.detection import calculate_map
from cadx.files import digest_bytes
from cadx.loading.boxes import (
    BoxDataset,
    Region,
    View,
    augment_boxes,
    collate_boxes,
    crop_input,
    image_moments,
    merge_tiles,
    tile_grid,
    to_raw,
)
from cadx.mining import MinedBox, MinedNegatives
from cadx.models.interface import Detections
from cadx.transforms import Augmentation, Preprocessing

CLASSES = ("mass", "cluster")
UNIT = Preprocessing(height_px=64, width_px=64, mean=0.0, std=1.0)
Box = tuple[str, float, float, float, float]


def picture(height_px: int, width_px: int, boxes: Sequence[Box], dtype: Any = np.uint8) -> np.ndarray:
    """White exactly in the boxes, black elsewhere."""
    pixels = np.zeros((height_px, width_px), dtype)
    for _, x0, y0, x1, y1 in boxes:
        pixels[int(y0) : int(y1), int(x0) : int(x1)] = np.iinfo(dtype).max
    return pixels


SAMPLES: dict[str, tuple[np.ndarray, list[Box]]] = {
    "one": (picture(120, 200, [("mass", 30, 40, 42, 50)]), [("mass", 30, 40, 42, 50)]),
    "none": (picture(150, 150, []), []),
    "two": (
        picture(90, 70, [("cluster", 10, 12, 18, 20), ("mass", 40, 60, 56, 72)], np.uint16),
        [("cluster", 10, 12, 18, 20), ("mass", 40, 60, 56, 72)],
    ),
}


def write(path: Path, samples: dict[str, tuple[np.ndarray, list[Box]]], **options: Any) -> DatasetFolder:
    spacing_mm = options.pop("spacing_mm", (0.2, 0.1))
    with DatasetWriter(
        path, name="boxes", task="detection", classes=CLASSES, positive=None, modality="drawing",
        clustered=False, source=SourceInfo(title="drawn", licence="CC0-1.0", citation="none"),
    ) as writer:  # fmt: skip
        for name, (pixels, boxes) in samples.items():
            writer.add(Sample(
                sample_id=name, pixels=pixels, labels={}, patient=name, sha256=digest_bytes(pixels.tobytes()),
                statistics={}, boxes=boxes, spacing_mm=spacing_mm,
            ))  # fmt: skip
    return DatasetFolder(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DatasetFolder:
    return write(tmp_path_factory.mktemp("boxes") / "d", SAMPLES)


def dataset(folder: DatasetFolder, **options: Any) -> BoxDataset:
    given = {"seed": 0, **options}
    names = given.pop("sample_ids", list(SAMPLES))
    return BoxDataset(folder, names, given.pop("preprocessing", UNIT), **given)


def bounds(plane: torch.Tensor) -> list[int]:
    """Half-open box of what is white."""
    rows, columns = (torch.nonzero((plane > 0.5).any(dim=axis)).flatten() for axis in (1, 0))
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


def target(*boxes: Sequence[float], labels: Sequence[int] | None = None, scores: Any = None) -> Detections:
    return Detections(
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(labels if labels is not None else [0] * len(boxes), dtype=torch.int64),
        torch.tensor(scores if scores is not None else [1.0] * len(boxes)),
    )


# --- Whole images -------------------------------------------------------------------------------------


@pytest.mark.parametrize("fit", ["pad", "stretch"])
def test_boxes_go_where_the_preprocessing_puts_their_pixels(folder: DatasetFolder, fit: Any) -> None:
    items = dataset(folder, preprocessing=UNIT.model_copy(update={"fit": fit, "height_px": 96}))
    for index, name in enumerate(["one", "none", "two"]):
        item = items[index]
        assert item.image.shape == (1, 96, 64)
        assert len(item.target.boxes_xyxy) == len(SAMPLES[name][1])
        for box in item.target.boxes_xyxy.tolist():
            x0, y0, x1, y1 = (round(edge) for edge in box)
            assert item.image[0, y0:y1, x0:x1].mean() > 0.6
    assert items[2].target.labels.tolist() == [1, 0]
    assert items[2].target.scores.tolist() == [1, 1]
    assert items[1].target.boxes_xyxy.shape == (0, 4)


def test_at_its_own_size_a_box_is_that_of_the_white_pixels(folder: DatasetFolder) -> None:
    items = dataset(
        folder, sample_ids=["one"], preprocessing=UNIT.model_copy(update={"height_px": 120, "width_px": 200})
    )
    assert items[0].target.boxes_xyxy.tolist() == [bounds(items[0].image[0])] == [[30, 40, 42, 50]]


def test_batches_hold_images_with_and_without_boxes(folder: DatasetFolder) -> None:
    (batch,) = DataLoader(dataset(folder, cache_mb=1), batch_size=3, collate_fn=collate_boxes)
    assert batch.images.shape == (3, 1, 64, 64)
    assert [len(found.labels) for found in batch.targets] == [1, 0, 2]
    assert batch.items.tolist() == [0, 1, 2]


sizes = st.integers(1, 2000)


@settings(max_examples=200, deadline=None)
@given(
    st.tuples(sizes, sizes),
    st.tuples(sizes, sizes),
    st.sampled_from(["pad", "stretch"]),
    st.lists(st.tuples(*[st.floats(0, 1)] * 4), max_size=4),
)
def test_stored_pixels_come_back_exactly(
    image_px: tuple[int, int], input_px: tuple[int, int], fit: Any, corners: list[tuple[float, ...]]
) -> None:
    preprocessing = UNIT.model_copy(update={"height_px": input_px[0], "width_px": input_px[1], "fit": fit})
    boxes = torch.tensor(corners, dtype=torch.float64).reshape(-1, 2, 2).sort(dim=1)[0].reshape(-1, 4)
    boxes = boxes * torch.tensor([*image_px[::-1]] * 2)
    for view in (
        View.of_image(preprocessing, image_px),
        View.of_region(Region(-3, 7, 20, 31), input_px, image_px),
    ):
        moved = view.to_input(boxes)
        torch.testing.assert_close(view.to_stored(moved), boxes, rtol=0, atol=1e-6)
        kept = (boxes[:, 2:] - boxes[:, :2] > 1e-3).all(dim=1)
        answer = Detections(moved[kept], torch.arange(len(boxes))[kept], torch.ones(len(boxes))[kept])
        torch.testing.assert_close(to_raw(answer, view).boxes_xyxy, boxes[kept], rtol=0, atol=1e-6)


def test_an_answer_is_clipped_to_the_image_and_loses_what_lies_in_the_padding() -> None:
    view = View.of_image(UNIT, (32, 64))  # 16 rows of padding above and below
    answer = target([-4, 20, 10, 60], [5, 0, 20, 10], scores=[0.5, 0.9])
    raw = to_raw(answer, view)
    assert raw.boxes_xyxy.tolist() == [[0, 4, 10, 32]]
    assert raw.scores.tolist() == [0.5]


# --- Crops --------------------------------------------------------------------------------------------


def test_a_crop_shows_the_image_at_its_own_scale_with_its_boxes(folder: DatasetFolder) -> None:
    items = dataset(folder, crop_px=(48, 64), crops_per_image=40, positive_fraction=0.6)
    assert len(items) == 120
    for index in range(len(items)):
        name = list(SAMPLES)[index // 40]
        pixels, boxes = SAMPLES[name]
        item, view = items[index], items.view(index)
        top, left, height, width = view.region
        whole = torch.from_numpy(pixels.astype(np.float32) / np.iinfo(pixels.dtype).max)
        assert torch.allclose(item.image[0], whole[top : top + height, left : left + width], atol=1e-6)
        full = [
            box
            for box in boxes
            if left <= box[1] and top <= box[2] and box[3] <= left + width and box[4] <= top + height
        ]
        inside = item.target.boxes_xyxy.tolist()
        for _, x0, y0, x1, y1 in full:
            assert [x0 - left, y0 - top, x1 - left, y1 - top] in inside


def test_images_without_boxes_are_as_frequent_and_crops_miss_lesions_as_asked(folder: DatasetFolder) -> None:
    def share(positive_fraction: float) -> float:
        items = dataset(
            folder,
            sample_ids=["one", "none"],
            crop_px=(20, 20),
            crops_per_image=300,
            positive_fraction=positive_fraction,
        )
        shown = [len(items[index].target.labels) > 0 for index in range(600)]
        assert not any(shown[300:])
        return float(np.mean(shown[:300]))

    assert share(1.0) == 1
    assert share(0.0) < 0.1
    assert share(0.5) == pytest.approx(0.5, abs=0.1)


def test_a_lesion_lies_anywhere_in_its_crop(folder: DatasetFolder) -> None:
    items = dataset(folder, sample_ids=["one"], crop_px=(32, 32), crops_per_image=300, positive_fraction=1.0)
    boxes = torch.cat([items[index].target.boxes_xyxy for index in range(300)])
    assert torch.equal(boxes[:, 2] - boxes[:, 0], torch.full((300,), 12.0))
    left = boxes[:, 0]
    assert (left.min(), left.max()) == (0, 20)
    assert torch.histc(left, 3, 0, 21).min() > 60


def test_crops_are_shown_around_mined_false_positives(folder: DatasetFolder) -> None:
    mined = MinedNegatives()
    mined.add("none", [MinedBox(100, 110, 112, 120, 0.9)])
    items = dataset(
        folder, crop_px=(30, 30), crops_per_image=200, positive_fraction=0.4, mined=mined, mined_fraction=0.6
    )
    regions = [items.view(index).region for index in range(200, 400)]
    shown = [top <= 110 and top + 30 >= 120 and left <= 100 and left + 30 >= 112 for top, left, *_ in regions]
    assert np.mean(shown) == pytest.approx(0.6, abs=0.12)
    assert len({region for region, hit in zip(regions, shown, strict=True) if hit}) > 20


def test_a_cut_box_is_clipped_or_dropped_by_what_is_left_of_it(tmp_path: Path) -> None:
    boxes: list[Box] = [("mass", 0, 20, 40, 24)]
    small = write(tmp_path / "d", {"a": (picture(60, 60, boxes), boxes)})
    items = dataset(
        small, sample_ids=["a"], crop_px=(30, 50), crops_per_image=200, positive_fraction=0, seed=1
    )
    seen = set()
    for index in range(200):
        top, left = items.view(index).region[:2]
        visible = (40 - left) * max(0, min(top + 30, 24) - max(top, 20)) / 160
        found = items[index].target.boxes_xyxy
        seen.add((visible >= 0.5, visible == 1))
        assert len(found) == (visible >= 0.5)
        if len(found):
            assert found[0].tolist() == bounds(items[index].image[0])
    assert len(seen) == 3
    # A lesion larger than the crop fills it: there is no more of it to see.
    inside = dataset(small, sample_ids=["a"], crop_px=(30, 10), positive_fraction=1.0)[0]
    assert inside.target.boxes_xyxy[0, [0, 2]].tolist() == [0, 10]


def test_an_image_smaller_than_the_crop_lies_in_the_middle_of_black(folder: DatasetFolder) -> None:
    preprocessing = UNIT.model_copy(update={"mean": 0.5, "std": 0.25})
    items = dataset(folder, sample_ids=["two"], preprocessing=preprocessing, crop_px=(100, 100))
    item = items[0]
    assert items.view(0).region == (-5, -15, 100, 100)
    assert item.image[0, :5].eq(preprocessing.background).all()
    assert item.target.boxes_xyxy.tolist() == [[25, 17, 33, 25], [55, 65, 71, 77]]
    assert item.image[0, 17:25, 25:33].eq(2).all()


def test_crops_at_a_given_spacing_show_the_same_millimetres(folder: DatasetFolder) -> None:
    items = dataset(
        folder, sample_ids=["one"], crop_px=(40, 40), spacing_mm=(0.4, 0.1), positive_fraction=1.0
    )
    assert items.view(0).region[2:] == (80, 40)
    (box,) = items[0].target.boxes_xyxy.tolist()
    assert (box[2] - box[0], box[3] - box[1]) == (12, 5)
    assert items[0].image[0].sum() == pytest.approx(60, rel=0.05)


def test_a_crop_has_the_intensities_of_its_image(folder: DatasetFolder, tmp_path: Path) -> None:
    """Each crop by its own mean and deviation would make noise of a blank one."""
    rng = np.random.default_rng(0)
    colour = rng.integers(0, 255, (50, 40, 3)).astype(np.uint8)
    colour[:, :20] = 90
    boxes: list[Box] = [("mass", 25, 5, 35, 15)]
    noisy = write(tmp_path / "d", {"a": (colour, boxes)})
    for channels in (1, 3):
        by_image = Preprocessing(channels=channels, height_px=50, width_px=40, intensity="image")
        whole = by_image.apply(colour)
        items = dataset(noisy, sample_ids=["a"], preprocessing=by_image, crop_px=(20, 15), crops_per_image=20)
        for index in range(20):
            top, left, height, width = items.view(index).region
            expected = whole[:, top : top + height, left : left + width]
            torch.testing.assert_close(items[index].image, expected, rtol=0, atol=1e-5)
        view = View.of_region(Region(3, 2, 20, 15), (20, 15), (50, 40))
        given_moments = crop_input(colour.__getitem__, view, by_image, image_moments(colour, by_image))
        assert torch.equal(given_moments, crop_input(colour.__getitem__, view, by_image))


def test_crops_depend_on_seed_epoch_and_index_alone_in_workers_too(folder: DatasetFolder) -> None:
    options = {"crop_px": (24, 24), "crops_per_image": 4}
    items = dataset(folder, **options)
    loader = DataLoader(items, batch_size=3, num_workers=2, persistent_workers=True, collate_fn=collate_boxes)

    def epoch(number: int) -> torch.Tensor:
        items.set_epoch(number)
        return torch.cat([batch.images for batch in loader])

    first, second = epoch(0), epoch(1)
    assert not torch.equal(first, second)
    alone = dataset(folder, **options)
    assert torch.equal(first, torch.stack([alone[index].image for index in range(12)]))
    pickled = pickle.loads(pickle.dumps(items))
    assert torch.equal(second, torch.stack([pickled[index].image for index in range(12)]))
    other = dataset(folder, **options, seed=1)
    assert not torch.equal(first, torch.stack([other[index].image for index in range(12)]))
    assert torch.equal(epoch(0), first)


def test_what_cannot_be_loaded_is_refused_in_one_line(folder: DatasetFolder, tmp_path: Path) -> None:
    blank = picture(30, 30, [])
    with pytest.raises(ValueError, match=r"boxes.parquet is empty; give a dataset with boxes"):
        dataset(write(tmp_path / "empty", {"a": (blank, [])}), sample_ids=["a"])
    odd = write(
        tmp_path / "odd", {"a": (blank, [("cyst", 0, 0, 5, 5)]), "b": (blank, [("mass", 0, 0, 5, 5)])}
    )
    with pytest.raises(ValueError, match=r"class 'cyst' is none of mass, cluster"):
        dataset(odd, sample_ids=["a"])
    assert len(dataset(odd, sample_ids=["b"])[0].target.labels) == 1
    unknown = write(tmp_path / "unknown", {"a": (blank, [("mass", 0, 0, 5, 5)])}, spacing_mm=None)
    with pytest.raises(ValueError, match=r"the spacing of sample 'a' is unknown"):
        dataset(unknown, sample_ids=["a"], crop_px=(8, 8), spacing_mm=(0.1, 0.1))
    for options, message in (
        ({"crops_per_image": 2}, "set crop_px"),
        ({"crop_px": (0, 8)}, "crop_px"),
        ({"crop_px": (8, 8), "positive_fraction": 1.5}, "positive_fraction"),
        ({"sample_ids": ["z"]}, "no sample 'z'"),
    ):
        with pytest.raises(ValueError, match=message):
            dataset(folder, **options)
    with pytest.raises(IndexError):
        dataset(folder)[3]


def test_boxes_beyond_their_image_are_clipped_and_empty_ones_left_out(tmp_path: Path) -> None:
    boxes: list[Box] = [("mass", -5, 2, 8, 9), ("mass", 40, 0, 50, 5), ("mass", 3, 3, 3, 9)]
    odd = write(tmp_path / "d", {"a": (picture(30, 30, []), boxes)})
    items = dataset(
        odd, sample_ids=["a"], preprocessing=UNIT.model_copy(update={"height_px": 30, "width_px": 30})
    )
    assert items[0].target.boxes_xyxy.tolist() == [[0, 2, 8, 9]]


# --- Augmentation -------------------------------------------------------------------------------------


def drawn(number: int) -> tuple[torch.Tensor, list[Detections]]:
    """So many images with one white rectangle each."""
    rng = np.random.default_rng(4)
    images, targets = torch.zeros(number, 1, 60, 80), []
    for image in images:
        x0, y0 = int(rng.integers(20, 50)), int(rng.integers(18, 30))
        box = [x0, y0, x0 + int(rng.integers(4, 12)), y0 + int(rng.integers(4, 12))]
        image[0, box[1] : box[3], box[0] : box[2]] = 1
        targets.append(target(box))
    return images, targets


def augmented(
    images: torch.Tensor, targets: list[Detections], change: Augmentation, **options: Any
) -> tuple[torch.Tensor, list[Detections]]:
    given = {"seed": 0, "epoch": 0, "samples": range(len(images)), "background": 0.0, **options}
    return augment_boxes(images, targets, change, **given)


def test_a_flipped_rectangle_keeps_its_box_to_the_pixel() -> None:
    images, targets = drawn(32)
    flipped, boxes = augmented(images, targets, Augmentation(horizontal_flip=True, vertical_flip=True))
    for image, found in zip(flipped, boxes, strict=True):
        assert found.boxes_xyxy.tolist() == [bounds(image[0])]
    kinds = {
        tuple(torch.equal(image, before.flip(axes)) for axes in ((-1,), (-2,), (-1, -2)))
        for image, before in zip(flipped, images, strict=True)
    }
    assert len(kinds) == 4  # left as it was, mirrored, turned, both


def test_a_moved_rectangle_keeps_a_tight_box() -> None:
    images, targets = drawn(24)
    change = Augmentation(
        horizontal_flip=True, vertical_flip=True, translation_fraction=0.1, scale_fraction=0.2
    )
    moved, boxes = augmented(images, targets, change)
    x, y = torch.arange(80) + 0.5, torch.arange(60) + 0.5
    for image, found in zip(moved, boxes, strict=True):
        x0, y0, x1, y1 = found.boxes_xyxy[0].tolist()
        mass = image[0].sum()
        # Interpolation blurs edges by up to a pixel, but moves no weight.
        assert ((image[0].sum(0) * x).sum() / mass).item() == pytest.approx((x0 + x1) / 2, abs=0.1)
        assert ((image[0].sum(1) * y).sum() / mass).item() == pytest.approx((y0 + y1) / 2, abs=0.1)
        assert mass.item() == pytest.approx((x1 - x0) * (y1 - y0), rel=0.08)
    assert not any(torch.equal(a.boxes_xyxy, b.boxes_xyxy) for a, b in zip(boxes, targets, strict=True))


def test_augmentation_is_that_of_images_and_independent_of_the_batch() -> None:
    images, targets = drawn(6)
    change = Augmentation(
        horizontal_flip=True, vertical_flip=True, translation_fraction=0.1, brightness=0.2, noise_std=0.1
    )
    together, boxes = augmented(images, targets, change, epoch=3)
    for number in range(6):
        alone, own = augmented(
            images[number : number + 1],
            targets[number : number + 1],
            change,
            epoch=3,
            samples=[number],
        )
        assert torch.equal(alone[0], together[number])
        assert torch.equal(own[0].boxes_xyxy, boxes[number].boxes_xyxy)
    plain = change.apply(images, seed=0, epoch=3, samples=range(6), background=0.0)
    assert torch.equal(together, plain)


def test_a_box_that_leaves_the_image_is_dropped_with_its_label() -> None:
    images = torch.zeros(40, 1, 50, 50)
    targets = [target([0, 20, 10, 30], [20, 20, 30, 30], labels=[1, 0])] * 40
    _, boxes = augmented(images, targets, Augmentation(translation_fraction=0.4))
    assert {len(found.labels) for found in boxes} >= {1, 2}
    for found in boxes:
        assert len(found.labels) == len(found.boxes_xyxy) == len(found.scores)
        assert (found.boxes_xyxy >= 0).all()
        assert (found.boxes_xyxy <= 50).all()
        sides = found.boxes_xyxy[:, 2:] - found.boxes_xyxy[:, :2]
        assert (sides.prod(dim=1) >= 50).all()


def test_nothing_to_change_changes_nothing_and_rotation_is_refused() -> None:
    images, targets = drawn(3)
    same, boxes = augmented(images, targets, Augmentation())
    assert torch.equal(same, images)
    assert all(torch.equal(a.boxes_xyxy, b.boxes_xyxy) for a, b in zip(boxes, targets, strict=True))
    with pytest.raises(ValueError, match=r"augmentation.rotation_degrees"):
        augmented(images, targets, Augmentation(rotation_degrees=5))


# --- Tiles --------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 120), st.data())
def test_tiles_cover_an_image_with_the_overlap_that_was_asked_for(
    height_px: int, width_px: int, side_px: int, data: st.DataObject
) -> None:
    overlap_px = data.draw(st.integers(0, side_px - 1))
    if side_px - overlap_px < 4 and max(height_px, width_px) > 100:
        overlap_px = max(0, side_px - 4)  # tens of thousands of tiles show no more
    tiles = tile_grid(height_px, width_px, (side_px, side_px), overlap_px)
    covered = np.zeros((height_px, width_px), bool)
    for top, left, height, width in tiles:
        covered[max(top, 0) : top + height, max(left, 0) : left + width] = True
        assert (height, width) == (side_px, side_px)
        if width_px >= side_px:
            assert 0 <= left <= width_px - side_px
    assert covered.all()
    for starts, whole_px in (
        (sorted({tile.top_px for tile in tiles}), height_px),
        (sorted({tile.left_px for tile in tiles}), width_px),
    ):
        assert all(b - a <= side_px - overlap_px for a, b in pairwise(starts))
        fewest = max(0, -(-(whole_px - side_px) // (side_px - overlap_px))) + 1
        assert len(starts) == fewest


def seen(
    lesions: Detections, image_px: tuple[int, int], tile_px: int, overlap_px: int, scale: int = 1
) -> tuple[list[Detections], list[View]]:
    """What a perfect detector says of each tile: the visible part of every lesion, however small."""
    tiles = tile_grid(*image_px, (tile_px, tile_px), overlap_px)
    views = [View.of_region(tile, (tile_px * scale, tile_px * scale), image_px) for tile in tiles]
    answers = []
    for view in views:
        boxes = view.to_input(lesions.boxes_xyxy).clamp(0, tile_px * scale)
        kept = ((boxes[:, 2:] - boxes[:, :2]) > 0).all(dim=1)
        answers.append(Detections(boxes[kept].float(), lesions.labels[kept], lesions.scores[kept]))
    return answers, views


@pytest.mark.parametrize("overlap_px", [0, 6, 16, 40])
@pytest.mark.parametrize("scale", [1, 2])
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6))
def test_a_lesion_on_a_seam_is_found_once(overlap_px: int, scale: int, seed: int) -> None:
    """Wherever it lies, in whichever tiles: its box is the lesion's, and the only one there."""
    rng = np.random.default_rng(seed)
    centres = [(x, y) for x in (35, 105, 170) for y in (30, 100, 165)]
    rows = [
        [x - rng.integers(5, 25), y - rng.integers(5, 25), x + rng.integers(5, 25), y + rng.integers(5, 25)]
        for x, y in np.array(centres) + rng.integers(-5, 6, (9, 2))
    ]
    lesions = target(
        *rows, labels=rng.integers(0, 2, 9).tolist(), scores=(rng.permutation(9) / 10 + 0.1).tolist()
    )
    answers, views = seen(lesions, (200, 210), 64, overlap_px, scale)
    merged = merge_tiles(answers, views)
    assert len(merged.labels) == 9
    order = lesions.scores.argsort(descending=True)
    torch.testing.assert_close(merged.boxes_xyxy.float(), lesions.boxes_xyxy[order], rtol=0, atol=1e-3)
    assert torch.equal(merged.labels, lesions.labels[order])
    assert torch.equal(merged.scores, lesions.scores[order])


def test_a_part_seen_with_more_confidence_gives_the_whole_its_score() -> None:
    views = [View.of_region(Region(0, left, 64, 64), (64, 64), (64, 100)) for left in (0, 36)]
    # x 50..70: cut at 64 in the first tile, whole in the second.
    merged = merge_tiles(
        [target([50, 10, 64, 30], scores=[0.9]), target([14, 10, 34, 30], scores=[0.6])], views
    )
    assert merged.boxes_xyxy.tolist() == [[50, 10, 70, 30]]
    assert merged.scores.tolist() == pytest.approx([0.9])
    # A doubtful box is no reason to give up a sure one, nor is one of another class.
    for whole in (target([14, 10, 34, 30], scores=[0.1]), target([14, 10, 34, 30], labels=[1], scores=[0.6])):
        kept = merge_tiles([target([50, 10, 64, 30], scores=[0.9]), whole], views)
        assert kept.boxes_xyxy[0].tolist() == [50, 10, 64, 30]


def test_neighbours_and_other_classes_stay_apart() -> None:
    views = [View.of_region(Region(0, left, 64, 64), (64, 64), (64, 108)) for left in (0, 44)]
    # Two lesions in the shared strip 44..64: one is cut by the first tile's edge, the other by the second's.
    first = target([40, 5, 56, 25], [58, 30, 64, 50], scores=[0.8, 0.7])
    second = target([0, 5, 12, 25], [14, 30, 26, 50], scores=[0.6, 0.9])
    merged = merge_tiles([first, second], views)
    assert merged.boxes_xyxy.tolist() == [[58, 30, 70, 50], [40, 5, 56, 25]]
    both = merge_tiles(
        [target([10, 10, 20, 20], [10, 10, 20, 20], labels=[0, 1], scores=[0.9, 0.8])], views[:1]
    )
    assert both.labels.tolist() == [0, 1]


def test_tiles_without_an_answer_give_no_boxes() -> None:
    views = [View.of_region(Region(0, 0, 64, 64), (64, 64), (64, 64))]
    merged = merge_tiles([target()], views)
    assert merged.boxes_xyxy.shape == (0, 4)
    assert (merged.labels.dtype, merged.scores.dtype) == (torch.int64, torch.float32)
    assert len(merge_tiles([], []).labels) == 0


def test_a_perfect_detector_on_tiles_has_an_average_precision_of_one(folder: DatasetFolder) -> None:
    rows = []
    for name, (pixels, boxes) in SAMPLES.items():
        labels = [CLASSES.index(box[0]) for box in boxes]
        lesions = target(*(box[1:] for box in boxes), labels=labels, scores=[0.9] * len(boxes))
        merged = merge_tiles(*seen(lesions, pixels.shape[:2], 32, 8))
        for box, label, score in zip(*(values.tolist() for values in merged), strict=True):
            rows.append((name, CLASSES[label], *box, score))
    table = pd.DataFrame(rows, columns=["sample_id", "class", "x0", "y0", "x1", "y1", "score"])
    values = calculate_map(table, folder.boxes, list(SAMPLES), classes=CLASSES)
    assert (values["mass"]["ap"], values["cluster"]["ap"]) == (1, 1)


def test_an_overlap_as_wide_as_a_tile_is_refused() -> None:
    with pytest.raises(ValueError, match="overlap_px 32 must be at least 0 and below"):
        tile_grid(100, 100, (32, 64), 32)
