"""Read an archive by torch's DataLoader with worker processes, and resume in the middle of an epoch.

python examples/data_loader.py ARCHIVE
"""

from __future__ import annotations

import sys

import torch
from torch.utils.data import DataLoader

import mamldata

if __name__ == "__main__":
    stream = mamldata.EpisodeStream(sys.argv[1], batch_size=4, seed=0)
    # The stream makes the meta-batches: batch_size=None tells the DataLoader not to batch.
    loader = DataLoader(stream, batch_size=None, num_workers=2)
    for epoch in range(2):
        stream.set_epoch(epoch)  # needed because workers iterate over copies of the stream
        for batch in loader:
            indices = batch.index.tolist()
            print(f"epoch {epoch}: episodes {indices}, support {tuple(batch.support_x.shape)}")

    # Without workers the stream knows its position, and another process can read the rest of an epoch.
    stream.set_epoch(0)
    seen = [next(iter(stream)).index]
    again = mamldata.EpisodeStream(sys.argv[1], batch_size=4, seed=0)
    again.load_state_dict(stream.state_dict())
    seen += [batch.index for batch in again]
    print(f"epoch 0 in two parts: {torch.cat(seen).tolist()}")
