"""The served model on a real TorchServe: its answers, its refusals, and what it never tells."""

import contextlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import jsonschema
import numpy as np
import pydicom
import pytest
import urllib3
import yaml
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, RLELossless
from test_bundle import draw, operating_point, train_bundle, write_dataset

from cadx.bundle import Bundle
from cadx.drift import STATISTICS
from cadx.files import digest_path
from cadx.predicting.predictor import Predictor
from cadx.reading.images import read_image
from cadx.request_log import compact, short
from components.calibrate import CalibrateParams, calibrate
from serving.answering import REQUEST_LOG, Request, RequestLog
from serving.archive import Release, Verdict, read_release, version_of, write_archive
from serving.client import MAX_REQUEST_BYTES, Answer, Client, Endpoint, Refused
from serving.kinds import RadiographAnswerer
from serving.management import Management
from serving.radiograph_handler import RadiographHandler
from serving.server import Ports, Tls, TorchServe, free_ports

MODEL = "squares"
BATCH_SIZE = 4
PATIENT = "Quagmire^Zebediah"
NAMES = (b"Quagmire", b"Zebediah", b"MRN-77123")
"""Of a patient, and found nowhere but in the files that are sent."""
ROOT = Path(__file__).resolve().parent.parent


# --- What is served, and the files that are sent ------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles")
    return train_bundle(folder / "trained", *write_dataset(folder), steps=8)


@pytest.fixture(scope="module")
def bundle(trained: Path) -> Bundle:
    final = trained.parent / "final"
    point = operating_point(opacity=0.3)
    Bundle(trained).complete(final, temperature=6.0, bias=(0.2, -0.2), operating_point=point)
    return Bundle(final)


@pytest.fixture(scope="module")
def predictor(bundle: Bundle) -> Predictor:
    return Predictor(bundle, device="cpu")


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServe]:
    served = TorchServe(tmp_path_factory.mktemp("Klinik Zürich") / "served", free_ports())
    write_archive(served.model_store / "squares.mar", bundle.path, release_of(bundle))
    with served:
        management = Management(served.management, key_file=served.key_file)
        management.register("squares.mar", batch_size=BATCH_SIZE, max_batch_delay_ms=10)
        yield served


@pytest.fixture(scope="module")
def client(server: TorchServe) -> Client:
    return Client(server.inference, MODEL, key_file=server.key_file)


@pytest.fixture
def unpacked(bundle: Bundle, tmp_path: Path) -> Path:
    write_archive(tmp_path / "squares.mar", bundle.path, release_of(bundle))
    with zipfile.ZipFile(tmp_path / "squares.mar") as archive:
        archive.extractall(tmp_path / "unpacked")
    return tmp_path / "unpacked"


def release_of(bundle: Bundle, **changes: Any) -> Release:
    manifest = bundle.manifest
    fields: dict[str, Any] = {
        "name": MODEL,
        "version": version_of(bundle.digest),
        "bundle": bundle.digest,
        "decision": Verdict(promote=True),
        "metrics": "sha256:" + "1" * 64,
        "classes": manifest.classes,
        "positive": manifest.positive,
        "task": manifest.task,
        "experiment": manifest.experiment,
        "seed": manifest.seed,
    }
    return Release(**(fields | changes))


def gray(seed: int, *, bits: int = 8) -> np.ndarray:
    pixels = draw(np.random.default_rng(seed), opacity=seed % 2 == 0, stripe=False)
    return pixels if bits == 8 else pixels.astype(np.uint16) * 257 - 3


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format=kind)
    return out.getvalue()


def dicom(pixels: np.ndarray, *, frames: int = 1, **changes: Any) -> bytes:
    """A file as a clinic sends it, with the patient's name."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = "1.2.3"
    data.PatientName, data.PatientID, data.PatientComments = PATIENT, "MRN-77123", f"ask {PATIENT}"
    data.InstitutionName, data.Manufacturer, data.ManufacturerModelName = "North", "Acme", "X1"
    data.Modality, data.PhotometricInterpretation = "CR", "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape[0] // frames, pixels.shape[1]
    data.NumberOfFrames = frames
    bits = 8 * pixels.dtype.itemsize
    data.SamplesPerPixel, data.BitsAllocated, data.BitsStored, data.HighBit = 1, bits, bits, bits - 1
    data.PixelRepresentation = 0
    data.PixelData = pixels.tobytes()
    data.file_meta.TransferSyntaxUID = changes.pop("syntax", ExplicitVRLittleEndian)
    data.update(changes)
    out = io.BytesIO()
    pydicom.dcmwrite(out, data, enforce_file_format=True)
    return out.getvalue()


def rle(stream: bytes, **changes: Any) -> bytes:
    """A DICOM file with one segment of RLE."""
    head = np.array([1, 64] + [0] * 14, "<u4").tobytes()
    return dicom(gray(0), syntax=RLELossless, PixelData=encapsulate([head + stream]), **changes)


def png_that_claims(side_px: int) -> bytes:
    data = bytearray(encoded(gray(0), "PNG"))
    data[16:24] = 2 * side_px.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


SENT = {
    "DICOM": dicom(gray(0)),
    "DICOM of 16 bits": dicom(gray(1, bits=16)),
    "PNG": encoded(gray(2), "PNG"),
    "PNG of 16 bits": encoded(gray(3, bits=16), "PNG"),
    "JPEG": encoded(gray(4), "JPEG"),
    "colour": encoded(np.stack([gray(5), gray(6), gray(7)], axis=-1), "PNG"),
    "another size": encoded(np.tile(gray(8), (3, 2)), "PNG"),
}
REFUSED = {
    "empty": (b"", "an empty file"),
    "text": (f"PatientName: {PATIENT}".encode(), "neither DICOM, PNG nor JPEG"),
    "pickle": (pickle.dumps({"name": PATIENT}), "neither DICOM, PNG nor JPEG"),
    "truncated DICOM": (dicom(gray(0))[:700], "DICOM: "),
    "DICOM without its last pixels": (dicom(gray(0))[:-200], "DICOM: "),
    "truncated PNG": (encoded(gray(0), "PNG")[:300], "PNG: damaged or truncated"),
    "a JPEG that stops short": (encoded(gray(4), "JPEG")[:-40] + b"\xff\xd9", "JPEG: damaged, truncated"),
    "two PNGs": (encoded(gray(0), "PNG") + encoded(gray(1), "PNG"), "several images"),
    "two JPEGs": (encoded(gray(0), "JPEG") + bytes(2) + encoded(gray(1), "JPEG"), "several images"),
    "two DICOM files": (dicom(gray(0)) + dicom(gray(1)), "several images"),
    "two frames": (dicom(np.zeros((16, 8), np.uint8), frames=2), "DICOM: several frames"),
    "PNG bomb": (png_that_claims(60_000), "PNG: claims more than"),
    "DICOM bomb by its header": (rle(b"\x81\0" * 10, Rows=60_000, Columns=60_000), "DICOM: claims 60000 x"),
    "DICOM bomb by its runs": (rle(b"\x81\0" * (1 << 20)), "DICOM: damaged or truncated: its RLE"),
    "deflated DICOM bomb": (
        dicom(np.zeros((8000, 8000), np.uint8), syntax=DeflatedExplicitVRLittleEndian),
        "DICOM: the deflated",
    ),
}


def lines(folder: Path) -> list[dict[str, Any]]:
    """Every record of a request log; fails on a line that is not whole."""
    texts = [file.read_text(encoding="utf-8") for file in sorted(folder.glob("*.jsonl"))]
    assert all(text.endswith("\n") for text in texts)
    return [json.loads(line) for text in texts for line in text.splitlines()]


def require_valid(content: dict[str, Any]) -> None:
    """The answer is of the published form, and has no field that is not published."""
    schema = json.loads((ROOT / "docs" / "answer.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(content, schema)
    for form in schema["$defs"].values():
        form["additionalProperties"] = False
    jsonschema.validate(content, schema)


def post(server: TorchServe, path: str, body: bytes, **headers: str) -> urllib3.BaseHTTPResponse:
    """As any program may ask, without our client."""
    key = json.loads(server.key_file.read_text())["inference"]["key"]
    given = {"Authorization": f"Bearer {key}", "Content-Type": "application/octet-stream"}
    given |= {name.replace("_", "-"): value for name, value in headers.items()}
    address = server.inference + path
    return urllib3.request("POST", address, body=body, headers=given, retries=False, timeout=60)


# --- Archives -----------------------------------------------------------------------------------------


def test_the_same_bundle_gives_the_same_archive_anywhere_at_any_time(bundle: Bundle, tmp_path: Path) -> None:
    elsewhere = shutil.copytree(bundle.path, tmp_path / "deep" / "elsewhere")
    for file in elsewhere.rglob("*"):
        os.utime(file, (0, 0))
        file.chmod(0o700)
    write_archive(tmp_path / "a.mar", bundle.path, release_of(bundle))
    time.sleep(2.1)  # a zip archive counts in steps of two seconds
    write_archive(tmp_path / "b.mar", elsewhere, release_of(bundle))
    assert digest_path(tmp_path / "a.mar") == digest_path(tmp_path / "b.mar")
    write_archive(tmp_path / "c.mar", bundle.path, release_of(bundle, name="other"))
    assert digest_path(tmp_path / "a.mar") != digest_path(tmp_path / "c.mar")


def test_an_archive_holds_its_release_and_the_whole_bundle(
    bundle: Bundle, unpacked: Path, tmp_path: Path
) -> None:
    release = release_of(bundle, decision=Verdict(promote=False, reasons=("auc is 0.4, not 0.8",)))
    write_archive(tmp_path / "refused.mar", bundle.path, release)
    assert read_release(tmp_path / "refused.mar") == release
    assert Bundle(unpacked / "bundle").digest == bundle.digest
    assert release.version == bundle.digest[7:19]


def test_what_is_no_archive_is_refused_in_one_line(bundle: Bundle, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.txt", "")
    with zipfile.ZipFile(tmp_path / "old.mar", "w") as archive:
        fields = release_of(bundle).model_dump(mode="json") | {"version": "1.0"}
        archive.writestr("release.json", json.dumps(fields))
    (tmp_path / "text.mar").write_text("no")
    for name, reason in {
        "nowhere.mar": "no such archive",
        "text.mar": "no archive",
        "other.zip": "no archive",
        "old.mar": "version 1.0 is not that of the bundle",
    }.items():
        with pytest.raises(ValueError, match=reason) as caught:
            read_release(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_only_a_complete_bundle_under_its_own_name_is_packed(
    trained: Path, bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="run `cadx calibrate` first"):
        write_archive(tmp_path / "a.mar", trained, release_of(Bundle(trained)))
    with pytest.raises(ValueError, match="the release is of sha256:"):
        write_archive(tmp_path / "a.mar", bundle.path, release_of(Bundle(trained)))
    assert not (tmp_path / "a.mar").exists()


# --- Answers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SENT)
def test_the_endpoint_answers_as_the_predictor_does(
    client: Client, predictor: Predictor, bundle: Bundle, kind: str
) -> None:
    answer, expected = client.predict(SENT[kind]), predictor.predict(read_image(SENT[kind]))
    assert answer.probabilities == pytest.approx(expected.probabilities, abs=1e-6)
    assert answer.decision == expected.decision
    assert answer.warnings == expected.warnings
    assert answer.model.bundle == bundle.digest
    assert (answer.model.name, answer.model.version) == (MODEL, version_of(bundle.digest))
    assert answer.operating_point.thresholds == {"opacity": 0.3}
    assert answer.operating_point.target_metric == "sensitivity"
    assert answer.attention_png is None
    timing_ms = answer.timing_ms
    assert min(timing_ms.decode, timing_ms.preprocess, timing_ms.infer) > 0
    assert timing_ms.total >= timing_ms.decode + timing_ms.preprocess + timing_ms.infer - 0.2


def test_batches_change_no_answer_and_a_bad_image_spoils_no_other(
    client: Client, predictor: Predictor
) -> None:
    images = [encoded(gray(seed), "PNG") for seed in range(24)]
    images[5] = images[11] = b"no image"
    results = client.predict_many(images, concurrency=8)
    for image, result in zip(images, results, strict=True):
        if image == b"no image":
            assert isinstance(result, Refused)
            assert result.status == 400
        else:
            assert result.probabilities == pytest.approx(
                predictor.predict(read_image(image)).probabilities, abs=1e-6
            )


def test_a_version_may_be_named(client: Client, bundle: Bundle) -> None:
    named = client.predict(SENT["PNG"], version=version_of(bundle.digest))
    assert named.probabilities == client.predict(SENT["PNG"]).probabilities
    with pytest.raises(Refused, match="version: 9 does not exist") as caught:
        client.predict(SENT["PNG"], version="9")
    assert caught.value.status == 404


def test_a_sample_that_the_sets_leave_open_is_referred_and_a_clear_one_is_not(
    server: TorchServe, trained: Path, tmp_path: Path
) -> None:
    """Over a bundle that `calibrate` completed; what must be referred is told from its quantiles alone."""
    calibrate(
        dataset=trained.parent / "dataset",
        splits=trained.parent / "splits.parquet",
        trained=trained,
        bundle=tmp_path / "abstaining",
        params=CalibrateParams(coverage=0.9),
    )
    bundle = Bundle(tmp_path / "abstaining")
    sets = bundle.manifest.conformal
    assert sets is not None
    in_process = Predictor(bundle, device="cpu")
    expected: dict[bool, tuple[bytes, list[str]]] = {}
    for seed in range(60):
        image = encoded(gray(seed), "PNG")
        said = in_process.predict(read_image(image))
        held = [name for name, p in said.probabilities.items() if 1 - p <= sets.quantiles[name]]
        expected.setdefault(held != [said.decision], (image, held))
    assert set(expected) == {True, False}, "all or none referred: the test shows nothing"

    write_archive(server.model_store / "abstaining.mar", bundle.path, release_of(bundle, name="abstaining"))
    management = Management(server.management, key_file=server.key_file)
    management.register("abstaining.mar")
    client = Client(server.inference, "abstaining", key_file=server.key_file)
    for must_refer, (image, held) in expected.items():
        reply = post(server, "/predictions/abstaining", image).json()
        require_valid(reply)
        assert (reply["refer"], reply["prediction_set"]) == (must_refer, held)
        answer = client.predict(image)
        assert (answer.refer, list(answer.prediction_set or ())) == (must_refer, held)
        logged = {line["prediction_id"]: line for line in lines(server.request_log)}[answer.prediction_id]
        assert (logged["refer"], logged["prediction_set"]) == (must_refer, held)
    management.unregister("abstaining", version_of(bundle.digest))


def test_without_conformal_sets_nobody_is_referred(client: Client) -> None:
    for kind in ("DICOM", "PNG"):
        answer = client.predict(SENT[kind])
        assert (answer.refer, answer.prediction_set) == (False, None)


def test_attention_lies_over_the_image_that_was_sent(client: Client, predictor: Predictor) -> None:
    for kind in ("DICOM of 16 bits", "another size"):
        picture = Image.open(io.BytesIO(client.predict(SENT[kind], attention=True).attention_png))
        expected = predictor.predict(read_image(SENT[kind]), attention=True).attention
        assert picture.mode == "L"
        np.testing.assert_array_equal(np.asarray(picture), np.rint(expected * 255).astype(np.uint8))


def test_attention_is_asked_for_by_header_since_torchserve_drops_the_query(server: TorchServe) -> None:
    def has_attention(path: str, **headers: str) -> bool:
        return "attention_png" in post(server, path, SENT["PNG"], **headers).json()

    assert has_attention(f"/predictions/{MODEL}", attention="True")
    assert not has_attention(f"/predictions/{MODEL}", Attention="false")
    assert not has_attention(f"/predictions/{MODEL}?attention=true"), "queries are handed on: publish them"
    assert has_attention(f"/{MODEL}/predict?attention=true")
    refused = post(server, f"/predictions/{MODEL}", SENT["PNG"], Attention="maybe")
    assert (refused.status, "neither true nor false" in refused.json()["error"]) == (400, True)


# --- Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_image_is_refused_with_a_reason_and_the_worker_lives(
    server: TorchServe, client: Client, kind: str
) -> None:
    before = workers(server)
    body, reason = REFUSED[kind]
    with pytest.raises(Refused) as caught:
        client.predict(body)
    assert caught.value.status == 400
    assert caught.value.reason.startswith(reason)
    assert "\n" not in str(caught.value)
    assert client.predict(SENT["PNG"]).decision in ("normal", "opacity")
    assert workers(server) == before


def test_a_body_that_did_not_come_as_one_is_refused(server: TorchServe) -> None:
    parts = [("data", ("image.png", SENT["PNG"])), ("body", ("other.png", SENT["PNG"]))]
    forms = [urllib3.encode_multipart_formdata(some) for some in (parts[:1], parts[1:], parts, parts[1:] * 2)]
    for body, content_type in (*forms, (b"a=b", "application/x-www-form-urlencoded")):
        answer = post(server, f"/predictions/{MODEL}", body, Content_Type=content_type)
        assert answer.status == 400
        assert "application/octet-stream" in answer.json()["error"]


def test_a_huge_body_is_refused_before_it_is_sent(server: TorchServe, client: Client) -> None:
    with pytest.raises(Refused, match="more than 256 MiB") as caught:
        client.predict(bytes(MAX_REQUEST_BYTES + 1))
    assert caught.value.status == 413
    key = json.loads(server.key_file.read_text())["inference"]["key"]
    with socket.create_connection(("127.0.0.1", server.ports.inference), timeout=60) as other:
        head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {key}\r\n"
        other.sendall(f"{head}Content-Length: {MAX_REQUEST_BYTES + 1}\r\n\r\n".encode())
        assert other.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert client.predict(SENT["PNG"])


def test_300_connections_that_never_finish_delay_nobody(server: TorchServe, client: Client) -> None:
    key = json.loads(server.key_file.read_text())["inference"]["key"]
    head = f"POST /predictions/{MODEL} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer {key}\r\n".encode()
    client.predict(SENT["PNG"])
    before = workers(server)
    with contextlib.ExitStack() as stack:
        for number in range(300):
            other = stack.enter_context(socket.create_connection(("127.0.0.1", server.ports.inference)))
            other.sendall(head + (b"Content-Length: 9999\r\n\r\nx" if number % 2 else b"X-Half: "))
        started = time.monotonic()
        for _ in range(5):
            assert client.predict(SENT["PNG"])
        assert time.monotonic() - started < 10
    assert workers(server) == before


def test_nobody_is_answered_without_the_right_token(server: TorchServe, client: Client) -> None:
    keys = json.loads(server.key_file.read_text())
    for token in (None, "wrong", keys["management"]["key"]):
        with pytest.raises(Refused, match="Token") as caught:
            Client(server.inference, MODEL, token=token).predict(SENT["PNG"])
        assert caught.value.status == 400
    with pytest.raises(Refused, match="Token"):
        Management(server.management, token=keys["inference"]["key"]).versions(MODEL)
    assert server.key_file.stat().st_mode & 0o077 == 0, "others may read the tokens"


def test_new_tokens_reach_whoever_reads_the_key_file(server: TorchServe, client: Client) -> None:
    old = json.loads(server.key_file.read_text())["inference"]["key"]
    assert client.predict(SENT["PNG"])
    server.renew_tokens()
    assert client.predict(SENT["PNG"])
    with pytest.raises(Refused, match="Token"):
        Client(server.inference, MODEL, token=old).predict(SENT["PNG"])


def test_a_key_file_that_is_being_written_is_read_again(server: TorchServe, tmp_path: Path) -> None:
    key_file, whole = tmp_path / "key_file.json", server.key_file.read_text()
    for half in ("", whole[: len(whole) // 2]):
        key_file.write_text(half)
        rest = threading.Timer(0.05, key_file.write_text, [whole])
        rest.start()
        assert Client(server.inference, MODEL, key_file=key_file).predict(SENT["PNG"])
        rest.join()


# --- What is kept, and what is not --------------------------------------------------------------------


def test_each_answer_is_one_whole_line_of_the_request_log(
    server: TorchServe, client: Client, predictor: Predictor, bundle: Bundle
) -> None:
    before = {line["prediction_id"] for line in lines(server.request_log)}
    answers = [client.predict(SENT[kind], attention=True) for kind in ("DICOM", "PNG")]
    with pytest.raises(Refused):
        client.predict(b"no image")
    # Each worker has a file of its own there.
    first, second = (line for line in lines(server.request_log) if line["prediction_id"] not in before)
    assert [first["prediction_id"], second["prediction_id"]] == [a.prediction_id for a in answers]
    assert set(first) == {
        *("schema_version", "prediction_id", "time", "model", "version", "bundle", "site", "scanner"),
        *("statistics", "embedding", "probabilities", "decision", "warnings", "timing_ms"),
        *("prediction_set", "refer"),
    }
    assert (first["site"], first["scanner"]) == ("North", "Acme X1")
    assert (second["site"], second["scanner"]) == ("", "")
    expected = predictor.predict(read_image(SENT["DICOM"]))
    assert first["statistics"] == {name: expected.statistics[name] for name in STATISTICS}
    assert first["embedding"] == pytest.approx(expected.embedding.tolist(), abs=2e-5)
    assert first["probabilities"] == answers[0].probabilities
    assert (first["schema_version"], first["bundle"]) == (1, bundle.digest)
    assert datetime.fromisoformat(first["time"]).utcoffset().total_seconds() == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])


def test_a_patients_name_is_in_no_answer_and_in_no_file(server: TorchServe, client: Client) -> None:
    path = f"/predictions/{MODEL}"
    told = [client.predict(SENT["DICOM"], attention=True).model_dump_json().encode()]
    told += [post(server, path, body).data for body, _ in REFUSED.values()]
    told += [
        post(server, path, SENT["DICOM"], Content_Type="text/plain").data,
        post(server, path, REFUSED["text"][0], Content_Type="application/json").data,
        post(server, f"{path}?patient={PATIENT.replace('^', '-')}", SENT["DICOM"]).data,
    ]
    assert not [name for name in NAMES for answer in told if name in answer]
    # A name where a model or its version belongs: TorchServe repeats it to the sender, and to nobody else.
    for wrong in (
        f"/predictions/{PATIENT}",
        f"{path}/{PATIENT}",
        f"/{PATIENT}/predict",
        f"/predictions//{PATIENT}",
    ):
        assert post(server, wrong.replace("^", "-"), SENT["PNG"]).status == 404
    no_token = {"Authorization": "Bearer x"}
    assert (
        urllib3.request("POST", f"{server.inference}/predictions/MRN-77123", headers=no_token).status == 400
    )
    # As curl sends it without a Content-Type. What TorchServe replies to the sender is not in our hands.
    form = f"name={PATIENT}%zz&".encode() + SENT["DICOM"]
    assert post(server, path, form, Content_Type="application/x-www-form-urlencoded").status == 500
    files = [file for file in server.folder.rglob("*") if file.is_file()]
    assert {"access_log.log", "model_log.log", "ts_log.log", "console.log"} <= {file.name for file in files}
    assert b"ErrorDataDecoderException" in (server.logs / "ts_log.log").read_bytes()
    logged = (server.logs / "access_log.log").read_text()
    assert f'"POST {path} HTTP/1.1" 200' in logged
    assert '"POST /predictions/... HTTP/1.1" 404' in logged
    assert not [(file.name, name) for file in files for name in NAMES if name in file.read_bytes()]


# --- The handler and its parts, in process ------------------------------------------------------------


class Context:
    """What the handler needs of TorchServe, and what it says to it."""

    def __init__(self, folder: Path, headers: list[dict[str, Any]]) -> None:
        self.system_properties = {"model_dir": str(folder), "gpu_id": None, "batch_size": len(headers)}
        self.headers = headers
        self.statuses: dict[int, int] = {}
        self.content_types: dict[int, str] = {}

    def get_all_request_header(self, idx: int) -> dict[str, Any]:
        return self.headers[idx]

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        self.statuses[idx] = code

    def set_response_content_type(self, idx: int, value: str) -> None:
        self.content_types[idx] = value


def test_a_mixed_batch_gets_each_request_its_own_reply(
    unpacked: Path, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(REQUEST_LOG, str(tmp_path / "log"))
    data = [
        {"body": bytearray(SENT["DICOM"])},
        {"body": bytearray(REFUSED["truncated DICOM"][0])},
        {"body": SENT["PNG of 16 bits"]},
        {"body": bytearray()},
        {"data": bytearray(SENT["PNG"])},
        {"body": bytearray(SENT["JPEG"])},
    ]
    context = Context(unpacked, [{"body": {"content-type": ""}} for _ in data])
    context.headers[2] = {"ATTENTION": "TRUE"}
    handler = RadiographHandler()
    handler.initialize(context)
    replies = [json.loads(text) for text in handler.handle(data, context)]
    assert context.statuses == {0: 200, 1: 400, 2: 200, 3: 400, 4: 400, 5: 200}
    assert set(context.content_types.values()) == {"application/json"}
    for i, kind in ((0, "DICOM"), (2, "PNG of 16 bits"), (5, "JPEG")):
        require_valid(replies[i])
        expected = predictor.predict(read_image(SENT[kind]))
        assert replies[i]["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
    assert [i for i, reply in enumerate(replies) if "attention_png" in reply] == [2]
    assert [list(replies[i]) for i in (1, 3, 4)] == [["error"]] * 3
    logged = [record["prediction_id"] for record in lines(tmp_path / "log")]
    assert sorted(logged) == sorted(reply["prediction_id"] for reply in replies if "prediction_id" in reply)


def test_an_image_that_only_the_model_refuses_spoils_no_other(
    trained: Path, bundle: Bundle, tmp_path: Path
) -> None:
    strict = tmp_path / "strict"
    Bundle(trained).complete(strict, temperature=1.0, operating_point=operating_point(opacity=0.3))
    text = (strict / "bundle.json").read_text()
    (strict / "bundle.json").write_text(text.replace('"requires_spacing": false', '"requires_spacing": true'))
    write_archive(tmp_path / "strict.mar", strict, release_of(Bundle(strict)))
    with zipfile.ZipFile(tmp_path / "strict.mar") as archive:
        archive.extractall(tmp_path / "unpacked")
    with_spacing = pydicom.dcmread(io.BytesIO(SENT["DICOM"]))
    with_spacing.PixelSpacing = [0.2, 0.2]
    out = io.BytesIO()
    with_spacing.save_as(out)
    requests = [Request(out.getvalue()), Request(SENT["PNG"]), Request(out.getvalue())]
    replies = RadiographAnswerer(tmp_path / "unpacked").answer(requests)
    assert [reply.status for reply in replies] == [200, 400, 200]
    assert "no pixel spacing" in replies[1].content["error"]


def test_an_answer_says_the_probabilities_at_the_prevalence_of_its_release_too(
    trained: Path, tmp_path: Path
) -> None:
    common = {"temperature": 1.0, "operating_point": operating_point(opacity=0.3)}
    Bundle(trained).complete(tmp_path / "known", **common, prevalence={"normal": 0.7, "opacity": 0.3})
    bundle, rare = Bundle(tmp_path / "known"), {"opacity": 0.02}
    replies = []
    for name, release in (("plain", release_of(bundle)), ("rare", release_of(bundle, prevalence=rare))):
        write_archive(tmp_path / f"{name}.mar", bundle.path, release)
        with zipfile.ZipFile(tmp_path / f"{name}.mar") as archive:
            archive.extractall(tmp_path / name)
        log = RequestLog(tmp_path / f"log of {name}")
        answerer = RadiographAnswerer(tmp_path / name, log=log)
        replies.append(
            [reply.content for reply in answerer.answer([Request(SENT["DICOM"]), Request(SENT["PNG"])])]
        )
        (record, _) = lines(tmp_path / f"log of {name}")
        assert record["probabilities"] == replies[-1][0]["probabilities"], (
            "the watch compares what was evaluated"
        )
    there = Predictor(bundle, "cpu", prevalence=rare)
    for plain, told, image in zip(*replies, ("DICOM", "PNG"), strict=True):
        assert "at_prevalence" not in plain
        require_valid(told)
        assert told["probabilities"] == plain["probabilities"]
        expected = there.predict(read_image(SENT[image]))
        assert told["at_prevalence"]["probabilities"] == pytest.approx(expected.probabilities, abs=1e-6)
        assert told["at_prevalence"]["prevalence"] == pytest.approx({"normal": 0.98, "opacity": 0.02})
        assert told["decision"] == plain["decision"] == expected.decision
        assert Answer.model_validate_json(json.dumps(told)).at_prevalence is not None


def test_a_fault_of_our_own_is_told_by_kind_and_place_alone(
    unpacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answerer = RadiographAnswerer(unpacked)
    answerer._predictor._networks.clear()
    (reply,) = answerer.answer([Request(SENT["DICOM"])])
    assert reply.status == 500
    assert "RuntimeError" in reply.content["error"]
    told = capsys.readouterr().err
    assert "predictor.py" in told
    assert "stack expects" not in told, "the text of a library's error may quote the file"


def test_an_archive_whose_bundle_is_another_one_is_not_served(unpacked: Path, trained: Path) -> None:
    shutil.rmtree(unpacked / "bundle")
    other = operating_point(opacity=0.9)
    Bundle(trained).complete(unpacked / "bundle", temperature=2.0, operating_point=other)
    with pytest.raises(ValueError, match=r"release\.json names sha256:"):
        RadiographAnswerer(unpacked)
    shutil.rmtree(unpacked / "bundle")
    shutil.copytree(trained, unpacked / "bundle")
    with pytest.raises(ValueError, match="run `cadx calibrate` first"):
        RadiographAnswerer(unpacked)


def test_an_answer_outlives_a_log_that_cannot_be_written_and_says_so(
    unpacked: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = RequestLog(tmp_path / "log")
    answerer = RadiographAnswerer(unpacked, log=log)
    shutil.rmtree(tmp_path / "log")
    (reply,) = answerer.answer([Request(SENT["PNG"])])
    assert reply.status == 200
    assert "not in the request log (No such file or directory)" in reply.content["warnings"][-1]
    assert "not in the request log" in capsys.readouterr().err


def test_what_a_deployment_asks_is_logged_but_not_watched(
    unpacked: Path, bundle: Bundle, tmp_path: Path
) -> None:
    answerer = RadiographAnswerer(unpacked, log=RequestLog(tmp_path / "log"))
    asked = [Request(SENT["PNG"], golden=golden) for golden in ("true", "false", "true")]
    assert [reply.status for reply in answerer.answer(asked)] == [200, 200, 200]
    assert len(lines(tmp_path / "log" / "unwatched")) == 2
    assert compact(tmp_path / "log", tmp_path / "tables").requests == {short(bundle.digest): 1}


def test_a_full_disk_leaves_no_half_line(tmp_path: Path) -> None:
    log = RequestLog(tmp_path / "log")
    log.append({"number": 0})
    size = log.path.stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
    try:
        with pytest.raises(OSError, match="no space for a whole line"):
            log.append({"number": 1})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    log.append({"number": 2})
    assert [record["number"] for record in lines(tmp_path / "log")] == [0, 2]


# --- The client ---------------------------------------------------------------------------------------


def test_the_client_waits_for_a_worker_that_died(server: TorchServe, client: Client) -> None:
    (before,) = workers(server)
    os.kill(before, signal.SIGKILL)
    assert client.predict(SENT["PNG"]).decision in ("normal", "opacity")
    assert workers(server) != [before]


@pytest.mark.slow
def test_an_image_that_torchserve_forgot_with_its_worker_is_asked_about_again(
    server: TorchServe, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker died while the server was collecting a batch: to what it has collected, it never says a word."""
    reply = client.predict(SENT["PNG"]).model_dump_json()
    write_handler(server.model_store / "collects.mar", "collects", f"return [{reply!r}] * len(data)")
    management = Management(server.management, key_file=server.key_file)
    management.register("collects.mar", batch_size=4, max_batch_delay_ms=3000)
    monkeypatch.setattr("serving.client._LONGER_S", 0.0)
    patience_s = 10
    waiting = Client(server.inference, "collects", key_file=server.key_file, response_timeout_s=patience_s)
    started = time.monotonic()
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(waiting.predict, SENT["PNG"])
        time.sleep(1)  # it is alone, and the server waits for three more
        (worker,) = workers(server, "collects")
        os.kill(worker, signal.SIGKILL)
        assert answer.result().decision in ("normal", "opacity")
    assert time.monotonic() - started > patience_s, (
        "TorchServe forgets nothing any more: say so in docs/endpoints.md"
    )
    management.unregister("collects", "1.0")


@pytest.fixture
def proxy() -> Iterator[tuple[str, list[int], list[str]]]:
    """Its address; the statuses it answers with, in turn, 0 being to hang up, then 200; what it was asked.

    It asks to be left alone for an hour, which nobody who waits for an answer can do.
    """
    statuses: list[int] = []
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.rfile.read(int(self.headers["Content-Length"]))
            if status := statuses.pop(0) if statuses else 200:
                self.send_response(status)
                self.send_header("Retry-After", "3600")
                self.end_headers()
                self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{listener.server_address[1]}", statuses, asked
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_the_client_asks_again_where_that_helps_and_nowhere_else(
    proxy: tuple[str, list[int], list[str]],
) -> None:
    address, statuses, asked = proxy

    def times_asked(kind: Literal["inference", "management"], status: int) -> int:
        statuses[:], asked[:] = [status], []
        endpoint = Endpoint(address, kind, token="any")
        with contextlib.suppress(Refused, ConnectionError):
            assert endpoint.request("POST", "/predictions/squares", body=b"image") == b"{}"
        return len(asked)

    hung_up = 0
    again = (hung_up, 429, 502, 503, 507)
    assert {status: times_asked("inference", status) for status in again} == dict.fromkeys(again, 2)
    refused = (400, 401, 403, 404, 409, 413, 500, 504)
    assert {status: times_asked("inference", status) for status in refused} == dict.fromkeys(refused, 1)
    # A registration that was taken must not be sent twice.
    never = (*again, *refused)
    assert {status: times_asked("management", status) for status in never} == dict.fromkeys(never, 1)
    statuses[:] = [503] * 9
    with pytest.raises(Refused) as caught:
        Endpoint(address, "management", token="any").request("POST", "/models", body=b"")
    assert caught.value.status == 503


def test_a_mounted_secrets_token_is_sent_without_its_line_break(
    proxy: tuple[str, list[int], list[str]],
) -> None:
    address, _, asked = proxy
    for token in ("any\n", lambda: " any\r\n"):
        Endpoint(address, "inference", token=token).request("POST", "/predictions/squares", body=b"image")
    assert asked == ["/predictions/squares"] * 2
    for token in ("secret\nline", "secrét", "two secrets", "secret\0"):
        for given in (token, lambda token=token: token):
            with pytest.raises(ValueError, match=r"^token: ") as caught:
                Endpoint(address, "inference", token=given).request("GET", "/ping")
            assert "secr" not in str(caught.value)
    assert len(asked) == 2


def test_no_server_is_one_line(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_ports().inference}"
    with pytest.raises(ConnectionError, match="is the server running") as caught:
        Client(nowhere, MODEL, token="any").predict(SENT["PNG"])
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="the server has it while it runs"):
        Client(nowhere, MODEL, key_file=tmp_path / "key_file.json").predict(SENT["PNG"])
    (tmp_path / "key_file.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no inference token"):
        Client(nowhere, MODEL, key_file=tmp_path / "key_file.json").predict(SENT["PNG"])


def test_the_client_needs_no_torch() -> None:
    code = "import sys, serving.client; print({'torch', 'numpy', 'pandas', 'pydicom'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


@pytest.mark.parametrize("name", ["docs/endpoints.md", "serving/README.md"])
def test_the_pages_examples_work(server: TorchServe, tmp_path: Path, name: str) -> None:
    page = (ROOT / name).read_text(encoding="utf-8")
    for published, here in {
        "http://127.0.0.1:8080": server.inference,
        "demo-radiograph": MODEL,
        "data/serving/key_file.json": str(server.key_file),
    }.items():
        assert published in page
        page = page.replace(published, here)
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "overview.jpg", tmp_path / "docs")
    (python,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    said = subprocess.run(
        [sys.executable, "-c", python],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.startswith(("normal {", "opacity {"))
    assert ("neither DICOM, PNG nor JPEG" in said.stdout) == ("predict_many" in python)
    assert Image.open(tmp_path / "attention.png").size == Image.open(tmp_path / "docs" / "overview.jpg").size
    if shutil.which("curl") is None:
        pytest.skip("no curl: the page's first example was not run")
    *_, bash = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    said = subprocess.run(["bash", "-ec", bash], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["model"]["name"] == MODEL


@pytest.mark.slow
def test_the_pages_way_to_a_first_answer_works(tmp_path: Path) -> None:
    """From the line that starts the server to curl's answer; `make setup` before it is what these tests run in."""
    if shutil.which("curl") is None:
        pytest.skip("no curl: the page's first example was not run")
    page = (ROOT / "docs" / "endpoints.md").read_text(encoding="utf-8")
    first, second = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    port = five_free_ports()
    setup, activate, serve_line = first.splitlines()
    assert (setup, activate) == ("make setup", "source .venv/bin/activate")
    assert serve_line.endswith("cadx serve --demo")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "overview.jpg", tmp_path / "docs")
    environment = os.environ | {
        "HOME": str(tmp_path),  # a newcomer's, without slides
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }
    with subprocess.Popen(
        ["bash", "-ec", f"exec env {serve_line} --port {port}"],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            read_until(process, "demo-radiograph answers\n")
            said = subprocess.run(
                ["bash", "-ec", second.replace("127.0.0.1:8080", f"127.0.0.1:{port}")],
                cwd=tmp_path,
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            answer = Answer.model_validate_json(said.stdout)
            assert answer.model.name == "demo-radiograph"
            assert "random weights" in answer.warnings[0]
            shown = read_until(process, "Ctrl-C stops it.\n")
            assert {f"demo-{kind} answers\n" for kind in ("volume", "slide", "detection")} <= set(shown)
        finally:
            process.terminate()  # what Ctrl-C sends is ignored by whatever runs in the background
        process.communicate(timeout=180)
    assert process.returncode == 0
    assert not is_listening(port)


def read_until(process: subprocess.Popen[str], last: str) -> list[str]:
    """What a process says before a line; fails if it ends without."""
    shown = []
    for line in process.stdout or ():
        if line == last:
            return shown
        shown.append(line)
    raise AssertionError(f"it ended without {last!r}: {''.join(shown)}")


def five_free_ports() -> int:
    """The first of five ports in a row that nothing listens on."""
    first = random.randrange(20_000, 29_000, 5)  # other tests look for some at the same time
    for port in range(first, 30_000, 5):
        if not any(map(is_listening, Ports.starting_at(port))):
            return port
    raise AssertionError("no five free ports")


# --- Faults -------------------------------------------------------------------------------------------


def write_handler(path: Path, name: str, body: str, config: str = "") -> None:
    """An archive of a handler of the test's own."""
    with zipfile.ZipFile(path, "w") as archive:
        model = {"modelName": name, "modelVersion": "1.0", "handler": "h.py"}
        if config:
            model["configFile"] = "config.yaml"
            archive.writestr("config.yaml", config)
        archive.writestr("MAR-INF/MANIFEST.json", json.dumps({"runtime": "python", "model": model}))
        head = ("import time", "class H:", "    def initialize(self, context): pass")
        archive.writestr("h.py", "\n".join((*head, f"    def handle(self, data, context): {body}\n")))


@pytest.mark.slow
def test_a_full_queue_is_waited_for_and_a_slow_handler_is_a_clear_error(
    server: TorchServe, client: Client, tmp_path: Path
) -> None:
    management = Management(server.management, key_file=server.key_file)
    full = tmp_path / "full"  # until somebody was told to wait, nobody is answered
    is_full = f"__import__('os').path.exists({str(full)!r})"
    busy = f"[time.sleep(0.05) for _ in range(600) if not {is_full}]; time.sleep(0.3); return ['{{}}'] * len(data)"
    write_handler(server.model_store / "busy.mar", "busy", busy, "jobQueueSize: 2\n")
    write_handler(server.model_store / "slow.mar", "slow", "time.sleep(60)")
    management.register("busy.mar")
    management.register("slow.mar", response_timeout_s=1)

    def ask(_: int) -> int:
        status = post(server, "/predictions/busy", b"x").status
        if status == 503:
            full.touch()
        return status

    with ThreadPoolExecutor(8) as pool:
        raw = list(pool.map(ask, range(8)))
        assert 503 in raw
        assert set(raw) <= {200, 503}
        endpoint = Endpoint(server.inference, "inference", key_file=server.key_file)
        answered = list(
            pool.map(lambda _: endpoint.request("POST", "/predictions/busy", body=b"x"), range(8))
        )
        assert answered == [b"{}"] * 8
    with pytest.raises(Refused) as caught:
        Client(server.inference, "slow", key_file=server.key_file).predict(SENT["PNG"])
    assert caught.value.status >= 500
    assert "\n" not in str(caught.value)
    assert client.predict(SENT["PNG"]).decision in ("normal", "opacity"), "others are not kept waiting"
    for name in ("busy", "slow"):
        management.unregister(name, "1.0")


@pytest.mark.slow
def test_a_front_end_that_was_killed_is_one_line_and_comes_back(bundle: Bundle, tmp_path: Path) -> None:
    served = TorchServe(tmp_path / "served", free_ports())
    write_archive(served.model_store / "squares.mar", bundle.path, release_of(bundle))
    with served:
        client = Client(served.inference, MODEL, key_file=served.key_file)
        Management(served.management, key_file=served.key_file).register("squares.mar")
        before = client.predict(SENT["PNG"])
        os.kill(served.process_group, signal.SIGKILL)
        with pytest.raises(ConnectionError, match="is the server running") as caught:
            client.predict(SENT["PNG"])
        assert "\n" not in str(caught.value)
        served.stop()
        served.start()
        Management(served.management, key_file=served.key_file).register("squares.mar")
        assert client.predict(SENT["PNG"]).probabilities == before.probabilities
        shutil.rmtree(served.request_log)
        answer = client.predict(SENT["PNG"])
        assert answer.probabilities == before.probabilities
        assert "not in the request log" in answer.warnings[-1]


# --- Beyond loopback ----------------------------------------------------------------------------------


def test_nothing_listens_beyond_loopback_without_tls(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="would travel unencrypted"):
        TorchServe(tmp_path, host="0.0.0.0")
    with pytest.raises(ValueError, match=r"key\.pem: no such file"):
        TorchServe(tmp_path, tls=Tls(ROOT / "pyproject.toml", tmp_path / "key.pem"))
    proxied = TorchServe(tmp_path, host="0.0.0.0", behind_proxy=True)
    addresses = dict(line.split("=", 1) for line in proxied._properties().splitlines())
    open_to_others = [name for name, value in addresses.items() if "0.0.0.0" in value]
    assert open_to_others == ["inference_address"]


def certified(folder: Path) -> Tls:
    """A certificate of its own for this machine."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl: no certificate")
    tls = Tls(folder / "certificate.pem", folder / "key.pem")
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"),
            *("-subj", "/CN=clinic", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-out", tls.certificate, "-keyout", tls.private_key),
        ],
        check=True,
        capture_output=True,
    )
    return tls


@pytest.mark.slow
def test_over_tls_with_a_token_from_a_function(bundle: Bundle, tmp_path: Path) -> None:
    tls = certified(tmp_path)
    served = TorchServe(tmp_path / "served", free_ports(), tls=tls, token_minutes=2)
    write_archive(served.model_store / "squares.mar", bundle.path, release_of(bundle))
    fetched: list[str] = []

    def fetch() -> str:
        fetched.append(json.loads(served.key_file.read_text())["inference"]["key"])
        return fetched[-1]

    with served:
        assert served.inference.startswith("https://")
        Management(served.management, key_file=served.key_file).register("squares.mar")
        client = Client(served.inference, MODEL, token=fetch, ca_file=tls.certificate)
        for _ in range(2):
            assert client.predict(SENT["PNG"])
        assert len(fetched) == 1
        served.renew_tokens()
        assert client.predict(SENT["PNG"]).decision in ("normal", "opacity")
        assert len(set(fetched)) == 2
        with pytest.raises(ConnectionError):
            Client(served.inference, MODEL, token=fetch).predict(SENT["PNG"])


@pytest.fixture
def https(tmp_path: Path) -> Iterator[tuple[str, Tls]]:
    """The address of something that speaks https, and its certificate."""
    tls = certified(tmp_path)
    listener = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*tls)
    listener.socket = context.wrap_socket(listener.socket, server_side=True)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    yield f"https://127.0.0.1:{listener.server_address[1]}", tls
    listener.shutdown()
    thread.join()
    listener.server_close()


def test_what_hinders_tls_is_named(
    https: tuple[str, Tls], proxy: tuple[str, list[int], list[str]], tmp_path: Path
) -> None:
    address, tls = https

    def said(address: str, ca_file: Path | None = tls.certificate) -> str:
        with pytest.raises((ConnectionError, ValueError)) as caught:
            Endpoint(address, "inference", token="any", ca_file=ca_file).request("GET", "/ping")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "refused (501)" in said(address)
    assert "its certificate is not trusted (self-signed certificate); give those" in said(address, None)
    assert "not trusted (Hostname mismatch" in said(address.replace("127.0.0.1", "localhost"))
    plain = proxy[0].replace("http:", "https:")
    assert said(plain) == f"{plain}: no TLS connection (WRONG_VERSION_NUMBER); does it speak https?"
    (tmp_path / "garbled.pem").write_text(tls.certificate.read_text().replace("M", "?"))
    for name, what in (
        ("nowhere.pem", "no such file"),
        ("key.pem", "no certificates in PEM"),
        ("garbled.pem", "no certificates in PEM"),
        (".", "no certificates in PEM"),
    ):
        assert said(address, tmp_path / name).startswith(f"{tmp_path / name}: {what}; give those that have")


# --- Models in and out of service ---------------------------------------------------------------------


@pytest.fixture
def gateway(server: TorchServe, tmp_path: Path) -> Iterator[dict[str, int]]:
    """The gateway of the manifests before the server, by nginx: port in the manifest -> port here."""
    if shutil.which("nginx") is None:
        pytest.skip("no nginx: the gateway of the manifests is tried where there is one")
    tls = certified(tmp_path)
    for name in ("config", "clients", "certificate", "tmp"):
        (tmp_path / name).mkdir()
    tls.certificate.rename(tmp_path / "certificate" / "tls.crt")
    tls.private_key.rename(tmp_path / "certificate" / "tls.key")
    (tmp_path / "clients" / "clients.conf").write_text(f'"Bearer {"a" * 64}" ward-3;\n')
    spare = free_ports()
    ports = {8443: spare.inference, 9090: spare.metrics}
    moved = {8080: server.ports.inference, 8082: server.ports.metrics} | ports
    files = yaml.safe_load((ROOT / "manifests/serving/base/gateway.yaml").read_text())["data"]
    for name, text in files.items():
        for port, own in moved.items():
            text = re.sub(rf"\b{port}\b", str(own), text)
        text = text.replace("/tmp/", f"{tmp_path}/tmp/")
        text = text.replace("key_file=/gateway/server/key_file.json", f"key_file='{server.key_file}'")
        (tmp_path / "config" / name).write_text(text.replace("/gateway/", f"{tmp_path}/"))
    with subprocess.Popen(["sh", tmp_path / "config" / "gateway.sh"]) as process:
        deadline = time.monotonic() + 20
        while not is_listening(spare.inference):
            assert time.monotonic() < deadline, "the gateway did not come up"
            time.sleep(0.1)
        yield ports
        process.terminate()
        assert process.wait(timeout=20) == 0


def test_behind_the_gateway_each_client_has_a_token_that_outlives_the_servers(
    server: TorchServe, client: Client, gateway: dict[str, int], tmp_path: Path
) -> None:
    trusted = tmp_path / "certificate" / "tls.crt"
    address = f"https://127.0.0.1:{gateway[8443]}"
    ward = Client(address, MODEL, token="a" * 64, ca_file=trusted)
    said = ward.predict(SENT["PNG"])
    assert said.probabilities == client.predict(SENT["PNG"]).probabilities
    with pytest.raises(Refused, match=r"refused \(401\): no client has this token"):
        Client(address, MODEL, token="b" * 64, ca_file=trusted).predict(SENT["PNG"])
    (tmp_path / "clients" / "clients.conf").write_text(f'"Bearer {"b" * 64}" ward-4;\n')
    server.renew_tokens()
    time.sleep(3)
    assert (
        Client(address, MODEL, token="b" * 64, ca_file=trusted).predict(SENT["PNG"]).probabilities
        == said.probabilities
    )
    with pytest.raises(Refused, match="no client"):
        ward.predict(SENT["PNG"])
    with pytest.raises(Refused, match=r"\(404\): no such address"):
        Endpoint(address, "management", token="b" * 64, ca_file=trusted).request("GET", "/models")
    assert (
        "ts_inference_requests_total"
        in urllib3.request("GET", f"http://127.0.0.1:{gateway[9090]}/metrics").data.decode()
    )
    assert urllib3.request("GET", f"http://127.0.0.1:{gateway[9090]}/models").status == 404


def test_failures_of_the_management_are_one_line_with_the_servers_reason(
    server: TorchServe, bundle: Bundle
) -> None:
    management = Management(server.management, key_file=server.key_file)
    version = version_of(bundle.digest)
    (server.model_store / "broken.mar").write_bytes(b"PK no archive")
    for call, status, reason in (
        (lambda: management.register("nowhere.mar"), 404, "Model not found"),
        (lambda: management.register("broken.mar"), 400, "Model name is not defined"),
        (lambda: management.register("http://127.0.0.1/squares.mar"), 404, "does not match any allowed URL"),
        (lambda: management.register("squares.mar"), 409, "already registered"),
        (lambda: management.set_default(MODEL, "9"), 404, "does not exist"),
        (lambda: management.unregister(MODEL, "9"), 404, "does not exist"),
    ):
        with pytest.raises(Refused, match=reason) as caught:
            call()
        assert caught.value.status == status
        assert "\n" not in str(caught.value)
    (found,) = management.versions(MODEL)
    assert (found.version, found.archive, found.ready_workers) == (version, "squares.mar", 1)
    assert management.default_version(MODEL) == version
    assert management.versions("unknown") == ()
    assert management.default_version("unknown") is None


# --- The server ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_client_outlives_the_servers_tokens(tmp_path: Path) -> None:
    """Tokens of a minute, renewed at half of that by `serve`; those of an hour differ in the number alone."""
    ports = free_ports()
    served = f"TorchServe(Path({str(tmp_path)!r}) / 'served', Ports(*{tuple(ports)}))"
    # Half of the least that may be asked for, so that the test takes half as long.
    code = f"from serving.server import *; served = {served}; served.token_minutes = 1; serve(served)"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            read_until(process, "Ctrl-C stops it.\n")
            key_file = tmp_path / "served" / "key_file.json"
            first = json.loads(key_file.read_text())["inference"]["key"]
            address = f"http://127.0.0.1:{ports.inference}"
            endpoint = Endpoint(address, "inference", key_file=key_file)
            until = time.monotonic() + 70  # past the second renewal
            while time.monotonic() < until:
                assert b"Healthy" in endpoint.request("GET", "/ping")
                time.sleep(3)
            with pytest.raises(Refused, match="Token"):
                Endpoint(address, "inference", token=first).request("GET", "/ping")
        finally:
            process.terminate()
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_port_in_use_is_named_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        for ports in (free_ports()._replace(management=port), free_ports()._replace(grpc_management=port)):
            with pytest.raises(ValueError, match=rf"^port {port} \((grpc_)?management\): Address already"):
                TorchServe(tmp_path / "served", ports).start()
    assert not (tmp_path / "served").exists()
    with pytest.raises(ValueError, match="a port of its own"):
        TorchServe(tmp_path / "served", Ports(metrics=8080)).start()


@pytest.mark.parametrize(
    ("host", "what"),
    [
        ("192.0.2.1", "Cannot assign requested address"),
        ("::1", "Address family for hostname not supported"),
        ("ward.invalid", ""),
    ],
)
def test_a_host_that_is_not_this_machines_is_named_and_no_port(tmp_path: Path, host: str, what: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^host {re.escape(host)}: {what}.*; give an IPv4 address"
    ) as caught:
        TorchServe(tmp_path / "served", free_ports(), host=host, behind_proxy=True).start()
    assert "port" not in str(caught.value).replace("supported", "")
    assert not (tmp_path / "served").exists()


def test_a_folder_has_one_server(server: TorchServe, client: Client) -> None:
    with pytest.raises(ValueError, match="another server runs there"):
        TorchServe(server.folder, free_ports()).start()
    assert client.predict(SENT["PNG"])


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose a shorter one"):
        TorchServe(tmp_path / ("x" * 100), free_ports()).start()


def test_a_server_that_cannot_start_says_where_to_look_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx1k")
    served = TorchServe(tmp_path / "served", free_ports())
    with pytest.raises(ValueError, match=r"ended while it started; the logs in .*/served/logs say why"):
        served.start()
    assert "Too small maximum heap" in (served.logs / "console.log").read_text()
    assert not served.key_file.exists()
    assert not (served.folder / "tmp").exists()
    assert served.has_ended


def test_in_the_foreground_it_says_where_it_is_and_stops_when_told(tmp_path: Path) -> None:
    ports = free_ports()
    served = f"TorchServe(Path({str(tmp_path)!r}) / 'served', Ports(*{tuple(ports)}), console=True)"
    code = f"from serving.server import *; serve({served})"
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        shown = "".join(iter(process.stdout.readline, "Ctrl-C stops it.\n"))
        assert f"http://127.0.0.1:{ports.inference}/predictions/MODEL" in shown
        assert str(tmp_path / "served" / "key_file.json") in shown
        process.send_signal(signal.SIGTERM)
        shown = process.communicate(timeout=30)[0]
    assert process.returncode == 0
    assert "Traceback" not in shown
    assert not (tmp_path / "served" / "key_file.json").exists()
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", ports.inference)) != 0


def test_a_server_whose_starter_was_killed_keeps_its_folder(tmp_path: Path) -> None:
    code = f"from serving.server import *; TorchServe(Path({str(tmp_path)!r}), free_ports()).start(); "
    code += "print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"1\n"
        process.kill()
    (left,) = [
        int(file.parent.name)
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if f"-Djava.io.tmpdir={tmp_path}/tmp\0".encode() in file.read_bytes()
    ]
    try:
        with pytest.raises(ValueError, match="another server runs there"):
            TorchServe(tmp_path, free_ports()).start()
        assert (tmp_path / "key_file.json").exists()
    finally:
        os.kill(left, signal.SIGKILL)


def test_stopping_leaves_no_process_and_no_secret(server: TorchServe, client: Client) -> None:
    """The last test: it stops the server of the others."""
    group = os.getpgid(workers(server)[0])
    listening = [port for port in server.ports if is_listening(port)]
    assert listening == list(server.ports)
    server.stop()
    deadline = time.monotonic() + 60
    while (left := running(group)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left == []
    assert not [port for port in server.ports if is_listening(port)]
    assert not server.key_file.exists()
    assert not (server.folder / "tmp").exists()
    assert lines(server.request_log), "the request log stays"
    server.stop()


def workers(server: TorchServe, model: str = MODEL) -> list[int]:
    """The process numbers of a model's workers."""
    key = json.loads(server.key_file.read_text())["management"]["key"]
    described = urllib3.request(
        "GET", f"{server.management}/models/{model}", headers={"Authorization": f"Bearer {key}"}
    ).json()
    return [worker["pid"] for worker in described[0]["workers"]]


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def running(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            pid, _, rest = stat.read_text().partition(" (")
            state, _, pgrp = rest.rpartition(")")[2].split()[:3]
            if int(pgrp) == group and state != "Z":
                found.append(int(pid))
    return found
