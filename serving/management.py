"""Which versions of a model are in service, and which of them answers: TorchServe's management address."""

import json
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote, urlencode

from serving.client import Endpoint, Refused

REGISTRATION_TIMEOUT_S = 180.0


class Version(NamedTuple):
    """One version of a model in service: its archive's file name, and its workers that are ready."""

    version: str
    archive: str
    ready_workers: int


class Management:
    """Registers models, chooses the version that answers, and takes versions out of service.

    Every method raises `client.Refused`, a ValueError with the server's reason, if the server refuses, and
    ConnectionError if it cannot be reached.

    Args:
        address: the server's management address, such as http://127.0.0.1:8081.
        key_file: where the server keeps its tokens; or else
        token: the management token.
    """

    def __init__(self, address: str, *, key_file: Path | None = None, token: str | None = None) -> None:
        self._endpoint = Endpoint(
            address, "management", token=token, key_file=key_file, read_timeout_s=REGISTRATION_TIMEOUT_S
        )

    def register(
        self,
        archive: str,
        *,
        name: str | None = None,
        workers: int | None = None,
        batch_size: int = 1,
        max_batch_delay_ms: int = 20,
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
        """
        query = {
            "url": archive,
            "synchronous": "true",
            "batch_size": batch_size,
            "max_batch_delay": max_batch_delay_ms,
        }
        if name is not None:
            query["model_name"] = name
        if workers is not None:
            query["initial_workers"] = workers
        try:
            self._endpoint.request("POST", f"/models?{urlencode(query)}")
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
        """Take a version out of service. The default goes last."""
        self._endpoint.request("DELETE", f"/models/{_part(name)}/{_part(version)}")

    def _describe(self, path: str) -> tuple[Version, ...]:
        try:
            described = json.loads(self._endpoint.request("GET", f"/models/{path}"))
        except Refused as refusal:
            if refusal.status == 404:
                return ()
            raise
        return tuple(
            Version(
                item["modelVersion"],
                item["modelUrl"],
                sum(worker["status"] == "READY" for worker in item["workers"]),
            )
            for item in described
        )


def _part(name: str) -> str:
    return quote(name, safe="")
