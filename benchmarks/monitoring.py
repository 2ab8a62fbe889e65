"""The watch: how surely it finds a change within 200 requests, and how often it finds one where there is none.

`MonitorParams.alpha` and its shares were tried out on runs of the seed 2, which draws other references and other
windows. Those of `SEED` had been looked at before these shares were set. Everything below was fixed before the
confirming run: `python -m benchmarks.monitoring 3` draws references and windows by that seed, from the same images.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from benchmarks._claim import claim
from cadx import calibration
from cadx.bundle import EMBEDDING_DECIMALS, REFERENCE_DECIMALS
from cadx.drift import compare_requests, image_statistics
from cadx.outcomes import live_outcomes
from cadx.phantom.cohort import Shift
from cadx.phantom.xray import XrayPhantom, write_xray_cohort
from cadx.prevalence import compare_prevalence
from cadx.reading.images import read_image
from cadx.transforms import Preprocessing
from components.monitor import FOR_DRIFT, FOR_LABELS, FOR_PREVALENCE, MonitorParams

SIZE_PX = 96
NUM_TRAINED_ON, NUM_POOL, NUM_NEW_SCANNER = 1000, 2800, 800
NUM_REFERENCE = 1000  # calibration answers, and as many images of the training split
WINDOW = 200
PREVALENCE, RAISED_PREVALENCE = 0.05, 0.15
GAMMA, BLUR_SIGMA_PX = 1.2, 1.0
RUNS, NULL_RUNS = 100, 1000
SEED = 1
SENSITIVITY = 0.95  # declared: the threshold is chosen for it, and labels are held against it
FOUND_IN, FALSE_IN = 95, 5  # of 100
EPOCHS, BATCH = 14, 32


class Answers(NamedTuple):
    """What a network says of N images: a table of their statistics, site and scanner, logits, embeddings, labels."""

    images: pd.DataFrame
    logits: np.ndarray
    embeddings: np.ndarray
    ill: np.ndarray


def claims(seed: int = SEED) -> Iterator[dict[str, Any]]:
    """Each change found in 95 of 100 windows of 200 requests; false alarms in 5 of 100 such windows."""
    answers = prepare()
    for number, change in enumerate(CHANGES):
        found = sum(alarms(answers, change, (seed, number, run)) for run in range(RUNS))
        unit = f"windows of {RUNS} in which it is found"
        yield claim(f"monitoring.finds_{change}", found * 100 / RUNS, FOUND_IN, unit)
    false = 100 / NULL_RUNS * sum(alarms(answers, "nothing", (seed, 99, run)) for run in range(NULL_RUNS))
    unit = f"false alarms in 100 windows, over all tests, sites and labels ({NULL_RUNS} windows)"
    yield claim(
        "monitoring.false_alarms", false, FALSE_IN, unit, ratio=FALSE_IN / max(false, 100 / NULL_RUNS)
    )


CHANGES = ("inversion", "blur", "gamma", "prevalence", "scanner")


def alarms(answers: dict[str, Answers], change: str, seed: tuple[int, ...]) -> bool:
    """Whether the watch finds anything in a window of 200 requests after the change; "nothing" has labels too.

    Reference, training statistics and window are drawn anew, from other images each.
    """
    rng = np.random.default_rng(seed)
    usual = answers["usual"]
    changed = answers.get(change, usual)
    ill_now = rng.binomial(WINDOW, RAISED_PREVALENCE if change == "prevalence" else PREVALENCE)
    ill_before = round(NUM_REFERENCE * PREVALENCE)
    drawn = {ill: rng.permutation(np.flatnonzero(usual.ill == ill)) for ill in (True, False)}

    def take(number_ill: int, number: int) -> np.ndarray:
        taken = [drawn[True][:number_ill], drawn[False][: number - number_ill]]
        drawn[True], drawn[False] = drawn[True][number_ill:], drawn[False][number - number_ill :]
        assert sum(map(len, taken)) == number, "the pool is too small"
        return np.concatenate(taken)

    trained_on, heldout = take(ill_before, NUM_REFERENCE), take(ill_before, NUM_REFERENCE)
    if change == "scanner":  # other patients
        drawn = {ill: rng.permutation(np.flatnonzero(changed.ill == ill)) for ill in (True, False)}
    window = take(ill_now, WINDOW)

    labels = np.stack([~usual.ill[heldout], usual.ill[heldout]], axis=1).astype(np.float64)
    temperature, bias = calibration.fit_temperature_and_bias(_two(usual.logits[heldout]), labels, "binary")
    probabilities = [
        calibration.apply(_two(logits), temperature, "binary", bias)[:, 1].round(REFERENCE_DECIMALS)
        for logits in (usual.logits[heldout], changed.logits[window])
    ]
    params = MonitorParams()
    threshold = calibration.operating_threshold(probabilities[0], labels[:, 1], sensitivity=SENSITIVITY)
    before, now = (
        of.images.iloc[rows].assign(
            prob_opacity=p,
            decision=np.where(p >= threshold, "opacity", "normal"),
            embedding=list(of.embeddings[rows]),
        )
        for of, rows, p in zip((usual, changed), (heldout, window), probabilities, strict=True)
    )
    findings = compare_requests(
        usual.images.iloc[trained_on],
        before,
        now,
        ["opacity"],
        alpha=params.alpha * FOR_DRIFT,
        minimum_effect=params.minimum_effect,
        minimum_n=params.minimum_n,
    )
    shares = compare_prevalence(
        before,
        now,
        ["opacity"],
        alpha=params.alpha * FOR_PREVALENCE,
        minimum_effect=params.minimum_effect,
    )
    found = any(finding.drifted for finding in findings) or any(share.moved for share in shares)
    if change != "nothing":  # must be found without labels
        return found
    ill = usual.ill[window]
    outcomes = live_outcomes(
        now.assign(
            label_normal=~ill, label_opacity=ill, prob_normal=1 - probabilities[1], prediction_set=None
        ),
        task="binary",
        classes=["normal", "opacity"],
        positive="opacity",
        at_least={"sensitivity": SENSITIVITY},
        at_most={},
        alpha=params.alpha * FOR_LABELS,
    )
    return found or any(outcome.broken for outcome in outcomes)


def _two(logits: np.ndarray) -> np.ndarray:
    """The logits of both classes, N 2, from that of one against the other."""
    return np.stack([-logits / 2, logits / 2], axis=1)


# --- What is asked, once --------------------------------------------------------------------------------


def prepare() -> dict[str, Answers]:
    """The answers of one network to the same cohort as it is and after each change, and to new scanners."""
    network = _train(*_draw(NUM_TRAINED_ON, prevalence=0.5, seed=1))
    images, table, ill = _draw(NUM_POOL, prevalence=0.12, seed=2)

    def altered(image: np.ndarray, change: str) -> np.ndarray:
        top = np.iinfo(image.dtype).max
        if change == "inversion":
            return top - image
        unit = image / top
        unit = unit**GAMMA if change == "gamma" else gaussian_filter(unit, BLUR_SIGMA_PX)
        return np.rint(unit * top).astype(image.dtype)

    answers = {"usual": _ask(network, images, table, ill)}
    for change in ("inversion", "blur", "gamma"):
        answers[change] = _ask(network, [altered(image, change) for image in images], table, ill)
    answers["scanner"] = _ask(network, *_draw(NUM_NEW_SCANNER, prevalence=0.12, seed=3, new_scanner=True))
    return answers


def _draw(
    number: int, *, prevalence: float, seed: int, **shift: Any
) -> tuple[list[np.ndarray], pd.DataFrame, np.ndarray]:
    """Raw pixels of a phantom cohort, one image a patient; a table of site and scanner; who is ill."""
    config = XrayPhantom(
        num_patients=number,
        images_per_patient=1,
        prevalence=prevalence,
        size_px=SIZE_PX,
        seed=seed,
        shift=Shift(**shift),
    )
    with TemporaryDirectory() as folder:
        write_xray_cohort(Path(folder) / "cohort", config)
        labels = pd.read_csv(Path(folder) / "cohort" / "labels.csv")
        read = [read_image(Path(folder) / "cohort" / file) for file in labels["file"]]
    table = pd.DataFrame([{kind: image.attributes[kind] for kind in ("site", "scanner")} for image in read])
    return [image.pixels for image in read], table, labels["label_opacity"].to_numpy(bool)


_INPUT = Preprocessing(height_px=64, width_px=64)


def _train(images: list[np.ndarray], _: pd.DataFrame, ill: np.ndarray) -> nn.Sequential:
    """A small network, trained: all layers but the last give 32 features."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, width in ((1, 12), (12, 24), (24, 48), (48, 96)):
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [
        nn.Conv2d(96, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
    ]
    network = nn.Sequential(*layers, nn.Linear(32, 1))
    inputs, labels = torch.stack([_INPUT.apply(image) for image in images]), torch.from_numpy(ill).float()
    optimiser = torch.optim.AdamW(network.parameters())
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 5e-3, total_steps=EPOCHS * steps)
    for _epoch in range(EPOCHS):
        for batch in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            moved = torch.roll(inputs[batch], torch.randint(-4, 5, (2,)).tolist(), (-2, -1))
            moved = moved.flip(-1) if torch.rand(()) < 0.5 else moved
            loss = nn.functional.binary_cross_entropy_with_logits(network(moved)[:, 0], labels[batch])
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
            schedule.step()
    return network.eval()


@torch.inference_mode()
def _ask(network: nn.Sequential, images: list[np.ndarray], table: pd.DataFrame, ill: np.ndarray) -> Answers:
    statistics = pd.DataFrame([image_statistics(image) for image in images]).add_prefix("stat_")
    parts: list[Tensor] = [
        network[:-1](torch.stack([_INPUT.apply(image) for image in images[start : start + 256]]))
        for start in range(0, len(images), 256)
    ]
    features = torch.cat(parts)
    return Answers(
        table.join(statistics.round(REFERENCE_DECIMALS)),
        network[-1](features)[:, 0].double().numpy(),
        features.numpy().round(EMBEDDING_DECIMALS),
        ill,
    )


if __name__ == "__main__":
    for one in claims(int(sys.argv[1])):
        print(json.dumps(one), flush=True)
