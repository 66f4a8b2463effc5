"""Files from strangers: pickles, checkpoints, manifests, containers and images. Nothing runs, crashes or hangs."""

from __future__ import annotations

import codecs
import io
import os
import pickle
import random
import re
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mamldata.bank.decode import decode_image
from mamldata.datasets.load import load_manifest
from mamldata.errors import Fault
from mamldata.fetching.plan import plan
from mamldata.io.containers import IMAGE_FORMATS, list_members, read_members
from mamldata.io.content_digest import content_sha256
from mamldata.io.pickles import StoredArray, load_values
from mamldata.readers.image import ReaderRecipe, read_images
from mamldata.readers.index import index_images
from tests.mamldata.readers.test_arrays import python_2, write_tar
from tests.storm import material
from tests.storm.commands import mamldata, require_done
from tests.storm.damage import ODD_VALUES, damaged, edited
from tests.storm.harness import PROJECT, Broken, Campaign, Outcome, refused
from tests.storm.kills import train_words

# --- pickles

_PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 4, 3), dtype=np.uint8)
_QUIET = {"object.__getattr__", "object.__setattr__", "object.__delattr__", "sys._getframe"}
_watching: list[list[str]] = []


@cache
def _watch() -> None:
    for codec in ("raw_unicode_escape", "unicode_escape", "latin-1"):
        codecs.lookup(codec)  # which Python imports on first use

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if _watching and event not in _QUIET:
            _watching[-1].append(f"{event}{arguments!r:.200}")

    sys.addaudithook(hook)


@contextmanager
def nothing_runs() -> Iterator[None]:
    """Nothing inside may open, import, compile or start anything, as Python's audit hooks tell it.

    Raises:
        Broken: something did.
    """
    _watch()
    _watching.append([])
    try:
        yield
    finally:
        seen = _watching.pop()
    if seen:
        raise Broken(f"a pickle made it do {seen[:5]}")


class _Call:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


_CALLS = (
    _Call(os.system, "true"), _Call(eval, "1"), _Call(exec, "import os"), _Call(open, "/etc/passwd"),
    _Call(__import__, "os"),
    _Call(getattr, "x", "upper"), _Call(np.load, "/etc/passwd"), _Call(np.fromfile, "/etc/passwd"),
    _Call(bytearray, 10),
)  # fmt: skip
_PLAIN = (
    {"image_data": _PIXELS, "class_dict": {"n01": [0, 1, 2], "n02": [3, 4, 5]}},
    {"data": _PIXELS.reshape(6, 48), "fine_labels": [0, 1, 0, 1, 0, 1], "filenames": ["a", "b", "c", "d", "e", "f"]},
    {"labels": [0, 1, 1], "label_specific": list(np.arange(3)), "label_specific_str": ["x", "y", "z"]},
    [1, -1, 2**70, 1.5, True, None, "é", b"\xff" * 300, (1, (2, (3,))), {"a": {}}, np.arange(6).reshape(2, 3)],
)


@cache
def _pickles() -> tuple[bytes, ...]:
    every = [pickle.dumps(value, protocol) for value in _PLAIN for protocol in range(6)]
    return (*every, *(python_2(value) for value in _PLAIN[1:2]))


def _written(chance: random.Random) -> bytes:
    """A program of random instructions, many of which take what they find on the stack."""
    known = [
        getattr(pickle, name)[0:1]
        for name in pickle.__all__
        if name.isupper() and isinstance(getattr(pickle, name), bytes)
    ]
    pieces = [b"\x80" + bytes([chance.randrange(6)])]
    for _ in range(chance.randint(1, 60)):
        kind = chance.randrange(8)
        if kind < 4:
            pieces.append(chance.choice(known))
        elif kind == 4:
            pieces.append(
                chance.choice(
                    (
                        b"K\x01",
                        b"K\xff",
                        b"J\xff\xff\xff\xff",
                        b"U\x02u1",
                        b"C\x01x",
                        b"X\x01\0\0\0k",
                        b")",
                        b"]",
                        b"}",
                        b"(",
                    )
                )
            )
        elif kind == 5:
            module, name = chance.choice(
                (
                    ("os", "system"),
                    ("builtins", "eval"),
                    ("numpy", "dtype"),
                    ("numpy", "ndarray"),
                    ("_codecs", "encode"),
                    ("numpy.core.multiarray", "_reconstruct"),
                    ("numpy.core.multiarray", "scalar"),
                    ("numpy.core.numeric", "_frombuffer"),
                )
            )
            pieces.append(f"c{module}\n{name}\n".encode())
        elif kind == 6:
            pieces.append(b"(U\x04true" + chance.choice((b"tR", b"t\x81", b"o", b"tb")))
        else:
            pieces.append(chance.randbytes(chance.randint(1, 6)))
    return b"".join([*pieces, b"."])


def _hostile(chance: random.Random) -> bytes:
    value = edited([1, {"a": [2, "b"]}], chance)
    call = chance.choice(_CALLS)
    return pickle.dumps(
        chance.choice(({"image_data": _PIXELS, "class_dict": call}, [value, call], call, {"x": {"y": call}})),
        chance.randrange(6),
    )


def fuzzed_pickle(chance: random.Random, place: Path) -> Outcome:
    """A pickle gives plain values, or is refused; and nothing of it runs."""
    data = chance.choice(
        (lambda: damaged(chance.choice(_pickles()), chance), lambda: _written(chance), lambda: _hostile(chance))
    )()
    values: list[Any] = []
    stream = io.BytesIO(data)
    with nothing_runs():
        was_refused = refused(lambda: values.append(load_values(stream, "x.pkl")))
    for value in values:
        for array in _arrays(value):
            rows = array.shape[0] if array.shape else 0
            refused(lambda array=array, rows=rows: array.rows(stream, 0, min(rows, 10)))
    return "refused" if was_refused else "same"


def _arrays(value: Any, depth: int = 0) -> Iterator[StoredArray]:
    if isinstance(value, StoredArray) and value.shape:
        yield value
    elif isinstance(value, dict | list | tuple) and depth < 5:
        for inner in value.values() if isinstance(value, dict) else value[:100]:
            yield from _arrays(inner, depth + 1)


def fuzzed_arrays(chance: random.Random, place: Path) -> Outcome:
    """Datasets of pickled arrays, damaged or with odd values: images, or faults that are told."""
    kind = chance.choice(("cifar-100", "tiered-imagenet"))
    if kind == "cifar-100":
        values: dict[str, Any] = {
            "train": {
                "data": _PIXELS.reshape(6, 48).repeat(64, 1),
                "fine_labels": [0, 1] * 3,
                "filenames": list("abcdef"),
            },
            "test": {
                "data": _PIXELS.reshape(6, 48).repeat(64, 1),
                "fine_labels": [1, 0] * 3,
                "filenames": list("ghijkl"),
            },
            "meta": {"fine_label_names": ["x", "y"]},
        }
        name = chance.choice(sorted(values))
        values[name] = _odd(values[name], chance)
        files = {f"cifar-100-python/{key}": _pickled(value, chance) for key, value in values.items()}
    else:
        labels = {
            "label_specific": [0, 0, 1],
            "label_specific_str": ["x", "y"],
            "label_general": [0, 0, 0],
            "label_general_str": ["z"],
        }
        images = [np.frombuffer(encoded("PNG"), np.uint8) for _ in range(3)]
        files = {}
        for split in ("train", "val", "test"):
            files[f"{split}_labels.pkl"] = _pickled(_odd(labels, chance), chance)
            files[f"{split}_images_png.pkl"] = _pickled(_odd(images, chance), chance)
    if chance.random() < 0.4:
        name = chance.choice(sorted(files))
        files[name] = damaged(files[name], chance)
    path = write_tar(place / "x.tar", files, "w")
    faults: list[Fault] = []

    def read() -> None:
        index = index_images(ReaderRecipe(kind), [path])
        faults.extend(index.faults)
        for _, data in read_images(index.images):
            if not isinstance(data, str):
                with_errors(lambda data=data: decode_image(data, 8, 3, "lanczos", invert=False))

    return "refused" if refused(read) or faults else "same"


def _odd(value: Any, chance: random.Random) -> Any:
    """A value of a pickle with some part of it another one; arrays included."""
    if chance.random() < 0.3:
        return value
    if isinstance(value, dict):
        key = chance.choice(sorted(value))
        return {**value, key: _odd(value[key], chance) if chance.random() < 0.7 else chance.choice(ODD_VALUES)}
    if isinstance(value, np.ndarray):
        return chance.choice(
            (
                value[:0],
                value[0],
                value.reshape(-1),
                value.astype(np.int64),
                value[:, :1] if value.ndim > 1 else value,
                np.array(7),
            )
        )
    if isinstance(value, list) and value:
        at = chance.randrange(len(value))
        return [*value[:at], chance.choice((*ODD_VALUES, np.array(3), np.arange(3))), *value[at + 1 :]]
    return chance.choice(ODD_VALUES)


def _pickled(value: Any, chance: random.Random) -> bytes:
    return pickle.dumps(value, chance.choice((2, 4)))


def with_errors(act: Callable[[], Any]) -> bool:
    """Whether a call raised ValueError, as those of images do."""
    try:
        act()
    except ValueError:
        return True
    return False


# --- checkpoints


@cache
def _checkpoint() -> bytes:
    run = material.workplace() / "material" / "run"
    require_done(mamldata(*train_words(material.archive(), run)))
    return max(run.glob("*.pt")).read_bytes()


@cache
def _weights() -> Any:
    return _loaded(_checkpoint())


def _loaded(data: bytes) -> dict[str, Any]:
    import torch

    return dict(torch.load(io.BytesIO(data), weights_only=True))


def fuzzed_checkpoint(chance: random.Random, place: Path) -> Outcome:
    """A damaged checkpoint is refused or gives the true weights; a forged one is refused or read without a crash."""
    import torch

    from trainer.runs.checkpoint import load_checkpoint

    path = place / "maml_step4_acc0.5000.pt"
    forged = chance.random() < 0.5
    if forged:
        content = _loaded(_checkpoint())
        for _ in range(chance.choice((1, 1, 2))):
            _forge(content, chance)
        call = chance.random() < 0.1
        torch.save({**content, **({"x": chance.choice(_CALLS)} if call else {})}, path)
    else:
        path.write_bytes(damaged(_checkpoint(), chance))
    weights: list[dict[str, Any]] = []

    def load() -> None:
        checkpoint = load_checkpoint(path)
        network, _ = checkpoint.restored(path)
        assert checkpoint.name
        weights.append(dict(network.state_dict()))

    if refused(load):
        return "refused"
    true = _weights()["weights"]
    if not forged and any(not torch.equal(true[name], value) for name, value in weights[0].items()):
        raise Broken("a damaged checkpoint has other weights")
    return "same"


def _forge(content: dict[str, Any], chance: random.Random) -> None:
    """Change a field of a checkpoint, or a value in one."""
    import torch

    key = chance.choice(sorted(content))
    inner = content[key]
    if isinstance(inner, dict) and inner and chance.random() < 0.7:
        name = chance.choice(sorted(inner))
        inner[name] = chance.choice((*ODD_VALUES, torch.zeros(1), torch.tensor(float("nan")), {"a": torch.zeros(2)}))
    elif chance.random() < 0.2:
        del content[key]
    else:
        content[key] = chance.choice((*ODD_VALUES, torch.zeros(3)))


# --- manifests


@cache
def _manifests() -> tuple[str, ...]:
    own = [material.tiny().manifest_path.read_text(), (PROJECT / "examples" / "tiny-imagenet.toml").read_text()]
    return (*own, *(path.read_text() for path in sorted((PROJECT / "manifests").glob("*.toml"))))


_TOML = (
    "0", "-1", "1.5", "nan", "inf", "true", '""', '"x"', '"../x"', '"/etc/passwd"', "[]", "[1]", '["x"]', '[["x"]]',
    "{}", "{a = 1}",
    "1979-05-27", "07:32:00", '"\\u0000"', '"\\u001b[2J"', '"' + "a" * 5000 + '"', "9" * 30, "[" * 200 + "]" * 200,
    '"http://[::1"',
    '"pipe::x"', '"file:///etc/passwd"', '".."', '"."', '"a/b"', '"-x"', '"con"', "'''x\ny'''", '"é"',
)  # fmt: skip


def fuzzed_manifest(chance: random.Random, place: Path) -> Outcome:
    """A manifest has all its faults told, or is read, and then says what to fetch without touching a thing."""
    text = chance.choice(_manifests())
    lines = text.split("\n")
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(lines))
        match chance.randrange(5):
            case 0 | 1 | 2:
                lines[at] = re.sub(r"=\s*.*$", lambda _: f"= {chance.choice(_TOML)}", lines[at], count=1)
            case 3:
                lines[at] = chance.choice(
                    (
                        "",
                        lines[chance.randrange(len(lines))],
                        f"x = {chance.choice(_TOML)}",
                        "[splits.x]",
                        "[[files]]",
                        "[",
                    )
                )
            case _:
                del lines[at : at + 1]
                lines.append("")
    data = "\n".join(lines).encode()
    path = place / "tiny.toml"
    path.write_bytes(damaged(data, chance) if chance.random() < 0.2 else data)

    def read() -> None:
        manifest = load_manifest(str(path))
        plan(manifest, place / "root")

    outcome: Outcome = "refused" if refused(read) else "same"
    if {entry.name for entry in place.iterdir()} != {"tiny.toml"}:
        raise Broken("reading it wrote something")
    return outcome


# --- containers

_FILES = {
    f"x/{kind}/{number}.png": bytes([number]) * (50 * number) for kind in ("a", "b", "é") for number in range(1, 4)
}


@cache
def _containers() -> Mapping[str, bytes]:
    made = {}
    for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz"), ("tar.bz2", "w:bz2"), ("tar.xz", "w:xz")):
        for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            stream = io.BytesIO()
            with tarfile.open(fileobj=stream, mode=mode, format=form) as tar:
                for name, data in _FILES.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                link = tarfile.TarInfo("x/a/link.png")
                link.type, link.linkname = tarfile.SYMTYPE, "1.png"
                tar.addfile(link)
            made[f"{form}.{suffix}"] = stream.getvalue()
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as box:
            for name, data in _FILES.items():
                box.writestr(name, data)
        made[f"{method}.zip"] = stream.getvalue()
    return made


def fuzzed_container(chance: random.Random, place: Path) -> Outcome:
    """A damaged container is refused as a whole or in part; what of a zip is read has the right check sum."""
    name = chance.choice(sorted(_containers()))
    data = _containers()[name]
    for _ in range(chance.choice((1, 1, 3))):
        data = damaged(data, chance)
    path = place / name
    path.write_bytes(data)
    faults: list[str] = []

    def read() -> None:
        for member, content in read_members(path, list_members(path), 1 << 20):
            if isinstance(content, str):
                faults.append(content)
            elif name.endswith(".zip"):
                if content not in _FILES.values():
                    raise Broken(f"{member.name} has other bytes than any file")
            elif len(content) != member.size:
                raise Broken(f"{member.name} has {len(content)} bytes, not {member.size}")

    was_refused = refused(read)
    refused(lambda: content_sha256(path, 1 << 20))
    return "refused" if was_refused or faults else "same"


# --- images


@cache
def encoded(kind: str, mode: str = "RGB") -> bytes:
    """A small image."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (24, 24, 3), dtype=np.uint8)).convert(mode)
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


_MODES = {
    "PNG": ("RGB", "L", "P", "RGBA", "1", "I;16"), "JPEG": ("RGB", "L", "CMYK"), "PPM": ("RGB", "L", "1"),
    "BMP": ("RGB", "L", "P"),
    "GIF": ("P", "L"), "WEBP": ("RGB", "RGBA"), "TIFF": ("RGB", "L", "1", "RGBA"),
}  # fmt: skip


def fuzzed_image(chance: random.Random, place: Path) -> Outcome:
    """A damaged image becomes pixels of the right shape, or is refused; and it opens or starts nothing."""
    kind = chance.choice(sorted(IMAGE_FORMATS))
    data = encoded(kind, chance.choice(_MODES[kind]))
    for _ in range(chance.choice((1, 1, 3))):
        data = damaged(data, chance)
    size, channels = chance.choice((1, 8, 20)), chance.choice((1, 3))
    found: list[Any] = []
    upright = chance.random() < 0.5
    if with_errors(lambda: found.append(decode_image(data, size, channels, "lanczos", invert=False, upright=upright))):
        return "refused"
    if found[0].shape != (size, size, channels) or found[0].dtype != np.uint8:
        raise Broken(f"pixels of shape {found[0].shape} and {found[0].dtype}")
    return "same"


CAMPAIGNS = (
    Campaign("pickles", "pickles: damaged, of random instructions, or with calls in them", 10_000, fuzzed_pickle, 30),
    Campaign(
        "arrays", "CIFAR-100 and tieredImageNet with damaged pickles or odd values in them", 5000, fuzzed_arrays, 30
    ),
    Campaign("checkpoints", "checkpoints: damaged, or with odd values in them", 5000, fuzzed_checkpoint, 30),
    Campaign("manifests", "manifests with odd values, lines and bytes", 10_000, fuzzed_manifest, 30),
    Campaign("containers", "tars, compressed or not, and zips: damaged", 10_000, fuzzed_container, 30),
    Campaign("images", "images of all formats and modes: damaged", 10_000, fuzzed_image, 30),
)
