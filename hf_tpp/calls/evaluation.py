"""A call that does not train: forwards only, logits and loss on every rank."""

from typing import Any

import torch
import torch.distributed as dist
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tpp.calls.agreement import agree_on_call
from hf_tpp.calls.checks import check_outputs
from hf_tpp.calls.context import CallContext, share_loss, to_device
from hf_tpp.errors import HfTppError
from hf_tpp.pipeline_parallel.cache import find_cache, new_cache
from hf_tpp.pipeline_parallel.microbatch import count_label_tokens, split_batch
from hf_tpp.tensor_parallel.linear import join_channels

__all__ = ["evaluation_call"]


@torch.no_grad()
def evaluation_call(context: CallContext, batch: dict[str, Any]) -> Any:
    """Forwards only: logits (and the loss, if there are labels) on every rank of the replica.

    Collective: every rank of the replica, with the same batch.

    Raises:
        BatchError: The batch cannot be run exactly.
        RankMismatchError: Ranks of one replica were given different batches.
    """
    mesh = context.mesh
    return_dict = batch.pop("return_dict", True)
    is_list = isinstance(batch.get("input_ids"), list | tuple)
    microbatches, cache, seed = _prepare(context, batch)

    def start_microbatch(index: int) -> None:
        context.streams.start_microbatch(seed, mesh.dp.rank, index, mesh.pp.rank)

    with context.streams.running(_draws(context)):
        outputs = context.runner.evaluate(microbatches, context.messages(microbatches, 1), start_microbatch)
    result = CausalLMOutputWithPast(past_key_values=cache)
    has_labels = "labels" in microbatches[0]
    if has_labels:
        losses = [output.loss for output in outputs]
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=mesh.device)
        result["loss"] = share_loss(loss.float(), mesh, over_replicas=False)
    if context.eval_logits or not has_labels:
        logits = [_share_logits(context, outputs[i].logits if outputs else None) for i in range(len(microbatches))]
        result["logits"] = logits if is_list else torch.cat(logits)
    return result if return_dict else result.to_tuple()


def _draws(context: CallContext) -> bool:
    return context.model.training and context.streams.draws()


def _prepare(context: CallContext, batch: dict[str, Any]) -> tuple[list[dict[str, Any]], Cache | None, int]:
    """Check the batch together with the other ranks; returns microbatches, the cache, and the seed of dropout."""
    problem: HfTppError | None = None
    microbatches: list[dict[str, Any]] = []
    cache: Cache | None = None
    try:
        check_outputs(context, batch)
        batch = to_device(batch, context.mesh.device)
        cache = find_cache(batch.values())
        if cache is None and batch.get("use_cache"):
            cache = batch["past_key_values"] = new_cache(context.model)
        if cache is None:
            batch["use_cache"] = False
        # A cache belongs to the whole batch, so that one stays in one piece.
        microbatches = context.split(batch) if cache is None else split_batch(batch, 1)
    except HfTppError as error:
        problem = error
    seed = int(torch.randint(0, 2**62, ()).item()) if _draws(context) else 0
    if context.agreement:
        _, seed = agree_on_call(context, batch, problem, [0, seed], trains=False)[0]
    elif problem is not None:
        raise problem
    if "labels" in batch and "num_items_in_batch" not in batch:
        tokens = count_label_tokens(microbatches)
        for microbatch in microbatches:
            microbatch["num_items_in_batch"] = tokens
    return microbatches, cache, seed


def _share_logits(context: CallContext, logits: torch.Tensor | None) -> torch.Tensor:
    """Local columns on the last stage -> full logits on every rank of the replica."""
    mesh = context.mesh
    if logits is not None and mesh.tp.size > 1:
        logits = join_channels(logits, context.vocabulary, mesh.tp.group)
    if mesh.pp.size == 1:
        assert logits is not None
        return logits
    source = mesh.pp.global_ranks[-1]
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    header = torch.zeros(4, dtype=torch.int64, device=mesh.device)
    if logits is not None:
        header.copy_(torch.tensor([*logits.shape, dtypes.index(logits.dtype)]))
    dist.broadcast(header, source, group=mesh.pp.group)
    *shape, dtype = header.tolist()
    message = torch.empty(shape, dtype=dtypes[dtype], device=mesh.device) if logits is None else logits.contiguous()
    dist.broadcast(message, source, group=mesh.pp.group)
    return message
