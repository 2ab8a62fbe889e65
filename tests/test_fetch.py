"""A dataset from an S3 server by its digests: what DVC pushed arrives byte by byte, and nothing else does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_dvc import KEYS, SHARD, Checkout, S3Remote, Server, added, damaged, pushed, server  # noqa: F401

from cadx.files import digest_path
from components.fetch import fetch


@pytest.fixture
def remote(server: Server, tmp_path: Path) -> S3Remote:  # noqa: F811
    return S3Remote(server, tmp_path.name)


@pytest.fixture
def asked(pushed: Checkout, remote: S3Remote, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:  # noqa: F811
    """The section of the step for what was pushed; the secret stands where Kubernetes puts it."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEYS["aws_access_key_id"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["aws_secret_access_key"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", remote.settings["endpointurl"])
    [listing] = [name for name in remote.names() if name.endswith(".dir")]
    digest = digest_path(pushed.dataset / "dataset.json")
    return {"remote": remote.url, "md5": "".join(listing.split("/")[-2:]), "digest": digest}


@pytest.mark.slow
def test_what_was_pushed_arrives_byte_by_byte(
    asked: dict[str, Any],
    pushed: Checkout,  # noqa: F811
    tmp_path: Path,
) -> None:
    fetch(dataset=tmp_path / "fetched/dataset", params=json.dumps(asked))
    assert digest_path(tmp_path / "fetched/dataset") == digest_path(pushed.dataset)
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["dataset"]


HARMS: list[tuple[Callable[[S3Remote, str, dict[str, Any]], Any], str]] = [
    (lambda remote, name, _: remote.write(name, damaged(remote.read(name), "changed")), "damaged; delete it"),
    (lambda remote, name, _: remote.lose(name), "no such object; `dvc push` it"),
    (
        lambda remote, name, asked: asked.update(digest="sha256:" + "0" * 64),
        "fetch.digest asks for sha256:000",
    ),
    (lambda remote, name, asked: asked.update(md5="0" * 32 + ".dir"), "no such object"),
    (lambda remote, name, asked: asked.update(md5=""), "fetch.md5: empty; `cadx compile --remote"),
    (lambda remote, name, asked: asked.update(md5="main"), "fetch.md5: string should match pattern"),
    (
        lambda remote, name, asked: asked.update(remote="/mnt/volume"),
        "fetch.remote: string should match pattern",
    ),
]


@pytest.mark.parametrize(
    "endpoint", ["s3.hospital.example", "s3.hospital.example:9000", "https://", "s3://there"]
)
def test_nobody_is_asked_where_the_address_of_the_server_is_none(
    endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    section = {"remote": "s3://cadx/datasets", "md5": "0" * 32 + ".dir", "digest": "sha256:" + "0" * 64}
    with pytest.raises(ValueError, match=f"AWS_ENDPOINT_URL={endpoint}: give it with http:// or https://"):
        fetch(dataset=tmp_path / "dataset", params=json.dumps(section))


@pytest.mark.slow
def test_anything_else_is_refused_in_a_line_and_leaves_nothing(
    asked: dict[str, Any],
    pushed: Checkout,  # noqa: F811
    remote: S3Remote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(section: dict[str, Any], message: str) -> str:
        with pytest.raises(ValueError, match=message) as caught:
            fetch(dataset=tmp_path / "fetched/dataset", params=json.dumps(section))
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.rglob("fetched/*"))
        return str(caught.value)

    name = pushed.object_of(SHARD)
    content = remote.read(name)
    for harm, message in HARMS:
        section = dict(asked)
        harm(remote, name, section)
        refused(section, message)
        remote.write(name, content)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "guessed")
    assert "guessed" not in refused(asked, "see to AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID")
