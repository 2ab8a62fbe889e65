"""How a run is watched: a live line on a terminal, JSON lines on disk, curves elsewhere where asked for."""

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

EPOCHS = "epochs.jsonl"

_NAMES = {"auc": "AUC", "ap50": "AP50", "loss": "loss"}


class Display:
    """One live line on a terminal; elsewhere a plain line per epoch.

    Args:
        epochs: of the run.
        num_steps: of an epoch.
        silent: say nothing: of several processes one speaks.
    """

    def __init__(self, epochs: int, num_steps: int, *, silent: bool = False) -> None:
        self._epochs = epochs
        self._num_steps = num_steps
        self._console = Console(stderr=True, quiet=silent)
        self._scores = ""
        self._bar: Progress | None = None
        if self._console.is_terminal and not silent:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("train", total=epochs * num_steps)

    def __enter__(self) -> "Display":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def step(self, epoch: int, step: int, loss: float) -> None:
        """Show a step, both 0-based."""
        if self._bar:
            text = f"epoch {epoch + 1}/{self._epochs}  loss {loss:.4f}{self._scores}"
            self._bar.update(self._task, completed=epoch * self._num_steps + step, description=text)

    def epoch(self, record: dict[str, Any], *, best: bool) -> None:
        """Show an epoch's record."""
        known = {name: record.get(f"val_{name}") for name in _NAMES}
        scores = {_NAMES[name]: f"{value:.4f}" for name, value in known.items() if value is not None}
        self._scores = "".join(f"  val {name} {value}" for name, value in scores.items())
        if not self._bar:
            self._console.print(
                f"epoch {record['epoch']}/{self._epochs}  train loss {record['train_loss']:.4f}"
                f"{self._scores}  {record['seconds']:.1f} s{'  best' if best else ''}",
                highlight=False,
            )


class Curves:
    """A run's records, streamed: to epochs.jsonl in the folder of checkpoints, and to a tracker if there is one.

    Args:
        folder: of the run's checkpoints.
        tracker: "tensorboard", "mlflow" or None (`Recipe.tracking`).
        name: of the run.
        settings: of the run, as a tracker shows them.

    Raises:
        ValueError: if the tracker is not installed.
    """

    def __init__(self, folder: Path, tracker: str | None, name: str, settings: dict[str, Any]) -> None:
        self.path = folder / EPOCHS
        self._tracker = _Tracker(tracker, folder, name, settings) if tracker else None

    def restart(self, history: list[dict[str, Any]]) -> None:
        """Begin with what an earlier process of this run recorded."""
        self.path.unlink(missing_ok=True)
        for record in history:
            self._write(record)

    def add(self, record: dict[str, Any]) -> None:
        """An epoch's record."""
        self._write(record)
        if self._tracker:
            self._tracker.log(record)

    def _write(self, record: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def close(self) -> None:
        """Hand over what a tracker still holds."""
        if self._tracker:
            self._tracker.close()


class _Tracker:
    """Accelerate's door to one tracker."""

    def __init__(self, kind: str, folder: Path, name: str, settings: dict[str, Any]) -> None:
        from accelerate.tracking import MLflowTracker, TensorBoardTracker

        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        tracker: Any = MLflowTracker(name) if kind == "mlflow" else TensorBoardTracker(name, folder)
        try:
            tracker.start()
        except ImportError:
            raise ValueError(f"train.tracking {kind}: not installed; install the extra `tracking`") from None
        self._tracker = tracker
        self._tracker.store_init_configuration(settings)

    def log(self, record: dict[str, Any]) -> None:
        numbers = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k != "epoch"}
        self._tracker.log(numbers, step=record["epoch"])

    def close(self) -> None:
        self._tracker.finish()
