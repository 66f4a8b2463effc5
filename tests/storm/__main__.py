"""``python -m tests.storm``: run the campaigns, go on where the last run stopped, and print or write the table."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

_MOST_SHOWN = 3  # failures that look alike; the journals have all

# Before anything loads NumPy or torch, here and in the workers.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
# Killed processes leave semaphores, of which Python then warns.
os.environ["PYTHONWARNINGS"] = "ignore::UserWarning:multiprocessing.resource_tracker"


def main() -> int:
    """Run what the command line asks for; returns how many tries failed, at most 1."""
    from tests.storm.campaigns import CAMPAIGNS
    from tests.storm.harness import Try, carry_out, chance_of, remove, workplace
    from tests.storm.report import Row, markdown, write_table

    options = _options(sorted(CAMPAIGNS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that nothing is left behind
    os.environ["STORM_PLACE"] = place = tempfile.mkdtemp(prefix="storm-", dir=_memory())
    try:
        chosen = [CAMPAIGNS[name] for name in options.campaign or CAMPAIGNS]
        if options.tries is not None:
            (campaign,) = chosen
            folder = workplace() / "try"
            folder.mkdir()
            try:
                print(campaign.attempt(chance_of(options.seed, campaign.name, options.tries), folder))
            except Exception:
                traceback.print_exc()
                return 1
            return 0
        options.work.mkdir(parents=True, exist_ok=True)
        rows = []
        shown: Counter[tuple[str, str]] = Counter()  # failures that look alike
        for campaign in chosen:
            wanted = max(1, round(campaign.tries * options.scale))
            start = time.monotonic()

            def tell(one: Try, name: str = campaign.name) -> None:
                kind = (name, re.sub(r"[0-9]+", "", one.reason.strip().rpartition("\n")[2])[:60])
                shown[kind] += one.outcome == "failed"
                if one.outcome == "failed" and shown[kind] <= _MOST_SHOWN:
                    print(f"\nFAILED: python -m tests.storm --campaign {name} --seed {options.seed} --try {one.number}")
                    print(f"    {one.reason.strip()}".replace("\n", "\n    "), flush=True)

            tries = carry_out(campaign, options.seed, wanted, options.processes, options.work, tell)
            rows.append(Row.of(campaign, tries.values()))
            print(f"{rows[-1].line()} ({time.monotonic() - start:.0f} s now)", flush=True)
    finally:
        remove(Path(place))
    table = markdown(rows, options.seed, options.scale, options.processes)
    print(f"\n{table}")
    if options.write:
        write_table(options.write, table)
    return int(any(row.failed for row in rows))


def _memory() -> str | None:
    """A file system in memory with a gigabyte to spare, where flushing takes no time; None if there is none."""
    place = Path("/dev/shm")
    return str(place) if os.access(place, os.W_OK) and shutil.disk_usage(place).free > 1 << 30 else None


def _options(names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description=__doc__)
    parser.add_argument("--campaign", action="append", choices=names, help="only this one; repeatable")
    parser.add_argument("--try", dest="tries", type=int, metavar="N", help="run one try of one campaign again, here")
    parser.add_argument("--seed", type=int, default=0, help="of all tries (default: 0)")
    parser.add_argument("--scale", type=float, default=1.0, help="more or fewer tries (default: 1)")
    parser.add_argument(
        "--processes", type=int, default=2, help="that make tries at the same time; 0: this one (default: 2)"
    )
    parser.add_argument("--work", type=Path, default=Path("storm"), help="folder of the journals (default: storm)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="put the table between the markers of this page")
    options = parser.parse_args()
    if options.tries is not None and len(options.campaign or ()) != 1:
        parser.error("--try needs one --campaign")
    return options


if __name__ == "__main__":
    sys.exit(main())
