"""The phantom cohort: real DICOM, the same bytes each time, and no toy."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import binary_dilation

from cadx.catalog import PhantomEntry, load_catalog
from cadx.drift import image_statistics
from cadx.files import digest_path
from cadx.phantom.cohort import Faults, Shift, draw_visits
from cadx.phantom.xray import XrayPhantom, write_xray_cohort
from cadx.reading.dicom import dicom_identifiers
from cadx.reading.images import read_image
from cadx.splitting import assign_splits
from components.contract import read_params
from components.split import SplitParams

SMALL = XrayPhantom(num_patients=30, size_px=96, prevalence=0.3, seed=5)


@dataclass
class Cohort:
    """A written cohort, read back with the tools that a hospital would use."""

    folder: Path
    labels: pd.DataFrame = field(init=False)
    boxes: pd.DataFrame = field(init=False)

    def __post_init__(self) -> None:
        self.labels = pd.read_csv(self.folder / "labels.csv")
        self.boxes = pd.read_csv(self.folder / "boxes.csv")

    def headers(self) -> Iterator[pydicom.Dataset]:
        for file in self.labels["file"]:
            yield pydicom.dcmread(self.folder / file)

    def mask(self, file: str) -> np.ndarray | None:
        path = self.folder / "masks" / f"{Path(file).stem}.png"
        return np.asarray(Image.open(path)) > 0 if path.exists() else None


def _write(folder: Path, config: XrayPhantom) -> Cohort:
    write_xray_cohort(folder, config)
    return Cohort(folder)


def _display(ds: pydicom.Dataset) -> np.ndarray:
    """Stored numbers with dense = high, whatever the file's polarity, in fractions of its range."""
    stored = ds.pixel_array.astype(float) / (2**ds.BitsStored - 1)
    return 1 - stored if ds.PhotometricInterpretation == "MONOCHROME1" else stored


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return _write(tmp_path_factory.mktemp("small") / "cohort", SMALL)


# --- What is on disk ----------------------------------------------------------------------------------


def test_the_same_configuration_writes_the_same_bytes(small: Cohort, tmp_path: Path) -> None:
    again = _write(tmp_path / "again", SMALL)
    assert digest_path(again.folder) == digest_path(small.folder)
    other = _write(tmp_path / "other", SMALL.model_copy(update={"seed": 6}))
    assert digest_path(other.folder / "images") != digest_path(small.folder / "images")


def test_tables_name_every_image_once_and_in_order(small: Cohort) -> None:
    files = small.labels["file"].tolist()
    assert files == sorted(files)
    assert files == sorted(f"images/{path.name}" for path in (small.folder / "images").iterdir())
    assert small.labels["label_opacity"].sum() == round(0.3 * len(files))
    assert set(small.boxes["file"]) == set(small.labels.query("label_opacity == 1")["file"])
    assert set(small.boxes["class"]) == {"opacity"}


def test_boxes_are_half_open_and_enclose_the_mask_exactly(small: Cohort) -> None:
    for file, label in small.labels.itertuples(index=False):
        mask = small.mask(file)
        assert (mask is not None) == bool(label)
        if mask is None:
            continue
        boxes = small.boxes[small.boxes["file"] == file]
        covered = np.zeros_like(mask)
        for x0, y0, x1, y1 in boxes[["x0", "y0", "x1", "y1"]].itertuples(index=False):
            assert 0 <= x0 < x1 <= mask.shape[1]
            assert 0 <= y0 < y1 <= mask.shape[0]
            covered[y0:y1, x0:x1] = True
        assert not (mask & ~covered).any()
        rows, columns = np.nonzero(mask)
        assert (boxes["x0"].min(), boxes["y0"].min()) == (columns.min(), rows.min())
        assert (boxes["x1"].max(), boxes["y1"].max()) == (columns.max() + 1, rows.max() + 1)


def test_files_are_plausible_dicom_without_an_identity(small: Cohort) -> None:
    kinds = Counter()
    for ds in small.headers():
        assert ds.Modality in ("DX", "CR")
        assert ds.PatientIdentityRemoved == "YES"
        assert ds.DeidentificationMethod
        assert not ds.PatientName
        assert not ds.StudyDate
        assert ds.ViewPosition in ("PA", "AP")
        assert ds.PatientSex in ("F", "M")
        assert 18 <= int(ds.PatientAge.removesuffix("Y")) <= 92
        assert float(ds.PixelSpacing[0]) > 0
        assert ds.pixel_array.max() < 2**ds.BitsStored
        assert ds.file_meta.MediaStorageSOPInstanceUID == ds.SOPInstanceUID
        kinds[
            (ds.InstitutionName, ds.ManufacturerModelName, ds.PhotometricInterpretation, ds.BitsStored)
        ] += 1
    assert len(kinds) == 4
    assert {kind[2] for kind in kinds} == {"MONOCHROME1", "MONOCHROME2"}
    assert {kind[3] for kind in kinds} == {10, 12}
    uids = [ds.SOPInstanceUID for ds in small.headers()]
    assert len(set(uids)) == len(uids)


def test_our_reader_sees_dark_lungs_beside_a_bright_mediastinum_at_every_site(small: Cohort) -> None:
    for file in small.labels["file"]:
        image = read_image(small.folder / file)
        assert dicom_identifiers(small.folder / file) == ()
        height, width = image.pixels.shape
        band = image.pixels[int(0.35 * height) : int(0.55 * height)].astype(float).mean(axis=0)
        middle = band[int(0.42 * width) : int(0.58 * width)].mean()
        lungs = np.r_[
            band[int(0.22 * width) : int(0.35 * width)], band[int(0.65 * width) : int(0.78 * width)]
        ].mean()
        assert middle > 1.3 * lungs


def test_a_patient_is_the_same_person_on_every_visit(small: Cohort) -> None:
    seen: dict[str, set[tuple[str, str, str]]] = {}
    visits = Counter()
    for ds in small.headers():
        seen.setdefault(ds.PatientID, set()).add((ds.PatientSex, ds.PatientAge, ds.InstitutionName))
        visits[ds.PatientID] += 1
    assert all(len(descriptions) == 1 for descriptions in seen.values())
    assert max(visits.values()) > 1


# --- The cohort ---------------------------------------------------------------------------------------


def _draw(prevalence: float, num_patients: int = 20_000) -> pd.DataFrame:
    visits = draw_visits(
        num_patients=num_patients,
        visits_per_patient=1.5,
        site_weights=[4, 3, 2],
        prevalence=prevalence,
        seed=3,
    )
    return pd.DataFrame(
        [
            (v.patient.number, v.index, v.patient.site, v.patient.sex, v.patient.age_years, v.positive)
            for v in visits
        ],
        columns=["patient", "index", "site", "sex", "age", "positive"],
    )


def test_illness_depends_on_nothing_that_the_cohort_table_shows() -> None:
    table = _draw(0.12)
    table["old"] = table["age"] > 60
    first = table[table["index"] == 0]
    rate = first["positive"].mean()
    for column in ("site", "sex", "old"):
        for _, group in first.groupby(column):
            error = math.sqrt(rate * (1 - rate) / len(group))
            assert abs(group["positive"].mean() - rate) < 4 * error, column


@pytest.mark.parametrize("prevalence", [0.0, 0.001, 0.12, 0.9, 1.0])
def test_exactly_the_wanted_share_is_positive(prevalence: float) -> None:
    table = _draw(prevalence, num_patients=500)
    assert table["positive"].sum() == round(prevalence * len(table))


def test_a_higher_prevalence_adds_to_the_ill_and_heals_nobody() -> None:
    few, many = _draw(0.1, 500)["positive"], _draw(0.3, 500)["positive"]
    assert not (few & ~many).any()


def test_positives_cluster_in_patients() -> None:
    table = _draw(0.12)
    ill = table[table["index"] == 0].set_index("patient")["positive"]
    follow_up = table[table["index"] == 1].set_index("patient")["positive"]
    ill = ill.reindex(follow_up.index)
    assert follow_up[ill].mean() > 0.5
    assert follow_up[~ill].mean() < 0.1


# --- Options ------------------------------------------------------------------------------------------


def test_an_unknown_or_impossible_option_is_refused() -> None:
    with pytest.raises(ValidationError):
        XrayPhantom.model_validate({"num_patient": 3})
    with pytest.raises(ValidationError):
        XrayPhantom(prevalence=1.2)
    with pytest.raises(ValidationError):
        XrayPhantom(opacity_radius_mm=(20, 10))


def test_duplicates_are_the_same_pixels_under_another_patient(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"num_patients": 10, "faults": Faults(duplicates=3)})
    cohort = _write(tmp_path / "cohort", config)
    patients: dict[bytes, set[str]] = {}
    for ds in cohort.headers():
        patients.setdefault(ds.PixelData, set()).add(ds.PatientID)
    assert sorted(map(len, patients.values()))[-4:] == [1, 2, 2, 2]
    labels = cohort.labels.assign(pixels=[ds.PixelData for ds in cohort.headers()])
    assert len(labels[["pixels", "label_opacity"]].drop_duplicates()) == len(patients)


def test_identifiers_are_planted_in_as_many_files_as_asked(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"num_patients": 10, "faults": Faults(identifiers=2)})
    cohort = _write(tmp_path / "cohort", config)
    found = [found for file in cohort.labels["file"] if (found := dicom_identifiers(cohort.folder / file))]
    assert len(found) == 2
    assert {"PatientName", "PatientBirthDate", "PatientID"} <= set(found[0])


def test_corrupt_files_are_refused_by_the_reader_each_for_its_reason(tmp_path: Path) -> None:
    config = SMALL.model_copy(update={"num_patients": 10, "faults": Faults(corrupt_files=3)})
    cohort = _write(tmp_path / "cohort", config)
    reasons = []
    for file in cohort.labels["file"]:
        try:
            read_image(cohort.folder / file)
        except ValueError as error:
            reasons.append(str(error))
    assert len(reasons) == 3
    assert any("truncated" in reason for reason in reasons)


@pytest.mark.parametrize(
    ("shift", "statistic", "sign"),
    [
        (Shift(gamma=1.6), "mean", -1),
        (Shift(blur_sigma_px=1.5), "sharpness", -1),
        (Shift(new_scanner=True), "mean", 0),
    ],
)
def test_a_shift_changes_the_images_and_not_the_patients(
    small: Cohort, tmp_path: Path, shift: Shift, statistic: str, sign: int
) -> None:
    shifted = _write(tmp_path / "cohort", SMALL.model_copy(update={"shift": shift}))
    assert shifted.labels.equals(small.labels)
    difference = np.array(
        [
            image_statistics(read_image(shifted.folder / file).pixels)[statistic]
            - image_statistics(read_image(small.folder / file).pixels)[statistic]
            for file in small.labels["file"]
        ]
    )
    assert (np.abs(difference) > 1e-4).mean() > 0.9
    if sign:
        assert (np.sign(difference) == sign).mean() > 0.95
    before = [(ds.PatientID, ds.PatientAge, ds.InstitutionName) for ds in small.headers()]
    assert [(ds.PatientID, ds.PatientAge, ds.InstitutionName) for ds in shifted.headers()] == before


# --- No toy -------------------------------------------------------------------------------------------


def test_the_opacity_is_in_the_pixels_of_its_mask_and_nowhere_else(small: Cohort, tmp_path: Path) -> None:
    """Against the same cohort with opacities too faint to see, whose masks are the same."""
    faint = SMALL.model_copy(update={"opacity_contrast": (1e-6, 1e-6)})
    twin = _write(tmp_path / "twin", faint)
    assert twin.boxes.equals(small.boxes)
    for file, label in small.labels.itertuples(index=False):
        one, other = pydicom.dcmread(small.folder / file), pydicom.dcmread(twin.folder / file)
        difference = _display(one) - _display(other)
        mask = small.mask(file)
        if not label:
            assert not difference.any()
            continue
        assert mask is not None
        around = binary_dilation(mask, iterations=6)
        assert difference[mask].mean() > 0.01
        assert abs(difference[~around]).mean() < 0.1 * difference[mask].mean()


@pytest.fixture(scope="module")
def default(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """The cohort of the experiment `phantom-xray`."""
    entry = load_catalog(root / "data/catalog.yaml")["phantom-xray"]
    assert isinstance(entry, PhantomEntry)
    return _write(tmp_path_factory.mktemp("default") / "cohort", XrayPhantom.model_validate(entry.parameters))


@pytest.fixture(scope="module")
def in_test(root: Path, default: Cohort) -> np.ndarray:
    """Whether the step `split` puts each row into the test part of `phantom-xray`."""
    params = read_params(f"{root / 'params.yaml'}:phantom-xray", "split", SplitParams)
    assert params.strategy == "patient"
    opacity = default.labels["label_opacity"]
    headers = list(default.headers())
    samples = pd.DataFrame(
        {
            "patient": [ds.PatientID for ds in headers],
            "site": [ds.InstitutionName for ds in headers],
            "label_normal": 1 - opacity,
            "label_opacity": opacity,
        }
    )
    splits = assign_splits(
        samples,
        fractions=params.fractions.model_dump(),
        seed=params.seed,
        labels=["label_normal", "label_opacity"],
    )
    return (splits == "test").to_numpy()


@pytest.mark.slow
def test_the_default_cohort_has_the_promised_size(default: Cohort, in_test: np.ndarray) -> None:
    assert 1600 <= len(default.labels) <= 1850
    assert 0.10 <= default.labels["label_opacity"].mean() <= 0.125
    assert default.labels["label_opacity"][in_test].sum() >= 60
    assert sum(path.stat().st_size for path in default.folder.rglob("*") if path.is_file()) < 200e6


@pytest.mark.slow
def test_intensity_statistics_and_metadata_do_not_give_the_label_away(
    default: Cohort, in_test: np.ndarray
) -> None:
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import roc_auc_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    rows, deciles = [], range(5, 100, 10)
    for file, ds in zip(default.labels["file"], default.headers(), strict=True):
        stored = _display(ds)
        rows.append(
            {
                **image_statistics(read_image(default.folder / file).pixels),
                **{
                    f"stored_p{q:02d}": value
                    for q, value in zip(deciles, np.percentile(stored, deciles), strict=True)
                },
                "stored_mean": stored.mean(),
                "stored_std": stored.std(),
                "window_center": float(ds.WindowCenter) / 2**ds.BitsStored,
                "window_width": float(ds.WindowWidth) / 2**ds.BitsStored,
                "age": float(ds.PatientAge.removesuffix("Y")),
                "sex": ds.PatientSex,
                "site": ds.InstitutionName,
                "scanner": ds.ManufacturerModelName,
                "view": ds.ViewPosition,
                "size": f"{ds.Rows} x {ds.Columns}",
            }
        )
    features = pd.get_dummies(pd.DataFrame(rows)).to_numpy(dtype=float)
    labels = default.labels["label_opacity"].to_numpy()
    model = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=8,
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
            scoring="roc_auc",
            max_iter=2000,
            class_weight="balanced",
        ),
    ).fit(features[~in_test], labels[~in_test])
    assert roc_auc_score(labels[in_test], model.decision_function(features[in_test])) <= 0.70


@pytest.mark.slow
def test_an_oracle_that_reads_the_mask_is_nearly_perfect(default: Cohort, in_test: np.ndarray) -> None:
    from sklearn.metrics import roc_auc_score

    areas = [mask.sum() if (mask := default.mask(file)) is not None else 0 for file in default.labels["file"]]
    assert roc_auc_score(default.labels["label_opacity"][in_test], np.array(areas)[in_test]) >= 0.99


@pytest.mark.slow
def test_the_opacities_stand_out_from_a_ring_around_them(default: Cohort) -> None:
    contrasts = []
    for file, label in default.labels.itertuples(index=False):
        if label:
            mask = default.mask(file)
            assert mask is not None
            pixels = _display(pydicom.dcmread(default.folder / file))
            ring = binary_dilation(mask, iterations=5) & ~binary_dilation(mask, iterations=1)
            contrasts.append(pixels[mask].mean() - pixels[ring].mean())
    assert np.mean(np.array(contrasts) > 0) >= 0.95
