"""Reading values out of a config.json or Megatron's args with the types that they must have."""

from collections.abc import Mapping
from typing import Any

from hf_tpp.errors import UnsupportedModelError

__all__ = ["Settings"]


class Settings:
    """Typed access to a mapping that may come from anywhere.

    Args:
        values: The mapping.
        where: For messages.
        defaults: What a missing or null entry means.
    """

    def __init__(self, values: Mapping[str, Any], where: str, defaults: Mapping[str, Any] | None = None) -> None:
        self.values, self.where = values, where
        self._defaults = dict(defaults or {})

    def get(self, name: str, default: Any = None) -> Any:
        """The entry; a missing or null one is its default."""
        value = self.values.get(name)
        if value is None and name not in self.values:
            value = self._defaults.get(name)
        return default if value is None else value

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            UnsupportedModelError: It is missing or something else.
        """
        value = self.get(name, default)
        if type(value) is not int:
            raise UnsupportedModelError(f"{self.where} needs a whole number for {name!r}, it has {_shown(value)}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number.

        Raises:
            UnsupportedModelError: It is missing or something else.
        """
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise UnsupportedModelError(f"{self.where} needs a number for {name!r}, it has {_shown(value)}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false.

        Raises:
            UnsupportedModelError: Something else.
        """
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise UnsupportedModelError(f"{self.where} needs true or false for {name!r}, it has {_shown(value)}")
        return value

    def text(self, name: str, default: str = "") -> str:
        """A text.

        Raises:
            UnsupportedModelError: Something else.
        """
        value = self.get(name, default)
        if not isinstance(value, str):
            raise UnsupportedModelError(f"{self.where} needs a text for {name!r}, it has {_shown(value)}")
        return value

    def require(self, name: str, expected: Any, reason: str) -> None:
        """Refuse any value but one.

        Raises:
            UnsupportedModelError: The entry is something else.
        """
        if self.get(name, expected) != expected:
            raise UnsupportedModelError(f"{self.where} has {name}={_shown(self.get(name))}: {reason}")


def _shown(value: Any) -> str:
    return "nothing" if value is None else ascii(value)[:60]
