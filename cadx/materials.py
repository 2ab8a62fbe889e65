"""The bill of materials of a model: which software made it and must be there to run it, in CycloneDX's form.

It names what cadx itself requires, with all that those require in turn, and not whatever else is installed
beside it: the same lock therefore gives the same bytes on a laptop with every extra and in a bare image.
"""

import functools
import json
import tomllib
import uuid
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from cadx.types import Digest

_PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def bill_of_materials(name: str, files: Mapping[str, Digest]) -> dict[str, Any]:
    """The bill of a model in CycloneDX 1.6: its files with their digests, the libraries with their versions.

    No date and no random number stands in it: equal weights and equal libraries give an equal bill.

    Args:
        name: the model's.
        files: the weights, file -> digest.
    """
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6
    from packageurl import PackageURL

    model = Component(name=name, type=ComponentType.MACHINE_LEARNING_MODEL, bom_ref=f"model:{name}")
    for file, digest in files.items():
        model.components.add(
            Component(
                name=file,
                type=ComponentType.FILE,
                bom_ref=f"file:{file}",
                hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest.removeprefix("sha256:"))],
            )
        )
    libraries = {}
    for distribution, version in required_distributions().items():
        purl = PackageURL("pypi", name=distribution, version=version)
        libraries[distribution] = Component(
            name=distribution, version=version, type=ComponentType.LIBRARY, purl=purl, bom_ref=str(purl)
        )
    bill = Bom(
        serial_number=uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(dict(files))), components=libraries.values()
    )
    bill.metadata.component = model
    bill.register_dependency(model, libraries.values())
    content: dict[str, Any] = json.loads(JsonV1Dot6(bill).output_as_string())
    content["metadata"].pop("timestamp", None)
    return content


@functools.cache
def required_distributions() -> Mapping[str, str]:
    """Every distribution that cadx requires, directly or not, without extras: name -> installed version, sorted.

    >>> "torch" in required_distributions(), "pytest" in required_distributions()
    (True, False)
    """
    # From the project's own file and not its installation: an image holds the checkout alone.
    project = tomllib.loads(_PROJECT.read_text(encoding="utf-8"))["project"]
    found: dict[str, str] = {"cadx": project["version"]}
    seen: set[tuple[str, str]] = set()
    pending = [
        (canonicalize_name(required.name), wanted)
        for required in map(Requirement, project["dependencies"])
        for wanted in ("", *required.extras)
    ]
    while pending:
        distribution, extra = pending.pop()
        if (distribution, extra) in seen:
            continue
        seen.add((distribution, extra))
        try:
            installed = metadata.distribution(distribution)
        except metadata.PackageNotFoundError:  # a requirement that this platform does without
            continue
        found[distribution] = installed.version
        for line in installed.requires or ():
            required = Requirement(line)
            if required.marker is None or required.marker.evaluate({"extra": extra}):
                name = canonicalize_name(required.name)
                pending += [(name, wanted) for wanted in ("", *required.extras)]
    return dict(sorted(found.items()))
