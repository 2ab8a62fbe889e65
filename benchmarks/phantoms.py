"""How long the catalogue's synthetic cohorts take to draw, and whether one that was ingested is a toy.

Seconds are those of one core for a whole cohort, at the pace of its first patients; a toy is told apart by a logistic
regression on what is known of an image without looking for a lesion: its statistics, and the metadata. The peer of each
claim is its limit.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from benchmarks._claim import claim
from cadx.catalog import PhantomEntry, load_catalog
from cadx.datasets import DatasetFolder
from cadx.phantom import PHANTOM

_CATALOG = Path("data/catalog.yaml")
_WORK = Path("data/work")
_TOY_AUC = 0.70
_METADATA = ("age", "sex", "site", "scanner")
_LIMIT_S = 600.0
_PART = 25
"""The patients of a cohort divided by those that are drawn here."""


def claims() -> Iterator[dict[str, Any]]:
    for name, entry in load_catalog(_CATALOG).items():
        if isinstance(entry, PhantomEntry):
            whole = PHANTOM.validate_python(entry.parameters)
            part = whole.model_copy(update={"num_patients": whole.num_patients // _PART})
            with TemporaryDirectory(prefix="cadx-phantoms-") as folder:
                # Of the processor and not of the clock: what else runs on the machine does not count.
                started = time.process_time()
                part.write(Path(folder) / "cohort")
                seconds = (time.process_time() - started) * whole.num_patients / part.num_patients
            yield claim(f"phantoms.{name}", seconds, _LIMIT_S, "s", ratio=_LIMIT_S / seconds)
            if (_WORK / name / "dataset").is_dir():
                yield from _told_apart(name)
            else:
                print(f"phantoms: {name} is not ingested; `dvc repro ingest@{name}`", file=sys.stderr)


def _told_apart(name: str) -> Iterator[dict[str, Any]]:
    """How well each class of an ingested cohort is told by statistics and metadata."""
    dataset = DatasetFolder(_WORK / name / "dataset")
    samples, labels = dataset.samples, dataset.info.label_columns
    statistics = [str(column) for column in samples if str(column).startswith(("stat_", "clinical_"))]
    features = samples[[*statistics, *_METADATA]].fillna({"age": samples["age"].median()})
    for label in labels if dataset.info.task != "binary" else labels[-1:]:
        auc = statistics_auc(features, samples[label].astype(int), samples["patient"])
        unit = "AUC of statistics and metadata"
        yield claim(f"phantoms.{name}_{label}", auc, _TOY_AUC, unit, ratio=_TOY_AUC / auc)


def statistics_auc(features: pd.DataFrame, labels: pd.Series, patients: pd.Series) -> float:
    """AUC of a logistic regression on the features, out of fold with patients kept together, mean of three."""
    from sklearn.linear_model import LogisticRegressionCV
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import StratifiedGroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    table, truth = pd.get_dummies(features).to_numpy(dtype=float), labels.to_numpy()
    model = make_pipeline(
        StandardScaler(),
        LogisticRegressionCV(
            Cs=(1e-3, 1e-2, 1e-1, 1.0),
            cv=3,
            l1_ratios=(0.0,),
            use_legacy_attributes=False,
            scoring="roc_auc",
            max_iter=2000,
            class_weight="balanced",
        ),
    )
    aucs = []
    for seed in range(3):
        folds = StratifiedGroupKFold(5, shuffle=True, random_state=seed)
        scores = cross_val_predict(
            model, table, truth, groups=patients.to_numpy(), cv=folds, method="decision_function"
        )
        aucs.append(roc_auc_score(truth, scores))
    return float(np.mean(aucs))
