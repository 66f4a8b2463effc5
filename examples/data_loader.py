"""An archive in torch's DataLoader, with worker processes, and an interruption in the middle of an epoch.

python examples/data_loader.py ARCHIVE
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader

import mamldata

if __name__ == "__main__":
    stream = mamldata.EpisodeStream(sys.argv[1], batch_size=4, seed=0)
    # The stream makes meta-batches itself: batch_size=None tells the DataLoader to leave them as they are.
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    for epoch in range(2):
        stream.set_epoch(epoch)  # workers iterate over copies, so the order of an epoch must be asked for
        for batch in loader:
            indices = batch.index.tolist()
            print(f"epoch {epoch}: episodes {indices}, support {tuple(batch.support_x.shape)}")

    # Without workers the stream knows where it stands, and the rest of an epoch can be had in another process.
    stream.set_epoch(0)
    seen = [next(iter(stream)).index]
    again = mamldata.EpisodeStream(sys.argv[1], batch_size=4, seed=0)
    again.load_state_dict(stream.state_dict())
    seen += [batch.index for batch in again]
    print(f"epoch 0 in two parts: {torch.cat(seen).tolist()}")
