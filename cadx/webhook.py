"""A message to somebody's webhook, by HTTP POST."""

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from cadx.files import plain

TRIES = 4
TIMEOUT_S = 5.0


def check_webhook(url: str, where: str) -> None:
    """Refuse what is no address of a webhook, without repeating it: such an address is often a secret.

    Raises:
        ValueError: if it is neither http nor https; `where` says where it was given.
    """
    if urlsplit(url).scheme not in ("http", "https"):
        raise ValueError(f"{where}: not an http or https address; give the whole URL")


def post(url: str, message: Mapping[str, Any]) -> str:
    """Send a message as JSON; "" if it was taken, else who did not take it and why.

    A receiver that is busy is asked again. It is named by its host alone.
    """
    import urllib3

    retries = urllib3.Retry(
        total=TRIES - 1,
        backoff_factor=0.2,
        status_forcelist=(429, 500, 502, 503, 504),
        allowed_methods={"POST"},
        redirect=0,
        respect_retry_after_header=False,  # it may name hours, and the alarm waits for this
        raise_on_status=False,
    )
    try:
        with urllib3.PoolManager() as pool:
            reply = pool.request("POST", url, json=plain(dict(message)), retries=retries, timeout=TIMEOUT_S)
        if reply.status < 300:
            return ""
        why = f"status {reply.status}"
    except urllib3.exceptions.HTTPError as error:
        why = type(getattr(error, "reason", None) or error).__name__
    return f"webhook at {urlsplit(url).hostname}: the message was not taken ({why})"
