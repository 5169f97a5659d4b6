"""Find out what travels between stages, before a schedule depends on it.

One forward through the pipeline, stage after stage: each finds out what its last block gives to the next one, checks
that nothing else would be needed there, and tells everybody. If some stage finds a problem, all ranks raise it. A model
that sends one tensor [batch, seq, hidden] needs this once; others once for each shape of a microbatch.
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache

from hf_tpp.collectives.p2p import StageLinks
from hf_tpp.errors import HfTppError, UnsupportedModelError
from hf_tpp.mesh import ParallelMesh
from hf_tpp.pipeline_parallel.boundary import Fingerprints
from hf_tpp.pipeline_parallel.payload import Payload, PayloadSpec, plain_payload
from hf_tpp.pipeline_parallel.stage import Stage, Traffic

__all__ = ["Rehearsal"]


@dataclass(slots=True)
class Rehearsal:
    """What is known about the messages of one pipeline.

    Attributes:
        stage: This rank's stage.
        mesh: The process groups.
        links: To its neighbours.
    """

    stage: Stage
    mesh: ParallelMesh
    links: StageLinks
    _plain: dict[Hashable, list[Any]] = field(default_factory=dict, repr=False)
    _known: dict[Hashable, list[PayloadSpec]] = field(default_factory=dict, repr=False)
    _is_plain: dict[Hashable, bool] = field(default_factory=dict, repr=False)

    def traffic(
        self,
        microbatch: dict[str, Any],
        plain: tuple[tuple[int, ...], torch.dtype],
        mode: Hashable,
        start: Callable[[], None],
    ) -> Traffic:
        """What a microbatch receives and sends.

        Args:
            microbatch: The model's keyword arguments.
            plain: Shape and type of the hidden states in a model that sends nothing else.
            mode: Whatever else may change what is sent (training, autocast).
            start: Called before a forward.

        Collective over the replica, with the same microbatch, if anything has to be found out.

        Raises:
            UnsupportedModelError: The model needs something that cannot be sent.
        """
        if self.mesh.pp.size == 1:
            return Traffic()
        mode = (mode, frozenset(microbatch))  # other arguments may bring other states
        if mode in self._plain:
            return self._at([plain_payload(*plain, skeleton) for skeleton in self._plain[mode]])
        tokens = {name: value for name, value in microbatch.items() if not isinstance(value, Cache)}
        if len(tokens) < len(microbatch):
            # A cache must not be written to twice; what is sent does not depend on what it holds.
            tokens = {name: value for name, value in tokens.items() if name in ("input_ids", "inputs_embeds")}
            tokens["use_cache"] = False
        key = (mode, *plain, *((name, getattr(value, "shape", None)) for name, value in tokens.items()))
        if key not in self._known:
            start()
            links = self._run(tokens)
            self._known[key] = links
            is_plain = all(spec == plain_payload(*plain, spec.skeleton) for spec in links)
            # The first answer stands for all microbatches: they must all have headers, or none of them.
            if self._is_plain.setdefault(mode, is_plain) and is_plain:
                self._plain[mode] = [spec.skeleton for spec in links]
        return self._at(self._known[key], has_headers=not self._is_plain[mode] and not torch.is_grad_enabled())

    def _at(self, links: list[PayloadSpec], has_headers: bool = False) -> Traffic:
        stage = self.mesh.pp.rank
        return Traffic(links[stage - 1] if stage else None, links[stage] if stage < len(links) else None, has_headers)

    def _run(self, microbatch: dict[str, Any]) -> list[PayloadSpec]:
        """One forward through all stages; the last one goes as far as its first block."""
        rank, size = self.mesh.pp.rank, self.mesh.pp.size
        links: list[PayloadSpec] = []
        received: Payload | None = None
        expected: Fingerprints | None = None
        for stage in range(size):
            found: _Found | None = None
            problem: HfTppError | None = None
            if rank == stage:
                try:
                    found = self._forward(microbatch, received, links[-1] if links else None, expected)
                except HfTppError as error:
                    problem = error
                except Exception as error:
                    problem = UnsupportedModelError(f"the model's forward failed: {type(error).__name__}: {error}")
                    problem.__cause__ = error
            spec, expected = self._tell(stage, found, problem)
            if spec is None:
                break
            links.append(spec)
            self.links.open(max(leaf.num_bytes for leaf in spec.leaves))
            if rank == stage and found is not None:
                for tensor in found.payload:
                    self.links.send_forward(tensor)
            elif rank == stage + 1:
                receipts = [self.links.recv_forward(leaf.shape, leaf.dtype) for leaf in spec.leaves]
                received = tuple(receipt.wait() for receipt in receipts)
        self.links.drain()
        return links

    def _forward(
        self,
        microbatch: dict[str, Any],
        received: Payload | None,
        receives: PayloadSpec | None,
        expected: Fingerprints | None,
    ) -> "_Found":
        flow, traffic = self.stage.flow, Traffic(receives, None)
        flow.expected, flow.stops_at_entry = expected, self.mesh.pp.is_last
        try:
            with torch.enable_grad():
                Stage.require_gradients(received, traffic)
                output = self.stage.run(microbatch, received, traffic)
        finally:
            flow.expected, flow.stops_at_entry = None, False
        next_block, flow.next_block = flow.next_block, {}
        return _Found(() if output is None else tuple(t.detach() for t in output), flow.sends, next_block)

    def _tell(
        self, stage: int, found: "_Found | None", problem: HfTppError | None
    ) -> tuple[PayloadSpec | None, Fingerprints]:
        """All ranks of the replica hear from the ranks of `stage`; of fingerprints, each from its own tp rank."""
        everyone: list[Any] = [None] * self.mesh.replica.size
        mine = None if found is None else (found.spec, found.next_block)
        dist.all_gather_object(everyone, (mine, problem), group=self.mesh.replica_control)
        if problem is not None:
            raise problem
        failed = next((theirs for _, theirs in everyone if theirs is not None), None)
        if failed is not None:
            raise type(failed)(f"stage {stage}: {failed}")
        answer: tuple[PayloadSpec | None, Fingerprints] = everyone[stage * self.mesh.tp.size + self.mesh.tp.rank][0]
        return answer


@dataclass(frozen=True, slots=True)
class _Found:
    """What one stage found out: what it sends (None on the last stage), and what the next block is given."""

    payload: Payload
    spec: PayloadSpec | None
    next_block: Fingerprints
