"""Sensitivity by lesion size where whole images are classified."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.evaluating import Classification, Settings
from cadx.evaluating.lesion_sizes import largest_lesions
from cadx.files import digest_bytes
from cadx.predicting.table import PredictionsInfo

SPACING_MM = (0.5, 0.4)


def write(path: Path, *, masks: bool, spacing_mm: tuple[float, float] | None = SPACING_MM) -> DatasetFolder:
    """Images with two lesions each, of sides k and 1, as boxes or as a mask; each third image has none."""
    with DatasetWriter(
        path,
        name="lesions",
        task="binary",
        classes=("normal", "lesion"),
        positive="lesion",
        modality="drawing",
        clustered=True,
        source=SourceInfo(title="Lesions", licence="CC0", citation="none"),
    ) as writer:
        for number in range(180):
            ill, side = number % 3 > 0, 1 + number % 9
            mask = np.zeros((16, 16), np.uint8)
            if ill:
                mask[2 : 2 + side, 2 : 2 + side] = 1
                mask[14, 14] = 1
            boxes = [("lesion", 2, 2, 2 + side, 2 + side), ("lesion", 14, 14, 15, 15)] if ill else []
            writer.add(
                Sample(
                    sample_id=f"s{number:03d}",
                    pixels=np.zeros((16, 16), np.uint8),
                    labels={"lesion": float(ill), "normal": float(not ill)},
                    patient=f"p{number:03d}",
                    sha256=digest_bytes(b"x"),
                    statistics={"mean": 0.0},
                    spacing_mm=spacing_mm,
                    boxes=[] if masks else boxes,
                    mask=mask if masks else None,
                )
            )
    return DatasetFolder(path)


@pytest.mark.parametrize("masks", [False, True])
def test_the_largest_lesion_counts_in_mm2(tmp_path: Path, masks: bool) -> None:
    folder = write(tmp_path / "set", masks=masks)
    ids = folder.samples["sample_id"].tolist()
    (name, sizes), *rest = largest_lesions(folder, ids).items()
    assert (name, rest) == ("lesion_mm2", [])
    expected = [(1 + n % 9) ** 2 * 0.2 if n % 3 else np.nan for n in range(180)]
    np.testing.assert_allclose(sizes, expected)


def test_without_a_spacing_pixels_are_counted(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", masks=False, spacing_mm=None)
    ((name, sizes),) = largest_lesions(folder, ["s001", "s003", "s008"]).items()
    assert name == "lesion_px2"
    np.testing.assert_array_equal(sizes, [4, np.nan, 81])


def test_small_lesions_are_scored_apart_and_corrected_with_the_rest(tmp_path: Path) -> None:
    """A model that sees no lesion of fewer than 4 pixels a side."""
    folder = write(tmp_path / "set", masks=False)
    samples = folder.samples
    ids = samples["sample_id"].tolist()
    side = np.array([1 + n % 9 for n in range(180)])
    ill = samples["label_lesion"].to_numpy() == 1
    called = ill & (side >= 4)
    frame = pd.DataFrame(
        {
            "sample_id": ids,
            "patient": samples["patient"],
            "site": "a",
            "scanner": "",
            "age": np.nan,
            "sex": "",
            "label_normal": 1.0 - ill,
            "label_lesion": ill.astype(float),
            "prob_normal": np.where(called, 0.1, 0.8),
            "prob_lesion": np.where(called, 0.9, 0.2),
            "decision": np.where(called, "lesion", "normal"),
            **largest_lesions(folder, ids),
        }
    )
    info = PredictionsInfo(
        experiment="lesions",
        seed=0,
        split="test",
        bundle="sha256:" + 64 * "0",
        task="binary",
        classes=("normal", "lesion"),
        positive="lesion",
        clustered=True,
        thresholds={"lesion": 0.5},
        assumptions=(),
    )
    settings = Settings(resamples=10, subgroups=("site",), minimum_n=20)
    record = Classification(frame, info, settings).record()
    groups = record["by_subgroup"]["lesion size"]
    assert len(groups) == 3
    assert "unknown" not in groups
    assert sum(group["n"] for group in groups.values()) == ill.sum()
    for word, which in zip(groups, (side <= 3, (side > 3) & (side <= 6), side > 6), strict=True):
        group = groups[word]
        assert "mm2" in word
        assert group["n"] == group["n_positive"] == (ill & which).sum()
        assert group["sensitivity"]["value"] == pytest.approx(called[ill & which].mean())
        assert group["sensitivity"]["low"] is not None
        for name in ("specificity", "auc"):
            assert group[name]["value"] is None
            assert "no size" in group[name]["method"]
    gaps = record["gaps"]["lesion size"]
    assert set(gaps) == set(groups)
    small = gaps[next(iter(groups))]["sensitivity"]
    assert small["value"] == pytest.approx(called[ill & (side <= 3)].mean() - called[ill & (side > 3)].mean())
    assert small["p_adjusted"] < 0.05
    # Of few patients nothing is said.
    few = Classification(frame, info, settings.model_copy(update={"minimum_n": 50})).record()
    assert all(group["sensitivity"]["value"] is None for group in few["by_subgroup"]["lesion size"].values())


def test_where_no_lesion_is_known_there_is_no_size(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", masks=False)
    assert (
        largest_lesions(folder, [name for name in folder.samples["sample_id"] if int(name[1:]) % 3 == 0])
        == {}
    )
