"""What TorchServe calls, whatever a model takes; what does not concern TorchServe is done in `answering`.

TorchServe imports a handler's file by its base name and takes the one class that is written in it.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from serving.answering import Answerer, Request, RequestLog

_PHRASES = {200: "OK", 400: "Bad Request", 413: "Content Too Large", 500: "Internal Server Error"}


class Handler:
    """Answers batches of requests from the archive that it was unpacked with.

    Attributes:
        answerer: of the kind of request.
    """

    answerer: ClassVar[type[Answerer]]

    def initialize(self, context: Any) -> None:
        """Open the archive's bundle.

        Raises:
            ValueError: if it is damaged, incomplete, or another than the release names.
            OSError: if the folder of the request log cannot be made.
        """
        # TorchServe logs three lines a request on its way to this handler, and reads each of them again.
        logging.getLogger().setLevel(logging.WARNING)
        properties = context.system_properties
        gpu = properties["gpu_id"]
        self._answerer = self.answerer(
            Path(properties["model_dir"]),
            device="cpu" if gpu is None else f"cuda:{gpu}",
            log=RequestLog.from_environment(),
        )

    def handle(self, data: Sequence[Mapping[str, Any]], context: Any) -> list[str]:
        """The replies to a batch, as JSON; the status of each is set in the context."""
        requests = [_request(item, context.get_all_request_header(i)) for i, item in enumerate(data)]
        replies = self._answerer.answer(requests)
        for i, reply in enumerate(replies):
            # By these keywords: any other turns the whole batch into a 503.
            context.set_response_status(code=reply.status, phrase=_PHRASES[reply.status], idx=i)
            context.set_response_content_type(i, "application/json")
        return [json.dumps(reply.content, allow_nan=False) for reply in replies]


def _request(parameters: Mapping[str, Any], headers: Mapping[str, Any]) -> Request:
    body = parameters.get("body")
    # Of a form with several parts TorchServe keeps one of each name, and says nothing of the others.
    if str(_header("content-type", headers, "")).lower().startswith("multipart/"):
        body = None
    return Request(
        bytes(body) if isinstance(body, bytes | bytearray) else None,
        _flag("attention", parameters, headers),
        _flag("golden", parameters, headers),
    )


def _flag(name: str, parameters: Mapping[str, Any], headers: Mapping[str, Any]) -> str:
    # TorchServe drops the query of /predictions/MODEL and keeps that of /MODEL/predict: hence the header.
    asked = parameters.get(name, _header(name, headers, "false"))
    if isinstance(asked, bytes | bytearray):
        asked = asked.decode(errors="replace")
    return str(asked).lower()


def _header(name: str, headers: Mapping[str, Any], default: str) -> Any:
    return next((value for key, value in headers.items() if key.lower() == name), default)
