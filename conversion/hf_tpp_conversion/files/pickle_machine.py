"""A machine for the instructions of pickles that has none that imports or calls anything."""

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.pickle_values import Call, Global, PersistentId

__all__ = ["run"]

_MAX_OPERATIONS = 1_000_000  # a 405B model with its optimizer state, cut over 8 x 16 ranks, has about 900,000
_MAX_STACK = 100_000  # writers add to a list or dict every 1,000 items; only the items of a long tuple pile up
_MAX_SETS = 10_000


class _Mark:
    """Where a tuple, list or dict began on the stack."""


_MARK = _Mark()


def run(content: bytes, where: str) -> Any:
    """Follow the instructions of a pickle.

    Args:
        content: The pickle; its size is the caller's to limit.
        where: For messages.

    Raises:
        CheckpointError: Instructions that no checkpoint needs, or too many.
        ValueError, IndexError, TypeError, KeyError, OverflowError, AttributeError: It is damaged.
    """
    return _Machine(where).run(content)


class _Machine:
    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.num_sets = 0

    def run(self, content: bytes) -> Any:
        stack, stream, position = self.stack, io.BytesIO(content), 0
        for _ in range(_MAX_OPERATIONS):
            if position >= len(content):
                raise ValueError("pickle exhausted before seeing STOP")
            code = content[position]
            position += 1
            simple = _SIMPLE.get(code)
            if simple is not None:
                simple(self, None)
            elif code == _STOP:
                return stack.pop()
            else:
                stream.seek(position)
                self._follow(code, stream)
                position = stream.tell()
            if len(stack) > _MAX_STACK:
                raise CheckpointError(f"{self.where} piles up more than {_MAX_STACK} values in its pickle: refused")
        raise CheckpointError(f"{self.where} has more than {_MAX_OPERATIONS} pickle instructions: refused")

    def _follow(self, code: int, stream: io.BytesIO) -> None:
        """An instruction with an argument, or one that is refused."""
        opcode = _OPCODES.get(code)
        if opcode is None:
            raise ValueError(f"byte {code:#04x} is no instruction")
        argument = opcode.arg.reader(stream) if opcode.arg is not None else None
        if opcode.name not in _PUSHES and opcode.name not in _OPERATIONS:
            raise CheckpointError(f"{self.where} has the pickle instruction {opcode.name}, which no checkpoint needs")
        if opcode.name in _PUSHES:
            self.stack.append(argument)
        else:
            _OPERATIONS[opcode.name](self, argument)

    def pop_to_mark(self) -> list[Any]:
        items = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def get(self, argument: Any) -> None:
        self.stack.append(self.memo[argument])

    def put(self, argument: Any) -> None:
        self.memo[argument] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def short_tuple(self, size: int) -> None:
        items = [self.stack.pop() for _ in range(size)]
        self.stack.append(tuple(items[::-1]))

    def global_(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Global(module, name))

    def stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(str(module), str(name)))

    def call(self, _: Any) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):  # a list could be made to contain its own call
            raise TypeError(f"a call with a {type(args).__name__} of arguments")
        made: Any = Call(function, args)
        if isinstance(function, Global):
            if str(function) == "collections.OrderedDict" and not args:
                made = OrderedDict()
            elif function.module in ("builtins", "__builtin__") and function.name == "set":
                made = {_key(item) for item in (args[0] if args else ())}
        self.stack.append(made)

    def persistent_id(self, _: Any) -> None:
        self.stack.append(PersistentId(self.stack.pop()))

    def build(self, _: Any) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Call):
            target.state = state
        # An OrderedDict with attributes (torch's `_metadata` of a state dict) is as good without them.

    def set_item(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._add_pairs([key, value])

    def set_items(self, _: Any) -> None:
        self._add_pairs(self.pop_to_mark())

    def _add_pairs(self, flat: list[Any]) -> None:
        target = self.stack[-1]
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        if isinstance(target, Call):
            target.items.extend(pairs)
            return
        for key, value in pairs:
            if _key(key) in target and isinstance(key, str):
                raise CheckpointError(f"{self.where} names {key[:100]!r} twice: it is damaged or malicious")
            target[key] = value

    def append(self, _: Any) -> None:
        item = self.stack.pop()
        self._extend([item])

    def extend(self, _: Any) -> None:
        self._extend(self.pop_to_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Call) else target).extend(items)

    def add_items(self, _: Any) -> None:
        items = [_key(item) for item in self.pop_to_mark()]
        target = self.stack[-1]
        (target.items.extend if isinstance(target, Call) else target.update)(items)

    def pop(self, _: Any) -> None:
        self.stack.pop()

    def new_with_keywords(self, _: Any) -> None:
        keywords, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.stack.append(Call(function, (*args, keywords)))

    def frozen_set(self, _: Any) -> None:
        self.stack.append(frozenset(_key(item) for item in self.pop_to_mark()))

    def make_list(self, _: Any) -> None:
        self.stack.append(self.pop_to_mark())

    def make_dict(self, _: Any) -> None:
        items = self.pop_to_mark()
        self.stack.append({})
        self._add_pairs(items)

    def make_set(self, _: Any) -> None:
        self.num_sets += 1
        if self.num_sets > _MAX_SETS:  # an empty one takes 216 bytes of memory, and one of the file
            raise CheckpointError(f"{self.where} has more than {_MAX_SETS} sets: refused")
        self.stack.append(set())

    def nothing(self, _: Any) -> None:
        pass


def _key(value: Any) -> Any:
    """A value that may become a key. Tuples may not: hashing nested ones can take forever."""
    if value is None or isinstance(value, (str, bytes, int, float, Call, Global)):
        return value
    raise TypeError(f"a {type(value).__name__} as a key")


# Instructions whose argument is the value.
_PUSHES = frozenset(
    (
        "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT",
        "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINBYTES", "BINBYTES",
        "BINBYTES8", "SHORT_BINSTRING", "BINSTRING", "BYTEARRAY8",
    )
)  # fmt: skip


# Instructions that push a value of their own.
_CONSTANTS: dict[str, Callable[[_Machine, Any], None]] = {
    "NONE": lambda machine, _: machine.stack.append(None),
    "NEWTRUE": lambda machine, _: machine.stack.append(True),
    "NEWFALSE": lambda machine, _: machine.stack.append(False),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_TUPLE": lambda machine, _: machine.stack.append(()),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
}


_OPERATIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.nothing,
    "FRAME": _Machine.nothing,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.short_tuple(1),
    "TUPLE2": lambda machine, _: machine.short_tuple(2),
    "TUPLE3": lambda machine, _: machine.short_tuple(3),
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "GLOBAL": _Machine.global_,
    "STACK_GLOBAL": _Machine.stack_global,
    "REDUCE": _Machine.call,
    "NEWOBJ": _Machine.call,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BINPERSID": _Machine.persistent_id,
    "BUILD": _Machine.build,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.extend,
    "ADDITEMS": _Machine.add_items,
    "FROZENSET": _Machine.frozen_set,
    "EMPTY_SET": _Machine.make_set,
    "POP": _Machine.pop,
}


_OPCODES = {ord(opcode.code): opcode for opcode in pickletools.opcodes}
_STOP = ord(pickle.STOP)
# Most instructions have no argument: they are found by their byte alone.
_SIMPLE = {
    code: (_CONSTANTS | _OPERATIONS)[opcode.name]
    for code, opcode in _OPCODES.items()
    if opcode.arg is None and opcode.name in _CONSTANTS | _OPERATIONS
}
