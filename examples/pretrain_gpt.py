"""Pretrain a GPT with tensor, pipeline and data parallelism, under Megatron-LM's flags.

    torchrun --nproc-per-node 4 examples/pretrain_gpt.py \
        --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 \
        --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 \
        --micro-batch-size 4 --global-batch-size 64 --train-iters 1000 --learning-rate 6e-4 \
        --train-data-path 'data/*.txt' --tokenizer-type ByteLevelTokenizer --save runs/gpt

Any launcher will do (torchrun, accelerate launch, plain python). A run resumes with --load runs/gpt, at other parallel
sizes if need be; <save>/huggingface is an ordinary checkpoint for transformers, <save>/log.jsonl every logged number.
"""

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron_arguments import build_config, parse_arguments, refuse
from text_data import Samples, build_tokenizer, load_samples
from tqdm import tqdm
from training_run import Run
from transformers import AutoModelForCausalLM

from hf_tpp import from_pretrained, parallelize
from hf_tpp.checkpoint.training import latest_checkpoint
from hf_tpp.errors import HfTppError


def build_model(args: argparse.Namespace, tokenizer: Any) -> torch.nn.Module:
    """The parallel model: each rank creates, or reads, its own shards and nothing else."""
    options = {
        "tp": args.tensor_model_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "num_microbatches": args.num_microbatches,
        "sequence_parallel": args.sequence_parallel,
        "device": args.device,
        "seed": args.seed,
        "eval_logits": False,
    }
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    config = build_config(args, tokenizer)
    if any(Path(args.model).glob("*.safetensors")):
        return from_pretrained(args.model, config=config, dtype=dtype, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return parallelize(model, **options)


def train(run: Run) -> None:
    """All iterations that are left, with logs, evaluations and checkpoints in between."""
    args = run.args
    losses, start = [], time.perf_counter()
    with tqdm(total=args.train_iters, initial=run.iteration, disable=not run.is_main) as bar:
        while run.iteration < args.train_iters:
            rate = run.scheduler.get_last_lr()[0]
            loss, norm = run.step()
            losses.append(loss)
            bar.update()
            last = run.iteration == args.train_iters
            if run.iteration % args.log_interval == 0 or last:
                mean, gradient_norm = torch.stack(losses).mean().item(), norm.item()
                tokens = len(losses) * args.global_batch_size * args.seq_length
                speed = tokens / (time.perf_counter() - start)
                run.log(bar, loss=mean, grad_norm=gradient_norm, learning_rate=rate, tokens_per_second=speed)
                losses, start = [], time.perf_counter()
            if run.valid and (run.iteration % args.eval_interval == 0 or last):
                run.log(bar, valid_loss=run.evaluate())
            if args.save and (last or (args.save_interval and run.iteration % args.save_interval == 0)):
                run.save()


@contextmanager
def first_process_first() -> Iterator[None]:
    """The first process of every machine fills the cache, the others read it."""
    waits = dist.is_initialized() and int(os.environ.get("LOCAL_RANK", "0")) > 0
    if waits:
        dist.barrier()
    yield
    if dist.is_initialized() and not waits:
        dist.barrier()


def find_checkpoint(args: argparse.Namespace) -> Path | None:
    """What --load names: one step, or the latest of a run."""
    if args.load is None or (args.load / ".metadata").is_file():
        return args.load
    found = latest_checkpoint(args.load)
    if found is None and args.load != args.save:
        refuse(
            f"--load {args.load} holds no checkpoint: pass the folder of a run (with a file 'latest') or of one step"
        )
    return found


def main() -> None:
    """Build, resume, train, and leave an ordinary checkpoint behind."""
    args = parse_arguments()
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer(args.tokenizer_type, args.tokenizer_model)
    checkpoint = find_checkpoint(args)
    model = build_model(args, tokenizer)
    options = {"cache": args.data_cache_path, "num_workers": args.num_workers}
    with first_process_first():
        rows = load_samples(args.train_data_path, tokenizer, args.seq_length, **options)
        valid = args.valid_data_path and load_samples(
            args.valid_data_path, tokenizer, args.seq_length, split="validation", **options
        )
    run = Run(args, model, tokenizer, Samples(rows, args.seed), Samples(valid, None) if valid else None)
    if checkpoint:
        run.load(checkpoint)
    train(run)
    run.finish()
    if args.save:
        model.save_pretrained(args.save / "huggingface")
        if run.is_main:
            tokenizer.save_pretrained(args.save / "huggingface")


if __name__ == "__main__":
    try:
        main()
    except HfTppError as error:
        raise SystemExit(f"pretrain_gpt.py: error: {error}") from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
