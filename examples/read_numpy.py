"""Read and verify an archive with the standard library and NumPy alone, without mamldata.

python examples/read_numpy.py ARCHIVE
"""

from __future__ import annotations

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import numpy as np

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    text = (folder / "archive.json").read_bytes()
    about = json.loads(text)
    print(f"digest sha256:{hashlib.sha256(text).hexdigest()}")  # for citing; it covers the shards' digests
    print(f"{about['dataset']}, {about['n_way']}-way {about['k_shot']}-shot, split scheme {about['split_scheme']}")
    for split, part in about["splits"].items():
        names = [f"{one['name']}, {90 * one['quarter_turns']} degrees" for one in part["classes"]]
        for shard in part["shards"]:
            data = (folder / shard["file"]).read_bytes()
            if hashlib.sha256(data).hexdigest() != shard["sha256"]:
                sys.exit(f"{shard['file']} is damaged")
            with tarfile.open(fileobj=io.BytesIO(data)) as tar:
                places = {member.name: slice(member.offset_data, member.offset_data + member.size) for member in tar}
            arrays = {name: np.load(io.BytesIO(data[place])) for name, place in places.items()}
            for index in range(shard["first_episode"], shard["first_episode"] + shard["episodes"]):
                parts = [arrays[f"{index:08d}.{name}.npy"] for name in ("support", "query", "source")]
                support, query, source = parts  # uint8 [n_way, k, H, W, C] twice; int32 [n_way, 1 + k_shot + k_query]
                classes = [names[row] for row in source[:, 0]]  # of the labels 0, 1, ...
                print(f"{split} episode {index}: support {support.shape}, query {query.shape}, {'; '.join(classes)}")
