import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cadx.datasets import DatasetWriter, SourceInfo, write_splits
from cadx.drift import image_statistics
from cadx.files import digest_bytes
from cadx.losses import LossConfig
from components.imbalance import ImbalanceParams, imbalance, recommend

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)
STATISTICS = image_statistics(PIXELS)
SECRET = "Doe^Jane-4711"


def cohort(
    path: Path, samples: list[dict[str, Any]], classes: tuple[str, ...], task: str = "multiclass"
) -> Path:
    with DatasetWriter(
        path,
        name="cohort",
        task=task,
        classes=classes,
        positive=classes[-1] if task == "binary" else None,
        modality="chest X-ray",
        clustered=True,
        source=SourceInfo(title="t", licence="MIT", citation="c"),
    ) as writer:
        for row, sample in enumerate(samples):
            writer.add(
                **{
                    "sample_id": f"s{row:05d}",
                    "pixels": PIXELS,
                    "patient": f"{SECRET}-{row}",
                    "sha256": digest_bytes(b""),
                    "statistics": STATISTICS,
                    **sample,
                }
            )
    return path


def of_counts(**counts: int) -> list[dict[str, Any]]:
    return [{"labels": {name: 1.0}} for name, count in counts.items() for _ in range(count)]


def count(tmp_path: Path, dataset: Path, splits: list[str] | None = None, **params: Any) -> dict[str, Any]:
    ids = pd.read_parquet(dataset / "samples.parquet")["sample_id"]
    write_splits(
        tmp_path / "splits.parquet",
        pd.DataFrame({"sample_id": ids, "split": splits or ["train"] * len(ids), "reason": ""}),
    )
    imbalance(
        dataset=dataset,
        splits=tmp_path / "splits.parquet",
        imbalance=tmp_path / "imbalance.json",
        report=tmp_path / "imbalance.html",
        params=ImbalanceParams(**params),
    )
    return json.loads((tmp_path / "imbalance.json").read_text())


def test_the_chapters_example(tmp_path: Path):
    counts = {"normal": 9500, "pneumonia": 300, "tuberculosis": 150, "cancer": 50}
    found = count(tmp_path, cohort(tmp_path / "d", of_counts(**counts), tuple(counts)))
    assert {name: figures["count"] for name, figures in found["overall"].items()} == counts
    assert [figures["percentage"] for figures in found["overall"].values()] == [95.0, 3.0, 1.5, 0.5]
    factors = [round(figures["imbalance_factor"], 1) for figures in found["overall"].values()]
    assert factors == [1.0, 31.7, 63.3, 190.0]
    assert found["recommendation"]["factor"] == 190.0
    assert found["recommendation"]["decided_by"] == "cancer"


def test_equal_inputs_give_equal_bytes(tmp_path: Path):
    dataset = cohort(tmp_path / "d", of_counts(a=40, b=7), ("a", "b"))
    count(tmp_path, dataset)
    first = [(tmp_path / name).read_bytes() for name in ("imbalance.json", "imbalance.html")]
    count(tmp_path, dataset)
    assert [(tmp_path / name).read_bytes() for name in ("imbalance.json", "imbalance.html")] == first


def test_one_in_a_thousand_and_an_empty_class(tmp_path: Path):
    dataset = cohort(tmp_path / "d", of_counts(normal=4000, cancer=4), ("normal", "cancer", "never"))
    found = count(tmp_path, dataset)
    assert found["overall"]["never"] == {"count": 0, "percentage": 0.0, "imbalance_factor": None}
    assert found["overall"]["cancer"]["imbalance_factor"] == 1000.0
    advice = found["recommendation"]
    assert (advice["sampler"], advice["loss"]["kind"], advice["loss"]["weights"]) == (
        "balanced",
        "focal",
        "none",
    )
    assert advice["notes"] == [
        "No training image shows a class, which can be neither learned nor drawn: never.",
        "Few images are drawn again and again in an epoch and need strong augmentation:"
        " cancer (4 of them, 500 times).",
        "Classes of fewer than 20 training patients may be learned by heart: cancer (4).",
    ]
    assert "NaN" not in (tmp_path / "imbalance.json").read_text()
    assert "inf" not in (tmp_path / "imbalance.html").read_text().split("<main>")[1].split("<svg")[0]


@pytest.mark.parametrize(
    ("rare", "sampler", "kind"),
    [(100, "natural", "cross_entropy"), (70, "natural", "cross_entropy"), (60, "balanced", "cross_entropy"),
     (6, "balanced", "cross_entropy"), (5, "balanced", "focal")],
)  # fmt: skip
def test_the_recommendation_by_factor(rare: int, sampler: str, kind: str):
    labels = pd.DataFrame({"a": [1.0] * 100 + [0.0] * rare, "b": [0.0] * 100 + [1.0] * rare})
    people = pd.Series(range(100 + rare))
    advice = recommend(
        labels, patients=people, sites=people.map(lambda _: ""), task="binary", params=ImbalanceParams()
    )
    assert (advice.sampler, advice.loss.kind) == (sampler, kind)


@pytest.mark.parametrize("rare", [1, 3, 30, 100, 300, 3000])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_the_imbalance_is_never_corrected_twice(rare: int, task: Any):
    labels = pd.DataFrame({"a": [1.0] * 300 + [0.0] * rare, "b": [0.0] * 300 + [1.0] * rare})
    people = pd.Series(range(300 + rare))
    advice = recommend(labels, patients=people, sites=people * 0, task=task, params=ImbalanceParams())
    assert not (advice.sampler == "balanced" and advice.loss.weights != "none")


def test_train_can_take_the_recommended_loss(tmp_path: Path):
    found = count(tmp_path, cohort(tmp_path / "d", of_counts(a=60, b=2), ("a", "b")), focal_gamma=1.5)
    loss = LossConfig.model_validate(found["recommendation"]["loss"])
    assert loss.gamma == 1.5
    loss.build("multiclass", np.array([[2, 60], [60, 2]]))


def test_only_the_train_split_decides(tmp_path: Path):
    samples = of_counts(a=10, b=10) + of_counts(a=90, b=1)
    dataset = cohort(tmp_path / "d", samples, ("a", "b"))
    found = count(tmp_path, dataset, ["train"] * 20 + ["test"] * 90 + ["excluded"])
    assert found["recommendation"]["factor"] == 1.0
    assert found["recommendation"]["sampler"] == "natural"
    assert list(found["by_split"]) == ["train", "test", "excluded"]
    assert found["by_split"]["test"]["b"]["count"] == 0
    assert found["by_split"]["excluded"]["b"]["count"] == 1
    assert found["overall"]["b"]["count"] == 10  # without the excluded one


def test_figures_by_site_scanner_patient_and_box(tmp_path: Path):
    samples = [
        {"labels": {"a": 1.0}, "patient": "p", "site": "north", "scanner": "X"},
        {"labels": {"a": 1.0}, "patient": "p", "site": "north", "scanner": "X"},
        {
            "labels": {"b": 1.0},
            "patient": "p",
            "site": "north",
            "scanner": "Y",
            "boxes": [("b", 0, 0, 2, 2)] * 3,
        },
        {"labels": {"a": 1.0}, "patient": "q", "site": "south", "scanner": "Y", "boxes": [("a", 0, 0, 2, 2)]},
    ]
    found = count(tmp_path, cohort(tmp_path / "d", samples, ("a", "b")))
    assert {group: balance["a"]["count"] for group, balance in found["by_site"].items()} == {
        "north": 2,
        "south": 1,
    }
    assert found["by_site"]["south"]["b"]["count"] == 0
    assert {group: balance["b"]["count"] for group, balance in found["by_scanner"].items()} == {
        "X": 0,
        "Y": 1,
    }
    assert found["patients"]["a"] == {"count": 2, "percentage": 100.0, "imbalance_factor": 1.0}
    assert found["patients"]["b"] == {"count": 1, "percentage": 50.0, "imbalance_factor": 2.0}
    assert {name: figures["count"] for name, figures in found["boxes"].items()} == {"b": 3, "a": 1}
    notes = found["recommendation"]["notes"]
    assert "Classes from a single site: a network may learn the site instead: b." in notes


def test_a_single_site_of_unknown_name(tmp_path: Path):
    found = count(tmp_path, cohort(tmp_path / "d", of_counts(a=30, b=30), ("a", "b")))
    assert found["by_site"] == {"": found["overall"]}
    assert found["recommendation"]["notes"] == []
    page = (tmp_path / "imbalance.html").read_text()
    assert "The dataset does not say from which site an image comes." in page


def test_multilabel_is_judged_by_present_against_absent(tmp_path: Path):
    samples = [{"labels": {"a": float(row % 2), "b": float(row % 2)}} for row in range(40)]
    samples += [{"labels": {"a": 1.0, "b": 0.0}}, {"labels": {"a": 0.0}}]
    found = count(tmp_path, cohort(tmp_path / "d", samples, ("a", "b"), task="multilabel"))
    assert found["recommendation"]["factor"] == pytest.approx(21 / 20)
    labelled_for_b = 41
    assert found["overall"]["b"]["percentage"] == pytest.approx(100 * 20 / labelled_for_b)
    rare = [{"labels": {"a": float(row == 0), "b": float(row % 2)}} for row in range(90)]
    found = count(tmp_path, cohort(tmp_path / "e", rare, ("a", "b"), task="multilabel"))
    assert found["recommendation"]["factor"] == 89.0
    # Three pools are drawn equally: a, b, and the images with neither.
    assert "a (1 of them, 30 times)" in found["recommendation"]["notes"][0]


def test_a_train_split_without_labels_is_refused_in_one_line(tmp_path: Path):
    dataset = cohort(tmp_path / "d", [{"labels": {}}, *of_counts(a=1)], ("a", "b"))
    with pytest.raises(ValueError, match="dataset cohort: no image of the train split is labelled"):
        count(tmp_path, dataset, ["train", "test"])
    assert not (tmp_path / "imbalance.json").exists()


def test_splits_of_another_dataset_are_refused(tmp_path: Path):
    dataset = cohort(tmp_path / "d", of_counts(a=3, b=3), ("a", "b"))
    count(tmp_path, dataset)
    other = cohort(tmp_path / "e", of_counts(a=3, b=4), ("a", "b"))
    with pytest.raises(ValueError, match="1 of 7 images have no split"):
        imbalance(
            dataset=other,
            splits=tmp_path / "splits.parquet",
            imbalance=tmp_path / "i.json",
            report=tmp_path / "i.html",
            params=ImbalanceParams(),
        )


def test_no_patient_appears_in_the_outputs(tmp_path: Path):
    count(tmp_path, cohort(tmp_path / "d", of_counts(a=30, b=2), ("a", "b")))
    assert SECRET not in (tmp_path / "imbalance.json").read_text()
    assert SECRET not in (tmp_path / "imbalance.html").read_text()


def test_many_sites_and_classes_stay_readable(tmp_path: Path):
    classes = tuple(f"class {number}" for number in range(12))
    samples = [{"labels": {classes[row % 12]: 1.0}, "site": f"site {row % 31:02d}"} for row in range(744)]
    found = count(tmp_path, cohort(tmp_path / "d", samples, classes))
    assert len(found["by_site"]) == 31
    page = (tmp_path / "imbalance.html").read_text()
    assert "The 7 largest of 31 are drawn." in page
    assert len(page) < 1_000_000
