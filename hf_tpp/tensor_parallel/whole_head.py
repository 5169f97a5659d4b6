"""A head that is not cut: its loss takes less memory; over a large vocabulary of an odd size its products are faster.

    weight [V, h], as it is   -> zeros below -> [V', h]      V' = V rounded up to a multiple of 64
    hidden [.., h]                           -> logits [.., V']  -> loss and evaluation look at the first V

GPUs multiply matrices several times faster if the rows of all of them start at aligned addresses; next to that the copy
of the weight costs little. The loss is the one over cut vocabularies, with one shard: without a float32 copy of all
logits.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hf_tpp.parts import ModelParts, runs_shipped_code
from hf_tpp.plan.layout import Layout, whole_vocabulary
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss
from hf_tpp.tensor_parallel.vocabulary import loss_takes_shards

__all__ = ["AlignedHead", "install_whole_head", "plan_whole_head"]


class AlignedHead(nn.Linear):
    """Takes over the parameters of a linear, and returns further outputs that are zero.

    Args:
        head: The linear.
        padded_features: Outputs to return.

    Shape:
        input [..., in_features]; output [..., padded_features].
    """

    def __init__(self, head: nn.Linear, padded_features: int) -> None:
        nn.Module.__init__(self)  # nn.Linear would make a weight
        self.in_features, self.out_features = head.in_features, head.out_features
        self.padded_features = padded_features
        self.weight, self.bias = head.weight, head.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in_features] -> [..., padded_features]."""
        missing = self.padded_features - self.out_features
        bias: Any = None if self.bias is None else F.pad(self.bias, (0, missing))
        return F.linear(input, F.pad(self.weight, (0, 0, 0, missing)), bias)

    def extra_repr(self) -> str:
        """Sizes for `repr`."""
        return f"{super().extra_repr()}, padded_features={self.padded_features}"


def plan_whole_head(model: nn.Module, parts: ModelParts, aligns: bool) -> Layout | None:
    """How the logits of a whole head will lie; None if head and loss are to stay as they are.

    Args:
        model: The model; nothing is changed.
        parts: Its parts.
        aligns: Round a large vocabulary up.
    """
    head = model.get_submodule(parts.head)
    shipped = type(head) is nn.Linear and all(map(runs_shipped_code, parts.around(model)))
    if not shipped or head.out_features != model.config.get_text_config().vocab_size:  # type: ignore[union-attr, operator]
        return None
    return whole_vocabulary(int(head.out_features), aligns) if loss_takes_shards(model) else None  # type: ignore[arg-type]


def install_whole_head(model: nn.Module, parts: ModelParts, layout: Layout) -> None:
    """Swap the loss, and the head if the layout has padding, in place."""
    head = model.get_submodule(parts.head)
    assert isinstance(head, nn.Linear)
    assert layout.padded_local_size is not None
    if layout.padded_local_size > layout.size:
        model.set_submodule(parts.head, AlignedHead(head, layout.padded_local_size))
    model.loss_function = VocabParallelCausalLMLoss(layout, None)  # type: ignore[assignment]
