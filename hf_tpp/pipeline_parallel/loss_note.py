"""The loss of the tokens, apart from what a model adds to it (router losses, z-losses).

Over the microbatches of a batch the losses of the tokens add up: each is divided by the tokens of the whole batch.
What a model adds to each of them is a mean of its own, so that those must be averaged.
"""

import ast
import inspect
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_tpp.errors import UnsupportedModelError

__all__ = ["LossNote", "counts_tokens"]

_ADDS = re.compile(r"\bloss\s*\+=|\bloss\s*=\s*loss\s*\+|\+\s*loss\b")


@dataclass(slots=True)
class LossNote:
    """Stands in for a model's loss function and notes its value.

    Attributes:
        function: The loss function; None if nothing is noted.
        value: What it returned last.
        num_calls: How often it was called.
    """

    function: Callable[..., torch.Tensor] | None = None
    value: torch.Tensor | None = None
    num_calls: int = 0

    @classmethod
    def install(cls, model: nn.Module) -> "LossNote":
        """Put a note in place of the loss function of a model that adds to its value."""
        function = getattr(model, "loss_function", None)
        note = cls(function if callable(function) and _adds_to_loss(model) else None)
        if note.function is not None:
            model.loss_function = note  # type: ignore[assignment]
        return note

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The loss function's value, as a tensor that may be changed in place."""
        assert self.function is not None
        self.num_calls += 1
        self.value = self.function(*args, **kwargs)
        return self.value.clone()

    def whole(self, loss: torch.Tensor, share: float) -> torch.Tensor:
        """The loss of one microbatch, of which everything that was added to the noted value counts `share`.

        Raises:
            UnsupportedModelError: The model added several values of its loss function.
        """
        noted, calls = self.value, self.num_calls
        self.forget()
        if noted is None or share == 1.0:
            return loss
        if calls > 1:
            raise UnsupportedModelError(
                "the model computes its loss function several times, so that it is not known what of their sum is a "
                "mean over microbatches: use num_microbatches=1"
            )
        return noted + (loss - noted) * share

    def forget(self) -> None:
        """Let go of what was noted."""
        self.value, self.num_calls = None, 0


def counts_tokens(model: nn.Module) -> bool:
    """Whether the loss of a part of a batch can be divided by the tokens of all of it (`num_items_in_batch`).

    Models with a loss of their own take the mean over what they are given: their batches stay in one piece.
    """
    call = next((node for node in ast.walk(_forward_of(model)) if _is_loss_call(node)), None)
    if not isinstance(call, ast.Call):
        return False
    # `**kwargs`, or the number by its name
    return any(keyword.arg in (None, "num_items_in_batch") for keyword in call.keywords)


def _is_loss_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "self.loss_function"


def _adds_to_loss(model: nn.Module) -> bool:
    if not inspect.unwrap(type(model).forward).__module__.startswith("transformers."):
        return True
    return _ADDS.search(ast.unparse(_forward_of(model))) is not None


def _forward_of(model: nn.Module) -> ast.AST:
    """The code of a model's forward; empty if there is no source."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward))))
    except (OSError, TypeError, SyntaxError):
        return ast.Module([], [])
