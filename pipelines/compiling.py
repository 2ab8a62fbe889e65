"""Pipelines as the YAML that Kubeflow takes; equal inputs give equal bytes."""

import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format

from cadx.files import replacing
from pipelines import Deploy
from pipelines.evaluation import evaluation
from pipelines.families import families
from pipelines.inference import inference
from pipelines.monitoring import monitoring
from pipelines.placement import IMAGE_FORM, Setting, is_image, read_placements
from pipelines.training import training

PIPELINES: Mapping[str, Callable[..., Any]] = {
    "training": training,
    "monitoring": monitoring,
    "evaluation": evaluation,
    "inference": inference,
}
"""Those of one experiment, by name; `families` takes several."""

TRAINING = ("training", "families", "monitoring")
"""Those that may end in a model put into service."""


def compile_experiment(
    experiment: str,
    output: Path,
    *,
    params: Path,
    image: str,
    pipeline: str,
    against: tuple[str, ...],
    resources: Path,
    remote: str,
    notify: bool,
    deploy: Deploy,
) -> None:
    """Write an experiment's pipeline, whole or not at all: see `pipelines.compile_experiment`."""
    if output.suffix not in {".yaml", ".yml"}:
        raise ValueError(f"{output}: Kubeflow takes pipelines as .yaml files; name the output so")
    if not is_image(image):
        raise ValueError(f"image {image!r}: {IMAGE_FORM}")
    if against and pipeline != "families":
        raise ValueError(
            f"--against {' '.join(against)}: only the pipeline families compares; add --pipeline families"
        )
    if remote and pipeline == "inference":
        raise ValueError(f"--remote {remote}: the pipeline inference reads no dataset; leave it out")
    placements = read_placements(resources)
    if deploy == "torchserve" and pipeline in TRAINING and not placements["deploy"].volumes:
        raise ValueError(
            f"{resources}: deploy.volumes: none; --deploy torchserve needs a volume that the server reads too, for the "
            "model store and the server's tokens"
        )
    setting = Setting(params, image, placements, remote, notify, deploy)
    together = pipeline == "families"
    build: Callable[..., Any] = families if together else PIPELINES[pipeline]
    # For each limit of a task, kfp reads the source of every function on the call stack: a thread's own is short.
    with ThreadPoolExecutor(1) as thread:
        built = thread.submit(build, (experiment, *against) if together else experiment, setting).result()
    # As kfp's compiler does, but with the C library, and without its comments: they list the defaults in an order that
    # changes from run to run.
    documents = [json_format.MessageToDict(spec) for spec in (built.pipeline_spec, built.platform_spec)]
    content = yaml.dump_all([document for document in documents if document], Dumper=yaml.CSafeDumper)
    for named in sorted({image, *(one.image for one in placements.values() if one.image)}):
        if "@sha256:" not in named:
            print(
                f"warning: image {named}: named without @sha256:DIGEST; where its content changes under this name, "
                "Kubeflow's cache answers with what the former content made",
                file=sys.stderr,
            )
    note = (
        f"# Made by `cadx compile {experiment}` from dvc.yaml, {params.name}, {resources.name} and the steps: "
        "change those.\n"
    )
    with replacing(output) as partial:
        partial.write_text(note + content, encoding="utf-8")
