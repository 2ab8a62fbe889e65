"""The steps, in order. Everything else about a step stands in the file of its name."""

from pathlib import Path

from cadx.types import Digest
from components.contract import Step, code_digest, source_digests

CODE = Path("data/work/code.json")
"""Where dvc.yaml's stage `code` writes `code_digests`."""

STEPS = (
    Step("ingest"),
    Step("fetch", reproducible=False),
    Step("validate"),
    Step("split"),
    Step("imbalance"),
    Step("search", reproducible=False),
    Step("train"),
    Step("calibrate"),
    Step("evaluate"),
    Step("summarise"),
    Step("gate"),
    Step("package"),
    Step("choose", reproducible=False),
    Step("deliver", reproducible=False),
    Step("deploy", reproducible=False),
    Step("monitor", reproducible=False),
    Step("predict", reproducible=False),
    Step("notify", reproducible=False),
)


def code_digests() -> dict[str, Digest]:
    """The digest of each stage's code, by its step: DVC runs a stage again where its own has changed."""
    return {step.name: code_digest(source_digests(step.name)) for step in STEPS if step.reproducible}
