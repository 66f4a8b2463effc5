"""Manifests: the built-in ones say what is true, and every fault of a user's own is reported, at once and in place."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.toml import builtin_names, parse_manifest
from mamldata.errors import ManifestError, RequestError

MIRRORS = (
    "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/",
    "https://github.com/brendenlake/omniglot/raw/master/python/",
)
# name: bytes, sha256, content digest; the genuine files as published.
GENUINE = {
    "omniglot": {
        "images_background.zip": (
            9_464_212,
            "ad41ab679c8b5d90b271ef46be6987cc81211774a695c29dcc5367b2b26ee640",
            "7c563fb7d98dbd312c5e0ccb87230ca9d7e8a13d672e5de6186245e7905ed43e",
        ),
        "images_evaluation.zip": (
            6_462_886,
            "1f61a8f3366785b057fc117d9228e78a16e3d976c8953b2a10fcc74cf0609cee",
            "e5a69b751aa33f555bdc92febd48220b69a811b2ff01de32bf4d1bca47bd1809",
        ),
    },
    "omniglot-small": {
        "images_background_small1.zip": (
            1_319_022,
            "f38eb80f801274ac2b4dff5b24289016bfaba4a7d5bb50deebf27104ad6cb8a4",
            "a322856af6a87f0abbbb9e07eb5595f6d5210fa4e9d1b3c5fdb19b4821c619c1",
        ),
        "images_background_small2.zip": (
            1_580_917,
            "3ccaa407515a8778e5d0861875af38b17e418f301ad5bb3b5a6b65d901a41c7f",
            "326818df8d4197e0825f5075b2c4a169f9c76d3218ceb52a999172b16414e97b",
        ),
    },
}

GOOD = """\
format = "mamldata-manifest/1"
name = "mine"
title = "Mine"
version = "1"
licence = "MIT"
homepage = "https://example.org"
citation = "None."
rotations = "none"
split_scheme = "own"

[[files]]
name = "mine.zip"
urls = ["https://example.org/mine.zip"]
bytes = 10
sha256 = "0000000000000000000000000000000000000000000000000000000000000000"

[reader]
type = "class-folders"

[image]
size = 28
channels = 1
resampling = "lanczos"

[splits.own]
description = "mine"
seed = 0
train = 2
val = 1
test = 1
"""


def parsed(text: str, folder: Path = Path()) -> Manifest:
    return parse_manifest(text.encode(), "mine.toml", folder)


def faults(*changes: tuple[str, str], folder: Path = Path()) -> tuple[str, ...]:
    """The faults of the good manifest with each ``old`` replaced by ``new``."""
    text = GOOD
    for old, new in changes:
        assert text.count(old) == 1
        text = text.replace(old, new)
    with pytest.raises(ManifestError) as caught:
        parsed(text, folder)
    return caught.value.faults


@pytest.mark.parametrize("dataset", sorted(GENUINE))
def test_builtin_omniglot_has_the_genuine_figures(dataset: str) -> None:
    """Sizes and digests are those of the published files; each file has two mirrors."""
    files = {file.name: file for file in load_manifest(dataset).files}
    assert {name: (f.bytes, f.sha256, f.content_sha256) for name, f in files.items()} == GENUINE[dataset]
    for name, file in files.items():
        assert file.urls == tuple(mirror + name for mirror in MIRRORS)


def test_builtin_names() -> None:
    """The datasets that come with the package."""
    assert {"glyphs", "omniglot", "omniglot-small"} <= set(builtin_names())
    assert builtin_names() == sorted(builtin_names())


@pytest.mark.parametrize("name", builtin_names())
def test_every_builtin_is_whole(name: str) -> None:
    """Each loads, is called what its file is called, and its default scheme is one of its schemes."""
    manifest = load_manifest(name)
    assert manifest.name == name == manifest.reference
    assert manifest.scheme().name == manifest.split_scheme
    assert all(scheme.description for scheme in manifest.schemes.values())


def test_three_faults_in_one_error() -> None:
    """All faults are reported at once, each with its place, and the error counts them."""
    text = GOOD.replace("bytes = 10", "bytes = 0").replace("size = 28", 'size = "big"').replace("val = 1\n", "")
    with pytest.raises(ManifestError, match=r"^mine\.toml has 3 faults:\n") as caught:
        parsed(text)
    assert sorted(caught.value.faults) == [
        "files[0].bytes: must be at least 1, not 0",
        "image.size: must be a whole number, not 'big'",
        "splits.own.val: is missing",
    ]
    assert all(fault in str(caught.value) for fault in caught.value.faults)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('title = "Mine"', 'titel = "Mine"', "titel: is not known here. Did you mean 'title'?"),
        ("resampling =", "resample =", "image.resample: is not known here. Did you mean 'resampling'?"),
        ("bytes = 10", "bytes = 10\nsha1 = 'x'", "files[0].sha1: is not known here."),
        ("seed = 0", "seed = 0\nvalid = 3", "splits.own.valid: is not known here. Did you mean 'val'?"),
        ('type = "class-folders"', 'type = "class-folders"\ndeep = 2', "reader.deep: is not known here."),
    ],
)
def test_unknown_keys_are_faults(old: str, new: str, fault: str) -> None:
    """A misspelt option is never passed over; the nearest known one is named."""
    assert any(found.startswith(fault) for found in faults((old, new)))


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('sha256 = "' + "0" * 64 + '"', "", "files[0].sha256: is missing"),
        ('sha256 = "' + "0" * 64, 'sha256 = "' + "0" * 63, "files[0].sha256: must be 64 lowercase hexadecimal digits"),
        ('sha256 = "' + "0" * 64, 'sha256 = "' + "A" * 64, "files[0].sha256: must be 64 lowercase hexadecimal digits"),
        ('sha256 = "' + "0" * 64, 'sha256 = "', "files[0].sha256: is empty"),
        ("bytes = 10", f"bytes = 10\nmd5 = '{'0' * 32}'", "files[0].md5: is not needed if there is a sha256"),
        ('sha256 = "' + "0" * 64 + '"', "md5 = 'x'", "files[0].md5: must be 32 lowercase hexadecimal digits"),
        ('name = "mine.zip"', 'name = "images.tar"', "files[0].name: 'images.tar' must be a plain file name"),
        ("[image]", "[images]\nforms = []\n[image]", "images.forms: must have at least one entry"),
        ("[image]", "[images]\nforms = [1]\n[image]", "images.forms[0]: must be a table"),
        (
            "[image]",
            "[images]\nforms = [{type = 'by-names'}]\n[image]",
            "images.forms[0].type: 'by-names' is not one of by-name, by-position, pickled-arrays.",
        ),
        (
            "[image]",
            "[images]\nforms = [{type = 'by-position'}]\n[image]",
            "images.forms[0].digits: is missing",
        ),
        (
            "[image]",
            "[images]\nforms = [{type = 'pickled-arrays', files = {train = ['../x']}}]\n[image]",
            "images.forms[0].files.train: must be a list of plain file names",
        ),
        ("seed = 0", 'by = "folders"', "splits.own.by: 'folders' is not one of files."),
        ("size = 28", "size = 28\nupright = 1", "image.upright: must be true or false, not 1"),
        (
            'type = "class-folders"',
            'type = "class-folders"\ndamaged = "ignore"',
            "reader.damaged: 'ignore' is not one of fail, leave-out.",
        ),
        ('name = "mine.zip"', 'name = "../mine.zip"', "files[0].name: '../mine.zip' must be a plain file name"),
        ('name = "mine.zip"', 'name = ".hidden"', "files[0].name: '.hidden' must be a plain file name"),
        ('name = "mine.zip"', 'name = "mine.zip.part"', "files[0].name: 'mine.zip.part' must be a plain file name"),
        ("bytes = 10", "bytes = true", "files[0].bytes: must be a whole number, not True"),
        ("bytes = 10", f"bytes = 10\ncontent_sha256 = '{'0' * 64}'", "files[0].content_bytes: is missing"),
        ("channels = 1", "channels = 2", "image.channels: must be 1 (grey) or 3 (RGB)"),
        ("size = 28", "size = 28\ninvert = 1", "image.invert: must be true or false, not 1"),
        ("size = 28", "size = 28\nbank_sha256 = {big = 'x'}", "image.bank_sha256.big: must be an image size in pixels"),
        (
            '"lanczos"',
            '"lanczoss"',
            "image.resampling: 'lanczoss' is not one of nearest, box, bilinear, hamming, bicubic, lanczos.",
        ),
        ('type = "class-folders"', 'type = "folders"', "reader.type: 'folders' is not one of class-folders, "),
        ('type = "class-folders"', 'type = "class-folders"\ndepth = 9', "reader.depth: must be between 0 and 8, not 9"),
        ('rotations = "none"', 'rotations = "some"', "rotations: 'some' is not one of all, train, none."),
        ('split_scheme = "own"', 'split_scheme = "won"', "split_scheme: 'won' is not one of own. Did you mean 'own'?"),
        ('format = "mamldata-manifest/1"', 'format = "mamldata-manifest/9"', "format: is 'mamldata-manifest/9'"),
        ('name = "mine"', 'name = "../mine"', "name: '../mine' may only have lowercase letters"),
        ("[splits.own]", '[splits."My own"]', "splits.My own: 'My own' may only have lowercase letters"),
        ("train = 2", "train = -1", "splits.own.train: must be at least 0, not -1"),
        ("train = 2", "train = 2.5", "splits.own.train: must be a whole number, not 2.5"),
        ("seed = 0", "", "splits.own.train: must be a list of classes or the name of a text file"),
    ],
)
def test_each_kind_of_fault_has_its_place(old: str, new: str, fault: str) -> None:
    """What a manifest must not say, and the words for it."""
    assert any(found.startswith(fault) for found in faults((old, new))), faults((old, new))


@pytest.mark.parametrize(
    "url",
    [
        "ftp://example.org/x",
        "file:///etc/passwd",
        "s3://bucket/x",
        "/x",
        "example.org/x",
        "https:///x",
        "https://[x",
        7,
    ],
)
def test_urls_are_http_or_https_only(url: Any) -> None:
    """No other scheme, nothing without a host, and nothing malformed gets in."""
    written = repr(url)
    assert faults(('"https://example.org/mine.zip"', written)) == (f"files[0].urls: {url!r} is not an http(s) address",)


def test_the_same_file_name_twice() -> None:
    """Two raw files under one name would overwrite each other."""
    files = GOOD[GOOD.index("[[files]]") : GOOD.index("[reader]")]
    assert faults(("[reader]", files + "[reader]")) == ("files: the name 'mine.zip' appears twice",)


@pytest.mark.parametrize(
    ("start", "stop", "fault"),
    [
        ("[[files]]", "[reader]", "files: is missing"),
        ("[reader]", "[image]", "reader: is missing"),
        ("[image]", "[splits", "image: is missing"),
        ("[splits", None, "splits: is missing"),
    ],
)
def test_a_missing_table_is_one_fault(start: str, stop: str | None, fault: str) -> None:
    """One line for the table, not one for each of its keys."""
    end = GOOD.index(stop) if stop else len(GOOD)
    assert faults((GOOD[GOOD.index(start) : end], "")) == (fault,)


def test_no_split_scheme_at_all() -> None:
    """An empty table of schemes leaves nothing to draw episodes from."""
    assert faults((GOOD[GOOD.index("[splits") :], "[splits]")) == ("splits: must have at least one scheme",)


def test_toml_that_is_nested_too_deep() -> None:
    """One more kind of what is no TOML."""
    with pytest.raises(ManifestError, match="not valid TOML: maximum recursion depth"):
        parsed("name = " + "[" * 100_000)


def test_a_manifest_that_is_too_long(tmp_path: Path) -> None:
    """Its length is looked at before it is read; so is that of a list of classes."""
    for name in ("mine.toml", "classes.txt"):
        with (tmp_path / name).open("wb") as stream:
            stream.truncate((1 << 26) + 1)
    with pytest.raises(
        ManifestError, match=r"mine\.toml has 1 fault:\n  it cannot be read .67,108,865 bytes, more than"
    ):
        load_manifest(str(tmp_path / "mine.toml"))
    (fault,) = faults(listed("classes.txt"), folder=tmp_path)
    assert "cannot read the class list 'classes.txt'" in fault
    assert "67,108,865 bytes, more than the limit of 67,108,864" in fault


def test_not_toml() -> None:
    """A syntax error is reported with its line."""
    with pytest.raises(ManifestError, match=r"mine\.toml has 1 fault:\n  not valid TOML: .*line 2"):
        parsed('name = "mine"\ntitle = \n')
    with pytest.raises(ManifestError, match="not valid TOML: 'utf-8' codec"):
        parse_manifest(b'name = "\xff"', "mine.toml", Path())


@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_bytes_crash_it(data: bytes) -> None:
    """Whatever a file holds, it is a manifest or a ManifestError."""
    with pytest.raises(ManifestError):
        parse_manifest(data, "mine.toml", Path())


VALUES: Any = st.recursive(
    st.booleans() | st.integers() | st.text("abz/*-_. \n\t\"'0ä\U00010000", max_size=8),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(key=st.sampled_from([line.split(" = ")[0] for line in GOOD.splitlines() if " = " in line]), value=VALUES)
def test_no_value_crashes_it(key: str, value: Any) -> None:
    """Any TOML value in any place is accepted or is a fault at that place."""
    written = f"{key} = {json.dumps(value, ensure_ascii=False)}"
    lines = [written if line.split(" = ")[0] == key else line for line in GOOD.splitlines()]
    try:
        manifest = parsed("\n".join(lines))
    except ManifestError as error:
        assert key in str(error) or "scheme" in str(error)  # noqa: PT017
    else:
        assert isinstance(manifest, Manifest)


def test_unknown_dataset() -> None:
    """The error names the nearest dataset, all of them, and how one's own is given."""
    with pytest.raises(RequestError, match=r"no dataset 'omniglott'\. Did you mean 'omniglot'\?.*glyphs.*\.toml file"):
        load_manifest("omniglott")
    with pytest.raises(RequestError, match=r"There is no manifest file nowhere\.toml"):
        load_manifest("nowhere.toml")


def test_unknown_scheme() -> None:
    """The error lists the schemes that there are."""
    with pytest.raises(RequestError, match=r"omniglot has no split scheme 'vynials'.*maml, vinyals, lake.*'vinyals'\?"):
        load_manifest("omniglot").scheme("vynials")


LISTED = 'description = "mine"\ntrain = "lists/train.txt"\nval = ["c"]\ntest = ["d/*"]\n'


def listed(train: str) -> tuple[str, str]:
    return GOOD[GOOD.index("description = ") :], LISTED.replace("lists/train.txt", train)


def test_class_lists_in_text_files(tmp_path: Path) -> None:
    """One class a line; comments and blank lines are left out."""
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("# mine\n\na/ä\n  b/* \n", encoding="utf-8")
    old, new = listed("lists/train.txt")
    scheme = parsed(GOOD.replace(old, new), tmp_path).scheme()
    assert scheme.lists == {"train": ("a/ä", "b/*"), "val": ("c",), "test": ("d/*",)}
    assert not scheme.counts


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("gone.txt", "splits.own.train: cannot read the class list 'gone.txt'"),
        ("../outside.txt", "splits.own.train: '../outside.txt' must be a path below the manifest's folder"),
        ("/etc/hostname", "splits.own.train: '/etc/hostname' must be a path below the manifest's folder"),
        ("latin.txt", "splits.own.train: cannot read the class list 'latin.txt'"),
        ("folder", "splits.own.train: cannot read the class list 'folder'"),
        ("nul\\u0000.txt", "splits.own.train: cannot read the class list"),
    ],
)
def test_bad_class_lists(name: str, fault: str, tmp_path: Path) -> None:
    """A list that is missing, outside the manifest's folder or no text is a fault."""
    own = tmp_path / "own"
    own.mkdir()
    (tmp_path / "outside.txt").write_text("a\n")
    (own / "latin.txt").write_bytes(b"\xe4\n")
    (own / "folder").mkdir()
    (found,) = faults(listed(name), folder=own)
    assert found.startswith(fault)


EMPTY = "splits.own: train, val and test are all empty; at least one of them must have classes"


@pytest.mark.parametrize("train", ["[]", '"none.txt"'])
def test_a_scheme_may_be_for_testing_alone(train: str, tmp_path: Path) -> None:
    """Train and val may have no class: as lists, as files without a class, and in a seeded division."""
    (tmp_path / "none.txt").write_text("# nothing\n")
    old, new = listed("none.txt")
    new = new.replace('"none.txt"', train).replace('["c"]', "[]")
    assert parsed(GOOD.replace(old, new), tmp_path).scheme().lists == {"train": (), "val": (), "test": ("d/*",)}
    assert faults((old, new.replace('["d/*"]', "[]")), folder=tmp_path) == (EMPTY,)
    assert parsed(GOOD.replace("train = 2", "train = 0")).scheme().counts["train"] == 0


def test_a_scheme_has_classes_somewhere() -> None:
    """A division into nothing is a fault, unless a number in it is wrong already."""
    counts = GOOD[GOOD.index("train = 2") :]
    assert faults((counts, "train = 0\nval = 0\ntest = 0\n")) == (EMPTY,)
    assert faults((counts, "train = 0\nval = 0\ntest = -1\n")) == ("splits.own.test: must be at least 0, not -1",)


def test_ones_own_manifest_has_every_right(make_dataset: Callable[..., Any], tmp_path: Path) -> None:
    """A manifest given by path may say all that a built-in one says, and is named by its path in messages."""
    tiny = make_dataset()
    assert tiny.manifest.reference == str(tiny.manifest_path)
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "train.txt").write_text("a\n")
    text = GOOD.replace(*listed("lists/train.txt")).replace(
        'urls = ["https://example.org/mine.zip"]', 'generator = "glyphs"'
    )
    path = tmp_path / "mine.toml"
    path.write_text(text + "[splits.other]\ndescription = 'other'\nseed = 3\ntrain = 1\nval = 1\ntest = 1\n")
    manifest = load_manifest(str(path))
    assert manifest.files[0].generator == "glyphs"
    assert list(manifest.schemes) == ["own", "other"]
