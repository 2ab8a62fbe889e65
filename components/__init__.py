"""The steps, in order. Everything else about a step stands in the file of its name."""

from components.contract import Step

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
    Step("deploy", reproducible=False),
    Step("monitor", reproducible=False),
    Step("predict", reproducible=False),
    Step("notify", reproducible=False),
)
