"""The command line: every step of the pipeline, and the few commands that stand around them.

The composition root: the only module of `cadx` that imports upward, and only when a command is run.
"""

import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, Group, Parameter

from components import STEPS
from components.contract import Alarm

_TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Hospitals' networks are closed: no dependency may call home."""


_EXAMPLES = {
    "search": (
        "cadx search --recipe params.yaml --dataset data/work/phantom-xray/dataset "
        "--splits data/work/phantom-xray/splits.parquet --imbalance data/work/phantom-xray/imbalance.json "
        "--study data/work/phantom-xray/study --best data/work/phantom-xray/best.yaml "
        "--report data/work/phantom-xray/search.html --experiment phantom-xray --seed 0 "
        "--params params.yaml:phantom-xray"
    ),
    "deploy": (
        "cadx deploy --archive data/work/phantom-xray/0/model.mar "
        "--decision data/reports/phantom-xray/0/decision.json --dataset data/work/phantom-xray/dataset "
        "--predictions data/reports/phantom-xray/0/predictions.parquet "
        "--model-store data/serving/model_store --key-file data/serving/key_file.json "
        "--deployment data/serving/deployment.json --params params.yaml:phantom-xray"
    ),
    "monitor": (
        "cadx monitor --request-log data/serving/request_log --bundle data/work/phantom-xray/0/bundle "
        "--drift data/serving/drift.json --report data/serving/drift.html --params params.yaml:phantom-xray"
    ),
}
"""Of the steps that are no stages; `deploy` and `monitor` with a server that `cadx serve` runs."""
_COMMAND_NAMES = {"compile_pipeline": "compile"}  # a built-in function's name


def command_line(tokens: Sequence[str] = ()) -> App:
    """The application: one command per step, imported when it is called, then the others."""
    app = App(
        name="cadx",
        help="From raw medical images to a classifier in clinical use, with evidence for every number.\n\n"
        "The steps below run alone, as the stages of `dvc repro`, and as containers on Kubeflow: one command each.",
        help_format="markdown",
        version_flags=(),
        default_parameter=Parameter(negative=(), consume_multiple=True),
        help_epilogue="Example: `make run` walks the synthetic chest X-rays through every step; "
        "`cadx STEP --help` shows each step's own example.",
    )
    steps, others = Group("Steps, in order", sort_key=1), Group("Around them", sort_key=2)
    app["--help"].group = ""
    for number, step in enumerate(STEPS):
        asked = step.name in tokens[:1] and {"--help", "-h"} & set(tokens)
        app.command(
            f"components.{step.name}:{step.name}",
            name=step.name,
            help=step.summary,
            group=steps,
            sort_key=number,
            help_epilogue=_example(step.name) if asked else None,
        )
    for command in (show, results, new, serve, rehearse, compile_pipeline, doctor, dataset_form):
        app.command(command, name=_COMMAND_NAMES.get(command.__name__), group=others)
    return app


def show(experiment: str, /, *, work: Path = Path("data/work"), reports: Path = Path("data/reports")) -> None:
    """Show a finished experiment: a table here, and one self-contained page with pictures.

    Example: `cadx show phantom-xray` writes `data/reports/phantom-xray/index.html`.

    Parameters
    ----------
    experiment
        A section of params.yaml whose steps have run.
    work
        Where the steps keep data sets and bundles.
    reports
        Where the steps write what people read.
    """
    from cadx.overview import write_overview

    write_overview(experiment, work / experiment, reports / experiment)


def results() -> None:
    """Print every experiment's results as Markdown, beside what others report on the same data.

    Example: `cadx results > docs/results.md`.
    """
    from cadx.overview import results_markdown

    print(results_markdown(Path("data/catalog.yaml"), Path("params.yaml"), Path("data/reports")), end="")


def new(folder: Path, /, *, name: str = "", positive: str = "") -> None:
    """Turn a folder of your own images into a catalogue entry and an experiment.

    The folder holds one folder per class, or a CSV file with a row per image. Nothing is copied.

    Example: `cadx new ~/images/chest --positive pneumonia`, then `make reproduce EXPERIMENT=chest`.

    Parameters
    ----------
    folder
        The images.
    name
        The experiment's name; the folder's by default.
    positive
        The class to be found; the rarest by default.
    """
    import yaml
    from ruamel.yaml import YAML

    from cadx.catalog import describe_folder
    from cadx.files import replacing
    from components.contract import ROOT
    from serving.archive import NAME_PATTERN

    name = name or re.sub(r"[^a-z0-9.]+", "-", folder.resolve().name.lower()).strip("-.")
    if not re.fullmatch(NAME_PATTERN, name):
        raise ValueError(
            f"name {name!r}: give one of a-z, 0-9, '.', '_' and '-' with --name, a letter or digit first"
        )
    catalog, params, stages = ROOT / "data/catalog.yaml", ROOT / "params.yaml", ROOT / "dvc.yaml"
    for file in (catalog, params):
        if name in yaml.safe_load(file.read_text(encoding="utf-8")):
            raise ValueError(f"{file.name} already holds {name!r}; choose another name with --name")
    entry, notes = describe_folder(folder, positive=positive)
    chosen = {
        "ingest": {"source": name},
        "split": {"strategy": "patient"},
        "train": {
            "model": {"family": "resnet", "depth": 18},
            "preprocessing": {"height_px": 224, "width_px": 224, "intensity": "image"},
            "augmentation": {
                "rotation_degrees": 10,
                "translation_fraction": 0.05,
                "scale_fraction": 0.1,
                "brightness": 0.3,
                "contrast": 0.2,
            },
            "ema_decay": 0.99,
        },
        # Score the test split only once the recipe is frozen.
        "evaluate": {"split": "val"},
    }
    # DVC wants a section of every step.
    recipe = {name: {step.name: chosen.get(step.name, {}) for step in STEPS}}
    yaml_editor = YAML()
    pipeline = yaml_editor.load(stages.read_text(encoding="utf-8"))
    pipeline["vars"][0]["experiments"].append(name)
    with replacing(catalog) as new_catalog, replacing(params) as new_params, replacing(stages) as new_stages:
        new_catalog.write_text(
            catalog.read_text(encoding="utf-8")
            + "\n"
            + yaml.safe_dump({name: entry.model_dump(mode="json", exclude_defaults=True)}, sort_keys=False),
            encoding="utf-8",
        )
        new_params.write_text(
            params.read_text(encoding="utf-8") + "\n" + yaml.safe_dump(recipe, sort_keys=False),
            encoding="utf-8",
        )
        with new_stages.open("w", encoding="utf-8") as stream:
            yaml_editor.dump(pipeline, stream)
    for note in notes:
        print(f"note: {note}")
    print(f"added {name!r} to data/catalog.yaml, params.yaml and dvc.yaml; look them over, then type")
    print(f"    make reproduce EXPERIMENT={name}")


def serve(folder: Path = Path("data/serving"), /, *, port: int = 8080) -> None:
    """Run TorchServe on loopback until Ctrl-C, with tokens on; `cadx deploy` puts models into it.

    Example: `cadx serve`, then `cadx deploy --help` shows how a model gets there.

    Parameters
    ----------
    folder
        Where it keeps its model store, logs, tokens and the request log.
    port
        Of inference; management, metrics and gRPC take the four after it.
    """
    from serving.server import Ports
    from serving.server import serve as run_server

    run_server(folder, Ports.starting_at(port))


def rehearse(
    experiment: str,
    /,
    *,
    work: Path = Path("data/work"),
    reports: Path = Path("data/reports"),
    params: Path = Path("params.yaml"),
    requests: int = 200,
) -> None:
    """Rehearse clinical use on this machine: serve a packaged model, ask it, watch it for drift, stop it.

    Example: `cadx rehearse phantom-xray`, after `make reproduce EXPERIMENT=phantom-xray`.

    Parameters
    ----------
    experiment
        A section of params.yaml whose steps have run.
    work
        Where the steps keep data sets and bundles.
    reports
        Where the steps write what people read.
    params
        The parameter file.
    requests
        Images of the test split to be sent, once as they are and once as an aged detector gives them.
    """
    from pipelines.rehearsal import rehearse as run_rehearsal

    run_rehearsal(experiment, work=work, reports=reports, params=params, requests=requests)


def compile_pipeline(
    experiment: str,
    /,
    *,
    image: str,
    output: Path = Path("pipeline.yaml"),
    params: Path = Path("params.yaml"),
) -> None:
    """Compile an experiment to a Kubeflow pipeline: the commands of dvc.yaml, in containers.

    Example: `cadx compile phantom-xray --output pipeline.yaml --image registry.example/cadx@sha256:...`.

    Parameters
    ----------
    experiment
        A section of params.yaml; its values become the defaults of the pipeline's parameters.
    image
        The container image of every step, best as NAME@sha256:DIGEST: Kubeflow's cache knows images by name.
    output
        The compiled pipeline, YAML.
    params
        The parameter file.
    """
    from pipelines import compile_experiment

    compile_experiment(experiment, output, params=params, image=image)
    print(f"wrote {output}")


def doctor() -> None:
    """Check this machine: versions, accelerator, Java, ports, disk, telemetry switches.

    Example: `cadx doctor` exits with 1 if something is missing that a command needs.
    """
    from cadx.doctor import examine

    sys.exit(0 if examine() else 1)


def dataset_form() -> None:
    """Print the form of a dataset folder, as data/README.md holds it.

    Example: `cadx dataset-form > data/README.md`.
    """
    from cadx.datasets import schema_markdown

    print(
        "# The dataset folder\n\nWritten by `cadx dataset-form > data/README.md` from the schema that checks it.\n"
    )
    print(schema_markdown(), end="")


def main(arguments: Annotated[Sequence[str] | None, Parameter(parse=False)] = None) -> NoReturn:
    """Run one command; a mistake of the user's ends in one line on stderr and a non-zero status."""
    for name, value in _TELEMETRY_OFF.items():
        os.environ.setdefault(name, value)
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command_line(tokens)(tokens)
    except (ValueError, OSError) as error:
        _fail(tokens, error)
    except Alarm as alarm:
        print(f"cadx {' '.join(tokens[:1])}: {alarm}", file=sys.stderr)
        sys.exit(3)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(tokens: list[str], error: Exception) -> NoReturn:
    if os.environ.get("CADX_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        if error.errno == errno.ENOSPC:
            text += "; free some space and run it again: nothing half-written is left"
    else:
        text = " ".join(str(error).split())
    print(f"cadx {' '.join(tokens[:1])}: {text}", file=sys.stderr)
    sys.exit(1)


def _example(step: str) -> str:
    """The step's own line in dvc.yaml, with its placeholders filled in; or that of `_EXAMPLES`."""
    import yaml

    from components.contract import ROOT

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    command: str = stages[step]["cmd"] if step in stages else _EXAMPLES[step]
    command = command.replace("${item.experiment}", "phantom-xray").replace("${item.seed}", "0")
    return f"Example:\n\n```\n{' '.join(command.split())}\n```"


if __name__ == "__main__":
    main()
