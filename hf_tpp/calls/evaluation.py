"""A call that does not train: forwards only, logits and loss on every rank."""

from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_tpp.calls.agreement import agree_on_call
from hf_tpp.calls.checks import check_outputs, check_parameters, check_skipped_blocks
from hf_tpp.calls.context import CallContext, to_device
from hf_tpp.calls.sharing import share_logits, share_loss
from hf_tpp.errors import HfTppError
from hf_tpp.pipeline_parallel.cache import cache_argument, find_cache, new_cache
from hf_tpp.pipeline_parallel.microbatch import count_label_tokens, split_batch
from hf_tpp.transformers_versions import CACHE_OUTPUT

__all__ = ["evaluation_call", "forwards", "prepare_evaluation"]


@torch.no_grad()
def evaluation_call(context: CallContext, batch: dict[str, Any]) -> Any:
    """Forwards only: logits (and the loss, if there are labels) on every rank of the replica.

    Collective: every rank of the replica, with the same batch; where replicas share weights, every rank of the job, as
    often as the others, each replica with a batch of its own.

    Raises:
        BatchError: The batch cannot be run exactly.
        RankMismatchError: Ranks of one replica were given different batches.
    """
    mesh = context.mesh
    return_dict = batch.pop("return_dict", True)
    is_list = isinstance(batch.get("input_ids"), list | tuple)
    microbatches, cache, seed = prepare_evaluation(context, batch)
    outputs = forwards(context, microbatches, seed)
    result = CausalLMOutputWithPast(**{CACHE_OUTPUT: cache})
    has_labels = "labels" in microbatches[0]
    if has_labels:
        losses = [output.loss for output in outputs]
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=mesh.device)
        result["loss"] = share_loss(loss.float(), mesh, over_replicas=False)
    if context.eval_logits or not has_labels:
        count = len(microbatches)
        logits = share_logits(context, [output.logits for output in outputs], [1] * count if is_list else [count])
        result["logits"] = logits if is_list else logits[0]
    return result if return_dict else result.to_tuple()


def forwards(context: CallContext, microbatches: list[dict[str, Any]], seed: int) -> list[Any]:
    """The model's outputs in order on the last stage, an empty list elsewhere.

    Collective: every rank of the replica; where replicas share weights, every rank of the job.
    """
    mesh = context.mesh

    def start_microbatch(index: int) -> None:
        context.streams.start_microbatch(seed, mesh.dp.rank, index, mesh.pp.rank)

    streams = context.streams.running(_draws(context), seed, mesh.dp.rank, mesh.pp.rank)
    with context.replicas.gathered(), streams:
        traffic = context.traffic(microbatches, 1, start_microbatch)
        return context.runner.evaluate(microbatches, traffic, start_microbatch)


def _draws(context: CallContext) -> bool:
    return context.model.training and context.streams.draws()


def prepare_evaluation(context: CallContext, batch: dict[str, Any]) -> tuple[list[dict[str, Any]], Any, int]:
    """Check the batch together with the other ranks; returns microbatches, the cache, and the seed of dropout."""
    problem: HfTppError | None = None
    microbatches: list[dict[str, Any]] = []
    cache: Any = None
    try:
        check_outputs(context, batch)
        if context.agreement:  # not at every step of a generation
            check_parameters(context)
        if context.model.training:
            check_skipped_blocks(context)
        batch = to_device(batch, context.mesh.device)
        argument = cache_argument(context.model)
        cache = find_cache(batch.values())
        if cache is None and argument:
            cache = batch.get(argument)  # a state of the model's own class
        if cache is None and argument and batch.get("use_cache"):
            cache = batch[argument] = new_cache(context.model)
        if cache is None:
            batch["use_cache"] = False
        # A cache belongs to the whole batch, so that one stays in one piece.
        microbatches = context.split(batch) if cache is None else split_batch(batch, 1)
    except HfTppError as error:
        problem = error
    draws = _draws(context)
    # The steps of a generation continue from generators that are the same on all ranks already.
    seed = context.streams.next_seed(draws) if draws or context.agreement else 0
    if context.agreement:
        *_, seed = agree_on_call(context, batch, problem, [0, 0, seed], trains=False)[0]
    elif problem is not None:
        raise problem
    if "labels" in batch and "num_items_in_batch" not in batch:
        tokens = count_label_tokens(microbatches)
        for microbatch in microbatches:
            microbatch["num_items_in_batch"] = tokens
    return microbatches, cache, seed
