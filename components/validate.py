"""Is the dataset fit for learning and for a claim? Great Expectations on the tables, and looks at the images.

Each rule is a set of expectations on the table of samples, to which our own checks of the images have added
columns, on the table of boxes, of features, or of the classes that are left. What a failed rule does is its
severity:

    stop        the step fails in one line and writes nothing
    quarantine  the samples are named in validation.json; `split` keeps them out of every split. Orphans, which
                no split could hold, are listed there as left out
    warn        it is said, and the samples are named in validation.json

Exact copies (equal pixels) are the fault that makes results too good. One image of each group of copies is
kept: the first in the most precious official split, where test comes before train, calibration and val.
So a copy of a training image leaves val, and a training image that is also in test leaves train: the
official test split stays as it was published, and its scores comparable with published ones. For the same
reason copies inside an official test split stay there by default. Copies with contradicting labels all go.

Near copies (the same image coded again, resized, brightened) have perceptual hashes that differ in few bits.
Images of one body part can have such hashes too: a pair counts only if its details correlate as well.

Volumes are looked at as their middle slice, slides as their thumbnail.

validation.json:

    schema              1
    dataset             digest of the dataset's dataset.json, which holds the digests of everything else
    rules               name, severity, passed, count (of what is judged: samples, boxes, features or classes),
                        message, sample_ids (every sample that failed it, in the table's order), of (rules on
                        copies: for each of them, the sample_id of what it is a copy of; empty for other rules)
    quarantined         sample_id, reason; one entry per sample
    left_out            place, reason; one entry per file of the source that `ingest` could not take and left out, and
                        per orphan, whose reason starts with its rule
    great_expectations  success, evaluated, successful, failed (expectation, column, rule)
    passed              true: no rule of severity stop failed (else there is no file)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder, DatasetInfo
from cadx.files import digest_path, write_json
from cadx.layouts import OrphanRule
from cadx.quality import PRECEDENCE, DuplicateKind, box_problems, checked_samples, feature_table
from cadx.reporting import PALETTE, Page, boxes_by_group, counted, draw_boxes, side_by_side
from cadx.sampling import analyze_class_imbalance
from cadx.types import Kind
from components.contract import In, Out, Params, step

Severity = Literal["stop", "quarantine", "warn"]
TableSeverity = Literal["stop", "warn"]
OrphanSeverity = Literal["stop", "quarantine"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Expectation = tuple[str, dict[str, Any]]  # class name in great_expectations.expectations, its arguments

OFFICIAL_SPLITS = ("train", "val", "calibration", "test")
NOUNS = {"image": "image", "volume": "volume", "slide": "slide", "features": "bag"}
NUM_BOXES_NAMED = 5
NUM_SHOWN = 9
NUM_ROWS_SHOWN = 500
INVALID_BOX = "invalid_box"
FAULTY_COLOUR = "#E3000F"


class _Form(NamedTuple):
    """The arrays that the readers of a kind give, and what another one is said to be."""

    channels: tuple[int, ...]
    dtypes: tuple[str, ...]
    fault: str


_PICTURE = _Form((1, 3), ("uint8", "uint16"), "without pixels, or neither gray nor colour of 8 or 16 bits")
FORMS: dict[Kind, _Form] = {
    "image": _PICTURE,
    "volume": _Form(
        (1,), ("uint8", "uint16", "int16", "float32"), "without voxels, or of a type that no reader gives"
    ),
    "slide": _PICTURE,
    "features": _Form(
        (1,), ("float32",), "without instances, or with another number of features than the others"
    ),
}


class ValidateParams(Params):
    """A severity for each rule, and the limits of some of them."""

    left_out: TableSeverity = "warn"  # a file that `ingest` could not take: its row is gone already
    # What has no partner stops `ingest` already, unless ingest.orphans is leave_out.
    image_without_label: OrphanSeverity = "quarantine"
    label_without_image: OrphanSeverity = "quarantine"
    label_values: Severity = "stop"  # a label is 0, 1 or missing
    one_hot: Severity = "stop"  # exactly one class per labelled sample, unless multilabel
    unlabelled: Severity = "warn"  # no label at all: takes no part in training or scoring
    given_split: Severity = "stop"  # an official split that no step knows
    patient_across_splits: Severity = "warn"  # harmless where `split` makes its own splits; else it refuses
    age_range: Severity = "warn"  # 0 to 120 years
    sex_values: Severity = "warn"
    image_size: Severity = "stop"
    tiny_image: Severity = "quarantine"
    min_side_px: Annotated[int, Field(ge=1)] = 16  # of an image, a slice, a thumbnail
    min_slices: Annotated[int, Field(ge=1)] = 4
    blank_image: Severity = "quarantine"
    blank_std: Annotated[float, Field(ge=0)] = 0.001  # of the full range: a quarter of one of 256 grays
    blurred_image: Severity = "warn"
    blurred_from: Fraction = 0.75  # `blur_effect`; radiographs stand at 0.45 to 0.74
    clipped_image: Severity = "warn"
    max_clipped_fraction: Fraction = 0.1
    narrow_range: Severity = "warn"
    min_range_fraction: Fraction = 0.1  # 12 bits stored as 16 use 0.06
    burned_in_text: Severity = "warn"  # not every letter names a patient: PORTABLE, SUPINE
    text_from: Fraction = 0.5
    invalid_box: Severity = "quarantine"  # no area, or not inside the image
    unknown_box: Severity = "stop"  # of a sample or a class that the dataset does not have
    missing_slices: Severity = "quarantine"
    duplicate_slices: Severity = "warn"
    uneven_spacing: Severity = "warn"
    gantry_tilt: Severity = "warn"
    oblique: Severity = "warn"
    spacing_outlier: Severity = "warn"
    mask_contradicts_label: Severity = "warn"
    without_tissue: Severity = "quarantine"
    min_tissue_fraction: Fraction = 0.001  # of the thumbnail
    missing_features: Severity = "warn"  # NaN or infinite
    constant_feature: TableSeverity = "warn"
    contradicting_labels: Severity = "quarantine"
    duplicate_across_splits: Severity = "quarantine"
    duplicate_across_patients: Severity = "quarantine"
    duplicate_within_test: Severity = "warn"  # dropping them changes the published test split
    duplicate_within_patient: Severity = "warn"
    near_duplicate_across_splits: Severity = "warn"
    near_duplicate_across_patients: Severity = "warn"
    near_distance_bits: Annotated[int, Field(ge=0, le=16)] = 4
    near_likeness: Fraction = 0.95  # copies stand above 0.99, other patients' images below 0.93
    class_without_images: TableSeverity = "stop"
    class_with_one_patient: TableSeverity = "warn"  # `split` needs one for each split
    class_of_one_site: TableSeverity = "warn"  # the site is then told apart instead of the class


@step
def validate(*, dataset: In, validation: Out, report: Out, params: ValidateParams) -> None:
    """Check a dataset's tables and images; write what was found, and which images to keep out.

    Raises:
        ValueError: if a rule of severity stop fails, or the dataset's files are not as they were written.
    """
    folder = DatasetFolder(dataset)
    folder.verify()
    limits = ("blank_std", "min_side_px", "min_slices", "near_distance_bits", "near_likeness")
    checked = checked_samples(folder, **{name: getattr(params, name) for name in limits})
    tables = [(_sample_rules(folder.info, checked, params), checked)]
    if folder.info.left_out:
        tables.append((_left_out_rules(folder.info), _left_out_table(folder)))
    if len(folder.boxes):
        boxes = box_problems(folder.boxes, folder.samples, folder.info.classes)
        tables.append((_box_rules(), boxes))
    if folder.info.kind == "features":
        tables.append((_feature_rules(), feature_table(folder)))
    outcomes: list[_Outcome] = []
    expectations: list[dict[str, Any]] = []
    for rules, table in tables:
        judged, evaluated = _judge(rules, table, params)
        outcomes, expectations = outcomes + judged, expectations + evaluated
    quarantined = _quarantined(checked, outcomes)
    kept = checked[~checked["sample_id"].isin(list(quarantined))]
    of_classes, more = _judge(_class_rules(kept), _class_table(folder, kept), params)
    outcomes, expectations = outcomes + of_classes, expectations + more

    stopped = [outcome for outcome in outcomes if not outcome.passed and outcome.severity == "stop"]
    if stopped:
        raise ValueError(_refusal(stopped, folder.info.name))
    failed = [item for item in expectations if not item["success"]]
    write_json(
        validation,
        {
            "schema": 1,
            "dataset": digest_path(dataset / "dataset.json"),
            "rules": [
                {
                    "name": outcome.rule.name,
                    "severity": outcome.severity,
                    "passed": outcome.passed,
                    "count": len(outcome.rows),
                    "message": outcome.message,
                    "sample_ids": outcome.sample_ids,
                    "of": outcome.originals,
                }
                for outcome in outcomes
            ],
            "quarantined": [
                {"sample_id": sample_id, "reason": reason} for sample_id, reason in quarantined.items()
            ],
            "left_out": [one.model_dump() for one in folder.info.left_out],
            "great_expectations": {
                "success": not failed,
                "evaluated": len(expectations),
                "successful": len(expectations) - len(failed),
                "failed": [{key: item[key] for key in ("expectation", "column", "rule")} for item in failed],
            },
            "passed": True,
        },
    )
    _page(folder, checked, kept, outcomes, quarantined, expectations).write(report)


@dataclass(frozen=True)
class _Rule:
    """One rule: the expectations that decide it, and the words for when it fails.

    Its severity is the field of its name in `ValidateParams`; without one it is "stop".

    Attributes:
        expectations: each of them holds for every row of the table.
        says: rows that failed -> what is wrong with them.
        fix: what the user can do.
        is_shown: whether a look at the samples helps: the report shows them.
        applies: whether the dataset can be asked.
        original_column: for copies, the column that names what each is a copy of.
    """

    name: str
    expectations: Sequence[Expectation]
    says: Callable[[pd.DataFrame], str]
    fix: str
    is_shown: bool = False
    original_column: str = ""
    applies: bool = True


@dataclass(frozen=True)
class _Outcome:
    rule: _Rule
    severity: Severity
    rows: list[int]  # of the judged table
    message: str
    sample_ids: list[str]  # none for a rule on features or classes
    originals: list[str]  # of which they are copies; none for a rule on anything else

    @property
    def passed(self) -> bool:
        return not self.rows


def _values(column: str, allowed: Sequence[Any]) -> Expectation:
    return "ExpectColumnValuesToBeInSet", {"column": column, "value_set": list(allowed)}


def _between(column: str, low: float | None, high: float | None = None) -> Expectation:
    return "ExpectColumnValuesToBeBetween", {"column": column, "min_value": low, "max_value": high}


def _none_of(column: str, unwanted: Sequence[Any]) -> Expectation:
    return "ExpectColumnValuesToNotBeInSet", {"column": column, "value_set": list(unwanted)}


def _count_of(one: str, words: str, many: str = "") -> Callable[[pd.DataFrame], str]:
    return lambda rows: f"{counted(len(rows), one, many)} {words}"


def _sample_rules(info: DatasetInfo, checked: pd.DataFrame, params: ValidateParams) -> list[_Rule]:
    """The rules on samples that apply to this dataset, in the order of the report.

    To add one: a `_Rule` in its group, and its severity in `ValidateParams`.
    """
    rules = [
        *_label_rules(info),
        *_patient_rules(info),
        *_form_rules(info, checked, params),
        *_quality_rules(info, checked, params),
        *_geometry_rules(info),
        *_content_rules(info, checked, params),
        *_copy_rules(info),
    ]
    return [rule for rule in rules if rule.applies]


def _label_rules(info: DatasetInfo) -> list[_Rule]:
    """Each sample can be found, and its labels are such as the task has."""
    noun = NOUNS[info.kind]
    return [
        _Rule(
            "identity",
            [
                ("ExpectColumnValuesToNotBeNull", {"column": "sample_id"}),
                ("ExpectColumnValuesToBeUnique", {"column": "sample_id"}),
                ("ExpectColumnValuesToNotBeNull", {"column": "patient"}),
                ("ExpectColumnValueLengthsToBeBetween", {"column": "patient", "min_value": 1}),
                _values("path", sorted(info.files)),
            ],
            _count_of(noun, "without a unique sample_id, a patient or a shard"),
            "make the dataset again with `cadx ingest`",
        ),
        _Rule(
            "label_values",
            [_values(column, (0, 1)) for column in info.label_columns],
            _count_of(noun, "with a label that is not 0, 1 or missing"),
            "correct the labels at their source",
        ),
        _Rule(
            "one_hot",
            [_values("is_one_hot", [True])],
            _count_of(noun, f"without exactly one class; the task is {info.task}"),
            "correct the labels, or make the task multilabel",
            applies=info.task in ("binary", "multiclass"),
        ),
        _Rule(
            "unlabelled",
            [_values("is_labelled", [True])],
            _count_of(noun, "without any label: no part of training or scoring"),
            "label them, or leave them out",
            applies=info.task != "detection",  # boxes are its labels
        ),
    ]


def _patient_rules(info: DatasetInfo) -> list[_Rule]:
    """Who stands in which official split, and what is known of them."""
    noun = NOUNS[info.kind]
    return [
        _Rule(
            "given_split",
            [_values("given_split", PRECEDENCE)],
            _count_of(noun, "with an unknown official split"),
            f"use {', '.join(PRECEDENCE[:-1])} or nothing",
        ),
        _Rule(
            "patient_across_splits",
            [_values("is_patient_elsewhere", [False])],
            lambda rows: (
                f"{counted(rows['patient'].nunique(), 'patient')} with {noun}s in several official splits"
                f" ({counted(len(rows), noun)} outside the patient's most precious one)"
            ),
            "use split.strategy = patient",
        ),
        _Rule(
            "age_range",
            [_between("age", 0, 120)],
            _count_of(noun, "with an age outside 0 to 120 years"),
            "correct the ages at their source",
        ),
        _Rule(
            "sex_values",
            [_values("sex", ("F", "M", "O", ""))],
            _count_of(noun, "with a sex other than F, M, O or unknown"),
            "correct them at their source",
        ),
    ]


def _form_rules(info: DatasetInfo, checked: pd.DataFrame, params: ValidateParams) -> list[_Rule]:
    """The arrays are such as a reader of this kind gives, and hold something."""
    noun, is_bag = NOUNS[info.kind], info.kind == "features"
    form = FORMS[info.kind]
    few = f" or fewer than {params.min_slices} slices" if info.kind == "volume" else ""
    return [
        _Rule(
            "image_size",
            [
                *(_between(column, 1) for column in ("depth_px", "height_px", "width_px")),
                _values("channels", form.channels),
                _values("dtype", form.dtypes),
                *([_values("width_px", [int(checked["width_px"].mode()[0])])] if is_bag else []),
            ],
            _count_of(noun, form.fault),
            "make the dataset again with `cadx ingest`",
        ),
        _Rule(
            "missing_features",
            [_values("is_finite", [True])],
            _count_of(noun, "with features that are missing or infinite"),
            "fill them in where they are made, or leave these bags out",
            applies=is_bag,
        ),
        _Rule(
            "tiny_image",
            [_values("is_tiny", [False])],
            _count_of(noun, f"with a side under {params.min_side_px} pixels{few}"),
            "lower validate.min_side_px if they are meant",
            is_shown=True,
            applies=not is_bag,
        ),
        _Rule(
            "blank_image",
            [_values("is_blank", [False])],
            _count_of(noun, "of one gray all over"),
            "look at the source: a failed exposure, or an export without pixels",
            is_shown=True,
            applies=not is_bag,
        ),
    ]


def _quality_rules(info: DatasetInfo, checked: pd.DataFrame, params: ValidateParams) -> list[_Rule]:
    """What `cadx.quality.image_checks` measured, where the dataset holds it, is within its limits."""
    clipped, used = f"{params.max_clipped_fraction:.0%}", f"{params.min_range_fraction:.0%}"
    # A volume is seen by a stretched slice, which says nothing of its range.
    seen, ranged = ("image", "volume"), ("image",)
    return [
        _Rule(
            name,
            [_between(f"check_{check}", low, high)],
            _count_of(NOUNS[info.kind], words),
            fix,
            is_shown=True,
            applies=info.kind in kinds and f"check_{check}" in checked,
        )
        for name, kinds, check, low, high, words, fix in (
            ("blurred_image", seen, "blur", None, params.blurred_from, "that look blurred",
             "look at them: motion, focus, or a reduced copy"),
            ("clipped_image", ranged, "clipped_fraction", None, params.max_clipped_fraction,
             f"with over {clipped} of their pixels cut off at black or white",
             "export them with a wider display window"),
            ("narrow_range", ranged, "range_fraction", params.min_range_fraction, None,
             f"that use under {used} of the range of their format",
             "export them over the full range: 12 bits in 16 look black"),
            ("burned_in_text", seen, "text_score", None, params.text_from, "in which letters seem to stand",
             "look whether they name a patient; mask them at the source, or leave these images out"),
        )
    ]  # fmt: skip


def _geometry_rules(info: DatasetInfo) -> list[_Rule]:
    """What readers doubted of volumes, and whether a spacing is like the others'."""
    noun = NOUNS[info.kind]
    doubts = (
        ("missing_slices", "missing slices", "export the whole series"),
        ("duplicate_slices", "slices that stand twice", "export each slice once"),
        ("uneven_spacing", "uneven spacing of slices", "use a series with even spacing, or resample it"),
        ("gantry_tilt", "a tilted gantry", "correct the tilt before the export"),
        ("oblique", "oblique axes", "the closest axes were taken: resample it where directions matter"),
    )
    return [
        *(
            _Rule(
                finding,
                [_values(f"has_{finding}", [False])],
                _count_of(noun, f"with {words}"),
                fix,
                is_shown=True,
                applies=info.kind == "volume",
            )
            for finding, words, fix in doubts
        ),
        _Rule(
            "spacing_outlier",
            [_values("is_spacing_outlier", [False])],
            _count_of(noun, "whose spacing stands apart from the others'"),
            "look whether its unit is meant; a resampling step makes them alike",
            is_shown=True,
        ),
    ]


def _content_rules(info: DatasetInfo, checked: pd.DataFrame, params: ValidateParams) -> list[_Rule]:
    """Masks agree with labels, and slides show tissue."""
    noun = NOUNS[info.kind]
    return [
        _Rule(
            "mask_contradicts_label",
            [_values("mask_agrees", [True])],
            _count_of(noun, "whose mask is empty though its label is positive, or the reverse"),
            "decide which is right, at the source",
            is_shown=True,
            applies="mask_agrees" in checked,
        ),
        _Rule(
            "without_tissue",
            [_between("tissue_fraction", params.min_tissue_fraction)],
            _count_of(noun, "without tissue"),
            "scan it again, or correct the thresholds of the tissue mask",
            is_shown=True,
            applies=info.kind == "slide",
        ),
    ]


def _copy_rules(info: DatasetInfo) -> list[_Rule]:
    """No image stands there twice."""
    noun = NOUNS[info.kind]
    another, whose = f"another {noun}", "remove the copies at the source"
    if info.clustered:
        another = f"a{'n' if noun == 'image' else ''} {noun} of another patient"
        whose = "find out whose image it is"
    further = partial(_count_of, "further copy", many="further copies")

    def rule(column: str, name: str, says: Callable[[pd.DataFrame], str], fix: str) -> _Rule:
        return _Rule(name, [_none_of(column, [name])], says, fix, original_column=f"{column}_of")

    equal, near = partial(rule, "duplicate"), partial(rule, "near_duplicate")
    return [
        equal(
            "contradicting_labels",
            _count_of(noun, "with equal pixels and contradicting labels"),
            "decide which label is right, at the source",
        ),
        equal(
            "duplicate_across_splits",
            lambda rows: _says_leaks(rows, noun, "kept_split"),
            "remove the copies at the source",
        ),
        equal("duplicate_across_patients", further(f"of {another}"), whose),
        equal(
            "duplicate_within_test",
            further("inside the official test split"),
            "remove them at the source, unless scores are to compare with published ones",
        ),
        equal("duplicate_within_patient", further("within a patient"), "export each image once"),
        near(
            "near_duplicate_across_splits",
            lambda rows: _says_leaks(rows, noun, "near_kept_split", "nearly equal"),
            "look at the pairs, and remove copies at the source",
        ),
        near("near_duplicate_across_patients", _count_of(noun, f"nearly equal to {another}"), whose),
    ]


def _box_rules() -> list[_Rule]:
    """The rules on boxes; a faulty one is named by its sample, its class and its corners."""

    def says(text: str) -> Callable[[pd.DataFrame], str]:
        return lambda rows: f"{counted(len(rows), 'box', 'boxes')} {text}: {_named_boxes(rows)}"

    return [
        _Rule(
            "unknown_box",
            [_values("is_of_a_sample", [True]), _values("is_of_a_class", [True])],
            says("of a sample or a class that the dataset does not have"),
            "correct the boxes at their source",
        ),
        _Rule(
            INVALID_BOX,
            [_values("has_area", [True]), _values("is_inside", [True])],
            says("without area, or outside the image"),
            "correct the boxes at their source",
            is_shown=True,
        ),
    ]


def _named_boxes(rows: pd.DataFrame) -> str:
    shown = rows.head(NUM_BOXES_NAMED)
    named = ", ".join(
        f"{sample_id} {name} ({x0:g}, {y0:g}, {x1:g}, {y1:g})"
        for sample_id, name, x0, y0, x1, y1 in shown[
            ["sample_id", "class", "x0", "y0", "x1", "y1"]
        ].itertuples(index=False, name=None)
    )
    return named + (", ..." if len(rows) > len(shown) else "")


def _feature_rules() -> list[_Rule]:
    return [
        _Rule(
            "constant_feature",
            [_none_of("range", [0.0])],
            lambda rows: (
                f"{counted(len(rows), 'feature')} with one value in all bags, first column {rows['feature'].iloc[0]}"
            ),
            "leave them out: nothing can be learned from them",
        )
    ]


def _class_rules(kept: pd.DataFrame) -> list[_Rule]:
    """The rules on what is left of each class."""

    def rule(name: str, column: str, least: int, words: str, fix: str) -> _Rule:
        return _Rule(
            name,
            [_between(column, least)],
            lambda rows: f"{counted(len(rows), 'class', 'classes')} {words}: {', '.join(rows['class'])}",
            fix,
        )

    without = "take the class out of the catalogue entry"
    rules = [
        rule("class_without_images", "num_images", 1, "without any image", f"add images, or {without}"),
        rule(
            "class_with_one_patient",
            "num_patients",
            2,
            "with fewer than two patients",
            f"add patients, or {without}",
        ),
    ]
    if len(set(kept["site"]) - {""}) > 1:
        fix = "add images of it from another site; until then its scores say nothing of other sites"
        rules.append(rule("class_of_one_site", "num_sites", 2, "from one site only", fix))
    return rules


def _says_leaks(rows: pd.DataFrame, noun: str, kept_column: str, like: str = "") -> str:
    pairs = rows.groupby(["given_split", kept_column], sort=False).size().reset_index()
    one, many = (f"is {like} to", f"are {like} to") if like else ("is a copy of", "are copies of")
    return "; ".join(
        f"{count:,} {split or 'unassigned'} {noun + ' ' + one if count == 1 else noun + 's ' + many}"
        f" {kept or 'unassigned'} {noun}s: a leak"
        for split, kept, count in pairs.itertuples(index=False)
    )


def _left_out_rules(info: DatasetInfo) -> list[_Rule]:
    """The source gave a sample for each of its files, and none without its partner."""
    noun = NOUNS[info.kind]

    def rule(name: str, one: str, words: str, fix: str) -> _Rule:
        return _Rule(
            name,
            [_values(f"is_free_of_{name}", [True])],
            lambda rows: f"{counted(len(rows), one)} of the source {words} and stayed out",
            f"{fix}; dataset.json lists where each is",
        )

    return [
        rule("left_out", noun, "could not be taken", "repair them at their source"),
        rule("image_without_label", noun, "had no label", "give each its mask, row or annotation"),
        rule("label_without_image", "label", f"had no {noun}", f"add the {noun}s, or take the labels out"),
    ]


def _left_out_table(folder: DatasetFolder) -> pd.DataFrame:
    """A row per file of the source, and whether it is free of each reason for not becoming a sample."""
    reasons = [one.reason.partition(":")[0] for one in folder.info.left_out]
    orphans = get_args(OrphanRule)
    causes = [""] * len(folder.samples) + [reason if reason in orphans else "left_out" for reason in reasons]
    return pd.DataFrame(
        {f"is_free_of_{name}": [cause != name for cause in causes] for name in ("left_out", *orphans)}
    )


def _class_labels(folder: DatasetFolder, kept: pd.DataFrame) -> pd.DataFrame:
    """A column per class: 1 in the samples that have it; in a detection task, those that hold a box of it."""
    classes = list(folder.info.classes)
    if folder.info.task != "detection":
        return kept[list(folder.info.label_columns)].set_axis(classes, axis=1)
    holders = folder.boxes.groupby("class")["sample_id"].agg(set).to_dict()
    return pd.DataFrame({name: kept["sample_id"].isin(holders.get(name, ())) * 1.0 for name in classes})


def _class_table(folder: DatasetFolder, kept: pd.DataFrame) -> pd.DataFrame:
    """A row per class: its samples, patients and sites among those that are not quarantined."""
    labels = _class_labels(folder, kept)
    images = analyze_class_imbalance(labels)
    patients = analyze_class_imbalance(labels, patients=kept["patient"])
    sites = {name: kept.loc[labels[name] == 1, "site"].nunique() for name in labels}
    return pd.DataFrame(
        {
            "class": list(labels),
            "num_images": [images[name]["count"] for name in labels],
            "num_patients": [patients[name]["count"] for name in labels],
            # 2 where there is no sample: another rule says so.
            "num_sites": [sites[name] if images[name]["count"] else 2 for name in labels],
        }
    )


def _judge(
    rules: Sequence[_Rule], table: pd.DataFrame, params: ValidateParams
) -> tuple[list[_Outcome], list[dict[str, Any]]]:
    """What Great Expectations says of `table`: an outcome per rule, and a record per expectation."""
    # Read on import: without it every validation is reported to the vendor.
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    from great_expectations import expectations as gxe
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    definition = (
        context.data_sources.add_pandas("dataset")
        .add_dataframe_asset("table")
        .add_batch_definition_whole_dataframe("whole")
    )
    suite = gx.ExpectationSuite(name="rules")
    for rule in rules:
        for kind, arguments in rule.expectations:
            suite.add_expectation(getattr(gxe, kind)(**arguments, meta={"rule": rule.name}))
    judged = {arguments["column"]: None for rule in rules for _, arguments in rule.expectations}
    result = definition.get_batch({"dataframe": table[list(judged)]}).validate(
        suite, result_format={"result_format": "COMPLETE"}
    )

    failed_rows: dict[str, set[int]] = {rule.name: set() for rule in rules}
    records = []
    for item in result.results:
        config: Any = item.expectation_config
        assert "unexpected_index_list" in item.result or item.success, f"{config.type} could not be evaluated"
        rows = {int(row) for row in item.result.get("unexpected_index_list") or ()}
        failed_rows[config.meta["rule"]] |= rows
        records.append(
            {
                "rule": config.meta["rule"],
                "expectation": config.type,
                "column": config.kwargs["column"],
                "success": bool(item.success),
                "failed": len(rows),
            }
        )
    place = {rule.name: number for number, rule in enumerate(rules)}
    records.sort(key=lambda record: (place[record["rule"]], record["column"], record["expectation"]))
    outcomes = []
    for rule in rules:
        rows_in_order = sorted(failed_rows[rule.name])
        failing = table.loc[rows_in_order]
        sample_ids = list(dict.fromkeys(map(str, failing.get("sample_id", ()))))
        originals = failing[rule.original_column].tolist() if rule.original_column else []
        message = rule.says(failing) if rows_in_order else ""
        severity: Severity = getattr(params, rule.name, "stop")
        outcomes.append(_Outcome(rule, severity, rows_in_order, message, sample_ids, originals))
    return outcomes, records


def _quarantined(checked: pd.DataFrame, outcomes: Sequence[_Outcome]) -> dict[str, str]:
    """sample_id -> reason, of every sample that a failed rule keeps out, in the order of the table."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.severity == "quarantine":
            for sample_id in outcome.sample_ids:
                reasons.setdefault(sample_id, []).append(outcome.rule.name)
    columns = ["sample_id", "duplicate", "duplicate_of", "near_duplicate", "near_duplicate_of"]
    rows = checked.loc[checked["sample_id"].isin(list(reasons)), columns].itertuples(index=False, name=None)
    quarantined = {}
    for sample_id, kind, original, near_kind, near_original in rows:
        of = {kind: f" (of {original})"} | {near_kind: f" (of {near_original})"} if kind or near_kind else {}
        quarantined[sample_id] = "; ".join(name + of.get(name, "") for name in reasons[sample_id])
    return quarantined


def _refusal(stopped: Sequence[_Outcome], name: str) -> str:
    """One line for the first rule that stops, and the names of the others."""
    first = stopped[0]
    examples = ", ".join(first.sample_ids[:5])
    line = f"dataset {name}: rule {first.rule.name}: {first.message}"
    if examples:
        line += f" (sample_id {examples}{', ...' if len(first.rows) > 5 else ''})"
    line += f"; {first.rule.fix}"
    if first.rule.name in ValidateParams.model_fields:
        line += f", or set validate.{first.rule.name} to another severity"
    if len(stopped) > 1:
        line += f"; also failed: {', '.join(outcome.rule.name for outcome in stopped[1:])}"
    return line


def _page(
    folder: DatasetFolder,
    checked: pd.DataFrame,
    kept: pd.DataFrame,
    outcomes: Sequence[_Outcome],
    quarantined: dict[str, str],
    expectations: Sequence[dict[str, Any]],
) -> Page:
    info, noun, labels = folder.info, NOUNS[folder.info.kind], _class_labels(folder, kept)
    failed = [outcome for outcome in outcomes if not outcome.passed]
    page = Page("Validation", f"{info.name} · {info.modality} · {info.task}")
    page.facts(
        [
            (f"{noun}s", len(checked)),
            ("patients", checked["patient"].nunique() if info.clustered else "not known"),
            ("sites", (checked["site"] != "").groupby(checked["site"]).any().sum() or "not known"),
            ("rules passed", f"{len(outcomes) - len(failed)} of {len(outcomes)}"),
            (f"{noun}s kept out", len(quarantined)),
        ]
    )
    for outcome in failed:
        kept_out = outcome.severity == "quarantine" or outcome.rule.name == "left_out"
        consequence = "Kept out of every split." if kept_out else "Kept."
        page.callout("warn", f"{outcome.message}. {consequence} To remedy: {outcome.rule.fix}.")
    if not failed:
        page.callout("ok", "Every rule passed: nothing is kept out.")

    page.section("Dataset")
    page.text(f"{info.source.title}\n\n{info.source.citation}\n\nLicence: {info.source.licence}")
    for note in (info.source.note, *info.assumptions):
        if note:
            page.callout("warn", note)
    page.table(
        _split_table(kept, labels),
        f"{noun.capitalize()}s of each class, without what is kept out.",
    )

    page.section("Rules")
    page.table(
        [
            {
                "rule": outcome.rule.name.replace("_", " "),
                "found": len(outcome.rows),
                "if it fails": outcome.severity,
                "result": "passed" if outcome.passed else outcome.message,
            }
            for outcome in outcomes
        ],
        f"What was demanded of the tables and the {noun}s.",
    )
    with page.details(
        f"The {len(expectations)} expectations behind them, as evaluated by Great Expectations"
    ):
        page.table(
            [
                {
                    "expectation": record["expectation"].removeprefix("expect_").replace("_", " "),
                    "column": record["column"],
                    "rule": record["rule"].replace("_", " "),
                    "failed rows": record["failed"],
                }
                for record in expectations
            ]
        )

    _show_copies(page, folder, checked)
    shown = [outcome for outcome in failed if outcome.rule.is_shown and outcome.sample_ids]
    if shown:
        page.section("What was found")
    known = set(checked["sample_id"])
    for outcome in shown:
        of_boxes = outcome.rule.name == INVALID_BOX
        picture = partial(_with_faulty_boxes, folder, outcome.rows) if of_boxes else folder.preview
        page.images(
            [
                (picture(sample_id), sample_id)
                for sample_id in outcome.sample_ids[:NUM_SHOWN]
                if sample_id in known
            ],
            f"{outcome.rule.name.replace('_', ' ').capitalize()}: {_shown(len(outcome.sample_ids), noun)}"
            + (" The faulty boxes are red, cut at the image's edge." if of_boxes else ""),
            max_px=256 if of_boxes else 128,
        )

    page.section(f"What the {noun}s look like")
    for name in info.classes[:8]:
        members = kept.loc[labels[name] == 1, "sample_id"]
        if len(members):
            chosen = members.iloc[np.unique(np.linspace(0, len(members) - 1, 6).astype(int))]
            page.images(
                [(folder.preview(sample_id), sample_id) for sample_id in chosen],
                f"{name}: {len(chosen)} of {counted(len(members), noun)}, spread evenly over the table.",
                max_px=112,
            )
    _show_intensities(page, kept)

    if quarantined:
        page.section(f"{noun.capitalize()}s kept out")
        split_of = checked.set_index("sample_id")["given_split"]
        rows = [
            {noun: sample_id, "official split": split_of[sample_id] or "none", "reason": reason}
            for sample_id, reason in quarantined.items()
        ]
        with page.details(_shown(len(rows), noun, NUM_ROWS_SHOWN)):
            page.table(rows[:NUM_ROWS_SHOWN])
    if info.left_out:
        page.section(f"{noun.capitalize()}s that could not be taken")
        page.table(
            [
                {"place in the source": one.place, "reason": one.reason}
                for one in info.left_out[:NUM_ROWS_SHOWN]
            ],
            _shown(len(info.left_out), noun, NUM_ROWS_SHOWN),
        )
    return page


def _split_table(kept: pd.DataFrame, labels: pd.DataFrame) -> list[dict[str, Any]]:
    splits = [split for split in (*OFFICIAL_SPLITS, "") if (kept["given_split"] == split).any()]
    rows = []
    for name in labels:
        members = kept.loc[labels[name] == 1, "given_split"]
        counts = {
            f"official {split}" if split else "no split": int((members == split).sum()) for split in splits
        }
        rows.append({"class": name, **(counts if splits != [""] else {}), "all": len(members)})
    return rows


def _show_copies(page: Page, folder: DatasetFolder, checked: pd.DataFrame) -> None:
    """Each copy beside the image that is kept for it, leaks first."""
    page.section("Copies")
    page.text(
        "Images with exactly equal pixels, and images that are nearly equal: coded again, resized, brightened."
        " Of each group one is kept: the first in the most precious official split, in the order test, train,"
        " calibration, val."
    )
    kinds = (*get_args(DuplicateKind), "near_duplicate_across_splits", "near_duplicate_across_patients")
    place = {kind: number for number, kind in enumerate(kinds)}
    num_kinds = 0
    for column, kept_column in (("duplicate", "kept_split"), ("near_duplicate", "near_kept_split")):
        copies = checked[checked[column] != ""]
        copies = copies.iloc[copies[column].map(place).argsort(kind="stable")]
        for kind, group in copies.groupby(column, sort=False):
            num_kinds += 1
            # Two images that contradict each other name each other: one picture shows both.
            names = group[["sample_id", f"{column}_of"]].to_numpy()
            group = group[~pd.Series(map(frozenset, names), index=group.index).duplicated()]
            pairs = []
            for copy in group.head(NUM_SHOWN).to_dict("records"):
                other = copy[f"{column}_of"]
                here, there = copy["given_split"] or "no split", copy[kept_column] or "no split"
                picture = side_by_side(folder.preview(copy["sample_id"]), folder.preview(other))
                pairs.append((picture, f"{copy['sample_id']} ({here}), {other} ({there})"))
            heading = str(kind).replace("_", " ").capitalize()
            page.images(pairs, f"{heading}: {_shown(len(group), 'pair')}", max_px=256)
    if not num_kinds:
        page.text("No image occurs twice.")


def _show_intensities(page: Page, kept: pd.DataFrame) -> None:
    groups = [
        (str(site) or "unknown", rows["stat_mean"].to_numpy())
        for site, rows in kept.groupby("site", sort=True)
    ]
    if 1 < len(groups) <= 20:
        page.figure(
            boxes_by_group(groups, value="mean intensity, 0 to 1 of the format's range", group="site"),
            "Mean intensity of the images by site: box = middle half, line = median, whiskers = middle 95 %."
            " Sites that stand apart are told apart by a network too.",
            alt="Box plots of mean image intensity, one per site.",
        )


def _with_faulty_boxes(folder: DatasetFolder, faulty: list[int], sample_id: str) -> np.ndarray:
    """The image with its boxes, over them in red those at the rows `faulty` of the table of boxes."""
    pixels = folder.pixels(sample_id)
    size_px = np.array(pixels.shape[1::-1])
    line_px = max(3, size_px.max() // 60)  # a box without area is as large as its lines
    boxes = folder.boxes.reset_index(drop=True)
    of_image = boxes[boxes["sample_id"] == sample_id]
    corners = of_image[["x0", "y0", "x1", "y1"]].to_numpy(np.float64).reshape(-1, 2, 2)
    # What lies outside shows as a line along the edge, and corners in the wrong order as the box they span.
    shown = np.clip(np.nan_to_num(np.sort(corners, axis=1)), line_px, size_px - line_px).reshape(-1, 4)
    is_faulty = of_image.index.isin(faulty)
    sound = draw_boxes(pixels, [(shown[~is_faulty], PALETTE[0])])
    return draw_boxes(sound, [(shown[is_faulty], FAULTY_COLOUR)], line_px)


def _shown(number: int, noun: str, limit: int = NUM_SHOWN) -> str:
    return counted(number, noun) + (f", the first {limit} shown." if number > limit else ".")
