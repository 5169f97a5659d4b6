"""TRL's trainers on a parallel model.

TRL does not ask a model for its loss. It has the decoder's hidden states multiplied with the weight of the head, in
tiles, and computes log-probabilities and entropies from that (`add_fused_lm_head`): on a parallel model these are
hidden states of one stage and one rank's rows of the weight. So for a parallel model that function is replaced by one
that gives the same outputs from the last stage's logits, which are never whole either.
"""

import functools
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hf_tpp.errors import ConfigurationError
from hf_tpp.integrations.changes import patch
from hf_tpp.integrations.replicas import find_parallel
from hf_tpp.integrations.trainer_evaluation import prediction_step
from hf_tpp.integrations.trl_trainers import FUSED_HEAD, trl_trainers
from hf_tpp.parallel_model import token_statistics
from hf_tpp.tensor_parallel.token_statistics import STATISTICS

__all__ = ["serve_trl", "serving_trl"]

_ORIGINAL = "_hf_tpp_original"


def serve_trl(trainer: Any) -> None:
    """Have the modules of a TRL trainer know of parallel models; they do as before for other models."""
    for module, kind in trl_trainers(trainer).items():
        _replace_head(module)
        if "prediction_step" in vars(kind):
            patch(kind, {"prediction_step": prediction_step}, lambda owner: find_parallel(owner.model) is not None)


@contextmanager
def serving_trl(trainer: Any) -> Iterator[None]:
    """The same for one trainer, in whose construction this context is, and for no other."""
    modules = list(trl_trainers(trainer))
    originals = [getattr(module, FUSED_HEAD, None) for module in modules]
    for module in modules:
        _replace_head(module)
    try:
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            if original is not None:
                setattr(module, FUSED_HEAD, original)


def _replace_head(module: types.ModuleType) -> None:
    original = getattr(module, FUSED_HEAD, None)
    if original is not None and not hasattr(original, _ORIGINAL):
        setattr(module, FUSED_HEAD, _for_both(original))


def _for_both(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def add(model: Any, *args: Any, **kwargs: Any) -> None:
        (original if find_parallel(model) is None else _add_parallel_head)(model, *args, **kwargs)

    setattr(add, _ORIGINAL, original)
    return add


def _add_parallel_head(
    model: Any,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: tuple[str, ...] = ("log_probs",),
) -> None:
    """What TRL's function does, for a parallel model: the same outputs of `model(..., fused_lm_head=True)`."""
    from trl.trainer.utils import FusedCausalLMOutput

    if cast_lm_head_to_fp32:
        raise ConfigurationError(
            "cast_lm_head_to_fp32=True is not available with a parallel model: leave it out, or load the model in "
            "float32"
        )
    wanted = {"log_probs", *outputs}
    plain_forward = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(*args, **kwargs)
        found, router_loss = token_statistics(self, *args, temperature=temperature, **kwargs)
        shifted = kwargs.get("shift_labels")
        mask = (kwargs["labels"][:, 1:] if shifted is None else shifted).to(found["log_probs"].device) != -100
        count = kwargs.get("num_items_in_batch")
        loss = -found["log_probs"].sum() / (mask.sum().clamp(min=1) if count is None else count)
        if router_loss is not None:
            loss = loss + getattr(self.config.get_text_config(), "router_aux_loss_coef", 0.0) * router_loss
        fields = {name: found[name] for name in STATISTICS if name in wanted}
        return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=router_loss, **fields)

    model.forward = types.MethodType(forward, model)
