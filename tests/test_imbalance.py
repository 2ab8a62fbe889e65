import json
import math
import re
import tracemalloc
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from cadx.datasets import DatasetWriter, Sample, SourceInfo, write_splits
from cadx.drift import image_statistics
from cadx.files import digest_bytes
from cadx.reporting import PALETTE
from cadx.weighting import LossConfig
from components.imbalance import (
    ImbalanceParams,
    Recommendation,
    Teaching,
    imbalance,
    recommend,
    recommend_detection,
)

PIXELS = np.arange(64, dtype=np.uint8).reshape(8, 8)
STATISTICS = image_statistics(PIXELS)
SECRET = "Doe^Jane-4711"


def cohort(
    path: Path,
    samples: list[dict[str, Any]],
    classes: tuple[str, ...],
    task: str = "multiclass",
    kind: str = "image",
) -> Path:
    with DatasetWriter(
        path,
        name="cohort",
        task=task,
        kind=kind,
        classes=classes,
        positive=classes[-1] if task == "binary" else None,
        modality="chest X-ray",
        clustered=True,
        source=SourceInfo(title="t", licence="MIT", citation="c"),
    ) as writer:
        for row, sample in enumerate(samples):
            writer.add(
                Sample(
                    **{
                        "sample_id": f"s{row:05d}",
                        "pixels": PIXELS,
                        "patient": f"{SECRET}-{row}",
                        "sha256": digest_bytes(b""),
                        "statistics": STATISTICS,
                        **sample,
                    }
                )
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


def teaching(labels: pd.DataFrame) -> Teaching:
    """Training images of a patient each, from one unknown site."""
    return Teaching(labels, patients=pd.Series(range(len(labels))), sites=pd.Series([""] * len(labels)))


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
    advice = recommend(teaching(labels), task="binary", params=ImbalanceParams())
    assert (advice.sampler, advice.loss.kind) == (sampler, kind)


@pytest.mark.parametrize("rare", [1, 3, 30, 100, 300, 3000])
@pytest.mark.parametrize("task", ["binary", "multilabel"])
def test_the_imbalance_is_never_corrected_twice(rare: int, task: Any):
    labels = pd.DataFrame({"a": [1.0] * 300 + [0.0] * rare, "b": [0.0] * 300 + [1.0] * rare})
    advice = recommend(teaching(labels), task=task, params=ImbalanceParams())
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


def test_a_class_that_every_image_shows_is_no_imbalance(tmp_path: Path):
    samples = [{"labels": {"a": 1.0, "b": float(row % 2)}} for row in range(60)]
    advice = count(tmp_path, cohort(tmp_path / "d", samples, ("a", "b"), "multilabel"))["recommendation"]
    assert (advice["factor"], advice["sampler"]) == (1.0, "natural")
    assert advice["notes"] == ["Every training image shows a class, which cannot be learned: a."]
    always = [{"labels": {"a": 1.0, "b": 1.0}} for _ in range(60)]
    advice = count(tmp_path, cohort(tmp_path / "e", always, ("a", "b"), "multilabel"))["recommendation"]
    assert (advice["factor"], advice["sampler"]) == (1.0, "natural")


def test_patients_are_counted_by_site(tmp_path: Path):
    samples = [
        {"labels": {"a": 1.0}, "patient": "p", "site": "north"},
        {"labels": {"a": 1.0}, "patient": "p", "site": "north"},
        {"labels": {"b": 1.0}, "patient": "q", "site": "south"},
    ]
    found = count(tmp_path, cohort(tmp_path / "d", samples, ("a", "b")))
    assert {site: classes["a"]["count"] for site, classes in found["patients_by_site"].items()} == {
        "north": 1,
        "south": 0,
    }


# --- what the plots show, read back from the page's own drawings -----------------------------------


class Rectangle(NamedTuple):
    """A filled shape of a drawing, in its pixels; y grows downwards."""

    x0: float
    x1: float
    y0: float
    y1: float


def drawings(page: Path) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL)]


def rectangles(drawing: ElementTree.Element, colour: str) -> list[Rectangle]:
    """The bars of a colour, or with `url(` of a pattern, in the order in which they were drawn; legends left out."""
    found = []
    for axes in drawing.iter("g"):
        if re.search(r"-axes_\d+$", axes.get("id", "")):
            patches = [group for group in axes if re.search(r"-patch_\d+$", group.get("id", ""))]
            for path in (path for group in patches for path in group.iter("path")):
                if f"fill: {colour.lower()}" in path.get("style", ""):
                    corners = np.reshape(
                        [float(one) for one in re.findall(r"-?[\d.]+", path.get("d", ""))], (-1, 2)
                    )
                    (x0, y0), (x1, y1) = corners.min(axis=0), corners.max(axis=0)
                    found.append(Rectangle(x0, x1, y0, y1))
    return found


def texts(drawing: ElementTree.Element) -> dict[str, tuple[float, float]]:
    """Every text and where its baseline is anchored."""
    return {
        "".join(text.itertext()): (float(text.get("x", "nan")), float(text.get("y", "nan")))
        for text in drawing.iter("text")
    }


@pytest.mark.parametrize(("counts", "scale"), [((60, 12, 5), float), ((4000, 130, 2), math.log)])
def test_each_class_has_a_bar_of_its_count_beside_its_name(
    tmp_path: Path, counts: tuple[int, ...], scale: Any
):
    names = ("normal", "pneumonia", "cancer")
    count(tmp_path, cohort(tmp_path / "d", of_counts(**dict(zip(names, counts, strict=True))), names))
    drawing = drawings(tmp_path / "imbalance.html")[0]
    bars, written = rectangles(drawing, PALETTE[0]), texts(drawing)
    assert len(bars) == 3
    assert len({bar.x0 for bar in bars}) == 1, "bars begin at one line"
    ends, lengths = [bar.x1 for bar in bars], [scale(number) for number in counts]
    slope = (ends[0] - ends[2]) / (lengths[0] - lengths[2])
    assert ends[1] == pytest.approx(ends[2] + slope * (lengths[1] - lengths[2]), abs=0.05)
    if scale is float:
        assert bars[0].x0 == pytest.approx(ends[2] - slope * lengths[2], abs=0.05), (
            "lengths tell counts from 0"
        )
    for name, number, bar in zip(names, counts, bars, strict=True):
        label = f"{number:,}  ({100 * number / sum(counts):.1f} %)"
        assert bar.y0 < written[name][1] < bar.y1, "a class's name stands beside its bar"
        assert bar.y0 < written[label][1] < bar.y1
        assert written[label][0] > bar.x1
    assert ("images (logarithmic)" in written) == (scale is math.log)


def test_each_site_has_a_mark_at_the_share_of_its_classes(tmp_path: Path):
    of_site = {"north": {"a": 30, "b": 10}, "south": {"a": 8, "b": 32}}
    samples = [
        {"labels": {name: 1.0}, "site": site}
        for site, counts in of_site.items()
        for name, number in counts.items()
        for _ in range(number)
    ]
    count(tmp_path, cohort(tmp_path / "d", samples, ("a", "b")))
    drawing = drawings(tmp_path / "imbalance.html")[-1]
    written = texts(drawing)
    at = {number: written[str(number)][0] for number in (30, 70)}
    marks: dict[str, list[tuple[float, float]]] = {}
    for mark in drawing.iter("use"):
        colour = re.search(r"fill: (#\w+)", mark.get("style", ""))
        if colour and colour[1].upper() in {one.upper() for one in PALETTE[:2]}:
            place = float(mark.get("x", "nan")), float(mark.get("y", "nan"))
            marks.setdefault(colour[1].upper(), []).append(place)
    for site, colour in zip(of_site, PALETTE[:2], strict=True):
        first, second, in_legend = marks[colour.upper()]
        percent = [30 + 40 * (x - at[30]) / (at[70] - at[30]) for x, _ in (first, second)]
        counts = of_site[site]
        assert percent == pytest.approx([100 * number / 40 for number in counts.values()], abs=0.1)
        for name, (_, y) in zip(counts, (first, second), strict=True):
            assert abs(written[name][1] - y) < abs(written["a"][1] - written["b"][1]) / 2
        assert abs(written[site][1] - in_legend[1]) < 6, "the legend names the mark"


# --- boxes -------------------------------------------------------------------------------------------


def boxed(sizes: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    """A sample with square boxes of these sides, by class."""
    boxes = [(name, 0, 0, side, side) for name, sides in sizes.items() for side in sides]
    return {"boxes": boxes, "labels": {name: float(bool(sizes.get(name))) for name in ("a", "b")}, **changes}


def test_boxes_by_class_size_site_split_and_image(tmp_path: Path):
    samples = [
        boxed({"a": [10, 50], "b": [100]}, site="north"),
        boxed({"a": [31.9]}, site="south"),
        boxed({}, site="south"),
        boxed({}, site="south"),
        boxed({"b": [7] * 3}, site="south"),
    ]
    dataset = cohort(tmp_path / "d", samples, ("a", "b"), "detection")
    found = count(tmp_path, dataset, ["train", "train", "train", "test", "excluded"])
    assert found["box_sizes"] == {
        "a": {"small": 2, "medium": 1, "large": 0},
        "b": {"small": 0, "medium": 0, "large": 1},
    }
    assert found["boxes_per_image"] == {"0": 2, "1": 1, "3": 1}
    assert found["boxes_by_site"]["south"]["a"]["count"] == 1
    assert found["boxes_by_site"]["south"]["b"]["count"] == 0
    assert found["boxes_by_split"]["train"]["a"]["count"] == 3
    page = (tmp_path / "imbalance.html").read_text()
    assert "2 of 4 images (50.0 %) have no box; the fullest has 3." in page
    drawing = drawings(tmp_path / "imbalance.html")[1]
    written = texts(drawing)
    widths = [bar.x1 - bar.x0 for fill in (PALETTE[0], "url(") for bar in rectangles(drawing, fill)]
    percent = [60 * width / (written["80"][0] - written["20"][0]) for width in (*widths[:2], *widths[6:])]
    assert percent == pytest.approx([66.67, 0, 33.33, 0, 0, 100], abs=0.1), (
        "small, medium, large, of a and b each"
    )
    heights = [bar.y1 - bar.y0 for bar in rectangles(drawing, PALETTE[0])[2:]]
    assert [height / heights[1] for height in heights] == pytest.approx([2, 1, 0, 1], abs=0.01)


def detection(rows: list[tuple[int, int]]) -> Recommendation:
    """The advice for images with these numbers of boxes of the classes a and b."""
    num_boxes = pd.DataFrame(rows, columns=["a", "b"])
    images = teaching((num_boxes > 0).astype(float))
    return recommend_detection(images, num_boxes=num_boxes, params=ImbalanceParams())


@pytest.mark.parametrize(
    ("rows", "sampler", "why"),
    [
        ([(2, 2)] * 30, "natural", "nearly equal"),
        ([(12, 1)] * 30, "natural", "in the same images"),  # as in blood smears
        ([(4, 0)] * 90 + [(0, 4)] * 10, "balanced", "draw images of each class equally often"),
        ([(1, 1)] * 10 + [(0, 0)] * 90, "balanced", "without boxes are 9.0 times as many"),
    ],
)
def test_boxes_are_balanced_by_drawing_where_that_helps(rows: list[tuple[int, int]], sampler: str, why: str):
    advice = detection(rows)
    assert advice.sampler == sampler
    assert why in advice.reason


def test_no_loss_is_recommended_to_detectors_which_bring_their_own(tmp_path: Path):
    dataset = cohort(tmp_path / "d", [boxed({"a": [2] * 12, "b": [3]})] * 30, ("a", "b"), "detection")
    advice = count(tmp_path, dataset)["recommendation"]
    assert advice["factor"] == 12
    assert advice["loss"] == LossConfig().model_dump()
    head = (tmp_path / "imbalance.html").read_text().split("<main>")[1].split("Overall")[0]
    assert "sampler" in head
    assert "boxes are unequal (factor 12.0, b)" in head
    for word in ("loss", "focal", "weigh"):
        assert word not in head


def test_a_detection_set_without_boxes_in_train_is_refused(tmp_path: Path):
    dataset = cohort(tmp_path / "d", [boxed({}), boxed({"a": [9]})], ("a", "b"), "detection")
    with pytest.raises(ValueError, match="dataset cohort: no image of the train split is labelled"):
        count(tmp_path, dataset, ["train", "test"])


# --- bags, masks -------------------------------------------------------------------------------------


def test_bags_are_weighed_by_their_label_and_told_by_their_instances(tmp_path: Path):
    numbers = [2, 4, 6, 40, 50]
    samples = [
        {"pixels": np.zeros((number, 3), np.float32), "labels": {"no" if number < 10 else "yes": 1.0}}
        for number in numbers
    ]
    found = count(tmp_path, cohort(tmp_path / "d", samples, ("no", "yes"), "binary", "features"))
    assert found["bags"]["instances"] == {"minimum": 2, "q25": 4, "median": 6, "q75": 40, "maximum": 50}
    assert found["bags"]["by_class"]["yes"]["median"] == 45
    assert found["recommendation"]["factor"] == 1.5  # bags, not the 96 instances of "yes" to 12
    assert found["recommendation"]["notes"][-1].startswith("Bags hold 2 to 50 instances")


def test_the_burden_of_volumes_is_told_in_ml(tmp_path: Path):
    mask = np.zeros((4, 10, 10), np.uint8)
    mask[0, 0, :4], mask[3, 9, 9] = 1, 2
    volume = {"pixels": np.zeros((4, 10, 10), np.int16), "spacing_mm": (5, 2, 1)}  # 0.01 ml a voxel
    samples = [
        {**volume, "mask": mask, "labels": {"ill": 1.0}},
        {**volume, "mask": np.zeros_like(mask), "labels": {"well": 1.0}},
        {**volume, "labels": {"well": 1.0}},
    ]
    found = count(tmp_path, cohort(tmp_path / "d", samples, ("well", "ill"), "binary", "volume"))
    masks = found["masks"]
    assert (masks["num_masks"], masks["num_empty"], masks["unit"]) == (2, 1, "ml")
    assert masks["positive_percentage"] == pytest.approx(100 * 5 / 800)
    assert list(masks["by_value"]) == ["1", "2"]
    assert masks["by_value"]["1"]["burden"]["median"] == pytest.approx(0.04)
    assert masks["by_class"]["ill"]["burden"]["maximum"] == pytest.approx(0.05)
    assert masks["by_class"]["well"]["burden"]["maximum"] == 0
    assert masks["by_class"]["well"]["num_masks"] == 1
    assert found["recommendation"]["notes"][-1].startswith("Only 0.62 % of the voxels are positive")
    assert "class ill" in (tmp_path / "imbalance.html").read_text()


def test_masks_of_unknown_spacing_have_a_share_and_no_burden(tmp_path: Path):
    mask = np.eye(8, dtype=np.uint8)
    samples = [{"mask": mask, "labels": {"a": 1.0}}, {"labels": {"b": 1.0}}]
    found = count(tmp_path, cohort(tmp_path / "d", samples, ("a", "b")))
    assert found["masks"]["positive_percentage"] == pytest.approx(12.5)
    assert found["masks"]["by_class"]["a"]["burden"]["median"] is None


def test_a_large_mask_is_measured_in_little_memory(tmp_path: Path):
    mask = np.zeros((40, 512, 512), np.uint8)
    mask[17] = 3
    samples = [{"pixels": mask, "mask": mask, "spacing_mm": (1, 1, 1), "labels": {"a": 1.0}}] * 1
    dataset = cohort(
        tmp_path / "d",
        [*samples, {**samples[0], "mask": None, "labels": {"b": 1.0}}],
        ("a", "b"),
        kind="volume",
    )
    del mask, samples
    count(tmp_path, dataset)  # imports, fonts
    tracemalloc.start()
    found = count(tmp_path, dataset)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found["masks"]["by_value"]["3"]["positive_percentage"] == pytest.approx(2.5)
    assert peak < 3 * 10_485_760  # np.bincount of the whole mask alone takes 84 MB
