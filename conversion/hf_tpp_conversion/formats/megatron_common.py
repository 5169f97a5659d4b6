"""What both Megatron formats share: from args to a model on reading, and the common files on writing."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hf_tpp.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from hf_tpp_conversion.configs.megatron import architecture_from_args, architecture_to_args
from hf_tpp_conversion.configs.megatron_partition import partition_to_args
from hf_tpp_conversion.families import family_of_config
from hf_tpp_conversion.files.json_reading import read_json
from hf_tpp_conversion.formats.checkpoint import Checkpoint, Plan
from hf_tpp_conversion.formats.megatron_folder import HF_FOLDER, LATEST, hf_side_files
from hf_tpp_conversion.model.architecture import Architecture
from hf_tpp_conversion.model.partition import Partition
from hf_tpp_conversion.model.tensors import WORDS

__all__ = ["MegatronOptions", "describe", "iteration_of", "output_args", "plan_common"]


@dataclass(frozen=True, slots=True)
class MegatronOptions:
    """How a Megatron checkpoint is to be written.

    Attributes:
        partition: How it is cut.
        layer_spec: "te" or "local".
        dtype: Type of the weights; None: as they are.
        grouped: Experts as one grouped linear.
    """

    partition: Partition
    layer_spec: str = "te"
    dtype: str | None = None
    grouped: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What is known of a Megatron checkpoint apart from its tensors."""

    model: Architecture
    args: dict[str, Any]
    family: str | None
    hf_files: dict[str, Path]


def describe(root: Path, args: Mapping[str, Any], given: Mapping[str, Any], config: Path | None) -> Description:
    """The model of a Megatron checkpoint, from its args, what the user gave, and a config.json.

    Args:
        root: The folder above the iteration.
        args: The plain args in the checkpoint.
        given: Args of the command line; they win.
        config: A folder with a config.json, or the file; None: the one that an earlier conversion kept, if any.

    Raises:
        CheckpointError: The args and the config.json contradict each other.
        UnsupportedModelError: Something is missing, or no such model can be converted.
    """
    all_args = dict(args) | dict(given)
    side = hf_side_files(root)
    file = side.get("config.json")
    if config is not None:
        file = config / "config.json" if config.is_dir() else config
        side = {"config.json": file}
    if file is None:
        return Description(architecture_from_args(all_args), all_args, None, side)
    family, model = family_of_config(read_json(file), str(file))
    if "num_layers" in args:
        # Args that Megatron's own flags left out are filled in from the configuration.
        read = architecture_from_args(
            architecture_to_args(model) | {k: v for k, v in all_args.items() if v is not None}
        )
        aux = model.experts and read.experts and replace(read.experts, aux_loss=model.experts.aux_loss)
        read = replace(read, experts=aux, max_position_embeddings=model.max_position_embeddings)
        if "vocab_size" not in all_args or all_args["vocab_size"] is None:
            read = replace(read, vocab_size=model.vocab_size)
        if read != model:
            raise CheckpointError(
                f"{root} does not hold the model of {file}: {'; '.join(read.differences(model)[:6])} (args and "
                f"config.json): pass the config.json of this very model with --config"
            )
    return Description(model, all_args, family.model_type, side)


def output_args(source: Checkpoint, options: MegatronOptions, given: Mapping[str, Any]) -> dict[str, Any]:
    """The args of a new checkpoint: the source's, changed where model or partition ask for it.

    Raises:
        ConfigurationError: A given arg contradicts the model.
        UnsupportedModelError: Megatron has no args for this model: it would run another one without a word.
    """
    args = architecture_to_args(source.model) | partition_to_args(source.model, options.partition)
    for name, value in given.items():
        if name in args and args[name] != value and name != "seq_length":
            raise ConfigurationError(f"--arg {name}={value} contradicts the model, which has {args[name]}")
    kept = {name: value for name, value in source.args.items() if name not in args or name == "seq_length"}
    dtype = options.dtype or source.tensors[WORDS].dtype
    switches = {
        "transformer_impl": "transformer_engine" if options.layer_spec == "te" else "local",
        "moe_grouped_gemm": options.grouped,
        "bf16": dtype == "BF16",
        "fp16": dtype == "F16",
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "no_load_optim": True,
        "no_load_rng": True,
        "finetune": True,
        "tokenizer_type": "HuggingFaceTokenizer",
        "data_parallel_size": 1,
    }
    layer_spec = {name: switches[name] for name in ("transformer_impl", "moe_grouped_gemm", "bf16", "fp16")}
    merged = {**switches, **kept, **args, **layer_spec, **given}
    understood = architecture_from_args(merged)
    if understood != source.model:
        raise UnsupportedModelError(
            f"{source.path}: Megatron's args cannot describe this model: it has {_and(source.model, understood)}"
        )
    return dict(sorted(merged.items()))  # in one order, whatever the way here: equal models give equal files


def _and(model: Architecture, understood: Architecture) -> str:
    return "; ".join(text.replace(" and ", ", they would mean ") for text in model.differences(understood)[:4])


def plan_common(plan: Plan, source: Checkpoint, iteration: str) -> None:
    """Add the files that lie beside the weights."""
    plan.small[LATEST] = iteration.removeprefix("iter_").encode()
    for name, path in source.hf_files.items():
        plan.copies[f"{HF_FOLDER}/{name}"] = path


def iteration_of(source: Checkpoint) -> str:
    """Name of the new iteration's folder: a converted model is a release."""
    return "release"
