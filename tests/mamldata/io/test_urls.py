"""Places: what a user may give, and what is said of what cannot be read."""

from __future__ import annotations

from pathlib import Path

import pytest
from fsspec.registry import known_implementations

from mamldata.errors import RequestError
from mamldata.io.urls import find, is_http, is_local, needs_network, open_source, shown_place, shown_text


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the file, and with a space in its name."""
    path = tmp_path / "my files"
    path.mkdir()
    (path / "file.bin").write_bytes(b"data")
    return path


def test_folders(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """By path, relative to where one stands or to one's home, or as an address; only if the file is there."""
    expected = str(folder / "file.bin")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setenv("HOME", str(folder.parent))
    address = folder.as_uri()
    assert "%20" in address
    assert [find(place, "file.bin") for place in (str(folder), "my files", "~/my files", address)] == [expected] * 4
    assert find(str(folder), "other.bin") is None
    with open_source(expected) as stream:
        assert stream.read() == b"data"


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("http://x.example", "http://x.example/f.zip"),
        ("https://x.example/a/b/", "https://x.example/a/b/f.zip"),
        ("https://x.example/a?key=1%2F2", "https://x.example/a/f.zip?key=1%2F2"),
        ("memory://bucket/a", "memory://bucket/a/f.zip"),
    ],
)
def test_addresses(place: str, expected: str):
    """The name is added to the path, before an access key."""
    assert find(place, "f.zip") == expected


def test_what_is_what():
    """A path is local, http is requests' own, and whatever else is not here may touch a network."""
    sources = ["/a/f", "a://b", "HTTP://x/f", "https://x/f", "s3://b/f", "memory://b/f"]
    assert [is_local(source) for source in sources] == [True, False, False, False, False, False]
    assert [is_http(source) for source in sources] == [False, False, True, True, False, False]
    assert [needs_network(source) for source in sources] == [False, True, True, True, True, False]


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("nowhere", "Source nowhere: nowhere is neither a folder, a file nor a URL."),
        ("file:///no/where", "Source file:///no/where: /no/where is neither a folder, a file nor a URL."),
        ("http:///path", "Source http:///path: an address with no host."),
        ("http://[::1/path", "Source http://[::1/path: an address with no host."),
        ("nonsense://x", "nonsense:// is not known. Give a folder, an http(s) address, or a URL that fsspec reads"),
    ],
)
def test_what_cannot_be_read(place: str, message: str):
    """It is wrong usage, and the message says what would be right."""
    with pytest.raises(RequestError) as raised:
        find(place, "f.zip")
    assert message in str(raised.value)
    assert raised.value.exit_code == 2


def test_a_file_in_place_of_its_folder(folder: Path):
    """The file itself may be given; it is no other file."""
    path = str(folder / "file.bin")
    assert find(path, "file.bin") == path
    assert find(path, "other.bin") is None


def test_a_protocol_that_needs_a_package(monkeypatch: pytest.MonkeyPatch):
    """The message names the package."""
    known = {"class": "no_such_package.System", "err": "Install no_such_package to read this"}
    monkeypatch.setitem(known_implementations, "needy", known)
    with pytest.raises(RequestError, match=r"reading needy:// needs another package\. Install no_such_package"):
        find("needy://bucket", "f.zip")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("http://me:secret@example.org:8000/a?b=c", "http://example.org:8000/a?…"),
        ("HTTPS://me@example.org", "https://example.org"),
        ("http://me:sec@ret?@example.org/@a", "http://…"),
        ("ftp://me:secret@[::1]/a/b", "ftp://[::1]/a/b"),
        ("simplecache::sftp://me:secret@host/a", "simplecache::sftp://host/a"),
        ("s3://bucket/a?X-Amz-Signature=secret", "s3://bucket/a?…"),
        ("https://example.org/a#token=secret", "https://example.org/a#…"),
        ("/data/me@home/a?b", "/data/me@home/a?b"),
        ("http://[secret@/a", "http:///a"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("s3://AKIA:se/cret@bucket/a", "s3://…@bucket/a"),
        ("https://example.org/a?key=sec@ret", "https://…"),
        ("zip://a.zip::http://me:secret@host/x?secret", "zip://…@host/x?…"),
        ("file:///data/me@home/a", "file:///data/me@home/a"),
        ("file://me:secret@host/a", "file://host/a"),
        ("https://[me:secret@", "https://"),
        (Path("folder"), "folder"),
    ],
)
def test_places_are_shown_without_passwords(place: str | Path, expected: str):
    """Of an address neither user, password nor query; of a path all; of what is neither no error."""
    assert shown_place(place) == expected
    assert shown_place("me:secret@http://host") == "…://…"
    assert shown_text(f"Failed to parse: '{place}', HTTP://a:b@c") == f"Failed to parse: '{expected}', http://c"
