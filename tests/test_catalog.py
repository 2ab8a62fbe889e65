"""The catalogue: entries that are checked, bytes that are checked, and pseudonyms."""

import hashlib
import http.server
import re
import stat
import textwrap
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from cadx.catalog import (
    BoxTable,
    FolderEntry,
    NpzEntry,
    PairsEntry,
    TableEntry,
    digest_source,
    fetch,
    load_catalog,
    pseudonym,
    read_rows,
    site_key,
)
from cadx.files import digest_path

COMMON = {
    "title": "T", "task": "binary", "classes": ["a", "b"], "positive": "b", "modality": "chest X-ray",
    "licence": "L", "citation": "C", "patient": "per-image",
}  # fmt: skip


def entry(**fields: object) -> NpzEntry:
    return NpzEntry.model_validate(COMMON | {"format": "npz", "file": "set/set.npz"} | fields)


def write_catalog(path: Path, **entries: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump(entries), encoding="utf-8")
    return path


def write_png(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8), value, np.uint8)).save(path)


@pytest.fixture(autouse=True)
def closed_surroundings(monkeypatch):
    for name in ("CADX_DATA_MIRROR", "CADX_SITE_KEY"):
        monkeypatch.delenv(name, raising=False)


# --- Entries ------------------------------------------------------------------------------------------


def test_our_own_catalogue_loads_and_names_its_sources(root):
    entries = load_catalog(root / "data/catalog.yaml")
    names = {"phantom-xray", "pneumoniamnist", "pneumoniamnist-official", "pneumoniamnist-9to1", "nih-rsna"}
    assert names <= set(entries)
    assert entries["phantom-xray"].positive == "opacity"
    assert "rebuilt" in entries["pneumoniamnist"].title
    assert "not" in entries["pneumoniamnist"].note
    assert entries["pneumoniamnist"].address is None
    assert entries["pneumoniamnist-official"].digest == "md5:28209eda62fecd6e6a2d98b1501bb15f"


def test_the_readme_says_which_sets_can_be_fetched(root):
    (names,) = re.findall(
        r"entries have an address: ([^.]*)\.", (root / "README.md").read_text(encoding="utf-8")
    )
    entries = load_catalog(root / "data/catalog.yaml")
    assert set(re.findall(r"`(.*?)`", names)) == {
        name for name, one in entries.items() if getattr(one, "address", None)
    }


def test_the_readmes_section_for_the_official_file_is_the_rebuilt_ones(root):
    """What it tells to write into params.yaml, by an alias that stands there."""
    (section,) = re.findall(
        r"\n((?:    .*\n)*    pneumoniamnist-official:\n(?:    .*\n)*)",
        (root / "README.md").read_text(encoding="utf-8"),
    )
    params = (root / "params.yaml").read_text(encoding="utf-8") + "\n" + textwrap.dedent(section)
    rebuilt, official = map(yaml.safe_load(params).get, ("pneumoniamnist", "pneumoniamnist-official"))
    assert official.pop("ingest") == rebuilt.pop("ingest") | {"source": "pneumoniamnist-official"}
    assert official == rebuilt


def test_our_own_catalogue_agrees_with_the_mirror(root, mirror, monkeypatch, tmp_path):
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))
    entries = load_catalog(root / "data/catalog.yaml")
    for name in ("pneumoniamnist", "pneumoniamnist-9to1", "nih-rsna", "tcga-brca"):
        assert fetch(name, entries[name], tmp_path / "cache") == mirror / entries[name].file
    assert not (tmp_path / "cache").exists(), "a mirror is used in place"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"patientt": "public"}, r"mine\.patientt: unknown parameter; did you mean 'patient'"),
        ({"format": "nifti"}, r"mine\.format: input should be one of 'npz', 'folder', 'table', .*'phantom'"),
        ({"format": ["npz"]}, r"mine\.format: input should be one of"),
        ({"digest": "sha256:12"}, r"mine\.digest"),
        ({"file": "../../etc/passwd"}, r"must not climb out"),
        ({"address": "https://example.org/x"}, "an address needs a digest"),
        ({"address": "file:///etc/passwd", "digest": "md5:" + 32 * "0"}, r"mine\.address"),
        ({"patient": "ask"}, r"mine\.patient"),
    ],
)
def test_wrong_entries_are_one_line_with_file_entry_and_field(tmp_path, fields, reason):
    path = write_catalog(tmp_path / "catalog.yaml", mine=COMMON | {"format": "npz", "file": "x.npz"} | fields)
    with pytest.raises(ValueError, match=reason) as caught:
        load_catalog(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_labels_of_a_table_must_fit_task_and_classes():
    table = COMMON | {"format": "table", "file": "x", "table": "t.csv"}
    for fields, reason in (
        ({}, "either label_column or label_columns"),
        ({"label_columns": {"a": "a"}}, "task multilabel"),
        ({"label_column": "y", "values": {"0": "c"}}, "c, which is not among the classes"),
        ({"label_column": "y", "boxes": {"table": "b.csv", "x1": "x1"}}, "x1 and y1, or width and height"),
    ):
        with pytest.raises(ValueError, match=reason):
            TableEntry.model_validate(table | fields)


@pytest.mark.parametrize(
    ("columns", "fits"),
    [
        (["x1", "y1"], True),
        (["width", "height"], True),
        (["x1", "y1", "width"], False),
        (["x1", "width", "height"], False),
        (["x1", "height"], False),
        (["x1", "y1", "width", "height"], False),
    ],
)
def test_a_box_ends_at_corners_or_has_a_size_and_nothing_of_both(columns, fits):
    fields = {"table": "b.csv"} | {name: name for name in columns}
    if fits:
        assert BoxTable.model_validate(fields)
        return
    with pytest.raises(ValueError, match="give the columns x1 and y1, or width and height, and none of"):
        BoxTable.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"classes": ["a", "b"]}, "for each of the classes but none, which patches.other names"),
        ({"patches": None}, "must give a value for each of the classes"),
        ({"kind": "image"}, "patches are of kind volume and of one class each"),
        ({"task": "multilabel"}, "patches are of kind volume and of one class each"),
    ],
)
def test_patches_are_of_volumes_and_name_the_class_between_the_marked(fields, reason):
    pairs = COMMON | {
        "format": "pairs", "kind": "volume", "task": "multiclass", "classes": ["none", "a", "b"], "file": "x",
        "images": "i", "masks": "m", "mask_values": {"a": 1, "b": 2},
        "patches": {"size_mm": [8, 8, 8], "per_class": 1, "other": "none", "margin_mm": 2},
    }  # fmt: skip
    assert PairsEntry.model_validate(pairs).patches
    with pytest.raises(ValueError, match=reason):
        PairsEntry.model_validate(pairs | fields)


@pytest.mark.parametrize("text", ["a: [", "- 1", "[]", "a: 1", "a:", "1: {}", "a: {title: x}", "\xff"])
def test_a_file_that_is_no_catalogue(tmp_path, text):
    path = tmp_path / "catalog.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"^[^\n]*catalog\.yaml"):
        load_catalog(path)
    with pytest.raises(ValueError, match="no such catalogue"):
        load_catalog(tmp_path / "absent.yaml")


# --- Fetching -----------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path):
    """A loopback web server of a folder: its address and the folder."""
    folder = tmp_path / "www"
    folder.mkdir()

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}", folder
        running.shutdown()
        thread.join()


def test_order_is_cache_then_mirror_then_address(tmp_path, server, monkeypatch):
    address, www = server
    (www / "set.npz").write_bytes(b"bytes")
    digest = digest_path(www / "set.npz")
    wanted = entry(address=f"{address}/set.npz", digest=digest)
    cache, mirror = tmp_path / "cache", tmp_path / "mirror"

    fetched = fetch("mine", wanted, cache)
    assert fetched.is_relative_to(cache)
    assert fetched.read_bytes() == b"bytes"
    (www / "set.npz").unlink()
    assert fetch("mine", wanted, cache) == fetched, "a second time from the cache"

    fetched.unlink()
    (mirror / "set").mkdir(parents=True)
    (mirror / "set/set.npz").write_bytes(b"bytes")
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))
    assert fetch("mine", wanted, cache) == mirror / "set/set.npz"


def test_published_md5_is_checked(tmp_path, server):
    address, www = server
    (www / "set.npz").write_bytes(b"bytes")
    md5 = "md5:" + hashlib.md5(b"bytes").hexdigest()
    assert fetch("mine", entry(address=f"{address}/set.npz", digest=md5), tmp_path / "cache").is_file()


@pytest.mark.parametrize("where", ["cache", "mirror", "address"])
def test_a_differing_digest_is_refused_wherever_the_bytes_come_from(tmp_path, server, monkeypatch, where):
    address, www = server
    cache, mirror = tmp_path / "cache", tmp_path / "mirror"
    place = {"cache": cache / "mine/set.npz", "mirror": mirror / "set/set.npz", "address": www / "set.npz"}
    place[where].parent.mkdir(parents=True, exist_ok=True)
    place[where].write_bytes(b"other bytes")
    monkeypatch.setenv("CADX_DATA_MIRROR", str(mirror))
    declared = "sha256:" + 64 * "0"
    with pytest.raises(ValueError, match=r"^[^\n]*$") as caught:
        fetch("mine", entry(address=f"{address}/set.npz", digest=declared), cache)
    assert declared in str(caught.value)
    assert digest_path(place[where]) in str(caught.value)
    if where == "address":
        assert not [path for path in cache.rglob("*") if path.is_file()], "nothing half-fetched may stay"


def test_a_closed_network_gives_one_line_that_names_the_mirror(tmp_path):
    wanted = entry(address="http://127.0.0.1:9/set.npz", digest="sha256:" + 64 * "0")
    with pytest.raises(
        ValueError, match="closed network set CADX_DATA_MIRROR to a folder that holds set/set"
    ):
        fetch("mine", wanted, tmp_path / "cache")
    with pytest.raises(ValueError, match="no address to fetch it from; set CADX_DATA_MIRROR"):
        fetch("mine", entry(), tmp_path / "cache")


def test_ones_own_folder_is_used_in_place_and_checked(tmp_path):
    write_png(tmp_path / "own/a/Ignatowska.png")
    own = FolderEntry.model_validate(
        COMMON | {"format": "folder", "file": str(tmp_path / "own"), "digest": digest_path(tmp_path / "own")}
    )
    assert fetch("own", own, tmp_path / "cache") == tmp_path / "own"
    write_png(tmp_path / "own/a/more.png")
    with pytest.raises(ValueError, match=r"has digest sha256:.* its entry says sha256:") as caught:
        fetch("own", own, tmp_path / "cache")
    assert "Ignatowska" not in str(caught.value)


@pytest.mark.parametrize("litter", ["a/Thumbs.db", ".DS_Store", "a/@eaDir/x.png/SYNOFILE_THUMB_M.png"])
def test_what_systems_put_into_a_folder_does_not_change_its_digest(tmp_path, litter):
    write_png(tmp_path / "own/a/1.png")
    own = FolderEntry.model_validate(
        COMMON
        | {"format": "folder", "file": str(tmp_path / "own"), "digest": digest_source(tmp_path / "own")}
    )
    assert own.digest == digest_path(tmp_path / "own"), "as it was where nothing of the kind lies there"
    (tmp_path / "own" / litter).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "own" / litter).write_bytes(b"left by itself")
    assert fetch("own", own, tmp_path / "cache") == tmp_path / "own"
    assert digest_source(tmp_path / "own") == own.digest != digest_path(tmp_path / "own")


# --- Pseudonyms ---------------------------------------------------------------------------------------


def test_site_key_is_made_once_and_private(tmp_path):
    key = site_key(tmp_path / "cache")
    assert site_key(tmp_path / "cache") == key
    assert len(key) == 32
    (made,) = tmp_path.iterdir()
    assert stat.S_IMODE(made.stat().st_mode) == 0o600


def test_site_key_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CADX_SITE_KEY", 32 * "ab")
    assert site_key(tmp_path / "cache") == bytes.fromhex(32 * "ab")
    assert not list(tmp_path.iterdir())
    for text, reason in (("xyz", "not hexadecimal"), ("abcd", "too short")):
        monkeypatch.setenv("CADX_SITE_KEY", text)
        with pytest.raises(ValueError, match=reason) as caught:
            site_key(tmp_path / "cache")
        assert text not in str(caught.value)


def test_pseudonyms_depend_on_key_kind_and_text():
    one, other = bytes(32), bytes(31) + b"\x01"
    names = {
        pseudonym(one, "patient", "4711"), pseudonym(other, "patient", "4711"),
        pseudonym(one, "sample", "4711"), pseudonym(one, "patient", "4712"),
    }  # fmt: skip
    assert len(names) == 4
    assert not any("4711" in name for name in names)


# --- Tables -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "\ufefffile,label\na.png,x\n",
        'file;label\r\n"a.png"; x\r\n\r\n',
        "file\tlabel\na.png\tx",
        "\ufeffsep=;\r\nfile;label\r\na.png;x\r\n",
        "sep=\t\nfile\tlabel\na.png\tx",
        "file;label;;\na.png;x;;\n",
        "file,label,\na.png,x, \n",
        "file,label,,\na.png,x\n",
    ],
)
def test_tables_as_programs_of_hospitals_write_them(tmp_path, text):
    (tmp_path / "t.csv").write_bytes(text.encode())
    assert read_rows(tmp_path / "t.csv") == [{"file": "a.png", "label": "x"}]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"file,label\n", "no rows"),
        (b"", "no rows"),
        (b"file,file\na,b\n", "stands twice"),
        (b"file,label\na,x\nIgnatowska\n", "row 3: 1 cells, but 2 columns"),
        (b"file,label\na,x,Ignatowska\n", "row 2: 3 cells, but 2 columns"),
        (b"file,label,,\na,x,,Ignatowska\n", "stands twice"),
        (b"file,label\n\xff,x\n", "not UTF-8"),
        (b'file,label\na,x\nb,"Ignatowska\nc,y\n', "row 3: no CSV: a quote is not closed"),
        (b'file,label\n"a,x\nb,"Ignatowska"\nc,y\n', "row 2: no CSV: a quote is not closed"),
        (b'file,label\na,"Ignatowska" x\n', "row 2: no CSV: .* does not end its cell"),
        (b"file,label\na," + b"x" * 200_000, "row 2: no CSV: .* a cell is too"),
    ],
)
def test_broken_tables(tmp_path, data, reason):
    (tmp_path / "t.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"^t\.csv.*{reason}") as caught:
        read_rows(tmp_path / "t.csv")
    assert "Ignatowska" not in str(caught.value)
