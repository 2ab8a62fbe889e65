"""A family and a recipe for a data set, out of measured figures, with reasons.

Memory is what `cadx benchmark` saw a training step take, brought to the advised input and batch: weights, gradients
and the optimizer's state stay, activations go with the number of values in a batch. Nothing is advised that does not
fit. Between families that fit, a figure decides where two were measured on the same data; else the one that takes
less, as long as nothing measured speaks for more.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import yaml
from rich.console import Console

from cadx.benchmarking import Benchmark, Run, Step, network_text
from cadx.datasets import DatasetFolder
from cadx.recipes import (
    FEW_SAMPLES,
    detector_recipe,
    experiment_sections,
    image_recipe,
    lesion_sizes_px,
    schedule,
    slide_recipe,
    volume_recipe,
)
from cadx.reporting import estimate_text
from cadx.splitting import assign_splits, cross_validation
from cadx.types import Kind, Task

_MOST_FOLDS = 5
_MARGIN = 1.15
_STATE_BYTES = 16  # of a parameter: itself, its gradient, and AdamW's two moments
_CT = re.compile(r"\b(CT|computed tomography)\b", re.IGNORECASE)
_NOT_CT_ALONE = re.compile(r"\b(MRI?|magnetic resonance|PET|SPECT|cone.beam)\b", re.IGNORECASE)


class Facts(NamedTuple):
    """What the advice rests on.

    Attributes:
        name: of the data set.
        kind: of its samples.
        task: of them.
        classes: class -> samples that have it.
        num_samples: all of them.
        num_patients: all of them.
        given_splits: the set has official splits.
        size_px: median depth, height, width; of bags 1, instances, numbers.
        channels: 3 if any image is in colour, else 1.
        spacing_mm: of volumes, median distance between slices, rows, columns; None where unknown.
        extent_mm: of volumes, depth, height, width within which 19 of 20 stay; None where unknown.
        has_masks: the task is binary, and every positive sample has one.
        signed: values below 0 occur in its files' type, as in CT.
        modality: in the data set's own words.
        folds: most that cross-validation can have beside calibration and test, 5 at most; 0: not even two. None where
            there is no need of any.
        lesion_px: 5th, 50th and 95th percentile of the boxes' sides (root of their areas), in stored pixels.
    """

    name: str
    kind: Kind
    task: Task
    classes: dict[str, int]
    num_samples: int
    num_patients: int
    given_splits: bool
    size_px: tuple[int, int, int]
    channels: int = 1
    spacing_mm: tuple[float, float, float] | None = None
    extent_mm: tuple[float, float, float] | None = None
    has_masks: bool = False
    signed: bool = False
    modality: str = ""
    folds: int | None = None
    lesion_px: tuple[float, float, float] | None = None

    @property
    def in_hu(self) -> bool:
        """Whether voxels are in HU: CT alone has them, and its own files keep their sign."""
        is_ct = _CT.search(self.modality) and not _NOT_CT_ALONE.search(self.modality)
        return self.kind == "volume" and self.signed and bool(is_ct)


class Candidate(NamedTuple):
    """A recipe, and which measured step tells its memory.

    Attributes:
        train: section of params.yaml.
        step: name in `Benchmark.steps`; None: `run` tells it.
        run: experiment in `Benchmark.runs`.
        values: numbers in one sample of the network's input; of an image its pixels, as colour adds to the input alone.
    """

    train: dict[str, Any]
    step: str | None
    run: str | None
    values: int

    @property
    def name(self) -> str:
        """The network in words."""
        return network_text(self.train["model"])


class _Fit(NamedTuple):
    """A recipe, made to fit into memory as far as it can be.

    Attributes:
        candidate: as it was.
        train: section of params.yaml, with what saves memory.
        needs_mb: what training takes, margin included.
        how: memory is saved, or where the figure is from, in words.
    """

    candidate: Candidate
    train: dict[str, Any]
    needs_mb: float
    how: str


class Advice(NamedTuple):
    """What is advised, and why.

    Attributes:
        sections: of params.yaml, by step.
        memory_mb: what training takes, margin included.
        reasons: why, each with the figure that it rests on.
        others: what was not chosen -> why not.
    """

    sections: dict[str, Any]
    memory_mb: float
    reasons: tuple[str, ...]
    others: dict[str, str]


def facts_of(folder: DatasetFolder, fractions: Mapping[str, float]) -> Facts:
    """What a dataset folder tells.

    Args:
        folder: the dataset.
        fractions: split -> share of the images, by which it will be divided where it has no official splits.
    """
    samples, info = folder.samples, folder.info
    given_splits = bool((samples["given_split"] != "").any())
    is_small = len(samples) < FEW_SAMPLES and not given_splits
    classifies = info.kind in ("image", "features") and info.task != "detection"
    size = [int(samples[name].median()) for name in ("depth_px", "height_px", "width_px")]
    spacing_mm = extent_mm = None
    if info.kind == "volume":
        steps = samples[["spacing_slice_mm", "spacing_row_mm", "spacing_column_mm"]].to_numpy()
        lengths = steps * samples[["depth_px", "height_px", "width_px"]].to_numpy()
        spacing_mm, extent_mm = np.median(steps, 0).tolist(), np.quantile(lengths, 0.95, axis=0).tolist()
    lesion_px = None
    if info.task == "detection":
        lesion_px = lesion_sizes_px(folder.boxes[["x0", "y0", "x1", "y1"]].to_numpy())
    return Facts(
        name=info.name,
        kind=info.kind,
        task=info.task,
        classes={name: int((samples[f"label_{name}"] == 1).sum()) for name in info.classes},
        num_samples=len(samples),
        num_patients=int(samples["patient"].nunique()),
        given_splits=given_splits,
        size_px=(size[0], size[1], size[2]),
        channels=int(samples["channels"].max()),
        spacing_mm=spacing_mm,
        extent_mm=extent_mm,
        has_masks=info.positive is not None
        and bool((samples.loc[samples[f"label_{info.positive}"] == 1, "mask_path"] != "").all()),
        signed=bool(samples["dtype"].isin(["int16", "float32"]).all()),
        modality=info.modality,
        folds=_most_folds(folder, fractions) if is_small and classifies else None,
        lesion_px=lesion_px,
    )


def memory_at_hand() -> tuple[float, bool]:
    """MB of memory that training can have here, and whether they are a GPU's: else what is free of the machine's."""
    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return free / 1e6, True
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    free_kb = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    free = free_kb * 1024
    return min(free, free if text == "max" else int(text)) / 1e6, False


def advise(facts: Facts, memory_mb: float, benchmark: Benchmark, *, gpu: bool = False) -> Advice:
    """The family and the recipe for a data set and so much memory.

    Args:
        facts: of the data set.
        memory_mb: at hand.
        benchmark: the measured figures.
        gpu: the memory is a GPU's, which holds tensors alone and no libraries.

    Raises:
        ValueError: one line, if no family fits, or nothing was measured that tells.
    """
    others: dict[str, str] = {}
    fitting: list[_Fit] = []
    least_mb: list[float] = []
    for candidate in _candidates(facts):
        fit = _fitted(candidate, memory_mb, benchmark, gpu=gpu)
        if fit is None:
            others[candidate.name] = "its memory was never measured: `cadx benchmark`"
        elif fit.needs_mb > memory_mb:
            others[candidate.name] = f"needs {fit.needs_mb / 1000:.1f} GB even so ({fit.how})"
            least_mb.append(fit.needs_mb)
        else:
            fitting.append(fit)
    if not fitting:
        least = f"the least takes {min(least_mb) / 1000:.1f} GB" if least_mb else "no figure tells of any"
        raise ValueError(
            f"{facts.name}: no family fits {memory_mb / 1000:.1f} GB; {least}: free memory, or use another machine"
        )
    best = _best(fitting, benchmark, facts, others)
    memory = (
        f"memory: {best.needs_mb / 1000:.1f} GB of {memory_mb / 1000:.1f} GB at hand"
        f" ({best.how}, from {_figure(best.candidate)})"
    )
    return Advice(
        experiment_sections(facts.name, best.train, has_splits=facts.given_splits),
        best.needs_mb,
        (*_about_data(facts, best.train), memory, _about_family(best.candidate, benchmark, facts)),
        others,
    )


def _best(fitting: Sequence[_Fit], benchmark: Benchmark, facts: Facts, others: dict[str, str]) -> _Fit:
    """The lightest that fits, unless a figure on common data speaks for another; why not the rest goes to `others`."""
    best = fitting[0]
    for fit in fitting[1:]:
        pair = _same_data(benchmark, best.candidate, fit.candidate, facts)
        if pair is None:
            others[fit.candidate.name] = "more to train, and no figure on common data says that it is better"
            continue
        ours, theirs = pair
        if _worse(ours, theirs):
            others[best.candidate.name] = _beaten(ours, theirs)
            best = fit
        elif _worse(theirs, ours):
            others[fit.candidate.name] = _beaten(theirs, ours)
        else:
            others[fit.candidate.name] = (
                f"no better on {ours.data}: {_quality(theirs)} against {_quality(ours)} (runs of docs/benchmark.json)"
            )
    return best


def _about_family(chosen: Candidate, benchmark: Benchmark, facts: Facts) -> str:
    """What a run of the very recipe reached, else one of its family on such samples."""
    family = chosen.train["model"]["family"]
    runs = [run for run in benchmark.runs if run.experiment == chosen.run] or [
        run for run in benchmark.runs if (run.family, run.kind) == (family, facts.kind)
    ]
    if not runs:
        return "no experiment of this family has been run here: `cadx benchmark` says which there are"
    return f"the family works: {_quality(runs[0])} on {runs[0].data} (run {runs[0].experiment})"


def show(facts: Facts, advice: Advice, section: dict[str, Any], console: Console | None = None) -> None:
    """Print the advice on one screen, with the section to paste."""
    console = console or Console()
    classes = ", ".join(f"{name} {count:,}" for name, count in facts.classes.items())
    size = " x ".join(map(str, facts.size_px if facts.kind == "volume" else facts.size_px[1:]))
    console.print(
        f"[bold]{facts.name}[/bold]: {facts.task} of {facts.num_samples:,} {facts.kind} samples, "
        f"{facts.num_patients:,} patients; {classes}; {size}",
        highlight=False,
    )
    console.print(f"\n[bold green]{network_text(advice.sections['train']['model'])}[/bold green]")
    for reason in advice.reasons:
        console.print(f"  because  {reason}", highlight=False)
    for name, why in advice.others.items():
        console.print(f"  not      {name}: {why}", highlight=False, style="dim")
    console.print("\nFor params.yaml, and its name under `vars` in dvc.yaml:\n")
    console.print(
        yaml.safe_dump({facts.name: section}, sort_keys=False, width=100, default_flow_style=None),
        highlight=False,
        end="",
    )


def _candidates(facts: Facts) -> Iterator[Candidate]:
    """Recipes that suit the data, the lighter ones first."""
    if facts.task == "detection":
        yield from _detectors(facts)
    elif facts.kind == "image":
        longest = max(facts.size_px[1:])
        side_px = 56 if longest <= 40 else min(224, 32 * math.ceil(longest / 32))
        for step, model in (
            ("ResNet-18", {"family": "resnet", "depth": 18}),
            ("DenseNet121", {"family": "densenet"}),
            ("ResNet50", {"family": "resnet", "depth": 50}),
        ):
            train = image_recipe(side_px, facts.channels, model) | _sizes(facts, 32)
            yield Candidate(train, step, None, side_px**2)
    elif facts.kind == "volume":
        yield from _volumes(facts)
    elif facts.kind == "slide":
        yield Candidate(slide_recipe(), None, "phantom-slide", 48 * 3 * 64**2)
    else:
        _, instances, channels = facts.size_px
        model = {"family": "mil", "hidden_dim": 64, "attention_dim": 32}
        train = {"model": model, "preprocessing": {"channels": channels}} | _sizes(facts, 8)
        yield Candidate(train, "Attention MIL", None, max(1, instances) * channels)


def _detectors(facts: Facts) -> Iterator[Candidate]:
    families: tuple[tuple[Literal["yolo", "faster_rcnn"], str], ...] = (
        ("yolo", "YOLOv5"),
        ("faster_rcnn", "Faster R-CNN"),
    )
    for family, step in families:
        train = detector_recipe(family, max(facts.size_px[1:]), facts.lesion_px, facts.channels)
        made = train["preprocessing"]
        yield Candidate(train, step, None, made["height_px"] * made["width_px"])


def _volumes(facts: Facts) -> Iterator[Candidate]:
    light = {"family": "resnet3d", "depth": 10, "width": 0.5, "stem": "small"}
    train = _volume_recipe(facts, light, most_px=32, step_px=8)
    patch_px = train["preprocessing"]["patch_px"]
    yield Candidate(
        train | schedule(facts.num_samples, 16), "3D ResNet-10, small stem", None, math.prod(patch_px)
    )
    if min(facts.size_px[1:]) >= 64:
        train = _volume_recipe(facts, {"family": "resnet3d", "depth": 18}, most_px=96, step_px=16)
        values = math.prod(train["preprocessing"]["patch_px"])
        if _anisotropy(facts, train) >= 3:
            train["model"]["stem"] = "thick_slices"
            values *= 4  # the activations of a stem that keeps the slices
        yield Candidate(train | schedule(facts.num_samples, 2), "3D ResNet", None, values)


def _volume_recipe(facts: Facts, model: dict[str, Any], *, most_px: int, step_px: int) -> dict[str, Any]:
    size_px: Sequence[float] = facts.size_px
    if facts.spacing_mm and facts.extent_mm and not facts.has_masks:
        size_px = [mm / step for mm, step in zip(facts.extent_mm, facts.spacing_mm, strict=True)]
    return volume_recipe(
        model,
        size_px,
        facts.spacing_mm,
        most_px=most_px,
        step_px=step_px,
        has_masks=facts.has_masks,
        in_hu=facts.in_hu,
    )


def _anisotropy(facts: Facts, train: Mapping[str, Any]) -> float:
    """Distance of slices / distance within a slice, of what the network sees; 1 where unknown."""
    spacing_mm = train["preprocessing"].get("spacing_mm") or facts.spacing_mm
    return spacing_mm[0] / spacing_mm[1] if spacing_mm else 1.0


def _sizes(facts: Facts, batch_size: int) -> dict[str, Any]:
    """Batch, epochs and folds for so many samples."""
    return schedule(facts.num_samples, batch_size) | ({"folds": facts.folds} if facts.folds else {})


def _most_folds(folder: DatasetFolder, fractions: Mapping[str, float]) -> int:
    """The most folds, 5 at most, in which train and val can be parted; 0 if they cannot even be halved."""
    samples, labels = folder.samples, folder.info.label_columns
    occurring = [label for label in labels if (samples[label] == 1).any()]
    with suppress(ValueError):
        parts = assign_splits(samples, fractions=fractions, seed=0, labels=occurring)
        splits = samples[["sample_id"]].assign(split=parts)
        for num_folds in range(_MOST_FOLDS, 1, -1):
            with suppress(ValueError):
                cross_validation(samples, splits, num_folds=num_folds, seed=0, labels=labels)
                return num_folds
    return 0


def _fitted(candidate: Candidate, memory_mb: float, benchmark: Benchmark, *, gpu: bool) -> _Fit | None:
    """A candidate, made to fit by what costs time and not weights; None where its memory was never measured."""
    train = candidate.train
    if candidate.step is None:
        run = next((run for run in benchmark.runs if run.experiment == candidate.run), None)
        if run is None or run.training is None:
            return None
        return _Fit(candidate, train, run.training.peak_memory_mb * _MARGIN, "as that run took")
    steps = {step.checkpointing: step for step in benchmark.steps if step.name == candidate.step}
    if len(steps) < 2:
        return None
    for checkpointing, parts in ((False, 1), (True, 1), (True, 2), (True, 4)):
        rows = math.ceil(train["batch_size"] / parts)
        needs_mb = needed_mb(steps[checkpointing], rows * candidate.values, gpu=gpu)
        how = f"batches of {train['batch_size']}" + (f" in {parts} parts" if parts > 1 else "")
        how += ", activations computed twice" if checkpointing else ", activations kept"
        if needs_mb <= memory_mb:
            break
    extra = ({"checkpointing": True} if checkpointing else {}) | (
        {"accumulation": parts} if parts > 1 else {}
    )
    return _Fit(candidate, train | extra, needs_mb, how)


def needed_mb(step: Step, values: int, *, gpu: bool) -> float:
    """MB that training takes with so many values in a part of a batch, from a measured step; a margin is included.

    Args:
        step: of the same network.
        values: numbers in the input of one part.
        gpu: count tensors alone, else the whole process.
    """
    state_mb = step.num_parameters * _STATE_BYTES / 1e6
    fixed_mb = state_mb + (0 if gpu else step.libraries_mb)
    peak_mb = step.tensors_mb if gpu else step.process_mb
    return (
        fixed_mb + max(0.0, peak_mb - fixed_mb) * values / (step.batch_size * math.prod(step.shape))
    ) * _MARGIN


def _about_data(facts: Facts, train: Mapping[str, Any]) -> Iterator[str]:
    rarest = min(facts.classes, key=lambda name: facts.classes[name])
    if facts.classes[rarest] < 100:
        yield f"{rarest!r} has {facts.classes[rarest]} samples: a light network, and intervals will be wide"
    if facts.folds:
        limited = ", as many as classes have patients for beside calibration and test"
        yield (
            f"under {FEW_SAMPLES:,} samples: cross-validation in {facts.folds} folds"
            f"{limited if facts.folds < _MOST_FOLDS else ''}"
        )
    elif facts.folds == 0:
        yield "no cross-validation: a class has no two patients beside those of calibration and test"
    if facts.lesion_px:
        low, middle, high = facts.lesion_px
        yield f"lesions of {low:.0f} to {high:.0f} px (half under {middle:.0f}): these set strides, anchors and tiles"
    if facts.in_hu:
        yield f"voxels of {facts.modality!r} are in HU: a window of -1000 to 1000, the same for all"
    elif facts.kind == "volume":
        yield f"voxels of {facts.modality!r} are not known to be in HU: no window, each volume's own mean and spread"
    if facts.kind == "volume" and not facts.has_masks:
        yield "no mask of every positive volume: a label is of all of it, and a patch holds nearly every one whole"
    if train["model"].get("stem") == "thick_slices":
        yield f"slices lie {_anisotropy(facts, train):.1f} times as far apart as pixels: a stem that keeps them"
    if facts.kind == "features" and facts.size_px[1] <= 1:
        yield "one row a sample: a table and no bag; the network is then a plain classifier"


def _same_data(
    benchmark: Benchmark, chosen: Candidate, candidate: Candidate, facts: Facts
) -> tuple[Run, Run] | None:
    """A run of either's family on the same data; None where there are no such two."""
    ours, theirs = (one.train["model"]["family"] for one in (chosen, candidate))
    fitting = [run for run in benchmark.runs if (run.kind, run.task) == (facts.kind, facts.task)]
    if ours == theirs:
        return None
    return next(
        (
            (one, other)
            for one, other in product(fitting, fitting)
            if (one.family, other.family) == (ours, theirs) and one.source == other.source
        ),
        None,
    )


def _worse(one: Run, other: Run) -> bool:
    """Whether the interval of the first lies wholly below that of the other."""
    high, low = one.metrics[one.quality].high, other.metrics[other.quality].low
    return high is not None and low is not None and high < low


def _beaten(one: Run, other: Run) -> str:
    return f"worse on {one.data}: {_quality(one)} against {_quality(other)} (runs of docs/benchmark.json)"


def _quality(run: Run) -> str:
    return f"{run.quality} {estimate_text(run.metrics[run.quality])}"


def _figure(candidate: Candidate) -> str:
    where = f"step {candidate.step}" if candidate.step else f"run {candidate.run}"
    return f"{where} of docs/benchmark.json"
