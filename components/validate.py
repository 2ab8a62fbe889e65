"""Is the dataset fit for learning and for a claim? Great Expectations on the tables, and looks at the images.

Each rule is a set of expectations on the sample table, to which our own checks of the images have added
columns, or on the table of classes that is left. What a failed rule does is its severity:

    stop        the step fails in one line and writes nothing
    quarantine  the images are named in validation.json; `split` keeps them out of every split
    warn        it is said, and nothing else

Exact copies (equal pixels) are the fault that makes results too good. One image of each group of copies is
kept: the first in the most precious official split, where test comes before train, calibration and val.
So a copy of a training image leaves val, and a training image that is also in test leaves train: the
official test split stays as it was published, and its scores comparable with published ones. For the same
reason copies inside an official test split stay there by default. Copies with contradicting labels all go.

validation.json:

    schema              1
    dataset             digest of the dataset's dataset.json, which holds the digests of everything else
    rules               name, severity, passed, count (of images or classes), message, sample_ids (20 at most)
    quarantined         sample_id, reason; one entry per image
    great_expectations  success, evaluated, successful, failed (expectation, column, rule)
    passed              true: no rule of severity stop failed (else there is no file)
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.files import digest_path, write_json
from cadx.reporting import MUTED, PALETTE, Page, figure
from cadx.sampling import analyze_class_imbalance
from components.contract import In, Out, Params, step

Severity = Literal["stop", "quarantine", "warn"]
TableSeverity = Literal["stop", "warn"]

OFFICIAL_SPLITS = ("train", "val", "calibration", "test")
PRECEDENCE = ("test", "train", "calibration", "val", "")
NUM_SAMPLE_IDS = 20
NUM_SHOWN = 9
NUM_ROWS_SHOWN = 500

DuplicateKind = Literal[
    "contradicting_labels",
    "duplicate_across_splits",
    "duplicate_across_patients",
    "duplicate_within_test",
    "duplicate_within_patient",
]


class ValidateParams(Params):
    """A severity for each rule, and the limits of two of them."""

    label_values: Severity = "stop"  # a label is 0, 1 or missing
    one_hot: Severity = "stop"  # exactly one class per labelled image, unless multilabel
    unlabelled: Severity = "warn"  # no label at all: takes no part in training or scoring
    given_split: Severity = "stop"  # an official split that no step knows
    patient_across_splits: Severity = "warn"  # harmless where `split` makes its own splits; else it refuses
    age_range: Severity = "warn"  # 0 to 120 years
    sex_values: Severity = "warn"
    image_size: Severity = "stop"
    tiny_image: Severity = "quarantine"
    min_side_px: Annotated[int, Field(ge=1)] = 16
    blank_image: Severity = "quarantine"
    blank_std: Annotated[float, Field(ge=0)] = 0.001  # of the full range: a quarter of one of 256 grays
    invalid_box: Severity = "quarantine"  # no area, or not inside the image
    contradicting_labels: Severity = "quarantine"
    duplicate_across_splits: Severity = "quarantine"
    duplicate_across_patients: Severity = "quarantine"
    duplicate_within_test: Severity = "warn"  # dropping them changes the published test split
    duplicate_within_patient: Severity = "warn"
    class_without_images: TableSeverity = "stop"
    class_with_one_patient: TableSeverity = "warn"  # `split` needs one for each split


@step
def validate(*, dataset: In, validation: Out, report: Out, params: ValidateParams) -> None:
    """Check a dataset's tables and images; write what was found, and which images to keep out.

    Raises:
        ValueError: if a rule of severity stop fails, or the dataset's files are not as they were written.
    """
    folder = DatasetFolder(dataset)
    folder.verify()
    checked = _with_checks(folder, params)
    outcomes, expectations = _judge(_sample_rules(folder, params), checked)
    quarantined = _quarantined(checked, outcomes)
    kept = checked[~checked["sample_id"].isin(list(quarantined))]
    of_classes, more = _judge(_class_rules(params), _class_table(kept, folder.info.classes))
    outcomes, expectations = outcomes + of_classes, expectations + more

    stopped = [outcome for outcome in outcomes if not outcome.passed and outcome.rule.severity == "stop"]
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
                    "severity": outcome.rule.severity,
                    "passed": outcome.passed,
                    "count": len(outcome.rows),
                    "message": outcome.message,
                    "sample_ids": outcome.sample_ids[:NUM_SAMPLE_IDS],
                }
                for outcome in outcomes
            ],
            "quarantined": [
                {"sample_id": sample_id, "reason": reason} for sample_id, reason in quarantined.items()
            ],
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


def find_duplicates(samples: pd.DataFrame, label_columns: Sequence[str]) -> pd.DataFrame:
    """For every row the kind of copy that it is, and the sample_id of the image that is kept for it.

    Args:
        samples: columns sample_id, pixels_sha256, patient, given_split and the label columns.
        label_columns: which they are; NaN = unlabelled, and agrees with every label.

    Returns:
        Columns `duplicate` (a `DuplicateKind`, or "" for an image without copies and for the one that is
        kept) and `duplicate_of`, indexed like `samples`. With contradicting labels none is kept, and each
        names another of its group.

    >>> samples = pd.DataFrame({"sample_id": ["a", "b"], "pixels_sha256": ["x", "x"], "patient": ["p", "q"],
    ...                         "given_split": ["val", "train"], "label_sick": [1.0, 1.0]})
    >>> find_duplicates(samples, ["label_sick"]).values.tolist()
    [['duplicate_across_splits', 'b'], ['', '']]
    """
    kinds: dict[Any, DuplicateKind] = {}
    originals: dict[Any, str] = {}
    copies = samples[samples["pixels_sha256"].duplicated(keep=False)]
    for _, group in copies.groupby("pixels_sha256", sort=False):
        labels = group[list(label_columns)]
        order = pd.DataFrame(
            {"split": group["given_split"].map(PRECEDENCE.index), "unlabelled": labels.isna().any(axis=1)}
        ).sort_values(["split", "unlabelled"], kind="stable")
        (first, kept), *others = group.loc[order.index].to_dict("index").items()
        originals |= {row: kept["sample_id"] for row, _ in others}
        if (labels.max() > labels.min()).any():  # never true of NaN, which contradicts nothing
            kinds |= dict.fromkeys(group.index, "contradicting_labels")
            originals[first] = others[0][1]["sample_id"]
            continue
        for row, copy in others:
            if copy["given_split"] != kept["given_split"]:
                kinds[row] = "duplicate_across_splits"
            elif copy["patient"] == kept["patient"]:
                kinds[row] = "duplicate_within_patient"
            elif copy["given_split"] == "test":
                kinds[row] = "duplicate_within_test"
            else:
                kinds[row] = "duplicate_across_patients"
    return pd.DataFrame(
        {
            "duplicate": pd.Series(kinds, dtype=object).reindex(samples.index, fill_value=""),
            "duplicate_of": pd.Series(originals, dtype=object).reindex(samples.index, fill_value=""),
        }
    )


@dataclass(frozen=True)
class _Rule:
    """One rule: the expectations that decide it, and the words for when it fails.

    Attributes:
        expectations: (class name in great_expectations.expectations, its arguments).
        says: rows that failed -> what is wrong with them.
        fix: what the user can do.
    """

    name: str
    severity: Severity
    expectations: tuple[tuple[str, dict[str, Any]], ...]
    says: Callable[[pd.DataFrame], str]
    fix: str


@dataclass(frozen=True)
class _Outcome:
    rule: _Rule
    rows: list[int]  # of the judged table
    message: str
    sample_ids: list[str]  # none for a rule on classes

    @property
    def passed(self) -> bool:
        return not self.rows


def _with_checks(folder: DatasetFolder, params: ValidateParams) -> pd.DataFrame:
    """The sample table, and a column for each check that Great Expectations cannot make itself."""
    samples = folder.samples.reset_index(drop=True)
    for column in ("stat_mean", "stat_std"):
        if column not in samples:
            raise ValueError(
                f"{folder.path / 'samples.parquet'}: no column {column!r}; run `cadx ingest` again"
            )
    labels = samples[list(folder.info.label_columns)]
    rank = samples["given_split"].map({split: place for place, split in enumerate(PRECEDENCE)})
    blank = samples["stat_std"] < params.blank_std
    # Blank images equal each other by nature: they have a rule of their own.
    duplicates = find_duplicates(samples[~blank & rank.notna()], folder.info.label_columns)
    duplicate_of = duplicates["duplicate_of"].reindex(samples.index, fill_value="")
    boxes = folder.boxes.merge(samples[["sample_id", "height_px", "width_px"]], on="sample_id", how="left")
    valid = (
        boxes["x0"].between(0, boxes["x1"], inclusive="left")
        & boxes["y0"].between(0, boxes["y1"], inclusive="left")
        & (boxes["x1"] <= boxes["width_px"])
        & (boxes["y1"] <= boxes["height_px"])
    )
    best = rank.where(samples["given_split"] != "").groupby(samples["patient"]).transform("min")
    return samples.assign(
        is_labelled=labels.notna().any(axis=1),
        is_one_hot=labels.isna().all(axis=1)
        | (labels.notna().all(axis=1) & ((labels == 1).sum(axis=1) == 1)),
        is_blank=blank,
        is_tiny=samples[["height_px", "width_px"]].min(axis=1) < params.min_side_px,
        boxes_are_valid=~samples["sample_id"].isin(boxes.loc[~valid, "sample_id"]),
        is_patient_elsewhere=(samples["given_split"] != "") & (rank > best),
        duplicate=duplicates["duplicate"].reindex(samples.index, fill_value=""),
        duplicate_of=duplicate_of,
        kept_split=duplicate_of.map(samples.set_index("sample_id")["given_split"]).fillna(""),
    )


def _sample_rules(folder: DatasetFolder, params: ValidateParams) -> list[_Rule]:
    """The rules on images, in the order of the report."""
    info = folder.info
    of_whom = "an image of another patient" if info.clustered else "another image"

    def values(column: str, allowed: Sequence[Any]) -> tuple[str, dict[str, Any]]:
        return "ExpectColumnValuesToBeInSet", {"column": column, "value_set": list(allowed)}

    def between(column: str, low: float, high: float | None = None) -> tuple[str, dict[str, Any]]:
        return "ExpectColumnValuesToBeBetween", {"column": column, "min_value": low, "max_value": high}

    def says(text: str) -> Callable[[pd.DataFrame], str]:
        return lambda rows: f"{_count(len(rows), 'image')} {text}"

    def duplicates(kind: DuplicateKind, words: Callable[[pd.DataFrame], str], fix: str) -> _Rule:
        expectation = ("ExpectColumnValuesToNotBeInSet", {"column": "duplicate", "value_set": [kind]})
        return _Rule(kind, getattr(params, kind), (expectation,), words, fix)

    rules = [
        _Rule(
            "identity",
            "stop",
            (
                ("ExpectColumnValuesToNotBeNull", {"column": "sample_id"}),
                ("ExpectColumnValuesToBeUnique", {"column": "sample_id"}),
                ("ExpectColumnValuesToNotBeNull", {"column": "patient"}),
                ("ExpectColumnValueLengthsToBeBetween", {"column": "patient", "min_value": 1}),
                values("path", sorted(info.files)),
            ),
            says("without a unique sample_id, a patient or a shard"),
            "make the dataset again with `cadx ingest`",
        ),
        _Rule(
            "label_values",
            params.label_values,
            tuple(values(column, (0, 1)) for column in info.label_columns),
            says("with a label that is not 0, 1 or missing"),
            "correct the labels at their source",
        ),
        _Rule(
            "unlabelled",
            params.unlabelled,
            (values("is_labelled", [True]),),
            says("without any label: no part of training or scoring"),
            "label them, or leave them out",
        ),
        _Rule(
            "given_split",
            params.given_split,
            (values("given_split", PRECEDENCE),),
            says("with an unknown official split"),
            f"use {', '.join(PRECEDENCE[:-1])} or nothing",
        ),
        _Rule(
            "patient_across_splits",
            params.patient_across_splits,
            (values("is_patient_elsewhere", [False]),),
            lambda rows: (
                f"{_count(rows['patient'].nunique(), 'patient')} with images in several official splits"
                f" ({_count(len(rows), 'image')} outside the patient's most precious one)"
            ),
            "use split.strategy = patient",
        ),
        _Rule(
            "age_range",
            params.age_range,
            (between("age", 0, 120),),
            says("with an age outside 0 to 120 years"),
            "correct the ages at their source",
        ),
        _Rule(
            "sex_values",
            params.sex_values,
            (values("sex", ("F", "M", "O", "")),),
            says("with a sex other than F, M, O or unknown"),
            "correct them at their source",
        ),
        _Rule(
            "image_size",
            params.image_size,
            (
                between("height_px", 1),
                between("width_px", 1),
                values("channels", (1, 3)),
                values("bits", (8, 16)),
            ),
            says("without pixels, or neither gray nor colour of 8 or 16 bits"),
            "make the dataset again with `cadx ingest`",
        ),
        _Rule(
            "tiny_image",
            params.tiny_image,
            (values("is_tiny", [False]),),
            says(f"with a side under {params.min_side_px} pixels"),
            "lower validate.min_side_px if they are meant",
        ),
        _Rule(
            "blank_image",
            params.blank_image,
            (values("is_blank", [False]),),
            says("of one gray all over"),
            "look at the source: a failed exposure, or an export without pixels",
        ),
        _Rule(
            "invalid_box",
            params.invalid_box,
            (values("boxes_are_valid", [True]),),
            says("with a box that has no area or leaves the image"),
            "correct the boxes at their source",
        ),
        duplicates(
            "contradicting_labels",
            says("with equal pixels and contradicting labels"),
            "decide which label is right, at the source",
        ),
        duplicates("duplicate_across_splits", _says_leaks, "remove the copies at the source"),
        duplicates(
            "duplicate_across_patients",
            lambda rows: f"{_count(len(rows), 'further copy', 'further copies')} of {of_whom}",
            "find out whose image it is" if info.clustered else "remove the copies at the source",
        ),
        duplicates(
            "duplicate_within_test",
            lambda rows: (
                f"{_count(len(rows), 'further copy', 'further copies')} inside the official test split"
            ),
            "remove them at the source, unless scores are to compare with published ones",
        ),
        duplicates(
            "duplicate_within_patient",
            lambda rows: f"{_count(len(rows), 'further copy', 'further copies')} within a patient",
            "export each image once",
        ),
    ]
    if info.task in ("binary", "multiclass"):
        one_hot = _Rule(
            "one_hot",
            params.one_hot,
            (values("is_one_hot", [True]),),
            says(f"without exactly one class; the task is {info.task}"),
            "correct the labels, or make the task multilabel",
        )
        rules.insert(2, one_hot)
    return rules


def _class_rules(params: ValidateParams) -> list[_Rule]:
    """The rules on what is left of each class."""

    def least(column: str, number: int) -> tuple[tuple[str, dict[str, Any]], ...]:
        return (("ExpectColumnValuesToBeBetween", {"column": column, "min_value": number}),)

    return [
        _Rule(
            "class_without_images",
            params.class_without_images,
            least("num_images", 1),
            lambda rows: (
                f"{_count(len(rows), 'class', 'classes')} without any image: {', '.join(rows['class'])}"
            ),
            "add images, or take the class out of the catalogue entry",
        ),
        _Rule(
            "class_with_one_patient",
            params.class_with_one_patient,
            least("num_patients", 2),
            lambda rows: (
                f"{_count(len(rows), 'class', 'classes')} with fewer than two patients: "
                + ", ".join(rows["class"])
            ),
            "add patients, or take the class out of the catalogue entry",
        ),
    ]


def _says_leaks(rows: pd.DataFrame) -> str:
    pairs = (
        rows.groupby(["given_split", "kept_split"], sort=False).size().reset_index().itertuples(index=False)
    )
    return "; ".join(
        f"{count:,} {split or 'unassigned'} {'image is a copy' if count == 1 else 'images are copies'}"
        f" of {kept} images: a leak"
        for split, kept, count in pairs
    )


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def _class_table(kept: pd.DataFrame, classes: Sequence[str]) -> pd.DataFrame:
    """A row per class: its images and patients among those that are not quarantined."""
    labels = kept[[f"label_{name}" for name in classes]].set_axis(list(classes), axis=1)
    images = analyze_class_imbalance(labels)
    patients = analyze_class_imbalance(labels, patients=kept["patient"])
    return pd.DataFrame(
        {
            "class": list(classes),
            "num_images": [images[name]["count"] for name in classes],
            "num_patients": [patients[name]["count"] for name in classes],
        }
    )


def _judge(rules: Sequence[_Rule], table: pd.DataFrame) -> tuple[list[_Outcome], list[dict[str, Any]]]:
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
    result = definition.get_batch({"dataframe": table}).validate(
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
        sample_ids = [str(sample_id) for sample_id in failing.get("sample_id", ())]
        outcomes.append(
            _Outcome(rule, rows_in_order, rule.says(failing) if rows_in_order else "", sample_ids)
        )
    return outcomes, records


def _quarantined(checked: pd.DataFrame, outcomes: Sequence[_Outcome]) -> dict[str, str]:
    """sample_id -> reason, of every image that a failed rule keeps out, in the order of the table."""
    reasons: dict[int, list[str]] = {}
    for outcome in outcomes:
        if outcome.rule.severity == "quarantine":
            for row in outcome.rows:
                reasons.setdefault(row, []).append(outcome.rule.name)
    rows = checked.loc[sorted(reasons), ["sample_id", "duplicate", "duplicate_of"]]
    return {
        sample_id: "; ".join(f"{name} (of {other})" if name == kind else name for name in reasons[row])
        for row, sample_id, kind, other in rows.itertuples(name=None)
    }


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
    info = folder.info
    failed = [outcome for outcome in outcomes if not outcome.passed]
    page = Page("Validation", f"{info.name} · {info.modality} · {info.task}")
    page.facts(
        [
            ("images", len(checked)),
            ("patients", checked["patient"].nunique() if info.clustered else "not known"),
            ("sites", (checked["site"] != "").groupby(checked["site"]).any().sum() or "not known"),
            ("rules passed", f"{len(outcomes) - len(failed)} of {len(outcomes)}"),
            ("images kept out", len(quarantined)),
        ]
    )
    for outcome in failed:
        consequence = {"quarantine": "Kept out of every split.", "warn": "Kept."}[outcome.rule.severity]
        page.callout("warn", f"{outcome.message}. {consequence} To remedy: {outcome.rule.fix}.")
    if not failed:
        page.callout("ok", "Every rule passed: nothing is kept out.")

    page.section("Dataset")
    page.text(f"{info.source.title}\n\n{info.source.citation}\n\nLicence: {info.source.licence}")
    for note in (info.source.note, *info.assumptions):
        if note:
            page.callout("warn", note)
    page.table(
        _split_table(kept, info.classes),
        "Images of each class, without what is kept out.",
    )

    page.section("Rules")
    page.table(
        [
            {
                "rule": outcome.rule.name.replace("_", " "),
                "found": len(outcome.rows),
                "if it fails": outcome.rule.severity,
                "result": "passed" if outcome.passed else outcome.message,
            }
            for outcome in outcomes
        ],
        "What was demanded of the tables and the images.",
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
    for column, heading in (("is_blank", "Blank images"), ("is_tiny", "Tiny images")):
        found = checked[checked[column]]
        if len(found):
            page.section(heading)
            page.images(
                [(folder.pixels(sample_id), sample_id) for sample_id in found["sample_id"].head(NUM_SHOWN)],
                _shown(len(found), "image"),
            )

    page.section("What the images look like")
    for name in info.classes[:8]:
        members = kept.loc[kept[f"label_{name}"] == 1, "sample_id"]
        if len(members):
            chosen = members.iloc[np.unique(np.linspace(0, len(members) - 1, 6).astype(int))]
            page.images(
                [(folder.pixels(sample_id), sample_id) for sample_id in chosen],
                f"{name}: {len(chosen)} of {_count(len(members), 'image')}, spread evenly over the table.",
                max_px=112,
            )
    _show_intensities(page, kept)

    if quarantined:
        page.section("Images kept out")
        split_of = checked.set_index("sample_id")["given_split"]
        rows = [
            {"image": sample_id, "official split": split_of[sample_id] or "none", "reason": reason}
            for sample_id, reason in quarantined.items()
        ]
        with page.details(_shown(len(rows), "image", NUM_ROWS_SHOWN)):
            page.table(rows[:NUM_ROWS_SHOWN])
    return page


def _split_table(kept: pd.DataFrame, classes: Sequence[str]) -> list[dict[str, Any]]:
    splits = [split for split in (*OFFICIAL_SPLITS, "") if (kept["given_split"] == split).any()]
    rows = []
    for name in classes:
        members = kept.loc[kept[f"label_{name}"] == 1, "given_split"]
        counts = {
            f"official {split}" if split else "no split": int((members == split).sum()) for split in splits
        }
        rows.append({"class": name, **(counts if splits != [""] else {}), "all": len(members)})
    return rows


def _show_copies(page: Page, folder: DatasetFolder, checked: pd.DataFrame) -> None:
    """Each copy beside the image that is kept for it, leaks first."""
    place = {kind: number for number, kind in enumerate(get_args(DuplicateKind))}
    copies = checked[checked["duplicate"] != ""]
    copies = copies.iloc[copies["duplicate"].map(place).argsort(kind="stable")]
    page.section("Copies")
    if copies.empty:
        page.text("No image occurs twice, pixel for pixel.")
        return
    page.text(
        "Images with exactly equal pixels. Of each group one is kept: the first in the most precious official"
        " split, in the order test, train, calibration, val."
    )
    for kind, group in copies.groupby("duplicate", sort=False):
        # Two images that contradict each other name each other: one picture shows both.
        names = group[["sample_id", "duplicate_of"]].to_numpy()
        group = group[~pd.Series(map(frozenset, names), index=group.index).duplicated()]
        pairs = []
        for copy in group.head(NUM_SHOWN).to_dict("records"):
            left, right = folder.pixels(copy["sample_id"]), folder.pixels(copy["duplicate_of"])
            gap = np.full_like(left[:, : max(1, left.shape[1] // 12)], np.iinfo(left.dtype).max)
            here, there = copy["given_split"] or "no split", copy["kept_split"] or "no split"
            caption = f"{copy['sample_id']} ({here}), {copy['duplicate_of']} ({there})"
            pairs.append((np.concatenate([left, gap, right], axis=1), caption))
        heading = str(kind).replace("_", " ").capitalize()
        page.images(pairs, f"{heading}: {_shown(len(group), 'pair')}", max_px=256)


def _show_intensities(page: Page, kept: pd.DataFrame) -> None:
    groups = [
        (str(site) or "unknown", rows["stat_mean"].to_numpy())
        for site, rows in kept.groupby("site", sort=True)
    ]
    if not 1 < len(groups) <= 20:
        return
    drawing, axes = figure(7.2, 1.1 + 0.34 * len(groups))
    axes.boxplot(
        [values for _, values in groups],
        tick_labels=[name for name, _ in groups],
        orientation="horizontal",
        widths=0.55,
        whis=(2.5, 97.5),
        patch_artist=True,
        boxprops={"facecolor": "#dbe9f4", "edgecolor": PALETTE[0]},
        medianprops={"color": PALETTE[0], "linewidth": 2},
        flierprops={"marker": ".", "markersize": 3, "markeredgecolor": MUTED},
        showfliers=sum(len(values) for _, values in groups) <= 20_000,
    )
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("mean intensity, 0 to 1 of the format's range")
    axes.set_ylabel("site")
    page.figure(
        drawing,
        "Mean intensity of the images by site: box = middle half, line = median, whiskers = middle 95 %."
        " Sites that stand apart are told apart by a network too.",
        alt="Box plots of mean image intensity, one per site.",
    )


def _shown(number: int, noun: str, limit: int = NUM_SHOWN) -> str:
    return _count(number, noun) + (f", the first {limit} shown." if number > limit else ".")
