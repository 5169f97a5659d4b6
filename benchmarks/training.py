"""Training speed and memory: one process in plain transformers against tensor and pipeline parallelism.

    python benchmarks/training.py                               two GPUs, 24 layers, hidden 2048, sequence 2048
    python benchmarks/training.py --device cpu --tiny           the same program in miniature, on gloo

Every contestant trains the same weights on the same tokens with the same optimizer in a process group of its own; the
losses of its first steps are part of the result, to show that the work is the same. Times are medians of whole
synchronised steps. The raw numbers go to a JSON file, a table is printed last.
"""

import argparse
import datetime
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

import hf_tpp

RESULTS = Path(__file__).parent / "results"
PLAIN = "one process, plain transformers"
CONTESTANTS = {
    PLAIN: {"tp": 1, "pp": 1},
    "tensor parallel 2": {"tp": 2, "pp": 1},
    "tensor + sequence parallel 2": {"tp": 2, "pp": 1, "sequence_parallel": True},
    "pipeline parallel 2": {"tp": 1, "pp": 2},
}


@dataclass(frozen=True)
class Sizes:
    """What is trained."""

    num_layers: int = 24
    hidden_size: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    mlp_size: int = 5632
    vocab_size: int = 32000
    gpt2_vocab_size: int = 50257
    seq_length: int = 2048
    micro_batch: int = 4
    num_microbatches: int = 8
    warmup: int = 3
    steps: int = 5


TINY = Sizes(2, 32, 4, 2, 64, 131, 131, 16, 2, 2, 1, 2)


def build(model: str, sizes: Sizes, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the meta device."""
    config: Any
    if model == "llama":
        config = LlamaConfig(
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.mlp_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            num_key_value_heads=sizes.num_kv_heads,
            vocab_size=sizes.vocab_size,
            max_position_embeddings=sizes.seq_length,
        )
    else:
        config = GPT2Config(
            n_embd=sizes.hidden_size,
            n_layer=sizes.num_layers,
            n_head=sizes.num_heads,
            vocab_size=sizes.gpt2_vocab_size,
            n_positions=sizes.seq_length,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
        )
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def step_plain(model: torch.nn.Module, tokens: torch.Tensor, sizes: Sizes) -> torch.Tensor:
    """One global batch in one process: a loop over microbatches."""
    total = torch.zeros((), device=tokens.device)
    for rows in tokens.split(sizes.micro_batch):
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss / sizes.num_microbatches
        loss.backward()
        total += loss.detach()
    return total


def step_parallel(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """One global batch in parallel: one call."""
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach()


def measure(model_name: str, contestant: str, sizes: Sizes, device: str) -> dict[str, Any]:
    """Train one contestant in this process (a rank of its group)."""
    options = CONTESTANTS[contestant]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = hf_tpp.parallelize(
        build(model_name, sizes, dtype), num_microbatches=sizes.num_microbatches, device=None, **options
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device == "cuda")
    place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device("cpu")
    generator = torch.Generator().manual_seed(0)
    rows = sizes.micro_batch * sizes.num_microbatches
    tokens = torch.randint(0, sizes.vocab_size, (rows, sizes.seq_length), generator=generator).to(place)
    alone = options["tp"] * options["pp"] == 1
    losses, times = [], []
    for _ in range(sizes.warmup + sizes.steps):
        synchronize(device)
        start = time.perf_counter()
        loss = step_plain(model, tokens, sizes) if alone else step_parallel(model, tokens)
        optimizer.step()
        optimizer.zero_grad()
        synchronize(device)
        times.append(time.perf_counter() - start)
        losses.append(float(loss))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    peaks = [peak]
    if dist.is_initialized():
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, peak)
        peaks = gathered
        dist.destroy_process_group()
    step_seconds = statistics.median(times[sizes.warmup :])
    return {
        "model": model_name,
        "contestant": contestant,
        "step_seconds": step_seconds,
        "all_step_seconds": times,
        "tokens_per_second": tokens.numel() / step_seconds,
        "peak_bytes_per_rank": peaks,
        "losses": losses,
    }


def synchronize(device: str) -> None:
    """Wait for the device, and for the other ranks."""
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()


def free_port() -> int:
    """A port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(model: str, contestant: str, arguments: argparse.Namespace, output: Path) -> dict[str, Any] | None:
    """Run one contestant in processes of its own."""
    options = CONTESTANTS[contestant]
    world_size = options["tp"] * options["pp"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1" if arguments.device == "cpu" else "8"}
    command = [sys.executable, "-u", __file__, "--rank-of", contestant, "--model", model, "--output", str(output)]
    command += ["--device", arguments.device, *(["--tiny"] if arguments.tiny else [])]
    shared = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(command, env={**environment, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(world_size)
    ]
    deadline = time.monotonic() + arguments.limit
    try:
        codes = [rank.wait(timeout=max(1.0, deadline - time.monotonic())) for rank in ranks]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for rank in ranks:
            rank.kill()
    return json.loads(output.read_text()) if not any(codes) else None


def print_table(results: list[dict[str, Any]]) -> None:
    """One row a contestant; ratios against the plain model of the same family."""
    print(f"{'model':6} {'contestant':34} {'step ms':>8} {'tokens/s':>9} {'x plain':>8} {'peak GiB':>12}  losses")
    for result in results:
        plain = next(r for r in results if r["model"] == result["model"] and r["contestant"] == PLAIN)
        peaks = "/".join(f"{peak / 2**30:.1f}" for peak in result["peak_bytes_per_rank"])
        losses = " ".join(f"{loss:.4f}" for loss in result["losses"][:3] + result["losses"][-1:])
        seconds = result["step_seconds"]
        print(
            f"{result['model']:6} {result['contestant']:34} {seconds * 1e3:8.1f} {result['tokens_per_second']:9.0f} "
            f"{plain['step_seconds'] / seconds:8.2f} {peaks:>12}  {losses}"
        )


def main() -> None:
    """Start every contestant, or be a rank of one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="a model of two small layers")
    parser.add_argument("--model", choices=["llama", "gpt2"], help="only this family")
    parser.add_argument("--limit", type=float, default=100.0, help="seconds for one contestant")
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--rank-of", choices=list(CONTESTANTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    sizes = TINY if arguments.tiny else Sizes()
    if arguments.rank_of:
        result = measure(arguments.model, arguments.rank_of, sizes, arguments.device)
        if os.environ["RANK"] == "0":
            arguments.output.write_text(json.dumps(result))
        return
    RESULTS.mkdir(exist_ok=True)
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    output = arguments.output or RESULTS / f"training-{arguments.device}-{today}.json"
    results = []
    for model in [arguments.model] if arguments.model else ["llama", "gpt2"]:
        for contestant in CONTESTANTS:
            result = launch(model, contestant, arguments, output.with_suffix(".part"))
            if result is None:
                print(f"{model}: {contestant} failed", file=sys.stderr)
                continue
            results.append(result)
            record = {
                "date": today,
                "device": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.processor(),
                "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
                "sizes": asdict(sizes),
                "results": results,
            }
            output.write_text(json.dumps(record, indent=1))
    output.with_suffix(".part").unlink(missing_ok=True)
    print_table(results)


if __name__ == "__main__":
    main()
