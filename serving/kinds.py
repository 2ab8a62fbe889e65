"""The four kinds of request: what each sends, what it gets back, and how an answer explains itself."""

import base64
import gzip
import io
import json
import os
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from cadx.calibration import at_prevalence
from cadx.drift import image_statistics
from cadx.explaining import overlay
from cadx.loading import VolumePreprocessing
from cadx.predicting.bags import EmbeddedSlides, RawSlide, SlideSubject
from cadx.reading.images import read_image
from cadx.reading.source import HEAD_BYTES, sniff
from cadx.reading.volumes import read_volume
from cadx.types import Prediction, RawImage, RawVolume
from serving.answering import Answerer, Outcome, RequestLog, png_text

SLIDE_ROOT = "CADX_SLIDE_ROOT"
"""Environment variable: the folder that holds the slides which may be asked about; without it none may."""
GOLDEN_SLIDES = "CADX_GOLDEN_SLIDES"
"""Environment variable: the folder of slides that a deployment asks about."""
SLIDE_CACHE = "CADX_SLIDE_CACHE"
"""Environment variable: the folder of embeddings of slides that were answered; without it none are kept."""
MAX_SLIDE_REQUEST_BYTES = 4096
SHOWN_TILES = 64
"""Tiles of a slide that an explanation lists, those with most attention."""
_NEXT_IMAGE = re.compile(rb"\xff\xd9\x00*\xff\xd8\xff|\x89PNG\r\n\x1a\n|DICM\x02\x00\x00\x00UL")
"""Where another JPEG, PNG or DICOM file starts."""
MAX_MAP_BYTES = 32 << 20
"""Of a packed attention map; the response may not become larger than the server lets through."""


class LabelAnswerer(Answerer):
    """Answers with the probabilities of classes, and on request with where the model looked."""

    def predict(self, raws: Sequence[Any], *, attention: bool) -> list[Outcome]:
        """What the model says of samples."""
        return [
            self._outcome(raw, prediction)
            for raw, prediction in zip(
                raws, self._predictor.predict_many(raws, attention=attention), strict=True
            )
        ]

    @abstractmethod
    def explained(self, raw: Any, attention: np.ndarray) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Fields of the answer that show the attention over a raw sample, and warnings about them."""

    def findings(self, raw: Any) -> tuple[str, ...]:
        """What was noticed of a raw sample while it was read."""
        return ()

    def _outcome(self, raw: Any, prediction: Prediction) -> Outcome:
        explanation, warnings = (
            ({}, ()) if prediction.attention is None else self.explained(raw, prediction.attention)
        )
        said = {
            "probabilities": prediction.probabilities,
            "prediction_set": prediction.prediction_set,
            "refer": prediction.refer,
        }
        here = {"at_prevalence": self._here(prediction.probabilities)} if self._shares_here else {}
        return Outcome(
            {**said, **here, "decision": prediction.decision, **explanation},
            said,
            prediction.statistics,
            prediction.embedding,
            (*prediction.warnings, *self.findings(raw), *warnings),
        )

    def _here(self, probabilities: Mapping[str, float]) -> dict[str, dict[str, float]]:
        """What the probabilities are where the classes have the shares that the release declares."""
        manifest, shares = self._predictor.bundle.manifest, self._shares_here
        evaluated = [probabilities[name] for name in manifest.classes]
        here = at_prevalence(evaluated, manifest.prevalence, shares, manifest.task, manifest.classes)
        return {
            "prevalence": shares,
            "probabilities": dict(zip(manifest.classes, here.tolist(), strict=True)),
        }


class RadiographAnswerer(LabelAnswerer):
    """DICOM, PNG or JPEG in; probabilities out, and on request the attention map in the image's own size."""

    kind = "radiograph"

    def read(self, body: bytes, *, golden: bool) -> RawImage:
        """The image."""
        return _whole_image(body)

    def explained(self, raw: RawImage, attention: np.ndarray) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The map."""
        return {"attention_png": png_text(_levels(attention))}, ()


class DetectionAnswerer(Answerer):
    """DICOM, PNG or JPEG in; boxes out. They are their own explanation: attention is not asked of a detector."""

    kind = "detection"

    def read(self, body: bytes, *, golden: bool) -> RawImage:
        """The image."""
        return _whole_image(body)

    def predict(self, raws: Sequence[Any], *, attention: bool) -> list[Outcome]:
        """The boxes in images, in stored pixels and by falling score, and which of them the operating point calls."""
        classes, thresholds = self.release.classes, self._operating_point.thresholds
        for raw in raws:
            self._predictor.subject.require_spacing(raw)
        outcomes = []
        for raw, found in zip(raws, self._predictor.detect(raw.pixels for raw in raws), strict=True):
            boxes = [
                {
                    "class": classes[label],
                    "score": score,
                    "box_xyxy": box,
                    "called": score >= thresholds[classes[label]],
                }
                for box, label, score in zip(*(field.tolist() for field in found), strict=True)
            ]
            statistics = image_statistics(raw.pixels)
            called = {box["class"] for box in boxes if box["called"]}
            best = {
                name: max((box["score"] for box in boxes if box["class"] == name), default=0.0)
                for name in classes
            }
            said = {"boxes": boxes, "prediction_set": None, "refer": False}
            outcomes.append(
                Outcome(
                    said | {"decision": [name for name in classes if name in called]},
                    # A class's best score stands where other kinds have its probability: so one watch serves all.
                    said | {"probabilities": best},
                    statistics,
                    np.empty(0, np.float32),
                    (*raw.assumptions, *self._predictor.unusual(statistics)),
                )
            )
        return outcomes


class VolumeAnswerer(LabelAnswerer):
    """A NIfTI file or a zip of one DICOM series in; probabilities out, and on request where the model looked.

    That is a NIfTI overlay on the volume's own place in space, which any viewer lays over the original, and a
    picture of the axial slice that got most attention.
    """

    kind = "volume"

    def read(self, body: bytes, *, golden: bool) -> RawVolume:
        """The volume; its bytes are in memory alone, under a name that ends with the call."""
        file = os.memfd_create("volume", os.MFD_CLOEXEC)
        try:
            with open(file, "wb", closefd=False) as stream:
                stream.write(body)
            return read_volume(Path(f"/proc/self/fd/{file}"))
        finally:
            os.close(file)

    def findings(self, raw: RawVolume) -> tuple[str, ...]:
        """What is unusual in the series."""
        return raw.findings

    def explained(self, raw: RawVolume, attention: np.ndarray) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The map over the volume, and a picture of the slice with most of it."""
        most = int(attention.max(axis=(1, 2)).argmax())
        preprocessing = self._predictor.bundle.manifest.preprocessing
        assert isinstance(preprocessing, VolumePreprocessing)
        plane = raw.voxels[most].astype(np.float32)
        low, high = preprocessing.window_hu or (float(plane.min()), float(plane.max()))
        gray = (np.clip((plane - low) / max(high - low, 1e-6), 0, 1) * 255).round().astype(np.uint8)
        # As radiologists look at it: anterior above, the patient's right on the left.
        shown = overlay(gray[::-1, ::-1], attention[most, ::-1, ::-1])
        explained: dict[str, Any] = {"slice": most, "slice_png": png_text(shown), "nifti": None}
        packed = gzip.compress(encode_nifti(_levels(attention), raw.affine, raw.spacing_mm), 1, mtime=0)
        if len(packed) > MAX_MAP_BYTES:
            return {"attention": explained}, (
                "the attention map is too large to be sent; its slice is sent alone",
            )
        return {"attention": explained | {"nifti": base64.b64encode(packed).decode()}}, ()


class SlideAnswerer(LabelAnswerer):
    """The path of a slide under the allowed root in; probabilities out, and on request the tiles that decided.

    Slides are gigabytes, so they are not sent: the server reads them where they lie. What a slide's tiles were
    encoded to is kept by the slide's digest: asked again, it is answered at once.
    """

    kind = "slide"

    def __init__(self, folder: Path, *, device: str = "cpu", log: RequestLog | None = None) -> None:
        super().__init__(folder, device=device, log=log)
        if cache := os.environ.get(SLIDE_CACHE):
            assert isinstance(self._predictor.subject, SlideSubject)
            self._predictor.subject.cache = EmbeddedSlides(Path(cache))

    def read(self, body: bytes, *, golden: bool) -> RawSlide:
        """The slide that the body, {"path": ...}, names."""
        raw = self._predictor.subject.read(slide_under(_slide_root(golden), _asked_path(body)))
        assert isinstance(raw, RawSlide)
        return raw

    def attributes(self, raw: RawSlide) -> Mapping[str, Any]:
        """What the file says."""
        return raw.summary.attributes

    def explained(self, raw: RawSlide, attention: np.ndarray) -> tuple[dict[str, Any], tuple[str, ...]]:
        """The thumbnail with the map over it, and the tiles with most of it."""
        preprocessing = self._predictor.bundle.manifest.preprocessing
        side_um = preprocessing.tile_px * preprocessing.mpp  # type: ignore[union-attr]
        mpp = raw.summary.slide_mpp
        order = np.argsort(-raw.tiles.weights, kind="stable")[:SHOWN_TILES]
        shown = {
            "thumbnail_png": png_text(overlay(raw.summary.thumbnail, np.nan_to_num(attention))),
            "num_tiles": len(raw.tiles.weights),
            "tiles": [
                {
                    "x_px": round(x_um / mpp),
                    "y_px": round(y_um / mpp),
                    "side_px": round(side_um / mpp),
                    "weight": weight,
                }
                for (x_um, y_um), weight in zip(
                    raw.tiles.seen_um.numpy()[order].tolist(), raw.tiles.weights[order].tolist(), strict=True
                )
            ],
        }
        return {"attention": shown}, ()


def _whole_image(body: bytes) -> RawImage:
    """The one image that was sent."""
    raw = read_image(body)
    if _NEXT_IMAGE.search(body, HEAD_BYTES if sniff(body[:HEAD_BYTES]) == "DICOM" else 1):
        raise ValueError(
            "several images, one behind the other: the answer would be of the first; send each by itself"
        )
    return raw


def slide_under(root: Path | None, path: str) -> Path:
    """The slide's file, links followed, if it lies under `root`.

    Raises:
        ValueError: if it does not, or if `path` is absolute or climbs by "..". What is there outside of the root, or is
            not, sounds the same.
    """
    if root is None:
        raise ValueError(f"this server reads no slides; start it with {SLIDE_ROOT} set to their folder")
    asked = PurePosixPath(path)
    try:
        # A way through a place outside that ends under the root would tell whether that place is there.
        if not asked.is_absolute() and ".." not in asked.parts:
            home = root.resolve(strict=True)
            file = (home / asked).resolve(strict=True)
            if file.is_relative_to(home) and file.is_file():
                return file
    except (OSError, ValueError, RuntimeError):  # not there; a NUL in the path; a loop of links
        pass
    raise ValueError("no such slide under the server's slide root; give a path relative to it")


def encode_nifti(
    voxels: np.ndarray, affine: np.ndarray | None, spacing_mm: Sequence[float] = (1, 1, 1)
) -> bytes:
    """A NIfTI file that `read_volume` reads as these very voxels, D H W = S, A, R.

    Args:
        voxels: uint8, uint16, int16 or float32.
        affine: as in `RawVolume`; None for one of `spacing_mm` alone.
        spacing_mm: (D, H, W), used without an affine.
    """
    import nibabel

    if affine is None:
        depth_mm, height_mm, width_mm = spacing_mm
        affine = np.array(
            [[0, 0, width_mm, 0], [0, height_mm, 0, 0], [depth_mm, 0, 0, 0], [0, 0, 0, 1]], np.float64
        )
    image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), affine[:, [2, 1, 0, 3]])  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")  # type: ignore[no-untyped-call]
    out = io.BytesIO()
    image.to_stream(out)
    return out.getvalue()


def _asked_path(body: bytes) -> str:
    if len(body) > MAX_SLIDE_REQUEST_BYTES:
        raise ValueError('slides are not sent but named; send {"path": "..."}, relative to the slide root')
    try:
        path = json.loads(body)["path"]
    except (ValueError, KeyError, TypeError, RecursionError):
        path = None
    if not isinstance(path, str) or not path:
        raise ValueError('no slide named; send {"path": "..."}, relative to the slide root')
    return path


def _slide_root(golden: bool) -> Path | None:
    root = os.environ.get(GOLDEN_SLIDES if golden else SLIDE_ROOT)
    return Path(root) if root else None


def _levels(attention: np.ndarray) -> np.ndarray:
    """An attention map, 0..1, as uint8."""
    return np.rint(attention * 255).astype(np.uint8)
