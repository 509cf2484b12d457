"""A pickle of token ids, read without unpickling: one list of 1-D integer arrays, or of lists of integers.

In: a file. Out: its documents one by one, each as int64 ids. Nothing of the file is ever imported or called: a small
stack machine of our own knows the few instructions that such a list is made of, and the names of the few numpy
functions that arrays are pickled with, as mere symbols. Whatever else stands there is refused.

A first pass notes which remembered objects are used again, so that the second holds only those: memory follows the
largest batch of documents that the file appends at once (a thousand, as Python writes them), not their number.
"""

from __future__ import annotations

import io
import pickletools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache_spec.errors import BadInputError

Ids = NDArray[np.int64]

_MAX_LINE_BYTES = 1 << 28
_MAX_STACK = 1 << 20
_EXPECTED = "one list of 1-D integer arrays, or of lists of integers"
_FUNCTIONS = {
    **{
        (f"numpy.{core}.{module}", name): name
        for core in ("core", "_core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
    # Bytes of protocols that have none; of no bytes it is a call without arguments.
    ("__builtin__", "bytes"): "bytes",
    ("builtins", "bytes"): "bytes",
}
_INTEGERS = re.compile(r"[<>=|]?([iu][1248])")
_GETS = {"GET", "BINGET", "LONG_BINGET"}
_PUTS = {"PUT", "BINPUT", "LONG_BINPUT"}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NUMBERS = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4"}
_TEXTS = {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Symbol(NamedTuple):
    """A name that an array's pickle may use; it stands for nothing."""

    name: str


class _Mark:
    """Where a run of items starts on the stack."""


class _Root:
    """The outermost list, whose items leave as they come."""


class _DType:
    """An integer type that is being described."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "="

    @property
    def numpy(self) -> np.dtype[Any]:
        return np.dtype(self.code).newbyteorder(self.order)  # type: ignore[arg-type]


class _Array:
    """An array whose content is still to come."""

    ids: Ids | None = None


def documents(path: Path) -> Iterator[Ids]:
    """Yield the documents of a pickle, each int64 [T]; BadInputError ``bad-pickle``, ``cannot-read``."""
    with _opened(path) as file:
        kept = {argument for _, name, argument in _instructions(file, path) if name in _GETS}
    with _opened(path) as file:
        machine = _Machine(path, {int(index) for index in kept})
        for at, name, argument in _instructions(file, path):
            machine.at = at
            machine.step(name, argument)
            if machine.ready:
                yield from machine.ready
                machine.ready = []


class _Machine:
    """The stack machine: each instruction changes the stack; what is appended to the root is ``ready``."""

    def __init__(self, path: Path, kept: set[int]) -> None:
        self.path, self.at = path, 0
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_remembered = 0
        self.kept = kept
        self.ready: list[Ids] = []
        self.steps: dict[str, Callable[[], None]] = {
            "MARK": lambda: self.push(_Mark()),
            "EMPTY_LIST": lambda: self.push([] if self.stack else _Root()),
            "EMPTY_TUPLE": lambda: self.push(()),
            "LIST": self._list,
            "TUPLE": lambda: self.push(tuple(self.since_mark())),
            "APPEND": lambda: self._append([self.pop()]),
            "APPENDS": lambda: self._append(self.since_mark()),
            "STACK_GLOBAL": lambda: self._symbol(*reversed((self.pop(), self.pop()))),
            "REDUCE": self._reduce,
            "BUILD": self._build,
            "STOP": self._stop,
            "MEMOIZE": lambda: self.remember(self.num_remembered),
        }

    def step(self, name: str, argument: Any) -> None:
        if name in ("PROTO", "FRAME"):
            return
        if name in _NUMBERS:
            self.push(argument)
        elif name in _CONSTANTS:
            self.push(_CONSTANTS[name])
        elif name in _TEXTS or name in _BYTES:
            self.push(bytes(argument) if name in _BYTES else argument)
        elif name in _TUPLES:
            self.push(tuple([self.pop() for _ in range(_TUPLES[name])][::-1]))
        elif name in _PUTS:
            self.remember(int(argument))
        elif name in _GETS:
            if int(argument) not in self.memo:
                raise self.refusal(f"an object that was not remembered, {argument}")
            self.push(self.memo[int(argument)])
        elif name == "GLOBAL":
            self._symbol(*argument.split(" ", 1))
        elif name in self.steps:
            self.steps[name]()
        else:
            raise self.refusal(f"the instruction {name}")

    def refusal(self, found: object) -> BadInputError:
        hint = "nothing in the file was run; make the list anew if you trust where it comes from"
        return BadInputError("bad-pickle", f"{self.path}, byte {self.at}", expected=_EXPECTED, found=found, hint=hint)

    def push(self, item: Any) -> None:
        if len(self.stack) >= _MAX_STACK:
            raise self.refusal(f"more than {_MAX_STACK:,} objects that belong to nothing yet")
        self.stack.append(item)

    def pop(self) -> Any:
        if not self.stack or isinstance(self.stack[-1], _Mark):
            raise self.refusal("an instruction without its object")
        return self.stack.pop()

    def since_mark(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if isinstance(item, _Mark):
                return items[::-1]
            items.append(item)
        raise self.refusal("an instruction without its mark")

    def remember(self, index: int) -> None:
        self.num_remembered += 1
        item = self.pop()
        self.stack.append(item)
        if index in self.kept:
            self.memo[index] = item

    def _list(self) -> None:
        items = self.since_mark()
        if self.stack:
            self.push(items)
        else:
            self.push(_Root())
            self._append(items)

    def _append(self, items: list[Any]) -> None:
        target = self.pop()
        self.stack.append(target)
        if isinstance(target, _Root):
            if len(self.stack) != 1:
                raise self.refusal("a list inside itself")
            self.ready += [self._document(item) for item in items]
        elif isinstance(target, list):
            target += items
        else:
            raise self.refusal(f"an item of {_named(target)}")

    def _document(self, item: Any) -> Ids:
        if isinstance(item, _Array):
            if item.ids is None:
                raise self.refusal("an array without its content")
            return item.ids
        if not isinstance(item, list | tuple):
            raise self.refusal(f"{_named(item)} among the documents")
        odd = [part for part in item if type(part) is not int][:1]
        if odd:
            raise self.refusal(f"{_named(odd[0])} in a list of ids")
        try:
            return np.fromiter(item, dtype=np.int64, count=len(item))
        except OverflowError:
            raise self.refusal("a number beyond 64 bits") from None

    def _symbol(self, module: Any, name: Any) -> None:
        known = _FUNCTIONS.get((module, name)) if isinstance(module, str) and isinstance(name, str) else None
        if known is None:
            raise self.refusal(f"the name {str(module)[:80]}.{str(name)[:80]}")
        self.push(_Symbol(known))

    def _reduce(self) -> None:
        arguments, function = self.pop(), self.pop()
        match function, arguments:
            case _Symbol("_reconstruct"), (_Symbol("ndarray"), (0,), (b"b" | "b")):
                self.push(_Array())
            case _Symbol("dtype"), (str() as code, *_) if _INTEGERS.fullmatch(code):
                self.push(_DType(code))
            case _Symbol("dtype"), (str() as code, *_):
                raise self.refusal(f"an array of type {code[:20]!r}")
            case _Symbol("scalar"), (_DType() as dtype, bytes() as data):
                self.push(int(self._values(data, dtype, 1)[0]))
            case _Symbol("_frombuffer"), (bytes() as data, _DType() as dtype, (int() as count,), "C" | "F"):
                self.push(array := _Array())
                array.ids = self._values(data, dtype, count)
            case _Symbol("encode"), (str() as text, "latin1" | "latin-1"):
                self.push(self._latin(text))
            case _Symbol("bytes"), ():
                self.push(b"")
            case _Symbol(name), _:
                raise self.refusal(f"{name} of something else than a 1-D integer array")
            case _:
                raise self.refusal(f"a call of {_named(function)}")

    def _build(self) -> None:
        state, target = self.pop(), self.pop()
        self.stack.append(target)
        match target, state:
            case _DType(), (3, ("<" | ">" | "|" | "=") as order, None, None, None, -1, -1, 0):
                target.order = order
            case _Array(ids=None), (1, (int() as count,), _DType() as dtype, bool() | 0 | 1, (bytes() | str()) as data):
                data = self._latin(data) if isinstance(data, str) else data
                target.ids = self._values(data, dtype, count)
            case _Array(), (_, tuple() as shape, *_) if len(shape) != 1:
                raise self.refusal(f"an array of {len(shape)} dimensions")
            case _:
                raise self.refusal(f"content that {_named(target)} cannot have")

    def _latin(self, text: str) -> bytes:
        try:
            return text.encode("latin-1")
        except UnicodeEncodeError:
            raise self.refusal("text in place of bytes") from None

    def _values(self, data: bytes, dtype: _DType, count: int) -> Ids:
        kind = dtype.numpy
        if len(data) != count * kind.itemsize:
            raise self.refusal(f"{len(data)} bytes for {count} numbers of type {kind.str}")
        values = np.frombuffer(data, dtype=kind)
        if kind.kind == "u" and kind.itemsize == 8 and values.size and values.max() >= 1 << 63:
            raise self.refusal("a number beyond 64 bits")
        return values.astype(np.int64)

    def _stop(self) -> None:
        if len(self.stack) != 1 or not isinstance(self.stack[0], _Root):
            raise self.refusal(_named(self.stack[-1]) if self.stack else "nothing")


def _named(item: object) -> str:
    if isinstance(item, _Symbol):
        return f"the name {item.name}"
    kinds: dict[type, str] = {_Array: "an array", _DType: "a type", _Root: "the list itself", _Mark: "a mark"}
    return kinds.get(type(item), f"a value of type {type(item).__name__}")


class _Bounded(io.RawIOBase):
    """A file for ``pickletools``: a read of more than there is fails before memory is taken for it."""

    def __init__(self, file: io.BufferedReader, num_bytes: int) -> None:
        self.file, self.num_bytes, self.at = file, num_bytes, 0

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= self.num_bytes - self.at:
            raise ValueError(f"{size} bytes announced, {self.num_bytes - self.at} left")
        self.at += size
        return self.file.read(size)

    def readline(self, size: int | None = -1) -> bytes:
        line = self.file.readline(_MAX_LINE_BYTES)
        if not line.endswith(b"\n"):
            raise ValueError("a line that does not end")
        self.at += len(line)
        return line

    def tell(self) -> int:
        return self.at


@contextmanager
def _opened(path: Path) -> Iterator[_Bounded]:
    try:
        with path.open("rb") as file:
            num_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            yield _Bounded(file, num_bytes)
    except OSError as error:
        raise BadInputError("cannot-read", path, found=error.strerror) from error


def _instructions(file: _Bounded, path: Path) -> Iterator[tuple[int, str, Any]]:
    """Byte, name and argument of each instruction; a file that ends early or makes no sense is refused."""
    stream = pickletools.genops(file)  # type: ignore[arg-type]
    while True:
        try:
            opcode, argument, at = next(stream)
        except StopIteration:
            return
        except (ValueError, UnicodeError, OverflowError, MemoryError) as error:
            raise BadInputError(
                "bad-pickle", f"{path}, byte {file.at}", expected=_EXPECTED, found=error or "too large"
            ) from None
        if isinstance(argument, int) and argument.bit_length() > 64:
            raise BadInputError("bad-pickle", f"{path}, byte {at}", expected=_EXPECTED, found="a number beyond 64 bits")
        yield at or 0, opcode.name, argument
