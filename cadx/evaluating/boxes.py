"""Detection: boxes against lesions, in numbers and in pictures, for one seed or several."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from cadx.datasets import DatasetFolder
from cadx.detection import (
    AREAS_PX2,
    FROC_RATES,
    METRICS,
    DetectionScores,
    calculate_detection_metrics,
    froc_curve,
    froc_limits,
    match_boxes,
)
from cadx.evaluating import decisions
from cadx.evaluating.evaluation import (
    LESION_COLOUR,
    Evaluation,
    Mistake,
    Settings,
    described,
    dump,
    judged_on,
    show_metrics,
)
from cadx.evaluating.lesion_sizes import ATTRIBUTE
from cadx.explaining import Band, draw_band, show_subgroups, square, title
from cadx.metrics import Difference, Gap, Subgroup, corrected, gap_between, share_of
from cadx.predicting.table import (
    PredictionsInfo,
    box_lists,
    box_table,
    detection_table,
    image_answers,
    subgroups,
)
from cadx.reporting import INK, PALETTE, Page, draw_boxes, panels
from cadx.types import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from cadx.predicting.predictor import Predictor

HEADLINE = ("ap50", "sensitivity", "false_positives_per_image", "precision", "froc", "ap")
BOX_COLOUR, MISTAKE_COLOUR = PALETTE[1], PALETTE[3]
_RATES = np.geomspace(FROC_RATES[0], FROC_RATES[-1], 61)
_COORDINATES = ["x0", "y0", "x1", "y1"]


class Detection(Evaluation):
    """Boxes of one or several classes; the metrics are those of `cadx.detection`."""

    frames = (
        "Green frames: lesions. Orange frames: boxes called at the operating point. The mistake itself is framed in "
        "pink; below it stands the score, the lowest first of misses, the highest first of false alarms."
    )
    picture_px = 360

    def __init__(
        self,
        frame: pd.DataFrame,
        info: PredictionsInfo,
        settings: Settings,
        others: Sequence[tuple[pd.DataFrame, PredictionsInfo]] = (),
    ) -> None:
        self.check(frame, info, settings)
        self.frame, self.info, self._settings = frame, info, settings
        self.seeds = [info.seed, *(one.seed for _, one in others)]
        self._thresholds = [info.thresholds, *(one.thresholds for _, one in others)]
        self._found = [box_table(one, "boxes") for one in (frame, *(other for other, _ in others))]
        self._lesions = box_table(frame, "lesions")
        self._patients = frame["patient"].to_numpy(object) if info.clustered else None

    @staticmethod
    def check(samples: pd.DataFrame, info: PredictionsInfo, settings: Settings) -> None:
        """Refuse images that are to be aggregated."""
        if settings.aggregate != "none":
            raise ValueError("boxes are scored image by image: set aggregate to none")

    @cached_property
    def scores(self) -> DetectionScores:
        """Every metric."""
        return self._score(np.ones(len(self.frame), bool), self._settings.resamples)

    @cached_property
    def by_subgroup(self) -> dict[str, dict[str, Subgroup]]:
        """Attribute -> value -> its metrics; lesions by their size, too."""
        found = {
            attribute: {
                word: self._subgroup(np.array([value == word for value in values]))
                for word in sorted(set(values) - {""})
            }
            for attribute, values in subgroups(self.frame, self._settings.subgroups).items()
        }
        return found | ({ATTRIBUTE: self._by_size()} if self._sizes else {})

    @cached_property
    def gaps(self) -> dict[str, dict[str, dict[str, Gap]]]:
        """Attribute -> value -> how far it is from all others, as `metrics.subgroup_gaps` has it of labels.

        Lesions of a size are held against those of all other sizes, by sensitivity alone. A patient may have both,
        which makes that interval conservative (`estimates.difference_of`).
        """
        found: dict[str, dict[str, dict[str, Difference]]] = {}
        for attribute, values in subgroups(self.frame, self._settings.subgroups).items():
            words = sorted(set(values) - {"", "unknown"})
            known = np.isin(values, words)
            for word in words[: 1 if len(words) == 2 else None]:
                if len(words) == 1:
                    continue
                which = np.array([value == word for value in values])
                # What is compared has closed forms: nothing is resampled.
                here, others = (_for_forest(self._measured(rows, 0)) for rows in (which, known & ~which))
                found.setdefault(attribute, {})[word] = {
                    name: gap_between(here[name], others[name]) for name in here
                }
        sizes = list(self._sizes)
        for size in sizes[: 1 if len(sizes) == 2 else None]:
            if len(sizes) == 1:
                continue
            inside = self._sizes[size]
            found.setdefault(ATTRIBUTE, {})[size] = {
                "sensitivity": gap_between(self._found_of(inside), self._found_of(~inside))
            }
        return corrected(found)

    @staticmethod
    def predict(predictor: "Predictor", folder: DatasetFolder, sample_ids: Sequence[str]) -> pd.DataFrame:
        """The rows of the predictions file."""
        classes = predictor.bundle.manifest.classes
        answers = predictor.detect(predictor.stored(folder, sample_ids))
        found = detection_table(dict(zip(sample_ids, answers, strict=True)), classes)
        lesions = folder.boxes[folder.boxes["sample_id"].isin(sample_ids)]
        frame = described(folder, sample_ids)
        for name in classes:
            holds = lesions.loc[lesions["class"] == name, "sample_id"]
            frame[f"label_{name}"] = frame["sample_id"].isin(holds).astype(np.float64)
        columns = image_answers(found, sample_ids, classes, predictor.thresholds)
        frame = pd.concat([frame, columns], axis=1)
        frame["boxes"] = pd.Series(box_lists(found, sample_ids), dtype=object)
        frame["lesions"] = pd.Series(box_lists(lesions, sample_ids), dtype=object)
        return frame

    def record(self) -> dict[str, Any]:
        """Metrics, by class and by subgroup; of several seeds, each seed's values."""
        joined = {"by_seed": self.scores.by_seed, "between_seed_sd": self.scores.between_seed_sd}
        return {
            "metrics": dump(self.scores.metrics),
            **(joined if len(self.seeds) > 1 else {}),
            "by_class": {name: dump(values) for name, values in self.scores.by_class.items()},
            "by_subgroup": {attribute: dump(groups) for attribute, groups in self.by_subgroup.items()},
            "gaps": decisions.gaps_record(self.gaps),
            "n_lesions": self.scores.n_lesions,
        }

    def show_answer(self, page: Page) -> None:
        """Add the headline."""
        page.facts([(title(name), self.scores.metrics[name]) for name in HEADLINE])
        patients = f" of {self.n_patients:,} patients" if self.info.clustered else ""
        bundles = f", searched by {len(self.seeds)} bundles" if len(self.seeds) > 1 else ""
        page.text(
            f"{self.n:,} images{patients} of {judged_on(self.info.split)} with {self.scores.n_lesions:,} lesions"
            f"{bundles}. A box finds a lesion if it shares at least {self.scores.iou_threshold:.0%} of the area that "
            "the two cover together (IoU); AP asks for more as well. In brackets: 95 % confidence intervals."
        )

    def show_numbers(self, page: Page) -> None:
        """Add metrics, curves, decisions and subgroups."""
        show_metrics(
            page,
            self.scores,
            self.seeds,
            METRICS,
            "n counts the cases in the value's denominator: lesions, boxes or images.",
        )
        self._show_classes(page)
        self._show_curves(page)
        page.section("Decisions")
        page.text(self._rule())
        note = "Sensitivity is that of lesions; specificity and AUC are those of images."
        show_subgroups(page, self.by_subgroup, _for_forest(self.scores.metrics), note)
        decisions.show_gaps(page, self.gaps)

    def draw_curve(self, axes: "Axes") -> bool:
        """Draw the FROC curve; False where there is no lesion to find."""
        limits = froc_limits(
            self._found,
            self._lesions,
            self.frame["sample_id"].tolist(),
            _RATES.tolist(),
            classes=self.info.classes,
            patients=self._patients,
            seed=self.info.seed,
        )
        if limits is not None:
            draw_band(axes, Band(_RATES, *limits), "")
        axes.set_xscale("log", base=2)
        axes.set_xticks(FROC_RATES, ["1/8", "1/4", "1/2", "1", "2", "4", "8"])
        axes.minorticks_off()
        axes.set(
            title="FROC",
            xlabel="false positives per image",
            ylabel="sensitivity (lesions)",
            ylim=(-0.01, 1.01),
        )
        return limits is not None

    def mistakes(self) -> dict[str, list[Mistake]]:
        """Lesions that the first seed missed, and its false alarms, the most confident first."""
        called, lesions = self._matched
        least = lesions["class"].map(self.info.thresholds)
        missed = lesions[~(lesions["score"] >= least)]
        # Those that got the lowest score first; of those that got none, the largest.
        area = (missed["x1"] - missed["x0"]) * (missed["y1"] - missed["y0"])
        missed = missed.assign(rank=missed["score"].fillna(0.0), area=-area).sort_values(
            ["rank", "area", "sample_id"], kind="stable"
        )
        alarms = called[~called["hit"]].sort_values(
            ["score", "sample_id"], ascending=[False, True], kind="stable"
        )
        found = {}
        for heading, table in (("Missed", missed), ("False alarms", alarms)):
            found[heading] = [
                Mistake(
                    sample_id,
                    name if heading == "Missed" else f"no {name}",
                    "nothing" if heading == "Missed" else name,
                    None if np.isnan(score) else score,
                    corners,
                )
                for sample_id, name, score, corners in zip(
                    table["sample_id"].tolist(),
                    table["class"].tolist(),
                    table["score"].tolist(),
                    table[_COORDINATES].to_numpy(np.float64),
                    strict=True,
                )
            ]
        return found

    def picture(self, mistake: Mistake, folder: DatasetFolder) -> np.ndarray:
        """The image with its lesions, the boxes called in it, and above them the mistake itself."""
        called, lesions = self._matched
        boxes = [
            (table.loc[table["sample_id"] == mistake.sample_id, _COORDINATES].to_numpy(np.float64), colour)
            for table, colour in ((lesions, LESION_COLOUR), (called, BOX_COLOUR))
        ]
        assert mistake.box is not None
        pixels = draw_boxes(folder.pixels(mistake.sample_id), boxes)
        thick = max(3, max(pixels.shape) // 90)
        return draw_boxes(pixels, [(mistake.box, MISTAKE_COLOUR)], thick)

    def show_explanations(self, page: Page, folder: DatasetFolder, predictor: "Predictor") -> None:
        """Nothing: a box says itself where the evidence lies."""

    @cached_property
    def _matched(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The first seed's boxes that are called, and the lesions with the score that each got."""
        found, lesions = match_boxes(
            self._found[0], self._lesions, self.frame["sample_id"].tolist(), classes=self.info.classes
        )
        return found[found["score"] >= found["class"].map(self.info.thresholds)], lesions

    def _score(self, which: np.ndarray, resamples: int) -> DetectionScores:
        chosen = self.frame.loc[which, "sample_id"]
        return calculate_detection_metrics(
            [table[table["sample_id"].isin(chosen)] for table in self._found],
            self._lesions[self._lesions["sample_id"].isin(chosen)],
            chosen.tolist(),
            classes=self.info.classes,
            patients=None if self._patients is None else self._patients[which],
            score_threshold=self._thresholds,
            resamples=resamples,
            seed=self.info.seed,
        )

    def _measured(self, which: np.ndarray, resamples: int) -> dict[str, Estimate]:
        """The metrics of some images; none where there are too few patients."""
        num_patients = int(which.sum()) if self._patients is None else len(set(self._patients[which]))
        too_few = num_patients < self._settings.minimum_n
        # An interval that nobody will see is not drawn.
        metrics = self._score(which, 0 if too_few else resamples).metrics
        if not too_few:
            return metrics
        why = f"too few: {num_patients} patients, {self._settings.minimum_n} needed"
        return {name: _nothing(why, one.n) for name, one in metrics.items()}

    def _subgroup(self, which: np.ndarray) -> Subgroup:
        metrics = self._measured(which, self._settings.resamples)
        held = self._lesions["sample_id"].isin(self.frame.loc[which, "sample_id"])
        return _as_subgroup(int(which.sum()), int(held.sum()), metrics)

    @cached_property
    def _sizes(self) -> dict[str, np.ndarray]:
        """Size -> which lesions have it, of the sizes that any has."""
        areas = (self._lesions[["x1", "y1"]].to_numpy() - self._lesions[["x0", "y0"]].to_numpy()).prod(axis=1)
        inside = {size: (low <= areas) & (areas <= high) for size, (low, high) in AREAS_PX2.items()}
        return {size: which for size, which in inside.items() if size != "all" and which.any()}

    @cached_property
    def _caught(self) -> tuple[np.ndarray, np.ndarray]:
        """S L, which lesions each seed's called boxes find; and whose they are."""
        images = self.frame["sample_id"].tolist()
        keys, found = ["sample_id", "class", *_COORDINATES], []
        for table, thresholds in zip(self._found, self._thresholds, strict=True):
            _, matched = match_boxes(table, self._lesions, images, classes=self.info.classes)
            called = matched["score"] >= matched["class"].map(thresholds)
            # Matched lesions come by class: back into the order of the file, equal ones one after another.
            places = [
                one.sort_values(keys, kind="stable").index
                for one in (self._lesions.reset_index(drop=True), matched)
            ]
            row = np.empty(len(called), bool)
            row[places[0]] = called.to_numpy()[places[1]]
            found.append(row)
        owner = self._lesions["sample_id"].to_numpy(object)
        if self._patients is not None:
            owner = pd.Series(self._patients, index=images).loc[owner].to_numpy(object)
        return np.array(found), owner

    def _too_few(self, which: np.ndarray) -> str:
        """Why lesions are too few to judge, "" if they are not: the rule of `metrics.score_subgroups`."""
        num_patients, needed = len(set(self._caught[1][which])), self._settings.minimum_n
        return (
            f"too few: {num_patients} patients with lesions, {needed} needed" if num_patients < needed else ""
        )

    def _found_of(self, which: np.ndarray) -> Estimate:
        """The share of some lesions that is found."""
        if why := self._too_few(which):
            return _nothing(why, int(which.sum()))
        caught, owner = self._caught
        return share_of(caught[:, which], owner[which])

    def _by_size(self) -> dict[str, Subgroup]:
        """Lesions of each size: what is said of images has no size."""
        groups = {}
        for size, inside in self._sizes.items():
            images = self._lesions.loc[inside, "sample_id"].nunique()
            of_images = _nothing("undefined: an image has no lesion size", 0)
            of_lesions = {name: self.scores.metrics[f"{name}_{size}"] for name in ("sensitivity", "ap")}
            if why := self._too_few(inside):
                of_lesions = {name: _nothing(why, one.n) for name, one in of_lesions.items()}
            metrics = {"image_specificity": of_images, "image_auc": of_images, **of_lesions}
            groups[size] = _as_subgroup(images, int(inside.sum()), metrics)
        return groups

    def _show_classes(self, page: Page) -> None:
        if len(self.info.classes) > 1:
            page.table(
                [
                    {"metric": title(metric)}
                    | {name: estimates[metric] for name, estimates in self.scores.by_class.items()}
                    for metric in HEADLINE
                ],
                "Each class alone.",
            )

    def _show_curves(self, page: Page) -> None:
        page.section("Curves")
        images, classes = self.frame["sample_id"].tolist(), self.info.classes
        if self._lesions.empty:
            page.text("There is no lesion to find: no curve can be drawn.")
            return
        drawing, (froc_axes, precision_axes) = panels(8.6, 3.6, columns=2)
        self.draw_curve(froc_axes)
        for name, colour in zip(classes, PALETTE * len(classes), strict=False):
            lesions = self._lesions[self._lesions["class"] == name]
            for number, table in enumerate(self._found):
                curve = froc_curve(table[table["class"] == name], lesions, images, classes=[name])
                if curve.sensitivity.size:
                    precision_axes.step(
                        curve.sensitivity,
                        curve.precision,
                        where="post",
                        color=colour,
                        linewidth=1.8 if len(self.seeds) == 1 else 1.0,
                        label="" if number else name,
                    )
        rate, found = (
            self.scores.metrics[name].value for name in ("false_positives_per_image", "sensitivity")
        )
        if rate is not None and found is not None:
            froc_axes.plot(
                np.clip(rate, _RATES[0], _RATES[-1]),
                found,
                "o",
                color=INK,
                markersize=5,
                clip_on=False,
                zorder=3,
            )
        square(precision_axes, "recall (sensitivity)", "precision")
        precision_axes.set_title("Precision-recall at an IoU of 0.5")
        precision_axes.legend(loc="lower left", fontsize=8)
        page.figure(
            drawing,
            "Left: lesions found against false alarms, one score threshold for all classes. Band: pointwise 95 % "
            f"limits, bootstrap of {'patients' if self.info.clustered else 'images'}; the black dot is the operating "
            "point, which has a threshold for each class and may lie beside the curve."
            + (" Right: a line for each seed." * (len(self.seeds) > 1)),
            alt=f"FROC curve and precision-recall curves of {', '.join(classes)}",
        )

    def _rule(self) -> str:
        if len(self.seeds) > 1:
            return "Each seed's boxes are called at the thresholds that its own bundle holds."
        rules = ", ".join(
            f"{name!r} is called at a score of {value:.4f} or more"
            for name, value in self.info.thresholds.items()
        )
        return f"{rules}. The threshold is frozen in its bundle."


def _nothing(why: str, n: int) -> Estimate:
    return Estimate(value=None, low=None, high=None, n=n, method=why)


def _for_forest(metrics: Mapping[str, Estimate]) -> dict[str, Estimate]:
    """The three that a forest plot of subgroups shows, under the names that every kind has for them."""
    return {
        "sensitivity": metrics["sensitivity"],
        "specificity": metrics["image_specificity"],
        "auc": metrics["image_auc"],
    }


def _as_subgroup(n: int, n_lesions: int, metrics: Mapping[str, Estimate]) -> Subgroup:
    # Of images, specificity and AUC stand under their own names too: a gate asks for them by these.
    rest = {name: estimate for name, estimate in metrics.items() if name != "sensitivity"}
    return Subgroup(n=n, n_positive=n_lesions, **_for_forest(metrics), metrics=rest)
