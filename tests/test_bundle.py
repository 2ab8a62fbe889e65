"""What a bundle holds, that it never changes unnoticed, and that the same inputs give the same bytes.

The small cohort and the briefly trained network that the tests of prediction, calibration and evaluation
share are made here.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cadx.bundle import Bundle, Manifest, OperatingPoint, Provenance, versions, write_bundle
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo, read_splits, write_splits
from cadx.drift import image_statistics
from cadx.files import digest_bytes, digest_path
from cadx.models import ResNetConfig
from cadx.transforms import Preprocessing

SIZE_PX = 32
CLASSES = {
    "binary": ("normal", "opacity"),
    "multiclass": ("normal", "opacity", "stripe"),
    "multilabel": ("opacity", "stripe"),
}
NUM = {"train": 96, "val": 48, "calibration": 48, "test": 60}


def draw(rng: np.random.Generator, opacity: bool, stripe: bool) -> np.ndarray:
    """A noisy image; an opacity is a bright square, not quite out of the noise."""
    pixels = rng.normal(90, 22, (SIZE_PX, SIZE_PX))
    if opacity:
        row, column = rng.integers(0, SIZE_PX - 9, 2)
        pixels[row : row + 9, column : column + 9] += rng.uniform(4, 40)
    if stripe:
        row = rng.integers(0, SIZE_PX - 2)
        pixels[row : row + 2] += rng.uniform(30, 90)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def write_dataset(folder: Path, task: str = "binary", *, clustered: bool = True) -> tuple[Path, Path]:
    """A dataset and its splits: two images a patient if clustered, two sites, ages partly unknown."""
    rng = np.random.default_rng(7)
    classes = CLASSES[task]
    splits = []
    with DatasetWriter(
        folder / "dataset",
        name="squares",
        task=task,
        classes=classes,
        positive="opacity" if task == "binary" else None,
        modality="chest X-ray",
        clustered=clustered,
        source=SourceInfo(title="Squares in noise", licence="CC0", citation="none, made for tests"),
    ) as writer:
        for number, split in enumerate(name for name, count in NUM.items() for _ in range(count)):
            opacity, stripe = bool(rng.random() < 0.4), bool(rng.random() < 0.4) and task != "binary"
            if task == "multiclass" and stripe:
                opacity = False
            pixels = draw(rng, opacity, stripe)
            findings = {"normal": not opacity and not stripe, "opacity": opacity, "stripe": stripe}
            patient = number // 2 if clustered else number
            writer.add(
                Sample(
                    sample_id=f"s{number:04d}",
                    pixels=pixels,
                    labels={name: float(findings[name]) for name in classes},
                    patient=f"pseudonym-{patient:04d}",
                    sha256=digest_bytes(pixels.tobytes()),
                    site=("north", "south")[patient % 2],
                    scanner="",
                    age=float("nan") if patient % 5 == 0 else 20.0 + patient % 70,
                    sex="FM"[patient % 2],
                    statistics=image_statistics(pixels),
                    assumptions=("pixel values were taken as linear",),
                )
            )
            splits.append((f"s{number:04d}", split, ""))
    write_splits(folder / "splits.parquet", pd.DataFrame(splits, columns=["sample_id", "split", "reason"]))
    return folder / "dataset", folder / "splits.parquet"


def train_bundle(
    path: Path, dataset: Path, splits: Path, *, seed: int = 0, steps: int = 25, members: int = 1
) -> Path:
    """A bundle without temperature and operating point, of a network that saw a few batches."""
    folder, assigned = DatasetFolder(dataset), read_splits(splits)
    ids = assigned.loc[assigned["split"] == "train", "sample_id"].tolist()
    preprocessing = Preprocessing(height_px=SIZE_PX, width_px=SIZE_PX, mean=0.35, std=0.1)
    model = ResNetConfig(depth=18, width=0.25, stem="small")
    images = torch.stack([preprocessing.apply(folder.pixels(i)) for i in ids])
    labels = torch.from_numpy(folder.labels(ids))
    states = []
    for member in range(members):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + 1000 * member)
            network = model.build(len(folder.info.classes), 1)
            optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
            for _ in range(steps):
                batch = torch.randint(len(ids), (24,))
                logits = network(images[batch]).logits
                if folder.info.task == "multilabel":
                    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels[batch])
                else:
                    loss = torch.nn.functional.cross_entropy(logits, labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        states.append(network.state_dict())
    info = folder.info
    manifest = Manifest(
        experiment="squares",
        seed=seed,
        task=info.task,
        classes=info.classes,
        positive=info.positive,
        modality=info.modality,
        model=model,
        preprocessing=preprocessing,
        clustered=info.clustered,
        source=info.source,
        assumptions=info.assumptions,
        provenance=Provenance(
            dataset=digest_path(dataset / "dataset.json"),
            splits=digest_path(splits),
            parameters=digest_bytes(b"{}"),
            code=digest_bytes(b"code"),
            seed=seed,
            versions=versions(),
        ),
    )
    reference = folder.samples.iloc[folder.rows(ids)]
    write_bundle(
        path,
        manifest,
        states,
        reference,
        history=[{"member": 0, "epoch": 1, "train_loss": 0.5, "val_loss": 0.6}],
    )
    return path


def operating_point(**thresholds: float) -> OperatingPoint:
    return OperatingPoint(
        target_metric="sensitivity", target_value=0.9, thresholds=thresholds, split="calibration", n=48
    )


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_dataset(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def trained(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bundle(tmp_path_factory.mktemp("bundles") / "trained", *cohort, steps=1)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return shutil.copytree(trained, tmp_path / "copy")


def test_the_same_training_gives_the_same_bytes(
    trained: Path, cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    again = train_bundle(tmp_path / "again", *cohort, steps=1)
    assert digest_path(again) == digest_path(trained)
    assert Bundle(again).digest == Bundle(trained).digest


def test_networks_answer_as_they_did_before_they_were_written(trained: Path) -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    (network,) = Bundle(trained).networks()
    assert torch.equal(before, torch.random.get_rng_state()), (
        "opening a bundle disturbs the caller's generator"
    )
    assert not network.training
    (again,) = Bundle(trained).networks()
    image = torch.rand(2, 1, SIZE_PX, SIZE_PX)
    assert torch.equal(network(image).logits, again(image).logits)


def test_the_digest_is_that_of_the_manifest_file(trained: Path) -> None:
    assert Bundle(trained).digest == digest_bytes((trained / "bundle.json").read_bytes())


@pytest.mark.parametrize("file", ["weights/0.safetensors", "reference.parquet", "history.json"])
def test_one_changed_byte_is_named(copy: Path, file: str) -> None:
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(ValueError, match=f"changed since it was written: {file}") as caught:
        Bundle(copy)
    assert "\n" not in str(caught.value)


def test_a_changed_manifest_is_another_bundle(copy: Path, trained: Path) -> None:
    file = copy / "bundle.json"
    file.write_text(file.read_text().replace('"experiment": "squares"', '"experiment": "circles"'))
    assert Bundle(copy).digest != Bundle(trained).digest


def test_missing_and_foreign_files_are_named(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"foreign notes\.txt"):
        Bundle(copy)
    (copy / "notes.txt").unlink()
    (copy / "weights" / "0.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing weights/0\.safetensors"):
        Bundle(copy)


def test_a_folder_that_is_no_bundle_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no bundle\.json there"):
        Bundle(tmp_path)
    with pytest.raises(ValueError, match=r"no bundle\.json there"):
        Bundle(tmp_path / "nowhere")
    (tmp_path / "bundle.json").write_text("{")
    with pytest.raises(ValueError, match="no manifest of this version") as caught:
        Bundle(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("file", ["../weights/0.safetensors", "/etc/hostname", "weights/../../x.safetensors"])
def test_weights_outside_of_the_folder_are_refused(copy: Path, file: str) -> None:
    content = json.loads((copy / "bundle.json").read_text())
    content["weights"][0]["file"] = file
    (copy / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"weights\.0\.file"):
        Bundle(copy)


def test_complete_writes_another_bundle_and_leaves_the_first(trained: Path, tmp_path: Path) -> None:
    before = digest_path(trained)
    Bundle(trained).complete(
        tmp_path / "final", temperature=1.5, operating_point=operating_point(opacity=0.3)
    )
    assert digest_path(trained) == before
    final = Bundle(tmp_path / "final")
    assert final.is_complete
    assert final.manifest.temperature == 1.5
    assert final.manifest.operating_point.thresholds == {"opacity": 0.3}
    assert final.manifest.files == Bundle(trained).manifest.files
    with pytest.raises(ValueError, match=r"no heldout\.parquet.* run `cadx calibrate`"):
        final.heldout()


def heldout_answers(classes: tuple[str, ...], *, multilabel: bool = False) -> pd.DataFrame:
    rng = np.random.default_rng(5)
    frame = pd.DataFrame(rng.random((7, len(classes))), columns=[f"prob_{name}" for name in classes])
    if multilabel:
        frame[[f"decision_{name}" for name in classes]] = rng.random((7, len(classes))) < 0.5
    else:
        frame["decision"] = rng.choice(classes, 7).astype(object)
    frame["site"], frame["scanner"] = "north", ""
    frame["embedding"] = list(rng.normal(size=(7, 5)).astype(np.float32))
    return frame


def complete(trained: Path, path: Path, heldout: pd.DataFrame) -> Bundle:
    point = operating_point(opacity=0.3)
    Bundle(trained).complete(path, temperature=1.0, operating_point=point, heldout=heldout)
    return Bundle(path)


def test_held_out_answers_come_back_in_order_rounded_and_without_names(trained: Path, tmp_path: Path) -> None:
    answers = heldout_answers(CLASSES["binary"])
    named = answers.assign(sample_id="s0001", patient="pseudonym-0001")
    final = complete(trained, tmp_path / "final", named)
    read = final.heldout()
    assert list(read) == ["prob_normal", "prob_opacity", "decision", "site", "scanner", "embedding"]
    np.testing.assert_array_equal(read["prob_opacity"], answers["prob_opacity"].round(6))
    assert read["decision"].tolist() == answers["decision"].tolist()
    found = np.stack(read["embedding"].to_list())
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.stack(answers["embedding"].to_list()), rtol=0, atol=0.51e-4)
    np.testing.assert_array_equal(found, found.round(4))
    content = (tmp_path / "final" / "heldout.parquet").read_bytes()
    assert b"pseudonym-" not in content
    assert b"sample_id" not in content


def test_equal_answers_give_equal_bytes(trained: Path, tmp_path: Path) -> None:
    answers = heldout_answers(CLASSES["binary"])
    nearly = answers.assign(prob_opacity=answers["prob_opacity"].round(6) + 1e-9)
    for name, frame in (("a", answers), ("b", nearly.set_index(answers.index + 100))):
        complete(trained, tmp_path / name, frame)
    assert digest_path(tmp_path / "a") == digest_path(tmp_path / "b")


def test_changed_and_missing_held_out_answers_are_named(trained: Path, tmp_path: Path) -> None:
    file = complete(trained, tmp_path / "final", heldout_answers(CLASSES["binary"])).path / "heldout.parquet"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"changed since it was written: heldout\.parquet"):
        Bundle(tmp_path / "final")
    file.unlink()
    with pytest.raises(ValueError, match=r"missing heldout\.parquet"):
        Bundle(tmp_path / "final")


def test_multilabel_answers_keep_a_decision_for_each_class(tmp_path: Path) -> None:
    trained = train_bundle(tmp_path / "trained", *write_dataset(tmp_path, "multilabel"), steps=1)
    answers = heldout_answers(CLASSES["multilabel"], multilabel=True)
    read = complete(trained, tmp_path / "final", answers).heldout()
    for name in CLASSES["multilabel"]:
        assert read[f"decision_{name}"].tolist() == answers[f"decision_{name}"].tolist()


def test_answers_that_lack_a_column_leave_no_bundle(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="prob_normal"):
        complete(trained, tmp_path / "final", heldout_answers(("opacity", "stripe")))
    assert list(tmp_path.iterdir()) == []


def test_a_bundle_of_the_first_version_still_opens_and_is_completed_as_one_of_this(
    copy: Path, tmp_path: Path
) -> None:
    content = json.loads((copy / "bundle.json").read_text())
    assert content.pop("schema_version") == 3
    del content["heldout"]
    (copy / "bundle.json").write_text(json.dumps({"schema_version": 1, **content}))
    assert Bundle(copy).networks()
    final = complete(copy, tmp_path / "final", heldout_answers(CLASSES["binary"]))
    assert final.manifest.schema_version == 3
    assert len(final.heldout()) == 7


def test_a_complete_bundle_never_changes(trained: Path, tmp_path: Path) -> None:
    point = operating_point(opacity=0.3)
    Bundle(trained).complete(tmp_path / "final", temperature=1.0, operating_point=point)
    with pytest.raises(ValueError, match="complete and never changes"):
        Bundle(tmp_path / "final").complete(tmp_path / "more", temperature=2.0, operating_point=point)
    assert not (tmp_path / "more").exists()


def test_a_threshold_for_an_unknown_class_is_refused(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown classes"):
        Bundle(trained).complete(tmp_path / "x", temperature=1.0, operating_point=operating_point(cancer=0.3))
    assert not (tmp_path / "x").exists()


def test_the_reference_is_the_training_split_and_nothing_of_a_patient(
    trained: Path, cohort: tuple[Path, Path]
) -> None:
    reference = Bundle(trained).reference()
    assert len(reference) == NUM["train"]
    assert {column for column in reference if not column.startswith("stat_")} == {"site", "scanner"}
    samples = DatasetFolder(cohort[0]).samples
    np.testing.assert_allclose(reference["stat_mean"], samples["stat_mean"][: NUM["train"]], atol=1e-6)
    whole = b"".join(file.read_bytes() for file in trained.rglob("*") if file.is_file())
    assert b"pseudonym-" not in whole


def test_a_bundle_does_not_remember_where_training_started_from(trained: Path, tmp_path: Path) -> None:
    bundle = Bundle(trained)
    model = bundle.manifest.model.model_copy(update={"pretrained": Path("/srv/secret/resnet.safetensors")})
    manifest = bundle.manifest.model_copy(update={"model": model})
    write_bundle(tmp_path / "b", manifest, [n.state_dict() for n in bundle.networks()], bundle.reference())
    assert "secret" not in (tmp_path / "b" / "bundle.json").read_text()
    assert Bundle(tmp_path / "b").networks()


def test_a_folder_half_written_is_not_there(trained: Path, tmp_path: Path) -> None:
    bundle = Bundle(trained)
    with pytest.raises(AttributeError):
        write_bundle(tmp_path / "b", bundle.manifest, [{"weight": None}], bundle.reference())
    assert list(tmp_path.iterdir()) == []
