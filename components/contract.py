"""What a step is: a function whose signature alone declares its command, its stage and its component.

    @step
    def evaluate(*, dataset: In, bundle: In, metrics: Out, params: EvaluateParams) -> None:
        \"\"\"Score a bundle on one split. ...\"\"\"

From that signature come `cadx evaluate --dataset ... --params params.yaml:phantom-xray`, the stage in
dvc.yaml whose cmd is that line, and the Kubeflow component whose container runs it.

Invariants: outputs appear whole or not at all; parameters are checked before any work; this is the only
module that reads params.yaml.
"""

import ast
import copy
import functools
import inspect
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any, Literal, ParamSpec, TypeVar, get_args, get_origin

from cyclopts import Parameter
from pydantic import ValidationError

from cadx.files import digest_bytes, digest_path, plain, replacing, write_json
from cadx.settings import did_you_mean, explain, parse_json, parse_yaml
from cadx.types import Config, Digest

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Role:
    """What a path means to the pipeline around a step."""

    name: Literal["in", "out", "keep"]


In = Annotated[Path, Role("in")]
"""A file or folder that must exist: a dependency."""
Ins = Annotated[tuple[Path, ...], Role("in"), Parameter(consume_multiple=True)]
"""Several of them, one per seed."""
MaybeIn = Annotated[Path | None, Role("in")]
"""One that may be left out; where it is given it must exist, and is a dependency."""
Out = Annotated[Path, Role("out")]
"""A file or folder that the step makes, whole or not at all: an output."""
Keep = Annotated[Path, Role("keep")]
"""A path that the step may read and add to and that outlives the run: neither dependency nor output."""


class Alarm(Exception):
    """The step did its work and its outputs stand, but what it found calls for somebody: exit status 3."""


class Params(Config):
    """Base of a step's parameters: a section of params.yaml, closed and frozen."""


P = ParamSpec("P")
Section = TypeVar("Section", bound=Params)


@dataclass(frozen=True)
class Declaration:
    """A step's signature, read: argument names by what they mean."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    keeps: tuple[str, ...]
    options: tuple[str, ...]
    params: type[Params] | None


@dataclass(frozen=True)
class Step:
    """A step by its name; its function stands in `components/<name>.py` under the same name.

    `reproducible` steps are DVC stages; the others have side effects and run uncached.
    """

    name: str
    reproducible: bool = True

    @property
    def path(self) -> Path:
        """The step's source file."""
        return ROOT / "components" / f"{self.name}.py"

    @property
    def summary(self) -> str:
        """The first line of its docstring, read without importing it: `cadx --help` stays fast."""
        for node in ast.parse(self.path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == self.name:
                return (ast.get_docstring(node) or "").partition("\n")[0]
        raise AssertionError(f"{self.path.name} has no function {self.name}")

    def load(self) -> Callable[..., None]:
        """Import the step and return its function."""
        function: Callable[..., None] = getattr(import_module(f"components.{self.name}"), self.name)
        return function

    def declaration(self) -> Declaration:
        """What its signature declares."""
        return declaration(self.load())


def declaration(function: Callable[..., None]) -> Declaration:
    """Read the declaration off a step's function."""
    roles: dict[str, list[str]] = {"in": [], "out": [], "keep": [], "option": []}
    params: type[Params] | None = None
    for name, parameter in inspect.signature(inspect.unwrap(function)).parameters.items():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{name}: a step takes keyword arguments only"
        if name == "params":
            params = parameter.annotation
        else:
            roles[role.name if (role := _role(parameter.annotation)) else "option"].append(name)
    return Declaration(
        tuple(roles["in"]), tuple(roles["out"]), tuple(roles["keep"]), tuple(roles["option"]), params
    )


def step(function: Callable[P, None]) -> Callable[P, None]:
    """Turn a function with a step's signature into the step, for every door.

    The returned function has the same arguments. It checks that the inputs exist, reads `params` where
    they come as text, and hands the function paths beside its outputs which take their places together
    once it has returned, or raised an `Alarm`. Kubeflow adds `executor_input`: `report_outputs` answers it.
    """
    declared = declaration(function)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        asked = _read_executor_input(str(kwargs.pop("executor_input", "")))
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        arguments = bound.arguments
        if declared.params is not None:
            arguments["params"] = read_params(arguments["params"], function.__name__, declared.params)
        for name in declared.inputs:
            _require(arguments[name], name)
        made = {name: Path(arguments[name]) for name in declared.outputs}
        _require_apart(made, {name: arguments[name] for name in declared.inputs})
        alarm: Alarm | None = None
        with ExitStack() as stack:
            # Of the processes that `torchrun` starts, the first one's outputs are the step's.
            is_first = is_first_process()
            aside = Path() if is_first else Path(stack.enter_context(TemporaryDirectory()))
            for name in declared.outputs:
                target = Path(arguments[name]) if is_first else aside / name
                arguments[name] = stack.enter_context(replacing(target))
            try:
                function(*bound.args, **bound.kwargs)
            except Alarm as error:
                alarm = error
            for name, target in made.items():
                _require_replaceable(target, Path(arguments[name]))
        if asked:
            report_outputs(asked, made)
        if alarm:
            raise alarm

    run.__signature__ = _command_signature(signature)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in _command_signature(signature).parameters.values()}
    return run


def is_first_process() -> bool:
    """Whether this process is the only one, or the first of those that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", "1")) == 1 or int(os.environ.get("RANK", "0")) == 0


def read_params(source: str | Params, step_name: str, cls: type[Section]) -> Section:
    """The step's parameters from `FILE:experiment`, from a JSON object, or as they are.

    Raises:
        ValueError: one line that names the file, the field and the fix.
    """
    if isinstance(source, cls):
        return source
    assert isinstance(source, str), f"params of {step_name} must be {cls.__name__} or text"
    if source.lstrip().startswith("{"):
        where = f"--params of {step_name}"
        section = parse_json(source, where)
    else:
        file, _, experiment = source.rpartition(":")
        if not file:
            raise ValueError(f"--params {source}: give FILE:experiment, as in params.yaml:phantom-xray")
        section = read_experiment(Path(file), experiment).get(step_name)
        where = f"{file}: {experiment}.{step_name}"
    try:
        return cls.model_validate({} if section is None else section)
    except ValidationError as error:
        raise ValueError(explain(error, where, section)) from None


def read_experiment(file: Path, experiment: str) -> dict[str, Any]:
    """One experiment's sections of a parameter file, by step.

    Raises:
        ValueError: if the file is missing, is no YAML, or does not hold the experiment; or if a section bears no
            step's name, since the step that was meant would take its defaults in silence.
    """
    try:
        experiments = _parsed(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise ValueError(f"{file}: no such parameter file; give FILE:experiment") from None
    if not isinstance(experiments, dict) or experiment not in experiments:
        known = ", ".join(map(str, experiments)) if isinstance(experiments, dict) else "none"
        raise ValueError(f"{file}: no experiment {experiment!r}; it holds: {known}")
    if not isinstance(experiments[experiment], dict):
        raise ValueError(f"{file}: {experiment}: holds no sections; give one for each step")
    sections: dict[str, Any] = copy.deepcopy(experiments[experiment])
    steps = sorted({path.stem for path in (ROOT / "components").glob("*.py")} - {"__init__", "contract"})
    for name in sections:
        if name not in steps:
            hint = did_you_mean(str(name), steps) or f"; there are: {', '.join(steps)}"
            raise ValueError(f"{file}: {experiment}.{name}: no such step{hint}")
    return sections


@functools.lru_cache(maxsize=4)
def _parsed(text: bytes, where: str) -> Any:
    """What a parameter file says: it is the same for every step and experiment, and takes long to parse."""
    return parse_yaml(text, where)


def _role(annotation: Any) -> Role | None:
    if get_origin(annotation) is not Annotated:
        return None
    return next((item for item in get_args(annotation)[1:] if isinstance(item, Role)), None)


def _require(value: Path | tuple[Path, ...] | None, name: str) -> None:
    for path in value if isinstance(value, tuple) else (value,):
        if path is not None and not path.exists():
            raise ValueError(
                f"--{name.replace('_', '-')} {path}: no such file or folder; run the step that makes it first"
            )


def _require_apart(made: Mapping[str, Path], given: Mapping[str, Path | tuple[Path, ...] | None]) -> None:
    """No output is, holds or lies within another one or an input: one would be lost, or the input changed."""
    others: list[tuple[str, Path]] = []
    for name, value in given.items():
        paths = value if isinstance(value, tuple) else (value,)
        others += [(name, Path(path).resolve()) for path in paths if path is not None]
    for name, path in made.items():
        target = path.resolve()
        for other, there in others:
            if target == there or target in there.parents or there in target.parents:
                flags = [f"--{word.replace('_', '-')}" for word in (name, other)]
                raise ValueError(
                    f"{flags[0]} {path}: is, holds or lies within {flags[1]}; name another place"
                )
        others.append((name, target))


def _require_replaceable(target: Path, made: Path) -> None:
    """What a step made before gives way to what it made now; a folder of other things, named by mistake, does not.

    Asked of all outputs before the first is put into place.
    """
    if not target.is_dir():
        return
    if not made.is_dir():
        raise ValueError(f"{target}: a folder stands there; name a file")
    held = {path.name for path in target.iterdir()}
    if held and held.isdisjoint(path.name for path in made.iterdir()):
        raise ValueError(f"{target}: holds other things than what belongs there; name a new folder")


def _command_signature(signature: inspect.Signature) -> inspect.Signature:
    text = Annotated[
        str,
        Parameter(help="FILE:experiment, as in params.yaml:phantom-xray, or the step's section as JSON."),
    ]
    parameters = [
        p.replace(annotation=text) if p.name == "params" else p for p in signature.parameters.values()
    ]
    hidden = Annotated[str, Parameter(show=False)]
    kind = inspect.Parameter.KEYWORD_ONLY
    parameters.append(inspect.Parameter("executor_input", kind, default="", annotation=hidden))
    return signature.replace(parameters=parameters)


def _read_executor_input(text: str) -> dict[str, Any]:
    """The outputs that Kubeflow asks for, from what it puts in the place of {{$}}; empty elsewhere."""
    if not text:
        return {}
    try:
        asked: dict[str, Any] = json.loads(text)["outputs"]
        Path(asked["outputFile"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            "--executor-input: not what Kubeflow puts in the place of {{$}}; leave it out"
        ) from None
    return asked


def report_outputs(asked: Mapping[str, Any], made: Mapping[str, Path]) -> None:
    """Tell Kubeflow what a step made: its artifacts with the numbers to show, and parameters to branch on.

    What Kubeflow asks for beyond the step's own outputs is the field of that name in a JSON file among them, at its
    top or one level below: `promote` in decision.json, `retrain` in drift.json, `confusion` and `roc` in metrics.json.

    Args:
        asked: the outputs of Kubeflow's executor input.
        made: the step's outputs, by name.
    """
    contents = {name: _read_fields(path) for name, path in made.items()}
    below = [value for content in contents.values() for value in content.values() if isinstance(value, dict)]
    fields = {name: value for part in (*below, *contents.values()) for name, value in part.items()}
    artifacts = {}
    for name, listed in asked.get("artifacts", {}).items():
        artifact = listed["artifacts"][0]
        content = contents[name] if name in made else fields.get(name)
        artifacts[name] = {"artifacts": [{**artifact, "metadata": _shown(artifact, content)}]}
    # What is undecided (null) is no: Kubeflow's parameters know no null.
    values = {name: bool(fields[name]) for name in asked.get("parameters", {})}
    write_json(Path(asked["outputFile"]), {"artifacts": artifacts, "parameterValues": values})


def _read_fields(path: Path) -> dict[str, Any]:
    """The fields of the JSON object in a file; none where there is anything else."""
    if path.is_dir():
        return {}
    with path.open("rb") as stream:
        start = stream.read(1)
        try:
            fields: dict[str, Any] = json.loads(start + stream.read()) if start == b"{" else {}
        except ValueError:  # JSON lines
            return {}
    return fields


def _shown(artifact: Mapping[str, Any], content: Mapping[str, Any] | None) -> dict[str, Any]:
    """An artifact's metadata in the form that Kubeflow's pages draw; it refuses NaN and null."""
    kind = artifact["type"]["schemaTitle"]
    if content is None:
        return {}
    if kind == "system.Metrics":
        ends = {"": "value", "_low": "low", "_high": "high"}
        numbers = {
            f"{name}{suffix}": estimate[end]
            for name, estimate in content["metrics"].items()
            for suffix, end in ends.items()
        }
        return {name: number for name, number in plain(numbers).items() if number is not None}
    if kind == "system.ClassificationMetrics" and "sensitivity" in content:
        names = {
            "confidenceThreshold": "threshold",
            "recall": "sensitivity",
            "falsePositiveRate": "false_positive_rate",
        }
        points = zip(*(content[name] for name in names.values()), strict=True)
        return {"confidenceMetrics": [dict(zip(names, point, strict=True)) for point in points]}
    if kind == "system.ClassificationMetrics":
        rows = content["at_operating_point"]
        if isinstance(rows[0][0], list):  # multilabel: a table per class, which no page draws
            return {}
        return {
            "confusionMatrix": {
                "annotationSpecs": [{"displayName": name} for name in content["classes"]],
                "rows": [{"row": row} for row in rows],
            }
        }
    return {}


def code_dependencies(step_name: str) -> tuple[str, ...]:
    """The source files that decide what a step does: its first-party import closure, sorted.

    Imports inside functions count too. An edited loss therefore retrains, an edited page does not.
    """
    graph = _import_graph()
    module = f"components.{step_name}"
    closure = {module, *graph.find_upstream_modules(module)}
    files = (ROOT.joinpath(*name.split(".")) for name in closure)
    sources = (path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in files)
    return tuple(sorted(path.relative_to(ROOT).as_posix() for path in sources))


def source_digests(step_name: str) -> dict[str, Digest]:
    """The SHA-256 of each of a step's `code_dependencies`, by its path in the checkout."""
    return {name: digest_path(ROOT / name) for name in code_dependencies(step_name)}


def code_digest(sources: Mapping[str, Digest]) -> Digest:
    """The SHA-256 over what `source_digests` gives: relative names and digests of bytes."""
    listing = (f"{name} {digest}\n" for name, digest in sources.items())
    return digest_bytes("".join(listing).encode())


@functools.cache
def _import_graph() -> Any:
    import grimp

    return grimp.build_graph("cadx", "components", "serving", cache_dir=None)
