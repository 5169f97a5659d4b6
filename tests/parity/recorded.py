"""Training in which microbatches overlap, or are recorded as CUDA graphs."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import hf_tpp
from hf_tpp.cuda_graphs import StageRecorder
from hf_tpp.parallel_model import parallel_state

SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LENGTHS = (32, 32, 32, 16, 32)
VOCABULARY = 512


class Repeater(StageRecorder):
    """Repeats on a CPU, by running it again, what a graph would repeat on a GPU."""

    @contextmanager
    def _on_stream(self):
        yield

    def _capture(self, slot: int, function: Callable[[], Any]) -> Any:
        results = function()

        def replay() -> None:
            for place, result in zip(results, function(), strict=True):
                place.copy_(result)

        return replay, results


def train(options: dict[str, Any]) -> tuple[list[tuple[float, float]], list[torch.Tensor], int | None]:
    """Body of a rank: losses and norms of some steps, the weights, and kinds of passes recorded."""
    options = dict(options)
    repeats, layers = options.pop("repeats", False), options.pop("layers", 4)
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=128)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).train()
    options = {"num_microbatches": 5, "verbose": False, **options}
    model = hf_tpp.parallelize(model, **options)
    calls = parallel_state(model).calls
    if repeats:
        calls.recorder = Repeater(model, calls.runner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    steps = []
    for index, length in enumerate(LENGTHS):  # the third pass of the longer is recorded
        generator = torch.Generator().manual_seed(index)
        tokens = torch.randint(0, VOCABULARY, (2 * options["num_microbatches"], length), generator=generator)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if index == 3:  # accumulated; the loss before still has its graph
            model(input_ids=tokens.flip(0), labels=tokens.flip(0)).loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        steps.append((loss.item(), norm.item()))
    weights = [parameter.detach().cpu() for parameter in model.parameters()]
    return steps, weights, None if calls.recorder is None else calls.recorder.num_recordings


def train_in_all_ways(ways: list[dict[str, Any]]) -> list[Any]:
    """Body of a rank."""
    return [train(options) for options in ways]


def python_passes(options: dict[str, Any]) -> list[int]:
    """Body of a rank: how often its first block is run by Python in each pass, where recordings only repeat."""

    def forget(self: StageRecorder, slot: int, function: Callable[[], Any]) -> Any:
        return (lambda: None), function()

    counts: list[int] = []
    with patch.object(Repeater, "_capture", forget):
        config = LlamaConfig(**SIZES, num_hidden_layers=4, vocab_size=VOCABULARY)
        model = hf_tpp.parallelize(AutoModelForCausalLM.from_config(config).train(), verbose=False, **options)
        calls = parallel_state(model).calls
        calls.recorder = Repeater(model, calls.runner)
        (block, *_) = calls.runner.stage.flow.own
        plain = block.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            counts[-1] += 1
            return plain(*args, **kwargs)

        block.forward = counted
        tokens = torch.arange(8 * 16).reshape(8, 16)
        for _ in range(5):
            counts.append(0)
            model(input_ids=tokens, labels=tokens).loss.backward()
    return counts
