"""Volumes, slides and boxes through their endpoints: the Predictor's answers, their explanations, and refusals."""

import ctypes
import gzip
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import nibabel
import numpy as np
import pandas as pd
import pydicom
import pytest
import tifffile
import torch
import urllib3
from other_readers import image_elsewhere, slide_elsewhere, volume_elsewhere
from PIL import Image
from test_corpus import damaged, dicom, nifti, sources
from test_loading_slides import section, slide_dataset, write_slide
from test_serving import NAMES, PATIENT, encoded, gray, lines, post, release_of, require_valid
from test_serving import dicom as dicom_of_a_patient

from cadx.bundle import Bundle, write_bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.drift import image_statistics
from cadx.files import digest_bytes, write_json
from cadx.gating import Decision
from cadx.predicting.bags import EmbeddedSlides
from cadx.predicting.predictor import Predictor
from cadx.predicting.table import PredictionsInfo, answer_table, write_predictions
from cadx.reading.images import encode_png, read_image
from cadx.reading.slides import open_slide
from cadx.reading.source import gray_if_equal
from cadx.reading.volumes import read_volume
from components.deploy import DeployParams, deploy
from pipelines.verification import verify
from serving.answering import Answerer, Reply, Request, RequestLog
from serving.archive import write_archive
from serving.client import SCHEMA_VERSION, Client, DetectionAnswer, Refused, SlideAnswer, VolumeAnswer
from serving.demo import DemoKind, demo_release, register_demos, write_demo_bundle
from serving.kinds import (
    SLIDE_CACHE,
    SLIDE_ROOT,
    DetectionAnswerer,
    RadiographAnswerer,
    SlideAnswerer,
    VolumeAnswerer,
    encode_nifti,
)
from serving.management import Management
from serving.schema import answer_schema
from serving.server import TorchServe, free_ports

ROOT = Path(__file__).resolve().parent.parent
ANSWERERS: dict[str, type[Answerer]] = {
    "radiograph": RadiographAnswerer,
    "volume": VolumeAnswerer,
    "slide": SlideAnswerer,
    "detection": DetectionAnswerer,
}
THRESHOLD = 0.0053
VOXELS = np.random.default_rng(0).integers(0, 100, (20, 24, 28)).astype(np.int16)
MODELS: dict[DemoKind, dict[str, Any]] = {
    "radiograph": {"preprocessing": {"height_px": 64, "width_px": 64}},
    "volume": {
        "model": {"family": "resnet3d", "depth": 10, "width": 0.125, "stem": "small"},
        "preprocessing": {"patch_px": (16, 16, 16), "window_hu": (0, 120)},
    },
    "slide": {"preprocessing": {"tile_px": 64, "height_px": 32, "width_px": 32, "channels": 3}},
    "detection": {"preprocessing": {"height_px": 64, "width_px": 64}},
}


_OF_ALL = "schema_version kind prediction_id model decision operating_point warnings timing_ms "
_OF_LABELS = _OF_ALL + "probabilities prediction_set refer"
REQUIRED_FIELDS = {
    1: {
        "Answer": _OF_LABELS,
        "VolumeAnswer": _OF_LABELS,
        "SlideAnswer": _OF_LABELS,
        "DetectionAnswer": _OF_ALL + "boxes",
        "Model": "name version bundle",
        "OperatingPoint": "thresholds target_metric target_value",
        "Timing": "decode preprocess infer total",
        "AtPrevalence": "prevalence probabilities",
        "VolumeAttention": "slice slice_png nifti",
        "SlideAttention": "thumbnail_png num_tiles tiles",
        "Tile": "x_px y_px side_px weight",
        "Box": "class score box_xyxy called",
    }
}
"""Version of the form -> record -> the fields that each answer of that version has. What stands here never changes."""
OPTIONAL_FIELDS = {
    1: {
        "Answer": "at_prevalence attention_png",
        "VolumeAnswer": "at_prevalence attention",
        "SlideAnswer": "at_prevalence attention",
        "DetectionAnswer": "prediction_set refer",
    }
}


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("archives")
    made = {}
    for kind in MODELS:
        bundle = Bundle(write_demo_bundle(folder / f"{kind}-bundle", kind, **MODELS[kind]))
        made[kind] = folder / f"{kind}.mar"
        write_archive(made[kind], bundle.path, release_of(bundle, name=kind))
    return made


@pytest.fixture(scope="module")
def predictors(archives: dict[str, Path]) -> dict[str, Predictor]:
    return {kind: Predictor(path.with_name(f"{kind}-bundle"), "cpu") for kind, path in archives.items()}


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with one slide, in a folder, beside what must not be reached."""
    outside = tmp_path_factory.mktemp("pathology")
    (outside / "root" / "2026").mkdir(parents=True)
    pixels = section(400, 500, np.s_[64:320, 64:448])
    write_slide(outside / "root" / "2026" / "a.tiff", pixels)
    write_slide(outside / "secret.tiff", pixels)
    (outside / "root" / "link.tiff").symlink_to(outside / "secret.tiff")
    (outside / "root" / "loop.tiff").symlink_to("loop.tiff")
    os.mkfifo(outside / "root" / "pipe.tiff")
    return outside / "root"


@pytest.fixture
def answerers(
    archives: dict[str, Path], slides: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Answerer]:
    monkeypatch.setenv(SLIDE_ROOT, str(slides))
    monkeypatch.setenv(SLIDE_CACHE, str(tmp_path / "cache"))
    made: dict[str, Answerer] = {}
    for kind, path in archives.items():
        with zipfile.ZipFile(path) as archive:
            archive.extractall(tmp_path / kind)
        made[kind] = ANSWERERS[kind](tmp_path / kind, log=RequestLog(tmp_path / "log"))
    return made


def series(number: int = 5, **changes: Any) -> bytes:
    """A zip of one DICOM series."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for z in range(number):
            plane = (VOXELS[z % 20].astype(np.uint16) + 7).repeat(2, 0)
            archive.writestr(f"Quagmire^{z}.dcm", dicom(plane, position_mm=2.0 * z, **changes))
    return out.getvalue()


def one(answerer: Answerer, body: bytes, **flags: str) -> Reply:
    (reply,) = answerer.answer([Request(body, **flags)])
    return reply


def test_the_published_schema_is_that_of_the_client() -> None:
    published = json.loads((ROOT / "docs" / "answer.schema.json").read_text(encoding="utf-8"))
    assert published == answer_schema(), "python -m serving.schema > docs/answer.schema.json"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"kind": "radiograph", "probabilities": {}}, published)


def test_a_field_goes_only_with_a_new_version_of_the_form() -> None:
    forms = json.loads((ROOT / "docs" / "answer.schema.json").read_text(encoding="utf-8"))["$defs"]
    assert SCHEMA_VERSION in REQUIRED_FIELDS, "a new version: add its fields, and leave those of the others"
    for name, fields in REQUIRED_FIELDS[SCHEMA_VERSION].items():
        gone = set(fields.split()) - set(forms[name]["required"])
        assert not gone, f"{name} has lost {gone}: raise SCHEMA_VERSION"
    for name, fields in OPTIONAL_FIELDS[SCHEMA_VERSION].items():
        gone = set(fields.split()) - set(forms[name]["properties"])
        assert not gone, f"{name} has lost {gone}: raise SCHEMA_VERSION"
    for name in ("Answer", "VolumeAnswer", "SlideAnswer", "DetectionAnswer"):
        assert forms[name]["properties"]["schema_version"]["const"] == SCHEMA_VERSION


def test_an_archive_carries_the_handler_of_its_kind(archives: dict[str, Path]) -> None:
    for kind, path in archives.items():
        with zipfile.ZipFile(path) as archive:
            assert [name for name in archive.namelist() if name.endswith(".py")] == [f"{kind}_handler.py"]


def test_what_no_gate_let_through_says_so_in_each_answer(tmp_path: Path) -> None:
    bundle = write_demo_bundle(tmp_path / "bundle", "detection", **MODELS["detection"])
    write_archive(tmp_path / "demo.mar", bundle, demo_release(bundle, "demo"))
    with zipfile.ZipFile(tmp_path / "demo.mar") as archive:
        archive.extractall(tmp_path / "demo")
    reply = one(DetectionAnswerer(tmp_path / "demo"), encode_png(gray(1)))
    assert reply.content["warnings"][0] == "not released: random weights: its answers mean nothing"


# --- Volumes ------------------------------------------------------------------------------------------


def test_a_volume_is_answered_alike_from_each_of_its_formats(
    answerers: dict[str, Answerer], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    plain = encode_nifti(VOXELS, None, (1.5, 1.0, 0.7))
    (tmp_path / "a.nii").write_bytes(plain)
    expected = predictors["volume"].predict(read_volume(tmp_path / "a.nii"))
    for body in (plain, gzip.compress(plain)):
        reply = one(answerers["volume"], body)
        assert reply.status == 200
        require_valid(reply.content)
        assert reply.content["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert reply.content["decision"] == expected.decision
    (tmp_path / "a.zip").write_bytes(series())
    reply = one(answerers["volume"], series())
    from_zip = predictors["volume"].predict(read_volume(tmp_path / "a.zip")).probabilities
    assert reply.content["probabilities"] == pytest.approx(from_zip, abs=1e-6)
    assert len(lines(tmp_path / "log")) == 3


def test_the_attention_of_a_volume_lies_over_the_original_in_any_viewer(
    answerers: dict[str, Answerer], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    """The original is stored with its axes turned: the map must follow its affine, not its array."""
    affine = np.array([[-0.7, 0, 0, 40], [0, 0, 1.1, -20], [0, -1.5, 0, 90], [0, 0, 0, 1.0]])
    original = nibabel.Nifti1Image(VOXELS.transpose(2, 0, 1).copy(), affine)
    original.header.set_xyzt_units("mm")
    (tmp_path / "a.nii").write_bytes(original.to_bytes())
    reply = one(answerers["volume"], original.to_bytes(), attention="true")
    require_valid(reply.content)
    answer = VolumeAnswer.model_validate_json(json.dumps(reply.content))
    assert answer.attention is not None
    assert answer.attention.nifti is not None
    overlay = nibabel.Nifti1Image.from_bytes(gzip.decompress(answer.attention.nifti))
    raw = read_volume(tmp_path / "a.nii")
    attention = predictors["volume"].predict(read_volume(tmp_path / "a.nii"), attention=True).attention
    assert attention is not None
    most = np.unravel_index(attention.argmax(), attention.shape)
    assert answer.attention.slice == most[0]
    place_mm = raw.affine @ (*most, 1)
    i, j, k = np.rint(np.linalg.inv(overlay.affine) @ place_mm)[:3].astype(int)
    assert np.asarray(overlay.dataobj)[i, j, k] == 255
    picture = Image.open(io.BytesIO(answer.attention.slice_png))
    assert (picture.height, picture.width) == raw.voxels.shape[1:]


def bomb(claimed_bytes: int) -> bytes:
    """A zip whose member claims to unpack to more than any machine should try."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0", bytes(1 << 20))
    data = bytearray(out.getvalue())
    at = data.index(b"PK\x01\x02") + 24  # of the central directory: the size unpacked
    data[at : at + 4] = claimed_bytes.to_bytes(4, "little")
    return bytes(data)


def text_in_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../../etc/cron.d/x", "PatientName: Quagmire")
    return out.getvalue()


def huge_claim() -> bytes:
    header = nibabel.Nifti1Header()
    header.set_data_shape((20_000, 20_000, 20_000))
    return gzip.compress(header.binaryblock + bytes(4 + (1 << 22)))


NO_VOLUMES = {
    "nothing": (b"", "an empty file"),
    "an image": (encode_png(gray(0)), "neither NIfTI, DICOM nor a zip"),
    "a cut NIfTI": (nifti(VOXELS)[:5000], "NIfTI: "),
    "axes that nothing tells": (nibabel.Nifti1Image(VOXELS, None).to_bytes(), "neither qform nor sform"),
    "a huge claim": (huge_claim(), "over the limits of"),
    "a zip bomb": (bomb(3 << 30), "over the limit of"),
    "a zip of text": (text_in_zip(), "no DICOM image"),
    "half a zip": (series()[:900], "zip of DICOM slices: "),
}


@pytest.mark.parametrize("name", NO_VOLUMES)
def test_what_is_no_volume_is_refused_in_one_discreet_line(answerers: dict[str, Answerer], name: str) -> None:
    body, reason = NO_VOLUMES[name]
    reply = one(answerers["volume"], body)
    assert reply.status == 400
    assert reason in reply.content["error"]
    assert "\n" not in reply.content["error"]
    assert "Quagmire" not in reply.content["error"]
    assert one(answerers["volume"], nifti(VOXELS)).status == 200


# --- Slides -------------------------------------------------------------------------------------------


def asked(path: Any) -> bytes:
    return json.dumps({"path": path}).encode()


def test_a_slide_is_answered_from_its_path_and_shows_its_tiles(
    answerers: dict[str, Answerer], predictors: dict[str, Predictor], slides: Path
) -> None:
    reply = one(answerers["slide"], asked("2026/a.tiff"), attention="true")
    assert reply.status == 200
    require_valid(reply.content)
    expected = predictors["slide"].predict(slides / "2026" / "a.tiff")
    assert reply.content["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    answer = SlideAnswer.model_validate_json(json.dumps(reply.content))
    assert answer.attention is not None
    tiles = answer.attention.tiles
    assert answer.attention.num_tiles == len(tiles) == 4 * 6  # tissue is 256 x 384 px, a tile 64
    assert {(tile.x_px, tile.y_px) for tile in tiles} == {
        (x, y) for x in range(64, 448, 64) for y in range(64, 320, 64)
    }
    assert {tile.side_px for tile in tiles} == {64}
    weights = [tile.weight for tile in tiles]
    assert sum(weights) == pytest.approx(1, abs=1e-5)
    assert weights == sorted(weights, reverse=True)
    thumbnail = Image.open(io.BytesIO(answer.attention.thumbnail_png))
    assert thumbnail.width / thumbnail.height == pytest.approx(500 / 400, rel=0.01)


def test_a_slide_is_encoded_once_and_answered_alike_from_the_cache(
    answerers: dict[str, Answerer], slides: Path, tmp_path: Path
) -> None:
    encoded: list[int] = []
    (network,) = answerers["slide"]._predictor.networks
    network.encoder.register_forward_pre_hook(lambda _, inputs: encoded.append(len(inputs[0])))
    first = one(answerers["slide"], asked("2026/a.tiff"), attention="true").content
    assert sum(encoded) == 24
    copy = slides / "copy.tiff"
    copy.write_bytes((slides / "2026" / "a.tiff").read_bytes())
    second = one(answerers["slide"], asked("copy.tiff"), attention="true").content
    assert sum(encoded) == 24, "the same bytes under another name are the same slide"
    for field in ("probabilities", "decision", "attention"):
        assert first[field] == second[field]
    (file,) = (tmp_path / "cache").glob("*.npy")
    file.write_bytes(b"damaged")
    assert one(answerers["slide"], asked("copy.tiff")).content["probabilities"] == first["probabilities"]
    write_slide(copy, section(400, 500, np.s_[64:320, 64:384]))
    assert one(answerers["slide"], asked("copy.tiff")).content["probabilities"] != first["probabilities"]
    copy.unlink()


def test_the_cache_of_slides_is_bounded_and_keeps_what_was_asked_for_last(tmp_path: Path) -> None:
    made: list[int] = []

    def ask(cache: EmbeddedSlides, number: int) -> float:
        def encode() -> tuple[torch.Tensor, torch.Tensor]:
            made.append(number)
            return torch.full((100, 8), float(number)), torch.zeros(100, 2)

        return float(cache.get({"slide": number}, encode)[0].mean())

    ask(EmbeddedSlides(tmp_path), 0)
    (file,) = tmp_path.glob("*.npy")
    room_for_two = EmbeddedSlides(tmp_path, max_bytes=2 * file.stat().st_size)
    for number in (1, 0, 2, 0, 1):
        assert ask(room_for_two, number) == number
        assert len(list(tmp_path.glob("*.npy"))) <= 2
        time.sleep(0.02)  # files are told apart by their times
    assert made == [0, 1, 2, 1]


@pytest.mark.parametrize(
    "path",
    [
        *("../secret.tiff", "2026/../../secret.tiff", "link.tiff", "loop.tiff", "pipe.tiff", "2026", "."),
        *("nowhere.tiff", "2026/a.tiff\0.png", "/etc/passwd", "~/secret.tiff", "x" * 3000),
    ],
)
def test_no_path_leaves_the_slide_root_nor_tells_what_lies_beyond(
    answerers: dict[str, Answerer], slides: Path, path: str
) -> None:
    for one_path in (path, str(slides.parent / "secret.tiff")):
        reply = one(answerers["slide"], asked(one_path))
        assert (reply.status, reply.content["error"]) == (
            400,
            "no such slide under the server's slide root; give a path relative to it",
        )


@pytest.mark.parametrize("through", ["/etc/passwd", "/nowhere", "../secret.tiff", "../nowhere", "2026", ""])
def test_a_way_back_under_the_slide_root_tells_nothing_of_the_places_that_it_goes_through(
    answerers: dict[str, Answerer], slides: Path, through: str
) -> None:
    climb = "../" * len(slides.resolve().parts) + str(slides.resolve())[1:]
    for path in (f"{through}/../{climb}/2026/a.tiff", f"{through}/../2026/a.tiff", f"{slides}/2026/a.tiff"):
        reply = one(answerers["slide"], asked(path))
        assert (reply.status, reply.content["error"]) == (
            400,
            "no such slide under the server's slide root; give a path relative to it",
        )


def test_a_slide_that_is_sent_or_not_named_is_refused(
    answerers: dict[str, Answerer], slides: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = (slides / "2026" / "a.tiff").read_bytes()
    for body in (slide, b"", b"[]", b"{}", asked(None), asked(7), b"[" * 4000):
        reply = one(answerers["slide"], body)
        assert (reply.status, "relative to the slide root" in reply.content["error"]) == (400, True)
    (slides / "cut.tiff").write_bytes(slide[: len(slide) // 2])
    assert one(answerers["slide"], asked("cut.tiff")).status == 400
    monkeypatch.delenv(SLIDE_ROOT)
    reply = one(answerers["slide"], asked("2026/a.tiff"))
    assert (reply.status, "CADX_SLIDE_ROOT" in reply.content["error"]) == (400, True)


# --- Boxes --------------------------------------------------------------------------------------------


def test_boxes_are_those_of_the_predictor_and_called_at_their_classes_threshold(
    answerers: dict[str, Answerer], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    png = encode_png(np.tile(gray(1), (3, 2)))
    reply = one(answerers["detection"], png)
    assert reply.status == 200
    require_valid(reply.content)
    answer = DetectionAnswer.model_validate_json(json.dumps(reply.content))
    (expected,) = predictors["detection"].detect([read_image(png).pixels])
    assert [box.score for box in answer.boxes] == pytest.approx(expected.scores.tolist())
    assert np.allclose([box.box_xyxy for box in answer.boxes], expected.boxes_xyxy.numpy())
    assert {box.called for box in answer.boxes} == {True, False}
    assert all(box.called == (box.score >= THRESHOLD) for box in answer.boxes)
    assert set(answer.decision) == {box.class_ for box in answer.boxes if box.called}
    assert (reply.content["prediction_set"], reply.content["refer"]) == (None, False), (
        "as docs/endpoints.md says"
    )
    (line,) = lines(tmp_path / "log")
    assert line["boxes"] == reply.content["boxes"]
    assert line["probabilities"]["finding"] == max(
        box.score for box in answer.boxes if box.class_ == "finding"
    )
    assert one(answerers["detection"], b"no image").status == 400


# --- All of them --------------------------------------------------------------------------------------


def test_each_kind_warns_of_what_lies_beyond_training_and_of_a_spacing_that_was_assumed(
    answerers: dict[str, Answerer], predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    header = pydicom.dcmread(io.BytesIO(dicom_of_a_patient(gray(1))))
    header.ImagerPixelSpacing = [0.2, 0.2]
    out = io.BytesIO()
    header.save_as(out)
    at_the_detector = "spacing at the detector (ImagerPixelSpacing), without magnification"
    assumed = {
        "radiograph": (out.getvalue(), at_the_detector),
        "volume": (nifti(VOXELS), "the header names no unit of length: mm was taken"),
        "slide": (asked("2026/a.tiff"), None),  # without its resolution it is refused
        "detection": (out.getvalue(), at_the_detector),
    }
    for kind, (body, assumption) in assumed.items():
        states = [network.state_dict() for network in predictors[kind].networks]
        narrow = tmp_path / f"{kind}-narrow"
        trained_on = pd.DataFrame({"stat_mean": [0.98, 0.99]})
        write_bundle(narrow / "bundle", predictors[kind].bundle.manifest, states, trained_on)
        release = release_of(Bundle(narrow / "bundle"), name=kind)
        write_json(narrow / "release.json", release.model_dump(mode="json"))
        for answerer, is_unusual in ((answerers[kind], False), (ANSWERERS[kind](narrow), True)):
            reply = one(answerer, body)
            require_valid(reply.content)
            said = list(reply.content["warnings"])
            if assumption:
                assert said.pop(0) == assumption, kind
            assert [warning.partition(" is ")[0] for warning in said] == ["unusual image: mean"] * is_unusual


M_TOP_PAD = -2  # of glibc's malloc.h


def answered_in_little_memory(kind: DemoKind, folder: Path, small: bytes, large: bytes) -> list[Reply]:
    """Replies to the small one, to the large one with at most 24 MiB beside what is in use, and to the small again."""
    answerer = ANSWERERS[kind](folder, log=None)
    replies = [one(answerer, small)]
    libc = ctypes.CDLL(None)
    libc.mallopt(M_TOP_PAD, 0)
    libc.malloc_trim(0)  # addresses that `tune_allocator` has reserved
    held_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held_bytes + (24 << 20), unlimited[1]))
    replies.append(one(answerer, large))
    resource.setrlimit(resource.RLIMIT_AS, unlimited)
    return [*replies, one(answerer, small)]


def test_what_is_too_large_for_the_servers_memory_is_told_so_and_the_next_is_answered(
    archives: dict[str, Path], tmp_path: Path
) -> None:
    bodies: dict[DemoKind, tuple[bytes, bytes]] = {
        "radiograph": (encode_png(gray(1)), encoded(np.zeros((8000, 8000), np.uint16), "PNG")),
        "volume": (nifti(VOXELS), encode_nifti(np.zeros((200, 512, 512), np.int16), None)),
    }
    for kind, (small, large) in bodies.items():
        with zipfile.ZipFile(archives[kind]) as archive:
            archive.extractall(tmp_path / kind)
        # In a process of its own: in this one's heap other tests have left room for it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as alone:
            replies = alone.submit(answered_in_little_memory, kind, tmp_path / kind, small, large).result()
        assert [reply.status for reply in replies] == [200, 413, 200], kind
        assert "too large for the memory" in replies[1].content["error"]


def test_no_broken_file_is_a_fault_of_the_server(
    answerers: dict[str, Answerer], slides: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    statuses: dict[int, int] = {}
    for name, (_, whole) in sources().items():
        for number in range(8):
            body = damaged(whole, rng, number)
            (slides / "broken.tiff").write_bytes(body)
            for kind, answerer in answerers.items():
                if kind == "slide" and name != "slide":
                    continue
                reply = one(answerer, asked("broken.tiff") if kind == "slide" else body)
                statuses[reply.status] = statuses.get(reply.status, 0) + 1
                assert reply.status in (200, 400), (name, kind, reply.content)
    assert statuses[400] > 100
    (slides / "broken.tiff").unlink()


@pytest.fixture(scope="module")
def server(
    archives: dict[str, Path], slides: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TorchServe]:
    served = TorchServe(tmp_path_factory.mktemp("kinds") / "served", free_ports())
    served.model_store.mkdir(parents=True)
    for kind, path in archives.items():
        (served.model_store / f"{kind}.mar").write_bytes(path.read_bytes())
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv(SLIDE_ROOT, str(slides))
        served.start()
    try:
        yield served
    finally:
        served.stop()


def datasets(folder: Path) -> dict[str, DatasetFolder]:
    """Three volumes, and three slides."""
    with DatasetWriter(
        folder / "volumes",
        name="volume",
        kind="volume",
        task="binary",
        classes=("normal", "finding"),
        positive="finding",
        modality="noise",
        clustered=False,
        source=SourceInfo(title="t", licence="CC0", citation="c"),
    ) as writer:
        for number in range(3):
            writer.add(
                Sample(
                    sample_id=f"v{number}",
                    pixels=np.roll(VOXELS, 3 * number, 0),
                    spacing_mm=(1.37, 0.703125, 0.7),
                    labels={"finding": 1},
                    patient=f"p{number}",
                    sha256=digest_bytes(bytes(number)),
                    statistics={},
                )
            )
    files = {
        f"s{number}": write_slide(
            folder / f"{number}.tiff", section(400, 500, np.s_[64:320, 32 + 40 * number : 416 + 40 * number])
        )
        for number in range(3)
    }
    return {"volume": DatasetFolder(folder / "volumes"), "slide": slide_dataset(folder / "slides", files)}


def evaluated(folder: Path, predictor: Predictor, dataset: DatasetFolder) -> dict[str, Path]:
    """What `evaluate` and `gate` would hand to `deploy`."""
    manifest, digest = predictor.bundle.manifest, predictor.bundle.digest
    ids = dataset.samples["sample_id"].tolist()
    probabilities = predictor.probabilities(predictor.stored(dataset, ids))
    answers = answer_table(probabilities, predictor.decide(probabilities), "binary", manifest.classes)
    frame = answers.assign(sample_id=ids, patient=ids, site="", scanner="", age=np.nan, sex="")
    frame = frame.assign(**{f"label_{name}": np.nan for name in manifest.classes})
    info = PredictionsInfo(
        experiment="kinds",
        seed=0,
        split="test",
        bundle=digest,
        task="binary",
        classes=manifest.classes,
        positive="finding",
        clustered=False,
        thresholds={"finding": 0.5},
        assumptions=(),
    )
    folder.mkdir()
    write_predictions(folder / "predictions.parquet", frame, info)
    decision = Decision(
        experiment="kinds",
        seed=0,
        split="test",
        promote=True,
        reasons=(),
        checks=(),
        bundle=digest,
        metrics=digest_bytes(b"metrics"),
    )
    release = release_of(
        predictor.bundle, name=manifest.experiment.removeprefix("demo-"), metrics=decision.metrics
    )
    write_archive(folder / "model.mar", predictor.bundle.path, release)
    write_json(folder / "decision.json", decision.model_dump(mode="json"))
    names = ("model.mar", "decision.json", "predictions.parquet")
    keys = ("archive", "decision", "predictions")
    return {key: folder / name for key, name in zip(keys, names, strict=True)} | {"dataset": dataset.path}


@pytest.mark.slow
def test_every_kind_is_deployed_against_its_evaluation_and_served(
    server: TorchServe, predictors: dict[str, Predictor], slides: Path, tmp_path: Path
) -> None:
    management = Management(server.management, key_file=server.key_file)
    for kind, dataset in datasets(tmp_path).items():
        deploy(
            **evaluated(tmp_path / kind, predictors[kind], dataset),
            model_store=server.model_store,
            key_file=server.key_file,
            deployment=tmp_path / f"{kind}.json",
            inference=server.inference,
            management=server.management,
            params=DeployParams(),
        )
        registered = described(server, kind)
        assert registered["responseTimeout"] == {"volume": 300, "slide": 1800}[kind]
        assert registered["batchSize"] == 1
        deployment = json.loads((tmp_path / f"{kind}.json").read_text())
        assert deployment["golden_samples"] == 3
        assert deployment["largest_difference"] <= 1e-5
    assert not list(server.model_store.glob("golden*")), "the slides of the comparison are gone"
    management.register("detection.mar")
    clients = {kind: Client(server.inference, kind, key_file=server.key_file) for kind in MODELS}
    with zipfile.ZipFile(io.BytesIO(series())) as archive:
        archive.extractall(tmp_path / "series")
    (tmp_path / "series" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "series.zip").write_bytes(series())
    expected = predictors["volume"].predict(read_volume(tmp_path / "series.zip")).probabilities
    assert clients["volume"].predict_volume(tmp_path / "series").probabilities == pytest.approx(
        expected, abs=1e-6
    )
    slide = clients["slide"].predict_slide("2026/a.tiff", attention=True)
    assert slide.probabilities == pytest.approx(
        predictors["slide"].predict(slides / "2026" / "a.tiff").probabilities, abs=1e-6
    )
    assert list((server.folder / "slide_cache").glob("*.npy"))
    assert clients["detection"].detect(encode_png(gray(1))).boxes
    for call, reason in (
        (lambda: clients["volume"].predict_volume(b"no volume"), "neither NIfTI, DICOM nor a zip"),
        (lambda: clients["slide"].predict_slide("../secret.tiff"), "no such slide"),
        (lambda: clients["detection"].detect(b"no image"), "neither DICOM, PNG nor JPEG"),
        (lambda: clients["detection"].predict(encode_png(gray(1))), "an answer of another form than Answer"),
    ):
        with pytest.raises(Refused, match=reason):
            call()
    require_discreet(server, slides)


def require_discreet(server: TorchServe, slides: Path) -> None:
    """A patient's name, in what is sent or in the name of a slide, is in no answer and in no file of the server."""
    named = slides / f"{PATIENT}.tiff"
    shutil.copy(slides / "2026" / "a.tiff", named)
    (slides / f"{PATIENT}-cut.tiff").write_bytes(named.read_bytes()[:3000])
    patient = dicom_of_a_patient(gray(0))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(f"{PATIENT}.dcm", patient)
    sent = [
        ("detection", patient, 200),
        ("detection", patient[:-200], 400),
        ("volume", series(), 200),  # whose files are named so
        ("volume", zipped.getvalue(), 400),
        ("volume", patient, 400),
        ("slide", asked(named.name), 200),
        ("slide", asked(f"{PATIENT}-cut.tiff"), 400),
        ("slide", asked(f"{PATIENT}-nowhere.tiff"), 400),
        ("slide", patient, 400),
    ]
    for kind, body, status in sent:
        reply = post(
            server, f"/predictions/{kind}", body, Attention="false" if kind == "detection" else "true"
        )
        assert (reply.status, [name for name in NAMES if name in reply.data]) == (status, []), kind
    files = [file for file in server.folder.rglob("*") if file.is_file()]
    assert {"access_log.log", "model_log.log", "ts_log.log"} <= {file.name for file in files}
    assert not [
        (file.name, name)
        for file in files
        for name in NAMES
        if name in file.read_bytes() or name in os.fsencode(file)
    ]
    for file in slides.glob(f"{PATIENT}*"):
        file.unlink()


def one_image(folder: Path) -> DatasetFolder:
    """A dataset of one image whose boxes are sought."""
    with DatasetWriter(
        folder,
        name="detection",
        kind="image",
        task="detection",
        classes=("normal", "finding"),
        positive=None,
        modality="noise",
        clustered=False,
        source=SourceInfo(title="t", licence="CC0", citation="c"),
    ) as writer:
        pixels = gray(1)
        writer.add(
            Sample(
                sample_id="d0",
                pixels=pixels,
                labels={},
                boxes=[("finding", 1.0, 2.0, 9.0, 8.0)],
                patient="p0",
                sha256=digest_bytes(pixels.tobytes()),
                statistics=image_statistics(pixels),
            )
        )
    return DatasetFolder(folder)


@pytest.mark.slow
def test_verify_asks_a_server_of_each_kind_which_bundle_answers(
    server: TorchServe,
    archives: dict[str, Path],
    predictors: dict[str, Predictor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # of the table that is printed
    management = Management(server.management, key_file=server.key_file)
    folders = datasets(tmp_path) | {"detection": one_image(tmp_path / "boxes")}
    for kind, dataset in folders.items():
        if management.default_version(kind) is None:
            management.register(f"{kind}.mar")
        others = tmp_path / kind / "bundle"  # the same in other words: another bundle
        shutil.copytree(predictors[kind].bundle.path, others)
        (others / "bundle.json").write_text(json.dumps(json.loads((others / "bundle.json").read_text())))
        for bundle, state in ((predictors[kind].bundle.path, "ok"), (others, "broken")):
            verify(
                str(bundle),
                work=tmp_path,
                reports=tmp_path,
                dataset=dataset.path,
                archive=archives[kind],
                endpoint=server.inference,
                key_file=server.key_file,
            )
            (line,) = (line for line in capsys.readouterr().out.splitlines() if "│ endpoint " in line)
            assert re.search(rf"\b{state} +│ endpoint ", line), line
            assert ("from another bundle" in line) == (state == "broken")
    assert not list(server.model_store.glob("golden*")), "the slide that was asked about is gone"


def described(server: TorchServe, name: str) -> dict[str, Any]:
    """What TorchServe itself says of a model's one version in service."""
    key = json.loads(server.key_file.read_text())["management"]["key"]
    (version,) = urllib3.request(
        "GET", f"{server.management}/models/{name}", headers={"Authorization": f"Bearer {key}"}
    ).json()
    return dict(version)


def worker(server: TorchServe, name: str) -> tuple[int, float]:
    """The process number of the model's one worker, and its memory in MiB."""
    (found,) = described(server, name)["workers"]
    status = Path(f"/proc/{found['pid']}/status").read_text()
    (kib,) = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))
    return found["pid"], kib / 1024


def stained_slide() -> bytes:
    """A slide as scanners write it, in tiles of JPEG, with tissue; that of the corpus has none."""
    out = io.BytesIO()
    pixels = section(768, 1024, np.s_[64:704, 64:960])
    pixels += np.random.default_rng(0).integers(0, 12, pixels.shape, np.uint8)
    tifffile.imwrite(
        out,
        pixels,
        tile=(256, 256),
        photometric="rgb",
        compression="jpeg",
        resolution=(20_000, 20_000),
        resolutionunit="CENTIMETER",
    )
    return out.getvalue()


@pytest.mark.slow
def test_broken_files_through_every_endpoint_leave_its_worker_alive_and_its_memory_flat(
    server: TorchServe, slides: Path, tmp_path: Path
) -> None:
    """Whole files first. What gets an answer is a valid image: other readers find in it what the model saw."""
    register_demos(server)
    predictors = {
        f"demo-{kind}": Predictor(write_demo_bundle(tmp_path / kind, kind), "cpu")
        for kind in get_args(DemoKind)
    }
    rng = np.random.default_rng(0)
    seen: list[dict[str, tuple[int, float]]] = []
    answered: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    for turn in range(-1, 4):
        for number, (source, (_, whole)) in enumerate(sources().items()):
            whole = stained_slide() if source == "slide" else whole
            body = damaged(whole, rng, number + turn) if turn >= 0 else whole
            (slides / "broken.tiff").write_bytes(body)
            for name, predictor in predictors.items():
                reply = post(
                    server, f"/predictions/{name}", asked("broken.tiff") if name == "demo-slide" else body
                )
                assert reply.status in (200, 400), (name, reply.status, reply.data)
                if reply.status == 400:
                    assert reply.json()["error"], name
                    continue
                answered[turn < 0].append((name, source))
                require_seen(name, predictor, body, slides / "broken.tiff", reply.json(), server.request_log)
        seen.append({name: worker(server, name) for name in predictors})
    (slides / "broken.tiff").unlink()
    images = {source for source in sources() if source.startswith(("dicom", "png", "jpeg"))} - {
        "dicom-series"
    }
    assert {source for name, source in answered[True] if name == "demo-radiograph"} == images
    assert {source for name, source in answered[True] if name == "demo-detection"} == images
    assert {"nifti", "nifti-gz", "dicom-series"} <= {s for name, s in answered[True] if name == "demo-volume"}
    assert ("demo-slide", "slide") in answered[True]
    assert {name for name, _ in answered[False]} == set(predictors), "damage that leaves a valid image"
    for name in predictors:
        (first_pid, first_mib), (last_pid, last_mib) = seen[0][name], seen[-1][name]
        assert first_pid == last_pid, f"{name}: its worker died"
        assert last_mib < first_mib + 50, f"{name}: {first_mib:.0f} MiB, then {last_mib:.0f}"


def require_seen(
    name: str, predictor: Predictor, body: bytes, slide: Path, answer: dict[str, Any], log: Path
) -> None:
    """The answer is that to the pixels which readers other than cadx's find in the file.

    By the probabilities or boxes, and by the image statistics in the request log, which tell single pixels.
    """
    (kept,) = (line for line in lines(log) if line["prediction_id"] == answer["prediction_id"])
    if name == "demo-slide":
        with open_slide(slide) as opened:
            ours = opened.tile(0, 0, 512, opened.slide_mpp)
        theirs = slide_elsewhere(slide)[:512, :512]
        assert np.abs(ours.astype(int) - theirs).max() <= 2, "two decoders of JPEG round differently"
        return
    if name == "demo-volume":
        ours = read_volume(slide)
        voxels = volume_elsewhere(body)
        raw: Any = replace(ours, voxels=voxels.astype(ours.voxels.dtype))
        assert np.array_equal(raw.voxels, voxels)
    else:
        pixels = image_elsewhere(body)
        raw = replace(read_image(body), pixels=gray_if_equal(pixels))
    if name == "demo-detection":
        (found,) = predictor.detect([raw.pixels])
        assert [box["score"] for box in answer["boxes"]] == pytest.approx(found.scores.tolist(), abs=1e-4)
        statistics = image_statistics(raw.pixels)
    else:
        expected = predictor.predict(raw)
        assert answer["probabilities"] == pytest.approx(expected.probabilities, abs=1e-4)
        statistics = expected.statistics
    assert kept["statistics"] == pytest.approx(statistics, abs=1e-3)


def test_a_dataset_of_volumes_reads_as_the_file_that_a_deployment_sends(
    predictors: dict[str, Predictor], tmp_path: Path
) -> None:
    (tmp_path / "a.nii").write_bytes(encode_nifti(VOXELS, None, (1.37, 0.703125, 0.7)))
    raw = read_volume(tmp_path / "a.nii")
    assert np.array_equal(raw.voxels, VOXELS)
    assert raw.spacing_mm == pytest.approx((1.37, 0.703125, 0.7), rel=1e-6)
