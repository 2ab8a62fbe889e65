"""The families beside the source text's own table: quality, memory, time, latency and size, all measured here.

A run is an experiment of params.yaml that went through the steps of cadx: its quality is in its metrics.json, what
training took in its training.jsonl, and what an answer takes is measured on its bundle. A step is a network of the
size that the text names, trained for two steps on noise by the very loop that trains the runs: memory is a matter of
shapes, and needs no patients. Whatever memory is told of is measured in a process of its own.

`docs/benchmark.json` keeps the figures; tables, page and drawing are made of that file alone.
"""

import contextlib
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pandas as pd
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cadx.bundle import read_manifest, versions
from cadx.catalog import PhantomEntry, load_catalog
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo, read_splits
from cadx.explaining import title
from cadx.files import read_json_lines, replacing, write_json
from cadx.loading import input_text
from cadx.memory import peak_memory_bytes
from cadx.reporting import INK, LEGEND, MARK, MISSING, MUTED, PALETTE, estimate_text, panels
from cadx.results import read_numbers
from cadx.settings import did_you_mean, read_yaml
from cadx.training import TrainingConfig
from cadx.training.loop import fit
from cadx.types import Config, Digest, Estimate, Kind, Task

BENCHMARK = Path("docs/benchmark.json")
COMMAND = "cadx benchmark"
MARKERS = ("<!-- cadx benchmark -->", "<!-- end of cadx benchmark -->")
"""Between these a page holds what `embed` puts there."""

HALF = 0.5
"""What we want to need of the text's memory."""

_WIDTH = 140
_TIMED = 20
_TIMED_S = 20.0
_MB = 1e6

T = TypeVar("T")


class Told(NamedTuple):
    """A row of the source text's table of families (section "Task-driven Model Selection").

    The text names neither data nor input size, batch or machine.

    Attributes:
        name: of the model.
        families: ours of that kind.
        kinds: of samples that the row speaks of.
        quality: lowest and highest; accuracy of classifiers, mAP of detectors.
        memory_gb: what it uses.
    """

    name: str
    families: tuple[str, ...]
    kinds: tuple[Kind, ...]
    quality: tuple[float, float]
    memory_gb: float


TOLD = (
    Told("ResNet50", ("resnet",), ("image",), (0.85, 0.92), 2.0),
    Told("DenseNet121", ("densenet",), ("image",), (0.87, 0.94), 2.5),
    Told("3D ResNet", ("resnet3d", "densenet3d"), ("volume",), (0.82, 0.89), 8.0),
    Told("Faster R-CNN", ("faster_rcnn",), ("image",), (0.78, 0.85), 4.0),
    Told("YOLOv5", ("yolo",), ("image",), (0.75, 0.82), 1.5),
    Told("Attention MIL", ("mil",), ("slide",), (0.80, 0.88), 6.0),
)


class StepSpec(NamedTuple):
    """A network, the size of what it sees and how many at once.

    Attributes:
        name: of the step; one of `TOLD`, or our own.
        kind: of the samples.
        task: of the samples.
        shape: of a sample's array.
        batch_size: samples of a step.
        recipe: model and preprocessing, as `train` takes them.
    """

    name: str
    kind: Kind
    task: Task
    shape: tuple[int, ...]
    batch_size: int
    recipe: Mapping[str, Any]


_CHEST = {"height_px": 224, "width_px": 224}
_DETECTOR = {"height_px": 512, "width_px": 512}
STEPS = (
    StepSpec(
        "ResNet50",
        "image",
        "binary",
        (224, 224),
        16,
        {"model": {"family": "resnet", "depth": 50}, "preprocessing": _CHEST},
    ),
    StepSpec(
        "DenseNet121",
        "image",
        "binary",
        (224, 224),
        16,
        {"model": {"family": "densenet"}, "preprocessing": _CHEST},
    ),
    StepSpec(
        "3D ResNet",
        "volume",
        "binary",
        (96, 96, 96),
        2,
        {
            "model": {"family": "resnet3d"},
            "preprocessing": {"patch_px": [96, 96, 96]},
            "patches_per_sample": 1,
        },
    ),
    StepSpec(
        "Faster R-CNN",
        "image",
        "detection",
        (512, 512),
        2,
        {
            "model": {"family": "faster_rcnn", "depth": 50, "fpn_channels": 256},
            "preprocessing": _DETECTOR,
        },
    ),
    StepSpec(
        "YOLOv5",
        "image",
        "detection",
        (512, 512),
        8,
        {"model": {"family": "yolo"}, "preprocessing": _DETECTOR},
    ),
    StepSpec(
        "Attention MIL",
        "features",
        "binary",
        (10_000, 2048),
        1,
        {
            "model": {"family": "mil", "hidden_dim": 512, "attention_dim": 256},
            "preprocessing": {"channels": 2048},
        },
    ),
    StepSpec(
        "ResNet-18",
        "image",
        "binary",
        (224, 224),
        16,
        {"model": {"family": "resnet", "depth": 18}, "preprocessing": _CHEST},
    ),
    StepSpec(
        "3D ResNet-10, small stem",
        "volume",
        "binary",
        (32, 32, 32),
        16,
        {
            "model": {"family": "resnet3d", "depth": 10, "width": 0.5, "stem": "small"},
            "preprocessing": {"patch_px": [32, 32, 32]},
            "patches_per_sample": 1,
        },
    ),
)
"""The text's models at usual sizes (2,048 numbers are what a ResNet-50 makes of a tile), then what we advise beside
them. Faster R-CNN has torchvision's own pyramid; the detectors' 512 px are the text's detector's."""


class Machine(Config):
    """What a measurement ran on.

    Attributes:
        device: the accelerator's name, or "CPU".
        cores: of the machine.
        threads: of torch.
        memory_gb: of the machine.
        versions: of what computes.
    """

    device: str
    cores: int
    threads: int
    memory_gb: float
    versions: dict[str, str]


class Training(Config):
    """What training took, by training.jsonl.

    Attributes:
        seconds: epochs and validation of one network or ensemble; the mean over seeds.
        peak_memory_mb: of the process, or of the GPU; the largest over seeds.
        device: the accelerator's name, or "CPU".
        threads: of torch.
    """

    seconds: float
    peak_memory_mb: float
    device: str
    threads: int


class Inference(Config):
    """What an answer takes, alone in its process.

    Attributes:
        latency_ms: from the stored sample to its answer, reading included: the median.
        latency_95_ms: the 95th percentile.
        samples: that were asked for, after one that was not counted.
        peak_memory_mb: of the process.
        libraries_mb: what it held before the bundle was opened.
    """

    latency_ms: float
    latency_95_ms: float
    samples: int
    peak_memory_mb: float
    libraries_mb: float


class _Dated(Config):
    """A figure that stays until it is measured again.

    Attributes:
        date: of the measurement, UTC.
        commit: of the checkout that measured; "" where that is none.
    """

    date: str
    commit: str


class Run(_Dated):
    """A finished experiment.

    Attributes:
        experiment: its name.
        data: title of the data set.
        source: equal for experiments on the same data.
        synthetic: its patients are drawn.
        model: the network's configuration.
        input: what the network takes, in words.
        seeds: that the numbers are means over.
        split: that was scored.
        n: samples there.
        n_patients: patients among them.
        num_train: samples of the training split.
        quality: name of the metric in `metrics` that the text's column speaks of.
        metrics: by name.
        train: the recipe in params.yaml.
        training: None where the log is not on this machine.
        inference: None where the bundle is not on this machine.
    """

    experiment: str
    data: str
    source: str
    synthetic: bool
    kind: Kind
    task: Task
    model: dict[str, Any]
    input: str
    seeds: tuple[int, ...]
    split: str
    n: int
    n_patients: int
    num_train: int | None
    quality: str
    metrics: dict[str, Estimate]
    train: dict[str, Any]
    num_parameters: int | None = None
    training: Training | None = None
    inference: Inference | None = None

    @property
    def family(self) -> str:
        """The network's family."""
        return str(self.model["family"])

    @property
    def told(self) -> Told | None:
        """The text's row on such a network and such data."""
        fitting = (row for row in TOLD if self.family in row.families and self.kind in row.kinds)
        return next(fitting, None)


class Step(_Dated):
    """Two steps of training on noise, then an answer for two samples: what was in memory at most.

    Attributes:
        name: of the `StepSpec`.
        input: what the network takes, in words.
        shape: of a sample's array.
        batch_size: samples of a step.
        checkpointing: activations are computed twice and not kept.
        tensors_mb: weights, gradients, the optimizer's state, activations and scratch space: what a GPU would hold.
        process_mb: the whole process, with its libraries and the profiler that counts the tensors.
        libraries_mb: what it held before.
        seconds: of the two steps.
    """

    name: str
    kind: Kind
    task: Task
    model: dict[str, Any]
    input: str
    shape: tuple[int, ...]
    batch_size: int
    num_parameters: int
    checkpointing: bool
    tensors_mb: float
    process_mb: float
    libraries_mb: float
    seconds: float

    @property
    def told(self) -> Told | None:
        """The text's row on this network."""
        return next((row for row in TOLD if row.name == self.name), None)


class Missing(Config):
    """An experiment without figures, and why."""

    experiment: str
    family: str
    reason: str


class Benchmark(Config):
    """The content of docs/benchmark.json.

    Attributes:
        machine: what answers and steps were measured on; each run's training names its own.
    """

    schema_version: Literal[2] = 2
    machine: Machine
    runs: tuple[Run, ...]
    steps: tuple[Step, ...]
    missing: tuple[Missing, ...] = ()


def read_benchmark(path: Path = BENCHMARK) -> Benchmark:
    """The figures that a file keeps.

    Raises:
        ValueError: one line: no such file, or none of this form.
    """
    try:
        return Benchmark.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(
            f"{path}: no figures there; run `{COMMAND}`, or go to the folder that holds them"
        ) from None
    except ValidationError:
        raise ValueError(f"{path}: no figures of this version; run `{COMMAND}` again") from None


# --- Measuring ----------------------------------------------------------------------------------------


def measure(
    params: Path,
    catalog: Path,
    work: Path,
    reports: Path,
    *,
    before: Benchmark | None = None,
    runs: bool = True,
    steps: bool = True,
    experiments: Sequence[str] = (),
) -> Benchmark:
    """Measure every finished experiment and every step; what is not measured anew is taken from `before`.

    Args:
        params: the experiments' parameters.
        catalog: their data sets.
        work: the folder of data sets and bundles.
        reports: the folder of reports.
        before: what was measured before.
        runs: measure experiments.
        steps: measure training steps.
        experiments: the only ones that are measured; none for all.

    Raises:
        ValueError: one line, if the parameters or the catalogue cannot be read, an experiment is not among them, or a
            measurement broke off.
    """
    machine = _machine()
    if before and not (runs and steps and not experiments) and before.machine != machine:
        raise ValueError(
            "docs/benchmark.json: was measured on another machine or with other versions; measure all of it anew"
        )
    sections = read_yaml(params)
    for name in experiments:
        if name not in sections:
            raise ValueError(f"{params}: no experiment {name!r}{did_you_mean(name, sections)}")
    entries = load_catalog(catalog)
    results: list[Run | Missing] = [*before.runs, *before.missing] if before else []
    found_steps = before.steps if before else ()
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if runs:
            before_by_name = {result.experiment: result for result in results} if experiments else {}
            results = []
            bar = progress.add_task("experiments", total=len(sections))
            for name, section in sections.items():
                progress.update(bar, description=f"{name}: its numbers, and an answer's time and memory")
                entry = entries[section["ingest"]["source"]]
                kept = None if name in experiments else before_by_name.get(name)
                results.append(kept or measure_run(name, section, entry, work / name, reports / name))
                progress.advance(bar)
        if steps:
            found_steps = tuple(_measured_steps(progress))
    return Benchmark(
        machine=machine,
        runs=tuple(result for result in results if isinstance(result, Run)),
        steps=found_steps,
        missing=tuple(result for result in results if isinstance(result, Missing)),
    )


def _measured_steps(progress: Progress) -> Iterator[Step]:
    bar = progress.add_task("steps", total=2 * len(STEPS))
    for spec in STEPS:
        progress.update(bar, description=f"{spec.name}: memory of a training step")
        for step in measure_step(spec):
            yield step
            progress.advance(bar)


def measure_run(
    name: str, section: Mapping[str, Any], entry: Any, work: Path, reports: Path
) -> Run | Missing:
    """An experiment's figures, or why there are none.

    Args:
        name: the experiment.
        section: its steps' parameters.
        entry: its data set in the catalogue.
        work: its folder of data sets and bundles.
        reports: its folder of reports.
    """
    recipe = section["train"]
    family = str(recipe["model"]["family"])
    scored = read_numbers(
        reports, sorted(int(path.name) for path in reports.glob("*") if path.name.isdigit())
    )
    if scored is None:
        return Missing(
            experiment=name, family=family, reason=f"not run here: make reproduce EXPERIMENT={name}"
        )
    record = scored.record
    seeds: tuple[int, ...] = tuple(record.get("seeds", [record.get("seed")]))
    digests = record.get("bundles", [record.get("bundle")])
    places = [work / str(seed) / "bundle" for seed in seeds]
    here = all((place / "bundle.json").is_file() for place in places)
    opened = [read_manifest(place) for place in places] if here else []
    if here and [digest for _, digest in opened] != digests:
        reason = f"its numbers are of other weights than lie here: make reproduce EXPERIMENT={name}"
        return Missing(experiment=name, family=family, reason=reason)
    task: Task = entry.task
    quality, other = ("ap50", "froc") if task == "detection" else ("accuracy", "auc")
    metrics = {key: Estimate.model_validate(record["metrics"][key]) for key in (quality, other)}
    splits = work / "splits.parquet"
    train = read_splits(splits)["split"].eq("train").sum() if splits.is_file() else None
    model, made = recipe["model"], ""
    if opened:
        manifest = opened[0][0]
        model = manifest.model.model_dump(mode="json", exclude_defaults=True) | {"family": family}
        made = input_text(manifest.preprocessing)
    training, num_parameters = _training([reports / str(seed) / "training.jsonl" for seed in seeds])
    inference = None
    if here and (work / "dataset" / "dataset.json").is_file():
        inference = in_fresh_process(_answers, places[0], work / "dataset", splits, record["split"])
    return Run(
        date=_today(),
        commit=_commit(),
        experiment=name,
        data=entry.title,
        source=getattr(entry, "digest", None) or section["ingest"]["source"],
        synthetic=isinstance(entry, PhantomEntry),
        kind=getattr(entry, "kind", None) or _kind_of(work / "dataset"),
        task=task,
        model=model,
        input=made,
        seeds=seeds,
        split=record["split"],
        n=record["n"],
        n_patients=record["n_patients"],
        num_train=None if train is None else int(train),
        quality=quality,
        metrics=metrics,
        train=dict(recipe),
        num_parameters=num_parameters,
        training=training,
        inference=inference,
    )


def measure_step(spec: StepSpec) -> Iterator[Step]:
    """Its memory, with activations kept and with activations computed twice: each in a process of its own.

    Raises:
        ValueError: one line, if a process was killed, as for want of memory.
    """
    with TemporaryDirectory(prefix="cadx-benchmark-") as temporary:
        _write_noise(Path(temporary) / "dataset", spec)
        for checkpointing in (False, True):
            yield in_fresh_process(_train_on_noise, Path(temporary), spec, checkpointing)


def in_fresh_process(function: Callable[..., T], *arguments: Any) -> T:
    """What a function of a module gives, in a process of its own: its peak of memory is then its own.

    Raises:
        ValueError: one line, if the process died.
    """
    try:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            return pool.submit(_quietly, function, *arguments).result()
    except BrokenProcessPool:
        raise ValueError(
            f"{function.__name__.strip('_')}: its process was killed, as the system does where memory ends"
        ) from None


def peak_memory_mb() -> float:
    """The most that this process has had in memory so far, in MB of 10^6 bytes."""
    return peak_memory_bytes() / _MB


def _quietly(function: Callable[..., T], *arguments: Any) -> T:
    with Path(os.devnull).open("wb") as nowhere:
        for stream in (1, 2):  # the profiler speaks past Python
            os.dup2(nowhere.fileno(), stream)
    return function(*arguments)


def _training(logs: Sequence[Path]) -> tuple[Training | None, int | None]:
    """What training took, and the network's parameters."""
    if not logs or not all(log.is_file() for log in logs):
        return None, None
    seconds, peaks = [], []
    for log in logs:
        header, *records = read_json_lines(log)
        epochs = [record for record in records if "seconds" in record]
        seconds.append(sum(epoch["seconds"] for epoch in epochs))
        # The log counts in 2^20 bytes.
        peaks.append(max(epoch["peak_memory_mb"] for epoch in epochs) * 2**20 / _MB)
    members = 1 + max(record.get("member", 0) for record in records)
    training = Training(
        seconds=round(statistics.mean(seconds), 1),
        peak_memory_mb=round(max(peaks)),
        device=header["device"],
        threads=header["threads"],
    )
    return training, header["num_parameters"] * members


def _kind_of(dataset: Path) -> Kind:
    """The kind of a data set that the catalogue does not say."""
    return DatasetFolder(dataset).info.kind if (dataset / "dataset.json").is_file() else "image"


def _answers(bundle: Path, dataset: Path, splits: Path, split: str) -> Inference:
    """Ask a bundle for samples of a split, one by one."""
    libraries_mb = peak_memory_mb()
    from cadx.predicting.predictor import Predictor

    predictor, folder = Predictor(bundle), DatasetFolder(dataset)
    frame = read_splits(splits)
    # The folds of a cross-validation are all of train.
    asked = frame["split"] == ("train" if split == "folds" else split)
    names = frame.loc[asked, "sample_id"].sort_values().head(1 + _TIMED).tolist()
    detects = folder.info.task == "detection"

    def ask(name: str) -> float:
        started = time.perf_counter()
        if detects:
            list(predictor.detect([folder.pixels(name)]))
        else:
            predictor.probabilities(predictor.stored(folder, [name]))
        return (time.perf_counter() - started) * 1000

    ask(names[0])  # the first one makes what the others reuse
    spent_ms: list[float] = []
    for name in names[1:] or names:
        spent_ms.append(ask(name))
        if sum(spent_ms) > _TIMED_S * 1000:
            break
    return Inference(
        latency_ms=round(statistics.median(spent_ms), 1),
        latency_95_ms=round(float(np.quantile(spent_ms, 0.95)), 1),
        samples=len(spent_ms),
        peak_memory_mb=round(peak_memory_mb()),
        libraries_mb=round(libraries_mb),
    )


def _write_noise(path: Path, spec: StepSpec) -> None:
    """A data set of noise that a step can be trained on: twice its batch, and two samples for val."""
    rng = np.random.default_rng(0)
    classes, nothing = ("a", "b"), Digest("sha256:" + "0" * 64)
    writer = DatasetWriter(
        path,
        name="noise",
        task=spec.task,
        classes=classes,
        positive="b" if spec.task == "binary" else None,
        modality="noise",
        clustered=True,
        source=SourceInfo(title="noise", licence="none", citation="none"),
        kind=spec.kind,
    )
    with writer:
        for number in range(2 * spec.batch_size + 2):
            shown = classes[number % 2]
            writer.add(
                Sample(
                    sample_id=str(number),
                    pixels=rng.standard_normal(spec.shape, np.float32)
                    if spec.kind == "features"
                    else rng.integers(0, 256, spec.shape, np.uint8),
                    labels={name: float(name == shown) for name in classes},
                    patient=str(number),
                    sha256=nothing,
                    spacing_mm=(1.0, 1.0, 1.0) if spec.kind == "volume" else None,
                    statistics={},
                    boxes=[(shown, 50.0, 60.0, 80.0, 90.0)] if spec.task == "detection" else (),
                )
            )


def _train_on_noise(place: Path, spec: StepSpec, checkpointing: bool) -> Step:
    """Train for two steps on what `_write_noise` wrote, and count what is in memory."""
    import torch

    libraries_mb = peak_memory_mb()
    config = TrainingConfig.model_validate(
        {
            **spec.recipe,
            "batch_size": spec.batch_size,
            "epochs": 1,
            "checkpointing": checkpointing,
            "monitor": "ap50" if spec.task == "detection" else "loss",
        }
    )
    folder = DatasetFolder(place / "dataset")
    names = folder.samples["sample_id"].tolist()
    splits = pd.DataFrame({"sample_id": names, "split": ["train"] * (len(names) - 2) + ["val"] * 2})
    started = time.perf_counter()
    with counting_tensors(place) as tensors_mb, TemporaryDirectory() as fresh:
        # Each in a folder of its own: with equal weights in prospect, one run would take up where the other ended.
        fitted = fit(config, folder, splits, seed=0, checkpoints=Path(fresh))
    cuda = torch.cuda.is_available()
    return Step(
        date=_today(),
        commit=_commit(),
        name=spec.name,
        kind=spec.kind,
        task=spec.task,
        model=dict(spec.recipe["model"]),
        input=input_text(config.preprocessing),
        shape=spec.shape,
        batch_size=spec.batch_size,
        num_parameters=fitted.num_parameters,
        checkpointing=checkpointing,
        tensors_mb=round(torch.cuda.max_memory_allocated() / _MB if cuda else tensors_mb[0], 1),
        process_mb=round(peak_memory_mb()),
        libraries_mb=round(libraries_mb),
        seconds=round(time.perf_counter() - started, 1),
    )


@contextlib.contextmanager
def counting_tensors(place: Path) -> Iterator[list[float]]:
    """After the block the list holds how many MB of tensors there were in it at most, on the CPU."""
    import torch

    peak_mb: list[float] = []
    # On a CPU torch tells nothing but its profiler's trace: each allocation and release, in order.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        yield peak_mb
    trace = place / "trace.json"
    profiler.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_bytes())["traceEvents"] if e["name"] == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    peak_mb.append(peak / _MB)


def _machine() -> Machine:
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return Machine(
        device=torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        cores=os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        memory_gb=round(pages / 1e9, 1),
        versions=versions(),
    )


def _today() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d")


def _commit() -> str:
    found = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() if found.returncode == 0 else ""


# --- Telling ------------------------------------------------------------------------------------------

Verdict = Literal["above", "reached", "not shown", "below"]


def verdict(estimate: Estimate, told: Told) -> Verdict:
    """How the interval of a quality stands to the text's range: all above it, not under it, partly or all under it.

    >>> interval = Estimate(value=0.9, low=0.88, high=0.92, n=300, method="Wilson")
    >>> ranges = [(0.85, 0.92), (0.80, 0.88), (0.9, 0.95), (0.93, 1)]
    >>> [verdict(interval, TOLD[0]._replace(quality=quality)) for quality in ranges]
    ['reached', 'above', 'not shown', 'below']
    """
    low, high = told.quality
    if estimate.low is None or estimate.high is None or estimate.low < low <= estimate.high:
        return "not shown"
    if estimate.high < low:
        return "below"
    return "above" if estimate.low >= high else "reached"


def network_text(model: Mapping[str, Any]) -> str:
    """A network in words; a family that has none goes by its own name.

    >>> network_text({"family": "resnet", "depth": 18, "width": 0.5})
    'ResNet-18 x 0.5'
    >>> network_text({"family": "densenet"}), network_text({"family": "densenet", "block_config": [3, 6, 12, 8]})
    ('DenseNet-121', 'DenseNet-63')
    >>> network_text({"family": "swin"})
    'swin'
    >>> network_text({"family": "mil", "encoder": {"depth": 18, "width": 0.25}})
    'attention MIL on ResNet-18 x 0.25'
    """
    family, depth, width = model["family"], model.get("depth", 18), model.get("width", 1.0)
    if family == "mil":
        pooling = str(model.get("pooling", "gated_attention")).removeprefix("gated_")
        encoder = model.get("encoder")
        return f"{pooling} MIL" + (f" on {network_text({'family': 'resnet'} | encoder)}" if encoder else "")
    if family == "yolo":
        width = model.get("width", 0.5)
    # As the paper counts: two convolutions a layer, three transitions, the stem and the classifier.
    layers = 2 * sum(model.get("block_config", (6, 12, 24, 16))) + 5
    name = {
        "resnet": f"ResNet-{depth}",
        "densenet": f"DenseNet-{layers}",
        "convnext": "ConvNeXt",
        "resnet3d": f"3D ResNet-{depth}",
        "densenet3d": f"3D DenseNet-{layers}",
        "faster_rcnn": f"Faster R-CNN, ResNet-{depth}",
        "retinanet": f"RetinaNet, ResNet-{depth}",
        "yolo": "YOLO",
    }.get(family, family)
    return name if width == 1 else f"{name} x {width:g}"


class _Row(NamedTuple):
    """Cells of a run, of one line or two."""

    experiment: tuple[str, ...]
    quality: tuple[str, ...]
    size: tuple[str, ...]
    training: tuple[str, ...]
    answer: tuple[str, ...]
    told: tuple[str, ...]


_RUN_COLUMNS = ("experiment", "quality on test (95 %)", "parameters", "training", "one answer", "the text's")
_STEP_COLUMNS = (
    "network",
    "input and batch",
    "activations kept",
    "computed twice",
    "the text's",
    "half of it",
)


def _run_row(run: Run) -> _Row:
    training, answer, told = run.training, run.inference, run.told
    seeds = f"{len(run.seeds)} seed{'s' if len(run.seeds) > 1 else ''}"
    return _Row(
        (run.experiment, network_text(run.model)),
        (
            *(f"{title(name)} {estimate_text(estimate)}" for name, estimate in run.metrics.items()),
            f"{run.n} samples{', drawn' if run.synthetic else ''}, {seeds}",
        ),
        (MISSING if run.num_parameters is None else _count(run.num_parameters),),
        (_time(training.seconds), _gb(training.peak_memory_mb)) if training else (MISSING,),
        (_ms(answer.latency_ms), _gb(answer.peak_memory_mb)) if answer else (MISSING,),
        _told_cell(run, told),
    )


def _told_cell(run: Run, told: Told | None) -> tuple[str, ...]:
    if told is None:
        return (MISSING,)
    low, high = told.quality
    said = verdict(run.metrics[run.quality], told)
    return (told.name, f"{low:.2f} to {high:.2f}: {said}", f"{told.memory_gb:g} GB")


def _step_rows(steps: Sequence[Step]) -> Iterator[tuple[str, ...]]:
    """A row for each network, of both of its steps."""
    by_name: dict[str, dict[bool, Step]] = {}
    for step in steps:
        by_name.setdefault(step.name, {})[step.checkpointing] = step
    for kept, twice in ((pair[False], pair[True]) for pair in by_name.values() if len(pair) == 2):
        told = kept.told
        name = network_text(kept.model)
        told_too = told is None or told.name.replace("-", "").lower() in name.replace("-", "").lower()
        yield (
            name if told is None or told_too else f"{name} ({told.name})",
            f"{_size(kept)}, batch of {kept.batch_size}",
            _memory(kept),
            _memory(twice),
            MISSING if told is None else f"{told.memory_gb:g} GB",
            MISSING if told is None else _reached(kept, twice, told),
        )


def _size(step: Step) -> str:
    if step.kind == "features":
        return f"{step.shape[0]:,} x {step.shape[1]:,}"
    return " x ".join(map(str, step.shape))


def _memory(step: Step) -> str:
    return f"{_gb(step.tensors_mb)} ({_gb(step.process_mb)})"


def _reached(kept: Step, twice: Step, told: Told) -> str:
    """Whether half of the text's memory is reached, and how."""
    limit_mb = HALF * told.memory_gb * 1000
    if kept.tensors_mb <= limit_mb:
        return f"yes: {kept.tensors_mb / 1000 / told.memory_gb:.2f} of it"
    if twice.tensors_mb <= limit_mb:
        return f"computed twice: {twice.tensors_mb / 1000 / told.memory_gb:.2f}"
    return f"no: {twice.tensors_mb / 1000 / told.memory_gb:.2f}"


def show(benchmark: Benchmark, console: Console | None = None) -> None:
    """Print both tables."""
    console = console or Console()
    # Figures that break in the middle cannot be read: a narrow terminal is scrolled, a file is wide.
    console.width = max(console.width, _WIDTH)
    runs = Table(title="Experiments, beside the text's figures", title_justify="left")
    for column in _RUN_COLUMNS:
        runs.add_column(column, no_wrap=True)
    for run in benchmark.runs:
        runs.add_row(*("\n".join(cell) for cell in _run_row(run)), end_section=True)
    console.print(runs)
    if _is_marked(benchmark):
        console.print(LEGEND, highlight=False)
    steps = Table(
        *_STEP_COLUMNS,
        title="A training step: tensors at their peak, and (the whole process)",
        title_justify="left",
    )
    for row in _step_rows(benchmark.steps):
        steps.add_row(*row)
    console.print(steps)
    for one in benchmark.missing:
        console.print(f"{one.experiment} ({one.family}): {one.reason}", highlight=False)
    console.print(_measured(benchmark), highlight=False)


def markdown(benchmark: Benchmark, figure: str) -> str:
    """Both tables and what they mean, as Markdown; `figure` is the drawing's address for the page."""
    drawn = sorted(run.experiment for run in benchmark.runs if run.synthetic)
    lines = [
        f"![Quality and memory of each family, beside the text's]({figure})",
        "",
        _row(_RUN_COLUMNS),
        _rule(_RUN_COLUMNS),
        *(_row(["<br>".join(cell) for cell in _run_row(run)]) for run in benchmark.runs),
        "",
        *([LEGEND, ""] if _is_marked(benchmark) else []),
        "Memory of training a network of the text's size on noise, for two steps of the loop that trains the runs: "
        "tensors at their peak (what a GPU would hold) and, in brackets, the whole process on a CPU.",
        "",
        _row(_STEP_COLUMNS),
        _rule(_STEP_COLUMNS),
        *(_row(row) for row in _step_rows(benchmark.steps)),
        "",
        "The text is the handbook's chapter on classification and detection; it names no data, input, batch or "
        "machine. Ours are other data, smaller inputs and narrower networks"
        + (f", and the patients of {', '.join(drawn)} are drawn: " if drawn else ": ")
        + "quality beside quality says that a family works, not that one is better. Accuracy counts the likeliest "
        "class. Memory does not depend on what else runs; times do. A dash: not measured on this machine, or nothing "
        "in the text to stand beside.",
        "",
        *(f"- {one.experiment} ({one.family}): {one.reason}" for one in benchmark.missing),
        *([""] if benchmark.missing else []),
        _measured(benchmark),
    ]
    return "\n".join(lines).rstrip() + "\n"


def _is_marked(benchmark: Benchmark) -> bool:
    return any(MARK in line for run in benchmark.runs for cell in _run_row(run) for line in cell)


def _measured(benchmark: Benchmark) -> str:
    """On what, and which of it when."""
    machine = benchmark.machine
    days: dict[tuple[str, str], list[str]] = {}
    for run in benchmark.runs:
        days.setdefault((run.date, run.commit), []).append(run.experiment)
    for step in benchmark.steps:
        names = days.setdefault((step.date, step.commit), [])
        names += ["training steps"] * ("training steps" not in names)
    said = "; ".join(
        f"on {date}, commit {commit or 'unknown'}, {', '.join(names)}"
        for (date, commit), names in sorted(days.items(), reverse=True)
    )
    return (
        f"Measured by `{COMMAND}` on {machine.device}, {machine.cores} cores, "
        f"{machine.threads} thread{'s' * (machine.threads > 1)}, {machine.memory_gb:g} GB, "
        f"torch {machine.versions.get('torch', 'unknown')}: {said}. The speed of such a machine changes: times "
        "that were measured together compare."
    )


def embed(page: Path, text: str) -> None:
    """Put a text between the markers of a page.

    Raises:
        ValueError: one line, if the page has no such markers.
    """
    before, start, rest = page.read_text(encoding="utf-8").partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not start or not end:
        raise ValueError(f"{page}: no place for the table; put the lines {MARKERS[0]} and {MARKERS[1]} there")
    with replacing(page) as partial:
        partial.write_text(f"{before}{start}\n{text}{end}{after}", encoding="utf-8")


def write(benchmark: Benchmark, docs: Path, readme: Path) -> None:
    """Write benchmark.json and benchmark.svg into `docs`, and the tables into `readme`.

    Raises:
        ValueError: one line, if `readme` has no place for them.
    """
    write_json(docs / BENCHMARK.name, benchmark.model_dump(mode="json"))
    draw(benchmark, docs / "benchmark.svg")
    embed(readme, markdown(benchmark, f"{docs.name}/benchmark.svg"))


def draw(benchmark: Benchmark, path: Path) -> None:
    """Draw the quality of each experiment, and the memory of steps, as an SVG file."""
    import matplotlib as mpl

    drawing, (left, right) = panels(11, 4.6, columns=2)
    colours = {told.name: PALETTE[number % len(PALETTE)] for number, told in enumerate(TOLD)}
    _draw_quality(left, benchmark.runs, colours)
    _draw_steps(right, benchmark.steps, colours)
    with mpl.rc_context({"svg.hashsalt": "cadx", "svg.fonttype": "path"}), replacing(path) as partial:
        drawing.savefig(partial, format="svg", metadata={"Date": None, "Creator": None})


def _draw_quality(axes: Any, runs: Sequence[Run], colours: Mapping[str, str]) -> None:
    rows = [(run, told) for told in TOLD for run in runs if run.told == told][::-1]
    for place, (run, told) in enumerate(rows):
        low, high = told.quality
        axes.barh(place, high - low, left=low, height=0.72, color=colours[told.name], alpha=0.25)
        estimate = run.metrics[run.quality]
        if estimate.value is None:
            continue
        low, high = (estimate.value if end is None else end for end in (estimate.low, estimate.high))
        axes.errorbar(
            [estimate.value],
            [place],
            xerr=[[estimate.value - low], [high - estimate.value]],
            color=colours[told.name],
            marker="o",
            markersize=6,
            capsize=3,
            markerfacecolor="white" if run.synthetic else colours[told.name],
        )
    axes.set_yticks(range(len(rows)), [run.experiment for run, _ in rows])
    for label, (_, told) in zip(axes.get_yticklabels(), rows, strict=True):
        label.set_color(colours[told.name])
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="accuracy, or AP50 of detectors", xlim=(0, 1.02))
    axes.set_title("Quality: pale the text's, points ours (hollow: drawn patients)", loc="left", fontsize=10)


def _draw_steps(axes: Any, steps: Sequence[Step], colours: Mapping[str, str]) -> None:
    rows = [told for told in TOLD if any(step.name == told.name for step in steps)]
    for place, told in enumerate(reversed(rows)):
        axes.barh(place, told.memory_gb, height=0.72, color=colours[told.name], alpha=0.25)
        axes.plot([HALF * told.memory_gb] * 2, [place - 0.42, place + 0.42], color=INK, linewidth=1.2)
        for step in (step for step in steps if step.name == told.name):
            axes.barh(
                place + (-0.17 if step.checkpointing else 0.17),
                step.tensors_mb / 1000,
                height=0.3,
                color=colours[told.name],
                hatch="////" if step.checkpointing else "",
                edgecolor="white",
                linewidth=0,
            )
    axes.set_yticks(range(len(rows)), [told.name for told in reversed(rows)])
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set(xlabel="GB")
    axes.set_title("A training step at full size: pale the text's, line its half", loc="left", fontsize=10)
    axes.text(
        0.99,
        0.36,
        "solid: activations kept\nhatched: computed twice",
        transform=axes.transAxes,
        ha="right",
        va="bottom",
        fontsize=8.5,
        color=MUTED,
    )


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _rule(columns: Sequence[str]) -> str:
    return "|" + "---|" * len(columns)


def _count(number: int) -> str:
    """A number of parameters.

    >>> _count(2_796_514), _count(59_479)
    ('2.80 M', '59 k')
    """
    return f"{number / 1e6:.2f} M" if number >= 1e6 else f"{number / 1e3:.0f} k"


def _time(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


def _ms(milliseconds: float) -> str:
    return f"{milliseconds / 1000:.1f} s" if milliseconds >= 1000 else f"{milliseconds:.0f} ms"


def _gb(megabytes: float) -> str:
    return f"{megabytes / 1000:.2f} GB"
