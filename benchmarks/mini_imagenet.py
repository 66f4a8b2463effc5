"""MiniImagenet at full scale from synthetic images: time and peak memory of fetch and build, for each form.

Makes all 60,000 images of the genuine split files with random content, in the three forms in circulation: files with
MiniImagenet's names, ImageNet's tar of tars, and pickled arrays. The three banks must be equal, bit for bit.

    python benchmarks/mini_imagenet.py --csv FOLDER [--work FOLDER]
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import pickle
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import report
from PIL import Image

from mamldata.sampling.splits import SPLITS

SIDE = 84
FORMS = ("by-name", "by-position", "pickled-arrays")
PER_CLASS = 1300  # of ImageNet's images, as in most of its classes
# Runs the command line and prints its time, and the peak memory of itself and of its workers (Linux).
MEASURED = r"""\
import json, re, resource, sys, time
from pathlib import Path
from cli.main import main
start = time.perf_counter()
try:
    main(sys.argv[1:], standalone_mode=False)
finally:
    seconds = time.perf_counter() - start
    # Not ru_maxrss, which a process inherits from its parent.
    peak = int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(json.dumps({"seconds": round(seconds, 1), "peak_mib": round(peak), "worker_peak_mib": round(workers)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", type=Path, required=True, help="folder with the genuine split files")
    parser.add_argument("--work", type=Path, help="working folder, which is kept (default: a temporary folder)")
    parser.add_argument("--train", type=int, default=2000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        results: dict[str, Any] = {}
        for form in make(options.csv, work):
            results[form] = fetch_and_preprocess(form, options.csv, work)
        results |= build_and_verify(work / f"root-{FORMS[0]}", work, options.train)
    digests = {results[form]["bank_sha256"] for form in FORMS}
    settings = {"images": 60_000, "side": SIDE, "train": options.train, "val": 200, "test": 600}
    report("mini_imagenet", settings, {**results, "equal banks": len(digests) == 1})
    if len(digests) != 1:
        sys.exit("The banks differ.")


def fetch_and_preprocess(form: str, tables: Path, work: Path) -> dict[str, Any]:
    """Fetch the images in one form and make the bank; only the bank of the first form is kept."""
    root = ["--root", str(work / f"root-{form}")]
    place = ["--from", str(tables), "--from", str(work / form), "--offline"]
    fetched = command("fetch", "mini-imagenet", *place, *root)
    made = command("preview", "mini-imagenet", *root, "--out", str(work / f"{form}.png"))
    folder = work / f"root-{form}" / "mini-imagenet"
    description = json.loads((folder / f"mini-imagenet-{SIDE}.json").read_bytes())
    if form != FORMS[0]:
        shutil.rmtree(folder)
    return {"bank_sha256": description["sha256"], "fetch": fetched, "preprocess": made}


def build_and_verify(root: Path, work: Path, train: int) -> dict[str, Any]:
    """Build and verify 5-way archives of 1 and 5 shots."""
    steps = {}
    for k_shot in (1, 5):
        out = work / f"archive-{k_shot}"
        episodes = ["--train", str(train), "--val", "200", "--test", "600", "--k-shot", str(k_shot)]
        built = command("build", "mini-imagenet", "--out", str(out), "--root", str(root), *episodes)
        steps[f"5-way {k_shot}-shot"] = {"build": built, "verify": command("verify", str(out))}
        shutil.rmtree(out)
    return steps


def command(*arguments: str) -> dict[str, Any]:
    """Run the command line in a separate process."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def make(tables: Path, work: Path) -> Iterator[str]:
    """Make the images in each form, and yield its name."""
    started = time.perf_counter()
    rows = {split: list(csv.DictReader((tables / f"{split}.csv").open(newline=""))) for split in SPLITS}
    chance = np.random.default_rng(0)
    encoded = {row["filename"]: jpeg(chance) for split in SPLITS for row in rows[split]}
    print(f"made {len(encoded):,} images in {time.perf_counter() - started:.0f} s", file=sys.stderr)

    folder = work / "by-name" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in encoded.items():
        (folder / name).write_bytes(data)
    yield "by-name"
    (work / "by-position").mkdir(exist_ok=True)
    tar_of_tars(rows, encoded, work / "by-position" / "ILSVRC2012_img_train.tar")
    yield "by-position"
    (work / "pickled-arrays").mkdir(exist_ok=True)
    for split in SPLITS:
        cache(rows[split], encoded, work / "pickled-arrays" / f"mini-imagenet-cache-{split}.pkl")
    yield "pickled-arrays"


def jpeg(chance: np.random.Generator) -> bytes:
    """Smooth noise as a JPEG of about a photograph's size."""
    rough = Image.fromarray(chance.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    stream = io.BytesIO()
    rough.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def tar_of_tars(rows: dict[str, list[dict[str, str]]], encoded: dict[str, bytes], path: Path) -> None:
    """ImageNet's training set: a tar for each class, with gaps in the numbers of images, and fillers for the others."""
    classes: dict[str, dict[int, bytes]] = defaultdict(dict)
    for split in SPLITS:
        for row in rows[split]:
            classes[row["label"]][int(row["filename"][9:17])] = encoded[row["filename"]]
    filler = jpeg(np.random.default_rng(1))
    with tarfile.open(path, "w") as outer:
        for label in sorted(classes, key=lambda label: label[::-1]):  # in an unhelpful order
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as tar:
                for position in range(1, PER_CLASS + 1):
                    data = classes[label].get(position, filler)
                    member = tarfile.TarInfo(f"{label}_{7 * position}.JPEG")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
            member = tarfile.TarInfo(f"{label}.tar")
            member.size = inner.tell()
            inner.seek(0)
            outer.addfile(member, inner)


def cache(rows: list[dict[str, str]], encoded: dict[str, bytes], path: Path) -> None:
    """The pickle in circulation: all images of a split in one array, and each class's rows in it."""
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(encoded[row["filename"]]))) for row in rows])
    classes: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        classes[row["label"]].append(number)
    with path.open("wb") as stream:
        pickle.dump({"image_data": pixels, "class_dict": dict(classes)}, stream)


if __name__ == "__main__":
    main()
