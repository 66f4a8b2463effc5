"""Pickles from strangers: arrays and plain values come out, and nothing in them ever runs."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mamldata.errors import DamagedError
from mamldata.io import pickles
from mamldata.io.pickles import Span, StoredArray, load_values

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
ARRAY = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)


def load(value: Any, protocol: int = 4) -> Any:
    return load_values(io.BytesIO(pickle.dumps(value, protocol)), "x.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_cache_of_images(protocol: int):
    """MiniImagenet's layout, in every protocol that Python has had; rows are read from where they stand."""
    stream = io.BytesIO(pickle.dumps({"image_data": ARRAY, "class_dict": {"n01": [0, 5], "n02": [7]}}, protocol))
    values = load_values(stream, "x.pkl")
    assert values["class_dict"] == {"n01": [0, 5], "n02": [7]}
    stored = values["image_data"]
    assert (stored.shape, stored.dtype) == (ARRAY.shape, np.uint8)
    assert isinstance(stored.data, Span) == (protocol >= 3), "the bytes of later protocols stay in the file"
    for start, stop in ((0, 40), (3, 4), (39, 40), (5, 5)):
        assert np.array_equal(stored.rows(stream, start, stop), ARRAY[start:stop])


def test_a_cache_by_python_2():
    """What Python 2 wrote: arrays and names are its strings."""
    # numpy.core.multiarray._reconstruct(numpy.ndarray, (0,), 'b'), with the state that NumPy gives it.
    data = ARRAY[:2].tobytes()
    pieces = [
        b"\x80\x02}q\x00U\nimage_dataq\x01cnumpy.core.multiarray\n_reconstruct\nq\x02cnumpy\nndarray\nq\x03",
        b"K\x00\x85q\x04U\x01bq\x05\x87q\x06Rq\x07(K\x01(K\x02K\x08K\x08K\x03tq\x08cnumpy\ndtype\nq\x09",
        b"U\x02u1q\x0aK\x00K\x01\x87q\x0bRq\x0c(K\x03U\x01|q\x0dNNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tq\x0eb",
        b"\x89T" + len(data).to_bytes(4, "little") + data + b"q\x0ftq\x10bs.",
    ]
    stream = io.BytesIO(b"".join(pieces))
    pickletools.dis(stream, io.StringIO())  # a well-formed one
    stream.seek(0)
    stored = load_values(stream, "x.pkl")["image_data"]
    assert np.array_equal(stored.rows(stream, 0, 2), ARRAY[:2])


@pytest.mark.parametrize("dtype", ["u1", "i1", "<u2", ">i4", "<i8", "b1"])
def test_whole_numbers_of_every_size(dtype: str):
    """Labels come as any of them."""
    array = np.arange(6).astype(dtype)
    stream = io.BytesIO(pickle.dumps(array))
    assert np.array_equal(load_values(stream, "x").rows(stream, 0, 6), array)


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
    max_leaves=20,
)


@given(PLAIN, st.sampled_from(PROTOCOLS))
def test_plain_values_come_out_as_they_went_in(value: Any, protocol: int):
    """Numbers, strings, bytes, lists, tuples and dicts, nested."""
    assert load(value, protocol) == value


def test_numbers_of_numpy():
    """A list of them is a list of numbers."""
    assert load({"a": list(np.arange(3)), "b": np.uint8(7)}) == {"a": [0, 1, 2], "b": 7}


def test_a_large_array_is_not_read(tmp_path: Path):
    """Only as much of the file is read as says where the array is."""
    path = tmp_path / "large.pkl"
    with path.open("wb") as stream:
        pickle.dump({"image_data": np.zeros((1000, 84, 84, 3), dtype=np.uint8)}, stream)

    class Counting(io.FileIO):
        count = 0

        def readinto(self, buffer: Any) -> int:
            got = super().readinto(buffer)
            Counting.count += got
            return got

        def readall(self) -> bytes:
            raise AssertionError

    with io.BufferedReader(Counting(path)) as stream:
        load_values(stream, "large.pkl")
    assert Counting.count < 100_000 < path.stat().st_size


# --- what must not run


class Call:
    """Pickles to a call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_payload_does_not_run(protocol: int, tmp_path: Path):
    """A real one: plain pickle.load makes the file, and this reader does not."""
    mark = tmp_path / "pwned"
    data = pickle.dumps({"image_data": ARRAY, "class_dict": Call(os.system, f"touch {mark}")}, protocol)
    with pytest.raises(DamagedError, match=r"evil\.pkl is refused: it names (posix|nt)\.system"):
        load_values(io.BytesIO(data), "evil.pkl")
    assert not mark.exists()
    pickle.loads(data)
    assert mark.exists(), "the payload is a real one"


@pytest.mark.parametrize(
    "value",
    [
        Call(eval, "1"),
        Call(getattr, "x", "upper"),
        Call(np.load, "x"),
        Call(np.fromstring, "x"),
        OrderedDict(a=1),
        {1, 2},
        np.array([object()]),
        np.arange(3.0),
        np.array(["text"]),
        Path("x"),
        complex(1, 2),
    ],
)
def test_everything_else_is_refused(value: Any):
    """Harmless or not: only what images and labels need."""
    with pytest.raises(DamagedError, match="Only arrays, dicts, lists and strings"):
        load({"x": value})


@pytest.mark.parametrize(
    "program",
    [
        b"cos\nsystem\n(S'true'\ntR.",  # GLOBAL, REDUCE
        b"(S'true'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'true'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x02os\x8c\x06system\x93.",  # STACK_GLOBAL
        b"Pid\n.",  # PERSID
        b"\x80\x02K\x01Q.",  # BINPERSID
        b"\x80\x02\x82\x01.",  # EXT1
        b"cnumpy\ndtype\n}(S'__class__'\nK\x01ub.",  # BUILD on a name
        b"cnumpy\nndarray\n(K\x01K\x02tR.",  # a call of what is only a name
        b"cnumpy\ndtype\nS'u1'\nR.",  # arguments that are no tuple
        b"c_codecs\nencode\n(S'x'\nS'rot13'\ntR.",
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01(K\xff\xfftcnumpy\ndtype\n(S'u1'\ntR\x89C\x00tb.",
        b".",
        b"",
        b"(((((",
        b"<html>",
    ],
)
def test_programs_written_by_hand(program: bytes):
    """Every way that the instructions have to reach code, and some nonsense."""
    with pytest.raises(DamagedError, match=r"x\.pkl is refused"):
        load_values(io.BytesIO(program), "x.pkl")


NESTED = b")" + b"2\x86" * 200  # a tuple of itself twice, 200 times: 2 to the 200 elements, in 401 bytes
HUGE = b"\x8a\xff" + b"\x7f" * 255 + b"2" * 99_999 + b"t"  # a hundred thousand numbers of 2,039 bits
DTYPE = b"cnumpy\ndtype\n"
ARRAY_OF = b"cnumpy.core.multiarray\n_reconstruct\nK\x00\x85R"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}" + NESTED + b"K\x01s.", "a dict with keys that are neither strings nor integers"),
        (b"}(" + NESTED + b"K\x01u.", "a dict with keys that are neither"),
        (b"(" + NESTED + b"K\x01d.", "a dict with keys that are neither"),
        (DTYPE + NESTED + b"\x85R.", "a tuple where a string should be"),
        (ARRAY_OF + b"(K\x01)" + NESTED + b"\x89C\x00tb.", "an array of no elements"),
        (ARRAY_OF + b"(K\x01" + NESTED + DTYPE + b"U\x02u1\x85R\x89C\x00tb.", "an invalid shape or data"),
        (ARRAY_OF + b"(K\x01(" + HUGE + DTYPE + b"U\x02u1\x85R\x89C\x00tb.", "an invalid shape or data"),
    ],
)
def test_small_pickles_that_would_take_for_ever(program: bytes, message: str):
    """They are refused before anything in them is hashed, printed or multiplied."""
    with pytest.raises(DamagedError, match=message):
        load_values(io.BytesIO(b"\x80\x02" + program), "x.pkl")


@pytest.mark.parametrize("program", [b"](K\x00K\x01u.", b"]K\x00K\x01s.", b"}(K\x00u.", b"(K\x00d."])
def test_items_of_what_is_no_dict(program: bytes):
    """A list, and a key without a value."""
    with pytest.raises(DamagedError, match="it sets the items of something that is not a dict"):
        load_values(io.BytesIO(b"\x80\x02" + program), "x.pkl")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_keys(protocol: int):
    """Strings, bytes and whole numbers, of NumPy too."""
    assert load({"a": 1, b"b": 2, 3: 3, np.int64(4): 4}, protocol) == {"a": 1, b"b": 2, 3: 3, 4: 4}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_flipped_bytes_never_crash_it(protocol: int):
    """Any byte of a cache changed: something is read, or it is said to be damaged; nothing else happens."""
    whole = pickle.dumps({"image_data": ARRAY[:1], "class_dict": {"n01": [0], "n02": list(np.arange(3))}}, protocol)
    chance = random.Random(protocol)
    for position in range(len(whole)):
        data = bytearray(whole)
        data[position] ^= 1 << chance.randrange(8)
        stream = io.BytesIO(data)
        try:
            values = load_values(stream, "x.pkl")
            for value in values.values() if isinstance(values, dict) else ():
                if isinstance(value, StoredArray):
                    value.rows(stream, 0, value.shape[0] if value.shape else 0)
        except DamagedError:
            pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_cut_off_anywhere(protocol: int):
    """A pickle that ends early is not read."""
    whole = pickle.dumps({"image_data": ARRAY, "class_dict": {"n01": [0, 5]}}, protocol)
    for length in range(0, len(whole) - 1, 97):
        with pytest.raises(DamagedError, match="is refused"):
            load_values(io.BytesIO(whole[:length]), "x.pkl")


class Shaped:
    """Pickles as an array of 8-bit numbers that claims a shape."""

    def __init__(self, *shape: int, data: bytes = b"") -> None:
        self.state = (1, shape, np.dtype(np.uint8), False, data)

    def __reduce__(self) -> Any:
        return (
            (np.core.multiarray._reconstruct if np.__version__ < "2" else np._core.multiarray._reconstruct),
            (
                np.ndarray,
                (0,),
                b"b",
            ),
            self.state,
        )


@pytest.mark.parametrize(
    "array",
    [
        Shaped(data=b"x"),
        Shaped(0, 1 << 62),
        Shaped(1 << 100, 0),
        Shaped(*[1 << 20] * 3, 0),
        Shaped(*[1] * 40, data=b"x"),
    ],
    ids=["no axis", "a long side", "a side beyond 64 bits", "long together", "many axes"],
)
def test_shapes_that_no_array_of_images_has(array: Shaped):
    """An array without an axis, or whose shape NumPy would refuse, is a clear error before it is read."""
    with pytest.raises(DamagedError, match="an array with an invalid shape or data"):
        load({"class_dict": {"n01": array}})


def test_fortran_order_is_refused():
    """Its rows are not where ours would be."""
    with pytest.raises(DamagedError, match="Fortran order"):
        load(np.asfortranarray(ARRAY))


def test_more_instructions_than_images_need(monkeypatch: pytest.MonkeyPatch):
    """Lists of one byte each take 64 of memory; images are few for the length of their pickle."""
    monkeypatch.setattr(pickles, "_FREE_READS", 1000)
    assert len(load([np.full((9000, 1), number, np.uint8) for number in range(100)])) == 100
    with pytest.raises(DamagedError, match=r"more instructions than images need \(1,\d\d\d reads\)"):
        load_values(io.BytesIO(b"]" * 9000 + b"."), "bomb.pkl")
