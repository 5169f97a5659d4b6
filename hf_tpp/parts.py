"""The parts of a decoder-only model, found by structure and never by a list of class names.

    input_ids -> [embedding, ...]  ->  block 0 ... block n-1  ->  [norm, ...] -> head
                  before                 blocks                    after

What a decoder registers ahead of its blocks runs before them, what it registers behind them runs after.
"""

from dataclasses import dataclass

from torch import nn

from hf_tpp.errors import UnsupportedModelError

__all__ = ["ModelParts"]


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Names, in the model, of everything that is cut or moved.

    Attributes:
        decoder: Name of the module that runs the blocks.
        blocks: Name of the list of blocks.
        num_blocks: Its length.
        embedding: Name of the input embedding.
        head: Name of the output head.
        before: Names of the decoder's other children that run before the blocks.
        after: Names of its children that run after them.
    """

    decoder: str
    blocks: str
    num_blocks: int
    embedding: str
    head: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    @classmethod
    def find(cls, model: nn.Module) -> "ModelParts":
        """Find the parts of a transformers model for causal language modelling.

        Raises:
            UnsupportedModelError: A part is missing, or some parameter belongs to none of them.
        """
        kind = type(model).__name__
        names = {id(module): name for name, module in model.named_modules()}
        try:
            decoder = model.get_decoder()  # type: ignore[operator]
            embedding, head = model.get_input_embeddings(), model.get_output_embeddings()  # type: ignore[operator]
            num_layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
        except (AttributeError, NotImplementedError) as error:
            raise UnsupportedModelError(
                f"{kind} is not a transformers model for causal language modelling ({error}): "
                f"use a class of AutoModelForCausalLM"
            ) from error
        if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
            raise UnsupportedModelError(
                f"{kind} has a {type(embedding).__name__} as input embedding and a {type(head).__name__} as head, "
                f"where an nn.Embedding and an nn.Linear are needed: use an unmodified causal language model"
            )
        blocks = _block_list(decoder, num_layers)
        if blocks is None or decoder is model:
            raise UnsupportedModelError(f"{kind} has no list of {num_layers} blocks: it cannot be split into stages")
        prefix = names[id(decoder)]
        block_name = names[id(blocks)]
        children = [f"{prefix}.{name}" for name, _ in decoder.named_children()]
        position = next(i for i, name in enumerate(children) if (block_name + ".").startswith(name + "."))
        found = cls(
            decoder=prefix,
            blocks=block_name,
            num_blocks=num_layers,
            embedding=names[id(embedding)],
            head=names[id(head)],
            before=tuple(name for name in children[:position] if name != names[id(embedding)]),
            after=tuple(children[position + 1 :]),
        )
        found._check_complete(model)
        return found

    def _check_complete(self, model: nn.Module) -> None:
        known = (self.blocks, self.embedding, self.head, *self.before, *self.after)
        for name, _ in model.named_parameters():
            if not any(name.startswith(part + ".") for part in known):
                raise UnsupportedModelError(
                    f"{type(model).__name__} has the parameter {name!r} outside its embedding, blocks, norm and head: "
                    f"it is not known on which stage it belongs"
                )

    def block_name(self, index: int) -> str:
        """Name of block `index`."""
        return f"{self.blocks}.{index}"


def _block_list(decoder: nn.Module, num_layers: int) -> nn.ModuleList | None:
    """The ModuleList of `num_layers` modules that holds the most parameters."""
    lists = [module for module in decoder.modules() if isinstance(module, nn.ModuleList) and len(module) == num_layers]
    sizes = [sum(parameter.numel() for parameter in blocks.parameters()) for blocks in lists]
    return lists[sizes.index(max(sizes))] if lists else None
