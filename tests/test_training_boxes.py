"""Training detectors: what is mined is shown again, whatever the number of processes and kills."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_bytes
from cadx.models import Detections
from cadx.training import TrainingConfig
from cadx.training.boxes import BoxWorkload
from cadx.training.loop import fit, train_medical_detector
from cadx.training.workload import Forward, Setting

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DatasetFolder:
    """Four images of noise with one bright lesion each, and a dimmer square that is none."""
    path = tmp_path_factory.mktemp("boxes") / "dataset"
    with DatasetWriter(
        path,
        name="boxes",
        task="detection",
        classes=("lesion",),
        positive=None,
        modality="noise",
        clustered=False,
        source=SourceInfo(title="boxes", licence="CC0-1.0", citation="none"),
    ) as writer:
        for number in range(4):
            pixels = np.random.default_rng(number).integers(0, 60, (96, 128)).astype(np.uint8)
            pixels[10:22, 12:24] += 150
            pixels[60:72, 80:92] += 80
            writer.add(
                Sample(
                    sample_id=f"s{number}",
                    pixels=pixels,
                    labels={"lesion": 1},
                    boxes=[("lesion", 12, 10, 24, 22)],
                    patient=f"p{number}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics={"mean": float(number)},
                )
            )
    return DatasetFolder(path)


def _config(**changes: Any) -> TrainingConfig:
    fields = {
        "model": {"family": "yolo", "width": 0.25, "strides": (4, 8)},
        "preprocessing": {"height_px": 64, "width_px": 64, "fit": "tile", "mean": 0.2},
        "patches_per_sample": 2,
        "mining_epochs": 1,
        "epochs": 3,
        "batch_size": 4,
        "ema_decay": 0.5,
    }
    return TrainingConfig.model_validate(fields | changes)


def _splits(folder: DatasetFolder) -> pd.DataFrame:
    ids = folder.samples["sample_id"].tolist()
    return pd.DataFrame({"sample_id": ids * 2, "split": ["train"] * 4 + ["val"] * 4})


def _workload(folder: DatasetFolder, scratch: Path, **changes: Any) -> BoxWorkload:
    ids = folder.samples["sample_id"].tolist()
    return BoxWorkload(Setting(_config(**changes), folder, ids, ids, 0, CPU, scratch))


def _squares(images: torch.Tensor) -> list[Detections]:
    """A detector that takes every bright square of 12 px for a lesion, the brighter the surer."""
    answers = []
    for image in images[:, 0]:
        means = torch.nn.functional.avg_pool2d(image[None, None], 12, 1)[0, 0]
        peaks = (means == torch.nn.functional.max_pool2d(means[None, None], 23, 1, 11)[0, 0]) & (means > 0.5)
        corners = torch.nonzero(peaks).flip(1).float()
        boxes = torch.cat([corners, corners + 12], 1)
        scores = (means[peaks] / 2).clamp(0, 1)
        answers.append(Detections(boxes, torch.zeros(len(boxes), dtype=torch.int64), scores))
    return answers


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_what_is_mined_does_not_depend_on_the_number_of_processes(
    folder: DatasetFolder, tmp_path: Path, num_processes: int
) -> None:
    forward = Forward(_squares, torch.no_grad)  # type: ignore[arg-type]
    alone = _workload(folder, tmp_path)
    shared = _workload(folder, tmp_path)
    for epoch in (0, 1):
        alone.take_up([alone.finish_epoch(forward, epoch, 0, 1)])
        found: Sequence[Any] = [
            shared.finish_epoch(forward, epoch, rank, num_processes) for rank in range(num_processes)
        ]
        shared.take_up(found)
    assert alone.state_dict() == shared.state_dict()
    mined = alone.state_dict()["boxes"]
    assert sorted(mined) == [f"s{number}" for number in range(4)]
    for boxes in mined.values():
        assert [box[:4] for box in boxes] == [[80, 60, 92, 72]], "the square that is none, and no lesion"
    resumed = _workload(folder, tmp_path)
    resumed.load_state_dict(alone.state_dict())
    assert resumed.state_dict() == alone.state_dict()


def test_val_in_tiles_is_answered_with_the_models_own_limits(folder: DatasetFolder, tmp_path: Path) -> None:
    def close(images: torch.Tensor) -> list[Detections]:
        """In each tile two boxes that overlap by 2/3."""
        boxes, scores = torch.tensor([[20.0, 20, 40, 40], [24, 20, 44, 40]]), torch.tensor([0.9, 0.8])
        return [Detections(boxes, torch.zeros(2, dtype=torch.int64), scores) for _ in images]

    def number(**changes: Any) -> int:
        model = {"family": "yolo", "width": 0.25, "strides": (4, 8)} | changes
        workload = _workload(folder, tmp_path, model=model)
        forward = Forward(close, torch.no_grad)  # type: ignore[arg-type]
        return len(workload.answers(forward, [[0]])[0].labels)

    once = number()
    assert number(nms_iou=0.7) == 2 * once
    assert number(max_detections=3) == 3 < once


def test_more_lesions_than_boxes_may_be_answered_are_refused(
    folder: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = pd.concat([folder.boxes] * 2, ignore_index=True)
    monkeypatch.setattr(folder, "boxes", twice)
    model = {"family": "yolo", "width": 0.25, "strides": (4, 8), "max_detections": 1}
    with pytest.raises(ValueError, match="max_detections 1: an image has 2 boxes; raise it"):
        _workload(folder, tmp_path, model=model)


def test_loader_workers_find_every_image_preprocessed(
    folder: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = {"height_px": 64, "width_px": 64}
    changes = {"patches_per_sample": 4, "mining_epochs": None, "num_workers": 1}
    workload = _workload(folder, tmp_path, preprocessing=whole, **changes)
    tiles = _workload(
        folder, tmp_path, preprocessing=whole | {"fit": "tile", "intensity": "image"}, **changes
    )
    monkeypatch.delattr(DatasetFolder, "pixels")  # of whole images; a tile is cropped
    for items in (workload.train, tiles.train):
        assert all(items[number].image.isfinite().all() for number in range(len(items)))


class _Killed(Exception):
    pass


def test_a_run_that_mines_goes_on_where_it_was_killed(folder: DatasetFolder, tmp_path: Path) -> None:
    whole = fit(_config(), folder, _splits(folder), seed=0, checkpoints=tmp_path / "whole" / "m")

    def kill(record: dict[str, Any]) -> None:
        if record["epoch"] == 2:
            raise _Killed

    run = {"seed": 0, "checkpoints": tmp_path / "killed" / "m"}
    with pytest.raises(_Killed):
        fit(_config(), folder, _splits(folder), **run, on_epoch=kill)
    resumed = fit(_config(), folder, _splits(folder), **run)
    assert all(torch.equal(tensor, resumed.state_dict[name]) for name, tensor in whole.state_dict.items())


def test_train_medical_detector_reports_the_epochs_mean_loss_and_validates(
    folder: DatasetFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sketch's function of this name prints the last batch's loss as the epoch's, and never looks at val."""
    losses: list[float] = []
    of_a_batch = BoxWorkload.losses

    def kept(workload: BoxWorkload, network: Forward, batch: Any, draw: Any) -> dict[str, torch.Tensor]:
        found = of_a_batch(workload, network, batch, draw)
        losses.append(sum(float(loss.detach()) for loss in found.values()))
        return found

    monkeypatch.setattr(BoxWorkload, "losses", kept)
    config = _config(epochs=2, mining_epochs=None, batch_size=2)
    fitted = train_medical_detector(config, folder, _splits(folder), seed=0, checkpoints=tmp_path / "m")
    assert len(losses) == 8, "four batches an epoch"
    for record, first in zip(fitted.history, (0, 4), strict=True):
        batches = losses[first : first + 4]
        assert record["train_loss"] == pytest.approx(np.mean(batches))
        assert record["train_loss"] != pytest.approx(batches[-1], rel=0.01)
        assert 0 <= record["val_ap50"] <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"preprocessing": {"height_px": 64, "width_px": 64}, "patches_per_sample": 4},
            "mining_epochs: is for tiles",
        ),
        ({"preprocessing": {"patch_px": (8, 8, 8)}}, "preprocessing: not for samples of kind image"),
        (
            {"preprocessing": {"tile_px": 64, "height_px": 64, "width_px": 64}, "patches_per_sample": 4},
            "preprocessing: not for samples of kind image",
        ),
        (
            {"augmentation": {"rotation_degrees": 5}},
            "augmentation.rotation_degrees: boxes stay tight without it",
        ),
        ({"max_instances": 5}, "max_instances: is for bags alone"),
        ({"monitor": "auc"}, "monitor auc: not for a task of detection; use ap50"),
    ],
    ids=str,
)
def test_what_does_not_fit_boxes_is_refused_in_one_line(
    folder: DatasetFolder, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^train.{message}[^\\n]*$"):
        fit(_config(**changes), folder, _splits(folder), seed=0, checkpoints=tmp_path / "m")
