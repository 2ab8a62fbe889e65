"""What the steps ask of each kind of answer: a table of predictions, its numbers, and their pages."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.predicting import PredictionsInfo, Predictor
from cadx.reporting import Page
from cadx.types import Config

Attribute = Literal["site", "sex", "age", "scanner"]
"""What subgroups may be made by."""
Aggregation = Literal["none", "max", "mean"]
"""What becomes of a patient's images before they are scored: each stands for itself, or all become one case with the
highest, or the mean, of their probabilities."""


class Settings(Config):
    """How finely answers are scored; the parameters are those of the step.

    Attributes:
        resamples: bootstrap resamples of patients.
        subgroups: attributes whose values are scored apart.
        minimum_n: patients that an estimate in a subgroup needs.
        aggregate: how the images of a patient become one case, if they do.
    """

    resamples: int = Field(ge=0)
    subgroups: tuple[str, ...]
    minimum_n: int = Field(ge=1)
    aggregate: Aggregation = "none"


class Evaluation(ABC):
    """The numbers of one split, and the sections of a report that are made of them.

    Args:
        frame: rows of a predictions file.
        info: what they are.
        settings: how finely they are scored.

    Attributes:
        n: labelled samples.
        n_patients: patients among them.
    """

    n: int
    n_patients: int

    @abstractmethod
    def __init__(self, frame: pd.DataFrame, info: PredictionsInfo, settings: Settings) -> None: ...

    @staticmethod
    @abstractmethod
    def predict(predictor: Predictor, folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
        """The rows of the predictions file."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """What metrics.json says beside the facts that every kind shares: metrics, by_class, by_subgroup and more."""

    @abstractmethod
    def show_answer(self, page: Page) -> None:
        """Add the headline: the few numbers that a reader looks for first."""

    @abstractmethod
    def show_numbers(self, page: Page) -> None:
        """Add the sections of metrics, curves, decisions and subgroups."""

    @abstractmethod
    def show_mistakes(self, page: Page, folder: DatasetFolder, predictor: Predictor) -> None:
        """Add the section of the worst misses and false alarms, with their pictures."""


def show_assumptions(page: Page, info: PredictionsInfo) -> None:
    """Add what was taken as given."""
    page.section("Assumptions")
    for assumption in info.assumptions or (
        "The source says all that was needed: nothing was taken as given.",
    ):
        page.text(assumption)


def dump(records: Mapping[str, Any]) -> dict[str, Any]:
    """Configurations by name, as JSON holds them."""
    return {name: record.model_dump(mode="json") for name, record in records.items()}


def described(folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
    """The columns of a predictions file that the dataset knows: whose a sample is, and its labels."""
    columns = ["sample_id", "patient", "site", "scanner", "age", "sex", *folder.info.label_columns]
    return folder.samples.iloc[folder.rows(sample_ids)][columns].reset_index(drop=True)
