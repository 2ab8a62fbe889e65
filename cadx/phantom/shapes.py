"""Soft shapes and noise, from which anatomy is drawn. Lengths are in the unit of the coordinates given."""

import numpy as np
from PIL import Image

from cadx.phantom.cohort import Array, Range


def rim(distance: Array, width: float) -> Array:
    """0 outside, rising like a chord of a circle to 1 at `width` inside: a rounded body seen edge on.

    >>> rim(np.array([-1.0, 0.0, 0.5, 2.0, 9.0]), 2).tolist()
    [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    return np.sqrt(np.clip(distance / np.float32(width), 0, 1))


def step(distance: Array, width: float) -> Array:
    """A smooth 0 to 1 over `width`.

    >>> step(np.array([-1.0, 1.0, 2.0]), 2).tolist()
    [0.0, 0.5, 1.0]
    """
    t = np.clip(distance / np.float32(width), 0, 1)
    return t * t * (3 - 2 * t)


def bell(distance: Array, width: float) -> Array:
    """Thickness of a rod of half-width `width` across its axis, 0..1.

    >>> bell(np.array([0.0, 2.0, 3.0]), 2).tolist()
    [1.0, 0.0, 0.0]
    """
    return np.sqrt(np.clip(1 - (distance / np.float32(width)) ** 2, 0, 1))


def ellipse(x: Array, y: Array, centre: Range, axes: Range, angle: float = 0.0) -> Array:
    """Thickness of an ellipsoid, 0..1, its first axis turned from x to y by `angle`, in radians.

    >>> ellipse(np.array([0.0, 4.0]), np.array([0.0, 0.0]), (0, 0), (4, 1)).tolist()
    [1.0, 0.0]
    """
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    dx, dy = x - np.float32(centre[0]), y - np.float32(centre[1])
    u, v = (cos * dx + sin * dy) / np.float32(axes[0]), (cos * dy - sin * dx) / np.float32(axes[1])
    return np.sqrt(np.clip(1 - u * u - v * v, 0, 1))


def cloud(
    rng: np.random.Generator, shape: tuple[int, int], cells: int, octaves: int, decay: float = 0.6
) -> Array:
    """Fractal noise of mean 0 and unit variance, H W float32; `cells` across at the coarsest.

    Each octave has twice the cells of the one before, and `decay` times its weight.

    >>> noise = cloud(np.random.default_rng(0), (32, 48), 3, 2)
    >>> noise.shape, round(float(noise.std()), 3)
    ((32, 48), 1.0)
    """
    height, width = shape
    total = np.zeros(shape, dtype=np.float32)
    for octave in range(octaves):
        n = cells * 2**octave
        coarse = rng.standard_normal((n + 1, n + 1), dtype=np.float32)
        total += np.float32(decay**octave) * np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
    total -= total.mean()
    total /= total.std()
    return total


def bounding_box(mask: Array) -> tuple[int, int, int, int]:
    """The smallest half-open (x0, y0, x1, y1) around what is set in `mask`, H W, which is not empty.

    >>> bounding_box(np.array([[0, 0, 0], [0, 1, 1]]))
    (1, 1, 3, 2)
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
