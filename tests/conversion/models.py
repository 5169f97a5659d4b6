"""Small Hugging Face checkpoints of every family, written without transformers: random bits under the right names."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_tpp_conversion.families import FAMILIES, Family
from hf_tpp_conversion.files.dtypes import TORCH_NAMES
from hf_tpp_conversion.model.architecture import Architecture, Experts
from hf_tpp_conversion.model.tensors import tensor_specs

DENSE = {"gated": True, "activation": "silu"}
PLAIN = {"gated": False, "activation": "gelu_tanh", "normalization": "LayerNorm", "linear_bias": True, "qkv_bias": True}
SETTINGS = {
    "gpt2": {**PLAIN, "position_embedding": "learned_absolute", "tied": True},
    "gpt_neox": {**PLAIN, "activation": "gelu", "rotary_percent": 0.5},
    "llama": {**DENSE, "llama3_factor": 8.0},
    "mistral": {**DENSE, "window": 7},
    "qwen2": {**DENSE, "qkv_bias": True, "tied": True},
    "qwen3": {**DENSE, "qk_norm": True},
    "mixtral": {**DENSE, "experts": True},
    "qwen2_moe": {**DENSE, "qkv_bias": True, "experts": True},
    "qwen3_moe": {**DENSE, "qk_norm": True, "experts": True},
    "starcoder2": {**PLAIN, "tied": True, "window": 9},
    "phi3": {**DENSE},
}


def architecture(
    family: str,
    layers: int = 4,
    heads: int = 4,
    groups: int = 2,
    channels: int = 8,
    vocab: int = 131,
    **changes: object,
) -> Architecture:
    """A model of a family with the given sizes."""
    is_gpt = family in ("gpt2", "gpt_neox")
    fields = dict(SETTINGS[family]) | changes
    neurons = 16 * heads
    if fields.get("experts") is True:
        shared = 8 * heads if family == "qwen2_moe" else 0
        own = neurons if family == "mixtral" else 12 * heads
        fields["experts"] = Experts(4, own, 2, family == "mixtral", shared, shared > 0, 0.001)
    return Architecture(
        num_layers=layers,
        hidden_size=heads * channels,
        num_attention_heads=heads,
        num_query_groups=heads if is_gpt else groups,
        kv_channels=channels,
        ffn_hidden_size=neurons,
        vocab_size=vocab,
        max_position_embeddings=32,
        **fields,
    )


def write_hf(folder: Path, family: str, model: Architecture, dtype: str = "F32", seed: int = 0) -> Path:
    """A checkpoint folder with random values (every bit pattern is a value here, NaNs included)."""
    row: Family = FAMILIES[family]
    generator = torch.Generator().manual_seed(seed)
    kind = getattr(torch, TORCH_NAMES[dtype])
    tensors = {}
    for spec in tensor_specs(model).values():
        line = row.table.row(spec)
        for name, shape in zip(line.hf, line.transform.part_shapes(spec.shape, model), strict=True):
            bits = torch.randint(256, (*shape, kind.itemsize), generator=generator, dtype=torch.uint8)
            tensors[name] = bits.view(kind).squeeze(-1).contiguous()
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(row.config(model, TORCH_NAMES[dtype])))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


def bits(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, bytes]]:
    """Name -> shape, type and bytes of every tensor in a folder."""
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                found[name] = (tuple(tensor.shape), tensor.dtype, tensor.view(torch.uint8).numpy().tobytes())
    return found


def files(folder: Path) -> dict[str, bytes]:
    """Relative path -> content of every file below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
