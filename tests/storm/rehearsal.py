"""A campaign in which everything goes wrong: it shows that a storm tells of it."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

from tests.storm.harness import Broken, Campaign, Outcome, Skipped

ENDS = ("same", "promise", "killed", "hangs", "skipped", "bug")


def _attempt(chance: random.Random, place: Path) -> Outcome:
    """End in one of six ways."""
    match chance.choice(ENDS):
        case "promise":
            raise Broken("a promise")
        case "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        case "hangs":
            time.sleep(600)
        case "skipped":
            raise Skipped("no luck")
        case "bug":
            raise RuntimeError("a bug")
    return "same"


REHEARSAL = Campaign("rehearsal", "everything goes wrong", 12, _attempt, limit=1)
