"""AUC, its variance and the paired test against pROC, the reference that clinical papers cite.

R is no dependency of cadx: `apt-get install r-cran-proc` brings it; without it the test is skipped, and says so.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_metrics import logit_variance, placements, student

from cadx.metrics import auc, delong_difference

CASES = 250
SCRIPT = """
suppressPackageStartupMessages(library(pROC))
args <- commandArgs(trailingOnly = TRUE)
rows <- read.csv(args[1], colClasses = c("integer", "integer", "numeric", "numeric"))
found <- lapply(split(rows, rows$case), function(one) {
  a <- roc(one$label, one$a, levels = c(0, 1), direction = "<", quiet = TRUE)
  b <- roc(one$label, one$b, levels = c(0, 1), direction = "<", quiet = TRUE)
  test <- roc.test(a, b, method = "delong", paired = TRUE)
  data.frame(case = one$case[1], auc = as.numeric(auc(a)), variance = var(a, method = "delong"),
             difference = as.numeric(auc(a)) - as.numeric(auc(b)),
             z = as.numeric(test$statistic), p = test$p.value)
})
write.csv(do.call(rbind, found), args[2], row.names = FALSE)
"""


def _has_proc() -> bool:
    if shutil.which("Rscript") is None:
        return False
    asked = subprocess.run(["Rscript", "-e", "library(pROC)"], capture_output=True, check=False)
    return asked.returncode == 0


@pytest.mark.skipif(
    not _has_proc(), reason="NOT CHECKED AGAINST R: install it with apt-get install r-cran-proc"
)
def test_auc_variance_and_paired_test_are_those_of_proc(tmp_path: Path) -> None:
    """Random sizes, prevalences, strengths and correlations of two models, every third case with many ties."""
    rng = np.random.default_rng(0)
    cases = []
    for number in range(CASES):
        n = int(rng.integers(12, 120))
        y = np.zeros(n, dtype=int)
        y[: int(rng.integers(3, n - 3))] = 1
        shared = rng.normal(size=n)
        a, b = (
            rng.uniform(0, 2) * y + 0.7 * shared + rng.uniform(0.3, 1.5) * rng.normal(size=n)
            for _ in range(2)
        )
        if number % 3 == 0:
            a, b = np.round(a), np.round(b)
        cases.append(pd.DataFrame({"case": number, "label": y, "a": a, "b": b}))
    pd.concat(cases).to_csv(tmp_path / "cases.csv", index=False)
    (tmp_path / "reference.R").write_text(SCRIPT)
    subprocess.run(
        ["Rscript", "reference.R", "cases.csv", "found.csv"], cwd=tmp_path, check=True, capture_output=True
    )
    reference = pd.read_csv(tmp_path / "found.csv").set_index("case")
    assert len(reference) == CASES
    variances = tests = 0
    for number, rows in enumerate(cases):
        expected = reference.loc[number]
        y, a, b = (rows[name].to_numpy() for name in ("label", "a", "b"))
        found = auc(y, a)
        assert found.value == pytest.approx(expected["auc"], abs=1e-12)
        if found.method.startswith("DeLong"):
            value, of_positives, of_negatives = placements(y, a)
            shares = np.r_[(of_positives - value) / y.sum(), (of_negatives - value) / (1 - y).sum()]
            variance = logit_variance(found, student(shares))
            assert variance == pytest.approx(expected["variance"], rel=1e-9)
            variances += 1
        difference = delong_difference(y, a, b)
        assert difference.value == pytest.approx(expected["difference"], abs=1e-12)
        if difference.p is not None and np.isfinite(expected["z"]):
            assert difference.p == pytest.approx(expected["p"], rel=1e-8, abs=1e-14)
            tests += 1
    assert min(variances, tests) >= 200, "too few cases in which both say a variance and a p value"
