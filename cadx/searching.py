"""Hyper-parameter search: which recipe does best on val, found by training, one trial after another.

Invariants: what a trial tries is a pure function of (seed, the trials before it), and so is where it is stopped.
A search that was killed and goes on therefore makes the trials of one that was not. Trials see the train and
val splits alone: whoever calls `search` gives it a way to train that knows no other.
"""

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import numpy as np
from pydantic import Discriminator, Field, Tag, model_validator
from rich.console import Console

from cadx.files import canonical_json, digest_bytes, locked
from cadx.training.recipe import WITHOUT_EFFECT, TrainingConfig
from cadx.types import Config

if TYPE_CHECKING:
    from optuna import Study
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial, Trial

    from cadx.training.loop import Fitted

OnEpoch = Callable[[dict[str, Any]], None]
"""Called with each epoch's history record, those before a resume included; what it raises ends the training."""
Train = Callable[[TrainingConfig, Path, OnEpoch], "Fitted"]
"""Trains a configuration on train and val, with checkpoints in a folder that outlives a kill."""
Build = Callable[[Mapping[str, Any]], TrainingConfig]
"""Checks a recipe as it stands in a parameter file; a ValueError says in one line what is wrong with it."""

LEFT_OUT = {"ensemble", "folds", "tracking"}
"""Fields of a recipe that say how often, and how watched, it is trained: a trial trains one network."""
IMPORTANCE_TRIALS = 10  # complete ones; the forest behind importances is noise with fewer


class Range(Config):
    """Numbers from `low` to `high`, both included: whole ones where both ends are and the recipe's value is.

    Attributes:
        log: draw evenly on a logarithmic scale, as suits learning rates.
        step: distance between the values; null for any value.
    """

    low: float
    high: float
    log: bool = False
    step: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low {self.low:g} must lie below high {self.high:g}")
        if self.log and (self.low <= 0 or self.step is not None):
            raise ValueError("log needs low above 0 and no step")
        if self.step is not None and self.step > self.high - self.low:
            raise ValueError(f"step {self.step:g} is wider than the range")
        return self

    def ends(self) -> tuple[float, float]:
        """The least and the greatest value that can be drawn."""
        if self.step is None:
            return self.low, self.high
        return self.low, self.low + math.floor((self.high - self.low) / self.step + 1e-9) * self.step

    def holds(self, value: Any) -> bool:
        """Whether `value` could be drawn.

        >>> scale = Range(low=0.1, high=0.5, step=0.2)
        >>> [scale.holds(value) for value in (0.3, 0.4, 0.7, None)]
        [True, False, False, False]
        """
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.ends()
        steps = 0.0 if self.step is None else (value - low) / self.step
        return low <= value <= high and math.isclose(steps, round(steps), abs_tol=1e-9)

    def __str__(self) -> str:
        low, high = self.ends()
        text = f"{low:g} to {high:g}"
        return text + (" (log)" if self.log else f" by {self.step:g}" if self.step else "")


class Choices(Config):
    """One of some values, which may be whole sections, such as {family: densenet}.

    >>> list(Choices(choices=("focal", 2, {"family": "resnet"})).by_label)
    ['focal', '2', '{"family": "resnet"}']
    """

    choices: Annotated[tuple[Any, ...], Field(min_length=2)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.by_label) < len(self.choices):
            raise ValueError("each choice must differ from the others")
        return self

    @property
    def by_label(self) -> dict[str, Any]:
        """The choices by the texts that name them."""
        return {self._label(choice): choice for choice in self.choices}

    @staticmethod
    def _label(choice: Any) -> str:
        if isinstance(choice, float) and choice.is_integer():  # 16.0 is 16 that came as JSON
            choice = int(choice)
        return choice if isinstance(choice, str) else json.dumps(choice)

    def __str__(self) -> str:
        return ", ".join(self.by_label)


def _kind(dimension: Any) -> str:
    is_choice = "choices" in dimension if isinstance(dimension, dict) else isinstance(dimension, Choices)
    return "choices" if is_choice else "range"


Dimension = Annotated[
    Annotated[Range, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_kind)
]


class SearchConfig(Config):
    """Where to search, and for how long.

    Attributes:
        space: what may vary, by its dotted place in the recipe (`model.dropout`); the rest stays as it is.
        num_trials: recipes tried, those that were stopped or failed among them.
        timeout_minutes: of training over all trials, after which no new one starts; null for none.
        random_trials: drawn at random before earlier trials guide the choice.
        prune: stop a trial whose best epoch so far lies below the median of earlier trials at that epoch.
        prune_after_trials: complete trials before any is stopped.
        prune_after_epochs: epochs that every trial is given.
    """

    space: dict[str, Dimension] = Field(
        default={
            "learning_rate": Range(low=1e-4, high=1e-2, log=True),
            "weight_decay": Range(low=1e-4, high=1e-1, log=True),
        },
        min_length=1,
    )
    num_trials: Annotated[int, Field(ge=1)] = 30
    timeout_minutes: Annotated[float, Field(gt=0)] | None = None
    random_trials: Annotated[int, Field(ge=1)] = 10
    prune: bool = True
    prune_after_trials: Annotated[int, Field(ge=1)] = 5
    prune_after_epochs: Annotated[int, Field(ge=0)] = 2

    def values(self, trial: "FrozenTrial | Trial") -> dict[str, Any]:
        """What a trial puts into the recipe, by dotted place."""
        return {
            path: dimension.by_label[trial.params[path]]
            if isinstance(dimension, Choices)
            else trial.params[path]
            for path, dimension in self.space.items()
        }


@dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
        trials: all of them, in order. `value` is the monitor at the best epoch; `intermediate_values` the
            monitor by epoch, 1-based; `user_attrs` seconds, best_epoch (complete), reason (failed).
        best: the complete trial that did best; of equals the earliest.
        recipe: the best trial's recipe, in the words of the given one.
        unchanged: the first trial, if it tried the given recipe as it stands; else None.
        importances: place -> share of the differences between complete trials that it explains; empty where
            they are too few to say.
    """

    trials: "tuple[FrozenTrial, ...]"
    best: "FrozenTrial"
    recipe: dict[str, Any]
    unchanged: "FrozenTrial | None"
    importances: dict[str, float]


class _Pruned(Exception):
    """The trial lies below the median."""


def with_values(recipe: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `recipe` with `values` put in at their dotted places, outer ones first.

    >>> with_values({"model": {"family": "resnet"}}, {"model.dropout": 0.3, "epochs": 4})
    {'model': {'family': 'resnet', 'dropout': 0.3}, 'epochs': 4}

    Raises:
        ValueError: if a place lies inside something that has no fields.
    """
    changed: dict[str, Any] = json.loads(json.dumps(recipe))
    # Copies, too: an inner value must not be put into the choice that an outer one is.
    copied: dict[str, Any] = json.loads(json.dumps(values))
    for path, value in sorted(copied.items(), key=lambda item: item[0].count(".")):
        *outer, last = path.split(".")
        section = changed
        for depth, name in enumerate(outer, start=1):
            section = section.setdefault(name, {})
            if not isinstance(section, dict):
                raise ValueError(f"{'.'.join(outer[:depth])} is {section!r} in the recipe and has no {last}")
        section[last] = value
    return changed


def search(
    config: SearchConfig,
    recipe: Mapping[str, Any],
    build: Build,
    train: Train,
    *,
    monitor: str,
    study: Path,
    origin: Mapping[str, Any],
    seed: int,
) -> Found:
    """Try recipes until there are `num_trials`; go on where a killed search of the same kind stopped.

    The first trial is the recipe as it stands, if the space holds it. A trial that ends in a ValueError counts as
    failed, and as worse than any other for the choice of the next.

    Source: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization", section 4 (TPE), with joint
    densities (Falkner et al. 2018, "BOHB", section 3.2), as Optuna has them; the median rule of Golovin et al.
    2017, "Google Vizier", section 3.2.2, on the best epoch so far.

    Args:
        config: space and limits.
        recipe: the section `train` of a parameter file, plain values.
        build: checks a recipe.
        train: trains one.
        monitor: what trials are compared by; "loss" is the better the lower.
        study: the folder in which trials are kept, study.db in Optuna's form.
        origin: what the trials rest on beside the recipe, by name (data, splits, ...): a study of another
            origin is not gone on with.
        seed: of the choice of trials, 0 or more.

    Raises:
        ValueError: if the space does not fit the recipe, the study is of another search or in use, or no
            trial came to its end.
    """
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        raise ValueError("optuna is not installed: it is the extra 'search'; run `make setup`") from None
    space = _distributions(config, recipe, build, monitor)
    busy = f"{study}: another search is at work there; wait, or name another --study"
    with (
        locked(study / "lock", busy),
        _quiet(),
        _opened(study, config, recipe, origin, monitor, seed) as store,
    ):
        as_it_stands = _as_it_stands(config, recipe, build)
        show = _Display(config, monitor)
        while not _enough(trials := store.get_trials(), config):
            trial = _ask(trials, space, config, monitor, seed, as_it_stands)
            store.add_trial(_try(trial, config, recipe, build, train, monitor, study / "running"))
            shutil.rmtree(study / "running", ignore_errors=True)
            show.trial(store.get_trials())
        return _found(store, config, recipe, monitor, as_it_stands)


def _distributions(
    config: SearchConfig, recipe: Mapping[str, Any], build: Build, monitor: str
) -> "dict[str, BaseDistribution]":
    """The space in Optuna's words.

    Raises:
        ValueError: if a place is not one of the recipe's, its values are not allowed there, or it must not vary.
    """
    stands = build(recipe).model_dump(mode="json")
    found = {}
    for path, dimension in config.space.items():
        where, top = f"search.space.{path}", path.partition(".")[0]
        if top == "monitor":
            raise ValueError(f"{where}: trials are compared by it; take it out of the space")
        if top in LEFT_OUT | WITHOUT_EFFECT:
            raise ValueError(f"{where}: makes no difference to a trial on val; take it out of the space")
        if top == "loss" and monitor == "loss":
            raise ValueError(f"{where}: losses of other kinds do not compare; set train.monitor: auc")
        values = dimension.choices if isinstance(dimension, Choices) else dimension.ends()
        inside_another = any(path.startswith(f"{other}.") for other in config.space)
        for value in () if inside_another else values:
            try:
                build(with_values(recipe, {path: value}))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        found[path] = _distribution(dimension, _value_at(stands, path))
    return found


def _distribution(dimension: Range | Choices, stands: Any) -> "BaseDistribution":
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choices):
        return CategoricalDistribution(tuple(dimension.by_label))
    low, high = dimension.ends()
    # Not by type: Kubeflow hands 7 over as 7.0.
    is_whole = all(float(number).is_integer() for number in (low, high, dimension.step or 1))
    if is_whole and not isinstance(stands, float):
        return IntDistribution(int(low), int(high), log=dimension.log, step=int(dimension.step or 1))
    return FloatDistribution(low, high, log=dimension.log, step=dimension.step)


def _value_at(recipe: Mapping[str, Any], path: str) -> Any:
    value: Any = recipe
    for name in path.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _as_it_stands(config: SearchConfig, recipe: Mapping[str, Any], build: Build) -> dict[str, Any] | None:
    """The recipe's own values as Optuna's parameters; None if the space does not hold them all."""
    stands = build(recipe)
    params: dict[str, Any] = {}
    for path, dimension in config.space.items():
        if isinstance(dimension, Range):
            value = _value_at(stands.model_dump(mode="json"), path)
            same = [value] if dimension.holds(value) else []
        else:
            same = [
                label
                for label, choice in dimension.by_label.items()
                if build(with_values(recipe, {path: choice})) == stands
            ]
        if not same:
            return None
        params[path] = same[0]
    return params


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's own log: a line per trial is ours."""
    from optuna import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


@contextmanager
def _opened(
    folder: Path,
    config: SearchConfig,
    recipe: Mapping[str, Any],
    origin: Mapping[str, Any],
    monitor: str,
    seed: int,
) -> "Iterator[Study]":
    """The study in `folder`, a new one if there is none.

    It holds finished trials alone, so that a kill at any time leaves it in order.

    Raises:
        ValueError: if it cannot be read, or is of another search.
    """
    import optuna
    from sqlalchemy.exc import SQLAlchemyError

    path = folder / "study.db"
    # How long to search is no part of what is searched: a study may be prolonged.
    parts = {
        "recipe": {name: value for name, value in recipe.items() if name not in LEFT_OUT | WITHOUT_EFFECT},
        "space or settings": config.model_dump(mode="json", exclude={"num_trials", "timeout_minutes"}),
        "monitor": monitor,
        "seed": seed,
        **origin,
    }
    key = {name: digest_bytes(canonical_json(part).encode()) for name, part in parts.items()}
    try:
        storage = optuna.storages.RDBStorage(f"sqlite:///{path.resolve()}")
        study = optuna.create_study(
            storage=storage,
            study_name="search",
            direction=_direction(monitor),
            load_if_exists=True,
        )
        known = study.user_attrs.get("key")
        if known is None:
            study.set_user_attr("key", key)
    except (SQLAlchemyError, RuntimeError, optuna.exceptions.OptunaError):
        raise ValueError(
            f"{path}: not a study that this version of Optuna reads; remove {folder}, or name another --study"
        ) from None
    if known not in (None, key):
        changed = [name for name in key if known.get(name) != key[name]]
        raise ValueError(
            f"{folder}: holds a search with another {' and another '.join(changed)}; remove the folder to search"
            " anew, or name another --study"
        )
    try:
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _direction(monitor: str) -> Literal["minimize", "maximize"]:
    return "minimize" if monitor == "loss" else "maximize"


def _enough(trials: "list[FrozenTrial]", config: SearchConfig) -> bool:
    seconds = sum(trial.user_attrs["seconds"] for trial in trials)
    limit = math.inf if config.timeout_minutes is None else 60 * config.timeout_minutes
    return len(trials) >= config.num_trials or seconds >= limit


def _ask(
    trials: "list[FrozenTrial]",
    space: "dict[str, BaseDistribution]",
    config: SearchConfig,
    monitor: str,
    seed: int,
    as_it_stands: dict[str, Any] | None,
) -> "Trial":
    """The next trial: a function of its arguments alone.

    Optuna's samplers draw from one stream of random numbers that no storage keeps. So each trial has a sampler of its
    own, seeded by its number, over a study in memory that holds the trials before it.
    """
    import optuna

    sampler = optuna.samplers.TPESampler(
        seed=int(np.random.SeedSequence((seed, len(trials))).generate_state(1)[0]),
        n_startup_trials=config.random_trials,
        multivariate=True,
        constant_liar=False,  # one trial at a time
    )
    # The rule that epoch e is judged from warm-up step e on; ours lets the first ones pass.
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if config.prune:
        pruner = optuna.pruners.MedianPruner(
            n_startup_trials=config.prune_after_trials, n_warmup_steps=config.prune_after_epochs + 1
        )
    study = optuna.create_study(direction=_direction(monitor), sampler=sampler, pruner=pruner)
    study.add_trials([_as_sampler_sees(trial) for trial in trials])
    if not trials and as_it_stands is not None:
        study.enqueue_trial(as_it_stands)
    return study.ask(space)


def _as_sampler_sees(trial: "FrozenTrial") -> "FrozenTrial":
    """A failed trial as one stopped before its first epoch, which TPE ranks last.

    TPE passes over failed ones: it would go on proposing learning rates that diverge.
    """
    import optuna

    if trial.state is not optuna.trial.TrialState.FAIL:
        return trial
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.PRUNED, params=trial.params, distributions=trial.distributions
    )


def _try(
    trial: "Trial",
    config: SearchConfig,
    recipe: Mapping[str, Any],
    build: Build,
    train: Train,
    monitor: str,
    folder: Path,
) -> "FrozenTrial":
    """Train a trial, or go on with it, and say how it ended."""
    from optuna.trial import TrialState, create_trial

    started, seconds = time.perf_counter(), 0.0
    curve: dict[int, float] = {}
    outcome: dict[str, Any] = {}
    attributes: dict[str, Any] = {}

    def on_epoch(record: dict[str, Any]) -> None:
        nonlocal seconds
        seconds += record["seconds"]
        curve[record["epoch"]] = value = float(record[f"val_{monitor}"])
        trial.report(value, record["epoch"])
        if trial.should_prune():
            raise _Pruned

    try:
        fitted = train(build(with_values(recipe, config.values(trial))), folder, on_epoch)
    except _Pruned:
        outcome["state"] = TrialState.PRUNED
    except ValueError as error:
        outcome["state"] = TrialState.FAIL
        attributes["reason"] = " ".join(str(error).split())
    else:
        outcome |= {"state": TrialState.COMPLETE, "value": curve[fitted.best_epoch]}
        attributes["best_epoch"] = fitted.best_epoch
    # The clock sees what came before the first epoch, the epochs what a killed process trained.
    attributes["seconds"] = round(max(seconds, time.perf_counter() - started), 3)
    return create_trial(
        **outcome,
        params=trial.params,
        distributions=trial.distributions,
        intermediate_values=curve,
        user_attrs=attributes,
    )


def final_value(trial: "FrozenTrial") -> float:
    """A complete trial's monitor at its best epoch."""
    assert trial.value is not None, f"trial {trial.number} is not complete"
    return trial.value


def best_so_far(trial: "FrozenTrial", monitor: str) -> float | None:
    """A trial's monitor at its best epoch, complete or not; None without an epoch."""
    best = min if monitor == "loss" else max
    return best(trial.intermediate_values.values(), default=None)


def _found(
    store: "Study",
    config: SearchConfig,
    recipe: Mapping[str, Any],
    monitor: str,
    as_it_stands: dict[str, Any] | None,
) -> Found:
    from optuna.trial import TrialState

    trials = store.get_trials()
    complete = [trial for trial in trials if trial.state is TrialState.COMPLETE]
    if not complete:
        failed = [trial for trial in trials if trial.state is TrialState.FAIL]
        raise ValueError(
            f"search: none of {len(trials)} trials came to its end; the last that failed:"
            f" {failed[-1].user_attrs['reason']}"
        )
    best = (min if monitor == "loss" else max)(complete, key=final_value)
    first = trials[0] if trials[0].params == as_it_stands and trials[0] in complete else None
    return Found(
        trials=tuple(trials),
        best=best,
        recipe=with_values(recipe, config.values(best)),
        unchanged=first,
        importances=_importances(store, complete),
    )


def _importances(store: "Study", complete: "list[FrozenTrial]") -> dict[str, float]:
    """By functional analysis of variance in a random forest: Hutter et al. 2014, "An Efficient Approach"."""
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    if len(complete) < IMPORTANCE_TRIALS or len({trial.value for trial in complete}) == 1:
        return {}
    return get_param_importances(store, evaluator=FanovaImportanceEvaluator(seed=0))


class _Display:
    """A line per trial on the terminal."""

    def __init__(self, config: SearchConfig, monitor: str) -> None:
        self._config, self._monitor = config, monitor
        self._console = Console(stderr=True)

    def trial(self, trials: "list[FrozenTrial]") -> None:
        """Show the last of `trials`, and which is the best."""
        last = trials[-1]
        complete = [trial.value for trial in trials if trial.value is not None]
        best = (min if self._monitor == "loss" else max)(complete, default=None)
        state = {"COMPLETE": "", "PRUNED": "  stopped early", "FAIL": "  failed"}[last.state.name]
        value = best_so_far(last, self._monitor)
        words = [f"{path} {number_text(given)}" for path, given in last.params.items()]
        line = f"trial {last.number + 1}/{self._config.num_trials}"
        line += "" if value is None else f"  val {self._monitor} {value:.4f}"
        line += "" if best is None else f" (best {best:.4f})"
        line += f"{state}  {', '.join(words)}  {last.user_attrs['seconds']:.0f} s"
        if "reason" in last.user_attrs:
            line += f": {last.user_attrs['reason']}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def number_text(value: Any) -> str:
    """A parameter for readers.

    >>> number_text(0.00123456), number_text(16), number_text("focal")
    ('0.00123', '16', 'focal')
    """
    return f"{value:.3g}" if isinstance(value, float) else str(value)
