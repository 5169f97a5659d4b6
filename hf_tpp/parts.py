"""The parts of a decoder-only model, found by structure and never by a list of class names.

    input_ids -> [embedding, ...]  ->  block 0 ... block n-1  ->  [norm, ...] -> head

Blocks, embedding and head have a place of their own; whatever else there is goes where it is used.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
)

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.transformers_versions import check_family
from hf_tpp.wrappers import LowRankSum, copies_of, unwrapped

__all__ = ["ModelParts", "runs_shipped_code"]

# What transformers itself files under other tasks, and what it does not file.
_ENCODERS = frozenset(MODEL_FOR_MASKED_LM_MAPPING_NAMES) | {"bert-generation", "xlnet"}
_ENCODER_DECODERS = (
    frozenset(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)
    | frozenset(MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES)
    | {"musicgen", "musicgen_melody", "trocr"}
)
_DRAFT_HEADS = frozenset({"gemma4_assistant", "gemma4_unified_assistant"})
_OTHER_TOWERS = ("vision", "visual", "image", "audio")
_LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Names, in the model, of everything that is cut or moved.

    Attributes:
        blocks: Name of the list of blocks.
        num_blocks: Its length.
        embedding: Name of the input embedding.
        head: Name of the output head.
        further_blocks: Names of other lists of blocks, for models with several stacks.
    """

    blocks: str
    num_blocks: int
    embedding: str
    head: str
    further_blocks: tuple[str, ...] = ()

    @classmethod
    def find(cls, model: nn.Module) -> "ModelParts":
        """Find the parts of a transformers model for causal language modelling.

        Raises:
            UnsupportedModelError: A part is missing, or the model is no decoder.
        """
        kind = type(model).__name__
        names = {id(module): name for name, module in model.named_modules()}
        try:
            config = model.config.get_text_config()  # type: ignore[union-attr, operator]
            _check_kind(kind, config)
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
            decoder = model.get_decoder()  # type: ignore[operator]
        except (AttributeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{kind} is not a transformers model for causal language modelling ({error}): "
                f"use a class of AutoModelForCausalLM"
            ) from error
        if unwrapped(embedding) is not embedding or (unwrapped(head) is not head and LowRankSum.of(head) is None):
            raise UnsupportedModelError(
                f"{kind} has adapters or modules_to_save at its input embedding ({type(embedding).__name__}) or output "
                f"head ({type(head).__name__}), of which only LoRA at the head can be split: leave them out of "
                f"target_modules and modules_to_save"
            )
        if not isinstance(embedding, nn.Embedding) or not isinstance(unwrapped(head), nn.Linear):
            raise UnsupportedModelError(
                f"{kind} has a {type(embedding).__name__} as input embedding and a {type(head).__name__} as head, "
                f"where an nn.Embedding and an nn.Linear are needed: use an unmodified causal language model"
            )
        lists = [
            blocks
            for blocks in _block_lists(decoder) or _block_lists(model)
            if not any(word in names[id(blocks)] for word in _OTHER_TOWERS)
        ]
        _check_cross_attention(kind, lists)
        chosen = _main_list(lists, config)
        if chosen is None:
            raise UnsupportedModelError(
                f"{kind} has no list of blocks with one element for each of the layers that its configuration counts: "
                f"it is not known what to split"
            )
        return cls(
            blocks=names[id(chosen)],
            num_blocks=len(chosen),
            embedding=names[id(embedding)],
            head=names[id(head)],
            further_blocks=tuple(names[id(other)] for other in lists if other is not chosen),
        )

    def block_name(self, index: int) -> str:
        """Name of block `index`."""
        return f"{self.blocks}.{index}"

    def around(self, model: nn.Module) -> list[nn.Module]:
        """The modules whose forwards run the blocks, the embedding and the head: all that these lie in."""
        steps = [name.split(".") for name in (self.blocks, self.embedding, self.head)]
        names = {".".join(path[:depth]) for path in steps for depth in range(len(path))}
        return [model.get_submodule(name) for name in sorted(names)]

    def is_shipped(self, model: nn.Module) -> bool:
        """Whether all code in and around the blocks is transformers' or torch's, which the checks of families cover.

        Other towers of a composite model do not count.
        """
        lists = [model.get_submodule(name) for name in (self.blocks, *self.further_blocks)]
        inside = [module for blocks in lists for module in blocks.modules()]
        return all(map(runs_shipped_code, [*self.around(model), *inside]))

    def is_in_block(self, name: str) -> bool:
        """Whether a parameter or module lies in a block of the list that is spread over stages."""
        return name.startswith(self.blocks + ".")


def runs_shipped_code(module: nn.Module) -> bool:
    """Whether the forward of a module comes with transformers or torch, apart from additions of low rank."""
    if LowRankSum.of(module) is not None or copies_of(module) is not None:
        return True
    home: str = inspect.unwrap(type(module).forward).__module__
    return home.startswith(("transformers.", "torch."))


def _check_kind(kind: str, config: Any) -> None:
    family = config.model_type
    if family in _ENCODER_DECODERS or getattr(config, "is_encoder_decoder", False):
        what = "the decoder of an encoder-decoder family"
    elif family in _ENCODERS:
        what = "an encoder that can be used as a decoder"
    elif family in _DRAFT_HEADS:
        what = "a draft head of another model"
    else:
        check_family(kind, family)
        return
    raise UnsupportedModelError(
        f"{kind} ({family}) is {what}, and only decoder-only families are known to be exact in parallel: "
        f"use a decoder-only model"
    )


def _check_cross_attention(kind: str, lists: list[nn.ModuleList]) -> None:
    for blocks in lists:
        for name, _ in blocks.named_modules():
            if name.rpartition(".")[2] in ("encoder_attn", "cross_attn", "crossattention"):
                raise UnsupportedModelError(
                    f"{kind} has cross-attention ({name}): its blocks read another model's states, which no stage has; "
                    f"use a model without it"
                )


def _block_lists(root: nn.Module) -> list[nn.ModuleList]:
    """Every list of modules with parameters that lies in no other list, the largest first."""

    def find(module: nn.Module) -> Iterator[nn.ModuleList]:
        for child in module.children():
            if not isinstance(child, nn.ModuleList):
                yield from find(child)
            elif _num_parameters(child):
                yield child

    return sorted(find(root), key=_num_parameters, reverse=True)


def _main_list(lists: list[nn.ModuleList], config: Any) -> nn.ModuleList | None:
    """The largest list that has one element per layer; failing that, the largest."""
    counts = {getattr(config, name, None) for name in _LAYER_COUNTS} - {None}
    if not counts:
        return None
    fitting = [blocks for blocks in lists if len(blocks) in counts]
    return next(iter(fitting or lists), None)


def _num_parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
