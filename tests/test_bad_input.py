"""What a user gets wrong, from the command line: one line that says what and where, a status, nothing half-written."""

import json
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from PIL import Image
from test_reading import dicom_dataset, encode

from cadx.__main__ import main
from cadx.datasets import DatasetWriter, Sample, SourceInfo
from cadx.drift import image_statistics
from cadx.files import digest_bytes

NAME = "Ignatowska"
"""A patient's, in the header and the file name of whatever is broken."""


class Asked:
    """The command line in a folder of its own."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = folder, capsys
        (folder / "out").mkdir()

    def refused(self, *words: str) -> str:
        """The one line in which a command refuses; nothing may lie in the folder `out` then."""
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(words)
        said = self._capsys.readouterr()
        assert ended.value.code == 1
        assert not list((self.folder / "out").iterdir())
        lines = [line for line in said.err.splitlines() if line.strip()]  # a progress bar may leave a blank
        assert len(lines) == 1, said.err
        assert "Traceback" not in said.out + said.err
        assert NAME not in said.out + said.err
        return lines[0]


@pytest.fixture
def asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Asked:
    return Asked(tmp_path, capsys)


def radiograph() -> bytes:
    pixels = np.random.default_rng(0).integers(0, 4095, (32, 24), dtype=np.uint16)
    return encode(dicom_dataset(pixels, bits=12, PatientName=f"{NAME}^B", PatientID="4711"))


def without_rows() -> bytes:
    ds = dicom_dataset(np.zeros((1, 24), np.uint16), PatientName=f"{NAME}^B")
    ds.Rows, ds.PixelData = 0, b""
    return encode(ds)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (radiograph()[:-300], "DICOM: damaged or truncated"),
        (f"Report on {NAME}".encode() * 20, "neither DICOM, PNG nor JPEG by its first bytes"),
        (b"", "an empty file"),
        (without_rows(), "an empty image: no rows or no columns"),
        (None, "its image file is not there"),
    ],
    ids=["truncated DICOM", "text named .dcm", "empty file", "empty image", "missing file"],
)
def test_a_broken_image_stops_ingest(asked: Asked, tmp_path: Path, what: bytes | None, reason: str) -> None:
    own = tmp_path / "own"
    (own / "images").mkdir(parents=True)
    rows = []
    for number in range(8):
        name = f"images/{number}.png"
        pixels = np.random.default_rng(number).integers(0, 255, (32, 24), dtype=np.uint8)
        Image.fromarray(pixels).save(own / name)
        rows.append((name, f"p{number}", "sick" if number % 2 else "healthy"))
    rows.append((f"images/{NAME}.dcm", "p8", "sick"))
    if what is not None:
        (own / f"images/{NAME}.dcm").write_bytes(what)
    pd.DataFrame(rows, columns=["file", "patient", "label"]).to_csv(own / "labels.csv", index=False)
    said = asked.refused(*ingest(tmp_path, own, format="table", table="labels.csv", label_column="label"))
    assert said.startswith("cadx ingest: ")
    assert reason in said


def test_a_label_that_the_catalogue_does_not_know_stops_ingest(asked: Asked, tmp_path: Path) -> None:
    own = tmp_path / "own"
    for name in ("healthy", "sick", "sic"):
        (own / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), len(name), np.uint8)).save(own / name / "1.png")
    said = asked.refused(*ingest(tmp_path, own, format="folder"))
    assert "1 of 3 folders are none of the classes healthy, sick" in said

    rows = [("healthy/1.png", "healthy"), ("sick/1.png", "sick"), ("sic/1.png", "sic")]
    pd.DataFrame(rows, columns=["file", "label"]).to_csv(own / "labels.csv", index=False)
    said = asked.refused(*ingest(tmp_path, own, format="table", table="labels.csv", label_column="label"))
    assert "labels.csv row 4, column label: a label that is none of healthy, sick" in said


def ingest(folder: Path, own: Path, **layout: str) -> list[str]:
    """The command that ingests `own`, by an entry that holds no more than it must."""
    entry = {
        "title": "Own", "task": "binary", "classes": ["healthy", "sick"], "positive": "sick", "modality": "X-ray",
        "licence": "private", "citation": "none", "file": str(own), "deidentify": True,
        "patient": "hmac" if "table" in layout and (own / "images").is_dir() else "per-image",
        **layout,
    }  # fmt: skip
    if entry["patient"] == "hmac":
        entry["columns"] = {"patient": "patient"}
    (folder / "catalog.yaml").write_text(yaml.safe_dump({"own": entry}))
    return [
        "ingest", "--catalog", str(folder / "catalog.yaml"), "--cache", str(folder / "cache"),
        "--dataset", str(folder / "out/dataset"), "--params", '{"source": "own"}',
    ]  # fmt: skip


@pytest.fixture
def split(tmp_path: Path) -> Callable[[str], list[str]]:
    """The command that splits a set in which all the sick images are of one patient."""
    with DatasetWriter(
        tmp_path / "dataset",
        name="own",
        task="binary",
        classes=("healthy", "sick"),
        positive="sick",
        modality="X-ray",
        clustered=True,
        source=SourceInfo(title="Own", licence="private", citation="none"),
    ) as writer:
        for number in range(24):
            sick = number % 4 == 0
            pixels = np.random.default_rng(number).integers(0, 255, (32, 24), dtype=np.uint8)
            writer.add(
                Sample(
                    sample_id=f"s{number}",
                    pixels=pixels,
                    labels={"sick" if sick else "healthy": 1.0},
                    patient=NAME if sick else f"p{number}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics=image_statistics(pixels),
                )
            )
    validation = tmp_path / "validation.json"
    words = [
        "--dataset",
        str(tmp_path / "dataset"),
        "--validation",
        str(validation),
        "--report",
        str(tmp_path / "v.html"),
    ]
    with pytest.raises(SystemExit) as ended:
        main(["validate", *words, "--params", "{}"])
    assert ended.value.code == 0
    return lambda params: [
        "split",
        *words[:4],
        "--splits",
        str(tmp_path / "out/splits.parquet"),
        "--params",
        params,
    ]


def test_a_class_with_a_single_patient_stops_split(asked: Asked, split: Callable[[str], list[str]]) -> None:
    said = asked.refused(*split('{"strategy": "patient"}'))
    assert "class 'sick': 1 patient, too few for one in each of train, val, calibration, test" in said


def test_an_unknown_parameter_is_named_with_its_file_and_section(
    asked: Asked, split: Callable[[str], list[str]], tmp_path: Path
) -> None:
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump({"own": {"split": {"strategyy": "patient"}}}))
    said = asked.refused(*split(f"{file}:own"))
    assert said == f"cadx split: {file}: own.split.strategyy: unknown parameter; did you mean 'strategy'?"
    # A section as JSON, longer than any file's name, is no file.
    assert "did you mean 'site'" in asked.refused(*split(json.dumps({"sitte": "x" * 5000})))
    file.write_text(yaml.safe_dump({"own": {"splitt": {"strategy": "patient"}}}))
    assert (
        asked.refused(*split(f"{file}:own"))
        == f"cadx split: {file}: own.splitt: no such step; did you mean 'split'?"
    )


def test_a_port_in_use_is_named_before_anything_is_written(asked: Asked, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = asked.refused("serve", str(tmp_path / "out/serving"), "--port", str(port))
    assert said.startswith(f"cadx serve: port {port} (inference): Address already in use")
