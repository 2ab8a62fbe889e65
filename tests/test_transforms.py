"""Preprocessing, its way back to raw coordinates, and augmentation."""

import math
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from cadx.transforms import Augmentation, Cells, Preprocessing

Fit = Literal["stretch", "pad"]


def noise_image(height_px: int, width_px: int, dtype: Any = np.uint8, *, colour: bool = False) -> np.ndarray:
    shape = (height_px, width_px, 3) if colour else (height_px, width_px)
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


# --- preprocessing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("size", [(1024, 1024), (28, 28), (97, 211), (300, 5)])
def test_resize_agrees_with_torch_antialiasing(dtype: Any, size: tuple[int, int]) -> None:
    pixels = noise_image(*size, dtype)
    found = Preprocessing(height_px=56, width_px=40, fit="stretch", mean=0.4, std=0.2).apply(pixels)
    unit = torch.from_numpy(pixels.astype(np.float64) / np.iinfo(dtype).max)[None, None]
    expected = (F.interpolate(unit, (56, 40), mode="bilinear", antialias=True)[0] - 0.4) / 0.2
    assert (found.dtype, found.shape) == (torch.float32, (1, 56, 40))
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=2e-5)


def test_same_size_only_normalises() -> None:
    pixels = noise_image(28, 28)
    found = Preprocessing(height_px=28, width_px=28, mean=0.5, std=0.25).apply(pixels)
    np.testing.assert_allclose(found[0].numpy(), (pixels / 255 - 0.5) / 0.25, atol=1e-5)


def test_values_are_equal_for_any_number_of_threads() -> None:
    preprocessing = Preprocessing(height_px=224, width_px=224, mean=0.5, std=0.25)
    pixels = noise_image(701, 933, np.uint16)
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            results.append(preprocessing.apply(pixels))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_eight_and_sixteen_bits_mean_the_same() -> None:
    pixels = noise_image(60, 60)
    preprocessing = Preprocessing(height_px=30, width_px=30, mean=0.5, std=0.25)
    torch.testing.assert_close(
        preprocessing.apply(pixels), preprocessing.apply(pixels.astype(np.uint16) * 257), rtol=0, atol=1e-5
    )


@given(gain=st.floats(0.4, 1.0), offset=st.floats(0.0, 0.2), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_by_image_an_exposure_leaves_no_trace(gain: float, offset: float, seed: int) -> None:
    image = np.random.default_rng(seed).uniform(0, 0.75, (40, 30))
    preprocessing = Preprocessing(height_px=32, width_px=32, intensity="image", mean=0.5, std=0.25)
    one, other = (
        preprocessing.apply((values * 65535).round().astype(np.uint16))
        for values in (image, image * gain + offset)
    )
    inside = one[:, :, 4:28]  # 24 of 32 columns; the rest is padding
    assert abs(float(inside.mean())) < 1e-4
    assert float(inside.std(correction=0)) == pytest.approx(1, abs=0.02)
    torch.testing.assert_close(inside, other[:, :, 4:28], rtol=0, atol=0.05)


def test_by_image_a_blank_image_is_finite_and_flat() -> None:
    preprocessing = Preprocessing(height_px=8, width_px=8, intensity="image", mean=0.5, std=0.25)
    for level in (0, 7, 255):
        found = preprocessing.apply(np.full((8, 8), level, np.uint8))
        assert torch.isfinite(found).all()
        assert float(found.abs().max()) < 1e-4


def test_pad_keeps_the_aspect_ratio_and_fills_with_black() -> None:
    pixels = np.full((50, 100), 255, np.uint8)
    preprocessing = Preprocessing(height_px=64, width_px=64, mean=0.5, std=0.25)
    image = preprocessing.apply(pixels)[0]
    assert preprocessing.background == -2
    assert (image[:16] == -2).all()
    assert (image[48:] == -2).all()
    torch.testing.assert_close(image[16:48], torch.full((32, 64), 2.0))


def test_gray_is_repeated_and_colour_becomes_luma() -> None:
    size = {"height_px": 20, "width_px": 20, "mean": 0.0, "std": 1.0}
    gray, colour = noise_image(30, 30), noise_image(30, 30, colour=True)
    three = Preprocessing(channels=3, **size).apply(gray)
    assert three.shape == (3, 20, 20)
    assert torch.equal(three[0], three[2])
    red, green, blue = Preprocessing(channels=3, **size).apply(colour)
    torch.testing.assert_close(
        Preprocessing(**size).apply(colour)[0], 0.299 * red + 0.587 * green + 0.114 * blue, rtol=0, atol=1e-5
    )
    # A gray image stored as colour is the same image.
    torch.testing.assert_close(
        Preprocessing(**size).apply(np.repeat(gray[..., None], 3, axis=2)),
        Preprocessing(**size).apply(gray),
        rtol=0,
        atol=1e-6,
    )


def test_the_raw_pixels_are_left_alone() -> None:
    pixels = noise_image(28, 28)
    before = pixels.copy()
    pixels.flags.writeable = False
    Preprocessing(height_px=28, width_px=28, mean=0.5, std=0.25).apply(pixels)
    np.testing.assert_array_equal(pixels, before)


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4), np.uint8)]
)
def test_other_pixels_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels: "):
        Preprocessing(height_px=8, width_px=8, mean=0.5, std=0.25).apply(pixels)


@pytest.mark.parametrize(
    "change", [{"channels": 2}, {"std": 0.0}, {"height_px": 0}, {"fit": "crop"}, {"size": 3}]
)
def test_impossible_preprocessing_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocessing.model_validate({"height_px": 8, "width_px": 8, "mean": 0.5, "std": 0.25} | change)


# --- back to raw coordinates -------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    raw_height_px=st.integers(90, 301),
    raw_width_px=st.integers(90, 301),
    at=st.tuples(st.floats(0.1, 0.9), st.floats(0.1, 0.9)),
    fit=st.sampled_from(["stretch", "pad"]),
    size_px=st.sampled_from([(56, 56), (64, 48), (112, 56)]),
    stride_px=st.sampled_from([4, 8]),
)
def test_a_marked_spot_is_found_again_within_half_a_cell(
    raw_height_px: int,
    raw_width_px: int,
    at: tuple[float, float],
    fit: Fit,
    size_px: tuple[int, int],
    stride_px: int,
) -> None:
    """Preprocess an image with one bright spot, pool it to a grid as a network does, and go back."""
    preprocessing = Preprocessing(height_px=size_px[0], width_px=size_px[1], fit=fit, mean=0.0, std=1.0)
    row, column = int(at[0] * raw_height_px), int(at[1] * raw_width_px)
    pixels = np.zeros((raw_height_px, raw_width_px), np.uint8)
    pixels[row - 1 : row + 2, column - 1 : column + 2] = 255
    grid = F.avg_pool2d(preprocessing.apply(pixels)[None], stride_px)[0, 0].numpy()
    back = preprocessing.to_raw(grid, raw_height_px, raw_width_px, Cells(stride_px, stride_px / 2))
    assert (back.dtype, back.shape) == (np.float32, (raw_height_px, raw_width_px))
    place = preprocessing.placement(raw_height_px, raw_width_px)
    half_height_px = stride_px * raw_height_px / place.height_px / 2
    half_width_px = stride_px * raw_width_px / place.width_px / 2
    # The peak is a plateau where two cells share the spot, and where the map is held at the border.
    rows, columns = np.nonzero(back >= back.max() * (1 - 1e-6))
    slack_px = 0.5 * max(raw_height_px / place.height_px, raw_width_px / place.width_px) + 2
    assert np.abs(rows - row).min() <= half_height_px + slack_px
    assert np.abs(columns - column).min() <= half_width_px + slack_px


@pytest.mark.parametrize("fit", ["stretch", "pad"])
def test_the_way_back_is_exact_to_a_tenth_of_a_pixel(fit: Fit) -> None:
    """A ramp in raw coordinates, seen by an ideal grid, comes back as that ramp inside of the border."""
    preprocessing = Preprocessing(height_px=64, width_px=96, fit=fit, mean=0.0, std=1.0)
    height_px, width_px = 201, 333
    place = preprocessing.placement(height_px, width_px)
    rows = ((np.arange(8) + 0.5) * 8 - place.top_px) * height_px / place.height_px - 0.5
    columns = ((np.arange(12) + 0.5) * 8 - place.left_px) * width_px / place.width_px - 0.5
    for grid, expected, axis in (
        (np.repeat(rows[:, None], 12, axis=1), np.arange(height_px), 0),
        (np.repeat(columns[None], 8, axis=0), np.arange(width_px), 1),
    ):
        back = preprocessing.to_raw(grid, height_px, width_px, Cells(8, 4)).mean(axis=1 - axis)
        inside = slice(30, -30)
        np.testing.assert_allclose(back[inside], expected[inside], atol=0.1)


def test_a_map_over_padding_is_cut_off() -> None:
    preprocessing = Preprocessing(height_px=64, width_px=64, mean=0.0, std=1.0)
    grid = np.zeros((8, 8), np.float32)
    grid[0] = 1  # in the padding above a wide image
    assert preprocessing.to_raw(grid, 100, 200, Cells(8, 4)).max() == 0


def test_a_constant_map_stays_constant() -> None:
    preprocessing = Preprocessing(height_px=64, width_px=64, mean=0.0, std=1.0)
    back = preprocessing.to_raw(np.full((1, 1), 0.25), 31, 77, Cells(64, 32))
    assert back.shape == (31, 77)
    assert (back == 0.25).all()


# --- augmentation ------------------------------------------------------------------------------------

STRONG = Augmentation(
    horizontal_flip=True,
    rotation_degrees=15,
    translation_fraction=0.1,
    scale_fraction=0.1,
    brightness=0.2,
    contrast=0.2,
    noise_std=0.05,
)
BACKGROUND = -2.0


def batch_of(number: int, height_px: int = 61, width_px: int = 47) -> torch.Tensor:
    return torch.randn((number, 1, height_px, width_px), generator=torch.Generator().manual_seed(0))


def augmented(
    config: Augmentation, batch: torch.Tensor, samples: list[int], *, seed: int = 1, epoch: int = 2
) -> torch.Tensor:
    return config.apply(batch, seed=seed, epoch=epoch, samples=samples, background=BACKGROUND)


@pytest.fixture
def threads() -> Iterator[None]:
    number = torch.get_num_threads()
    yield
    torch.set_num_threads(number)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("size_px", [(61, 47), (56, 56), (224, 224)])
def test_a_sample_is_changed_alike_alone_and_in_any_batch(size_px: tuple[int, int]) -> None:
    batch = batch_of(9, *size_px)
    samples = [40, 3, 77, 12, 5, 1000, 0, 8, 2**40]
    together = augmented(STRONG, batch, samples)
    for number in (1, 4):
        torch.set_num_threads(number)
        for row, sample in enumerate(samples):
            assert torch.equal(augmented(STRONG, batch[row : row + 1], [sample])[0], together[row])
        order = [4, 2, 7, 0, 8]
        assert torch.equal(augmented(STRONG, batch[order], [samples[row] for row in order]), together[order])
        assert torch.equal(augmented(STRONG, batch, samples), together)


def test_seed_epoch_and_sample_each_change_the_draw() -> None:
    batch = batch_of(1)
    first = augmented(STRONG, batch, [5])
    assert torch.equal(first, augmented(STRONG, batch, [5]))
    for other in (
        augmented(STRONG, batch, [6]),
        augmented(STRONG, batch, [5], seed=3),
        augmented(STRONG, batch, [5], epoch=3),
        augmented(STRONG, batch, [5], seed=2, epoch=1),
    ):
        assert not torch.equal(first, other)


def test_samples_may_come_as_a_tensor() -> None:
    batch = batch_of(3)
    found = STRONG.apply(batch, seed=1, epoch=2, samples=torch.tensor([4, 5, 6]), background=BACKGROUND)
    assert torch.equal(found, augmented(STRONG, batch, [4, 5, 6]))


def test_augmentation_ignores_and_leaves_the_global_random_state() -> None:
    batch = batch_of(2)
    torch.manual_seed(0)
    first = augmented(STRONG, batch, [0, 1])
    state = torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(augmented(STRONG, batch, [0, 1]), first)
    torch.manual_seed(0)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_augmentation_is_free() -> None:
    batch = batch_of(2)
    assert augmented(Augmentation(), batch, [0, 1]) is batch


def test_the_batch_itself_is_left_alone() -> None:
    batch = batch_of(4)
    before = batch.clone()
    augmented(STRONG, batch, [0, 1, 2, 3])
    assert torch.equal(batch, before)


@pytest.mark.parametrize(
    ("name", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2), ("depth_flip", 1)]
)
def test_half_of_the_images_are_mirrored_exactly(name: str, axis: int) -> None:
    batch = batch_of(400, 6, 5).view(200, 2, 6, 5).repeat(2, 1, 1, 1)
    found = augmented(Augmentation(**{name: True}), batch, list(range(400)))
    mirrored = (found == batch.flip(axis)).flatten(1).all(1)
    kept = (found == batch).flatten(1).all(1)
    assert (mirrored ^ kept).all()
    assert 160 < mirrored.sum() < 240


def test_switching_one_change_on_leaves_the_other_draws() -> None:
    batch = batch_of(50)
    samples = list(range(50))
    alone = augmented(Augmentation(horizontal_flip=True), batch, samples)
    with_contrast = augmented(Augmentation(horizontal_flip=True, contrast=0.5), batch, samples)
    ratio = with_contrast / alone
    torch.testing.assert_close(ratio, ratio[:, :1, :1, :1].expand_as(ratio))


def spot_images(number: int, *, row: int, column: int, height_px: int, width_px: int) -> torch.Tensor:
    images = torch.full((number, 1, height_px, width_px), BACKGROUND)
    images[:, :, row - 2 : row + 3, column - 2 : column + 3] = 1.0
    return images


def centres(images: torch.Tensor) -> np.ndarray:
    """Centre of brightness of each image, (x, y) in pixels from the image's centre."""
    mass = (images - BACKGROUND)[:, 0].double()
    height_px, width_px = mass.shape[1:]
    x = torch.arange(width_px) - (width_px - 1) / 2
    y = torch.arange(height_px) - (height_px - 1) / 2
    total = mass.sum((1, 2))
    return torch.stack(((mass * x).sum((1, 2)) / total, (mass * y[:, None]).sum((1, 2)) / total), 1).numpy()


def test_rotation_is_rigid_on_a_canvas_that_is_not_square() -> None:
    images = spot_images(200, row=30, column=90, height_px=101, width_px=151)
    before = centres(images[:1])[0]
    after = centres(augmented(Augmentation(rotation_degrees=20), images, list(range(200))))
    radius = np.hypot(*before)
    np.testing.assert_allclose(np.hypot(after[:, 0], after[:, 1]), radius, atol=0.15)
    turn = np.degrees(np.arctan2(after[:, 1], after[:, 0]) - math.atan2(before[1], before[0]))
    assert np.abs(turn).max() <= 20.5
    assert turn.max() > 15
    assert turn.min() < -15
    assert abs(turn.mean()) < 3


def test_rotation_is_rigid_in_mm_where_pixels_are_not_square() -> None:
    images = spot_images(200, row=30, column=90, height_px=101, width_px=151)
    samples, aspects = list(range(200)), [0.5, 2.0] * 100
    draws = {"seed": 1, "epoch": 2, "background": BACKGROUND}
    turned = Augmentation(rotation_degrees=20).apply(images, samples=samples, aspects=aspects, **draws)
    before, after = centres(images[:1]), centres(turned)
    before, after = (xy * np.stack([np.ones(200), aspects], 1) for xy in (before, after))
    np.testing.assert_allclose(np.hypot(*after.T), np.hypot(*before.T), atol=0.3)
    turn = np.degrees(np.arctan2(*after.T[::-1]) - np.arctan2(*before.T[::-1]))
    assert np.abs(turn).max() <= 20.5
    assert np.abs(turn).max() > 15
    square = STRONG.apply(images, samples=samples, aspects=[1.0] * 200, **draws)
    assert torch.equal(square, augmented(STRONG, images, samples))


def test_translation_and_scale_keep_to_their_limits() -> None:
    images = spot_images(200, row=50, column=75, height_px=101, width_px=151)
    moved = centres(augmented(Augmentation(translation_fraction=0.1), images, list(range(200))))
    assert np.abs(moved).max(axis=0) == pytest.approx([15.1, 10.1], abs=0.6)
    images = spot_images(200, row=30, column=100, height_px=101, width_px=151)
    radius = np.hypot(*centres(images[:1])[0])
    scaled = centres(augmented(Augmentation(scale_fraction=0.2), images, list(range(200))))
    factors = np.hypot(scaled[:, 0], scaled[:, 1]) / radius
    assert [factors.min(), factors.max()] == pytest.approx([0.8, 1.2], abs=0.02)


def test_what_comes_in_from_outside_is_background() -> None:
    batch = torch.full((50, 1, 40, 40), 3.0)
    found = augmented(Augmentation(translation_fraction=0.5), batch, list(range(50)))
    assert [found.min(), found.max()] == pytest.approx([BACKGROUND, 3])
    edges = torch.cat([found[:, :, 0], found[:, :, -1], found[..., 0], found[..., -1]], dim=-1)
    assert (edges.amin(-1) == BACKGROUND).all(), "every image was moved, so that an edge shows the outside"


def test_brightness_contrast_and_noise_keep_to_their_limits() -> None:
    batch = torch.ones((500, 1, 3, 3))
    samples = list(range(500))
    shift = augmented(Augmentation(brightness=0.3), batch, samples)[:, 0, 0, 0] - 1
    factor = augmented(Augmentation(contrast=0.3), batch, samples)[:, 0, 0, 0]
    for values in (shift, factor - 1):
        assert [values.min(), values.max()] == pytest.approx([-0.3, 0.3], abs=0.01)
        assert abs(values.mean()) < 0.03
    noise = augmented(Augmentation(noise_std=0.5), torch.zeros((4, 1, 100, 100)), [0, 1, 2, 3])
    assert noise.std() == pytest.approx(0.5, abs=0.01)
    assert abs(torch.corrcoef(noise.flatten(1))[0, 1]) < 0.05


@pytest.mark.parametrize("change", [{"rotation_degrees": -1}, {"contrast": 1.0}, {"sideways_flip": True}])
def test_impossible_augmentation_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Augmentation.model_validate(change)


@pytest.mark.gpu
def test_an_accelerator_changes_a_sample_alike_alone_and_in_a_batch() -> None:
    batch = batch_of(9, 224, 224).cuda()
    together = augmented(STRONG, batch, list(range(9)))
    for row in range(9):
        assert torch.equal(augmented(STRONG, batch[row : row + 1], [row])[0], together[row])
    geometry = STRONG.model_copy(update={"noise_std": 0.0})  # only noise is drawn on the device
    torch.testing.assert_close(
        augmented(geometry, batch, list(range(9))).cpu(),
        augmented(geometry, batch.cpu(), list(range(9))),
        rtol=0,
        atol=2e-3,
    )
