"""Models of nobody's: GPT-2, Llama and GPT-NeoX whose modules compute the same under names that no table has."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2LMHeadModel, GPTNeoXForCausalLM, LlamaForCausalLM, PreTrainedModel
from transformers.models.gpt2.modeling_gpt2 import GPT2MLP, GPT2Attention
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, GPTNeoXMLP
from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as apply_rotary_to_part
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, apply_rotary_pos_emb

from hf_tpp.plan.layout import Layout
from tests.parity.models import tiny_config


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """[batch, heads, seq, head] -> [batch, seq, heads x head]; the mask as transformers makes it for sdpa."""
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1)
    return x.transpose(1, 2).flatten(2)


class LlamaAsks(nn.Module):
    """q, k, v and o as ask, tag, give and tell; the groups are counted under another name."""

    def __init__(self, like: LlamaAttention):
        super().__init__()
        self.ask, self.tag, self.give, self.tell = like.q_proj, like.k_proj, like.v_proj, like.o_proj
        self.size, self.sharing = like.head_dim, like.num_key_value_groups
        self.layer_idx = like.layer_idx

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **_):
        shape = (*hidden_states.shape[:-1], -1, self.size)
        q, k, v = (linear(hidden_states).view(shape).transpose(1, 2) for linear in (self.ask, self.tag, self.give))
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        k, v = (x.repeat_interleave(self.sharing, dim=1) for x in (k, v))
        return self.tell(attend(q, k, v, attention_mask)), None


class LlamaHalves(nn.Module):
    """[gate|up] in one weight."""

    def __init__(self, like: LlamaMLP):
        super().__init__()
        self.both = nn.Linear(like.hidden_size, 2 * like.intermediate_size, bias=False)
        self.both.weight.data = torch.cat([like.gate_proj.weight.data, like.up_proj.weight.data])
        self.back = like.down_proj

    def forward(self, x):
        gate, up = self.both(x).chunk(2, dim=-1)
        return self.back(F.silu(gate) * up)


class GPT2Mixes(nn.Module):
    """[q|k|v] in a Conv1D; it reads its width and its heads from numbers of unknown names."""

    def __init__(self, like: GPT2Attention):
        super().__init__()
        self.mix, self.back = like.c_attn, like.c_proj
        self.parts, self.size, self.layer_idx = like.num_heads, like.head_dim, like.layer_idx

    def forward(self, hidden_states, past_key_values=None, attention_mask=None, **_):
        width = self.parts * self.size
        q, k, v = (
            x.view(*x.shape[:-1], self.parts, self.size).transpose(1, 2)
            for x in self.mix(hidden_states).split(width, -1)
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        return self.back(attend(q, k, v, attention_mask)), None


class GPT2Grows(nn.Module):
    def __init__(self, like: GPT2MLP):
        super().__init__()
        self.grow, self.fold, self.act, self.dropout = like.c_fc, like.c_proj, like.act, like.dropout

    def forward(self, hidden_states):
        return self.dropout(self.fold(self.act(self.grow(hidden_states))))


class NeoXBraids(nn.Module):
    """Per head [q k v]."""

    def __init__(self, like: GPTNeoXAttention):
        super().__init__()
        self.braid, self.comb = like.query_key_value, like.dense
        self.size, self.layer_idx = like.head_size, like.layer_idx

    def forward(self, hidden_states, attention_mask, layer_past=None, position_embeddings=None, **_):
        braid = self.braid(hidden_states).view(*hidden_states.shape[:-1], -1, 3 * self.size).transpose(1, 2)
        q, k, v = braid.chunk(3, dim=-1)
        q, k = apply_rotary_to_part(q, k, *position_embeddings)
        if layer_past is not None:
            k, v = layer_past.update(k, v, self.layer_idx)
        return self.comb(attend(q, k, v, attention_mask)), None


class NeoXGrows(nn.Module):
    def __init__(self, like: GPTNeoXMLP):
        super().__init__()
        self.grow, self.fold, self.act = like.dense_h_to_4h, like.dense_4h_to_h, like.act

    def forward(self, hidden_states):
        return self.fold(self.act(self.grow(hidden_states)))


class Odd2(nn.Module):
    """Two linears and something between."""

    def __init__(self, size: int = 32, inner: int = 48):
        super().__init__()
        self.grow, self.fold = nn.Linear(size, inner), nn.Linear(inner, size)


class Scaled(Odd2):
    """A scale for each neuron, one for all, one behind the row."""

    def __init__(self):
        super().__init__()
        self.each, self.all, self.behind = (nn.Parameter(torch.ones(size)) for size in (48, 1, 32))

    def forward(self, x):
        return self.behind * self.fold(self.all * F.relu(self.grow(x) * self.each))


class LowRank(Odd2):
    """A narrow linear in front of the wide one."""

    def __init__(self):
        super().__init__()
        self.narrow, self.norm, self.widen = nn.Linear(32, 8), nn.LayerNorm(8), nn.Linear(8, 48)

    def forward(self, x):
        return self.fold(F.silu(self.grow(x)) * self.widen(self.norm(self.narrow(x))))


class OddLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn, layer.mlp = LlamaAsks(layer.self_attn), LlamaHalves(layer.mlp)


class OddExtras(OddLlama):
    """With parameters beside the linears of its MLPs."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp, self.model.layers[1].mlp = Scaled(), LowRank()


class OddGPT2(GPT2LMHeadModel):
    def __init__(self, config):
        super().__init__(config)
        for block in self.transformer.h:
            block.attn, block.mlp = GPT2Mixes(block.attn), GPT2Grows(block.mlp)


class OddNeoX(GPTNeoXForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.gpt_neox.layers:
            layer.attention, layer.mlp = NeoXBraids(layer.attention), NeoXGrows(layer.mlp)


@dataclass(frozen=True)
class Odd:
    """A model under odd names.

    Attributes:
        kind: Its class.
        like: The class that it computes the same as.
        config: Name of a tiny configuration.
        names: Its names -> the usual ones.
    """

    kind: type[PreTrainedModel]
    like: type[PreTrainedModel]
    config: str
    names: dict[str, str]

    def build(self, num_layers: int = 2) -> PreTrainedModel:
        """The same weights in every process."""
        torch.manual_seed(1)
        model = self.kind(tiny_config(self.config, num_layers))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
        return model

    def build_usual(self, num_layers: int = 2) -> PreTrainedModel:
        """What the table of names knows."""
        return self.like(tiny_config(self.config, num_layers))


_LLAMA = {"ask": "q_proj", "tag": "k_proj", "give": "v_proj", "tell": "o_proj", "back": "down_proj"}
ODD = {
    "gpt2": Odd(
        OddGPT2, GPT2LMHeadModel, "gpt2", {"mix": "c_attn", "back": "c_proj", "grow": "c_fc", "fold": "c_proj"}
    ),
    "llama_gqa": Odd(OddLlama, LlamaForCausalLM, "llama_gqa", _LLAMA),
    "llama_one_kv": Odd(OddLlama, LlamaForCausalLM, "llama_one_kv", _LLAMA),
    "gpt_neox": Odd(
        OddNeoX,
        GPTNeoXForCausalLM,
        "gpt_neox",
        {"braid": "query_key_value", "comb": "dense", "grow": "dense_h_to_4h", "fold": "dense_4h_to_h"},
    ),
}
EXTRAS = Odd(OddExtras, LlamaForCausalLM, "llama_gqa", _LLAMA)


def pieces(layout: Layout, tp_size: int) -> list[list[int]]:
    """Channels of each rank: [q|1 x 2|1 x 2] and [q|1 x 4] are the same."""
    ranks = [layout.segments(rank, tp_size) for rank in range(tp_size)]
    return [[channel for piece in rank for channel in range(piece.start, piece.stop)] for rank in ranks]
