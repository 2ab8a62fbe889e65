"""The Kubeflow door: what is compiled says what dvc.yaml says, and the steps answer as Kubeflow expects."""

import functools
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pandas as pd
import pytest
import yaml
from google.protobuf import json_format
from kfp import dsl, local
from kfp.local import executor_input_utils, executor_output_utils, placeholder_utils, subprocess_task_handler
from kfp.local.io import IOStore
from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator
from kfp.pipeline_spec import pipeline_spec_pb2 as ir
from test_bundle import write_dataset
from test_containers import with_one_seed
from test_evaluate import Run
from test_monitor import Served, served, write_lines  # noqa: F401 - a fixture
from test_predict import inbox, ready  # noqa: F401 - fixtures
from test_summarise import write_seed

from cadx.bundle import Bundle
from cadx.files import digest_path, write_json
from components import STEPS
from components.contract import Alarm, In, Out, Params, read_params, step
from pipelines import Deploy, compile_experiment, tasks
from pipelines.inference import inference
from pipelines.monitoring import monitoring
from pipelines.placement import Setting, read_placements
from pipelines.training import training
from serving.server import TorchServe, free_ports

ROOT = Path(__file__).resolve().parent.parent
DVC = yaml.safe_load((ROOT / "dvc.yaml").read_text())
EXPERIMENTS, SEEDS = DVC["vars"][0]["experiments"], DVC["vars"][0]["seeds"]
PARAMS = ROOT / "params.yaml"
RESOURCES = ROOT / "pipelines/resources.yaml"
IMAGE = "registry.example/cadx@sha256:" + "0" * 64
STAGES = [s.name for s in STEPS if s.reproducible]


class Compiled(dict[str, str]):
    """Experiment -> its pipeline, as text, compiled when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def __missing__(self, experiment: str) -> str:
        output = self._folder / f"{experiment}.yaml"
        compile_experiment(experiment, output, params=PARAMS, image=IMAGE)
        self[experiment] = output.read_text()
        return self[experiment]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Experiment -> its pipeline, as text."""
    return Compiled(tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ir.PipelineSpec]:
    """The pipelines beside training, of the first experiment; `families` with a twin of it."""
    folder = tmp_path_factory.mktemp("others")
    first, second = EXPERIMENTS[:2]
    given = yaml.load(PARAMS.read_text(), yaml.CSafeLoader)
    sections = {name: given[name] for name in (first, second)}
    sections[second] |= {name: sections[first][name] for name in ("split", "evaluate")}
    params = folder / "params.yaml"
    params.write_text(yaml.safe_dump(sections, sort_keys=False))
    for name in ("families", "monitoring", "evaluation", "inference"):
        against = (second,) if name == "families" else ()
        compile_experiment(
            first, folder / f"{name}.yaml", params=params, image=IMAGE, pipeline=name, against=against
        )
    return {file.stem: parse(file.read_text()) for file in folder.glob("*.yaml") if file != params}


@pytest.fixture
def pipeline(compiled: Compiled) -> ir.PipelineSpec:
    """The first experiment's pipeline."""
    return parse(compiled[EXPERIMENTS[0]])


@functools.cache
def parse(text: str) -> ir.PipelineSpec:
    """The pipeline in a file, refusing what Kubeflow's schema does not know."""
    pipeline, *platform = yaml.load_all(text, yaml.CSafeLoader)
    for document in platform:
        json_format.ParseDict(document, ir.PlatformSpec(), ignore_unknown_fields=False)
    return json_format.ParseDict(pipeline, ir.PipelineSpec(), ignore_unknown_fields=False)


def stage_items(experiment: str) -> dict[str, dict[str, Any]]:
    """Task name -> its stage in dvc.yaml, with DVC's placeholders filled in."""
    items = {}
    for name in (one.name for one in STEPS if one.reproducible):
        stage = DVC["stages"][name]
        for seed in SEEDS if "seed" in stage["matrix"] else [None]:
            text = json.dumps(stage).replace("${item.experiment}", experiment)
            filled = text.replace("${item.seed}", str(seed))
            items[name if seed is None else f"{name}-{seed}"] = json.loads(filled)
    return items


def options(line: list[str]) -> dict[str, str]:
    """`cadx split --dataset x ...` as {option: value}."""
    return {word[2:].replace("-", "_"): line[i + 1] for i, word in enumerate(line) if word.startswith("--")}


def command(pipeline: ir.PipelineSpec, task: str) -> list[str]:
    container = pipeline.deployment_spec["executors"][f"exec-{task}"]["container"]
    assert container["image"] == IMAGE
    return [*container["command"], *container["args"]]


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_kubeflow_reads_every_pipeline(experiment: str, compiled: Compiled) -> None:
    pipeline = parse(compiled[experiment])
    assert pipeline.pipeline_info.name == experiment
    assert set(stage_items(experiment)) <= set(pipeline.root.dag.tasks)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_command_is_the_stages_line(experiment: str, compiled: Compiled) -> None:
    """Each placeholder stands for the very path that DVC's line has there, whoever makes it."""
    pipeline = parse(compiled[experiment])
    lines = {name: shlex.split(stage["cmd"]) for name, stage in stage_items(experiment).items()}
    for name, line in lines.items():
        words = command(pipeline, name)
        assert words[-2:] == ["--executor-input", "{{$}}"]
        assert [as_in_dvc(pipeline, lines, name, word) for word in words[:-2]] == line


def as_in_dvc(pipeline: ir.PipelineSpec, lines: dict[str, list[str]], name: str, word: str) -> str:
    """What stands in DVC's lines for a word of a task's command."""
    placeholder = re.fullmatch(r"\{\{\$\.(\w+\.\w+)\['(\w+)'\](?:\.path)?\}\}", word)
    if placeholder is None:
        return word.removeprefix("/tmp/cadx/")
    kind, entry = placeholder.groups()
    inputs = pipeline.root.dag.tasks[name].inputs
    if kind == "outputs.artifacts":
        return options(lines[name])[entry]
    if kind == "inputs.artifacts":
        made = inputs.artifacts[entry].task_output_artifact
        return options(lines[made.producer_task])[made.output_artifact_key]
    given = inputs.parameters[entry]
    if entry == "params":
        assert given.component_input_parameter == lines[name][1]
        return f"params.yaml:{pipeline.pipeline_info.name}"
    if parameter := given.component_input_parameter:
        return pipeline.root.input_definitions.parameters[parameter].default_value.string_value
    return f"{given.runtime_value.constant.number_value:g}"


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_tasks_wait_for_one_another_as_stages_do(experiment: str, compiled: Compiled) -> None:
    pipeline, stages = parse(compiled[experiment]), stage_items(experiment)

    def paths(entries: list[Any]) -> set[str]:
        return {entry if isinstance(entry, str) else next(iter(entry)) for entry in entries}

    makes = {name: paths(stage["outs"] + stage.get("metrics", [])) for name, stage in stages.items()}
    for name, stage in stages.items():
        needed = {maker for maker, outputs in makes.items() if outputs & paths(stage.get("deps", []))}
        assert set(pipeline.root.dag.tasks[name].dependent_tasks) == needed


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_defaults_are_the_experiments_parameters(experiment: str, compiled: Compiled) -> None:
    found = json_format.MessageToDict(parse(compiled[experiment]).root)["inputDefinitions"]["parameters"]
    assert found.pop("experiment")["defaultValue"] == experiment
    assert set(STAGES) <= set(found)
    for entry in (s for s in STEPS if s.name in found):
        cls = entry.declaration().params
        assert cls is not None
        assert found[entry.name]["parameterType"] == "STRUCT"
        expected = read_params(f"{PARAMS}:{experiment}", entry.name, cls)
        # Kubeflow has no integers in a STRUCT: 7 arrives as 7.0.
        assert read_params(json.dumps(found[entry.name]["defaultValue"]), entry.name, cls) == expected


def test_what_a_step_keeps_lies_outside_of_the_checkout(pipeline: ir.PipelineSpec) -> None:
    kept = [
        options(command(pipeline, name))[keep]
        for name in stage_items(EXPERIMENTS[0])
        for entry in STEPS
        if entry.name == name.partition("-")[0]
        for keep in entry.declaration().keeps
    ]
    assert len(kept) == 1 + 2 * len(SEEDS)  # ingest's cache, train's checkpoints, evaluate's uses of test
    assert all(path.startswith("/tmp/cadx/data/") for path in kept)


def test_integers_do_arrive_as_floats(pipeline: ir.PipelineSpec) -> None:
    default = pipeline.root.input_definitions.parameters["train"].default_value
    assert '"epochs": 12.0' in json_format.MessageToJson(default)


def all_tasks(pipeline: ir.PipelineSpec) -> dict[str, ir.PipelineTaskSpec]:
    """Every task by name, those within pipelines and branches too."""
    found = dict(pipeline.root.dag.tasks)
    for component in pipeline.components.values():
        found |= dict(component.dag.tasks)
    return found


def test_stages_alone_are_cached_and_tried_again(pipeline: ir.PipelineSpec) -> None:
    found = all_tasks(pipeline)
    steps = {name: name.partition("-")[0] for name in found if name in stage_items(EXPERIMENTS[0])}
    assert set(steps.values()) == set(STAGES)
    assert all(found[name].caching_options.enable_cache for name in steps)
    assert all(found[name].retry_policy.max_retry_count == 2 for name in steps)
    rest = {s.name for s in STEPS if not s.reproducible} & set(found)
    assert rest == {"choose", "deliver"}
    assert not any(found[name].caching_options.enable_cache for name in rest)
    assert not any(found[name].HasField("retry_policy") for name in rest)


def branch_of(pipeline: ir.PipelineSpec) -> tuple[str, ir.PipelineTaskSpec, str, str]:
    """The one branch: its name, its task, the task that it asks, and that task's output."""
    [(name, branch)] = [(n, t) for n, t in pipeline.root.dag.tasks.items() if t.trigger_policy.condition]
    [(entry, asked)] = [
        (e, p.task_output_parameter)
        for e, p in branch.inputs.parameters.items()
        if p.task_output_parameter.producer_task
    ]
    assert branch.trigger_policy.condition == f"inputs.parameter_values['{entry}'] == true"
    return name, branch, asked.producer_task, asked.output_parameter_key


def inside(pipeline: ir.PipelineSpec, task: str) -> dict[str, ir.PipelineTaskSpec]:
    """The tasks of a branch or of a pipeline within the pipeline."""
    return dict(pipeline.components[pipeline.root.dag.tasks[task].component_ref.name].dag.tasks)


def makers(task: ir.PipelineTaskSpec) -> set[str]:
    """The tasks that make what a task reads."""
    return {artifact.task_output_artifact.producer_task for artifact in task.inputs.artifacts.values()}


def test_only_a_promoted_model_is_deployed(pipeline: ir.PipelineSpec) -> None:
    name, branch, decider, output = branch_of(pipeline)
    assert (decider, output) == ("choose", "promote")
    assert list(inside(pipeline, name)) == ["deliver"]
    assert makers(branch) == {"ingest", "choose"}


def test_a_promoted_model_goes_where_it_is_told(tmp_path: Path) -> None:
    """To the volume without a word more; to a server only by its addresses; or nowhere, and then nothing is asked."""
    output, resources = tmp_path / "p.yaml", tmp_path / "resources.yaml"
    resources.write_text("deploy: {volumes: [{claim: models, path: /var/lib/cadx}]}")
    found: dict[Deploy, tuple[set[str], set[str]]] = {}
    for way in get_args(Deploy):
        compile_experiment(
            EXPERIMENTS[0], output, params=PARAMS, image=IMAGE, deploy=way, resources=resources
        )
        pipeline = parse(output.read_text())
        defined = pipeline.root.input_definitions.parameters
        without = {name for name, one in defined.items() if not one.HasField("default_value")}
        found[way] = {*all_tasks(pipeline)} & {"deliver", "deploy", "condition-1"}, without
    assert found == {
        "volume": ({"condition-1", "deliver"}, set()),
        "torchserve": (
            {"condition-1", "deploy"},
            {"model_store", "key_file", "inference", "management"},
        ),
        "none": (set(), set()),
    }
    with pytest.raises(
        ValueError, match=r"deploy\.volumes: none; --deploy torchserve needs a volume"
    ) as caught:
        compile_experiment(EXPERIMENTS[0], output, params=PARAMS, image=IMAGE, deploy="torchserve")
    assert "\n" not in str(caught.value)


def test_the_choice_is_among_all_seeds(pipeline: ir.PipelineSpec) -> None:
    choice = pipeline.root.dag.tasks["choose"]
    wanted = {f"{step}-{seed}" for step in ("evaluate", "gate", "package") for seed in SEEDS}
    assert makers(choice) == wanted


def test_families_are_trained_side_by_side_and_the_best_is_deployed(
    others: dict[str, ir.PipelineSpec],
) -> None:
    pipeline = others["families"]
    first, second = EXPERIMENTS[:2]
    tasks_there = pipeline.root.dag.tasks
    assert {first, second} <= set(tasks_there)
    assert not tasks_there[first].dependent_tasks
    assert not tasks_there[second].dependent_tasks
    assert set(stage_items(first)) <= set(inside(pipeline, first))
    assert "deploy" not in inside(pipeline, first)
    assert makers(tasks_there["choose"]) == {first, second}
    name, _, decider, output = branch_of(pipeline)
    assert (decider, output) == ("choose", "promote")
    assert list(inside(pipeline, name)) == ["deliver"]
    default = json_format.MessageToDict(pipeline.root.input_definitions.parameters["choose"].default_value)
    assert default == {"metric": "auc"}


def test_what_cannot_be_compared_is_refused(tmp_path: Path) -> None:
    first, second = EXPERIMENTS[0], "phantom-xray-pilot"
    with pytest.raises(ValueError, match=rf"{second}\.split differs from {first}\.split") as caught:
        compile_experiment(
            first, tmp_path / "p.yaml", params=PARAMS, image=IMAGE, pipeline="families", against=(second,)
        )
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="name at least two experiments"):
        compile_experiment(first, tmp_path / "p.yaml", params=PARAMS, image=IMAGE, pipeline="families")
    assert not list(tmp_path.iterdir())


def test_drift_starts_a_training_and_an_alarm_is_no_failure(others: dict[str, ir.PipelineSpec]) -> None:
    pipeline = others["monitoring"]
    name, _, decider, output = branch_of(pipeline)
    assert (decider, output) == ("monitor", "retrain")
    [nested] = inside(pipeline, name)
    assert nested == EXPERIMENTS[0]
    watch = pipeline.root.dag.tasks["monitor"]
    assert not watch.caching_options.enable_cache
    assert not watch.HasField("retry_policy")
    words = command(pipeline, "monitor")
    assert words[:2] == ["sh", "-c"]
    for code, expected in ((0, 0), (3, 0), (1, 1)):
        script = words[2].replace("cadx monitor", f"sh -c 'exit {code}'")
        assert subprocess.run(["sh", "-c", script, "monitor", "x"], check=False).returncode == expected


def test_a_bundle_from_elsewhere_is_scored_at_a_site(others: dict[str, ir.PipelineSpec]) -> None:
    pipeline = others["evaluation"]
    assert set(pipeline.root.dag.tasks) == {"importer", "ingest", "validate", "split", "evaluate", "gate"}
    assert "importer" in makers(pipeline.root.dag.tasks["evaluate"])
    defaults = json_format.MessageToDict(pipeline.root.input_definitions)["parameters"]
    assert defaults["gate"]["defaultValue"]["other_dataset"] is True
    assert defaults["evaluate"]["defaultValue"]["split"] == "test"
    assert "defaultValue" not in defaults["bundle_uri"]
    for name in ("split", "evaluate", "gate"):
        cls = next(s for s in STEPS if s.name == name).declaration().params
        assert cls is not None
        read_params(json.dumps(defaults[name]["defaultValue"]), name, cls)


def test_a_folder_is_answered(others: dict[str, ir.PipelineSpec]) -> None:
    pipeline = others["inference"]
    assert set(pipeline.root.dag.tasks) == {"importer", "importer-2", "predict"}
    assert makers(pipeline.root.dag.tasks["predict"]) == {"importer", "importer-2"}
    kinds = {
        name: a.artifact_type.schema_title
        for name, a in pipeline.components["comp-predict"].input_definitions.artifacts.items()
    }
    assert kinds == {"bundle": "system.Model", "images": "system.Dataset"}


@pytest.fixture(scope="module")
def fetched(tmp_path_factory: pytest.TempPathFactory) -> tuple[ir.PipelineSpec, dict[str, Any]]:
    """The training pipeline on a DVC remote with a notice of its end, and what it asks of Kubernetes."""
    path = tmp_path_factory.mktemp("fetched") / "p.yaml"
    compile_experiment(
        EXPERIMENTS[0], path, params=PARAMS, image=IMAGE, remote="s3://cadx/datasets", notify=True
    )
    platform = list(yaml.load_all(path.read_text(), yaml.CSafeLoader))[1]["platforms"]["kubernetes"]
    return parse(path.read_text()), platform["deploymentSpec"]["executors"]


def test_a_remotes_dataset_is_fetched_as_dvc_lock_names_it(
    fetched: tuple[ir.PipelineSpec, dict[str, Any]], compiled: Compiled
) -> None:
    pipeline, kubernetes = fetched
    found = inside(pipeline, "exit-handler-1")
    usual = parse(compiled[EXPERIMENTS[0]]).root.dag.tasks
    steps = {name for name in usual if name not in {"ingest", "condition-1"}} | {"fetch"}
    assert {name for name in found if not name.startswith("condition")} == steps
    for name in steps - {"fetch"}:
        assert ("fetch" in makers(found[name])) == ("ingest" in makers(usual[name])), name
    assert found["fetch"].caching_options.enable_cache, "its parameters name one content"
    asked = json_format.MessageToDict(pipeline.root.input_definitions.parameters["fetch"].default_value)
    lock = yaml.load((ROOT / "dvc.lock").read_text(), Loader=yaml.CSafeLoader)["stages"]
    [made] = lock[f"ingest@{EXPERIMENTS[0]}"]["outs"]
    validation = json.loads((ROOT / f"data/reports/{EXPERIMENTS[0]}/validation.json").read_text())
    assert asked == {
        "remote": "s3://cadx/datasets", "md5": made["md5"], "digest": validation["dataset"], "connections": 8
    }  # fmt: skip
    keys = {entry["envVar"] for entry in kubernetes["exec-fetch"]["secretAsEnv"][0]["keyToEnv"]}
    assert keys == {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"}


def test_no_cached_task_sees_a_volume(fetched: tuple[ir.PipelineSpec, dict[str, Any]]) -> None:
    """What lies on one is unknown to the cache, which would answer with what was made of former content."""
    pipeline, kubernetes = fetched
    cached = {name for name, task in all_tasks(pipeline).items() if task.caching_options.enable_cache}
    mounting = {name.removeprefix("exec-") for name, executor in kubernetes.items() if "pvcMount" in executor}
    assert mounting == {"deliver"}
    assert {*STAGES} - {"ingest"} | {"fetch"} <= {name.partition("-")[0] for name in cached}
    assert not cached & mounting


def test_a_remote_is_s3_and_holds_datasets(tmp_path: Path) -> None:
    for words, message in (
        ({"remote": "/mnt/volume"}, "fetch.remote: string should match pattern"),
        ({"remote": "s3://cadx", "pipeline": "inference"}, "the pipeline inference reads no dataset"),
    ):
        with pytest.raises(ValueError, match=message):
            compile_experiment(EXPERIMENTS[0], tmp_path / "p.yaml", params=PARAMS, image=IMAGE, **words)


def test_every_parameter_has_help(compiled: Compiled, others: dict[str, ir.PipelineSpec]) -> None:
    for pipeline in (parse(compiled[EXPERIMENTS[0]]), *others.values()):
        for name, asked in pipeline.root.input_definitions.parameters.items():
            assert asked.description, f"{pipeline.pipeline_info.name}: {name}"


# --- Where a step runs --------------------------------------------------------------------------------


@pytest.fixture
def placed(tmp_path: Path) -> Callable[[str], tuple[dict[str, Any], dict[str, Any]]]:
    """Compile with a file of resources; what each task's container asks for, and what of Kubernetes."""

    def compile_with(text: str) -> tuple[dict[str, Any], dict[str, Any]]:
        (tmp_path / "resources.yaml").write_text(text)
        output = tmp_path / "p.yaml"
        compile_experiment(
            EXPERIMENTS[0], output, params=PARAMS, image=IMAGE, resources=tmp_path / "resources.yaml"
        )
        spec, platform = yaml.load_all(output.read_text(), yaml.CSafeLoader)
        parse(output.read_text())
        executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
        return spec["deploymentSpec"]["executors"], executors

    return compile_with


def test_a_step_runs_where_its_section_says(
    placed: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    executors, kubernetes = placed(
        """
every: {cpu: 1, memory: 2Gi, timeout_s: 600}
train:
  cpu: 4
  accelerator: {kind: nvidia.com/gpu, count: 2}
  shared_memory: 8Gi
  node_selector: {pool: gpu}
  tolerations: [{key: nvidia.com/gpu, effect: NoSchedule}]
  secrets: {s3: {key: AWS_SECRET_ACCESS_KEY}}
  config_maps: {proxy: {address: HTTPS_PROXY}}
"""
    )
    resources = executors["exec-train-0"]["container"]["resources"]
    assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == "4"
    assert resources["resourceMemoryLimit"] == "2Gi", "what a section leaves out is taken from every"
    assert resources["accelerator"]["resourceType"] == "nvidia.com/gpu"
    assert resources["accelerator"]["resourceCount"] == "2"
    train = kubernetes["exec-train-0"]
    assert train["emptyDirMounts"] == [
        {"medium": "Memory", "mountPath": "/dev/shm", "sizeLimit": "8Gi", "volumeName": "shm"}
    ]
    assert train["nodeSelector"]["labels"] == {"pool": "gpu"}
    assert train["tolerations"] == [{"effect": "NoSchedule", "key": "nvidia.com/gpu", "operator": "Exists"}]
    assert train["secretAsEnv"][0]["keyToEnv"][0]["envVar"] == "AWS_SECRET_ACCESS_KEY"
    assert train["configMapAsEnv"][0]["keyToEnv"][0]["envVar"] == "HTTPS_PROXY"
    assert str(train["activeDeadlineSeconds"]) == "600"
    assert "accelerator" not in executors["exec-ingest"]["container"]["resources"]
    assert "emptyDirMounts" not in kubernetes["exec-ingest"]


TRAINING_IMAGE = "registry.example/cadx-training@sha256:" + "1" * 64
STEPS_IMAGE = "registry.example/cadx-steps@sha256:" + "2" * 64


def test_a_step_has_an_image_of_its_own_where_its_section_names_one(
    placed: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    executors, _ = placed(
        f"every: {{timeout_s: 60}}\ntrain: {{image: '{TRAINING_IMAGE}', accelerator: {{count: 1}}}}"
    )
    images = {name: executor["container"]["image"] for name, executor in executors.items()}
    assert images.pop("exec-train-0") == TRAINING_IMAGE
    assert images["exec-evaluate-0"] == images["exec-ingest"] == IMAGE


@pytest.mark.parametrize("image", [STEPS_IMAGE, "cadx/steps", "cadx/steps:1.2"])
def test_no_accelerator_is_asked_for_in_the_image_without_cuda(image: str, tmp_path: Path) -> None:
    output = tmp_path / "p.yaml"
    message = f"image {image}: the steps' image holds no CUDA, and train asks for nvidia.com/gpu"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compile_experiment(EXPERIMENTS[0], output, params=PARAMS, image=image)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    # What trains nothing asks for nothing, and neither do the resources for CPUs.
    for more in ({"pipeline": "inference"}, {"resources": RESOURCES.with_name("resources-cpu.yaml")}):
        compile_experiment(EXPERIMENTS[0], output, params=PARAMS, image=image, **more)
        assert output.exists()


def test_an_image_without_a_digest_is_told_of_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for image, said in ((IMAGE, []), ("registry.example/cadx:latest", ["registry.example/cadx:latest"])):
        compile_experiment(
            EXPERIMENTS[0], tmp_path / "p.yaml", params=PARAMS, image=image, pipeline="inference"
        )
        lines = capsys.readouterr().err.splitlines()
        assert [line.partition(": ")[2].split()[1].rstrip(":") for line in lines] == said


@pytest.mark.parametrize("file", ["resources.yaml", "resources-cpu.yaml"])
def test_folders_that_need_not_be_named_lie_on_a_volume_of_the_step(file: str) -> None:
    placements = read_placements(RESOURCES.with_name(file))
    for name, places in (("deliver", ["models"]), ("monitor", ["request_log", "requests"])):
        mounted = [volume.path for volume in placements[name].volumes]
        for place in places:
            assert any(Path(tasks.DEFAULTS[place]).is_relative_to(path) for path in mounted), place


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("trane: {cpu: 1}", "unknown section 'trane'; give every or a step: ingest"),
        ("train: {cpus: 1}", "train.cpus: unknown parameter; did you mean 'cpu'?"),
        ("train: {image: Not An Image}", "train.image: 'Not An Image': no image's name; give NAME:TAG or"),
        ("train: {memory: lots}", "train.memory: 'lots': give a whole number and its unit, as in 4Gi"),
        ("train: {memory: 4}", "train.memory: '4': give a whole number and its unit"),
        ("train: {memory: 4gi}", "train.memory: '4gi'"),
        ("train: {memory: 4k}", "train.memory: '4k'"),
        ("train: {memory: 500m}", "train.memory: '500m'"),
        ("train: {shared_memory: 1.5Gi}", "train.shared_memory: '1.5Gi'"),
        ("train: {cpu: 0}", "train.cpu: '0': give cores above 0"),
        ("train: {cpu: 4Gi}", "train.cpu: '4Gi'"),
        ("train: {accelerator: {kind: ''}}", "train.accelerator.kind: '': give the nodes' name of it"),
        ("train: {accelerator: {kind: nvidia.com/big gpu}}", "train.accelerator.kind: 'nvidia.com/big gpu'"),
        (
            "train: {tolerations: [{key: a, operator: Exists, value: b}]}",
            "operator Exists: give a value with Equal",
        ),
        ("train: {tolerations: [{key: a, operator: Equal}]}", "operator Equal: give a value with Equal"),
        ("train: {tolerations: [{key: a b}]}", "train.tolerations.0.key: 'a b': give a key such as pool"),
        ("train: {node_selector: {-pool: gpu}}", "'-pool': give a key such as pool"),
        ("train: {node_selector: {pool: a/b}}", "train.node_selector.pool: 'a/b': give up to 63 letters"),
        ("train: {secrets: {a..b: {key: KEY}}}", "'a..b': give a name of a-z, 0-9, '-' and '.'"),
        ("train: {secrets: {S3_keys: {key: KEY}}}", "'S3_keys': give a name of a-z, 0-9, '-' and '.'"),
        ("train: {secrets: {s3: {a b: KEY}}}", "'a b': give a key of letters, digits"),
        ("train: {secrets: {s3: {key: 1KEY}}}", "train.secrets.s3.key: '1KEY': give a variable's name"),
        ("train: {config_maps: {s3: {key: A-B}}}", "train.config_maps.s3.key: 'A-B': give a variable's name"),
        (
            "deliver: {volumes: [{claim: My_Claim, path: /a}]}",
            "deliver.volumes.0.claim: 'My_Claim': give a name",
        ),
        (
            "deliver: {volumes: [{claim: a, path: /}]}",
            "deliver.volumes.0.path: '/': give an absolute path below /",
        ),
        ("deliver: {volumes: [{claim: a, path: /a/../b}]}", "'/a/../b': give an absolute path below /"),
        (
            "deliver: {volumes: [{claim: a, path: /m}, {claim: b, path: /m/}]}",
            "two of them are mounted on /m",
        ),
        ("train: {volumes: [{claim: data, path: /data}]}", "train.volumes: Kubeflow's cache does not see"),
        ("fetch: {volumes: [{claim: data, path: /data}]}", "fetch.volumes: Kubeflow's cache does not see"),
        ("- cpu", "no sections; give every or a step"),
        ("train: {", "not YAML"),
    ],
)
def test_a_wrong_resource_is_refused_in_a_line(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "resources.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_placements(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "photo.yaml").write_bytes(b"\xff\xd8\xff\xe0")
    with pytest.raises(ValueError, match=r"photo\.yaml: not YAML: "):
        read_placements(tmp_path / "photo.yaml")


@pytest.mark.parametrize(
    ("cpu", "threads"), [("4", "4"), ("2.5", "2"), ("500m", "1"), ("3500m", "3"), (None, None)]
)
def test_threads_keep_within_the_limit(
    cpu: str | None, threads: str | None, placed: Callable[..., tuple[dict[str, Any], dict[str, Any]]]
) -> None:
    executors, _ = placed(f"train: {{cpu: {cpu or 'null'}, memory: 4096Ki, shared_memory: 1Ei}}")
    told = {one["name"]: one["value"] for one in executors["exec-train-0"]["container"].get("env", [])}
    assert told.get("OMP_NUM_THREADS") == threads


def test_a_variable_of_the_section_says_how_many_threads(
    placed: Callable[..., tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    executors, kubernetes = placed("train: {cpu: 4, config_maps: {tuning: {threads: OMP_NUM_THREADS}}}")
    assert "env" not in executors["exec-train-0"]["container"]
    assert kubernetes["exec-train-0"]["configMapAsEnv"][0]["keyToEnv"][0]["envVar"] == "OMP_NUM_THREADS"


def test_a_toleration_of_a_value_is_of_that_value_alone(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {tolerations: [{key: pool, value: gpu}, {key: pool}]}")
    one, other = read_placements(tmp_path / "r.yaml")["train"].tolerations
    assert (one.operator, one.value, other.operator) == ("Equal", "gpu", "Exists")


def test_a_watch_over_requests_is_no_part_of_training(pipeline: ir.PipelineSpec) -> None:
    assert "comp-monitor" not in pipeline.components


def test_seeds_have_names_and_titles_of_their_own(pipeline: ir.PipelineSpec) -> None:
    titles = {name: task.task_info.name for name, task in pipeline.root.dag.tasks.items()}
    assert [titles[f"train-{seed}"] for seed in SEEDS] == [f"train (seed {seed})" for seed in SEEDS]
    seeds = [
        pipeline.root.dag.tasks[f"train-{s}"].inputs.parameters["seed"].runtime_value.constant.number_value
        for s in SEEDS
    ]
    assert seeds == SEEDS
    # kfp's local runner names a task's folder by its component: two tasks of one would overwrite each other.
    components = [task.component_ref.name for task in pipeline.root.dag.tasks.values()]
    assert len(set(components)) == len(components)


def test_artifacts_have_types_that_kubeflow_can_draw(
    pipeline: ir.PipelineSpec, others: dict[str, ir.PipelineSpec]
) -> None:
    outputs = {
        (component, name): artifact.artifact_type.schema_title
        for component, spec in pipeline.components.items()
        for name, artifact in spec.output_definitions.artifacts.items()
    }
    assert outputs["comp-ingest", "dataset"] == "system.Dataset"
    assert outputs["comp-calibrate-0", "bundle"] == "system.Model"
    assert outputs["comp-evaluate-0", "metrics"] == "system.Metrics"
    assert outputs["comp-evaluate-0", "confusion"] == "system.ClassificationMetrics"
    assert outputs["comp-evaluate-0", "roc"] == "system.ClassificationMetrics"
    assert outputs["comp-evaluate-0", "report"] == "system.HTML"
    assert outputs["comp-validate", "validation"] == "system.Artifact"
    watch = others["monitoring"].components["comp-monitor"].output_definitions.artifacts
    for page in ("report", "evidently"):
        assert watch[page].artifact_type.schema_title == "system.HTML"
    known = {name for s in STEPS for name in s.declaration().outputs}
    taken = {name for s in STEPS for name in s.declaration().inputs}
    assert set(tasks.ARTIFACTS) | set(tasks.FIELDS) <= known | taken


def test_the_same_bytes_in_another_process(compiled: Compiled, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from pipelines import compile_experiment; "
        "compile_experiment(sys.argv[1], Path(sys.argv[2]), params=Path(sys.argv[3]), image=sys.argv[4])"
    )
    output = tmp_path / "again.yaml"
    subprocess.run(
        [sys.executable, "-c", program, EXPERIMENTS[0], str(output), str(PARAMS), IMAGE],
        cwd=ROOT,
        env={**os.environ, "PYTHONHASHSEED": "7"},
        check=True,
    )
    assert output.read_text() == compiled[EXPERIMENTS[0]]
    assert [p.name for p in tmp_path.iterdir()] == ["again.yaml"]


def test_nothing_of_this_machine_is_compiled_in(compiled: Compiled) -> None:
    for text in map(compiled.__getitem__, EXPERIMENTS):
        for private in (str(ROOT), str(Path.home()), socket.gethostname(), sys.prefix):
            assert private not in text


@pytest.mark.parametrize(
    ("experiment", "output", "image", "message"),
    [
        ("phantom-xay", "p.yaml", "cadx:latest", "no experiment 'phantom-xay' under vars; it holds: phantom-xray"),
        (EXPERIMENTS[0], "p.json", "cadx:latest", "p.json: Kubeflow takes pipelines as .yaml files"),
        (EXPERIMENTS[0], "p.yaml", "", "image '': no image's name"),
        (EXPERIMENTS[0], "p.yaml", "cadx latest", "image 'cadx latest': no image's name"),
        (EXPERIMENTS[0], "p.yaml", "cadx@sha256:...", "give NAME:TAG or NAME@sha256: and 64 hex digits"),
        (EXPERIMENTS[0], "p.yaml", "Cadx:latest", "the name in lower case"),
        (EXPERIMENTS[0], "p.yaml", "cadx:one:two", "image 'cadx:one:two': no image's name"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_line_and_leaves_nothing(
    experiment: str, output: str, image: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compile_experiment(experiment, tmp_path / output, params=PARAMS, image=image)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_without_kfp_one_line_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kfp", None)
    with pytest.raises(ValueError, match="kfp is not installed: it is the extra 'kubeflow'"):
        compile_experiment(EXPERIMENTS[0], tmp_path / "p.yaml", params=PARAMS, image=IMAGE)


# --- The steps' answers -------------------------------------------------------------------------------


class Task:
    """A task of a compiled pipeline, run here by kfp's own rules for placeholders, input and output."""

    def __init__(self, pipeline: ir.PipelineSpec, name: str, root: Path, arguments: dict[str, Any]) -> None:
        self.spec = pipeline.components[f"comp-{name}"]
        self.executor_input = executor_input_utils.construct_executor_input(
            component_spec=self.spec, arguments=arguments, task_root=str(root), block_input_artifact=False
        )
        self.command = placeholder_utils.replace_placeholders(
            full_command=command(pipeline, name),
            executor_input_dict=executor_input_utils.executor_input_to_dict(self.executor_input, self.spec),
            pipeline_resource_name="pipeline",
            task_resource_name=name,
            pipeline_root=str(root),
            unique_pipeline_id="1",
        )

    def run(self) -> dict[str, Any]:
        """Run the command in the checkout; what kfp reads of the task's outputs."""
        assert self.command[0] == "cadx"
        subprocess.run([sys.executable, "-m", *self.command], cwd=ROOT, check=True)
        return executor_output_utils.get_outputs_for_task(self.executor_input, self.spec)


def test_split_runs_by_kubeflows_command(pipeline: ir.PipelineSpec, tmp_path: Path) -> None:
    dataset, _ = write_dataset(tmp_path / "made")
    validation = tmp_path / "made/validation"
    write_json(validation, {"dataset": digest_path(dataset / "dataset.json"), "quarantined": []})
    root = tmp_path / "artifacts/split"
    arguments = {
        "dataset": dsl.Dataset(name="dataset", uri=str(dataset)),
        "validation": dsl.Artifact(name="validation", uri=str(validation)),
        "params": {"strategy": "patient", "seed": 3.0},
    }
    outputs = Task(pipeline, "split", root, arguments).run()
    assert list(outputs) == ["splits"]
    assert isinstance(outputs["splits"], dsl.Dataset)
    assert outputs["splits"].path == str(root / "splits")
    assert sorted(p.name for p in root.iterdir()) == ["executor_output.json", "splits"]


def test_numbers_and_confusion_reach_kubeflows_pages(pipeline: ir.PipelineSpec, tmp_path: Path) -> None:
    cohort = write_dataset(tmp_path)
    predictions = {
        f"predictions_{seed}": dsl.Dataset(uri=str(write_seed(tmp_path, cohort, seed))) for seed in SEEDS
    }
    arguments = {**predictions, "params": {"resamples": 0.0, "minimum_n": 5.0}}
    outputs = Task(pipeline, "summarise", tmp_path / "artifacts", arguments).run()
    record = json.loads(Path(outputs["metrics"].path).read_text())
    shown = outputs["metrics"].metadata
    assert shown["auc"] == record["metrics"]["auc"]["value"]
    assert shown["auc_low"] == record["metrics"]["auc"]["low"] < shown["auc"] < shown["auc_high"]
    assert all(isinstance(number, float) and math.isfinite(number) for number in shown.values())
    # Without resamples the F1 score has no interval.
    assert "f1" in shown
    assert "f1_low" not in shown
    expected = dsl.ClassificationMetrics()
    expected.log_confusion_matrix(["normal", "opacity"], record["confusion"]["at_operating_point"])
    assert outputs["confusion"].metadata == expected.metadata
    assert Path(outputs["report"].path).read_text().startswith("<!")


class AnswerParams(Params):
    """Of a toy step."""

    promote: bool = True
    alarm: bool = False
    killed: bool = False


@step
def answer(*, source: In, decision: Out, metrics: Out, log: Out, params: AnswerParams) -> None:
    """Answer as a gate and an evaluation would."""
    write_json(decision, {"promote": params.promote, "reasons": []})
    if params.killed:
        os.kill(os.getpid(), signal.SIGKILL)
    metrics.write_text(
        '{"metrics": {"auc": {"value": 0.9, "low": NaN, "high": null}},'
        ' "confusion": {"classes": ["a", "b"], "at_operating_point": [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]},'
        ' "roc": {"false_positive_rate": [0.0, 0.5], "sensitivity": [0.5, 1.0], "threshold": [0.9, 0.1]}}'
    )
    log.write_text('{"epoch": 1}\n{"epoch": 2}\n')
    if params.alarm:
        raise Alarm("look here")


@pytest.fixture
def ask(tmp_path: Path) -> Callable[..., ir.ExecutorOutput]:
    """Run the toy step as Kubeflow would; what kfp reads of it."""
    kinds = {
        "decision": "Artifact",
        "metrics": "Metrics",
        "log": "Artifact",
        "confusion": "ClassificationMetrics",
        "roc": "ClassificationMetrics",
    }
    (tmp_path / "source").write_text("x")

    def run(**params: bool) -> ir.ExecutorOutput:
        asked = {
            "inputs": {"parameterValues": {"params": params}},
            "outputs": {
                "artifacts": {
                    name: {"artifacts": [{
                        "name": name,
                        "type": {"schemaTitle": f"system.{kind}", "schemaVersion": "0.0.1"},
                        "uri": f"minio://bucket/{name}",
                        "metadata": {},
                    }]}
                    for name, kind in kinds.items()
                },
                "parameters": {"promote": {"outputFile": str(tmp_path / "promote")}},
                "outputFile": str(tmp_path / "kfp_outputs/output_metadata.json"),
            },
        }  # fmt: skip
        paths = {name: tmp_path / name for name in ("source", "decision", "metrics", "log")}
        try:
            answer(**paths, params=json.dumps(params), executor_input=json.dumps(asked))
        finally:
            found = executor_output_utils.load_executor_output(asked["outputs"]["outputFile"])
        return found

    return run


@pytest.mark.parametrize("promote", [True, False])
def test_a_decision_becomes_what_kubeflow_branches_on(
    promote: bool, ask: Callable[..., ir.ExecutorOutput]
) -> None:
    found = ask(promote=promote)
    assert found.parameter_values["promote"].WhichOneof("kind") == "bool_value"
    assert found.parameter_values["promote"].bool_value is promote


def test_what_kubeflow_cannot_draw_is_left_out(ask: Callable[..., ir.ExecutorOutput]) -> None:
    found = ask()
    assert set(found.artifacts) == {"decision", "metrics", "log", "confusion", "roc"}
    metadata = {
        name: dict(listed.artifacts[0].metadata) for name, listed in found.artifacts.items() if name != "roc"
    }
    assert metadata == {"decision": {}, "metrics": {"auc": 0.9}, "log": {}, "confusion": {}}
    assert found.artifacts["log"].artifacts[0].uri == "minio://bucket/log"


def test_a_curve_is_drawn_as_kfp_would_log_it(ask: Callable[..., ir.ExecutorOutput]) -> None:
    [roc] = ask().artifacts["roc"].artifacts
    expected = dsl.ClassificationMetrics()
    expected.log_roc_curve(fpr=[0.0, 0.5], tpr=[0.5, 1.0], threshold=[0.9, 0.1])
    assert json_format.MessageToDict(roc.metadata) == expected.metadata


def test_an_alarm_is_raised_after_the_answer(ask: Callable[..., ir.ExecutorOutput], tmp_path: Path) -> None:
    with pytest.raises(Alarm, match="look here"):
        ask(alarm=True)
    assert (tmp_path / "kfp_outputs/output_metadata.json").exists()


def test_a_task_that_is_killed_half_way_leaves_nothing_and_runs_again(
    ask: Callable[..., ir.ExecutorOutput], tmp_path: Path
) -> None:
    child = os.fork()
    if not child:
        try:
            ask(killed=True)
        finally:
            os._exit(0)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")} == {"source"}
    ask()
    made = {"source", "decision", "metrics", "log", "kfp_outputs"}
    assert {path.name for path in tmp_path.iterdir()} == made


@pytest.mark.parametrize("text", ["{{$}}", '{"outputs": {}}', "[]"])
def test_a_foreign_executor_input_is_refused_before_any_work(text: str, tmp_path: Path) -> None:
    (tmp_path / "source").write_text("x")
    paths = {name: tmp_path / name for name in ("source", "decision", "metrics", "log")}
    with pytest.raises(ValueError, match="--executor-input: not what Kubeflow puts"):
        answer(**paths, params="{}", executor_input=text)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize("promote", [True, False])
def test_kfp_takes_the_branch_as_the_decision_says(promote: bool, pipeline: ir.PipelineSpec) -> None:
    [branch] = [task for task in pipeline.root.dag.tasks.values() if task.trigger_policy.condition]
    store = IOStore()
    for name in branch.inputs.parameters:
        store.put_parent_input(name, promote if name.endswith("-promote") else "elsewhere")
    assert ConditionEvaluator.evaluate_condition(branch.trigger_policy.condition, store) is promote


def task_output(channel: str, store: IOStore) -> Any:
    """The value of `pipelinechannel--<task>-<output>`."""
    task, _, output = channel.removeprefix("pipelinechannel--").rpartition("-")
    return store.get_task_output(task, output)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which kfp's local orchestrator runs the compiled commands, here instead of in containers."""
    catalog = yaml.safe_load((ROOT / "data/catalog.yaml").read_text())
    entry = catalog["phantom-xray"]
    entry["parameters"]["num_patients"] = 120
    (tmp_path / "data").mkdir()
    (tmp_path / "data/catalog.yaml").write_text(yaml.safe_dump({"phantom-xray": entry}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(tasks, "SCRATCH", tmp_path / "scratch")
    # Its runner refuses containers' commands, for it has no container: ours need none.
    handler = subprocess_task_handler.SubprocessTaskHandler
    monkeypatch.setattr(handler, "validate_not_container_component", lambda *_: None)
    # Its conditions know task outputs by the name Output alone: any other is taken for false.
    monkeypatch.setattr(ConditionEvaluator, "_resolve_pipeline_channel", staticmethod(task_output))
    local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(tmp_path / "artifacts"))
    return tmp_path


def quick_sections() -> dict[str, dict[str, Any]]:
    """What a run of `phantom-xray` in the folder `here` is given."""
    train = yaml.safe_load(PARAMS.read_text())["phantom-xray"]["train"]
    return {
        "train": {**train, "epochs": 1, "preprocessing": {"height_px": 32, "width_px": 32}},
        "evaluate": {"split": "test", "resamples": 0, "minimum_n": 5},
        "summarise": {"resamples": 0, "minimum_n": 5},
        "gate": {"at_least": {"auc": 0.0}},
    }


def setting(deploy: Deploy) -> Setting:
    return Setting(PARAMS, IMAGE, read_placements(RESOURCES), deploy=deploy)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_pipeline_ends_in_a_served_model(
    here: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with TorchServe(tmp_path_factory.mktemp("serve"), free_ports()) as server:
        training("phantom-xray", setting("torchserve"))(
            **quick_sections(),
            deploy={"golden_samples": 8},
            model_store=str(server.model_store),
            key_file=str(server.key_file),
            inference=server.inference,
            management=server.management,
        )
    [run] = (here / "artifacts").iterdir()
    assert {p.name for p in run.iterdir()} == {*stage_items("phantom-xray"), "choose", "deploy"}
    decisions = [json.loads((run / f"gate-{seed}/decision").read_text()) for seed in SEEDS]
    assert [decision["seed"] for decision in decisions] == SEEDS
    deployment = json.loads((run / "deploy/deployment").read_text())
    assert deployment["model"] == "phantom-xray"
    assert deployment["golden_samples"] == 8
    assert deployment["bundle"] == decisions[0]["bundle"]


@pytest.mark.slow
def test_a_folder_is_answered_by_the_whole_pipeline(
    here: Path,
    ready: Run,  # noqa: F811
    inbox: Path,  # noqa: F811
) -> None:
    inference("phantom-xray", setting("none"))(bundle_uri=str(ready.bundle), images_uri=str(inbox))
    [run] = (here / "artifacts").iterdir()
    answers = pd.read_parquet(run / "predict/predictions")
    assert len(answers) == 5
    assert len((run / "predict/unreadable").read_text().splitlines()) == 2


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("drifts", [False, True])
def test_the_watch_trains_again_where_it_alarms_and_else_ends(
    drifts: bool,
    here: Path,
    served: Served,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two pods' logs lie on the volume, and what deployments sent beside them; a promoted model goes to a volume."""
    monkeypatch.setattr("pipelines.tasks.ROOT", with_one_seed(here / "one-seed"))
    moved = served.shifted(new_scanner=True)
    lines = moved if drifts else served.usual
    volume = here / "volume"
    for name, part in (("a", lines[::2]), ("b", lines[1::2]), ("a/unwatched", moved), ("b/unwatched", moved)):
        (volume / name).mkdir(parents=True)
        write_lines(volume / name, part)
    monitoring("phantom-xray", setting("volume"))(
        **quick_sections(),
        bundle_uri=str(served.bundle.path),
        request_log=str(volume),
        requests=str(volume / "found/requests"),
        models=str(here / "models"),
    )
    [run] = (here / "artifacts").iterdir()
    watched = json.loads((run / "monitor/drift").read_text())
    assert watched["n"] == len(lines)
    assert watched["retrain"] is drifts
    made = {path.name for path in run.iterdir()} - {"monitor"}
    if not drifts:
        assert not made
        return
    assert {"ingest", "train-0", "choose", "deliver"} <= made
    [bundle] = (here / "models").glob("bundle")
    assert json.loads((run / "deliver/delivery").read_text())["bundle"] == Bundle(bundle).digest
