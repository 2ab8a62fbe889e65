"""What goes into service: an archive that is the same wherever it is packed, and a card that hides nothing."""

import html
import json
import re
import shutil
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from test_evaluate import Run, prepare

from cadx.bundle import Bundle
from cadx.checklists import CLAIM, TRIPOD_AI
from cadx.files import digest_path, write_json
from cadx.reporting import LEGEND, MARK
from components.gate import GateParams, gate
from components.package import PackageParams, package
from serving.archive import read_release


class Packed:
    """A bundle, judged and ready to be packed."""

    def __init__(self, run: Run, folder: Path) -> None:
        self.bundle, self.metrics, self.decision = (
            run.bundle,
            folder / "metrics.json",
            folder / "decision.json",
        )
        self.record = run.evaluate(folder, split="test", minimum_n=5)

    def judge(self, **bounds: dict[str, float]) -> None:
        params = GateParams(at_least=bounds)
        gate(metrics=self.metrics, bundle=self.bundle, decision=self.decision, params=params)

    def package(self, out: Path, **params: object) -> Path:
        package(
            bundle=self.bundle,
            decision=self.decision,
            metrics=self.metrics,
            archive=out / "model.mar",
            card=out / "card.html",
            params=PackageParams(**params),
        )
        return out / "model.mar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    folder = tmp_path_factory.mktemp("run")
    made = Packed(prepare(folder), folder / "scored")
    made.judge(auc=0.01)
    return made


def test_the_same_model_gives_the_same_bytes_in_another_folder(packed: Packed, tmp_path: Path) -> None:
    one, other = packed.package(tmp_path / "a"), packed.package(tmp_path / "elsewhere" / "b")
    assert one.read_bytes() == other.read_bytes()
    assert (tmp_path / "a/card.html").read_bytes() == (tmp_path / "elsewhere/b/card.html").read_bytes()


def test_the_archive_holds_the_very_bundle_and_names_what_it_rests_on(packed: Packed, tmp_path: Path) -> None:
    archive = packed.package(tmp_path)
    with zipfile.ZipFile(archive) as opened:
        opened.extractall(tmp_path / "unpacked")
    inside = Bundle(tmp_path / "unpacked" / "bundle")
    release = read_release(archive)
    assert inside.digest == Bundle(packed.bundle).digest == release.bundle
    assert release.version == inside.digest.removeprefix("sha256:")[:12]
    assert release.metrics == digest_path(packed.metrics)
    assert release.decision.promote


def test_the_card_states_every_number_with_its_interval(packed: Packed, tmp_path: Path) -> None:
    packed.package(tmp_path, limits=("Not for children.",), contact="the physics group")
    card = (tmp_path / "card.html").read_text()
    for name in ("auc", "sensitivity", "specificity"):
        e = packed.record["metrics"][name]
        assert f"{e['value']:.3f} ({e['low']:.3f} to {e['high']:.3f})" in card, name
        assert (f"to {e['high']:.3f}) {MARK}" in card) or "too few" not in e["method"], name
    assert LEGEND in card
    assert all(f"<td>{html.escape(e['method'])}</td>" in card for e in packed.record["metrics"].values())
    assert Bundle(packed.bundle).digest in card
    assert digest_path(tmp_path / "model.mar") in card
    assert "Not for children." in card
    assert "the physics group" in card
    assert "Passed the gate" in card
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", card), "a card is read on closed networks"


def test_the_card_fills_in_what_a_paper_must_report_and_lists_what_is_missing(
    packed: Packed, tmp_path: Path
) -> None:
    packed.package(tmp_path, intended_use="Finds squares.")
    card = (tmp_path / "card.html").read_text()
    for name, checklist, by_people in (
        ("CLAIM, 2024 update", CLAIM, {"2", "4", "5", "8", "15", "16", "17", "18", "34", "42", "44"}),
        ("TRIPOD+AI", TRIPOD_AI, {"2", "3a", "5b", "6b", "8b", "8c", "17", "18a", "18b", "18c", "18d", "19"}),
    ):
        listed = re.search(rf"{re.escape(name)}: (\d+) of {len(checklist)} items; missing: ([^.]+)\.", card)
        assert listed, name
        missing = listed[2].split(", ")
        assert by_people <= set(missing), "no run knows these"
        assert int(listed[1]) == len(checklist) - len(missing) > len(checklist) / 2
        assert all(item.number in missing for item in checklist if not item.facts)
    assert len(CLAIM) == 44
    assert {item.number.rstrip("abcdefg") for item in TRIPOD_AI} == {str(n) for n in range(1, 28)}
    assert card.count("Finds squares.") > 3
    assert Bundle(packed.bundle).manifest.sbom in card


def test_another_prevalence_stands_in_release_and_card_and_leaves_the_version(
    packed: Packed, tmp_path: Path
) -> None:
    plain, rare = read_release(packed.package(tmp_path / "a")), {"opacity": 0.01}
    release = read_release(packed.package(tmp_path / "b", prevalence=rare))
    assert (plain.prevalence, release.prevalence) == ({}, rare)
    assert release.version == plain.version
    card = (tmp_path / "b/card.html").read_text()
    at = Bundle(packed.bundle).manifest.prevalence["opacity"]
    assert f"opacity 1.00% (calibrated at {at:.2%})" in card
    for wrong in ({"opacity": 1.2}, {"plague": 0.1}):
        with pytest.raises(ValueError, match=r"package\.prevalence: "):
            packed.package(tmp_path / "c", prevalence=wrong)
    assert not [*tmp_path.glob("c/*")]


def test_the_archive_names_the_very_decision_file(packed: Packed, tmp_path: Path) -> None:
    release = read_release(packed.package(tmp_path))
    assert release.decision.digest == digest_path(packed.decision)


def test_the_bill_of_materials_holds_weights_and_libraries_and_no_date(packed: Packed) -> None:
    bill = json.loads((packed.bundle / "sbom.json").read_text())
    (weights,) = bill["metadata"]["component"]["components"]
    digest = digest_path(packed.bundle / weights["name"]).removeprefix("sha256:")
    assert weights["hashes"] == [{"alg": "SHA-256", "content": digest}]
    libraries = {one["name"]: one["version"] for one in bill["components"]}
    assert libraries["torch"] == metadata.version("torch")
    assert "pytest" not in libraries, "what is installed beside it says nothing of the model"
    assert "timestamp" not in bill["metadata"]
    problems = JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(bill))
    assert problems is None


def test_a_refused_model_carries_its_refusal(packed: Packed, tmp_path: Path) -> None:
    shutil.copy(packed.decision, tmp_path / "kept.json")
    packed.judge(auc=1.0)
    try:
        release = read_release(packed.package(tmp_path))
    finally:
        shutil.copy(tmp_path / "kept.json", packed.decision)
    assert not release.decision.promote
    assert "beyond the floor of 1" in release.decision.reasons[0]
    assert "Refused by the gate: AUC is" in (tmp_path / "card.html").read_text()


@pytest.mark.parametrize(
    ("field", "message"),
    [("bundle", "about another bundle"), ("metrics", "rests on other numbers")],
)
def test_a_decision_about_something_else_is_refused_and_nothing_is_written(
    packed: Packed, tmp_path: Path, field: str, message: str
) -> None:
    decided = json.loads(packed.decision.read_text()) | {field: "sha256:" + "0" * 64}
    write_json(tmp_path / "decision.json", decided)
    with pytest.raises(ValueError, match=message):
        package(
            bundle=packed.bundle,
            decision=tmp_path / "decision.json",
            metrics=packed.metrics,
            archive=tmp_path / "out" / "model.mar",
            card=tmp_path / "out" / "card.html",
            params=PackageParams(),
        )
    assert not list((tmp_path / "out").iterdir())
