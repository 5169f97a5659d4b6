"""The small model that is checked, the same in every process, and the batches that it is checked with."""

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers import logging as transformers_logging

from hf_tpp.check.shrink import shrink, small_default

__all__ = ["Recipe", "build_config", "build_model", "make_batch", "make_prompt"]

NOISE = 0.05
ROWS, SEQ = 4, 16
FIRST_TOKEN = 4  # below lie padding, begin, end and the other special tokens of `shrink`


@dataclass(frozen=True)
class Recipe:
    """What to check; plain data, so that every process builds the same model from it.

    Attributes:
        model_type: Key of a transformers family; "" if `source` says it.
        source: Folder or hub name of a configuration; "" for the family's default one.
        config: Configuration values to use as they are, in place of a shrunk configuration.
        trust_remote_code: Run model code that comes with `source`.
        attention: Attention implementation; "" for transformers' choice.
        seed: Of the weights.
    """

    model_type: str = ""
    source: str = ""
    config: dict[str, Any] | None = None
    trust_remote_code: bool = False
    attention: str = ""
    seed: int = 1


def build_config(recipe: Recipe) -> PreTrainedConfig:
    """The small configuration of a recipe.

    Raises:
        ValueError: Unknown family.
        OSError: `source` holds no configuration.
    """
    if recipe.source:
        full = AutoConfig.from_pretrained(recipe.source, trust_remote_code=recipe.trust_remote_code)
        kind = type(full)
    else:
        if recipe.model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"transformers has no model family {recipe.model_type!r}: use a model_type, folder or name"
            )
        kind = CONFIG_MAPPING[recipe.model_type]
    if recipe.config is not None:
        config: PreTrainedConfig = kind.from_dict(dict(recipe.config))
        config.name_or_path = recipe.source
        return config
    return shrink(full) if recipe.source else small_default(kind())


def build_model(recipe: Recipe, **overrides: Any) -> nn.Module:
    """A small model on the CPU in training mode, without dropout; no weight is at a special value such as 0 or 1.

    Args:
        recipe: What to build.
        **overrides: Attributes to set on the configuration.

    Returns:
        The model; the same weights in every process.
    """
    with quiet():
        config = build_config(recipe)
        for name, value in overrides.items():
            setattr(config, name, value)
        options = {"attn_implementation": recipe.attention} if recipe.attention else {}
        torch.manual_seed(recipe.seed)
        with _uninitialized_as_nan():
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.trust_remote_code, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.generation_config = GenerationConfig(pad_token_id=0, do_sample=False)
    _perturb(model, recipe.seed)
    return model.train()  # type: ignore[no-any-return]


@torch.no_grad()
def _perturb(model: nn.Module, seed: int) -> None:
    """Add noise to every weight, and to the buffers that a checkpoint stores.

    The noise is small and additive, so that what must stay near its initial value (a decay, a scale) does. Values that
    the model leaves uninitialised become noise.
    """
    generator = torch.Generator().manual_seed(seed)
    stored = set(model.state_dict())
    buffers = [buffer for name, buffer in model.named_buffers() if name in stored]
    for tensor in (*model.parameters(), *buffers):
        if tensor.is_floating_point() and not (tensor.abs() > 1e3).any():  # masks are huge, and must stay
            noise = torch.randn(tensor.shape, generator=generator) * NOISE
            tensor.copy_(torch.nan_to_num(tensor) + noise.to(tensor.dtype))
    for module in model.modules():
        table = module._buffers.get("tid2eid")
        if table is not None:  # token -> experts: as zeros it would choose one expert twice, and none had a gradient
            choices = torch.rand((len(table), int(module.num_experts)), generator=generator).argsort(-1)  # type: ignore[arg-type]
            table.copy_(choices[:, : table.shape[1]])


@contextmanager
def _uninitialized_as_nan() -> Iterator[None]:
    """Memory that nobody writes would differ between processes; torch fills it with nan in its deterministic mode."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of third parties: tiny sizes and missing kernels are intended here."""
    verbosity = transformers_logging.get_verbosity()
    shows_progress = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shows_progress:
            transformers_logging.enable_progress_bar()


def make_batch(model: nn.Module, seed: int = 0, rows: int = ROWS, seq: int = SEQ) -> dict[str, Any]:
    """Token ids with padding on the right; labels ignored there and at the start of every other row.

    Args:
        model: Says how many tokens there are and which arguments it takes.
        seed: Of the tokens.
        rows: Rows of the batch.
        seq: Tokens per row, padding included.

    Returns:
        `input_ids` and, if the model takes them, `labels` and `attention_mask`, each [rows, seq], and `use_cache`: with
        a cache, which serves generation, some models cannot be trained.
    """
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(FIRST_TOKEN, _vocab_size(model), (rows, seq), generator=generator)
    lengths = torch.randint(seq // 2, seq + 1, (rows,), generator=generator)
    lengths[0] = seq
    attention_mask = (torch.arange(seq) < lengths[:, None]).long()
    input_ids = input_ids.where(attention_mask.bool(), 0)
    labels = input_ids.where(attention_mask.bool(), -100)
    labels[1::2, : seq // 3] = -100
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels, "use_cache": False}
    accepted = inspect.signature(type(model).forward).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    return {name: value for name, value in batch.items() if takes_all or name in accepted}


def make_prompt(model: nn.Module, rows: int = 2, seq: int = 6) -> torch.Tensor:
    """Token ids [rows, seq] to continue."""
    return torch.randint(FIRST_TOKEN, _vocab_size(model), (rows, seq), generator=torch.Generator().manual_seed(5))


def _vocab_size(model: nn.Module) -> int:
    return int(model.config.get_text_config().vocab_size)  # type: ignore[union-attr, operator]
