"""Small configurations of transformers for every family that is converted."""

from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Starcoder2Config,
)

SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 96, "vocab_size": 131, "max_position_embeddings": 64}
CONFIGS = {
    "gpt2": GPT2Config(n_embd=64, n_layer=4, n_head=4, vocab_size=131, n_positions=64, bos_token_id=0, eos_token_id=0),
    "llama": LlamaConfig(**SMALL),
    "mistral": MistralConfig(**SMALL, sliding_window=5),
    "qwen3": Qwen3Config(**SMALL, head_dim=16),
}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
OTHERS = {
    "llama3": LlamaConfig(
        **SMALL, rope_parameters={**LLAMA3, "original_max_position_embeddings": 8192, "rope_theta": 1e4}
    ),
    "linear": LlamaConfig(**SMALL, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}),
    "gpt_neox": GPTNeoXConfig(**SMALL, use_parallel_residual=False, rotary_pct=0.5),
    "qwen2": Qwen2Config(**SMALL, tie_word_embeddings=True),
    "phi3": Phi3Config(**SMALL, pad_token_id=None),
    "starcoder2": Starcoder2Config(**SMALL, sliding_window=5),
    "mixtral": MixtralConfig(**SMALL, num_local_experts=4),
    "qwen2_moe": Qwen2MoeConfig(**SMALL, **EXPERTS, shared_expert_intermediate_size=32),
    "qwen3_moe": Qwen3MoeConfig(**SMALL, **EXPERTS, head_dim=16, norm_topk_prob=True),
}
ALL = CONFIGS | OTHERS
