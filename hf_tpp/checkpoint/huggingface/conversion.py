"""Names and layouts that transformers changes between a file and its model.

A plain renaming (`embed_out.` in the files of GPT-NeoX, `lm_head.` in its model) is followed, both ways. A conversion
that merges or permutes tensors (experts) is followed when saving, where whole tensors are at hand; reading refuses it,
since a slice of the model is then no slice of a file.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_tpp.errors import CheckpointError, UnsupportedModelError
from hf_tpp.transformers_versions import STALE_KEYS

__all__ = ["KeyRenaming", "ignored_keys", "refuse_converted", "saved_tensors", "stored_together"]

# By name: transformers 5 began without some of these classes.
_PLAIN = ("WeightRenaming", "PrefixChange")


class KeyRenaming:
    """From names in files to names in `model`, as transformers renames them when it loads.

    Args:
        model: A transformers model; names of any other stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        self._steps = [step for step in _conversions(model) if type(step).__name__ in _PLAIN]

    def __call__(self, key: str) -> str:
        """The name in the model of the tensor that a file calls `key`."""
        return _renamed(key, self._steps)


def saved_tensors(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers' own `save_pretrained` writes for some parameters: renamed, split (experts) or joined (fused).

    Args:
        model: The model, of which nothing but its class, configuration and history of loading is read.
        tensors: Name in the model -> the whole of it; on meta, to learn names and sizes. All that are stored together.

    Raises:
        CheckpointError: transformers cannot convert them.
    """
    if not isinstance(model, PreTrainedModel):
        return dict(tensors)
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return dict(tensors)
    try:
        saved: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(tensors))
    except Exception as error:
        raise CheckpointError(
            f"{type(model).__name__} stores {', '.join(tensors)} in another form, and the conversion failed "
            f"({type(error).__name__}: {error}): use training checkpoints, and convert them on one rank"
        ) from error
    return saved


def stored_together(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> list[list[str]]:
    """Group names of parameters that contribute to one tensor of a checkpoint.

    Args:
        model: The model.
        tensors: Name in the model -> tensor on meta.

    Returns:
        Groups in the order of their first names; most are of one.
    """
    groups: list[list[str]] = []
    group_of: dict[str, list[str]] = {}
    for name, tensor in tensors.items():
        stored = saved_tensors(model, {name: tensor})
        group = next((group_of[key] for key in stored if key in group_of), None)
        if group is None:
            group = []
            groups.append(group)
        group.append(name)
        group_of.update(dict.fromkeys(stored, group))
    return groups


def refuse_converted(model: nn.Module) -> None:
    """Refuse a model whose tensors transformers rearranges while it loads them.

    Args:
        model: The unsplit model, possibly on meta.

    Raises:
        UnsupportedModelError: A parameter is not stored as the model holds it.
    """
    for step in _conversions(model):
        if type(step).__name__ in _PLAIN:
            continue
        name = _first_affected(step, [name for name, _ in model.named_parameters()])
        if name is not None:
            raise UnsupportedModelError(
                f"{type(model).__name__} stores {name!r} in another form ({', '.join(step.source_patterns)}) that "
                f"cannot be read in slices: load the model with transformers' from_pretrained on every rank and "
                f"parallelize that"
            )


def ignored_keys(model: nn.Module) -> list[str]:
    """Names in checkpoints that transformers passes over: buffers that older versions stored."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ())
    patterns += STALE_KEYS.get(getattr(getattr(model, "config", None), "model_type", ""), ())
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns


def _conversions(model: nn.Module) -> list[Any]:
    """Transforms of transformers for this class, without those for files older than safetensors."""
    if not isinstance(model, PreTrainedModel):
        return []
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model, add_legacy=False))


def _renamed(key: str, steps: Iterable[Any]) -> str:
    for step in steps:
        key = step.rename_source_key(key)[0]
    return key


def _first_affected(step: Any, names: list[str]) -> str | None:
    try:
        back = step.reverse_transform()
    except Exception:  # a conversion without a way back: assume that it is needed
        return names[0]
    return next((name for name in names if back.rename_source_key(name)[1] is not None), None)
