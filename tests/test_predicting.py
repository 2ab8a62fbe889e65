"""One answer for one image: whatever the batch, the file format and the door it came through."""

import io
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian
from test_bundle import SIZE_PX, draw, operating_point, train_bundle, write_dataset

from cadx.bundle import Bundle
from cadx.datasets import DatasetFolder
from cadx.predicting.predictor import Predictor, pool_logits
from cadx.predicting.table import PredictionsInfo, decide, read_predictions, subgroups, write_predictions
from cadx.reading.images import read_image
from cadx.types import RawImage

THRESHOLD = 0.3
BIAS = (0.2, -0.2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_dataset(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def bundle(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("bundles")
    Bundle(train_bundle(folder / "trained", *cohort, steps=8)).complete(
        folder / "final", temperature=6.0, bias=BIAS, operating_point=operating_point(opacity=THRESHOLD)
    )
    return Bundle(folder / "final")


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Predictor:
    return Predictor(bundle, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> list[np.ndarray]:
    rng = np.random.default_rng(11)
    return [draw(rng, opacity=i % 2 == 0, stripe=False) for i in range(33)]


def png(image: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(image).save(out, format="PNG")
    return out.getvalue()


def dicom(image: np.ndarray) -> bytes:
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.PatientID, data.Modality, data.PhotometricInterpretation = "P1", "CR", "MONOCHROME2"
    data.Rows, data.Columns = image.shape
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit = 1, 8, 8, 7
    data.PixelRepresentation = 0
    data.PixelSpacing = [0.2, 0.2]
    data.PixelData = image.tobytes()
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    return out.getvalue()


def probabilities(answers: list) -> np.ndarray:
    return np.array([list(answer.probabilities.values()) for answer in answers])


def test_an_answer_does_not_depend_on_its_batch(predictor: Predictor, pixels: list[np.ndarray]) -> None:
    images = [RawImage(image) for image in pixels]
    together = probabilities(predictor.predict_many(images))
    alone = probabilities([predictor.predict(image) for image in images])
    streamed = predictor.probabilities(iter(pixels))
    np.testing.assert_allclose(alone, together, rtol=0, atol=1e-6)
    np.testing.assert_allclose(streamed, together, rtol=0, atol=1e-6)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_answer_does_not_depend_on_the_device(bundle: Bundle, pixels: list[np.ndarray]) -> None:
    on_cpu = Predictor(bundle, device="cpu").probabilities(iter(pixels))
    on_gpu = Predictor(bundle, device="cuda")
    np.testing.assert_allclose(on_gpu.probabilities(iter(pixels)), on_cpu, rtol=0, atol=1e-5)
    alone = np.concatenate([on_gpu.probabilities([image]) for image in pixels])
    np.testing.assert_allclose(alone, on_gpu.probabilities(iter(pixels)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("encode", [png, dicom])
def test_the_format_of_the_file_changes_nothing(
    predictor: Predictor, pixels: list[np.ndarray], encode, tmp_path: Path
) -> None:
    for image in pixels[:4]:
        from_bytes = predictor.predict(read_image(encode(image)), attention=True)
        (tmp_path / "image").write_bytes(encode(image))
        from_file = predictor.predict(read_image(tmp_path / "image"))
        from_pixels = predictor.predict(RawImage(image), attention=True)
        assert from_bytes.probabilities == from_pixels.probabilities == from_file.probabilities
        assert from_bytes.statistics == from_pixels.statistics
        np.testing.assert_array_equal(from_bytes.attention, from_pixels.attention)


def test_what_the_dataset_stores_is_answered_as_the_file_was(
    predictor: Predictor, cohort: tuple[Path, Path], pixels: list[np.ndarray]
) -> None:
    stored = DatasetFolder(cohort[0]).pixels("s0003")
    assert (
        predictor.predict(read_image(png(stored))).probabilities
        == predictor.predict(RawImage(stored)).probabilities
    )


def test_the_decision_is_the_operating_point_not_one_half(
    predictor: Predictor, pixels: list[np.ndarray]
) -> None:
    answers = predictor.predict_many([RawImage(image) for image in pixels])
    expected = ["opacity" if a.probabilities["opacity"] >= THRESHOLD else "normal" for a in answers]
    assert [answer.decision for answer in answers] == expected
    between = [a for a in answers if THRESHOLD <= a.probabilities["opacity"] < 0.5]
    assert between, "no image between threshold and one half: the test shows nothing"


def test_a_probability_on_the_threshold_is_positive() -> None:
    called = decide(np.array([[0.7, 0.3]]), {"b": 0.3}, "binary", ("a", "b"), "b")
    assert called.tolist() == [[False, True]]


def test_decisions_by_task() -> None:
    p = np.array([[0.2, 0.5, 0.3], [0.6, 0.3, 0.1]])
    assert decide(p, {}, "multiclass", "abc", None).tolist() == [[False, True, False], [True, False, False]]
    thresholds = {"a": 0.2, "b": 0.9, "c": 0.3}
    assert decide(p, thresholds, "multilabel", "abc", None).tolist() == [
        [True, False, True],
        [True, False, False],
    ]


def test_temperature_and_bias_are_applied(
    bundle: Bundle, predictor: Predictor, pixels: list[np.ndarray]
) -> None:
    logits, features = predictor.logits(pixels[:5])
    expected = torch.softmax(torch.from_numpy(logits) / 6.0 + torch.tensor(BIAS), dim=1).numpy()
    np.testing.assert_allclose(predictor.probabilities(pixels[:5]), expected, atol=1e-12)
    answer = predictor.predict(RawImage(pixels[0]))
    np.testing.assert_allclose(answer.embedding, features[0], atol=1e-5)


def test_attention_lies_on_the_raw_image(predictor: Predictor) -> None:
    image = np.random.default_rng(0).integers(0, 255, (50, 90), dtype=np.uint8)
    attention = predictor.predict(RawImage(image), attention=True).attention
    assert attention.shape == (50, 90)
    assert attention.dtype == np.float32
    assert attention.min() >= 0
    assert attention.max() == 1
    assert predictor.predict(RawImage(image)).attention is None


def test_an_unusual_image_and_an_assumption_are_warned_of(
    predictor: Predictor, cohort: tuple[Path, Path]
) -> None:
    usual = RawImage(DatasetFolder(cohort[0]).pixels("s0000"), assumptions=("spacing was not in the file",))
    assert predictor.predict(usual).warnings == ("spacing was not in the file",)
    white = predictor.predict(RawImage(np.full((SIZE_PX, SIZE_PX), 255, np.uint8)))
    assert any(
        text.startswith("unusual image: mean is 1, the model was trained on") for text in white.warnings
    )


def test_an_incomplete_bundle_gives_logits_only_and_only_if_asked(
    cohort: tuple[Path, Path], tmp_path: Path, pixels: list[np.ndarray]
) -> None:
    trained = train_bundle(tmp_path / "trained", *cohort, steps=1)
    with pytest.raises(ValueError, match="run `cadx calibrate` first"):
        Predictor(trained)
    raw = Predictor(trained, uncalibrated_ok=True)
    assert raw.logits(pixels[:2])[0].shape == (2, 2)
    with pytest.raises(AssertionError):
        raw.predict(RawImage(pixels[0]))


def test_a_bundle_that_needs_spacing_refuses_an_image_without(
    bundle: Bundle, tmp_path: Path, pixels: list[np.ndarray]
) -> None:
    text = (bundle.path / "bundle.json").read_text()
    strict = tmp_path / "strict"
    strict.mkdir()
    for name in bundle.manifest.files:
        (strict / name).parent.mkdir(exist_ok=True)
        (strict / name).write_bytes((bundle.path / name).read_bytes())
    (strict / "bundle.json").write_text(text.replace('"requires_spacing": false', '"requires_spacing": true'))
    predictor = Predictor(strict)
    with pytest.raises(ValueError, match="no pixel spacing"):
        predictor.predict(read_image(png(pixels[0])))
    assert predictor.predict(read_image(dicom(pixels[0]))).decision in ("normal", "opacity")


def test_an_ensemble_averages_probabilities(
    cohort: tuple[Path, Path], tmp_path: Path, pixels: list[np.ndarray]
) -> None:
    both = train_bundle(tmp_path / "both", *cohort, steps=4, members=2)
    Bundle(both).complete(
        tmp_path / "final", temperature=1.0, operating_point=operating_point(opacity=THRESHOLD)
    )
    predictor = Predictor(tmp_path / "final", device="cpu")
    inputs = torch.stack([predictor.bundle.manifest.preprocessing.apply(image) for image in pixels])
    with torch.inference_mode():
        members = [network(inputs).logits.double().softmax(1) for network in predictor.bundle.networks()]
    assert float((members[0] - members[1]).abs().max()) > 0.01, "equal members show nothing"
    np.testing.assert_allclose(predictor.probabilities(pixels), torch.stack(members).mean(0), atol=1e-6)


def test_pooled_multilabel_logits_are_the_mean_probability() -> None:
    logits = torch.randn(3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 5
    torch.testing.assert_close(pool_logits(logits, "multilabel").sigmoid(), logits.sigmoid().mean(0))
    assert torch.isfinite(pool_logits(logits * 200, "multilabel")).all()


def test_threads_get_the_same_answers(predictor: Predictor, pixels: list[np.ndarray]) -> None:
    expected = [predictor.predict(RawImage(image)).probabilities for image in pixels[:12]]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda image: predictor.predict(RawImage(image)).probabilities, pixels[:12]))
    assert found == expected


@pytest.fixture
def info() -> PredictionsInfo:
    return PredictionsInfo(
        experiment="squares",
        seed=0,
        split="val",
        bundle="sha256:" + "0" * 64,
        task="binary",
        classes=("normal", "opacity"),
        positive="opacity",
        clustered=False,
        thresholds={"opacity": 1 / 3},
        assumptions=("one",),
    )


def test_predictions_come_back_to_the_last_bit(
    cohort: tuple[Path, Path], info: PredictionsInfo, tmp_path: Path
) -> None:
    frame = DatasetFolder(cohort[0]).samples.head(5).copy()
    frame["prob_normal"] = [1 / 3, 1e-300, 1.0, 0.1 + 0.2, math.nextafter(0.5, 1)]
    frame["prob_opacity"] = 1 - frame["prob_normal"]
    frame["decision"] = "normal"
    write_predictions(tmp_path / "a.parquet", frame, info)
    write_predictions(tmp_path / "b.parquet", frame.copy(), info)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    read, again = read_predictions(tmp_path / "a.parquet")
    assert again == info
    assert read["prob_normal"].tolist() == frame["prob_normal"].tolist()
    assert list(read.columns) == info.columns
    assert "stat_mean" not in read


def test_what_is_no_predictions_file_is_refused_in_one_line(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("no")
    for path in (tmp_path / "text", cohort[0] / "samples.parquet"):
        with pytest.raises(ValueError, match="no predictions file of this version"):
            read_predictions(path)


def test_subgroups_bands_and_what_is_never_known(cohort: tuple[Path, Path]) -> None:
    samples = DatasetFolder(cohort[0]).samples
    groups = subgroups(samples, ("site", "sex", "age", "scanner"))
    assert "scanner" not in groups, "an attribute that is never known is no subgroup"
    assert set(groups["age"]) == {"0-39", "40-59", "60-79", "80+", ""}
    assert len(groups["site"]) == len(samples)
