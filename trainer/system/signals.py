"""Signals that ask a run to save and stop: from schedulers, before they kill it, and from the keyboard."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Most schedulers send SIGTERM; users of Slurm often choose SIGUSR1. Windows has only the first.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


@dataclass
class Stop:
    """Whether to stop.

    Attributes:
        asked: the signal that this process has received.
        agreed: the signal for which all processes of the job stop after the current step.
    """

    asked: str | None = None
    agreed: str | None = None


@contextmanager
def stop_at_signals(*, keyboard: bool = False) -> Iterator[Stop]:
    """Note SIGTERM and SIGUSR1 during the block instead of ending the process.

    Further ones have no effect, since a scheduler and torchrun may both send one. Python handles signals only in the
    main thread; in another one nothing is noted.

    Args:
        keyboard: also note the first SIGINT, and say on stderr that the next one acts as usual.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def note(number: int, _: FrameType | None) -> None:
        stop.asked = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(number, before[number])
            sys.stderr.write("Stopping after the current step. Interrupt again to stop at once, without saving it.\n")

    # SIGINT stays ignored where it is, as in a shell's background job.
    interrupts = keyboard and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = {number: signal.signal(number, note) for number in [*_SIGNALS, *[signal.SIGINT] * interrupts]}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
