"""Answers for a folder of files: batch inference, in the very path of the endpoint.

A file is known by the SHA-256 of its bytes, never by its name, which may carry a patient's: who holds the files
can join answers by it (`sha256sum`), nobody else can. What cannot be read costs its own line and stops nothing.

predictions.parquet, one row per file that was answered, in order of sha256:

    sha256                   of the file's bytes; of a folder that is one volume, of its files' names and digests
    prob_<class>             calibrated probability
    decision                 the class; for multilabel `decision_<class>`, bool
    prediction_set, refer    where the bundle has them: the classes that cannot be ruled out, and whether to refer
    warnings                 what was assumed or unusual, joined by "; "

For a model of boxes a row per box: sha256, class, score, x0, y0, x1, y1 in stored pixels, half-open.
unreadable.jsonl holds `{"sha256", "reason"}`, one line per file.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from cadx.bundle import Bundle, Manifest, answer_columns
from cadx.files import digest_path
from cadx.reading.folders import is_hidden
from cadx.reading.images import read_image
from cadx.reading.volumes import read_volume
from cadx.types import Prediction
from components.contract import In, Out, Params, step

if TYPE_CHECKING:
    from cadx.predicting.predictor import Predictor

_READERS: dict[str, Callable[[Path], Any]] = {"image": read_image, "volume": read_volume}
"""What is read of a file before the Predictor sees it; a slide is read where it lies."""


class PredictParams(Params):
    """How a folder is answered."""

    unreadable_at_most: float = Field(
        default=1.0, ge=0, le=1, description="share of files that may be unreadable; more stop the step"
    )


class File(NamedTuple):
    """One sample on disk."""

    sha256: str
    path: Path


@step
def predict(*, bundle: In, images: In, predictions: Out, unreadable: Out, params: PredictParams) -> None:
    """Answer every file of a folder with a bundle; list the files that cannot be read, without their names.

    Raises:
        ValueError: if the folder holds no file, one may not be opened, or more are unreadable than may be.
    """
    opened = Bundle(bundle)
    from cadx.predicting.predictor import Predictor  # torch takes seconds: bad input is refused before

    predictor = Predictor(opened)
    files = _files(images, predictor.subject.kind)
    if not files:
        raise ValueError(f"{images}: no file in it; give the folder that holds the images")
    refused: list[dict[str, str]] = []
    rows = [row for answered in _answers(predictor, files, refused) for row in answered]
    if len(refused) > params.unreadable_at_most * len(files):
        raise ValueError(
            f"{images}: {len(refused)} of {len(files)} files cannot be read, the first because: "
            f"{refused[0]['reason']}; predict.unreadable_at_most allows {params.unreadable_at_most:.0%}"
        )
    manifest = predictor.bundle.manifest
    table = pa.Table.from_pandas(pd.DataFrame(rows, columns=_columns(manifest)), preserve_index=False)
    about = {
        "schema": 1,
        "experiment": manifest.experiment,
        "seed": manifest.seed,
        "bundle": predictor.bundle.digest,
        "thresholds": predictor.thresholds,
    }
    pq.write_table(table.replace_schema_metadata({"cadx": json.dumps(about)}), predictions)
    unreadable.write_text("".join(json.dumps(line) + "\n" for line in refused), encoding="utf-8")
    answered = len(files) - len(refused)
    print(f"{answered} {'file' if answered == 1 else 'files'} answered, {len(refused)} unreadable")


def _files(folder: Path, kind: str) -> list[File]:
    """The samples in order of their digests, each once; of volumes, a folder beside the files is one series."""
    found = folder.iterdir() if kind == "volume" else (path for path in folder.rglob("*") if _is_file(path))
    named = [path for path in found if not any(map(is_hidden, path.relative_to(folder).parts))]
    try:
        return sorted({(digest := _sha256(path)): File(digest, path) for path in named}.values())
    except OSError as error:  # whose own text has the name
        raise ValueError(
            f"{folder}: a file in it cannot be opened ({error.strerror}); give the right to read all of them"
        ) from None


def _is_file(path: Path) -> bool:
    """Also a link that leads nowhere: it stands for a file that somebody misses."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _sha256(path: Path) -> str:
    return digest_path(path).removeprefix("sha256:")


def _answers(
    predictor: "Predictor", files: Sequence[File], refused: list[dict[str, str]]
) -> Iterator[list[dict[str, Any]]]:
    """Rows by group of files; what cannot be read, or answered, goes to `refused`."""
    remaining = iter(files)
    while group := list(islice(remaining, predictor.subject.batch_size)):
        read: list[tuple[File, Any]] = []
        for file in group:
            try:
                raw = predictor.subject.read(_READERS.get(predictor.subject.kind, Path)(file.path))
                predictor.subject.require_spacing(raw)
            except ValueError as error:
                refused.append(_refusal(file, error))
            else:
                read.append((file, raw))
        yield _answered(predictor, read, refused)


def _answered(
    predictor: "Predictor", read: Sequence[tuple[File, Any]], refused: list[dict[str, str]]
) -> list[dict[str, Any]]:
    """Rows of what has been read so far: the tiles of a slide are read only now, and each may be damaged."""
    try:
        if predictor.bundle.manifest.task == "detection":
            return [row for rows in _boxes(predictor, read) for row in rows]
        answers = predictor.predict_many([raw for _, raw in read])
        return [_row(file, answer, predictor) for (file, _), answer in zip(read, answers, strict=True)]
    except ValueError as error:
        if len(read) == 1:
            refused.append(_refusal(read[0][0], error))
            return []
        return [row for one in read for row in _answered(predictor, [one], refused)]


def _refusal(file: File, error: ValueError) -> dict[str, str]:
    return {"sha256": file.sha256, "reason": str(error).replace(str(file.path), "the file")}


def _columns(manifest: Manifest) -> list[str]:
    """Those of the answers, also where there are none."""
    if manifest.task == "detection":
        return ["sha256", "class", "score", "x0", "y0", "x1", "y1"]
    sets = ["prediction_set", "refer"] if manifest.conformal else []
    return ["sha256", *answer_columns(manifest.task, manifest.classes), *sets, "warnings"]


def _row(file: File, answer: Prediction, predictor: "Predictor") -> dict[str, Any]:
    row: dict[str, Any] = {"sha256": file.sha256}
    row |= {f"prob_{name}": probability for name, probability in answer.probabilities.items()}
    if isinstance(answer.decision, tuple):
        row |= {f"decision_{name}": name in answer.decision for name in predictor.bundle.manifest.classes}
    else:
        row["decision"] = answer.decision
    if answer.prediction_set is not None:
        row |= {"prediction_set": list(answer.prediction_set), "refer": answer.refer}
    return row | {"warnings": "; ".join(answer.warnings)}


def _boxes(predictor: "Predictor", read: Sequence[tuple[File, Any]]) -> Iterator[list[dict[str, Any]]]:
    classes = predictor.bundle.manifest.classes
    found = predictor.detect(raw.pixels for _, raw in read)
    for (file, _), one in zip(read, found, strict=True):
        boxes = np.asarray(one.boxes_xyxy, np.float64)
        yield [
            {"sha256": file.sha256, "class": classes[int(label)], "score": float(score)}
            | dict(zip(("x0", "y0", "x1", "y1"), map(float, box), strict=True))
            for box, label, score in zip(boxes, one.labels, one.scores, strict=True)
        ]
