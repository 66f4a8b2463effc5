"""What normalizes the images of ``mamldata predict``: the accuracy of each way, and how long an answer takes.

    python benchmarks/predict.py RUN omniglot --root ROOT

Prints JSON: for live test episodes of the run's ways, shots and queries the accuracy in percent with its 95 % interval,
if all query images are given together (as in evaluation), if each is normalized by the support set (the default of
``predict``), and if the images of one class, or a single image, are normalized by themselves; and the milliseconds that
adapting and then one answer take.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch

import mamldata
import trainer
from trainer.intervals import half_width


def main() -> None:
    """Measure and print."""
    options = argparse.ArgumentParser()
    options.add_argument("run")
    options.add_argument("dataset")
    options.add_argument("--root")
    options.add_argument("--episodes", type=int, default=300)
    given = options.parse_args()
    run = trainer.load_run(given.run)
    numbers = {name: run.data[name] for name in ("n_way", "k_shot", "k_query")}
    source = mamldata.live(given.dataset, "test", root=given.root, **numbers)
    shares: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {"adapt": [], "answer": []}
    stream = mamldata.EpisodeStream(source.view(given.episodes), batch_size=1, shuffle=False, dtype=torch.uint8)
    for batch in stream:
        support, query = (part[0].permute(0, 2, 3, 1) for part in (batch.support_x, batch.query_x))
        labels, true = batch.support_y[0], batch.query_y[0]
        begun = time.perf_counter()
        adapted = run.adapt(support, labels)
        seconds["adapt"].append(time.perf_counter() - begun)
        begun = time.perf_counter()
        adapted(query[:1])
        seconds["answer"].append(time.perf_counter() - begun)
        ways = {
            "all together": adapted(query, together=True),
            "by the support set": adapted(query),
            "one class together": torch.cat([adapted(query[true == way], together=True) for way in true.unique()]),
            "one image by itself": torch.cat([adapted(query[i : i + 1], together=True) for i in range(len(query))]),
        }
        for name, logits in ways.items():
            shares.setdefault(name, []).append((logits.argmax(1) == true).float().mean().item())
    found = {
        name: f"{100 * np.mean(some):.2f} ± {100 * half_width(np.std(some, ddof=1).item(), len(some)):.2f}"
        for name, some in shares.items()
    }
    medians = {f"{name}_ms": round(1000 * float(np.median(some)), 2) for name, some in seconds.items()}
    print(json.dumps({"episodes": given.episodes, "accuracy_percent": found, **medians}, indent=2))


if __name__ == "__main__":
    main()
