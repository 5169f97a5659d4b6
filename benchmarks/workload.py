"""What every contestant trains: the same weights, the same tokens, the same optimizer."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

__all__ = ["FAMILIES", "TINY", "Workload", "optimizer_of"]

FAMILIES = ("llama", "gpt2")


@dataclass(frozen=True)
class Workload:
    """A model and a global batch.

    Attributes:
        family: "llama" (untied, grouped-query attention) or "gpt2" (tied).
        vocab_size: None for the family's own: 32000 or 50257.
    """

    family: str = "llama"
    num_layers: int = 24
    hidden_size: int = 2048
    num_heads: int = 32
    num_kv_heads: int = 8
    mlp_size: int = 5632
    vocab_size: int | None = None
    seq_length: int = 2048
    micro_batch: int = 4
    num_microbatches: int = 8

    @property
    def vocabulary(self) -> int:
        """Entries of the vocabulary."""
        return self.vocab_size or {"llama": 32000, "gpt2": 50257}[self.family]

    @property
    def global_batch(self) -> int:
        """Rows of one step."""
        return self.micro_batch * self.num_microbatches

    @property
    def num_tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch * self.seq_length

    def config(self) -> Any:
        """The Hugging Face configuration, without dropout."""
        if self.family == "llama":
            return LlamaConfig(
                hidden_size=self.hidden_size,
                intermediate_size=self.mlp_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                num_key_value_heads=self.num_kv_heads,
                vocab_size=self.vocabulary,
                max_position_embeddings=self.seq_length,
            )
        return GPT2Config(
            n_embd=self.hidden_size,
            n_layer=self.num_layers,
            n_head=self.num_heads,
            vocab_size=self.vocabulary,
            n_positions=self.seq_length,
            attn_pdrop=0.0,
            embd_pdrop=0.0,
            resid_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )

    def model(self, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """The plain model with its seeded initial weights, the same values on every rank of one kind of device."""
        torch.manual_seed(0)
        with device:
            return AutoModelForCausalLM.from_config(self.config(), dtype=dtype).train()

    def tokens(self, device: torch.device) -> torch.Tensor:
        """One global batch, [rows, seq]: the same at every step, so that the loss falls."""
        generator = torch.Generator().manual_seed(0)
        shape = (self.global_batch, self.seq_length)
        return torch.randint(0, min(self.vocabulary, 32000), shape, generator=generator).to(device)

    def flops(self) -> int:
        """Floating-point operations of the model in one step: 6 x weights of products x tokens, plus attention.

        Forward 2, backward 4 operations per weight and token; embeddings are looked up and count nothing, the head
        counts with the vocabulary as it is. Attention: two products of [seq, head] x [head, seq] per head, half of
        which the causal mask leaves, so 6 x layers x seq x hidden per token. Recomputation and padding do not count.
        """
        hidden, kv = self.hidden_size, self.hidden_size // self.num_heads * self.num_kv_heads
        if self.family == "llama":
            layer = 2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * self.mlp_size
        else:
            layer = 12 * hidden * hidden
        weights = self.num_layers * layer + hidden * self.vocabulary
        return 6 * self.num_tokens * (weights + self.num_layers * self.seq_length * hidden)


TINY: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "mlp_size": 64,
    "vocab_size": 128,
    "seq_length": 16,
    "micro_batch": 2,
    "num_microbatches": 4,
}
"""A workload that a CPU trains in no time."""


def optimizer_of(parameters: list[nn.Parameter], device: torch.device) -> torch.optim.Optimizer:
    """AdamW, fused on a GPU; DTensors and plain tensors, which cannot be fused together, are groups of their own."""
    kinds = sorted({type(parameter.data) for parameter in parameters}, key=str)
    groups = [[parameter for parameter in parameters if type(parameter.data) is kind] for kind in kinds]
    return torch.optim.AdamW([{"params": group} for group in groups], lr=1e-4, fused=device.type == "cuda")
