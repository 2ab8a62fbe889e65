"""Images with boxes: whole or in crops for training, in tiles for an answer, and the way back to stored pixels.

Boxes are half-open and 0-based on both sides: in stored pixels in a dataset and in every answer, in pixels of the
network's input in a target. A `View` is the one place that knows how the two lie to each other.

Invariants: a crop shows the image at the scale that was asked for, and the same values as any other crop of it; a
crop is a pure function of (seed, epoch, index), whatever the batch and the number of loader workers; nothing is
dropped for being negative.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import pandas as pd
import scipy
import torch
from numpy.typing import NDArray

from cadx import transforms
from cadx.datasets import DatasetFolder
from cadx.loading.epochs import EpochDataset
from cadx.loading.images import ImageDataset
from cadx.models.interface import Detections
from cadx.transforms import FLAT, Augmentation, Placement, Preprocessing

Size = tuple[int, int]
"""Height and width in pixels."""
Crop = Callable[[tuple[slice, slice]], np.ndarray]
"""The pixels of a block of rows and columns that lies inside an image."""

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

MIN_VISIBLE = 0.5
"""A box that an edge cuts stays, clipped, if this share of its area is inside, or of all that would fit.

Below it the box is dropped, and the sliver that is left becomes background: who sees the edge of a lesion alone
cannot say where it ends, and with enough overlap another tile shows the whole of it.
"""
_CORNERS = ["x0", "y0", "x1", "y1"]


class Region(NamedTuple):
    """A part of an image in stored pixels; where it reaches beyond the image, there is black."""

    top_px: int
    left_px: int
    height_px: int
    width_px: int


class Moments(NamedTuple):
    """Mean and standard deviation of an image's pixels, in units of the full range 0..1."""

    mean: float
    std: float


class View(NamedTuple):
    """Which part of an image a network sees, and where in its input that part lies.

    Attributes:
        region: of the image.
        placement: of the region in the network's input.
        image_px: height and width of the whole image.
    """

    region: Region
    placement: Placement
    image_px: Size

    @classmethod
    def of_image(cls, preprocessing: Preprocessing, image_px: Size) -> "View":
        """All of an image, as `Preprocessing.apply` fits it.

        >>> View.of_image(Preprocessing(height_px=224, width_px=224), (512, 1024)).placement.top_px
        56
        """
        return cls(Region(0, 0, *image_px), preprocessing.placement(*image_px), image_px)

    @classmethod
    def of_region(cls, region: Region, crop_px: Size, image_px: Size) -> "View":
        """A region that fills the network's input, `crop_px` high and wide."""
        return cls(region, Placement(0, 0, *crop_px), image_px)

    def to_input(self, boxes_xyxy: torch.Tensor) -> torch.Tensor:
        """Boxes in the network's input, B 4 float64, from boxes in stored pixels; nothing is clipped."""
        scale, stored, placed = self._terms()
        return (boxes_xyxy.detach().cpu().double() - stored) * scale + placed

    def to_stored(self, boxes_xyxy: torch.Tensor) -> torch.Tensor:
        """Boxes in stored pixels, B 4 float64, from boxes in the network's input: the inverse of `to_input`."""
        scale, stored, placed = self._terms()
        return (boxes_xyxy.detach().cpu().double() - placed) / scale + stored

    def _terms(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Input pixels per stored pixel, and the origin of the region in both, for x, y, x, y."""
        region, place = self.region, self.placement
        scale = [place.width_px / region.width_px, place.height_px / region.height_px]
        stored, placed = [region.left_px, region.top_px], [place.left_px, place.top_px]
        terms = (torch.tensor(values * 2, dtype=torch.float64) for values in (scale, stored, placed))
        return next(terms), next(terms), next(terms)


def image_moments(pixels: np.ndarray, preprocessing: Preprocessing) -> Moments:
    """What `intensity: image` needs of a whole image, H W or H W 3, at its own size.

    >>> image_moments(np.array([[0, 255]], np.uint8), Preprocessing(height_px=8, width_px=8))
    Moments(mean=0.5, std=0.5)
    """
    height_px, width_px = pixels.shape[:2]
    own = {"height_px": height_px, "width_px": width_px, "fit": "stretch", "intensity": "range"}
    # In float64: a float32 sum depends on how a processor groups it.
    values = preprocessing.model_copy(update=own | {"mean": 0.0, "std": 1.0}).apply(pixels).numpy()
    return Moments(float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)))


def crop_input(
    crop: Crop, view: View, preprocessing: Preprocessing, moments: Moments | None = None
) -> torch.Tensor:
    """The network's input for a region of an image, C H W float32; only the pixels under it are read.

    Args:
        crop: reads a block of the image; of an array in memory, its `__getitem__`.
        view: of a region (`View.of_region`).
        preprocessing: channels and intensities; its size and fit play no part.
        moments: of the whole image; needed for `intensity: image`, and read from the image if not given.
    """
    region, (height_px, width_px) = view.region, view.image_px
    top, bottom = max(region.top_px, 0), min(region.top_px + region.height_px, height_px)
    left, right = max(region.left_px, 0), min(region.left_px + region.width_px, width_px)
    assert top < bottom, f"{region} lies outside of an image of {view.image_px}"
    assert left < right, f"{region} lies outside of an image of {view.image_px}"
    block = crop((slice(top, bottom), slice(left, right)))
    if block.shape[:2] != (region.height_px, region.width_px):
        black = np.zeros((region.height_px, region.width_px, *block.shape[2:]), block.dtype)
        rows = slice(top - region.top_px, bottom - region.top_px)
        black[rows, left - region.left_px : right - region.left_px] = block
        block = black
    fitted: dict[str, Any] = {"fit": "stretch"}
    fitted |= {"height_px": view.placement.height_px, "width_px": view.placement.width_px}
    if preprocessing.intensity == "image":
        # Those of the image, not of the crop, which may be blank.
        mean, std = moments or image_moments(crop((slice(0, height_px), slice(0, width_px))), preprocessing)
        fitted |= {"intensity": "range", "mean": mean, "std": std + FLAT}
    return preprocessing.model_copy(update=fitted).apply(block)


# --- Training -----------------------------------------------------------------------------------------


class FalsePositives(Protocol):
    """Where an earlier epoch's network saw what is not there: `cadx.mining.MinedNegatives`."""

    def draw(self, seed: int, epoch: int, index: int, sample_id: str) -> Sequence[float] | None:
        """A box, x0 y0 x1 y1 first, in stored pixels of this sample; None if it has none."""
        ...


class BoxItem(NamedTuple):
    """One image or crop.

    Attributes:
        image: C H W float32, preprocessed.
        target: its boxes in pixels of `image`; none at all in many.
        item: its index in the dataset.
    """

    image: torch.Tensor
    target: Detections
    item: int


class BoxBatch(NamedTuple):
    """N images, N C H W float32, with a target for each, and their indices in the dataset, N int64."""

    images: torch.Tensor
    targets: list[Detections]
    items: torch.Tensor


def collate_boxes(items: Sequence[BoxItem]) -> BoxBatch:
    """A batch of images that differ in their number of boxes: what a `DataLoader` takes as `collate_fn`.

    >>> nothing = Detections(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    >>> collate_boxes([BoxItem(torch.zeros(1, 8, 8), nothing, n) for n in (4, 2)]).items
    tensor([4, 2])
    """
    images = torch.stack([item.image for item in items])
    return BoxBatch(
        images,
        [item.target for item in items],
        torch.tensor([item.item for item in items], dtype=torch.int64),
    )


class BoxDataset(EpochDataset[BoxItem]):
    """Images with boxes, whole or in random crops; item i is of image i // crops_per_image.

    Whole images are fitted by the preprocessing. Crops keep the image's own scale, or have a spacing of their own:
    for lesions that would be lost if a large image were made small. Of the crops of an image with lesions the
    share `positive_fraction` shows one of them whole, anywhere in the crop; of those of an image with mined false
    positives the share `mined_fraction` shows one of these; the rest lie anywhere. Images without boxes give as many
    crops as others.
    """

    def __init__(
        self,
        folder: DatasetFolder,
        sample_ids: Sequence[str],
        preprocessing: Preprocessing,
        *,
        seed: int,
        crop_px: Size | None = None,
        spacing_mm: tuple[float, float] | None = None,
        crops_per_image: int = 1,
        positive_fraction: float = 0.5,
        mined: FalsePositives | None = None,
        mined_fraction: float = 0.25,
        cache_mb: float = 0.0,
    ) -> None:
        """Choose the images.

        Boxes are clipped to their image, and what has no area then is left out: `validate` has judged them before.

        Args:
            folder: a dataset of images with boxes.
            sample_ids: which images, in which order.
            preprocessing: how pixels become tensors; of crops its size and fit play no part.
            seed: of the run, 0 or more.
            crop_px: height and width of the network's input; None gives whole images.
            spacing_mm: row and column spacing of crops; None keeps each image's own scale.
            crops_per_image: how many crops of each image an epoch holds.
            positive_fraction: 0..1, expected share of crops around a lesion.
            mined: false positives to show again. Loader workers see what it holds when they start: let them end
                with an epoch (no `persistent_workers`) if it grows.
            mined_fraction: 0..1, expected share of crops around a false positive.
            cache_mb: memory for preprocessed whole images, in MiB (`ImageDataset`).

        Raises:
            ValueError: if the dataset holds no images or no boxes or lacks one of the samples, a box is of an
                unknown class, a spacing is asked of an image that has none, or a number is out of range.
        """
        if folder.info.kind != "image":
            raise ValueError(
                f"{folder.path}: its samples are of kind {folder.info.kind}; give a dataset of images"
            )
        if not len(folder.boxes):
            raise ValueError(
                f"{folder.path}: boxes.parquet is empty; give a dataset with boxes to train a detector"
            )
        shares = positive_fraction + (mined_fraction if mined is not None else 0.0)
        if crops_per_image < 1 or min(positive_fraction, mined_fraction) < 0 or shares > 1:
            raise ValueError(
                "crops_per_image must be at least 1, positive_fraction and mined_fraction at least 0 and together"
                " at most 1"
            )
        if crop_px is None and (crops_per_image > 1 or spacing_mm is not None or mined is not None):
            raise ValueError("crops_per_image, spacing_mm and mined are for crops; set crop_px")
        if crop_px is not None and min(crop_px) < 1:
            raise ValueError(f"crop_px {crop_px} must be two numbers of at least 1")
        super().__init__()
        self.sample_ids = tuple(sample_ids)
        self.preprocessing = preprocessing
        self.seed = seed
        self.crop_px = crop_px
        self.crops_per_image = crops_per_image
        self.positive_fraction = positive_fraction
        self.mined = mined
        self.mined_fraction = mined_fraction
        self._folder = folder
        rows = folder.samples.iloc[folder.rows(self.sample_ids)]
        self._images_px: list[Size] = list(
            zip(rows["height_px"].tolist(), rows["width_px"].tolist(), strict=True)
        )
        self._boxes, self._labels = _boxes_of(folder, self.sample_ids, self._images_px)
        self._whole = ImageDataset(folder, self.sample_ids, preprocessing, cache_mb) if not crop_px else None
        self._regions_px = _region_sizes(folder, rows, crop_px, spacing_mm) if crop_px else []
        self._moments: dict[int, Moments] = {}

    def warm(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Read once what is kept of whole images: before loader workers fork, so that they share it.

        Args:
            progress: called with (images done, images in all) after each image.
        """
        if self._whole is not None:
            self._whole.warm(progress)
            return
        for number in range(len(self.sample_ids)):
            self._image_moments(number)
            if progress is not None:
                progress(number + 1, len(self.sample_ids))

    def __len__(self) -> int:
        """The number of items in an epoch."""
        return len(self.sample_ids) * self.crops_per_image

    def __getitem__(self, index: int) -> BoxItem:
        """The item of this index in the current epoch."""
        view = self.view(index)
        number = index // self.crops_per_image
        if self._whole is not None:
            image = self._whole[number][0]
        else:
            image = crop_input(self._crop_of(number), view, self.preprocessing, self._image_moments(number))
        boxes, labels = view.to_input(self._boxes[number]), self._labels[number]
        boxes, kept = _visible(boxes, image.shape[1], image.shape[2])
        return BoxItem(image, _target(boxes[kept], labels[kept]), index)

    def view(self, index: int) -> View:
        """Which part of its image the item of this index shows, in the current epoch."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = index // self.crops_per_image
        image_px = self._images_px[number]
        if self.crop_px is None:
            return View.of_image(self.preprocessing, image_px)
        region_px = self._regions_px[number]
        epoch = self.epoch
        rng = np.random.default_rng((self.seed, epoch, index))
        kind, boxes = rng.random(), self._boxes[number]
        shown: Sequence[float] | None = None
        if kind < self.positive_fraction:
            if len(boxes):
                shown = boxes[int(rng.integers(len(boxes)))].tolist()
        elif self.mined is not None and kind < self.positive_fraction + self.mined_fraction:
            shown = self.mined.draw(self.seed, epoch, index, self.sample_ids[number])
        starts = []
        for axis, (side_px, whole_px) in enumerate(zip(region_px, image_px, strict=True)):
            low, high = 0, whole_px - side_px
            if shown is not None:
                # Every start that shows all of the box, so that the middle of a crop tells nothing. A box that is
                # larger than the crop leaves those that fill the crop with it.
                first, last = shown[1 - axis], shown[3 - axis]
                low, high = sorted((int(np.floor(first)), int(np.ceil(last)) - side_px))
            start = int(rng.integers(min(low, high), max(low, high) + 1))
            inside = min(max(start, 0), whole_px - side_px)
            starts.append(inside if whole_px >= side_px else (whole_px - side_px) // 2)
        return View.of_region(Region(starts[0], starts[1], *region_px), self.crop_px, image_px)

    def _crop_of(self, number: int) -> Crop:
        # Of an image the first two axes are rows and columns, and the third, if any, is read whole.
        return lambda block: self._folder.crop(self.sample_ids[number], cast(Any, block))

    def _image_moments(self, number: int) -> Moments | None:
        if self.preprocessing.intensity != "image":
            return None
        if number not in self._moments:
            pixels = self._folder.pixels(self.sample_ids[number])
            self._moments[number] = image_moments(pixels, self.preprocessing)
        return self._moments[number]


def _boxes_of(
    folder: DatasetFolder, sample_ids: Sequence[str], images_px: Sequence[Size]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """For each sample its boxes, B 4 float64 in stored pixels, and their labels, B int64."""
    table = folder.boxes[folder.boxes["sample_id"].isin(sample_ids)]
    labels = pd.Index(folder.info.classes).get_indexer(pd.Index(table["class"]))
    if (labels < 0).any():
        name = table["class"].iloc[int(np.argmax(labels < 0))]
        raise ValueError(
            f"{folder.path / 'boxes.parquet'}: class {name!r} is none of {', '.join(folder.info.classes)};"
            " correct the boxes at their source"
        )
    corners = table[_CORNERS].to_numpy(np.float64)
    places = table.groupby("sample_id").indices
    boxes, found = [], []
    for name, (height_px, width_px) in zip(sample_ids, images_px, strict=True):
        own = places.get(name, np.empty(0, np.intp))
        clipped = torch.from_numpy(np.clip(corners[own], 0, [width_px, height_px] * 2))
        kept = (clipped[:, 2:] > clipped[:, :2]).all(dim=1)
        boxes.append(clipped[kept])
        found.append(torch.from_numpy(labels[own].astype(np.int64))[kept])
    return boxes, found


def _region_sizes(
    folder: DatasetFolder, rows: pd.DataFrame, crop_px: Size, spacing_mm: tuple[float, float] | None
) -> list[Size]:
    """For each image the stored pixels under a crop."""
    if spacing_mm is None:
        return [crop_px] * len(rows)
    own_mm = rows[["spacing_row_mm", "spacing_column_mm"]].to_numpy(np.float64)
    unknown = ~(own_mm > 0).all(axis=1)
    if unknown.any():
        name = rows["sample_id"].iloc[int(np.argmax(unknown))]
        raise ValueError(
            f"{folder.path}: the spacing of sample {name!r} is unknown; set spacing_mm to null to crop at each"
            " image's own scale"
        )
    sizes = np.maximum(1, np.rint(np.array(crop_px) * np.array(spacing_mm) / own_mm)).astype(int)
    return [(height_px, width_px) for height_px, width_px in sizes.tolist()]


def _visible(boxes_xyxy: torch.Tensor, height_px: int, width_px: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The boxes clipped to an input of this size, and which of them stay (`MIN_VISIBLE`)."""
    limit = boxes_xyxy.new_tensor([width_px, height_px] * 2)
    clipped = torch.minimum(boxes_xyxy.clamp(min=0), limit)
    sides, whole = (boxes[:, 2:] - boxes[:, :2] for boxes in (clipped, boxes_xyxy))
    fitting = torch.minimum(whole, limit[:2]).prod(dim=1)
    kept = (sides > 0).all(dim=1) & (sides.prod(dim=1) >= MIN_VISIBLE * fitting)
    return clipped, kept


def _target(boxes_xyxy: torch.Tensor, labels: torch.Tensor) -> Detections:
    boxes = boxes_xyxy.float()
    return Detections(boxes, labels, boxes.new_ones(len(boxes)))


def augment_boxes(
    images: torch.Tensor,
    targets: Sequence[Detections],
    augmentation: Augmentation,
    *,
    seed: int,
    epoch: int,
    samples: Sequence[int] | torch.Tensor,
    background: float,
) -> tuple[torch.Tensor, list[Detections]]:
    """Images and boxes under the same random changes, on the images' device.

    Boxes go exactly where their pixels go; one that leaves the image is clipped or dropped, as by a crop's edge
    (`MIN_VISIBLE`).

    Args:
        images: N C H W float32, preprocessed.
        targets: N, in pixels of the images, on their device.
        augmentation: without rotation, under which no upright box stays tight.
        seed: of the run, 0 or more.
        epoch: 0 or more.
        samples: N sample indices: with seed and epoch they alone decide the draws.
        background: what lies outside of an image (`Preprocessing.background`).

    Raises:
        ValueError: if the augmentation rotates.
    """
    if augmentation.rotation_degrees:
        raise ValueError("augmentation.rotation_degrees: boxes stay tight without rotation only; set it to 0")
    indices = [int(sample) for sample in samples]
    assert len(indices) == len(images) == len(targets)
    height_px, width_px = images.shape[2:]
    size = images.new_tensor([width_px, height_px])
    draws = transforms._draw(seed, epoch, indices, images.device)
    flips = ((augmentation.horizontal_flip, draws.flip), (augmentation.vertical_flip, draws.vertical_flip))
    mirrored = torch.stack([(draw < 0) & wanted for wanted, draw in flips], dim=1)  # N, x and y
    images = augmentation.apply(images, seed=seed, epoch=epoch, samples=indices, background=background)
    factor = 1 + augmentation.scale_fraction * draws.scale
    shift = augmentation.translation_fraction * torch.stack((draws.shift_x, draws.shift_y), dim=1) * size
    moved = []
    for number, target in enumerate(targets):
        corners = target.boxes_xyxy.view(-1, 2, 2)  # B, low and high, x and y
        corners = torch.where(mirrored[number], size - corners.flip(1), corners)
        # `Augmentation` fetches each pixel from `shift` away, about the middle.
        boxes = ((corners - size / 2 - shift[number]) * factor[number] + size / 2).reshape(-1, 4)
        boxes, kept = _visible(boxes, height_px, width_px)
        moved.append(Detections(boxes[kept], target.labels[kept], target.scores[kept]))
    return images, moved


# --- Answers ------------------------------------------------------------------------------------------


def to_raw(detections: Detections, view: View) -> Detections:
    """What a network says of a view, its boxes (float64) in stored pixels, clipped to the image; order kept.

    A box that lies beside the image, in the padding, is left out.
    """
    boxes = view.to_stored(detections.boxes_xyxy)
    height_px, width_px = view.image_px
    boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width_px, height_px] * 2))
    kept = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    return Detections(boxes[kept], detections.labels.cpu()[kept], detections.scores.cpu()[kept])


def tile_grid(height_px: int, width_px: int, tile_px: Size, overlap_px: int) -> list[Region]:
    """The fewest tiles that cover an image, evenly spread, neighbours sharing at least `overlap_px`.

    The first ones start at the image's edge and the last ones end at it; along a side that is shorter than a tile,
    the image lies in the middle of one. A lesion that is smaller than the overlap is whole in at least one tile.

    Args:
        height_px: of the image.
        width_px: of the image.
        tile_px: height and width of a tile, in stored pixels.
        overlap_px: 0 or more, and less than a tile's sides.

    Raises:
        ValueError: if the overlap is out of range.

    >>> [tile.left_px for tile in tile_grid(100, 250, (100, 100), 20)]
    [0, 75, 150]
    """
    if not 0 <= overlap_px < min(tile_px):
        raise ValueError(f"overlap_px {overlap_px} must be at least 0 and below the tile's sides {tile_px}")
    tops, lefts = (
        _starts(whole_px, side_px, overlap_px)
        for whole_px, side_px in zip((height_px, width_px), tile_px, strict=True)
    )
    return [Region(top, left, *tile_px) for top in tops for left in lefts]


def _starts(whole_px: int, side_px: int, overlap_px: int) -> list[int]:
    if whole_px <= side_px:
        return [(whole_px - side_px) // 2]
    num_steps = -(-(whole_px - side_px) // (side_px - overlap_px))
    # Rounding down keeps every step within the greatest one that the overlap allows.
    return [step * (whole_px - side_px) // num_steps for step in range(num_steps + 1)]


def merge_tiles(
    detections: Sequence[Detections], views: Sequence[View], *, nms_iou: float = 0.5, edge_px: float = 2.0
) -> Detections:
    """One set of boxes in stored pixels (float64), by falling score, from the answers to an image's tiles.

    A box that reaches an edge of its tile inside of the image may be a part of a lesion. Two such parts that face
    each other across a seam and agree along it become their hull. What is still cut then, and lies mostly in a box
    that is whole and scores at least half as much, is that lesion again. Of what then still overlaps, the
    highest score of its class stays. Whatever is joined takes the higher score.

    Args:
        detections: of each tile, in pixels of the network's input.
        views: of each tile.
        nms_iou: 0..1: of two boxes of a class that overlap more than this the lower score goes.
        edge_px: how far from a tile's edge, in pixels of the input, a box still counts as cut by it.
    """
    from torchvision.ops import batched_nms

    assert len(detections) == len(views)
    found = [to_raw(answer, view) for answer, view in zip(detections, views, strict=True)]
    boxes, scores, labels = (
        torch.cat([answer[field] for answer in found]).numpy() if found else np.empty(0)
        for field in (0, 2, 1)
    )
    boxes, scores, labels = boxes.reshape(-1, 4).astype(np.float64), scores.astype(np.float64), labels.copy()
    tile = np.repeat(np.arange(len(found)), [len(answer.labels) for answer in found])
    cut = np.zeros((len(boxes), 4), bool)
    reach = np.zeros(len(boxes))
    for number, view in enumerate(views):
        own, region = tile == number, view.region
        left_px, top_px = region.left_px, region.top_px
        edges = np.array([left_px, top_px, left_px + region.width_px, top_px + region.height_px])
        inner = (edges > 0) & (edges < np.array([*view.image_px[::-1]] * 2))
        reach[own] = edge_px * max(
            region.width_px / view.placement.width_px, region.height_px / view.placement.height_px
        )
        cut[own] = inner & (np.abs(boxes[own] - edges) <= reach[own, None])

    group, cut = _joined(boxes, scores, labels, tile, cut, reach)
    num_groups = int(group.max(initial=-1)) + 1
    is_first = np.zeros(len(group), bool)
    is_first[np.unique(group, return_index=True)[1]] = True
    is_part = np.zeros(num_groups, bool)
    for side, outer in enumerate((np.minimum, np.minimum, np.maximum, np.maximum)):
        hull = np.full(num_groups, np.inf if side < 2 else -np.inf)
        outer.at(hull, group, boxes[:, side])
        # The hull is cut where none of those that reach its side ends there by itself.
        whole_here = np.zeros(num_groups, bool)
        whole_here[group[~cut[:, side] & (np.abs(boxes[:, side] - hull[group]) <= reach)]] = True
        is_part |= ~whole_here
        boxes[:, side] = hull[group]
    highest = np.zeros(num_groups)
    np.maximum.at(highest, group, scores)
    scores = highest[group]
    is_part = is_part[group] & is_first

    kept = is_first.copy()
    wholes = np.flatnonzero(is_first & ~is_part)
    for part in np.flatnonzero(is_part)[np.argsort(-scores[is_part], kind="stable")]:
        others = wholes[labels[wholes] == labels[part]]
        sides = np.minimum(boxes[others, 2:], boxes[part, 2:]) - np.maximum(
            boxes[others, :2], boxes[part, :2]
        )
        shared = np.prod(np.maximum(sides, 0), axis=1) / np.prod(boxes[part, 2:] - boxes[part, :2])
        others = others[(shared >= 0.5) & (scores[others] >= scores[part] / 2)]
        if len(others):
            kept[part] = False
            best_whole = others[np.argmax(scores[others])]
            scores[best_whole] = max(scores[best_whole], scores[part])
    answer = Detections(
        *(torch.from_numpy(values[kept]) for values in (boxes, labels.astype(np.int64), scores))
    )
    order = batched_nms(answer.boxes_xyxy, answer.scores, answer.labels, nms_iou)
    return Detections(answer.boxes_xyxy[order], answer.labels[order], answer.scores[order].float())


def _joined(
    boxes: FloatArray,
    scores: FloatArray,
    labels: NDArray[Any],
    tile: NDArray[np.intp],
    cut: BoolArray,
    reach: FloatArray,
) -> tuple[NDArray[np.intp], BoolArray]:
    """For each box the number of its group of parts (most are alone in theirs), and which of its edges are still cut.

    A part that ends at the seam goes with one of another tile that starts there, if both span what their tiles
    share and at least half of the shorter one's side along the seam is common. Each edge of a box is joined once,
    the likeliest pairs first.
    """
    pairs: list[tuple[int, int]] = []
    still_cut = cut.copy()
    for axis in (0, 1):
        before, after = np.flatnonzero(cut[:, axis + 2]), np.flatnonzero(cut[:, axis])
        a, b = boxes[before][:, None], boxes[after][None]
        slack = np.maximum(reach[before][:, None], reach[after][None])
        across = 1 - axis
        common = np.minimum(a[..., across + 2], b[..., across + 2]) - np.maximum(
            a[..., across], b[..., across]
        )
        shorter = np.minimum(a[..., across + 2] - a[..., across], b[..., across + 2] - b[..., across])
        fits = (
            (labels[before][:, None] == labels[after][None])
            & (tile[before][:, None] != tile[after][None])
            & (a[..., axis] <= b[..., axis] + slack)
            & (a[..., axis + 2] <= b[..., axis + 2] + slack)
            & (b[..., axis] <= a[..., axis + 2] + 2 * slack)
            & (common >= 0.5 * shorter)
        )
        rows, columns = np.nonzero(fits)
        weaker = np.minimum(scores[before[rows]], scores[after[columns]])
        for pick in np.argsort(-weaker, kind="stable"):
            first, second = int(before[rows[pick]]), int(after[columns[pick]])
            if still_cut[first, axis + 2] and still_cut[second, axis]:
                still_cut[first, axis + 2] = still_cut[second, axis] = False
                pairs.append((first, second))
    ends = np.array(pairs, np.intp).reshape(-1, 2)
    graph = scipy.sparse.csr_matrix(
        (np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(boxes), len(boxes))
    )
    groups: NDArray[np.intp] = scipy.sparse.csgraph.connected_components(graph, directed=False)[1].astype(
        np.intp
    )
    return groups, still_cut
