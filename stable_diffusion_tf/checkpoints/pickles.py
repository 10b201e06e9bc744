"""Pickles read as data: a stack machine that can make containers and numbers, and nothing else.

Python's own unpickler imports and calls what a file names. This one knows a name only if the caller
gives it, calls only the caller's functions, and sets no attribute. All other names and opcodes are
refused before anything happens: `os.system` as well as a class that merely is not a tensor.
"""

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import Any

MAX_PICKLE = 16 * 2**20  # bytes; a checkpoint's is under one million, its tensors lie outside
MAX_STEPS = 400_000  # opcodes and copied items: bounds both memory and time
MAX_SHOWN = 100  # characters of a name in a message

# Opcodes whose argument is the value.
LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class PickleError(ValueError):
    """A pickle that is damaged, or that is more than data."""


class Skipped:
    """Stands for an object that is not rebuilt because nothing needs it."""


@dataclass(frozen=True, eq=False)
class Name:
    """A name that the pickle may say; `make` builds what calling it would, from its arguments."""

    name: str
    make: Callable[..., Any] | None = None


def ordered_dict(pairs: Any = ()) -> dict:
    """`collections.OrderedDict()`, or of a list of pairs as Python 2 wrote it."""
    if not isinstance(pairs, list | tuple) or not all(
        type(pair) in (list, tuple) and len(pair) == 2 for pair in pairs
    ):
        raise PickleError("it makes an OrderedDict of something other than pairs")
    return {_key(key): value for key, value in pairs}


def skip(*args: Any) -> Skipped:
    return Skipped()


def loads(
    data: bytes,
    names: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None = None,
) -> tuple[Any, int]:
    """Read the pickle that `data` begins with.

    Args:
        data: the pickle; what follows it is not looked at.
        names: the globals it may say, as "module name", each with the function to call in its
            place; None: it may be said, not called.
        persistent: what a persistent id stands for.

    Returns:
        What it holds, of dicts, lists, tuples, strings, bytes, numbers, None, `Name`, `Skipped` and
        what the given functions return; containers may contain themselves. And the pickle's length.

    Raises:
        PickleError: it is damaged, too large, or says anything else; the message names it.
    """
    try:
        return _run(data, names, persistent)
    except PickleError:
        raise
    except (ValueError, TypeError, IndexError, KeyError, OverflowError) as error:
        raise PickleError(f"it is damaged ({type(error).__name__})") from None


def _run(
    data: bytes,
    names: Mapping[str, Callable[..., Any] | None],
    persistent: Callable[[Any], Any] | None,
) -> tuple[Any, int]:
    known = {name: Name(name, make) for name, make in names.items()}
    stack: list[Any] = []
    marks: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    left = MAX_STEPS

    def find(name: str) -> Name:
        if name not in known:
            raise PickleError(f"it names {_shown('.'.join(name.split(' ')))}, which is no tensor")
        return known[name]

    def call(function: Any, args: Any) -> Any:
        if type(function) is not Name or function.make is None or type(args) is not tuple:
            what = function.name if type(function) is Name else type(function).__name__
            raise PickleError(f"it calls {_shown(what)}, which is no function of tensors")
        return function.make(*args)

    for opcode, arg, position in pickletools.genops(BytesIO(data)):
        left -= 1
        if left < 0:
            raise PickleError(f"it takes more than {MAX_STEPS} steps to read")
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case name if name in LITERALS:
                stack.append(arg)
            case name if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case name if name in EMPTY:
                stack.append(EMPTY[name]())
            case "MARK":
                marks.append(stack)
                stack = []
            case "POP" if stack:
                stack.pop()
            case "POP" | "POP_MARK":
                stack = marks.pop()
            case "DUP":
                stack.append(stack[-1])
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[arg])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[arg] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "TUPLE":
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            case name if name in TUPLES:
                items = [stack.pop() for _ in range(TUPLES[name])]
                stack.append(tuple(reversed(items)))
            case "LIST":
                items, stack = stack, marks.pop()
                stack.append(items)
            case "DICT":
                items, stack = stack, marks.pop()
                stack.append({})
                _set_items(stack[-1], items)
            case "APPEND":
                items = [stack.pop()]
                _of(list, stack[-1]).extend(items)
            case "APPENDS":
                items, stack = stack, marks.pop()
                _of(list, stack[-1]).extend(items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items, stack = stack, marks.pop()
                _set_items(stack[-1], items)
            case "GLOBAL":
                stack.append(find(arg))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(find(f"{_of(str, module)} {_of(str, name)}"))
            case "REDUCE" | "NEWOBJ":
                args, function = stack.pop(), stack.pop()
                copied = sum(len(a) for a in args if type(a) in (list, tuple))  # at most
                left -= len(args) + copied
                stack.append(call(function, args))
            case "BUILD":  # attributes of an OrderedDict, or of what is skipped: not needed
                stack.pop()
                if type(stack[-1]) not in (dict, Skipped):
                    raise PickleError(f"it sets the state of a {type(stack[-1]).__name__}")
            case "BINPERSID" if persistent:
                stack.append(persistent(stack.pop()))
            case "STOP":
                if len(stack) != 1 or marks:
                    raise PickleError("it is damaged (it ends early)")
                return stack[0], position + 1
            case name:
                raise PickleError(f"it uses the opcode {name}, which no tensor needs")
    raise PickleError("it is damaged (it has no end)")


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise PickleError(f"it treats a {type(value).__name__} as a {kind.__name__}")
    return value


def _set_items(target: Any, items: list[Any]) -> None:
    keys, values = items[::2], items[1::2]
    if len(keys) != len(values):
        raise PickleError("it is damaged (a key without a value)")
    _of(dict, target).update(zip(map(_key, keys), values, strict=True))


def _key(key: Any) -> Any:
    """Passes on what is fast to hash, however it was chosen: no deep tuples, no huge integers."""
    if type(key) is int and key.bit_length() <= 64:
        return key
    if type(key) in (str, bytes, bool, type(None), Name, Skipped):
        return key
    raise PickleError(f"it uses a {type(key).__name__} as a key")


def _shown(name: str) -> str:
    return ascii(name[:MAX_SHOWN])[1:-1]
