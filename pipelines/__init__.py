"""Steps composed: for Kubeflow, and for one machine. The only package that imports kfp."""

from pathlib import Path
from typing import Literal

Pipeline = Literal["training", "families", "monitoring", "evaluation", "inference"]
"""What can be compiled: one module each."""

Deploy = Literal["volume", "torchserve", "none"]
"""Where a promoted model goes: to the volume from which manifests/serving takes it, to a TorchServe whose management
API the task reaches, or nowhere."""

RESOURCES = Path(__file__).parent / "resources.yaml"
"""Where each step runs, unless another file is given."""


def compile_experiment(
    experiment: str,
    output: Path,
    *,
    params: Path,
    image: str,
    pipeline: Pipeline = "training",
    against: tuple[str, ...] = (),
    resources: Path = RESOURCES,
    remote: str = "",
    notify: bool = False,
    deploy: Deploy = "volume",
) -> None:
    """Write a pipeline of an experiment as Kubeflow Pipelines reads it.

    Args:
        experiment: a section of `params` that dvc.yaml names too.
        output: the YAML file to write.
        params: the parameter file: its values become the defaults of a run.
        image: the image whose `cadx` runs every step that `resources` gives no other. Kubeflow's cache compares
            images by name only: give NAME@sha256:DIGEST, or results of an older image may be taken for this one's.
        pipeline: which of them.
        against: for `families`, the experiments that it is compared with.
        resources: where each step runs.
        remote: a DVC remote on S3: the dataset is fetched from there, as dvc.lock names it, in place of ingested.
        notify: tell a webhook how each run has ended: the step `notify`.
        deploy: where a promoted model goes, in the pipelines that train.

    Raises:
        ValueError: if the experiment, a parameter or a name cannot serve, or kfp is not installed.
    """
    require_kfp()
    from pipelines import compiling

    compiling.compile_experiment(
        experiment,
        output,
        params=params,
        image=image,
        pipeline=pipeline,
        against=against,
        resources=resources,
        remote=remote,
        notify=notify,
        deploy=deploy,
    )


def draw_pipeline(pipeline: Path, picture: Path) -> None:
    """Draw a compiled pipeline as an SVG file: `pipelines.picture`.

    Raises:
        ValueError: if the file is no compiled pipeline.
    """
    from pipelines.picture import draw

    draw(pipeline, picture)


def require_kfp() -> None:
    """Refuse to go on without kfp, in a line.

    Raises:
        ValueError: if it is not installed.
    """
    try:
        import kfp  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        raise ValueError("kfp is not installed: it is the extra 'kubeflow'; run `make setup`") from None
