"""Search hyper-parameters on val: recipes are trained one after another, and the best is written as one to paste.

A search is no stage of the pipeline: it comes before it, takes hours, and ends with somebody's decision. It writes a
parameter file that `cadx train --params BEST:experiment` reads as it is; what of it goes into params.yaml is for that
person to say.
"""

import json
import math
import textwrap
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from cadx.bundle import versions
from cadx.datasets import DatasetFolder, read_splits
from cadx.files import digest_path
from cadx.reporting import MUTED, PALETTE, Page, figure, panels
from cadx.searching import (
    LEFT_OUT,
    Choices,
    Found,
    OnEpoch,
    Range,
    SearchConfig,
    best_so_far,
    final_value,
    number_text,
)
from cadx.searching import search as search_recipes
from cadx.settings import explain
from cadx.training import TrainingConfig, monitored
from components.contract import (
    In,
    Keep,
    Out,
    Params,
    code_digest,
    read_params,
    source_digests,
    step,
)
from components.train import TrainParams

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from optuna.trial import FrozenTrial

    from cadx.training.loop import Fitted

NUM_ROWS_SHOWN = 500
MAX_CURVES = 60  # of the latest trials; more lines hide one another


class SearchParams(SearchConfig, Params):
    """Where to search and for how long; what is searched is the recipe of `train`."""


@step
def search(
    *,
    recipe: In,
    dataset: In,
    splits: In,
    imbalance: In,
    study: Keep,
    best: Out,
    report: Out,
    experiment: str,
    seed: int,
    params: SearchParams,
) -> None:
    """Try recipes by training them on train, compare them on val, and write the best.

    `recipe` is the parameter file whose section `train` is varied. A search that was killed goes on where it
    stopped; one that came to its end goes on when num_trials grows. Calibration and test are never read.

    Raises:
        ValueError: if the space does not fit the recipe, the study is of another search, or every trial fails.
    """
    base = read_params(f"{recipe}:{experiment}", "train", TrainParams)
    folder = DatasetFolder(dataset)
    folder.verify()
    frame = read_splits(splits)
    frame = frame[frame["split"].isin(["train", "val"])].reset_index(drop=True)
    code = code_digest(source_digests("train"))
    plain = _plain(base, base.resolve(imbalance), params)
    from cadx.training.loop import fit  # torch takes seconds: bad input is refused before

    def build(section: Mapping[str, Any]) -> TrainingConfig:
        kept = {name: value for name, value in section.items() if name not in LEFT_OUT}
        try:
            return TrainParams.model_validate(kept).resolve(imbalance)
        except ValidationError as error:
            raise ValueError(explain(error, "train", kept)) from None

    def train(config: TrainingConfig, checkpoints: Path, on_epoch: OnEpoch) -> "Fitted":
        return fit(config, folder, frame, seed=seed, checkpoints=checkpoints, code=code, on_epoch=on_epoch)

    monitor = monitored(base, folder.info.task)
    found = search_recipes(
        params,
        plain,
        build,
        train,
        monitor=monitor,
        study=study,
        origin={
            "dataset": digest_path(dataset / "dataset.json"),
            "splits": frame[["sample_id", "split"]].to_csv(index=False),
            "recommendation of imbalance": build(plain).model_dump(mode="json", include={"loss", "sampler"}),
            "version of the code or its libraries": [code, versions()],
        },
        seed=seed,
    )
    text = yaml.safe_dump({experiment: {"train": found.recipe}}, sort_keys=False, allow_unicode=True)
    num_val = int((frame["split"] == "val").sum())
    best.write_text(
        f"# Trial {found.best.number + 1} of {len(found.trials)}: val {_name(monitor)} {found.best.value:.4f} on"
        f" {num_val} samples, on which it was chosen.\n{text}",
        encoding="utf-8",
    )
    _page(experiment, found, params, build(plain), monitor, num_val, seed).write(report)


def _plain(base: TrainParams, resolved: TrainingConfig, params: SearchParams) -> dict[str, Any]:
    """The recipe as its author wrote it; a loss whose fields vary is spelled out instead of "auto"."""
    plain = base.model_dump(mode="json", exclude_unset=True)
    if base.loss == "auto" and any(path.startswith("loss.") for path in params.space):
        plain["loss"] = resolved.loss.model_dump(mode="json", exclude_defaults=True)
    return plain


def _name(monitor: str) -> str:
    return monitor if monitor == "loss" else monitor.upper()


def _page(
    experiment: str,
    found: Found,
    params: SearchParams,
    stands: TrainingConfig,
    monitor: str,
    num_val: int,
    seed: int,
) -> Page:
    states = [trial.state.name for trial in found.trials]
    counts = {state: states.count(state) for state in ("COMPLETE", "PRUNED", "FAIL")}
    best, value = found.best, f"val {_name(monitor)}"
    page = Page(f"{experiment}: search", f"{len(states)} recipes, compared on val")
    facts: list[tuple[str, Any]] = [(f"Best {value}", best.value)]
    if found.unchanged is not None:
        facts.append(("Recipe as it stands", found.unchanged.value))
    facts += [
        ("Complete", counts["COMPLETE"]),
        ("Stopped early", counts["PRUNED"]),
        ("Failed", counts["FAIL"]),
        ("Training, minutes", f"{sum(trial.user_attrs['seconds'] for trial in found.trials) / 60:.1f}"),
    ]
    page.facts(facts)
    page.callout(
        "warn",
        f"The best of {counts['COMPLETE']} was chosen on the same {num_val:,} samples of val that its {value} is"
        " measured on, so that number flatters. The test split was not read. Before you trust the recipe, train it with"
        " other seeds; score test once, when nothing is changed any more.",
    )
    if found.unchanged is None:
        page.text("The space does not hold the recipe as it stands, so it was not among the trials.")
    elif best.number == found.unchanged.number:
        page.callout("ok", "No trial did better than the recipe as it stands: keep it.")
    page.section("The best recipe")
    page.text(
        f"Trial {best.number + 1}, at epoch {best.user_attrs['best_epoch']}. What it changes of the recipe, and how"
        f" much each parameter mattered; every trial was trained with seed {seed}."
    )
    current = stands.model_dump(mode="json")
    chosen = params.values(best)
    rows = [
        {
            "parameter": path,
            "searched": str(dimension),
            "recipe": _current(found, current, path),
            "best": _shown(chosen[path]),
            **({"importance": found.importances.get(path)} if found.importances else {}),
        }
        for path, dimension in params.space.items()
    ]
    caption = (
        "Importance: the share of the differences between complete trials that a parameter alone explains, by fANOVA"
        " in a random forest; a rough guide with few trials."
        if found.importances
        else ""
    )
    page.table(rows, caption, formats={"importance": ".2f"})
    with page.details("As YAML, to paste into params.yaml"):
        flow = yaml.safe_dump(found.recipe, sort_keys=False, default_flow_style=True, width=10**6)
        page.text(f"train: {flow}")
    _draw(page, found, params, monitor)
    _trials(page, found, params, monitor)
    return page


def _current(found: Found, stands: Mapping[str, Any], path: str) -> str | None:
    value: Any = stands
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if isinstance(value, dict):  # with every default: the choice that it is says it shorter
        return None if found.unchanged is None else str(found.unchanged.params[path])
    return _shown(value)


def _shown(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list | tuple | bool) else number_text(value)


def _draw(page: Page, found: Found, params: SearchParams, monitor: str) -> None:
    """The course of the search, its learning curves, and a panel per parameter."""
    value = f"val {_name(monitor)}"
    page.section("The course of the search")
    drawing, axes = figure(7.2, 3.0)
    _points(axes, found, monitor, lambda trial: trial.number + 1)
    better = min if monitor == "loss" else max
    complete = [trial for trial in found.trials if trial.state.name == "COMPLETE"]
    heights = list(accumulate(map(final_value, complete), better))
    steps = [trial.number + 1 for trial in complete]
    axes.step(
        [*steps, len(found.trials)],
        [*heights, heights[-1]],
        where="post",
        color=PALETTE[0],
        label="best so far",
    )
    if found.unchanged is not None:
        axes.axhline(
            final_value(found.unchanged),
            color=MUTED,
            linewidth=0.8,
            linestyle=(0, (4, 3)),
            label="recipe as it stands",
        )
    axes.set_xlabel("trial")
    axes.set_ylabel(value)
    _whole_numbers(axes)
    axes.legend(loc="best", fontsize=8)
    page.figure(
        drawing,
        f"Each trial's {value} at its best epoch. Those stopped early are shown with what they had reached.",
    )

    drawing, axes = figure(7.2, 3.0)
    for trial in found.trials[-MAX_CURVES:]:
        if trial.number != found.best.number:
            is_pruned = trial.state.name == "PRUNED"
            _curve(axes, trial, color=PALETTE[1] if is_pruned else MUTED, linewidth=0.9, alpha=0.6)
    _curve(axes, found.best, color=PALETTE[0], linewidth=2, label=f"the best: trial {found.best.number + 1}")
    axes.plot([], [], color=MUTED, linewidth=0.9, label="complete")
    if any(trial.state.name == "PRUNED" for trial in found.trials):
        axes.plot([], [], color=PALETTE[1], linewidth=0.9, label="stopped early")
    axes.set_xlabel("epoch")
    axes.set_ylabel(value)
    _whole_numbers(axes)
    axes.legend(loc="best", fontsize=8)
    shown = "" if len(found.trials) <= MAX_CURVES else f" The best and the last {MAX_CURVES} trials."
    page.figure(drawing, f"{value[0].upper()}{value[1:]} by epoch.{shown}")

    page.section("Each parameter")
    columns = min(3, len(params.space))
    rows = -(-len(params.space) // columns)
    drawing, panes = panels(8.6 if columns > 1 else 4.6, 0.4 + 2.5 * rows, columns=columns, rows=rows)
    for axes in panes[len(params.space) :]:
        axes.set_visible(False)
    for axes, (path, dimension) in zip(panes, params.space.items(), strict=False):
        _slice(axes, found, monitor, path, dimension)
    for number, axes in enumerate(panes):
        if number % columns == 0:
            axes.set_ylabel(value)
    page.figure(
        drawing,
        f"{value[0].upper()}{value[1:]} over each parameter alone; the others differ from point to point. Marks are"
        " as in the course. A best value at the edge of its range asks for a wider one.",
    )


def _curve(axes: "Axes", trial: "FrozenTrial", **style: Any) -> None:
    epochs = sorted(trial.intermediate_values)
    marker = "." if len(epochs) == 1 else None
    axes.plot(epochs, [trial.intermediate_values[epoch] for epoch in epochs], marker=marker, **style)


def _points(axes: "Axes", found: Found, monitor: str, place: Callable[["FrozenTrial"], float]) -> None:
    """A dot for each trial with an epoch: full if complete, hollow if stopped early, ringed if the best."""
    for state, label, color, face in (
        ("COMPLETE", "complete", MUTED, MUTED),
        ("PRUNED", "stopped early", PALETTE[1], "none"),
    ):
        points = [
            (place(trial), value)
            for trial in found.trials
            if trial.state.name == state and (value := best_so_far(trial, monitor)) is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axes.scatter(x, y, s=18, facecolors=face, edgecolors=color, label=label, zorder=3)
    ring: dict[str, Any] = {"facecolors": "none", "edgecolors": PALETTE[0], "linewidths": 1.8}
    axes.scatter([place(found.best)], [final_value(found.best)], s=90, label="the best", zorder=4, **ring)


def _whole_numbers(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))


def _slice(axes: "Axes", found: Found, monitor: str, path: str, dimension: Range | Choices) -> None:
    if isinstance(dimension, Choices):
        labels = list(dimension.by_label)
        _points(axes, found, monitor, lambda trial: labels.index(trial.params[path]))
        axes.set_xticks(range(len(labels)), [textwrap.fill(label, 16) for label in labels], fontsize=8)
        axes.set_xlim(-0.5, len(labels) - 0.5)
    else:
        _points(axes, found, monitor, lambda trial: trial.params[path])
        if dimension.log:
            axes.set_xscale("log")
        elif all(isinstance(trial.params[path], int) for trial in found.trials):
            _whole_numbers(axes)
    axes.set_xlabel(path)


def _trials(page: Page, found: Found, params: SearchParams, monitor: str) -> None:
    page.section("Trials")
    sign = 1 if monitor == "loss" else -1
    order = {"COMPLETE": 0, "PRUNED": 1, "FAIL": 2}

    def rank(trial: "FrozenTrial") -> tuple[float, ...]:
        reached = best_so_far(trial, monitor)
        return order[trial.state.name], math.inf if reached is None else sign * reached, trial.number

    ranked = sorted(found.trials, key=rank)
    page.table(
        [
            {
                "trial": trial.number + 1,
                f"val {_name(monitor)}": best_so_far(trial, monitor),
                "how it ended": _ended(trial),
                **{path: _shown(value) for path, value in params.values(trial).items()},
                "seconds": trial.user_attrs["seconds"],
            }
            for trial in ranked[:NUM_ROWS_SHOWN]
        ],
        "Complete trials, the best first; then those that were stopped early, then those that failed."
        + ("" if len(ranked) <= NUM_ROWS_SHOWN else f" The first {NUM_ROWS_SHOWN} of {len(ranked):,}."),
        formats={f"val {_name(monitor)}": ".4f", "seconds": ".0f"},
    )
    if params.prune:
        page.text(
            "A trial is stopped after an epoch if its best epoch so far lies below the median of the complete trials'"
            f" at that epoch; never in its first {params.prune_after_epochs}, and not before"
            f" {params.prune_after_trials} trials are complete."
        )
    if failed := [trial for trial in found.trials if trial.state.name == "FAIL"]:
        page.section("Trials that failed")
        page.table(
            [
                {"trial": trial.number + 1, "why": trial.user_attrs["reason"]}
                for trial in failed[:NUM_ROWS_SHOWN]
            ],
            "The search takes them as worse than any other, and looks elsewhere.",
        )


def _ended(trial: "FrozenTrial") -> str:
    if trial.state.name == "COMPLETE":
        return f"complete, best at epoch {trial.user_attrs['best_epoch']}"
    if trial.state.name == "PRUNED":
        return f"stopped after epoch {max(trial.intermediate_values)}"
    return "failed"
