"""What a look at one image can tell of its quality, and which images are copies of each other."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pandas as pd
import scipy
from PIL import Image

from cadx.datasets import DatasetFolder

CHECKS = ("blur", "clipped_fraction", "range_fraction", "text_score")
"""Names of the checks, in the order in which tables hold them."""

PRECEDENCE = ("test", "train", "calibration", "val", "")
"""Official splits, the most precious first: a copy is kept there."""

DuplicateKind = Literal[
    "contradicting_labels",
    "duplicate_across_splits",
    "duplicate_across_patients",
    "duplicate_within_test",
    "duplicate_within_patient",
]

GEOMETRY_FINDINGS = ("missing_slices", "duplicate_slices", "uneven_spacing", "gantry_tilt", "oblique")
"""Codes of a reader's findings: see `RawVolume`."""

_SPACINGS = ("spacing_slice_mm", "spacing_row_mm", "spacing_column_mm", "slide_mpp")
_BLUR_PX = 256
_TEXT_PX = 1024
_MIN_TEXT_SIDE_PX = 96
_LETTER_CONTRAST = 0.1  # of the used range, against the mean of 31 px around
_LETTERS_OF_A_LINE = 4
_HASH_PX = 32
_COMPARED_PX = 64
_MIN_HASHED_STD = 1e-3
_BLOCK = 256  # images whose details are compared with those of as many others in one product
_NUM_DETAILS_KEPT = 4096  # of 16 KiB each


def image_checks(pixels: np.ndarray) -> dict[str, float]:
    """The numbers named in `CHECKS` for H W or H W 3 pixels, uint8 or uint16; NaN = cannot be told.

    `blur`: 0 (sharp) to 1 (nothing that a stronger blur could take away), see `blur_effect`.
    `clipped_fraction`: share of the pixels that lie in flat areas of the darkest or the brightest level that
    the image uses: what was there is lost. A plain background, which is such a level too, does not count: it
    is connected with the border. NaN for an image of one or two levels.
    `range_fraction`: the distance of the quantiles 0.001 and 0.999 as a share of the format's range.
    `text_score`: 0 to 1, how certainly letters stand in the image, see `text_score`.

    >>> image_checks(np.zeros((32, 32), np.uint8))
    {'blur': nan, 'clipped_fraction': nan, 'range_fraction': 0.0, 'text_score': 0.0}
    """
    assert pixels.dtype in (np.uint8, np.uint16), f"not raw pixels: {pixels.dtype}"
    gray = _gray(pixels)
    low, high = np.quantile(gray, (0.001, 0.999))
    values = (blur_effect(gray), _clipped_fraction(gray), float(high - low), text_score(gray))
    return dict(zip(CHECKS, values, strict=True))


def blur_effect(gray: np.ndarray) -> float:
    """How blurred an image is, 0 to 1; NaN for a constant one.

    The steepest differences of neighbouring pixels, its edges, are compared with those that a further blur
    along the same axis leaves: a sharp image loses most of them, a blurred one few. The axis that lost less
    counts. Radiographs, blood smears and slices stand below 0.75; blurred with a Gaussian of 1.2 % of their
    longer side, radiographs and smears stand above it.

    The paper's measure takes noise for sharpness and depends on the number of pixels. Here the image is first
    reduced to a longer side of 256 px by averaging and smoothed with a Gaussian of 1 px, and only the steepest
    2 % of the differences count, which noise hardly makes: noise of 2 % of the range moves it by 0.02.

    Args:
        gray: H W, float.

    Source: Crété-Roffet, Dolmiere, Ladret and Nicolas 2007, SPIE 6492:64920I, section 3, with a filter of 7.
    """
    small = scipy.ndimage.gaussian_filter(_reduced(gray, _BLUR_PX), 1.0, mode="nearest")
    values = []
    for axis in (0, 1):
        blurred = scipy.ndimage.uniform_filter1d(small, 7, axis=axis, mode="nearest")
        sharp = np.abs(np.diff(small, axis=axis))
        if not sharp.any():
            continue
        edges = sharp >= np.quantile(sharp, 0.98)
        left = np.minimum(sharp, np.abs(np.diff(blurred, axis=axis)))
        values.append(float(left[edges].sum() / sharp[edges].sum()))
    return max(values, default=float("nan"))


def _clipped_fraction(gray: np.ndarray) -> float:
    low, high = float(gray.min()), float(gray.max())
    if not ((gray != low) & (gray != high)).any():
        return float("nan")
    border = np.concatenate([gray[0], gray[-1], gray[:, 0], gray[:, -1]])
    # Black, as air and collimators are; white only where it is nearly all around, as around cells on glass.
    background = high if (border == high).mean() > 0.75 else low
    num_clipped = 0
    for level in (low, high):
        # An extreme level is met by chance too; only an area of it is clipped.
        flat = scipy.ndimage.binary_opening(gray == level, np.ones((3, 3), bool))
        if level == background and flat.any():
            areas, _ = scipy.ndimage.label(flat)
            outer = np.unique(np.concatenate([areas[0], areas[-1], areas[:, 0], areas[:, -1]]))
            flat &= ~np.isin(areas, outer[outer > 0])
        num_clipped += int(flat.sum())
    return num_clipped / gray.size


def text_score(gray: np.ndarray) -> float:
    """How certainly letters stand in the image, 0 to 1: 0.5 at five letters of one line, 0.9 at about twenty.

    Letters are sought as connected areas of nearly one gray that stand out from their surroundings, all as
    high as their neighbours, side by side in a line. A line needs four: the lead markers L and R, a serial
    number of two digits and single bright spots are none.

    Args:
        gray: H W, float in 0..1. Letters are found at 7 to 60 px of height once the longer side is at
            most 1024 px.
    """
    if min(gray.shape) < _MIN_TEXT_SIDE_PX:
        return 0.0
    small = _reduced(gray, _TEXT_PX)
    surroundings = scipy.ndimage.uniform_filter(small, 31, mode="nearest")
    num_letters = max(
        _letters_in_lines(small - surroundings, small, bright=True),
        _letters_in_lines(surroundings - small, small, bright=False),
    )
    return num_letters / (num_letters + 5.0) if num_letters else 0.0


def _letters_in_lines(deviation: np.ndarray, gray: np.ndarray, bright: bool) -> int:
    """How many letters, brighter or darker than their surroundings, stand in lines of at least four."""
    used = float(gray.max() - gray.min())
    if used == 0:
        return 0
    labels, _ = scipy.ndimage.label(deviation > _LETTER_CONTRAST * used, np.ones((3, 3)))
    areas = np.bincount(labels.ravel())
    letters = []
    for number, box in enumerate(scipy.ndimage.find_objects(labels), start=1):
        top, bottom, left, right = box[0].start, box[0].stop, box[1].start, box[1].stop
        height, width = bottom - top, right - left
        filled = areas[number] / (height * width)
        # Wider than high are letters that touch; fully filled are dots and bars, but for the letter I.
        if not (7 <= height <= 60 and 0.12 * height <= width <= 1.6 * height):
            continue
        if not 0.15 < filled < (0.9 if width >= 0.4 * height else 1.01):
            continue
        level = gray[box][labels[box] == number]
        peak = float(level.max() if bright else level.min())
        if level.std() < 0.3 * used:
            letters.append((left, right, bottom, height, peak, float(level.mean())))
    if len(letters) < _LETTERS_OF_A_LINE:
        return 0
    letters.sort()
    left, right, bottom, height, peak, mean = np.array(letters).T
    follower: dict[int, int] = {}
    for one in range(len(letters)):
        taller = np.maximum(height, height[one])
        gap = left - right[one]
        fits = (gap >= 0) & (gap <= 0.9 * taller) & (np.abs(height - height[one]) <= 0.35 * taller)
        fits &= np.abs(bottom - bottom[one]) <= 0.2 * taller + 0.5
        fits &= (np.abs(peak - peak[one]) < 0.06 * used) & (np.abs(mean - mean[one]) < 0.2 * used)
        if fits.any():
            follower[one] = int(np.argmax(fits))  # the nearest, since they are sorted by their left edge
    total, taken = 0, set[int]()
    for one in range(len(letters)):
        line = [one] if one not in taken else []
        while (
            line and (following := follower.get(line[-1])) is not None and following not in taken | set(line)
        ):
            line.append(following)
        taken.update(line)
        if len(line) >= _LETTERS_OF_A_LINE:
            total += len(line)
    return total


def _gray(pixels: np.ndarray) -> np.ndarray:
    """H W float32 in 0..1 of the dtype's range."""
    gray = pixels.astype(np.float32) / np.float32(np.iinfo(pixels.dtype).max)
    return gray.mean(axis=2) if gray.ndim == 3 else gray


def _reduced(gray: np.ndarray, longer_px: int) -> np.ndarray:
    """The image with its longer side reduced to `longer_px` by averaging; smaller images as they are."""
    factor = max(gray.shape) / longer_px
    if factor <= 1:
        return gray
    size = (max(1, round(gray.shape[1] / factor)), max(1, round(gray.shape[0] / factor)))
    return np.asarray(Image.fromarray(gray).resize(size, Image.Resampling.BOX))


# --- Copies -----------------------------------------------------------------------------------------


def find_duplicates(samples: pd.DataFrame, label_columns: Sequence[str]) -> pd.DataFrame:
    """For every row the kind of copy that it is, and the sample_id of the image that is kept for it.

    Args:
        samples: columns sample_id, pixels_sha256, patient, given_split and the label columns.
        label_columns: which they are; NaN = unlabelled, and agrees with every label.

    Returns:
        Columns `duplicate` (a `DuplicateKind`, or "" for an image without copies and for the one that is
        kept) and `duplicate_of`, indexed like `samples`. With contradicting labels none is kept, and each
        names another of its group.

    >>> samples = pd.DataFrame({"sample_id": ["a", "b"], "pixels_sha256": ["x", "x"], "patient": ["p", "q"],
    ...                         "given_split": ["val", "train"], "label_sick": [1.0, 1.0]})
    >>> find_duplicates(samples, ["label_sick"]).values.tolist()
    [['duplicate_across_splits', 'b'], ['', '']]
    """
    kinds: dict[Any, DuplicateKind] = {}
    originals: dict[Any, str] = {}
    copies = samples[samples["pixels_sha256"].duplicated(keep=False)]
    for _, group in copies.groupby("pixels_sha256", sort=False):
        labels = group[list(label_columns)]
        order = pd.DataFrame(
            {"split": group["given_split"].map(PRECEDENCE.index), "unlabelled": labels.isna().any(axis=1)}
        ).sort_values(["split", "unlabelled"], kind="stable")
        (first, kept), *others = group.loc[order.index].to_dict("index").items()
        originals |= {row: kept["sample_id"] for row, _ in others}
        if (labels.max() > labels.min()).any():  # never true of NaN, which contradicts nothing
            kinds |= dict.fromkeys(group.index, "contradicting_labels")
            originals[first] = others[0][1]["sample_id"]
            continue
        for row, copy in others:
            if copy["given_split"] != kept["given_split"]:
                kinds[row] = "duplicate_across_splits"
            elif copy["patient"] == kept["patient"]:
                kinds[row] = "duplicate_within_patient"
            elif copy["given_split"] == "test":
                kinds[row] = "duplicate_within_test"
            else:
                kinds[row] = "duplicate_across_patients"
    return pd.DataFrame(
        {
            "duplicate": pd.Series(kinds, dtype=object).reindex(samples.index, fill_value=""),
            "duplicate_of": pd.Series(originals, dtype=object).reindex(samples.index, fill_value=""),
        }
    )


def perceptual_hash(pixels: np.ndarray) -> str:
    """64 bits of what the image looks like, as 16 hex digits: alike for copies with other bytes; "" if blank.

    The image is reduced to 32 x 32 and transformed by the cosine transform; each of the 8 x 8 lowest
    frequencies, without the constant row and column, is 1 where it is above their median. Re-encoding,
    resizing by a few percent and another brightness or contrast change few of the bits.

    Source: Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions, section 3.2.1.

    >>> tiles = np.random.default_rng(0).integers(0, 60000, (8, 10))
    >>> image = np.kron(tiles, np.ones((8, 8))).astype(np.uint16)
    >>> perceptual_hash(image) == perceptual_hash(image[::2, ::2] // 2 + 9)
    True
    >>> perceptual_hash(np.full((9, 9), 7, np.uint8))
    ''
    """
    gray = _gray(pixels)
    if gray.std() < _MIN_HASHED_STD:
        return ""
    low = scipy.fft.dctn(_resized(gray, _HASH_PX), norm="ortho")[1:9, 1:9]
    return np.packbits(low > np.median(low)).tobytes().hex()


def near_duplicates(hashes: Sequence[str], max_distance: int = 4) -> np.ndarray:
    """All pairs of hashes that differ in at most `max_distance` bits: M 2 row numbers, the smaller first.

    Blank images ("") belong to no pair. Exact, in memory for the hashes and the pairs: hashes that differ in d
    bits agree in at least one of d + 1 groups of bits, so only those that agree in a group are compared.

    Source: Manku, Jain and Das Sarma 2007, WWW, "Detecting near-duplicates for web crawling", section 3.

    >>> near_duplicates(["00000000000000ff", "", "00000000000000fe", "ffffffffffffffff"]).tolist()
    [[0, 2]]
    """
    rows = np.array([row for row, text in enumerate(hashes) if text], dtype=np.int64)
    values = np.array([int(hashes[row], 16) for row in rows], dtype=np.uint64)
    edges = np.linspace(0, 64, max_distance + 2).round().astype(int)
    masks = [np.uint64(((1 << int(high - low)) - 1) << int(low)) for low, high in pairwise(edges)]
    found = []
    for place, mask in enumerate(masks):
        order = np.argsort(values & mask, kind="stable")
        ordered = values[order]
        here = np.arange(len(ordered) - 1)
        for step in range(1, len(ordered)):
            # Equal groups stand together: what has no partner at this step has none further on.
            here = here[here < len(ordered) - step]
            differing = ordered[here] ^ ordered[here + step]
            agree = (differing & mask) == 0
            here, differing = here[agree], differing[agree]
            if not here.size:
                break
            close = np.bitwise_count(differing) <= max_distance
            for earlier in masks[:place]:  # such a pair was found there
                close &= (differing & earlier) != 0
            found.append(np.stack([order[here[close]], order[here[close] + step]], axis=1))
    pairs = np.concatenate(found) if found else np.empty((0, 2), dtype=np.int64)
    pairs = np.sort(rows[pairs], axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def likeness(one: np.ndarray, other: np.ndarray) -> float:
    """The correlation of two images' details, -1 to 1: about 1 for copies, whatever their size and brightness.

    Both are reduced to 64 x 64, and their broad shapes are taken away, which all images of one body part
    share. A perceptual hash proposes a pair; so it is decided.

    >>> image = np.random.default_rng(0).integers(0, 256, (70, 70), dtype=np.uint8)
    >>> round(likeness(image, image // 2), 2)
    1.0
    """
    return float(_likenesses(_details(one)[None], _details(other)[None])[0, 0])


def _details(pixels: np.ndarray) -> np.ndarray:
    """What `likeness` compares: 4096 values of length 1 and mean 0; all 0 where there is nothing but shape."""
    small = _resized(_gray(pixels), _COMPARED_PX)
    rest = small - scipy.ndimage.gaussian_filter(small, 4.0, mode="nearest")
    rest = (rest - rest.mean()).ravel()
    norm = float(np.linalg.norm(rest))
    return rest / np.float32(norm) if norm > 0 else rest


def _likenesses(ones: np.ndarray, others: np.ndarray) -> np.ndarray:
    """N M from the details of N and of M images."""
    likenesses: np.ndarray = ones @ others.T
    return likenesses


def _resized(gray: np.ndarray, side_px: int) -> np.ndarray:
    return np.asarray(Image.fromarray(gray).resize((side_px, side_px), Image.Resampling.BOX))


def find_near_duplicates(
    samples: pd.DataFrame,
    preview: Callable[[str], np.ndarray],
    *,
    max_distance: int = 4,
    min_likeness: float = 0.95,
) -> pd.DataFrame:
    """For every row, whether it is nearly equal to an image of another official split or of another patient.

    Pairs come from `near_duplicates` and are decided as by `likeness`; exact copies are left to `find_duplicates`.
    Of a pair the row in the less precious split is marked, else the later one, and named is the most precious
    image that it was found to be like.

    Thousands of images can have one hash: templates, localizers, nearly blank ones. Among images of one hash
    those that are like an earlier, more precious one are represented by it, and an image is compared with
    representatives: once where all are alike. So a copy names the representative of several that it is like. No
    leak is lost: where likeness to a representative leaves open whether an image is like one that it represents,
    that one is asked too. Unlike images of one hash are compared each with each.

    Args:
        samples: columns sample_id, phash, pixels_sha256, patient, given_split.
        preview: sample_id -> H W or H W 3.
        max_distance: bits in which two hashes may differ.
        min_likeness: least correlation of the details.

    Returns:
        Columns `near_duplicate` ("near_duplicate_across_splits", "near_duplicate_across_patients" or "") and
        `near_duplicate_of`, indexed like `samples`.
    """
    order = np.argsort([PRECEDENCE.index(split) for split in samples["given_split"]], kind="stable")
    ordered = samples.iloc[order]
    copies = _NearCopies(ordered, preview, min_likeness)
    by_hash = ordered.groupby("phash", sort=False).indices
    groups = [np.asarray(rows) for phash, rows in by_hash.items() if phash]
    for rows in groups:
        if copies.matter(rows):
            copies.representatives(rows)
    for pair in near_duplicates([phash for phash in map(str, by_hash) if phash], max_distance):
        one, other = (groups[place] for place in pair)
        if copies.matter(np.concatenate([one, other])):
            copies.compare(one, copies.representatives(other))
            copies.compare(other, copies.representatives(one))
    names, splits = ordered["sample_id"].tolist(), ordered["given_split"].tolist()
    kinds, originals = [""] * len(order), [""] * len(order)
    for row in np.flatnonzero(copies.original < len(order)):
        original = copies.original[row]
        kinds[order[row]] = (
            f"near_duplicate_across_{'patients' if splits[row] == splits[original] else 'splits'}"
        )
        originals[order[row]] = names[original]
    return pd.DataFrame(
        {"near_duplicate": kinds, "near_duplicate_of": originals}, index=samples.index, dtype=object
    )


class _NearCopies:
    """Which rows of a table, the most precious first, are nearly equal to an earlier one.

    Attributes:
        original: for each row the first that it was found to be nearly equal to and that is another image of
            another patient or split; the number of rows where there is none.
    """

    def __init__(
        self, ordered: pd.DataFrame, preview: Callable[[str], np.ndarray], min_likeness: float
    ) -> None:
        names = ordered["sample_id"].tolist()
        self.original = np.full(len(names), len(names))
        self._images = pd.factorize(ordered["pixels_sha256"])[0]
        self._holders = ordered.groupby(["patient", "given_split"], sort=False).ngroup().to_numpy()
        self._details_of = lru_cache(_NUM_DETAILS_KEPT)(lambda row: _details(preview(names[row])))
        self._min_likeness = min_likeness
        # Of two images that are like a third, the likeness is at least this: twice the angle.
        self._doubtful_from = 2 * min_likeness**2 - 1
        self._alike: dict[int, list[int]] = {}  # representative -> rows
        self._representatives: dict[int, np.ndarray] = {}  # by the first row of those of one hash

    def matter(self, rows: np.ndarray) -> bool:
        """Whether there can be a near copy among these rows: several images of several patients or splits."""
        return bool(np.ptp(self._images[rows]) and np.ptp(self._holders[rows]))

    def representatives(self, rows: np.ndarray) -> np.ndarray:
        """Those of the rows of one hash that are like none before them; the others are compared with these."""
        if rows[0] not in self._representatives:
            found: list[int] = []
            for block in _blocks(rows):
                details = self._details(block)
                unlike = np.ones(len(block), dtype=bool)
                for some in _blocks(np.array(found, dtype=np.int64)):
                    self._assign(block, unlike, some, _likenesses(details, self._details(some)))
                while unlike.any():
                    place = int(unlike.argmax())
                    unlike[place] = False
                    new = block[place : place + 1]
                    self._alike[int(new[0])] = []
                    self._assign(block, unlike, new, _likenesses(details, details[place : place + 1]))
                    found.append(int(new[0]))
            self._representatives[rows[0]] = np.array(found)
        return self._representatives[rows[0]]

    def compare(self, rows: np.ndarray, others: np.ndarray) -> None:
        """Look for originals of the rows among the others, and where need be among those they represent."""
        for block in _blocks(rows):
            for some in _blocks(others[others < block.max()]):
                self._judge(block, some, _likenesses(self._details(block), self._details(some)))

    def _assign(
        self, rows: np.ndarray, unlike: np.ndarray, representatives: np.ndarray, likenesses: np.ndarray
    ) -> None:
        """Judge the rows, and leave each that was `unlike` all so far to the first that it is like."""
        alike = likenesses >= self._min_likeness
        joins = unlike & alike.any(axis=1)
        for row, place in zip(rows[joins], alike[joins].argmax(axis=1), strict=True):
            self._alike[int(representatives[place])].append(int(row))
        unlike &= ~joins
        self._judge(rows, representatives, likenesses)

    def _judge(self, rows: np.ndarray, others: np.ndarray, likenesses: np.ndarray) -> None:
        matters = (
            (others < rows[:, None])
            & (self._images[others] != self._images[rows, None])
            & (self._holders[others] != self._holders[rows, None])
        )
        alike = likenesses >= self._min_likeness
        first = np.where(matters & alike, others, len(self.original)).min(axis=1)
        self.original[rows] = np.minimum(self.original[rows], first)
        doubtful = matters & ~alike & (likenesses >= self._doubtful_from)
        for place in np.flatnonzero(doubtful.any(axis=0)):
            represented = np.array(self._alike.get(int(others[place]), ()), dtype=np.int64)
            self.compare(rows[doubtful[:, place]], represented)

    def _details(self, rows: np.ndarray) -> np.ndarray:
        return np.stack([self._details_of(row) for row in rows.tolist()])


def _blocks(rows: np.ndarray) -> Iterator[np.ndarray]:
    return (rows[start : start + _BLOCK] for start in range(0, len(rows), _BLOCK))


# --- Tables -----------------------------------------------------------------------------------------


def are_outliers(values: pd.Series, *, limit: float = 5.0) -> pd.Series:
    """Whether positive numbers stand apart on a logarithmic scale; NaN does not.

    The distance from the median is measured in robust standard deviations (1.4826 times the median absolute
    deviation), which are at least 2 %: where most are equal, others may still be rounded otherwise.

    Source: Iglewicz and Hoaglin 1993, How to Detect and Handle Outliers, section 3.3; their limit is 3.5.

    >>> are_outliers(pd.Series([0.5, 0.5, 0.51, 0.5, 5.0, None])).tolist()
    [False, False, False, False, True, False]
    """
    logs: pd.Series = values.astype(float).where(values > 0).map(np.log)
    distance = (logs - logs.median()).abs()
    return distance > limit * max(1.4826 * distance.median(), 0.02)


def box_problems(boxes: pd.DataFrame, samples: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """The boxes with columns has_area, is_inside, is_of_a_sample and is_of_a_class.

    Args:
        boxes: columns sample_id, class, x0, y0, x1, y1.
        samples: columns sample_id, height_px, width_px.
        classes: of the dataset.
    """
    sized = boxes.merge(samples[["sample_id", "height_px", "width_px"]], on="sample_id", how="left")
    known = sized["height_px"].notna()
    inside = (
        (sized[["x0", "y0"]].min(axis=1) >= 0)
        & (sized["x1"] <= sized["width_px"])
        & (sized["y1"] <= sized["height_px"])
    )
    return boxes.reset_index(drop=True).assign(
        has_area=(sized["x1"] > sized["x0"]) & (sized["y1"] > sized["y0"]),
        is_inside=inside | ~known,  # an unknown sample is a fault of its own
        is_of_a_sample=known,
        is_of_a_class=sized["class"].isin(list(classes)),
    )


def checked_samples(
    folder: DatasetFolder,
    *,
    blank_std: float,
    min_side_px: int,
    min_slices: int,
    near_distance_bits: int,
    near_likeness: float,
) -> pd.DataFrame:
    """The sample table, and a column for each check that a table of its values alone does not give.

    Added are is_labelled, is_one_hot, is_blank, is_tiny, is_patient_elsewhere, is_spacing_outlier, has_<finding>,
    those of `find_duplicates` and `find_near_duplicates` with the official split of what is kept (kept_split,
    near_kept_split), and, where the dataset has what they need, tissue_fraction, is_finite and mask_agrees
    (None where there is no mask or no label).

    Args:
        folder: the dataset.
        blank_std: standard deviation of the intensities, 0..1, under which an image is blank.
        min_side_px: least number of rows and columns.
        min_slices: least number of slices of a volume.
        near_distance_bits: see `near_duplicates`.
        near_likeness: see `find_near_duplicates`.

    Raises:
        ValueError: if the table lacks the statistics that ingest writes.
    """
    samples = folder.samples.reset_index(drop=True)
    info = folder.info
    for column in ("stat_mean", "stat_std"):
        if column not in samples:
            raise ValueError(
                f"{folder.path / 'samples.parquet'}: no column {column!r}; run `cadx ingest` again"
            )
    labels = samples[list(info.label_columns)]
    rank = samples["given_split"].map({split: place for place, split in enumerate(PRECEDENCE)})
    blank = (samples["stat_std"] < blank_std) & (info.kind != "features")
    if info.kind == "volume":  # the middle slice of a mask or of a small organ may be empty
        looked_at = samples.loc[blank, "sample_id"]
        blank = samples["sample_id"].isin([name for name in looked_at if np.ptp(folder.pixels(name)) == 0])
    # Blank images equal each other by nature: they have a rule of their own.
    comparable = samples[~blank & rank.notna()]
    copies = find_duplicates(comparable, info.label_columns).join(
        find_near_duplicates(
            comparable,
            folder.preview,
            max_distance=near_distance_bits,
            min_likeness=near_likeness,
        )
    )
    copies = copies.reindex(samples.index, fill_value="")
    best = rank.where(samples["given_split"] != "").groupby(samples["patient"]).transform("min")
    sides = samples[["height_px", "width_px"]].min(axis=1)
    findings = samples["findings"]
    splits = samples.set_index("sample_id")["given_split"]
    return samples.assign(
        is_labelled=labels.notna().any(axis=1),
        is_one_hot=labels.isna().all(axis=1)
        | (labels.notna().all(axis=1) & ((labels == 1).sum(axis=1) == 1)),
        is_blank=blank,
        is_tiny=(sides < min_side_px) | ((info.kind == "volume") & (samples["depth_px"] < min_slices)),
        is_patient_elsewhere=(samples["given_split"] != "") & (rank > best),
        is_spacing_outlier=pd.concat([are_outliers(samples[name]) for name in _SPACINGS], axis=1).any(axis=1),
        kept_split=copies["duplicate_of"].map(splits).fillna(""),
        near_kept_split=copies["near_duplicate_of"].map(splits).fillna(""),
        **{f"has_{code}": findings.str.contains(rf"(?:^|; ){code}:") for code in GEOMETRY_FINDINGS},
        **_content_checks(folder, samples),
        **{str(name): column for name, column in copies.items()},
    )


def _content_checks(folder: DatasetFolder, samples: pd.DataFrame) -> dict[str, Any]:
    """Columns that no table holds: what masks, tissue and features say; None where a sample has none."""
    info = folder.info
    columns: dict[str, Any] = {}
    if info.kind == "slide":
        columns["tissue_fraction"] = [float(folder.tissue(name).mean()) for name in samples["sample_id"]]
    if info.kind == "features":
        columns["is_finite"] = [bool(np.isfinite(folder.pixels(name)).all()) for name in samples["sample_id"]]
    if info.positive is not None and (samples["mask_path"] != "").any():
        positive = samples[f"label_{info.positive}"]
        agrees: list[bool | None] = []
        for name, path, label in zip(samples["sample_id"], samples["mask_path"], positive, strict=True):
            mask = folder.mask(name) if path and not np.isnan(label) else None
            agrees.append(None if mask is None else bool(mask.any()) == bool(label))
        columns["mask_agrees"] = pd.Series(agrees, dtype=object)
    return columns


def feature_table(folder: DatasetFolder) -> pd.DataFrame:
    """A row per feature: its name and its range over all instances of all bags."""
    width = int(folder.samples["width_px"].mode()[0])
    low, high = np.full(width, np.inf), np.full(width, -np.inf)
    for sample_id in folder.samples.loc[folder.samples["width_px"] == width, "sample_id"]:
        bag = folder.pixels(sample_id)
        low, high = np.fmin(low, np.fmin.reduce(bag)), np.fmax(high, np.fmax.reduce(bag))
    return pd.DataFrame({"feature": np.arange(width), "range": high - low})
