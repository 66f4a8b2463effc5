"""Odd names, umasks, homes and locales: whole commands end well, or say what they cannot do."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import unicodedata
from functools import cache
from pathlib import Path

from PIL import Image

from mamldata.archive.build import build
from mamldata.archive.plan import BuildRequest
from mamldata.archive.verify import verify_archive
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.sources.stored import ArchiveSource
from tests.conftest import OBEDIENT
from tests.storm import material
from tests.storm.commands import Ended, require_clear, require_done
from tests.storm.harness import PROJECT, Broken, Campaign, Outcome, refused

_NAMES = (
    "plain", "with space", " lead", "trail ", "-rf", "--help", "a\nb", "\x1b[31mred", "tab\t", "quote'\"", "$HOME",
    "`x`", "*", "?",
    "a;b", "a&b", "a|b", "~", "~root", "..a", "a..", ".hidden", "con", "é", "e\u0301", "ﬁ", "İ", "ß", "🧠",
    "\u202eabc", "中文", "a%20b",
    "a#b", "a:b", "http:", "a\\b", "x" * 200, "é" * 100, "train", "archive.json", "{}", "%s", "@x", "=", "a,b", "[a]",
    "\u2028", "A", "a",
)  # fmt: skip


def a_name(chance: random.Random, *, any_bytes: bool = True) -> str:
    """A file's name that few would choose; sometimes of bytes that are no text."""
    kind = chance.randrange(6)
    if kind == 0:
        return chance.choice(_NAMES) + chance.choice(_NAMES)[:20]
    if kind == 1 and any_bytes:
        return os.fsdecode(chance.choice((b"\xff", b"caf\xe9", b"\xed\xa0\x80", b"a\xc3")))
    if kind == 2:
        name = "".join(
            chr(chance.choice((chance.randrange(1, 0x250), chance.randrange(0x300, 0xD7FF), 0x1F9E0)))
            for _ in range(chance.randint(1, 12))
        )
        return name.replace("/", "_")
    if kind == 3:
        return unicodedata.normalize(
            chance.choice(("NFC", "NFD", "NFKC")), chance.choice(("Ångström", "ﬁancé", "한국", "ñ"))
        )
    return chance.choice(_NAMES)


_LOCALES = (
    {}, {"LC_ALL": "C"}, {"LC_ALL": "POSIX"}, {"LC_ALL": "C.utf8"}, {"LC_ALL": "C", "PYTHONUTF8": "0",
    "PYTHONCOERCECLOCALE": "0"},
    {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    {"LC_ALL": "de_DE.ISO-8859-1"},
    {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "nonsense"}, {"TZ": "nonsense"}, {"TERM": ""}, {"COLUMNS": "1"},
)  # fmt: skip


def _run(words: list[object], place: Path, environment: dict[str, str], umask: int) -> Ended:
    """Run the command line as a user without root's rights would."""
    command = [sys.executable, "-c", OBEDIENT, "-m", "mamldata", *map(str, words)]
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in {"HOME", "MAMLDATA_ROOT", "MAMLDATA_CACHE", "PYTHONUTF8"}
    }
    done = subprocess.run(
        [os.fsencode(word) for word in command],
        env={**kept, "PYTHONPATH": str(PROJECT), **environment},
        cwd=place,
        umask=umask,
        capture_output=True,
        check=False,
        timeout=50,
        stdin=subprocess.DEVNULL,
    )
    return Ended(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"), 0.0)


def odd_place(chance: random.Random, place: Path) -> Outcome:
    """``build``, ``inspect`` and ``verify`` between odd names: the digest of every other place, or a clear error."""
    root, out, home = (place / f"{number}" / a_name(chance) for number in range(3))
    for folder in (root.parent, out.parent, home.parent):
        folder.mkdir()
    try:
        material.clone(material.tiny().root / "tiny" / "raw", root / "tiny" / "raw")
        home.mkdir()
    except OSError:  # not a name on this file system
        return "refused"
    environment = {**chance.choice(_LOCALES), "HOME": str(home)}
    match chance.randrange(6):
        case 0:
            environment.pop("HOME")
        case 1:
            home.chmod(0o500)
        case 2:
            environment["HOME"] = "/dev/null"
        case 3:
            environment["XDG_CACHE_HOME"] = chance.choice(("", "relative", "/proc/x", str(home)))
        case _:
            pass
    umask = chance.choice((0o022, 0o022, 0o077, 0o777, 0o000, 0o277))
    shape = ["--n-way", 3, "--k-shot", 1, "--k-query", 2, "--seed", 9, "--episodes-per-shard", 5]
    counts = ["--train", 23, "--val", 7, "--test", 0, "--workers", 1]
    words = ["build", material.tiny().manifest_path, f"--root={root}", f"--out={out}", *shape, *counts]
    built = _run(words, place, environment, umask)
    require_clear(built)
    if umask in {0o777, 0o277} and not built.done:
        return "refused"  # a user who may not read what he writes
    require_done(built)
    _require_no_control(built)
    if material.contents(out) != material.archive_files():
        raise Broken("another archive")
    for more in (["inspect", "--", out], ["verify", "--", out]):
        ended = _run(more, place, environment, umask)
        require_clear(ended)
        if umask not in {0o777, 0o277}:
            require_done(ended)
    return "same"


def _require_no_control(ended: Ended) -> None:
    """What is printed must not steer a terminal."""
    if "\x1b" in ended.out + ended.err:
        raise Broken(f"it prints control characters: {ended.out!r} {ended.err!r}"[:2000])


@cache
def _pictures() -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", (9, 9), (number * 9, 255 - number * 9, 100)) for number in range(20))


def odd_folder(chance: random.Random, place: Path) -> Outcome:
    """A folder of images with odd names is a dataset whose archive has these names, or is refused."""
    top = place / a_name(chance, any_bytes=False)
    wanted = chance.randint(3, 6)
    try:
        top.mkdir()
        for number in range(wanted):
            home = top / a_name(chance, any_bytes=chance.random() < 0.1)
            home.mkdir(exist_ok=True)
            for image in range(chance.choice((3, 4))):
                name = chance.choice((f"{image}.png", f"{a_name(chance, any_bytes=False)[:40]}{image}.png"))
                _pictures()[(number * 4 + image) % 20].save(home / name, "PNG")
    except OSError:
        return "refused"
    found: list[list[str]] = []

    def make() -> None:
        manifest = load_manifest(str(top))
        bank = make_bank(manifest, place / "root", 8)
        request = BuildRequest(n_way=2, k_shot=1, k_query=1, episodes={"train": 3}, rotations="all")
        archive = build(manifest, bank, place / "out", request)
        if problems := verify_archive(place / "out"):
            raise Broken(f"verify: {problems}")
        source = ArchiveSource(place / "out", "train", verify=True)
        found.append(sorted(set(archive.split("train").classes.names)))
        material.episodes_of(source)
        source.class_labels(0)

    if refused(make):
        return "refused"
    if not found[0]:
        raise Broken("no classes")
    return "same"


CAMPAIGNS = (
    Campaign(
        "places", "`build`, `inspect` and `verify` with odd names, umasks, homes and locales", 200, odd_place, 120
    ),
    Campaign("folders", "folders of images with odd names", 3000, odd_folder, 30),
)
