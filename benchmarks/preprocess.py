"""Images per second from raw files to a bank, against decoding with Pillow alone; one process and one per core."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from common import arguments, in_turn, ratio, raw, report

from mamldata.bank.decode import decode_image
from mamldata.bank.make import make_bank
from mamldata.datasets.manifest import ImageRecipe
from mamldata.parallel import default_workers
from mamldata.readers.image import ImageRef, read_images
from mamldata.readers.index import index_images


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=3)
    options = parser.parse_args()
    manifest, root = raw(options)
    folder = manifest.home(root)
    index = index_images(manifest.reader, [folder.raw / name for name in manifest.raw_names])
    recipe = manifest.image

    def pillow(processes: int) -> int:
        shares = [index.images[start::processes] for start in range(processes)]
        if processes == 1:
            return decode_all(shares[0], recipe)
        with ProcessPoolExecutor(processes) as pool:
            return sum(pool.map(decode_all, shares, [recipe] * processes))

    def whole(workers: int) -> int:
        with tempfile.TemporaryDirectory() as place:
            copy = manifest.home(Path(place))
            shutil.copytree(folder.raw, copy.raw)
            return make_bank(manifest, Path(place), workers=workers).shape[0]

    workers = default_workers()
    results = in_turn(
        {
            "pillow, 1 process": lambda: pillow(1),
            f"pillow, {workers} processes": lambda: pillow(workers),
            "bank, 1 worker": lambda: whole(1),
            f"bank, {workers} workers": lambda: whole(workers),
        },
        options.repeats,
    )
    ratios = {
        "1": ratio(results, "bank, 1 worker", "pillow, 1 process"),
        f"{workers}": ratio(results, f"bank, {workers} workers", f"pillow, {workers} processes"),
    }
    report(
        "preprocess",
        {"dataset": manifest.name, "unit": "images/s", "images": len(index.images), "size": recipe.size},
        {**results, "bank over pillow": ratios},
    )


def decode_all(images: Sequence[ImageRef], recipe: ImageRecipe) -> int:
    """Read and decode images with Pillow alone, keeping none; returns their number."""
    for _, data in read_images(images):
        assert not isinstance(data, str)
        decode_image(data, recipe.size, recipe.channels, recipe.resampling, recipe.invert, recipe.upright)
    return len(images)


if __name__ == "__main__":
    main()
