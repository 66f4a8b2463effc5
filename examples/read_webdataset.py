"""Read an archive with webdataset alone, without mamldata: its shards are ordinary webdataset shards.

python examples/read_webdataset.py ARCHIVE
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import webdataset

if __name__ == "__main__":
    shards = sorted(str(path) for path in Path(sys.argv[1]).glob("train-*.tar"))
    for episode in webdataset.WebDataset(shards, shardshuffle=False).decode():
        support, query = episode["support.npy"], episode["query.npy"]  # uint8 [n_way, k, H, W, C]
        n_way, k_shot, *image = support.shape
        x, y = support.reshape(-1, *image), np.arange(n_way).repeat(k_shot)  # the label is the index on the first axis
        print(f"episode {episode['__key__']}: support {x.shape}, labels {y.tolist()}, query {query.shape}")
