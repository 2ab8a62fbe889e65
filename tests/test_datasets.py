"""The dataset folder, splits, class balance, samplers and torch's view of them."""

import contextlib
import json
import math
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from cadx import datasets
from cadx.datasets import (
    BOX_COLUMNS,
    SAMPLE_COLUMNS,
    DatasetFolder,
    DatasetWriter,
    Sample,
    SourceInfo,
    read_splits,
    schema_markdown,
    write_splits,
)
from cadx.files import digest_bytes, digest_path
from cadx.loading.images import ImageDataset
from cadx.sampling import analyze_class_imbalance
from cadx.transforms import Preprocessing
from cadx.types import Digest

SOURCE = SourceInfo(title="Made for a test", licence="CC0", citation="none")
SHA = digest_bytes(b"source file")
SMALL = Preprocessing(height_px=8, width_px=8, mean=0.5, std=0.25)


def writer(path: Path, **changes: Any) -> DatasetWriter:
    description: dict[str, Any] = {
        "name": "made",
        "task": "binary",
        "classes": ("normal", "pneumonia"),
        "positive": "pneumonia",
        "modality": "chest X-ray",
        "clustered": True,
        "source": SOURCE,
    }
    return DatasetWriter(path, **(description | changes))


def sample(index: int, **changes: Any) -> Sample:
    rng = np.random.default_rng(index)
    values: dict[str, Any] = {
        "sample_id": f"s{index}",
        "pixels": rng.integers(0, 256, (9 + index % 3, 12), np.uint8),
        "labels": {"pneumonia": index % 2, "normal": 1 - index % 2},
        "patient": f"p{index // 2}",
        "sha256": SHA,
        "statistics": {"mean": float(index), "std": 1.0},
    }
    return Sample(**(values | changes))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetFolder:
    """Ten samples in four shards."""
    monkeypatch.setattr(datasets, "SHARD_SAMPLES", 3)
    with writer(tmp_path / "made") as dataset:
        for index in range(10):
            dataset.add(sample(index, boxes=[("opacity", 1, 2, 3.5, 4)] if index == 7 else []))
    return DatasetFolder(tmp_path / "made")


# --- writing and reading -----------------------------------------------------------------------------


def test_what_was_written_is_read(tmp_path: Path) -> None:
    gray16 = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    colour = np.arange(36, dtype=np.uint8).reshape(4, 3, 3)
    with writer(tmp_path / "made") as dataset:
        dataset.add(
            sample(
                0,
                pixels=gray16,
                labels={"pneumonia": 1},
                site="A",
                scanner="maker, model",
                age=61.5,
                sex="F",
                view="PA",
                given_split="test",
                spacing_mm=(0.2, 0.3),
                boxes=[("pneumonia", -1, 0, 2, 3)],
                assumptions=["patient: one per image"],
            )
        )
        dataset.add(sample(1, pixels=colour, labels={}, assumptions=["patient: one per image", "gray"]))
    folder = DatasetFolder(tmp_path / "made")
    first, second = folder.samples.to_dict("records")
    expected = {
        "sample_id": "s0",
        "path": "shards/00000.safetensors",
        "mask_path": "",
        "slide_path": "",
        "sha256": SHA,
        "pixels_sha256": first["pixels_sha256"],
        "patient": "p0",
        "site": "A",
        "scanner": "maker, model",
        "age": 61.5,
        "sex": "F",
        "view": "PA",
        "given_split": "test",
        "depth_px": 1,
        "height_px": 3,
        "width_px": 4,
        "channels": 1,
        "bits": 16,
        "dtype": "uint16",
        "findings": "",
        "phash": "",
        "spacing_row_mm": 0.2,
        "spacing_column_mm": 0.3,
        "stat_mean": 0.0,
        "stat_std": 1.0,
        "label_normal": 0.0,
        "label_pneumonia": 1.0,
    }
    assert {name: first[name] for name in expected} == expected
    unknown = {name for name, value in first.items() if value != value}
    assert unknown == {"spacing_slice_mm", "slide_mpp"}
    assert set(first) == set(expected) | unknown
    assert (second["channels"], second["bits"], second["sex"]) == (3, 8, "")
    assert math.isnan(second["age"])
    assert math.isnan(second["spacing_row_mm"])
    for sample_id, pixels in (("s0", gray16), ("s1", colour)):
        np.testing.assert_array_equal(folder.pixels(sample_id), pixels, strict=True)
    np.testing.assert_array_equal(folder.labels(["s1", "s0"]), np.float32([[np.nan, np.nan], [0, 1]]))
    assert folder.boxes.to_dict("records") == [
        {"sample_id": "s0", "class": "pneumonia", "x0": -1.0, "y0": 0.0, "x1": 2.0, "y1": 3.0}
    ]
    assert (folder.info.num_samples, folder.info.num_patients) == (2, 1)
    assert folder.info.assumptions == ("patient: one per image", "gray")
    folder.verify()


def test_a_volume_keeps_its_mask_and_gives_blocks_of_both(tmp_path: Path) -> None:
    voxels = np.arange(6 * 5 * 4, dtype=np.int16).reshape(6, 5, 4) - 1000
    mask = (voxels > -900).astype(np.uint8)
    with writer(tmp_path / "made", kind="volume") as dataset:
        dataset.add(
            sample(
                0, pixels=voxels, mask=mask, spacing_mm=(2.5, 0.7, 0.8), findings=["oblique: by 3 degrees"]
            )
        )
        dataset.add(sample(1, pixels=voxels.astype(np.float32), spacing_mm=(1, 1, 1)))
    folder = DatasetFolder(tmp_path / "made")
    row = folder.samples.iloc[0]
    assert tuple(row[["depth_px", "height_px", "width_px"]]) == (6, 5, 4)
    assert tuple(row[["spacing_slice_mm", "spacing_row_mm", "spacing_column_mm"]]) == (2.5, 0.7, 0.8)
    assert (row["dtype"], row["bits"], row["findings"]) == ("int16", 16, "oblique: by 3 degrees")
    block = (slice(1, 3), slice(0, 5), slice(2, 4))
    np.testing.assert_array_equal(folder.crop("s0", block), voxels[block])
    np.testing.assert_array_equal(folder.crop("s0", block, "mask"), mask[block])
    np.testing.assert_array_equal(folder.mask("s0"), mask)
    assert folder.mask("s1") is None
    shown = folder.preview("s0")
    assert (shown.shape, shown.dtype) == ((5, 4), np.uint8)
    # Radiologists look from the feet: the patient's right, the last column, is on the left.
    assert shown[0, 0] == shown.max()


def test_a_slide_travels_with_its_dataset_and_stays_what_it_was(tmp_path: Path) -> None:
    source = tmp_path / "source.SVS"
    source.write_bytes(b"gigabytes of tiles")
    thumbnail = np.full((3, 4, 3), 200, np.uint8)
    tissue = np.eye(3, 4, dtype=np.uint8)
    with writer(tmp_path / "made", kind="slide") as dataset:
        dataset.add(
            sample(
                0, pixels=thumbnail, tissue=tissue, slide=source, slide_mpp=0.5, sha256=digest_path(source)
            )
        )
    folder = DatasetFolder(tmp_path / "made")
    folder.verify()
    assert folder.slide_path("s0").read_bytes() == b"gigabytes of tiles"
    np.testing.assert_array_equal(folder.tissue("s0"), tissue)
    source.write_bytes(b"edited later")
    folder.verify()
    folder.slide_path("s0").write_bytes(b"another slide, same file")
    with pytest.raises(ValueError, match=r"slides/s0\.svs: changed since it was written"):
        folder.verify()


def test_a_bag_of_features_may_have_missing_values(tmp_path: Path) -> None:
    features = np.array([[1, np.nan, 3], [4, 5, 6]], np.float32)
    with writer(tmp_path / "made", kind="features") as dataset:
        dataset.add(sample(0, pixels=features, clinical={"age_years": 4, "crp_mg_l": math.nan}))
    folder = DatasetFolder(tmp_path / "made")
    np.testing.assert_array_equal(folder.pixels("s0"), features)
    assert folder.preview("s0").shape == (2, 3)
    assert folder.samples["clinical_age_years"].tolist() == [4]
    assert folder.samples["clinical_crp_mg_l"].isna().all()


def test_bags_of_another_width_are_refused(tmp_path: Path) -> None:
    with writer(tmp_path / "made", kind="features") as dataset:
        dataset.add(sample(0, pixels=np.zeros((2, 7), np.float32)))
        with pytest.raises(ValueError, match="sample 's1': 6 features, the first sample has 7"):
            dataset.add(sample(1, pixels=np.zeros((2, 6), np.float32)))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (
            "volume",
            {"pixels": np.zeros((2, 2, 2), np.float64), "spacing_mm": (1, 1, 1)},
            "voxels are float64",
        ),
        ("volume", {"pixels": np.zeros((2, 2, 2), np.uint8)}, "a volume needs spacing_mm"),
        (
            "volume",
            {"pixels": np.zeros((2, 2, 2), np.uint8), "spacing_mm": (1, 1)},
            "must be 3 positive numbers",
        ),
        (
            "volume",
            {
                "pixels": np.zeros((2, 2, 2), np.uint8),
                "spacing_mm": (1, 1, 1),
                "mask": np.zeros((2, 2, 3), np.uint8),
            },
            r"its mask is uint8 of shape \(2, 2, 3\)",
        ),
        ("slide", {}, "come with slide and slide_mpp"),
        ("image", {"slide_mpp": 0.5}, "come with slide and slide_mpp"),
        ("features", {"pixels": np.zeros((2, 2), np.uint8)}, "features are uint8"),
    ],
)
def test_what_does_not_fit_its_kind_is_refused(
    tmp_path: Path, kind: str, changes: dict[str, Any], message: str
) -> None:
    with (
        pytest.raises(ValueError, match=message) as error,
        writer(tmp_path / "made", kind=kind) as dataset,
    ):
        dataset.add(sample(0, **changes))
    assert "\n" not in str(error.value)


def test_same_samples_give_same_bytes(tmp_path: Path, folder: DatasetFolder) -> None:
    with writer(tmp_path / "again") as dataset:
        for index in range(10):
            dataset.add(sample(index, boxes=[("opacity", 1, 2, 3.5, 4)] if index == 7 else []))
    assert digest_path(tmp_path / "again") == digest_path(folder.path)


def test_exact_copies_share_a_digest_and_other_shapes_do_not(tmp_path: Path) -> None:
    pixels = np.arange(12, dtype=np.uint8)
    with writer(tmp_path / "made") as dataset:
        dataset.add(sample(0, pixels=pixels.reshape(3, 4)))
        dataset.add(sample(1, pixels=np.asfortranarray(pixels.reshape(3, 4))))
        dataset.add(sample(2, pixels=pixels.reshape(4, 3)))
    first, copy, other = DatasetFolder(tmp_path / "made").samples["pixels_sha256"]
    assert first == copy != other


def test_a_reused_buffer_does_not_change_what_was_added(tmp_path: Path) -> None:
    buffer = np.full((4, 4), 7, np.uint8)
    with writer(tmp_path / "made") as dataset:
        dataset.add(sample(0, pixels=buffer))
        buffer[:] = 0
    assert (DatasetFolder(tmp_path / "made").pixels("s0") == 7).all()


def test_writing_holds_one_shard_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "SHARD_BYTES", 1_000_000)
    pixels = np.zeros((250, 400), np.uint8)
    tracemalloc.start()
    with writer(tmp_path / "made") as dataset:
        for index in range(100):
            dataset.add(sample(index, pixels=pixels))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(list((tmp_path / "made" / "shards").iterdir())) == 10
    assert peak < 2_500_000  # of 10 MB


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": {"tuberculosis": 1}}, "label 'tuberculosis' is not among the classes normal, pneumonia"),
        ({"labels": {"pneumonia": 0.5}}, "labels must be 1, 0"),
        ({"labels": {"pneumonia": 1, "normal": 1}}, "2 classes are 1"),
        ({"labels": {"pneumonia": 0, "normal": 0}}, "0 classes are 1"),
        ({"sample_id": "s0"}, "added before"),
        ({"sample_id": ""}, "sample_id must be"),
        ({"sample_id": "__metadata__"}, "sample_id must be"),
        ({"pixels": np.zeros((4, 4), np.float32)}, "dtype is float32"),
        ({"pixels": np.zeros((4, 0), np.uint8)}, "shape is"),
        ({"pixels": np.zeros((4, 4, 4), np.uint8)}, "shape is"),
        ({"patient": ""}, "patient is empty"),
        ({"sha256": "abc"}, "sha256 is not"),
        ({"sex": "female"}, "sex 'female'"),
        ({"given_split": "dev"}, "given_split 'dev'"),
        ({"spacing_mm": (0.0, 1.0)}, "spacing_mm"),
        ({"statistics": {"mean": 1.0}}, "first sample.s names"),
        ({"boxes": [("opacity", 0, 0, math.nan, 1)]}, "box"),
    ],
)
def test_bad_sample_is_refused_in_one_line(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with writer(tmp_path / "made") as dataset:
        dataset.add(sample(0))
        with pytest.raises(ValueError, match=message) as error:
            dataset.add(sample(1, **changes))
    assert "\n" not in str(error.value)
    assert "p0" not in str(error.value)  # the patient
    folder = DatasetFolder(tmp_path / "made")
    assert (len(folder.samples), len(folder.boxes)) == (1, 0)  # nothing of the refused sample stayed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"positive": "cancer"}, "positive 'cancer'"),
        ({"positive": None}, "positive names"),
        ({"classes": ("a", "a")}, "different"),
        ({"classes": ("pneumonia",)}, "two classes, not 1"),
        ({"task": "segmentation"}, "dataset.task"),
        ({"task": "multilabel"}, "positive names"),
    ],
)
def test_contradictory_description_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        writer(tmp_path / "made", **changes)
    assert "\n" not in str(error.value)


def test_an_empty_dataset_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no sample was added"), writer(tmp_path / "made"):
        pass


def test_an_interrupted_dataset_cannot_be_opened(tmp_path: Path) -> None:
    with contextlib.suppress(KeyboardInterrupt), writer(tmp_path / "made") as dataset:
        dataset.add(sample(0))
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match=r"dataset\.json: no such file"):
        DatasetFolder(tmp_path / "made")


def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with contextlib.ExitStack() as stack:
        dataset = stack.enter_context(writer(tmp_path / "made"))
        dataset.add(sample(0, pixels=np.zeros((400, 400), np.uint8)))
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"00000\.safetensors: cannot be written"):
                stack.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_verify_names_the_changed_file(folder: DatasetFolder) -> None:
    folder.verify()
    shard = folder.path / "shards" / "00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"00002\.safetensors: changed"):
        folder.verify()
    shard.unlink()
    with pytest.raises(ValueError, match=r"00002\.safetensors: missing"):
        folder.verify()


def test_verify_names_a_file_that_does_not_belong(folder: DatasetFolder) -> None:
    (folder.path / "notes.csv").write_text("x")
    with pytest.raises(ValueError, match=r"notes\.csv: not listed"):
        folder.verify()


def damage(folder: DatasetFolder, frame: pd.DataFrame) -> None:
    frame.to_parquet(folder.path / "samples.parquet", index=False)


def test_a_lost_column_is_named(folder: DatasetFolder) -> None:
    damage(folder, folder.samples.drop(columns="patient"))
    with pytest.raises(ValueError, match=r"samples\.parquet: no column 'patient' \(string\)"):
        DatasetFolder(folder.path)


def test_a_lost_label_column_is_named(folder: DatasetFolder) -> None:
    damage(folder, folder.samples.drop(columns="label_pneumonia"))
    with pytest.raises(ValueError, match="no column 'label_pneumonia'"):
        DatasetFolder(folder.path)


def test_a_column_of_another_type_is_named(folder: DatasetFolder) -> None:
    damage(folder, folder.samples.assign(height_px=folder.samples["height_px"].astype(float)))
    with pytest.raises(ValueError, match="column 'height_px' is double, not int64"):
        DatasetFolder(folder.path)


def test_an_empty_cell_is_refused_where_it_has_no_meaning(folder: DatasetFolder) -> None:
    damage(folder, folder.samples.assign(site=folder.samples["site"].where(folder.samples.index > 3)))
    with pytest.raises(ValueError, match="column 'site' has empty cells"):
        DatasetFolder(folder.path)


def test_a_table_rewritten_by_pandas_still_opens(folder: DatasetFolder) -> None:
    damage(folder, folder.samples)
    pd.testing.assert_frame_equal(DatasetFolder(folder.path).samples, folder.samples)


def test_lost_rows_are_noticed(folder: DatasetFolder) -> None:
    damage(folder, folder.samples.iloc[:-1])
    with pytest.raises(ValueError, match=r"9 rows, but dataset\.json says num_samples = 10"):
        DatasetFolder(folder.path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda info: info | {"schema_version": 1}, "schema_version is 1"),
        (lambda info: info | {"classes": ["x"]}, "two classes"),
        (lambda info: info | {"colour": "blue"}, r"dataset\.json\.colour"),
        (lambda info: [info], "schema_version is None"),
    ],
)
def test_a_foreign_dataset_json_is_refused(folder: DatasetFolder, change: Any, message: str) -> None:
    path = folder.path / "dataset.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=message) as error:
        DatasetFolder(folder.path)
    assert "\n" not in str(error.value)


def test_text_that_is_no_json_or_parquet_is_refused(folder: DatasetFolder) -> None:
    (folder.path / "samples.parquet").write_text("sample_id,path\n")
    with pytest.raises(ValueError, match="not a Parquet file"):
        DatasetFolder(folder.path)
    (folder.path / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        DatasetFolder(folder.path)


def test_a_truncated_shard_is_named(folder: DatasetFolder) -> None:
    shard = folder.path / "shards" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"00000\.safetensors: sample 's0' cannot be read"):
        folder.pixels("s0")


def test_a_shard_outside_of_the_folder_is_never_opened(folder: DatasetFolder) -> None:
    damage(folder, folder.samples.assign(path="../elsewhere.safetensors"))
    with pytest.raises(ValueError, match=r"not listed in dataset\.json"):
        DatasetFolder(folder.path).pixels("s0")


def test_an_unknown_sample_is_named(folder: DatasetFolder) -> None:
    with pytest.raises(ValueError, match="no sample 'x9'"):
        folder.pixels("x9")
    with pytest.raises(ValueError, match="no sample 'x9'"):
        folder.labels(["s0", "x9"])


def test_few_shards_stay_open(folder: DatasetFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_OPEN_SHARDS", 2)
    for index in [0, 3, 6, 9, 0]:
        np.testing.assert_array_equal(folder.pixels(f"s{index}"), sample(index).pixels)
    assert len(folder._shards) == 2


def test_the_schema_is_told_in_full() -> None:
    text = schema_markdown()
    for column in SAMPLE_COLUMNS + BOX_COLUMNS:
        assert f"| `{column.name}` | {column.dtype} | {column.meaning} |" in text
    assert "`num_patients`" in text


def test_written_columns_stand_in_the_order_of_the_schema(folder: DatasetFolder) -> None:
    fixed = [column.name for column in SAMPLE_COLUMNS if column.required and "<" not in column.name]
    assert list(folder.samples.columns) == [
        *fixed,
        "stat_mean",
        "stat_std",
        "label_normal",
        "label_pneumonia",
    ]


# --- splits on disk ----------------------------------------------------------------------------------


def test_splits_round_trip_with_equal_bytes(tmp_path: Path) -> None:
    frame = pd.DataFrame(
        {"sample_id": ["a", "b"], "split": ["train", "excluded"], "reason": ["", "copy of a"]}
    )
    write_splits(tmp_path / "one.parquet", frame)
    write_splits(tmp_path / "two.parquet", frame[["reason", "split", "sample_id"]])
    pd.testing.assert_frame_equal(read_splits(tmp_path / "one.parquet"), frame)
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": ["train", "dev"]}, "split 'dev' in row 1"),
        ({"sample_id": ["a", "a"]}, "sample 'a' stands twice"),
        ({"extra": ["", ""]}, "columns are"),
    ],
)
def test_bad_splits_are_refused(tmp_path: Path, change: dict[str, list[str]], message: str) -> None:
    frame = pd.DataFrame({"sample_id": ["a", "b"], "split": ["train", "val"], "reason": ["", ""]})
    with pytest.raises(ValueError, match=message):
        write_splits(tmp_path / "splits.parquet", frame.assign(**change))
    with pytest.raises(ValueError, match="no such file"):
        read_splits(tmp_path / "splits.parquet")


# --- torch's view ------------------------------------------------------------------------------------


def test_cached_images_equal_those_read_on_demand(folder: DatasetFolder) -> None:
    ids = [f"s{index}" for index in (7, 0, 3)]
    steps: list[tuple[int, int]] = []
    cached = ImageDataset(folder, ids, SMALL, cache_mb=1)
    cached.warm(lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    direct = ImageDataset(folder, ids, SMALL, cache_mb=0)
    for index, sample_id in enumerate(ids):
        image, target, position = cached[index]
        assert position == index
        assert (image.dtype, image.shape) == (torch.float32, (1, 8, 8))
        assert torch.equal(image, direct[index][0])
        assert torch.equal(image, SMALL.apply(folder.pixels(sample_id)))
        np.testing.assert_array_equal(target.numpy(), folder.labels([sample_id])[0])


def test_a_warm_cache_reads_nothing_more(folder: DatasetFolder) -> None:
    dataset = ImageDataset(folder, ["s0", "s1"], SMALL, cache_mb=1)
    dataset.warm()
    for shard in (folder.path / "shards").iterdir():
        shard.unlink()
    assert dataset[1][0].isfinite().all()


def test_loader_workers_read_the_same_images(folder: DatasetFolder) -> None:
    dataset = ImageDataset(folder, [f"s{index}" for index in range(10)], SMALL, cache_mb=0)
    dataset[0]  # the parent's memory map is open when the workers fork
    loader = DataLoader(dataset, batch_size=4, num_workers=2, multiprocessing_context="fork")
    images = torch.cat([batch for batch, _, _ in loader])
    assert torch.equal(images, torch.stack([dataset[index][0] for index in range(10)]))


def test_a_folder_can_be_pickled_after_reading(folder: DatasetFolder) -> None:
    folder.pixels("s0")
    again = pickle.loads(pickle.dumps(folder))
    np.testing.assert_array_equal(again.pixels("s4"), folder.pixels("s4"))


def test_pneumoniamnist_has_its_official_counts(mirror: Path, tmp_path: Path) -> None:
    with np.load(mirror / "pneumoniamnist" / "pneumoniamnist.npz") as arrays:
        images, labels = arrays["train_images"], arrays["train_labels"][:, 0]
    with writer(tmp_path / "made", clustered=False) as dataset:
        for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
            dataset.add(
                Sample(
                    sample_id=f"train-{index:05d}",
                    pixels=pixels,
                    labels={("normal", "pneumonia")[label]: 1},
                    patient=f"train-{index:05d}",
                    sha256=Digest(SHA),
                    statistics={"mean": float(pixels.mean())},
                )
            )
    folder = DatasetFolder(tmp_path / "made")
    found = analyze_class_imbalance(folder.samples[list(folder.info.label_columns)])
    assert [item["count"] for item in found.values()] == [1214, 3494]
    np.testing.assert_array_equal(folder.pixels("train-04707"), images[-1])
