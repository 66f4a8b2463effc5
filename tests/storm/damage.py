"""Ways to damage bytes, files and JSON, for all campaigns that do so."""

from __future__ import annotations

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

ODD_NUMBERS = (
    0,
    1,
    -1,
    2,
    3,
    255,
    256,
    2**15,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    -(2**63),
    10**20,
    10**400,
)
ODD_TEXTS = (
    "", " ", "\0", "\n", "\x1b[2J", "..", "../..", "/", "/etc/passwd", "a" * 300, "é", "e\u0301", "\ud800", "train",
    "-rf", "con", "🧠", "\u202egpj", "0", "%s{}", "http://[::1", "NaN",
)  # fmt: skip
ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0.0, -0.0, 1.0, 1e308, -1.5, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [0] * 50,
    *ODD_NUMBERS, *ODD_TEXTS,
)  # fmt: skip


def damaged(data: bytes, chance: random.Random, kinds: tuple[str, ...] = ()) -> bytes:
    """Bytes with some damage: bits flipped, truncated, extended, or with parts overwritten, moved, removed or repeated.

    Args:
        data: the bytes.
        chance: the source of chance.
        kinds: the names of the kinds to choose from; all if empty.
    """
    kind = chance.choice(kinds or tuple(_KINDS))
    return _KINDS[kind](bytearray(data), chance) if data else bytes(chance.randbytes(chance.randint(1, 100)))


def _place(data: bytearray, chance: random.Random) -> int:
    """Anywhere, but often near the ends, where headers and directories are."""
    near = chance.choice((16, 64, 1024, len(data), len(data), len(data)))
    at = chance.randrange(min(near, len(data)))
    return len(data) - 1 - at if chance.random() < 0.5 else at


def _flip(data: bytearray, chance: random.Random) -> bytes:
    for _ in range(chance.choice((1, 1, 1, 2, 8))):
        data[_place(data, chance)] ^= 1 << chance.randrange(8)
    return bytes(data)


def _truncate(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data[: chance.choice((0, 1, len(data) - 1, len(data) // 2, chance.randrange(len(data))))])


def _extend(data: bytearray, chance: random.Random) -> bytes:
    size = chance.choice((1, 512, 1024, 10240, chance.randint(1, 5000)))
    tail = chance.choice((bytes(size), chance.randbytes(size), bytes(data[:size])))
    return bytes(data) + tail


def _overwrite(data: bytearray, chance: random.Random) -> bytes:
    at, size = _place(data, chance), chance.choice((1, 4, 8, 64, 512, 4096))
    size = min(size, len(data) - at)
    data[at : at + size] = chance.choice((bytes(size), b"\xff" * size, chance.randbytes(size)))
    return bytes(data)


def _number(data: bytearray, chance: random.Random) -> bytes:
    """A number of a header is another one."""
    form = chance.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(form)
    at = max(0, min(_place(data, chance), len(data) - size))
    data[at : at + size] = struct.pack(form, chance.choice(ODD_NUMBERS[:14]) % 256**size)
    return bytes(data)


def _move(data: bytearray, chance: random.Random) -> bytes:
    """Two blocks change places."""
    size = chance.choice((1, 16, 512, 4096))
    size = max(1, min(size, len(data) // 2))
    one, other = (chance.randrange(len(data) - size + 1) for _ in range(2))
    data[one : one + size], data[other : other + size] = data[other : other + size], data[one : one + size]
    return bytes(data)


def _remove(data: bytearray, chance: random.Random) -> bytes:
    at, size = _place(data, chance), chance.choice((1, 2, 16, 512, 4096))
    del data[at : at + size]
    return bytes(data)


def _repeat(data: bytearray, chance: random.Random) -> bytes:
    at, size = _place(data, chance), chance.choice((1, 2, 16, 512, 4096))
    return bytes(data[:at] + data[at : at + size] * chance.choice((2, 3, 50)) + data[at + size :])


_KINDS = {
    "flip": _flip,
    "truncate": _truncate,
    "extend": _extend,
    "overwrite": _overwrite,
    "number": _number,
    "move": _move,
    "remove": _remove,
    "repeat": _repeat,
}


def edited(value: Any, chance: random.Random) -> Any:
    """JSON with one value somewhere in it changed, removed, added or exchanged for another one."""
    value = json.loads(json.dumps(value))
    places: list[tuple[Any, Any]] = []

    def look(thing: Any, depth: int) -> None:
        pairs = thing.items() if isinstance(thing, dict) else enumerate(thing) if isinstance(thing, list) else ()
        for key, inner in pairs:
            places.extend([(thing, key)] * (8 if depth == 0 else 1))  # what is at the top is rare, and matters most
            look(inner, depth + 1)

    look(value, 0)
    if not places:
        return chance.choice(ODD_VALUES)
    holder, key = chance.choice(places)
    match chance.randrange(6):
        case 0 | 1 | 2:
            holder[key] = near(holder[key], chance)
        case 3:
            holder[key] = chance.choice(ODD_VALUES)
        case 4:
            del holder[key]
        case _:
            other, another = chance.choice(places)
            held = other[another] if another in other or (isinstance(other, list) and another < len(other)) else None
            holder[key] = json.loads(json.dumps(held))
    return value


def near(value: Any, chance: random.Random) -> Any:
    """A value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return chance.choice((value + 1, value - 1, -value, value * 2, value * 10**6, *ODD_NUMBERS, 1.0))
    if isinstance(value, float):
        return chance.choice((value / 2, -value, 0.0, 1.0, 1e300, int(value)))
    if isinstance(value, str) and value:
        at = chance.randrange(len(value))
        return chance.choice((value[:at] + chance.choice("0af/.\0é") + value[at + 1 :], value[:at], value * 2))
    if isinstance(value, list) and value:
        return chance.choice((value[:-1], value + value[:1], value[::-1], value * 2))
    return chance.choice(ODD_VALUES)


def in_the_way(path: Path, chance: random.Random) -> None:
    """Put something else in place of a file: nothing, an empty file, a folder, a link to nowhere or itself, a pipe."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    match chance.randrange(6):
        case 0:
            pass
        case 1:
            path.touch()
        case 2:
            path.mkdir()
        case 3:
            path.symlink_to("nowhere")
        case 4:
            path.symlink_to(path.name)
        case _:
            os.mkfifo(path)
