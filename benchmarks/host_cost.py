"""What our Python costs: a tensor-parallel Llama block against the plain block of the same local size.

    python benchmarks/host_cost.py

The block is so small that the host is all that counts, and the collectives are replaced by nothing. Both blocks do the
same arithmetic on one CPU thread; runs alternate, and the ratio is that of the medians.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_tpp.dropout import DropoutStreams
from hf_tpp.mesh import Axis
from hf_tpp.parts import ModelParts
from hf_tpp.tensor_parallel.region import RegionState
from hf_tpp.tensor_parallel.rewrite import apply_rewrite, plan_rewrite

TP_SIZE = 2
HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, MLP = 64, 8, 4, 16, 192


class SilentGroup:
    """Looks like a process group of two ranks and is none."""

    def size(self) -> int:
        """Ranks."""
        return TP_SIZE

    def rank(self) -> int:
        """This rank."""
        return 0


def say_nothing(tensor: torch.Tensor, op: object = None, group: object = None) -> None:
    """In place of a collective."""


def tiny_llama(shards: int) -> nn.Module:
    """A Llama whose heads and neurons are 1 / `shards` of the full number."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=MLP // shards,
        num_attention_heads=HEADS // shards,
        num_key_value_heads=KV_HEADS // shards,
        head_dim=HEAD_SIZE,
        num_hidden_layers=1,
        vocab_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()


def parallel_block() -> nn.Module:
    """The first block of a rewritten Llama, with weights."""
    model = tiny_llama(1)
    parts = ModelParts.find(model)
    plan = plan_rewrite(model, parts, TP_SIZE)
    group: dist.ProcessGroup = SilentGroup()  # type: ignore[assignment]
    state = RegionState(group, DropoutStreams.of_model(model, torch.device("cpu"), 0, 2))
    apply_rewrite(model, parts, plan, Axis(0, TP_SIZE, group, (0, 1)), range(1), state)
    block = model.get_submodule(parts.block_name(0))
    with torch.no_grad():
        for name, parameter in list(block.named_parameters()):
            owner, _, attribute = name.rpartition(".")
            values = torch.randn(parameter.shape) * 0.02 if parameter.is_meta else parameter
            setattr(block.get_submodule(owner), attribute, nn.Parameter(values))
    return block


def step(block: nn.Module, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Forward and backward of one block."""
    block(x, position_embeddings=rotary).sum().backward()
    for parameter in block.parameters():
        parameter.grad = None


def measure(repetitions: int) -> dict[str, float]:
    """Median microseconds of both blocks, and their ratio."""
    plain = tiny_llama(TP_SIZE)
    x = torch.randn(1, 8, HIDDEN, requires_grad=True)
    rotary = plain.model.rotary_emb(x, torch.arange(8)[None])
    contestants = {"plain": plain.model.layers[0], "parallel": parallel_block()}
    times: dict[str, list[float]] = {name: [] for name in contestants}
    with mock.patch.object(dist, "all_reduce", say_nothing):
        for repetition in range(repetitions + repetitions // 5):
            for name, block in contestants.items():
                start = time.perf_counter()
                step(block, x, rotary)
                if repetition >= repetitions // 5:
                    times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(values) * 1e6 for name, values in times.items()}
    return {**medians, "ratio": medians["parallel"] / medians["plain"]}


def main() -> None:
    """Measure and print; the raw numbers go to a file on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=1000)
    parser.add_argument("--output", type=Path, help="JSON file for the raw numbers")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = measure(arguments.repetitions)
    print(f"plain block {result['plain']:.0f} us, parallel block {result['parallel']:.0f} us: {result['ratio']:.3f}x")
    if arguments.output:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        arguments.output.write_text(json.dumps({"versions": versions, "result": result}, indent=1))


if __name__ == "__main__":
    main()
