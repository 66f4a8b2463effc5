"""Read untrusted pickles: plain values and arrays only, and nothing in them is ever executed.

A pickle is a program. This reader knows only the instructions that make numbers, strings, lists, tuples and dicts, and
the six calls by which NumPy describes an array; every other instruction or name is refused. Those calls are not made
either: stand-ins record their arguments. The bytes of large arrays are not read; their offsets are recorded, so that
a pickle larger than memory can be read row by row.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import IO, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mamldata.errors import DamagedError

_LARGE = 1 << 8  # bytes; data of this length or more stays in the file
_MOST_AXES = 32  # what all versions of NumPy allow
_MOST_ELEMENTS = 1 << 48  # in an array


@dataclass(frozen=True)
class Span:
    """A range of bytes in the file, not read yet."""

    offset: int
    size: int


class StoredArray:
    """An array in a pickle.

    Attributes:
        shape: as pickled.
        dtype: whole numbers of a fixed size.
        data: the elements in C order: bytes, or where they stand in the file.
    """

    def __init__(self) -> None:
        self.shape: tuple[int, ...] = (0,)
        self.dtype = np.dtype(np.uint8)
        self.data: bytes | Span = b""

    def fill(self, shape: Any, dtype: Any, data: Any, *, fortran: bool = False) -> StoredArray:
        """Set the array's content.

        Raises:
            pickle.UnpicklingError: shape, dtype and data do not fit together.
        """
        if not isinstance(dtype, _DType) or dtype.known is None:
            what = f"elements {dtype.code!r}" if isinstance(dtype, _DType) else "no elements"
            raise pickle.UnpicklingError(f"an array of {what}; only whole numbers are read")
        if isinstance(data, str):  # Python 2's strings
            data = data.encode("latin-1")
        sides = shape if isinstance(shape, tuple) and 0 < len(shape) <= _MOST_AXES else (None,)
        whole = all(isinstance(side, int) and 0 <= side < _MOST_ELEMENTS for side in sides)
        # NumPy multiplies the other sides of an empty array, too.
        fits = whole and math.prod(max(side, 1) for side in sides) < _MOST_ELEMENTS
        if not fits or not isinstance(data, bytes | bytearray | Span):
            raise pickle.UnpicklingError("an array with an invalid shape or data")
        if fortran and len(shape) > 1:
            raise pickle.UnpicklingError("an array in Fortran order; store it again in C order")
        size = data.size if isinstance(data, Span) else len(data)
        if size != math.prod(shape) * dtype.known.itemsize:
            raise pickle.UnpicklingError(f"an array of shape {shape} with {size:,} bytes")
        self.shape, self.dtype = shape, dtype.known
        self.data = data if isinstance(data, Span) else bytes(data)
        return self

    def rows(self, stream: IO[bytes], start: int, stop: int) -> npt.NDArray[Any]:
        """Rows ``start`` to ``stop - 1`` of the first axis, read from the pickle's file.

        Raises:
            DamagedError: the file was truncated meanwhile.
        """
        stride = math.prod(self.shape[1:]) * self.dtype.itemsize
        if isinstance(self.data, Span):
            stream.seek(self.data.offset + start * stride)
            data = stream.read((stop - start) * stride)
        else:
            data = self.data[start * stride : stop * stride]
        if len(data) != (stop - start) * stride:
            raise DamagedError("the pickle was truncated while it was read")
        return np.frombuffer(data, self.dtype).reshape(stop - start, *self.shape[1:])


def load_values(stream: IO[bytes], name: str) -> Any:
    """Load a pickle: numbers, strings, bytes, lists, tuples, dicts, and a ``StoredArray`` for each array.

    Args:
        stream: the pickle, seekable, at its beginning.
        name: its name, for messages.

    Raises:
        DamagedError: it is not a pickle, is damaged, or has something other than plain values and arrays.
    """
    try:
        return _Reader(stream).load()
    except (pickle.UnpicklingError, *_DAMAGE) as error:
        raise DamagedError(
            f"{name} is refused: {error or type(error).__name__}. Only arrays, dicts, lists and strings are read "
            "from pickles; anything else could run a program."
        ) from error


# What the reader raises on bytes that are not a pickle.
_DAMAGE = (
    EOFError,
    ValueError,
    KeyError,
    IndexError,
    TypeError,
    AttributeError,
    OverflowError,
    struct.error,
    MemoryError,
    RecursionError,
)


_ELEMENTS = frozenset({"b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8"})


class _DType:
    """NumPy's description of an element, as the pickle gives it."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.order = "|"

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 2:
            raise pickle.UnpicklingError("a dtype with an invalid state")
        self.order = _text(state[1])

    @property
    def known(self) -> np.dtype[Any] | None:
        """The dtype if it is integer or boolean, else None."""
        good = self.code in _ELEMENTS and self.order in {"<", ">", "|", "="}
        return np.dtype(self.order + self.code) if good else None


def _text(value: Any) -> str:
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not isinstance(text, str):
        raise pickle.UnpicklingError(f"a {type(value).__name__} where a string should be")
    return text


@dataclass(frozen=True)
class _Name:
    """A name that a pickle imports: only a marker, which ``REDUCE`` looks up."""

    call: Callable[..., Any] | None


def _new_array(_kind: Any, *_: Any) -> StoredArray:
    return StoredArray()


def _new_dtype(code: Any, *_: Any) -> _DType:
    return _DType(_text(code))


def _from_buffer(data: Any, dtype: Any, shape: Any, order: Any, *_: Any) -> StoredArray:
    return StoredArray().fill(shape, dtype, data, fortran=_text(order) == "F")


def _scalar(dtype: Any, data: Any) -> int:
    array = StoredArray().fill((1,), dtype, data)
    return int(array.rows(io.BytesIO(), 0, 1)[0])


def _encode(text: Any, encoding: Any) -> bytes:
    # Python 3 writes bytes this way in the protocols of Python 2.
    if not isinstance(text, str) or encoding != "latin1":
        raise pickle.UnpicklingError("a call of codecs.encode for something other than plain bytes")
    return text.encode("latin-1")


def _no_bytes() -> bytes:
    # Empty bytes are written as a call of ``bytes``.
    return b""


_NUMPY = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_NAMES: Mapping[tuple[str, str], _Name] = {
    **{(module, "_reconstruct"): _Name(_new_array) for module in _NUMPY},
    **{(module, "scalar"): _Name(_scalar) for module in _NUMPY},
    **{(module, "_frombuffer"): _Name(_from_buffer) for module in _NUMERIC},
    ("numpy", "ndarray"): _Name(None),
    ("numpy", "dtype"): _Name(_new_dtype),
    ("_codecs", "encode"): _Name(_encode),
    ("__builtin__", "bytes"): _Name(_no_bytes),
}

_PLAIN = """
    PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 FLOAT BINFLOAT
    STRING SHORT_BINSTRING SHORT_BINBYTES UNICODE SHORT_BINUNICODE BINUNICODE EMPTY_LIST APPEND APPENDS LIST EMPTY_TUPLE
    TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS GET BINGET LONG_BINGET PUT BINPUT LONG_BINPUT MEMOIZE
    GLOBAL STACK_GLOBAL
"""


# A one-byte instruction may take a hundred bytes of memory. Pickles of images have few instructions for their length:
# those of tieredImageNet take 50 reads per image of about 16 kB, 22 million in all.
_FREE_READS = 1 << 21
_BYTES_A_READ = 1 << 7
_MOST_READS = 1 << 25


class _Counted:
    """A stream that allows at most ``most`` reads; an instruction takes one or two."""

    def __init__(self, stream: IO[bytes], most: int) -> None:
        self.stream, self.most, self.left = stream, most, most

    def read(self, size: int) -> bytes:
        self._count()
        return self.stream.read(size)

    def readline(self) -> bytes:
        self._count()
        return self.stream.readline()

    def _count(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise pickle.UnpicklingError(f"it has more instructions than images need ({self.most:,} reads)")


class _Reader(pickle._Unpickler):
    """Python's own pure-Python unpickler, reduced to the plain instructions.

    An instruction that is not in ``dispatch`` raises a ``KeyError`` with its byte.
    """

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in (getattr(pickle, name) for name in _PLAIN.split())
    }
    # What the instructions work on; the base class sets them.
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.size = stream.seek(0, os.SEEK_END)
        stream.seek(0)
        counted = _Counted(stream, min(_MOST_READS, _FREE_READS + self.size // _BYTES_A_READ))
        # Strings of Python 2 may be bytes, such as an array's data.
        super().__init__(counted, encoding="latin-1")

    def load(self) -> Any:
        try:
            return super().load()
        except KeyError as error:
            code = error.args[0] if error.args else None
            if isinstance(code, int):
                raise pickle.UnpicklingError(f"it has the instruction {bytes([code % 256])!r}") from error
            raise

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it names {module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to an object {pid!r} that is not in it")

    def load_frame(self) -> None:
        # A frame only says how much to read ahead, which may be all of a large file.
        self.read(8)

    dispatch[pickle.FRAME[0]] = load_frame

    def load_reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack[-1]
        if not isinstance(called, _Name) or called.call is None or not isinstance(arguments, tuple):
            raise pickle.UnpicklingError("it calls something that is not a function")
        self.stack[-1] = called.call(*arguments)

    dispatch[pickle.REDUCE[0]] = load_reduce

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StoredArray) and isinstance(state, tuple) and len(state) == 5:
            _, shape, dtype, fortran, data = state
            target.fill(shape, dtype, data, fortran=bool(fortran))
        elif isinstance(target, _DType):
            target.set_state(state)
        else:
            raise pickle.UnpicklingError("it sets the state of something that is not an array")

    dispatch[pickle.BUILD[0]] = load_build

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._set_items([key, value])

    def load_setitems(self) -> None:
        self._set_items(self.pop_mark())

    def load_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_items(self, items: list[Any]) -> None:
        # Nested tuples, each twice in the next, are a few bytes but take practically forever to hash.
        if not all(isinstance(key, str | bytes | int) for key in items[::2]):
            raise pickle.UnpicklingError("a dict with keys that are neither strings nor integers")
        target = self.stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise pickle.UnpicklingError("it sets the items of something that is not a dict")
        target.update(zip(items[::2], items[1::2], strict=True))

    dispatch[pickle.SETITEM[0]] = load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems
    dispatch[pickle.DICT[0]] = load_dict

    def _load_bytes(self, layout: str) -> None:
        (size,) = struct.unpack(layout, self.read(struct.calcsize(layout)))
        start = self.stream.tell()
        if not 0 <= size <= self.size - start:
            raise EOFError(f"it is truncated: {size:,} bytes should follow, but only {self.size - start:,} are left")
        if size < _LARGE:
            self.append(self.read(size))
        else:
            self.stream.seek(start + size)
            self.append(Span(start, size))

    def load_binstring(self) -> None:
        self._load_bytes("<i")

    def load_binbytes(self) -> None:
        self._load_bytes("<I")

    def load_binbytes8(self) -> None:
        self._load_bytes("<Q")

    dispatch[pickle.BINSTRING[0]] = load_binstring
    dispatch[pickle.BINBYTES[0]] = load_binbytes
    dispatch[pickle.BINBYTES8[0]] = load_binbytes8
    dispatch[pickle.BYTEARRAY8[0]] = load_binbytes8
