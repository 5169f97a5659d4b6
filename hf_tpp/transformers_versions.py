"""What differs between versions of transformers: all of it in this place, nowhere else is a version looked at.

What the code of a model shows by itself (names, sizes, attributes) is read from the model wherever it is needed.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import nn
from transformers import masking_utils
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tpp.errors import UnsupportedModelError

__all__ = [
    "CACHE_ARGUMENTS",
    "CACHE_OUTPUT",
    "STALE_KEYS",
    "PackedSequences",
    "check_family",
    "fewest_padded_rows",
    "stores_experts_transposed",
    "tie_on_meta",
    "unlike_tracing",
]

VERSION = Version(transformers.__version__)
"""The installed one."""
CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")
"""Names by which models take a cache: the first since 5.24, the others before, the last by models without attention."""
CACHE_OUTPUT = next(f.name for f in fields(CausalLMOutputWithPast) if f.name in CACHE_ARGUMENTS)
"""Name by which they give it back."""
STALE_KEYS = {"gpt2": (r"\.(attn|crossattention)\.bias$",)}
"""Names in checkpoints of a family that no model needs any more: newer versions say so, 5.0 warns of them."""

_WRONG_BEFORE = {
    "doge": ("5.23", "gives a row without padding another result than beside rows with padding (it forgets causality)"),
    "dbrx": ("5.17", "takes the width of its experts for that of its hidden states"),
    "recurrent_gemma": ("5.17", "gives another result with a cache than without (its window is that of the cache)"),
    "moshi": ("5.17", "shifts its labels twice, so that the loss depends on which rows are together"),
    "gemma3n_text": ("5.17", "gives another result with a cache than without (it shares keys and values in the cache)"),
}
"""Families whose plain model is broken or has no single result: model_type -> (first version seen right, why)."""

_LONE_ROWS_MASKED_SINCE = "5.17"
"""The first version seen whose recurrent layers mask the padding of every row."""
_TIED_ON_META_SINCE = "5.17"
"""The first version seen that ties the weights of a model that is built on the meta device."""
_MASK = "apply_mask_to_padding_states"
"""The function of a model's module by which they do; a private name of transformers, read in old versions only."""

_PACKING = "find_packed_sequence_indices"
"""The function of `masking_utils` that looks for several sequences in a row, and waits for the device to answer."""
_WITHOUT_POSITIONS = {"input_ids", "inputs_embeds", "attention_mask", "labels", "num_items_in_batch", "use_cache"}
"""Arguments of a call that leaves the positions to the model."""


@dataclass(slots=True)
class PackedSequences:
    """Remembers that rows whose positions the model counts itself hold one sequence each.

    transformers looks at the positions in every forward without a mask, and the host stands still until the device has
    answered, all that was issued before included. Positions that all rows share were counted without a look at the
    tokens: it is asked once for each shape. Others, and those of a single row, may depend on the tokens (a model may
    skip padding), and it is asked every time. Of one model.
    """

    _single: set[tuple[int, ...]] = field(default_factory=set)

    @contextmanager
    def remembered(self, microbatches: Sequence[Mapping[str, Any]]) -> Iterator[None]:
        """Within this context forwards of these microbatches do not ask again."""
        search = getattr(masking_utils, _PACKING, None)
        if search is None or any(not part.keys() <= _WITHOUT_POSITIONS for part in microbatches):
            yield
            return

        def search_once(position_ids: torch.Tensor) -> torch.Tensor | None:
            shape = tuple(position_ids.shape)
            is_shared = shape[0] > 1 and position_ids.stride(0) == 0
            found = None if is_shared and shape in self._single else search(position_ids)
            if is_shared and found is None:
                self._single.add(shape)
            return found

        setattr(masking_utils, _PACKING, search_once)
        try:
            yield
        finally:
            setattr(masking_utils, _PACKING, search)


@contextmanager
def unlike_tracing() -> Iterator[None]:
    """Within this context masks are made as ever, also while a CUDA graph is recorded.

    transformers takes a recording for a trace, and makes explicit masks there, which keep attention from its fast path.
    What looks at values cannot be recorded anyway, and says so.
    """
    before = masking_utils.is_tracing  # type: ignore[attr-defined]
    masking_utils.is_tracing = lambda tensor=None: False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking_utils.is_tracing = before  # type: ignore[attr-defined]


def check_family(kind: str, family: str) -> None:
    """Refuse a family that the installed transformers gets wrong by itself.

    Args:
        kind: Class name of the model, for the message.
        family: Its `model_type`.

    Raises:
        UnsupportedModelError: A newer transformers is needed.
    """
    if family in _WRONG_BEFORE and Version(_WRONG_BEFORE[family][0]) > VERSION:
        version, why = _WRONG_BEFORE[family]
        raise UnsupportedModelError(f"{kind} of transformers {VERSION} {why}: use {version} or newer")


def fewest_padded_rows(model: nn.Module) -> int:
    """How many rows a microbatch must have for the model to mask their padding as it does in the whole batch.

    Recurrent layers set the states of padding to zero; older ones (Mamba 2, Qwen3-Next, Bamba, LFM2, ...) do so only
    where there is more than one row.

    Args:
        model: The plain model.

    Returns:
        2 for a model with such layers, else 1.
    """
    if Version(_LONE_ROWS_MASKED_SINCE) <= VERSION:
        return 1
    homes = {type(module).__module__ for module in model.modules()}
    masks = [vars(sys.modules[home])[_MASK] for home in homes if _MASK in vars(sys.modules[home])]
    states, padding = torch.ones(1, 2, 1, device="cpu"), torch.tensor([[0, 1]], device="cpu")
    return 2 if any(bool(mask(states, padding)[0, 0, 0]) for mask in masks) else 1


def tie_on_meta(model: nn.Module) -> None:
    """Tie the weights of a model on the meta device, where older versions leave that to the loading of a checkpoint.

    Args:
        model: Any model; one that is not on the meta device is not touched.
    """
    if Version(_TIED_ON_META_SINCE) > VERSION and any(parameter.is_meta for parameter in model.parameters()):
        model.tie_weights()  # type: ignore[operator]


def stores_experts_transposed(module: nn.Module) -> bool:
    """Whether stacked experts are stored as [experts, in, out]: newer versions say so, older ones by their class."""
    stated = getattr(module, "is_transposed", None)
    return type(module).__name__.startswith(("GptOss", "Llama4")) if stated is None else bool(stated)
