"""Signals that ask a run to save and stop: from schedulers, before they kill it, and from the keyboard."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

# Most schedulers send SIGTERM; users of Slurm often choose SIGUSR1. Windows has only the first.
_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]


class BrokenOffError(Exception):
    """Work was broken off because this process has been asked to stop."""


@dataclass
class Stop:
    """Whether to stop.

    Attributes:
        asked: the signal that this process has received.
        agreed: the signal for which all processes of the job stop after the current step.
    """

    asked: str | None = None
    agreed: str | None = None

    def break_off(self) -> None:
        """Break off work that takes long and can be done again; any thread may ask.

        Raises:
            BrokenOffError: this process has been asked to stop.
        """
        if self.asked:
            raise BrokenOffError


_in_force: list[Stop] = []  # handlers are the process's, so a block within another one shares its Stop


@contextmanager
def stop_at_signals(*, keyboard: bool = False, at_once: bool = False) -> Iterator[Stop]:
    """Note SIGTERM and SIGUSR1 during the block instead of ending the process, and say so on stderr.

    Further ones have no effect, since a scheduler and torchrun may both send one. Python handles signals only in the
    main thread; in another one nothing is noted. A block within another one yields the Stop of that one.

    Args:
        keyboard: also note the first SIGINT, and say that the next one acts as usual.
        at_once: the next SIGINT ends the process whatever it is computing; for programs, not for notebooks, whose
            process must live on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield Stop()
        return
    if _in_force:
        yield _in_force[-1]
        return
    stop = Stop()

    def note(number: int, _: FrameType | None) -> None:
        first, stop.asked = stop.asked is None, signal.Signals(number).name
        if number == signal.SIGINT:
            # Python's own handler would wait for the end of a long operation of torch; the system's does not. It is in
            # force before the message asks for the next signal, which would be lost otherwise.
            signal.signal(number, signal.SIG_DFL if at_once else before[number])
        if first:
            again = " Interrupt again to stop at once, without saving." if number == signal.SIGINT else ""
            _say(f"{stop.asked}: stopping as soon as the work so far is saved.{again}\n")

    # SIGINT stays ignored where it is, as in a shell's background job.
    interrupts = keyboard and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    before = {number: signal.signal(number, note) for number in [*_SIGNALS, *[signal.SIGINT] * interrupts]}
    _in_force.append(stop)
    try:
        yield stop
    finally:
        _in_force.remove(stop)
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _say(text: str) -> None:
    # Not sys.stderr: the signal may have come while the process writes there.
    with contextlib.suppress(OSError):
        os.write(2, text.encode())
