import base64
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo, preview
from cadx.drift import image_statistics
from cadx.files import digest_bytes, digest_path, write_json
from cadx.quality import image_checks, perceptual_hash
from cadx.reading.images import read_image
from components.validate import ValidateParams, validate

SECRET = "Doe^Jane-4711"
SOURCE = SourceInfo(title="Cohort <b>", licence="MIT", citation="None")


def picture(seed: int, shape: tuple[int, int] = (20, 20)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, shape, dtype=np.uint8)


def cohort(
    path: Path, changes: dict[int, dict[str, Any]] | None = None, num_samples: int = 24, **info: Any
) -> Path:
    """A faultless binary set, two images a patient, two sites; `changes` plants faults by row."""
    description: dict[str, Any] = {
        "name": "cohort",
        "task": "binary",
        "classes": ("normal", "sick"),
        "positive": "sick",
        "modality": "chest X-ray",
        "clustered": True,
        "source": SOURCE,
        **info,
    }
    with DatasetWriter(path, **description) as writer:
        for row in range(num_samples):
            sample: dict[str, Any] = {
                "sample_id": f"s{row:03d}",
                "pixels": picture(row),
                "labels": {description["classes"][row // 2 % 2]: 1.0},
                "patient": f"{SECRET}-{row // 2}",
                "site": "north" if row // 2 % 3 else "south",
                "age": 50.0,
                "sex": "F",
                **(changes or {}).get(row, {}),
            }
            writer.add(
                Sample(
                    **sample,
                    sha256=digest_bytes(sample["sample_id"].encode()),
                    statistics=image_statistics(sample["pixels"]),
                )
            )
    return path


def rewrite(dataset: Path, **columns: Any) -> None:
    """Change columns of the sample table behind the writer's back, with digests that fit."""
    table = pd.read_parquet(dataset / "samples.parquet").assign(**columns)
    table.to_parquet(dataset / "samples.parquet", index=False)
    info = json.loads((dataset / "dataset.json").read_text())
    info["files"]["samples.parquet"] = digest_path(dataset / "samples.parquet")
    write_json(dataset / "dataset.json", info)


def judge(tmp_path: Path, dataset: Path, **params: Any) -> dict[str, Any]:
    validate(
        dataset=dataset,
        validation=tmp_path / "validation.json",
        report=tmp_path / "validation.html",
        params=ValidateParams(**params),
    )
    return json.loads((tmp_path / "validation.json").read_text())


def failed(result: dict[str, Any]) -> dict[str, list[str]]:
    return {rule["name"]: rule["sample_ids"] for rule in result["rules"] if not rule["passed"]}


def test_a_faultless_set_passes_every_rule(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    result = judge(tmp_path, dataset)
    assert failed(result) == {}
    assert result["quarantined"] == []
    assert result["great_expectations"]["success"] is True
    assert result["great_expectations"]["evaluated"] > 20
    assert result["dataset"] == digest_path(dataset / "dataset.json")


def test_equal_inputs_give_equal_bytes(tmp_path: Path):
    dataset = cohort(tmp_path / "d", {4: {"pixels": picture(0)}})
    judge(tmp_path, dataset)
    first = [(tmp_path / name).read_bytes() for name in ("validation.json", "validation.html")]
    judge(tmp_path, dataset)
    assert [(tmp_path / name).read_bytes() for name in ("validation.json", "validation.html")] == first


def test_pneumoniamnist_has_exactly_eight_val_images_that_are_copies_of_train_images(
    tmp_path: Path, mirror: Path
):
    source = np.load(mirror / "pneumoniamnist" / "pneumoniamnist.npz")
    classes = ("normal", "pneumonia")
    info = {"classes": classes, "positive": "pneumonia", "clustered": False}
    with DatasetWriter(
        tmp_path / "d", name="pneumoniamnist", task="binary", modality="chest X-ray", source=SOURCE, **info
    ) as writer:
        for part in ("train", "val", "test"):
            images, labels = source[f"{part}_images"], source[f"{part}_labels"][:, 0]
            for row, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                writer.add(
                    Sample(
                        sample_id=f"{part}-{row:05d}",
                        pixels=pixels,
                        labels={classes[int(label)]: 1.0},
                        patient=f"{part}-{row:05d}",
                        sha256=digest_bytes(pixels.tobytes()),
                        given_split=part,
                        statistics=image_statistics(pixels),
                    )
                )
    result = judge(tmp_path, tmp_path / "d")

    in_train = {image.tobytes() for image in source["train_images"]}
    leaks = [
        f"val-{row:05d}" for row, image in enumerate(source["val_images"]) if image.tobytes() in in_train
    ]
    assert len(leaks) == 8
    rules = {rule["name"]: rule for rule in result["rules"]}
    assert rules["duplicate_across_splits"]["sample_ids"] == leaks
    assert rules["duplicate_across_splits"]["message"].startswith("8 val images are copies of train images")
    out = {entry["sample_id"] for entry in result["quarantined"]}
    assert {sample_id for sample_id in out if sample_id.startswith("val")} == set(leaks)
    assert not any(sample_id.startswith("test") for sample_id in out)  # 624, as published
    page = (tmp_path / "validation.html").read_text()
    assert "8 val images are copies of train images" in page
    assert all(sample_id in page for sample_id in leaks)


def test_kinds_of_copies(tmp_path: Path):
    sick, normal = {"labels": {"sick": 1.0}}, {"labels": {"normal": 1.0}}
    dataset = cohort(
        tmp_path / "d",
        {
            1: {"pixels": picture(0)},  # the same patient
            5: {"pixels": picture(4), "patient": f"{SECRET}-77"},  # another patient, the same label
            8: {"pixels": picture(8), **sick},
            12: {"pixels": picture(8), **normal},  # contradicts
            20: {"pixels": picture(16), "labels": {}},  # an unlabelled copy contradicts nothing
        },
    )
    result = judge(tmp_path, dataset)
    assert failed(result) == {
        "unlabelled": ["s020"],
        "contradicting_labels": ["s008", "s012"],
        "duplicate_across_patients": ["s005", "s020"],
        "duplicate_within_patient": ["s001"],
    }
    assert [entry["sample_id"] for entry in result["quarantined"]] == ["s005", "s008", "s012", "s020"]
    assert result["quarantined"][0]["reason"] == "duplicate_across_patients (of s004)"


def test_a_labelled_copy_is_kept_rather_than_an_unlabelled_one(tmp_path: Path):
    dataset = cohort(tmp_path / "d", {0: {"labels": {}}, 8: {"pixels": picture(0)}})
    result = judge(tmp_path, dataset)
    assert [entry["sample_id"] for entry in result["quarantined"]] == ["s000"]


def test_blank_images_are_not_copies_of_each_other(tmp_path: Path):
    blank = {"pixels": np.full((20, 20), 7, np.uint8)}
    result = judge(tmp_path, cohort(tmp_path / "d", {3: blank, 9: blank}))
    assert failed(result) == {"blank_image": ["s003", "s009"]}


def test_images_and_boxes(tmp_path: Path):
    dataset = cohort(
        tmp_path / "d",
        {
            0: {"pixels": picture(90, (4, 40))},
            1: {"boxes": [("sick", 1, 1, 1, 9)]},  # no area
            2: {"boxes": [("sick", 1, 1, 21, 9)]},  # leaves the image
            3: {"boxes": [("sick", 0, 0, 20, 20)]},  # the whole image is fine
            4: {"age": 140.0},
        },
    )
    result = judge(tmp_path, dataset)
    assert failed(result) == {"age_range": ["s004"], "tiny_image": ["s000"], "invalid_box": ["s001", "s002"]}


def test_a_faulty_box_is_drawn_in_red_over_the_others(tmp_path: Path):
    boxes = [
        ("sick", 4, 4, 12, 12),
        ("sick", 15, 7, 15, 7),
        ("sick", 16, 18, 99, 99),
    ]  # sound, no area, leaves
    dataset = cohort(tmp_path / "d", {1: {"boxes": boxes}})
    judge(tmp_path, dataset)
    found = (tmp_path / "validation.html").read_text().rpartition("What was found")[2]
    ((data, _),) = re.findall(
        r'<img src="data:image/png;base64,([^"]+)" alt="(s001)"', found.split("Invalid box:")[0]
    )
    shown = read_image(base64.b64decode(data)).pixels.astype(int)
    red = (shown[..., 0] - shown[..., 1:].max(axis=2)) > 100
    assert red[7, 15]
    assert red[17:, 15:].any()
    assert not red[:4].any()
    blue = (shown[..., 2] - shown[..., 0]) > 100
    assert blue[3, 4:12].all()


def test_patients_across_official_splits_are_counted(tmp_path: Path):
    parts = {row: {"given_split": "val" if row % 8 == 1 else "train"} for row in range(24)}
    result = judge(tmp_path, cohort(tmp_path / "d", parts))
    assert list(failed(result)) == ["patient_across_splits"]
    result = judge(tmp_path, tmp_path / "d", patient_across_splits="quarantine")
    assert [entry["sample_id"] for entry in result["quarantined"]] == ["s001", "s009", "s017"]


def test_faults_behind_the_writers_back_are_found(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    table = pd.read_parquet(dataset / "samples.parquet")
    labels = table["label_sick"].where(table.index != 3, 0.5)
    rewrite(dataset, label_sick=labels, sex=table["sex"].where(table.index != 5, "female"))
    with pytest.raises(ValueError, match="rule label_values: 1 image with a label that is not 0, 1") as error:
        judge(tmp_path, dataset)
    assert "s003" in str(error.value)
    assert "also failed: one_hot" in str(error.value)
    result = judge(tmp_path, dataset, label_values="quarantine", one_hot="quarantine")
    assert failed(result) == {"label_values": ["s003"], "one_hot": ["s003"], "sex_values": ["s005"]}
    assert result["quarantined"] == [{"sample_id": "s003", "reason": "label_values; one_hot"}]


def test_an_unknown_split_and_a_size_that_no_reader_gives_stop(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    table = pd.read_parquet(dataset / "samples.parquet")
    rewrite(dataset, given_split=table["given_split"].where(table.index != 4, "holdout"))
    with pytest.raises(ValueError, match=r"rule given_split: 1 image with an unknown official split.*s004"):
        judge(tmp_path, dataset)
    rewrite(dataset, given_split="", channels=table["channels"].where(table.index != 7, 2))
    with pytest.raises(ValueError, match=r"rule image_size: 1 image without pixels, or neither gray.*s007"):
        judge(tmp_path, dataset)


def test_copies_inside_the_official_test_split_stay_there_unless_asked(tmp_path: Path):
    changes: dict[int, dict[str, Any]] = {
        row: {"given_split": "test" if row // 2 % 3 == 0 else "train"} for row in range(24)
    }
    changes[12] |= {
        "pixels": picture(0),
        "labels": {"normal": 1.0},
    }  # of another patient, in test as row 0 is
    dataset = cohort(tmp_path / "d", changes)
    result = judge(tmp_path, dataset)
    assert failed(result) == {"duplicate_within_test": ["s012"]}
    assert result["quarantined"] == []
    result = judge(tmp_path, dataset, duplicate_within_test="quarantine")
    assert result["quarantined"] == [{"sample_id": "s012", "reason": "duplicate_within_test (of s000)"}]


def test_partly_labelled_rows_are_fine_in_multilabel_only(tmp_path: Path):
    some = {row: {"labels": {"normal": 0.0}} for row in (0, 4)}
    info = {"task": "multilabel", "positive": None}
    assert failed(judge(tmp_path, cohort(tmp_path / "d", some, **info))) == {}


def test_a_class_that_quarantine_emptied_is_noticed(tmp_path: Path):
    blank = np.zeros((20, 20), np.uint8)
    sick = {row: {"pixels": blank} for row in range(24) if row // 2 % 2}
    with pytest.raises(ValueError, match="rule class_without_images: 1 class without any image: sick;"):
        judge(tmp_path, cohort(tmp_path / "d", sick))
    result = judge(tmp_path, tmp_path / "d", class_without_images="warn")
    assert set(failed(result)) == {"blank_image", "class_without_images", "class_with_one_patient"}


def test_a_stop_writes_nothing_and_says_rule_count_and_fix_in_one_line(tmp_path: Path):
    dataset = cohort(tmp_path / "d", {1: {"boxes": [("sick", 1, 1, 1, 9)]}})
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="cohort") as error:
        judge(tmp_path, dataset, invalid_box="stop")
    message = str(error.value)
    assert message == (
        "dataset cohort: rule invalid_box: 1 box without area, or outside the image: s001 sick (1, 1, 1, 9)"
        " (sample_id s001); correct the boxes at their source,"
        " or set validate.invalid_box to another severity"
    )
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("severity", ["stop", "quarantine", "warn"])
@pytest.mark.parametrize(
    ("rule", "fault"),
    [
        ("blank_image", {"pixels": np.full((20, 20), 7, np.uint8)}),
        ("tiny_image", {"pixels": picture(5, (9, 40))}),
        ("invalid_box", {"boxes": [("sick", 1, 1, 1, 9)]}),
        ("age_range", {"age": 140.0}),
        ("duplicate_across_patients", {"pixels": picture(0)}),
    ],
)
def test_the_severity_alone_decides_what_a_failed_rule_does(
    tmp_path: Path, rule: str, fault: dict[str, Any], severity: str
):
    dataset = cohort(tmp_path / "d", {5: fault})
    if severity == "stop":
        with pytest.raises(ValueError, match=f"rule {rule}: 1 .*s005"):
            judge(tmp_path, dataset, **{rule: severity})
        assert not (tmp_path / "validation.json").exists()
        assert not (tmp_path / "validation.html").exists()
        return
    result = judge(tmp_path, dataset, **{rule: severity})
    assert failed(result) == {rule: ["s005"]}
    out = [entry["sample_id"] for entry in result["quarantined"]]
    assert out == (["s005"] if severity == "quarantine" else [])
    if out:
        assert rule in result["quarantined"][0]["reason"]


def test_no_patient_appears_in_a_message_or_report(tmp_path: Path):
    parts = {row: {"given_split": "val" if row % 8 == 1 else "train"} for row in range(24)}
    parts[6] |= {"pixels": picture(4), "age": -3.0, "labels": {}}
    dataset = cohort(tmp_path / "d", parts)
    assert SECRET in pd.read_parquet(dataset / "samples.parquet")["patient"][0]
    judge(tmp_path, dataset)
    assert SECRET not in (tmp_path / "validation.json").read_text()
    assert SECRET not in (tmp_path / "validation.html").read_text()
    for rule in ("patient_across_splits", "duplicate_across_patients", "age_range"):
        with pytest.raises(ValueError, match=rule) as error:
            judge(tmp_path, dataset, **{rule: "stop"})
        assert SECRET not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_changed_shard_is_refused(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    shard = dataset / "shards" / "00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x00\x01")
    with pytest.raises(ValueError, match="changed since it was written"):
        judge(tmp_path, dataset)


def test_an_unknown_rule_is_refused_with_the_nearest_name(tmp_path: Path):
    dataset = cohort(tmp_path / "d")
    with pytest.raises(ValueError, match="did you mean 'blank_image'"):
        validate(
            dataset=dataset,
            validation=tmp_path / "v.json",
            report=tmp_path / "v.html",
            params='{"blank_images": "warn"}',
        )


def test_importing_the_step_does_not_import_great_expectations():
    code = "import sys, components.validate; sys.exit('great_expectations' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_nothing_is_reported_to_a_vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: calls.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: calls.append(args))
    judge(tmp_path, cohort(tmp_path / "d"))
    assert calls == []
    assert os.environ["GX_ANALYTICS_ENABLED"] == "false"


def test_what_is_shown_stays_small(tmp_path: Path):
    changes = {row: {"pixels": picture(row % 4, (300, 300))} for row in range(60)}
    dataset = cohort(tmp_path / "d", changes, num_samples=60)
    assert DatasetFolder(dataset).info.num_samples == 60
    result = judge(tmp_path, dataset, contradicting_labels="warn")
    assert result["rules"][-1]["name"] == "class_of_one_site"
    assert (tmp_path / "validation.html").stat().st_size < 5_000_000


# --- Rules on what stands in the images ---------------------------------------------------------------


def looked_at(pixels: np.ndarray) -> dict[str, Any]:
    """What ingest adds of a look at an image."""
    return {"pixels": pixels, "checks": image_checks(pixels), "phash": perceptual_hash(pixels)}


def scene(seed: int) -> np.ndarray:
    """A sharp picture of many scales that uses its whole range."""
    rng = np.random.default_rng(seed)
    layers = [
        np.kron(rng.normal(0, side, (160 // side, 160 // side)), np.ones((side, side)))
        for side in (4, 10, 32)
    ]
    total = sum(layers)
    low, high = np.quantile(total, (0.005, 0.995))
    return np.clip(1 + 253 * (total - low) / (high - low), 0, 255).astype(np.uint8)


def test_blur_clipping_narrow_range_and_letters_are_found_and_shown(tmp_path: Path):
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    images = [scene(seed) for seed in range(24)]
    images[2] = np.array(Image.fromarray(images[2]).filter(ImageFilter.GaussianBlur(5)))
    images[4][40:120, 40:120] = 255
    images[6] = (images[6] // 16 + 90).astype(np.uint8)
    written = Image.fromarray(images[9] // 3)
    ImageDraw.Draw(written).text((12, 12), "MEIER ULLA 1950", fill=255, font=ImageFont.load_default(16))
    images[9] = np.array(written)
    dataset = cohort(tmp_path / "d", {row: looked_at(pixels) for row, pixels in enumerate(images)})
    result = judge(tmp_path, dataset)
    assert failed(result) == {
        "blurred_image": ["s002"],
        "clipped_image": ["s004"],
        "narrow_range": ["s006"],
        "burned_in_text": ["s009"],
    }
    assert result["quarantined"] == []
    page = (tmp_path / "validation.html").read_text()
    for rule in ("Blurred image", "Clipped image", "Narrow range", "Burned in text"):
        assert f"{rule}: 1 image." in page
    found = page.rpartition("What was found")[2].partition("look like")[0]
    thumbnails = re.findall(r'<img src="data:image/png;base64,([^"]+)" alt="(s\d+)"', found)
    assert [name for _, name in thumbnails] == ["s002", "s004", "s006", "s009"]
    for data, name in thumbnails:
        shown, meant = read_image(base64.b64decode(data)).pixels, images[int(name[1:])]
        reduced = np.asarray(Image.fromarray(meant).resize(shown.shape[::-1], Image.Resampling.BOX))
        assert np.corrcoef(shown.ravel(), reduced.ravel())[0, 1] > 0.9, name
    assert judge(tmp_path, dataset, burned_in_text="quarantine")["quarantined"] == [
        {"sample_id": "s009", "reason": "burned_in_text"}
    ]


def test_near_copies_across_patients_and_splits_are_found(tmp_path: Path):
    images = [scene(seed) for seed in range(24)]
    images[1] = images[0] // 2 + 60  # the same patient: no fault
    images[7] = images[4] // 2 + 60
    splits = ["val" if row // 2 % 5 == 1 else "train" for row in range(24)]  # rows 2, 3, 12, 13, 22, 23
    images[12] = images[8] // 2 + 60
    changes = {row: looked_at(pixels) | {"given_split": splits[row]} for row, pixels in enumerate(images)}
    result = judge(
        tmp_path,
        cohort(tmp_path / "d", changes),
        narrow_range="warn",
        near_duplicate_across_splits="quarantine",
    )
    assert failed(result) == {
        "near_duplicate_across_splits": ["s012"],
        "near_duplicate_across_patients": ["s007"],
    }
    assert {rule["name"]: rule["of"] for rule in result["rules"] if rule["of"]} == {
        "near_duplicate_across_splits": ["s008"],
        "near_duplicate_across_patients": ["s004"],
    }
    messages = {rule["name"]: rule["message"] for rule in result["rules"]}
    assert messages["near_duplicate_across_splits"] == "1 val image is nearly equal to train images: a leak"
    assert result["quarantined"] == [
        {"sample_id": "s012", "reason": "near_duplicate_across_splits (of s008)"}
    ]
    assert "s012 (val), s008 (train)" in (tmp_path / "validation.html").read_text()


def test_every_sample_that_fails_a_rule_is_named_and_of_what_it_is_a_copy(tmp_path: Path):
    """Whatever the severity and the number: what was found of an image is known of the page's nine and the rest."""
    changes = {row: {"pixels": picture(0)} for row in range(60) if row // 2 % 2 == 0}
    dataset = cohort(tmp_path / "d", changes, num_samples=60)
    result = judge(tmp_path, dataset, tiny_image="warn", min_side_px=50, duplicate_across_patients="warn")
    rules = {rule["name"]: rule for rule in result["rules"]}
    assert rules["tiny_image"]["sample_ids"] == [f"s{row:03d}" for row in range(60)]
    assert rules["tiny_image"]["of"] == []
    copies = [f"s{row:03d}" for row in changes if row > 1]
    assert rules["duplicate_across_patients"]["sample_ids"] == copies
    assert rules["duplicate_across_patients"]["of"] == ["s000"] * len(copies)
    assert (rules["duplicate_within_patient"]["sample_ids"], rules["duplicate_within_patient"]["of"]) == (
        ["s001"],
        ["s000"],
    )
    found = (tmp_path / "validation.html").read_text().rpartition("What was found")[2]
    assert found.partition("look like")[0].count("<img") == 9


def test_both_zero_area_boxes_of_bccd_are_named(tmp_path: Path, mirror: Path):
    """Boxes 00338 and 00343 of the published set have no area."""
    from xml.etree import ElementTree

    root = mirror / "bccd" / "BCCD"
    info = {"task": "detection", "classes": ("RBC", "WBC", "Platelets"), "positive": None, "clustered": False}
    names = [
        "BloodImage_00337",
        "BloodImage_00338",
        "BloodImage_00342",
        "BloodImage_00343",
        "BloodImage_00000",
    ]
    with DatasetWriter(tmp_path / "d", name="bccd", modality="blood smear", source=SOURCE, **info) as writer:
        for name in names:
            pixels = read_image(root / "JPEGImages" / f"{name}.jpg").pixels
            boxes = []
            for item in ElementTree.parse(root / "Annotations" / f"{name}.xml").getroot().iter("object"):
                x0, y0, x1, y1 = (
                    float(item.findtext(f"bndbox/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")
                )
                has_area = x1 > x0 and y1 > y0
                boxes.append((item.findtext("name"), max(x0 - has_area, 0), max(y0 - has_area, 0), x1, y1))
            writer.add(
                Sample(
                    sample_id=name,
                    pixels=pixels,
                    labels={},
                    patient=name,
                    sha256=digest_bytes(name.encode()),
                    statistics=image_statistics(pixels),
                    boxes=boxes,
                )
            )
    result = judge(tmp_path, tmp_path / "d", class_without_images="warn")
    assert failed(result)["invalid_box"] == ["BloodImage_00338", "BloodImage_00343"]
    message = next(rule["message"] for rule in result["rules"] if rule["name"] == "invalid_box")
    assert message.startswith("2 boxes without area, or outside the image: BloodImage_00338 ")
    assert "BloodImage_00343 RBC (" in message
    assert [entry["sample_id"] for entry in result["quarantined"]] == ["BloodImage_00338", "BloodImage_00343"]
    # The only platelets of these five images stand in those two.
    message = next(rule["message"] for rule in result["rules"] if rule["name"] == "class_without_images")
    assert message == "1 class without any image: Platelets"


def test_boxes_of_unknown_samples_or_classes_stop(tmp_path: Path):
    dataset = cohort(tmp_path / "d", {1: {"boxes": [("sick", 1, 1, 4, 9), ("other", 1, 1, 4, 9)]}})
    with pytest.raises(
        ValueError, match=r"rule unknown_box: 1 box of a sample or a class .*: s001 other \(1, 1, 4, 9\)"
    ):
        judge(tmp_path, dataset)


def test_a_class_that_comes_from_one_site_is_noticed(tmp_path: Path):
    sites = {row: {"site": "north" if row // 2 % 2 else "south north"[: 5 + row % 7]} for row in range(24)}
    result = judge(tmp_path, cohort(tmp_path / "d", sites))
    assert [name for name in failed(result) if "site" in name] == ["class_of_one_site"]
    message = next(rule["message"] for rule in result["rules"] if rule["name"] == "class_of_one_site")
    assert message == "1 class from one site only: sick"


def test_spacing_that_stands_apart_is_found(tmp_path: Path):
    spacings = {row: {"spacing_mm": (0.14 + 0.01 * (row % 3), 0.14)} for row in range(24)}
    spacings[5] = {"spacing_mm": (1.4, 1.4)}
    assert failed(judge(tmp_path, cohort(tmp_path / "d", spacings))) == {"spacing_outlier": ["s005"]}


def test_the_report_loads_nothing_from_elsewhere(tmp_path: Path):
    judge(tmp_path, cohort(tmp_path / "d", {1: {"boxes": [("sick", 1, 1, 1, 9)]}, 4: {"pixels": picture(0)}}))
    page = (tmp_path / "validation.html").read_text()
    assert (
        re.findall(r"""(?:src|href|url|action|data|srcset)\s*[=(]\s*["']?\s*(?:https?:)?//[^"')\s]*""", page)
        == []
    )
    assert "<script" not in page
    assert "@import" not in page
    assert "expect_" not in page
    assert "column values to be in set" in page


# --- Volumes, slides, features ------------------------------------------------------------------------


def collection(path: Path, kind: str, samples: list[dict[str, Any]]) -> Path:
    """Two classes by turns, a patient each, of any kind."""
    described = {"task": "binary", "classes": ("normal", "sick"), "positive": "sick", "modality": kind}
    with DatasetWriter(path, name="c", kind=kind, clustered=True, source=SOURCE, **described) as writer:
        for row, sample in enumerate(samples):
            picture_of = preview(kind, sample["pixels"])
            defaults: dict[str, Any] = {
                "sample_id": f"s{row:03d}",
                "labels": {("normal", "sick")[row % 2]: 1.0},
                "patient": f"p{row}",
                "sha256": digest_bytes(str(row).encode()),
                "statistics": image_statistics(picture_of),
                "checks": image_checks(picture_of),
            }
            writer.add(Sample(**defaults | sample))
    return path


def test_volumes(tmp_path: Path):
    rng = np.random.default_rng(0)
    samples = []
    for row in range(12):
        mask = np.zeros((8, 20, 24), np.uint8)
        mask[3:5, 4:9, 4:9] = row % 2
        voxels = rng.integers(-1000, 1000, (8, 20, 24)).astype(np.int16)
        samples.append({"pixels": voxels, "mask": mask, "spacing_mm": (2.0, 0.7, 0.7)})
    assert failed(judge(tmp_path, collection(tmp_path / "good", "volume", samples))) == {}

    samples[0]["findings"] = ("missing_slices: 2 of 10 at equal distance", "oblique: 4 degrees")
    samples[1]["mask"] = np.zeros((8, 20, 24), np.uint8)
    samples[2]["mask"] = np.ones((8, 20, 24), np.uint8)
    samples[3]["mask"] = None
    samples[4]["spacing_mm"] = (20.0, 0.7, 0.7)
    samples[5] |= {"pixels": samples[5]["pixels"][2:5].copy(), "mask": samples[5]["mask"][2:5].copy()}
    samples[6]["pixels"] = np.full((8, 20, 24), -1000, np.int16)
    samples[7]["pixels"][4] = 0  # an empty middle slice makes no empty volume
    result = judge(tmp_path, collection(tmp_path / "bad", "volume", samples))
    assert failed(result) == {
        "tiny_image": ["s005"],
        "blank_image": ["s006"],
        "missing_slices": ["s000"],
        "oblique": ["s000"],
        "spacing_outlier": ["s004"],
        "mask_contradicts_label": ["s001", "s002"],
    }
    assert [entry["sample_id"] for entry in result["quarantined"]] == ["s000", "s005", "s006"]
    assert "1 volume with missing slices" in (tmp_path / "validation.html").read_text()


@pytest.mark.parametrize(
    ("finding", "words", "is_out"),
    [
        ("missing_slices: 2 slices are missing in 1 places", "1 volume with missing slices", True),
        ("duplicate_slices: 1 equal copies were left out", "1 volume with slices that stand twice", False),
        ("uneven_spacing: gaps between slices of 2 to 3 mm", "1 volume with uneven spacing of slices", False),
        ("gantry_tilt: slices are 5 degrees off", "1 volume with a tilted gantry", False),
        ("oblique: axes are turned by 4 degrees", "1 volume with oblique axes", False),
    ],
)
def test_what_a_reader_doubts_about_a_volume_is_judged_and_shown(
    tmp_path: Path, finding: str, words: str, is_out: bool
):
    rng = np.random.default_rng(0)
    samples: list[dict[str, Any]] = [
        {"pixels": rng.integers(-1000, 1000, (8, 20, 24)).astype(np.int16), "spacing_mm": (2.0, 0.7, 0.7)}
        for _ in range(6)
    ]
    samples[3]["findings"] = (finding,)
    result = judge(tmp_path, collection(tmp_path / "d", "volume", samples))
    rule = finding.partition(":")[0]
    assert failed(result) == {rule: ["s003"]}
    assert result["quarantined"] == ([{"sample_id": "s003", "reason": rule}] if is_out else [])
    page = (tmp_path / "validation.html").read_text()
    assert words in page
    assert 'alt="s003"' in page


def test_a_series_of_files_that_lacks_a_slice_is_kept_out(tmp_path: Path):
    from test_volumes import write_series

    from components.ingest import IngestParams, ingest

    (tmp_path / "scans").mkdir()
    rows = ["file,label"]
    for number in range(6):
        voxels = np.random.default_rng(number).integers(-1000, 1000, (24, 20, 9)).astype(np.int16)
        series = write_series(tmp_path / f"scans/{number}", voxels)
        if number == 2:
            sorted(series.iterdir())[4].unlink()
        rows.append(f"{number},{('normal', 'sick')[number % 2]}")
    (tmp_path / "scans/labels.csv").write_text("\n".join(rows))
    entry = {
        "title": "Scans", "task": "binary", "classes": ["normal", "sick"], "positive": "sick", "modality": "CT",
        "licence": "none", "citation": "none", "patient": "per-image", "format": "table", "kind": "volume",
        "file": str(tmp_path / "scans"), "table": "labels.csv", "label_column": "label", "deidentify": True,
    }  # fmt: skip
    (tmp_path / "catalog.yaml").write_text(json.dumps({"scans": entry}))
    ingest(
        catalog=tmp_path / "catalog.yaml",
        cache=tmp_path / "cache",
        dataset=tmp_path / "d",
        params=IngestParams(source="scans"),
    )
    result = judge(tmp_path, tmp_path / "d")
    (out,) = result["quarantined"]
    assert out["reason"] == "missing_slices"
    samples = DatasetFolder(tmp_path / "d").samples.set_index("sample_id")
    assert samples["findings"][out["sample_id"]] == "missing_slices: 1 slices are missing in 1 places"
    assert (samples["depth_px"] == 9).sum() == 5


def test_slides_without_tissue_are_kept_out(tmp_path: Path):
    slide = tmp_path / "slide.svs"
    slide.write_bytes(b"what a slide holds is not read here")
    samples = []
    for row in range(6):
        tissue = np.zeros((40, 60), np.uint8)
        tissue[10:30, 10:30] = row != 4
        pixels = np.random.default_rng(row).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        files = {"slide": slide, "slide_mpp": 5.0 if row == 3 else 0.5, "sha256": digest_path(slide)}
        samples.append({"pixels": pixels, "tissue": tissue, **files})
    result = judge(tmp_path, collection(tmp_path / "d", "slide", samples))
    assert failed(result) == {"without_tissue": ["s004"], "spacing_outlier": ["s003"]}
    assert result["quarantined"] == [{"sample_id": "s004", "reason": "without_tissue"}]


def test_features(tmp_path: Path):
    rng = np.random.default_rng(0)
    bags = [rng.normal(size=(2 + row, 7)).astype(np.float32) for row in range(8)]
    assert (
        failed(judge(tmp_path, collection(tmp_path / "good", "features", [{"pixels": bag} for bag in bags])))
        == {}
    )
    bags[3][1, 2] = np.nan
    for bag in bags:
        bag[:, 5] = 1.25
    result = judge(tmp_path, collection(tmp_path / "bad", "features", [{"pixels": bag} for bag in bags]))
    assert failed(result) == {"missing_features": ["s003"], "constant_feature": []}
    assert (
        "1 feature with one value in all bags, first column 5" in (tmp_path / "validation.html").read_text()
    )
