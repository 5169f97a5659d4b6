"""Blocks that torch.compile compiles one by one.

    block(...)              its hooks, checkpointing, messages between stages: as they are, not compiled
      block.forward(...)    compiled where it is trained, elsewhere the block's own
        attention, MLP      the collectives of tensor parallelism become part of the graph

      loss                  its arithmetic becomes one kernel each way, where the backend fuses

Blocks that are alike share one graph. The model around the blocks is not compiled: it decides about masks, and where
transformers finds itself compiled it builds explicit ones, which keep attention from its fast path.
"""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from hf_tpp.errors import ConfigurationError, first_line
from hf_tpp.pipeline_parallel.cache import find_cache
from hf_tpp.tensor_parallel.loss import VocabParallelCausalLMLoss
from hf_tpp.tensor_parallel.loss_arithmetic import PLAIN, LossArithmetic
from hf_tpp.tensor_parallel.region import RegionState

__all__ = ["AUTOMATIC", "CompileOptions", "CompiledBlocks", "compile_options"]

CompileOptions = Mapping[str, Any]
"""Keyword arguments of `torch.compile`."""

AUTOMATIC: CompileOptions = {"dynamic": None, "fullgraph": True}
"""Where nobody asked for it: the first shape is compiled as it is, and a few graphs serve all others; what cannot be
compiled runs plain, without a word where that is known beforehand. A whole block or nothing: had a first part of it run
when a second fails, running it plain would repeat the collectives of the first, on this rank alone perhaps."""

_OPTIONS = ("backend", "mode", "options", "dynamic", "fullgraph")


def compile_options(wanted: bool | CompileOptions | None) -> CompileOptions | None:
    """The options of torch.compile that `parallelize(compile=wanted)` stands for; None to compile nothing.

    Raises:
        ConfigurationError: There is no such option or backend, or what it does is not known to be exact.
    """
    if wanted is None or wanted is False:
        return None
    if wanted is not True and not isinstance(wanted, Mapping):
        raise ConfigurationError(
            f"compile={wanted!r}: use True, or options of torch.compile such as {{'backend': 'aot_eager'}}"
        )
    options = {} if wanted is True else dict(wanted)
    unknown = options.keys() - set(_OPTIONS)
    if unknown:
        raise ConfigurationError(f"compile has unknown options {sorted(unknown)}: use some of {', '.join(_OPTIONS)}")
    backend = options.get("backend") or "inductor"
    if isinstance(backend, str) and backend not in torch.compiler.list_backends(exclude_tags=()):
        known = ", ".join(torch.compiler.list_backends())
        raise ConfigurationError(f"compile names the backend {backend!r}, which torch does not know: use {known}")
    if _replays_graphs(options):
        raise ConfigurationError(
            f"compile={wanted!r} replays CUDA graphs, whose results the forward of the next microbatch overwrites "
            f"before their backward: use the mode 'max-autotune-no-cudagraphs', or none"
        )
    return options


def _replays_graphs(options: CompileOptions) -> bool:
    chosen = options.get("options") or {}
    return (
        options.get("backend") == "cudagraphs"
        or options.get("mode") in ("reduce-overhead", "max-autotune")
        or bool(chosen.get("triton.cudagraphs"))
    )


class CompiledBlocks:
    """The blocks of one stage, which run compiled where they are trained, and the loss.

    With `dynamic=False`, the default here, each shape of a microbatch has a graph of its own. torch keeps 8 of them;
    microbatches of any further shape run plain.

    Args:
        blocks: Of this stage.
        regions: What their tensor-parallel regions share.
        loss: The model's loss function; compiled if it is ours.

    Attributes:
        options: Of torch.compile; None if nothing is compiled.
    """

    def __init__(self, blocks: Sequence[nn.Module], regions: RegionState, loss: Any = None) -> None:
        self.options: CompileOptions | None = None
        self._plain = [(block, block.forward) for block in blocks]
        self._regions = regions
        self._loss = loss if isinstance(loss, VocabParallelCausalLMLoss) else None
        self._reasons: set[str] = set()
        self._is_automatic = False

    def compile(self, wanted: bool | CompileOptions | None) -> None:
        """Compile the blocks when they are next trained, in this way instead of an earlier one.

        Args:
            wanted: As in `parallelize`.

        Raises:
            ConfigurationError: There is no such option or backend, or what it does is not known to be exact.
        """
        self.options = compile_options(wanted)
        self._is_automatic = wanted is AUTOMATIC
        if self.options is None:
            return
        # A graph is shared by blocks, of which one may have hooks inside and another none: torch must look at that.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        for block, plain in self._plain:
            compiled = torch.compile(plain, **{"dynamic": False, **self.options})
            block.forward = self._switching(block, plain, compiled)
        if self._loss is not None:
            # Other backends do not fuse: without chunks there would be float32 copies of all logits.
            fuses = self.options.get("backend") in (None, "inductor")
            self._loss.arithmetic = LossArithmetic.compiled(self.options) if fuses else PLAIN

    def _switching(
        self, block: nn.Module, plain: Callable[..., Any], compiled: Callable[..., Any]
    ) -> Callable[..., Any]:
        """Compiled in training, and in what its backwards compute again; else, as in generation, shapes vary."""
        has_failed = False

        @functools.wraps(plain)
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_failed
            is_trained = block.training and torch.is_grad_enabled()
            if not is_trained or has_failed or self._must_be_plain((*args, *kwargs.values())):
                return plain(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                if not self._is_automatic:
                    raise
                # A further shape runs plain; those that have a graph keep it, as what is computed again must.
                has_failed = not isinstance(error, FailOnRecompileLimitHit)
                if self._loss is not None and has_failed:
                    self._loss.arithmetic = PLAIN
                self._warn(f"torch.compile failed: {first_line(error)} (compile=False does not try, True raises this)")
                return plain(*args, **kwargs)

        return forward

    def _must_be_plain(self, arguments: Sequence[Any]) -> bool:
        """Whether the blocks do something that graphs cannot hold, or not for several blocks together."""
        regions = self._regions
        if regions.streams.active and regions.group is not None and not regions.sequence_parallel:
            return self._warned(
                "dropout is on, which tensor-parallel ranks draw from streams that are switched inside the blocks: set "
                "the model's dropout to 0, or use sequence_parallel=True"
            )
        if find_cache(arguments) is not None:
            return self._warned("they are trained with a cache, in which each has its own place: pass use_cache=False")
        return False

    def _warned(self, reason: str) -> bool:
        if not self._is_automatic:
            self._warn(reason)
        return True

    def _warn(self, reason: str) -> None:
        if reason not in self._reasons:
            self._reasons.add(reason)
            warnings.warn(f"blocks run uncompiled, since {reason}", stacklevel=4)
