"""A compiled pipeline, read back from its file."""

from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from kfp.pipeline_spec import pipeline_spec_pb2


def read_pipeline(path: Path) -> dict[str, Any]:
    """The pipeline in a file, as Kubeflow's schema knows it.

    Raises:
        ValueError: if there is no file, or no compiled pipeline in it.
    """
    try:
        spec: dict[str, Any] = next(yaml.safe_load_all(path.read_text(encoding="utf-8")))
        parsed = json_format.ParseDict(spec, pipeline_spec_pb2.PipelineSpec())
    except (FileNotFoundError, IsADirectoryError):
        raise ValueError(f"{path}: no such file; write one with `cadx compile`") from None
    except (
        UnicodeDecodeError,
        yaml.YAMLError,
        json_format.ParseError,
        TypeError,
        AttributeError,
        StopIteration,
    ):
        parsed = None
    if parsed is None or not parsed.root.dag.tasks:
        raise ValueError(f"{path}: no compiled pipeline; write one with `cadx compile`")
    return spec
