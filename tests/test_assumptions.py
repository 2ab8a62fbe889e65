"""What a file does not say and the catalogue gives is recorded, and shown to whoever judges the data or the model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_evaluate import prepare
from test_volumes import write_nifti

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder
from components.gate import GateParams, gate
from components.ingest import IngestParams, ingest
from components.package import PackageParams, package
from components.validate import ValidateParams, validate

ENTRY: dict[str, Any] = {
    "title": "Scans",
    "task": "binary",
    "classes": ["normal", "sick"],
    "positive": "sick",
    "modality": "CT",
    "licence": "none",
    "citation": "none",
    "patient": "per-image",
}


def ingested(folder: Path, **fields: Any) -> DatasetFolder:
    (folder / "catalog.yaml").write_text(yaml.safe_dump({"scans": ENTRY | fields}))
    ingest(
        catalog=folder / "catalog.yaml",
        cache=folder / "cache",
        dataset=folder / "dataset",
        params=IngestParams(source="scans"),
    )
    return DatasetFolder(folder / "dataset")


def report(folder: Path) -> str:
    validate(
        dataset=folder / "dataset",
        validation=folder / "validation.json",
        report=folder / "validation.html",
        params=ValidateParams(),
    )
    return (folder / "validation.html").read_text()


def test_a_volume_without_orientation_and_spacing_is_refused_until_the_catalogue_gives_both(
    tmp_path: Path,
) -> None:
    (tmp_path / "scans").mkdir()
    samples = []
    for number in range(8):
        voxels = np.random.default_rng(number).normal(size=(20, 18, 8)).astype(np.float32)
        write_nifti(tmp_path / f"scans/{number}.nii", voxels, codes=(0, 0), pixdim=(0, 0, 0))
        samples.append({"file": f"{number}.nii", "label": ("normal", "sick")[number % 2]})
    entry = {"format": "files", "kind": "volume", "file": str(tmp_path / "scans"), "samples": samples}
    with pytest.raises(ValueError, match=r"neither qform nor sform .*give orientation"):
        ingested(tmp_path, **entry, spacing_mm=[3.0, 0.8, 0.8])
    entry["orientation"] = "LPS"
    with pytest.raises(ValueError, match=r"no spacing in qform, sform or pixdim; .*give spacing_mm"):
        ingested(tmp_path, **entry)
    assert not (tmp_path / "dataset").exists()
    dataset = ingested(tmp_path, **entry, spacing_mm=[3.0, 0.8, 0.8])
    assert set(dataset.samples["spacing_slice_mm"]) == {3.0}
    said = dataset.info.assumptions
    assert len(said) == 2
    assert "axes LPS were taken as given" in said[0]
    assert "3 x 0.8 x 0.8 mm" in said[1]
    page = report(tmp_path)
    assert all(text in page for text in said)


def test_arrays_of_volumes_need_their_spacing_from_the_catalogue(tmp_path: Path) -> None:
    voxels = np.random.default_rng(0).integers(0, 255, (8, 8, 20, 18), dtype=np.uint8)
    np.savez(tmp_path / "scans.npz", train_images=voxels, train_labels=np.arange(8) % 2)
    entry = {"format": "npz", "kind": "volume", "file": str(tmp_path / "scans.npz")}
    with pytest.raises(ValueError, match=r"how far voxels are apart; give spacing_mm in its entry"):
        ingested(tmp_path, **entry)
    dataset = ingested(tmp_path, **entry, spacing_mm=[3.0, 0.8, 0.8])
    page = report(tmp_path)
    assert dataset.info.assumptions
    assert all(said in page for said in dataset.info.assumptions)


@pytest.mark.parametrize("kind", ["int16", "float32"])
def test_arrays_of_hounsfield_units_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    voxels = np.random.default_rng(0).integers(-1024, 3071, (4, 8, 20, 18)).astype(kind)
    entry = {"format": "npz", "kind": "volume", "file": str(tmp_path / "scans.npz"), "spacing_mm": [3, 1, 1]}
    np.savez(tmp_path / "scans.npz", train_images=voxels, train_labels=np.arange(4) % 2)
    dataset = ingested(tmp_path, **entry)
    for number in range(4):
        np.testing.assert_array_equal(dataset.pixels(f"train-{number:05d}"), voxels[number])
        assert str(dataset.pixels(f"train-{number:05d}").dtype) == kind


def test_an_array_with_a_voxel_that_is_no_number_is_refused(tmp_path: Path) -> None:
    voxels = np.zeros((4, 8, 20, 18), np.float32)
    voxels[2, 1, 3, 4] = np.nan
    np.savez(tmp_path / "scans.npz", train_images=voxels, train_labels=np.arange(4) % 2)
    entry = {"format": "npz", "kind": "volume", "file": str(tmp_path / "scans.npz"), "spacing_mm": [3, 1, 1]}
    with pytest.raises(ValueError, match="train_images holds values that are not finite"):
        ingested(tmp_path, **entry)
    assert not (tmp_path / "dataset").exists()


def test_the_model_card_states_what_was_assumed_of_the_data(tmp_path: Path) -> None:
    run = prepare(tmp_path)
    run.evaluate(tmp_path / "scored", split="test", minimum_n=5)
    files = {"bundle": run.bundle, "metrics": tmp_path / "scored/metrics.json"}
    decision = tmp_path / "decision.json"
    gate(**files, decision=decision, params=GateParams(at_least={"auc": 0.01}))
    outputs = {"archive": tmp_path / "model.mar", "card": tmp_path / "card.html"}
    package(**files, decision=decision, **outputs, params=PackageParams())
    assumptions = Bundle(run.bundle).manifest.assumptions
    assert assumptions, "or this test shows nothing"
    card = (tmp_path / "card.html").read_text()
    assert all(said in card for said in assumptions)
