"""Llama, and the families that share its names: Mistral, Qwen2, Qwen2.5, Qwen3."""

from hf_tpp_conversion.layouts import GATE_UP, SEPARATE
from hf_tpp_conversion.names.rows import NameTable, Row, linear, norm

__all__ = ["ATTENTION", "ENDS", "IGNORED", "LLAMA", "MLP"]

_M, _H = "decoder.layers.{layer}", "model.layers.{layer}"
_QKV = [f"{_H}.self_attn.{name}_proj" for name in "qkv"]

IGNORED = (r"rotary_emb\.inv_freq$",)
ENDS = [
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    *norm("decoder.final_layernorm", "model.norm"),
    Row("output_layer.weight", ("lm_head.weight",)),
]
ATTENTION = [
    *norm(f"{_M}.input_layernorm", f"{_H}.input_layernorm"),
    *linear(f"{_M}.self_attention.linear_qkv", _QKV, SEPARATE),
    *norm(f"{_M}.self_attention.q_layernorm", f"{_H}.self_attn.q_norm"),
    *norm(f"{_M}.self_attention.k_layernorm", f"{_H}.self_attn.k_norm"),
    *linear(f"{_M}.self_attention.linear_proj", f"{_H}.self_attn.o_proj"),
    *norm(f"{_M}.pre_mlp_layernorm", f"{_H}.post_attention_layernorm"),
]
MLP = [
    *linear(f"{_M}.mlp.linear_fc1", [f"{_H}.mlp.gate_proj", f"{_H}.mlp.up_proj"], GATE_UP),
    *linear(f"{_M}.mlp.linear_fc2", f"{_H}.mlp.down_proj"),
]

LLAMA = NameTable([*ENDS, *ATTENTION, *MLP], base="model.", ignored=IGNORED)
