"""What the tests of refusals share."""

from collections.abc import Callable
from typing import Any

from torch import nn

from hf_tpp.errors import HfTppError
from tests.parity.models import tiny_model

TIMEOUT = 40.0


def gpt2(num_layers: int = 2) -> nn.Module:
    return tiny_model("gpt2", num_layers)


def failure(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Name and message of what a function raises; the package's own errors and autograd's only."""
    try:
        function(*args, **kwargs)
    except (HfTppError, RuntimeError) as error:
        return type(error).__name__, str(error)
    return "nothing", ""
