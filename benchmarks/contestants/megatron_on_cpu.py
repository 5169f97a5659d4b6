"""What Megatron-Core asks of a GPU, answered by a CPU: for its contestants in miniature."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

__all__ = ["stand_in_for_cuda"]


class _OnCpu(TorchFunctionMode):
    """Tensors that are to be made on a GPU are made on the CPU."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def stand_in_for_cuda() -> None:
    """For the rest of this process."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: "cpu"
    cuda.synchronize = lambda *_: None
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda *_, **__: None
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda *_, **__: None
    megatron_random.initialize_rng_tracker()
    states = megatron_random.get_cuda_rng_tracker().states_
    states |= {f"{axis}-parallel-rng": torch.get_rng_state() for axis in ("model", "expert", "data")}
    _OnCpu().__enter__()
