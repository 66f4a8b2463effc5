"""MAML by the package higher on the episodes of an archive, with the usual network, optimizers and loop.

python examples/higher_loop.py ARCHIVE

Users of learn2learn change the same lines: a stream gives support and query sets, and replaces ``taskset.sample()`` and
the division of its images; ``maml.clone()`` and ``learner.adapt(loss)`` stay the same.
"""

from __future__ import annotations

import sys

import higher
import torch
from torch import nn
from torch.nn import functional as F

import mamldata

EPOCHS, TASKS, INNER_STEPS, INNER_LR = 3, 4, 5, 0.1


def block(inputs: int) -> nn.Module:
    """Convolution, batch norm and ReLU, without running statistics, so that no episode affects the next one."""
    norm = nn.BatchNorm2d(64, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(inputs, 64, 3, stride=2, padding=1), norm, nn.ReLU())


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = mamldata.EpisodeStream(sys.argv[1], batch_size=TASKS, seed=0)
    blocks = [block(stream.info.image_shape[-1]), block(64), block(64)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, stream.info.n_way)).to(device)
    outer = torch.optim.Adam(net.parameters(), lr=1e-3)
    inner = torch.optim.SGD(net.parameters(), lr=INNER_LR)
    for epoch in range(EPOCHS):
        right = []
        for batch in stream.to(device):
            outer.zero_grad()
            for support_x, support_y, query_x, query_y in zip(*batch[:4], strict=True):
                with higher.innerloop_ctx(net, inner, copy_initial_weights=False) as (adapted, descent):
                    for _ in range(INNER_STEPS):
                        descent.step(F.cross_entropy(adapted(support_x), support_y))
                    logits = adapted(query_x)
                    (F.cross_entropy(logits, query_y) / TASKS).backward()  # through the inner steps
                    right.append((logits.argmax(1) == query_y).float().mean())
            outer.step()
        print(f"epoch {epoch}: accuracy {torch.stack(right).mean():.3f}")
