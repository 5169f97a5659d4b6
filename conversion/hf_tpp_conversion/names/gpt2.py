"""GPT-2. Its Conv1D stores weights as [in, out]."""

from hf_tpp_conversion.layouts import BLOCKS, SAME, TRANSPOSED, TRANSPOSED_BLOCKS
from hf_tpp_conversion.names.rows import NameTable, Row, linear, norm

__all__ = ["GPT2"]

_M, _H = "decoder.layers.{layer}", "transformer.h.{layer}"

GPT2 = NameTable(
    [
        Row("embedding.word_embeddings.weight", ("transformer.wte.weight",)),
        Row("embedding.position_embeddings.weight", ("transformer.wpe.weight",)),
        *norm(f"{_M}.input_layernorm", f"{_H}.ln_1"),
        *linear(f"{_M}.self_attention.linear_qkv", f"{_H}.attn.c_attn", TRANSPOSED_BLOCKS, bias=BLOCKS),
        *linear(f"{_M}.self_attention.linear_proj", f"{_H}.attn.c_proj", TRANSPOSED, bias=SAME),
        *norm(f"{_M}.pre_mlp_layernorm", f"{_H}.ln_2"),
        *linear(f"{_M}.mlp.linear_fc1", f"{_H}.mlp.c_fc", TRANSPOSED, bias=SAME),
        *linear(f"{_M}.mlp.linear_fc2", f"{_H}.mlp.c_proj", TRANSPOSED, bias=SAME),
        *norm("decoder.final_layernorm", "transformer.ln_f"),
        Row("output_layer.weight", ("lm_head.weight",)),
    ],
    base="transformer.",
    ignored=[r"\.attn\.(masked_)?bias$"],
)
