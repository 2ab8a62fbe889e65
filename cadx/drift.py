"""What an image looks like in nine numbers, and how far a batch of images has moved from another."""

import numpy as np

STATISTICS = (
    "mean",
    "std",
    "p01",
    "p50",
    "p99",
    "entropy_bits",
    "sharpness",
    "dark_fraction",
    "bright_fraction",
)
"""Names of the statistics, in the order in which tables hold them."""

_DARK, _BRIGHT = 0.02, 0.98


def image_statistics(pixels: np.ndarray) -> dict[str, float]:
    """The numbers named in `STATISTICS` for H W or H W 3 pixels, uint8 or uint16; never NaN.

    Intensities are in 0..1 of the dtype's range, colour channels pooled. `p01`, `p50`, `p99` are quantiles;
    `entropy_bits` is that of the intensities in 256 bins; `sharpness` the mean absolute difference of
    neighbouring pixels over the standard deviation (0 for a constant image); `dark_fraction` and
    `bright_fraction` count pixels within 2 % of black and white.

    >>> flat = image_statistics(np.full((4, 4), 255, np.uint8))
    >>> flat["mean"], flat["entropy_bits"], flat["bright_fraction"]
    (1.0, 0.0, 1.0)
    """
    assert pixels.dtype in (np.uint8, np.uint16), f"not raw pixels: {pixels.dtype}"
    assert pixels.size, "an image without pixels"
    top = int(np.iinfo(pixels.dtype).max)
    counts = _histogram(pixels)
    share = counts / pixels.size
    levels = np.arange(top + 1) / top
    mean = float(share @ levels)
    std = float(np.sqrt(share @ (levels - mean) ** 2))
    ranks = np.searchsorted(np.cumsum(counts), np.multiply((0.01, 0.5, 0.99), pixels.size))
    bins = share.reshape(256, -1).sum(axis=1)
    occupied = bins[bins > 0]
    numbers = (
        mean,
        std,
        *levels[ranks],
        # + 0.0: the entropy of one level is 0, not -0.
        -(occupied @ np.log2(occupied)) + 0.0,
        _neighbour_difference(pixels) / top / std if std > 0 else 0.0,
        share[levels <= _DARK].sum(),
        share[levels >= _BRIGHT].sum(),
    )
    return {name: float(number) for name, number in zip(STATISTICS, numbers, strict=True)}


def _histogram(pixels: np.ndarray) -> np.ndarray:
    """Pixels per level; of 8-bit pixels two are counted at a time, which halves the work."""
    flat = np.ascontiguousarray(pixels).reshape(-1)
    if pixels.dtype == np.uint16:
        return np.bincount(flat, minlength=1 << 16)
    even = flat.size - flat.size % 2
    pairs = np.bincount(flat[:even].view(np.uint16), minlength=1 << 16).reshape(256, 256)
    counts: np.ndarray = pairs.sum(axis=0) + pairs.sum(axis=1)
    counts[flat[even:]] += 1
    return counts


def _neighbour_difference(pixels: np.ndarray) -> float:
    """Mean absolute difference of pixels that touch, along rows and columns, in levels."""
    total, number = 0, 0
    for one, other in ((pixels[1:], pixels[:-1]), (pixels[:, 1:], pixels[:, :-1])):
        # Maximum minus minimum stays in the unsigned dtype, where a plain difference wraps round.
        total += int((np.maximum(one, other) - np.minimum(one, other)).sum(dtype=np.uint64))
        number += one.size
    return total / number if number else 0.0
