"""Images a second from raw files to a bank, with one worker and with all; against decoding with Pillow alone."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from common import arguments, in_turn, ratio, raw, report

from mamldata.bank import decode_image, make_bank
from mamldata.parallel import default_workers
from mamldata.readers import index_images, read_members


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.set_defaults(repeats=3)
    options = parser.parse_args()
    manifest, root = raw(options)
    folder = manifest.home(root)
    index = index_images(manifest.reader, [folder.raw / file.name for file in manifest.files])
    recipe = manifest.image

    def pillow() -> int:
        for data in read_members(index.images):
            decode_image(data, recipe.size, recipe.channels, recipe.resampling, recipe.invert)
        return len(index.images)

    def whole(workers: int) -> int:
        with tempfile.TemporaryDirectory() as place:
            copy = manifest.home(Path(place))
            shutil.copytree(folder.raw, copy.raw)
            return make_bank(manifest, Path(place), workers=workers).shape[0]

    workers = default_workers()
    results = in_turn(
        {
            "pillow, one process": pillow,
            "bank, 1 worker": lambda: whole(1),
            f"bank, {workers} workers": lambda: whole(workers),
        },
        options.repeats,
    )
    report(
        "preprocess",
        {"dataset": manifest.name, "unit": "images/s", "images": len(index.images), "size": recipe.size},
        {**results, "workers over pillow": ratio(results, f"bank, {workers} workers", "pillow, one process")},
    )


if __name__ == "__main__":
    main()
