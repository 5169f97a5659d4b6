"""torch's own tensor parallelism: DTensors through `parallelize_module`, head and loss over a cut vocabulary."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    loss_parallel,
    parallelize_module,
)

from benchmarks.contestants.contract import Contestant, Setting
from benchmarks.contestants.layers import compile_layers

__all__ = ["DTensor", "DTensorCompiled"]

_COLUMNS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
_ROWS = ("self_attn.o_proj", "mlp.down_proj")


class DTensor(Contestant):
    """Llama over two ranks; GPT-2's fused weights have no such plan."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        if self.workload.family != "llama":
            raise NotImplementedError(f"no DTensor plan cuts the fused Conv1D weights of {self.workload.family}")
        self.model = setting.model()
        mesh = init_device_mesh(setting.device.type, (2,))
        plan = {
            "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
            "lm_head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False),
        }
        for layer in range(self.workload.num_layers):
            plan |= {f"model.layers.{layer}.{name}": ColwiseParallel() for name in _COLUMNS}
            plan |= {f"model.layers.{layer}.{name}": RowwiseParallel() for name in _ROWS}
        parallelize_module(self.model, mesh, plan)
        # Compiled layers do not take an output that is still on its way; a copy of it has arrived.
        self.model.get_input_embeddings().register_forward_hook(lambda _, args, output: output.clone())

    def parameters(self) -> list[nn.Parameter]:
        """This rank's."""
        return list(self.model.parameters())

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One microbatch after the other."""
        total = torch.zeros((), device=tokens.device)
        for rows in tokens.split(self.workload.micro_batch):
            logits = self.model(input_ids=rows, use_cache=False).logits
            targets = F.pad(rows[:, 1:], (0, 1), value=-100)
            with loss_parallel():
                loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
                loss = loss / self.workload.num_microbatches
                loss.backward()
            total += loss.detach().full_tensor()
        return total


class DTensorCompiled(DTensor):
    """The same with every layer compiled by itself."""

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        compile_layers(self.model, setting.compile_backend)
