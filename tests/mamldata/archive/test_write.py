"""One shard: small tasks, workers that see something else, and writers that others overtake."""

from __future__ import annotations

import dataclasses
import pickle
import socket
from pathlib import Path

import pytest

from mamldata.archive import write as shards
from mamldata.archive.build import Portion, build, build_portion
from mamldata.archive.index import Archive
from mamldata.archive.plan import BuildRequest, plan_archive
from mamldata.archive.store import BUILD, FolderStore
from mamldata.archive.write import ShardTask, make_shard
from mamldata.errors import DataMissingError, MamldataError, WriteError
from mamldata.io.digest import sha256_bytes

REQUEST = BuildRequest(n_way=3, k_query=2, episodes={"train": 7, "val": 2}, seed=3, episodes_per_shard=3)
WORKER = f"The worker on {socket.gethostname()} "


@pytest.fixture
def plan(glyphs_manifest, glyphs_bank) -> Archive:
    return plan_archive(glyphs_manifest, glyphs_bank, REQUEST)


@pytest.fixture
def task(tmp_path, plan, glyphs_manifest, glyphs_bank) -> ShardTask:
    """The second train shard of a build of which the first is there."""
    build_portion(glyphs_manifest, glyphs_bank, tmp_path / "out", Portion(1, 9), REQUEST)
    store = FolderStore(tmp_path / "out")
    return ShardTask(store, sha256_bytes(plan.to_json()), glyphs_bank.path, "train-00001.tar")


def test_a_task_is_small(task, plan):
    """What is sent for a shard is a few hundred bytes, however long the class table."""
    assert len(pickle.dumps(task)) < 600
    assert len(plan.to_json()) > 20_000


def test_a_shard_is_written_once(task):
    """The first call writes, the second finds; both say the file's digest."""
    first, second = make_shard(task), make_shard(task)
    assert (first.written, second.written) == (True, False)
    assert first.sha256 == second.sha256 == task.store.sha256("train-00001.tar")


def test_another_version(task):
    """A worker with another version of mamldata writes nothing."""
    with pytest.raises(MamldataError, match=rf"{WORKER}.* has mamldata .*, and the build 0\.0\.9. Install the same"):
        make_shard(dataclasses.replace(task, version="0.0.9"))
    assert task.store.size("train-00001.tar") is None


def test_a_worker_that_sees_no_build(task, tmp_path):
    """A worker on which the folder is empty, or holds another build, says who it is and what it lacks."""
    with pytest.raises(MamldataError, match=rf"{WORKER}.* sees no unfinished build in .*elsewhere. All workers need"):
        make_shard(dataclasses.replace(task, store=FolderStore(tmp_path / "elsewhere")))
    with pytest.raises(MamldataError, match=rf"{WORKER}.* sees another build in .*out. All workers need"):
        make_shard(dataclasses.replace(task, plan_sha256="0" * 64))


def test_a_worker_that_does_not_see_the_bank(task, tmp_path, glyphs_bank):
    """A bank that is not there, or another one, or cut short, is named together with the worker."""
    with pytest.raises(DataMissingError, match=rf"{WORKER}.*nowhere.npy cannot be read .*Every worker needs the bank"):
        make_shard(dataclasses.replace(task, bank=tmp_path / "nowhere.npy"))
    short = tmp_path / glyphs_bank.path.name
    short.with_suffix(".json").write_bytes(glyphs_bank.path.with_suffix(".json").read_bytes())
    short.write_bytes(glyphs_bank.path.read_bytes()[:-1])
    with pytest.raises(DataMissingError, match=rf"{WORKER}.* is another bank: .*Every worker needs the bank"):
        make_shard(dataclasses.replace(task, bank=short))


def test_after_the_archive_is_closed(task, glyphs_manifest, glyphs_bank):
    """A task that comes late, as from a worker that was thought dead, finds its shard and leaves nothing behind."""
    archive = build(glyphs_manifest, glyphs_bank, task.store.path, REQUEST)
    shards._read_plan.cache_clear()  # as in another process
    made = make_shard(task)
    assert (made.sha256, made.written) == (archive.splits["train"].shards[1].sha256, False)
    assert BUILD not in task.store.entries()


@pytest.mark.parametrize("before_the_last_byte", [True, False])
def test_closed_in_the_middle(task, glyphs_manifest, glyphs_bank, monkeypatch, before_the_last_byte):
    """A writer that is overtaken by a whole build gives that one's shard, and makes no new unfinished build."""
    closed = []
    real, real_write = shards.shard_pieces, FolderStore.write

    def overtake() -> None:
        monkeypatch.undo()
        closed.append(build(glyphs_manifest, glyphs_bank, task.store.path, REQUEST))

    def slow_pieces(*arguments):
        yield from real(*arguments)
        overtake()

    def slow_write(store, name, pieces):
        real_write(store, name, pieces)
        overtake()

    if before_the_last_byte:
        monkeypatch.setattr(shards, "shard_pieces", slow_pieces)
    else:
        monkeypatch.setattr(FolderStore, "write", slow_write)
    made = make_shard(task)
    assert (made.sha256, made.written) == (closed[0].splits["train"].shards[1].sha256, False)
    assert BUILD not in task.store.entries()
    assert task.store.sha256("train-00001.tar") == made.sha256


def test_a_folder_that_was_deleted_meanwhile(task, monkeypatch):
    """Where nobody closed the archive, the loss of .build is an error that says so."""
    real = shards.shard_pieces

    def pieces(*arguments):
        yield from real(*arguments)
        for path in Path(task.store.path, BUILD).iterdir():
            path.unlink()
        Path(task.store.path, BUILD).rmdir()

    monkeypatch.setattr(shards, "shard_pieces", pieces)
    with pytest.raises(WriteError, match=r"out/\.build was removed while train-00001\.tar was written"):
        make_shard(task)
