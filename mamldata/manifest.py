"""Manifests: what a dataset is made of, as data.

A manifest is a TOML file, read and checked as a whole: every fault is reported at once, with its place. The
built-in ones come with the package; a user's own is given by its path and has the same rights.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mamldata.digest import sha256_bytes
from mamldata.errors import Fault, ManifestError, RequestError
from mamldata.files import MOST_NOTE, MOST_TEXT, read_whole
from mamldata.root import DatasetFolder

FORMAT = "mamldata-manifest/1"
COLLECTED = "images.tar"  # what an ImageCollection becomes under raw/
PIN = "images.json"  # what was collected first
SPLITS = ("train", "val", "test")
ROTATIONS = ("all", "train", "none")
RESAMPLINGS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
GENERATORS = ("glyphs",)
READERS: Mapping[str, tuple[str, ...]] = {  # reader: its options
    "class-folders": ("depth", "splits", "damaged"),
    "csv-splits": ("damaged",),
    "cifar-100": (),
    "tiered-imagenet": (),
}
DAMAGED = ("fail", "leave-out")
FORMS: Mapping[str, tuple[str, ...]] = {  # form in which a user may have images: its options
    "by-name": (),
    "by-position": ("container", "digits"),
    "pickled-arrays": ("files",),
}


@dataclass(frozen=True)
class SourceFile:
    """One raw file: where it is had from and how it is known to be the right one.

    Attributes:
        name: its file name under ``raw/``.
        bytes: its length; 0 where it is not published, which may only be of a file without addresses.
        sha256: the digest of its bytes, in hex; None where only an MD5 is published.
        urls: mirrors, tried in turn; empty for a generated file, and for one that must be got by hand.
        how: how to get it by hand.
        content_sha256: the digest of a zip's or tar's members (see ``mamldata.digest.content_sha256``), so that a
            repacked container with genuine members is accepted too.
        content_bytes: what the members unpack to, in bytes: the bound on reading a repacked container.
        generator: the name of the program that draws the file, for embedded datasets.
        md5: the MD5 of its bytes, in hex; only where there is no SHA-256.
    """

    name: str
    bytes: int
    sha256: str | None
    urls: tuple[str, ...] = ()
    content_sha256: str | None = None
    content_bytes: int | None = None
    generator: str | None = None
    md5: str | None = None
    how: str = ""


@dataclass(frozen=True)
class ImageForm:
    """One form in which users have the images of a dataset; ``mamldata.collect`` reads them.

    Attributes:
        type: ``by-name``: files with the dataset's own names, in a folder, zip or tar. ``by-position``: the last
            ``digits`` digits of a name are the image's position in the sorted list of its class, from 1, in folders
            or tars named after the classes, or in one tar of such tars. ``pickled-arrays``: a pickle for each split
            with ``image_data`` and ``class_dict``.
        container: the name of the tar of tars.
        digits: of the position.
        files: for each split the names that its pickle may have.
    """

    type: str
    container: str = ""
    digits: int = 0
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class ImageCollection:
    """Images of which no hash is published: got from a place that the user names, checked, and pinned.

    Attributes:
        forms: in which they may be there, tried in turn.
        how: how to get them by hand.
        content_sha256: the content digest of the collected images, where it is known.
    """

    forms: tuple[ImageForm, ...]
    how: str
    content_sha256: str | None = None


@dataclass(frozen=True)
class ReaderRecipe:
    """Which reader finds the images in the raw files.

    Attributes:
        type: ``class-folders``: every image lies in a folder named after its class. ``csv-splits``: ``train.csv``,
            ``val.csv`` and ``test.csv`` name images and classes. ``cifar-100`` and ``tiered-imagenet``: their pickles.
        depth: how many path components above the image name its class; 0 for all of them.
        splits: whether the component above those is the split.
        damaged: ``fail``, or ``leave-out`` images that are missing or cannot be read; the bank's JSON lists them.
    """

    type: str
    depth: int = 1
    splits: bool = False
    damaged: str = "fail"

    def fatal(self, faults: Iterable[Fault]) -> list[Fault]:
        """Those that cannot be passed over by leaving images out."""
        return [fault for fault in faults if not (fault.of_one_image and self.damaged == "leave-out")]


@dataclass(frozen=True)
class ImageRecipe:
    """How a raw image becomes an image of the bank, in this order: upright, channels, resize, invert.

    Attributes:
        size: default height and width in pixels.
        channels: 1 (grey) or 3 (RGB).
        resampling: a Pillow filter's name.
        invert: replace each value v by 255 - v, so that ink is 255 and paper 0.
        upright: turn photographs as their camera noted (EXIF); published datasets were made without.
        bank_sha256: for each image size whose bank is known, its digest: a machine that makes
            other pixels is told so instead of building archives that compare with nobody's.
    """

    size: int
    channels: int
    resampling: str
    invert: bool
    bank_sha256: Mapping[int, str]
    upright: bool = False


@dataclass(frozen=True)
class SplitScheme:
    """One way of dividing a dataset's classes into train, val and test.

    Attributes:
        name, description: shown beside every result, because accuracies of different schemes do not compare.
        lists: for each split its class names, or ``prefix/*`` for all classes below a prefix; empty if seeded.
        counts: for each split its number of classes, if seeded.
        seed: of the division, if seeded.
        by_files: the raw files themselves say it: split files, or a folder for each split.
    """

    name: str
    description: str
    lists: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]
    seed: int = 0
    by_files: bool = False


@dataclass(frozen=True)
class Manifest:
    """A dataset: its files, how they are read, its split schemes. See ``docs/datasets.md`` for the TOML.

    Attributes:
        reference: how the user named it, a built-in name or a path, for commands in messages.
        images: images of which no hash is published; collected into ``raw/images.tar``.
        folder: the user's own folder of images, read where it is; then there are no files.
    """

    reference: str
    name: str
    title: str
    version: str
    licence: str
    homepage: str
    citation: str
    files: tuple[SourceFile, ...]
    reader: ReaderRecipe
    image: ImageRecipe
    rotations: str
    split_scheme: str
    schemes: Mapping[str, SplitScheme]
    images: ImageCollection | None = None
    folder: Path | None = None

    @property
    def raw_names(self) -> tuple[str, ...]:
        """What stands under ``raw/`` once all is fetched, in the order in which the reader gets it."""
        return tuple(file.name for file in self.files) + ((COLLECTED,) if self.images else ())

    def home(self, root: Path) -> DatasetFolder:
        """Where the dataset is kept under a data root. Folders of one name at different places do not meet there."""
        if self.folder is None:
            return DatasetFolder(root, self.name)
        return DatasetFolder(root, f"{self.name}-{sha256_bytes(str(self.folder).encode())[:8]}")

    def scheme(self, name: str | None = None) -> SplitScheme:
        """The split scheme ``name``, or the default one.

        Raises:
            RequestError: there is none of that name; the message lists those that there are.
        """
        chosen = name or self.split_scheme
        if chosen not in self.schemes:
            raise RequestError(
                f"{self.name} has no split scheme {chosen!r}; it has: {', '.join(self.schemes)}."
                f"{did_you_mean(chosen, self.schemes)}"
            )
        return self.schemes[chosen]


def did_you_mean(word: str, known: Any) -> str:
    """`` Did you mean 'x'?`` for the nearest of the known words, else nothing."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""


def builtin_names() -> list[str]:
    """The names of the datasets that come with the package, sorted."""
    return toml_names(resources.files("manifests"))


def toml_names(folder: Traversable) -> list[str]:
    """The TOML files of a folder, sorted and without their suffix."""
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_manifest(name_or_path: str) -> Manifest:
    """The manifest of a built-in dataset, of a user's own TOML file, or of a folder of images.

    Args:
        name_or_path: a name such as ``omniglot``, a path that ends in ``.toml``, or a folder of images.

    Raises:
        RequestError: no dataset of that name, or no such file.
        ManifestError: the file has faults; all of them are listed.
    """
    if name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        if not path.is_file():
            raise RequestError(f"There is no manifest file {path}.")
        try:
            data = read_whole(path, MOST_NOTE)
        except OSError as error:
            raise ManifestError(str(path), [f"it cannot be read ({error.strerror})"]) from error
        return parse_manifest(data, str(path), path.parent, name_or_path)
    names = builtin_names()
    if name_or_path not in names:
        if Path(name_or_path).is_dir():
            from mamldata.folder import folder_manifest  # which needs this module

            return folder_manifest(Path(name_or_path))
        raise RequestError(
            f"There is no dataset {name_or_path!r}.{did_you_mean(name_or_path, names)} Built in are "
            f"{', '.join(names)}; your own dataset is given by the path of its .toml file or its folder of images."
        )
    folder = resources.files("manifests")
    file = f"{name_or_path}.toml"
    return parse_manifest((folder / file).read_bytes(), file, folder, name_or_path)


def parse_manifest(data: bytes, source: str, folder: Traversable, reference: str | None = None) -> Manifest:
    """Check TOML as a whole and make a manifest of it. Reads nothing but the class lists that it names.

    Args:
        data: the TOML file's bytes.
        source: its name, for messages.
        folder: where the text files stand that it names.
        reference: how the user named it; ``source`` if None.

    Raises:
        ManifestError: with every fault and its place.
    """
    document = read_toml(data, source)
    faults: list[str] = []
    manifest = _manifest(_Table(document, "", faults), folder, reference or source)
    if faults:
        raise ManifestError(source, faults)
    return manifest


def read_toml(data: bytes, source: str) -> dict[str, Any]:
    """What a TOML file says; ``source`` is its name.

    Raises:
        ManifestError: it is none.
    """
    try:
        return tomllib.loads(data.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(source, [f"not valid TOML: {error}"]) from error


class _Table:
    """A TOML table being read: takes values by key and type, and notes every fault with its place."""

    def __init__(self, values: dict[str, Any], place: str, faults: list[str]) -> None:
        self.values = values
        self.place = place
        self.faults = faults
        self.known: set[str] = set()

    def fault(self, key: str, text: str) -> None:
        self.faults.append(f"{self.at(key)}: {text}")

    def at(self, key: str) -> str:
        return f"{self.place}.{key}" if self.place else key

    def take(self, key: str, kind: type, default: Any = None, *, required: bool = True) -> Any:
        """The value of ``key`` if it is a ``kind``; else ``default``, and a fault if it is wrong or must be there."""
        self.known.add(key)
        if key not in self.values:
            if required:
                self.fault(key, "is missing")
            return default
        value = self.values[key]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            self.fault(key, f"must be {_KINDS[kind]}, not {value!r}")
            return default
        return value

    def text(self, key: str, check: Callable[[str], str | None] | None = None, *, required: bool = True) -> str:
        value: str = self.take(key, str, "", required=required)
        problem = check(value) if check and value else None
        if problem:
            self.fault(key, problem)
        if key in self.values and self.values[key] == "":
            self.fault(key, "is empty")
        return value

    def whole(self, key: str, minimum: int, maximum: int | None = None, *, required: bool = True) -> int:
        value: int = self.take(key, int, minimum, required=required)
        if value < minimum or (maximum is not None and value > maximum):
            limits = f"at least {minimum}" if maximum is None else f"between {minimum} and {maximum}"
            self.fault(key, f"must be {limits}, not {value}")
        return value

    def choice(self, key: str, choices: Any, default: str | None = None) -> str:
        value: str = self.take(key, str, default or "", required=default is None)
        if value and value not in choices:
            self.fault(key, f"{value!r} is not one of {', '.join(choices)}.{did_you_mean(value, choices)}")
        return value

    def table(self, key: str, *, required: bool = True) -> _Table:
        # A table that is not there is one fault, not one for each of its keys.
        faults = self.faults if isinstance(self.values.get(key), dict) else []
        return _Table(self.take(key, dict, {}, required=required), self.at(key), faults)

    def finish(self) -> None:
        """Note every key that nobody took: a misspelt option must not be passed over."""
        for key in self.values:
            if key not in self.known:
                self.fault(key, f"is not known here.{did_you_mean(key, self.known)}")


_KINDS = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "a table"}


def _manifest(top: _Table, folder: Traversable, reference: str) -> Manifest:
    if (declared := top.text("format")) not in {"", FORMAT}:
        top.fault("format", f"is {declared!r}; this version reads {FORMAT!r}")
    schemes = _schemes(top.table("splits"), folder)
    manifest = Manifest(
        reference=reference,
        name=top.text("name", _dataset_name),
        title=top.text("title"),
        version=top.text("version"),
        licence=top.text("licence"),
        homepage=top.text("homepage"),
        citation=top.text("citation").strip(),
        files=_files(top),
        reader=_reader(top.table("reader")),
        image=_image(top.table("image")),
        images=_images(top.table("images")) if "images" in top.values else None,
        rotations=top.choice("rotations", ROTATIONS, default="none"),
        split_scheme=top.choice("split_scheme", schemes) if schemes else top.text("split_scheme"),
        schemes=schemes,
    )
    top.finish()
    return manifest


def _dataset_name(name: str) -> str | None:
    good = re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    return None if good else f"{name!r} may only have small letters, digits and single hyphens between them"


def _sha256(text: str) -> str | None:
    return None if re.fullmatch(r"[0-9a-f]{64}", text) else "must be 64 small hexadecimal digits"


def _md5(text: str) -> str | None:
    return None if re.fullmatch(r"[0-9a-f]{32}", text) else "must be 32 small hexadecimal digits"


def _plain_name(name: str) -> str | None:
    ours = name.endswith((".part", ".sha256")) or name in {COLLECTED, PIN}
    good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and not ours
    return None if good else f"{name!r} must be a plain file name"


def _files(top: _Table) -> tuple[SourceFile, ...]:
    entries = top.take("files", list, [], required="images" not in top.values)
    if "files" in top.values and not entries:
        top.fault("files", "must have at least one entry")
    files = []
    for position, entry in enumerate(entries):
        place = f"files[{position}]"
        if not isinstance(entry, dict):
            top.fault(place, "must be a table")
            continue
        files.append(_file(_Table(entry, place, top.faults)))
    names = [file.name for file in files]
    for name in sorted({name for name in names if name and names.count(name) > 1}):
        top.fault("files", f"the name {name!r} stands twice")
    return tuple(files)


def _is_web_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in {"http", "https"} and bool(parts.hostname)


def _file(table: _Table) -> SourceFile:
    generator = table.choice("generator", GENERATORS, default="") or None
    urls = table.take("urls", list, [], required=False)
    for url in urls:
        if not isinstance(url, str) or not _is_web_address(url):
            table.fault("urls", f"{url!r} is not an http(s) address")
    content = table.text("content_sha256", _sha256, required=False) or None
    if "md5" in table.values and "sha256" in table.values:
        table.fault("md5", "is not needed where there is a sha256; leave it out")
    file = SourceFile(
        name=table.text("name", _plain_name),
        bytes=table.whole("bytes", 1) if urls or generator or "bytes" in table.values else 0,
        sha256=table.text("sha256", _sha256, required="md5" not in table.values) or None,
        md5=table.text("md5", _md5, required=False) or None,
        urls=tuple(urls),
        content_sha256=content,
        content_bytes=table.whole("content_bytes", 1) if content else None,
        generator=generator,
        how=table.text("how", required=False).strip(),
    )
    table.finish()
    return file


def _images(table: _Table) -> ImageCollection:
    entries = table.take("forms", list, [{"type": "by-name"}], required=False)
    forms = []
    for position, entry in enumerate(entries):
        place = table.at(f"forms[{position}]")
        if isinstance(entry, dict):
            forms.append(_form(_Table(entry, place, table.faults)))
        else:
            table.faults.append(f"{place}: must be a table")
    if not entries:
        table.fault("forms", "must have at least one entry")
    collection = ImageCollection(
        forms=tuple(forms),
        how=table.text("how", required=False).strip(),
        content_sha256=table.text("content_sha256", _sha256, required=False) or None,
    )
    table.finish()
    return collection


def _form(table: _Table) -> ImageForm:
    kind = table.choice("type", FORMS)
    options: dict[str, Any] = {}
    if "container" in FORMS.get(kind, ()):
        options["container"] = table.text("container", _plain_name, required=False)
        options["digits"] = table.whole("digits", 1, 12)
    if "files" in FORMS.get(kind, ()):
        names = table.table("files")
        options["files"] = {split: _file_names(names, split) for split in SPLITS} if names.values else {}
        names.finish()
    if kind in FORMS:
        table.finish()
    return ImageForm(kind, **options)


def _file_names(table: _Table, split: str) -> tuple[str, ...]:
    names = table.take(split, list, [])
    if not names or not all(isinstance(name, str) and _plain_name(name) is None for name in names):
        table.fault(split, "must be a list of plain file names")
        return ()
    return tuple(names)


def _reader(table: _Table) -> ReaderRecipe:
    kind = table.choice("type", READERS)
    known = READERS.get(kind, ())
    options: dict[str, Any] = {}
    if "depth" in known and "depth" in table.values:
        options["depth"] = table.whole("depth", 0, 8)
    if "splits" in known and "splits" in table.values:
        options["splits"] = table.take("splits", bool, False)
    if "damaged" in known and "damaged" in table.values:
        options["damaged"] = table.choice("damaged", DAMAGED)
    if table.values:
        table.finish()
    return ReaderRecipe(kind, **options)


def _image(table: _Table) -> ImageRecipe:
    digests: dict[int, str] = {}
    known = table.table("bank_sha256", required=False)
    for key in known.values:
        if key.isascii() and key.isdigit():
            digests[int(key)] = known.text(key, _sha256)
        else:
            known.fault(key, "must be an image size in pixels")
            known.known.add(key)
    recipe = ImageRecipe(
        size=table.whole("size", 1, 4096),
        channels=table.whole("channels", 1, 3),
        resampling=table.choice("resampling", RESAMPLINGS),
        invert=table.take("invert", bool, False, required=False),
        bank_sha256=digests,
        upright=table.take("upright", bool, False, required=False),
    )
    if recipe.channels == 2:
        table.fault("channels", "must be 1 (grey) or 3 (RGB)")
    table.finish()
    return recipe


def _schemes(splits: _Table, folder: Traversable) -> dict[str, SplitScheme]:
    schemes = {}
    if not splits.values:
        splits.faults.append(f"{splits.place}: must have at least one scheme")
    for name in splits.values:
        table = splits.table(name)
        if problem := _dataset_name(name):
            splits.fault(name, problem)
        schemes[name] = _scheme(name, table, folder)
        table.finish()
    return schemes


def _scheme(name: str, table: _Table, folder: Traversable) -> SplitScheme:
    description = table.text("description")
    if "by" in table.values:
        table.choice("by", ("files",))
        return SplitScheme(name, description, lists={}, counts={}, by_files=True)
    if "seed" in table.values:
        seed = table.whole("seed", 0)
        counts = {split: table.whole(split, 1) for split in SPLITS}
        return SplitScheme(name, description, lists={}, counts=counts, seed=seed)
    lists = {}
    for split in SPLITS:
        table.known.add(split)
        value = table.values.get(split)
        if isinstance(value, str):
            lists[split] = _list_file(split, value, table, folder)
        elif isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
            lists[split] = tuple(value)
        else:
            table.fault(split, "must be a list of classes or the name of a text file with one class a line")
    return SplitScheme(name, description, lists=lists, counts={})


def _list_file(split: str, name: str, table: _Table, folder: Traversable) -> tuple[str, ...]:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        table.fault(split, f"{name!r} must be a path below the manifest's own folder")
        return ()
    try:
        place = folder.joinpath(*path.parts)
        text = (read_whole(place, MOST_TEXT) if isinstance(place, Path) else place.read_bytes()).decode("utf-8")
    except (OSError, ValueError) as error:
        table.fault(split, f"cannot read the class list {name!r} ({error})")
        return ()
    entries = tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
    if not entries:
        table.fault(split, f"the class list {name!r} is empty")
    return entries
