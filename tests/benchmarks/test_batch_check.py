"""What it costs to make sure, in every call, that the ranks of a replica were given the same batch."""

import time

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from hf_tpp import parallelize
from hf_tpp.calls.agreement import agree_on_call
from hf_tpp.parallel_model import parallel_state
from tests.ranks import run_ranks

ROWS, SEQ = 8, 256


def shortest(call, repeats):
    """Seconds of the fastest of some runs that all ranks begin together."""
    durations = []
    for _ in range(repeats):
        dist.barrier()
        begin = time.perf_counter()
        call()
        durations.append(time.perf_counter() - begin)
    return min(durations)


def costs():
    """Body of a rank: seconds of a step, and of the check in it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=1000, num_key_value_heads=4, **sizes)
    model = parallelize(AutoModelForCausalLM.from_config(config), pp=2, verbose=False).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    input_ids = torch.randint(1000, (ROWS, SEQ))
    batch = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "labels": input_ids}

    def step():
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls = parallel_state(model).calls
    tokens = torch.tensor(ROWS * SEQ)
    check = shortest(lambda: agree_on_call(calls, batch, None, [1, tokens, 0], trains=True), 20)
    return shortest(step, 3), check


def test_the_check_is_cheap():
    for step, check in run_ranks(costs, 2):
        print(f"step {1000 * step:.1f} ms, of which the check of the batch {1000 * check:.2f} ms: {check / step:.2%}")
        assert check < 0.01 * step
