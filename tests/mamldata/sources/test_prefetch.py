"""Work ahead of time: each result goes to whoever asks for it, and nothing waits for a job that nobody asks for."""

from __future__ import annotations

import os
import pickle
import threading

import pytest

from mamldata.sources.prefetch import Prefetch


def fails() -> str:
    raise ValueError("of no use")


def test_results_and_errors_go_to_whoever_asks():
    """A job's result, or what it raised, comes where it is taken, once; other jobs are not touched."""
    ahead: Prefetch[int, str] = Prefetch()
    ahead.start(1, lambda: "one")
    ahead.start(2, fails)
    assert 1 in ahead
    assert 3 not in ahead
    assert ahead.take(1) == "one"
    assert 1 not in ahead
    assert 2 in ahead
    with pytest.raises(ValueError, match="of no use"):
        ahead.take(2)
    assert 2 not in ahead


def test_a_failure_is_the_end_of_all():
    """What others were begun for is over: those that failed, too, are begun anew, and those under way still count."""
    ahead: Prefetch[int, str] = Prefetch()
    end = threading.Event()
    ahead.start(1, fails)
    ahead.start(2, fails)
    ahead.start(3, lambda: str(end.wait(30)))
    with pytest.raises(ValueError, match="of no use"):
        ahead.take(1)
    assert not any(key in ahead for key in (1, 2, 3))
    assert ahead.running >= 1
    ahead.start(2, lambda: "two")
    assert ahead.take(2) == "two"
    end.set()
    ahead.join(30)
    assert ahead.running == 0


def test_jobs_run_at_the_same_time():
    """Two jobs that wait for each other end; those under way are counted."""
    ahead: Prefetch[str, int] = Prefetch()
    meeting = threading.Barrier(3, timeout=30)
    for name in "ab":
        ahead.start(name, meeting.wait)
    assert ahead.running == 2
    meeting.wait()
    assert sorted(ahead.take(name) for name in "ab") <= [0, 1, 2]
    ahead.join(30)
    assert ahead.running == 0


def test_what_nobody_waits_for_is_dropped():
    """Results are kept for the given keys alone; another job of the same key can then begin."""
    ahead: Prefetch[int, str] = Prefetch()
    for key in (1, 2, 3):
        ahead.start(key, lambda: "old")
    ahead.keep_only([2, 4])
    assert [key for key in (1, 2, 3, 4) if key in ahead] == [2]
    ahead.start(1, lambda: "new")
    assert (ahead.take(1), ahead.take(2)) == ("new", "old")


def test_without_a_thread_a_job_is_done_at_once(monkeypatch: pytest.MonkeyPatch):
    """Where this process may have no more threads, its own does the job, and its result or error waits as ever."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    ahead: Prefetch[int, str] = Prefetch()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        ahead.start(1, lambda: "one")
        ahead.start(2, fails)
    assert ahead.running == 0
    ahead.join(1)
    assert ahead.take(1) == "one"
    with pytest.raises(ValueError, match="of no use"):
        ahead.take(2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork on this system")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_other_processes_begin_with_none():
    """Neither a fork nor a pickle waits for a job whose thread it does not have."""
    ahead: Prefetch[int, bool] = Prefetch()
    end = threading.Event()
    ahead.start(1, lambda: end.wait(30))
    assert 1 not in pickle.loads(pickle.dumps(ahead))
    child = os.fork()
    if child == 0:
        os._exit(1 in ahead)
    assert os.waitpid(child, 0)[1] == 0
    assert 1 in ahead
    end.set()
    assert ahead.take(1)
