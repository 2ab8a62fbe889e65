"""The chain from the data to the endpoint: it holds as the steps left it, and one changed byte anywhere is named."""

import hashlib
import json
import re
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_bundle import write_dataset

from cadx.bundle import Bundle
from cadx.datasets import read_splits, write_splits
from cadx.drift import STATISTICS
from cadx.files import digest_path
from cadx.signing import Review, check_signature, objection, sign, signature_of, write_review
from components import CODE, code_digests
from components.calibrate import calibrate
from components.evaluate import evaluate
from components.gate import GateParams, gate
from components.imbalance import imbalance
from components.package import package
from components.train import train
from pipelines.verification import verify
from serving.management import Management
from serving.server import TorchServe, free_ports

PARAMS = {
    "imbalance": {},
    "train": {
        "model": {"family": "resnet", "width": 0.125},
        "preprocessing": {"height_px": 32, "width_px": 32},
        "epochs": 1,
        "batch_size": 32,
    },
    "calibrate": {"sensitivity": 0.9},
    "evaluate": {"split": "test", "resamples": 20, "minimum_n": 5},
    "gate": {"at_least": {"auc": 0.01}},
    "package": {"name": "squares-model"},
}


def make_key(folder: Path, name: str = "key") -> tuple[Path, Path]:
    """A private and a public key, as the documentation says that they are made."""
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    curve = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", str(private)]
    subprocess.run(curve, check=True, capture_output=True)
    subprocess.run(
        ["openssl", "ec", "-in", str(private), "-pubout", "-out", str(public)],
        check=True,
        capture_output=True,
    )
    return private, public


class Chain:
    """An experiment as the stages leave it, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.work, self.reports = folder / "work", folder / "reports"
        self.made, self.told = self.work / "squares" / "0", self.reports / "squares" / "0"
        self.bundle, self.archive = self.made / "bundle", self.made / "model.mar"
        self.decision = self.told / "decision.json"

    def make(self) -> None:
        home = self.work / "squares"
        dataset, splits = write_dataset(home)
        (self.folder / "params.yaml").write_text(yaml.safe_dump({"squares": PARAMS}))
        params = f"{self.folder / 'params.yaml'}:squares"
        self.told.mkdir(parents=True)
        content = {
            "schema": 1,
            "dataset": digest_path(dataset / "dataset.json"),
            "rules": [],
            "quarantined": [],
        }
        validation = self.reports / "squares" / "validation.json"
        validation.write_text(json.dumps(content))
        weights = self.reports / "squares" / "imbalance.json"
        imbalance(
            dataset=dataset,
            splits=splits,
            imbalance=weights,
            report=self.told.parent / "i.html",
            params=params,
        )
        train(
            dataset=dataset, splits=splits, imbalance=weights, checkpoints=self.made / "checkpoints",
            trained=self.made / "trained", log=self.told / "training.jsonl", experiment="squares", seed=0,
            params=params,
        )  # fmt: skip
        calibrate(
            dataset=dataset, splits=splits, trained=self.made / "trained", bundle=self.bundle, params=params
        )
        numbers = {"predictions": self.told / "predictions.parquet", "metrics": self.told / "metrics.json"}
        evaluate(
            dataset=dataset, splits=splits, bundle=self.bundle, test_uses=self.told / "test_uses.jsonl", **numbers,
            report=self.told / "report.html", params=params,
        )  # fmt: skip
        metrics = numbers["metrics"]
        gate(
            metrics=metrics, bundle=self.bundle, decision=self.decision, dataset=dataset, splits=splits,
            validation=validation, params=params,
        )  # fmt: skip
        package(
            bundle=self.bundle, decision=self.decision, metrics=metrics, archive=self.archive,
            card=self.told / "card.html", params=params,
        )  # fmt: skip

    def verify(self, target: str = "squares", **given: object) -> bool:
        given = {"params": self.folder / "params.yaml"} | given
        return verify(target, work=self.work, reports=self.reports, **given)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    chain = Chain(tmp_path_factory.mktemp("chain"))
    chain.make()
    return chain


@pytest.fixture
def chain(pristine: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """A copy that may be damaged."""
    monkeypatch.setenv("COLUMNS", "500")  # of the table that is printed
    shutil.copytree(pristine.folder, tmp_path / "copy")
    return Chain(tmp_path / "copy")


def flip(path: Path, where: float = 0.5) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def broken(output: str) -> list[str]:
    return [line for line in output.splitlines() if re.search(r"\bbroken\b.*│", line)]


def test_what_the_steps_leave_holds_from_the_data_to_the_archive(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = make_key(chain.folder)
    sign(chain.bundle, private, signature_of(chain.bundle))
    assert chain.verify(public_key=public)
    said = capsys.readouterr().out
    assert not broken(said)
    links = "data split code parameters weights bundle signature metrics decision archive"
    for link in links.split():
        assert re.search(rf"│ ok +│ {link} ", said), link
    assert re.search(r"not at hand +│ endpoint ", said)


WHERE = [
    "work/squares/dataset/dataset.json", "work/squares/dataset/samples.parquet",
    "work/squares/dataset/shards/00000.safetensors", "work/squares/splits.parquet", "reports/squares/validation.json",
    "work/squares/0/bundle/bundle.json",
    "work/squares/0/bundle/weights/0.safetensors", "work/squares/0/bundle/sbom.json",
    "work/squares/0/bundle/heldout.parquet", "reports/squares/0/predictions.parquet", "reports/squares/0/metrics.json",
    "reports/squares/0/decision.json", "work/squares/0/model.mar",
]  # fmt: skip


@pytest.mark.parametrize("name", WHERE)
@pytest.mark.parametrize("where", [0.0, 0.37, 1.0])
def test_one_changed_byte_is_named(
    chain: Chain, name: str, where: float, capsys: pytest.CaptureFixture[str]
) -> None:
    flip(chain.folder / name, where)
    assert not chain.verify()
    lines = broken(capsys.readouterr().out)
    assert any(Path(name).name in line or name in line for line in lines), lines


def test_every_file_of_the_dataset_and_of_the_bundle_is_named(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = (chain.work / "squares" / "dataset", chain.bundle)
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    assert len(files) >= 8
    for path in files:
        flip(path, 0.61)
        assert not chain.verify(), path
        lines = broken(capsys.readouterr().out)
        assert any(path.name in line for line in lines), (path, lines)
        flip(path, 0.61)
    assert chain.verify()


def test_every_file_inside_an_archive_is_named(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    with zipfile.ZipFile(chain.archive) as opened:
        members = {info.filename: info for info in opened.infolist()}
    content = chain.archive.read_bytes()
    for name, info in members.items():
        at = info.header_offset + 30 + len(name) + info.file_size // 2
        damaged = bytearray(content)
        damaged[at] ^= 1
        chain.archive.write_bytes(damaged)
        assert not chain.verify(str(chain.archive)), name
        lines = broken(capsys.readouterr().out)
        assert any(Path(name).name in line for line in lines), (name, lines)
        if name == "bundle/bundle.json":  # where it lies, and not where it was unpacked
            assert any(f"{chain.archive.name}:bun" in line for line in lines), lines


def test_a_release_that_says_otherwise_than_its_decision_is_named(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """Packed anew by somebody who knows how: every checksum of the file is right."""
    with zipfile.ZipFile(chain.archive) as opened:
        members = [(info, opened.read(info)) for info in opened.infolist()]
    with zipfile.ZipFile(chain.archive, "w") as rewritten:
        for info, content in members:
            if info.filename == "release.json":
                content = content.replace(b'"name": "squares-model"', b'"name": "squares-modem"')
            rewritten.writestr(info, content)
    assert not chain.verify()
    assert any("its name is not that" in line for line in broken(capsys.readouterr().out))


def test_other_parameters_and_other_code_are_named(
    chain: Chain, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = PARAMS | {"train": PARAMS["train"] | {"epochs": 2}}
    (chain.folder / "params.yaml").write_text(yaml.safe_dump({"squares": changed}))
    assert not chain.verify()
    assert any("squares.train there" in line for line in broken(capsys.readouterr().out))

    (chain.folder / "params.yaml").write_text(yaml.safe_dump({"squares": PARAMS}))
    for name in Bundle(chain.bundle).manifest.provenance.sources:
        (chain.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(__file__).parent.parent / name, chain.folder / name)
    monkeypatch.setattr("pipelines.verification.ROOT", chain.folder)
    assert chain.verify()
    flip(chain.folder / "cadx/losses.py")
    assert not chain.verify()
    lines = broken(capsys.readouterr().out)
    assert len(lines) == 1
    assert "cadx/losses.py" in lines[0]


def test_what_a_stage_read_and_wrote_is_held_against_the_lock(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bounds of the gate and html pages have no other witness."""

    def held(path: Path) -> dict[str, str]:
        md5 = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        return {"path": path.relative_to(chain.folder).as_posix(), "md5": md5}

    code = code_digests()["gate"]
    metrics, report = chain.told / "metrics.json", chain.told / "report.html"
    folder = {"path": "work/squares/dataset", "md5": "0" * 32 + ".dir"}
    stages = {
        "evaluate@squares-0": {
            "deps": [folder],
            "outs": [held(metrics), held(report)],
            "params": {str(CODE): {"evaluate": code_digests()["evaluate"]}},
        },
        "gate@squares-0": {
            "deps": [held(metrics)],
            "outs": [held(chain.decision)],
            "params": {str(CODE): {"gate": code}, "params.yaml": {"squares.gate": PARAMS["gate"]}},
        },
        "gate@squares-1": {"deps": [{"path": "gone.json", "md5": "0" * 32}], "outs": []},
    }
    lock = chain.folder / "dvc.lock"
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    assert chain.verify(lock=lock)
    assert "2 stages: code, parameters and 3 files as they ran" in capsys.readouterr().out

    (chain.folder / "params.yaml").write_text(
        yaml.safe_dump({"squares": PARAMS | {"gate": {"at_least": {"auc": 0.001}}}})
    )
    flip(report)
    assert not chain.verify(lock=lock)
    first, second = broken(capsys.readouterr().out)
    assert "report.html" in first
    assert "changed since evaluate@squares-0 ran" in first
    assert "params.yaml:squares.gate" in second
    assert "changed since gate@squares-0 ran" in second


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\nstages: {\n=======\n", "[]\n", "schema: '2.0'\n"])
def test_a_lock_that_cannot_be_read_is_a_broken_link(
    chain: Chain, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    lock = chain.folder / "dvc.lock"
    lock.write_text(text)
    assert not chain.verify(lock=lock)
    (line,) = broken(capsys.readouterr().out)
    assert "no lock of DVC's" in line


def test_code_that_was_edited_since_a_stage_ran_is_named_by_its_step(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = chain.folder / "dvc.lock"
    ran: dict[str, Any] = {"outs": [], "params": {str(CODE): {"gate": "sha256:" + "0" * 64}}}
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": {"gate@squares-0": ran}}))
    assert not chain.verify(lock=lock)
    (line,) = broken(capsys.readouterr().out)
    assert "code of gate" in line
    assert "changed since gate@squares-0 ran" in line

    del ran["params"]
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": {"gate@squares-0": ran}}))
    assert chain.verify(lock=lock)
    assert "does not say by what code gate@squares-0 ran" in capsys.readouterr().out


def test_a_leaking_split_is_refused_though_every_digest_holds(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained with it, too: then no digest tells."""
    splits = chain.work / "squares" / "splits.parquet"
    frame = read_splits(splits)
    frame.loc[frame["sample_id"] == "s0000", "split"] = "test"
    write_splits(splits, frame)
    manifest = json.loads((chain.bundle / "bundle.json").read_text())
    manifest["provenance"]["splits"] = digest_path(splits)
    (chain.bundle / "bundle.json").write_text(json.dumps(manifest))
    alone = chain.folder / "alone" / "bundle"
    shutil.copytree(chain.bundle, alone)
    assert not chain.verify(str(alone), dataset=chain.work / "squares/dataset", splits=splits)
    (line,) = broken(capsys.readouterr().out)
    assert "1 patients in more than one split" in line
    assert "pseudonym" not in line


def test_a_quarantined_image_in_a_split_is_refused(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    validation = chain.reports / "squares" / "validation.json"
    content = json.loads(validation.read_text()) | {
        "quarantined": [{"sample_id": "s0001", "reason": "blank"}]
    }
    validation.write_text(json.dumps(content))
    assert not chain.verify()
    assert any("1 quarantined images" in line for line in broken(capsys.readouterr().out))


def test_a_bundle_alone_is_verified_as_far_as_it_goes(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(chain.bundle, tmp_path / "elsewhere" / "bundle")
    assert chain.verify(str(tmp_path / "elsewhere" / "bundle"))
    assert "not at hand" in capsys.readouterr().out
    with pytest.raises(ValueError, match="no bundle, no archive, and no experiment"):
        chain.verify("circles")


def test_an_archive_on_its_own_is_held_against_the_signature_beside_it(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a hospital gets: one file, its signature and a public key; no bundle, no reports."""
    private, public = make_key(tmp_path)
    alone = tmp_path / "received" / "model.mar"
    alone.parent.mkdir()
    shutil.copy(chain.archive, alone)
    before = alone.read_bytes()
    sign(alone, private, signature_of(alone))
    assert alone.read_bytes() == before, "an archive holds no signature: equal inputs give equal bytes"
    assert chain.verify(str(alone), public_key=public)
    assert "model.mar.sig" in capsys.readouterr().out
    flip(alone, 0.9)
    assert not chain.verify(str(alone), public_key=public)
    assert any("model.mar.sig" in line for line in broken(capsys.readouterr().out))


def test_an_archive_and_its_decision_hold_without_the_parameters_that_name_the_model(
    chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = tmp_path / "received" / "model.mar"
    alone.parent.mkdir()
    shutil.copy(chain.archive, alone)
    assert chain.verify(str(alone), decision=chain.decision, params=None), broken(capsys.readouterr().out)


def test_a_signature_holds_for_these_bytes_and_this_key_alone(chain: Chain) -> None:
    private, public = make_key(chain.folder)
    _, other = make_key(chain.folder, "other")
    signature = signature_of(chain.bundle)
    sign(chain.bundle, private, signature)
    assert check_signature(chain.bundle, signature, public) == ""
    assert check_signature(chain.bundle, signature, other) == "signed with another key"
    assert not chain.verify(public_key=other)
    flip(chain.bundle / "history.json")
    assert check_signature(chain.bundle, signature, public) == "not as it was signed: history.json"
    flip(chain.bundle / "history.json")
    flip(signature)
    assert check_signature(chain.bundle, signature, public)
    assert Bundle(chain.bundle), "a signature stands beside a bundle, which holds only what it names"
    for key, message in ((public, "no private key"), (chain.folder / "none.pem", "no such key")):
        with pytest.raises(ValueError, match=message):
            sign(chain.bundle, key, signature)


def test_a_review_counts_if_a_known_reviewer_signed_these_very_words(chain: Chain) -> None:
    private, public = make_key(chain.folder)
    review = Review(
        bundle=Bundle(chain.bundle).digest,
        metrics=digest_path(chain.told / "metrics.json"),
        reviewer="Dr. Rey",
        statement="May be used.",
    )
    write_review(chain.told / "review", review, private)
    assert objection(chain.told / "review", {"Dr. Rey": public.read_text()}) == ""
    assert "is not among" in objection(chain.told / "review", {"Dr. Who": public.read_text()})
    assert "another key" in objection(
        chain.told / "review", {"Dr. Rey": make_key(chain.folder, "other")[1].read_text()}
    )
    words = chain.told / "review" / "review.json"
    words.write_text(words.read_text().replace("May be", "May not be"))
    assert objection(chain.told / "review", {"Dr. Rey": public.read_text()})


def test_a_sign_off_that_is_lost_is_told(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    private, public = make_key(chain.folder)
    metrics, review = chain.told / "metrics.json", chain.told / "review"
    words = Review(
        bundle=Bundle(chain.bundle).digest,
        metrics=digest_path(metrics),
        reviewer="Dr. Rey",
        statement="Read.",
    )
    write_review(review, words, private)
    asked = PARAMS["gate"] | {"reviewers": {"Dr. Rey": public.read_text()}}
    gate(
        metrics=metrics,
        bundle=chain.bundle,
        decision=chain.decision,
        review=review,
        params=GateParams(**asked),
    )
    (chain.folder / "params.yaml").write_text(yaml.safe_dump({"squares": PARAMS | {"gate": asked}}))

    def told() -> str:
        chain.verify()
        (line,) = (line for line in capsys.readouterr().out.splitlines() if "│ review" in line)
        return line

    assert "signed by Dr. Rey" in told()
    shutil.rmtree(review)
    line = told()
    assert "not at hand" in line
    assert "no review given, but decision.json names Dr. Rey as reviewer" in line


def log_answers(folder: Path, *records: dict[str, Any]) -> Path:
    """A request log of these answers, and a line that was cut short."""
    log = folder / "request_log" / "unwatched" / "20261130T0800-7.jsonl"
    log.parent.mkdir(parents=True)
    log.write_text("".join(json.dumps(record) + "\n" for record in records) + '{"prediction_id": "cut')
    return folder / "request_log"


def test_an_answer_of_the_past_is_held_against_the_bundle_that_it_names(
    chain: Chain, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {
        "schema_version": 1, "prediction_id": "a" * 32, "time": "2026-11-30T08:00:00.000Z", "model": "squares-model",
        "version": "1.0", "bundle": Bundle(chain.bundle).digest, "site": "Clinic [/North]", "scanner": "",
        "statistics": dict.fromkeys(STATISTICS, 0.5), "embedding": [], "probabilities": {"square": 0.9},
        "decision": "square", "warnings": ["assumed spacing"],
    }  # fmt: skip
    other = answer | {"prediction_id": "b" * 32, "bundle": f"sha256:{'0' * 64}", "decision": []}
    foreign = answer | {"prediction_id": "c" * 32, "bundle": None}
    log = log_answers(chain.folder, other, answer, foreign)
    assert chain.verify(prediction="a" * 32, request_log=log)
    said = capsys.readouterr().out
    assert re.search(r"│ ok +│ prediction +│ \S+7\.jsonl: line 2 ", said)
    assert (
        "2026-11-30T08:00:00.000Z, squares-model 1.0; called square; site Clinic [/North]; assumed spacing"
        in said
    )
    assert chain.verify(prediction="b" * 32, request_log=log)
    said = capsys.readouterr().out
    assert re.search(
        r"not at hand +│ prediction .*called nothing; site Clinic \[/North\]; assumed spacing, from another bundle",
        said,
    )
    assert not chain.verify(prediction="c" * 32, request_log=log)
    assert "line 3 is not of the log's form" in broken(capsys.readouterr().out)[0]
    assert chain.verify(prediction="d" * 32, request_log=log)
    assert re.search(r"not at hand +│ prediction .*has this prediction_id", capsys.readouterr().out)
    with pytest.raises(ValueError, match="request_log: give --prediction too"):
        chain.verify(request_log=log)


@pytest.mark.parametrize(
    ("prediction", "log", "message"),
    [
        ("a patient's name", ".", "prediction: no prediction_id; give the 32 hexadecimal digits"),
        ("a" * 32, "nowhere", "no such folder; give the server's request log"),
    ],
)
def test_what_is_no_prediction_or_no_log_is_refused(
    chain: Chain, prediction: str, log: str, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        chain.verify(prediction=prediction, request_log=chain.folder / log)
    assert "patient" not in str(caught.value)


@pytest.mark.slow
def test_a_server_is_asked_which_bundle_answers(chain: Chain, capsys: pytest.CaptureFixture[str]) -> None:
    server = TorchServe(chain.folder / "served", free_ports())
    server.model_store.mkdir(parents=True)
    shutil.copy(chain.archive, server.model_store / "squares.mar")
    with server:
        Management(server.management, key_file=server.key_file).register("squares.mar", workers=1)
        at = {"endpoint": server.inference, "key_file": server.key_file}
        assert chain.verify(**at)
        assert re.search(r"│ ok +│ endpoint ", capsys.readouterr().out)
        evidence = chain.folder / "other" / "bundle"
        shutil.copytree(chain.bundle, evidence)
        manifest = json.loads((evidence / "bundle.json").read_text())
        (evidence / "bundle.json").write_text(json.dumps(manifest))  # the same in other words: another bundle
        given = {"dataset": chain.work / "squares/dataset", "archive": chain.archive}
        assert not chain.verify(str(evidence), **given, **at)
        assert any("from another bundle" in line for line in broken(capsys.readouterr().out))
        # Of an experiment's seeds one is served.
        shutil.copytree(evidence, chain.work / "squares/1/bundle")
        shutil.copy(chain.archive, chain.work / "squares/1/model.mar")
        chain.verify(**at)
        said = capsys.readouterr().out
        assert len(re.findall(r"│ ok +│ endpoint ", said)) == 1
        assert len(re.findall(r"│ not at hand +│ endpoint ", said)) == 1
        assert Bundle(chain.bundle).digest.removeprefix("sha256:")[:12] in said
        shutil.rmtree(chain.work / "squares/1")
    assert not chain.verify(**at)
    assert any("the server has it while it runs" in line for line in broken(capsys.readouterr().out))
