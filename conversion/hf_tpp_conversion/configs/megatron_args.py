"""Megatron's args as they lie in a checkpoint or are given with --arg: typed reading, with the flag that helps."""

import ast
import re
from typing import Any

from hf_tpp.errors import ConfigurationError, UnsupportedModelError
from hf_tpp_conversion.configs.settings import Settings

__all__ = ["WHERE", "MegatronArgs", "parse_args"]

WHERE = "the args in the Megatron checkpoint"
_HINT = "supply it with --arg NAME=VALUE, or all of them with --config and the folder of a config.json"


class MegatronArgs(Settings):
    """Args, whose missing entries are answered with the flag that supplies them."""

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number.

        Raises:
            UnsupportedModelError: It is missing, or something else.
        """
        if self.get(name, default) is None:
            raise UnsupportedModelError(f"{self.where} lack {name!r}: {_HINT.replace('NAME', name)}")
        return super().integer(name, default)


def parse_args(pairs: list[str]) -> dict[str, Any]:
    """Values of NAME=VALUE texts: numbers, True, False, None, lists of them, or plain text.

    Raises:
        ConfigurationError: Not of that form.
    """
    values: dict[str, Any] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or not re.fullmatch(r"[a-z_][a-z0-9_]*", name):
            raise ConfigurationError(f"--arg {pair!r} is not of the form NAME=VALUE, such as num_layers=24")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            values[name] = text
    return values
