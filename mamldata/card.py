"""What is published beside an archive: a dataset card for Hugging Face, and Croissant 1.1 metadata.

Both are made from ``archive.json`` and a manifest alone, so the same archive gets the same bytes everywhere. Neither is
part of the archive: its digest does not change.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

import numpy as np

from mamldata.archive.index import INDEX, Archive
from mamldata.citation import bibtex
from mamldata.datasets.manifest import Manifest
from mamldata.errors import RequestError
from mamldata.io.atomic import make_folder, read_whole, write_atomic
from mamldata.io.urls import is_http
from mamldata.words import counted, printable

CARD, CROISSANT = "README.md", "croissant.json"
# Licences that Hugging Face knows by these names in lowercase, and SPDX by these names.
_LICENCES = re.compile("MIT|Apache-2.0|BSD-3-Clause|CC0-1.0|CC-BY-4.0|CC-BY-SA-4.0|CC-BY-NC-4.0|CC-BY-NC-SA-4.0")
_HF_SPLITS = {"train": "train", "val": "validation", "test": "test"}
_SIZES = {1000: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_SPECIFICATIONS = ["http://mlcommons.org/croissant/1.1", "http://mlcommons.org/croissant/RAI/1.0"]


def write_cards(
    archive: Archive, folder: Path, manifest: Manifest | None, *, date: str | None = None, overwrite: bool = False
) -> list[Path]:
    """Write ``README.md`` and ``croissant.json``; gives their paths.

    Args:
        archive: what they describe.
        folder: where to write them, created if missing: the archive's own, or another one.
        manifest: of the archive's dataset, with its title, licence and citation; None if it is unknown.
        date: of publication, ``YYYY-MM-DD``. An archive records no date, so without one Croissant's is left out.
        overwrite: replace files that hold something else.

    Raises:
        RequestError: one of them exists with another content; then nothing is written.
        WriteError: the folder is not writable.
    """
    contents = {CARD: card(archive, manifest), CROISSANT: croissant(archive, manifest, date)}
    files = {folder / name: text.encode() for name, text in contents.items()}
    for path, data in files.items():
        if os.path.lexists(path) and not (overwrite or _holds(path, data)):
            raise RequestError(f"{path} exists and holds something else. Choose another folder, or overwrite it.")
    make_folder(folder)
    for path, data in files.items():
        write_atomic(path, data)
    return list(files)


def _holds(path: Path, data: bytes) -> bool:
    try:
        return read_whole(path, len(data)) == data
    except OSError:  # it is longer, not a file, or not readable
        return False


def archive_title(archive: Archive) -> str:
    """What an archive is, for a citation."""
    return f"{_title(archive)}: {'a thin' if archive.thin else 'an'} archive"


def _citation(archive: Archive, manifest: Manifest | None) -> str:
    return bibtex(archive_title(archive), vars(archive), archive.digest, manifest)


def card(archive: Archive, manifest: Manifest | None) -> str:
    """The dataset card: Markdown with the front matter that Hugging Face reads."""
    count = sum(split.episodes for split in archive.splits.values())
    splits = [
        f"| {name} | {split.episodes:,} | {len(set(split.classes.names)):,} |" for name, split in archive.splits.items()
    ]
    plain = {name: printable(str(value)) for name, value in vars(archive).items() if isinstance(value, str | int)}
    split = next(iter(archive.splits))
    return Template(_template("card.md")).substitute(
        plain,
        pretty_name=json.dumps(_title(archive)),
        license=_hf_licence(manifest),
        size=next((size for most, size in _SIZES.items() if count < most), "n>10M"),
        loading=_loading(archive),
        title=_title(archive),
        description=_description(archive, manifest),
        digest=archive.digest,
        short=archive.digest[:12],
        shape="x".join(map(str, archive.image_shape)),
        licence=printable(manifest.licence) if manifest else "not known to the program that wrote this card",
        splits="\n".join(splits),
        split=split,
        tars="" if archive.thin else Template(_template("card-tars.md")).substitute(hf_split=_HF_SPLITS[split]),
        bibtex=_citation(archive, manifest),
    )


def croissant(archive: Archive, manifest: Manifest | None, date: str | None = None) -> str:
    """Croissant 1.1 metadata, JSON-LD: every file with its length and SHA-256, classes, and episodes in tars."""
    spdx = _spdx(manifest)
    homepage = manifest.homepage if manifest and is_http(manifest.homepage) else None
    licence = f"https://spdx.org/licenses/{spdx}.html" if spdx else manifest and manifest.licence
    version = archive.dataset_version
    facts = {
        "license": licence,
        "url": homepage,
        "datePublished": date,
        "rai:dataPreprocessingProtocol": manifest and _preprocessing(archive, manifest),
    }
    about = {
        "@context": json.loads(_template("croissant-context.json")),
        "@type": "sc:Dataset",
        "conformsTo": _SPECIFICATIONS,
        "name": f"{archive.dataset}-{archive.n_way}w{archive.k_shot}s{'-thin' * archive.thin}",
        "description": _description(archive, manifest),
        "version": int(version) if re.fullmatch("[0-9]{1,9}", version) else version,
        "citeAs": _citation(archive, manifest),
        **{key: value for key, value in facts.items() if value},
        "distribution": [*_files(archive), *(files for files, _ in _arrays(archive))],
        "recordSet": [*_class_records(archive), *(records for _, records in _arrays(archive))],
    }
    return json.dumps(about, indent=2) + "\n"


def _template(name: str) -> str:
    return (resources.files("mamldata") / "templates" / name).read_text(encoding="utf-8")


def _title(archive: Archive) -> str:
    return printable(f"{archive.n_way}-way {archive.k_shot}-shot episodes of {archive.dataset}")


def _description(archive: Archive, manifest: Manifest | None) -> str:
    counts = ", ".join(f"{counted(split.episodes, 'episode')} of {name}" for name, split in archive.splits.items())
    kind = "A thin archive: every image once; its episodes are drawn when they are read." if archive.thin else ""
    origin = f"The dataset is {manifest.title}." if manifest else ""
    text = f"Few-shot episodes of {archive.dataset}, split scheme {archive.split_scheme}: {counts}. {kind} {origin}"
    return printable(" ".join(text.split()))


def _preprocessing(archive: Archive, manifest: Manifest) -> str:
    return f"{json.dumps({**manifest.image.to_json(), 'size': archive.image_shape[0]})}, rotations {archive.rotations}"


def _spdx(manifest: Manifest | None) -> str | None:
    return manifest.licence if manifest and _LICENCES.fullmatch(manifest.licence) else None


def _hf_licence(manifest: Manifest | None) -> str:
    if manifest is None:
        return "unknown"
    if spdx := _spdx(manifest):
        return spdx.lower()
    link = f"\nlicense_link: {json.dumps(manifest.homepage)}" if is_http(manifest.homepage) else ""
    return f"other\nlicense_name: {manifest.name}-terms{link}"


def _loading(archive: Archive) -> str:
    """What ``datasets`` loads: the tars of each split. It has no reader for the arrays of a thin archive."""
    if archive.thin:
        return "viewer: false"
    files = [f"  - split: {_HF_SPLITS[name]}\n    path: {name}-*.tar" for name in archive.splits]
    return "\n".join(["configs:", "- config_name: default", "  data_files:", *files])


def _files(archive: Archive) -> Iterator[dict[str, Any]]:
    """Every file; ``archive.json`` once more for each split, see ``_class_records``."""
    kind = "application/octet-stream" if archive.thin else "application/x-tar"
    index = (INDEX, "application/json", len(archive.to_json()), archive.digest)
    entries = {INDEX: index, **{f"{split}-{INDEX}": index for split in archive.splits}}
    entries |= {shard.file: (shard.file, kind, shard.bytes, shard.sha256) for shard in archive.shards()}
    for key, (name, encoding, size, sha256) in entries.items():
        place = {"@type": "cr:FileObject", "@id": key, "name": name, "contentUrl": name}
        yield {**place, "contentSize": f"{size} B", "encodingFormat": encoding, "sha256": sha256}


def _class_records(archive: Archive) -> Iterator[dict[str, Any]]:
    """The class table of each split, as ``archive.json`` has it.

    Each split has an entry of its own for that file: mlcroissant makes one table of all that it reads from an entry.
    """
    kinds = {"name": "sc:Text", "first_row": "sc:Integer", "images": "sc:Integer"}
    kinds |= {} if archive.thin else {"quarter_turns": "sc:Integer"}
    for split in archive.splits:
        path = f"$.splits.{split}.classes[*]"
        fields = {
            key: (kind, {"fileObject": {"@id": f"{split}-{INDEX}"}, "extract": {"jsonPath": f"{path}.{key}"}})
            for key, kind in kinds.items()
        }
        yield _records(f"{split}-classes", f"The classes of {split}, and their images in the bank.", fields)


def _arrays(archive: Archive) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """The arrays in the tars, for each split and member: the set of files, and a record for each episode.

    Croissant has no type for a file of NumPy, so its bytes are given as text.
    """
    for split in archive.splits if not archive.thin else ():
        for member in archive.layout.members:
            name, shape = f"{split}-{member.name}", f"{np.dtype(member.dtype).name} {list(member.shape)}"
            files: dict[str, Any] = {
                "@type": "cr:FileSet",
                "@id": f"{name}-files",
                "description": f"The {member.name} array of each {split} episode: a NumPy file, {shape}.",
                "containedIn": [{"@id": shard.file} for shard in archive.splits[split].shards],
                "encodingFormat": "application/octet-stream",
                "includes": f"*.{member.name}.npy",
            }
            source = {"fileSet": {"@id": files["@id"]}}
            number = {**source, "extract": {"fileProperty": "filename"}, "transform": {"regex": r"^(\d+)\."}}
            npy = {**source, "extract": {"fileProperty": "content"}}
            fields = {"episode": ("sc:Integer", number), "npy": ("sc:Text", npy)}
            yield files, _records(name, files["description"], fields)


def _records(name: str, description: str, fields: Mapping[str, tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": name,
        "description": description,
        "field": [
            {"@type": "cr:Field", "@id": f"{name}/{field}", "dataType": kind, "source": source}
            for field, (kind, source) in fields.items()
        ],
    }
