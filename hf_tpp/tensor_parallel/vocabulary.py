"""Embedding and head of a model, cut over the vocabulary.

The embedding is cut when it looks rows up, whatever its class does with them afterwards. The head is cut when the
model's loss is the one that has a vocabulary-parallel counterpart, and nothing else looks at the vocabulary dimension
of the logits; then no rank ever holds full logits in training. Otherwise its output is gathered, and the model's own
loss code sees what it always saw. Where code that transformers does not ship runs around them, and where the head does
more than a linear, both stay whole.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import dataclass, field

import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from hf_tpp.dropout import DropoutStreams
from hf_tpp.errors import UnsupportedModelError
from hf_tpp.mesh import Axis
from hf_tpp.parts import ModelParts, runs_shipped_code
from hf_tpp.plan.layout import Layout, padded_vocabulary
from hf_tpp.tensor_parallel.embedding import VocabParallelEmbedding, make_vocab_parallel
from hf_tpp.tensor_parallel.linear import ColumnParallelLinear
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss
from hf_tpp.tensor_parallel.low_rank import LinearCuts, swap_linear
from hf_tpp.tensor_parallel.plain_linear import linear_sizes

__all__ = ["VocabularyPlan", "apply_vocabulary", "loss_takes_shards", "plan_vocabulary"]

# What a forward may not do with logits that are cut: index or reshape them, reduce them, or compute a loss of its own.
_LOOKS_AT_VOCABULARY = re.compile(
    r"logits\[|logits\.(shape|size|view|reshape|logsumexp|softmax|max|argmax)|CrossEntropyLoss|cross_entropy\("
)


@dataclass(frozen=True, slots=True)
class VocabularyPlan:
    """What happens to embedding and head.

    Attributes:
        layout: How the vocabulary of the head is cut; None if nothing is cut.
        gathers_logits: The head's output is gathered again.
        cuts: Parameter name -> (dimension that is cut, its layout).
        summed: Whole parameters of which each tp rank computes a part of the gradient.
    """

    layout: Layout | None = None
    gathers_logits: bool = False
    cuts: dict[str, tuple[int, Layout]] = field(default_factory=dict)
    summed: tuple[str, ...] = ()

    @property
    def logits(self) -> Layout | None:
        """How the model's logits are cut; None if every rank has them whole."""
        return None if self.gathers_logits else self.layout


def plan_vocabulary(model: nn.Module, parts: ModelParts, tp_size: int) -> VocabularyPlan:
    """Decide about embedding and head; changes nothing.

    Raises:
        UnsupportedModelError: An embedding that cannot be cut exactly, or a head of another size.
    """
    embedding, head = model.get_submodule(parts.embedding), model.get_submodule(parts.head)
    assert isinstance(embedding, nn.Embedding)
    if tp_size == 1 or _does_more(head) or not all(map(runs_shipped_code, parts.around(model))):
        return VocabularyPlan()
    cuts: dict[str, tuple[int, Layout]] = {}
    layout = padded_vocabulary(embedding.num_embeddings, tp_size)
    VocabParallelEmbedding.check(embedding)
    cuts[f"{parts.embedding}.weight"] = (0, layout)
    vocab_size = linear_sizes(head)[1]
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layout = padded_vocabulary(vocab_size, tp_size)
    of_head = LinearCuts.of(head, True, layout)
    cuts |= {f"{parts.head}.{name}": cut for name, cut in of_head.cuts.items()}
    summed = tuple(f"{parts.head}.{name}" for name in of_head.summed)
    # With more outputs than tokens, the model may decide what it makes of all logits (CPM-Ant of transformers 5.0).
    whole = not loss_takes_shards(model)
    if vocab_size != config.vocab_size and not whole:
        raise UnsupportedModelError(
            f"the head has {vocab_size} tokens and the configuration {config.vocab_size}: "
            f"resize both to one vocabulary (model.resize_token_embeddings)"
        )
    return VocabularyPlan(layout, whole, cuts, summed)


def _does_more(head: nn.Module) -> bool:
    """Whether the head is a class of the model's own, which may scale what a linear computes (Dory)."""
    return type(head).__module__.startswith("transformers.models.")


def loss_takes_shards(model: nn.Module) -> bool:
    """Whether the model's forward hands its logits to transformers' causal language modelling loss and nothing else."""
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return False
    try:
        forward = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(type(model).forward)))).body[0]
    except (OSError, TypeError, SyntaxError):
        return False
    assert isinstance(forward, ast.FunctionDef)
    if ast.get_docstring(forward) is not None:
        del forward.body[0]
    source = ast.unparse(forward)
    return "self.loss_function(" in source and not _LOOKS_AT_VOCABULARY.search(source)


def apply_vocabulary(
    model: nn.Module, parts: ModelParts, plan: VocabularyPlan, tp: Axis, streams: DropoutStreams
) -> None:
    """Swap embedding and head in place; their new parameters are on the meta device."""
    embedding = model.get_submodule(parts.embedding)
    assert isinstance(embedding, nn.Embedding)
    if plan.layout is None:
        return
    layout, gathers = plan.layout, plan.gathers_logits

    def column(full: nn.Module) -> ColumnParallelLinear:
        return ColumnParallelLinear.from_linear(
            full, group=tp.group, layout=layout, gather_output=gathers, device="meta"
        )

    swap_linear(model, parts.head, column, streams)
    with torch.device("meta"):
        model.set_submodule(parts.embedding, make_vocab_parallel(embedding, tp.group))
    if not plan.gathers_logits:
        model.loss_function = VocabParallelCausalLMLoss(plan.layout, tp.group)  # type: ignore[assignment]
