"""Ingest: everything of the source stands in the dataset, or one clear line and nothing at all."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import yaml
from PIL import Image
from scipy.spatial import cKDTree
from test_describing import boxed
from test_volumes import phantom, write_nifti, write_series

from cadx.datasets import DatasetFolder
from cadx.describing import describe_folder
from cadx.files import digest_path
from cadx.phantom.cohort import Faults
from cadx.phantom.xray import XrayPhantom, write_xray_cohort
from cadx.reading.images import read_image
from components.ingest import ingest
from components.validate import validate

NAME = "Ignatowska^Bronislawa"
PHANTOM = {"modality": "xray", "num_patients": 12, "prevalence": 0.3, "size_px": 48}
COMMON = {
    "title": "T", "task": "binary", "classes": ["normal", "opacity"], "positive": "opacity",
    "modality": "chest X-ray", "licence": "L", "citation": "C",
}  # fmt: skip

Run = Callable[..., DatasetFolder]


@pytest.fixture
def run(tmp_path, monkeypatch) -> Run:
    """Ingest of one entry; what it leaves is checked to be whole or nothing."""
    monkeypatch.delenv("CADX_DATA_MIRROR", raising=False)
    monkeypatch.setenv("CADX_SITE_KEY", 32 * "5a")

    def ingested(
        entry: dict[str, object], out: str = "dataset", digest: str = "", **params: str
    ) -> DatasetFolder:
        catalog = tmp_path / "catalog.yaml"
        catalog.write_text(yaml.safe_dump({"mine": entry}), encoding="utf-8")
        before = set(tmp_path.iterdir())
        try:
            ingest(
                catalog=catalog, cache=tmp_path / "cache", dataset=tmp_path / out, digest=digest,
                params=json.dumps({"source": "mine"} | params),
            )  # fmt: skip
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017  it is raised again
            assert set(tmp_path.iterdir()) == before, "a failed ingest leaves something behind"
            raise
        return DatasetFolder(tmp_path / out)

    return ingested


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def folders(tmp_path) -> dict[str, object]:
    """An entry for a folder per class: three normal images and two opacities."""
    for name, count in (("normal", 3), ("opacity", 2)):
        for index in range(count):
            write_png(tmp_path / f"own/{name}/{name[0]}{index}.png", np.full((6, 5), 10 * index, np.uint8))
    return COMMON | {"format": "folder", "file": str(tmp_path / "own"), "patient": "per-image"}


@pytest.fixture
def table(tmp_path) -> dict[str, object]:
    """An entry for a table with the usual columns, of four images of three patients, with one box."""
    for index in range(4):
        write_png(tmp_path / f"own/images/{index}.png", np.full((6, 5), index, np.uint8))
    write_rows(tmp_path, "0.png,no,A1,Hill,45,F,PA,train", "1.png,yes,A1,Hill,045Y,f,AP,train",
               "2.png,no,B2,,6M,male,,validation", "3.png,,C3,,,,,test")  # fmt: skip
    (tmp_path / "own/boxes.csv").write_text(
        "file,reader,what,x,y,w,h\n1.png,r1,yes,1,2,3,4\n1.png,r2,yes,0,0,1,1\n"
    )
    columns = ("patient", "site", "age", "sex", "view", "split")
    return COMMON | {
        "format": "table", "file": str(tmp_path / "own"), "table": "t.csv", "images": "images",
        "label_column": "ill", "values": {"no": "normal", "yes": "opacity"},
        "patient": "public", "columns": {c: c for c in columns},
        "boxes": {"table": "boxes.csv", "class_name": "what", "x0": "x", "y0": "y", "width": "w",
                  "height": "h", "where": {"reader": "r1"}, "values": {"yes": "opacity"}},
    }  # fmt: skip


def write_rows(tmp_path: Path, *rows: str) -> None:
    (tmp_path / "own/t.csv").write_text("\n".join(["file,ill,patient,site,age,sex,view,split", *rows]))


# --- What arrives -------------------------------------------------------------------------------------


def test_pneumoniamnist_of_the_mirror_has_the_official_counts(root, mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))
    ingest(catalog=root / "data/catalog.yaml", cache=tmp_path / "cache", dataset=tmp_path / "out",
           params='{"source": "pneumoniamnist"}')  # fmt: skip
    folder = DatasetFolder(tmp_path / "out")
    samples = folder.samples
    assert len(samples) == 5856
    counts = samples.groupby("given_split")[["label_normal", "label_pneumonia"]].sum().astype(int)
    expected = {"train": [1214, 3494], "val": [135, 389], "test": [234, 390]}
    assert counts.T.to_dict("list") == expected
    assert not folder.info.clustered
    assert samples["patient"].is_unique
    with np.load(mirror / "pneumoniamnist/pneumoniamnist.npz") as arrays:
        np.testing.assert_array_equal(folder.pixels("val-00100"), arrays["val_images"][100])
    by_split = samples.groupby("given_split")["pixels_sha256"].apply(set)
    assert samples["pixels_sha256"][samples["given_split"] == "val"].isin(by_split["train"]).sum() == 8


def test_nih_rsna_of_the_mirror(root, mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))
    ingest(catalog=root / "data/catalog.yaml", cache=tmp_path / "cache", dataset=tmp_path / "out",
           params='{"source": "nih-rsna"}')  # fmt: skip
    folder = DatasetFolder(tmp_path / "out")
    assert folder.samples["label_opacity"].sum() == 32
    assert folder.samples["patient"].nunique() == 60
    boxes = pd.read_csv(mirror / "nih_rsna_cxr/boxes.csv")
    boxes = boxes[boxes["source"] == "RSNA2018"]
    assert len(folder.boxes) == len(boxes)
    assert (folder.boxes["x1"] - folder.boxes["x0"]).sum() == pytest.approx(boxes["w"].sum())
    assert set(folder.boxes["sample_id"]) == set(
        folder.samples["sample_id"][folder.samples["label_opacity"] == 1]
    )
    assert folder.samples.set_index("sample_id").loc["00000193_019", ["age", "sex", "view"]].tolist() == [
        54,
        "M",
        "AP",
    ]


def test_phantom_is_made_and_read_as_dicom(run, tmp_path):
    entry = COMMON | {"format": "phantom", "patient": "public", "parameters": PHANTOM}
    folder = run(entry)
    write_xray_cohort(tmp_path / "cohort", XrayPhantom(**PHANTOM))
    truth = pd.read_csv(tmp_path / "cohort/labels.csv")
    samples = folder.samples.set_index("sample_id")
    assert samples["label_opacity"].tolist() == truth["label_opacity"].tolist()
    assert len(folder.boxes) == len(pd.read_csv(tmp_path / "cohort/boxes.csv"))
    first = read_image(tmp_path / "cohort" / truth["file"][0])
    np.testing.assert_array_equal(folder.pixels(samples.index[0]), first.pixels)
    assert samples["site"].all()
    assert samples["spacing_row_mm"].notna().all()
    assert folder.info.clustered
    assert folder.info.source.digest == digest_path(tmp_path / "cohort")


def test_same_source_gives_the_same_bytes(run):
    entry = COMMON | {"format": "phantom", "patient": "hmac", "parameters": PHANTOM}
    one, other = run(entry, "one"), run(entry, "other")
    assert digest_path(one.path) == digest_path(other.path)


def test_what_systems_put_into_a_source_leaves_the_dataset_as_it_is(run, folders, tmp_path):
    before = run(folders, "one")
    (tmp_path / "own/normal/Thumbs.db").write_bytes(b"left by itself")
    assert digest_path(run(folders, "other").path) == digest_path(before.path)


def test_a_folder_per_class(run, folders):
    folder = run(folders)
    samples = folder.samples
    assert samples["sample_id"].tolist() == [
        "normal-n0",
        "normal-n1",
        "normal-n2",
        "opacity-o0",
        "opacity-o1",
    ]
    assert samples["label_opacity"].tolist() == [0, 0, 0, 1, 1]
    assert samples["patient"].equals(samples["sample_id"])
    assert folder.pixels("normal-n2")[0, 0] == 20


def test_class_folders_within_split_folders(run, tmp_path):
    for split in ("train", "val"):
        for name in ("normal", "opacity"):
            write_png(tmp_path / f"own/{split}/{name}/{split}.png", np.zeros((4, 4), np.uint8))
    entry = {"format": "folder", "file": str(tmp_path / "own"), "patient": "per-image"}
    samples = run(COMMON | entry | {"split_folders": {"train": "train", "val": "val"}}).samples
    assert samples["given_split"].tolist() == ["train", "train", "val", "val"]
    assert samples["label_opacity"].tolist() == [0, 1, 0, 1]


def test_a_table_with_everything(run, table):
    folder = run(table)
    samples = folder.samples.set_index("sample_id")
    assert samples["patient"].tolist() == ["A1", "A1", "B2", "C3"]
    assert samples["given_split"].tolist() == ["train", "train", "val", "test"]
    assert samples["age"].tolist()[:3] == [45, 45, 0.5]
    assert np.isnan(samples["age"].iloc[3])
    assert samples["sex"].tolist() == ["F", "F", "M", ""]
    assert samples["label_opacity"].tolist()[:3] == [0, 1, 0]
    assert samples[["label_normal", "label_opacity"]].iloc[3].isna().all(), "an empty cell means unlabelled"
    assert folder.boxes.to_numpy().tolist() == [["1", "opacity", 1, 2, 4, 6]], "the other reader is left out"


def write_dicom(path: Path, frames: np.ndarray, **elements: object) -> None:
    """A DICOM file without names: one image H W of 8 bits, or several frames N H W; None removes an element."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ds = pydicom.Dataset()
    ds.file_meta = pydicom.dataset.FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    ds.SOPClassUID, ds.SOPInstanceUID = pydicom.uid.UltrasoundMultiFrameImageStorage, "1.2.3.4"
    ds.PatientIdentityRemoved = "YES"
    if frames.ndim == 3:
        ds.NumberOfFrames = len(frames)
    ds.Rows, ds.Columns = frames.shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated = ds.BitsStored = 8
    ds.HighBit = 7
    ds.PixelData = frames.tobytes()
    ds["PixelData"].VR = "OB"
    for keyword, value in elements.items():
        setattr(ds, keyword, value)
        if value is None:
            del ds[keyword]
    pydicom.dcmwrite(path, ds, enforce_file_format=True)


@pytest.mark.parametrize("patient", ["per-image", "public", "hmac"])
def test_a_frame_is_asked_for_by_a_column_and_recorded(run, tmp_path, patient):
    rng = np.random.default_rng(4)
    cine, whole = (
        rng.integers(0, 256, (3, 12, 16), dtype=np.uint8),
        rng.integers(0, 256, (12, 16), dtype=np.uint8),
    )
    write_dicom(tmp_path / "own/cine.dcm", cine, PatientID="A1")
    write_dicom(tmp_path / "own/whole.dcm", whole, PatientID="B2")
    (tmp_path / "own/t.csv").write_text(
        "file,nr,ill\ncine.dcm,3,opacity\ncine.dcm,1,normal\nwhole.dcm,,normal\n"
    )
    entry = COMMON | {
        "format": "table", "file": str(tmp_path / "own"), "table": "t.csv", "label_column": "ill",
        "patient": patient, "columns": {"frame": "nr"},
    }  # fmt: skip
    folder = run(entry)
    samples = folder.samples.sort_values("frame")
    assert samples["frame"].tolist() == [0, 1, 3]
    assert samples["label_opacity"].tolist() == [0, 0, 1]
    for sample_id, expected in zip(samples["sample_id"], (whole, cine[0], cine[2]), strict=True):
        np.testing.assert_array_equal(folder.pixels(sample_id), expected)
    assert samples["patient"].nunique() == 2, "frames of one file are of one patient"
    assert folder.info.clustered
    assert ("every file of frames is of another patient" in folder.info.assumptions) == (
        patient == "per-image"
    )
    if patient != "hmac":
        assert samples["sample_id"].tolist() == ["whole", "cine-frame0001", "cine-frame0003"]
    named = [{"file": "cine.dcm", "frame": 2, "label": "opacity"}, {"file": "whole.dcm", "label": "normal"}]
    alone = run(
        COMMON | {"format": "files", "file": entry["file"], "patient": patient, "samples": named}, "files"
    )
    assert sorted(alone.samples["frame"]) == [0, 2]
    for cells, reason in (
        ("cine.dcm,3,\ncine.dcm,3,\nwhole.dcm,,", "the same frame as t.csv row 2"),
        ("cine.dcm,0,\nwhole.dcm,,", "t.csv row 2, column nr: not the number of a frame, counted from 1"),
        ("cine.dcm,4,\nwhole.dcm,,", "t.csv row 2: DICOM: no frame 4: it has 3"),
        ("cine.dcm,,\nwhole.dcm,,", "t.csv row 2: DICOM: several frames; .*`frame` in the catalogue's entry"),
    ):
        (tmp_path / "own/t.csv").write_text(f"file,nr,ill\n{cells}\n")
        with pytest.raises(ValueError, match=reason):
            run(entry, "refused")
    box_table = {"table": "boxes.csv", "x1": "x1", "y1": "y1"}
    with pytest.raises(ValueError, match="boxes name files, not frames"):
        run(entry | {"boxes": box_table}, "refused")


@pytest.mark.parametrize("unknown", ["", "?", "unknown"])
@pytest.mark.parametrize("policy", ["public", "hmac"])
def test_one_patient_is_not_named_by_the_table_here_and_by_the_header_there(run, tmp_path, policy, unknown):
    rng = np.random.default_rng(5)
    for number in range(4):
        image = rng.integers(0, 256, (12, 16), dtype=np.uint8)
        write_dicom(tmp_path / f"own/{number}.dcm", image, PatientID=f"H{number // 2}")
    entry = COMMON | {
        "format": "table", "file": str(tmp_path / "own"), "table": "t.csv", "label_column": "ill",
        "patient": policy, "columns": {"patient": "patient"},
    }  # fmt: skip
    cells = ("A1", unknown, "B2", unknown)
    (tmp_path / "own/t.csv").write_text(
        "file,ill,patient\n" + "".join(f"{number}.dcm,normal,{cell}\n" for number, cell in enumerate(cells))
    )
    with pytest.raises(
        ValueError, match=r"2 of 4 images cannot be taken: t\.csv row 3: no patient; .*every row"
    ):
        run(entry)
    kept = run(entry, "kept", unreadable="leave_out")
    assert len(kept.samples) == 2
    assert [one.place for one in kept.info.left_out] == ["t.csv row 3", "t.csv row 5"]
    (tmp_path / "own/t.csv").write_text(
        "file,ill,patient\n" + "".join(f"{number}.dcm,normal,{unknown}\n" for number in range(4))
    )
    patients = run(entry, "headers").samples["patient"]
    assert patients.value_counts().tolist() == [2, 2], "where the column is empty, PatientID counts"
    assert (set(patients) == {"H0", "H1"}) == (policy == "public")


@pytest.mark.parametrize(
    ("cells", "refusal"),
    [
        (("A1,Hill", "a1,Hill", "B2,Hill"), "2 names of patients differ from another in capitals"),
        (("É1,Hill", "E\u03011,Hill", "B2,Hill"), "2 names of patients differ from another"),
        (("A1,Hill", "B2,HILL", "C3,hill"), "3 names of sites differ from another in capitals"),
        (("A1,Süd", "B2,Su\u0308d", "C3,Nord"), "2 names of sites differ from another"),
        (("A1,Hill", "A2,Hill", "A1,Harbour"), None),
    ],
)
@pytest.mark.parametrize("in_headers", [False, True])
def test_names_that_differ_in_capitals_or_unicode_form_alone_are_not_two(
    run, tmp_path, cells, refusal, in_headers
):
    rng = np.random.default_rng(6)
    rows = ["file,ill,patient,site"]
    for number, cell in enumerate(cells):
        image, (patient, site) = rng.integers(0, 256, (12, 16), dtype=np.uint8), cell.split(",")
        header = {"SpecificCharacterSet": "ISO_IR 192", "PatientID": patient, "InstitutionName": site}
        write_dicom(tmp_path / f"own/{number}.dcm", image, **(header if in_headers else {}))
        rows.append(f"{number}.dcm,normal," + ("," if in_headers else cell))
    (tmp_path / "own/t.csv").write_text("\n".join(rows), encoding="utf-8")
    entry = COMMON | {
        "format": "table", "file": str(tmp_path / "own"), "table": "t.csv", "label_column": "ill",
        "patient": "hmac", "columns": {"patient": "patient", "site": "site"},
    }  # fmt: skip
    if refusal is None:
        assert run(entry).info.num_patients == 2
        return
    if in_headers and "sites" in refusal:
        run(entry)  # machines write their hospital's name as they like; leave_site_out alone would mind
        return
    with pytest.raises(ValueError, match=f"mine: {refusal}") as caught:
        run(entry)
    assert not any(name in str(caught.value) for cell in cells for name in cell.split(","))
    if "patients" in refusal:
        assert run(entry | {"patient": "per-image"}).info.num_patients == 3


def test_bags_of_unknown_patients_are_not_one_patients(run, tmp_path):
    entry = COMMON | {
        "format": "bags", "kind": "features", "file": str(tmp_path / "own"), "patient": "hmac",
        "tables": {"Hill": "hill.csv"}, "patient_column": "pid", "missing": "-9",
        "label_column": "ill", "values": {"no": "normal", "yes": "opacity"},
    }  # fmt: skip
    (tmp_path / "own").mkdir()
    for cell in ("", "-9", "?", "unknown"):
        (tmp_path / "own/hill.csv").write_text(f"pid,chol,ill\n1,200,no\n{cell},210,yes\n")
        with pytest.raises(ValueError, match=r"hill\.csv row 3: no patient"):
            run(entry)


@pytest.mark.parametrize("stated", [None, "", "MONOCHROM"])
@pytest.mark.parametrize("given", ["MONOCHROME1", "MONOCHROME2"])
def test_an_unknown_photometric_interpretation_is_refused_until_the_entry_gives_it(
    run, tmp_path, stated, given
):
    rng = np.random.default_rng(6)
    stored = {name: rng.integers(0, 256, (96, 96), dtype=np.uint8) for name in ("normal", "opacity")}
    for name, pixels in stored.items():
        write_dicom(tmp_path / f"own/{name}/{name}.dcm", pixels, PhotometricInterpretation=stated)
    entry = COMMON | {"format": "folder", "file": str(tmp_path / "own"), "patient": "per-image"}
    with pytest.raises(
        ValueError, match=r"2 of 2 .*missing or unknown; .* give photometric_interpretation in the"
    ):
        run(entry)
    folder = run(entry | {"photometric_interpretation": given})
    shown = stored["normal"] if given == "MONOCHROME2" else 255 - stored["normal"]
    np.testing.assert_array_equal(folder.pixels("normal-normal"), shown)
    assumed = f"no known PhotometricInterpretation in the file: {given} was taken as given"
    assert folder.info.assumptions == (assumed,)
    if given == "MONOCHROME1" and stated is None:
        report = tmp_path / "validation.html"
        validate(
            dataset=folder.path,
            validation=tmp_path / "validation.json",
            report=report,
            params='{"class_without_images": "warn"}',
        )
        assert assumed in report.read_text()


def test_a_series_of_unknown_photometric_interpretation_is_taken_as_the_entry_says(run, tmp_path):
    for name in ("normal", "opacity"):
        (tmp_path / "own" / name).mkdir(parents=True)
    unknown = {"PatientName": None, "PatientID": None, "PhotometricInterpretation": None}
    write_series(tmp_path / "own/normal/first", phantom(), **unknown)
    entry = COMMON | {
        "format": "folder", "kind": "volume", "file": str(tmp_path / "own"), "patient": "per-image",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"missing or unknown; .* give photometric_interpretation in the"):
        run(entry)
    folder = run(entry | {"photometric_interpretation": "MONOCHROME2"})
    np.testing.assert_array_equal(folder.pixels("first"), phantom().transpose(2, 1, 0))
    assert folder.info.assumptions == (
        "no known PhotometricInterpretation in the file: MONOCHROME2 was taken as given",
    )


def test_the_axes_of_a_volume_that_does_not_tell_them_are_taken_as_the_entry_says(run, tmp_path):
    for name in ("normal", "opacity"):
        (tmp_path / "own" / name).mkdir(parents=True)
    write_nifti(tmp_path / "own/normal/first.nii.gz", phantom(), codes=(0, 0))
    entry = COMMON | {
        "format": "folder", "kind": "volume", "file": str(tmp_path / "own"), "patient": "per-image",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"1 of 1 .*neither qform nor sform .* give orientation in the"):
        run(entry)
    folder = run(entry | {"orientation": "LAS"})
    np.testing.assert_array_equal(folder.pixels("first"), phantom()[::-1].transpose(2, 1, 0))
    assert folder.info.assumptions == ("neither qform nor sform: axes LAS were taken as given",)


def test_a_photometric_interpretation_that_the_file_contradicts_is_refused(run, tmp_path):
    for name in ("normal", "opacity"):
        write_dicom(tmp_path / f"own/{name}/{name}.dcm", np.zeros((4, 4), np.uint8))
    entry = COMMON | {"format": "folder", "file": str(tmp_path / "own"), "patient": "per-image"}
    assert run(entry | {"photometric_interpretation": "MONOCHROME2"}).info.assumptions == ()
    with pytest.raises(ValueError, match="MONOCHROME1 was given, but the file says MONOCHROME2; remove it"):
        run(entry | {"photometric_interpretation": "MONOCHROME1"}, "other")
    with pytest.raises(ValueError, match="photometric_interpretation is of DICOM: kind image or volume"):
        run(entry | {"kind": "slide", "photometric_interpretation": "MONOCHROME1"}, "other")


def test_multilabel_table(run, tmp_path, table):
    entry = {
        key: value
        for key, value in table.items()
        if key not in ("label_column", "values", "boxes", "positive")
    }
    (tmp_path / "own/t.csv").write_text(
        "file,patient,m,e\n0.png,A,1,0\n1.png,A,,1\n2.png,B,0,0\n3.png,C,0,1\n"
    )
    samples = run(
        entry | {"task": "multilabel", "classes": ["mass", "edema"],
                 "label_columns": {"mass": "m", "edema": "e"},
                 "columns": {"patient": "patient"}}
    ).samples  # fmt: skip
    np.testing.assert_array_equal(samples["label_mass"], [1, np.nan, 0, 0])
    np.testing.assert_array_equal(samples["label_edema"], [0, 1, 0, 1])


def test_what_cadx_new_describes_can_be_ingested(run, tmp_path):
    write_xray_cohort(tmp_path / "own", XrayPhantom(**PHANTOM, faults=Faults(identifiers=2)))
    described = describe_folder(tmp_path / "own").entry
    folder = run(described.model_dump(mode="json", exclude_defaults=True))
    truth = pd.read_csv(tmp_path / "own/labels.csv")
    assert folder.samples["label_opacity"].sum() == truth["label_opacity"].sum()
    assert 1 < folder.samples["patient"].nunique() <= PHANTOM["num_patients"]


def test_volumes_that_cadx_new_describes_can_be_ingested(run, tmp_path):
    for name, patient in (("ill", "A"), ("ill", "B"), ("well", "C")):
        (tmp_path / "own" / name).mkdir(parents=True, exist_ok=True)
        write_series(tmp_path / "own" / name / patient, phantom(), PatientID=patient, PatientName="Doe^Jane")
    described = describe_folder(tmp_path / "own").entry
    samples = run(described.model_dump(mode="json", exclude_defaults=True)).samples
    assert samples["label_ill"].tolist() == [1, 1, 0]
    assert samples["patient"].nunique() == 3
    assert samples[["depth_px", "height_px", "width_px"]].to_numpy().tolist() == [[5, 6, 7]] * 3


@pytest.mark.parametrize("form", ["table", "coco", "voc"])
def test_boxes_that_cadx_new_describes_can_be_ingested(run, tmp_path, form):
    described = describe_folder(boxed(tmp_path / "own", form)).entry
    folder = run(described.model_dump(mode="json", exclude_defaults=True))
    assert len(folder.samples) == 6
    assert sorted(folder.boxes["class"]) == ["mass", "nodule", "nodule"]
    assert folder.samples[["label_mass", "label_nodule"]].sum().tolist() == [1, 2]


# --- Pieces of volumes --------------------------------------------------------------------------------

AFFINE = np.diag([1.0, 1.0, 2.0, 1.0])


@pytest.fixture
def volumes(tmp_path) -> dict[str, object]:
    """An entry for pieces of three volumes, D H W = S A R of 2 x 1 x 1 mm, in each of which two blocks are marked."""
    rng = np.random.default_rng(5)
    for folder in ("images", "masks"):
        (tmp_path / "own" / folder).mkdir(parents=True)
    for name, side in (("a", 26), ("b", 30), ("c", 34)):
        mask = np.zeros((side // 2, side, side), np.uint8)
        mask[4:9, 7:13, 9:17] = 7
        mask[4:9, 13:19, 9:17] = 3
        voxels = rng.normal(100 * side, 20, mask.shape).astype(np.float32)
        for folder, array in (("images", voxels), ("masks", mask)):
            nibabel.save(nibabel.Nifti1Image(array.T, AFFINE), tmp_path / f"own/{folder}/{name}.nii.gz")
    return COMMON | {
        "format": "pairs", "kind": "volume", "task": "multiclass", "classes": ["neither", "front", "back"],
        "positive": None, "file": str(tmp_path / "own"), "images": "images", "masks": "masks",
        "mask_values": {"front": 3, "back": 7}, "patient": "per-image",
        "patches": {"size_mm": [8, 8, 7], "per_class": 3, "other": "neither", "margin_mm": 2},
    }  # fmt: skip


def test_a_pieces_label_is_what_the_mask_says_at_its_middle(run, volumes, tmp_path):
    folder = run(volumes)
    samples = folder.samples
    assert len(samples) == 3 * 3 * 3
    for sample in samples.itertuples():
        name, *middle = sample.sample_id.split("-")
        d, h, w = map(int, middle)
        voxels, mask = (
            np.asarray(nibabel.load(tmp_path / f"own/{kind}/{name}.nii.gz").dataobj).T
            for kind in ("images", "masks")
        )
        value = mask[d, h, w]
        label = {0: "neither", 3: "front", 7: "back"}[int(value)]
        assert [getattr(sample, f"label_{other}") for other in volumes["classes"]] == [
            float(other == label) for other in volumes["classes"]
        ]
        piece = folder.pixels(sample.sample_id)
        assert piece.shape == (4, 8, 7), "whole, in voxels of 2 x 1 x 1 mm"
        np.testing.assert_array_equal(piece, voxels[d - 2 : d + 2, h - 4 : h + 4, w - 3 : w + 4])
        others = cKDTree(np.argwhere(mask != value) * [2, 1, 1])
        assert others.query([2 * d, h, w])[0] >= 2
    assert samples[["spacing_slice_mm", "spacing_row_mm", "spacing_column_mm"]].to_numpy().tolist() == (
        len(samples) * [[2, 1, 1]]
    )


def test_all_pieces_of_a_volume_are_of_one_patient(run, volumes):
    folder = run(volumes)
    assert folder.info.clustered
    assert folder.samples["patient"].tolist() == folder.samples["sample_id"].str.partition("-")[0].tolist()
    assert folder.samples["patient"].nunique() == 3


def test_pieces_are_the_same_bytes_twice_and_hang_on_their_own_volume_alone(run, volumes, tmp_path):
    one, other = run(volumes, "one"), run(volumes, "other")
    assert digest_path(one.path) == digest_path(other.path)
    for kind in ("images", "masks"):
        (tmp_path / f"own/{kind}/a.nii.gz").unlink()
    kept = [name for name in one.samples["sample_id"] if not name.startswith("a")]
    assert run(volumes, "without").samples["sample_id"].tolist() == kept


def test_a_volume_that_lacks_a_class_gives_fewer_pieces(run, volumes, tmp_path):
    mask = np.zeros((13, 26, 26), np.uint8)
    mask[4:9, 7:13, 9:17] = 7
    nibabel.save(nibabel.Nifti1Image(mask.T, AFFINE), tmp_path / "own/masks/a.nii.gz")
    counts = run(volumes).samples.groupby("patient")[["label_front", "label_back"]].sum()
    assert counts.loc["a"].tolist() == [0, 3]


@pytest.mark.parametrize(
    ("patches", "reason"),
    [
        ({"size_mm": [28, 8, 8]}, r"1 of 3 .* its 13 x 26 x 26 voxels do not hold a patch of 14 x 8 x 8"),
        ({"margin_mm": 40}, r"3 of 3 .* no place for a patch"),
    ],
)
def test_volumes_without_room_for_a_piece_stop(run, volumes, patches, reason):
    with pytest.raises(ValueError, match=reason):
        run(volumes | {"patches": volumes["patches"] | patches})


def test_a_value_that_is_no_class_stops_pieces_too(run, volumes, tmp_path):
    mask = np.full((13, 26, 26), 9, np.uint8)
    nibabel.save(nibabel.Nifti1Image(mask.T, AFFINE), tmp_path / "own/masks/a.nii.gz")
    with pytest.raises(ValueError, match="image 1 in sorted order: its mask holds 9"):
        run(volumes)


# --- Identifiers --------------------------------------------------------------------------------------


@pytest.fixture
def identified(tmp_path) -> dict[str, object]:
    """A cohort of real DICOM files with a planted name, in tags and in a file's name; one is 97 years old."""
    own = tmp_path / "own"
    write_xray_cohort(own, XrayPhantom(**PHANTOM))
    labels = pd.read_csv(own / "labels.csv", dtype=str)
    for index in (2, 5):
        path = own / labels.loc[index, "file"]
        ds = pydicom.dcmread(path)
        ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientAge = NAME, NAME, "19280301", "097Y"
        del ds.PatientIdentityRemoved
        named = path.with_name(f"Ignatowska_{index}.dcm")
        pydicom.dcmwrite(named, ds, enforce_file_format=True)
        path.unlink()
        labels.loc[index, "file"] = f"images/{named.name}"
    labels.to_csv(own / "labels.csv", index=False)
    (own / "boxes.csv").unlink()
    return COMMON | {
        "format": "table", "file": str(own), "patient": "hmac", "table": "labels.csv",
        "label_column": "label_opacity", "values": {"0": "normal", "1": "opacity"},
    }  # fmt: skip


def test_ingest_stops_on_identifiers_and_names_tags_and_count(run, identified):
    with pytest.raises(ValueError, match=r"patient identifiers in 2 of \d+ images") as caught:
        run(identified)
    message = str(caught.value)
    assert "(PatientBirthDate, PatientID, PatientName)" in message
    assert "deidentify: true" in message
    assert "Ignatowska" not in message


def test_deidentified_dataset_holds_no_byte_of_a_name(run, identified, capfd, caplog):
    folder = run(identified | {"deidentify": True})
    out, err = capfd.readouterr()
    texts = [path.read_bytes() for path in folder.path.rglob("*") if path.is_file()]
    texts += [out.encode(), err.encode(), caplog.text.encode()]
    # Parquet compresses; so the values are looked at as well.
    texts += [
        folder.samples.to_csv().encode(),
        folder.boxes.to_csv().encode(),
        folder.info.model_dump_json().encode(),
    ]
    for secret in (b"Ignatowska", b"Bronislawa", b"19280301"):
        assert not any(secret in text for text in texts)
    samples = folder.samples
    assert samples["sample_id"].str.fullmatch("x[0-9a-f]{12}").all()
    assert samples["patient"].str.fullmatch("p[0-9a-f]{16}").all()
    assert samples["age"].max() == 90
    assert "ages above 89 were set to 90" in folder.info.assumptions
    assert (samples["patient"].value_counts() >= 2).any(), "the two images of one name stay one patient"


def test_another_site_key_gives_other_pseudonyms(run, identified, monkeypatch):
    one = run(identified | {"deidentify": True}, "one").samples
    monkeypatch.setenv("CADX_SITE_KEY", 32 * "77")
    other = run(identified | {"deidentify": True}, "other").samples
    for column in ("sample_id", "patient"):
        assert not set(one[column]) & set(other[column])


@pytest.mark.parametrize("value", ["YES", "Y"])
def test_burned_in_identifiers_cannot_be_dropped(run, tmp_path, identified, value):
    path = sorted((tmp_path / "own/images").glob("*.dcm"))[0]
    ds = pydicom.dcmread(path)
    ds.BurnedInAnnotation = value
    pydicom.dcmwrite(path, ds)
    with pytest.raises(ValueError, match=r"BurnedInAnnotation.*in their pixels"):
        run(identified | {"deidentify": True})


def test_a_policy_that_needs_patients_refuses_images_without(run, folders):
    with pytest.raises(ValueError, match=r"5 of 5 images cannot be taken: class normal, file 1.*no patient"):
        run(folders | {"patient": "hmac"})


# --- Bad input ----------------------------------------------------------------------------------------


def test_unreadable_files_are_counted_and_at_most_five_listed(run, folders, tmp_path):
    for index in range(7):
        (tmp_path / f"own/normal/Ignatowska{index}.dcm").write_text("a text file")
    (tmp_path / "own/opacity/o0.png").write_bytes((tmp_path / "own/opacity/o0.png").read_bytes()[:40])
    (tmp_path / "own/opacity/o1.png").write_bytes(b"")
    with pytest.raises(ValueError, match="mine: 9 of 12 images cannot be taken") as caught:
        run(folders)
    message = str(caught.value)
    assert message.count("neither DICOM, PNG nor JPEG") == 5
    assert "and 4 more" in message
    assert "Ignatowska" not in message


def test_phantom_with_corrupt_files_stops(run):
    entry = COMMON | {
        "format": "phantom",
        "patient": "public",
        "parameters": PHANTOM | {"faults": {"corrupt_files": 3}},
    }
    with pytest.raises(ValueError, match=r"3 of \d+ images cannot be taken") as caught:
        run(entry)
    for reason in ("damaged or truncated", "an empty file", "neither DICOM, PNG nor JPEG"):
        assert reason in str(caught.value)


def test_corrupt_files_are_left_out_by_declaration_and_listed_to_the_end(run, tmp_path):
    entry = COMMON | {
        "format": "phantom",
        "patient": "public",
        "parameters": PHANTOM | {"faults": {"corrupt_files": 3}},
    }
    whole = run({**entry, "parameters": PHANTOM}, out="whole")
    folder = run(entry, unreadable="leave_out")
    assert len(folder.info.left_out) == 3
    assert len(folder.samples) == len(whole.samples) - 3
    validate(
        dataset=tmp_path / "dataset",
        validation=tmp_path / "validation.json",
        report=tmp_path / "validation.html",
        params="{}",
    )
    record = json.loads((tmp_path / "validation.json").read_text())
    assert [one["reason"] for one in record["left_out"]] == [one.reason for one in folder.info.left_out]
    (rule,) = [rule for rule in record["rules"] if rule["name"] == "left_out"]
    assert (rule["count"], rule["severity"]) == (3, "warn")
    page = (tmp_path / "validation.html").read_text()
    assert all(one.place in page for one in folder.info.left_out)
    with pytest.raises(ValueError, match=r"rule left_out: 3 images of the source could not be taken"):
        validate(
            dataset=tmp_path / "dataset",
            validation=tmp_path / "v.json",
            report=tmp_path / "v.html",
            params='{"left_out": "stop"}',
        )


def test_orphans_of_a_table_stay_out_by_declaration_and_each_is_named_by_its_rule(run, table, tmp_path):
    write_rows(tmp_path, *(f"{index}.png,no,P,,,,," for index in range(4)), "gone.png,no,P,,,,,")
    write_png(tmp_path / "own/images/Ignatowska.png", np.zeros((4, 4), np.uint8))
    boxes = (tmp_path / "own/boxes.csv").read_text()
    (tmp_path / "own/boxes.csv").write_text(f"{boxes}Ignatowska.png,r1,yes,1,2,3,4\n")
    with pytest.raises(ValueError, match=r"row 6: its image file is not there; .* set ingest\.orphans"):
        run(table)
    folder = run(table, orphans="leave_out")
    assert len(folder.samples) == 4
    assert [one.reason for one in folder.info.left_out] == [
        "label_without_image: its image file is not there",
        "label_without_image: its boxes have no row",
        "image_without_label: it has no row",
    ]
    assert not any("Ignatowska" in one.place for one in folder.info.left_out)


def test_folders_and_classes_must_agree(run, folders, tmp_path):
    (tmp_path / "own/Ignatowska").mkdir()
    with pytest.raises(ValueError, match="1 of 3 folders are none of the classes normal, opacity") as caught:
        run(folders)
    assert "Ignatowska" not in str(caught.value)
    (tmp_path / "own/Ignatowska").rmdir()
    with pytest.raises(ValueError, match="class fracture has no folder"):
        run(folders | {"task": "multiclass", "positive": None, "classes": ["normal", "opacity", "fracture"]})


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("3.png,maybe,Ignatowska,,,,,", "t.csv row 5, column ill: a label that is none of no, yes"),
        ("4.png,no,Ignatowska,,,,,", "t.csv row 5: its image file is not there"),
        ("2.png,no,Ignatowska,,,,,", "t.csv row 5: the same file as t.csv row 4"),
        ("../t.csv,no,Ignatowska,,,,,", "t.csv row 5: column file must be a path within the source"),
        ("3.png,no,Ignatowska,,,,,maybe", "t.csv row 5, column split: not train, val"),
        ("3.png,no", "t.csv row 5: 2 cells, but 8 columns"),
        ("3.png,no,,,,,,", "1 of 4 images cannot be taken: t.csv row 5: no patient"),
    ],
)
def test_bad_rows(run, table, tmp_path, row, reason):
    write_rows(tmp_path, *(f"{index}.png,no,P,,,,," for index in range(3)), row)
    with pytest.raises(ValueError, match=reason) as caught:
        run({key: value for key, value in table.items() if key != "boxes"})
    assert "Ignatowska" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("1.png,r1,no,1,2,3,4", "boxes.csv row 2: a box of a class that is none of yes"),
        ("1.png,r1,yes,1,2,x,4", "boxes.csv row 2: not a number"),
        ("9.png,r1,yes,1,2,3,4", "boxes.csv: boxes of 1 files that have no row"),
    ],
)
def test_bad_boxes(run, table, tmp_path, row, reason):
    (tmp_path / "own/boxes.csv").write_text(f"file,reader,what,x,y,w,h\n{row}\n")
    with pytest.raises(ValueError, match=reason):
        run(table)


def test_image_without_row_and_missing_table_and_column(run, table, tmp_path):
    write_png(tmp_path / "own/images/Ignatowska.png", np.zeros((4, 4), np.uint8))
    with pytest.raises(ValueError, match=r"t\.csv: 1 samples beside the listed have no row") as caught:
        run(table)
    assert "Ignatowska" not in str(caught.value)
    with pytest.raises(ValueError, match=r"t\.csv: its first line names no column 'truth'"):
        run(table | {"label_column": "truth"})
    with pytest.raises(ValueError, match=r"labels\.csv: no such table"):
        run(table | {"table": "labels.csv"})


def test_names_that_differ_only_in_the_extension(run, folders, tmp_path):
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "own/normal/n0.jpg")
    with pytest.raises(ValueError, match=r"file 1 .* and .*file 2 .*differ only in the extension"):
        run(folders)


def test_differing_digest_is_refused_with_both_named(run, folders, tmp_path):
    found = digest_path(tmp_path / "own")
    declared = "sha256:" + 64 * "0"
    for entry, digest in ((folders | {"digest": declared}, ""), (folders, declared)):
        with pytest.raises(ValueError, match="digest") as caught:
            run(entry, digest=digest)
        assert found in str(caught.value)
        assert declared in str(caught.value)
    assert len(run(folders | {"digest": found}, digest=found).samples) == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"train_labels": np.array([[0], [7]])},
            r"train_labels row 1: \[7\] is none of .*0 normal, 1 opacity",
        ),
        ({"train_labels": np.array([[0]])}, "do not have equal lengths"),
        ({"train_images": np.zeros((2, 4, 4, 4), np.uint8)}, "must be N H W or N H W 3"),
        ({"train_images": np.zeros((2, 4, 4))}, "of uint8, uint16, not float64"),
        (
            {"extra_images": np.zeros((2, 4, 4), np.uint8), "extra_labels": np.zeros((2, 1))},
            "extra_images belongs to none",
        ),
        (
            {"test_labels": np.array([[0]])},
            "test_labels without test_images; add these, or take the labels out",
        ),
    ],
)
def test_bad_arrays(run, tmp_path, changes, reason):
    arrays = {"train_images": np.zeros((2, 4, 4), np.uint8), "train_labels": np.array([[0], [1]])}
    np.savez(tmp_path / "set.npz", **(arrays | changes))
    entry = COMMON | {"format": "npz", "file": str(tmp_path / "set.npz"), "patient": "per-image"}
    with pytest.raises(ValueError, match=reason):
        run(entry)


def test_unknown_source_parameter_and_phantom_parameter(run, tmp_path, root):
    with pytest.raises(ValueError, match=r"mine\.parameters\.num_patient: unknown parameter.*'num_patients'"):
        run(
            COMMON
            | {"format": "phantom", "patient": "public", "parameters": {"modality": "xray", "num_patient": 3}}
        )
    paths = {"catalog": root / "data/catalog.yaml", "cache": tmp_path / "c", "dataset": tmp_path / "d"}
    with pytest.raises(ValueError, match="did you mean 'pneumoniamnist'"):
        ingest(**paths, params=json.dumps({"source": "pneumoniamnis"}))
    with pytest.raises(ValueError, match=r"ingest\.sourc: unknown parameter; did you mean 'source'"):
        ingest(**paths, params=json.dumps({"sourc": "pneumoniamnist"}))


# --- Masks, arrays and bags ---------------------------------------------------------------------------


def pairs(folder: Path, mask: Image.Image, name: str = "a.png") -> dict[str, object]:
    write_png(folder / "own/images" / name, np.full((6, 5), 9, np.uint8))
    (folder / "own/masks").mkdir(exist_ok=True)
    mask.save(folder / "own/masks" / name)
    return {key: value for key, value in COMMON.items() if key != "positive"} | {
        "format": "pairs", "task": "multilabel", "classes": ["lesion"], "file": str(folder / "own"),
        "images": "images", "masks": "masks", "mask_values": {"lesion": 1}, "patient": "per-image",
    }  # fmt: skip


def test_masks_of_one_bit_and_of_a_palette_are_read_by_their_values(run, tmp_path):
    drawn = np.zeros((6, 5), np.uint8)
    drawn[2:4, 1:3] = 1
    palette = Image.fromarray(drawn, "P")
    palette.putpalette([0, 0, 0, 255, 255, 255])
    for number, mask in enumerate((Image.fromarray(drawn), Image.fromarray(drawn.astype(bool)), palette)):
        folder = run(pairs(tmp_path, mask), out=f"made{number}")
        np.testing.assert_array_equal(folder.mask("a"), drawn)
        assert folder.labels().tolist() == [[1.0]]


def test_a_mask_value_that_is_no_class_is_refused_and_not_taken_for_background(run, tmp_path):
    drawn = np.zeros((6, 5), np.uint8)
    drawn[2:4, 1:3] = 85
    with pytest.raises(
        ValueError, match=r"image 1 in sorted order: its mask holds 85, .* 0 background, 1 lesion"
    ):
        run(pairs(tmp_path, Image.fromarray(drawn)))


def test_boxes_of_an_image_of_another_size_are_refused(run, tmp_path):
    write_png(tmp_path / "own/JPEGImages/a.png", np.zeros((6, 5), np.uint8))
    (tmp_path / "own/Annotations").mkdir()
    note = tmp_path / "own/Annotations/a.xml"
    entry = COMMON | {
        "task": "detection", "classes": ["cell"], "positive": None, "format": "voc",
        "file": str(tmp_path / "own"), "patient": "per-image",
    }  # fmt: skip
    size = "<annotation><size><width>{}</width><height>{}</height></size></annotation>"
    note.write_text(size.format(6, 5))
    with pytest.raises(
        ValueError, match=r"drawn in an image of another size \(\(5, 6\) px, this one has \(6, 5\)"
    ):
        run(entry)
    note.write_text(size.format(5, 6))
    assert len(run(entry).samples) == 1


def test_a_damaged_jpeg_is_not_ingested(run, folders, tmp_path):
    """Its decoders would fill what is missing with gray."""
    file = tmp_path / "own/opacity/o9.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), np.uint8)
    Image.fromarray(noise).save(file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-600] + whole[-2:])
    with pytest.raises(ValueError, match="JPEG: damaged, truncated or of a rare kind"):
        run(folders)


def test_a_mask_is_no_jpeg_whose_noise_would_become_classes(run, tmp_path):
    with pytest.raises(ValueError, match="image 1 in sorted order: a mask must be a PNG"):
        run(pairs(tmp_path, Image.fromarray(np.zeros((6, 5), np.uint8)), name="a.jpg"))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"train_labels": np.array([0.9, 1.7])}, "train_labels must be whole numbers"),
        ({"train_labels": np.array(["Doe", "Roe"])}, "train_labels must be whole numbers"),
        ({"train_labels": np.array(1)}, "do not have equal lengths"),
        ({"train_images": np.array(1, np.uint8)}, "must be N H W"),
        ({"train_images": np.zeros((2, 0, 5), np.uint8)}, "train_images is empty"),
    ],
)
def test_arrays_of_another_form_are_refused(run, tmp_path, arrays, message):
    whole = {"train_images": np.zeros((2, 6, 5), np.uint8), "train_labels": np.array([0, 1])}
    np.savez(tmp_path / "own.npz", **(whole | arrays))
    with pytest.raises(ValueError, match=message) as caught:
        run(COMMON | {"format": "npz", "file": str(tmp_path / "own.npz"), "patient": "per-image"})
    assert "Doe" not in str(caught.value)


def test_arrays_that_nobody_asked_for_are_not_unpacked(run, tmp_path):
    np.savez_compressed(
        tmp_path / "own.npz",
        train_images=np.zeros((2, 6, 5), np.uint8),
        train_labels=np.array([0, 1]),
        bomb=np.zeros(400_000_000, np.uint8),
    )
    tracemalloc.start()
    run(COMMON | {"format": "npz", "file": str(tmp_path / "own.npz"), "patient": "per-image"})
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100_000_000


def test_patient_1_of_one_hospital_is_not_patient_1_of_another(run, tmp_path):
    for name in ("hill", "harbour"):
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / f"own/{name}.csv").write_text("pid,chol,ill\n1,200,no\n2,210,yes\n")
    entry = COMMON | {
        "format": "bags", "kind": "features", "file": str(tmp_path / "own"), "patient": "hmac",
        "tables": {"Hill": "hill.csv", "Harbour": "harbour.csv"}, "patient_column": "pid",
        "label_column": "ill", "values": {"no": "normal", "yes": "opacity"},
    }  # fmt: skip
    folder = run(entry)
    assert folder.info.num_patients == 4
    assert folder.pixels(folder.samples["sample_id"][0]).tolist() == [[200]]


def test_no_error_of_the_disk_repeats_a_files_name(run, table, tmp_path):
    too_long = "Doe^Jane" * 60
    write_rows(tmp_path, f"{too_long},no,A1,Hill,45,F,PA,train")
    with pytest.raises(ValueError, match="mine: the source cannot be listed") as caught:
        run(table)
    assert "Doe" not in str(caught.value)
