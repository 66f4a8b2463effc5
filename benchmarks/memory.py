"""Peak memory of one meta-gradient by number of inner steps, with and without a checkpointed inner loop."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import arguments, report
from train import made_up

from trainer.maml.algorithms import InnerLoop
from trainer.maml.engines import loop
from trainer.maml.parameters import MetaParameters
from trainer.maml.variants import method_of
from trainer.networks.networks import build_network
from trainer.reports.costs import most_memory
from trainer.settings import pick_device
from trainer.system.malloc import keep_large_buffers


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=1)
    parser.add_argument("--network", default="conv4")
    parser.add_argument("--meta-batch-size", type=int, default=2)
    parser.add_argument("--image", type=int, nargs=2, default=[28, 1], metavar=("SIZE", "CHANNELS"))
    parser.add_argument("--episode", type=int, nargs=3, default=[5, 1, 15], metavar=("N_WAY", "K_SHOT", "K_QUERY"))
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5, 20, 100])
    parser.add_argument("--checkpoint", type=int, nargs="+", default=[0, 1], choices=[0, 1])
    parser.add_argument("--threads", type=int, default=1, help="each holds the graph of one task (default: 1)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs the extra plots)")
    parser.add_argument("--one", type=int, nargs=2, metavar=("STEPS", "CHECKPOINT"), help="measure in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(peak(options, *options.one)))
        return
    results: dict[str, dict[str, float]] = {}
    lines: dict[str, dict[int, float]] = {}
    for checkpoint in options.checkpoint:
        for steps in options.inner_steps:
            # A process keeps its peak memory, so each measurement runs in a new one.
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(steps), str(checkpoint)]
            runs = [
                json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
                for _ in range(options.repeats)
            ]
            kind = "checkpointed" if checkpoint else "as it is"
            results[f"{steps} inner steps, {kind}"] = min(runs, key=lambda run: run["graph_mib"])
            lines.setdefault(kind, {})[steps] = results[f"{steps} inner steps, {kind}"]["graph_mib"]
    size, channels = options.image
    n_way, k_shot, k_query = options.episode
    shape = f"{size}x{size}x{channels}"
    report(
        "memory",
        {
            "graph_mib": "above those of a process that has the network and its data",
            "process_mib": "all that the process had at its peak; on a GPU all that torch had there",
            "episodes": f"{n_way}-way {k_shot}-shot {k_query}-query, {shape}, made up",
            "meta_batch_size": options.meta_batch_size,
            "network": options.network,
            "device": options.device,
            "threads": options.threads,
            "torch": torch.__version__,
        },
        results,
    )
    if options.plot:
        draw(
            lines, options.plot, f"{options.network}, {n_way}-way {k_shot}-shot, {size}x{size}x{channels}, second order"
        )


def peak(options: argparse.Namespace, steps: int, checkpoint: int) -> dict[str, float]:
    """Peak memory of one second-order meta-gradient in MiB, and its time in seconds."""
    torch.set_num_threads(options.threads)
    keep_large_buffers()
    device = pick_device(options.device)
    size, channels = options.image
    n_way, k_shot, k_query = options.episode
    batch = made_up(options.meta_batch_size, device, (size, size, channels), n_way, (k_shot, k_query))
    network = build_network(options.network, channels, size, n_way, seed=0).to(device)
    parameters = MetaParameters(dict(network.named_parameters()))
    inner = InnerLoop(steps, 0.01, "second", "transductive", checkpoint=bool(checkpoint))
    if options.network in {"conv4", "resnet18"}:  # they take images of any size
        # Kernels that are loaded on first use do not belong to the graph.
        small = batch._replace(support_x=batch.support_x[..., :4, :4], query_x=batch.query_x[..., :4, :4])
        loop(network, parameters, small, method_of(network, replace(inner, steps=1)))
    before, start = most_memory(device), time.perf_counter()
    loop(network, parameters, batch, method_of(network, inner))
    after = most_memory(device)
    return {"graph_mib": (after - before) / 2**20, "process_mib": after / 2**20, "seconds": time.perf_counter() - start}


def draw(lines: dict[str, dict[int, float]], path: Path, title: str) -> None:
    """Plot memory by inner steps, with a line for each kind and a label at each point."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    labels = {"as it is": "as it is", "checkpointed": "--checkpoint-inner"}
    for (kind, points), colour, up in zip(lines.items(), ("tab:red", "tab:blue"), (True, False), strict=False):
        axes.plot(list(points), list(points.values()), "o-", color=colour, label=labels[kind])
        for steps, value in points.items():
            place = (0, 7 if up else -15)
            axes.annotate(f"{value:.0f}", (steps, value), place, textcoords="offset points", ha="center", color=colour)
    axes.set(xscale="log", xlabel="inner steps", ylabel="peak memory of a meta-gradient, MiB", title=title)
    steps_shown = sorted({steps for points in lines.values() for steps in points})
    axes.set_xticks(steps_shown, [str(steps) for steps in steps_shown])
    axes.minorticks_off()
    axes.set_ylim(0, 1.12 * max(value for points in lines.values() for value in points.values()))
    axes.margins(x=0.08)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
