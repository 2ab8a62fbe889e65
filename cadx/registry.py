"""Which model is the champion of an experiment, and which ones were before: a registry in MLflow.

By default it is a SQLite file with a folder of artifacts beside it; a shared one is an MLflow server by its address.
Each promotion is a version of the registered model that bears the experiment's name, with the run that holds what it
was promoted by: decision.json, metrics.json and predictions.parquet. The alias `champion` says which version it is. The
predictions name patients by their pseudonyms: choose a server that may know these.
"""

import logging
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from cadx.files import digest_path, replacing
from cadx.gating import read_decision, read_metrics
from cadx.predicting.table import read_predictions
from cadx.types import Digest

_SQLITE = "sqlite:///"
_ALIAS = "champion"
_PREDICTIONS = "predictions.parquet"


class Champion(NamedTuple):
    """One promotion.

    Attributes:
        experiment: whose champion.
        version: counted from 1, in the order of promotions.
        bundle: digest of the promoted bundle.
        seed: of its training.
        time: of the promotion, UTC.
        predictions: digest of the predictions that challengers are compared with.
        metrics: metric -> value on the test split.
        is_current: whether it is the champion now.
    """

    experiment: str
    version: int
    bundle: Digest
    seed: int
    time: datetime
    predictions: Digest
    metrics: dict[str, float]
    is_current: bool


class Registry:
    """Champions and their history.

    Args:
        address: `sqlite:///FILE`, or the address of an MLflow server.
        create: make a new database where there is none; else it is refused, so that to read never writes.

    Raises:
        ValueError: if MLflow is not installed, or the registry cannot be opened.
    """

    def __init__(self, address: str, *, create: bool = True) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when it is imported
        # Of its own, MLflow asks a server that is not there for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        try:
            from mlflow import MlflowClient
            from mlflow.exceptions import MlflowException
        except ModuleNotFoundError:
            raise ValueError(
                "MLflow is not installed: it is the extra 'registry'; run `make setup`"
            ) from None
        for name in ("mlflow", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        self.address = address
        self._folder: Path | None = None
        if address.startswith(_SQLITE):
            database = Path(address.removeprefix(_SQLITE)).resolve()
            if not create and not database.exists():
                raise ValueError(
                    f"registry {address}: there is none; `cadx champion promote` makes it, or correct the address"
                )
            self._folder = database.parent
            self._folder.mkdir(parents=True, exist_ok=True)
        self._failure: type[Exception] = MlflowException
        try:
            self._client: Any = MlflowClient(tracking_uri=address, registry_uri=address)
            self._client.search_registered_models(max_results=1)
        except Exception as error:  # of the store's own kinds
            raise ValueError(f"registry {address}: cannot be opened: {type(error).__name__}") from None

    def history(self, experiment: str) -> list[Champion]:
        """Every promotion of an experiment, the first one first; none where nothing was promoted."""
        current = self._current(experiment)
        versions = self._client.search_model_versions(f"name = '{experiment}'")
        found = [self._read(version, current) for version in versions]
        return sorted(found, key=lambda one: one.version)

    def champion(self, experiment: str) -> Champion | None:
        """The experiment's champion; None where nothing was promoted."""
        return next((one for one in self.history(experiment) if one.is_current), None)

    def experiments(self) -> list[str]:
        """Every experiment that has a champion."""
        return sorted(model.name for model in self._client.search_registered_models())

    def promote(
        self, experiment: str, *, decision: Path, metrics: Path, predictions: Path, replace: bool = False
    ) -> Champion:
        """Make a bundle the champion that the gate let through; the former one stays in the history.

        Args:
            experiment: a section of params.yaml.
            decision: the gate's file.
            metrics: what it rests on.
            predictions: what they were made from.
            replace: also where the gate has not compared it with the present champion.

        Raises:
            ValueError: if the gate refused it or has not seen the champion, or the files do not belong together.
        """
        decided, record = read_decision(decision), read_metrics(metrics)
        _, info = read_predictions(predictions)
        if decided.experiment != experiment:
            raise ValueError(f"{decision}: is about {decided.experiment}, not {experiment}")
        if not decided.promote:
            raise ValueError(f"{decision}: refused by the gate: {'; '.join(decided.reasons)}")
        if decided.metrics != digest_path(metrics):
            raise ValueError(f"{decision}: rests on other numbers than {metrics}; run `cadx gate` again")
        digest = digest_path(predictions)
        if record.predictions != digest or info.bundle != decided.bundle:
            raise ValueError(f"{predictions}: not what {metrics} was made from; run `cadx evaluate` again")
        former = self.champion(experiment)
        if former and former.bundle == decided.bundle:
            return former
        if former and decided.champion != former.bundle and not replace:
            raise ValueError(
                f"{decision}: the gate has not compared it with the champion, {former.bundle}; run `cadx champion "
                "export` and `cadx gate --champion`, or say --replace"
            )
        tags = {"bundle": decided.bundle, "seed": str(decided.seed), "predictions": digest}
        run = self._client.create_run(self._experiment_id(experiment), tags=tags)
        for name, estimate in record.metrics.items():
            ends = {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
            for key, value in ends.items():
                if value is not None:
                    self._client.log_metric(run.info.run_id, key, value)
        with TemporaryDirectory() as folder:
            for name, file in (
                ("decision.json", decision),
                ("metrics.json", metrics),
                (_PREDICTIONS, predictions),
            ):
                copy = Path(folder) / name
                copy.write_bytes(file.read_bytes())
                self._client.log_artifact(run.info.run_id, str(copy))
        self._client.set_terminated(run.info.run_id)
        if not self._knows(experiment):
            self._client.create_registered_model(experiment)
        version = self._client.create_model_version(
            experiment, run.info.artifact_uri, run_id=run.info.run_id, tags=tags
        )
        self._client.set_registered_model_alias(experiment, _ALIAS, version.version)
        return self._read(version, int(version.version))

    def export(self, experiment: str, output: Path) -> Champion:
        """Write the champion's predictions for `gate` to compare a challenger with.

        Raises:
            ValueError: if there is no champion, or its predictions were changed in the registry.
        """
        if (champion := self.champion(experiment)) is None:
            raise ValueError(
                f"{experiment}: no champion in {self.address}; `cadx champion promote` makes one"
            )
        version = self._client.get_model_version(experiment, str(champion.version))
        with TemporaryDirectory() as folder:
            got = Path(self._client.download_artifacts(version.run_id, _PREDICTIONS, folder))
            if digest_path(got) != champion.predictions:
                raise ValueError(
                    f"{experiment}: the champion's predictions in {self.address} are not those that were registered"
                )
            with replacing(output) as partial:
                partial.write_bytes(got.read_bytes())
        return champion

    def _experiment_id(self, name: str) -> str:
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        # A server knows where artifacts go; beside a SQLite file it would be the folder that one happens to work in.
        location = self._folder and (self._folder / "artifacts" / name).as_uri()
        return str(self._client.create_experiment(name, artifact_location=location))

    def _knows(self, experiment: str) -> bool:
        try:
            self._client.get_registered_model(experiment)
        except self._failure:
            return False
        return True

    def _current(self, experiment: str) -> int | None:
        try:
            return int(self._client.get_model_version_by_alias(experiment, _ALIAS).version)
        except self._failure:
            return None

    def _read(self, version: Any, current: int | None) -> Champion:
        tags: Mapping[str, str] = version.tags
        run = self._client.get_run(version.run_id)
        return Champion(
            experiment=version.name,
            version=int(version.version),
            bundle=Digest(tags["bundle"]),
            seed=int(tags["seed"]),
            time=datetime.fromtimestamp(version.creation_timestamp / 1000, UTC),
            predictions=Digest(tags["predictions"]),
            metrics=dict(run.data.metrics),
            is_current=int(version.version) == current,
        )


def show_history(registry: Registry, experiment: str = "") -> None:
    """Print the champion and those before, of one experiment or of all."""
    table = Table(
        "", "experiment", "version", "promoted (UTC)", "seed", "bundle", "AUC", title=registry.address
    )
    for name in [experiment] if experiment else registry.experiments():
        for one in reversed(registry.history(name)):
            auc = one.metrics.get("auc")
            table.add_row(
                "[green]champion[/]" if one.is_current else "",
                one.experiment,
                str(one.version),
                f"{one.time:%Y-%m-%d %H:%M}",
                str(one.seed),
                one.bundle.removeprefix("sha256:")[:12],
                "" if auc is None else f"{auc:.3f}{_interval(one.metrics, 'auc')}",
            )
    Console().print(table)


def _interval(metrics: Mapping[str, float], name: str) -> str:
    """A logged metric's 95 % interval, in brackets; empty where it has none."""
    low, high = metrics.get(f"{name}_low"), metrics.get(f"{name}_high")
    return "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
