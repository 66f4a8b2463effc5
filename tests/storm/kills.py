"""SIGKILL at any moment: the same command again ends as if nothing had happened."""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from mamldata.bank import make as bank_maker
from mamldata.bank.make import make_bank
from mamldata.io.digest import sha256_bytes
from mamldata.sources.remote import RemoteSource
from tests.mamldata.fetching.test_fetch import FaultServer, Reply
from tests.storm import material
from tests.storm.commands import Ended, Trouble, forked, mamldata, require_clear, require_done, some_moment
from tests.storm.damage import in_the_way
from tests.storm.harness import PROJECT, Broken, Campaign, Outcome, workplace
from tests.storm.mutations import alter


def killed_and_again(run: Callable[[Trouble, bool], Ended], chance: random.Random, whole: Ended) -> Ended:
    """Run a command, kill it once or more often, and run it to its end, undisturbed.

    Args:
        run: runs the command with some trouble, and counts its operations on files if it is asked to.
        chance: the source of chance.
        whole: how it ended when nothing disturbed it.

    Raises:
        Broken: it failed.
    """
    for _ in range(chance.choice((1, 1, 2, 3))):
        ended = run(some_moment(chance, whole), False)
        if ended.code != -9:
            require_done(ended)  # it was faster
    ended = run(Trouble(), False)
    require_done(ended)
    require_clear(ended)
    return ended


@cache
def server() -> str:
    """The address of a server in a process of its own, which has the raw file and the archive."""
    zip_, files = material.tiny().archive, material.archive_files()
    ours, theirs = os.pipe()
    if os.fork() == 0:
        with FaultServer() as running:
            running.serve(f"/{zip_.name}", Reply(data=zip_.read_bytes(), headers={"ETag": '"1"'}))
            for name, data in files.items():
                running.serve(f"/archive/{name}", Reply(data=data, headers={"ETag": f'"{len(data)}"'}))
            threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01}).start()
            os.write(theirs, running.address.encode())
            os.close(theirs)
            while os.getppid() != 1:  # until whoever asks has ended
                time.sleep(1)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as told:
        return told.read()


@cache
def manifest_file() -> Path:
    """The manifest of the tiny dataset, with the server's address."""
    tiny = material.tiny()
    path = tiny.manifest_path.with_name("tiny-served") / tiny.manifest_path.name
    path.parent.mkdir()
    path.write_text(tiny.manifest_path.read_text().replace("https://example.org/tiny.zip", f"{server()}/tiny.zip"))
    return path


def fetch_words(root: Path) -> list[object]:
    """The command that fetches the tiny dataset."""
    return ["fetch", manifest_file(), "--root", root]


def build_words(root: Path, out: Path, workers: int = 1) -> list[object]:
    """The command that builds the archive of ``material.archive``."""
    shape = ["--n-way", 3, "--k-shot", 1, "--k-query", 2, "--seed", 9, "--episodes-per-shard", 5]
    counts = ["--train", 23, "--val", 7, "--test", 0]
    return ["build", manifest_file(), "--root", root, "--out", out, *shape, *counts, "--workers", workers]


def train_words(archive: Path | str, run: Path) -> list[object]:
    """A command that trains for some steps."""
    steps = ["--steps", 4, "--eval-every", 2, "--eval-episodes", 4, "--log-every", 1, "--meta-batch-size", 2]
    small = ["--filters", 4, "--inner-steps", 1, "--seed", 3, "--device", "cpu"]
    return ["train", archive, "--out", run, "--resume", *steps, *small]


@cache
def _undisturbed(verb: str) -> tuple[Ended, str]:
    """How a command ends undisturbed, and what it leaves."""
    place = workplace() / "material" / f"undisturbed-{verb}"
    place.mkdir(parents=True)
    words, seen = _command(verb, place)
    ended = mamldata(*words, count=True)
    require_done(ended)
    return ended, seen()


def _command(verb: str, place: Path, workers: int = 1) -> tuple[list[object], Callable[[], str]]:
    """A command that works below a folder, and a function that tells what it has left there."""
    root = place / "root"
    match verb:
        case "fetch":
            return fetch_words(root), partial(material.digest_of, root / "tiny")
        case "build":
            if not root.exists():
                material.clone(material.tiny().root / "tiny" / "raw", root / "tiny" / "raw")
            return build_words(
                root, place / "out", workers
            ), lambda: material.digest_of(root) + material.digest_of(place / "out")
        case _:
            return train_words(material.archive(), place / "run"), lambda: repr(run_of(place / "run"))


def killed_command(verb: str, chance: random.Random, place: Path) -> Outcome:
    """A killed command, run again, leaves exactly the files of an undisturbed one."""
    whole, truth = _undisturbed(verb)
    workers = 2 if verb == "build" and chance.random() < 0.02 else 1
    words, seen = _command(verb, place, workers)
    killed_and_again(lambda trouble, count: mamldata(*words, trouble=trouble, count=count), chance, whole)
    if (found := seen()) != truth:
        raise Broken(f"{verb} left something else: {found[-2000:]} in place of {truth[-2000:]}")
    return "same"


def run_of(run: Path) -> Any:
    """What a run's folder says, to the bit, without times and places."""
    for folder in (PROJECT / "tests" / "trainer",):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # as pytest does
    from tests.trainer.test_resume import plain, strip_times
    from trainer.runs.checkpoint import load_checkpoint

    checkpoints = {path.name: plain(load_checkpoint(path)) for path in sorted(run.glob("*.pt"))}
    names = sorted(path.name for path in run.iterdir() if path.name != ".lock")
    return names, checkpoints, strip_times(run)


@cache
def _half_a_run() -> material.Files:
    """What an undisturbed run has after its first validation."""
    _undisturbed("train")
    files = material.contents(workplace() / "material" / "undisturbed-train" / "run")
    return {name: data for name, data in files.items() if "_step4_" not in name}


def damaged_run(chance: random.Random, place: Path) -> Outcome:
    """A damaged run, resumed, is refused or ends with the weights of an undisturbed one."""
    run = place / "run"
    files = _half_a_run()
    material.put(alter(files, {name: data[::-1] for name, data in files.items()}, chance), run)
    if chance.random() < 0.05:
        in_the_way(run / chance.choice(sorted(files)), chance)
    ended = mamldata(*train_words(material.archive(), run))
    require_clear(ended)
    if not ended.done:
        return "refused"
    last = max(run.glob("*_step4_*.pt"))
    if _weights(last) != _weights(workplace() / "material" / "undisturbed-train" / "run" / last.name):
        raise Broken("the weights are others")
    return "same"


def _weights(path: Path) -> Any:
    """The weights of a checkpoint, to the bit."""
    from trainer.runs.checkpoint import load_checkpoint

    return {name: value.numpy().tobytes() for name, value in load_checkpoint(path).weights.items()}


def _make_bank(root: Path) -> None:
    bank_maker._TASK_IMAGES = 4
    make_bank(material.tiny().manifest, root)


def killed_bank(chance: random.Random, place: Path) -> Outcome:
    """A bank that is made in many pieces, killed and made again, is the true one."""
    whole = _whole_bank()
    material.clone(material.tiny().root / "tiny" / "raw", place / "tiny" / "raw")
    killed_and_again(lambda trouble, count: forked(partial(_make_bank, place), trouble, count=count), chance, whole)
    found = {path.name for path in (place / "tiny").iterdir()}
    if found - {".lock"} != {"raw", "tiny-8.npy", "tiny-8.json"}:
        raise Broken(f"left over: {found}")
    for name in ("tiny-8.npy", "tiny-8.json"):
        if (place / "tiny" / name).read_bytes() != material.bank().path.with_name(name).read_bytes():
            raise Broken(f"{name} is another one")
    return "same"


@cache
def _whole_bank() -> Ended:
    material.bank()
    place = workplace() / "material" / "whole-bank"
    material.clone(material.tiny().root / "tiny" / "raw", place / "tiny" / "raw")
    ended = forked(partial(_make_bank, place), Trouble(), count=True)
    require_done(ended)
    return ended


def read_remote(cache_dir: Path, bound: int | None = None, split: str = "train") -> None:
    """In a fork: print the digest of what a stream from the server gives."""
    source = RemoteSource(f"{server()}/archive", split, cache_dir=cache_dir, cache_bytes=bound)
    print(sha256_bytes(material.episodes_of(source)))


def killed_cache(chance: random.Random, place: Path) -> Outcome:
    """A cache whose process was killed while it was filled gives the true episodes."""
    whole = _whole_cache()
    bound = chance.choice((None, 2 * max(shard.bytes for shard in material.archive_of().shards())))
    ended = killed_and_again(
        lambda trouble, count: forked(partial(read_remote, place, bound), trouble, count=count), chance, whole
    )
    if ended.out.strip() != sha256_bytes(material.true_episodes()):
        raise Broken("the stream gave other episodes")
    return "same"


@cache
def _whole_cache() -> Ended:
    server()
    ended = forked(partial(read_remote, workplace() / "material" / "whole-cache"), Trouble(), count=True)
    require_done(ended)
    return ended


def killed_train(chance: random.Random, place: Path) -> Outcome:
    """A killed training run, resumed, ends with the same weights and metrics, to the bit."""
    return killed_command("train", chance, place)


CAMPAIGNS = (
    Campaign(
        "kill-fetch", "SIGKILL at any moment of `fetch`, once to three times", 1000, partial(killed_command, "fetch")
    ),
    Campaign("kill-bank", "SIGKILL while a bank is made", 1000, killed_bank),
    Campaign(
        "kill-build",
        "SIGKILL at any moment of `build`, with one and with two workers",
        1000,
        partial(killed_command, "build"),
    ),
    Campaign("kill-cache", "SIGKILL while a stream fills its cache", 1000, killed_cache),
    Campaign("kill-train", "SIGKILL at any moment of `train`", 200, killed_train),
    Campaign(
        "run",
        "checkpoints, settings and metrics of half a run: the same damage; then `train --resume`",
        200,
        damaged_run,
    ),
)
