"""Places of raw files: folders, http(s) addresses, and other URLs that fsspec reads (``s3://bucket/folder``)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote, urlsplit

from mamldata.errors import RequestError

_HTTP = ("http", "https")
_LOCAL = ("file", "local")
_SCHEME = r"[a-z][a-z0-9+.-]*"
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
    # Insert it before the query and the fragment, which may carry an access key.
    end = _end_of_path(url) if is_http(url) else len(url)
    return f"{url[:end].rstrip('/')}/{name}{url[end:]}"


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
    """A place in the form that may be shown and stored: addresses lose user, password, query and fragment.

    The query may be the key of a signed address; ``?…`` stands for it. Paths do not change. If characters that should
    have been escaped make it unclear where a password ends, less is shown rather than more.
    """
    place = str(place)
    scheme, mark, rest = place.partition("://")
    scheme = scheme.lower()
    if not mark:
        return place
    if not re.fullmatch(rf"{_SCHEME}(::{_SCHEME})*", scheme):
        return "…://…"
    end = _end_of_path(rest)
    hidden = f"{rest[end]}…" if rest[end:] else ""
    if scheme in _LOCAL and rest.startswith("/"):  # a path, which may have an @
        return f"{scheme}://{rest[:end]}{hidden}"
    if "@" in rest[end:]:  # a password with a mark that should have been written %3F, or a key with an @
        return f"{scheme}://…"
    user, _, address = rest[:end].rpartition("@")
    unclear = "…@" if "/" in user else ""  # a password, or a path with an @
    return f"{scheme}://{unclear}{address}{hidden}"


def _end_of_path(url: str) -> int:
    """Where the query or the fragment begins; the length of the address if it has none."""
    return len(re.split(r"[?#]", url, maxsplit=1)[0])


def shown_text(text: str) -> str:
    """``shown_place`` for all addresses in a text, such as a library's error message."""
    return re.sub(r"[a-z][a-z0-9+.-]*://[^\s'\"<>]+", lambda found: shown_place(found[0]), text, flags=re.IGNORECASE)


def shown_error(error: BaseException, *places: str) -> str:
    """The message of another library's error, without keys in addresses; its type if the message is empty.

    Args:
        error: of the library.
        places: what it was given. If ``shown_place`` hides a part of one, the library may quote that part, and in any
            form; then only the system's own words for the error are shown, or its type.
    """
    if not any(map(_hides, places)):
        return shown_text(str(error)) or type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    return os.strerror(number) if number is not None and number in errno.errorcode else type(error).__name__


def shown_cause(error: BaseException, *places: str) -> BaseException | None:
    """The cause to give to an error of ours: tracebacks show its message, so None if that may hold a key."""
    return None if any(map(_hides, places)) else error


def _hides(place: str) -> bool:
    return shown_place(place).lower() != place.lower()


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
    if _scheme(place) not in {"", *_LOCAL}:
        return None
    path = local_address(place) or Path(place).expanduser()
    if path.is_dir() or path.is_file():
        return path.absolute()
    raise RequestError(f"Source {shown_place(place)}: {path} is neither a folder, a file nor a URL.")


def local_address(url: str) -> Path | None:
    """The path that a ``file://`` address names, None if it is another kind of address.

    Raises:
        RequestError: it names a machine.
    """
    scheme = _scheme(url)
    if scheme not in _LOCAL:
        return None
    path = url[len(scheme) + len("://") :].removeprefix("localhost")
    if not path.startswith("/"):
        raise RequestError(f"{shown_place(url)}: not a path on this machine. Write {scheme}:///folder.")
    return Path(unquote(path[: _end_of_path(path)]))


def local_folder(place: str | os.PathLike[str]) -> Path:
    """The path of a folder that must be on this machine.

    Raises:
        RequestError: it is an address.
    """
    if is_remote(place):
        raise RequestError(f"{shown_place(place)}: an address cannot be used here. Give a folder on this machine.")
    return Path(place)


def _require_readable(place: str) -> None:
    if is_http(place):
        _require_host(place, f"Source {shown_place(place)}")
        return
    instead = "Give a folder, an http(s) address, or a URL that fsspec reads, such as s3://bucket/folder."
    for protocol in _scheme(place).split("::"):
        require_protocol(protocol, f"Source {shown_place(place)}", instead)


def require_address(url: str) -> None:
    """Refuse anything but a plain address, such as chained file systems and protocols that start programs.

    Raises:
        RequestError: it is not a plain address, with the reason.
    """
    scheme = _scheme(url)
    if scheme in _HTTP:
        _require_host(url, shown_place(url))
        return
    instead = "Give https://…, or one that fsspec reads, such as s3://bucket/folder."
    if scheme.startswith("pipe") or "::" in url:
        raise RequestError(f"{shown_place(url)}: not an address. {instead}")
    require_protocol(scheme, shown_place(url), instead)


def require_protocol(protocol: str, asked: str, instead: str) -> None:
    """Check that fsspec can read a protocol on this machine.

    Args:
        protocol: such as ``s3``.
        asked: what the user gave, as it may be shown.
        instead: what to give instead, for the message.

    Raises:
        RequestError: fsspec does not know the protocol, or needs a package that is missing.
    """
    import fsspec

    if not re.fullmatch(_SCHEME, protocol):
        raise RequestError(f"{asked}: not an address. {instead}")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise RequestError(f"{asked}: reading {protocol}:// needs another package. {error}") from error
    except ValueError as error:
        raise RequestError(f"{asked}: {protocol}:// is not known. {instead}") from error


def _require_host(url: str, asked: str) -> None:
    if problem := web_problem(url):
        raise RequestError(f"{asked}: an address {problem}.")


def web_problem(url: str) -> str:
    """Why an http(s) address cannot be one, such as ``with no host``; empty if nothing is wrong."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "with no host"
    try:
        _ = parts.port
    except ValueError:
        return "whose port is not a number up to 65535"
    return "" if parts.hostname else "with no host"
