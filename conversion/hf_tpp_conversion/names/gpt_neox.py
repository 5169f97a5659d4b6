"""GPT-NeoX and Pythia. Every head stores [q k v], as Megatron does for groups of one head."""

from hf_tpp_conversion.names.rows import NameTable, Row, linear, norm

__all__ = ["GPT_NEOX"]

_M, _H = "decoder.layers.{layer}", "gpt_neox.layers.{layer}"

GPT_NEOX = NameTable(
    [
        Row("embedding.word_embeddings.weight", ("gpt_neox.embed_in.weight",)),
        *norm(f"{_M}.input_layernorm", f"{_H}.input_layernorm"),
        *linear(f"{_M}.self_attention.linear_qkv", f"{_H}.attention.query_key_value"),
        *linear(f"{_M}.self_attention.linear_proj", f"{_H}.attention.dense"),
        *norm(f"{_M}.pre_mlp_layernorm", f"{_H}.post_attention_layernorm"),
        *linear(f"{_M}.mlp.linear_fc1", f"{_H}.mlp.dense_h_to_4h"),
        *linear(f"{_M}.mlp.linear_fc2", f"{_H}.mlp.dense_4h_to_h"),
        *norm("decoder.final_layernorm", "gpt_neox.final_layer_norm"),
        Row("output_layer.weight", ("embed_out.weight",)),
    ],
    base="gpt_neox.",
    ignored=[r"\.attention\.(masked_)?bias$", r"rotary_emb\.inv_freq$"],
)
