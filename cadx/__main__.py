"""The command line: every step of the pipeline, and the few commands that stand around them.

The composition root: the only module of `cadx` that imports upward, and only when a command is run.
"""

import errno
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

from cyclopts import App, Group, Parameter

from cadx import SPINS
from components import STEPS
from components.contract import Alarm
from pipelines import Deploy, Pipeline

_EXAMPLES = {
    "choose": (
        "cadx choose --all-metrics data/reports/phantom-xray/0/metrics.json data/reports/phantom-xray/1/metrics.json "
        "--all-decision data/reports/phantom-xray/0/decision.json data/reports/phantom-xray/1/decision.json "
        "--all-archive data/work/phantom-xray/0/model.mar data/work/phantom-xray/1/model.mar --all-predictions "
        "data/reports/phantom-xray/0/predictions.parquet data/reports/phantom-xray/1/predictions.parquet "
        "--choice chosen/choice.json --report chosen/choice.html --metrics chosen/metrics.json "
        "--decision chosen/decision.json --archive chosen/model.mar --predictions chosen/predictions.parquet "
        "--params params.yaml:phantom-xray"
    ),
    "notify": (
        "CADX_WEBHOOK=https://chat.hospital.example/hook cadx notify --notification notification.json "
        '--experiment phantom-xray --status \'{"state": "FAILED"}\' --params {}'
    ),
    "fetch": (
        "AWS_ENDPOINT_URL=https://s3.hospital.example cadx fetch --dataset data/work/phantom-xray/dataset --params "
        '\'{"remote": "s3://cadx/datasets", "md5": "0123456789abcdef0123456789abcdef.dir", "digest": "sha256:..."}\''
    ),
    "predict": (
        "cadx predict --bundle data/work/phantom-xray/0/bundle --images inbox --predictions answers.parquet "
        "--unreadable unreadable.jsonl --params params.yaml:phantom-xray"
    ),
    "search": (
        "cadx search --recipe params.yaml --dataset data/work/phantom-xray/dataset "
        "--splits data/work/phantom-xray/splits.parquet --imbalance data/work/phantom-xray/imbalance.json "
        "--study data/work/phantom-xray/study --best data/work/phantom-xray/best.yaml "
        "--report data/work/phantom-xray/search.html --experiment phantom-xray --seed 0 "
        "--params params.yaml:phantom-xray"
    ),
    "deliver": (
        "cadx deliver --archive data/work/phantom-xray/0/model.mar "
        "--decision data/reports/phantom-xray/0/decision.json --dataset data/work/phantom-xray/dataset "
        "--predictions data/reports/phantom-xray/0/predictions.parquet --models /models "
        "--delivery delivery.json --params params.yaml:phantom-xray"
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
        "--requests data/serving/requests --drift data/serving/drift.json --report data/serving/drift.html "
        "--evidently data/serving/evidently.html --prometheus data/serving/cadx.prom "
        "--params params.yaml:phantom-xray"
    ),
}
"""Of the steps that are no stages; `deploy` and `monitor` with a server that `cadx serve` runs."""
_REGISTRY = "sqlite:///data/registry/mlflow.db"
_COMMAND_NAMES = {"compile_pipeline": "compile", "write_code_digests": "code-digests"}


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
    asks = bool({"--help", "-h"} & set(tokens))
    runs_step = not asks and any(step.name in tokens[:1] for step in STEPS)
    steps, others = Group("Steps, in order", sort_key=1), Group("Around them", sort_key=2)
    app["--help"].group = ""
    for number, step in enumerate(STEPS):
        app.command(
            f"components.{step.name}:{step.name}",
            name=step.name,
            # Parsed out of each step's source: a step that runs needs none of them.
            help=None if runs_step else step.summary,
            group=steps,
            sort_key=number,
            help_epilogue=_example(step.name) if asks and step.name in tokens[:1] else None,
        )
    for command in (
        show,
        results,
        new,
        serve,
        rollback,
        rehearse,
        compile_pipeline,
        run_local,
        submit,
        schedule,
        status,
        logs,
        verify,
        sign,
        compare,
        benchmark,
        recommend,
        doctor,
        write_code_digests,
        dataset_form,
    ):
        app.command(
            command, name=_COMMAND_NAMES.get(command.__name__), group=others, help_epilogue=""
        )  # which has its example among its own words
    app.command(_champion(others))
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


def results(
    *,
    output: Path = Path("docs"),
    work: Path = Path("data/work"),
    reports: Path = Path("data/reports"),
) -> None:
    """Write the page of every experiment's results, with curves, failures, and what others report on the same data.

    Example: `cadx results` writes `docs/results.md` and the pictures in `docs/results`.

    Parameters
    ----------
    output
        The folder of the page.
    work
        Where the steps keep data sets and bundles.
    reports
        Where the steps write what people read.
    """
    from cadx.results import write_results

    planned = _planned(Path("dvc.yaml"), "seeds")
    missing = write_results(
        Path("data/catalog.yaml"),
        Path("params.yaml"),
        seeds=planned,
        work=work,
        reports=reports,
        output=output,
    )
    for what in missing:
        print(f"missing: {what}")
    print(f"wrote {output / 'results.md'}")


def new(folder: Path, /, *, name: str = "", positive: str = "") -> None:
    """Turn a folder of your own images, volumes or slides into a catalogue entry and an experiment.

    Images are DICOM, PNG or JPEG; volumes are NIfTI files, or folders or zips of DICOM slices; slides are TIFF. The
    folder holds one folder per class (also within train, val and test), or a CSV file with a row per sample: columns
    file and label, or label_CLASS; also mask, patient, site, scanner, age, sex, view and split. For a detector it holds
    boxes in COCO's or Pascal VOC's form, or in boxes.csv beside a CSV without labels. Nothing is copied.

    Example: `cadx new ~/images/chest --positive pneumonia`, then `make reproduce EXPERIMENT=chest`.

    Parameters
    ----------
    folder
        The images, volumes or slides.
    name
        The experiment's name; the folder's by default, with - for other signs than a-z and 0-9.
    positive
        The class to be found; by default the one that does not say that nothing was found, else the rarest.
    """
    from cadx.describing import describe_folder
    from cadx.recipes import experiment_sections

    name = name or re.sub(r"[^a-z0-9]+", "-", folder.resolve().name.lower()).strip("-")
    _require_new_name(name)
    described = describe_folder(folder, positive=positive)
    sections = experiment_sections(name, described.train, has_splits=described.has_splits)
    _register(name, described.entry.model_dump(mode="json", exclude_defaults=True), sections)
    for note in described.notes:
        print(f"note: {note}")
    print(f"added {name!r} to data/catalog.yaml, params.yaml and dvc.yaml; look them over, then type")
    print(f"    make reproduce EXPERIMENT={name}")


def serve(
    folder: Path = Path("data/serving"),
    /,
    *,
    port: int = 8080,
    host: str = "127.0.0.1",
    certificate: Path | None = None,
    private_key: Path | None = None,
    behind_proxy: bool = False,
    token_minutes: int = 60,
    demo: bool = False,
) -> None:
    """Run TorchServe until Ctrl-C, on loopback and with tokens on; `cadx deploy` puts models into it.

    Slides are read under the folder that the environment variable CADX_SLIDE_ROOT names.

    Example: `cadx serve`, then `cadx deploy --help` shows how a model gets there.

    Parameters
    ----------
    folder
        Where it keeps its model store, logs, tokens and the request log.
    port
        Of inference; management, metrics and gRPC take the four after it.
    host
        The IPv4 address where inference listens, such as 0.0.0.0; all else stays on loopback.
    certificate
        PEM file, with its chain: inference then speaks https.
    private_key
        Of the certificate, PEM, PKCS #8.
    behind_proxy
        TLS ends before the server: it may listen beyond loopback without.
    token_minutes
        How long a token lasts; new ones come at half of that.
    demo
        Put a model of each kind into service whose answers have the right form and mean nothing.
    """
    from serving.demo import register_demos
    from serving.server import Ports, Tls, TorchServe
    from serving.server import serve as run_server

    if (certificate is None) != (private_key is None):
        raise ValueError("TLS needs both: give --certificate and --private-key")
    tls = Tls(certificate, private_key) if certificate and private_key else None
    run_server(
        TorchServe(
            folder,
            Ports.starting_at(port),
            console=True,
            host=host,
            tls=tls,
            behind_proxy=behind_proxy,
            token_minutes=token_minutes,
        ),
        register_demos if demo else None,
    )


def rollback(
    name: str,
    /,
    *,
    folder: Path = Path("data/serving"),
    management: str = "http://127.0.0.1:8081",
) -> None:
    """Let the version of a model answer that was live before the present one.

    Example: `cadx rollback phantom-xray`, on the machine of the server.

    Parameters
    ----------
    name
        The model's name in the server's addresses.
    folder
        Of the server, as for `cadx serve`.
    management
        The server's management address.
    """
    from serving.management import Management

    server = Management(management, key_file=folder / "key_file.json")
    left, back = server.roll_back(name, folder / "model_store")
    print(f"{name}: version {back} answers again, in the place of {left}")


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
    pipeline: Pipeline = "training",
    against: tuple[str, ...] = (),
    params: Path = Path("params.yaml"),
    resources: Path | None = None,
    picture: Path | None = None,
    remote: str = "",
    notify: bool = False,
    deploy: Deploy = "volume",
) -> None:
    """Compile an experiment to a Kubeflow pipeline: the commands of dvc.yaml, in containers.

    Example: `cadx compile phantom-xray --output pipeline.yaml --image registry.example/cadx@sha256:...`.

    Parameters
    ----------
    experiment
        A section of params.yaml; its values become the defaults of the pipeline's parameters.
    image
        The container image of every step, best as NAME@sha256:DIGEST: Kubeflow's cache knows images by name. The
        file of resources may name another for a step.
    output
        The compiled pipeline, YAML.
    pipeline
        Training; families: several experiments on the same data, the best of them deployed; monitoring, which trains
        again on drift; evaluation of a bundle at another site; or inference over a folder of files.
    against
        For families: the experiments beside the first.
    params
        The parameter file.
    resources
        Where each step runs; pipelines/resources.yaml by default.
    picture
        Also draw the compiled pipeline, as an SVG file.
    remote
        A DVC remote on S3, such as s3://cadx/datasets: the dataset is fetched from there as dvc.lock names it.
    notify
        End every run, failed or not, in a message to the webhook of the section `notify` in the file of resources.
    deploy
        Where a promoted model goes: to the volume from which manifests/serving takes it; to a TorchServe whose
        management API the task reaches; or nowhere.
    """
    from pipelines import RESOURCES, compile_experiment, draw_pipeline

    compile_experiment(
        experiment,
        output,
        params=params,
        image=image,
        pipeline=pipeline,
        against=against,
        resources=resources or RESOURCES,
        remote=remote,
        notify=notify,
        deploy=deploy,
    )
    print(f"wrote {output}")
    if picture:
        draw_pipeline(output, picture)
        print(f"wrote {picture}")


_Settings = Annotated[
    tuple[str, ...],
    Parameter(
        name="--set",
        consume_multiple=False,
        help="parameter=value or step.field=value, as in train.epochs=3.",
    ),
]
_Endpoint = Annotated[
    str, Parameter(help="Address of KFP's API, such as http://localhost:8888; else KF_PIPELINES_ENDPOINT.")
]
_Namespace = Annotated[str, Parameter(help="Your profile's, where several users share a cluster.")]


def submit(
    pipeline: Path,
    /,
    *,
    settings: _Settings = (),
    name: str = "",
    experiment: str = "cadx",
    endpoint: _Endpoint = "",
    namespace: _Namespace = "",
) -> None:
    """Start a run of a compiled pipeline on Kubeflow; a wrong parameter is refused before anything is sent.

    Tokens come from the environment: docs/kubeflow.md.

    Example: `cadx submit pipeline.yaml --set train.epochs=3 --endpoint http://localhost:8888`.

    Parameters
    ----------
    pipeline
        What `cadx compile` wrote.
    name
        The run's; the file's by default.
    experiment
        Under which Kubeflow lists it.
    """
    from pipelines import require_kfp

    require_kfp()
    from pipelines import cluster

    arguments = cluster.checked_arguments(pipeline, settings)
    connection = cluster.connect(endpoint, namespace)
    run_id = cluster.submit(
        connection, pipeline, name=name or pipeline.stem, experiment=experiment, arguments=arguments
    )
    print(f"run {run_id}: {connection.host}/#/runs/details/{run_id}")
    print(f"    cadx status {run_id} --follow")


def schedule(
    pipeline: Path,
    /,
    *,
    cron: str = "",
    interval_s: int = 0,
    settings: _Settings = (),
    name: str = "",
    experiment: str = "cadx",
    endpoint: _Endpoint = "",
    namespace: _Namespace = "",
) -> None:
    """Start a compiled pipeline again and again on Kubeflow.

    Example: `cadx schedule monitoring.yaml --cron "0 6 * * *" --set bundle_uri=s3://models/phantom-xray/bundle`.

    Parameters
    ----------
    pipeline
        What `cadx compile` wrote.
    cron
        Minute, hour, day, month, weekday; UTC.
    interval_s
        Seconds between two starts, instead.
    name
        The schedule's; the file's by default.
    experiment
        Under which Kubeflow lists its runs.
    """
    from pipelines import require_kfp

    require_kfp()
    from pipelines import cluster

    arguments = cluster.checked_arguments(pipeline, settings)
    times = cluster.checked_times(cron, interval_s)
    connection = cluster.connect(endpoint, namespace)
    identity = cluster.schedule(
        connection,
        pipeline,
        name=name or pipeline.stem,
        experiment=experiment,
        arguments=arguments,
        times=times,
    )
    print(f"schedule {identity}: {connection.host}/#/recurringrun/details/{identity}")


def status(
    run_id: str, /, *, follow: bool = False, endpoint: _Endpoint = "", namespace: _Namespace = ""
) -> None:
    """Show how the tasks of a run stand; exit status 1 if it failed.

    Example: `cadx status 0b3c... --follow`.

    Parameters
    ----------
    run_id
        What `cadx submit` printed.
    follow
        Go on until the run has ended, a line for each change.
    """
    from pipelines import require_kfp

    require_kfp()
    from pipelines import cluster

    cluster.status(cluster.connect(endpoint, namespace), run_id, print, follow=follow)


def logs(run_id: str, /, *, task: str = "", endpoint: _Endpoint = "", namespace: _Namespace = "") -> None:
    """Print what the tasks of a run have said.

    Example: `cadx logs 0b3c... --task train-0`.

    Parameters
    ----------
    run_id
        What `cadx submit` printed.
    task
        One task, by the name that `cadx status` says; all of them otherwise.
    """
    from pipelines import require_kfp

    require_kfp()
    from pipelines import cluster

    for line in cluster.logs(cluster.connect(endpoint, namespace), run_id, task=task):
        print(line)


def run_local(
    experiment: str,
    /,
    *,
    image: str = "cadx/steps",
    params: Path = Path("params.yaml"),
    folder: Path = Path("data/work/kubeflow"),
) -> None:
    """Run an experiment's Kubeflow pipeline in containers on this machine; exit with 1 if its bytes are not DVC's.

    Example: `cadx run-local phantom-xray-pilot`, after `make images` and `make reproduce`.

    Parameters
    ----------
    experiment
        A section of params.yaml that dvc.yaml names too.
    image
        Of every step, on the Docker engine that DOCKER_HOST names.
    params
        The parameter file.
    folder
        Where runs go, each with a folder per task.
    """
    from pipelines import require_kfp

    require_kfp()
    from pipelines.local import report_comparison, run_in_containers

    run = run_in_containers(experiment, image=image, params=params, folder=folder)
    sys.exit(0 if report_comparison(run, experiment) else 1)


def verify(
    target: str,
    /,
    *,
    work: Path = Path("data/work"),
    reports: Path = Path("data/reports"),
    dataset: Path | None = None,
    splits: Path | None = None,
    validation: Path | None = None,
    imbalance: Path | None = None,
    predictions: Path | None = None,
    metrics: Path | None = None,
    review: Path | None = None,
    decision: Path | None = None,
    archive: Path | None = None,
    deployment: Path | None = None,
    signature: Path | None = None,
    public_key: Path | None = None,
    params: Path | None = None,
    endpoint: str = "",
    key_file: Path | None = None,
    ca_file: Path | None = None,
    prediction: str = "",
    request_log: Path | None = None,
) -> None:
    """Follow a model's chain of digests from the data to an answer, and name every file that was changed.

    Files are looked for where the stages leave them; name those that lie elsewhere. Exits with 1 if a link is broken.

    Example: `cadx verify phantom-xray --public-key key.pub`.

    Parameters
    ----------
    target
        An experiment, a bundle folder, or an archive.
    work
        Where the steps keep data sets and bundles.
    reports
        Where the steps write what people read.
    dataset
        The folder of the images.
    splits
        Who stands in which split.
    validation
        What `cadx validate` found.
    imbalance
        What `cadx imbalance` counted.
    predictions
        Of the evaluation.
    metrics
        Of the same.
    review
        A reviewer's folder, from `cadx sign --reviewer`.
    decision
        The gate's.
    archive
        What `cadx package` wrote.
    deployment
        What `cadx deploy` recorded.
    signature
        Of the bundle; the file `bundle.sig` beside it by default. An archive's `model.mar.sig` is looked at too.
    public_key
        The signer's, PEM: without it the signature is not checked.
    params
        The parameter file.
    endpoint
        The inference address of a running server, such as http://127.0.0.1:8080: which bundle answers there?
    key_file
        The server's tokens.
    ca_file
        Certificates that are trusted at an https endpoint, PEM; those of this machine by default.
    prediction
        The prediction_id of an answer: which bundle gave it, and what does the request log say of it?
    request_log
        The server's folder of answers; `data/serving/request_log` by default.
    """
    from pipelines.verification import verify as follow

    given = {
        name: value for name, value in locals().items() if name not in ("target", "work", "reports", "follow")
    }
    sys.exit(0 if follow(target, work=work, reports=reports, **given) else 1)


def sign(
    target: Path, /, *, key: Path, output: Path | None = None, reviewer: str = "", statement: str = ""
) -> None:
    """Sign a bundle or an archive; or, as a reviewer, the metrics of a model that may go into service.

    A bundle's signature stands beside it. A reviewer's is the folder that `cadx gate --review` takes; the gate asks
    for it where its section names `reviewers`.

    Example: `cadx sign data/work/phantom-xray/0/bundle --key key.pem`.

    Parameters
    ----------
    target
        A bundle folder or an archive; with --reviewer a metrics.json.
    key
        The private key, PEM, P-256, P-384 or P-521: `openssl ecparam -name prime256v1 -genkey -noout -out key.pem`.
    output
        The signature file, TARGET.sig by default; with --reviewer the folder, `review` beside the metrics by default.
    reviewer
        The name under which the gate knows the reviewer's public key.
    statement
        What the reviewer wants to say.
    """
    from cadx.gating import read_metrics
    from cadx.signing import Review, signature_of, write_review
    from cadx.signing import sign as write_signature

    if not reviewer:
        written = output or signature_of(target)
        write_signature(target, key, written)
    else:
        from cadx.files import digest_path

        written = output or target.parent / "review"
        record = read_metrics(target)
        review = Review(
            bundle=record.bundle, metrics=digest_path(target), reviewer=reviewer, statement=statement
        )
        write_review(written, review, key)
    print(f"wrote {written}")


def compare(a: Path, b: Path, /, *, output: Path = Path("compare.html")) -> None:
    """Set two models side by side on the same patients: paired differences, tests, and a page with a figure.

    Example: `cadx compare data/reports/phantom-xray/0 data/reports/phantom-xray/1`.

    Parameters
    ----------
    a
        A predictions file, or the folder of reports that holds one.
    b
        Another, of the same images.
    output
        The page.
    """
    from cadx.comparing import compare_files

    compare_files(a, b, output)


def _champion(group: Group) -> App:
    """The commands of the registry of champions."""
    app = App(
        name="champion",
        help="Show, promote and export the champion of an experiment, in a registry of MLflow.\n\n"
        "Example: `cadx champion promote phantom-xray --seed 0`, then `cadx champion show`.",
        default_parameter=Parameter(negative=()),
        version_flags=(),
        help_epilogue="",
        group=group,
    )
    app.command(show_champion, name="show")
    app.command(promote_champion, name="promote")
    app.command(export_champion, name="export")
    return app


def show_champion(experiment: str = "", /, *, registry: str = _REGISTRY) -> None:
    """Show the champion and its history, of an experiment or of all.

    Example: `cadx champion show phantom-xray`.

    Parameters
    ----------
    experiment
        All of them by default.
    registry
        MLflow's, a database or a server.
    """
    from cadx.registry import Registry, show_history

    show_history(Registry(registry, create=False), experiment)


def promote_champion(
    experiment: str,
    /,
    *,
    seed: int = 0,
    replace: bool = False,
    reports: Path = Path("data/reports"),
    registry: str = _REGISTRY,
) -> None:
    """Make the bundle of a seed the champion, if the gate let it through and compared it with the present one.

    Example: `cadx champion promote phantom-xray --seed 0`.

    Parameters
    ----------
    experiment
        A section of params.yaml whose steps have run.
    seed
        Of the bundle.
    replace
        Also where the gate has not compared it with the present champion.
    reports
        Where the steps write what people read.
    registry
        MLflow's, a database or a server.
    """
    from cadx.registry import Registry

    told = reports / experiment / str(seed)
    made = Registry(registry).promote(
        experiment,
        decision=told / "decision.json",
        metrics=told / "metrics.json",
        predictions=told / "predictions.parquet",
        replace=replace,
    )
    print(f"{experiment}: version {made.version} is the champion, bundle {made.bundle}")


def export_champion(experiment: str, /, *, output: Path, registry: str = _REGISTRY) -> None:
    """Write the champion's predictions, which `cadx gate --champion` compares a challenger with.

    Example: `cadx champion export phantom-xray --output champion.parquet`.

    Parameters
    ----------
    experiment
        Whose champion.
    output
        The predictions file.
    registry
        MLflow's, a database or a server.
    """
    from cadx.registry import Registry

    made = Registry(registry, create=False).export(experiment, output)
    print(f"wrote {output}: version {made.version}, bundle {made.bundle}")


def benchmark(
    *,
    measure: Literal["all", "runs", "steps", "nothing"] = "all",
    experiment: tuple[str, ...] = (),
    work: Path = Path("data/work"),
    reports: Path = Path("data/reports"),
    docs: Path = Path("docs"),
    readme: Path = Path("README.md"),
) -> None:
    """Measure every family on this machine, beside the figures of the handbook's table: about ten minutes.

    Writes docs/benchmark.json, a figure beside it, and the table in README.md. Experiments are measured where they
    have been run; a training step at the handbook's sizes needs no data.

    Example: `cadx benchmark`; `cadx benchmark --experiment phantom-volume` measures that one alone; `cadx benchmark
    --measure nothing` shows the figures that are there.

    Parameters
    ----------
    measure
        Runs: what finished experiments reached, and the time and memory of an answer. Steps: the memory of a training
        step. What is not measured again stays.
    experiment
        The only experiments that are measured, and no step; those of the others stay.
    work
        Where the steps keep data sets and bundles.
    reports
        Where the steps write what people read.
    docs
        The folder of benchmark.json.
    readme
        The page that holds the table.
    """
    from cadx import benchmarking

    file = docs / benchmarking.BENCHMARK.name
    if measure == "nothing":
        found = benchmarking.read_benchmark(file)
    else:
        is_part = measure != "all" or bool(experiment)
        before = benchmarking.read_benchmark(file) if file.is_file() and is_part else None
        found = benchmarking.measure(
            Path("params.yaml"),
            Path("data/catalog.yaml"),
            work,
            reports,
            before=before,
            runs=measure != "steps",
            steps=measure != "runs" and not experiment,
            experiments=experiment,
        )
        benchmarking.write(found, docs, readme)
    benchmarking.show(found)


def recommend(
    dataset: str,
    /,
    *,
    memory_gb: float | None = None,
    work: Path = Path("data/work"),
    figures: Path = Path("docs/benchmark.json"),
) -> None:
    """Advise a family and a recipe for a data set, from what `cadx benchmark` measured, and say why.

    Example: `cadx recommend bccd --memory-gb 4`.

    Parameters
    ----------
    dataset
        A name of the catalogue, or the folder of an ingested data set.
    memory_gb
        For training, instead of what is free here.
    work
        Where the steps keep data sets.
    figures
        What `cadx benchmark` wrote.
    """
    from tempfile import TemporaryDirectory

    from cadx.benchmarking import read_benchmark
    from cadx.datasets import DatasetFolder
    from cadx.recommending import advise, facts_of, memory_at_hand
    from cadx.recommending import show as show_advice
    from components.ingest import IngestParams, ingest
    from components.split import SplitParams

    if memory_gb is not None and not memory_gb > 0:
        raise ValueError(f"--memory-gb {memory_gb:g}: give GB above 0")
    measured = read_benchmark(figures)
    places = (Path(dataset), work / dataset / "dataset")
    found = next((place for place in places if (place / "dataset.json").is_file()), None)
    fractions = SplitParams().fractions.model_dump()
    if found is not None:
        facts = facts_of(DatasetFolder(found), fractions)
    else:
        with TemporaryDirectory(prefix="cadx-recommend-") as temporary:
            made = Path(temporary) / "dataset"
            ingest(
                catalog=Path("data/catalog.yaml"),
                cache=Path("data/sources"),
                dataset=made,
                params=IngestParams(source=dataset),
            )
            facts = facts_of(DatasetFolder(made), fractions)
    free_mb, is_gpu = memory_at_hand()
    advice = advise(
        facts,
        free_mb if memory_gb is None else memory_gb * 1000,
        measured,
        gpu=is_gpu,
    )
    show_advice(facts, advice, _all_steps(advice.sections))


def doctor() -> None:
    """Check this machine: versions, accelerator, Java, ports, disk, telemetry switches.

    Example: `cadx doctor` exits with 1 if something is missing that a command needs.
    """
    from cadx.doctor import examine

    sys.exit(0 if examine() else 1)


def write_code_digests(*, output: Path) -> None:
    """Write a digest of the code behind each stage: by it `dvc repro` sees which stages an edit concerns.

    Example: `cadx code-digests --output data/work/code.json`.

    Parameters
    ----------
    output
        A JSON file: the digests by step.
    """
    from cadx.files import write_json
    from components import code_digests

    write_json(output, code_digests())


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
    from cadx.doctor import TELEMETRY_OFF

    for name, value in {**TELEMETRY_OFF, **SPINS}.items():
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


def _read_mapping(file: Path) -> dict[str, Any]:
    """What a YAML file of the project holds."""
    from cadx.settings import read_yaml

    held = read_yaml(file)
    if not isinstance(held, dict):
        raise ValueError(f"{file}: holds no entry; take it from version control again")
    return held


def _require_new_name(name: str) -> None:
    """Refuse a name of which no experiment can be, or that one of the project's files holds."""
    from components.contract import ROOT

    # As serving.archive.NAME_PATTERN, but no dot, at which DVC parts the name of a section from its keys.
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name):
        raise ValueError(
            f"name {name!r}: give one of a-z, 0-9, '_' and '-' (no dot) with --name, a letter or digit first"
        )
    stages = ROOT / "dvc.yaml"
    held = {file.name: _read_mapping(file) for file in (ROOT / "data/catalog.yaml", ROOT / "params.yaml")}
    held[stages.name] = _planned(stages, "experiments")
    for file, names in held.items():
        if name in names:
            raise ValueError(f"{file} already holds {name!r}; choose another name with --name")


def _register(name: str, entry: dict[str, Any], sections: dict[str, Any]) -> None:
    """Add an entry to the catalogue, and its experiment to params.yaml and dvc.yaml."""
    import yaml
    from ruamel.yaml import YAML

    from cadx.files import replacing
    from components.contract import ROOT

    catalog, params, stages = ROOT / "data/catalog.yaml", ROOT / "params.yaml", ROOT / "dvc.yaml"
    yaml_editor = YAML()
    yaml_editor.indent(mapping=2, sequence=4, offset=2)  # as it stands: one line is added
    yaml_editor.width = 10_000
    pipeline = yaml_editor.load(stages.read_text(encoding="utf-8"))
    pipeline["vars"][0]["experiments"].append(name)
    with replacing(catalog) as new_catalog, replacing(params) as new_params, replacing(stages) as new_stages:
        for file, new_file, content in (
            (catalog, new_catalog, entry),
            (params, new_params, _all_steps(sections)),
        ):
            added = yaml.safe_dump({name: content}, sort_keys=False)
            new_file.write_text(f"{file.read_text(encoding='utf-8')}\n{added}", encoding="utf-8")
        with new_stages.open("w", encoding="utf-8") as stream:
            yaml_editor.dump(pipeline, stream)


def _all_steps(sections: dict[str, Any]) -> dict[str, Any]:
    """An experiment's sections as DVC wants them: one of every step."""
    return {step.name: sections.get(step.name, {}) for step in STEPS}


def _planned(stages: Path, what: Literal["experiments", "seeds"]) -> Any:
    """What dvc.yaml runs."""
    try:
        return _read_mapping(stages)["vars"][0][what]
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"{stages.name}: no list of {what} under vars; take it from version control again"
        ) from None


def _example(step: str) -> str:
    """The step's own line in dvc.yaml, with its placeholders filled in; or that of `_EXAMPLES`."""
    from components.contract import ROOT

    stages = _read_mapping(ROOT / "dvc.yaml")["stages"]
    command: str = stages[step]["cmd"] if step in stages else _EXAMPLES[step]
    command = command.replace("${item.experiment}", "phantom-xray").replace("${item.seed}", "0")
    return f"Example:\n\n```\n{' '.join(command.split())}\n```"


if __name__ == "__main__":
    main()
