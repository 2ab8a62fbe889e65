"""Hyper-parameter search: what a trial may try, the same trials after a kill, failures, and what is refused."""

import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from cadx.searching import Found, OnEpoch, SearchConfig, search, with_values
from cadx.training import TrainingConfig

RECIPE: dict[str, Any] = {
    "model": {"family": "resnet", "width": 0.125},
    "preprocessing": {"height_px": 32, "width_px": 32, "mean": 0.5, "std": 0.25},
    "loss": {"kind": "focal"},
    "learning_rate": 0.0001,
    "epochs": 6,
}
SPACE: dict[str, Any] = {
    "learning_rate": {"low": 1e-4, "high": 1.0, "log": True},
    "batch_size": {"low": 8, "high": 64, "step": 8},
    "model.dropout": {"low": 0.0, "high": 0.5},
    "loss.kind": {"choices": ["cross_entropy", "focal"]},
}


class Killed(BaseException):
    """Stands for a kill at any point: no code of the search may catch it."""


def score(config: TrainingConfig, epoch: int) -> float:
    """A made-up val AUC: best at a learning rate of 0.01 and a batch of 32, nearer to its end with each epoch."""
    distance = (math.log10(config.learning_rate) + 2) ** 2 + ((config.batch_size - 32) / 32) ** 2
    return 0.95 - 0.05 * distance - 0.2 / epoch - 0.02 * config.model.dropout


class Trainer:
    """Trains in no time, with a checkpoint after each epoch as `fit` has it; may be killed at any of them."""

    def __init__(
        self,
        *,
        kill_at: float = math.inf,
        kill_reported: bool = False,
        fail: Callable[[TrainingConfig], bool] = lambda config: False,
    ) -> None:
        self.kill_at, self.kill_reported, self.fail = kill_at, kill_reported, fail
        self.configs: list[TrainingConfig] = []
        self.epochs = 0

    def __call__(self, config: TrainingConfig, checkpoints: Path, on_epoch: OnEpoch) -> Any:
        self.configs.append(config)
        if self.fail(config):
            raise ValueError("loss is nan at epoch 1, step 3:\nlower train.learning_rate")
        checkpoint = checkpoints / "checkpoint.pt"
        found, _, number = checkpoint.read_text().rpartition(" ") if checkpoint.exists() else ("", "", "0")
        done = int(number) if found == config.model_dump_json() else 0
        for epoch in range(1, done + 1):
            on_epoch(record(config, epoch))
        for epoch in range(done + 1, config.epochs + 1):
            self.epochs += 1
            checkpoints.mkdir(parents=True, exist_ok=True)
            checkpoint.write_text(f"{config.model_dump_json()} {epoch}")
            if self.epochs >= self.kill_at and not self.kill_reported:
                raise Killed
            on_epoch(record(config, epoch))
            if self.epochs >= self.kill_at:
                raise Killed
        return SimpleNamespace(best_epoch=config.epochs)


def record(config: TrainingConfig, epoch: int) -> dict[str, Any]:
    value = score(config, epoch)
    return {"epoch": epoch, "val_auc": value, "val_loss": 1 - value, "seconds": 60.0}


def run(study: Path, train: Any = None, *, monitor: str = "auc", seed: int = 0, **changes: Any) -> Found:
    recipe = changes.pop("recipe", RECIPE)
    origin = changes.pop("origin", {"splits": "those"})
    settings = {"space": SPACE, "num_trials": 12, "random_trials": 4, "prune_after_trials": 3} | changes
    return search(
        SearchConfig.model_validate(settings),
        recipe,
        TrainingConfig.model_validate,
        train or Trainer(),
        monitor=monitor,
        study=study,
        origin=origin,
        seed=seed,
    )


def what_happened(found: Found) -> list[tuple[Any, ...]]:
    return [
        (t.number, t.state.name, t.value, t.params, t.intermediate_values, t.user_attrs.get("reason"))
        for t in found.trials
    ]


def by_state(found: Found, state: str) -> list[Any]:
    return [trial for trial in found.trials if trial.state.name == state]


def diverges(config: TrainingConfig) -> bool:
    return config.learning_rate > 0.3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Found:
    found = run(tmp_path_factory.mktemp("uninterrupted"), Trainer(fail=diverges))
    assert all(by_state(found, state) for state in ("COMPLETE", "PRUNED", "FAIL")), "or little is shown below"
    return found


def test_the_best_recipe_is_found_and_said_in_the_words_of_the_given_one(uninterrupted: Found) -> None:
    best = uninterrupted.recipe
    assert best.keys() == {*RECIPE, "batch_size"}
    assert best["model"].keys() == {"family", "width", "dropout"}
    config = TrainingConfig.model_validate(best)
    complete = by_state(uninterrupted, "COMPLETE")
    assert uninterrupted.best.value == max(trial.value for trial in complete) == score(config, config.epochs)
    assert uninterrupted.best.value > score(TrainingConfig.model_validate(RECIPE), 6) + 0.1


def test_the_first_trial_is_the_recipe_as_it_stands(uninterrupted: Found, tmp_path: Path) -> None:
    trainer = Trainer()
    run(tmp_path, trainer, num_trials=1)
    assert trainer.configs == [TrainingConfig.model_validate(RECIPE)]
    first = uninterrupted.unchanged
    assert first is not None
    assert (first.number, first.value) == (0, score(trainer.configs[0], 6))


def test_a_recipe_outside_of_the_space_is_no_trial(tmp_path: Path) -> None:
    found = run(tmp_path, num_trials=3, space={"batch_size": {"low": 2, "high": 32}})
    assert found.unchanged is None
    assert all(2 <= trial.params["batch_size"] <= 32 for trial in found.trials)


def test_trials_stay_inside_the_space(uninterrupted: Found) -> None:
    for trial in uninterrupted.trials:
        assert 1e-4 <= trial.params["learning_rate"] <= 1
        assert trial.params["batch_size"] in range(8, 65, 8)
        assert trial.params["loss.kind"] in ("cross_entropy", "focal")


def test_later_trials_are_better_than_random_ones(tmp_path: Path) -> None:
    found = run(tmp_path, num_trials=40, random_trials=10, prune=False)
    config = [TrainingConfig.model_validate(with_values(RECIPE, trial.params)) for trial in found.trials]
    scores = [score(one, 6) for one in config]
    assert sum(scores[25:]) / 15 > sum(scores[1:11]) / 10 + 0.03


@pytest.mark.parametrize("reported", [False, True], ids=["before the report", "after the report"])
@pytest.mark.parametrize("kill_at", [2, 7])
def test_a_search_killed_again_and_again_makes_the_same_trials(
    kill_at: int, reported: bool, uninterrupted: Found, tmp_path: Path
) -> None:
    kills = 0
    while True:
        try:
            found = run(tmp_path, Trainer(fail=diverges, kill_at=kill_at, kill_reported=reported))
            break
        except Killed:
            kills += 1
    assert kills > 3
    assert what_happened(found) == what_happened(uninterrupted)
    assert not (tmp_path / "running").exists()


def test_a_killed_trial_goes_on_at_its_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, Trainer(kill_at=5), num_trials=1)
    after = Trainer()
    found = run(tmp_path, after, num_trials=1)
    assert after.epochs == 1, "one of six was left"
    assert list(found.trials[0].intermediate_values) == [1, 2, 3, 4, 5, 6]
    assert found.trials[0].user_attrs["seconds"] == 360, "of all six epochs"


def test_a_finished_search_trains_nothing_and_a_longer_one_only_the_rest(tmp_path: Path) -> None:
    short = run(tmp_path, num_trials=6)
    again = Trainer()
    assert what_happened(run(tmp_path, again, num_trials=6)) == what_happened(short)
    assert not again.configs
    rest = Trainer()
    longer = run(tmp_path, rest, num_trials=9)
    assert len(rest.configs) == 3
    assert what_happened(longer)[:6] == what_happened(short)


def test_another_seed_tries_other_recipes(tmp_path: Path) -> None:
    one, other = (run(tmp_path / str(seed), num_trials=3, seed=seed) for seed in (0, 1))
    assert one.trials[0].params == other.trials[0].params, "the recipe as it stands"
    assert one.trials[1].params != other.trials[1].params


def test_a_failed_trial_is_kept_with_its_line_and_avoided(uninterrupted: Found, tmp_path: Path) -> None:
    failed = by_state(uninterrupted, "FAIL")
    assert {trial.user_attrs["reason"] for trial in failed} == {
        "loss is nan at epoch 1, step 3: lower train.learning_rate"
    }
    found = run(
        tmp_path,
        Trainer(fail=lambda config: config.learning_rate > 0.002),
        space={"learning_rate": SPACE["learning_rate"]},
        num_trials=30,
        prune=False,
    )
    late = [trial.state.name for trial in found.trials[15:]]
    assert late.count("FAIL") <= 10, "all 15 fail where the sampler does not hear of failures"


def test_a_search_in_which_all_fails_ends_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="none of 3 trials came to its end; the last that failed: loss is nan"
    ) as info:
        run(tmp_path, Trainer(fail=lambda config: True), num_trials=3)
    assert "\n" not in str(info.value)


def test_an_error_that_is_no_trials_own_stops_the_search(tmp_path: Path) -> None:
    def full_disk(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        run(tmp_path, full_disk)
    assert len(run(tmp_path, num_trials=1).trials) == 1, "and is not held against the recipe"


def test_a_bad_trial_is_stopped_only_after_its_grace(uninterrupted: Found) -> None:
    for trial in by_state(uninterrupted, "PRUNED"):
        before = [t for t in by_state(uninterrupted, "COMPLETE") if t.number < trial.number]
        assert len(before) >= 3
        last = max(trial.intermediate_values)
        assert last > 2
        medians = {n: sorted(t.intermediate_values[n] for t in before) for n in trial.intermediate_values}
        below = [
            n for n, values in medians.items() if n > 2 and trial.intermediate_values[n] < median(values)
        ]
        assert below == [last]


def test_without_pruning_every_trial_comes_to_its_end(tmp_path: Path) -> None:
    found = run(tmp_path, prune=False)
    assert all(len(trial.intermediate_values) == 6 for trial in found.trials)


def test_loss_is_the_better_the_lower(tmp_path: Path) -> None:
    space = {name: SPACE[name] for name in ("learning_rate", "batch_size")}
    found = run(tmp_path, monitor="loss", space=space)
    complete = by_state(found, "COMPLETE")
    assert found.best.value == min(trial.value for trial in complete)
    assert by_state(found, "PRUNED")
    assert all(min(t.intermediate_values.values()) > found.best.value for t in by_state(found, "PRUNED"))


def test_no_trial_starts_once_the_time_is_over(tmp_path: Path) -> None:
    assert len(run(tmp_path, timeout_minutes=13).trials) == 3, "six minutes each, and the third began in time"


def test_importances_name_what_matters(tmp_path: Path) -> None:
    found = run(tmp_path, num_trials=30, random_trials=30, prune=False)
    assert sum(found.importances.values()) == pytest.approx(1)
    assert max(found.importances, key=found.importances.__getitem__) == "learning_rate"
    assert found.importances["loss.kind"] < 0.05, "the score knows nothing of it"


def test_whole_sections_are_choices_too(tmp_path: Path) -> None:
    families = [{"family": "resnet", "width": 0.125}, {"family": "densenet"}]
    trainer = Trainer()
    found = run(
        tmp_path,
        trainer,
        num_trials=12,
        space={"model": {"choices": families}, "model.dropout": {"low": 0, "high": 0.5}},
    )
    assert {config.model.family for config in trainer.configs} == {"resnet", "densenet"}
    assert all(config.model.dropout > 0 for config in trainer.configs[1:])
    assert found.unchanged is not None


def test_whole_numbers_stay_whole_and_fractions_do_not(tmp_path: Path) -> None:
    space = {"epochs": {"low": 2.0, "high": 8.0}, "weight_decay": {"low": 0, "high": 1}}
    found = run(tmp_path, num_trials=8, space=space)
    assert {type(trial.params["epochs"]) for trial in found.trials} == {int}
    assert any(trial.params["weight_decay"] % 1 for trial in found.trials)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"learning_rat": {"low": 1, "high": 2}}, r"search\.space\.learning_rat: "),
        ({"model.dropout": {"low": 0, "high": 1.5}}, r"search\.space\.model\.dropout: "),
        ({"loss.kind": {"choices": ["focal", "hinge"]}}, r"search\.space\.loss\.kind: (?s:.)*hinge"),
        ({"epochs.first": {"low": 1, "high": 2}}, r"epochs is 6 in the recipe and has no first"),
        ({"patches_per_sample": {"low": 1, "high": 8}}, r"space\.patches_per_sample: (?s:.)*is for volumes"),
        ({"positive_fraction": {"low": 0, "high": 0.9}}, r"space\.positive_fraction: (?s:.)*is for volumes"),
        ({"monitor": {"choices": ["auc", "loss"]}}, "trials are compared by it"),
        ({"ensemble": {"low": 1, "high": 5}}, "makes no difference to a trial"),
        ({"num_workers": {"low": 0, "high": 5}}, "makes no difference to a trial"),
    ],
)
def test_a_space_that_does_not_fit_is_refused_before_any_training(
    space: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer = Trainer()
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "study", trainer, space=space)
    assert not trainer.configs
    assert not (tmp_path / "study").exists()


def test_a_detectors_losses_are_not_searched_where_its_model_has_its_own(tmp_path: Path) -> None:
    recipe = RECIPE | {"model": {"family": "yolo"}, "loss": {}}
    trainer = Trainer()
    with pytest.raises(ValueError, match=r"space\.loss\.gamma: (?s:.)*a detector's losses are its model's"):
        run(tmp_path / "study", trainer, recipe=recipe, space={"loss.gamma": {"low": 0, "high": 5}})
    assert not trainer.configs


def test_losses_of_other_kinds_are_not_compared_by_loss(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"loss\.kind: losses of other kinds do not compare"):
        run(tmp_path, monitor="loss")


@pytest.mark.parametrize(
    ("dimension", "message"),
    [
        ({"low": 2, "high": 1}, "low 2 must lie below high 1"),
        ({"low": 0, "high": 1, "log": True}, "log needs low above 0"),
        ({"low": 1, "high": 2, "step": 3}, "wider than the range"),
        ({"low": 1, "high": math.inf}, "should be a finite number"),
        ({"low": 1}, "Field required"),
        ({"choices": [16]}, "at least 2"),
        ({"choices": [16, 16.0]}, "must differ"),
        ({"choices": [16, 32], "low": 3}, "not permitted"),
    ],
)
def test_a_dimension_that_means_nothing_is_refused(dimension: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SearchConfig.model_validate({"space": {"batch_size": dimension}})


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"recipe": RECIPE | {"epochs": 5}}, "another recipe;"),
        ({"space": SPACE | {"model.dropout": {"low": 0.0, "high": 0.4}}}, "another space or settings;"),
        ({"prune": False}, "another space or settings;"),
        ({"origin": {"splits": "these"}}, "another splits;"),
        ({"seed": 1, "origin": {"splits": "these"}}, "another seed and another splits;"),
    ],
)
def test_the_study_of_another_search_is_refused(changes: dict[str, Any], what: str, tmp_path: Path) -> None:
    run(tmp_path, num_trials=1)
    with pytest.raises(ValueError, match=f"{tmp_path}: holds a search with {what} remove the folder"):
        run(tmp_path, **({"num_trials": 1} | changes))


def test_what_changes_no_weights_changes_no_search(tmp_path: Path) -> None:
    run(tmp_path, num_trials=1)
    assert len(run(tmp_path, num_trials=2, recipe=RECIPE | {"num_workers": 2, "ensemble": 3}).trials) == 2


def test_two_searches_do_not_share_a_study(tmp_path: Path) -> None:
    def search_there_too(config: TrainingConfig, checkpoints: Path, on_epoch: OnEpoch) -> Any:
        with pytest.raises(ValueError, match="another search is at work there"):
            run(tmp_path)
        return Trainer()(config, checkpoints, on_epoch)

    assert len(run(tmp_path, search_there_too, num_trials=1).trials) == 1


@pytest.mark.parametrize("content", [b"no database at all, but text", b"SQLite format 3\0" + bytes(200)])
def test_a_damaged_study_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "study.db").write_bytes(content)
    with pytest.raises(ValueError, match=r"study\.db: not a study that this version of Optuna reads; remove"):
        run(tmp_path)


def test_optuna_says_nothing_of_its_own(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, num_trials=8)
    out, err = capfd.readouterr()
    assert not out
    assert [line.partition("  ")[0] for line in err.splitlines()] == [f"trial {n}/8" for n in range(1, 9)]


def test_without_optuna_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(
        ValueError, match="optuna is not installed: it is the extra 'search'; run `make setup`"
    ):
        run(tmp_path)
