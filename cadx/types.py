"""The vocabulary: configuration, units, tasks, samples and predictions.

The axis order is fixed here and nowhere else:

    image    C H W      volume  C D H W  (D, H, W = superior, anterior, right: RAS+)
    batch    N ...      bag     T E      (tiles, embedding)
    boxes    N 4        x0 y0 x1 y1, 0-based, half-open, in stored pixels
    labels   N K        one column per class, NaN = unlabelled

Raw pixels, before preprocessing, are H W (gray) or H W 3 (colour), uint8 or uint16, with black = 0. Raw voxels
are D H W in the file's own scale (HU for CT), uint8, uint16, int16 or float32.
"""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NewType, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:  # the command line starts without NumPy
    import numpy as np

Task = Literal["binary", "multiclass", "multilabel", "detection"]
Kind = Literal["image", "volume", "slide", "features"]
"""What one sample is: a 2D image; a 3D volume; a whole slide; or a bag of feature vectors."""
Split = Literal["train", "val", "calibration", "test", "excluded"]
Judged = Literal["val", "calibration", "test", "folds"]
"""What answers are scored on: a split, or the folds of a cross-validation, each by the network that did not see it."""
Aggregation = Literal["none", "max", "mean"]
"""What becomes of a patient's images before they are scored: each stands for itself, or all become one case with the
highest, or the mean, of their probabilities."""

Millimetres = NewType("Millimetres", float)
Micrometres = NewType("Micrometres", float)
MicrometresPerPixel = NewType("MicrometresPerPixel", float)
Digest = NewType("Digest", str)  # "sha256:" and 64 hex digits


class Config(BaseModel):
    """A frozen, closed record: an unknown field is an error, never ignored, as is a number that is not finite.

    Lax on numbers on purpose: Kubeflow hands 7 over as 7.0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Estimate(Config):
    """A value with its 95 % interval; None where undefined, and `method` then says why.

    Attributes:
        value: the estimate; the mean over seeds where there are several.
        low: lower limit, None where there is no interval.
        high: upper limit, None where there is no interval.
        n: cases that the value rests on: those in its denominator.
        method: how the interval was made, in words.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    method: str


class Knots(Config):
    """A rising curve through points, straight between them and level beyond: what isotonic calibration fits.

    Attributes:
        probability: before, rising.
        calibrated: after, never falling, within 0..1.
    """

    probability: tuple[float, ...] = Field(min_length=1)
    calibrated: tuple[float, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _rising(self) -> Self:
        before, after = self.probability, self.calibrated
        rising = list(before) == sorted(before) and list(after) == sorted(after)
        if len(before) != len(after) or not rising or not 0 <= after[0] <= after[-1] <= 1:
            raise ValueError("give as many of both, rising, calibrated ones within 0..1")
        return self


class Conformal(Config):
    """How prediction sets are made: a class is possible where 1 - its probability <= its quantile.

    Attributes:
        coverage: the declared share of cases whose set holds the truth, each patient weighing one.
        quantiles: class -> quantile; 1 where the calibration split is too small to rule the class out ever.
        absent: multilabel: class -> quantile of its absence, which is possible where the probability <= it.
        patients: class -> patients that its quantile rests on.
        images: class -> images that it rests on; empty in bundles of before these were counted.
    """

    coverage: float = Field(gt=0, lt=1)
    quantiles: dict[str, float]
    absent: dict[str, float] = Field(default_factory=dict)
    patients: dict[str, int] = Field(default_factory=dict)
    images: dict[str, int] = Field(default_factory=dict)


@dataclass(frozen=True)
class RawImage:
    """One 2D image as read from a file, before any preprocessing.

    Attributes:
        pixels: H W or H W 3, uint8 or uint16, black = 0, full range used by the format's own scale.
        spacing_mm: (row, column) distance between pixel centres, or None where the file does not say.
        attributes: what the file says of the patient's group and the machine, identifiers never among
            them: any of `site`, `scanner`, `age` (years), `sex` (F, M, O), `view`.
        patient: the file's patient identifier as it stands there. It must be replaced by a pseudonym
            before it is written, logged or shown.
        assumptions: what was not in the file and was taken as given, in words.
    """

    pixels: "np.ndarray"
    spacing_mm: tuple[Millimetres, Millimetres] | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    patient: str | None = field(default=None, repr=False)
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawVolume:
    """One 3D image as read from a file or a series, brought to RAS+ axes, before any preprocessing.

    Attributes:
        voxels: D H W = S, A, R: index 0 is the most inferior slice, posterior row, left column. uint8, uint16,
            int16 or float32, in the file's own scale (for CT: HU).
        spacing_mm: (D, H, W) distance between voxel centres.
        affine: 4 4, from (d, h, w, 1), a voxel's indices, to its centre's (right, anterior, superior, 1) in mm;
            None where the file does not say how its axes run and `voxels` rests on an assumption.
        stored_axes: which way the axes of a NIfTI file's own array run, fastest first ("LAS" = left, anterior,
            superior); None for a series, whose slices have no order but that of their places.
        attributes: as in `RawImage`.
        patient: as in `RawImage`.
        assumptions: as in `RawImage`.
        findings: what is doubtful about its geometry, as "code: words", codes being missing_slices,
            duplicate_slices, uneven_spacing, gantry_tilt, oblique; empty if nothing is. `validate` judges it.
    """

    voxels: "np.ndarray"
    spacing_mm: tuple[Millimetres, Millimetres, Millimetres]
    affine: "np.ndarray | None" = field(default=None, repr=False)
    stored_axes: str | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    patient: str | None = field(default=None, repr=False)
    assumptions: tuple[str, ...] = ()
    findings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prediction:
    """What a bundle says of one image.

    Attributes:
        probabilities: class name -> probability in 0..1, calibrated; sums to 1 unless multilabel.
        decision: the class, or for multilabel the classes, at the bundle's operating point.
        attention: H W float32, 0..1, in the coordinates of the raw image; None unless asked for.
        embedding: F float32, the features that the classifier sees.
        statistics: image statistics of the raw pixels (`drift.image_statistics`).
        prediction_set: the classes that cannot be ruled out, which hold the truth as often as the bundle declares
            (`cadx.conformal`); None where the bundle has none.
        refer: a person should look at it: the set does not say what `decision` says, and nothing else.
        warnings: why this answer deserves care, in words (an assumption, an unusual input).
    """

    probabilities: dict[str, float]
    decision: str | tuple[str, ...]
    attention: "np.ndarray | None"
    embedding: "np.ndarray"
    statistics: dict[str, float]
    warnings: tuple[str, ...] = ()
    prediction_set: tuple[str, ...] | None = None
    refer: bool = False


def check_pixels(pixels: "np.ndarray") -> None:
    """Accept raw pixels, H W or H W 3, uint8 or uint16, not empty.

    Raises:
        ValueError: if they are anything else.
    """
    if str(pixels.dtype) not in ("uint8", "uint16"):
        raise ValueError(f"pixels: dtype is {pixels.dtype}; convert to uint8 or uint16 with black = 0")
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)) or pixels.size == 0:
        raise ValueError(f"pixels: shape is {pixels.shape}; give H W (gray) or H W 3 (colour), not empty")
