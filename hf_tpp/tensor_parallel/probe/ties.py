"""Weights with several names: all of them must be cut alike, or none."""

from collections.abc import Mapping

from torch import nn

from hf_tpp.plan.rules import RegionRule

__all__ = ["has_aliases", "torn_regions"]


def has_aliases(module: nn.Module) -> bool:
    """Whether something below `module` has several names: swapped under one, it would be called by another."""
    num_modules = sum(1 for _ in module.named_modules(remove_duplicate=False))
    num_parameters = sum(1 for _ in module.named_parameters(remove_duplicate=False))
    return num_modules > len([*module.modules()]) or num_parameters > len([*module.parameters()])


def torn_regions(model: nn.Module, rules: Mapping[str, RegionRule]) -> set[str]:
    """The regions that cannot be, since a weight in them lies outside, or in another region, as well.

    Args:
        model: The whole model.
        rules: Name of a module -> its rule.
    """
    names_of: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names_of.setdefault(parameter, []).append(name)
    shared = [[_place(name, rules) for name in names] for names in names_of.values() if len(names) > 1]
    torn: set[str] = set()
    is_settled = False
    while not is_settled:
        is_settled = True
        for places in shared:
            uses = [None if region in torn or not region else (own, rules[region]) for region, own in places]
            if any(use != uses[0] for use in uses):
                torn |= {region for region, _ in places if region}
                is_settled = False
    return torn


def _place(name: str, rules: Mapping[str, RegionRule]) -> tuple[str, str]:
    """The region that a parameter lies in, or "", and its name there."""
    region = next((region for region in rules if name.startswith(f"{region}.")), "")
    return region, name.removeprefix(f"{region}.")
