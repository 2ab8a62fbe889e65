"""One step, three doors: what the signature declares holds in dvc.yaml, params.yaml and on the command line."""

import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cadx.__main__ import command_line
from cadx.catalog import load_catalog
from components import CODE, STEPS, code_digests
from components.contract import (
    In,
    Keep,
    Out,
    Params,
    Step,
    code_dependencies,
    code_digest,
    declaration,
    read_params,
    source_digests,
    step,
)

NAMES = [s.name for s in STEPS]


@pytest.fixture(scope="module")
def pipeline(root: Path) -> dict:
    return yaml.safe_load((root / "dvc.yaml").read_text())


@pytest.fixture(scope="module")
def experiments(root: Path) -> dict:
    return yaml.safe_load((root / "params.yaml").read_text())


def arguments(command: str) -> dict[str, list[str]]:
    """`cadx train --seed 0 ...` as {option: values}."""
    words = shlex.split(command)
    assert words[0] == "cadx"
    options: dict[str, list[str]] = {}
    for word in words[2:]:
        if word.startswith("--"):
            options[word[2:].replace("-", "_")] = []
        else:
            options[list(options)[-1]].append(word)
    return options


def paths(entries: list) -> set[str]:
    return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}


def test_every_step_file_is_registered(root: Path) -> None:
    files = {p.stem for p in (root / "components").glob("*.py")} - {"__init__", "contract"}
    assert files == set(NAMES)


@pytest.mark.parametrize("entry", STEPS, ids=NAMES)
def test_function_file_and_parameter_class_share_one_word(entry: Step) -> None:
    function = entry.load()
    assert function.__name__ == entry.name
    declared = declaration(function)
    assert declared.params is not None
    assert declared.params.__name__ == f"{entry.name.capitalize()}Params"
    assert declared.outputs, "a step makes something"
    assert entry.summary.endswith("."), "the docstring's first line is the command's help"


def test_exactly_the_reproducible_steps_are_stages(pipeline: dict) -> None:
    assert list(pipeline["stages"]) == ["code", *(s.name for s in STEPS if s.reproducible)]


def test_the_stage_code_runs_on_every_edit_that_a_step_depends_on(pipeline: dict) -> None:
    stage = pipeline["stages"]["code"]
    assert shlex.split(stage["cmd"]) == ["cadx", "code-digests", "--output", str(CODE)]
    assert stage["outs"] == [str(CODE)]
    assert set(code_digests()) == {step.name for step in STEPS if step.reproducible}
    watched = tuple(f"{folder}/" for folder in stage["deps"])
    assert all(path.startswith(watched) for step in STEPS for path in code_dependencies(step.name))


def test_an_edit_reruns_what_depends_on_it_alone() -> None:
    """A configuration imports its network inside `build`, which counts; the readers of files are `ingest`'s alone."""
    networks = {f"cadx/models/{name}.py" for name in ("radiograph", "volume", "slide", "detector", "yolo")}
    readers = {f"cadx/reading/{name}.py" for name in ("dicom", "images", "volumes", "identifiers")}
    for name in ("train", "calibrate", "evaluate"):
        assert networks <= set(code_dependencies(name)), name
    for name in ("train", "calibrate", "evaluate", "summarise", "gate"):
        assert not readers & set(code_dependencies(name)), name
    assert readers <= set(code_dependencies("ingest"))


@pytest.mark.parametrize("entry", [s for s in STEPS if s.reproducible], ids=lambda s: s.name)
def test_stage_holds_what_the_signature_declares(entry: Step, pipeline: dict) -> None:
    stage, declared = pipeline["stages"][entry.name], entry.declaration()
    given = arguments(stage["cmd"])
    assert shlex.split(stage["cmd"])[1] == entry.name
    required = {
        name
        for name, parameter in inspect.signature(inspect.unwrap(entry.load())).parameters.items()
        if parameter.default is parameter.empty
    }
    known = {*declared.inputs, *declared.outputs, *declared.keeps, *declared.options, "params"}
    assert required <= set(given) <= known
    assert given["params"] == ["params.yaml:${item.experiment}"]
    assert f"${{item.experiment}}.{entry.name}" in stage["params"]
    # The catalogue is depended on by entry, not as a whole: a new data set reruns nothing.
    data = {p for name in declared.inputs for p in given.get(name, [])} - {"data/catalog.yaml"}
    assert paths(stage.get("deps", [])) == data
    assert {str(CODE): [entry.name]} in stage["params"]
    outputs = {p for name in declared.outputs for p in given[name]}
    assert paths(stage["outs"] + stage.get("metrics", [])) == outputs


def test_an_edited_loss_retrains_and_an_edited_page_does_not() -> None:
    train = code_dependencies("train")
    assert "cadx/losses.py" in train
    assert "cadx/reporting.py" not in train
    assert "cadx/__main__.py" not in train


def test_the_code_digest_sees_an_edit_of_what_the_step_is_made_of(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = code_digest(source_digests("train"))
    for name in code_dependencies("train"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes((root / name).read_bytes())
    monkeypatch.setattr("components.contract.ROOT", tmp_path)
    assert code_digest(source_digests("train")) == before
    with (tmp_path / "cadx/losses.py").open("a") as stream:
        stream.write("# edited\n")
    assert code_digest(source_digests("train")) != before


def test_an_experiment_has_the_name_of_its_entry_in_the_catalogue(experiments: dict, root: Path) -> None:
    """DVC watches the entry of the experiment's name: an edited entry of another name would rerun nothing."""
    catalogue = load_catalog(root / "data/catalog.yaml")
    assert {name: sections["ingest"]["source"] for name, sections in experiments.items()} == {
        name: name for name in experiments
    }
    assert set(experiments) <= set(catalogue)


def test_every_section_of_every_experiment_validates(pipeline: dict, experiments: dict, root: Path) -> None:
    assert set(experiments) == set(pipeline["vars"][0]["experiments"])
    for experiment, sections in experiments.items():
        stages = [s.name for s in STEPS if s.reproducible]
        assert set(stages) <= set(sections), (
            f"{experiment}: DVC wants the section of every stage, {{}} where all is default"
        )
        assert list(sections) == [name for name in NAMES if name in sections], f"{experiment}: out of order"
        for entry in STEPS:
            cls = entry.declaration().params
            assert cls is not None
            read_params(f"{root / 'params.yaml'}:{experiment}", entry.name, cls)
            # Kubeflow's door: the same section as JSON, its integers turned into floats.
            section = json.dumps(sections.get(entry.name, {}), default=str)
            floats = re.sub(r"(?<=[:\s\[])(\d+)(?=[,\s}\]])", r"\1.0", section)
            assert read_params(floats, entry.name, cls) == read_params(section, entry.name, cls)


class ToyParams(Params):
    """Parameters of a toy step."""

    size_px: int = 3


@step
def toy(*, source: In, made: Out, table: Out, notes: Keep, params: ToyParams, fail: bool = False) -> None:
    """Toy."""
    made.mkdir()
    (made / "a").write_text(source.read_text() * params.size_px)
    with notes.open("a") as stream:
        stream.write("ran\n")
    if fail:
        raise ValueError("half-way")
    table.write_text("t")


@pytest.fixture
def toy_paths(tmp_path: Path) -> dict[str, Path]:
    (tmp_path / "in").write_text("x")
    names = {"source": "in", "made": "made", "table": "t.parquet", "notes": "notes"}
    return {key: tmp_path / name for key, name in names.items()}


def test_outputs_appear_whole_or_not_at_all(toy_paths: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="half-way"):
        toy(**toy_paths, params=ToyParams(), fail=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "notes"]
    toy(**toy_paths, params=ToyParams())
    assert (toy_paths["made"] / "a").read_text() == "xxx"
    assert toy_paths["notes"].read_text() == "ran\nran\n"
    assert not list(tmp_path.glob(".*partial"))


def test_a_failed_rerun_leaves_the_former_output(toy_paths: dict[str, Path]) -> None:
    toy(**toy_paths, params=ToyParams())
    with pytest.raises(ValueError, match="half-way"):
        toy(**toy_paths, params=ToyParams(size_px=9), fail=True)
    assert (toy_paths["made"] / "a").read_text() == "xxx"


def test_what_a_killed_run_left_is_cleared(toy_paths: dict[str, Path], tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    (tmp_path / f".made.{ended.pid}.partial").mkdir()
    toy(**toy_paths, params=ToyParams())
    assert not list(tmp_path.glob(".*partial"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "made"}, "--table .*made: is, holds or lies within --made"),
        ({"table": "made/t.parquet"}, "--table .*t.parquet: is, holds or lies within --made"),
        ({"made": "in"}, "--made .*in: is, holds or lies within --source"),
        ({"made": "."}, "is, holds or lies within --source"),
    ],
)
def test_outputs_lie_apart_from_one_another_and_from_inputs(
    changes: dict[str, str], message: str, toy_paths: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        toy(**toy_paths | {name: tmp_path / path for name, path in changes.items()}, params=ToyParams())
    assert [path.name for path in tmp_path.iterdir()] == ["in"], "before any work"


def test_no_output_is_put_in_place_where_one_cannot_be(toy_paths: dict[str, Path]) -> None:
    toy_paths["table"].mkdir()
    with pytest.raises(ValueError, match=r"t\.parquet: a folder stands there; name a file"):
        toy(**toy_paths, params=ToyParams())
    assert not toy_paths["made"].exists()


def test_a_folder_that_the_step_did_not_make_keeps_its_place(
    toy_paths: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "made").mkdir()
    (tmp_path / "made/holiday.jpg").write_text("kept")
    with pytest.raises(
        ValueError, match="made: holds other things than what belongs there; name a new folder"
    ):
        toy(**toy_paths, params=ToyParams())
    assert (tmp_path / "made/holiday.jpg").read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "made", "notes"]
    (tmp_path / "made/holiday.jpg").unlink()
    toy(**toy_paths, params=ToyParams())
    toy(**toy_paths, params=ToyParams(size_px=9))
    assert (toy_paths["made"] / "a").read_text() == "x" * 9


def test_missing_input_is_named(toy_paths: dict[str, Path]) -> None:
    toy_paths["source"].unlink()
    with pytest.raises(ValueError, match=r"--source .*in: no such file or folder"):
        toy(**toy_paths, params=ToyParams())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"size_pxx": 1}', "toy.size_pxx: unknown parameter; did you mean 'size_px'?"),
        ('{"size_px": "big"}', "toy.size_px: input should be a valid integer"),
        ('{"size_px": 1', "not JSON"),
        ('{"size_px": 1, "size_px": 2}', "--params of toy: not JSON ('size_px' stands twice)"),
        ("params.yaml", "give FILE:experiment"),
        ("nowhere.yaml:x", "nowhere.yaml: no such parameter file"),
        ("params.yaml:phantom-xay", "no experiment 'phantom-xay'; it holds: phantom-xray"),
    ],
)
def test_wrong_parameters_get_one_clear_line(
    text: str, message: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_params(text, "toy", ToyParams)
    assert "\n" not in str(caught.value)


def cadx(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cadx", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_help_lists_every_step_and_imports_none_of_them(root: Path) -> None:
    probe = "import sys; from cadx.__main__ import command_line; command_line(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    heavy = {"torch", "numpy", "pandas", "scipy", "sklearn", "PIL", "pydicom", "matplotlib"}
    heavy |= {"great_expectations", "evidently", "kfp", "dvc", "mlflow", "optuna"}
    assert not heavy & set(loaded.split())
    shown = cadx("--help", cwd=root).stdout
    assert all(re.search(rf"\b{name}\b", shown) for name in NAMES)


def test_a_step_starts_without_torch(root: Path) -> None:
    # Seconds, and 400 MB of memory, before bad input is refused. One process: an import stays.
    imports = [("ingest", "pydicom"), ("validate", "pydicom"), *((name, "torch") for name in NAMES)]
    probe = "import sys\n" + "".join(
        f"import components.{name}\nif '{heavy}' in sys.modules: sys.exit('{name}: {heavy}')\n"
        for name, heavy in imports
    )
    found = subprocess.run(
        [sys.executable, "-c", probe], cwd=root, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, f"starting a step imports what it need not: {found.stderr}"


COMMANDS = [[name] for name in command_line() if not name.startswith("-")]
COMMANDS += [["champion", name] for name in command_line()["champion"] if not name.startswith("-")]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_an_example_in_its_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = [*words, "--help"]
    with pytest.raises(SystemExit) as ended:
        command_line(tokens)(tokens)
    assert ended.value.code in (0, None)
    shown = capsys.readouterr().out
    assert f"cadx {' '.join(words)}" in " ".join(shown.partition("Example")[2].split())


def test_the_form_of_a_dataset_is_the_one_that_is_checked(root: Path) -> None:
    form = cadx("dataset-form", cwd=root).stdout
    assert (root / "data/README.md").read_text() == form, "run: cadx dataset-form > data/README.md"


def test_a_mistake_ends_in_one_line_and_a_status(root: Path, tmp_path: Path) -> None:
    result = cadx(
        "split", "--dataset", "nowhere", "--validation", "nowhere", "--splits", str(tmp_path / "s"),
        "--params", "params.yaml:phantom-xray", cwd=root,
    )  # fmt: skip
    assert result.returncode == 1
    assert (
        result.stderr
        == "cadx split: --dataset nowhere: no such file or folder; run the step that makes it first\n"
    )
    assert not list(tmp_path.iterdir())
