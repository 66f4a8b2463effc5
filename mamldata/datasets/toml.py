"""Read manifests from TOML and check them as a whole: all faults are reported at once, each with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any

from mamldata.datasets.manifest import (
    COLLECTED,
    FITS,
    PIN,
    ImageCollection,
    ImageForm,
    ImageRecipe,
    Manifest,
    SourceFile,
)
from mamldata.errors import ManifestError
from mamldata.io.atomic import MOST_TEXT, read_whole
from mamldata.io.toml import Table, read_toml, toml_names
from mamldata.io.urls import is_http, shown_place, web_problem
from mamldata.readers.image import DAMAGED, ReaderRecipe
from mamldata.readers.index import READERS
from mamldata.sampling.sampler import ROTATIONS
from mamldata.sampling.splits import SPLITS, SplitScheme
from mamldata.words import quoted

FORMAT = "mamldata-manifest/1"
BENCHMARKS = "benchmarks"  # the TOML file among the manifests that is none; see ``mamldata.archive.benchmarks``
RESAMPLINGS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
GENERATORS = ("glyphs",)
FORMS: Mapping[str, tuple[str, ...]] = {  # layout of a user's images: its options
    "by-name": (),
    "by-position": ("container", "digits"),
    "pickled-arrays": ("files",),
}


def builtin_names() -> list[str]:
    """The names of the datasets that come with the package, sorted."""
    return [name for name in toml_names(resources.files("manifests")) if name != BENCHMARKS]


def parse_manifest(data: bytes, source: str, folder: Traversable, reference: str | None = None) -> Manifest:
    """Check TOML as a whole and return its manifest. Only reads the class lists that it names.

    Args:
        data: the TOML file's bytes.
        source: its name, for messages.
        folder: where the text files that it names are.
        reference: how the user named it; ``source`` if None.

    Raises:
        ManifestError: the TOML has faults; all are listed with their places.
    """
    document = read_toml(data, source)
    faults: list[str] = []
    manifest = _manifest(Table(document, "", faults), folder, reference or source)
    if faults:
        raise ManifestError(source, faults)
    return manifest


def _manifest(top: Table, folder: Traversable, reference: str) -> Manifest:
    if (declared := top.text("format")) not in {"", FORMAT}:
        top.fault("format", f"is {quoted(declared)}; this version reads {FORMAT!r}")
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
        reader=_reader(top.table("reader"), folder),
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
    return None if good else f"{quoted(name)} may only have lowercase letters, digits and single hyphens between them"


def sha256_fault(text: str) -> str | None:
    """What is wrong with a digest in hex; None if nothing is."""
    return None if re.fullmatch(r"[0-9a-f]{64}", text) else "must be 64 lowercase hexadecimal digits"


def _md5(text: str) -> str | None:
    return None if re.fullmatch(r"[0-9a-f]{32}", text) else "must be 32 lowercase hexadecimal digits"


def _plain_name(name: str) -> str | None:
    ours = name.endswith((".part", ".sha256")) or name in {COLLECTED, PIN}
    good = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name) and not ours
    return None if good else f"{quoted(name)} must be a plain file name"


def _files(top: Table) -> tuple[SourceFile, ...]:
    entries = top.take("files", list, [], required="images" not in top.values)
    if "files" in top.values and not entries:
        top.fault("files", "must have at least one entry")
    files = []
    for position, entry in enumerate(entries):
        place = f"files[{position}]"
        if not isinstance(entry, dict):
            top.fault(place, "must be a table")
            continue
        files.append(_file(Table(entry, place, top.faults)))
    names = [file.name for file in files]
    for name in sorted({name for name in names if name and names.count(name) > 1}):
        top.fault("files", f"the name {name!r} appears twice")
    return tuple(files)


def _file(table: Table) -> SourceFile:
    generator = table.choice("generator", GENERATORS, default="") or None
    urls = table.take("urls", list, [], required=False)
    for url in urls:
        if not isinstance(url, str) or not is_http(url) or web_problem(url):
            table.fault(
                "urls", f"{quoted(shown_place(url) if isinstance(url, str) else url)} is not an http(s) address"
            )
    content = table.text("content_sha256", sha256_fault, required=False) or None
    if "md5" in table.values and "sha256" in table.values:
        table.fault("md5", "is not needed if there is a sha256; leave it out")
    file = SourceFile(
        name=table.text("name", _plain_name),
        bytes=table.whole("bytes", 1) if urls or generator or "bytes" in table.values else 0,
        sha256=table.text("sha256", sha256_fault, required="md5" not in table.values) or None,
        md5=table.text("md5", _md5, required=False) or None,
        urls=tuple(urls),
        content_sha256=content,
        content_bytes=table.whole("content_bytes", 1) if content else None,
        generator=generator,
        how=table.text("how", required=False).strip(),
    )
    table.finish()
    return file


def _images(table: Table) -> ImageCollection:
    entries = table.take("forms", list, [{"type": "by-name"}], required=False)
    forms = []
    for position, entry in enumerate(entries):
        place = table.at(f"forms[{position}]")
        if isinstance(entry, dict):
            forms.append(_form(Table(entry, place, table.faults)))
        else:
            table.faults.append(f"{place}: must be a table")
    if not entries:
        table.fault("forms", "must have at least one entry")
    collection = ImageCollection(
        forms=tuple(forms),
        how=table.text("how", required=False).strip(),
        content_sha256=table.text("content_sha256", sha256_fault, required=False) or None,
    )
    table.finish()
    return collection


def _form(table: Table) -> ImageForm:
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


def _file_names(table: Table, split: str) -> tuple[str, ...]:
    names = table.take(split, list, [])
    if not names or not all(isinstance(name, str) and _plain_name(name) is None for name in names):
        table.fault(split, "must be a list of plain file names")
        return ()
    return tuple(names)


def _reader(table: Table, folder: Traversable) -> ReaderRecipe:
    kind = table.choice("type", READERS)
    known = READERS[kind].options if kind in READERS else ()
    options: dict[str, Any] = {}
    if "depth" in known and "depth" in table.values:
        options["depth"] = table.whole("depth", 0, 8)
    if "splits" in known and "splits" in table.values:
        options["splits"] = table.take("splits", bool, False)
    if "damaged" in known and "damaged" in table.values:
        options["damaged"] = table.choice("damaged", DAMAGED)
    if "min_images" in known and "min_images" in table.values:
        options["min_images"] = table.whole("min_images", 0)
    if "classes" in known and "classes" in table.values:
        options["classes"] = _classes("classes", table, folder)
    if table.values:
        table.finish()
    return ReaderRecipe(kind, **options)


def _image(table: Table) -> ImageRecipe:
    digests: dict[int, str] = {}
    known = table.table("bank_sha256", required=False)
    for key in known.values:
        if key.isascii() and key.isdigit():
            digests[int(key)] = known.text(key, sha256_fault)
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
        fit=table.choice("fit", FITS) if "fit" in table.values else "stretch",
    )
    if recipe.channels == 2:
        table.fault("channels", "must be 1 (grey) or 3 (RGB)")
    table.finish()
    return recipe


def _schemes(splits: Table, folder: Traversable) -> dict[str, SplitScheme]:
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


def _scheme(name: str, table: Table, folder: Traversable) -> SplitScheme:
    description = table.text("description")
    if "by" in table.values:
        table.choice("by", ("files",))
        return SplitScheme(name, description, lists={}, counts={}, by_files=True)
    before = len(table.faults)
    seeded = "seed" in table.values
    scheme = SplitScheme(
        name,
        description,
        lists={} if seeded else {split: _classes(split, table, folder) for split in SPLITS},
        counts={split: table.whole(split, 0) for split in SPLITS} if seeded else {},
        seed=table.whole("seed", 0) if seeded else 0,
    )
    if len(table.faults) == before and not any((scheme.counts or scheme.lists).values()):
        table.faults.append(f"{table.place}: train, val and test are all empty; at least one of them must have classes")
    return scheme


def _classes(key: str, table: Table, folder: Traversable) -> tuple[str, ...]:
    table.known.add(key)
    value = table.values.get(key)
    if isinstance(value, str):
        return _list_file(key, value, table, folder)
    if isinstance(value, list) and all(isinstance(entry, str) for entry in value):
        return tuple(value)
    table.fault(key, "must be a list of classes or the name of a text file with one class per line")
    return ()


def _list_file(key: str, name: str, table: Table, folder: Traversable) -> tuple[str, ...]:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        table.fault(key, f"{quoted(name)} must be a path below the manifest's folder")
        return ()
    try:
        place = folder.joinpath(*path.parts)
        text = (read_whole(place, MOST_TEXT) if isinstance(place, Path) else place.read_bytes()).decode("utf-8")
    except (OSError, ValueError) as error:
        table.fault(key, f"cannot read the class list {quoted(name)} ({error})")
        return ()
    return tuple(line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#"))
