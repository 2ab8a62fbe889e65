"""The phantom mammography cohort: real PNG, small boxes, the same bytes each time, and no toy."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from pydantic import ValidationError

from benchmarks.phantoms import statistics_auc
from cadx.catalog import ENTRY, TableEntry
from cadx.drift import image_statistics
from cadx.files import digest_path
from cadx.phantom.cohort import Faults, Shift
from cadx.phantom.lesion import CLASSES, LesionPhantom
from cadx.reading.identifiers import file_identifiers
from cadx.reading.images import read_image

SMALL = LesionPhantom(num_patients=20, prevalence=0.5, seed=5)


class Mammograms:
    """A written cohort, read back."""

    def __init__(self, folder: Path, config: LesionPhantom) -> None:
        config.write(folder)
        self.folder = folder
        self.table = pd.read_csv(folder / "labels.csv")
        self.boxes = pd.read_csv(folder / "boxes.csv")

    def pixels(self, file: str) -> np.ndarray:
        return read_image(self.folder / file).pixels

    def shown(self, file: str) -> np.ndarray:
        pixels = self.pixels(file)
        return pixels / np.iinfo(pixels.dtype).max


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Mammograms:
    return Mammograms(tmp_path_factory.mktemp("lesions") / "cohort", SMALL)


# --- What is on disk ----------------------------------------------------------------------------------


def test_the_same_configuration_writes_the_same_bytes(small: Mammograms, tmp_path: Path) -> None:
    again = Mammograms(tmp_path / "again", SMALL)
    assert digest_path(again.folder) == digest_path(small.folder)
    other = Mammograms(tmp_path / "other", SMALL.model_copy(update={"seed": 6}))
    assert digest_path(other.folder / "images") != digest_path(small.folder / "images")


def test_tables_agree_and_images_without_boxes_are_there(small: Mammograms) -> None:
    table, boxes = small.table, small.boxes
    assert table["file"].tolist() == sorted(f"images/{p.name}" for p in (small.folder / "images").iterdir())
    for kind in CLASSES:
        assert set(table["file"][table[f"label_{kind}"] == 1]) == set(boxes["file"][boxes["class"] == kind])
    num_ill = boxes["file"].nunique()
    assert num_ill == round(0.5 * len(table))
    per_image = boxes.groupby("file").size()
    assert per_image.max() <= 6
    assert per_image.max() >= 3
    assert {str(small.pixels(file).dtype) for file in table["file"]} == {"uint8", "uint16"}


def test_boxes_are_half_open_within_the_image_and_small(small: Mammograms) -> None:
    boxes = small.boxes
    width, height = boxes["x1"] - boxes["x0"], boxes["y1"] - boxes["y0"]
    assert (boxes[["x0", "y0"]] >= 0).all().all()
    assert (boxes["x1"] <= 384).all()
    assert (boxes["y1"] <= 512).all()
    longer = np.maximum(width, height)
    assert width.min() >= 3
    assert height.min() >= 3
    assert longer.max() <= 48
    assert 7 < longer.median() < 22


def test_the_layout_is_an_entry_of_the_catalogue() -> None:
    common = {
        "title": "Phantom",
        "task": "detection",
        "classes": ("Mass", "Calcifications"),
        "modality": "mammography",
        "licence": "none",
        "citation": "none",
        "patient": "public",
        "file": "cohort",
    }
    entry = ENTRY.validate_python(common | SMALL.layout(("Mass", "Calcifications")))
    assert isinstance(entry, TableEntry)
    assert entry.boxes is not None
    words = entry.boxes.model_dump()["values"]
    assert words == {"mass": "Mass", "calcification_cluster": "Calcifications"}


def test_every_file_is_free_of_identifiers(small: Mammograms) -> None:
    assert [file for file in small.table["file"] if file_identifiers(small.folder / file)] == []


# --- Options ------------------------------------------------------------------------------------------


def test_an_impossible_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="the smaller one first"):
        LesionPhantom(lesion_size_px=(20, 10))
    with pytest.raises(ValidationError):
        LesionPhantom.model_validate({"clincal": True})


def test_faults_are_planted_in_as_many_files_as_asked(tmp_path: Path) -> None:
    faults = Faults(identifiers=4, corrupt_files=3)
    cohort = Mammograms(tmp_path / "cohort", SMALL.model_copy(update={"faults": faults}))
    refused, identified = 0, 0
    for file in cohort.table["file"]:
        try:
            cohort.pixels(file)
        except ValueError:
            refused += 1
        else:
            identified += bool(file_identifiers(cohort.folder / file))
    assert (refused, identified) == (3, 4)


def test_duplicates_are_the_same_pixels_and_boxes_under_another_patient(tmp_path: Path) -> None:
    few = SMALL.model_copy(update={"num_patients": 8, "images_per_patient": 1.0, "prevalence": 1.0})
    cohort = Mammograms(tmp_path / "cohort", few.model_copy(update={"faults": Faults(duplicates=3)}))
    patients: dict[bytes, set[str]] = {}
    boxes: dict[bytes, set[tuple[tuple[object, ...], ...]]] = {}
    for file, patient in zip(cohort.table["file"], cohort.table["patient"], strict=True):
        key = (cohort.folder / file).read_bytes()
        patients.setdefault(key, set()).add(patient)
        rows = cohort.boxes[cohort.boxes["file"] == file].drop(columns="file")
        boxes.setdefault(key, set()).add(tuple(rows.itertuples(index=False, name=None)))
    assert sorted(map(len, patients.values())) == [1] * 5 + [2] * 3
    assert all(len(found) == 1 for found in boxes.values())


@pytest.mark.parametrize("shift", [Shift(gamma=1.5), Shift(blur_sigma_px=1.5), Shift(new_scanner=True)])
def test_a_shift_changes_the_images_and_neither_patients_nor_boxes(
    small: Mammograms, tmp_path: Path, shift: Shift
) -> None:
    after = Mammograms(tmp_path / "after", SMALL.model_copy(update={"shift": shift}))
    kept = ["file", "patient", "site", "age", "sex", "view"]
    assert after.table[kept].equals(small.table[kept])
    assert after.boxes.equals(small.boxes)
    for file in small.table["file"]:
        one, other = (image_statistics(cohort.pixels(file)) for cohort in (small, after))
        if shift.gamma != 1:
            assert other["mean"] < one["mean"]
        elif shift.blur_sigma_px:
            assert other["sharpness"] < one["sharpness"]
        else:
            assert other["mean"] != one["mean"]


# --- No toy -------------------------------------------------------------------------------------------


def test_lesions_are_in_their_boxes_and_nowhere_else(tmp_path: Path) -> None:
    """Against the same patients without any: all else, noise included, stays as it is."""
    few = SMALL.model_copy(update={"num_patients": 10, "images_per_patient": 1.0})
    ill = Mammograms(tmp_path / "ill", few.model_copy(update={"prevalence": 1.0}))
    well = Mammograms(tmp_path / "well", few.model_copy(update={"prevalence": 0.0}))
    assert len(well.boxes) == 0
    for file in ill.table["file"]:
        difference = ill.shown(file) - well.shown(file)
        outside = np.ones(difference.shape, dtype=bool)
        for box in ill.boxes[ill.boxes["file"] == file].itertuples():
            assert difference[box.y0 : box.y1, box.x0 : box.x1].max() > 0.03
            outside[max(0, box.y0 - 5) : box.y1 + 5, max(0, box.x0 - 5) : box.x1 + 5] = False
        assert np.abs(difference[outside]).max() < 0.03


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Mammograms:
    return Mammograms(tmp_path_factory.mktemp("lesions") / "default", LesionPhantom())


@pytest.fixture(scope="module")
def statistics(default: Mammograms) -> pd.DataFrame:
    rows = []
    for person in default.table.to_dict("records"):
        pixels = default.pixels(person["file"])
        deciles = np.percentile(
            pixels / np.iinfo(pixels.dtype).max, (10, 30, 50, 60, 70, 80, 90, 95, 98, 99.9)
        )
        rows.append(
            image_statistics(pixels)
            | {f"quantile_{index}": value for index, value in enumerate(deciles)}
            | {name: person[name] for name in ("age", "site", "scanner", "view")}
        )
    return pd.DataFrame(rows)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_intensity_statistics_and_metadata_do_not_give_the_label_away(
    default: Mammograms, statistics: pd.DataFrame, kind: str
) -> None:
    auc = statistics_auc(statistics, default.table[f"label_{kind}"], default.table["patient"])
    assert auc <= 0.70


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_an_oracle_that_reads_the_boxes_is_nearly_perfect(default: Mammograms, kind: str) -> None:
    from sklearn.metrics import roc_auc_score

    counts = default.boxes[default.boxes["class"] == kind].groupby("file").size()
    found = counts.reindex(default.table["file"], fill_value=0)
    assert 800 <= len(default.table) <= 1000
    assert roc_auc_score(default.table[f"label_{kind}"], found) >= 0.99


@pytest.mark.slow
def test_lesions_stand_out_from_a_ring_around_their_box(default: Mammograms) -> None:
    """Brighter than their surroundings in most, in spite of the gland around them: they can be found."""
    brighter = []
    for file, rows in default.boxes.groupby("file"):
        shown = default.shown(str(file))
        for box in rows.itertuples():
            inner = shown[box.y0 : box.y1, box.x0 : box.x1]
            outer = shown[max(0, box.y0 - 6) : box.y1 + 6, max(0, box.x0 - 6) : box.x1 + 6]
            ring = (outer.sum() - inner.sum()) / (outer.size - inner.size)
            centre = inner.mean() if box[2] == "mass" else np.quantile(inner, 0.97)
            brighter.append(centre > ring)
    assert np.mean(brighter) > 0.9


def test_png_bits_are_those_of_the_site(small: Mammograms) -> None:
    modes = {}
    for file, site in zip(small.table["file"], small.table["site"], strict=True):
        with Image.open(small.folder / file) as image:
            modes.setdefault(site, set()).add(image.mode)
    assert all(len(found) == 1 for found in modes.values())
    assert len({frozenset(found) for found in modes.values()}) == 2
