"""Answers as tables: probabilities, calls and boxes, predictions.parquet, and what metrics are made from."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cadx.bundle import answer_columns
from cadx.files import replacing
from cadx.models import Detections
from cadx.types import Aggregation, Config, Conformal, Digest, Judged, Task


def decide(
    probabilities: np.ndarray,
    thresholds: dict[str, float],
    task: Task,
    classes: Sequence[str],
    positive: str | None,
) -> np.ndarray:
    """Which classes are called, N K bool, from N K probabilities (see `OperatingPoint`).

    >>> decide(np.array([[0.7, 0.3], [0.8, 0.2]]), {"sick": 0.3}, "binary", ("well", "sick"), "sick").tolist()
    [[False, True], [True, False]]
    """
    if task in ("multilabel", "detection"):
        return probabilities >= np.array([thresholds[name] for name in classes])
    if task == "binary":
        assert positive is not None
        column = list(classes).index(positive)
        called = probabilities[:, column] >= thresholds[positive]
        return np.stack([called if k == column else ~called for k in range(2)], axis=1)
    return np.eye(len(classes), dtype=bool)[probabilities.argmax(1)]


UNCLUSTERED = (
    "The source names no patients: intervals treat each image as a patient, and are too narrow if some "
    "patients have several images."
)


_BOX = [("class", pa.string()), *((side, pa.float64()) for side in ("x0", "y0", "x1", "y1"))]
BOX_LISTS = {
    "boxes": pa.list_(pa.struct([*_BOX, ("score", pa.float64())])),
    "lesions": pa.list_(pa.struct(_BOX)),
}
"""The columns of a predictions file that hold a list of boxes, in stored pixels, half-open."""


class PredictionsInfo(Config):
    """What the rows of a predictions file are: kept in the file's own metadata.

    `bundle` is the digest of the bundle that gave them, `resampled_thresholds` are its operating point's, `aggregate`
    is how a patient's rows are to become one case where they are scored; the other fields are as in its manifest.
    """

    experiment: str
    seed: int
    split: Judged
    bundle: Digest
    task: Task
    classes: tuple[str, ...]
    positive: str | None
    clustered: bool
    thresholds: dict[str, float]
    resampled_thresholds: dict[str, tuple[float, ...]] = Field(default_factory=dict)
    conformal: Conformal | None = None
    aggregate: Aggregation = "none"
    assumptions: tuple[str, ...]

    @property
    def warnings(self) -> tuple[str, ...]:
        """What a reader of any number made from these rows must know."""
        return () if self.clustered else (UNCLUSTERED,)

    @property
    def columns(self) -> list[str]:
        """The columns of the file, in order."""
        labels = [f"label_{name}" for name in self.classes]
        answers = answer_columns(self.task, self.classes)
        boxes = list(BOX_LISTS) if self.task == "detection" else []
        return ["sample_id", "patient", "site", "scanner", "age", "sex", *labels, *answers, *boxes]


def answer_table(
    probabilities: np.ndarray, calls: np.ndarray, task: Task, classes: Sequence[str]
) -> pd.DataFrame:
    """`answer_columns` of N samples, from N K probabilities and N K calls (`decide`).

    `decision` is a class name; for multilabel and boxes there is `decision_<class>`, bool, for each.
    """
    several = task in ("multilabel", "detection")
    called = [*calls.T] if several else [np.array(classes, dtype=object)[calls.argmax(1)]]
    return pd.DataFrame(dict(zip(answer_columns(task, classes), [*probabilities.T, *called], strict=True)))


def detection_table(answers: Mapping[str, Detections], classes: Sequence[str]) -> pd.DataFrame:
    """A row per box: sample_id, class, x0, y0, x1, y1, score; samples in their order, scores falling."""
    rows = [
        (sample_id, classes[label], *box, score)
        for sample_id, answer in answers.items()
        for box, label, score in zip(*(field.tolist() for field in answer), strict=True)
    ]
    return pd.DataFrame(rows, columns=["sample_id", "class", "x0", "y0", "x1", "y1", "score"])


def image_answers(
    detections: pd.DataFrame,
    sample_ids: Sequence[str],
    classes: Sequence[str],
    thresholds: Mapping[str, float],
) -> pd.DataFrame:
    """What boxes say of each image: `answer_columns`, and `num_boxes`, how many are called.

    Args:
        detections: as from `detection_table`.
        sample_ids: of the images, those without any box too.
        classes: all classes.
        thresholds: class -> the lowest score that is called.
    """
    best = detections.groupby(["sample_id", "class"])["score"].max().unstack("class")  # noqa: PD010
    scores = best.reindex(index=[*sample_ids], columns=[*classes]).fillna(0.0).to_numpy(np.float64)
    least = detections["class"].map(thresholds).to_numpy(np.float64)
    called = detections.loc[detections["score"].to_numpy() >= least, "sample_id"].value_counts()
    calls = scores >= np.array([thresholds[name] for name in classes])
    answers = answer_table(scores, calls, "detection", classes)
    return answers.assign(num_boxes=called.reindex([*sample_ids]).fillna(0).to_numpy(np.int64))


def write_predictions(path: Path, frame: pd.DataFrame, info: PredictionsInfo) -> None:
    """Write predictions.parquet, whole or not at all; the same rows give the same bytes.

    Columns: sample_id, patient, site, scanner, age, sex, `label_<class>` (NaN = unlabelled),
    `prob_<class>`, and `decision` (a class name) or for multilabel `decision_<class>` (bool).

    A detector's rows hold beside these `boxes` with their scores, and `lesions`, the truth; a label says whether the
    image holds a lesion of the class, `prob_` is its highest score of one, and the decision whether one is called.
    """
    plain = [name for name in info.columns if name not in BOX_LISTS]
    table = pa.Table.from_pandas(frame[plain], preserve_index=False)
    for name in info.columns[len(plain) :]:
        # Said, not guessed: where no image has a box, a list's type could not be told.
        table = table.append_column(name, pa.array(frame[name].tolist(), BOX_LISTS[name]))
    # Instead of pandas' own metadata, which changes with its version.
    table = table.replace_schema_metadata({"cadx": info.model_dump_json()})
    with replacing(path) as partial:
        pq.write_table(table, partial)


def read_predictions(path: Path) -> tuple[pd.DataFrame, PredictionsInfo]:
    """The rows of a predictions file, and what they are.

    Raises:
        ValueError: if there is no such file, or it is not a predictions file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no predictions there; write them with `cadx evaluate`")
    try:
        table = pq.read_table(path)
        info = PredictionsInfo.model_validate(json.loads((table.schema.metadata or {})[b"cadx"]))
    except (pa.ArrowInvalid, KeyError, ValueError):
        raise ValueError(
            f"{path}: no predictions file of this version; write it with `cadx evaluate`"
        ) from None
    if missing := [name for name in info.columns if name not in table.column_names]:
        raise ValueError(f"{path}: no columns {', '.join(missing)}; write it again with `cadx evaluate`")
    return table.to_pandas(), info


def box_lists(table: pd.DataFrame, sample_ids: Sequence[str]) -> list[list[dict[Any, Any]]]:
    """The boxes of each sample, as a column of a predictions file holds them, from a row a box."""
    fields = [name for name in table.columns if name != "sample_id"]
    rows: dict[str, list[dict[Any, Any]]] = {sample_id: [] for sample_id in sample_ids}
    for sample_id, box in zip(table["sample_id"].tolist(), table[fields].to_dict("records"), strict=True):
        rows[sample_id].append(box)
    return list(rows.values())


def box_table(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """A row a box, as `cadx.detection` takes them, from a predictions file's column `boxes` or `lesions`."""
    rows = [
        {"sample_id": sample_id, **box}
        for sample_id, boxes in zip(frame["sample_id"], frame[column], strict=True)
        for box in boxes
    ]
    fields = [field.name for field in BOX_LISTS[column].value_type]
    return pd.DataFrame(rows, columns=["sample_id", *fields])


class Arrays(NamedTuple):
    """The rows of a predictions file as `metrics.score` takes them."""

    labels: np.ndarray  # N K, NaN = unlabelled
    probabilities: np.ndarray  # N K
    decisions: np.ndarray  # N K bool
    patients: np.ndarray | None  # N, None where each image stands for a patient


def arrays(frame: pd.DataFrame, info: PredictionsInfo) -> Arrays:
    """The columns of a predictions file by what they mean."""
    if info.task in ("multilabel", "detection"):
        decisions = frame[[f"decision_{name}" for name in info.classes]].to_numpy(bool)
    else:
        decisions = frame["decision"].to_numpy(object)[:, None] == np.array(info.classes, dtype=object)
    return Arrays(
        frame[[f"label_{name}" for name in info.classes]].to_numpy(np.float64),
        frame[[f"prob_{name}" for name in info.classes]].to_numpy(np.float64),
        decisions,
        frame["patient"].to_numpy(object) if info.clustered else None,
    )


def subgroups(frame: pd.DataFrame, attributes: Sequence[str]) -> dict[str, list[str]]:
    """The value of each attribute for each row, "" = unknown, age in bands; without what is never known."""
    groups = {
        name: [age_band(age) for age in frame[name]] if name == "age" else frame[name].astype(str).tolist()
        for name in attributes
    }
    return {name: values for name, values in groups.items() if any(values)}


def age_band(years: float) -> str:
    """The band of an age in reports, "" where it is unknown.

    >>> age_band(39.9), age_band(40.0), age_band(80.0), age_band(float("nan"))
    ('0-39', '40-59', '80+', '')
    """
    for limit, band in ((40, "0-39"), (60, "40-59"), (80, "60-79"), (np.inf, "80+")):
        if years < limit:
            return band
    return ""
