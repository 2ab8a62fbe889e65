"""How unequal the classes are, where, and what `train` should do about it.

The figures are those of `analyze_class_imbalance`: count, percentage of what is labelled, and imbalance
factor (largest count / count), for images, for patients and for boxes.

imbalance.json (null = undefined: the factor of a class without images, the percentage without labels):

    schema              1
    dataset, splits     digests of the dataset's dataset.json and of the splits file
    task, classes       as in the dataset
    overall             class -> {count, percentage, imbalance_factor}, without excluded images
    by_split            split -> class -> the same; excluded images stand under "excluded"
    by_site, by_scanner name ("" = unknown) -> class -> the same, without excluded images
    patients            class -> the same, counting patients, who have a class if any of their images has it
    patients_by_split   split -> class -> the same
    boxes               class -> the same, counting boxes; {} in a set without boxes
    recommendation      for `train`, from the train split alone:
        factor          how unequal it is: largest count / smallest count; multilabel: the largest ratio
                        between the images with and without a class. Empty classes are left out
        decided_by      the class that the factor belongs to
        loss            a LossConfig
        sampler         "natural" or "balanced"
        reason          one sentence
        notes           what deserves care, in sentences

Rules of the recommendation, by the factor:

    < 1.5       natural sampling, cross-entropy: nothing to correct
    1.5 to 20   balanced sampling, cross-entropy. Buda et al. 2018 ("A systematic study of the class
                imbalance problem in convolutional neural networks", Neural Networks 106, section 4)
                found oversampling the best remedy throughout, without overfitting
    >= 20       balanced sampling, focal loss. Among very many easy negatives the mean loss hides the few
                hard ones: Lin et al. 2017 ("Focal Loss for Dense Object Detection", section 3)

Never a balanced sampler with class weights: each makes the classes count equally, and both together
correct twice. Balanced training shifts the probabilities towards the rare classes; `calibrate` moves them
back on images at their natural frequency.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder, read_splits
from cadx.files import digest_path, write_json
from cadx.losses import LossConfig
from cadx.reporting import INK, MUTED, PALETTE, Page, figure
from cadx.sampling import ClassBalance, analyze_class_imbalance
from cadx.types import Config, Task
from components.contract import In, Out, Params, step

SPLITS = ("train", "val", "calibration", "test", "excluded")
NUM_GROUPS_DRAWN = len(PALETTE)
MARKERS = "osD^vPX"  # with the colours: groups stay apart in gray print too
NUM_ROWS_OPEN = 24  # a longer table is folded
FEW_PATIENTS = 20
MANY_REPEATS = 20

Balance = dict[str, ClassBalance]


class ImbalanceParams(Params):
    """Where the recommendation changes."""

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
    """Count the classes by split, site, scanner and patient; recommend a loss and a sampler.

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
    boxes = folder.boxes[folder.boxes["sample_id"].isin(used["sample_id"])]
    found: dict[str, Any] = {
        "schema": 1,
        "dataset": digest_path(dataset / "dataset.json"),
        "splits": digest_path(splits),
        "task": info.task,
        "classes": list(info.classes),
        "overall": analyze_class_imbalance(used_labels),
        "by_split": _in_order(analyze_class_imbalance(labels, groups=samples["split"])),
        "by_site": analyze_class_imbalance(used_labels, groups=used["site"]),
        "by_scanner": analyze_class_imbalance(used_labels, groups=used["scanner"]),
        "patients": analyze_class_imbalance(used_labels, patients=used["patient"]),
        "patients_by_split": _in_order(
            analyze_class_imbalance(labels, patients=samples["patient"], groups=samples["split"])
        ),
        "boxes": analyze_class_imbalance(boxes["class"]) if len(boxes) else {},
    }
    try:
        recommendation = recommend(
            used_labels[train],
            patients=used.loc[train, "patient"],
            sites=used.loc[train, "site"],
            task=info.task,
            params=params,
        )
    except ValueError as error:
        raise ValueError(f"dataset {info.name}: {error}") from None
    write_json(imbalance, {**found, "recommendation": recommendation.model_dump()})
    _page(folder, found, recommendation).write(report)


def recommend(
    labels: pd.DataFrame, *, patients: pd.Series, sites: pd.Series, task: Task, params: ImbalanceParams
) -> Recommendation:
    """A loss and a sampler for these training labels, by the rules at the top of this module.

    Args:
        labels: N K, one column per class, NaN = unlabelled.
        patients: N patients.
        sites: N sites; "" = unknown.
        task: of the dataset.
        params: where the recommendation changes.

    Raises:
        ValueError: if no label is positive.

    >>> labels = pd.DataFrame({"normal": [1.0] * 30 + [0.0], "cancer": [0.0] * 30 + [1.0]})
    >>> people, sites = pd.Series(range(31)), pd.Series([""] * 31)
    >>> advice = recommend(labels, patients=people, sites=sites, task="binary", params=ImbalanceParams())
    >>> advice.factor, advice.decided_by, advice.sampler, advice.loss.kind, advice.loss.weights
    (30.0, 'cancer', 'balanced', 'focal', 'none')
    """
    present, absent = (labels == 1).sum(), (labels == 0).sum()
    counts = present[present > 0]
    if counts.empty:
        raise ValueError("no image of the train split is labelled; label some, or split again")
    if task == "multilabel":
        without = absent[counts.index]
        ratios = (without / counts).combine(counts / without.clip(lower=1), max)
    else:
        ratios = counts.max() / counts
    factor, name = float(ratios.max()), str(ratios.idxmax())

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

    num_pools = len(counts) + int(not (labels == 1).any(axis=1)[labels.notna().any(axis=1)].all())
    repeats = {kind: len(labels) / num_pools / count for kind, count in counts.items()}
    people = {kind: patients[labels[kind] == 1].nunique() for kind in counts.index}
    places = {kind: set(sites[labels[kind] == 1]) for kind in counts.index}
    empty = [str(kind) for kind in labels.columns[present == 0]]
    repeated = [
        f"{kind} ({count:,} of them, {repeats[kind]:,.0f} times)"
        for kind, count in counts.items()
        if sampler == "balanced" and repeats[kind] >= MANY_REPEATS
    ]
    few = [f"{kind} ({number})" for kind, number in people.items() if number < FEW_PATIENTS]
    local = [str(kind) for kind, found in places.items() if len(found) == 1 and len(set(sites)) > 1]
    notes = [
        f"{warning}: {', '.join(kinds)}."
        for warning, kinds in (
            ("No training image shows a class, which can be neither learned nor drawn", empty),
            ("Few images are drawn again and again in an epoch and need strong augmentation", repeated),
            (f"Classes of fewer than {FEW_PATIENTS} training patients may be learned by heart", few),
            ("Classes from a single site: a network may learn the site instead", local),
        )
        if kinds
    ]
    return Recommendation(
        factor=factor, decided_by=name, loss=loss, sampler=sampler, reason=reason, notes=tuple(notes)
    )


def _in_order(by_split: Mapping[str, Balance]) -> dict[str, Balance]:
    return {split: by_split[split] for split in SPLITS if split in by_split}


def _page(folder: DatasetFolder, found: Mapping[str, Any], advice: Recommendation) -> Page:
    info = folder.info
    page = Page("Class imbalance", f"{info.name} · {info.modality} · {info.task}")
    page.facts(
        [
            ("classes", len(info.classes)),
            ("imbalance factor in train", f"{advice.factor:,.1f}"),
            ("sampler", advice.sampler),
            ("loss", advice.loss.kind.replace("_", " ")),
        ]
    )
    page.text(f"For training: {advice.reason[:1].lower()}{advice.reason[1:]}")
    for note in advice.notes:
        page.callout("warn", note)

    page.section("Overall")
    patients = found["patients"]
    page.table(
        [
            {
                "class": name,
                "images": figures["count"],
                "% of images": figures["percentage"],
                "imbalance factor": figures["imbalance_factor"],
                **(
                    {"patients": patients[name]["count"], "% of patients": patients[name]["percentage"]}
                    if info.clustered
                    else {}
                ),
            }
            for name, figures in found["overall"].items()
        ],
        "Images that are in use. The imbalance factor is the largest count divided by the class's own;"
        " percentages are of what is labelled.",
        formats={"% of images": ".2f", "imbalance factor": ",.1f", "% of patients": ".2f"},
    )
    if not info.clustered:
        page.text("The set names no patients: each image stands for one.")
    _draw_counts(page, found["overall"])

    page.section("By split")
    _show_groups(page, found["by_split"], "split", drop=("excluded",))
    if info.clustered:
        with page.details("Patients by split"):
            _group_table(page, found["patients_by_split"], "split", "patients")

    for key, noun in (("by_site", "site"), ("by_scanner", "scanner")):
        page.section(f"By {noun}")
        if set(found[key]) == {""}:
            page.text(f"The dataset does not say from which {noun} an image comes.")
        else:
            _show_groups(page, {group or "unknown": balance for group, balance in found[key].items()}, noun)
    if found["boxes"]:
        page.section("Boxes")
        page.table(
            [
                {
                    "class": name,
                    "boxes": figures["count"],
                    "%": figures["percentage"],
                    "imbalance factor": factor,
                }
                for name, figures in found["boxes"].items()
                for factor in (figures["imbalance_factor"],)
            ],
            "Marked boxes of the images in use.",
            formats={"%": ".2f", "imbalance factor": ",.1f"},
        )
    return page


def _show_groups(page: Page, groups: Mapping[str, Balance], noun: str, drop: tuple[str, ...] = ()) -> None:
    drawn = {name: balance for name, balance in groups.items() if name not in drop}
    if len(drawn) > 1:
        _draw_shares(page, drawn, noun)
    if sum(map(len, groups.values())) <= NUM_ROWS_OPEN:
        _group_table(page, groups, noun, "images")
    else:
        with page.details(f"Images of each class by {noun}"):
            _group_table(page, groups, noun, "images")


def _group_table(page: Page, groups: Mapping[str, Balance], noun: str, what: str) -> None:
    page.table(
        [
            {
                noun: group,
                "class": name,
                what: figures["count"],
                f"% of {what}": figures["percentage"],
                "imbalance factor": figures["imbalance_factor"],
            }
            for group, balance in groups.items()
            for name, figures in balance.items()
        ],
        f"{what.capitalize()} of each class by {noun}.",
        formats={f"% of {what}": ".2f", "imbalance factor": ",.1f"},
    )


def _draw_counts(page: Page, overall: Balance) -> None:
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
    axes.set_xlabel("images" + (" (logarithmic)" if logarithmic else ""))
    page.figure(
        drawing,
        "Images of each class in use.",
        alt="Bars: " + ", ".join(f"{name} {figures['count']}" for name, figures in overall.items()),
    )


def _draw_shares(page: Page, groups: Mapping[str, Balance], noun: str) -> None:
    """The percentage of each class in each group, as dots: how far the groups disagree."""
    largest = sorted(groups, key=lambda group: -sum(item["count"] for item in groups[group].values()))
    chosen = [group for group in groups if group in largest[:NUM_GROUPS_DRAWN]]
    classes = list(groups[chosen[0]])
    drawing, axes = figure(7.2, 1.0 + len(classes) * (0.24 + 0.13 * len(chosen)))
    for number, group in enumerate(chosen):
        offset = (number - (len(chosen) - 1) / 2) * 0.66 / len(chosen)
        axes.plot(
            [groups[group][name]["percentage"] for name in classes],
            [place + offset for place in range(len(classes))],
            linestyle="none",
            marker=MARKERS[number],
            markersize=6.5,
            color=PALETTE[number],
            label=group,
        )
    for place in range(1, len(classes)):
        axes.axhline(place - 0.5, color=MUTED, linewidth=0.5, alpha=0.5)
    axes.set_yticks(range(len(classes)), classes)
    axes.set_ylim(len(classes) - 0.5, -0.5)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("% of the labelled images")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), title=noun, alignment="left")
    more = f" The {len(chosen)} largest of {len(groups)} are drawn." if len(chosen) < len(groups) else ""
    page.figure(
        drawing,
        f"Share of each class by {noun}.{more}",
        alt=f"Dots: the percentage of each class, by {noun}; the table below has the numbers.",
    )
