"""A hospital's own folder as an entry: what is recognised, what is said, and what is refused."""

import json
import os
import shutil
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MediaStorageDirectoryStorage, generate_uid
from test_catalog import write_catalog
from test_dicom import dicom, encode
from test_volumes import phantom, write_nifti, write_series

from cadx.catalog import FolderEntry, TableEntry, load_catalog
from cadx.describing import describe_folder
from cadx.files import digest_path
from cadx.layouts import Box, FileEntry, list_items
from cadx.loading import VolumePreprocessing
from cadx.loading.patches import VolumeSource
from cadx.phantom.cohort import Faults
from cadx.phantom.slide import SlidePhantom
from cadx.phantom.volume import VolumePhantom
from cadx.phantom.xray import XrayPhantom, write_xray_cohort
from cadx.reading.volumes import read_volume
from components.train import TrainParams


def write_png(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


def classes(folder: Path, **counts: int) -> Path:
    """A folder per class with so many images, no two alike."""
    for offset, (name, count) in enumerate(counts.items()):
        for number in range(count):
            write_png(folder / name / f"{number}.png", (40 * offset + number) % 256)
    return folder


def table(folder: Path, *lines: str, name: str = "labels.csv") -> Path:
    """A table and the images that its first column names."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    for number, line in enumerate(lines[1:]):
        write_png(folder / line.split(",")[0].replace("\\", "/"), number)
    return folder


def test_a_folder_per_class(tmp_path):
    classes(tmp_path / "own set", healthy=5, ill=2)
    described, _, notes, _ = describe_folder(tmp_path / "own set")
    assert isinstance(described, FolderEntry)
    assert (described.task, described.classes, described.positive) == ("binary", ("healthy", "ill"), "ill")
    assert described.patient == "per-image"
    assert described.digest == digest_path(tmp_path / "own set")
    assert Path(described.file).is_absolute()
    assert any("positive is 'ill'" in note for note in notes)
    assert any("images of one patient will stand in train and test" in note for note in notes)
    assert describe_folder(tmp_path / "own set", positive="healthy").entry.positive == "healthy"
    with pytest.raises(ValueError, match="healthy, ill"):
        describe_folder(tmp_path / "own set", positive="sick")


def test_what_is_described_survives_the_catalogue_file(tmp_path):
    for index in range(4):
        write_png(tmp_path / f"own/{'ab'[index % 2]}/{index}.png", index)
    described = describe_folder(tmp_path / "own").entry
    path = write_catalog(tmp_path / "c.yaml", own=described.model_dump(mode="json", exclude_defaults=True))
    assert load_catalog(path) == {"own": described}


def test_class_folders_within_split_folders(tmp_path):
    for split in ("train", "val", "test"):
        for name in ("NORMAL", "PNEUMONIA", "TB"):
            write_png(tmp_path / f"own/{split}/{name}/1.png")
    described = describe_folder(tmp_path / "own").entry
    assert isinstance(described, FolderEntry)
    assert described.classes == ("NORMAL", "PNEUMONIA", "TB")
    assert (described.task, described.positive) == ("multiclass", None)
    assert described.split_folders == {"train": "train", "val": "val", "test": "test"}


def test_a_table_with_usual_column_names(tmp_path):
    lines = ["Image Index;Diagnosis;Patient ID;Gender;Split"]
    for index in range(6):
        write_png(tmp_path / f"own/images/{index}.png", index)
        lines.append(f"{index}.png;{'sick' if index == 0 else 'well'};{index // 2};F;train")
    (tmp_path / "own/list.csv").write_text("\n".join(lines))
    described = describe_folder(tmp_path / "own").entry
    assert isinstance(described, TableEntry)
    assert (described.table, described.images, described.file_column) == ("list.csv", "images", "Image Index")
    assert (described.classes, described.positive, described.patient) == (("sick", "well"), "sick", "hmac")
    columns = described.columns.model_dump(exclude_none=True)
    assert columns == {"patient": "Patient ID", "sex": "Gender", "split": "Split"}


def test_several_label_columns_are_multilabel(tmp_path):
    for index in range(3):
        write_png(tmp_path / f"own/{index}.png")
    (tmp_path / "own/t.csv").write_text("file,label_mass,label_edema\n0.png,1,0\n1.png,0,\n2.png,1,1\n")
    described = describe_folder(tmp_path / "own").entry
    assert isinstance(described, TableEntry)
    assert (described.task, described.classes) == ("multilabel", ("mass", "edema"))
    assert described.label_columns == {"mass": "label_mass", "edema": "label_edema"}
    (tmp_path / "own/t.csv").write_text("file,label_mass,label_edema\n0.png,1,0\n1.png,0,\n2.png,1,0\n")
    assert describe_folder(tmp_path / "own").entry.classes == ("mass", "edema"), "also one that nobody has"


def test_dicom_with_identifiers_is_deidentified_and_says_so(tmp_path):
    config = XrayPhantom(num_patients=8, prevalence=0.3, size_px=48, faults=Faults(identifiers=8))
    write_xray_cohort(tmp_path / "own", config)
    described, _, notes, _ = describe_folder(tmp_path / "own")
    assert isinstance(described, TableEntry)
    assert (described.classes, described.positive) == (("no_opacity", "opacity"), "opacity")
    assert (described.patient, described.deidentify) == ("hmac", True)
    assert described.boxes is not None
    assert any("PatientName" in note for note in notes)
    assert not any("Phantom^" in note for note in notes)


def test_folders_that_are_neither(tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        describe_folder(tmp_path / "absent")
    write_png(tmp_path / "flat/1.png")
    with pytest.raises(ValueError, match="0 folders with files where 2 to 50"):
        describe_folder(tmp_path / "flat")
    (tmp_path / "flat/t.csv").write_text("picture,colour\n1.png,red\n")
    with pytest.raises(ValueError, match="no columns for file and label"):
        describe_folder(tmp_path / "flat")


@pytest.mark.parametrize(
    ("counts", "positive", "why"),
    [
        ({"normal": 2, "pneumonia": 5}, "pneumonia", "the other says that nothing was found"),
        ({"no_nodule": 3, "nodule": 3}, "nodule", "the other says that nothing was found"),
        ({"mass": 4, "cyst": 2}, "cyst", "the rarest class"),
        ({"mass": 2, "cyst": 2}, "mass", "the second of two that are as frequent"),
    ],
    ids=str,
)
def test_the_positive_class_is_the_one_that_people_look_for(tmp_path, counts, positive, why):
    described, _, notes, _ = describe_folder(classes(tmp_path / "own", **counts))
    assert described.positive == positive
    assert any(f"positive is {positive!r}" in note and why in note for note in notes)


@pytest.mark.parametrize("cells", [("1", "0"), ("1.0", "0.0"), ("True", "False")])
def test_a_flags_own_class_is_looked_for_however_it_says_yes(tmp_path, cells):
    rows = [f"{number}.png,{cells[number % 3 == 0]}" for number in range(6)]
    described = describe_folder(table(tmp_path / "own", "file,label_ill", *rows)).entry
    assert (described.classes, described.positive) == (("no_ill", "ill"), "ill")
    assert described.values[cells[0]] == "ill"


def test_official_splits_are_kept_where_they_are_whole(tmp_path):
    for split in ("train", "val", "test"):
        classes(tmp_path / "whole" / split, normal=1, ill=1)
    assert describe_folder(tmp_path / "whole").has_splits
    for split in ("train", "test"):
        classes(tmp_path / "part" / split, normal=1, ill=1)
    described, has_splits, notes, _ = describe_folder(tmp_path / "part")
    assert not has_splits
    assert described.split_folders == {"train": "train", "test": "test"}
    assert any("only test and train are there" in note for note in notes)
    rows = [f"{n}.png,{'ab'[n % 2]},{word}" for n, word in enumerate(("train", "val", "test", "later"))]
    _, has_splits, notes, _ = describe_folder(table(tmp_path / "table", "file,label,split", *rows))
    assert not has_splits
    assert any("column split is passed over" in note for note in notes)


def test_one_file_without_a_patient_does_not_make_every_image_a_patient(tmp_path):
    for number in range(12):
        path = tmp_path / "own" / "ab"[number % 2] / f"{number}.dcm"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(dicom(PatientID="" if number == 5 else f"P{number // 2}")))
    described, _, notes, _ = describe_folder(tmp_path / "own")
    assert described.patient == "hmac"
    assert any("1 of 12 sampled files name no patient" in note for note in notes)


def test_colour_is_seen_and_said(tmp_path):
    described = describe_folder(classes(tmp_path / "own", naevus=3, melanoma=3))
    assert described.train["preprocessing"]["channels"] == 1
    assert not any("colour" in note for note in described.notes)
    colours = np.zeros((8, 8, 3), np.uint8)
    colours[..., 0] = 200
    Image.fromarray(colours).save(tmp_path / "own/naevus/1.png")
    described = describe_folder(tmp_path / "own")
    assert described.train["preprocessing"]["channels"] == 3
    assert any(
        "1 of 6 sampled files are in colour, so preprocessing.channels is 3" in n for n in described.notes
    )


@pytest.mark.parametrize(("value", "is_said"), [("YES", True), ("UNKNOWN", True), ("NO", False)])
def test_letters_burned_in_are_said_as_ingest_refuses_them(tmp_path, value, is_said):
    for name in "ab":
        (tmp_path / "own" / name).mkdir(parents=True)
        file = encode(dicom(PatientID="7", BurnedInAnnotation=value))
        (tmp_path / "own" / name / "1.dcm").write_bytes(file)
    _, _, notes, _ = describe_folder(tmp_path / "own")
    assert any("BurnedInAnnotation is not NO: ingest refuses" in note for note in notes) == is_said


def test_columns_that_are_not_read_are_said(tmp_path):
    rows = ["a.png,x,1", "b.png,y,2"]
    _, _, notes, _ = describe_folder(table(tmp_path / "own", "file,label,Fallnummer", *rows))
    assert any("columns passed over: Fallnummer; name them patient" in note for note in notes)
    described = describe_folder(table(tmp_path / "de", "Datei,Befund,Patienten-ID", *rows)).entry
    assert described.columns.patient == "Patienten-ID"


def test_findings_beside_a_label_are_said(tmp_path):
    rows = ["a.png,x,1,0", "b.png,y,0,1"]
    own = table(tmp_path / "own", "file,label,label_mass,label_edema", *rows)
    described, _, notes, _ = describe_folder(own)
    assert described.classes == ("x", "y")
    assert any(
        "columns passed over: label_mass, label_edema, as column label is the label" in n for n in notes
    )


@pytest.mark.parametrize("images", ["table", "folders"])
def test_a_table_that_is_not_read_is_said_with_the_columns_that_it_needs(tmp_path, images):
    if images == "table":
        own = table(tmp_path / "own", "file,label", "a.png,x", "b.png,y")
        (own / "ages.csv").write_text("patient,age\nA,60\n")
    else:
        own = classes(tmp_path / "own", x=1, y=1)
    (own / "boxes.csv").write_text("image,label,left,top,right,bottom\na.png,x,1,1,9,9\n")
    notes = describe_folder(own).notes
    assert any(
        "boxes.csv is passed over: " in note and "file, class, x0, y0, x1, y1 (" in note for note in notes
    )
    assert any("tables passed over: 1" in note for note in notes) == (images == "table")
    if images == "table":
        (own / "boxes.csv").write_text("file,class,x0,y0,x1,y1\na.png,x,1,1,9,9\n")
        described, _, notes, _ = describe_folder(own)
        assert described.boxes.table == "boxes.csv"
        assert (
            "boxes.csv is read by its columns file, class, x0, y0, x1, y1: pixels from 0, an end lies one beyond"
            in notes
        )
        assert any("to learn to find boxes, take the columns of labels out" in note for note in notes)
        (own / "boxes.csv").write_text("file,class,x0,y0,x1,y1\na.png,z,1,1,9,9\n")
        described, _, notes, _ = describe_folder(own)
        assert described.boxes is None
        assert "boxes.csv is passed over: z are no labels" in notes


def test_paths_that_windows_wrote_are_read(tmp_path):
    described = describe_folder(table(tmp_path / "own", "file,label", "in\\a.png,x", "in\\b.png,y")).entry
    assert described.classes == ("x", "y")


def named_like_patients(own: Path) -> None:
    for number, name in enumerate(("Meier^Hans", "Roth^Eva")):
        write_png(own / name / "1.png", number)


def named_like_their_files_patients(own: Path) -> None:
    for name in ("MEIER-0012", "ROTH-0044"):
        (own / name).mkdir(parents=True)
        (own / name / "1.dcm").write_bytes(encode(dicom(PatientID=name)))


def named_as_their_files_name_patients(own: Path) -> None:
    """Orders, cases and marks of composition that differ from the header's; a family name alone; one empty folder."""
    for number, folder in enumerate(("Hans MEIER", "roth_eva 1960", "Ro\u0308thig, Uwe (left)", "Roth")):
        patient = ("Meier^Hans", "Roth^Eva^^Dr", "R\u00f6thig^Uwe", "Roth^Eva")[number]
        (own / folder).mkdir(parents=True)
        header = dicom(PatientID=f"4711{number}", PatientName=patient, SpecificCharacterSet="ISO_IR 192")
        (own / folder / "1.dcm").write_bytes(encode(header))
    (own / "Roth Max").mkdir()


def with_a_name_that_is_no_text(own: Path) -> None:
    classes(own, ill=2, well=2)
    Path(os.fsdecode(os.fsencode(own / "ill") + b"/m\xe4.png")).write_bytes(b"")


def write_volume(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_nifti(path, phantom())


def write_zip(path: Path, member: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(member, "no slice")


REFUSED = {
    "own: samples of several kinds .2 DICOM, PNG or JPEG, 1 NIfTI files, zips or folders of DICOM.*make an entry": (
        lambda own: write_volume(classes(own, ill=1, well=1) / "ill/Meier.NII")
    ),
    "own: 1 of 4 files are volumes .NIfTI., the samples are images; move the volumes away": lambda own: (
        write_volume(table(own, "file,label", "a.png,ill", "b.png,well") / "Meier.nii.gz")
    ),
    "own: 1 of 3 volumes are named like masks; give a CSV": lambda own: [
        write_volume(own / name) for name in ("ill/1.nii.gz", "ill/1_mask.nii.gz", "well/2.nii.gz")
    ],
    "own: 1 of 2 volumes lie deeper than in the folder of their class; give a CSV": lambda own: [
        write_volume(own / name) for name in ("ill/Meier/1.nii.gz", "well/2.nii.gz")
    ],
    "own: folder images, masks is no class; make one for each class, or add a CSV with the columns file and": (
        lambda own: [write_volume(own / name) for name in ("images/1.nii.gz", "masks/1.nii.gz")]
    ),
    "own: none of the sampled volumes can be read; the first: DICOM series: no DICOM image in it": (
        lambda own: [write_zip(own / name, "Meier.txt") for name in ("ill/Meier.zip", "well/Roth.zip")]
    ),
    "own: 1 folders with files .* or add a CSV with the column file and a row for every image, beside boxes.csv": (
        lambda own: [path.unlink() for path in boxed(own, "table").glob("*.csv") if path.stem != "boxes"]
    ),
    "own: its annotations hold no box": lambda own: [
        path.write_text("<annotation/>") for path in boxed(own, "voc").glob("Annotations/*")
    ],
    "own: image 1 in sorted order: its annotation is no XML": lambda own: [
        path.write_text("<annotation><obj") for path in boxed(own, "voc").glob("Annotations/0.xml")
    ],
    "own: a file in COCO's form has an image without file_name, a category without id or name, or an": lambda own: [
        path.write_text(path.read_text().replace('"category_id": 1', '"category_id": 9'))
        for path in boxed(own, "coco").glob("annotations/*")
    ],
    "own: none of the source's images has its label: 6 of both are alone": lambda own: shutil.rmtree(
        boxed(own, "coco") / "pictures"
    ),
    "own: boxes are of images, the samples are volumes; give them a column label": lambda own: (
        [path.rename(path.with_suffix(".nii")) for path in boxed(own, "table").glob("images/*")]
        and (own / "images.csv").write_text((own / "images.csv").read_text().replace(".png", ".nii"))
    ),
    "own: 1 of 6 file names in COCO's form lead out of it": lambda own: [
        path.write_text(path.read_text().replace('"0.png"', '"/tmp/Meier.png"'))
        for path in boxed(own, "coco").glob("annotations/*")
    ],
    "own: 3 files are in COCO's form; name each after its split": lambda own: [
        path.rename(path.with_stem(f"part{number}"))
        for number, path in enumerate(boxed(own, "coco", by_split=True).glob("annotations/*"))
    ],
    "2 of 2 classes are named like patients; make a folder for each class": named_like_patients,
    "2 of 2 classes are named like patients": named_like_their_files_patients,
    "4 of 5 classes are named like patients": named_as_their_files_name_patients,
    "3 images are labelled NaN, nan; give them": lambda own: table(
        own, "file,label", "a.png,ill", "b.png,nan", "c.png,NaN", "d.png,well", "e.png,nan"
    ),
    "classes Ill, ill differ in capitals alone": lambda own: classes(own, Ill=1, ill=2),
    "labels.csv: no columns for file and label; name them .*, or move the table away": lambda own: table(
        classes(own, ill=2, well=2), "Bild,Art", "x.png,1"
    ),
    "labels.csv, old.csv: each has a row per sample": lambda own: table(
        table(own, "file,label", "a.png,x", "b.png,y"), "file,label", "a.png,y", "b.png,x", name="old.csv"
    ),
    "test, train are named like splits, the other 1 folders are not": lambda own: [
        classes(own / name, a=1, b=1) for name in ("train", "test", "extra")
    ],
    "the folder of class 'ill' is empty": lambda own: (classes(own, well=2, sick=2) / "ill").mkdir(),
    "own: 1 files are left over .file 3 in sorted order: it lies in no folder of a class.; move": lambda own: (
        write_png(classes(own, ill=2, well=2) / "overview.png")
    ),
    "own: val holds no image of class b; put some there": lambda own: [
        classes(own / "train", a=1, b=1),
        classes(own / "val", a=1),
        classes(own / "test", a=1, b=1),
    ],
    "own: t.csv row 3, column age: not an age": lambda own: table(
        own, "file,label,age", "a.png,x,60", "b.png,y,old", name="t.csv"
    ),
    "labels.csv: 2 of 4 labels in column label are others joined by . or a semicolon; give": lambda own: (
        table(own, "file,label", "a.png,Mass", "b.png,Edema | Mass", "c.png,Edema", "d.png,Mass;Hernia")
    ),
    "1 of 2 labels in the columns label_<class> are others joined by": lambda own: table(
        own, "file,label_Mass,label_Mass;Hernia", "a.png,1,0", "b.png,0,1"
    ),
    "51 classes in the columns label_<class>, where 2 to 50 were expected; is that the label": lambda own: (
        table(
            own,
            ",".join(["file", *(f"label_{n}" for n in range(51))]),
            "a.png" + ",0" * 51,
            "b.png" + ",1" * 51,
        )
    ),
    "t.csv: 1 classes in column label, where 2 to 50 were expected": lambda own: table(
        own, "file,label", "a.png,x", "b.png,x", name="t.csv"
    ),
    "row 3: its path leads out of own": lambda own: table(own, "file,label", "a.png,x", "../b.png,y"),
    "row 3: its file is neither in own nor one folder below; so it is in 1 of 2 rows": lambda own: (
        table(own, "file,label", "a.png,x", "b.png,y") / "b.png"
    ).unlink(),
    "links in the source": lambda own: (classes(own, a=1, b=1) / "c").symlink_to(own / "a"),
    "holds something else than 0, 1": lambda own: table(own, "file,label_ill", "a.png,1", "b.png,maybe"),
    "names that are not UTF-8": with_a_name_that_is_no_text,
}


def test_classes_that_share_less_than_a_name_with_a_patient_are_taken(tmp_path):
    """A pseudonym's group, an initial, a degree, one word of two, and what was removed are no patient's name."""
    files = {
        "AD": {"PatientName": "AD^001", "PatientID": "AD-001"},
        "M": {"PatientName": "Doe^Jane^M", "PatientID": "7"},
        "MD": {"PatientName": "Roe^Ann^^^MD", "PatientID": "8"},
        "Short bone": {"PatientName": "Short^Martin", "PatientID": "9"},
        "cyst": {"PatientName": "cyst", "PatientIdentityRemoved": "YES", "PatientID": "cyst-12"},
    }
    for name, elements in files.items():
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "1.dcm").write_bytes(encode(dicom(**elements)))
    assert describe_folder(tmp_path / "own").entry.classes == tuple(sorted(files))


@pytest.mark.parametrize("reason", REFUSED)
def test_what_would_be_taken_amiss_is_refused_in_one_line(tmp_path, reason):
    (tmp_path / "own").mkdir()
    REFUSED[reason](tmp_path / "own")
    with pytest.raises(ValueError, match=reason) as refusal:
        describe_folder(tmp_path / "own")
    assert "\n" not in str(refusal.value)
    assert not any(name in str(refusal.value).upper() for name in ("MEIER", "ROTH", "THIG"))


def test_a_file_that_may_not_be_read_is_not_named(tmp_path, monkeypatch):
    def closed(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path / "ill/Roth.png"))

    monkeypatch.setattr("cadx.describing.digest_source", closed)
    with pytest.raises(
        ValueError, match=r"own: a file in it cannot be read \(PermissionError\); check its rights"
    ):
        describe_folder(classes(tmp_path / "own", ill=2, well=2))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every folder")
def test_a_folder_that_may_not_be_opened_is_not_left_out(tmp_path):
    closed = classes(tmp_path / "own", ill=2, well=2) / "ill" / "more"
    closed.mkdir(mode=0)
    with pytest.raises(ValueError, match="a folder in the source cannot be opened"):
        describe_folder(tmp_path / "own")


def test_a_misspelt_positive_class_is_guessed(tmp_path):
    with pytest.raises(ValueError, match="did you mean 'pneumonia'"):
        describe_folder(classes(tmp_path / "own", normal=1, pneumonia=1), positive="pneumonai")


# --- Volumes and slides -------------------------------------------------------------------------------


def series(folder: Path, *, placed: bool = True) -> Path:
    """A folder per class, in each of which two patients have a folder of slices."""
    for name, patient in product(("ill", "well"), ("p1", "p2")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        path = write_series(
            folder / name / patient,
            phantom(),
            PatientID=name + patient,
            SeriesInstanceUID=f"1.{len(name)}.{patient[1]}",
        )
        if not placed:
            for file in path.iterdir():
                header = dcmread(file)
                del header.ImagePositionPatient
                header.save_as(file)
    return folder


def test_folders_of_slices_are_volumes(tmp_path):
    described, _, notes, train = describe_folder(series(tmp_path / "own"))
    assert (described.kind, described.modality, described.patient) == ("volume", "CT", "hmac")
    assert any("class 'ill' has 2 volumes" in note for note in notes)
    assert any("kind is volume, as each folder in that of a class holds slices" in note for note in notes)
    assert train["preprocessing"]["window_hu"] == [-1000, 1000]
    several = describe_folder(series(tmp_path / "radiographs", placed=False))
    assert several.entry.kind == "image", "two views of one series are two images"
    assert not any("series" in note for note in several.notes)


def test_deeper_folders_of_slices_are_images_unless_a_table_names_them(tmp_path):
    own = series(tmp_path / "own")
    for place in own.glob("*/*"):
        (place / "CT chest").mkdir()
        for file in place.glob("*.dcm"):
            file.rename(place / "CT chest" / file.name)
    described, _, notes, _ = describe_folder(own)
    assert described.kind == "image"
    (said,) = [note for note in notes if "slices of their series" in note]
    assert "give a CSV whose column file names the folder of each series" in said
    (own / "labels.csv").write_text(
        "file,label\n"
        + "".join(f"{place.relative_to(own)},{place.parts[-3]}\n" for place in own.glob("*/*/*"))
    )
    assert describe_folder(own).entry.kind == "volume"


def test_a_series_with_a_damaged_slice_is_said(tmp_path):
    own = series(tmp_path / "own")
    damaged = sorted((own / "ill/p1").iterdir())[1]
    damaged.write_bytes(damaged.read_bytes()[:400])
    described, _, notes, _ = describe_folder(own)
    assert described.kind == "volume"
    assert any("1 of 4 sampled files cannot be read: ingest will list them; the first: " in n for n in notes)
    assert not any("name no patient" in note for note in notes), "all headers name one"


@pytest.mark.parametrize(("suffix", "kind"), [("zip", "volume"), ("svs", "slide")])
def test_volumes_in_zips_and_whole_slides_are_known_by_their_bytes(tmp_path, suffix, kind):
    own = tmp_path / "own"
    if suffix == "zip":
        for folder in series(own).glob("*/*"):
            shutil.make_archive(str(folder), "zip", folder)
            shutil.rmtree(folder)
    else:
        SlidePhantom(num_patients=4, size_um=256, slides_per_patient=1, prevalence=0.5).write(
            tmp_path / "slides"
        )
        for number, path in enumerate((tmp_path / "slides/images").iterdir()):
            place = own / ("ill", "well")[number % 2] / f"{number}.svs"
            place.parent.mkdir(parents=True, exist_ok=True)
            path.rename(place)
    described, _, notes, train = describe_folder(own)
    assert described.kind == kind
    assert described.patient == ("hmac" if suffix == "zip" else "per-image")
    assert train["model"]["family"] == ("resnet3d" if suffix == "zip" else "mil")
    assert not any("cannot be read" in note for note in notes)
    write_png(own / "ill/one.png")
    described, _, notes, _ = describe_folder(own)
    assert described.kind == "image", "as one of them is"
    assert any("4 of 5 sampled files cannot be read" in note for note in notes)


def test_a_cohort_of_volumes_or_slides_is_described_as_its_maker_does(tmp_path):
    for cohort in (VolumePhantom(num_patients=5), SlidePhantom(num_patients=5, size_um=256)):
        own = tmp_path / cohort.modality
        cohort.write(own)
        described = describe_folder(own)
        given = described.entry.model_dump(exclude_defaults=True, exclude={"digest"})
        made = TableEntry.model_validate(given | cohort.layout(described.entry.classes))
        assert described.entry == made.model_copy(update={"digest": described.entry.digest})


@pytest.mark.parametrize("has_masks", [True, False])
def test_a_patch_shows_what_masks_mark_or_holds_every_volume(tmp_path, has_masks):
    own = tmp_path / "own"
    VolumePhantom(num_patients=6).write(own)
    if not has_masks:
        rows = [row.rsplit(",", 1)[0] for row in (own / "labels.csv").read_text().splitlines()]
        (own / "labels.csv").write_text("\n".join(rows) + "\n")
        shutil.rmtree(own / "masks")
    _, _, notes, train = describe_folder(own)
    assert any("small lesions need a CSV" in note for note in notes) == (not has_masks)
    made = TrainParams.model_validate(train).preprocessing
    assert isinstance(made, VolumePreprocessing)
    assert (made.spacing_mm is None) == has_masks
    for path in (own / "images").iterdir():
        volume = read_volume(path)
        grid_px = made.grid_px(VolumeSource.of_array(volume.voxels, volume.spacing_mm))
        is_whole = all(side <= most for side, most in zip(grid_px, made.patch_px, strict=True))
        assert is_whole == (not has_masks)


def test_a_table_of_contents_hides_no_patient(tmp_path):
    own = series(tmp_path / "own")
    for place in own.glob("*/*"):
        contents = Dataset()
        contents.DirectoryRecordSequence = []
        contents.file_meta = FileMetaDataset()
        contents.file_meta.MediaStorageSOPClassUID = MediaStorageDirectoryStorage
        contents.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        contents.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        contents.save_as(place / "DICOMDIR", enforce_file_format=True)
        (place / ".0").write_bytes(b"litter")
    described = describe_folder(own).entry
    assert (described.patient, described.modality) == ("hmac", "CT")


def test_masks_decide_where_every_ill_volume_has_one(tmp_path):
    for number in range(4):
        for place in ("images", "masks"):
            write_volume(tmp_path / "own" / place / f"{number}.nii.gz")
    for missing, said in (("", "no patch"), ("1", "1 of 4 volumes")):
        masks = [f"masks/{n}.nii.gz" if n % 2 and str(n) != missing else "" for n in range(4)]
        masks[0] = "masks/0.nii.gz" if not missing else ""
        rows = [f"{n}.nii.gz,{('well', 'ill')[n % 2]},{masks[n]}" for n in range(4)]
        (tmp_path / "own/t.csv").write_text("\n".join(["file,label,mask", *rows]) + "\n")
        notes = describe_folder(tmp_path / "own").notes
        assert ("a patch shows what masks mark" in notes) == (not missing)
        assert any("1 volumes of the other class have a mask" in note for note in notes) == (not missing)
        assert any(said in note for note in notes) == bool(missing)


@pytest.mark.parametrize("names", [("imagesTr", "labelsTr"), ("images_train", "masks-test")])
def test_folders_of_decathlon_are_no_classes(tmp_path, names):
    for name in names:
        write_volume(tmp_path / "own" / name / "1.nii.gz")
    with pytest.raises(ValueError, match="is no class"):
        describe_folder(tmp_path / "own")


def test_a_cell_too_long_for_a_path_is_not_repeated(tmp_path):
    own = table(tmp_path / "own", "file,label,seg", "a.png,x,Meier " + 300 * "a", "b.png,y,")
    assert not any("Meier" in note for note in describe_folder(own).notes)
    table(own, "file,label", "a.png,x", "b.png,y")
    (own / "labels.csv").write_text("file,label\na.png,x\nb.png,y\n" + "Meier" * 60 + ".png,x\n")
    with pytest.raises(ValueError, match=r"own: a file in it cannot be read|row 4") as refusal:
        describe_folder(own)
    assert "Meier" not in str(refusal.value)


def test_a_column_of_masks_names_files(tmp_path):
    rows = ("a.png,x,0", "b.png,y,1")
    described, _, notes, _ = describe_folder(table(tmp_path / "own", "file,label,seg", *rows))
    assert isinstance(described, TableEntry)
    assert described.mask_column is None
    assert "column seg is passed over: some of its cells are no paths of files, from own on" in notes


def boxed(folder: Path, form: str, *, by_split: bool = False) -> Path:
    """Images 0 to 5, of which 0 and 3 have a box of a nodule and 0 one of a mass, in three forms."""
    parts = {"train": (0, 1), "val": (2, 3), "test": (4, 5)} if by_split else {"": range(6)}
    boxes = {0: [("nodule", 1, 2, 5, 7), ("mass", 0, 0, 8, 8)], 3: [("nodule", 2, 2, 4, 4)]}
    place = {"coco": "pictures/all", "voc": "JPEGImages", "table": "images"}[form]
    for number in range(6):
        write_png(folder / place / f"{number}.png", 20 * number)
    if form == "table":
        (folder / "images.csv").write_text("file,sex\n" + "".join(f"{n}.png,F\n" for n in range(6)))
        (folder / "demographics.csv").write_text("subject,weight\n1,70\n")
        rows = [",".join(map(str, (f"{n}.png", *box))) for n, held in boxes.items() for box in held]
        (folder / "boxes.csv").write_text(
            "\n".join(["file,class,x0,y0,x1,y1", *rows, "1.png,none,,,,"]) + "\n"
        )
    elif form == "coco":
        (folder / "annotations").mkdir()
        categories = [{"id": 0, "name": "all"}, {"id": 1, "name": "nodule"}, {"id": 2, "name": "mass"}]
        identity = {one["name"]: one["id"] for one in categories}
        for split, numbers in parts.items():
            content = {
                "images": [{"id": n, "file_name": f"{n}.png"} for n in numbers],
                "categories": categories,
                "annotations": [
                    {"image_id": n, "category_id": identity[name], "bbox": [x0, y0, x1 - x0, y1 - y0]}
                    for n in numbers
                    for name, x0, y0, x1, y1 in boxes.get(n, ())
                ],
            }
            (folder / f"annotations/instances_{split}2017.json").write_text(json.dumps(content))
    else:
        write_png(folder / "SegmentationClass/0.png")
        (folder / "Annotations").mkdir()
        (folder / "ImageSets/Main").mkdir(parents=True)
        for split, numbers in parts.items():
            if split:
                names = "".join(f"{n}\n" for n in numbers)
                (folder / f"ImageSets/Main/{split}.txt").write_text(names)
                (folder / f"ImageSets/Main/nodule_{split}.txt").write_text(names)
        for number in range(6):
            objects = "".join(
                f"<object><name>{name}</name><bndbox><xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax>"
                f"<ymax>{y1}</ymax></bndbox></object>"
                for name, x0, y0, x1, y1 in boxes.get(number, ())
            )
            (folder / f"Annotations/{number}.xml").write_text(f"<annotation>{objects}</annotation>")
    return folder


@pytest.mark.parametrize(
    ("form", "by_split"),
    [("table", False), ("coco", False), ("coco", True), ("voc", False), ("voc", True)],
)
def test_boxes_in_every_usual_form(tmp_path, form, by_split):
    own = boxed(tmp_path / "own", form, by_split=by_split)
    described, has_splits, notes, train = describe_folder(own)
    assert (described.task, described.classes, described.positive) == ("detection", ("mass", "nodule"), None)
    assert has_splits == by_split
    items = sorted(list_items(described, own), key=lambda item: item.relative.name)
    assert [item.relative.name for item in items] == [f"{number}.png" for number in range(6)]
    assert items[0].boxes == [("nodule", 1, 2, 5, 7), ("mass", 0, 0, 8, 8)]
    assert [item.given_split for item in items] == (
        ["train", "train", "val", "val", "test", "test"] if by_split else [""] * 6
    )
    assert any("4 of 6 images have no box" in note for note in notes)
    assert any("class 'mass' has 1 image:" in note for note in notes)
    assert any("CSV with the columns file and patient beside boxes.csv" in note for note in notes)
    assert ("categories without a box are passed over: all" in notes) == (form == "coco")
    assert TrainParams.model_validate(train).model.family == "yolo"
    assert train["preprocessing"] == {"channels": 1, "height_px": 32, "width_px": 32}
    catalog = write_catalog(tmp_path / "c.yaml", own=described.model_dump(mode="json", exclude_defaults=True))
    assert load_catalog(catalog) == {"own": described}


@pytest.mark.parametrize(
    ("head", "box"),
    [("Image Index,Finding,x_min,y_min,x_max,y_max", "1,2,5,7"), ("image,label,x,y,w,h", "1,2,4,5")],
)
def test_boxes_by_other_usual_columns(tmp_path, head, box):
    own = boxed(tmp_path / "own", "table")
    (own / "boxes.csv").write_text(f"{head}\n0.png,nodule,{box}\n1.png,No finding,,,,\n")
    described, _, notes, _ = describe_folder(own)
    assert described.classes == ("nodule",)
    assert [item.boxes for item in list_items(described, own)] == [[("nodule", 1, 2, 5, 7)], *[[]] * 5]
    assert any(f"boxes.csv is read by its columns {head.replace(',', ', ')}:" in note for note in notes)


@pytest.mark.parametrize(("place", "known"), [("bccd/BCCD", "bccd"), ("nih_rsna_cxr", "nih-rsna-boxes")])
def test_public_boxes_are_described_as_the_catalogue_does_by_hand(root, mirror, place, known):
    described = describe_folder(mirror / place).entry
    entry = load_catalog(root / "data/catalog.yaml")[known]
    names = getattr(entry.boxes, "values", {}) if isinstance(entry, TableEntry) else {}

    def boxes(one: FileEntry) -> dict[str, list[Box]]:
        return {item.relative.name: item.boxes for item in list_items(one, mirror / place)}

    assert entry.task == described.task == "detection"
    ours, theirs = boxes(described), boxes(entry)
    assert ours.keys() == theirs.keys()
    for name, held in theirs.items():  # of one source of several, where the entry says so
        assert set(held) <= {(names.get(label, label), *corners) for label, *corners in ours[name]}
    assert sum(map(len, theirs.values())) >= 30


def test_images_alone_in_a_set_of_boxes_are_said(tmp_path):
    for form, place in (("coco", "pictures/all"), ("voc", "JPEGImages")):
        own = boxed(tmp_path / form, form)
        write_png(own / place / "6.png")
        notes = describe_folder(own).notes
        assert any(
            "1 files are alone" in note and "set ingest.orphans to leave_out" in note for note in notes
        )


def test_small_lesions_of_large_images_are_seen_in_tiles(tmp_path):
    own = boxed(tmp_path / "own", "table")
    for path in (own / "images").iterdir():
        Image.fromarray(np.full((1600, 1200), 60, np.uint8)).save(path)
    assert describe_folder(own).train["preprocessing"]["fit"] == "tile"


def test_slides_that_may_name_somebody_are_said_to_be_refused(tmp_path):
    for number, name in enumerate(("ill", "well")):
        (tmp_path / "own" / name).mkdir(parents=True)
        tifffile.imwrite(
            tmp_path / "own" / name / f"{number}.tif",
            np.full((256, 256, 3), 200 + number, np.uint8),
            tile=(128, 128),
            photometric="rgb",
            description="Jane Doe",
            resolution=(20000, 20000),
            resolutionunit="CENTIMETER",
        )
    notes = describe_folder(tmp_path / "own").notes
    assert any("ingest refuses such slides; clean them at their source" in note for note in notes)
    assert not any("Doe" in note or "will be dropped" in note for note in notes)


def test_neither_a_missing_series_nor_another_kinds_first_bytes_decide(tmp_path):
    own = series(tmp_path / "own")
    for number, file in enumerate(sorted(own.glob("*/*/*"))):
        header = dcmread(file)
        header.preamble = b"II*\0" + bytes(124)  # DICOM allows it: viewers of TIFF can open such a file too
        header.PatientID = str(number)
        del header.SeriesInstanceUID
        header.save_as(file)
    assert not any("series" in note for note in describe_folder(own).notes)
