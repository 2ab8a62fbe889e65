"""Which versions of a model are in service, and which of them answers: TorchServe's management address.

model_store/<name>.deployed.json    the versions that went live, the latest last: the way back
model_store/.<name>.lock            held by whoever changes them
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlencode

from pydantic import TypeAdapter, ValidationError

from cadx.files import locked, write_json
from cadx.types import Config
from serving.client import RESPONSE_TIMEOUTS_S, Endpoint, Refused, Token

STARTUP_TIMEOUT_S = 600
"""For a worker to come up: importing torch takes seconds on a free machine, minutes on a crowded one."""
REGISTRATION_TIMEOUT_S = STARTUP_TIMEOUT_S + 30.0


class Version(NamedTuple):
    """One version of a model in service: its archive's file name, and its workers that are ready."""

    version: str
    archive: str
    ready_workers: int


class Deployed(Config):
    """A version that went live, and all that puts it into service again."""

    version: str
    archive: str
    workers: int
    batch_size: int
    max_batch_delay_ms: int
    response_timeout_s: int


@contextmanager
def changing(model_store: Path, name: str) -> Iterator[None]:
    """While it is open, nobody else deploys or rolls back this model.

    Two at once would take away what the other has registered and not compared yet.

    Raises:
        ValueError: if somebody does.
    """
    busy = f"{model_store}: another deployment or rollback of {name} is on its way; wait for its end"
    with locked(model_store / f".{name}.lock", busy):
        yield


def read_deployed(model_store: Path, name: str) -> tuple[Deployed, ...]:
    """The versions of a model that went live, the latest last; none if it was never deployed.

    Raises:
        ValueError: if the file is damaged.
    """
    path = _deployed_path(model_store, name)
    try:
        return TypeAdapter(tuple[Deployed, ...]).validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except ValidationError:
        raise ValueError(f"{path}: not what `cadx deploy` writes; remove it and deploy again") from None


def write_deployed(model_store: Path, name: str, versions: Sequence[Deployed]) -> None:
    """Keep which versions of a model went live, the latest last."""
    write_json(_deployed_path(model_store, name), [one.model_dump() for one in versions])


def _deployed_path(model_store: Path, name: str) -> Path:
    return model_store / f"{name}.deployed.json"


class Management:
    """Registers models, chooses the version that answers, and takes versions out of service.

    Every method raises `client.Refused`, a ValueError with the server's reason, if the server refuses, and
    ConnectionError if it cannot be reached.

    Args:
        address: the server's management address, such as http://127.0.0.1:8081.
        key_file: where the server keeps its tokens; or else
        token: the management token.
    """

    def __init__(self, address: str, *, key_file: Path | None = None, token: Token | None = None) -> None:
        self._endpoint = Endpoint(address, "management", token=token, key_file=key_file)

    def register(
        self,
        archive: str,
        *,
        name: str | None = None,
        workers: int | None = None,
        batch_size: int = 1,
        max_batch_delay_ms: int = 1,
        response_timeout_s: int = RESPONSE_TIMEOUTS_S["image"],
    ) -> None:
        """Put an archive of the model store into service and wait until its workers are ready.

        Its version is that in it. A model's first version becomes its default. If the workers do not start,
        TorchServe keeps the version, without any: `unregister` it.

        Args:
            archive: its file name in the model store.
            name: the model's name; None for that in the archive.
            workers: processes that answer; None for the server's own number.
            batch_size: images that are answered together at most.
            max_batch_delay_ms: how long an image waits for others; only if `batch_size` is more than 1.
            response_timeout_s: after which a worker that has not answered is started anew.
        """
        query = {
            "url": archive,
            "synchronous": "true",
            "batch_size": batch_size,
            "max_batch_delay": max_batch_delay_ms,
            "response_timeout": response_timeout_s,
        }
        if name is not None:
            query["model_name"] = name
        if workers is not None:
            query["initial_workers"] = workers
        try:
            self._endpoint.request(
                "POST", f"/models?{urlencode(query)}", read_timeout_s=REGISTRATION_TIMEOUT_S
            )
        except Refused as refusal:
            if refusal.status != 500:
                raise
            # TorchServe tells no more than that the workers did not start.
            reason = f"{refusal.reason}; model_log.log among the server's logs says why"
            raise Refused(self._endpoint.address, refusal.status, reason) from None

    def versions(self, name: str) -> tuple[Version, ...]:
        """The versions of a model in service; none if it is unknown."""
        return self._describe(f"{_part(name)}/all")

    def default_version(self, name: str) -> str | None:
        """The version that answers where none is named; None if the model is unknown."""
        found = self._describe(_part(name))
        return found[0].version if found else None

    def set_default(self, name: str, version: str) -> None:
        """Let a version in service answer where none is named."""
        self._endpoint.request("PUT", f"/models/{_part(name)}/{_part(version)}/set-default")

    def unregister(self, name: str, version: str) -> None:
        """Take a version out of service. The default goes last.

        TorchServe forgets those who still wait for it, and they wait in vain until they give up: take out what has not
        been the default for a while.
        """
        self._endpoint.request("DELETE", f"/models/{_part(name)}/{_part(version)}")

    @contextmanager
    def taken_away_on_failure(self, name: str, version: str) -> Iterator[None]:
        """Unregister a version when the block fails, in whatever way."""
        try:
            yield
        except BaseException:
            with suppress(ValueError, ConnectionError):  # the block's own error is what the user must see
                self.unregister(name, version)
            raise

    def roll_back(self, name: str, model_store: Path) -> tuple[str, str]:
        """Let the version answer that was live before this one; (this one, that one).

        It answers as it did when it was compared with its evaluation: the same archive, which stayed in the model
        store. Where the server has it no longer, it is loaded first; until then the present one goes on. Called
        again, it goes back further. The version left stays loaded.

        Raises:
            ValueError: if there is no earlier version, or another deployment is on its way.
        """
        with changing(model_store, name):
            present = self.default_version(name)
            history = list(read_deployed(model_store, name))
            while history and history[-1].version == present:
                history.pop()
            if present is None or not history:
                raise ValueError(f"{name}: no earlier version to go back to; `cadx deploy` one")
            back = history[-1]
            loaded = {one.version: one for one in self.versions(name)}.get(back.version)
            if loaded and not loaded.ready_workers:
                self.unregister(name, back.version)
            if not (loaded and loaded.ready_workers):
                with self.taken_away_on_failure(name, back.version):
                    self.register(name=name, **back.model_dump(exclude={"version"}))
            self.set_default(name, back.version)
            write_deployed(model_store, name, history)
            return present, back.version

    def _describe(self, path: str) -> tuple[Version, ...]:
        try:
            body = self._endpoint.request("GET", f"/models/{path}")
        except Refused as refusal:
            if refusal.status == 404:
                return ()
            raise
        try:
            described = TypeAdapter(list[dict[str, Any]]).validate_json(body)
            return tuple(
                Version(
                    item["modelVersion"],
                    item["modelUrl"],
                    sum(worker["status"] == "READY" for worker in item["workers"]),
                )
                for item in described
            )
        except (ValueError, TypeError, KeyError):
            raise ValueError(
                f"{self._endpoint.address}: something answers there that is not TorchServe's management; see to the "
                "management address"
            ) from None


def _part(name: str) -> str:
    return quote(name, safe="")
