"""Every public set of the mirror goes through ingest, validate, split and imbalance, and shows its known defects."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import nibabel
import pandas as pd
import pytest
import yaml

from cadx.catalog import load_catalog
from cadx.datasets import DatasetFolder, read_splits
from components.imbalance import ImbalanceParams, imbalance
from components.ingest import IngestParams, ingest
from components.split import SplitParams, split
from components.validate import ValidateParams, validate

pytestmark = pytest.mark.slow

# Class by class what a published description promises: name -> (kind, samples, positives per class).
SETS: dict[str, tuple[str, int, dict[str, int]]] = {
    "pneumoniamnist": ("image", 5856, {"normal": 1583, "pneumonia": 4273}),
    "pneumoniamnist-9to1": ("image", 5030, {"normal": 757, "pneumonia": 4273}),
    "nih-rsna": ("image", 60, {"no_opacity": 28, "opacity": 32}),
    "nih-rsna-boxes": ("image", 60, {"opacity": 32}),
    "adrenalmnist3d": ("volume", 1584, {"normal": 1234, "hyperplasia": 350}),
    "adrenalmnist3d-64": ("volume", 1584, {"normal": 1234, "hyperplasia": 350}),
    "hippocampus-volumes": ("volume", 200, {"anterior": 200, "posterior": 200}),
    # Three volumes have fewer than two places 3 mm inside of the posterior part.
    "hippocampus": ("volume", 1196, {"neither": 400, "anterior": 400, "posterior": 396}),
    "bccd": ("image", 364, {"RBC": 349, "WBC": 358, "Platelets": 201}),
    "musk1": ("features", 92, {"musk": 47, "non_musk": 45}),
    "uci-heart": ("features", 920, {"absent": 411, "present": 509}),
    "tcga-brca": ("features", 1096, {"censored": 945, "event": 151}),
    "dicom-ct": ("volume", 1, {"lesion": 1}),
    "dicom-mr": ("volume", 2, {"tumour": 2}),
    "dicom-cr": ("image", 2, {"chest": 2}),
    "wsi-cmu1": ("slide", 1, {"tissue": 1}),
}
TOO_SMALL_TO_SPLIT = {"dicom-cr", "dicom-ct", "dicom-mr", "wsi-cmu1"}
GIVEN = {"pneumoniamnist", "pneumoniamnist-9to1", "adrenalmnist3d", "adrenalmnist3d-64", "bccd"}


@pytest.fixture(autouse=True)
def _mirror(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))


def made(
    name: str, root: Path, folder: Path, changes: dict[str, Any] | None = None, **params: Any
) -> DatasetFolder:
    entry = yaml.safe_load((root / "data/catalog.yaml").read_text())[name] | (changes or {})
    (folder / "catalog.yaml").write_text(yaml.safe_dump({name: entry}))
    ingest(
        catalog=folder / "catalog.yaml",
        cache=folder / "cache",
        dataset=folder / "dataset",
        params=IngestParams(source=name, **params),
    )
    return DatasetFolder(folder / "dataset")


def judged(folder: Path, **severities: str) -> dict[str, Any]:
    validate(
        dataset=folder / "dataset",
        validation=folder / "validation.json",
        report=folder / "validation.html",
        params=ValidateParams(**severities),
    )
    return json.loads((folder / "validation.json").read_text())


@pytest.fixture(scope="module")
def read(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Name of a set -> the folder of its dataset, and what `validate` said of it; each is made once."""

    @cache
    def reading(name: str) -> tuple[Path, Any]:
        folder = tmp_path_factory.mktemp(name)
        made(name, root, folder)
        return folder, judged(folder)

    return reading


@pytest.mark.parametrize("name", SETS)
def test_the_set_is_read_whole_judged_split_and_counted(
    name: str, read: Callable[[str], tuple[Path, Any]]
) -> None:
    kind, num_samples, positives = SETS[name]
    folder, validation = read(name)
    dataset = DatasetFolder(folder / "dataset")
    assert (dataset.info.kind, dataset.info.num_samples) == (kind, num_samples)
    labels = dataset.samples[list(dataset.info.label_columns)]
    assert {column.removeprefix("label_"): int((labels[column] == 1).sum()) for column in labels} == positives
    assert validation["passed"]
    if name in TOO_SMALL_TO_SPLIT:
        return
    split(
        dataset=folder / "dataset",
        validation=folder / "validation.json",
        splits=folder / "splits.parquet",
        params=SplitParams(strategy="given" if name in GIVEN else "patient"),
    )
    placed = read_splits(folder / "splits.parquet")
    assert Counter(placed["split"])["excluded"] == len(validation["quarantined"])
    imbalance(
        dataset=folder / "dataset",
        splits=folder / "splits.parquet",
        imbalance=folder / "imbalance.json",
        report=folder / "imbalance.html",
        params=ImbalanceParams(),
    )
    counted = json.loads((folder / "imbalance.json").read_text())["overall"]
    assert set(counted) == set(positives)


def test_every_set_of_the_mirror_is_in_the_catalogue(root: Path, mirror: Path) -> None:
    held = {path.name for path in mirror.iterdir() if path.is_dir()}
    named = {
        Path(entry.file).parts[0]
        for entry in load_catalog(root / "data/catalog.yaml").values()
        if entry.format != "phantom"
    }
    assert held <= named


def test_the_mr_series_is_stopped_by_its_name_and_cleaned_on_request(
    root: Path, tmp_path: Path, mirror: Path
) -> None:
    named = ("Albus", "Dumbledore", "PGBM-003", "3083564386975476")
    headers = b"".join(path.read_bytes() for path in mirror.rglob("*.dcm"))
    assert all(name.encode() in headers for name in named), "the test looks for what was never there"
    with pytest.raises(
        ValueError, match=r"patient identifiers in 2 of 2 volumes \(.*PatientName.*deidentify"
    ) as error:
        made("dicom-mr", root, tmp_path, {"deidentify": False})
    assert "\n" not in str(error.value)
    dataset = made("dicom-mr", root, tmp_path)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "dataset").rglob("*") if path.is_file())
    assert b"PGBM" not in stored
    assert b"LIFEx" not in stored
    told = dataset.samples.to_csv() + dataset.info.model_dump_json()  # columns are stored compressed
    for name in named:
        assert name.encode() not in stored
        assert name not in told
    shapes = dataset.samples[["depth_px", "height_px", "width_px"]].to_numpy().tolist()
    assert [22, 320, 280] in shapes or [22, 280, 320] in shapes


def test_bccds_two_boxes_without_area_are_named(read: Callable[[str], tuple[Path, Any]]) -> None:
    _, validation = read("bccd")
    rules = {rule["name"]: rule for rule in validation["rules"]}
    assert [name[-5:] for name in rules["invalid_box"]["sample_ids"]] == ["00338", "00343"]


def test_a_slide_without_micrometres_per_pixel_is_refused_with_its_fix(root: Path, tmp_path: Path) -> None:
    boxes = {"samples": [{"file": "boxes.tiff", "label": "tissue"}]}
    with pytest.raises(ValueError, match=r"sample 1 of the entry: .*slide_mpp"):
        made("wsi-cmu1", root, tmp_path, boxes)
    dataset = made("wsi-cmu1", root, tmp_path, boxes | {"slide_mpp": 0.5})
    assert dataset.samples["slide_mpp"].tolist() == [0.5]
    assert any("0.5" in assumption for assumption in dataset.info.assumptions)


@pytest.mark.parametrize("file", ["broken.svs"])
def test_a_broken_slide_is_refused_in_one_line(root: Path, tmp_path: Path, file: str) -> None:
    with pytest.raises(ValueError, match="1 of 1 slides cannot be taken: sample 1 of the entry") as error:
        made("wsi-cmu1", root, tmp_path, {"samples": [{"file": file}]})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "dataset").exists()


def test_a_label_image_stops_until_somebody_has_looked_at_it(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"label image, macro image\); .*label_images_are_clean"):
        made("wsi-cmu1", root, tmp_path, {"label_images_are_clean": False})
    assert any("label and macro" in note for note in made("wsi-cmu1", root, tmp_path).info.assumptions)


def test_orphans_are_refused_on_both_sides(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="have no mask of the same name"):
        made("hippocampus-volumes", root, tmp_path, {"images": "orphans/images", "masks": "orphans/labels"})


def test_orphans_stay_out_by_declaration_listed_under_the_rule_of_their_side(
    root: Path, tmp_path: Path, mirror: Path
) -> None:
    cohort = tmp_path / "hippocampus"
    for side in ("images", "labels"):
        (cohort / side).mkdir(parents=True)
        whole = sorted((mirror / "hippocampus" / side).iterdir())[:6]
        for file in (*whole, *(mirror / "hippocampus/orphans" / side).iterdir()):
            shutil.copy(file, cohort / side)
    changes = {"file": str(cohort), "digest": None, "address": None}
    with pytest.raises(ValueError, match=r"have no mask of the same name .*set ingest\.orphans to leave_out"):
        made("hippocampus-volumes", root, tmp_path, changes)
    dataset = made("hippocampus-volumes", root, tmp_path, changes, orphans="leave_out")
    assert dataset.info.num_samples == 6
    validation = judged(tmp_path)
    rules = {rule["name"]: (rule["severity"], rule["count"]) for rule in validation["rules"]}
    found = {name: rules[name] for name in ("left_out", "image_without_label", "label_without_image")}
    assert found == {
        "left_out": ("warn", 0),
        "image_without_label": ("quarantine", 1),
        "label_without_image": ("quarantine", 2),
    }
    assert [one["reason"] for one in validation["left_out"]] == [
        "image_without_label: it has no mask of the same name",
        *["label_without_image: it has no image of the same name"] * 2,
    ]
    page = (tmp_path / "validation.html").read_text()
    for text in (
        "image without label",
        "label without image",
        *(one["place"] for one in validation["left_out"]),
    ):
        assert text in page
    with pytest.raises(ValueError, match="rule label_without_image: 2 labels of the source had no volume"):
        judged(tmp_path, label_without_image="stop")
    orphans = {"images": "orphans/images", "masks": "orphans/labels"}
    with pytest.raises(ValueError, match="none of the source's images has its label: 3 of both are alone"):
        made("hippocampus-volumes", root, tmp_path, orphans, orphans="leave_out")


def test_a_mask_of_another_shape_is_refused(root: Path, tmp_path: Path, mirror: Path) -> None:
    images, masks = mirror / "hippocampus/images", mirror / "hippocampus/labels"
    image = images / "hippocampus_015.nii.gz"
    shape = nibabel.load(image).shape
    other = next(path for path in sorted(masks.iterdir()) if nibabel.load(path).shape != shape)
    entry = {
        "format": "files",
        "samples": [{"file": f"images/{image.name}", "mask": f"labels/{other.name}"}],
        "digest": None,
    }
    raw = yaml.safe_load((root / "data/catalog.yaml").read_text())["hippocampus-volumes"]
    for key in ("images", "masks", "mask_values"):
        raw.pop(key)
    (tmp_path / "catalog.yaml").write_text(yaml.safe_dump({"one": raw | entry}))
    with pytest.raises(ValueError, match=r"sample 1 of the entry: .*mask"):
        ingest(
            catalog=tmp_path / "catalog.yaml",
            cache=tmp_path / "cache",
            dataset=tmp_path / "dataset",
            params=IngestParams(source="one"),
        )


def test_pneumoniamnist_still_has_its_eight_leaks(read: Callable[[str], tuple[Path, Any]]) -> None:
    _, validation = read("pneumoniamnist")
    quarantined = pd.DataFrame(validation["quarantined"])
    leaks = quarantined[quarantined["reason"].str.contains("duplicate_across_splits")]
    assert leaks["sample_id"].str.startswith("val").sum() == 8
