"""The command line: every step of the pipeline, and the few commands that stand around them.

The composition root: the only module of `cadx` that imports upward, and only when a command is run.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

from cyclopts import App, Group, Parameter

from components import STEPS

_TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Hospitals' networks are closed: no dependency may call home."""


def command_line(tokens: Sequence[str] = ()) -> App:
    """The application: one command per step, imported when it is called, then the others."""
    app = App(
        name="cadx",
        help="From raw medical images to a classifier in clinical use, with evidence for every number.\n\n"
        "The steps below run alone or as the stages of `dvc repro`: one command each.",
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
            help_epilogue=_stage_example(step.name) if asked else None,
        )
    for command in (show, results, new, doctor, dataset_form):
        app.command(command, group=others)
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

    name = name or folder.resolve().name.lower().replace(" ", "-").replace("_", "-")
    catalog, params, stages = ROOT / "data/catalog.yaml", ROOT / "params.yaml", ROOT / "dvc.yaml"
    for file in (catalog, params):
        if name in yaml.safe_load(file.read_text(encoding="utf-8")):
            raise ValueError(f"{file.name} already holds {name!r}; choose another name with --name")
    entry, notes = describe_folder(folder, positive=positive)
    recipe = {
        name: {
            "ingest": {"source": name},
            "split": {"strategy": "patient"},
            "train": {"preprocessing": {"height_px": 224, "width_px": 224}},
            # Score the test split only once the recipe is frozen.
            "evaluate": {"split": "val"},
        }
    }
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
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _fail(tokens: list[str], error: Exception) -> NoReturn:
    if os.environ.get("CADX_DEBUG"):
        raise error
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = " ".join(str(error).split())
    print(f"cadx {' '.join(tokens[:1])}: {text}", file=sys.stderr)
    sys.exit(1)


def _stage_example(step: str) -> str | None:
    """The step's own line in dvc.yaml, with its placeholders filled in."""
    import yaml

    from components.contract import ROOT

    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].get(step)
    if stage is None:
        return None
    command: str = stage["cmd"].replace("${item.experiment}", "phantom-xray").replace("${item.seed}", "0")
    return f"Example:\n\n```\n{' '.join(command.split())}\n```"


if __name__ == "__main__":
    main()
