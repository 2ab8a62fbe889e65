"""pyproject.toml names what the code imports, so that no library is there by another's leave."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = ("cadx", "components", "pipelines", "serving", "benchmarks", "tests")


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def imported(file: Path) -> set[str]:
    """Top-level names of what a file imports, but for what it imports from beside it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def test_what_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    declared = {normal(re.split(r"[\s\[<>=!~;]", line, maxsplit=1)[0]) for group in groups for line in group}
    providers = packages_distributions()
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    own = {*PACKAGES, *(file.stem for file in files)}
    undeclared = {
        f"{file.relative_to(ROOT)}: {name}"
        for file in files
        for name in imported(file) - own - sys.stdlib_module_names
        if not declared & {normal(provider) for provider in providers.get(name, ())}
    }
    assert not undeclared
