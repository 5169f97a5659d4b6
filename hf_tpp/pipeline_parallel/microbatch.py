"""A batch as a list of microbatches.

    input_ids [10, seq], num_microbatches=4   ->   rows 3, 3, 2, 2

Rows are dealt out as evenly as they go. A list of tensors instead of one gives the microbatches as they are, each with
its own number of rows and its own sequence length.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hf_tpp.errors import BatchError

__all__ = [
    "batch_rows",
    "check_padded_rows",
    "count_label_tokens",
    "default_num_microbatches",
    "sequence_length",
    "split_batch",
]

_WITHOUT_ROWS = frozenset({"logits_to_keep"})
_TOKENS = {"input_ids": ("rows", "seq"), "inputs_embeds": ("rows", "seq", "hidden")}


def default_num_microbatches(rows: int, pp_size: int, fewest_rows: int = 1) -> int:
    """One row a microbatch, or `fewest_rows`; at most four microbatches per stage."""
    return max(1, min(rows // fewest_rows, 4 * pp_size))


def batch_rows(batch: Mapping[str, Any]) -> int:
    """Rows of a batch.

    Raises:
        BatchError: There are no tokens.
    """
    tokens = _tokens(batch)
    return sum(part.shape[0] for part in tokens) if isinstance(tokens, list | tuple) else tokens.shape[0]


def sequence_length(microbatch: Mapping[str, Any]) -> int:
    """Tokens per row of a microbatch."""
    return int(_tokens(microbatch).shape[1])


def split_batch(batch: Mapping[str, Any], num_microbatches: int) -> list[dict[str, Any]]:
    """Cut every tensor of a batch along its rows.

    Args:
        batch: Keyword arguments of the model. Tensors of two or more dimensions whose first is the number of rows are
            cut; single numbers, tensors whose first dimension is 1, and which positions get logits, go to every
            microbatch. A list of tensors is taken as one tensor per microbatch.
        num_microbatches: Wanted number; fewer if there are fewer rows.

    Returns:
        One dict of keyword arguments per microbatch, none of them empty.

    Raises:
        BatchError: No tokens, no rows, lists of different lengths, or a tensor of which it is not known how its rows
            belong to the batch's.
    """
    tokens = _tokens(batch)
    if isinstance(tokens, list | tuple):
        return _explicit_microbatches(batch, len(tokens))
    rows = tokens.shape[0]
    count = min(num_microbatches, rows)
    microbatches: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in batch.items():
        is_cut = count > 1 and isinstance(value, torch.Tensor) and _has_rows(name, value, rows)
        pieces: Sequence[Any] = value.tensor_split(count) if is_cut else [value] * count
        for microbatch, piece in zip(microbatches, pieces, strict=True):
            microbatch[name] = piece
    return microbatches


def check_padded_rows(microbatches: Sequence[Mapping[str, Any]], fewest_rows: int) -> None:
    """Refuse microbatches whose padding the model would not mask as it does in the whole batch.

    Args:
        microbatches: Pieces of one batch.
        fewest_rows: Rows that a microbatch with padding needs.

    Raises:
        BatchError: One with padding has fewer.
    """
    if fewest_rows == 1 or len(microbatches) == 1:
        return
    for microbatch in microbatches:
        mask = microbatch.get("attention_mask")
        if mask is not None and mask.shape[0] < fewest_rows and not bool(mask.all()):
            rows = sum(batch_rows(part) for part in microbatches)
            raise BatchError(
                f"{rows} rows in {len(microbatches)} microbatches leave a padded row alone, and the model of this "
                f"version of transformers masks padding only where there are {fewest_rows} rows: use "
                f"num_microbatches={default_num_microbatches(rows, rows, fewest_rows)}, or transformers 5.17 or newer"
            )


def _has_rows(name: str, tensor: torch.Tensor, rows: int) -> bool:
    if name in _WITHOUT_ROWS or tensor.numel() == 1 or (tensor.dim() > 1 and tensor.shape[0] == 1):
        return False
    if tensor.dim() == 1 or tensor.shape[0] != rows:
        raise BatchError(
            f"{name} has the shape {list(tensor.shape)}, which cannot be cut into microbatches like the {rows} rows of "
            f"tokens: leave it out, or use num_microbatches=1"
        )
    return True


def _explicit_microbatches(batch: Mapping[str, Any], count: int) -> list[dict[str, Any]]:
    microbatches: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, value in batch.items():
        is_list = isinstance(value, list | tuple) and all(isinstance(part, torch.Tensor) for part in value)
        if is_list and len(value) != count:
            raise BatchError(f"{name} is a list of {len(value)} microbatches, the tokens are {count}: give one each")
        if not is_list and isinstance(value, torch.Tensor) and value.dim() > 1:
            raise BatchError(f"{name} is one tensor while the tokens are a list of {count} microbatches: give a list")
        for index, microbatch in enumerate(microbatches):
            microbatch[name] = value[index] if is_list else value
    return microbatches


def count_label_tokens(microbatches: Sequence[Mapping[str, Any]]) -> torch.Tensor:
    """Tokens that the loss counts: labels that are not ignored, after the shift by one."""
    counts = []
    for microbatch in microbatches:
        ignore_index = microbatch.get("ignore_index", -100)
        shifted = microbatch.get("shift_labels")
        targets = microbatch["labels"][..., 1:] if shifted is None else shifted
        counts.append((targets != ignore_index).sum())
    return torch.stack(counts).sum()


def _tokens(batch: Mapping[str, Any]) -> Any:
    for name, dimensions in _TOKENS.items():
        tokens = batch.get(name)
        if tokens is not None:
            parts = tokens if isinstance(tokens, list | tuple) else [tokens]
            if any(part.dim() != len(dimensions) for part in parts):
                shapes = ", ".join(str(list(part.shape)) for part in parts)
                raise BatchError(f"{name} has the shape {shapes}: give [{', '.join(dimensions)}]")
            if not parts or any(part.shape[0] == 0 for part in parts):
                raise BatchError(f"{name} has no rows: skip this batch, or set drop_last in the data loader")
            return tokens
    raise BatchError(f"the batch has neither input_ids nor inputs_embeds (got {', '.join(batch) or 'nothing'})")
