"""Numbers that a module's forward reads and that must be local: head counts, and widths made of heads."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hf_tpp.plan.resolve import HeadCounts

__all__ = ["LocalConfig", "local_attributes", "set_attributes"]

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_VALUE_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_heads")
_WIDTHS = ("split_size", "embed_dim", "d_model_size", "all_head_size")
_GROUPS = "num_key_value_groups"


class LocalConfig:
    """A configuration of which some numbers are local; everything else is read from the original, now and later.

    Args:
        config: The original.
        numbers: Attribute -> its local value.
    """

    def __init__(self, config: Any, numbers: dict[str, int]) -> None:
        self.__dict__.update(_original=config, **numbers)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_original"], name)


def local_attributes(
    module: nn.Module, heads: HeadCounts, local: HeadCounts, further_widths: Iterable[str], config: Any
) -> dict[str, int]:
    """The local values of an attention module's numbers.

    Args:
        module: The attention module.
        heads: Its head counts.
        local: Its head counts on this rank.
        further_widths: More attributes that hold the width of all query heads.
        config: Of the model.

    Returns:
        Attribute -> value; "config.x" for a number that the module reads from its configuration.
    """
    numbers: dict[str, int] = {}
    for name, value in vars(module).items():
        if type(value) is not int:
            continue
        if name in _HEADS and value == heads.num_heads:
            numbers[name] = local.num_heads
        elif name in _KEY_VALUE_HEADS and value == heads.num_kv_heads:
            numbers[name] = local.num_kv_heads
        elif name in (*_WIDTHS, *further_widths) and value % heads.num_heads == 0:
            numbers[name] = value // heads.num_heads * local.num_heads
        elif name == "kv_dim" and value % heads.num_kv_heads == 0:
            numbers[name] = value // heads.num_kv_heads * local.num_kv_heads
        elif name == _GROUPS:
            numbers[name] = local.num_heads // local.num_kv_heads
    try:
        source = inspect.getsource(inspect.unwrap(type(module).forward))
    except (OSError, TypeError):
        return numbers
    if "self.config.num_attention_heads" in source and config.num_attention_heads == heads.num_heads:
        numbers["config.num_attention_heads"] = local.num_heads
    return numbers


def set_attributes(module: nn.Module, numbers: Mapping[str, int]) -> None:
    """Give `module`, its children ("child.x") and its configuration ("config.x") their local numbers."""
    of_config: dict[str, int] = {}
    for name, value in numbers.items():
        owner, _, attribute = name.rpartition(".")
        if owner == "config":
            of_config[attribute] = value
        else:
            setattr(module.get_submodule(owner), attribute, value)
    if of_config:
        module.config = LocalConfig(module.config, of_config)  # type: ignore[assignment]
