"""Pickles, read as data: nothing is imported, nothing is called.

The pickle language is a list of instructions for a small machine. This is such a machine without the two instructions
that matter to an attacker: a global is its name (`Global`), and a call is a record of the call (`Call`). What the
record means is decided by the reader of a format, which knows a short list of names and ignores all others.

    c torch._utils _rebuild_tensor_v2   ->  Global("torch._utils", "_rebuild_tensor_v2")
    R                                   ->  Call(Global(...), args)
    b                                   ->  Call.state = ...
    Q  (a persistent id)                ->  PersistentId(...)

Python's own unpickler is not used even with `find_class` overridden: three bytes can make its memo table take
gigabytes, and calls made through a global that is on an allow-list have been turned into code before.
"""

import gc
from typing import Any

from hf_tpp.errors import CheckpointError
from hf_tpp_conversion.files.pickle_machine import run

__all__ = ["MAX_PICKLE_BYTES", "read_pickle"]

MAX_PICKLE_BYTES = 32 * 2**20


def read_pickle(content: bytes, where: str) -> Any:
    """Read one pickle of protocol 2 to 5.

    Args:
        content: The pickle.
        where: For messages.

    Returns:
        Plain containers, numbers and texts; `Global`, `Call` and `PersistentId` for anything else. An `OrderedDict` and
        a set are built, being plain.

    Raises:
        CheckpointError: Not a pickle, too large, or with instructions that no checkpoint needs.
    """
    if len(content) > MAX_PICKLE_BYTES:
        raise CheckpointError(f"{where} holds a pickle of {len(content)} bytes, at most {MAX_PICKLE_BYTES} are read")
    collects = gc.isenabled()
    gc.disable()  # a million new containers would be searched for cycles again and again
    try:
        return run(content, where)
    except CheckpointError:
        raise
    except (ValueError, IndexError, TypeError, KeyError, OverflowError, RecursionError, AttributeError) as error:
        raise CheckpointError(
            f"{where} is no valid pickle ({type(error).__name__}: {str(error)[:200]!r}): it is damaged, copy it again"
        ) from error
    finally:
        if collects:
            gc.enable()
