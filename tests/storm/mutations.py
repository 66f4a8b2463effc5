"""Damaged archives, banks, raw files and caches: refused with a clear error, or exactly the original bytes."""

from __future__ import annotations

import json
import random
from contextlib import closing
from functools import cache
from pathlib import Path

import fsspec
import numpy as np

from mamldata.archive.build import Portion, build, build_portion
from mamldata.archive.index import INDEX, INDEX_SUM, index_sum, parse_archive
from mamldata.archive.verify import verify_archive
from mamldata.bank.make import make_bank
from mamldata.bank.verify import verify_dataset
from mamldata.datasets.load import load_manifest
from mamldata.fetching.act import fetch
from mamldata.fetching.http import Network
from mamldata.io.digest import canonical_json, sha256_bytes
from mamldata.sources.drawn import ThinSource
from mamldata.sources.open import open_archive
from mamldata.sources.remote import RemoteSource
from mamldata.sources.thin import thin_from_address
from tests.storm import material
from tests.storm.damage import damaged, edited, in_the_way
from tests.storm.harness import Broken, Campaign, Outcome, refused
from tests.storm.material import Files
from tests.storm.servers import Stormy

QUICK = Network(connect_timeout=2, read_timeout=0.5, rounds=2, backoff=0, longest_pause=0)


def alter(files: Files, others: Files, chance: random.Random) -> Files:
    """Damage a file of a folder: its bytes, or which file has which bytes, or its JSON.

    Args:
        files: the folder.
        others: one with the same names and other bytes.
        chance: the source of chance.
    """
    files = dict(files)
    name = chance.choice(sorted(files))
    match chance.randrange(10):
        case 0 | 1 | 2 | 3 | 4:
            files[name] = damaged(files[name], chance)
        case 5:
            files[name] = others.get(name, b"")
        case 6:
            other = chance.choice(sorted(files))
            files[name], files[other] = files[other], files[name]
        case 7:
            del files[name]
        case 8:
            files[chance.choice(("train-00099.tar", "other.json", f"{name}.part", f"{name}~"))] = files[name]
        case _:
            name = next(
                name for name in chance.sample(sorted(files), len(files)) if not name.endswith((".tar", ".npy"))
            )
            files[name] = _edit(files[name], chance)
    return files


def _edit(data: bytes, chance: random.Random) -> bytes:
    try:
        document = edited(json.loads(data), chance)
        return canonical_json(document) if chance.random() < 0.7 else json.dumps(document, indent=1).encode()
    except (ValueError, UnicodeError):
        return damaged(data, chance)


def damaged_archive(chance: random.Random, place: Path) -> Outcome:
    """``verify`` finds every damage; a stream that hashes shards refuses it or gives the true episodes."""
    which = chance.choice(("one", "one", "thin"))
    truth = files = material.archive_files(which)
    for _ in range(chance.choice((1, 1, 1, 2))):
        files = alter(files, material.archive_files(material.OTHER[which]), chance)
    material.put(files, place)
    if chance.random() < 0.05:
        in_the_way(place / chance.choice(sorted(files)), chance)
    here = material.contents(place)
    intact = all(here.get(name) == data for name, data in truth.items())
    problems: list[str] = []
    if not refused(lambda: problems.extend(verify_archive(place))) and bool(problems) == intact:
        strangers = {path.name for path in place.glob("*.*") if path.suffix in {".tar", ".npy"}} - truth.keys()
        if not (intact and strangers):
            raise Broken(f"verify says {problems}, although the archive is {'intact' if intact else 'damaged'}")
    # Whoever replaces archive.json and removes or replaces its digest makes another archive, which the digest of the
    # archive tells.
    forged = here.get(INDEX) != truth[INDEX] and here.get(INDEX_SUM) != truth[INDEX_SUM]
    for split in material.EPISODES:
        # Without verify, changed pixels of a whole shard are not looked for, so there only errors count.
        refused(lambda split=split: material.episodes_of(open_archive(place, split)))
        found: list[bytes] = []
        refused(
            lambda split=split, found=found: found.append(material.episodes_of(open_archive(place, split, verify=True)))
        )
        if found and found[0] != material.true_episodes(split, which) and not forged:
            raise Broken(f"verify=True gave other episodes of {split}")
    return "same" if intact else "refused"


def forged_index(chance: random.Random, place: Path) -> Outcome:
    """An ``archive.json`` with other values and the right digest beside it is refused, or read without a crash."""
    files = dict(material.archive_files(chance.choice(("one", "thin"))))
    document = json.loads(files[INDEX])
    for _ in range(chance.choice((1, 1, 2, 3))):
        document = edited(document, chance) if isinstance(document, dict) else document
    try:
        data = canonical_json(document)
    except (ValueError, UnicodeError):
        data = json.dumps(document).encode(errors="replace")
    files[INDEX], files[INDEX_SUM] = data, index_sum(sha256_bytes(data))
    material.put(files, place)
    taken = not refused(lambda: parse_archive(data))
    for split in material.EPISODES:
        # Not all episodes: a thin archive may have any number of them.
        refused(lambda split=split: material.episodes_of(open_archive(place, split, episodes=30)))
    refused(lambda: verify_archive(place))
    return "same" if taken else "refused"


@cache
def _bank_files(which: str = "one") -> Files:
    """The bank's files, or those of a bank of the same size from other images."""
    folder = material.tiny().folder
    material.bank()
    files = {name: (folder.path / name).read_bytes() for name in ("tiny-8.npy", "tiny-8.json")}
    if which == "other":
        files = {name: material.other_bank().path.with_name(name).read_bytes() for name in files}
    return files


@cache
def _raw_files() -> Files:
    return material.contents(material.tiny().root / "tiny" / "raw")


def damaged_bank(chance: random.Random, place: Path) -> Outcome:
    """A damaged bank is refused, or made again from the raw files, or was not changed in effect."""
    files = alter(_bank_files(), _bank_files("other"), chance)
    folder = place / "tiny"
    material.put(files, folder)
    material.put(_raw_files(), folder / "raw")
    if chance.random() < 0.05:
        in_the_way(folder / chance.choice(sorted(_bank_files())), chance)
    found: list[bytes] = []
    manifest = material.tiny().manifest
    if refused(lambda: found.append(np.array(make_bank(manifest, place).open_images()).tobytes())):
        return "refused"
    if found[0] != np.array(material.bank().open_images()).tobytes():
        raise Broken("the bank has other images")
    return "same"


def unfinished_bank(chance: random.Random, place: Path) -> Outcome:
    """Whatever an unfinished bank's journal says, the build ends with the true bank or a clear error."""
    folder = place / "tiny"
    files = _bank_files()
    material.put(_raw_files(), folder / "raw")
    part = files["tiny-8.npy"]
    match chance.randrange(4):
        case 0:
            part = damaged(part, chance, ("truncate", "extend"))
        case 1:
            part = part[:128] + bytes(len(part) - 128)
        case _:
            pass
    garbage = chance.choice((b"", b"\0", b"[]\n", b"{}\n", b"[0, {}]\n", b"\xff\xfe\n", b"0" * 64 + b"\n[0, {}]\n"))
    material.put(
        {"tiny-8.npy.part": part, "tiny-8.npy.journal": damaged(garbage * chance.randint(1, 3), chance)}, folder
    )
    if chance.random() < 0.2:
        in_the_way(
            folder / chance.choice(("tiny-8.npy.part", "tiny-8.npy.journal", "tiny-8.npy", "tiny-8.json")), chance
        )
    found: list[bytes] = []
    if refused(lambda: found.append(np.array(make_bank(material.tiny().manifest, place).open_images()).tobytes())):
        return "refused"
    if found[0] != np.array(material.bank().open_images()).tobytes():
        raise Broken("the bank has other images")
    return "same"


def damaged_raw(chance: random.Random, place: Path) -> Outcome:
    """A damaged raw file is found by ``verify``; fetching mends or refuses it; no bank has other images."""
    files = alter(_raw_files(), {name: data[::-1] for name, data in _raw_files().items()}, chance)
    raw = place / "tiny" / "raw"
    raw.mkdir(parents=True)
    material.put(files, raw)
    if chance.random() < 0.05:
        in_the_way(raw / chance.choice(sorted(_raw_files())), chance)
    manifest, mirror = material.tiny().manifest, material.tiny().archive
    problems: list[str] = []
    here = material.contents(raw)
    intact = here.get(mirror.name) == _raw_files()[mirror.name]
    if not refused(lambda: problems.extend(verify_dataset(manifest, place))) and not problems and not intact:
        raise Broken("verify finds nothing, although the raw file is damaged")
    found: list[bytes] = []
    made = not refused(lambda: found.append(np.array(make_bank(manifest, place).open_images()).tobytes()))
    if made and found[0] != np.array(material.bank().open_images()).tobytes():
        raise Broken("a bank with other images was made of the damaged file")
    refused(lambda: fetch(manifest, place, [str(mirror.parent)], offline=True))
    return "same" if made else "refused"


@cache
def _memory(which: str) -> str:
    """The address of an archive in this process's memory, where every file system of fsspec finds it."""
    system = fsspec.filesystem("memory")
    for name, data in material.archive_files(which).items():
        system.pipe_file(f"/{which}/{name}", data)
    return f"memory://{which}"


def _remote(which: str, split: str, cache_dir: Path, bound: int | None = None) -> RemoteSource | ThinSource:
    url, options = _memory(which), {"cache_dir": cache_dir, "cache_bytes": bound, "network": QUICK}
    if which == "thin":
        return thin_from_address(url, material.archive_of(which), split, **options)
    return RemoteSource(url, split, **options)


@cache
def _cached_files(which: str) -> Files:
    place = material.workplace() / "material" / f"shards-{which}"
    for split in material.EPISODES:
        material.episodes_of(_remote(which, split, place))
    return material.contents(place / "mamldata-shards")


def damaged_cache(chance: random.Random, place: Path) -> Outcome:
    """Whatever became of cached shards, their records and parts, a stream gives the true episodes or a clear error."""
    which = chance.choice(("one", "one", "thin"))
    truth = files = _cached_files(which)
    for _ in range(chance.choice((1, 1, 2, 5))):
        files = alter(files, {name: data[::-1] for name, data in files.items()}, chance)
    if chance.random() < 0.3:  # a part of a download under way
        name = chance.choice(sorted(name for name in truth if len(truth[name]) > 1000))
        data = files.pop(name, truth[name])
        files[f"{name}.part"] = damaged(data, chance)
    own = place / "mamldata-shards"
    material.put(files, own)
    if chance.random() < 0.05:
        in_the_way(own / chance.choice(sorted(truth)), chance)
    split = chance.choice(sorted(material.EPISODES))
    largest = max(len(data) for data in truth.values())
    bound = chance.choice((None, None, 2 * largest, 4 * largest))
    found: list[bytes] = []
    if refused(lambda: found.append(material.episodes_of(_remote(which, split, place, bound)))):
        return "refused"
    if found[0] != material.true_episodes(split, which):
        # archive.json at the address is intact, so its digest must be, too
        raise Broken("the stream gave other episodes")
    return "same"


@cache
def _unfinished_files() -> Files:
    """What a build leaves that is killed before it closes the archive."""
    place = material.workplace() / "material" / "unfinished"
    build_portion(material.tiny().manifest, material.bank(), place, Portion(1, 2), material.REQUEST)
    return material.contents(place)


def unfinished_build(chance: random.Random, place: Path) -> Outcome:
    """Whatever became of an unfinished build, the same build ends with the true archive or a clear error."""
    files = _unfinished_files()
    for _ in range(chance.choice((1, 1, 2))):
        files = alter(files, {name: data[::-1] for name, data in files.items()}, chance)
    material.put(files, place)
    if chance.random() < 0.05:
        in_the_way(place / chance.choice(sorted(files)), chance)
    if refused(lambda: build(material.tiny().manifest, material.bank(), place, material.REQUEST)):
        return "refused"
    here = material.contents(place)
    if any(here.get(name) != data for name, data in material.archive_files().items()):
        raise Broken("the archive is another one")
    return "same"


def unfinished_fetch(chance: random.Random, place: Path) -> Outcome:
    """Whatever an earlier fetch left, the same fetch gets the right file or says what is in its way."""
    name, data = material.tiny().archive.name, material.tiny().archive.read_bytes()
    cut = chance.randrange(len(data))
    with closing(Stormy({f"/{name}": data}, None)) as server:
        note = {"url": f"{server.address}/{name}", "validator": chance.choice((None, f'"{len(data)}"', '"old"'))}
        files = {
            f"{name}.part": data[:cut] if chance.random() < 0.5 else damaged(data[: cut + 1], chance),
            f".{name}.origin.json": _edit(json.dumps(note).encode(), chance),
            f"{name}.sha256.part": chance.randbytes(9),
        }
        raw = place / "root" / "tiny" / "raw"
        material.put(files, raw)
        path = place / "tiny.toml"
        path.write_text(material.tiny().manifest_path.read_text().replace("https://example.org", server.address))
        manifest = load_manifest(str(path))
        fetch(manifest, place / "root", network=QUICK)
    if (raw / name).read_bytes() != data:
        raise Broken("another file has the name")
    return "same"


CAMPAIGNS = (
    Campaign(
        "archive",
        "archives: bits flipped, cut, extended, shards swapped or exchanged, JSON edited",
        10_000,
        damaged_archive,
    ),
    Campaign("forged-index", "`archive.json` with odd values and a digest that fits", 10_000, forged_index),
    Campaign("bank", "banks and their descriptions: the same damage", 10_000, damaged_bank),
    Campaign(
        "unfinished-bank", "what an unfinished bank left: cut, extended, with any journal", 10_000, unfinished_bank
    ),
    Campaign("unfinished-build", "what an unfinished build left: the same damage", 5000, unfinished_build),
    Campaign("unfinished-fetch", "partial downloads and their notes: damaged", 5000, unfinished_fetch),
    Campaign("raw", "raw files and their receipts: the same damage", 10_000, damaged_raw),
    Campaign("cache", "cached shards, their records and partial downloads: the same damage", 10_000, damaged_cache),
)
