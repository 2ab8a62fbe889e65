"""What happens to pixels before a network sees them: preprocessing as data, and augmentation.

Invariants: preprocessing is one image at a time, in one thread and without any processor-dependent
kernel, so that training, evaluation and serving compute equal values; an augmentation is a pure function
of (seed, epoch, sample), whatever the batch, its order and the number of loader workers.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
from PIL import Image
from pydantic import Field, field_validator

from cadx.types import Config, check_pixels

if TYPE_CHECKING:  # importing torch takes two seconds, and a description needs none
    import torch

# Rec. 601 luma. Source: ITU-R BT.601-7, section 2.5.1.
_LUMA = (np.float32(0.299), np.float32(0.587), np.float32(0.114))


FLAT = 1e-3
"""Added to an image's own standard deviation, in units of the full range: a blank image stays blank."""


_LEAST_COVER = 1e-6  # of a pixel: less is rounding, not a tile


class Placement(NamedTuple):
    """Where a resized image lies on the canvas, in canvas pixels."""

    top_px: int
    left_px: int
    height_px: int
    width_px: int


class Cells(NamedTuple):
    """Where the cells of a network's map are centred in its input, along either axis: first + i * stride.

    In pixels from the input's edge: the centre of its first pixel is 0.5.
    """

    stride_px: float
    first_centre_px: float


class Preprocessing(Config):
    """How raw pixels become a network's input: part of the bundle, the same in training and serving."""

    channels: int = Field(default=1, description="1 (colour becomes luma) or 3 (gray is repeated)")
    height_px: int = Field(ge=1)
    width_px: int = Field(ge=1)
    fit: Literal["stretch", "pad", "tile"] = Field(
        default="pad",
        description="pad keeps the aspect ratio and fills with black; stretch does not; tile keeps the scale and "
        "looks at the image in overlapping tiles: for boxes that would be lost if a large image were made small",
    )
    intensity: Literal["range", "image"] = Field(
        default="range",
        description="range keeps what an exposure makes of a tissue; image undoes each image's own brightness "
        "and contrast, by its mean and standard deviation in place of those below",
    )
    mean: float = Field(default=0.5, description="subtracted, in units of the full range 0..1")
    std: float = Field(default=0.25, gt=0, description="divided by, in units of the full range 0..1")

    @field_validator("channels")
    @classmethod
    def _known_channels(cls, channels: int) -> int:
        if channels not in (1, 3):
            raise ValueError(f"{channels} channels are not supported; set 1 (gray) or 3 (colour)")
        return channels

    @property
    def background(self) -> float:
        """The value of a black raw pixel after normalisation (with `intensity: image`, a typical one)."""
        return (0.0 - self.mean) / self.std

    def placement(self, raw_height_px: int, raw_width_px: int) -> Placement:
        """Where a raw image of this size lies on the canvas after resizing.

        >>> Preprocessing(height_px=224, width_px=224, mean=0.5, std=0.25).placement(512, 1024)
        Placement(top_px=56, left_px=0, height_px=112, width_px=224)
        """
        if self.fit == "stretch":
            return Placement(0, 0, self.height_px, self.width_px)
        scale = min(self.height_px / raw_height_px, self.width_px / raw_width_px)
        height_px = min(self.height_px, max(1, round(raw_height_px * scale)))
        width_px = min(self.width_px, max(1, round(raw_width_px * scale)))
        top_px, left_px = (self.height_px - height_px) // 2, (self.width_px - width_px) // 2
        return Placement(top_px, left_px, height_px, width_px)

    def apply(self, pixels: np.ndarray) -> "torch.Tensor":
        """The network's input, C H W float32, from raw pixels H W or H W 3 (uint8 or uint16, black = 0).

        The resize is bilinear with antialiasing, pixel centres at half-integers.

        Raises:
            ValueError: if the pixels have another shape or dtype.
        """
        import torch

        check_pixels(pixels)
        place = self.placement(*pixels.shape[:2])
        if pixels.ndim == 2:
            planes = [pixels.astype(np.float32)]
        else:
            planes = [pixels[..., channel].astype(np.float32) for channel in range(3)]
            if self.channels == 1:
                red, green, blue = (weight * plane for weight, plane in zip(_LUMA, planes, strict=True))
                planes = [red + green + blue]
        canvas = np.zeros((self.channels, self.height_px, self.width_px), np.float32)
        rows = slice(place.top_px, place.top_px + place.height_px)
        columns = slice(place.left_px, place.left_px + place.width_px)
        for channel, plane in enumerate(planes):
            canvas[channel, rows, columns] = _resize(plane, place.height_px, place.width_px)
        canvas[len(planes) :] = canvas[0]
        top = float(np.iinfo(pixels.dtype).max)
        mean, std = self.mean * top, self.std * top
        if self.intensity == "image":
            # In float64: a float32 sum depends on how a processor groups it.
            image = canvas[:, rows, columns].astype(np.float64)
            mean, std = float(image.mean()), float(image.std()) + FLAT * top
        canvas *= np.float32(1 / std)
        canvas += np.float32(-mean / std)
        return torch.from_numpy(canvas)

    def to_raw(self, grid: np.ndarray, raw_height_px: int, raw_width_px: int, cells: Cells) -> np.ndarray:
        """A map over the network's grid, h w, in raw image coordinates: H W float32, padding cut off.

        Values are interpolated between the cells' centres, and held beyond the outermost.
        """
        place = self.placement(raw_height_px, raw_width_px)
        rows = _grid_positions(raw_height_px, place.top_px, place.height_px, cells, grid.shape[0])
        columns = _grid_positions(raw_width_px, place.left_px, place.width_px, cells, grid.shape[1])
        values = _interpolate(np.asarray(grid, np.float32), rows)
        return np.ascontiguousarray(_interpolate(values.T, columns).T)


def tile_map(
    weights: np.ndarray,
    positions_um: np.ndarray,
    *,
    tile_um: float,
    spacing_um: tuple[float, float],
    shape: tuple[int, int],
) -> np.ndarray:
    """The weights of a slide's tiles over its thumbnail, H W float32: the mean where tiles overlap, NaN without one.

    A tile counts in a pixel by the share of it that it covers, so edges lie where they lie on the slide,
    whatever the level that was read, the size of the tiles and the scale of the thumbnail.

    Args:
        weights: N.
        positions_um: N 2, (x, y) of each tile's upper left corner from the slide's own.
        tile_um: side of a tile.
        spacing_um: (row, column) of the thumbnail.
        shape: (H, W) of the thumbnail.

    >>> tile_map(np.array([1.0]), np.array([[10, 0]]), tile_um=10, spacing_um=(5, 5), shape=(2, 5)).tolist()
    [[nan, nan, 1.0, 1.0, nan], [nan, nan, 1.0, 1.0, nan]]
    """
    total, covered = np.zeros(shape), np.zeros(shape)
    for weight, (x_um, y_um) in zip(weights, positions_um, strict=True):
        rows, vertical = _cover(y_um / spacing_um[0], tile_um / spacing_um[0], shape[0])
        columns, horizontal = _cover(x_um / spacing_um[1], tile_um / spacing_um[1], shape[1])
        share = np.outer(vertical, horizontal)
        total[rows, columns] += weight * share
        covered[rows, columns] += share
    seen = covered > _LEAST_COVER
    return np.where(seen, total / np.where(seen, covered, 1), np.nan).astype(np.float32)


def _cover(start_px: float, side_px: float, length_px: int) -> tuple[slice, np.ndarray]:
    """The pixels that an interval touches, and the share of each that it covers."""
    first = max(0, math.floor(start_px))
    pixels = np.arange(first, max(first, min(length_px, math.ceil(start_px + side_px))))
    shares = np.minimum(pixels + 1, start_px + side_px) - np.maximum(pixels, start_px)
    return slice(first, first + len(pixels)), np.clip(shares, 0, 1)


def _resize(plane: np.ndarray, height_px: int, width_px: int) -> np.ndarray:
    # Pillow and not torch: its float resize is plain C in one thread, equal on every processor and for
    # every number of threads; torch picks kernels by both.
    if plane.shape == (height_px, width_px):
        return plane
    return np.asarray(Image.fromarray(plane).resize((width_px, height_px), Image.Resampling.BILINEAR))


def _grid_positions(raw_px: int, start_px: int, placed_px: int, cells: Cells, num_cells: int) -> np.ndarray:
    """For the centre of each raw pixel along one axis, its place in units of grid cells' centres."""
    canvas = start_px + (np.arange(raw_px) + 0.5) * (placed_px / raw_px)
    positions: np.ndarray = np.clip((canvas - cells.first_centre_px) / cells.stride_px, 0, num_cells - 1)
    return positions


def _interpolate(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Rows of `values` at fractional row numbers, linearly interpolated."""
    lower = np.floor(positions).astype(np.intp)
    upper = np.minimum(lower + 1, len(values) - 1)
    weight = (positions - lower).astype(np.float32)[:, None]
    rows: np.ndarray = values[lower] * (1 - weight) + values[upper] * weight
    return rows


class _Draws(NamedTuple):
    """One batch of random draws, N each, uniform in -1..1."""

    flip: "torch.Tensor"
    rotation: "torch.Tensor"
    shift_x: "torch.Tensor"
    shift_y: "torch.Tensor"
    scale: "torch.Tensor"
    brightness: "torch.Tensor"
    contrast: "torch.Tensor"
    vertical_flip: "torch.Tensor"
    depth_flip: "torch.Tensor"


class Augmentation(Config):
    """Random changes that keep a label; every field is the largest change, 0 means none.

    Of a volume each axial slice is changed, all alike: mirrored between left and right (`horizontal_flip`) or front and
    back (`vertical_flip`), turned about the body's axis; `depth_flip` turns head to foot.
    """

    horizontal_flip: bool = Field(default=False, description="mirror half of the images")
    vertical_flip: bool = Field(
        default=False, description="turn half upside down: where no side is up, as in microscopy"
    )
    depth_flip: bool = Field(default=False, description="of volumes: turn half head to foot")
    rotation_degrees: float = Field(default=0.0, ge=0, le=180)
    translation_fraction: float = Field(default=0.0, ge=0, le=1, description="of height and width")
    scale_fraction: float = Field(default=0.0, ge=0, lt=1, description="0.1 scales by 0.9 to 1.1")
    brightness: float = Field(default=0.0, ge=0, description="added, in units of the normalised input")
    contrast: float = Field(default=0.0, ge=0, lt=1, description="factor 1 +- this about the training mean")
    noise_std: float = Field(default=0.0, ge=0, description="Gaussian, in units of the normalised input")

    @property
    def is_identity(self) -> bool:
        """Whether `apply` returns its batch unchanged."""
        return not any(self.model_dump().values())

    def apply(
        self,
        batch: "torch.Tensor",
        *,
        seed: int,
        epoch: int,
        samples: "Sequence[int] | torch.Tensor",
        background: float,
        aspects: Sequence[float] = (),
    ) -> "torch.Tensor":
        """The augmented batch, N C H W, on the batch's device; the batch itself if nothing is to be done.

        Args:
            batch: N C H W float32, preprocessed; of volumes, C are slices.
            seed: of the run, 0 or more.
            epoch: 0 or more.
            samples: N sample indices: with seed and epoch they alone decide the draws.
            background: what lies outside of an image (`Preprocessing.background`).
            aspects: N, how many times as high as wide a pixel is, so that a rotation turns what lies there and does
                not shear it; none where pixels are square.
        """
        if self.is_identity:
            return batch
        import torch
        import torch.nn.functional as F

        indices = [int(sample) for sample in samples]
        assert len(indices) == len(batch), f"{len(indices)} sample indices for a batch of {len(batch)}"
        draws = _draw(seed, epoch, indices, batch.device)
        if self.horizontal_flip:
            batch = torch.where(_per_image(draws.flip < 0), batch.flip(-1), batch)
        if self.vertical_flip:
            batch = torch.where(_per_image(draws.vertical_flip < 0), batch.flip(-2), batch)
        if self.depth_flip:
            batch = torch.where(_per_image(draws.depth_flip < 0), batch.flip(1), batch)
        if self.rotation_degrees or self.translation_fraction or self.scale_fraction:
            grid = self._grid(draws, aspects, height_px=batch.shape[2], width_px=batch.shape[3])
            # Zero is the background of the shifted batch, and grid_sample pads with zeros.
            batch = F.grid_sample(batch - background, grid, align_corners=False) + background
        if self.contrast:
            batch = batch * _per_image(1 + self.contrast * draws.contrast)
        if self.brightness:
            batch = batch + _per_image(self.brightness * draws.brightness)
        if self.noise_std:
            batch = batch + self.noise_std * _noise(seed, epoch, indices, batch)
        return batch

    def _grid(
        self, draws: _Draws, aspects: Sequence[float], *, height_px: int, width_px: int
    ) -> "torch.Tensor":
        """Where each output pixel comes from, N H W 2 (x, y) in -1..1; turned about the centre."""
        import torch

        # Not affine_grid: it multiplies matrices, and a BLAS may round a batch of one differently.
        device = draws.rotation.device
        x = ((torch.arange(width_px, device=device) * 2 + 1) / width_px - 1).view(1, 1, -1)
        y = ((torch.arange(height_px, device=device) * 2 + 1) / height_px - 1).view(1, -1, 1)
        angle = draws.rotation * math.radians(self.rotation_degrees)
        factor = 1 / (1 + self.scale_fraction * draws.scale)
        cos, sin = (_per_image(factor * part)[..., 0] for part in (torch.cos(angle), torch.sin(angle)))
        shift_x = _per_image(2 * self.translation_fraction * draws.shift_x)[..., 0]
        shift_y = _per_image(2 * self.translation_fraction * draws.shift_y)[..., 0]
        aspect = torch.tensor(aspects or [1.0] * len(angle), dtype=torch.float64)
        high, wide = (  # height by width of an image, and the inverse
            _per_image(ratio.to(angle))[..., 0]
            for ratio in (height_px / width_px * aspect, width_px / height_px / aspect)
        )
        source_x = cos * x - sin * high * y + shift_x
        source_y = sin * wide * x + cos * y + shift_y
        return torch.stack((source_x, source_y), dim=-1)


def _per_image(values: "torch.Tensor") -> "torch.Tensor":
    return values.view(-1, 1, 1, 1)


def _key(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence((seed, epoch)).generate_state(2, np.uint64)


def _draw(seed: int, epoch: int, samples: Sequence[int], device: "torch.device") -> _Draws:
    """All draws, used or not: switching one change on leaves the others as they were."""
    import torch

    key = _key(seed, epoch)
    values = np.empty((len(_Draws._fields), len(samples)), np.float32)
    for row, sample in enumerate(samples):
        # The sample stands in the second word of the counter: 2^64 draws away from its neighbours.
        bits = np.random.Philox(key=key, counter=[0, sample, 0, 0])
        values[:, row] = np.random.Generator(bits).uniform(-1, 1, len(_Draws._fields))
    return _Draws(*torch.from_numpy(values).to(device))


def _noise(seed: int, epoch: int, samples: Sequence[int], batch: "torch.Tensor") -> "torch.Tensor":
    """Standard normal noise like `batch`, drawn image by image on its device."""
    import torch

    noise = torch.empty_like(batch)
    generator = torch.Generator(batch.device)
    for image, sample in zip(noise, samples, strict=True):
        (word,) = np.random.SeedSequence((seed, epoch, sample)).generate_state(1, np.uint64)
        generator.manual_seed(int(word >> 1))
        image.normal_(generator=generator)
    return noise
