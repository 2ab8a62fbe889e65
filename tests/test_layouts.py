"""Sources as they lie on disk: boxes in three forms, pairs with masks, bags of numbers, files named one by one."""

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cadx.catalog import (
    ENTRY,
    BagsEntry,
    CocoEntry,
    FilesEntry,
    FolderEntry,
    PairsEntry,
    TableEntry,
    VocEntry,
    load_catalog,
)
from cadx.layouts import Orphan, list_items, read_bags
from cadx.quality import box_problems

DESCRIBED: dict[str, Any] = {
    "title": "made for a test",
    "classes": ["cell", "platelet"],
    "modality": "microscopy",
    "licence": "CC0",
    "citation": "none",
    "patient": "per-image",
    "file": "source",
}
DETECTION = {**DESCRIBED, "task": "detection"}


def picture(path: Path, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 7).save(path)


# --- Pascal VOC ---------------------------------------------------------------------------------------


def voc(root: Path, boxes: dict[str, list[tuple[str, int, int, int, int]]]) -> VocEntry:
    for stem, found in boxes.items():
        picture(root / f"JPEGImages/{stem}.jpg")
        (root / "Annotations").mkdir(exist_ok=True)
        objects = "".join(
            f"<object><name>{name}</name><bndbox><xmin>{x0}</xmin><ymin>{y0}</ymin>"
            f"<xmax>{x1}</xmax><ymax>{y1}</ymax></bndbox></object>"
            for name, x0, y0, x1, y1 in found
        )
        (root / f"Annotations/{stem}.xml").write_text(f"<annotation>{objects}</annotation>")
    return VocEntry(**DETECTION, format="voc")


def test_voc_corners_become_half_open_and_images_without_boxes_stay(tmp_path: Path) -> None:
    """Pascal VOC counts from 1 and includes its maxima: 1 to 40 is the whole width of 40 pixels."""
    entry = voc(tmp_path, {"b": [("cell", 1, 1, 40, 30)], "a": []})
    empty, full = list_items(entry, tmp_path)
    assert full.boxes == [("cell", 0, 0, 40, 30)]
    assert full.labels == {"cell": 1, "platelet": 0}
    assert (empty.boxes, empty.labels) == ([], {"cell": 0, "platelet": 0})


def test_voc_of_a_tool_that_counts_from_0_lies_outside_the_image_and_so_is_found(tmp_path: Path) -> None:
    entry = voc(tmp_path, {"a": [("cell", 0, 0, 39, 29), ("cell", 1, 1, 40, 30)]})
    (item,) = list_items(entry, tmp_path)
    boxes = pd.DataFrame(item.boxes, columns=["class", "x0", "y0", "x1", "y1"]).assign(sample_id="a")
    samples = pd.DataFrame({"sample_id": ["a"], "height_px": [30], "width_px": [40]})
    assert box_problems(boxes, samples, entry.classes)["is_inside"].tolist() == [False, True]


def test_bccd_has_its_published_counts_and_two_boxes_without_area(mirror: Path, root: Path) -> None:
    entry = load_catalog(root / "data/catalog.yaml")["bccd"]
    assert isinstance(entry, VocEntry)
    items = list_items(entry, mirror / entry.file)
    assert Counter(item.given_split for item in items) == {"train": 205, "val": 87, "test": 72}
    names = Counter(name for item in items for name, *_ in item.boxes)
    assert names == {"RBC": 4155, "WBC": 372, "Platelets": 361}
    empty = [
        item.path.stem[-5:] for item in items for _, x0, y0, x1, y1 in item.boxes if x1 <= x0 or y1 <= y0
    ]
    assert empty == ["00338", "00343"]


@pytest.mark.parametrize(
    ("height", "width", "size_px"),
    [("30", "40", (30, 40)), ("0", "0", None), ("", "40", None), ("x", "4", None)],
)
def test_the_size_of_an_annotated_image_is_taken_where_it_is_told(
    tmp_path: Path, height: str, width: str, size_px: tuple[int, int] | None
) -> None:
    entry = voc(tmp_path, {"a": []})
    (tmp_path / "Annotations/a.xml").write_text(
        f"<annotation><size><width>{width}</width><height>{height}</height></size></annotation>"
    )
    assert list_items(entry, tmp_path)[0].size_px == size_px


def test_an_xml_bomb_is_refused(tmp_path: Path) -> None:
    entry = voc(tmp_path, {"a": []})
    (tmp_path / "Annotations/a.xml").write_text(
        '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]><annotation>&b;</annotation>'
    )
    with pytest.raises(ValueError, match="image 1 in sorted order: its annotation is no XML"):
        list_items(entry, tmp_path)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: (root / "Annotations/a.xml").unlink(), "1 of 2 images have no annotation"),
        (lambda root: (root / "JPEGImages/a.jpg").unlink(), "1 of 2 annotations have no image"),
        (lambda root: (root / "Annotations/a.xml").write_text("<annotation><object>"), "is no XML"),
        (lambda root: (root / "Annotations/a.xml").write_text("<html/>"), "not Pascal VOC's <annotation>"),
        (
            lambda root: (root / "Annotations/a.xml").write_text('<annotation xmlns="http://x"/>'),
            "not Pascal VOC's <annotation>",
        ),
        (
            lambda root: voc(root, {"a": [("virus", 1, 1, 2, 2)]}),
            "image 1 in sorted order: box 1 is of a class that is none of cell, platelet",
        ),
        (lambda root: (root / "train.txt").write_text("a\nnobody\n"), "splits.train: line 2 names an image"),
        (lambda root: (root / "train.txt").unlink(), "splits.train: its list is missing or empty"),
    ],
)
def test_voc_faults_are_named_without_the_file(tmp_path: Path, spoil: Any, message: str) -> None:
    entry = voc(tmp_path, {"a": [("cell", 1, 2, 3, 4)], "b": []}).model_copy(
        update={"splits": {"train": "train.txt"}}
    )
    (tmp_path / "train.txt").write_text("a\nb\n")
    spoil(tmp_path)
    with pytest.raises(ValueError, match=message) as error:
        list_items(entry, tmp_path)
    assert "\n" not in str(error.value)
    assert ".xml" not in str(error.value)


# --- COCO ---------------------------------------------------------------------------------------------


def coco(**changes: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "one.png"}, {"id": 2, "file_name": "two.png"}],
        "categories": [{"id": 7, "name": "cell"}, {"id": 9, "name": "platelet"}],
        "annotations": [{"id": 1, "image_id": 2, "category_id": 9, "bbox": [3, 4, 10.5, 6]}],
    } | changes


def test_coco_boxes_are_corner_and_size(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        picture(tmp_path / f"images/{name}.png")
    (tmp_path / "train.json").write_text(json.dumps(coco()))
    (tmp_path / "test.json").write_text(
        json.dumps(
            coco(images=[{"id": 1, "file_name": "three.png", "height": 30, "width": 40}], annotations=[])
        )
    )
    entry = CocoEntry(
        **DETECTION,
        format="coco",
        images="images",
        annotations={"train": "train.json", "test": "test.json"},
    )
    one, two, three = list_items(entry, tmp_path)
    assert (one.boxes, one.given_split) == ([], "train")
    assert two.boxes == [("platelet", 3, 4, 13.5, 10)]
    assert two.labels == {"cell": 0, "platelet": 1}
    assert (three.given_split, three.size_px) == ("test", (30, 40))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"images": []}, "not in COCO's form"),
        (
            coco(annotations=[{"image_id": 5, "category_id": 7, "bbox": [0, 0, 1, 1]}]),
            "annotation 1 is of an image",
        ),
        (
            coco(annotations=[{"image_id": 1, "category_id": 8, "bbox": [0, 0, 1, 1]}]),
            "annotation 1 is of none of",
        ),
        (
            coco(annotations=[{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1]}]),
            r"not in COCO.s form .*at annotations.0.bbox",
        ),
        (
            coco(images=[{"id": 1, "file_name": "../one.png"}], annotations=[]),
            "must be a path within the source",
        ),
        (coco(images=[{"id": 1, "file_name": "gone.png"}], annotations=[]), "image 1: its file is not there"),
        (
            coco(annotations=[{"image_id": 1, "category_id": 7, "bbox": [0, 0, 9, 9], "iscrowd": 1}]),
            "annotation 1 is of a crowd",
        ),
        (
            coco(annotations=[{"image_id": 1, "category_id": 7, "segmentation": [[0, 0, 9, 0, 9, 9]]}]),
            r"not in COCO.s form .*at annotations.0.bbox",
        ),
        (
            coco(categories=[{"id": 7, "name": "cell"}, {"id": 7, "name": "platelet"}]),
            "a category id stands twice",
        ),
    ],
)
def test_coco_faults_are_named(tmp_path: Path, content: dict[str, Any], message: str) -> None:
    picture(tmp_path / "one.png")
    picture(tmp_path / "two.png")
    (tmp_path / "all.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        list_items(CocoEntry(**DETECTION, format="coco", annotations="all.json"), tmp_path)


def test_coco_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    picture(tmp_path / "one.png")
    picture(tmp_path / "two.png")
    (tmp_path / "all.json").write_text(json.dumps(coco()), encoding="utf-8-sig")
    items = list_items(CocoEntry(**DETECTION, format="coco", annotations="all.json"), tmp_path)
    assert [len(item.boxes) for item in items] == [0, 1]


# --- CSV ----------------------------------------------------------------------------------------------


def test_a_detection_table_takes_its_labels_from_the_boxes(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "images.csv").write_text("file,crp\na.png,3.5\nb.png,\n")
    (tmp_path / "boxes.csv").write_text("file,class,x0,y0,x1,y1\nb.png,cell,1,2,3,4\n")
    entry = TableEntry(
        **DETECTION,
        format="table",
        table="images.csv",
        boxes={"table": "boxes.csv", "x1": "x1", "y1": "y1"},
        clinical={"crp_mg_l": "crp"},
    )
    without, with_box = list_items(entry, tmp_path)
    assert without.labels == {"cell": 0, "platelet": 0}
    assert with_box.labels == {"cell": 1, "platelet": 0}
    assert without.clinical == {"crp_mg_l": 3.5}
    assert math.isnan(with_box.clinical["crp_mg_l"])


def test_a_row_without_corners_says_that_its_image_has_no_box(tmp_path: Path) -> None:
    """As in the tables of VinDr-CXR ("No finding") and of RSNA's challenge."""
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png")
    (tmp_path / "images.csv").write_text("file\na.png\nb.png\n")
    entry = TableEntry(
        **DETECTION, format="table", table="images.csv", boxes={"table": "boxes.csv", "x1": "x1", "y1": "y1"}
    )
    header = "file,class,x0,y0,x1,y1\nb.png,cell,1,2,3,4\n"
    for row in ("a.png,No finding,,,,", "a.png,,,,,"):
        (tmp_path / "boxes.csv").write_text(f"{header}{row}\n")
        without, with_box = list_items(entry, tmp_path)
        assert (without.boxes, without.labels) == ([], {"cell": 0, "platelet": 0})
        assert with_box.boxes == [("cell", 1, 2, 3, 4)]
    for row, message in (
        ("a.png,cell,,,,", "boxes.csv row 3: a corner is missing"),
        ("a.png,virus,1,2,3,4", "boxes.csv row 3: a box of a class that is none of cell, platelet"),
        ("a.png,virus,1,,,", "boxes.csv row 3: a box of a class that is none of cell, platelet"),
        ("c.png,No finding,,,,", "boxes.csv: boxes of 1 files that have no row"),
    ):
        (tmp_path / "boxes.csv").write_text(f"{header}{row}\n")
        with pytest.raises(ValueError, match=message):
            list_items(entry, tmp_path)


def test_a_box_table_without_a_row_is_of_images_without_boxes_and_an_empty_file_is_none(
    tmp_path: Path,
) -> None:
    picture(tmp_path / "a.png")
    (tmp_path / "images.csv").write_text("file\na.png\n")
    entry = TableEntry(
        **DETECTION, format="table", table="images.csv", boxes={"table": "boxes.csv", "x1": "x1", "y1": "y1"}
    )
    (tmp_path / "boxes.csv").write_text("file,class,x0,y0,x1,y1\n")
    (item,) = list_items(entry, tmp_path)
    assert (item.boxes, item.labels) == ([], {"cell": 0, "platelet": 0})
    (tmp_path / "boxes.csv").write_text("\n")
    with pytest.raises(ValueError, match=r"boxes\.csv: no rows"):
        list_items(entry, tmp_path)
    (tmp_path / "images.csv").write_text("file\n")
    with pytest.raises(ValueError, match=r"images\.csv: no rows"):
        list_items(entry, tmp_path)


def test_the_rsna_readers_boxes_are_all_there_and_images_without_any_too(mirror: Path, root: Path) -> None:
    entry = load_catalog(root / "data/catalog.yaml")["nih-rsna-boxes"]
    assert isinstance(entry, TableEntry)
    items = list_items(entry, mirror / entry.file)
    lines = (mirror / "nih_rsna_cxr/boxes.csv").read_text().splitlines()
    boxes = [box for item in items for box in item.boxes]
    assert len(boxes) == sum(",RSNA2018," in line for line in lines)
    assert {name for name, *_ in boxes} == {"opacity"}
    assert Counter(item.labels["opacity"] for item in items) == {1: 32, 0: 28}


@pytest.mark.parametrize("spoilt", ["images.csv", "boxes.csv"])
def test_rows_behind_a_quote_that_is_not_closed_are_not_lost(tmp_path: Path, spoilt: str) -> None:
    texts = {"images.csv": "file,note\n", "boxes.csv": "file,class,x0,y0,x1,y1,note\n"}
    for number in range(4):
        picture(tmp_path / f"{number}.png")
        note = '"seen before' if number == 1 else ""
        texts["images.csv"] += f"{number}.png,{note if spoilt == 'images.csv' else ''}\n"
        texts["boxes.csv"] += f"{number}.png,cell,1,2,3,4,{note if spoilt == 'boxes.csv' else ''}\n"
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    entry = TableEntry(
        **DETECTION, format="table", table="images.csv", boxes={"table": "boxes.csv", "x1": "x1", "y1": "y1"}
    )
    with pytest.raises(ValueError, match=rf"^{spoilt} row 3: no CSV: a quote is not closed"):
        list_items(entry, tmp_path, [])


def patients(root: Path, ages: list[str], sexes: list[str], delimiter: str = ",") -> TableEntry:
    """A table of an image per age and sex."""
    lines = [["file", "label", "age", "sex"]]
    for number, (age, sex) in enumerate(zip(ages, sexes, strict=True)):
        picture(root / f"{number}.png")
        lines.append([f"{number}.png", "cell", age, sex])
    (root / "t.csv").write_text("\n".join(map(delimiter.join, lines)), encoding="utf-8")
    return table(columns={"age": "age", "sex": "sex"})


def table(**changes: Any) -> TableEntry:
    return TableEntry(
        **{**DESCRIBED, "task": "multiclass", "format": "table", "table": "t.csv", "label_column": "label"}
        | changes
    )


def test_ages_and_sexes_are_read_in_the_forms_that_people_write(tmp_path: Path) -> None:
    ages = ["62,5", "62.5", "045Y", "62 years", "62J", "006M", "18 months", "52w", "", "unknown", "NA"]
    sexes = ["F", "female", "w", "Weiblich", "M", "male", "männlich", "other", "O", "U", ""]
    items = list_items(patients(tmp_path, ages, sexes, delimiter=";"), tmp_path)
    found = [item.attributes.get("age") for item in items]
    assert found[:7] == [62.5, 62.5, 45, 62, 62, 0.5, 1.5]
    assert found[7] == pytest.approx(1, abs=0.01)
    assert found[8:] == [None] * 3
    assert [item.attributes.get("sex") for item in items] == [*"FFFFMMMOO", None, None]


@pytest.mark.parametrize(
    ("age", "sex", "message"),
    [
        ("1950-01-02", "F", "t.csv row 3, column age: not an age; write years .*, or empty the cell"),
        ("1950", "F", "t.csv row 3, column age: not an age"),
        ("-62", "F", "t.csv row 3, column age: not an age"),
        ("62", "1", "t.csv row 3, column sex: not a sex; write F, M or O, or empty the cell"),
        ("62", "Ignatowska", "t.csv row 3, column sex: not a sex"),
    ],
)
def test_an_age_or_sex_that_cannot_be_read_is_not_taken_for_unknown(
    tmp_path: Path, age: str, sex: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        list_items(patients(tmp_path, ["62", age], ["F", sex]), tmp_path)
    assert not any(cell in str(error.value) for cell in ("1950", "Ignatowska"))


def test_an_image_or_a_mask_in_another_folder_that_no_row_names_is_found(tmp_path: Path) -> None:
    for name in ("p1/a.png", "p1/b.png", "p2/lost.jpg", "masks/s1/a.png", "masks/s2/c.png"):
        picture(tmp_path / name)
    (tmp_path / "t.csv").write_text("file,label,mask\np1/a.png,cell,masks/s1/a.png\np1/b.png,cell,\n")
    entry = table(mask_column="mask")
    with pytest.raises(ValueError, match=r"t\.csv: 2 samples beside the listed have no row") as error:
        list_items(entry, tmp_path)
    assert "lost" not in str(error.value)
    picture(tmp_path / "masks/s2/a.png")
    (tmp_path / "t.csv").write_text(
        "file,label,mask\np1/a.png,cell,masks/s1/a.png\np1/b.png,cell,masks/s2/a.png\n"
    )
    orphans: list[Orphan] = []
    assert len(list_items(entry, tmp_path, orphans)) == 2
    assert [(one.place, one.rule) for one in orphans] == [
        ("t.csv: file 6 in sorted order of its folders", "image_without_label"),
        ("t.csv: file 3 in sorted order of its folders", "label_without_image"),
    ]
    (tmp_path / "p2/lost.jpg").unlink()
    with pytest.raises(ValueError, match=r"t\.csv: 1 masks beside the listed have no row; add rows"):
        list_items(entry, tmp_path)


def test_masks_that_lie_apart_from_the_images_folder_are_looked_through_too(tmp_path: Path) -> None:
    for name in (
        "images/a.png",
        "masks/a.png",
        "masks/c.png",
        "masks/more/b.png",
        "figures/of the paper.png",
    ):
        picture(tmp_path / name)
    (tmp_path / "t.csv").write_text("file,label,mask\na.png,cell,masks/a.png\nc.png,cell,masks/c.png\n")
    orphans: list[Orphan] = []
    list_items(table(mask_column="mask", images="images"), tmp_path, orphans)
    assert [(one.place, one.rule) for one in orphans] == [
        ("t.csv row 3", "label_without_image"),
        ("t.csv: file 4 in sorted order of its folders", "label_without_image"),
    ]


def dicom(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(128) + b"DICM")


def test_pictures_in_a_folder_of_their_own_are_no_dicom_images_without_a_row(tmp_path: Path) -> None:
    dicom(tmp_path / "images/a.dcm")
    picture(tmp_path / "masks/a.png")
    (tmp_path / "t.csv").write_text("file,label\nimages/a.dcm,cell\n")
    assert len(list_items(table(), tmp_path)) == 1
    dicom(tmp_path / "more/b")
    with pytest.raises(ValueError, match="1 samples beside the listed have no row"):
        list_items(table(), tmp_path)


@pytest.mark.parametrize("companion", ["a.png", "a_mask.png", "mask-a.png", "a.jpg"])
@pytest.mark.parametrize("stray", ["b.png", "ab.png", "mask_b.jpg"])
def test_a_picture_beside_dicom_is_passed_over_only_where_it_bears_the_name_of_an_image(
    tmp_path: Path, companion: str, stray: str
) -> None:
    dicom(tmp_path / "images/a.dcm")
    picture(tmp_path / f"previews/{companion}")
    (tmp_path / "t.csv").write_text("file,label\nimages/a.dcm,cell\n")
    assert len(list_items(table(), tmp_path)) == 1
    picture(tmp_path / f"unread/{stray}")
    with pytest.raises(ValueError, match=r"t\.csv: 1 samples beside the listed have no row"):
        list_items(table(), tmp_path)
    orphans: list[Orphan] = []
    assert len(list_items(table(), tmp_path, orphans)) == 1
    assert [one.rule for one in orphans] == ["image_without_label"]


def test_a_dicom_image_in_a_folder_beside_pictures_is_not_passed_over(tmp_path: Path) -> None:
    picture(tmp_path / "images/a.png")
    dicom(tmp_path / "more/b.dcm")
    (tmp_path / "t.csv").write_text("file,label\nimages/a.png,cell\n")
    with pytest.raises(ValueError, match="1 samples beside the listed have no row"):
        list_items(table(), tmp_path)


def test_a_series_that_no_row_names_is_one_volume_wherever_it_lies(tmp_path: Path) -> None:
    for name in ("p1/s1/1.dcm", "p1/s1/2.dcm", "p2/s1/1.dcm", "p2/s1/2.dcm"):
        dicom(tmp_path / name)
    (tmp_path / "t.csv").write_text("file,label\np1/s1,cell\n")
    entry = table(kind="volume")
    with pytest.raises(ValueError, match="1 samples beside the listed have no row"):
        list_items(entry, tmp_path)
    orphans: list[Orphan] = []
    assert len(list_items(entry, tmp_path, orphans)) == 1
    assert [one.place for one in orphans] == ["t.csv: file 3 in sorted order of its folders"]


# --- Pairs, files, bags ------------------------------------------------------------------------------


def test_hippocampus_orphans_are_found_on_both_sides(mirror: Path, root: Path) -> None:
    entry = load_catalog(root / "data/catalog.yaml")["hippocampus-volumes"]
    assert isinstance(entry, PairsEntry)
    items = list_items(entry, mirror / entry.file)
    assert len(items) == 200
    assert all(item.mask and item.mask.name == item.path.name for item in items)
    with pytest.raises(ValueError, match="1 of 1 images have no mask of the same name"):
        list_items(entry, mirror / "hippocampus/orphans")


def test_orphans_of_voc_and_coco_are_handed_over_in_place_of_the_refusal(tmp_path: Path) -> None:
    entry = voc(tmp_path / "voc", {"a": [], "b": [("cell", 1, 2, 3, 4)], "c": []})
    entry = entry.model_copy(update={"splits": {"train": "train.txt"}})
    (tmp_path / "voc/train.txt").write_text("a\nb\nc\n", encoding="utf-8-sig")
    (tmp_path / "voc/Annotations/a.xml").unlink()
    (tmp_path / "voc/JPEGImages/c.jpg").unlink()
    orphans: list[Orphan] = []
    (item,) = list_items(entry, tmp_path / "voc", orphans)
    assert (item.place, item.path.stem, len(item.boxes)) == ("image 2 in sorted order", "b", 1)
    assert [(one.place, one.rule) for one in orphans] == [
        ("image 1 in sorted order", "image_without_label"),
        ("annotation 2 in sorted order", "label_without_image"),
    ]

    for name in ("two", "unlisted"):
        picture(tmp_path / f"coco/{name}.png")
    (tmp_path / "coco/all.json").write_text(json.dumps(coco()))
    orphans = []
    (item,) = list_items(
        CocoEntry(**DETECTION, format="coco", annotations="all.json"), tmp_path / "coco", orphans
    )
    assert (item.path.stem, len(item.boxes)) == ("two", 1)
    assert [(one.place, one.rule) for one in orphans] == [
        ("annotations, image 1", "label_without_image"),
        ("annotations: file 3 in sorted order of its folders", "image_without_label"),
    ]


def test_a_mask_without_an_image_is_found(tmp_path: Path) -> None:
    for name in ("images/a.png", "masks/a.png", "masks/b.png"):
        picture(tmp_path / name)
    entry = PairsEntry(
        **{**DESCRIBED, "task": "multilabel"},
        format="pairs",
        images="images",
        masks="masks",
        mask_values={"cell": 1, "platelet": 2},
    )
    with pytest.raises(ValueError, match=r"1 of 2 masks have no image .*\(mask 2 in sorted order\)"):
        list_items(entry, tmp_path)


def test_musk1_is_92_bags_of_476_conformations(mirror: Path, root: Path) -> None:
    entry = load_catalog(root / "data/catalog.yaml")["musk1"]
    assert isinstance(entry, BagsEntry)
    bags = list(read_bags(entry, mirror / entry.file))
    assert len(bags) == 92
    assert sum(len(bag.features) for bag in bags) == 476
    assert Counter(next(iter(bag.labels)) for bag in bags) == {"musk": 47, "non_musk": 45}
    assert {bag.features.shape[1] for bag in bags} == {166}
    assert bags[0].features[0, :3].tolist() == [42, -198, -109]


def test_uci_heart_keeps_hospitals_apart_and_missing_numbers_missing(mirror: Path, root: Path) -> None:
    entry = load_catalog(root / "data/catalog.yaml")["uci-heart"]
    assert isinstance(entry, BagsEntry)
    bags = list(read_bags(entry, mirror / entry.file))
    by_site = Counter(bag.site for bag in bags)
    assert by_site == {"Cleveland": 303, "Hungary": 294, "Switzerland": 123, "VA Long Beach": 200}
    ill = Counter(bag.site for bag in bags if "present" in bag.labels)
    assert [round(100 * ill[site] / by_site[site], 1) for site in ("Cleveland", "Switzerland")] == [
        45.9,
        93.5,
    ]
    # The published way to use it: columns 10 to 12 dropped, then rows with a missing number.
    whole = Counter(bag.site for bag in bags if not np.isnan(np.delete(bag.features, [10, 11, 12], 1)).any())
    assert whole == {"Cleveland": 303, "Hungary": 261, "Switzerland": 46, "VA Long Beach": 130}


def test_tcga_brca_has_its_events(mirror: Path, root: Path) -> None:
    entry = load_catalog(root / "data/catalog.yaml")["tcga-brca"]
    assert isinstance(entry, BagsEntry)
    bags = list(read_bags(entry, mirror / entry.file))
    assert len(bags) == 1096
    assert sum("event" in bag.labels for bag in bags) == 151
    assert len({bag.patient for bag in bags}) == 1096
    assert {bag.features.shape for bag in bags} == {(1, 39)}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bag,x,y\na,1,0\na,2,1\n", "t.csv row 2: rows of its bag have different values in column y"),
        ("bag,x,y\na,one,0\n", "t.csv row 2, column x: not a number"),
        ("bag,x,y\na,1,5\n", "t.csv row 2, column y: a label that is none of the entry's values"),
        ("bag,x\na,1\n", "no column 'y'"),
    ],
)
def test_bags_that_contradict_themselves_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    entry = BagsEntry(
        **{**DESCRIBED, "task": "multiclass", "kind": "features"},
        format="bags",
        tables={"": "t.csv"},
        bag_column="bag",
        label_column="y",
        values={"0": "cell", "1": "platelet"},
    )
    with pytest.raises(ValueError, match=message):
        list(read_bags(entry, tmp_path))


def test_files_named_one_by_one_must_be_there_and_known(tmp_path: Path) -> None:
    picture(tmp_path / "a.png")
    entry = FilesEntry(
        **{**DESCRIBED, "task": "multiclass"},
        format="files",
        samples=({"file": "a.png", "label": "cell"}, {"file": "gone.png"}),
    )
    with pytest.raises(ValueError, match="sample 2 of the entry: its file is not in the source"):
        list_items(entry, tmp_path)
    (tmp_path / "gone.png").write_bytes((tmp_path / "a.png").read_bytes())
    labelled, unlabelled = list_items(entry, tmp_path)
    assert (labelled.labels, unlabelled.labels) == ({"cell": 1.0}, {})


# --- What a hostile reader of sources tried -----------------------------------------------------------


def bags(**changes: Any) -> BagsEntry:
    return BagsEntry(
        **{
            **DESCRIBED,
            "task": "multiclass",
            "kind": "features",
            "format": "bags",
            "tables": {"A": "a.csv", "B": "b.csv"},
            "label_column": "y",
            "values": {"0": "cell", "1": "platelet"},
        }
        | changes
    )


def test_features_go_by_name_and_not_by_their_place_in_a_table(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("chol,bp,y\n233,120,0\n")
    (tmp_path / "b.csv").write_text("bp,y,chol\n121,1,234\n")
    found = [bag.features.tolist() for bag in read_bags(bags(), tmp_path)]
    assert found == [[[233, 120]], [[234, 121]]]
    (tmp_path / "b.csv").write_text("bp,y\n121,1\n")
    with pytest.raises(ValueError, match=r"b.csv: other columns than the first table has"):
        list(read_bags(bags(), tmp_path))


def test_bags_behind_a_quote_that_is_not_closed_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('dose,y,note\n1,1,\n2,0,"seen before\n3,1,\n')
    entry = bags(tables={"": "a.csv"}, ignored=["note"])
    with pytest.raises(ValueError, match=r"^a\.csv row 3: no CSV: a quote is not closed"):
        list(read_bags(entry, tmp_path))


def test_a_missing_number_is_a_whole_cell_and_not_a_part_of_one(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("chol,y\n-9.5,0\n-90,0\n-9,1\n")
    entry = bags(tables={"": "a.csv"}, missing="-9")
    values = [float(bag.features[0, 0]) for bag in read_bags(entry, tmp_path)]
    assert values[:2] == [-9.5, -90]
    assert math.isnan(values[2])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bag,chol,y\n,1,0\n,2,0\n", "a.csv row 2: column bag is empty"),
        ("bag,chol,y\nb,inf,0\n", "a.csv row 2, column chol: not a finite number"),
        ("bag,chol,y\nb,1e39,0\n", "a.csv row 2, column chol: not a finite number"),
        ('bag,chol,y\nb,"1,0\n' + "x" * 140_000, "a.csv row 2: no CSV"),
    ],
)
def test_cells_that_mean_nothing_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        list(read_bags(bags(tables={"": "a.csv"}, bag_column="bag"), tmp_path))


def test_ages_that_name_a_person_are_capped_in_features_too(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("age,y\n97,0\n?,0\n42,1\n")
    entry = bags(tables={"": "a.csv"}, age_column="age")
    found = list(read_bags(entry, tmp_path, oldest_years=90))
    assert [bag.age for bag in found][::2] == [90, 42]
    assert [float(bag.features[0, 0]) for bag in found][::2] == [90, 42]
    assert math.isnan(found[1].age)


def test_a_header_that_is_a_patients_row_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Doe^Jane,1950-01-02,0\nRoe^Ann,1951-01-02,1\n")
    with pytest.raises(ValueError, match="its first line names no column 'y'") as error:
        list(read_bags(bags(tables={"": "a.csv"}), tmp_path))
    assert "Doe" not in str(error.value)


def test_voc_images_of_one_name_in_two_folders_are_not_merged(tmp_path: Path) -> None:
    entry = voc(tmp_path, {"a": []})
    picture(tmp_path / "JPEGImages/more/a.jpg")
    with pytest.raises(ValueError, match="1 images bear the name of another but for folder or extension"):
        list_items(entry, tmp_path)


@pytest.mark.parametrize(
    "text", ['<?xml version="1.0" encoding="foo-9"?><a/>', '<?xml version="1.0" encoding="idna"?><a/>']
)
def test_voc_in_an_unknown_encoding_is_refused(tmp_path: Path, text: str) -> None:
    entry = voc(tmp_path, {"a": []})
    (tmp_path / "Annotations/a.xml").write_text(text)
    with pytest.raises(ValueError, match="image 1 in sorted order: its annotation is no XML"):
        list_items(entry, tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"annotations": [{"image_id": [1], "category_id": 7, "bbox": [0, 0, 1, 1]}]},
        {"annotations": [{"image_id": 1, "category_id": 7, "bbox": "1234"}]},
        {"annotations": [{"image_id": 1, "category_id": 7, "bbox": [0, 0, 1e400, 1]}]},
        {"images": [{"id": 1, "file_name": None}]},
    ],
)
def test_coco_of_another_form_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    (tmp_path / "all.json").write_text(json.dumps(coco(**changes)))
    with pytest.raises(ValueError, match="annotations: not in COCO's form"):
        list_items(CocoEntry(**DETECTION, format="coco", annotations="all.json"), tmp_path)


def test_an_image_that_coco_does_not_list_is_not_left_out_in_silence(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        picture(tmp_path / f"{name}.png")
    (tmp_path / "all.json").write_text(json.dumps(coco()))
    entry = CocoEntry(**DETECTION, format="coco", annotations="all.json")
    with pytest.raises(ValueError, match="annotations: 1 samples beside the listed have no row"):
        list_items(entry, tmp_path)
    (tmp_path / "more").mkdir()
    (tmp_path / "three.png").rename(tmp_path / "more/three.png")
    with pytest.raises(ValueError, match="annotations: 1 samples beside the listed have no row"):
        list_items(entry, tmp_path)


def test_links_that_would_be_passed_over_stop(tmp_path: Path) -> None:
    entry = voc(tmp_path, {"a": []})
    (tmp_path / "JPEGImages/gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    with pytest.raises(ValueError, match="1 links in the source lead to folders or to nothing"):
        list_items(entry, tmp_path)


def test_a_folder_of_slices_is_one_volume_of_its_class(tmp_path: Path) -> None:
    for name in ("cell/s1/1.dcm", "cell/s1/2.dcm", "cell/s2/1.dcm", "platelet/a.nii"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    entry = FolderEntry(**{**DESCRIBED, "task": "multiclass", "kind": "volume"}, format="folder")
    items = list_items(entry, tmp_path)
    assert [item.relative.as_posix() for item in items] == ["cell/s1", "cell/s2", "platelet/a.nii"]


@pytest.mark.parametrize("kind", ["image", "volume"])
def test_folders_that_a_file_server_made_are_neither_classes_nor_series(tmp_path: Path, kind: str) -> None:
    for name in ("cell/a.png", "platelet/b.png", "@eaDir/cell/c.png", "cell/@eaDir/a.png/d.png"):
        picture(tmp_path / name)
    entry = FolderEntry(**{**DESCRIBED, "task": "multiclass", "kind": kind}, format="folder")
    assert [item.relative.as_posix() for item in list_items(entry, tmp_path)] == [
        "cell/a.png",
        "platelet/b.png",
    ]


@pytest.mark.parametrize("lost", ["lost.jpg", "extra/cell/lost.png", "train/lost.png"])
def test_an_image_outside_of_the_class_folders_is_not_left_out_in_silence(tmp_path: Path, lost: str) -> None:
    for name in ("train/cell/a.png", "train/platelet/b.png", lost):
        picture(tmp_path / name)
    (tmp_path / "readme.txt").write_text("read me")
    entry = FolderEntry(
        **{**DESCRIBED, "task": "multiclass"}, format="folder", split_folders={"train": "train"}
    )
    with pytest.raises(ValueError, match="1 images lie in no folder of a class that the entry names; move"):
        list_items(entry, tmp_path)
    orphans: list[Orphan] = []
    assert len(list_items(entry, tmp_path, orphans)) == 2
    assert [(one.rule, one.reason) for one in orphans] == [
        ("image_without_label", "it lies in no folder of a class")
    ]
    assert "lost" not in orphans[0].place


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"format": "folder", "task": "detection"}, "boxes come as table, voc or coco"),
        (
            {"format": "folder", "task": "multiclass", "kind": "features"},
            "kind features is what format bags holds",
        ),
        ({"format": "npz", "task": "multiclass", "kind": "slide"}, "slides come as folder, table or files"),
        ({"format": "npz", "task": "multiclass", "patient": "public"}, "arrays name no patients"),
        (
            {"format": "npz", "task": "multiclass", "kind": "volume", "orientation": "RAS"},
            "orientation is of NIfTI",
        ),
        ({"format": "folder", "task": "multiclass", "orientation": "RAS"}, "orientation is of NIfTI"),
        *(
            (
                {"format": "folder", "task": "multiclass", "kind": "volume", "orientation": axes},
                "three letters",
            )
            for axes in ("", "RA", "RLS", "ras", "RASI", "RA ")
        ),
    ],
)
def test_entries_that_no_step_could_read_do_not_validate(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ENTRY.validate_python(DESCRIBED | entry)
