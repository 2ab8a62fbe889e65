"""Batch inference: the endpoint's answers for a folder of files, and never a file's name."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tifffile
from test_evaluate import Run, prepare
from test_loading_slides import damage, section, slide_dataset
from test_serving_kinds import MODELS

from cadx.datasets import DatasetFolder
from cadx.predicting.predictor import Predictor
from cadx.reading.images import encode_png, read_image
from components.predict import PredictParams, predict
from serving.demo import write_demo_bundle

NAME = "DOE^JANE"


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return prepare(tmp_path_factory.mktemp("run"))


@pytest.fixture
def inbox(ready: Run, tmp_path: Path) -> Path:
    """Five images, one of them twice, and two files that are none."""
    dataset = DatasetFolder(ready.dataset)
    folder = tmp_path / "inbox"
    (folder / "deeper").mkdir(parents=True)
    for number, sample_id in enumerate(dataset.samples["sample_id"].iloc[:5]):
        (folder / "deeper" / f"{NAME}-{number}.png").write_bytes(encode_png(dataset.pixels(sample_id)))
    (folder / f"{NAME}-again.png").write_bytes((folder / "deeper" / f"{NAME}-0.png").read_bytes())
    (folder / f"{NAME}.txt").write_text("a letter")
    (folder / f"{NAME}.dcm").write_bytes((folder / f"{NAME}-again.png").read_bytes()[:60])
    return folder


def run(ready: Run, inbox: Path, out: Path, **params: float) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    predict(
        bundle=ready.bundle,
        images=inbox,
        predictions=out / "predictions.parquet",
        unreadable=out / "unreadable.jsonl",
        params=PredictParams(**params),
    )
    lines = (out / "unreadable.jsonl").read_text().splitlines()
    return pd.read_parquet(out / "predictions.parquet"), [json.loads(line) for line in lines]


def test_answers_are_the_predictors_and_joined_by_the_files_digest(
    ready: Run, inbox: Path, tmp_path: Path
) -> None:
    frame, unreadable = run(ready, inbox, tmp_path)
    assert len(frame) == 5
    assert len(unreadable) == 2
    predictor = Predictor(ready.bundle)
    for path in (inbox / "deeper").iterdir():
        [row] = frame[frame["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()].to_dict("records")
        expected = predictor.predict(read_image(path))
        assert row["decision"] == expected.decision
        for name, probability in expected.probabilities.items():
            assert row[f"prob_{name}"] == pytest.approx(probability, abs=1e-6)


def test_what_cannot_be_read_costs_a_line_and_no_name_is_told(
    ready: Run, inbox: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (inbox / "@eaDir").mkdir()
    for litter in ("Thumbs.db", "@eaDir/thumb.jpg"):  # nobody's images, and no lines either
        (inbox / litter).write_bytes(b"of a file server")
    _, unreadable = run(ready, inbox, tmp_path)
    told = {one["sha256"]: one["reason"] for one in unreadable}
    letter = hashlib.sha256((inbox / f"{NAME}.txt").read_bytes()).hexdigest()
    assert told[letter].startswith("neither DICOM, PNG nor JPEG")
    assert "5 files answered, 2 unreadable" in capsys.readouterr().out
    for file in ("predictions.parquet", "unreadable.jsonl"):
        assert b"DOE" not in (tmp_path / file).read_bytes()


def test_a_slide_whose_tiles_are_all_damaged_costs_its_own_line(tmp_path: Path) -> None:
    whole = section(640, 700, np.s_[192:512, 64:384])
    levels = [np.repeat(np.repeat(whole, 4, axis=0), 4, axis=1), whole]  # the picture of it is of the second
    for number, name in enumerate(("well", "spoilt")):
        with tifffile.TiffWriter(tmp_path / f"{name}.tiff") as tiff:
            for mpp, pixels in zip((0.5, 2.0), levels, strict=True):
                tiff.write(
                    pixels + np.uint8(number),
                    tile=(128, 128),
                    subfiletype=int(mpp > 0.5),
                    photometric="rgb",
                    compression="deflate",
                    resolution=(1e4 / mpp, 1e4 / mpp),
                    resolutionunit="CENTIMETER",
                    metadata=None,
                )
    slides = slide_dataset(
        tmp_path / "dataset", {name: tmp_path / f"{name}.tiff" for name in ("well", "spoilt")}
    )
    damage(slides, "spoilt", range)
    (tmp_path / "inbox").mkdir()
    for name in ("well", "spoilt"):
        shutil.copy(slides.slide_path(name), tmp_path / "inbox" / f"{name}.tiff")
    write_demo_bundle(tmp_path / "bundle", "slide", **MODELS["slide"])
    predict(
        bundle=tmp_path / "bundle",
        images=tmp_path / "inbox",
        predictions=tmp_path / "predictions.parquet",
        unreadable=tmp_path / "unreadable.jsonl",
        params=PredictParams(),
    )
    well, spoilt = (
        hashlib.sha256((tmp_path / "inbox" / f"{name}.tiff").read_bytes()).hexdigest()
        for name in ("well", "spoilt")
    )
    assert pd.read_parquet(tmp_path / "predictions.parquet")["sha256"].tolist() == [well]
    [line] = map(json.loads, (tmp_path / "unreadable.jsonl").read_text().splitlines())
    assert line["sha256"] == spoilt
    assert "none of its tiles can be read" in line["reason"]


def test_a_file_that_may_not_be_opened_is_told_without_its_name(
    ready: Run, inbox: Path, tmp_path: Path
) -> None:
    (inbox / f"{NAME}.png").symlink_to(inbox / f"{NAME}.png")  # root may open all but a loop
    with pytest.raises(ValueError, match=r"inbox: a file in it cannot be opened") as refusal:
        run(ready, inbox, tmp_path)
    assert NAME not in str(refusal.value)


def test_the_same_folder_gives_the_same_bytes(ready: Run, inbox: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        run(ready, inbox, tmp_path / name)
    for file in ("predictions.parquet", "unreadable.jsonl"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_too_many_unreadable_files_stop_it_and_leave_nothing(ready: Run, inbox: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 of 7 files cannot be read") as caught:
        run(ready, inbox, tmp_path, unreadable_at_most=0.1)
    assert "DOE" not in str(caught.value)
    assert not (tmp_path / "predictions.parquet").exists()


def test_a_table_without_answers_still_says_what_it_would_hold(
    ready: Run, inbox: Path, tmp_path: Path
) -> None:
    for path in inbox.rglob("*"):
        if path.is_file():
            path.write_bytes(b"no image, " + path.name.encode())
    frame, unreadable = run(ready, inbox, tmp_path)
    assert len(frame) == 0
    assert len(unreadable) == 8
    assert next(iter(frame)) == "sha256"
    assert {"decision", "prediction_set", "refer", "warnings"} <= set(frame)


def test_an_empty_folder_is_a_mistake(ready: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no file in it"):
        run(ready, tmp_path / "empty", tmp_path)
