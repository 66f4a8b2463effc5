"""Outer steps a second on made-up episodes of Omniglot's shape: engines, orders and inner steps, in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import pairwise

import torch
from common import arguments, in_turn, report
from torch import nn
from torch.nn import functional as F

from mamldata.batch import EpisodeBatch
from mamldata.errors import RequestError
from trainer.adapt import InnerLoop
from trainer.allocator import keep_large_buffers
from trainer.engines import Engine, pick_engine
from trainer.models import build_network
from trainer.settings import pick_device

ORDERS = {"maml": "second", "fomaml": "first"}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=5)
    parser.add_argument("--network", default="conv4")
    parser.add_argument("--meta-batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--inner-steps", type=int, nargs="+", default=[1, 5])
    options = parser.parse_args()
    device = pick_device(options.device)
    keep_large_buffers()
    batch = made_up(options.meta_batch_size, device)
    network = build_network(options.network, 1, 28, 5, seed=0).to(device)
    parameters = dict(network.named_parameters())

    def step(engine: Engine, inner: InnerLoop) -> Callable[[], int]:
        def work() -> int:
            outcome = engine(network, parameters, batch, inner)
            return 1 if float(outcome.loss) >= 0 else 0  # waits for the device

        return work

    candidates = {}
    for steps in options.inner_steps:
        for algorithm, order in ORDERS.items():
            what = f"{algorithm}, {steps} inner step{'s' if steps > 1 else ''}"
            for name, engine in engines().items():
                candidates[f"{what}, {name}"] = step(engine, InnerLoop(steps, 0.4, order, "transductive"))
            candidates[f"{what}, plain example"] = plain_example(batch, steps, 0.4, second=order == "second")
    results = in_turn(candidates, options.repeats)
    report(
        "train",
        {
            "unit": "outer steps/s",
            "episodes": "5-way 1-shot 15-query, 28x28, made up",
            "meta_batch_size": options.meta_batch_size,
            "network": f"{options.network}; the plain example has conv4 as torch's own layers",
            "device": str(device),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
        results,
    )


def engines() -> dict[str, Engine]:
    """Those that are installed."""
    found = {}
    for name in ("loop", "vmap", "higher"):
        try:
            found[name] = pick_engine(name)
        except RequestError as missing:
            print(f"left out: {missing}", file=sys.stderr)
    return found


def plain_example(batch: EpisodeBatch, steps: int, lr: float, *, second: bool) -> Callable[[], int]:
    """A step as tutorials write it: torch's layers, ``functional_call``, and one backward pass for all tasks."""
    widths = [1, 64, 64, 64, 64]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)]
        layers += [nn.BatchNorm2d(outputs, track_running_stats=False), nn.ReLU()]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5)]
    network = nn.Sequential(*layers).to(batch.support_x.device)
    start = dict(network.named_parameters())

    def work() -> int:
        losses = []
        for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
            fast = start
            for _ in range(steps):
                loss = F.cross_entropy(torch.func.functional_call(network, fast, (support_x,)), support_y)
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=second)
                fast = {name: value - lr * slope for (name, value), slope in zip(fast.items(), slopes, strict=True)}
            losses.append(F.cross_entropy(torch.func.functional_call(network, fast, (query_x,)), query_y))
        network.zero_grad()
        whole = torch.stack(losses).mean()
        whole.backward()
        return 1 if float(whole.detach()) >= 0 else 0

    return work


def made_up(episodes: int, device: torch.device) -> EpisodeBatch:
    """Random episodes with the memory layout of a stream's."""
    generator = torch.Generator().manual_seed(0)
    images = [
        torch.rand(episodes, 5 * k, 28, 28, 1, generator=generator).permute(0, 1, 4, 2, 3).to(device) for k in (1, 15)
    ]
    labels = [torch.arange(5).repeat_interleave(k).repeat(episodes, 1).to(device) for k in (1, 15)]
    return EpisodeBatch(images[0], labels[0], images[1], labels[1], torch.arange(episodes))


if __name__ == "__main__":
    main()
