"""How unequal the classes are, where, and what `train` should do about it.

The figures are those of `analyze_class_imbalance`: count, percentage of what is labelled, and imbalance
factor (largest count / count), for images, for patients and for boxes; "images" are the dataset's samples,
be they images, volumes, slides or bags.

imbalance.json (null = undefined: the factor of a class without images, the percentage without labels):

    schema              2
    dataset, splits     digests of the dataset's dataset.json and of the splits file
    task, kind, classes as in the dataset
    overall             class -> {count, percentage, imbalance_factor}, without excluded images
    by_split            split -> class -> the same; excluded images stand under "excluded"
    by_site, by_scanner name ("" = unknown) -> class -> the same, without excluded images
    patients            class -> the same, counting patients, who have a class if any of their images has it
    patients_by_split   split -> class -> the same
    patients_by_site    site -> class -> the same
    boxes               class -> the same, counting boxes; {} in a set without boxes
    boxes_by_split      split -> class -> the same, without excluded images; likewise boxes_by_site
    box_sizes           class -> small, medium, large -> number of boxes (`sampling.BOX_SIZES_PX`)
    boxes_per_image     number of boxes -> number of images, which says how many have none; {} likewise
    bags                of a set of features, null elsewhere: instances = distribution of their number in a
                        bag; by_class = class -> the same of the bags that are positive for it
    masks               of a set with masks, null elsewhere:
        num_masks, num_empty        samples with a mask, and those of them without a positive pixel
        positive_percentage         share of positive pixels or voxels of all that the masks judge
        unit                        of `burden`: ml (volumes) or mm2
        by_value                    mask value -> {num_masks, positive_percentage, burden = distribution over
                                    the masks that have it}
        by_class                    class -> the same, over the masks of the images of that class
    recommendation      for `train`, from the train split alone:
        factor          how unequal it is: largest count / smallest count; multilabel: the largest ratio
                        between the images with and without a class; detection: the largest count of boxes
                        / the smallest. Classes that no image shows, or in multilabel every image, are left out
        decided_by      the class that the factor belongs to
        loss            a LossConfig; for detection the default, which no detector takes: its losses are its own
        sampler         "natural" or "balanced"
        reason          one sentence
        notes           what deserves care, in sentences

A distribution is {minimum, q25, median, q75, maximum}.

Rules of the recommendation, by the factor:

    < 1.5       natural sampling, cross-entropy: nothing to correct
    1.5 to 20   balanced sampling, cross-entropy. Buda et al. 2018 ("A systematic study of the class
                imbalance problem in convolutional neural networks", Neural Networks 106, section 4)
                found oversampling the best remedy throughout, without overfitting
    >= 20       balanced sampling, focal loss. Among very many easy negatives the mean loss hides the few
                hard ones: Lin et al. 2017 ("Focal Loss for Dense Object Detection", section 3)

Volumes, slides and bags are weighed by the label of the whole: it is what is drawn, and what the loss judges.

For detection, the sampler alone is recommended, since a detector's losses are its model's own:

    balanced    where images without boxes are 1.5 times as many as those with, or boxes are unequal by 1.5
                times or more and drawing the images of each class equally often would make them at least
                twice as equal (repeat-factor sampling has the same aim: Gupta et al. 2019, "LVIS", app. B.2)
    natural     elsewhere. Classes that stand in the same images stay unequal however these are drawn

Never a balanced sampler with class weights: each makes the classes count equally, and both together
correct twice. Balanced training shifts the probabilities towards the rare classes; `calibrate` moves them
back on images at their natural frequency.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder, read_splits
from cadx.files import digest_path, write_json
from cadx.reporting import INK, MUTED, PALETTE, Page, figure, panels
from cadx.sampling import BOX_SIZES_PX, ClassBalance, analyze_class_imbalance, count_box_sizes
from cadx.types import Config, Kind, Task
from cadx.weighting import LossConfig
from components.contract import In, Out, Params, step

SPLITS = ("train", "val", "calibration", "test", "excluded")
NOUNS: dict[Kind, str] = {"image": "images", "volume": "volumes", "slide": "slides", "features": "bags"}
ARTICLES: dict[Kind, str] = {
    "image": "an image",
    "volume": "a volume",
    "slide": "a slide",
    "features": "a bag",
}
SPREAD = ("minimum", "q25", "median", "q75", "maximum")
HATCHES = ("", "//", "..")  # with the colours: sizes stay apart in gray print too
HELPFUL = 2.0
RARE_PIXELS_PERCENT = 5.0
UNEQUAL_BAGS = 10
MASK_CHUNK_BYTES = 1 << 20  # np.bincount makes eight bytes of each
MOST_BARS = 12
NUM_GROUPS_DRAWN = len(PALETTE)
MARKERS = "osD^vPX"  # with the colours: groups stay apart in gray print too
NUM_ROWS_OPEN = 24  # a longer table is folded
FEW_PATIENTS = 20
MANY_REPEATS = 20

Balance = dict[str, ClassBalance]


class ImbalanceParams(Params):
    """Where the recommendation changes; `focal_from` and `focal_gamma` are for classification."""

    balanced_from: Annotated[float, Field(ge=1)] = 1.5
    focal_from: Annotated[float, Field(ge=1)] = 20.0
    focal_gamma: Annotated[float, Field(gt=0)] = 2.0


class Recommendation(Config):
    """What `train` should do, and why."""

    factor: float
    decided_by: str
    loss: LossConfig
    sampler: Literal["natural", "balanced"]
    reason: str
    notes: tuple[str, ...] = ()


@step
def imbalance(*, dataset: In, splits: In, imbalance: Out, report: Out, params: ImbalanceParams) -> None:
    """Count the classes by split, site, scanner and patient; recommend a sampler and, but for boxes, a loss.

    Raises:
        ValueError: if the splits belong to another dataset, or train has no labelled image.
    """
    folder = DatasetFolder(dataset)
    info = folder.info
    placed = read_splits(splits).set_index("sample_id")["split"]
    folder.rows(list(placed.index))
    samples = folder.samples.assign(split=folder.samples["sample_id"].map(placed))
    if samples["split"].isna().any():
        raise ValueError(
            f"{splits}: {samples['split'].isna().sum()} of {len(samples)} images have no split;"
            " run `cadx split` again"
        )
    used = samples[samples["split"] != "excluded"]
    labels, used_labels = (
        frame[list(info.label_columns)].set_axis(list(info.classes), axis=1) for frame in (samples, used)
    )
    train = used["split"] == "train"
    boxes = folder.boxes.merge(used[["sample_id", "split", "site"]], on="sample_id")
    masks = _measure_masks(folder, used)
    found: dict[str, Any] = {
        "schema": 2,
        "dataset": digest_path(dataset / "dataset.json"),
        "splits": digest_path(splits),
        "task": info.task,
        "kind": info.kind,
        "classes": list(info.classes),
        "overall": analyze_class_imbalance(used_labels),
        "by_split": _in_order(analyze_class_imbalance(labels, groups=samples["split"])),
        "by_site": analyze_class_imbalance(used_labels, groups=used["site"]),
        "by_scanner": analyze_class_imbalance(used_labels, groups=used["scanner"]),
        "patients": analyze_class_imbalance(used_labels, patients=used["patient"]),
        "patients_by_split": _in_order(
            analyze_class_imbalance(labels, patients=samples["patient"], groups=samples["split"])
        ),
        "patients_by_site": analyze_class_imbalance(
            used_labels, patients=used["patient"], groups=used["site"]
        ),
        **_box_figures(used, boxes),
        "bags": _bag_figures(used, used_labels) if info.kind == "features" else None,
        "masks": _mask_figures(masks, used, used_labels, info.kind) if len(masks) else None,
    }
    teaching = Teaching(
        labels=used_labels[train], patients=used.loc[train, "patient"], sites=used.loc[train, "site"]
    )
    try:
        if info.task == "detection":
            in_train = used[train]
            num_boxes = pd.crosstab(boxes["sample_id"], boxes["class"]).reindex(
                index=in_train["sample_id"], columns=list(info.classes), fill_value=0
            )
            recommendation = recommend_detection(
                teaching, num_boxes=num_boxes.set_axis(in_train.index), params=params
            )
        else:
            recommendation = recommend(teaching, task=info.task, params=params)
    except ValueError as error:
        raise ValueError(f"dataset {info.name}: {error}") from None
    notes = _notes_on_content(used[train], masks, info.kind)
    recommendation = recommendation.model_copy(update={"notes": (*recommendation.notes, *notes)})
    write_json(imbalance, {**found, "recommendation": recommendation.model_dump()})
    _page(folder, found, recommendation).write(report)


class Teaching(NamedTuple):
    """What is known of N training images.

    Attributes:
        labels: N K, one column per class, NaN = unlabelled.
        patients: N patients.
        sites: N sites; "" = unknown.
    """

    labels: pd.DataFrame
    patients: pd.Series
    sites: pd.Series


def recommend(teaching: Teaching, *, task: Task, params: ImbalanceParams) -> Recommendation:
    """A loss and a sampler for these training images, by the rules at the top of this module.

    Args:
        teaching: the training images.
        task: of the dataset; for detection see `recommend_detection`.
        params: where the recommendation changes.

    Raises:
        ValueError: if no label is positive.

    >>> labels = pd.DataFrame({"normal": [1.0] * 30 + [0.0], "cancer": [0.0] * 30 + [1.0]})
    >>> teaching = Teaching(labels, patients=pd.Series(range(31)), sites=pd.Series([""] * 31))
    >>> advice = recommend(teaching, task="binary", params=ImbalanceParams())
    >>> advice.factor, advice.decided_by, advice.sampler, advice.loss.kind, advice.loss.weights
    (30.0, 'cancer', 'balanced', 'focal', 'none')
    """
    labels = teaching.labels
    counts, always = _positives(labels), []
    if task == "multilabel":
        without = (labels == 0).sum()[counts.index]
        always = list(map(str, counts.index[without == 0]))
        counts, without = counts.drop(always), without.drop(always)
        ratios = (without / counts).combine(counts / without, max)
    else:
        ratios = counts.max() / counts
    factor, name = (float(ratios.max()), str(ratios.idxmax())) if len(ratios) else (1.0, always[0])

    sampler: Literal["natural", "balanced"] = "natural" if factor < params.balanced_from else "balanced"
    loss = LossConfig()
    if sampler == "natural":
        reason = f"The classes are nearly equal (factor {factor:.1f}): there is nothing to correct."
    elif factor < params.focal_from:
        reason = (
            f"A moderate imbalance (factor {factor:.1f}, {name}): draw the classes equally often, and do not"
            " weigh them as well, which would correct twice."
        )
    else:
        loss = LossConfig(kind="focal", gamma=params.focal_gamma)
        reason = (
            f"A strong imbalance (factor {factor:,.1f}, {name}): draw the classes equally often, and let the"
            " loss turn down the many that are easy; no class weights, which would correct twice."
        )
    notes = _notes_on_classes(teaching, balanced=sampler == "balanced")
    if always:
        notes += (f"Every training image shows a class, which cannot be learned: {', '.join(always)}.",)
    return Recommendation(
        factor=factor, decided_by=name, loss=loss, sampler=sampler, reason=reason, notes=notes
    )


def recommend_detection(
    teaching: Teaching, *, num_boxes: pd.DataFrame, params: ImbalanceParams
) -> Recommendation:
    """A sampler for these training images with boxes, by the rules at the top of this module.

    Args:
        teaching: the training images; a class's label is 1 where the image has a box of it.
        num_boxes: N K, how many boxes of each class they have.
        params: where the recommendation changes.

    Raises:
        ValueError: if there is no box.

    >>> cells = pd.DataFrame({"red": [1.0, 1.0], "white": [1.0, 1.0]})
    >>> teaching = Teaching(cells, patients=pd.Series(["p", "q"]), sites=pd.Series(["", ""]))
    >>> number = pd.DataFrame({"red": [12, 9], "white": [1, 1]})
    >>> advice = recommend_detection(teaching, num_boxes=number, params=ImbalanceParams())
    >>> advice.factor, advice.decided_by, advice.sampler
    (10.5, 'white', 'natural')
    """
    labels = teaching.labels
    images = _positives(labels)
    counts = num_boxes[images.index].sum()
    factor, name = float(counts.max() / counts.min()), str(counts.idxmin())
    pools = [num_boxes.loc[labels[kind] == 1, images.index].mean() for kind in images.index]
    drawn = sum(pools[1:], start=pools[0])
    helped = factor / float(drawn.max() / drawn.min())
    num_empty = int((labels == 0).all(axis=1).sum())
    emptiness = num_empty / (len(labels) - num_empty)

    sampler: Literal["natural", "balanced"] = "natural"
    if emptiness >= params.balanced_from:
        sampler = "balanced"
        reason = (
            f"Images without boxes are {emptiness:.1f} times as many as those with: draw them as often as images"
            " of each class."
        )
    elif factor < params.balanced_from:
        reason = f"The classes' boxes are nearly equal (factor {factor:.1f}): draw images as they come."
    elif helped >= HELPFUL:
        sampler = "balanced"
        reason = f"Boxes are unequal (factor {factor:.1f}, {name}): draw images of each class equally often."
    else:
        reason = (
            f"Boxes are unequal (factor {factor:.1f}, {name}), but in the same images, where drawing some more often"
            " helps little: draw images as they come."
        )
    return Recommendation(
        factor=factor,
        decided_by=name,
        loss=LossConfig(),
        sampler=sampler,
        reason=reason,
        notes=_notes_on_classes(teaching, balanced=sampler == "balanced"),
    )


def _positives(labels: pd.DataFrame) -> pd.Series:
    """The number of images of each class that has any."""
    present = (labels == 1).sum()
    if not present.any():
        raise ValueError("no image of the train split is labelled; label some, or split again")
    return present[present > 0]


def _notes_on_classes(teaching: Teaching, *, balanced: bool) -> tuple[str, ...]:
    """What deserves care about the classes, in sentences."""
    labels, patients, sites = teaching
    counts = _positives(labels)
    num_pools = len(counts) + int(not (labels == 1).any(axis=1)[labels.notna().any(axis=1)].all())
    repeats = {kind: len(labels) / num_pools / count for kind, count in counts.items()}
    people = {kind: patients[labels[kind] == 1].nunique() for kind in counts.index}
    places = {kind: set(sites[labels[kind] == 1]) for kind in counts.index}
    empty = [str(kind) for kind in labels.columns if kind not in counts.index]
    repeated = [
        f"{kind} ({count:,} of them, {repeats[kind]:,.0f} times)"
        for kind, count in counts.items()
        if balanced and repeats[kind] >= MANY_REPEATS
    ]
    few = [f"{kind} ({number})" for kind, number in people.items() if number < FEW_PATIENTS]
    local = [str(kind) for kind, found in places.items() if len(found) == 1 and len(set(sites)) > 1]
    return tuple(
        f"{warning}: {', '.join(kinds)}."
        for warning, kinds in (
            ("No training image shows a class, which can be neither learned nor drawn", empty),
            ("Few images are drawn again and again in an epoch and need strong augmentation", repeated),
            (f"Classes of fewer than {FEW_PATIENTS} training patients may be learned by heart", few),
            ("Classes from a single site: a network may learn the site instead", local),
        )
        if kinds
    )


def _notes_on_content(train: pd.DataFrame, masks: pd.DataFrame, kind: Kind) -> tuple[str, ...]:
    """What deserves care about masks and bags of the training images, in sentences."""
    notes = []
    inside = masks[masks["sample_id"].isin(train["sample_id"])]
    positive = inside.loc[inside["value"] > 0, "pixels"].sum()
    if (
        kind == "volume"
        and positive
        and (share := 100 * positive / inside["pixels"].sum()) < RARE_PIXELS_PERCENT
    ):
        notes.append(
            f"Only {share:.2g} % of the voxels are positive: patches drawn anywhere would mostly show none;"
            " draw a share of them around positive voxels."
        )
    instances = train["height_px"]
    if kind == "features" and instances.max() >= UNEQUAL_BAGS * instances.min():
        notes.append(
            f"Bags hold {instances.min():,} to {instances.max():,} instances: batches need masks, and mean"
            " pooling dilutes the few that matter in the largest."
        )
    return tuple(notes)


def _distribution(values: pd.Series) -> dict[str, float]:
    """Minimum, quartiles and maximum; NaN where nothing is known."""
    return dict(zip(SPREAD, values.quantile([0, 0.25, 0.5, 0.75, 1]), strict=True))


def _box_figures(used: pd.DataFrame, boxes: pd.DataFrame) -> dict[str, Any]:
    classes = list(dict.fromkeys(boxes["class"]))
    per_image = boxes["sample_id"].value_counts().reindex(used["sample_id"], fill_value=0)
    return {
        "boxes": analyze_class_imbalance(boxes["class"]),
        "boxes_by_split": _in_order(
            analyze_class_imbalance(boxes["class"], classes=classes, groups=boxes["split"])
        ),
        "boxes_by_site": analyze_class_imbalance(boxes["class"], classes=classes, groups=boxes["site"]),
        "box_sizes": count_box_sizes(boxes),
        "boxes_per_image": per_image.value_counts().sort_index().to_dict() if len(boxes) else {},
    }


def _bag_figures(used: pd.DataFrame, labels: pd.DataFrame) -> dict[str, Any]:
    instances = used["height_px"]
    by_class = {str(name): _distribution(instances[labels[name] == 1]) for name in labels}
    return {"instances": _distribution(instances), "by_class": by_class}


def _measure_masks(folder: DatasetFolder, used: pd.DataFrame) -> pd.DataFrame:
    """How much of each mask has which value: columns sample_id, value, pixels, burden (see the top)."""
    rows = []
    for sample in used[used["mask_path"] != ""].to_dict("records"):
        mask = folder.mask(sample["sample_id"])
        assert mask is not None, "samples.parquet names its shard"
        flat, counts = mask.reshape(-1), np.zeros(256, int)
        for start in range(0, flat.size, MASK_CHUNK_BYTES):
            counts += np.bincount(flat[start : start + MASK_CHUNK_BYTES], minlength=256)
        pixel = sample["spacing_row_mm"] * sample["spacing_column_mm"]  # mm2
        if folder.info.kind == "volume":
            pixel *= sample["spacing_slice_mm"] / 1000  # ml
        for value in sorted({0, *map(int, np.flatnonzero(counts))}):
            pixels = int(counts[value])
            rows.append((sample["sample_id"], value, pixels, pixels * pixel * (value > 0)))
    return pd.DataFrame(rows, columns=["sample_id", "value", "pixels", "burden"])


def _mask_figures(
    masks: pd.DataFrame, used: pd.DataFrame, labels: pd.DataFrame, kind: Kind
) -> dict[str, Any]:
    whole = masks.groupby("sample_id")["pixels"].sum()

    def figures(rows: pd.DataFrame) -> dict[str, Any]:
        lesions = rows[rows["value"] > 0]
        judged = whole[rows["sample_id"].unique()].sum()
        burden = rows.groupby("sample_id")["burden"].sum(min_count=1)
        return {
            "num_masks": len(burden),
            "positive_percentage": 100 * float(lesions["pixels"].sum() / judged) if judged else math.nan,
            "burden": _distribution(burden),
        }

    positive = masks[masks["value"] > 0]
    overall = figures(masks)
    return {
        "num_masks": overall["num_masks"],
        "num_empty": overall["num_masks"] - positive["sample_id"].nunique(),
        "positive_percentage": overall["positive_percentage"],
        "unit": "ml" if kind == "volume" else "mm2",
        "by_value": {str(value): figures(rows) for value, rows in positive.groupby("value")},
        "by_class": {
            str(name): figures(masks[masks["sample_id"].isin(used.loc[labels[name] == 1, "sample_id"])])
            for name in labels
        },
    }


def _in_order(by_split: Mapping[str, Balance]) -> dict[str, Balance]:
    return {split: by_split[split] for split in SPLITS if split in by_split}


def _page(folder: DatasetFolder, found: Mapping[str, Any], advice: Recommendation) -> Page:
    info = folder.info
    noun = NOUNS[info.kind]
    page = Page("Class imbalance", f"{info.name} · {info.modality} · {info.task}")
    facts: list[tuple[str, Any]] = [
        ("classes", len(info.classes)),
        ("imbalance factor in train", f"{advice.factor:,.1f}"),
        ("sampler", advice.sampler),
    ]
    if info.task != "detection":  # a detector's losses are its own
        facts += [
            ("loss", advice.loss.kind.replace("_", " ")),
            ("class weights", advice.loss.weights.replace("_", " ")),
        ]
    page.facts(facts)
    page.text(f"For training: {advice.reason[:1].lower()}{advice.reason[1:]}")
    for note in advice.notes:
        page.callout("warn", note)

    page.section("Overall")
    patients = found["patients"]
    page.table(
        [
            {
                "class": name,
                noun: figures["count"],
                f"% of {noun}": figures["percentage"],
                "imbalance factor": figures["imbalance_factor"],
                **(
                    {"patients": patients[name]["count"], "% of patients": patients[name]["percentage"]}
                    if info.clustered
                    else {}
                ),
            }
            for name, figures in found["overall"].items()
        ],
        f"{noun.capitalize()} that are in use. The imbalance factor is the largest count divided by the class's own;"
        " percentages are of what is labelled.",
        formats={f"% of {noun}": ".2f", "imbalance factor": ",.1f", "% of patients": ".2f"},
    )
    if not info.clustered:
        page.text(f"The set names no patients: each of its {noun} stands for one.")
    _draw_counts(page, found["overall"], noun)
    if found["boxes"]:
        _show_boxes(page, found)
    if found["bags"]:
        _show_bags(page, found["bags"])
    if found["masks"]:
        _show_masks(page, found["masks"])

    page.section("By split")
    _show_groups(page, found["by_split"], "split", noun, drop=("excluded",))
    if info.clustered:
        with page.details("Patients by split"):
            _group_table(page, found["patients_by_split"], "split", "patients")

    for key, place in (("by_site", "site"), ("by_scanner", "scanner")):
        page.section(f"By {place}")
        if set(found[key]) == {""}:
            page.text(f"The dataset does not say from which {place} {ARTICLES[info.kind]} comes.")
            continue
        _show_groups(page, _named(found[key]), place, noun)
        if place == "site" and info.clustered:
            with page.details("Patients by site"):
                _group_table(page, _named(found["patients_by_site"]), "site", "patients")
        if place == "site" and found["boxes"]:
            with page.details("Boxes by site"):
                _group_table(page, _named(found["boxes_by_site"]), "site", "boxes")
    return page


def _named(groups: Mapping[str, Balance]) -> dict[str, Balance]:
    return {name or "unknown": balance for name, balance in groups.items()}


def _show_boxes(page: Page, found: Mapping[str, Any]) -> None:
    sizes, per_image = {name: found["box_sizes"][name] for name in found["boxes"]}, found["boxes_per_image"]
    num_images, without = sum(per_image.values()), per_image.get(0, 0)
    page.section("Boxes")
    page.table(
        [
            {
                "class": name,
                "boxes": figures["count"],
                "% of boxes": figures["percentage"],
                "imbalance factor": figures["imbalance_factor"],
                **sizes[name],
            }
            for name, figures in found["boxes"].items()
        ],
        "Boxes of the images in use. Small is an area below 32 x 32 stored pixels, medium one below 96 x 96, as"
        " in COCO's metrics.",
        formats={"% of boxes": ".2f", "imbalance factor": ",.1f"},
    )
    page.text(
        f"{without:,} of {num_images:,} images ({100 * without / num_images:.1f} %) have no box; the fullest has"
        f" {max(per_image)}."
    )
    drawing, (by_size, by_number) = panels(8.4, max(2.6, 1.2 + 0.36 * len(sizes)), columns=2)
    left = np.zeros(len(sizes))
    for size, colour, hatch in zip(BOX_SIZES_PX, PALETTE, HATCHES, strict=False):
        shares = np.array([100 * counts[size] / sum(counts.values()) for counts in sizes.values()])
        by_size.barh(
            range(len(sizes)),
            shares,
            left=left,
            height=0.62,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=size,
        )
        left += shares
    by_size.set_yticks(range(len(sizes)), list(sizes))
    by_size.invert_yaxis()
    by_size.grid(visible=False)
    by_size.set_xlabel("% of the class's boxes")
    by_size.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    bars = _bars(per_image)
    by_number.bar(range(len(bars)), list(bars.values()), width=0.8, color=PALETTE[0])
    by_number.set_xticks(range(len(bars)), list(bars), rotation=45 if len(bars) > MOST_BARS // 2 else 0)
    by_number.grid(visible=False, axis="x")
    by_number.set_xlabel("boxes in an image")
    by_number.set_ylabel("images")
    page.figure(
        drawing,
        "Left: sizes of the boxes of each class. Right: how many boxes the images have.",
        alt="Bars: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{n} {size}" for size, n in of.items()) for name, of in sizes.items()
        ),
    )
    with page.details("Boxes by split"):
        _group_table(page, found["boxes_by_split"], "split", "boxes")


def _bars(counts: Mapping[int, int]) -> dict[str, int]:
    """Counts by number as at most `MOST_BARS` bars of equal width; images without a box keep their own.

    >>> _bars({0: 3, 1: 4, 2: 1})
    {'0': 3, '1': 4, '2': 1}
    """
    width = max(1, math.ceil(max(counts) / (MOST_BARS - 1)))
    bars = {"0": counts.get(0, 0)}
    for first in range(1, max(counts) + 1, width):
        last = first + width - 1
        text = str(first) if width == 1 else f"{first}-{last}"
        bars[text] = sum(images for number, images in counts.items() if first <= number <= last)
    return bars


def _show_bags(page: Page, bags: Mapping[str, Any]) -> None:
    spreads = {"all bags": bags["instances"], **bags["by_class"]}
    page.section("Bags")
    page.table(
        [{"class": name, **spread} for name, spread in spreads.items()],
        "Instances in a bag, over all bags and over those that are positive for a class.",
        formats=dict.fromkeys(SPREAD, ",.0f"),
    )
    _draw_spreads(page, spreads, "instances in a bag", "Instances in a bag, by the bag's class.")


def _show_masks(page: Page, masks: Mapping[str, Any]) -> None:
    unit = masks["unit"].replace("mm2", "mm²")
    rows = {
        **{f"mask value {value}": figures for value, figures in masks["by_value"].items()},
        **{f"class {name}": figures for name, figures in masks["by_class"].items()},
    }
    page.section("Masks")
    page.text(
        f"{masks['num_masks']:,} samples have a mask; {masks['num_empty']:,} of these masks are empty."
        f" {masks['positive_percentage']:.3g} % of what the masks judge is positive."
    )
    page.table(
        [
            {
                "masks with": name,
                "number": figures["num_masks"],
                "% positive": figures["positive_percentage"],
                **figures["burden"],
            }
            for name, figures in rows.items()
        ],
        f"How much of the masks is positive, and how much in one sample ({unit}), by mask value and by class.",
        formats={"% positive": ".3g", **dict.fromkeys(SPREAD, ",.3g")},
    )
    burdens = {name: figures["burden"] for name, figures in rows.items()}
    _draw_spreads(
        page,
        burdens,
        f"positive {unit} in a sample",
        f"Positive {unit} in a sample, by mask value and by class.",
    )


def _draw_spreads(page: Page, spreads: Mapping[str, Mapping[str, float]], what: str, caption: str) -> None:
    """Distributions as lines: thin from minimum to maximum, thick between the quartiles, a dot at the median."""
    known = {name: spread for name, spread in spreads.items() if math.isfinite(spread["median"])}
    if not known:
        return
    drawing, axes = figure(7.2, 1.0 + 0.36 * len(known))
    for place, spread in enumerate(known.values()):
        axes.plot([spread["minimum"], spread["maximum"]], [place, place], color=MUTED, linewidth=1)
        axes.plot(
            [spread["q25"], spread["q75"]],
            [place, place],
            color=PALETTE[0],
            linewidth=7,
            solid_capstyle="butt",
        )
        axes.plot(spread["median"], place, "o", color="white", markeredgecolor=INK, markersize=6)
    smallest = min(spread["minimum"] for spread in known.values())
    if 0 < 20 * smallest < max(spread["maximum"] for spread in known.values()):
        axes.set_xscale("log")
    axes.set_yticks(range(len(known)), list(known))
    axes.set_ylim(len(known) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(what + (" (logarithmic)" if axes.get_xscale() == "log" else ""))
    page.figure(
        drawing,
        f"{caption} Thin: smallest to largest; thick: the middle half; dot: median.",
        alt="Medians: " + ", ".join(f"{name} {spread['median']:,.4g}" for name, spread in known.items()),
    )


def _show_groups(
    page: Page, groups: Mapping[str, Balance], place: str, noun: str, drop: tuple[str, ...] = ()
) -> None:
    drawn = {name: balance for name, balance in groups.items() if name not in drop}
    if len(drawn) > 1:
        _draw_shares(page, drawn, place, noun)
    if sum(map(len, groups.values())) <= NUM_ROWS_OPEN:
        _group_table(page, groups, place, noun)
    else:
        with page.details(f"{noun.capitalize()} of each class by {place}"):
            _group_table(page, groups, place, noun)


def _group_table(page: Page, groups: Mapping[str, Balance], place: str, what: str) -> None:
    page.table(
        [
            {
                place: group,
                "class": name,
                what: figures["count"],
                f"% of {what}": figures["percentage"],
                "imbalance factor": figures["imbalance_factor"],
            }
            for group, balance in groups.items()
            for name, figures in balance.items()
        ],
        f"{what.capitalize()} of each class by {place}.",
        formats={f"% of {what}": ".2f", "imbalance factor": ",.1f"},
    )


def _draw_counts(page: Page, overall: Balance, noun: str) -> None:
    counts = [figures["count"] for figures in overall.values()]
    logarithmic = max(counts) > 20 * max(1, min(counts))
    drawing, axes = figure(7.2, 0.9 + 0.36 * len(counts))
    places = range(len(counts))
    axes.barh(places, counts, height=0.62, color=PALETTE[0])
    axes.set_yticks(places, list(overall))
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0)
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(left=0.8)
    for place, figures in zip(places, overall.values(), strict=True):
        text = f"{figures['count']:,}  ({figures['percentage']:.1f} %)" if figures["count"] else "none"
        axes.annotate(
            text,
            (max(figures["count"], axes.get_xlim()[0]), place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    axes.margins(x=0.22)
    axes.set_xlabel(noun + (" (logarithmic)" if logarithmic else ""))
    page.figure(
        drawing,
        f"{noun.capitalize()} of each class in use.",
        alt="Bars: " + ", ".join(f"{name} {figures['count']}" for name, figures in overall.items()),
    )


def _draw_shares(page: Page, groups: Mapping[str, Balance], place: str, noun: str) -> None:
    """The percentage of each class in each group, as dots: how far the groups disagree."""
    largest = sorted(groups, key=lambda group: -sum(item["count"] for item in groups[group].values()))
    chosen = [group for group in groups if group in largest[:NUM_GROUPS_DRAWN]]
    classes = list(groups[chosen[0]])
    drawing, axes = figure(7.2, 1.0 + len(classes) * (0.24 + 0.13 * len(chosen)))
    for number, group in enumerate(chosen):
        offset = (number - (len(chosen) - 1) / 2) * 0.66 / len(chosen)
        axes.plot(
            [groups[group][name]["percentage"] for name in classes],
            [row + offset for row in range(len(classes))],
            linestyle="none",
            marker=MARKERS[number],
            markersize=6.5,
            color=PALETTE[number],
            label=group,
        )
    for row in range(1, len(classes)):
        axes.axhline(row - 0.5, color=MUTED, linewidth=0.5, alpha=0.5)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(f"% of the labelled {noun}")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=place, alignment="left")
    more = f" The {len(chosen)} largest of {len(groups)} are drawn." if len(chosen) < len(groups) else ""
    page.figure(
        drawing,
        f"Share of each class by {place}.{more}",
        alt=f"Dots: the percentage of each class, by {place}; the table below has the numbers.",
    )
