"""What is put in service: one file with a bundle, the handler that answers from it, and what released it.

    MAR-INF/MANIFEST.json    what TorchServe reads
    release.json             the Release
    <kind>_handler.py        the class that TorchServe calls: radiograph, volume, slide or detection; of bags of
                             numbers none, as no endpoint takes them
    bundle/...               the bundle folder

The same bundle and release give the same bytes, wherever and whenever they are packed.
"""

import inspect
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, ValidationError, model_validator

from cadx.files import canonical_json, replacing
from cadx.types import Config, Digest, Task

if TYPE_CHECKING:
    from cadx.bundle import Manifest

MANIFEST = "MAR-INF/MANIFEST.json"
RELEASE = "release.json"
BUNDLE = "bundle"
VERSION_DIGITS = 12
NAME_PATTERN = r"^[a-z0-9][a-z0-9._-]*$"
"""Of a model: it stands in addresses and in file names."""

_EPOCH = (1980, 1, 1, 0, 0, 0)  # the first date that a zip archive can hold


class Verdict(Config):
    """What the gate decided of the bundle, and why; `digest` is that of its decision.json."""

    promote: bool
    reasons: tuple[str, ...] = ()
    digest: Digest | None = None


class Release(Config):
    """What release.json says.

    Attributes:
        name: the model's name in the server's addresses.
        version: the first 12 hex digits of the bundle's digest.
        bundle: the bundle's digest.
        metrics: digest of the metrics.json that the decision rests on.
        classes: as in the bundle, like `positive`, `task`, `experiment` and `seed`.
        prevalence: class -> its share where the model is used; empty where it is that of the calibration split.
    """

    schema_version: Literal[1] = 1
    name: str = Field(pattern=NAME_PATTERN)
    version: str
    bundle: Digest
    decision: Verdict
    metrics: Digest
    classes: tuple[str, ...]
    positive: str | None
    task: Task
    experiment: str
    seed: int
    prevalence: dict[str, float] = Field(default={})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.version != version_of(self.bundle):
            raise ValueError(f"version {self.version} is not that of the bundle, {version_of(self.bundle)}")
        return self


def release_of(
    name: str,
    manifest: "Manifest",
    bundle: Digest,
    decision: Verdict,
    metrics: Digest,
    prevalence: Mapping[str, float] | None = None,
) -> Release:
    """What release.json says of a bundle by its digest, under a decision that rests on `metrics`."""
    return Release(
        name=name,
        version=version_of(bundle),
        bundle=bundle,
        decision=decision,
        metrics=metrics,
        classes=manifest.classes,
        positive=manifest.positive,
        task=manifest.task,
        experiment=manifest.experiment,
        seed=manifest.seed,
        prevalence=dict(prevalence or {}),
    )


def version_of(bundle: Digest) -> str:
    """A bundle's version in service.

    >>> version_of(Digest("sha256:0123456789abcdef"))
    '0123456789ab'
    """
    return bundle.removeprefix("sha256:")[:VERSION_DIGITS]


def write_archive(path: Path, bundle: Path, release: Release) -> None:
    """Write the archive of a bundle, whole or not at all.

    Raises:
        ValueError: if the bundle is damaged, incomplete, or another than the release says.
    """
    # Here, since it imports torch, which readers of an archive do without.
    from cadx.bundle import MANIFEST as BUNDLE_MANIFEST
    from cadx.bundle import Bundle

    opened = Bundle(bundle)
    if opened.digest != release.bundle:
        raise ValueError(f"{bundle}: its digest is {opened.digest}, the release is of {release.bundle}")
    # A detector is complete without an operating point, but no box could be called.
    if not opened.is_complete or opened.manifest.operating_point is None:
        raise ValueError(f"{bundle}: no temperature and operating point yet; run `cadx calibrate` first")
    handler = _handler(opened.manifest)
    model = {"modelName": release.name, "modelVersion": release.version}
    manifest = {
        "runtime": "python",
        "model": model | ({"handler": handler[0]} if handler else {}),
        # TorchServe warns of an archive without these two.
        "archiverVersion": "0.12.0",
        "createdOn": "01/01/1980 00:00:00",
    }
    members = {
        MANIFEST: canonical_json(manifest).encode(),
        RELEASE: canonical_json(release.model_dump(mode="json")).encode(),
    }
    if handler:
        members[handler[0]] = handler[1].encode()
    for file in (BUNDLE_MANIFEST, *opened.manifest.files):
        members[f"{BUNDLE}/{file}"] = (bundle / file).read_bytes()
    with replacing(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        for name in sorted(members):
            member = zipfile.ZipInfo(name, _EPOCH)
            member.create_system, member.external_attr = 3, 0o100644 << 16
            # Stored: what zlib makes of the same bytes differs from one of its versions to the next.
            archive.writestr(member, members[name], zipfile.ZIP_STORED)


def _handler(manifest: "Manifest") -> tuple[str, str] | None:
    """File name and source of the handler of a bundle's endpoint; None if no endpoint takes its samples."""
    # Imported, though only its text is needed: so it shows what an archive depends on.
    from cadx.predicting.predictor import subject_of
    from serving import detection_handler, radiograph_handler, slide_handler, volume_handler

    kind = "detection" if manifest.task == "detection" else subject_of(manifest).kind
    handlers = {
        "image": radiograph_handler,
        "volume": volume_handler,
        "slide": slide_handler,
        "detection": detection_handler,
    }
    if kind not in handlers:
        return None
    return f"{handlers[kind].__name__.rpartition('.')[2]}.py", inspect.getsource(handlers[kind])


def read_release(path: Path) -> Release:
    """The release in an archive.

    Raises:
        ValueError: if there is no such file, or it is no archive of this version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            text = archive.read(RELEASE)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such archive; write it with `cadx package`") from None
    except (zipfile.BadZipFile, KeyError, IsADirectoryError):
        raise ValueError(f"{path}: no archive with a {RELEASE}; write it with `cadx package`") from None
    return parse_release(text, f"{path}: {RELEASE}")


def require_endpoint(path: Path) -> None:
    """Check that TorchServe can answer from an archive.

    Raises:
        ValueError: if it holds no handler.
    """
    with zipfile.ZipFile(path) as archive:
        model = json.loads(archive.read(MANIFEST))["model"]
    if "handler" not in model:
        raise ValueError(
            f"{path}: no endpoint takes samples of its kind; ask such a model with `cadx.predicting.Predictor`"
        )


def parse_release(text: bytes, where: str) -> Release:
    """The release in the bytes of a release.json.

    Raises:
        ValueError: if they hold none of this version.
    """
    try:
        return Release.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {field}: {first['msg']}; package the bundle again") from None
    except ValueError:
        raise ValueError(f"{where}: not JSON; package the bundle again") from None
