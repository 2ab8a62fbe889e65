"""Volumes and slides before the Predictor: whole, in windows or tiles, from a dataset or a file, the same answer."""

from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
import pandas as pd
import pytest
import torch

from cadx.bundle import Manifest, Provenance, write_bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.files import digest_bytes, digest_path
from cadx.loading.patches import VolumePreprocessing, VolumeSource
from cadx.models import Detections, MILConfig, Output, ResNet3DConfig, ResNetConfig, YOLOConfig
from cadx.predicting.boxes import detect, detectors_answer, pool_detections
from cadx.predicting.predictor import Predictor
from cadx.predicting.volumes import slide_over
from cadx.reading.volumes import read_volume
from cadx.training import TrainingConfig
from cadx.training.loop import fit
from cadx.transforms import Cells, Preprocessing
from tests.test_loading_slides import section, slide_dataset, write_slide

CELLS = (Cells(8, 0.5), Cells(8, 0.5), Cells(8, 0.5))
CPU = torch.device("cpu")


def write_trained(
    path: Path, folder: DatasetFolder, config: TrainingConfig, state: dict[str, torch.Tensor]
) -> Path:
    info, digest = folder.info, digest_bytes(b"")
    manifest = Manifest(
        experiment="kinds",
        seed=0,
        task=info.task,
        classes=info.classes,
        positive=info.positive,
        modality=info.modality,
        model=config.model,
        preprocessing=config.preprocessing,
        clustered=False,
        source=info.source,
        provenance=Provenance(
            dataset=digest, splits=digest, parameters=digest, code=digest, seed=0, versions={}
        ),
    )
    write_bundle(path, manifest, [state], folder.samples)
    return path


def _brightest(patches: torch.Tensor) -> Output:
    """A network that holds a patch for positive by its brightest voxel, and looks there."""
    cells = patches[:, 0, ::8, ::8, ::8]
    top = patches.flatten(1).amax(1)
    attention = cells.flatten(1).softmax(1).view_as(cells)
    return Output(torch.stack([-top, top], 1), attention, top[:, None])


def test_one_nodule_anywhere_makes_a_volume_suspicious_and_is_looked_at() -> None:
    preprocessing = VolumePreprocessing(patch_px=(16, 16, 16), window_hu=(0, 100))
    for place in [(0, 0, 0), (40, 24, 32), (24, 48, 8)]:
        voxels = np.zeros((48, 56, 40), np.int16)
        voxels[place] = 100
        volume = VolumeSource.of_array(voxels, (1.0, 1.0, 1.0))
        answer = slide_over(_brightest, volume, preprocessing, "binary", 1, CELLS, CPU)
        assert answer.logits.tolist() == [[-1.0, 1.0]]
        assert answer.attention.shape == (1, 48, 56, 40)
        assert float(answer.attention.sum()) == pytest.approx(1, abs=1e-4)
    empty = VolumeSource.of_array(np.zeros((48, 56, 40), np.int16), (1.0, 1.0, 1.0))
    assert slide_over(_brightest, empty, preprocessing, "binary", 1, CELLS, CPU).logits.tolist() == [[0, 0]]


def test_a_volume_of_one_patch_is_answered_as_the_patch_is() -> None:
    torch.manual_seed(0)
    network = ResNet3DConfig(depth=10, width=0.125, stem="small").build(2, 1).eval()
    preprocessing = VolumePreprocessing(patch_px=(16, 16, 16), window_hu=(0, 100))
    voxels = np.random.default_rng(0).integers(0, 100, (16, 16, 16)).astype(np.int16)
    volume = VolumeSource.of_array(voxels, (1.0, 1.0, 1.0))
    with torch.inference_mode():
        whole = slide_over(network, volume, preprocessing, "binary", 1, CELLS, CPU)
        patch = network(preprocessing.apply(volume, (0, 0, 0))[None])
    assert torch.equal(whole.logits, patch.logits)
    assert torch.equal(whole.features, patch.features)


def test_with_mirrors_a_volume_and_its_mirror_image_get_one_answer_and_mirrored_maps() -> None:
    torch.manual_seed(0)
    config = ResNet3DConfig(depth=10, width=0.125, stem="small")
    network = config.build(2, 1).eval()
    torch.nn.init.normal_(network.attention.weight)
    preprocessing = VolumePreprocessing(patch_px=(16, 18, 20), window_hu=(0, 100), mirrors=True)
    voxels = np.random.default_rng(0).integers(0, 100, (24, 18, 30)).astype(np.int16)
    voxels[5:9, 3:6, 20:25] = 1000

    def answer(voxels: np.ndarray, made: VolumePreprocessing) -> Output:
        volume = VolumeSource.of_array(np.ascontiguousarray(voxels), (1.0, 1.0, 1.0))
        with torch.inference_mode():
            return slide_over(network, volume, made, "multiclass", None, config.cells, CPU)

    whole = answer(voxels, preprocessing)
    plain = answer(voxels, preprocessing.model_copy(update={"mirrors": False}))
    assert not torch.allclose(whole.logits, plain.logits, atol=1e-4)
    for axes in [(0,), (1,), (2,), (0, 2), (0, 1, 2)]:
        turned = answer(np.flip(voxels, axes), preprocessing)
        torch.testing.assert_close(turned.logits, whole.logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(turned.features, whole.features, atol=1e-5, rtol=0)
        back = turned.attention[0].flip(axes)
        torch.testing.assert_close(back, whole.attention[0], atol=1e-6, rtol=1e-3)
    one = answer(voxels[:16, :, :20], preprocessing)
    patch = preprocessing.apply(
        VolumeSource.of_array(np.ascontiguousarray(voxels[:16, :, :20]), (1.0, 1.0, 1.0)), (0, 0, 0)
    )
    with torch.inference_mode():
        views = [
            network(patch[None].flip([2] * d + [3] * h + [4] * w)).logits
            for d in (0, 1)
            for h in (0, 1)
            for w in (0, 1)
        ]
    torch.testing.assert_close(one.logits, torch.stack(views).mean(0), atol=1e-5, rtol=0)


def test_a_file_and_its_dataset_give_one_answer(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source = SourceInfo(title="t", licence="CC0", citation="c")
    files = []
    with DatasetWriter(
        tmp_path / "dataset",
        name="volumes",
        kind="volume",
        task="binary",
        classes=("none", "nodule"),
        positive="nodule",
        modality="CT",
        clustered=False,
        source=source,
    ) as writer:
        for number in range(4):
            voxels = rng.integers(0, 60, (20, 24, 28)).astype(np.int16)
            voxels[4:12, 4:12, 4:12] += 60 * (number % 2)
            files.append(tmp_path / f"{number}.nii.gz")
            image = nibabel.Nifti1Image(voxels.transpose(2, 1, 0), np.diag([1.0, 1.0, 1.5, 1.0]))
            image.header.set_xyzt_units("mm")
            nibabel.save(image, files[-1])
            writer.add(
                Sample(
                    sample_id=f"s{number}",
                    pixels=voxels,
                    spacing_mm=(1.5, 1.0, 1.0),
                    labels={("none", "nodule")[number % 2]: 1},
                    patient=f"p{number}",
                    sha256=digest_path(files[-1]),
                    statistics={},
                )
            )
    folder = DatasetFolder(tmp_path / "dataset")
    config = TrainingConfig.model_validate(
        {
            "model": {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
            "preprocessing": {"patch_px": (16, 16, 16), "spacing_mm": (1.5, 1.5, 1.5), "window_hu": (0, 120)},
        }
    )
    torch.manual_seed(0)
    state = config.model.build(2, 1).state_dict()
    predictor = Predictor(write_trained(tmp_path / "bundle", folder, config, state), uncalibrated_ok=True)
    stored, features = predictor.logits(predictor.stored(folder, ["s0", "s1"]))
    read = [predictor.subject.item(read_volume(file)) for file in files[:2]]
    from_files, same_features = predictor.logits(read)
    assert np.array_equal(stored, from_files)
    assert np.array_equal(features, same_features)
    raw = read_volume(files[1])
    grid = predictor._forward(read[1:2]).attention[0]
    attention = predictor.subject.attention(raw, read[1], grid)
    assert attention.shape == raw.voxels.shape
    assert attention.max() == 1
    # The grid is of 20 x 16 x 19 voxels; the last one along W lies in part beyond the volume.
    ramp = np.broadcast_to(np.arange(19, dtype=np.float32), grid.shape).copy()
    expected = np.clip((np.arange(28) + 0.5) / 1.5 - 0.5, 0, 18) / ((27 + 0.5) / 1.5 - 0.5)
    np.testing.assert_allclose(predictor.subject.attention(raw, read[1], ramp)[3, 4], expected, atol=1e-6)
    resnet = ResNetConfig(width=0.125)
    images = config.model_copy(
        update={"preprocessing": Preprocessing(height_px=8, width_px=8), "model": resnet}
    )
    other = write_trained(tmp_path / "other", folder, images, resnet.build(2, 1).state_dict())
    of_images = Predictor(other, uncalibrated_ok=True)
    with pytest.raises(ValueError, match=r"its samples are of kind volume, this model's image"):
        of_images.stored(folder, ["s0"])


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> DatasetFolder:
    """Four slides, the even ones of one colour, the odd ones with a dark corner of tissue."""
    path = tmp_path_factory.mktemp("slides")
    files = {}
    for number in range(4):
        pixels = section(400, 500, np.s_[64:320, 64:448])
        pixels[300:310, 64:448, 2] = 120 + number  # no two slides are one file
        if number % 2:
            pixels[64:192, 64:192] = (110, 40, 140)
        files[f"s{number}"] = write_slide(path / f"{number}.tiff", pixels)
    return slide_dataset(path / "dataset", files)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_slide_is_learned_and_answered_from_its_file(
    slides: DatasetFolder, tmp_path: Path, frozen: bool
) -> None:
    encoder = {"depth": 18, "width": 0.125, "norm": "group", "frozen": frozen}
    model = {"family": "mil", "hidden_dim": 32, "attention_dim": 16, "dropout": 0.0, "encoder": encoder}
    config = TrainingConfig.model_validate(
        {
            "model": model | {"entropy_weight": 0.01},
            "preprocessing": {"tile_px": 64, "height_px": 32, "width_px": 32, "channels": 3},
            "epochs": 20,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "warmup_epochs": 1,
            "max_instances": 16,
        }
    )
    ids = slides.samples["sample_id"].tolist()
    splits = pd.DataFrame({"sample_id": ids * 2, "split": ["train"] * 4 + ["val"] * 4})
    run = tmp_path / "run" / "member"
    fitted = fit(config, slides, splits, seed=0, checkpoints=run)
    assert fitted.history[fitted.best_epoch - 1]["val_auc"] == 1
    assert isinstance(config.model, MILConfig)
    files = sorted((tmp_path / "run").rglob("*.npy"))
    assert len(files) == (4 if frozen else 0), (
        "a frozen encoder sees each slide once, a trained one caches nothing"
    )
    if frozen:
        before = {file: file.stat().st_mtime_ns for file in files}
        longer = config.model_copy(update={"epochs": 2, "learning_rate": 1e-3})
        fit(longer, slides, splits, seed=0, checkpoints=tmp_path / "run" / "another")
        assert {file: file.stat().st_mtime_ns for file in (tmp_path / "run").rglob("*.npy")} == before

    bundle = write_trained(tmp_path / "bundle", slides, config, fitted.state_dict)
    predictor = Predictor(bundle, uncalibrated_ok=True)
    logits, features = predictor.logits(predictor.stored(slides, ids))
    margin = logits[:, 1] - logits[:, 0]
    assert margin[[1, 3]].min() > margin[[0, 2]].max()
    raw = predictor.subject.read(slides.slide_path("s1"))
    tiles = predictor.subject.item(raw)
    from_file, same_features = predictor.logits([tiles])
    assert np.allclose(from_file[0], logits[1], atol=1e-6)
    assert np.allclose(same_features[0], features[1], atol=1e-6)
    heat = predictor.subject.attention(raw, tiles, predictor._forward([tiles]).attention[0])
    assert heat.shape == raw.summary.thumbnail.shape[:2]
    assert np.nanmax(heat) == pytest.approx(1)
    assert np.isnan(heat[0, 0]), "there is no tile on glass"


def test_tiles_of_an_image_find_what_the_whole_would() -> None:
    def bright(images: torch.Tensor) -> list[Detections]:
        """A detector of the one bright rectangle that an image may show."""
        answers = []
        for image in images[:, 0]:
            rows, columns = torch.nonzero(image.amax(1) > 0.5), torch.nonzero(image.amax(0) > 0.5)
            found = len(rows) > 0
            box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if found else []
            boxes = torch.tensor([[float(x) for x in box]]) if found else torch.zeros(0, 4)
            answers.append(
                Detections(boxes, torch.zeros(len(boxes), dtype=torch.int64), torch.ones(len(boxes)))
            )
        return answers

    tiles = Preprocessing(height_px=64, width_px=64, fit="tile", mean=0, std=1)
    for top, left in [(10, 10), (55, 90), (120, 30), (100, 180)]:  # within a tile, and over seams
        pixels = np.zeros((150, 220), np.uint8)
        pixels[top : top + 12, left : left + 14] = 255
        (found,) = detect(bright, [pixels], tiles, CPU, YOLOConfig())
        assert found.boxes_xyxy.tolist() == [[left, top, left + 14, top + 12]]
    (nothing,) = detect(bright, [np.zeros((150, 220), np.uint8)], tiles, CPU, YOLOConfig())
    assert not len(nothing.boxes_xyxy)


def test_an_ensembles_boxes_are_pooled_once_each() -> None:
    def answer(boxes: list[list[float]], scores: list[float]) -> Detections:
        return Detections(
            torch.tensor(boxes).view(-1, 4), torch.zeros(len(boxes), dtype=torch.int64), torch.tensor(scores)
        )

    first = answer([[0, 0, 10, 10], [50, 50, 60, 60]], [0.9, 0.4])
    second = answer([[1, 0, 10, 10]], [0.7])
    pooled = pool_detections([first, second], nms_iou=0.5, max_detections=100)
    assert pooled.boxes_xyxy.tolist() == [[0, 0, 10, 10], [50, 50, 60, 60]]
    assert pooled.scores.tolist() == pytest.approx([0.8, 0.2])
    assert pool_detections([first], nms_iou=0.5, max_detections=100) is first


@pytest.mark.parametrize(("fit", "num_members"), [("tile", 1), ("tile", 2), ("pad", 2)])
def test_a_models_nms_iou_and_max_detections_hold_for_tiles_and_ensembles(
    fit: Literal["pad", "tile"], num_members: int
) -> None:
    def close(images: torch.Tensor) -> list[Detections]:
        """Two boxes that overlap by 2/3, and a third elsewhere."""
        boxes = torch.tensor([[20.0, 20, 40, 40], [24, 20, 44, 40], [10, 50, 20, 60]])
        scores = torch.tensor([0.9, 0.8, 0.7])
        return [Detections(boxes, torch.zeros(3, dtype=torch.int64), scores) for _ in images]

    def scores(**changes: Any) -> list[float]:
        networks: list[Any] = [close] * num_members
        made, image = Preprocessing(height_px=64, width_px=64, fit=fit), np.zeros((64, 64), np.uint8)
        (found,) = detectors_answer(networks, [image], made, CPU, YOLOConfig(**changes))
        return found.scores.tolist()

    assert scores() == pytest.approx([0.9, 0.7])
    assert scores(nms_iou=0.7) == pytest.approx([0.9, 0.8, 0.7])
    assert scores(nms_iou=0.7, max_detections=2) == pytest.approx([0.9, 0.8])
