"""torch.distributed.pipelining: 1F1B over two stages that are balanced as ours are."""

from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from benchmarks.contestants.contract import Contestant, Setting
from hf_tpp.plan.stages import balance_stages

__all__ = ["TorchPipeline", "TorchPipelineCompiled"]


class _LlamaStage(nn.Module):
    """Some layers of a Llama, with the embedding or the norm and head where those belong."""

    def __init__(self, model: Any, layers: range) -> None:
        super().__init__()
        inner = model.model
        is_first, is_last = layers.start == 0, layers.stop == len(inner.layers)
        self.embed_tokens = inner.embed_tokens if is_first else None
        self.rotary_emb = inner.rotary_emb
        self.layers = nn.ModuleList(inner.layers[index] for index in layers)
        self.norm, self.lm_head = (inner.norm, model.lm_head) if is_last else (None, None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Ids [rows, seq] or hidden states [rows, seq, hidden] -> hidden states or logits; attention is causal."""
        hidden = x if self.embed_tokens is None else self.embed_tokens(x)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotary = self.rotary_emb(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return hidden if self.norm is None else self.lm_head(self.norm(hidden))


class TorchPipeline(Contestant):
    """Llama; weights that two stages share, as GPT-2's embedding and head, cannot be expressed."""

    can_be_alone: ClassVar[bool] = False

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if self.workload.family != "llama":
            raise NotImplementedError(
                f"{self.workload.family} ties embedding and head, and stages of torch.distributed.pipelining share "
                f"no weights"
            )
        model: Any = setting.model()
        costs = [sum(p.numel() for p in layer.parameters()) for layer in model.model.layers]
        counts = balance_stages(costs, 2, last_cost=model.lm_head.weight.numel())
        stages = (range(counts[0]), range(counts[0], sum(counts)))
        self.rank = dist.get_rank()
        self.stage_module = _LlamaStage(model, stages[self.rank])
        self._compile()
        stage = PipelineStage(self.stage_module, self.rank, 2, setting.device)
        self.schedule = Schedule1F1B(stage, self.workload.num_microbatches, loss_fn=_causal_loss)

    def _compile(self) -> None:
        """Nothing, eager."""

    def parameters(self) -> list[nn.Parameter]:
        """This stage's."""
        return list(self.stage_module.parameters())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One pass of the schedule; it divides the gradients by the number of microbatches."""
        if self.rank == 0:
            self.schedule.step(tokens)
            loss = torch.zeros((), device=tokens.device)
        else:
            losses: list[torch.Tensor] = []
            self.schedule.step(target=tokens, losses=losses)
            loss = torch.stack(losses).mean().detach()
        dist.broadcast(loss, 1)
        return loss


class TorchPipelineCompiled(TorchPipeline):
    """The same with every layer compiled by itself."""

    def _compile(self) -> None:
        for layer in self.stage_module.layers:
            layer.compile(backend=self.setting.compile_backend)


def _causal_loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As transformers computes it: shifted by one, in float32."""
    targets = F.pad(tokens[:, 1:], (0, 1), value=-100)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
