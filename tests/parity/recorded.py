"""Training in which microbatches overlap, or passes are recorded as CUDA graphs."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_tpp
from hf_tpp.parallel_model import parallel_state

SIZES = {"hidden_size": 1024, "intermediate_size": 2048, "num_attention_heads": 8, "num_key_value_heads": 4}
LENGTHS = (64, 64, 64, 64, 32, 64, 64, 64)
VOCABULARY = 512


def train(options: dict[str, Any]) -> tuple[list[tuple[float, float]], list[torch.Tensor], int | None]:
    """Body of a rank: losses and norms of some steps, the weights, and how many passes were recorded."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=3, vocab_size=VOCABULARY, max_position_embeddings=128)
    model = AutoModelForCausalLM.from_config(config).train()
    model = hf_tpp.parallelize(model, tp=2, num_microbatches=5, verbose=False, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = []
    for index, length in enumerate(LENGTHS):
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCABULARY, (10, length), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if index == 6:  # accumulated; the loss before still has its graph
            model(input_ids=tokens.flip(0), labels=tokens.flip(0)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    recorder = parallel_state(model).calls.recorder
    weights = [parameter.detach().cpu() for parameter in model.parameters()]
    return steps, weights, None if recorder is None else len(recorder._recordings)


def train_in_all_ways(ways: list[dict[str, Any]]) -> list[Any]:
    """Body of a rank."""
    return [train(options) for options in ways]
