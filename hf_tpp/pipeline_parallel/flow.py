"""What flows through a stage's hollow layers in the forward pass of one microbatch."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from hf_tpp.errors import UnsupportedModelError
from hf_tpp.pipeline_parallel.boundary import Fingerprints, differing_argument, fingerprints
from hf_tpp.pipeline_parallel.payload import (
    LeafSpec,
    Path,
    Payload,
    PayloadSpec,
    leaves_of,
    map_leaves,
    plain_payload,
    skeleton_of,
    tensor_at,
)
from hf_tpp.pipeline_parallel.routers import RouterRecord
from hf_tpp.pipeline_parallel.trace import reachable

__all__ = ["StageComplete", "StageFlow"]


class StageComplete(BaseException):
    """Raised by the first layer behind this stage: the forward of this stage is done.

    It is no error, and no `except Exception` in a model may swallow it.
    """


@dataclass(slots=True)
class StageFlow:
    """State between the hollow layers and the stage that runs them.

    Attributes:
        received: What the stage before sent; None on the first stage.
        receives: What that is.
        output: What the next stage gets; None on the last stage.
        sends: What that is; None: find out, and check that nothing else would have to be sent.
        rows: Rows of the microbatch.
        seq: Its tokens per row.
        own: This stage's blocks.
        routers: Router logits of this stage's blocks and those before.
        history: Blocks before this stage's last one whose outputs later stages need.
        block_before: Index of the block whose output is received; -1 on the first stage.
        next_block: While finding out, what the first block behind this stage is given.
        expected: While finding out, what the stage before would have given this stage's first block.
        stops_at_entry: End the forward at this stage's first block.
        is_running: The stage runs a microbatch; at any other time a hollow layer has nothing to hand on.
    """

    received: Payload | None = field(default=None, repr=False)
    receives: PayloadSpec | None = None
    output: Payload | None = field(default=None, repr=False)
    sends: PayloadSpec | None = None
    rows: int = 0
    seq: int = 0
    own: tuple[nn.Module, ...] = field(default=(), repr=False)
    routers: RouterRecord = field(default_factory=RouterRecord)
    history: tuple[int, ...] = ()
    block_before: int = -1
    next_block: Fingerprints = field(default_factory=dict, repr=False)
    expected: Fingerprints | None = field(default=None, repr=False)
    stops_at_entry: bool = False
    is_running: bool = False
    _outputs: dict[int, torch.Tensor] = field(default_factory=dict, repr=False)
    _last_output: Any = field(default=None, repr=False)
    _known: set[int] = field(default_factory=set, repr=False)
    _shared: bool = False
    _handed_on: bool = False

    def token(self) -> torch.Tensor:
        """Zeros [rows, 1, tokens, 1] with the type and device of what flows, one for each token that passes."""
        hidden = next(tensor for _, tensor in leaves_of((self.received, self._last_output)))
        # A model may put tokens of its own ahead of those of the batch (prompts).
        tokens = hidden.shape[1] if hidden.dim() == 3 else self.seq
        return hidden.new_zeros((self.rows, 1, tokens, 1))

    def check_running(self) -> None:
        """In a hollow layer.

        Raises:
            UnsupportedModelError: Somebody calls a part of the model instead of the model.
        """
        if not self.is_running:
            raise UnsupportedModelError(
                "a part of a parallel model was called by itself, and other stages hold what it needs: call the model "
                "as a whole, which gives logits and loss on every rank"
            )

    def start(self) -> None:
        """Before a forward."""
        self.is_running = True
        self._known, self._shared, self._handed_on = set(), False, False
        self.routers.logits, self._outputs, self._last_output = {}, {}, None
        if self.receives is not None and self.received is not None:
            self._outputs = self.receives.earlier_outputs(self.received) | {self.block_before: self.received[0]}
        if self.routers.active and self.receives is not None and self.received is not None:
            self.routers.logits = self.receives.router_logits(self.received)

    def check_complete(self, has_ended: bool) -> None:
        """After a forward.

        Args:
            has_ended: It was ended by a block behind this stage.

        Raises:
            UnsupportedModelError: The model did not call the blocks where messages come in and go out.
        """
        misses_input = self.receives is not None and not self._handed_on
        misses_output = self.sends is not None and (not has_ended or (self.output or (None,))[0] is None)
        if misses_input or misses_output:
            raise UnsupportedModelError(
                "the model skipped blocks at the edge of a pipeline stage, where messages come in and go out: use "
                "pp=1, or have every block called in every pass"
            )

    def see_arguments(self, arguments: Mapping[str, Any]) -> None:
        """At the first block of the model: what is in the arguments before any block has run."""
        if self.sends is None:
            self._known = {id(tensor) for _, tensor in leaves_of(arguments)}

    def hand_on(self, arguments: Mapping[str, Any], block: int) -> Any:
        """What the hollow `block` ahead of this stage's blocks returns."""
        assert self.received is not None
        assert self.receives is not None
        self._handed_on = True
        self.routers.hand_out(block)
        if self.receives.shared and not self._shared:
            self._shared = True
            self.receives.share(arguments, self.received)
        if block in self._outputs:
            return self._with_first(self._outputs[block])
        given = next(iter(arguments.values()))
        is_hidden = isinstance(given, torch.Tensor) and given.dim() == self.received[0].dim() == 3
        if is_hidden and not torch.is_grad_enabled():
            # While generating, some models go on with the last token alone from a certain block on (gemma4): up to
            # there hollow blocks must keep all tokens, or the model's own code would not know where to cut.
            return self._with_first(given)
        return self.receives.rebuild(self.received)

    def _with_first(self, tensor: torch.Tensor) -> Any:
        """What was received, with another first tensor."""
        assert self.received is not None
        assert self.receives is not None
        return self.receives.rebuild((tensor, *self.received[1 : len(self.receives.places)]))

    def enter(self, arguments: Mapping[str, Any]) -> None:
        """At this stage's first block.

        Raises:
            UnsupportedModelError: It is given something else than the stage before would have given it.
            StageComplete: The forward ends here.
        """
        if self.expected is not None:
            name = differing_argument(self.expected, fingerprints(arguments))
            if name is not None:
                raise UnsupportedModelError(
                    f"a block is given another {name!r} than in one process: it depends on something that does not "
                    f"travel between stages (a value without a gradient, a state that blocks leave behind, dropout of "
                    f"what later blocks see again); use pp=1 for this model"
                )
        if self.stops_at_entry:
            raise StageComplete

    def note_earlier(self, block: int, output: Any) -> Any:
        """Behind a block of this stage that is not its last, but whose output later stages need."""
        output = self._cut_off(output)
        self._outputs[block] = next(tensor for _, tensor in leaves_of(output))
        return output

    def note_output(self, output: Any) -> Any:
        """Behind this stage's last block."""
        output = self._cut_off(output)
        self._last_output = output
        return output

    def _cut_off(self, output: Any) -> Any:
        """While the stage finds out what to send, tensors are cut off from what they came from."""
        return map_leaves(_cut, output) if self.is_running and self.sends is None else output

    def complete(self, arguments: Mapping[str, Any]) -> None:
        """At the first layer behind this stage.

        Raises:
            UnsupportedModelError: It is given something that the next stage could not be given.
            StageComplete: Always, otherwise.
        """
        output, self._last_output = self._last_output, None
        if self.sends is None:
            self.sends = self._find_payload(output, arguments)
            self.next_block = fingerprints(arguments)
        spec = self.sends
        if spec.places == ((),) and len(spec.leaves) == 1:
            self.output = (output,)
        else:
            self.output = tuple(tensor_at(output, path) for path in spec.places)
            self.output += tuple(tensor_at(arguments, path) for path in spec.shared)
            self.output += tuple(self.routers.logits[key] for key in spec.routers)
            self.output += tuple(self._outputs[block] for block in spec.history)
        raise StageComplete

    def _find_payload(self, output: Any, arguments: Mapping[str, Any]) -> PayloadSpec:
        returned = list(leaves_of(output))
        if not returned:
            raise UnsupportedModelError("the last block of a stage returns no tensor: use pp=1 for this model")
        given = list(leaves_of(arguments))
        reappear = {id(tensor) for _, tensor in given}
        sent = [returned[0], *((path, tensor) for path, tensor in returned[1:] if id(tensor) in reappear)]
        shared = [
            (path, tensor)
            for path, tensor in given
            if _is_in_dictionary(arguments, path) and id(tensor) not in self._known | {id(other) for _, other in sent}
        ]
        earlier = [self._outputs[block] for block in self.history]
        self._check(given, {id(tensor) for _, tensor in (*returned, *shared)}, earlier)
        routers = self.routers.logits if self.routers.active else {}
        if [path for path, _ in sent] in ([()], [(0,)]) and not (shared or routers or earlier):
            path, tensor = sent[0]
            return plain_payload(tuple(tensor.shape), tensor.dtype, skeleton_of(output) if path else None)
        tensors = [*(tensor for _, tensor in (*sent, *shared)), *routers.values(), *earlier]
        leaves = tuple(LeafSpec(tuple(t.shape), t.dtype, t.is_floating_point()) for t in tensors)
        places: tuple[Path, ...] = tuple(path for path, _ in sent)
        paths = tuple(path for path, _ in shared)
        return PayloadSpec(leaves, places, skeleton_of(output), paths, tuple(routers), self.history)

    def _check(self, given: list[tuple[Path, torch.Tensor]], sent: set[int], earlier: list[torch.Tensor]) -> None:
        """Nothing that the next block is given may come from this stage's blocks in another way."""
        parameters = (parameter for block in self.own for parameter in block.parameters())
        mine = {*parameters, *(self.received or ())} - set(earlier)
        for path, tensor in given:
            if id(tensor) not in sent and tensor.requires_grad and reachable(tensor) & mine:
                raise UnsupportedModelError(
                    f"a block is given {path[0]!r}, computed from blocks before the last one, which the next stage "
                    f"does not have: use pp=1 for this model"
                )


def _cut(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_() if tensor.requires_grad else tensor


def _is_in_dictionary(arguments: Mapping[str, Any], path: Path) -> bool:
    return isinstance(arguments[path[0]], MutableMapping)
