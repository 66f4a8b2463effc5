from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from trainer.system import threads
from trainer.system.threads import choose_threads, limited_threads


@pytest.fixture(autouse=True)
def _torch_has_four(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("usable", "count", "reason"), [(2, 2, "one per"), (4, 4, "setting"), (64, 4, "setting")])
def test_no_more_than_the_processors(monkeypatch: pytest.MonkeyPatch, usable: int, count: int, reason: str) -> None:
    """Torch's number is lowered to them and never raised; in the block alone, and with the reason in words."""
    monkeypatch.setattr(threads, "default_workers", lambda: usable)
    with limited_threads() as chosen:
        assert torch.get_num_threads() == chosen.count == count
    assert torch.get_num_threads() == 4
    assert str(chosen).startswith(f"{count} threads (")
    assert reason in str(chosen)


def test_what_the_user_sets_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if it is more than there are processors."""
    monkeypatch.setattr(threads, "default_workers", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert str(choose_threads()) == "4 threads (OMP_NUM_THREADS is 4)"
    torch.set_num_threads(1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert str(choose_threads()) == "1 thread (torch's setting)"


def test_an_error_gives_the_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What fails in the block leaves torch as it was."""
    monkeypatch.setattr(threads, "default_workers", lambda: 2)
    with pytest.raises(ValueError, match="inside"), limited_threads():
        raise ValueError("inside")
    assert torch.get_num_threads() == 4
