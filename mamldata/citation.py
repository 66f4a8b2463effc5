"""BibTeX for an archive, a benchmark or a run: an entry for itself, and the papers of what it is made from.

The papers are in ``manifests/citations.bib``; its keywords say what each is cited for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import resources
from typing import Any

from mamldata.datasets.load import load_manifest
from mamldata.datasets.manifest import Manifest
from mamldata.datasets.toml import builtin_names
from mamldata.errors import RequestError
from mamldata.version import __version__
from mamldata.words import printable

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {mark: "\\" + mark for mark in "&%$#_"} | {"{": "(", "}": ")"}


def papers(*keywords: str) -> list[str]:
    """The entries of ``manifests/citations.bib`` that have one of these keywords, in the order of the file."""
    found = []
    for entry in (resources.files("manifests") / "citations.bib").read_text(encoding="utf-8").split("\n\n"):
        fields, _, words = entry.strip().partition(",\n  keywords = {")
        if set(keywords) & set(words.partition("}")[0].split(", ")):
            found.append(fields + "\n}")
    return found


def known_dataset(about: Mapping[str, Any]) -> Manifest | None:
    """The built-in dataset of some episodes; None if they come from another one, even of the same name.

    Args:
        about: an archive's or a benchmark's attributes, or the description of a run's data.
    """
    if about["dataset"] not in builtin_names():
        return None
    manifest = load_manifest(about["dataset"])
    size = about.get("image_size") or about["image_shape"][0]
    bank = about.get("bank_sha256")
    same = bank is None or bank == manifest.image.bank_sha256.get(size, bank)
    return manifest if same and about.get("dataset_version", manifest.version) == manifest.version else None


def dataset_of(about: Mapping[str, Any], given: str | None) -> Manifest | None:
    """The manifest that the user gives for some episodes; else ``known_dataset``.

    Raises:
        RequestError: there is no such manifest, or it is of another dataset.
    """
    if given is None:
        return known_dataset(about)
    manifest = load_manifest(given)
    if manifest.name != about["dataset"]:
        raise RequestError(f"{given} is of the dataset {manifest.name}, but these episodes are of {about['dataset']}.")
    return manifest


def bibtex(
    title: str,
    about: Mapping[str, Any],
    digest: str | None,
    manifest: Manifest | None,
    *,
    algorithm: str | None = None,
    version: str | None = __version__,
) -> str:
    """BibTeX entries: of the thing itself, of its dataset, split scheme and algorithm, and of this software.

    Args:
        title: says what is cited.
        about: as for ``known_dataset``.
        digest: of the archive, or of the data that a run was trained on; None if it is not pinned.
        manifest: of its dataset; None if it is unknown, so that its papers are left out.
        algorithm: of a run.
        version: of mamldata; of a run, the one that it was trained with; None if unknown.
    """
    name, scheme, episodes = about["dataset"], about["split_scheme"], f"{about['n_way']}w{about['k_shot']}s"
    facts = {"dataset": name, "version": about.get("dataset_version") or (manifest.version if manifest else None)}
    facts |= {"split scheme": scheme, "data sha256" if algorithm else "sha256": digest, "mamldata": version}
    own = {
        "title": title,
        "key": title,  # by which bibliographies without authors are sorted
        "note": ", ".join(f"{fact} {value}" for fact, value in facts.items() if value is not None),
    }
    key = "-".join(filter(None, ("mamldata", algorithm, name, episodes, (digest or "")[:12])))
    keywords = ["software"]
    entries = [_entry(key, own)]
    if manifest and name in builtin_names() and manifest.reference == name:
        keywords += [f"dataset {name}", f"split-scheme {name}/{scheme}"]
    elif manifest:
        entries.append(_of_dataset(manifest))
    if algorithm:
        keywords.append(f"algorithm {algorithm}")
    if about.get("query_alpha"):
        keywords.append("query_alpha")
    return "\n\n".join([*entries, *papers(*keywords)]) + "\n"


def _of_dataset(manifest: Manifest) -> str:
    """A user's own dataset: its manifest's citation, which may be BibTeX itself."""
    if manifest.citation.startswith("@"):
        return manifest.citation
    return _entry(manifest.name, {"title": manifest.title, "key": manifest.name, "note": manifest.citation})


def _entry(key: str, fields: Mapping[str, str]) -> str:
    """A ``@misc``; what BibTeX or LaTeX would read as a command is escaped, and braces become parentheses."""
    key = re.sub(r"[^A-Za-z0-9-]", "-", key)
    texts = {name: printable(" ".join(value.split())) for name, value in fields.items()}
    lines = [f"  {name} = {{{''.join(_SPECIAL.get(mark, mark) for mark in text)}}}" for name, text in texts.items()]
    return f"@misc{{{key},\n" + ",\n".join(lines) + "\n}"
