"""Advice: every kind of data gets a recipe that `train` takes, that fits, and that says why."""

from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_benchmarking import benchmark, estimate, run, step

from cadx.benchmarking import STEPS, Benchmark, Step, Training
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.loading import VolumePreprocessing
from cadx.loading.patches import VolumeSource
from cadx.recommending import Facts, advise, facts_of, memory_at_hand, needed_mb, show
from cadx.splitting import assign_splits, cross_validation
from components.split import SplitParams
from components.train import TrainParams

LIGHT = {"normal": 900, "opacity": 300}
FRACTIONS = SplitParams().fractions.model_dump()


def measured(*runs: object) -> Benchmark:
    """Figures of every step, 1 GB of tensors kept and .6 GB computed twice, and a run on slides."""
    steps: list[Step] = []
    for spec in STEPS:
        shared = {
            "name": spec.name,
            "kind": spec.kind,
            "model": dict(spec.recipe["model"]),
            "shape": spec.shape,
            "batch_size": spec.batch_size,
            "num_parameters": 1_000_000,
        }
        steps += [
            step(checkpointing=False, tensors_mb=1000, **shared),
            step(checkpointing=True, tensors_mb=600, **shared),
        ]
    slides = run(
        "phantom-slide",
        kind="slide",
        model={"family": "mil"},
        training=Training(seconds=500, peak_memory_mb=1300, device="CPU", threads=1),
    )
    return benchmark(run(), slides, *runs).model_copy(update={"steps": tuple(steps)})  # type: ignore[arg-type]


THICK_CT = Facts(
    "ct",
    "volume",
    "binary",
    LIGHT,
    700,
    700,
    False,
    (60, 512, 512),
    spacing_mm=(4.0, 0.8, 0.8),
    extent_mm=(240.0, 409.6, 409.6),
    has_masks=True,
    signed=True,
    modality="chest CT",
)
FACTS = {
    "image": Facts("chest", "image", "binary", LIGHT, 1200, 800, False, (1, 512, 512)),
    "tiny images": Facts("mnist", "image", "binary", LIGHT, 5856, 5856, True, (1, 28, 28)),
    "labels": Facts("labels", "image", "multilabel", LIGHT, 1200, 800, False, (1, 512, 512)),
    "colour": Facts("skin", "image", "binary", LIGHT, 1200, 800, False, (1, 450, 600), channels=3),
    "boxes": Facts(
        "cells", "image", "detection", LIGHT, 364, 364, True, (1, 480, 640), lesion_px=(30, 90, 150)
    ),
    "boxes in colour": Facts("blood", "image", "detection", LIGHT, 364, 364, True, (1, 480, 640), channels=3),
    "specks": Facts(
        "mammo", "image", "detection", LIGHT, 900, 600, False, (1, 2048, 1536), lesion_px=(3, 9, 40)
    ),
    "volume": Facts("adrenal", "volume", "binary", LIGHT, 1584, 1584, True, (28, 28, 28)),
    "thick CT": THICK_CT,
    "MR": THICK_CT._replace(
        name="mr", spacing_mm=(0.8, 0.8, 0.8), extent_mm=(48.0, 409.6, 409.6), modality="T1-weighted MRI"
    ),
    "slide": Facts("slides", "slide", "binary", LIGHT, 130, 130, False, (1, 200, 300)),
    "features": Facts("musk", "features", "binary", LIGHT, 92, 92, False, (1, 5, 166)),
}


@pytest.mark.parametrize("name", FACTS)
def test_every_kind_gets_a_recipe_that_training_takes(name: str) -> None:
    facts = FACTS[name]
    advice = advise(facts, 16_000, measured())
    params = TrainParams.model_validate(advice.sections["train"])
    takes = {"image": "images", "volume": "volumes", "slide": "bags", "features": "bags"}[facts.kind]
    assert params.model.takes == ("boxes" if facts.task == "detection" else takes)
    assert advice.memory_mb < 16_000
    assert any("docs/benchmark.json" in reason for reason in advice.reasons)
    assert advice.sections["split"] == {"strategy": "given" if facts.given_splits else "patient"}
    assert advice.sections["evaluate"] == {"split": "val"}, "test is for a frozen recipe"


def test_small_lesions_in_large_images_are_looked_at_in_tiles() -> None:
    assert advise(FACTS["specks"], 16_000, measured()).sections["train"]["preprocessing"]["fit"] == "tile"
    assert "fit" not in advise(FACTS["boxes"], 16_000, measured()).sections["train"]["preprocessing"]


@pytest.mark.parametrize("name", ["image", "colour", "boxes", "boxes in colour", "specks"])
def test_a_network_sees_colour_where_there_is_some(name: str) -> None:
    params = TrainParams.model_validate(advise(FACTS[name], 16_000, measured()).sections["train"])
    assert params.preprocessing.channels == FACTS[name].channels == (3 if "colour" in name else 1)


def test_one_image_in_colour_makes_all_of_three_channels(tmp_path: Path) -> None:
    folder = cells(tmp_path / "dataset", [np.zeros((30, 40), np.uint8), np.zeros((30, 40, 3), np.uint8)])
    assert facts_of(folder, FRACTIONS).channels == 3


@pytest.mark.parametrize(
    ("modality", "signed", "window"),
    [
        ("CT", True, [-1000, 1000]),
        ("low-dose CT of the chest", True, [-1000, 1000]),
        ("computed tomography", True, [-1000, 1000]),
        ("shape masks of adrenal glands from abdominal CT", False, None),  # stored as uint8
        ("T1-weighted MRI of the hippocampus", True, None),
        ("PET/CT", True, None),
        ("CT and MR of the liver", True, None),
        ("optical coherence tomography", True, None),
        ("medical image", True, None),
    ],
)
def test_ct_alone_has_a_window(modality: str, signed: bool, window: list[int] | None) -> None:
    for facts in (FACTS["volume"], FACTS["thick CT"]):
        advice = advise(facts._replace(modality=modality, signed=signed), 16_000, measured())
        assert advice.sections["train"]["preprocessing"].get("window_hu") == window
        said = [reason for reason in advice.reasons if "HU" in reason]
        assert len(said) == 1
        assert ("not known" in said[0]) == (window is None)


@pytest.mark.parametrize("memory_mb", [1400, 64_000])
def test_without_masks_a_patch_holds_nearly_every_volume(memory_mb: float) -> None:
    facts = THICK_CT._replace(extent_mm=(300.0, 450.0, 450.0), has_masks=False)
    advice = advise(facts, memory_mb, measured())
    made = TrainParams.model_validate(advice.sections["train"]).preprocessing
    assert isinstance(made, VolumePreprocessing)
    largest = VolumeSource.of_array(np.empty((75, 562, 562), np.int16), (4.0, 0.8, 0.8))
    assert all(side <= most for side, most in zip(made.grid_px(largest), made.patch_px, strict=True))
    assert advice.sections["train"]["model"].get("stem") != "thick_slices", "on that grid no slices are thick"
    assert any("no mask of every positive volume" in reason for reason in advice.reasons)
    assert (
        advise(THICK_CT, memory_mb, measured()).sections["train"]["preprocessing"].get("spacing_mm") is None
    )


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("memory_mb", [100, 900, 1200, 1600, 2500])
def test_nothing_is_advised_that_does_not_fit(name: str, memory_mb: float) -> None:
    with suppress(ValueError):
        assert advise(FACTS[name], memory_mb, measured()).memory_mb <= memory_mb


def test_it_says_when_nothing_fits() -> None:
    with pytest.raises(ValueError, match=r"chest: no family fits 0\.1 GB; the least takes 1\.\d GB"):
        advise(FACTS["image"], 100, measured())


def test_memory_is_saved_before_a_family_is_given_up() -> None:
    roomy = advise(FACTS["image"], 16_000, measured()).sections["train"]
    assert "checkpointing" not in roomy
    kept = advise(FACTS["image"], 16_000, measured(), gpu=True).memory_mb
    tight = advise(FACTS["image"], 0.7 * kept, measured(), gpu=True)
    assert tight.sections["train"]["checkpointing"] is True
    assert tight.memory_mb <= 0.7 * kept


def test_activations_go_with_the_batch_and_weights_do_not() -> None:
    one = step(checkpointing=False, tensors_mb=1761)
    whole, half = (needed_mb(one, share * 224 * 224, gpu=True) for share in (16, 8))
    state_mb = 16 * one.num_parameters / 1e6
    assert whole == pytest.approx(1761 * 1.15)
    assert half == pytest.approx((state_mb + (1761 - state_mb) / 2) * 1.15)


def test_a_figure_on_common_data_decides_between_families() -> None:
    def cells(family: str, low: float, high: float) -> object:
        return run(
            f"cells-{family}",
            source="sha256:cells",
            data="Cells",
            task="detection",
            model={"family": family},
            quality="ap50",
            metrics={"ap50": estimate((low + high) / 2, low, high)},
        )

    better = measured(cells("yolo", 0.70, 0.75), cells("faster_rcnn", 0.80, 0.86))
    advice = advise(FACTS["boxes"], 16_000, better)
    assert advice.sections["train"]["model"]["family"] == "faster_rcnn"
    assert "worse on Cells" in advice.others["YOLO x 0.5"]
    alike = measured(cells("yolo", 0.70, 0.83), cells("faster_rcnn", 0.80, 0.86))
    advice = advise(FACTS["boxes"], 16_000, alike)
    assert advice.sections["train"]["model"]["family"] == "yolo"
    assert "no better on Cells" in advice.others["Faster R-CNN, ResNet-50"]
    unknown = advise(FACTS["boxes"], 16_000, measured())
    assert "no figure on common data" in unknown.others["Faster R-CNN, ResNet-50"]


def test_without_figures_nothing_is_advised() -> None:
    nothing = measured().model_copy(update={"steps": (), "runs": ()})
    with pytest.raises(ValueError, match="no figure tells of any"):
        advise(FACTS["image"], 16_000, nothing)


def cells(path: Path, images: Sequence[np.ndarray]) -> DatasetFolder:
    """A box on each image; two images a patient; on the first a white cell too."""
    writer = DatasetWriter(
        path,
        name="cells",
        task="detection",
        classes=("red", "white"),
        positive=None,
        modality="microscopy",
        clustered=True,
        source=SourceInfo(title="cells", licence="none", citation="none"),
    )
    with writer:
        for number, pixels in enumerate(images):
            writer.add(
                Sample(
                    sample_id=str(number),
                    pixels=pixels,
                    labels={"red": 1.0, "white": float(number == 0)},
                    patient=str(number // 2),
                    sha256="sha256:" + "0" * 64,  # type: ignore[arg-type]
                    statistics={},
                    boxes=[("red", 2.0, 2.0, 11.0, 6.0)],
                )
            )
    return DatasetFolder(path)


def test_facts_come_from_the_folder(tmp_path: Path) -> None:
    facts = facts_of(cells(tmp_path / "dataset", [np.zeros((30, 40), np.uint8)] * 4), FRACTIONS)
    assert facts.classes == {"red": 4, "white": 1}
    assert (facts.num_samples, facts.num_patients, facts.size_px) == (4, 2, (1, 30, 40))
    assert facts.lesion_px == pytest.approx((6, 6, 6))
    assert not facts.given_splits
    assert facts.channels == 1
    assert facts.modality == "microscopy"


@pytest.mark.parametrize(
    ("ill", "folds"),
    [
        ([1] * 20, 5),
        ([1] * 6, 4),
        ([1] * 5, 3),
        ([1] * 4, 2),
        ([1] * 3, 0),  # one too few for each of the four splits
        ([100] + [1] * 9, 3),  # train is full with the first: the others go elsewhere
    ],
    ids=str,
)
def test_no_more_folds_are_advised_than_training_takes(tmp_path: Path, ill: list[int], folds: int) -> None:
    """`ill`: images of each ill patient, beside 60 healthy ones of one image each."""
    writer = DatasetWriter(
        tmp_path / "dataset",
        name="few",
        task="binary",
        classes=("well", "ill"),
        positive="ill",
        modality="noise",
        clustered=True,
        source=SourceInfo(title="few", licence="none", citation="none"),
    )
    patients = [number for number, images in enumerate([*ill, *[1] * 60]) for _ in range(images)]
    with writer:
        for number, patient in enumerate(patients):
            writer.add(
                Sample(
                    sample_id=str(number),
                    pixels=np.zeros((8, 8), np.uint8),
                    labels={"ill" if patient < len(ill) else "well": 1.0},
                    patient=str(patient),
                    sha256="sha256:" + "0" * 64,  # type: ignore[arg-type]
                    statistics={},
                )
            )
    folder = DatasetFolder(tmp_path / "dataset")
    advice = advise(facts_of(folder, FRACTIONS), 16_000, measured())
    assert advice.sections["train"].get("folds", 0) == folds
    assert any("beside" in reason for reason in advice.reasons) == (folds < 5)
    labels = list(folder.info.label_columns)
    if folds:
        parts = assign_splits(folder.samples, fractions=FRACTIONS, seed=0, labels=labels)
        splits = folder.samples[["sample_id"]].assign(split=parts)
        for seed in range(3):
            cross_validation(folder.samples, splits, num_folds=folds, seed=seed, labels=labels)
        with pytest.raises(ValueError, match="too few") if folds < 5 else nullcontext():
            cross_validation(folder.samples, splits, num_folds=folds + 1, seed=0, labels=labels)


def test_the_screen_holds_reasons_and_a_section_to_paste() -> None:
    facts = FACTS["image"]
    advice = advise(facts, 16_000, measured())
    with Path("/dev/null").open("w", encoding="utf-8") as nowhere:
        console = Console(width=100, record=True, file=nowhere)
        show(facts, advice, advice.sections, console)
    text = console.export_text()
    assert "because" in text
    assert "ResNet-18" in text
    assert "chest:\n  ingest: {source: chest}\n" in text


def test_there_is_memory_at_hand() -> None:
    free_mb, is_gpu = memory_at_hand()
    assert free_mb > 0
    assert is_gpu == torch.cuda.is_available()
