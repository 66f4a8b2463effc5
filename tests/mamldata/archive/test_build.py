"""Building: the same bytes always, whatever interrupts it, and never over somebody else's files."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

import mamldata.archive.build as build_module
from mamldata.archive import store
from mamldata.archive import write as shards
from mamldata.archive.build import Portion, PortionBuilt, build, build_portion
from mamldata.archive.index import INDEX, INDEX_SUM, Archive, read_archive
from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.archive.shard import open_shard
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.errors import DamagedError, MamldataError, RequestError, WriteError

REQUEST = BuildRequest(
    n_way=3, k_shot=1, k_query=2, episodes={"train": 7, "val": 2, "test": 3}, seed=3, episodes_per_shard=3
)
GOLDEN = "947cd26bc3ef81433536615df02f4f1b1263d30cc63d9f3c7496e3557aa83b01"
GOLDEN_OMNIGLOT = "cbb69d91eb09ee4468739e2bdc8ee8009fbb41ad7d9b55852889954ef824b72c"

SCRIPT = """
import sys
from pathlib import Path
from mamldata.bank.make import make_bank
from mamldata.archive.plan import BuildRequest
from mamldata.archive.build import Portion, build, build_portion
from mamldata.errors import MamldataError
from mamldata.datasets.load import load_manifest

def request(train=7):
    return BuildRequest(n_way=3, k_shot=1, k_query=2, episodes={"train": train, "val": 2, "test": 3}, seed=3,
                        episodes_per_shard=3)

def main(root, out, workers=1, train=7):
    manifest = load_manifest("glyphs")
    bank = make_bank(manifest, Path(root))
    print("ready", flush=True)
    try:
        print(build(manifest, bank, Path(out), request(int(train)), workers=int(workers)).digest)
    except MamldataError as error:
        sys.exit(f"{type(error).__name__}: {error}")
"""
PLAIN = SCRIPT + "\nif __name__ == '__main__':\n    main(*sys.argv[1:])\n"

# Builds a portion and then the rest in a child that kills itself with SIGKILL at its n-th operation on a file, for
# n = 1, 2, ... until one gets through; after each the parent runs the whole build and prints the digest and what it
# found finished.
KILLED_EVERYWHERE = (
    SCRIPT
    + """
import os, signal, shutil

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate")
left = [None]

def hook(event, args):
    if left[0] is not None and event in EVENTS:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
root, out = sys.argv[1:]
manifest = load_manifest("glyphs")
bank = make_bank(manifest, Path(root))
for moment in range(1, 400):
    child = os.fork()
    if child == 0:
        left[0] = moment
        build_portion(manifest, bank, Path(out), Portion(1, 2), request())
        build(manifest, bank, Path(out), request())
        os._exit(0)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status)
    finished = set(Path(out).glob("*.tar")) if Path(out).is_dir() else set()
    before = {path: path.stat().st_ino for path in finished}
    digest = build(manifest, bank, Path(out), request()).digest
    kept = sum(path.stat().st_ino == before[path] for path in finished)
    names = " ".join(sorted(path.name for path in Path(out).iterdir()))
    print(moment, int(killed), digest, len(finished), kept, names, sep="|")
    shutil.rmtree(out)
    if not killed:
        break
"""
)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def run(
    script: str, *args: object, env: dict[str, str] | None = None, **options: object
) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, **(env or {})},
        **options,
    )


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    """A program that builds, as a file, because spawned workers import it."""
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PLAIN)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory, glyphs_manifest, glyphs_bank) -> Path:
    """The archive of REQUEST, built without disturbance; not to be written to."""
    out = tmp_path_factory.mktemp("reference") / "archive"
    build(glyphs_manifest, glyphs_bank, out, REQUEST)
    return out


@pytest.fixture
def built(reference, tmp_path) -> Path:
    """A copy of the reference, with its times, to be changed."""
    return Path(shutil.copytree(reference, tmp_path / "built"))


def episodes_of(folder: Path, archive: Archive, split: str) -> list[bytes]:
    layout = archive.layout
    episodes = []
    for shard in archive.split(split).shards:
        mapped = open_shard(folder / shard.file, shard, layout)
        for i in range(shard.episodes):
            episodes.append(np.asarray(mapped[i * layout.stride : (i + 1) * layout.stride]).tobytes())
    return episodes


class TestSameBytes:
    def test_the_golden_digest_of_glyphs(self, reference):
        """The digest of a small archive of the embedded dataset, pinned."""
        assert read_archive(reference).digest == GOLDEN

    def test_two_workers_write_the_same_bytes(self, reference, tmp_path, glyphs_manifest, glyphs_bank):
        """The number of processes changes no byte."""
        build(glyphs_manifest, glyphs_bank, tmp_path / "two", REQUEST, workers=2)
        assert contents(tmp_path / "two") == contents(reference)

    @pytest.mark.parametrize("per_shard", [1, 5, 1000, None])
    def test_other_shard_sizes_hold_the_same_episodes(
        self, reference, tmp_path, glyphs_manifest, glyphs_bank, per_shard
    ):
        """How episodes are shared out among shards changes none of them, header included."""
        request = dataclasses.replace(REQUEST, episodes_per_shard=per_shard)
        other = build(glyphs_manifest, glyphs_bank, tmp_path / "other", request)
        for split in ("train", "val", "test"):
            expected = episodes_of(reference, read_archive(reference), split)
            assert episodes_of(tmp_path / "other", other, split) == expected

    def test_a_longer_split_begins_with_the_shorter_one(self, reference, tmp_path, glyphs_manifest, glyphs_bank):
        """Episode i does not depend on how many there are."""
        request = dataclasses.replace(REQUEST, episodes={"train": 20})
        longer = build(glyphs_manifest, glyphs_bank, tmp_path / "longer", request)
        episodes = episodes_of(tmp_path / "longer", longer, "train")
        assert episodes[:7] == episodes_of(reference, read_archive(reference), "train")

    def test_pieces_made_in_memory_change_nothing(self, reference, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch):
        """A shard made one episode at a time has the same bytes."""
        monkeypatch.setattr(shards, "_CHUNK_BYTES", 1)
        build(glyphs_manifest, glyphs_bank, tmp_path / "pieces", REQUEST)
        assert contents(tmp_path / "pieces") == contents(reference)

    @pytest.mark.parametrize(
        ("env", "umask"),
        [
            ({"TZ": "Pacific/Auckland", "LC_ALL": "C", "PYTHONHASHSEED": "1"}, 0o077),
            ({"TZ": "America/St_Johns", "LC_ALL": "C.utf8", "PYTHONHASHSEED": "4242", "PYTHONOPTIMIZE": "2"}, 0o000),
        ],
    )
    def test_the_surroundings_change_nothing(self, reference, glyphs_root, tmp_path, env, umask):
        """Time zone, locale, umask, hash seed and folder leave no trace in an archive."""
        done = run(PLAIN, glyphs_root, tmp_path / "é x", env=env, umask=umask, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert contents(tmp_path / "é x") == contents(reference)

    @pytest.mark.real_data
    def test_the_golden_digest_of_the_real_omniglot(self, omniglot_root, tmp_path):
        """The digest of the default archive of the real Omniglot, pinned."""
        manifest = load_manifest("omniglot")
        request = BuildRequest(episodes={"train": 2000, "val": 200, "test": 600})
        archive = build(manifest, make_bank(manifest, omniglot_root), tmp_path / "omniglot-5w1s", request, workers=2)
        assert archive.digest == GOLDEN_OMNIGLOT

    def test_a_split_of_no_episodes_is_left_out(self, tmp_path, glyphs_manifest, glyphs_bank):
        """A split of none has neither shards nor an entry."""
        request = dataclasses.replace(REQUEST, episodes={"train": 0, "val": 2})
        archive = build(glyphs_manifest, glyphs_bank, tmp_path / "val", request)
        assert list(archive.splits) == ["val"]
        assert sorted(contents(tmp_path / "val")) == [INDEX, INDEX_SUM, "val-00000.tar"]

    def test_nothing_else_is_left(self, reference):
        """A finished folder holds the archive and nothing more: no lock, no part, no hidden folder."""
        assert sorted(path.name for path in reference.rglob("*")) == [
            *(INDEX, INDEX_SUM, "test-00000.tar"),
            *("train-00000.tar", "train-00001.tar", "train-00002.tar", "val-00000.tar"),
        ]

    def test_progress_counts_every_episode_once(self, tmp_path, glyphs_manifest, glyphs_bank):
        """Progress is told of as many episodes as it was promised."""
        seen = []

        class Bar:
            def __init__(self, label, total, unit):
                assert (label, total, unit) == ("build", 12, "episodes")

            def __enter__(self):
                return seen.append

            def __exit__(self, *error):
                return None

        build(glyphs_manifest, glyphs_bank, tmp_path / "bar", REQUEST, progress=Bar)
        assert sum(seen) == 12


class TestInterrupted:
    @pytest.mark.slow
    def test_killed_at_every_operation_on_a_file(self, reference, glyphs_root, tmp_path):
        """Killed before any single open, rename or deletion, the next build ends with the same bytes."""
        done = run(KILLED_EVERYWHERE, glyphs_root, tmp_path / "out")
        assert done.returncode == 0, done.stderr
        lines = [line.split("|") for line in done.stdout.splitlines()]
        digest = read_archive(reference).digest
        names = " ".join(sorted(path.name for path in reference.iterdir()))
        assert [int(killed) for _, killed, *_ in lines] == [1] * (len(lines) - 1) + [0]
        assert len(lines) > 40
        assert {line[2] for line in lines} == {digest}
        assert {line[5] for line in lines} == {names}
        finished = [(int(there), int(kept)) for *_, there, kept, _ in lines]
        # A shard is made again only if the build died between its rename and its receipt's.
        assert all(there - kept <= 1 for there, kept in finished)
        assert max(kept for _, kept in finished[:-1]) == 5

    @pytest.mark.slow
    @pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for surviving workers in /proc")
    @pytest.mark.parametrize("workers", [1, 2])
    def test_killed_from_outside(self, script, glyphs_root, tmp_path, workers, glyphs_manifest, glyphs_bank):
        """Kill -9 in the midst of writing, with any number of workers: the next build gives the same bytes."""
        out = tmp_path / "out"
        args = [sys.executable, str(script), str(glyphs_root), str(out), str(workers), "600"]
        wanted = dataclasses.replace(REQUEST, episodes={"train": 600, "val": 2, "test": 3})
        plan = plan_archive(glyphs_manifest, glyphs_bank, wanted)
        for enough in (1, 60, 150):
            with subprocess.Popen(
                args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
            ) as process:
                deadline = time.monotonic() + 60
                while process.poll() is None and time.monotonic() < deadline:
                    if len(list((out / ".build").glob("*.tar.sha256"))) >= enough:
                        break
                    time.sleep(0.005)
                process.kill()  # the parent alone: its workers must end by themselves
                process.wait()
            assert not (out / INDEX).exists(), "it was faster than the test"
            _wait_until_gone(process.pid)
            receipts = {path.name[:-7] for path in (out / ".build").glob("*.tar.sha256")}
            assert receipts
        before = {name: (out / name).stat().st_ino for name in receipts}
        archive = build(glyphs_manifest, glyphs_bank, out, wanted)
        assert {name: (out / name).stat().st_ino for name in receipts} == before
        assert sum(len(split.shards) for split in plan.splits.values()) == len(list(out.glob("*.tar")))
        assert not [path for path in out.iterdir() if not path.name.endswith((".tar", INDEX, INDEX_SUM))]
        undisturbed = build(glyphs_manifest, glyphs_bank, tmp_path / "undisturbed", wanted)
        assert archive.digest == undisturbed.digest

    @pytest.mark.parametrize("position", [0, 600, -1])
    def test_a_shard_damaged_during_the_interruption(
        self, reference, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch, position
    ):
        """A finished shard whose bytes changed before the build went on is written again."""
        out = tmp_path / "out"
        _interrupt_after(3, glyphs_manifest, glyphs_bank, out, monkeypatch)
        damaged = bytearray((out / "train-00001.tar").read_bytes())
        damaged[position] ^= 4
        (out / "train-00001.tar").write_bytes(damaged)
        build(glyphs_manifest, glyphs_bank, out, REQUEST)
        assert contents(out) == contents(reference)

    @pytest.mark.parametrize("receipt", [b"", b"\xff\xfe", b"0" * 64])
    def test_a_receipt_damaged_during_the_interruption(
        self, reference, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch, receipt
    ):
        """A receipt that does not fit its shard makes the shard be written again."""
        out = tmp_path / "out"
        _interrupt_after(3, glyphs_manifest, glyphs_bank, out, monkeypatch)
        (out / ".build" / "train-00001.tar.sha256").write_bytes(receipt)
        build(glyphs_manifest, glyphs_bank, out, REQUEST)
        assert contents(out) == contents(reference)

    def test_finished_shards_are_not_made_again(self, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch):
        """A build that goes on writes only what is not there."""
        out = tmp_path / "out"
        _interrupt_after(3, glyphs_manifest, glyphs_bank, out, monkeypatch)
        before = {path: path.stat().st_ino for path in out.glob("*.tar")}
        build(glyphs_manifest, glyphs_bank, out, REQUEST)
        assert sorted(path.name for path in before) == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]
        assert {path: path.stat().st_ino for path in before} == before


def _interrupt_after(finished: int, manifest, bank, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Build until some shards are finished."""
    left = [finished]

    def making(task):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return shards.make_shard(task)

    with monkeypatch.context() as patch:
        patch.setattr(build_module, "make_shard", making)
        with pytest.raises(KeyboardInterrupt):
            build(manifest, bank, out, REQUEST)
    assert not (out / INDEX).exists()
    with pytest.raises(RequestError, match=r"is an unfinished build. Run the same mamldata build again to finish it"):
        read_archive(out)


def _wait_until_gone(session: int) -> None:
    """Wait for the workers of a killed process: they must end by themselves, and soon."""
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        try:
            os.killpg(session, 0)
        except ProcessLookupError:
            return
        alive = [path for path in Path("/proc").iterdir() if path.name.isdigit() and _group(path) == session]
        if not alive:
            return
        time.sleep(0.02)
    raise AssertionError("workers outlive their parent")


def _group(process: Path) -> int | None:
    try:
        state, _, group = (process / "stat").read_text().rsplit(")", 1)[1].split()[:3]
    except OSError:
        return None
    return None if state == "Z" else int(group)


PORTION = """
import sys
from pathlib import Path
from mamldata.bank.make import make_bank
from mamldata.archive.plan import BuildRequest
from mamldata.archive.build import Portion, build_portion
from mamldata.datasets.load import load_manifest
root, out, number, of = sys.argv[1:]
request = BuildRequest(n_way=3, k_shot=1, k_query=2, episodes={"train": 7, "val": 2, "test": 3}, seed=3,
                       episodes_per_shard=3)
manifest = load_manifest("glyphs")
build_portion(manifest, make_bank(manifest, Path(root)), Path(out), Portion(int(number), int(of)), request)
"""


class TestPortions:
    @hypothesis.given(st.data())
    @hypothesis.settings(max_examples=8)
    def test_any_partition_in_any_order(self, reference, tmp_path_factory, glyphs_manifest, glyphs_bank, data):
        """Whatever portions are built, in whatever order and number, the closing build gives the same bytes."""
        of = data.draw(st.integers(1, 7))
        numbers = data.draw(st.lists(st.integers(1, of), max_size=8))
        out = tmp_path_factory.mktemp("portions") / "out"
        written = [
            build_portion(glyphs_manifest, glyphs_bank, out, Portion(number, of), REQUEST).written for number in numbers
        ]
        assert sum(written) == sum(len(range(number - 1, 5, of)) for number in set(numbers))
        assert not (out / INDEX).exists()
        kept = {path: path.stat().st_ino for path in out.glob("*.tar")}
        build(glyphs_manifest, glyphs_bank, out, REQUEST)
        assert contents(out) == contents(reference)
        assert {path: path.stat().st_ino for path in kept} == kept

    def test_what_a_portion_says(self, tmp_path, glyphs_manifest, glyphs_bank):
        """How many shards it has, how many of them it wrote, and how many there are; none is fine."""

        def built(number: int, of: int) -> PortionBuilt:
            return build_portion(glyphs_manifest, glyphs_bank, tmp_path / "out", Portion(number, of), REQUEST)

        assert built(2, 2) == PortionBuilt(shards=2, written=2, of_shards=5)
        assert built(2, 2) == PortionBuilt(shards=2, written=0, of_shards=5)
        assert built(6, 6) == PortionBuilt(shards=0, written=0, of_shards=5)
        build(glyphs_manifest, glyphs_bank, tmp_path / "out", REQUEST)
        assert built(1, 1) == PortionBuilt(shards=5, written=0, of_shards=5)
        (tmp_path / "out" / "train-00000.tar").unlink()
        assert built(1, 1) == PortionBuilt(shards=5, written=1, of_shards=5)

    @pytest.mark.parametrize(
        ("number", "of", "message"),
        [
            (0, 3, "There is no portion 0/3: portions are counted from 1/3 to 3/3"),
            (4, 3, "There is no portion 4/3: portions are counted from 1/3 to 3/3"),
            (1, 0, "There is no portion 1/0: portions are counted from 1/1 to 1/1"),
        ],
    )
    def test_that_there_is_not(self, number, of, message):
        """A portion out of range is refused, and it is said how they are counted."""
        with pytest.raises(RequestError, match=message):
            Portion(number, of)

    @pytest.mark.slow
    def test_at_the_same_time_and_beside_a_whole_build(self, reference, script, glyphs_root, tmp_path):
        """Portions, some of them twice, and builds of the whole, all at once: all succeed, and the bytes are right."""
        out = tmp_path / "out"
        portions = [
            [sys.executable, "-c", PORTION, str(glyphs_root), str(out), str(number), "3"] for number in (1, 2, 3, 1, 2)
        ]
        whole = [[sys.executable, str(script), str(glyphs_root), str(out)]] * 2
        processes = [
            subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            for args in portions + whole
        ]
        outputs = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * 7, outputs
        build(load_manifest("glyphs"), make_bank(load_manifest("glyphs"), glyphs_root), out, REQUEST)
        assert contents(out) == contents(reference)

    def test_another_archive_is_refused(self, built, tmp_path, glyphs_manifest, glyphs_bank):
        """A portion is never written into another archive, finished or not."""
        other = dataclasses.replace(REQUEST, seed=4)
        with pytest.raises(RequestError, match=r"already holds another archive \(seed 3 there, 4 asked for\)"):
            build_portion(glyphs_manifest, glyphs_bank, built, Portion(1, 2), other)
        build_portion(glyphs_manifest, glyphs_bank, tmp_path / "out", Portion(1, 2), REQUEST)
        with pytest.raises(RequestError, match=r"an unfinished build of another archive \(seed 3 there, 4 asked for\)"):
            build_portion(glyphs_manifest, glyphs_bank, tmp_path / "out", Portion(2, 2), other)


class TestExecutor:
    @pytest.mark.parametrize("kind", [ThreadPoolExecutor, ProcessPoolExecutor])
    def test_any_executor_writes_the_same_bytes(self, reference, tmp_path, glyphs_manifest, glyphs_bank, kind):
        """Whoever runs the tasks, the bytes are the same; the executor stays open."""
        options = {} if kind is ThreadPoolExecutor else {"mp_context": multiprocessing.get_context("spawn")}
        with kind(2, **options) as executor:
            build(glyphs_manifest, glyphs_bank, tmp_path / "out", REQUEST, executor=executor)
            assert executor.submit(abs, -1).result() == 1
        assert contents(tmp_path / "out") == contents(reference)

    def test_workers_that_write_elsewhere(self, tmp_path, glyphs_manifest, glyphs_bank):
        """Workers that have the same path on a disk of their own are noticed before the archive is closed."""

        class Elsewhere(ThreadPoolExecutor):
            def submit(self, make, task):
                if not (tmp_path / "elsewhere").exists():  # once, lest the worker reads what is half copied
                    shutil.copytree(task.store.path, tmp_path / "elsewhere")
                other = dataclasses.replace(task.store, path=tmp_path / "elsewhere")
                return super().submit(make, dataclasses.replace(task, store=other))

        with (
            Elsewhere(1) as executor,
            pytest.raises(
                WriteError, match=r"Workers wrote 5 shards, but 5 of them are not in .*out \(first: train-00000"
            ),
        ):
            build(glyphs_manifest, glyphs_bank, tmp_path / "out", REQUEST, executor=executor)
        assert not (tmp_path / "out" / INDEX).exists()

    def test_a_relative_place(self, reference, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch):
        """Workers have other current folders: what they are told is absolute."""
        monkeypatch.chdir(tmp_path)
        bank = dataclasses.replace(glyphs_bank, path=Path(os.path.relpath(glyphs_bank.path)))
        seen = []
        with ThreadPoolExecutor(1) as executor:
            submit = executor.submit
            monkeypatch.setattr(executor, "submit", lambda make, task: (seen.append(task), submit(make, task))[1])
            build(glyphs_manifest, bank, Path("out"), REQUEST, executor=executor)
        assert {(task.store.path, task.bank.is_absolute()) for task in seen} == {(tmp_path / "out", True)}
        assert contents(tmp_path / "out") == contents(reference)


class TestAgain:
    def test_a_second_build_touches_nothing(self, built, glyphs_manifest, glyphs_bank):
        """Building what is there changes no file, not even its time."""
        before = {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [built, *built.iterdir()]}
        archive = build(glyphs_manifest, glyphs_bank, built, REQUEST, workers=2)
        assert archive.digest == GOLDEN
        assert {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in [built, *built.iterdir()]} == before

    def test_it_needs_no_right_to_write(self, built, glyphs_manifest, glyphs_bank):
        """What is finished can be asked for where nothing can be written."""
        for path in [*built.iterdir(), built]:
            path.chmod(path.stat().st_mode & ~0o222)
        try:
            assert build(glyphs_manifest, glyphs_bank, built, REQUEST).digest == GOLDEN
        finally:
            built.chmod(0o755)

    @pytest.mark.parametrize("damage", ["missing", "short", "long"])
    def test_a_shard_that_was_lost_is_made_again(self, built, reference, glyphs_manifest, glyphs_bank, damage):
        """The remedy that the error of a missing or short shard names, building again, works; others are kept."""
        path = built / "train-00001.tar"
        data = path.read_bytes()
        path.unlink()
        if damage != "missing":
            path.write_bytes(data[:-512] if damage == "short" else data + bytes(512))
        kept = (built / "train-00000.tar").stat().st_ino
        build(glyphs_manifest, glyphs_bank, built, REQUEST)
        assert contents(built) == contents(reference)
        assert (built / "train-00000.tar").stat().st_ino == kept

    def test_a_leftover_of_the_last_moment_is_cleared(self, built, reference, glyphs_manifest, glyphs_bank):
        """A process that died while it cleared up leaves a finished archive, and the next build clears the rest."""
        (built / ".build").mkdir()
        (built / ".lock").touch()
        build(glyphs_manifest, glyphs_bank, built, REQUEST)
        assert contents(built) == contents(reference)
        assert not (built / ".build").exists()

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            ({"seed": 4}, "seed 3 there, 4 asked for"),
            ({"n_way": 4, "k_shot": 2}, "n_way 3 there, 4 asked for"),
            ({"rotations": "none"}, "rotations 'all' there, 'none' asked for"),
            (
                {"episodes": {"train": 7, "val": 3, "test": 0}},
                "val 2 episodes there, 3 asked for, test 3 episodes there, 0",
            ),
            ({"episodes_per_shard": 2}, "other shard sizes or classes"),
        ],
    )
    def test_another_archive_is_never_written_over(self, built, glyphs_manifest, glyphs_bank, change, difference):
        """A folder with another archive is refused, and what differs is named; finished or not."""
        before = contents(built)
        request = dataclasses.replace(REQUEST, **change)
        with pytest.raises(RequestError, match=rf"already holds another archive \(.*{difference}"):
            build(glyphs_manifest, glyphs_bank, built, request)
        assert contents(built) == before

    @pytest.mark.parametrize(
        ("change", "difference"),
        [({"seed": 4}, "seed 3 there, 4 asked for"), ({"episodes": {"train": 7}}, "val 2 episodes there, 0 asked for")],
    )
    def test_another_unfinished_build_is_never_gone_on_with(
        self, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch, change, difference
    ):
        """The shards of another request are not taken for those of this one."""
        out = tmp_path / "out"
        _interrupt_after(1, glyphs_manifest, glyphs_bank, out, monkeypatch)
        with pytest.raises(RequestError, match=rf"an unfinished build of another archive \(.*{difference}"):
            build(glyphs_manifest, glyphs_bank, out, dataclasses.replace(REQUEST, **change))

    @pytest.mark.parametrize("plan", [b"", b"{}", b"[1]", b"\xff", b'{"splits": 3}'])
    def test_a_damaged_plan(self, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch, plan):
        """An unfinished build whose plan cannot be read is refused with a word, not a traceback."""
        out = tmp_path / "out"
        _interrupt_after(1, glyphs_manifest, glyphs_bank, out, monkeypatch)
        (out / ".build" / "plan.json").write_bytes(plan)
        with pytest.raises(RequestError, match="an unfinished build of another archive"):
            build(glyphs_manifest, glyphs_bank, out, REQUEST)

    def test_a_damaged_archive_is_not_written_over(self, built, glyphs_manifest, glyphs_bank):
        """archive.json with a flipped byte is an error, not an invitation."""
        data = bytearray((built / INDEX).read_bytes())
        data[40] ^= 1
        (built / INDEX).write_bytes(data)
        with pytest.raises(DamagedError, match=r"archive\.json"):
            build(glyphs_manifest, glyphs_bank, built, REQUEST)

    def test_a_folder_of_other_things(self, tmp_path, glyphs_manifest, glyphs_bank):
        """Files of the user's are not built among."""
        (tmp_path / "thesis.txt").write_text("do not touch")
        with pytest.raises(RequestError, match=r"is not empty and not an archive. Choose another folder"):
            build(glyphs_manifest, glyphs_bank, tmp_path, REQUEST)
        assert sorted(contents(tmp_path)) == ["thesis.txt"]

    def test_a_build_folder_of_the_users(self, tmp_path, built, glyphs_manifest, glyphs_bank):
        """A folder .build with other files is no unfinished build; in an archive it stays as it is."""
        theirs = tmp_path / ".build" / "objects" / "thesis.o"
        theirs.parent.mkdir(parents=True)
        theirs.write_text("do not touch")
        with pytest.raises(RequestError, match=r"is not empty and not an archive. Choose another folder"):
            build(glyphs_manifest, glyphs_bank, tmp_path, REQUEST)
        assert theirs.read_text() == "do not touch"
        shutil.copytree(tmp_path / ".build", built / ".build")
        (built / "train-00000.tar").unlink()
        build(glyphs_manifest, glyphs_bank, built, REQUEST)
        assert [path.name for path in (built / ".build").iterdir()] == ["objects"]
        assert (built / ".build" / "objects" / "thesis.o").read_text() == "do not touch"

    def test_a_file_in_the_way(self, tmp_path, glyphs_manifest, glyphs_bank):
        """A file of the folder's name, or of a parent's, is an error that names it."""
        (tmp_path / "file").write_text("do not touch")
        with pytest.raises(WriteError, match=r"file is a file. Choose a folder"):
            build(glyphs_manifest, glyphs_bank, tmp_path / "file", REQUEST)
        with pytest.raises(WriteError, match=r"file/below.*Not a directory"):
            build(glyphs_manifest, glyphs_bank, tmp_path / "file" / "below", REQUEST)
        assert (tmp_path / "file").read_text() == "do not touch"

    def test_an_empty_folder_is_taken(self, tmp_path, reference, glyphs_manifest, glyphs_bank):
        """A folder made beforehand, and parents that are not there, are both fine."""
        (tmp_path / "empty").mkdir()
        for out in (tmp_path / "empty", tmp_path / "a" / "b"):
            build(glyphs_manifest, glyphs_bank, out, REQUEST)
            assert contents(out) == contents(reference)


class TestImpossible:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_way": 900}, "split 'train' .* has 640 classes, but n_way is 900"),
            ({"n_way": 121, "episodes": {"val": 1}}, "split 'val' .* has 120 classes, but n_way is 121"),
            ({"k_shot": 10, "k_query": 11}, r"it has 20 images, but k_shot \+ k_query = 10 \+ 11 = 21"),
            ({"n_way": 1}, "n_way must be at least 2, not 1"),
            ({"n_way": 0}, "n_way must be at least 2, not 0"),
            ({"n_way": -3, "k_shot": -3, "k_query": -3}, "n_way must be at least 2, not -3"),
            ({"k_shot": 0}, "k_shot must be at least 1, not 0"),
            ({"k_query": -1}, "k_query must be at least 1, not -1"),
            ({"k_query": 10**30}, "tar allows less than 8 GiB"),
            ({"seed": -1}, "seed must be at least 0, not -1"),
            ({"split_scheme": "lake"}, "lake"),
        ],
    )
    def test_refused_before_anything_is_written(self, tmp_path, glyphs_manifest, glyphs_bank, change, message):
        """What cannot be made is refused before its folder is."""
        with pytest.raises(RequestError, match=message):
            build(glyphs_manifest, glyphs_bank, tmp_path / "out", dataclasses.replace(REQUEST, **change))
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"episodes": {"dev": 3}}, "There is no split 'dev'; the splits are train, val, test"),
            ({"episodes": {"train": -1}}, "train must have from 0 to 99,999,999 episodes, not -1"),
            ({"episodes": {"test": 10**8}}, "test must have from 0 to 99,999,999 episodes, not 100,000,000"),
            ({"episodes": {}}, "there is nothing to build"),
            ({"episodes": {"train": 0}}, "there is nothing to build"),
            ({"rotations": "some"}, "rotations must be one of .*, not 'some'"),
            ({"episodes_per_shard": 0}, "episodes_per_shard must be at least 1, not 0"),
        ],
    )
    def test_requests_that_make_no_sense(self, change, message):
        """A request is checked when it is made."""
        with pytest.raises(RequestError, match=message):
            dataclasses.replace(REQUEST, **change)


FULL_DISK = (
    "import resource, sys\nlimit = int(sys.argv.pop(1))\nresource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))\n"
)


class TestPlaces:
    @pytest.mark.parametrize("limit", [0, 3_000, 12_000])
    def test_a_full_disk(self, reference, glyphs_root, tmp_path, limit):
        """No space left is an error that says so, and the same command finishes once there is some."""
        out = tmp_path / "out"
        done = run(FULL_DISK + PLAIN, limit, glyphs_root, out)
        assert done.returncode == 1
        assert "WriteError: No space left to write" in done.stderr
        assert "run the same command again: finished work is kept" in done.stderr
        assert not (out / INDEX).exists()
        done = run(PLAIN, glyphs_root, out)
        assert done.returncode == 0, done.stderr
        assert contents(out) == contents(reference)

    @pytest.mark.slow
    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_disk_that_fills_up(self, reference, glyphs_manifest, glyphs_bank, small_disk, workers):
        """Of a real one, too, each time a little larger: it never holds half an archive, and at last the whole."""
        out = small_disk.path / "out"
        need = sum(len(data) for data in contents(reference).values())
        for size in range(1 << 16, need, 1 << 17):
            small_disk.grow(size)
            with pytest.raises(WriteError, match="No space left to write"):
                build(glyphs_manifest, glyphs_bank, out, REQUEST, workers=workers)
            assert not (out / INDEX).exists()
        small_disk.grow(4 * need)
        build(glyphs_manifest, glyphs_bank, out, REQUEST, workers=workers)
        assert contents(out) == contents(reference)

    @pytest.mark.usefixtures("permissions_count")
    def test_a_folder_without_the_right_to_write(self, tmp_path, glyphs_manifest, glyphs_bank):
        """A read-only place is an error that names it and the remedy."""
        tmp_path.chmod(0o555)
        try:
            with pytest.raises(WriteError, match=r"Cannot write .*out.*Make the folder writable"):
                build(glyphs_manifest, glyphs_bank, tmp_path / "out", REQUEST)
        finally:
            tmp_path.chmod(0o755)

    @pytest.mark.slow
    def test_processes_that_build_the_same_at_once(self, reference, script, glyphs_root, tmp_path):
        """All succeed, with the same digest, and the bytes are right."""
        args = [sys.executable, str(script), str(glyphs_root), str(tmp_path / "out")]
        processes = [
            subprocess.Popen(args, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)
        ]
        outputs = [process.communicate(timeout=120) for process in processes]
        assert [process.returncode for process in processes] == [0] * 3, outputs
        assert {out.split()[-1] for out, _ in outputs} == {read_archive(reference).digest}
        assert contents(tmp_path / "out") == contents(reference)

    def test_another_build_that_began_while_we_waited(
        self, tmp_path, reference, glyphs_manifest, glyphs_bank, monkeypatch
    ):
        """Two different requests for one folder: the second is refused, though the folder was empty when it looked."""
        out = tmp_path / "out"

        @contextlib.contextmanager
        def waited(path):
            shutil.copytree(reference, out, dirs_exist_ok=True)  # another process was here first
            yield

        monkeypatch.setattr(store, "locked", waited)
        with pytest.raises(RequestError, match=r"already holds another archive .*seed 3 there, 4 asked for"):
            build(glyphs_manifest, glyphs_bank, out, dataclasses.replace(REQUEST, seed=4))
        assert contents(out) == contents(reference)

    def test_a_worker_that_dies(self, tmp_path, glyphs_manifest, glyphs_bank, monkeypatch):
        """A worker killed from outside ends in an error that says so, and the same build then finishes."""
        monkeypatch.setattr(build_module, "make_shard", _Die())
        with pytest.raises(MamldataError, match=r"A worker process died .* Run the same command again"):
            build(glyphs_manifest, glyphs_bank, tmp_path / "out", REQUEST, workers=2)
        monkeypatch.undo()
        assert build(glyphs_manifest, glyphs_bank, tmp_path / "out", REQUEST).digest == GOLDEN


class _Die:
    """A task function that ends the worker which unpickles it, as an out-of-memory killer would."""

    def __reduce__(self):
        return os._exit, (9,)

    def __call__(self, _task):
        raise AssertionError("runs in workers only")


def test_a_shards_digest_is_that_of_its_bytes(reference):
    """What archive.json says of each shard is its file's length and SHA-256."""
    for split in read_archive(reference).splits.values():
        for shard in split.shards:
            data = (reference / shard.file).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard.bytes, shard.sha256)
