"""Full disks, few descriptors, little memory: a clear error, and the same command ends well once there is enough."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

from mamldata.io.digest import sha256_bytes
from tests.storm import material
from tests.storm.commands import Ended, Trouble, forked, mamldata, require_clear, require_done
from tests.storm.harness import Broken, Campaign, Outcome, Skipped
from tests.storm.kills import build_words, fetch_words, read_remote, run_of, server, train_words

_PAGE = 4096
# NumPy's own end where it cannot have the few bytes of an exception.
_NUMPY = "SystemError: error return without exception set"
_ALL = "fetch build cache train"


def some_work(
    chance: random.Random, place: Path, kinds: str = _ALL
) -> tuple[Callable[[Trouble], Ended], Callable[[Ended], object], int]:
    """Some work below a folder.

    Returns:
        What does it, what compares its result with the true one, and about how many bytes it writes.
    """
    kind = chance.choice(kinds.split())
    root = place / "root"
    if kind == "fetch":
        return (
            lambda trouble: mamldata(*fetch_words(root), trouble=trouble),
            lambda _: _equal((root / "tiny" / "raw" / "tiny.zip").read_bytes(), material.tiny().archive.read_bytes()),
            20_000,
        )
    if kind == "build":
        raw = material.tiny().root / "tiny" / "raw"

        def build(trouble: Trouble) -> Ended:
            if not root.exists():
                (root / "tiny").mkdir(parents=True)
                (root / "tiny" / "raw").symlink_to(raw)
            return mamldata(*build_words(root, place / "out"), trouble=trouble)

        return build, lambda _: _equal(material.contents(place / "out"), material.archive_files()), 300_000
    if kind == "cache":
        server()
        return (
            lambda trouble: forked(partial(_read, place / "cache"), trouble),
            lambda ended: _equal(ended.out.strip(), sha256_bytes(material.true_episodes())),
            300_000,
        )
    return (
        lambda trouble: mamldata(*train_words(material.archive(), place / "run"), trouble=trouble),
        lambda _: _equal(run_of(place / "run"), _true_run()),
        100_000,
    )


@cache
def _true_run() -> object:
    place = material.workplace() / "material" / "true-run"
    require_done(mamldata(*train_words(material.archive(), place)))
    return run_of(place)


def _read(cache_dir: Path) -> None:
    """Read from the server; an error of ours ends the process as it would on the command line."""
    from mamldata.errors import MamldataError

    try:
        read_remote(cache_dir)
    except MamldataError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MemoryError:  # which is clear as it is
        print("Error: not enough memory", file=sys.stderr)
        sys.exit(1)


def _equal(found: object, truth: object) -> None:
    if found != truth:
        raise Broken(f"something else was left: {str(found)[:1000]} in place of {str(truth)[:1000]}")


@cache
def _own_mounts() -> str:
    """Give this process mounts of its own, which end with it; says why not, if it may not."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "only root on Linux may mount a small disk"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(0x00020000) != 0:  # CLONE_NEWNS
        return f"a small disk cannot be mounted here ({os.strerror(ctypes.get_errno())})"
    done = subprocess.run(["mount", "--make-rprivate", "/"], capture_output=True, check=False)
    return done.stderr.decode().strip()


def full_disk(chance: random.Random, place: Path) -> Outcome:
    """On a disk that fills up the command says so; with more room, the same command ends well."""
    if why := _own_mounts():
        raise Skipped(why)
    disk = place / "disk"
    disk.mkdir()
    work, check, need = some_work(chance, disk)  # before the mount: it may make material
    size = _PAGE * chance.randint(1, need // _PAGE + 2)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)], check=True)
    try:
        first = work(Trouble())
        require_clear(first)
        if first.code and "space" not in first.err:
            raise Broken(f"a full disk is not what it says: {first.err[-2000:]}")
        subprocess.run(["mount", "-o", f"remount,size={1 << 26}", str(disk)], check=True)
        second = work(Trouble())
        require_done(second)
        check(second)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
    return "same" if first.done else "refused"


def limited(
    which: int, limit_of: Callable[[random.Random], int], kinds: str, chance: random.Random, place: Path
) -> Outcome:
    """With too little of something the command says so; with enough, the same command ends well."""
    work, check, _ = some_work(chance, place, kinds)
    first = work(Trouble(limits={which: limit_of(chance)}))
    if not first.err.rstrip().endswith(_NUMPY):
        require_clear(first)
    second = work(Trouble())
    require_done(second)
    check(second)
    return "same" if first.done else "refused"


def _file_size(chance: random.Random) -> int:
    return chance.choice((0, 1, 100, 4096, chance.randint(0, 60_000)))


def _descriptors(chance: random.Random) -> int:
    return chance.randint(4, 40)


def _memory(chance: random.Random) -> int:
    """What this process has, and some megabytes more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize() + chance.choice((0, chance.randint(0, 1 << 20), chance.randint(0, 8 << 20)))


CAMPAIGNS = (
    Campaign("full-disk", "a disk of a few pages; then a larger one", 300, full_disk),
    Campaign(
        "file-size",
        "files that may not grow beyond some bytes (`ulimit -f`)",
        300,
        partial(limited, resource.RLIMIT_FSIZE, _file_size, _ALL),
    ),
    Campaign(
        "descriptors",
        "4 to 40 file descriptors (`ulimit -n`)",
        300,
        partial(limited, resource.RLIMIT_NOFILE, _descriptors, _ALL),
    ),
    Campaign(
        "memory",
        "up to 8 MB more than the program itself takes (`ulimit -v`)",
        300,
        partial(limited, resource.RLIMIT_AS, _memory, "fetch build cache"),
    ),
)
