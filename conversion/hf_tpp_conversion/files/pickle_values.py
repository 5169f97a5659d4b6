"""What stands in a pickle for things of Python: inert records, written as they are read."""

from typing import Any

__all__ = ["Call", "Global", "PersistentId"]


class Global:
    """The name of a class or function; never the thing itself."""

    __slots__ = ("module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Call:
    """An object that the pickle would have built: what was to be called, with which arguments and state.

    Attributes:
        function: What was to be called.
        args: With these.
        state: Attributes set afterwards (a dict, if the pickle is well formed), or None.
        items: Key-value pairs and list elements added afterwards.
    """

    __slots__ = ("args", "function", "items", "state")

    def __init__(self, function: Any, args: Any) -> None:
        self.function, self.args = function, args
        self.state: Any = None
        self.items: list[Any] = []

    @property
    def name(self) -> str:
        """Full name of what was to be called."""
        return str(self.function)


class PersistentId:
    """A reference to something outside the pickle; in torch's files, a storage."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value
