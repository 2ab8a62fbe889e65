"""AUC, its variance and the paired test against pROC, the reference that clinical papers cite.

What pROC says of the cases is committed, so that the comparison needs no R. Where R and pROC are to be had
(`apt-get install r-cran-proc`), they must still say it; `python tests/test_metrics_against_r.py` writes it anew.
"""

import shutil
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytest
from test_metrics import logit_variance, placements, student

from cadx.metrics import auc, delong_difference

REFERENCE = Path(__file__).parent / "references" / "proc.csv"
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


def draw() -> list[pd.DataFrame]:
    """Label and two models' scores: random sizes, prevalences, strengths and correlations, every third with ties."""
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
    return cases


def ask_proc(cases: list[pd.DataFrame]) -> pd.DataFrame:
    """What pROC says, a row for each case."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        pd.concat(cases).to_csv(folder / "cases.csv", index=False)
        (folder / "reference.R").write_text(SCRIPT)
        command = ["Rscript", "reference.R", "cases.csv", "found.csv"]
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
        return pd.read_csv(folder / "found.csv")


def _has_proc() -> bool:
    if shutil.which("Rscript") is None:
        return False
    asked = subprocess.run(["Rscript", "-e", "library(pROC)"], capture_output=True, check=False)
    return asked.returncode == 0


def test_auc_variance_and_paired_test_are_those_of_proc() -> None:
    reference = pd.read_csv(REFERENCE).set_index("case")
    assert len(reference) == CASES
    variances = tests = 0
    for number, rows in enumerate(draw()):
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


@pytest.mark.skipif(not _has_proc(), reason="R AND pROC ARE NOT HERE: apt-get install r-cran-proc")
def test_what_is_committed_is_what_proc_says() -> None:
    pd.testing.assert_frame_equal(ask_proc(draw()), pd.read_csv(REFERENCE), rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    ask_proc(draw()).to_csv(REFERENCE, index=False)
