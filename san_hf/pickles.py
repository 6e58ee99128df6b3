"""The data in a pickle, without unpickling it: nothing is imported, called or allocated because a pickle says so.

Memory and time are bounded by the pickle's length. Objects come out as [`Call`], classes and functions as [`Name`].
"""

import pickletools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple


class Name(NamedTuple):
    """A class or function that the pickle wants imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call(NamedTuple):
    """An object that the pickle wants made: of what, and from which arguments."""

    function: Any
    arguments: Any


class Stored(NamedTuple):
    """What the pickle takes from beside it, such as a tensor's numbers: its persistent id."""

    key: Any


@dataclass
class Contents:
    """
    What a pickle holds.

    Attributes:
        value: the pickled value, of lists, dictionaries, tuples, texts, numbers, `None`, [`Name`], [`Call`] and
            [`Stored`]. Bytes are left out: `None` stands for them.
        names: all that it wants imported.
        calls: all objects that it wants made.
        stored: all that it takes from beside it.
    """

    value: Any
    names: set[Name]
    calls: list[Call]
    stored: list[Stored]


_MARK = object()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_BYTES = {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}


def read_pickle(stream: IO[bytes]) -> Contents:
    """
    Reads one pickle; the stream is left behind it.

    Raises:
        ValueError: it is no pickle, is cut short, or has parts that no data needs: sets, extensions, keys that are
            neither texts nor numbers.
    """
    contents = Contents(None, set(), [], [])
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    try:
        for code, argument, _ in pickletools.genops(stream):
            _step(code.name, argument, stack, memo, contents)
        (contents.value,) = stack
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError(f"not a pickle of data ({str(error) or type(error).__name__})") from error
    return contents


def _step(code: str, argument: Any, stack: list, memo: dict[int, Any], contents: Contents) -> None:
    """One instruction."""
    if code in ("PROTO", "FRAME"):
        pass
    elif code == "STOP":
        del stack[:-1]
    elif code == "MARK":
        stack.append(_MARK)
    elif code in _CONSTANTS:
        stack.append(_CONSTANTS[code])
    elif code in _BYTES:
        stack.append(None)
    elif code in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif code == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif code in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif code == "DUP":
        stack.append(stack[-1])
    elif code == "POP":
        stack.pop()
    elif code == "POP_MARK":
        _pop_to_mark(stack)
    elif code == "TUPLE":
        stack.append(tuple(_pop_to_mark(stack)))
    elif code in _TUPLES:
        stack[-_TUPLES[code] :] = [tuple(stack[-_TUPLES[code] :])]
    elif code == "EMPTY_LIST":
        stack.append([])
    elif code == "LIST":
        stack.append(_pop_to_mark(stack))
    elif code in ("APPEND", "APPENDS"):
        items = [stack.pop()] if code == "APPEND" else _pop_to_mark(stack)
        if isinstance(stack[-1], list):  # or an object, whose items don't matter
            stack[-1].extend(items)
    elif code == "EMPTY_DICT":
        stack.append({})
    elif code == "DICT":
        items = _pop_to_mark(stack)
        stack.append({})
        _set_items(stack[-1], items)
    elif code in ("SETITEM", "SETITEMS"):
        items = [stack.pop(-2), stack.pop()] if code == "SETITEM" else _pop_to_mark(stack)
        _set_items(stack[-1], items)
    elif code == "BUILD":
        stack.pop()
    elif code in ("GLOBAL", "STACK_GLOBAL"):
        module, name = argument.split(" ", 1) if code == "GLOBAL" else (stack.pop(-2), stack.pop())
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        stack.append(Name(module, name))
        contents.names.add(stack[-1])
    elif code in ("REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"):
        stack.append(_call(code, argument, stack, contents))
    elif code in ("BINPERSID", "PERSID"):
        stack.append(Stored(argument if code == "PERSID" else stack.pop()))
        contents.stored.append(stack[-1])
    elif isinstance(argument, str | int | float) and not code.startswith("EXT"):
        stack.append(argument)
    else:
        raise ValueError(f"the instruction {code}")


def _call(code: str, argument: str, stack: list, contents: Contents) -> Call:
    if code == "INST":
        function: Any = Name(*argument.split(" ", 1))
        contents.names.add(function)
        call = Call(function, tuple(_pop_to_mark(stack)))
    elif code == "OBJ":
        function, *arguments = _pop_to_mark(stack)
        call = Call(function, tuple(arguments))
    else:
        if code == "NEWOBJ_EX":
            stack.pop()  # arguments by name
        arguments = stack.pop()
        call = Call(stack.pop(), arguments)
    contents.calls.append(call)
    return call


def _pop_to_mark(stack: list) -> list:
    items: list[Any] = []
    while (item := stack.pop()) is not _MARK:
        items.append(item)
    return items[::-1]


def _set_items(target: Any, items: list) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in _pairs(items):
        # The hash of a tuple of tuples can take for ever.
        if not isinstance(key, str | int | float | None):
            raise ValueError("a key that is neither a text nor a number")
        if isinstance(target, dict):
            target[key] = value
    # Items of an object, such as an ordered dictionary: those that are needed are looked up in its calls.


def _pairs(items: list) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2])
