"""Prototypical networks (Snell et al. 2017) in Lightning, on the episodes of an archive.

python examples/lightning_loop.py ARCHIVE
"""

from __future__ import annotations

import sys

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mamldata


class ProtoNet(lightning.LightningModule):
    """Assigns each query image to the class with the nearest mean of support embeddings."""

    def __init__(self, channels: int, n_way: int) -> None:
        super().__init__()
        self.n_way = n_way
        blocks = [
            nn.Sequential(nn.Conv2d(inputs, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2))
            for inputs in (channels, 64, 64)
        ]
        self.net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def training_step(self, batch: mamldata.EpisodeBatch) -> Tensor:
        """The loss of a meta-batch."""
        return self._score("train", batch)

    def test_step(self, batch: mamldata.EpisodeBatch) -> None:
        """The accuracy of one episode; Lightning logs the mean over all."""
        self._score("test", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=1e-3)

    def _score(self, split: str, batch: mamldata.EpisodeBatch) -> Tensor:
        tasks, labels = len(batch.index), batch.query_y.flatten()
        # Images of one class are adjacent, so a reshape groups them.
        support = self.net(batch.support_x.flatten(0, 1)).reshape(tasks, self.n_way, -1, 64).mean(2)
        query = self.net(batch.query_x.flatten(0, 1)).reshape(tasks, -1, 64)
        logits = -torch.cdist(query, support).square().flatten(0, 1)
        self.log(f"{split}_accuracy", (logits.argmax(1) == labels).float().mean(), prog_bar=True, batch_size=tasks)
        return F.cross_entropy(logits, labels)


if __name__ == "__main__":
    lightning.seed_everything(0)
    # A stream is an iterable with a length and a state: Lightning uses it directly, and saves its position.
    train = mamldata.EpisodeStream(sys.argv[1], batch_size=4, seed=0)
    test = mamldata.EpisodeStream(sys.argv[1], split="test")
    model = ProtoNet(train.info.image_shape[-1], train.info.n_way)
    trainer = lightning.Trainer(max_epochs=3, logger=False)
    trainer.fit(model, train)
    trainer.test(model, test)
