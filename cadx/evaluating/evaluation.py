"""What the steps ask of each kind of answer: a table of predictions, its numbers, and their pages."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.detection import DetectionScores
from cadx.explaining import title
from cadx.metrics import Meaning, Scores
from cadx.predicting.table import PredictionsInfo
from cadx.reporting import PALETTE, Page
from cadx.types import Aggregation, Config, Judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cadx.predicting.predictor import Predictor

Attribute = Literal["site", "sex", "age", "scanner"]
"""What subgroups may be made by."""


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


LESION_COLOUR = PALETTE[2]
NUM_MISTAKES = 6
"""Of each sort, on a page."""


class Mistake(NamedTuple):
    """A wrong answer about one class.

    Attributes:
        sample_id: of the image.
        truth: what is there, in a word.
        called: what was said instead.
        score: the probability of the class, or the score of the box; None of a lesion that no box touches.
        box: of the lesion or the false alarm, x0 y0 x1 y1 in pixels of the image; None where the image is meant.
    """

    sample_id: str
    truth: str
    called: str
    score: float | None
    box: np.ndarray | None = None

    def __str__(self) -> str:
        """What is to be read under its picture."""
        score = "not seen" if self.score is None else f"{self.score:.3f}"
        return f"truth {self.truth}, called {self.called} ({score})"


class Evaluation(ABC):
    """The numbers of one split, of one seed or several, and the sections of a report that are made of them.

    Each part is made when it is first asked for. Of several seeds every number is the mean over seeds, with an
    interval over patients.

    Args:
        frame: rows of a predictions file.
        info: what they are.
        settings: how finely they are scored.
        others: the same of other seeds, on the same samples in the same order.

    Attributes:
        frames: what the pictures of mistakes show, in words.
        picture_px: the longer side of such a picture.

    Raises:
        ValueError: as `check`.
    """

    frames: ClassVar[str]
    picture_px: ClassVar[int]

    @abstractmethod
    def __init__(
        self,
        frame: pd.DataFrame,
        info: PredictionsInfo,
        settings: Settings,
        others: Sequence[tuple[pd.DataFrame, PredictionsInfo]] = (),
    ) -> None: ...

    @staticmethod
    @abstractmethod
    def check(samples: pd.DataFrame, info: PredictionsInfo, settings: Settings) -> None:
        """Refuse what cannot be scored like this, before anything has been answered.

        Args:
            samples: rows as `described` gives them.
            info: what the answers will be.
            settings: how they will be scored.

        Raises:
            ValueError: one line that says which setting to change.
        """

    @property
    @abstractmethod
    def scores(self) -> Scores | DetectionScores:
        """Every metric."""

    @property
    def n(self) -> int:
        """Labelled samples, or patients where samples are aggregated."""
        return self.scores.n

    @property
    def n_patients(self) -> int:
        """Patients among them."""
        return self.scores.n_patients

    @staticmethod
    @abstractmethod
    def predict(predictor: "Predictor", folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
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
    def draw_curve(self, axes: "Axes") -> bool:
        """Draw the curve that the kind is known by, with its 95 % band; False where it is undefined."""

    @abstractmethod
    def mistakes(self) -> dict[str, list[Mistake]]:
        """Misses and false alarms of the first seed, by sort, the most confident first."""

    @abstractmethod
    def picture(self, mistake: Mistake, folder: DatasetFolder) -> np.ndarray:
        """The mistake's sample as one picture, H W or H W 3, with lesions framed where they are known."""

    def show_mistakes(self, page: Page, folder: DatasetFolder) -> None:
        """Add the section of the worst misses and false alarms, with their pictures."""
        page.section("Worst mistakes")
        page.text(self.frames)
        for heading, mistakes in self.mistakes().items():
            if not mistakes:
                page.callout("ok", f"{heading}: none.")
                continue
            shown = mistakes[:NUM_MISTAKES]
            rest = "" if len(shown) == len(mistakes) else f" of {len(mistakes):,}"
            page.text(f"{heading}: {len(shown)}{rest}, the most confident first.")
            page.images(
                [(self.picture(mistake, folder), f"{mistake.sample_id}: {mistake}") for mistake in shown],
                max_px=self.picture_px,
            )

    @abstractmethod
    def show_explanations(self, page: Page, folder: DatasetFolder, predictor: "Predictor") -> None:
        """Add the section on why a few answers are as they are; nothing where no map can show it."""


def judged_on(split: Judged) -> str:
    """What the numbers are of, in words.

    >>> judged_on("test"), judged_on("folds")
    ('the test split', 'the folds of the cross-validation')
    """
    return "the folds of the cross-validation" if split == "folds" else f"the {split} split"


def show_metrics(
    page: Page, scores: Any, seeds: Sequence[int], meanings: Mapping[str, Meaning], note: str
) -> None:
    """Add every metric with its interval, each seed's value where there are several, and what each one is.

    Args:
        page: where to.
        scores: with `metrics`, `by_seed` and `between_seed_sd`, by metric.
        seeds: in the order of `by_seed`.
        meanings: of each metric.
        note: what n counts.
    """
    several = len(seeds) > 1
    page.section("Metrics")
    rows = []
    for name, estimate in scores.metrics.items():
        of_seeds: dict[str, Any] = {
            f"seed {seed}": value for seed, value in zip(seeds, scores.by_seed[name], strict=True)
        } | {"SD of seeds": scores.between_seed_sd[name]}
        rows.append(
            {
                "metric": title(name),
                f"{'mean' if several else 'value'} (95 % interval)": estimate,
                **(of_seeds if several else {}),
                "n": estimate.n,
                **({} if several else {"how the interval was made": estimate.method}),
            }
        )
    spread = " The interval is over patients; the standard deviation says how far training runs differ."
    page.table(rows, note + spread * several)
    with page.details("What each metric is" + ", and how its interval was made" * several):
        page.table(
            [
                {"metric": title(name), "what it is": meanings[name].meaning}
                | ({"how the interval was made": estimate.method} if several else {})
                for name, estimate in scores.metrics.items()
            ]
        )


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
