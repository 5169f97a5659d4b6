"""Pickles, written from the same inert values that `pickles.py` reads: the inverse of `read_pickle`.

Python's pickler needs the classes that it names; here a `Call` of a `Global` is enough, so that files for torch and
Megatron are written without importing either.
"""

import struct
from argparse import Namespace
from collections import OrderedDict
from typing import Any

from hf_tpp_conversion.files.pickle_values import Call, Global, PersistentId

__all__ = ["write_pickle"]

_INT32 = range(-(2**31), 2**31)


def write_pickle(value: Any) -> bytes:
    """A pickle (protocol 2) of plain containers, numbers and texts, `Global`, `Call`, `PersistentId` and `Namespace`.

    Raises:
        TypeError: Anything else: a bug of the caller, not of the file.
    """
    out = bytearray(b"\x80\x02")
    _Emitter(out).emit(value)
    out += b"."
    return bytes(out)


class _Emitter:
    def __init__(self, out: bytearray) -> None:
        self.out = out
        self.globals: dict[str, int] = {}

    def emit(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self.out += b"N" if value is None else (b"\x88" if value else b"\x89")
        elif isinstance(value, int):
            self._integer(value)
        elif isinstance(value, float):
            self.out += b"G" + struct.pack(">d", value)
        elif isinstance(value, str):
            text = value.encode("utf-8", "surrogatepass")
            self.out += b"X" + struct.pack("<I", len(text)) + text
        elif isinstance(value, bytes):
            # Protocol 2 has no instruction for bytes.
            self.emit(Call(Global("_codecs", "encode"), (value.decode("latin-1"), "latin1")))
        elif isinstance(value, (tuple, list, dict)):
            self._container(value)
        else:
            self._object(value)

    def _integer(self, value: int) -> None:
        if value in _INT32:
            self.out += b"J" + struct.pack("<i", value)
        else:
            size = value.bit_length() // 8 + 1
            self.out += b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)

    def _container(self, value: Any) -> None:
        if isinstance(value, tuple):
            self.out += b"("
            for item in value:
                self.emit(item)
            self.out += b"t"
            return
        if isinstance(value, list):
            self.out += b"]("
            for item in value:
                self.emit(item)
            self.out += b"e"
            return
        if isinstance(value, OrderedDict):
            self._global(Global("collections", "OrderedDict"))
            self.out += b")R"
        else:
            self.out += b"}"
        self._pairs(value.items())

    def _pairs(self, pairs: Any) -> None:
        self.out += b"("
        for key, item in pairs:
            self.emit(key)
            self.emit(item)
        self.out += b"u"

    def _object(self, value: Any) -> None:
        if isinstance(value, Global):
            self._global(value)
        elif isinstance(value, PersistentId):
            self.emit(value.value)
            self.out += b"Q"
        elif isinstance(value, Namespace):
            self.emit(_object_with(Global("argparse", "Namespace"), vars(value)))
        elif isinstance(value, Call):
            self.emit(value.function)
            self.emit(value.args)
            self.out += b"\x81" if value.state is not None else b"R"
            if value.state is not None:
                self.emit(value.state)
                self.out += b"b"
        else:
            raise TypeError(f"{type(value)} cannot be written into a checkpoint")

    def _global(self, value: Global) -> None:
        """A name once in full, then by reference: torch's allow-lists look at every mention."""
        if str(value) in self.globals:
            self.out += b"j" + struct.pack("<I", self.globals[str(value)])
            return
        self.globals[str(value)] = number = len(self.globals)
        self.out += b"c" + f"{value.module}\n{value.name}\n".encode() + b"r" + struct.pack("<I", number)


def _object_with(cls: Global, state: dict[str, Any]) -> Call:
    """The record of an instance of `cls`, made without arguments, with these attributes."""
    made = Call(cls, ())
    made.state = state
    return made
