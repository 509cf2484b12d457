"""Pickles of ids: what Python and numpy write is read to the last id, and all else is refused unrun."""

from __future__ import annotations

import contextlib
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cache_spec.errors import BadInputError
from pipeline.pickled import documents

RNG = np.random.default_rng(0)
ARRAYS = [RNG.integers(0, 120, size=size) for size in (5, 1, 30, 0, 2)]
GOOD: dict[str, list[Any]] = {
    "uint16 arrays": [ids.astype(np.uint16) for ids in ARRAYS],
    "int64 arrays": list(ARRAYS),
    "big-endian arrays": [ids.astype(">i4") for ids in ARRAYS],
    "arrays of one byte": [ids.astype(np.uint8) for ids in ARRAYS],
    "lists": [ids.tolist() for ids in ARRAYS],
    "tuples": [tuple(ids.tolist()) for ids in ARRAYS],
    "numpy scalars": [list(ids) for ids in ARRAYS],
    "one array thrice": [ARRAYS[0]] * 3,
    "every other id": [np.arange(20)[::2]],
    "more than one batch": [[number] for number in range(2500)],
    "large numbers": [[2**40, -(2**63), 2**63 - 1]],
    "no document": [],
}


def write(folder: Path, data: bytes) -> Path:
    path = folder / "ids.pickle"
    path.write_bytes(data)
    return path


def read(folder: Path, data: bytes) -> list[np.ndarray[Any, Any]]:
    return list(documents(write(folder, data)))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("name", GOOD)
def test_what_python_writes_is_read(tmp_path: Path, name: str, protocol: int) -> None:
    found = read(tmp_path, pickle.dumps(GOOD[name], protocol=protocol))
    assert [ids.dtype for ids in found] == [np.dtype(np.int64)] * len(GOOD[name])
    assert [ids.tolist() for ids in found] == [list(map(int, ids)) for ids in GOOD[name]]


def test_old_and_new_names_of_numpys_functions_are_one(tmp_path: Path) -> None:
    data = pickle.dumps(GOOD["uint16 arrays"], protocol=2)
    other = (
        data.replace(b"numpy._core.", b"numpy.core.")
        if b"numpy._core." in data
        else data.replace(b".core.", b"._core.")
    )
    assert other != data
    assert [ids.tolist() for ids in read(tmp_path, other)] == [ids.tolist() for ids in ARRAYS]


class _Runs:
    """An object whose unpickling would run something."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def array_of(raw: bytes, *, shape: tuple[int, ...] = (3,), code: str = "u2") -> bytes:
    """A list of one array by hand, with whatever shape, type and content."""
    dtype = pickle.dumps(np.dtype(np.uint16), protocol=2)[2:-1].replace(b"u2", code.encode())
    body = pickle.dumps(shape, protocol=2)[2:-1]
    content = b"B" + struct.pack("<I", len(raw)) + raw
    return b"\x80\x03]" + RECONSTRUCT + b"(K\x01" + body + dtype + b"\x89" + content + b"tb" + b"a."


def test_an_array_by_hand_is_read(tmp_path: Path) -> None:
    assert read(tmp_path, array_of(b"\1\0\2\0\3\0"))[0].tolist() == [1, 2, 3]


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
MALICIOUS: dict[str, Callable[[str], bytes]] = {
    "os.system": lambda marker: pickle.dumps([_Runs(os.system, f"touch {marker}")]),
    "os.system in protocol 0": lambda marker: pickle.dumps([_Runs(os.system, f"touch {marker}")], protocol=0),
    "builtins.eval": lambda marker: pickle.dumps([_Runs(eval, f"__import__('os').mkdir('{marker}')")]),
    "os.mkdir": lambda marker: pickle.dumps([_Runs(os.mkdir, marker)]),
    "below a list": lambda marker: pickle.dumps([[1, [_Runs(os.system, f"touch {marker}")]]]),
    "posix.system by hand": lambda marker: f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode(),
    "the same by INST": lambda marker: f"(S'touch {marker}'\niposix\nsystem\n.".encode(),
    "the same by OBJ": lambda marker: f"(cposix\nsystem\nS'touch {marker}'\no.".encode(),
}
REFUSED_NAMES: dict[str, bytes] = {
    "NEWOBJ": b"cposix\nsystem\n)\x81.",
    "as an array's content": b"]" + RECONSTRUCT + b"cos\nsystem\nba.",
    "numpy.load": pickle.dumps([_Runs(np.load, "x.npy")]),
    "another of numpy's core": b"]cnumpy.core.multiarray\nfromfile\n(S'/etc/passwd'\ntRa.",
    "a dotted name": b"\x80\x04]\x8c\x05numpy\x8c\x0endarray.tofile\x93a.",
    "a name that is no text": b"\x80\x04]K\x01K\x02\x93a.",
    "a persistent id": b"]Pmarker\na.",
    "an extension code": b"]\x82\x01a.",
    "bytes of something": b"]c__builtin__\nbytes\n(K\x05tRa.",
}


@pytest.mark.parametrize("name", MALICIOUS)
def test_nothing_in_a_file_is_run(tmp_path: Path, name: str) -> None:
    marker = tmp_path / "marker"
    data = MALICIOUS[name](str(marker))
    with pytest.raises(BadInputError) as error:
        read(tmp_path, data)
    assert error.value.kind == "bad-pickle"
    assert "\n" not in str(error.value)
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the file must be one that runs when it is unpickled"


@pytest.mark.parametrize("name", REFUSED_NAMES)
def test_every_other_way_to_a_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError) as error:
        read(tmp_path, REFUSED_NAMES[name])
    assert error.value.kind == "bad-pickle"


FOREIGN: dict[str, bytes] = {
    "a dictionary": pickle.dumps({"ids": [1]}),
    "a number": pickle.dumps(3),
    "one array": pickle.dumps(np.arange(3)),
    "a tuple of arrays": pickle.dumps((np.arange(3),)),
    "numbers that are no documents": pickle.dumps([1, 2, 3]),
    "a dictionary among the documents": pickle.dumps([[1], {"ids": 2}]),
    "a set": pickle.dumps([{1, 2}]),
    "text": pickle.dumps(["a text"]),
    "bytes": pickle.dumps([b"ids"]),
    "nested lists": pickle.dumps([[[1, 2]]]),
    "lists of truths": pickle.dumps([[True, False]]),
    "lists with nothing": pickle.dumps([[1, None]]),
    "lists of reals": pickle.dumps([[1.0]]),
    "an array of reals": pickle.dumps([np.ones(3)]),
    "an array of truths": pickle.dumps([np.ones(3, bool)]),
    "an array of objects": pickle.dumps([np.array([1, "a"], dtype=object)]),
    "an array of lists": pickle.dumps([np.array([[1], [2, 3]], dtype=object)]),
    "an array of text": pickle.dumps([np.array(["a"])]),
    "an array of dates": pickle.dumps([np.array(["2020"], dtype="datetime64[s]")]),
    "a structured array": pickle.dumps([np.zeros(2, dtype=[("a", "i4")])]),
    "an array of two dimensions": pickle.dumps([np.zeros((2, 2), int)]),
    "an array of no dimension": pickle.dumps([np.array(3)]),
    "a number beyond 64 bits": pickle.dumps([[2**63]]),
    "an array beyond 63 bits": pickle.dumps([np.array([2**63], dtype=np.uint64)]),
    "a list inside itself": b"]\x94h\x00a.",
    "a list inside a list inside itself": b"\x80\x04]\x94]h\x00aa.",
    "an array without content": b"]cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tC\x01b\x87Ra.",
    "an array too short for its shape": array_of(b"\1\0"),
    "a shape of terabytes": array_of(b"\1\0", shape=(1 << 40,)),
    "a negative shape": array_of(b"", shape=(-1,)),
    "an array of a huge type": array_of(b"\1\0", shape=(1,), code="V9"),
    "two objects": b"]].",
    "nothing": b".",
    "an append to nothing": b"a.",
    "a mark alone": b"(.",
    "something forgotten": b"]h\x07a.",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_no_list_of_ids_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInputError) as error:
        read(tmp_path, FOREIGN[name])
    assert error.value.kind == "bad-pickle"


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x04]\x8e" + struct.pack("<Q", 1 << 40) + b"few",  # BINBYTES8
        b"\x80\x04]B" + struct.pack("<I", 0xFFFFFFFF) + b"few",  # BINBYTES
        b"\x80\x04]\x8d" + struct.pack("<Q", (1 << 63) - 1) + b"few",  # BINUNICODE8
        b"\x80\x05]\x96" + struct.pack("<Q", 1 << 40) + b"few",  # BYTEARRAY8
        b"\x80\x04]\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"few",  # LONG4
        b"\x80\x04]\x95" + struct.pack("<Q", 1 << 60) + b"]r" + struct.pack("<I", 0xFFFFFFFF) + b"a",  # FRAME, PUT
        b"]I" + b"9" * 10_000 + b"\na.",
    ],
)
def test_a_size_that_is_only_announced_takes_no_memory(tmp_path: Path, data: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(BadInputError) as error:
            read(tmp_path, data)
        assert tracemalloc.get_traced_memory()[1] < 1 << 21
    finally:
        tracemalloc.stop()
    assert error.value.kind == "bad-pickle"


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path, protocol: int) -> None:
    data = pickle.dumps([np.arange(3, dtype=np.uint16), [4, 5]], protocol=protocol)
    for length in range(len(data)):
        with pytest.raises(BadInputError) as error:
            read(tmp_path, data[:length])
        assert error.value.kind == "bad-pickle"


def test_a_flipped_byte_is_read_or_refused_and_never_worse(tmp_path: Path) -> None:
    data = pickle.dumps([np.arange(3, dtype=np.uint16), [4, 5]], protocol=4)
    for at in range(len(data)):
        for flip in (1, 0x40, 0xFF):
            changed = data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :]
            with contextlib.suppress(BadInputError):
                read(tmp_path, changed)


def test_memory_does_not_follow_the_number_of_documents(tmp_path: Path) -> None:
    peaks = []
    for number in (1_500, 4_500):
        data = pickle.dumps([np.full(64, index, dtype=np.uint16) for index in range(number)], protocol=4)
        assert sum(1 for op, *_ in pickletools.genops(data) if op.name == "MEMOIZE") > number
        path = write(tmp_path, data)
        del data
        tracemalloc.start()
        total = sum(int(ids[0]) for ids in documents(path))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total == number * (number - 1) // 2
    assert peaks[1] < 1.2 * peaks[0]
