"""Image statistics: equal to plain NumPy, in the pixels' own scale, and fast."""

import numpy as np
import pytest
from scipy.stats import entropy

from cadx.drift import STATISTICS, image_statistics


@pytest.fixture(params=[np.uint8, np.uint16], ids=["8 bits", "16 bits"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", [(31, 17), (1, 9), (9, 1), (12, 11, 3), (28, 28)])
def test_statistics_equal_plain_numpy(dtype, shape):
    top = np.iinfo(dtype).max
    rng = np.random.default_rng(sum(shape))
    pixels = np.clip(rng.normal(0.5, 0.4, shape), 0, 1)
    pixels = np.rint(pixels * top).astype(dtype)
    unit = pixels.astype(np.float64) / top
    across = [np.abs(np.diff(unit, axis=axis)).ravel() for axis in (0, 1)]
    bins = np.bincount((pixels.astype(int) // ((top + 1) // 256)).ravel(), minlength=256)
    expected = {
        "mean": unit.mean(),
        "std": unit.std(),
        "p01": np.quantile(unit, 0.01, method="inverted_cdf"),
        "p50": np.quantile(unit, 0.50, method="inverted_cdf"),
        "p99": np.quantile(unit, 0.99, method="inverted_cdf"),
        "entropy_bits": entropy(bins, base=2),
        "sharpness": np.concatenate(across).mean() / unit.std(),
        "dark_fraction": (unit <= 0.02).mean(),
        "bright_fraction": (unit >= 0.98).mean(),
    }
    found = image_statistics(pixels)
    assert tuple(found) == STATISTICS
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-9), name


def test_same_image_at_both_depths_looks_the_same():
    gray = np.random.default_rng(0).integers(0, 256, (40, 40), dtype=np.uint8)
    assert image_statistics(gray) == pytest.approx(image_statistics(gray.astype(np.uint16) * 257))


def test_constant_images_have_no_nan(dtype):
    for value in (0, np.iinfo(dtype).max):
        found = image_statistics(np.full((3, 5), value, dtype))
        assert not any(np.isnan(number) for number in found.values())
        assert found["std"] == found["sharpness"] == found["entropy_bits"] == 0
    assert image_statistics(np.zeros((1, 1), dtype))["dark_fraction"] == 1


def test_blur_and_noise_move_sharpness_but_contrast_does_not():
    rng = np.random.default_rng(1)
    smooth = np.add.outer(np.linspace(40, 120, 64), np.linspace(0, 60, 64))
    sharpness = [
        image_statistics(pixels.astype(np.uint8))["sharpness"]
        for pixels in (smooth, 1.3 * smooth, smooth + rng.normal(0, 15, smooth.shape))
    ]
    assert sharpness[1] == pytest.approx(sharpness[0], rel=0.1)
    assert sharpness[2] > 5 * sharpness[0]


def test_strided_pixels_are_counted_whole():
    pixels = np.random.default_rng(2).integers(0, 256, (20, 20), dtype=np.uint8)
    assert image_statistics(pixels[::2, ::3]) == image_statistics(pixels[::2, ::3].copy())
