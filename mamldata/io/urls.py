"""Places of raw files: folders, http(s) addresses, and other URLs that fsspec reads (``s3://bucket/folder``)."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from mamldata.errors import RequestError

_HTTP = ("http", "https")
_HERE = ("memory",)  # fsspec's file systems that need no network


def find(place: str, name: str) -> str | None:
    """Where the file ``name`` may be at a place that a user gave: a path or URL; None if the folder does not have it.

    Raises:
        RequestError: the place is neither an existing folder or file nor a URL that can be read.
    """
    local = local_path(place)
    if local is not None:
        file = local / name if local.is_dir() else local
        return str(file) if file.name == name and file.is_file() else None
    _require_readable(place)
    return join(place, name)


def join(url: str, name: str) -> str:
    """The address of a file in the folder at ``url``."""
    # Insert it before the query, which may carry an access key.
    base, mark, query = url.partition("?") if is_http(url) else (url, "", "")
    return f"{base.rstrip('/')}/{name}{mark}{query}"


def is_http(source: str) -> bool:
    """Whether requests reads this source."""
    return _scheme(source) in _HTTP


def is_local(source: str) -> bool:
    """Whether this source is a path on this machine."""
    return not _scheme(source)


def is_remote(place: str | os.PathLike[str]) -> bool:
    """Whether ``place`` is an address, not a path."""
    return isinstance(place, str) and "://" in place


def shown_place(place: str | os.PathLike[str]) -> str:
    """A place in the form that may be shown and stored: addresses lose user, password and query; paths do not change.

    The query may be the key of a signed address; ``?…`` stands for it.
    """
    place = str(place)
    scheme, mark, _ = place.partition("://")
    if not mark:
        return place
    # Everything before the last @ of the host, even if a password has a ? that should have been written %3F.
    address, mark, _ = re.sub(r"(?<=://)[^/]*@", "", place).partition("?")
    shown = scheme.lower() + address.removeprefix(scheme)
    return f"{shown}{mark}…" if mark else shown


def shown_text(text: str) -> str:
    """``shown_place`` for all addresses in a text, such as a library's error message."""
    return re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda found: shown_place(found[0]), text, flags=re.IGNORECASE)


def shown_error(error: BaseException) -> str:
    """The message of another library's error, without keys in addresses; its type if the message is empty."""
    return shown_text(str(error)) or type(error).__name__


def needs_network(source: str) -> bool:
    """Whether reading this source may touch a network."""
    return _scheme(source) not in ("", *_HERE)


@contextmanager
def open_source(source: str) -> Iterator[IO[bytes]]:
    """Open a path, or any URL that fsspec reads, for its bytes. Errors of the file system are passed through."""
    if is_local(source):
        with Path(source).open("rb") as stream:
            yield stream
    else:
        import fsspec

        with fsspec.open(source, "rb") as stream:
            yield stream


def _scheme(source: str) -> str:
    scheme, mark, _ = source.partition("://")
    return scheme.lower() if mark else ""


def local_path(place: str) -> Path | None:
    """The folder or file that a place names, or None if it is a URL.

    Raises:
        RequestError: there is no such folder or file.
    """
    scheme = _scheme(place)
    if scheme not in {"", "file"}:
        return None
    path = Path(unquote(urlsplit(place).path)) if scheme else Path(place).expanduser()
    if path.is_dir() or path.is_file():
        return path.absolute()
    raise RequestError(f"Source {place}: {path} is neither a folder, a file nor a URL.")


def local_address(url: str) -> Path | None:
    """The path that a ``file://`` address names, None if it is another kind of address."""
    return Path(unquote(urlsplit(url).path)) if _scheme(url) in {"file", "local"} else None


def _require_readable(place: str) -> None:
    if is_http(place):
        if not _host(place):
            raise RequestError(f"Source {shown_place(place)}: an address with no host.")
        return
    instead = "Give a folder, an http(s) address, or a URL that fsspec reads, such as s3://bucket/folder."
    for protocol in _scheme(place).split("::"):
        require_protocol(protocol, f"Source {place}", instead)


def require_address(url: str) -> None:
    """Refuse anything but a plain address, such as chained file systems and protocols that start programs.

    Raises:
        RequestError: it is not a plain address, with the reason.
    """
    scheme = _scheme(url)
    if scheme in _HTTP:
        if not _host(url):
            raise RequestError(f"{shown_place(url)}: an address with no host.")
        return
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or scheme.startswith("pipe") or "::" in url:
        raise RequestError(
            f"{shown_place(url)}: not an address. Give https://…, or one that fsspec reads, such as s3://bucket/folder."
        )
    require_protocol(scheme, shown_place(url), "Give https://…, or one that fsspec reads.")


def require_protocol(protocol: str, asked: str, instead: str) -> None:
    """Check that fsspec can read a protocol on this machine.

    Args:
        protocol: such as ``s3``.
        asked: what the user gave, for the message.
        instead: what to give instead, for the message.

    Raises:
        RequestError: fsspec does not know the protocol, or needs a package that is missing.
    """
    import fsspec

    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise RequestError(f"{shown_text(asked)}: reading {protocol}:// needs another package. {error}") from error
    except ValueError as error:
        raise RequestError(f"{shown_text(asked)}: {protocol}:// is not known. {instead}") from error


def _host(place: str) -> str | None:
    try:
        return urlsplit(place).hostname
    except ValueError:
        return None
