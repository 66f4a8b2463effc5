"""Prototypical networks (Snell et al. 2017) in plain PyTorch, on the episodes of an archive.

python examples/plain_loop.py ARCHIVE
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mamldata

EPOCHS, TASKS = 3, 4


def block(inputs: int, outputs: int) -> nn.Module:
    """A block that halves width and height."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU(), nn.MaxPool2d(2))


def score(net: nn.Module, batch: mamldata.EpisodeBatch, n_way: int) -> tuple[Tensor, Tensor]:
    """Loss and accuracy, where each query image gets the class with the nearest mean of support embeddings."""
    tasks = len(batch.index)
    # Images of one class are adjacent, so a reshape groups them.
    support = net(batch.support_x.flatten(0, 1)).reshape(tasks, n_way, -1, 64).mean(2)
    query = net(batch.query_x.flatten(0, 1)).reshape(tasks, -1, 64)
    logits = -torch.cdist(query, support).square().flatten(0, 1)
    labels = batch.query_y.flatten()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


if __name__ == "__main__":
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    stream = mamldata.EpisodeStream(sys.argv[1], batch_size=TASKS, seed=0, remix=True)
    n_way, channels = stream.info.n_way, stream.info.image_shape[-1]
    net = nn.Sequential(block(channels, 64), block(64, 64), block(64, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    net.to(device)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for epoch in range(EPOCHS):
        for batch in stream.to(device):  # an epoch, of new episodes each time
            optimizer.zero_grad()
            loss, accuracy = score(net, batch, n_way)
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}, last meta-batch: loss {loss:.3f}, accuracy {accuracy:.3f}")
    net.eval()
    with torch.no_grad():
        test = mamldata.EpisodeStream(sys.argv[1], split="test").to(device)  # every episode once, in order
        rates = torch.stack([score(net, episode, n_way)[1] for episode in test])
    print(f"test accuracy {rates.mean():.3f} ± {1.96 * rates.std() / len(rates) ** 0.5:.3f} ({len(rates)} episodes)")
