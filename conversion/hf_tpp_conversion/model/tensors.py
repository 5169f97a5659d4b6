"""Every tensor of an architecture: its name and shape in the whole model, and along which dimension ranks cut it.

Names are those of Megatron's local layer spec with the layer's number in the whole model:

    decoder.layers.7.self_attention.linear_qkv.weight   [(heads + 2 groups) channels, hidden]   cut along 0
    decoder.layers.7.mlp.linear_fc1.weight              [2 neurons, hidden]: all gate, all up    halves cut along 0

Names of other layouts (Transformer Engine, experts, older versions) are translated where files are read and written.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from hf_tpp.plan.layout import Block, Layout
from hf_tpp_conversion.model.architecture import Architecture

__all__ = ["HEAD", "POSITIONS", "WORDS", "TensorSpec", "tensor_specs"]

WORDS = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
HEAD = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of the whole model.

    Attributes:
        name: Its name.
        shape: Its shape without vocabulary padding.
        dim: The dimension that tensor-parallel ranks cut, or None if each holds the whole.
        layout: How it is cut.
        layer: Its layer, or None.
        expert: Its expert, or None.
        is_vocabulary: Dimension 0 is the vocabulary, which Megatron pads.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    layout: Layout | None = None
    layer: int | None = None
    expert: int | None = None
    is_vocabulary: bool = False


def tensor_specs(model: Architecture) -> dict[str, TensorSpec]:
    """All tensors of a model, in the order of its layers. A tied head is not listed: it is the embedding."""
    hidden, vocabulary = model.hidden_size, (model.vocab_size, model.hidden_size)
    specs = [_vocabulary(WORDS, vocabulary)]
    if model.position_embedding == "learned_absolute":
        specs.append(TensorSpec(POSITIONS, (model.max_position_embeddings, hidden)))
    for layer in range(model.num_layers):
        specs += _layer(model, layer)
    specs += _norm(model, "decoder.final_layernorm", hidden, None)
    if not model.tied:
        specs.append(_vocabulary(HEAD, vocabulary))
    return {spec.name: spec for spec in specs}


def _vocabulary(name: str, shape: tuple[int, ...]) -> TensorSpec:
    return TensorSpec(name, shape, 0, Layout((Block(shape[0]),)), is_vocabulary=True)


def _layer(model: Architecture, layer: int) -> Iterator[TensorSpec]:
    prefix, hidden = f"decoder.layers.{layer}", model.hidden_size
    width = model.num_attention_heads * model.kv_channels
    yield from _norm(model, f"{prefix}.input_layernorm", hidden, layer)
    yield from _column(f"{prefix}.self_attention.linear_qkv", (model.qkv_size, hidden), layer, model.qkv_bias)
    if model.qk_norm:
        yield from _norm(model, f"{prefix}.self_attention.q_layernorm", model.kv_channels, layer)
        yield from _norm(model, f"{prefix}.self_attention.k_layernorm", model.kv_channels, layer)
    yield from _row(f"{prefix}.self_attention.linear_proj", (hidden, width), layer, model.linear_bias)
    yield from _norm(model, f"{prefix}.pre_mlp_layernorm", hidden, layer)
    if not model.has_experts(layer) or model.experts is None:
        yield from _mlp(model, f"{prefix}.mlp", model.ffn_hidden_size, layer)
        return
    experts = model.experts
    yield TensorSpec(f"{prefix}.mlp.router.weight", (experts.num_experts, hidden), layer=layer)
    for expert in range(experts.num_experts):
        yield from _mlp(model, f"{prefix}.mlp.experts.{expert}", experts.ffn_hidden_size, layer, expert)
    if experts.shared_ffn_hidden_size:
        yield from _mlp(model, f"{prefix}.mlp.shared_experts", experts.shared_ffn_hidden_size, layer)
        if experts.shared_gate:
            yield TensorSpec(f"{prefix}.mlp.shared_experts.gate_weight", (1, hidden), layer=layer)


def _norm(model: Architecture, name: str, size: int, layer: int | None) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{name}.weight", (size,), layer=layer)
    if model.normalization == "LayerNorm":
        yield TensorSpec(f"{name}.bias", (size,), layer=layer)


def _mlp(model: Architecture, name: str, size: int, layer: int, expert: int | None = None) -> Iterator[TensorSpec]:
    parts = 2 if model.gated else 1
    hidden = model.hidden_size
    yield from _column(f"{name}.linear_fc1", (parts * size, hidden), layer, model.linear_bias, expert, parts)
    yield from _row(f"{name}.linear_fc2", (hidden, size), layer, model.linear_bias, expert)


def _column(
    name: str, shape: tuple[int, int], layer: int, bias: bool, expert: int | None = None, parts: int = 1
) -> Iterator[TensorSpec]:
    """A linear whose outputs are cut, each of `parts` blocks by itself."""
    layout = Layout((Block(shape[0] // parts),) * parts)
    yield TensorSpec(f"{name}.weight", shape, 0, layout, layer, expert)
    if bias:
        yield TensorSpec(f"{name}.bias", shape[:1], 0, layout, layer, expert)


def _row(name: str, shape: tuple[int, int], layer: int, bias: bool, expert: int | None = None) -> Iterator[TensorSpec]:
    """A linear whose inputs are cut; its bias is not."""
    yield TensorSpec(f"{name}.weight", shape, 1, Layout((Block(shape[1]),)), layer, expert)
    if bias:
        yield TensorSpec(f"{name}.bias", shape[:1], layer=layer, expert=expert)
