"""Outer steps a second on made-up episodes of Omniglot's shape: orders and inner steps, in turn."""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import arguments, in_turn, report

from mamldata.batch import EpisodeBatch
from trainer.adapt import InnerLoop
from trainer.allocator import keep_large_buffers
from trainer.engines import loop
from trainer.models import build_network
from trainer.settings import pick_device


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=5)
    parser.add_argument("--network", default="conv4")
    parser.add_argument("--meta-batch-size", type=int, default=16)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    keep_large_buffers()
    batch = made_up(options.meta_batch_size, device)
    network = build_network(options.network, 1, 28, 5, seed=0).to(device)
    parameters = dict(network.named_parameters())

    def step(inner: InnerLoop) -> Callable[[], int]:
        def work() -> int:
            outcome = loop(network, parameters, batch, inner)
            return 1 if float(outcome.loss) >= 0 else 0  # waits for the device

        return work

    candidates = {
        f"{name}, {steps} inner step{'s' if steps > 1 else ''}": step(InnerLoop(steps, 0.4, order, "transductive"))
        for steps in (1, 5)
        for name, order in (("maml", "second"), ("fomaml", "first"))
    }
    results = in_turn(candidates, options.repeats)
    report(
        "train",
        {
            "unit": "outer steps/s",
            "episodes": "5-way 1-shot 15-query, 28x28, made up",
            "meta_batch_size": options.meta_batch_size,
            "network": options.network,
            "device": str(device),
            "torch": torch.__version__,
        },
        results,
    )


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
