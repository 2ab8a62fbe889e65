"""The phantom slide cohort: real pyramids that OpenSlide opens, the same bytes each time, and no toy."""

from pathlib import Path

import numpy as np
import openslide
import pandas as pd
import pytest
import tifffile
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import binary_dilation, distance_transform_edt, gaussian_filter

from benchmarks.phantoms import statistics_auc
from cadx.drift import image_statistics
from cadx.files import digest_path
from cadx.phantom.cohort import Faults, Shift
from cadx.phantom.slide import MASK_UM_PX, SITES, SlidePhantom
from cadx.reading.identifiers import file_identifiers
from cadx.reading.slides import open_slide, summarise_slide

SMALL = SlidePhantom(num_patients=12, slides_per_patient=1.0, prevalence=0.5, size_um=320, seed=1)


class Slides:
    """A written cohort, read back."""

    def __init__(self, folder: Path, config: SlidePhantom) -> None:
        config.write(folder)
        self.folder = folder
        self.table = pd.read_csv(folder / "labels.csv", keep_default_na=False)
        self.paths = [folder / file for file in self.table["file"]]

    def mask(self, row: int) -> np.ndarray | None:
        file = self.table["mask"][row]
        return np.asarray(Image.open(self.folder / file)) > 0 if file else None

    def thumbnail(self, row: int, um_px: float) -> np.ndarray:
        with open_slide(self.paths[row]) as slide:
            return slide.thumbnail(um_px)

    def texts(self) -> list[str]:
        found = []
        for path in self.paths:
            with tifffile.TiffFile(path) as file:
                found.append(file.pages[0].description)
        return found


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    return Slides(tmp_path_factory.mktemp("slides") / "cohort", SMALL)


# --- What is on disk ----------------------------------------------------------------------------------


def test_the_same_configuration_writes_the_same_bytes(small: Slides, tmp_path: Path) -> None:
    again = Slides(tmp_path / "again", SMALL)
    assert digest_path(again.folder) == digest_path(small.folder)
    other = Slides(tmp_path / "other", SMALL.model_copy(update={"seed": 2}))
    assert digest_path(other.folder / "images") != digest_path(small.folder / "images")


def test_openslide_knows_um_per_pixel_and_every_level(small: Slides) -> None:
    known = {site.scanner.model: site.scanner for site in SITES}
    vendors = set()
    for path, model in zip(small.paths, small.table["scanner"], strict=True):
        with openslide.OpenSlide(path) as slide:
            scanner = known[model]
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_X]) == pytest.approx(scanner.slide_mpp)
            assert float(slide.properties[openslide.PROPERTY_NAME_MPP_Y]) == pytest.approx(scanner.slide_mpp)
            assert slide.dimensions == (round(320 / scanner.slide_mpp),) * 2
            assert slide.level_downsamples == pytest.approx((1, 4, 16))
            vendors.add(slide.properties[openslide.PROPERTY_NAME_VENDOR])
    assert vendors == {"aperio", "generic-tiff"}


def test_levels_show_the_same_field(small: Slides) -> None:
    with openslide.OpenSlide(small.paths[0]) as slide:
        whole = slide.read_region((0, 0), 0, slide.dimensions).convert("RGB").reduce(4)
        level = slide.read_region((0, 0), 1, slide.level_dimensions[1]).convert("RGB")
    assert np.abs(np.asarray(whole, dtype=float) - np.asarray(level)).mean() < 6


def test_masks_cover_the_field_and_lie_in_the_tissue(small: Slides) -> None:
    table = small.table
    assert table["label_tumour"].sum() == 6
    assert ((table["mask"] != "") == (table["label_tumour"] == 1)).all()
    assert len(list((small.folder / "masks").iterdir())) == 6
    for row in table.index[table["label_tumour"] == 1]:
        mask = small.mask(row)
        assert mask is not None
        assert mask.shape == (320 // MASK_UM_PX,) * 2
        with Image.open(small.folder / table["mask"][row]) as image:
            assert 25400 / image.info["dpi"][0] == pytest.approx(MASK_UM_PX, rel=1e-3)
        white = small.thumbnail(row, MASK_UM_PX).min(axis=2) > 225
        assert white.shape == mask.shape
        assert (white & mask).sum() < 0.1 * mask.sum()


def test_tumour_covers_the_promised_share_of_the_tissue(tmp_path: Path) -> None:
    config = SlidePhantom(num_patients=4, slides_per_patient=1.0, prevalence=1.0, size_um=512, seed=3)
    cohort = Slides(tmp_path / "cohort", config)
    for row in cohort.table.index:
        mask = cohort.mask(row)
        assert mask is not None
        tissue = cohort.thumbnail(row, MASK_UM_PX).min(axis=2) < 225
        assert 0.015 < mask.sum() / tissue.sum() < 0.19


def test_our_reader_finds_tissue_on_a_white_ground(small: Slides) -> None:
    for path in small.paths:
        summary = summarise_slide(path)
        assert 0.25 < summary.tissue.mean() < 0.9
        outside = summary.thumbnail[~binary_dilation(summary.tissue, iterations=3)]
        assert np.median(outside) > 220


def test_every_file_is_free_of_identifiers(small: Slides) -> None:
    assert [path.name for path in small.paths if file_identifiers(path)] == []


# --- Options ------------------------------------------------------------------------------------------


def test_an_impossible_option_is_refused() -> None:
    with pytest.raises(ValidationError, match="shares of the tissue"):
        SlidePhantom(tumour_share=(0.2, 0.1))
    with pytest.raises(ValidationError, match="multiple of 64"):
        SlidePhantom(size_um=1000)


def test_faults_are_planted_in_as_many_files_as_asked(tmp_path: Path) -> None:
    named = Slides(tmp_path / "named", SMALL.model_copy(update={"faults": Faults(identifiers=5)}))
    texts = named.texts()
    assert sum("Phantom^Person" in text for text in texts) == 5
    for path, text in zip(named.paths, texts, strict=True):
        if text.startswith("Aperio"):
            assert bool(file_identifiers(path)) == ("Phantom^Person" in text)
    broken = Slides(tmp_path / "broken", SMALL.model_copy(update={"faults": Faults(corrupt_files=3)}))
    refused = 0
    for path in broken.paths:
        try:
            summarise_slide(path)
        except ValueError:
            refused += 1
    assert refused == 3


def test_duplicates_are_the_same_pixels_under_another_patient(tmp_path: Path) -> None:
    cohort = Slides(tmp_path / "cohort", SMALL.model_copy(update={"faults": Faults(duplicates=2)}))
    patients: dict[bytes, set[str]] = {}
    for path, patient in zip(cohort.paths, cohort.table["patient"], strict=True):
        patients.setdefault(path.read_bytes(), set()).add(patient)
    assert sorted(map(len, patients.values())) == [1] * 10 + [2, 2]


@pytest.mark.parametrize("shift", [Shift(gamma=1.5), Shift(blur_sigma_px=2.0), Shift(new_scanner=True)])
def test_a_shift_changes_the_images_and_not_the_patients(small: Slides, tmp_path: Path, shift: Shift) -> None:
    after = Slides(tmp_path / "after", SMALL.model_copy(update={"shift": shift}))
    kept = ["file", "patient", "site", "age", "sex", "label_tumour"]
    assert after.table[kept].equals(small.table[kept])
    for row in small.table.index:
        one, other = (image_statistics(cohort.thumbnail(row, 1.0)) for cohort in (small, after))
        if shift.gamma != 1:
            assert other["mean"] < one["mean"] - 0.02
        elif shift.blur_sigma_px:
            assert other["sharpness"] < one["sharpness"]
        else:
            assert abs(other["mean"] - one["mean"]) > 1e-3
    if shift.new_scanner:
        assert set(after.table["scanner"]) == {"Petrel Panorama"}


# --- No toy -------------------------------------------------------------------------------------------


def test_tumour_has_larger_nuclei_than_the_clusters_that_look_like_it(tmp_path: Path) -> None:
    """A pathologist's criterion, measured: how deep the darkest tissue is, in the nest and outside it, in um."""
    config = SlidePhantom(num_patients=3, slides_per_patient=1.0, prevalence=1.0, num_sites=1, size_um=512)
    cohort = Slides(tmp_path / "cohort", config)
    depths_um: dict[bool, list[float]] = {True: [], False: []}
    for row in cohort.table.index:
        mask = cohort.mask(row)
        assert mask is not None
        red = gaussian_filter(cohort.thumbnail(row, 0.5)[..., 0].astype(float), 1.5)
        depth_um = distance_transform_edt(red < 130) * 0.5
        in_nest = np.kron(mask, np.ones((8, 8))) > 0
        for nest, found in depths_um.items():
            found.extend(depth_um[(depth_um > 0) & (in_nest == nest)])
    assert np.quantile(depths_um[True], 0.95) > 1.4 * np.quantile(depths_um[False], 0.95)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Slides:
    return Slides(tmp_path_factory.mktemp("slides") / "default", SlidePhantom())


@pytest.mark.slow
def test_colour_statistics_and_metadata_do_not_give_the_label_away(default: Slides) -> None:
    rows = []
    for row, person in enumerate(default.table.to_dict("records")):
        pixels = default.thumbnail(row, 16.0)
        channels = {
            f"{colour}_{name}": value
            for index, colour in enumerate("rgb")
            for name, value in image_statistics(np.ascontiguousarray(pixels[..., index])).items()
        }
        rows.append(
            image_statistics(pixels)
            | channels
            | {name: person[name] for name in ("age", "sex", "site", "scanner")}
        )
    auc = statistics_auc(pd.DataFrame(rows), default.table["label_tumour"], default.table["patient"])
    assert auc <= 0.70


@pytest.mark.slow
def test_an_oracle_that_reads_the_mask_is_nearly_perfect(default: Slides) -> None:
    from sklearn.metrics import roc_auc_score

    areas = [mask.sum() if (mask := default.mask(row)) is not None else 0 for row in default.table.index]
    assert 70 <= len(areas) <= 90
    assert roc_auc_score(default.table["label_tumour"], areas) >= 0.99
