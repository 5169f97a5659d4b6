"""Router logits of all stages, for losses that balance experts.

transformers collects the outputs of router modules with forward hooks while the model runs, and computes the loss from
all of them behind the last block. So a stage sends those of its own blocks along with the hidden states; on the stages
behind, the hollow block lets its router hand them out once more, and the hooks see what they always saw.

    stage 0   block 0: router -> logits 0 ------.                                      .--> loss
    stage 1   block 0 (hollow): router hands on logits 0    block 1: router -> logits 1
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_tpp.parts import ModelParts

__all__ = ["RouterRecord", "wants_router_logits", "watch_routers"]

Key = tuple[int, int]
"""Block, and number of the router in it."""


@dataclass(slots=True)
class RouterRecord:
    """Router logits of one microbatch on one stage.

    Attributes:
        active: They are wanted in this forward.
        logits: In the order of the blocks; those received come first.
    """

    active: bool = False
    logits: dict[Key, torch.Tensor] = field(default_factory=dict)
    replay: dict[int, Callable[[], None]] = field(default_factory=dict, repr=False)

    def hand_out(self, block: int) -> None:
        """In a hollow block: its routers return what was received for them."""
        if self.active and block in self.replay:
            self.replay[block]()


def wants_router_logits(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether this call is to collect router logits."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return bool(batch.get("output_router_logits", getattr(config, "output_router_logits", False)))


def watch_routers(model: nn.Module, parts: ModelParts, blocks: range, record: RouterRecord) -> None:
    """Note the logits of local routers, and have hollow ones hand on what was received.

    Args:
        model: The model, hollow already.
        parts: Its parts.
        blocks: Indices of the stage's own blocks.
        record: Filled and read in every forward.
    """
    for index in range(blocks.stop):
        routers = _routers(model, model.get_submodule(parts.block_name(index)))
        if index in blocks:
            for number, (router, element) in enumerate(routers):
                router.register_forward_hook(_note(record, (index, number), element))
        elif routers:
            record.replay[index] = _hand_out(record, index, [router for router, _ in routers])


def _routers(model: nn.Module, block: nn.Module) -> list[tuple[nn.Module, int]]:
    """Router modules of a block with the element of their output that is collected, as transformers declares them."""
    declared: list[tuple[type, int, str]] = []
    for module in model.modules():
        specs = getattr(type(module), "_can_record_outputs", None) or {}
        for spec in _listed(specs.get("router_logits")):
            kind = getattr(spec, "target_class", spec)
            if isinstance(kind, type):
                declared.append((kind, getattr(spec, "index", 1), getattr(spec, "layer_name", None) or ""))
    found = []
    for name, module in block.named_modules():
        for kind, element, layer in declared:
            if isinstance(module, kind) and (not layer or f".{layer.strip('.')}." in f".{name}."):
                found.append((module, element))
                break
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value] if value is not None else []


def _note(record: RouterRecord, key: Key, element: int) -> Callable[..., None]:
    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if record.active:
            record.logits[key] = output[element] if isinstance(output, tuple) else output

    return note


def _hand_out(record: RouterRecord, block: int, routers: list[nn.Module]) -> Callable[[], None]:
    for number, router in enumerate(routers):
        router.forward = lambda number=number: record.logits[block, number]

    def replay() -> None:
        for router in routers:
            router()

    return replay
