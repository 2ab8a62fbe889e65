"""Some hundreds of broken files of every format: refused in one line, or unchanged in shape; never a crash or a hang.

Where the format has a checksum, what is not refused has the very values of the whole file.

A process of its own reads them, so that a crash, a hang or too much memory ends that process and not the tests: run as
a script, this file reads what its arguments list, and prints a line per file.
"""

import gzip
import io
import json
import signal
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cadx.files import digest_bytes

LIMIT_S = 2.0  # of processor time: what others do on the machine does not count
WAITING_S = 60.0  # by the clock, for one that waits and does not compute
LIMIT_BYTES = 1 << 30
DAMAGES_PER_FORMAT = 24
# Read to be whole before anything is timed: libraries are imported on first use.
NUM_WHOLE = 1
TEXTS = ("table", "voc", "coco")
KINDS = (
    *("dicom", "dicom-rle", "dicom-jpeg", "dicom-jpeg-12", "dicom-jpeg-2000", "dicom-jpeg-2000-colour"),
    *("dicom-jpeg-ls", "png", "png-16", "jpeg", "npz", "npz-packed", "nifti", "nifti-gz", "dicom-series"),
    *("slide", *TEXTS),
)
WITH_CHECKSUM = ("png", "png-16", "npz", "npz-packed", "nifti-gz", "dicom-series")

Content = tuple[tuple[int, ...], str]
"""Shape, and SHA-256 of the values."""


# --- One good file of each format -------------------------------------------------------------------


def dicom(pixels: np.ndarray, syntax: str = "", position_mm: float = 0.0) -> bytes:
    import pydicom
    from pydicom.uid import CTImageStorage
    from test_reading import dicom_dataset

    ds = dicom_dataset(pixels)
    if syntax:
        ds.compress(syntax)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{int(position_mm) + 1}"
    ds.Modality, ds.SeriesInstanceUID, ds.PatientID = "CT", "1.2.9", "P1"
    ds.PixelSpacing, ds.SliceThickness = [0.8, 0.7], 2
    ds.ImageOrientationPatient, ds.ImagePositionPatient = [1, 0, 0, 0, 1, 0], [0, 0, position_mm]
    ds.RescaleSlope, ds.RescaleIntercept = 1, 0
    stream = io.BytesIO()
    pydicom.dcmwrite(stream, ds, enforce_file_format=True)
    return stream.getvalue()


def dicom_jpeg_12(pixels: np.ndarray) -> bytes:
    import imagecodecs
    from pydicom.encaps import encapsulate
    from pydicom.uid import JPEGExtended12Bit
    from test_reading import dicom_dataset, encode

    ds = dicom_dataset(pixels, bits=12)
    ds.file_meta.TransferSyntaxUID = JPEGExtended12Bit
    ds.PixelData = encapsulate([imagecodecs.jpeg8_encode(pixels, level=90, bitspersample=12)])
    return encode(ds)


def of_pydicom(name: str) -> bytes:
    from pydicom.data import get_testdata_file

    return Path(str(get_testdata_file(name, download=False))).read_bytes()


def nifti(voxels: np.ndarray) -> bytes:
    import nibabel

    return nibabel.Nifti1Image(voxels, np.diag([0.7, 0.8, 2.0, 1.0])).to_bytes()


def slide() -> bytes:
    import tifffile

    rng = np.random.default_rng(0)
    level = rng.integers(120, 240, (512, 768, 3), np.uint8)
    stream = io.BytesIO()
    with tifffile.TiffWriter(stream) as writer:
        for step in (1, 2):
            writer.write(
                level[::step, ::step],
                tile=(128, 128),
                compression="jpeg",
                photometric="rgb",
                subfiletype=int(step > 1),
                resolution=(20_000 / step, 20_000 / step),
                resolutionunit="CENTIMETER",
            )
    return stream.getvalue()


def saved(save: Callable[[io.BytesIO], Any]) -> bytes:
    stream = io.BytesIO()
    save(stream)
    return stream.getvalue()


def sources() -> dict[str, tuple[str, bytes]]:
    """Format -> (file name, a good file)."""
    from PIL import Image

    rng = np.random.default_rng(1)
    gray = rng.integers(0, 255, (48, 64), np.uint8)
    gray16 = rng.integers(0, 65535, (48, 64), np.uint16)
    volume = rng.integers(-1000, 1000, (24, 20, 16), np.int16)
    slices = {f"{z}.dcm": dicom(gray16 + np.uint16(z), position_mm=2.0 * z) for z in range(5)}

    def series(stream: io.BytesIO) -> None:
        with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in slices.items():
                archive.writestr(name, data)

    return {
        "dicom": ("a.dcm", dicom(gray16)),
        "dicom-rle": ("a.dcm", dicom(gray16, "1.2.840.10008.1.2.5")),
        "dicom-jpeg": ("a.dcm", of_pydicom("SC_rgb_jpeg_gdcm.dcm")),
        "dicom-jpeg-12": ("a.dcm", dicom_jpeg_12(gray16 >> 4)),
        "dicom-jpeg-2000-colour": ("a.dcm", of_pydicom("SC_rgb_gdcm_KY.dcm")),
        "dicom-jpeg-2000": ("a.dcm", of_pydicom("MR_small_jp2klossless.dcm")),
        "dicom-jpeg-ls": ("a.dcm", of_pydicom("MR_small_jpeg_ls_lossless.dcm")),
        "png": ("a.png", saved(lambda stream: Image.fromarray(gray).save(stream, "PNG"))),
        "png-16": ("a.png", saved(lambda stream: Image.fromarray(gray16).save(stream, "PNG"))),
        "jpeg": ("a.jpg", saved(lambda stream: Image.fromarray(gray).save(stream, "JPEG"))),
        "npz": ("a.npz", saved(lambda stream: np.savez(stream, train_images=gray))),
        "npz-packed": ("a.npz", saved(lambda stream: np.savez_compressed(stream, train_images=gray))),
        "nifti": ("a.nii", nifti(volume)),
        "nifti-gz": ("a.nii.gz", gzip.compress(nifti(volume), mtime=0)),
        "dicom-series": ("a.zip", saved(series)),
        "slide": ("a.tiff", slide()),
        "voc": (
            "a.xml",
            b"<annotation><object><name>cell</name><bndbox><xmin>1</xmin><ymin>2</ymin><xmax>30</xmax>"
            b"<ymax>40</ymax></bndbox></object></annotation>",
        ),
        "coco": (
            "a.json",
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a.png"}],
                    "categories": [{"id": 1, "name": "cell"}],
                    "annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
                }
            ).encode(),
        ),
        "table": ("a.csv", b"file,label\na.png,cell\n"),
    }


def damaged(data: bytes, rng: np.random.Generator, number: int) -> bytes:
    """In turn: cut off, with flipped bytes, with another magic, with a header that claims the largest numbers."""
    spoilt = bytearray(data)
    match number % 4:
        case 0:
            del spoilt[int(rng.integers(1, len(data))) :]
        case 1:
            for at in rng.integers(0, len(data), int(rng.integers(1, 12))):
                spoilt[at] ^= int(rng.integers(1, 256))
        case 2:
            spoilt[: min(140, len(data) // 2)] = rng.bytes(min(140, len(data) // 2))
        case 3:
            at = int(rng.integers(8, max(9, min(len(data) - 8, 2000))))
            spoilt[at : at + 4] = b"\xff\xff\xff\x7f"
    return bytes(spoilt)


# --- The process that reads them -----------------------------------------------------------------------


def content(values: np.ndarray) -> Content:
    return values.shape, digest_bytes(np.ascontiguousarray(values).tobytes())


def opened(kind: str, path: Path) -> Content:
    """What the file holds, by the reader that ingest would use."""
    from cadx.catalog import CocoEntry, VocEntry, read_rows
    from cadx.layouts import list_items
    from cadx.reading.identifiers import file_identifiers
    from cadx.reading.images import read_arrays, read_image

    detection: dict[str, Any] = dict.fromkeys(("title", "modality", "licence", "citation"), "made") | {
        "task": "detection",
        "classes": ("cell",),
        "patient": "per-image",
        "file": ".",
    }
    if kind.startswith("npz"):
        return content(read_arrays(path)["train_images"])
    if kind == "table":
        return (len(read_rows(path)), len(read_rows(path)[0])), ""
    if kind in ("voc", "coco"):
        from PIL import Image

        folder = path.parent
        (folder / "images").mkdir(exist_ok=True)
        (folder / "notes").mkdir(exist_ok=True)
        Image.new("L", (9, 9)).save(folder / "images/a.png")
        if kind == "voc":
            (folder / "notes/a.xml").write_bytes(path.read_bytes())
            entry = VocEntry(**detection, format="voc", images="images", annotations="notes")
            return (len(list_items(entry, folder)),), ""
        coco = CocoEntry(**detection, format="coco", images="images", annotations=path.name)
        return (len(list_items(coco, folder)),), ""
    file_identifiers(path)
    if kind in ("nifti", "nifti-gz", "dicom-series"):
        from cadx.reading.volumes import read_volume

        return content(read_volume(path).voxels)
    if kind == "slide":
        from cadx.reading.slides import open_slide, summarise_slide

        summarise_slide(path)
        with open_slide(path) as found:
            return tuple(found.size_px), content(found.tile(100, 50, 64, 1.0))[1]
    return content(read_image(path).pixels)


class Overdue(BaseException):
    """No Exception: readers turn each of those into a refusal."""


def read_all(listing: Path) -> None:
    """Print a line per file of `listing`: its number, and shape and digest or the message."""

    def too_long(*_: object) -> None:
        raise Overdue

    signal.signal(signal.SIGPROF, too_long)
    signal.signal(signal.SIGALRM, too_long)
    for number, (kind, path, is_whole) in enumerate(json.loads(listing.read_text())):
        print(json.dumps({"number": number, "started": True}), flush=True)
        try:
            signal.setitimer(signal.ITIMER_PROF, 60 if is_whole else LIMIT_S)
            signal.setitimer(signal.ITIMER_REAL, WAITING_S)
            shape, digest = opened(kind, Path(path))
            outcome: dict[str, Any] = {"shape": shape, "digest": digest}
        except ValueError as error:
            outcome = {"refused": str(error)}
        except BaseException as error:  # what no reader may let through
            outcome = {"escaped": f"{type(error).__name__}: {error}"}
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps({"number": number, **outcome}), flush=True)
    # Not ru_maxrss, in which a child inherits the peak of its parent.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    peak_bytes = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"peak_bytes": peak_bytes}), flush=True)


def test_a_reader_that_hangs_is_told_from_one_that_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What the tests below would say of it: readers catch every Exception, and this must not be one."""

    def spin(_: bytes) -> None:
        while True:
            pass

    name, data = sources()["png"]
    (tmp_path / name).write_bytes(data)
    (tmp_path / "listing.json").write_text(json.dumps([("png", str(tmp_path / name), False)]))
    monkeypatch.setattr("cadx.reading.images._check_png", spin)
    monkeypatch.setattr(sys.modules[__name__], "LIMIT_S", 0.2)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGPROF, signal.SIGALRM)}
    try:
        read_all(tmp_path / "listing.json")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    outcome = json.loads(capsys.readouterr().out.splitlines()[1])
    assert outcome == {"number": 0, "escaped": "Overdue: "}


@pytest.mark.parametrize(
    ("kind", "elements"),
    [
        ("dicom", {"Rows": 24}),
        ("dicom", {"Rows": 47}),
        ("dicom", {"Columns": 32}),
        ("dicom", {"Columns": 63}),
        ("dicom", {"Rows": 47, "Columns": 65}),
        ("dicom", {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7}),
        ("dicom", {"NumberOfFrames": None, "twice": True}),
        ("dicom-jpeg-ls", {"NumberOfFrames": None, "twice": True}),
        ("dicom-series", {"Rows": 24}),
    ],
)
def test_a_header_that_claims_less_than_the_file_holds_gives_no_other_picture(
    tmp_path: Path, kind: str, elements: dict[str, Any]
) -> None:
    """What is claimed lies within the data here, so that a decoder is content with it."""
    import pydicom
    from pydicom.encaps import encapsulate, get_frame

    def spoilt(data: bytes) -> bytes:
        header = pydicom.dcmread(io.BytesIO(data))
        header.update({key: value for key, value in elements.items() if key != "twice"})
        if "twice" in elements:
            header.PixelData = (
                encapsulate([get_frame(header.PixelData, 0, number_of_frames=1)] * 2)
                if header.file_meta.TransferSyntaxUID.is_compressed
                else header.PixelData * 2
            )
        return saved(lambda stream: header.save_as(stream))

    name, data = sources()[kind]
    path = tmp_path / name
    path.write_bytes(data)
    assert opened(kind, path)
    if kind == "dicom-series":
        with zipfile.ZipFile(io.BytesIO(data)) as slices, zipfile.ZipFile(path, "w") as archive:
            for member in slices.namelist():
                archive.writestr(member, spoilt(slices.read(member)))
    else:
        path.write_bytes(spoilt(data))
    with pytest.raises(
        ValueError, match=r"its header claims \d+ (frames|bytes of pixels), but \d+ are there"
    ):
        opened(kind, path)


def outcomes(files: list[tuple[str, Path, bool]], folder: Path) -> tuple[list[dict[str, Any]], int]:
    listing = folder / "listing.json"
    listing.write_text(json.dumps([(kind, str(path), whole) for kind, path, whole in files]))
    done = subprocess.run(
        [sys.executable, __file__, str(listing)], capture_output=True, text=True, timeout=1200, check=False
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert "peak_bytes" in lines[-1], (
        f"the process ended at {files[lines[-1]['number']]}: {done.stderr[-2000:]}"
    )
    return [line for line in lines[:-1] if "started" not in line], lines[-1]["peak_bytes"]


@pytest.mark.slow
def test_no_broken_file_crashes_hangs_or_changes_shape(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    files: list[tuple[str, Path, bool]] = []
    for kind, (name, data) in sources().items():
        for number in range(DAMAGES_PER_FORMAT + NUM_WHOLE):
            path = tmp_path / f"{kind}-{number}" / name
            path.parent.mkdir()
            path.write_bytes(damaged(data, rng, number) if number >= NUM_WHOLE else data)
            files.append((kind, path, number < NUM_WHOLE))
    assert len(files) >= 300
    assert set(sources()) == set(KINDS)
    found, peak_bytes = outcomes(files, tmp_path)
    whole = {
        kind: (outcome.get("shape"), outcome.get("digest"))
        for (kind, _, is_whole), outcome in zip(files, found, strict=True)
        if is_whole
    }
    assert all(shape for shape, _ in whole.values()), whole
    refused: Counter[str] = Counter()
    for (kind, path, _), outcome in zip(files, found, strict=True):
        assert "escaped" not in outcome, (path, outcome)
        if "refused" in outcome:
            refused[kind] += 1
            assert outcome["refused"], path
            assert "\n" not in outcome["refused"], (path, outcome)
            assert str(tmp_path) not in outcome["refused"], (path, outcome)
        elif kind in TEXTS:
            continue  # text without a checksum: its recorded digest tells
        else:
            shape, digest = whole[kind]
            assert outcome["shape"] == shape, (path, outcome)
            assert outcome["digest"] == digest or kind not in WITH_CHECKSUM, (path, outcome)
    assert peak_bytes < LIMIT_BYTES
    # A magic of noise and a cut are told by the format itself wherever it has a structure.
    assert all(refused[kind] >= DAMAGES_PER_FORMAT // 3 for kind in whole if kind != "table"), refused


@pytest.mark.slow
@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(KINDS),
    edits=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), max_size=12
    ),
    kept=st.floats(0.02, 1),
)
def test_a_fuzzer_finds_no_way_out_but_a_refusal(
    whole_files: dict[str, tuple[str, bytes, Content]],
    kind: str,
    edits: list[tuple[float, bytes]],
    kept: float,
) -> None:
    name, data, whole = whole_files[kind]
    spoilt = bytearray(data)
    for at, value in edits:
        start = int(at * len(spoilt))
        spoilt[start : start + len(value)] = value
    del spoilt[int(kept * len(spoilt)) + 1 :]
    with TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(spoilt)
        message, found = "refused", whole
        try:
            found = opened(kind, path)
        except ValueError as error:
            message = str(error)
    assert message
    assert "\n" not in message
    assert found[0] == whole[0] or kind in TEXTS
    assert found == whole or kind not in WITH_CHECKSUM


@pytest.fixture(scope="module")
def whole_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, bytes, Content]]:
    """Format -> (file name, a good file, what it holds)."""
    found = {}
    for kind, (name, data) in sources().items():
        path = tmp_path_factory.mktemp(kind) / name
        path.write_bytes(data)
        found[kind] = (name, data, opened(kind, path))
    return found


if __name__ == "__main__":
    read_all(Path(sys.argv[1]))
