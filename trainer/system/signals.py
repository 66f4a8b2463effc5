"""Signals that ask a run to save and leave: those of schedulers, before they kill, and of the keyboard."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# SIGTERM is what most schedulers send, SIGUSR1 what Slurm's users choose. Windows knows the first alone.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@dataclass
class Stop:
    """Whether to stop.

    Attributes:
        asked: the signal that this process has got.
        agreed: the signal for which all processes of the job stop after the step that they are in.
    """

    asked: str | None = None
    agreed: str | None = None


@contextmanager
def stop_at_signals(*, keyboard: bool = False) -> Iterator[Stop]:
    """Only note SIGTERM and SIGUSR1 for the time of the block.

    More of them change nothing, since a scheduler and torchrun may both send one. Python lets the main thread alone
    handle signals; in another one nothing is noted.

    Args:
        keyboard: note the first SIGINT, too, and say on stderr that the next one will do what it did before.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: FrameType | None) -> None:
        stop.asked = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            sys.stderr.write("Stopping after the step under way. Interrupt again to stop at once, without saving it.\n")

    # Where SIGINT is ignored, as in a shell's background job, it stays so.
    interrupts = keyboard and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = {number: signal.signal(number, note) for number in [*_SIGNALS, *[signal.SIGINT] * interrupts]}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
