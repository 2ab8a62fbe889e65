"""The end of a run, told to a webhook: which run, how it has ended, and nothing of what was in it.

The address comes from the environment variable CADX_WEBHOOK, on a cluster from a secret: such an address is often one
itself, and arguments can be read by every user of a machine.
"""

import json
import os
from typing import Any, Literal

from pydantic import Field

from cadx.files import write_json
from cadx.webhook import check_webhook, post
from components.contract import Out, Params, step

VARIABLE = "CADX_WEBHOOK"
SCHEMA = 1


class NotifyParams(Params):
    """When there is something to tell."""

    when: Literal["always", "failure"] = Field(
        default="always", description="failure: a run that has succeeded is not told"
    )


@step
def notify(*, notification: Out, experiment: str, status: str, params: NotifyParams) -> None:
    """Tell a webhook how a run has ended: experiment, run and state.

    What the run's tasks said is left out, for it may name files: `cadx logs RUN` shows it to those who may see it.

    Raises:
        ValueError: if there is no webhook, it does not take the message, or `status` is not what Kubeflow gives of
            a run that has ended.
    """
    url = os.environ.get(VARIABLE, "")
    check_webhook(url, VARIABLE)
    try:
        ended: dict[str, Any] = json.loads(status)
        state = str(ended["state"])
        run = str(ended.get("pipelineJobResourceName", "")).rpartition("/")[2]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("--status: not what Kubeflow gives of a run; it holds a state") from None
    record = {"schema": SCHEMA, "experiment": experiment, "run": run, "state": state}
    told = params.when == "always" or state != "SUCCEEDED"
    if told and (refusal := post(url, record)):
        raise ValueError(refusal)
    write_json(notification, record | {"told": told})
