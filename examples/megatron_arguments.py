"""Megatron-LM's flags for `pretrain_gpt.py`, and the arithmetic that they must satisfy."""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_tpp.errors import ConfigurationError
from hf_tpp.mesh import check_world

__all__ = ["build_config", "parse_arguments", "refuse"]

WORLD_SIZE = int(os.environ.get("WORLD_SIZE", "1"))
RANK = int(os.environ.get("RANK", "0"))


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in what follows from it: dp, batch sizes, microbatches, the device."""
    parser = argparse.ArgumentParser(description="Pretrain a GPT with hf_tpp.", allow_abbrev=False)
    for add_group in (_add_model, _add_parallelism, _add_training, _add_data, _add_checkpoints):
        add_group(parser)
    args = parser.parse_args(arguments)
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    try:
        args.data_parallel_size = check_world(WORLD_SIZE, tp, pp)
    except ConfigurationError as error:
        refuse(str(error))
    _fill_in_batch(args)
    if args.distributed_backend is None:
        args.distributed_backend = "nccl" if torch.cuda.is_available() else "gloo"
    if args.distributed_backend == "nccl" and not torch.cuda.is_available():
        refuse("--distributed-backend nccl needs GPUs, and torch sees none: use gloo, which trains on the CPU")
    args.device = "cpu" if args.distributed_backend == "gloo" else None
    if args.sequence_parallel and args.seq_length % tp:
        refuse(f"--sequence-parallel cuts --seq-length {args.seq_length} over {tp} ranks: use a multiple of {tp}")
    if args.tokenizer_type != "ByteLevelTokenizer" and not args.tokenizer_model:
        refuse(f"--tokenizer-type {args.tokenizer_type} needs --tokenizer-model (a .model file, folder or hub name)")
    if args.save_interval and not args.save:
        refuse("--save-interval says when to save, but not where: add --save FOLDER")
    return args


def refuse(message: str) -> NoReturn:
    """End every rank; the first one says why.

    Raises:
        SystemExit: Always.
    """
    raise SystemExit(f"pretrain_gpt.py: error: {message}" if RANK == 0 else 2)


def build_config(args: argparse.Namespace, tokenizer: Any) -> PreTrainedConfig:
    """The model's configuration: built from the sizes, or read from a folder or the hub."""
    sizes = {
        "num_hidden_layers": ("--num-layers", args.num_layers),
        "hidden_size": ("--hidden-size", args.hidden_size),
        "num_attention_heads": ("--num-attention-heads", args.num_attention_heads),
        "num_key_value_heads": ("--num-query-groups", args.num_query_groups),
        "intermediate_size": ("--ffn-hidden-size", args.ffn_hidden_size),
        "max_position_embeddings": ("--max-position-embeddings", args.max_position_embeddings),
    }
    given = {name: value for name, (_, value) in sizes.items() if value is not None}
    if args.model in CONFIG_MAPPING and not Path(args.model).is_dir():
        missing = [sizes[name][0] for name in list(sizes)[:3] if name not in given]
        if missing:
            refuse(f"--model {args.model} is built from its sizes: add {', '.join(missing)}")
        given = {"max_position_embeddings": args.seq_length, "intermediate_size": 4 * args.hidden_size} | given
        config = _build(args.model, given, tokenizer)
    elif given:
        flags = ", ".join(sizes[name][0] for name in given)
        refuse(f"the sizes of --model {args.model} come from its config.json: leave out {flags}")
    else:
        try:
            config = AutoConfig.from_pretrained(args.model)
        except (OSError, ValueError) as error:
            refuse(f"--model {args.model} is no architecture, folder or hub name with a config.json: {error}")
    if config.vocab_size < len(tokenizer):
        refuse(f"the tokenizer has {len(tokenizer)} tokens, --model {args.model} only {config.vocab_size}")
    longest = getattr(config, "max_position_embeddings", args.seq_length)
    if longest < args.seq_length:
        refuse(f"--seq-length {args.seq_length} is more than the model's {longest} positions")
    return config


def _build(name: str, sizes: dict[str, Any], tokenizer: Any) -> PreTrainedConfig:
    default = AutoConfig.for_model(name)
    if "num_key_value_heads" in sizes and not hasattr(default, "num_key_value_heads"):
        refuse(f"{name} has no grouped-query attention: leave out --num-query-groups, or use --model llama")
    if hasattr(default, "n_inner"):
        sizes["n_inner"] = sizes.pop("intermediate_size")
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if ids["bos_token_id"] is None:
        ids["bos_token_id"] = ids["eos_token_id"]
    return AutoConfig.for_model(name, vocab_size=len(tokenizer), **ids, **sizes)


def _fill_in_batch(args: argparse.Namespace) -> None:
    """Global batch = micro batch x dp x number of microbatches."""
    micro, dp = args.micro_batch_size, args.data_parallel_size
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    if args.global_batch_size is None:
        args.global_batch_size = micro * dp * (args.num_microbatches or 1)
    replicas = f"{dp} replicas (world size {WORLD_SIZE} / (tp {tp} x pp {pp}))"
    if args.global_batch_size % (micro * dp):
        refuse(
            f"--global-batch-size {args.global_batch_size} is no multiple of --micro-batch-size {micro} x {replicas} "
            f"= {micro * dp}: use a multiple of {micro * dp}"
        )
    computed = args.global_batch_size // (micro * dp)
    if args.num_microbatches not in (None, computed):
        refuse(
            f"--num-microbatches {args.num_microbatches} contradicts --global-batch-size {args.global_batch_size}: "
            f"{args.global_batch_size} / (--micro-batch-size {micro} x {replicas}) = {computed}: leave one of them out"
        )
    args.num_microbatches = computed


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="gpt2", help="gpt2, llama, gpt_neox, ...; or a hub name or folder: with "
                       "weights in the folder training starts from them, else from its config.json")  # fmt: skip
    for flag in ("--num-layers", "--hidden-size", "--num-attention-heads"):
        group.add_argument(flag, type=_positive)
    group.add_argument("--num-query-groups", type=_positive, help="key and value heads; default: as many as heads")
    group.add_argument("--ffn-hidden-size", type=_positive, help="default: 4 x hidden size")
    group.add_argument("--seq-length", type=_positive, required=True)
    group.add_argument("--max-position-embeddings", type=_positive, help="default: --seq-length")
    group.add_argument("--bf16", action="store_true", help="parameters in bfloat16")


def _add_parallelism(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("parallelism")
    group.add_argument("--tensor-model-parallel-size", type=_positive, default=1)
    group.add_argument("--pipeline-model-parallel-size", type=_positive, default=1)
    group.add_argument("--sequence-parallel", action="store_true")
    group.add_argument("--distributed-backend", choices=["nccl", "gloo"], help="default: nccl if there are GPUs")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--micro-batch-size", type=_positive, required=True)
    group.add_argument("--global-batch-size", type=_positive, help="default: one microbatch per replica")
    group.add_argument("--num-microbatches", type=_positive, help="default: global / (micro x dp)")
    group.add_argument("--train-iters", type=_positive, required=True)
    group.add_argument("--optimizer", choices=["adam", "sgd"], default="adam")
    group.add_argument("--learning-rate", "--lr", type=float, default=3e-4)
    group.add_argument("--lr-decay-style", choices=["cosine", "linear", "constant"], default="cosine")
    group.add_argument("--lr-warmup-iters", type=int, default=0)
    group.add_argument("--weight-decay", type=float, default=0.01)
    group.add_argument("--clip-grad", type=float, default=1.0, help="0: never clip")
    group.add_argument("--seed", type=int, default=1234)
    group.add_argument("--log-interval", type=_positive, default=10)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--train-data-path", nargs="+", required=True, metavar="PATH",
                       help="text files, globs, or a hub dataset as name or name:config")  # fmt: skip
    group.add_argument("--valid-data-path", nargs="+", metavar="PATH")
    group.add_argument("--data-cache-path", type=Path, help="default: ~/.cache/hf_tpp")
    group.add_argument("--tokenizer-type", default="HuggingFaceTokenizer",
                       choices=["SentencePieceTokenizer", "HuggingFaceTokenizer", "ByteLevelTokenizer"])  # fmt: skip
    group.add_argument("--tokenizer-model", help="a SentencePiece .model file; a tokenizer's folder or hub name")
    group.add_argument("--num-workers", type=_positive, default=1, help="processes that tokenize")
    group.add_argument("--eval-interval", type=_positive, default=1000)
    group.add_argument("--eval-iters", type=_positive, default=10)


def _add_checkpoints(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("checkpoints")
    group.add_argument("--save", type=Path, help="folder of this run: checkpoints, log.jsonl and the final model")
    group.add_argument("--load", type=Path, help="a run's folder or one step; if it is --save it may be empty yet")
    group.add_argument("--save-interval", type=_positive, help="default: at the end only")
    group.add_argument("--async-save", action="store_true", help="write checkpoints while training goes on")
