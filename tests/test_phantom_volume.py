"""The phantom CT cohort: real NIfTI, the same bytes each time, and no toy. Also what all cohorts share."""

from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pytest
from pydantic import ValidationError
from scipy.ndimage import binary_dilation, label

from benchmarks.phantoms import statistics_auc
from cadx.drift import image_statistics
from cadx.files import digest_path
from cadx.phantom import PHANTOM
from cadx.phantom.cohort import CLINICAL, Faults, Shift, draw_clinical, draw_visits
from cadx.phantom.volume import EXTENT_MM, VolumePhantom
from cadx.reading.identifiers import file_identifiers
from cadx.reading.volumes import read_mask, read_volume
from cadx.types import RawVolume

SMALL = VolumePhantom(num_patients=10, prevalence=0.5, seed=5)
FEW = SMALL.model_copy(update={"num_patients": 4, "scans_per_patient": 1.0})


class Volumes:
    """A written cohort, read back."""

    def __init__(self, folder: Path, config: VolumePhantom) -> None:
        config.write(folder)
        self.folder = folder
        self.table = pd.read_csv(
            folder / "labels.csv", keep_default_na=False, na_values=dict.fromkeys(CLINICAL, "")
        )

    def volumes(self) -> list[RawVolume]:
        return [read_volume(self.folder / file) for file in self.table["file"]]

    def mask(self, row: int) -> np.ndarray | None:
        file = self.table["mask"][row]
        return read_mask(self.folder / file) if file else None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return Volumes(tmp_path_factory.mktemp("volumes") / "cohort", SMALL)


# --- What is on disk ----------------------------------------------------------------------------------


def test_the_same_configuration_writes_the_same_bytes(small: Volumes, tmp_path: Path) -> None:
    again = Volumes(tmp_path / "again", SMALL)
    assert digest_path(again.folder) == digest_path(small.folder)
    other = Volumes(tmp_path / "other", FEW.model_copy(update={"seed": 6}))
    assert digest_path(other.folder / "images") != digest_path(small.folder / "images")


def test_the_table_names_every_file_and_only_positives_have_masks(small: Volumes) -> None:
    table = small.table
    assert table["file"].tolist() == sorted(f"images/{p.name}" for p in (small.folder / "images").iterdir())
    assert sorted(filter(None, table["mask"])) == sorted(
        f"masks/{p.name}" for p in (small.folder / "masks").iterdir()
    )
    assert ((table["mask"] != "") == (table["label_nodule"] == 1)).all()
    assert table["label_nodule"].sum() == round(0.5 * len(table))
    assert set(PHANTOM.validate_python(SMALL.model_dump()).layout(["none", "nodule"])["columns"]) < set(table)


def test_files_stand_in_their_sites_orientation_and_read_as_one(small: Volumes) -> None:
    axes = set()
    for row, volume in enumerate(small.volumes()):
        image = nibabel.load(small.folder / small.table["file"][row])
        axes.add("".join(nibabel.aff2axcodes(image.affine)))
        assert volume.voxels.dtype == np.int16
        assert not volume.findings
        assert not volume.assumptions
        extent = np.array(volume.voxels.shape) * volume.spacing_mm
        assert np.allclose(extent, EXTENT_MM, atol=1.3)
        mask = small.mask(row)
        if mask is not None:
            assert mask.shape == volume.voxels.shape
    assert len(axes) >= 3


def test_head_is_up_back_is_back_and_the_lungs_are_air(small: Volumes) -> None:
    """By anatomy alone: the diaphragm lies below the lung, the spine behind it, whatever the file's axes."""
    sides, shares = set(), []
    for volume in small.volumes():
        d, h, w = volume.voxels.shape
        lung = volume.voxels < -600
        assert 0.15 < lung.mean() < 0.75
        shares.append((lung[:2].mean(), lung[d // 2].mean(), lung[-2:].mean()))
        bone = volume.voxels > 180
        assert bone[:, : h // 3].sum() > bone[:, -(h // 3) :].sum(), "spine and the thick ribs lie behind"
        sides.add(bool(bone[:, : h // 6, : w // 3].sum() > bone[:, : h // 6, -(w // 3) :].sum()))
    assert sides == {True, False}, "right and left halves"
    bottom, middle, top = np.mean(shares, axis=0)
    assert bottom < 0.75 * middle, "the lung ends at the diaphragm"
    assert 0.3 * middle < top < middle, "and narrows towards its apex"


def test_every_file_is_free_of_identifiers(small: Volumes) -> None:
    assert [file for file in small.table["file"] if file_identifiers(small.folder / file)] == []


# --- Options ------------------------------------------------------------------------------------------


def test_what_a_ct_cannot_do_is_refused_in_one_line() -> None:
    with pytest.raises(ValidationError, match=r"shift\.gamma: CT numbers are absolute"):
        VolumePhantom(shift=Shift(gamma=1.2))
    with pytest.raises(ValidationError, match="from 2 to 20 mm"):
        VolumePhantom(nodule_radius_mm=(12, 4))


def test_faults_are_planted_in_as_many_files_as_asked(tmp_path: Path) -> None:
    faults = Faults(identifiers=2, corrupt_files=2)
    cohort = Volumes(tmp_path / "cohort", FEW.model_copy(update={"faults": faults}))
    refused, identified = 0, 0
    for file in cohort.table["file"]:
        try:
            read_volume(cohort.folder / file)
        except ValueError:
            refused += 1
        else:
            identified += bool(file_identifiers(cohort.folder / file))
    assert (refused, identified) == (2, 2)


def test_duplicates_are_the_same_voxels_under_another_patient(tmp_path: Path) -> None:
    cohort = Volumes(tmp_path / "cohort", FEW.model_copy(update={"faults": Faults(duplicates=2)}))
    patients: dict[bytes, set[str]] = {}
    for volume, patient in zip(cohort.volumes(), cohort.table["patient"], strict=True):
        patients.setdefault(volume.voxels.tobytes(), set()).add(patient)
    assert sorted(map(len, patients.values())) == [1, 1, 2, 2]


@pytest.mark.parametrize("shift", [Shift(blur_sigma_px=1.0), Shift(new_scanner=True)])
def test_a_shift_changes_the_images_and_not_the_patients(tmp_path: Path, shift: Shift) -> None:
    before = Volumes(tmp_path / "before", FEW)
    after = Volumes(tmp_path / "after", FEW.model_copy(update={"shift": shift}))
    kept = ["file", "patient", "site", "age", "sex", "label_nodule"]
    assert after.table[kept].equals(before.table[kept])
    for one, other in zip(before.volumes(), after.volumes(), strict=True):
        rough = [float(np.abs(np.diff(v.voxels.astype(float), axis=2)).mean()) for v in (one, other)]
        assert (rough[1] < 0.9 * rough[0]) if shift.blur_sigma_px else one.spacing_mm != other.spacing_mm


def test_a_site_shift_sends_the_ill_to_one_site_and_leaves_the_rest() -> None:
    drawn = {
        share: draw_visits(
            num_patients=3000,
            visits_per_patient=1.3,
            site_weights=[1, 1, 1],
            prevalence=0.3,
            seed=2,
            site_shift=share,
        )
        for share in (0.0, 0.5, 1.0)
    }
    for share, expected in ((0.0, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)):
        ill = [visit.patient.site == 0 for visit in drawn[share] if visit.positive]
        assert np.mean(ill) == pytest.approx(expected, abs=0.06)
    well = {v.patient.number for v in drawn[0.0]} - {v.patient.number for v in drawn[0.0] if v.positive}
    assert [v for v in drawn[0.0] if v.patient.number in well] == [
        v for v in drawn[1.0] if v.patient.number in well
    ]
    assert [v.positive for v in drawn[0.0]] == [v.positive for v in drawn[1.0]]


# --- The clinical table -------------------------------------------------------------------------------


def test_the_clinical_columns_carry_part_of_the_signal_and_no_more() -> None:
    visits = draw_visits(num_patients=1500, visits_per_patient=1.25, site_weights=[1], prevalence=0.3, seed=1)
    drawn = draw_clinical(visits, seed=1)
    table = pd.DataFrame([drawn[visit] for visit in visits])
    assert table.isna().mean().between(0.07, 0.13).all()
    assert set(table["family_history"].dropna()) == {0.0, 1.0}
    labels = pd.Series([int(visit.positive) for visit in visits])
    patients = pd.Series([visit.patient.number for visit in visits])
    auc = statistics_auc(table.fillna(table.median()), labels, patients)
    assert 0.60 <= auc <= 0.75
    first = table.assign(patient=patients, first=[v.index == 0 for v in visits])
    assert first.groupby("patient")["smoking_pack_years"].nunique().max() == 1, "pack-years are the patient's"


@pytest.mark.parametrize("modality", ["xray", "volume", "slide", "lesion"])
def test_the_clinical_columns_are_written_and_named_in_every_layout(modality: str, tmp_path: Path) -> None:
    small = {"modality": modality, "num_patients": 3, **({"size_um": 256} if modality == "slide" else {})}
    plain, config = PHANTOM.validate_python(small), PHANTOM.validate_python({**small, "clinical": True})
    config.write(tmp_path / "cohort")
    plain.write(tmp_path / "plain")
    table, without = (pd.read_csv(tmp_path / name / "labels.csv") for name in ("cohort", "plain"))
    pd.testing.assert_frame_equal(table.drop(columns=list(CLINICAL)), without)
    assert table[list(CLINICAL)].notna().any().all()
    assert digest_path(tmp_path / "cohort" / "images") == digest_path(tmp_path / "plain" / "images")
    assert config.layout(["none", "some"])["clinical"] == {name: name for name in CLINICAL}
    assert "clinical" not in plain.layout(["none", "some"])


# --- No toy -------------------------------------------------------------------------------------------


def test_the_nodule_is_in_the_voxels_of_its_mask_and_nowhere_else(tmp_path: Path) -> None:
    """Against the same patients without any: everybody else's anatomy, and noise, stays as it is."""
    ill = Volumes(tmp_path / "ill", FEW.model_copy(update={"prevalence": 1.0}))
    well = Volumes(tmp_path / "well", FEW.model_copy(update={"prevalence": 0.0}))
    radii = []
    for row, (one, other) in enumerate(zip(ill.volumes(), well.volumes(), strict=True)):
        mask = ill.mask(row)
        assert mask is not None
        difference = one.voxels.astype(float) - other.voxels
        # Ground glass is seen through, and the body's own tissue may fill a part of the mask already.
        assert difference[mask > 0].mean() > 100
        assert np.abs(difference[~binary_dilation(mask > 0, iterations=4)]).max() <= 1
        _, count = label(mask, np.ones((3, 3, 3)))
        assert 1 <= count <= 4
        radii.append((3 * mask.sum() * np.prod(one.spacing_mm) / count / 4 / np.pi) ** (1 / 3))
    assert 3 < np.median(radii) < 13


def test_vessels_look_like_nodules_in_one_slice_and_not_in_space(tmp_path: Path) -> None:
    """Scans without nodules hold round tissue in many slices; that is why a slice alone does not do."""
    cohort = Volumes(tmp_path / "cohort", FEW.model_copy(update={"prevalence": 0.0}))
    spots = 0
    for volume in cohort.volumes():
        lung = volume.voxels < -500
        middle = volume.voxels.shape[0] // 2
        tissue, _ = label((volume.voxels[middle] > -250) & binary_dilation(lung[middle], iterations=8))
        sizes_mm2 = np.bincount(tissue.ravel())[1:] * volume.spacing_mm[1] * volume.spacing_mm[2]
        spots += int(((sizes_mm2 > 7) & (sizes_mm2 < 450)).sum())
    assert spots >= 2 * len(cohort.table)


@pytest.fixture(scope="module")
def default(tmp_path_factory: pytest.TempPathFactory) -> Volumes:
    return Volumes(tmp_path_factory.mktemp("volumes") / "default", VolumePhantom())


@pytest.mark.slow
def test_histograms_and_metadata_do_not_give_the_label_away(default: Volumes) -> None:
    rows = []
    edges_hu = (-1100, -950, -850, -750, -600, -400, -200, 0, 60, 150, 300, 3100)
    for volume, person in zip(default.volumes(), default.table.to_dict("records"), strict=True):
        raised = ((volume.voxels.astype(np.int32) + 1024) * 16).astype(np.uint16)
        middle = image_statistics(raised[len(raised) // 2])
        whole = image_statistics(raised.reshape(len(raised), -1))
        shares = np.histogram(volume.voxels, bins=edges_hu)[0] / volume.voxels.size
        rows.append(
            {f"middle_{name}": value for name, value in middle.items()}
            | {f"whole_{name}": value for name, value in whole.items()}
            | {f"share_{index}": value for index, value in enumerate(shares)}
            | {name: person[name] for name in ("age", "sex", "site", "scanner")}
        )
    auc = statistics_auc(pd.DataFrame(rows), default.table["label_nodule"], default.table["patient"])
    assert auc <= 0.70


@pytest.mark.slow
def test_an_oracle_that_reads_the_mask_is_nearly_perfect(default: Volumes) -> None:
    from sklearn.metrics import roc_auc_score

    voxels = [mask.sum() if (mask := default.mask(row)) is not None else 0 for row in default.table.index]
    assert 250 <= len(voxels) <= 350
    assert roc_auc_score(default.table["label_nodule"], voxels) >= 0.99
