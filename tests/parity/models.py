"""Tiny models of each family, and batches with padding and uneven token counts."""

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
)

VOCABULARY = 131
LLAMA = {"hidden_size": 32, "intermediate_size": 44, "num_attention_heads": 4, "max_position_embeddings": 64}


def tiny_config(name: str, num_layers: int = 5, dropout: float = 0.0, vocab_size: int = VOCABULARY) -> PreTrainedConfig:
    """A small configuration; `name` is a family with a variant."""
    common = {"vocab_size": vocab_size, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    llama = {**common, **LLAMA, "num_hidden_layers": num_layers, "attention_dropout": dropout}
    match name:
        case "gpt2":
            sizes = {"n_embd": 32, "n_head": 4, "n_layer": num_layers, "n_positions": 64}
            rates = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
            return GPT2Config(**common, **sizes, **rates)
        case "gpt_neox":
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
            rates = {"attention_dropout": dropout, "hidden_dropout": dropout}
            return GPTNeoXConfig(
                **common, **sizes, **rates, num_hidden_layers=num_layers, max_position_embeddings=64, rotary_pct=0.5
            )
        case "llama_gqa":
            return LlamaConfig(**llama, num_key_value_heads=2)
        case "llama_one_kv":
            return LlamaConfig(**llama, num_key_value_heads=1)
        case "llama_tied":
            return LlamaConfig(**llama, num_key_value_heads=4, tie_word_embeddings=True)
        case "llama_bias":
            return LlamaConfig(**llama, num_key_value_heads=2, attention_bias=True, mlp_bias=True)
        case "mistral":
            return MistralConfig(**llama, num_key_value_heads=2, sliding_window=8)
        case "mixtral":
            sizes = {"intermediate_size": 48, "num_local_experts": 4}
            return MixtralConfig(**{**llama, **sizes}, num_key_value_heads=2)
        case "qwen2":
            return Qwen2Config(**llama, num_key_value_heads=2)
    raise ValueError(name)


def tiny_model(
    name: str, num_layers: int = 5, attention: str = "sdpa", dropout: float = 0.0, vocab_size: int = VOCABULARY
) -> nn.Module:
    """The same weights in every process; none of them is at a special value such as 0 or 1."""
    torch.manual_seed(1)
    config = tiny_config(name, num_layers, dropout, vocab_size)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def make_batch(rows: int, seq: int, seed: int = 0, vocab_size: int = VOCABULARY) -> dict[str, torch.Tensor]:
    """Token ids with padding on the right, labels ignored there and at the start of some rows."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(3, vocab_size, (rows, seq), generator=generator)
    lengths = torch.randint(seq // 2, seq + 1, (rows,), generator=generator)
    lengths[0] = seq
    attention_mask = (torch.arange(seq) < lengths[:, None]).long()
    input_ids = input_ids.where(attention_mask.bool(), 0)
    labels = input_ids.where(attention_mask.bool(), -100)
    labels[1::2, : seq // 3] = -100
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
