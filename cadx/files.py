"""Bytes on disk: digests, canonical JSON, locks, writes that appear whole or not at all."""

import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cadx.types import Digest

_CHUNK_BYTES = 1 << 20


def digest_bytes(data: bytes) -> Digest:
    """The SHA-256 of `data`.

    >>> digest_bytes(b"")[:14]
    'sha256:e3b0c44'
    """
    return Digest("sha256:" + hashlib.sha256(data).hexdigest())


def digest_path(path: Path, *, without: Callable[[str], bool] = lambda name: False) -> Digest:
    """The SHA-256 of a file's bytes, or of a folder's sorted relative names and file digests.

    Args:
        path: the file or folder.
        without: whether what bears this name in a folder is left out, of a folder with all that it holds.

    Raises:
        FileNotFoundError: if nothing is there.
    """
    if path.is_dir():
        files = (p for p in path.rglob("*") if p.is_file())
        members = sorted(p for p in files if not any(map(without, p.relative_to(path).parts)))
        listing = "".join(f"{p.relative_to(path).as_posix()} {digest_path(p)}\n" for p in members)
        return digest_bytes(listing.encode())
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            hasher.update(chunk)
    return Digest("sha256:" + hasher.hexdigest())


def plain(value: Any) -> Any:
    """`value` in JSON's own types: NumPy scalars and arrays unwrapped, NaN and infinities as None.

    >>> import numpy as np
    >>> plain({"a": np.float32(0.5), "b": float("nan"), "c": (1, np.int64(2)), "d": np.arange(2)})
    {'a': 0.5, 'b': None, 'c': [1, 2], 'd': [0, 1]}
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy's arrays and scalars, without importing it
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def canonical_json(value: Any) -> str:
    """The one text of `value`: two-space indent, keys in the order given, a final newline, no NaN."""
    return json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_json(path: Path, value: Any) -> None:
    """Write `value` as canonical JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(canonical_json(value), encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: one line that names it, if it is no JSON.
    """
    return _parsed(path, path.read_bytes())


def read_json_lines(path: Path) -> list[Any]:
    """What each line of a file of JSON lines holds.

    Raises:
        FileNotFoundError, ValueError: as `read_json`.
    """
    return [_parsed(path, line) for line in path.read_bytes().splitlines()]


def _parsed(path: Path, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); run the step that makes it again") from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` only if the block succeeds.

    What a killed run left beside `path` is cleared first, what a live one is writing is not: of two that end,
    the later one stands. The block may make a file or a folder there.

    Raises:
        AssertionError: if the block wrote nothing.
        ValueError: if a folder stands at `path` and the block wrote a file; or, before it, if something stands there
            that is neither, such as a device.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ValueError(f"{path}: neither a file nor a folder stands there; name another place")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Also what was being put into such a partial file in its turn: its name begins with one dot more.
    for stale in path.parent.glob(f"*.{path.name}.*.partial"):
        if not _is_alive(stale.name.split(".")[-2]):
            _remove(stale)
    partial = path.parent / f".{path.name}.{os.getpid()}.partial"
    try:
        yield partial
        assert partial.exists(), f"nothing was written for {path}"
        if path.is_dir():
            if not partial.is_dir():
                raise ValueError(f"{path}: a folder stands there; name a file")
            _remove(path)
        partial.replace(path)
    finally:
        _remove(partial)


@contextmanager
def locked(path: Path, busy: str) -> Iterator[int]:
    """The descriptor of a lock file, which nobody else gets while it is open here or in a child.

    The lock goes with the processes that hold it, however they end.

    Raises:
        ValueError: `busy`, if somebody holds it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(busy) from None
        yield lock.fileno()


def _is_alive(process_id: str) -> bool:
    try:
        os.kill(int(process_id), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:  # another user's
        return True
    return int(process_id) != os.getpid()


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
