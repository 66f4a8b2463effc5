"""Shared by the benchmarks: a description of the machine, repeated timing, one JSON document as output."""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mamldata
from mamldata.bank.format import Bank
from mamldata.bank.make import make_bank
from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.paths import data_root
from mamldata.fetching.act import fetch
from mamldata.parallel import default_workers


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the options common to all benchmarks."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--dataset", default="glyphs", help="a name or a manifest (default: glyphs)")
    parser.add_argument("--from", dest="places", action="append", default=[], help="where to fetch raw files from")
    parser.add_argument("--root", help="the data root (default: as for mamldata)")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each candidate (default: 7)")
    return parser


def raw(options: argparse.Namespace) -> tuple[Manifest, Path]:
    """The dataset with its raw files in place."""
    manifest, root = load_manifest(options.dataset), data_root(options.root)
    fetch(manifest, root, tuple(options.places), offline=True)
    return manifest, root


def bank(options: argparse.Namespace) -> tuple[Manifest, Bank]:
    """The dataset's bank."""
    manifest, root = raw(options)
    return manifest, make_bank(manifest, root, workers=default_workers())


def in_turn(candidates: Mapping[str, Callable[[], int]], repeats: int) -> dict[str, dict[str, float]]:
    """Time candidates in turn, A B C A B C …, so that a slowdown of the machine affects all of them.

    Args:
        candidates: each does its work once and returns the number of things done.
        repeats: timed rounds, after one that is not timed.

    Returns:
        For each candidate the median, lowest and highest rate, in things per second.
    """
    rates: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(repeats + 1):
        for name, work in candidates.items():
            start = time.perf_counter()
            done = work()
            if turn:  # the first round warms caches and allocators
                rates[name].append(done / (time.perf_counter() - start))
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in rates.items()
    }


def ratio(results: Mapping[str, Mapping[str, float]], one: str, other: str) -> float:
    """The ratio of the medians."""
    return results[one]["median"] / results[other]["median"]


def report(name: str, settings: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Print everything as one JSON document."""
    machine = {
        "processor": platform.processor() or platform.machine(),
        "processors": default_workers(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "mamldata": mamldata.__version__,
    }
    print(json.dumps({"benchmark": name, "machine": machine, "settings": settings, "results": results}, indent=2))
