"""Steps composed: for Kubeflow, and for one machine. The only package that imports kfp."""

from pathlib import Path


def compile_experiment(experiment: str, output: Path, *, params: Path, image: str) -> None:
    """Write an experiment's training pipeline as Kubeflow Pipelines reads it: `pipelines.training`.

    Args:
        experiment: a section of `params` that dvc.yaml names too.
        output: the YAML file to write.
        params: the parameter file: its values become the defaults of a run.
        image: the image whose `cadx` runs every step. Kubeflow's cache compares images by name only: give
            NAME@sha256:DIGEST, or results of an older image may be taken for this one's.

    Raises:
        ValueError: if the experiment, a parameter or a name cannot serve, or kfp is not installed.
    """
    try:
        from pipelines import training
    except ModuleNotFoundError as error:
        if error.name != "kfp":
            raise
        raise ValueError("kfp is not installed: it is the extra 'kubeflow'; run `make setup`") from None
    training.compile_experiment(experiment, output, params=params, image=image)
