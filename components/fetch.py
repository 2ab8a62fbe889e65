"""A dataset folder from a DVC remote on S3, by its digests: where a cluster's data come from.

DVC keeps a folder as objects that bear the MD5 of their content: a list that names the folder, and each file of it.
So a remote is read here without DVC, git or a checkout, by what dvc.lock holds of the folder. MD5 only finds the
objects: what was fetched must have the SHA-256 that is asked for, down to each file.

Whoever reads the bucket is told by the surroundings, never by an argument: AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY, on a cluster from a secret, or what else AWS's own library looks for; AWS_ENDPOINT_URL names a
server that is not Amazon's.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from pydantic import Field

from cadx.datasets import DatasetFolder
from cadx.files import digest_path
from components.contract import Out, Params, step

_CHUNK_BYTES = 1 << 20
_ENDPOINT = "AWS_ENDPOINT_URL"


class FetchParams(Params):
    """Which dataset, and where it lies. `cadx compile --remote` fills all of it in."""

    remote: str = Field(
        default="", pattern="^(s3://[^/]+(/.*)?)?$", description="the DVC remote, such as s3://cadx/datasets"
    )
    md5: str = Field(
        default="",
        pattern=r"^([0-9a-f]{32}\.dir)?$",
        description="DVC's name of the folder: `md5` of the dataset in dvc.lock",
    )
    digest: str = Field(
        default="",
        pattern="^(sha256:[0-9a-f]{64})?$",
        description="SHA-256 of its dataset.json, which lists that of every other file: `dataset` in validation.json",
    )
    connections: int = Field(default=8, ge=1, le=64, description="objects that are read at a time")


@step
def fetch(*, dataset: Out, params: FetchParams) -> None:
    """Take a dataset folder from a DVC remote on S3, by its digests.

    Raises:
        ValueError: if the bucket cannot be read, an object is missing there, or anything has another digest.
    """
    for name in ("remote", "md5", "digest"):
        if not getattr(params, name):
            raise ValueError(f"fetch.{name}: empty; `cadx compile --remote s3://...` takes it from dvc.lock")
    store, root = _open(params.remote)
    with BytesIO() as listed:
        _copy(store, root, params.md5, listed)
        text = listed.getvalue()
    try:
        files = {_relative(entry["relpath"]): str(entry["md5"]) for entry in json.loads(text)}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{params.remote}: {params.md5} is no list of a folder; push it again") from None
    dataset.mkdir()
    for folder in {(dataset / name).parent for name in files}:
        folder.mkdir(parents=True, exist_ok=True)

    def take(name: PurePosixPath) -> None:
        with (dataset / name).open("wb") as stream:
            _copy(store, root, files[name], stream)

    described = PurePosixPath("dataset.json")
    if described not in files:
        raise ValueError(f"{params.remote}: {params.md5} is no dataset folder; push one, or mend fetch.md5")
    take(described)  # before the rest: it decides whether this is what was asked for
    if (found := digest_path(dataset / described)) != params.digest:
        raise ValueError(
            f"{params.remote}: {params.md5} has digest {found}; fetch.digest asks for {params.digest}"
        )
    with ThreadPoolExecutor(params.connections) as pool:
        for _ in pool.map(take, files.keys() - {described}):  # raises what the first of them raised
            pass
    DatasetFolder(dataset).verify()


def _open(remote: str) -> tuple[Any, str]:
    """The file system, and where the objects lie in it: bucket and prefix."""
    from pyarrow.fs import S3FileSystem

    address = urlsplit(remote)
    named = os.environ.get(_ENDPOINT, "")
    endpoint = urlsplit(named)
    # Else Amazon would be asked in its place.
    if named and not (endpoint.scheme in {"http", "https"} and endpoint.netloc):
        raise ValueError(
            f"{_ENDPOINT}={named}: give it with http:// or https://, as in https://s3.hospital.example"
        )
    store = S3FileSystem(endpoint_override=endpoint.netloc or None, scheme=endpoint.scheme or None)
    return store, f"{address.netloc}{address.path}".rstrip("/") + "/files/md5"


def _relative(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(name)
    return path


def _copy(store: Any, root: str, md5: str, target: BinaryIO) -> None:
    """Write the object of that name to `target`."""
    place, hasher = f"{root}/{md5[:2]}/{md5[2:]}", hashlib.md5(usedforsecurity=False)
    try:
        with store.open_input_stream(place) as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                hasher.update(chunk)
                target.write(chunk)
    except FileNotFoundError:
        raise ValueError(f"s3://{place}: no such object; `dvc push` it, or mend fetch.remote") from None
    except OSError as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"s3://{place}: {said}; see to {_ENDPOINT}, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        ) from None
    if hasher.hexdigest() != md5.removesuffix(".dir"):
        raise ValueError(f"s3://{place}: damaged; delete it there and push it again")
