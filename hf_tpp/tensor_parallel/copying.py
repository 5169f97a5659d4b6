"""Copies of parallel modules (peft's `modules_to_save` makes some): parameters of their own, in the same group."""

import copy
from typing import Any, ClassVar, Self

from torch import nn

__all__ = ["SharesGroup"]


class SharesGroup(nn.Module):
    """A module whose deep copies share what cannot be copied.

    Attributes:
        shared: Names of those attributes.
    """

    shared: ClassVar[tuple[str, ...]] = ("group", "region")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo |= {id(value): value for value in (vars(self).get(name) for name in self.shared)}
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied
