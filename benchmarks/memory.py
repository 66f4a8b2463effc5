"""Peak memory of one meta-gradient by inner steps, with and without a checkpointed inner loop."""

from __future__ import annotations

import resource
import subprocess
import sys
from dataclasses import replace

import torch
from common import arguments, report
from train import made_up

from trainer.adapt import InnerLoop
from trainer.engines import loop
from trainer.models import build_network
from trainer.settings import pick_device

STEPS = (1, 5, 20, 100)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=1)
    parser.add_argument("--network", default="conv4")
    parser.add_argument("--meta-batch-size", type=int, default=2)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--one", nargs=2, metavar=("STEPS", "CHECKPOINT"), help="measure in this process")
    options = parser.parse_args()
    device = pick_device(options.device)
    if options.one:
        steps, checkpoint = map(int, options.one)
        print(peak(options.network, options.meta_batch_size, device, steps, checkpoint=bool(checkpoint)))
        return
    results = {}
    for steps in STEPS:
        for checkpoint in (0, 1):
            # A process keeps the most memory that it ever had: each measurement has one of its own.
            command = [sys.executable, __file__, *sys.argv[1:], "--one", str(steps), str(checkpoint)]
            values = [
                float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                for _ in range(options.repeats)
            ]
            name = f"{steps} inner steps{', checkpointed' if checkpoint else ''}"
            results[name] = {"lowest": min(values), "highest": max(values)}
    report(
        "memory",
        {
            "unit": "MiB above those of a process that has the network and its data",
            "episodes": "5-way 1-shot 15-query, 28x28, made up",
            "meta_batch_size": options.meta_batch_size,
            "network": options.network,
            "device": str(device),
            "torch": torch.__version__,
        },
        results,
    )


def peak(name: str, tasks: int, device: torch.device, steps: int, *, checkpoint: bool) -> float:
    """Of one second-order meta-gradient, in MiB."""
    torch.set_num_threads(1)
    batch = made_up(tasks, device)
    network = build_network(name, 1, 28, 5, seed=0).to(device)
    parameters = dict(network.named_parameters())
    inner = InnerLoop(steps, 0.01, "second", "transductive", checkpoint=checkpoint)
    if name == "conv4":  # it takes images of every size
        # Kernels that are loaded on first use are no part of the graph.
        small = batch._replace(support_x=batch.support_x[..., :4, :4], query_x=batch.query_x[..., :4, :4])
        loop(network, parameters, small, replace(inner, steps=1))
    before = _most(device)
    loop(network, parameters, batch, inner)
    return _most(device) - before


def _most(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 1 if sys.platform == "darwin" else 2**10  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


if __name__ == "__main__":
    main()
